//! Bytes with a live and a durable state: the content of a simulated file or disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{SECTOR, SimRng};

pub(super) const PAGE: usize = 4096;
const PAGE_U64: u64 = PAGE as u64;
const SECTOR_U64: u64 = SECTOR as u64;

/// Absent pages are zeroes and count as holes. Shared until written, so that copies of an image are cheap.
#[derive(Clone, Default)]
struct Pages(BTreeMap<u64, Arc<[u8; PAGE]>>);

/// Invariants: `durable` plus all of `changes` in order gives `live`, unless a sync failed; pages hold zeroes past `len`.
#[derive(Clone, Default)]
pub(super) struct Image {
    live: Pages,
    live_len: u64,
    durable: Pages,
    durable_len: u64,
    /// Since the last sync, oldest first.
    changes: Vec<Change>,
    /// Pages that a sync has to take over.
    dirty: BTreeSet<u64>,
}

#[derive(Clone)]
enum Change {
    Write { offset: u64, bytes: Arc<[u8]> },
    Zero { offset: u64, len: u64 },
    Length(u64),
}

/// How a crash treats the changes since the last sync.
enum Fate {
    Lost,
    Kept,
    /// Each change as a whole.
    PerChange,
    /// Each sector of each change.
    PerSector,
}

impl Pages {
    fn read(&self, offset: u64, buf: &mut [u8]) {
        each_page(offset, buf.len() as u64, |page, within, at| match self.0.get(&page) {
            Some(bytes) => buf[at..at + within.len()].copy_from_slice(&bytes[within]),
            None => buf[at..at + within.len()].fill(0),
        });
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        each_page(offset, bytes.len() as u64, |page, within, at| {
            let target = Arc::make_mut(self.0.entry(page).or_insert_with(|| Arc::new([0; PAGE])));
            let len = within.len();
            target[within].copy_from_slice(&bytes[at..at + len]);
        });
    }

    /// Whole pages become holes.
    fn zero(&mut self, offset: u64, len: u64) {
        // Only pages that exist: the range may be huge.
        let last = offset.saturating_add(len);
        let touched: Vec<u64> =
            self.0.range(offset / PAGE_U64..last.div_ceil(PAGE_U64)).map(|(&page, _)| page).collect();
        for page in touched {
            let start = offset.saturating_sub(page * PAGE_U64);
            let end = (last - page * PAGE_U64).min(PAGE_U64);
            if start == 0 && end == PAGE_U64 {
                self.0.remove(&page);
            } else if let Some(bytes) = self.0.get_mut(&page) {
                Arc::make_mut(bytes)[small(start)..small(end)].fill(0);
            }
        }
    }

    fn cut(&mut self, len: u64) {
        self.zero(len, u64::MAX - len);
    }
}

fn small(within_page: u64) -> usize {
    usize::try_from(within_page).expect("at most a page")
}

/// Calls `visit(page, range within the page, position within the transfer)` for every page of a range.
fn each_page(offset: u64, len: u64, mut visit: impl FnMut(u64, std::ops::Range<usize>, usize)) {
    let mut at = 0;
    while at < len {
        let position = offset + at;
        let start = small(position % PAGE_U64);
        let bytes = (PAGE - start).min(usize::try_from(len - at).unwrap_or(PAGE));
        visit(position / PAGE_U64, start..start + bytes, usize::try_from(at).expect("a transfer fits into memory"));
        at += bytes as u64;
    }
}

/// The sector-aligned pieces of a range, as (start within the range, end within the range).
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let start = at;
        at = (at + SECTOR_U64 - (offset + at) % SECTOR_U64).min(len);
        Some((start, at))
    })
}

impl Image {
    /// Zeroes, durable.
    pub(super) fn with_len(len: u64) -> Self {
        Self { live_len: len, durable_len: len, ..Self::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.live_len
    }

    /// Bytes in allocated pages.
    pub(super) fn allocated(&self) -> u64 {
        self.live.0.len() as u64 * PAGE_U64
    }

    /// `false`: not inside.
    #[must_use]
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> bool {
        let inside = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= self.live_len);
        if inside {
            self.live.read(offset, buf);
        }
        inside
    }

    /// What a crash that loses everything would leave. Zeroes past its end.
    pub(super) fn read_durable(&self, offset: u64, buf: &mut [u8]) {
        self.durable.read(offset, buf);
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.live.write(offset, bytes);
        self.live_len = self.live_len.max(offset + bytes.len() as u64);
        self.touch(offset, bytes.len() as u64);
        self.changes.push(Change::Write { offset, bytes: bytes.into() });
    }

    /// Any of the sectors, each as a write of its own: a write that failed halfway.
    pub(super) fn write_some(&mut self, offset: u64, bytes: &[u8], rng: &mut SimRng) {
        for (start, end) in sectors(offset, bytes.len() as u64) {
            if rng.chance(1, 2) {
                let range =
                    usize::try_from(start).expect("inside of bytes")..usize::try_from(end).expect("inside of bytes");
                self.write(offset + start, &bytes[range]);
            }
        }
    }

