//! The bytes of a ring file: offsets, counts and the structures that lie in it. The table is `docs/formats/ring.md`.
//!
//! Everything behind the static header is made of little-endian 64-bit words that are only touched as atomics, except the
//! cells' payload.

use crate::Error;
#[cfg(not(loom))]
use crate::RingIdentity;
#[cfg(not(loom))]
use crate::crc::crc32c;
use crate::sync::AtomicU64;

const _: () = assert!(cfg!(target_endian = "little"), "the shared words are little-endian");
const _: () = assert!(cfg!(target_pointer_width = "64"), "offsets are usize");

/// First bytes of the file; written last when a ring is made.
pub(crate) const MAGIC: [u8; 8] = *b"FARSRING";
/// Layout version that this program writes and the newest that it reads.
pub const LAYOUT_VERSION: u32 = 1;

/// Bytes of the smallest cell, of a unit of the slab and of the alignment of everything that may go to direct I/O.
pub(crate) const UNIT_BYTES: usize = 4096;
/// Units in one page of the slab: 1 MiB, four of the largest cells. (The models use a tiny page: loom creates every atomic anew
/// for every execution.)
pub(crate) const UNITS_PER_PAGE: usize = if cfg!(loom) { 4 } else { 256 };
/// Cell classes: 4 KiB << class.
pub(crate) const CLASSES: usize = if cfg!(loom) { 2 } else { 7 };
/// Bytes in one page of the slab.
pub(crate) const PAGE_BYTES: usize = UNITS_PER_PAGE * UNIT_BYTES;
/// Longest payload of one record, bytes.
pub const MAX_CELL_BYTES: usize = UNIT_BYTES << (CLASSES - 1);
/// Cells in one word of a page's map of used cells. (Two in the models, so that a page's classes use different words there, too.)
pub(crate) const MAP_BITS: usize = if cfg!(loom) { 2 } else { 64 };
/// Words of that map.
pub(crate) const MAP_WORDS: usize = UNITS_PER_PAGE.div_ceil(MAP_BITS);

/// Volumes of one group on one host; the size of the volume table.
pub const MAX_VOLUMES: usize = 16;
/// Writes without payload (zeroes, discards) that may be between reservation and publication at a time, all queues together. More
/// than any front end keeps in flight (16 queues of 64).
pub(crate) const INTENTS: usize = if cfg!(loom) { 64 } else { 1024 };

/// Descriptors per ring, limits: small rings for tests, and 2^24 * 64 bytes = 1 GiB.
pub(crate) const DESCRIPTORS_MIN: u64 = 8;
pub(crate) const DESCRIPTORS_MAX: u64 = 1 << 24;
/// Pages of the slab, upper limit: 1 TiB; keeps a unit's index inside 32 bits.
pub(crate) const PAGES_MAX: u32 = 1 << 20;

// Static header: one page, immutable once made.
const H_MAGIC: usize = 0;
const H_VERSION: usize = H_MAGIC + 8;
const H_LENGTH: usize = H_VERSION + 4;
const H_VAULT: usize = H_LENGTH + 4;
const H_GROUP: usize = H_VAULT + 16;
const H_HOST: usize = H_GROUP + 16;
const H_BOOT: usize = H_HOST + 16;
const H_INCARNATION: usize = H_BOOT + 16;
const H_GENERATION: usize = H_INCARNATION + 8;
const H_DESCRIPTORS: usize = H_GENERATION + 8;
const H_PAGES: usize = H_DESCRIPTORS + 8;
const H_UNITS: usize = H_PAGES + 4;
const H_INTENTS: usize = H_UNITS + 4;
const H_VOLUMES: usize = H_INTENTS + 4;
const H_TOTAL: usize = H_VOLUMES + 4;
const H_CHECKSUM: usize = H_TOTAL + 8;
const H_END: usize = H_CHECKSUM + 4;
/// Bytes of the static header that are in use.
pub(crate) const HEADER_BYTES: usize = H_END;
const _: () = assert!(H_END == 132 && H_TOTAL.is_multiple_of(8) && H_DESCRIPTORS.is_multiple_of(8));

// Live part.
pub(crate) const LINES_AT: usize = 4096;
pub(crate) const VOLUMES_AT: usize = LINES_AT + 1024;
pub(crate) const STATE_AT: usize = VOLUMES_AT + MAX_VOLUMES * 64;
pub(crate) const INTENT_MAP_AT: usize = STATE_AT + 2 * 512;
pub(crate) const DESCRIPTORS_AT: usize = 8192;
const _: () = assert!(INTENT_MAP_AT + INTENTS / 8 <= DESCRIPTORS_AT);
const _: () = assert!(VOLUMES_AT == 5120 && STATE_AT == 6144 && INTENT_MAP_AT == 7168);

