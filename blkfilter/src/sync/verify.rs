//! Verify: whether the replica holds what the source holds, slot by slot, beside the guest's writes.
//!
//! A slot is read from the backing device under its range lock, and the id of what was read takes its place in the stream before
//! the lock is given back (a `Probe`, or `ProbeZero`, as in sync). No write comes between: at that ticket the replica must hold just
//! this, whatever the guest writes later, so a "differs" is no race's fault. It is asked once more all the same before it is said.
//! Runs of holes are asked about without lock or read; a "differs" of one leads to reads under the lock, like any other.
//!
//! Nothing is verified while sync has anything to do for any volume of the group: what is missing is known to differ, and sync may
//! block its thread, which nobody's lock may wait for. A lock is held, or waited for (which holds up later writes as well), for at
//! most `stall_max` from the request on (I1). A slot that cannot be read, or that always has writes in flight, is given up after some
//! tries and named. Nothing is repaired here: which side is right, a person decides.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use farshore_proto::message::Answer;
use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_proto::{ChunkId, Now, Position, SLOT_BYTES, VolumeIndex};
use farshore_uring::{Completion, Io, Op, Token};

use super::claim::differing;
use super::scan::ZERO_RUN;
use super::slot::is_zero;
use super::{BACKOFF, SLOT_LEN, SyncVolume, Syncer};
use crate::Buf;
use crate::alarm::Alarm;
use crate::group::NoRoom;

/// Slots that are read at a time, over all volumes; each holds its range lock.
pub(super) const CHECKS: usize = 4;
/// Most questions under way.
const ASKED_MAX: usize = 64;
/// Tries at a slot that has a write in flight each time, before its turn is waited for in the line.
const BUSY_MAX: u8 = 20;
/// Tries before a slot is given up.
const TRIES_MAX: u8 = 40;
/// Pause before a slot with a write in flight, or a ring without room, is looked at again.
const PAUSE: Duration = Duration::from_millis(20);
/// Reads of a limited pass come together, so often, for each look makes a batch: spread, they would keep an idle group cutting.
const BURST: Duration = Duration::from_secs(1);
/// Most ranges kept of what differs in one pass; more are counted only.
pub const DIFFERENCES_MAX: usize = 256;
/// Bit of a completion's token: of a check, not of sync.
pub(super) const CHECK: u64 = 1 << 16;

/// A pass over one volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifyOrder {
    /// The volume.
    pub volume: VolumeIndex,
    /// Whoever orders it knows it by this; its end bears it.
    pub pass: u64,
    /// First byte; a pass that was cut off goes on from where it was.
    pub from: u64,
    /// Most bytes read per second; `None`: as fast as device, ring and link take it.
    pub rate: Option<u64>,
}

/// What a pass found so far.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct VerifyFound {
    /// Bytes that were the same on both sides.
    pub equal_bytes: u64,
    /// Bytes that were not.
    pub differing_bytes: u64,
    /// Where those are, in whole slots and in no order; at most [`DIFFERENCES_MAX`] ranges.
    pub differing: Vec<Range<u64>>,
    /// Bytes that could not be compared: unreadable, or written to at every try.
    pub skipped_bytes: u64,
    /// Where those are, as [`Self::differing`].
    pub skipped: Vec<Range<u64>>,
}

/// How far a pass is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyProgress {
    /// Which pass.
    pub pass: u64,
    /// Every byte before this one, from the pass's first on, has been dealt with or is under way.
    pub at: u64,
    /// What it found.
    pub found: VerifyFound,
}

/// What comes of a pass.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VerifyEvent {
    /// Source and replica differ here: asked twice, with no write in between either time.
    Differs {
        /// The volume.
        volume: VolumeIndex,
        /// Bytes of it.
        range: Range<u64>,
    },
    /// The pass is at its end.
    Ended {
        /// The volume.
        volume: VolumeIndex,
        /// Which one.
        pass: u64,
        /// Where it began.
        from: u64,
        /// What it found.
        found: VerifyFound,
    },
}

