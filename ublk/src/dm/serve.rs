//! Who serves the device between upper and lower.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farshore_uring::{BackingOptions, Direct, FileDevice};

use super::node::DevNo;
use crate::control::Control;
use crate::error::ErrorKind;
use crate::server::{Server, ServerConfig, ServerHandle, Stop};

/// The device below: it has the upper's original table.
#[derive(Clone, Debug)]
pub struct Lower {
    /// Its node.
    pub path: PathBuf,
    /// Its number.
    pub device: DevNo,
    /// Length in sectors. The device over it must have the same.
    pub sectors: u64,
    /// Number that a ublk device over it should have. It stands in the lower's name, so that after a crash at any moment the ublk
    /// device is known for what it is.
    pub ublk_id: u32,
}

/// Makes and ends the device over a lower.
///
/// It must write through to the lower (no page cache of its own: [`Direct::On`]), and have ended all I/O to it and closed it when
/// [`Self::stop`] returns.
pub trait Serve {
    /// Starts a block device over `lower` and says where it is.
    ///
    /// # Errors
    /// Any: the attach is undone and fails with it.
    fn start(&mut self, lower: &Lower) -> io::Result<PathBuf>;

    /// Ends the device that [`Self::start`] made, here or in an earlier process. Nothing uses it any more.
    ///
    /// # Errors
    /// Any: then the upper is as it was at first, but devices are left behind.
    fn stop(&mut self, device: &Path) -> io::Result<()>;
}

/// Serves lowers as they are, without a filter.
#[derive(Debug, Default)]
pub struct PassThrough {
    config: ServerConfig,
    servers: Vec<ServerHandle>,
}

impl PassThrough {
    /// With this configuration, except for the number.
    #[must_use]
    pub fn new(config: ServerConfig) -> Self {
        Self { config, servers: Vec::new() }
    }

    /// Takes over a device whose server died.
    pub(super) fn recover(&mut self, id: u32, patience: Duration, lower: &Path) -> io::Result<()> {
        self.servers.push(Server::recover(id, patience, open(lower)?)?);
        Ok(())
    }
}

impl Serve for PassThrough {
    fn start(&mut self, lower: &Lower) -> io::Result<PathBuf> {
        let config = ServerConfig { id: Some(lower.ublk_id), ..self.config };
        let server = Server::start(config, open(&lower.path)?)?;
        let path = server.block_path();
        self.servers.push(server);
        Ok(path)
    }

    fn stop(&mut self, device: &Path) -> io::Result<()> {
        if let Some(at) = self.servers.iter().position(|server| server.block_path() == device) {
            self.servers[at].stop(Stop::IfUnused)?;
            self.servers.swap_remove(at);
            return Ok(());
        }
        let id = DevNo::of(device).ok().and_then(DevNo::ublk_id);
        let id = id.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is no ublk device"))?;
        delete(id)
    }
}

fn open(lower: &Path) -> io::Result<Arc<FileDevice>> {
    Ok(Arc::new(FileDevice::open(lower, BackingOptions { direct: Direct::On, read_only: false })?))
}

/// Deletes a ublk device without a server.
pub(super) fn delete(id: u32) -> io::Result<()> {
    match Control::open().and_then(|control| control.delete(id)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}
