//! The activity log: which 4 MiB extents may differ from the replica after the host has gone down, kept on disk ahead of every write,
//! so that only they are compared (I4).
//!
//! ```text
//! FilterQueue ──enter──▶ VolumeActivity ──asks──▶ ActivityLog ◀──turn── Keeper ──▶ file
//!      ▲                     │ extent words            │ places               (own thread)
//!      └─────────wake────────┴─────────────────────────┘
//! ```
//!
//! A write to an extent that is *active* costs two atomic additions. One to a cold extent waits until the [`Keeper`] has made it
//! active durably. An extent leaves only when nothing is under way to it, the backing device was flushed after its last write, and what
//! is not durable at the target is *marked* in the log.
//!
//! # Invariants
//!
//! 1. *Cover* (I4): while [`ActivityLog::passes`] is false, every byte where source and replica may differ lies in an extent that the log on
//!    disk has as active, or in a slot that it has marked. What makes a whole volume doubtful (a resync that a person ordered, a
//!    volume that has not joined) is the caller's to record.
//! 2. *A word says what its extent is*: how many requests are inside, whether it is active, whether its activation was asked for. It
//!    becomes inactive only while nobody is inside, by one compare-and-swap.
//! 3. *The log never holds a guest for good* (I1): [`ActivityLog::pass`] lets all waiters go on, and says so until everything that
//!    went past is covered again.
//!
//! No clock, no thread: who drives the keeper measures how long requests wait ([`ActivityLog::asked`], [`ActivityLog::answered`]).

mod format;
mod keeper;
mod marks;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use farshore_proto::{GroupId, LogMark, SLOT_BYTES, VolumeIndex};
use farshore_ring::{Bitmap, Ring};
use farshore_uring::{Errno, Waker, guest_errno};

pub use format::is_log;
pub use keeper::{FlushJob, Found, Keeper, KeeperConfig, Loaded, Look, Turn, look};

pub(crate) use keeper::MACHINE;
use keeper::Order;

/// Bytes of an extent.
pub const EXTENT_BYTES: u64 = 4 << 20;
/// Slots of an extent: one word of a bitmap.
const EXTENT_SLOTS: u64 = EXTENT_BYTES / SLOT_BYTES;
const _: () = assert!(EXTENT_SLOTS == 64);

/// A volume, as the log names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct VolumeKey {
    /// First bytes of the group's id, which is a hash.
    pub group: [u8; 8],
    /// Number in the group.
    pub index: u16,
}

impl VolumeKey {
    /// Of a volume of a group.
    #[must_use]
    pub fn new(group: &GroupId, index: VolumeIndex) -> Self {
        let mut short = [0; 8];
        short.copy_from_slice(&group.0[..8]);
        Self { group: short, index: index.0 }
    }
}

/// An extent of a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Extent {
    /// The volume.
    pub volume: VolumeKey,
    /// Its first byte is this times [`EXTENT_BYTES`].
    pub number: u32,
}

// An extent's word.
/// Requests inside.
const INSIDE: u64 = (1 << 20) - 1;
/// The log on disk has it.
const ACTIVE: u64 = 1 << 20;
/// Its activation was asked for and not answered yet.
const WANTED: u64 = 1 << 21;
/// Somebody came in since the keeper looked last.
const USED: u64 = 1 << 22;
/// Place in the table, plus one; 0: none.
const PLACE_SHIFT: u32 = 32;

fn place_of(word: u64) -> Option<usize> {
    usize::try_from(word >> PLACE_SHIFT).ok()?.checked_sub(1)
}

/// What is known of the extent that has a place.
#[derive(Debug, Default)]
struct Place {
    /// Behind the last ring position that one of its writes got.
    position: AtomicU64,
    /// Flushes of its volume that had begun when its last write ended.
    stamp: AtomicU64,
}

/// What the keeper has not taken yet.
#[derive(Debug, Default)]
struct Asked {
    activations: Vec<Extent>,
    orders: Vec<Order>,
}

/// What all queues and the keeper share.
#[derive(Debug)]
pub struct ActivityLog {
    places: Box<[Place]>,
    asked: Mutex<Asked>,
    asked_count: AtomicU64,
    answered_count: AtomicU64,
    /// Of orders.
    ordered_count: AtomicU64,
    obeyed_count: AtomicU64,
    /// A backing device could not be flushed: what it holds is anybody's guess, in this life.
    unstable: AtomicBool,
    passing: AtomicBool,
    /// Nobody turns the keeper any more.
    closed: AtomicBool,
    /// Requests that did not wait for the log.
    passed: AtomicU64,
    marked: AtomicU64,
    session: AtomicU64,
    number: AtomicU64,
    volumes: Mutex<BTreeMap<VolumeKey, Arc<VolumeActivity>>>,
    wake_keeper: OnceLock<WakeKeeper>,
}

