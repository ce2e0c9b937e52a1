//! What the target's API does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_proto::text::{parse_duration, parse_size, parse_time, show_time};
use farshore_proto::{Name, PointId, WallTime};
use farshore_target::Kind;
use farshore_target::group::GroupHost;
use farshore_target::points::Point;
use farshore_target::status::{PointSpec, resolve_point};
use farshore_target::target::Target;
use farshore_target::views::{release_stale_holds, restore_volume};
use farshore_uring::DirStorage;
use serde_json::{Value, json};

use super::exports::{Export, Exports};
use super::jobs::Jobs;
use super::{MemberRequest, PointRequest, PointsQuery, PolicyRequest, RestoreRequest, ViewRequest};
use crate::failure::Failure;

/// One stream of the target.
pub(super) type Stream = GroupHost<DirStorage>;

/// The target behind its API.
pub(crate) struct Service {
    target: Arc<Target<DirStorage>>,
    exports: Mutex<Exports>,
    jobs: Jobs,
}

/// A point that was asked for by name, id or time.
pub(super) struct Found {
    pub stream: Arc<Stream>,
    pub point: Point,
}

impl Service {
    /// Over an open target; `sockets` is the folder for views whose place is not given. Views that were open before a
    /// restart are served again.
    pub(crate) fn new(target: Arc<Target<DirStorage>>, sockets: PathBuf) -> Self {
        let mut exports = Exports::new(sockets);
        for group in target.groups().keys() {
            if let Ok(stream) = only_stream(&target, group) {
                if let Err(error) = release_stale_holds(&stream) {
                    tracing::error!(group = group.as_str(), %error, "holds of unfinished restores are kept");
                }
                exports.reopen(&stream);
            }
        }
        Self { target, exports: Mutex::new(exports), jobs: Jobs::default() }
    }

    /// Ends all exports; what was written to views is durable then.
    pub(crate) fn stop(&self) {
        self.exports().stop();
    }

