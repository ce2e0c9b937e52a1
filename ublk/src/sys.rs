//! The kernel's interface, by the facts of its header `linux/ublk_cmd.h`: numbers, layouts, encodings.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) const CONTROL_PATH: &str = "/dev/ublk-control";

/// Numbers of control commands.
pub(crate) mod ctrl {
    pub(crate) const GET_QUEUE_AFFINITY: u8 = 0x01;
    pub(crate) const GET_DEV_INFO: u8 = 0x02;
    pub(crate) const ADD_DEV: u8 = 0x04;
    pub(crate) const DEL_DEV: u8 = 0x05;
    pub(crate) const START_DEV: u8 = 0x06;
    pub(crate) const STOP_DEV: u8 = 0x07;
    pub(crate) const SET_PARAMS: u8 = 0x08;
    pub(crate) const GET_PARAMS: u8 = 0x09;
    pub(crate) const START_USER_RECOVERY: u8 = 0x10;
    pub(crate) const END_USER_RECOVERY: u8 = 0x11;
    pub(crate) const GET_DEV_INFO2: u8 = 0x12;
    pub(crate) const GET_FEATURES: u8 = 0x13;
    pub(crate) const DEL_DEV_ASYNC: u8 = 0x14;
    pub(crate) const UPDATE_SIZE: u8 = 0x15;
    pub(crate) const QUIESCE_DEV: u8 = 0x16;
}

/// Numbers of I/O commands.
pub(crate) mod io {
    pub(crate) const FETCH_REQ: u8 = 0x20;
    pub(crate) const COMMIT_AND_FETCH_REQ: u8 = 0x21;
}

/// Operations of a request, the low byte of [`IoDescriptor::op_flags`].
pub(crate) mod op {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FLUSH: u32 = 2;
    pub(crate) const DISCARD: u32 = 3;
    pub(crate) const WRITE_ZEROES: u32 = 5;
    pub(crate) const MASK: u32 = 0xff;
    pub(crate) const FLAG_FUA: u32 = 1 << 13;
    pub(crate) const FLAG_NO_UNMAP: u32 = 1 << 15;
}

/// Bits of [`RawInfo::flags`] and of the feature word.
pub(crate) mod feature {
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub(crate) const UNPRIVILEGED_DEV: u64 = 1 << 5;
    pub(crate) const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub(crate) const USER_COPY: u64 = 1 << 7;
    pub(crate) const USER_RECOVERY_FAIL_IO: u64 = 1 << 9;
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
    pub(crate) const QUIESCE: u64 = 1 << 12;
}

/// States of a device.
pub(crate) mod state {
    pub(crate) const DEAD: u16 = 0;
    pub(crate) const LIVE: u16 = 1;
    pub(crate) const QUIESCED: u16 = 2;
    pub(crate) const FAIL_IO: u16 = 3;
}

/// Bits of [`ParamsBasic::attrs`].
pub(crate) mod attr {
    pub(crate) const READ_ONLY: u32 = 1 << 0;
    pub(crate) const VOLATILE_CACHE: u32 = 1 << 2;
    pub(crate) const FUA: u32 = 1 << 3;
}

/// Bits of [`Params::types`].
pub(crate) mod param {
    pub(crate) const BASIC: u32 = 1 << 0;
    pub(crate) const DISCARD: u32 = 1 << 1;
}

/// Most requests of one queue.
pub(crate) const QUEUE_DEPTH_MAX: u16 = 4096;

/// Where the data of requests begins in `/dev/ublkcN`, for positioned reads and writes.
const DATA_OFFSET: u64 = 0x8000_0000;
const DATA_TAG_SHIFT: u32 = 25;
const DATA_QUEUE_SHIFT: u32 = DATA_TAG_SHIFT + 16;

/// Longest request: what the bits below the tag address.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << DATA_TAG_SHIFT;

/// Position in `/dev/ublkcN` of the first byte of a request's data.
pub(crate) const fn data_position(qid: u16, tag: u16) -> u64 {
    DATA_OFFSET + ((qid as u64) << DATA_QUEUE_SHIFT) + ((tag as u64) << DATA_TAG_SHIFT)
}

/// The argument of a control command.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct CtrlCommand {
    pub(crate) dev_id: u32,
    /// `u16::MAX` where no queue is meant.
    pub(crate) queue_id: u16,
    pub(crate) len: u16,
    pub(crate) addr: u64,
    pub(crate) data: u64,
    /// Bytes of a path at the head of the buffer, its end included.
    pub(crate) dev_path_len: u16,
    pub(crate) pad: u16,
    pub(crate) reserved: u32,
}

/// What a device is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct RawInfo {
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) state: u16,
    pub(crate) pad0: u16,
    pub(crate) request_bytes_max: u32,
    pub(crate) dev_id: u32,
    pub(crate) server_pid: i32,
    pub(crate) pad1: u32,
    pub(crate) flags: u64,
    pub(crate) server_flags: u64,
    pub(crate) owner_uid: u32,
    pub(crate) owner_gid: u32,
    pub(crate) reserved1: u64,
    pub(crate) reserved2: u64,
}

/// A request, in memory shared with the kernel, by tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct IoDescriptor {
    pub(crate) op_flags: u32,
    pub(crate) sectors: u32,
    pub(crate) start_sector: u64,
    pub(crate) addr: u64,
}

