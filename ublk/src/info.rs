//! What the kernel says about itself and about a device.

use std::path::PathBuf;

use crate::sys::{self, RawInfo, feature};

/// How a request's data gets between the guest's pages and the device's buffers. One copy either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataPath {
    /// The queue thread copies, when a request's length is known: each buffer is as long as its request. From Linux 6.5 on.
    UserCopy,
    /// The kernel copies before it announces a write, into a buffer handed over with the answer to the request before. So every
    /// idle tag holds a buffer of the longest request. Any Linux with ublk.
    BufferSwap,
}

/// What the driver can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// `None`: a driver before Linux 6.5, which does not say.
    bits: Option<u64>,
}

impl Features {
    pub(crate) const UNKNOWN: Self = Self { bits: None };

    pub(crate) fn new(bits: u64) -> Self {
        Self { bits: Some(bits) }
    }

    /// The feature word, as in the kernel's header; `None`: this driver does not tell (before Linux 6.5).
    #[must_use]
    pub fn bits(self) -> Option<u64> {
        self.bits
    }

    fn has(self, bit: u64) -> bool {
        self.bits.is_some_and(|bits| bits & bit != 0)
    }

    /// [`DataPath::UserCopy`] is possible.
    #[must_use]
    pub fn user_copy(self) -> bool {
        self.has(feature::USER_COPY)
    }

    /// A device can outlive its server. All of Linux 6.1 and later can.
    #[must_use]
    pub fn recovery(self) -> bool {
        self.bits.is_none() || self.has(feature::USER_RECOVERY)
    }

    /// The size of a device can change while it is served (Linux 6.16).
    #[must_use]
    pub fn update_size(self) -> bool {
        self.has(feature::UPDATE_SIZE)
    }

    /// A living server can let go of its device and leave it waiting (Linux 6.16).
    #[must_use]
    pub fn quiesce(self) -> bool {
        self.has(feature::QUIESCE)
    }

    /// Names of the features that matter here, for people.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        const NAMES: [(u64, &str); 8] = [
            (feature::USER_RECOVERY, "recovery"),
            (feature::USER_RECOVERY_REISSUE, "recovery-reissue"),
            (feature::UNPRIVILEGED_DEV, "unprivileged"),
            (feature::CMD_IOCTL_ENCODE, "ioctl-codes"),
            (feature::USER_COPY, "user-copy"),
            (feature::USER_RECOVERY_FAIL_IO, "recovery-fail-io"),
            (feature::UPDATE_SIZE, "update-size"),
            (feature::QUIESCE, "quiesce"),
        ];
        NAMES.iter().filter(|(bit, _)| self.has(*bit)).map(|(_, name)| *name).collect()
    }

    pub(crate) fn wanted(self, bit: u64) -> u64 {
        // A driver that does not say clears what it does not know.
        if self.bits.is_none() || self.has(bit) { bit } else { 0 }
    }
}

/// Where a device is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum DeviceState {
    /// Not started, or stopped: there is no `/dev/ublkbN`.
    Dead,
    /// Served.
    Live,
    /// Its server is gone; requests wait for the next one.
    Quiesced,
    /// Its server is gone; requests fail until the next one comes.
    FailIo,
    /// One that a later kernel added.
    Other(u16),
}

/// For `docs/states.md`: each state of a device, its longest stay, what ends it.
pub const DEVICE_STATES: [[&str; 3]; 5] = [
    ["dead", "at rest", "started or removed; `doctor --repair` removes what a crash left"],
    ["live", "at rest", "stopped, or its server is gone"],
    [
        "quiesced",
        "`worker_gap_max` 5 s, then the supervisor serves it without capture; longer only while a disk still has the dead server's I/O",
        "the next server has recovered it",
    ],
    ["fail I/O", "as quiesced; not asked for by this agent", "the next server has recovered it"],
    ["other", "none: a later kernel's", "that kernel's"],
];
const _: fn(&DeviceState) -> &[&str; 3] = |state| match state {
    DeviceState::Dead => &DEVICE_STATES[0],
    DeviceState::Live => &DEVICE_STATES[1],
    DeviceState::Quiesced => &DEVICE_STATES[2],
    DeviceState::FailIo => &DEVICE_STATES[3],
    DeviceState::Other(_) => &DEVICE_STATES[4],
};

