//! What a block device stands on, as sysfs tells: a partition on its disk, device-mapper and md on their slaves, a loop on its file.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::{Error, Result};

/// Major and minor number.
type DeviceNo = (u64, u64);
/// Device that a file lies on, and its inode.
type FileNo = (DeviceNo, u64);

/// The block devices of this host.
pub(crate) struct Devices {
    /// One link or folder per device, `MAJOR:MINOR`.
    root: PathBuf,
}

/// All that a device stands on, and itself.
#[derive(Default)]
struct Below {
    devices: BTreeSet<DeviceNo>,
    /// Backing files of loops.
    files: BTreeSet<FileNo>,
}

impl Devices {
    /// By the kernel's own tree.
    pub(crate) fn system() -> Self {
        Self { root: "/sys/dev/block".into() }
    }

    /// Refuses a source that holds one of these: the agent's own writes would wait for themselves. What does not exist, and what
    /// lies on no block device, is nobody's.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub(crate) fn refuse_holding(&self, source: &Path, own: &[&Path]) -> Result<()> {
        let Ok(status) = std::fs::metadata(source) else { return Ok(()) };
        for path in own {
            let Ok(folder) = std::fs::metadata(path) else { continue };
            let place = number(folder.dev());
            let holds = match status.file_type().is_block_device() {
                true => self.overlap(number(status.rdev()), place),
                false => self.below(place).files.contains(&(number(status.dev()), status.ino())),
            };
            if holds {
                return Err(Error::Refused {
                    what: format!("source {}", source.display()),
                    reason: format!("holds the agent's own {}", path.display()),
                    hint: "keep state, rings and identity on another device".into(),
                });
            }
        }
        Ok(())
    }

    /// One is, or stands on, the other. (Two partitions of one disk do not overlap.)
    fn overlap(&self, one: DeviceNo, other: DeviceNo) -> bool {
        self.below(one).devices.contains(&other) || self.below(other).devices.contains(&one)
    }

    fn below(&self, device: DeviceNo) -> Below {
        let mut below = Below::default();
        let mut next = vec![device];
        while let Some(device) = next.pop() {
            if below.devices.insert(device) {
                let folder = self.root.join(format!("{}:{}", device.0, device.1));
                next.extend(parents(&folder, &mut below.files));
            }
        }
        below
    }
}

/// What the device in this folder stands on directly. What sysfs does not tell is not known.
fn parents(folder: &Path, files: &mut BTreeSet<FileNo>) -> Vec<DeviceNo> {
    let mut parents = Vec::new();
    if folder.join("partition").exists() {
        // The folder is reached by a link; its parent is where that leads.
        parents.extend(read_number(&folder.join("../dev")));
    }
    if let Ok(slaves) = std::fs::read_dir(folder.join("slaves")) {
        parents.extend(slaves.flatten().filter_map(|slave| read_number(&slave.path().join("dev"))));
    }
    if let Ok(file) = std::fs::read_to_string(folder.join("loop/backing_file"))
        && let Ok(status) = std::fs::metadata(file.trim_end_matches('\n'))
    {
        let block = status.file_type().is_block_device();
        parents.push(number(if block { status.rdev() } else { status.dev() }));
        files.insert((number(status.dev()), status.ino()));
    }
    parents
}

fn number(device: u64) -> DeviceNo {
    (major(device), minor(device))
}

