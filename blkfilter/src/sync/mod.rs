//! Initial sync and resync: brings what is missing into the stream, while the guest goes on writing.
//!
//! The way of a slot whose `missing` bit is set:
//!
//! 1. *Watch*: under a brief range lock (so no write is in flight) its `touched` bit is cleared. From here on a write marks it.
//! 2. *Read* without a lock.
//! 3. *Ask* (unless the target holds nothing of the volume, or hardly any answer of late was "equal"): a `Probe` record with the
//!    content's id, or a `ProbeZero` for ranges that are zero; the target compares at that ticket and answers. The answer counts only if the slot is still
//!    untouched: then the content at the ticket was the content read, and every write since is behind it in the stream.
//!    "Equal" clears the bit.
//! 4. *Send*: read into a cell; then, under a brief range lock and only if untouched, claim `SyncData` and move the bit to *in
//!    flight* as one step. Zeroes are `SyncZero`, without payload; so is what a hole in the backing file says, unread.
//! 5. A slot that is touched meanwhile is *torn*: again from 1. After three times the read is made under the range lock, which
//!    is given back after `stall_max` whether the device has answered or not.
//! 6. *Durable* at the target clears *in flight*.
//!
//! Sync never closes the ring and never waits in it: where it finds no room, it tries again later.

mod claim;
mod scan;
mod slot;
mod verify;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::keys::DedupKey;
use farshore_proto::message::Answers;
use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_proto::{Now, Position, SLOT_BYTES, VolumeIndex};
use farshore_ring::Producer;
use farshore_uring::{BlockDevice, BufPool, Completion, Errno, Extent, FileSlot, Io};

use self::claim::Claim;
pub(crate) use self::slot::MACHINE as SLOT_MACHINE;
use self::slot::{Job, Task};
pub(crate) use self::verify::MACHINE as VERIFY_MACHINE;
use self::verify::{CHECK, CHECKS, Verify};
pub use self::verify::{DIFFERENCES_MAX, VerifyEvent, VerifyFound, VerifyOrder, VerifyProgress};
use crate::range_lock::Owner;
use crate::{BackingFile, Buf, CaptureGroup, FilterVolume, Volume};

/// How often a slot may be torn before it is read under its lock.
pub(crate) const TORN_MAX: u8 = 3;
/// Bytes of a slot, for buffers.
#[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
pub(crate) const SLOT_LEN: usize = SLOT_BYTES as usize;
/// Pause before a slot is tried again whose device did not answer within `stall_max`, or that has both unreadable and busy sectors.
const BACKOFF: Duration = Duration::from_secs(1);
/// Pause before looking for room again.
const ROOM_WAIT: Duration = Duration::from_millis(5);
/// How often an idle sync looks for new marks.
const RESCAN: Duration = Duration::from_millis(100);
/// Runs looked at in one [`Syncer::poll`], so that it comes back to its caller.
const RUNS_PER_POLL: usize = 256;

/// How sync behaves.
#[derive(Clone, Debug)]
pub struct SyncConfig {
    /// Slots read at a time. Default 16, range 1 to 256. Raising it loads the backing device more.
    pub window: u16,
    /// Most bytes read per second; `None` (default): as fast as device, ring and link take it.
    pub rate: Option<u64>,
    /// Sync owns at most 1/`ring_part` of the ring. Default 4. More room for sync is less for bursts of writes.
    pub ring_part: u64,
    /// A question not answered so long after its batch became durable is asked again. Default 60 s.
    pub answer_timeout: Duration,
}

impl Default for SyncConfig {
    fn default() -> Self {
        Self { window: 16, rate: None, ring_part: 4, answer_timeout: Duration::from_secs(60) }
    }
}

