//! Which process has a device open. What /proc hides (another user's, without root) is not seen.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::libc;

/// The processes of this host, or of this container.
fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process that has the disk or a partition of it open.
pub(crate) fn opener(disk: &Path) -> Option<u32> {
    let name = disk.file_name()?.to_str()?;
    let number = std::fs::metadata(disk).ok()?.rdev();
    processes().find(|pid| {
        let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().any(|file| is_link_to(&file.path(), name, number))
    })
}

/// What a process may have open, to be known without asking about each open file: one on a file system whose server is gone would
/// not answer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sought {
    /// A block device.
    Device,
    /// A file with this inode, on whichever file system.
    Inode(u64),
}

/// A process other than this one that has open for writing what is `sought` and what `is` recognises, for people: `process 812
/// (qemu-system-x86)`.
pub(crate) fn writer(sought: Sought, is: impl Fn(&Metadata) -> bool) -> Option<String> {
    let mut others = processes().filter(|pid| *pid != std::process::id());
    others.find(|pid| has_open_for_writing(*pid, sought, &is)).map(named)
}

/// A process other than this one that has the block device or file `source` itself open for writing. Of what is neither: none.
pub(crate) fn writer_of(source: &Path) -> Option<String> {
    let known = std::fs::metadata(source).ok()?;
    if known.file_type().is_block_device() {
        let is = |status: &Metadata| status.file_type().is_block_device() && status.rdev() == known.rdev();
        return writer(Sought::Device, is);
    }
    let is = |status: &Metadata| (status.dev(), status.ino()) == (known.dev(), known.ino());
    known.is_file().then(|| writer(Sought::Inode(known.ino()), is)).flatten()
}

fn has_open_for_writing(pid: u32, sought: Sought, is: impl Fn(&Metadata) -> bool) -> bool {
    let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.flatten().any(|file| {
        let name = file.file_name();
        let open = || name.to_str().and_then(|number| OpenFile::read(&format!("/proc/{pid}/fdinfo/{number}")));
        let may_be = match sought {
            Sought::Device => {
                std::fs::read_link(file.path()).is_ok_and(|to| to.starts_with("/dev"))
                    && open().is_some_and(OpenFile::writes)
            }
            // Before Linux 5.14 the kernel does not say.
            Sought::Inode(inode) => open().is_some_and(|open| open.writes() && open.inode.is_none_or(|of| of == inode)),
        };
        may_be && std::fs::metadata(file.path()).is_ok_and(|status| is(&status))
    })
}

/// What proc_pid_fdinfo(5) says of an open file.
#[derive(Clone, Copy)]
struct OpenFile {
    flags: libc::c_int,
    inode: Option<u64>,
}

impl OpenFile {
    fn read(path: &str) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let flags = libc::c_int::from_str_radix(field("flags:")?, 8).ok()?;
        Some(Self { flags, inode: field("ino:").and_then(|inode| inode.parse().ok()) })
    }

    fn writes(self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY && self.flags & libc::O_PATH == 0
    }
}

/// [`opener`], for people: `process 812 (qemu-system-x86)`.
pub(crate) fn named_opener(disk: &Path) -> Option<String> {
    opener(disk).map(named)
}

fn named(pid: u32) -> String {
    let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    format!("process {pid} ({})", program_name(&program))
}

/// The name of a program by the kernel's link to it, which says so if it was deleted or never had a file.
fn program_name(link: &Path) -> String {
    let name = link.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.trim_end_matches(" (deleted)").trim_start_matches("memfd:");
    if name.is_empty() { "?".to_owned() } else { name.to_owned() }
}

/// Whether an entry of a process's folder of open files is the disk `name`, of this device number, or one of its partitions.
fn is_link_to(link: &Path, name: &str, number: u64) -> bool {
    let Ok(to) = std::fs::read_link(link) else { return false };
    // Asking about an open file of another file system might wait for a server that is gone.
    if !to.as_os_str().to_string_lossy().contains("/dev/") {
        return false;
    }
    if to.file_name().and_then(|file| file.to_str()).is_some_and(|file| is_partition(file, name)) {
        return true;
    }
    std::fs::metadata(link).is_ok_and(|status| status.file_type().is_block_device() && status.rdev() == number)
}

/// `ublkb1p2` is one of `ublkb1`, and `sda1` of `sda`.
fn is_partition(file: &str, disk: &str) -> bool {
    let rest = file.strip_prefix(disk);
    let number =
        if disk.ends_with(|c: char| c.is_ascii_digit()) { rest.and_then(|rest| rest.strip_prefix('p')) } else { rest };
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn programs_have_a_name_wherever_they_run_from() {
        for (link, name) in
            [("/usr/bin/fio", "fio"), ("/memfd:farshore (deleted)", "farshore"), ("/opt/x (deleted)", "x"), ("", "?")]
        {
            assert_eq!(program_name(Path::new(link)), name);
        }
    }

    /// Goal: who writes to a file is found, who reads it or once wrote to it is not. Method: another process with it open, each way.
    #[test]
    fn a_writer_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.img");
        std::fs::write(&path, "").expect("room");
        let found = |file: std::fs::File| {
            let mut cat = std::process::Command::new("cat");
            let mut child = cat.stdin(std::process::Stdio::piped()).stdout(file).spawn().expect("cat");
            drop(cat);
            let found = writer_of(&path);
            drop(child.stdin.take());
            child.wait().expect("it ends");
            (found, child.id())
        };
        let (who, pid) = found(std::fs::File::options().append(true).open(&path).expect("there"));
        assert_eq!(who, Some(format!("process {pid} (cat)")));
        assert_eq!(found(std::fs::File::open(&path).expect("there")).0, None, "a reader");
        assert_eq!(writer_of(&path), None);
    }

    #[test]
    fn partitions_of_a_disk_are_told_from_other_disks() {
        assert!(is_partition("ublkb1p2", "ublkb1") && is_partition("sda1", "sda"));
        for other in ["ublkb1", "ublkb12", "ublkb1p", "ublkb1px", "ublkb2p1", "sda1"] {
            assert!(!is_partition(other, "ublkb1"), "{other}");
        }
    }

    /// Goal: an open file is known by name, by number, and nothing else is. Method: links as /proc has them, to a device that every
    /// machine has.
    #[test]
    fn an_open_disk_is_known() {
        let folder = tempfile::tempdir().expect("a folder");
        let link = |name: &str, to: &str| {
            let link = folder.path().join(name);
            symlink(to, &link).expect("room");
            link
        };
        assert!(is_link_to(&link("3", "/dev/ublkb1p1"), "ublkb1", 0));
        // No block device, whatever its number.
        let number = std::fs::metadata("/dev/null").expect("everywhere").rdev();
        assert!(!is_link_to(&link("4", "/dev/null"), "ublkb1", number));
        assert!(!is_link_to(&link("5", "/tmp/ublkb1"), "ublkb1", 0));
        assert!(!is_link_to(&folder.path().join("6"), "ublkb1", 0));
    }
}
