//! What both daemons do: log, wait for a signal, stop in order.

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing_subscriber::EnvFilter;

use crate::notify::Manager;

/// Starts logging to standard error; `RUST_LOG` chooses, default `info`.
pub(crate) fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second daemon in one process keeps the first one's log.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).try_init();
}

/// The runtime of an admin socket: one thread, nothing of a guest's runs on it.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the admin runtime")
}

/// A daemon has ended with this code, and said why itself.
#[derive(Debug)]
pub(crate) struct Ended(pub std::process::ExitCode);

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the daemon has ended")
    }
}

impl std::error::Error for Ended {}

/// Signs of life of a loop that turns more often than the service manager wants to hear.
pub(crate) struct Signs {
    manager: Manager,
    last: std::cell::Cell<Option<std::time::Instant>>,
}

impl Signs {
    pub(crate) fn new(manager: Manager) -> Self {
        Self { manager, last: std::cell::Cell::new(None) }
    }

    /// The loop turns.
    pub(crate) fn alive(&self) {
        let Some(interval) = self.manager.interval() else { return };
        if self.last.get().is_none_or(|last| last.elapsed() >= interval) {
            self.last.set(Some(std::time::Instant::now()));
            self.manager.alive();
        }
    }
}

/// Waits for SIGTERM, SIGINT or the end of the admin server; then stops that in order, and tells a service manager so.
pub(crate) async fn until_stopped<E: std::error::Error + Send + Sync + 'static>(
    stop: oneshot::Sender<()>,
    mut server: JoinHandle<Result<(), E>>,
) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping in order"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping in order"),
        ended = &mut server => return Ok(ended.context("admin server")??),
    }
    Manager::from_environment().stopping();
    // Fails only if the server has ended already.
    let _ = stop.send(());
    Ok(server.await.context("admin server")??)
}

/// Memory of this host in bytes.
pub(crate) fn memory_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")).and_then(|rest| rest.split_whitespace().next());
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).context("read MemTotal")?;
    Ok(kib * 1024)
}
