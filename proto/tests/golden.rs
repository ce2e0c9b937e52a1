//! The bytes of every format as they were written once, in `tests/golden/`: today's code writes the same and reads them.
//!
//! A change of these files is a change of the format: it needs a new version, and a reader for the old one. To make them for a
//! new version, run with `FARSHORE_WRITE_GOLDEN=1`.

use std::path::PathBuf;

use farshore_proto::batch::{self, Annotations, BatchBuilder, BatchPlace, CutFlags, VolumeDecl};
use farshore_proto::frame::{self, Compression, Compressor, FRAME_PLAIN_MAX};
use farshore_proto::keys::{AnswerKey, HostKey, VaultKey};
use farshore_proto::message::{Answer, Answers, Hello, Lease, RefuseCode, SourceMessage, Tail, TargetMessage, Welcome};
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::{
    BatchNo, ChainHash, ChunkId, Generation, GroupId, HostId, Incarnation, KeyEpoch, LogMark, Name, Position, VaultId,
    VolumeIndex, WallTime,
};

const VAULT: VaultId = VaultId([0x11; 16]);
const NONCE: [u8; 32] = [0x22; 32];

fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

fn host() -> HostId {
    HostId::derive(VAULT, &name("web1"))
}

fn group() -> GroupId {
    GroupId::derive(VAULT, &name("shop"))
}

fn host_key() -> HostKey {
    HostKey::derive(&VaultKey::new([0x33; 32]), host(), KeyEpoch(1))
}

/// Compares `bytes` with the file, or writes it when asked to.
fn golden(file: &str, bytes: &[u8]) {
    let path = path(file);
    if std::env::var_os("FARSHORE_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, bytes).expect("the folder can be written");
    }
    assert!(read(file) == bytes, "{file}: today's code writes other bytes");
}

fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)
}

fn read(file: &str) -> Vec<u8> {
    std::fs::read(path(file)).expect("the file is there")
}

fn volumes() -> Vec<VolumeDecl> {
    vec![
        VolumeDecl { index: VolumeIndex(0), name: name("data"), size: 1 << 30, block: 512 },
        VolumeDecl { index: VolumeIndex(7), name: name("log"), size: 1 << 20, block: 4096 },
    ]
}

fn content(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_add((at % 251).to_le_bytes()[0])).collect()
}

/// One record of every kind that a batch may hold.
fn records() -> Vec<Record> {
    let dedup = host_key().dedup_key(group());
    let record = |kind, position, start, sectors| Record::new(kind, VolumeIndex(0), Position(position), start, sectors);
    let of = |seed, len| dedup.chunk_id(&content(seed, len));
    vec![
        record(Kind::EventBegin, 100, 0, 0),
        record(Kind::Write, 101, 16, 8).with_id(of(1, 4096)).with_home(Home::Here { frame: 1, offset: 0 }),
        record(Kind::Write, 102, 127, 1).with_id(of(2, 512)).with_home(Home::Here { frame: 1, offset: 4096 }),
        record(Kind::WriteZeroes, 103, 1000, 5000),
        record(Kind::Discard, 104, 1 << 40, 1 << 20),
        record(Kind::SyncData, 105, 128, 8).with_id(of(3, 4096)).with_home(Home::Here { frame: 2, offset: 0 }),
        record(Kind::SyncZero, 106, 256, 128),
        record(Kind::Probe, 107, 384, 128).with_id(of(4, 65536)),
        record(Kind::ProbeZero, 108, 512, 1280),
        record(Kind::Unreadable, 109, 2048, 1),
        record(Kind::Write, 110, 64, 8).with_id(ChunkId([0x77; 32])).with_home(Home::Reference),
        Record::new(Kind::VolumeJoined, VolumeIndex(0), Position(111), 0, 0),
        Record::new(Kind::VolumeLeft, VolumeIndex(7), Position(112), 0, 0),
        record(Kind::EventEnd, 113, 0, 0),
    ]
}

