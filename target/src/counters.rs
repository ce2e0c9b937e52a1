//! Figures of one stream. Each only rises while the target runs; all start at zero with it.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only rises.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Reads.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The figures.
#[derive(Debug, Default)]
pub struct Counters {
    /// Batches journaled.
    pub batches: Counter,
    /// Bytes of batches as received.
    pub received_bytes: Counter,
    /// Bytes that guests wrote for them, as the batches say.
    pub raw_bytes: Counter,
    /// Bytes appended to segments, headers and padding included.
    pub journal_bytes: Counter,
    /// Bytes written straight to bases.
    pub base_bytes: Counter,
    /// Group commits: one fdatasync each.
    pub commits: Counter,
    /// Batches that were held already.
    pub repeats: Counter,
    /// Batches refused.
    pub refused: Counter,
    /// Records whose content came by reference.
    pub references: Counter,
    /// Probes answered.
    pub probes: Counter,
    /// Frames opened and their ids recomputed in the background.
    pub frames_checked: Counter,
}