/// Bit of the head word: no claim succeeds.
pub(crate) const CLOSED: u64 = 1 << 63;

/// A word alone on its pair of cache lines (adjacent lines are fetched in pairs).
#[repr(C, align(128))]
pub(crate) struct Line(pub(crate) AtomicU64);

/// The hot words.
#[repr(C)]
pub(crate) struct Lines {
    /// [`CLOSED`] and the next position to be claimed.
    pub(crate) head: Line,
    /// Descriptors claimed but not freed, plus those reserved and not yet claimed.
    pub(crate) credits: Line,
    /// Positions below are freed. Written by the consumer alone.
    pub(crate) freed: Line,
    /// 1 while the consumer sleeps or is about to.
    pub(crate) waiting: Line,
    /// 1 = stopped in order, nothing in the ring.
    pub(crate) clean: Line,
}

/// One descriptor. `sequence` is position + 1 once published; any other value: not (yet) that position's.
#[repr(C, align(64))]
pub(crate) struct DescriptorSlot {
    pub(crate) sequence: AtomicU64,
    /// kind u8, flags u8, volume u16, payload length u32, from the low end.
    pub(crate) meta: AtomicU64,
    pub(crate) offset: AtomicU64,
    pub(crate) length: AtomicU64,
    pub(crate) time: AtomicU64,
    pub(crate) aux: AtomicU64,
    /// 0 = no cell, else [`HOLDER_CELL`], class u8 at bit 32, unit index u32.
    pub(crate) holder: AtomicU64,
    pub(crate) spare: AtomicU64,
}

/// Marks a descriptor's `holder` word as naming a cell.
pub(crate) const HOLDER_CELL: u64 = 1 << 63;

/// State of a cell or an intent. One per unit of the slab (a larger cell uses that of its first unit), then one per intent.
#[repr(C, align(64))]
pub(crate) struct CellHeader {
    /// state u8, class u8, volume u16 at bit 16, payload length u32 at bit 32.
    pub(crate) state: AtomicU64,
    /// Start of the range being written, bytes.
    pub(crate) offset: AtomicU64,
    /// Its length, bytes.
    pub(crate) length: AtomicU64,
    /// Position that published it.
    pub(crate) position: AtomicU64,
    /// One for the ring, one for each reader.
    pub(crate) readers: AtomicU64,
    pub(crate) spare: [AtomicU64; 3],
}

/// Used cells of a page, one bit each, cell 0 in the lowest bit.
#[repr(C)]
pub(crate) struct PageMap {
    pub(crate) words: [AtomicU64; MAP_WORDS],
}

/// One line of the volume table; see `volumes.rs`.
#[repr(C, align(64))]
pub(crate) struct VolumeEntry {
    pub(crate) words: [AtomicU64; 8],
}

/// One of the two copies of the stream state; see `state.rs`.
#[repr(C, align(64))]
pub(crate) struct StateCopy {
    pub(crate) words: [AtomicU64; 64],
}

#[cfg(not(loom))]
mod sizes {
    use super::*;
    use std::mem::{offset_of, size_of};

    const _: () = assert!(size_of::<Line>() == 128);
    const _: () = assert!(size_of::<Lines>() == 640);
    const _: () = assert!(offset_of!(Lines, credits) == 128 && offset_of!(Lines, freed) == 256);
    const _: () = assert!(offset_of!(Lines, waiting) == 384 && offset_of!(Lines, clean) == 512);
    const _: () = assert!(size_of::<DescriptorSlot>() == 64 && offset_of!(DescriptorSlot, holder) == 48);
    const _: () = assert!(size_of::<CellHeader>() == 64 && offset_of!(CellHeader, readers) == 32);
    const _: () = assert!(size_of::<PageMap>() == 32);
    const _: () = assert!(size_of::<VolumeEntry>() == 64);
    const _: () = assert!(size_of::<StateCopy>() == 512);
    const _: () = assert!(PAGE_BYTES == 1 << 20 && MAX_CELL_BYTES == 256 << 10);
}

/// States of a cell or an intent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum CellState {
    /// In a free list.
    Free = 0,
    /// Owned by a producer; the backing device has seen nothing of it.
    Filling = 1,
    /// Its range may differ between backing device and stream.
    Writing = 2,
    /// A position has been claimed for it.
    Published = 3,
}

/// For `docs/states.md`: each state, its longest stay, what ends it.
pub const CELL_STATES: [[&str; 3]; 4] = [
    ["free", "at rest", "a queue reserves it"],
    [
        "filling",
        "none: a guest sends its bytes; the connection's end, or the next process, gives it back",
        "the write is handed to the backing device",
    ],
    [
        "writing",
        "none: the backing device's time; the range is named in shared memory all the while",
        "ticket, or mark in `missing`",
    ],
    ["published", "none: the link's time; a full ring closes, and guests go on", "durable at the target"],
];
const _: fn(&CellState) -> &[&str; 3] = |state| match state {
    CellState::Free => &CELL_STATES[0],
    CellState::Filling => &CELL_STATES[1],
    CellState::Writing => &CELL_STATES[2],
    CellState::Published => &CELL_STATES[3],
};

