//! Coalesce and chunk: raw entries → records, the last write to a sector winning, no chunk crossing a slot.

use farshore_proto::record::{Kind, Record};
use farshore_proto::{SECTOR_BYTES, SLOT_SECTORS, VolumeIndex};

use crate::drain::{RawBatch, RawEntry};

/// What makes a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Granularity {
    /// Every cut: within a batch the last write to a sector wins.
    #[default]
    Cut,
    /// Every write: nothing is coalesced.
    Write,
}

/// Slots in a zeroed range up to which older writes below it are looked for (64 MiB, the longest discard that the filter
/// passes on in one piece). Above it, they are sent in vain; the order of records makes that right.
const ZERO_SLOTS_MAX: u64 = 1024;
/// Sectors of one record without content, at most.
const RECORD_SECTORS_MAX: u64 = 1 << 31;

/// Where a record's bytes are, until they are packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Origin {
    /// Index of the raw entry.
    pub entry: u32,
    /// Byte within its payload.
    pub offset: u32,
}

impl Origin {
    /// Of records without content.
    pub const NONE: Self = Self { entry: u32::MAX, offset: 0 };
}

/// Records of one batch, and beside each where its bytes are.
#[derive(Debug, Default)]
pub struct RecordSet {
    /// In the order of their positions.
    pub records: Vec<Record>,
    /// One for each record.
    pub origins: Vec<Origin>,
}

impl RecordSet {
    /// Forgets all, keeps the memory.
    pub fn clear(&mut self) {
        self.records.clear();
        self.origins.clear();
    }

    /// The bytes of record `index`; `None` where it has none.
    #[must_use]
    pub fn bytes<'a, P: std::ops::Deref<Target = [u8]>>(&self, raw: &'a RawBatch<P>, index: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.records[index].len_bytes()).ok()?;
        self.bytes_at(raw, index, len)
    }

    /// The first `len` bytes of what record `index` says.
    pub(crate) fn bytes_at<'a, P: std::ops::Deref<Target = [u8]>>(
        &self,
        raw: &'a RawBatch<P>,
        index: usize,
        len: usize,
    ) -> Option<&'a [u8]> {
        let origin = self.origins[index];
        let payload = raw.entries.get(origin.entry as usize)?.payload.as_deref()?;
        payload.get(origin.offset as usize..origin.offset as usize + len)
    }

    fn push(&mut self, record: Record, origin: Origin) {
        self.records.push(record);
        self.origins.push(origin);
    }
}

/// Makes records of raw entries. Walks them from the last to the first: what is covered by then was written again later, so
/// only the rest of a write survives. A verify record uncovers its slots: it sees what was written before it.
///
/// Invariant: content records of one slot do not overlap unless a verify record lies between them. Zeroed ranges stay whole,
/// so later records may lie over them; applying records in order gives what applying the raw entries gives.
#[derive(Default)]
pub struct Coalescer {
    covered: SlotTable,
}

impl Coalescer {
    /// Fills `set` from `raw`.
    pub fn coalesce<P>(&mut self, raw: &RawBatch<P>, granularity: Granularity, set: &mut RecordSet) {
        set.clear();
        self.covered.clear();
        for (index, entry) in raw.entries.iter().enumerate().rev() {
            let index = u32::try_from(index).expect("a ring has at most 2^24 descriptors");
            match entry.kind {
                Kind::Write | Kind::SyncData => self.content(entry, index, granularity, set),
                Kind::WriteZeroes | Kind::Discard | Kind::SyncZero => self.zeroes(entry, granularity, set),
                Kind::Probe | Kind::ProbeZero => {
                    self.uncover(entry);
                    ranged(entry, index, set);
                }
                Kind::Unreadable => ranged(entry, index, set),
                Kind::EventBegin | Kind::EventEnd | Kind::VolumeJoined | Kind::VolumeLeft => {
                    set.push(Record::new(entry.kind, entry.volume, entry.position, 0, 0), Origin::NONE);
                }
                Kind::Noop | Kind::Cut | Kind::Bookmark => {}
            }
        }
        set.records.reverse();
        set.origins.reverse();
    }

