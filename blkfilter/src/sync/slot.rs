//! What is done with single slots and runs of them.

use std::ops::Range;

use farshore_proto::record::Kind;
use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_proto::{ChunkId, Now};
use farshore_ring::Reservation;
use farshore_uring::{Completion, Io, Op, Token};

use super::claim::cell_bytes;
use super::{BACKOFF, SLOT_LEN, Syncer, TORN_MAX};
use crate::alarm::Alarm;
use crate::group::NoRoom;
use crate::{Buf, Volume};

/// Bytes read at a time where a slot could not be read as a whole.
const PIECE: usize = 4096;

/// Something to be done as soon as there is room for it. Its slots are busy.
#[derive(Debug)]
pub(super) enum Job {
    /// Read a slot; `probe`: to ask about it, else to send it.
    Read { volume: u16, slot: u64, probe: bool, tries: u8, watched: bool },
    /// Slots that are zero and watched: ask about them, or send.
    Zero { volume: u16, first: u64, count: u64, probe: bool, tries: u8 },
    /// A watched slot whose content has this id: ask about it.
    Ask { volume: u16, slot: u64, id: Option<ChunkId>, tries: u8 },
}

impl Job {
    pub(super) fn volume(&self) -> u16 {
        match self {
            Self::Read { volume, .. } | Self::Zero { volume, .. } | Self::Ask { volume, .. } => *volume,
        }
    }
}

/// A slot being read.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) volume: u16,
    slot: u64,
    probe: bool,
    tries: u8,
    range: Range<u64>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For the range lock; the buffer is ready.
    Waiting(Option<Buf>),
    /// Under way.
    Reading(Hold),
    /// Piece by piece, because the device failed to read the whole: what was read, and which pieces.
    Pieces { data: Box<[u8]>, good: Vec<bool> },
    /// The volume is gone.
    Orphan,
    /// The volume is gone, and nothing is under way.
    Over,
}

/// How a read stands to its range lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    /// Never had it; the slot is watched.
    Watched,
    /// Has it until then.
    Locked(Now),
    /// Had it for too long.
    Expired,
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "a slot that sync reads",
    file: file!(),
    owner: "`Syncer`, the group's sync thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "waiting for its range",
        limit: Limit::None(
            "the guest's writes before it end when the device answers; writes that come later wait behind it",
        ),
        exit: "granted",
    },
    StateDoc {
        state: "reading, watched",
        limit: Limit::None("the device's; nobody waits for it"),
        exit: "sent or asked about; written to meanwhile: again, after three times under its lock",
    },
    StateDoc {
        state: "reading, locked",
        limit: Limit::Setting("`stall_max` 50 ms"),
        exit: "sent; at the limit the lock is given back",
    },
    StateDoc {
        state: "reading, expired",
        limit: Limit::None("the device's; nobody waits for it"),
        exit: "the device answers; tried again a second later",
    },
    StateDoc {
        state: "pieces",
        limit: Limit::None("16 reads of 4 KiB, the device's time each; nobody waits for it"),
        exit: "sent, and what cannot be read as unreadable; alarm `volume.unreadable`",
    },
    StateDoc { state: "orphan", limit: Limit::None("the device's; the volume is gone"), exit: "the device answers" },
    StateDoc { state: "over", limit: Limit::Rest, exit: "within one call" },
];
const _: fn(&Stage) -> &StateDoc = |stage| match stage {
    Stage::Waiting(_) => &STATES[0],
    Stage::Reading(Hold::Watched) => &STATES[1],
    Stage::Reading(Hold::Locked(_)) => &STATES[2],
    Stage::Reading(Hold::Expired) => &STATES[3],
    Stage::Pieces { .. } => &STATES[4],
    Stage::Orphan => &STATES[5],
    Stage::Over => &STATES[6],
};

impl Task {
    /// The volume goes; the range to be unlocked, if it has or waits for its lock.
    pub(super) fn orphan(&mut self) -> Option<Range<u64>> {
        let before = std::mem::replace(&mut self.stage, Stage::Orphan);
        match before {
            Stage::Waiting(_) => {
                self.stage = Stage::Over;
                Some(self.range.clone())
            }
            Stage::Reading(Hold::Locked(_)) => Some(self.range.clone()),
            Stage::Reading(Hold::Watched | Hold::Expired) | Stage::Pieces { .. } | Stage::Orphan | Stage::Over => None,
        }
    }

