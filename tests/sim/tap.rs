//! The ring as the streamer's source, with a copy of all that was taken from it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use farshore_proto::Position;
use farshore_proto::record::Kind;
use farshore_ring::CellRef;
use farshore_streamer::{CaptureRing, Fill, RingEntry, RingSource, StreamState};

/// One entry of the stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) volume: usize,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    payload: Vec<u8>,
}

/// The stream as the source saw it, by incarnation and position.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) entries: BTreeMap<(u64, u64), Entry>,
    /// Where each incarnation goes on from another: the last of these that is below it, up to that position.
    lineage: Vec<(u64, u64)>,
    /// First position of an incarnation that the target gets, where it is not the ring's first.
    pub(crate) starts: BTreeMap<u64, u64>,
    /// The incarnation that was written last.
    pub(crate) last_life: u64,
    /// Numbers that a host that was put back has used again, of which the target may get either life's batches, by a disk log.
    pub(crate) used_again: BTreeSet<u64>,
    /// Unreadable ranges that nobody has taken note of.
    pub(crate) unreadable: Vec<(usize, u64, u64)>,
}

impl Log {
    fn note(&mut self, incarnation: u64, entry: &RingEntry<CellRef>) {
        let copy = Entry {
            kind: entry.kind,
            volume: usize::from(entry.volume.0),
            offset: entry.offset,
            length: entry.length,
            payload: entry.payload.as_ref().map_or_else(Vec::new, |cell| cell.to_vec()),
        };
        if copy.kind == Kind::Unreadable {
            self.unreadable.push((copy.volume, copy.offset, copy.length));
        }
        match self.entries.get(&(incarnation, entry.position.0)) {
            Some(before) => assert!(*before == copy, "position {} reads differently the second time", entry.position),
            None => drop(self.entries.insert((incarnation, entry.position.0), copy)),
        }
    }

    /// Something was written under this number.
    pub(crate) fn knows(&self, incarnation: u64) -> bool {
        self.entries.range((incarnation, 0)..=(incarnation, u64::MAX)).next().is_some()
    }

    /// The target never got anything under this number, which begins anew.
    pub(crate) fn forget(&mut self, incarnation: u64) {
        self.entries.retain(|(life, _), _| *life != incarnation);
        self.starts.remove(&incarnation);
    }

    /// The target takes the life that goes by the number `from` for incarnation `to`.
    pub(crate) fn is_taken_for(&mut self, from: u64, to: u64) {
        self.forget(to);
        self.used_again.remove(&to);
        let entries = std::mem::take(&mut self.entries);
        let renamed =
            entries.into_iter().map(|((life, at), entry)| ((if life == from { to } else { life }, at), entry));
        self.entries = renamed.collect();
        if let Some(start) = self.starts.remove(&from) {
            self.starts.insert(to, start);
        }
        self.last_life = to;
    }

    /// The target continues with another incarnation behind position `end` of this one.
    pub(crate) fn continues(&mut self, incarnation: u64, end: u64) {
        self.lineage.retain(|(earlier, _)| *earlier < incarnation);
        self.lineage.push((incarnation, end));
    }

    /// The target holds nothing.
    pub(crate) fn begins(&mut self) {
        self.lineage.clear();
    }

    /// The entries of one incarnation, up to a position.
    fn part(&self, incarnation: u64, end: u64) -> impl Iterator<Item = (u64, &Entry)> {
        self.entries.range((incarnation, 0)..(incarnation, end)).map(|((_, position), entry)| (*position, entry))
    }
}

/// The volumes at a position, made of nothing but the log.
pub(crate) struct Replay {
    pub(crate) images: Vec<Vec<u8>>,
    at: (u64, u64),
}

impl Replay {
    pub(crate) fn new(sizes: &[u64]) -> Self {
        let blank = |size: &u64| vec![0; usize::try_from(*size).expect("small")];
        Self { images: sizes.iter().map(blank).collect(), at: (0, 0) }
    }

    /// Goes on to just before position `end` of an incarnation.
    pub(crate) fn advance(&mut self, log: &Log, incarnation: u64, end: u64) {
        assert!((incarnation, end) >= self.at, "points are checked in order");
        let before: Vec<_> = log.lineage.iter().filter(|(earlier, _)| *earlier < incarnation).copied().collect();
        for (earlier, end) in before.into_iter().chain([(incarnation, end)]) {
            if (earlier, end) <= self.at {
                continue;
            }
            let first = log.starts.get(&earlier).copied().unwrap_or(0);
            let from = if earlier == self.at.0 { self.at.1 } else { first };
            let mut next = None;
            for (position, entry) in log.part(earlier, end).filter(|(position, _)| *position >= from) {
                assert!(next.is_none_or(|next| next == position), "position {position} follows a gap");
                next = Some(position + 1);
                apply(&mut self.images, entry);
            }
            assert!(next.is_none_or(|next| next == end), "the log reaches as far as the target's points");
            self.at = (earlier, end);
        }
    }
}

fn apply(images: &mut [Vec<u8>], entry: &Entry) {
    if entry.kind == Kind::Unreadable || !entry.kind.changes_content() {
        return;
    }
    let start = usize::try_from(entry.offset).expect("small");
    let len = usize::try_from(entry.length).expect("small");
    let place = &mut images[entry.volume][start..start + len];
    if entry.kind.has_chunk() { place.copy_from_slice(&entry.payload) } else { place.fill(0) }
}

/// Clones are the same ring.
#[derive(Clone)]
pub(crate) struct Tap {
    pub(crate) ring: Rc<RefCell<CaptureRing>>,
    pub(crate) log: Rc<RefCell<Log>>,
    pub(crate) incarnation: Rc<Cell<u64>>,
}

impl RingSource for Tap {
    type Payload = CellRef;

    fn next_entry(&mut self) -> farshore_streamer::Result<Option<RingEntry<CellRef>>> {
        let entry = self.ring.borrow_mut().next_entry()?;
        if let Some(entry) = &entry {
            self.log.borrow_mut().note(self.incarnation.get(), entry);
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
