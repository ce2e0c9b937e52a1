//! Serving block devices without a worker: requests go to the disk as they are, and everything is compared later.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::Name;
use farshore_ublk::{Server, ServerHandle, Stop};
use farshore_uring::{BackingOptions, Direct, FileDevice};

use super::roster::{RosterDisk, mark_bypassed};
use crate::attach::ring_file;
use crate::frontend::surviving;
use crate::{Error, Result};

/// How long one try waits for the kernel to end the dead worker's I/O. The supervisor watches nothing meanwhile, and tries again.
const PATIENCE: Duration = Duration::from_secs(1);

/// The pass-through. Dropping it ends nothing: its threads serve for as long as the process lives.
pub(crate) struct Bypass {
    ring_dir: PathBuf,
    host: Name,
    direct: Direct,
    served: BTreeMap<u32, ServerHandle>,
}

impl Bypass {
    pub(crate) fn new(ring_dir: PathBuf, host: Name, direct: bool) -> Self {
        let direct = if direct { Direct::Auto } else { Direct::Off };
        Self { ring_dir, host, direct, served: BTreeMap::new() }
    }

    /// Whether this serves the device `id`.
    pub(crate) fn serves(&self, id: u32) -> bool {
        self.served.get(&id).is_some_and(ServerHandle::is_serving)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.served.is_empty()
    }

    /// Takes over a device that waits, after noting that its group is to be compared.
    ///
    /// # Errors
    /// When it cannot be taken over: another process serves it, its disk is gone, held, or at a dead worker's I/O.
    pub(crate) fn engage(&mut self, disk: &RosterDisk) -> Result<()> {
        let failed = |error: &dyn std::error::Error| Error::failed(&*disk.volume, crate::error::chain(error));
        if let Some(server) = self.served.remove(&disk.disk.id) {
            // A queue of it failed.
            server.abandon();
        }
        let Some(id) = surviving(&disk.disk) else {
            return Err(Error::failed(&*disk.volume, "its block device is gone"));
        };
        let options = BackingOptions { direct: self.direct, read_only: false };
        // Exclusively: so nobody else serves it, and the dead worker's I/O has ended.
        let device = FileDevice::open(&disk.backing, options).map_err(|error| failed(&error))?;
        let ring = ring_file(&self.ring_dir, &self.host, &disk.group);
        if let Err(error) = mark_bypassed(&self.ring_dir, &self.host, &disk.group, &ring) {
            // Guests come first; the alarm stays until a worker has read the group's state.
            tracing::error!(group = disk.group, %error, "that writes go past the filter cannot be noted: run `farshore resync` later");
        }
        let server = Server::recover(id, PATIENCE, Arc::new(device)).map_err(|error| failed(&error))?;
        tracing::error!(volume = disk.volume, id, "served without capture: nothing protects this volume now");
        self.served.insert(id, server);
        Ok(())
    }

    /// Lets go of everything: the devices wait for a worker. Whether there was anything.
    pub(crate) fn let_go(&mut self) -> bool {
        let served = std::mem::take(&mut self.served);
        let any = !served.is_empty();
        served.into_values().for_each(ServerHandle::abandon);
        any
    }

    /// Removes devices that nobody uses, and lets go of the others, which wait for the next supervisor.
    pub(crate) fn stop(&mut self) {
        for (id, server) in std::mem::take(&mut self.served) {
            let in_use = crate::devices::opener(&server.block_path()).is_some();
            match if in_use { None } else { Some(server.stop(Stop::IfUnused)) } {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::warn!(id, %error, "a device in use waits for the next agent");
                    server.abandon();
                }
                None => {
                    tracing::warn!(id, "a device in use waits for the next agent");
                    server.abandon();
                }
            }
        }
    }
}
