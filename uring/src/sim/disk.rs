//! A simulated block device.

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::image::Image;
use super::{SECTOR, SimRng};
use crate::{Allocate, Backing, BackingId, Geometry};

/// A disk in memory with a volatile cache. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    shared: Arc<Shared>,
}

struct Shared {
    /// Stands for the disk where an open file is asked for ([`crate::Io::register`]); never read or written.
    handle: Arc<File>,
    size: u64,
    state: Mutex<State>,
}

struct State {
    image: Image,
    rng: SimRng,
    ops: u64,
    crash_at: Option<u64>,
    fault: Option<Box<dyn Fault>>,
}

trait Fault: Send {
    fn ask(&mut self, op: &DiskOp) -> DiskFault;
}

impl<F: FnMut(&DiskOp) -> DiskFault + Send> Fault for F {
    fn ask(&mut self, op: &DiskOp) -> DiskFault {
        self(op)
    }
}

/// An operation on a [`SimDisk`], as its fault hook sees it. Offsets and lengths in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskOp {
    /// Also of the write half of a linked pair.
    Write {
        /// Position.
        offset: u64,
        /// Length.
        len: u32,
        /// Durable at completion.
        dsync: bool,
    },
    /// A read.
    Read {
        /// Position.
        offset: u64,
        /// Length.
        len: u32,
    },
    /// A sync, also of a linked pair.
    Sync,
    /// Deallocation or zeroes.
    Allocate {
        /// Which.
        mode: Allocate,
        /// Position.
        offset: u64,
        /// Length.
        len: u64,
    },
}

/// What the fault hook decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskFault {
    /// No fault.
    None,
    /// The operation fails with this error number; a write may have been done in part.
    Error(i32),
    /// Not now, but after so many other steps.
    Delay(u32),
    /// Never ends, until the hook is replaced.
    Hang,
}

pub(super) enum Run<T> {
    Done(T),
    Failed(i32),
    Delay(u32),
    Hang,
}

impl SimDisk {
    /// A disk of `size` zero bytes.
    ///
    /// # Panics
    /// If the size is not a multiple of 512.
    #[must_use]
    pub fn new(size: u64, rng: SimRng) -> Self {
        assert!(size.is_multiple_of(SECTOR as u64), "size {size} is not a multiple of {SECTOR}");
        Self::from_image(Image::with_len(size), rng)
    }

    fn from_image(image: Image, rng: SimRng) -> Self {
        let handle = Arc::new(File::open("/dev/null").expect("/dev/null can be opened wherever there are processes"));
        let size = image.len();
        let state = State { image, rng, ops: 0, crash_at: None, fault: None };
        Self { shared: Arc::new(Shared { handle, size, state: Mutex::new(state) }) }
    }

    /// What a device opens on it. Attach the disk to each [`super::SimIo`] on which the backing's file is registered.
    #[must_use]
    pub fn backing(&self) -> Backing {
        let geometry = Geometry {
            size: self.shared.size,
            logical_block: 512,
            optimal_block: 4096,
            max_request: 1 << 20,
            max_discard: 64 << 20,
            read_only: false,
            discard: true,
        };
        let id = BackingId::from_text(format!("simulated disk size={}", self.shared.size));
        Backing { file: self.file(), geometry, direct: true, is_block_device: true, id }
    }

    /// The file that stands for the disk.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.shared.handle)
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.size
    }

    /// Reads the live image behind the back of all rings and faults.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn peek(&self, offset: u64, buf: &mut [u8]) {
        assert!(self.lock().image.read(offset, buf), "range outside of the disk");
    }

    /// A sync from outside of all rings. Faults are asked; one that would make it wait fails it.
    ///
    /// # Errors
    /// The fault's; `TimedOut`.
    pub fn flush(&self) -> std::io::Result<()> {
        match self.run(true, DiskOp::Sync, Image::sync, |_, _| {}) {
            Run::Done(()) => Ok(()),
            Run::Failed(errno) => Err(std::io::Error::from_raw_os_error(errno)),
            Run::Delay(_) | Run::Hang => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// Reads what a crash that loses all unsynced writes would leave.
    pub fn peek_durable(&self, offset: u64, buf: &mut [u8]) {
        self.lock().image.read_durable(offset, buf);
    }

    /// Writes durably behind the back of all rings and faults; makes everything else durable, too.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.shared.size, "range outside of the disk");
        let mut state = self.lock();
        state.image.write(offset, bytes);
        state.image.sync();
    }

    /// Flips the bits of `mask` in one byte, live and durable.
    pub fn corrupt(&self, offset: u64, mask: u8) {
        self.lock().image.flip(offset, mask);
    }

    /// The power fails: keeps, loses and tears what was not synced. Rings must be killed first ([`super::SimIo::kill`]).
    /// Ends the crash and removes the faults.
    pub fn crash(&self, rng: &mut SimRng) {
        let mut state = self.lock();
        state.image.crash(rng);
        state.crash_at = None;
        state.fault = None;
    }

    /// An independent copy of both images, without faults; to try several crashes of one state.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut state = self.lock();
        let rng = state.rng.fork();
        Self::from_image(state.image.clone(), rng)
    }

    /// Operations run so far.
    #[must_use]
    pub fn op_count(&self) -> u64 {
        self.lock().ops
    }

    /// From the operation with this number on (counted by [`Self::op_count`]) none ends any more.
    pub fn crash_at(&self, op: Option<u64>) {
        self.lock().crash_at = op;
    }

    /// Whether the operation set by [`Self::crash_at`] has been reached.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        let state = self.lock();
        state.crash_at.is_some_and(|at| state.ops >= at)
    }

    /// Asks `fault` before every operation, in place of the hook before.
    pub fn set_fault(&self, fault: impl FnMut(&DiskOp) -> DiskFault + Send + 'static) {
        self.lock().fault = Some(Box::new(fault));
    }

    /// Removes the fault hook.
    pub fn clear_fault(&self) {
        self.lock().fault = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of a fault hook is the test's failure; the state behind it stays consistent.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_same(&self, file: &Arc<File>) -> bool {
        Arc::ptr_eq(&self.shared.handle, file)
    }

    /// Runs `op`: asks for faults (if told to), counts, and hands the image to `effect`. `failed` is called if the operation fails.
    pub(super) fn run<T>(
        &self,
        ask: bool,
        op: DiskOp,
        effect: impl FnOnce(&mut Image) -> T,
        failed: impl FnOnce(&mut Image, &mut SimRng),
    ) -> Run<T> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.crash_at.is_some_and(|at| state.ops >= at) {
            return Run::Hang;
        }
        let fault = if ask { state.fault.as_mut() } else { None };
        match fault.map_or(DiskFault::None, |fault| fault.ask(&op)) {
            DiskFault::None => {}
            DiskFault::Error(errno) => {
                state.ops += 1;
                failed(&mut state.image, &mut state.rng);
                return Run::Failed(errno);
            }
            DiskFault::Delay(steps) => return Run::Delay(steps),
            DiskFault::Hang => return Run::Hang,
        }
        state.ops += 1;
        Run::Done(effect(&mut state.image))
    }

    /// Lets a write that was in flight at a kill reach the disk or not, whatever the faults say.
    pub(super) fn maybe(&self, effect: impl FnOnce(&mut Image, &mut SimRng)) {
        let mut state = self.lock();
        let state = &mut *state;
        effect(&mut state.image, &mut state.rng);
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("size", &self.shared.size).finish_non_exhaustive()
    }
}
