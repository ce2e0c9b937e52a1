//! `farshore target run`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use farshore_link::identity::Identity;
use farshore_link::quic::TargetLimits;
use farshore_target::scratch::{RESERVE_BYTES, Space};
use farshore_target::server::{DataLock, Server, target_keys};
use farshore_target::target::{Target, TargetConfig};
use farshore_uring::DirStorage;
use serde::Deserialize;

use crate::args::TargetRun;
use crate::daemon;
use crate::failure::Failure;
use crate::notify::Manager;
use crate::target_api::{self, Service};

const CONFIG: &str = "/etc/farshore/target.toml";
const SOCKET: &str = "/run/farshore/target.sock";

/// What the file may say. Unknown keys are errors.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetFile {
    /// Identity bundle.
    identity: Option<PathBuf>,
    /// Data directory.
    data: Option<PathBuf>,
    /// Address to listen on.
    listen: Option<String>,
    /// Admin socket.
    socket: Option<PathBuf>,
    /// Bytes of opened frames kept in memory.
    frame_cache: Option<u64>,
    /// Bytes that what is written to a view may take, per volume. Default: as many as the volume has.
    view_limit: Option<u64>,
    /// Free bytes of the data folder's disk that views leave alone: their writes get `ENOSPC` before. Default 1 GiB; give at
    /// least what the groups bring while a view is open.
    view_reserve: Option<u64>,
}

fn read(path: &Path) -> Result<TargetFile> {
    let what = || format!("configuration {}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| Failure::usage(what(), error.to_string()))?;
    toml::from_str(&text).map_err(|error| Failure::usage(what(), error.to_string()).into())
}

fn given<T>(key: &str, value: Option<T>) -> Result<T, Failure> {
    value.ok_or_else(|| Failure::usage(format!("setting {key}"), "is not given"))
}

pub(crate) fn run(args: TargetRun) -> Result<()> {
    daemon::start_log();
    let manager = Manager::from_environment();
    let file = match &args.config {
        Some(path) => read(path)?,
        None if Path::new(CONFIG).exists() => read(Path::new(CONFIG))?,
        None => TargetFile::default(),
    };
    let identity_path = given("identity", args.identity.or(file.identity))?;
    let data = given("data", args.data.or(file.data))?;
    let listen = resolve(&given("listen", args.listen.or(file.listen))?)?;
    let socket = args.socket.or(file.socket).unwrap_or_else(|| SOCKET.into());
    let identity = Identity::load(&identity_path).map_err(|error| Failure::from_link(&error))?;
    let keys = target_keys(&identity).map_err(Failure::from)?;
    let _lock = DataLock::acquire(&data).map_err(Failure::from)?;
    let storage = DirStorage::open(&data).with_context(|| format!("open {}", data.display()))?;
    let mut config = TargetConfig::default();
    if let Some(bytes) = file.frame_cache {
        config.frame_cache_bytes = usize::try_from(bytes).context("frame_cache")?;
    }
    let target = Arc::new(Target::open(storage, keys, config).map_err(Failure::from)?);
    let sockets = socket.parent().unwrap_or(Path::new("/")).join("views");
    let space = Space { limit: file.view_limit, reserve: file.view_reserve.unwrap_or(RESERVE_BYTES) };
    let service = Arc::new(Service::new(Arc::clone(&target), sockets, space));
    let mut server =
        Server::start(target, listen, Arc::new(identity), TargetLimits::default()).map_err(Failure::from)?;
    tracing::info!(address = %server.local_addr(), data = %data.display(), "target is listening");
    let runtime = daemon::runtime()?;
    let served = runtime.block_on(async {
        let listener = farshore_agent::api::listen(&socket)?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let app = target_api::router(Arc::clone(&service));
        manager.ready(&format!("listening on {}", server.local_addr()));
        let signs = tokio::spawn(manager.keep_telling());
        let serving = tokio::spawn(async move {
            axum::serve(listener, app)
                .with_graceful_shutdown(async {
                    // A dropped sender means stop as well.
                    let _ = stopped.await;
                })
                .await
        });
        let served = daemon::until_stopped(stop, serving).await;
        signs.abort();
        served
    });
    // Best effort: a socket left behind is replaced at the next start.
    let _ = std::fs::remove_file(&socket);
    service.stop();
    server.stop();
    served.context("admin socket")
}

fn resolve(listen: &str) -> Result<SocketAddr, Failure> {
    let bad = |reason: String| Failure::usage(format!("listen {listen:?}"), reason);
    listen
        .to_socket_addrs()
        .map_err(|error| bad(format!("is not ADDRESS:PORT: {error}")))?
        .next()
        .ok_or_else(|| bad("has no address".into()))
}
