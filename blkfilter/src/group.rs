//! The volumes of one group on this host: what is missing from their stream, and what is said in the stream about that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, TryLockError};
use std::time::Duration;

use farshore_proto::record::Kind;
use farshore_proto::{Position, VolumeIndex, WallTime};
use farshore_ring::{Consumer, Desc, Dormant, Producer, ReopenError, Reservation, Ring, Which};
use farshore_uring::{Errno, Geometry};

use crate::activity::{Flush, GroupActivity, VolumeParts};
use crate::alarm::{Alarm, AlarmEvent, Alarms};
use crate::counters::Counters;
use crate::volume::Mode;
use crate::{BackingFile, Content, Error, FilterVolume, Volume, VolumeSpec};

mod replace;

/// Times and limits of a group's capture.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// Shortest time between two cuts without a bookmark. Default 20 ms, range 1 ms to 10 s. Lower: finer points, smaller
    /// batches, less coalescing.
    pub cut_min: Duration,
    /// Longest time between two cuts while the link takes batches. Default 1 s, range `cut_min` to 60 s. Raising it raises the
    /// RPO of a quiet group.
    pub cut_max: Duration,
    /// Longest time that sync may make a guest's write wait (I1). Default 50 ms, range 1 ms to 5 s.
    pub stall_max: Duration,
    /// A closed ring opens again when less than this part of it is in use: 1/`reopen_part`. Default 4. Opening earlier closes
    /// sooner again.
    pub reopen_part: u64,
    /// The host's activity log; without one, everything is compared after the host went down.
    pub activity: Option<GroupActivity>,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            cut_min: Duration::from_millis(20),
            cut_max: Duration::from_secs(1),
            stall_max: Duration::from_millis(50),
            reopen_part: 4,
            activity: None,
        }
    }
}

/// One group's capture on this host.
///
/// Invariants, `bits` being the `missing` bits of the volumes that have joined:
/// - *bits ⇒ event*: whenever a guest's request completes while its range is only a bit, the ring is closed (and opens only with an
///   event's begin), or an event's begin is in the stream and its end is not;
/// - an event's end is claimed only while no bit is set and nothing is being compared; a volume joins only while it has no bit;
/// - both hold against each other because whoever sets a bit looks at `closed` and then at the event *after* that, and
///   whoever ends an event looks at the bits *after* taking the event's mutex (with a full fence between store and load on
///   either side).
pub struct CaptureGroup {
    ring: Arc<Ring>,
    config: CaptureConfig,
    events: Mutex<Events>,
    /// Held by sync from its look at a slot to the claim and the move of the bit, and by whoever makes the stream's past
    /// worthless. Taken before `events`. No guest's request ever takes it.
    claims: Mutex<()>,
    /// Raised when answers of the target to older questions stop counting.
    epoch: AtomicU64,
    event_open: AtomicBool,
    /// Behind the last cut that was made; 0: not known.
    cut_end: AtomicU64,
    volumes: RwLock<Vec<Arc<Volume>>>,
    alarms: Alarms,
    wake_consumer: OnceLock<Box<dyn Fn() + Send + Sync>>,
    wake_sync: OnceLock<Box<dyn Fn() + Send + Sync>>,
    record_join: OnceLock<JoinRecorder>,
    /// Positions below are durable at the target.
    durable: Arc<AtomicU64>,
}

type JoinRecorder = Box<dyn Fn(VolumeIndex) -> bool + Send + Sync>;

struct Events {
    producer: Producer,
    open: bool,
    /// For the cut behind the re-opening event, so that it needs no room in a full ring.
    cut: Option<Reservation>,
    /// Volumes whose leaving is not in the stream yet.
    left: Vec<VolumeIndex>,
}

/// What a failed claim by sync means: try again later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NoRoom;

