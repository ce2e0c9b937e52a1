//! The producers' side: reserve, fill, write to the backing device, publish.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use stable_deref_trait::StableDeref;

use crate::Desc;
use crate::layout::{CellHeader, CellState, MAX_CELL_BYTES, StateWord, UNIT_BYTES, low32};
use crate::shared::{Lane, Shared};
use crate::slab::{CellId, Hints};
use crate::sync::Ordering;

/// Nothing could be reserved; nothing was waited for. The write goes on without the ring, marked missing, and at its end
/// [`Producer::publish_or_close`] closes the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    /// No descriptor credit.
    #[error("no descriptor free in the capture ring")]
    Descriptors,
    /// No cell of the size, or larger.
    #[error("no cell free in the capture slab")]
    Cells,
    /// Too many writes without payload in flight.
    #[error("no intent free in the capture ring")]
    Intents,
    /// Longer than the largest cell ([`crate::MAX_CELL_BYTES`]; markers: 4 KiB).
    #[error("longer than a cell can be")]
    TooLong,
}

/// The ring is closed: this write is not in the stream.
///
/// Carries the reservation, whose range stays noted as *writing* in shared memory until it is dropped: mark the range missing
/// first, then drop this. (The other way round, a kill in between would leave a difference that nothing knows of.)
#[derive(Debug, thiserror::Error)]
#[error("the capture stream is closed")]
#[must_use = "mark the range missing, then drop this"]
pub struct Closed {
    /// As given to the call.
    pub reservation: Option<Reservation>,
}

/// One thread's way into the ring. Sendable, not shareable: it remembers where that thread last found room.
///
/// Never waits, never allocates; every call is a few atomic operations on shared memory.
#[derive(Debug)]
pub struct Producer {
    lane: Arc<Lane>,
    /// Also what makes this type not `Sync`.
    hints: Cell<Hints>,
}

/// What a write has reserved: its descriptor credit and, if it has payload, its cell; dereferences to the cell's bytes
/// (empty without one). Bytes are whatever the cell's last owner left.
///
/// The address is stable and the handle owned, so it can be lent to the kernel. Dropping it gives everything back.
#[derive(Debug)]
pub struct Reservation {
    lane: Arc<Lane>,
    ptr: NonNull<u8>,
    len: usize,
    holder: Holder,
    credit: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    None,
    Cell(CellId),
    Intent(u32),
}

// SAFETY: the handle owns its cell exclusively (slab invariant 1) and everything else it touches is atomics, from any thread.
unsafe impl Send for Reservation {}
// SAFETY: a shared reference only reads the cell's bytes, which nobody writes without `&mut`.
unsafe impl Sync for Reservation {}
// SAFETY: `deref` yields the cell's address in the mapping, which moving the handle does not change, as long as the handle
// lives (its lane keeps the mapping).
unsafe impl StableDeref for Reservation {}

impl Producer {
    pub(crate) fn new(lane: Arc<Lane>, number: u32) -> Self {
        Self { lane, hints: Cell::new(Hints::spread(number)) }
    }

    /// Reserves for a write with `len` bytes of payload (1 to [`crate::MAX_CELL_BYTES`]). Works on a closed ring, too: the cell is
    /// then just a buffer.
    ///
    /// # Errors
    /// [`Full`]: nothing was reserved.
    pub fn reserve(&self, len: usize) -> Result<Reservation, Full> {
        if len > MAX_CELL_BYTES {
            return Err(Full::TooLong);
        }
        let shared: &Shared = &self.lane;
        self.credit(shared.geometry.descriptors - shared.geometry.marker_reserve())?;
        match self.with_hints(|hints| shared.slab.take(len, hints)) {
            Some(cell) => Ok(self.reservation(Holder::Cell(cell), len)),
            None => Err(self.uncredit(Full::Cells)),
        }
    }

