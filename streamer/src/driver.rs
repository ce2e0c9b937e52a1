//! The thread that runs a streamer over the shared ring and the link.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam::channel::bounded;
use crossbeam::sync::Parker;
use farshore_link::identity::Identity;
use farshore_link::quic::{BatchBytes, LinkStats, SourceEvent, SourceLink, SourceLinkConfig};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::{GroupId, Incarnation, Now, WallTime};
use farshore_ring::{CellRef, Consumer, Ring};
use farshore_uring::DirFile;

use crate::age::Age;
use crate::capture::CaptureRing;
use crate::disk_log::{GroupLog, LogOrder, LogWorker, ToWorker};
use crate::haste::Urgency;
use crate::inbox::{Inbox, Input};
use crate::machine::{StreamEvent, StreamStatus, Streamer, StreamerConfig};
use crate::pool::WorkPool;
use crate::seal::SegmentPool;
use crate::{Error, Result, RingSource};

/// While entries keep coming, the thread looks at the ring this often instead of being woken for each write, which would cost
/// the guest a system call per request. Also the default distance of cuts.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest sleep: heartbeat cuts and figures do not depend on it, only clocks that step do.
const SLEEP_MAX: Duration = Duration::from_secs(1);
/// Wait before asking the agent again to record something that it could not.
const RECORD_RETRY: Duration = Duration::from_secs(1);
/// Longest wait of another thread for the figures.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait at a stop for the disk log to take what the target did not.
const LOG_GRACE: Duration = Duration::from_secs(10);
/// Time between two looks at how much the stream is pressed.
const PRESSURE_INTERVAL: Duration = Duration::from_millis(100);

/// What the streamer needs of the group's capture, and what it tells it. Implemented by the agent over `CaptureGroup`,
/// `Cutter` and `Sync`; called on the streamer's thread.
pub trait Capture: Send {
    /// Makes a cut if it is time for one. `slot_free`: a batch could be shipped at once.
    fn cut(&mut self, now: Now, wall: &dyn Fn() -> WallTime, slot_free: bool);
    /// When to call [`Self::cut`] at the latest.
    fn cut_deadline(&self, slot_free: bool) -> Option<Now>;
    /// The ring is closed: opens it again, if enough of it is free.
    fn reopen(&mut self, consumer: &mut Consumer, wall: WallTime);
    /// Durably records `incarnation` and "compare everything", then gives the incarnation to the ring, which is empty
    /// afterwards and begins with an event. `false`: it could not be recorded; asked again.
    fn start_over(&mut self, consumer: &mut Consumer, incarnation: Incarnation, wall: WallTime, reason: &str) -> bool;
    /// Durably records "compare everything" and opens an event. `false`: it could not be recorded; asked again.
    fn compare_everything(&mut self, reason: &str) -> bool;
    /// Durably records that batches of this group are in the disk log from now on, in a line of this number. `false`: it could not be
    /// recorded; asked again.
    fn log_begins(&mut self, line: u64) -> bool;
    /// Durably records that none are any more. `false`: it could not be recorded; asked again.
    fn log_ends(&mut self) -> bool;
    /// Everything else that happens.
    fn event(&mut self, event: StreamEvent);
    /// The target cannot be reached; `fatal`: not before somebody acts.
    fn unreachable(&mut self, reason: &str, fatal: bool);
}

/// All figures of a group's stream.
#[derive(Clone, Debug, Default)]
pub struct StreamerStatus {
    /// Of the stream.
    pub stream: StreamStatus,
    /// Of the link; `wire_bytes_sent` is what the network carried.
    pub link: LinkStats,
    /// Round trip on the wire.
    pub link_rtt: Option<Duration>,
    /// Bytes of the disk log that this group takes, and of all of it.
    pub log_bytes: (u64, u64),
}

/// Wakes a streamer's thread: for the ring's producers, and after something was asked of the cutter. Never waits.
#[derive(Clone)]
pub struct StreamWaker(Inbox);

impl StreamWaker {
    /// Wakes it.
    pub fn wake(&self) {
        self.0.wake();
    }
}

/// A running streamer. Dropping it stops it without draining.
pub struct StreamerHandle {
    inbox: Inbox,
    link: Arc<SourceLink>,
    thread: Option<JoinHandle<StreamerStatus>>,
    stop: Arc<StopRequest>,
}

