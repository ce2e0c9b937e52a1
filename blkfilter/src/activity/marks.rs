//! What differs, or may differ, of extents that are not active: a bit per slot, in pages of the log.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;

use farshore_uring::StorageFile;

use super::format::{self, BLOCK, PAGE_EXTENTS, Page, Read};
use super::{Extent, VolumeKey};

/// Most pages: extents of 16 TiB in all. 64 MiB of memory and as much of the log at the worst.
pub(super) const PAGES_MAX: usize = 8192;

/// Pages that are looked at in one go: 16,128 extents, some milliseconds.
const TIDY_PAGES: usize = 32;

/// The pages, in memory and on disk.
///
/// Each page has a pair of blocks and is written to that of the pair that does not hold it, so a write that is cut off spoils nothing.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pages: BTreeMap<(VolumeKey, u32), Held>,
    /// Pages whose content on disk is older.
    changed: BTreeSet<(VolumeKey, u32)>,
    /// Pairs that no page has, with the sequence number from which on the next one counts.
    free: Vec<(u64, u64)>,
    /// Extents with a mark.
    count: u64,
    pairs: u64,
    /// Where the last look at all pages was broken off.
    tidied: Option<(VolumeKey, u32)>,
}

#[derive(Debug)]
struct Held {
    page: Page,
    pair: u64,
    /// Of each extent: its mark is needed at least until all ring positions below are durable at the target.
    until: Box<[u64; PAGE_EXTENTS]>,
}

/// The page of an extent, and its place there.
fn place(extent: Extent) -> ((VolumeKey, u32), usize) {
    let extents = u32::try_from(PAGE_EXTENTS).expect("504");
    let at = usize::try_from(extent.number % extents).expect("below 504");
    ((extent.volume, extent.number / extents), at)
}

impl Marks {
    /// Makes room for a new log: what lies where its pages will be must not look like damage of it.
    pub(super) fn clear(file: &impl StorageFile, id: &[u8; 16]) -> io::Result<()> {
        for block in 0..blocks(file)? {
            let (mut bytes, at) = ([0; BLOCK], block_at(0, block));
            file.read_at(&mut bytes, at)?;
            if Page::decode(&bytes, id) == Read::Damaged {
                file.write_at(&[0; BLOCK], at)?;
            }
        }
        Ok(())
    }

    /// Reads the pages of the log `id`. `None`: one of them is damaged.
    pub(super) fn read(file: &impl StorageFile, id: &[u8; 16]) -> io::Result<Option<Self>> {
        let blocks = blocks(file)?;
        let mut marks = Self { pairs: blocks / 2, ..Self::default() };
        for pair in 0..blocks / 2 {
            let mut newest: Option<Page> = None;
            for half in 0..2 {
                let mut block = [0; BLOCK];
                file.read_at(&mut block, block_at(pair, half))?;
                match Page::decode(&block, id) {
                    Read::Empty => {}
                    Read::Damaged => return Ok(None),
                    Read::Whole(page) => {
                        if newest.as_ref().is_none_or(|newest| newest.sequence < page.sequence) {
                            newest = Some(page);
                        }
                    }
                }
            }
            match newest {
                None => marks.free.push((pair, 0)),
                Some(page) => marks.take_in(page, pair),
            }
        }
        marks.recount();
        Ok(Some(marks))
    }

    fn recount(&mut self) {
        self.count = self.iter().count() as u64;
    }

    fn take_in(&mut self, page: Page, pair: u64) {
        match self.pages.entry((page.volume, page.number)) {
            Entry::Vacant(entry) => _ = entry.insert(Held { page, pair, until: Box::new([0; PAGE_EXTENTS]) }),
            // One of them is left over from before the volume was given up once, and nothing tells which.
            Entry::Occupied(mut entry) => {
                let held = entry.get_mut();
                held.page.masks.iter_mut().zip(page.masks.iter()).for_each(|(mask, more)| *mask |= more);
                self.free.push((pair, page.sequence));
            }
        }
    }

    /// No mark of the volume is given up before `until` is durable: nothing is known of what earlier marks wait for.
    pub(super) fn keep_until(&mut self, volume: VolumeKey, until: u64) {
        for held in self.pages.range_mut((volume, 0)..=(volume, u32::MAX)).map(|(_, held)| held) {
            held.until.iter_mut().for_each(|known| *known = until.max(*known));
        }
    }

