//! The host's activity log: its file, the threads that keep it, and what the state directory says about it.
//!
//! ```text
//! farshore-log      turns the keeper: waits for the log's disk alone
//! farshore-flush    flushes backing devices, so that extents can leave
//! farshore-stall    lets guests go on when the log keeps them for `stall_max`; waits for no disk
//! farshore-cover    records in the state directory whether the log covers everything: waits for that disk alone
//! ```
//!
//! Crash safety (I4). The state directory names the life whose log is to be believed, and whether it covered everything:
//! 1. it says so only when it does: all groups were started, and all that was asked for was answered;
//! 2. before a request goes past the log, recording the opposite has begun (at half of `stall_max`); if that fails too, an alarm says so
//!    until it succeeds;
//! 3. a log of another life than the one named is not believed.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_blkfilter::activity::{
    ActivityLog, FlushJob, Found, GroupActivity, Keeper, KeeperConfig, Loaded, VolumeKey, is_log,
};
use farshore_proto::{GroupId, HostId, LogMark, Now, VolumeIndex};
use farshore_streamer::StreamLog;
use farshore_uring::{DirFile, DirStorage};
use serde_json::{Value, json};

use crate::alarms::{Alarms, code};
use crate::attach::boot_text;
use crate::config::AgentConfig;
use crate::own_file::{self, fresh};
use crate::state::{LogState, StateDir, look_at_log};
use crate::{Error, Result, clock};

/// Name of the log in the state directory.
const FILE: &str = "activity.log";
/// Between two looks at marks that may not be needed any more.
const TIDY: Duration = Duration::from_secs(2);
/// Between two parts of such a look.
const TIDY_ON: Duration = Duration::from_millis(20);
/// Time between two flushes that nobody waits for.
const FLUSH_AHEAD: Duration = Duration::from_secs(1);
/// Longest wait of a thread that has nothing to do.
const IDLE: Duration = Duration::from_secs(10);
/// Between two attempts to write a log, or a state, that failed.
pub(crate) const RETRY: Duration = Duration::from_secs(1);
/// The log has to cover everything for so long before that is recorded again: a disk that is slow now and then would have the
/// state written all the time.
pub(crate) const CALM: Duration = Duration::from_secs(10);
/// Longest wait of a start for the log, where guests of an earlier process wait all the while, and where nobody does.
pub(crate) const START_MAX: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// Longest wait of a start until the log has what is marked.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// Longest wait of a stop for threads that may wait for a disk.
const STOP_MAX: Duration = Duration::from_secs(2);
/// Before any group is known. As long as a policy may say.
const STALL_MAX: Duration = Duration::from_secs(5);
/// Pause after a flush that failed.
const FLUSH_PAUSE: Duration = Duration::from_millis(100);

/// The log and its threads. They end when this is dropped.
pub(crate) struct Activity {
    inner: Arc<Inner>,
    loaded: Loaded,
    path: PathBuf,
    last_boot: String,
    /// Groups that there were at the start.
    groups: BTreeSet<GroupId>,
    threads: Vec<JoinHandle<()>>,
    /// No two agents write one log.
    _lock: Option<File>,
}

struct Inner {
    log: Arc<ActivityLog>,
    alarms: Arc<Alarms>,
    store: StateDir<DirStorage>,
    /// What is recorded, with the right session.
    record: Mutex<Record>,
    state: Mutex<Signals>,
    changed: Condvar,
    /// What was recorded last says that the log covers everything, and nothing else is wanted.
    covered: AtomicBool,
    /// Backing devices of an earlier process that are being flushed.
    unflushed: AtomicU64,
    /// Beside the rings, while guests go past the log.
    flag: PathBuf,
    /// The shortest of all groups'.
    stall_max: Mutex<Duration>,
    /// The last life's log covered everything, so this one does from its first moment.
    covers_last: bool,
    /// Something happened that the log can never make up for in this life.
    spoilt: AtomicBool,
}

