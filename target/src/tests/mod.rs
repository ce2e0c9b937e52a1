//! The journal half as a whole: a source in memory, a simulated disk, no threads.

mod crash;
mod damage;
mod growth;
mod history;
mod link;
mod protocol;
pub(crate) mod source;

use farshore_proto::VolumeIndex;
use farshore_uring::Storage;
use farshore_uring::sim::{SimRng, SimStorage};

use crate::error::Result;
use crate::group::{GroupHost, UpTo};
use crate::reader;
use crate::target::{Target, TargetConfig};
use source::{Sent, VOLUME_BYTES, keys};

/// Small segments, so that a few batches fill several.
pub(crate) const CONFIG: TargetConfig = TargetConfig { frame_cache_bytes: 1 << 20, segment_bytes: 160 << 10 };

pub(crate) fn storage(seed: u64) -> SimStorage {
    SimStorage::new(SimRng::new(seed))
}

pub(crate) fn open(storage: &SimStorage) -> Result<Target<SimStorage>> {
    Target::open(storage.clone(), keys(), CONFIG)
}

/// Reads a volume at a point.
fn read_volume<S: Storage>(stream: &GroupHost<S>, volume: u16, sent: &Sent) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
    for (slot, out) in content.chunks_mut(65536).enumerate() {
        reader::read_slot(stream, VolumeIndex(volume), slot as u64, UpTo::end_of(sent.number), out)?;
    }
    Ok(content)
}

/// Every joined volume at the point is exactly what the source had.
pub(crate) fn assert_point<S: Storage>(stream: &GroupHost<S>, sent: &Sent) {
    for volume in &sent.joined {
        let found = read_volume(stream, *volume, sent).expect("the point is readable");
        let differs = found.iter().zip(&sent.content[volume]).position(|(a, b)| a != b);
        assert_eq!(differs, None, "volume {volume} at {}: first differing byte", sent.point);
    }
}
