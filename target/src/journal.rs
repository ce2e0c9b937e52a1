//! The journal of one stream: appends entries, makes them durable, closes segments, and finds its end again after a crash.
//!
//! Crash safety, by what may be on disk after a kill or power cut at any operation:
//! 1. A new segment is written under another name, synced, renamed, and the folder synced: `<n>.seg` always has a whole
//!    beginning.
//! 2. An entry is acknowledged only after a sync that began when it was written whole. Every entry's header says how many
//!    bytes of the segment were durable when it was written (`synced`). So whatever is unreadable below the highest `synced`
//!    of the entries found was durable once: that is damage, reported and kept. What is unreadable above it was never
//!    acknowledged, or is the last thing that was: it is cut off, and a source that knows of an acknowledgement for it finds
//!    the shorter tail at its greeting and compares everything.
//! 3. Entries above the highest `synced` are written again and synced before they count: after a failed sync the kernel may
//!    show bytes that are on no disk.
//! 4. A footer is written behind the entries and synced, then its trailer, which says that the parts are whole, and synced;
//!    then the next segment is made. A footer without its trailer is no entry, so it is cut off as in 2 and written again.
//! 5. After a failed sync nothing is written any more ([`Journal::is_failed`]); the stream stops until a restart judges by 2.
//! 6. A write that failed for lack of space is cut off again before anything else is written.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use farshore_proto::batch::BatchHeader;
use farshore_proto::{BatchNo, WallTime};
use farshore_uring::{OpenMode, Storage, StorageFile};

use crate::damage::Damaged;
use crate::entries::index_entries;
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::{IndexEntry, SealedRun, StreamId};
use crate::index;
use crate::keys::StreamKeys;
use crate::points::{HeardLog, Point, StreamState};
use crate::scan::{EntryFault, Scan, StoredEntry};
use crate::segment::{
    self, ALIGN, ENTRY_HEADER_BYTES, Entry, Form, Owner, POINT_ROW_BYTES, Part, PlacedPoint, Reference, SEGMENT_BYTES,
    SEGMENT_ENTRIES_MAX, Span, Summary, Trailer, aligned,
};
use crate::segments::{SegmentInfo, Segments, number_of};

/// Blocks are reserved in steps of this many bytes, so that a full disk is noticed before an entry is half written, and an
/// idle stream does not hold a whole segment's space.
const RESERVE_STEP: u64 = 16 << 20;

/// The journal of one stream, for its one writer.
///
/// Order of calls: [`Self::open`] → [`Self::replay`] → [`Self::append`]… → [`Self::sync`] → …, with [`Self::seal`] when
/// [`Self::is_full_for`] says so and nothing is un-synced.
pub struct Journal<S: Storage> {
    id: StreamId,
    storage: S,
    segments: Arc<Segments<S>>,
    active: Option<Active<S>>,
    next_number: u32,
    /// Bytes at which a segment is closed.
    segment_bytes: u64,
    failed: Option<String>,
}

struct Active<S: Storage> {
    number: u32,
    file: Arc<S::File>,
    data_start: u64,
    /// Byte at which the next entry begins.
    tail: u64,
    /// Bytes that are durable.
    synced: u64,
    reserved: u64,
    sequence: u32,
    points: Vec<PlacedPoint>,
    refers_to: BTreeSet<u32>,
    entries: usize,
}

/// What opening found, before the active segment was read.
#[derive(Debug, Default)]
pub struct Opened {
    /// Footers.
    pub runs: Vec<SealedRun>,
    /// Points of sealed segments, in order.
    pub points: Vec<Point>,
    /// State after the last sealed segment.
    pub state: StreamState,
    /// Segments whose footer was unreadable and was made again.
    pub rebuilt: Vec<u32>,
    /// Damage found.
    pub damaged: Vec<Damaged>,
    /// The active segment, still to be replayed.
    unsealed: Option<u32>,
}

/// What the active segment holds.
#[derive(Debug, Default)]
pub struct Replayed {
    /// State after its last entry.
    pub state: StreamState,
    /// Bytes cut off at the end.
    pub cut_bytes: u64,
    /// Damage found.
    pub damaged: Vec<Damaged>,
}

