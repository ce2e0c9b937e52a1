//! From the records of a batch to the entries of the index.

use std::collections::BTreeMap;

use farshore_proto::record::{Home, Record};
use farshore_proto::{BatchNo, SLOT_SECTORS};

use crate::group::{ChunkPlace, Content, IndexEntry, ZERO_EXTENT_SLOTS};
use crate::points::StreamState;
use crate::segment::Fault;

/// Most entries that one batch may make: 100 MiB of memory. A filter splits discards at 64 MiB, so an honest batch of a
/// million records stays below.
pub(crate) const BATCH_ENTRIES_MAX: usize = 1 << 21;

/// Where a stored batch's frames are.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    /// Segment.
    pub(crate) segment: u32,
    /// Byte of the stored batch in the segment.
    pub(crate) payload_at: u32,
    /// Frames: number, byte of the header in the stored batch; by rising number.
    pub(crate) frames: Vec<(u32, u32)>,
    /// Resolved references, by index of the record.
    pub(crate) references: BTreeMap<u32, ChunkPlace>,
}

impl Placement {
    /// Where the content of the record with index `seq` lies.
    ///
    /// # Errors
    /// When its frame or reference is not stored.
    pub(crate) fn place(&self, seq: u32, record: &Record) -> Result<Content, Fault> {
        match record.home() {
            Home::None => Ok(Content::Zero),
            Home::Reference => match self.references.get(&seq) {
                Some(place) => Ok(Content::Chunk(*place)),
                None => Err(format!("record {seq}: its reference is not stored")),
            },
            Home::Here { frame, offset } => {
                let found = self.frames.binary_search_by_key(&frame, |(number, _)| *number);
                let at = found.map_err(|_| format!("record {seq}: frame {frame} is not stored"))?;
                let frame_offset = self.payload_at + self.frames[at].1;
                Ok(Content::Chunk(ChunkPlace { segment: self.segment, frame_offset, within: offset }))
            }
        }
    }
}

/// The entries of a batch, in the order of its records. `state` is the stream's before the batch; it takes the marks of
/// the records (joins, events) on the way, so that records of a volume count from its join on.
///
/// # Errors
/// A record whose content is not stored, or more entries than [`BATCH_ENTRIES_MAX`].
pub(crate) fn index_entries(
    state: &mut StreamState,
    batch: BatchNo,
    records: &[Record],
    placement: &Placement,
) -> Result<Vec<IndexEntry>, Fault> {
    let mut entries = Vec::with_capacity(records.len());
    for (seq, record) in records.iter().enumerate() {
        let seq = u32::try_from(seq).expect("a list has at most 2^20 records");
        let kind = record.kind();
        if !kind.changes_content() {
            state.apply_mark(kind, record.volume());
            continue;
        }
        if !state.is_journaled(record.volume()) {
            continue;
        }
        if kind.zeroes() {
            zero_entries(batch, seq, record, &mut entries)?;
        } else {
            let content = placement.place(seq, record)?;
            entries.push(one_slot(batch, seq, record, record.start(), record.sectors(), content));
        }
    }
    Ok(entries)
}

fn one_slot(batch: BatchNo, seq: u32, record: &Record, start: u64, sectors: u32, content: Content) -> IndexEntry {
    let slot_sectors = u64::from(SLOT_SECTORS);
    IndexEntry {
        volume: record.volume(),
        slot: start / slot_sectors,
        batch,
        seq,
        start: u8::try_from(start % slot_sectors).expect("below 128"),
        count: u8::try_from(sectors).expect("a piece of one slot has at most 128 sectors"),
        content,
    }
}

fn zero_entries(batch: BatchNo, seq: u32, record: &Record, entries: &mut Vec<IndexEntry>) -> Result<(), Fault> {
    let slot_sectors = u64::from(SLOT_SECTORS);
    let extent_sectors = slot_sectors * ZERO_EXTENT_SLOTS;
    let (mut at, end) = (record.start(), record.start() + u64::from(record.sectors()));
    while at < end {
        if entries.len() >= BATCH_ENTRIES_MAX {
            return Err(format!("record {seq}: the batch makes more than {BATCH_ENTRIES_MAX} index entries"));
        }
        if at.is_multiple_of(extent_sectors) && end - at >= extent_sectors {
            entries.push(one_slot(batch, seq, record, at, SLOT_SECTORS, Content::ZeroExtent));
            at += extent_sectors;
            continue;
        }
        let slot_end = (at / slot_sectors + 1) * slot_sectors;
        let sectors = u32::try_from(slot_end.min(end) - at).expect("at most a slot");
        entries.push(one_slot(batch, seq, record, at, sectors, Content::Zero));
        at = slot_end.min(end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use farshore_proto::record::Kind;
    use farshore_proto::{Position, VolumeIndex};

    /// Goal: zero ranges cover exactly their sectors, whole 64 MiB pieces as one entry. Method: an oracle of sectors.
    #[test]
    fn zero_ranges_cover_exactly_their_sectors() {
        let extent = 128 * ZERO_EXTENT_SLOTS;
        let cases = [(0, 1), (127, 2), (5, 300), (0, extent), (1, extent), (extent - 3, 2 * extent + 7)];
        for (start, sectors) in cases {
            let sectors = u32::try_from(sectors).expect("small");
            let record = Record::new(Kind::Discard, VolumeIndex(1), Position(1), start, sectors);
            let mut entries = Vec::new();
            zero_entries(BatchNo(1), 0, &record, &mut entries).expect("few");
            let mut at = start;
            for entry in &entries {
                assert_eq!(entry.slot * 128 + u64::from(entry.start), at);
                at += if entry.content == Content::ZeroExtent { extent } else { u64::from(entry.count) };
            }
            assert_eq!(at, start + u64::from(sectors));
            assert!(entries.len() <= 2 * 1024 + 3, "{}", entries.len());
        }
        let huge = Record::new(Kind::Discard, VolumeIndex(1), Position(1), 1, u32::MAX);
        let mut entries = Vec::new();
        zero_entries(BatchNo(1), 0, &huge, &mut entries).expect("32,767 extents and some slots");
        assert!(entries.len() < 40_000);
    }
}
