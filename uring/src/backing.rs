//! Opening what a device stands on: a file or a block device, exclusively, with its limits and its identity.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::Geometry;
use crate::clock::now;

/// Whether I/O passes the page cache.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Direct {
    /// `O_DIRECT` where the file system reports alignments that suit the advertised logical block, else cached.
    #[default]
    Auto,
    /// `O_DIRECT`, or an error.
    On,
    /// Through the page cache.
    Off,
}

/// How to open a [`Backing`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct BackingOptions {
    /// Page cache or not.
    pub direct: Direct,
    /// Open for reading only. Files are then shared with other readers.
    pub read_only: bool,
}

/// An open file or block device, held exclusively until the last clone of `file` is dropped.
#[derive(Clone, Debug)]
pub struct Backing {
    /// Positioned I/O only; its seek position is nobody's.
    pub file: Arc<File>,
    /// Shape and limits that follow from it.
    pub geometry: Geometry,
    /// Opened with `O_DIRECT`.
    pub direct: bool,
    /// A block device (else a regular file).
    pub is_block_device: bool,
    /// Which one it is.
    pub id: BackingId,
}

/// Tells "the same device as before": compare for equality, keep as text.
///
/// Of a file: device, inode, birth time (where the file system has one) and size. Of a block device: its WWID, serial
/// number, device-mapper UUID or name, or RAID UUID (its major and minor number where it has none of these), a partition's number
/// and start, and size.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct BackingId(String);

impl BackingId {
    /// From its text form, as kept.
    #[must_use]
    pub fn from_text(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Of a block device, without opening it: it may be in use, or wait for its server. And its size in bytes.
    ///
    /// # Errors
    /// `InvalidInput`: it is no block device; else as the look at it fails.
    pub fn of_block_device(path: &Path) -> io::Result<(Self, u64)> {
        let status = std::fs::metadata(path)?;
        if !status.file_type().is_block_device() {
            return Err(invalid("is no block device"));
        }
        let folder = sys_folder(status.rdev()).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let sectors = read_attribute(&folder.join("size")).and_then(|text| text.parse::<u64>().ok());
        let size = sectors.ok_or_else(|| invalid("its size is not shown in /sys"))? * u64::from(SECTOR);
        Ok((block_id(status.rdev(), size), size))
    }

    /// Whether both are of one device, which may have grown or shrunk.
    #[must_use]
    pub fn is_same_but_for_size(&self, other: &Self) -> bool {
        let without = |id: &str| id.rsplit_once(" size=").map(|(device, _)| device.to_owned());
        without(&self.0).is_some_and(|device| without(&other.0) == Some(device))
    }

    /// One line, no control characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Longest read or write. Long enough to stream (nbdkit and QEMU use 64 KiB to 2 MiB), short enough that 64 of them at once
/// stay below 64 MiB of buffers.
const REQUEST_MAX: u32 = 1 << 20;

/// Longest discard or write-zeroes: one `fallocate` of this size stays in the milliseconds on ext4 and XFS.
const DISCARD_MAX: u32 = 1 << 30;

const SECTOR: u32 = 512;
const PAGE: u32 = 4096;

/// Opens `path` for serving it: a block device with `O_EXCL`, a file under `flock`, so that neither is mounted, in use by
/// device-mapper, or served twice.
///
/// # Errors
/// - `ErrorKind::ResourceBusy` (block device mounted or claimed) and `ErrorKind::WouldBlock` (file locked by another
///   process), still so after 2 s: stop the other user first.
/// - `InvalidInput`: neither file nor block device, or a size that is not a multiple of 512 bytes.
/// - `Unsupported`: [`Direct::On`] where the file system cannot, or not with this size; use `Auto` or `Off`.
pub fn open_backing(path: &Path, options: BackingOptions) -> io::Result<Backing> {
    let named = |error: io::Error| io::Error::new(error.kind(), Named { path: path.to_owned(), source: error });
    open_unnamed(path, options).map_err(named)
}

/// The path; reason and error number stay reachable through `source`.
#[derive(Debug, thiserror::Error)]
#[error("open backing device {}", path.display())]
struct Named {
    path: PathBuf,
    source: io::Error,
}

fn open_unnamed(path: &Path, options: BackingOptions) -> io::Result<Backing> {
    let kind = std::fs::metadata(path)?.file_type();
    let is_block_device = kind.is_block_device();
    if !is_block_device && !kind.is_file() {
        return Err(invalid("neither a regular file nor a block device"));
    }
    let file = retried(|| open_exclusive(path, is_block_device, options.read_only))?;
    if file.metadata()?.file_type() != kind {
        return Err(invalid("was replaced while it was opened"));
    }

    let limits = if is_block_device { block_limits(&file)? } else { file_limits(&file)? };
    if limits.size % u64::from(SECTOR) != 0 {
        return Err(invalid("the size is not a multiple of 512 bytes: grow it with `truncate --size %512`"));
    }
    let logical_direct = direct_block(&limits, options.direct)?;
    if logical_direct.is_some() {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT))?;
    }
    let logical_block = logical_direct.unwrap_or(limits.logical_block);
    let read_only = options.read_only || limits.read_only;
    let geometry = Geometry {
        size: limits.size,
        logical_block,
        optimal_block: limits.optimal_block.next_power_of_two().clamp(logical_block, REQUEST_MAX),
        max_request: REQUEST_MAX,
        max_discard: DISCARD_MAX,
        read_only,
        discard: !read_only && limits.discard,
    };
    let id =
        if is_block_device { block_id(file.metadata()?.rdev(), limits.size) } else { file_id(&file, limits.size)? };
    Ok(Backing { file: Arc::new(file), geometry, direct: logical_direct.is_some(), is_block_device, id })
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// How long the previous owner may take to let go. A killed process keeps its files until the kernel has torn down its
/// rings and ended their I/O: milliseconds, unless the disk hangs.
const RELEASE_WAIT: Duration = Duration::from_secs(2);

fn retried(open: impl Fn() -> io::Result<File>) -> io::Result<File> {
    let deadline = now() + RELEASE_WAIT;
    loop {
        match open() {
            Err(error) if is_in_use(&error) && now() < deadline => {
                // Waits 10 ms for nothing; there is no event for "the lock was released".
                let _ = nix::poll::poll(&mut [], 10u8);
            }
            other => return other,
        }
    }
}

fn is_in_use(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy)
}

