//! What shows that nobody wrote to a source while Farshore was not in the path. Kept at an orderly stop, asked at the next start;
//! where it does not show that, the volume is compared. The rule and its limits: `docs/decisions/0012-bypass-evidence.md`.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use farshore_uring::AlignedBuf;
use nix::libc;
use serde::{Deserialize, Serialize};

use crate::{attach, clock};

/// Length of the pieces at both ends of a device that are hashed. File systems have a superblock in the first one and write it
/// when they are mounted.
const END_BYTES: usize = 1 << 20;

/// Coarsest step of the times that file systems note: a kernel tick at 100 Hz, and as much again for the reading of two clocks.
const TIME_STEP_NS: u64 = 20_000_000;

/// What an orderly stop knew of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "kebab-case")]
pub enum Evidence {
    /// A block device.
    Device {
        /// Boot that the counters are of.
        boot: String,
        /// The kernel's counters of it.
        counters: Counters,
        /// BLAKE3 of its first and its last MiB, hexadecimal; empty where they show nothing across a restart of the host.
        ends: String,
        /// It was in use all the same (mounted, through the device mapper): after a restart of the host nothing is known.
        in_use: bool,
    },
    /// Of a host that went down while it was served: nothing but which boot that was. Never kept.
    Crash {
        /// Boot that it was served in.
        boot: String,
    },
    /// An image file.
    File {
        /// Its inode.
        inode: String,
        /// Bytes.
        size: u64,
        /// Time of its last change, `SECONDS.NANOSECONDS`.
        changed: String,
    },
}

/// How much was written to a block device since it was made, as the kernel counts. Flushes and reads are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// The kernel's `diskseq`: never given twice in one boot. None: before Linux 5.15.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Sectors.
    pub written: u64,
    /// Sectors.
    pub discarded: u64,
}

/// Why a source may have been written to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Nothing was noted: the state is of an older build, or the last stop could not.
    Nothing,
    /// The device or file is another one, or one in place of the other.
    Another,
    /// Its counters say so: sectors written and discarded.
    Written(u64, u64),
    /// It is not counted for this device (`queue/iostats` is 0).
    NotCounted,
    /// It was in use when Farshore left the path, and the host was restarted since.
    WasInUse,
    /// First or last MiB have other content than before the restart of the host.
    Ends,
    /// They hold nothing that every use would have changed, and the host was restarted since.
    Undated,
    /// An image file was changed.
    Changed,
    /// Its ring was lost while the host stayed up, so that the host's counters tell nothing.
    SameBoot,
    /// It cannot be looked at.
    Unseen(String),
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("no evidence was kept at the last stop"),
            Self::Another => f.write_str("it is not the same device or file as at the last stop"),
            Self::Written(written, 0) => write!(f, "{written} sectors were written to it"),
            Self::Written(written, discarded) => {
                write!(f, "{written} sectors of it were written and {discarded} discarded")
            }
            Self::NotCounted => f.write_str("the kernel does not count its writes (queue/iostats is 0)"),
            Self::WasInUse => f.write_str("it was in use at the last stop, and the host was restarted since"),
            Self::Ends => f.write_str("its first or last MiB has changed across a restart of the host"),
            Self::Undated => f.write_str(
                "the host was restarted since, and it begins with no file system that notes its use (ext4, XFS, btrfs)",
            ),
            Self::Changed => f.write_str("the file was changed"),
            Self::SameBoot => f.write_str("what was under way was lost, and the host was not restarted since"),
            Self::Unseen(error) => write!(f, "it cannot be looked at: {error}"),
        }
    }
}

impl From<io::Error> for Doubt {
    fn from(error: io::Error) -> Self {
        Self::Unseen(error.to_string())
    }
}

/// What a look at a source comes to.
pub(crate) type Proof = std::result::Result<(), Doubt>;

