//! The control device: what is done to devices, apart from serving them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, ErrorKind};
use crate::info::{DeviceInfo, Features, is_alive, queue_path};
use crate::sys::{CONTROL_PATH, CtrlCommand, Encoding, Params, RawInfo, ctrl, feature};

/// Longest wait for a command that only looks or sets. Any answer comes at once, unless somebody holds the driver's lock.
const QUICK: Duration = Duration::from_secs(10);

/// Longest wait for a start, which reads the partition table through the device, and for a stop, which lets go of a disk.
/// Both end when the device below answers; this is far beyond what the block layer itself puts up with (30 s).
const SLOW: Duration = Duration::from_secs(90);

/// Numbers of devices that the driver gives out.
const ID_MAX: u32 = 1 << 20;

/// Means "any number" when a device is added, and "no queue".
const ANY_ID: u32 = u32::MAX;
const NO_QUEUE: u16 = u16::MAX;

type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// The driver's control device. Each call is one command, and blocks until it has ended; several threads may share one.
pub struct Control {
    device: File,
    encoding: Encoding,
    features: Features,
    /// One command at a time. `None` after one that did not end in time: the next makes a new ring.
    ring: Mutex<Option<Ring>>,
}

impl Control {
    /// Opens `/dev/ublk-control` and asks the driver what it can do.
    ///
    /// # Errors
    /// `NoDriver`: this kernel has no ublk, or it is not loaded; `Permission`; `System`.
    pub fn open() -> Result<Self, Error> {
        let mut control = Self::open_as(Encoding::Ioctl)?;
        // A driver that does not know the codes answers with something else than "no such device".
        let probe = control.quick(ctrl::GET_DEV_INFO, ANY_ID, 0, vec![0; size_of::<RawInfo>()]);
        if errno_of(&probe) != Some(libc::ENODEV) {
            control.encoding = Encoding::Bare;
        }
        let asked = control.quick(ctrl::GET_FEATURES, 0, 0, vec![0; 8]);
        if control.encoding == Encoding::Ioctl
            && let Ok(Answer { payload, .. }) = asked
            && let Ok(bits) = u64::read_from_bytes(&payload)
        {
            control.features = Features::new(bits);
        }
        tracing::debug!(encoding = ?control.encoding, features = ?control.features.names(), "ublk driver");
        Ok(control)
    }

