//! Slots kept for readers that go on where they ended.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_proto::SLOT_BYTES;

/// Ends of recent reads that are remembered: readers that run at the same time.
const READERS_MAX: usize = 32;

/// Bounded; the oldest slot goes first. A point never changes, so nothing in it grows stale.
pub(super) struct SlotCache {
    slots_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<u64, Arc<[u8]>>,
    order: VecDeque<u64>,
    /// Byte positions at which recent reads ended.
    ends: VecDeque<u64>,
}

impl SlotCache {
    pub(super) fn new(bytes: usize) -> Self {
        Self { slots_max: (bytes as u64 / SLOT_BYTES).max(1).try_into().unwrap_or(usize::MAX), inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, slot: u64) -> Option<Arc<[u8]>> {
        self.lock().slots.get(&slot).cloned()
    }

    pub(super) fn keep(&self, slot: u64, bytes: Arc<[u8]>) {
        let mut inner = self.lock();
        if inner.slots.insert(slot, bytes).is_none() {
            inner.order.push_back(slot);
        }
        while inner.order.len() > self.slots_max {
            if let Some(oldest) = inner.order.pop_front() {
                inner.slots.remove(&oldest);
            }
        }
    }

    /// Notes a read within a slot; whether it began where another ended.
    pub(super) fn is_sequential(&self, slot: u64, within: usize, len: usize) -> bool {
        let start = slot * SLOT_BYTES + within as u64;
        let mut inner = self.lock();
        let place = inner.ends.iter().position(|&end| end == start);
        if let Some(place) = place {
            inner.ends.remove(place);
        }
        if inner.ends.len() >= READERS_MAX {
            inner.ends.pop_front();
        }
        // The next request of this reader may begin behind the slot, which will be in the cache.
        let end = if place.is_some() { (slot + 1) * SLOT_BYTES } else { start + len as u64 };
        inner.ends.push_back(end);
        place.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_no_more_than_told() {
        let cache = SlotCache::new(3 << 16);
        for slot in 0..10 {
            cache.keep(slot, vec![1; 4].into());
            cache.keep(slot, vec![2; 4].into());
        }
        let held: Vec<u64> = (0..10).filter(|&slot| cache.find(slot).is_some()).collect();
        assert_eq!(held, [7, 8, 9]);
        assert_eq!(cache.find(9).as_deref(), Some(&[2, 2, 2, 2][..]));
    }

    #[test]
    fn readers_that_go_on_are_recognised_among_others() {
        let cache = SlotCache::new(0);
        assert!(!cache.is_sequential(5, 0, 4096));
        assert!(!cache.is_sequential(90, 8192, 4096));
        assert!(cache.is_sequential(5, 4096, 4096));
        assert!(cache.is_sequential(6, 0, 4096), "the rest of slot 5 came from the cache");
        assert!(cache.is_sequential(90, 12_288, 4096));
        assert!(!cache.is_sequential(7, 512, 4096));
    }
}
