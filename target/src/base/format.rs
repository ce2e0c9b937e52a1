//! The bytes of a base's hashes and intent. Byte tables: `docs/formats/base.md`.

use farshore_proto::{SLOT_BYTES, VolumeIndex};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::SLOT;

pub(super) const HASH_BYTES: usize = 32;
/// Where the hashes begin: behind the header, page-aligned.
pub(super) const HEADER_BYTES: usize = 4096;
pub(super) const HASHES_AT: u64 = HEADER_BYTES as u64;
/// A hole: the slot was never written or is zero.
pub(super) const HOLE: [u8; HASH_BYTES] = [0; HASH_BYTES];
/// A crash tore the slot; its hash is not known.
pub(super) const UNKNOWN: [u8; HASH_BYTES] = [0xff; HASH_BYTES];
/// The slot was damaged when it was to be changed in part: its bytes are of no use until all of them are written.
pub(super) const BROKEN: [u8; HASH_BYTES] = [0xfe; HASH_BYTES];

/// What stands in a hash's place says nothing about the slot's bytes.
pub(super) fn is_without(hash: &[u8; HASH_BYTES]) -> bool {
    matches!(*hash, UNKNOWN | BROKEN)
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HashesHeader {
    magic: [u8; 8],
    version: U16,
    volume: U16,
    slot_bytes: U32,
    reserved: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<HashesHeader>() == 32);
const HASHES_MAGIC: [u8; 8] = *b"FSBASEH1";
const VERSION: u16 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct IntentHeader {
    magic: [u8; 8],
    version: U16,
    volume: U16,
    count: U32,
    reserved: [u8; 16],
    /// BLAKE3 over the fields before and the entries.
    hash: [u8; HASH_BYTES],
}

const _: () = assert!(size_of::<IntentHeader>() == 64);
const INTENT_MAGIC: [u8; 8] = *b"FSBASEI1";
const INTENT_HASH_AT: usize = 32;
/// Without these bytes it is void.
pub(super) const INTENT_HEADER_BYTES: usize = size_of::<IntentHeader>();

/// Slots that will have one hash: a single slot, or a range that becomes a hole.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct IntentEntry {
    pub(super) first: U64,
    pub(super) count: U64,
    pub(super) hash: [u8; HASH_BYTES],
}

const _: () = assert!(size_of::<IntentEntry>() == 48);

impl IntentEntry {
    /// Its slots.
    pub(super) fn slots(&self) -> std::ops::Range<u64> {
        self.first.get()..self.first.get().saturating_add(self.count.get())
    }
}

/// Bytes of an intent.
pub(super) fn intent_bytes(entries: usize) -> usize {
    size_of::<IntentHeader>() + entries * size_of::<IntentEntry>()
}

/// The intent's file.
pub(super) fn encode_intent(entries: &[IntentEntry], volume: VolumeIndex) -> Vec<u8> {
    let header = IntentHeader {
        magic: INTENT_MAGIC,
        version: VERSION.into(),
        volume: volume.0.into(),
        count: u32::try_from(entries.len()).expect("at most CHUNK_SLOTS").into(),
        reserved: [0; 16],
        hash: [0; HASH_BYTES],
    };
    let mut bytes = header.as_bytes().to_vec();
    entries.iter().for_each(|entry| bytes.extend_from_slice(entry.as_bytes()));
    let hash = intent_hash(&bytes[..INTENT_HASH_AT], &bytes[size_of::<IntentHeader>()..]);
    bytes[INTENT_HASH_AT..INTENT_HASH_AT + HASH_BYTES].copy_from_slice(&hash);
    bytes
}

