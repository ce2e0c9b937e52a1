//! Mount tables, and the devices on which a file system or a file lies.
//!
//! A file system may have an anonymous device number (major 0): then its mount's source, or its layers, lead to the devices.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::graph::parse;
use super::{DeviceNo, number};

/// Overlays upon overlays are followed so deep; the kernel allows two.
const LAYERS_MAX: u32 = 8;

/// One line of a mount table (proc(5), `mountinfo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    id: u64,
    device: DeviceNo,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    kind: String,
    source: String,
    /// The mount, or the file system as a whole.
    pub(super) read_only: bool,
    /// Of the file system, as they stand there.
    options: String,
}

/// Which file system lies on which devices.
#[derive(Debug, Default)]
pub(super) struct Places {
    proc: PathBuf,
    btrfs: PathBuf,
    /// Of this process.
    own: Vec<Mount>,
    /// Of the host's first process: another one where this runs in a mount namespace of its own.
    host: Vec<Mount>,
}

impl Places {
    /// Of this host.
    pub(super) fn system() -> Self {
        let proc = PathBuf::from("/proc");
        let (own, host) = (read_table(&proc.join("self")), read_table(&proc.join("1")));
        Self { proc, btrfs: "/sys/fs/btrfs".into(), own, host }
    }

    /// Knows nothing.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self::default()
    }

    /// The devices of the file system on which `path` lies. None: it has none (tmpfs, network), or they are not known.
    pub(super) fn of_path(&self, path: &Path) -> BTreeSet<DeviceNo> {
        self.of_path_at(path, 0)
    }

    /// The devices of a mounted file system.
    pub(super) fn of_mount(&self, mount: &Mount) -> BTreeSet<DeviceNo> {
        self.of_mount_at(mount, 0)
    }

    /// The devices of the root file systems: of this process, and of the host.
    pub(super) fn of_roots(&self) -> BTreeSet<DeviceNo> {
        let roots = [&self.own, &self.host].map(|table| table.iter().rfind(|mount| mount.point == Path::new("/")));
        roots.into_iter().flatten().flat_map(|mount| self.of_mount(mount)).collect()
    }

    /// Mounts of every namespace on this host that can be seen, each once.
    pub(super) fn everywhere(&self) -> Vec<Mount> {
        let mut mounts: Vec<Mount> = self.own.iter().chain(&self.host).cloned().collect();
        let mut seen: BTreeSet<PathBuf> =
            ["self", "1"].iter().filter_map(|pid| namespace(&self.proc.join(pid))).collect();
        let entries = std::fs::read_dir(&self.proc).into_iter().flatten().flatten();
        for process in entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok()) {
            if namespace(&process.path()).is_some_and(|namespace| seen.insert(namespace)) {
                mounts.extend(read_table(&process.path()));
            }
        }
        mounts
    }

    fn of_path_at(&self, path: &Path, depth: u32) -> BTreeSet<DeviceNo> {
        let mut open = File::options();
        let Ok(file) = open.read(true).custom_flags(nix::libc::O_PATH | nix::libc::O_CLOEXEC).open(path) else {
            return BTreeSet::new();
        };
        let mount = mount_id(&file).and_then(|id| self.own.iter().chain(&self.host).find(|mount| mount.id == id));
        match (mount, file.metadata()) {
            (Some(mount), _) => self.of_mount_at(mount, depth),
            (None, Ok(status)) => known([number(status.dev())]),
            (None, Err(_)) => BTreeSet::new(),
        }
    }

    fn of_mount_at(&self, mount: &Mount, depth: u32) -> BTreeSet<DeviceNo> {
        if depth > LAYERS_MAX {
            return BTreeSet::new();
        }
        let mut devices = known([mount.device]);
        match mount.kind.as_str() {
            "overlay" => {
                for layer in layers(&mount.options) {
                    let found = self.of_path_at(&layer, depth + 1);
                    // A container's layers are named as the host sees them.
                    let found =
                        if found.is_empty() { self.of_path_at(&self.on_host(&layer), depth + 1) } else { found };
                    devices.extend(found);
                }
            }
            "btrfs" => devices.extend(self.of_btrfs(mount)),
            _ if devices.is_empty() => devices.extend(mount.source.split(':').filter_map(|part| self.block(part))),
            _ => {}
        }
        // A journal, or a real-time section, of its own.
        let beside = mount
            .options
            .split(',')
            .filter_map(|option| option.strip_prefix("logdev=").or_else(|| option.strip_prefix("rtdev=")));
        devices.extend(beside.filter_map(|path| self.block(path)));
        devices
    }

    /// All devices of the file system; of every btrfs where it is not known which this one is.
    fn of_btrfs(&self, mount: &Mount) -> BTreeSet<DeviceNo> {
        let source = self.block(&mount.source);
        let systems = std::fs::read_dir(&self.btrfs).into_iter().flatten().flatten();
        let members = systems.map(|system| members(&system.path().join("devices")));
        let of_it = |devices: &BTreeSet<DeviceNo>| source.is_none_or(|source| devices.contains(&source));
        members.filter(of_it).flatten().chain(source).collect()
    }

    /// The number of the block device at `path`, here or as the host sees it.
    fn block(&self, path: &str) -> Option<DeviceNo> {
        let path = Path::new(path);
        let here = path.is_absolute().then(|| [path.to_owned(), self.on_host(path)])?;
        let statuses = here.iter().filter_map(|path| std::fs::metadata(path).ok());
        statuses.filter(|status| status.file_type().is_block_device()).map(|status| number(status.rdev())).next()
    }

    fn on_host(&self, path: &Path) -> PathBuf {
        self.proc.join("1/root").join(path.strip_prefix("/").unwrap_or(path))
    }
}

