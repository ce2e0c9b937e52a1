//! Entries and keys: in memory, and in the 48-byte form of a run.

use farshore_proto::{BatchNo, SLOT_SECTORS, VolumeIndex};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::group::{ChunkPlace, Content, IndexEntry, UpTo, ZERO_EXTENT_SLOTS};

/// Bytes of an entry in a run.
pub(crate) const ENTRY_BYTES: usize = 48;
/// Bytes of a key in a fence block.
pub(crate) const KEY_BYTES: usize = 24;
/// All sectors of a slot.
pub(crate) const ALL_SECTORS: u128 = u128::MAX;
/// Set in the place of zero extents, so that they lie apart from the versions of single slots: a read finds the newest
/// extent over a slot in one step, however often the extent's first slot itself was written.
pub(crate) const EXTENT_BIT: u64 = 1 << 63;

/// What runs are sorted by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Key {
    pub(crate) volume: u16,
    /// The slot, or the extent's first slot with [`EXTENT_BIT`].
    pub(crate) place: u64,
    pub(crate) batch: u64,
    pub(crate) seq: u32,
}

/// When something was written: batch and index in its list.
pub(crate) type Moment = (u64, u32);

impl Key {
    pub(crate) fn of(entry: &IndexEntry) -> Self {
        Self { volume: entry.volume.0, place: place(entry), batch: entry.batch.0, seq: entry.seq }
    }

    /// The last key that `upto` may see.
    pub(crate) fn last(volume: VolumeIndex, place: u64, upto: UpTo) -> Self {
        Self { volume: volume.0, place, batch: upto.batch.0, seq: upto.seq }
    }

    /// Before every entry of `place`: batches begin with 1.
    pub(crate) fn before(volume: VolumeIndex, place: u64) -> Self {
        Self { volume: volume.0, place, batch: 0, seq: 0 }
    }

    pub(crate) fn is_at(&self, volume: VolumeIndex, place: u64) -> bool {
        self.volume == volume.0 && self.place == place
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let raw = RawKey {
            volume: self.volume.into(),
            reserved: 0.into(),
            seq: self.seq.into(),
            place: self.place.into(),
            batch: self.batch.into(),
        };
        out.extend_from_slice(raw.as_bytes());
    }

    /// `None`: not a key.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let raw = RawKey::read_from_bytes(bytes).ok()?;
        let key = Self { volume: raw.volume.get(), place: raw.place.get(), batch: raw.batch.get(), seq: raw.seq.get() };
        (raw.reserved.get() == 0).then_some(key)
    }
}

/// Where an entry is sorted.
pub(crate) fn place(entry: &IndexEntry) -> u64 {
    match entry.content {
        Content::ZeroExtent => entry.slot | EXTENT_BIT,
        Content::Zero | Content::Chunk(_) => entry.slot,
    }
}

/// The place of the extent over `slot`.
pub(crate) fn extent_place(slot: u64) -> u64 {
    (slot / ZERO_EXTENT_SLOTS * ZERO_EXTENT_SLOTS) | EXTENT_BIT
}

/// The sectors that an entry covers, as bits.
pub(crate) fn mask(entry: &IndexEntry) -> u128 {
    match entry.content {
        Content::ZeroExtent => ALL_SECTORS,
        Content::Zero | Content::Chunk(_) => sectors(u32::from(entry.start), u32::from(entry.count)),
    }
}

