//! Batches on their way: from the ring's entries to the target's acknowledgement.

use farshore_proto::{BatchNo, ChainHash, Name, Position, WallTime};

use crate::coalesce::RecordSet;
use crate::disk_log::LoggedBatch;
use crate::drain::RawBatch;
use crate::seal::SealedBatch;
use crate::source::{RingSource, StreamFlags};

use super::Streamer;

/// Bytes that the window has at least: one batch as large as a cut lets it grow, and the next.
const WINDOW_MIN: u64 = 16 << 20;

/// One batch on its way.
#[derive(Debug)]
pub(super) struct Slot<P> {
    pub(super) number: BatchNo,
    pub(super) first: Position,
    pub(super) end: Position,
    pub(super) time: WallTime,
    pub(super) recoverable: bool,
    pub(super) app_consistent: bool,
    pub(super) bookmark: Option<Name>,
    /// Flags of the stream at its end.
    pub(super) after: StreamFlags,
    pub(super) payload_bytes: u64,
    pub(super) written_bytes: u64,
    /// Known once it is listed and its predecessor's is known.
    pub(super) chain: Option<ChainHash>,
    /// The target has it already; only its chain hash is wanted.
    pub(super) verify_only: bool,
    /// Was given to the disk log; with what stands there of it.
    pub(super) logged: Option<Box<LoggedBatch>>,
    pub(super) stage: Stage<P>,
}

#[derive(Debug)]
pub(super) enum Stage<P> {
    /// A worker makes the list.
    Listing,
    /// Waits for its predecessor's chain hash, or for a worker.
    Listed(Box<RawBatch<P>>, RecordSet),
    /// A worker makes the bytes.
    Sealing,
    /// To be sent, or sent.
    Ready(SealedBatch),
    /// Its chain hash is known, bytes are not wanted.
    Verified,
}

impl<P> Slot<P> {
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready(_))
    }

    /// Its bytes, once they are made.
    pub(super) fn sealed(&self) -> Option<&SealedBatch> {
        match &self.stage {
            Stage::Ready(batch) => Some(batch),
            Stage::Listing | Stage::Listed(..) | Stage::Sealing | Stage::Verified => None,
        }
    }

    /// The log does not have it after all.
    pub(super) fn take_from_log(&mut self) {
        self.logged = None;
    }

    /// Is of no use in another session.
    pub(super) fn needs_its_session(&self) -> bool {
        match &self.stage {
            Stage::Ready(batch) => batch.has_references,
            Stage::Verified => true,
            Stage::Listing | Stage::Listed(..) | Stage::Sealing => false,
        }
    }

    fn window_bytes(&self) -> u64 {
        match &self.stage {
            Stage::Ready(batch) => batch.len,
            Stage::Listing | Stage::Listed(..) | Stage::Sealing => self.payload_bytes,
            Stage::Verified => 0,
        }
    }
}

impl<S: RingSource> Streamer<S> {
    pub(super) fn next_number(&self) -> BatchNo {
        self.slots.back().map_or(self.base().number, |slot| slot.number).next()
    }

    pub(super) fn slot_mut(&mut self, number: BatchNo) -> Option<&mut Slot<S::Payload>> {
        let index = number.0.checked_sub(self.slots.front()?.number.0)?;
        self.slots.get_mut(usize::try_from(index).ok()?)
    }

    /// Bytes under way, as far as they count.
    pub(super) fn window_used(&self) -> u64 {
        self.slots.iter().map(Slot::window_bytes).sum()
    }

    /// Bytes that may be under way: what the target takes in half a second, so that the queue in front of a slow link stays
    /// short. A link whose round trip takes longer than its share raises the measured rate, and with it the window.
    pub(super) fn window_limit(&self) -> u64 {
        (self.meter.rate() / 2).max(WINDOW_MIN).min(self.config.window_bytes)
    }

    pub(super) fn window_has_room(&self) -> bool {
        let count = self.slots.iter().filter(|slot| !slot.verify_only).count();
        count < self.config.window_batches && self.window_used() < self.window_limit()
    }
}