    fn content<P>(&mut self, entry: &RawEntry<P>, index: u32, granularity: Granularity, set: &mut RecordSet) {
        for (slot, mask) in slots_of(entry.start, entry.sectors).rev() {
            let live = match granularity {
                Granularity::Cut => {
                    let covered = self.covered.entry(key(entry.volume, slot));
                    let live = mask & !*covered;
                    *covered |= mask;
                    live
                }
                Granularity::Write => mask,
            };
            for (from, sectors) in Runs(live) {
                let start = slot * u64::from(SLOT_SECTORS) + u64::from(from);
                let offset = u32::try_from((start - entry.start) * SECTOR_BYTES).expect("cells hold at most 256 KiB");
                let record = Record::new(entry.kind, entry.volume, entry.position, start, sectors);
                set.push(record, Origin { entry: index, offset });
            }
        }
    }

    fn zeroes<P>(&mut self, entry: &RawEntry<P>, granularity: Granularity, set: &mut RecordSet) {
        let slots = slots_of(entry.start, entry.sectors);
        let mut survives = granularity == Granularity::Write || slots.len() > ZERO_SLOTS_MAX;
        if !survives {
            for (slot, mask) in slots {
                let covered = self.covered.entry(key(entry.volume, slot));
                survives |= mask & !*covered != 0;
                *covered |= mask;
            }
        }
        if survives {
            ranged(entry, u32::MAX, set);
        }
    }

    fn uncover<P>(&mut self, entry: &RawEntry<P>) {
        let slots = slots_of(entry.start, entry.sectors);
        if self.covered.len() == 0 {
            return;
        }
        if slots.len() <= self.covered.cells.len() as u64 {
            for (slot, _) in slots {
                self.covered.forget(key(entry.volume, slot));
            }
        } else {
            let keys = key(entry.volume, slots.first)..=key(entry.volume, slots.last);
            self.covered.forget_all(&keys);
        }
    }
}

/// A record without a chunk; a probe's hash stays in its cell.
fn ranged<P>(entry: &RawEntry<P>, index: u32, set: &mut RecordSet) {
    let origin = if entry.kind == Kind::Probe { Origin { entry: index, offset: 0 } } else { Origin::NONE };
    // Backwards, because the whole set is turned around at the end.
    let mut end = entry.start + entry.sectors;
    while end > entry.start {
        let sectors = (end - entry.start).min(RECORD_SECTORS_MAX);
        end -= sectors;
        let count = u32::try_from(sectors).expect("at most 2^31");
        set.push(Record::new(entry.kind, entry.volume, entry.position, end, count), origin);
    }
}

fn key(volume: VolumeIndex, slot: u64) -> u64 {
    // Ranges end below 2^64 bytes, so a slot's number has 48 bits.
    u64::from(volume.0) << 48 | slot
}

/// The slots that a range touches, each with the range's sectors in it as a mask.
#[derive(Clone, Copy)]
struct Slots {
    start: u64,
    end: u64,
    first: u64,
    /// Last slot still to come.
    last: u64,
    done: bool,
}

fn slots_of(start: u64, sectors: u64) -> Slots {
    let end = start + sectors;
    let per_slot = u64::from(SLOT_SECTORS);
    Slots { start, end, first: start / per_slot, last: end.saturating_sub(1) / per_slot, done: sectors == 0 }
}

impl Slots {
    fn len(&self) -> u64 {
        if self.done { 0 } else { self.last - self.first + 1 }
    }

    fn mask(&self, slot: u64) -> u128 {
        let base = slot * u64::from(SLOT_SECTORS);
        let low = u32::try_from(self.start.saturating_sub(base)).expect("the slot is touched");
        let high = u32::try_from((self.end - base).min(u64::from(SLOT_SECTORS))).expect("at most a slot");
        (u128::MAX >> (SLOT_SECTORS - (high - low))) << low
    }
}

impl Iterator for Slots {
    type Item = (u64, u128);

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = (self.first, self.mask(self.first));
        self.done = self.first == self.last;
        self.first += u64::from(!self.done);
        Some(item)
    }
}

impl DoubleEndedIterator for Slots {
    fn next_back(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = (self.last, self.mask(self.last));
        self.done = self.first == self.last;
        self.last -= u64::from(!self.done);
        Some(item)
    }
}

/// Runs of ones in a mask, from the highest: (first bit, bits).
struct Runs(u128);

