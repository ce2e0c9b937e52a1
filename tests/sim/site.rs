//! The target on a simulated machine that dies and comes back.

use std::sync::Arc;

use farshore_proto::keys::VaultKey;
use farshore_proto::{KeyEpoch, Name, Now, Role, VaultId, VolumeIndex, WallTime};
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
use farshore_uring::sim::{SimRng, SimStorage};

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
    pub(crate) crashes: u64,
    pub(crate) moves: u64,
}

impl Site {
    pub(crate) fn new(rng: SimRng) -> Self {
        let mut site = Self { storage: SimStorage::new(rng), life: None, dies_at: None, crashes: 0, moves: 0 };
        site.boot();
        site
    }

    pub(crate) fn is_up(&self) -> bool {
        self.life.is_some()
    }

    fn died(&self) -> bool {
        self.dies_at.is_some_and(|at| self.storage.op_count() > at)
    }

    /// Dies at one of the next storage calls.
    pub(crate) fn die_within(&mut self, calls: u64, rng: &mut SimRng) {
        self.dies_at = Some(self.storage.op_count() + rng.below(calls));
        self.storage.crash_at(self.dies_at);
    }

    /// No more trouble: a death that has not come will not.
    pub(crate) fn spare(&mut self) {
        if !self.died() {
            self.dies_at = None;
            self.storage.crash_at(None);
        }
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
        self.crashes += 1;
    }

    /// Starts the target. It stays down if the machine dies meanwhile.
    pub(crate) fn boot(&mut self) {
        let keys = TargetKeys::new(VAULT, [vault_key()]).expect("one key");
        let opened = Target::open(self.storage.clone(), keys, CONFIG);
        if self.died() {
            return;
        }
        let target = opened.expect("opens after a crash");
        assert!(target.broken().is_empty(), "{:?}", target.broken());
        assert_eq!(target.alarm_list(), [], "a crash is no damage");
        self.life = Some(Life { target, chores: None });
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
            assert!(self.died() || sealed.is_ok(), "{sealed:?}");
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
        if self.died() {
            return;
        }
        checked.expect("no disk fails here");
        self.moves += u64::from(matches!(moved.expect("no disk fails here"), Step::Finished(_)));
        assert_eq!(stream.damage().iter().count(), 0, "nothing was damaged");
    }

    /// Keeps points for this long only.
    pub(crate) fn keep(&self, text: &str) {
        if let Some(target) = self.target() {
            let set = target.catalog().set_policy(&name("db"), "keep", Some(text));
            assert!(self.died() || set.is_ok(), "{set:?}");
        }
    }
}

/// A volume at a point, slot by slot.
pub(crate) fn read_volume(stream: &Stream, volume: VolumeIndex, size: u64, point: &Point) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(size).expect("small")];
    for (slot, out) in (0..).zip(content.chunks_mut(SLOT)) {
        let read = reader::read_slot(stream, volume, slot, UpTo::end_of(point.id.batch), out);
        read.unwrap_or_else(|error| panic!("slot {slot} of volume {volume} at {}: {error}", point.id));
    }
    content
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
