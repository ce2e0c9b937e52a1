//! The decoders that are fuzzed. A new one gets a row in [`TARGETS`], a file in `fuzz/fuzz_targets/` and an entry in
//! `fuzz/Cargo.toml`; `cargo xtask test tidy` compares the three.
//!
//! Checksums and seals would refuse nearly every mutation before the code behind them sees it, so targets mend the checksums
//! and seal what they test under a key of their own.

use farshore_blkfilter::activity::{Found, Keeper, KeeperConfig};
use farshore_proto::batch::{self, Annotations, BATCH_HEADER_BYTES, BatchBuilder, BatchPlace, CutFlags, VolumeDecl};
use farshore_proto::codec::ENCODED_BYTES_MAX;
use farshore_proto::frame::{self, FRAME_HEADER_BYTES, FRAME_PLAIN_MAX, FrameHeader};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::message::{Hello, MESSAGE_BYTES_MAX, SourceMessage, TargetMessage};
use farshore_proto::record::{Home, Kind, RECORD_BYTES, Record};
use farshore_proto::{
    BatchNo, ChainHash, ChunkId, Generation, GroupId, HostId, Incarnation, KeyEpoch, Name, Position, VaultId,
    VolumeIndex, WallTime, text,
};
use farshore_streamer::{DiskLog, Line};
use farshore_uring::sim::{SimFile, SimRng, SimStorage};
use farshore_uring::{OpenMode, Storage, StorageFile};
use zerocopy::FromBytes;

use super::Target;

/// Every decoder under test.
pub const TARGETS: &[Target] = &[
    Target { name: "batch", run: batch, seeds: batch_seeds },
    Target { name: "record_list", run: record_list, seeds: record_list_seeds },
    Target { name: "frame", run: frame, seeds: frame_seeds },
    Target { name: "source_message", run: source_message, seeds: source_message_seeds },
    Target { name: "target_message", run: target_message, seeds: target_message_seeds },
    Target { name: "text", run: text, seeds: text_seeds },
    Target { name: "activity_log", run: activity_log, seeds: activity_log_seeds },
    Target { name: "disk_log", run: disk_log, seeds: disk_log_seeds },
];

/// Bytes of a target message between its prefix and its body: counter and MAC.
const MAC_BYTES: usize = 40;
/// Bytes before them: magic and version.
const PREFIX_BYTES: usize = MESSAGE_BYTES_MAX - ENCODED_BYTES_MAX - MAC_BYTES;

const SALT: [u8; 32] = [7; 32];

fn key() -> HostKey {
    HostKey::derive(&VaultKey::new([5; 32]), HostId([3; 16]), KeyEpoch(1))
}

fn place(records: u64) -> BatchPlace {
    BatchPlace {
        vault: VaultId([1; 16]),
        group: GroupId([2; 16]),
        host: HostId([3; 16]),
        generation: Generation(1),
        incarnation: Incarnation(4),
        number: BatchNo(9),
        first: Position(100),
        end: Position(101 + records),
        time: WallTime(1_700_000_000_000_000_000),
    }
}

fn annotations() -> Annotations {
    Annotations { bookmark: Some(name("before-upgrade")), volumes: vec![volume()] }
}

