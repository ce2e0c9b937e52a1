//! Goal: at any moment, and after a crash at any storage call, every point from the horizon on reads as a naive model says.
//! Method: random batches over a few interesting slots, seals, merges, horizon moves and reads, on the simulated storage;
//! the model keeps the volume's content after every batch.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{
    BatchNo, Generation, Incarnation, Name, PointId, SECTOR_BYTES, SLOT_BYTES, VolumeIndex, WallTime,
};
use farshore_uring::sim::{SimRng, SimStorage, World};
use farshore_uring::{OpenMode, Storage, StorageFile};

use crate::base::Base;
use crate::error::{Error, Kind, Result};
use crate::group::{ChunkPlace, Content, FrameStore, IndexEntry, SealedRun, UpTo, ZERO_EXTENT_SLOTS};
use crate::history::{History, Keeper, PointMark};
use crate::index::Index;
use crate::reader::read_sectors;
use crate::restore::{Output, Progress, restore};
use crate::retention::{Mover, Step};
use crate::view::{PointSlot, PointSlots, View, ViewOf, ViewOptions};

const VOLUME: VolumeIndex = VolumeIndex(3);
const SLOT_SECTORS: u64 = SLOT_BYTES / SECTOR_BYTES;
const SECTOR: usize = 512;
/// Two extents and a bit, ending within a slot.
const VOLUME_SECTORS: u64 = (2 * ZERO_EXTENT_SLOTS + 3) * SLOT_SECTORS + 40;
/// Where writes go, so that they meet.
const SLOTS: [u64; 10] = [0, 1, 2, 9, 1023, 1024, 1025, 2047, 2050, 2051];

/// Content by sector: 0 or absent is zero, else every word of the sector is the stamp.
type Image = BTreeMap<u64, u64>;

fn sector_bytes(stamp: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes.as_chunks_mut::<8>().0.fill(stamp.to_le_bytes());
    bytes
}

fn point_id(batch: u64) -> PointId {
    PointId { generation: Generation(1), incarnation: Incarnation(1), batch: BatchNo(batch) }
}

fn decl() -> VolumeDecl {
    let name = Name::new("model").expect("a name");
    VolumeDecl { index: VOLUME, name, size: VOLUME_SECTORS * SECTOR_BYTES, block: 512 }
}

/// What survives a crash by other means than the code under test: the journal and the catalog.
#[derive(Clone, Default)]
struct Durable {
    /// Entries by batch; batch n is `batches[n - 1]`.
    batches: Vec<Vec<IndexEntry>>,
    images: Vec<Image>,
    frames: BTreeMap<(u32, u32), Arc<[u8]>>,
    sealed: Vec<SealedRun>,
    horizon: u64,
    hold: Option<u64>,
    stamp: u64,
}

/// A stream over a simulated storage, with journal and catalog in memory.
struct Fake {
    durable: Mutex<Durable>,
    storage: SimStorage,
    index: Index<SimStorage>,
    base: Arc<Base<SimStorage>>,
}

impl Fake {
    fn open(storage: SimStorage, durable: Durable) -> Result<Self> {
        let index = Index::open(storage.clone(), PathBuf::from("s/index"), &durable.sealed)?;
        let sealed_to = durable.sealed.last().map_or(0, |run| run.last.0).max(durable.dropped_to());
        for entries in durable.batches.iter().skip(usize::try_from(sealed_to).expect("few batches")) {
            index.add_batch(entries);
        }
        let base = Arc::new(Base::open_or_create(storage.clone(), PathBuf::from("s/base"), &decl())?);
        Ok(Self { durable: Mutex::new(durable), storage, index, base })
    }

    fn lock(&self) -> MutexGuard<'_, Durable> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The active segment's number.
    fn active(&self) -> u32 {
        self.lock().next_segment()
    }

    fn add_batch(&self, rng: &mut SimRng) {
        let segment = self.active();
        let mut durable = self.lock();
        let batch = durable.batches.len() as u64 + 1;
        let mut image = durable.images.last().cloned().unwrap_or_default();
        let mut entries = Vec::new();
        for seq in 0..rng.below(12) {
            let seq = u32::try_from(seq).expect("few records");
            durable.record(rng, segment, batch, seq, &mut image, &mut entries);
        }
        self.index.add_batch(&entries);
        durable.batches.push(entries);
        durable.images.push(image);
    }

