//! The views of a stream: named, durable, each keeping its point by a hold; and restores.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{Name, PointId, VolumeIndex};
use farshore_uring::Storage;

use crate::catalog::{Hold, HostRecord};
use crate::error::{Error, Kind, Result};
use crate::group::GroupHost;
use crate::growth;
use crate::history::History;
use crate::points::Point;
use crate::restore::{FileOutput, Progress, restore};
use crate::scratch::Scratch;
use crate::view::{View, ViewOf, ViewOptions};

/// Most views of one stream: each may hold history back and pins memory.
pub const VIEWS_MAX: usize = 256;
const NOTE: &str = "view ";
const RESTORE_REASON: &str = "restore of volume ";

/// A view that the catalog knows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ViewRecord {
    /// Its name.
    pub id: Name,
    /// Which state of which volume.
    pub of: ViewOf,
    /// The hold that keeps the point.
    pub hold: u64,
    /// Refuses writes.
    pub read_only: bool,
}

impl ViewRecord {
    fn key(id: &Name, volume: VolumeIndex) -> String {
        format!("{NOTE}{id} {volume}")
    }

    fn value(&self) -> String {
        let mode = if self.read_only { "ro" } else { "rw" };
        format!("{} {} {} {} {mode}", self.of.point, self.of.size, self.of.block, self.hold)
    }

    fn parse(key: &str, value: &str) -> Option<Self> {
        let (id, volume) = key.strip_prefix(NOTE)?.split_once(' ')?;
        let mut fields = value.split(' ');
        let of = ViewOf {
            point: fields.next()?.parse().ok()?,
            volume: VolumeIndex(volume.parse().ok()?),
            size: fields.next()?.parse().ok()?,
            block: fields.next()?.parse().ok()?,
        };
        let hold = fields.next()?.parse().ok()?;
        let read_only = match fields.next()? {
            "ro" => true,
            "rw" => false,
            _ => return None,
        };
        Some(Self { id: Name::new(id).ok()?, of, hold, read_only })
    }
}

/// The views of a stream, by name and volume.
#[must_use]
pub fn list_views<S: Storage>(stream: &GroupHost<S>) -> Vec<ViewRecord> {
    views_of(&stream.record())
}

/// As [`list_views`], of a stream that need not be open.
#[must_use]
pub fn views_of(record: &HostRecord) -> Vec<ViewRecord> {
    record.notes.iter().filter_map(|(key, value)| ViewRecord::parse(key, value)).collect()
}

/// Opens a view of `volume` at `point` under a name, or goes on with the one of that name, as it was left. From the first
/// opening to [`remove_view`] a hold keeps the point.
///
/// # Errors
/// [`Kind::Refused`] when the name is taken by a view of another point, or there are [`VIEWS_MAX`]; [`Kind::NotFound`] for a
/// point or volume that does not exist or a volume that the point does not include; [`Kind::Damaged`] when known damage touches
/// the point; otherwise from the disk.
pub fn open_view<S: Storage>(
    stream: &Arc<GroupHost<S>>,
    id: &Name,
    point: PointId,
    volume: VolumeIndex,
    options: ViewOptions,
) -> Result<View<S>> {
    let mut views = open_views(stream, id, point, &[volume], options, None)?;
    Ok(views.pop().expect("one view per volume asked for"))
}

