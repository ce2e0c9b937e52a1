//! What volumes stand on, and how they are reached.

use std::path::Path;
use std::time::Duration;

use farshore_blkfilter::{BackingFile, Buf};
use farshore_uring::{Backing, BackingOptions, Direct, Errno, Extent, FileSlot, Geometry, Io, open_backing};

use crate::config::AgentConfig;
use crate::state::VolumeState;
use crate::{Error, Result, clock};

/// Stands for a source that cannot be opened. Nobody reads or writes it.
pub(crate) struct Absent(Geometry);

impl Absent {
    pub(crate) fn new(volume: &VolumeState) -> Self {
        Self(Geometry {
            size: volume.size,
            logical_block: volume.block,
            optimal_block: volume.block,
            max_request: volume.block,
            max_discard: 0,
            read_only: true,
            discard: false,
        })
    }
}

impl BackingFile for Absent {
    fn geometry(&self) -> Geometry {
        self.0
    }

    fn register<I: Io<Buf>>(&self, _io: &mut I) -> std::io::Result<FileSlot> {
        Err(std::io::ErrorKind::NotFound.into())
    }

    fn extents(&self, _offset: u64, _len: u64) -> std::result::Result<Vec<Extent>, Errno> {
        Ok(Vec::new())
    }

    fn flusher(&self) -> Box<dyn Fn() -> std::io::Result<()> + Send + Sync> {
        Box::new(|| Err(std::io::ErrorKind::NotFound.into()))
    }
}

/// A source that passed all checks.
pub(crate) struct SourceFile(pub Backing);

pub(crate) fn open_source(source: &Path, config: &AgentConfig) -> Result<Backing> {
    open_file(source, config).map_err(|error| open_error(source, &error)).and_then(|backing| {
        match backing.geometry.size {
            0 => Err(Error::failed(format!("source {}", source.display()), "is empty")),
            _ => Ok(backing),
        }
    })
}

fn open_error(source: &Path, error: &std::io::Error) -> Error {
    use std::io::ErrorKind;
    let (what, reason) = (format!("source {}", source.display()), crate::error::chain(error));
    let kind = error.kind();
    if kind == ErrorKind::NotFound {
        Error::NotFound { what: "source", name: source.display().to_string(), hint: "" }
    } else if is_in_use(error) {
        crate::devices::busy(source, &reason)
    } else if kind == ErrorKind::ReadOnlyFilesystem {
        let hint = "make it writable: nothing can change it as it is, so there is nothing to protect";
        Error::Refused { what, reason: format!("is read-only: {reason}"), hint: hint.into() }
    } else if kind == ErrorKind::PermissionDenied {
        Error::Failed { what, reason: format!("{reason}; run the agent as root, or give its user the device") }
    } else {
        Error::Failed { what, reason }
    }
}

fn open_file(source: &Path, config: &AgentConfig) -> std::io::Result<Backing> {
    let direct = if config.direct { Direct::Auto } else { Direct::Off };
    open_backing(source, BackingOptions { direct, read_only: false })
}

fn is_in_use(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::ResourceBusy | std::io::ErrorKind::WouldBlock)
}

/// Waits up to `patience` until nobody holds the source any more; `false`: somebody still does. A dead agent holds its sources
/// until the last of its I/O has ended: its rings have them as registered files.
pub(crate) fn is_let_go(source: &Path, config: &AgentConfig, patience: Duration) -> bool {
    let deadline = clock::now().plus(patience);
    loop {
        match open_file(source, config) {
            Err(error) if is_in_use(&error) && clock::now() < deadline => {
                tracing::info!(source = %source.display(), "the source is still held; I/O of the last agent may not have ended");
            }
            Err(error) if is_in_use(&error) => return false,
            Ok(_) | Err(_) => return true,
        }
    }
}

pub(crate) fn open_volume(volume: &VolumeState, config: &AgentConfig) -> Result<SourceFile> {
    let backing = open_source(&volume.source, config)?;
    let refused = |reason: String| {
        Err(Error::Refused {
            what: format!("source {}", volume.source.display()),
            reason,
            hint: "bring the device back, or `farshore unprotect` the volume and protect the new one".into(),
        })
    };
    if backing.geometry.size != volume.size {
        return refused(format!("has {} bytes, it was protected with {}", backing.geometry.size, volume.size));
    }
    if backing.id.as_str() != volume.identity {
        return refused(format!(
            "is another device than the one protected ({} is not {})",
            backing.id, volume.identity
        ));
    }
    if backing.geometry.logical_block != volume.block {
        return refused(format!("has blocks of {} bytes now, not {}", backing.geometry.logical_block, volume.block));
    }
    Ok(SourceFile(backing))
}