fn open_exclusive(path: &Path, is_block_device: bool, read_only: bool) -> io::Result<File> {
    // O_EXCL without O_CREAT is defined for block devices only.
    let exclusive = if is_block_device { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(exclusive).open(path)?;
    if !is_block_device {
        lock(&file, read_only)?;
    }
    Ok(file)
}

fn lock(file: &File, shared: bool) -> io::Result<()> {
    let locked = if shared { file.try_lock_shared() } else { file.try_lock() };
    locked.map_err(|error| match error {
        std::fs::TryLockError::WouldBlock => {
            io::Error::new(io::ErrorKind::WouldBlock, "in use: another process holds its lock (flock)")
        }
        std::fs::TryLockError::Error(error) => error,
    })
}

struct Limits {
    size: u64,
    logical_block: u32,
    optimal_block: u32,
    /// Alignment of offsets and lengths that `O_DIRECT` asks for; `None`: unknown, `Some(0)`: no `O_DIRECT`.
    direct_align: Option<u32>,
    read_only: bool,
    discard: bool,
}

/// The logical block to advertise with `O_DIRECT`; `None`: go through the cache.
fn direct_block(limits: &Limits, wish: Direct) -> io::Result<Option<u32>> {
    let block = match limits.direct_align {
        Some(0) => None,
        Some(align) if align <= limits.logical_block => Some(limits.logical_block),
        Some(align) if align > PAGE => None,
        None if wish == Direct::Auto => None,
        // What every disk file system takes.
        Some(_) | None => Some(PAGE),
    };
    let block = block.filter(|&block| limits.size.is_multiple_of(u64::from(block)));
    match wish {
        Direct::Off => Ok(None),
        Direct::Auto => Ok(block),
        Direct::On if block.is_some() => Ok(block),
        Direct::On => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "direct I/O is not possible here: the file system has none, or its alignment does not divide the size",
        )),
    }
}

fn file_limits(file: &File) -> io::Result<Limits> {
    let size = file.metadata()?.len();
    let status = extended_status(file)?;
    let writable = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?).contains(OFlag::O_RDWR);
    Ok(Limits {
        size,
        logical_block: SECTOR,
        optimal_block: status.stx_blksize,
        direct_align: direct_align(&status),
        read_only: false,
        discard: writable && punches_holes(file, size),
    })
}