fn read_number(file: &Path) -> Option<DeviceNo> {
    let text = std::fs::read_to_string(file).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A tree as the kernel makes it: devices in folders, links to them by number, and links between them.
    struct Sysfs(TempDir);

    impl Sysfs {
        fn new() -> Self {
            let sysfs = Self(tempfile::tempdir().expect("a folder"));
            std::fs::create_dir_all(sysfs.numbers()).expect("room");
            sysfs
        }

        fn numbers(&self) -> PathBuf {
            self.0.path().join("dev/block")
        }

        fn devices(&self) -> Devices {
            Devices { root: self.numbers() }
        }

        fn device(&self, path: &str, number: &str, slaves: &[&str]) -> PathBuf {
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

        fn partition(&self, path: &str, number: &str) {
            let folder = self.device(path, number, &[]);
            std::fs::write(folder.join("partition"), "1\n").expect("room");
        }
    }

    /// Goal: partitions, volumes of LVM, md and loops are seen through, both ways, and neighbours are not taken for one another.
    #[test]
    fn what_stands_on_what() {
        let sysfs = Sysfs::new();
        sysfs.device("sda", "8:0", &[]);
        sysfs.partition("sda/sda1", "8:1");
        sysfs.partition("sda/sda2", "8:2");
        sysfs.device("sdb", "8:16", &[]);
        sysfs.device("md0", "9:0", &["8:2", "8:16"]);
        sysfs.partition("md0/md0p1", "259:0");
        sysfs.device("dm-0", "253:0", &["259:0"]);
        sysfs.device("dm-1", "253:1", &["253:0"]);
        sysfs.device("dm-2", "253:2", &["259:0"]);
        // Whoever asks about a device that names itself must not walk for ever.
        sysfs.device("dm-9", "253:9", &[]);
        symlink(sysfs.0.path().join("devices/dm-9"), sysfs.0.path().join("devices/dm-9/slaves/dm-9")).expect("room");
        let devices = sysfs.devices();
        let (sda, sda1, sda2, sdb) = ((8, 0), (8, 1), (8, 2), (8, 16));
        let (md, md_part, lv, crypt_on_lv, other_lv) = ((9, 0), (259, 0), (253, 0), (253, 1), (253, 2));
        for (one, other) in [
            (sda, sda),
            (sda, sda1),
            (sda, crypt_on_lv),
            (sda2, lv),
            (sdb, crypt_on_lv),
            (md, lv),
            (md_part, other_lv),
            (lv, crypt_on_lv),
            ((253, 9), (253, 9)),
            // Nothing is known of it but that it is itself.
            ((77, 7), (77, 7)),
        ] {
            assert!(devices.overlap(one, other) && devices.overlap(other, one), "{one:?} {other:?}");
        }
        for (one, other) in [
            (sda1, sda2),
            (sda1, crypt_on_lv),
            (sda, sdb),
            (sdb, sda1),
            (lv, other_lv),
            (crypt_on_lv, other_lv),
            ((77, 7), sda),
        ] {
            assert!(!devices.overlap(one, other) && !devices.overlap(other, one), "{one:?} {other:?}");
        }
    }

    /// Goal: an image that is the device of the agent's own file system, as a loop, is refused; another one is not.
    #[test]
    fn an_image_that_holds_own_files_is_refused() {
        let sysfs = Sysfs::new();
        let own = tempfile::tempdir().expect("a folder");
        let (image, other) = (own.path().join("a.img"), own.path().join("b.img"));
        for path in [&image, &other] {
            std::fs::write(path, "").expect("room");
        }
        let devices = sysfs.devices();
        devices.refuse_holding(&image, &[own.path()]).expect("nothing is known of the device");
        let (major, minor) = number(std::fs::metadata(own.path()).expect("there").dev());
        // The file system lies on an encrypted loop.
        let folder = sysfs.device("loop0", "7:0", &[]);
        std::fs::create_dir(folder.join("loop")).expect("room");
        std::fs::write(folder.join("loop/backing_file"), format!("{}\n", image.display())).expect("room");
        sysfs.device("dm-0", &format!("{major}:{minor}"), &["7:0"]);
        let error = devices.refuse_holding(&image, &[own.path()]).expect_err("it holds them");
        assert!(error.exit_code() == 4 && error.to_string().contains("own"), "{error}");
        devices.refuse_holding(&other, &[own.path(), Path::new("/nowhere")]).expect("it does not");
        devices.refuse_holding(Path::new("/nowhere"), &[own.path()]).expect("others say that it does not exist");
    }
}
