//! A disk log as it lies there, for people: read only, and without the state directory that says which lines count.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use farshore_proto::HostId;
use farshore_uring::StorageFile;

use super::format::{Line, Read, SegmentHeader};
use super::{DiskLog, LoggedBatch, Pool, read_block, read_superblock, runs, segment_at};

/// A disk log.
#[derive(Debug)]
pub struct Look {
    /// Whose it is.
    pub owner: HostId,
    /// Bytes of a segment, its header included.
    pub segment: u64,
    /// Segments.
    pub segments: u32,
    /// Those of no line.
    pub free: u32,
    /// Lines whose segments are there. The agent's state says which of them it keeps; the others are left over from before a crash.
    pub lines: Vec<LookLine>,
}

/// One line.
#[derive(Debug)]
pub struct LookLine {
    /// Which.
    pub line: Line,
    /// Segments that it has.
    pub segments: usize,
    /// Its batches, oldest first.
    pub entries: Vec<LookEntry>,
    /// Where it cannot be read on, and why. Written and cut off by a crash is one of the reasons.
    pub damage: Option<String>,
}

/// One batch.
#[derive(Debug)]
pub struct LookEntry {
    /// Address in the line, bytes.
    pub at: u64,
    /// What is known of it.
    pub batch: LoggedBatch,
    /// What is wrong with its bytes; looked for on request.
    pub damage: Option<String>,
}

/// Reads what a log holds; with `bytes` the batches' own bytes, too, against their hashes. Of a log in use it tells what it saw on its way:
/// batches that are written or trimmed meanwhile may seem damaged.
///
/// # Errors
/// `InvalidData`: no disk log, a newer one, or one whose first block is damaged. What reading gives.
pub fn look<F: StorageFile>(file: Arc<F>, bytes: bool) -> io::Result<Look> {
    let bad = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    let superblock = match read_superblock(&*file)? {
        Read::Whole(superblock) => superblock,
        Read::None => return bad("is no disk log"),
        Read::Damaged => return bad("its first block is damaged"),
    };
    let mut lines: BTreeMap<Line, BTreeMap<u64, (u32, SegmentHeader)>> = BTreeMap::new();
    let mut free = 0;
    for number in 0..superblock.segments {
        match SegmentHeader::decode(&*read_block(&*file, segment_at(&superblock, number))?, &superblock.id) {
            Some(header) => _ = lines.entry(header.line).or_default().insert(header.index, (number, header)),
            None => free += 1,
        }
    }
    let pool = Mutex::new(Pool { free: std::collections::VecDeque::new(), kept: BTreeMap::new(), lost: None });
    let log = Arc::new(DiskLog { file, superblock, pool });
    let lines = lines.into_iter().map(|(line, kept)| look_at(&log, line, kept, bytes)).collect();
    Ok(Look { owner: superblock.owner, segment: superblock.segment, segments: superblock.segments, free, lines })
}

fn look_at<F: StorageFile>(
    log: &Arc<DiskLog<F>>,
    line: Line,
    kept: BTreeMap<u64, (u32, SegmentHeader)>,
    bytes: bool,
) -> LookLine {
    let mut found = LookLine { line, segments: kept.len(), entries: Vec::new(), damage: None };
    let mut group = log.begin(line);
    let mut runs = runs(kept);
    // As a start does: the newest row that holds something.
    while let Some(run) = runs.pop() {
        let first = group.stand_on(&run);
        let scan = match group.holds_something(first) {
            Ok(false) if !runs.is_empty() => continue,
            Ok(_) => group.scan(first),
            Err(damage) => {
                found.damage = Some(damage.0);
                break;
            }
        };
        match scan {
            Ok(scan) => {
                group.entries = scan.entries;
                found.damage = scan.rotten;
                let damage = |batch: &LoggedBatch| group.load(batch.number).err().map(|error| error.to_string());
                let entry = |(batch, at): (LoggedBatch, u64)| {
                    let damage = if bytes { damage(&batch) } else { None };
                    LookEntry { at, batch, damage }
                };
                let places: Vec<u64> = group.entries.iter().map(|entry| entry.at).collect();
                found.entries = scan.batches.into_iter().zip(places).map(entry).collect();
            }
            Err(error) => found.damage = Some(format!("it cannot be read: {error}")),
        }
        break;
    }
    found
}
