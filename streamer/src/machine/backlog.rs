//! Batches in the disk log: put there when the ring fills up, read back and sent as the link allows.
//!
//! ```text
//! state │ batches (in the log)                  │ slots (in the ring)
//!       │ sent │ loaded │ on the disk alone     │ being put there │ to be put there or sent
//! ```
//!
//! Invariants, beside those of [`Streamer`]:
//! - `state.number < batches… < slots… < next`, without gaps.
//! - The ring is freed up to the last of `batches`, which are durable in the log.
//! - Batches of an older incarnation come before those of the ring's, and are sent in sessions that greet with theirs.

use std::collections::VecDeque;
use std::time::Duration;

use farshore_proto::{BatchNo, ChainHash, Incarnation, Now, Position};

use crate::disk_log::{LogDone, LogOrder, LoggedBatch};
use crate::seal::SealedBatch;
use crate::source::{Fill, RingSource, StreamFlags, StreamState};

use super::{Mode, StreamEvent, Streamer};

/// Bytes given to the log and not answered, at most.
const APPENDING_BYTES_MAX: u64 = 64 << 20;
/// Wait before a log that is full, or that failed, is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// A log that has not answered for so long is slow.
const SLOW: Duration = Duration::from_secs(5);

/// What the disk log held when the process started.
#[derive(Clone, Debug, Default)]
pub struct LogStart {
    /// In the order of their numbers.
    pub batches: Vec<LoggedBatch>,
    /// It is recorded that there is a line.
    pub begun: bool,
}

/// What the agent hears of the disk log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LogNews {
    /// Batches go to the log: the link does not keep up.
    InUse,
    /// All that was in it is at the target.
    Empty,
    /// It takes no more: what comes next stays in the ring.
    Full,
    /// It cannot be written.
    Failed(String),
    /// It has not answered for a while.
    Slow,
    /// It takes batches again, and answers.
    Sound,
    /// Everything below this ring position is durable in the log or at the target.
    Kept(Position),
}

/// How the log stands, for `status`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LogFigures {
    /// There is one.
    pub exists: bool,
    /// Batches in it, or on their way there.
    pub batches: usize,
    /// Their bytes, sealed.
    pub bytes: u64,
    /// Batches go there now.
    pub active: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Line {
    None,
    /// The agent records that there is one, or that there is none any more.
    Asked,
    Begun,
}

#[derive(Debug)]
struct Loaded {
    number: BatchNo,
    batch: SealedBatch,
}

/// The disk log as the machine knows it.
#[derive(Debug)]
pub(super) struct Backlog {
    exists: bool,
    line: Line,
    /// Batches go there.
    active: bool,
    /// All of them, whatever room the ring has.
    everything: bool,
    batches: VecDeque<LoggedBatch>,
    /// Sums over `batches`.
    bytes: u64,
    payload_bytes: u64,
    loaded: VecDeque<Loaded>,
    /// Ordered to be read, and not answered.
    loading: VecDeque<BatchNo>,
    orders: VecDeque<LogOrder>,
    epoch: u64,
    /// Number and bytes of what was given to the log and is not answered.
    appending: VecDeque<(BatchNo, u64)>,
    /// Since when the oldest of them waits.
    since: Option<Now>,
    slow: bool,
    /// Full, or failed: not before.
    waits_until: Option<Now>,
    said: bool,
    /// It was full, failed or slow, and that it is not any more was not said.
    trouble: bool,
    /// It is being seen whether it can be written again.
    probing: bool,
}

impl Backlog {
    pub(super) fn new(start: Option<LogStart>) -> Self {
        let exists = start.is_some();
        let LogStart { batches, begun } = start.unwrap_or_default();
        let mut backlog = Self {
            exists,
            line: if begun { Line::Begun } else { Line::None },
            active: false,
            everything: false,
            batches: VecDeque::new(),
            bytes: 0,
            payload_bytes: 0,
            loaded: VecDeque::new(),
            loading: VecDeque::new(),
            orders: VecDeque::new(),
            epoch: 0,
            appending: VecDeque::new(),
            since: None,
            slow: false,
            waits_until: None,
            said: false,
            trouble: false,
            probing: false,
        };
        batches.into_iter().for_each(|batch| backlog.push(batch));
        backlog
    }

