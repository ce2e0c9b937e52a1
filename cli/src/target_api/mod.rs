//! The target's admin API: HTTP and JSON over a unix socket, mode 0660.
//!
//! | method and path | does |
//! |---|---|
//! | `GET /v1/groups`, `GET /v1/points?group=&from=&to=`, `GET /v1/alarms` | what is kept |
//! | `POST /v1/group/add`, `POST /v1/group/remove` | which hosts may write a group |
//! | `POST /v1/base/attach`, `POST /v1/base/detach`, `GET /v1/bases?group=` | bases on block devices |
//! | `POST /v1/hold/add`, `POST /v1/hold/remove`, `GET /v1/holds?group=` | keep points from retention |
//! | `POST /v1/view/open`, `POST /v1/view/close`, `GET /v1/views` | points as block devices |
//! | `POST /v1/restore`, `GET /v1/job?id=` | copy a point out |
//! | `GET /v1/policy?group=`, `POST /v1/policy`, `POST /v1/retention/resume` | how long history is kept |

mod devices;
mod exports;
mod jobs;
mod service;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::Value;

use crate::failure::Failure;
pub(crate) use service::Service;

type Answer = Result<Json<Value>, Failure>;

/// Names a group.
#[derive(Debug, Deserialize)]
pub(crate) struct GroupQuery {
    pub group: String,
}

/// Which points.
#[derive(Debug, Deserialize)]
pub(crate) struct PointsQuery {
    pub group: String,
    pub from: Option<String>,
    pub to: Option<String>,
}

/// Which job.
#[derive(Debug, Deserialize)]
pub(crate) struct JobQuery {
    pub id: String,
}

/// Which host may write which group.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemberRequest {
    pub group: String,
    pub host: String,
    #[serde(default)]
    pub force: bool,
}

/// Order for a base on a device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BaseRequest {
    pub volume: String,
    pub device: PathBuf,
    #[serde(default)]
    pub overwrite: bool,
    #[serde(default)]
    pub host: Option<String>,
}

/// Names a volume.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VolumeRequest {
    pub volume: String,
    #[serde(default)]
    pub host: Option<String>,
}

/// Names a point.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PointRequest {
    pub group: String,
    pub at: String,
}

/// Order for a view.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ViewRequest {
    pub group: String,
    pub at: String,
    pub export: Option<String>,
    #[serde(default)]
    pub read_only: bool,
}

/// Names a view.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CloseRequest {
    pub id: String,
}

/// Order for a copy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RestoreRequest {
    pub volume: String,
    pub at: String,
    pub out: PathBuf,
}

/// Change of a policy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicyRequest {
    pub group: String,
    pub set: BTreeMap<String, String>,
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.code {
            2 => StatusCode::BAD_REQUEST,
            3 => StatusCode::NOT_FOUND,
            4 => StatusCode::CONFLICT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.document())).into_response()
    }
}

impl From<farshore_target::Error> for Failure {
    fn from(error: farshore_target::Error) -> Self {
        use farshore_target::Kind;
        #[expect(clippy::wildcard_enum_match_arm, reason = "the kinds may grow; all others are plain failures")]
        let code = match error.kind() {
            Kind::NotFound => 3,
            Kind::Refused => 4,
            Kind::Invalid => 2,
            _ => 1,
        };
        let text = crate::chain(&anyhow::Error::new(error));
        let (what, why) = text.split_once(": ").unwrap_or(("target", &text));
        Self { what: what.into(), why: why.into(), hint: None, code }
    }
}

/// Work of the service that may wait for disks runs where that disturbs nobody.
async fn work(service: Arc<Service>, work: impl FnOnce(&Service) -> Result<Value, Failure> + Send + 'static) -> Answer {
    tokio::task::spawn_blocking(move || work(&service))
        .await
        .map_err(|error| Failure::failed("request", error.to_string()))?
        .map(Json)
}

type Shared = State<Arc<Service>>;

/// The API's routes.
pub(crate) fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/groups", get(|State(s): Shared| work(s, |s| s.groups())))
        .route("/v1/points", get(|State(s): Shared, Query(q): Query<PointsQuery>| work(s, move |s| s.points(&q))))
        .route("/v1/alarms", get(|State(s): Shared| work(s, |s| Ok(s.alarms()))))
        .route(
            "/v1/group/add",
            post(|State(s): Shared, Json(r): Json<MemberRequest>| work(s, move |s| s.add_member(&r))),
        )
        .route(
            "/v1/group/remove",
            post(|State(s): Shared, Json(r): Json<MemberRequest>| work(s, move |s| s.remove_member(&r))),
        )
        .route(
            "/v1/base/attach",
            post(|State(s): Shared, Json(r): Json<BaseRequest>| work(s, move |s| s.attach_base(&r))),
        )
        .route(
            "/v1/base/detach",
            post(|State(s): Shared, Json(r): Json<VolumeRequest>| work(s, move |s| s.detach_base(&r))),
        )
        .route("/v1/bases", get(|State(s): Shared, Query(q): Query<GroupQuery>| work(s, move |s| s.bases(&q.group))))
        .route("/v1/retention/resume", post(|State(s): Shared| work(s, |s| s.resume_retention())))
        .route("/v1/hold/add", post(|State(s): Shared, Json(r): Json<PointRequest>| work(s, move |s| s.add_hold(&r))))
        .route(
            "/v1/hold/remove",
            post(|State(s): Shared, Json(r): Json<PointRequest>| work(s, move |s| s.remove_hold(&r))),
        )
        .route("/v1/holds", get(|State(s): Shared, Query(q): Query<GroupQuery>| work(s, move |s| s.holds(&q.group))))
        .route("/v1/view/open", post(|State(s): Shared, Json(r): Json<ViewRequest>| work(s, move |s| s.open_view(&r))))
        .route(
            "/v1/view/close",
            post(|State(s): Shared, Json(r): Json<CloseRequest>| work(s, move |s| s.close_view(&r.id))),
        )
        .route("/v1/views", get(|State(s): Shared| work(s, |s| Ok(s.views()))))
        .route("/v1/restore", post(|State(s): Shared, Json(r): Json<RestoreRequest>| work(s, move |s| s.restore(&r))))
        .route("/v1/job", get(|State(s): Shared, Query(q): Query<JobQuery>| work(s, move |s| s.job(&q.id))))
        .route("/v1/policy", get(|State(s): Shared, Query(q): Query<GroupQuery>| work(s, move |s| s.policy(&q.group))))
        .route("/v1/policy", post(|State(s): Shared, Json(r): Json<PolicyRequest>| work(s, move |s| s.set_policy(&r))))
        .with_state(service)
}
