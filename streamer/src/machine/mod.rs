//! The streamer as a machine: no I/O, no clock, no threads.

mod backlog;
mod config;
mod deliver;
mod form;
mod meter;
mod resume;
mod states;
mod status;
mod window;

use std::collections::VecDeque;
use std::sync::Arc;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::message::{Answers, RefuseCode, Welcome};
use farshore_proto::session::{SourceEvent, SourceSession};
use farshore_proto::{BatchNo, ChainHash, Generation, Incarnation, Name, Now, PointId, Position, WallTime};

use crate::bucket::TokenBucket;
use crate::coalesce::RecordSet;
use crate::dedup::LeaseSet;
use crate::drain::Drain;
use crate::level::LevelControl;
use crate::source::{RingSource, StreamState};
use crate::{Error, Result, SealedBatch};

use self::backlog::{Backlog, Base};
pub use self::backlog::{LogFigures, LogNews, LogStart, bridge};
pub use self::config::{Entropy, StreamLog, StreamerConfig};
use self::meter::Meter;
pub use self::states::MACHINES;
pub use self::status::{Phase, StreamStatus};
use self::window::Slot;

/// Makes batches of what a ring holds, keeps them until the target has them, and frees the ring then (and only then).
///
/// Inputs: [`Self::handle_link_up`], [`Self::handle_control`], [`Self::handle_sent`], [`Self::handle_unsent`],
/// [`Self::handle_link_down`], [`Self::handle_done`], [`Self::handle_compared`], [`Self::handle_started_over`],
/// [`Self::handle_log`], [`Self::handle_timeout`] at [`Self::poll_deadline`].
/// Outputs, drained after each input and after entries were published: [`Self::poll_work`], [`Self::poll_control`],
/// [`Self::poll_batch`], [`Self::poll_log`], [`Self::poll_drop`], [`Self::poll_event`].
///
/// Invariants:
/// - `state.number < batches in the disk log… < slots… < next`, without gaps; a slot's chain hash follows from its predecessor's and the
///   ring alone.
/// - What is freed was acknowledged by the target, authenticated, with the chain hash that we computed, and the state that says so
///   is stored first; or it is durable in the disk log.
/// - A batch is sent only in a session whose greeting proved that it continues what the target holds.
/// - Everything in `slots` and `drain` can be made again from the ring (`reset`).
pub struct Streamer<S: RingSource> {
    config: StreamerConfig,
    source: S,
    session: SourceSession,
    entropy: Entropy,
    /// Durable at the target; as stored beside the ring.
    state: StreamState,
    drain: Drain<S::Payload>,
    slots: VecDeque<Slot<S::Payload>>,
    backlog: Backlog,
    /// The last batch that this session's link took; none before `state.number`.
    sent_to: BatchNo,
    /// An acknowledgement of a batch that was sent in this session and is being formed again.
    held: Option<(BatchNo, ChainHash, WallTime)>,
    epoch: u64,
    /// Pieces of work given out and not back.
    running: usize,
    mode: Mode,
    link: Option<u64>,
    /// Counts greetings and lost sessions; names the session whose lease a batch used.
    greeting: u64,
    /// Life of the ring that the session is about.
    greeted: Incarnation,
    /// Batches have flowed since the number of the next one was unknown.
    settled: bool,
    greet_at: Option<Now>,
    refusals: u32,
    welcome: Option<Welcome>,
    catch_up: Option<CatchUp>,
    lease: Option<Arc<LeaseSet>>,
    paused: Option<String>,
    /// The link took no more; until it reports a batch as sent.
    link_full: bool,
    volumes_said: bool,
    bucket: TokenBucket,
    level: LevelControl,
    meter: Meter,
    answers: VecDeque<Answers>,
    events: VecDeque<StreamEvent>,
    drop_link: Option<String>,
    /// The session was given up; until the link says that it is gone.
    dropping: bool,
    spare_sets: Vec<RecordSet>,
    counters: Counters,
    last_reason: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// No session, or the greeting is not answered.
    Down,
    /// Batches flow.
    Live,
    /// The agent is recording "compare everything", then the stream goes on behind the target's tail.
    Comparing,
    /// The agent is making a new incarnation.
    StartingOver,
    /// The target refused the stream.
    Refused,
}

#[derive(Clone, Copy, Debug)]
struct CatchUp {
    number: BatchNo,
    chain: ChainHash,
}

/// Sums since the start of the process. Bytes.
#[derive(Clone, Copy, Default, Debug)]
struct Counters {
    written_bytes: u64,
    shipped_bytes: u64,
    sealed_bytes: u64,
    plain_bytes: u64,
    frame_bytes: u64,
    deduplicated_bytes: u64,
    batches: u64,
}