    fn exports(&self) -> MutexGuard<'_, Exports> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stream(&self, group: &str) -> Result<Arc<Stream>, Failure> {
        only_stream(&self.target, &parse_name("group", group)?)
    }

    pub(super) fn groups(&self) -> Result<Value, Failure> {
        let mut list = Vec::new();
        for (name, record) in self.target.groups() {
            let hosts: Vec<String> =
                record.hosts.iter().filter(|(_, host)| host.member).map(|(host, _)| host.to_string()).collect();
            let mut document = json!({ "group": name.to_string(), "hosts": hosts, "state": "empty", "points": 0 });
            if let Ok(stream) = only_stream(&self.target, &name) {
                self.describe(&name, &stream, &mut document);
            }
            for ((group, host), reason) in self.target.broken() {
                if group == name {
                    document["state"] = json!("broken");
                    document["reason"] = json!(format!("{host}: {reason}"));
                }
            }
            list.push(document);
        }
        Ok(json!(list))
    }

    fn describe(&self, name: &Name, stream: &Stream, document: &mut Value) {
        let lane = self.target.lane(&(name.clone(), stream.id.host_name.clone()));
        let status = lane.map(|lane| lane.status()).unwrap_or_default();
        document["state"] = json!(if status.stopped.is_some() {
            "stopped"
        } else if status.paused.is_some() {
            "paused"
        } else if status.connected {
            "receiving"
        } else {
            "disconnected"
        });
        document["reason"] = json!(status.stopped.or(status.paused));
        let points = stream.points();
        document["points"] = json!(points.recoverable().count());
        document["oldest_point"] = point_or_null(stream, points.recoverable().next());
        document["newest_point"] = point_or_null(stream, points.newest());
        drop(points);
        let record = stream.record();
        document["generation"] = json!(record.generation.0);
        document["journal_bytes"] = json!(stream.segments.list().iter().map(|segment| segment.bytes).sum::<u64>());
        document["holds"] = json!(record.holds.len());
        document["volumes"] = json!(
            record
                .volumes
                .iter()
                .map(|volume| json!({ "volume": volume.name.to_string(), "size_bytes": volume.size }))
                .collect::<Vec<_>>()
        );
    }

    pub(super) fn points(&self, query: &PointsQuery) -> Result<Value, Failure> {
        let stream = self.stream(&query.group)?;
        let time = |text: &Option<String>| -> Result<Option<WallTime>, Failure> {
            text.as_deref().map(parse_time).transpose().map_err(|error| Failure::usage("time", error.to_string()))
        };
        let (from, to) = (time(&query.from)?.unwrap_or_default(), time(&query.to)?.unwrap_or(WallTime(u64::MAX)));
        let horizon = stream.record().horizon.map(|point| point.batch);
        let points = stream.points();
        let list: Vec<Value> = points
            .recoverable()
            .filter(|point| horizon.is_none_or(|horizon| point.id.batch >= horizon))
            .filter(|point| point.time >= from && point.time <= to)
            .map(|point| point_document(&stream, point))
            .collect();
        Ok(json!(list))
    }

    pub(super) fn alarms(&self) -> Value {
        let document = |alarm: farshore_target::alarm::Alarm| {
            json!({
                "code": alarm.code.to_string(),
                "subject": alarm.subject,
                "text": alarm.detail,
                "since": show_time(alarm.since),
            })
        };
        json!(self.target.alarm_list().into_iter().map(document).collect::<Vec<_>>())
    }

    pub(super) fn add_member(&self, request: &MemberRequest) -> Result<Value, Failure> {
        let (group, host) = (parse_name("group", &request.group)?, parse_name("host", &request.host)?);
        self.target.add_member(&group, &host)?;
        Ok(json!({ "group": group.to_string(), "host": host.to_string() }))
    }

    pub(super) fn remove_member(&self, request: &MemberRequest) -> Result<Value, Failure> {
        let (group, host) = (parse_name("group", &request.group)?, parse_name("host", &request.host)?);
        let connected = self.target.lane(&(group.clone(), host.clone())).is_some_and(|lane| lane.status().connected);
        if connected && !request.force {
            return Err(Failure::refused(format!("host {host}"), format!("is writing group {group} now"))
                .hint("end its protection first, or say --force"));
        }
        self.target.remove_member(&group, &host)?;
        Ok(json!({ "group": group.to_string(), "host": host.to_string() }))
    }

    /// Finds a point: `latest`, `latest-app`, `bookmark:NAME`, an id, or a time.
    pub(super) fn find(&self, group: &str, at: &str) -> Result<Found, Failure> {
        let stream = self.stream(group)?;
        let spec = match at.parse::<PointSpec>() {
            Ok(spec) => spec,
            Err(_) => PointSpec::At(parse_time(at).map_err(|_| {
                Failure::usage(
                    format!("point {at:?}"),
                    "is none of latest, latest-app, bookmark:NAME, a point id (g1-i2-b345), an RFC 3339 time",
                )
            })?),
        };
        let point = resolve_point(&stream, &spec).map_err(|error| {
            if error.kind() != Kind::NotFound {
                return Failure::from(error);
            }
            Failure::not_found(format!("point {at} of group {group}"), error.to_string())
                .hint(format!("`farshore points {group}` lists them"))
        })?;
        Ok(Found { stream, point })
    }

    pub(super) fn add_hold(&self, request: &PointRequest) -> Result<Value, Failure> {
        let found = self.find(&request.group, &request.at)?;
        let id = found.stream.add_hold(found.point.id, "operator")?;
        Ok(
            json!({ "id": id, "group": request.group, "point": found.point.id.to_string(), "time": show_time(found.point.time) }),
        )
    }

    pub(super) fn remove_hold(&self, request: &PointRequest) -> Result<Value, Failure> {
        let found = self.find(&request.group, &request.at)?;
        let record = found.stream.record();
        let hold = record.holds.iter().find(|hold| hold.point == found.point.id && hold.reason == "operator");
        let hold = hold.ok_or_else(|| {
            Failure::not_found(format!("hold on {}", found.point.id), "no operator holds this point")
                .hint("a view's hold ends when the view is closed")
        })?;
        found.stream.remove_hold(hold.id)?;
        Ok(json!({ "id": hold.id, "group": request.group, "point": found.point.id.to_string() }))
    }

    pub(super) fn holds(&self, group: &str) -> Result<Value, Failure> {
        let stream = self.stream(group)?;
        let record = stream.record();
        let time_of = |id: &PointId| stream.points().get(id).map(|point| show_time(point.time));
        let document = |hold: &farshore_target::catalog::Hold| {
            json!({
                "id": hold.id,
                "point": hold.point.to_string(),
                "time": time_of(&hold.point),
                "reason": hold.reason,
                "since": show_time(hold.since),
            })
        };
        Ok(json!(record.holds.iter().map(document).collect::<Vec<_>>()))
    }

    pub(super) fn open_view(&self, request: &ViewRequest) -> Result<Value, Failure> {
        let found = self.find(&request.group, &request.at)?;
        let export = request.export.as_deref().map(Export::parse).transpose()?;
        self.exports().open(&found, export, request.read_only)
    }

    pub(super) fn close_view(&self, id: &str) -> Result<Value, Failure> {
        self.exports().close(id)
    }

    pub(super) fn views(&self) -> Value {
        self.exports().list()
    }

    pub(super) fn restore(&self, request: &RestoreRequest) -> Result<Value, Failure> {
        let (group, volume) = request
            .volume
            .split_once('/')
            .ok_or_else(|| Failure::usage(request.volume.clone(), "is not GROUP/VOLUME"))?;
        let found = self.find(group, &request.at)?;
        let decl = found.stream.record().volumes.into_iter().find(|decl| decl.name.as_str() == volume);
        let decl = decl.filter(|decl| found.point.volumes.contains(&decl.index)).ok_or_else(|| {
            Failure::not_found(
                format!("volume {volume} of group {group}"),
                format!("point {} does not include it", found.point.id),
            )
        })?;
        let facts = json!({
            "volume": request.volume,
            "point": found.point.id.to_string(),
            "time": show_time(found.point.time),
            "out": request.out,
        });
        let out = request.out.clone();
        self.jobs.start(facts, decl.size, move |job| {
            let progress = |progress: farshore_target::restore::Progress| {
                job.progress(progress.position, progress.size);
                true
            };
            let done = restore_volume(&found.stream, found.point.id, decl.index, &out, progress)?;
            job.progress(done.position, done.size);
            Ok(())
        })
    }

    pub(super) fn job(&self, id: &str) -> Result<Value, Failure> {
        self.jobs.get(id)
    }

    pub(super) fn policy(&self, group: &str) -> Result<Value, Failure> {
        let group = parse_name("group", group)?;
        let mut policy: BTreeMap<String, String> = [("keep", "24h"), ("size_limit", "none")]
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let record = self.target.groups().remove(&group).ok_or_else(|| no_group(&group))?;
        policy.extend(record.policy);
        Ok(json!(policy))
    }

    pub(super) fn set_policy(&self, request: &PolicyRequest) -> Result<Value, Failure> {
        let group = parse_name("group", &request.group)?;
        if !self.target.groups().contains_key(&group) {
            return Err(no_group(&group));
        }
        for (key, value) in &request.set {
            check_policy(key, value)?;
        }
        for (key, value) in &request.set {
            let value = Some(value.as_str()).filter(|value| *value != "none");
            self.target.catalog().set_policy(&group, key, value)?;
        }
        self.policy(group.as_str())
    }
}

