//! The supervisor's admin socket, and its answers on the agent's while no worker serves.
//!
//! | method and path | does |
//! |---|---|
//! | `GET /v1/supervisor` | the worker, its starts and ends, what is served without one |
//! | `POST /v1/upgrade` | [`UpgradeRequest`] |
//! | `POST /v1/let-go` | the worker's: end the pass-through |
//! | `GET /v1/status`, `/v1/volumes`, `/v1/alarms` | as the agent's, from what is known without a worker |

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};

use super::Event;
use super::roster::RosterDisk;
use crate::{Error, Result, alarms};

/// Order to run another program.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpgradeRequest {
    /// The program, absolute.
    pub binary: PathBuf,
}

/// What is asked of the supervisor's loop.
pub(crate) enum Request {
    LetGo(oneshot::Sender<()>),
    Upgrade(PathBuf, oneshot::Sender<Result<Value>>),
}

/// What the loop shows of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    pub worker_pid: Option<i32>,
    /// `serving`, `starting`, `down`.
    pub worker: &'static str,
    pub starts: u64,
    pub crashes_in_row: u32,
    pub last_end: Option<String>,
    pub disks: Vec<RosterDisk>,
    /// Numbers of the devices that are served without capture.
    pub bypassed: Vec<u32>,
    /// Since when guests are served without capture, or nobody is served; RFC 3339.
    pub since: Option<String>,
}

/// What the admin thread and the loop share.
pub(crate) struct Board {
    shown: Mutex<Shown>,
    loop_: Mutex<SyncSender<Event>>,
}

impl Board {
    pub(crate) fn new(to: SyncSender<Event>) -> Arc<Self> {
        Arc::new(Self { shown: Mutex::default(), loop_: Mutex::new(to) })
    }

    pub(crate) fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: Event) {
        // The loop ends last.
        let _ = self.loop_.lock().unwrap_or_else(PoisonError::into_inner).send(event);
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.tell(Event::Asked(request(reply)));
        answer.await.map_err(|_| crate::gate::stopping())
    }
}

/// The supervisor's socket, beside the agent's.
#[must_use]
pub fn supervisor_socket(admin: &Path) -> PathBuf {
    let mut name = admin.file_stem().unwrap_or_default().to_owned();
    name.push("-supervisor.sock");
    admin.with_file_name(name)
}

/// Answers on `own` always, on the agent's socket while `on` names it; passes SIGTERM, SIGINT and SIGHUP on, and says
/// when it does. Runs until the process ends.
///
/// # Errors
/// When the sockets or the signals cannot be used.
pub(crate) fn serve(
    board: &Arc<Board>,
    own: UnixListener,
    mut on: watch::Receiver<Option<Arc<UnixListener>>>,
    listening: &SyncSender<()>,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        own.set_nonblocking(true)?;
        let own = tokio::net::UnixListener::from_std(own)?;
        tokio::spawn(axum::serve(own, router(Arc::clone(board))).into_future());
        for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
            let (mut signals, board) = (signal(kind)?, Arc::clone(board));
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    board.tell(if kind == SignalKind::hangup() { Event::Reload } else { Event::Stop });
                }
            });
        }
        // The loop waits for it, if it is still there.
        let _ = listening.send(());
        loop {
            let Ok(agents) = on.wait_for(Option::is_some).await.map(|on| on.clone()) else { return Ok(()) };
            let Some(agents) = agents else { continue };
            // The worker accepts from the same socket: what is not accepted here waits for it.
            let listener = tokio::net::UnixListener::from_std(agents.try_clone()?)?;
            let mut until = on.clone();
            let served = axum::serve(listener, router(Arc::clone(board))).with_graceful_shutdown(async move {
                // The sender's end is an end, too.
                let _ = until.wait_for(Option::is_none).await;
            });
            served.await?;
        }
    })
}

type Boarded = State<Arc<Board>>;

fn router(board: Arc<Board>) -> Router {
    Router::new()
        .route("/v1/supervisor", get(|State(board): Boarded| async move { Json(supervisor_document(&board.shown())) }))
        .route("/v1/status", get(|State(board): Boarded| async move { Json(status_document(&board.shown())) }))
        .route("/v1/volumes", get(|State(board): Boarded| async move { Json(volumes_document(&board.shown())) }))
        .route("/v1/alarms", get(|State(board): Boarded| async move { Json(alarms_document(&board.shown())) }))
        .route("/v1/upgrade", post(upgrade))
        .route("/v1/let-go", post(let_go))
        .fallback(|| async { worker_is_down() })
        .with_state(board)
}

async fn upgrade(State(board): Boarded, Json(request): Json<UpgradeRequest>) -> Result<Json<Value>> {
    if !request.binary.is_absolute() {
        return Err(Error::Setting { key: "binary", reason: "needs an absolute path".into() });
    }
    board.ask(|reply| Request::Upgrade(request.binary, reply)).await?.map(Json)
}

