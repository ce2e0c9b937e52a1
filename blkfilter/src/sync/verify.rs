//! Verify: whether the replica holds what the source holds, slot by slot, beside the guest's writes.
//!
//! A slot is read from the backing device under its range lock, and the id of what was read takes its place in the stream before
//! the lock is given back (a `Probe`, or `ProbeZero`, as in sync). No write comes between: at that ticket the replica must hold just
//! this, whatever the guest writes later, so a "differs" is no race's fault. It is asked once more all the same before it is said.
//! What is missing anyway is left to sync, and nothing is verified while an event is open.
//!
//! The lock is held for one read of a slot, at most `stall_max` (I1); with holes in the backing file, for asking where they are.
//! Nothing is repaired here: which side is right, a person decides.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use farshore_proto::message::Answer;
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
}

/// How far a pass is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifyProgress {
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
    /// Time from which the rate allows the next read.
    allowed: Now,
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
}

/// A slot being read.
#[derive(Debug)]
struct Check {
    volume: u16,
    slot: u64,
    differed: bool,
    range: Range<u64>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For the range lock.
    Waiting(Buf),
    /// Under its lock, until then.
    Reading(Now),
    /// It took too long: the lock was given back.
    Expired,
    /// The volume or its pass is gone, and so is the lock.
    Orphan,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    volume: u16,
    piece: Piece,
    /// When its batch was known to be durable.
    durable: Option<Now>,
}

