//! Loom models: every interleaving (up to a bound on preemptions) of a few threads over the ring's algorithms.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test -p farshore-ring --lib models` (half a minute). Payload is stood for by loom's checked cells,
//! one per unit of the slab: an access that races with another one fails the model.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::layout::{CellHeader, DescriptorSlot, Geometry, INTENTS, Line, Lines, PAGE_BYTES, PageMap, UNIT_BYTES};
use crate::memory::{Backing, Memory, View};
use crate::shared::{Lane, Shared};
use crate::slab::Slab;
use crate::sync::AtomicU64;
use crate::{Consumer, Desc, Producer, Reservation};

/// A ring without a file.
struct Model {
    shared: Arc<Shared>,
    /// One per unit.
    cells: Arc<Vec<UnsafeCell<u64>>>,
}

impl Clone for Model {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), cells: Arc::clone(&self.cells) }
    }
}

impl Model {
    fn new(pages: u32) -> Self {
        Self::with(pages, 4)
    }

    fn with(pages: u32, descriptors: u64) -> Self {
        let geometry = Geometry { descriptors, pages };
        let word = || AtomicU64::new(0);
        let memory = Backing::memory(&Memory::new()).expect("unlocked");
        let bytes = pages as usize * PAGE_BYTES;
        let mapping = memory.map(0, bytes, crate::memory::Resident::All).expect("heap");
        let units = geometry.units();
        let header = || CellHeader {
            state: word(),
            offset: word(),
            length: word(),
            position: word(),
            readers: word(),
            spare: [word(), word(), word()],
        };
        let slot = || DescriptorSlot {
            sequence: word(),
            meta: word(),
            offset: word(),
            length: word(),
            time: word(),
            aux: word(),
            holder: word(),
            spare: word(),
        };
        let line = || Line(word());
        let lines = || Lines { head: line(), credits: line(), freed: line(), waiting: line(), clean: line() };
        let slab = Slab {
            states: View::owned(pages as usize, word),
            maps: View::owned(pages as usize, || PageMap { words: std::array::from_fn(|_| word()) }),
            headers: View::owned(units + 1, header),
            intents: View::owned(INTENTS / 64, word),
            base: mapping.at(0, bytes),
            reserved_pages: 0,
        };
        let shared = Shared {
            geometry,
            lines: View::owned(1, lines),
            descriptors: View::owned(crate::layout::index(descriptors), slot),
            slab,
            consumer_taken: AtomicBool::new(true),
            mapping,
            backing: Some(memory),
        };
        let cells = (0..units).map(|_| UnsafeCell::new(0)).collect();
        Self { shared: Arc::new(shared), cells: Arc::new(cells) }
    }

    fn producer(&self) -> Producer {
        Producer::new(Lane::new(&self.shared), 0)
    }

    fn consumer(&self) -> Consumer {
        Consumer::new(Lane::new(&self.shared))
    }

    fn units(&self, bytes: &[u8], capacity: usize) -> std::ops::Range<usize> {
        let at = bytes.as_ptr() as usize - self.shared.slab.base.as_ptr() as usize;
        at / UNIT_BYTES..(at + capacity) / UNIT_BYTES
    }

    /// Writes to the cell as its only owner.
    fn fill(&self, reservation: &Reservation, value: u64) {
        for unit in self.units(reservation, reservation.capacity()) {
            // SAFETY: that nobody else accesses it is what loom checks.
            self.cells[unit].with_mut(|cell| unsafe { *cell = value });
        }
    }

    fn check(&self, bytes: &[u8], value: u64) {
        for unit in self.units(bytes, bytes.len().next_multiple_of(UNIT_BYTES)) {
            // SAFETY: as above.
            self.cells[unit].with(|cell| assert_eq!(unsafe { *cell }, value));
        }
    }

    /// Reserves, fills and publishes one write of `len`; whether it is in the stream.
    fn write(&self, producer: &Producer, len: usize, number: u64) -> bool {
        let Ok(mut reservation) = producer.reserve(len) else { return false };
        self.fill(&reservation, number);
        reservation.writing(0, number, 1);
        let desc = Desc { kind: 1, len: u32::try_from(len).expect("short"), time: number, ..Desc::default() };
        producer.publish(reservation, &desc).is_ok()
    }

    /// Reads one entry and frees it; its number.
    fn read(&self, consumer: &mut Consumer) -> Option<u64> {
        let entry = consumer.next()?;
        if let Some(payload) = &entry.payload {
            self.check(payload, entry.desc.time);
        }
        consumer.free_to(entry.position + 1);
        Some(entry.desc.time)
    }
}

