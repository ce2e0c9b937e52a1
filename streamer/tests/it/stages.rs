//! The pure stages: what they send is what was written.

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore_proto::batch::{Annotations, BatchPlace, CutFlags};
use farshore_proto::message::Lease;
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::{
    BatchNo, ChainHash, ChunkId, Generation, GroupId, HostId, Incarnation, Position, SLOT_SECTORS, VolumeIndex,
    WallTime,
};
use farshore_streamer::{
    Drain, Granularity, LeaseSet, RawBatch, RecordSet, RingSource, SealOrder, SealedBatch, SegmentPool, StreamFlags,
    Worker,
};
use proptest::prelude::*;

use crate::common::{Cell, Image, MemoryRing, Opened, Rng, Said, VAULT, host_key, name, open};

fn group() -> GroupId {
    GroupId::derive(VAULT, &name("group"))
}

fn worker() -> Worker {
    Worker::new(host_key(), group(), SegmentPool::new(8 << 20))
}

fn drained(said: &[Said], flags: StreamFlags) -> Vec<RawBatch<Cell>> {
    let mut ring = MemoryRing::new(1);
    said.iter().for_each(|said| _ = ring.publish(said.clone()));
    let mut drain = Drain::new(ring.freed(), flags);
    drain.pull(&mut ring, usize::MAX).expect("a sound ring");
    std::iter::from_fn(|| drain.pop()).collect()
}

fn place(raw: &RawBatch<Cell>, number: u64) -> BatchPlace {
    BatchPlace {
        vault: VAULT,
        group: group(),
        host: HostId::derive(VAULT, &name("host")),
        generation: Generation(1),
        incarnation: Incarnation(1),
        number: BatchNo(number),
        first: raw.first,
        end: raw.end,
        time: raw.time,
    }
}

struct Formed {
    set: RecordSet,
    sealed: SealedBatch,
    opened: Opened,
}

fn form(
    worker: &mut Worker,
    raw: &RawBatch<Cell>,
    granularity: Granularity,
    level: Option<i32>,
    lease: Option<Arc<LeaseSet>>,
) -> Formed {
    let mut set = RecordSet::default();
    worker.list(raw, granularity, &mut set).expect("a list");
    let place = place(raw, 1);
    let previous = ChainHash([4; 32]);
    let order = SealOrder {
        place,
        cut: CutFlags { recoverable: raw.after.recoverable() && raw.ends_at_cut, app_consistent: raw.app_consistent },
        previous,
        chain: place.chain(&previous, &set.records),
        fresh: [9; 32],
        annotations: Annotations { bookmark: raw.bookmark.clone(), volumes: Vec::new() },
        lease,
        session: 1,
        level,
        log: None,
    };
    let sealed = worker.seal(raw, &mut set, &order).expect("a batch");
    let bytes: Vec<u8> = sealed.pieces.concat();
    assert_eq!(bytes.len() as u64, sealed.len);
    let opened = open(&bytes);
    assert_eq!(opened.list.records, set.records);
    Formed { set, sealed, opened }
}

