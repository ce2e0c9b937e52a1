//! What both sites agree on: units, ids, the formats of batches, frames, records and messages, and the two session state
//! machines.
//!
//! A leaf: no I/O, no clock, no randomness; time and random bytes are arguments. Byte tables: `docs/formats/`.
#![forbid(unsafe_code)]

pub mod batch;
pub mod codec;
mod error;
pub mod frame;
mod ids;
pub mod keys;
mod log_mark;
pub mod message;
pub mod record;
pub mod session;
pub mod states;
pub mod text;
mod units;

pub use error::{Error, Result};
pub use ids::{
    BatchNo, ChainHash, ChunkId, Generation, GroupId, HostId, Incarnation, KeyEpoch, Name, PointId, Position, Role,
    VaultId, VolumeIndex,
};
pub use log_mark::LogMark;
pub use units::{Now, SECTOR_BYTES, SLOT_BYTES, SLOT_SECTORS, SlotNo, WallTime};