/// What the streamer tells the agent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StreamEvent {
    /// The target answered the greeting; volumes that it holds nothing of, or that its points do not include, are named.
    Greeted(Welcome),
    /// Batches flow from now on.
    Live,
    /// A batch is journaled at the target, and everything before it.
    Durable(DurableBatch),
    /// What the target found for the probes of a batch that is durable.
    Answers(Answers),
    /// Answers and batches that were under way may be lost: sync takes back what it had in flight.
    Down {
        /// Why.
        reason: String,
    },
    /// The target takes no batches for now.
    Paused {
        /// As the target says it.
        reason: String,
    },
    /// It takes batches again.
    Resumed,
    /// What has become of the disk log.
    Log(LogNews),
    /// The target refuses the stream. Tried again, more and more slowly.
    Refused {
        /// Why.
        code: RefuseCode,
        /// Particulars.
        detail: String,
    },
    /// It is not known what the target lacks. Durably record "compare everything", open an event, then
    /// [`Streamer::handle_compared`]. Nothing is sent before.
    CompareEverything {
        /// Why.
        reason: String,
    },
    /// The stream cannot go on. Durably record this incarnation and "compare everything", give the ring the incarnation, then
    /// [`Streamer::handle_started_over`]. Nothing is sent before.
    StartOver {
        /// The new incarnation.
        incarnation: Incarnation,
        /// Why.
        reason: String,
    },
}

/// A batch that the target has journaled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DurableBatch {
    /// The point at its end.
    pub point: PointId,
    /// Ring position behind it: everything below is durable.
    pub end: Position,
    /// Source's clock at its cut.
    pub time: WallTime,
    /// The point can be recovered to.
    pub recoverable: bool,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
    /// The point's name.
    pub bookmark: Option<Name>,
    /// Target's clock; `None` where it is known only from the tail in its greeting.
    pub received: Option<WallTime>,
}

/// A batch to be sent on the session's link.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The link's session.
    pub session: u64,
    /// Batch's number.
    pub number: BatchNo,
    /// Its bytes.
    pub batch: SealedBatch,
}

impl<S: RingSource> Streamer<S> {
    /// Takes the stream up where the ring's state says.
    ///
    /// # Errors
    /// The state is of another ring, or points outside of this one: compare everything in a new incarnation.
    pub fn new(now: Now, config: StreamerConfig, mut source: S, entropy: Entropy) -> Result<Self> {
        let mut config = config;
        let start = config.disk_log.take();
        let (state, batches) = resume::state_at_start(&config, start.as_ref(), &mut source)?;
        let mut backlog = Backlog::new(start.map(|start| LogStart { batches, ..start }));
        backlog.trim(state.number);
        let mut streamer = Self {
            session: SourceSession::new(config.session.clone()),
            bucket: TokenBucket::new(config.rate, now),
            level: LevelControl::new(config.workers, config.level_max, now),
            meter: Meter::new(),
            config,
            source,
            entropy,
            drain: Drain::new(state.position, state.flags),
            slots: VecDeque::new(),
            backlog,
            sent_to: state.number,
            held: None,
            state,
            epoch: 0,
            running: 0,
            mode: Mode::Down,
            link: None,
            greeting: 0,
            greeted: Incarnation(0),
            settled: false,
            greet_at: None,
            refusals: 0,
            welcome: None,
            catch_up: None,
            lease: None,
            paused: None,
            link_full: false,
            volumes_said: false,
            answers: VecDeque::new(),
            events: VecDeque::new(),
            drop_link: None,
            dropping: false,
            spare_sets: Vec::new(),
            counters: Counters::default(),
            last_reason: None,
        };
        let Base { position, flags, .. } = streamer.base();
        streamer.drain.reset(position, flags);
        Ok(streamer)
    }

    /// The ring, for what the machine does not do: re-opening, a new incarnation.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// A link session is up.
    ///
    /// # Errors
    /// The list of volumes is too long to be said.
    pub fn handle_link_up(&mut self, now: Now, session: u64) -> Result<()> {
        if self.link.is_some() {
            self.lose_session("replaced by a newer session");
        }
        self.link = Some(session);
        match self.greet_at {
            Some(at) if at > now => Ok(()),
            _ => self.greet(now),
        }
    }

    fn greet(&mut self, now: Now) -> Result<()> {
        self.greet_at = None;
        if self.mode == Mode::StartingOver || self.link.is_none() {
            return Ok(());
        }
        self.greeting += 1;
        self.volumes_said = false;
        let nonce = (self.entropy)();
        let volumes = self.config.volumes.clone();
        self.greeted = self.stream_incarnation();
        self.session.handle_up(now, nonce, self.config.generation, self.greeted, volumes).map_err(Error::Greeting)
    }

