//! Drain: ring entries → raw batches, one from cut to cut.

use std::collections::VecDeque;
use std::ops::Deref;

use farshore_proto::record::Kind;
use farshore_proto::{Name, Position, SECTOR_BYTES, VolumeIndex, WallTime};

use crate::source::{CUT_APP_CONSISTENT, RingEntry, RingSource, StreamFlags};
use crate::{Error, Result};

/// Payload in the open batch from which the cutter is asked for a cut: half of the 16 MiB that a batch should have at most.
const WANTS_CUT_BYTES: u64 = 8 << 20;
/// The same for entries: their records are then a list of about 2 MiB.
const WANTS_CUT_ENTRIES: usize = 1 << 15;
/// Payload at which a batch whose cut comes too late is sent in pieces: far enough below the format's 64 MiB for records and
/// frame headers.
const PIECE_BYTES: u64 = 40 << 20;
/// The same for entries. Coalescing at most doubles the pieces (five per entry), so records stay below the format's 2^20.
const PIECE_ENTRIES: usize = 1 << 16;
/// Raw batches whose memory is kept for the next ones.
const SPARE_BATCHES: usize = 8;

/// One entry of the ring with a range in sectors.
#[derive(Debug)]
pub struct RawEntry<P> {
    /// Its place in the stream.
    pub position: Position,
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// Bytes in its cell.
    pub payload: Option<P>,
    /// Volume.
    pub volume: VolumeIndex,
    /// What it says.
    pub kind: Kind,
}

/// What lies between two cuts, payload still in the ring's cells.
#[derive(Debug)]
pub struct RawBatch<P> {
    /// First position.
    pub first: Position,
    /// Position after the last one.
    pub end: Position,
    /// Time of the cut.
    pub time: WallTime,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
    /// Name of the point.
    pub bookmark: Option<Name>,
    /// Ends at a cut; `false`: a piece of an overlong batch, whose end is no point.
    pub ends_at_cut: bool,
    /// Entries in order, without no-ops, cuts and bookmarks.
    pub entries: Vec<RawEntry<P>>,
    /// Bytes that guests wrote (zeroes and discards not counted).
    pub written_bytes: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Flags of the stream before the first entry.
    pub before: StreamFlags,
    /// Flags at the end.
    pub after: StreamFlags,
}

impl<P> RawBatch<P> {
    fn empty(first: Position, before: StreamFlags) -> Self {
        Self {
            first,
            end: first,
            time: WallTime(0),
            app_consistent: false,
            bookmark: None,
            ends_at_cut: false,
            entries: Vec::new(),
            written_bytes: 0,
            payload_bytes: 0,
            before,
            after: before,
        }
    }
}

/// Takes entries out of a ring as they come and makes raw batches of them.
///
/// Invariant: what it gives depends only on the ring's content from the position where it began, so that a restarted process
/// gives the same. Memory is bounded by the ring: one small entry for each of its descriptors.
#[derive(Debug)]
pub struct Drain<P> {
    open: RawBatch<P>,
    /// Pieces of an overlong batch that wait for its cut.
    pieces: Vec<RawBatch<P>>,
    ready: VecDeque<RawBatch<P>>,
    ready_bytes: u64,
    spare: Vec<Vec<RawEntry<P>>>,
}

impl<P: Deref<Target = [u8]>> Drain<P> {
    /// Begins at `position`, where the stream has `flags`.
    #[must_use]
    pub fn new(position: Position, flags: StreamFlags) -> Self {
        Self {
            open: RawBatch::empty(position, flags),
            pieces: Vec::new(),
            ready: VecDeque::new(),
            ready_bytes: 0,
            spare: Vec::new(),
        }
    }

    /// Begins anew; what was taken is forgotten.
    pub fn reset(&mut self, position: Position, flags: StreamFlags) {
        *self = Self { spare: std::mem::take(&mut self.spare), ..Self::new(position, flags) };
    }

    /// Takes up to `entries_max` published entries. Returns how many.
    ///
    /// # Errors
    /// [`Error::Ring`].
    pub fn pull<S: RingSource<Payload = P>>(&mut self, ring: &mut S, entries_max: usize) -> Result<usize> {
        for taken in 0..entries_max {
            let Some(entry) = ring.next_entry()? else { return Ok(taken) };
            self.push(entry)?;
        }
        Ok(entries_max)
    }

    /// The next whole batch.
    pub fn pop(&mut self) -> Option<RawBatch<P>> {
        let batch = self.ready.pop_front()?;
        self.ready_bytes -= batch.payload_bytes;
        Some(batch)
    }

    /// Gives a batch's memory back.
    pub fn recycle(&mut self, mut entries: Vec<RawEntry<P>>) {
        entries.clear();
        if self.spare.len() < SPARE_BATCHES && entries.capacity() <= PIECE_ENTRIES {
            self.spare.push(entries);
        }
    }