impl Evidence {
    /// Of `source`, when its last write has ended and been flushed and nobody can write to it yet.
    pub(crate) fn take(source: &Path) -> std::result::Result<Self, Doubt> {
        if std::fs::metadata(source)?.file_type().is_block_device() {
            return Self::of_device(source, Counters::read(source)?, false);
        }
        let file = Self::of_file(source)?;
        if changed_just_now(source)? {
            // A later change within the same step of the file system's clock would leave no trace. Nothing tells when it is over.
            let _ = nix::poll::poll(&mut [], 20u8);
        }
        Ok(file)
    }

    /// Of a device whose counters were read at a time since which every write past us is counted.
    pub(crate) fn of_device(device: &Path, counters: Counters, in_use: bool) -> std::result::Result<Self, Doubt> {
        let boot = attach::boot_text().map_err(|error| Doubt::Unseen(crate::error::chain(&error)))?;
        // What changes at this very moment is no evidence.
        let ends = if in_use { None } else { ends(device)? };
        let ends = ends.unwrap_or_default();
        Ok(Self::Device { boot, counters, ends, in_use })
    }

    fn of_file(source: &Path) -> std::result::Result<Self, Doubt> {
        let status = std::fs::metadata(source)?;
        let changed = format!("{}.{:09}", status.ctime(), status.ctime_nsec());
        Ok(Self::File { inode: status.ino().to_string(), size: status.size(), changed })
    }

    /// Whether nothing was written to `source` since.
    pub(crate) fn check(&self, source: &Path) -> Proof {
        self.check_content(source)?;
        self.check_counters(source, None)
    }

    /// The part that has to be asked before anybody opens the source or writes to it again.
    pub(crate) fn check_content(&self, source: &Path) -> Proof {
        let is_device = std::fs::metadata(source)?.file_type().is_block_device();
        match self {
            Self::Crash { boot }
                if *boot == attach::boot_text().map_err(|e| Doubt::Unseen(crate::error::chain(&e)))? =>
            {
                Err(Doubt::SameBoot)
            }
            Self::Crash { .. } if is_device => Ok(()),
            Self::Crash { .. } if changed_since_boot(source)? => Err(Doubt::Changed),
            Self::Crash { .. } => Ok(()),
            Self::Device { .. } if !is_device => Err(Doubt::Another),
            Self::Device { .. } if self.is_of_this_boot()? => Ok(()),
            Self::Device { in_use: true, .. } => Err(Doubt::WasInUse),
            Self::Device { ends: known, .. } if known.is_empty() => Err(Doubt::Undated),
            Self::Device { ends: known, .. } if ends(source)?.as_ref() != Some(known) => Err(Doubt::Ends),
            Self::Device { .. } => Ok(()),
            Self::File { .. } if is_device => Err(Doubt::Another),
            Self::File { inode, .. } => match Self::of_file(source)? {
                now if now == *self => Ok(()),
                Self::File { inode: now, .. } if now != *inode => Err(Doubt::Another),
                Self::File { .. } | Self::Device { .. } | Self::Crash { .. } => Err(Doubt::Changed),
            },
        }
    }

    /// The part that counts: may be asked when the device is served again. `below`: a disk of which the device is a stub, and whose
    /// own counters go back to the start of the host.
    pub(crate) fn check_counters(&self, device: &Path, below: Option<&Path>) -> Proof {
        if !std::fs::metadata(device)?.file_type().is_block_device() {
            return Ok(());
        }
        let now = Counters::read(device)?;
        match self {
            Self::File { .. } => return Ok(()),
            Self::Device { counters, .. } if self.is_of_this_boot()? => return now.unchanged_since(counters),
            // Since the host's start.
            Self::Device { .. } | Self::Crash { .. } => {}
        }
        let fresh = Counters { sequence: now.sequence, written: 0, discarded: 0 };
        now.unchanged_since(&fresh)?;
        below.map_or(Ok(()), |disk| {
            let now = Counters::read(disk)?;
            now.unchanged_since(&Counters { sequence: now.sequence, ..fresh })
        })
    }

