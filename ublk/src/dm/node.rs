//! Block devices as the system shows them: numbers, nodes, what /sys says.

use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// A block device's number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DevNo {
    /// The driver.
    pub major: u32,
    /// The device among the driver's.
    pub minor: u32,
}

impl DevNo {
    /// The number of the block device at `path`, links followed.
    ///
    /// # Errors
    /// `NotFound`: there is nothing; `Invalid`: it is no block device; `System`.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let name = path.display();
        let meta = std::fs::metadata(path).map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                return Error::new(ErrorKind::NotFound, format!("there is no {name}"));
            }
            Error::system(format!("look at {name}"), error)
        })?;
        if !meta.file_type().is_block_device() {
            return Err(Error::new(ErrorKind::Invalid, format!("{name} is no block device")));
        }
        Ok(Self { major: libc::major(meta.rdev()), minor: libc::minor(meta.rdev()) })
    }

    /// From the kernel's 64-bit form.
    pub(super) fn from_kernel(dev: u64) -> Self {
        let minor = (dev & 0xff) | ((dev >> 12) & 0xfff_ff00);
        let part = |bits: u64| u32::try_from(bits).expect("masked to fewer bits");
        Self { major: part((dev >> 8) & 0xfff), minor: part(minor) }
    }

    /// In the kernel's 64-bit form.
    pub(super) fn to_kernel(self) -> u64 {
        let (major, minor) = (u64::from(self.major), u64::from(self.minor));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }

    /// Its folder in /sys.
    pub(super) fn sysfs(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }

    /// Its node, as the kernel's devtmpfs makes it; `None`: it is gone.
    #[must_use]
    pub fn node(self) -> Option<PathBuf> {
        Some(Path::new("/dev").join(self.kernel_name()?))
    }

    /// Whether it is a device of the device mapper.
    #[must_use]
    pub fn is_mapped(self) -> bool {
        self.sysfs().join("dm").exists()
    }

    pub(super) fn exists(self) -> bool {
        self.sysfs().exists()
    }

    /// A number that /sys shows for it.
    pub(super) fn attribute(self, name: &str) -> Option<u64> {
        std::fs::read_to_string(self.sysfs().join(name)).ok()?.trim().parse().ok()
    }

    /// Its length; `None`: it is gone.
    #[must_use]
    pub fn sectors(self) -> Option<u64> {
        self.attribute("size")
    }

    /// Bytes of its logical blocks. Of a partition: the disk's.
    #[must_use]
    pub fn logical_block(self) -> Option<u64> {
        self.attribute("queue/logical_block_size").or_else(|| self.attribute("../queue/logical_block_size"))
    }

    /// Its name in the kernel, such as `dm-3`; `None`: it is gone.
    pub(super) fn kernel_name(self) -> Option<String> {
        let folder = std::fs::canonicalize(self.sysfs()).ok()?;
        Some(folder.file_name()?.to_str()?.to_owned())
    }

    /// The number of the ublk device, if it is one.
    #[must_use]
    pub fn ublk_id(self) -> Option<u32> {
        self.kernel_name()?.strip_prefix("ublkb")?.parse().ok()
    }
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DevNo {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (major, minor) = text.split_once(':').unwrap_or((text, ""));
        Ok(Self { major: major.parse()?, minor: minor.parse()? })
    }
}

/// The number of the block device that the kernel calls `name`, if it is there.
pub(super) fn by_kernel_name(name: &str) -> Option<DevNo> {
    std::fs::read_to_string(format!("/sys/class/block/{name}/dev")).ok()?.trim().parse().ok()
}

/// The devices on which a device stands, as /sys shows it: the parts of a raid, the disk of a partition.
pub(super) fn slaves(device: DevNo) -> Vec<DevNo> {
    let folder = device.sysfs();
    let entries = std::fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
    let mut found: Vec<DevNo> = entries.filter_map(|entry| by_kernel_name(entry.file_name().to_str()?)).collect();
    if folder.join("partition").exists() {
        let disk = std::fs::read_to_string(folder.join("../dev"));
        found.extend(disk.ok().and_then(|text| text.trim().parse::<DevNo>().ok()));
    }
    found.sort_unstable();
    found
}

/// A moment until the system may have got further: there is no event for it.
pub(super) fn pause() {
    let _ = nix::poll::poll(&mut [], 5u8);
}

/// Whether udev runs: then it makes the links in /dev/mapper.
pub(super) fn has_udev() -> bool {
    Path::new("/run/udev/control").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_the_kernels_form() {
        for (major, minor) in [(253, 0), (253, 255), (253, 256), (259, 1_048_575), (4095, 70_000)] {
            let device = DevNo { major, minor };
            assert_eq!(DevNo::from_kernel(device.to_kernel()), device);
        }
        assert_eq!(DevNo { major: 253, minor: 3 }.to_kernel(), 0xfd03);
        assert_eq!("253:3".parse(), Ok(DevNo { major: 253, minor: 3 }));
        assert!("253".parse::<DevNo>().is_err());
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        let error = DevNo::of(Path::new("/dev/null")).expect_err("a character device");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let error = DevNo::of(Path::new("/dev/there/is/none")).expect_err("no such file");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}