    /// A link session is gone.
    pub fn handle_link_down(&mut self, now: Now, session: u64, reason: &str) {
        if self.link == Some(session) {
            self.lose_session(reason);
            self.link = None;
        } else if self.link.is_none() {
            // A failed attempt: only the reason is news.
            self.last_reason = Some(reason.to_owned());
        }
        self.tick(now);
    }

    /// A control message arrived. One that the target did not make for this session ends the session.
    pub fn handle_control(&mut self, now: Now, session: u64, bytes: &[u8]) {
        if self.link != Some(session) || self.dropping {
            return;
        }
        if let Err(error) = self.session.handle_control(now, bytes) {
            self.give_up_link(format!("control message refused: {error}"));
        }
        self.take_session_events(now);
        self.tick(now);
    }

    /// The link handed a batch to the other end.
    pub fn handle_sent(&mut self, session: u64) {
        if self.link == Some(session) {
            self.link_full = false;
        }
    }

    /// The link did not take a batch. `retry`: it will, after [`Self::handle_sent`]; else its session is about to end.
    pub fn handle_unsent(&mut self, session: u64, number: BatchNo, retry: bool) {
        if self.link != Some(session) {
            return;
        }
        self.link_full = retry;
        self.send_again_behind(BatchNo(number.0.saturating_sub(1)));
    }

    /// The agent recorded "compare everything" and opened an event.
    pub fn handle_compared(&mut self, now: Now) {
        if self.mode == Mode::Comparing {
            self.state.compared = true;
            if !self.backlog.is_empty() {
                // It does not follow what the target holds. Nothing behind it is whole before all was compared.
                self.give_up_log();
                self.state.position = self.source.freed();
                self.state.flags.event_open = true;
                self.reset();
            }
            self.source.store_state(&self.state);
            self.mode = Mode::Down;
            self.decide(now);
        }
    }

    /// The agent recorded the new incarnation and "compare everything", and gave the incarnation to the ring.
    pub fn handle_started_over(&mut self, now: Now, incarnation: Incarnation) {
        self.start_over_now(incarnation);
        self.tick(now);
    }

    /// The deadline passed.
    ///
    /// # Errors
    /// As [`Self::handle_link_up`].
    pub fn handle_timeout(&mut self, now: Now) -> Result<()> {
        if self.greet_at.is_some_and(|at| at <= now) {
            self.greet(now)?;
        }
        self.session.handle_timeout(now);
        self.take_session_events(now);
        self.tick(now);
        Ok(())
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_deadline(&self) -> Option<Now> {
        let bucket = if self.has_unsent() { self.bucket.opens_at() } else { None };
        let level = if self.slots.is_empty() { None } else { Some(self.level.deadline()) };
        let greet = self.greet_at.filter(|_| self.link.is_some());
        let log = self.backlog.deadline();
        [self.session.poll_deadline(), bucket, level, greet, log].into_iter().flatten().min()
    }

    /// The next control message, with the link's session.
    #[must_use]
    pub fn poll_control(&mut self) -> Option<(u64, Vec<u8>)> {
        let link = self.link?;
        self.session.poll_control().map(|bytes| (link, bytes))
    }

    /// The link's session is no use any more: drop it, and tell by [`Self::handle_link_down`].
    #[must_use]
    pub fn poll_drop(&mut self) -> Option<(u64, String)> {
        let link = self.link?;
        self.drop_link.take().map(|reason| (link, reason))
    }

    /// The next event.
    #[must_use]
    pub fn poll_event(&mut self) -> Option<StreamEvent> {
        self.events.pop_front()
    }

    /// Changes the group's volumes.
    ///
    /// # Errors
    /// The list is too long to be said.
    pub fn set_volumes(&mut self, volumes: Vec<VolumeDecl>) -> Result<()> {
        self.config.volumes.clone_from(&volumes);
        self.volumes_said = false;
        self.session.announce(volumes).map_err(Error::Greeting)
    }

    /// Changes the bandwidth limit, bytes per second.
    pub fn set_rate(&mut self, now: Now, rate: Option<u64>) {
        self.bucket.set_rate(rate, now);
    }

    /// Says that the source stops on purpose.
    pub fn say_bye(&mut self) {
        self.session.say_bye();
    }

    /// Line of history that batches are of; 0: none yet.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.config.generation
    }

    /// What is durable at the target.
    #[must_use]
    pub fn state(&self) -> &StreamState {
        &self.state
    }

    /// A batch could be formed and sent at once.
    #[must_use]
    pub fn slot_free(&self) -> bool {
        self.mode == Mode::Live
            && self.paused.is_none()
            && self.catch_up.is_none()
            && self.backlog.is_empty()
            && self.drain.ready() == 0
            && self.window_has_room()
    }