    fn seal(&self) -> Result<()> {
        let segment = self.active();
        let (first, last) = {
            let durable = self.lock();
            let first = durable.sealed.last().map_or(0, |run| run.last.0).max(durable.dropped_to()) + 1;
            (first, durable.batches.len() as u64)
        };
        if first > last {
            return Ok(());
        }
        let run = self.index.active_run()?;
        let path = PathBuf::from(format!("s/{segment}.seg"));
        let io = |error| Error::io("write", &path, error);
        self.storage.create_dir_all(Path::new("s")).map_err(io)?;
        if self.storage.exists(&path).map_err(io)? {
            self.storage.remove(&path).map_err(io)?;
        }
        let file = self.storage.open(&path, OpenMode::CreateNew).map_err(io)?;
        file.write_sync_at(&run, 4096).map_err(io)?;
        self.storage.sync_dir(Path::new("s")).map_err(io)?;
        let len = run.len() as u64;
        let run = SealedRun { segment, path, offset: 4096, len, first: BatchNo(first), last: BatchNo(last) };
        self.lock().sealed.push(run.clone());
        self.index.sealed(run)
    }
}

impl Durable {
    fn next_segment(&self) -> u32 {
        self.sealed.last().map_or(1, |run| run.segment + 1)
    }

    /// All sealed runs stay in the list, so that numbers go on; those dropped have no frames.
    fn dropped_to(&self) -> u64 {
        0
    }

    fn record(
        &mut self,
        rng: &mut SimRng,
        segment: u32,
        batch: u64,
        seq: u32,
        image: &mut Image,
        entries: &mut Vec<IndexEntry>,
    ) {
        let entry = |slot, start: u64, count: u64, content| IndexEntry {
            volume: VOLUME,
            slot,
            batch: BatchNo(batch),
            seq,
            start: u8::try_from(start).expect("in a slot"),
            count: u8::try_from(count).expect("in a slot"),
            content,
        };
        if rng.chance(1, 25) {
            let first = rng.below(2) * ZERO_EXTENT_SLOTS;
            entries.push(entry(first, 0, SLOT_SECTORS, Content::ZeroExtent));
            let range = first * SLOT_SECTORS..(first + ZERO_EXTENT_SLOTS) * SLOT_SECTORS;
            image.retain(|sector, _| !range.contains(sector));
            return;
        }
        let slot = SLOTS[rng.index(SLOTS.len())];
        let room = SLOT_SECTORS.min(VOLUME_SECTORS - slot * SLOT_SECTORS);
        let (start, count) = match rng.below(4) {
            0 => (0, room),
            1 => (rng.below(room / 8) * 8, 8),
            _ => {
                let start = rng.below(room);
                (start, 1 + rng.below(room - start))
            }
        };
        let place = slot * SLOT_SECTORS + start;
        if rng.chance(1, 6) {
            entries.push(entry(slot, start, count, Content::Zero));
            image.retain(|sector, _| !(place..place + count).contains(sector));
            return;
        }
        // Some by reference to an older frame that is still there.
        let older =
            rng.chance(1, 8).then(|| self.frames.keys().nth(rng.index(self.frames.len().max(1))).copied()).flatten();
        let (segment, frame_offset) =
            older.filter(|key| self.frames[key].len() as u64 >= count * SECTOR_BYTES).unwrap_or_else(|| {
                let key = (segment, u32::try_from(self.stamp).expect("few frames"));
                let mut bytes = Vec::new();
                for _ in 0..count + rng.below(3) {
                    self.stamp += 1;
                    bytes.extend_from_slice(&sector_bytes(self.stamp));
                }
                self.frames.insert(key, bytes.into());
                key
            });
        let frame = &self.frames[&(segment, frame_offset)];
        let within = rng.below((frame.len() / SECTOR) as u64 - count + 1) * SECTOR_BYTES;
        for sector in 0..count {
            let at = usize::try_from(within + sector * SECTOR_BYTES).expect("small");
            image.insert(place + sector, u64::from_le_bytes(frame[at..at + 8].try_into().expect("8 bytes")));
        }
        let within = u32::try_from(within).expect("small");
        entries.push(entry(slot, start, count, Content::Chunk(ChunkPlace { segment, frame_offset, within })));
    }
}