fn place() -> BatchPlace {
    BatchPlace {
        vault: VAULT,
        group: group(),
        host: host(),
        generation: Generation(2),
        incarnation: Incarnation(3),
        number: BatchNo(41),
        first: Position(100),
        end: Position(115),
        time: WallTime(1_790_000_000_123_456_789),
    }
}

fn annotations() -> Annotations {
    Annotations { bookmark: Some(name("before-upgrade")), volumes: volumes() }
}

fn batch_bytes() -> Vec<u8> {
    let (key, records, previous) = (host_key(), records(), ChainHash([0x44; 32]));
    let chain = place().chain(&previous, &records);
    let salt = key.salt(&[0x55; 32], place().incarnation, place().number.0, &chain);
    let builder = BatchBuilder {
        place: place(),
        cut: CutFlags { recoverable: true, app_consistent: true },
        previous,
        chain,
        salt,
        host_key: &key,
        raw_bytes: 4608,
        log: Some(LogMark { session: 0x1122_3344_5566_7788, number: 99 }),
    };
    let mut data = Vec::new();
    let first = [content(1, 4096), content(2, 512)].concat();
    for (number, plain) in [(1, first), (2, content(3, 4096))] {
        key.frame_key(&salt).seal(number, &plain, None, |_| &[], &mut data).expect("sealed");
    }
    let mut bytes = Vec::new();
    builder.finish(&records, &annotations(), 2, data.len() as u64, None, &mut bytes).expect("finished");
    bytes.extend_from_slice(&data);
    bytes
}

#[test]
fn batch() {
    golden("batch.bin", &batch_bytes());
    let bytes = read("batch.bin");
    let frames = batch::parse(&bytes).expect("a whole batch");
    assert_eq!(frames.header.place(), place());
    assert_eq!(frames.header.cut(), CutFlags { recoverable: true, app_consistent: true });
    assert_eq!((frames.header.raw_bytes(), frames.header.frame_count()), (4608, 3));
    let list = batch::open_list(&bytes, &frames, &host_key()).expect("opens");
    assert_eq!((list.records, list.annotations), (records(), annotations()));
    let (header, sealed) = frame::split(&bytes[frames.offsets[2] as usize..], FRAME_PLAIN_MAX).expect("a frame");
    let (mut scratch, mut plain) = (Vec::new(), Vec::new());
    let key = host_key().frame_key(header.salt());
    key.open(&header, sealed, &[], &mut scratch, &mut plain).expect("opens");
    assert_eq!(plain, content(3, 4096));
}

