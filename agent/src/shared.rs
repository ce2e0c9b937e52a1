//! What a group's threads share: its capture, sync and state, and the alarms and waiters of its people.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_blkfilter::{Alarm, BackingFile, CaptureGroup, Content, FilterVolume, VolumeSpec};
use farshore_proto::{GroupId, Name, SLOT_BYTES, VolumeIndex};
use farshore_ring::WritingRange;
use farshore_uring::{DirStorage, FileDevice};

use crate::activity::Activity;
use crate::alarms::{Alarms, code};
use crate::evidence::{Doubt, Evidence};
use crate::points::PointBoard;
use crate::source::{Absent, SourceFile};
use crate::state::{GroupState, StateDir, VolumeState};
use crate::sync_thread::{SyncOrder, SyncReport, SyncThread};
use crate::{Error, Result};

/// What a group's threads share.
pub(crate) struct Shared {
    pub name: Name,
    pub capture: Arc<CaptureGroup>,
    pub sync: SyncThread,
    pub alarms: Arc<Alarms>,
    pub points: PointBoard,
    pub store: StateDir<DirStorage>,
    state: Mutex<GroupState>,
    bookmarks: Mutex<VecDeque<Name>>,
    ring_closed: AtomicU64,
    pub activity: Option<Arc<Activity>>,
    pub id: GroupId,
}

/// What marks there are for a volume that is captured.
pub(crate) enum Marks {
    /// None but what is in the ring.
    None,
    /// Those that were saved at the last stop, which was in order; without them nothing is known.
    Saved,
    /// Ranges that the activity log names: first byte and bytes. And those that were saved, if there are any still.
    Log(Vec<(u64, u64)>),
}