impl FrameStore for Fake {
    fn read_frame(&self, segment: u32, frame_offset: u32) -> Result<Arc<[u8]>> {
        let frame = self.lock().frames.get(&(segment, frame_offset)).cloned();
        frame.ok_or_else(|| Error::new(Kind::NotFound, format!("frame {frame_offset} of segment {segment}")))
    }
}

impl History<SimStorage> for Fake {
    fn index(&self) -> &Index<SimStorage> {
        &self.index
    }

    fn frames(&self) -> &dyn FrameStore {
        self
    }

    fn base(&self, volume: VolumeIndex) -> Result<Arc<Base<SimStorage>>> {
        assert_eq!(volume, VOLUME);
        Ok(Arc::clone(&self.base))
    }
}

impl Keeper<SimStorage> for Fake {
    fn subject(&self) -> String {
        "model/model".to_owned()
    }

    fn points(&self) -> Vec<PointMark> {
        let durable = self.lock();
        let mark = |batch: u64| PointMark {
            id: point_id(batch),
            received: WallTime(batch * 1_000_000_000),
            recoverable: batch % 5 != 4,
            bytes: 100,
        };
        (durable.horizon.max(1)..=durable.batches.len() as u64).map(mark).collect()
    }

    fn oldest_hold(&self) -> Option<BatchNo> {
        self.lock().hold.map(BatchNo)
    }

    fn horizon(&self) -> Option<PointId> {
        Some(self.lock().horizon).filter(|&horizon| horizon > 0).map(point_id)
    }

    fn set_horizon(&self, point: PointId) -> Result<()> {
        let mut durable = self.lock();
        assert!(durable.hold.is_none_or(|hold| point.batch.0 <= hold), "never past a hold");
        assert!(point.batch.0 > durable.horizon && point.batch.0 % 5 != 4, "forward, onto a recoverable point");
        durable.horizon = point.batch.0;
        Ok(())
    }

    fn check_point(&self, _point: PointId) -> Result<()> {
        Ok(())
    }

    fn drop_points_before(&self, _batch: BatchNo) {}

    fn volumes(&self) -> Vec<VolumeIndex> {
        vec![VOLUME]
    }

    fn droppable(&self, horizon: BatchNo) -> Vec<u32> {
        let durable = self.lock();
        let mut needed = BTreeSet::new();
        let past: BTreeSet<u32> =
            durable.sealed.iter().filter(|run| run.last <= horizon).map(|run| run.segment).collect();
        let kept_from = durable.sealed.iter().rfind(|run| run.last <= horizon).map_or(0, |run| run.last.0);
        for entry in durable.batches.iter().skip(usize::try_from(kept_from).expect("few")).flatten() {
            if let Content::Chunk(place) = entry.content {
                needed.insert(place.segment);
            }
        }
        let has_frames: BTreeSet<u32> = durable.frames.keys().map(|key| key.0).collect();
        past.into_iter().filter(|segment| !needed.contains(segment) && has_frames.contains(segment)).collect()
    }

    fn drop_segment(&self, number: u32) -> Result<bool> {
        self.lock().frames.retain(|key, _| key.0 != number);
        let path = PathBuf::from(format!("s/{number}.seg"));
        let io = |error| Error::io("remove", &path, error);
        if self.storage.exists(&path).map_err(io)? {
            self.storage.remove(&path).map_err(io)?;
        }
        Ok(true)
    }

    fn policy(&self) -> BTreeMap<String, String> {
        [("keep", "6s"), ("size_limit", "1000")].map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }
}

fn expect(image: &Image, first: u64, out: &[u8], what: &str) {
    for (sector, bytes) in (first..).zip(out.chunks(SECTOR)) {
        let stamp = image.get(&sector).copied().unwrap_or(0);
        if *bytes != sector_bytes(stamp)[..] {
            let found = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            panic!(
                "{what}: sector {sector} (slot {}, {}) is {found}, not {stamp}",
                sector / SLOT_SECTORS,
                sector % SLOT_SECTORS
            );
        }
    }
}

fn slot_bytes(slot: u64) -> usize {
    usize::try_from(SLOT_SECTORS.min(VOLUME_SECTORS - slot * SLOT_SECTORS)).expect("small") * SECTOR
}

