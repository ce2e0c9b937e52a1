//! One front-end thread's way through the filter.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use farshore_proto::record::Kind;
use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_ring::{Desc, Producer, Reservation};
use farshore_uring::{
    BlockQueue, BufPool, Completion, Done, Errno, FileSlot, Geometry, Io, Op, Purpose, Request, Token, Waker,
    guest_errno,
};

use crate::activity::VolumeActivity;
use crate::alarm::Alarm;
use crate::counters::{QueueCounters, add};
use crate::range_lock::Owner;
use crate::volume::{Mode, POOL, other};
use crate::zeroing::{Method, Step, Zeroing};
use crate::{Buf, CaptureGroup, Volume};

/// Changing requests that one queue has under way at a time; more wait in a line. Above the tags of any front end that exists.
const OPS_MAX: u16 = 1024;
/// Places made at the start.
const OPS_START: usize = 128;

/// One thread's part of a [`crate::FilterVolume`]: a machine without I/O of its own (see [`BlockQueue`] for the call order).
///
/// A changing request goes: line (if 1024 are under way) → range lock → activity log → marks → backing device → ticket or mark → unlock →
/// done. Reads and flushes go straight through.
///
/// It must be idle when it is dropped, or dropped after its [`Io`] (whose drop waits for what is in flight): a write that is still
/// on its way when its range is unlocked could overtake a later one.
pub struct FilterQueue {
    file: FileSlot,
    read_only: bool,
    capture: Option<Capture>,
    pool: BufPool,
    done: VecDeque<Done<Buf>>,
    ops: Vec<Option<Change>>,
    free: Vec<u16>,
    /// Requests that came while all places were taken; bounded by the front end's tags.
    line: VecDeque<Change>,
    /// The first method of zeroing that the file system has not refused yet.
    best: Method,
}

/// What only a captured queue has.
struct Capture {
    group: Arc<CaptureGroup>,
    volume: Arc<Volume>,
    producer: Producer,
    owner: Owner,
    counters: Arc<QueueCounters>,
    /// Something was published, or the ring closed, since the consumer was last looked at.
    published: bool,
    activity: Option<Activity>,
}

/// A queue's way to the activity log.
struct Activity {
    volume: Arc<VolumeActivity>,
    /// Its name there.
    queue: u64,
    /// Changes that have their range and wait for extents to become active; bounded by the places.
    parked: Vec<u16>,
    /// Flushes under way: tag and number.
    flushes: Vec<(u32, u64)>,
}

/// A request that changes content.
struct Change {
    tag: u32,
    offset: u64,
    len: u64,
    stage: Stage,
}

enum Stage {
    /// Not submitted: waits for a place, or for its range.
    Waiting(Work),
    /// A write in flight; its buffer is in the operation.
    Writing,
    /// A discard or write-zeroes in flight, with its reservation if there was room for one.
    Zeroing(Zeroing, Kind, Option<Reservation>),
    /// Between two stages; never seen from outside of a call.
    Moving,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "a guest's change (write, discard, zeroes)",
    file: file!(),
    owner: "`FilterQueue`, the front end's queue thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "waiting",
        limit: Limit::Setting(
            "for the activity log: `stall_max` 50 ms; for a verify or a torn slot of sync that holds the range: `stall_max`; for earlier writes to the range: the device",
        ),
        exit: "handed to the device; past the log at its limit",
    },
    StateDoc { state: "writing", limit: Limit::None("the backing device's, as without us"), exit: "ticket, or mark" },
    StateDoc { state: "zeroing", limit: Limit::None("the backing device's, as without us"), exit: "ticket, or mark" },
    StateDoc { state: "moving", limit: Limit::Rest, exit: "within one call" },
];
const _: fn(&Stage) -> &StateDoc = |stage| match stage {
    Stage::Waiting(_) => &STATES[0],
    Stage::Writing => &STATES[1],
    Stage::Zeroing(..) => &STATES[2],
    Stage::Moving => &STATES[3],
};