struct WakeKeeper(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for WakeKeeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WakeKeeper")
    }
}

impl ActivityLog {
    fn new(places: u32) -> Arc<Self> {
        Arc::new(Self {
            places: (0..places).map(|_| Place::default()).collect(),
            asked: Mutex::default(),
            asked_count: AtomicU64::new(0),
            answered_count: AtomicU64::new(0),
            ordered_count: AtomicU64::new(0),
            obeyed_count: AtomicU64::new(0),
            unstable: AtomicBool::new(false),
            passing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            marked: AtomicU64::new(0),
            session: AtomicU64::new(0),
            number: AtomicU64::new(0),
            volumes: Mutex::default(),
            wake_keeper: OnceLock::new(),
        })
    }

    /// How to wake whoever drives the keeper; called from queue threads, must not block. The first call counts.
    pub fn set_waker(&self, wake: impl Fn() + Send + Sync + 'static) {
        let _ = self.wake_keeper.set(WakeKeeper(Box::new(wake)));
    }

    /// Activations that were asked for, ever.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.asked_count.load(Ordering::Acquire)
    }

    /// Those of [`Self::asked`] that were answered. They are answered in order.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered_count.load(Ordering::Acquire)
    }

    /// Orders that were given ([`crate::CaptureGroup::settle`]) and obeyed, ever; in order, and before activations.
    #[must_use]
    pub fn obeyed(&self) -> u64 {
        self.obeyed_count.load(Ordering::Acquire)
    }

    /// Orders that were given, ever.
    #[must_use]
    pub fn ordered(&self) -> u64 {
        self.ordered_count.load(Ordering::Acquire)
    }

    /// Nobody waits for the log: writes go on, covered or not. Until the keeper says otherwise ([`Turn::upheld`]), a host that goes down
    /// must compare everything.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.passing.load(Ordering::Acquire) || self.closed.load(Ordering::Acquire)
    }

    /// Lets all requests go on (I1). The caller has tried to record "compare everything", or goes on trying.
    pub fn pass(&self) {
        self.passing.store(true, Ordering::SeqCst);
        self.volumes().values().for_each(|volume| volume.wake_queues());
    }

    /// Requests that went on without cover, since the start.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Extents, of all volumes, that are not active and have slots marked.
    #[must_use]
    pub fn marked(&self) -> u64 {
        self.marked.load(Ordering::Relaxed)
    }

    /// Where the log is now: goes into every batch, read when the batch is made.
    #[must_use]
    pub fn mark(&self) -> LogMark {
        LogMark { session: self.session.load(Ordering::Acquire), number: self.number.load(Ordering::Acquire) }
    }

    /// Extents that can be active at once.
    #[must_use]
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// Extents of a volume that are active now.
    #[must_use]
    pub fn active(&self, volume: VolumeKey) -> u64 {
        let volumes = self.volumes();
        volumes.get(&volume).map_or(0, |volume| volume.active())
    }

    /// A queue is open to some volume.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.volumes().values().any(|volume| !volume.queues().is_empty())
    }

    /// Lets go of all volumes: nobody turns the keeper any more.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.pass();
        self.volumes().clear();
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<VolumeKey, Arc<VolumeActivity>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn volume(&self, key: VolumeKey) -> Option<Arc<VolumeActivity>> {
        self.volumes().get(&key).cloned()
    }

    /// Asks for an extent if `wanted`, which is called with the list locked: whoever finds, under the same lock, that somebody else has
    /// asked, finds the asking counted as well.
    fn ask_if(&self, wanted: impl FnOnce() -> bool, extent: Extent) {
        let mut asked = self.asked_list();
        if !wanted() {
            return;
        }
        asked.activations.push(extent);
        self.asked_count.fetch_add(1, Ordering::SeqCst);
        drop(asked);
        self.wake_keeper();
    }

    /// Gives the number of [`Self::obeyed`] at which it was obeyed.
    fn order(&self, order: Order) -> u64 {
        let mut asked = self.asked_list();
        asked.orders.push(order);
        let number = self.ordered_count.fetch_add(1, Ordering::SeqCst) + 1;
        drop(asked);
        self.wake_keeper();
        number
    }

    fn asked_list(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_keeper(&self) {
        if let Some(WakeKeeper(wake)) = self.wake_keeper.get() {
            wake();
        }
    }
}

/// A group's part of the log.
#[derive(Clone, Debug)]
pub struct GroupActivity {
    /// The host's log.
    pub log: Arc<ActivityLog>,
    /// Whose volumes these are.
    pub group: GroupId,
}