fn model(preemptions: usize, work: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(work);
}

/// Two producers and the consumer: positions in order, payload published before it is read, cells reused only after that.
#[test]
fn claim_publish_consume_free() {
    model(2, || {
        let ring = Model::new(1);
        let threads: Vec<_> = (1..=2)
            .map(|number| {
                let ring = ring.clone();
                thread::spawn(move || ring.write(&ring.producer(), 4096, number))
            })
            .collect();
        let mut consumer = ring.consumer();
        let mut seen = vec![];
        while seen.len() < 2 {
            match ring.read(&mut consumer) {
                Some(number) => seen.push(number),
                None => thread::yield_now(),
            }
        }
        threads.into_iter().for_each(|thread| assert!(thread.join().expect("ends"), "room for two"));
        seen.sort_unstable();
        assert_eq!(seen, [1, 2]);
        assert_eq!((ring.shared.slab.used_bytes(), ring.shared.position()), (0, 2));
    });
}

/// The slots' second lap: more writes than descriptors, so each one's room comes from a free.
#[test]
fn slots_are_reused_only_after_they_are_freed() {
    model(2, || {
        let ring = Model::new(1);
        let writer = {
            let ring = ring.clone();
            thread::spawn(move || {
                let producer = ring.producer();
                let mut number = 1;
                while number <= 5 {
                    if ring.write(&producer, 4096, number) { number += 1 } else { thread::yield_now() }
                }
            })
        };
        let mut consumer = ring.consumer();
        let mut next = 1;
        while next <= 5 {
            match ring.read(&mut consumer) {
                Some(number) => {
                    assert_eq!(number, next);
                    next += 1;
                }
                None => thread::yield_now(),
            }
        }
        writer.join().expect("ends");
        assert_eq!(ring.shared.slab.used_bytes(), 0);
    });
}

/// Invariant I5 in small: the first producer's write fails to be captured (it closes); whatever starts after that has no ticket
/// before the re-opening event.
#[test]
fn nothing_after_a_close_is_before_the_reopening() {
    model(3, || {
        let ring = Model::new(1);
        let done = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let closer = {
            let (ring, done) = (ring.clone(), Arc::clone(&done));
            thread::spawn(move || {
                assert!(ring.producer().publish_or_close(None, &Desc::default()).is_err());
                // The guest request completes: relaxed on purpose, the head word alone must order.
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            })
        };
        let dependent = {
            let ring = ring.clone();
            thread::spawn(move || {
                let completed = done.load(std::sync::atomic::Ordering::Relaxed);
                let producer = ring.producer();
                let reservation = producer.reserve_marker(0).expect("room");
                (completed, producer.publish(reservation, &Desc { kind: 1, ..Desc::default() }).ok())
            })
        };
        let mut consumer = ring.consumer();
        let reopened = consumer.reopen(&Desc { kind: 8, ..Desc::default() }).ok();
        closer.join().expect("ends");
        let (completed, ticket) = dependent.join().expect("ends");
        if completed && let Some(ticket) = ticket {
            let event = reopened.expect("only a re-opening lets it in");
            assert!(event < ticket, "the write depends on one that is not in the stream");
        }
        let count = u64::from(reopened.is_some()) + u64::from(ticket.is_some());
        assert_eq!(ring.shared.position(), count);
        for _ in 0..count {
            assert!(consumer.next().is_some(), "all claimed positions are published in the end");
        }
    });
}

/// Claims against a close: each is in the stream or fails, and the reservation comes back then.
#[test]
fn close_against_claims() {
    model(3, || {
        let ring = Model::new(1);
        let threads: Vec<_> = (1..=2)
            .map(|number| {
                let ring = ring.clone();
                thread::spawn(move || u64::from(ring.write(&ring.producer(), 4096, number)))
            })
            .collect();
        ring.shared.close();
        let after_close = ring.shared.position();
        let written: u64 = threads.into_iter().map(|thread| thread.join().expect("ends")).sum();
        assert_eq!((ring.shared.position(), after_close), (written, written), "the close is the last change");
        assert_eq!(ring.shared.slab.used_bytes(), written * UNIT_BYTES as u64);
    });
}

