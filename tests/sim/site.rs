//! The target on a simulated machine that dies and comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farshore_proto::keys::VaultKey;
use farshore_proto::{KeyEpoch, Name, Now, Role, VaultId, VolumeIndex, WallTime};
use farshore_target::alarm::{Alarm, AlarmCode};
use farshore_target::check::Checker;
use farshore_target::group::{GroupHost, UpTo};
use farshore_target::ingest::OwnedBatch;
use farshore_target::keys::TargetKeys;
use farshore_target::lane::Output;
use farshore_target::points::Point;
use farshore_target::reader;
use farshore_target::restore::{self, restore};
use farshore_target::retention::{Mover, Step};
use farshore_target::target::{Peer, Target, TargetConfig};
use farshore_target::view::ViewOf;
use farshore_uring::sim::{SimRng, SimStorage, StorageOp};

use crate::faults::{Coverage, Fault};
use crate::wire::Arrival;

pub(crate) const VAULT: VaultId = VaultId([0x11; 16]);
const EPOCH: KeyEpoch = KeyEpoch(1);
const SLOT: usize = 64 << 10;
/// Small segments, so that a few batches fill several.
const CONFIG: TargetConfig = TargetConfig { frame_cache_bytes: 1 << 20, segment_bytes: 256 << 10 };

pub(crate) fn vault_key() -> (KeyEpoch, VaultKey) {
    (EPOCH, VaultKey::new([7; 32]))
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a good name")
}

pub(crate) type Stream = Arc<GroupHost<SimStorage>>;

struct Chores {
    checker: Checker<SimStorage>,
    mover: Mover<SimStorage, GroupHost<SimStorage>>,
}

struct Life {
    target: Target<SimStorage>,
    chores: Option<Chores>,
}

pub(crate) struct Site {
    storage: SimStorage,
    /// `None`: the machine is down.
    life: Option<Life>,
    /// From this storage call on the machine is dead.
    dies_at: Option<u64>,
    coverage: Arc<Coverage>,
    /// Faults of the disk since the target was started: errors are no surprise.
    excused: Arc<AtomicBool>,
    /// Its disk has failed to read since [`Self::take_failed_read`].
    unread: Arc<AtomicBool>,
    /// The disk has failed in this run.
    hurt: bool,
    backup: Option<SimStorage>,
}

impl Site {
    pub(crate) fn new(rng: SimRng, coverage: Arc<Coverage>) -> Self {
        let storage = SimStorage::new(rng);
        let (excused, unread) = (Arc::default(), Arc::default());
        let mut site =
            Self { storage, life: None, dies_at: None, coverage, excused, unread, hurt: false, backup: None };
        site.boot();
        site
    }

    pub(crate) fn is_up(&self) -> bool {
        self.life.is_some()
    }

    fn died(&self) -> bool {
        self.dies_at.is_some_and(|at| self.storage.op_count() > at)
    }

    fn excused(&self) -> bool {
        self.died() || self.excused.load(Ordering::Relaxed)
    }

    /// Dies at one of the next storage calls.
    pub(crate) fn die_within(&mut self, calls: u64, rng: &mut SimRng) {
        self.dies_at = Some(self.storage.op_count() + rng.below(calls));
        self.storage.crash_at(self.dies_at);
    }

    /// No more trouble: a death that has not come will not.
    pub(crate) fn spare(&mut self) {
        self.storage.clear_fault();
        if !self.died() {
            self.dies_at = None;
            self.storage.crash_at(None);
        }
    }

