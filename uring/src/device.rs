//! The block device that front ends serve: what a filter, a plain file or a view of a recovery point looks like from above.

use std::io;

use crate::{Completion, Io, IoBuf};

/// Shape and limits of a block device, as its front end advertises them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes; a multiple of `logical_block`.
    pub size: u64,
    /// Smallest unit of I/O in bytes: 512 or 4096.
    pub logical_block: u32,
    /// Preferred unit of I/O in bytes; a power of two, at least `logical_block`.
    pub optimal_block: u32,
    /// Longest read or write that [`BlockQueue::submit`] takes, in bytes; front ends split longer requests.
    pub max_request: u32,
    /// Longest discard or write-zeroes in bytes; front ends split longer ones.
    pub max_discard: u32,
    /// Writes, discards and zeroes are refused with `EROFS`/`EPERM`.
    pub read_only: bool,
    /// Discards are taken and read as zeroes afterwards.
    pub discard: bool,
}

/// One request of a guest. `offset` and `len` in bytes, multiples of `logical_block`, inside the device: the front end has
/// checked that.
#[derive(Debug)]
pub enum Request<B> {
    /// Fill the first `len` bytes of `buf`.
    Read {
        /// Position on the device.
        offset: u64,
        /// At most [`Geometry::max_request`].
        len: u32,
        /// From [`BlockQueue::buffer`].
        buf: B,
    },
    /// Write the first `len` bytes of `buf`.
    Write {
        /// Position on the device.
        offset: u64,
        /// At most [`Geometry::max_request`].
        len: u32,
        /// From [`BlockQueue::buffer`].
        buf: B,
        /// Durable at completion.
        fua: bool,
    },
    /// Everything completed before this was submitted becomes durable.
    Flush,
    /// The range reads as zeroes afterwards and may be deallocated.
    Discard {
        /// Position on the device.
        offset: u64,
        /// At most [`Geometry::max_discard`].
        len: u64,
    },
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// Position on the device.
        offset: u64,
        /// At most [`Geometry::max_discard`].
        len: u64,
        /// Durable at completion.
        fua: bool,
        /// The range stays allocated.
        no_hole: bool,
    },
}

/// The end of one request.
#[derive(Debug)]
pub struct Done<B> {
    /// As submitted.
    pub tag: u32,
    /// `Err` carries the errno for the guest.
    pub result: Result<(), Errno>,
    /// A read's buffer, filled. A write's buffer is not given back: it belongs to the capture stream.
    pub buf: Option<B>,
}

/// An error number for a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

/// What a buffer is wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To be filled by the device.
    Read,
    /// To be filled by the guest and written (a cell of the capture slab, where one is free).
    Write,
}

/// How a range is stored, for clients that copy only what exists (NBD `base:allocation`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// A device with any number of queues. Shared by the front end's threads; each opens its own queue.
pub trait BlockDevice: Send + Sync + 'static {
    /// The buffers its requests carry.
    type Buf: IoBuf;
    /// One thread's part.
    type Queue: BlockQueue<Buf = Self::Buf>;

    /// Shape and limits; constant while the device is served.
    fn geometry(&self) -> Geometry;

    /// Opens one more queue, to be driven by the calling thread over `io`.
    ///
    /// # Errors
    /// From registering files or buffers.
    fn open_queue<I: Io<Self::Buf>>(&self, io: &mut I) -> io::Result<Self::Queue>;

    /// Allocation of `[offset, offset + len)`: extents in order, at least one, together at most `len` (may be less).
    /// May block on file-system metadata.
    ///
    /// # Errors
    /// The errno for the guest.
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno>;
}

/// One thread's part of a [`BlockDevice`]: a machine fed with requests and completions.
///
/// Call order: [`Self::buffer`] → fill → [`Self::submit`]; every [`Completion`] whose token is not a front end's goes to
/// [`Self::handle_completion`]; after each of these (and after a wake-up, [`Self::handle_wake`]) drain [`Self::poll_done`].
pub trait BlockQueue {
    /// The buffers its requests carry.
    type Buf: IoBuf;

    /// A buffer of at least `len` bytes (`len` ≤ `max_request`). Never fails: where no cell is free it is ordinary memory.
    fn buffer(&mut self, purpose: Purpose, len: u32) -> Self::Buf;

    /// Starts a request. `tag` is free for reuse once its [`Done`] came.
    fn submit<I: Io<Self::Buf>>(&mut self, io: &mut I, tag: u32, request: Request<Self::Buf>);

    /// An operation of this queue ended.
    fn handle_completion<I: Io<Self::Buf>>(&mut self, io: &mut I, completion: Completion<Self::Buf>);

    /// Another thread woke this one (a range became free, a worker finished).
    fn handle_wake<I: Io<Self::Buf>>(&mut self, io: &mut I);

    /// The next finished request.
    #[must_use]
    fn poll_done(&mut self) -> Option<Done<Self::Buf>>;

    /// Gives back what [`BlockDevice::open_queue`] registered with `io`. Call it when every request has ended and the ring
    /// goes on without this queue; dropping the ring does the same.
    fn close<I: Io<Self::Buf>>(&mut self, _io: &mut I) {}
}
