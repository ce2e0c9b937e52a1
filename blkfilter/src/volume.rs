//! A protected volume, as the front ends see it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farshore_proto::{Name, SLOT_BYTES, VolumeIndex};
use farshore_ring::Bitmap;
use farshore_uring::{AlignedBuf, Backing, BlockDevice, Errno, Extent, FileDevice, FileSlot, Geometry, Io};

use crate::activity::VolumeActivity;
use crate::counters::{Counters, VolumeCounters};
use crate::range_lock::RangeLock;
use crate::touched::Touched;
use crate::{Buf, CaptureGroup, FilterQueue};

/// What a volume stands on. Implemented for [`FileDevice`]; simulations bring their own.
pub trait BackingFile: Send + Sync + 'static {
    /// Shape and limits of the backing device.
    fn geometry(&self) -> Geometry;

    /// Makes the file known to one thread's ring.
    ///
    /// # Errors
    /// The kernel's, or that the ring's file table is full.
    fn register<I: Io<Buf>>(&self, io: &mut I) -> io::Result<FileSlot>;

    /// As [`BlockDevice::extents`].
    ///
    /// # Errors
    /// The device's error number.
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno>;

    /// What makes stable all that was written before it is called; may block. It must not keep the device open: where that is closed it
    /// is an error.
    fn flusher(&self) -> Box<dyn Fn() -> io::Result<()> + Send + Sync>;
}

impl BackingFile for FileDevice {
    fn geometry(&self) -> Geometry {
        self.backing().geometry
    }

    fn register<I: Io<Buf>>(&self, io: &mut I) -> io::Result<FileSlot> {
        io.register(Arc::clone(&self.backing().file))
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        BlockDevice::extents(self, offset, len)
    }

    fn flusher(&self) -> Box<dyn Fn() -> io::Result<()> + Send + Sync> {
        let file = Arc::downgrade(&self.backing().file);
        Box::new(move || {
            let file = file.upgrade().ok_or(io::ErrorKind::NotConnected)?;
            // The kernel tells each open file once of a lost write. By one of its own this flush takes nothing from the guests', which may
            // end at the same time. Where it cannot be had, their next one hears of it from us.
            let own = std::fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
            own.as_ref().unwrap_or(&file).sync_data()
        })
    }
}

/// Longest write: the largest cell of the slab.
#[expect(clippy::cast_possible_truncation, reason = "256 KiB")]
pub(crate) const WRITE_MAX: u32 = farshore_ring::MAX_CELL_BYTES as u32;
/// Longest discard or write-zeroes: bounds how long one request holds its range and how long the target works on one record.
pub(crate) const DISCARD_MAX: u32 = 64 << 20;

/// A volume to be protected.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// Its number in the group: 0 to 15, never reused within a vault's group (the agent persists the counter).
    pub index: VolumeIndex,
    /// For messages.
    pub name: Name,
    /// Tells the ring that the bitmaps in shared memory are this volume's.
    pub id: [u8; 16],
    /// What is known of source and replica.
    pub content: Content,
    /// The target's points may include it, as what was found of the stream says. If in doubt, `true`: that costs points while something
    /// of it is missing, never a wrong one.
    pub joined: bool,
}

/// What is known of the difference between a volume and its replica when it is added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Nothing (new volume, unclean stop, lost ring): everything is compared, or sent where the target has nothing.
    Unknown,
    /// They differ at most where the bitmaps in the ring say so.
    AsMarked,
}

/// One volume's state, shared by its queues, sync and the group.
#[derive(Debug)]
pub struct Volume {
    pub(crate) index: VolumeIndex,
    pub(crate) name: Name,
    pub(crate) geometry: Geometry,
    pub(crate) lock: Arc<RangeLock>,
    pub(crate) touched: Touched,
    /// Content that is not in the stream.
    pub(crate) missing: Bitmap,
    /// Missing content that sync has put into the stream and that is not yet durable at the target.
    pub(crate) in_flight: Bitmap,
    /// The target's points may include the volume, so that what is missing of it opens an event. Changed under the group's event
    /// mutex.
    pub(crate) joined: AtomicBool,
    /// That it has joined was said in this stream by this process.
    pub(crate) announced: AtomicBool,
    pub(crate) counters: VolumeCounters,
    /// Its part of the activity log, where there is one.
    pub(crate) activity: Option<Arc<VolumeActivity>>,
}