    /// Its disk fails some calls from now on, until [`Self::spare`]: `full`, those that need room; else those that write and sync.
    pub(crate) fn fail(&mut self, full: bool, rate: u64, mut rng: SimRng) {
        let (coverage, excused, unread) =
            (Arc::clone(&self.coverage), Arc::clone(&self.excused), Arc::clone(&self.unread));
        self.storage.set_fault(move |op, _| {
            let concerned = match full {
                true => matches!(op, StorageOp::Write | StorageOp::Reserve | StorageOp::CreateDirAll),
                false => matches!(op, StorageOp::Write | StorageOp::Sync | StorageOp::Read),
            };
            if !concerned || !rng.chance(rate, 1000) {
                return None;
            }
            excused.store(true, Ordering::Relaxed);
            unread.fetch_or(op == StorageOp::Read, Ordering::Relaxed);
            coverage.hit(if full { Fault::TargetFull } else { Fault::TargetEio });
            Some(std::io::Error::from_raw_os_error(if full { 28 } else { 5 }))
        });
    }

    /// Whether its disk failed to read since this was asked last.
    pub(crate) fn take_failed_read(&self) -> bool {
        self.unread.swap(false, Ordering::Relaxed)
    }

    /// Its disk works again.
    pub(crate) fn storage_heals(&self) {
        self.storage.clear_fault();
    }

    /// The machine has to be started anew before it serves again.
    pub(crate) fn needs_restart(&self) -> bool {
        self.excused.load(Ordering::Relaxed)
    }

    /// If the machine has died since the last call: what its disk keeps is decided, and the process is gone.
    pub(crate) fn take_death(&mut self, rng: &mut SimRng) -> bool {
        let died = self.died();
        if died {
            self.die_now(rng);
        }
        died
    }

    /// Dies between two storage calls.
    pub(crate) fn die_now(&mut self, rng: &mut SimRng) {
        self.life = None;
        self.dies_at = None;
        self.storage = self.storage.crash(rng);
        self.coverage.hit(Fault::TargetCrash);
    }

    /// The process alone ends; what it had written is there.
    pub(crate) fn kill(&mut self) {
        self.life = None;
        self.coverage.hit(Fault::TargetKill);
    }

    /// Somebody makes a copy of the target's disk.
    pub(crate) fn back_up(&mut self) {
        self.backup = Some(self.storage.fork());
    }

    /// The machine comes back with the disk of that copy.
    pub(crate) fn go_back(&mut self, rng: &mut SimRng) -> bool {
        let Some(backup) = self.backup.take() else { return false };
        self.life = None;
        self.dies_at = None;
        self.storage = backup.crash(rng);
        self.coverage.hit(Fault::TargetOld);
        true
    }

    /// Starts the target. It stays down if the machine dies meanwhile.
    pub(crate) fn boot(&mut self) {
        self.hurt |= self.excused.swap(false, Ordering::Relaxed);
        let opened = open(&self.storage);
        if self.excused() {
            return;
        }
        let target = opened.expect("opens after a crash");
        assert!(target.broken().is_empty(), "{:?}", target.broken());
        // A footer that the disk did not take is made again.
        let expected = |alarm: &Alarm| self.hurt && alarm.code == AlarmCode::FooterRebuilt;
        let alarms: Vec<_> = target.alarm_list().into_iter().filter(|alarm| !expected(alarm)).collect();
        assert_eq!(alarms, [], "a crash is no damage");
        self.life = Some(Life { target, chores: None });
    }

    /// Another target over a copy of the disk, as it is.
    pub(crate) fn copy(&self) -> SimStorage {
        self.storage.fork()
    }

    fn target(&self) -> Option<&Target<SimStorage>> {
        self.life.as_ref().map(|life| &life.target)
    }

    pub(crate) fn handle_up(&self, session: u64) {
        if let Some(target) = self.target() {
            target.handle_up(session, Peer { role: Role::Agent, name: name("host") });
        }
    }

    pub(crate) fn handle_down(&self, session: u64) {
        if let Some(target) = self.target() {
            target.handle_down(session);
        }
    }

    pub(crate) fn handle(&self, session: u64, arrival: Arrival) {
        let Some(target) = self.target() else { return };
        match arrival {
            Arrival::Control(bytes) => drop(target.handle_control(session, bytes)),
            Arrival::Batch(bytes) => drop(target.handle_batch(session, Box::new(OwnedBatch::new(&bytes)))),
        }
    }