impl CaptureGroup {
    /// A group over an open ring, without volumes, with no event open.
    ///
    /// After anything but a first start, [`Self::begin_event`] follows the first [`Self::add_volume`]s: what the last process had
    /// said in the stream is not known here.
    #[must_use]
    pub fn new(ring: Arc<Ring>, config: CaptureConfig) -> Arc<Self> {
        let producer = ring.producer();
        let cut = producer.reserve_marker(0).ok();
        let events = Events { producer, open: false, cut, left: Vec::new() };
        let group = Self {
            config,
            events: Mutex::new(events),
            claims: Mutex::new(()),
            epoch: AtomicU64::new(0),
            event_open: AtomicBool::new(false),
            cut_end: AtomicU64::new(0),
            volumes: RwLock::default(),
            alarms: Alarms::default(),
            wake_consumer: OnceLock::new(),
            wake_sync: OnceLock::new(),
            record_join: OnceLock::new(),
            durable: Arc::new(AtomicU64::new(ring.freed())),
            ring,
        };
        group.alarms.set_closed(group.ring.is_closed());
        Arc::new(group)
    }

    /// How to wake the ring's consumer; called from queue threads, must not block. The first call counts.
    pub fn set_consumer_waker(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake_consumer.set(Box::new(wake));
    }

    /// How to wake sync when there is something new to do for it. As [`Self::set_consumer_waker`].
    pub fn set_sync_waker(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake_sync.set(Box::new(wake));
    }

    /// What durably records that a volume is about to join; called on sync's thread, once more by each process and stream, may block;
    /// `false`: could not, and the volume does not join yet. The first call counts.
    ///
    /// Recorded before it is said in the stream: a restarted agent that finds it said there, of a volume whose joining it has not
    /// recorded, knows that an earlier holder of the number is meant.
    pub fn set_join_recorder(&self, record: impl Fn(VolumeIndex) -> bool + Send + Sync + 'static) {
        let _ = self.record_join.set(Box::new(record));
    }

    /// Protects one more volume. The front end is opened afterwards.
    ///
    /// # Errors
    /// The ring has no room for its bitmaps, or another volume has the index.
    pub fn add_volume<F: BackingFile>(
        self: &Arc<Self>,
        spec: VolumeSpec,
        file: F,
    ) -> Result<Arc<FilterVolume<F>>, Error> {
        let volume = self.insert(spec, file.geometry(), file.flusher())?;
        if volume.missing.next_set(0).is_some() {
            self.ensure_event(&volume);
        }
        self.poke_sync();
        Ok(Arc::new(FilterVolume::new(file, Mode::Captured(Arc::clone(self), volume))))
    }

    /// Puts it in the place of whoever has its number.
    fn insert(&self, spec: VolumeSpec, geometry: Geometry, flush: Flush) -> Result<Arc<Volume>, Error> {
        let index = spec.index.0;
        let failed = |source| Error::Ring { name: spec.name.to_string(), source };
        self.ring.add_volume(index, spec.id, geometry.size).map_err(failed)?;
        let bitmap = |which| self.ring.bitmap(index, which).expect("added just now");
        let activity = self.config.activity.as_ref().map(|activity| {
            activity.open(VolumeParts {
                index: spec.index,
                size: geometry.size,
                ring: Arc::clone(&self.ring),
                durable: Arc::clone(&self.durable),
                missing: bitmap(Which::Missing),
                in_flight: bitmap(Which::InFlight),
                flush,
            })
        });
        let volume = Arc::new(Volume {
            index: spec.index,
            name: spec.name,
            geometry,
            lock: Arc::default(),
            touched: crate::touched::Touched::new(geometry.size),
            missing: bitmap(Which::Missing),
            in_flight: bitmap(Which::InFlight),
            joined: AtomicBool::new(spec.joined),
            announced: AtomicBool::new(false),
            counters: crate::counters::VolumeCounters::default(),
            activity,
        });
        // What was under way with the last process is not known to have arrived.
        volume.in_flight.move_all_to(&volume.missing);
        if spec.content == Content::Unknown {
            volume.missing.set_range(0, geometry.size);
        }
        let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
        volumes.retain(|old| old.index != volume.index);
        volumes.push(Arc::clone(&volume));
        drop(volumes);
        Ok(volume)
    }

