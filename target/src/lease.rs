//! Contents that a source may send by reference: ids that this target recomputed itself, and where they lie.
//!
//! A lease pins the segments of its contents: they are not dropped before the last batch that may refer to them is here;
//! from then on the batches that did refer pin them (`docs/decisions/0003-references-pin-segments.md`).

use std::collections::{BTreeMap, HashMap, VecDeque};

use farshore_proto::message::Lease;
use farshore_proto::{BatchNo, ChunkId};

use crate::group::ChunkPlace;

/// Most contents known at once. 24 MiB of memory per stream that dedups; covers the last 4 GiB of 64 KiB chunks.
const KNOWN_MAX: usize = 1 << 17;
/// Most contents of one lease: the message stays at half of a control message's limit.
pub const LEASE_IDS_MAX: usize = 1 << 14;
/// Batches that a lease is good for.
const LEASE_SPAN: u64 = 4096;
/// Leases out at once; a new one is not granted before the oldest of these is over.
const LEASES_OUT_MAX: usize = 4;
const _: () = assert!(LEASES_OUT_MAX * LEASE_IDS_MAX < KNOWN_MAX);
/// New contents after which a new lease is worth its message.
const WORTH_IDS: usize = 256;

/// The lease table of one stream.
#[derive(Debug, Default)]
pub struct Leases {
    known: HashMap<ChunkId, (ChunkPlace, u32)>,
    /// Ids in the order in which they were learned; also says what to forget first.
    order: VecDeque<ChunkId>,
    /// Ids granted and until when.
    out: VecDeque<(BatchNo, Vec<ChunkId>)>,
    /// How many leases name an id.
    pins: HashMap<ChunkId, u32>,
    /// Contents learned since the last lease.
    fresh: usize,
}

impl Leases {
    /// A content of `len` bytes was recomputed and lies at `place`.
    pub fn learn(&mut self, id: ChunkId, place: ChunkPlace, len: u32) {
        if self.known.contains_key(&id) {
            return;
        }
        while self.known.len() >= KNOWN_MAX {
            let Some(oldest) = self.order.pop_front() else { return };
            if self.pins.contains_key(&oldest) {
                self.order.push_back(oldest);
                // At most half of the table is pinned (asserted above), so this ends.
                continue;
            }
            self.known.remove(&oldest);
        }
        self.known.insert(id, (place, len));
        self.order.push_back(id);
        self.fresh += 1;
    }

    /// The next lease, when it is worth one: the contents learned last. `tail` is the last batch held.
    #[must_use]
    pub fn grant(&mut self, tail: BatchNo) -> Option<Lease> {
        self.retire(tail);
        let renew = self.out.back().is_some_and(|(through, _)| through.0 < tail.0 + LEASE_SPAN / 2);
        if self.known.is_empty() || self.out.len() >= LEASES_OUT_MAX || (self.fresh < WORTH_IDS && !renew) {
            return None;
        }
        let ids: Vec<ChunkId> =
            self.order.iter().rev().filter(|id| self.known.contains_key(id)).take(LEASE_IDS_MAX).copied().collect();
        for id in &ids {
            *self.pins.entry(*id).or_default() += 1;
        }
        let through = BatchNo(tail.0 + LEASE_SPAN);
        self.out.push_back((through, ids.clone()));
        self.fresh = 0;
        Some(Lease { through, ids })
    }

    /// A new session begins without a lease: the next one is granted as soon as anything is known.
    pub fn handle_session(&mut self) {
        self.fresh = self.known.len();
    }

    /// Batch `tail` is journaled: leases through it are over.
    pub fn retire(&mut self, tail: BatchNo) {
        while self.out.front().is_some_and(|(through, _)| *through <= tail) {
            let (_, ids) = self.out.pop_front().unwrap_or_default();
            for id in ids {
                if let Some(pins) = self.pins.get_mut(&id) {
                    *pins -= 1;
                    if *pins == 0 {
                        self.pins.remove(&id);
                    }
                }
            }
        }
    }

    /// Where a content lies that a batch refers to; only under a lease, and only with the length that was recomputed.
    #[must_use]
    pub fn resolve(&self, id: &ChunkId, len: u64) -> Option<ChunkPlace> {
        let (place, known_len) = self.known.get(id).filter(|_| self.pins.contains_key(id))?;
        (u64::from(*known_len) == len).then_some(*place)
    }

    /// Forgets the contents of a segment that is to be dropped; `false`, and nothing changes, while a lease names one.
    #[must_use]
    pub fn leave_segment(&mut self, segment: u32) -> bool {
        let inside = |(place, _): &(ChunkPlace, u32)| place.segment == segment;
        if self.order.iter().any(|id| self.known.get(id).is_some_and(inside) && self.pins.contains_key(id)) {
            return false;
        }
        let known = &mut self.known;
        self.order.retain(|id| match known.get(id) {
            Some(entry) if inside(entry) => {
                known.remove(id);
                false
            }
            Some(_) => true,
            None => false,
        });
        true
    }

    /// Contents known and leases out, for figures.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.known.len(), self.out.len())
    }

    /// Segments that hold contents under a lease.
    #[must_use]
    pub fn pinned_segments(&self) -> BTreeMap<u32, usize> {
        let mut pinned = BTreeMap::new();
        for (_, ids) in &self.out {
            for id in ids {
                if let Some((place, _)) = self.known.get(id) {
                    *pinned.entry(place.segment).or_default() += 1;
                }
            }
        }
        pinned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> ChunkId {
        let mut id = ChunkId([0; 32]);
        id.0[..4].copy_from_slice(&n.to_le_bytes());
        id
    }

    fn place(segment: u32) -> ChunkPlace {
        ChunkPlace { segment, frame_offset: 0, within: 0 }
    }

    /// Goal: a content is resolvable exactly while a lease names it, and its segment stays as long.
    #[test]
    fn a_lease_pins_until_its_last_batch() {
        let mut leases = Leases::default();
        (0..300).for_each(|n| leases.learn(id(n), place(n / 100), 512));
        assert_eq!(leases.resolve(&id(5), 512), None, "known, but not under lease");
        let lease = leases.grant(BatchNo(10)).expect("worth it");
        assert_eq!((lease.ids.len(), lease.through), (300, BatchNo(10 + LEASE_SPAN)));
        assert_eq!(leases.resolve(&id(5), 512), Some(place(0)));
        assert_eq!(leases.resolve(&id(5), 1024), None, "another length");
        assert!(!leases.leave_segment(0));
        assert_eq!(leases.grant(BatchNo(11)), None, "nothing new");
        leases.retire(BatchNo(9 + LEASE_SPAN));
        assert!(!leases.leave_segment(0));
        leases.retire(lease.through);
        assert_eq!(leases.resolve(&id(5), 512), None);
        assert!(leases.leave_segment(0));
        assert_eq!(leases.sizes(), (200, 0));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest_that_no_lease_names() {
        let mut leases = Leases::default();
        (0..300).for_each(|n| leases.learn(id(n), place(0), 512));
        assert!(leases.grant(BatchNo(0)).is_some());
        let count = u32::try_from(KNOWN_MAX).expect("small") + 1000;
        (300..count).for_each(|n| leases.learn(id(n), place(1), 512));
        assert_eq!(leases.sizes().0, KNOWN_MAX);
        assert_eq!(leases.resolve(&id(0), 512), Some(place(0)), "under lease");
        assert!(!leases.known.contains_key(&id(301)), "the oldest without a lease");
    }
}
