//! Keyed BLAKE3 of several short contents at once.
//!
//! BLAKE3 hashes the 1 KiB pieces of one content side by side in the lanes of a vector register. A 4 KiB content, the most common
//! one, fills 4 of 16 lanes. Here the lanes are shared by several contents of one length, which more than doubles the speed.
//! The result is BLAKE3's, by construction and by test; only its doc-hidden lane function is used, so the `blake3` version is
//! pinned by the lock file and a change there shows at compile time or in the test.

use blake3::IncrementCounter;
use blake3::platform::Platform;

/// Bytes of BLAKE3's pieces.
const PIECE: usize = 1024;
/// Bytes of a parent node: two hashes.
const PARENT: usize = 64;
/// Contents hashed together at most: the lanes of AVX-512.
pub(crate) const LANES: usize = 16;
/// Longest content for which sharing lanes gains: from 16 KiB on, one content fills them.
pub(crate) const SHARED_BYTES_MAX: usize = PIECES_MAX * PIECE;
const PIECES_MAX: usize = 8;

// Domain flags of the BLAKE3 specification, section 2.2.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT_NODE: u8 = 4;
const ROOT: u8 = 8;
const KEYED_HASH: u8 = 16;

/// Whether contents of `len` bytes are worth hashing together: 1, 2, 4 or 8 whole pieces, so that their trees are full.
pub(crate) fn shares_lanes(len: usize) -> bool {
    len.is_power_of_two() && (PIECE..=SHARED_BYTES_MAX).contains(&len)
}

/// Hashes up to [`LANES`] contents, all of `len` bytes ([`shares_lanes`]).
pub(crate) fn keyed_hashes(platform: Platform, key: &[u8; 32], contents: &[&[u8]], len: usize, out: &mut [[u8; 32]]) {
    assert!(shares_lanes(len) && contents.len() <= LANES && contents.len() == out.len(), "the caller groups by length");
    let words = key_words(key);
    let (pieces, count) = (len / PIECE, contents.len());
    // Hash of piece p of content c at [p][c].
    let mut level = [[[0u8; 32]; LANES]; PIECES_MAX];
    let empty: &[u8; PIECE] = &[0; PIECE];
    for (piece, hashes) in level.iter_mut().enumerate().take(pieces) {
        let mut inputs = [empty; LANES];
        for (input, content) in inputs.iter_mut().zip(contents) {
            let bytes = content.get(piece * PIECE..).and_then(|rest| rest.first_chunk());
            *input = bytes.expect("every content has `len` bytes");
        }
        let end = if pieces == 1 { CHUNK_END | ROOT } else { CHUNK_END };
        platform.hash_many(
            &inputs[..count],
            &words,
            piece as u64,
            IncrementCounter::No,
            KEYED_HASH,
            CHUNK_START,
            end,
            hashes.as_flattened_mut(),
        );
    }
    let mut nodes = pieces;
    while nodes > 1 {
        let flags = KEYED_HASH | PARENT_NODE | if nodes == 2 { ROOT } else { 0 };
        for parent in 0..nodes / 2 {
            let mut pairs = [[0u8; PARENT]; LANES];
            for (content, pair) in pairs.iter_mut().enumerate().take(count) {
                pair[..32].copy_from_slice(&level[2 * parent][content]);
                pair[32..].copy_from_slice(&level[2 * parent + 1][content]);
            }
            let inputs: [&[u8; PARENT]; LANES] = std::array::from_fn(|content| &pairs[content]);
            let hashes = level[parent].as_flattened_mut();
            platform.hash_many(&inputs[..count], &words, 0, IncrementCounter::No, flags, 0, 0, hashes);
        }
        nodes /= 2;
    }
    out.copy_from_slice(&level[0][..count]);
}

fn key_words(key: &[u8; 32]) -> [u32; 8] {
    let (words, _) = key.as_chunks::<4>();
    std::array::from_fn(|at| u32::from_le_bytes(words[at]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_give_what_one_at_a_time_gives() {
        let key: [u8; 32] = std::array::from_fn(|at| (at * 7).to_le_bytes()[0]);
        let bytes: Vec<u8> = (0..LANES * SHARED_BYTES_MAX + 100).map(|at| (at * at / 255).to_le_bytes()[0]).collect();
        for len in [1024, 2048, 4096, 8192] {
            for count in 0..=LANES {
                let contents: Vec<&[u8]> = (0..count).map(|at| &bytes[at * len + at..][..len]).collect();
                let mut out = vec![[0; 32]; count];
                keyed_hashes(Platform::detect(), &key, &contents, len, &mut out);
                for (content, hash) in contents.iter().zip(&out) {
                    assert_eq!(hash, blake3::keyed_hash(&key, content).as_bytes(), "{count} of {len} bytes");
                }
            }
        }
        assert!(!shares_lanes(512) && !shares_lanes(4095) && !shares_lanes(3072) && !shares_lanes(16384));
    }
}
