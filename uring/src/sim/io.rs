//! The simulated ring.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::disk::Run;
use super::image::Image;
use super::{DiskOp, SimDisk, SimRng};
use crate::waker::WakeSource;
use crate::{Allocate, Completion, FileSlot, Io, IoBuf, Op, Token, Waker};

/// [`Io`] over [`SimDisk`]s. Operations run and end one step at a time, in an order chosen by the seed.
///
/// Checks its user: an operation outside of the disk, not in whole sectors, with too short a buffer or on a slot that was
/// given back panics; overlapping writes in flight are counted.
pub struct SimIo<B> {
    rng: SimRng,
    disks: Vec<SimDisk>,
    slots: Vec<Option<SimDisk>>,
    flying: Vec<Flying<B>>,
    ended: VecDeque<Completion<B>>,
    wake: WakeSource,
    steps: u64,
    overlaps: u64,
}

struct Flying<B> {
    token: Token,
    op: Op<B>,
    disk: SimDisk,
    stage: Stage,
    /// Not before this step.
    after: u64,
    /// Was delayed once; the fault hook is not asked again.
    excused: bool,
}

enum Stage {
    Submitted,
    /// The write of a linked pair is done.
    Written,
    /// Run, the completion is under way.
    Ran(Result<u32, i32>),
}

enum Advance {
    Moved,
    Ended(Result<u32, i32>),
    Stuck,
}

impl<B> SimIo<B> {
    /// A ring that knows no disk yet.
    #[must_use]
    pub fn new(rng: SimRng) -> Self {
        Self {
            rng,
            disks: Vec::new(),
            slots: Vec::new(),
            flying: Vec::new(),
            ended: VecDeque::new(),
            wake: WakeSource::new(None),
            steps: 0,
            overlaps: 0,
        }
    }

    /// Lets [`Io::register`] find the disk by its [`SimDisk::file`].
    pub fn attach(&mut self, disk: &SimDisk) {
        self.disks.push(disk.clone());
    }

    /// The next ended operation.
    #[must_use]
    pub fn poll_completion(&mut self) -> Option<Completion<B>> {
        self.ended.pop_front()
    }

    /// Whether [`Waker::wake`] was called since the last call.
    pub fn take_wakeup(&mut self) -> bool {
        self.wake.take()
    }

    /// Operations that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// Writes (and zeroes) that were submitted while another one on the same bytes was in flight.
    #[must_use]
    pub fn overlapping_writes(&self) -> u64 {
        self.overlaps
    }
}

impl<B: IoBuf> SimIo<B> {
    /// Moves one operation, chosen by the seed, one stage further. `false`: there is none that can move.
    pub fn step(&mut self) -> bool {
        self.steps += 1;
        // From a random place on, the first one that moves.
        let count = self.flying.len();
        let start = if count == 0 { 0 } else { self.rng.index(count) };
        let mut waiting = None::<u64>;
        for distance in 0..count {
            let index = (start + distance) % count;
            if self.flying[index].after > self.steps {
                waiting = Some(waiting.unwrap_or(u64::MAX).min(self.flying[index].after));
                continue;
            }
            match self.flying[index].advance(self.steps) {
                Advance::Stuck if self.flying[index].after > self.steps => {
                    waiting = Some(waiting.unwrap_or(u64::MAX).min(self.flying[index].after));
                }
                Advance::Stuck => {}
                Advance::Moved => return true,
                Advance::Ended(result) => {
                    self.end(index, result);
                    return true;
                }
            }
        }
        // Only delayed ones are left: time passes.
        if let Some(after) = waiting {
            self.steps = after;
        }
        waiting.is_some()
    }

    /// Steps until nothing moves.
    pub fn run_until_idle(&mut self) {
        while self.step() {}
    }

    /// Takes one operation to its end, before all others. `false`: there is no such, or it cannot end now.
    pub fn finish(&mut self, token: Token) -> bool {
        let Some(index) = self.flying.iter().position(|flying| flying.token == token) else { return false };
        loop {
            match self.flying[index].advance(self.steps) {
                Advance::Moved => {}
                Advance::Stuck => return false,
                Advance::Ended(result) => {
                    self.end(index, result);
                    return true;
                }
            }
        }
    }

    /// The process dies: of the operations in flight some still reach the disk, whole or in part; nobody hears of it.
    /// (A power failure is this, then [`SimDisk::crash`].)
    pub fn kill(mut self) {
        while !self.flying.is_empty() {
            let index = self.rng.index(self.flying.len());
            let Flying { op, disk, stage, .. } = self.flying.swap_remove(index);
            if !matches!(stage, Stage::Submitted) {
                continue;
            }
            match op {
                Op::Write { offset, buf, len, .. } | Op::WriteThenSync { offset, buf, len, .. } => {
                    let bytes = &buf[..len as usize];
                    disk.maybe(|image, rng| match rng.below(3) {
                        0 => {}
                        1 => image.write(offset, bytes),
                        _ => image.write_some(offset, bytes, rng),
                    });
                }
                Op::Allocate { offset, len, .. } => disk.maybe(|image, rng| {
                    if rng.chance(1, 2) {
                        image.zero(offset, len);
                    }
                }),
                Op::Read { .. } | Op::Sync { .. } => {}
            }
        }
    }

    fn end(&mut self, index: usize, result: Result<u32, i32>) {
        let flying = self.flying.swap_remove(index);
        let buf = match flying.op {
            Op::Read { buf, .. } | Op::Write { buf, .. } | Op::WriteThenSync { buf, .. } => Some(buf),
            Op::Sync { .. } | Op::Allocate { .. } => None,
        };
        let result = result.map_err(io::Error::from_raw_os_error);
        self.ended.push_back(Completion { token: flying.token, result, buf });
    }
}

