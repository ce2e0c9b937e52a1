//! The disk log: sealed batches on a file or device of their own, while the link does not keep up.
//!
//! One file holds the logs of all groups. It is cut into segments; a group's *line* is a row of them, taken as they are needed and given back
//! as the target has what is in them. Batches stand in a line in the order of their numbers, without gaps.
//!
//! # Invariants
//! 1. What [`GroupLog::sync`] has returned for is read back by the next process, or [`Damage`] is: never less without a word.
//! 2. What was not synced may be missing from its end, and from there only.
//! 3. Segments of a line that somebody still names ([`DiskLog::open`]'s `kept`) are nobody else's.
//! 4. Bounded by the size that it was made for, and by [`BATCHES_MAX`] for each group.
//!
//! Not durable are trims: after a crash batches may be there again that the target has. They are known by their numbers.

mod format;
mod look;
mod worker;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use farshore_proto::{BatchNo, ChainHash, Generation, HostId, Incarnation, Name, Position, WallTime};
use farshore_uring::{AlignedBuf, StorageFile};

use crate::source::StreamFlags;

use self::format::{BLOCK, EntryHeader, Read, SegmentHeader, Superblock, entry_end};
pub use self::format::{Line, is_disk_log};
pub use self::look::{Look, LookEntry, LookLine, look};
pub use self::worker::{LogDone, LogOrder, LogTurn};
pub(crate) use self::worker::{LogWorker, ToWorker};

/// Smallest log that is of use, bytes: the largest batch, and room for the next while it is shipped.
pub const DISK_LOG_MIN: u64 = 160 << 20;
/// Batches of one group in its log: 73 hours with a cut each second, at about 400 bytes of memory each.
pub const BATCHES_MAX: usize = 1 << 18;
/// Segments in a log, about: how finely its space is shared out.
const SEGMENTS: u64 = 256;
const SEGMENT_MIN: u64 = 1 << 20;
const SEGMENT_MAX: u64 = 64 << 20;
/// Bytes written at a time.
const PIECE: usize = 1 << 20;

/// What is known of a batch in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoggedBatch {
    /// Line of history.
    pub generation: Generation,
    /// Life of the ring that it came from.
    pub incarnation: Incarnation,
    /// Its number.
    pub number: BatchNo,
    /// Position of that ring behind it.
    pub end: Position,
    /// Source's clock at its cut.
    pub time: WallTime,
    /// The point at its end can be recovered to.
    pub recoverable: bool,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
    /// The point's name.
    pub bookmark: Option<Name>,
    /// Flags of the stream before it.
    pub before: StreamFlags,
    /// And behind it.
    pub after: StreamFlags,
    /// Chain hash of its predecessor.
    pub previous: ChainHash,
    /// Its own.
    pub chain: ChainHash,
    /// Payload, bytes.
    pub payload_bytes: u64,
    /// What guests wrote of it, bytes.
    pub written_bytes: u64,
    /// Its own bytes, sealed.
    pub len: u64,
}

/// Why a line cannot be read to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage(pub String);

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The host's disk log.
#[derive(Debug)]
pub struct DiskLog<F> {
    file: Arc<F>,
    superblock: Superblock,
    pool: Mutex<Pool>,
}

#[derive(Debug)]
struct Pool {
    free: VecDeque<u32>,
    /// Segments of lines that are kept and were not taken up yet.
    kept: BTreeMap<Line, BTreeMap<u64, (u32, SegmentHeader)>>,
    /// The superblock could not be read: whatever was kept is lost.
    lost: Option<Damage>,
}

