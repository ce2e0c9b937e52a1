//! Bytes of the activity log. Tables: `docs/formats/activity-log.md`.
//!
//! ```text
//! 0            1 … 256                 257 …
//! superblock │ ring of transactions │ pages of marks, in pairs
//! ```
//!
//! All blocks are 4 KiB and checked by a CRC-32C; all but the superblock name the log that they belong to.

use farshore_proto::LogMark;

use super::{Extent, VolumeKey};

/// Length of every block, bytes.
pub(super) const BLOCK: usize = 4096;
/// Transactions in the ring.
pub(super) const TRANSACTIONS: usize = 256;
/// First block of the pages of marks.
pub(super) const FIRST_PAGE: usize = 1 + TRANSACTIONS;
/// Changes in one transaction.
pub(super) const CHANGES_MAX: usize = 48;
/// Places of the table that one transaction repeats.
pub(super) const SLICE: usize = 176;
/// Earlier lives that a transaction remembers.
pub(super) const ANCESTORS_MAX: usize = 4;
/// Extents in a page of marks.
pub(super) const PAGE_EXTENTS: usize = 504;

/// Pages that a volume can have.
#[expect(clippy::cast_possible_truncation, reason = "2^32 / 504")]
const PAGES_OF_VOLUME: u32 = ((1u64 << 32) / PAGE_EXTENTS as u64) as u32;
/// Fewest and most places of a table. It is repeated over and over by the transactions; half of their ring holds one of 22,528.
pub(super) const PLACES: std::ops::RangeInclusive<u32> = 4..=16_384;

const VERSION: u32 = 1;
const MAGIC_LOG: &[u8; 8] = b"FARSACT1";
const MAGIC_TRANSACTION: &[u8; 8] = b"FARSACTR";
const MAGIC_PAGE: &[u8; 8] = b"FARSACTM";

const HEADER: usize = 128;
const CRC: usize = HEADER - 4;
const CHANGE_BYTES: usize = 24;
const OWNER_BYTES: usize = 16;
const CHANGES_AT: usize = HEADER;
const SLICE_AT: usize = CHANGES_AT + CHANGES_MAX * CHANGE_BYTES;
const PAGE_HEADER: usize = 64;
const _: () = assert!(SLICE_AT + SLICE * OWNER_BYTES == BLOCK);
const _: () = assert!(PAGE_HEADER + PAGE_EXTENTS * 8 == BLOCK);

/// One block.
pub(super) type Block = [u8; BLOCK];

/// Beginning of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Superblock {
    /// Random; every other block repeats it.
    pub id: [u8; 16],
    /// Whose log it is.
    pub owner: [u8; 16],
    /// Places of the table.
    pub places: u32,
}

/// A transaction.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Transaction {
    pub at: LogMark,
    /// Number of the last transaction that was durable when this one's batch began.
    pub base: u64,
    pub places: u32,
    /// Where earlier lives ended, newest first.
    pub ancestors: Vec<LogMark>,
    /// Place and its new owner.
    pub changes: Vec<(u32, Option<Extent>)>,
    /// First place of the slice.
    pub first: u32,
    /// The table from there on, after the changes.
    pub slice: Vec<Option<Extent>>,
}

/// Marks of neighbouring extents of one volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Page {
    pub volume: VolumeKey,
    /// Of its extents: the first is this times [`PAGE_EXTENTS`].
    pub number: u32,
    /// The higher one of a pair counts.
    pub sequence: u64,
    /// A bit per slot of each extent.
    pub masks: Box<[u64; PAGE_EXTENTS]>,
}

/// What a block turned out to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Read<T> {
    /// All zeroes, or of another log: never written by this one.
    Empty,
    /// Neither empty nor whole.
    Damaged,
    /// Whole.
    Whole(T),
}

/// Whether what begins with these bytes is, or was, an activity log.
#[must_use]
pub fn is_log(start: &[u8]) -> bool {
    start.starts_with(MAGIC_LOG)
}

/// Position of a transaction's block in the file, bytes.
pub(super) fn transaction_at(number: u64) -> u64 {
    (1 + index_of(number)) as u64 * BLOCK as u64
}