    fn push(&mut self, batch: LoggedBatch) {
        self.bytes += batch.len;
        self.payload_bytes += batch.payload_bytes;
        self.batches.push_back(batch);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    pub(super) fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    pub(super) fn back(&self) -> Option<&LoggedBatch> {
        self.batches.back()
    }

    pub(super) fn front(&self) -> Option<&LoggedBatch> {
        self.batches.front()
    }

    pub(super) fn get(&self, number: BatchNo) -> Option<&LoggedBatch> {
        let index = number.0.checked_sub(self.batches.front()?.number.0)?;
        self.batches.get(usize::try_from(index).ok()?)
    }

    /// The first batch, if the target is about to have it.
    pub(super) fn pop_up_to(&mut self, number: BatchNo) -> Option<LoggedBatch> {
        let batch = self.batches.pop_front_if(|batch| batch.number <= number)?;
        self.bytes -= batch.len;
        self.payload_bytes -= batch.payload_bytes;
        Some(batch)
    }

    /// Batches are formed for the log, whether or not there is a session.
    pub(super) fn takes_batches(&self) -> bool {
        self.active && self.waits_until.is_none()
    }

    /// The log has them, or may get them: references to what the target leases would be of no use in it.
    pub(super) fn wants_whole_batches(&self) -> bool {
        self.active || !self.batches.is_empty()
    }

    pub(super) fn figures(&self) -> LogFigures {
        LogFigures {
            exists: self.exists,
            batches: self.batches.len() + self.appending.len(),
            bytes: self.bytes + self.appending.iter().map(|(_, len)| len).sum::<u64>(),
            active: self.active,
        }
    }

    /// The target has everything up to `number`, and the log may not know yet.
    pub(super) fn trim(&mut self, number: BatchNo) {
        if self.line == Line::Begun {
            self.orders.push_back(LogOrder::Trim { number });
        }
    }

    /// What was read for a session that is gone.
    pub(super) fn forget_loaded(&mut self) {
        self.loaded.clear();
        self.loading.clear();
    }

    /// Nothing tells of an empty log that it is sound again, and somebody may have mended it.
    fn probe(&mut self) {
        let idle = self.line == Line::None && !self.active && self.orders.is_empty();
        if self.trouble && idle && !self.probing && self.waits_until.is_none() {
            self.probing = true;
            self.orders.push_back(LogOrder::Probe { epoch: self.epoch });
        }
    }

    /// It takes batches, and answers.
    fn is_sound(&mut self) -> Option<StreamEvent> {
        self.slow = false;
        std::mem::take(&mut self.trouble).then_some(StreamEvent::Log(LogNews::Sound))
    }

    /// When [`Streamer::poll_log`] has something to do by itself.
    pub(super) fn deadline(&self) -> Option<Now> {
        let slow = self.since.filter(|_| !self.slow).map(|since| since.plus(SLOW));
        [slow, self.waits_until].into_iter().flatten().min()
    }
}

/// Where a stream stands behind some batch.
#[derive(Clone, Copy)]
pub(super) struct Base {
    pub(super) position: Position,
    pub(super) number: BatchNo,
    pub(super) chain: ChainHash,
    pub(super) flags: StreamFlags,
}

/// Whether what a ring lacks stands in the log: everything between what the target has (`state`) and what is freed.
///
/// Gives the batches that the target does not have, as far as is known.
///
/// # Errors
/// Why not: what lies between is lost.
pub fn bridge(state: &StreamState, freed: Position, batches: Vec<LoggedBatch>) -> Result<Vec<LoggedBatch>, String> {
    let left: Vec<LoggedBatch> = batches.into_iter().filter(|batch| batch.number > state.number).collect();
    let follows = left.first().is_none_or(|first| first.number == state.number.next() && first.previous == state.chain);
    let fits = left.last().is_none_or(|last| last.incarnation <= state.incarnation);
    let own_end = left.last().filter(|last| last.incarnation == state.incarnation).map(|last| last.end);
    let reached = own_end.unwrap_or(state.position);
    match (follows && fits, freed > state.position) {
        (true, _) if reached >= freed => Ok(left),
        (true, _) => Err(format!("the disk log ends at ticket {reached}, and the ring begins at {freed}")),
        (false, true) => {
            Err(format!("the disk log does not follow batch {}, and the ring begins at {freed}", state.number))
        }
        // Of no use, and not needed.
        (false, false) => Ok(Vec::new()),
    }
}

/// More than half of it is in use.
pub(super) fn is_half_full(fill: &Fill) -> bool {
    fill.used_bytes > fill.size_bytes / 2 || fill.used_entries > fill.size_entries / 2
}

impl<S: RingSource> Streamer<S> {
    /// Behind what is durable at the target or in the log.
    pub(super) fn base(&self) -> Base {
        let Self { state, .. } = self;
        match self.backlog.back() {
            Some(last) => {
                let own = last.incarnation == state.incarnation;
                let position = if own { last.end } else { state.position };
                Base { position, number: last.number, chain: last.chain, flags: last.after }
            }
            None => Base { position: state.position, number: state.number, chain: state.chain, flags: state.flags },
        }
    }

