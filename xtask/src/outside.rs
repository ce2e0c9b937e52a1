//! Programs from outside: which a suite needs, which Debian package has each, and how they get installed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// A program and the Debian packages that may hold it, the preferred one first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) packages: &'static [&'static str],
}

macro_rules! program {
    ($constant:ident, $name:literal, $($package:literal),+) => {
        pub(crate) const $constant: Program = Program { name: $name, packages: &[$($package),+] };
    };
}

program!(GIT, "git", "git");
program!(FIO, "fio", "fio");
program!(NBDKIT, "nbdkit", "nbdkit");
program!(NBDINFO, "nbdinfo", "libnbd-bin");
program!(NBDCOPY, "nbdcopy", "libnbd-bin");
// Debian 12 has nbdfuse in libnbd-bin, later releases in a package of its own.
program!(NBDFUSE, "nbdfuse", "nbdfuse", "libnbd-bin");
program!(FUSERMOUNT, "fusermount3", "fuse3");
program!(QEMU_IMG, "qemu-img", "qemu-utils");
program!(QEMU_IO, "qemu-io", "qemu-utils");
program!(INITDB, "initdb", "postgresql");
program!(PGBENCH, "pgbench", "postgresql", "postgresql-contrib");
program!(MKFS_EXT4, "mkfs.ext4", "e2fsprogs");
program!(E2FSCK, "e2fsck", "e2fsprogs");
program!(MKFS_XFS, "mkfs.xfs", "xfsprogs");
program!(HDPARM, "hdparm", "hdparm");
program!(SFDISK, "sfdisk", "fdisk");
program!(IP, "ip", "iproute2");
program!(QEMU_X86, "qemu-system-x86_64", "qemu-system-x86");
program!(BUSYBOX, "busybox", "busybox-static");
program!(MODPROBE, "modprobe", "kmod");
program!(CPIO, "cpio", "cpio");
program!(XZ, "xz", "xz-utils");
program!(BLKDISCARD, "blkdiscard", "util-linux");
program!(DMSETUP, "dmsetup", "dmsetup");
program!(LVM, "lvm", "lvm2");
program!(UDEVADM, "udevadm", "udev");
program!(SYSTEMD_ANALYZE, "systemd-analyze", "systemd");
program!(MKFS_BTRFS, "mkfs.btrfs", "btrfs-progs");
program!(FSFREEZE, "fsfreeze", "util-linux");
program!(DRBDADM, "drbdadm", "drbd-utils");

impl Program {
    /// Where the program is, looked for on `PATH` and where Debian keeps what only root or PostgreSQL uses.
    pub(crate) fn find(&self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        let postgres = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        std::env::split_paths(&path)
            .chain(extra)
            .chain(postgres.map(|version| version.path().join("bin")))
            .map(|folder| folder.join(self.name))
            .find(|file| is_executable(file))
    }
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Makes all of `needs` available. What is there already, in whatever version, stays as it is.
///
/// # Errors
/// Names the programs and packages that are missing and could not be installed.
pub(crate) fn provide(needs: impl Iterator<Item = Program>) -> Result<()> {
    let missing: BTreeSet<Program> = needs.filter(|p| p.find().is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !may_install() {
        bail!("not found: {}", describe(&missing));
    }
    // Package lists of a fresh machine are empty or stale; nothing is fetched where nothing is missing.
    apt(&["update"])?;
    let packages: BTreeSet<&str> =
        missing.iter().filter_map(|p| p.packages.iter().find(|n| exists(n)).copied()).collect();
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(&packages);
    apt(&args)?;
    let still: BTreeSet<Program> = missing.into_iter().filter(|p| p.find().is_none()).collect();
    if !still.is_empty() {
        bail!("still not found after apt-get install {}: {}", Vec::from_iter(packages).join(" "), describe(&still));
    }
    Ok(())
}

fn describe(programs: &BTreeSet<Program>) -> String {
    let list: Vec<_> = programs.iter().map(|p| format!("{} (Debian: {})", p.name, p.packages.join(" or "))).collect();
    list.join(", ")
}

/// Whether missing packages can be installed here: root, on Debian.
pub(crate) fn may_install() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    root && Path::new("/etc/debian_version").exists() && Program { name: "apt-get", packages: &[] }.find().is_some()
}

fn exists(package: &str) -> bool {
    process::output(Command::new("apt-cache").args(["show", "--no-all-versions", package])).is_ok_and(|o| !o.is_empty())
}

/// Runs `apt-get`.
pub(crate) fn apt(args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").args(args).env("DEBIAN_FRONTEND", "noninteractive");
    let status = process::stream(&mut command, |_| {}).context("run apt-get")?;
    if !status.success() {
        bail!("{} failed", process::show(&command));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_needs_no_package_and_what_is_not_is_not_found() {
        let sh = Program { name: "sh", packages: &["no-such-package"] };
        assert!(sh.find().is_some());
        provide([sh].into_iter()).expect("nothing to install");
        assert_eq!(Program { name: "no such program", packages: &[] }.find(), None);
    }

    #[test]
    fn a_missing_program_is_named_with_its_packages() {
        let text = describe(&BTreeSet::from([NBDFUSE, FIO]));
        assert_eq!(text, "fio (Debian: fio), nbdfuse (Debian: nbdfuse or libnbd-bin)");
    }
}