impl VerifyFound {
    fn differs(&mut self, range: Range<u64>) {
        self.differing_bytes += range.end - range.start;
        if let Some(known) = self.differing.iter_mut().find(|it| it.end == range.start || range.end == it.start) {
            *known = known.start.min(range.start)..known.end.max(range.end);
        } else if self.differing.len() < DIFFERENCES_MAX {
            self.differing.push(range);
        }
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
            allowed: self.now,
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
            self.verify.checks.iter().flatten().filter(|check| check.volume == volume.0).map(|check| check.slot);
        let asked = self.verify.asked.values().filter(|asked| asked.volume == volume.0).map(|asked| asked.piece.first);
        let again = pass.again.iter().map(|piece| piece.first);
        let slot = checks.chain(asked).chain(again).fold(pass.cursor, u64::min);
        let size = self.volumes.get(&volume.0).map_or(0, |volume| volume.volume.size());
        Some(VerifyProgress { at: (slot * SLOT_BYTES).min(size), found: pass.found.clone() })
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
            if let (Stage::Waiting(_) | Stage::Reading(_), Some(owner)) = (&before, owner) {
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
        let Piece { first, count, differed } = asked.piece;
        pass.under_way -= count;
        let mut at = first;
        for run in differing(first, count, results).chunk_by(|a, b| a == b) {
            let piece = Piece { first: at, count: run.len() as u64, differed: true };
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

    /// Source and replica are meant to be the same, and there is room for a look.
    fn verify_ready(&self, index: u16) -> bool {
        let sound = |volume: &SyncVolume| volume.clean && volume.busy.is_empty() && volume.volume.announced();
        !self.group.event_open()
            && self.volumes.get(&index).is_some_and(sound)
            && self.verify.asked.len() < ASKED_MAX
            && self.verify.checks.iter().any(Option::is_none)
            && self.verify.passes.get(&index).is_some_and(|pass| pass.allowed <= self.now)
    }

    /// Begins with the next slots of a pass; `false`: there is none, or no room.
    fn check_next<I: Io<Buf>>(&mut self, io: &mut I, index: u16) -> bool {
        let now = self.now;
        let (Some(pass), Some(of)) = (self.verify.passes.get_mut(&index), self.volumes.get(&index)) else {
            return false;
        };
        let (piece, most) = if let Some(piece) = pass.again.front_mut() {
            let next = Piece { count: 1, ..*piece };
            piece.first += 1;
            piece.count -= 1;
            if piece.count == 0 {
                pass.again.pop_front();
            }
            (next, 1)
        } else if pass.cursor < of.volume.slots() {
            let next = Piece { first: pass.cursor, count: 1, differed: false };
            pass.cursor += 1;
            (next, (of.volume.slots() - next.first).min(ZERO_RUN))
        } else {
            return false;
        };
        let first = piece.first;
        if of.volume.missing.test(first) {
            return true;
        }
        if let Some(rate) = pass.rate {
            let cost = u128::from(SLOT_BYTES) * 1_000_000_000 / u128::from(rate.max(1));
            pass.allowed = Now(now.0.saturating_add(u64::try_from(cost).unwrap_or(u64::MAX)));
        }
        pass.under_way += 1;
        if most > 1 && of.zero_slots(first, 1) == [true] {
            match self.check_zeroes(index, first, most) {
                Ok(0) => {}
                Ok(count) => {
                    if let Some(pass) = self.verify.passes.get_mut(&index) {
                        pass.cursor = first + count;
                        pass.under_way += count - 1;
                    }
                    return true;
                }
                Err(NoRoom) => return self.put_back(index, piece),
            }
        }
        self.check(io, index, piece);
        true
    }

    /// No room in the ring: later. Always `false`.
    fn put_back(&mut self, index: u16, piece: Piece) -> bool {
        if let Some(pass) = self.verify.passes.get_mut(&index) {
            pass.under_way -= piece.count;
            pass.again.push_back(piece);
        }
        false
    }

    /// Asks about slots that are holes. The number of them; 0: not that many after all, or a write is in flight to them.
    fn check_zeroes(&mut self, index: u16, first: u64, most: u64) -> Result<u64, NoRoom> {
        let brief = self.brief_op();
        let of = &self.volumes[&index];
        let whole = |of: &SyncVolume, most: u64| {
            let zero = of.zero_slots(first, most);
            let slots = (first..).zip(&zero).take_while(|(slot, zero)| **zero && !of.volume.missing.test(*slot));
            slots.count() as u64
        };
        let wanted = whole(of, most);
        let range = of.volume.bytes_of(first, wanted);
        if wanted == 0 || !of.owner.try_lock(brief, range.clone()) {
            return Ok(0);
        }
        // Under the lock they stay what they are.
        let count = whole(&self.volumes[&index], wanted);
        let piece = Piece { first, count, differed: false };
        let asked = if count == 0 { Ok(()) } else { self.ask_checked(index, piece, None) };
        self.volumes[&index].owner.unlock(brief, range);
        asked.map(|()| count)
    }

    fn check<I: Io<Buf>>(&mut self, io: &mut I, index: u16, piece: Piece) {
        let at = self.verify.checks.iter().position(Option::is_none).expect("looked at before");
        let of = &self.volumes[&index];
        let range = of.volume.bytes_of(piece.first, 1);
        let buf = Buf::Other(self.pool.take(SLOT_LEN));
        let granted = of.owner.lock(self.check_op(at), range.clone());
        let Piece { first: slot, differed, .. } = piece;
        self.verify.checks[at] = Some(Check { volume: index, slot, differed, range, stage: Stage::Waiting(buf) });
        if granted {
            self.read_checked(io, at);
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
        let until = self.now.plus(self.group.config().stall_max);
        let Some(check) = &mut self.verify.checks[at] else { return };
        let Stage::Waiting(buf) = std::mem::replace(&mut check.stage, Stage::Reading(until)) else {
            unreachable!("a lock is granted once, to one who waits")
        };
        let file = self.volumes[&check.volume].file;
        let len = u32::try_from(check.range.end - check.range.start).expect("at most a slot");
        io.submit(Token::device(CHECK | at as u64), Op::Read { file, offset: check.range.start, buf, len });
    }

    /// Locks that were held for too long (I1).
    pub(super) fn expire_checks(&mut self) {
        let base = self.check_op(0);
        for (op, check) in (base..).zip(&mut self.verify.checks) {
            let Some(check) =
                check.as_mut().filter(|check| matches!(check.stage, Stage::Reading(until) if until <= self.now))
            else {
                continue;
            };
            check.stage = Stage::Expired;
            if let Some(of) = self.volumes.get(&check.volume) {
                of.owner.unlock(op, check.range.clone());
            }
        }
    }

    /// When to look at the checks and passes again, if nothing else happens.
    pub(super) fn verify_deadline(&self) -> Option<Now> {
        let locks = self.verify.checks.iter().flatten().filter_map(|check| match check.stage {
            Stage::Reading(until) => Some(until),
            Stage::Waiting(_) | Stage::Expired | Stage::Orphan => None,
        });
        let passes = self.verify.passes.values().map(|pass| pass.allowed).filter(|at| *at > self.now);
        locks.chain(passes).min()
    }

    /// A check's read ended.
    pub(super) fn check_read(&mut self, completion: Completion<Buf>) {
        let at = usize::try_from(completion.token.value() & !CHECK).expect("one of few");
        let op = self.check_op(at);
        let Some(check) = self.verify.checks.get_mut(at).and_then(Option::take) else { return };
        let Some(buf) = completion.buf else { return };
        let piece = Piece { first: check.slot, count: 1, differed: check.differed };
        match check.stage {
            Stage::Orphan => return,
            Stage::Expired => {
                self.put_back(check.volume, piece);
                let later = self.now.plus(BACKOFF);
                if let Some(pass) = self.verify.passes.get_mut(&check.volume) {
                    pass.allowed = pass.allowed.max(later);
                }
                return;
            }
            Stage::Reading(_) => {}
            Stage::Waiting(_) => unreachable!("nothing was under way"),
        }
        let index = check.volume;
        let missing = self.volumes[&index].volume.missing.test(check.slot);
        let done = match completion.result {
            _ if missing => Ok(false),
            Err(error) => {
                tracing::warn!(volume = index, slot = check.slot, %error, "cannot verify a slot: it cannot be read");
                let (offset, len) = (check.range.start, check.range.end - check.range.start);
                self.group.raise(Alarm::Unreadable { volume: VolumeIndex(index), offset, len });
                Ok(false)
            }
            Ok(_) => {
                let len = usize::try_from(check.range.end - check.range.start).expect("at most a slot");
                let id = (!is_zero(&buf[..len])).then(|| self.key.chunk_id(&buf[..len]));
                self.ask_checked(index, piece, id).map(|()| true)
            }
        };
        self.volumes[&index].owner.unlock(op, check.range);
        match done {
            Ok(true) => {}
            Ok(false) => {
                if let Some(pass) = self.verify.passes.get_mut(&index) {
                    pass.under_way -= 1;
                }
            }
            Err(NoRoom) => _ = self.put_back(index, piece),
        }
    }

    /// Asks about slots whose range the caller has locked since before it read them.
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