    /// Reserves for a write without payload (zeroes, discard): a credit, and a place in shared memory where
    /// [`Reservation::writing`] notes the range.
    ///
    /// # Errors
    /// [`Full`]: nothing was reserved.
    pub fn reserve_bare(&self) -> Result<Reservation, Full> {
        let shared: &Shared = &self.lane;
        self.credit(shared.geometry.descriptors - shared.geometry.marker_reserve())?;
        match self.with_hints(|hints| shared.slab.take_intent(hints)) {
            Some(intent) => Ok(self.reservation(Holder::Intent(intent), 0)),
            None => Err(self.uncredit(Full::Intents)),
        }
    }

    /// Reserves for a marker or an event that touches no backing device; takes from the reserves that writes leave alone, so that
    /// it finds room in a ring full of writes. `len`: bytes of payload, 0 for none, at most 4096.
    ///
    /// # Errors
    /// [`Full`]: more markers than the reserve holds are unfreed; free first.
    pub fn reserve_marker(&self, len: usize) -> Result<Reservation, Full> {
        if len > UNIT_BYTES {
            return Err(Full::TooLong);
        }
        let shared: &Shared = &self.lane;
        self.credit(shared.geometry.descriptors - shared.geometry.reopen_reserve())?;
        if len == 0 {
            return Ok(self.reservation(Holder::None, 0));
        }
        let cell = shared.slab.take_reserved(len).or_else(|| self.with_hints(|hints| shared.slab.take(len, hints)));
        match cell {
            Some(cell) => Ok(self.reservation(Holder::Cell(cell), len)),
            None => Err(self.uncredit(Full::Cells)),
        }
    }

    /// Claims the next position for `reservation` and publishes `desc` there; the position is the write's ticket. Fails only on a
    /// closed ring.
    ///
    /// # Errors
    /// [`Closed`], with the reservation: mark its range missing before dropping it.
    ///
    /// # Panics
    /// When the reservation is another ring's, or `desc.len` is not the number of payload bytes (at most the reservation's).
    pub fn publish(&self, mut reservation: Reservation, desc: &Desc) -> Result<u64, Closed> {
        let shared: &Shared = &self.lane;
        assert!(reservation.lane.is_of(shared), "a reservation is published to the ring it came from");
        assert!(desc.len as usize <= reservation.len, "the payload lies inside the reservation");
        // Everything that can fail came before: from the claim to the publication nothing may stop this thread.
        let Some(position) = shared.claim() else { return Err(Closed { reservation: Some(reservation) }) };
        reservation.set_published(position);
        let cell = match reservation.holder {
            Holder::Cell(cell) => Some(cell),
            Holder::None | Holder::Intent(_) => None,
        };
        shared.fill(position, desc, cell);
        if let Holder::Intent(intent) = reservation.holder {
            shared.slab.give_intent(intent);
        }
        // Cell and credit belong to the position now.
        reservation.holder = Holder::None;
        reservation.credit = false;
        Ok(position)
    }

    /// [`Self::publish`], or, for a write that found no room (`None`), the failed claim that closes the ring. After an `Err` the ring
    /// is closed; the caller marks the range missing, drops the error and may then complete its guest request.
    ///
    /// # Errors
    /// [`Closed`], always with `None`.
    ///
    /// # Panics
    /// As [`Self::publish`].
    pub fn publish_or_close(&self, reservation: Option<Reservation>, desc: &Desc) -> Result<u64, Closed> {
        match reservation {
            Some(reservation) => self.publish(reservation, desc),
            None => {
                self.lane.close();
                Err(Closed { reservation: None })
            }
        }
    }

    /// Whether the caller must wake the consumer (write its eventfd). Ask after publishing (once for several publications is
    /// enough) and after closing; of several producers one is told so.
    #[must_use]
    pub fn consumer_sleeping(&self) -> bool {
        self.lane.take_wakeup()
    }