    /// Life of the ring whose batches come next.
    pub(super) fn stream_incarnation(&self) -> Incarnation {
        self.backlog.front().map_or(self.state.incarnation, |batch| batch.incarnation)
    }

    /// Everything that is published goes to the log now, for the process is about to end and the target cannot be waited for.
    pub fn log_everything(&mut self, now: Now) {
        self.backlog.everything = true;
        self.look_at_log(now);
    }

    /// Nothing is left that is in the ring alone, as far as was published.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.slots.is_empty()
            && self.drain.ready() == 0
            && self.drain.open_entries() == 0
            && self.source.freed() == self.source.head()
    }

    /// There is a disk log that takes batches.
    #[must_use]
    pub fn can_log(&self) -> bool {
        self.backlog.exists && self.config.generation.0 != 0 && self.backlog.waits_until.is_none()
    }

    /// Whether batches are to go to the log.
    pub(super) fn look_at_log(&mut self, now: Now) {
        let backlog = &mut self.backlog;
        if !backlog.exists {
            return;
        }
        if backlog.waits_until.is_some_and(|until| until <= now) {
            backlog.waits_until = None;
        }
        let fill = self.source.fill();
        let able = self.config.generation.0 != 0
            && !matches!(self.mode, Mode::Comparing | Mode::StartingOver)
            && self.catch_up.is_none()
            // Else nobody knows which batch the next one follows.
            && (self.settled || self.state.sent || !backlog.batches.is_empty());
        // The last ones that were given stay the log's.
        let begins = is_half_full(&fill) || backlog.everything;
        let goes_on = backlog.active && (!fill.is_low() || !backlog.appending.is_empty());
        backlog.active = able && (begins || goes_on);
        if backlog.active && !backlog.said && backlog.waits_until.is_none() {
            backlog.said = true;
            self.events.push_back(StreamEvent::Log(LogNews::InUse));
        }
        if backlog.since.is_some_and(|since| now.since(since) >= SLOW) && !backlog.slow {
            backlog.slow = true;
            backlog.trouble = true;
            self.events.push_back(StreamEvent::Log(LogNews::Slow));
        }
        let idle = backlog.batches.is_empty() && backlog.appending.is_empty() && !backlog.active;
        if idle && backlog.line == Line::Begun {
            backlog.line = Line::Asked;
            backlog.epoch += 1;
            backlog.orders.push_back(LogOrder::End);
        }
        if idle && backlog.said && backlog.line == Line::None {
            backlog.said = false;
            self.events.push_back(StreamEvent::Log(LogNews::Empty));
        }
    }

    /// The next order to the disk log.
    #[must_use]
    pub fn poll_log(&mut self, now: Now) -> Option<LogOrder> {
        self.look_at_log(now);
        if self.backlog.orders.is_empty() {
            self.offer_to_log(now);
            self.load_from_log();
            self.backlog.probe();
        }
        self.backlog.orders.pop_front()
    }

