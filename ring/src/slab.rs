//! Cells of 4 KiB to 256 KiB out of 1 MiB pages: lock-free, allocated by any producer, freed in any order by anyone.
//!
//! A page is unassigned (state word 0) or has a class and a count of free cells. The invariants, at every instant:
//!
//! 1. *A cell is taken in two steps, given back in two steps, in opposite order*: take = lower the page's count by CAS, then
//!    set a clear bit in its map; give = clear the bit, then raise the count. So (clear bits) ≥ (count) + (takers between
//!    their two steps): a taker always finds a bit.
//! 2. *A count equal to the number of cells means an all-clear map and no taker between its steps* (by 1). Hence the CAS that
//!    would store that count stores "unassigned" instead, and the page can take any class by one CAS, with no map to prepare.
//! 3. *A state word says everything about its page*: equal words are interchangeable, so the CAS loops have no ABA problem.
//! 4. *The header of a free cell says Free*: it is written before the bit is cleared.
//!
//! None of this has to survive a crash: recovery rebuilds words, maps and headers from the published descriptors.

use std::ptr::NonNull;

use crate::layout::{
    CLASSES, CellHeader, CellState, INTENTS, MAP_BITS, MAX_CELL_BYTES, PAGE_BYTES, PageMap, StateWord, UNIT_BYTES,
    UNITS_PER_PAGE, low8, low32,
};
use crate::memory::View;
use crate::sync::{AtomicU64, Ordering};

/// Size class: cells of 4 KiB << class.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Class(u8);

impl Class {
    /// The smallest class with room for `len` bytes; `None` beyond the largest.
    pub(crate) fn for_len(len: usize) -> Option<Self> {
        if len > MAX_CELL_BYTES {
            return None;
        }
        let units = len.div_ceil(UNIT_BYTES).max(1).next_power_of_two();
        Some(Self(low8(u64::from(units.trailing_zeros()))))
    }

    pub(crate) const fn new(class: u8) -> Option<Self> {
        if (class as usize) < CLASSES { Some(Self(class)) } else { None }
    }

    pub(crate) const fn raw(self) -> u8 {
        self.0
    }

    pub(crate) const fn bytes(self) -> usize {
        UNIT_BYTES << self.0
    }

    /// Cells of this class in a page.
    pub(crate) const fn cells(self) -> usize {
        UNITS_PER_PAGE >> self.0
    }
}

/// A cell: its first unit in the slab, and its class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CellId {
    pub(crate) unit: u32,
    pub(crate) class: Class,
}

impl CellId {
    /// The cell that `unit` and `class` name, if there can be one in a slab of `units`.
    pub(crate) fn checked(unit: u32, class: u8, units: usize) -> Option<Self> {
        let class = Class::new(class)?;
        let aligned = (unit as usize).is_multiple_of(1 << class.0);
        (aligned && (unit as usize) < units).then_some(Self { unit, class })
    }

    pub(crate) fn page(self) -> usize {
        self.unit as usize / UNITS_PER_PAGE
    }

    /// Word and bit in the page's map.
    fn bit(self) -> (usize, u64) {
        let cell = (self.unit as usize % UNITS_PER_PAGE) >> self.class.0;
        (cell / MAP_BITS, 1 << (cell % MAP_BITS))
    }
}

/// Where a producer looks first, per class. A guess: any value is right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hints {
    pages: [u32; CLASSES],
    intent_word: u32,
}

impl Hints {
    /// Spreads the producers over the slab, so that they seldom meet in a page.
    pub(crate) fn spread(producer: u32) -> Self {
        Self { pages: [producer.wrapping_mul(0x9E37_79B1) >> 8; CLASSES], intent_word: producer }
    }
}

const UNASSIGNED: u64 = 0;

/// A page's state word: free cells in the low half, class + 1 in the upper.
#[derive(Clone, Copy)]
struct PageState {
    class: Class,
    free: u32,
}

impl PageState {
    fn encode(self) -> u64 {
        u64::from(self.free) | u64::from(self.class.0 + 1) << 32
    }