enum Work {
    Write { buf: Buf, fua: bool },
    Zero { kind: Kind, method: Method, fua: bool },
}

impl Change {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// What a token's operation is; the low half is the tag, or for changes the place in `ops`.
const READ: u64 = 0;
const CHANGE: u64 = 1 << 32;
const FLUSH: u64 = 2 << 32;
const KIND: u64 = 3 << 32;

impl FilterQueue {
    pub(crate) fn new(file: FileSlot, geometry: Geometry, mode: &Mode, waker: Waker) -> io::Result<Self> {
        let capture = match mode {
            Mode::Plain => None,
            Mode::Captured(group, volume) => {
                let owner = volume.lock.owner(OPS_MAX, waker.clone()).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::OutOfMemory, format!("volume {} has too many queues", volume.name))
                })?;
                Some(Capture {
                    group: Arc::clone(group),
                    volume: Arc::clone(volume),
                    producer: group.ring().producer(),
                    owner,
                    counters: volume.counters.open(),
                    published: false,
                    activity: volume.activity.as_ref().map(|of| Activity {
                        volume: Arc::clone(of),
                        queue: of.join_queue(waker),
                        parked: Vec::with_capacity(OPS_START),
                        flushes: Vec::new(),
                    }),
                })
            }
        };
        Ok(Self {
            file,
            read_only: geometry.read_only,
            capture,
            pool: BufPool::new(&POOL),
            done: VecDeque::with_capacity(OPS_START),
            ops: Vec::with_capacity(OPS_START),
            free: Vec::with_capacity(OPS_START),
            line: VecDeque::new(),
            best: Method::Punch,
        })
    }

    /// Changing requests under way or in line.
    #[must_use]
    pub fn changes_in_flight(&self) -> usize {
        self.ops.len() - self.free.len() + self.line.len()
    }

    fn end(&mut self, tag: u32, result: Result<(), Errno>, buf: Option<Buf>) {
        self.done.push_back(Done { tag, result, buf });
    }

    fn change<I: Io<Buf>>(&mut self, io: &mut I, tag: u32, offset: u64, len: u64, work: Work) {
        if self.read_only {
            return self.end(tag, Err(Errno(libc::EROFS)), None);
        }
        if len == 0 {
            return self.end(tag, Ok(()), None);
        }
        let change = Change { tag, offset, len, stage: Stage::Waiting(work) };
        match self.place() {
            Some(op) => self.admit(io, op, change),
            None => self.line.push_back(change),
        }
    }

    fn place(&mut self) -> Option<u16> {
        if let Some(op) = self.free.pop() {
            return Some(op);
        }
        let op = u16::try_from(self.ops.len()).ok().filter(|op| *op < OPS_MAX)?;
        self.ops.push(None);
        Some(op)
    }

    /// A change has its place: on to its range.
    fn admit<I: Io<Buf>>(&mut self, io: &mut I, op: u16, change: Change) {
        let range = change.range();
        self.ops[usize::from(op)] = Some(change);
        let granted = self.capture.as_ref().is_none_or(|capture| capture.owner.lock(op, range));
        if granted {
            self.start(io, op);
        } else if let Some(capture) = &self.capture {
            add(&capture.counters.lock_waits, 1);
        }
    }

    /// A change has its range: on to the activity log.
    fn start<I: Io<Buf>>(&mut self, io: &mut I, op: u16) {
        if let Some(Capture { activity: Some(activity), counters, .. }) = &mut self.capture {
            let range = self.ops[usize::from(op)].as_ref().expect("admitted").range();
            if !activity.volume.enter(&range) {
                add(&counters.activity_waits, 1);
                activity.parked.push(op);
                return;
            }
        }
        self.go(io, op);
    }

    /// Starts what waited for extents that are active now.
    fn unpark<I: Io<Buf>>(&mut self, io: &mut I) {
        let mut at = 0;
        while let Some(Capture { activity: Some(activity), .. }) = &mut self.capture
            && let Some(op) = activity.parked.get(at).copied()
        {
            let range = self.ops[usize::from(op)].as_ref().expect("parked in its place").range();
            if activity.volume.may_go(&range) {
                activity.parked.remove(at);
                self.go(io, op);
            } else {
                at += 1;
            }
        }
    }

    /// A change may begin: marks what has to be marked before, and submits.
    fn go<I: Io<Buf>>(&mut self, io: &mut I, op: u16) {
        let (file, best) = (self.file, self.best);
        let change = self.ops[usize::from(op)].as_mut().expect("admitted");
        let (offset, len) = (change.offset, change.len);
        let operation = match std::mem::replace(&mut change.stage, Stage::Moving) {
            Stage::Waiting(Work::Write { mut buf, fua }) => {
                if let Some(capture) = &mut self.capture {
                    match &mut buf {
                        Buf::Cell(cell) => capture.before(Some(cell), offset, len),
                        Buf::Other(_) => capture.before(None, offset, len),
                    }
                }
                change.stage = Stage::Writing;
                let len = u32::try_from(len).expect("a request's length was a u32");
                Op::Write { file, offset, buf, len, dsync: fua }
            }
            Stage::Waiting(Work::Zero { kind, method, fua }) => {
                let mut bare = None;
                if let Some(capture) = &mut self.capture {
                    bare = capture.producer.reserve_bare().ok();
                    capture.before(bare.as_mut(), offset, len);
                }
                let zeroing = Zeroing::new(offset, len, method.max(best), fua);
                let first = zeroing.start(file);
                change.stage = Stage::Zeroing(zeroing, kind, bare);
                first
            }
            Stage::Writing | Stage::Zeroing(..) | Stage::Moving => unreachable!("a change is started once"),
        };
        io.submit(Token::device(CHANGE | u64::from(op)), operation);
    }

    fn changed<I: Io<Buf>>(&mut self, io: &mut I, op: u16, result: io::Result<u32>, buf: Option<Buf>) {
        let change = self.ops[usize::from(op)].as_mut().expect("in flight");
        let (kind, reservation, len, result) = match std::mem::replace(&mut change.stage, Stage::Moving) {
            Stage::Writing => {
                let cell = match buf {
                    Some(Buf::Cell(cell)) => Some(cell),
                    // Ordinary memory goes back to the pool.
                    Some(Buf::Other(_)) | None => None,
                };
                let len = u32::try_from(change.len).expect("a request's length was a u32");
                (Kind::Write, cell, len, result.map(|_| ()))
            }
            Stage::Zeroing(mut zeroing, kind, bare) => match zeroing.handle(self.file, result, buf, &mut self.best) {
                Step::Next(operation) => {
                    change.stage = Stage::Zeroing(zeroing, kind, bare);
                    return io.submit(Token::device(CHANGE | u64::from(op)), operation);
                }
                Step::Ended(result) => (kind, bare, 0, result),
            },
            Stage::Waiting(_) | Stage::Moving => unreachable!("only what was submitted ends"),
        };
        let result = result.map_err(|error| guest_errno(&error));
        // It stays in its place until ticket or mark is there: what a panic leaves there is marked when the queue is dropped.
        let change = self.ops[usize::from(op)].as_ref().expect("in flight");
        if let Some(capture) = &mut self.capture {
            let desc = Desc {
                kind: kind as u8,
                volume: capture.volume.index.0,
                len,
                offset: change.offset,
                length: change.len,
                ..Desc::default()
            };
            let position = match result {
                Ok(()) => capture.after(reservation, &desc),
                Err(errno) => {
                    capture.failed(reservation, &desc, errno);
                    None
                }
            };
            // Only now: ticket or mark is there.
            if let Some(activity) = &capture.activity {
                activity.volume.leave(&change.range(), position);
            }
            capture.owner.unlock(op, change.range());
        }
        let change = self.ops[usize::from(op)].take().expect("in flight");
        self.free.push(op);
        self.end(change.tag, result, None);
        self.go_on(io);
    }

    /// A guest's flush has ended; what the guest is to hear.
    fn flushed(&mut self, tag: u32, mut result: Result<(), Errno>) -> Result<(), Errno> {
        let Some(capture) = &mut self.capture else { return result };
        if let Some(activity) = &mut capture.activity
            && let Some(at) = activity.flushes.iter().position(|(of, _)| *of == tag)
        {
            let (_, number) = activity.flushes.swap_remove(at);
            match result {
                Ok(()) => activity.volume.end_flush(number),
                Err(_) => activity.volume.fail_flush(),
            }
            result = activity.volume.answer_flush(result);
        }
        if let Err(Errno(errno)) = result {
            capture.group.raise(Alarm::FlushFailed { volume: capture.volume.index, errno });
        }
        result
    }

    /// Starts what the last end has made possible.
    fn go_on<I: Io<Buf>>(&mut self, io: &mut I) {
        while let Some(op) = self.capture.as_ref().and_then(|capture| capture.owner.poll_granted()) {
            self.start(io, op);
        }
        while !self.line.is_empty()
            && let Some(op) = self.place()
            && let Some(change) = self.line.pop_front()
        {
            self.admit(io, op, change);
        }
    }

    fn count(&self, kind: u64, bytes: u64, failed: bool) {
        let Some(Capture { counters, .. }) = &self.capture else { return };
        add(if kind == READ { &counters.reads } else { &counters.flushes }, 1);
        if failed {
            add(&counters.errors, 1);
        } else if kind == READ {
            add(&counters.read_bytes, bytes);
        }
    }
}

