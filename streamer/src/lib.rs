//! From the capture ring to the target: batches are formed, deduplicated, compressed, sealed, sent, and kept until they are
//! durable there.
//!
//! ```text
//! ring ─▶ Drain ─▶ Coalescer ─▶ Hasher ─▶ [chain] ─▶ Packer ─▶ Sealer ─▶ window ─▶ link ─▶ target
//!           cut to cut   └──── worker ────┘            └─ worker ─┘         ▲                 │
//!   free_to ◀──────────────────────── Streamer ◀────────────────────────────┴──── Durable ◀───┘
//! ```
//!
//! - The stages are plain structs: [`Drain`], [`Coalescer`], [`Hasher`], [`Packer`], [`Sealer`]; a [`Worker`] is one thread's set.
//! - [`Streamer`] is the machine: it numbers and links batches, knows what the target has, and decides where to go on. No I/O, no
//!   clock, no randomness of its own.
//! - [`StreamerHandle`] runs it over the shared ring and a `SourceLink`; [`Capture`] is what it needs of the filter.
//!
//! # Invariants
//!
//! 1. A batch is what lies between two cuts, and its record list and chain hash depend on the ring's content alone. So a batch
//!    formed again (after a kill, a lost session, a lost lease) is the same batch to the target.
//! 2. The ring is freed only by an authenticated acknowledgement that carries the chain hash we computed; the state that says so
//!    is stored first ([`StreamState`]).
//! 3. Nothing is sent before the target's greeting proved that it continues what the target holds, or "compare everything" was
//!    durably recorded.
//! 4. A cut is recoverable only if no event is open there in stream order and at least one volume has joined.
//! 5. Payload is copied once: from the ring's cell into the frame that is sealed in place.
//! 6. Bounded: raw entries by the ring's descriptors, batches by the window (count and bytes), work by the number of workers,
//!    control messages in bytes. At the limit of the window nothing is formed and the ring fills; what then happens is the
//!    filter's business.
#![forbid(unsafe_code)]

mod age;
mod bucket;
mod capture;
mod coalesce;
mod dedup;
mod disk_log;
mod drain;
mod driver;
mod error;
mod hash;
mod haste;
mod inbox;
mod level;
mod look;
mod machine;
mod pack;
mod pool;
mod seal;
mod source;
mod work;

pub use bucket::TokenBucket;
pub use capture::CaptureRing;
pub use coalesce::{Coalescer, Granularity, Origin, RecordSet};
pub use dedup::{LeaseSet, Seen};
pub use disk_log::{
    BATCHES_MAX, DISK_LOG_MIN, Damage, DiskLog, GroupLog, Line, LogDone, LogOrder, LogTurn, LoggedBatch, Look,
    LookEntry, LookLine, is_disk_log, look,
};
pub use drain::{Drain, RawBatch, RawEntry};
pub use driver::{Capture, StreamWaker, StreamerHandle, StreamerStatus};
pub use error::{Error, Result};
pub use hash::{Hasher, is_zero};
pub use level::LevelControl;
pub use look::looks_random;
pub use machine::{
    DurableBatch, Entropy, LogFigures, LogNews, LogStart, MACHINES, Outgoing, Phase, StreamEvent, StreamLog,
    StreamStatus, Streamer, StreamerConfig, bridge,
};
pub use pack::{FramePlan, PackPlan, Packer};
pub use seal::{Level, SealedBatch, Sealer, SegmentPool};
pub use source::{CUT_APP_CONSISTENT, Fill, RingEntry, RingSource, StreamFlags, StreamState, VOLUMES_MAX, VolumeSet};
pub use work::{Done, DoneResult, SealOrder, Work, WorkId, Worker};
