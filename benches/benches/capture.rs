//! What capturing and shipping a 4 KiB write costs one thread: the ring, then a batch from raw entries to sealed bytes.
#![expect(clippy::print_stdout, reason = "prints figures")]

use std::ops::Deref;
use std::sync::Arc;

use farshore_benches::{Figures, time};
use farshore_proto::batch::{Annotations, BatchPlace, CutFlags};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::record::Kind;
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, KeyEpoch, Position, VaultId, VolumeIndex, WallTime,
};
use farshore_ring::{Consumer, Desc, Memory, Producer, Ring, RingConfig, RingIdentity};
use farshore_streamer::{
    Granularity, Level, RawBatch, RawEntry, RecordSet, SealOrder, SegmentPool, StreamFlags, Worker,
};

const RECORD_BYTES: usize = 4096;
/// Records of one batch: 16 MiB.
const RECORDS: usize = 4096;

fn main() {
    ring();
    batch();
}

fn show(name: &str, time: std::time::Duration) {
    let bytes = (RECORDS * RECORD_BYTES) as u64;
    println!("{}", Figures { name, time, records: RECORDS as u64, bytes });
}

fn ring() {
    let identity =
        RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 1, generation: 1 };
    let config = RingConfig { slab_bytes: 64 << 20, ..RingConfig::new(identity) };
    let ring = Ring::create_in_memory(&Memory::new(), &config).expect("room for 64 MiB");
    let producer = ring.producer();
    let mut consumer = ring.consumer().expect("the only consumer");
    show("ring: reserve, publish, consume, free", time(|| pass(&producer, &mut consumer, None)));
    let data = [0x5a; RECORD_BYTES];
    show("ring: the same, filling the cell", time(|| pass(&producer, &mut consumer, Some(&data))));
}

/// One batch through the ring, freed at its end as after an acknowledgement.
fn pass(producer: &Producer, consumer: &mut Consumer, fill: Option<&[u8; RECORD_BYTES]>) -> u64 {
    let len = u32::try_from(RECORD_BYTES).expect("4096");
    for record in 0..RECORDS as u64 {
        let mut cell = producer.reserve(RECORD_BYTES).expect("the ring holds four batches");
        if let Some(data) = fill {
            cell[..RECORD_BYTES].copy_from_slice(data);
        }
        let offset = record * u64::from(len);
        let desc = Desc { kind: Kind::Write as u8, offset, length: u64::from(len), len, ..Desc::default() };
        producer.publish(cell, &desc).expect("the ring is open");
    }
    let mut end = 0;
    while let Some(entry) = consumer.next() {
        end = entry.position + 1;
    }
    consumer.free_to(end);
    end
}

/// Cells of one slab, as in the ring.
struct Cell(Arc<Vec<u8>>, usize);

impl Deref for Cell {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[self.1..self.1 + RECORD_BYTES]
    }
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Blocks of which this many of 512 words are random and the others the same.
fn slab(random_words: usize) -> Arc<Vec<u8>> {
    let mut rng = Rng(1);
    let word = |at: usize| if at % 512 < random_words { rng.next() } else { 0x7878_7878_7878_7878 };
    Arc::new((0..RECORDS * RECORD_BYTES / 8).map(word).flat_map(u64::to_le_bytes).collect())
}

/// Writes of 4 KiB at random places of a 512 GiB volume.
fn raw_batch(slab: &Arc<Vec<u8>>) -> RawBatch<Cell> {
    let flags = StreamFlags { event_open: false, joined: [VolumeIndex(0)].into_iter().collect() };
    let mut rng = Rng(5);
    let entry = |record: usize| RawEntry {
        position: Position(record as u64),
        start: rng.next() % (1 << 27) * 8,
        sectors: 8,
        payload: Some(Cell(Arc::clone(slab), record * RECORD_BYTES)),
        volume: VolumeIndex(0),
        kind: Kind::Write,
    };
    RawBatch {
        first: Position(0),
        end: Position(RECORDS as u64 + 1),
        time: WallTime(1),
        app_consistent: false,
        bookmark: None,
        ends_at_cut: true,
        written_bytes: slab.len() as u64,
        payload_bytes: slab.len() as u64,
        before: flags,
        after: flags,
        entries: (0..RECORDS).map(entry).collect(),
    }
}

fn order(place: BatchPlace, set: &RecordSet, level: Level) -> SealOrder {
    SealOrder {
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
    }
}

fn batch() {
    let (host, group) = (HostId([1; 16]), GroupId([2; 16]));
    let host_key = HostKey::derive(&VaultKey::new([3; 32]), host, KeyEpoch(1));
    let mut worker = Worker::new(host_key, group, SegmentPool::new(64 << 20));
    let mut set = RecordSet::default();
    for (label, raw) in [("noise", raw_batch(&slab(512))), ("half noise", raw_batch(&slab(256)))] {
        let listed = time(|| worker.list(&raw, Granularity::Cut, &mut set).expect("sound cells"));
        show(&format!("batch of {label}: coalesce, hash"), listed);
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
        for level in [None, Some(1), Some(3)] {
            let order = order(place, &set, level);
            let sealed = time(|| worker.seal(&raw, &mut set, &order).expect("within the format's limits"));
            let level = level.map_or_else(|| "no compression".to_owned(), |level| format!("zstd {level}"));
            show(&format!("batch of {label}: seal, {level}"), sealed);
        }
        let whole = time(|| {
            worker.list(&raw, Granularity::Cut, &mut set).expect("sound cells");
            let order = order(place, &set, Some(1));
            worker.seal(&raw, &mut set, &order).expect("within the format's limits")
        });
        show(&format!("batch of {label}: all, zstd 1"), whole);
    }
}