/// A batch to append.
pub struct Append<'a> {
    /// [`ALIGN`] bytes of room, then the batch as it is to be stored.
    pub bytes: &'a mut [u8],
    /// How it is stored.
    pub form: Form,
    /// Its header.
    pub header: &'a BatchHeader,
    /// Its references, resolved.
    pub references: &'a [Reference],
    /// Target's clock.
    pub received: WallTime,
}

/// Where a batch was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Appended {
    /// Segment.
    pub segment: u32,
    /// Byte of the entry.
    pub entry_at: u32,
    /// Byte of the stored batch.
    pub payload_at: u32,
    /// Bytes taken.
    pub bytes: u64,
}

impl<S: Storage> Journal<S> {
    /// Reads the footers of a stream's segments. `horizon`: batches up to it may be missing. `segment_bytes`: length at
    /// which a segment is closed, at most [`SEGMENT_BYTES`].
    ///
    /// # Errors
    /// [`Kind::Foreign`] for files that are not this stream's; [`Kind::Damaged`] when nothing of a segment can be read;
    /// otherwise from the disk.
    pub fn open(
        id: StreamId,
        storage: S,
        segments: Arc<Segments<S>>,
        keys: &StreamKeys,
        horizon: BatchNo,
        segment_bytes: u64,
    ) -> Result<(Self, Opened)> {
        let folder = segments.folder().to_owned();
        storage.create_dir_all(&folder).at("create", &folder)?;
        let numbers = list_segments(&storage, &folder)?;
        let next_number = numbers.last().map_or(1, |last| last + 1);
        let segment_bytes = segment_bytes.min(SEGMENT_BYTES);
        let mut journal = Self { id, storage, segments, active: None, next_number, segment_bytes, failed: None };
        let mut opened = Opened::default();
        for number in &numbers {
            let last = Some(number) == numbers.last();
            journal.open_segment(*number, last, keys, &mut opened)?;
        }
        let newest = opened.state.tail.map_or(BatchNo(0), |tail| tail.number);
        find_gaps(&journal.segments.list(), horizon.min(newest), &mut opened.damaged);
        Ok((journal, opened))
    }

    fn open_segment(&mut self, number: u32, last: bool, keys: &StreamKeys, opened: &mut Opened) -> Result<()> {
        let path = self.segments.path(number);
        let file = self.storage.open(&path, OpenMode::Read).at("open", &path)?;
        let len = file.len().at("measure", &path)?;
        match read_footer(&*file, &path, number, len)? {
            Ok((trailer, summary, points)) => self.take_footer(number, trailer, summary, points, opened),
            Err(_) if last => opened.unsealed = Some(number),
            Err(fault) => {
                tracing::error!(path = %path.display(), fault, "the footer of a segment is unreadable; made again from its entries");
                let state = opened.state.clone();
                let (mut active, entries, damaged) = self.read_entries(number, state, keys)?;
                opened.damaged.extend(damaged);
                let run = index::encode_run(&entries)?;
                let state = active.1;
                let sealed = write_footer(&mut active.0, &path, &run, &state)?;
                let (trailer, summary, points) = read_footer(&*active.0.file, &path, number, sealed)?
                    .map_err(|fault| Error::damaged(&path, sealed, fault))?;
                opened.rebuilt.push(number);
                self.take_footer(number, trailer, summary, points, opened);
            }
        }
        Ok(())
    }

    fn take_footer(
        &self,
        number: u32,
        trailer: Trailer,
        summary: Summary,
        points: Vec<PlacedPoint>,
        opened: &mut Opened,
    ) {
        let span = trailer.span();
        opened.runs.push(SealedRun {
            segment: number,
            path: self.segments.path(number),
            offset: trailer.run.at(),
            len: trailer.run.bytes(),
            first: span.first,
            last: span.last,
        });
        self.segments.set(SegmentInfo {
            number,
            first: span.first,
            last: span.last,
            bytes: aligned(trailer.summary.end()) + ALIGN as u64,
            sealed: true,
            refers_to: summary.refers_to.iter().copied().collect(),
        });
        opened.points.extend(points.into_iter().map(|placed| placed.point));
        opened.state = summary.state;
    }