/// A transaction's place in the ring.
pub(super) fn index_of(number: u64) -> usize {
    usize::try_from(number % TRANSACTIONS as u64).expect("below 256")
}

/// First place of the slice that transaction `number` repeats in a table of `places`.
pub(super) fn slice_of(number: u64, places: u32) -> std::ops::Range<u32> {
    let slices = slices(places);
    let slice = u32::try_from(SLICE).expect("176");
    let first = u32::try_from(number % slices).expect("below the number of slices") * slice;
    first..(first + slice).min(places)
}

/// Transactions in a row that hold a whole table.
pub(super) fn slices(places: u32) -> u64 {
    u64::from(places).div_ceil(SLICE as u64).max(1)
}

/// Integers at fixed places.
struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn owner(&mut self, at: usize, owner: Option<Extent>) {
        let Some(Extent { volume, number }) = owner else { return };
        self.put(at, &volume.group);
        self.put(at + 8, &number.to_le_bytes());
        self.put(at + 12, &volume.index.to_le_bytes());
        self.put(at + 14, &1u16.to_le_bytes());
    }

    /// The last four bytes of `..end` are the checksum of the block without them.
    fn seal(&mut self, crc_at: usize) {
        let crc = checksum(self.0, crc_at);
        self.put(crc_at, &crc.to_le_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[at + i])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// `Err`: neither used nor empty.
    fn owner(&self, at: usize) -> Result<Option<Extent>, ()> {
        match self.u16(at + 14) {
            0 if self.0[at..at + OWNER_BYTES].iter().all(|byte| *byte == 0) => Ok(None),
            1 => {
                let volume = VolumeKey { group: self.array(at), index: self.u16(at + 12) };
                Ok(Some(Extent { volume, number: self.u32(at + 8) }))
            }
            _ => Err(()),
        }
    }
}

/// CRC-32C of a block without its checksum's own bytes.
fn checksum(block: &[u8], crc_at: usize) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&block[..crc_at]);
    digest.update(&block[crc_at + 4..]);
    u32::try_from(digest.finalize()).expect("a CRC-32 has 32 bits")
}

fn is_zero(block: &Block) -> bool {
    block.iter().all(|byte| *byte == 0)
}

impl Superblock {
    pub(super) fn encode(&self) -> Block {
        let mut block = [0; BLOCK];
        let mut writer = Writer(&mut block);
        writer.put(0, MAGIC_LOG);
        writer.put(8, &VERSION.to_le_bytes());
        writer.put(12, &self.places.to_le_bytes());
        writer.put(16, &self.id);
        writer.put(32, &self.owner);
        writer.seal(CRC);
        block
    }

    /// `Err`: a log of another version.
    pub(super) fn decode(block: &Block) -> Result<Read<Self>, u32> {
        let reader = Reader(block);
        if is_zero(block) {
            return Ok(Read::Empty);
        }
        if reader.array(0) != *MAGIC_LOG || reader.u32(CRC) != checksum(block, CRC) {
            return Ok(Read::Damaged);
        }
        if reader.u32(8) != VERSION {
            return Err(reader.u32(8));
        }
        let found = Self { id: reader.array(16), owner: reader.array(32), places: reader.u32(12) };
        // Reserved bytes are zero.
        Ok(if found.encode() == *block { Read::Whole(found) } else { Read::Damaged })
    }
}

