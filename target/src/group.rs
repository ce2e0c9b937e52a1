//! What ingest, views and retention share: the types of the index, and one stream's state, [`GroupHost`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{BatchNo, GroupId, HostId, Name, PointId, VaultId, VolumeIndex};
use farshore_uring::Storage;

use crate::alarm::{AlarmCode, Alarms};
use crate::base::Base;
use crate::bases::BaseDevice;
use crate::catalog::{Catalog, Hold, HostRecord};
use crate::counters::Counters;
use crate::damage::Damage;
use crate::error::{Error, Kind, Result};
use crate::index::Index;
use crate::keys::StreamKeys;
use crate::lease::Leases;
use crate::points::{Point, Points};
use crate::segments::Segments;

/// Whole slots that one [`Content::ZeroExtent`] covers: 64 MiB, the longest discard that a filter passes on, so that a
/// guest's discard of a whole volume costs 16 entries per GiB and not 16,384.
pub const ZERO_EXTENT_SLOTS: u64 = 1024;

/// One version of one piece of one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IndexEntry {
    /// Volume.
    pub volume: VolumeIndex,
    /// Slot; for a [`Content::ZeroExtent`] the first of its slots, a multiple of [`ZERO_EXTENT_SLOTS`].
    pub slot: u64,
    /// Batch that brought it.
    pub batch: BatchNo,
    /// Index of its record in that batch's list.
    pub seq: u32,
    /// First sector within the slot.
    pub start: u8,
    /// Sectors, 1 to 128.
    pub count: u8,
    /// What is there.
    pub content: Content,
}

/// Content of an [`IndexEntry`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeroes in this slot.
    Zero,
    /// Zeroes in [`ZERO_EXTENT_SLOTS`] whole slots.
    ZeroExtent,
    /// Bytes in a frame.
    Chunk(ChunkPlace),
}

/// Where a chunk's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ChunkPlace {
    /// Segment file.
    pub segment: u32,
    /// Byte of the frame's header in that file.
    pub frame_offset: u32,
    /// First byte in the frame's plain content.
    pub within: u32,
}

/// Up to where records are visible, inclusive.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct UpTo {
    /// Batch.
    pub batch: BatchNo,
    /// Index of a record in its list.
    pub seq: u32,
}

impl UpTo {
    /// All of `batch`: what the recovery point at its end shows.
    #[must_use]
    pub fn end_of(batch: BatchNo) -> Self {
        Self { batch, seq: u32::MAX }
    }
}

/// A sealed segment's footer: a finished run of the index inside the segment's file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedRun {
    /// Segment.
    pub segment: u32,
    /// Its file, relative to the storage's root.
    pub path: PathBuf,
    /// First byte of the run.
    pub offset: u64,
    /// Bytes of the run.
    pub len: u64,
    /// First batch in the segment.
    pub first: BatchNo,
    /// Last batch in the segment.
    pub last: BatchNo,
}

/// Plain content of journaled frames.
pub trait FrameStore: Send + Sync {
    /// The plain bytes of the frame whose header is at `frame_offset` of `segment`, authenticated.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the bytes are not what the source sealed; [`Kind::NotFound`] when the segment was dropped;
    /// otherwise from reading.
    fn read_frame(&self, segment: u32, frame_offset: u32) -> Result<Arc<[u8]>>;
}

/// Which stream: one host's part of one group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamId {
    /// Trust domain.
    pub vault: VaultId,
    /// Group.
    pub group: GroupId,
    /// Host.
    pub host: HostId,
    /// Group's name, as in paths and on the command line.
    pub group_name: Name,
    /// Host's name.
    pub host_name: Name,
}

impl StreamId {
    /// The stream of `host` in `group`.
    #[must_use]
    pub fn derive(vault: VaultId, group: &Name, host: &Name) -> Self {
        Self {
            vault,
            group: GroupId::derive(vault, group),
            host: HostId::derive(vault, host),
            group_name: group.clone(),
            host_name: host.clone(),
        }
    }

