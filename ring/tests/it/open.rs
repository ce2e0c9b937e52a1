//! Opening: whose ring, which version, whole or not.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use farshore_ring::{Desc, Error, Full, MAX_CELL_BYTES, Memory, Ring, RingConfig, RingIdentity, StreamState};

use crate::support::{config, folder, identity};

struct Made {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn made() -> Made {
    let folder = folder();
    let path = folder.path().join("ring");
    drop(Ring::create(&path, &config(2, 64)).expect("created"));
    Made { _folder: folder, path }
}

/// Goal: each kind of wrong ring has its own error.
/// Method: spoil one thing, open.
fn check(spoil: impl FnOnce(&File, &mut RingIdentity), expected: fn(&Error) -> bool, lost: bool) {
    let made = made();
    let file = File::options().read(true).write(true).open(&made.path).expect("exists");
    let mut expect = identity();
    spoil(&file, &mut expect);
    drop(file);
    let error = Ring::open(&made.path, &expect).expect_err("spoiled");
    assert!(expected(&error), "{error:?}");
    assert_eq!(error.ring_is_lost(), lost, "{error:?}");
}

fn put(at: u64, byte: u8) -> impl FnOnce(&File, &mut RingIdentity) {
    move |file, _| file.write_all_at(&[byte], at).expect("written")
}

#[test]
fn wrong_rings_have_distinct_errors() {
    check(put(0, b'X'), |e| matches!(e, Error::WrongMagic), true);
    check(put(8, 2), |e| matches!(e, Error::NewerVersion { found: 2, known: 1 }), false);
    check(put(100, 9), |e| matches!(e, Error::HeaderChecksum { .. }), true);
    check(|f, _| f.set_len(0).expect("cut"), |e| matches!(e, Error::Truncated { .. }), true);
    check(|f, _| f.set_len(1 << 20).expect("cut"), |e| matches!(e, Error::Truncated { .. }), true);
    check(|_, id| id.boot[3] ^= 1, |e| matches!(e, Error::OtherBoot), true);
    check(|_, id| id.vault[0] ^= 1, |e| matches!(e, Error::OtherIdentity { field: "vault" }), true);
    check(|_, id| id.group[0] ^= 1, |e| matches!(e, Error::OtherIdentity { field: "group" }), true);
    check(|_, id| id.host[0] ^= 1, |e| matches!(e, Error::OtherIdentity { field: "host" }), true);
    check(|_, id| id.generation += 1, |e| matches!(e, Error::OtherIdentity { field: "generation" }), true);
    check(
        |_, id| id.incarnation += 1,
        |e| matches!(e, Error::OtherIncarnation { found, expected } if found + 1 == *expected),
        true,
    );
    // head < freed: no kill leads there.
    check(put(4096 + 256, 1), |e| matches!(e, Error::Corrupt { .. }), true);
}

/// A total that does not follow from the counts, under a checksum made good again.
#[test]
fn contradicting_sizes_are_seen() {
    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { (c >> 1) ^ 0x82F6_3B78 } else { c >> 1 })
        })
    }
    let spoil = |file: &File, _: &mut RingIdentity| {
        let mut header = [0; 132];
        file.read_exact_at(&mut header, 0).expect("read");
        header[121] ^= 0x10;
        let checksum = crc32c(&header[..128]);
        header[128..].copy_from_slice(&checksum.to_le_bytes());
        file.write_all_at(&header, 0).expect("written");
    };
    check(spoil, |e| matches!(e, Error::SizeMismatch { .. }), true);
}

#[test]
fn missing_file_is_a_lost_ring_and_a_used_one_is_in_use() {
    let made = made();
    let missing = Ring::open(&made.path.with_extension("not"), &identity()).expect_err("missing");
    assert!(missing.ring_is_lost(), "{missing:?}");
    let _first = Ring::open(&made.path, &identity()).expect("opens");
    let second = Ring::open(&made.path, &identity()).expect_err("locked");
    assert!(matches!(second, Error::InUse { .. }) && !second.ring_is_lost());
    let create = Ring::create(&made.path, &config(2, 64)).expect_err("locked");
    assert!(matches!(create, Error::InUse { .. }));
}

#[test]
fn handles_keep_the_lock_after_the_ring_is_dropped() {
    let made = made();
    let ring = Ring::open(&made.path, &identity()).expect("opens").resume();
    let reservation = ring.producer().reserve(10).expect("empty ring");
    drop(ring);
    assert!(Ring::open(&made.path, &identity()).is_err());
    drop(reservation);
    assert!(Ring::open(&made.path, &identity()).is_ok());
}