impl Transaction {
    /// # Panics
    /// Beyond the limits of a block.
    pub(super) fn encode(&self, id: &[u8; 16]) -> Block {
        assert!(self.changes.len() <= CHANGES_MAX && self.slice.len() <= SLICE, "a transaction fits its block");
        assert!(self.ancestors.len() <= ANCESTORS_MAX, "few ancestors are kept");
        let count = |len: usize| u16::try_from(len).expect("asserted").to_le_bytes();
        let mut block = [0; BLOCK];
        let mut writer = Writer(&mut block);
        writer.put(0, MAGIC_TRANSACTION);
        writer.put(8, id);
        writer.put(24, &self.at.number.to_le_bytes());
        writer.put(32, &self.at.session.to_le_bytes());
        writer.put(40, &self.base.to_le_bytes());
        writer.put(48, &self.places.to_le_bytes());
        writer.put(52, &self.first.to_le_bytes());
        writer.put(56, &count(self.slice.len()));
        writer.put(58, &count(self.changes.len()));
        for (n, mark) in self.ancestors.iter().enumerate() {
            writer.put(60 + n * 16, &mark.session.to_le_bytes());
            writer.put(68 + n * 16, &mark.number.to_le_bytes());
        }
        for (n, (place, owner)) in self.changes.iter().enumerate() {
            writer.put(CHANGES_AT + n * CHANGE_BYTES, &place.to_le_bytes());
            writer.owner(CHANGES_AT + n * CHANGE_BYTES + 8, *owner);
        }
        for (n, owner) in self.slice.iter().enumerate() {
            writer.owner(SLICE_AT + n * OWNER_BYTES, *owner);
        }
        writer.seal(CRC);
        block
    }

    pub(super) fn decode(block: &Block, id: &[u8; 16]) -> Read<Self> {
        let reader = Reader(block);
        if is_zero(block) {
            return Read::Empty;
        }
        if reader.array(0) != *MAGIC_TRANSACTION || reader.u32(CRC) != checksum(block, CRC) {
            return Read::Damaged;
        }
        if reader.array(8) != *id {
            return Read::Empty;
        }
        match Self::fields(&reader) {
            // Reserved bytes are zero.
            Ok(found) if found.encode(id) == *block => Read::Whole(found),
            Ok(_) | Err(()) => Read::Damaged,
        }
    }

    fn fields(reader: &Reader<'_>) -> Result<Self, ()> {
        let at = LogMark { number: reader.u64(24), session: reader.u64(32) };
        let (places, first) = (reader.u32(48), reader.u32(52));
        let (slice, changes) = (usize::from(reader.u16(56)), usize::from(reader.u16(58)));
        if !PLACES.contains(&places) || slice > SLICE || changes > CHANGES_MAX {
            return Err(());
        }
        let expected = slice_of(at.number, places);
        if expected.start != first || expected.len() != slice {
            return Err(());
        }
        let mark = |n: usize| LogMark { session: reader.u64(60 + n * 16), number: reader.u64(68 + n * 16) };
        let change = |n: usize| {
            let from = CHANGES_AT + n * CHANGE_BYTES;
            let place = reader.u32(from);
            if place < places { Ok((place, reader.owner(from + 8)?)) } else { Err(()) }
        };
        Ok(Self {
            at,
            base: reader.u64(40),
            places,
            ancestors: (0..ANCESTORS_MAX).map(mark).take_while(|mark| mark.session != 0).collect(),
            changes: (0..changes).map(change).collect::<Result<_, _>>()?,
            first,
            slice: (0..slice).map(|n| reader.owner(SLICE_AT + n * OWNER_BYTES)).collect::<Result<_, _>>()?,
        })
    }
}

impl Page {
    pub(super) fn encode(&self, id: &[u8; 16]) -> Block {
        const PAGE_CRC: usize = PAGE_HEADER - 4;
        let mut block = [0; BLOCK];
        let mut writer = Writer(&mut block);
        writer.put(0, MAGIC_PAGE);
        writer.put(8, id);
        writer.put(24, &self.volume.group);
        writer.put(32, &self.sequence.to_le_bytes());
        writer.put(40, &self.number.to_le_bytes());
        writer.put(44, &self.volume.index.to_le_bytes());
        for (n, mask) in self.masks.iter().enumerate() {
            writer.put(PAGE_HEADER + n * 8, &mask.to_le_bytes());
        }
        writer.seal(PAGE_CRC);
        block
    }