/// What verify has under way.
#[derive(Debug, Default)]
pub(super) struct Verify {
    checks: [Option<Check>; CHECKS],
    asked: BTreeMap<u64, Asked>,
    passes: BTreeMap<u16, Pass>,
    /// Bounded: one for each slot that differs twice, taken after each turn.
    events: VecDeque<VerifyEvent>,
}

#[derive(Debug)]
struct Pass {
    id: u64,
    from: u64,
    rate: Option<u64>,
    /// Slots that the rate allows until `refill`.
    budget: u64,
    refill: Now,
    /// Not before then.
    pause: Now,
    /// Next slot.
    cursor: u64,
    /// Runs that must be looked at (again), and whether that is because they differed. Bounded by what is under way.
    again: VecDeque<Piece>,
    /// Slots of it that are being read or asked about.
    under_way: u64,
    found: VerifyFound,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    first: u64,
    count: u64,
    differed: bool,
    tries: u8,
}

/// A slot being read.
#[derive(Debug)]
struct Check {
    volume: u16,
    piece: Piece,
    range: Range<u64>,
    /// When its lock, or its place in the line, is given back.
    until: Now,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For the range lock.
    Waiting(Buf),
    /// Under its lock.
    Reading,
    /// It took too long: the lock was given back.
    Expired,
    /// The volume or its pass is gone, and so is the lock.
    Orphan,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "a slot that verify reads",
    file: file!(),
    owner: "`Syncer`, the group's sync thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "waiting for its range",
        limit: Limit::Setting("`stall_max` 50 ms"),
        exit: "granted; at the limit its place in the line is given back, and the slot is tried again, 40 times in all, then skipped",
    },
    StateDoc {
        state: "reading",
        limit: Limit::Setting("`stall_max` 50 ms"),
        exit: "its hash is in the stream; at the limit the lock is given back",
    },
    StateDoc {
        state: "expired",
        limit: Limit::None("the device's; nobody waits for it"),
        exit: "the device answers; tried again",
    },
    StateDoc { state: "orphan", limit: Limit::None("the device's; nobody waits for it"), exit: "the device answers" },
];
const _: fn(&Stage) -> &StateDoc = |stage| match stage {
    Stage::Waiting(_) => &STATES[0],
    Stage::Reading => &STATES[1],
    Stage::Expired => &STATES[2],
    Stage::Orphan => &STATES[3],
};

#[derive(Clone, Copy, Debug)]
struct Asked {
    volume: u16,
    piece: Piece,
    /// When its batch was known to be durable.
    durable: Option<Now>,
}

/// Adds a range to a list that has a limit.
fn note(list: &mut Vec<Range<u64>>, range: Range<u64>) {
    if let Some(known) = list.iter_mut().find(|known| known.end == range.start || range.end == known.start) {
        *known = known.start.min(range.start)..known.end.max(range.end);
    } else if list.len() < DIFFERENCES_MAX {
        list.push(range);
    }
}

impl VerifyFound {
    fn differs(&mut self, range: Range<u64>) {
        self.differing_bytes += range.end - range.start;
        note(&mut self.differing, range);
    }

    fn skips(&mut self, range: Range<u64>) {
        self.skipped_bytes += range.end - range.start;
        note(&mut self.skipped, range);
    }
}

impl Pass {
    /// Whether a slot may be looked at now, and when else.
    fn due(&self) -> Now {
        let by_rate = if self.rate.is_some() && self.budget == 0 { self.refill } else { Now(0) };
        by_rate.max(self.pause)
    }

    /// One slot is looked at.
    fn spend(&mut self, now: Now) {
        let Some(rate) = self.rate else { return };
        if self.budget == 0 {
            // As many as a burst's time allows, or one in its own time.
            self.budget = (rate / SLOT_BYTES).max(1);
            let cost = u128::from(self.budget * SLOT_BYTES) * BURST.as_nanos() / u128::from(rate.max(1));
            self.refill = Now(now.0.saturating_add(u64::try_from(cost).unwrap_or(u64::MAX)));
        }
        self.budget -= 1;
    }
}