fn volume() -> VolumeDecl {
    VolumeDecl { index: VolumeIndex(0), name: name("data"), size: 1 << 30, block: 4096 }
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

/// A whole batch over `records`, as a source sends it, without data frames.
fn sealed(records: &[Record], annotations: &Annotations, data: &[u8], frames: u32) -> Vec<u8> {
    let key = key();
    let place = place(records.len() as u64);
    let previous = ChainHash([6; 32]);
    let builder = BatchBuilder {
        place,
        cut: CutFlags { recoverable: true, app_consistent: false },
        previous,
        chain: place.chain(&previous, records),
        salt: SALT,
        host_key: &key,
        raw_bytes: 4096,
        log: None,
    };
    let mut out = Vec::new();
    builder.finish(records, annotations, frames, data.len() as u64, None, &mut out).expect("within the limits");
    out.extend_from_slice(data);
    out
}

fn records() -> Vec<Record> {
    let record = |kind, position, start, sectors| Record::new(kind, VolumeIndex(0), Position(position), start, sectors);
    vec![
        record(Kind::Write, 100, 8, 8).with_id(ChunkId([9; 32])).with_home(Home::Here { frame: 1, offset: 0 }),
        record(Kind::WriteZeroes, 101, 0, 128),
        record(Kind::Discard, 102, 256, 128),
    ]
}

fn data_frame() -> Vec<u8> {
    let mut out = Vec::new();
    key().frame_key(&SALT).seal(1, &[0xab; 4096], None, |_| &[], &mut out).expect("within the limits");
    out
}

/// A received batch: outer shape and, where the seal holds, the record list.
pub fn batch(bytes: &[u8]) {
    let look = |bytes: &[u8]| {
        if let Ok(frames) = batch::parse(bytes) {
            assert_eq!(frames.offsets.len(), frames.header.frame_count() as usize);
            assert_eq!(frames.header.total_len(), bytes.len());
            let _ = batch::open_list(bytes, &frames, &key());
        }
    };
    look(bytes);
    let mut mended = bytes.to_vec();
    mend_batch(&mut mended);
    look(&mended);
}

fn batch_seeds() -> Vec<Vec<u8>> {
    vec![sealed(&records(), &annotations(), &data_frame(), 1), sealed(&[], &Annotations::default(), &[], 0)]
}

/// Recomputes every checksum that a batch's shape leads to.
fn mend_batch(bytes: &mut [u8]) {
    let Some((header, mut rest)) = bytes.split_at_mut_checked(BATCH_HEADER_BYTES) else { return };
    mend_last_word(header);
    while let Some(len) = mend_frame(rest) {
        rest = &mut rest[len..];
    }
}

/// Recomputes the checksums of the frame at the start of `bytes`; its length if all of it is there.
fn mend_frame(bytes: &mut [u8]) -> Option<usize> {
    let (header, rest) = bytes.split_at_mut_checked(FRAME_HEADER_BYTES)?;
    let sealed_len = u32::from_le_bytes(header[52..56].try_into().expect("four bytes"));
    let sealed = rest.get(..usize::try_from(sealed_len).ok()?);
    if let Some(sealed) = sealed {
        header[56..60].copy_from_slice(&crc_fast::crc32_iscsi(sealed).to_le_bytes());
    }
    mend_last_word(header);
    sealed.map(|sealed| FRAME_HEADER_BYTES + sealed.len())
}

fn mend_last_word(header: &mut [u8]) {
    let crc = header.len() - 4;
    let sum = crc_fast::crc32_iscsi(&header[..crc]);
    header[crc..].copy_from_slice(&sum.to_le_bytes());
}

/// Any records, sealed and chained as a source with the right key could: accepted unchanged, or refused.
pub fn record_list(bytes: &[u8]) {
    let records: Vec<Record> = bytes
        .chunks_exact(RECORD_BYTES)
        .map(|bytes| Record::read_from_bytes(bytes).expect("chunks have a record's length"))
        .collect();
    let sealed = sealed(&records, &annotations(), &data_frame(), 1);
    let frames = batch::parse(&sealed).expect("a sealed batch has the right shape");
    if let Ok(list) = batch::open_list(&sealed, &frames, &key()) {
        assert_eq!(list.records, records);
        assert_eq!(list.annotations, annotations());
        for record in &records {
            record.check(2).expect("an accepted list holds no bad record");
        }
    }
}

fn record_list_seeds() -> Vec<Vec<u8>> {
    let bytes = |records: &[Record]| records.iter().flat_map(|r| zerocopy::IntoBytes::as_bytes(r).to_vec()).collect();
    vec![bytes(&records()), bytes(&records()[..1])]
}

/// A data frame: header, and the content where the seal holds.
pub fn frame(bytes: &[u8]) {
    let look = |bytes: &[u8]| {
        if let Ok(header) = FrameHeader::parse(bytes, FRAME_PLAIN_MAX) {
            assert!(header.plain_len() <= FRAME_PLAIN_MAX);
        }
        if let Ok((header, sealed)) = frame::split(bytes, FRAME_PLAIN_MAX) {
            let (mut scratch, mut plain) = (Vec::new(), Vec::new());
            if key().frame_key(&SALT).open(&header, sealed, &[], &mut scratch, &mut plain).is_ok() {
                assert_eq!(plain.len(), header.plain_len());
            }
        }
    };
    look(bytes);
    let mut mended = bytes.to_vec();
    mend_frame(&mut mended);
    look(&mended);
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let mut compressed = Vec::new();
    let mut compressor = frame::Compressor::new(1).expect("zstd has level 1");
    let seal = key().frame_key(&SALT).seal(1, &[0; 8192], Some(&mut compressor), |_| &[], &mut compressed);
    seal.expect("within the limits");
    vec![data_frame(), compressed]
}

/// What a target gets from a source: whatever is accepted means the same after another trip.
pub fn source_message(bytes: &[u8]) {
    if let Ok(message) = SourceMessage::decode(bytes) {
        let again = message.encode().expect("an accepted message is within the limit");
        assert_eq!(SourceMessage::decode(&again).expect("our own bytes"), message);
    }
}

fn source_message_seeds() -> Vec<Vec<u8>> {
    let hello = Hello {
        vault: VaultId([1; 16]),
        group: GroupId([2; 16]),
        group_name: name("mail"),
        host_name: name("host-1"),
        generation: Generation(1),
        incarnation: Incarnation(4),
        nonce: [8; 32],
        volumes: vec![volume()],
    };
    let keyed = SourceMessage::KeyedHello { epoch: KeyEpoch(3), hello: hello.clone() };
    let messages = [SourceMessage::Hello(hello), keyed, SourceMessage::Volumes(vec![volume()]), SourceMessage::Ping(7)];
    messages.iter().map(|m| m.encode().expect("a short message")).collect()
}

/// What a source gets from a target that holds the right key: any body, authenticated.
pub fn target_message(body: &[u8]) {
    let key = key().answer_key();
    let nonce = [8; 32];
    let mut bytes = TargetMessage::Resumed.seal(&key, &nonce, 0).expect("a short message");
    bytes.truncate(PREFIX_BYTES);
    bytes.extend_from_slice(&0u64.to_le_bytes());
    bytes.extend_from_slice(&key.mac(&nonce, 0, body));
    bytes.extend_from_slice(body);
    if let Ok(message) = TargetMessage::open(&bytes, &key, &nonce, 0) {
        let again = message.seal(&key, &nonce, 1).expect("an accepted message is within the limit");
        assert_eq!(TargetMessage::open(&again, &key, &nonce, 1).expect("our own bytes"), message);
        assert!(TargetMessage::open(&again, &key, &nonce, 2).is_err(), "accepted out of order");
    }
    // Not authenticated: refused, whatever it is.
    assert!(body.len() < PREFIX_BYTES || TargetMessage::open(body, &key, &nonce, 0).is_err());
}

fn target_message_seeds() -> Vec<Vec<u8>> {
    let durable = TargetMessage::Durable {
        incarnation: Incarnation(4),
        number: BatchNo(9),
        chain: ChainHash([6; 32]),
        received: WallTime(1),
    };
    let messages = [durable, TargetMessage::Paused { reason: "disk full".to_owned() }, TargetMessage::Pong(7)];
    let sealed = messages.iter().map(|m| m.seal(&key().answer_key(), &[8; 32], 0).expect("a short message"));
    sealed.map(|bytes| bytes[PREFIX_BYTES + MAC_BYTES..].to_vec()).collect()
}

/// What people type: sizes, durations, times.
pub fn text(bytes: &[u8]) {
    let Ok(typed) = std::str::from_utf8(bytes) else { return };
    let _ = text::parse_size(typed);
    let _ = text::parse_duration(typed);
    let _ = text::parse_time(typed);
    let _ = Name::new(typed);
}

fn text_seeds() -> Vec<Vec<u8>> {
    ["4GiB", "1.5TB", "250ms", "72h", "2026-02-28T23:59:59.123456789Z", "2024-02-29T12:00:00+01:00", "mail-1"]
        .map(|s| s.as_bytes().to_vec())
        .to_vec()
}

/// Blocks of an activity log that the target knows: superblock, transactions, some pages of marks.
const LOG_BLOCKS: u16 = 257 + 16;
const LOG_BLOCK: usize = 4096;
/// A number of a block, and its content.
const LOG_CHUNK: usize = 2 + LOG_BLOCK;
const LOG_CONFIG: KeeperConfig = KeeperConfig { places: 8, owner: [3; 16] };

fn log_file() -> std::sync::Arc<SimFile> {
    let storage = SimStorage::new(SimRng::new(1));
    let file = storage.open(std::path::Path::new("log"), OpenMode::CreateNew).expect("no faults");
    file.set_len(u64::from(LOG_BLOCKS) * LOG_BLOCK as u64).expect("no faults");
    file
}

/// An activity log as it is found at a start: whatever is taken for one can be gone on with, and is found again.
pub fn activity_log(bytes: &[u8]) {
    let file = log_file();
    for chunk in bytes.chunks(LOG_CHUNK) {
        let Some((number, content)) = chunk.split_first_chunk::<2>() else { continue };
        let mut block = [0; LOG_BLOCK];
        block[..content.len()].copy_from_slice(content);
        // Pages of marks have theirs elsewhere.
        let crc_at = if block.starts_with(b"FARSACTM") { 60 } else { 124 };
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        digest.update(&block[..crc_at]);
        digest.update(&block[crc_at + 4..]);
        let crc = u32::try_from(digest.finalize()).expect("32 bits");
        block[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        let at = u64::from(u16::from_le_bytes(*number) % LOG_BLOCKS) * LOG_BLOCK as u64;
        file.write_at(&block, at).expect("no faults");
    }
    let open = |session| Keeper::open(std::sync::Arc::clone(&file), LOG_CONFIG, ([9; 16], session));
    let Ok((mut keeper, loaded)) = open(1) else { return };
    if keeper.begin().is_err() {
        return;
    }
    let (_, again) = open(2).expect("our own log");
    assert_eq!(again.found, Found::Whole);
    if loaded.found == Found::Whole {
        assert!(again.active() >= loaded.active().min(8), "{} extents became {}", loaded.active(), again.active());
    }
}

fn activity_log_seeds() -> Vec<Vec<u8>> {
    let file = log_file();
    let (mut keeper, _) = Keeper::open(std::sync::Arc::clone(&file), LOG_CONFIG, ([9; 16], 5)).expect("an empty file");
    keeper.begin().expect("no faults");
    keeper.begin().expect("no faults");
    let chunk = |number: u16, block: &[u8]| [&number.to_le_bytes()[..], block].concat();
    let mut begun = Vec::new();
    for number in [0, 2, 3] {
        let mut block = [0; LOG_BLOCK];
        file.read_at(&mut block, u64::from(number) * LOG_BLOCK as u64).expect("no faults");
        begun.extend(chunk(number, &block));
    }
    let golden = include_bytes!("../../../blkfilter/tests/golden/activity-log.bin");
    let numbers = [0, 6, 257].into_iter().zip(golden.chunks(LOG_BLOCK));
    vec![begun, numbers.flat_map(|(number, block)| chunk(number, block)).collect()]
}

/// Blocks of the disk log that are tried: of a log of two segments, most of the first.
const DISK_BLOCKS: u16 = 64;
const DISK_BYTES: u64 = (2 << 20) + 4096;
const DISK_OWNER: HostId = HostId([3; 16]);
const DISK_LINE: Line = Line { group: GroupId([1; 16]), number: 7 };

fn disk_log_file() -> std::sync::Arc<SimFile> {
    let storage = SimStorage::new(SimRng::new(1));
    let file = storage.open(std::path::Path::new("log"), OpenMode::CreateNew).expect("no faults");
    file.set_len(DISK_BYTES).expect("no faults");
    file
}

/// A disk log as it is found at a start: what a line is said to hold follows each other, whatever stands in the file, and is found again.
pub fn disk_log(bytes: &[u8]) {
    let file = disk_log_file();
    for chunk in bytes.chunks(LOG_CHUNK) {
        let Some((number, content)) = chunk.split_first_chunk::<2>() else { continue };
        let mut block = [0; LOG_BLOCK];
        block[..content.len()].copy_from_slice(content);
        let sum = blake3::hash(&block[..496]);
        block[496..512].copy_from_slice(&sum.as_bytes()[..16]);
        let at = u64::from(u16::from_le_bytes(*number) % DISK_BLOCKS) * LOG_BLOCK as u64;
        file.write_at(&block, at).expect("no faults");
    }
    // People may look at anything.
    let _ = farshore_streamer::look(std::sync::Arc::clone(&file), true);
    let kept = std::collections::BTreeSet::from([DISK_LINE]);
    let open = || DiskLog::open(std::sync::Arc::clone(&file), DISK_OWNER, DISK_BYTES, [9; 16], &kept);
    let Ok(log) = open() else { return };
    let Ok((_, batches)) = log.take_up(DISK_LINE) else { return };
    assert!(
        batches.windows(2).all(|pair| pair[1].number == pair[0].number.next() && pair[1].previous == pair[0].chain)
    );
    let (_, again) = open().expect("our own log").take_up(DISK_LINE).expect("read a moment ago");
    assert_eq!(again, batches);
}

fn disk_log_seeds() -> Vec<Vec<u8>> {
    let golden = include_bytes!("../../../streamer/tests/golden/disk-log.bin");
    let chunk = |(number, block): (u16, &[u8])| [&number.to_le_bytes()[..], block].concat();
    vec![(0..).zip(golden.chunks(LOG_BLOCK)).flat_map(chunk).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_accepted_so_that_mutations_start_from_the_inside() {
        for bytes in batch_seeds() {
            let frames = batch::parse(&bytes).expect("a seed is valid");
            batch::open_list(&bytes, &frames, &key()).expect("and opens");
        }
        for bytes in frame_seeds() {
            frame::split(&bytes, FRAME_PLAIN_MAX).expect("a seed is valid");
        }
        for bytes in source_message_seeds() {
            SourceMessage::decode(&bytes).expect("a seed is valid");
        }
    }

    #[test]
    fn mending_restores_exactly_what_a_checksum_refused() {
        let good = batch_seeds().remove(0);
        let mut bytes = good.clone();
        for at in [BATCH_HEADER_BYTES - 1, BATCH_HEADER_BYTES + 58, BATCH_HEADER_BYTES + 63] {
            bytes[at] ^= 0xff;
        }
        assert!(batch::parse(&bytes).is_err());
        mend_batch(&mut bytes);
        assert_eq!(bytes, good);
    }
}
