//! A device's life: made, served, taken over, let go.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use farshore_uring::BlockDevice;

use crate::control::{Control, now};
use crate::error::{Error, ErrorKind};
use crate::info::{DataPath, DeviceInfo, DeviceState, block_path};
use crate::params;
use crate::queue::{Setup, Siblings};
use crate::recovery::{self, pause};
use crate::stats::{Counters, Stats};
use crate::sys::{QUEUE_DEPTH_MAX, RawInfo, feature};
use crate::threads::{self, Thread};

/// How to make a device.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Its number; `None`: the lowest that is free.
    pub id: Option<u32>,
    /// Hardware queues, each with a thread. Default 1, range 1 to 64; the kernel makes no more than there are processors. More
    /// help when the guest uses several processors and those have time to spare.
    pub queues: u16,
    /// Most requests of one queue at once. Default 128, range 4 (the block layer's least) to 1024. Each costs a buffer of `request_bytes_max` where data
    /// goes by [`DataPath::BufferSwap`], and about 300 bytes otherwise.
    pub depth: u16,
    /// Longest read or write in bytes, where the back end takes as much. Default 256 KiB, range 4 KiB to 32 MiB.
    pub request_bytes_max: u32,
    /// How data gets across. `None`: [`DataPath::UserCopy`] where the kernel can (`docs/decisions/0006-ublk-data-path.md`).
    pub data_path: Option<DataPath>,
    /// Whether the device outlives its server: requests wait for the next one ([`Server::recover`]), and those under way come
    /// again. Default true. Without, the disk goes away with its process, and requests fail.
    pub survives_its_server: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            id: None,
            queues: 1,
            depth: 128,
            request_bytes_max: 256 << 10,
            data_path: None,
            survives_its_server: true,
        }
    }
}

impl ServerConfig {
    fn check(&self) -> Result<(), Error> {
        let checks = [
            ((1..=64).contains(&self.queues), "queues: 1 to 64"),
            ((4..=1024).contains(&self.depth), "depth: 4 to 1024"),
            ((4096..=32 << 20).contains(&self.request_bytes_max), "request_bytes_max: 4 KiB to 32 MiB"),
        ];
        const { assert!(QUEUE_DEPTH_MAX >= 1024 + recovery::IDLE_TAGS) };
        match checks.iter().find(|(good, _)| !good) {
            Some((_, range)) => Err(Error::new(ErrorKind::Invalid, format!("ublk server out of range; {range}"))),
            None => Ok(()),
        }
    }
}

/// When a device may be stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Only if nothing is mounted on it, and neither device mapper, swap nor another exclusive user holds it.
    IfUnused,
    /// In any case: whoever uses it gets I/O errors from then on. What was written to its page cache is written out first.
    Anyway,
}