/// What the recorder has to do.
struct Record {
    kept: LogState,
    wanted: bool,
    /// Since when `wanted` is what it is.
    since: Now,
    /// The last attempt to record failed.
    unsure: bool,
    /// A flush failed in this boot.
    unstable: bool,
}

#[derive(Default)]
struct Signals {
    work: bool,
    flushed: bool,
    stop: bool,
    /// All groups were started; when so many were answered and obeyed, what they found is covered.
    started: Option<(u64, u64)>,
    /// Groups whose target has a batch of this life.
    heard: BTreeSet<GroupId>,
    forget_lives: bool,
    /// Marks may not be needed any more.
    tidy: bool,
}

impl Activity {
    /// Opens the log and begins a life of it. `known`: every volume that there is, and every group that cannot be read. `None`: there is no
    /// log in this life, and an alarm says so; nobody waits long for that.
    ///
    /// # Errors
    /// [`Error::Refused`]: something else is where the log should be, or another agent's log.
    pub(crate) fn start(
        config: &Arc<AgentConfig>,
        host: HostId,
        store: &StateDir<DirStorage>,
        alarms: &Arc<Alarms>,
        known: Known,
        limit: Duration,
    ) -> Result<Option<Self>> {
        let path = place(config);
        let flag = config.ring_dir.join(format!("farshore-{host}.passing"));
        let groups = known.groups.clone();
        let (sender, opened) = sync_channel(0);
        let (of_config, of_store) = (Arc::clone(config), store.clone());
        let open = move || Opened::open(&of_config, host, &of_store, &known);
        // Where a disk hangs, this thread waits for it and nobody else. What it has written by then says that nothing is covered.
        let thread = std::thread::Builder::new().name("farshore-log".into()).spawn(move || _ = sender.send(open()));
        thread.map_err(|error| Error::failed("activity log's thread", error))?;
        let failed = |reason: &str| {
            // For the next worker: this one covers nothing.
            note_passing(&flag);
            let text = format!(
                "{}: {reason}; guests go on without it, and after a crash of the host everything is compared",
                path.display()
            );
            alarms.raise(code::ACTIVITY, "", text);
            Ok(None)
        };
        let Opened { keeper, loaded, lock, kept, last_boot, covers_last } = match opened.recv_timeout(limit) {
            Ok(Ok(opened)) => opened,
            Ok(Err(error @ Error::Refused { .. })) => return Err(error),
            Ok(Err(error)) => return failed(&crate::error::chain(&error)),
            Err(_) => return failed("its disk, or that of the state directory, does not answer"),
        };
        // A worker that was killed while guests went past the log may not have got to saying so.
        let covers_last = covers_last && !flag.exists();
        alarms.clear(code::ACTIVITY, "");
        let inner = Arc::new(Inner {
            log: Arc::clone(keeper.log()),
            alarms: Arc::clone(alarms),
            store: store.clone(),
            spoilt: AtomicBool::new(kept.unstable),
            record: Mutex::new(Record {
                wanted: covers_last,
                since: clock::now(),
                unsure: false,
                unstable: kept.unstable,
                kept,
            }),
            covered: AtomicBool::new(false),
            unflushed: AtomicU64::new(0),
            flag: flag.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            stall_max: Mutex::new(STALL_MAX),
            covers_last,
        });
        // The log must not keep alive what keeps it.
        let wake = Arc::downgrade(&inner);
        inner.log.set_waker(move || _ = wake.upgrade().map(|inner| inner.signal(|state| state.work = true)));
        tracing::info!(
            path = %path.display(), found = ?loaded.found, active = loaded.active(), covers_last, "activity log"
        );
        let threads = inner.spawn(keeper)?;
        Ok(Some(Self { inner, loaded, path, last_boot, groups, threads, _lock: lock }))
    }

