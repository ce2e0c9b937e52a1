use std::collections::BTreeMap;
use std::path::PathBuf;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{BatchNo, Generation, Incarnation, Name};
use farshore_uring::sim::{SimIo, SimRng, SimStorage, World, is_crash};
use farshore_uring::{BlockQueue, Purpose, Request};

use super::*;
use crate::base::Base;
use crate::group::{ChunkPlace, Content, FrameStore, IndexEntry};
use crate::index::Index;

const SIZE: u64 = 40 * SLOT_BYTES + 8192;
const VOLUME: VolumeIndex = VolumeIndex(1);

/// A point whose slot n is full of n + 1 where n is even; slot 4 cannot be read in its first half.
struct Still {
    index: Index<SimStorage>,
    base: Arc<Base<SimStorage>>,
}

impl FrameStore for Still {
    fn read_frame(&self, segment: u32, _frame_offset: u32) -> Result<Arc<[u8]>> {
        if segment == 999 {
            return Err(Error::new(Kind::Damaged, "frame is damaged"));
        }
        Ok(vec![u8::try_from(segment).expect("few slots"); 65536].into())
    }
}

impl History<SimStorage> for Still {
    fn index(&self) -> &Index<SimStorage> {
        &self.index
    }

    fn frames(&self) -> &dyn FrameStore {
        self
    }

    fn base(&self, _volume: VolumeIndex) -> Result<Arc<Base<SimStorage>>> {
        Ok(Arc::clone(&self.base))
    }
}

fn still(storage: &SimStorage, damaged: bool) -> Arc<Still> {
    let index = Index::open(storage.clone(), PathBuf::from("s/index"), &[]).expect("no faults");
    let decl = VolumeDecl { index: VOLUME, name: Name::new("v").expect("a name"), size: SIZE, block: 512 };
    let base = Base::open_or_create(storage.clone(), PathBuf::from("s/base"), &decl).expect("no faults");
    let entry = |slot: u64, start: u8, count: u8, segment: u32| IndexEntry {
        volume: VOLUME,
        slot,
        batch: BatchNo(1),
        seq: u32::try_from(slot).expect("few slots") * 2 + u32::from(start != 0),
        start,
        count,
        content: Content::Chunk(ChunkPlace { segment, frame_offset: 0, within: 0 }),
    };
    let entries: Vec<_> = (0..40u64)
        .step_by(2)
        .flat_map(|slot| {
            let value = u32::try_from(slot + 1).expect("few slots");
            let first = if slot == 4 && damaged { 999 } else { value };
            [entry(slot, 0, 64, first), entry(slot, 64, 64, value)]
        })
        .collect();
    index.add_batch(&entries);
    Arc::new(Still { index, base: Arc::new(base) })
}

fn below(offset: u64) -> u8 {
    let slot = offset / SLOT_BYTES;
    if slot.is_multiple_of(2) && slot < 40 { u8::try_from(slot + 1).expect("few slots") } else { 0 }
}

fn of(batch: u64, block: u32) -> ViewOf {
    let point = PointId { generation: Generation(1), incarnation: Incarnation(1), batch: BatchNo(batch) };
    ViewOf { point, volume: VOLUME, size: SIZE, block }
}

fn open(storage: &SimStorage, still: &Arc<Still>, of: ViewOf, options: ViewOptions) -> Result<View<SimStorage>> {
    let history: Arc<dyn History<SimStorage>> = Arc::clone(still) as _;
    View::open(history, storage, Path::new("s/views/a/v1"), of, options)
}

const SPACE: Space = Space { limit: None, reserve: RESERVE_BYTES };
const INLINE: ViewOptions = ViewOptions { read_only: false, workers: 0, cache_bytes: 4 << 16, space: SPACE };

/// Runs one request through a queue.
fn ask(
    queue: &mut ViewQueue<SimStorage>,
    io: &mut SimIo<AlignedBuf>,
    request: impl FnOnce(&mut ViewQueue<SimStorage>) -> Request<AlignedBuf>,
) -> Result<Option<AlignedBuf>, Errno> {
    let request = request(queue);
    queue.submit(io, 7, request);
    let done = queue.poll_done().expect("served on this thread");
    assert_eq!(done.tag, 7);
    done.result.map(|()| done.buf)
}

