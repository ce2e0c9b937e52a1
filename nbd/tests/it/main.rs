//! The server over real sockets, above a device in memory, against the crate's own client and against raw bytes.

#![allow(clippy::big_endian_bytes, reason = "everything of NBD is big-endian on the wire")]

mod hostile;
mod lifecycle;
mod memory;
mod model;
mod protocol;
mod rng;
