//! Where the stream goes on: at the start of the process, and after each greeting.

use std::time::Duration;

use farshore_proto::message::{RefuseCode, Tail, Welcome};
use farshore_proto::session::{Resume, SourceTail, resume};
use farshore_proto::{BatchNo, ChainHash, Incarnation, LogMark, Now, Position};

use crate::disk_log::LoggedBatch;
use crate::source::{RingSource, StreamFlags, StreamState};
use crate::{Error, Result, VolumeSet};

use super::backlog::{LogStart, bridge};
use super::config::StreamerConfig;
use super::window::Stage;
use super::{CatchUp, Mode, StreamEvent, Streamer};

/// First wait after a refusal; doubles.
const REFUSED_WAIT: Duration = Duration::from_secs(1);
/// Longest wait after a refusal. A person acts on minutes, and a greeting costs nothing.
const REFUSED_WAIT_MAX: Duration = Duration::from_secs(60);

/// The state from which a process goes on and what the disk log has behind it, with the ring freed up to that.
pub(super) fn state_at_start<S: RingSource>(
    config: &StreamerConfig,
    log: Option<&LogStart>,
    ring: &mut S,
) -> Result<(StreamState, Vec<LoggedBatch>)> {
    config.check()?;
    ring.rewind();
    let logged = log.map_or_else(Vec::new, |log| log.batches.clone());
    let stored = ring.load_state();
    let state = match stored.filter(|state| state.incarnation == config.incarnation) {
        Some(state) => state,
        None => {
            let mut state = first_state(config, ring, stored)?;
            if stored.is_none() {
                begin_behind(&mut state, &logged);
            }
            ring.store_state(&state);
            state
        }
    };
    let (freed, head) = (ring.freed(), ring.head());
    let outside = || Error::StateOutsideRing { position: state.position.0, freed: freed.0, head: head.0 };
    let left = bridge(&state, freed, logged).map_err(|reason| {
        tracing::error!(reason, "what the ring does not hold any more is lost");
        outside()
    })?;
    let own = left.last().filter(|last| last.incarnation == state.incarnation);
    let position = own.map_or(state.position, |last| last.end);
    if position > head {
        return Err(outside());
    }
    // Killed between the store, or the log's sync, and the freeing: what lies below is durable.
    if position > freed {
        skip_to(ring, position);
        ring.free_to(position);
    }
    Ok((state, left))
}

/// A new ring goes on behind what the log has of older ones.
fn begin_behind(state: &mut StreamState, logged: &[LoggedBatch]) {
    let Some(first) = logged.first().filter(|first| first.incarnation < state.incarnation) else { return };
    if let Some(durable) = logged.iter().find(|batch| (batch.number, batch.chain) == (state.number, state.chain)) {
        // The last orderly stop knew of more than was forgotten in the log.
        state.flags = durable.after;
    } else {
        (state.number, state.chain) = (BatchNo(first.number.0.saturating_sub(1)), first.previous);
        state.flags = first.before;
    }
}

/// Takes entries until `position` is the next one.
pub(super) fn skip_to<S: RingSource>(ring: &mut S, position: Position) {
    if ring.freed() >= position {
        return;
    }
    // One that cannot be read is found again by who takes the next.
    while let Ok(Some(entry)) = ring.next_entry() {
        if entry.position.0 + 1 >= position.0 {
            return;
        }
    }
}

/// A ring of which nothing was sent yet.
fn first_state<S: RingSource>(config: &StreamerConfig, ring: &S, older: Option<StreamState>) -> Result<StreamState> {
    if let Some(state) = older.filter(|state| state.incarnation > config.incarnation) {
        return Err(Error::StateOfOtherRing { found: state.incarnation.0, expected: config.incarnation.0 });
    }
    // A state of an older incarnation: killed while starting over.
    let known = older.map(|state| (state.number, state.chain, state.flags.joined));
    let (number, chain, joined) = known.unwrap_or((config.last.0, config.last.1, config.joined));
    Ok(StreamState {
        position: ring.freed(),
        incarnation: config.incarnation,
        number,
        chain,
        flags: StreamFlags { event_open: false, joined },
        sent: false,
        acknowledged: false,
        compared: false,
        newest_point: older.map_or_else(Default::default, |state| state.newest_point),
    })
}

