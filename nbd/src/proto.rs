//! What is served, and the requests of the transmission phase: pure functions over bytes.

use farshore_uring::{Errno, Geometry};

use crate::error::{Error, ErrorKind};
use crate::wire::{self, command, error, flag, transmission};

/// Pieces of long reads and writes are no shorter than this, in bytes. Data that were received and are written at once are
/// still in the core's cache at this size: 1 MiB requests on a cached file run 10 to 20 % faster in pieces of 128 KiB than
/// whole. Not shorter than a device's preferred unit, either (a RAID's stripe).
const PART_MIN: u32 = 128 << 10;

/// The one device of a server, as clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    name: String,
    description: String,
    geometry: Geometry,
}

impl Export {
    /// An export; it also answers to the empty name, which clients use for "the default".
    ///
    /// # Errors
    /// `Invalid`: name or description longer than the protocol's 4096 bytes, or a geometry that cannot be served.
    pub fn new(name: &str, description: &str, geometry: Geometry) -> Result<Self, Error> {
        let invalid = |why: String| Err(Error::new(ErrorKind::Invalid, format!("export {name:?}: {why}")));
        if name.len() > wire::STRING_MAX || description.len() > wire::STRING_MAX {
            return invalid(format!("name and description may have at most {} bytes each", wire::STRING_MAX));
        }
        let block = geometry.logical_block;
        if !block.is_power_of_two() || !(512..=65536).contains(&block) {
            return invalid(format!("a logical block of {block} bytes; powers of two from 512 to 65536 can be served"));
        }
        if !geometry.size.is_multiple_of(u64::from(block)) || i64::try_from(geometry.size).is_err() {
            return invalid(format!("a size of {} bytes is not a multiple of the block of {block}", geometry.size));
        }
        if geometry.max_request < block || geometry.max_discard < block {
            return invalid("the longest request is shorter than one block".to_owned());
        }
        // Requests are split at these limits, and every piece has to be whole blocks.
        let whole = |len: u32| len - len % block;
        let (max_request, max_discard) = (whole(geometry.max_request), whole(geometry.max_discard));
        let geometry = Geometry { max_request, max_discard, ..geometry };
        Ok(Self { name: name.to_owned(), description: description.to_owned(), geometry })
    }

    /// As told to [`Self::new`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As told to [`Self::new`].
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// As told to [`Self::new`], with the limits rounded down to whole blocks.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Whether a client that says `name` means this export.
    #[must_use]
    pub fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    /// Transmission flags. `DF` exists only with structured replies.
    #[must_use]
    pub fn flags(&self, structured: bool) -> u16 {
        let mut flags =
            transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_FUA | transmission::CAN_MULTI_CONN;
        if structured {
            flags |= transmission::SEND_DF;
        }
        if self.geometry.read_only {
            return flags | transmission::READ_ONLY;
        }
        flags |= transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO;
        if self.geometry.discard {
            flags |= transmission::SEND_TRIM;
        }
        flags
    }

    /// Longest piece in which reads and writes go to the device, in bytes.
    #[must_use]
    pub(crate) fn part_len(&self) -> u32 {
        self.geometry.max_request.min(PART_MIN.max(self.geometry.optimal_block))
    }

    /// Minimum, preferred and maximum length of a request in bytes.
    #[must_use]
    pub fn block_sizes(&self) -> [u32; 3] {
        let minimum = self.geometry.logical_block;
        let preferred = self.geometry.optimal_block.clamp(minimum, wire::PAYLOAD_MAX);
        [minimum, preferred, wire::PAYLOAD_MAX]
    }
}

/// What client and server agreed on before transmission.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Negotiated {
    /// Reads are answered in chunks.
    pub structured: bool,
    /// `base:allocation` was selected: block status is answered.
    pub allocation: bool,
}

