//! Serving block devices without a worker: requests go to the disk as they are, and everything is compared later.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_proto::Name;
use farshore_ublk::dm::{Interposer, Lower, Serve};
use farshore_ublk::{Server, ServerHandle, Stop};
use farshore_uring::{BackingId, BackingOptions, Direct, FileDevice};

use super::roster::{RosterDisk, mark_bypassed};
use crate::attach::ring_file;
use crate::config::AgentConfig;
use crate::frontend::{stop_unused, surviving};
use crate::state::note_bypassed;
use crate::{Error, Result, clock};

/// How long one try waits for the kernel to end the dead worker's I/O. The supervisor watches nothing meanwhile, and tries again.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a stop tries to serve what has to be served before it can be taken out, and the time between two tries.
const TAKE_OUT_MAX: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(100);
/// How long guests wait for the note before they are served.
const NOTE_WAIT: Duration = Duration::from_millis(500);
/// Between two attempts to note something on a disk that fails.
const NOTE_RETRY: Duration = Duration::from_secs(1);

/// The pass-through. Dropping it ends nothing: its threads serve for as long as the process lives.
pub(crate) struct Bypass {
    ring_dir: PathBuf,
    host: Name,
    direct: Direct,
    served: BTreeMap<u32, ServerHandle>,
    state: PathBuf,
    /// Groups for which that is being noted in the state directory, or was.
    noting: BTreeMap<String, JoinHandle<()>>,
}

