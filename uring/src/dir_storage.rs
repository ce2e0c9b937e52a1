//! [`Storage`] on a real file system.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::backing::{seek_data, seek_hole};
use crate::device_file::DeviceFile;
use crate::{AlignedBuf, BackingOptions, Device, Direct, OpenMode, Storage, StorageFile, open_backing};

/// Folders remembered as durable; beyond it all are forgotten, and synced once more when they are asked for again (I11).
const FOLDERS_MAX: usize = 1 << 16;

/// A folder and what is below it.
#[derive(Clone, Debug)]
pub struct DirStorage {
    root: Arc<Path>,
    /// Folders whose names this process has made durable, so that asking for one again costs no sync.
    durable: Arc<Mutex<BTreeSet<PathBuf>>>,
    /// A regular file may stand for a device.
    file_devices: bool,
}

impl DirStorage {
    /// The tree below `root`, which must be a folder.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`.
    pub fn open(root: &Path) -> io::Result<Self> {
        let root = std::fs::canonicalize(root)?;
        if !root.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { root: root.into(), durable: Arc::default(), file_devices: false })
    }

    /// Lets [`Storage::open_device`] take regular files too, so that what stands on devices can be tried without one. For tests.
    #[must_use]
    pub fn with_files_as_devices(self) -> Self {
        Self { file_devices: true, ..self }
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn durable_folders(&self) -> std::sync::MutexGuard<'_, BTreeSet<PathBuf>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        check_relative(path)?;
        Ok(self.root.join(path))
    }
}

/// Paths stay below the root.
pub(crate) fn check_relative(path: &Path) -> io::Result<()> {
    if path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Ok(());
    }
    let message = format!("path {} leads out of the storage's root", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, message))
}