    /// Opens `/dev/ublk-control` and speaks to it as to the driver of Linux 6.1: bare command numbers, no feature word. For
    /// trying on a new kernel what an old one will see.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as_to_linux_6_1() -> Result<Self, Error> {
        Self::open_as(Encoding::Bare)
    }

    fn open_as(encoding: Encoding) -> Result<Self, Error> {
        let device =
            File::options().read(true).write(true).open(CONTROL_PATH).map_err(|e| driver_error(e, is_loaded()))?;
        let ring = Mutex::new(Some(make_ring().map_err(ring_error)?));
        Ok(Self { device, encoding, features: Features::UNKNOWN, ring })
    }

    /// What the driver can do.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Describes a device.
    ///
    /// # Errors
    /// `NotFound`: there is none with this number; `Permission`; `System`.
    pub fn info(&self, id: u32) -> Result<DeviceInfo, Error> {
        let doing = || format!("describe ublk device {id}");
        // The path tells a driver of unprivileged devices whom to ask; before Linux 6.3 there are none, nor the command.
        let mut payload = queue_path(id).into_os_string().into_encoded_bytes();
        payload.push(0);
        let path_len = u16::try_from(payload.len()).expect("a short path");
        payload.resize(payload.len() + size_of::<RawInfo>(), 0);
        let mut answer = self.run(ctrl::GET_DEV_INFO2, id, 0, path_len, payload, QUICK);
        let mut skip = usize::from(path_len);
        if matches!(errno_of(&answer), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT)) {
            answer = self.quick(ctrl::GET_DEV_INFO, id, 0, vec![0; size_of::<RawInfo>()]);
            skip = 0;
        }
        let answer = answer.map_err(|error| device_error(id, doing(), error))?;
        let raw = RawInfo::read_from_bytes(&answer.payload[skip..]).expect("the buffer was sized for it");
        Ok(DeviceInfo::new(raw))
    }

    /// All devices that there are, by number.
    ///
    /// # Errors
    /// `System`: their list cannot be read.
    pub fn list(&self) -> Result<Vec<DeviceInfo>, Error> {
        let class = Path::new("/sys/class/ublk-char");
        let folder = if class.exists() { class } else { Path::new("/dev") };
        let entries = std::fs::read_dir(folder).map_err(|e| Error::system(format!("list {}", folder.display()), e))?;
        let mut ids: Vec<u32> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
            .filter(|&id| id < ID_MAX)
            .collect();
        ids.sort_unstable();
        // One that goes away meanwhile is not there.
        Ok(ids.into_iter().filter_map(|id| self.info(id).ok()).collect())
    }

    /// Removes a device that nobody serves: a leftover of a crash. A device that waits for its server ([`crate::DeviceState::Quiesced`])
    /// is stopped first: what waits in it fails.
    ///
    /// # Errors
    /// `Busy`: a process serves it (end that one first); `NotFound`; `TimedOut`: its disk is still open or mounted, it goes
    /// when that ends.
    pub fn delete(&self, id: u32) -> Result<(), Error> {
        let info = self.info(id)?;
        if let Some(pid) = info.server_pid()
            && info.state() == crate::DeviceState::Live
            && is_alive(pid)
        {
            let what = format!("ublk device {id} is served by process {pid}: stop that first");
            return Err(Error::new(ErrorKind::Busy, what));
        }
        if info.state() != crate::DeviceState::Dead {
            self.stop(id)?;
        }
        self.remove(id)
    }

    /// Removes a device whoever serves it, and whoever uses it: they get I/O errors from then on, and what was not written out
    /// is lost. For an operator who was told so.
    ///
    /// # Errors
    /// `NotFound`; `TimedOut`: the disk below hangs, or it is still open or mounted (it goes when that ends).
    pub fn delete_anyway(&self, id: u32) -> Result<(), Error> {
        self.stop(id)?;
        self.remove(id)
    }

    /// Adds a device. The answer says what the driver made of it.
    pub(crate) fn add(&self, wanted: RawInfo) -> Result<DeviceInfo, Error> {
        let answer = self.quick(ctrl::ADD_DEV, wanted.dev_id, 0, wanted.as_bytes().to_vec());
        let answer = answer.map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => self.taken(wanted.dev_id, error),
            _ => device_error(wanted.dev_id, format!("add ublk device{}", numbered(wanted.dev_id)), error),
        })?;
        let raw = RawInfo::read_from_bytes(&answer.payload).expect("the buffer was sized for it");
        Ok(DeviceInfo::new(raw))
    }

    fn taken(&self, id: u32, error: io::Error) -> Error {
        let what = match self.info(id) {
            Ok(info) if info.is_stale() => {
                "a leftover without a server: delete it, or choose another number".to_owned()
            }
            Ok(info) if info.state() == crate::DeviceState::Quiesced => {
                "it waits for its server: recover it, delete it, or choose another number".to_owned()
            }
            Ok(info) => match info.server_pid() {
                Some(pid) => format!("process {pid} serves it: choose another number"),
                None => "choose another number".to_owned(),
            },
            Err(_) => "choose another number".to_owned(),
        };
        Error::new(ErrorKind::Busy, format!("ublk device {id} exists already; {what}")).because(error)
    }

    pub(crate) fn set_params(&self, id: u32, params: &Params) -> Result<(), Error> {
        let answer = self.quick(ctrl::SET_PARAMS, id, 0, params.as_bytes().to_vec());
        answer.map(|_| ()).map_err(|error| device_error(id, format!("set the limits of ublk device {id}"), error))
    }

    pub(crate) fn params(&self, id: u32) -> Result<Params, Error> {
        let asked = Params { len: u32::try_from(size_of::<Params>()).expect("64"), ..Params::default() };
        let answer = self.quick(ctrl::GET_PARAMS, id, 0, asked.as_bytes().to_vec());
        let answer = answer.map_err(|error| device_error(id, format!("read the limits of ublk device {id}"), error))?;
        Ok(Params::read_from_bytes(&answer.payload).expect("the buffer was sized for it"))
    }

    /// The processors from which the kernel sends requests to a queue, as a bit mask in the order of memory.
    pub(crate) fn queue_affinity(&self, id: u32, qid: u16, mask_bytes: usize) -> Result<Vec<u8>, Error> {
        let answer = self.quick(ctrl::GET_QUEUE_AFFINITY, id, u64::from(qid), vec![0; mask_bytes]);
        let answer = answer.map_err(|e| device_error(id, format!("ask for the processors of ublk device {id}"), e))?;
        Ok(answer.payload)
    }

    /// Makes the disk appear. All queues must have their commands with the kernel.
    pub(crate) fn start(&self, id: u32) -> Result<(), Error> {
        let answer = self.run(ctrl::START_DEV, id, own_pid(), 0, Vec::new(), SLOW);
        answer.map(|_| ()).map_err(|error| device_error(id, format!("start ublk device {id}"), error))
    }

    /// Takes the disk away; what is not written fails. Every queue's commands end.
    pub(crate) fn stop(&self, id: u32) -> Result<(), Error> {
        let answer = self.run(ctrl::STOP_DEV, id, 0, 0, Vec::new(), SLOW);
        answer.map(|_| ()).map_err(|error| device_error(id, format!("stop ublk device {id}"), error))
    }

    /// Forgets a stopped device. Its number is free when the last process has closed it.
    pub(crate) fn remove(&self, id: u32) -> Result<(), Error> {
        let doing = || format!("delete ublk device {id}");
        let answer = self.quick(ctrl::DEL_DEV_ASYNC, id, 0, Vec::new());
        let answer = match errno_of(&answer) {
            // Before Linux 6.9: waits for the last user.
            Some(libc::EOPNOTSUPP | libc::EINVAL) => self.quick(ctrl::DEL_DEV, id, 0, Vec::new()),
            _ => answer,
        };
        answer.map(|_| ()).map_err(|error| device_error(id, doing(), error))
    }

    /// Begins to take over a device whose server is gone.
    ///
    /// # Errors
    /// The kernel's: `EBUSY` while the old server's rings, or the server itself, still live.
    pub(crate) fn begin_recovery(&self, id: u32) -> io::Result<()> {
        self.quick(ctrl::START_USER_RECOVERY, id, 0, Vec::new()).map(|_| ())
    }

    /// Lets requests come again. All queues must have their commands with the kernel.
    pub(crate) fn end_recovery(&self, id: u32) -> Result<(), Error> {
        let answer = self.run(ctrl::END_USER_RECOVERY, id, own_pid(), 0, Vec::new(), SLOW);
        answer.map(|_| ()).map_err(|error| device_error(id, format!("recover ublk device {id}"), error))
    }

    /// Makes a served device wait for another server; every queue's commands end.
    pub(crate) fn quiesce(&self, id: u32, patience: Duration) -> Result<(), Error> {
        let doing = || format!("let go of ublk device {id}");
        if self.info(id)?.flags() & feature::QUIESCE == 0 {
            let what = format!("{}: this kernel cannot (Linux 6.16 can); end the process instead", doing());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let millis = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        let answer = self.run(ctrl::QUIESCE_DEV, id, millis, 0, Vec::new(), patience + QUICK);
        answer.map(|_| ()).map_err(|error| device_error(id, doing(), error))
    }

    /// Tells the kernel a new size in bytes.
    pub(crate) fn update_size(&self, id: u32, bytes: u64) -> Result<(), Error> {
        let doing = || format!("change the size of ublk device {id}");
        if self.info(id)?.flags() & feature::UPDATE_SIZE == 0 {
            let what = format!("{}: this kernel cannot while it is served (Linux 6.16 can)", doing());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let answer = self.quick(ctrl::UPDATE_SIZE, id, bytes / 512, Vec::new());
        answer.map(|_| ()).map_err(|error| device_error(id, doing(), error))
    }

    fn quick(&self, number: u8, id: u32, data: u64, payload: Vec<u8>) -> io::Result<Answer> {
        self.run(number, id, data, 0, payload, QUICK)
    }

    /// Runs one command to its end.
    ///
    /// A command that does not end in time keeps its buffer, which is leaked, until its ring is closed: that makes the kernel
    /// give it up.
    fn run(
        &self,
        number: u8,
        id: u32,
        data: u64,
        path_len: u16,
        payload: Vec<u8>,
        limit: Duration,
    ) -> io::Result<Answer> {
        let mut payload = std::mem::ManuallyDrop::new(payload);
        let len = u16::try_from(payload.len()).expect("buffers of commands are small");
        let addr = if payload.is_empty() { 0 } else { payload.as_mut_ptr().expose_provenance() as u64 };
        let command = CtrlCommand {
            dev_id: id,
            queue_id: NO_QUEUE,
            len,
            addr,
            data,
            dev_path_len: path_len,
            pad: 0,
            reserved: 0,
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<CtrlCommand>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(Fd(self.device.as_raw_fd()), self.encoding.control(number)).cmd(bytes);
        let mut place = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ring = match place.take() {
            Some(ring) => ring,
            None => make_ring()?,
        };
        // SAFETY: the one address in the entry is that of `payload`, whose memory is freed only below, after the command's
        // completion; the descriptor is open as long as `self`. The queue is empty, so there is room.
        unsafe { ring.submission().push(&entry.build()) }.expect("one entry at a time");
        let result = wait(&mut ring, limit)?;
        *place = Some(ring);
        drop(place);
        let payload = std::mem::ManuallyDrop::into_inner(payload);
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(Answer { payload }) }
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("encoding", &self.encoding)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}

/// What a command gave back.
struct Answer {
    payload: Vec<u8>,
}

fn make_ring() -> io::Result<Ring> {
    // Twice the size of an ordinary entry: the argument is 32 bytes.
    IoUring::builder().build(2)
}

/// The result of the one command in `ring`, or the reason why there is none: then the ring is of no use any more.
fn wait(ring: &mut Ring, limit: Duration) -> io::Result<i32> {
    let deadline = now() + limit;
    loop {
        if let Some(entry) = ring.completion().next() {
            return Ok(entry.result());
        }
        let left = deadline.saturating_duration_since(now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let time = Timespec::from(left);
        match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time)) {
            Ok(_) => {}
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)) => {}
            Err(error) => return Err(error),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a driver: the limit of a command begins here")]
pub(crate) fn now() -> std::time::Instant {
    std::time::Instant::now()
}

fn own_pid() -> u64 {
    u64::from(std::process::id())
}

fn errno_of(answer: &io::Result<Answer>) -> Option<i32> {
    answer.as_ref().err().and_then(io::Error::raw_os_error)
}

fn numbered(id: u32) -> String {
    if id == ANY_ID { String::new() } else { format!(" {id}") }
}

fn is_loaded() -> bool {
    Path::new("/sys/module/ublk_drv").exists() || Path::new("/sys/class/ublk-char").exists()
}

/// Why the control device could not be opened.
fn driver_error(error: io::Error, loaded: bool) -> Error {
    let with = |kind, reason: &str| Error::new(kind, format!("cannot open {CONTROL_PATH}: {reason}"));
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) if loaded => with(
            ErrorKind::NoDriver,
            "the ublk driver is loaded, but its device is missing here: run where /dev is the system's (devtmpfs)",
        ),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => with(
            ErrorKind::NoDriver,
            "no ublk driver: load it with `modprobe ublk_drv`; if there is no such module, this kernel (before Linux 6.1, \
             or built without CONFIG_BLK_DEV_UBLK) cannot: serve the device over NBD instead",
        ),
        Some(libc::EACCES | libc::EPERM) => {
            with(ErrorKind::Permission, "not allowed: run as root, or give this process CAP_SYS_ADMIN and the file")
                .because(error)
        }
        _ => with(ErrorKind::System, "the operating system refused").because(error),
    }
}

