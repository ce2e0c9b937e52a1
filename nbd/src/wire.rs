//! Numbers of the NBD protocol, as published in the protocol document of the NBD project (`doc/proto.md`).
//!
//! Everything on the wire is big-endian.

/// First eight bytes of the greeting (`NBDMAGIC`).
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of the greeting and the first of every option (`IHAVEOPT`).
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of a request without its payload.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a simple reply without its payload.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a chunk without its payload.
pub const CHUNK_LEN: usize = 20;
/// Bytes of an option without its data.
pub const OPTION_LEN: usize = 16;
/// Bytes of an option reply without its data.
pub const OPTION_REPLY_LEN: usize = 20;
/// Longest string of the protocol in bytes.
pub const STRING_MAX: usize = 4096;
/// Longest payload of a read or write in bytes that portable clients use, and that this server takes.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Handshake flags: bit 0 fixed newstyle, bit 1 no zeroes after `EXPORT_NAME`; the same bits in both directions.
pub mod handshake {
    /// The server answers options; the client knows.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options.
pub mod option {
    /// Ends the haggling, with a reply that cannot say no.
    pub const EXPORT_NAME: u32 = 1;
    /// The client gives up.
    pub const ABORT: u32 = 2;
    /// Names of the exports.
    pub const LIST: u32 = 3;
    /// TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin transmission.
    pub const GO: u32 = 7;
    /// Replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Option replies.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option is not allowed here.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The option's data are too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information in `INFO` replies.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// For people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum request in bytes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `DF` is understood (structured replies only).
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush covers the writes of all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Data from the device.
    pub const READ: u16 = 0;
    /// Data to the device; the payload follows the request.
    pub const WRITE: u16 = 1;
    /// The client leaves; no reply.
    pub const DISC: u16 = 2;
    /// Everything answered before becomes durable.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// The range reads as zeroes afterwards.
    pub const WRITE_ZEROES: u16 = 6;
    /// How a range is stored.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Zeroes stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One data chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zero fast or fail with `ENOTSUP`.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types and flags of structured reply chunks.
pub mod chunk {
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
    /// No content; only as the last chunk.
    pub const NONE: u16 = 0;
    /// Data of a range.
    pub const OFFSET_DATA: u16 = 1;
    /// A range that reads as zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error.
    pub const ERROR: u16 = 32769;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = 32770;
}

/// The metadata context of allocation.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its id on our connections.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Error numbers of the protocol (Linux values, whatever the host).
pub mod error {
    /// Writing to a read-only export.
    pub const EPERM: u32 = 1;
    /// The device failed.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// The request makes no sense.
    pub const EINVAL: u32 = 22;
    /// Beyond the end, or no room below.
    pub const ENOSPC: u32 = 28;
    /// Too large for the flags it came with.
    pub const EOVERFLOW: u32 = 75;
    /// Not available (or not fast, for `FAST_ZERO`).
    pub const ENOTSUP: u32 = 95;
    /// The server is stopping.
    pub const ESHUTDOWN: u32 = 108;
}
