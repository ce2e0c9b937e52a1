//! One stream at work: its session, the order of its batches, group commits, pause and stop.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_proto::batch::BatchHeader;
use farshore_proto::message::{Hello, RefuseCode, Tail};
use farshore_proto::session::{TargetEvent, TargetSession};
use farshore_proto::{BatchNo, ChainHash, Now, VolumeIndex, WallTime};
use farshore_uring::Storage;

use crate::alarm::AlarmCode;
use crate::error::{Error, Kind};
use crate::group::GroupHost;
use crate::ingest::{BatchBuf, Denied, GROUP_BATCHES_MAX, Ingest};

/// How long a batch may be missing while later ones are here. A connection that dropped one is found out much sooner;
/// this ends the case in which one connection of a session stands still.
pub(crate) const GAP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a stream that is paused, for lack of space or of what the system lends, looks again.
pub(crate) const PAUSE_RETRY: Duration = Duration::from_secs(1);
/// How often a lease is considered.
const LEASE_INTERVAL: Duration = Duration::from_secs(2);
/// Free space at which a paused stream goes on: enough above [`PAUSE_FREE_BYTES`] that it does not pause at once again.
pub const RESUME_FREE_BYTES: u64 = 96 << 20;
/// Free space that ingest leaves alone: on a disk that is full for batches, views can still be opened, points held, and the
/// base moved, all of which write a little.
pub const PAUSE_FREE_BYTES: u64 = 32 << 20;
/// Most batches kept while an earlier one is missing; the link's limit on bytes binds first (I11).
const REORDER_MAX: usize = 1024;
/// Most control messages waiting for a lane: a source that sends more than these between two looks is broken (I11).
const CONTROL_MAX: usize = 4096;

/// Number of a session, given by the link.
pub type SessionId = u64;

/// What a lane, or the target, wants of the link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// Send a control message.
    Control {
        /// To which session.
        session: SessionId,
        /// The message.
        bytes: Vec<u8>,
    },
    /// End the session once its messages are out.
    Close {
        /// Which.
        session: SessionId,
        /// Why, for the log.
        reason: String,
    },
}

/// What happens to a lane.
pub(crate) enum Input {
    /// A greeted session of this stream.
    Attach { session: SessionId, machine: Box<TargetSession>, hello: Box<Hello> },
    /// A control message of an attached session.
    Control { session: SessionId, bytes: Vec<u8> },
    /// A batch of an attached session.
    Batch { session: SessionId, buf: Box<dyn BatchBuf> },
    /// The session's connection is gone.
    Down { session: SessionId },
    /// End whatever session there is.
    Expel { code: RefuseCode, detail: String },
}

/// One stream: an inbox that anyone may fill, and a core that one thread at a time runs.
pub struct Lane<S: Storage> {
    stream: Arc<GroupHost<S>>,
    inbox: Mutex<Inbox>,
    core: Mutex<Core<S>>,
    outbox: Mutex<VecDeque<Output>>,
}

#[derive(Default)]
struct Inbox {
    inputs: VecDeque<Input>,
    controls: usize,
}

struct Core<S: Storage> {
    ingest: Ingest<S>,
    session: Option<(SessionId, Box<TargetSession>)>,
    /// Batches that are here, by number; those behind a gap wait.
    waiting: BTreeMap<BatchNo, (ChainHash, Box<dyn BatchBuf>)>,
    /// Since when a batch is missing, and before which tail.
    gap: Option<(Now, BatchNo)>,
    /// The tail at which a session was already ended for a missing batch.
    gap_closed_at: Option<BatchNo>,
    paused: Option<(String, Now)>,
    stopped: Option<String>,
    lease_at: Now,
}

/// Where a lane stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LaneStatus {
    /// A source is connected and was welcomed.
    pub connected: bool,
    /// Why it takes no batches for now.
    pub paused: Option<String>,
    /// Why it takes none until somebody acts.
    pub stopped: Option<String>,
    /// Batches that wait for an earlier one.
    pub waiting: usize,
    /// Last batch.
    pub tail: Option<Tail>,
    /// An event is open: no cut is recoverable.
    pub event_open: bool,
    /// Volumes that points include.
    pub joined: Vec<VolumeIndex>,
}

impl<S: Storage> Lane<S> {
    pub(crate) fn new(ingest: Ingest<S>) -> Self {
        let stream = Arc::clone(ingest.stream());
        let core = Core {
            ingest,
            session: None,
            waiting: BTreeMap::new(),
            gap: None,
            gap_closed_at: None,
            paused: None,
            stopped: None,
            lease_at: Now(0),
        };
        Self { stream, inbox: Mutex::default(), core: Mutex::new(core), outbox: Mutex::default() }
    }