fn write(
    queue: &mut ViewQueue<SimStorage>,
    io: &mut SimIo<AlignedBuf>,
    offset: u64,
    bytes: &[u8],
    fua: bool,
) -> Result<(), Errno> {
    let len = u32::try_from(bytes.len()).expect("small");
    let request = |queue: &mut ViewQueue<SimStorage>| {
        let mut buf = queue.buffer(Purpose::Write, len);
        buf[..bytes.len()].copy_from_slice(bytes);
        Request::Write { offset, len, buf, fua }
    };
    ask(queue, io, request).map(drop)
}

fn read(
    queue: &mut ViewQueue<SimStorage>,
    io: &mut SimIo<AlignedBuf>,
    offset: u64,
    len: u32,
) -> Result<Vec<u8>, Errno> {
    let request =
        |queue: &mut ViewQueue<SimStorage>| Request::Read { offset, len, buf: queue.buffer(Purpose::Read, len) };
    ask(queue, io, request).map(|buf| buf.expect("a read gives its buffer back")[..len as usize].to_vec())
}

/// Goal: reads see writes, discards and zeroes at once; after a crash at any call, each block is as flushed or as written
/// since, and one never written is as in the point; the view goes on under its name.
#[test]
fn writes_survive_as_far_as_they_were_flushed() {
    for seed in 0..120u64 {
        let block = if seed % 2 == 0 { 512 } else { 4096 };
        let mut world = World::new(seed);
        let storage = world.storage();
        let still = still(&storage, false);
        let mut rng = world.rng().fork();
        let mut io = world.io(&[]);
        let mut versions: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut live: BTreeMap<u64, u8> = BTreeMap::new();
        storage.crash_at(Some(storage.op_count() + rng.below(500)));
        if let Ok(view) = open(&storage, &still, of(1, block), INLINE) {
            let mut queue = view.open_queue(&mut io).expect("no registration");
            for _ in 0..80 {
                if step(&mut queue, &mut io, &mut rng, block, &mut live, &mut versions).is_err() {
                    break;
                }
            }
        }
        let storage = storage.crash(&mut rng);
        let still = self::still(&storage, false);
        let view = open(&storage, &still, of(1, block), INLINE).expect("opens after a crash");
        let mut queue = view.open_queue(&mut io).expect("no registration");
        for at in (0..SIZE).step_by(block as usize) {
            let found = read(&mut queue, &mut io, at, block).expect("no damage");
            let flushed = live.get(&at).copied().unwrap_or_else(|| below(at));
            let newer = versions.get(&at).cloned().unwrap_or_default();
            for sector in found.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]));
                let known = sector[0] == flushed || newer.contains(&sector[0]);
                assert!(known, "seed {seed}, block at {at}: {} is not {flushed} nor one of {newer:?}", sector[0]);
            }
        }
    }
}

/// One request. `live`: by block as of the last flush; `versions`: what was written to it since.
fn step(
    queue: &mut ViewQueue<SimStorage>,
    io: &mut SimIo<AlignedBuf>,
    rng: &mut SimRng,
    block: u32,
    live: &mut BTreeMap<u64, u8>,
    versions: &mut BTreeMap<u64, Vec<u8>>,
) -> Result<(), Errno> {
    let blocks = SIZE / u64::from(block);
    let first = rng.below(blocks);
    let count = 1 + rng.below((blocks - first).min(20));
    let (offset, len) = (first * u64::from(block), count * u64::from(block));
    let mut note = |value: u8| {
        (0..count).for_each(|at| versions.entry(offset + at * u64::from(block)).or_default().push(value));
    };
    let flushed = |live: &mut BTreeMap<u64, u8>, versions: &mut BTreeMap<u64, Vec<u8>>| {
        for (at, values) in std::mem::take(versions) {
            live.insert(at, *values.last().expect("noted"));
        }
    };
    match rng.below(10) {
        0..=3 => {
            let (value, fua) = (100 + u8::try_from(rng.below(100)).expect("small"), rng.chance(1, 8));
            note(value);
            write(queue, io, offset, &vec![value; usize::try_from(len).expect("small")], fua)?;
            if fua {
                flushed(live, versions);
            }
        }
        4 => {
            note(0);
            ask(queue, io, |_| Request::Discard { offset, len })?;
        }
        5 => {
            note(0);
            ask(queue, io, |_| Request::WriteZeroes { offset, len, fua: false, no_hole: false })?;
        }
        6 => {
            ask(queue, io, |_| Request::Flush)?;
            flushed(live, versions);
        }
        _ => {
            let found = read(queue, io, offset, u32::try_from(len).expect("small"))?;
            for (at, bytes) in (offset..).step_by(block as usize).zip(found.chunks(block as usize)) {
                let newest = versions.get(&at).and_then(|values| values.last()).or_else(|| live.get(&at));
                let expected = newest.copied().unwrap_or_else(|| below(at));
                assert!(bytes.iter().all(|byte| *byte == expected), "block at {at}: {} is not {expected}", bytes[0]);
            }
        }
    }
    Ok(())
}