impl Syncer {
    /// Begins a pass over a volume; one under way over the same volume is given up. `false`: there is no such volume.
    pub fn begin_verify(&mut self, order: VerifyOrder) -> bool {
        let index = order.volume.0;
        self.end_verify(index);
        if !self.volumes.contains_key(&index) {
            return false;
        }
        let pass = Pass {
            id: order.pass,
            from: order.from,
            rate: order.rate,
            budget: 0,
            refill: self.now,
            pause: self.now,
            cursor: order.from / SLOT_BYTES,
            again: VecDeque::new(),
            under_way: 0,
            found: VerifyFound::default(),
        };
        self.verify.passes.insert(index, pass);
        true
    }

    /// How far the pass over a volume is; `None`: there is none under way.
    #[must_use]
    pub fn verify_progress(&self, volume: VolumeIndex) -> Option<VerifyProgress> {
        let pass = self.verify.passes.get(&volume.0)?;
        // What is under way is lost with this process; a pass that goes on later begins before it.
        let checks =
            self.verify.checks.iter().flatten().filter(|check| check.volume == volume.0).map(|check| check.piece.first);
        let asked = self.verify.asked.values().filter(|asked| asked.volume == volume.0).map(|asked| asked.piece.first);
        let again = pass.again.iter().map(|piece| piece.first);
        let slot = checks.chain(asked).chain(again).fold(pass.cursor, u64::min);
        let size = self.volumes.get(&volume.0).map_or(0, |volume| volume.volume.size());
        Some(VerifyProgress { pass: pass.id, at: (slot * SLOT_BYTES).min(size), found: pass.found.clone() })
    }

    /// The next thing that a pass has to say. To be taken after every [`Self::poll`].
    pub fn poll_verify(&mut self) -> Option<VerifyEvent> {
        self.verify.events.pop_front()
    }

    /// Gives up a volume's pass. Reads under way end unheard; their locks are given back now.
    pub(super) fn end_verify(&mut self, index: u16) {
        self.verify.passes.remove(&index);
        self.verify.asked.retain(|_, asked| asked.volume != index);
        let base = self.check_op(0);
        let owner = self.volumes.get(&index).map(|volume| &volume.owner);
        for (op, place) in (base..).zip(&mut self.verify.checks) {
            let Some(check) = place.as_mut().filter(|check| check.volume == index) else { continue };
            let before = std::mem::replace(&mut check.stage, Stage::Orphan);
            if let (Stage::Waiting(_) | Stage::Reading, Some(owner)) = (&before, owner) {
                owner.unlock(op, check.range.clone());
            }
            if let Stage::Waiting(_) = before {
                *place = None;
            }
        }
    }

    /// Questions before `from` are not answered any more.
    pub(super) fn forget_asked(&mut self, from: Position) {
        let later = self.verify.asked.split_off(&from.0);
        for asked in std::mem::replace(&mut self.verify.asked, later).into_values() {
            self.look_again(&asked);
        }
    }

    /// Questions whose answer does not come.
    pub(super) fn ask_checks_again(&mut self) {
        let timeout = self.config.answer_timeout;
        let late = |asked: &Asked| asked.durable.is_some_and(|since| self.now.since(since) > timeout);
        let late: Vec<u64> = self.verify.asked.iter().filter(|(_, asked)| late(asked)).map(|(at, _)| *at).collect();
        for position in late {
            let asked = self.verify.asked.remove(&position).expect("collected above");
            self.look_again(&asked);
        }
    }

    fn look_again(&mut self, asked: &Asked) {
        if let Some(pass) = self.verify.passes.get_mut(&asked.volume) {
            pass.under_way -= asked.piece.count;
            pass.again.push_back(asked.piece);
        }
    }

    /// Everything below `position` is durable: answers are due.
    pub(super) fn checks_durable(&mut self, position: Position) {
        let now = self.now;
        for (_, asked) in self.verify.asked.range_mut(..position.0) {
            asked.durable.get_or_insert(now);
        }
    }