#[derive(Default)]
struct StopRequest {
    /// Nanoseconds that may be spent on draining.
    drain: std::sync::atomic::AtomicU64,
}

impl StreamerHandle {
    /// Starts the link, the workers and the thread. `disk_log`: with what it holds in [`StreamerConfig::disk_log`].
    ///
    /// # Errors
    /// The ring has a consumer already or its state is another ring's; the link cannot be set up; a thread cannot be started.
    pub fn start(
        config: StreamerConfig,
        link: SourceLinkConfig,
        identity: Arc<Identity>,
        ring: &Arc<Ring>,
        disk_log: Option<GroupLog<DirFile>>,
        capture: impl FnOnce(StreamWaker) -> Box<dyn Capture>,
    ) -> Result<Self> {
        let parker = Parker::new();
        let inbox = Inbox::new(parker.unparker().clone());
        let clock = Clock::new();
        let segments = SegmentPool::new(config.window_bytes + config.window_bytes / 4);
        let group = GroupId::derive(config.session.vault, &config.session.group);
        let thread_name = format!("stream-{}", config.session.group);
        let (host_key, workers) = (config.session.host_key.clone(), config.workers);
        let source = CaptureRing::new(Arc::clone(ring))?;
        let streamer = Streamer::new(clock.now(), config, source, Box::new(fresh_bytes))?;
        let to_thread = inbox.clone();
        let pool =
            WorkPool::start(workers, &host_key, group, &segments, move |done| to_thread.push(Input::Done(done)))?;
        let to_thread = inbox.clone();
        let log = disk_log.map(|log| {
            let name = format!("log-{}", thread_name.trim_start_matches("stream-"));
            let line = log.line().number;
            let worker = LogWorker::start(name, log, move |done| to_thread.push(Input::Log(done)))?;
            Ok::<_, Error>(DiskLogUse { worker, line, pending: None })
        });
        let log = log.transpose()?;
        let to_thread = inbox.clone();
        let link =
            SourceLink::start(link, identity, move |event| to_thread.push(Input::Link(event))).map_err(Error::Link)?;
        let link = Arc::new(link);
        let stop = Arc::<StopRequest>::default();
        let driver = Driver {
            streamer,
            capture: capture(StreamWaker(inbox.clone())),
            pool,
            link: Arc::clone(&link),
            inbox: inbox.clone(),
            parker,
            clock,
            pending: None,
            log,
            stopping: None,
            stop: Arc::clone(&stop),
            urgency: (clock.now(), Urgency::default()),
            age: Age::new(clock.now()),
        };
        let thread = std::thread::Builder::new().name(thread_name.clone()).spawn(move || {
            farshore_uring::work_in_background();
            driver.run()
        });
        let thread = thread.map_err(|source| Error::Thread { name: thread_name, source })?;
        Ok(Self { inbox, link, thread: Some(thread), stop })
    }

    /// Wakes the thread.
    #[must_use]
    pub fn waker(&self) -> StreamWaker {
        StreamWaker(self.inbox.clone())
    }

    /// The figures now; `None` if the thread does not answer.
    #[must_use]
    pub fn status(&self) -> Option<StreamerStatus> {
        let (sender, receiver) = bounded(1);
        self.inbox.push(Input::Status(sender));
        receiver.recv_timeout(STATUS_TIMEOUT).ok()
    }

    /// Changes the group's volumes.
    pub fn set_volumes(&self, volumes: Vec<VolumeDecl>) {
        self.inbox.push(Input::Volumes(volumes));
    }

    /// Changes the bandwidth limit, bytes per second.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.inbox.push(Input::Rate(rate));
    }

    /// Tries to reach the target now.
    pub fn retry_now(&self) {
        self.link.retry_now();
    }

    /// Uses a renewed identity from the next connection on.
    ///
    /// # Errors
    /// An identity of another role.
    pub fn replace_identity(&self, identity: Arc<Identity>) -> Result<()> {
        self.link.replace_identity(identity).map_err(Error::Link)
    }

    /// Ships what is in the ring, for at most `drain` (the front ends have stopped writing), and ends. Gives the last figures:
    /// `lag_bytes` 0 and an empty ring say that everything is durable at the target. The ring's consumer is free afterwards.
    #[must_use]
    pub fn stop(mut self, drain: Duration) -> StreamerStatus {
        self.shut_down(drain)
    }

    fn shut_down(&mut self, drain: Duration) -> StreamerStatus {
        let Some(thread) = self.thread.take() else { return StreamerStatus::default() };
        // To the link's last word.
        let _haste = farshore_uring::Haste::begin();
        let nanos = u64::try_from(drain.as_nanos()).unwrap_or(u64::MAX);
        self.stop.drain.store(nanos, std::sync::atomic::Ordering::Relaxed);
        self.inbox.push(Input::Stop);
        let status = thread.join().unwrap_or_else(|_| {
            tracing::error!("the streamer's thread died of a panic");
            StreamerStatus::default()
        });
        self.link.stop();
        status
    }
}

