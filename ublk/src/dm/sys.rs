//! The device mapper's interface, by the facts of the kernel's header `linux/dm-ioctl.h`: numbers, layouts, flags.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

pub(super) const CONTROL_PATH: &str = "/dev/mapper/control";

/// What the kernel is asked to speak: every version 4 takes it.
pub(super) const VERSION: [u32; 3] = [4, 0, 0];

/// Numbers of commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Command {
    Version = 0,
    ListDevices = 2,
    DevCreate = 3,
    DevRemove = 4,
    DevRename = 5,
    /// Suspends with [`flag::SUSPEND`]; without it puts a loaded table in place and resumes.
    DevSuspend = 6,
    DevStatus = 7,
    TableLoad = 9,
    TableClear = 10,
    TableDeps = 11,
    TableStatus = 12,
}

impl Command {
    /// The code of the ioctl.
    #[expect(clippy::cast_possible_truncation, reason = "the size of the header: 312")]
    pub(super) const fn code(self) -> u32 {
        const READ_WRITE: u32 = 3;
        READ_WRITE << 30 | (size_of::<Header>() as u32) << 16 | 0xfd << 8 | self as u32
    }
}

/// Bits of [`Header::flags`].
pub(super) mod flag {
    pub(in super::super) const READ_ONLY: u32 = 1 << 0;
    pub(in super::super) const SUSPEND: u32 = 1 << 1;
    /// Ask for the table itself, not for its state.
    pub(in super::super) const STATUS_TABLE: u32 = 1 << 4;
    pub(in super::super) const ACTIVE_PRESENT: u32 = 1 << 5;
    pub(in super::super) const INACTIVE_PRESENT: u32 = 1 << 6;
    pub(in super::super) const BUFFER_FULL: u32 = 1 << 8;
    pub(in super::super) const SKIP_LOCKFS: u32 = 1 << 10;
    pub(in super::super) const NOFLUSH: u32 = 1 << 11;
    pub(in super::super) const QUERY_INACTIVE: u32 = 1 << 12;
    /// The kernel wipes its copy of what was passed: tables of dm-crypt hold keys.
    pub(in super::super) const SECURE_DATA: u32 = 1 << 15;
}

/// What udev shall do with an event of ours. Travels in the upper half of [`Header::event_nr`] and comes out as `DM_COOKIE`, which
/// the rules of libdevmapper take apart (`dmsetup udevflags`).
pub(super) mod udev {
    const SHIFT: u32 = 16;
    const DISABLE_DM_RULES: u32 = 0x0001;
    const DISABLE_SUBSYSTEM_RULES: u32 = 0x0002;
    const DISABLE_DISK_RULES: u32 = 0x0004;
    const DISABLE_OTHER_RULES: u32 = 0x0008;
    const PRIMARY_SOURCE: u32 = 0x0040;

    /// For devices of users: all rules.
    pub(in super::super) const VISIBLE: u32 = PRIMARY_SOURCE << SHIFT;
    /// For devices of ours: no links, no probing, no other rules.
    pub(in super::super) const HIDDEN: u32 =
        (PRIMARY_SOURCE | DISABLE_DM_RULES | DISABLE_SUBSYSTEM_RULES | DISABLE_DISK_RULES | DISABLE_OTHER_RULES)
            << SHIFT;
    /// No cookie at all: the rules take the event for one that came by itself, and keep what they know of the device.
    pub(in super::super) const UNCHANGED: u32 = 0;
}

/// Longest name and uuid, their terminating zero included.
pub(super) const NAME_LEN: usize = 128;
pub(super) const UUID_LEN: usize = 129;

/// Head of every command and answer.
#[repr(C)]
#[derive(Clone, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Header {
    pub(super) version: [u32; 3],
    /// Of the whole buffer, this included.
    pub(super) data_size: u32,
    /// Where the payload begins, from the buffer's start.
    pub(super) data_start: u32,
    pub(super) target_count: u32,
    pub(super) open_count: i32,
    pub(super) flags: u32,
    /// In: the udev cookie. Out: events so far.
    pub(super) event_nr: u32,
    pub(super) padding: u32,
    pub(super) dev: u64,
    pub(super) name: [u8; NAME_LEN],
    pub(super) uuid: [u8; UUID_LEN],
    pub(super) data: [u8; 7],
}

impl Header {
    pub(super) fn new() -> Self {
        Self { version: VERSION, ..Self::new_zeroed() }
    }
}

/// One target of a table; its parameters follow, zero-terminated.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct TargetSpec {
    pub(super) sector_start: u64,
    pub(super) sectors: u64,
    pub(super) status: i32,
    /// Where the next one begins: in a load from this one's start, in an answer from the payload's.
    pub(super) next: u32,
    pub(super) kind: [u8; 16],
}

/// Head of an entry of the list of devices; its name follows, zero-terminated.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct NameEntry {
    pub(super) dev: u64,
    /// From this one's start; 0: the last.
    pub(super) next: u32,
    /// The first bytes of the name, as far as they fill the struct.
    pub(super) name: [u8; 4],
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Header>() == 312);
    assert!(offset_of!(Header, data_size) == 12 && offset_of!(Header, data_start) == 16);
    assert!(offset_of!(Header, target_count) == 20 && offset_of!(Header, open_count) == 24);
    assert!(offset_of!(Header, flags) == 28 && offset_of!(Header, event_nr) == 32 && offset_of!(Header, dev) == 40);
    assert!(offset_of!(Header, name) == 48 && offset_of!(Header, uuid) == 176 && offset_of!(Header, data) == 305);
    assert!(size_of::<TargetSpec>() == 40);
    assert!(offset_of!(TargetSpec, sectors) == 8 && offset_of!(TargetSpec, status) == 16);
    assert!(offset_of!(TargetSpec, next) == 20 && offset_of!(TargetSpec, kind) == 24);
    assert!(offset_of!(NameEntry, next) == 8 && offset_of!(NameEntry, name) == 12);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes as a C compiler makes them of the header's macros.
    #[test]
    fn codes_are_those_of_the_header() {
        assert_eq!(Command::Version.code(), 0xc138_fd00);
        assert_eq!(Command::DevSuspend.code(), 0xc138_fd06);
        assert_eq!(Command::TableStatus.code(), 0xc138_fd0c);
    }

    #[test]
    fn hidden_devices_have_every_rule_disabled() {
        assert_eq!(udev::HIDDEN, 0x004f_0000);
    }
}