/// The argument of an I/O command.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct IoCommand {
    pub(crate) qid: u16,
    pub(crate) tag: u16,
    pub(crate) result: i32,
    pub(crate) addr: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct ParamsBasic {
    pub(crate) attrs: u32,
    pub(crate) logical_shift: u8,
    pub(crate) physical_shift: u8,
    pub(crate) io_opt_shift: u8,
    pub(crate) io_min_shift: u8,
    pub(crate) max_sectors: u32,
    pub(crate) chunk_sectors: u32,
    pub(crate) sectors: u64,
    pub(crate) virt_boundary_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct ParamsDiscard {
    pub(crate) alignment: u32,
    pub(crate) granularity: u32,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_zeroes_sectors: u32,
    pub(crate) max_segments: u16,
    pub(crate) reserved: u16,
}

/// The first parameters; the kernel's struct goes on (zoned, alignment, segments), and takes any prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct Params {
    pub(crate) len: u32,
    pub(crate) types: u32,
    pub(crate) basic: ParamsBasic,
    pub(crate) discard: ParamsDiscard,
    pub(crate) rest: u32,
}

const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<CtrlCommand>() == 32);
    assert!(offset_of!(CtrlCommand, queue_id) == 4 && offset_of!(CtrlCommand, len) == 6);
    assert!(offset_of!(CtrlCommand, addr) == 8 && offset_of!(CtrlCommand, data) == 16);
    assert!(offset_of!(CtrlCommand, dev_path_len) == 24);
    assert!(size_of::<RawInfo>() == 64);
    assert!(offset_of!(RawInfo, state) == 4 && offset_of!(RawInfo, request_bytes_max) == 8);
    assert!(offset_of!(RawInfo, dev_id) == 12 && offset_of!(RawInfo, server_pid) == 16);
    assert!(offset_of!(RawInfo, flags) == 24 && offset_of!(RawInfo, owner_uid) == 40);
    assert!(size_of::<IoDescriptor>() == 24 && align_of::<IoDescriptor>() == 8);
    assert!(offset_of!(IoDescriptor, sectors) == 4 && offset_of!(IoDescriptor, start_sector) == 8);
    assert!(size_of::<IoCommand>() == 16);
    assert!(offset_of!(IoCommand, tag) == 2 && offset_of!(IoCommand, result) == 4 && offset_of!(IoCommand, addr) == 8);
    assert!(size_of::<ParamsBasic>() == 32 && offset_of!(ParamsBasic, sectors) == 16);
    assert!(offset_of!(ParamsBasic, logical_shift) == 4 && offset_of!(ParamsBasic, max_sectors) == 8);
    assert!(size_of::<ParamsDiscard>() == 20 && offset_of!(ParamsDiscard, max_segments) == 16);
    assert!(offset_of!(Params, basic) == 8 && offset_of!(Params, discard) == 40 && size_of::<Params>() == 64);
};

/// How the codes of commands are formed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Encoding {
    /// As ioctl numbers: from Linux 6.4 on, and the only way where the kernel was built without the old codes.
    Ioctl,
    /// The bare number: the only way before 6.4.
    Bare,
}

const DIRECTION_WRITE: u32 = 1;
const DIRECTION_READ: u32 = 2;

impl Encoding {
    /// Code of a control command.
    pub(crate) const fn control(self, number: u8) -> u32 {
        match self {
            Self::Bare => number as u32,
            Self::Ioctl => {
                let direction = match number {
                    ctrl::GET_QUEUE_AFFINITY
                    | ctrl::GET_DEV_INFO
                    | ctrl::GET_PARAMS
                    | ctrl::GET_DEV_INFO2
                    | ctrl::GET_FEATURES
                    | ctrl::DEL_DEV_ASYNC => DIRECTION_READ,
                    _ => DIRECTION_READ | DIRECTION_WRITE,
                };
                ioctl(direction, number, size_of::<CtrlCommand>())
            }
        }
    }

    /// Code of an I/O command.
    pub(crate) const fn io(self, number: u8) -> u32 {
        match self {
            Self::Bare => number as u32,
            Self::Ioctl => ioctl(DIRECTION_READ | DIRECTION_WRITE, number, size_of::<IoCommand>()),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of the two argument structs: 32 and 16")]
const fn ioctl(direction: u32, number: u8, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes as a C compiler makes them of the header's macros.
    #[test]
    fn codes_are_those_of_the_header() {
        let control = |number| Encoding::Ioctl.control(number);
        assert_eq!(control(ctrl::GET_DEV_INFO2), 0x8020_7512);
        assert_eq!(control(ctrl::ADD_DEV), 0xc020_7504);
        assert_eq!(control(ctrl::DEL_DEV_ASYNC), 0x8020_7514);
        assert_eq!(control(ctrl::QUIESCE_DEV), 0xc020_7516);
        assert_eq!(Encoding::Ioctl.io(io::FETCH_REQ), 0xc010_7520);
        assert_eq!(Encoding::Bare.control(ctrl::ADD_DEV), 4);
        assert_eq!(Encoding::Bare.io(io::COMMIT_AND_FETCH_REQ), 0x21);
    }

    #[test]
    fn data_of_two_requests_never_overlaps() {
        assert_eq!(data_position(0, 0), 0x8000_0000);
        assert_eq!(data_position(0, 1) - data_position(0, 0), u64::from(REQUEST_BYTES_MAX));
        assert_eq!(data_position(1, 0) - data_position(0, u16::MAX), u64::from(REQUEST_BYTES_MAX));
        assert!(i64::try_from(data_position(4095, u16::MAX)).is_ok(), "a file position");
    }
}