    /// Reads the active segment: gives each batch's entries and point to `batch`, in order; cuts off a torn tail.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn replay(
        &mut self,
        opened: &Opened,
        keys: &StreamKeys,
        mut batch: impl FnMut(Vec<IndexEntry>, Point),
    ) -> Result<Replayed> {
        let Some(number) = opened.unsealed else {
            return Ok(Replayed { state: opened.state.clone(), ..Replayed::default() });
        };
        let path = self.segments.path(number);
        let file = self.storage.open(&path, OpenMode::ReadWrite).at("open for writing", &path)?;
        let len = file.len().at("measure", &path)?;
        let mut walk = Walk::begin(&self.id, &file, &path, number, len, opened.state.clone())?;
        while let Some((stored, entries, point)) = walk.next(keys)? {
            walk.active.take(&stored, &point, entries.len());
            batch(entries, point);
        }
        let Walk { mut active, state, damaged, .. } = walk;
        let cut_bytes = settle(&mut active, &path, len)?;
        if cut_bytes > 0 {
            tracing::warn!(path = %path.display(), cut_bytes, "an unfinished end of the journal was cut off");
        }
        self.segments.set(active.info());
        self.active = Some(active);
        Ok(Replayed { state, cut_bytes, damaged })
    }

    /// Reads all entries of a segment whose footer is lost.
    #[expect(clippy::type_complexity, reason = "one caller, next to it")]
    fn read_entries(
        &self,
        number: u32,
        state: StreamState,
        keys: &StreamKeys,
    ) -> Result<((Active<S>, StreamState), Vec<IndexEntry>, Vec<Damaged>)> {
        let path = self.segments.path(number);
        let file = self.storage.open(&path, OpenMode::ReadWrite).at("open for writing", &path)?;
        let len = file.len().at("measure", &path)?;
        let mut walk = Walk::begin(&self.id, &file, &path, number, len, state)?;
        let mut all = Vec::new();
        while let Some((stored, entries, point)) = walk.next(keys)? {
            walk.active.take(&stored, &point, entries.len());
            all.extend(entries);
        }
        let Walk { active, state, damaged, .. } = walk;
        Ok(((active, state), all, damaged))
    }

    /// Why nothing can be written any more, if so.
    #[must_use]
    pub fn is_failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Whether an entry of `payload` bytes needs a new segment first.
    #[must_use]
    pub fn is_full_for(&self, payload: u64) -> bool {
        self.active.as_ref().is_some_and(|active| {
            let rows = ((active.points.len() + 1) * POINT_ROW_BYTES) as u64;
            active.sequence > 0
                && (active.tail + payload + 2 * ALIGN as u64 + rows > self.segment_bytes
                    || active.entries > SEGMENT_ENTRIES_MAX)
        })
    }

    /// Whether something is written that is not durable.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.synced < active.tail)
    }

    /// Appends one batch; [`Self::sync`] makes it durable.
    /// `state` is the stream's before the batch and goes into a new segment's beginning.
    ///
    /// # Errors
    /// One that [`Error::passes`]: nothing of the batch was kept, earlier ones are untouched. Any other error: the journal
    /// [`Self::is_failed`] from now on.
    pub fn append(&mut self, append: &mut Append<'_>, state: &StreamState) -> Result<Appended> {
        self.check_usable()?;
        if self.active.is_none() {
            match self.create(state, append.received) {
                Err(error) if !error.passes() => return Err(self.fail(error)),
                other => other?,
            }
        }
        let segments = Arc::clone(&self.segments);
        let active = self.active.as_mut().expect("made above");
        let path = segments.path(active.number);
        let before = active.tail;
        match active.write(append, &path) {
            Ok(appended) => {
                segments.set(active.info());
                Ok(appended)
            }
            Err(error) if error.passes() => {
                // Stale bytes behind the tail would be read as entries after a crash: cut them off, or stop.
                if let Err(cut) = active.file.set_len(before) {
                    return Err(self.fail(Error::io("cut back", &path, cut)));
                }
                active.reserved = active.reserved.min(before);
                Err(error)
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Makes everything written durable. After an error nothing un-acknowledged may be acknowledged, and nothing can be
    /// written: a second try would report success for bytes that the kernel has dropped.
    ///
    /// # Errors
    /// From the disk; the journal [`Self::is_failed`] then.
    pub fn sync(&mut self) -> Result<()> {
        self.check_usable()?;
        let Some(active) = self.active.as_mut() else { return Ok(()) };
        match active.file.sync() {
            Ok(()) => {
                active.synced = active.tail;
                Ok(())
            }
            Err(error) => {
                let path = self.segments.path(active.number);
                Err(self.fail(sync_error(&path, error)))
            }
        }
    }

    /// Notes a durable batch's point and how many entries it has in the index.
    pub fn note_point(&mut self, appended: &Appended, point: &Point, entries: usize) {
        if let Some(active) = self.active.as_mut() {
            active.points.push(PlacedPoint { point: point.clone(), entry_at: appended.entry_at });
            active.entries += entries;
            self.segments.set(active.info());
        }
    }

    /// Closes the active segment with `run` (the index of its entries) as its footer. Nothing may be un-synced.
    /// `None`: there was nothing to close.
    ///
    /// # Errors
    /// One that [`Error::passes`]: the segment stays open and usable. Any other error: [`Self::is_failed`].
    pub fn seal(&mut self, run: &[u8], state: &StreamState) -> Result<Option<SealedRun>> {
        self.check_usable()?;
        let Some(mut active) = self.active.take_if(|active| !active.points.is_empty()) else { return Ok(None) };
        let (number, path, end) = (active.number, self.segments.path(active.number), active.tail);
        match write_footer(&mut active, &path, run, state) {
            Ok(len) => {
                let info = SegmentInfo { bytes: len, sealed: true, ..active.info() };
                let (first, last) = (info.first, info.last);
                self.segments.set(info);
                Ok(Some(SealedRun { segment: number, path, offset: end, len: run.len() as u64, first, last }))
            }
            Err(error) if error.passes() => {
                let cut = active.file.set_len(end);
                active.tail = end;
                active.reserved = active.reserved.min(end);
                self.active = Some(active);
                cut.map_err(|cut| self.fail(Error::io("cut back", &path, cut)))?;
                Err(error)
            }
            Err(error) => {
                self.active = Some(active);
                Err(self.fail(error))
            }
        }
    }

    fn create(&mut self, state: &StreamState, created: WallTime) -> Result<()> {
        let number = self.next_number;
        let path = self.segments.path(number);
        let temporary = path.with_extension("seg.new");
        let bytes = segment::encode_opening(&self.id, number, created, state);
        if self.storage.exists(&temporary).at("look for", &temporary)? {
            self.storage.remove(&temporary).at("remove", &temporary)?;
        }
        let file = self.storage.open(&temporary, OpenMode::CreateNew).at("create", &temporary)?;
        reserve(&*file, 0, bytes.len() as u64 + RESERVE_STEP).at("reserve space for", &temporary)?;
        file.write_sync_at(&bytes, 0).at("write", &temporary)?;
        self.storage.rename(&temporary, &path).at("rename", &temporary)?;
        self.storage.sync_dir(self.segments.folder()).at("sync", self.segments.folder())?;
        self.next_number += 1;
        let mut active = Active::new(number, file, bytes.len() as u64);
        active.reserved = bytes.len() as u64 + RESERVE_STEP;
        active.synced = active.data_start;
        self.segments.set(active.info());
        self.active = Some(active);
        Ok(())
    }

    fn check_usable(&self) -> Result<()> {
        match &self.failed {
            Some(reason) => {
                let what = format!("journal of {} is stopped: {reason}", self.id.subject());
                Err(Error::new(Kind::Storage, what))
            }
            None => Ok(()),
        }
    }

    fn fail(&mut self, error: Error) -> Error {
        self.failed = Some(error.to_string());
        error
    }
}

fn sync_error(path: &Path, error: std::io::Error) -> Error {
    // Never "no space": whatever the errno, the bytes may be gone, and waiting does not bring them back.
    Error::new(Kind::Storage, format!("make {} durable: {error}", path.display())).caused(error)
}

fn reserve<F: StorageFile>(file: &F, offset: u64, len: u64) -> std::io::Result<()> {
    match file.reserve(offset, len) {
        // A file system without reservations notices a full disk at the write.
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
        other => other,
    }
}

impl<S: Storage> Active<S> {
    fn new(number: u32, file: Arc<S::File>, data_start: u64) -> Self {
        Self {
            number,
            file,
            data_start,
            tail: data_start,
            synced: 0,
            reserved: 0,
            sequence: 0,
            points: Vec::new(),
            refers_to: BTreeSet::new(),
            entries: 0,
        }
    }

    fn info(&self) -> SegmentInfo {
        let batch = |placed: Option<&PlacedPoint>| placed.map_or(BatchNo(0), |placed| placed.point.id.batch);
        SegmentInfo {
            number: self.number,
            first: batch(self.points.first()),
            last: batch(self.points.last()),
            bytes: self.tail,
            sealed: false,
            refers_to: self.refers_to.clone(),
        }
    }

    /// Takes an entry that was read back.
    fn take(&mut self, stored: &StoredEntry, point: &Point, entries: usize) {
        let entry_at = u32::try_from(stored.at).expect("checked when it was read");
        self.points.push(PlacedPoint { point: point.clone(), entry_at });
        self.refers_to.extend(stored.references.iter().map(|reference| reference.place().segment));
        self.refers_to.remove(&self.number);
        self.entries += entries;
    }

    fn write(&mut self, append: &mut Append<'_>, path: &Path) -> Result<Appended> {
        let payload_len = append.bytes.len() - ALIGN;
        let inline = ENTRY_HEADER_BYTES + payload_len <= ALIGN;
        let data_offset = if inline { ENTRY_HEADER_BYTES } else { ALIGN };
        let references = encode_references(append.references);
        let place = append.header.place();
        let entry = Entry {
            form: append.form,
            data_offset: u32::try_from(data_offset).expect("at most a page"),
            segment: self.number,
            sequence: self.sequence,
            payload_len: u32::try_from(payload_len).expect("a batch is at most 64 MiB"),
            payload_crc: segment::crc(&append.bytes[ALIGN..]),
            reference_count: u32::try_from(append.references.len()).expect("at most one per record"),
            reference_crc: if references.is_empty() { 0 } else { segment::crc(&references) },
            synced: self.synced,
            point: place.point(),
            received: append.received,
            chain: append.header.chain(),
        };
        let end = self.tail + entry.total_len();
        self.reserve_to(end, path)?;
        if !references.is_empty() {
            self.file.write_at(&references, self.tail + entry.references_at()).at("append to", path)?;
        }
        // Room before the batch: the entry's header goes there, so that both are one write from the received buffer.
        let start = ALIGN - data_offset;
        append.bytes[start..ALIGN].fill(0);
        append.bytes[start..start + ENTRY_HEADER_BYTES].copy_from_slice(&entry.encode());
        let bytes = &append.bytes[start..];
        self.file.write_at(bytes, self.tail).at("append to", path)?;
        // The disk begins while the next batch of the group is still being copied.
        self.file.start_writeback(self.tail, bytes.len() as u64);
        let appended = Appended {
            segment: self.number,
            entry_at: u32::try_from(self.tail).expect("a segment is far below 4 GiB"),
            payload_at: u32::try_from(self.tail + data_offset as u64).expect("a segment is far below 4 GiB"),
            bytes: entry.total_len(),
        };
        self.tail = end;
        self.sequence += 1;
        self.refers_to.extend(append.references.iter().map(|r| r.place().segment).filter(|s| *s != self.number));
        Ok(appended)
    }

    fn reserve_to(&mut self, end: u64, path: &Path) -> Result<()> {
        if end > self.reserved {
            let goal = end.max(self.reserved.max(self.tail) + RESERVE_STEP);
            let from = self.reserved.max(self.data_start);
            reserve(&*self.file, from, goal - from).at("reserve space for", path)?;
            self.reserved = goal;
        }
        Ok(())
    }
}

fn encode_references(references: &[Reference]) -> Vec<u8> {
    use zerocopy::IntoBytes;
    references.iter().flat_map(|reference| reference.as_bytes().iter().copied()).collect()
}

/// Writes run, rows, summary and trailer behind the entries and makes them durable. Gives the file's length.
fn write_footer<S: Storage>(active: &mut Active<S>, path: &Path, run: &[u8], state: &StreamState) -> Result<u64> {
    let (rows, sets) = segment::encode_points(&active.points);
    let summary = Summary { state: state.clone(), sets, refers_to: active.refers_to.iter().copied().collect() };
    let summary = farshore_proto::codec::encode("segment summary", &summary)
        .map_err(|error| Error::new(Kind::Invalid, format!("summary of {}", path.display())).caused(error))?;
    let end = active.tail;
    let run_part = Part::of(end, run);
    let points_part = Part::of(run_part.end(), &rows);
    let summary_part = Part::of(points_part.end(), &summary);
    let batch = |placed: Option<&PlacedPoint>| placed.map_or(BatchNo(0), |placed| placed.point.id.batch);
    let span = Span {
        data_start: active.data_start,
        entries_end: end,
        first: batch(active.points.first()),
        last: batch(active.points.last()),
    };
    let trailer = Trailer::new(active.number, run_part, points_part, summary_part, span);
    let mut bytes = Vec::with_capacity(run.len() + rows.len() + summary.len() + ALIGN);
    bytes.extend_from_slice(run);
    bytes.extend_from_slice(&rows);
    bytes.extend_from_slice(&summary);
    bytes.resize(usize::try_from(aligned(bytes.len() as u64)).expect("in memory already"), 0);
    let trailer_at = end + bytes.len() as u64;
    let len = trailer_at + ALIGN as u64;
    active.reserve_to(len, path)?;
    // Drops an older footer of another length.
    active.file.set_len(end).at("cut", path)?;
    active.file.write_at(&bytes, end).at("write the footer of", path)?;
    // The trailer says that the parts before it are whole, so it may not reach the disk before them.
    active.file.sync().map_err(|error| sync_error(path, error))?;
    active.file.write_at(&trailer.page(), trailer_at).at("write the trailer of", path)?;
    // Gives back what was reserved behind the end.
    active.file.set_len(len).at("cut", path)?;
    active.file.sync().map_err(|error| sync_error(path, error))?;
    active.synced = len;
    Ok(len)
}

type Footer = (Trailer, Summary, Vec<PlacedPoint>);

/// Reads a segment's footer, without its run.
fn read_footer<F: StorageFile>(file: &F, path: &Path, number: u32, len: u64) -> Result<Result<Footer, segment::Fault>> {
    let page_at = len.saturating_sub(ALIGN as u64);
    if page_at == 0 || !len.is_multiple_of(ALIGN as u64) {
        return Ok(Err("no trailer".into()));
    }
    let mut page = vec![0; ALIGN];
    file.read_at(&mut page, page_at).at("read", path)?;
    let trailer = match Trailer::parse(&page, number, len) {
        Ok(trailer) => trailer,
        Err(fault) => return Ok(Err(fault)),
    };
    let part = |part: &Part| {
        let mut bytes = vec![0; usize::try_from(part.bytes()).unwrap_or(0)];
        file.read_at(&mut bytes, part.at()).at("read", path).map(|()| bytes)
    };
    let (rows, summary) = (part(&trailer.points)?, part(&trailer.summary)?);
    Ok((|| {
        trailer.points.check("point rows", &rows)?;
        trailer.summary.check("summary", &summary)?;
        let summary: Summary =
            farshore_proto::codec::decode("segment summary", &summary).map_err(|error| error.to_string())?;
        let points = segment::decode_points(&rows, &summary.sets)?;
        Ok((trailer, summary, points))
    })())
}

/// Reads a sealed segment's footer, for dump and verify.
///
/// # Errors
/// From the disk; what is wrong is the inner result.
pub(crate) fn footer<F: StorageFile>(file: &F, path: &Path, number: u32) -> Result<Result<Footer, segment::Fault>> {
    let len = file.len().at("measure", path)?;
    read_footer(file, path, number, len)
}

fn list_segments<S: Storage>(storage: &S, folder: &Path) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for listed in storage.list(folder).at("list", folder)? {
        let name = listed.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(number) = number_of(Path::new(&name)) {
            numbers.push(number);
        } else if name.ends_with(".seg.new") {
            let path = folder.join(&name);
            storage.remove(&path).at("remove", &path)?;
        } else {
            let what = format!("{}: {name:?} is not ours: move it away", folder.display());
            return Err(Error::new(Kind::Foreign, what));
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Batches above the horizon that lie between two segments, or before the first, are lost with their files.
fn find_gaps(segments: &[SegmentInfo], horizon: BatchNo, damaged: &mut Vec<Damaged>) {
    let mut next = BatchNo(1);
    for segment in segments.iter().filter(|segment| segment.sealed) {
        if segment.first > next && segment.first.0 - 1 > horizon.0 {
            let from = next.max(horizon.next());
            damaged.push(Damaged::Batches { from, to: BatchNo(segment.first.0 - 1), healed: None });
        }
        next = next.max(segment.last.next());
    }
}

/// A walk over the entries of a segment without a footer.
struct Walk<'a, S: Storage> {
    path: &'a Path,
    len: u64,
    active: Active<S>,
    state: StreamState,
    damaged: Vec<Damaged>,
    /// Highest `synced` of any entry header in the file, once it was needed.
    proven: Option<u64>,
    done: bool,
}

impl<'a, S: Storage> Walk<'a, S> {
    fn begin(
        id: &StreamId,
        file: &Arc<S::File>,
        path: &'a Path,
        number: u32,
        len: u64,
        before: StreamState,
    ) -> Result<Self> {
        let scan = Scan { file: &**file, path, number, len };
        let (data_start, state) = match scan.opening(&Owner::of(id)) {
            Ok(opening) => (opening.data_start, opening.state),
            // The footer before says the same; where the entries begin shows itself.
            Err(error) if error.kind() == Kind::Damaged && before.tail.is_some() => match scan.find_entry(0, 0)? {
                Some((at, _)) => (at, before),
                None => return Err(error),
            },
            Err(error) => return Err(error),
        };
        let active = Active::new(number, Arc::clone(file), data_start);
        Ok(Self { path, len, active, state, damaged: Vec::new(), proven: None, done: false })
    }

    fn scan(&self) -> Scan<'_, S::File> {
        Scan { file: &*self.active.file, path: self.path, number: self.active.number, len: self.len }
    }

    /// The next batch that can be read; `None`: the end of the entries, at `active.tail`.
    fn next(&mut self, keys: &StreamKeys) -> Result<Option<(StoredEntry, Vec<IndexEntry>, Point)>> {
        while !self.done && self.active.tail < self.len {
            let at = self.active.tail;
            let fault = match self.scan().entry(at)? {
                Ok(stored) if stored.entry.sequence == self.active.sequence => match self.open(&stored, keys) {
                    Ok((entries, point)) => {
                        self.active.tail = at + stored.entry.total_len();
                        self.active.sequence += 1;
                        self.active.synced = self.active.synced.max(stored.entry.synced);
                        return Ok(Some((stored, entries, point)));
                    }
                    // Its checksum is right, so it is as it was written: not a torn tail, whatever stands behind it.
                    Err(reason) => {
                        self.lose(stored.entry.point.batch, &reason);
                        self.skip(&stored.entry, at);
                        continue;
                    }
                },
                Ok(stored) => EntryFault::NoEntry(format!("entry {} is out of order", stored.entry.sequence)),
                Err(fault) => fault,
            };
            self.handle_fault(at, &fault)?;
        }
        Ok(None)
    }

    fn open(&mut self, stored: &StoredEntry, keys: &StreamKeys) -> Result<(Vec<IndexEntry>, Point), segment::Fault> {
        let list = stored.open_list(keys)?;
        let placement = stored.placement()?;
        let (header, _) = segment::stored_frames(&stored.payload, false)?;
        let mut state = self.state.clone();
        let entries = index_entries(&mut state, header.place().number, &list.records, &placement)?;
        if !list.annotations.volumes.is_empty() {
            state.volumes = list.annotations.volumes;
        }
        let point = state.finish(&header, list.annotations.bookmark, stored.entry.received, stored.entry.total_len());
        self.state = state;
        Ok((entries, point))
    }

    /// Torn tail or damage? See the module's list, 2.
    fn handle_fault(&mut self, at: u64, fault: &EntryFault) -> Result<()> {
        let proven = match self.proven {
            Some(proven) => proven,
            None => {
                let proven = self.find_proven(at)?;
                *self.proven.insert(proven)
            }
        };
        if proven <= at {
            self.done = true;
            return Ok(());
        }
        let next = match fault {
            EntryFault::Broken(entry, _) if at + entry.total_len() < self.len => Some((at + entry.total_len(), None)),
            EntryFault::Broken(..) | EntryFault::NoEntry(_) => {
                self.scan().find_entry(at + ALIGN as u64, self.active.sequence)?.map(|(at, entry)| (at, Some(entry)))
            }
        };
        match (fault, next) {
            (EntryFault::Broken(entry, reason), Some(_)) => {
                let entry = **entry;
                self.lose(entry.point.batch, reason);
                self.skip(&entry, at);
            }
            (_, Some((next_at, Some(entry)))) => {
                let first = self.state.tail.map_or(BatchNo(1), |tail| tail.number.next());
                let last = BatchNo(entry.point.batch.0.saturating_sub(1)).max(first);
                self.damaged.push(Damaged::Batches { from: first, to: last, healed: None });
                self.active.tail = next_at;
                self.active.sequence = entry.sequence;
            }
            (_, Some((_, None)) | None) => self.done = true,
        }
        Ok(())
    }

    /// Highest `synced` that an entry at or behind `at` states.
    fn find_proven(&self, at: u64) -> Result<u64> {
        let (mut from, mut proven) = (at, self.active.synced);
        while let Some((found, entry)) = self.scan().find_entry(from, self.active.sequence)? {
            proven = proven.max(entry.synced.min(self.len));
            from = found + ALIGN as u64;
        }
        Ok(proven)
    }

    fn lose(&mut self, batch: BatchNo, reason: &str) {
        tracing::error!(path = %self.path.display(), batch = batch.0, reason, "a journaled batch is unreadable");
        self.damaged.push(Damaged::Batches { from: batch, to: batch, healed: None });
    }

    /// Goes on behind an entry whose header is right; the chain goes on from what the header says.
    fn skip(&mut self, entry: &Entry, at: u64) {
        self.active.tail = at + entry.total_len();
        self.active.sequence = entry.sequence + 1;
        self.active.synced = self.active.synced.max(entry.synced);
        let end = self.state.tail.map_or_else(Default::default, |tail| tail.end);
        self.state.tail = Some(farshore_proto::message::Tail {
            incarnation: entry.point.incarnation,
            number: entry.point.batch,
            chain: entry.chain,
            end,
        });
        self.state.generation = entry.point.generation;
        // Its batch's header cannot be read.
        self.state.log = HeardLog::default();
    }
}

/// Makes what was read durable for certain and cuts off the rest. Gives the bytes cut.
fn settle<S: Storage>(active: &mut Active<S>, path: &Path, len: u64) -> Result<u64> {
    const STEP: u64 = 1 << 20;
    let mut at = active.synced.clamp(active.data_start, active.tail);
    let end = active.tail.min(len);
    while at < end {
        let step = STEP.min(end - at);
        let mut bytes = vec![0; usize::try_from(step).expect("at most a MiB")];
        active.file.read_at(&mut bytes, at).at("read", path)?;
        active.file.write_at(&bytes, at).at("write again", path)?;
        at += step;
    }
    let cut = len.saturating_sub(active.tail);
    if cut > 0 {
        active.file.set_len(active.tail).at("cut", path)?;
    }
    active.file.sync().map_err(|error| sync_error(path, error))?;
    active.synced = active.tail;
    active.reserved = 0;
    Ok(cut)
}
