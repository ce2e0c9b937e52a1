//! A bitmap in shared memory: one bit per 64 KiB of a volume.
//!
//! Sparse: a summary has one bit per 4 KiB of bitmap (2 GiB of volume), set before the first bit in it and never cleared, so that a
//! scan does not touch (and thereby allocate) pages that were never written.

use std::sync::Arc;

use crate::layout::{UNIT_BYTES, index, low32};
use crate::memory::{Mapping, View};
use crate::shared::Shared;
use crate::sync::{AtomicU64, Ordering};

/// Bytes of volume per bit.
pub const SLOT_BYTES: u64 = 64 << 10;

/// Words in one page of the bitmap.
const PAGE_WORDS: usize = UNIT_BYTES / 8;

/// One bitmap of one volume. Clones are the same bitmap. Take it once and keep it; all operations are lock-free and from any
/// thread.
///
/// Offsets and lengths are in bytes of the volume; a bit's index is its 64 KiB slot's number. Ranges beyond the capacity given when
/// the volume was added are a caller's error and panic.
#[derive(Clone, Debug)]
pub struct Bitmap(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    capacity: u64,
    summary: View<AtomicU64>,
    words: View<AtomicU64>,
    /// The views point into it.
    _mapping: Arc<Mapping>,
    /// Keeps the ring's lock while the bitmap is in use.
    _shared: Arc<Shared>,
}

/// Sizes of one bitmap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitmapShape {
    capacity: u64,
    summary_words: usize,
    words: usize,
}

impl BitmapShape {
    /// For a volume of `capacity` bytes.
    pub(crate) fn new(capacity: u64) -> Self {
        let bits = index(capacity.div_ceil(SLOT_BYTES));
        let words = bits.div_ceil(64).next_multiple_of(PAGE_WORDS);
        Self { capacity, summary_words: (words / PAGE_WORDS).div_ceil(64).next_multiple_of(PAGE_WORDS), words }
    }

    /// Bytes; a multiple of 4096.
    pub(crate) fn bytes(self) -> usize {
        (self.summary_words + self.words) * 8
    }
}

impl Bitmap {
    /// # Safety
    /// `mapping` has, from `offset` on, `shape.bytes()` bytes that are only used as this bitmap.
    pub(crate) unsafe fn new(shared: &Arc<Shared>, mapping: &Arc<Mapping>, offset: usize, shape: BitmapShape) -> Self {
        // SAFETY: the caller's promise; words of atomics are valid whatever their bytes; `_mapping` keeps the memory.
        let summary = unsafe { View::new(mapping, offset, shape.summary_words) };
        // SAFETY: as above; the words follow the summary.
        let words = unsafe { View::new(mapping, offset + shape.summary_words * 8, shape.words) };
        Self(Arc::new(Inner {
            capacity: shape.capacity,
            summary,
            words,
            _mapping: Arc::clone(mapping),
            _shared: Arc::clone(shared),
        }))
    }

