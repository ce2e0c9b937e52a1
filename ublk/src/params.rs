//! A geometry as the kernel's parameters.

use farshore_uring::Geometry;

use crate::error::{Error, ErrorKind};
use crate::sys::{Params, ParamsBasic, ParamsDiscard, REQUEST_BYTES_MAX, attr, param};

const SECTOR: u32 = 512;
const PAGE: u32 = 4096;

/// Bytes of the longest read or write that the kernel is told.
pub(crate) fn request_bytes(geometry: &Geometry, limit: u32) -> u32 {
    let bytes = geometry.max_request.min(limit).min(REQUEST_BYTES_MAX);
    bytes / PAGE * PAGE
}

/// What the kernel has to be told about a device of this shape.
///
/// A writable device always has a volatile cache and FUA: otherwise the block layer would keep flushes to itself.
///
/// # Errors
/// `Invalid`, with the figure that no kernel takes.
pub(crate) fn of_geometry(geometry: &Geometry, request_bytes: u32) -> Result<Params, Error> {
    let Geometry { size, logical_block, optimal_block, .. } = *geometry;
    let invalid = |what: String| Err(Error::new(ErrorKind::Invalid, format!("no ublk device can have {what}")));
    if logical_block != SECTOR && logical_block != PAGE {
        return invalid(format!("blocks of {logical_block} bytes: 512 or 4096"));
    }
    if size == 0 || !size.is_multiple_of(u64::from(logical_block)) {
        return invalid(format!("{size} bytes: a positive multiple of the logical block, {logical_block}"));
    }
    if request_bytes < PAGE {
        return invalid(format!("requests of at most {request_bytes} bytes: at least {PAGE}"));
    }
    if !optimal_block.is_power_of_two() {
        return invalid(format!("an optimal block of {optimal_block} bytes: a power of two"));
    }
    // The preferred unit is what the medium rewrites as one, up to a page; beyond it is a wish about lengths.
    let physical = optimal_block.clamp(logical_block, PAGE);
    let read_only = if geometry.read_only { attr::READ_ONLY } else { 0 };
    let basic = ParamsBasic {
        attrs: read_only | attr::VOLATILE_CACHE | attr::FUA,
        logical_shift: shift(logical_block),
        physical_shift: shift(physical),
        io_opt_shift: shift(optimal_block.max(physical)),
        io_min_shift: shift(physical),
        max_sectors: request_bytes / SECTOR,
        chunk_sectors: 0,
        sectors: size / u64::from(SECTOR),
        virt_boundary_mask: 0,
    };
    let most = geometry.max_discard / PAGE * PAGE / SECTOR;
    let writable = !geometry.read_only;
    let discard = ParamsDiscard {
        alignment: 0,
        granularity: physical,
        max_discard_sectors: if writable && geometry.discard { most } else { 0 },
        max_zeroes_sectors: if writable { most } else { 0 },
        max_segments: 1,
        reserved: 0,
    };
    #[expect(clippy::cast_possible_truncation, reason = "64 bytes")]
    let len = size_of::<Params>() as u32;
    Ok(Params { len, types: param::BASIC | param::DISCARD, basic, discard, rest: 0 })
}

fn shift(bytes: u32) -> u8 {
    u8::try_from(bytes.trailing_zeros()).expect("at most 32")
}