    /// What a group's queues need of it. They wait for it no longer than `stall_max`.
    pub(crate) fn of_group(&self, group: GroupId, stall_max: Duration) -> GroupActivity {
        let mut shortest = self.inner.stall_max.lock().unwrap_or_else(PoisonError::into_inner);
        *shortest = stall_max.min(*shortest);
        drop(shortest);
        GroupActivity { log: Arc::clone(&self.inner.log), group }
    }

    /// The last life's log is whole and covered everything: where a ring is lost, what it says is all that may differ.
    pub(crate) fn covers_last(&self) -> bool {
        self.inner.covers_last
    }

    /// Boot of the last life.
    pub(crate) fn last_boot(&self) -> &str {
        &self.last_boot
    }

    /// Ranges of a volume that may differ, by the last life's log: first byte and bytes.
    pub(crate) fn ranges(&self, group: &GroupId, volume: VolumeIndex) -> Vec<(u64, u64)> {
        self.loaded.ranges(group, volume)
    }

    /// For a stream: batches say where the log is for as long as it covers everything, so that a target hears of it when it does not. What was
    /// unknown after the last life is marked by what the log says by then, or everything is.
    pub(crate) fn of_stream(&self) -> StreamLog {
        let inner = Arc::clone(&self.inner);
        StreamLog { lives: self.loaded.lives.clone(), now: Arc::new(move || inner.mark()) }
    }

    /// Waits until so much was obeyed, or until nobody waits for the log any more: then it does not cover everything before it has obeyed
    /// that, too.
    pub(crate) fn wait_obeyed(&self, number: u64) {
        let end = clock::now().plus(SETTLE_MAX);
        let mut state = self.inner.state();
        while self.inner.log.obeyed() < number && !self.inner.log.passes() {
            let left = end.since(clock::now());
            if left.is_zero() {
                drop(state);
                self.inner.pass();
                return;
            }
            state = self.inner.wait(state, left);
        }
    }

    /// What `files` hold has to be stable before the log covers everything: by a thread of its own, for nobody knows how long a disk takes.
    pub(crate) fn flush_first(&self, files: Vec<Arc<File>>) {
        let inner = Arc::clone(&self.inner);
        inner.unflushed.fetch_add(1, Ordering::AcqRel);
        let flush = move || {
            if files.iter().any(|file| file.sync_data().is_err()) {
                inner.spoil("a volume of an earlier process could not be flushed");
            }
            inner.unflushed.fetch_sub(1, Ordering::AcqRel);
            inner.signal(|state| state.work = true);
        };
        if std::thread::Builder::new().name("farshore-flush".into()).spawn(flush).is_err() {
            self.spoil("a volume of an earlier process could not be flushed");
        }
    }

    /// What was there before cannot be covered any more, in this life.
    pub(crate) fn spoil(&self, reason: &str) {
        self.inner.spoil(reason);
    }

    /// All groups have been started: from here on the log can cover everything.
    pub(crate) fn handle_started(&self) {
        let found = (self.inner.log.asked(), self.inner.log.ordered());
        self.inner.signal(|state| {
            state.started = Some(found);
            state.work = true;
        });
    }

    /// The target of a group has a batch of this life. When those of all groups have, earlier lives need not be remembered.
    pub(crate) fn handle_heard(&self, group: GroupId) {
        let mut state = self.inner.state();
        if state.heard.insert(group) && self.groups.is_subset(&state.heard) {
            state.forget_lives = true;
            state.work = true;
            self.inner.changed.notify_all();
        }
    }

    /// A resync has ended.
    pub(crate) fn handle_whole(&self) {
        self.inner.signal(|state| {
            state.tidy = true;
            state.work = true;
        });
    }

