//! Files that hold secrets: read only if nobody else can, written whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use zeroize::Zeroizing;

use crate::{Error, Result};

/// Longest document in bytes. A bundle is about 2 KiB; a vault with many key epochs stays far below this.
const LEN_MAX: u64 = 1 << 20;

/// Others may neither read nor change it; the group may read (daemons started by a service manager).
const FORBIDDEN_MODE: u32 = 0o027;

fn file_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, action, source }
}

pub(super) fn read_private(path: &Path) -> Result<Zeroizing<String>> {
    let file = File::open(path).map_err(file_error(path, "open it"))?;
    let mode = file.metadata().map_err(file_error(path, "read its mode"))?.permissions().mode() & 0o777;
    if mode & FORBIDDEN_MODE != 0 {
        return Err(Error::Exposed { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::new());
    let len = file.take(LEN_MAX + 1).read_to_string(&mut text).map_err(file_error(path, "read it"))?;
    if len as u64 > LEN_MAX {
        return Err(Error::malformed(path.display().to_string(), "is longer than 1 MiB"));
    }
    Ok(text)
}

pub(super) fn create_private_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(file_error(dir, "make the folder"))
}

/// Replaces `path` by `text`, mode 0600.
///
/// # Durability
/// On return the content and the name are on disk; after a crash before that the old file (or none) is there.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) | None => Path::new("."),
    };
    let name = path.file_name().ok_or_else(|| Error::malformed(path.display().to_string(), "is not a file name"))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    let partial = dir.join(partial);
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error(&partial, "remove it")(error)),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)
        .map_err(file_error(&partial, "create it"))?;
    file.write_all(text.as_bytes()).map_err(file_error(&partial, "write it"))?;
    file.sync_all().map_err(file_error(&partial, "sync it"))?;
    fs::rename(&partial, path).map_err(file_error(path, "put it in place"))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(file_error(dir, "sync the folder"))
}