    /// The stream's shared state.
    #[must_use]
    pub fn stream(&self) -> &Arc<GroupHost<S>> {
        &self.stream
    }

    pub(crate) fn push(&self, input: Input) {
        let mut inbox = lock(&self.inbox);
        if matches!(input, Input::Control { .. }) {
            if inbox.controls >= CONTROL_MAX {
                return;
            }
            inbox.controls += 1;
        }
        inbox.inputs.push_back(input);
    }

    /// The next thing for the link to do.
    #[must_use]
    pub fn poll_output(&self) -> Option<Output> {
        lock(&self.outbox).pop_front()
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> LaneStatus {
        let core = lock(&self.core);
        LaneStatus {
            connected: core.session.as_ref().is_some_and(|(_, machine)| machine.is_live()),
            paused: core.paused.as_ref().map(|(reason, _)| reason.clone()),
            stopped: core.stopped.clone(),
            waiting: core.waiting.len(),
            tail: core.ingest.tail().copied(),
            event_open: core.ingest.state().event_open,
            joined: core.ingest.state().joined.clone(),
        }
    }

    /// Takes what is in the inbox and commits what can be. Blocks on the disk. Gives when to be run again even if nothing
    /// comes in.
    pub fn run(&self, now: Now, wall: WallTime) -> Option<Now> {
        let mut core = lock(&self.core);
        let mut out = VecDeque::new();
        loop {
            let inputs = {
                let mut inbox = lock(&self.inbox);
                inbox.controls = 0;
                std::mem::take(&mut inbox.inputs)
            };
            let idle = inputs.is_empty();
            for input in inputs {
                core.handle(input, now, &mut out);
            }
            let worked = core.commit(now, wall, &mut out);
            lock(&self.outbox).append(&mut out);
            if idle && !worked {
                break;
            }
        }
        let deadline = core.handle_time(now, wall, &mut out);
        lock(&self.outbox).append(&mut out);
        deadline
    }

    /// Closes the active segment, for a clean stop or before retention needs it sealed.
    ///
    /// # Errors
    /// From the disk.
    pub fn seal(&self) -> Result<(), Error> {
        lock(&self.core).ingest.roll()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Storage> Core<S> {
    fn subject(&self) -> String {
        self.ingest.stream().id.subject()
    }

    fn tail(&self) -> BatchNo {
        self.ingest.tail().map_or(BatchNo(0), |tail| tail.number)
    }

    fn handle(&mut self, input: Input, now: Now, out: &mut VecDeque<Output>) {
        match input {
            Input::Attach { session, machine, hello } => self.attach(session, machine, &hello, now, out),
            Input::Control { session, bytes } => self.control(session, &bytes, out),
            Input::Batch { session, buf } => self.batch(session, buf, out),
            Input::Down { session } => {
                if self.session.as_ref().is_some_and(|(current, _)| *current == session) {
                    self.leave();
                }
            }
            Input::Expel { code, detail } => self.refuse(code, detail, out),
        }
    }

    fn leave(&mut self) {
        self.session = None;
        self.waiting.clear();
        self.gap = None;
    }

    fn attach(
        &mut self,
        session: SessionId,
        machine: Box<TargetSession>,
        hello: &Hello,
        now: Now,
        out: &mut VecDeque<Output>,
    ) {
        self.refuse(RefuseCode::Replaced, "a newer session of the same host took over".into(), out);
        self.session = Some((session, machine));
        if let Some(reason) = &self.stopped {
            let detail = format!("the journal is stopped: {reason}");
            return self.refuse(RefuseCode::Unavailable, detail, out);
        }
        match self.ingest.welcome(hello.generation, &hello.volumes) {
            Ok(welcome) => {
                self.ingest.stream().leases().handle_session();
                self.lease_at = now;
                if let Some((_, machine)) = &mut self.session {
                    machine.welcome(welcome);
                    if let Some((reason, _)) = &self.paused {
                        machine.pause(reason.clone());
                    }
                }
                self.flush(out);
            }
            Err(denied) => {
                self.deny(denied, now, out);
                // Without a welcome nobody can be told of a pause: the source comes again by itself.
                self.refuse(
                    RefuseCode::Unavailable,
                    "no space on the target's disk for the group's volumes".into(),
                    out,
                );
            }
        }
    }

    fn control(&mut self, session: SessionId, bytes: &[u8], out: &mut VecDeque<Output>) {
        let Some((current, machine)) = &mut self.session else { return };
        if *current != session {
            return;
        }
        // The answer key is set by the greeting, and there is only one of those.
        let spoken = machine.handle_control(bytes, |_, _| unreachable!("a session greets once, before it is attached"));
        match spoken {
            Ok(Some(TargetEvent::Volumes(volumes))) => {
                if let Err(denied) = self.ingest.declare(&volumes, None) {
                    return self.deny(denied, Now(0), out);
                }
            }
            Ok(Some(TargetEvent::Hello(_) | TargetEvent::Bye) | None) => {}
            Err(error) => return self.refuse(RefuseCode::Malformed, error.to_string(), out),
        }
        self.flush(out);
    }

    fn batch(&mut self, session: SessionId, buf: Box<dyn BatchBuf>, out: &mut VecDeque<Output>) {
        if self.paused.is_some() || self.session.as_ref().is_none_or(|(current, _)| *current != session) {
            return;
        }
        let header = match BatchHeader::parse(buf.bytes()) {
            Ok(header) => header,
            Err(error) => return self.refuse(RefuseCode::Malformed, error.to_string(), out),
        };
        let number = header.place().number;
        let tail = self.tail();
        if number.0 > tail.0 + REORDER_MAX as u64 {
            let detail = format!("gap: batch {number} after {tail}");
            return self.refuse(RefuseCode::Chain, detail, out);
        }
        match self.waiting.get(&number) {
            Some((chain, _)) if *chain == header.chain() => {}
            Some(_) => {
                self.refuse(RefuseCode::Chain, format!("fork: batch {number} came twice, with two contents"), out)
            }
            None => drop(self.waiting.insert(number, (header.chain(), buf))),
        }
    }

    /// Takes the batches that are next, as one group. `false`: there was none.
    fn commit(&mut self, now: Now, wall: WallTime, out: &mut VecDeque<Output>) -> bool {
        if self.stopped.is_some() || self.paused.is_some() {
            return false;
        }
        let mut group = Vec::new();
        let mut next = self.tail().next();
        while let Some(entry) = self.waiting.first_entry()
            && *entry.key() <= next
            && group.len() < GROUP_BATCHES_MAX
        {
            next = next.max(entry.key().next());
            group.push(entry.remove().1);
        }
        if group.is_empty() {
            return false;
        }
        if let Some(error) = self.short_of_space() {
            self.deny(Denied::Pause(error), now, out);
            return true;
        }
        if let Err(denied) = self.ingest.attend() {
            self.deny(denied, now, out);
            return true;
        }
        let taken = self.ingest.take(group, wall);
        self.gap = None;
        if taken.acknowledge && taken.denied.is_none() {
            let alarms = &self.ingest.stream().alarms;
            // Asked first: nearly always there is none, and this is the way of every batch.
            if alarms.is_raised(AlarmCode::BatchRefused, &self.subject()) {
                alarms.clear(AlarmCode::BatchRefused, &self.subject());
            }
        }
        if let Some((_, machine)) = &mut self.session {
            if taken.acknowledge
                && let Some(tail) = self.ingest.tail()
            {
                machine.durable(tail.incarnation, tail.number, tail.chain, self.ingest.received());
            }
            taken.answers.into_iter().for_each(|answers| machine.answer(answers));
        }
        if let Some(denied) = taken.denied {
            self.deny(denied, now, out);
        }
        self.flush(out);
        true
    }

    fn short_of_space(&self) -> Option<Error> {
        // A storage that cannot tell says so itself when it is full.
        let free = self.ingest.stream().storage.free_bytes().ok()?;
        let what = || {
            format!("{free} bytes are free on the target's disk, {PAUSE_FREE_BYTES} are kept for views and retention")
        };
        (free < PAUSE_FREE_BYTES).then(|| Error::new(Kind::NoSpace, what()))
    }

    fn deny(&mut self, denied: Denied, now: Now, out: &mut VecDeque<Output>) {
        let subject = self.subject();
        let alarms = self.ingest.stream().alarms.clone();
        match denied {
            Denied::Refuse(code, detail) => {
                tracing::warn!(stream = subject, ?code, detail, "a source was refused");
                if code != RefuseCode::Unavailable {
                    alarms.raise(AlarmCode::BatchRefused, &subject, &detail);
                }
                self.refuse(code, detail, out);
            }
            Denied::Pause(error) => {
                tracing::error!(stream = subject, %error, "the stream is paused");
                let code = if error.kind() == Kind::NoSpace { AlarmCode::DiskFull } else { AlarmCode::NoResources };
                alarms.raise(code, &subject, error.context());
                self.paused = Some((error.to_string(), now));
                self.waiting.clear();
                if let Some((_, machine)) = &mut self.session {
                    machine.pause(error.to_string());
                }
                self.flush(out);
            }
            Denied::Stop(error) => {
                tracing::error!(stream = subject, %error, "the journal failed: the stream is stopped");
                alarms.raise(AlarmCode::JournalSyncFailed, &subject, error.context());
                self.stopped = Some(error.to_string());
                self.refuse(RefuseCode::Unavailable, format!("the journal is stopped: {error}"), out);
            }
        }
    }

    fn refuse(&mut self, code: RefuseCode, detail: String, out: &mut VecDeque<Output>) {
        let Some((session, mut machine)) = self.session.take() else { return };
        machine.refuse(code, detail.clone());
        drain(session, &mut machine, out);
        out.push_back(Output::Close { session, reason: detail });
        self.leave();
    }

    fn flush(&mut self, out: &mut VecDeque<Output>) {
        let Some((session, machine)) = &mut self.session else { return };
        drain(*session, machine, out);
        if machine.is_ended() {
            let session = *session;
            out.push_back(Output::Close { session, reason: "the session ended".into() });
            self.leave();
        }
    }

    /// Time passed: looks for space, missing batches, leases. Gives when to look again.
    fn handle_time(&mut self, now: Now, wall: WallTime, out: &mut VecDeque<Output>) -> Option<Now> {
        self.ingest.stream().alarms.set_now(wall);
        if self.stopped.is_none()
            && self.paused.is_none()
            && let Err(denied) = self.ingest.attend()
        {
            self.deny(denied, now, out);
        }
        let pause = self.retry_pause(now, out);
        let gap = self.watch_gap(now, out);
        let lease = self.grant_lease(now, out);
        [pause, gap, lease].into_iter().flatten().min()
    }

    fn retry_pause(&mut self, now: Now, out: &mut VecDeque<Output>) -> Option<Now> {
        let (_, since) = self.paused.as_ref()?;
        let due = since.plus(PAUSE_RETRY);
        if now < due {
            return Some(due);
        }
        let free = self.ingest.stream().storage.free_bytes().unwrap_or(0);
        if free < RESUME_FREE_BYTES {
            let reason = self.paused.take().map(|(reason, _)| reason).unwrap_or_default();
            self.paused = Some((reason, now));
            return Some(now.plus(PAUSE_RETRY));
        }
        let subject = self.subject();
        tracing::info!(stream = subject, free, "there is space again: the stream goes on");
        let alarms = &self.ingest.stream().alarms;
        [AlarmCode::DiskFull, AlarmCode::NoResources].into_iter().for_each(|code| alarms.clear(code, &subject));
        self.paused = None;
        if let Some((_, machine)) = &mut self.session {
            machine.resume();
        }
        self.flush(out);
        None
    }

    fn watch_gap(&mut self, now: Now, out: &mut VecDeque<Output>) -> Option<Now> {
        let tail = self.tail();
        if self.waiting.is_empty() || self.session.is_none() {
            self.gap = None;
            return None;
        }
        let (since, at) = *self.gap.get_or_insert((now, tail));
        if at != tail {
            self.gap = Some((now, tail));
            return Some(now.plus(GAP_TIMEOUT));
        }
        let due = since.plus(GAP_TIMEOUT);
        if now < due {
            return Some(due);
        }
        let first = self.waiting.first_key_value().map_or(tail, |(number, _)| *number);
        let detail = format!("gap: batch {first} is here, {} after {tail} is not", tail.next());
        if self.gap_closed_at == Some(tail) {
            // A new session has left out the same batch: it is not the link.
            self.ingest.stream().alarms.raise(AlarmCode::BatchRefused, &self.subject(), &detail);
            self.refuse(RefuseCode::Chain, detail, out);
        } else {
            self.gap_closed_at = Some(tail);
            if let Some((session, _)) = self.session.take() {
                out.push_back(Output::Close { session, reason: detail });
            }
            self.leave();
        }
        None
    }

    fn grant_lease(&mut self, now: Now, out: &mut VecDeque<Output>) -> Option<Now> {
        let (_, machine) = self.session.as_mut().filter(|(_, machine)| machine.is_live())?;
        if now >= self.lease_at {
            self.lease_at = now.plus(LEASE_INTERVAL);
            let tail = self.ingest.tail().map_or(BatchNo(0), |tail| tail.number);
            let lease = self.ingest.stream().leases().grant(tail);
            if let Some(lease) = lease {
                machine.lease(lease);
                self.flush(out);
            }
        }
        Some(self.lease_at)
    }
}

fn drain(session: SessionId, machine: &mut TargetSession, out: &mut VecDeque<Output>) {
    while let Some(bytes) = machine.poll_control() {
        out.push_back(Output::Control { session, bytes });
    }
}