    /// The answers to one question of verify's, if it is one.
    pub(super) fn check_answered(&mut self, volume: VolumeIndex, position: Position, results: &[Answer]) {
        let Some(asked) = self.verify.asked.get(&position.0).filter(|asked| asked.volume == volume.0).copied() else {
            return;
        };
        self.verify.asked.remove(&position.0);
        let Some(pass) = self.verify.passes.get_mut(&asked.volume) else { return };
        let Some(of) = self.volumes.get(&asked.volume) else { return };
        let Piece { first, count, differed, .. } = asked.piece;
        pass.under_way -= count;
        let mut at = first;
        for run in differing(first, count, results).chunk_by(|a, b| a == b) {
            let piece = Piece { first: at, count: run.len() as u64, differed: true, tries: 0 };
            let bytes = of.volume.bytes_of(at, piece.count);
            at += piece.count;
            match (run[0], differed) {
                (false, _) => pass.found.equal_bytes += bytes.end - bytes.start,
                (true, false) => pass.again.push_back(piece),
                (true, true) => {
                    pass.found.differs(bytes.clone());
                    self.verify.events.push_back(VerifyEvent::Differs { volume, range: bytes });
                }
            }
        }
    }

    /// Looks at as many slots as may be looked at now.
    pub(super) fn verify<I: Io<Buf>>(&mut self, io: &mut I) {
        let volumes: Vec<u16> = self.verify.passes.keys().copied().collect();
        for index in volumes {
            while self.verify_ready(index) && self.check_next(io, index) {}
            self.end_pass(index);
        }
    }

    /// Source and replica are meant to be the same, sync has nothing to do that could block its thread, and there is room for a look.
    fn verify_ready(&self, index: u16) -> bool {
        let sound = |volume: &SyncVolume| volume.clean && volume.busy.is_empty() && volume.volume.announced();
        !self.group.event_open()
            && self.volumes.values().all(sound)
            && self.verify.asked.len() < ASKED_MAX
            && self.verify.checks.iter().any(Option::is_none)
            && self.verify.passes.get(&index).is_some_and(|pass| pass.due() <= self.now)
    }

    /// A range lock is held or waited for: nothing that may block is done on this thread meanwhile.
    pub(super) fn checks_hold_locks(&self) -> bool {
        let holds = |check: &Check| matches!(check.stage, Stage::Waiting(_) | Stage::Reading);
        self.verify.checks.iter().flatten().any(holds)
    }

    /// Begins with the next slots of a pass; `false`: there is none, or no room.
    fn check_next<I: Io<Buf>>(&mut self, io: &mut I, index: u16) -> bool {
        let (now, free_to_ask) = (self.now, !self.checks_hold_locks());
        let (Some(pass), Some(of)) = (self.verify.passes.get_mut(&index), self.volumes.get(&index)) else {
            return false;
        };
        let (piece, holes) = if let Some(run) = pass.again.pop_front_if(|piece| piece.count > 1 && !piece.differed) {
            // Holes that could not be asked about.
            if !free_to_ask {
                pass.again.push_front(run);
                return false;
            }
            let holes = of.holes(run.first, run.count);
            let taken = holes.max(1);
            if taken < run.count {
                pass.again.push_front(Piece { first: run.first + taken, count: run.count - taken, ..run });
            }
            (Piece { count: 1, ..run }, holes)
        } else if let Some(piece) = pass.again.front_mut() {
            let next = Piece { count: 1, ..*piece };
            piece.first += 1;
            piece.count -= 1;
            if piece.count == 0 {
                pass.again.pop_front();
            }
            (next, 0)
        } else if pass.cursor < of.volume.slots() {
            let next = Piece { first: pass.cursor, count: 1, differed: false, tries: 0 };
            let most = (of.volume.slots() - pass.cursor).min(ZERO_RUN);
            (next, if free_to_ask { of.holes(next.first, most) } else { 0 })
        } else {
            return false;
        };
        pass.spend(now);
        pass.cursor = pass.cursor.max(piece.first + 1).max(piece.first + holes);
        if holes == 0 {
            pass.under_way += 1;
            return self.check(io, index, piece);
        }
        let piece = Piece { count: holes, ..piece };
        pass.under_way += holes;
        self.ask_checked(index, piece, None).is_ok() || self.put_back(index, piece, PAUSE)
    }

