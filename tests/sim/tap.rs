//! The ring as the streamer's source, with a copy of all that was taken from it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use farshore_proto::Position;
use farshore_proto::record::Kind;
use farshore_ring::CellRef;
use farshore_streamer::{CaptureRing, Fill, RingEntry, RingSource, StreamState};

/// One entry of the stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    volume: usize,
    offset: u64,
    length: u64,
    payload: Vec<u8>,
}

/// The stream as the source saw it, by position.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) entries: BTreeMap<u64, Entry>,
}

impl Log {
    fn note(&mut self, entry: &RingEntry<CellRef>) {
        let copy = Entry {
            kind: entry.kind,
            volume: usize::from(entry.volume.0),
            offset: entry.offset,
            length: entry.length,
            payload: entry.payload.as_ref().map_or_else(Vec::new, |cell| cell.to_vec()),
        };
        match self.entries.get(&entry.position.0) {
            Some(before) => assert!(*before == copy, "position {} reads differently the second time", entry.position),
            None => drop(self.entries.insert(entry.position.0, copy)),
        }
    }
}

/// The volumes at a position, made of nothing but the log.
pub(crate) struct Replay {
    pub(crate) images: Vec<Vec<u8>>,
    at: u64,
}

impl Replay {
    pub(crate) fn new(sizes: &[u64], first: u64) -> Self {
        let blank = |size: &u64| vec![0; usize::try_from(*size).expect("small")];
        Self { images: sizes.iter().map(blank).collect(), at: first }
    }

    /// Goes on to just before `end`.
    pub(crate) fn advance(&mut self, log: &Log, end: u64) {
        assert!(end >= self.at, "points are checked in order");
        for (position, entry) in log.entries.range(self.at..end) {
            assert_eq!(*position, self.at, "no position is skipped");
            self.at += 1;
            assert_ne!(entry.kind, Kind::Unreadable, "no disk fails here");
            if !entry.kind.changes_content() {
                continue;
            }
            let start = usize::try_from(entry.offset).expect("small");
            let len = usize::try_from(entry.length).expect("small");
            let place = &mut self.images[entry.volume][start..start + len];
            if entry.kind.has_chunk() { place.copy_from_slice(&entry.payload) } else { place.fill(0) }
        }
        assert_eq!(self.at, end, "the log reaches as far as the target's points");
    }
}

/// Clones are the same ring.
#[derive(Clone)]
pub(crate) struct Tap {
    pub(crate) ring: Rc<RefCell<CaptureRing>>,
    pub(crate) log: Rc<RefCell<Log>>,
}

impl RingSource for Tap {
    type Payload = CellRef;

    fn next_entry(&mut self) -> farshore_streamer::Result<Option<RingEntry<CellRef>>> {
        let entry = self.ring.borrow_mut().next_entry()?;
        if let Some(entry) = &entry {
            self.log.borrow_mut().note(entry);
        }
        Ok(entry)
    }

    fn free_to(&mut self, position: Position) {
        self.ring.borrow_mut().free_to(position);
    }

    fn rewind(&mut self) {
        self.ring.borrow_mut().rewind();
    }

    fn freed(&self) -> Position {
        self.ring.borrow().freed()
    }

    fn head(&self) -> Position {
        self.ring.borrow().head()
    }

    fn load_state(&self) -> Option<StreamState> {
        self.ring.borrow().load_state()
    }

    fn store_state(&mut self, state: &StreamState) {
        self.ring.borrow_mut().store_state(state);
    }

    fn is_closed(&self) -> bool {
        self.ring.borrow().is_closed()
    }

    fn fill(&self) -> Fill {
        self.ring.borrow().fill()
    }
}
