//! What `farshore status` tells of the stream.

use std::time::Duration;

use farshore_proto::{BatchNo, ChainHash, Generation, Incarnation, WallTime};

use crate::haste::Pressure;
use crate::seal::Level;
use crate::source::{Fill, RingSource};

use super::backlog::LogFigures;
use super::{Mode, Streamer};

/// In which state the stream is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// No session with the target.
    #[default]
    Connecting,
    /// Greeted, not answered.
    Greeting,
    /// The batches that the target has are formed again and checked.
    CatchingUp,
    /// Batches flow.
    Live,
    /// The target takes none for now.
    Paused,
    /// "Compare everything" is being recorded.
    Comparing,
    /// A new incarnation is being made.
    StartingOver,
    /// The target refused the stream.
    Refused,
}

impl Phase {
    /// As `status --json` says it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Greeting => "greeting",
            Self::CatchingUp => "catching-up",
            Self::Live => "live",
            Self::Paused => "paused",
            Self::Comparing => "comparing",
            Self::StartingOver => "starting-over",
            Self::Refused => "refused",
        }
    }
}

/// The stream's figures. Sums are since the start of the process, in bytes.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StreamStatus {
    /// State.
    pub phase: Phase,
    /// Why it is not live, as far as known.
    pub reason: Option<String>,
    /// Line of history.
    pub generation: Generation,
    /// Life of the ring.
    pub incarnation: Incarnation,
    /// Last durable batch and its chain hash; what the agent keeps for the next ring.
    pub durable: (BatchNo, ChainHash),
    /// Time of the newest durable recoverable cut; 0: none.
    pub newest_point: WallTime,
    /// Age of that cut; `None`: there is none.
    pub rpo: Option<Duration>,
    /// An event is open in what is durable.
    pub event_open: bool,
    /// Payload that is in the ring or the disk log and not durable at the target.
    pub lag_bytes: u64,
    /// Batches under way, and their bytes.
    pub window: (usize, u64),
    /// Limit of those bytes now.
    pub window_limit: u64,
    /// The ring.
    pub ring: Fill,
    /// Every claim fails: the ring ran full.
    pub ring_closed: bool,
    /// The disk log.
    pub log: LogFigures,
    /// Bytes that guests wrote and that became durable, before coalescing.
    pub written_bytes: u64,
    /// Payload that was sent and became durable, sync's included.
    pub shipped_bytes: u64,
    /// Bytes of batches made.
    pub sealed_bytes: u64,
    /// Batches that became durable.
    pub batches: u64,
    /// Bytes of chunks / those that were sent as bytes; 1 while nothing was sent.
    pub dedup_ratio: f64,
    /// Bytes packed / bytes of frames; 1 while nothing was sent.
    pub compression_ratio: f64,
    /// Level for the next batch.
    pub level: Level,
    /// Round trip through the target's thread.
    pub rtt: Option<Duration>,
    /// Rate at which the target takes batches, bytes per second, while there are any.
    pub rate: u64,
    /// Contents under lease.
    pub leased: usize,
}

impl<S: RingSource> Streamer<S> {
    /// The figures now.
    #[must_use]
    pub fn status(&self, wall: WallTime) -> StreamStatus {
        let sums = &self.counters;
        let under_way: u64 = self.slots.iter().map(|slot| slot.payload_bytes).sum();
        let Pressure { fill, age, event_open } = self.pressure(wall);
        StreamStatus {
            phase: self.phase(),
            reason: self.paused.clone().or_else(|| self.last_reason.clone()),
            generation: self.config.generation,
            incarnation: self.state.incarnation,
            durable: (self.state.number, self.state.chain),
            newest_point: self.state.newest_point,
            rpo: age,
            event_open,
            lag_bytes: under_way + self.drain.waiting_bytes() + self.backlog.payload_bytes(),
            window: (self.slots.len(), self.window_used()),
            window_limit: self.window_limit(),
            ring: fill,
            ring_closed: self.source.is_closed(),
            log: self.backlog.figures(),
            written_bytes: sums.written_bytes,
            shipped_bytes: sums.shipped_bytes,
            sealed_bytes: sums.sealed_bytes,
            batches: sums.batches,
            dedup_ratio: ratio(sums.plain_bytes + sums.deduplicated_bytes, sums.plain_bytes),
            compression_ratio: ratio(sums.plain_bytes, sums.frame_bytes),
            level: self.level.level(),
            rtt: self.session.rtt(),
            rate: self.meter.rate(),
            leased: self.lease.as_ref().map_or(0, |lease| lease.len()),
        }
    }

    /// How much the stream is pressed.
    pub(crate) fn pressure(&self, wall: WallTime) -> Pressure {
        let newest = self.state.newest_point;
        Pressure {
            fill: self.source.fill(),
            age: (newest != WallTime(0)).then(|| wall.since(newest)),
            event_open: self.state.flags.event_open,
        }
    }

    fn phase(&self) -> Phase {
        match self.mode {
            Mode::Down if self.link.is_none() => Phase::Connecting,
            Mode::Down => Phase::Greeting,
            Mode::Live if self.catch_up.is_some() => Phase::CatchingUp,
            Mode::Live if self.paused.is_some() => Phase::Paused,
            Mode::Live => Phase::Live,
            Mode::Comparing => Phase::Comparing,
            Mode::StartingOver => Phase::StartingOver,
            Mode::Refused => Phase::Refused,
        }
    }
}

fn ratio(whole: u64, part: u64) -> f64 {
    if part == 0 { 1.0 } else { whole as f64 / part as f64 }
}
