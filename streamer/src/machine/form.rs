//! From the ring to bytes: gives work out, takes it back, and links the chain.

use farshore_proto::batch::{Annotations, BatchPlace, CutFlags};
use farshore_proto::{GroupId, HostId, Now};

use crate::coalesce::RecordSet;
use crate::drain::RawBatch;
use crate::seal::SealedBatch;
use crate::source::RingSource;
use crate::work::{Done, DoneResult, SealOrder, Work, WorkId};

use super::window::{Slot, Stage};
use super::{Mode, Streamer};

/// Entries taken from the ring at a time, so that one call stays short; the next call goes on.
const PULL_ENTRIES: usize = 1 << 14;
/// Record sets whose memory is kept for the next batches.
const SPARE_SETS: usize = 8;

impl<S: RingSource> Streamer<S> {
    /// Entries are taken as they come; `false` while a new incarnation is awaited.
    #[must_use]
    pub fn takes_entries(&self) -> bool {
        self.mode != Mode::StartingOver
    }

    /// Takes what was published in the ring. True: there may be more.
    pub fn pull(&mut self, now: Now) -> bool {
        if !self.takes_entries() {
            return false;
        }
        match self.drain.pull(&mut self.source, PULL_ENTRIES) {
            Ok(taken) => taken == PULL_ENTRIES,
            Err(error) => {
                self.demand_start_over(self.state.incarnation, format!("the capture ring cannot be read: {error}"));
                self.tick(now);
                false
            }
        }
    }

    /// The next piece of work for the pool, whose result comes back by [`Self::handle_done`]. Call [`Self::pull`] before.
    #[must_use]
    pub fn poll_work(&mut self, now: Now) -> Option<Work<S::Payload>> {
        // One more than there are workers, so that none waits for this thread.
        if !(self.mode == Mode::Live || self.backlog.takes_batches()) || self.running > self.config.workers as usize {
            return None;
        }
        let work = self.seal_next().or_else(|| self.list_next(now));
        self.running += usize::from(work.is_some());
        work
    }

    /// A piece of work is done.
    pub fn handle_done(&mut self, now: Now, done: Done<S::Payload>) {
        self.running -= 1;
        self.level.handle_work(done.busy, done.starved);
        if done.id.epoch == self.epoch {
            self.take_done(now, done);
        } else {
            self.recycle(*done.raw, done.set);
        }
        self.tick(now);
    }

    fn take_done(&mut self, now: Now, done: Done<S::Payload>) {
        let number = farshore_proto::BatchNo(done.id.number);
        match done.result {
            DoneResult::Listed => {
                let slot =
                    self.slot_mut(number).expect("a batch whose chain hash is unknown stays while its epoch does");
                slot.stage = Stage::Listed(done.raw, done.set);
                self.link_chain(now);
            }
            DoneResult::Sealed { batch, session } => {
                self.recycle(*done.raw, done.set);
                self.take_sealed(number, batch, session);
            }
            DoneResult::Failed(error) => {
                self.recycle(*done.raw, done.set);
                let reason = format!("batch {number} cannot be formed: {error}");
                self.demand_start_over(self.state.incarnation, reason);
            }
        }
    }

    fn take_sealed(&mut self, number: farshore_proto::BatchNo, batch: SealedBatch, session: u64) {
        if batch.has_references && session != self.greeting {
            // The lease was another session's.
            self.reset();
            return;
        }
        self.counters.sealed_bytes += batch.len;
        self.counters.plain_bytes += batch.plain_bytes;
        self.counters.frame_bytes += batch.frame_bytes;
        self.counters.deduplicated_bytes += batch.deduplicated_bytes;
        // Not there any more: the target's greeting said that it has it.
        if let Some(slot) = self.slot_mut(number) {
            slot.stage = if slot.verify_only { Stage::Verified } else { Stage::Ready(batch) };
        }
    }