impl<F: StorageFile> DiskLog<F> {
    /// Opens the log in `file`, or makes one of `size` bytes with the random `id`. Lines that are not `kept` are forgotten; while any is,
    /// the log keeps the size that it has.
    ///
    /// # Errors
    /// `InvalidData`: the log of another host, or of a newer version; nothing is touched then. `InvalidInput`: `size` is below
    /// two segments. `StorageFull`, and what reading and writing give.
    pub fn open(file: Arc<F>, owner: HostId, size: u64, id: [u8; 16], kept: &BTreeSet<Line>) -> io::Result<Arc<Self>> {
        let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
        let found = if file.len()? < BLOCK as u64 { Read::None } else { read_superblock(&*file)? };
        if let Read::Whole(superblock) = &found
            && superblock.owner != owner
        {
            return Err(bad("is the log of another host".into()));
        }
        let mut lost = None;
        let superblock = match found {
            Read::Whole(superblock) if !kept.is_empty() => superblock,
            other @ (Read::Whole(_) | Read::None | Read::Damaged) => {
                if !kept.is_empty() {
                    let what = if other == Read::Damaged { "its first block is damaged" } else { "it holds no log" };
                    lost = Some(Damage(what.into()));
                }
                let superblock = Superblock { id, ..geometry(size, owner)? };
                let end = BLOCK as u64 + superblock.segment * u64::from(superblock.segments);
                if file.len()? != end {
                    // A device stays as it is, if it is large enough.
                    match file.set_len(end) {
                        Err(error) if error.kind() == io::ErrorKind::InvalidInput && file.len()? >= end => {}
                        set => set?,
                    }
                }
                file.reserve(0, end)?;
                file.write_sync_at(&*superblock.encode(), 0)?;
                superblock
            }
        };
        let mut pool = Pool { free: VecDeque::new(), kept: BTreeMap::new(), lost };
        for number in 0..superblock.segments {
            let header = read_block(&*file, segment_at(&superblock, number))?;
            match SegmentHeader::decode(&header, &superblock.id) {
                Some(header) if kept.contains(&header.line) => {
                    pool.kept.entry(header.line).or_default().insert(header.index, (number, header));
                }
                Some(_) | None => pool.free.push_back(number),
            }
        }
        Ok(Arc::new(Self { file, superblock, pool: Mutex::new(pool) }))
    }

    /// Bytes that batches can take.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.superblock.segment * u64::from(self.superblock.segments)
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new line.
    #[must_use]
    pub fn begin(self: &Arc<Self>, line: Line) -> GroupLog<F> {
        GroupLog {
            log: Arc::clone(self),
            line,
            segments: VecDeque::new(),
            next_index: 0,
            tail: 0,
            entries: VecDeque::new(),
            synced: BatchNo(0),
            buffer: AlignedBuf::zeroed(PIECE),
            used: Arc::default(),
        }
    }

    /// Takes up a line that was kept, and what it holds.
    ///
    /// # Errors
    /// [`Damage`]: some of what it held is lost. Its segments are free then.
    pub fn take_up(self: &Arc<Self>, line: Line) -> Result<(GroupLog<F>, Vec<LoggedBatch>), Damage> {
        let (lost, kept) = {
            let mut pool = self.pool();
            (pool.lost.clone(), pool.kept.remove(&line).unwrap_or_default())
        };
        let mut group = self.begin(line);
        if let Some(damage) = lost {
            return Err(damage);
        }
        let mut runs = runs(kept);
        // Before a gap: given back once. Behind one: taken when the crash came, and nothing was written there yet.
        let mut free: Vec<u32> = Vec::new();
        let mut read = Ok(Vec::new());
        while let Some(run) = runs.pop() {
            let first = group.stand_on(&run);
            if group.holds_something(first)? || runs.is_empty() {
                read = group.read(first);
                break;
            }
            free.extend(group.segments.drain(..));
        }
        free.extend(runs.iter().flatten().map(|(_, number, _)| *number));
        self.pool().free.extend(free);
        if read.is_err() {
            group.give_back_all();
        }
        let batches = read?;
        group.count();
        Ok((group, batches))
    }

    /// Bytes of one segment's body.
    fn body(&self) -> u64 {
        self.superblock.segment - BLOCK as u64
    }
}

/// Segments of a line, in rows without gaps.
fn runs(kept: BTreeMap<u64, (u32, SegmentHeader)>) -> Vec<Vec<(u64, u32, SegmentHeader)>> {
    let mut runs: Vec<Vec<(u64, u32, SegmentHeader)>> = Vec::new();
    for (index, (number, header)) in kept {
        match runs.last_mut().filter(|run| run.last().is_some_and(|(last, ..)| last + 1 == index)) {
            Some(run) => run.push((index, number, header)),
            None => runs.push(vec![(index, number, header)]),
        }
    }
    runs
}

