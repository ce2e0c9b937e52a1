//! `journal dump` and `journal verify`: reading a journal as it is stored, without mending anything. Any flipped bit is
//! found: every byte of a segment is covered by a checksum or must be zero.

use std::path::{Path, PathBuf};

use farshore_proto::message::Tail;
use farshore_proto::record::Record;
use farshore_proto::{PointId, WallTime};
use farshore_uring::{OpenMode, Storage, StorageFile};

use crate::error::{Error, IoContext, Kind, Result};
use crate::journal;
use crate::keys::StreamKeys;
use crate::scan::{Scan, StoredEntry};
use crate::segment::{self, ALIGN, Form, PlacedPoint, Trailer, aligned};
use crate::segments::number_of;

/// Something wrong in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// File, relative to the storage's root.
    pub path: PathBuf,
    /// First byte concerned.
    pub at: u64,
    /// What is wrong.
    pub reason: String,
}

/// What verifying found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Segments read.
    pub segments: u64,
    /// Entries read.
    pub entries: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

/// One entry, for a person.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DumpEntry {
    /// Byte in the segment.
    pub at: u64,
    /// Number within the segment.
    pub sequence: u32,
    /// The point at its end.
    pub point: PointId,
    /// Source's clock.
    pub time: WallTime,
    /// Target's clock.
    pub received: WallTime,
    /// Bytes of the batch as stored.
    pub bytes: u32,
    /// Frames of never-joined volumes were left out.
    pub stripped: bool,
    /// Records.
    pub records: usize,
    /// Frames stored.
    pub frames: usize,
    /// References to contents of earlier segments.
    pub references: u32,
    /// The source says that its cut is recoverable.
    pub recoverable: bool,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
    /// The first bytes of the chain hash, in hexadecimal.
    pub chain: String,
}

/// A segment, for a person.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dump {
    /// Number.
    pub number: u32,
    /// It has a footer.
    pub sealed: bool,
    /// Group's id.
    pub group: String,
    /// Host's id.
    pub host: String,
    /// Target's clock when it was made.
    pub created: WallTime,
    /// Entries that can be read.
    pub entries: Vec<DumpEntry>,
    /// What cannot be read.
    pub faults: Vec<Fault>,
}

/// Verifies one segment. With `keys` every record list is opened too.
///
/// # Errors
/// From the disk, or [`Kind::NotFound`]; what is wrong with the bytes is in the report.
pub fn verify_segment<S: Storage>(storage: &S, path: &Path, keys: Option<&StreamKeys>) -> Result<Report> {
    let mut report = Report { segments: 1, ..Report::default() };
    let mut walk = Walk::open(storage, path)?;
    report.bytes = walk.len;
    while let Some(stored) = walk.next()? {
        report.entries += 1;
        if let Some(keys) = keys
            && let Err(reason) = stored.open_list(keys)
        {
            walk.fault(stored.at, format!("batch {}: {reason}", stored.entry.point.batch));
        }
    }
    report.faults = walk.finish()?;
    Ok(report)
}

/// Verifies every segment in a journal's folder.
///
/// # Errors
/// As [`verify_segment`].
pub fn verify_journal<S: Storage>(storage: &S, folder: &Path, keys: Option<&StreamKeys>) -> Result<Report> {
    let mut total = Report::default();
    let mut paths: Vec<PathBuf> = storage.list(folder).at("list", folder)?;
    paths.sort();
    for listed in paths {
        let name = listed.file_name().unwrap_or_default();
        if number_of(Path::new(name)).is_none() {
            continue;
        }
        let one = verify_segment(storage, &folder.join(name), keys)?;
        total.segments += one.segments;
        total.entries += one.entries;
        total.bytes += one.bytes;
        total.faults.extend(one.faults);
    }
    Ok(total)
}

/// Opens the record list of every entry of a segment, in order, and hands it to `each`.
///
/// # Errors
/// As [`verify_segment`]; a list that the keys do not open is among the faults.
pub fn read_records<S: Storage>(
    storage: &S,
    path: &Path,
    keys: &StreamKeys,
    mut each: impl FnMut(PointId, &[Record]),
) -> Result<Vec<Fault>> {
    let mut walk = Walk::open(storage, path)?;
    while let Some(stored) = walk.next()? {
        match stored.open_list(keys) {
            Ok(list) => each(stored.entry.point, &list.records),
            Err(reason) => walk.fault(stored.at, format!("batch {}: {reason}", stored.entry.point.batch)),
        }
    }
    walk.finish()
}

/// Lists a segment's entries.
///
/// # Errors
/// As [`verify_segment`].
pub fn dump_segment<S: Storage>(storage: &S, path: &Path) -> Result<Dump> {
    let mut walk = Walk::open(storage, path)?;
    let mut entries = Vec::new();
    while let Some(stored) = walk.next()? {
        if let Ok((header, frames)) = segment::stored_frames(&stored.payload, false) {
            let cut = header.cut();
            let mut chain = stored.entry.chain.to_string();
            chain.truncate(16);
            entries.push(DumpEntry {
                at: stored.at,
                sequence: stored.entry.sequence,
                point: stored.entry.point,
                time: header.place().time,
                received: stored.entry.received,
                bytes: stored.entry.payload_len,
                stripped: stored.entry.form == Form::Stripped,
                records: header.record_count(),
                frames: frames.len() - 1,
                references: stored.entry.reference_count,
                recoverable: cut.recoverable,
                app_consistent: cut.app_consistent,
                chain,
            });
        }
    }
    let (number, sealed, created) = (walk.number, walk.footer.is_some(), walk.created);
    let (group, host) = (walk.group.clone(), walk.host.clone());
    Ok(Dump { number, sealed, group, host, created, entries, faults: walk.finish()? })
}

