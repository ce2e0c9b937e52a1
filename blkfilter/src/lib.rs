//! What happens to each request of a protected volume: it goes to the backing device, and what it wrote goes into the capture ring.
//!
//! ```text
//! front end ──Request──▶ FilterQueue ──Op──▶ backing device
//!                          │  range lock        │
//!                          └──publish◀─completion ──▶ ring ──▶ streamer ──▶ target
//!                                                 Syncer ──▲      Cutter ──▲
//! ```
//!
//! # Invariants
//!
//! 1. *No trouble of ring or stream fails or delays a guest's request* (I1). Every step that can find no room has another way: no cell
//!    → ordinary memory and a mark in `missing`; no ticket → a mark. Nothing here waits but for the backing device and for
//!    overlapping requests.
//! 2. *One buffer* (I2): the cell that was filled from the guest is written to the backing device and then published.
//! 3. *Ticket before acknowledgement* (I3). A write is completed to the guest only after it has its ticket, or its range is in
//!    `missing` and (for a volume that points include) the ring is closed or an event is open. Overlapping writes go one after the
//!    other: the range lock is held from before the backing write is submitted until the ticket or the mark is there.
//! 4. *Marks* (I4): a range without a cell is marked before its backing write is submitted (ranges with a cell are named in shared
//!    memory by the cell itself); a failed claim and a failed write mark before they unlock; a mark is cleared only by sync,
//!    which holds the range lock of the slot: never while a write to it is in flight.
//! 5. In the steady state a request costs no allocation, system call or await of its own, and no lock but the range lock's
//!    shard.
//!
//! Absences: no clock (time is an argument), no thread, no socket, no payload in logs.
#![forbid(unsafe_code)]

pub mod activity;
mod alarm;
mod counters;
mod cutter;
mod errno;
mod group;
mod queue;
pub mod range_lock;
mod states;
pub mod sync;
mod touched;
mod volume;
mod zeroing;

pub use alarm::{Alarm, AlarmEvent};
pub use counters::Counters;
pub use cutter::{Cut, Cutter};
pub use errno::BACKING_ERRORS;
pub use group::{CaptureConfig, CaptureGroup, mark_recovered};
pub use queue::FilterQueue;
pub use states::MACHINES;
pub use volume::{BackingFile, Content, FilterVolume, Volume, VolumeSpec};

/// A request's buffer: a cell of the capture slab, or ordinary memory.
pub type Buf = farshore_ring::CaptureBuf<farshore_uring::AlignedBuf>;

/// Bit of a cut's `aux` word: the point is application-consistent (file systems were frozen around it).
pub const CUT_APP_CONSISTENT: u64 = 1 << 1;

/// Why something could not be done with a group. Nothing in here concerns a guest's request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The ring refused the volume.
    #[error("cannot protect volume {name}")]
    Ring {
        /// The volume's name.
        name: String,
        /// Why.
        source: farshore_ring::Error,
    },
    /// No such volume in the group.
    #[error("volume {0} is not in this group")]
    NoVolume(u16),
    /// The stream is closed: points are paused. It opens again by itself when the ring has been shipped.
    #[error("the capture stream is closed; wait until it has caught up (alarm \"ring closed\" clears)")]
    Closed,
    /// Too many bookmarks wait for their cut.
    #[error("{0} bookmarks wait for their cut already; try again")]
    Bookmarks(usize),
}