/// As [`open_view`] for several volumes, in their order, by one change of the catalog, which also sets `note`, a key and a value
/// of the stream's further facts.
///
/// # Errors
/// As [`open_view`]; what the catalog holds then is for [`remove_views`].
pub fn open_views<S: Storage>(
    stream: &Arc<GroupHost<S>>,
    id: &Name,
    point: PointId,
    volumes: &[VolumeIndex],
    options: ViewOptions,
    note: Option<(&str, &str)>,
) -> Result<Vec<View<S>>> {
    let views = list_views(stream);
    let known = |volume| views.iter().find(|view| view.id == *id && view.of.volume == volume);
    for view in volumes.iter().filter_map(|volume| known(*volume)) {
        if view.of.point != point {
            let text = format!(
                "view {id} of volume {} shows point {}; remove it, or use another name",
                view.of.volume, view.of.point
            );
            return Err(Error::new(Kind::Refused, text));
        }
    }
    let fresh: Vec<VolumeIndex> = volumes.iter().copied().filter(|volume| known(*volume).is_none()).collect();
    if views.len() + fresh.len() > VIEWS_MAX {
        let text = format!("{} has {} views, {VIEWS_MAX} are possible; remove one", stream.id.subject(), views.len());
        return Err(Error::new(Kind::Refused, text));
    }
    let note = note.filter(|(key, value)| stream.record().notes.get(*key).is_none_or(|known| known != value));
    let made = if fresh.is_empty() && note.is_none() {
        Vec::new()
    } else {
        record_views(stream, id, point, &fresh, options.read_only, note)?
    };
    let open = |volume: &VolumeIndex| {
        let record = known(*volume).or_else(|| made.iter().find(|view| view.of.volume == *volume));
        let record = record.expect("known before, or made above");
        let options = ViewOptions { read_only: options.read_only || record.read_only, ..options };
        let history: Arc<dyn History<S>> = Arc::clone(stream) as _;
        View::open(history, &stream.storage, &folder(stream, id, *volume), record.of, options)
    };
    volumes.iter().map(open).collect()
}

fn folder<S: Storage>(stream: &GroupHost<S>, id: &Name, volume: VolumeIndex) -> PathBuf {
    stream.folder.join("views").join(id.as_str()).join(format!("v{volume}"))
}

fn find_volume<S: Storage>(stream: &GroupHost<S>, point: &Point, volume: VolumeIndex) -> Result<VolumeDecl> {
    let record = stream.record();
    let decl = record.volumes.iter().find(|decl| decl.index == volume && point.volumes.contains(&volume)).cloned();
    let decl = decl.map(|decl| growth::as_of(&record, decl, point.id.batch));
    decl.ok_or_else(|| Error::new(Kind::NotFound, format!("point {} does not include volume {volume}", point.id)))
}

/// Holds and records in one change of the catalog: there is never one without the other.
fn record_views<S: Storage>(
    stream: &GroupHost<S>,
    id: &Name,
    point: PointId,
    volumes: &[VolumeIndex],
    read_only: bool,
    note: Option<(&str, &str)>,
) -> Result<Vec<ViewRecord>> {
    let found = stream.check_point(&point)?;
    let mut wanted = Vec::with_capacity(volumes.len());
    for volume in volumes {
        let decl = find_volume(stream, &found, *volume)?;
        // A scratch of that name whose record is gone belongs to nobody.
        Scratch::remove(&stream.storage, &folder(stream, id, *volume))?;
        wanted.push(ViewOf { point, volume: *volume, size: decl.size, block: decl.block });
    }
    let since = stream.alarms.now();
    stream.update(|record| {
        if record.horizon.is_some_and(|horizon| horizon.batch > point.batch) {
            return Err(Error::new(Kind::NotFound, format!("point {point} lies before the horizon")));
        }
        let mut made = Vec::with_capacity(wanted.len());
        for of in wanted {
            let hold = record.next_hold.max(1);
            record.next_hold = hold + 1;
            let reason = format!("view {id} of volume {}", of.volume);
            record.holds.push(Hold { id: hold, point, reason, since });
            let view = ViewRecord { id: id.clone(), of, hold, read_only };
            record.notes.insert(ViewRecord::key(id, of.volume), view.value());
            made.push(view);
        }
        if let Some((key, value)) = note {
            record.notes.insert(key.to_owned(), value.to_owned());
        }
        Ok(made)
    })?
}