    /// Ends the protection of a volume, after its front end has closed all its queues: says so in the stream and forgets the
    /// marks.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn remove_volume(&self, index: VolumeIndex) -> Result<(), Error> {
        let _claims = self.claims();
        {
            let mut volumes = self.volumes.write().unwrap_or_else(PoisonError::into_inner);
            let before = volumes.len();
            volumes.retain(|volume| volume.index != index);
            if volumes.len() == before {
                return Err(Error::NoVolume(index.0));
            }
        }
        self.say_left(index);
        if let Some(activity) = &self.config.activity {
            activity.close(index);
        }
        self.ring.remove_volume(index.0).map_err(|_| Error::NoVolume(index.0))
    }

    /// Says in the stream that points do not include the volume, unless they do: it is captured and has joined. For what the
    /// target still believes of a volume that left while nobody could hear it (its `Welcome` says so). Said as soon as the stream
    /// has room, and before the number joins again.
    pub fn say_left(&self, index: VolumeIndex) {
        let mut events = self.events();
        // Under the mutex that joining takes: what is said here is said before.
        if self.volume(index).is_some_and(|volume| volume.joined()) {
            return;
        }
        if !events.left.contains(&index) {
            events.left.push(index);
        }
        self.claim_left(&mut events);
        drop(events);
        self.wake_consumer_if_sleeping();
    }

    fn claim_left(&self, events: &mut Events) {
        while let Some(volume) = events.left.pop() {
            let desc = Desc { kind: Kind::VolumeLeft as u8, volume: volume.0, ..Desc::default() };
            if claim_marker(&events.producer, &desc).is_none() {
                events.left.push(volume);
                return;
            }
        }
    }

    /// The group's volumes.
    #[must_use]
    pub fn volumes(&self) -> Vec<Arc<Volume>> {
        self.volumes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One volume.
    #[must_use]
    pub fn volume(&self, index: VolumeIndex) -> Option<Arc<Volume>> {
        let volumes = self.volumes.read().unwrap_or_else(PoisonError::into_inner);
        volumes.iter().find(|volume| volume.index == index).cloned()
    }

    /// Volumes that the target's points may include.
    #[must_use]
    pub fn joined(&self) -> Vec<VolumeIndex> {
        self.volumes().iter().filter(|volume| volume.joined()).map(|volume| volume.index).collect()
    }

    /// The group's ring.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    /// Times and limits.
    #[must_use]
    pub fn config(&self) -> &CaptureConfig {
        &self.config
    }

    /// An event is open: no cut is recoverable.
    #[must_use]
    pub fn event_open(&self) -> bool {
        self.event_open.load(Ordering::Acquire)
    }

    /// The sum over all volumes.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.volumes().iter().fold(Counters::default(), |sum, volume| sum.plus(volume.counters()))
    }

    /// The next change of an alarm.
    #[must_use]
    pub fn poll_alarm(&self) -> Option<AlarmEvent> {
        self.alarms.poll()
    }

    pub(crate) fn raise(&self, alarm: Alarm) {
        self.alarms.raise(alarm);
    }

    /// All ring positions below `position` are durable at the target.
    pub fn note_durable(&self, position: Position) {
        self.durable.fetch_max(position.0, Ordering::AcqRel);
    }

    /// What is missing of the volume is marked: the activity log is to cover it, and may let extents of it leave from now on. Gives what
    /// [`crate::activity::ActivityLog::obeyed`] is when it does; none: no log, or no such volume. After each [`Self::add_volume`],
    /// before its front end is opened.
    #[must_use]
    pub fn settle(&self, index: VolumeIndex) -> Option<u64> {
        Some(self.volume(index)?.activity.as_ref()?.settle())
    }

    /// Has the activity log cover what the range (bytes) holds already.
    pub fn cover(&self, volume: &Volume, offset: u64, len: u64) {
        if let Some(activity) = &volume.activity {
            activity.cover(&(offset..offset + len));
        }
    }

    // What is missing.

    /// Source and replica may differ in the range (bytes). When this returns, that is marked and said in the stream (or the
    /// stream is closed).
    pub fn mark_missing(&self, volume: &Volume, offset: u64, len: u64) {
        volume.missing.set_range(offset, len);
        self.ensure_event(volume);
    }

    /// A write for which no cell was found: marks its range and, where points include the volume, closes the ring. Then every later
    /// claim fails until the ring has been drained, so no later write gets a ticket that this one lacks.
    pub(crate) fn mark_without_cell(&self, volume: &Volume, offset: u64, len: u64) {
        volume.missing.set_range(offset, len);
        if volume.joined() {
            self.close();
        }
        // And where it does not: nothing has to be said, and the writes of the others still get their tickets. (That it joins in
        // this very moment is the reason for looking again.)
        self.ensure_event(volume);
    }

    /// `bits ⇒ event` (see the type) after bits of `volume` have been set.
    fn ensure_event(&self, volume: &Volume) {
        // SeqCst, full: the bits are stored before `joined` and `closed` are read. Pairs with the fences in `join`, `end_event`.
        fence(Ordering::SeqCst);
        if !volume.joined.load(Ordering::SeqCst) || self.ring.is_closed() {
            return;
        }
        let mut events = self.events();
        if !events.open && !self.begin(&mut events) {
            self.close_under(&events);
        }
    }

    /// Opens an event: no cut is recoverable until sync has found nothing missing and nothing left to compare. For everything
    /// that makes the replica doubtful from outside of the group, and after every start but a clean one.
    pub fn begin_event(&self) {
        let mut events = self.events();
        if !self.begin(&mut events) {
            self.close_under(&events);
        }
        drop(events);
        self.poke_sync();
    }

    /// Claims the begin of an event; `false`: no room, or closed.
    fn begin(&self, events: &mut Events) -> bool {
        let desc = Desc { kind: Kind::EventBegin as u8, ..Desc::default() };
        let claimed = claim_marker(&events.producer, &desc).is_some();
        if claimed {
            self.set_open(events, true);
            self.wake_consumer_if_sleeping();
            self.poke_sync();
        }
        claimed
    }

    fn set_open(&self, events: &mut Events, open: bool) {
        events.open = open;
        self.event_open.store(open, Ordering::Release);
        self.alarms.set_event_open(open);
    }

    /// Closes the ring. Not while it is being opened: the cut behind the re-opening event gets its place.
    pub(crate) fn close(&self) {
        if !self.ring.is_closed() {
            self.close_under(&self.events());
        }
    }

    fn close_under(&self, events: &Events) {
        if self.ring.close() {
            self.alarms.set_closed(true);
            tracing::warn!(used = self.ring.used_bytes(), size = self.ring.size_bytes(), "capture ring closed");
            if events.producer.consumer_sleeping() {
                self.wake_consumer();
            }
        }
    }

    /// Opens a closed ring again, with the begin of an event and a cut, if enough of it is free, or if all that was cut has left it:
    /// what lies behind the last cut cannot be shipped before there is another one. `None`: not closed, or not yet. For the owner of
    /// the consumer, whenever it has freed something or finds the ring closed.
    pub fn reopen(&self, consumer: &mut Consumer, wall: WallTime) -> Option<Position> {
        if !self.ring.is_closed() {
            return None;
        }
        let mut events = self.events();
        if events.cut.is_none() {
            events.cut = events.producer.reserve_marker(0).ok();
        }
        let part = self.config.reopen_part.max(1);
        let drained = self.ring.used_bytes() <= self.ring.size_bytes() / part
            && self.ring.used_descriptors() <= self.ring.descriptors() / part;
        let only_uncut = consumer.freed() >= self.cut_end.load(Ordering::Acquire) && events.cut.is_some();
        if !drained && !only_uncut {
            return None;
        }
        self.open_ring(&mut events, consumer, wall)
    }

    fn open_ring(&self, events: &mut Events, consumer: &mut Consumer, wall: WallTime) -> Option<Position> {
        let desc = Desc { kind: Kind::EventBegin as u8, time: wall.0, ..Desc::default() };
        match consumer.reopen(&desc) {
            Ok(position) => {
                self.set_open(events, true);
                self.alarms.set_closed(false);
                if let Some(cut) = events.cut.take() {
                    let desc = Desc { kind: Kind::Cut as u8, time: wall.0, ..Desc::default() };
                    // Cannot fail: who closes the ring waits for this mutex.
                    if let Ok(position) = events.producer.publish(cut, &desc) {
                        self.cut_made(position);
                    }
                    events.cut = events.producer.reserve_marker(0).ok();
                }
                self.claim_left(events);
                self.poke_sync();
                Some(Position(position))
            }
            Err(ReopenError::NotClosed | ReopenError::Full) => None,
        }
    }

    /// A cut was made at `position`.
    pub(crate) fn cut_made(&self, position: u64) {
        self.cut_end.fetch_max(position + 1, Ordering::AcqRel);
    }

    /// Starts the stream over under a new incarnation, because the target cannot continue the old one: everything is missing, what
    /// is in the ring is dropped, and the new stream begins with an event. The caller has durably recorded the new incarnation and
    /// "compare everything" before; `set_incarnation` tells the ring ([`Ring`] is empty and closed when it is called).
    ///
    /// `None`: the new stream is not open yet; [`Self::reopen`] opens it.
    pub fn start_over(
        &self,
        consumer: &mut Consumer,
        wall: WallTime,
        set_incarnation: impl FnOnce(&Ring),
    ) -> Option<Position> {
        let _claims = self.claims();
        // First, so that between here and the event nothing gets a ticket.
        if self.ring.close() {
            self.alarms.set_closed(true);
        }
        let mut events = self.events();
        for volume in self.volumes() {
            volume.missing.set_range(0, volume.size());
            volume.in_flight.move_all_to(&volume.missing);
            // What was said of it may be dropped here unheard.
            volume.announced.store(false, Ordering::Release);
        }
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let head = self.ring.head();
        while consumer.position() < head {
            // A claimed position is published within a few instructions.
            if consumer.next().is_none() {
                std::hint::spin_loop();
            }
        }
        consumer.free_to(head);
        set_incarnation(&self.ring);
        self.open_ring(&mut events, consumer, wall)
    }

    /// Compares the whole volume again (`farshore resync`).
    ///
    /// # Errors
    /// There is no such volume.
    pub fn resync(&self, index: VolumeIndex) -> Result<(), Error> {
        let _claims = self.claims();
        let volume = self.volume(index).ok_or(Error::NoVolume(index.0))?;
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.mark_missing(&volume, 0, volume.size());
        self.poke_sync();
        Ok(())
    }

    /// The target's points do not include the volume after all (its `Welcome` says so): its initial sync is done again.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn unjoin(&self, index: VolumeIndex) -> Result<(), Error> {
        let _claims = self.claims();
        let volume = self.volume(index).ok_or(Error::NoVolume(index.0))?;
        self.epoch.fetch_add(1, Ordering::AcqRel);
        let _events = self.events();
        volume.joined.store(false, Ordering::SeqCst);
        volume.announced.store(false, Ordering::Release);
        volume.missing.set_range(0, volume.size());
        self.poke_sync();
        Ok(())
    }

    // For sync.

    /// What was *in flight* is missing again: nobody knows its position any more.
    pub(crate) fn take_back(&self, volume: &Volume) {
        let claims = self.claims();
        volume.in_flight.move_all_to(&volume.missing);
        drop(claims);
        self.ensure_event(volume);
    }

    /// The right to claim for sync and to clear bits: nobody drops the stream's past meanwhile.
    pub(crate) fn claims(&self) -> MutexGuard<'_, ()> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Self::claims`] for one who holds a range lock, and so must not wait for somebody who drops a whole ring (I1).
    pub(crate) fn try_claims(&self) -> Result<MutexGuard<'_, ()>, NoRoom> {
        match self.claims.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(NoRoom),
        }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Claims that `volume` is whole in the stream, if nothing of it is missing. Once per process and stream: to the target a
    /// repetition says nothing new.
    pub(crate) fn join(&self, volume: &Volume) -> Option<Position> {
        if volume.announced() || volume.missing.next_set(0).is_some() {
            return None;
        }
        if !self.record_join.get().is_none_or(|record| record(volume.index)) {
            return None;
        }
        let mut events = self.events();
        // A number may come again: that its last holder left must not be said behind its joining.
        self.claim_left(&mut events);
        if !events.left.is_empty() {
            return None;
        }
        let before = volume.joined();
        // First the word, then the look at the bits: whoever sets a bit and does not see the word, is seen.
        volume.joined.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let desc = Desc { kind: Kind::VolumeJoined as u8, volume: volume.index.0, ..Desc::default() };
        let clean = volume.missing.next_set(0).is_none();
        let claimed = if clean { claim_marker(&events.producer, &desc) } else { None };
        match claimed {
            Some(_) => volume.announced.store(true, Ordering::Release),
            None => volume.joined.store(before, Ordering::SeqCst),
        }
        drop(events);
        self.wake_consumer_if_sleeping();
        claimed
    }

    /// Claims the end of the open event, if nothing is missing of any volume that has joined. `None`: something is, none is open, or there
    /// is no room.
    pub fn end_event(&self) -> Option<Position> {
        let mut events = self.events();
        if !events.open {
            return None;
        }
        // After the mutex, before the look: see `ensure_event`.
        fence(Ordering::SeqCst);
        let whole = |volume: &Arc<Volume>| !volume.joined() || volume.missing.next_set(0).is_none();
        if !self.volumes().iter().all(whole) {
            return None;
        }
        let desc = Desc { kind: Kind::EventEnd as u8, ..Desc::default() };
        let claimed = claim_marker(&events.producer, &desc)?;
        self.set_open(&mut events, false);
        drop(events);
        self.wake_consumer_if_sleeping();
        Some(claimed)
    }

    /// Wakes the consumer if it sleeps: something was published, or the ring was closed.
    pub(crate) fn wake_consumer(&self) {
        if let Some(wake) = self.wake_consumer.get() {
            wake();
        }
    }

    fn wake_consumer_if_sleeping(&self) {
        // Asks through a producer of its own making: any will do, and this is not the way of a write.
        if self.ring.producer().consumer_sleeping() {
            self.wake_consumer();
        }
    }

    pub(crate) fn poke_sync(&self) {
        if let Some(wake) = self.wake_sync.get() {
            wake();
        }
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A failed backing write.
    pub(crate) fn write_failed(&self, volume: &Volume, offset: u64, len: u64, errno: Errno) {
        self.mark_missing(volume, offset, len);
        self.raise(Alarm::WriteFailed { volume: volume.index, offset, len, errno: errno.0 });
    }
}