    pub(super) fn decode(block: &Block, id: &[u8; 16]) -> Read<Self> {
        const PAGE_CRC: usize = PAGE_HEADER - 4;
        let reader = Reader(block);
        if is_zero(block) {
            return Read::Empty;
        }
        if reader.array(0) != *MAGIC_PAGE || reader.u32(PAGE_CRC) != checksum(block, PAGE_CRC) {
            return Read::Damaged;
        }
        if reader.array(8) != *id {
            return Read::Empty;
        }
        // Its extents have numbers.
        if reader.u32(40) >= PAGES_OF_VOLUME {
            return Read::Damaged;
        }
        let volume = VolumeKey { group: reader.array(24), index: reader.u16(44) };
        let masks = Box::new(std::array::from_fn(|n| reader.u64(PAGE_HEADER + n * 8)));
        let found = Self { volume, number: reader.u32(40), sequence: reader.u64(32), masks };
        if found.encode(id) == *block { Read::Whole(found) } else { Read::Damaged }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(n: u32) -> Extent {
        Extent { volume: VolumeKey { group: [n.to_le_bytes()[0]; 8], index: 3 }, number: n }
    }

    fn transaction() -> Transaction {
        Transaction {
            at: LogMark { session: 77, number: 5 },
            base: 4,
            places: 1024,
            ancestors: vec![LogMark { session: 1, number: 2 }],
            changes: vec![(9, Some(extent(4))), (11, None)],
            first: 880,
            slice: (880..1024).map(|n| (n % 3 == 0).then(|| extent(n))).collect(),
        }
    }

    #[test]
    fn what_was_written_comes_back_and_one_flipped_bit_is_seen() {
        let id = [7; 16];
        let page = Page {
            volume: VolumeKey { group: [2; 8], index: 4 },
            number: 3,
            sequence: 9,
            masks: Box::new(std::array::from_fn(|n| n as u64)),
        };
        let superblock = Superblock { id, owner: [3; 16], places: 1024 };
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(Read::Whole(superblock)));
        assert_eq!(Transaction::decode(&transaction().encode(&id), &id), Read::Whole(transaction()));
        assert_eq!(Page::decode(&page.encode(&id), &id), Read::Whole(page.clone()));
        assert_eq!(Transaction::decode(&transaction().encode(&id), &[8; 16]), Read::Empty);
        assert_eq!(Page::decode(&[0; BLOCK], &id), Read::Empty);
        for bit in (0..BLOCK * 8).step_by(37) {
            let flipped = |mut block: Block| {
                block[bit / 8] ^= 1 << (bit % 8);
                block
            };
            assert_eq!(Superblock::decode(&flipped(superblock.encode())), Ok(Read::Damaged), "bit {bit}");
            assert_eq!(Transaction::decode(&flipped(transaction().encode(&id)), &id), Read::Damaged, "bit {bit}");
            assert_eq!(Page::decode(&flipped(page.encode(&id)), &id), Read::Damaged, "bit {bit}");
        }
    }

    /// Goal: the bytes are those of the tables, for ever.
    #[test]
    fn golden_bytes() {
        let id = *b"golden-log-id-01";
        let page = Page {
            volume: VolumeKey { group: *b"group-id", index: 2 },
            number: 1,
            sequence: 7,
            masks: Box::new(std::array::from_fn(|n| n as u64 * 0x0101)),
        };
        let superblock = Superblock { id, owner: *b"host-id-16-bytes", places: 1024 };
        let bytes = [superblock.encode(), transaction().encode(&id), page.encode(&id)].concat();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/activity-log.bin");
        if std::env::var_os("FARSHORE_WRITE_GOLDEN").is_some() {
            std::fs::write(path, &bytes).expect("the folder can be written");
        }
        assert!(std::fs::read(path).expect("it is there") == bytes, "today's code writes other bytes");
    }

    #[test]
    fn slices_in_a_row_hold_the_table() {
        for places in [1, 175, 176, 177, 1024, 16_384] {
            for start in [0u64, 5, 1000] {
                let mut seen = vec![false; places as usize];
                for number in start..start + slices(places) {
                    slice_of(number, places).for_each(|place| seen[place as usize] = true);
                }
                assert!(seen.iter().all(|seen| *seen), "{places} places from {start}");
            }
        }
    }
}