/// What sync is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SyncState {
    /// Nothing is missing.
    Idle,
    /// Something is missing, and no session with the target is up.
    NoLink,
    /// Something is missing, and the ring is closed.
    Closed,
    /// Comparing and sending.
    Running,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "sync of a group (initial sync, resync)",
    file: file!(),
    owner: "`Syncer`, the group's sync thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc { state: "idle", limit: Limit::Rest, exit: "something is missing" },
    StateDoc {
        state: "no link",
        limit: Limit::None("the link connects again by itself; alarms `link.down`, `group.resync`"),
        exit: "a session is live",
    },
    StateDoc {
        state: "closed",
        limit: Limit::None("the link drains the ring; alarm `ring.closed`"),
        exit: "the stream opens the ring again",
    },
    StateDoc {
        state: "running",
        limit: Limit::Setting(
            "the volume at `sync_rate`; `status` tells the time left; a question without an answer is asked again after 60 s",
        ),
        exit: "nothing is missing",
    },
];
const _: fn(&SyncState) -> &StateDoc = |state| match state {
    SyncState::Idle => &STATES[0],
    SyncState::NoLink => &STATES[1],
    SyncState::Closed => &STATES[2],
    SyncState::Running => &STATES[3],
};

/// How far sync is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyncProgress {
    /// What it does.
    pub state: SyncState,
    /// Bytes of volume dealt with in this run.
    pub done_bytes: u64,
    /// Bytes of volume of this run: done and missing.
    pub total_bytes: u64,
    /// Bytes of volume per second, over the run.
    pub rate: u64,
    /// Time left at that rate; `None`: unknown.
    pub eta: Option<Duration>,
}

/// Sync of one group, and the verify of what is in sync ([`Self::begin_verify`]). Performs no I/O of its own; runs on a thread of its
/// own (it asks files for their holes, which may block), or in a simulation.
///
/// Inputs: [`Self::handle_live`], [`Self::handle_break`], [`Self::handle_answers`], [`Self::handle_durable`],
/// [`Self::handle_completion`], [`Self::handle_wake`]; after any of them, and at [`Self::poll_deadline`], call [`Self::poll`].
///
/// Invariants:
/// - a slot's `missing` bit is cleared only under its range lock, with no write in flight to it, and together with a claim that
///   carries its content or an answer "equal" to a question asked after its last write;
/// - `busy` of a volume are the slots that a job, a task or a question stands for, each once;
/// - claims and questions stand in the order of their positions, which only grow.
pub struct Syncer {
    group: Arc<CaptureGroup>,
    config: SyncConfig,
    key: DedupKey,
    producer: Producer,
    pool: BufPool,
    volumes: BTreeMap<u16, SyncVolume>,
    /// Where the next look for work begins.
    turn: u16,
    jobs: VecDeque<Job>,
    /// Jobs that are not to be tried before a time.
    delayed: VecDeque<(Now, Job)>,
    tasks: Vec<Option<Task>>,
    questions: BTreeMap<u64, Question>,
    /// Sync's entries in the ring, for its share of it.
    in_ring: VecDeque<(u64, u64)>,
    in_ring_bytes: u64,
    /// Cells of reads under way.
    reserved_bytes: u64,
    /// Content in the stream that is not yet durable.
    unacked: VecDeque<Claim>,
    /// Claims below this position may share slots with later ones.
    shared_below: u64,
    epoch: u64,
    live: bool,
    now: Now,
    /// Time from which the rate allows the next read.
    allowed: Now,
    /// Nothing fitted into the ring when last tried.
    no_room: bool,
    /// Bits may have been set, or slots become free, since the last look.
    look: bool,
    next_look: Now,
    /// When questions without an answer are looked for next.
    next_late: Now,
    /// The last turn ended before its work did.
    again: bool,
    run: Run,
    verify: Verify,
}

/// One volume in sync's eyes.
struct SyncVolume {
    volume: Arc<Volume>,
    file: FileSlot,
    owner: Owner,
    extents: Arc<dyn Fn(u64, u64) -> Result<Vec<Extent>, Errno> + Send + Sync>,
    /// Slots being dealt with: first → behind the last.
    busy: BTreeMap<u64, u64>,
    cursor: u64,
    /// The target holds nothing of it, so there is nothing to compare with.
    fresh: bool,
    /// The last look found nothing missing.
    clean: bool,
    /// What the last answers said.
    answers: Experience,
}