/// The consumer frees a page's last cell while producers take cells of two classes from it: the page changes class in between,
/// and no unit has two owners (loom's cells see it).
#[test]
fn slab_pages_change_class_safely() {
    model(2, || {
        let ring = Model::new(1);
        let first = ring.producer().reserve(4096).expect("empty");
        ring.fill(&first, 1);
        let threads: Vec<_> = [4096, 8192]
            .into_iter()
            .map(|len| {
                let ring = ring.clone();
                thread::spawn(move || {
                    if let Ok(reservation) = ring.producer().reserve(len) {
                        ring.fill(&reservation, 2);
                    }
                })
            })
            .collect();
        drop(first);
        threads.into_iter().for_each(|thread| thread.join().expect("ends"));
        assert_eq!(ring.shared.slab.used_bytes(), 0);
    });
}

/// The same with old and new cell under different words of the page's map: only the state word orders them.
#[test]
fn slab_classes_in_different_words() {
    model(3, || {
        let ring = Model::with(1, 8);
        let producer = ring.producer();
        let mut cells: Vec<_> = (0..3).map(|_| producer.reserve(4096).expect("four in a page")).collect();
        let last = cells.pop().expect("three");
        drop(cells);
        let giver = {
            let ring = ring.clone();
            thread::spawn(move || {
                ring.fill(&last, 1);
                drop(last);
            })
        };
        let held: Vec<_> = (0..2).filter_map(|_| producer.reserve(8192).ok()).collect();
        held.iter().for_each(|reservation| ring.fill(reservation, 2));
        drop(held);
        giver.join().expect("ends");
        assert_eq!(ring.shared.slab.used_bytes(), 0);
    });
}

/// Cells handed from one owner to the next through a full page: the taker finds a bit, and comes after the giver.
#[test]
fn slab_hand_over() {
    model(2, || {
        let ring = Model::new(1);
        let producer = ring.producer();
        let mut held: Vec<_> = (0..2).map(|_| producer.reserve(8192).expect("two of 8 KiB in a page of 16")).collect();
        held.iter().for_each(|reservation| ring.fill(reservation, 1));
        let threads: Vec<_> = held
            .drain(..)
            .map(|reservation| {
                let ring = ring.clone();
                thread::spawn(move || {
                    drop(reservation);
                    if let Ok(again) = ring.producer().reserve(8192) {
                        ring.fill(&again, 2);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("ends"));
        assert_eq!(ring.shared.slab.used_bytes(), 0);
        assert_eq!(ring.shared.credits().load(std::sync::atomic::Ordering::Relaxed), 0);
    });
}

/// A reader outlives `free_to`: the cell goes to its next owner only after the reader is gone.
#[test]
fn readers_keep_their_cell() {
    model(3, || {
        let ring = Model::new(1);
        assert!(ring.write(&ring.producer(), 8192, 1));
        let mut consumer = ring.consumer();
        let payload = consumer.next().and_then(|entry| entry.payload).expect("published");
        let reader = {
            let ring = ring.clone();
            thread::spawn(move || {
                ring.check(&payload, 1);
                drop(payload);
            })
        };
        let taker = {
            let ring = ring.clone();
            thread::spawn(move || {
                let producer = ring.producer();
                let held: Vec<_> = (0..2).filter_map(|_| producer.reserve(8192).ok()).collect();
                held.iter().for_each(|reservation| ring.fill(reservation, 2));
            })
        };
        consumer.free_to(1);
        reader.join().expect("ends");
        taker.join().expect("ends");
        assert_eq!(ring.shared.slab.used_bytes(), 0);
    });
}

/// The asleep flag: if the consumer decides to sleep, a producer that publishes is told to wake it.
#[test]
fn no_wakeup_is_lost() {
    model(3, || {
        let ring = Model::new(1);
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let ring = ring.clone();
                thread::spawn(move || {
                    let producer = ring.producer();
                    let reservation = producer.reserve_marker(0).expect("room");
                    producer.publish(reservation, &Desc::default()).expect("open");
                    producer.consumer_sleeping()
                })
            })
            .collect();
        let mut consumer = ring.consumer();
        let mut read = 0;
        while consumer.next().is_some() {
            read += 1;
        }
        let asleep = consumer.prepare_sleep();
        let woken = threads.into_iter().filter_map(|t| t.join().expect("ends").then_some(())).count();
        if asleep && read < 2 {
            assert_eq!(woken, 1, "exactly one producer wakes it");
        }
    });
}

/// The same for closing.
#[test]
fn closing_wakes_the_consumer() {
    model(3, || {
        let ring = Model::new(1);
        let closer = {
            let ring = ring.clone();
            thread::spawn(move || {
                ring.shared.close();
                ring.producer().consumer_sleeping()
            })
        };
        let mut consumer = ring.consumer();
        let asleep = consumer.prepare_sleep();
        let woken = closer.join().expect("ends");
        assert!(!asleep || woken, "asleep and not woken");
    });
}
