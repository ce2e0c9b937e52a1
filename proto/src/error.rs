/// What is wrong with bytes, a name or a step of the protocol. Each says what was read and why it is refused; none says
/// that a retry would help, because the same bytes would be refused again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Error {
    /// Fewer bytes than the format needs.
    #[error("{what}: {have} bytes where {need} are needed")]
    Truncated { what: &'static str, need: u64, have: u64 },
    /// The magic number is another one.
    #[error("{what}: not one of ours (magic number differs)")]
    Magic { what: &'static str },
    /// A version that this build does not read.
    #[error("{what}: version {found}, this build reads {known}")]
    Version { what: &'static str, found: u16, known: u16 },
    /// A checksum does not fit its bytes.
    #[error("{what}: checksum differs (stored {stored:#010x}, computed {computed:#010x})")]
    Checksum { what: &'static str, stored: u32, computed: u32 },
    /// A field is outside its range.
    #[error("{what}: {field} is {value}, allowed is {allowed}")]
    Range { what: &'static str, field: &'static str, value: u64, allowed: &'static str },
    /// A length is over its limit.
    #[error("{what}: {value} bytes, the limit is {limit}")]
    TooLong { what: &'static str, value: u64, limit: u64 },
    /// An authentication tag does not fit: other key, or changed bytes.
    #[error("{what}: authentication failed (changed bytes, or another key)")]
    Forged { what: &'static str },
    /// Compressed data does not decompress to what its header says.
    #[error("{what}: does not decompress: {reason}")]
    Compression { what: &'static str, reason: String },
    /// A message that cannot be decoded.
    #[error("{what}: malformed: {reason}")]
    Malformed { what: &'static str, reason: String },
    /// A name of a vault, group, host or volume that is not allowed.
    #[error("name {name:?}: {reason}")]
    Name { name: String, reason: &'static str },
    /// A step that the session's state does not allow.
    #[error("session: {got} while {state}")]
    Unexpected { got: &'static str, state: &'static str },
    /// A source greets with a key that the target was not given.
    #[error("the source has the key of epoch {epoch}, this target has none of it: give the target a newer bundle")]
    UnknownKey { epoch: crate::KeyEpoch },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn truncated(what: &'static str, need: usize, have: usize) -> Self {
        Self::Truncated { what, need: need as u64, have: have as u64 }
    }
}