/// `count` sectors from `start`, as bits; what lies beyond the slot is left out.
#[must_use]
pub fn sectors(start: u32, count: u32) -> u128 {
    if start >= SLOT_SECTORS || count == 0 {
        return 0;
    }
    let bits = if count >= SLOT_SECTORS { ALL_SECTORS } else { (1 << count) - 1 };
    bits << start
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawKey {
    volume: U16,
    reserved: U16,
    seq: U32,
    place: U64,
    batch: U64,
}

const _: () = assert!(size_of::<RawKey>() == KEY_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    volume: U16,
    start: u8,
    count: u8,
    kind: u8,
    origin_seq: [u8; 3],
    place: U64,
    batch: U64,
    seq: U32,
    segment: U32,
    frame_offset: U32,
    within: U32,
    origin_batch: U64,
}

const _: () = assert!(size_of::<RawEntry>() == ENTRY_BYTES);

const KIND_ZERO: u8 = 0;
const KIND_ZERO_EXTENT: u8 = 1;
const KIND_CHUNK: u8 = 2;
/// In a copy that belongs to a slot map.
const IN_MAP: u8 = 0x80;
/// Records of a batch are at most 2^20 (`BATCH_RECORDS_MAX`), so three bytes hold a copy's own number.
pub(crate) const SEQ_MAX: u32 = (1 << 24) - 1;

/// An entry as it stands in a run: itself, or a copy in the slot map behind the entry at `key`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stored {
    pub(crate) key: Key,
    pub(crate) in_map: bool,
    pub(crate) entry: IndexEntry,
}

impl Stored {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, place) = match self.entry.content {
            Content::Zero => (KIND_ZERO, ChunkPlace { segment: 0, frame_offset: 0, within: 0 }),
            Content::ZeroExtent => (KIND_ZERO_EXTENT, ChunkPlace { segment: 0, frame_offset: 0, within: 0 }),
            Content::Chunk(place) => (KIND_CHUNK, place),
        };
        let (origin_batch, origin_seq) = if self.in_map { (self.entry.batch.0, self.entry.seq) } else { (0, 0) };
        let [a, b, c, _] = origin_seq.to_le_bytes();
        let raw = RawEntry {
            volume: self.key.volume.into(),
            start: self.entry.start,
            count: self.entry.count,
            kind: if self.in_map { kind | IN_MAP } else { kind },
            origin_seq: [a, b, c],
            place: self.key.place.into(),
            batch: self.key.batch.into(),
            seq: self.key.seq.into(),
            segment: place.segment.into(),
            frame_offset: place.frame_offset.into(),
            within: place.within.into(),
            origin_batch: origin_batch.into(),
        };
        out.extend_from_slice(raw.as_bytes());
    }

    /// `Err` says what is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let raw = RawEntry::read_from_bytes(bytes).map_err(|_| "entry is cut off")?;
        let key = Key { volume: raw.volume.get(), place: raw.place.get(), batch: raw.batch.get(), seq: raw.seq.get() };
        let place =
            ChunkPlace { segment: raw.segment.get(), frame_offset: raw.frame_offset.get(), within: raw.within.get() };
        let content = match raw.kind & !IN_MAP {
            KIND_ZERO => Content::Zero,
            KIND_ZERO_EXTENT => Content::ZeroExtent,
            KIND_CHUNK => Content::Chunk(place),
            _ => return Err("entry of unknown kind"),
        };
        if (key.place & EXTENT_BIT != 0) != (content == Content::ZeroExtent) {
            return Err("zero extent out of its place");
        }
        if raw.count == 0 || u32::from(raw.start) + u32::from(raw.count) > SLOT_SECTORS {
            return Err("entry reaches beyond its slot");
        }
        let in_map = raw.kind & IN_MAP != 0;
        let [a, b, c] = raw.origin_seq;
        let (batch, seq) = match in_map {
            true => (raw.origin_batch.get(), u32::from_le_bytes([a, b, c, 0])),
            false => (key.batch, key.seq),
        };
        let entry = IndexEntry {
            volume: VolumeIndex(key.volume),
            slot: key.place & !EXTENT_BIT,
            batch: BatchNo(batch),
            seq,
            start: raw.start,
            count: raw.count,
            content,
        };
        Ok(Self { key, in_map, entry })
    }
}

/// What versions a slot has, visible or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Versions {
    /// Some have bytes.
    pub(crate) chunks: bool,
    /// Some are zeroes.
    pub(crate) zeroes: bool,
}

impl Versions {
    /// Not looked at to the end.
    pub(crate) const ANY: Self = Self { chunks: true, zeroes: true };