#[test]
fn damage_elsewhere_in_a_slot_does_not_matter() {
    let mut world = World::new(1);
    let storage = world.storage();
    let still = still(&storage, true);
    let view = open(&storage, &still, of(1, 512), INLINE).expect("no faults");
    let mut io = world.io(&[]);
    let mut queue = view.open_queue(&mut io).expect("no registration");
    let slot = 4 * SLOT_BYTES;
    assert_eq!(read(&mut queue, &mut io, slot, 512).expect_err("damaged half"), Errno(5));
    // Sequential reads ask for the whole slot, and fall back.
    for at in (slot + 32768..slot + SLOT_BYTES).step_by(4096) {
        assert_eq!(read(&mut queue, &mut io, at, 4096).expect("the sound half"), [5; 4096]);
    }
    let mut out = [0; 512];
    let error = view.read(slot, &mut out).expect_err("damaged half");
    assert!(error.context().contains(&format!("volume 1 bytes {slot}..{}", slot + 32768)), "{error}");
    // Written over, it can be read.
    write(&mut queue, &mut io, slot, &[9; 32768], false).expect("no faults");
    assert_eq!(read(&mut queue, &mut io, slot, 65536).expect("covered")[..32768], [9; 32768]);
}

#[test]
fn a_name_belongs_to_one_point() {
    let mut world = World::new(2);
    let storage = world.storage();
    let still = still(&storage, false);
    let view = open(&storage, &still, of(1, 512), INLINE).expect("no faults");
    let mut io = world.io(&[]);
    let mut queue = view.open_queue(&mut io).expect("no registration");
    write(&mut queue, &mut io, 0, &[1; 512], true).expect("no faults");
    drop((queue, view));
    for other in [of(2, 512), of(1, 4096)] {
        let error = open(&storage, &still, other, INLINE).err().expect("another point");
        assert_eq!(error.kind(), Kind::Refused);
    }
    let view = open(&storage, &still, of(1, 512), INLINE).expect("as it was left");
    let mut out = [0; 512];
    view.read(0, &mut out).expect("no faults");
    assert_eq!(out, [1; 512]);
    Scratch::remove(&storage, Path::new("s/views/a/v1")).expect("no faults");
    drop(view);
    let view = open(&storage, &still, of(2, 4096), INLINE).expect("the name is free");
    view.read(0, &mut out).expect("no faults");
    assert_eq!(out, [1; 512].map(|_: u8| below(0)));
}

#[test]
fn read_only_views_refuse_writes() {
    let mut world = World::new(3);
    let storage = world.storage();
    let still = still(&storage, false);
    let view = open(&storage, &still, of(1, 512), ViewOptions { read_only: true, ..INLINE }).expect("no faults");
    assert!(view.geometry().read_only && !view.geometry().discard);
    let mut io = world.io(&[]);
    let mut queue = view.open_queue(&mut io).expect("no registration");
    assert_eq!(write(&mut queue, &mut io, 0, &[1; 512], false), Err(Errno(30)));
    assert_eq!(ask(&mut queue, &mut io, |_| Request::Discard { offset: 0, len: 512 }).err(), Some(Errno(30)));
    ask(&mut queue, &mut io, |_| Request::Flush).expect("nothing to do");
    assert!(!storage.exists(Path::new("s/views")).expect("no faults"));
}

