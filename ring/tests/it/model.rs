//! The ring against a naive model, kills included (a copy of the file, opened beside the living ring, is what a kill leaves).

use std::collections::VecDeque;
use std::path::PathBuf;

use farshore_ring::{CellRef, Consumer, Desc, Full, Producer, Reservation, Ring, WritingRange};
use proptest::prelude::*;

use crate::support::{config, folder, identity, is_stamped, len32, stamp};

const DESCRIPTORS: u64 = 16;
const SLAB_MIB: u64 = 3;
const MARKER_RESERVE: u64 = 2;
const REOPEN_RESERVE: u64 = 1;

#[derive(Clone, Debug)]
enum Op {
    Reserve(usize),
    ReserveBare,
    ReserveMarker(usize),
    Writing(usize),
    Publish(usize),
    Abandon(usize),
    FoundNoRoom,
    Reopen,
    Next { keep: bool },
    DropKept,
    Free(u64),
    Rewind,
    Kill { resume: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![1..=4096_usize, 4097..=65536_usize, 200_000..=262_144_usize];
    prop_oneof![
        8 => len.prop_map(Op::Reserve),
        2 => Just(Op::ReserveBare),
        2 => (0..=4096_usize).prop_map(Op::ReserveMarker),
        6 => any::<usize>().prop_map(Op::Writing),
        12 => any::<usize>().prop_map(Op::Publish),
        2 => any::<usize>().prop_map(Op::Abandon),
        1 => Just(Op::FoundNoRoom),
        3 => Just(Op::Reopen),
        10 => any::<bool>().prop_map(|keep| Op::Next { keep }),
        2 => Just(Op::DropKept),
        5 => (0..6_u64).prop_map(Op::Free),
        1 => Just(Op::Rewind),
        2 => any::<bool>().prop_map(|resume| Op::Kill { resume }),
    ]
}

#[derive(PartialEq, Eq, Clone, Copy, Debug)]
enum Kind {
    Write,
    Bare,
    Marker,
}

struct Held {
    reservation: Reservation,
    kind: Kind,
    number: u64,
    range: Option<WritingRange>,
}

/// Where a cell lies in the slab, and its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Place {
    at: usize,
    bytes: usize,
}

/// A published position.
#[derive(Clone, Debug)]
struct Published {
    desc: Desc,
    number: u64,
    cell: Option<Place>,
}

struct World {
    _folder: tempfile::TempDir,
    path: PathBuf,
    ring: Ring,
    producer: Producer,
    consumer: Option<Consumer>,
    held: Vec<Held>,
    /// Positions freed.. in order.
    queue: VecDeque<Published>,
    freed: u64,
    /// Read, as an index into `queue`.
    read: usize,
    closed: bool,
    /// Kept by readers: (number, position, reference).
    kept: Vec<(u64, Option<Place>, CellRef)>,
    numbers: u64,
    kills: u64,
}

impl World {
    fn new() -> Self {
        let folder = folder();
        let path = folder.path().join("ring");
        let ring = Ring::create(&path, &config(SLAB_MIB, DESCRIPTORS)).expect("created");
        let (producer, consumer) = (ring.producer(), ring.consumer());
        Self {
            _folder: folder,
            path,
            ring,
            producer,
            consumer,
            held: vec![],
            queue: VecDeque::new(),
            freed: 0,
            read: 0,
            closed: false,
            kept: vec![],
            numbers: 0,
            kills: 0,
        }
    }

    fn head(&self) -> u64 {
        self.freed + self.queue.len() as u64
    }

    fn credits(&self) -> u64 {
        (self.held.len() + self.queue.len()) as u64
    }

    fn consumer(&mut self) -> &mut Consumer {
        self.consumer.as_mut().expect("there is always one")
    }