impl Capture {
    /// Under the range lock, before the backing device sees anything.
    fn before(&mut self, reservation: Option<&mut Reservation>, offset: u64, len: u64) {
        self.volume.touched.mark(offset, len);
        match reservation {
            Some(reservation) => {
                reservation.writing(self.volume.index.0, offset, len);
                if self.producer.is_closed() {
                    // The claim will fail unless the ring opens meanwhile; both are covered.
                    self.group.mark_missing(&self.volume, offset, len);
                }
            }
            None => {
                self.group.mark_without_cell(&self.volume, offset, len);
                self.published = true;
            }
        }
    }

    /// Under the range lock, after the backing device has the bytes: ticket (its position), or mark.
    fn after(&mut self, reservation: Option<Reservation>, desc: &Desc) -> Option<u64> {
        let counters = &self.counters;
        if desc.kind == Kind::Write as u8 {
            add(&counters.writes, 1);
            add(&counters.written_bytes, desc.length);
        } else {
            add(&counters.zeroes, 1);
            add(&counters.zeroed_bytes, desc.length);
        }
        self.published = true;
        let refused = match reservation.map(|reservation| self.producer.publish(reservation, desc)) {
            Some(Ok(position)) => {
                add(&counters.captured, 1);
                add(&counters.captured_bytes, u64::from(desc.len));
                return Some(position);
            }
            Some(Err(closed)) => closed.reservation,
            None => None,
        };
        add(&counters.missed, 1);
        self.group.mark_missing(&self.volume, desc.offset, desc.length);
        // After the mark: until it is given back, the reservation notes the range in shared memory.
        drop(refused);
        None
    }

