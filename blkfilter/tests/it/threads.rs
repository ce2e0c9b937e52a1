//! The same code on real threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farshore_blkfilter::range_lock::RangeLock;
use farshore_uring::sim::{SimIo, SimRng};
use farshore_uring::{AlignedBuf, Io};

/// Goal: with threads contending for few places, no two hold overlapping ranges, nobody is forgotten, and nothing is left behind.
/// Method: each holder adds its mark to every cell of its range and takes it away again; a second mark is an overlap.
#[test]
fn range_lock_excludes_and_forgets_nobody() {
    const CELLS: u64 = 40;
    const STEP: u64 = 128 << 10;
    let lock = Arc::new(RangeLock::new());
    let cells: Arc<Vec<AtomicU64>> = Arc::new((0..CELLS).map(|_| AtomicU64::new(0)).collect());
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| {
            let (lock, cells) = (Arc::clone(&lock), Arc::clone(&cells));
            std::thread::spawn(move || {
                let io = SimIo::<AlignedBuf>::new(SimRng::new(thread));
                let owner = lock.owner(4, io.waker()).expect("few owners");
                let mut rng = SimRng::new(thread);
                let mut done = 0;
                let mut under_way: Vec<Option<(u64, u64)>> = vec![None; 4];
                let mut ready = Vec::new();
                while done < 4000 || under_way.iter().any(Option::is_some) {
                    for op in 0..4_u16 {
                        if under_way[usize::from(op)].is_none() && done < 4000 {
                            let first = rng.below(CELLS);
                            let count = 1 + rng.below((CELLS - first).min(6));
                            under_way[usize::from(op)] = Some((first, count));
                            if owner.lock(op, first * STEP..(first + count) * STEP) {
                                ready.push(op);
                            }
                        }
                    }
                    ready.extend(std::iter::from_fn(|| owner.poll_granted()));
                    if ready.is_empty() {
                        std::thread::yield_now();
                    }
                    for op in ready.drain(..) {
                        let (first, count) = under_way[usize::from(op)].take().expect("asked for");
                        let range = usize::try_from(first).expect("few")..usize::try_from(first + count).expect("few");
                        for cell in &cells[range.clone()] {
                            assert_eq!(cell.fetch_add(1, Ordering::Relaxed), 0, "somebody else holds it");
                        }
                        cells[range].iter().for_each(|cell| {
                            cell.fetch_sub(1, Ordering::Relaxed);
                        });
                        owner.unlock(op, first * STEP..(first + count) * STEP);
                        done += 1;
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no overlap");
    }
    assert_eq!(lock.entries(), 0);
}

/// Goal: on real rings, threads and files, overlapping requests of several queues leave source and replica the same, nobody sleeps through
/// its turn, and a queue whose request waits for another's is woken.
/// Method: the main thread replays the stream while the queues run; the ring is drained all the time and large enough.
#[test]
fn real_queues_on_a_real_file() {
    use farshore_blkfilter::{CaptureConfig, CaptureGroup, Content, FilterVolume, VolumeSpec};
    use farshore_proto::record::Kind;
    use farshore_proto::{Name, VolumeIndex};
    use farshore_ring::{Memory, Ring, RingConfig};
    use farshore_uring::{BackingOptions, BlockDevice, BlockQueue, FileDevice, Purpose, Reactor, Request, Wait};

    const SIZE: u64 = 4 << 20;
    const REQUESTS: u32 = 3000;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("volume");
    std::fs::File::create(&path).and_then(|file| file.set_len(SIZE)).expect("a file");
    let config = RingConfig { slab_bytes: 64 << 20, ..RingConfig::new(crate::rig::identity()) };
    let ring = Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("a ring"));
    let mut consumer = ring.consumer().expect("the only one");
    let group = CaptureGroup::new(Arc::clone(&ring), CaptureConfig::default());
    let wakes = Arc::new(AtomicU64::new(0));
    let main = std::thread::current();
    let count = Arc::clone(&wakes);
    group.set_consumer_waker(move || {
        count.fetch_add(1, Ordering::Relaxed);
        main.unpark();
    });
    let spec = VolumeSpec {
        index: VolumeIndex(0),
        name: Name::new("v").expect("a good name"),
        id: [0; 16],
        content: Content::AsMarked,
        joined: true,
    };
    let file = FileDevice::open(&path, BackingOptions::default()).expect("a file of ours");
    let filter: Arc<FilterVolume> = group.add_volume(spec, file).expect("room");
    let threads: Vec<_> = (0..3_u64)
        .map(|thread| {
            let filter = Arc::clone(&filter);
            std::thread::spawn(move || {
                let mut reactor = Reactor::new(64).expect("io_uring is there");
                let mut queue = filter.open_queue(&mut reactor).expect("few owners");
                let block = u64::from(filter.geometry().logical_block);
                let mut rng = SimRng::new(thread);
                let (mut asked, mut done) = (0, 0);
                while done < REQUESTS {
                    while asked < REQUESTS && asked - done < 16 {
                        let offset = rng.below(SIZE / 8 / block) * block;
                        let len = (1 + rng.below(8)) * block;
                        let request = if rng.chance(1, 10) {
                            Request::Discard { offset, len }
                        } else {
                            let len = u32::try_from(len).expect("short");
                            let mut buf = queue.buffer(Purpose::Write, len);
                            rng.fill(&mut buf[..len as usize]);
                            Request::Write { offset, len, buf, fua: false }
                        };
                        queue.submit(&mut reactor, asked, request);
                        asked += 1;
                    }
                    let ended =
                        std::iter::from_fn(|| queue.poll_done()).map(|d| d.result.expect("a good disk")).count();
                    done += u32::try_from(ended).expect("few");
                    if ended > 0 {
                        continue;
                    }
                    reactor.run_once(Wait::Until(None)).expect("io_uring works");
                    if reactor.take_wakeup() {
                        queue.handle_wake(&mut reactor);
                    }
                    while let Some(completion) = reactor.poll_completion() {
                        queue.handle_completion(&mut reactor, completion);
                    }
                }
                while queue.poll_done().is_some() {}
                queue.close(&mut reactor);
            })
        })
        .collect();
    let mut replica = vec![0; usize::try_from(SIZE).expect("small")];
    let mut seen = 0;
    while seen < u64::from(REQUESTS) * 3 {
        let Some(entry) = consumer.next() else {
            consumer.free_to(consumer.position());
            if consumer.prepare_sleep() {
                std::thread::park();
                consumer.woke();
            }
            continue;
        };
        let range = usize::try_from(entry.desc.offset).expect("small")..;
        let range = &mut replica[range][..usize::try_from(entry.desc.length).expect("small")];
        match entry.payload {
            Some(cell) => range.copy_from_slice(&cell),
            None => range.fill(0),
        }
        assert!([Kind::Write as u8, Kind::Discard as u8].contains(&entry.desc.kind), "nothing but requests");
        seen += 1;
    }
    threads.into_iter().for_each(|thread| thread.join().expect("every request ends well"));
    let source = std::fs::read(&path).expect("readable");
    assert!(source == replica, "source and replica are the same");
    let counters = group.counters();
    assert_eq!((counters.captured, counters.missed, counters.errors), (u64::from(REQUESTS) * 3, 0, 0));
    assert!(counters.lock_waits > 0, "the test makes requests wait for one another");
    assert!(wakes.load(Ordering::Relaxed) > 0, "the consumer slept and was woken");
}