    /// `None` when unassigned.
    fn decode(word: u64) -> Option<Self> {
        let class = low8(word >> 32).checked_sub(1)?;
        Some(Self { class: Class(class), free: low32(word) })
    }
}

/// The slab of one ring.
#[derive(Debug)]
pub(crate) struct Slab {
    pub(crate) states: View<AtomicU64>,
    pub(crate) maps: View<PageMap>,
    /// One per unit, then one per intent.
    pub(crate) headers: View<CellHeader>,
    /// Used intents, one bit each.
    pub(crate) intents: View<AtomicU64>,
    pub(crate) base: NonNull<u8>,
    /// The first pages are for markers' payload alone.
    pub(crate) reserved_pages: u32,
}

// SAFETY: `base` is an address inside the mapping that the owner of the slab keeps; cells at it are handed to exactly one
// handle at a time (invariant 1), everything else is atomics.
unsafe impl Send for Slab {}
// SAFETY: as for Send.
unsafe impl Sync for Slab {}

impl Slab {
    pub(crate) fn units(&self) -> usize {
        self.states.len() * UNITS_PER_PAGE
    }

    /// Takes a cell for `len` bytes; a larger class where the fitting one has no cell left. Never from the reserve.
    pub(crate) fn take(&self, len: usize, hints: &mut Hints) -> Option<CellId> {
        let wanted = Class::for_len(len)?;
        let first = self.reserved_pages;
        let count = low32(self.states.len() as u64) - first;
        (wanted.0..).map_while(Class::new).find_map(|class| {
            let hint = &mut hints.pages[class.0 as usize];
            let cell = self.take_in_pages(class, first, count, *hint % count)?;
            *hint = low32(cell.page() as u64) - first;
            Some(self.occupied(cell, len))
        })
    }

    /// Takes a smallest cell from the reserve.
    pub(crate) fn take_reserved(&self, len: usize) -> Option<CellId> {
        let class = Class::for_len(len)?;
        if class != Class(0) || self.reserved_pages == 0 {
            return None;
        }
        self.take_in_pages(class, 0, self.reserved_pages, 0).map(|cell| self.occupied(cell, len))
    }

    /// Gives a cell back. It was taken and nobody reads or writes it any more.
    pub(crate) fn give(&self, cell: CellId) {
        // Relaxed: ordered before the next owner's store by the Release of the map's bit below.
        self.header(cell).state.store(StateWord::FREE, Ordering::Relaxed);
        let (word, bit) = cell.bit();
        // AcqRel. Release: our and (through `readers`) all readers' accesses to the cell come before the Acquire of the
        // fetch_or in `take_bit` by the next owner. Acquire: not needed by us, keeps the chain of owners plain.
        let before = self.maps[cell.page()].words[word].fetch_and(!bit, Ordering::AcqRel);
        assert!(before & bit != 0, "a cell is given back once");
        self.raise_count(cell.page(), cell.class);
    }

