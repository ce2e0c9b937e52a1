//! Writes a volume as it was at a point into a file or a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::SLOT_BYTES;
use farshore_uring::{BackingOptions, Direct, Storage, open_backing};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::error::{Error, IoContext, Kind, Result};
use crate::group::UpTo;
use crate::history::History;
use crate::reader::read_sectors;
use crate::view::{PointSlots, ViewOf};

/// Bytes between two reports of progress, and between two starts of write-back.
const REPORT_BYTES: u64 = 8 << 20;
/// Zeroes written at once where a device cannot zero by itself.
const ZERO_BYTES: usize = 1 << 20;

/// How far a restore is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Byte of the volume up to which the output is complete.
    pub position: u64,
    /// Bytes of the volume.
    pub size: u64,
    /// Bytes written; the rest so far is zero.
    pub written: u64,
}

/// Where a restore writes to, from the start to the end.
pub trait Output {
    /// Writes bytes.
    ///
    /// # Errors
    /// From the disk.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Makes a range zero, as a hole where that is possible.
    ///
    /// # Errors
    /// From the disk.
    fn zero(&mut self, offset: u64, len: u64) -> Result<()>;
    /// All is written: makes it durable.
    ///
    /// # Errors
    /// From the disk; then the output is not to be trusted.
    fn finish(&mut self) -> Result<()>;
}

/// Streams the volume as of a point to `out`. Everything read is verified on the way; damage ends it with an error that names
/// the bytes. The caller keeps the point by a hold. `progress` may end it by giving `false`.
///
/// # Durability
/// The output is durable when this returns `Ok`.
///
/// # Errors
/// [`Kind::Damaged`]; [`Kind::Refused`] when `progress` ended it; otherwise from the disks.
pub fn restore<S: Storage>(
    history: &dyn History<S>,
    of: &ViewOf,
    out: &mut impl Output,
    mut progress: impl FnMut(Progress) -> bool,
) -> Result<Progress> {
    let upto = UpTo::end_of(of.point.batch);
    let mut slots = PointSlots::new(history, of.volume, upto);
    let mut state = Progress { position: 0, size: of.size, written: 0 };
    let mut reported = 0;
    let mut bytes = vec![0; usize::try_from(SLOT_BYTES).expect("64 KiB")];
    while state.position < of.size {
        let next = slots.next(state.position / SLOT_BYTES)?;
        let start = next.map_or(of.size, |next| (next.slot * SLOT_BYTES).clamp(state.position, of.size));
        if start > state.position {
            out.zero(state.position, start - state.position)?;
            state.position = start;
        }
        if let Some(next) = next.filter(|_| start < of.size) {
            let len = (of.size - start).min(SLOT_BYTES);
            let bytes = &mut bytes[..usize::try_from(len).expect("at most a slot")];
            read_sectors(history, of.volume, next.slot, 0, upto, bytes)?;
            if crate::base::is_zero(bytes) {
                out.zero(start, len)?;
            } else {
                out.write(start, bytes)?;
                state.written += len;
            }
            state.position = start + len;
        }
        if (state.position >= reported + REPORT_BYTES || state.position == of.size) && !progress(state) {
            return Err(Error::new(Kind::Refused, "restore was stopped; its output is incomplete"));
        }
        reported = state.position / REPORT_BYTES * REPORT_BYTES;
    }
    out.finish()?;
    Ok(state)
}

/// A new sparse file, or a block device.
#[derive(Debug)]
pub struct FileOutput {
    file: Arc<File>,
    path: PathBuf,
    size: u64,
    /// A fresh file reads as zeroes where nothing was written.
    is_new: bool,
    /// The device zeroes by itself.
    can_punch: bool,
}

impl FileOutput {
    /// Prepares `path` for a volume of `size` bytes: makes a new file, or opens a block device that nobody else uses.
    ///
    /// # Errors
    /// [`Kind::Refused`] for a file that exists, a device that is in use or smaller than the volume, or what is neither;
    /// otherwise from the disk.
    pub fn open(path: &Path, size: u64) -> Result<Self> {
        let refuse = |why: String| Err(Error::new(Kind::Refused, format!("restore to {}: {why}", path.display())));
        match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::create(path, size),
            Err(error) => Err(Error::io("look at", path, error)),
            Ok(found) if found.file_type().is_block_device() => Self::device(path, size),
            Ok(found) if found.is_file() => {
                refuse("the file exists; name a new one, or remove it first (nothing was changed)".to_owned())
            }
            Ok(_) => refuse("is neither a new file nor a block device".to_owned()),
        }
    }

    fn create(path: &Path, size: u64) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).at("create", path)?;
        file.set_len(size).at("extend", path)?;
        Ok(Self { file: Arc::new(file), path: path.to_owned(), size, is_new: true, can_punch: true })
    }

    fn device(path: &Path, size: u64) -> Result<Self> {
        let options = BackingOptions { direct: Direct::Off, read_only: false };
        let backing = open_backing(path, options).map_err(|error| {
            if error.kind() == io::ErrorKind::ResourceBusy {
                let text = format!("restore to {}: the device is in use (mounted, or part of another)", path.display());
                return Error::new(Kind::Refused, text);
            }
            Error::io("open", path, error)
        })?;
        let found = backing.geometry.size;
        if found < size {
            let text = format!("restore to {}: the device has {found} bytes, the volume {size}", path.display());
            return Err(Error::new(Kind::Refused, text));
        }
        Ok(Self { file: backing.file, path: path.to_owned(), size, is_new: false, can_punch: true })
    }
}

impl Output for FileOutput {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).at("write", &self.path)
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<()> {
        if self.is_new {
            return Ok(());
        }
        if self.can_punch {
            // On a block device the kernel unmaps and zeroes: the range reads as zeroes in any case.
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let signed = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into());
            let range = signed(offset).and_then(|offset| Ok((offset, signed(len)?))).at("zero", &self.path)?;
            match fallocate(&*self.file, mode, range.0, range.1) {
                Ok(()) => return Ok(()),
                Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => self.can_punch = false,
                Err(error) => return Err(Error::io("zero a range of", &self.path, error.into())),
            }
        }
        let zeroes = vec![0; ZERO_BYTES];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(ZERO_BYTES).min(ZERO_BYTES);
            self.file.write_all_at(&zeroes[..bytes], at).at("write", &self.path)?;
            at += bytes as u64;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        debug_assert!(
            !self.is_new || self.file.metadata().is_ok_and(|found| found.len() == self.size),
            "the file keeps its size"
        );
        self.file.sync_all().at("sync", &self.path)?;
        if self.is_new
            && let Some(folder) = self.path.parent()
        {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).at("sync folder", folder)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_there_already() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("out");
        std::fs::write(&path, b"precious")?;
        let error = FileOutput::open(&path, 4096).expect_err("the file exists");
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.context().contains("exists"), "{error}");
        assert_eq!(std::fs::read(&path)?, b"precious");
        assert_eq!(FileOutput::open(folder.path(), 4096).expect_err("a folder").kind(), Kind::Refused);
        Ok(())
    }

    #[test]
    fn new_files_are_sparse_and_of_full_size() -> std::result::Result<(), Box<dyn std::error::Error>> {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("out");
        let mut out = FileOutput::open(&path, 1 << 30)?;
        out.zero(0, 1 << 29)?;
        out.write(1 << 29, &[7; 4096])?;
        out.finish()?;
        let found = std::fs::metadata(&path)?;
        assert_eq!(found.len(), 1 << 30);
        assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
        Ok(())
    }
}
