//! Lowers: how they are called, made, found and removed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::mapper::{Mapper, Status};
use super::node::{self, DevNo};
use super::serve::Lower;
use super::sys::udev;
use super::table::Table;
use crate::control::now;

/// Begins the uuid of every lower: known to no rule of udev and to no tool, and not LVM's.
const UUID_PREFIX: &str = "FARSHORE-lower-";

/// Begins the name of every lower.
const NAME_PREFIX: &str = "farshore-";

/// Longest identity of an upper in a uuid of ours; a longer one is shortened to its hash. LVM's have 68 bytes.
const IDENTITY_MAX: usize = 96;

/// The ublk device of an upper has the upper's minor number and this, out of the way of numbers that the driver gives out.
const UBLK_ID_BASE: u32 = 1000;

/// Longest wait until a lower that nobody needs any more is closed: its server's ring lets go of it a moment after the server
/// has ended, and udev may look at it.
const CLOSED_MAX: Duration = Duration::from_secs(5);

/// A lower that is there.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) status: Status,
    /// Minor number of the upper.
    upper_minor: u32,
    /// The upper's uuid, or what stands for it.
    identity: String,
    /// Name of the device over it, as far as it was recorded.
    pub(super) through_name: String,
}

impl Known {
    /// The number that its upper has or had.
    pub(super) fn upper(&self) -> DevNo {
        DevNo { major: self.status.device.major, minor: self.upper_minor }
    }

    /// Whether `upper` is the device of which this has the table, not a later one with its number.
    pub(super) fn belongs_to(&self, upper: &Status) -> bool {
        upper.device == self.upper() && identity(upper) == self.identity
    }

    pub(super) fn of(status: Status) -> Option<Self> {
        let (minor, identity) = status.uuid.strip_prefix(UUID_PREFIX)?.split_once('-')?;
        let (upper_minor, identity) = (minor.parse().ok()?, identity.to_owned());
        let through_name = status.name.strip_prefix(NAME_PREFIX).and_then(|rest| rest.split_once('-'));
        let through_name = through_name.map(|(_, name)| name.to_owned()).unwrap_or_default();
        Some(Self { status, upper_minor, identity, through_name })
    }
}

/// Whether a device is one of ours that nobody but its server should touch.
pub(super) fn is_lower(status: &Status) -> bool {
    status.uuid.starts_with(UUID_PREFIX)
}

/// What tells an upper from a later device with its number. A device without uuid can be renamed, so it has none.
fn identity(upper: &Status) -> String {
    if upper.uuid.len() <= IDENTITY_MAX {
        return upper.uuid.clone();
    }
    // FNV-1a, 64 bits.
    let hash = upper
        .uuid
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h: u64, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("hash-{hash:016x}")
}

/// The name of an upper's lower over which `through` stands.
fn name(upper: DevNo, through: &str) -> String {
    format!("{NAME_PREFIX}{}-{through}", upper.minor)
}

/// The number that the ublk device of an upper should have.
fn ublk_id(upper: DevNo) -> u32 {
    UBLK_ID_BASE + upper.minor
}

/// All lowers, by number.
pub(super) fn all(mapper: &Mapper) -> io::Result<Vec<Known>> {
    // One that goes away meanwhile is not there.
    Ok(mapper.list()?.into_iter().filter_map(|device| Known::of(mapper.status(device).ok()?)).collect())
}

/// Makes the lower of `upper`, without a table.
pub(super) fn create(mapper: &Mapper, upper: &Status) -> io::Result<DevNo> {
    let uuid = format!("{UUID_PREFIX}{}-{}", upper.device.minor, identity(upper));
    mapper.create(&name(upper.device, &format!("ublkb{}", ublk_id(upper.device))), &uuid)
}

/// What a server is told about the lower `device` of `upper`.
pub(super) fn describe(device: DevNo, upper: DevNo, table: &Table) -> io::Result<Lower> {
    let kernel_name = device.kernel_name().ok_or(io::ErrorKind::NotFound)?;
    // Made by the kernel's devtmpfs; udev makes no other for it.
    let path = PathBuf::from(format!("/dev/{kernel_name}"));
    Ok(Lower { path, device, sectors: table.sectors(), ublk_id: ublk_id(upper) })
}

/// Records which device stands over a lower, where it is not the one that was proposed.
pub(super) fn record(mapper: &Mapper, lower: DevNo, upper: DevNo, through: DevNo) -> io::Result<()> {
    let wanted = name(upper, &through.kernel_name().ok_or(io::ErrorKind::NotFound)?);
    let status = mapper.status(lower)?;
    if status.name == wanted { Ok(()) } else { mapper.rename(&status.name, &wanted) }
}

/// Removes a lower, when the last user has closed it.
pub(super) fn remove(mapper: &Mapper, lower: DevNo) -> io::Result<()> {
    let deadline = now() + CLOSED_MAX;
    loop {
        match mapper.remove(lower, udev::HIDDEN) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && now() < deadline => node::pause(),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_identities_fit_and_differ() {
        let upper = |uuid: String| Status::for_test(DevNo { major: 253, minor: 4 }, "vg-lv", &uuid);
        let lvm = format!("LVM-{}", "a".repeat(64));
        assert_eq!(identity(&upper(lvm.clone())), lvm);
        let (long, other) = ("x".repeat(128), format!("{}y", "x".repeat(127)));
        assert!(identity(&upper(long.clone())) != identity(&upper(other)));
        assert!(UUID_PREFIX.len() + 11 + identity(&upper(long)).len() < super::super::sys::UUID_LEN);
    }

    #[test]
    fn a_lower_says_whose_it_is() {
        let upper = Status::for_test(DevNo { major: 253, minor: 4 }, "vg-lv", "LVM-abc-real");
        let status =
            Status::for_test(DevNo { major: 253, minor: 9 }, "farshore-4-ublkb1004", "FARSHORE-lower-4-LVM-abc-real");
        let known = Known::of(status.clone()).expect("a lower");
        assert!(is_lower(&status) && known.belongs_to(&upper));
        assert_eq!((known.upper(), known.through_name.as_str()), (upper.device, "ublkb1004"));
        let later = Status::for_test(upper.device, "vg-lv", "LVM-other");
        assert!(!known.belongs_to(&later));
        assert!(Known::of(upper).is_none());
    }
}