    /// For `status`.
    pub(crate) fn document(&self, group: &GroupId, volumes: impl Iterator<Item = VolumeIndex>) -> Value {
        let log = &self.inner.log;
        json!({
            "path": self.path,
            "covers": self.inner.covered.load(Ordering::Acquire) && !log.passes(),
            "extents_max": log.places(),
            "active_extents": volumes.map(|volume| log.active(VolumeKey::new(group, volume))).sum::<u64>(),
            "marked_extents": log.marked(),
            "activations": log.asked(),
            "passed": log.passed(),
        })
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.inner.signal(|state| state.stop = true);
        if self.inner.log.is_used() {
            // Devices in use are served for as long as this process lives.
            self.inner.pass();
        }
        // Nobody waits for it from here on.
        self.inner.log.close();
        let end = clock::now().plus(STOP_MAX);
        while self.threads.iter().any(|thread| !thread.is_finished()) && clock::now() < end {
            drop(self.inner.wait(self.inner.state(), Duration::from_millis(10)));
        }
        for thread in self.threads.drain(..) {
            // One that waits for a disk ends with the process.
            if thread.is_finished() && thread.join().is_err() {
                tracing::error!("a thread of the activity log died of a panic");
            }
        }
    }
}

/// A log, opened.
struct Opened {
    keeper: Keeper<DirFile>,
    loaded: Loaded,
    lock: Option<File>,
    kept: LogState,
    last_boot: String,
    covers_last: bool,
}

impl Opened {
    fn open(config: &AgentConfig, host: HostId, store: &StateDir<DirStorage>, known: &Known) -> Result<Self> {
        let path = place(config);
        let before = store.read_log_state().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "nothing is known of the last activity log");
            None
        });
        refuse_foreign(
            &path,
            config.activity_log.is_none() || before.as_ref().is_some_and(|state| state.path == path),
        )?;
        let failed = |error: io::Error| {
            let foreign = error.kind() == io::ErrorKind::InvalidData;
            if foreign { refused(&path, &error.to_string()) } else { Error::io("open", &path, error) }
        };
        let opened = own_file::open(&path).and_then(|(file, lock)| {
            let random = (fresh()?, u64::from_le_bytes(fresh()?));
            Ok((Keeper::open(file, KeeperConfig { places: config.al_extents, owner: host.0 }, random)?, lock, random.1))
        });
        let ((mut keeper, loaded), lock, life) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // In this life nothing is covered.
                let mut none = LogState::new(&path, 0, before.as_ref().map_or_else(String::new, |it| it.boot.clone()));
                none.unstable = before.as_ref().is_some_and(|before| before.unstable);
                store.write_log_state(&none)?;
                return Err(failed(error));
            }
        };
        if let Found::Damaged(reason) = &loaded.found {
            tracing::warn!(path = %path.display(), reason, "the activity log is damaged: a new one is made");
        }
        let covers_last = before.as_ref().is_some_and(|state| state.path == path && state.covers(&loaded));
        // Says that nothing is covered, until somebody has taken it over and says otherwise.
        let mut kept = LogState::new(&path, life.max(1), boot_text()?);
        // What a flush that failed has dropped, no flush of this life brings back.
        kept.unstable = before.as_ref().is_some_and(|before| before.unstable && before.boot == kept.boot);
        keeper.retain(|volume| known.knows(volume));
        let begun = keeper.begin().map_err(|error| Error::io("write", &path, error));
        store.write_log_state(&kept)?;
        begun?;
        Ok(Self {
            keeper,
            loaded,
            lock,
            kept,
            last_boot: before.map(|state| state.boot).unwrap_or_default(),
            covers_last,
        })
    }
}

/// Volumes that a log may have extents of.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// All groups that have state.
    pub groups: BTreeSet<GroupId>,
    /// Groups whose volumes are not known.
    pub unread: BTreeSet<GroupId>,
    pub volumes: BTreeSet<VolumeKey>,
}