    fn raise_count(&self, page: usize, class: Class) {
        let state = &self.states[page];
        let mut word = state.load(Ordering::Relaxed);
        loop {
            let now = PageState::decode(word).expect("a page with a taken cell has a class");
            assert!(now.class == class && (now.free as usize) < class.cells(), "the count matches the cells given out");
            let free = now.free + 1;
            let next = if free as usize == class.cells() { UNASSIGNED } else { PageState { class, free }.encode() };
            // AcqRel: Release pairs with the Acquire of `lower_count` and `assign`, so that whoever gets the page under
            // another class comes after every use of its old cells; Acquire hands earlier givers' Releases on when this CAS
            // unassigns (the word is a chain of read-modify-writes, so they are in its release sequence as well).
            match state.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => word = seen,
            }
        }
    }

    /// Takes from `count` pages from `first` on, beginning at the `hint`-th: a page of the class with a free cell, else the
    /// first unassigned one. Repeats only when another producer took what was seen, that is, made progress.
    fn take_in_pages(&self, class: Class, first: u32, count: u32, hint: u32) -> Option<CellId> {
        let page_at = |step: u32| (first + (hint + step) % count) as usize;
        loop {
            let mut unassigned = None;
            for page in (0..count).map(page_at) {
                match self.lower_count(page, class) {
                    Lowered::Yes => return Some(self.take_bit(page, class)),
                    Lowered::Unassigned => unassigned = unassigned.or(Some(page)),
                    Lowered::No => {}
                }
            }
            let page = unassigned?;
            if self.assign(page, class) {
                return Some(self.take_bit(page, class));
            }
        }
    }

    fn lower_count(&self, page: usize, class: Class) -> Lowered {
        let state = &self.states[page];
        // Relaxed: the value is only a guess for the CAS.
        let mut word = state.load(Ordering::Relaxed);
        loop {
            let Some(now) = PageState::decode(word) else { return Lowered::Unassigned };
            if now.class != class || now.free == 0 {
                return Lowered::No;
            }
            let next = PageState { class, free: now.free - 1 }.encode();
            // Acquire: pairs with the Release in `raise_count`: the bit cleared there is clear for us. Release is carried on
            // by the read-modify-write itself.
            match state.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Lowered::Yes,
                Err(seen) => word = seen,
            }
        }
    }

    /// Gives an unassigned page a class and takes its first cell.
    fn assign(&self, page: usize, class: Class) -> bool {
        let word = PageState { class, free: low32(class.cells() as u64) - 1 }.encode();
        // Acquire: pairs with the Release in `raise_count` that unassigned the page.
        self.states[page].compare_exchange(UNASSIGNED, word, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Second step of a taker: by invariant 1 there is a clear bit for it. Each failed fetch_or is another taker's success.
    fn take_bit(&self, page: usize, class: Class) -> CellId {
        loop {
            for (index, word) in self.maps[page].words.iter().enumerate().take(class.cells().div_ceil(MAP_BITS)) {
                let cells = (class.cells() - index * MAP_BITS).min(MAP_BITS);
                let all = if cells == 64 { u64::MAX } else { (1 << cells) - 1 };
                // Relaxed: a guess for the fetch_or.
                let mut clear = !word.load(Ordering::Relaxed) & all;
                while clear != 0 {
                    let bit = clear & clear.wrapping_neg();
                    // AcqRel: Acquire pairs with the Release in `give` (previous owner's accesses come first).
                    let before = word.fetch_or(bit, Ordering::AcqRel);
                    if before & bit == 0 {
                        let cell = index * MAP_BITS + bit.trailing_zeros() as usize;
                        let unit = page * UNITS_PER_PAGE + (cell << class.0);
                        return CellId { unit: low32(unit as u64), class };
                    }
                    clear = !before & all;
                }
            }
            #[cfg(loom)]
            loom::thread::yield_now();
        }
    }

    fn occupied(&self, cell: CellId, len: usize) -> CellId {
        let word = StateWord { state: CellState::Filling, class: cell.class.0, volume: 0, len: low32(len as u64) };
        // Relaxed: nobody but this owner (and a recovery after its death) looks at it before publication. The length goes first, so
        // that no later state of ours comes with the last owner's range.
        self.header(cell).length.store(0, Ordering::Relaxed);
        self.header(cell).state.store(word.encode(), Ordering::Release);
        cell
    }

    pub(crate) fn header(&self, cell: CellId) -> &CellHeader {
        &self.headers[cell.unit as usize]
    }

    /// Address of the cell's first byte.
    pub(crate) fn address(&self, cell: CellId) -> NonNull<u8> {
        assert!((cell.unit as usize) < self.units(), "cells lie in the slab");
        // SAFETY: the slab has units() * UNIT_BYTES bytes from `base` on (its maker's promise), and unit < units().
        unsafe { self.base.add(cell.unit as usize * UNIT_BYTES) }
    }

    /// One reader more: the cell stays until [`Self::unpin`].
    pub(crate) fn pin(&self, cell: CellId) {
        // Relaxed: the caller already holds a reference (its own, or the ring's until `free_to`), as with Arc::clone.
        self.header(cell).readers.fetch_add(1, Ordering::Relaxed);
    }

    /// One reader less; the last one gives the cell back.
    pub(crate) fn unpin(&self, cell: CellId) {
        // AcqRel: Release: this reader's accesses come before the give; Acquire: all other readers' do, for the one that gives.
        let before = self.header(cell).readers.fetch_sub(1, Ordering::AcqRel);
        assert!(before != 0, "a reader leaves once");
        if before == 1 {
            self.give(cell);
        }
    }

    /// Takes an intent: the place in shared memory that names the range of a write without payload.
    pub(crate) fn take_intent(&self, hints: &mut Hints) -> Option<u32> {
        let words = INTENTS / 64;
        for step in 0..words {
            let index = (hints.intent_word as usize + step) % words;
            let word = &self.intents[index];
            // Relaxed: a guess for the fetch_or.
            let mut clear = !word.load(Ordering::Relaxed);
            while clear != 0 {
                let bit = clear & clear.wrapping_neg();
                // AcqRel: Acquire pairs with the Release in `give_intent`.
                let before = word.fetch_or(bit, Ordering::AcqRel);
                if before & bit == 0 {
                    hints.intent_word = low32(index as u64);
                    let intent = low32(index as u64 * 64) + bit.trailing_zeros();
                    let state = StateWord { state: CellState::Filling, class: 0, volume: 0, len: 0 };
                    // As in `occupied`.
                    self.intent(intent).length.store(0, Ordering::Relaxed);
                    self.intent(intent).state.store(state.encode(), Ordering::Release);
                    return Some(intent);
                }
                clear = !before;
            }
        }
        None
    }

    pub(crate) fn give_intent(&self, intent: u32) {
        // Relaxed: ordered before the next owner's store by the Release below.
        self.intent(intent).state.store(StateWord::FREE, Ordering::Relaxed);
        let bit = 1 << (intent % 64);
        // Release: pairs with the Acquire in `take_intent`.
        let before = self.intents[intent as usize / 64].fetch_and(!bit, Ordering::AcqRel);
        assert!(before & bit != 0, "an intent is given back once");
    }

    pub(crate) fn intent(&self, intent: u32) -> &CellHeader {
        &self.headers[self.units() + intent as usize]
    }

    /// Bytes in cells that are not free. A sum over the pages while they change: exact when nobody allocates or frees.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.states
            .iter()
            .filter_map(|state| PageState::decode(state.load(Ordering::Relaxed)))
            .map(|page| (page.class.cells() - page.free as usize) * page.class.bytes())
            .sum::<usize>() as u64
    }

    /// Bytes of all cells.
    pub(crate) fn size_bytes(&self) -> u64 {
        (self.states.len() * PAGE_BYTES) as u64
    }

    /// Rebuilds words, maps and headers: exactly `owned` are taken, each published at its position. Nobody else may be using
    /// the slab; `owned` has been checked (no overlap, one class per page).
    pub(crate) fn rebuild(&self, owned: &[(CellId, u64)]) {
        self.states.iter().for_each(|state| state.store(UNASSIGNED, Ordering::Relaxed));
        self.maps.iter().flat_map(|map| &map.words).for_each(|word| word.store(0, Ordering::Relaxed));
        self.intents.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        for &(cell, _) in owned {
            let (word, bit) = cell.bit();
            self.maps[cell.page()].words[word].fetch_or(bit, Ordering::Relaxed);
            let state = &self.states[cell.page()];
            let free =
                PageState::decode(state.load(Ordering::Relaxed)).map_or(low32(cell.class.cells() as u64), |s| s.free);
            state.store(PageState { class: cell.class, free: free - 1 }.encode(), Ordering::Relaxed);
        }
        let mut by_unit: Vec<u32> = owned.iter().map(|(cell, _)| cell.unit).collect();
        by_unit.sort_unstable();
        for (unit, header) in self.headers.iter().enumerate() {
            if by_unit.binary_search(&low32(unit as u64)).is_err() {
                header.state.store(StateWord::FREE, Ordering::Relaxed);
            } else {
                header.readers.store(1, Ordering::Relaxed);
            }
        }
    }
}

enum Lowered {
    Yes,
    No,
    Unassigned,
}

impl StateWord {
    /// The word of a free cell.
    pub(crate) const FREE: u64 = 0;
}
