//! What stands on what, as sysfs tells: a partition on its disk, device mapper and md on their slaves, a loop on its file.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::mounts::Places;
use super::{DeviceNo, FileNo, number};

/// What a device stands on directly.
#[derive(Default, Debug, Clone)]
struct Parents {
    devices: Vec<DeviceNo>,
    /// Backing file of a loop.
    file: Option<FileNo>,
}

/// The block devices of this host, by number.
#[derive(Default, Debug)]
pub(super) struct Graph {
    /// One link or folder per device, `MAJOR:MINOR`.
    root: PathBuf,
    parents: BTreeMap<DeviceNo, Parents>,
}

/// All that something stands on, and itself.
#[derive(Default, Debug)]
pub(super) struct Below {
    pub(super) devices: BTreeSet<DeviceNo>,
    /// Backing files of loops.
    pub(super) files: BTreeSet<FileNo>,
}

impl Graph {
    /// Reads the tree at `root` (`/sys/dev/block`). `places` says where backing files lie.
    pub(super) fn read(root: &Path, places: &Places) -> Self {
        let mut graph = Self { root: root.to_owned(), parents: BTreeMap::new() };
        let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
        for (device, folder) in entries.filter_map(|entry| Some((parse(entry.file_name().to_str()?)?, entry.path()))) {
            graph.parents.insert(device, parents(&folder, places));
        }
        graph
    }

    /// Notes an edge that sysfs does not show: `device` is served from `parent`.
    pub(super) fn add(&mut self, device: DeviceNo, parent: DeviceNo) {
        self.parents.entry(device).or_default().devices.push(parent);
    }

    /// Notes that `device` is served from a file.
    pub(super) fn add_file(&mut self, device: DeviceNo, file: FileNo, on: &BTreeSet<DeviceNo>) {
        let parents = self.parents.entry(device).or_default();
        parents.devices.extend(on);
        parents.file = Some(file);
    }

    /// All devices there are.
    pub(super) fn devices(&self) -> impl Iterator<Item = DeviceNo> {
        self.parents.keys().copied()
    }

    /// All that these devices stand on, themselves included.
    pub(super) fn below(&self, devices: impl IntoIterator<Item = DeviceNo>) -> Below {
        let mut below = Below::default();
        let mut next: Vec<DeviceNo> = devices.into_iter().collect();
        while let Some(device) = next.pop() {
            if below.devices.insert(device)
                && let Some(parents) = self.parents.get(&device)
            {
                next.extend(&parents.devices);
                below.files.extend(parents.file);
            }
        }
        below
    }

    /// The disk of a partition.
    pub(super) fn disk_of(&self, device: DeviceNo) -> Option<DeviceNo> {
        let folder = self.folder(device);
        folder.join("partition").exists().then(|| read_number(&folder.join("../dev"))).flatten()
    }

    /// A file of the device's folder, trimmed.
    pub(super) fn attribute(&self, device: DeviceNo, name: &str) -> Option<String> {
        Some(std::fs::read_to_string(self.folder(device).join(name)).ok()?.trim().to_owned())
    }

    /// As the kernel calls it, such as `dm-3`.
    pub(super) fn kernel_name(&self, device: DeviceNo) -> Option<String> {
        let folder = std::fs::canonicalize(self.folder(device)).ok()?;
        Some(folder.file_name()?.to_str()?.to_owned())
    }

    /// A device-mapper device.
    pub(super) fn is_mapped(&self, device: DeviceNo) -> bool {
        self.folder(device).join("dm").exists()
    }

    /// A path that people know it by.
    pub(super) fn show(&self, device: DeviceNo) -> String {
        if let Some(name) = self.attribute(device, "dm/name").filter(|name| !name.is_empty()) {
            return format!("/dev/mapper/{name}");
        }
        let name = self.kernel_name(device);
        name.map_or_else(
            || format!("device {}:{}", device.0, device.1),
            |name| format!("/dev/{}", name.replace('!', "/")),
        )
    }

    fn folder(&self, device: DeviceNo) -> PathBuf {
        self.root.join(format!("{}:{}", device.0, device.1))
    }
}

/// What the device in this folder stands on directly. What sysfs does not tell is not known.
fn parents(folder: &Path, places: &Places) -> Parents {
    let mut parents = Parents::default();
    if folder.join("partition").exists() {
        // The folder is reached by a link; its parent is where that leads.
        parents.devices.extend(read_number(&folder.join("../dev")));
    }
    if let Ok(slaves) = std::fs::read_dir(folder.join("slaves")) {
        parents.devices.extend(slaves.flatten().filter_map(|slave| read_number(&slave.path().join("dev"))));
    }
    for name in ["loop/backing_file", "backing_dev"] {
        let Ok(file) = std::fs::read_to_string(folder.join(name)) else { continue };
        // zram without one says "none".
        let file = Path::new(file.trim_end_matches('\n'));
        let Some(status) = file.is_absolute().then(|| std::fs::metadata(file).ok()).flatten() else { continue };
        if status.file_type().is_block_device() {
            parents.devices.push(number(status.rdev()));
        } else {
            parents.devices.extend(places.of_path(file));
            parents.file = Some((number(status.dev()), status.ino()));
        }
    }
    parents
}

fn read_number(file: &Path) -> Option<DeviceNo> {
    parse(std::fs::read_to_string(file).ok()?.trim())
}