    /// The first batch that is listed and linked and has no worker.
    fn seal_next(&mut self) -> Option<Work<S::Payload>> {
        let index = self
            .slots
            .iter()
            .position(|slot| matches!(slot.stage, Stage::Listed(..)) && slot.chain.is_some() && !slot.verify_only)?;
        let previous = match index.checked_sub(1) {
            Some(before) => self.slots[before].chain.expect("linked before its successor"),
            None => self.base().chain,
        };
        let annotations = Annotations {
            bookmark: self.slots[index].bookmark.clone(),
            volumes: if self.volumes_said { Vec::new() } else { self.config.volumes.clone() },
        };
        self.volumes_said = true;
        let place = self.place(&self.slots[index]);
        let fresh = (self.entropy)();
        let level = self.level.level();
        let slot = &mut self.slots[index];
        let Stage::Listed(raw, set) = std::mem::replace(&mut slot.stage, Stage::Sealing) else {
            unreachable!("looked for above")
        };
        let order = SealOrder {
            place,
            cut: CutFlags { recoverable: slot.recoverable, app_consistent: slot.app_consistent },
            previous,
            chain: slot.chain.expect("looked for above"),
            fresh,
            annotations,
            lease: self.lease.clone().filter(|_| !self.backlog.wants_whole_batches()),
            session: self.greeting,
            level,
            log: self.config.log.as_ref().and_then(|log| (log.now)().known()),
        };
        let id = WorkId { epoch: self.epoch, number: slot.number.0 };
        Some(Work::Seal { id, raw, set, order: Box::new(order) })
    }

    /// The next batch from the ring, if the window has room for it.
    fn list_next(&mut self, now: Now) -> Option<Work<S::Payload>> {
        let number = self.next_number();
        let verify_only = self.catch_up.is_some_and(|catch_up| number <= catch_up.number);
        // While catching up, batches behind the target's tail wait: whether they follow it is not known yet.
        let held = self.paused.is_some() && !self.backlog.takes_batches();
        if !verify_only && (self.catch_up.is_some() || held || !self.window_has_room()) {
            return None;
        }
        let raw = self.drain.pop()?;
        self.slots.push_back(Slot {
            number,
            first: raw.first,
            end: raw.end,
            time: raw.time,
            recoverable: raw.ends_at_cut && raw.after.recoverable(),
            app_consistent: raw.app_consistent,
            bookmark: raw.bookmark.clone(),
            after: raw.after,
            payload_bytes: raw.payload_bytes,
            written_bytes: raw.written_bytes,
            chain: None,
            verify_only,
            logged: None,
            stage: Stage::Listing,
        });
        self.meter.handle_busy(now, true);
        let id = WorkId { epoch: self.epoch, number: number.0 };
        let set = self.spare_sets.pop().unwrap_or_default();
        Some(Work::List { id, raw: Box::new(raw), set, granularity: self.config.granularity })
    }

    /// Computes the chain hashes that can be computed now.
    fn link_chain(&mut self, now: Now) {
        let mut previous = self.base().chain;
        for index in 0..self.slots.len() {
            if let Some(chain) = self.slots[index].chain {
                previous = chain;
                continue;
            }
            let place = self.place(&self.slots[index]);
            let slot = &mut self.slots[index];
            let Stage::Listed(_, set) = &slot.stage else { break };
            previous = place.chain(&previous, &set.records);
            slot.chain = Some(previous);
            if slot.verify_only
                && let Stage::Listed(raw, set) = std::mem::replace(&mut slot.stage, Stage::Verified)
            {
                self.recycle(*raw, set);
            }
        }
        self.check_catch_up(now);
        self.check_held(now);
    }

    fn place(&self, slot: &Slot<S::Payload>) -> BatchPlace {
        let source = &self.config.session;
        BatchPlace {
            vault: source.vault,
            group: GroupId::derive(source.vault, &source.group),
            host: HostId::derive(source.vault, &source.host),
            generation: self.config.generation,
            incarnation: self.state.incarnation,
            number: slot.number,
            first: slot.first,
            end: slot.end,
            time: slot.time,
        }
    }

    fn recycle(&mut self, raw: RawBatch<S::Payload>, mut set: RecordSet) {
        self.drain.recycle(raw.entries);
        set.clear();
        if self.spare_sets.len() < SPARE_SETS {
            self.spare_sets.push(set);
        }
    }
}
