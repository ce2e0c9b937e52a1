//! The 4 KiB blocks that a run is made of, each with its own checksum.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a block: a page, so that a torn or misdirected write shows in one checksum.
pub(crate) const BLOCK_BYTES: usize = 4096;
/// Bytes before a block's content.
pub(crate) const BLOCK_HEADER_BYTES: usize = 16;
/// Bytes of content.
pub(crate) const BLOCK_ROOM: usize = BLOCK_BYTES - BLOCK_HEADER_BYTES;

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum BlockKind {
    /// The run's header.
    Header = 1,
    /// Entries.
    Entries = 2,
    /// First keys of entry blocks.
    Fences = 3,
    /// First keys of fence blocks.
    Top = 4,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BlockHeader {
    crc: U32,
    kind: u8,
    reserved: u8,
    count: U16,
    number: U32,
    tag: U32,
}

const _: () = assert!(size_of::<BlockHeader>() == BLOCK_HEADER_BYTES);

/// Appends a block with `count` items of `content` to `out`. `tag` is the run's.
pub(crate) fn seal(kind: BlockKind, number: u32, tag: u32, count: usize, content: &[u8], out: &mut Vec<u8>) {
    assert!(content.len() <= BLOCK_ROOM, "content of a block is at most {BLOCK_ROOM} bytes");
    let count = u16::try_from(count).expect("items of a block are at most its bytes");
    let start = out.len();
    let header = BlockHeader {
        crc: 0.into(),
        kind: kind as u8,
        reserved: 0,
        count: count.into(),
        number: number.into(),
        tag: tag.into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(content);
    out.resize(start + BLOCK_BYTES, 0);
    let crc = crc_fast::crc32_iscsi(&out[start + 4..]);
    out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks a block and gives its count of items. `tag`: that of the run; `None` where it is not known yet.
pub(crate) fn check(
    bytes: &[u8],
    kind: BlockKind,
    number: u32,
    tag: Option<u32>,
    item_bytes: usize,
) -> Result<usize, String> {
    let Ok((header, content)) = BlockHeader::read_from_prefix(bytes) else {
        return Err(format!("block is cut off after {} bytes", bytes.len()));
    };
    let computed = crc_fast::crc32_iscsi(&bytes[4..]);
    if computed != header.crc.get() {
        return Err(format!("checksum of the block is {computed:08x}, stored is {:08x}", header.crc.get()));
    }
    if header.kind != kind as u8 || header.number.get() != number || header.reserved != 0 {
        let found = (header.kind, header.number.get());
        return Err(format!("block of kind and number {found:?} where {:?} belongs", (kind as u8, number)));
    }
    if tag.is_some_and(|tag| tag != header.tag.get()) {
        return Err(format!("block belongs to run {:08x}", header.tag.get()));
    }
    let count = usize::from(header.count.get());
    if count * item_bytes > content.len() {
        return Err(format!("count of items {count} is larger than the block"));
    }
    Ok(count)
}

/// The tag in a checked block.
pub(crate) fn tag_of(bytes: &[u8]) -> u32 {
    BlockHeader::read_from_prefix(bytes).map_or(0, |(header, _)| header.tag.get())
}

/// The content of a checked block.
pub(crate) fn content(bytes: &[u8]) -> &[u8] {
    &bytes[BLOCK_HEADER_BYTES..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_seen() {
        let mut bytes = Vec::new();
        seal(BlockKind::Entries, 3, 77, 2, &[1, 2, 3, 4], &mut bytes);
        assert_eq!(bytes.len(), BLOCK_BYTES);
        assert_eq!(check(&bytes, BlockKind::Entries, 3, Some(77), 2), Ok(2));
        assert_eq!(tag_of(&bytes), 77);
        for bit in 0..BLOCK_BYTES * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&bytes, BlockKind::Entries, 3, Some(77), 2).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn misdirected_blocks_are_seen() {
        let mut bytes = Vec::new();
        seal(BlockKind::Fences, 3, 77, 0, &[], &mut bytes);
        assert!(check(&bytes, BlockKind::Entries, 3, Some(77), 48).is_err());
        assert!(check(&bytes, BlockKind::Fences, 4, Some(77), 24).is_err());
        assert!(check(&bytes, BlockKind::Fences, 3, Some(78), 24).is_err());
        assert!(check(&bytes[..100], BlockKind::Fences, 3, None, 24).is_err());
        assert_eq!(check(&bytes, BlockKind::Fences, 3, None, 24), Ok(0));
    }
}