    pub(crate) fn of(entry: &IndexEntry) -> Self {
        let chunks = matches!(entry.content, Content::Chunk(_));
        Self { chunks, zeroes: !chunks }
    }
}

impl std::ops::BitOr for Versions {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self { chunks: self.chunks || other.chunks, zeroes: self.zeroes || other.zeroes }
    }
}

/// Entries of one slot, taken newest first until every wanted sector has one.
#[derive(Debug)]
pub(crate) struct Cover {
    /// Sectors still without an entry.
    pub(crate) need: u128,
    /// Each brings at least one wanted sector.
    pub(crate) entries: Vec<IndexEntry>,
}

impl Cover {
    pub(crate) fn of(need: u128) -> Self {
        Self { need, entries: Vec::new() }
    }

    /// Takes `entry`, older than all before, if it brings something. `true`: the cover is complete.
    pub(crate) fn take(&mut self, entry: &IndexEntry) -> bool {
        let brings = mask(entry) & self.need;
        if brings != 0 {
            self.need &= !brings;
            self.entries.push(*entry);
        }
        self.is_complete()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.need == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(content: Content) -> IndexEntry {
        IndexEntry {
            volume: VolumeIndex(7),
            slot: 2048,
            batch: BatchNo(0x0102_0304_0506),
            seq: 0x000a_0b0c,
            start: 3,
            count: 125,
            content,
        }
    }

    #[test]
    fn golden_bytes() {
        let place = ChunkPlace { segment: 0x1122_3344, frame_offset: 0x5566_7788, within: 0x99aa_bbcc };
        let entry = entry(Content::Chunk(place));
        let mut bytes = Vec::new();
        Stored { key: Key::of(&entry), in_map: false, entry }.encode(&mut bytes);
        let expected: [u8; ENTRY_BYTES] = [
            7, 0, 3, 125, 2, 0, 0, 0, // volume, start, count, kind, origin seq
            0, 8, 0, 0, 0, 0, 0, 0, // place
            6, 5, 4, 3, 2, 1, 0, 0, // batch
            0x0c, 0x0b, 0x0a, 0, 0x44, 0x33, 0x22, 0x11, // seq, segment
            0x88, 0x77, 0x66, 0x55, 0xcc, 0xbb, 0xaa, 0x99, // frame offset, within
            0, 0, 0, 0, 0, 0, 0, 0, // origin batch
        ];
        assert_eq!(bytes, expected);
        assert_eq!(Stored::decode(&bytes).map(|stored| stored.entry), Ok(entry));
    }

    #[test]
    fn copies_keep_their_own_moment() {
        for content in [Content::Zero, Content::ZeroExtent] {
            let entry = entry(content);
            let key = Key { batch: entry.batch.0 + 9, seq: 1, ..Key::of(&entry) };
            let stored = Stored { key, in_map: true, entry };
            let mut bytes = Vec::new();
            stored.encode(&mut bytes);
            assert_eq!(Stored::decode(&bytes), Ok(stored));
        }
        let mut bytes = Vec::new();
        let entry = entry(Content::Zero);
        Stored { key: Key::of(&entry), in_map: false, entry }.encode(&mut bytes);
        for (at, value) in [(4, 3), (3, 0), (3, 126), (15, 0x80)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Stored::decode(&bad).is_err(), "byte {at} = {value}");
        }
    }

    #[test]
    fn masks() {
        assert_eq!(sectors(0, 128), ALL_SECTORS);
        assert_eq!(sectors(127, 1), 1 << 127);
        assert_eq!(sectors(120, 100), 0xff << 120);
        assert_eq!(sectors(128, 1), 0);
        let mut cover = Cover::of(sectors(0, 8));
        assert!(!cover.take(&entry(Content::Zero)));
        assert_eq!((cover.need, cover.entries.len()), (0b111, 1));
        assert!(!cover.take(&entry(Content::Zero)), "brings nothing new");
        assert!(cover.take(&entry(Content::ZeroExtent)));
        assert_eq!(cover.entries.len(), 2);
    }
}