impl Drop for StreamerHandle {
    fn drop(&mut self) {
        self.shut_down(Duration::ZERO);
    }
}

impl std::fmt::Debug for StreamerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamerHandle").field("link", &self.link).finish_non_exhaustive()
    }
}

/// Something that the agent must record before the stream goes on.
enum Pending {
    Compare(String),
    StartOver(Incarnation, String),
}

/// The group's disk log.
struct DiskLogUse {
    worker: LogWorker,
    /// Number of its line, or of the next one.
    line: u64,
    /// What must be recorded before the log goes on, with the time of the next attempt.
    pending: Option<(Now, LogOrder)>,
}

struct Driver {
    streamer: Streamer<CaptureRing>,
    capture: Box<dyn Capture>,
    pool: WorkPool<CellRef>,
    link: Arc<SourceLink>,
    inbox: Inbox,
    parker: Parker,
    clock: Clock,
    /// With the time of the next attempt.
    pending: Option<(Now, Pending)>,
    log: Option<DiskLogUse>,
    /// When draining ends.
    stopping: Option<Now>,
    stop: Arc<StopRequest>,
    /// With the time of the next look.
    urgency: (Now, Urgency),
    age: Age,
}

impl Driver {
    fn run(mut self) -> StreamerStatus {
        loop {
            let before = self.streamer.source_mut().head();
            while let Some(input) = self.inbox.pop() {
                self.take(input);
            }
            let more = self.turn();
            if self.stopping.is_some_and(|end| self.has_stopped(end)) {
                return self.finish();
            }
            if !more {
                let quiet = self.streamer.source_mut().head() == before;
                self.sleep(quiet);
            }
        }
    }

    fn take(&mut self, input: Input) {
        let now = self.clock.now();
        match input {
            Input::Link(SourceEvent::Up { session, .. }) => {
                if let Err(error) = self.streamer.handle_link_up(now, session) {
                    tracing::error!(%error, "the target cannot be greeted");
                    self.link.close_session(session, "no greeting");
                }
            }
            Input::Link(SourceEvent::Control { session, bytes }) => self.streamer.handle_control(now, session, &bytes),
            Input::Link(SourceEvent::BatchSent { session, .. }) => self.streamer.handle_sent(session),
            Input::Link(SourceEvent::Down { session, reason, fatal }) => {
                self.streamer.handle_link_down(now, session, &reason);
                self.capture.unreachable(&reason, fatal);
            }
            Input::Done(done) => self.streamer.handle_done(now, done),
            Input::Log(done) => self.streamer.handle_log(now, done),
            Input::Status(sender) => {
                // An asker that went away does not matter.
                let _ = sender.send(self.status());
            }
            Input::Volumes(volumes) => {
                if let Err(error) = self.streamer.set_volumes(volumes) {
                    tracing::error!(%error, "the target cannot be told the volumes");
                }
            }
            Input::Rate(rate) => self.streamer.set_rate(now, rate),
            Input::Stop => {
                let drain = Duration::from_nanos(self.stop.drain.load(std::sync::atomic::Ordering::Relaxed));
                self.stopping = Some(now.plus(drain));
            }
        }
    }

