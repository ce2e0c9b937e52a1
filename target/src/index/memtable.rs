//! The entries of the active segment, in memory.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use farshore_proto::VolumeIndex;

use super::entry::{EXTENT_BIT, Key, Moment, SEQ_MAX, Versions, place};
use crate::group::{IndexEntry, UpTo};

/// Versions of all places in the order of their arrival; each place's versions form a chain, newest first.
///
/// Invariant: `(batch, seq)` rises along `entries`.
#[derive(Debug, Default)]
pub(crate) struct Memtable {
    entries: Vec<Linked>,
    /// Index in `entries` of each place's newest version.
    newest: BTreeMap<(u16, u64), u32>,
}

#[derive(Clone, Copy, Debug)]
struct Linked {
    entry: IndexEntry,
    /// The same place's version before; [`NONE`]: the first.
    before: u32,
}

const NONE: u32 = u32::MAX;
/// Versions of a place that a survey looks at.
const VERSIONS_LOOKED_AT: usize = 64;

impl Memtable {
    /// Adds the newest. Panics where time runs backwards: lookups would find old data as new.
    pub(crate) fn add(&mut self, entry: &IndexEntry) {
        if let Some(last) = self.entries.last() {
            let order = (last.entry.batch, last.entry.seq) <= (entry.batch, entry.seq);
            assert!(order, "index entry of batch {} record {} after a newer one", entry.batch, entry.seq);
        }
        assert!(entry.seq <= SEQ_MAX, "a batch has at most 2^20 records");
        let number = u32::try_from(self.entries.len()).expect("ingest seals long before 2^32 entries");
        let before = self.newest.insert((entry.volume.0, place(entry)), number).unwrap_or(NONE);
        self.entries.push(Linked { entry: *entry, before });
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// First and last batch.
    pub(crate) fn batches(&self) -> Option<(u64, u64)> {
        Some((self.entries.first()?.entry.batch.0, self.entries.last()?.entry.batch.0))
    }

    /// The place's versions up to `upto` and after `floor`, newest first, until told to stop.
    pub(crate) fn scan_back(
        &self,
        volume: VolumeIndex,
        place: u64,
        upto: UpTo,
        floor: Moment,
        visit: &mut dyn FnMut(&IndexEntry) -> ControlFlow<()>,
    ) {
        let mut at = self.newest.get(&(volume.0, place)).copied().unwrap_or(NONE);
        while let Some(linked) = self.entries.get(at as usize) {
            let entry = &linked.entry;
            if (entry.batch.0, entry.seq) <= floor {
                return;
            }
            if (entry.batch, entry.seq) <= (upto.batch, upto.seq) && visit(entry).is_break() {
                return;
            }
            at = linked.before;
        }
    }

    /// Up to `limit` places that have versions, from `from` on, within the slots or within the extents, and what their
    /// versions are, visible or not.
    pub(crate) fn places(&self, volume: VolumeIndex, from: u64, limit: usize, out: &mut Vec<(u64, Versions)>) {
        let end = if from & EXTENT_BIT == 0 { EXTENT_BIT - 1 } else { u64::MAX };
        let range = self.newest.range((volume.0, from)..=(volume.0, end));
        out.extend(range.take(limit).map(|(&(_, place), &newest)| (place, self.versions(newest))));
    }

    fn versions(&self, newest: u32) -> Versions {
        let mut versions = Versions::default();
        let mut at = newest;
        for _ in 0..VERSIONS_LOOKED_AT {
            let Some(linked) = self.entries.get(at as usize) else { return versions };
            versions = versions | Versions::of(&linked.entry);
            at = linked.before;
        }
        Versions::ANY
    }

    /// All, in the order of a run. Entries of one place with one key stay in the order of their arrival.
    pub(crate) fn sorted(&self) -> Vec<IndexEntry> {
        let mut entries: Vec<IndexEntry> = self.entries.iter().map(|linked| linked.entry).collect();
        entries.sort_by_key(Key::of);
        entries
    }

    /// Those of batches after `batch`.
    pub(crate) fn after(&self, batch: u64) -> Self {
        let mut newer = Self::default();
        for linked in self.entries.iter().filter(|linked| linked.entry.batch.0 > batch) {
            newer.add(&linked.entry);
        }
        newer
    }
}