#[test]
fn extents_follow_the_point_and_the_scratch() {
    let mut world = World::new(4);
    let storage = world.storage();
    let still = still(&storage, false);
    let view = open(&storage, &still, of(1, 4096), INLINE).expect("no faults");
    let mut io = world.io(&[]);
    let mut queue = view.open_queue(&mut io).expect("no registration");
    write(&mut queue, &mut io, SLOT_BYTES + 8192, &[1; 4096], false).expect("no faults");
    ask(&mut queue, &mut io, |_| Request::Discard { offset: 0, len: 16384 }).expect("no faults");
    let extents = view.extents(0, 3 * SLOT_BYTES).expect("no damage");
    let found: Vec<(u64, bool)> = extents.iter().map(|extent| (extent.len, extent.zero)).collect();
    let data = (SLOT_BYTES - 16384, false);
    assert_eq!(
        found,
        [(16384, true), data, (8192, true), (4096, false), (SLOT_BYTES - 12288, true), (SLOT_BYTES, false)]
    );
    // The map's sectors are 15.75 MiB of blocks: a write far behind untouched ones is found.
    let far = ViewOf { size: 1 << 40, ..of(1, 4096) };
    let scratch_of = ScratchOf { point: far.point, volume: VOLUME, size: far.size, block: 4096 };
    let scratch = Scratch::open_or_create(&storage, Path::new("far"), scratch_of, SPACE).expect("no faults");
    let piece = |offset, len, present| crate::scratch::Piece { offset, len, present };
    assert_eq!(scratch.pieces(0, 1 << 40).expect("no damage"), [piece(0, 1 << 40, false)]);
    scratch.write(1 << 39, &[1; 4096]).expect("no faults");
    let split =
        [piece(0, 1 << 39, false), piece(1 << 39, 4096, true), piece((1 << 39) + 4096, (1 << 39) - 4096, false)];
    assert_eq!(scratch.pieces(0, 1 << 40).expect("no damage"), split);
    scratch.flush().expect("no faults");
    let scratch = Scratch::open_or_create(&storage, Path::new("far"), scratch_of, SPACE).expect("no faults");
    assert_eq!(scratch.pieces(0, 1 << 40).expect("no damage"), split);
    let all: u64 = view.extents(0, SIZE).expect("no damage").iter().map(|extent| extent.len).sum();
    assert_eq!(all, SIZE);
}

/// Goal: many threads at one view see each other's finished writes and the point's bytes, through the workers.
#[test]
fn threads_share_a_view() {
    let storage = World::new(5).storage();
    let still = still(&storage, false);
    let options = ViewOptions { workers: 3, cache_bytes: 1, ..ViewOptions::default() };
    let view = open(&storage, &still, of(1, 512), options).expect("no faults");
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let view = view.clone();
            scope.spawn(move || {
                let mut rng = SimRng::new(thread);
                let mut io = SimIo::<AlignedBuf>::new(SimRng::new(thread));
                let mut queue = view.open_queue(&mut io).expect("no registration");
                let mut answers = 0;
                for tag in 0..200u32 {
                    let slot = thread + 4 * rng.below(10);
                    let mut buf = queue.buffer(Purpose::Write, 4096);
                    buf[..4096].fill(200 + u8::try_from(thread).expect("small"));
                    let request = match tag % 2 {
                        0 => Request::Write { offset: slot * SLOT_BYTES, len: 4096, buf, fua: tag % 32 == 0 },
                        _ => Request::Read { offset: slot * SLOT_BYTES + 4096, len: 4096, buf },
                    };
                    queue.submit(&mut io, tag, request);
                    let done = loop {
                        if let Some(done) = queue.poll_done() {
                            break done;
                        }
                        std::thread::yield_now();
                    };
                    assert_eq!((done.tag, done.result), (tag, Ok(())));
                    answers += 1;
                    if let Some(buf) = done.buf {
                        assert!(buf[..4096].iter().all(|byte| *byte == below(slot * SLOT_BYTES)));
                    }
                    let mut out = [0; 512];
                    if tag % 2 == 0 {
                        view.read(slot * SLOT_BYTES, &mut out).expect("no damage");
                        assert_eq!(out, [200 + u8::try_from(thread).expect("small"); 512]);
                    }
                }
                assert_eq!(answers, 200);
            });
        }
    });
    view.flush().expect("no faults");
}