    /// `group/host`, the subject of alarms.
    #[must_use]
    pub fn subject(&self) -> String {
        format!("{}/{}", self.group_name, self.host_name)
    }

    /// Folder below the storage's root.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        PathBuf::from("groups").join(self.group_name.as_str()).join(self.host_name.as_str())
    }
}

/// One stream's shared state. Ingest writes journal, index and points; views read; retention moves the horizon.
///
/// Locks are held for memory work only, never across a disk call, except the catalog's (rare, small writes). Order where
/// two are held: catalog → points → damage.
pub struct GroupHost<S: Storage> {
    /// Which stream.
    pub id: StreamId,
    /// Where everything lies.
    pub storage: S,
    /// The stream's folder: `groups/<group>/<host>`.
    pub folder: PathBuf,
    /// Opens frames and recomputes chunk ids.
    pub keys: Arc<StreamKeys>,
    /// The journal's files; the [`FrameStore`].
    pub segments: Arc<Segments<S>>,
    /// Which record covers which piece of which slot.
    pub index: Index<S>,
    /// Alarms of the whole target.
    pub alarms: Alarms,
    /// Figures of this stream.
    pub counters: Counters,
    /// Contents that may be sent by reference.
    pub leases: Mutex<Leases>,
    pub(crate) points: RwLock<Points>,
    pub(crate) bases: RwLock<BTreeMap<VolumeIndex, Arc<Base<S>>>>,
    pub(crate) damage: RwLock<Damage>,
    pub(crate) catalog: Arc<Catalog<S>>,
    pub(crate) checked: AtomicU64,
    /// An entry of the active segment is unreadable on disk: the segment is to be closed while the index in memory still says
    /// what it held. A restart would lose the batch.
    pub(crate) rescue: AtomicBool,
}

impl<S: Storage> GroupHost<S> {
    /// The points held, for reading.
    pub fn points(&self) -> RwLockReadGuard<'_, Points> {
        self.points.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The points held, for dropping some of them (metadata only; nothing durable changes).
    pub fn points_mut(&self) -> RwLockWriteGuard<'_, Points> {
        self.points.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The base of `volume`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a volume that the group does not have.
    pub fn base(&self, volume: VolumeIndex) -> Result<Arc<Base<S>>> {
        let bases = self.bases.read().unwrap_or_else(PoisonError::into_inner);
        bases
            .get(&volume)
            .cloned()
            .ok_or_else(|| Error::new(Kind::NotFound, format!("group {} has no volume {volume}", self.id.subject())))
    }

