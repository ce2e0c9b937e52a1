//! Bytes of the disk log. Tables: `docs/formats/disk-log.md`.
//!
//! ```text
//! 0            4096
//! superblock │ segment 0: header, body │ segment 1: header, body │ …
//!
//! a group's line: the bodies of its segments, one after the other
//! │ entry: header, batch, zeroes to 4096 │ entry │ …
//! ```
//!
//! A header is one sector of 512 bytes, so that none is ever written in part, with a BLAKE3 of 16 bytes at its end, and fills a block of 4 KiB
//! with zeroes; a batch has a hash of 32 bytes in its entry's header.

use farshore_proto::{BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, Name, Position, WallTime};

use crate::source::{StreamFlags, VolumeSet};

use super::LoggedBatch;

/// Length of a header's block, and what entries are aligned to; bytes.
pub(super) const BLOCK: usize = 4096;

const VERSION: u32 = 1;
const MAGIC_LOG: &[u8; 8] = b"FARSDLG1";
const MAGIC_SEGMENT: &[u8; 8] = b"FARSDLSG";
const MAGIC_ENTRY: &[u8; 8] = b"FARSDLEN";

/// Bytes of a block that say something.
const SECTOR: usize = 512;
const SUM: usize = SECTOR - 16;

/// One block.
pub(super) type Block = [u8; BLOCK];

/// Beginning of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Superblock {
    /// Random; all headers repeat it.
    pub id: [u8; 16],
    /// Whose log it is.
    pub owner: HostId,
    /// Bytes of a segment, its header included.
    pub segment: u64,
    /// Segments.
    pub segments: u32,
}

/// Beginning of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SegmentHeader {
    pub line: Line,
    /// Number in its line.
    pub index: u64,
    /// Address of the first entry that begins in it, or behind it where none does.
    pub first: u64,
}

/// A life of a group's log, from its first batch to when it is empty.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Line {
    /// Whose batches.
    pub group: GroupId,
    /// Random number.
    pub number: u64,
}

/// Beginning of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct EntryHeader {
    pub line: Line,
    /// Its own address.
    pub at: u64,
    /// The batch before which, and with which, everything was durable in the log when this was written; 0: none.
    pub synced: BatchNo,
    /// All batches before it are at the target; its number need not be the next.
    pub restart: bool,
    pub batch: LoggedBatch,
    /// BLAKE3 of the batch's bytes.
    pub hash: [u8; 32],
}

/// What a block turned out to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Read<T> {
    /// Nothing of this log and line.
    None,
    /// Once something of it.
    Damaged,
    /// Whole.
    Whole(T),
}

/// Whether what begins with these bytes is, or was, a disk log.
#[must_use]
pub fn is_disk_log(start: &[u8]) -> bool {
    start.starts_with(MAGIC_LOG)
}

/// Address of the next entry behind one at `at`.
pub(super) fn entry_end(at: u64, len: u64) -> u64 {
    at + (BLOCK as u64 + len).next_multiple_of(BLOCK as u64)
}

/// Fields one after the other; writing beyond the block is a bug.
struct Writer {
    block: Box<Block>,
    at: usize,
}

