//! The consumer's side: entries in order, freed from the low end.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use stable_deref_trait::StableDeref;

use crate::Desc;
use crate::layout::CLOSED;
use crate::shared::Lane;
use crate::slab::CellId;
use crate::sync::{Ordering, fence};

/// The one reader of a ring; a second one can be had only after this one is dropped. It starts at the freed cursor.
#[derive(Debug)]
pub struct Consumer {
    lane: Arc<Lane>,
    next: u64,
    freed: u64,
    /// Whether the ring was closed when [`Self::prepare_sleep`] last looked.
    closed_seen: bool,
}

/// One published position.
#[derive(Debug)]
pub struct Entry {
    /// Its place in the stream: the ticket's last part.
    pub position: u64,
    /// What it says.
    pub desc: Desc,
    /// The first `desc.len` bytes of its cell.
    pub payload: Option<CellRef>,
}

/// Shared access to a published cell's payload. It keeps the cell: after [`Consumer::free_to`] the cell becomes free when the last
/// of these is dropped.
#[derive(Debug)]
pub struct CellRef {
    lane: Arc<Lane>,
    cell: CellId,
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: it only reads a cell that nobody writes while a reader is counted; the count is an atomic.
unsafe impl Send for CellRef {}
// SAFETY: as for Send.
unsafe impl Sync for CellRef {}
// SAFETY: `deref` yields the cell's address in the mapping, which is the same wherever the handle is, for as long as it lives.
unsafe impl StableDeref for CellRef {}

/// Why the ring was not re-opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReopenError {
    /// It is open.
    #[error("the capture stream is not closed")]
    NotClosed,
    /// The ring was re-opened several times with nothing freed in between. Free, then try again.
    #[error("no descriptor free for re-opening the capture stream; free some first")]
    Full,
}

impl Consumer {
    pub(crate) fn new(lane: Arc<Lane>) -> Self {
        // Relaxed: only consumers write it, and `consumer_taken` (Acquire) ordered the last one's stores before us.
        let freed = lane.freed().load(Ordering::Relaxed);
        Self { lane, next: freed, freed, closed_seen: false }
    }

    /// The next entry in order; `None` while that position is not published.
    #[expect(clippy::should_implement_trait, reason = "`None` is not the end, as an iterator's would be taken for")]
    pub fn next(&mut self) -> Option<Entry> {
        if !self.lane.is_published(self.next) {
            return None;
        }
        let position = self.next;
        let (desc, holder) = self.lane.read(position);
        let payload = self.lane.cell_of(holder).expect("descriptors name cells of the slab").map(|cell| {
            assert!(desc.len as usize <= cell.class.bytes(), "the payload lies inside its cell");
            self.lane.slab.pin(cell);
            let ptr = self.lane.slab.address(cell);
            CellRef { lane: Arc::clone(&self.lane), cell, ptr, len: desc.len as usize }
        });
        self.next += 1;
        Some(Entry { position, desc, payload })
    }

    /// Position of the entry that [`Self::next`] gives next.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Everything below is freed.
    #[must_use]
    pub fn freed(&self) -> u64 {
        self.freed
    }

    /// Frees the descriptors and cells of all positions below `position`. The cursor is in shared memory: a restarted process goes
    /// on behind it, so call this only for what is durable elsewhere.
    ///
    /// # Panics
    /// When `position` is below the last one given, or beyond what was read.
    pub fn free_to(&mut self, position: u64) {
        assert!((self.freed..=self.next).contains(&position), "free what was read, once");
        // Release: the cursor moves before any cell is given back. A kill in between leaves published cells below the cursor,
        // which recovery frees; the other order could leave unfreed positions whose cells have new owners.
        self.lane.freed().store(position, Ordering::Release);
        for freed in self.freed..position {
            let (_, holder) = self.lane.read(freed);
            if let Some(cell) = self.lane.cell_of(holder).expect("read before, and valid then") {
                self.lane.slab.unpin(cell);
            }
        }
        // Last: until now the slots could not be claimed anew.
        self.lane.return_credits(position - self.freed);
        self.freed = position;
    }

    /// Back to the freed cursor: the unfreed entries are given again.
    pub fn rewind(&mut self) {
        self.next = self.freed;
    }

    /// Re-opens a closed ring. `desc` (an event without payload) takes the first position behind the gap, by the same atomic that
    /// lets claims through again. Returns that position.
    ///
    /// # Errors
    /// [`ReopenError`].
    ///
    /// # Panics
    /// When `desc.len` is not 0.
    pub fn reopen(&mut self, desc: &Desc) -> Result<u64, ReopenError> {
        assert!(desc.len == 0, "the event that re-opens has no payload");
        if !self.lane.is_closed() {
            return Err(ReopenError::NotClosed);
        }
        if !self.lane.take_credit(self.lane.geometry.descriptors) {
            return Err(ReopenError::Full);
        }
        // While CLOSED nobody but this consumer changes the position, so the slot is ours without a claim. Publishing it
        // first means that there is no kill point with an open ring and no event in it. `next` cannot run into it: that
        // would need this very consumer.
        let position = self.lane.position();
        self.lane.fill(position, desc, None);
        // AcqRel: in the chain of claims; claims after it follow the event.
        let opened =
            self.lane.head().compare_exchange(position | CLOSED, position + 1, Ordering::AcqRel, Ordering::Acquire);
        assert!(opened.is_ok(), "only one consumer re-opens, and close() changes nothing on a closed ring");
        Ok(position)
    }

    /// Whether every claim fails at present.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lane.is_closed()
    }

    /// Call before sleeping. `true`: nothing has happened, sleep; a producer that publishes (or closes) from now on is told to wake
    /// this consumer. `false`: an entry is ready or the ring was closed or re-opened since the last call; do not sleep.
    #[must_use]
    pub fn prepare_sleep(&mut self) -> bool {
        self.lane.waiting().store(1, Ordering::Relaxed);
        // SeqCst: pairs with the fence in `Shared::take_wakeup`. Either we see what the producer did before its fence, or it
        // sees our mark.
        fence(Ordering::SeqCst);
        let closed = self.lane.is_closed();
        if self.lane.is_published(self.next) || closed != self.closed_seen {
            self.closed_seen = closed;
            self.woke();
            return false;
        }
        true
    }

    /// Call after waking, for whatever reason: producers need not wake this consumer any more.
    pub fn woke(&mut self) {
        // Relaxed: a late reader of the old mark only wakes us once too often.
        self.lane.waiting().store(0, Ordering::Relaxed);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `Ring::consumer`.
        self.lane.consumer_taken.store(false, std::sync::atomic::Ordering::Release);
    }
}

impl Deref for CellRef {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is the start of the cell, len ≤ its bytes (asserted in `Consumer::next`); its writer published it
        // (Release/Acquire on the sequence word) and gave its handle up; nobody gets it anew while we are counted in `readers`;
        // the lane keeps the mapping.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl Clone for CellRef {
    fn clone(&self) -> Self {
        self.lane.slab.pin(self.cell);
        Self { lane: Arc::clone(&self.lane), cell: self.cell, ptr: self.ptr, len: self.len }
    }
}

impl Drop for CellRef {
    fn drop(&mut self) {
        self.lane.slab.unpin(self.cell);
    }
}
