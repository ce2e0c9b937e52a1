use std::path::PathBuf;

use farshore_uring::sim::{SimRng, SimStorage, World};
use farshore_uring::{OpenMode, Storage, StorageFile};

use std::path::Path;

use super::files::MOVED_BYTES;
use super::*;
use crate::group::{ChunkPlace, Content};

const HOT: u64 = 4;
const SLOTS: u64 = 8;

fn entry(rng: &mut SimRng, batch: u64, seq: u32) -> IndexEntry {
    let slot = if rng.chance(3, 4) { HOT } else { rng.below(SLOTS) };
    let start = rng.below(128);
    let count = if rng.chance(1, 3) { 8.min(128 - start) } else { 1 + rng.below(128 - start) };
    let place = ChunkPlace { segment: 1, frame_offset: u32::try_from(batch).expect("few"), within: seq };
    let small = |value| u8::try_from(value).expect("within a slot");
    let whole = IndexEntry {
        volume: VolumeIndex(1 + u16::from(rng.chance(1, 10))),
        slot,
        batch: BatchNo(batch),
        seq,
        start: small(start),
        count: small(count),
        content: Content::Chunk(place),
    };
    match rng.below(200) {
        0 => IndexEntry { slot: 0, start: 0, count: 128, content: Content::ZeroExtent, ..whole },
        1..=20 => IndexEntry { content: Content::Zero, ..whole },
        _ => whole,
    }
}

/// Newest first, what each sector shows.
fn naive(entries: &[IndexEntry], volume: VolumeIndex, slot: u64, upto: UpTo, horizon: u64) -> Vec<IndexEntry> {
    let mut cover = Cover::of(ALL_SECTORS);
    let over = |entry: &&IndexEntry| {
        let place = entry.slot == slot
            || (entry.content == Content::ZeroExtent && slot / ZERO_EXTENT_SLOTS == entry.slot / ZERO_EXTENT_SLOTS);
        entry.volume == volume && place && entry.batch.0 > horizon && (entry.batch, entry.seq) <= (upto.batch, upto.seq)
    };
    for entry in entries.iter().rev().filter(over) {
        if cover.take(entry) {
            break;
        }
    }
    cover.entries
}

fn seal(storage: &SimStorage, index: &Index<SimStorage>, segment: u32, first: u64, last: u64) -> SealedRun {
    let path = PathBuf::from(format!("{segment}.seg"));
    let run = index.active_run().expect("in memory");
    let file = storage.open(&path, OpenMode::CreateNew).expect("no faults");
    file.write_sync_at(&run, 512).expect("no faults");
    storage.sync_dir(Path::new("")).expect("no faults");
    let sealed =
        SealedRun { segment, path, offset: 512, len: run.len() as u64, first: BatchNo(first), last: BatchNo(last) };
    index.sealed(sealed.clone()).expect("no faults");
    sealed
}

/// Goal: look-ups equal a naive search at every moment, in memory, in footers, in merged runs, with hot slots whose versions
/// fill many blocks and slot maps, above any horizon, and after opening again.
#[test]
fn lookups_equal_a_naive_search() {
    for seed in 0..6 {
        let mut world = World::new(seed);
        let storage = world.storage();
        let mut rng = world.rng().fork();
        let mut index = Index::open(storage.clone(), PathBuf::from("g/index"), &[]).expect("no faults");
        let (mut all, mut sealed, mut horizon, mut first) = (Vec::new(), Vec::new(), 0, 1);
        for batch in 1..=150u64 {
            let entries: Vec<_> =
                (0..u32::try_from(rng.below(60)).expect("few")).map(|seq| entry(&mut rng, batch, seq)).collect();
            index.add_batch(&entries);
            all.extend(entries);
            if rng.chance(1, 6) {
                let segment = u32::try_from(sealed.len()).expect("few") + 1;
                sealed.push(seal(&storage, &index, segment, first, batch));
                first = batch + 1;
            }
            if rng.chance(1, 10) {
                index.maintain(&AtomicBool::new(false)).expect("no faults");
            }
            if rng.chance(1, 40) && batch > 20 {
                horizon = horizon.max(batch - 20);
                index.set_moved_to(BatchNo(horizon)).expect("no faults");
            }
            if rng.chance(1, 30) {
                index = Index::open(storage.clone(), PathBuf::from("g/index"), &sealed).expect("no faults");
                let unsealed: Vec<_> = all.iter().filter(|entry| entry.batch.0 >= first).copied().collect();
                index.add_batch(&unsealed);
                assert_eq!(index.moved_to().0, horizon);
            }
            for _ in 0..10 {
                let at = UpTo {
                    batch: BatchNo(horizon + rng.below(batch - horizon + 2)),
                    seq: u32::try_from(rng.below(60)).expect("few"),
                };
                let at = if rng.chance(1, 2) { UpTo::end_of(at.batch) } else { at };
                let (volume, slot) = (VolumeIndex(1), rng.below(SLOTS));
                let found = index.lookup(volume, slot, at).expect("no damage");
                assert_eq!(found, naive(&all, volume, slot, at, horizon), "seed {seed}, slot {slot} at {at:?}");
            }
        }
        assert_eq!(index.verify().len(), 0);
        let mut slots = index.slots(VolumeIndex(1), 0, UpTo::end_of(BatchNo(150)), 100).expect("no damage");
        let by_one: Vec<u64> = std::iter::successors(Some(0), |&from| {
            index
                .slots(VolumeIndex(1), from, UpTo::end_of(BatchNo(150)), 1)
                .expect("no damage")
                .first()
                .map(|slot| slot + 1)
        })
        .skip(1)
        .map(|next| next - 1)
        .collect();
        assert_eq!(slots, by_one);
        slots.retain(|slot| *slot >= SLOTS);
        assert_eq!(slots, []);
    }
}

