//! NBD front end: serves any [`farshore_uring::BlockDevice`] to NBD clients (kernel `nbd`, QEMU, libnbd, fio) over a unix or
//! TCP socket.
//!
//! [`Server::start`] runs threads that each own a reactor and a queue of the device; connections are dealt out to them.
//! A write's payload is received straight into the device's buffer together with the next request's header; replies are
//! gathered into one send at a time per connection. The protocol itself ([`proto`], [`haggle`]) performs no I/O.
//! The subset that is spoken is described in `docs/formats/nbd.md`.

#![forbid(unsafe_code)]
#![allow(clippy::big_endian_bytes, reason = "everything of NBD is big-endian on the wire")]

#[cfg(feature = "client")]
pub mod client;
mod conn;
mod error;
mod extents;
pub mod haggle;
mod listen;
mod output;
pub mod proto;
mod reply;
mod server;
mod stats;
pub mod wire;
mod worker;

pub use conn::CONNECTION_STATES;
pub use error::{Error, ErrorKind};
pub use listen::{Address, Listen};
pub use server::{Server, ServerConfig, ServerHandle};
pub use stats::{ConnectionInfo, ConnectionState, Peer, Stats, Totals};