/// Whether asking pays: a question costs a read, a hash on both sides and a round trip, and saves a slot's bytes if the answer is
/// "equal". After an unclean stop nearly all is equal; after a full ring nearly nothing is. Sending what was not asked about is
/// always right, so this is about cost alone.
#[derive(Clone, Copy, Debug)]
struct Experience {
    /// One bit for each of the last 64 answers: set if it was "equal".
    equal: u64,
}

impl Experience {
    /// Before the first answers: ask.
    const NONE: Self = Self { equal: u64::MAX };
    /// Fewer equal ones of the last 64 answers than this: not worth a question.
    const WORTH: u32 = 4;
    /// Where asking does not pay, one in so many slots is asked about, to notice when it would.
    const SAMPLE: u64 = 16;

    fn answered(&mut self, equal: bool) {
        self.equal = self.equal << 1 | u64::from(equal);
    }

    fn asks(self, slot: u64) -> bool {
        self.equal.count_ones() >= Self::WORTH || slot.is_multiple_of(Self::SAMPLE)
    }
}

/// A question under way.
#[derive(Clone, Copy, Debug)]
struct Question {
    volume: u16,
    first: u64,
    count: u64,
    zero: bool,
    tries: u8,
    /// When its batch was known to be durable.
    durable: Option<Now>,
}

/// Figures of the current run.
#[derive(Clone, Copy, Default, Debug)]
struct Run {
    since: Option<Now>,
    done_bytes: u64,
}

impl Syncer {
    /// Sync for `group`; `key` is the group's, by which the target recognises content.
    #[must_use]
    pub fn new(group: Arc<CaptureGroup>, config: SyncConfig, key: DedupKey) -> Self {
        let window = usize::from(config.window.clamp(1, 256));
        let producer = group.ring().producer();
        let epoch = group.epoch();
        Self {
            group,
            config,
            key,
            producer,
            pool: BufPool::new(&[(4096, 16), (SLOT_LEN, window)]),
            volumes: BTreeMap::new(),
            turn: 0,
            jobs: VecDeque::new(),
            delayed: VecDeque::new(),
            tasks: (0..window).map(|_| None).collect(),
            questions: BTreeMap::new(),
            in_ring: VecDeque::new(),
            in_ring_bytes: 0,
            reserved_bytes: 0,
            unacked: VecDeque::new(),
            shared_below: 0,
            epoch,
            live: false,
            now: Now(0),
            allowed: Now(0),
            no_room: false,
            look: true,
            next_look: Now(0),
            next_late: Now(0),
            again: false,
            run: Run::default(),
            verify: Verify::default(),
        }
    }