    fn is_of_this_boot(&self) -> std::result::Result<bool, Doubt> {
        let Self::Device { boot, .. } = self else { return Ok(false) };
        let now = attach::boot_text().map_err(|error| Doubt::Unseen(crate::error::chain(&error)))?;
        Ok(now == *boot)
    }
}

impl Counters {
    /// Of the block device at `path`. A write is counted when it ends at the latest.
    pub(crate) fn read(path: &Path) -> std::result::Result<Self, Doubt> {
        let number = std::fs::metadata(path)?.rdev();
        Self::read_in(&PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number))))
    }

    /// From a device's folder below /sys. What a partition lacks its disk has.
    fn read_in(folder: &Path) -> std::result::Result<Self, Doubt> {
        let of_disk = |name: &str| {
            let read = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
            read(folder.join(name)).or_else(|| read(folder.join("..").join(name)))
        };
        if of_disk("queue/iostats") == Some(0) {
            return Err(Doubt::NotCounted);
        }
        let text = std::fs::read_to_string(folder.join("stat"))?;
        // Documentation/block/stat.rst: the seventh is write sectors; the fourteenth discard sectors, since Linux 4.18.
        let field = |at: usize| text.split_whitespace().nth(at).and_then(|field| field.parse::<u64>().ok());
        let written = field(6).ok_or(Doubt::NotCounted)?;
        Ok(Self { sequence: of_disk("diskseq"), written, discarded: field(13).unwrap_or(0) })
    }

    fn unchanged_since(&self, before: &Self) -> Proof {
        if self.sequence != before.sequence || self.written < before.written || self.discarded < before.discarded {
            return Err(Doubt::Another);
        }
        match (self.written - before.written, self.discarded - before.discarded) {
            (0, 0) => Ok(()),
            (written, discarded) => Err(Doubt::Written(written, discarded)),
        }
    }
}

/// Whether an image file was changed after the host's start.
fn changed_since_boot(file: &Path) -> io::Result<bool> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let started = text.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<i64>().ok());
    Ok(started.is_none_or(|started| std::fs::metadata(file).map_or(true, |status| status.ctime() >= started)))
}

fn changed_just_now(file: &Path) -> io::Result<bool> {
    let status = std::fs::metadata(file)?;
    let nanoseconds = status.ctime().saturating_mul(1_000_000_000).saturating_add(status.ctime_nsec());
    let changed = u64::try_from(nanoseconds).unwrap_or(0);
    Ok(clock::wall().0.saturating_sub(changed) < TIME_STEP_NS)
}

/// Whether a device that begins like this has a file system that is written there with every use: ext2 to ext4 note each mount, XFS of
/// version 5 the sequence number of its last change, btrfs its generation. What stands in another place (partitions, LVM, LUKS: after the
/// first MiB, or without any note) may be used for years and leave no trace here.
fn notes_its_use(start: &[u8]) -> bool {
    let holds = |at: usize, magic: &[u8]| start.get(at..at + magic.len()) == Some(magic);
    // What was a file system once, and was not wiped, is none: partitions, LUKS, LVM, RAID.
    let leads_elsewhere = holds(510, &[0x55, 0xaa])
        || holds(0, b"LUKS")
        || (0..4).any(|sector| holds(sector * 512, b"LABELONE"))
        || [0, 4096].iter().any(|&at| holds(at, &0xa92b_4efc_u32.to_le_bytes()));
    let ext = holds(0x438, &[0x53, 0xef]);
    let xfs = holds(0, b"XFSB") && start.get(101).is_some_and(|version| version & 0xf >= 5);
    let btrfs = holds(0x1_0040, b"_BHRfS_M");
    (ext || xfs || btrfs) && !leads_elsewhere
}