/// Every point from the horizon on, every slot that can hold something.
fn check_all(fake: &Fake, what: &str) -> Result<()> {
    let (horizon, images) = {
        let durable = fake.lock();
        (durable.horizon.max(1), durable.images.clone())
    };
    let mut out = vec![0; slot_bytes(0)];
    for batch in horizon..=images.len() as u64 {
        for slot in SLOTS {
            let out = &mut out[..slot_bytes(slot)];
            read_sectors(fake, VOLUME, slot, 0, UpTo::end_of(BatchNo(batch)), out)?;
            let image = &images[usize::try_from(batch - 1).expect("few")];
            expect(image, slot * SLOT_SECTORS, out, &format!("{what}, point {batch} of {horizon}..={}", images.len()));
        }
    }
    Ok(())
}

/// A part of a slot at a random point.
fn check_some(fake: &Fake, rng: &mut SimRng) -> Result<()> {
    let durable = fake.lock();
    let (first, last) = (durable.horizon.max(1), durable.batches.len() as u64);
    if last < first {
        return Ok(());
    }
    let batch = first + rng.below(last - first + 1);
    let image = durable.images[usize::try_from(batch - 1).expect("few")].clone();
    drop(durable);
    let slot = SLOTS[rng.index(SLOTS.len())];
    let room = (slot_bytes(slot) / SECTOR) as u64;
    let start = rng.below(room);
    let mut out = vec![0; rng.index(usize::try_from(room - start).expect("small")) * SECTOR + SECTOR];
    read_sectors(fake, VOLUME, slot, u32::try_from(start).expect("small"), UpTo::end_of(BatchNo(batch)), &mut out)?;
    expect(&image, slot * SLOT_SECTORS + start, &out, "a read in between");
    Ok(())
}

/// Runs a stream's life until it is over or the storage crashes; what is durable comes back in both cases.
fn live(fake: Fake, rng: &mut SimRng, steps: u64) -> (Arc<Fake>, Result<()>) {
    let fake = Arc::new(fake);
    let result = (|| {
        let mut mover = Mover::<SimStorage, Fake>::new(Arc::clone(&fake));
        for _ in 0..steps {
            match rng.below(16) {
                0..=6 => fake.add_batch(rng),
                7 | 8 => fake.seal()?,
                9 => drop(fake.index.maintain(&AtomicBool::new(false))?),
                10 => {
                    let now = WallTime(fake.lock().batches.len() as u64 * 1_000_000_000);
                    mover.step(now)?;
                }
                11 => {
                    let now = WallTime(fake.lock().batches.len() as u64 * 1_000_000_000);
                    mover.run(now)?;
                }
                12 => {
                    let mut durable = fake.lock();
                    let (first, last) = (durable.horizon.max(1), durable.batches.len() as u64);
                    durable.hold = (rng.chance(1, 2) && first < last).then(|| first + rng.below(last - first));
                }
                _ => check_some(&fake, rng)?,
            }
        }
        check_all(&fake, "alive")
    })();
    (fake, result)
}

fn is_crash(error: &Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = source {
        if inner.downcast_ref::<std::io::Error>().is_some_and(farshore_uring::sim::is_crash) {
            return true;
        }
        source = inner.source();
    }
    error.context().contains("simulated crash")
}

