//! What a [`crate::Reactor`] does with sockets and timers for a front end.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use crate::{AlignedBuf, IoBuf, Token};

/// The end of one socket or timer operation.
#[derive(Debug)]
pub struct NetCompletion<B> {
    /// As submitted.
    pub token: Token,
    /// Bytes transferred (0 at a receive: the peer has shut down its side), 0 for accept and timeout, or the error;
    /// `ECANCELED` after [`crate::Reactor::close`] or [`crate::Reactor::cancel`].
    pub result: io::Result<u32>,
    /// What ended, and what was lent for it.
    pub event: NetEvent<B>,
}

/// The operation of a [`NetCompletion`].
#[derive(Debug)]
pub enum NetEvent<B> {
    /// A connection; `None` with an error.
    Accepted(Option<OwnedFd>),
    /// A receive. The bytes fill the range of `first` and then that of `second`. Also on error.
    Received {
        /// As lent.
        first: Option<B>,
        /// As lent.
        second: Option<AlignedBuf>,
    },
    /// A send; all of it is sent where the result is `Ok`. Clear the list for reuse.
    Sent(SendList<B>),
    /// The time has come (or the timer was cancelled: `Err`).
    Timeout,
}

/// Pieces to be sent one behind the other in one operation. Reusable: [`SendList::clear`] keeps its memory.
pub struct SendList<B> {
    pub(crate) inner: Box<SendInner<B>>,
}

/// Boxed so that the header and the vector stay in place while the list moves.
pub(crate) struct SendInner<B> {
    pub(crate) header: libc::msghdr,
    pub(crate) vector: [libc::iovec; SEND_PIECES_MAX],
    pub(crate) pieces: Vec<Piece<B>>,
    pub(crate) bytes: usize,
}

/// A buffer of a [`SendList`].
#[derive(Debug)]
pub enum SendBuf<B> {
    /// Protocol headers.
    Own(AlignedBuf),
    /// Data of the device.
    Device(B),
}

// SAFETY: the buffers are `Send` (`IoBuf`, `AlignedBuf`); the pointers in header and vector are rewritten before each use
// and read by nobody but the kernel during a send.
unsafe impl<B: Send> Send for SendInner<B> {}

pub(crate) struct Piece<B> {
    pub(crate) buf: SendBuf<B>,
    pub(crate) range: Range<usize>,
}

/// Most pieces of one [`SendList`]: one reply each for header and data at the usual queue depth of 32.
pub const SEND_PIECES_MAX: usize = 64;

impl<B: IoBuf> SendList<B> {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        // SAFETY: `msghdr` is a C struct of integers and pointers, for which all zeroes is a value (nothing to send).
        let header = unsafe { std::mem::zeroed() };
        let vector = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; SEND_PIECES_MAX];
        let pieces = Vec::with_capacity(SEND_PIECES_MAX);
        Self { inner: Box::new(SendInner { header, vector, pieces, bytes: 0 }) }
    }

    /// Appends `range` of `buf`; an empty range is allowed.
    ///
    /// # Panics
    /// If the list is full ([`Self::is_full`]), the range lies outside of the buffer, or the list's bytes pass `u32::MAX`.
    pub fn push(&mut self, buf: SendBuf<B>, range: Range<usize>) {
        let len = match &buf {
            SendBuf::Own(own) => own.len(),
            SendBuf::Device(device) => device.len(),
        };
        assert!(!self.is_full(), "a list takes at most {SEND_PIECES_MAX} pieces");
        assert!(range.start <= range.end && range.end <= len, "range {range:?} outside of a buffer of {len} bytes");
        self.inner.bytes += range.len();
        assert!(u32::try_from(self.inner.bytes).is_ok(), "a list takes at most {} bytes", u32::MAX);
        self.inner.pieces.push(Piece { buf, range });
    }

    /// Appends a piece of protocol.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_own(&mut self, buf: AlignedBuf, range: Range<usize>) {
        self.push(SendBuf::Own(buf), range);
    }

    /// Appends data of the device.
    ///
    /// # Panics
    /// As [`Self::push`].
    pub fn push_device(&mut self, buf: B, range: Range<usize>) {
        self.push(SendBuf::Device(buf), range);
    }

    /// Pieces in the list.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.pieces.len()
    }

    /// Whether it has no piece.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.pieces.is_empty()
    }

    /// Whether it has [`SEND_PIECES_MAX`] pieces.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() == SEND_PIECES_MAX
    }

    /// Bytes to send.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.inner.bytes
    }

    /// Empties the list and gives its buffers back, in order. What is not taken from the iterator is dropped.
    pub fn drain(&mut self) -> impl Iterator<Item = SendBuf<B>> {
        self.inner.bytes = 0;
        self.inner.pieces.drain(..).map(|piece| piece.buf)
    }

    /// Empties the list and drops its buffers.
    pub fn clear(&mut self) {
        self.inner.bytes = 0;
        self.inner.pieces.clear();
    }
}

impl<B: IoBuf> Default for SendList<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B> std::fmt::Debug for SendList<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendList").field("pieces", &self.inner.pieces.len()).field("bytes", &self.inner.bytes).finish()
    }
}
