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
        let held = self.mode != Mode::Live || self.paused.is_some() || self.catch_up.is_some();
        if held || self.link_full || self.dropping {
            return None;
        }
        let index = self.slots.iter().position(|slot| !slot.is_sent())?;
        if !self.slots[index].is_ready() || !self.bucket.is_open(now) {
            return None;
        }
        if !self.state.sent {
            // Before the first byte: from here on the target may hold a batch of this incarnation.
            self.state.sent = true;
            self.source.store_state(&self.state);
        }
        let slot = &mut self.slots[index];
        let Stage::Ready(batch) = &slot.stage else { unreachable!("looked for above") };
        let batch = batch.clone();
        let number = slot.number;
        slot.stage = Stage::Sent(batch.clone());
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
        if incarnation != self.state.incarnation {
            return Err(format!(
                "batch {number} of incarnation {incarnation} acknowledged, ours is {}",
                self.state.incarnation
            ));
        }
        match self.slot_mut(number) {
            // Sent in this session or, where the target was still journaling when the last one ended, in that.
            Some(slot) if slot.chain == Some(*chain) => {}
            Some(slot) if slot.chain.is_some() => {
                return Err(format!("batch {number} acknowledged with chain hash {chain}, ours differs"));
            }
            Some(_) | None => return Err(format!("batch {number} acknowledged, which was not sent")),
        }
        self.refusals = 0;
        self.make_durable(now, number, Some(received));
        Ok(())
    }

    /// Everything up to batch `number`, which is in the window and linked, is durable.
    pub(super) fn make_durable(&mut self, now: Now, number: BatchNo, received: Option<WallTime>) {
        let mut events = Vec::new();
        while self.slots.front().is_some_and(|slot| slot.number <= number) {
            let slot = self.slots.pop_front().expect("looked at just now");
            if let Stage::Sent(batch) | Stage::Ready(batch) = &slot.stage {
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
        self.state.sent = true;
        self.state.acknowledged = true;
        // The state first, then the ring: see `StreamState`.
        self.source.store_state(&self.state);
        self.source.free_to(self.state.position);
        self.events.extend(events);
        self.release_answers();
        self.meter.handle_busy(now, !self.slots.is_empty());
    }

    /// Answers count only once their batch is durable: were the target set back to before it, it would have to answer again.
    pub(super) fn hold_answers(&mut self, answers: Answers) {
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
