//! Finding what is missing.

use std::ops::Range;

use farshore_proto::SLOT_BYTES;
use farshore_uring::Extent;

use super::slot::Job;
use super::{RESCAN, SyncVolume, Syncer};

/// Most slots watched at one time for reading: the watch begins with the run, so a longer one is torn more often.
const DATA_RUN: u64 = 64;
/// Most slots of one record of zeroes: 64 MiB.
pub(super) const ZERO_RUN: u64 = 1024;

impl Syncer {
    /// Looks for the next run of missing slots and makes jobs of it. `false`: there is none now.
    pub(super) fn find_run(&mut self) -> bool {
        if !self.look && self.now < self.next_look {
            return false;
        }
        // What keeps the group from making points comes first: all of what points include. A volume that they do not include yet waits,
        // and nothing waits for it. Among equals in turn, so that a large one does not keep a small one from joining.
        let mut order: Vec<(bool, u16)> = self
            .volumes
            .range(self.turn..)
            .chain(self.volumes.range(..self.turn))
            .map(|(index, volume)| (!volume.volume.joined(), *index))
            .collect();
        order.sort_by_key(|(later, _)| *later);
        for (_, index) in order {
            let volume = self.volumes.get_mut(&index).expect("listed above");
            let Some(first) = volume.next_missing() else { continue };
            self.turn = index.wrapping_add(1);
            self.examine(index, first);
            return true;
        }
        self.look = false;
        self.next_look = self.now.plus(RESCAN);
        false
    }

    /// Begins to watch the slots from `first` on, and decides what is to be done with each.
    fn examine(&mut self, index: u16, first: u64) {
        let brief = self.brief_op();
        let volume = self.volumes.get_mut(&index).expect("the caller has it");
        let zeroes = volume.zero_slots(first, ZERO_RUN).iter().take_while(|zero| **zero).count() as u64;
        let most = if zeroes > 0 { zeroes } else { DATA_RUN };
        let wanted = volume.missing_run(first, most);
        let watched = [wanted, 1].into_iter().find(|&count| volume.watch(brief, first, count));
        let Some(count) = watched else {
            // A write is in flight to it: the slot's own job deals with that.
            volume.take(first, 1);
            volume.cursor = first + 1;
            let probe = volume.asks() && volume.answers.asks(first);
            self.jobs.push_back(Job::Read { volume: index, slot: first, probe, tries: 1, watched: false });
            return;
        };
        volume.take(first, count);
        volume.cursor = first + count;
        let (probe, answers) = (volume.asks(), volume.answers);
        // Asked (again) only now that the slots are watched: what is zero now and is not touched later, is zero then.
        let mut at = first;
        for run in volume.zero_slots(first, count).chunk_by(|a, b| a == b) {
            let count = run.len() as u64;
            if run[0] {
                self.jobs.push_back(Job::Zero { volume: index, first: at, count, probe, tries: 0 });
            } else {
                let read = |slot| {
                    let probe = probe && answers.asks(slot);
                    Job::Read { volume: index, slot, probe, tries: 0, watched: true }
                };
                self.jobs.extend((at..at + count).map(read));
            }
            at += count;
        }
    }

    /// The request number of the brief locks.
    pub(super) fn brief_op(&self) -> u16 {
        u16::try_from(self.tasks.len()).expect("the window is at most 256")
    }
}

impl SyncVolume {
    /// Whether there is anything at the target to compare with. Once the volume has joined, there is.
    fn asks(&self) -> bool {
        !self.fresh || self.volume.joined()
    }

    /// The next missing slot that nobody deals with, going round.
    fn next_missing(&mut self) -> Option<u64> {
        let found = self.missing_in(self.cursor..u64::MAX).or_else(|| self.missing_in(0..self.cursor));
        self.clean = found.is_none() && self.busy.is_empty() && self.volume.missing.next_set(0).is_none();
        found
    }

    fn missing_in(&self, range: Range<u64>) -> Option<u64> {
        let mut from = range.start;
        loop {
            let slot = self.volume.missing.next_set(from).filter(|slot| *slot < range.end)?;
            match self.busy.range(..=slot).next_back() {
                Some((_, end)) if *end > slot => from = *end,
                Some(_) | None => return Some(slot),
            }
        }
    }

    /// How many slots from `first` on are missing and free, up to `most`.
    fn missing_run(&self, first: u64, most: u64) -> u64 {
        let busy = self.busy.range(first..).next().map_or(u64::MAX, |(start, _)| *start);
        let end = (first + most).min(self.volume.slots()).min(busy);
        (first..end).take_while(|slot| self.volume.missing.test(*slot)).count() as u64
    }

    /// Begins to watch, if no write is in flight there.
    pub(super) fn watch(&self, op: u16, first: u64, count: u64) -> bool {
        let range = self.volume.bytes_of(first, count);
        self.with_brief_lock(op, range, |volume| volume.volume.touched.clear(first..first + count)).is_some()
    }

    /// Of each of `count` slots from `first` on (as far as the volume goes), whether the backing file says that it is zero.
    pub(super) fn zero_slots(&self, first: u64, count: u64) -> Vec<bool> {
        let range = self.volume.bytes_of(first, count);
        let mut zero =
            vec![false; usize::try_from((range.end - range.start).div_ceil(SLOT_BYTES)).expect("a short run")];
        // A file that cannot tell has no holes.
        let extents = (self.extents)(range.start, range.end - range.start).unwrap_or_default();
        // Bytes of zeroes that end at `at`.
        let (mut at, mut zeroes) = (range.start, 0);
        for Extent { len, zero: is_zero, .. } in extents {
            at = at.saturating_add(len).min(range.end);
            zeroes = if is_zero { zeroes + len } else { 0 };
            // All slots that end by now and lie in those bytes.
            let from = at.saturating_sub(zeroes).max(range.start).div_ceil(SLOT_BYTES);
            let to = if at == range.end { range.end.div_ceil(SLOT_BYTES) } else { at / SLOT_BYTES };
            for slot in from..to {
                zero[usize::try_from(slot - first).expect("a short run")] = true;
            }
        }
        zero
    }
}