/// Random entries: writes whose ranges overlap, cross slots and repeat content, zeroes, discards, verify records, events.
fn entries(seed: u64, count: u64) -> Vec<Said> {
    let mut rng = Rng(seed);
    let mut said = Vec::new();
    for _ in 0..count {
        let volume = u16::try_from(rng.below(3)).expect("small");
        let sector = rng.below(6 * u64::from(SLOT_SECTORS));
        let sectors = match rng.below(4) {
            0 => 1,
            1 => 8,
            2 => 1 + rng.below(40),
            _ => 1 + rng.below(300),
        };
        said.push(match rng.below(20) {
            0..=9 => Said::data(Kind::Write, volume, sector, rng.bytes(usize::try_from(sectors * 512).expect("small"))),
            10 => Said::data(
                Kind::SyncData,
                volume,
                sector,
                vec![rng.next().to_le_bytes()[0]; usize::try_from(sectors * 512).expect("small")],
            ),
            11 => Said::data(Kind::Write, volume, sector, vec![0; usize::try_from(sectors * 512).expect("small")]),
            // One of few contents, so that chunks repeat.
            12 => Said::data(Kind::Write, volume, sector / 8 * 8, Rng(rng.below(3)).bytes(4096)),
            13 => Said::range(Kind::WriteZeroes, volume, sector, sectors),
            14 => Said::range(Kind::Discard, volume, sector, sectors * 10),
            15 => Said::range(Kind::SyncZero, volume, sector, sectors),
            16 => {
                let slot = sector / u64::from(SLOT_SECTORS) * u64::from(SLOT_SECTORS);
                Said {
                    payload: Some(Cell(vec![1; 32].into())),
                    ..Said::range(Kind::Probe, volume, slot, u64::from(SLOT_SECTORS))
                }
            }
            17 => Said::range(Kind::ProbeZero, volume, sector, sectors * 5),
            18 => Said::new(if rng.chance(50) { Kind::EventBegin } else { Kind::EventEnd }),
            _ => Said {
                volume: VolumeIndex(volume),
                ..Said::new(if rng.chance(70) { Kind::VolumeJoined } else { Kind::VolumeLeft })
            },
        });
        if rng.chance(3) {
            said.push(Said::new(Kind::Noop));
        }
    }
    said.push(Said::cut(seed));
    said
}

/// Goal: the image after applying a formed batch is the image after the raw writes, and every verify record sees the content
/// that was there at its ticket.
/// Method: random entries, both granularities, several levels, against byte images.
fn check(seed: u64, count: u64) {
    let said = entries(seed, count);
    let mut rng = Rng(seed ^ 1);
    let level = [None, Some(-5), Some(1), Some(3)][usize::try_from(rng.below(4)).expect("small")];
    let mut expected = Image::default();
    let mut before = Image::default();
    for volume in 0..3 {
        before.write(volume, 0, &rng.bytes(64 * 1024 * 4));
    }
    expected.clone_from(&before);
    let mut probes = Vec::new();
    for (position, said) in (0u64..).zip(&said) {
        expected.apply(said);
        if matches!(said.kind, Kind::Probe | Kind::ProbeZero) {
            probes.push((position, expected.read(said.volume.0, said.offset, said.length)));
        }
    }
    let mut worker = worker();
    for granularity in [Granularity::Cut, Granularity::Write] {
        for raw in drained(&said, StreamFlags::default()) {
            let formed = form(&mut worker, &raw, granularity, level, None);
            let mut image = before.clone();
            let mut seen = Vec::new();
            formed.opened.apply(&mut image, &mut BTreeMap::new(), |record: &Record, image: &Image| {
                seen.push((
                    record.position().0,
                    image.read(record.volume().0, record.start_byte(), record.len_bytes()),
                ));
            });
            assert!(image.trimmed() == expected.trimmed(), "images differ");
            assert!(seen == probes, "a verify record sees other content than was there");
            if granularity == Granularity::Cut {
                content_does_not_overlap(&formed.set.records);
            }
            frames_keep_classes_apart(&formed, raw.before);
        }
    }
}

fn content_does_not_overlap(records: &[Record]) {
    let mut written: BTreeMap<(u16, u64), ()> = BTreeMap::new();
    for record in records {
        if matches!(record.kind(), Kind::Probe | Kind::ProbeZero) {
            let slots = record.start() / 128..=(record.start() + u64::from(record.sectors()) - 1) / 128;
            written.retain(|(volume, sector), ()| *volume != record.volume().0 || !slots.contains(&(sector / 128)));
        }
        if record.kind().has_chunk() {
            for sector in record.start()..record.start() + u64::from(record.sectors()) {
                assert!(written.insert((record.volume().0, sector), ()).is_none(), "a sector is sent twice");
            }
        }
    }
}

fn frames_keep_classes_apart(formed: &Formed, mut flags: StreamFlags) {
    let mut classes: BTreeMap<u32, bool> = BTreeMap::new();
    for record in &formed.set.records {
        flags.apply(record.kind(), record.volume());
        if let Home::Here { frame, .. } = record.home() {
            let joined = flags.joined.contains(record.volume());
            assert_eq!(*classes.entry(frame).or_insert(joined), joined, "frame {frame} mixes classes");
        }
    }
    assert_eq!(classes.len() + 1, formed.opened.frames.len(), "no frame is empty");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_sent_is_what_was_written(seed: u64, count in 0u64..120) {
        check(seed, count);
    }
}

