//! The driver of a [`Target`]: threads, clocks and the link. Holds no state of its own.
//!
//! ```text
//! link threads ──events──▶ front thread ──inbox──▶ one thread per stream (journal, group commits) ──▶ link
//!                                                  one background thread (frame check, merging, retention)
//! ```

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use farshore_link::identity::{Identity, Keys};
use farshore_link::quic::{HEADROOM_BYTES, RecvBuf, RecvLease, TargetEvent, TargetLimits, TargetLink};
use farshore_proto::{Now, WallTime};
use farshore_uring::{AlignedBuf, Storage};

use crate::alarm::AlarmCode;
use crate::check::{Checker, Progress};
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::GroupHost;
use crate::ingest::BatchBuf;
use crate::keys::TargetKeys;
use crate::lane::{Lane, Output, SessionId};
use crate::pace::Pace;
use crate::retention::{Mover, Step};
use crate::target::{Peer, StreamKey, Target};

/// Events that may wait for the front thread. Batches among them are bounded by the link in bytes; a link thread that
/// finds the queue full waits, which is back-pressure.
const EVENTS_MAX: usize = 1 << 14;
/// Longest sleep of a thread: bounds how late it sees a change that nobody woke it for.
const SLEEP_MAX: Duration = Duration::from_millis(500);
/// Age of a hold from which on a person is reminded of it: tests and failovers take days at most, and what is held only grows.
const HOLD_OLD: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a session may be up without a greeting: a source greets at once, and gives up after as long.
pub(crate) const GREETING_MAX: Duration = Duration::from_secs(30);
/// How long a refused source has to read why before its session is closed.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// Pause of the background thread when there is nothing to do.
const IDLE: Duration = Duration::from_secs(1);

/// The clocks of a driver. Wall time goes on from its start by the monotonic clock, so that a step of the system's clock
/// neither ages points nor dates them into the future.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    wall: u64,
}

impl Clock {
    /// A clock that begins now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place of this driver that reads the clocks")]
    pub fn begin() -> Self {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { start: Instant::now(), wall: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX) }
    }

    /// Monotonic time.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place of this driver that reads the clocks")]
    pub fn now(&self) -> Now {
        Now(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Wall time.
    #[must_use]
    pub fn wall(&self) -> WallTime {
        WallTime(self.wall.saturating_add(self.now().0))
    }
}

/// Keeps other processes off a data folder while it lives.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

impl DataLock {
    /// Locks `folder` (created if missing).
    ///
    /// # Errors
    /// [`Kind::Refused`] when another process has it; [`Kind::Storage`] when it cannot be written to.
    pub fn acquire(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).at("create the data folder", folder)?;
        let path = folder.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .at("write to the data folder (is it read-only?): open", &path)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                let what =
                    format!("{}: another farshore target uses this data folder: stop it first", folder.display());
                Err(Error::new(Kind::Refused, what))
            }
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &path, error)),
        }
    }
}

/// The keys of a target's identity.
///
/// # Errors
/// [`Kind::Refused`] for the identity of another role.
pub fn target_keys(identity: &Identity) -> Result<TargetKeys> {
    match &identity.keys {
        Keys::Vault(keys) => TargetKeys::new(identity.vault, keys.iter().cloned()),
        Keys::None | Keys::Host(_) => {
            let what = format!(
                "the identity is of {} {}: a target needs one issued with --role target",
                identity.role, identity.name
            );
            Err(Error::new(Kind::Refused, what))
        }
    }
}

/// A received batch, with its part of the session's allowance.
struct LinkBatch {
    buf: AlignedBuf,
    len: usize,
    _lease: RecvLease,
}

impl LinkBatch {
    fn new(received: RecvBuf) -> Self {
        let len = received.len();
        let (buf, lease) = received.into_parts();
        Self { buf, len, _lease: lease }
    }
}

impl BatchBuf for LinkBatch {
    fn bytes(&self) -> &[u8] {
        &self.buf[HEADROOM_BYTES..HEADROOM_BYTES + self.len]
    }

    fn with_headroom(&mut self) -> &mut [u8] {
        &mut self.buf[..HEADROOM_BYTES + self.len]
    }
}

const _: () = assert!(HEADROOM_BYTES == crate::segment::ALIGN);

/// What a session's end waits for: when, which, why.
type Closing = (Now, SessionId, String);