    /// Gives batches to the log, from the first that is not there.
    fn offer_to_log(&mut self, now: Now) {
        if !self.backlog.takes_batches() {
            return;
        }
        let Some(index) = self.slots.iter().position(|slot| slot.logged.is_none()) else { return };
        let given: u64 = self.backlog.appending.iter().map(|(_, len)| len).sum();
        if given >= APPENDING_BYTES_MAX || !self.slots[index].is_ready() {
            return;
        }
        if self.slots[index].needs_its_session() {
            // The session may never answer for it, and no other takes it as it is.
            self.reset();
            return;
        }
        match self.backlog.line {
            Line::None => {
                self.backlog.line = Line::Asked;
                self.backlog.orders.push_back(LogOrder::Begin);
                return;
            }
            Line::Asked => return,
            Line::Begun => {}
        }
        let Base { chain: previous, flags: before, .. } = match index.checked_sub(1) {
            Some(last) => {
                let last = &self.slots[last];
                let chain = last.chain.expect("linked before its successor");
                Base { position: last.end, number: last.number, chain, flags: last.after }
            }
            None => self.base(),
        };
        let slot = &mut self.slots[index];
        let sealed = slot.sealed().expect("looked at").clone();
        let batch = LoggedBatch {
            generation: self.config.generation,
            incarnation: self.state.incarnation,
            number: slot.number,
            end: slot.end,
            time: slot.time,
            recoverable: slot.recoverable,
            app_consistent: slot.app_consistent,
            bookmark: slot.bookmark.clone(),
            before,
            after: slot.after,
            previous,
            chain: slot.chain.expect("linked before it was sealed"),
            payload_bytes: slot.payload_bytes,
            written_bytes: slot.written_bytes,
            len: sealed.len,
        };
        self.backlog.appending.push_back((batch.number, batch.len));
        self.backlog.since.get_or_insert(now);
        let epoch = self.backlog.epoch;
        slot.logged = Some(Box::new(batch.clone()));
        self.backlog.orders.push_back(LogOrder::Append { epoch, batch: Box::new(batch), pieces: sealed.pieces });
    }

    /// Has the next batches read, as far ahead as the window allows.
    fn load_from_log(&mut self) {
        if !self.is_sending() {
            return;
        }
        let ahead = self.backlog.loading.back().copied().or(self.backlog.loaded.back().map(|it| it.number));
        let next = ahead.unwrap_or(self.sent_to).max(self.sent_to).max(self.state.number).next();
        let Some(batch) = self.backlog.get(next).filter(|batch| batch.incarnation == self.greeted) else { return };
        let first = self.state.number.next();
        let under_way = |number: u64| self.backlog.get(BatchNo(number)).map_or(0, |batch| batch.len);
        let bytes: u64 = (first.0..next.0).map(under_way).sum();
        let count = usize::try_from(next.0 - first.0).unwrap_or(usize::MAX);
        let has_room = count < self.config.window_batches && bytes + batch.len <= self.window_limit().max(batch.len);
        if has_room {
            self.backlog.loading.push_back(next);
            self.backlog.orders.push_back(LogOrder::Load { epoch: self.backlog.epoch, number: next });
        }
    }

    /// What was sent behind batch `number` was not taken.
    pub(super) fn send_again_behind(&mut self, number: BatchNo) {
        self.sent_to = self.sent_to.min(number).max(self.state.number);
        // What went into the log after it was sent was never read.
        let next = self.sent_to.next();
        let known = self.loaded(next).is_some() || self.backlog.loading.contains(&next);
        if !known {
            self.backlog.forget_loaded();
        }
    }

    /// The bytes of the log's batch `number`, if they were read.
    pub(super) fn loaded(&self, number: BatchNo) -> Option<&SealedBatch> {
        self.backlog.loaded.iter().find(|loaded| loaded.number == number).map(|loaded| &loaded.batch)
    }

    /// The target has everything up to `number`.
    pub(super) fn trim_log(&mut self, number: BatchNo) {
        let backlog = &mut self.backlog;
        while backlog.loaded.pop_front_if(|loaded| loaded.number <= number).is_some() {}
        while backlog.loading.pop_front_if(|loading| *loading <= number).is_some() {}
        backlog.trim(number);
    }

    /// What the log holds is given up: the agent has recorded that everything is compared.
    pub(super) fn give_up_log(&mut self) {
        self.drop_log(LogOrder::GiveUp);
    }

