//! The durable twin of the ring's `clean` flag: a small record that the caller keeps in its state directory.
//!
//! The rule: written with `in_use` (durably) before a ring takes its first write, cleared (durably) after an orderly stop. Found set while
//! the ring is gone, everything must be compared.

use crate::Error;
use crate::crc::crc32c;

/// The record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InUse {
    /// A ring of this incarnation may hold what nothing else holds.
    pub in_use: bool,
    /// Boot in which it was made.
    pub boot: [u8; 16],
    /// Its incarnation; the next ring gets a higher one.
    pub incarnation: u64,
    /// Its generation.
    pub generation: u64,
}

const MAGIC: [u8; 8] = *b"FARSUSE1";
const FLAG: usize = 8;
const BOOT: usize = FLAG + 8;
const INCARNATION: usize = BOOT + 16;
const GENERATION: usize = INCARNATION + 8;
const CHECKSUM: usize = GENERATION + 8;
const END: usize = CHECKSUM + 4;
const _: () = assert!(END <= InUse::BYTES);

impl InUse {
    /// Bytes of the encoded record; far below a sector, so that a write of it is not torn.
    pub const BYTES: usize = 64;

    /// The record's bytes. The caller writes them to a new file, syncs it, renames it over the old one and syncs the folder.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..FLAG].copy_from_slice(&MAGIC);
        out[FLAG] = u8::from(self.in_use);
        out[BOOT..INCARNATION].copy_from_slice(&self.boot);
        out[INCARNATION..GENERATION].copy_from_slice(&self.incarnation.to_le_bytes());
        out[GENERATION..CHECKSUM].copy_from_slice(&self.generation.to_le_bytes());
        let checksum = crc32c(&out[..CHECKSUM]);
        out[CHECKSUM..END].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a record.
    ///
    /// # Errors
    /// `Corrupt`: treat it as `in_use`, incarnation unknown.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let length = bytes.len() as u64;
        let bytes: &[u8; Self::BYTES] =
            bytes.try_into().map_err(|_| Error::Corrupt { what: "in-use record has a wrong length", value: length })?;
        fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[at + i])
        }
        let checksum = u32::from_le_bytes(field(bytes, CHECKSUM));
        if bytes[..FLAG] != MAGIC || checksum != crc32c(&bytes[..CHECKSUM]) {
            return Err(Error::Corrupt { what: "in-use record is damaged", value: u64::from(checksum) });
        }
        Ok(Self {
            in_use: bytes[FLAG] != 0,
            boot: field(bytes, BOOT),
            incarnation: u64::from_le_bytes(field(bytes, INCARNATION)),
            generation: u64::from_le_bytes(field(bytes, GENERATION)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_comes_back_and_damage_is_seen() {
        let record = InUse { in_use: true, boot: [9; 16], incarnation: 7, generation: 3 };
        let bytes = record.encode();
        assert_eq!(InUse::decode(&bytes).expect("own record"), record);
        for bit in 0..END * 8 {
            let mut torn = bytes;
            torn[bit / 8] ^= 1 << (bit % 8);
            assert!(InUse::decode(&torn).is_err(), "bit {bit}");
        }
        assert!(InUse::decode(&bytes[..63]).is_err());
    }
}