    /// Not now: again after a pause. Always `false`.
    fn put_back(&mut self, index: u16, piece: Piece, pause: Duration) -> bool {
        let until = self.now.plus(pause);
        if let Some(pass) = self.verify.passes.get_mut(&index) {
            pass.under_way -= piece.count;
            pass.again.push_back(piece);
            pass.pause = pass.pause.max(until);
        }
        false
    }

    /// Reads a slot as soon as it has its lock. `false`: not now.
    fn check<I: Io<Buf>>(&mut self, io: &mut I, index: u16, piece: Piece) -> bool {
        let at = self.verify.checks.iter().position(Option::is_none).expect("looked at before");
        let (op, of) = (self.check_op(at), &self.volumes[&index]);
        let range = of.volume.bytes_of(piece.first, 1);
        // In line it would keep back writes that have nothing to do with the one in flight.
        let granted = if piece.tries % BUSY_MAX < BUSY_MAX - 1 {
            if !of.owner.try_lock(op, range.clone()) {
                return self.try_again(index, piece, PAUSE);
            }
            true
        } else {
            of.owner.lock(op, range.clone())
        };
        let until = self.now.plus(self.group.config().stall_max);
        let stage = Stage::Waiting(Buf::Other(self.pool.take(SLOT_LEN)));
        self.verify.checks[at] = Some(Check { volume: index, piece, range, until, stage });
        if granted {
            self.read_checked(io, at);
        }
        true
    }

    /// A try at a slot failed; after many it is given up. Always `false`.
    fn try_again(&mut self, index: u16, piece: Piece, pause: Duration) -> bool {
        if piece.tries >= TRIES_MAX {
            self.skip(index, piece);
            return false;
        }
        self.put_back(index, Piece { tries: piece.tries + 1, ..piece }, pause)
    }

    /// A slot is given up.
    fn skip(&mut self, index: u16, piece: Piece) {
        if let (Some(pass), Some(of)) = (self.verify.passes.get_mut(&index), self.volumes.get(&index)) {
            pass.under_way -= piece.count;
            pass.found.skips(of.volume.bytes_of(piece.first, piece.count));
        }
    }

    /// The request number of a check in its volume's range locks: behind sync's.
    pub(super) fn check_op(&self, at: usize) -> u16 {
        u16::try_from(self.tasks.len() + 1 + at).expect("the window is at most 256")
    }

    /// A lock that was waited for, of the request `op`.
    pub(super) fn check_locked<I: Io<Buf>>(&mut self, io: &mut I, volume: u16, op: u16) {
        let at = usize::from(op - self.check_op(0));
        if self.verify.checks.get(at).is_some_and(|check| check.as_ref().is_some_and(|check| check.volume == volume)) {
            self.read_checked(io, at);
        }
    }

    /// The lock is there.
    fn read_checked<I: Io<Buf>>(&mut self, io: &mut I, at: usize) {
        let Some(check) = &mut self.verify.checks[at] else { return };
        let Stage::Waiting(buf) = std::mem::replace(&mut check.stage, Stage::Reading) else {
            unreachable!("a lock is granted once, to one who waits")
        };
        let file = self.volumes[&check.volume].file;
        let len = u32::try_from(check.range.end - check.range.start).expect("at most a slot");
        io.submit(Token::device(CHECK | at as u64), Op::Read { file, offset: check.range.start, buf, len });
    }