/// Starts servers.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Makes a device of the shape of `device` and serves it. When this returns, `/dev/ublkbN` is there and works.
    ///
    /// # Errors
    /// `NoDriver`, `Permission`; `Invalid`: configuration or geometry; `Busy`: the number is taken; `System`. The device that
    /// was begun is removed again.
    pub fn start<D: BlockDevice>(config: ServerConfig, device: Arc<D>) -> Result<ServerHandle, Error> {
        Self::start_with(Control::open()?, config, device)
    }

    /// As [`Self::start`], over an open control device.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with<D: BlockDevice>(
        control: Control,
        config: ServerConfig,
        device: Arc<D>,
    ) -> Result<ServerHandle, Error> {
        config.check()?;
        let geometry = device.geometry();
        let request_bytes = params::request_bytes(&geometry, config.request_bytes_max);
        let limits = params::of_geometry(&geometry, request_bytes)?;
        let info = control.add(wanted(&control, &config, request_bytes))?;
        let id = info.id();
        let started = granted(&config, &info)
            .and_then(|()| control.set_params(id, &limits))
            .and_then(|()| serve(&control, &info, request_bytes, geometry.size, &device))
            .and_then(|serving| control.start(id).map(|()| serving));
        match started {
            Ok(serving) => {
                if config.survives_its_server {
                    recovery::show_deaths(id, info.depth());
                }
                tracing::info!(id, path = ?info.data_path(), queues = info.queues(), "ublk device started");
                Ok(ServerHandle::new(control, id, serving))
            }
            Err(error) => {
                // Ends the threads' commands; they go by themselves.
                let undone = control.stop(id).and_then(|()| control.remove(id));
                if let Err(undo) = undone {
                    tracing::warn!(id, error = %undo, "a ublk device that did not start is left behind");
                }
                Err(error)
            }
        }
    }

    /// Takes over a device whose server is gone ([`DeviceState::Quiesced`]): its requests go on with `device`, those that were
    /// under way come again. Queues, depth and data path are those it was made with. Waits up to `patience` until the kernel
    /// has ended all I/O of the old server.
    ///
    /// # Errors
    /// `NotFound`; `Busy`: its server still lives; `Invalid`: `device` has another shape; `Unsupported`: the device was made
    /// not to outlive its server. In every case it goes on waiting.
    pub fn recover<D: BlockDevice>(id: u32, patience: Duration, device: Arc<D>) -> Result<ServerHandle, Error> {
        Self::recover_with(Control::open()?, id, patience, device)
    }

    /// As [`Self::recover`], over an open control device.
    ///
    /// # Errors
    /// As [`Self::recover`].
    pub fn recover_with<D: BlockDevice>(
        control: Control,
        id: u32,
        patience: Duration,
        device: Arc<D>,
    ) -> Result<ServerHandle, Error> {
        let info = control.info(id)?;
        if !info.survives_its_server() {
            let what = format!("ublk device {id} was not made to outlive its server: delete it and start a new one");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let deadline = now() + patience;
        recovery::await_death(&control, id, deadline)?;
        let limits = control.params(id)?;
        params::check_same(id, &limits, &device.geometry())?;
        recovery::begin(&control, id, deadline)?;
        let request_bytes = limits.basic.max_sectors.saturating_mul(512);
        let serving = serve(&control, &info, request_bytes, limits.basic.sectors * 512, &device)?;
        if let Err(error) = control.end_recovery(id) {
            serving.siblings.fail();
            // What they say is that they were told to.
            let _told = threads::join(serving.threads);
            return Err(error);
        }
        recovery::show_deaths(id, info.depth());
        tracing::info!(id, "ublk device recovered");
        Ok(ServerHandle::new(control, id, serving))
    }
}

/// What the driver is asked for.
fn wanted(control: &Control, config: &ServerConfig, request_bytes: u32) -> RawInfo {
    let features = control.features();
    let mut flags = features.wanted(feature::UPDATE_SIZE);
    if config.survives_its_server {
        flags |= feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | features.wanted(feature::QUIESCE);
    }
    if config.data_path != Some(DataPath::BufferSwap) {
        flags |= features.wanted(feature::USER_COPY);
    }
    RawInfo {
        queues: config.queues,
        depth: config.depth + if config.survives_its_server { recovery::IDLE_TAGS } else { 0 },
        request_bytes_max: request_bytes,
        dev_id: config.id.unwrap_or(u32::MAX),
        // Tells a device that is being started from a leftover.
        server_pid: i32::try_from(std::process::id()).unwrap_or(-1),
        flags,
        ..RawInfo::default()
    }
}

/// Whether the driver gave what cannot be done without.
fn granted(config: &ServerConfig, info: &DeviceInfo) -> Result<(), Error> {
    let lacks = |what: &str| Err(Error::new(ErrorKind::Unsupported, format!("this kernel's ublk driver lacks {what}")));
    if config.survives_its_server && !info.survives_its_server() {
        return lacks("recovery (Linux 6.1 has it)");
    }
    if config.data_path == Some(DataPath::UserCopy) && info.data_path() != DataPath::UserCopy {
        return lacks("user copy (Linux 6.5 has it); leave the data path to the server");
    }
    Ok(())
}

/// What belongs to a served device.
struct Serving {
    threads: Vec<Thread>,
    counters: Vec<Arc<Counters>>,
    size: Arc<AtomicU64>,
    siblings: Arc<Siblings>,
}