/// Removes a view, what was written to it, and its hold. Stop serving it first.
///
/// # Errors
/// [`Kind::NotFound`] when there is none of that name; otherwise from the disk, and then it can be removed again.
pub fn remove_view<S: Storage>(stream: &GroupHost<S>, id: &Name, volume: VolumeIndex) -> Result<()> {
    let mut views = list_views(stream);
    views.retain(|view| view.id == *id && view.of.volume == volume);
    if views.is_empty() {
        return Err(Error::new(Kind::NotFound, format!("view {id} of volume {volume} of {}", stream.id.subject())));
    }
    forget_views(stream, &views, None)
}

/// Removes the views of all volumes under a name as [`remove_view`] does, and the fact of key `note`, by one change of the
/// catalog.
///
/// # Errors
/// From the disk, and then they can be removed again.
pub fn remove_views<S: Storage>(stream: &GroupHost<S>, id: &Name, note: &str) -> Result<()> {
    let mut views = list_views(stream);
    views.retain(|view| view.id == *id);
    forget_views(stream, &views, Some(note))
}

/// The records go last: a crash before leaves views that can be removed again.
fn forget_views<S: Storage>(stream: &GroupHost<S>, views: &[ViewRecord], note: Option<&str>) -> Result<()> {
    for view in views {
        Scratch::remove(&stream.storage, &folder(stream, &view.id, view.of.volume))?;
    }
    stream.update(|record| {
        record.holds.retain(|hold| !views.iter().any(|view| view.hold == hold.id));
        for view in views {
            record.notes.remove(&ViewRecord::key(&view.id, view.of.volume));
        }
        if let Some(note) = note {
            record.notes.remove(note);
        }
    })
}

/// Writes `volume` as of `point` to a new file or a block device at `path`; see [`restore`]. A hold keeps the point meanwhile.
///
/// # Errors
/// As [`FileOutput::open`] and [`restore`]; [`Kind::NotFound`] for what does not exist.
pub fn restore_volume<S: Storage>(
    stream: &GroupHost<S>,
    point: PointId,
    volume: VolumeIndex,
    path: &Path,
    progress: impl FnMut(Progress) -> bool,
) -> Result<Progress> {
    let found = stream.check_point(&point)?;
    let decl = find_volume(stream, &found, volume)?;
    let of = ViewOf { point, volume, size: decl.size, block: decl.block };
    let hold = stream.add_hold(point, &format!("{RESTORE_REASON}{volume}"))?;
    let done = FileOutput::open(path, of.size).and_then(|mut out| restore(stream, &of, &mut out, progress));
    let released = stream.remove_hold(hold);
    done.and_then(|done| released.map(|()| done))
}

/// Lets the holds of restores go that a crash left behind. Call it when the stream is opened, before any restore.
///
/// # Errors
/// From the disk.
pub fn release_stale_holds<S: Storage>(stream: &GroupHost<S>) -> Result<()> {
    if !stream.record().holds.iter().any(|hold| hold.reason.starts_with(RESTORE_REASON)) {
        return Ok(());
    }
    stream.update(|record| record.holds.retain(|hold| !hold.reason.starts_with(RESTORE_REASON)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_catalog() {
        let of = ViewOf {
            point: "g1-i2-b345".parse().expect("well-formed"),
            volume: VolumeIndex(7),
            size: 1 << 40,
            block: 4096,
        };
        let view = ViewRecord { id: Name::new("drill-1.x").expect("a name"), of, hold: 9, read_only: true };
        let key = ViewRecord::key(&view.id, of.volume);
        assert_eq!(ViewRecord::parse(&key, &view.value()), Some(view));
        for (key, value) in
            [("view a", ""), ("view a 1", "g1-i2-b3 1 512 1"), ("other", "x"), ("view a 1", "g1-i2-b3 1 512 1 xx")]
        {
            assert_eq!(ViewRecord::parse(key, value), None, "{key} = {value}");
        }
    }
}