fn known(devices: [DeviceNo; 1]) -> BTreeSet<DeviceNo> {
    devices.into_iter().filter(|device| device.0 != 0).collect()
}

fn members(folder: &Path) -> BTreeSet<DeviceNo> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| parse(std::fs::read_to_string(entry.path().join("dev")).ok()?.trim())).collect()
}

/// What tells a mount namespace from another.
fn namespace(process: &Path) -> Option<PathBuf> {
    std::fs::read_link(process.join("ns/mnt")).ok()
}

/// The mount on which an open file lies.
fn mount_id(file: &File) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()
}

/// The table of a process; empty if it may not be read.
fn read_table(process: &Path) -> Vec<Mount> {
    let text = std::fs::read(process.join("mountinfo")).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    let (mount, system) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    let id = mount.next()?.parse().ok()?;
    let device = parse(mount.nth(1)?)?;
    let point = PathBuf::from(unescaped(mount.nth(1)?));
    let own_options = mount.next()?;
    let mut system = system.split(' ');
    let (kind, source) = (system.next()?.to_owned(), unescaped(system.next()?));
    let options = system.next().unwrap_or_default();
    let read_only = [own_options, options].iter().any(|options| options.split(',').any(|option| option == "ro"));
    Some(Mount { id, device, point, kind, source, read_only, options: unescaped(options) })
}

/// Without the kernel's octal escapes (`\040` for a blank).
pub(super) fn unescaped(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = text.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\').and_then(|o| u8::from_str_radix(o, 8).ok());
        out.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The folders of which an overlay consists.
fn layers(options: &str) -> Vec<PathBuf> {
    let mut layers = Vec::new();
    for option in split(options, ',') {
        let Some((key, value)) = option.split_once('=') else { continue };
        if matches!(key, "upperdir" | "workdir" | "lowerdir" | "lowerdir+" | "datadir+") {
            layers.extend(split(value, ':').filter(|path| !path.is_empty()).map(|path| PathBuf::from(plain(path))));
        }
    }
    layers
}

/// Pieces between separators that have no backslash before them.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut escaped = false;
    text.split(move |c| {
        let is_end = c == separator && !escaped;
        escaped = c == '\\' && !escaped;
        is_end
    })
}

/// Without overlay's backslashes.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_mount_table() {
        let line = r"36 35 98:0 /a /mnt/with\040blank rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = parse_line(line).expect("good");
        assert_eq!((mount.id, mount.device, mount.read_only), (36, (98, 0), false));
        assert_eq!((mount.point, mount.source.as_str()), (PathBuf::from("/mnt/with blank"), "/dev/root"));
        // No optional fields; read-only as a whole.
        let mount = parse_line("1 0 0:1 / / rw - btrfs /dev/sda2 ro,subvolid=5").expect("good");
        assert!(mount.read_only && mount.kind == "btrfs");
        for bad in ["", "36 35 98:0 / /", "x 35 98:0 / / rw - ext3 a b", "36 35 98 / / rw - ext3 a b"] {
            assert_eq!(parse_line(bad), None, "{bad}");
        }
    }

    #[test]
    fn layers_of_an_overlay() {
        let options = r"rw,lowerdir=/a:/b\:c:/d\,e,upperdir=/u,workdir=/w,redirect_dir=on,lowerdir+=/f";
        let expected = ["/a", "/b:c", "/d,e", "/u", "/w", "/f"].map(PathBuf::from);
        assert_eq!(layers(options), expected);
    }

    #[test]
    fn escapes_are_undone_and_other_text_stays() {
        assert_eq!(unescaped(r"a\040b\134c\0"), r"a b\c\0");
        assert_eq!(unescaped("ä\\011"), "ä\t");
        assert_eq!(unescaped(r"\é12"), r"\é12");
    }

    /// Goal: an overlay and a file system with an anonymous number lead to devices. Method: a table whose layers lie in a file
    /// system that this machine has, under another number.
    #[test]
    fn anonymous_numbers_are_seen_through() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = File::open(folder.path()).expect("there");
        let id = mount_id(&file).expect("Linux");
        let table = format!(
            "{id} 1 8:3 / /x rw - ext4 /dev/sda3 rw\n\
             7 1 0:50 / / rw - overlay overlay rw,lowerdir=/nowhere,upperdir={0},workdir={0}\n\
             8 1 0:51 / /net rw - nfs host:/dir rw\n\
             9 1 0:52 / /b rw - btrfs /dev/none rw",
            folder.path().display()
        );
        let own: Vec<Mount> = table.lines().filter_map(parse_line).collect();
        let system = folder.path().join("btrfs/uuid/devices/sdb");
        std::fs::create_dir_all(&system).expect("room");
        std::fs::write(system.join("dev"), "8:16\n").expect("room");
        let places = Places { proc: "/proc".into(), btrfs: folder.path().join("btrfs"), own, host: Vec::new() };
        let three = BTreeSet::from([(8, 3)]);
        assert_eq!(places.of_path(folder.path()), three);
        assert_eq!(places.of_roots(), three);
        assert!(places.of_mount(&places.own[2]).is_empty());
        // Its source is not known, so it may be any.
        assert_eq!(places.of_mount(&places.own[3]), BTreeSet::from([(8, 16)]));
        assert!(places.of_path(Path::new("/nowhere/at/all")).is_empty());
    }
}
