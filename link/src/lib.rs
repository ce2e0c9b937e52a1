//! Who may talk to whom, and the way there: identities of a vault, and the QUIC link between a source and the site that
//! takes its batches.
//!
//! - [`identity`]: the vault's certificate authority and keys; the bundle that gives one machine its role, name and keys.
//! - [`quic`]: [`quic::SourceLink`] keeps a session to the upstream alive and stripes batches over several connections;
//!   [`quic::TargetLink`] takes the sessions of many sources. Both run in threads of their own and report by events.
//! - [`bench_bare`]: one tuned QUIC stream without any of it, to measure against.
//!
//! The link knows bytes, lengths and order, not what a batch or message means. Byte tables: `docs/formats/link.md` and
//! `docs/formats/identity.md`.
#![forbid(unsafe_code)]

pub mod bench_bare;
mod error;
#[cfg(fuzzing)]
pub mod fuzz;
pub mod identity;
pub mod quic;
mod tls;

/// Pieces of a batch: reference-counted bytes that QUIC keeps until they are acknowledged, without copying them.
pub use bytes::Bytes;
pub use error::{Error, Result};