    /// Bytes of the cell that waits for the lock.
    pub(super) fn waiting_bytes(&self) -> u64 {
        match self.stage {
            Stage::Waiting(Some(Buf::Cell(ref cell))) => cell_bytes(cell.len()),
            Stage::Waiting(_) | Stage::Reading(_) | Stage::Pieces { .. } | Stage::Orphan | Stage::Over => 0,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    pub(super) fn deadline(&self) -> Option<Now> {
        match self.stage {
            Stage::Reading(Hold::Locked(until)) => Some(until),
            Stage::Reading(Hold::Watched | Hold::Expired) | Stage::Waiting(_) | Stage::Pieces { .. } => None,
            Stage::Orphan | Stage::Over => None,
        }
    }

    /// A lock held for too long: the range to be unlocked.
    pub(super) fn expire(&mut self, now: Now) -> Option<Range<u64>> {
        match self.stage {
            Stage::Reading(Hold::Locked(until)) if until <= now => {
                self.stage = Stage::Reading(Hold::Expired);
                Some(self.range.clone())
            }
            Stage::Reading(_) | Stage::Waiting(_) | Stage::Pieces { .. } | Stage::Orphan | Stage::Over => None,
        }
    }
}

impl Syncer {
    /// Begins a job. `Err`: not now; the job comes back.
    pub(super) fn start<I: Io<Buf>>(&mut self, io: &mut I, job: Job) -> Result<(), Job> {
        match job {
            Job::Zero { volume, first, count, probe, tries } => self
                .zeroes(volume, first, count, probe, tries)
                .map_err(|(first, count)| Job::Zero { volume, first, count, probe, tries }),
            Job::Ask { volume, slot, id, tries } => {
                if self.volumes.get(&volume).is_some_and(|of| of.volume.touched.test(slot)) {
                    self.torn(volume, slot, true, tries);
                    return Ok(());
                }
                self.ask(volume, slot, 1, id, tries).map_err(|NoRoom| Job::Ask { volume, slot, id, tries })
            }
            Job::Read { volume, slot, probe, tries, watched } => self
                .read(io, volume, slot, probe, tries, watched)
                .map_err(|NoRoom| Job::Read { volume, slot, probe, tries, watched: false }),
        }
    }

    /// Slots that were zero when the watch began. `Err`: the rest, for which there is no room now.
    fn zeroes(&mut self, index: u16, first: u64, count: u64, probe: bool, tries: u8) -> Result<(), (u64, u64)> {
        let Some(volume) = self.volumes.get(&index) else { return Ok(()) };
        let runs = untouched_runs(&volume.volume, first, count);
        if probe {
            for (at, run, untouched) in runs {
                if untouched {
                    self.ask(index, at, run, None, tries).map_err(|NoRoom| (at, first + count - at))?;
                } else {
                    self.release(index, at, run);
                }
            }
            return Ok(());
        }
        let brief = self.brief_op();
        let range = volume.volume.bytes_of(first, count);
        if !volume.owner.try_lock(brief, range.clone()) {
            if count == 1 {
                self.torn(index, first, false, tries);
            } else {
                let half = count / 2;
                self.jobs.push_back(Job::Zero { volume: index, first, count: half, probe, tries });
                self.jobs.push_back(Job::Zero {
                    volume: index,
                    first: first + half,
                    count: count - half,
                    probe,
                    tries,
                });
            }
            return Ok(());
        }
        let mut result = Ok(());
        for (at, run, untouched) in untouched_runs(&self.volumes[&index].volume, first, count) {
            if !untouched {
                self.release(index, at, run);
                continue;
            }
            let bytes = self.volumes[&index].volume.bytes_of(at, run);
            let claimed = self.reserve(0).and_then(|bare| {
                self.claim_content(index, at, run, vec![(Kind::SyncZero, bytes.start, bytes.end - bytes.start, bare)])
            });
            if claimed.is_err() {
                result = Err((at, first + count - at));
                break;
            }
        }
        self.volumes[&index].owner.unlock(brief, range);
        result
    }

    /// Begins to read a slot.
    fn read<I: Io<Buf>>(
        &mut self,
        io: &mut I,
        index: u16,
        slot: u64,
        probe: bool,
        tries: u8,
        watched: bool,
    ) -> Result<(), NoRoom> {
        let brief = self.brief_op();
        let Some(free) = self.tasks.iter().position(Option::is_none) else { return Err(NoRoom) };
        let op = u16::try_from(free).expect("the window is at most 256");
        let Some(volume) = self.volumes.get(&index) else { return Ok(()) };
        let range = volume.volume.bytes_of(slot, 1);
        let len = range.end - range.start;
        self.pace(len)?;
        // A slot that is torn again and again is sent rather than asked about: an answer would come too late every time.
        let probe = probe && tries < TORN_MAX;
        let buf = if probe {
            Buf::Other(self.pool.take(SLOT_LEN))
        } else {
            let bytes = cell_bytes(usize::try_from(len).expect("at most a slot"));
            let cell = self.reserve(usize::try_from(len).expect("at most a slot"))?;
            self.reserved_bytes += bytes;
            Buf::Cell(cell)
        };
        let volume = &self.volumes[&index];
        let mut task = Task { volume: index, slot, probe, tries, range: range.clone(), stage: Stage::Waiting(None) };
        if tries >= TORN_MAX {
            if volume.owner.lock(op, range) {
                self.submit(io, op, task, buf, Hold::Locked(self.now.plus(self.group.config().stall_max)));
            } else {
                task.stage = Stage::Waiting(Some(buf));
                self.tasks[free] = Some(task);
            }
            return Ok(());
        }
        if !watched && !volume.watch(brief, slot, 1) {
            self.drop_buf(buf, len);
            self.torn(index, slot, probe, tries);
            return Ok(());
        }
        self.submit(io, op, task, buf, Hold::Watched);
        Ok(())
    }

    fn submit<I: Io<Buf>>(&mut self, io: &mut I, op: u16, mut task: Task, buf: Buf, hold: Hold) {
        let file = self.volumes[&task.volume].file;
        let len = u32::try_from(task.range.end - task.range.start).expect("at most a slot");
        task.stage = Stage::Reading(hold);
        let offset = task.range.start;
        self.tasks[usize::from(op)] = Some(task);
        io.submit(Token::device(u64::from(op)), Op::Read { file, offset, buf, len });
    }

    /// A lock that was waited for.
    pub(super) fn locked<I: Io<Buf>>(&mut self, io: &mut I, volume: u16, op: u16) {
        let place = self.tasks.get_mut(usize::from(op));
        let Some(mut task) = place.and_then(|place| place.take_if(|task| task.volume == volume)) else { return };
        let buf = if let Stage::Waiting(buf) = &mut task.stage { buf.take() } else { None };
        match buf {
            Some(buf) => {
                let until = self.now.plus(self.group.config().stall_max);
                self.submit(io, op, task, buf, Hold::Locked(until));
            }
            // Not what it waits for: a task that was made an orphan and given up its place.
            None => self.tasks[usize::from(op)] = Some(task),
        }
    }

    pub(super) fn read_ended<I: Io<Buf>>(&mut self, io: &mut I, completion: Completion<Buf>) {
        let Ok(op) = u16::try_from(completion.token.value()) else { return };
        let Some(mut task) = self.tasks.get_mut(usize::from(op)).and_then(Option::take) else { return };
        let Some(buf) = completion.buf else { return };
        let len = task.range.end - task.range.start;
        self.look = true;
        match std::mem::replace(&mut task.stage, Stage::Over) {
            Stage::Reading(hold) => {
                match completion.result {
                    Ok(_) => self.content(op, &task, hold, buf),
                    Err(error) => {
                        tracing::warn!(volume = task.volume, slot = task.slot, %error, "cannot read a slot; trying its parts");
                        self.drop_buf(buf, len);
                        if let Hold::Locked(_) = hold {
                            self.volumes[&task.volume].owner.unlock(op, task.range.clone());
                        }
                        self.read_pieces(io, op, task);
                    }
                };
            }
            Stage::Pieces { data, good } => self.piece(io, op, task, data, good, completion.result.is_ok(), &buf),
            Stage::Orphan => self.drop_buf(buf, len),
            Stage::Waiting(_) | Stage::Over => unreachable!("nothing was under way"),
        }
    }

    /// A slot's content was read.
    fn content(&mut self, op: u16, task: &Task, hold: Hold, buf: Buf) {
        let len = task.range.end - task.range.start;
        let bytes = &buf[..usize::try_from(len).expect("at most a slot")];
        if task.probe {
            // Zeroes need no hash, neither here nor there.
            let id = (!is_zero(bytes)).then(|| self.key.chunk_id(bytes));
            drop(buf);
            self.jobs.push_back(Job::Ask { volume: task.volume, slot: task.slot, id, tries: task.tries });
            return;
        }
        let zero = is_zero(bytes);
        let Buf::Cell(cell) = buf else { unreachable!("what is to be sent is read into a cell") };
        self.reserved_bytes -= cell_bytes(usize::try_from(len).expect("at most a slot"));
        match hold {
            Hold::Locked(_) => {
                self.send_content(task, cell, zero);
                self.volumes[&task.volume].owner.unlock(op, task.range.clone());
            }
            Hold::Expired => {
                drop(cell);
                let (volume, slot, tries) = (task.volume, task.slot, task.tries);
                let job = Job::Read { volume, slot, probe: false, tries, watched: false };
                self.delayed.push_back((self.now.plus(BACKOFF), job));
            }
            Hold::Watched => {
                let brief = self.brief_op();
                if !self.volumes[&task.volume].owner.try_lock(brief, task.range.clone()) {
                    drop(cell);
                    self.torn(task.volume, task.slot, false, task.tries);
                    return;
                }
                if self.volumes[&task.volume].volume.touched.test(task.slot) {
                    drop(cell);
                    self.torn(task.volume, task.slot, false, task.tries);
                } else {
                    self.send_content(task, cell, zero);
                }
                self.volumes[&task.volume].owner.unlock(brief, task.range.clone());
            }
        }
    }

    /// Claims a slot's content, under its range lock.
    fn send_content(&mut self, task: &Task, cell: Reservation, zero: bool) {
        let (offset, len) = (task.range.start, task.range.end - task.range.start);
        let piece = if zero {
            // The cell goes back before its place in the ring is asked for again.
            drop(cell);
            self.reserve(0).map(|bare| (Kind::SyncZero, offset, len, bare))
        } else {
            Ok((Kind::SyncData, offset, len, cell))
        };
        let claimed = piece.and_then(|piece| self.claim_content(task.volume, task.slot, 1, vec![piece]));
        if claimed.is_err() {
            let (volume, slot, tries) = (task.volume, task.slot, task.tries);
            self.jobs.push_back(Job::Read { volume, slot, probe: false, tries, watched: false });
        }
    }

    /// A write came between: the slot is done again.
    pub(super) fn torn(&mut self, volume: u16, slot: u64, probe: bool, tries: u8) {
        let tries = tries.saturating_add(1).min(TORN_MAX);
        self.jobs.push_back(Job::Read { volume, slot, probe, tries, watched: false });
    }

    /// Keeps to the rate.
    fn pace(&mut self, len: u64) -> Result<(), NoRoom> {
        let Some(rate) = self.config.rate else { return Ok(()) };
        if self.allowed > self.now {
            return Err(NoRoom);
        }
        let cost = u128::from(len) * 1_000_000_000 / u128::from(rate.max(1));
        self.allowed = Now(self.now.0.saturating_add(u64::try_from(cost).unwrap_or(u64::MAX)));
        Ok(())
    }

    fn drop_buf(&mut self, buf: Buf, len: u64) {
        if let Buf::Cell(_) = buf {
            self.reserved_bytes -= cell_bytes(usize::try_from(len).expect("at most a slot"));
        }
    }

    // A slot that the device cannot read as a whole.

    fn read_pieces<I: Io<Buf>>(&mut self, io: &mut I, op: u16, mut task: Task) {
        let brief = self.brief_op();
        let Some(volume) = self.volumes.get(&task.volume) else { return };
        if !volume.watch(brief, task.slot, 1) {
            self.later(&task);
            return;
        }
        let len = usize::try_from(task.range.end - task.range.start).expect("at most a slot");
        task.stage =
            Stage::Pieces { data: vec![0; len].into_boxed_slice(), good: Vec::with_capacity(len.div_ceil(PIECE)) };
        self.submit_piece(io, op, task);
    }

    fn submit_piece<I: Io<Buf>>(&mut self, io: &mut I, op: u16, task: Task) {
        let Stage::Pieces { data, good } = &task.stage else { unreachable!("the callers have set it") };
        let at = good.len() * PIECE;
        let len = PIECE.min(data.len() - at);
        let file = self.volumes[&task.volume].file;
        let buf = Buf::Other(self.pool.take(PIECE));
        let offset = task.range.start + at as u64;
        self.tasks[usize::from(op)] = Some(task);
        io.submit(
            Token::device(u64::from(op)),
            Op::Read { file, offset, buf, len: u32::try_from(len).expect("4 KiB") },
        );
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of a task that is taken apart")]
    fn piece<I: Io<Buf>>(
        &mut self,
        io: &mut I,
        op: u16,
        mut task: Task,
        mut data: Box<[u8]>,
        mut good: Vec<bool>,
        readable: bool,
        buf: &[u8],
    ) {
        let at = good.len() * PIECE;
        let len = PIECE.min(data.len() - at);
        if readable {
            data[at..at + len].copy_from_slice(&buf[..len]);
        }
        good.push(readable);
        if at + len < data.len() {
            task.stage = Stage::Pieces { data, good };
            self.submit_piece(io, op, task);
            return;
        }
        self.send_pieces(&task, &data, &good);
    }

    fn send_pieces(&mut self, task: &Task, data: &[u8], good: &[bool]) {
        let mut pieces = Vec::new();
        let mut unreadable = Vec::new();
        let mut at = 0;
        for run in good.chunk_by(|a, b| a == b) {
            let len = (run.len() * PIECE).min(data.len() - at);
            let offset = task.range.start + at as u64;
            let reserved = if run[0] {
                self.reserve(len).map(|mut cell| {
                    cell[..len].copy_from_slice(&data[at..at + len]);
                    (Kind::SyncData, offset, len as u64, cell)
                })
            } else {
                unreadable.push((offset, len as u64));
                self.reserve(0).map(|bare| (Kind::Unreadable, offset, len as u64, bare))
            };
            match reserved {
                Ok(piece) => pieces.push(piece),
                Err(NoRoom) => return self.later(task),
            }
            at += len;
        }
        let brief = self.brief_op();
        if !self.volumes[&task.volume].owner.try_lock(brief, task.range.clone()) {
            return self.later(task);
        }
        let untouched = !self.volumes[&task.volume].volume.touched.test(task.slot);
        let sent = untouched && self.claim_content(task.volume, task.slot, 1, pieces).is_ok();
        self.volumes[&task.volume].owner.unlock(brief, task.range.clone());
        if !sent {
            return self.later(task);
        }
        let volume = self.volumes[&task.volume].volume.index;
        for (offset, len) in unreadable {
            self.group.raise(Alarm::Unreadable { volume, offset, len });
        }
    }

    fn later(&mut self, task: &Task) {
        let job = Job::Read { volume: task.volume, slot: task.slot, probe: false, tries: 0, watched: false };
        self.delayed.push_back((self.now.plus(BACKOFF), job));
    }
}

/// The runs of slots that were written to since the watch began, and of those that were not: (first, count, untouched).
fn untouched_runs(volume: &Volume, first: u64, count: u64) -> Vec<(u64, u64, bool)> {
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    for slot in first..first + count {
        let untouched = !volume.touched.test(slot);
        match runs.last_mut() {
            Some((_, count, same)) if *same == untouched => *count += 1,
            Some(_) | None => runs.push((slot, 1, untouched)),
        }
    }
    runs
}

/// Whether there are only zero bytes.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}