/// Every flipped bit of header, list and frame headers is found without the key or by it.
#[test]
fn damage_to_a_batch_is_found() {
    let bytes = batch_bytes();
    let whole = batch::parse(&bytes).expect("a whole batch");
    let to = whole.offsets[1] as usize + frame::FRAME_HEADER_BYTES;
    for at in 0..to {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            let opened = batch::parse(&bad).and_then(|frames| batch::open_list(&bad, &frames, &host_key()));
            assert!(opened.is_err(), "byte {at}, bit {bit}");
        }
    }
    for cut in [0, 1, 319, 320, to, bytes.len() - 1] {
        assert!(batch::parse(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

/// Compressed frames are only read: another zstd may write others.
#[test]
fn compressed_frame() {
    let plain = b"the same words again and again, ".repeat(100);
    let key = host_key().frame_key(&[0x66; 32]);
    if std::env::var_os("FARSHORE_WRITE_GOLDEN").is_some() {
        let mut bytes = Vec::new();
        let mut zstd = Compressor::new(3).expect("zstd");
        key.seal(5, &plain, Some(&mut zstd), |_| &[], &mut bytes).expect("sealed");
        std::fs::write(path("frame-zstd.bin"), bytes).expect("the folder can be written");
    }
    let bytes = read("frame-zstd.bin");
    let (header, sealed) = frame::split(&bytes, FRAME_PLAIN_MAX).expect("a frame");
    assert_eq!((header.number(), header.compression(), header.key_epoch()), (5, Compression::Zstd, KeyEpoch(1)));
    assert_eq!(header.salt(), &[0x66; 32]);
    let (mut scratch, mut opened) = (Vec::new(), Vec::new());
    key.open(&header, sealed, &[], &mut scratch, &mut opened).expect("opens");
    assert_eq!(opened, plain);
}

#[test]
fn messages_of_the_source() {
    let hello = Hello {
        vault: VAULT,
        group: group(),
        group_name: name("shop"),
        host_name: name("web1"),
        generation: Generation(2),
        incarnation: Incarnation(3),
        nonce: NONCE,
        volumes: volumes(),
    };
    let keyed = SourceMessage::KeyedHello { epoch: KeyEpoch(0x0102), hello: hello.clone() };
    let messages = [
        ("source-keyed-hello.bin", keyed),
        ("source-hello.bin", SourceMessage::Hello(hello)),
        ("source-volumes.bin", SourceMessage::Volumes(volumes())),
        ("source-ping.bin", SourceMessage::Ping(0x0102_0304_0506_0708)),
        ("source-bye.bin", SourceMessage::Bye),
    ];
    for (file, message) in messages {
        golden(file, &message.encode().expect("short enough"));
        assert_eq!(SourceMessage::decode(&read(file)), Ok(message), "{file}");
    }
}

#[test]
fn messages_of_the_target() {
    let key: AnswerKey = host_key().answer_key();
    let tail =
        Tail { incarnation: Incarnation(3), number: BatchNo(41), chain: ChainHash([0x88; 32]), end: Position(115) };
    let welcome = Welcome {
        generation: Generation(2),
        tail: Some(tail),
        empty: vec![VolumeIndex(7)],
        joined: vec![VolumeIndex(0)],
        event_open: true,
        log: Some(LogMark { session: 0x1122_3344_5566_7788, number: 99 }),
    };
    let answer = Answer { volume: VolumeIndex(0), position: Position(107), offset: 196_608, len: 65_536, equal: true };
    let messages = [
        ("target-welcome.bin", TargetMessage::Welcome(welcome)),
        ("target-refused.bin", TargetMessage::Refused { code: RefuseCode::Chain, detail: "gap".into() }),
        (
            "target-durable.bin",
            TargetMessage::Durable {
                incarnation: tail.incarnation,
                number: tail.number,
                chain: tail.chain,
                received: WallTime(1_790_000_001_000_000_000),
            },
        ),
        ("target-answers.bin", TargetMessage::Answers(Answers { number: BatchNo(41), results: vec![answer] })),
        (
            "target-lease.bin",
            TargetMessage::Lease(Lease { through: BatchNo(50), ids: vec![ChunkId([1; 32]), ChunkId([2; 32])] }),
        ),
        ("target-paused.bin", TargetMessage::Paused { reason: "disk full".into() }),
        ("target-resumed.bin", TargetMessage::Resumed),
        ("target-pong.bin", TargetMessage::Pong(9)),
    ];
    for (counter, (file, message)) in (0u64..).zip(messages) {
        golden(file, &message.seal(&key, &NONCE, counter).expect("short enough"));
        let bytes = read(file);
        assert_eq!(TargetMessage::open(&bytes, &key, &NONCE, counter), Ok(message), "{file}");
        assert!(TargetMessage::open(&bytes, &key, &NONCE, counter + 1).is_err(), "{file}: another place");
        assert!(TargetMessage::open(&bytes, &key, &[0; 32], counter).is_err(), "{file}: another session");
    }
}

/// What is derived from what: a changed derivation would make every stored byte unreadable.
#[test]
fn derived_values() {
    let key = host_key();
    let chain = place().chain(&ChainHash([0x44; 32]), &records());
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let lines = [
        ("group id", group().to_string()),
        ("host id", host().to_string()),
        ("host key", hex(key.expose())),
        ("salt", hex(&key.salt(&[0x55; 32], Incarnation(3), 41, &chain))),
        ("chunk id", key.dedup_key(group()).chunk_id(b"content").to_string()),
        ("answer mac", hex(&key.answer_key().mac(&NONCE, 7, b"body"))),
        ("chain hash", chain.to_string()),
    ];
    let text: String = lines.iter().map(|(what, value)| format!("{what}: {value}\n")).collect();
    golden("derived.txt", text.as_bytes());
}