fn serve<D: BlockDevice>(
    control: &Control,
    info: &DeviceInfo,
    request_bytes: u32,
    size: u64,
    device: &Arc<D>,
) -> Result<Serving, Error> {
    let file = Arc::new(open_queues(&info.queue_path())?);
    let size = Arc::new(AtomicU64::new(size));
    let counters: Vec<_> = (0..info.queues()).map(|_| Arc::new(Counters::default())).collect();
    let (geometry, siblings) = (device.geometry(), Arc::<Siblings>::default());
    let threads = threads::start(control, info.id(), info.queues(), device, |qid| Setup {
        qid,
        depth: info.depth(),
        data_path: info.data_path(),
        request_bytes,
        geometry,
        size: Arc::clone(&size),
        encoding: control.encoding(),
        file: Arc::clone(&file),
        counters: Arc::clone(&counters[usize::from(qid)]),
        siblings: Arc::clone(&siblings),
    });
    // From here on only the threads and their rings hold the file.
    match threads {
        Ok(threads) => Ok(Serving { threads, counters, size, siblings }),
        Err(error) => {
            siblings.fail();
            Err(error)
        }
    }
}

/// Longest time until `/dev/ublkcN` is there: devtmpfs makes it at once, udev may set its owner later.
const NODE_MAX: Duration = Duration::from_secs(2);

fn open_queues(path: &Path) -> Result<File, Error> {
    let deadline = now() + NODE_MAX;
    loop {
        // Non-blocking is what lets the ring copy a request's data in place, instead of handing each copy to a worker.
        let opened = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        match opened {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound && now() < deadline => pause(),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let what = format!("{} is open: another process serves this device, end it first", path.display());
                return Err(Error::new(ErrorKind::Busy, what).because(error));
            }
            Err(error) => return Err(Error::system(format!("open {}", path.display()), error)),
        }
    }
}

/// Whether a disk could not be opened because it is not there, rather than its node.
fn is_gone(id: u32, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::ENXIO | libc::ENODEV) => true,
        Some(libc::ENOENT) => !Path::new(&format!("/sys/block/ublkb{id}")).exists(),
        _ => false,
    }
}

/// A served device.
///
/// Dropping it does not end anything: the threads serve on for as long as the process lives, and then the device waits for
/// [`Server::recover`]. A device on which a file system may be mounted is not taken away by the end of some variable's scope.
pub struct ServerHandle {
    control: Control,
    id: u32,
    counters: Vec<Arc<Counters>>,
    size: Arc<AtomicU64>,
    siblings: Arc<Siblings>,
    /// A stop has failed because the page cache could not be written out.
    unwritten_told: AtomicBool,
    /// Empty once stopped.
    threads: Mutex<Vec<Thread>>,
}

impl ServerHandle {
    fn new(control: Control, id: u32, serving: Serving) -> Self {
        let Serving { threads, counters, size, siblings } = serving;
        Self {
            control,
            id,
            counters,
            size,
            siblings,
            unwritten_told: AtomicBool::new(false),
            threads: Mutex::new(threads),
        }
    }