#[test]
fn forming_again_gives_the_same_list_and_other_bytes_only_by_choice() {
    let said = entries(77, 200);
    let form_once = |level| {
        let raw = drained(&said, StreamFlags::default()).remove(0);
        let formed = form(&mut worker(), &raw, Granularity::Cut, level, None);
        (
            place(&raw, 1).chain(&ChainHash([4; 32]), &formed.set.records),
            formed.set.records,
            formed.sealed.pieces.concat(),
        )
    };
    let (chain, records, bytes) = form_once(Some(-5));
    assert_eq!(form_once(Some(-5)), (chain, records.clone(), bytes));
    // A used worker, another level and a lease change neither list nor chain.
    let raw = drained(&said, StreamFlags::default()).remove(0);
    let mut used = worker();
    form(&mut used, &drained(&entries(5, 300), StreamFlags::default())[0], Granularity::Cut, Some(3), None);
    let ids: Vec<ChunkId> = records.iter().map(Record::id).filter(|id| id.0 != [0; 32]).take(20).collect();
    let lease = Arc::new(LeaseSet::new(Lease { through: BatchNo(1), ids }));
    let formed = form_with_references(&mut used, &raw, lease, &records);
    assert_eq!(place(&raw, 1).chain(&ChainHash([4; 32]), &formed), chain);
}

fn form_with_references(
    worker: &mut Worker,
    raw: &RawBatch<Cell>,
    lease: Arc<LeaseSet>,
    plain: &[Record],
) -> Vec<Record> {
    let formed = form(worker, raw, Granularity::Cut, None, Some(lease));
    assert!(formed.sealed.has_references);
    assert!(formed.set.records.iter().any(|record| record.home() == Home::Reference));
    assert!(formed.set.records.iter().zip(plain).all(|(a, b)| a.chained() == b.chained()));
    let mut held = BTreeMap::new();
    for entry in &raw.entries {
        let Some(payload) = entry.payload.as_deref().filter(|_| entry.kind.has_chunk()) else { continue };
        for record in plain.iter().filter(|record| record.position() == entry.position && record.kind().has_chunk()) {
            let at = usize::try_from((record.start() - entry.start) * 512).expect("small");
            held.insert(record.id().0, payload[at..at + usize::try_from(record.len_bytes()).expect("small")].to_vec());
        }
    }
    let (mut by_reference, mut image) = (Image::default(), Image::default());
    formed.opened.apply(&mut by_reference, &mut held, |_, _| {});
    raw.entries.iter().for_each(|entry| {
        image.apply(&Said {
            kind: entry.kind,
            volume: entry.volume,
            offset: entry.start * 512,
            length: entry.sectors * 512,
            time: WallTime(0),
            aux: 0,
            payload: entry.payload.clone(),
        });
    });
    assert!(by_reference.trimmed() == image.trimmed(), "images differ");
    formed.set.records
}

#[test]
fn repeats_are_sent_once_and_half_compressible_data_shrinks() {
    let mut rng = Rng(1);
    let block = rng.bytes(4096);
    let mut said: Vec<Said> = (0..100).map(|n| Said::data(Kind::Write, 0, n * 8, block.clone())).collect();
    said.push(Said::cut(1));
    let raw = drained(&said, StreamFlags::default()).remove(0);
    let formed = form(&mut worker(), &raw, Granularity::Cut, None, None);
    assert_eq!((formed.sealed.plain_bytes, formed.sealed.deduplicated_bytes), (4096, 99 * 4096));

    let half = |rng: &mut Rng| [rng.bytes(2048), vec![0; 2048]].concat();
    let mut said: Vec<Said> = (0..256).map(|n| Said::data(Kind::Write, 0, n * 8, half(&mut rng))).collect();
    said.push(Said::cut(1));
    let raw = drained(&said, StreamFlags::default()).remove(0);
    for level in [Some(-5), Some(3)] {
        let formed = form(&mut worker(), &raw, Granularity::Cut, level, None);
        assert!(formed.sealed.frame_bytes < 256 * 4096 * 6 / 10, "{}", formed.sealed.frame_bytes);
    }
}

