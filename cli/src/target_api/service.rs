//! What the target's API does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_proto::text::{last_shown_as, parse_duration, parse_size, parse_time, show_time};
use farshore_proto::{Name, PointId, WallTime};
use farshore_target::Kind;
use farshore_target::bases::{AttachBase, BaseDevice};
use farshore_target::group::GroupHost;
use farshore_target::points::Point;
use farshore_target::scratch::Space;
use farshore_target::status::{PointInfo, PointSpec, StreamStatus, VolumeStatus, resolve_point};
use farshore_target::target::Target;
use farshore_target::views::{release_stale_holds, restore_volume};
use farshore_uring::DirStorage;
use serde_json::{Value, json};

use super::exports::{Export, Exports};
use super::jobs::Jobs;
use super::{
    BaseRequest, MemberRequest, PointRequest, PointsQuery, PolicyRequest, RestoreRequest, ViewRequest, VolumeRequest,
};
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
    /// Over an open target; `sockets` is the folder for views whose place is not given, `space` what each volume of a
    /// view may take of the disk. Views that were open before a
    /// restart are served again.
    pub(crate) fn new(target: Arc<Target<DirStorage>>, sockets: PathBuf, space: Space) -> Self {
        let mut exports = Exports::new(sockets, space);
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
        let mut streams: BTreeMap<Name, Vec<StreamStatus>> = BTreeMap::new();
        for status in self.target.status(self.target.alarms().now()) {
            streams.entry(status.group.clone()).or_default().push(status);
        }
        Ok(json!(streams.iter().map(|(group, streams)| group_document(group, streams)).collect::<Vec<_>>()))
    }

    pub(super) fn points(&self, query: &PointsQuery) -> Result<Value, Failure> {
        let group = parse_name("group", &query.group)?;
        let time = |text: &Option<String>| -> Result<Option<WallTime>, Failure> {
            text.as_deref().map(parse_time).transpose().map_err(|error| Failure::usage("time", error.to_string()))
        };
        let points = self
            .target
            .points(&group, time(&query.from)?, time(&query.to)?.map(last_shown_as))
            .map_err(|_| no_group(&group))?;
        let document = |info: PointInfo| point_document(&info.point, info.verified, info.is_group);
        Ok(json!(points.into_iter().map(document).collect::<Vec<_>>()))
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

    /// Takes a device into use, as a job.
    pub(super) fn attach_base(&self, request: &BaseRequest) -> Result<Value, Failure> {
        let (group, volume) = split_volume(&request.volume)?;
        let host = request.host.as_deref().map(|host| parse_name("host", host)).transpose()?;
        let (path, overwrite) = (request.device.clone(), request.overwrite);
        let facts = json!({ "volume": request.volume, "device": path });
        let order = AttachBase { group, host, volume, path, overwrite };
        let target = Arc::clone(&self.target);
        self.jobs.start(facts, 0, move |job| {
            let made = target.attach_base(&order, |progress| job.progress(progress.position, progress.size))?;
            job.progress(made.size, made.size);
            job.note("size_bytes", json!(made.size));
            Ok(())
        })
    }

    pub(super) fn detach_base(&self, request: &VolumeRequest) -> Result<Value, Failure> {
        let (group, volume) = split_volume(&request.volume)?;
        let host = request.host.as_deref().map(|host| parse_name("host", host)).transpose()?;
        let freed = self.target.detach_base(&group, host.as_ref(), &volume)?;
        Ok(json!({ "volume": request.volume, "device": freed.path }))
    }

    /// Where the bases of a group's volumes are; those that no source has brought yet are `waiting`.
    pub(super) fn bases(&self, group: &str) -> Result<Value, Failure> {
        let group = parse_name("group", group)?;
        let mut streams = self.target.status(self.target.alarms().now());
        streams.retain(|status| status.group == group);
        if streams.is_empty() {
            return Err(no_group(&group));
        }
        let mut list = Vec::new();
        for status in streams {
            let mut devices = status.devices;
            for volume in &status.volumes {
                let device = devices.remove(&volume.name);
                let state = if status.broken.is_some() { "unavailable" } else { "in use" };
                list.push(base_document(&status.host, &volume.name, device.as_ref(), volume.size, state));
            }
            list.extend(
                devices
                    .iter()
                    .map(|(volume, device)| base_document(&status.host, volume, Some(device), device.size, "waiting")),
            );
        }
        Ok(json!(list))
    }

    pub(super) fn resume_retention(&self) -> Result<Value, Failure> {
        let reason = self.target.resume_retention()?;
        Ok(json!({ "reason": reason }))
    }

    /// Finds a point: `latest`, `latest-app`, `bookmark:NAME`, an id, or a time.
    pub(super) fn find(&self, group: &str, at: &str) -> Result<Found, Failure> {
        let stream = self.stream(group)?;
        let spec = match at.parse::<PointSpec>() {
            Ok(spec) => spec,
            Err(_) => PointSpec::At(parse_time(at).map(last_shown_as).map_err(|_| {
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
        let mut exports = self.exports();
        exports.open(&found, &self.target.groups(), export, request.read_only)
    }

    pub(super) fn close_view(&self, id: &str) -> Result<Value, Failure> {
        self.exports().close(id)
    }

    pub(super) fn views(&self) -> Value {
        self.exports().list()
    }

    pub(super) fn restore(&self, request: &RestoreRequest) -> Result<Value, Failure> {
        let (group, volume) = split_volume(&request.volume)?;
        let found = self.find(group.as_str(), &request.at)?;
        let decl = found.stream.record().volumes.into_iter().find(|decl| decl.name == volume);
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

/// From GROUP/VOLUME.
fn split_volume(text: &str) -> Result<(Name, Name), Failure> {
    let (group, volume) = text.split_once('/').ok_or_else(|| Failure::usage(text, "is not GROUP/VOLUME"))?;
    Ok((parse_name("group", group)?, parse_name("volume", volume)?))
}

/// A group as `groups --json` shows it: its hosts, and the state of the first that has written it.
fn group_document(group: &Name, streams: &[StreamStatus]) -> Value {
    let hosts: Vec<String> =
        streams.iter().filter(|status| status.member).map(|status| status.host.to_string()).collect();
    let mut document = json!({ "group": group.to_string(), "hosts": hosts, "state": "empty", "points": 0 });
    if let Some(status) = streams.iter().find(|status| status.broken.is_none()) {
        let lane = &status.lane;
        document["state"] = json!(if lane.stopped.is_some() {
            "stopped"
        } else if lane.paused.is_some() {
            "paused"
        } else if lane.connected {
            "receiving"
        } else {
            "disconnected"
        });
        document["reason"] = json!(lane.stopped.as_ref().or(lane.paused.as_ref()));
        let point = |point: &Option<Point>| {
            point.as_ref().map(|point| point_document(point, point.id.batch <= status.checked, streams.len() == 1))
        };
        document["points"] = json!(status.points);
        document["oldest_point"] = json!(point(&status.oldest));
        document["newest_point"] = json!(point(&status.newest));
        document["generation"] = json!(status.generation.0);
        document["journal_bytes"] = json!(status.journal_bytes);
        document["holds"] = json!(status.holds.len());
        let volume = |volume: &VolumeStatus| json!({ "volume": volume.name.to_string(), "size_bytes": volume.size });
        document["volumes"] = json!(status.volumes.iter().map(volume).collect::<Vec<_>>());
    }
    for status in streams {
        if let Some(reason) = &status.broken {
            document["state"] = json!("broken");
            document["reason"] = json!(format!("{}: {reason}", status.host));
        }
    }
    document
}

/// A point as `points --json` shows it.
fn point_document(point: &Point, verified: bool, is_group: bool) -> Value {
    json!({
        "id": point.id.to_string(),
        "time": show_time(point.time),
        "received": show_time(point.received),
        "scope": if is_group { "group" } else { "member" },
        "kind": if point.app_consistent { "app" } else { "crash" },
        "bookmark": point.bookmark.as_ref().map(ToString::to_string),
        "generation": point.id.generation.0,
        "recoverable": point.recoverable,
        "verified": verified,
    })
}

fn base_document(host: &Name, volume: &Name, device: Option<&BaseDevice>, size: u64, state: &str) -> Value {
    json!({
        "volume": volume.to_string(),
        "host": host.to_string(),
        "device": device.map(|device| &device.path),
        "size_bytes": size,
        "state": state,
    })
}