    /// The batch that has no cut yet is large enough: cut now.
    #[must_use]
    pub fn wants_cut(&self) -> bool {
        // What has no cut cannot go to the log, and the ring is filling up.
        let for_log = self.backlog.takes_batches()
            && backlog::is_half_full(&self.source.fill())
            && self.drain.ready() == 0
            && self.drain.open_entries() > 0
            && self.slots.iter().all(|slot| slot.logged.is_some());
        self.drain.wants_cut() || for_log
    }

    /// Nothing is left that the target does not have, as far as was published.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.slots.is_empty()
            && self.backlog.is_empty()
            && self.drain.ready() == 0
            && self.drain.open_entries() == 0
            && self.state.position == self.source.head()
    }

    fn take_session_events(&mut self, now: Now) {
        while let Some(event) = self.session.poll_event() {
            if self.dropping {
                return;
            }
            match event {
                SourceEvent::Live(welcome) => self.handle_welcome(now, welcome),
                SourceEvent::Durable { incarnation, number, chain, received } => {
                    if let Err(reason) = self.acknowledge(now, incarnation, number, &chain, received) {
                        self.give_up_link(reason);
                    }
                }
                SourceEvent::Answers(answers) => self.hold_answers(answers),
                SourceEvent::Lease(lease) => self.lease = Some(Arc::new(LeaseSet::new(lease))),
                SourceEvent::Paused { reason } => {
                    self.paused = Some(reason.clone());
                    self.events.push_back(StreamEvent::Paused { reason });
                }
                SourceEvent::Resumed => {
                    self.paused = None;
                    self.send_again_behind(self.state.number);
                    self.events.push_back(StreamEvent::Resumed);
                }
                SourceEvent::Refused { code, detail } => self.handle_refused(now, code, detail),
                SourceEvent::Broken { reason } => self.give_up_link(reason),
            }
        }
    }

    /// The session ended: nothing that was sent in it counts as sent.
    fn lose_session(&mut self, reason: &str) {
        self.session.handle_down();
        // A batch that is being sealed now, under this session's lease, is of no use in the next.
        self.greeting += 1;
        self.welcome = None;
        self.lease = None;
        self.paused = None;
        self.link_full = false;
        self.drop_link = None;
        self.dropping = false;
        self.answers.clear();
        if !matches!(self.mode, Mode::StartingOver | Mode::Refused | Mode::Comparing) {
            self.mode = Mode::Down;
        }
        self.held = None;
        self.sent_to = self.state.number;
        self.backlog.forget_loaded();
        // References are good under the lost lease only, and batches that were only verified have no bytes.
        if self.catch_up.take().is_some() || self.slots.iter().any(Slot::needs_its_session) {
            self.reset();
        }
        if self.mode != Mode::Refused {
            self.last_reason = Some(reason.to_owned());
        }
        self.events.push_back(StreamEvent::Down { reason: reason.to_owned() });
    }

    fn give_up_link(&mut self, reason: String) {
        if !self.dropping {
            self.last_reason = Some(reason.clone());
            self.drop_link = Some(reason);
            self.dropping = true;
        }
    }

    /// Forgets everything that can be made again, and begins behind what is durable or being put into the log.
    fn reset(&mut self) {
        self.epoch += 1;
        let kept = self.slots.iter().position(|slot| slot.logged.is_none()).unwrap_or(self.slots.len());
        self.slots.truncate(kept);
        self.catch_up = None;
        self.volumes_said = false;
        let (position, flags) = match self.slots.back() {
            Some(last) => (last.end, last.after),
            None => (self.base().position, self.base().flags),
        };
        self.source.rewind();
        resume::skip_to(&mut self.source, position);
        self.drain.reset(position, flags);
    }

    /// Batches wait for being sent.
    fn has_unsent(&self) -> bool {
        self.loaded(self.sent_to.next()).is_some()
            || self.slots.iter().any(|slot| slot.is_ready() && slot.number > self.sent_to)
    }

    /// Batches may be sent.
    fn is_sending(&self) -> bool {
        self.link.is_some()
            && self.mode == Mode::Live
            && self.paused.is_none()
            && self.catch_up.is_none()
            && !self.dropping
    }

    fn tick(&mut self, now: Now) {
        let limited = self.mode == Mode::Live
            && self.paused.is_none()
            && (!self.window_has_room() || self.link_full || !self.bucket.is_open(now))
            && (self.drain.waiting_bytes() > 0 || self.has_unsent());
        self.meter.handle_busy(now, self.mode == Mode::Live && !self.slots.is_empty());
        self.level.handle_limited(now, limited);
        self.level.handle_timeout(now);
        self.look_at_log(now);
    }
}

impl<S: RingSource> std::fmt::Debug for Streamer<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streamer")
            .field("mode", &self.mode)
            .field("state", &self.state)
            .field("slots", &self.slots.len())
            .finish_non_exhaustive()
    }
}