    fn reserve(&mut self, kind: Kind, len: usize) {
        let reserve = if kind == Kind::Marker { REOPEN_RESERVE } else { MARKER_RESERVE };
        let room = self.credits() < DESCRIPTORS - reserve;
        let got = match kind {
            Kind::Write => self.producer.reserve(len),
            Kind::Bare => self.producer.reserve_bare(),
            Kind::Marker => self.producer.reserve_marker(len),
        };
        match got {
            Ok(mut reservation) => {
                assert!(room && reservation.len() == len);
                self.numbers += 1;
                stamp(&mut reservation, 0, self.numbers);
                self.held.push(Held { reservation, kind, number: self.numbers, range: None });
            }
            Err(Full::Descriptors) => assert!(!room),
            Err(Full::Cells) => assert!(room && kind == Kind::Write && self.no_cell_for(len)),
            Err(other) => panic!("{other}"),
        }
    }

    fn publish(&mut self, held: Held) {
        let kind = match held.kind {
            Kind::Write => 1,
            Kind::Bare => 2,
            Kind::Marker => 7,
        };
        let desc = Desc {
            kind,
            flags: 3,
            volume: 11,
            len: len32(held.reservation.len()),
            offset: held.number << 20,
            length: held.number,
            time: held.number ^ 0xFFFF,
            aux: !held.number,
        };
        let published = Published { desc, number: held.number, cell: self.place(&held.reservation) };
        let result = self.producer.publish_or_close(Some(held.reservation), &desc);
        if self.closed {
            assert!(result.is_err());
        } else {
            assert_eq!(result.expect("open"), self.head());
            self.queue.push_back(published);
        }
    }

    fn next(&mut self, keep: bool) {
        let expected = self.queue.get(self.read).cloned();
        let position = self.freed + self.read as u64;
        let Some(entry) = self.consumer().next() else {
            assert!(expected.is_none());
            return;
        };
        let expected = expected.expect("an entry that was published");
        assert_eq!((entry.position, entry.desc), (position, expected.desc));
        assert_eq!(entry.payload.is_some(), expected.cell.is_some());
        if let Some(payload) = entry.payload {
            assert!(payload.len() == expected.desc.len as usize && is_stamped(&payload, 0, expected.number));
            if keep {
                self.kept.push((expected.number, expected.cell, payload.clone()));
            }
        }
        self.read += 1;
    }

    fn kill(&mut self, resume: bool) {
        self.kills += 1;
        let copy = self.path.with_extension(format!("{}", self.kills));
        std::fs::copy(&self.path, &copy).expect("copied");
        if !resume {
            // Looked at and dropped: the next open finds the same.
            drop(Ring::open(&copy, &identity()).expect("opens"));
        }
        let dormant = Ring::open(&copy, &identity()).expect("opens");
        let found = dormant.recovery().clone();
        let mut writing: Vec<_> = self.held.iter().filter_map(|held| held.range).collect();
        writing.sort_unstable();
        assert_eq!(found.writing, writing);
        assert!(found.unpublished.is_empty());
        assert_eq!((found.freed, found.head, found.closed), (self.freed, self.head(), self.closed));
        // Everything of the old process goes, then the new one takes over.
        self.kept.clear();
        self.held.clear();
        self.consumer = None;
        self.ring = dormant.resume();
        self.producer = self.ring.producer();
        self.consumer = self.ring.consumer();
        self.read = 0;
        self.path = copy;
        let unfreed = self.queue.len();
        (0..unfreed).for_each(|_| self.next(false));
        self.consumer().rewind();
        self.read = 0;
    }

    fn place(&self, reservation: &Reservation) -> Option<Place> {
        let base = self.ring.slab_region().0.as_ptr() as usize;
        let at = (reservation.as_ptr() as usize).wrapping_sub(base);
        (reservation.capacity() > 0).then_some(Place { at, bytes: reservation.capacity() })
    }