    /// Under the range lock: the backing device failed, so the content of the range is anybody's guess.
    fn failed(&mut self, reservation: Option<Reservation>, desc: &Desc, errno: Errno) {
        add(if desc.kind == Kind::Write as u8 { &self.counters.writes } else { &self.counters.zeroes }, 1);
        add(&self.counters.errors, 1);
        self.group.write_failed(&self.volume, desc.offset, desc.length, errno);
        self.published = true;
        // After the mark: the cell notes the range until it is given back.
        drop(reservation);
    }
}

impl BlockQueue for FilterQueue {
    type Buf = Buf;

    fn buffer(&mut self, purpose: Purpose, len: u32) -> Buf {
        if let (Purpose::Write, Some(capture)) = (purpose, &self.capture)
            && len > 0
        {
            match capture.producer.reserve(len as usize) {
                Ok(cell) => return Buf::Cell(cell),
                Err(_full) => add(&capture.counters.cell_misses, 1),
            }
        }
        other(self.pool.take(len as usize))
    }

    fn submit<I: Io<Buf>>(&mut self, io: &mut I, tag: u32, request: Request<Buf>) {
        let file = self.file;
        let token = |kind| Token::device(kind | u64::from(tag));
        match request {
            Request::Read { offset, len, buf } => io.submit(token(READ), Op::Read { file, offset, buf, len }),
            Request::Flush if self.read_only => self.end(tag, Ok(()), None),
            Request::Flush => {
                if let Some(Capture { activity: Some(activity), .. }) = &mut self.capture {
                    activity.flushes.push((tag, activity.volume.begin_flush()));
                }
                io.submit(token(FLUSH), Op::Sync { file });
            }
            Request::Write { offset, len, buf, fua } => {
                self.change(io, tag, offset, u64::from(len), Work::Write { buf, fua });
            }
            Request::Discard { offset, len } => {
                let work = Work::Zero { kind: Kind::Discard, method: Method::Punch, fua: false };
                self.change(io, tag, offset, len, work);
            }
            Request::WriteZeroes { offset, len, fua, no_hole } => {
                let method = if no_hole { Method::ZeroRange } else { Method::Punch };
                self.change(io, tag, offset, len, Work::Zero { kind: Kind::WriteZeroes, method, fua });
            }
        }
    }