impl<S: RingSource> Streamer<S> {
    pub(super) fn handle_welcome(&mut self, now: Now, welcome: Welcome) {
        if self.config.generation.0 == 0 {
            self.config.generation = welcome.generation;
        }
        if welcome.generation != self.config.generation {
            let detail =
                format!("the group is at generation {}, this host at {}", welcome.generation, self.config.generation);
            self.handle_refused(now, RefuseCode::Generation, detail);
            return;
        }
        self.events.push_back(StreamEvent::Greeted(welcome.clone()));
        self.welcome = Some(welcome);
        if !matches!(self.mode, Mode::StartingOver | Mode::Comparing) {
            self.decide(now);
        }
    }

    /// Goes on as the greeting's answer allows.
    pub(super) fn decide(&mut self, now: Now) {
        let Some(welcome) = self.welcome.clone() else { return };
        let tail = welcome.tail;
        let incarnation = self.stream_incarnation();
        if let Some(tail) = tail.filter(|tail| tail.incarnation > incarnation)
            && self.skip_in_log(now, &tail)
        {
            return;
        }
        let own = SourceTail {
            incarnation,
            number: self.state.number,
            chain: self.state.chain,
            unsent: self.is_unsent(incarnation, tail.as_ref()),
        };
        match resume(&own, tail.as_ref()) {
            Resume::Continue => self.go_live(),
            Resume::CatchUp { number, chain } => self.begin_catch_up(now, tail.as_ref(), number, chain),
            Resume::Append { number, chain, .. } if !self.backlog.is_empty() => {
                if (number, chain) == (self.state.number, self.state.chain) {
                    self.go_live();
                } else {
                    self.mode = Mode::Comparing;
                    let reason = format!(
                        "the target holds batches up to {number}, and those in the disk log follow batch {}",
                        self.state.number
                    );
                    self.events.push_back(StreamEvent::CompareEverything { reason });
                }
            }
            Resume::Append { number, chain, proved }
                if proved || self.state.compared || self.is_in_log(welcome.log) =>
            {
                self.append(&welcome, number, chain);
            }
            Resume::Append { number, .. } => {
                self.mode = Mode::Comparing;
                let log = match (&self.config.log, welcome.log) {
                    (Some(log), Some(_)) if !log.lives.is_empty() => "its activity log does not know of them either",
                    _ => "no activity log tells",
                };
                let reason = format!(
                    "the target holds batches up to {number}, this host knows of {}; what lies between them is unknown, and {log}",
                    self.state.number
                );
                self.events.push_back(StreamEvent::CompareEverything { reason });
            }
            Resume::StartOver { incarnation } => {
                let above = Incarnation(self.state.incarnation.0 + 1);
                self.start_over(incarnation.max(above), diverged(&own, tail.as_ref()));
            }
        }
    }

    /// No batch of this incarnation can be at the target. After the first was sent, only its own word for it counts: a tail that
    /// is exactly what our first batch follows, while none of ours was ever acknowledged.
    fn is_unsent(&self, incarnation: Incarnation, tail: Option<&Tail>) -> bool {
        let behind = tail.is_some_and(|tail| tail.number == self.state.number && tail.chain == self.state.chain);
        if incarnation != self.state.incarnation {
            // An older one, in the log: nobody remembers what of it was sent.
            return behind;
        }
        !self.state.sent || (!self.state.acknowledged && behind)
    }

