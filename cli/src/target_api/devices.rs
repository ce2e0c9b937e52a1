//! Views as block devices of this host (ublk).
//!
//! Such a device ends with its process: what was written to a view and not flushed ends with it, too, and a file system that went on
//! after that would be damaged. So it is gone after a crash, with I/O errors for its users, and the view comes back on a new device
//! at the next start. What the kernel keeps of a dead device is removed then: a note per device in the folder of the views' sockets,
//! which does not outlive the boot, says which are ours.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_target::view::View;
use farshore_ublk::{Control, DeviceState, Error, ErrorKind, Server, ServerConfig, ServerHandle, Stop};
use farshore_uring::DirStorage;

use crate::failure::Failure;

/// Requests of a view at once. Each may wait for the journal's disk; a view is read by few at a time.
const DEPTH: u16 = 64;

/// A served view.
pub(super) struct Device {
    server: ServerHandle,
    note: PathBuf,
}

/// Serves a view; `note` is the file that says so.
pub(super) fn start(id: &str, note: &Path, view: &View<DirStorage>) -> Result<Device, Failure> {
    let failed = |error: Error| Failure::failed(format!("view {id}"), farshore_agent::chain(&error));
    let config = ServerConfig { survives_its_server: false, depth: DEPTH, ..ServerConfig::default() };
    let server = Server::start(config, Arc::new(view.clone())).map_err(failed)?;
    if let Err(error) = std::fs::write(note, server.id().to_string()) {
        // Without it the device would be left behind by a crash.
        server.stop(Stop::Anyway).map_err(failed)?;
        return Err(Failure::failed(format!("note {}", note.display()), error.to_string()));
    }
    Ok(Device { server, note: note.to_owned() })
}

impl Device {
    pub(super) fn path(&self) -> PathBuf {
        self.server.block_path()
    }

    /// Opens the disk exclusively: nobody mounts it meanwhile. None where it is gone already.
    pub(super) fn hold(&self) -> Result<Option<File>, Failure> {
        let path = self.path();
        let exclusive = nix::libc::O_EXCL | nix::libc::O_CLOEXEC;
        match File::options().read(true).custom_flags(exclusive).open(&path) {
            Ok(disk) => Ok(Some(disk)),
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
                let what = format!("device {}", path.display());
                Err(Failure::refused(what, "is in use").hint("unmount it, or take it out of device mapper or swap"))
            }
            Err(_) => Ok(None),
        }
    }

    /// Ends it, whoever uses it, after what its page cache holds was written out.
    pub(super) fn stop(&self) -> Result<(), Error> {
        self.server.stop(Stop::Anyway)?;
        // Best effort: a note without a device is dropped at the next start.
        let _ = std::fs::remove_file(&self.note);
        Ok(())
    }
}

impl Drop for Device {
    /// The server's handle alone would serve on.
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            let error = farshore_agent::chain(&error);
            tracing::error!(device = %self.path().display(), error, "a view's device did not stop in order");
        }
    }
}

/// Removes what a crashed target has left in the kernel, by the notes in `folder`.
pub(super) fn clean(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let notes = entries.flatten().map(|entry| entry.path());
    for note in notes.filter(|path| path.extension().is_some_and(|extension| extension == "ublk")) {
        let id = std::fs::read_to_string(&note).ok().and_then(|text| text.trim().parse().ok());
        match id.map_or(Ok(()), remove) {
            Ok(()) => _ = std::fs::remove_file(&note),
            Err(error) => {
                let error = farshore_agent::chain(&error);
                tracing::warn!(note = %note.display(), error, "a view's device of the last process is left behind");
            }
        }
    }
}

/// Removes a dead device. One that is alive, or dead and about to be started, has got the number since.
fn remove(id: u32) -> Result<(), Error> {
    let control = Control::open()?;
    let info = match control.info(id) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        info => info?,
    };
    if info.state() != DeviceState::Dead || !info.is_stale() {
        return Ok(());
    }
    tracing::info!(id, "a view's device of the last process is removed");
    control.delete(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: notes go with their devices, and nothing else goes. Method: a note that names no number, and a file that is no note.
    #[test]
    fn notes_without_a_device_are_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let (note, other) = (folder.path().join("v1-disk.ublk"), folder.path().join("v1-disk.sock"));
        for path in [&note, &other] {
            std::fs::write(path, "no number").expect("room");
        }
        clean(folder.path());
        assert!(!note.exists() && other.exists());
        clean(&folder.path().join("missing"));
    }
}