impl Bypass {
    pub(crate) fn new(config: &AgentConfig, host: Name) -> Self {
        let direct = if config.direct { Direct::Auto } else { Direct::Off };
        let (ring_dir, state) = (config.ring_dir.clone(), config.state.clone());
        Self { ring_dir, host, direct, served: BTreeMap::new(), state, noting: BTreeMap::new() }
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
        let Some(id) = surviving(&disk.disk)? else {
            return Err(Error::failed(&*disk.volume, "its block device is gone"));
        };
        let device = open_same(disk, self.direct)?;
        self.note(disk);
        // Most disks answer at once; guests do not wait for one that does not.
        let end = clock::now().plus(NOTE_WAIT);
        while self.noting.get(&disk.group).is_some_and(|thread| !thread.is_finished()) && clock::now() < end {
            std::thread::park_timeout(Duration::from_millis(2));
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

    /// Notes that writes to the group of `disk` go past the filter: beside the rings at once, for a worker that comes back, and in the state
    /// directory by a thread of its own, which may have to wait for a disk, for the next start of the host.
    fn note(&mut self, disk: &RosterDisk) {
        let noting = self.noting.get(&disk.group).is_some_and(|thread| !thread.is_finished());
        if !noting && let Ok(group) = Name::new(disk.group.clone()) {
            let state = self.state.clone();
            let thread = std::thread::Builder::new().name("farshore-note".into()).spawn(move || {
                while let Err(error) = note_bypassed(&state, &group) {
                    let error = crate::error::chain(&error);
                    tracing::error!(
                        %group, error, "that writes go past the filter cannot be kept: if the host goes down now, run `farshore resync`"
                    );
                    std::thread::park_timeout(NOTE_RETRY);
                }
            });
            match thread {
                Ok(thread) => _ = self.noting.insert(disk.group.clone(), thread),
                Err(error) => tracing::error!(%error, "that writes go past the filter cannot be kept"),
            }
        }
        let ring = ring_file(&self.ring_dir, &self.host, &disk.group);
        if let Err(error) = mark_bypassed(&self.ring_dir, &self.host, &disk.group, &ring) {
            // Guests come first; the alarm stays until a worker has read the group's state.
            tracing::error!(group = disk.group, %error, "that writes go past the filter cannot be noted: run `farshore resync` later");
        }
    }

    /// For an end that no worker is there to make: takes volumes out from below the device mapper, whose users go on, removes devices
    /// that nobody uses, and lets go of the others, which wait for the next supervisor. `disks`: all that a worker served.
    pub(crate) fn stop(&mut self, disks: &[RosterDisk]) {
        // Without a device mapper nothing stands below it.
        if let Ok(interposer) = Interposer::open()
            && let Err(error) = self.take_out(&interposer, disks)
        {
            let error = crate::error::chain(&error);
            tracing::error!(
                error,
                "users of volumes behind the device mapper wait for the next agent; `farshore doctor --repair --abandon` frees them"
            );
        }
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

    /// Gives the uppers of volumes behind the device mapper their own tables again. All that stand there are served before the first:
    /// a storey of a stack can only be changed while those below it answer. What a worker has taken out is not there.
    ///
    /// # Errors
    /// The first, after all were tried.
    fn take_out(&mut self, interposer: &Interposer, disks: &[RosterDisk]) -> Result<()> {
        let failed = |what: &str, error: &farshore_ublk::Error| Error::failed(what, crate::error::chain(error));
        let all = interposer.list().map_err(|error| failed("device mapper", &error))?;
        let of = |disk: &RosterDisk| all.iter().find(|one| one.through.ublk_id() == Some(disk.disk.id)).cloned();
        let disks: Vec<_> = disks.iter().filter_map(|disk| Some((disk, of(disk)?))).collect();
        let mut result = Ok(());
        let deadline = clock::now().plus(TAKE_OUT_MAX);
        for (disk, _) in &disks {
            while !self.serves(disk.disk.id) {
                let engaged = self.engage(disk);
                if clock::now() >= deadline {
                    result = result.and(engaged);
                    break;
                }
                if engaged.is_err() {
                    std::thread::park_timeout(RETRY);
                }
            }
        }
        // Before anybody goes on without us.
        while self.noting.values().any(|thread| !thread.is_finished()) && clock::now() < deadline {
            std::thread::park_timeout(RETRY);
        }
        for (disk, attached) in disks {
            let Some(server) = self.served.remove(&disk.disk.id) else { continue };
            match interposer.detach(&attached, &mut Ending(&server)) {
                Ok(()) => tracing::warn!(
                    volume = disk.volume,
                    "no worker does it: taken out of the path, and all is compared"
                ),
                Err(error) => {
                    server.abandon();
                    result = result.and(Err(failed(&disk.volume, &error)));
                }
            }
        }
        result
    }
}

/// Ends a pass-through below a device whose users do not go through it any more.
struct Ending<'a>(&'a ServerHandle);

impl Serve for Ending<'_> {
    fn start(&mut self, _: &Lower) -> io::Result<PathBuf> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn stop(&mut self, _: &Path) -> io::Result<()> {
        stop_unused(self.0).map_err(io::Error::other)
    }
}

/// Opens what a device stands on, exclusively: so nobody else serves it, and the dead worker's I/O has ended.
///
/// # Errors
/// When it cannot be opened, or another device or file is in its place.
fn open_same(disk: &RosterDisk, direct: Direct) -> Result<FileDevice> {
    let options = BackingOptions { direct, read_only: false };
    let device = FileDevice::open(&disk.backing, options);
    let device = device.map_err(|error| Error::failed(&*disk.volume, crate::error::chain(&error)))?;
    let found = &device.backing().id;
    if found.is_same_but_for_size(&BackingId::from_text(disk.identity.clone())) {
        return Ok(device);
    }
    let reason = format!(
        "{} is another than the one protected ({found} is not {}): its users wait until that is back",
        disk.backing.display(),
        disk.identity
    );
    Err(Error::failed(&*disk.volume, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::UblkDisk;

    /// Goal: what has taken the source's place is not written to. Method: an image file, and another one moved to its name.
    #[test]
    fn another_thing_in_the_place_is_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let (image, other) = (folder.path().join("a.img"), folder.path().join("b.img"));
        for path in [&image, &other] {
            std::fs::File::create(path).and_then(|file| file.set_len(1 << 20)).expect("room");
        }
        let options = BackingOptions { direct: Direct::Off, read_only: false };
        let identity = FileDevice::open(&image, options).expect("an image").backing().id.as_str().to_owned();
        let disk = RosterDisk {
            volume: "g/v".into(),
            group: "g".into(),
            disk: UblkDisk { id: 0, sequence: None, boot: String::new() },
            backing: image.clone(),
            identity,
            served: false,
        };
        open_same(&disk, Direct::Off).expect("the same");
        std::fs::File::options().write(true).open(&image).and_then(|file| file.set_len(2 << 20)).expect("room");
        open_same(&disk, Direct::Off).expect("it has grown");
        std::fs::rename(&other, &image).expect("room");
        let error = open_same(&disk, Direct::Off).map(drop).expect_err("another").to_string();
        assert!(error.contains("g/v") && error.contains("is another than the one protected"), "{error}");
    }
}