async fn let_go(State(board): Boarded) -> Result<Json<Value>> {
    board.ask(Request::LetGo).await?;
    Ok(Json(json!({})))
}

fn worker_is_down() -> Error {
    Error::Failed {
        what: "agent".into(),
        reason: "its worker is down, and is started again (`farshore agent show`)".into(),
    }
}

fn supervisor_document(shown: &Shown) -> Value {
    json!({
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "worker": shown.worker,
        "worker_pid": shown.worker_pid,
        "starts": shown.starts,
        "crashes_in_row": shown.crashes_in_row,
        "last_end": shown.last_end,
        "own_mounts": super::host::has_own_mounts(),
        "bypassed": bypassed(shown).map(|disk| disk.volume.clone()).collect::<Vec<_>>(),
    })
}

fn bypassed(shown: &Shown) -> impl Iterator<Item = &RosterDisk> {
    shown.disks.iter().filter(|disk| shown.bypassed.contains(&disk.disk.id))
}

fn status_document(shown: &Shown) -> Value {
    let mut groups: Vec<&str> = shown.disks.iter().map(|disk| &*disk.group).collect();
    groups.dedup();
    groups
        .into_iter()
        .map(|group| {
            let passes = bypassed(shown).any(|disk| disk.group == group);
            json!({
                "group": group,
                "state": if passes { "pass-through" } else { "down" },
                "tier": "extents",
                "rpo_s": null,
                "lag_bytes": null,
                "newest_point": null,
                "link": { "connected": false, "rtt_s": null, "rate_bytes_per_s": null, "reason": "the worker is down" },
                "sync": null,
                "alarms": alarms_of(shown).filter(|alarm| alarm["subject"] == group).collect::<Vec<_>>(),
            })
        })
        .collect()
}

fn volumes_document(shown: &Shown) -> Value {
    shown
        .disks
        .iter()
        .map(|disk| {
            let volume = disk.volume.split_once('/').map_or(&*disk.volume, |(_, volume)| volume);
            json!({
                "volume": volume,
                "group": disk.group,
                "source": disk.backing,
                "device": format!("/dev/ublkb{}", disk.disk.id),
                "size_bytes": null,
                "frontend": "ublk",
                "tier": "extents",
                "in_points": false,
            })
        })
        .collect()
}

fn alarms_document(shown: &Shown) -> Value {
    alarms_of(shown).collect()
}

fn alarms_of(shown: &Shown) -> impl Iterator<Item = Value> {
    let mut groups: Vec<&str> = shown.disks.iter().map(|disk| &*disk.group).collect();
    groups.dedup();
    let last = shown.last_end.as_deref().unwrap_or("it is being started");
    groups.into_iter().map(move |group| {
        let passes = bypassed(shown).any(|disk| disk.group == group);
        let (code, text) = match passes {
            true => (
                alarms::code::BYPASSED,
                format!("the worker is down ({last}): writes go to the disks without capture, and everything will be compared"),
            ),
            false => (alarms::code::WORKER_DOWN, format!("the worker is down ({last}): requests wait for it")),
        };
        json!({ "code": code, "subject": group, "text": text, "since": shown.since })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::UblkDisk;

    /// Goal: without a worker nobody hears that all is well.
    #[test]
    fn what_is_said_without_a_worker() {
        let disk = |id: u32, group: &str| RosterDisk {
            volume: format!("{group}/v{id}"),
            group: group.into(),
            disk: UblkDisk { id, sequence: Some(1), boot: String::new() },
            backing: "/dev/sdb".into(),
            identity: String::new(),
            served: true,
        };
        let shown = Shown {
            disks: vec![disk(1, "a"), disk(2, "a"), disk(3, "b")],
            bypassed: vec![2],
            last_end: Some("signal 6".into()),
            ..Shown::default()
        };
        let status = status_document(&shown);
        assert_eq!((&status[0]["state"], &status[1]["state"]), (&json!("pass-through"), &json!("down")));
        assert_eq!(status.as_array().map(Vec::len), Some(2));
        let alarms = alarms_document(&shown);
        assert_eq!((&alarms[0]["code"], &alarms[1]["code"]), (&json!("agent.bypassed"), &json!("agent.worker-down")));
        assert!(alarms[0]["text"].as_str().is_some_and(|text| text.contains("signal 6") && text.contains("compared")));
        assert_eq!(volumes_document(&shown)[2]["device"], "/dev/ublkb3");
        assert_eq!(supervisor_document(&shown)["bypassed"], json!(["a/v2"]));
    }

    #[test]
    fn its_socket_stands_beside_the_agents() {
        let socket = supervisor_socket(Path::new("/run/farshore/agent.sock"));
        assert_eq!(socket, Path::new("/run/farshore/agent-supervisor.sock"));
    }
}