fn check_policy(key: &str, value: &str) -> Result<(), Failure> {
    let bad = |reason: String| Err(Failure::usage(format!("policy {key}={value}"), reason));
    match key {
        "keep" => parse_duration(value).map(drop).or_else(|error| bad(error.to_string())),
        "size_limit" if value == "none" => Ok(()),
        "size_limit" => parse_size(value).map(drop).or_else(|error| bad(error.to_string())),
        _ => bad("there is no such key; keys are keep and size_limit".into()),
    }
}

pub(super) fn parse_name(what: &str, text: &str) -> Result<Name, Failure> {
    Name::new(text).map_err(|error| Failure::usage(what, error.to_string()))
}

fn no_group(group: &Name) -> Failure {
    Failure::not_found(format!("group {group}"), "the target keeps no such group").hint("`farshore groups` lists them")
}

/// The stream of a group with one host, which is what there is now.
fn only_stream(target: &Target<DirStorage>, group: &Name) -> Result<Arc<Stream>, Failure> {
    let streams = target.streams(group).map_err(|_| no_group(group))?;
    streams
        .into_values()
        .next()
        .ok_or_else(|| Failure::not_found(format!("group {group}"), "no host has written it yet"))
}

/// A point as `points --json` shows it.
pub(super) fn point_document(stream: &Stream, point: &Point) -> Value {
    json!({
        "id": point.id.to_string(),
        "time": show_time(point.time),
        "received": show_time(point.received),
        "scope": "group",
        "kind": if point.app_consistent { "app" } else { "crash" },
        "bookmark": point.bookmark.as_ref().map(ToString::to_string),
        "generation": point.id.generation.0,
        "recoverable": point.recoverable,
        "verified": point.id.batch.0 <= stream.checked().0,
    })
}

fn point_or_null(stream: &Stream, point: Option<&Point>) -> Value {
    point.map_or(Value::Null, |point| point_document(stream, point))
}