    fn handle_completion<I: Io<Buf>>(&mut self, io: &mut I, completion: Completion<Buf>) {
        let Completion { token, result, buf } = completion;
        let value = token.value();
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the tag or the place")]
        let low = value as u32;
        if value & KIND == CHANGE {
            let op = u16::try_from(low).expect("places are below OPS_MAX");
            return self.changed(io, op, result, buf);
        }
        let kind = value & KIND;
        let bytes = result.as_ref().map_or(0, |bytes| u64::from(*bytes));
        let mut result = result.map(|_| ()).map_err(|error| guest_errno(&error));
        if kind == FLUSH {
            result = self.flushed(low, result);
        }
        self.count(kind, bytes, result.is_err());
        self.end(low, result, if kind == READ { buf } else { None });
    }

    fn handle_wake<I: Io<Buf>>(&mut self, io: &mut I) {
        self.unpark(io);
        self.go_on(io);
    }

    /// After the last one it also wakes the ring's consumer, if that sleeps: drain it.
    fn poll_done(&mut self) -> Option<Done<Buf>> {
        let done = self.done.pop_front();
        if done.is_none()
            && let Some(capture) = &mut self.capture
            && capture.published
        {
            capture.published = false;
            if capture.producer.consumer_sleeping() {
                capture.group.wake_consumer();
            }
        }
        done
    }

    fn close<I: Io<Buf>>(&mut self, io: &mut I) {
        io.unregister(self.file);
    }
}

impl Drop for FilterQueue {
    fn drop(&mut self) {
        let Some(capture) = &mut self.capture else { return };
        let mut lost = 0;
        for (op, change) in (0_u16..).zip(&mut self.ops) {
            let Some(change) = change.take() else { continue };
            let begun = !matches!(change.stage, Stage::Waiting(_));
            if begun {
                // Its end will never be heard of here.
                capture.group.mark_missing(&capture.volume, change.offset, change.len);
                lost += 1;
            }
            // One that waits for its range has not entered.
            if let Some(activity) = capture.activity.as_ref().filter(|it| begun || it.parked.contains(&op)) {
                activity.volume.leave(&change.range(), None);
            }
            capture.owner.unlock(op, change.range());
        }
        if let Some(activity) = &capture.activity {
            activity.volume.leave_queue(activity.queue);
        }
        capture.volume.counters.close(&capture.counters);
        if lost > 0 {
            capture.group.raise(Alarm::QueueDropped { volume: capture.volume.index, requests: lost });
        }
    }
}

impl std::fmt::Debug for FilterQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FilterQueue")
            .field("captured", &self.capture.is_some())
            .field("changes_in_flight", &self.changes_in_flight())
            .finish_non_exhaustive()
    }
}
