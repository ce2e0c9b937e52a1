//! Every kill point between two stores to shared memory, one after the other.
//!
//! A seeded script of calls runs over heap memory and is stopped before its n-th store, for every n; the memory at that moment
//! is opened as the next process would, and compared with what the script knew: which calls had returned, which one was under
//! way. The recovery is killed before every one of its stores as well. (Threads meeting each other are for the models and
//! the kill test.)

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::sync::kill_before;
use crate::{Desc, Memory, Reservation, Ring, RingConfig, RingIdentity};

/// Scripts, and stores from one kill to the next; fewer for an interpreter.
const SEEDS: u64 = if cfg!(miri) { 1 } else { 4 };
const STEP: usize = if cfg!(miri) { 97 } else { 1 };

const IDENTITY: RingIdentity =
    RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 5, generation: 6 };

struct Rng(u64);

impl Rng {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What the script knows. `maybe_*`: a call is under way, it may or may not have had its effect.
#[derive(Default, Debug, Clone)]
struct Known {
    /// Position → number of what was published there.
    published: BTreeMap<u64, u64>,
    maybe_published: Option<u64>,
    /// Numbers whose range was noted and that are neither published nor dropped.
    writing: BTreeSet<u64>,
    /// Being noted, or being dropped.
    maybe_writing: Option<u64>,
    freed: u64,
    maybe_freed: Option<u64>,
    closed: bool,
    maybe_closed: Option<bool>,
    reopening_at: Option<u64>,
}

fn config() -> RingConfig {
    RingConfig { slab_bytes: 3 << 20, descriptors: Some(8), ..RingConfig::new(IDENTITY) }
}

fn desc(number: u64, len: usize) -> Desc {
    Desc { kind: 1, len: u32::try_from(len).expect("short"), offset: number << 16, time: number, ..Desc::default() }
}

/// Reopening events are numbered 0.
fn script(ring: &Ring, seed: u64, known: &RefCell<Known>) {
    let mut rng = Rng(seed);
    let producer = ring.producer();
    let mut consumer = ring.consumer().expect("first");
    let mut held: Vec<(Reservation, u64)> = vec![];
    let mut kept = vec![];
    for number in 1..=24_u64 {
        let reserved = match rng.below(5) {
            0 => producer.reserve_bare(),
            1 => producer.reserve(100_000),
            _ => producer.reserve(3000),
        };
        if let Ok(mut reservation) = reserved {
            reservation.iter_mut().take(8).zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
            if rng.below(8) > 0 {
                known.borrow_mut().maybe_writing = Some(number);
                reservation.writing(9, number << 16, 65536 + number);
                let mut known = known.borrow_mut();
                known.maybe_writing = None;
                known.writing.insert(number);
            }
            held.push((reservation, number));
        }
        if rng.below(3) > 0 && !held.is_empty() {
            let pick = usize::try_from(rng.below(held.len() as u64)).expect("small");
            let (reservation, number) = held.swap_remove(pick);
            if rng.below(6) == 0 {
                give_back(number, known, || reservation.abandon());
            } else {
                known.borrow_mut().maybe_published = Some(number);
                let desc = desc(number, reservation.len());
                let result = producer.publish(reservation, &desc);
                known.borrow_mut().maybe_published = None;
                match result {
                    Ok(position) => {
                        let mut known = known.borrow_mut();
                        known.published.insert(position, number);
                        known.writing.remove(&number);
                    }
                    Err(closed) => give_back(number, known, || drop(closed)),
                }
            }
        }
        if rng.below(6) == 0 {
            known.borrow_mut().maybe_closed = Some(true);
            ring.close();
            let mut known = known.borrow_mut();
            (known.closed, known.maybe_closed) = (true, None);
        }
        if rng.below(3) == 0 && ring.is_closed() {
            let head = ring.head();
            {
                let mut known = known.borrow_mut();
                (known.maybe_closed, known.reopening_at) = (Some(false), Some(head));
            }
            let result = consumer.reopen(&desc(0, 0));
            let mut known = known.borrow_mut();
            (known.maybe_closed, known.reopening_at) = (None, None);
            if let Ok(position) = result {
                assert_eq!(position, head);
                known.closed = false;
                known.published.insert(position, 0);
            }
        }
        while rng.below(4) > 0 {
            let Some(entry) = consumer.next() else { break };
            if rng.below(3) == 0 {
                kept.extend(entry.payload);
            }
        }
        if rng.below(3) == 0 {
            let to = consumer.freed() + rng.below(consumer.position() - consumer.freed() + 1);
            known.borrow_mut().maybe_freed = Some(to);
            consumer.free_to(to);
            let mut known = known.borrow_mut();
            (known.freed, known.maybe_freed) = (to, None);
            if rng.below(2) == 0 {
                kept.clear();
            }
        }
    }
    for (reservation, number) in held {
        give_back(number, known, || drop(reservation));
    }
}

fn give_back(number: u64, known: &RefCell<Known>, work: impl FnOnce()) {
    {
        // Marked missing at this moment, in a real filter.
        let mut known = known.borrow_mut();
        known.writing.remove(&number);
        known.maybe_writing = Some(number);
    }
    work();
    known.borrow_mut().maybe_writing = None;
}

/// Opens the image and compares; `seen`: whether an unpublished position was there.
fn check(image: &Memory, known: &Known) -> bool {
    let dormant = Ring::open_memory(image, &IDENTITY).expect("opens");
    let recovery = dormant.recovery().clone();
    let opening = recovery.closed && known.reopening_at.is_some();
    assert!(recovery.freed == known.freed || Some(recovery.freed) == known.maybe_freed, "{recovery:?} {known:?}");
    assert!(recovery.closed == known.closed || Some(recovery.closed) == known.maybe_closed, "{recovery:?} {known:?}");
    assert!(recovery.unpublished.len() <= usize::from(known.maybe_published.is_some()), "{recovery:?} {known:?}");
    // What a caller is told is in the kill-safe bitmaps when it resumes; here only the ring's part is looked at.
    let ring = dormant.resume();
    let entries = entries(&ring, &recovery.unpublished);
    for (position, number) in known.published.range(recovery.freed..) {
        assert_eq!(entries.get(position), Some(number), "{position} was acknowledged; {recovery:?} {known:?}");
    }
    for (position, number) in &entries {
        let is_known = known.published.get(position) == Some(number);
        let under_way = Some(*number) == known.maybe_published;
        let event = *number == 0 && known.reopening_at == Some(*position);
        assert!(is_known || under_way || event, "{position} = {number} appeared; {recovery:?} {known:?}");
    }
    if let Some(position) = known.reopening_at.filter(|_| !recovery.closed) {
        assert_eq!(entries.get(&position), Some(&0), "open, so the event is there");
    }
    assert!(!opening || !entries.contains_key(&recovery.head), "nothing at the head");
    check_writing(&recovery, &entries, known);
    drain(&ring);
    !recovery.unpublished.is_empty()
}

fn check_writing(recovery: &crate::Recovery, entries: &BTreeMap<u64, u64>, known: &Known) {
    let reported: BTreeSet<u64> = recovery.writing.iter().map(|range| range.offset >> 16).collect();
    assert_eq!(reported.len(), recovery.writing.len(), "each once");
    for range in &recovery.writing {
        let number = range.offset >> 16;
        assert_eq!((range.volume, range.offset, range.length), (9, number << 16, 65536 + number), "a torn range");
        let known_to_write = known.writing.contains(&number) || known.maybe_writing == Some(number);
        assert!(known_to_write, "{number} was reported; {recovery:?} {known:?}");
        assert!(!entries.values().any(|n| *n == number), "{number} is in the stream");
    }
    for number in &known.writing {
        let in_stream = entries.values().any(|n| n == number);
        // A bare or celled write that is published *and freed* cannot be under way.
        assert!(in_stream || reported.contains(number), "{number} is forgotten; {recovery:?} {known:?}");
    }
}

/// Position → number of everything unfreed; no-ops checked and left out.
fn entries(ring: &Ring, unpublished: &[u64]) -> BTreeMap<u64, u64> {
    let mut consumer = ring.consumer().expect("first");
    let mut found = BTreeMap::new();
    let mut cells = 0;
    let mut next = ring.freed();
    while let Some(entry) = consumer.next() {
        assert_eq!(entry.position, next, "in order");
        next += 1;
        if unpublished.contains(&entry.position) {
            assert!(entry.desc == Desc::default() && entry.payload.is_none());
            continue;
        }
        let number = entry.desc.time;
        assert_eq!(entry.desc, desc(number, entry.payload.as_ref().map_or(0, |p| p.len())));
        if let Some(payload) = entry.payload {
            assert_eq!(payload[..8], number.to_le_bytes(), "the cell's own content");
            cells += payload.len().next_power_of_two();
        }
        found.insert(entry.position, number);
    }
    assert_eq!(next, ring.head(), "no hole");
    assert_eq!(ring.used_bytes(), cells as u64);
    assert_eq!(ring.used_descriptors(), ring.head() - ring.freed());
    found
}

/// Everything can be freed, and then every cell and descriptor can be had.
fn drain(ring: &Ring) {
    let mut consumer = ring.consumer().expect("the only one again");
    while consumer.next().is_some() {}
    consumer.free_to(consumer.position());
    assert_eq!((ring.used_bytes(), ring.used_descriptors()), (0, 0));
    if ring.is_closed() {
        consumer.reopen(&Desc::default()).expect("room for the event");
    }
    let producer = ring.producer();
    let large: Vec<_> = (0..4).map(|_| producer.reserve(256 << 10).expect("whole pages are free")).collect();
    drop(large);
    assert_eq!(ring.used_bytes(), 0);
}

#[test]
fn every_kill_point_of_the_calls() {
    let (mut points, mut unpublished) = (0, 0);
    for seed in 0..SEEDS {
        for stores in (0..).step_by(STEP) {
            let memory = Memory::new();
            let ring = Ring::create_in_memory(&memory, &config()).expect("created");
            let known = RefCell::default();
            let killed = kill_before(stores, || script(&ring, seed, &known));
            drop(ring);
            points += 1;
            unpublished += usize::from(check(&memory, &known.borrow()));
            if !killed {
                break;
            }
        }
    }
    assert!(
        cfg!(miri) || (points > 1200 && unpublished > 80),
        "{points} kill points, {unpublished} between claim and publication"
    );
}

/// Goal: killed inside `resume`, the next recovery ends in the same ring.
/// Method: kill the script at some of its points; then kill the recovery before each of its stores (they are thousands, most of
/// them equal: the headers' sweep), and compare the entries at last.
#[test]
fn every_kill_point_of_the_recovery() {
    for seed in 0..SEEDS.min(2) {
        for stores in (40 + seed..400).step_by(51) {
            let memory = Memory::new();
            let ring = Ring::create_in_memory(&memory, &config()).expect("created");
            let known = RefCell::default();
            kill_before(stores, || script(&ring, seed, &known));
            // SAFETY: this is the only thread that knows the memory, and the script with its reservations is over.
            let image = unsafe { memory.image() };
            let known = known.borrow().clone();
            for stores in (0..60).chain((60..1700).step_by(331)) {
                // SAFETY: as above; no ring over the image is open.
                let image = unsafe { image.image() };
                let dormant = Ring::open_memory(&image, &IDENTITY).expect("opens");
                let first = dormant.recovery().clone();
                let killed = kill_before(stores, || drop(dormant.resume()));
                let dormant = Ring::open_memory(&image, &IDENTITY).expect("opens again");
                let second = dormant.recovery().clone();
                assert_eq!((first.freed, first.head, first.closed), (second.freed, second.head, second.closed));
                assert!(second.writing.iter().all(|range| first.writing.contains(range)), "nothing new to report");
                assert!(second.unpublished.iter().all(|position| first.unpublished.contains(position)));
                let ring = dormant.resume();
                let entries = entries(&ring, &first.unpublished);
                assert!(
                    known
                        .published
                        .range(first.freed..)
                        .all(|(position, number)| entries.get(position) == Some(number))
                );
                drain(&ring);
                if !killed {
                    break;
                }
            }
        }
    }
}

/// Two threads and the interpreter's eyes: payload handed from a producer to the consumer and back through the slab.
#[test]
fn hand_over_between_threads() {
    let rounds: u64 = if cfg!(miri) { 40 } else { 20_000 };
    let ring = Ring::create_in_memory(&Memory::new(), &config()).expect("created");
    std::thread::scope(|scope| {
        let producer = ring.producer();
        scope.spawn(move || {
            let mut number = 1_u64;
            while number <= rounds {
                let Ok(mut reservation) = producer.reserve(16) else {
                    std::thread::yield_now();
                    continue;
                };
                reservation[..8].copy_from_slice(&number.to_le_bytes());
                producer.publish(reservation, &desc(number, 16)).expect("never closed");
                number += 1;
            }
        });
        let mut consumer = ring.consumer().expect("first");
        let mut kept = None;
        let mut next = 1;
        while next <= rounds {
            let Some(entry) = consumer.next() else {
                std::thread::yield_now();
                continue;
            };
            let payload = entry.payload.expect("each has one");
            assert_eq!((entry.desc.time, &payload[..8]), (next, &next.to_le_bytes()[..]));
            consumer.free_to(entry.position + 1);
            // Read once more after the free, and drop the one before.
            if let Some((kept, number)) = kept.replace((payload, next)) {
                assert_eq!(kept[..8], u64::to_le_bytes(number));
            }
            next += 1;
        }
    });
    assert_eq!((ring.used_bytes(), ring.used_descriptors()), (0, 0));
}