/// Goal: a failed sync is said, and nothing is taken as durable afterwards.
#[test]
fn a_failed_sync_stops_the_scratch() {
    let mut world = World::new(6);
    let storage = world.storage();
    let still = still(&storage, false);
    let view = open(&storage, &still, of(1, 512), INLINE).expect("no faults");
    let mut io = world.io(&[]);
    let mut queue = view.open_queue(&mut io).expect("no registration");
    write(&mut queue, &mut io, 512, &[1; 512], false).expect("no faults");
    storage.set_fault(|op, _| (op == farshore_uring::sim::StorageOp::Sync).then(|| io::Error::from_raw_os_error(5)));
    assert_eq!(ask(&mut queue, &mut io, |_| Request::Flush).err(), Some(Errno(5)));
    storage.clear_fault();
    assert_eq!(ask(&mut queue, &mut io, |_| Request::Flush).err(), Some(Errno(5)));
    assert_eq!(write(&mut queue, &mut io, 0, &[1; 512], false), Err(Errno(5)));
    assert_eq!(read(&mut queue, &mut io, 512, 512).expect("reads go on"), [1; 512]);
    assert!(!is_crash(&io::Error::from_raw_os_error(5)));
}

/// Goal: a view that is full, by its limit or because the disk's reserve would be touched, gets `ENOSPC` and keeps what it has;
/// the reserve stays free for ingest; with room again it goes on.
#[test]
fn a_full_view_leaves_the_reserve_alone() {
    const ENOSPC: Errno = Errno(28);
    let mut world = World::new(7);
    let storage = world.storage();
    let still = still(&storage, false);
    let mut io = world.io(&[]);
    let limited = Space { limit: Some(3 * SLOT_BYTES), reserve: 0 };
    let view = open(&storage, &still, of(1, 4096), ViewOptions { space: limited, ..INLINE }).expect("no faults");
    let mut queue = view.open_queue(&mut io).expect("no registration");
    let slot = [0xaa; 65536];
    for at in 0..3 {
        write(&mut queue, &mut io, at * SLOT_BYTES, &slot, false).expect("below the limit");
    }
    assert_eq!(write(&mut queue, &mut io, 3 * SLOT_BYTES, &slot[..4096], false), Err(ENOSPC));
    ask(&mut queue, &mut io, |_| Request::Discard { offset: 0, len: SLOT_BYTES }).expect("gives room back");
    write(&mut queue, &mut io, 3 * SLOT_BYTES, &slot[..4096], true).expect("room again");
    drop((queue, view));

    let reserve = 1 << 20;
    storage.set_capacity(1 << 40);
    let used = (1 << 40) - storage.free_bytes().expect("no faults");
    storage.set_capacity(used + reserve + 5 * SLOT_BYTES);
    let space = Space { limit: None, reserve };
    let view = open(&storage, &still, of(1, 4096), ViewOptions { space, ..INLINE }).expect("no faults");
    let mut queue = view.open_queue(&mut io).expect("no registration");
    let taken = (4..40).take_while(|at| write(&mut queue, &mut io, at * SLOT_BYTES, &slot, false).is_ok()).count();
    assert!((4..=5).contains(&taken), "{taken}");
    ask(&mut queue, &mut io, |_| Request::Flush).expect("what was taken can be made durable");
    let free = storage.free_bytes().expect("no faults");
    assert!(free >= reserve - 8192, "the map takes a little: {free}");
    assert_eq!(read(&mut queue, &mut io, 4 * SLOT_BYTES, 65536).expect("there"), slot);
    storage.set_capacity(used + reserve + 50 * SLOT_BYTES);
    write(&mut queue, &mut io, 30 * SLOT_BYTES, &slot, true).expect("room again");
}