#[test]
fn sizes_out_of_range_are_refused() {
    let memory = Memory::new();
    for (slab_bytes, descriptors) in [(0, Some(64)), (1 << 20, Some(63)), (1 << 20, Some(4)), (1 << 60, None)] {
        let config = RingConfig { slab_bytes, descriptors, ..RingConfig::new(identity()) };
        let error = Ring::create_in_memory(&memory, &config).expect_err("out of range");
        assert!(matches!(error, Error::Config { .. }), "{error:?}");
    }
}

#[test]
fn scratch_and_clean_flag_survive_a_reopen() {
    let made = made();
    let state = StreamState { next_batch: 77, chain_hash: [7; 32], event_open: true, spare: [3; 16] };
    let dormant = Ring::open(&made.path, &identity()).expect("opens");
    assert_eq!(dormant.recovery().stream, None);
    assert!(!dormant.recovery().was_clean);
    let ring = dormant.resume();
    ring.set_stream_state(&state);
    assert!(ring.mark_clean());
    drop(ring);
    let dormant = Ring::open(&made.path, &identity()).expect("opens");
    assert_eq!(dormant.recovery().stream, Some(state));
    assert!(dormant.recovery().was_clean);
    let ring = dormant.resume();
    let reservation = ring.producer().reserve(1).expect("empty ring");
    assert!(!ring.mark_clean(), "something is reserved");
    drop(reservation);
    drop(ring);
    assert!(!Ring::open(&made.path, &identity()).expect("opens").recovery().was_clean, "resuming took it back");
}

#[test]
fn one_consumer_at_a_time() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(1, 8)).expect("created");
    let first = ring.consumer();
    assert!(first.is_some() && ring.consumer().is_none());
    drop(first);
    assert!(ring.consumer().is_some());
}

/// Goal: a ring full of writes still takes markers and can be re-opened; limits have names.
#[test]
fn reserves_are_kept_from_writes() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(2, 64)).expect("created");
    let producer = ring.producer();
    assert_eq!(producer.reserve(MAX_CELL_BYTES + 1).expect_err("too long"), Full::TooLong);
    assert_eq!(producer.reserve_marker(4097).expect_err("too long"), Full::TooLong);
    let cells: Vec<_> = (0..4).map(|_| producer.reserve(MAX_CELL_BYTES).expect("1 MiB of 2 is for writes")).collect();
    assert_eq!(producer.reserve(1).expect_err("slab full"), Full::Cells);
    let named = producer.reserve_marker(100).expect("from the reserved page");
    let bare: Vec<_> = (0..57).map(|_| producer.reserve_bare().expect("62 for writes, 5 taken")).collect();
    assert_eq!(producer.reserve_bare().expect_err("descriptors full"), Full::Descriptors);
    let marker = producer.reserve_marker(0).expect("63 for markers");
    assert_eq!(producer.reserve_marker(0).expect_err("the last one is for re-opening"), Full::Descriptors);
    assert!(ring.close() && !ring.close());
    assert!(producer.publish(marker, &Desc::default()).is_err());
    let mut consumer = ring.consumer().expect("first");
    assert_eq!(consumer.reopen(&Desc { kind: 8, ..Desc::default() }).expect("room is kept"), 0);
    assert!(consumer.reopen(&Desc::default()).is_err(), "open");
    drop((cells, named, bare));
    assert_eq!((ring.used_bytes(), ring.used_descriptors()), (0, 1));
}

#[test]
fn fallback_of_a_class_is_a_larger_one() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(2, 64)).expect("created");
    let producer = ring.producer();
    let large = producer.reserve(100_000).expect("128 KiB");
    assert_eq!(large.capacity(), 128 << 10);
    let small = producer.reserve(1000).expect("no page left to assign, seven large cells are");
    assert_eq!((small.capacity(), small.len()), (128 << 10, 1000));
}

#[test]
fn a_copy_of_the_file_is_a_ring_of_its_own() {
    let made = made();
    let copy = made.path.with_extension("copy");
    fs::copy(&made.path, &copy).expect("copied");
    let _one = Ring::open(&made.path, &identity()).expect("opens");
    let _two = Ring::open(&copy, &identity()).expect("opens");
}
