//! The connecting end.

mod driver;
mod session;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use farshore_proto::Role;
use tokio::sync::{Notify, watch};

use self::session::Session;
use super::settings::SourceLinkConfig;
use super::wire::Fault;
use super::{LinkSink, SourceEvent};
use crate::identity::Identity;
use crate::{Error, Result, tls};

/// Keeps a session with the upstream alive, for ever: connects, reconnects, reports (see [`SourceEvent`]).
///
/// Each connection has a socket, a thread and a single-threaded runtime. The methods may be called from any thread and never
/// wait, except [`SourceLink::stop`].
pub struct SourceLink {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads of a link share.
struct Shared {
    config: SourceLinkConfig,
    identity: Mutex<Arc<Identity>>,
    sink: Arc<dyn LinkSink<SourceEvent>>,
    /// The session that stands, for the methods and for the threads of further connections.
    current: watch::Sender<Option<Arc<Session>>>,
    stop: watch::Sender<bool>,
    retry: Notify,
    /// Of connections that have ended.
    ended: Mutex<LinkStats>,
}

/// A batch's bytes, in pieces that are sent back to back. Cheap to clone.
#[derive(Clone, Default)]
pub struct BatchBytes {
    pieces: Vec<Bytes>,
}

impl BatchBytes {
    /// Length of all pieces in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }

    /// Whether there is no byte in it. Such a batch is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.iter().all(Bytes::is_empty)
    }
}

impl From<Vec<Bytes>> for BatchBytes {
    fn from(pieces: Vec<Bytes>) -> Self {
        Self { pieces }
    }
}

impl From<Bytes> for BatchBytes {
    fn from(piece: Bytes) -> Self {
        Self { pieces: vec![piece] }
    }
}

impl std::fmt::Debug for BatchBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BatchBytes({} bytes in {} pieces)", self.len(), self.pieces.len())
    }
}

/// A batch that was not accepted, given back with the reason.
#[derive(Debug)]
pub struct Unsent {
    /// [`Error::Full`]: try again after the next [`SourceEvent::BatchSent`]. [`Error::Closed`]: wait for the next session.
    /// [`Error::Length`]: never.
    pub error: Error,
    /// As given.
    pub batch: BatchBytes,
}

/// Figures of a link since its start.
#[derive(Clone, Copy, Default, Debug)]
pub struct LinkStats {
    /// Bytes of UDP payload sent, of all connections.
    pub wire_bytes_sent: u64,
    /// Bytes of UDP payload received.
    pub wire_bytes_received: u64,
    /// Packets declared lost (and sent again).
    pub packets_lost: u64,
    /// Batches reported as sent.
    pub batches_sent: u64,
    /// Their bytes.
    pub batch_bytes_sent: u64,
    /// Bytes of batches accepted and not yet reported as sent, now.
    pub batch_bytes_in_flight: u64,
    /// Connections of the session, now.
    pub connections: usize,
}

impl LinkStats {
    fn add_connection(&mut self, connection: &quinn::Connection) {
        let stats = connection.stats();
        self.wire_bytes_sent += stats.udp_tx.bytes;
        self.wire_bytes_received += stats.udp_rx.bytes;
        self.packets_lost += stats.path.lost_packets;
    }
}

impl SourceLink {
    /// Starts the threads; the first attempt to connect begins at once.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if the identity is neither agent nor relay; [`Error::Setting`]; [`Error::Thread`].
    pub fn start(config: SourceLinkConfig, identity: Arc<Identity>, sink: impl LinkSink<SourceEvent>) -> Result<Self> {
        config.check()?;
        check_role(identity.role)?;
        let shared = Arc::new(Shared {
            identity: Mutex::new(identity),
            sink: Arc::new(sink),
            current: watch::Sender::new(None),
            stop: watch::Sender::new(false),
            retry: Notify::new(),
            ended: Mutex::default(),
            config,
        });
        let link = Self { shared, threads: Mutex::default() };
        for index in 0..link.shared.config.connections {
            let thread = link.spawn(index)?;
            link.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(link)
    }

    fn spawn(&self, index: u16) -> Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let shared = Arc::clone(&self.shared);
        let run = move || {
            let _standing = farshore_uring::StandsBack::begin();
            match index {
                0 => {
                    runtime.block_on(driver::run_first(shared));
                    // Not waiting for a name that is still being looked up.
                    runtime.shutdown_background();
                }
                _ => runtime.block_on(driver::run_further(shared, index)),
            }
        };
        std::thread::Builder::new().name(format!("link-source-{index}")).spawn(run).map_err(Error::Thread)
    }