#[test]
fn cuts_carry_time_name_and_flags_in_stream_order() {
    let joined = Said { volume: VolumeIndex(2), ..Said::new(Kind::VolumeJoined) };
    let named = Said { payload: Some(Cell((*b"before-upgrade").into())), aux: 2, ..Said::cut(30) };
    let said = [
        Said::cut(10),
        joined,
        Said::cut(20),
        named,
        Said::new(Kind::EventBegin),
        Said::cut(40),
        Said::new(Kind::EventEnd),
        Said::cut(50),
    ];
    let batches = drained(&said, StreamFlags::default());
    let facts: Vec<_> = batches
        .iter()
        .map(|raw| {
            (raw.first.0, raw.end.0, raw.time.0, raw.after.recoverable(), raw.app_consistent, raw.bookmark.clone())
        })
        .collect();
    assert_eq!(
        facts,
        [
            (0, 1, 10, false, false, None),
            (1, 3, 20, true, false, None),
            (3, 4, 30, true, true, Some(name("before-upgrade"))),
            (4, 6, 40, false, false, None),
            (6, 8, 50, true, false, None),
        ]
    );
}

#[test]
fn an_overlong_batch_goes_in_pieces_that_are_no_points() {
    let mut said: Vec<Said> = (0..200).map(|n| Said::data(Kind::Write, 0, n * 512, Rng(n).bytes(256 << 10))).collect();
    said.push(Said::cut(9));
    said.push(Said::cut(10));
    let flags = StreamFlags { event_open: false, joined: [VolumeIndex(0)].into_iter().collect() };
    let batches = drained(&said, flags);
    assert_eq!(batches.iter().map(|raw| raw.ends_at_cut).collect::<Vec<_>>(), [false, true, true]);
    assert_eq!(batches.iter().map(|raw| raw.time.0).collect::<Vec<_>>(), [9, 9, 10]);
    assert!(batches.windows(2).all(|pair| pair[0].end == pair[1].first));
    assert!(batches.iter().all(|raw| raw.payload_bytes <= 40 << 20));
    let formed = form(&mut worker(), &batches[0], Granularity::Cut, None, None);
    assert!(!formed.opened.header.cut().recoverable);
    // The same pieces again from a piece's border: what a restart after an acknowledged piece gives.
    let border = usize::try_from(batches[1].first.0).expect("small");
    let again = drained(&said[border..], flags);
    assert_eq!(again[0].entries.len(), batches[1].entries.len());
}

#[test]
fn wants_a_cut_at_eight_mebibytes() {
    let mut ring = MemoryRing::new(1);
    let mut drain = Drain::new(Position(0), StreamFlags::default());
    for n in 0..32 {
        assert!(!drain.wants_cut(), "at {n}");
        ring.publish(Said::data(Kind::Write, 0, n * 512, vec![1; 256 << 10]));
        drain.pull(&mut ring, 100).expect("sound");
    }
    assert!(drain.wants_cut());
    ring.publish(Said::cut(1));
    drain.pull(&mut ring, 100).expect("sound");
    assert!(!drain.wants_cut() && drain.ready() == 1);
    assert_eq!(drain.waiting_bytes(), 8 << 20);
}

#[test]
fn a_ring_that_lies_is_refused() {
    let odd = Said { length: 100, ..Said::new(Kind::Discard) };
    let short = Said { length: 1024, payload: Some(Cell(vec![0; 512].into())), ..Said::new(Kind::Write) };
    let bare = Said::range(Kind::Write, 0, 0, 8);
    for said in [odd, short, bare] {
        let mut ring = MemoryRing::new(1);
        ring.publish(said);
        assert!(Drain::new(Position(0), StreamFlags::default()).pull(&mut ring, 1).is_err());
    }
}