    /// Whether every claim fails at present.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lane.is_closed()
    }

    fn credit(&self, limit: u64) -> Result<(), Full> {
        if self.lane.take_credit(limit) { Ok(()) } else { Err(Full::Descriptors) }
    }

    fn uncredit(&self, reason: Full) -> Full {
        self.lane.return_credits(1);
        reason
    }

    fn with_hints<T>(&self, work: impl FnOnce(&mut Hints) -> T) -> T {
        let mut hints = self.hints.get();
        let result = work(&mut hints);
        self.hints.set(hints);
        result
    }

    fn reservation(&self, holder: Holder, len: usize) -> Reservation {
        let ptr = match holder {
            Holder::Cell(cell) => self.lane.slab.address(cell),
            Holder::None | Holder::Intent(_) => NonNull::dangling(),
        };
        Reservation { lane: Arc::clone(&self.lane), ptr, len, holder, credit: true }
    }
}

impl Reservation {
    /// Notes in shared memory that `[offset, offset + length)` of `volume` is about to be written to the backing device. Call
    /// before that write is submitted: if the process dies before the publication, recovery reports the range. Bytes.
    ///
    /// # Panics
    /// On a marker's reservation: markers write nothing.
    pub fn writing(&mut self, volume: u16, offset: u64, length: u64) {
        assert!(self.holder != Holder::None, "a marker's reservation does not write");
        let header = self.header().expect("checked: a cell or an intent");
        // Relaxed: see below.
        header.offset.store(offset, Ordering::Relaxed);
        header.length.store(length, Ordering::Relaxed);
        self.set_state(CellState::Writing, volume);
    }

    /// Bytes that the cell has room for; 0 without a cell.
    #[must_use]
    pub fn capacity(&self) -> usize {
        match self.holder {
            Holder::Cell(cell) => cell.class.bytes(),
            Holder::None | Holder::Intent(_) => 0,
        }
    }

    /// Changes the length that it dereferences to.
    ///
    /// # Panics
    /// Beyond [`Self::capacity`].
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "inside the cell");
        self.len = len;
    }

    /// Gives cell and credit back: the backing write failed (its range has been marked missing before) or was never made. The same
    /// as dropping it.
    pub fn abandon(self) {}

    fn header(&self) -> Option<&CellHeader> {
        match self.holder {
            Holder::Cell(cell) => Some(self.lane.slab.header(cell)),
            Holder::Intent(intent) => Some(self.lane.slab.intent(intent)),
            Holder::None => None,
        }
    }

    fn set_state(&self, state: CellState, volume: u16) {
        let Some(header) = self.header() else { return };
        let class = match self.holder {
            Holder::Cell(cell) => cell.class.raw(),
            Holder::None | Holder::Intent(_) => 0,
        };
        let word = StateWord { state, class, volume, len: low32(self.len as u64) };
        // Release: keeps the stores of the range before it in program order, which is what recovery after a kill relies on.
        header.state.store(word.encode(), Ordering::Release);
    }

    /// Between claim and publication. The state goes first: a reader that sees the publication may free the cell at once, and
    /// nothing of ours may touch its header after that.
    fn set_published(&self, position: u64) {
        let Some(header) = self.header() else { return };
        // Relaxed: ordered before the state by its Release, and before all readers by the publication's.
        let volume = StateWord::volume_of(header.state.load(Ordering::Relaxed));
        header.position.store(position, Ordering::Relaxed);
        // The ring's own reference; readers add theirs after the publication.
        header.readers.store(1, Ordering::Relaxed);
        self.set_state(CellState::Published, volume);
    }
}

impl Deref for Reservation {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is the start of our cell (or dangling with len 0); len ≤ the cell's bytes (`reserve`, `set_len`); the
        // bytes are initialised (shared memory starts as zeroes); the cell is ours alone until publication, which
        // consumes self; the lane keeps the mapping.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Reservation {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        match self.holder {
            Holder::Cell(cell) => self.lane.slab.give(cell),
            Holder::Intent(intent) => self.lane.slab.give_intent(intent),
            Holder::None => {}
        }
        if self.credit {
            self.lane.return_credits(1);
        }
    }
}