    /// Everything that can be done without waiting. True: there is more to take from the ring.
    fn turn(&mut self) -> bool {
        let now = self.clock.now();
        self.age.handle_newest(now, self.streamer.state().newest_point);
        if let Some(session) = self.inbox.take_overrun() {
            self.link.close_session(session, "more control messages than can be taken");
        }
        if self.streamer.poll_deadline().is_some_and(|deadline| deadline <= now)
            && let Err(error) = self.streamer.handle_timeout(now)
        {
            tracing::error!(%error, "the target cannot be greeted");
        }
        let more = self.streamer.pull(now);
        let slot_free = self.slot_free();
        let clock = self.clock;
        self.capture.cut(now, &|| clock.wall(), slot_free);
        let more = self.streamer.pull(now) || more;
        self.move_output(now);
        self.record(now);
        if self.urgency.0 <= now {
            self.urgency.0 = now.plus(PRESSURE_INTERVAL);
            let pressure = self.streamer.pressure(self.clock.wall());
            self.urgency.1.handle(pressure, self.stopping.is_some());
        }
        if self.streamer.source_mut().is_closed() {
            let wall = self.clock.wall();
            self.capture.reopen(self.streamer.source_mut().consumer_mut(), wall);
        }
        more
    }

    /// All that can be done before the process ends is done. What the target does not take in time goes to the disk log, if there is one.
    fn has_stopped(&mut self, end: Now) -> bool {
        let now = self.clock.now();
        if self.streamer.is_drained() {
            return true;
        }
        let (late, gone) = (end <= now, !self.streamer.is_live());
        // Without cuts nothing goes there.
        if !self.streamer.can_log() || self.capture.cut_deadline(true).is_none() {
            return late;
        }
        if late || gone {
            self.streamer.log_everything(now);
        }
        late && (self.streamer.is_kept() || end.plus(LOG_GRACE) <= now)
    }

    fn slot_free(&self) -> bool {
        self.streamer.slot_free() || self.streamer.wants_cut() || self.stopping.is_some()
    }

    fn move_output(&mut self, now: Now) {
        while let Some(work) = self.streamer.poll_work(now) {
            assert!(self.pool.give(work).is_some(), "a worker thread died of a panic");
        }
        while let Some((session, bytes)) = self.streamer.poll_control() {
            if let Err(error) = self.link.send_control(session, bytes) {
                self.link.close_session(session, &error.to_string());
            }
        }
        while let Some(out) = self.streamer.poll_batch(now) {
            let bytes = BatchBytes::from(out.batch.pieces);
            if let Err(unsent) = self.link.send_batch(out.session, out.number.0, bytes) {
                let full = matches!(unsent.error, farshore_link::Error::Full { .. });
                self.streamer.handle_unsent(out.session, out.number, full);
                break;
            }
        }
        self.obey_log(now);
        if let Some((session, reason)) = self.streamer.poll_drop() {
            tracing::warn!(reason, "session with the target dropped");
            self.link.close_session(session, &reason);
        }
        while let Some(event) = self.streamer.poll_event() {
            match event {
                StreamEvent::CompareEverything { reason } => self.pending = Some((now, Pending::Compare(reason))),
                StreamEvent::StartOver { incarnation, reason } => {
                    self.pending = Some((now, Pending::StartOver(incarnation, reason)));
                }
                StreamEvent::Greeted(_)
                | StreamEvent::Live
                | StreamEvent::Durable(_)
                | StreamEvent::Answers(_)
                | StreamEvent::Down { .. }
                | StreamEvent::Paused { .. }
                | StreamEvent::Resumed
                | StreamEvent::Log(_)
                | StreamEvent::Refused { .. } => self.capture.event(event),
            }
        }
    }

    /// Passes the streamer's orders on to the log's thread; what must be recorded first is.
    fn obey_log(&mut self, now: Now) {
        let Some(log) = &mut self.log else { return };
        loop {
            let order = match log.pending.take() {
                Some((at, order)) if at <= now => order,
                Some(early) => {
                    log.pending = Some(early);
                    return;
                }
                None => match self.streamer.poll_log(now) {
                    Some(order) => order,
                    None => return,
                },
            };
            let recorded = match &order {
                LogOrder::Begin => self.capture.log_begins(log.line),
                LogOrder::End | LogOrder::GiveUp => self.capture.log_ends(),
                LogOrder::Append { .. } | LogOrder::Load { .. } | LogOrder::Trim { .. } | LogOrder::Probe { .. } => {
                    true
                }
            };
            if !recorded {
                log.pending = Some((now.plus(RECORD_RETRY), order));
                return;
            }
            match order {
                LogOrder::Begin => self.streamer.handle_log_begun(),
                LogOrder::End | LogOrder::GiveUp => {
                    let fresh = fresh_bytes();
                    let next = u64::from_le_bytes(std::array::from_fn(|i| fresh[i]));
                    if log.worker.give(ToWorker::Clear(next)).is_err() {
                        log.pending = Some((now.plus(LOOK_INTERVAL), order));
                        return;
                    }
                    log.line = next;
                    self.streamer.handle_log_ended();
                }
                LogOrder::Append { .. } | LogOrder::Load { .. } | LogOrder::Trim { .. } | LogOrder::Probe { .. } => {
                    if let Err(ToWorker::Order(order)) = log.worker.give(ToWorker::Order(order)) {
                        log.pending = Some((now.plus(LOOK_INTERVAL), order));
                        return;
                    }
                }
            }
        }
    }