    /// The target has all that the log holds, and more behind it.
    pub(super) fn end_log(&mut self) {
        self.drop_log(LogOrder::End);
    }

    fn drop_log(&mut self, order: LogOrder) {
        let backlog = &mut self.backlog;
        backlog.epoch += 1;
        backlog.batches.clear();
        (backlog.bytes, backlog.payload_bytes) = (0, 0);
        backlog.appending.clear();
        backlog.since = None;
        backlog.forget_loaded();
        backlog.orders.clear();
        if backlog.line != Line::None {
            backlog.line = Line::Asked;
            backlog.orders.push_back(order);
        }
        self.slots.iter_mut().for_each(super::window::Slot::take_from_log);
    }

    /// The agent recorded that there is a line.
    pub fn handle_log_begun(&mut self) {
        if self.backlog.line == Line::Asked {
            self.backlog.line = Line::Begun;
        }
    }

    /// The agent recorded that there is none any more, and the log is empty.
    pub fn handle_log_ended(&mut self) {
        self.backlog.line = Line::None;
    }

    /// Batches flow to the target.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.is_sending()
    }

    /// Something came of an order.
    pub fn handle_log(&mut self, now: Now, done: LogDone) {
        if matches!(done, LogDone::Probed { .. } | LogDone::Failed { .. }) {
            self.backlog.probing = false;
        }
        match done {
            LogDone::Appended { epoch, number } if epoch == self.backlog.epoch => self.take_appended(now, number),
            LogDone::Full { epoch } if epoch == self.backlog.epoch => self.take_refused(now, LogNews::Full),
            LogDone::Failed { epoch, reason } if epoch == self.backlog.epoch => {
                self.take_refused(now, LogNews::Failed(reason));
            }
            LogDone::Loaded { epoch, number, bytes } if epoch == self.backlog.epoch => {
                let Some(at) = self.backlog.loading.iter().position(|loading| *loading == number) else { return };
                self.backlog.loading.remove(at);
                let batch = SealedBatch {
                    len: bytes.len() as u64,
                    pieces: vec![bytes],
                    plain_bytes: 0,
                    frame_bytes: 0,
                    deduplicated_bytes: 0,
                    has_references: false,
                };
                self.backlog.loaded.push_back(Loaded { number, batch });
            }
            // Whatever its life is called by now: the disk answers.
            LogDone::Probed { .. } => {
                let sound = self.backlog.is_sound();
                self.events.extend(sound);
            }
            LogDone::Unreadable { epoch, number, reason }
                if epoch == self.backlog.epoch && number > self.state.number =>
            {
                self.demand_start_over(self.state.incarnation, format!("the disk log cannot be read: {reason}"));
            }
            LogDone::Appended { .. }
            | LogDone::Full { .. }
            | LogDone::Failed { .. }
            | LogDone::Loaded { .. }
            | LogDone::Unreadable { .. } => {}
        }
        self.tick(now);
    }

    fn take_appended(&mut self, now: Now, number: BatchNo) {
        while self.backlog.appending.pop_front_if(|(appended, _)| *appended <= number).is_some() {}
        self.backlog.since = (!self.backlog.appending.is_empty()).then_some(now);
        let sound = self.backlog.is_sound();
        self.events.extend(sound);
        // Those that are not there any more are at the target.
        while self.slots.front().is_some_and(|slot| slot.logged.is_some() && slot.number <= number) {
            let slot = self.slots.pop_front().expect("looked at just now");
            self.backlog.push(*slot.logged.expect("looked at just now"));
        }
        let end = self.base().position;
        if end > self.source.freed() {
            self.source.free_to(end);
            self.events.push_back(StreamEvent::Log(LogNews::Kept(end)));
        }
        self.check_catch_up(now);
    }

    fn take_refused(&mut self, now: Now, news: LogNews) {
        self.backlog.appending.clear();
        self.backlog.since = None;
        self.slots.iter_mut().for_each(super::window::Slot::take_from_log);
        // Once for all that were refused in a row.
        if self.backlog.waits_until.is_none() {
            self.backlog.trouble = true;
            self.events.push_back(StreamEvent::Log(news));
        }
        self.backlog.waits_until = Some(now.plus(RETRY));
    }
}
