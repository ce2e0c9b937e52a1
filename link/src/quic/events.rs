use std::net::SocketAddr;
use std::time::Duration;

use super::RecvBuf;
use crate::identity::PeerName;

/// Takes the events of a link. Called on link threads: it must not wait, or the link stands still.
///
/// Events of one session come one after another: `Up` first, `Down` last, nothing in between after `Down`. It may call the
/// link's own methods, except `stop`. A closure will do.
pub trait LinkSink<E>: Send + Sync + 'static {
    /// Takes one event.
    fn event(&self, event: E);
}

impl<E, F: Fn(E) + Send + Sync + 'static> LinkSink<E> for F {
    fn event(&self, event: E) {
        self(event);
    }
}

/// What a [`super::SourceLink`] reports.
#[derive(Debug)]
pub enum SourceEvent {
    /// A session stands.
    Up {
        /// Names it from here on; never reused within the link.
        session: u64,
        /// Whom we reached: a target or a relay of our vault.
        peer: PeerName,
        /// Where.
        address: SocketAddr,
        /// Round trip of the handshake.
        rtt: Duration,
    },
    /// A message from the other end.
    Control {
        /// Of which session.
        session: u64,
        /// As sent.
        bytes: Vec<u8>,
    },
    /// A batch lies in the other end's memory and was handed to its receiver. Not durable there: that, the receiver says in
    /// a message of its own.
    BatchSent {
        /// Of which session.
        session: u64,
        /// As given to `send_batch`.
        number: u64,
    },
    /// A session is over (`session` as in its `Up`), or an attempt to make one failed (`session` 0).
    Down {
        /// 0 for a failed attempt.
        session: u64,
        /// One sentence for a person.
        reason: String,
        /// Somebody must act (an expired or foreign certificate). Tried again slowly and at `retry_now`; every other failure
        /// is tried again with a short back-off.
        fatal: bool,
    },
}

/// What a [`super::TargetLink`] reports.
#[derive(Debug)]
pub enum TargetEvent {
    /// A source's session stands.
    Up {
        /// Names it from here on; never reused within the link.
        session: u64,
        /// Who it is, by its certificate.
        peer: PeerName,
        /// Where its first connection comes from.
        address: SocketAddr,
    },
    /// A message from the source.
    Control {
        /// Of which session.
        session: u64,
        /// As sent.
        bytes: Vec<u8>,
    },
    /// A whole batch. The source learns that it was sent when this event has been taken.
    Batch {
        /// Of which session.
        session: u64,
        /// Its place in the session: 0, 1, 2… in the order of the source's `send_batch`. Batches may overtake each other.
        sequence: u64,
        /// The bytes; holds a part of the session's allowance until dropped.
        bytes: RecvBuf,
    },
    /// A session is over. Buffers of it stay valid.
    Down {
        /// As in its `Up`.
        session: u64,
        /// One sentence for a person.
        reason: String,
    },
    /// Somebody was not let in (a certificate that is expired, denied or of another vault or role).
    Refused {
        /// Where they came from.
        address: SocketAddr,
        /// One sentence for a person.
        reason: String,
    },
}
