use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use bytes::Bytes;
use farshore_uring::{AlignedBuf, BufPool};
use quinn::RecvStream;

use super::gate::Lease;
use super::wire::{Fault, code};

/// Writable bytes before a received batch, so that its header can be put in front without moving it.
pub const HEADROOM_BYTES: usize = AlignedBuf::ALIGN;

/// A received batch, in memory that direct I/O takes.
///
/// ```text
/// 0            4096                      4096 + len    end (multiple of 4096)
/// ├─ headroom ─┼─ the batch (this derefs) ─┼─ zeroes ──┤
/// ```
pub struct RecvBuf {
    buf: AlignedBuf,
    len: usize,
    lease: RecvLease,
}

/// A received batch's part of its session's allowance; given back on drop.
pub struct RecvLease(#[expect(dead_code, reason = "held for its drop")] Lease);

impl RecvBuf {
    /// The bytes before the batch; zero at first.
    #[must_use]
    pub fn headroom_mut(&mut self) -> &mut [u8] {
        &mut self.buf[..HEADROOM_BYTES]
    }

    /// Headroom, batch and zeroes up to a multiple of 4096.
    #[must_use]
    pub fn with_headroom(&self) -> &[u8] {
        &self.buf
    }

    /// Takes the memory out, to be lent to the kernel: its length is that of [`RecvBuf::with_headroom`], and it goes back to
    /// the pool when dropped. Keep the lease until then.
    #[must_use]
    pub fn into_parts(self) -> (AlignedBuf, RecvLease) {
        (self.buf, self.lease)
    }
}

impl Deref for RecvBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf[HEADROOM_BYTES..HEADROOM_BYTES + self.len]
    }
}

impl DerefMut for RecvBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf[HEADROOM_BYTES..HEADROOM_BYTES + self.len]
    }
}

/// The batch alone; so that it can become `Bytes` (`Bytes::from_owner`) and be sent on without a copy.
impl AsRef<[u8]> for RecvBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for RecvBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecvBuf({} bytes)", self.len)
    }
}

impl fmt::Debug for RecvLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecvLease")
    }
}

/// A pool for batches of up to `batch_bytes_max`: two classes per doubling, so at most half of a buffer is unused. Keeps eight
/// free buffers of the classes up to 8 MiB and one of the longer ones, about 0.4 GiB if every class was in use.
pub(crate) fn pool(batch_bytes_max: usize) -> BufPool {
    let most = 8 << 20;
    let needed = (HEADROOM_BYTES + batch_bytes_max).next_multiple_of(AlignedBuf::ALIGN);
    let mut classes = Vec::new();
    let mut size = 64 << 10;
    while size < needed {
        for capacity in [size, size + size / 2] {
            classes.push((capacity + HEADROOM_BYTES, if capacity <= most { 8 } else { 1 }));
        }
        size *= 2;
    }
    classes.push((needed.max(size + HEADROOM_BYTES), 1));
    BufPool::new(&classes)
}

/// Reads the `len` bytes of a batch and the end of its stream: one copy, from the packets to the buffer. A pause of more than
/// `stall` ends it.
pub(crate) async fn receive(
    recv: &mut RecvStream,
    pool: &BufPool,
    len: usize,
    lease: Lease,
    stall: Duration,
) -> Result<RecvBuf, Fault> {
    /// Pieces taken per look at the stream; the library's own tests use 32 as well.
    const PIECES: usize = 32;
    let end = HEADROOM_BYTES + len;
    let mut buf = pool.take(end.next_multiple_of(AlignedBuf::ALIGN));
    buf[..HEADROOM_BYTES].fill(0);
    let mut filled = HEADROOM_BYTES;
    let mut pieces: [Bytes; PIECES] = std::array::from_fn(|_| Bytes::new());
    loop {
        let read = tokio::time::timeout(stall, recv.read_chunks(&mut pieces)).await;
        let Ok(read) = read else {
            let reason =
                format!("a batch of {len} bytes stood still for {stall:?} after {} bytes", filled - HEADROOM_BYTES);
            return Err(Fault::new(code::STALLED, reason));
        };
        let Some(count) = read? else { break };
        for piece in &mut pieces[..count] {
            let piece = std::mem::take(piece);
            if piece.len() > end - filled {
                return Err(Fault::protocol(format!("a batch is longer than the {len} bytes of its header")));
            }
            buf[filled..filled + piece.len()].copy_from_slice(&piece);
            filled += piece.len();
        }
    }
    if filled != end {
        let reason = format!("a batch ended after {} of {len} bytes", filled - HEADROOM_BYTES);
        return Err(Fault::protocol(reason));
    }
    buf[end..].fill(0);
    Ok(RecvBuf { buf, len, lease: RecvLease(lease) })
}