    /// Takes care of one more volume of the group. An unprotected one is ignored. What an earlier sync had put into the stream (one
    /// that died) and nobody called durable is missing again.
    ///
    /// # Errors
    /// The file cannot be registered, or the volume has too many queues.
    pub fn add_volume<F: BackingFile, I: Io<Buf>>(
        &mut self,
        io: &mut I,
        filter: &Arc<FilterVolume<F>>,
    ) -> io::Result<()> {
        let Some(volume) = filter.volume() else { return Ok(()) };
        self.remove_volume(io, volume.index);
        let file = filter.file().register(io)?;
        // One request per task, one for the brief locks, and verify's.
        let ops = u16::try_from(self.tasks.len() + 1 + CHECKS).expect("the window is at most 256");
        let Some(owner) = volume.lock.owner(ops, io.waker()) else {
            io.unregister(file);
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("volume {} has too many queues", volume.name),
            ));
        };
        let filter = Arc::clone(filter);
        let sync = SyncVolume {
            volume: Arc::clone(filter.volume().expect("looked at above")),
            file,
            owner,
            extents: Arc::new(move |offset, len| filter.extents(offset, len)),
            busy: BTreeMap::new(),
            cursor: 0,
            fresh: false,
            clean: false,
            answers: Experience::NONE,
        };
        if sync.volume.in_flight.next_set(0).is_some() {
            self.group.take_back(&sync.volume);
        }
        self.volumes.insert(sync.volume.index.0, sync);
        self.look = true;
        Ok(())
    }

    /// Forgets a volume; reads under way end unheard. Before [`CaptureGroup::remove_volume`].
    pub fn remove_volume<I: Io<Buf>>(&mut self, io: &mut I, index: VolumeIndex) {
        self.end_verify(index.0);
        let Some(gone) = self.volumes.remove(&index.0) else { return };
        self.jobs.retain(|job| job.volume() != index.0);
        self.delayed.retain(|(_, job)| job.volume() != index.0);
        self.questions.retain(|_, question| question.volume != index.0);
        self.unacked.retain(|claim| claim.volume != index.0);
        for (op, task) in (0_u16..).zip(&mut self.tasks) {
            let Some(task) = task.as_mut().filter(|task| task.volume == index.0) else { continue };
            self.reserved_bytes -= task.waiting_bytes();
            if let Some(range) = task.orphan() {
                gone.owner.unlock(op, range);
            }
        }
        // Tasks that only waited for their lock have no completion to come.
        for task in &mut self.tasks {
            if task.as_ref().is_some_and(Task::is_over) {
                *task = None;
            }
        }
        io.unregister(gone.file);
    }

    // Inputs.

    /// A session is up. `empty`: volumes of which the target says it holds nothing. `from`: the first position that this session
    /// sends; answers to questions before it are lost, so they are asked again.
    pub fn handle_live(&mut self, empty: &[VolumeIndex], from: Position) {
        self.live = true;
        self.look = true;
        for (index, volume) in &mut self.volumes {
            volume.fresh = empty.contains(&VolumeIndex(*index)) && !volume.volume.joined();
        }
        let later = self.questions.split_off(&from.0);
        for question in std::mem::replace(&mut self.questions, later).into_values() {
            self.release(question.volume, question.first, question.count);
        }
        self.forget_asked(from);
    }

    /// The session is gone.
    pub fn handle_break(&mut self) {
        self.live = false;
        self.volumes.values_mut().for_each(|volume| volume.fresh = false);
        // What the ring no longer holds and nobody has called durable: not to be relied on.
        let freed = self.group.ring().freed();
        while let Some(claim) = self.unacked.pop_front_if(|claim| claim.position < freed) {
            if let Some(volume) = self.volumes.get(&claim.volume) {
                let bytes = volume.volume.bytes_of(claim.first, claim.count);
                self.group.mark_missing(&volume.volume, bytes.start, bytes.end - bytes.start);
            }
            // Else a slot that turns out to be equal stays in flight for good.
            self.not_in_flight(&claim);
        }
        self.look = true;
    }

    /// The target answered the questions of one batch.
    pub fn handle_answers(&mut self, answers: &Answers) {
        self.check_epoch();
        let mut at = 0;
        while let Some(first) = answers.results.get(at) {
            let same = answers.results[at..].iter().take_while(|answer| answer.position == first.position).count();
            let results = &answers.results[at..at + same];
            at += same;
            let asked = self.questions.get(&first.position.0).filter(|question| question.volume == first.volume.0);
            let Some(question) = asked.copied() else {
                self.check_answered(first.volume, first.position, results);
                continue;
            };
            self.questions.remove(&first.position.0);
            self.answered(&question, results);
        }
    }

    /// Everything below `position` is durable at the target.
    pub fn handle_durable(&mut self, position: Position) {
        let now = self.now;
        for (_, question) in self.questions.range_mut(..position.0) {
            question.durable.get_or_insert(now);
        }
        self.checks_durable(position);
        self.settle(position.0);
    }

    /// A read of sync's ended.
    pub fn handle_completion<I: Io<Buf>>(&mut self, io: &mut I, now: Now, completion: Completion<Buf>) {
        self.now = self.now.max(now);
        if completion.token.value() & CHECK != 0 {
            self.check_read(completion);
        } else {
            self.read_ended(io, completion);
        }
    }

    /// Another thread woke this one: a range became free, or something is missing.
    pub fn handle_wake(&mut self) {
        self.look = true;
    }

    // Outputs.

    /// Does all that can be done now.
    pub fn poll<I: Io<Buf>>(&mut self, io: &mut I, now: Now) {
        self.now = self.now.max(now);
        self.check_epoch();
        self.expire();
        self.account();
        self.take_grants(io);
        self.no_room = false;
        self.again = false;
        if self.running() {
            self.work(io);
        }
        self.conclude();
        if self.running() {
            self.verify(io);
        }
        if self.producer.consumer_sleeping() {
            self.group.wake_consumer();
        }
    }

    /// When to call [`Self::poll`] at the latest if nothing else happens. `None`: nothing to do before the next input.
    #[must_use]
    pub fn poll_deadline(&self) -> Option<Now> {
        // A look that is due is made by `poll`, if it can be: where it could not (no link, no task free), time changes nothing.
        let mut deadline = if self.next_look > self.now { self.next_look } else { self.now.plus(RESCAN) };
        if self.again {
            deadline = self.now;
        }
        if self.no_room {
            deadline = deadline.min(self.now.plus(ROOM_WAIT));
        }
        if !self.jobs.is_empty() && self.allowed > self.now {
            deadline = deadline.min(self.allowed);
        }
        let tasks = self.tasks.iter().flatten().filter_map(Task::deadline).chain(self.verify_deadline());
        // Only `work` takes them.
        let jobs = self.delayed.iter().filter(|_| self.running()).map(|(at, _)| *at);
        Some(tasks.chain(jobs).fold(deadline, Now::min))
    }

    /// How far it is. Counts bits: for a person's eyes, not for every turn.
    #[must_use]
    pub fn progress(&self) -> SyncProgress {
        let missing: u64 = self.volumes.values().map(|volume| volume.volume.missing.count_ones() * SLOT_BYTES).sum();
        let state = match missing {
            0 if !self.group.event_open() => SyncState::Idle,
            _ if self.group.ring().is_closed() => SyncState::Closed,
            _ if !self.live => SyncState::NoLink,
            _ => SyncState::Running,
        };
        let done_bytes = self.run.done_bytes;
        let elapsed = self.run.since.map_or(Duration::ZERO, |since| self.now.since(since));
        let rate =
            u64::try_from(u128::from(done_bytes) * 1_000_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX);
        let eta = (rate > 0 && elapsed > Duration::ZERO).then(|| Duration::from_secs(missing / rate));
        SyncProgress { state, done_bytes, total_bytes: done_bytes + missing, rate, eta }
    }

    // The turn's parts.

    fn running(&self) -> bool {
        self.live && !self.group.ring().is_closed()
    }

    fn work<I: Io<Buf>>(&mut self, io: &mut I) {
        while let Some(at) = self.delayed.iter().position(|(at, _)| *at <= self.now)
            && let Some((_, job)) = self.delayed.remove(at)
        {
            self.jobs.push_back(job);
        }
        let mut runs = 0;
        loop {
            if let Some(job) = self.jobs.pop_front() {
                if let Err(job) = self.start(io, job) {
                    self.jobs.push_front(job);
                    return;
                }
                continue;
            }
            if self.tasks.iter().all(Option::is_some) {
                return;
            }
            if self.checks_hold_locks() {
                // Finding asks files for their holes, which may block. The check's end, or its time limit, brings the next turn.
                return;
            }
            if runs == RUNS_PER_POLL {
                self.again = true;
                return;
            }
            runs += 1;
            if !self.find_run() {
                return;
            }
        }
    }

    /// Locks that were waited for.
    fn take_grants<I: Io<Buf>>(&mut self, io: &mut I) {
        let granted: Vec<(u16, u16)> = self
            .volumes
            .iter()
            .flat_map(|(index, volume)| std::iter::from_fn(|| volume.owner.poll_granted()).map(|op| (*index, op)))
            .collect();
        for (volume, op) in granted {
            if op < self.check_op(0) {
                self.locked(io, volume, op);
            } else {
                self.check_locked(io, volume, op);
            }
        }
    }

    /// A volume of which nothing is missing joins; an event after which nothing is missing ends.
    fn conclude(&mut self) {
        let whole = |volume: &SyncVolume| volume.clean && volume.busy.is_empty();
        // Recording a join may block.
        if self.live && !self.checks_hold_locks() {
            for volume in self.volumes.values().filter(|volume| whole(volume) && !volume.volume.announced()) {
                if self.group.join(&volume.volume).is_some() {
                    tracing::info!(volume = volume.volume.name.as_str(), "volume is in sync and joins the points");
                }
            }
        }
        let joined = |volume: &&SyncVolume| volume.volume.joined();
        if self.group.event_open() && self.volumes.values().filter(joined).all(whole) {
            self.group.end_event();
        }
        if self.volumes.values().all(whole) {
            self.run = Run::default();
        } else if self.running() && self.run.since.is_none() {
            self.run.since = Some(self.now);
        }
    }

    /// Where the stream was started over, or a compare ordered, answers to older questions do not count.
    fn check_epoch(&mut self) {
        let epoch = self.group.epoch();
        if epoch == self.epoch {
            return;
        }
        self.epoch = epoch;
        self.look = true;
        for volume in self.volumes.values_mut() {
            volume.fresh = false;
            // What an earlier compare found says nothing of this one.
            volume.answers = Experience::NONE;
        }
        // The bits of older claims may have been moved since.
        self.shared_below = self.group.ring().head();
        for question in std::mem::take(&mut self.questions).into_values() {
            self.release(question.volume, question.first, question.count);
        }
        self.forget_asked(Position(u64::MAX));
        // Questions not yet asked are asked later: their content is as good as before.
    }

    /// Time limits.
    fn expire(&mut self) {
        if self.next_late <= self.now {
            self.next_late = self.now.plus(RESCAN);
            self.ask_again();
            self.ask_checks_again();
        }
        for (op, task) in (0_u16..).zip(&mut self.tasks) {
            let Some(task) = task else { continue };
            let Some(range) = task.expire(self.now) else { continue };
            if let Some(volume) = self.volumes.get(&task.volume) {
                volume.owner.unlock(op, range);
            }
        }
        self.expire_checks();
    }

    /// Questions whose answer does not come.
    fn ask_again(&mut self) {
        let timeout = self.config.answer_timeout;
        let late = |question: &Question| question.durable.is_some_and(|since| self.now.since(since) > timeout);
        let late: Vec<u64> = self.questions.iter().filter(|(_, q)| late(q)).map(|(position, _)| *position).collect();
        for position in late {
            let question = self.questions.remove(&position).expect("collected above");
            tracing::warn!(volume = question.volume, position, "no answer to a compare; asking again");
            self.release(question.volume, question.first, question.count);
        }
    }

    /// Slots are no longer being dealt with; what is still missing of them is found again.
    fn release(&mut self, volume: u16, first: u64, count: u64) {
        self.look = true;
        if let Some(volume) = self.volumes.get_mut(&volume) {
            volume.free(first, count);
            volume.clean = false;
        }
    }

    /// Slots have been dealt with for good.
    fn dealt_with(&mut self, volume: u16, first: u64, count: u64) {
        self.run.done_bytes += count * SLOT_BYTES;
        self.release(volume, first, count);
    }
}

