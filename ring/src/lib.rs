//! The lock-free capture ring of one group on one host, in shared memory that a restarted process opens again.
//!
//! ```text
//! producers (queue threads)                       consumer (streamer)
//!   reserve ─ fill ─ writing ─ [backing write] ─ publish ──▶ next ─ … ─ free_to
//!      │                                          │ CLOSED?     reopen(event)
//!      └─ Full ─ [backing write] ─ close ◀────────┘
//! ```
//!
//! One file: static header, hot words, volume table, the streamer's scratch, descriptors, slab, then the volumes' bitmaps. Byte table:
//! `docs/formats/ring.md`.
//!
//! # Invariants
//!
//! 1. Position = ticket: claiming is one atomic operation on one word that also holds CLOSED. There is no gap, no second
//!    order, and no claim after CLOSED until the ring is re-opened by an event that takes the first position behind the gap.
//! 2. Nothing waits: reserving and claiming either succeed or fail at once, in a bounded number of steps unless other producers
//!    make progress. No lock, system call or allocation between [`Ring::producer`] and its drop.
//! 3. With a reservation, publishing fails only on a closed ring: the descriptor's credit was taken with the cell.
//! 4. `head - freed` never exceeds the number of descriptors, and no unfreed descriptor or cell is overwritten.
//! 5. A cell has one owner: a [`Reservation`], or a published position together with its [`CellRef`]s. Nobody writes to a cell
//!    that anybody else can read.
//! 6. Cells are freed in any order; one slow write keeps its own cell and nothing else. Only the *descriptors* are freed in
//!    order, by the consumer.
//! 7. Some descriptors and a page of the slab are left to markers and events, and one or more descriptors to re-opening, however
//!    full the ring is of writes.
//! 8. A range that may differ between backing device and stream is named in shared memory from before its write is submitted
//!    until its position is published ([`Reservation::writing`]).
//! 9. At every kill point the shared memory is a state from which [`Ring::open`] goes on: nothing published is lost, nothing
//!    unpublished appears, nothing in 8 is forgotten. The argument is in `recover.rs`, the slab's in `slab.rs`, the ring's in
//!    `shared.rs`.
//! 10. Bounded: descriptors, cells, intents, volumes and bitmaps have sizes fixed when made; at the limit [`Full`] says which.
//!
//! # Models
//!
//! With `--cfg loom` the algorithms run over atomics of loom (`src/models.rs`); only the file mapping and what needs it is left out.

#![cfg_attr(loom, allow(dead_code, unused_imports, reason = "the models leave the file mapping and recovery out"))]

mod capture_buf;
mod consumer;
mod crc;
mod error;
mod layout;
mod memory;
mod producer;
mod shared;
mod slab;
mod sync;

#[cfg(not(loom))]
mod bitmap;
#[cfg(not(loom))]
mod in_use;
#[cfg(all(test, not(loom)))]
mod kill_points;
#[cfg(all(test, loom))]
mod models;
#[cfg(not(loom))]
mod recover;
#[cfg(not(loom))]
mod ring;
#[cfg(not(loom))]
mod state;
#[cfg(not(loom))]
mod volumes;

pub use capture_buf::CaptureBuf;
pub use consumer::{CellRef, Consumer, Entry, ReopenError};
pub use error::Error;
pub use layout::{CELL_STATES, LAYOUT_VERSION, MAX_CELL_BYTES, MAX_VOLUMES};
pub use memory::Memory;
pub use producer::{Closed, Full, Producer, Reservation};

#[cfg(not(loom))]
pub use bitmap::{Bitmap, SLOT_BYTES};
#[cfg(not(loom))]
pub use in_use::InUse;
#[cfg(not(loom))]
pub use recover::{Recovery, WritingRange};
#[cfg(not(loom))]
pub use ring::{Dormant, Ring, RingConfig, RingIdentity};
#[cfg(not(loom))]
pub use state::StreamState;
#[cfg(not(loom))]
pub use volumes::{VolumeInfo, Which};

/// What a position says. The ring carries it; its meaning is `farshore_proto::record`'s. All zeroes: a no-op.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Desc {
    /// Kind of record.
    pub kind: u8,
    /// Flags of the kind.
    pub flags: u8,
    /// Index of the volume.
    pub volume: u16,
    /// Bytes of payload in the cell; 0 without one.
    pub len: u32,
    /// Start of the range, bytes.
    pub offset: u64,
    /// Length of the range, bytes.
    pub length: u64,
    /// Source's clock, nanoseconds since the Unix epoch.
    pub time: u64,
    /// Of the kind.
    pub aux: u64,
}