impl std::fmt::Debug for CaptureGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaptureGroup")
            .field("volumes", &self.volumes().len())
            .field("closed", &self.ring.is_closed())
            .field("event_open", &self.event_open())
            .finish_non_exhaustive()
    }
}

/// Claims a position for something without payload, from the markers' reserve. `None`: no room, or closed.
fn claim_marker(producer: &Producer, desc: &Desc) -> Option<Position> {
    let reservation = producer.reserve_marker(0).ok()?;
    producer.publish(reservation, desc).ok().map(Position)
}

/// Marks in a ring that was found after a kill what its writers had under way (for front ends whose requests nobody issues again:
/// NBD). Then [`Dormant::resume`], [`CaptureGroup::new`], [`CaptureGroup::add_volume`] with [`Content::AsMarked`], and
/// [`CaptureGroup::begin_event`].
///
/// Ranges of volumes that the ring does not know are left out: such a volume is added with [`Content::Unknown`].
pub fn mark_recovered(ring: &Dormant) {
    for range in &ring.recovery().writing {
        if let Some(missing) = ring.bitmap(range.volume, Which::Missing) {
            missing.set_range(range.offset, range.length);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use farshore_proto::Name;
    use farshore_ring::{Memory, RingConfig, RingIdentity};
    use farshore_uring::{Extent, FileSlot, Io};

    use super::*;
    use crate::Buf;

    /// A disk of this many bytes.
    struct Nothing(u64);

    impl BackingFile for Nothing {
        fn geometry(&self) -> Geometry {
            Geometry {
                size: self.0,
                logical_block: 512,
                optimal_block: 4096,
                max_request: 1 << 20,
                max_discard: 1 << 20,
                read_only: false,
                discard: true,
            }
        }

        fn register<I: Io<Buf>>(&self, _io: &mut I) -> io::Result<FileSlot> {
            Ok(FileSlot(0))
        }

        fn extents(&self, _offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
            Ok(vec![Extent { len, hole: false, zero: false }])
        }

        fn flusher(&self) -> Box<dyn Fn() -> io::Result<()> + Send + Sync> {
            Box::new(|| Ok(()))
        }
    }

    fn group(joined: bool) -> (Arc<CaptureGroup>, Arc<Volume>) {
        let identity = RingIdentity {
            vault: [1; 16],
            group: [2; 16],
            host: [3; 16],
            boot: [4; 16],
            incarnation: 1,
            generation: 1,
        };
        let config = RingConfig { slab_bytes: 1 << 20, descriptors: Some(64), ..RingConfig::new(identity) };
        let ring = Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("a ring"));
        let group = CaptureGroup::new(ring, CaptureConfig::default());
        let name = Name::new("v").expect("a good name");
        let spec = VolumeSpec { index: VolumeIndex(3), name, id: [0; 16], content: Content::AsMarked, joined };
        group.add_volume(spec, Nothing(1 << 20)).expect("room");
        let volume = group.volume(VolumeIndex(3)).expect("added");
        (group, volume)
    }

    /// Sync believes that nothing is missing, and is wrong: somebody marked something since it looked.
    #[test]
    fn neither_join_nor_end_pass_over_a_mark() {
        let (group, volume) = group(false);
        volume.missing.set(7);
        assert_eq!(group.join(&volume), None);
        assert!(!volume.joined() && !volume.announced());
        volume.missing.clear(7);
        // In the very last moment.
        let (late, first) = (Arc::clone(&volume), AtomicBool::new(true));
        group.set_join_recorder(move |_| {
            if first.swap(false, Ordering::SeqCst) {
                late.missing.set(8);
            }
            true
        });
        assert_eq!(group.join(&volume), None);
        assert!(!volume.joined() && !volume.announced());
        volume.missing.clear(8);
        assert!(group.join(&volume).is_some());
        assert_eq!(group.join(&volume), None, "said once");

        group.mark_missing(&volume, 0, 512);
        assert!(group.event_open());
        assert_eq!(group.end_event(), None);
        volume.missing.clear(0);
        assert!(group.end_event().is_some());
        assert!(!group.event_open());
        assert_eq!(group.end_event(), None);
    }

    /// Goal: a volume that has grown is missing as a whole, and no point is made until it is there. Method: replaced while no event is
    /// open, while the old one has marks, and before it has joined.
    #[test]
    fn a_volume_that_grew_is_missing_as_a_whole() {
        let spec = |joined| {
            let name = Name::new("v").expect("a good name");
            VolumeSpec { index: VolumeIndex(3), name, id: [1; 16], content: Content::AsMarked, joined }
        };
        for marked in [false, true] {
            let (group, volume) = self::group(true);
            if marked {
                group.mark_missing(&volume, 0, 1 << 20);
            }
            drop(volume);
            group.replace_volume(spec(true), Nothing(4 << 20)).expect("room");
            let volume = group.volume(VolumeIndex(3)).expect("replaced");
            assert!(group.event_open() && volume.joined() && group.volumes().len() == 1);
            assert_eq!((volume.size(), volume.missing().count_ones()), (4 << 20, 64));
            assert_eq!(group.end_event(), None);
            assert!(group.add_volume(spec(true), Nothing(1 << 20)).is_err(), "the ring knows its shape");
        }
        let (group, _) = self::group(false);
        group.replace_volume(spec(false), Nothing(4 << 20)).expect("room");
        assert!(!group.event_open() && !group.volume(VolumeIndex(3)).expect("replaced").joined());
    }

    /// The mark of a volume that has not joined needs no event; that of one that has, in a ring without room for the event, closes.
    #[test]
    fn a_mark_opens_an_event_or_closes_the_ring() {
        let (group, volume) = group(false);
        group.mark_missing(&volume, 0, 512);
        group.mark_without_cell(&volume, 0, 512);
        assert!(!group.event_open() && !group.ring.is_closed());

        let (group, volume) = self::group(true);
        let producer = group.ring.producer();
        let all: Vec<_> = std::iter::from_fn(|| producer.reserve_marker(0).ok()).collect();
        assert!(all.len() > 50);
        group.mark_missing(&volume, 0, 512);
        assert!(group.ring.is_closed() && !group.event_open());
        let mut consumer = group.ring.consumer().expect("the only one");
        drop(all);
        assert!(group.reopen(&mut consumer, WallTime(5)).is_some());
        assert!(!group.ring.is_closed() && group.event_open());
        let kinds: Vec<u8> = std::iter::from_fn(|| consumer.next()).map(|entry| entry.desc.kind).collect();
        assert_eq!(kinds, [Kind::EventBegin as u8, Kind::Cut as u8]);
        volume.missing.clear(0);
        assert!(group.end_event().is_some());
        assert_eq!(consumer.next().map(|entry| entry.desc.kind), Some(Kind::EventEnd as u8));
    }
}
