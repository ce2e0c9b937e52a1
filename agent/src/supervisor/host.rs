//! What makes a process fit to hold block devices under a host that is short of everything.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};

use super::roster::RosterDisk;

/// The kernel's least likely victim of memory shortage.
const OOM_NEVER: &str = "-1000";
/// Of the worker: after everything that can be done without. It comes back.
const OOM_LATE: &str = "-900";

/// Locks this process in memory, takes it out of the reach of the out-of-memory killer, keeps its allocations from waiting for dirty pages,
/// and gives it mounts of its own. What is not permitted is done without, and said.
pub(crate) fn settle() {
    let root = nix::unistd::geteuid().is_root();
    let lacks = |what: &str, error: &dyn std::fmt::Display| match root {
        true => tracing::warn!(%error, "the supervisor does without {what}"),
        // Volumes over NBD need none of it.
        false => tracing::info!(%error, "the supervisor does without {what}"),
    };
    if let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        lacks("locked memory", &error);
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_NEVER) {
        lacks("safety from the out-of-memory killer", &error);
    }
    if let Err(error) = farshore_ublk::become_io_flusher() {
        lacks("the flag of an I/O flusher", &error);
    }
    if let Err(error) = own_mounts() {
        lacks("mounts of its own", &error);
    }
}

/// For the worker, which inherits the supervisor's score: it comes back, so it goes before what does not.
pub fn settle_worker() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_LATE) {
        tracing::debug!(%error, "the worker keeps the score it has");
    }
}

/// A mount namespace of this process and its children. Mounts and unmounts of the host are seen here, none of here there.
///
/// A process that serves a block device and is the last one of a namespace in which that device is mounted hangs in its own end: the
/// kernel unmounts, and waits for the server. [`detach_own`] keeps such mounts out.
///
/// Only where the host shares its mounts, as systemd makes it: else nothing that is mounted later would be seen here, and a source in it
/// not be found.
fn own_mounts() -> std::io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    if !mounts.lines().any(is_shared_root) {
        let what = "the host's root is not a shared mount (`mount --make-rshared /`)";
        return Err(std::io::Error::new(std::io::ErrorKind::Unsupported, what));
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
    Ok(())
}

/// A line of proc_pid_mountinfo(5): the root, with the tag of mounts whose changes others see (or that see those of others).
fn is_shared_root(line: &str) -> bool {
    let is_root = line.split(' ').nth(4) == Some("/");
    let tags = line.split(' ').skip(6).take_while(|tag| *tag != "-");
    is_root && tags.into_iter().any(|tag| tag.starts_with("shared:") || tag.starts_with("master:"))
}

/// Whether this process has mounts of its own.
pub(crate) fn has_own_mounts() -> bool {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    of("self").is_some_and(|own| of("1").is_some_and(|first| first != own))
}

/// Takes mounts of file systems that lie on `disks` out of this process's namespace. The host's stay.
pub(crate) fn detach_own(disks: &[RosterDisk]) {
    let mut numbers = BTreeSet::new();
    for disk in disks {
        above(&PathBuf::from(format!("/sys/block/ublkb{}", disk.disk.id)), &mut numbers);
    }
    if numbers.is_empty() {
        return;
    }
    let Ok(text) = std::fs::read_to_string("/proc/self/mountinfo") else { return };
    let mut points: Vec<String> = text.lines().filter_map(|line| mount_point(line, &numbers)).collect();
    // Mounts on mounts first.
    points.reverse();
    for point in points {
        match umount2(Path::new(&point), MntFlags::MNT_DETACH) {
            Ok(()) => tracing::debug!(point, "not seen by the agent any more"),
            Err(error) => tracing::warn!(point, %error, "a mount on a protected device stays in the agent's namespace"),
        }
    }
}

/// A mount's place, if it is of one of these devices. Format: proc_pid_mountinfo(5).
fn mount_point(line: &str, numbers: &BTreeSet<String>) -> Option<String> {
    let mut fields = line.split(' ').skip(2);
    let number = fields.next()?;
    let point = fields.nth(1)?;
    numbers.contains(number).then(|| unescaped(point))
}

/// `\040` is a space, and so on.
fn unescaped(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, tail @ ..] = rest {
        match tail.split_first_chunk::<3>().filter(|_| *byte == b'\\').and_then(|(digits, _)| octal(*digits)) {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(*byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn octal(digits: [u8; 3]) -> Option<u8> {
    let value = digits.iter().try_fold(0, |value, digit| Some(value * 8 + char::from(*digit).to_digit(8)?))?;
    u8::try_from(value).ok()
}

/// The numbers of a device, of its partitions, and of all that stands on them.
fn above(folder: &Path, numbers: &mut BTreeSet<String>) {
    let Ok(number) = std::fs::read_to_string(folder.join("dev")) else { return };
    if !numbers.insert(number.trim().to_owned()) {
        return;
    }
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
    for partition in entries(folder).filter(|entry| entry.path().join("partition").exists()) {
        above(&partition.path(), numbers);
    }
    for holder in entries(&folder.join("holders")) {
        above(&holder.path(), numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_a_device_are_found_whatever_they_are_called() {
        let numbers = BTreeSet::from(["259:3".to_owned()]);
        let line = |number: &str, point: &str| format!("36 35 {number} / {point} rw,noatime master:1 - ext4 /dev/x rw");
        assert_eq!(mount_point(&line("259:3", "/srv/a\\040b\\134c"), &numbers), Some("/srv/a b\\c".to_owned()));
        assert_eq!(mount_point(&line("259:3", "/srv\\"), &numbers), Some("/srv\\".to_owned()));
        assert_eq!(mount_point(&line("259:33", "/srv"), &numbers), None);
        assert_eq!(mount_point("", &numbers), None);
    }

    #[test]
    fn a_root_that_is_shared_is_told_from_a_private_one() {
        assert!(is_shared_root("22 1 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw"));
        assert!(is_shared_root("22 1 8:1 / / rw master:1 - ext4 /dev/sda1 rw"));
        assert!(!is_shared_root("22 1 8:1 / / rw - ext4 /dev/sda1 rw,shared:1"));
        assert!(!is_shared_root("23 22 0:5 / /proc rw shared:2 - proc proc rw"));
    }

    #[test]
    fn what_stands_on_a_device_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let device = |path: &str, number: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.join("holders")).expect("room");
            std::fs::write(path.join("dev"), number).expect("room");
            path
        };
        let disk = device("ublkb1", "259:1\n");
        let partition = device("ublkb1/ublkb1p1", "259:2\n");
        std::fs::write(partition.join("partition"), "1").expect("room");
        let upper = device("dm-0", "253:0\n");
        std::os::unix::fs::symlink(&upper, partition.join("holders/dm-0")).expect("room");
        // A holder of itself ends no walk.
        std::os::unix::fs::symlink(&upper, upper.join("holders/dm-0")).expect("room");
        let mut numbers = BTreeSet::new();
        above(&disk, &mut numbers);
        assert_eq!(numbers.into_iter().collect::<Vec<_>>(), ["253:0", "259:1", "259:2"]);
    }
}