/// A breach of the protocol after which the stream has no meaning any more: the connection ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// A request that does not begin with the request magic.
    #[error("a request begins with {0:#010x}, not with the magic")]
    RequestMagic(u32),
    /// An option that does not begin with `IHAVEOPT`.
    #[error("an option begins with {0:#018x}, not with the magic")]
    OptionMagic(u64),
    /// Client flags that this server did not offer.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// `EXPORT_NAME` with a name that is not served, which that option cannot answer.
    #[error("unknown export name")]
    ExportName,
    /// More options than anyone needs.
    #[error("too many options")]
    Options,
}

/// One request as it came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub kind: u16,
    /// Opaque; comes back in the reply.
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// A request that may go to the device. Ranges are checked: aligned, inside the device, not empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Data from the device.
    Read,
    /// Data to the device.
    Write {
        /// Durable before the reply.
        fua: bool,
    },
    /// Make durable.
    Flush,
    /// Give back.
    Trim {
        /// Durable before the reply.
        fua: bool,
    },
    /// Make zero.
    WriteZeroes {
        /// Durable before the reply.
        fua: bool,
        /// Keep allocated.
        no_hole: bool,
    },
    /// Tell how it is stored.
    BlockStatus {
        /// One extent is enough.
        one: bool,
    },
    /// The client leaves.
    Disconnect,
}

impl RequestHeader {
    /// Takes a request apart.
    ///
    /// # Errors
    /// Without the magic the stream is lost.
    pub fn parse(bytes: &[u8; wire::REQUEST_LEN]) -> Result<Self, Violation> {
        let (magic, rest) = take::<4>(bytes);
        let magic = u32::from_be_bytes(magic);
        if magic != wire::REQUEST_MAGIC {
            return Err(Violation::RequestMagic(magic));
        }
        let (flags, rest) = take::<2>(rest);
        let (kind, rest) = take::<2>(rest);
        let (cookie, rest) = take::<8>(rest);
        let (offset, rest) = take::<8>(rest);
        let (len, _) = take::<4>(rest);
        Ok(Self {
            flags: u16::from_be_bytes(flags),
            kind: u16::from_be_bytes(kind),
            cookie: u64::from_be_bytes(cookie),
            offset: u64::from_be_bytes(offset),
            len: u32::from_be_bytes(len),
        })
    }

    /// The reverse of [`Self::parse`].
    #[must_use]
    pub fn encode(&self) -> [u8; wire::REQUEST_LEN] {
        let mut bytes = [0; wire::REQUEST_LEN];
        bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }

    /// Bytes that follow the request, whether it is good or not.
    #[must_use]
    pub fn payload_len(&self) -> u32 {
        if self.kind == command::WRITE { self.len } else { 0 }
    }

    /// Decides what the request means for `export`.
    ///
    /// # Errors
    /// The protocol's error number for the reply; the connection goes on.
    pub fn check(&self, export: &Export, negotiated: Negotiated) -> Result<Command, u32> {
        let fua = self.flags & flag::FUA != 0;
        let allowed = |flags: u16| if self.flags & !(flags | flag::FUA) == 0 { Ok(()) } else { Err(error::EINVAL) };
        match self.kind {
            command::READ => {
                allowed(if negotiated.structured { flag::DF } else { 0 })?;
                self.check_range(export, error::EINVAL)?;
                if self.len > wire::PAYLOAD_MAX {
                    return Err(if self.flags & flag::DF != 0 { error::EOVERFLOW } else { error::EINVAL });
                }
                Ok(Command::Read)
            }
            command::WRITE => {
                allowed(0)?;
                self.check_write(export)?;
                if self.len > wire::PAYLOAD_MAX { Err(error::EINVAL) } else { Ok(Command::Write { fua }) }
            }
            command::DISC => Ok(Command::Disconnect),
            command::FLUSH => {
                allowed(0)?;
                if (self.offset, self.len) == (0, 0) { Ok(Command::Flush) } else { Err(error::EINVAL) }
            }
            command::TRIM => {
                allowed(0)?;
                if export.geometry.read_only {
                    return Err(error::EPERM);
                }
                self.check_range(export, error::EINVAL)?;
                if export.geometry.discard { Ok(Command::Trim { fua }) } else { Err(error::ENOTSUP) }
            }
            command::WRITE_ZEROES => {
                allowed(flag::NO_HOLE | flag::FAST_ZERO)?;
                self.check_write(export)?;
                // Zeroing is fast where it is a deallocation; elsewhere it may be a write of zeroes.
                if self.flags & flag::FAST_ZERO != 0 && !export.geometry.discard {
                    return Err(error::ENOTSUP);
                }
                Ok(Command::WriteZeroes { fua, no_hole: self.flags & flag::NO_HOLE != 0 })
            }
            command::BLOCK_STATUS => {
                allowed(flag::REQ_ONE)?;
                if !negotiated.allocation {
                    return Err(error::EINVAL);
                }
                self.check_range(export, error::EINVAL)?;
                Ok(Command::BlockStatus { one: self.flags & flag::REQ_ONE != 0 })
            }
            _ => Err(error::EINVAL),
        }
    }