    /// All bases, by volume.
    #[must_use]
    pub fn bases(&self) -> BTreeMap<VolumeIndex, Arc<Base<S>>> {
        self.bases.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens or creates the base of a volume, on the device that the catalog names for it or else in a file. One that is
    /// `known` was made before: it is not made anew.
    ///
    /// # Errors
    /// As [`Base::open_or_create`] and [`Base::open_on_device`]; [`Kind::Refused`] when another device is at the path, or it is
    /// in use.
    pub(crate) fn add_base(&self, decl: &VolumeDecl, known: bool) -> Result<()> {
        let folder = self.folder.join("base");
        if known {
            Base::check_kept(&self.storage, &folder, decl)?;
        }
        let noted = BaseDevice::of(&self.record(), &decl.name);
        let present = self.bases.write().unwrap_or_else(PoisonError::into_inner).remove(&decl.index);
        let is_right = |base: &Arc<Base<S>>| match &noted {
            Some(noted) => base.data_path() == noted.path && base.size() == decl.size,
            None => !base.is_on_device() && base.size() == decl.size,
        };
        if let Some(base) = present.filter(is_right) {
            // From a declaration that failed at another volume: a device cannot be opened twice.
            self.bases.write().unwrap_or_else(PoisonError::into_inner).insert(decl.index, base);
            return Ok(());
        }
        let base = match noted {
            Some(noted) => {
                let device = noted.open(&self.storage)?;
                Base::open_on_device(self.storage.clone(), folder, decl, device, &noted.path)?
            }
            None => Base::open_or_create(self.storage.clone(), folder, decl)?,
        };
        self.bases.write().unwrap_or_else(PoisonError::into_inner).insert(decl.index, Arc::new(base));
        Ok(())
    }

    /// Closes the base of a volume that the catalog does not know.
    pub(crate) fn forget_base(&self, volume: &Name) {
        self.bases.write().unwrap_or_else(PoisonError::into_inner).retain(|_, base| base.name() != volume);
    }

    /// What the catalog says of this stream.
    #[must_use]
    pub fn record(&self) -> HostRecord {
        self.catalog.host(&self.id.group_name, &self.id.host_name).unwrap_or_default()
    }

    /// The group's policy, key by key (`keep`, `size_limit`, …).
    #[must_use]
    pub fn policy(&self) -> BTreeMap<String, String> {
        self.catalog.policy(&self.id.group_name)
    }

    /// Changes the stream's catalog record.
    ///
    /// # Durability
    /// Durable when it returns `Ok`; after an error the record is as before or as changed.
    ///
    /// # Errors
    /// From the disk.
    pub fn update<T>(&self, change: impl FnOnce(&mut HostRecord) -> T) -> Result<T> {
        self.catalog.update_host(&self.id.group_name, &self.id.host_name, change)
    }

    /// Moves the horizon to `point`: durable before this returns, so that the base may then change (I8).
    ///
    /// # Errors
    /// [`Kind::Refused`] for a point that is not recoverable, before the present horizon, or past a hold;
    /// [`Kind::NotFound`] for one that does not exist; otherwise from the disk.
    pub fn set_horizon(&self, point: PointId) -> Result<()> {
        let refuse = |why: String| Err(Error::new(Kind::Refused, format!("horizon of {}: {why}", self.id.subject())));
        match self.points().get(&point) {
            None => return Err(Error::new(Kind::NotFound, format!("point {point} of {}", self.id.subject()))),
            Some(found) if !found.recoverable => return refuse(format!("point {point} is not recoverable")),
            Some(_) => {}
        }
        if let Some(reason) = self.catalog.retention_suspended() {
            return refuse(format!(
                "retention is suspended: {reason}; put the holds back, then `farshore target resume-retention`"
            ));
        }
        let mut verdict = Ok(());
        self.update(|record| {
            if record.horizon.is_some_and(|now| now.batch > point.batch) {
                verdict = refuse(format!("{point} lies before the present one"));
            } else if let Some(hold) = record.holds.iter().find(|hold| hold.point.batch < point.batch) {
                verdict = refuse(format!("{point} lies past hold {} at {}", hold.id, hold.point));
            } else {
                record.horizon = Some(point);
            }
        })?;
        verdict
    }

    /// Keeps `point`, and all that it needs, from retention until [`Self::remove_hold`]. Gives the hold's id.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a point that does not exist or lies before the horizon; otherwise from the disk.
    pub fn add_hold(&self, point: PointId, reason: &str) -> Result<u64> {
        let Some(found) = self.points().get(&point) else {
            return Err(Error::new(Kind::NotFound, format!("point {point} of {}", self.id.subject())));
        };
        let since = self.alarms.now();
        let mut verdict = Ok(0);
        self.update(|record| {
            if record.horizon.is_some_and(|horizon| horizon.batch > found.id.batch) {
                verdict = Err(Error::new(Kind::NotFound, format!("point {point} lies before the horizon")));
                return;
            }
            let id = record.next_hold.max(1);
            record.next_hold = id + 1;
            record.holds.push(Hold { id, point, reason: reason.to_owned(), since });
            verdict = Ok(id);
        })?;
        verdict
    }

    /// Lets a hold go.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none of that id; otherwise from the disk.
    pub fn remove_hold(&self, id: u64) -> Result<()> {
        let found = self.update(|record| {
            let before = record.holds.len();
            record.holds.retain(|hold| hold.id != id);
            record.holds.len() < before
        })?;
        if found { Ok(()) } else { Err(Error::new(Kind::NotFound, format!("hold {id} of {}", self.id.subject()))) }
    }

    /// Refuses a point that known damage touches, naming volume and range; a point that it does not touch is served.
    ///
    /// # Errors
    /// [`Kind::NotFound`], [`Kind::Refused`] (not recoverable) or [`Kind::Damaged`] with the ranges.
    pub fn check_point(&self, point: &PointId) -> Result<Point> {
        let Some(found) = self.points().get(point) else {
            return Err(Error::new(Kind::NotFound, format!("point {point} of {}", self.id.subject())));
        };
        if !found.recoverable {
            return Err(Error::new(
                Kind::Refused,
                format!("point {point} is not recoverable: an event was open at it"),
            ));
        }
        if self.record().horizon.is_some_and(|horizon| horizon.batch > point.batch) {
            return Err(Error::new(Kind::NotFound, format!("point {point} lies before the horizon")));
        }
        let damage = self.damage().clone();
        damage.check(self, &found)?;
        Ok(found)
    }

    /// Damage found so far.
    pub fn damage(&self) -> RwLockReadGuard<'_, Damage> {
        self.damage.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes damage: an alarm, and points that need the bytes are refused from now on, also after a restart.
    pub fn note_damage(&self, place: crate::damage::Damaged) {
        let text = place.to_string();
        let fresh = self.damage.write().unwrap_or_else(PoisonError::into_inner).add(place);
        if fresh {
            tracing::error!(stream = self.id.subject(), damage = text, "journal is damaged");
            self.alarms.raise(AlarmCode::JournalDamaged, &self.id.subject(), &text);
            self.keep_damage();
        }
    }

    /// The subject of alarms about one segment.
    pub(crate) fn segment_subject(&self, number: u32) -> String {
        format!("{} segment {number}", self.id.subject())
    }

    /// Writes the list of damage into the catalog. Where that fails, the damage is found again: by its readers, or by
    /// the next scan.
    pub(crate) fn keep_damage(&self) {
        let places: Vec<_> = self.damage().iter().cloned().collect();
        if let Err(error) = self.update(|record| record.damaged = places) {
            tracing::warn!(stream = self.id.subject(), %error, "the list of damage was not stored");
        }
    }

    /// The last batch up to which every frame was opened and its content compared with its id.
    #[must_use]
    pub fn checked(&self) -> BatchNo {
        BatchNo(self.checked.load(Ordering::Relaxed))
    }

    /// The lease table.
    pub(crate) fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a segment's file: nothing refers to it any more and the index no longer leads there. Readers that still
    /// have it open finish undisturbed.
    ///
    /// # Errors
    /// [`Kind::Refused`] while a lease or a later segment needs it; otherwise from the disk.
    pub fn drop_segment(&self, number: u32) -> Result<()> {
        let horizon = self.record().horizon.map_or(BatchNo(0), |point| point.batch);
        if !self.segments.droppable(horizon).contains(&number) {
            return Err(Error::new(Kind::Refused, format!("segment {number}: batches above the horizon need it")));
        }
        // 1. No lease that is out names a content of this segment, and none granted later will; only then the file goes.
        // A batch under an earlier lease is either not received yet, then that lease is still out, or it is, then the
        // segment that holds it says that it refers here.
        if !self.leases().leave_segment(number) {
            return Err(Error::new(Kind::Refused, format!("segment {number}: contents in it are under lease")));
        }
        self.segments.drop_segment(number)?;
        self.alarms.clear(AlarmCode::EntryDamaged, &self.segment_subject(number));
        let left = self.segments.list().iter().map(|segment| segment.number).collect();
        if self.damage.write().unwrap_or_else(PoisonError::into_inner).forget_below(horizon, &left) {
            self.keep_damage();
            if self.damage().is_empty() {
                self.alarms.clear(AlarmCode::JournalDamaged, &self.id.subject());
            }
        }
        Ok(())
    }
}