    /// What must be on disk before the stream goes on.
    fn record(&mut self, now: Now) {
        let Some((_, pending)) = self.pending.take_if(|(at, _)| *at <= now) else { return };
        let done = match &pending {
            Pending::Compare(reason) => {
                let done = self.capture.compare_everything(reason);
                if done {
                    self.streamer.handle_compared(now);
                }
                done
            }
            Pending::StartOver(incarnation, reason) => {
                let wall = self.clock.wall();
                let consumer = self.streamer.source_mut().consumer_mut();
                let done = self.capture.start_over(consumer, *incarnation, wall, reason);
                if done {
                    self.streamer.handle_started_over(now, *incarnation);
                }
                done
            }
        };
        if done {
            self.move_output(now);
        } else {
            self.pending = Some((now.plus(RECORD_RETRY), pending));
        }
    }

    /// Waits for something to happen. `quiet`: the ring has not moved since the last look, so its producers are asked to wake us.
    fn sleep(&mut self, quiet: bool) {
        let now = self.clock.now();
        let cut = self.capture.cut_deadline(self.slot_free());
        let record = self.pending.as_ref().map(|(at, _)| *at);
        let log = self.log.as_ref().and_then(|log| Some(log.pending.as_ref()?.0));
        let stop = self.stopping.map(|end| if end <= now { end.plus(LOG_GRACE) } else { end });
        let deadlines = [self.streamer.poll_deadline(), cut, record, log, stop];
        let next = deadlines.into_iter().flatten().min().map_or(SLEEP_MAX, |at| at.since(now)).min(SLEEP_MAX);
        if !quiet || !self.streamer.takes_entries() {
            self.parker.park_timeout(next.min(LOOK_INTERVAL));
            return;
        }
        let consumer = self.streamer.source_mut().consumer_mut();
        if consumer.prepare_sleep() {
            self.parker.park_timeout(next);
        }
        self.streamer.source_mut().consumer_mut().woke();
    }

    fn status(&self) -> StreamerStatus {
        let mut stream = self.streamer.status(self.clock.wall());
        stream.rpo = stream.rpo.map(|rpo| self.age.at_least(self.clock.now(), rpo));
        let log_bytes = self
            .log
            .as_ref()
            .map_or((0, 0), |log| (log.worker.used.load(std::sync::atomic::Ordering::Relaxed), log.worker.size));
        StreamerStatus { stream, link: self.link.stats(), link_rtt: self.link.rtt(), log_bytes }
    }

    fn finish(mut self) -> StreamerStatus {
        self.streamer.say_bye();
        let now = self.clock.now();
        self.move_output(now);
        let status = self.status();
        if let Some(log) = self.log.take() {
            log.worker.stop(self.streamer.can_log());
        }
        status
    }
}

/// The process's clocks.
#[derive(Clone, Copy)]
struct Clock {
    zero: Instant,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the driver is where the clock is read")]
    fn new() -> Self {
        Self { zero: Instant::now() }
    }

    #[expect(clippy::disallowed_methods, reason = "the driver is where the clock is read")]
    fn now(self) -> Now {
        let since = Instant::now().saturating_duration_since(self.zero);
        Now(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    #[expect(clippy::disallowed_methods, reason = "the driver is where the clock is read")]
    fn wall(self) -> WallTime {
        // Before 1970 the clock is wrong anyway; a point's time is then shown as that.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }
}

fn fresh_bytes() -> [u8; 32] {
    let mut bytes = [0; 32];
    // The system's generator fails only where the system is not one that we run on.
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