struct Shared<S: Storage> {
    target: Arc<Target<S>>,
    link: TargetLink,
    clock: Clock,
    stop: AtomicBool,
    closing: Mutex<Vec<Closing>>,
}

/// A running target.
pub struct Server<S: Storage> {
    shared: Arc<Shared<S>>,
    events: Sender<TargetEvent>,
    front: Option<JoinHandle<()>>,
    background: Option<JoinHandle<()>>,
}

impl<S: Storage> Server<S> {
    /// Listens on `address` and starts the threads.
    ///
    /// # Errors
    /// From the link (address in use, wrong role) or from starting threads.
    pub fn start(
        target: Arc<Target<S>>,
        address: SocketAddr,
        identity: Arc<Identity>,
        limits: TargetLimits,
    ) -> Result<Self> {
        let (events, inbox) = channel::bounded(EVENTS_MAX);
        let sink = events.clone();
        let link = TargetLink::listen(address, identity, limits, move |event| {
            // The front thread is gone only when the server stops; then nobody waits for events.
            let _gone = sink.send(event);
        });
        let link =
            link.map_err(|error| Error::new(Kind::Refused, format!("listen on {address}: {error}")).caused(error))?;
        let shared = Arc::new(Shared {
            target,
            link,
            clock: Clock::begin(),
            stop: AtomicBool::new(false),
            closing: Mutex::default(),
        });
        let front = spawn("target-front", {
            let shared = Arc::clone(&shared);
            move || Front::new(shared).run(&inbox)
        })?;
        let background = spawn("target-background", {
            let shared = Arc::clone(&shared);
            move || run_background(&shared)
        })?;
        Ok(Self { shared, events, front: Some(front), background: Some(background) })
    }

    /// The link's address, with the port that was chosen.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.link.local_addr()
    }

    /// The target.
    #[must_use]
    pub fn target(&self) -> &Arc<Target<S>> {
        &self.shared.target
    }

    /// The link, for its sessions, deny list and renewed identities.
    #[must_use]
    pub fn link(&self) -> &TargetLink {
        &self.shared.link
    }

    /// The clocks by which it runs.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.shared.clock
    }

    /// Ends sessions and threads; what was acknowledged is durable anyhow. Also done on drop.
    pub fn stop(&mut self) {
        if self.shared.stop.swap(true, Ordering::SeqCst) {
            return;
        }
        self.shared.link.stop();
        // Wakes the front thread at once; it would see the flag after its longest sleep anyhow.
        let _full = self.events.try_send(TargetEvent::Down { session: 0, reason: "stop".into() });
        for thread in [self.front.take(), self.background.take()].into_iter().flatten() {
            if thread.join().is_err() {
                tracing::error!("a thread of the target died of a panic");
            }
        }
    }
}

impl<S: Storage> Drop for Server<S> {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|error| Error::new(Kind::Storage, format!("start thread {name}: {error}")).caused(error))
}

impl<S: Storage> Shared<S> {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn carry_out(&self, output: Output) {
        match output {
            Output::Control { session, bytes } => {
                if let Err(error) = self.link.send_control(session, bytes) {
                    // The session's end is reported by the link itself; a full queue means that the source does not read.
                    tracing::debug!(session, %error, "a message was not sent");
                    self.link.close(session, "messages to it pile up");
                }
            }
            Output::Close { session, reason } => {
                tracing::info!(session, reason, "ending a session");
                let due = self.clock.now().plus(CLOSE_GRACE);
                self.closing.lock().unwrap_or_else(PoisonError::into_inner).push((due, session, reason));
            }
        }
    }

    /// Ends the sessions whose time has come.
    fn close_due(&self) {
        let now = self.clock.now();
        let mut closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        let (due, later) = std::mem::take(&mut *closing).into_iter().partition(|(at, ..)| *at <= now);
        *closing = later;
        drop(closing);
        let due: Vec<Closing> = due;
        for (_, session, reason) in due {
            self.link.close(session, &reason);
        }
    }
}

struct Front<S: Storage> {
    shared: Arc<Shared<S>>,
    /// Sessions without a greeting, and until when. Bounded by the link's sessions.
    fresh: BTreeMap<SessionId, Now>,
    lanes: BTreeMap<StreamKey, (Sender<()>, JoinHandle<()>)>,
}