impl Iterator for Runs {
    type Item = (u32, u32);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0 == 0 {
            return None;
        }
        let above = self.0.leading_zeros();
        let bits = (self.0 << above).leading_ones();
        let low = 128 - above - bits;
        // The run and everything above it are gone: what is left lies below bit `low`.
        self.0 &= (1u128 << low) - 1;
        Some((low, bits))
    }
}

/// Hash table from slot to covered sectors, emptied in O(1) by a stamp, so that a batch costs no allocation.
struct SlotTable {
    cells: Vec<SlotCell>,
    len: usize,
    stamp: u32,
}

#[derive(Clone, Copy)]
struct SlotCell {
    covered: u128,
    key: u64,
    stamp: u32,
}

const EMPTY: SlotCell = SlotCell { covered: 0, key: 0, stamp: 0 };
/// Smallest table: 8192 cells of 32 bytes, enough for a batch of 16 MiB in random 4 KiB writes at half load.
const TABLE_MIN: usize = 8192;

impl Default for SlotTable {
    fn default() -> Self {
        Self { cells: vec![EMPTY; TABLE_MIN], len: 0, stamp: 1 }
    }
}

impl SlotTable {
    fn clear(&mut self) {
        self.len = 0;
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.cells.fill(EMPTY);
            self.stamp = 1;
        }
    }

    /// Slots known, forgotten ones included.
    fn len(&self) -> usize {
        self.len
    }

    fn find(&self, key: u64) -> usize {
        let mask = self.cells.len() - 1;
        // Fibonacci hashing: neighbours, which is what sequential writes are, land far apart.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut at = usize::try_from(hash >> 32).expect("32 bits") & mask;
        while self.cells[at].stamp == self.stamp && self.cells[at].key != key {
            at = (at + 1) & mask;
        }
        at
    }

    fn entry(&mut self, key: u64) -> &mut u128 {
        if (self.len + 1) * 2 > self.cells.len() {
            self.grow();
        }
        let at = self.find(key);
        if self.cells[at].stamp != self.stamp {
            self.cells[at] = SlotCell { covered: 0, key, stamp: self.stamp };
            self.len += 1;
        }
        &mut self.cells[at].covered
    }

    fn forget(&mut self, key: u64) {
        let at = self.find(key);
        if self.cells[at].stamp == self.stamp {
            self.cells[at].covered = 0;
        }
    }

    fn forget_all(&mut self, keys: &std::ops::RangeInclusive<u64>) {
        for cell in &mut self.cells {
            if cell.stamp == self.stamp && keys.contains(&cell.key) {
                cell.covered = 0;
            }
        }
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.cells);
        self.cells = vec![EMPTY; old.len() * 2];
        for cell in old.into_iter().filter(|cell| cell.stamp == self.stamp) {
            let at = self.find(cell.key);
            self.cells[at] = cell;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_masks_fit_together() {
        let mask = slots_of(120, 20).collect::<Vec<_>>();
        assert_eq!(mask, [(0, u128::MAX << 120), (1, (1 << 12) - 1)]);
        assert_eq!(slots_of(128, 128).collect::<Vec<_>>(), [(1, u128::MAX)]);
        assert_eq!(slots_of(5, 0).next(), None);
        let ranges = slots_of(100, 1000);
        assert_eq!(ranges.len(), ranges.count() as u64);
        assert!(slots_of(100, 1000).rev().eq(slots_of(100, 1000).collect::<Vec<_>>().into_iter().rev()));
        assert_eq!(Runs(u128::MAX).collect::<Vec<_>>(), [(0, 128)]);
        assert_eq!(Runs(0b1011 | 1 << 127).collect::<Vec<_>>(), [(127, 1), (3, 1), (0, 2)]);
    }

    #[test]
    fn the_table_grows_and_forgets() {
        let mut table = SlotTable::default();
        for round in 0..3 {
            table.clear();
            for key in 0..20_000 {
                *table.entry(key << 7) |= 1 << round;
            }
            assert_eq!(table.len(), 20_000);
            assert!((0..20_000).all(|key| *table.entry(key << 7) == 1 << round));
            table.forget(5 << 7);
            table.forget_all(&(10 << 7..=12 << 7));
            assert_eq!((0..20).filter(|key| *table.entry(key << 7) == 0).collect::<Vec<_>>(), [5, 10, 11, 12]);
        }
    }
}