    /// What the target holds beyond what this host remembers, the activity log remembers (I10: the target says so itself, under its
    /// MAC).
    fn is_in_log(&self, mark: Option<LogMark>) -> bool {
        let lives = self.config.log.as_ref().map_or(&[][..], |log| &log.lives);
        mark.is_some_and(|mark| mark.is_in(lives))
    }

    fn go_live(&mut self) {
        if self.greeted != self.stream_incarnation() {
            self.give_up_link("the target has all of an older incarnation: the next one is greeted for".into());
            return;
        }
        self.mode = Mode::Live;
        self.settled = true;
        self.last_reason = None;
        self.events.push_back(StreamEvent::Live);
    }

    fn append(&mut self, welcome: &Welcome, number: BatchNo, chain: ChainHash) {
        let linked = self.state.sent && self.state.number == number && self.state.chain == chain;
        if !linked {
            self.take_tail(welcome, number, chain);
        }
        self.go_live();
    }

    /// What the ring holds is to follow the target's last batch.
    fn take_tail(&mut self, welcome: &Welcome, number: BatchNo, chain: ChainHash) {
        self.state.number = number;
        self.state.chain = chain;
        self.state.flags = StreamFlags {
            event_open: welcome.event_open,
            joined: welcome.joined.iter().copied().collect::<VolumeSet>(),
        };
        self.sent_to = number;
        self.source.store_state(&self.state);
        self.reset();
    }

    /// The target holds batches whose acknowledgements were lost: forms them again, only to see that they are the same.
    fn begin_catch_up(&mut self, now: Now, tail: Option<&Tail>, number: BatchNo, chain: ChainHash) {
        if let Some(logged) = self.backlog.get(number).filter(|logged| logged.incarnation == self.greeted) {
            if logged.chain == chain {
                self.make_durable(now, number, None);
                self.go_live();
            } else {
                let reason = format!("the target's batch {number} is not the one in the disk log");
                self.demand_start_over(self.state.incarnation, reason);
            }
            return;
        }
        if self.stream_incarnation() != self.state.incarnation {
            self.pass_over_log(number, chain);
            return;
        }
        let end = tail.map_or(self.state.position, |tail| tail.end);
        if end <= self.base().position || end > self.source.head() {
            let reason = format!("the target holds batch {number} up to ticket {end}, which the ring does not hold");
            self.demand_start_over(self.state.incarnation, reason);
            return;
        }
        self.catch_up = Some(CatchUp { number, chain });
        for slot in self.slots.iter_mut().filter(|slot| slot.number <= number) {
            slot.verify_only = true;
            if matches!(slot.stage, Stage::Ready(_)) && slot.logged.is_none() {
                slot.stage = Stage::Verified;
            }
        }
        self.mode = Mode::Live;
        self.check_catch_up(now);
    }

    /// The target is in a later incarnation than the log's first batch: what is trimmed is not made durable, so the log may begin with what the target
    /// has. `false`: that explains nothing.
    fn skip_in_log(&mut self, now: Now, tail: &Tail) -> bool {
        let Some(last) = self.backlog.back().map(|last| last.number) else { return false };
        match self.backlog.get(tail.number) {
            Some(logged) if (logged.incarnation, logged.chain) == (tail.incarnation, tail.chain) => {
                self.make_durable(now, tail.number, None);
                self.go_live();
                true
            }
            None if tail.number > last && tail.incarnation < self.state.incarnation => {
                self.pass_over_log(tail.number, tail.chain);
                true
            }
            Some(_) | None => false,
        }
    }

    /// The target holds batch `number` of an older incarnation, which the log does not, and later ones than the log's: the host went down when all of
    /// the log was at the target, and more behind it, and before that was recorded.
    fn pass_over_log(&mut self, number: BatchNo, chain: ChainHash) {
        let Some(welcome) = self.welcome.clone() else { return };
        let alone = self.backlog.back().is_some_and(|last| last.incarnation < self.state.incarnation)
            && self.slots.iter().all(|slot| slot.logged.is_none());
        if !(alone && self.is_in_log(welcome.log)) {
            self.mode = Mode::Comparing;
            let reason = format!(
                "the target holds batch {number}, which the disk log does not, and what this host has logged since follows another"
            );
            self.events.push_back(StreamEvent::CompareEverything { reason });
            return;
        }
        self.end_log();
        self.take_tail(&welcome, number, chain);
        self.go_live();
    }