    fn check_write(&self, export: &Export) -> Result<(), u32> {
        if export.geometry.read_only {
            return Err(error::EPERM);
        }
        self.check_range(export, error::ENOSPC)
    }

    fn check_range(&self, export: &Export, beyond: u32) -> Result<(), u32> {
        let block = u64::from(export.geometry.logical_block);
        let len = u64::from(self.len);
        if len == 0 || !self.offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(error::EINVAL);
        }
        match self.offset.checked_add(len) {
            Some(end) if end <= export.geometry.size => Ok(()),
            _ => Err(beyond),
        }
    }
}

/// Whether the replies to a command are chunks. Reads and block status are, once agreed; everything else stays simple.
#[must_use]
pub fn is_chunked(kind: u16, negotiated: Negotiated) -> bool {
    negotiated.structured && matches!(kind, command::READ | command::BLOCK_STATUS)
}

/// The protocol's error number for a device's.
#[must_use]
pub fn error_number(errno: Errno) -> u32 {
    use nix::libc;
    match errno.0 {
        libc::EPERM | libc::EACCES | libc::EROFS => error::EPERM,
        libc::ENOMEM => error::ENOMEM,
        libc::EINVAL => error::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => error::ENOSPC,
        libc::EOVERFLOW => error::EOVERFLOW,
        libc::EOPNOTSUPP => error::ENOTSUP,
        libc::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// The first `N` bytes, and the rest.
///
/// # Panics
/// If there are fewer; callers have checked the length.
pub(crate) fn take<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    let (head, rest) = bytes.split_first_chunk::<N>().expect("the caller checked the length");
    (*head, rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            size: 1 << 20,
            logical_block: 4096,
            optimal_block: 65536,
            max_request: 1 << 20,
            max_discard: 1 << 30,
            read_only: false,
            discard: true,
        }
    }

    const ALL: Negotiated = Negotiated { structured: true, allocation: true };

    fn check(kind: u16, flags: u16, offset: u64, len: u32) -> Result<Command, u32> {
        let export = Export::new("e", "", geometry()).expect("a good geometry");
        RequestHeader { flags, kind, cookie: 1, offset, len }.check(&export, ALL)
    }

    #[test]
    fn refuses_what_the_device_could_not_take() {
        assert_eq!(check(command::READ, 0, 512, 4096), Err(error::EINVAL), "unaligned offset");
        assert_eq!(check(command::READ, 0, 0, 512), Err(error::EINVAL), "unaligned length");
        assert_eq!(check(command::READ, 0, 0, 0), Err(error::EINVAL), "empty");
        assert_eq!(check(command::READ, 0, 1 << 20, 4096), Err(error::EINVAL), "beyond the end");
        assert_eq!(check(command::WRITE, 0, 1 << 20, 4096), Err(error::ENOSPC));
        assert_eq!(check(command::WRITE, 0, u64::MAX - 4095, 4096), Err(error::ENOSPC), "the end wraps");
        assert_eq!(check(command::WRITE, flag::DF, 0, 4096), Err(error::EINVAL), "a flag of another command");
        assert_eq!(check(command::READ, 1 << 9, 0, 4096), Err(error::EINVAL), "unknown flag");
        assert_eq!(check(99, 0, 0, 4096), Err(error::EINVAL), "unknown command");
        assert_eq!(check(command::FLUSH, 0, 4096, 0), Err(error::EINVAL));
        assert_eq!(check(command::WRITE, flag::FUA, 0, 4096), Ok(Command::Write { fua: true }));
        assert_eq!(check(command::READ, flag::DF, 0, 4096), Ok(Command::Read));
    }

    #[test]
    fn limits_the_payload_before_anyone_allocates() {
        let mut big = geometry();
        big.size = 1 << 40;
        let export = Export::new("e", "", big).expect("a good geometry");
        let check = |kind, flags, len| RequestHeader { flags, kind, cookie: 0, offset: 0, len }.check(&export, ALL);
        assert_eq!(check(command::READ, 0, wire::PAYLOAD_MAX), Ok(Command::Read));
        assert_eq!(check(command::READ, 0, wire::PAYLOAD_MAX + 4096), Err(error::EINVAL));
        assert_eq!(check(command::READ, flag::DF, wire::PAYLOAD_MAX + 4096), Err(error::EOVERFLOW));
        assert_eq!(check(command::WRITE, 0, 0xffff_f000), Err(error::EINVAL));
        assert_eq!(check(command::TRIM, 0, 0xffff_f000), Ok(Command::Trim { fua: false }));
    }

    #[test]
    fn read_only_export_says_so_and_refuses_writes() {
        let export = Export::new("e", "", Geometry { read_only: true, ..geometry() }).expect("a good geometry");
        assert_ne!(export.flags(true) & transmission::READ_ONLY, 0);
        assert_eq!(export.flags(true) & transmission::SEND_TRIM, 0);
        for kind in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let header = RequestHeader { flags: 0, kind, cookie: 0, offset: 0, len: 4096 };
            assert_eq!(header.check(&export, ALL), Err(error::EPERM));
        }
    }

    #[test]
    fn fast_zero_needs_deallocation() {
        let export = Export::new("e", "", Geometry { discard: false, ..geometry() }).expect("a good geometry");
        let zero = |flags| {
            let header = RequestHeader { flags, kind: command::WRITE_ZEROES, cookie: 0, offset: 0, len: 4096 };
            header.check(&export, ALL)
        };
        assert_eq!(zero(flag::FAST_ZERO), Err(error::ENOTSUP));
        assert_eq!(zero(flag::NO_HOLE), Ok(Command::WriteZeroes { fua: false, no_hole: true }));
    }

    #[test]
    fn geometry_that_cannot_be_served_is_refused() {
        for (size, logical_block) in [(1000, 512), (4096, 1), (4096, 3000), (1 << 63, 512)] {
            let geometry = Geometry { size, logical_block, ..geometry() };
            assert!(Export::new("e", "", geometry).is_err(), "{geometry:?}");
        }
        assert!(Export::new(&"n".repeat(5000), "", geometry()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(bytes in any::<[u8; wire::REQUEST_LEN]>(), good_magic: bool) {
            let mut bytes = bytes;
            if good_magic {
                bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
            }
            if let Ok(header) = RequestHeader::parse(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
                let export = Export::new("e", "", geometry()).expect("a good geometry");
                if let Ok(command) = header.check(&export, ALL)
                    && !matches!(command, Command::Flush | Command::Disconnect)
                {
                    prop_assert!(header.offset + u64::from(header.len) <= export.geometry().size);
                }
            }
        }
    }
}