fn geometry(size: u64, owner: HostId) -> io::Result<Superblock> {
    if size < 2 * SEGMENT_MIN + BLOCK as u64 {
        let text = format!("{size} bytes are too small for a disk log");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let segment = (size / SEGMENTS).clamp(SEGMENT_MIN, SEGMENT_MAX) / BLOCK as u64 * BLOCK as u64;
    let segments = u32::try_from((size - BLOCK as u64) / segment).unwrap_or(u32::MAX);
    Ok(Superblock { id: [0; 16], owner, segment, segments })
}

fn segment_at(superblock: &Superblock, number: u32) -> u64 {
    BLOCK as u64 + superblock.segment * u64::from(number)
}

fn read_block<F: StorageFile>(file: &F, at: u64) -> io::Result<Box<[u8; BLOCK]>> {
    let mut block = Box::new([0; BLOCK]);
    file.read_at(&mut block[..], at)?;
    Ok(block)
}

fn read_superblock<F: StorageFile>(file: &F) -> io::Result<Read<Superblock>> {
    Superblock::decode(&*read_block(file, 0)?).map_err(|version| {
        let text = format!("is of format {version}, this build reads 1");
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

/// Why a batch was not taken.
#[derive(Debug)]
pub(crate) enum NotAppended {
    /// There is no room now.
    Full,
    /// What the file holds from the last sync on is not known any more.
    Failed(io::Error),
}

/// Where a batch stands.
#[derive(Clone, Copy, Debug)]
struct Stored {
    number: BatchNo,
    at: u64,
    len: u64,
    hash: [u8; 32],
}

/// What stands in a row of segments.
struct Scan {
    batches: Vec<LoggedBatch>,
    entries: VecDeque<Stored>,
    /// Behind the last.
    tail: u64,
    /// Everything up to this one is known to have been durable.
    synced: BatchNo,
    /// The first that is not there, or not whole; and something of it is.
    rotten: Option<String>,
}

/// One group's line. Its one user is a thread that may wait for the disk.
pub struct GroupLog<F> {
    log: Arc<DiskLog<F>>,
    line: Line,
    /// Row of segments; the last has index `next_index - 1`.
    segments: VecDeque<u32>,
    next_index: u64,
    /// Address of the next entry.
    tail: u64,
    entries: VecDeque<Stored>,
    synced: BatchNo,
    buffer: AlignedBuf,
    used: Arc<AtomicU64>,
}

impl<F> std::fmt::Debug for GroupLog<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupLog")
            .field("line", &self.line)
            .field("entries", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl<F: StorageFile> GroupLog<F> {
    /// Which line it is.
    #[must_use]
    pub fn line(&self) -> Line {
        self.line
    }

    /// Bytes of the file that it takes, for others to look at.
    #[must_use]
    pub fn used(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.used)
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.log.size_bytes()
    }

    /// Writes a batch behind the last one. Not durable before [`Self::sync`].
    pub(crate) fn append(&mut self, batch: &LoggedBatch, pieces: &[Bytes]) -> Result<(), NotAppended> {
        if self.entries.len() >= BATCHES_MAX {
            return Err(NotAppended::Full);
        }
        let (at, end) = (self.tail, entry_end(self.tail, batch.len));
        self.extend_to(at, end)?;
        let mut hasher = blake3::Hasher::new();
        pieces.iter().for_each(|piece| _ = hasher.update(piece));
        let hash = *hasher.finalize().as_bytes();
        let restart = self.entries.is_empty();
        let header = EntryHeader { line: self.line, at, synced: self.synced, restart, batch: batch.clone(), hash };
        let header = header.encode(&self.log.superblock.id);
        let mut writer = Pieces { group: self, at, filled: 0 };
        writer.push(&header[..]).map_err(NotAppended::Failed)?;
        for piece in pieces {
            writer.push(piece).map_err(NotAppended::Failed)?;
        }
        writer.finish().map_err(NotAppended::Failed)?;
        self.entries.push_back(Stored { number: batch.number, at, len: batch.len, hash });
        self.tail = end;
        Ok(())
    }

    /// Makes durable what was appended.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.log.file.sync()?;
        self.synced = self.entries.back().map_or(self.synced, |entry| entry.number);
        Ok(())
    }

    /// Writes where nothing is kept, to see whether that can be done.
    pub(crate) fn probe(&self) -> io::Result<()> {
        let free = self.log.pool().free.pop_front();
        if let Some(number) = free {
            let at = segment_at(&self.log.superblock, number);
            let written = self
                .log
                .file
                .write_at(&[0; BLOCK], at)
                .and_then(|()| self.log.file.write_at(&[0; BLOCK], at + BLOCK as u64));
            self.log.pool().free.push_back(number);
            written?;
        }
        self.log.file.sync()
    }

    /// Number of the last batch in it.
    pub(crate) fn last(&self) -> Option<BatchNo> {
        self.entries.back().map(|entry| entry.number)
    }

    /// The bytes of a batch.
    pub(crate) fn load(&self, number: BatchNo) -> io::Result<Vec<u8>> {
        let index = self.entries.front().and_then(|first| usize::try_from(number.0.checked_sub(first.number.0)?).ok());
        let entry = index.and_then(|index| self.entries.get(index));
        let entry = entry.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such batch in the log"))?;
        let bytes = self.read_bytes(entry.at + BLOCK as u64, entry.len)?;
        if *blake3::hash(&bytes).as_bytes() != entry.hash {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("batch {number} is damaged in the log")));
        }
        Ok(bytes)
    }

    /// Forgets all batches up to `number`.
    pub(crate) fn trim(&mut self, number: BatchNo) {
        while self.entries.front().is_some_and(|entry| entry.number <= number) {
            self.entries.pop_front();
        }
        let head = self.entries.front().map_or(self.tail, |entry| entry.at);
        let first_index = self.next_index - self.segments.len() as u64;
        let gone = (head / self.log.body()).saturating_sub(first_index);
        let gone = usize::try_from(gone).unwrap_or(usize::MAX).min(self.segments.len());
        let free: Vec<u32> = self.segments.drain(..gone).collect();
        self.give_back(free);
        self.count();
    }

    /// Forgets everything, and becomes the line `number`.
    pub(crate) fn clear(&mut self, number: u64) {
        self.give_back_all();
        self.line.number = number;
        (self.next_index, self.tail, self.synced) = (0, 0, BatchNo(0));
        self.entries.clear();
        self.count();
    }

    fn give_back_all(&mut self) {
        let all: Vec<u32> = self.segments.drain(..).collect();
        self.give_back(all);
    }

    fn give_back(&self, segments: Vec<u32>) {
        for number in &segments {
            // For the eye of a reader: what is not kept by name is free whatever stands there.
            let _ = self.log.file.write_at(&[0; BLOCK], segment_at(&self.log.superblock, *number));
        }
        self.log.pool().free.extend(segments);
    }

    fn count(&self) {
        self.used.store(self.segments.len() as u64 * self.log.superblock.segment, Ordering::Relaxed);
    }

    /// Takes the segments that an entry from `at` to `end` needs; all or none.
    fn extend_to(&mut self, at: u64, end: u64) -> Result<(), NotAppended> {
        let needed = end.div_ceil(self.log.body()).saturating_sub(self.next_index);
        let needed = usize::try_from(needed).unwrap_or(usize::MAX);
        if needed == 0 {
            return Ok(());
        }
        let taken: Vec<u32> = {
            let mut pool = self.log.pool();
            if pool.free.len() < needed {
                return Err(NotAppended::Full);
            }
            pool.free.drain(..needed).collect()
        };
        for number in taken {
            let start = self.next_index * self.log.body();
            let first = if at >= start { at } else { end };
            let header = SegmentHeader { line: self.line, index: self.next_index, first };
            let superblock = &self.log.superblock;
            self.segments.push_back(number);
            self.next_index += 1;
            let written = self.log.file.write_at(&*header.encode(&superblock.id), segment_at(superblock, number));
            written.map_err(NotAppended::Failed)?;
        }
        self.count();
        // Before anything stands in them: so a gap in the row tells which of them nothing does.
        self.log.file.sync().map_err(NotAppended::Failed)
    }

    /// Place in the file of an address, and bytes from there to its segment's end.
    fn place(&self, address: u64) -> io::Result<(u64, u64)> {
        let (index, offset) = (address / self.log.body(), address % self.log.body());
        let first_index = self.next_index - self.segments.len() as u64;
        let number = index.checked_sub(first_index).and_then(|at| self.segments.get(usize::try_from(at).ok()?));
        let number = number.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "behind the log's end"))?;
        let place = segment_at(&self.log.superblock, *number) + BLOCK as u64 + offset;
        Ok((place, self.log.body() - offset))
    }

    fn write_bytes(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (place, room) = self.place(address + done as u64)?;
            let len = (bytes.len() - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            self.log.file.write_at(&bytes[done..done + len], place)?;
            done += len;
        }
        Ok(())
    }

    fn read_bytes(&self, address: u64, len: u64) -> io::Result<Vec<u8>> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        // What was read of a header may be wrong; what is behind the end is not allocated for.
        let last = self.next_index * self.log.body();
        if address.saturating_add(len as u64) > last {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "behind the log's end"));
        }
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let (place, room) = self.place(address + done as u64)?;
            let part = (len - done).min(usize::try_from(room).unwrap_or(usize::MAX));
            self.log.file.read_at(&mut bytes[done..done + part], place)?;
            done += part;
        }
        Ok(bytes)
    }

    /// Takes a row of segments for its own; gives the address of the first entry.
    fn stand_on(&mut self, run: &[(u64, u32, SegmentHeader)]) -> u64 {
        self.next_index = run[run.len() - 1].0 + 1;
        self.segments = run.iter().map(|(_, number, _)| *number).collect();
        run[0].2.first
    }

    /// Something of this line begins at `first`.
    fn holds_something(&self, first: u64) -> Result<bool, Damage> {
        if entry_end(first, 0) > self.next_index * self.log.body() {
            return Ok(false);
        }
        let block = self.read_bytes(first, BLOCK as u64);
        let block = block.map_err(|error| Damage(format!("it cannot be read: {error}")))?;
        let block: &[u8; BLOCK] = block.as_slice().try_into().expect("read so much");
        Ok(EntryHeader::decode(block, &self.log.superblock.id, &self.line, first) != Read::None)
    }

    /// Goes from entry to entry, from the one at `first` on.
    fn scan(&self, first: u64) -> io::Result<Scan> {
        let id = self.log.superblock.id;
        let end = self.next_index * self.log.body();
        let mut scan =
            Scan { batches: Vec::new(), entries: VecDeque::new(), tail: first, synced: BatchNo(0), rotten: None };
        while entry_end(scan.tail, 0) <= end {
            let block = self.read_bytes(scan.tail, BLOCK as u64)?;
            let block: &[u8; BLOCK] = block.as_slice().try_into().expect("read so much");
            let header = match EntryHeader::decode(block, &id, &self.line, scan.tail) {
                Read::Whole(header) => header,
                Read::None => break,
                Read::Damaged => {
                    scan.rotten = Some(format!("the entry at {} is damaged", scan.tail));
                    break;
                }
            };
            let EntryHeader { batch, hash, restart, synced: known, .. } = header;
            if restart {
                // What it knows of those before does not matter any more.
                scan.batches.clear();
                scan.entries.clear();
                scan.synced = BatchNo(0);
            } else {
                scan.synced = scan.synced.max(known);
            }
            let follows = scan.batches.last().is_none_or(|last| {
                batch.number == last.number.next()
                    && batch.previous == last.chain
                    && batch.incarnation >= last.incarnation
            });
            if !follows {
                scan.rotten = Some(format!("batch {} does not follow its predecessor", batch.number));
                break;
            }
            scan.entries.push_back(Stored { number: batch.number, at: scan.tail, len: batch.len, hash });
            scan.tail = entry_end(scan.tail, batch.len);
            scan.batches.push(batch);
        }
        Ok(scan)
    }

    /// What the line holds from the entry at `first` on.
    fn read(&mut self, first: u64) -> Result<Vec<LoggedBatch>, Damage> {
        let failed = |error: io::Error| Damage(format!("it cannot be read: {error}"));
        let Scan { mut batches, entries, tail, synced, rotten } = self.scan(first).map_err(failed)?;
        (self.entries, self.tail) = (entries, tail);
        if let Some(reason) = rotten {
            return Err(Damage(reason));
        }
        // What was not synced may be there in part. An entry behind it knows better, if there is one.
        let unsure = batches.iter().position(|batch| batch.number > synced).unwrap_or(batches.len());
        for index in unsure..batches.len() {
            let Stored { number, at, .. } = self.entries[index];
            match self.load(number) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
                    tracing::info!(batch = number.0, %error, "the disk log's last write was cut off");
                    self.tail = at;
                    self.entries.truncate(index);
                    batches.truncate(index);
                    break;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.synced = batches.last().map_or(BatchNo(0), |batch| batch.number);
        // Segments that were taken for what was cut off say where it ended.
        let first_index = self.next_index - self.segments.len() as u64;
        let used =
            usize::try_from(self.tail.div_ceil(self.log.body()).saturating_sub(first_index)).unwrap_or(usize::MAX);
        let unused: Vec<u32> = self.segments.drain(used.min(self.segments.len())..).collect();
        self.next_index -= unused.len() as u64;
        self.give_back(unused);
        // What was read may not be on the disk yet, and is relied upon from here on.
        self.log.file.sync().map_err(failed)?;
        Ok(batches)
    }
}

/// Writes an entry in long aligned pieces, so that it goes past the page cache.
struct Pieces<'a, F> {
    group: &'a mut GroupLog<F>,
    at: u64,
    filled: usize,
}

impl<F: StorageFile> Pieces<'_, F> {
    fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = bytes.len().min(PIECE - self.filled);
            self.group.buffer[self.filled..self.filled + len].copy_from_slice(&bytes[..len]);
            self.filled += len;
            bytes = &bytes[len..];
            if self.filled == PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.group.write_bytes(self.at, &self.group.buffer[..self.filled])?;
        self.at += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        let end = self.filled.next_multiple_of(BLOCK);
        self.group.buffer[self.filled..end].fill(0);
        self.filled = end;
        self.flush()
    }
}

#[cfg(test)]
mod tests;
