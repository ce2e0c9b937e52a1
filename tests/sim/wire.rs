//! One session of the link, in memory: control messages in order and late, batches in any order, everything lost at its end. With
//! trouble, it loses, doubles and corrupts (as a broken transport would), and carries nothing for a while.

use std::collections::VecDeque;

use farshore_uring::sim::SimRng;

use crate::faults::{Coverage, Fault};

/// Batches under way at a time; more, and the link says that it is full.
const BATCHES_MAX: usize = 6;

type Late = (u64, Vec<u8>);

/// What the link does wrong. Chances in a thousand messages.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct LinkTrouble {
    pub(crate) lose: u64,
    pub(crate) double: u64,
    pub(crate) corrupt: u64,
}

#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) session: u64,
    /// Longest delay of a message, steps.
    delay: u64,
    to_target: VecDeque<Late>,
    to_source: VecDeque<Late>,
    batches: Vec<(u64, Vec<u8>, u64)>,
    /// The source has not heard of the end.
    pub(crate) source_up: bool,
    /// The end, which the source hears of behind the messages that are on their way.
    pub(crate) closing: Option<String>,
    /// When the target hears of the end; until then it may still get what was on its way.
    pub(crate) target_down: Option<u64>,
    /// Nothing arrives before this step.
    pub(crate) stalled_until: u64,
    /// It breaks by itself then: a transport that lost something for good.
    pub(crate) breaks_at: Option<u64>,
    order: u64,
    delivered: u64,
}

/// What arrives at the target.
pub(crate) enum Arrival {
    Control(Vec<u8>),
    Batch(Vec<u8>),
}

impl Wire {
    pub(crate) fn new(session: u64, rng: &mut SimRng) -> Self {
        Self {
            session,
            delay: 1 + rng.below(30),
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            batches: Vec::new(),
            source_up: true,
            closing: None,
            target_down: None,
            stalled_until: 0,
            breaks_at: None,
            order: 0,
            delivered: 0,
        }
    }

    fn due(&self, step: u64, rng: &mut SimRng, queue: &VecDeque<Late>) -> u64 {
        let last = queue.back().map_or(0, |(due, _)| *due);
        last.max(step + rng.below(self.delay))
    }

    pub(crate) fn control_to_target(&mut self, step: u64, rng: &mut SimRng, bytes: Vec<u8>) {
        let due = self.due(step, rng, &self.to_target);
        self.to_target.push_back((due, bytes));
    }

    pub(crate) fn control_to_source(&mut self, step: u64, rng: &mut SimRng, bytes: Vec<u8>) {
        if self.source_up && self.closing.is_none() {
            let due = self.due(step, rng, &self.to_source);
            self.to_source.push_back((due, bytes));
        }
    }

    pub(crate) fn batch_fits(&self) -> bool {
        self.batches.len() < BATCHES_MAX
    }

    pub(crate) fn send_batch(
        &mut self,
        step: u64,
        rng: &mut SimRng,
        mut bytes: Vec<u8>,
        (trouble, coverage): (LinkTrouble, &Coverage),
    ) {
        self.order += 1;
        let due = |rng: &mut SimRng, delay| step + rng.below(delay);
        if rng.chance(trouble.lose, 1000) {
            coverage.hit(Fault::BatchLost);
            self.breaks_at.get_or_insert(step + 1 + rng.below(300));
            return;
        }
        if rng.chance(trouble.double, 1000) {
            coverage.hit(Fault::BatchDoubled);
            self.batches.push((due(rng, self.delay * 3), bytes.clone(), self.order));
        }
        if rng.chance(trouble.corrupt, 1000) {
            coverage.hit(Fault::BatchCorrupt);
            corrupt(rng, &mut bytes);
        }
        self.batches.push((due(rng, self.delay), bytes, self.order));
    }

    /// The next thing that reaches the target by now, any of those that may.
    pub(crate) fn at_target(&mut self, step: u64, rng: &mut SimRng, coverage: &Coverage) -> Option<Arrival> {
        if step < self.stalled_until {
            return None;
        }
        let due: Vec<usize> = (0..self.batches.len()).filter(|index| self.batches[*index].0 <= step).collect();
        let control = self.to_target.front().is_some_and(|(at, _)| *at <= step);
        if control && (due.is_empty() || rng.chance(1, 2)) {
            return self.to_target.pop_front().map(|(_, bytes)| Arrival::Control(bytes));
        }
        if due.is_empty() {
            return None;
        }
        let (_, bytes, order) = self.batches.swap_remove(due[rng.index(due.len())]);
        if order < self.delivered {
            coverage.hit(Fault::BatchOvertaken);
        }
        self.delivered = self.delivered.max(order);
        Some(Arrival::Batch(bytes))
    }

    /// The next message that reaches the source by now.
    pub(crate) fn at_source(&mut self, step: u64) -> Option<Vec<u8>> {
        if step < self.stalled_until {
            return None;
        }
        self.to_source.pop_front_if(|(due, _)| *due <= step).map(|(_, bytes)| bytes)
    }

    /// Nothing more comes to the source, and its end is decided.
    pub(crate) fn ends_at_source(&self) -> bool {
        self.source_up && self.closing.is_some() && self.to_source.is_empty()
    }

    /// The source knows that the connection is gone. Some of what it sent still arrives.
    pub(crate) fn cut_at_source(&mut self, step: u64, rng: &mut SimRng) {
        self.source_up = false;
        self.to_source.clear();
        self.to_target.truncate(rng.index(self.to_target.len() + 1));
        self.batches.truncate(rng.index(self.batches.len() + 1));
        self.target_down.get_or_insert(step + rng.below(60));
    }

    /// Nothing that the target said arrives.
    pub(crate) fn hush(&mut self) {
        self.to_source.clear();
    }

    /// The target's machine died: of what it said some still arrives, then the source hears of it.
    pub(crate) fn cut_at_target(&mut self, rng: &mut SimRng) {
        self.to_target.clear();
        self.batches.clear();
        self.to_source.truncate(rng.index(self.to_source.len() + 1));
        self.closing = Some("the target's machine died".into());
    }
}

/// Flips a bit, or cuts it short.
pub(crate) fn corrupt(rng: &mut SimRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.index(bytes.len());
    if rng.chance(1, 4) {
        bytes.truncate(at);
    } else {
        bytes[at] ^= 1 << rng.below(8);
    }
}
