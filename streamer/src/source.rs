//! What the streamer needs of a ring: entries in order, freeing, and a little state that survives the process.

use std::ops::Deref;

use farshore_proto::record::{Kind, Mark};
use farshore_proto::{BatchNo, ChainHash, Incarnation, Position, VolumeIndex, WallTime};

use crate::Result;

/// Bit of a cut's `aux` word: file systems were frozen at the cut.
pub const CUT_APP_CONSISTENT: u64 = 2;

/// One published position.
#[derive(Debug)]
pub struct RingEntry<P> {
    /// Its place in the stream.
    pub position: Position,
    /// What it says.
    pub kind: Kind,
    /// Volume.
    pub volume: VolumeIndex,
    /// Start of the range, bytes.
    pub offset: u64,
    /// Length of the range, bytes.
    pub length: u64,
    /// Source's clock (cuts).
    pub time: WallTime,
    /// Flags of a cut.
    pub aux: u64,
    /// Bytes in its cell.
    pub payload: Option<P>,
}

/// The consumer's side of a capture ring, as the streamer uses it. Implemented by [`crate::CaptureRing`] over the shared ring
/// and by a plain queue in the model tests.
pub trait RingSource {
    /// Shared access to a cell's bytes; the cell stays until this is dropped and the position freed.
    type Payload: Deref<Target = [u8]> + Send + 'static;

    /// The next entry in order; `None` while its position is not published.
    ///
    /// # Errors
    /// [`crate::Error::Ring`]: a descriptor that makes no sense.
    fn next_entry(&mut self) -> Result<Option<RingEntry<Self::Payload>>>;
    /// Frees all positions below. Only for what is durable at the target.
    fn free_to(&mut self, position: Position);
    /// Goes back to the freed cursor: unfreed entries are given again.
    fn rewind(&mut self);
    /// Everything below is freed.
    fn freed(&self) -> Position;
    /// The next position to be claimed.
    fn head(&self) -> Position;
    /// The state last stored; `None` in a new ring.
    fn load_state(&self) -> Option<StreamState>;
    /// Stores the state, so that a kill inside leaves either the old or the new one.
    fn store_state(&mut self, state: &StreamState);
    /// Every claim fails at present: the ring ran full.
    fn is_closed(&self) -> bool;
    /// Payload bytes held and their limit.
    fn fill(&self) -> Fill;
}

/// How full a ring is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Fill {
    /// Bytes of cells in use.
    pub used_bytes: u64,
    /// Bytes of all cells.
    pub size_bytes: u64,
    /// Descriptors in use.
    pub used_entries: u64,
    /// All descriptors.
    pub size_entries: u64,
}

impl Fill {
    /// At most a quarter of bytes and descriptors is in use.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.used_bytes <= self.size_bytes / 4 && self.used_entries <= self.size_entries / 4
    }
}

/// Most volumes of one group on one host (the ring's volume table has as many places).
pub const VOLUMES_MAX: usize = 16;

/// A small set of volumes that is copied by value and fits the ring's state words. Sorted, filled with `u16::MAX`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeSet([u16; VOLUMES_MAX]);

impl Default for VolumeSet {
    fn default() -> Self {
        Self([u16::MAX; VOLUMES_MAX])
    }
}

impl VolumeSet {
    /// Holds `volume`.
    #[must_use]
    pub fn contains(&self, volume: VolumeIndex) -> bool {
        volume.0 != u16::MAX && self.0.contains(&volume.0)
    }

    /// Adds `volume`; `false` when the set is full.
    pub fn insert(&mut self, volume: VolumeIndex) -> bool {
        if self.contains(volume) {
            return true;
        }
        let last = &mut self.0[VOLUMES_MAX - 1];
        if *last != u16::MAX {
            return false;
        }
        *last = volume.0;
        self.0.sort_unstable();
        true
    }