struct Walk<S: Storage> {
    file: std::sync::Arc<S::File>,
    path: PathBuf,
    number: u32,
    len: u64,
    end: u64,
    at: u64,
    sequence: u32,
    tail: Option<Tail>,
    group: String,
    host: String,
    created: WallTime,
    footer: Option<(Trailer, Vec<PlacedPoint>)>,
    seen: Vec<(u32, PointId)>,
    faults: Vec<Fault>,
}

impl<S: Storage> Walk<S> {
    fn open(storage: &S, path: &Path) -> Result<Self> {
        let number = number_of(path).ok_or_else(|| {
            Error::new(Kind::Invalid, format!("{}: not named like a segment (00000001.seg)", path.display()))
        })?;
        let file = storage.open(path, OpenMode::Read).at("open", path)?;
        let len = file.len().at("measure", path)?;
        let mut walk = Self {
            file,
            path: path.to_owned(),
            number,
            len,
            end: len,
            at: 0,
            sequence: 0,
            tail: None,
            group: String::new(),
            host: String::new(),
            created: WallTime(0),
            footer: None,
            seen: Vec::new(),
            faults: Vec::new(),
        };
        walk.read_ends()?;
        Ok(walk)
    }

    fn scan(&self) -> Scan<'_, S::File> {
        Scan { file: &*self.file, path: &self.path, number: self.number, len: self.end }
    }

    fn fault(&mut self, at: u64, reason: impl Into<String>) {
        self.faults.push(Fault { path: self.path.clone(), at, reason: reason.into() });
    }

    fn read_ends(&mut self) -> Result<()> {
        if let Ok((trailer, _, points)) = journal::footer(&*self.file, &self.path, self.number)? {
            self.end = trailer.span().entries_end;
            self.footer = Some((trailer, points));
        }
        match self.scan().any_opening() {
            Ok((owner, opening)) => {
                self.at = opening.data_start;
                self.tail = opening.state.tail;
                self.created = opening.created;
                (self.group, self.host) = (owner.group.to_string(), owner.host.to_string());
                if opening.number != self.number {
                    self.fault(0, format!("is segment {} by its header", opening.number));
                }
            }
            Err(error) if error.kind() == Kind::Damaged => {
                self.fault(0, error.context());
                self.at = self.scan().find_entry(0, 0)?.map_or(self.end, |(at, _)| at);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Option<StoredEntry>> {
        while self.at < self.end {
            let at = self.at;
            match self.scan().entry(at)? {
                Ok(stored) => {
                    if let Err(reason) = self.scan().check_rest(&stored)? {
                        self.fault(at, format!("batch {}: {reason}", stored.entry.point.batch));
                    }
                    self.check_order(&stored);
                    self.at = at + stored.entry.total_len();
                    return Ok(Some(stored));
                }
                Err(fault) => {
                    let next = self.scan().find_entry(at + ALIGN as u64, self.sequence)?;
                    let to = next.map_or(self.end, |(next, _)| next);
                    let batches = match next {
                        Some((_, entry)) => format!(" (before batch {})", entry.point.batch),
                        None => String::new(),
                    };
                    self.fault(at, format!("bytes {at}..{to}{batches} are no good entry: {}", fault.reason()));
                    self.at = to;
                    self.sequence = next.map_or(self.sequence, |(_, entry)| entry.sequence);
                    self.tail = None;
                }
            }
        }
        Ok(None)
    }

    fn check_order(&mut self, stored: &StoredEntry) {
        let entry = stored.entry;
        let header = segment::stored_frames(&stored.payload, false).map(|(header, _)| header);
        if entry.sequence != self.sequence {
            self.fault(stored.at, format!("entry {} where {} is due", entry.sequence, self.sequence));
        }
        if let (Some(tail), Ok(header)) = (self.tail, &header)
            && (header.previous() != tail.chain || entry.point.batch != tail.number.next())
        {
            self.fault(stored.at, format!("batch {} does not follow batch {}", entry.point.batch, tail.number));
        }
        self.tail = header.ok().map(|header| {
            let place = header.place();
            Tail { incarnation: place.incarnation, number: place.number, chain: header.chain(), end: place.end }
        });
        self.sequence = entry.sequence + 1;
        self.seen.push((u32::try_from(stored.at).unwrap_or(u32::MAX), entry.point));
    }

    /// Checks the footer's parts, which lie behind the entries.
    fn finish(mut self) -> Result<Vec<Fault>> {
        let Some((trailer, points)) = self.footer.take() else { return Ok(self.faults) };
        let mut run = vec![0; usize::try_from(trailer.run.bytes()).unwrap_or(0)];
        self.file.read_at(&mut run, trailer.run.at()).at("read", &self.path)?;
        if let Err(reason) = trailer.run.check("index run", &run) {
            self.fault(trailer.run.at(), reason);
        }
        let end = trailer.summary.end();
        let mut padding = vec![0; usize::try_from(aligned(end) - end).expect("below a page")];
        self.file.read_at(&mut padding, end).at("read", &self.path)?;
        if !segment::is_zero(&padding) {
            self.fault(end, "padding is not zero");
        }
        let rows: Vec<(u32, PointId)> = points.iter().map(|placed| (placed.entry_at, placed.point.id)).collect();
        if self.faults.is_empty() && rows != self.seen {
            self.fault(trailer.points.at(), "the footer's points are not those of the entries");
        }
        Ok(self.faults)
    }
}