    /// The extents that have a mark.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Extent, u64)> {
        self.pages.values().flat_map(|held| {
            let first = u64::from(held.page.number) * PAGE_EXTENTS as u64;
            let volume = held.page.volume;
            held.page.masks.iter().zip(first..).filter(|(mask, _)| **mask != 0).map(move |(mask, number)| {
                let number = u32::try_from(number).expect("pages lie inside of volumes");
                (Extent { volume, number }, *mask)
            })
        })
    }

    /// Extents that have a mark.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The slots of `extent` are marked by `mask`, which replaces what was there; needed until `until` is durable.
    ///
    /// # Errors
    /// `StorageFull`: too many pages. What was there stays.
    pub(super) fn set(&mut self, extent: Extent, mask: u64, until: u64) -> io::Result<()> {
        let (key, at) = place(extent);
        let held = match self.pages.get_mut(&key) {
            Some(held) => held,
            None if mask == 0 => return Ok(()),
            None => {
                let (pair, sequence) = self.take_pair()?;
                let page = Page { volume: key.0, number: key.1, sequence, masks: Box::new([0; PAGE_EXTENTS]) };
                self.pages.entry(key).or_insert(Held { page, pair, until: Box::new([0; PAGE_EXTENTS]) })
            }
        };
        held.until[at] = until;
        let before = std::mem::replace(&mut held.page.masks[at], mask);
        if before != mask {
            self.count = self.count + u64::from(mask != 0) - u64::from(before != 0);
            self.changed.insert(key);
        }
        Ok(())
    }

    /// Adds slots to a mark.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub(super) fn add(&mut self, extent: Extent, mask: u64) -> io::Result<()> {
        let (before, until) = self.get(extent);
        self.set(extent, before | mask, until)
    }

    /// An extent's mark, and until when it is needed.
    pub(super) fn get(&self, extent: Extent) -> (u64, u64) {
        let (key, at) = place(extent);
        self.pages.get(&key).map_or((0, 0), |held| (held.page.masks[at], held.until[at]))
    }

    fn take_pair(&mut self) -> io::Result<(u64, u64)> {
        if let Some(free) = self.free.pop() {
            return Ok(free);
        }
        if self.pairs >= PAGES_MAX as u64 {
            let text = format!("activity log: more than {PAGES_MAX} pages of marks");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        self.pairs += 1;
        Ok((self.pairs - 1, 0))
    }

    /// Looks at marked extents again, from where the last look ended. `now` gives the mark that an extent needs now, if nothing but what is
    /// known now is needed; it gets until when the old one is. `true`: there are more.
    pub(super) fn tidy(&mut self, mut now: impl FnMut(Extent, u64) -> Option<u64>) -> bool {
        let from = self.tidied.take();
        let start = from.map_or(Bound::Unbounded, Bound::Excluded);
        let mut found = Vec::new();
        for ((volume, number), held) in self.pages.range((start, Bound::Unbounded)).take(TIDY_PAGES) {
            self.tidied = Some((*volume, *number));
            let first = number * u32::try_from(PAGE_EXTENTS).expect("504");
            for ((extent, mask), until) in (first..).zip(held.page.masks.iter()).zip(held.until.iter()) {
                let extent = Extent { volume: *volume, number: extent };
                if *mask != 0
                    && let Some(needed) = now(extent, *until).filter(|needed| needed != mask)
                {
                    found.push((extent, needed));
                }
            }
        }
        for (extent, mask) in found {
            // The page is there.
            let _ = self.set(extent, mask, 0);
        }
        let next = self.tidied.map_or(Bound::Unbounded, Bound::Excluded);
        if self.pages.range((next, Bound::Unbounded)).next().is_none() {
            self.tidied = None;
        }
        self.tidied.is_some()
    }

    /// Forgets the volumes that `known` does not know.
    pub(super) fn retain(&mut self, known: impl Fn(VolumeKey) -> bool) {
        let free = &mut self.free;
        self.pages.retain(|(volume, _), held| {
            let keep = known(*volume);
            if !keep {
                free.push((held.pair, held.page.sequence));
            }
            keep
        });
        self.changed.retain(|(volume, _)| known(*volume));
        self.recount();
    }

    /// Every page is written by the next [`Self::write`].
    pub(super) fn change_all(&mut self) {
        self.changed.extend(self.pages.keys().copied());
    }

    /// Something is to be written.
    pub(super) fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Writes what has changed; durable after the caller's sync.
    ///
    /// # Errors
    /// The file's. What was not written stays changed.
    pub(super) fn write(&mut self, file: &impl StorageFile, id: &[u8; 16]) -> io::Result<()> {
        while let Some(key) = self.changed.first().copied() {
            if let Some(held) = self.pages.get_mut(&key) {
                held.page.sequence += 1;
                file.write_at(&held.page.encode(id), block_at(held.pair, held.page.sequence % 2))?;
            }
            self.changed.remove(&key);
        }
        Ok(())
    }
}

/// Blocks that there are for pages.
fn blocks(file: &impl StorageFile) -> io::Result<u64> {
    Ok((file.len()? / BLOCK as u64).saturating_sub(format::FIRST_PAGE as u64).min(2 * PAGES_MAX as u64))
}

fn block_at(pair: u64, half: u64) -> u64 {
    (format::FIRST_PAGE as u64 + 2 * pair + half) * BLOCK as u64
}
