//! Replies of the transmission phase, encoded.

use farshore_uring::Extent;

use crate::wire::{self, chunk};

/// Most extents of one block-status reply; the client asks again for the rest. 8 KiB on the wire.
pub(crate) const EXTENTS_MAX: usize = 1024;

/// The longest head: a data chunk's header with the offset.
const HEAD_MAX: usize = wire::CHUNK_LEN + 8;

/// The part of a reply in front of its data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    bytes: [u8; HEAD_MAX],
    len: u8,
}

impl Head {
    /// No head at all: a further piece of a reply begun before.
    pub(crate) const NONE: Self = Self { bytes: [0; HEAD_MAX], len: 0 };

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// A simple reply; with `error == 0` to a read, the data follow.
    pub(crate) fn simple(cookie: u64, error: u32) -> Self {
        let mut head = Self::NONE;
        head.put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.put(&error.to_be_bytes());
        head.put(&cookie.to_be_bytes());
        head
    }

    /// The only chunk of a read: all of its data.
    pub(crate) fn data(cookie: u64, offset: u64, len: u32) -> Self {
        let mut head = Self::chunk(chunk::OFFSET_DATA, cookie, 8 + len);
        head.put(&offset.to_be_bytes());
        head
    }

    /// The only chunk of a failed request, without a text.
    pub(crate) fn error(cookie: u64, error: u32) -> Self {
        let mut head = Self::chunk(chunk::ERROR, cookie, 6);
        head.put(&error.to_be_bytes());
        head.put(&0u16.to_be_bytes());
        head
    }

    /// The only chunk of a block status with `count` extents, which follow.
    pub(crate) fn status(cookie: u64, count: usize) -> Self {
        let len = 4 + 8 * u32::try_from(count).expect("at most EXTENTS_MAX");
        let mut head = Self::chunk(chunk::BLOCK_STATUS, cookie, len);
        head.put(&wire::BASE_ALLOCATION_ID.to_be_bytes());
        head
    }

    fn chunk(kind: u16, cookie: u64, len: u32) -> Self {
        let mut head = Self::NONE;
        head.put(&wire::CHUNK_MAGIC.to_be_bytes());
        head.put(&chunk::DONE.to_be_bytes());
        head.put(&kind.to_be_bytes());
        head.put(&cookie.to_be_bytes());
        head.put(&len.to_be_bytes());
        head
    }

    fn put(&mut self, bytes: &[u8]) {
        let start = usize::from(self.len);
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.len += u8::try_from(bytes.len()).expect("at most HEAD_MAX");
    }
}

/// Turns a device's extents of `[offset, offset + len)` into the protocol's: boundaries on multiples of `block` (a block
/// that is only partly a hole counts as data), neighbours of equal state merged, at most [`EXTENTS_MAX`], one if asked.
///
/// Covers at least one block from `offset`, and never more than `len`.
pub(crate) fn status_extents(extents: &[Extent], offset: u64, len: u32, block: u32, one: bool) -> Vec<(u32, u32)> {
    let block = u64::from(block);
    let end = offset + u64::from(len);
    let mut out: Vec<(u32, u32)> = Vec::new();
    let mut push = |from: u64, to: u64, state: u32| {
        let len = u32::try_from(to - from).expect("inside a request's range");
        match out.last_mut() {
            Some(last) if last.1 == state => last.0 += len,
            _ if len > 0 => out.push((len, state)),
            _ => {}
        }
    };
    let (mut at, mut covered) = (offset, offset);
    for extent in extents {
        let to = at.saturating_add(extent.len).min(end);
        let state = if extent.hole { wire::STATE_HOLE } else { 0 } | if extent.zero { wire::STATE_ZERO } else { 0 };
        if state == 0 {
            // Data takes the whole of its first and last block.
            let to = to.next_multiple_of(block).min(end);
            if to > covered {
                push(covered, to, 0);
                covered = to;
            }
        } else {
            let (from, to) = (at.next_multiple_of(block).max(covered), to - to % block);
            if to > from {
                push(covered, from, 0);
                push(from, to, state);
                covered = to;
            }
        }
        at = at.saturating_add(extent.len).min(end);
        if at == end {
            break;
        }
    }
    if covered == offset {
        // Nothing whole could be said: one block of data is always true.
        push(offset, (offset + block).min(end), 0);
    }
    out.truncate(if one { 1 } else { EXTENTS_MAX });
    out
}