/// The `state` word of a [`CellHeader`], in parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StateWord {
    pub(crate) state: CellState,
    pub(crate) class: u8,
    pub(crate) volume: u16,
    pub(crate) len: u32,
}

impl StateWord {
    pub(crate) const fn encode(self) -> u64 {
        self.state as u64 | (self.class as u64) << 8 | (self.volume as u64) << 16 | (self.len as u64) << 32
    }

    /// The volume in a word whose state does not matter.
    pub(crate) const fn volume_of(word: u64) -> u16 {
        let bytes = word.to_le_bytes();
        u16::from_le_bytes([bytes[2], bytes[3]])
    }

    /// # Errors
    /// `Corrupt` for an unknown state.
    pub(crate) fn decode(word: u64) -> Result<Self, Error> {
        let [state, class, v0, v1, l0, l1, l2, l3] = word.to_le_bytes();
        let state = match state {
            0 => CellState::Free,
            1 => CellState::Filling,
            2 => CellState::Writing,
            3 => CellState::Published,
            _ => return Err(Error::Corrupt { what: "cell in an unknown state", value: word }),
        };
        Ok(Self { state, class, volume: u16::from_le_bytes([v0, v1]), len: u32::from_le_bytes([l0, l1, l2, l3]) })
    }
}

/// The counts from which all offsets follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Geometry {
    /// Power of two.
    pub(crate) descriptors: u64,
    pub(crate) pages: u32,
}

impl Geometry {
    pub(crate) fn new(descriptors: u64, pages: u32) -> Result<Self, Error> {
        if !descriptors.is_power_of_two() || !(DESCRIPTORS_MIN..=DESCRIPTORS_MAX).contains(&descriptors) {
            return Err(Error::Config { what: "the number of descriptors must be a power of two from 8 to 2^24" });
        }
        if pages == 0 || pages > PAGES_MAX {
            return Err(Error::Config { what: "the slab must have between 1 MiB and 1 TiB" });
        }
        Ok(Self { descriptors, pages })
    }

    pub(crate) const fn units(self) -> usize {
        self.pages as usize * UNITS_PER_PAGE
    }

    /// Cell headers: one per unit and one per intent.
    pub(crate) const fn headers(self) -> usize {
        self.units() + INTENTS
    }

    pub(crate) const fn page_states_at(self) -> usize {
        DESCRIPTORS_AT + index(self.descriptors) * 64
    }

    pub(crate) const fn page_maps_at(self) -> usize {
        (self.page_states_at() + self.pages as usize * 8).next_multiple_of(64)
    }

    pub(crate) const fn headers_at(self) -> usize {
        (self.page_maps_at() + self.pages as usize * MAP_WORDS * 8).next_multiple_of(64)
    }

    pub(crate) const fn slab_at(self) -> usize {
        (self.headers_at() + self.headers() * 64).next_multiple_of(UNIT_BYTES)
    }

    pub(crate) const fn slab_bytes(self) -> usize {
        self.pages as usize * PAGE_BYTES
    }

    /// Bytes of the ring part of the file; the volumes' bitmaps follow.
    pub(crate) const fn total(self) -> usize {
        self.slab_at() + self.slab_bytes()
    }

    /// Descriptors that only [`crate::Consumer::reopen`] may take.
    pub(crate) const fn reopen_reserve(self) -> u64 {
        if self.descriptors >= 1024 { 8 } else { 1 }
    }

    /// Descriptors that only markers and events (and re-opening) may take, in all.
    pub(crate) const fn marker_reserve(self) -> u64 {
        if self.descriptors >= 1024 { 64 } else { 2 }
    }

    /// Pages of the slab that only markers' payload may take.
    pub(crate) const fn reserved_pages(self) -> u32 {
        if self.pages >= 2 { 1 } else { 0 }
    }
}

