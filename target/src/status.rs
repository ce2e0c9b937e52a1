//! What the admin interface asks: plain structs, no serialisation.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use farshore_proto::message::Tail;
use farshore_proto::{BatchNo, Generation, Name, PointId, VolumeIndex, WallTime};
use farshore_uring::Storage;

use crate::bases::BaseDevice;
use crate::catalog::Hold;
use crate::error::{Error, Kind, Result};
use crate::group::GroupHost;
use crate::lane::LaneStatus;
use crate::points::Point;
use crate::target::Target;

/// A volume of a stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeStatus {
    /// Number in the group.
    pub index: VolumeIndex,
    /// Name.
    pub name: Name,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Points include it.
    pub joined: bool,
}

/// One stream: a host's part of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamStatus {
    /// Group.
    pub group: Name,
    /// Host.
    pub host: Name,
    /// The host may write it.
    pub member: bool,
    /// Main line of history.
    pub generation: Generation,
    /// Session, pause, stop.
    pub lane: LaneStatus,
    /// Why the stream cannot be opened, if so; then only the catalog's facts are known.
    pub broken: Option<String>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Devices that carry bases, by volume; also of volumes that the source has not brought yet.
    pub devices: BTreeMap<Name, BaseDevice>,
    /// Last batch.
    pub tail: Option<Tail>,
    /// An event is open: no cut is recoverable.
    pub event_open: bool,
    /// Newest recoverable point.
    pub newest: Option<Point>,
    /// Oldest recoverable point kept.
    pub oldest: Option<Point>,
    /// Recoverable points kept.
    pub points: usize,
    /// Age of the newest recoverable point by its source time; `None` without one.
    pub rpo: Option<Duration>,
    /// The horizon.
    pub horizon: Option<PointId>,
    /// Pins.
    pub holds: Vec<Hold>,
    /// Damage, for a person.
    pub damage: Vec<String>,
    /// Frames of batches up to this one were checked.
    pub checked: BatchNo,
    /// Bytes of segments.
    pub journal_bytes: u64,
    /// Segments.
    pub segments: usize,
    /// Since the target started: batches journaled.
    pub batches: u64,
    /// Since the target started: bytes of batches received.
    pub received_bytes: u64,
    /// Since the target started: bytes that guests wrote for them.
    pub raw_bytes: u64,
    /// Since the target started: group commits.
    pub commits: u64,
}

/// A recovery point, for listings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointInfo {
    /// Host whose stream it is on.
    pub host: Name,
    /// It is one of a whole group and not of one host of several.
    pub is_group: bool,
    /// The frames that it came with were checked.
    pub verified: bool,
    /// A hold keeps it.
    pub held: bool,
    /// The point.
    pub point: Point,
}

/// Which point somebody means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PointSpec {
    /// The newest.
    Latest,
    /// The newest application-consistent one.
    LatestApp,
    /// The newest with this name.
    Bookmark(Name),
    /// This one.
    Id(PointId),
    /// The newest not after this time of the source's clock.
    At(WallTime),
}

impl FromStr for PointSpec {
    type Err = Error;

    /// `latest`, `latest-app`, `bookmark:NAME` or a point's id. A time is for the caller to parse, into [`PointSpec::At`].
    fn from_str(text: &str) -> Result<Self> {
        let bad = |error: farshore_proto::Error| Error::new(Kind::Invalid, format!("point {text:?}")).caused(error);
        match text {
            "latest" => Ok(Self::Latest),
            "latest-app" => Ok(Self::LatestApp),
            _ => match text.strip_prefix("bookmark:") {
                Some(name) => Name::new(name).map(Self::Bookmark).map_err(bad),
                None => text.parse().map(Self::Id).map_err(bad),
            },
        }
    }
}

/// The point of a stream that `spec` means, if it can be served.
///
/// # Errors
/// [`Kind::NotFound`] when there is none; [`Kind::Refused`] when it is not recoverable; [`Kind::Damaged`] when damage
/// touches it, naming the ranges.
pub fn resolve_point<S: Storage>(stream: &GroupHost<S>, spec: &PointSpec) -> Result<Point> {
    let found = {
        let points = stream.points();
        let found = match spec {
            PointSpec::Latest => points.newest(),
            PointSpec::LatestApp => points.newest_app(),
            PointSpec::Bookmark(name) => points.bookmark(name),
            PointSpec::Id(id) => return drop_then_check(points, stream, id),
            PointSpec::At(time) => points.at_time(*time),
        };
        found.map(|point| point.id)
    };
    let Some(id) = found else {
        return Err(Error::new(Kind::NotFound, format!("{} has no such recoverable point", stream.id.subject())));
    };
    stream.check_point(&id)
}