    /// Whole batches waiting.
    #[must_use]
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Bytes of payload that were taken and are in no batch handed out.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        self.ready_bytes + self.open_bytes()
    }

    /// Entries in the batch that has no cut yet.
    #[must_use]
    pub fn open_entries(&self) -> usize {
        self.open.entries.len() + self.pieces.iter().map(|piece| piece.entries.len()).sum::<usize>()
    }

    /// The open batch is large enough: cut now.
    #[must_use]
    pub fn wants_cut(&self) -> bool {
        self.open_bytes() >= WANTS_CUT_BYTES || self.open_entries() >= WANTS_CUT_ENTRIES
    }

    fn open_bytes(&self) -> u64 {
        self.open.payload_bytes + self.pieces.iter().map(|piece| piece.payload_bytes).sum::<u64>()
    }

    fn push(&mut self, entry: RingEntry<P>) -> Result<()> {
        let position = entry.position;
        let bad = |reason: String| Error::Ring { position: position.0, reason };
        if position != self.open.end {
            return Err(bad(format!("expected position {}", self.open.end)));
        }
        let bytes = entry.payload.as_deref().map_or(0, |payload| payload.len() as u64);
        match entry.kind {
            Kind::Cut => {
                self.open.end.0 += 1;
                self.cut(&entry);
                return Ok(());
            }
            Kind::Bookmark => self.open.bookmark = entry.payload.as_deref().and_then(name_of),
            Kind::Noop => {}
            kind @ (Kind::Write
            | Kind::WriteZeroes
            | Kind::Discard
            | Kind::SyncData
            | Kind::Probe
            | Kind::ProbeZero
            | Kind::EventBegin
            | Kind::EventEnd
            | Kind::VolumeJoined
            | Kind::Unreadable
            | Kind::SyncZero
            | Kind::VolumeLeft) => {
                if !entry.offset.is_multiple_of(SECTOR_BYTES) || !entry.length.is_multiple_of(SECTOR_BYTES) {
                    return Err(bad(format!("range {}+{} is not of whole sectors", entry.offset, entry.length)));
                }
                if entry.offset.checked_add(entry.length).is_none() {
                    return Err(bad(format!("range {}+{} ends beyond 2^64", entry.offset, entry.length)));
                }
                if kind.has_chunk() && (bytes != entry.length || bytes == 0) {
                    return Err(bad(format!("{} bytes of range with {bytes} bytes of payload", entry.length)));
                }
                self.split_when_overlong(bytes);
                self.open.after.apply(kind, entry.volume);
                self.open.payload_bytes += bytes;
                self.open.written_bytes += if kind == Kind::Write { bytes } else { 0 };
                self.open.entries.push(RawEntry {
                    position,
                    start: entry.offset / SECTOR_BYTES,
                    sectors: entry.length / SECTOR_BYTES,
                    payload: entry.payload,
                    volume: entry.volume,
                    kind,
                });
            }
        }
        self.open.end.0 += 1;
        Ok(())
    }

    /// Before an entry that would make the batch too long for the format: closes what is there as a piece. Any prefix of the
    /// stream is a state that a power cut could have left, so sending it ahead of its cut is safe; it is just no point.
    fn split_when_overlong(&mut self, bytes: u64) {
        if self.open.payload_bytes + bytes <= PIECE_BYTES && self.open.entries.len() < PIECE_ENTRIES {
            return;
        }
        let next = self.next_open();
        let mut piece = std::mem::replace(&mut self.open, next);
        self.open.bookmark = piece.bookmark.take();
        self.pieces.push(piece);
    }

    fn cut(&mut self, entry: &RingEntry<P>) {
        let next = self.next_open();
        let mut last = std::mem::replace(&mut self.open, next);
        last.ends_at_cut = true;
        last.app_consistent = entry.aux & CUT_APP_CONSISTENT != 0;
        if let Some(name) = entry.payload.as_deref().and_then(name_of) {
            last.bookmark = Some(name);
        }
        for mut batch in self.pieces.drain(..).chain([last]) {
            batch.time = entry.time;
            self.ready_bytes += batch.payload_bytes;
            self.ready.push_back(batch);
        }
    }

    fn next_open(&mut self) -> RawBatch<P> {
        let mut next = RawBatch::empty(self.open.end, self.open.after);
        next.entries = self.spare.pop().unwrap_or_default();
        next
    }
}

/// A name in a cell. One that is none is left out: the point itself is worth more than its name.
fn name_of(bytes: &[u8]) -> Option<Name> {
    let text = std::str::from_utf8(bytes).ok()?;
    Name::new(text.trim_end_matches('\0')).ok()
}