/// What a volume's queues need to know of its extents.
pub(crate) struct VolumeActivity {
    key: VolumeKey,
    log: Arc<ActivityLog>,
    extents: Box<[AtomicU64]>,
    ring: Arc<Ring>,
    /// Ring positions below are durable at the target.
    durable: Arc<AtomicU64>,
    missing: Bitmap,
    in_flight: Bitmap,
    flush: Flush,
    flushes_begun: AtomicU64,
    /// A flush of this number, or a later one, has ended well.
    flushes_ended: AtomicU64,
    /// Error number of a flush of ours that failed: a device says so once, and its guest has not heard of it. 0: none.
    owed: AtomicI32,
    queues: Mutex<BTreeMap<u64, Waker>>,
    queue_count: AtomicU64,
    /// See [`Self::settle`].
    settled: AtomicBool,
}

/// Flushes a backing device; blocks.
pub(crate) type Flush = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

impl std::fmt::Debug for VolumeActivity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeActivity").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What [`GroupActivity::open`] needs of a volume.
pub(crate) struct VolumeParts {
    pub index: VolumeIndex,
    pub size: u64,
    pub ring: Arc<Ring>,
    pub durable: Arc<AtomicU64>,
    pub missing: Bitmap,
    pub in_flight: Bitmap,
    pub flush: Flush,
}

impl GroupActivity {
    /// Makes a volume known, in place of an earlier one of its number. No queue is open. Its extents become active again by being asked
    /// for, or when it is settled.
    pub(crate) fn open(&self, parts: VolumeParts) -> Arc<VolumeActivity> {
        let key = VolumeKey::new(&self.group, parts.index);
        let count = usize::try_from(parts.size.div_ceil(EXTENT_BYTES)).expect("usize has 64 bits");
        let mut volumes = self.log.volumes();
        let before = volumes.get(&key).cloned();
        let volume = Arc::new(VolumeActivity {
            key,
            log: Arc::clone(&self.log),
            extents: (0..count).map(|_| AtomicU64::new(0)).collect(),
            ring: parts.ring,
            durable: parts.durable,
            missing: parts.missing,
            in_flight: parts.in_flight,
            flush: parts.flush,
            // Flushes of the one before say nothing here; its extents' stamps are at most as high.
            flushes_begun: AtomicU64::new(before.map_or(0, |before| before.flushes_begun.load(Ordering::Acquire)) + 1),
            flushes_ended: AtomicU64::new(0),
            owed: AtomicI32::new(0),
            queues: Mutex::default(),
            queue_count: AtomicU64::new(0),
            settled: AtomicBool::new(false),
        });
        volumes.insert(key, Arc::clone(&volume));
        volume
    }

    /// Forgets a volume: nothing of it is protected any more.
    pub(crate) fn close(&self, index: VolumeIndex) {
        let key = VolumeKey::new(&self.group, index);
        if self.log.volumes().remove(&key).is_some() {
            self.log.order(Order::Forget(key));
        }
    }
}

impl VolumeActivity {
    /// A queue that is to be waked when extents become active. Gives its name for [`Self::leave_queue`].
    pub(crate) fn join_queue(&self, waker: Waker) -> u64 {
        let name = self.queue_count.fetch_add(1, Ordering::Relaxed);
        self.queues().insert(name, waker);
        name
    }