impl SyncVolume {
    /// The request number of the brief locks, behind those of the tasks.
    fn with_brief_lock<T>(&self, op: u16, range: Range<u64>, work: impl FnOnce(&Self) -> T) -> Option<T> {
        if !self.owner.try_lock(op, range.clone()) {
            return None;
        }
        let result = work(self);
        self.owner.unlock(op, range);
        Some(result)
    }

    fn take(&mut self, first: u64, count: u64) {
        let before = self.busy.insert(first, first + count);
        debug_assert!(before.is_none(), "a slot is dealt with once at a time");
    }

    /// Takes `count` slots from `first` out of the busy range that they lie in.
    fn free(&mut self, first: u64, count: u64) {
        let Some((&start, &end)) = self.busy.range(..=first).next_back().filter(|(_, end)| **end >= first + count)
        else {
            debug_assert!(false, "slots {first}+{count} are not being dealt with");
            return;
        };
        self.busy.remove(&start);
        if start < first {
            self.busy.insert(start, first);
        }
        if first + count < end {
            self.busy.insert(first + count, end);
        }
    }
}

impl std::fmt::Debug for Syncer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Syncer")
            .field("live", &self.live)
            .field("jobs", &self.jobs.len())
            .field("tasks", &self.tasks.iter().flatten().count())
            .field("questions", &self.questions.len())
            .field("unacked", &self.unacked.len())
            .finish_non_exhaustive()
    }
}
