//! Content: seeded bytes of the kinds that matter to the stream.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use farshore_uring::sim::SimRng;

use super::KIB;

/// `len` bytes, always the same for a seed. A quarter of the seeds each gives noise, half noise, text-like repeats, and one
/// of eight blocks that come again and again (so that deduplication has something to find).
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let kind = seed % 4;
    let mut random = SimRng::new(if kind == 3 { seed / 4 % 8 } else { seed });
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next_u64().to_le_bytes());
        match kind {
            1 => bytes.extend_from_slice(b"farshore"),
            2 => bytes.extend_from_slice(&[b' '; 56]),
            _ => {}
        }
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that neither compress nor repeat.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    bytes(seed.wrapping_mul(4), len)
}

/// An image of `size` bytes with data in a third of its 64 KiB slots and holes elsewhere, and those bytes.
pub(crate) fn image(path: &Path, size: u64, seed: u64) -> Result<Vec<u8>> {
    let file = File::create_new(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(size).context("size the image")?;
    let mut model = vec![0; usize::try_from(size).context("the image fits in memory")?];
    let mut random = SimRng::new(seed);
    for (slot, piece) in model.chunks_mut(64 * 1024).enumerate() {
        let seed = random.next_u64();
        if random.below(3) == 0 {
            piece.copy_from_slice(&bytes(seed, piece.len()));
            file.write_all_at(piece, slot as u64 * 64 * KIB).context("fill the image")?;
        }
    }
    file.sync_all().context("sync the image")?;
    Ok(model)
}