impl<S: Storage> Front<S> {
    fn new(shared: Arc<Shared<S>>) -> Self {
        Self { shared, fresh: BTreeMap::new(), lanes: BTreeMap::new() }
    }

    fn run(mut self, inbox: &Receiver<TargetEvent>) {
        while !self.shared.stopping() {
            match inbox.recv_timeout(SLEEP_MAX) {
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            while let Some(output) = self.shared.target.poll_own_output() {
                self.shared.carry_out(output);
            }
            self.end_silent();
            self.shared.close_due();
        }
        for (_, (wake, thread)) in std::mem::take(&mut self.lanes) {
            drop(wake);
            if thread.join().is_err() {
                tracing::error!("a stream's thread died of a panic");
            }
        }
    }

    fn handle(&mut self, event: TargetEvent) {
        let target = Arc::clone(&self.shared.target);
        let key = match event {
            TargetEvent::Up { session, peer, address } => {
                tracing::info!(session, peer = peer.to_string(), %address, "a source is here");
                target.handle_up(session, Peer { role: peer.role, name: peer.name });
                self.fresh.insert(session, self.shared.clock.now().plus(GREETING_MAX));
                None
            }
            TargetEvent::Control { session, bytes } => {
                self.fresh.remove(&session);
                target.handle_control(session, bytes)
            }
            TargetEvent::Batch { session, bytes, .. } => target.handle_batch(session, Box::new(LinkBatch::new(bytes))),
            TargetEvent::Down { session, reason } => {
                tracing::info!(session, reason, "a source is gone");
                self.fresh.remove(&session);
                target.handle_down(session)
            }
            TargetEvent::Refused { address, reason } => {
                tracing::warn!(%address, reason, "somebody was not let in");
                None
            }
        };
        if let Some(key) = key {
            self.wake(key);
        }
    }

    /// Ends sessions that nobody greets in.
    fn end_silent(&mut self) {
        let now = self.shared.clock.now();
        let late: Vec<SessionId> = self.fresh.iter().filter(|(_, until)| **until <= now).map(|(id, _)| *id).collect();
        for session in late {
            self.fresh.remove(&session);
            tracing::warn!(session, "a source does not greet");
            self.shared.link.close(session, "no greeting");
        }
    }

    fn wake(&mut self, key: StreamKey) {
        if let Some((wake, _)) = self.lanes.get(&key) {
            // Full: a wake is waiting already.
            let _full = wake.try_send(());
            return;
        }
        let Some(lane) = self.shared.target.lane(&key) else { return };
        let (wake, woken) = channel::bounded(1);
        let _empty = wake.try_send(());
        let shared = Arc::clone(&self.shared);
        match spawn(&format!("lane-{}", key.0), move || run_lane(&shared, &lane, &woken)) {
            Ok(thread) => drop(self.lanes.insert(key, (wake, thread))),
            Err(error) => tracing::error!(%error, "a stream has no thread"),
        }
    }
}

fn run_lane<S: Storage>(shared: &Shared<S>, lane: &Lane<S>, woken: &Receiver<()>) {
    while !shared.stopping() {
        let now = shared.clock.now();
        let due = lane.run(now, shared.clock.wall());
        while let Some(output) = lane.poll_output() {
            shared.carry_out(output);
        }
        let sleep = due.map_or(SLEEP_MAX, |due| due.since(shared.clock.now()).min(SLEEP_MAX));
        if woken.recv_timeout(sleep) == Err(RecvTimeoutError::Disconnected) {
            break;
        }
    }
}

/// Background work of one stream.
struct Chores<S: Storage> {
    stream: Arc<GroupHost<S>>,
    checker: Checker<S>,
    pace: Pace,
    mover: Mover<S, GroupHost<S>>,
}

fn run_background<S: Storage>(shared: &Shared<S>) {
    let mut all: BTreeMap<StreamKey, Chores<S>> = BTreeMap::new();
    while !shared.stopping() {
        // No work is announced to this thread: it looks now and then.
        let mut wait = IDLE.min(SLEEP_MAX);
        for (key, lane) in shared.target.lanes() {
            let stream = Arc::clone(lane.stream());
            let chores = all.entry(key).or_insert_with(|| Chores {
                checker: Checker::new(Arc::clone(&stream)),
                pace: Pace::new(shared.clock.now()),
                mover: Mover::new(Arc::clone(&stream)),
                stream,
            });
            wait = wait.min(chores.step(&shared.stop, &shared.clock));
            if shared.stopping() {
                break;
            }
        }
        if !wait.is_zero() && !shared.stopping() {
            std::thread::park_timeout(wait);
        }
    }
    for chores in all.values_mut() {
        if let Err(error) = chores.checker.store() {
            tracing::warn!(stream = chores.stream.id.subject(), %error, "the place of the frame check was not stored");
        }
    }
}

impl<S: Storage> Chores<S> {
    /// One bounded step of each; gives the time after which there may be more to do.
    fn step(&mut self, stop: &AtomicBool, clock: &Clock) -> Duration {
        let subject = self.stream.id.subject();
        let mut wait =
            self.pace.wait(clock.now(), self.stream.counters.received_bytes.value(), self.checker.is_behind());
        if wait.is_zero() {
            let begin = clock.now();
            let checked = self.checker.step().unwrap_or_else(|error| {
                tracing::warn!(stream = subject, %error, "the frame check could not go on");
                Progress::Idle
            });
            self.pace.worked(begin, clock.now());
            wait = if checked == Progress::Idle { IDLE } else { Duration::ZERO };
        }
        let merged = self.stream.index.maintain(stop).unwrap_or_else(|error| {
            tracing::warn!(stream = subject, %error, "the index could not be merged");
            false
        });
        watch_holds(&self.stream, clock.wall());
        let moved = match self.mover.step(clock.wall()) {
            Ok(step) => {
                self.stream.alarms.clear(AlarmCode::RetentionStopped, &subject);
                step != Step::Idle
            }
            Err(error) => {
                self.stream.alarms.raise(AlarmCode::RetentionStopped, &subject, error.context());
                false
            }
        };
        if merged || moved { Duration::ZERO } else { wait }
    }
}

/// Reminds of the oldest hold, once it is old.
fn watch_holds<S: Storage>(stream: &GroupHost<S>, now: WallTime) {
    let record = stream.record();
    let subject = stream.id.subject();
    match record.holds.iter().min_by_key(|hold| hold.since).filter(|hold| now.since(hold.since) >= HOLD_OLD) {
        Some(hold) => {
            let since = farshore_proto::text::show_time(hold.since);
            let detail = format!(
                "hold {} keeps point {} and all later ones since {since}: {}",
                hold.id, hold.point, hold.reason
            );
            stream.alarms.raise(AlarmCode::HoldOld, &subject, &detail);
        }
        None => stream.alarms.clear(AlarmCode::HoldOld, &subject),
    }
}

#[cfg(test)]
mod tests {
    use farshore_proto::PointId;
    use farshore_uring::sim::SimStorage;

