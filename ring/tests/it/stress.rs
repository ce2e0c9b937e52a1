//! Threads hammering one ring.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use farshore_ring::{Consumer, Desc, Full, Memory, Producer, Ring};

use crate::support::{Rng, config, is_stamped, len32, stamp};

const PRODUCERS: usize = 4;
const WRITES: u64 = 6000;

/// Publishes WRITES numbered records; a number that found no room or a closed ring is tried again.
fn produce(ring: &Ring, producer: &Producer, id: u64) {
    let mut rng = Rng(id + 100);
    let mut number = 0;
    let mut in_flight = Vec::new();
    while number < WRITES || !in_flight.is_empty() {
        if number < WRITES && in_flight.len() < 8 {
            let len = match rng.below(8) {
                0 => rng.below(262_144) + 1,
                1..4 => rng.below(65_536) + 1,
                _ => rng.below(4096) + 1,
            };
            let reserved = match rng.below(16) {
                0 => producer.reserve_bare(),
                _ => producer.reserve(usize::try_from(len).expect("small")),
            };
            match reserved {
                Ok(mut reservation) => {
                    stamp(&mut reservation, id, number);
                    let offset = number << 12;
                    if rng.below(2) == 0 {
                        reservation.writing(u16::try_from(id).expect("small"), offset, 4096);
                    }
                    in_flight.push((reservation, number));
                    number += 1;
                    continue;
                }
                Err(Full::TooLong) => panic!("lengths are in range"),
                Err(Full::Descriptors | Full::Cells | Full::Intents) => {}
            }
        }
        // Oldest first, so that a producer's numbers are in the order of positions.
        if in_flight.is_empty() {
            std::thread::yield_now();
            continue;
        }
        let (reservation, n) = in_flight.remove(0);
        assert!(is_stamped(&reservation, id, n), "someone else wrote to our cell");
        if rng.below(64) == 0 {
            ring.close();
        }
        let desc = Desc { kind: 1, len: len32(reservation.len()), aux: id, time: n, ..Desc::default() };
        // Refused by a closed ring: the reservation comes back and is tried again.
        let mut next = Some(reservation);
        while let Some(reservation) = next.take() {
            if let Err(closed) = producer.publish(reservation, &desc) {
                next = closed.reservation;
                std::thread::yield_now();
            }
        }
    }
}

/// Takes everything; returns how often it re-opened.
fn consume(consumer: &mut Consumer, done: &AtomicU64) -> u64 {
    let mut rng = Rng(7);
    let mut next = [0_u64; PRODUCERS];
    let mut kept = Vec::new();
    let (mut position, mut reopened) = (0, 0);
    loop {
        let finished = done.load(Ordering::Acquire) == PRODUCERS as u64;
        let Some(entry) = consumer.next() else {
            if consumer.is_closed() && consumer.reopen(&Desc { kind: 8, ..Desc::default() }).is_ok() {
                reopened += 1;
                continue;
            }
            consumer.free_to(consumer.position());
            kept.clear();
            if finished && consumer.next().is_none() && !consumer.is_closed() {
                break;
            }
            consumer.rewind();
            std::thread::yield_now();
            continue;
        };
        assert_eq!(entry.position, position, "no gap, no repeat");
        position += 1;
        if entry.desc.kind == 1 {
            let id = usize::try_from(entry.desc.aux).expect("small");
            assert_eq!(entry.desc.time, next[id], "a producer's own order");
            next[id] += 1;
            if let Some(payload) = entry.payload {
                assert!(is_stamped(&payload, entry.desc.aux, entry.desc.time), "content of {}/{}", id, entry.desc.time);
                if rng.below(4) == 0 {
                    kept.push((payload, entry.desc));
                }
            }
        }
        if rng.below(8) == 0 {
            consumer.free_to(position - rng.below(1 + (position - consumer.freed()).min(4)));
        }
        if kept.len() > 6 {
            kept.drain(..).for_each(|(p, d)| assert!(is_stamped(&p, d.aux, d.time), "freed under a reader"));
        }
    }
    assert_eq!(next, [WRITES; PRODUCERS]);
    reopened
}

/// Goal: order, nothing lost, no cell with two owners; everything is free in the end.
/// Method: producers stamp cells and check the stamp before publishing, the consumer checks it again, and again before it lets
/// a kept one go; a producer closes now and then and the consumer re-opens.
#[test]
fn nothing_is_lost_reordered_or_shared() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(6, 256)).expect("created");
    let done = AtomicU64::new(0);
    let mut consumer = ring.consumer().expect("first");
    let reopened = std::thread::scope(|scope| {
        for id in 0..PRODUCERS as u64 {
            let (ring, done, producer) = (&ring, &done, ring.producer());
            scope.spawn(move || {
                produce(ring, &producer, id);
                done.fetch_add(1, Ordering::Release);
            });
        }
        consume(&mut consumer, &done)
    });
    assert!(reopened > 10, "the ring was closed often enough to matter: {reopened}");
    assert_eq!((ring.used_bytes(), ring.used_descriptors()), (0, 0));
    assert_eq!(ring.head(), ring.freed());
}

/// Goal: a claim is either before a close (and in the stream) or fails.
/// Method: per round, threads publish until they are refused; the head afterwards is the number of successes.
#[test]
fn close_is_one_moment_for_everybody() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(2, 1024)).expect("created");
    let mut consumer = ring.consumer().expect("first");
    for _ in 0..300 {
        let before = ring.head();
        let barrier = Barrier::new(4);
        let successes = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let producer = ring.producer();
                scope.spawn(|| {
                    barrier.wait();
                    let producer = producer;
                    while let Ok(reservation) = producer.reserve_marker(0) {
                        match producer.publish(reservation, &Desc::default()) {
                            Ok(_) => successes.fetch_add(1, Ordering::Relaxed),
                            Err(_closed) => break,
                        };
                    }
                });
            }
            barrier.wait();
            ring.close();
        });
        assert_eq!(ring.head() - before, successes.load(Ordering::Relaxed));
        while consumer.next().is_some() {}
        consumer.free_to(consumer.position());
        consumer.reopen(&Desc::default()).expect("closed, and room");
    }
}

/// Goal: with the asleep flag no wake-up is lost.
/// Method: the consumer parks whenever `prepare_sleep` allows; the producer unparks only when told to. A lost one hangs here.
#[test]
fn no_wakeup_is_lost() {
    let ring = Ring::create_in_memory(&Memory::new(), &config(1, 64)).expect("created");
    let mut consumer = ring.consumer().expect("first");
    let notified = AtomicBool::new(false);
    let count = 30_000;
    std::thread::scope(|scope| {
        let consumer_thread = scope.spawn(|| {
            let mut seen = 0;
            while seen < count {
                while consumer.next().is_some() {
                    seen += 1;
                }
                consumer.free_to(consumer.position());
                if seen < count && consumer.prepare_sleep() {
                    while !notified.swap(false, Ordering::Acquire) {
                        std::thread::park();
                    }
                    consumer.woke();
                }
            }
        });
        let producer = ring.producer();
        let mut published = 0;
        while published < count {
            let Ok(reservation) = producer.reserve_bare() else {
                std::thread::yield_now();
                continue;
            };
            producer.publish(reservation, &Desc::default()).expect("never closed");
            published += 1;
            if producer.consumer_sleeping() {
                notified.store(true, Ordering::Release);
                consumer_thread.thread().unpark();
            }
        }
    });
}