/// Extents as they go behind [`Head::status`].
pub(crate) fn encode_extents(extents: &[(u32, u32)]) -> Vec<u8> {
    extents.iter().flat_map(|(len, state)| [len.to_be_bytes(), state.to_be_bytes()]).flatten().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(len: u64, hole: bool) -> Extent {
        Extent { len, hole, zero: hole }
    }

    const HOLE: u32 = wire::STATE_HOLE | wire::STATE_ZERO;

    #[test]
    fn heads_have_the_lengths_of_the_protocol() {
        assert_eq!(Head::simple(1, 0).bytes().len(), wire::SIMPLE_REPLY_LEN);
        assert_eq!(Head::data(1, 2, 3).bytes().len(), wire::CHUNK_LEN + 8);
        assert_eq!(Head::error(1, 5).bytes().len(), wire::CHUNK_LEN + 6);
        assert_eq!(Head::status(1, 2).bytes().len(), wire::CHUNK_LEN + 4);
        assert_eq!(
            Head::simple(0x0102_0304_0506_0708, 22).bytes(),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22, 1, 2, 3, 4, 5, 6, 7, 8]
        );
    }

    #[test]
    fn extents_are_merged_clipped_and_cut_to_one() {
        let extents = [extent(4096, false), extent(4096, false), extent(8192, true), extent(1 << 40, false)];
        assert_eq!(status_extents(&extents, 0, 65536, 512, false), [(8192, 0), (8192, HOLE), (49152, 0)]);
        assert_eq!(status_extents(&extents, 0, 65536, 512, true), [(8192, 0)]);
        assert_eq!(status_extents(&extents, 0, 512, 512, false), [(512, 0)]);
    }

    #[test]
    fn a_block_with_some_data_is_data() {
        let extents = [extent(1000, true), extent(100, false), extent(60_000, true)];
        assert_eq!(
            status_extents(&extents, 0, 16384, 512, false),
            [(512, HOLE), (1024, 0), (14848, HOLE)],
            "bytes 1000 to 1099 lie in the blocks from 512 to 1535"
        );
        assert_eq!(status_extents(&[extent(100, true)], 4096, 8192, 4096, false), [(4096, 0)], "less than a block");
        assert_eq!(status_extents(&[], 4096, 8192, 4096, false), [(4096, 0)]);
    }

    proptest! {
        /// Goal: no data is ever called a hole. Method: a byte map of the device's answer against the reply's.
        #[test]
        fn never_calls_data_a_hole(
            lens in prop::collection::vec((1u64..3000, any::<bool>()), 0..20),
            start in 0u64..4,
            blocks in 1u32..40,
        ) {
            let (offset, len) = (start * 512, blocks * 512);
            let extents: Vec<_> = lens.iter().map(|&(len, hole)| extent(len, hole)).collect();
            let mut hole_bytes = Vec::new();
            extents.iter().for_each(|e| hole_bytes.extend(std::iter::repeat_n(e.hole, usize::try_from(e.len).expect("small"))));
            let out = status_extents(&extents, offset, len, 512, false);
            prop_assert!(!out.is_empty());
            let mut at = 0usize;
            for (piece, state) in out {
                prop_assert!(piece > 0 && piece % 512 == 0);
                let to = at + usize::try_from(piece).expect("small");
                if state != 0 {
                    prop_assert!(to <= hole_bytes.len() && hole_bytes[at..to].iter().all(|&hole| hole));
                }
                at = to;
            }
            prop_assert!(at <= usize::try_from(len).expect("small"));
        }
    }
}
