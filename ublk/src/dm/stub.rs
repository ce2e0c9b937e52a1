//! Linear stubs: a device-mapper device over all of a bare disk or partition, for users to mount instead of it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::attach::Interposer;
use super::lower;
use super::node::{self, DevNo};
use super::sys::udev;
use super::table::Table;
use crate::control::now;
use crate::error::{Error, ErrorKind};

/// Begins the uuid of every stub.
const UUID_PREFIX: &str = "FARSHORE-stub-";

const FOLDER: &str = "/dev/mapper";

/// Longest wait for udev to make a link. Then we do.
const LINK_MAX: Duration = Duration::from_secs(3);

/// A linear device-mapper device over a whole disk or partition: sector for sector the same.
///
/// Made once, while the disk is not in use; from then on users mount the stub, and [`Interposer::attach`] works on it live. The
/// device mapper forgets it at shutdown, so it is to be made again at boot before the file system is mounted.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Stub {
    /// What to mount.
    pub path: PathBuf,
    /// Its number.
    pub device: DevNo,
}

impl Interposer {
    /// Makes the stub `name` over `disk`, or finds the one that was made.
    ///
    /// # Errors
    /// `Busy`: the disk is in use (mounted, swap, part of a raid or of a volume group), or has partitions; `Invalid`: it is a
    /// device-mapper device, which needs no stub, or the name is not possible or another's; `System`. No device is left then.
    pub fn make_stub(&self, disk: &Path, name: &str) -> Result<Stub, Error> {
        let _turn = self.turn()?;
        check_name(name)?;
        let below = DevNo::of(disk)?;
        let shown = disk.display();
        if below.is_mapped() {
            let what = format!("{shown} is a device-mapper device already: attach to it, it needs no stub");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        if let Ok(status) = self.mapper.status_of_name(name) {
            let over = self.mapper.dependencies(status.device).unwrap_or_default();
            // While it is attached it stands on our server.
            if status.uuid == format!("{UUID_PREFIX}{name}") && (over == [below] || self.is_attached(status.device)?) {
                return self.shown(name, status.device);
            }
            return Err(Error::new(ErrorKind::Invalid, format!("another device-mapper device is called {name}")));
        }
        if has_partitions(below) {
            let what = format!("{shown} has partitions: make stubs over those that are to be protected");
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let sectors = below.sectors().filter(|&sectors| sectors > 0);
        let sectors = sectors.ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{shown} has no sectors")))?;
        let made = self.mapper.create(name, &format!("{UUID_PREFIX}{name}"));
        let device = made.map_err(|error| Error::system(format!("make the device-mapper device {name}"), error))?;
        let loaded = self.mapper.load(device, &Table::linear(below, sectors));
        if let Err(error) = loaded.and_then(|()| self.mapper.resume(device, udev::VISIBLE)) {
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            let failed = if busy {
                let what =
                    format!("{shown} is in use: unmount it, end swap on it, take it out of raids and volume groups");
                Error::new(ErrorKind::Busy, what).because(error)
            } else {
                Error::system(format!("make the stub {name} over {shown}"), error)
            };
            return match lower::remove(&self.mapper, device) {
                Ok(()) => Err(failed),
                Err(left) => Err(Error::system(format!("{failed} (and {name} is left behind)"), left)),
            };
        }
        tracing::info!(%device, disk = %below, name, "stub made");
        self.shown(name, device)
    }

    /// Lets a stub have the length that its disk has grown to. If it is attached, this bypasses our device, as `lvextend` does: see
    /// [`Self::reattach`].
    ///
    /// # Errors
    /// `Invalid`: it is no stub, or its disk has shrunk; `System`.
    pub fn grow_stub(&self, name: &str) -> Result<u64, Error> {
        let _turn = self.turn()?;
        let device = self.stub(name)?;
        let attached = self.list()?.into_iter().find(|attached| attached.upper == device);
        let table = self.table(attached.map_or(device, |attached| attached.lower))?;
        let sectors = table.passes_to().and_then(|disk| Some((disk, disk.sectors()?)));
        let lost = || Error::new(ErrorKind::Invalid, format!("the disk of the stub {name} is gone"));
        let (disk, sectors) = sectors.ok_or_else(lost)?;
        if sectors < table.sectors() {
            let what = format!("the disk of the stub {name} has shrunk from {} to {sectors} sectors", table.sectors());
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        if sectors > table.sectors() {
            let grown = self.replace(device, &Table::linear(disk, sectors));
            grown.map_err(|error| {
                let settled = self.settle(device);
                Error::system(format!("grow the stub {name} ({settled:?})"), error)
            })?;
        }
        Ok(sectors)
    }

    /// Removes a stub; the disk stays as it is.
    ///
    /// # Errors
    /// `Busy`: it is in use, or attached; `Invalid`: it is no stub; `System`.
    pub fn remove_stub(&self, name: &str) -> Result<(), Error> {
        let _turn = self.turn()?;
        let device = self.stub(name)?;
        if self.is_attached(device)? {
            return Err(Error::new(ErrorKind::Busy, format!("the stub {name} is attached: detach it first")));
        }
        self.mapper.remove(device, udev::VISIBLE).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => {
                Error::new(ErrorKind::Busy, format!("the stub {name} is in use: unmount it")).because(error)
            }
            _ => Error::system(format!("remove the stub {name}"), error),
        })?;
        let link = Path::new(FOLDER).join(name);
        if !node::has_udev() && link.is_symlink() {
            std::fs::remove_file(&link).map_err(|error| Error::system(format!("remove {}", link.display()), error))?;
        }
        Ok(())
    }

    fn stub(&self, name: &str) -> Result<DevNo, Error> {
        let status = self.mapper.status_of_name(name).ok().filter(|status| status.uuid.starts_with(UUID_PREFIX));
        status.map(|status| status.device).ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{name} is no stub")))
    }

    fn is_attached(&self, device: DevNo) -> Result<bool, Error> {
        Ok(self.list()?.iter().any(|attached| attached.upper == device))
    }

    fn shown(&self, name: &str, device: DevNo) -> Result<Stub, Error> {
        let path = Path::new(FOLDER).join(name);
        link(&path, device).map_err(|error| Error::system(format!("make {}", path.display()), error))?;
        Ok(Stub { path, device })
    }
}

/// Makes sure that `path` is there: udev's work, ours where there is none.
fn link(path: &Path, device: DevNo) -> io::Result<()> {
    let deadline = now() + LINK_MAX;
    while node::has_udev() && !path.exists() && now() < deadline {
        node::pause();
    }
    if DevNo::of(path).is_ok_and(|there| there == device) {
        return Ok(());
    }
    let kernel_name = device.kernel_name().ok_or(io::ErrorKind::NotFound)?;
    if path.is_symlink() {
        std::fs::remove_file(path)?;
    }
    std::os::unix::fs::symlink(format!("../{kernel_name}"), path)
}

/// Whether it can be a name in the device mapper and in /dev without escapes.
fn check_name(name: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    if (1..=64).contains(&name.len()) && name.chars().all(good) && !name.starts_with(['.', '-']) && name != "control" {
        return Ok(());
    }
    let what = format!("`{name}` cannot be the name of a stub: 1 to 64 letters, digits, `-`, `_`, `.`, `+`");
    Err(Error::new(ErrorKind::Invalid, what))
}

fn has_partitions(disk: DevNo) -> bool {
    let entries = std::fs::read_dir(disk.sysfs()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join("partition")).any(|file| file.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_escaped_are_refused() {
        for good in ["data", "pg-data_1", "a+b.c"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "control", "../x", "a/b", "a b", ".hidden", "-x", &"x".repeat(65)] {
            let error = check_name(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
