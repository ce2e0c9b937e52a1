//! The link: sessions of a source with the site that takes its batches, over QUIC.
//!
//! ```text
//! SourceLink                                             TargetLink
//!   thread 0: connection 0 ── control stream, batches ──▶  thread: every connection of its socket
//!   thread n: connection n ── batches ──────────────────▶     │ batch → aligned pooled buffer (one copy)
//!     ▲ one queue, in order                                   ▼
//!   send_batch / send_control          events ◀── sinks ──▶ events
//! ```
//!
//! A **session** is what lies between `Up` and `Down` at both ends: it has one control stream, whose messages arrive in
//! order, and any number of batches, whose arrival order is free (each carries its place). A session that loses any of its
//! connections is over; what was not reported as sent is the caller's to send again.

mod events;
mod gate;
#[cfg(test)]
mod hostile;
mod life;
mod outbox;
mod recv;
mod settings;
mod source;
mod target;
pub(crate) mod transport;
pub(crate) mod wire;

pub use events::{LinkSink, SourceEvent, TargetEvent};
pub use life::MACHINE;
pub use recv::{HEADROOM_BYTES, RecvBuf, RecvLease};
pub use settings::{Congestion, SourceLinkConfig, TargetLimits, Transport};
pub use source::{BatchBytes, LinkStats, SourceLink, Unsent};
pub use target::{SessionInfo, TargetLink};
pub use wire::MESSAGE_BYTES_MAX;
