//! Which slots of a volume were written to since sync last looked away.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use farshore_proto::SLOT_BYTES;

/// One bit per 64 KiB slot, in the process's own memory: set when a write to the slot is about to be submitted, cleared by sync when
/// it begins to watch the slot. Both happen under the range lock of the slot, which orders them; hence Relaxed everywhere.
///
/// 2 MiB per TiB.
#[derive(Debug)]
pub(crate) struct Touched {
    words: Box<[AtomicU64]>,
}

impl Touched {
    /// For a volume of `size` bytes; nothing touched.
    pub(crate) fn new(size: u64) -> Self {
        let words = size.div_ceil(SLOT_BYTES).div_ceil(64);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The slots that `[offset, offset + len)` lies in are written to. In the steady state a load per slot, no more: after the first
    /// write to a slot its bit stays until sync wants to know.
    pub(crate) fn mark(&self, offset: u64, len: u64) {
        for slot in offset / SLOT_BYTES..(offset + len).div_ceil(SLOT_BYTES) {
            let (word, mask) = self.place(slot);
            if word.load(Ordering::Relaxed) & mask == 0 {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Begins to watch `slots`.
    pub(crate) fn clear(&self, slots: Range<u64>) {
        for slot in slots {
            let (word, mask) = self.place(slot);
            word.fetch_and(!mask, Ordering::Relaxed);
        }
    }

    /// Whether the slot was written to since.
    pub(crate) fn test(&self, slot: u64) -> bool {
        let (word, mask) = self.place(slot);
        word.load(Ordering::Relaxed) & mask != 0
    }

    fn place(&self, slot: u64) -> (&AtomicU64, u64) {
        let word = usize::try_from(slot / 64).expect("usize has 64 bits");
        (&self.words[word], 1 << (slot % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_every_slot_that_a_range_lies_in() {
        let touched = Touched::new(200 * SLOT_BYTES);
        touched.mark(SLOT_BYTES - 1, 2);
        touched.mark(64 * SLOT_BYTES, SLOT_BYTES);
        let marked: Vec<u64> = (0..200).filter(|slot| touched.test(*slot)).collect();
        assert_eq!(marked, [0, 1, 64]);
        touched.clear(1..65);
        let marked: Vec<u64> = (0..200).filter(|slot| touched.test(*slot)).collect();
        assert_eq!(marked, [0]);
    }
}
