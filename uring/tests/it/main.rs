//! Integration tests of the crate, against real files, sockets and threads, and of the simulation against models.

#![allow(
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "the tests drive the real ring with real deadlines, and their sizes are small"
)]

mod common;
mod device;
mod reactor;
mod sim_io;
mod sim_storage;
mod sockets;
mod storage;
