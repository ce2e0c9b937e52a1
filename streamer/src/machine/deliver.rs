//! From bytes to the target's acknowledgement.

use farshore_proto::message::Answers;
use farshore_proto::{BatchNo, ChainHash, Incarnation, Now, PointId, WallTime};

use crate::source::RingSource;

use super::window::Stage;
use super::{DurableBatch, Mode, Outgoing, StreamEvent, Streamer};

/// Answers that wait for their batch to become durable. A target sends at most a few for each batch under way.
const ANSWERS_MAX: usize = 4096;

impl<S: RingSource> Streamer<S> {
    /// The next batch to send, in the order of numbers.
    #[must_use]
    pub fn poll_batch(&mut self, now: Now) -> Option<Outgoing> {
        let session = self.link?;
        if !self.is_sending() || self.link_full || !self.bucket.is_open(now) {
            return None;
        }
        let number = self.sent_to.max(self.state.number).next();
        let batch = match self.backlog.get(number) {
            Some(logged) if logged.incarnation == self.greeted => self.loaded(number)?.clone(),
            // Of another session.
            Some(_) => return None,
            None if self.greeted == self.state.incarnation => self.slot_mut(number)?.sealed()?.clone(),
            None => return None,
        };
        if !self.state.sent && self.greeted == self.state.incarnation {
            // Before the first byte: from here on the target may hold a batch of this incarnation.
            self.state.sent = true;
            self.source.store_state(&self.state);
        }
        self.sent_to = number;
        self.bucket.take(batch.len);
        Some(Outgoing { session, number, batch })
    }

    /// The target says that everything up to batch `number` is journaled. The message was authenticated; what it says must also
    /// be what we computed.
    pub(super) fn acknowledge(
        &mut self,
        now: Now,
        incarnation: Incarnation,
        number: BatchNo,
        chain: &ChainHash,
        received: WallTime,
    ) -> Result<(), String> {
        if number < self.state.number || (number == self.state.number && *chain == self.state.chain) {
            return Ok(());
        }
        if self.catch_up.is_some_and(|catch_up| number <= catch_up.number) {
            // Said again of what the greeting said: counts once the batches formed again prove to be the same.
            return Ok(());
        }
        let logged = self.backlog.get(number).map(|batch| (batch.incarnation, batch.chain));
        let own = logged.map_or(self.state.incarnation, |(incarnation, _)| incarnation);
        if incarnation != own {
            return Err(format!("batch {number} of incarnation {incarnation} acknowledged, ours is {own}"));
        }
        let known = logged.map(|(_, chain)| chain).or_else(|| self.slot_mut(number)?.chain);
        match known {
            // Sent in this session or, where the target was still journaling when the last one ended, in that.
            Some(own) if own == *chain => {}
            Some(_) => return Err(format!("batch {number} acknowledged with chain hash {chain}, ours differs")),
            None if number <= self.sent_to => {
                // Sent, and being formed again since: counts once it proves to be the same.
                self.held = Some((number, *chain, received));
                return Ok(());
            }
            None => return Err(format!("batch {number} acknowledged, which was not sent")),
        }
        self.refusals = 0;
        self.make_durable(now, number, Some(received));
        Ok(())
    }

    /// Whether an acknowledgement that was held is of the batch that was formed again.
    pub(super) fn check_held(&mut self, now: Now) {
        let Some((number, chain, received)) = self.held else { return };
        let Some(own) = self.slot_mut(number).and_then(|slot| slot.chain) else { return };
        self.held = None;
        if own == chain {
            self.make_durable(now, number, Some(received));
        } else {
            self.give_up_link(format!("batch {number} acknowledged with chain hash {chain}, ours differs"));
        }
    }

    /// Everything up to batch `number`, which is in the log or in the window and linked, is durable.
    pub(super) fn make_durable(&mut self, now: Now, number: BatchNo, received: Option<WallTime>) {
        let mut events = Vec::new();
        let mut own = false;
        while let Some(batch) = self.backlog.pop_up_to(number) {
            own = batch.incarnation == self.state.incarnation;
            if batch.number <= self.sent_to {
                self.counters.shipped_bytes += batch.payload_bytes;
                self.meter.handle_taken(batch.len);
            }
            self.counters.batches += 1;
            self.counters.written_bytes += batch.written_bytes;
            // Positions of an older ring mean nothing in this one, which begins behind all of them.
            self.state.position = if own { batch.end } else { self.state.position };
            self.state.number = batch.number;
            self.state.chain = batch.chain;
            self.state.flags = batch.after;
            if batch.recoverable {
                self.state.newest_point = self.state.newest_point.max(batch.time);
            }
            events.push(StreamEvent::Durable(DurableBatch {
                point: PointId {
                    generation: self.config.generation,
                    incarnation: batch.incarnation,
                    batch: batch.number,
                },
                end: self.state.position,
                time: batch.time,
                recoverable: batch.recoverable,
                app_consistent: batch.app_consistent,
                bookmark: batch.bookmark,
                received,
            }));
        }
        self.trim_log(number);
        while self.slots.front().is_some_and(|slot| slot.number <= number) {
            let slot = self.slots.pop_front().expect("looked at just now");
            own = true;
            if let Stage::Ready(batch) = &slot.stage {
                self.counters.shipped_bytes += slot.payload_bytes;
                self.meter.handle_taken(batch.len);
            }
            self.counters.batches += 1;
            self.counters.written_bytes += slot.written_bytes;
            self.state.position = slot.end;
            self.state.number = slot.number;
            self.state.chain = slot.chain.expect("linked before it was sent or verified");
            self.state.flags = slot.after;
            if slot.recoverable {
                self.state.newest_point = self.state.newest_point.max(slot.time);
            }
            events.push(StreamEvent::Durable(DurableBatch {
                point: PointId {
                    generation: self.config.generation,
                    incarnation: self.state.incarnation,
                    batch: slot.number,
                },
                end: slot.end,
                time: slot.time,
                recoverable: slot.recoverable,
                app_consistent: slot.app_consistent,
                bookmark: slot.bookmark,
                received,
            }));
        }
        self.sent_to = self.sent_to.max(number);
        self.state.sent |= own;
        self.state.acknowledged |= own;
        // The state first, then the ring: see `StreamState`.
        self.source.store_state(&self.state);
        if self.state.position > self.source.freed() {
            self.source.free_to(self.state.position);
        }
        self.events.extend(events);
        if self.mode == Mode::Live && self.greeted != self.stream_incarnation() {
            self.give_up_link("the target has all of an older incarnation: the next one is greeted for".into());
        }
        self.release_answers();
        self.meter.handle_busy(now, !self.slots.is_empty());
    }

    /// Answers count only once their batch is durable: were the target set back to before it, it would have to answer again.
    pub(super) fn hold_answers(&mut self, answers: Answers) {
        if self.greeted != self.state.incarnation {
            // To questions of an older ring, from the disk log: its positions mean other questions in this one, and whoever asked is gone.
            return;
        }
        if self.answers.len() >= ANSWERS_MAX {
            self.give_up_link("the target sends answers without acknowledging their batches".into());
            return;
        }
        self.answers.push_back(answers);
        self.release_answers();
    }

    fn release_answers(&mut self) {
        while self.answers.front().is_some_and(|answers| answers.number <= self.state.number) {
            let answers = self.answers.pop_front().expect("looked at just now");
            self.events.push_back(StreamEvent::Answers(answers));
        }
    }
}
