//! A recovery point as a read/write block device: the point's content, and above it what was written to the view.
//!
//! Reads and writes block, on the view's own worker threads; queues only hand over and collect. A view is never on the way of
//! a protected device's requests.

mod cache;
mod queue;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, bounded};
use farshore_proto::{PointId, SECTOR_BYTES, SLOT_BYTES, VolumeIndex};
use farshore_uring::{AlignedBuf, BlockDevice, Errno, Extent, Geometry, Io, Storage};

use crate::error::{Error, IoContext as _, Kind, Result};
use crate::group::UpTo;
use crate::history::History;
use crate::index::Versions;
use crate::reader::{is_known_zero, read_sectors};
use crate::scratch::{RESERVE_BYTES, Scratch, ScratchOf, Space};
use cache::SlotCache;
pub use queue::ViewQueue;
use queue::Work;

/// Longest request.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Longest discard: its bits are set one by one.
const DISCARD_BYTES_MAX: u32 = 1 << 30;
/// Requests that wait for a worker, over all queues; beyond it the front end's threads wait.
const WORK_MAX: usize = 1024;
/// Most extents of one answer, and most slots looked up for it: some 20 ms.
const EXTENTS_MAX: usize = 1024;
const LOOKUPS_MAX: usize = 2048;

/// How a view is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ViewOptions {
    /// Refuse writes; then there is no scratch.
    pub read_only: bool,
    /// Threads that read and write. Default 4: enough to keep a disk busy; each holds up to 1 MiB. 0: requests are served on
    /// the queue's own thread, for tests.
    pub workers: usize,
    /// Bytes of slots kept in memory for reads that go on where the last ended. Default 16 MiB, at least one slot.
    pub cache_bytes: usize,
    /// How much disk may be taken by what is written to each volume of it. Default: as much as the volume has, and 1 GiB of the
    /// disk is left free. Beyond it writes get `ENOSPC`.
    pub space: Space,
}

impl Default for ViewOptions {
    fn default() -> Self {
        let space = Space { limit: None, reserve: RESERVE_BYTES };
        Self { read_only: false, workers: 4, cache_bytes: 16 << 20, space }
    }
}

/// Which state of which volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ViewOf {
    /// Recovery point.
    pub point: PointId,
    /// Volume.
    pub volume: VolumeIndex,
    /// Bytes of the volume.
    pub size: u64,
    /// Its logical block in bytes, 512 or 4096.
    pub block: u32,
}

/// A view. Cheap to clone; all clones are one device. Its workers end with the last clone and the last queue.
pub struct View<S: Storage> {
    core: Arc<Core<S>>,
    workers: Arc<Workers>,
}

impl<S: Storage> Clone for View<S> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), workers: Arc::clone(&self.workers) }
    }
}

/// The worker threads; they end when no sender is left.
struct Workers {
    sender: Mutex<Option<Sender<Work>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Queues hold senders of their own: the threads end with the last of them, and are not waited for here.
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// What workers need.
pub(crate) struct Core<S: Storage> {
    history: Arc<dyn History<S>>,
    of: ViewOf,
    upto: UpTo,
    read_only: bool,
    scratch: Option<Scratch<S>>,
    cache: SlotCache,
}

impl<S: Storage> View<S> {
    /// Opens a view of a point that a hold keeps. `folder` holds what is written to it; if it has something from before, the
    /// view goes on with that. Reads nothing of the point.
    ///
    /// # Errors
    /// [`Kind::Refused`] when the folder holds writes over another point; [`Kind::NotFound`] for a volume that the stream does
    /// not have; otherwise from the disk, or from starting threads.
    pub fn open(
        history: Arc<dyn History<S>>,
        storage: &S,
        folder: &Path,
        of: ViewOf,
        options: ViewOptions,
    ) -> Result<Self> {
        if !matches!(of.block, 512 | 4096) || !of.size.is_multiple_of(u64::from(of.block)) {
            return Err(Error::new(Kind::Invalid, format!("view of {} bytes in blocks of {}", of.size, of.block)));
        }
        if history.base(of.volume)?.size() < of.size {
            return Err(Error::new(
                Kind::Invalid,
                format!("volume {} is smaller than the view's {} bytes", of.volume, of.size),
            ));
        }
        let ViewOf { point, volume, size, block } = of;
        let scratch = match options.read_only {
            true => None,
            false => {
                let of = ScratchOf { point, volume, size, block };
                Some(Scratch::open_or_create(storage, folder, of, options.space)?)
            }
        };
        let core = Arc::new(Core {
            history,
            of,
            upto: UpTo::end_of(point.batch),
            read_only: options.read_only,
            scratch,
            cache: SlotCache::new(options.cache_bytes),
        });
        let workers = start_workers(&core, options.workers)?;
        Ok(Self { core, workers: Arc::new(workers) })
    }

