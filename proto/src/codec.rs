//! The one place that names bincode: control messages and batch annotations, fixed-width integers, with a limit that is
//! checked before anything is allocated.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

use crate::{Error, Result};

/// Longest encoded value: bounds what a hostile peer can make us allocate (I11).
pub const ENCODED_BYTES_MAX: usize = 1 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<ENCODED_BYTES_MAX>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<ENCODED_BYTES_MAX>();

/// Encodes `value`.
///
/// # Errors
/// [`Error::Malformed`] when it exceeds [`ENCODED_BYTES_MAX`].
pub fn encode<T: bincode::Encode>(what: &'static str, value: &T) -> Result<Vec<u8>> {
    bincode::encode_to_vec(value, CONFIG).map_err(|error| Error::Malformed { what, reason: error.to_string() })
}

/// Decodes exactly `bytes`; left-over bytes are an error.
///
/// # Errors
/// [`Error::Malformed`] with the reason.
pub fn decode<T: bincode::Decode<()>>(what: &'static str, bytes: &[u8]) -> Result<T> {
    let (value, used) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|error| Error::Malformed { what, reason: error.to_string() })?;
    if used == bytes.len() {
        Ok(value)
    } else {
        Err(Error::Malformed { what, reason: format!("{} bytes left over", bytes.len() - used) })
    }
}