impl Known {
    fn knows(&self, volume: VolumeKey) -> bool {
        let unread = self.unread.iter().any(|group| VolumeKey::new(group, VolumeIndex(0)).group == volume.group);
        unread || self.volumes.contains(&volume)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, Signals> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spoil(&self, reason: &str) {
        tracing::warn!(reason, "the activity log does not cover everything until the next start");
        self.spoilt.store(true, Ordering::Release);
        self.want(false);
    }

    fn signal(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, Signals>, limit: Duration) -> MutexGuard<'a, Signals> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Sleeps; `true`: it is time to end.
    fn sleep(&self, time: Duration) -> bool {
        let end = clock::now().plus(time);
        let mut state = self.state();
        while !state.stop {
            let left = end.since(clock::now());
            if left.is_zero() {
                return false;
            }
            state = self.wait(state, left);
        }
        true
    }

    /// Where the log is, as far as it covers everything.
    fn mark(&self) -> LogMark {
        // The mark first: what becomes uncovered behind this look is in later batches.
        let mark = self.log.mark();
        if self.covered.load(Ordering::Acquire) && !self.log.passes() { mark } else { LogMark::default() }
    }

    /// Lets guests go on. What a worker that is killed now may not get to recording stands beside the rings, which it needs all the same.
    fn pass(&self) {
        self.want(false);
        {
            // Nobody who has just recorded that all is covered takes it away again.
            let _record = self.record();
            note_passing(&self.flag);
            self.log.pass();
        }
        self.want(false);
        self.signal(|_| {});
    }

    fn spawn(self: &Arc<Self>, keeper: Keeper<DirFile>) -> Result<Vec<JoinHandle<()>>> {
        let (jobs, to_do) = sync_channel(1);
        let mut threads = Vec::new();
        let mut spawn = |name: &str, run: Box<dyn FnOnce(&Self) + Send>| {
            let inner = Arc::clone(self);
            let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&inner));
            threads.push(thread.map_err(|error| Error::failed("activity log's thread", error))?);
            Ok::<(), Error>(())
        };
        spawn("farshore-log", Box::new(move |inner| inner.keep(keeper, &jobs)))?;
        spawn("farshore-flush", Box::new(move |inner| inner.flush(&to_do)))?;
        spawn("farshore-stall", Box::new(Self::watch_stalls))?;
        spawn("farshore-cover", Box::new(Self::keep_record))?;
        Ok(threads)
    }

    /// Turns the keeper.
    fn keep(&self, mut keeper: Keeper<DirFile>, jobs: &SyncSender<FlushJob>) {
        let mut tidy_due = clock::now().plus(TIDY);
        loop {
            let (forget, flushed, tidy) = {
                let mut state = self.state();
                while !state.work && !state.flushed && !state.stop && tidy_due > clock::now() {
                    state = self.wait(state, tidy_due.since(clock::now()));
                }
                if state.stop {
                    return;
                }
                let tidy = std::mem::take(&mut state.tidy) || tidy_due <= clock::now();
                state.work = false;
                (std::mem::take(&mut state.forget_lives), std::mem::take(&mut state.flushed), tidy)
            };
            if forget {
                keeper.handle_heard();
            }
            if flushed {
                keeper.handle_flushed();
            }
            let started = self.state().started;
            let tidied = if tidy { keeper.tidy() } else { Ok(false) };
            if tidy {
                tidy_due = clock::now().plus(if matches!(tidied, Ok(true)) { TIDY_ON } else { TIDY });
            }
            match tidied.and_then(|_| keeper.turn()) {
                Ok(turn) => {
                    if !turn.stable {
                        self.note_unstable();
                    }
                    let found = |(asked, ordered)| self.log.answered() >= asked && self.log.obeyed() >= ordered;
                    let flushed = self.unflushed.load(Ordering::Acquire) == 0;
                    let based = self.covers_last || (flushed && started.is_some_and(found));
                    self.want(turn.upheld && based && !self.spoilt.load(Ordering::Acquire));
                }
                Err(error) => {
                    if self.mend(&mut keeper, &error) {
                        return;
                    }
                    self.signal(|state| state.work = true);
                }
            }
            // Somebody may wait for what was answered.
            self.signal(|_| {});
            if let Some(job) = keeper.poll_flush()
                && jobs.send(job).is_err()
            {
                return;
            }
        }
    }

    /// Lets everybody go on until the log can be written again. `true`: it is time to end.
    fn mend(&self, keeper: &mut Keeper<DirFile>, error: &io::Error) -> bool {
        let mut text = error.to_string();
        loop {
            self.pass();
            let text_now = format!(
                "the activity log cannot be written: {text}; guests go on, and after a crash of the host everything is compared"
            );
            self.alarms.raise(code::ACTIVITY, "", text_now);
            if self.sleep(RETRY) {
                return true;
            }
            match keeper.begin() {
                Ok(()) => {
                    self.alarms.clear(code::ACTIVITY, "");
                    return false;
                }
                Err(error) => text = error.to_string(),
            }
        }
    }

    fn flush(&self, jobs: &Receiver<FlushJob>) {
        while let Ok(job) = jobs.recv() {
            let urgent = job.is_urgent();
            if !job.run() && self.sleep(FLUSH_PAUSE) {
                return;
            }
            self.signal(|state| state.flushed = true);
            // The next one may be urgent then; it is taken when this pause is over, or somebody waits.
            let end = clock::now().plus(FLUSH_AHEAD);
            let mut state = self.state();
            while !urgent && !state.stop && clock::now() < end && self.log.answered() >= self.log.asked() {
                state = self.wait(state, end.since(clock::now()));
            }
        }
    }

    /// I1: nobody waits for the log longer than `stall_max`.
    fn watch_stalls(&self) {
        // Requests that had been asked for, and when that was seen.
        let mut seen: VecDeque<(u64, Now)> = VecDeque::new();
        loop {
            let mut state = self.state();
            while !state.stop && (self.log.answered() >= self.log.asked() || self.log.passes()) {
                seen.clear();
                state = self.wait(state, IDLE);
            }
            if state.stop {
                return;
            }
            drop(state);
            let stall_max = *self.stall_max.lock().unwrap_or_else(PoisonError::into_inner);
            let step = (stall_max / 10).max(Duration::from_millis(1));
            let (asked, now) = (self.log.asked(), clock::now());
            if seen.back().is_none_or(|(last, _)| *last < asked) {
                seen.push_back((asked, now));
            }
            while seen.front().is_some_and(|(number, _)| *number <= self.log.answered()) {
                seen.pop_front();
            }
            let age = seen.front().map_or(Duration::ZERO, |(_, since)| now.since(*since));
            if age >= stall_max / 2 {
                self.want(false);
            }
            if age >= stall_max {
                tracing::debug!("guests have waited for the activity log for long enough, and go on");
                self.pass();
            } else if self.sleep(step) {
                return;
            }
        }
    }

    /// What is to be recorded.
    fn want(&self, upheld: bool) {
        let mut record = self.record();
        // Somebody may have let guests go on since it was looked at.
        let upheld = upheld && !self.log.passes();
        self.covered.store(upheld && record.kept.upheld, Ordering::Release);
        if record.wanted != upheld {
            record.wanted = upheld;
            record.since = clock::now();
            drop(record);
            // Under the mutex that the recorder waits with, so that it does not miss it.
            self.signal(|_| {});
        }
    }

    /// For the lives that follow in this boot.
    fn note_unstable(&self) {
        if !std::mem::replace(&mut self.record().unstable, true) {
            self.signal(|_| {});
        }
    }

    /// Keeps the state directory's word in step.
    fn keep_record(&self) {
        let (mut first, mut said) = (true, false);
        loop {
            let due = {
                let record = self.record();
                let silent = !record.wanted && !record.kept.upheld && !said;
                if silent && clock::now().since(record.since) >= CALM {
                    // It never did, in this life.
                    said = true;
                    self.say(false, None);
                }
                let calm = if record.wanted && !first { CALM } else { Duration::ZERO };
                let changed = record.wanted != record.kept.upheld || record.unstable != record.kept.unstable;
                (changed || record.unsure).then(|| record.since.plus(calm))
            };
            let now = clock::now();
            match due {
                Some(due) if due <= now => {
                    let new = {
                        let record = self.record();
                        LogState { upheld: record.wanted, unstable: record.unstable, ..record.kept.clone() }
                    };
                    first &= !new.upheld;
                    said |= !new.upheld;
                    if !new.upheld {
                        // The disk that it is written to may be the one that hangs.
                        self.say(false, None);
                    }
                    match self.store.write_log_state(&new) {
                        Ok(()) => {
                            let mut record = self.record();
                            record.kept = new.clone();
                            record.unsure = false;
                            let covered = new.upheld && record.wanted && !self.log.passes();
                            self.covered.store(covered, Ordering::Release);
                            if covered {
                                // With the record locked: who lets guests go on makes it anew behind this. None: they never went.
                                let _ = std::fs::remove_file(&self.flag);
                            }
                            drop(record);
                            if covered || !new.upheld {
                                self.say(new.upheld, None);
                            }
                        }
                        Err(error) => {
                            // What is on the disk now may be either.
                            self.record().unsure = true;
                            self.say(false, Some(&error));
                            if self.sleep(RETRY) {
                                return;
                            }
                        }
                    }
                }
                _ => {
                    let state = self.state();
                    if state.stop {
                        return;
                    }
                    drop(self.wait(state, due.map_or(RETRY, |due| due.since(now)).min(RETRY)));
                }
            }
        }
    }

    fn say(&self, upheld: bool, failed: Option<&Error>) {
        match (upheld, failed) {
            (true, _) => self.alarms.clear(code::UNCOVERED, ""),
            (false, None) => self.alarms.raise(
                code::UNCOVERED,
                "",
                "the activity log does not cover every write: if the host goes down now, everything is compared",
            ),
            (false, Some(error)) => self.alarms.raise(
                code::UNCOVERED,
                "",
                format!(
                    "the activity log does not cover every write, and that cannot be recorded ({}): if the host goes down now, \
                     order `farshore resync` of every volume",
                    crate::error::chain(error)
                ),
            ),
        }
    }
}

