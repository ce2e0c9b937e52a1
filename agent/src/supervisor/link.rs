//! The worker's side: what it tells its supervisor, and asks of it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_proto::Name;

use super::roster::{Process, Roster, RosterDisk};
use crate::frontend::may_survive;
use crate::{Error, Result};

/// Names the supervisor's socket to its worker.
pub(crate) const SUPERVISOR: &str = "FARSHORE_SUPERVISOR";

/// Longest wait for the supervisor to let go of devices. It has to end their I/O.
const LET_GO_MAX: Duration = Duration::from_secs(60);

/// A worker's connection to what survives it.
#[derive(Debug, Clone)]
pub(crate) struct SupervisorLink {
    /// None: this process runs without a supervisor.
    socket: Option<PathBuf>,
    ring_dir: PathBuf,
    host: Name,
}

impl SupervisorLink {
    /// As the environment says.
    pub(crate) fn new(ring_dir: &Path, host: &Name) -> Self {
        let socket = std::env::var_os(SUPERVISOR).map(PathBuf::from);
        Self { socket, ring_dir: ring_dir.to_owned(), host: host.clone() }
    }

    /// Asks for devices that are served without a worker: they wait for this one when this returns.
    ///
    /// # Errors
    /// When the supervisor does not answer: it may be serving still, and then no device can be taken over.
    pub(crate) fn let_go(&self) -> Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let ask = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(LET_GO_MAX))?;
            stream.write_all(
                b"POST /v1/let-go HTTP/1.1\r\nHost: farshore\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            )?;
            let mut answer = String::new();
            stream.take(64 << 10).read_to_string(&mut answer)?;
            Ok(answer)
        };
        match ask() {
            Ok(answer) if answer.starts_with("HTTP/1.1 200") => Ok(()),
            Ok(answer) => Err(Error::failed("supervisor", answer.lines().next().unwrap_or("gives no answer"))),
            // It died: so did what it served, and the next one takes this worker as it is.
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::NotFound) =>
            {
                Ok(())
            }
            Err(error) => Err(Error::failed("supervisor", format!("{}: {error}", socket.display()))),
        }
    }

    /// Writes down which block devices are to be served, that this process serves those that it does, and whether it has started all that
    /// it can. What was on the list, is not among `disks` and still waits, stays: of a group that was not started, or not yet.
    pub(crate) fn report(&self, mut disks: Vec<RosterDisk>, ready: bool) {
        let old = Roster::read(&self.ring_dir, &self.host);
        for mut left in old.disks {
            let known = disks.iter().any(|disk| disk.disk.id == left.disk.id);
            // One of which nothing can be told is not forgotten.
            if !known && may_survive(&left.disk) {
                left.served = false;
                disks.push(left);
            }
        }
        disks.sort_by(|one, other| (&one.group, &one.volume).cmp(&(&other.group, &other.volume)));
        let roster = Roster::new(Process::own(), ready, disks);
        if let Err(error) = roster.write(&self.ring_dir, &self.host) {
            tracing::error!(
                error = crate::error::chain(&error),
                "the supervisor does not hear which block devices are served: it cannot serve them without a worker"
            );
        }
    }
}

/// The admin socket that the supervisor (or systemd) has opened for this process; `None`: it has to open its own.
#[must_use]
pub fn inherited_listener() -> Option<UnixListener> {
    listenfd::ListenFd::from_env().take_unix_listener(0).ok().flatten()
}