fn no_fault<T>(result: Result<T>, what: &str) -> T {
    result.unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[test]
fn reads_equal_the_model() {
    for seed in 0..30 {
        let mut world = World::new(seed);
        let storage = world.storage();
        let fake = no_fault(Fake::open(storage, Durable::default()), "open");
        let (fake, result) = live(fake, world.rng(), 150);
        no_fault(result, &format!("seed {seed}"));
        assert_eq!(fake.index.verify().len(), 0, "seed {seed}");
        assert_eq!(no_fault(fake.base.verify(), "verify"), [], "seed {seed}");
    }
}

#[test]
fn the_horizon_moves_and_segments_go() {
    let mut world = World::new(77);
    let fake = no_fault(Fake::open(world.storage(), Durable::default()), "open");
    let fake = Arc::new(fake);
    let mut mover = Mover::<SimStorage, Fake>::new(Arc::clone(&fake));
    let (mut moved, mut dropped) = (0, 0);
    for _ in 0..60 {
        fake.add_batch(world.rng());
        no_fault(fake.seal(), "seal");
        let now = WallTime(fake.lock().batches.len() as u64 * 1_000_000_000);
        loop {
            match no_fault(mover.step(now), "step") {
                Step::Idle => break,
                Step::Finished(batch) => {
                    moved += 1;
                    assert_eq!(fake.index.moved_to(), batch);
                }
                Step::Dropped { segments } => dropped += segments,
                Step::Horizon(_) | Step::Moved { .. } => {}
            }
            no_fault(check_all(&fake, "between two steps"), "read");
        }
    }
    assert!(moved > 5 && dropped > 30, "moved {moved}, dropped {dropped}");
}

#[test]
fn a_hold_keeps_its_point() {
    let mut world = World::new(5);
    let fake = Arc::new(no_fault(Fake::open(world.storage(), Durable::default()), "open"));
    (0..10).for_each(|_| fake.add_batch(world.rng()));
    fake.lock().hold = Some(3);
    let mut mover = Mover::<SimStorage, Fake>::new(Arc::clone(&fake));
    (0..30).for_each(|_| fake.add_batch(world.rng()));
    no_fault(mover.run(WallTime(u64::MAX)), "run");
    assert_eq!(fake.horizon(), Some(point_id(3)));
    no_fault(check_all(&fake, "held"), "read");
    fake.lock().hold = None;
    no_fault(mover.run(WallTime(u64::MAX)), "run");
    assert_eq!(fake.horizon(), Some(point_id(40)), "the newest recoverable point stays");
    no_fault(check_all(&fake, "released"), "read");
}

/// Goal: after a crash at any storage call, opening succeeds, all points read as the model says, and the work goes on.
#[test]
fn crashes_anywhere_lose_nothing() {
    for seed in 0..2u64 {
        let total = {
            let mut world = World::new(seed);
            let storage = world.storage();
            let fake = no_fault(Fake::open(storage.clone(), Durable::default()), "open");
            let (_, result) = live(fake, world.rng(), 90);
            no_fault(result, "without a crash");
            storage.op_count()
        };
        let mut crash_rng = SimRng::new(seed ^ 0xc4a5);
        let mut crashes = 0;
        // Most calls are reads, which a crash at the write before or after covers: a random walk over all of them.
        let mut at = crash_rng.below(4);
        while at < total {
            crashes += u32::from(crash_once(seed, at, &mut crash_rng));
            at += 1 + crash_rng.below(total / 25);
        }
        assert!(crashes > 15, "seed {seed}: {crashes} crashes");
    }
}

fn crash_once(seed: u64, at: u64, crash_rng: &mut SimRng) -> bool {
    let mut world = World::new(seed);
    let storage = world.storage();
    storage.crash_at(Some(at));
    let (durable, crashed) = match Fake::open(storage.clone(), Durable::default()) {
        Ok(fake) => {
            let (fake, result) = live(fake, world.rng(), 90);
            if let Err(error) = &result {
                assert!(is_crash(error), "seed {seed}, crash at call {at}: {error}");
            }
            (fake.lock().clone(), result.is_err())
        }
        Err(error) => {
            assert!(is_crash(&error), "seed {seed}, crash at call {at}: {error}");
            (Durable::default(), true)
        }
    };
    let what = format!("seed {seed}, crash at call {at}");
    let storage = storage.crash(crash_rng);
    let fake = no_fault(Fake::open(storage.clone(), durable), &what);
    no_fault(check_all(&fake, &what), &what);
    let (fake, result) = live(fake, &mut crash_rng.fork(), 40);
    no_fault(result, &what);
    assert_eq!(fake.index.verify().len(), 0, "{what}");
    // A second crash, at rest.
    let durable = fake.lock().clone();
    let fake = no_fault(Fake::open(storage.crash(crash_rng), durable), &what);
    no_fault(check_all(&fake, &what), &what);
    crashed
}

#[derive(Default)]
struct MemoryOutput {
    image: Image,
    at: u64,
    finished: bool,
}

impl Output for MemoryOutput {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        assert_eq!(offset, self.at, "in order, without gaps");
        self.at += bytes.len() as u64;
        for (sector, bytes) in (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR)) {
            let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            assert_eq!(*bytes, sector_bytes(stamp)[..]);
            if stamp != 0 {
                self.image.insert(sector, stamp);
            }
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<()> {
        assert_eq!(offset, self.at, "in order, without gaps");
        self.at += len;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.finished = true;
        Ok(())
    }
}

#[test]
fn restores_and_extents_equal_the_model() {
    for seed in 100..112 {
        let mut world = World::new(seed);
        let fake = no_fault(Fake::open(world.storage(), Durable::default()), "open");
        let (fake, result) = live(fake, world.rng(), 120);
        no_fault(result, &format!("seed {seed}"));
        let (horizon, images) = {
            let durable = fake.lock();
            (durable.horizon.max(1), durable.images.clone())
        };
        for batch in (horizon..=images.len() as u64).step_by(3) {
            let image = &images[usize::try_from(batch - 1).expect("few")];
            let of = ViewOf { point: point_id(batch), volume: VOLUME, size: VOLUME_SECTORS * SECTOR_BYTES, block: 512 };
            let mut out = MemoryOutput::default();
            let mut last = Progress::default();
            let watch = |now| {
                last = now;
                true
            };
            let done = no_fault(restore(&*fake, &of, &mut out, watch), "restore");
            assert!(out.finished && out.at == of.size && last == done, "seed {seed}");
            assert_eq!(out.image, *image, "seed {seed}, point {batch}");
            check_extents(&fake, of, image);
        }
    }
}

fn check_extents(fake: &Arc<Fake>, of: ViewOf, image: &Image) {
    use farshore_uring::BlockDevice;
    let history: Arc<dyn History<SimStorage>> = Arc::clone(fake) as _;
    let options = ViewOptions { read_only: true, workers: 0, ..ViewOptions::default() };
    let view = no_fault(View::open(history, &fake.storage, Path::new("s/none"), of, options), "open view");
    let (mut at, mut zero_sectors) = (0, 0);
    while at < of.size {
        let extents = view.extents(at, of.size - at).expect("no damage");
        assert!(!extents.is_empty());
        for extent in extents {
            assert!(extent.len > 0 && extent.hole == extent.zero);
            let sectors = at / SECTOR_BYTES..(at + extent.len) / SECTOR_BYTES;
            if extent.zero {
                assert_eq!(image.range(sectors.clone()).find(|(_, stamp)| **stamp != 0), None, "zero at {at}");
                zero_sectors += sectors.end - sectors.start;
            }
            at += extent.len;
        }
    }
    assert_eq!(at, of.size);
    // All but the slots that are written to is known to be zero.
    assert!(zero_sectors >= VOLUME_SECTORS - SLOTS.len() as u64 * SLOT_SECTORS, "{zero_sectors} sectors");
}

#[test]
fn point_slots_name_every_slot_that_holds_something() {
    let mut world = World::new(9);
    let fake = no_fault(Fake::open(world.storage(), Durable::default()), "open");
    let (fake, result) = live(fake, world.rng(), 150);
    no_fault(result, "live");
    let (batch, image) = {
        let durable = fake.lock();
        (durable.batches.len() as u64, durable.images.last().cloned().expect("batches were made"))
    };
    let mut slots = PointSlots::new(&*fake as &dyn History<SimStorage>, VOLUME, UpTo::end_of(BatchNo(batch)));
    let (mut named, mut at) = (BTreeSet::new(), 0);
    while let Some(PointSlot { slot, .. }) = no_fault(slots.next(at), "next") {
        assert!(slot >= at);
        named.insert(slot);
        at = slot + 1;
    }
    for (sector, stamp) in image {
        assert!(stamp == 0 || named.contains(&(sector / SLOT_SECTORS)), "sector {sector}");
    }
    let next = no_fault(fake.index.next_slot(VOLUME, 3, UpTo::end_of(BatchNo(batch))), "next slot");
    assert!(next.is_some_and(|slot| slot <= 9), "{next:?}");
}

/// Goal: damage in a run, the base or a hash is reported with volume and bytes by the reads that need it, and only by those;
/// verify lists it.
#[test]
fn damage_is_named_and_stays_local() {
    let mut world = World::new(21);
    let storage = world.storage();
    let fake = no_fault(Fake::open(storage.clone(), Durable::default()), "open");
    let fake = Arc::new(fake);
    (0..40).for_each(|_| fake.add_batch(world.rng()));
    no_fault(fake.seal(), "seal");
    let mut mover = Mover::<SimStorage, Fake>::new(Arc::clone(&fake));
    fake.lock().hold = Some(30);
    no_fault(mover.run(WallTime(u64::MAX)), "run");
    // A slot that only the base has, above the horizon.
    let slot = SLOTS.iter().copied().find(|&slot| {
        let upto = UpTo::end_of(BatchNo(40));
        no_fault(fake.index.lookup(VOLUME, slot, upto), "lookup").iter().all(|entry| entry.count < 100)
            && fake.base.next_data(slot * SLOT_BYTES).is_ok_and(|at| at.is_some_and(|at| at < (slot + 1) * SLOT_BYTES))
    });
    let slot = slot.expect("40 batches leave some");
    let before = fake.lock().images.clone();
    for (path, at) in [("s/base/v3.raw", slot * SLOT_BYTES + 77), ("s/base/v3.hashes", 4096 + slot * 32 + 5)] {
        storage.corrupt(Path::new(path), at, 0x10).expect("the file is there");
        let mut out = vec![0; slot_bytes(slot)];
        let error = fake.base.read(slot * SLOT_BYTES, &mut out).expect_err("flipped bit");
        assert_eq!(error.kind(), Kind::Damaged);
        let bytes = format!("bytes {}..{}", slot * SLOT_BYTES, slot * SLOT_BYTES + out.len() as u64);
        assert!(error.context().contains("volume model") && error.context().contains(&bytes), "{error}");
        let found = no_fault(fake.base.verify(), "verify");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].range.contains(&(slot * SLOT_BYTES)));
        for other in SLOTS.into_iter().filter(|&other| other != slot) {
            let mut out = vec![0; slot_bytes(other)];
            no_fault(read_sectors(&*fake, VOLUME, other, 0, UpTo::end_of(BatchNo(40)), &mut out), "other slots");
            expect(&before[39], other * SLOT_SECTORS, &out, "other slots");
        }
        storage.corrupt(Path::new(path), at, 0x10).expect("the file is there");
        assert_eq!(no_fault(fake.base.verify(), "verify"), []);
    }
    let run = fake.lock().sealed[0].clone();
    let mut hit = 0;
    for block in 0..run.len / 4096 {
        storage.corrupt(&run.path, run.offset + block * 4096 + 99, 1).expect("the file is there");
        assert!(!fake.index.verify().is_empty(), "block {block}");
        for slot in SLOTS {
            let mut out = vec![0; slot_bytes(slot)];
            match read_sectors(&*fake, VOLUME, slot, 0, UpTo::end_of(BatchNo(40)), &mut out) {
                Ok(()) => expect(&before[39], slot * SLOT_SECTORS, &out, "damaged index"),
                Err(error) => {
                    hit += 1;
                    assert_eq!(error.kind(), Kind::Damaged);
                    assert!(error.context().contains(&format!("volume 3 bytes {}..", slot * SLOT_BYTES)), "{error}");
                    assert!(error.context().contains("s/1.seg at byte"), "{error}");
                }
            }
        }
        storage.corrupt(&run.path, run.offset + block * 4096 + 99, 1).expect("the file is there");
    }
    assert!(hit > 0);
    assert_eq!(fake.index.verify().len(), 0);
}

/// Goal: a frame that cannot be read fails the reads that need it, stops the horizon, and nothing is dropped.
#[test]
fn an_unreadable_frame_stops_the_horizon() {
    let mut world = World::new(31);
    let fake = Arc::new(no_fault(Fake::open(world.storage(), Durable::default()), "open"));
    (0..30).for_each(|_| fake.add_batch(world.rng()));
    no_fault(fake.seal(), "seal");
    let lost: Vec<(u32, u32)> = fake.lock().frames.keys().copied().collect();
    let all = fake.lock().frames.clone();
    for key in lost {
        // Too short: what a reader must not trust.
        fake.lock().frames.insert(key, Arc::from(&b""[..]));
    }
    let mut mover = Mover::<SimStorage, Fake>::new(Arc::clone(&fake));
    let error = mover.run(WallTime(u64::MAX)).expect_err("frames are unreadable");
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.context().contains("volume 3 bytes "), "{error}");
    assert_eq!(fake.index.moved_to(), BatchNo(0));
    fake.lock().frames = all;
    no_fault(check_all(&fake, "frames are back"), "read");
    no_fault(mover.run(WallTime(u64::MAX)), "goes on");
    no_fault(check_all(&fake, "moved"), "read");
}