/// A device, as the kernel describes it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo {
    raw: RawInfo,
}

impl DeviceInfo {
    pub(crate) fn new(raw: RawInfo) -> Self {
        Self { raw }
    }

    /// Its number, the N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.raw.dev_id
    }

    /// Hardware queues, each served by a thread.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.raw.queues
    }

    /// Tags of one queue. A device that outlives its server has one more than its configuration says, which stays idle.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.raw.depth
    }

    /// Longest read or write, in bytes.
    #[must_use]
    pub fn request_bytes_max(&self) -> u32 {
        self.raw.request_bytes_max
    }

    /// Where it is in its life.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        match self.raw.state {
            sys::state::DEAD => DeviceState::Dead,
            sys::state::LIVE => DeviceState::Live,
            sys::state::QUIESCED => DeviceState::Quiesced,
            sys::state::FAIL_IO => DeviceState::FailIo,
            other => DeviceState::Other(other),
        }
    }

    /// The process that serves it, or that did last; `None`: it was never started, or it was stopped.
    #[must_use]
    pub fn server_pid(&self) -> Option<i32> {
        Some(self.raw.server_pid).filter(|&pid| pid > 0)
    }

    /// How data gets across.
    #[must_use]
    pub fn data_path(&self) -> DataPath {
        if self.raw.flags & feature::USER_COPY != 0 { DataPath::UserCopy } else { DataPath::BufferSwap }
    }

    /// Requests wait for the next server when this one dies, and those under way come again.
    #[must_use]
    pub fn survives_its_server(&self) -> bool {
        let both = feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE;
        self.raw.flags & both == both
    }

    pub(crate) fn flags(&self) -> u64 {
        self.raw.flags
    }

    /// A leftover: it has no disk, and no process serves it or is about to. To be removed ([`crate::Control::delete`]).
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.state() == DeviceState::Dead && !self.server_pid().is_some_and(is_alive) && !self.is_open()
    }

    /// Whether some process holds `/dev/ublkcN`, of which the kernel allows one.
    fn is_open(&self) -> bool {
        let opened = std::fs::File::options().read(true).write(true).open(self.queue_path());
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }

    /// The block device, `/dev/ublkbN`.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        block_path(self.id())
    }

    /// The queues' device, `/dev/ublkcN`.
    #[must_use]
    pub fn queue_path(&self) -> PathBuf {
        queue_path(self.id())
    }
}

pub(crate) fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

pub(crate) fn queue_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

/// Whether a process with this number exists.
pub(crate) fn is_alive(pid: i32) -> bool {
    use nix::errno::Errno;
    !matches!(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None), Err(Errno::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_is_asked_for_everything_and_a_new_one_for_what_it_has() {
        assert_eq!(Features::UNKNOWN.wanted(feature::USER_COPY), feature::USER_COPY);
        let some = Features::new(feature::USER_RECOVERY);
        assert_eq!(some.wanted(feature::USER_COPY), 0);
        assert_eq!(some.wanted(feature::USER_RECOVERY), feature::USER_RECOVERY);
        assert_eq!(some.names(), ["recovery"]);
        assert!(Features::UNKNOWN.recovery() && !Features::UNKNOWN.user_copy());
    }

    #[test]
    fn recovery_needs_both_flags() {
        let with = |flags| DeviceInfo::new(RawInfo { flags, ..RawInfo::default() });
        assert!(!with(feature::USER_RECOVERY).survives_its_server());
        assert!(with(feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE).survives_its_server());
    }
}
