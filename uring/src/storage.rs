//! Files and folders behind a trait, so that the target and the state directories run on a real file system and on the
//! simulated one that loses what was not synced.
//!
//! Calls block; they belong on the target's own threads, never on a front end's queue thread of a *protected* device.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::BackingId;

/// One open file; positioned I/O from any thread.
pub trait StorageFile: Send + Sync + 'static {
    /// Reads exactly `buf.len()` bytes at `offset`; `UnexpectedEof` past the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`. Not durable until [`Self::sync`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of `buf` at `offset`, then makes the file's data durable (one linked submission on the real ring).
    fn write_sync_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(buf, offset)?;
        self.sync()
    }
    /// `fdatasync`. After an error the file's durable content is unknown: never retry and believe.
    fn sync(&self) -> io::Result<()>;
    /// Bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Grows (with a hole) or cuts.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Deallocates; the range reads as zeroes afterwards.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves blocks without changing the content (`fallocate` with KEEP_SIZE).
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Start of the first data at or after `offset` (`SEEK_DATA`); `None`: only a hole follows.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// Start of the first hole at or after `offset` (`SEEK_HOLE`; the end of the file counts as one).
    fn next_hole(&self, offset: u64) -> io::Result<u64>;
    /// Bytes of disk space that the content takes now; of a block device all of it.
    fn allocated(&self) -> io::Result<u64>;
    /// Starts write-back of the range without waiting (`sync_file_range`); a hint.
    fn start_writeback(&self, _offset: u64, _len: u64) {}
    /// The range will be read soon: starts reading it into the page cache, where there is one; a hint.
    fn will_need(&self, _offset: u64, _len: u64) {}
}

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Must exist.
    Read,
    /// Must exist.
    ReadWrite,
    /// Must not exist.
    CreateNew,
}

/// A block device that was opened by [`Storage::open_device`].
///
/// Its file has a fixed length; [`StorageFile::set_len`] beyond or below it is an error. It knows no holes: all of it counts
/// as data, and [`StorageFile::punch_hole`] makes a range zero by the device's own means where it has some. Ranges need no
/// alignment, but two threads must not write to the same logical block at once.
#[derive(Debug)]
pub struct Device<F> {
    /// Its content.
    pub file: Arc<F>,
    /// Bytes.
    pub size: u64,
    /// Which device it is.
    pub id: BackingId,
}

/// A tree of files below one root. Cheap to clone. Paths are relative to the root.
///
/// A created, renamed or removed *name* is durable only after [`Storage::sync_dir`] of its folder.
pub trait Storage: Clone + Send + Sync + 'static {
    /// Its files.
    type File: StorageFile;

    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<Self::File>>;
    /// Creates the folder and its missing parents, durably.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Names in a folder, sorted; `NotFound` if there is none.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
    /// Whether the name exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Atomically replaces `to`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file's name; open handles stay usable.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Bytes free for us on the file system.
    fn free_bytes(&self) -> io::Result<u64>;
    /// Opens a block device for reading and writing, which lies outside of the tree: `path` is absolute. Nobody else, this
    /// process included, can open it so while the file is open.
    ///
    /// # Errors
    /// `ResourceBusy` (mounted, or claimed by somebody), `InvalidInput` (no block device), `ReadOnlyFilesystem`, and what
    /// opening gives.
    fn open_device(&self, path: &Path) -> io::Result<Device<Self::File>>;
}

/// Replaces `path` by a file with exactly `bytes`, durably and atomically: temporary file, sync, rename, sync of the folder.
///
/// # Errors
/// The first error of these; then `path` is as before or holds the new bytes, never a mixture.
pub fn replace_file<S: Storage>(storage: &S, path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_files(storage, &[path], bytes)
}

/// As [`replace_file`] for several files of one folder with the same content, by one sync of that folder.
///
/// # Errors
/// As [`replace_file`], for each of them; some may be as before and others hold the new bytes.
///
/// # Panics
/// When the files are not all in one folder.
pub fn replace_files<S: Storage>(storage: &S, paths: &[&Path], bytes: &[u8]) -> io::Result<()> {
    let Some(folder) = paths.first().map(|path| path.parent().unwrap_or(Path::new(""))) else { return Ok(()) };
    assert!(paths.iter().all(|path| path.parent().unwrap_or(Path::new("")) == folder), "files of one folder");
    let temporary = |path: &Path| {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        folder.join(name)
    };
    for path in paths {
        let temporary = temporary(path);
        if storage.exists(&temporary)? {
            storage.remove(&temporary)?;
        }
        storage.open(&temporary, OpenMode::CreateNew)?.write_sync_at(bytes, 0)?;
    }
    for path in paths {
        storage.rename(&temporary(path), path)?;
    }
    storage.sync_dir(folder)
}