/// `MAJOR:MINOR`.
pub(super) fn parse(text: &str) -> Option<DeviceNo> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A tree as the kernel makes it: devices in folders, links to them by number, and links between them.
    pub(in crate::devices) struct Sysfs(TempDir);

    impl Sysfs {
        pub(in crate::devices) fn new() -> Self {
            let sysfs = Self(tempfile::tempdir().expect("a folder"));
            std::fs::create_dir_all(sysfs.numbers()).expect("room");
            sysfs
        }

        pub(in crate::devices) fn numbers(&self) -> PathBuf {
            self.0.path().join("dev/block")
        }

        fn graph(&self) -> Graph {
            Graph::read(&self.numbers(), &Places::none())
        }

        pub(in crate::devices) fn device(&self, path: &str, number: &str, slaves: &[&str]) -> PathBuf {
            let folder = self.0.path().join("devices").join(path);
            std::fs::create_dir_all(folder.join("slaves")).expect("room");
            std::fs::write(folder.join("dev"), format!("{number}\n")).expect("room");
            symlink(&folder, self.numbers().join(number)).expect("room");
            for slave in slaves {
                let target = std::fs::canonicalize(self.numbers().join(slave)).expect("made before");
                symlink(target, folder.join("slaves").join(slave)).expect("room");
            }
            folder
        }

        pub(in crate::devices) fn partition(&self, path: &str, number: &str) {
            let folder = self.device(path, number, &[]);
            std::fs::write(folder.join("partition"), "1\n").expect("room");
        }
    }

    /// Goal: partitions, volumes of LVM, md and loops are seen through, and neighbours are not taken for one another.
    #[test]
    fn what_stands_on_what() {
        let sysfs = Sysfs::new();
        sysfs.device("sda", "8:0", &[]);
        sysfs.partition("sda/sda1", "8:1");
        sysfs.partition("sda/sda2", "8:2");
        sysfs.device("sdb", "8:16", &[]);
        sysfs.device("md0", "9:0", &["8:2", "8:16"]);
        sysfs.partition("md0/md0p1", "259:0");
        let lv = sysfs.device("dm-0", "253:0", &["259:0"]);
        std::fs::create_dir(lv.join("dm")).expect("room");
        std::fs::write(lv.join("dm/name"), "vg-lv\n").expect("room");
        sysfs.device("dm-1", "253:1", &["253:0"]);
        sysfs.device("dm-2", "253:2", &["259:0"]);
        // Whoever asks about a device that names itself must not walk for ever.
        sysfs.device("dm-9", "253:9", &[]);
        symlink(sysfs.0.path().join("devices/dm-9"), sysfs.0.path().join("devices/dm-9/slaves/dm-9")).expect("room");
        let graph = sysfs.graph();
        let below = |device: DeviceNo| graph.below([device]).devices;
        let (sda, sda1, sda2, sdb) = ((8, 0), (8, 1), (8, 2), (8, 16));
        let (md, md_part, lv, crypt_on_lv, other_lv) = ((9, 0), (259, 0), (253, 0), (253, 1), (253, 2));
        assert_eq!(below(crypt_on_lv), BTreeSet::from([crypt_on_lv, lv, md_part, md, sda2, sda, sdb]));
        assert_eq!(below(other_lv), BTreeSet::from([other_lv, md_part, md, sda2, sda, sdb]));
        assert_eq!(below(sda1), BTreeSet::from([sda1, sda]));
        assert_eq!(below((253, 9)), BTreeSet::from([(253, 9)]));
        // Nothing is known of it but that it is itself.
        assert_eq!(below((77, 7)), BTreeSet::from([(77, 7)]));
        assert_eq!((graph.disk_of(sda2), graph.disk_of(md_part), graph.disk_of(sda)), (Some(sda), Some(md), None));
        assert_eq!((graph.show(lv), graph.show(sda1)), ("/dev/mapper/vg-lv".into(), "/dev/sda1".into()));
        assert!(graph.is_mapped(lv) && !graph.is_mapped(md));
        assert_eq!(graph.devices().count(), 10);
    }

    /// Goal: what sysfs does not show can be told, and a circle of it ends.
    #[test]
    fn a_served_device_stands_on_its_source() {
        let sysfs = Sysfs::new();
        sysfs.device("sda", "8:0", &[]);
        sysfs.device("ublkb0", "259:0", &[]);
        sysfs.device("dm-0", "253:0", &["259:0"]);
        sysfs.device("dm-1", "253:1", &["8:0"]);
        let mut graph = sysfs.graph();
        graph.add((259, 0), (253, 1));
        graph.add((259, 0), (253, 0));
        let all = BTreeSet::from([(253, 0), (259, 0), (253, 1), (8, 0)]);
        assert_eq!(graph.below([(253, 0)]).devices, all);
        assert_eq!(graph.below([(253, 1)]).devices, BTreeSet::from([(253, 1), (8, 0)]));
    }

    /// Goal: a loop stands on its file.
    #[test]
    fn a_loop_stands_on_its_file() {
        let sysfs = Sysfs::new();
        let image = tempfile::NamedTempFile::new().expect("room");
        let status = image.as_file().metadata().expect("open");
        let folder = sysfs.device("loop0", "7:0", &[]);
        std::fs::create_dir(folder.join("loop")).expect("room");
        std::fs::write(folder.join("loop/backing_file"), format!("{}\n", image.path().display())).expect("room");
        sysfs.device("dm-0", "253:0", &["7:0"]);
        let folder = sysfs.device("zram0", "252:0", &[]);
        std::fs::write(folder.join("backing_dev"), "none\n").expect("room");
        let graph = sysfs.graph();
        assert!(graph.below([(253, 0)]).files.contains(&(number(status.dev()), status.ino())));
        assert!(graph.below([(252, 0)]).files.is_empty());
    }
}