    /// All cells that somebody owns, sorted; a published one that is also kept counts once.
    fn cells(&self) -> Vec<Place> {
        let held = self.held.iter().filter_map(|held| self.place(&held.reservation));
        let mut cells: Vec<_> = held.chain(self.queue.iter().filter_map(|published| published.cell)).collect();
        let owned = cells.len();
        cells.sort_unstable();
        cells.dedup();
        assert_eq!(cells.len(), owned, "a cell with two owners");
        cells.extend(self.kept.iter().filter_map(|kept| kept.1));
        cells.sort_unstable();
        cells.dedup();
        assert!(cells.windows(2).all(|pair| pair[0].at + pair[0].bytes <= pair[1].at), "cells overlap: {cells:?}");
        cells
    }

    /// No page for writes is unassigned, and those with cells large enough are full.
    fn no_cell_for(&self, len: usize) -> bool {
        let cells = self.cells();
        (1..usize::try_from(SLAB_MIB).expect("small")).all(|page| {
            let in_page: Vec<_> = cells.iter().filter(|cell| cell.at >> 20 == page).collect();
            in_page.first().is_some_and(|first| first.bytes < len || in_page.len() * first.bytes == 1 << 20)
        })
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Reserve(len) => self.reserve(Kind::Write, len),
            Op::ReserveBare => self.reserve(Kind::Bare, 0),
            Op::ReserveMarker(len) => self.reserve(Kind::Marker, len),
            Op::Writing(pick) => {
                let writers: Vec<_> = self.held.iter_mut().filter(|held| held.kind != Kind::Marker).collect();
                let count = writers.len();
                if let Some(held) = writers.into_iter().nth(pick % count.max(1)) {
                    let range = WritingRange { volume: 7, offset: held.number << 12, length: 1 + held.number };
                    held.reservation.writing(range.volume, range.offset, range.length);
                    held.range = Some(range);
                }
            }
            Op::Publish(pick) if !self.held.is_empty() => {
                let held = self.held.swap_remove(pick % self.held.len());
                self.publish(held);
            }
            Op::Abandon(pick) if !self.held.is_empty() => {
                self.held.swap_remove(pick % self.held.len()).reservation.abandon();
            }
            Op::Publish(_) | Op::Abandon(_) => {}
            Op::FoundNoRoom => {
                assert!(self.producer.publish_or_close(None, &Desc::default()).is_err());
                self.closed = true;
            }
            Op::Reopen => {
                let desc = Desc { kind: 8, ..Desc::default() };
                let (head, room) = (self.head(), self.credits() < DESCRIPTORS);
                let result = self.consumer().reopen(&desc);
                assert_eq!(result.is_ok(), self.closed && room);
                if let Ok(position) = result {
                    assert_eq!(position, head);
                    self.closed = false;
                    self.queue.push_back(Published { desc, number: 0, cell: None });
                }
            }
            Op::Next { keep } => self.next(keep),
            Op::DropKept => self.kept.clear(),
            Op::Free(count) => {
                let count = count.min(self.read as u64);
                let to = self.freed + count;
                self.consumer().free_to(to);
                self.freed = to;
                self.read -= usize::try_from(count).expect("small");
                self.queue.drain(..usize::try_from(count).expect("small"));
            }
            Op::Rewind => {
                self.consumer().rewind();
                self.read = 0;
            }
            Op::Kill { resume } => self.kill(resume),
        }
    }

    fn check(&self) {
        let used: usize = self.cells().iter().map(|cell| cell.bytes).sum();
        assert_eq!((self.ring.freed(), self.ring.head()), (self.freed, self.head()));
        assert_eq!((self.ring.used_descriptors(), self.ring.is_closed()), (self.credits(), self.closed));
        assert_eq!(self.ring.used_bytes(), used as u64);
        self.held.iter().for_each(|held| assert!(is_stamped(&held.reservation, 0, held.number), "a foreign hand"));
        self.kept.iter().for_each(|(number, _, bytes)| assert!(is_stamped(bytes, 0, *number), "a foreign hand"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_queue(ops in prop::collection::vec(op(), 1..150)) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}