impl Shared {
    pub(crate) fn new(
        (name, id): (Name, GroupId),
        capture: Arc<CaptureGroup>,
        sync: SyncThread,
        alarms: Arc<Alarms>,
        (store, state): (StateDir<DirStorage>, GroupState),
        activity: Option<Arc<Activity>>,
    ) -> Arc<Self> {
        let shared = Arc::new(Self {
            name,
            id,
            activity,
            capture,
            sync,
            alarms,
            points: PointBoard::default(),
            store,
            state: Mutex::new(state),
            bookmarks: Mutex::default(),
            ring_closed: AtomicU64::new(0),
        });
        // What is captured must not keep alive what it is captured for.
        let recorder = Arc::downgrade(&shared);
        shared
            .capture
            .set_join_recorder(move |index| recorder.upgrade().is_some_and(|shared| shared.record_join(index)));
        shared
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, GroupState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn compares_everything(&self) -> bool {
        self.state().compare_everything
    }

    /// Changes the group's state, durably. `false`: it could not be written, and is as before.
    pub(crate) fn update_state(&self, change: impl FnOnce(&mut GroupState)) -> bool {
        let mut state = self.state();
        let mut new = state.clone();
        change(&mut new);
        if new == *state {
            return true;
        }
        match self.store.write_group(&self.name, &new) {
            Ok(()) => {
                *state = new;
                self.alarms.clear(code::STATE, self.name.as_str());
                true
            }
            Err(error) => {
                self.alarms.raise(code::STATE, self.name.as_str(), crate::error::chain(&error));
                false
            }
        }
    }

    /// Before the stream says that a volume joins: the next start that finds the stream knows then that the volume's marks are whole.
    fn record_join(&self, index: VolumeIndex) -> bool {
        self.update_state(|state| {
            state.volumes.iter_mut().filter(|volume| volume.index == index.0).for_each(|volume| volume.joined = true);
        })
    }

    pub(crate) fn take_bookmarks(&self) -> VecDeque<Name> {
        std::mem::take(&mut *self.bookmarks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A named cut is wanted; asked for twice before it is made, it is made once.
    pub(crate) fn order_bookmark(&self, name: Name) {
        let mut bookmarks = self.bookmarks.lock().unwrap_or_else(PoisonError::into_inner);
        if !bookmarks.contains(&name) {
            bookmarks.push_back(name);
        }
    }

    /// Every volume of the state is captured, if only as absent.
    pub(crate) fn captures_all(&self) -> bool {
        self.state().volumes.iter().all(|volume| self.capture.volume(VolumeIndex(volume.index)).is_some())
    }

    pub(crate) fn volume_subject(&self, index: VolumeIndex) -> String {
        volume_subject(&self.name, &self.capture, index)
    }

    /// How often the ring ran full.
    pub(crate) fn ring_closed_count(&self) -> u64 {
        self.ring_closed.load(Ordering::Relaxed)
    }

    /// Passes on what the filter has to say.
    pub(crate) fn take_alarms(&self) {
        let group = self.name.as_str();
        while let Some(event) = self.capture.poll_alarm() {
            let set = |code, text: &str| match event.raised {
                true => self.alarms.raise(code, group, text),
                false => self.alarms.clear(code, group),
            };
            match event.alarm {
                Alarm::RingClosed => {
                    if event.raised {
                        self.ring_closed.fetch_add(1, Ordering::Relaxed);
                    }
                    set(
                        code::RING_CLOSED,
                        "the ring is full: writes are marked and will be sent by a resync; no new points until then",
                    );
                }
                Alarm::EventOpen => {
                    set(code::RESYNC, "source and replica may differ; no new points until the resync ends")
                }
                Alarm::WriteFailed { volume, offset, len, errno } => self.alarms.raise(
                    code::WRITE_FAILED,
                    &self.volume_subject(volume),
                    format!("the device failed a write of {len} bytes at {offset} (errno {errno}); the guest was told"),
                ),
                Alarm::FlushFailed { volume, errno } => self.alarms.raise(
                    code::WRITE_FAILED,
                    &self.volume_subject(volume),
                    format!(
                        "the device failed a flush (errno {errno}); the guest was told. What was written before it may be lost on the \
                         device, and the points have it"
                    ),
                ),
                Alarm::Unreadable { volume, offset, len } => self.alarms.raise(
                    code::UNREADABLE,
                    &self.volume_subject(volume),
                    format!("{len} bytes at {offset} cannot be read; points lack them"),
                ),
                Alarm::QueueDropped { volume, requests } => self.alarms.raise(
                    code::DROPPED,
                    &self.volume_subject(volume),
                    format!("{requests} requests were dropped in flight; their ranges are compared"),
                ),
            }
            self.points.poke();
        }
    }

    /// Adds an opened volume to capture and sync.
    pub(crate) fn add(
        &self,
        volume: &VolumeState,
        file: SourceFile,
        content: Content,
        joined: bool,
        marks: Marks,
    ) -> Result<Arc<FilterVolume<FileDevice>>> {
        let filter = self.capture_marked(volume, FileDevice::new(file.0), content, joined, marks)?;
        self.sync.tell(SyncOrder::Add(Arc::clone(&filter)));
        Ok(filter)
    }

    /// Captures a volume, with its marks.
    fn capture_marked<F: BackingFile>(
        &self,
        volume: &VolumeState,
        file: F,
        content: Content,
        joined: bool,
        marks: Marks,
    ) -> Result<Arc<FilterVolume<F>>> {
        let read = || self.store.read_bitmap(&self.name, volume.index);
        let lost = |error: &Error| {
            tracing::warn!(error = crate::error::chain(error), "saved marks are lost: the volume is compared");
        };
        let (saved, ranges, content) = match marks {
            Marks::None => (None, Vec::new(), content),
            // Without marks nothing is known of the volume; those that cannot be read are none. The guest has its volume.
            Marks::Saved => match read().inspect_err(lost) {
                Ok(Some(words)) => (Some(words), Vec::new(), content),
                Ok(None) | Err(_) => (None, Vec::new(), Content::Unknown),
            },
            Marks::Log(ranges) => match read().inspect_err(lost) {
                Ok(saved) => (saved, ranges, content),
                Err(_) => (None, ranges, Content::Unknown),
            },
        };
        let filter = self.capture_volume(volume, file, content, joined)?;
        if let (Some(words), Some(captured)) = (saved, self.capture.volume(VolumeIndex(volume.index))) {
            for (at, word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                    let offset = (at as u64 * 64 + bit) * SLOT_BYTES;
                    if offset < captured.size() {
                        self.capture.mark_missing(&captured, offset, SLOT_BYTES.min(captured.size() - offset));
                    }
                }
            }
        }
        if let Some(captured) = self.capture.volume(VolumeIndex(volume.index)) {
            for (offset, len) in ranges.into_iter().filter(|(offset, _)| *offset < captured.size()) {
                self.capture.mark_missing(&captured, offset, len.min(captured.size() - offset));
            }
        }
        self.settle(VolumeIndex(volume.index));
        Ok(filter)
    }

    /// Has the activity log cover what is marked, and waits for it.
    pub(crate) fn settle(&self, index: VolumeIndex) {
        if let (Some(activity), Some(number)) = (&self.activity, self.capture.settle(index)) {
            activity.wait_obeyed(number);
        }
    }

    /// A ring was found, and no log that covers what the last process did: what is not durable at the target is in the ring, and the rest
    /// has to be stable here. `whole`: every volume is among `filters`.
    pub(crate) fn cover_again<'a>(
        &self,
        filters: impl Iterator<Item = &'a Arc<FilterVolume<FileDevice>>>,
        whole: bool,
        held: &[WritingRange],
    ) {
        let Some(activity) = &self.activity else { return };
        for WritingRange { volume, offset, length } in held.iter().copied() {
            if let Some(volume) = self.capture.volume(VolumeIndex(volume)).filter(|it| offset + length <= it.size()) {
                self.capture.cover(&volume, offset, length);
            }
        }
        activity.flush_first(filters.map(|filter| Arc::clone(&filter.file().backing().file)).collect());
        if !whole || !self.captures_all() {
            activity.spoil("a volume of an earlier process is not there to be flushed");
        }
    }

    /// Captures a volume that is put below its device only later. Until then nobody knows whether it is written past us, so no
    /// point may claim to be whole: a slot of it counts as missing, and sync does not have it.
    pub(crate) fn add_pending(&self, volume: &VolumeState, content: Content, joined: bool, marks: Marks) -> Result<()> {
        self.capture_marked(volume, Absent::new(volume), content, joined, marks)?;
        if let Some(captured) = self.capture.volume(VolumeIndex(volume.index)) {
            self.capture.mark_missing(&captured, 0, SLOT_BYTES.min(captured.size()));
        }
        Ok(())
    }

    /// Captures a volume over `file`, which may have grown; not known to sync yet. What is missing of it stays missing.
    pub(crate) fn capture_again(
        &self,
        volume: &VolumeState,
        file: FileDevice,
    ) -> Result<Arc<FilterVolume<FileDevice>>> {
        let filter = match self.capture.volume(VolumeIndex(volume.index)) {
            None => self.capture_volume(volume, file, Content::Unknown, false),
            Some(captured) => self.capture_volume(volume, file, Content::AsMarked, captured.joined()),
        }?;
        self.settle(VolumeIndex(volume.index));
        Ok(filter)
    }

    fn capture_volume<F: BackingFile>(
        &self,
        volume: &VolumeState,
        file: F,
        content: Content,
        joined: bool,
    ) -> Result<Arc<FilterVolume<F>>> {
        let name = Name::new(volume.name.clone())?;
        let mut id = [0; 16];
        let text = format!("{} {} {}", self.name, volume.index, volume.identity);
        id.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
        let spec = VolumeSpec { index: VolumeIndex(volume.index), name, id, content, joined };
        let known = self.capture.ring().volumes().into_iter().find(|known| known.volume == volume.index);
        let added = match known {
            // It has grown, here or before a crash.
            Some(known) if (known.id, known.capacity) != (id, file.geometry().size) => {
                self.capture.replace_volume(spec, file)
            }
            Some(_) | None => self.capture.add_volume(spec, file),
        };
        added.map_err(|error| {
            Error::failed(format!("volume {}/{}", self.name, volume.name), crate::error::chain(&error))
        })
    }

    /// Captures a volume that cannot be opened as one of which everything is missing. Sync never hears of it, so while it is absent
    /// no point of the group claims to be whole (its own last writes may be only marks), "compare everything" stays, and a stop
    /// saves that all of it must be compared.
    pub(crate) fn add_absent(&self, volume: &VolumeState, joined: bool) {
        if self.capture.volume(VolumeIndex(volume.index)).is_some() {
            return;
        }
        if let Err(error) = self.capture_volume(volume, Absent::new(volume), Content::Unknown, joined) {
            tracing::error!(error = crate::error::chain(&error), "an absent volume cannot be marked");
        }
        self.settle(VolumeIndex(volume.index));
    }

    /// A volume was, or may have been, written past us: all of it is compared.
    pub(crate) fn bypassed(&self, index: VolumeIndex, reason: &str) {
        let subject = self.volume_subject(index);
        tracing::warn!(volume = subject, reason, "the volume is compared: it may have been written past Farshore");
        let text =
            format!("may have been written while Farshore was not in the path ({reason}): all of it is compared");
        self.alarms.raise(code::WRITTEN_PAST, &subject, text);
        // Unknown only if it left the group meanwhile.
        let _ = self.capture.resync(index);
        self.settle(index);
    }

    /// What shows at the next start whether a volume that is not served any more was written.
    pub(crate) fn evidence_of(&self, index: VolumeIndex) -> Option<Evidence> {
        let source = self.state().volumes.iter().find(|volume| volume.index == index.0)?.source.clone();
        let evidence = Evidence::take(&source);
        let unknown = |doubt: &Doubt| {
            tracing::warn!(volume = self.volume_subject(index), %doubt, "the next start compares this volume");
        };
        evidence.inspect_err(unknown).ok()
    }

    /// All was compared: what went past us is at the target, too. Where something still goes past, the next look raises it anew.
    pub(crate) fn bypass_is_over(&self) {
        for volume in self.state().volumes.iter() {
            self.alarms.clear(code::WRITTEN_PAST, &format!("{}/{}", self.name, volume.name));
        }
    }

    /// A volume that cannot be served may be changed by anybody: the next time everything is compared.
    pub(crate) fn volume_failed(&self, volume: &VolumeState, error: &Error) {
        let text = format!("is not served: {}", crate::error::chain(error));
        self.alarms.raise(code::UNAVAILABLE, &format!("{}/{}", self.name, volume.name), text);
        self.update_state(|state| state.compare_everything = true);
    }
}

fn volume_subject(group: &Name, capture: &CaptureGroup, index: VolumeIndex) -> String {
    let name = capture.volume(index).map_or_else(|| index.to_string(), |volume| volume.name().to_string());
    format!("{group}/{name}")
}

/// What sync says of itself, as alarms.
pub(crate) fn sync_alarms(
    group: Name,
    capture: Arc<CaptureGroup>,
    alarms: Arc<Alarms>,
) -> impl Fn(SyncReport) + Send + 'static {
    let volume = move |group: &Name, index| volume_subject(group, &capture, index);
    move |report| match report {
        SyncReport::Died(reason) => {
            let text = format!("sync died: {reason}; it begins anew by itself, and nothing missing is sent until then");
            alarms.raise(code::SYNC, group.as_str(), text);
        }
        SyncReport::Sound => alarms.clear(code::SYNC, group.as_str()),
        SyncReport::Unread(index, reason) => {
            alarms.raise(code::SYNC, &volume(&group, index), format!("sync cannot read it: {reason}"));
        }
        SyncReport::Read(index) => alarms.clear(code::SYNC, &volume(&group, index)),
    }
}