    pub(crate) fn leave_queue(&self, name: u64) {
        self.queues().remove(&name);
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<u64, Waker>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_queues(&self) {
        self.queues().values().for_each(Waker::wake);
    }

    /// A request is about to change the range (bytes). `true`: it may; else it waits until [`Self::may_go`] says so, after a wake. In
    /// either case [`Self::leave`] follows.
    pub(crate) fn enter(&self, range: &Range<u64>) -> bool {
        let mut active = true;
        for number in extents_of(range) {
            let extent = &self.extents[number];
            // Acquire: pairs with the keeper's Release, behind the sync.
            let before = extent.fetch_add(1, Ordering::AcqRel);
            if before & (ACTIVE | USED) == ACTIVE | USED {
                continue;
            }
            if before & ACTIVE != 0 {
                extent.fetch_or(USED, Ordering::Relaxed);
                continue;
            }
            active = false;
            self.want(number);
        }
        active || self.passes()
    }

    /// Asks for the extent, if nobody has yet.
    fn want(&self, number: usize) {
        let wanted = || self.extents[number].fetch_or(WANTED, Ordering::AcqRel) & WANTED == 0;
        let number = u32::try_from(number).expect("a volume of 2^32 extents has 16 PiB");
        self.log.ask_if(wanted, Extent { volume: self.key, number });
    }

    /// Asks that the range (bytes) be active, for what is in it already.
    pub(crate) fn cover(&self, range: &Range<u64>) {
        extents_of(range).for_each(|number| self.want(number));
    }

    /// Everything that is known to be missing is marked in memory: the keeper is to see that the log covers it, and may let extents leave
    /// from then on. Gives what [`ActivityLog::obeyed`] is when it has.
    pub(crate) fn settle(&self) -> u64 {
        self.log.order(Order::Settle(self.key))
    }

    fn passes(&self) -> bool {
        let passes = self.log.passes();
        if passes {
            self.log.passed.fetch_add(1, Ordering::Relaxed);
        }
        passes
    }

    /// A request that has entered may go on.
    pub(crate) fn may_go(&self, range: &Range<u64>) -> bool {
        extents_of(range).all(|number| self.extents[number].load(Ordering::Acquire) & ACTIVE != 0) || self.passes()
    }

    /// A request has ended, or is given up; ticket, mark or failure are noted. `position`: of its ticket.
    pub(crate) fn leave(&self, range: &Range<u64>, position: Option<u64>) {
        // SeqCst, as in `begin_flush`: a flush that begins behind this look gets a higher number.
        let stamp = self.flushes_begun.load(Ordering::SeqCst);
        for number in extents_of(range) {
            let extent = &self.extents[number];
            // One that went past the log has no place; the keeper takes the worst for it.
            if let Some(place) = place_of(extent.load(Ordering::Acquire)).and_then(|place| self.log.places.get(place)) {
                raise(&place.stamp, stamp);
                if let Some(position) = position {
                    raise(&place.position, position + 1);
                }
            }
            // Release: what was just noted is seen by who sees nobody inside.
            extent.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// A flush of the backing device is about to be submitted. Its number.
    pub(crate) fn begin_flush(&self) -> u64 {
        self.flushes_begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// That flush has ended well: all writes that had ended before it began are stable.
    pub(crate) fn end_flush(&self, number: u64) {
        self.flushes_ended.fetch_max(number, Ordering::AcqRel);
    }

    /// A flush of the backing device has failed. The device says so once; what it had in its cache may be gone all the same when the
    /// next flush ends well.
    pub(crate) fn fail_flush(&self) {
        self.log.unstable.store(true, Ordering::Release);
    }

    /// What a guest's flush that has ended with `result` is answered. A guest that was told "stable" drops what it could write again; so
    /// it hears of a flush that failed before and that nobody told it of.
    pub(crate) fn answer_flush(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        let owed = self.owed.swap(0, Ordering::AcqRel);
        if owed == 0 { result } else { result.and(Err(Errno(owed))) }
    }

    /// Flushes the backing device.
    fn flush(&self) -> io::Result<()> {
        let number = self.begin_flush();
        match (self.flush)() {
            Ok(()) => {
                self.end_flush(number);
                Ok(())
            }
            Err(error) => {
                // Else it is not served.
                if !matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::NotFound) {
                    self.fail_flush();
                    self.owed.store(guest_errno(&error).0, Ordering::Release);
                }
                Err(error)
            }
        }
    }

    fn active(&self) -> u64 {
        self.extents.iter().map(|word| u64::from(word.load(Ordering::Relaxed) & ACTIVE != 0)).sum()
    }

    /// Slots of an extent of which it is known that they are not, or not yet, at the target.
    fn marked(&self, number: u32) -> u64 {
        let word = usize::try_from(number).expect("usize has 64 bits");
        if word >= self.missing.words() {
            return 0;
        }
        // In this order: a bit moves from one to the other by being set there before it is cleared here, and back.
        let mut marked = self.missing.load_word(word);
        fence(Ordering::SeqCst);
        marked |= self.in_flight.load_word(word);
        fence(Ordering::SeqCst);
        marked | self.missing.load_word(word)
    }

    /// All slots of an extent, as far as the volume goes.
    fn all_slots(&self, number: u32) -> u64 {
        let first = u64::from(number) * EXTENT_SLOTS;
        match self.missing.bits().saturating_sub(first) {
            EXTENT_SLOTS.. => u64::MAX,
            rest => (1 << rest) - 1,
        }
    }
}

/// In the steady state a load.
fn raise(value: &AtomicU64, to: u64) {
    if value.load(Ordering::Relaxed) < to {
        value.fetch_max(to, Ordering::AcqRel);
    }
}

/// Numbers of the extents that the range touches. Bytes.
fn extents_of(range: &Range<u64>) -> Range<usize> {
    let number = |extents: u64| usize::try_from(extents).expect("usize has 64 bits");
    number(range.start / EXTENT_BYTES)..number(range.end.div_ceil(EXTENT_BYTES))
}