/// Whether a device that the kernel has with `params` can be served by a back end of this shape.
///
/// # Errors
/// `Invalid`: what differs. A larger back end is fine: the device keeps its size.
pub(crate) fn check_same(id: u32, params: &Params, geometry: &Geometry) -> Result<(), Error> {
    let differs =
        |what: String| Err(Error::new(ErrorKind::Invalid, format!("/dev/ublkb{id} is not this device: {what}")));
    let basic = &params.basic;
    let (size, block) = (basic.sectors * u64::from(SECTOR), 1u32 << basic.logical_shift.min(31));
    if size > geometry.size {
        return differs(format!("it has {size} bytes, the back end only {}", geometry.size));
    }
    if block != geometry.logical_block {
        return differs(format!("it has blocks of {block} bytes, the back end {}", geometry.logical_block));
    }
    if u64::from(basic.max_sectors) * u64::from(SECTOR) > u64::from(geometry.max_request) {
        let most = geometry.max_request;
        return differs(format!("it takes requests of {} sectors, the back end {most} bytes", basic.max_sectors));
    }
    let longest = params.discard.max_discard_sectors.max(params.discard.max_zeroes_sectors);
    if params.types & param::DISCARD != 0 && u64::from(longest) * u64::from(SECTOR) > u64::from(geometry.max_discard) {
        let most = geometry.max_discard;
        return differs(format!("it takes discards of {longest} sectors, the back end {most} bytes"));
    }
    if basic.attrs & attr::READ_ONLY == 0 && geometry.read_only {
        return differs("it is writable, the back end is read-only".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        size: 1 << 30,
        logical_block: 512,
        optimal_block: 4096,
        max_request: 1 << 20,
        max_discard: 1 << 30,
        read_only: false,
        discard: true,
    };

    #[test]
    fn limits_come_from_the_geometry() {
        let bytes = request_bytes(&GEOMETRY, 256 << 10);
        assert_eq!(bytes, 256 << 10);
        assert_eq!(request_bytes(&Geometry { max_request: 70_000, ..GEOMETRY }, 256 << 10), 69_632, "whole pages");
        let params = of_geometry(&GEOMETRY, bytes).expect("valid");
        assert_eq!((params.basic.logical_shift, params.basic.physical_shift, params.basic.io_opt_shift), (9, 12, 12));
        assert_eq!((params.basic.max_sectors, params.basic.sectors), (512, 1 << 21));
        assert_eq!(params.basic.attrs, attr::VOLATILE_CACHE | attr::FUA);
        assert_eq!((params.discard.max_discard_sectors, params.discard.max_zeroes_sectors), (1 << 21, 1 << 21));

        let streaming = Geometry { logical_block: 4096, optimal_block: 1 << 20, discard: false, ..GEOMETRY };
        let params = of_geometry(&streaming, bytes).expect("valid");
        assert_eq!((params.basic.logical_shift, params.basic.physical_shift, params.basic.io_opt_shift), (12, 12, 20));
        assert_eq!((params.discard.max_discard_sectors, params.discard.max_zeroes_sectors), (0, 1 << 21));

        let frozen = of_geometry(&Geometry { read_only: true, ..GEOMETRY }, bytes).expect("valid");
        assert_eq!(frozen.basic.attrs & attr::READ_ONLY, attr::READ_ONLY);
        assert_eq!((frozen.discard.max_discard_sectors, frozen.discard.max_zeroes_sectors), (0, 0));
    }

    #[test]
    fn what_no_kernel_takes_is_refused_by_name() {
        let refused = |geometry: Geometry, bytes| of_geometry(&geometry, bytes).expect_err("refused").to_string();
        assert!(refused(Geometry { logical_block: 1024, ..GEOMETRY }, 4096).contains("1024"));
        assert!(refused(Geometry { size: 0, ..GEOMETRY }, 4096).contains("0 bytes"));
        assert!(refused(Geometry { size: 1025, ..GEOMETRY }, 4096).contains("1025"));
        assert!(refused(GEOMETRY, 512).contains("512"));
        assert!(refused(Geometry { optimal_block: 3000, ..GEOMETRY }, 4096).contains("3000"));
    }

    #[test]
    fn another_back_end_is_not_taken_for_the_device() {
        let params = of_geometry(&GEOMETRY, 256 << 10).expect("valid");
        check_same(3, &params, &GEOMETRY).expect("the same");
        check_same(3, &params, &Geometry { size: 2 << 30, ..GEOMETRY }).expect("a larger one");
        let refused = |geometry| check_same(3, &params, &geometry).expect_err("refused").to_string();
        assert!(refused(Geometry { size: 1 << 29, ..GEOMETRY }).contains("/dev/ublkb3"));
        assert!(refused(Geometry { logical_block: 4096, ..GEOMETRY }).contains("4096"));
        assert!(refused(Geometry { max_request: 64 << 10, ..GEOMETRY }).contains("65536"));
        assert!(refused(Geometry { max_discard: 1 << 20, ..GEOMETRY }).contains("discards"));
        assert!(refused(Geometry { read_only: true, ..GEOMETRY }).contains("read-only"));
    }
}
