//! Files and devices that are the agent's alone: opened so that no other agent writes them, and not touched if they are something else.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use farshore_uring::{DirFile, DirStorage, OpenMode, Storage};

use crate::state::lock_alone;

/// Opens it, or makes a file. It is ours for as long as what is returned lives.
pub(crate) fn open(path: &Path) -> io::Result<(Arc<DirFile>, Option<File>)> {
    if is_device(path) {
        // Opened so that nobody else can.
        return Ok((DirStorage::open(Path::new("/"))?.open_device(path)?.file, None));
    }
    let (parent, name) = (path.parent().filter(|parent| !parent.as_os_str().is_empty()), path.file_name());
    let name = Path::new(name.ok_or(io::ErrorKind::InvalidInput)?);
    let storage = DirStorage::open(parent.unwrap_or(Path::new(".")))?;
    let mode = if storage.exists(name)? { OpenMode::ReadWrite } else { OpenMode::CreateNew };
    let file = storage.open(name, mode)?;
    if mode == OpenMode::CreateNew {
        storage.sync_dir(Path::new(""))?;
    }
    let lock = File::options().read(true).write(true).open(path)?;
    lock_alone(&lock)?;
    Ok((file, Some(lock)))
}

/// A block device stands there.
pub(crate) fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|status| status.file_type().is_block_device())
}

/// It begins with something, and that is not `ours`. What cannot be opened is said where it is opened to be used.
pub(crate) fn holds_something_else(path: &Path, ours: fn(&[u8]) -> bool) -> bool {
    let mut start = [0; 4096];
    let read = File::open(path).and_then(|mut file| file.read(&mut start));
    read.is_ok_and(|len| !ours(&start[..len]) && start.iter().any(|byte| *byte != 0))
}

/// Random bytes.
pub(crate) fn fresh<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}
