//! Completion-based I/O with owned buffers: the one interface behind which the real ring and its simulated twin stand.

use std::io;

use crate::IoBuf;

/// Names one operation to its submitter; handed back unchanged in its [`Completion`].
///
/// The top bit says whose it is ([`Token::front`], [`Token::device`]), so that a front end and the device below
/// it can share one ring without a table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u64);

impl Token {
    /// Bit that marks operations of a front end (sockets, timers); clear for those of a [`crate::BlockQueue`].
    pub const FRONT_BIT: u64 = 1 << 63;

    /// A front end's token; `value` must leave the top bit free.
    #[must_use]
    pub const fn front(value: u64) -> Self {
        Self(value | Self::FRONT_BIT)
    }

    /// A device queue's token; `value` must leave the top bit free.
    #[must_use]
    pub const fn device(value: u64) -> Self {
        Self(value & !Self::FRONT_BIT)
    }

    /// Whether a front end submitted the operation.
    #[must_use]
    pub const fn is_front(self) -> bool {
        self.0 & Self::FRONT_BIT != 0
    }

    /// The value without the owner's bit.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0 & !Self::FRONT_BIT
    }
}

/// A file known to one [`Io`] (a registered file of the ring). Only valid with the `Io` that returned it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileSlot(pub u32);

/// What to do with a range without sending data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allocate {
    /// Deallocate; the range reads as zeroes afterwards. On a block device: BLKDISCARD is *not* used, because its result may be
    /// undefined; the kernel's `fallocate(PUNCH_HOLE)` on a block device zeroes with unmap.
    PunchHole,
    /// Zero the range and keep it allocated.
    ZeroRange,
}

/// One operation. Offsets and lengths are in bytes; a buffer in an operation belongs to the ring until its completion.
#[derive(Debug)]
pub enum Op<B> {
    /// Fill the first `len` bytes of `buf` from `offset`. Short reads are continued; the end of the file is
    /// `UnexpectedEof`.
    Read {
        /// Where from.
        file: FileSlot,
        /// Position in the file.
        offset: u64,
        /// At least `len` bytes.
        buf: B,
        /// How much.
        len: u32,
    },
    /// Write the first `len` bytes of `buf` at `offset`. Short writes are continued.
    Write {
        /// Where to.
        file: FileSlot,
        /// Position in the file.
        offset: u64,
        /// At least `len` bytes.
        buf: B,
        /// How much.
        len: u32,
        /// Durable at completion (`RWF_DSYNC`).
        dsync: bool,
    },
    /// Write, then `fdatasync`, linked in one submission; completes once, after both, with the first error of the two.
    WriteThenSync {
        /// Where to.
        file: FileSlot,
        /// Position in the file.
        offset: u64,
        /// At least `len` bytes.
        buf: B,
        /// How much.
        len: u32,
    },
    /// `fdatasync`.
    Sync {
        /// Of which file.
        file: FileSlot,
    },
    /// `fallocate`; never changes the file's size.
    Allocate {
        /// Of which file.
        file: FileSlot,
        /// What becomes of the range.
        mode: Allocate,
        /// Start of the range.
        offset: u64,
        /// Length of the range.
        len: u64,
    },
}

/// The end of one operation.
#[derive(Debug)]
pub struct Completion<B> {
    /// As submitted.
    pub token: Token,
    /// Bytes transferred (always all that was asked for; 0 for operations without data), or the error.
    pub result: io::Result<u32>,
    /// The operation's buffer, given back.
    pub buf: Option<B>,
}

/// The end of one command to a driver ([`crate::Reactor::command`]).
#[derive(Debug)]
pub struct CommandCompletion<B> {
    /// As submitted.
    pub token: Token,
    /// What the driver answered.
    pub result: io::Result<u32>,
    /// The command's buffer, given back.
    pub buf: Option<B>,
}

/// Submits operations and collects completions, for one thread.
///
/// Neither call waits. Operations of one `Io` may complete in any order; who needs an order waits for the completion.
pub trait Io<B: IoBuf> {
    /// Queues `op`. It starts at the latest when the owner of the ring next enters the kernel.
    fn submit(&mut self, token: Token, op: Op<B>);

    /// Makes `file` known; `file` stays open until [`Io::unregister`].
    ///
    /// # Errors
    /// The kernel's, or `OutOfMemory` when the file table is full.
    fn register(&mut self, file: std::sync::Arc<std::fs::File>) -> io::Result<FileSlot>;

    /// Forgets a file. Operations in flight on it still end.
    fn unregister(&mut self, file: FileSlot);

    /// A handle by which other threads make this one leave its wait.
    fn waker(&self) -> crate::Waker;
}
