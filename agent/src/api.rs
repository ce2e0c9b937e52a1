//! The agent's admin API: HTTP and JSON over a unix socket, mode 0660. The same API serves the command line and, later,
//! the configuration server.
//!
//! | method and path | does |
//! |---|---|
//! | `GET /v1/status?group=` | how protection stands, per group |
//! | `GET /v1/volumes` | protected volumes |
//! | `GET /v1/alarms` | what needs attention |
//! | `POST /v1/protect` | [`ProtectRequest`] |
//! | `POST /v1/unprotect`, `POST /v1/resync` | [`VolumeRequest`] |
//! | `POST /v1/verify` | [`VerifyRequest`] |
//! | `POST /v1/bookmark`, `POST /v1/wait` | [`PointRequest`] |

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::agent::Agent;
use crate::{Error, Result};

/// Order to protect a volume.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectRequest {
    /// Block device or image file, absolute.
    pub source: PathBuf,
    /// Group.
    pub group: String,
    /// Name in the group; none: the source's file name.
    pub name: Option<String>,
    /// `nbd+unix:PATH`, `nbd+tcp:ADDR`, `ublk` or `ublk:N`; none: a socket below the state directory, with `dm` `ublk`.
    pub frontend: Option<String>,
    /// Through the device mapper: the source stays in use, under its name or (of a bare disk) that of a stub over it.
    #[serde(default)]
    pub dm: bool,
}

/// Names a volume, as `GROUP/VOLUME` or by a name that is unique.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// The volume.
    pub volume: String,
}

/// Order to compare a group's volumes with their replicas.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Group.
    pub group: String,
    /// First make the replica like the source where they are known to differ.
    #[serde(default)]
    pub repair: bool,
}

/// Order for a point, with the time after which to give up.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointRequest {
    /// Group.
    pub group: String,
    /// Bookmark's name; none: just wait.
    pub name: Option<String>,
    /// Seconds; none: wait for ever.
    pub timeout_s: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct StatusQuery {
    group: Option<String>,
}

#[derive(Serialize)]
struct Failed {
    error: FailedBody,
}

#[derive(Serialize)]
struct FailedBody {
    what: String,
    why: String,
    hint: Option<String>,
    code: u8,
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let code = self.exit_code();
        let status = match code {
            2 => StatusCode::BAD_REQUEST,
            3 => StatusCode::NOT_FOUND,
            4 => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let text = crate::error::chain(&self);
        let (what, why) = text.split_once(": ").unwrap_or(("agent", &text));
        let hint = self.hint().map(str::to_owned);
        let body = FailedBody { what: what.into(), why: why.into(), hint, code };
        (status, Json(Failed { error: body })).into_response()
    }
}

/// The API's routes over `agent`.
pub fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/volumes", get(|State(agent): State<Arc<Agent>>| async move { agent.volumes().map(Json) }))
        .route("/v1/alarms", get(|State(agent): State<Arc<Agent>>| async move { Json(agent.alarms()) }))
        .route("/v1/protect", post(protect))
        .route("/v1/unprotect", post(unprotect))
        .route("/v1/resync", post(resync))
        .route("/v1/verify", post(verify))
        .route("/v1/bookmark", post(point))
        .route("/v1/wait", post(point))
        .with_state(agent)
}

async fn status(State(agent): State<Arc<Agent>>, Query(query): Query<StatusQuery>) -> Result<Response> {
    Ok(Json(agent.status(query.group.as_deref())?).into_response())
}

async fn protect(State(agent): State<Arc<Agent>>, Json(request): Json<ProtectRequest>) -> Result<Response> {
    let volume = blocking(move || agent.protect(&request)).await?;
    Ok(Json(volume).into_response())
}

async fn unprotect(State(agent): State<Arc<Agent>>, Json(request): Json<VolumeRequest>) -> Result<Response> {
    let gone = blocking(move || agent.unprotect(&request.volume)).await?;
    Ok(Json(gone).into_response())
}

async fn resync(State(agent): State<Arc<Agent>>, Json(request): Json<VolumeRequest>) -> Result<Response> {
    let volume = blocking(move || agent.resync(&request.volume)).await?;
    Ok(Json(volume).into_response())
}

async fn verify(State(agent): State<Arc<Agent>>, Json(request): Json<VerifyRequest>) -> Result<Response> {
    let ordered = blocking(move || agent.verify(&request.group, request.repair)).await?;
    Ok(Json(ordered).into_response())
}

async fn point(State(agent): State<Arc<Agent>>, Json(request): Json<PointRequest>) -> Result<Response> {
    let limit = request.timeout_s.map(Duration::try_from_secs_f64).transpose();
    let limit = limit.map_err(|_| Error::Setting { key: "timeout_s", reason: "is not a number of seconds".into() })?;
    let point = blocking(move || agent.point(&request.group, request.name.as_deref(), limit)).await?;
    Ok(Json(point).into_response())
}

/// Runs work that waits for disks or points on a thread where that disturbs nobody.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::failed("request", error))?
}

/// Serves the API on a unix socket until `stop` fires. A socket file on which nobody answers is replaced.
///
/// # Errors
/// When the socket cannot be made, or another agent answers on it.
pub async fn serve(agent: Arc<Agent>, socket: &Path, stop: oneshot::Receiver<()>) -> Result<()> {
    let result = serve_on(agent, listen_std(socket, false)?, socket, stop).await;
    // The name is ours; a socket left behind is replaced at the next start anyway.
    let _ = std::fs::remove_file(socket);
    result
}

/// Serves the API on an open listener, which `socket` names, until `stop` fires.
///
/// # Errors
/// When the listener fails.
pub async fn serve_on(
    agent: Arc<Agent>,
    listener: UnixListener,
    socket: &Path,
    stop: oneshot::Receiver<()>,
) -> Result<()> {
    let listener = in_runtime(listener, socket)?;
    let stopping = Arc::clone(&agent);
    let served = axum::serve(listener, router(agent)).with_graceful_shutdown(async move {
        // A dropped sender means stop as well.
        let _ = stop.await;
        // Else the end would wait for whoever waits for a point.
        stopping.refuse_requests();
    });
    served.await.map_err(|error| Error::io("serve", socket, error))
}

/// Listens on an admin socket: folder made, stale file replaced, mode 0660.
///
/// # Errors
/// When the socket cannot be made, or another daemon answers on it.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn listen(socket: &Path) -> Result<tokio::net::UnixListener> {
    in_runtime(listen_std(socket, false)?, socket)
}

fn in_runtime(listener: UnixListener, socket: &Path) -> Result<tokio::net::UnixListener> {
    listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixListener::from_std(listener))
        .map_err(|error| Error::io("listen on", socket, error))
}

/// As [`listen`], outside of a runtime. `replace`: whoever has the name is known to be gone, or about to.
pub(crate) fn listen_std(socket: &Path, replace: bool) -> Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).map_err(|error| Error::io("create", folder, error))?;
    }
    if socket.exists() {
        if !replace && UnixStream::connect(socket).is_ok() {
            return Err(Error::Refused {
                what: format!("socket {}", socket.display()),
                reason: "another daemon answers on it".into(),
                hint: "stop that one, or give this one another --socket".into(),
            });
        }
        std::fs::remove_file(socket).map_err(|error| Error::io("remove stale", socket, error))?;
    }
    let listener = UnixListener::bind(socket).map_err(|error| Error::io("listen on", socket, error))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o660))
        .map_err(|error| Error::io("set the mode of", socket, error))?;
    Ok(listener)
}