    /// Locks that were held, or waited for, for too long (I1).
    pub(super) fn expire_checks(&mut self) {
        for at in 0..CHECKS {
            let op = self.check_op(at);
            let Some(check) = self.verify.checks[at].as_mut().filter(|check| check.until <= self.now) else { continue };
            let waited = match check.stage {
                Stage::Waiting(_) => true,
                Stage::Reading => false,
                Stage::Expired | Stage::Orphan => continue,
            };
            check.stage = Stage::Expired;
            let (index, piece) = (check.volume, check.piece);
            if let Some(of) = self.volumes.get(&index) {
                of.owner.unlock(op, check.range.clone());
            }
            if waited {
                // Nothing of it is under way.
                self.verify.checks[at] = None;
                self.try_again(index, piece, BACKOFF);
            }
        }
    }

    /// When to look at the checks and passes again, if nothing else happens.
    pub(super) fn verify_deadline(&self) -> Option<Now> {
        let locks = self.verify.checks.iter().flatten().filter_map(|check| match check.stage {
            Stage::Waiting(_) | Stage::Reading => Some(check.until),
            Stage::Expired | Stage::Orphan => None,
        });
        let passes = self.verify.passes.values().map(Pass::due).filter(|at| *at > self.now);
        locks.chain(passes).min()
    }

    /// A check's read ended.
    pub(super) fn check_read(&mut self, completion: Completion<Buf>) {
        let at = usize::try_from(completion.token.value() & !CHECK).expect("one of few");
        let op = self.check_op(at);
        let Some(check) = self.verify.checks.get_mut(at).and_then(Option::take) else { return };
        let Some(buf) = completion.buf else { return };
        let (index, piece) = (check.volume, check.piece);
        let in_time = match check.stage {
            Stage::Orphan => return,
            Stage::Expired => false,
            Stage::Reading => true,
            Stage::Waiting(_) => unreachable!("nothing was under way"),
        };
        let len = check.range.end - check.range.start;
        match completion.result {
            Err(error) => {
                tracing::warn!(volume = index, slot = piece.first, %error, "cannot verify a slot: it cannot be read");
                self.group.raise(Alarm::Unreadable { volume: VolumeIndex(index), offset: check.range.start, len });
                self.skip(index, piece);
            }
            // What was read is of no moment that has a ticket.
            Ok(_) if !in_time => {
                _ = self.try_again(index, Piece { tries: piece.tries.max(TRIES_MAX - 3), ..piece }, BACKOFF)
            }
            Ok(_) => {
                let content = &buf[..usize::try_from(len).expect("at most a slot")];
                let id = (!is_zero(content)).then(|| self.key.chunk_id(content));
                // Marked since: sync deals with it first.
                let missing = self.volumes[&index].volume.missing.test(piece.first);
                if missing || self.ask_checked(index, piece, id).is_err() {
                    self.put_back(index, piece, PAUSE);
                }
            }
        }
        if in_time && let Some(of) = self.volumes.get(&index) {
            of.owner.unlock(op, check.range);
        }
    }

    /// Asks about a slot whose range the caller has locked since before it read it, or about slots that are holes.
    fn ask_checked(&mut self, index: u16, piece: Piece, id: Option<ChunkId>) -> Result<(), NoRoom> {
        let position = self.publish_question(index, piece.first, piece.count, id, true)?;
        self.verify.asked.insert(position, Asked { volume: index, piece, durable: None });
        Ok(())
    }

    fn end_pass(&mut self, index: u16) {
        let over = |pass: &mut Pass| {
            let end = self.volumes.get(&index).map_or(0, |of| of.volume.slots());
            pass.cursor >= end && pass.again.is_empty() && pass.under_way == 0
        };
        if !self.verify.passes.get_mut(&index).is_some_and(over) {
            return;
        }
        let Pass { id: pass, from, found, .. } = self.verify.passes.remove(&index).expect("looked at just now");
        self.verify.events.push_back(VerifyEvent::Ended { volume: VolumeIndex(index), pass, from, found });
    }
}

impl SyncVolume {
    /// How many slots from `first` on are holes, up to `most`. May block.
    fn holes(&self, first: u64, most: u64) -> u64 {
        if self.zero_slots(first, 1) != [true] {
            return 0;
        }
        self.zero_slots(first, most).iter().take_while(|zero| **zero).count() as u64
    }
}