    /// Which state of which volume.
    #[must_use]
    pub fn of(&self) -> &ViewOf {
        &self.core.of
    }

    /// Reads bytes (whole sectors), writes to the view included.
    ///
    /// # Errors
    /// [`Kind::Damaged`], naming volume and bytes; otherwise from the disk.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.core.read(offset, out)
    }

    /// Makes the writes so far durable.
    ///
    /// # Errors
    /// From the disk.
    pub fn flush(&self) -> Result<()> {
        self.core.flush()
    }
}

fn start_workers<S: Storage>(core: &Arc<Core<S>>, count: usize) -> Result<Workers> {
    let mut threads = Vec::with_capacity(count);
    let mut sender = None;
    if count > 0 {
        let (to_workers, work) = bounded::<Work>(WORK_MAX);
        for number in 0..count {
            let (core, work) = (Arc::clone(core), work.clone());
            let run = move || {
                for work in work {
                    queue::run(&*core, work);
                }
            };
            let thread = std::thread::Builder::new().name(format!("view-{number}"));
            threads.push(thread.spawn(run).at("start a thread for", Path::new("the view"))?);
        }
        sender = Some(to_workers);
    }
    Ok(Workers { sender: Mutex::new(sender), threads: Mutex::new(threads) })
}

impl<S: Storage> Core<S> {
    /// Reads whole sectors.
    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let len = out.len() as u64;
        if !offset.is_multiple_of(SECTOR_BYTES)
            || !len.is_multiple_of(SECTOR_BYTES)
            || offset.checked_add(len).is_none_or(|end| end > self.of.size)
        {
            let text = format!("read of {len} bytes at {offset} of a view of {} bytes", self.of.size);
            return Err(Error::new(Kind::Invalid, text));
        }
        let Some(scratch) = &self.scratch else {
            return self.read_point(offset, out);
        };
        // The map's bits are for whole blocks.
        let block = u64::from(self.of.block);
        let start = offset / block * block;
        let end = (offset + len).next_multiple_of(block);
        for piece in scratch.pieces(start, end - start)? {
            let from = piece.offset.max(offset);
            let to = (piece.offset + piece.len).min(offset + len);
            let within = |at: u64| usize::try_from(at - offset).expect("inside of the buffer");
            let out = &mut out[within(from)..within(to)];
            if piece.present { scratch.read(from, out)? } else { self.read_point(from, out)? }
        }
        Ok(())
    }

    /// Reads the point, slot by slot.
    fn read_point(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut at = 0;
        while at < out.len() {
            let position = offset + at as u64;
            let (slot, within) = (position / SLOT_BYTES, usize::try_from(position % SLOT_BYTES).expect("in a slot"));
            let slot_len = usize::try_from((self.of.size - slot * SLOT_BYTES).min(SLOT_BYTES)).expect("a slot");
            let len = (out.len() - at).min(slot_len - within);
            self.read_in_slot(slot, within, slot_len, &mut out[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    fn read_in_slot(&self, slot: u64, within: usize, slot_len: usize, out: &mut [u8]) -> Result<()> {
        if let Some(bytes) = self.cache.find(slot) {
            out.copy_from_slice(&bytes[within..within + out.len()]);
            return Ok(());
        }
        let (history, volume) = (&*self.history, self.of.volume);
        // A reader that goes on where another ended will want the rest; one that jumps will not.
        if out.len() < slot_len && self.cache.is_sequential(slot, within, out.len()) {
            let mut bytes = vec![0; slot_len];
            // Damage in a part that was not asked for is no reason to fail.
            if read_sectors(history, volume, slot, 0, self.upto, &mut bytes).is_ok() {
                out.copy_from_slice(&bytes[within..within + out.len()]);
                self.cache.keep(slot, bytes.into());
                return Ok(());
            }
        }
        let first = u32::try_from(within as u64 / SECTOR_BYTES).expect("a slot has 128 sectors");
        read_sectors(history, volume, slot, first, self.upto, out)
    }

    fn scratch_to_write(&self) -> Result<&Scratch<S>> {
        match &self.scratch {
            Some(scratch) if !self.read_only => Ok(scratch),
            _ => Err(Error::new(Kind::Refused, "the view is read-only")),
        }
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> Result<()> {
        let scratch = self.scratch_to_write()?;
        scratch.write(offset, bytes)?;
        if fua { scratch.flush() } else { Ok(()) }
    }

    pub(crate) fn zero(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        let scratch = self.scratch_to_write()?;
        scratch.zero(offset, len)?;
        if fua { scratch.flush() } else { Ok(()) }
    }

    pub(crate) fn flush(&self) -> Result<()> {
        self.scratch.as_ref().map_or(Ok(()), Scratch::flush)
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut found = Extents { list: Vec::new() };
        let Some(scratch) = &self.scratch else {
            self.point_extents(offset, offset + len, &mut found)?;
            return Ok(found.list);
        };
        // The map is asked in steps, so that a huge range does not make a huge answer.
        const STEP: u64 = 1 << 36;
        let (mut at, end) = (offset, offset + len);
        while at < end && found.list.len() < EXTENTS_MAX {
            let step = (end - at).min(STEP);
            for piece in scratch.pieces(at, step)? {
                let piece_end = piece.offset + piece.len;
                at = if piece.present {
                    let mut at = piece.offset;
                    while at < piece_end && found.list.len() < EXTENTS_MAX {
                        let (hole, next) = scratch.data_extent(at, piece_end)?;
                        found.push(next - at, hole);
                        at = next;
                    }
                    at
                } else {
                    self.point_extents(piece.offset, piece_end, &mut found)?
                };
                if at < piece_end || found.list.len() >= EXTENTS_MAX {
                    return Ok(found.list);
                }
            }
        }
        Ok(found.list)
    }

    /// Appends the point's extents in `[at, end)`; gives where it stopped.
    fn point_extents(&self, mut at: u64, end: u64, found: &mut Extents) -> Result<u64> {
        let mut slots = PointSlots::new(&*self.history, self.of.volume, self.upto);
        let mut lookups = 0;
        while at < end && found.list.len() < EXTENTS_MAX && lookups < LOOKUPS_MAX {
            let slot = at / SLOT_BYTES;
            let next = slots.next(slot)?;
            let start = next.map_or(end, |next| (next.slot * SLOT_BYTES).clamp(at, end));
            if start > at {
                found.push(start - at, true);
                at = start;
                continue;
            }
            let Some(PointSlot { slot, versions, in_base }) = next else { break };
            let stop = ((slot + 1) * SLOT_BYTES).min(end);
            let zero = if !versions.chunks && !in_base {
                true
            } else if versions.zeroes || !versions.chunks {
                lookups += 1;
                is_known_zero(&*self.history, self.of.volume, slot, self.upto, in_base)?
            } else {
                // Bytes, perhaps newer than the point or under a zero extent: to call them data is never wrong.
                false
            };
            found.push(stop - at, zero);
            at = stop;
        }
        Ok(at)
    }
}

/// The slots that may hold something at a point, in order: those with entries of their own, and those with base data.
pub(crate) struct PointSlots<'h, S: Storage> {
    history: &'h dyn History<S>,
    volume: VolumeIndex,
    upto: UpTo,
    /// Slots with entries from `from` on, next one last; `None` beyond them: there are no more.
    ahead: Vec<(u64, Versions)>,
    from: Option<u64>,
    /// The next slot with base data, and from where on it was looked for.
    base: Option<(u64, Option<u64>)>,
}

/// A slot that may hold something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PointSlot {
    pub(crate) slot: u64,
    /// What its entries are, visible or not.
    pub(crate) versions: Versions,
    /// The base has data there.
    pub(crate) in_base: bool,
}

/// Slots fetched from the index at once.
const SLOTS_AHEAD: usize = 1024;

impl<'h, S: Storage> PointSlots<'h, S> {
    pub(crate) fn new(history: &'h dyn History<S>, volume: VolumeIndex, upto: UpTo) -> Self {
        Self { history, volume, upto, ahead: Vec::new(), from: Some(0), base: None }
    }

    /// The first slot from `slot` on. `slot` must not fall.
    pub(crate) fn next(&mut self, slot: u64) -> Result<Option<PointSlot>> {
        let written = self.next_written(slot)?;
        let based = self.next_based(slot)?;
        let only_base = |slot| PointSlot { slot, versions: Versions::default(), in_base: true };
        Ok(match (written, based) {
            (Some((slot, _)), Some(based)) if based < slot => Some(only_base(based)),
            (Some((slot, versions)), based) => Some(PointSlot { slot, versions, in_base: based == Some(slot) }),
            (None, based) => based.map(only_base),
        })
    }

    fn next_written(&mut self, slot: u64) -> Result<Option<(u64, Versions)>> {
        loop {
            while let Some(&next) = self.ahead.last() {
                if next.0 >= slot {
                    return Ok(Some(next));
                }
                self.ahead.pop();
            }
            let Some(from) = self.from else { return Ok(None) };
            let mut slots = self.history.index().survey(self.volume, from.max(slot), self.upto, SLOTS_AHEAD)?;
            self.from = slots.last().filter(|_| slots.len() == SLOTS_AHEAD).map(|last| last.0 + 1);
            slots.reverse();
            self.ahead = slots;
        }
    }

    fn next_based(&mut self, slot: u64) -> Result<Option<u64>> {
        if let Some((asked, next)) = self.base
            && asked <= slot
            && next.is_none_or(|next| next >= slot)
        {
            return Ok(next);
        }
        let next = self.history.base(self.volume)?.next_data(slot * SLOT_BYTES)?.map(|at| at / SLOT_BYTES);
        self.base = Some((slot, next));
        Ok(next)
    }
}

struct Extents {
    list: Vec<Extent>,
}

impl Extents {
    fn push(&mut self, len: u64, zero: bool) {
        match self.list.last_mut() {
            Some(last) if last.zero == zero => last.len += len,
            _ => self.list.push(Extent { len, hole: zero, zero }),
        }
    }
}

/// The guest's number for an error of ours, said once in the log.
pub(crate) fn errno(error: &Error) -> Errno {
    // As in `errno-base.h`; this crate does not call the system.
    const EIO: i32 = 5;
    const EINVAL: i32 = 22;
    const ENOSPC: i32 = 28;
    const EROFS: i32 = 30;
    Errno(match error.kind() {
        Kind::NoSpace => ENOSPC,
        Kind::Refused => EROFS,
        Kind::Invalid => EINVAL,
        Kind::NoResources | Kind::Storage | Kind::Damaged | Kind::NotFound | Kind::Foreign => EIO,
    })
}

impl<S: Storage> BlockDevice for View<S> {
    type Buf = AlignedBuf;
    type Queue = ViewQueue<S>;

    fn geometry(&self) -> Geometry {
        let of = &self.core.of;
        Geometry {
            size: of.size,
            logical_block: of.block,
            optimal_block: u32::try_from(SLOT_BYTES).expect("64 KiB"),
            max_request: REQUEST_BYTES_MAX,
            max_discard: DISCARD_BYTES_MAX,
            read_only: self.core.read_only,
            discard: !self.core.read_only,
        }
    }

    fn open_queue<I: Io<AlignedBuf>>(&self, io: &mut I) -> io::Result<ViewQueue<S>> {
        let sender = self.workers.sender.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(ViewQueue::new(Arc::clone(&self.core), sender, io.waker()))
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.core.extents(offset, len).map_err(|error| {
            tracing::error!(error = error.context(), "cannot tell what is stored in a view");
            errno(&error)
        })
    }
}

#[cfg(test)]
mod tests;