impl Writer {
    fn new(magic: &[u8; 8], id: &[u8; 16]) -> Self {
        let mut writer = Self { block: Box::new([0; BLOCK]), at: 0 };
        writer.bytes(magic);
        writer.bytes(id);
        writer
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.block[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn line(&mut self, line: &Line) {
        self.bytes(&line.group.0);
        self.u64(line.number);
    }

    fn flags(&mut self, flags: &StreamFlags) {
        self.u64(u64::from(flags.event_open));
        flags.joined.to_words().iter().for_each(|word| self.u64(*word));
    }

    fn seal(mut self) -> Box<Block> {
        assert!(self.at <= SUM, "a header fits its sector");
        let sum = sum_of(&self.block);
        self.block[SUM..SECTOR].copy_from_slice(&sum);
        self.block
    }
}

struct Reader<'a> {
    block: &'a Block,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Behind magic and id.
    fn new(block: &'a Block) -> Self {
        Self { block, at: 24 }
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let from = self.at;
        self.at += N;
        std::array::from_fn(|i| self.block[from + i])
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn line(&mut self) -> Line {
        Line { group: GroupId(self.array()), number: self.u64() }
    }

    fn flags(&mut self) -> StreamFlags {
        let event_open = self.u64() != 0;
        let words = std::array::from_fn(|_| self.u64());
        StreamFlags { event_open, joined: VolumeSet::from_words(words) }
    }
}

fn sum_of(block: &Block) -> [u8; 16] {
    let hash = blake3::hash(&block[..SUM]);
    std::array::from_fn(|i| hash.as_bytes()[i])
}

fn is_same(own: &Block, found: &Block) -> bool {
    own[..SECTOR] == found[..SECTOR]
}

fn is_sound(block: &Block) -> bool {
    block[SUM..SECTOR] == sum_of(block)
}

impl Superblock {
    pub(super) fn encode(&self) -> Box<Block> {
        let mut writer = Writer::new(MAGIC_LOG, &self.id);
        writer.u32(VERSION);
        writer.u32(self.segments);
        writer.bytes(&self.owner.0);
        writer.u64(self.segment);
        writer.seal()
    }

    /// `Err`: of another version.
    pub(super) fn decode(block: &Block) -> Result<Read<Self>, u32> {
        if !is_disk_log(block) {
            return Ok(Read::None);
        }
        let mut reader = Reader::new(block);
        let (version, segments) = (reader.u32(), reader.u32());
        if !is_sound(block) {
            return Ok(Read::Damaged);
        }
        if version != VERSION {
            return Err(version);
        }
        let id = std::array::from_fn(|i| block[8 + i]);
        let found = Self { id, segments, owner: HostId(reader.array()), segment: reader.u64() };
        let sane = found.segment > BLOCK as u64 && found.segment.is_multiple_of(BLOCK as u64);
        Ok(if sane && is_same(&found.encode(), block) { Read::Whole(found) } else { Read::Damaged })
    }
}

impl SegmentHeader {
    pub(super) fn encode(&self, id: &[u8; 16]) -> Box<Block> {
        let mut writer = Writer::new(MAGIC_SEGMENT, id);
        writer.line(&self.line);
        writer.u64(self.index);
        writer.u64(self.first);
        writer.seal()
    }

    /// One that is damaged belongs to nobody: what it began is missed where its line is read.
    pub(super) fn decode(block: &Block, id: &[u8; 16]) -> Option<Self> {
        let mut reader = Reader::new(block);
        let found = Self { line: reader.line(), index: reader.u64(), first: reader.u64() };
        is_same(&found.encode(id), block).then_some(found)
    }
}

impl EntryHeader {
    pub(super) fn encode(&self, id: &[u8; 16]) -> Box<Block> {
        let batch = &self.batch;
        let mut writer = Writer::new(MAGIC_ENTRY, id);
        writer.line(&self.line);
        writer.u64(self.at);
        writer.u64(self.synced.0);
        writer.u64(batch.len);
        writer.bytes(&self.hash);
        writer.u32(batch.generation.0);
        writer.u32(u32::from(batch.recoverable) | u32::from(batch.app_consistent) << 1 | u32::from(self.restart) << 2);
        writer.u64(batch.incarnation.0);
        writer.u64(batch.number.0);
        writer.u64(batch.end.0);
        writer.u64(batch.time.0);
        writer.u64(batch.payload_bytes);
        writer.u64(batch.written_bytes);
        writer.bytes(&batch.previous.0);
        writer.bytes(&batch.chain.0);
        writer.flags(&batch.before);
        writer.flags(&batch.after);
        let bookmark = batch.bookmark.as_ref().map_or("", Name::as_str);
        writer.u32(u32::try_from(bookmark.len()).expect("names are short"));
        writer.bytes(bookmark.as_bytes());
        writer.seal()
    }

    /// What stands at address `at` of `line`.
    pub(super) fn decode(block: &Block, id: &[u8; 16], line: &Line, at: u64) -> Read<Self> {
        let mut reader = Reader::new(block);
        let (found_line, found_at) = (reader.line(), reader.at_and_back());
        if !is_sound(block) {
            // Of three fields, a flipped bit spoils one. What else lies here, from before, has none of them.
            let here = [block.starts_with(MAGIC_ENTRY) && block[8..24] == *id, found_line == *line, found_at == at];
            return if here.iter().filter(|it| **it).count() >= 2 { Read::Damaged } else { Read::None };
        }
        if !block.starts_with(MAGIC_ENTRY) || block[8..24] != *id || found_line != *line || found_at != at {
            return Read::None;
        }
        match Self::fields(&mut reader, found_line) {
            // Reserved bytes are zero.
            Some(found) if is_same(&found.encode(id), block) => Read::Whole(found),
            Some(_) | None => Read::Damaged,
        }
    }

    fn fields(reader: &mut Reader<'_>, line: Line) -> Option<Self> {
        let (at, synced, len, hash) = (reader.u64(), BatchNo(reader.u64()), reader.u64(), reader.array());
        let (generation, flags) = (Generation(reader.u32()), reader.u32());
        let (incarnation, number) = (Incarnation(reader.u64()), BatchNo(reader.u64()));
        let (end, time) = (Position(reader.u64()), WallTime(reader.u64()));
        let (payload_bytes, written_bytes) = (reader.u64(), reader.u64());
        let (previous, chain) = (ChainHash(reader.array()), ChainHash(reader.array()));
        let (before, after) = (reader.flags(), reader.flags());
        let name_len = usize::try_from(reader.u32()).ok().filter(|len| *len <= Name::LEN_MAX)?;
        let name = std::str::from_utf8(&reader.block[reader.at..reader.at + name_len]).ok()?;
        let bookmark = if name.is_empty() { None } else { Some(Name::new(name).ok()?) };
        let batch = LoggedBatch {
            generation,
            incarnation,
            number,
            end,
            time,
            recoverable: flags & 1 != 0,
            app_consistent: flags & 2 != 0,
            bookmark,
            before,
            after,
            previous,
            chain,
            payload_bytes,
            written_bytes,
            len,
        };
        Some(Self { line, at, synced, restart: flags & 4 != 0, batch, hash })
    }
}

impl Reader<'_> {
    /// The next integer, which is read again.
    fn at_and_back(&mut self) -> u64 {
        let value = self.u64();
        self.at -= 8;
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 16] = [7; 16];
    const LINE: Line = Line { group: GroupId([1; 16]), number: 99 };

    fn entry() -> EntryHeader {
        let joined = VolumeSet::default();
        EntryHeader {
            line: LINE,
            at: 8192,
            synced: BatchNo(3),
            restart: true,
            batch: LoggedBatch {
                generation: Generation(1),
                incarnation: Incarnation(2),
                number: BatchNo(5),
                end: Position(77),
                time: WallTime(8),
                recoverable: true,
                app_consistent: false,
                bookmark: Some(Name::new("before-upgrade").expect("good")),
                before: StreamFlags { event_open: false, joined },
                after: StreamFlags { event_open: true, joined },
                previous: ChainHash([3; 32]),
                chain: ChainHash([4; 32]),
                payload_bytes: 9,
                written_bytes: 10,
                len: 11,
            },
            hash: [6; 32],
        }
    }

    #[test]
    fn headers_come_back() {
        let superblock = Superblock { id: ID, owner: HostId([9; 16]), segment: 1 << 20, segments: 64 };
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(Read::Whole(superblock)));
        let segment = SegmentHeader { line: LINE, index: 4, first: 5 << 20 };
        assert_eq!(SegmentHeader::decode(&segment.encode(&ID), &ID), Some(segment));
        assert_eq!(SegmentHeader::decode(&segment.encode(&ID), &[8; 16]), None, "another log's");
        let entry = entry();
        assert_eq!(EntryHeader::decode(&entry.encode(&ID), &ID, &LINE, 8192), Read::Whole(entry.clone()));
        assert_eq!(EntryHeader::decode(&entry.encode(&ID), &ID, &LINE, 4096), Read::None, "from another place");
    }

    /// Goal: no flipped bit of what was written is taken for the end of the log, or for anything else than damage.
    #[test]
    fn every_flipped_bit_is_damage() {
        let block = entry().encode(&ID);
        for bit in 0..SECTOR * 8 {
            let mut flipped = block.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(EntryHeader::decode(&flipped, &ID, &LINE, 8192), Read::Damaged, "bit {bit}");
        }
        let superblock = Superblock { id: ID, owner: HostId([9; 16]), segment: 1 << 20, segments: 64 }.encode();
        for bit in 64..SECTOR * 8 {
            let mut flipped = superblock.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Superblock::decode(&flipped), Ok(Read::Damaged), "bit {bit}");
        }
    }
}