    /// Bits.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.0.capacity.div_ceil(SLOT_BYTES)
    }

    /// Sets the bits of all slots that the range touches. Bytes. Always a read-modify-write, so a concurrent clear of the same bit
    /// is either before it or after it, never lost in between.
    pub fn set_range(&self, offset: u64, length: u64) {
        for (word, mask) in masks(self.slots_touching(offset, length)) {
            self.or_word(word, mask);
        }
    }

    /// Clears the bits of the slots that lie wholly inside the range (the volume's last slot: as far as the volume goes). Bytes.
    pub fn clear_range(&self, offset: u64, length: u64) {
        for (word, mask) in masks(self.slots_inside(offset, length)) {
            if self.touched(word) {
                // AcqRel: as every change of a bit: who sees it sees what was done before it.
                self.0.words[word].fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    /// Sets one bit; whether it was clear.
    pub fn set(&self, bit: u64) -> bool {
        let (word, mask) = self.place(bit);
        self.or_word(word, mask) & mask == 0
    }

    /// Clears one bit; whether it was set.
    pub fn clear(&self, bit: u64) -> bool {
        let (word, mask) = self.place(bit);
        // AcqRel: as in `clear_range`.
        self.touched(word) && self.0.words[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// Whether one bit is set.
    #[must_use]
    pub fn test(&self, bit: u64) -> bool {
        let (word, mask) = self.place(bit);
        self.load_word(word) & mask != 0
    }

    /// Whether any slot that the range touches is set. Bytes.
    #[must_use]
    pub fn test_range(&self, offset: u64, length: u64) -> bool {
        masks(self.slots_touching(offset, length)).any(|(word, mask)| self.load_word(word) & mask != 0)
    }

    /// The first set bit at or after `from`. Bits set behind the scan meanwhile are not seen.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.bits() {
            return None;
        }
        let first = index(from / 64);
        let mut word = first;
        while word < self.0.words.len() {
            if !self.touched(word) {
                word = (word / PAGE_WORDS + 1) * PAGE_WORDS;
                continue;
            }
            let below = if word == first { (1 << (from % 64)) - 1 } else { 0 };
            let bits = self.load_word(word) & !below;
            if bits != 0 {
                return Some(word as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
            word += 1;
        }
        None
    }

    /// Set bits. A sum while others change them.
    #[must_use]
    pub fn count_ones(&self) -> u64 {
        let mut sum = 0;
        self.for_each_word(|_, word| sum += u64::from(word.count_ones()));
        sum
    }

    /// Words of 64 bits.
    #[must_use]
    pub fn words(&self) -> usize {
        index(self.bits().div_ceil(64))
    }

    /// Calls `visit(index, word)` for every word that is not zero, in order: for a durable copy.
    pub fn for_each_word(&self, mut visit: impl FnMut(usize, u64)) {
        let mut word = 0;
        while word < self.words() {
            if !self.touched(word) {
                word = (word / PAGE_WORDS + 1) * PAGE_WORDS;
                continue;
            }
            match self.load_word(word) {
                0 => {}
                bits => visit(word, bits),
            }
            word += 1;
        }
    }

    /// One word.
    #[must_use]
    pub fn load_word(&self, word: usize) -> u64 {
        // Acquire: pairs with the Release half of every change.
        if self.touched(word) { self.0.words[word].load(Ordering::Acquire) } else { 0 }
    }

    /// Sets the bits of `mask` in one word; the word before.
    pub fn or_word(&self, word: usize, mask: u64) -> u64 {
        assert!(mask & !self.valid(word) == 0, "bits lie inside the volume");
        self.touch(word);
        // AcqRel: pairs with the Acquire of all readers.
        self.0.words[word].fetch_or(mask, Ordering::AcqRel)
    }

    /// Replaces one word; the word before.
    pub fn swap_word(&self, word: usize, value: u64) -> u64 {
        assert!(value & !self.valid(word) == 0, "bits lie inside the volume");
        if value == 0 && !self.touched(word) {
            return 0;
        }
        self.touch(word);
        // AcqRel: as in `or_word`.
        self.0.words[word].swap(value, Ordering::AcqRel)
    }

    /// Moves the bits of `mask` that are set here to `other`, and says which. Set there before they are cleared here: killed in
    /// between, both have them. The caller holds the range lock of those slots: a bit set here between the look and the clear would
    /// be cleared with the old one.
    pub fn move_word_to(&self, other: &Self, word: usize, mask: u64) -> u64 {
        let moved = self.load_word(word) & mask;
        if moved != 0 {
            other.or_word(word, moved);
            self.0.words[word].fetch_and(!moved, Ordering::AcqRel);
        }
        moved
    }

    /// Moves all bits to `other` (a failure gives *in flight* back to *missing*); how many words had any.
    pub fn move_all_to(&self, other: &Self) -> u64 {
        let mut words = 0;
        self.for_each_word(|word, bits| {
            self.move_word_to(other, word, bits);
            words += 1;
        });
        words
    }

    /// Slots (bit numbers) that the byte range touches.
    #[must_use]
    pub fn slots_touching(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = self.end(offset, length);
        if length == 0 { 0..0 } else { offset / SLOT_BYTES..end.div_ceil(SLOT_BYTES) }
    }

    /// Slots (bit numbers) that lie wholly inside the byte range.
    #[must_use]
    pub fn slots_inside(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = self.end(offset, length);
        let first = offset.div_ceil(SLOT_BYTES);
        let last = if end == self.0.capacity { self.bits() } else { end / SLOT_BYTES };
        first..last.max(first)
    }

    fn end(&self, offset: u64, length: u64) -> u64 {
        let end = offset.checked_add(length).filter(|end| *end <= self.0.capacity);
        end.expect("ranges lie inside the volume: front ends check that")
    }

    fn place(&self, bit: u64) -> (usize, u64) {
        assert!(bit < self.bits(), "bits lie inside the volume");
        (index(bit / 64), 1 << (bit % 64))
    }

    /// Bits of a word that stand for slots of the volume.
    fn valid(&self, word: usize) -> u64 {
        match self.bits().saturating_sub(word as u64 * 64) {
            64.. => u64::MAX,
            rest => (1 << rest) - 1,
        }
    }

    fn touched(&self, word: usize) -> bool {
        let page = word / PAGE_WORDS;
        // Acquire: pairs with the Release in `touch`. A page seen as untouched may be touched this very moment: its bits are
        // then as if set after this look.
        self.0.summary[page / 64].load(Ordering::Acquire) & (1 << (page % 64)) != 0
    }

    fn touch(&self, word: usize) {
        if !self.touched(word) {
            let page = word / PAGE_WORDS;
            // Release: in program order before the bit it announces.
            self.0.summary[page / 64].fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }
}

/// The words that a range of bits lies in, with its bits in each.
fn masks(bits: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = if bits.is_empty() { 0..0 } else { bits.start / 64..bits.end.div_ceil(64) };
    words.map(move |word| {
        let low = bits.start.saturating_sub(word * 64);
        let high = (bits.end - word * 64).min(64);
        let below_high = if high == 64 { u64::MAX } else { (1 << high) - 1 };
        (index(word), below_high & (u64::MAX << low32(low)))
    })
}