    /// The range reads as zeroes; does not change the length.
    pub(super) fn zero(&mut self, offset: u64, len: u64) {
        let len = len.min(self.live_len.saturating_sub(offset));
        if len == 0 {
            return;
        }
        self.touch(offset, len);
        self.live.zero(offset, len);
        self.changes.push(Change::Zero { offset, len });
    }

    pub(super) fn set_len(&mut self, len: u64) {
        if len < self.live_len {
            self.touch(len, self.live_len - len);
            self.live.cut(len);
        }
        self.live_len = len;
        self.changes.push(Change::Length(len));
    }

    /// Marks pages that exist now or will after the change.
    fn touch(&mut self, offset: u64, len: u64) {
        let (first, last) = (offset / PAGE_U64, (offset + len).div_ceil(PAGE_U64));
        if last - first <= 1024 {
            self.dirty.extend(first..last);
        } else {
            // A huge range can only be one of zeroes or beyond the end: holes need no mark unless the durable side has a page.
            let known = |pages: &Pages| pages.0.range(first..last).map(|(&page, _)| page).collect::<Vec<_>>();
            self.dirty.extend(known(&self.live));
            self.dirty.extend(known(&self.durable));
        }
    }

    pub(super) fn sync(&mut self) {
        for page in std::mem::take(&mut self.dirty) {
            match self.live.0.get(&page) {
                Some(bytes) => self.durable.0.insert(page, Arc::clone(bytes)),
                None => self.durable.0.remove(&page),
            };
        }
        self.durable_len = self.live_len;
        self.changes.clear();
    }

    /// Some pages become durable, the others are forgotten: no later sync writes them.
    pub(super) fn sync_failed(&mut self, rng: &mut SimRng) {
        for page in std::mem::take(&mut self.dirty) {
            if rng.chance(1, 2) {
                match self.live.0.get(&page) {
                    Some(bytes) => self.durable.0.insert(page, Arc::clone(bytes)),
                    None => self.durable.0.remove(&page),
                };
            }
        }
        if rng.chance(1, 2) {
            self.durable_len = self.live_len;
        }
        self.durable.cut(self.durable_len);
        self.changes.clear();
    }

    /// What a restart finds becomes both live and durable.
    pub(super) fn crash(&mut self, rng: &mut SimRng) {
        let fate = match rng.below(6) {
            0 => Fate::Lost,
            1 => Fate::Kept,
            2 | 3 => Fate::PerChange,
            _ => Fate::PerSector,
        };
        let mut after = Self { live: self.durable.clone(), live_len: self.durable_len, ..Self::default() };
        for change in std::mem::take(&mut self.changes) {
            after.survive(change, &fate, rng);
        }
        after.durable = after.live.clone();
        after.durable_len = after.live_len;
        after.changes.clear();
        after.dirty.clear();
        *self = after;
    }

    fn survive(&mut self, change: Change, fate: &Fate, rng: &mut SimRng) {
        let whole = match fate {
            Fate::Lost => false,
            Fate::Kept => true,
            Fate::PerChange | Fate::PerSector => rng.chance(1, 2),
        };
        match change {
            Change::Write { offset, bytes } if matches!(fate, Fate::PerSector) => {
                self.write_some(offset, &bytes, rng);
                // The length arrived without the data.
                if rng.chance(1, 4) {
                    self.live_len = self.live_len.max(offset + bytes.len() as u64);
                }
            }
            Change::Write { offset, bytes } if whole => self.write(offset, &bytes),
            Change::Zero { offset, len } if whole => self.zero(offset, len),
            Change::Length(len) if whole => self.set_len(len),
            Change::Write { .. } | Change::Zero { .. } | Change::Length(_) => {}
        }
    }

    /// Flips a bit of what is there, live and durable: a medium that rots.
    pub(super) fn flip(&mut self, offset: u64, mask: u8) {
        for pages in [&mut self.live, &mut self.durable] {
            let mut byte = [0];
            pages.read(offset, &mut byte);
            pages.write(offset, &[byte[0] ^ mask]);
        }
    }

