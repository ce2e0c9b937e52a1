//! A process that hammers a ring on tmpfs is killed at random moments; the ring must come back exact every time.
//!
//! The child keeps a ledger beside the ring (a file of words, written with plain system calls, so each store survives the kill):
//! per producer the number whose backing write was "submitted" last, the number "acknowledged" last, and by the consumer the
//! number consumed last. What the parent finds must agree with it:
//!
//! * acknowledged ≤ last published; published numbers of a producer have no gap, from at most consumed + 1 on;
//! * every published payload is intact;
//! * every submitted and unpublished number is reported as a writing range, and nothing else is;
//! * used bytes and descriptors are exactly those of the published, unfreed entries; drained, they are zero.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use farshore_ring::{Desc, Producer, Recovery, Ring, RingConfig, WritingRange};

use crate::support::{Rng, config, folder, identity, is_stamped, len32, stamp};

const PRODUCERS: usize = 3;
const IN_FLIGHT: usize = 4;
const FOLDER: &str = "FARSHORE_RING_KILL_FOLDER";
const SEED: &str = "FARSHORE_RING_KILL_SEED";
/// Kills in one run; raise it for a long run.
const ROUNDS: &str = "FARSHORE_RING_KILL_ROUNDS";
const ROUNDS_DEFAULT: u64 = 40;

/// Words of the ledger.
struct Ledger(File);

#[derive(Clone, Copy)]
enum Word {
    Submitted = 0,
    Acknowledged = 1,
    Consumed = 2,
}

impl Ledger {
    fn open(folder: &Path) -> Self {
        let path = folder.join("ledger");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).expect("opens");
        if file.metadata().expect("exists").len() == 0 {
            file.write_all_at(&[0; PRODUCERS * 24], 0).expect("written");
        }
        Self(file)
    }

    fn set(&self, producer: usize, word: Word, value: u64) {
        let at = (producer * 3 + word as usize) * 8;
        self.0.write_all_at(&value.to_le_bytes(), at as u64).expect("written");
    }

    fn load(&self, producer: usize, word: Word) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, ((producer * 3 + word as usize) * 8) as u64).expect("read");
        u64::from_le_bytes(bytes)
    }
}

fn ring_config() -> RingConfig {
    config(3, 64)
}

/// Numbers from `next` on, several in flight, published in order; for ever.
fn produce(ring: &Ring, producer: &Producer, ledger: &Ledger, id: usize, mut rng: Rng, mut next: u64) {
    let volume = u16::try_from(id).expect("small");
    let mut in_flight = Vec::new();
    loop {
        let len = [300, 4096, 9000, 70_000][usize::try_from(rng.below(4)).expect("small")];
        let reserved = if rng.below(5) == 0 { producer.reserve_bare() } else { producer.reserve(len) };
        if let Ok(mut reservation) = reserved {
            stamp(&mut reservation, id as u64, next);
            reservation.writing(volume, next << 16, 65536);
            ledger.set(id, Word::Submitted, next);
            in_flight.push((reservation, next));
            next += 1;
        }
        if in_flight.len() == IN_FLIGHT || (!in_flight.is_empty() && rng.below(3) == 0) {
            let (reservation, number) = in_flight.remove(0);
            if rng.below(200) == 0 {
                ring.close();
            }
            let desc = Desc {
                kind: 1,
                volume,
                len: len32(reservation.len()),
                offset: number << 16,
                length: 65536,
                time: number,
                ..Desc::default()
            };
            match producer.publish(reservation, &desc) {
                Ok(_) => ledger.set(id, Word::Acknowledged, number),
                Err(closed) => {
                    // All numbers from here on are tried again. The ledger stands for the missing marks: they come before the
                    // reservations go.
                    ledger.set(id, Word::Submitted, number - 1);
                    drop(closed);
                    in_flight.clear();
                    next = number;
                }
            }
        }
    }
}

fn consume(ring: &Ring, ledger: &Ledger, mut rng: Rng) {
    let mut consumer = ring.consumer().expect("first");
    let mut kept = Vec::new();
    let mut last = [0; PRODUCERS];
    loop {
        match consumer.next() {
            Some(entry) => {
                if entry.desc.kind == 1 {
                    last[usize::from(entry.desc.volume)] = entry.desc.time;
                }
                if rng.below(8) == 0 {
                    kept.extend(entry.payload);
                    kept.truncate(10);
                }
            }
            None if consumer.is_closed() => {
                let _ = consumer.reopen(&Desc { kind: 8, ..Desc::default() });
            }
            None => std::thread::yield_now(),
        }
        if rng.below(16) == 0 {
            kept.clear();
            for (id, number) in last.iter().enumerate().filter(|(_, number)| **number > 0) {
                ledger.set(id, Word::Consumed, *number);
            }
            consumer.free_to(consumer.position());
            // Tells the parent that time passes.
            if rng.below(4) == 0 {
                let _ = std::io::stderr().write_all(b".");
            }
        }
    }
}

/// Not a test: what the child runs. Ends by SIGKILL.
#[test]
#[ignore = "started by the kill test"]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let seed: u64 = std::env::var(SEED).expect("set by the parent").parse().expect("a number");
    let folder = PathBuf::from(folder);
    let ledger = Ledger::open(&folder);
    let ring = Ring::open(&folder.join("ring"), &identity()).expect("opens").resume();
    std::thread::scope(|scope| {
        for id in 0..PRODUCERS {
            let next = ledger.load(id, Word::Submitted) + 1;
            let (ring, ledger, producer) = (&ring, &ledger, ring.producer());
            let rng = Rng(seed ^ (id as u64 + 1) << 32);
            scope.spawn(move || produce(ring, &producer, ledger, id, rng, next));
        }
        consume(&ring, &ledger, Rng(seed));
    });
}

