//! What a daemon tells the service manager that started it.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use farshore_link::identity::Vault;
use farshore_proto::{Name, Role};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::rig::binary;

/// Longest silence of a daemon that is well.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Killed when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails where it has ended, which is what was wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Messages until one has the line `wanted`; how many came before.
fn heard(socket: &UnixDatagram, wanted: &str) -> Result<usize> {
    let mut buffer = [0; 4096];
    for count in 0.. {
        let length = socket.recv(&mut buffer).with_context(|| format!("wait for {wanted}"))?;
        let text = std::str::from_utf8(&buffer[..length]).context("messages are text")?;
        if text.lines().any(|line| line == wanted) {
            return Ok(count);
        }
    }
    bail!("counted to the end")
}

fn start_target(folder: &Path, manager: &Path) -> Result<Daemon> {
    let vault = Vault::init(&folder.join("vault"), Name::new("v")?)?;
    vault.issue(Role::Target, Name::new("second")?, 30)?.write(&folder.join("target.bundle"))?;
    let child = Command::new(binary()?)
        .args(["target", "run", "--listen", "127.0.0.1:0", "--identity"])
        .arg(folder.join("target.bundle"))
        .arg("--data")
        .arg(folder.join("data"))
        .arg("--socket")
        .arg(folder.join("target.sock"))
        .env("NOTIFY_SOCKET", manager)
        .env("WATCHDOG_USEC", "300000")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start the target")?;
    Ok(Daemon(child))
}

/// Goal: a service manager hears when the target is ready, that it lives, and that it stops; a target that stands still is silent.
#[test]
fn the_target_tells_its_service_manager() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let manager = folder.path().join("notify");
    let socket = UnixDatagram::bind(&manager)?;
    socket.set_read_timeout(Some(SILENCE_MAX))?;
    let mut target = start_target(folder.path(), &manager)?;
    ensure!(heard(&socket, "READY=1").context("the log may say why")? == 0, "signs of life before it is ready");
    ensure!(folder.path().join("target.sock").exists(), "ready, and no admin socket");
    for _ in 0..3 {
        heard(&socket, "WATCHDOG=1")?;
    }
    let pid = Pid::from_raw(i32::try_from(target.0.id())?);
    kill(pid, Signal::SIGSTOP)?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    let silence = loop {
        match heard(&socket, "WATCHDOG=1") {
            // Was under way.
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let kind = silence.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(ErrorKind::WouldBlock), "{silence:#}");
    kill(pid, Signal::SIGCONT)?;
    socket.set_read_timeout(Some(SILENCE_MAX))?;
    heard(&socket, "WATCHDOG=1")?;
    kill(pid, Signal::SIGTERM)?;
    heard(&socket, "STOPPING=1")?;
    let status = target.0.wait()?;
    let mut log = String::new();
    target.0.stderr.take().context("its log")?.read_to_string(&mut log)?;
    ensure!(status.success(), "{status}:\n{log}");
    Ok(())
}
