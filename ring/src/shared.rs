//! What all handles of a ring share: the head word, the credits and the descriptors.
//!
//! Who may write what, and what orders it:
//!
//! 1. `head` is changed by claims (CAS position → position + 1 while open), by `close` (sets CLOSED) and by `reopen` (clears
//!    it and claims, in one CAS). Order, completeness and "closed" are therefore one atomic.
//! 2. `credits` = reserved but unclaimed + claimed but unfreed. It is raised only below a limit ≤ the number of descriptors,
//!    so `head - freed` never exceeds that number and a claim needs no check for room.
//! 3. Slot `p % N` belongs to the claimer of `p` from its claim to its store of `sequence = p + 1`, then to the readers until
//!    `freed > p`. *Why the claimer comes after the freeing of `p - N`*: the claims of positions 0..=p took p + 1 credits, and
//!    `credits` never exceeded N, so the last of those takes comes after the return of the credit of `p - N` in the
//!    modification order of `credits` (Release there, Acquire here, all read-modify-writes); that taker's claim is at or
//!    before `p` in the modification order of `head`, and claims are AcqRel.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::Desc;
use crate::layout::{CLOSED, DescriptorSlot, Geometry, HOLDER_CELL, Lines, index, low8, low32};
use crate::memory::{Backing, Mapping, View};
use crate::slab::{CellId, Slab};
use crate::sync::{AtomicU64, Ordering, fence};

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) geometry: Geometry,
    /// One item.
    pub(crate) lines: View<Lines>,
    pub(crate) descriptors: View<DescriptorSlot>,
    pub(crate) slab: Slab,
    /// Private to the process: a consumer exists.
    pub(crate) consumer_taken: AtomicBool,
    /// The views and `slab.base` point into it.
    pub(crate) mapping: Mapping,
    /// Holds the lock. Absent in the models.
    pub(crate) backing: Option<Backing>,
}

/// One handle's reference to the shared part. Cells hold a clone of their producer's, so that the count they change lies in a
/// cache line of that producer.
#[derive(Debug)]
pub(crate) struct Lane(Arc<Shared>);

impl Lane {
    pub(crate) fn new(shared: &Arc<Shared>) -> Arc<Self> {
        Arc::new(Self(Arc::clone(shared)))
    }

    pub(crate) fn is_of(&self, shared: &Shared) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.0), shared)
    }
}

impl std::ops::Deref for Lane {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Shared {
    pub(crate) fn head(&self) -> &AtomicU64 {
        &self.lines[0].head.0
    }

    pub(crate) fn credits(&self) -> &AtomicU64 {
        &self.lines[0].credits.0
    }

    pub(crate) fn freed(&self) -> &AtomicU64 {
        &self.lines[0].freed.0
    }

    pub(crate) fn waiting(&self) -> &AtomicU64 {
        &self.lines[0].waiting.0
    }

    pub(crate) fn clean(&self) -> &AtomicU64 {
        &self.lines[0].clean.0
    }

    pub(crate) fn slot(&self, position: u64) -> &DescriptorSlot {
        &self.descriptors[index(position & (self.geometry.descriptors - 1))]
    }

    /// Raises `credits` while it is below `limit`.
    pub(crate) fn take_credit(&self, limit: u64) -> bool {
        // Relaxed: a guess for the CAS.
        let mut now = self.credits().load(Ordering::Relaxed);
        loop {
            if now >= limit {
                return false;
            }
            // Acquire: pairs with the Release in `return_credits` (see 3 above).
            match self.credits().compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(seen) => now = seen,
            }
        }
    }

    pub(crate) fn return_credits(&self, count: u64) {
        // Release: pairs with the Acquire in `take_credit`: our reads of the slots come before their next use.
        let before = self.credits().fetch_sub(count, Ordering::AcqRel);
        assert!(before >= count, "credits are returned once");
    }