impl LogState {
    /// Of a life that covers nothing yet.
    fn new(path: &Path, life: u64, boot: String) -> Self {
        Self { format: 1, path: path.to_owned(), life: format!("{life:016x}"), upheld: false, boot, unstable: false }
    }

    /// That log is the one that is named here, and it covered everything.
    fn covers(&self, loaded: &Loaded) -> bool {
        let named = |life: &LogMark| format!("{:016x}", life.session) == self.life;
        // A life that was begun and had no time to be named is behind the named one.
        self.upheld && loaded.found == Found::Whole && loaded.lives.iter().any(named)
    }
}

/// Looks at the place where the activity log is to be, without touching it.
///
/// # Errors
/// [`Error::Refused`]: something else is there.
pub fn activity_log_place(config: &AgentConfig) -> Result<()> {
    let path = place(config);
    let known = look_at_log(&config.state).is_some_and(|state| state.path == path);
    refuse_foreign(&path, config.activity_log.is_none() || known)
}

fn place(config: &AgentConfig) -> PathBuf {
    config.activity_log.clone().unwrap_or_else(|| config.state.join(FILE))
}

/// Tells the next worker that guests went past the log.
fn note_passing(flag: &Path) {
    if let Err(error) = File::create(flag) {
        tracing::warn!(%error, "that guests go past the activity log cannot be noted beside the rings");
    }
}

/// What lies where the log is to be, and is none, is not overwritten, unless it was ours.
fn refuse_foreign(path: &Path, ours: bool) -> Result<()> {
    match !ours && own_file::holds_something_else(path, is_log) {
        true => Err(refused(path, "holds something else")),
        false => Ok(()),
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Refused {
        what: format!("activity log {}", path.display()),
        reason: reason.to_owned(),
        hint: "give this agent a file or block device of its own (`--activity-log`), or clear that one: everything is compared then"
            .into(),
    }
}