    /// Start of the first allocated page at or after `offset`.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        if offset >= self.live_len {
            return None;
        }
        let (&page, _) = self.live.0.range(offset / PAGE_U64..).next()?;
        let start = (page * PAGE_U64).max(offset);
        if start < self.live_len { Some(start) } else { None }
    }

    /// Start of the first unallocated page at or after `offset`; the end counts as one.
    pub(super) fn next_hole(&self, offset: u64) -> u64 {
        let mut page = offset / PAGE_U64;
        while self.live.0.contains_key(&page) {
            page += 1;
        }
        (page * PAGE_U64).min(self.live_len).max(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 40_000;

    /// Goal: the live side equals a byte vector, the durable side the vector at the last sync, and after a crash every sector
    /// is one of the versions that it had since that sync. Method: random changes, many seeds.
    #[test]
    fn matches_a_byte_vector_and_crashes_into_versions() {
        for seed in 0..100 {
            let mut rng = SimRng::new(seed);
            let mut image = Image::with_len(LEN as u64);
            let mut model = vec![0u8; LEN];
            let mut synced = model.clone();
            let mut versions = vec![model.clone()];
            for _ in 0..rng.below(60) {
                let offset = rng.index(LEN / 2);
                let len = rng.index(LEN / 4);
                match rng.below(8) {
                    0..=4 => {
                        let mut bytes = vec![0; len];
                        rng.fill(&mut bytes);
                        image.write(offset as u64, &bytes);
                        model[offset..offset + len].copy_from_slice(&bytes);
                    }
                    5 | 6 => {
                        image.zero(offset as u64, len as u64);
                        model[offset..offset + len].fill(0);
                    }
                    _ => {
                        image.sync();
                        synced.clone_from(&model);
                        versions.clear();
                    }
                }
                versions.push(model.clone());
                let mut got = vec![0; LEN];
                assert!(image.read(0, &mut got) && got == model, "live, seed {seed}");
                image.read_durable(0, &mut got);
                assert!(got == synced, "durable, seed {seed}");
            }
            let mut copy = image.clone();
            image.crash(&mut rng.clone());
            copy.crash(&mut rng);
            let mut after = vec![0; LEN];
            let mut again = vec![0; LEN];
            assert!(image.read(0, &mut after) && copy.read(0, &mut again));
            assert!(after == again, "the same seed gives the same crash, seed {seed}");
            for start in (0..LEN).step_by(SECTOR) {
                let sector = start..(start + SECTOR).min(LEN);
                assert!(
                    sector_is_possible(&after[sector.clone()], &versions, sector),
                    "sector at {start}, seed {seed}"
                );
            }
        }
    }

    /// Changes of parts of a sector can be kept without an earlier one, so each byte is judged for itself.
    fn sector_is_possible(found: &[u8], versions: &[Vec<u8>], range: std::ops::Range<usize>) -> bool {
        found.iter().zip(range).all(|(byte, at)| versions.iter().any(|version| version[at] == *byte))
    }

    #[test]
    fn every_fate_occurs() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let mut image = Image::with_len(8192);
            image.write(0, &[1; 8192]);
            image.crash(&mut SimRng::new(seed));
            let mut got = [0; 8192];
            assert!(image.read(0, &mut got));
            match got.iter().filter(|&&byte| byte == 1).count() {
                0 => lost += 1,
                8192 => kept += 1,
                some => {
                    assert_eq!(some % SECTOR, 0);
                    torn += 1;
                }
            }
        }
        assert!(lost > 20 && kept > 20 && torn > 20, "lost {lost}, kept {kept}, torn {torn}");
    }

    #[test]
    fn lengths_cut_grow_and_come_back() {
        let mut image = Image::default();
        image.write(0, &[7; 5000]);
        image.sync();
        image.set_len(100);
        image.set_len(5000);
        let mut got = [9; 5000];
        assert!(image.read(0, &mut got));
        assert!(got[..100] == [7; 100] && got[100..].iter().all(|&byte| byte == 0), "grown with zeroes");
        assert!(!image.read(1, &mut got), "past the end");
        let lengths: BTreeSet<u64> = (0..100)
            .map(|seed| {
                let mut copy = image.clone();
                copy.crash(&mut SimRng::new(seed));
                copy.len()
            })
            .collect();
        assert_eq!(lengths.into_iter().collect::<Vec<_>>(), [100, 5000]);
    }

    #[test]
    fn a_failed_sync_is_not_mended_by_a_second() {
        let outcomes: BTreeSet<u8> = (0..50)
            .map(|seed| {
                let mut rng = SimRng::new(seed);
                let mut image = Image::with_len(4096);
                image.write(0, &[1; 4096]);
                image.sync_failed(&mut rng);
                image.sync();
                image.crash(&mut rng);
                let mut byte = [0];
                assert!(image.read(0, &mut byte));
                byte[0]
            })
            .collect();
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn huge_holes_cost_nothing() {
        let mut image = Image::with_len(1 << 50);
        image.write((1 << 50) - 512, &[1; 512]);
        image.zero(0, 1 << 50);
        assert_eq!((image.allocated(), image.next_data(0), image.next_hole(0)), (0, None, 0));
        image.write(1 << 40, &[1; 512]);
        image.sync();
        image.zero(0, 1 << 49);
        image.sync();
        let mut got = [9; 512];
        image.read_durable(1 << 40, &mut got);
        assert_eq!(got, [0; 512]);
        image.write(8192, &[1; 1]);
        assert_eq!((image.next_data(100), image.next_hole(8200)), (Some(8192), 12_288));
    }
}