/// Encodes the static header, with checksum.
#[cfg(not(loom))]
pub(crate) fn encode_header(identity: &RingIdentity, geometry: Geometry) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(H_MAGIC, &MAGIC);
    put(H_VERSION, &LAYOUT_VERSION.to_le_bytes());
    put(H_LENGTH, &(HEADER_BYTES as u64).to_le_bytes()[..4]);
    put(H_VAULT, &identity.vault);
    put(H_GROUP, &identity.group);
    put(H_HOST, &identity.host);
    put(H_BOOT, &identity.boot);
    put(H_INCARNATION, &identity.incarnation.to_le_bytes());
    put(H_GENERATION, &identity.generation.to_le_bytes());
    put(H_DESCRIPTORS, &geometry.descriptors.to_le_bytes());
    put(H_PAGES, &geometry.pages.to_le_bytes());
    put(H_UNITS, &(UNITS_PER_PAGE as u64).to_le_bytes()[..4]);
    put(H_INTENTS, &(INTENTS as u64).to_le_bytes()[..4]);
    put(H_VOLUMES, &(MAX_VOLUMES as u64).to_le_bytes()[..4]);
    put(H_TOTAL, &(geometry.total() as u64).to_le_bytes());
    let checksum = crc32c(&out[..H_CHECKSUM]);
    out[H_CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// Decodes and checks the static header: magic, version, checksum, sizes. Whose ring it is, the caller compares.
///
/// # Errors
/// `WrongMagic`, `NewerVersion`, `HeaderChecksum`, `SizeMismatch`.
#[cfg(not(loom))]
pub(crate) fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<(RingIdentity, Geometry), Error> {
    if bytes[..8] != MAGIC {
        return Err(Error::WrongMagic);
    }
    let version = u32::from_le_bytes(field(bytes, H_VERSION));
    if version > LAYOUT_VERSION {
        return Err(Error::NewerVersion { found: version, known: LAYOUT_VERSION });
    }
    let found = u32::from_le_bytes(field(bytes, H_CHECKSUM));
    let expected = crc32c(&bytes[..H_CHECKSUM]);
    if found != expected {
        return Err(Error::HeaderChecksum { found, expected });
    }
    let identity = RingIdentity {
        vault: field(bytes, H_VAULT),
        group: field(bytes, H_GROUP),
        host: field(bytes, H_HOST),
        boot: field(bytes, H_BOOT),
        incarnation: u64::from_le_bytes(field(bytes, H_INCARNATION)),
        generation: u64::from_le_bytes(field(bytes, H_GENERATION)),
    };
    let total = u64::from_le_bytes(field(bytes, H_TOTAL));
    let geometry =
        Geometry::new(u64::from_le_bytes(field(bytes, H_DESCRIPTORS)), u32::from_le_bytes(field(bytes, H_PAGES)))
            .map_err(|_| Error::SizeMismatch { found: total, expected: 0 })?;
    let constants = [H_LENGTH, H_UNITS, H_INTENTS, H_VOLUMES].map(|at| u32::from_le_bytes(field(bytes, at)) as usize);
    if constants != [HEADER_BYTES, UNITS_PER_PAGE, INTENTS, MAX_VOLUMES] || total != geometry.total() as u64 {
        return Err(Error::SizeMismatch { found: total, expected: geometry.total() as u64 });
    }
    Ok((identity, geometry))
}

#[cfg(not(loom))]
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

/// A 64-bit count or offset as an index.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted above")]
pub(crate) const fn index(value: u64) -> usize {
    value as usize
}

/// The low 32 bits of a word.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
pub(crate) const fn low32(value: u64) -> u32 {
    value as u32
}

/// The low 8 bits of a word.
#[expect(clippy::cast_possible_truncation, reason = "the low byte is what is wanted")]
pub(crate) const fn low8(value: u64) -> u8 {
    value as u8
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn identity() -> RingIdentity {
        RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 5, generation: 6 }
    }

    #[test]
    fn header_comes_back_and_every_flipped_bit_is_seen() {
        let geometry = Geometry::new(1024, 4).expect("valid counts");
        let bytes = encode_header(&identity(), geometry);
        assert_eq!(decode_header(&bytes).expect("own header"), (identity(), geometry));
        for bit in 0..HEADER_BYTES * 8 {
            let mut torn = bytes;
            torn[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_header(&torn).is_err(), "bit {bit} flipped and not seen");
        }
    }

    #[test]
    fn golden_offsets_of_the_default_size() {
        let geometry = Geometry::new(65536, 256).expect("valid counts");
        assert_eq!(geometry.page_states_at(), 8192 + 65536 * 64);
        assert_eq!(geometry.page_maps_at(), 8192 + 65536 * 64 + 2048);
        assert_eq!(geometry.headers_at(), 8192 + 65536 * 64 + 2048 + 8192);
        assert_eq!(geometry.slab_at(), (geometry.headers_at() + (65536 + 1024) * 64).next_multiple_of(4096));
        assert_eq!(geometry.total(), geometry.slab_at() + (256 << 20));
    }

    #[test]
    fn state_word_keeps_its_parts() {
        let word = StateWord { state: CellState::Writing, class: 6, volume: 0xABCD, len: 0xDEAD_BEEF };
        assert_eq!(word.encode(), 0xDEAD_BEEF_ABCD_0602);
        assert_eq!(StateWord::decode(word.encode()).expect("own word"), word);
        assert!(StateWord::decode(4).is_err());
    }
}