/// Why there is no ring.
fn ring_error(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => Error::new(
            ErrorKind::Permission,
            "cannot use io_uring, on which ublk stands: allow it with `sysctl kernel.io_uring_disabled=0`, or in the \
             container's seccomp profile",
        )
        .because(error),
        _ => Error::system("make a ring for ublk commands", error),
    }
}

/// Why a command failed.
fn device_error(id: u32, doing: String, error: io::Error) -> Error {
    let (kind, reason) = match error.raw_os_error() {
        Some(libc::ENODEV) => (ErrorKind::NotFound, format!("there is no ublk device {id}")),
        Some(libc::EPERM | libc::EACCES) => {
            (ErrorKind::Permission, "not allowed: run as root (CAP_SYS_ADMIN), or as the device's owner".to_owned())
        }
        Some(libc::EBUSY) => (ErrorKind::Busy, "it is in use: its server is alive, or its disk is open".to_owned()),
        Some(libc::EOPNOTSUPP) => (ErrorKind::Unsupported, "this kernel cannot do that".to_owned()),
        None if error.kind() == io::ErrorKind::TimedOut => {
            let reason = "the kernel has not answered in time: its disk is open or mounted, or what lies below hangs";
            (ErrorKind::TimedOut, reason.to_owned())
        }
        _ => return Error::system(doing, error),
    };
    Error::new(kind, format!("cannot {doing}: {reason}")).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_driver_is_told_from_one_that_forbids_it() {
        let raw = io::Error::from_raw_os_error;
        let missing = driver_error(raw(libc::ENOENT), false);
        assert_eq!(missing.kind(), ErrorKind::NoDriver);
        let text = missing.to_string();
        assert!(
            text.contains("CONFIG_BLK_DEV_UBLK") && text.contains("modprobe ublk_drv") && text.contains("NBD"),
            "{text}"
        );
        assert!(driver_error(raw(libc::ENOENT), true).to_string().contains("devtmpfs"));
        let denied = driver_error(raw(libc::EACCES), true);
        assert_eq!(denied.kind(), ErrorKind::Permission);
        assert!(denied.to_string().contains("root"));
        assert!(ring_error(raw(libc::EPERM)).to_string().contains("kernel.io_uring_disabled"));
    }

    #[test]
    fn errors_of_commands_name_the_device_and_the_way_out() {
        let raw = io::Error::from_raw_os_error;
        let gone = device_error(7, "stop ublk device 7".to_owned(), raw(libc::ENODEV));
        assert_eq!(gone.kind(), ErrorKind::NotFound);
        assert!(gone.to_string().contains("device 7"));
        assert_eq!(device_error(7, String::new(), io::ErrorKind::TimedOut.into()).kind(), ErrorKind::TimedOut);
        assert_eq!(device_error(7, String::new(), raw(libc::EBUSY)).kind(), ErrorKind::Busy);
        assert_eq!(device_error(7, String::new(), raw(libc::EIO)).kind(), ErrorKind::System);
    }

    /// On a machine without the driver this is the real thing; with it, the driver answers.
    #[test]
    fn opening_says_what_is_wrong_or_works() {
        match Control::open() {
            Ok(control) => assert!(control.info(ID_MAX - 1).is_err()),
            Err(error) => assert!(!error.to_string().is_empty() && error.kind() != ErrorKind::System, "{error}"),
        }
    }
}