    /// Once the chain hash of the target's last batch is known: is it the target's?
    pub(super) fn check_catch_up(&mut self, now: Now) {
        let Some(CatchUp { number, chain }) = self.catch_up else { return };
        let logged = self.backlog.get(number).map(|batch| batch.chain);
        let Some(own) = logged.or_else(|| self.slot_mut(number)?.chain) else { return };
        self.catch_up = None;
        if own == chain {
            self.make_durable(now, number, None);
            self.go_live();
        } else {
            let reason = format!("the target's batch {number} is not the one that this ring gives");
            self.demand_start_over(self.state.incarnation, reason);
        }
    }

    /// Starts over above `other` and the own incarnation.
    pub(super) fn demand_start_over(&mut self, other: Incarnation, reason: String) {
        if self.mode != Mode::StartingOver {
            let incarnation = Incarnation(self.state.incarnation.0.max(other.0) + 1);
            self.start_over(incarnation, reason);
        }
    }

    fn start_over(&mut self, incarnation: Incarnation, reason: String) {
        self.mode = Mode::StartingOver;
        self.last_reason = Some(reason.clone());
        self.reset();
        self.events.push_back(StreamEvent::StartOver { incarnation, reason });
    }

    /// The ring is of the new incarnation. The session greets anew with it.
    pub(super) fn start_over_now(&mut self, incarnation: Incarnation) {
        assert!(incarnation > self.state.incarnation, "incarnations only rise");
        let tail = self.welcome.as_ref().and_then(|welcome| welcome.tail);
        self.give_up_log();
        self.settled = self.welcome.is_some();
        // Without a session the number is settled by the next greeting: everything is compared, so any tail will do.
        let (number, chain) = match (&self.welcome, tail) {
            (Some(_), Some(tail)) => (tail.number, tail.chain),
            (Some(_), None) => (BatchNo(0), ChainHash::default()),
            (None, _) => (self.state.number, self.state.chain),
        };
        self.source.rewind();
        self.state = StreamState {
            position: self.source.freed(),
            incarnation,
            number,
            chain,
            flags: StreamFlags { event_open: true, joined: self.state.flags.joined },
            sent: false,
            acknowledged: false,
            compared: true,
            newest_point: self.state.newest_point,
        };
        self.config.incarnation = incarnation;
        self.sent_to = number;
        self.source.store_state(&self.state);
        self.mode = Mode::Down;
        self.reset();
        if self.link.is_some() {
            self.give_up_link(format!("starting over as incarnation {incarnation}"));
        }
    }

    pub(super) fn handle_refused(&mut self, now: Now, code: RefuseCode, detail: String) {
        let wait = REFUSED_WAIT.saturating_mul(1 << self.refusals.min(10)).min(REFUSED_WAIT_MAX);
        self.refusals = self.refusals.saturating_add(1);
        self.greet_at = Some(now.plus(wait));
        if !matches!(self.mode, Mode::StartingOver | Mode::Comparing) {
            self.mode = Mode::Refused;
        }
        self.give_up_link(format!("refused: {detail}"));
        self.events.push_back(StreamEvent::Refused { code, detail });
    }
}

fn diverged(own: &SourceTail, tail: Option<&Tail>) -> String {
    let ours = format!("this host last knew of batch {} (incarnation {})", own.number, own.incarnation);
    match tail {
        Some(tail) => format!("the target holds batch {} of incarnation {}; {ours}", tail.number, tail.incarnation),
        None => format!("the target holds nothing of this stream; {ours}"),
    }
}