    /// Runs the streams' lanes; gives what the target wants of the link.
    pub(crate) fn run(&self, now: Now, wall: WallTime) -> Vec<Output> {
        let Some(target) = self.target() else { return Vec::new() };
        target.run(now, wall);
        std::iter::from_fn(|| target.poll_output()).collect()
    }

    pub(crate) fn stream(&self) -> Option<Stream> {
        self.target()?.stream(&name("db"), None).ok()
    }

    /// Closes the active segment.
    pub(crate) fn seal(&self) {
        for lane in self.target().into_iter().flat_map(|target| target.lanes().into_values()) {
            let sealed = lane.seal();
            assert!(self.excused() || sealed.is_ok(), "{sealed:?}");
        }
    }

    /// One step of the background work: frames are checked, the base moves, segments go.
    pub(crate) fn chore(&mut self, wall: WallTime) {
        let Some(stream) = self.stream() else { return };
        let Some(life) = self.life.as_mut() else { return };
        let chores = life.chores.get_or_insert_with(|| Chores {
            checker: Checker::new(Arc::clone(&stream)),
            mover: Mover::new(Arc::clone(&stream)),
        });
        let checked = chores.checker.step();
        let moved = chores.mover.step(wall);
        if self.excused() {
            return;
        }
        checked.expect("no disk fails here");
        let finished = matches!(moved.expect("no disk fails here"), Step::Finished(_));
        self.coverage.add(Fault::Moves, u64::from(finished));
        assert_eq!(stream.damage().iter().count(), 0, "nothing was damaged");
    }

    /// Keeps points for this long only.
    pub(crate) fn keep(&self, text: &str) {
        if let Some(target) = self.target() {
            let set = target.catalog().set_policy(&name("db"), "keep", Some(text));
            assert!(self.excused() || set.is_ok(), "{set:?}");
        }
    }
}

/// A target over `storage`, as it starts.
pub(crate) fn open(storage: &SimStorage) -> farshore_target::Result<Target<SimStorage>> {
    let keys = TargetKeys::new(VAULT, [vault_key()]).expect("one key");
    Target::open(storage.clone(), keys, CONFIG)
}

/// A volume at a point, slot by slot; an error where it is refused.
pub(crate) fn try_read(
    stream: &Stream,
    volume: VolumeIndex,
    size: u64,
    point: &Point,
) -> farshore_target::Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(size).expect("small")];
    for (slot, out) in (0..).zip(content.chunks_mut(SLOT)) {
        reader::read_slot(stream, volume, slot, UpTo::end_of(point.id.batch), out)?;
    }
    Ok(content)
}

/// A volume at a point, slot by slot.
pub(crate) fn read_volume(stream: &Stream, volume: VolumeIndex, size: u64, point: &Point) -> Vec<u8> {
    let read = try_read(stream, volume, size, point);
    read.unwrap_or_else(|error| panic!("volume {volume} at {}: {error}", point.id))
}

struct Memory(Vec<u8>);

impl restore::Output for Memory {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> farshore_target::Result<()> {
        assert_eq!(offset, self.0.len() as u64, "in order, without gaps");
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> farshore_target::Result<()> {
        assert_eq!(offset, self.0.len() as u64, "in order, without gaps");
        self.0.resize(self.0.len() + usize::try_from(len).expect("small"), 0);
        Ok(())
    }

    fn finish(&mut self) -> farshore_target::Result<()> {
        Ok(())
    }
}

/// A volume at a point, as an operator would restore it.
pub(crate) fn restore_volume(stream: &Stream, volume: VolumeIndex, size: u64, point: &Point) -> Vec<u8> {
    let mut out = Memory(Vec::new());
    let of = ViewOf { point: point.id, volume, size, block: 512 };
    restore(&**stream, &of, &mut out, |_| true).expect("no disk fails here");
    out.0
}