impl Volume {
    /// Its number in the group.
    #[must_use]
    pub fn index(&self) -> VolumeIndex {
        self.index
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.geometry.size
    }

    /// The target's points may include it.
    #[must_use]
    pub fn joined(&self) -> bool {
        self.joined.load(Ordering::Acquire)
    }

    /// Its initial sync is done, and the stream says so.
    #[must_use]
    pub fn announced(&self) -> bool {
        self.announced.load(Ordering::Acquire)
    }

    /// Content that is not in the stream. To be persisted (together with [`Self::in_flight`]) at a clean stop. Only sync and the
    /// group may clear bits.
    #[must_use]
    pub fn missing(&self) -> &Bitmap {
        &self.missing
    }

    /// Content that sync has put into the stream and that is not yet durable at the target.
    #[must_use]
    pub fn in_flight(&self) -> &Bitmap {
        &self.in_flight
    }

    /// What its queues have done.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters.read()
    }

    /// Number of slots.
    pub(crate) fn slots(&self) -> u64 {
        self.geometry.size.div_ceil(SLOT_BYTES)
    }

    /// The bytes of `count` slots from `first` on, as far as the volume goes.
    pub(crate) fn bytes_of(&self, first: u64, count: u64) -> std::ops::Range<u64> {
        first * SLOT_BYTES..((first + count) * SLOT_BYTES).min(self.geometry.size)
    }
}

/// How a volume is served.
#[derive(Clone, Debug)]
pub(crate) enum Mode {
    /// Every write goes to the backing device and into the stream.
    Captured(Arc<CaptureGroup>, Arc<Volume>),
    /// Every request goes to the backing device, and that is all.
    Plain,
}

/// A block device whose writes are captured ([`CaptureGroup::add_volume`]) or that only passes requests on
/// ([`FilterVolume::unprotected`]).
#[derive(Debug)]
pub struct FilterVolume<F = FileDevice> {
    file: F,
    geometry: Geometry,
    mode: Mode,
}

impl<F: BackingFile> FilterVolume<F> {
    pub(crate) fn new(file: F, mode: Mode) -> Self {
        let of_file = file.geometry();
        let geometry = Geometry {
            max_request: of_file.max_request.min(WRITE_MAX),
            max_discard: of_file.max_discard.min(DISCARD_MAX),
            optimal_block: of_file.optimal_block.min(WRITE_MAX),
            ..of_file
        };
        Self { file, geometry, mode }
    }

    /// Serves `file` with no capture and no history: not protected.
    #[must_use]
    pub fn unprotected(file: F) -> Self {
        Self::new(file, Mode::Plain)
    }

    /// What is captured; `None` for an unprotected one.
    #[must_use]
    pub fn volume(&self) -> Option<&Arc<Volume>> {
        match &self.mode {
            Mode::Captured(_, volume) => Some(volume),
            Mode::Plain => None,
        }
    }

    /// What it stands on.
    #[must_use]
    pub fn file(&self) -> &F {
        &self.file
    }
}

impl FilterVolume<FileDevice> {
    /// Serves an open file or device with no capture.
    #[must_use]
    pub fn unprotected_backing(backing: Backing) -> Self {
        Self::unprotected(FileDevice::new(backing))
    }
}

impl<F: BackingFile> BlockDevice for FilterVolume<F> {
    type Buf = Buf;
    type Queue = FilterQueue;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue<I: Io<Buf>>(&self, io: &mut I) -> io::Result<FilterQueue> {
        let file = self.file.register(io)?;
        FilterQueue::new(file, self.geometry, &self.mode, io.waker())
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.file.extents(offset, len)
    }
}

/// Free buffers kept per queue, by size: for reads, and for writes without a cell.
pub(crate) const POOL: [(usize, usize); 4] = [(4 << 10, 256), (32 << 10, 64), (64 << 10, 64), (256 << 10, 32)];

/// Ordinary memory of a pool as a buffer.
pub(crate) fn other(buf: AlignedBuf) -> Buf {
    Buf::Other(buf)
}