/// Hash of a device's first and last MiB, past the page cache. None: it would not show every use.
fn ends(device: &Path) -> io::Result<Option<String>> {
    let open = |flags| File::options().read(true).custom_flags(flags | libc::O_CLOEXEC).open(device);
    // Files stand in for devices in tests, on file systems without direct I/O.
    let file = open(libc::O_DIRECT).or_else(|_| open(0))?;
    let size = std::io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    let len = END_BYTES.min(usize::try_from(size).unwrap_or(END_BYTES));
    let mut hasher = blake3::Hasher::new();
    let mut piece = AlignedBuf::zeroed(len);
    for offset in [0, size - len as u64] {
        file.read_exact_at(&mut piece, offset)?;
        if offset == 0 && !notes_its_use(&piece) {
            return Ok(None);
        }
        hasher.update(&piece);
    }
    Ok(Some(hasher.finalize().to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    struct Image(tempfile::TempDir);

    impl Image {
        fn new(bytes: u64) -> Self {
            let image = Self(tempfile::tempdir().expect("a folder"));
            File::create(image.path()).and_then(|file| file.set_len(bytes)).expect("room");
            image
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("a.img")
        }

        fn write(&self, offset: u64) {
            let file = File::options().write(true).open(self.path()).expect("there");
            file.write_all_at(&[7; 512], offset).expect("room");
        }
    }

    /// Goal: whatever is done to a file behind our back shows, at once too. Method: a write, another file in its place, a change of
    /// size; and nothing.
    #[test]
    fn a_changed_file_shows() {
        let image = Image::new(MIB);
        let evidence = Evidence::take(&image.path()).expect("a file");
        assert_eq!(evidence.check(&image.path()), Ok(()));
        image.write(4096);
        assert_eq!(evidence.check(&image.path()), Err(Doubt::Changed));

        let evidence = Evidence::take(&image.path()).expect("a file");
        File::options().write(true).open(image.path()).and_then(|file| file.set_len(2 * MIB)).expect("room");
        assert_eq!(evidence.check(&image.path()), Err(Doubt::Changed));

        let evidence = Evidence::take(&image.path()).expect("a file");
        let copy = image.path().with_extension("copy");
        std::fs::copy(image.path(), &copy).and_then(|_| std::fs::rename(&copy, image.path())).expect("room");
        assert_eq!(evidence.check(&image.path()), Err(Doubt::Another));
        std::fs::remove_file(image.path()).expect("there");
        assert!(matches!(evidence.check(&image.path()), Err(Doubt::Unseen(_))));
    }

    /// A device's folder below /sys, of a partition if asked for.
    fn sysfs(stat: &str, iostats: &str, sequence: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir_all(folder.path().join("queue")).expect("room");
        std::fs::create_dir_all(folder.path().join("part")).expect("room");
        for (name, text) in [("stat", stat), ("part/stat", stat), ("queue/iostats", iostats), ("diskseq", sequence)] {
            std::fs::write(folder.path().join(name), text).expect("room");
        }
        folder
    }

    /// Goal: what the kernel counts is read from where it stands, of partitions too, and not believed where nothing is counted.
    #[test]
    fn counters_are_those_of_writes() {
        let line = "  1 2 3 4 50 6 700 8 0 10 11 12 13 1400 15 16 17\n";
        let counters = Counters { sequence: Some(9), written: 700, discarded: 1400 };
        let folder = sysfs(line, "1\n", "9\n");
        assert_eq!(Counters::read_in(folder.path()), Ok(counters));
        assert_eq!(Counters::read_in(&folder.path().join("part")), Ok(counters));
        let folder = sysfs(line, "0\n", "9\n");
        assert_eq!(Counters::read_in(folder.path()), Err(Doubt::NotCounted));
        assert_eq!(Counters::read_in(&folder.path().join("part")), Err(Doubt::NotCounted));
        let old = sysfs("1 2 3 4 5 6 700 8 9 10 11\n", "1\n", "x");
        let written = Counters { sequence: None, written: 700, discarded: 0 };
        assert_eq!(Counters::read_in(old.path()), Ok(written));
    }

    #[test]
    fn a_written_or_another_device_shows() {
        let before = Counters { sequence: Some(9), written: 700, discarded: 8 };
        assert_eq!(before.unchanged_since(&before), Ok(()));
        for (now, doubt) in [
            (Counters { written: 701, ..before }, Doubt::Written(1, 0)),
            (Counters { discarded: 16, ..before }, Doubt::Written(0, 8)),
            (Counters { written: 0, ..before }, Doubt::Another),
            (Counters { sequence: Some(10), ..before }, Doubt::Another),
            (Counters { sequence: None, ..before }, Doubt::Another),
        ] {
            assert_eq!(now.unchanged_since(&before), Err(doubt), "{now:?}");
        }
    }

    /// Goal: of a device the ends count, and only where they show every use. Method: a file stands in for it.
    #[test]
    fn both_ends_are_hashed() {
        let image = Image::new(4 * MIB);
        assert_eq!(ends(&image.path()).expect("read"), None, "nothing notes its use");
        let file = File::options().write(true).open(image.path()).expect("there");
        file.write_all_at(&[0x53, 0xef], 0x438).expect("room");
        let first = ends(&image.path()).expect("read");
        assert!(first.is_some());
        image.write(2 * MIB);
        assert_eq!(ends(&image.path()).expect("read"), first, "the middle is not in it");
        image.write(4 * MIB - 512);
        let second = ends(&image.path()).expect("read");
        assert_ne!(second, first);
        image.write(4096);
        assert_ne!(ends(&image.path()).expect("read"), second);
        let small = Image::new(4096);
        assert_eq!(ends(&small.path()).expect("read"), None);
    }

    /// Goal: file systems that note their use are known by what mkfs writes, and what only leads to one elsewhere is not taken for one.
    #[test]
    fn what_notes_its_use_is_known() {
        let with = |at: usize, bytes: &[u8]| {
            let mut start = vec![0; END_BYTES];
            start[at..at + bytes.len()].copy_from_slice(bytes);
            start
        };
        let mut xfs = with(0, b"XFSB");
        assert!(!notes_its_use(&xfs), "version 4 notes nothing at a mount");
        xfs[100..102].copy_from_slice(&[0xb4, 0xb5]);
        assert!(notes_its_use(&xfs));
        let raid = 0xa92b_4efc_u32.to_le_bytes();
        let others: [(usize, &[u8]); 4] =
            [(510, &[0x55, 0xaa]), (0, b"LUKS\xba\xbe"), (512, b"LABELONE"), (4096, &raid)];
        for (at, bytes) in others {
            let mut start = with(0x438, &[0x53, 0xef]);
            start[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(!notes_its_use(&start), "{bytes:x?} over an ext4 that was there before");
        }
        assert!(notes_its_use(&with(0x438, &[0x53, 0xef])) && notes_its_use(&with(0x1_0040, b"_BHRfS_M")));
        for other in
            [with(510, &[0x55, 0xaa]), with(512, b"LABELONE"), with(0, b"LUKS\xba\xbe"), with(0, b""), Vec::new()]
        {
            assert!(!notes_its_use(&other));
        }
    }

    /// Goal: evidence survives the state directory as it is.
    #[test]
    fn evidence_is_kept_as_text() {
        let counters = Counters { sequence: Some(9), written: 700, discarded: 8 };
        let device = Evidence::Device { boot: "b".into(), counters, ends: "ab".into(), in_use: true };
        let unnumbered = Evidence::Device {
            boot: "b".into(),
            counters: Counters { sequence: None, ..counters },
            ends: String::new(),
            in_use: false,
        };
        let file = Evidence::File { inode: u64::MAX.to_string(), size: 512, changed: "1.000000002".into() };
        for evidence in [device, unnumbered, file] {
            let text = toml::to_string(&evidence).expect("text");
            assert_eq!(toml::from_str::<Evidence>(&text).expect("what was written"), evidence, "{text}");
        }
    }
}