/// Goal: a cold sector beside a hot one does not cost its history. Method: count what a scan visits.
#[test]
fn slot_maps_bound_a_scan() {
    let storage = World::new(1).storage();
    let hot = |batch: u64, start: u8| IndexEntry {
        volume: VolumeIndex(1),
        slot: 5,
        batch: BatchNo(batch),
        seq: 0,
        start,
        count: 8,
        content: Content::Zero,
    };
    // Every piece once, then one of them 20,000 times.
    let mut entries: Vec<_> = (0..16).map(|piece| hot(1 + u64::from(piece), piece * 8)).collect();
    entries.extend((0..20_000).map(|number| hot(17 + number, 0)));
    let bytes = build_run(&entries, BatchNo(1), BatchNo(20_016)).expect("in memory");
    let file = storage.open(Path::new("run"), OpenMode::CreateNew).expect("no faults");
    file.write_at(&bytes, 0).expect("no faults");
    let run = Run::<SimStorage>::open(file, Path::new("run"), 0, Some(bytes.len() as u64)).expect("sound");
    let overhead = bytes.len() as f64 / (entries.len() * 48) as f64;
    assert!(overhead < 1.35, "maps take a quarter: {overhead}");
    for batch in [30, 100, 5000, 20_016] {
        let (mut visits, mut cover) = (0, Cover::of(ALL_SECTORS));
        let mut visit = |entry: &IndexEntry| {
            visits += 1;
            if cover.take(entry) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        run.scan_back(VolumeIndex(1), 5, UpTo::end_of(BatchNo(batch)), (0, u32::MAX), &mut visit).expect("no damage");
        assert_eq!(cover.entries.len(), 16);
        assert_eq!(cover.entries[0].batch.0, batch);
        assert!(visits <= builder::MAP_EVERY + 16, "{visits} visits at {batch}");
    }
}

#[test]
fn an_empty_segment_has_a_run() {
    let storage = World::new(2).storage();
    let index = Index::open(storage.clone(), PathBuf::from("g/index"), &[]).expect("no faults");
    let sealed = seal(&storage, &index, 1, 1, 9);
    assert_eq!(index.lookup(VolumeIndex(1), 0, UpTo::end_of(BatchNo(9))).expect("no damage"), []);
    assert_eq!(index.next_slot(VolumeIndex(1), 0, UpTo::end_of(BatchNo(9))).expect("no damage"), None);
    let index = Index::open(storage, PathBuf::from("g/index"), &[sealed]).expect("no faults");
    assert_eq!(index.stats().runs, 1);
    assert_eq!(index.segment_entries(1).expect("no damage"), []);
}

/// Goal: a damaged footer header stops neither opening nor reads of newer batches; a damaged merged run is replaced by the
/// segments' footers.
#[test]
fn damaged_headers_are_survived() {
    let mut world = World::new(3);
    let storage = world.storage();
    let mut rng = world.rng().fork();
    let index = Index::open(storage.clone(), PathBuf::from("g/index"), &[]).expect("no faults");
    let (mut all, mut sealed) = (Vec::new(), Vec::new());
    for batch in 1..=9u64 {
        let entries: Vec<_> = (0..50).map(|seq| entry(&mut rng, batch, seq)).collect();
        index.add_batch(&entries);
        all.extend(entries);
        sealed.push(seal(&storage, &index, u32::try_from(batch).expect("few"), batch, batch));
    }
    let last = UpTo::end_of(BatchNo(9));
    storage.corrupt(Path::new("1.seg"), 512 + 20, 1).expect("the file is there");
    let open = || Index::open(storage.clone(), PathBuf::from("g/index"), &sealed).expect("damage does not stop it");
    let damaged = open();
    assert_eq!(damaged.stats().damaged_runs, 1);
    assert_eq!(damaged.verify().len(), 1);
    assert_eq!(
        damaged.lookup(VolumeIndex(1), HOT, last).expect("newer runs cover it"),
        naive(&all, VolumeIndex(1), HOT, last, 0)
    );
    let error = damaged.lookup(VolumeIndex(1), HOT, UpTo::end_of(BatchNo(1))).expect_err("needs the first run");
    assert!(error.kind() == Kind::Damaged && error.context().contains("1.seg"), "{error}");
    storage.corrupt(Path::new("1.seg"), 512 + 20, 1).expect("the file is there");
    assert!(index.maintain(&AtomicBool::new(false)).expect("no faults"));
    assert_eq!(open().stats().runs, 2, "eight merged, one more");
    let merged = Path::new("g/index").join(merge::run_name(BatchNo(1), BatchNo(8)));
    storage.corrupt(&merged, 30, 4).expect("the file is there");
    let index = open();
    assert_eq!((index.stats().runs, index.stats().damaged_runs), (9, 0));
    for slot in 0..SLOTS {
        let found = index.lookup(VolumeIndex(1), slot, last).expect("footers serve");
        assert_eq!(found, naive(&all, VolumeIndex(1), slot, last, 0));
    }
}

/// Goal: a crash at any call of a merge leaves an index that opens and reads the same.
#[test]
fn merges_survive_crashes() {
    let mut world = World::new(4);
    let storage = world.storage();
    let mut rng = world.rng().fork();
    let index = Index::open(storage.clone(), PathBuf::from("g/index"), &[]).expect("no faults");
    let (mut all, mut sealed) = (Vec::new(), Vec::new());
    for batch in 1..=16u64 {
        let entries: Vec<_> = (0..40).map(|seq| entry(&mut rng, batch, seq)).collect();
        index.add_batch(&entries);
        all.extend(entries);
        sealed.push(seal(&storage, &index, u32::try_from(batch).expect("few"), batch, batch));
    }
    let mut at = 0;
    loop {
        let fork = storage.fork();
        let index = Index::open(fork.clone(), PathBuf::from("g/index"), &sealed).expect("no faults");
        fork.crash_at(Some(fork.op_count() + at));
        let done = index.maintain(&AtomicBool::new(false)).is_ok();
        let fork = fork.crash(&mut rng);
        let index = Index::open(fork, PathBuf::from("g/index"), &sealed).expect("opens after a crash");
        for slot in 0..SLOTS {
            for batch in [1, 7, 16] {
                let upto = UpTo::end_of(BatchNo(batch));
                let found = index.lookup(VolumeIndex(1), slot, upto).expect("no damage");
                assert_eq!(found, naive(&all, VolumeIndex(1), slot, upto, 0), "crash at call {at}");
            }
        }
        if done {
            break;
        }
        at += 1;
    }
    assert!(at > 30, "{at} calls");
}

#[test]
fn a_damaged_moved_file_is_refused() {
    let storage = World::new(5).storage();
    let index = Index::open(storage.clone(), PathBuf::from("g/index"), &[]).expect("no faults");
    index.set_moved_to(BatchNo(77)).expect("no faults");
    let open = || Index::open(storage.clone(), PathBuf::from("g/index"), &[]).map(|index| index.moved_to());
    assert_eq!(open().expect("no damage"), BatchNo(77));
    for byte in 0..MOVED_BYTES as u64 {
        storage.corrupt(Path::new("g/base/moved"), byte, 2).expect("the file is there");
        assert_eq!(open().expect_err("damaged").kind(), Kind::Damaged);
        storage.corrupt(Path::new("g/base/moved"), byte, 2).expect("the file is there");
    }
}
