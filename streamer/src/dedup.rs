//! Dedup: which chunks are sent, and which only named.

use std::collections::HashSet;

use farshore_proto::message::Lease;
use farshore_proto::{BatchNo, ChunkId};

/// Contents that the target vouches for. Made from one [`Lease`], shared by the batches that are formed under it.
#[derive(Debug)]
pub struct LeaseSet {
    through: BatchNo,
    ids: HashSet<ChunkId, IdState>,
}

impl LeaseSet {
    /// From the target's message.
    #[must_use]
    pub fn new(lease: Lease) -> Self {
        Self { through: lease.through, ids: lease.ids.into_iter().collect() }
    }

    /// Batch `number` may refer to `id`.
    #[must_use]
    pub fn covers(&self, number: BatchNo, id: ChunkId) -> bool {
        number <= self.through && self.ids.contains(&id)
    }

    /// Last batch that may refer to it.
    #[must_use]
    pub fn through(&self) -> BatchNo {
        self.through
    }

    /// Contents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Vouches for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Chunk ids are hashes under a secret key, so eight of their bytes serve as their own hash.
#[derive(Clone, Copy, Default, Debug)]
struct IdState;

struct IdHasher(u64);

impl std::hash::BuildHasher for IdState {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher(0)
    }
}

impl std::hash::Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(head) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*head);
        }
    }

    // The array's length, which `Hash` writes first on some paths, says nothing.
    fn write_usize(&mut self, _: usize) {}
}

/// Chunks of one batch by id: a repeat shares the first one's home. Emptied in O(1).
pub struct Seen {
    cells: Vec<(u32, u32)>,
    len: usize,
    stamp: u32,
}

const TABLE_MIN: usize = 8192;

impl Default for Seen {
    fn default() -> Self {
        Self { cells: vec![(0, 0); TABLE_MIN], len: 0, stamp: 1 }
    }
}

impl Seen {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.len = 0;
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.cells.fill((0, 0));
            self.stamp = 1;
        }
    }

    /// The earlier record with the id of record `index`, or none, in which case `index` is kept for later ones.
    pub fn first_with(&mut self, index: u32, id_of: impl Fn(u32) -> ChunkId) -> Option<u32> {
        if (self.len + 1) * 2 > self.cells.len() {
            self.grow(&id_of);
        }
        let at = self.find(id_of(index), &id_of);
        let (stamp, first) = self.cells[at];
        if stamp == self.stamp {
            return Some(first);
        }
        self.cells[at] = (self.stamp, index);
        self.len += 1;
        None
    }

    fn find(&self, id: ChunkId, id_of: impl Fn(u32) -> ChunkId) -> usize {
        let mask = self.cells.len() - 1;
        let [a, b, c, d, ..] = id.0;
        let mut at = u32::from_le_bytes([a, b, c, d]) as usize & mask;
        while self.cells[at].0 == self.stamp && id_of(self.cells[at].1) != id {
            at = (at + 1) & mask;
        }
        at
    }

    fn grow(&mut self, id_of: &impl Fn(u32) -> ChunkId) {
        let old = std::mem::take(&mut self.cells);
        self.cells = vec![(0, 0); old.len() * 2];
        for cell in old.into_iter().filter(|(stamp, _)| *stamp == self.stamp) {
            let at = self.find(id_of(cell.1), id_of);
            self.cells[at] = cell;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u32) -> ChunkId {
        let mut id = ChunkId([7; 32]);
        id.0[..4].copy_from_slice(&(n % 1000 * 31).to_le_bytes());
        id.0[9..13].copy_from_slice(&n.to_le_bytes());
        id
    }

    #[test]
    fn repeats_find_their_first_though_hashes_collide() {
        let mut seen = Seen::default();
        for _ in 0..2 {
            seen.clear();
            // Records n and n + 12000 have the same id; hashes of n, n + 1000, … collide.
            let of = |n: u32| id(n % 12_000);
            for n in 0..12_000 {
                assert_eq!(seen.first_with(n, of), None);
            }
            for n in 12_000..24_000 {
                assert_eq!(seen.first_with(n, of), Some(n - 12_000));
            }
        }
    }

    #[test]
    fn leases_end() {
        let lease = LeaseSet::new(Lease { through: BatchNo(5), ids: vec![id(1), id(2)] });
        assert!(lease.covers(BatchNo(5), id(2)));
        assert!(!lease.covers(BatchNo(6), id(2)) && !lease.covers(BatchNo(5), id(3)));
    }
}
