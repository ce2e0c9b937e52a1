//! A descriptor of the kernel as a request of the device.

use farshore_uring::{Errno, Geometry};

use crate::sys::{IoDescriptor, op};

const SECTOR: u64 = 512;

/// What a descriptor asks for, checked against the device's shape. In bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Asked {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32, fua: bool },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, fua: bool, no_hole: bool },
}

/// Reads `iod`. `request_bytes` is the longest read or write.
///
/// # Errors
/// The guest's error number. The kernel keeps within what it was told, so none of these is ever seen; but a length from
/// shared memory decides how far a buffer is filled.
pub(crate) fn parse(iod: &IoDescriptor, geometry: &Geometry, request_bytes: u32) -> Result<Asked, Errno> {
    let kind = iod.op_flags & op::MASK;
    if kind == op::FLUSH {
        return Ok(Asked::Flush);
    }
    let fua = iod.op_flags & op::FLAG_FUA != 0;
    let no_hole = iod.op_flags & op::FLAG_NO_UNMAP != 0;
    let offset = iod.start_sector.checked_mul(SECTOR).ok_or(Errno(libc::EINVAL))?;
    let len = u64::from(iod.sectors) * SECTOR;
    let end = offset.checked_add(len).ok_or(Errno(libc::EINVAL))?;
    let block = u64::from(geometry.logical_block);
    if len == 0 || !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Err(Errno(libc::EINVAL));
    }
    if end > geometry.size {
        return Err(Errno(libc::EIO));
    }
    if kind != op::READ && geometry.read_only {
        return Err(Errno(libc::EROFS));
    }
    let data_len = || u32::try_from(len).ok().filter(|&len| len <= request_bytes).ok_or(Errno(libc::EINVAL));
    let within_range = || if len <= u64::from(geometry.max_discard) { Ok(len) } else { Err(Errno(libc::EINVAL)) };
    match kind {
        op::READ => Ok(Asked::Read { offset, len: data_len()? }),
        op::WRITE => Ok(Asked::Write { offset, len: data_len()?, fua }),
        op::DISCARD if geometry.discard => Ok(Asked::Discard { offset, len: within_range()? }),
        op::WRITE_ZEROES => Ok(Asked::WriteZeroes { offset, len: within_range()?, fua, no_hole }),
        _ => Err(Errno(libc::EOPNOTSUPP)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        size: 1 << 20,
        logical_block: 4096,
        optimal_block: 4096,
        max_request: 64 << 10,
        max_discard: 128 << 10,
        read_only: false,
        discard: true,
    };

    fn check(op_flags: u32, start_sector: u64, sectors: u32) -> Result<Asked, Errno> {
        parse(&IoDescriptor { op_flags, sectors, start_sector, addr: 0 }, &GEOMETRY, 64 << 10)
    }

    #[test]
    fn operations_and_flags_are_those_of_the_block_layer() {
        assert_eq!(check(op::READ, 8, 16), Ok(Asked::Read { offset: 4096, len: 8192 }));
        assert_eq!(check(op::WRITE, 0, 8), Ok(Asked::Write { offset: 0, len: 4096, fua: false }));
        assert_eq!(check(op::WRITE | op::FLAG_FUA, 0, 8), Ok(Asked::Write { offset: 0, len: 4096, fua: true }));
        assert_eq!(check(op::FLUSH, u64::MAX, 0), Ok(Asked::Flush), "a flush has no range");
        assert_eq!(check(op::DISCARD, 8, 8), Ok(Asked::Discard { offset: 4096, len: 4096 }));
        let zeroes = |fua, no_hole| Ok(Asked::WriteZeroes { offset: 0, len: 4096, fua, no_hole });
        assert_eq!(check(op::WRITE_ZEROES, 0, 8), zeroes(false, false));
        assert_eq!(check(op::WRITE_ZEROES | op::FLAG_NO_UNMAP, 0, 8), zeroes(false, true));
        assert_eq!(check(op::WRITE_ZEROES | op::FLAG_FUA, 0, 8), zeroes(true, false));
    }

    #[test]
    fn nothing_outside_of_the_device_or_a_buffer_gets_through() {
        assert_eq!(check(op::READ, 2040, 16), Err(Errno(libc::EIO)), "past the end");
        assert_eq!(check(op::READ, u64::MAX / 512, 16), Err(Errno(libc::EINVAL)), "past all numbers");
        assert_eq!(check(op::WRITE, 0, 136), Err(Errno(libc::EINVAL)), "longer than a buffer");
        assert_eq!(check(op::DISCARD, 0, 264), Err(Errno(libc::EINVAL)), "longer than allowed");
        assert_eq!(check(op::READ, 1, 8), Err(Errno(libc::EINVAL)), "between blocks");
        assert_eq!(check(op::WRITE, 0, 0), Err(Errno(libc::EINVAL)), "nothing");
        assert_eq!(check(13, 0, 8), Err(Errno(libc::EOPNOTSUPP)), "a zone append");
        let frozen = Geometry { read_only: true, ..GEOMETRY };
        let write = IoDescriptor { op_flags: op::WRITE, sectors: 8, start_sector: 0, addr: 0 };
        assert_eq!(parse(&write, &frozen, 64 << 10), Err(Errno(libc::EROFS)));
        let plain = Geometry { discard: false, ..GEOMETRY };
        let discard = IoDescriptor { op_flags: op::DISCARD, ..write };
        assert_eq!(parse(&discard, &plain, 64 << 10), Err(Errno(libc::EOPNOTSUPP)));
    }
}
