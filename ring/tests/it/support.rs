//! What the tests share.

use std::path::Path;

use farshore_ring::{RingConfig, RingIdentity};
use tempfile::TempDir;

pub(crate) fn identity() -> RingIdentity {
    RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 5, generation: 6 }
}

pub(crate) fn config(slab_mib: u64, descriptors: u64) -> RingConfig {
    RingConfig { slab_bytes: slab_mib << 20, descriptors: Some(descriptors), ..RingConfig::new(identity()) }
}

/// A folder on tmpfs where there is one: that is what rings are made for.
pub(crate) fn folder() -> TempDir {
    let shm = Path::new("/dev/shm");
    let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
    made.expect("a temporary folder can be made")
}

/// SplitMix64.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Fills a payload so that any foreign byte in it is seen.
pub(crate) fn stamp(bytes: &mut [u8], owner: u64, number: u64) {
    let mut rng = Rng(owner << 48 ^ number);
    for chunk in bytes.chunks_mut(8) {
        let word = rng.next().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

pub(crate) fn is_stamped(bytes: &[u8], owner: u64, number: u64) -> bool {
    let mut rng = Rng(owner << 48 ^ number);
    bytes.chunks(8).all(|chunk| *chunk == rng.next().to_le_bytes()[..chunk.len()])
}

pub(crate) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("payloads are short")
}
