//! The peers' processes.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// A process that serves on a unix socket and is killed when dropped.
pub(super) struct Peer {
    child: Child,
    pub socket: PathBuf,
}

const START_LIMIT: Duration = Duration::from_secs(20);

impl Peer {
    /// Starts `command` and waits until `socket` exists and accepts.
    pub(super) fn start(mut command: Command, socket: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().with_context(|| format!("start {name}"))?;
        let mut peer = Self { child, socket: socket.to_owned() };
        let begin = Instant::now();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            let ended = peer.child.try_wait().context("look at a peer")?;
            ensure!(ended.is_none(), "{name} ended at once");
            ensure!(begin.elapsed() < START_LIMIT, "{name} does not answer on {}", socket.display());
            crate::sites::pause(Duration::from_millis(20));
        }
        Ok(peer)
    }

    /// `nbdkit file`, the plain NBD server.
    pub(super) fn nbdkit(file: &Path, socket: PathBuf, cached: bool) -> Result<Self> {
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket).arg("file").arg(file);
        if !cached {
            command.arg("cache=none");
        }
        Self::start(command, &socket)
    }

    /// Our server over a file, without protection.
    pub(super) fn passthrough(file: &Path, socket: PathBuf, cached: bool) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["bench", "serve"]).arg(file).arg(&socket);
        if cached {
            command.arg("--cached");
        }
        Self::start(command, &socket)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Resident memory of a process without what it shares with files on tmpfs (the ring), in bytes.
pub(super) fn private_memory(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read a process's memory")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .context("the process's memory")?;
    Ok(kib * 1024)
}
