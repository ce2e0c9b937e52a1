//! Processor time of each stage for one batch, on one thread. Run: `cargo run --release -p farshore-streamer --example stages`.
#![expect(clippy::print_stdout, reason = "prints timings")]

use std::sync::Arc;
use std::time::Duration;

use farshore_proto::batch::{Annotations, BatchPlace, CutFlags};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::record::Kind;
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, KeyEpoch, Position, VaultId, VolumeIndex, WallTime,
};
use farshore_streamer::{
    Coalescer, Granularity, Hasher, RawBatch, RawEntry, RecordSet, SealOrder, SegmentPool, StreamFlags, Worker,
};

const ROUNDS: usize = 7;
/// Runs per reading: the scheduler's figures come in ticks of some milliseconds.
const REPEATS: u32 = 8;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

/// Cells lie in one slab, as in the ring.
struct Cell(Arc<Vec<u8>>, usize, usize);

impl std::ops::Deref for Cell {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

fn batch(bytes: &Arc<Vec<u8>>, record_bytes: usize, random: bool) -> RawBatch<Cell> {
    let flags = StreamFlags { event_open: false, joined: [VolumeIndex(0)].into_iter().collect() };
    let mut rng = Rng(5);
    let count = bytes.len() / record_bytes;
    let sectors = record_bytes as u64 / 512;
    let entries: Vec<RawEntry<Cell>> = (0..count)
        .map(|n| RawEntry {
            position: Position(n as u64),
            start: if random { rng.next() % (1 << 27) * sectors } else { n as u64 * sectors },
            sectors,
            payload: Some(Cell(Arc::clone(bytes), n * record_bytes, record_bytes)),
            volume: VolumeIndex(0),
            kind: Kind::Write,
        })
        .collect();
    RawBatch {
        first: Position(0),
        end: Position(count as u64 + 1),
        time: WallTime(1),
        app_consistent: false,
        bookmark: None,
        ends_at_cut: true,
        written_bytes: bytes.len() as u64,
        payload_bytes: bytes.len() as u64,
        before: flags,
        after: flags,
        entries,
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Time that this thread had a processor, so that the machine's other work counts only through its caches.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux with scheduler statistics");
    Duration::from_nanos(text.split(' ').next().and_then(|word| word.parse().ok()).expect("begins with nanoseconds"))
}

fn timed<T>(mut work: impl FnMut() -> T) -> Duration {
    work();
    let round = |_| {
        let start = processor_time();
        (0..REPEATS).for_each(|_| _ = std::hint::black_box(work()));
        (processor_time() - start) / REPEATS
    };
    median((0..ROUNDS).map(round).collect())
}

fn main() {
    let mut rng = Rng(1);
    let total = 16 << 20;
    let noise = Arc::new(rng.bytes(total));
    let half: Arc<Vec<u8>> = Arc::new(
        (0..total / 4096)
            .flat_map(|_| {
                let mut block = rng.bytes(2048);
                block.resize(4096, b'x');
                block
            })
            .collect(),
    );
    for (label, data, record, random) in [
        ("4 KiB random places, noise", &noise, 4096, true),
        ("4 KiB random places, 50 % compressible", &half, 4096, true),
        ("128 KiB in sequence, noise", &noise, 128 << 10, false),
        ("128 KiB in sequence, 50 % compressible", &half, 128 << 10, false),
    ] {
        run(label, &batch(data, record, random));
    }
}

fn run(label: &str, raw: &RawBatch<Cell>) {
    let host = HostId([1; 16]);
    let group = GroupId([2; 16]);
    let host_key = HostKey::derive(&VaultKey::new([3; 32]), host, KeyEpoch(1));
    let count = raw.entries.len();
    let show = |stage: &str, time: Duration| {
        let rate = raw.payload_bytes as f64 / time.as_secs_f64() / 1e6;
        println!("  {stage:<28} {:>8.0} ns/record {rate:>9.0} MB/s", time.as_nanos() as f64 / count as f64);
    };
    println!("{label}: {count} records, {} MiB", raw.payload_bytes >> 20);
    let mut copy = Vec::with_capacity(1 << 20);
    show(
        "one plain copy, to compare",
        timed(|| {
            for entry in &raw.entries {
                if copy.len() >= 1 << 20 {
                    copy.clear();
                }
                copy.extend_from_slice(entry.payload.as_deref().unwrap_or_default());
            }
        }),
    );
    let mut set = RecordSet::default();
    let mut coalescer = Coalescer::default();
    show("coalesce", timed(|| coalescer.coalesce(raw, Granularity::Cut, &mut set)));
    let mut hasher = Hasher::new(host_key.dedup_key(group));
    show("zero look and hash", timed(|| hasher.hash(raw, &mut set)));
    let place = BatchPlace {
        vault: VaultId([0; 16]),
        group,
        host,
        generation: Generation(1),
        incarnation: Incarnation(1),
        number: BatchNo(1),
        first: raw.first,
        end: raw.end,
        time: raw.time,
    };
    show("chain", timed(|| place.chain(&ChainHash::default(), &set.records)));
    let mut worker = Worker::new(host_key, group, SegmentPool::new(64 << 20));
    for level in [None, Some(-5), Some(-1), Some(1), Some(3)] {
        let order = SealOrder {
            place,
            cut: CutFlags::default(),
            previous: ChainHash::default(),
            chain: place.chain(&ChainHash::default(), &set.records),
            fresh: [1; 32],
            annotations: Annotations::default(),
            lease: None,
            session: 1,
            level,
            log: None,
        };
        let sealed = worker.seal(raw, &mut set, &order).expect("a batch");
        let name = level.map_or("pack, seal (none)".to_owned(), |level| format!("pack, zstd {level}, seal"));
        show(
            &format!("{name} ×{:.2}", raw.payload_bytes as f64 / sealed.len as f64),
            timed(|| worker.seal(raw, &mut set, &order)),
        );
    }
}