impl<B: IoBuf> Flying<B> {
    fn advance(&mut self, now: u64) -> Advance {
        if let Stage::Ran(result) = self.stage {
            return Advance::Ended(result);
        }
        let written = matches!(self.stage, Stage::Written);
        let ask = !self.excused;
        let dsync = matches!(self.op, Op::Write { dsync: true, .. });
        let ran = match &mut self.op {
            Op::Read { offset, buf, len, .. } => {
                let (offset, len) = (*offset, *len);
                let target = &mut buf[..len as usize];
                self.disk.run(
                    ask,
                    DiskOp::Read { offset, len },
                    |image| {
                        assert!(image.read(offset, target), "checked at submission");
                        len
                    },
                    |_, _| {},
                )
            }
            Op::WriteThenSync { .. } if written => self.disk.run(ask, DiskOp::Sync, sync, Image::sync_failed),
            Op::Write { offset, buf, len, .. } | Op::WriteThenSync { offset, buf, len, .. } => {
                let (offset, len, bytes) = (*offset, *len, &buf[..*len as usize]);
                self.disk.run(
                    ask,
                    DiskOp::Write { offset, len, dsync },
                    |image| {
                        image.write(offset, bytes);
                        if dsync {
                            // More becomes durable than must; nobody may rely on less.
                            image.sync();
                        }
                        len
                    },
                    |image, rng| image.write_some(offset, bytes, rng),
                )
            }
            Op::Sync { .. } => self.disk.run(ask, DiskOp::Sync, sync, Image::sync_failed),
            Op::Allocate { mode, offset, len, .. } => {
                let (mode, offset, len) = (*mode, *offset, *len);
                let zero = |image: &mut Image| {
                    image.zero(offset, len);
                    0
                };
                self.disk.run(ask, DiskOp::Allocate { mode, offset, len }, zero, |image, rng| {
                    if rng.chance(1, 2) {
                        image.zero(offset, len);
                    }
                })
            }
        };
        self.stage = match ran {
            Run::Hang => return Advance::Stuck,
            Run::Delay(steps) => {
                self.after = now + u64::from(steps.max(1));
                self.excused = true;
                return Advance::Stuck;
            }
            Run::Failed(errno) => Stage::Ran(Err(errno)),
            Run::Done(len) => match &self.op {
                Op::WriteThenSync { .. } if !written => Stage::Written,
                Op::WriteThenSync { len, .. } => Stage::Ran(Ok(*len)),
                Op::Read { .. } | Op::Write { .. } | Op::Sync { .. } | Op::Allocate { .. } => Stage::Ran(Ok(len)),
            },
        };
        Advance::Moved
    }

    /// The bytes that it changes.
    fn changes(&self) -> Option<(u64, u64)> {
        changed_range(&self.op)
    }
}

fn sync(image: &mut Image) -> u32 {
    image.sync();
    0
}

fn changed_range<B>(op: &Op<B>) -> Option<(u64, u64)> {
    match op {
        Op::Write { offset, len, .. } | Op::WriteThenSync { offset, len, .. } => {
            Some((*offset, offset + u64::from(*len)))
        }
        Op::Allocate { offset, len, .. } => Some((*offset, offset + len)),
        Op::Read { .. } | Op::Sync { .. } => None,
    }
}

fn file_of<B>(op: &Op<B>) -> FileSlot {
    match op {
        Op::Read { file, .. }
        | Op::Write { file, .. }
        | Op::WriteThenSync { file, .. }
        | Op::Sync { file }
        | Op::Allocate { file, .. } => *file,
    }
}

fn check<B: IoBuf>(op: &Op<B>, size: u64) {
    let (offset, len) = match op {
        Op::Read { offset, len, buf, .. }
        | Op::Write { offset, len, buf, .. }
        | Op::WriteThenSync { offset, len, buf, .. } => {
            assert!(buf.len() >= *len as usize, "buffer of {} bytes for {len}", buf.len());
            (*offset, u64::from(*len))
        }
        Op::Allocate { offset, len, mode: Allocate::PunchHole | Allocate::ZeroRange, .. } => (*offset, *len),
        Op::Sync { .. } => return,
    };
    assert!(
        offset.checked_add(len).is_some_and(|end| end <= size),
        "{len} bytes at {offset} outside of a disk of {size}"
    );
    assert!((offset | len).is_multiple_of(super::SECTOR as u64), "{len} bytes at {offset} are not whole sectors");
}

impl<B: IoBuf> Io<B> for SimIo<B> {
    fn submit(&mut self, token: Token, op: Op<B>) {
        let slot = file_of(&op).0 as usize;
        let disk = self.slots.get(slot).and_then(Option::clone).expect("the slot is registered");
        check(&op, disk.size());
        if let Some((start, end)) = changed_range(&op) {
            let overlaps = |other: &Flying<B>| other.changes().is_some_and(|(from, to)| from < end && start < to);
            let same = |other: &&Flying<B>| other.disk.is_same(&disk.file());
            self.overlaps += u64::from(self.flying.iter().filter(same).any(overlaps));
        }
        self.flying.push(Flying { token, op, disk, stage: Stage::Submitted, after: 0, excused: false });
    }

    fn register(&mut self, file: Arc<File>) -> io::Result<FileSlot> {
        let disk = self.disks.iter().find(|disk| disk.is_same(&file)).cloned();
        let disk = disk.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "not the file of an attached disk"))?;
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(disk);
        Ok(FileSlot(u32::try_from(free).expect("few slots")))
    }

    fn unregister(&mut self, file: FileSlot) {
        self.slots[file.0 as usize] = None;
    }

    fn waker(&self) -> Waker {
        self.wake.waker()
    }
}