    use super::*;
    use crate::tests::source::{Clocked, Source, name};
    use crate::tests::{open, storage};

    /// Goal: a hold is reminded of when it is a week old, by its own words, and no more when it is removed.
    #[test]
    fn an_old_hold_is_reminded_of() {
        let disk: SimStorage = storage(11);
        let target = open(&disk).expect("a good disk");
        let mut source = Source::new("db", "host-a", 1);
        let mut world = Clocked::new(&target);
        source.connect(&mut world);
        source.join_all(&mut world);
        let stream = Arc::clone(&target.streams(&name("db")).expect("made")[&name("host-a")]);
        let point: PointId = stream.points().iter().last().expect("joined").id;
        let hold = stream.add_hold(point, "the auditors").expect("a point");
        let since = stream.record().holds[0].since;
        let after = |time: Duration| WallTime(since.0 + u64::try_from(time.as_nanos()).expect("short"));
        watch_holds(&stream, after(HOLD_OLD - Duration::from_secs(1)));
        assert_eq!(target.alarm_list(), []);
        watch_holds(&stream, after(HOLD_OLD));
        let alarms = target.alarm_list();
        assert_eq!(alarms.iter().map(|alarm| alarm.code).collect::<Vec<_>>(), [AlarmCode::HoldOld]);
        assert!(alarms[0].detail.contains("the auditors"), "{}", alarms[0].detail);
        stream.remove_hold(hold).expect("it is there");
        watch_holds(&stream, after(HOLD_OLD));
        assert_eq!(target.alarm_list(), []);
    }
}