    /// Queues a message for the other end, behind those queued before.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Full`], [`Error::Length`] (1 byte to 1 MiB).
    pub fn send_control(&self, session: u64, message: Vec<u8>) -> Result<()> {
        self.session(session)?.outbox.push(message)
    }

    /// Queues a batch. [`SourceEvent::BatchSent`] with `number` tells when the other end has it; if the session ends before
    /// that, it may or may not have it.
    ///
    /// Bounded: `inflight_bytes_max` of batches that were accepted and not reported, except that one is always accepted.
    ///
    /// # Errors
    /// Gives the batch back with the reason, see [`Unsent`].
    pub fn send_batch(&self, session: u64, number: u64, batch: BatchBytes) -> std::result::Result<(), Unsent> {
        match self.session(session) {
            Ok(session) => session.push_batch(number, batch),
            Err(error) => Err(Unsent { error, batch }),
        }
    }

    /// Ends a session that is of no use any more (its peer broke the protocol, say): what is queued is dropped, `Down` follows
    /// with `reason`, and the next attempt begins. Nothing happens when it is over already.
    pub fn close_session(&self, session: u64, reason: &str) {
        if let Ok(session) = self.session(session) {
            session.end(Fault::protocol(reason));
        }
    }

    /// Round trip to the other end, smoothed; `None` without a session.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        self.shared.current.borrow().as_ref().and_then(|session| session.rtt())
    }

    /// See [`LinkStats`].
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        // Under this lock a session is counted either here or among those that have ended.
        let ended = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stats = *ended;
        if let Some(session) = self.shared.current.borrow().as_ref() {
            session.add_to(&mut stats);
        }
        stats
    }

    /// Ends the wait before the next attempt.
    pub fn retry_now(&self) {
        self.shared.retry.notify_one();
    }

    /// Uses a renewed identity from the next attempt on; the session that stands goes on.
    ///
    /// # Errors
    /// [`Error::WrongRole`].
    pub fn replace_identity(&self, identity: Arc<Identity>) -> Result<()> {
        check_role(identity.role)?;
        *self.shared.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
        Ok(())
    }

    /// Takes no more, gets out what was accepted (for at most `drain`), closes, and waits for the threads. The last event has
    /// been reported when it returns. Also done on drop. Must not be called by the sink.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the link died of a panic");
            }
        }
    }

    fn session(&self, id: u64) -> Result<Arc<Session>> {
        let current = self.shared.current.borrow();
        match current.as_ref() {
            Some(session) if session.id == id => Ok(Arc::clone(session)),
            Some(_) | None => Err(Error::Closed { session: id }),
        }
    }
}

impl Drop for SourceLink {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for SourceLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceLink").field("upstream", &self.shared.config.upstream).finish_non_exhaustive()
    }
}

fn check_role(role: Role) -> Result<()> {
    if tls::SOURCE_ROLES.contains(&role) {
        Ok(())
    } else {
        Err(Error::WrongRole { role, what: "open a link to a target" })
    }
}

impl Shared {
    fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn stopped(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let mut stop = self.stop.subscribe();
        let _closed = stop.wait_for(|stop| *stop).await;
    }

    fn report_failure(&self, address: Option<SocketAddr>, reason: &str, fatal: bool) {
        let reason = match address {
            Some(address) => format!("{} ({address}): {reason}", self.config.upstream),
            None => format!("{}: {reason}", self.config.upstream),
        };
        tracing::info!(%reason, fatal, "no link");
        self.sink.event(SourceEvent::Down { session: 0, reason, fatal });
    }
}