/// `None`: never written, or torn, and so void.
pub(super) fn decode_intent(bytes: &[u8], volume: VolumeIndex, entries_max: usize) -> Option<Vec<IntentEntry>> {
    let (header, rest) = IntentHeader::read_from_prefix(bytes).ok()?;
    let count = header.count.get() as usize;
    let sound = header.magic == INTENT_MAGIC
        && header.version.get() == VERSION
        && header.volume.get() == volume.0
        && count <= entries_max;
    let entries = rest.get(..count.checked_mul(size_of::<IntentEntry>())?).filter(|_| sound)?;
    if intent_hash(&bytes[..INTENT_HASH_AT], entries) != header.hash {
        return None;
    }
    entries.chunks_exact(size_of::<IntentEntry>()).map(|entry| IntentEntry::read_from_bytes(entry).ok()).collect()
}

/// A slot's hash: its bytes and its place, so that a slot written to the wrong place is seen. A short last slot counts as
/// filled up with zeroes, so that it keeps its hash when the volume grows. All zeroes: [`HOLE`].
pub(super) fn hash_slot(volume: VolumeIndex, slot: u64, bytes: &[u8]) -> [u8; HASH_BYTES] {
    if super::is_zero(bytes) {
        return HOLE;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(bytes);
    if bytes.len() < SLOT {
        hasher.update(&vec![0; SLOT - bytes.len()]);
    }
    hasher.update(&volume.0.to_le_bytes()).update(&slot.to_le_bytes());
    *hasher.finalize().as_bytes()
}

fn intent_hash(header: &[u8], entries: &[u8]) -> [u8; HASH_BYTES] {
    *blake3::Hasher::new().update(header).update(entries).finalize().as_bytes()
}

pub(super) fn hashes_header(volume: VolumeIndex) -> Vec<u8> {
    let mut header = HashesHeader {
        magic: HASHES_MAGIC,
        version: VERSION.into(),
        volume: volume.0.into(),
        slot_bytes: u32::try_from(SLOT_BYTES).expect("64 KiB").into(),
        reserved: [0; 12],
        crc: 0.into(),
    };
    header.crc = crc_fast::crc32_iscsi(&header.as_bytes()[..28]).into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(HEADER_BYTES, 0);
    bytes
}

/// Checks the header of the hashes. `Err`: another version, or `None` for damage.
pub(super) fn check_header(bytes: &[u8], volume: VolumeIndex) -> Result<(), Option<u16>> {
    let (header, _) = HashesHeader::read_from_prefix(bytes).map_err(|_| None)?;
    if header.magic == HASHES_MAGIC && header.version.get() != VERSION {
        return Err(Some(header.version.get()));
    }
    if bytes == hashes_header(volume) { Ok(()) } else { Err(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_voids_an_intent() {
        let entry = IntentEntry { first: 7.into(), count: 1.into(), hash: [3; HASH_BYTES] };
        let bytes = encode_intent(&[entry, entry], VolumeIndex(2));
        assert_eq!(bytes.len(), intent_bytes(2));
        assert_eq!(decode_intent(&bytes, VolumeIndex(2), 2).map(|entries| entries.len()), Some(2));
        assert!(decode_intent(&bytes, VolumeIndex(2), 1).is_none(), "more than a chunk");
        assert!(decode_intent(&bytes, VolumeIndex(3), 2).is_none(), "another volume's");
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_intent(&bad, VolumeIndex(2), 2).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn every_flipped_bit_of_the_header_is_seen() {
        let bytes = hashes_header(VolumeIndex(2));
        assert_eq!(check_header(&bytes, VolumeIndex(2)), Ok(()));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check_header(&bad, VolumeIndex(2)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn golden_bytes() {
        let header = hashes_header(VolumeIndex(0x0102));
        assert_eq!(header[..12], *b"FSBASEH1\x01\x00\x02\x01");
        assert_eq!(header[12..16], 65536u32.to_le_bytes());
        let slot = hash_slot(VolumeIndex(1), 2, &[0xa5; 512]);
        assert_eq!(slot, hash_slot(VolumeIndex(1), 2, &[&[0xa5; 512][..], &[0; 512]].concat()), "as if filled up");
        assert_ne!(slot, hash_slot(VolumeIndex(1), 3, &[0xa5; 512]));
        assert_eq!(hash_slot(VolumeIndex(1), 2, &[0; 512]), HOLE);
    }
}
