//! The shared ring as the streamer's source.

use std::sync::Arc;

use farshore_proto::record::Kind;
use farshore_proto::{BatchNo, ChainHash, Incarnation, Position, VolumeIndex, WallTime};
use farshore_ring::{CellRef, Consumer, Ring};

use crate::source::{Fill, RingEntry, RingSource, StreamFlags, StreamState, VolumeSet};
use crate::{Error, Result};

// Words of the ring's state that are the streamer's own.
const POSITION: usize = 0;
const INCARNATION: usize = 1;
const FLAGS: usize = 2;
const JOINED: usize = 3;
const NEWEST_POINT: usize = 7;
const VERSION: usize = 15;

/// Meaning of the words; another number is another program's state, which is not guessed at.
const STATE_VERSION: u64 = 1;

const FLAG_SENT: u64 = 1;
const FLAG_ACKNOWLEDGED: u64 = 2;
const FLAG_COMPARED: u64 = 4;

/// A ring with its one consumer.
#[derive(Debug)]
pub struct CaptureRing {
    ring: Arc<Ring>,
    consumer: Consumer,
}

impl CaptureRing {
    /// Takes the ring's consumer.
    ///
    /// # Errors
    /// [`Error::ConsumerTaken`].
    pub fn new(ring: Arc<Ring>) -> Result<Self> {
        let consumer = ring.consumer().ok_or(Error::ConsumerTaken)?;
        Ok(Self { ring, consumer })
    }

    /// The consumer, for re-opening a closed ring and for a new incarnation.
    pub fn consumer_mut(&mut self) -> &mut Consumer {
        &mut self.consumer
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }
}

impl RingSource for CaptureRing {
    type Payload = CellRef;

    fn next_entry(&mut self) -> Result<Option<RingEntry<CellRef>>> {
        let Some(entry) = self.consumer.next() else { return Ok(None) };
        let desc = entry.desc;
        let kind = Kind::from_u8(desc.kind).ok_or_else(|| Error::Ring {
            position: entry.position,
            reason: format!("kind {} is none of ours", desc.kind),
        })?;
        Ok(Some(RingEntry {
            position: Position(entry.position),
            kind,
            volume: VolumeIndex(desc.volume),
            offset: desc.offset,
            length: desc.length,
            time: WallTime(desc.time),
            aux: desc.aux,
            payload: entry.payload,
        }))
    }

    fn free_to(&mut self, position: Position) {
        self.consumer.free_to(position.0);
    }

    fn rewind(&mut self) {
        self.consumer.rewind();
    }

    fn freed(&self) -> Position {
        Position(self.consumer.freed())
    }

    fn head(&self) -> Position {
        Position(self.ring.head())
    }

    fn load_state(&self) -> Option<StreamState> {
        self.ring.stream_state().and_then(|state| decode(&state))
    }

    fn store_state(&mut self, state: &StreamState) {
        self.ring.set_stream_state(&encode(state));
    }

    fn is_closed(&self) -> bool {
        self.ring.is_closed()
    }

    fn fill(&self) -> Fill {
        Fill {
            used_bytes: self.ring.used_bytes(),
            size_bytes: self.ring.size_bytes(),
            used_entries: self.ring.used_descriptors(),
            size_entries: self.ring.descriptors(),
        }
    }
}

/// To the ring's words.
fn encode(state: &StreamState) -> farshore_ring::StreamState {
    let flag = |on, bit| if on { bit } else { 0 };
    let mut spare = [0; 16];
    spare[POSITION] = state.position.0;
    spare[INCARNATION] = state.incarnation.0;
    spare[FLAGS] =
        flag(state.sent, FLAG_SENT) | flag(state.acknowledged, FLAG_ACKNOWLEDGED) | flag(state.compared, FLAG_COMPARED);
    spare[JOINED..JOINED + 4].copy_from_slice(&state.flags.joined.to_words());
    spare[NEWEST_POINT] = state.newest_point.0;
    spare[VERSION] = STATE_VERSION;
    farshore_ring::StreamState {
        next_batch: state.number.next().0,
        chain_hash: state.chain.0,
        event_open: state.flags.event_open,
        spare,
    }
}

/// From the ring's words; `None` if they are not ours.
fn decode(words: &farshore_ring::StreamState) -> Option<StreamState> {
    let spare = &words.spare;
    (spare[VERSION] == STATE_VERSION).then(|| StreamState {
        position: Position(spare[POSITION]),
        incarnation: Incarnation(spare[INCARNATION]),
        number: BatchNo(words.next_batch.saturating_sub(1)),
        chain: ChainHash(words.chain_hash),
        flags: StreamFlags {
            event_open: words.event_open,
            joined: VolumeSet::from_words([spare[JOINED], spare[JOINED + 1], spare[JOINED + 2], spare[JOINED + 3]]),
        },
        sent: spare[FLAGS] & FLAG_SENT != 0,
        acknowledged: spare[FLAGS] & FLAG_ACKNOWLEDGED != 0,
        compared: spare[FLAGS] & FLAG_COMPARED != 0,
        newest_point: WallTime(spare[NEWEST_POINT]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_come_back_from_the_rings_words() {
        let state = StreamState {
            position: Position(77),
            incarnation: Incarnation(3),
            number: BatchNo(12),
            chain: ChainHash([9; 32]),
            flags: StreamFlags { event_open: true, joined: [VolumeIndex(0), VolumeIndex(900)].into_iter().collect() },
            sent: true,
            acknowledged: false,
            compared: true,
            newest_point: WallTime(5),
        };
        assert_eq!(decode(&encode(&state)), Some(state));
        assert_eq!(decode(&farshore_ring::StreamState::default()), None);
    }
}
