//! Answers to probes: whether a range has the content that the source says. "Equal" is said only of bytes that were read
//! and compared here; whatever cannot be read counts as different, so that the source sends it (I10).

use farshore_proto::keys::DedupKey;
use farshore_proto::message::Answer;
use farshore_proto::record::{Kind, Record};
use farshore_proto::{BatchNo, SLOT_BYTES, VolumeIndex};
use farshore_uring::Storage;

use crate::base::Base;
use crate::error::Result;
use crate::group::{GroupHost, UpTo};
use crate::reader;
use crate::segment::is_zero;

/// One answer about all of a record's range.
#[must_use]
pub(crate) fn whole(record: &Record, equal: bool) -> Answer {
    answer(record, record.start_byte(), record.len_bytes(), equal)
}

fn answer(record: &Record, offset: u64, len: u64, equal: bool) -> Answer {
    Answer { volume: record.volume(), position: record.position(), offset, len, equal }
}

/// Records looked at ahead of the one that is compared: 4 MiB, many reads at a time for a disk that would else do one.
const AHEAD: usize = 64;

/// To be called before each record `seq` of a batch: has the bases read what the probes behind it will compare. In vain where the
/// journal has it: then the base's bytes are read for nothing, while a compare that finds nothing new is many times as fast.
pub(crate) fn read_ahead<S: Storage>(
    records: &[Record],
    seq: usize,
    base: impl Fn(VolumeIndex) -> Option<std::sync::Arc<Base<S>>>,
) {
    if !seq.is_multiple_of(AHEAD) {
        return;
    }
    let from = if seq == 0 { 0 } else { (seq + AHEAD).min(records.len()) };
    let window = &records[from..(seq + 2 * AHEAD).min(records.len())];
    let probes = || window.iter().filter(|record| record.kind() == Kind::Probe);
    let mut run: Option<(VolumeIndex, std::ops::Range<u64>)> = None;
    let need = |run: Option<(VolumeIndex, std::ops::Range<u64>)>| {
        if let Some((volume, range)) = run
            && let Some(base) = base(volume)
        {
            base.will_need(range);
        }
    };
    for record in probes() {
        let (start, end) = (record.start_byte(), record.start_byte() + record.len_bytes());
        match &mut run {
            Some((volume, range)) if *volume == record.volume() && range.end == start => range.end = end,
            Some(_) | None => need(run.replace((record.volume(), start..end))),
        }
    }
    need(run);
}

/// Compares with the base of a volume that has no point yet, as it is now.
#[must_use]
pub(crate) fn with_base<S: Storage>(base: &Base<S>, record: &Record, dedup: &DedupKey) -> Vec<Answer> {
    let read = |offset: u64, out: &mut [u8]| base.read(offset, out);
    let next = |slot: u64| Ok(base.next_data(slot * SLOT_BYTES)?.map(|at| (at / SLOT_BYTES).max(slot)));
    compare(record, dedup, read, next)
}

/// Compares with the stream's content at the probe's ticket: record `seq` of batch `batch`, which is in the index.
#[must_use]
pub(crate) fn with_stream<S: Storage>(
    stream: &GroupHost<S>,
    record: &Record,
    batch: BatchNo,
    seq: u32,
    dedup: &DedupKey,
) -> Vec<Answer> {
    let upto = UpTo { batch, seq };
    let volume = record.volume();
    let read = |offset: u64, out: &mut [u8]| read_range(stream, volume, upto, offset, out);
    let next = |slot: u64| {
        let indexed = stream.index.next_slot(volume, slot, upto)?;
        let based = stream.base(volume)?.next_data(slot * SLOT_BYTES)?.map(|at| (at / SLOT_BYTES).max(slot));
        Ok(indexed.into_iter().chain(based).min())
    };
    compare(record, dedup, read, next)
}

/// Reads a range that lies inside one slot.
fn read_range<S: Storage>(
    stream: &GroupHost<S>,
    volume: VolumeIndex,
    upto: UpTo,
    offset: u64,
    out: &mut [u8],
) -> Result<()> {
    let slot = offset / SLOT_BYTES;
    if offset.is_multiple_of(SLOT_BYTES) && out.len() as u64 == SLOT_BYTES {
        return reader::read_slot(stream, volume, slot, upto, out);
    }
    let size = stream.record().volumes.iter().find(|decl| decl.index == volume).map_or(0, |decl| decl.size);
    let len = SLOT_BYTES.min(size.saturating_sub(slot * SLOT_BYTES));
    let mut whole = vec![0; usize::try_from(len).expect("at most a slot")];
    reader::read_slot(stream, volume, slot, upto, &mut whole)?;
    let start = usize::try_from(offset % SLOT_BYTES).expect("below a slot");
    // Ranges are checked against the volume's size when the batch comes in.
    out.copy_from_slice(&whole[start..start + out.len()]);
    Ok(())
}

/// `read` reads inside one slot; `next` names the first slot from one on that may hold something.
fn compare(
    record: &Record,
    dedup: &DedupKey,
    read: impl Fn(u64, &mut [u8]) -> Result<()>,
    next: impl Fn(u64) -> Result<Option<u64>>,
) -> Vec<Answer> {
    let (start, end) = (record.start_byte(), record.start_byte() + record.len_bytes());
    if record.kind() == Kind::Probe {
        let mut content = vec![0; usize::try_from(end - start).expect("a probe is at most a slot")];
        let equal = read(start, &mut content).is_ok() && dedup.chunk_id(&content) == record.id();
        return vec![whole(record, equal)];
    }
    let mut differing: Vec<Answer> = Vec::new();
    let mut at = start;
    while at < end {
        let slot = at / SLOT_BYTES;
        // Where that cannot be told, the slot itself is looked at.
        let candidate = next(slot).unwrap_or(Some(slot));
        let Some(candidate) = candidate.filter(|candidate| candidate * SLOT_BYTES < end) else { break };
        let from = (candidate * SLOT_BYTES).max(at);
        let to = ((candidate + 1) * SLOT_BYTES).min(end);
        let mut content = vec![0; usize::try_from(to - from).expect("at most a slot")];
        let zero = read(from, &mut content).is_ok() && is_zero(&content);
        match differing.last_mut() {
            _ if zero => {}
            Some(last) if last.offset + last.len == from => last.len += to - from,
            Some(_) | None => differing.push(answer(record, from, to - from, false)),
        }
        at = to;
    }
    if differing.is_empty() { vec![whole(record, true)] } else { differing }
}