    /// Takes `volume` out.
    pub fn remove(&mut self, volume: VolumeIndex) {
        for slot in &mut self.0 {
            if *slot == volume.0 {
                *slot = u16::MAX;
            }
        }
        self.0.sort_unstable();
    }

    /// Holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0[0] == u16::MAX
    }

    /// As four words, for the ring's state.
    #[must_use]
    pub fn to_words(&self) -> [u64; 4] {
        let mut words = [0; 4];
        for (index, volume) in self.0.iter().enumerate() {
            words[index / 4] |= u64::from(*volume) << (16 * (index % 4));
        }
        words
    }

    /// From [`Self::to_words`].
    #[must_use]
    pub fn from_words(words: [u64; 4]) -> Self {
        let mut set = Self::default();
        for (index, volume) in set.0.iter_mut().enumerate() {
            let [low, high, ..] = (words[index / 4] >> (16 * (index % 4))).to_le_bytes();
            *volume = u16::from_le_bytes([low, high]);
        }
        set.0.sort_unstable();
        set
    }
}

impl FromIterator<VolumeIndex> for VolumeSet {
    fn from_iter<T: IntoIterator<Item = VolumeIndex>>(volumes: T) -> Self {
        let mut set = Self::default();
        for volume in volumes {
            set.insert(volume);
        }
        set
    }
}

/// What the stream's order says at one position, beside content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StreamFlags {
    /// An event is open: no cut is recoverable.
    pub event_open: bool,
    /// Volumes that points include.
    pub joined: VolumeSet,
}

impl StreamFlags {
    /// A cut here can be recovered to.
    #[must_use]
    pub fn recoverable(&self) -> bool {
        !self.event_open && !self.joined.is_empty()
    }

    /// Applies one entry.
    pub fn apply(&mut self, kind: Kind, volume: VolumeIndex) {
        match kind.mark() {
            Some(Mark::Event { open }) => self.event_open = open,
            Some(Mark::Volume { joined: true }) => {
                self.joined.insert(volume);
            }
            Some(Mark::Volume { joined: false }) => self.joined.remove(volume),
            None => {}
        }
    }
}

/// Where the stream stands: everything below `position` is durable at the target. Stored *before* the positions are freed.
///
/// 1. A kill before the store leaves the old state and all of the ring from its position on: the batches are formed again.
/// 2. A kill between store and freeing leaves the new state and a freed cursor below `position`: at start the ring is freed up
///    to it, which the state proves to be durable.
/// 3. There is no order in which the ring lacks what the state still needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StreamState {
    /// Ring position after the last durable batch.
    pub position: Position,
    /// Life of the ring that the state belongs to.
    pub incarnation: Incarnation,
    /// Last durable batch; 0: none.
    pub number: BatchNo,
    /// Its chain hash.
    pub chain: ChainHash,
    /// Flags of the stream at `position`.
    pub flags: StreamFlags,
    /// A batch of this incarnation may have reached the target.
    pub sent: bool,
    /// A batch of this incarnation is durable.
    pub acknowledged: bool,
    /// "Compare everything" was recorded for this incarnation: it may continue behind any tail.
    pub compared: bool,
    /// Time of the newest durable recoverable cut; 0: none.
    pub newest_point: WallTime,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_sets_keep_what_they_are_given() {
        let mut set: VolumeSet = [9, 3, 40000].into_iter().map(VolumeIndex).collect();
        assert_eq!(VolumeSet::from_words(set.to_words()), set);
        set.remove(VolumeIndex(3));
        assert!(set.contains(VolumeIndex(9)) && set.contains(VolumeIndex(40000)) && !set.contains(VolumeIndex(3)));
        for volume in 0..14 {
            assert!(set.insert(VolumeIndex(100 + volume)));
        }
        assert!(!set.insert(VolumeIndex(500)), "full");
        assert!(VolumeSet::default().is_empty() && !set.is_empty());
    }
}