    /// The device's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The block device, `/dev/ublkbN`.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        block_path(self.id)
    }

    /// The device, as the kernel describes it now.
    ///
    /// # Errors
    /// As [`Control::info`].
    pub fn info(&self) -> Result<DeviceInfo, Error> {
        self.control.info(self.id)
    }

    /// The control device that the server uses.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats::sum(self.counters.iter().map(|queue| &**queue))
    }

    /// Whether all queues are served. `false` after a stop, and after a queue's thread has failed: then the kernel has taken the
    /// device from this process (log, [`Self::stop`] says why).
    #[must_use]
    pub fn is_serving(&self) -> bool {
        let threads = self.lock();
        !threads.is_empty() && !threads.iter().any(Thread::is_finished)
    }

    /// Whether a queue is no longer served although nobody asked for that: its back end or its ring has failed, or it panicked. The
    /// device waits for its next server then. Never waits: while it is being stopped, the answer is no.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        let threads = match self.threads.try_lock() {
            Ok(threads) => threads,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        threads.iter().any(Thread::is_finished)
    }

    /// Of each queue, the turn of its loop that it is at; `None`: it waits for the kernel. A turn takes microseconds and waits for
    /// nothing: one that does not end says that the queue's thread, and so the guest's requests on that queue, hang in the back end.
    #[must_use]
    pub fn turns_under_way(&self) -> Vec<Option<u64>> {
        self.counters.iter().map(|queue| queue.turn()).collect()
    }

    /// Tells the kernel that the device has grown to `bytes`. The back end must have it already.
    ///
    /// # Errors
    /// `Unsupported`: before Linux 6.16; `Invalid`: it would shrink, which guests do not survive.
    pub fn grow(&self, bytes: u64) -> Result<(), Error> {
        let now = self.size.load(Ordering::Relaxed);
        if bytes < now || !bytes.is_multiple_of(512) {
            let what =
                format!("ublk device {} cannot go from {now} bytes to {bytes}: it can only grow, by sectors", self.id);
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        // First: a request behind the old end may come as soon as the kernel knows the new one, and the system call in between
        // orders this store before it. The kernel lets none come earlier.
        self.size.store(bytes, Ordering::Relaxed);
        let told = self.control.update_size(self.id, bytes);
        if told.is_err() {
            self.size.store(now, Ordering::Relaxed);
        }
        told
    }

    /// Stops the device and removes it: writes out its page cache, takes the disk away, ends the threads. Blocks until
    /// requests under way have ended. A second call does nothing.
    ///
    /// # Errors
    /// `Busy`: it is in use (with [`Stop::IfUnused`]); nothing has changed then. `TimedOut`: the disk below hangs. `System`: a
    /// queue's thread had failed before; or, once and with [`Stop::IfUnused`], the page cache could not be written out: nothing has
    /// changed, and a second stop goes on without.
    pub fn stop(&self, when: Stop) -> Result<(), Error> {
        let mut threads = self.lock();
        if threads.is_empty() {
            return Ok(());
        }
        // Held until the disk is gone, so that nobody mounts it meanwhile.
        let held = self.settle(when)?;
        self.control.stop(self.id)?;
        drop(held);
        let ended = threads::join(std::mem::take(&mut threads));
        self.control.remove(self.id)?;
        tracing::info!(id = self.id, "ublk device stopped");
        ended
    }

    /// Lets go of the device without stopping it: requests under way are answered, later ones wait until another server takes
    /// it over.
    ///
    /// # Errors
    /// `Unsupported`: before Linux 6.16 (end the process instead); `Busy`: requests were still under way after `patience`.
    pub fn let_go(&self, patience: Duration) -> Result<(), Error> {
        let mut threads = self.lock();
        if threads.is_empty() {
            return Ok(());
        }
        let deadline = now() + patience;
        self.control.quiesce(self.id, patience)?;
        let ended = threads::join(std::mem::take(&mut threads));
        // The kernel closes the rings' files in its own time.
        while self.info()?.state() == DeviceState::Live && now() < deadline {
            pause();
        }
        ended
    }

    /// Lets go of the device as the death of this process would, on any kernel: requests under way are issued again to the next
    /// server, later ones wait for it. When this returns, the threads have ended; the kernel ends their last I/O by itself.
    pub fn abandon(self) {
        self.siblings.let_go();
        let threads = std::mem::take(&mut *self.lock());
        // That they were made to let go is what they report.
        let _told = threads::join(threads);
        tracing::info!(id = self.id, "ublk device let go: it waits for its next server");
    }

    /// Opens the disk, exclusively if it has to be unused, and writes out what its page cache holds: after a stop that would
    /// have nowhere to go.
    fn settle(&self, when: Stop) -> Result<Option<OwnedFd>, Error> {
        let path = self.block_path();
        let exclusive = if when == Stop::IfUnused { libc::O_EXCL } else { 0 };
        let disk = match File::options().read(true).custom_flags(exclusive | libc::O_CLOEXEC).open(&path) {
            Ok(disk) => disk,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let what = format!(
                    "{} is in use: unmount it, or take it out of device mapper or swap, or stop it anyway",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Busy, what).because(error));
            }
            // There is no disk any more, so nothing to be written; or it may go whatever it is used for.
            Err(error) if when != Stop::IfUnused || is_gone(self.id, &error) => {
                tracing::debug!(id = self.id, %error, "a ublk device is stopped without a look at it");
                return Ok(None);
            }
            // Whether it is in use cannot be told.
            Err(error) => return Err(Error::system(format!("open {}", path.display()), error)),
        };
        if let Err(error) = disk.sync_all() {
            // Said once; the disk below may never answer again, and a device that cannot be stopped helps nobody.
            if when == Stop::IfUnused && !self.unwritten_told.swap(true, Ordering::Relaxed) {
                let what = format!(
                    "write out the page cache of {} (what the disk below does not take is lost; the next stop goes on without it)",
                    path.display()
                );
                return Err(Error::system(what, error));
            }
            tracing::warn!(id = self.id, %error, "the page cache of a stopped ublk device could not be written out");
        }
        Ok(Some(disk.into()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("id", &self.id).finish_non_exhaustive()
    }
}