    /// Claims the next position; `None` when closed. The caller holds a credit, which belongs to the position afterwards.
    pub(crate) fn claim(&self) -> Option<u64> {
        // Relaxed: a guess for the CAS, which sees the newest value; CLOSED seen here was stored by someone, and is final for
        // this claim: claims that fail for a ring re-opened in this very moment are as if they had come before that.
        let mut now = self.head().load(Ordering::Relaxed);
        loop {
            if now & CLOSED != 0 {
                return None;
            }
            // AcqRel: the chain of claims (see 3 above). Pairs with itself, `close` and `reopen`.
            match self.head().compare_exchange_weak(now, now + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(now),
                Err(seen) => now = seen,
            }
        }
    }

    /// Sets CLOSED; whether this call did it.
    pub(crate) fn close(&self) -> bool {
        // AcqRel: in the chain of claims. Every claim that comes later in time reads this or a later value.
        self.head().fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    pub(crate) fn is_closed(&self) -> bool {
        // Acquire: pairs with `close`: what the closer did before is visible.
        self.head().load(Ordering::Acquire) & CLOSED != 0
    }

    pub(crate) fn position(&self) -> u64 {
        self.head().load(Ordering::Acquire) & !CLOSED
    }

    /// Writes the descriptor of a position that the caller has claimed and publishes it.
    pub(crate) fn fill(&self, position: u64, desc: &Desc, cell: Option<CellId>) {
        let slot = self.slot(position);
        let meta = u64::from(desc.kind)
            | u64::from(desc.flags) << 8
            | u64::from(desc.volume) << 16
            | u64::from(desc.len) << 32;
        let holder = cell.map_or(0, |c| HOLDER_CELL | u64::from(c.class.raw()) << 32 | u64::from(c.unit));
        // Relaxed, all: ordered by the Release below.
        slot.meta.store(meta, Ordering::Relaxed);
        slot.offset.store(desc.offset, Ordering::Relaxed);
        slot.length.store(desc.length, Ordering::Relaxed);
        slot.time.store(desc.time, Ordering::Relaxed);
        slot.aux.store(desc.aux, Ordering::Relaxed);
        slot.holder.store(holder, Ordering::Relaxed);
        // Release: pairs with the Acquire in `is_published`; carries the fields, the cell's payload and its header.
        slot.sequence.store(position + 1, Ordering::Release);
    }

    pub(crate) fn is_published(&self, position: u64) -> bool {
        // Acquire: pairs with the Release in `fill`.
        self.slot(position).sequence.load(Ordering::Acquire) == position + 1
    }

    /// The fields of a published, unfreed position.
    pub(crate) fn read(&self, position: u64) -> (Desc, u64) {
        let slot = self.slot(position);
        let [kind, flags, v0, v1, l0, l1, l2, l3] = slot.meta.load(Ordering::Relaxed).to_le_bytes();
        let desc = Desc {
            kind,
            flags,
            volume: u16::from_le_bytes([v0, v1]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            offset: slot.offset.load(Ordering::Relaxed),
            length: slot.length.load(Ordering::Relaxed),
            time: slot.time.load(Ordering::Relaxed),
            aux: slot.aux.load(Ordering::Relaxed),
        };
        (desc, slot.holder.load(Ordering::Relaxed))
    }

    /// The cell that a holder word names; `Ok(None)` for none, `Err` for nonsense.
    pub(crate) fn cell_of(&self, holder: u64) -> Result<Option<CellId>, u64> {
        if holder == 0 {
            return Ok(None);
        }
        if holder >> 40 != HOLDER_CELL >> 40 {
            return Err(holder);
        }
        CellId::checked(low32(holder), low8(holder >> 32), self.slab.units()).map(Some).ok_or(holder)
    }

    /// Whether a producer that has just published must wake the consumer: true for one of them per sleep.
    pub(crate) fn take_wakeup(&self) -> bool {
        // SeqCst: pairs with the fence in `Consumer::prepare_sleep`. Either that consumer sees our publication, or we see its
        // mark.
        fence(Ordering::SeqCst);
        // Relaxed: ordered by the fence. The swap picks one of several producers.
        self.waiting().load(Ordering::Relaxed) != 0 && self.waiting().swap(0, Ordering::AcqRel) != 0
    }
}