#[test]
fn ring_survives_kills_at_random_moments() {
    let folder = folder();
    let path = folder.path().join("ring");
    drop(Ring::create(&path, &ring_config()).expect("created"));
    let rounds = std::env::var(ROUNDS).map_or(ROUNDS_DEFAULT, |rounds| rounds.parse().expect("a number"));
    let mut rng = Rng(2024);
    let (mut reported, mut unpublished, mut left) = (0, 0, 0);
    for round in 0..rounds {
        run_and_kill(folder.path(), &mut rng);
        let recovery = check(&path, &Ledger::open(folder.path()), round % 4 == 3);
        reported += recovery.writing.len();
        unpublished += recovery.unpublished.len();
        left += recovery.head - recovery.freed;
    }
    assert!(reported > 0 && left > 0, "kills found work under way");
    eprintln_summary(rounds, reported, unpublished, left);
}

#[expect(clippy::print_stderr, reason = "how much the kills caught is what one wants to know of a run")]
fn eprintln_summary(rounds: u64, reported: usize, unpublished: usize, left: u64) {
    eprintln!("{rounds} kills: {reported} ranges reported, {unpublished} positions unpublished, {left} entries left");
}

/// Starts the child, lets it report progress a random number of times (none: killed while it starts), kills it.
fn run_and_kill(folder: &Path, rng: &mut Rng) {
    let mut child = Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "kill::child", "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .env(SEED, rng.next().to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut progress = child.stderr.take().expect("piped");
    let mut dots = [0];
    for _ in 0..rng.below(40) {
        if progress.read(&mut dots).expect("reads") == 0 || dots != *b"." {
            let mut message = String::new();
            let _ = progress.read_to_string(&mut message);
            panic!("the child failed: {message}");
        }
    }
    // A moment between two dots.
    (0..rng.below(20_000)).for_each(|i| {
        std::hint::black_box(i);
    });
    child.kill().expect("killed");
    assert_eq!(child.wait().expect("ends").signal(), Some(9), "it ends by the kill");
}

fn check(path: &Path, ledger: &Ledger, drain: bool) -> Recovery {
    let dormant = Ring::open(path, &identity()).expect("a killed ring opens");
    let recovery = dormant.recovery().clone();
    // Killed before `resume`: nothing was changed.
    drop(dormant);
    let dormant = Ring::open(path, &identity()).expect("opens again");
    assert_eq!(dormant.recovery(), &recovery);
    let ring = dormant.resume();
    let mut consumer = ring.consumer().expect("first");
    let mut published: [Vec<u64>; PRODUCERS] = Default::default();
    let (mut position, mut cells) = (recovery.freed, 0);
    while let Some(entry) = consumer.next() {
        assert_eq!(entry.position, position);
        position += 1;
        assert_eq!(entry.desc.kind == 0, recovery.unpublished.contains(&entry.position));
        if entry.desc.kind == 1 {
            let id = entry.desc.volume;
            published[usize::from(id)].push(entry.desc.time);
            if let Some(payload) = entry.payload {
                assert!(is_stamped(&payload, u64::from(id), entry.desc.time), "payload {id}/{}", entry.desc.time);
                cells += [4096, 16384, 131_072].into_iter().find(|cell| payload.len() <= *cell).expect("a class");
            }
        }
    }
    assert_eq!(position, recovery.head, "no hole after recovery");
    assert!(ring.used_bytes() >= cells as u64, "each payload has its cell");
    assert_eq!(ring.used_descriptors(), recovery.head - recovery.freed);
    check_ledger(&recovery, &published, ledger);
    if drain {
        for (id, numbers) in published.iter().enumerate() {
            numbers.last().into_iter().for_each(|last| ledger.set(id, Word::Consumed, *last));
        }
        consumer.free_to(position);
        assert_eq!((ring.used_bytes(), ring.used_descriptors()), (0, 0), "free counts are exact");
    }
    recovery
}

fn check_ledger(recovery: &Recovery, published: &[Vec<u64>; PRODUCERS], ledger: &Ledger) {
    for (id, numbers) in published.iter().enumerate() {
        let [submitted, acknowledged, consumed] =
            [Word::Submitted, Word::Acknowledged, Word::Consumed].map(|word| ledger.load(id, word));
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{id}: a gap in {numbers:?}");
        let first = numbers.first().copied().unwrap_or(consumed + 1);
        assert!(first <= consumed + 1, "{id}: {first} is the first left, {consumed} was consumed last");
        let last = numbers.last().copied().unwrap_or(consumed).max(consumed);
        assert!(acknowledged <= last, "{id}: {acknowledged} was acknowledged, {last} is the last in the stream");
        let volume = u16::try_from(id).expect("small");
        let ranges: Vec<_> = recovery.writing.iter().filter(|range| range.volume == volume).collect();
        for range in &ranges {
            let number = range.offset >> 16;
            assert_eq!(**range, WritingRange { volume, offset: number << 16, length: 65536 }, "a torn range");
            // `submitted` follows `writing`, so one more may be reported.
            assert!(
                number > last && number <= submitted.max(last) + IN_FLIGHT as u64,
                "{id}: {number} is not in flight"
            );
        }
        for number in last + 1..=submitted {
            assert!(
                ranges.iter().any(|range| range.offset >> 16 == number),
                "{id}: {number} was submitted, not reported"
            );
        }
        // The next child goes on behind the last published number.
        ledger.set(id, Word::Submitted, last);
        ledger.set(id, Word::Acknowledged, last);
    }
}