impl Storage for DirStorage {
    type File = DirFile;

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<DirFile>> {
        let path = self.resolve(path)?;
        let write = mode != OpenMode::Read;
        let create = mode == OpenMode::CreateNew;
        let file = OpenOptions::new().read(true).write(write).create_new(create).open(path)?;
        Ok(Arc::new(DirFile(Inner::File(PlainFile::new(file)))))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        check_relative(path)?;
        let mut folder = self.root.to_path_buf();
        for part in path.components() {
            let parent = folder.clone();
            folder.push(part);
            match std::fs::create_dir(&folder) {
                Ok(()) => {}
                // Perhaps made by somebody who did not get to the sync; not if that was this process.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {
                    if self.durable_folders().contains(&folder) {
                        continue;
                    }
                }
                Err(error) => return Err(error),
            }
            File::open(parent)?.sync_all()?;
            let mut durable = self.durable_folders();
            if durable.len() >= FOLDERS_MAX {
                durable.clear();
            }
            durable.insert(folder.clone());
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(self.resolve(path)?)?;
        let mut names =
            entries.map(|entry| entry.map(|entry| entry.file_name().into())).collect::<io::Result<Vec<PathBuf>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match std::fs::symlink_metadata(self.resolve(path)?) {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(self.resolve(from)?, self.resolve(to)?)?;
        // Where a folder moved, others have its place and its children's.
        if self.resolve(to)?.is_dir() {
            self.durable_folders().clear();
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(self.resolve(path)?)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(self.resolve(path)?)?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let status = nix::sys::statvfs::statvfs(&*self.root)?;
        Ok(status.blocks_available().saturating_mul(status.fragment_size()))
    }

    fn open_device(&self, path: &Path) -> io::Result<Device<DirFile>> {
        let invalid = |message| Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        if !path.is_absolute() {
            return invalid("a device is named by its whole path");
        }
        if !std::fs::metadata(path)?.file_type().is_block_device() && !self.file_devices {
            return invalid("is no block device");
        }
        let backing = open_backing(path, BackingOptions { direct: Direct::Auto, read_only: false })?;
        if backing.geometry.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let (size, id) = (backing.geometry.size, backing.id.clone());
        Ok(Device { file: Arc::new(DirFile(Inner::Device(DeviceFile::new(backing)))), size, id })
    }
}

/// One file of a [`DirStorage`], or a device that it opened.
///
/// [`StorageFile::write_sync_at`] is a `pwrite` and an `fdatasync`: a linked pair on a ring saves one system call, but hands
/// both to kernel workers (measured: 32 µs more per call on tmpfs, nothing gained on ext4).
#[derive(Debug)]
pub struct DirFile(Inner);

#[derive(Debug)]
enum Inner {
    File(PlainFile),
    Device(DeviceFile),
}

/// A regular file. Long aligned writes go past the page cache: what is written once and read rarely (a journal) would be copied
/// there and push out what is read often, and a page of the cache costs more than the write it saves. All else is cached; the
/// kernel keeps both in step, and `fdatasync` covers both.
#[derive(Debug)]
struct PlainFile {
    file: File,
    /// The same file without a cache, opened at the first long write; none where the file system has no such thing.
    direct: OnceLock<Option<File>>,
}

/// Shortest write that goes past the cache, in bytes. Below it the cache's copy is cheaper than waiting for the device.
const DIRECT_MIN: usize = 64 << 10;

impl PlainFile {
    fn new(file: File) -> Self {
        Self { file, direct: OnceLock::new() }
    }

    fn direct(&self) -> Option<&File> {
        let open = || {
            // By its descriptor: the file may have been renamed.
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).ok()
        };
        self.direct.get_or_init(open).as_ref()
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let long = buf.len() / AlignedBuf::ALIGN * AlignedBuf::ALIGN;
        let aligned =
            offset.is_multiple_of(AlignedBuf::ALIGN as u64) && buf.as_ptr().addr().is_multiple_of(AlignedBuf::ALIGN);
        if long < DIRECT_MIN || !aligned {
            return self.file.write_all_at(buf, offset);
        }
        let Some(direct) = self.direct() else { return self.file.write_all_at(buf, offset) };
        match direct.write_all_at(&buf[..long], offset) {
            Ok(()) => self.file.write_all_at(&buf[long..], offset + long as u64),
            // Coarser rules than ours: the cache knows none.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.file.write_all_at(buf, offset),
            Err(error) => Err(error),
        }
    }
}

impl StorageFile for DirFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.0 {
            Inner::File(plain) => plain.file.read_exact_at(buf, offset),
            Inner::Device(device) => device.read_at(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match &self.0 {
            Inner::File(file) => file.write_at(buf, offset),
            Inner::Device(device) => device.write_at(buf, offset),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match &self.0 {
            Inner::File(plain) => plain.file.sync_data(),
            Inner::Device(device) => device.sync(),
        }
    }

    fn len(&self) -> io::Result<u64> {
        match &self.0 {
            // Of a block device, opened by its name, the metadata has none.
            Inner::File(plain) => (&plain.file).seek(SeekFrom::End(0)),
            Inner::Device(device) => Ok(device.size()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match &self.0 {
            Inner::File(plain) => plain.file.set_len(len),
            Inner::Device(device) if device.size() == len => Ok(()),
            Inner::Device(_) => Err(io::Error::new(io::ErrorKind::InvalidInput, "a device keeps its size")),
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = match &self.0 {
            Inner::File(plain) => &plain.file,
            Inner::Device(device) => return device.zero(offset, len),
        };
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match allocate(file, hole, offset, len) {
            Err(error) if is_unsupported(&error) => write_zeroes(file, offset, len),
            other => other,
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let Inner::File(plain) = &self.0 else { return Ok(()) };
        match allocate(&plain.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
            // There is nothing to be had from such a file system; its space is found when it is written.
            Err(error) if is_unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match &self.0 {
            Inner::File(plain) => seek_data(plain.file.as_fd(), offset),
            Inner::Device(device) => Ok((offset < device.size()).then_some(offset)),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        match &self.0 {
            Inner::File(plain) => Ok(seek_hole(plain.file.as_fd(), offset)?.unwrap_or(offset)),
            Inner::Device(device) => Ok(device.size().max(offset)),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        match &self.0 {
            // Of 512 bytes each, whatever the file system's block.
            Inner::File(plain) => Ok(plain.file.metadata()?.blocks() * 512),
            Inner::Device(device) => Ok(device.size()),
        }
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        let Inner::File(PlainFile { file, .. }) = &self.0 else { return };
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return };
        // SAFETY: the descriptor is open for the borrow of `file`; no memory is passed. A hint: errors do not matter.
        let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn will_need(&self, offset: u64, len: u64) {
        let Inner::File(PlainFile { file, .. }) = &self.0 else { return };
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return };
        // SAFETY: the descriptor is open for the borrow of `file`; no memory is passed. A hint: errors do not matter.
        let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, len, libc::POSIX_FADV_WILLNEED) };
    }
}

/// Zeroes per write where holes are not supported.
const ZERO_WRITE_BYTES: usize = 64 << 10;

pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

pub(crate) fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let too_far = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let (offset, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
    Ok(fallocate(file, flags, offset, len)?)
}

fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    static ZEROES: [u8; ZERO_WRITE_BYTES] = [0; ZERO_WRITE_BYTES];
    let end = offset.saturating_add(len).min(file.metadata()?.len());
    let mut at = offset;
    while at < end {
        let bytes = usize::try_from(end - at).map_or(ZERO_WRITE_BYTES, |left| left.min(ZERO_WRITE_BYTES));
        file.write_all_at(&ZEROES[..bytes], at)?;
        at += bytes as u64;
    }
    Ok(())
}