/// Asks for a hole where nothing is: behind the end. Changes no content and no size.
fn punches_holes(file: &File, size: u64) -> bool {
    use nix::fcntl::{FallocateFlags, fallocate};
    let Ok(end) = i64::try_from(size.next_multiple_of(u64::from(PAGE))) else { return false };
    fallocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, end, i64::from(PAGE))
        .is_ok()
}

fn direct_align(status: &libc::statx) -> Option<u32> {
    if status.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    // Our buffers are page-aligned; a file system that wants more cannot be served directly.
    if status.stx_dio_mem_align > PAGE { Some(0) } else { Some(status.stx_dio_offset_align) }
}

fn extended_status(file: &File) -> io::Result<libc::statx> {
    // SAFETY: `statx` is a C struct of integers, for which all zeroes is a value.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_DIOALIGN;
    // SAFETY: the descriptor is open for the borrow of `file`; the path is an empty C string, which with AT_EMPTY_PATH means
    // the descriptor itself; `status` is writable and of the kernel's type.
    let failed =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut status) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(status) }
}

mod ioctl {
    //! `linux/fs.h`.
    nix::ioctl_read_bad!(block_size, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(physical_block_size, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_read_bad!(read_only, nix::request_code_none!(0x12, 94), libc::c_int);
    nix::ioctl_read!(size_bytes, 0x12, 114, usize);
}

fn block_limits(file: &File) -> io::Result<Limits> {
    let raw = file.as_raw_fd();
    let (mut size, mut logical, mut physical, mut read_only) = (0usize, 0, 0, 0);
    // SAFETY: the descriptor is open for the borrow of `file`; BLKGETSIZE64 writes a u64 (`size_t` in its definition, 64 bits
    // on every platform with io_uring that we build for).
    unsafe { ioctl::size_bytes(raw, &raw mut size) }?;
    // SAFETY: as above; BLKSSZGET writes an int.
    unsafe { ioctl::block_size(raw, &raw mut logical) }?;
    // SAFETY: as above; BLKPBSZGET writes an unsigned int.
    unsafe { ioctl::physical_block_size(raw, &raw mut physical) }?;
    // SAFETY: as above; BLKROGET writes an int.
    unsafe { ioctl::read_only(raw, &raw mut read_only) }?;
    let logical_block = u32::try_from(logical).ok().filter(|&block| block == SECTOR || block == PAGE);
    let logical_block = logical_block.ok_or_else(|| invalid("the logical block is neither 512 nor 4096 bytes"))?;
    let unmap = queue_attribute(file, "write_zeroes_max_bytes").and_then(|text| text.parse::<u64>().ok());
    Ok(Limits {
        size: size as u64,
        logical_block,
        optimal_block: physical.max(PAGE),
        direct_align: Some(logical_block),
        read_only: read_only != 0,
        // Without it the kernel refuses to unmap with zeroes; we would write them, which is no discard.
        discard: unmap.is_some_and(|bytes| bytes > 0),
    })
}

/// The device's folder below `/sys`; of a partition its own.
fn sys_folder(number: u64) -> Option<PathBuf> {
    let (major, minor) = (libc::major(number), libc::minor(number));
    std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()
}

fn read_attribute(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let text: String = text.trim().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if text.is_empty() { None } else { Some(text) }
}

fn queue_attribute(file: &File, name: &str) -> Option<String> {
    let folder = sys_folder(file.metadata().ok()?.rdev())?;
    let disk = if folder.join("partition").exists() { folder.parent()?.to_owned() } else { folder };
    read_attribute(&disk.join("queue").join(name))
}

fn block_id(number: u64, size: u64) -> BackingId {
    let numbers = format!("numbers={}:{}", libc::major(number), libc::minor(number));
    match sys_folder(number) {
        Some(folder) => described_id(&folder, numbers, size),
        None => BackingId(format!("block {numbers} size={size}")),
    }
}

/// From the device's folder below `/sys`.
fn described_id(folder: &Path, numbers: String, size: u64) -> BackingId {
    let partition = read_attribute(&folder.join("partition"));
    let disk = match (&partition, folder.parent()) {
        (Some(_), Some(parent)) => parent,
        (Some(_) | None, _) => folder,
    };
    let sources = [
        ("uuid", "dm/uuid"),
        ("name", "dm/name"),
        ("uuid", "md/uuid"),
        ("wwid", "wwid"),
        ("wwid", "device/wwid"),
        ("serial", "serial"),
        ("serial", "device/serial"),
    ];
    let found = sources.iter().find_map(|(name, path)| {
        // A RAID without a superblock shows a UUID of zeroes, as all of its kind do.
        let value = read_attribute(&disk.join(path)).filter(|value| value.chars().any(|c| !matches!(c, '0' | '-')))?;
        Some(format!("{name}={value}"))
    });
    let place = partition.map(|part| {
        let start = read_attribute(&folder.join("start")).unwrap_or_else(|| "unknown".to_owned());
        format!(" partition={part} start={start}")
    });
    BackingId(format!("block {}{} size={size}", found.unwrap_or(numbers), place.unwrap_or_default()))
}

fn file_id(file: &File, size: u64) -> io::Result<BackingId> {
    let status = extended_status(file)?;
    let device = format!("{}:{}", status.stx_dev_major, status.stx_dev_minor);
    let birth = if status.stx_mask & libc::STATX_BTIME == 0 {
        "unknown".to_owned()
    } else {
        format!("{}.{:09}", status.stx_btime.tv_sec, status.stx_btime.tv_nsec)
    };
    Ok(BackingId(format!("file device={device} inode={} birth={birth} size={size}", status.stx_ino)))
}

/// Start of the first data at or after `offset`; `None`: only a hole follows, or `offset` is at or past the end.
pub(crate) fn seek_data(file: BorrowedFd<'_>, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, nix::unistd::Whence::SeekData)
}

/// Start of the first hole at or after `offset`, the end of the file being one; `None`: `offset` is at or past the end.
pub(crate) fn seek_hole(file: BorrowedFd<'_>, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, nix::unistd::Whence::SeekHole)
}

fn seek(file: BorrowedFd<'_>, offset: u64, whence: nix::unistd::Whence) -> io::Result<Option<u64>> {
    let Ok(offset) = i64::try_from(offset) else { return Ok(None) };
    match nix::unistd::lseek64(file, offset, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_grew_is_the_same() {
        let id = BackingId::from_text;
        let old = id("block uuid=LVM-abc size=512");
        assert!(old.is_same_but_for_size(&id("block uuid=LVM-abc size=1024")));
        assert!(!old.is_same_but_for_size(&id("block uuid=LVM-abd size=512")));
        assert!(!id("odd").is_same_but_for_size(&id("odd")), "without a size it is none of ours");
        let error = BackingId::of_block_device(Path::new("/dev/null")).expect_err("a character device");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    /// Goal: RAID arrays are told apart, and partitions of one number and size by where they begin.
    #[test]
    fn an_identity_names_array_and_partition() {
        let sys = tempfile::tempdir().expect("a temporary folder");
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            std::fs::create_dir_all(path.parent().expect("has one")).expect("a good disk");
            std::fs::write(path, text).expect("a good disk");
        };
        let id = |folder: &str| described_id(&sys.path().join(folder), "numbers=9:0".to_owned(), 512).0;
        write("md0/md/uuid", "00000000-0000-0000-0000-000000000000\n");
        assert_eq!(id("md0"), "block numbers=9:0 size=512");
        write("md0/md/uuid", "5a8f0d2c-0000-0000-0000-000000000001\n");
        assert_eq!(id("md0"), "block uuid=5a8f0d2c-0000-0000-0000-000000000001 size=512");
        // Numbers of the device mapper are given anew at each boot.
        write("dm-0/dm/uuid", "\n");
        write("dm-0/dm/name", "data\n");
        assert_eq!(id("dm-0"), "block name=data size=512");
        write("dm-0/dm/uuid", "LVM-abc\n");
        assert_eq!(id("dm-0"), "block uuid=LVM-abc size=512");
        write("vda/vda1/partition", "1\n");
        write("vda/vda1/start", "2048\n");
        assert_eq!(id("vda/vda1"), "block numbers=9:0 partition=1 start=2048 size=512");
        write("vda/serial", "S\n");
        assert_eq!(id("vda/vda1"), "block serial=S partition=1 start=2048 size=512");
    }
}