fn drop_then_check<S: Storage, G>(guard: G, stream: &GroupHost<S>, id: &PointId) -> Result<Point> {
    drop(guard);
    stream.check_point(id)
}

impl<S: Storage> Target<S> {
    /// Every stream.
    #[must_use]
    pub fn status(&self, now: WallTime) -> Vec<StreamStatus> {
        let broken = self.broken();
        let mut all = Vec::new();
        for (group, record) in self.groups() {
            for (host, record) in record.hosts {
                let key = (group.clone(), host.clone());
                let mut status = StreamStatus {
                    group: group.clone(),
                    host,
                    member: record.member,
                    generation: record.generation,
                    lane: LaneStatus::default(),
                    broken: broken.get(&key).cloned(),
                    volumes: Vec::new(),
                    devices: BaseDevice::all(&record).collect(),
                    tail: None,
                    event_open: false,
                    newest: None,
                    oldest: None,
                    points: 0,
                    rpo: None,
                    horizon: record.horizon,
                    holds: record.holds,
                    damage: Vec::new(),
                    checked: record.checked,
                    journal_bytes: 0,
                    segments: 0,
                    batches: 0,
                    received_bytes: 0,
                    raw_bytes: 0,
                    commits: 0,
                };
                let mut joined = Vec::new();
                if let Some(lane) = self.lane(&key) {
                    status.lane = lane.status();
                    joined.clone_from(&status.lane.joined);
                    fill(&mut status, lane.stream(), now);
                }
                status.volumes = record
                    .volumes
                    .into_iter()
                    .map(|decl| VolumeStatus {
                        joined: joined.contains(&decl.index),
                        index: decl.index,
                        name: decl.name,
                        size: decl.size,
                        block: decl.block,
                    })
                    .collect();
                all.push(status);
            }
        }
        all
    }

    /// The recoverable points of a group's hosts, oldest first, with source times in `from..=to`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is no such group.
    pub fn points(&self, group: &Name, from: Option<WallTime>, to: Option<WallTime>) -> Result<Vec<PointInfo>> {
        let streams = self.streams(group)?;
        let is_group = streams.len() == 1;
        let mut all = Vec::new();
        for (host, stream) in streams {
            let record = stream.record();
            let checked = stream.checked();
            let horizon = record.horizon.map_or(BatchNo(0), |point| point.batch);
            let points = stream.points();
            let inside = |point: &&Point| {
                point.id.batch >= horizon
                    && from.is_none_or(|from| point.time >= from)
                    && to.is_none_or(|to| point.time <= to)
            };
            all.extend(points.recoverable().filter(inside).map(|point| PointInfo {
                host: host.clone(),
                is_group,
                verified: point.id.batch <= checked,
                held: record.holds.iter().any(|hold| hold.point == point.id),
                point: point.clone(),
            }));
        }
        all.sort_by_key(|info| (info.point.time, info.point.id));
        Ok(all)
    }

    /// The group's only stream, or the one of `host`.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Invalid`] when the group has several hosts and none is named.
    pub fn stream(&self, group: &Name, host: Option<&Name>) -> Result<std::sync::Arc<GroupHost<S>>> {
        let mut streams = self.streams(group)?;
        if let Some(host) = host {
            return streams
                .remove(host)
                .ok_or_else(|| Error::new(Kind::NotFound, format!("host {host} of group {group}")));
        }
        if streams.len() > 1 {
            let hosts: Vec<_> = streams.keys().map(ToString::to_string).collect();
            return Err(Error::new(Kind::Invalid, format!("group {group} has hosts {}: name one", hosts.join(", "))));
        }
        streams
            .pop_first()
            .map(|(_, stream)| stream)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("group {group}")))
    }
}

fn fill<S: Storage>(status: &mut StreamStatus, stream: &GroupHost<S>, now: WallTime) {
    status.tail = status.lane.tail;
    status.event_open = status.lane.event_open;
    {
        let points = stream.points();
        let newest = points.newest().cloned();
        status.rpo = newest.as_ref().map(|point| now.since(point.time));
        status.newest = newest;
        status.oldest = points.recoverable().next().cloned();
        status.points = points.recoverable().count();
    }
    status.damage = stream.damage().iter().map(ToString::to_string).collect();
    status.checked = stream.checked();
    status.journal_bytes = stream.segments.bytes();
    status.segments = stream.segments.list().len();
    status.batches = stream.counters.batches.value();
    status.received_bytes = stream.counters.received_bytes.value();
    status.raw_bytes = stream.counters.raw_bytes.value();
    status.commits = stream.counters.commits.value();
}
