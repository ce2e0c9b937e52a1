use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, RecvStream};
use tokio::sync::{Notify, watch};

use super::super::life::Life;
use super::super::outbox::Outbox;
use super::super::settings::CONTROL_RESERVE;
use super::super::wire::{self, BATCH_HEADER_LEN, Fault, RECEIPT_LEN, Welcome};
use super::super::{LinkSink, SourceEvent};
use super::{BatchBytes, LinkStats, SourceLinkConfig, Unsent};
use crate::Error;

/// One session at the source: the queue of batches that its connections take from, the messages, and how it ended.
///
/// Invariants: `in_flight` is the length of all batches accepted and not reported; a batch's sequence is its place among all
/// accepted ones; after `fault` is set nothing is accepted.
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) token: [u8; 16],
    pub(super) address: SocketAddr,
    pub(super) welcome: Welcome,
    pub(super) outbox: Outbox,
    pub(super) life: Life<SourceEvent>,
    batches: Mutex<Batches>,
    /// Signalled on every change of `batches` and when the peer has ended its messages.
    changed: Notify,
    fault: watch::Sender<Option<Fault>>,
    peer_finished: watch::Sender<bool>,
    connections: Mutex<Vec<Connection>>,
    inflight_bytes_max: u64,
    batches_sent: AtomicU64,
    batch_bytes_sent: AtomicU64,
}

#[derive(Default)]
struct Batches {
    queue: VecDeque<Queued>,
    in_flight: u64,
    next_sequence: u64,
    closed: bool,
}

struct Queued {
    number: u64,
    sequence: u64,
    len: u64,
    pieces: Vec<Bytes>,
}

/// Bytes of the connection's window that batches on it may have filled if the target reads none of them.
struct Window {
    used: AtomicU64,
    limit: u64,
    per_stream: u64,
}

impl Window {
    fn new(welcome: &Welcome) -> Self {
        let limit = u64::from(welcome.connection_window.saturating_sub(CONTROL_RESERVE));
        Self { used: AtomicU64::new(0), limit, per_stream: u64::from(welcome.stream_window) }
    }

    fn cost(&self, len: u64) -> u64 {
        (len + BATCH_HEADER_LEN as u64).min(self.per_stream)
    }

    /// Takes a batch's part. One batch always fits, whatever the target's settings.
    fn take(&self, len: u64) -> bool {
        let used = self.used.load(Ordering::Relaxed);
        if used != 0 && used + self.cost(len) > self.limit {
            return false;
        }
        // Only the connection's one worker adds, so the check above holds.
        self.used.fetch_add(self.cost(len), Ordering::Relaxed);
        true
    }

    fn give_back(&self, len: u64) {
        self.used.fetch_sub(self.cost(len), Ordering::Relaxed);
    }
}

impl Session {
    pub(super) fn new(
        id: u64,
        token: [u8; 16],
        address: SocketAddr,
        welcome: Welcome,
        config: &SourceLinkConfig,
        sink: Arc<dyn LinkSink<SourceEvent>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            token,
            address,
            welcome,
            outbox: Outbox::new(id, config.control_bytes_max),
            life: Life::new(sink),
            batches: Mutex::default(),
            changed: Notify::new(),
            fault: watch::Sender::new(None),
            peer_finished: watch::Sender::new(false),
            connections: Mutex::default(),
            inflight_bytes_max: config.inflight_bytes_max,
            batches_sent: AtomicU64::new(0),
            batch_bytes_sent: AtomicU64::new(0),
        })
    }

    fn batches(&self) -> MutexGuard<'_, Batches> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push_batch(&self, number: u64, batch: BatchBytes) -> Result<(), Unsent> {
        let (session, len, limit) = (self.id, batch.len(), self.welcome.batch_bytes_max);
        if len == 0 || len > limit {
            return Err(Unsent { error: Error::Length { session, what: "batch", len, limit }, batch });
        }
        let mut batches = self.batches();
        if batches.closed {
            return Err(Unsent { error: Error::Closed { session }, batch });
        }
        let limit = self.inflight_bytes_max;
        if batches.in_flight != 0 && batches.in_flight + len > limit {
            return Err(Unsent { error: Error::Full { session, queue: "the queue of batches", limit }, batch });
        }
        batches.in_flight += len;
        let sequence = batches.next_sequence;
        batches.next_sequence += 1;
        batches.queue.push_back(Queued { number, sequence, len, pieces: batch.pieces });
        drop(batches);
        self.changed.notify_waiters();
        Ok(())
    }

    /// The next batch, once `window` has room for it; `None` when there will be no more.
    async fn next_batch(&self, window: &Window) -> Option<Queued> {
        loop {
            let changed = self.changed.notified();
            {
                let mut batches = self.batches();
                match batches.queue.front() {
                    Some(front) if window.take(front.len) => return batches.queue.pop_front(),
                    None if batches.closed => return None,
                    Some(_) | None => {}
                }
            }
            changed.await;
        }
    }

    /// Sends batches on one connection, one after another, until there will be no more.
    pub(super) async fn send_batches(self: Arc<Self>, connection: Connection) -> Result<(), Fault> {
        let window = Arc::new(Window::new(&self.welcome));
        while let Some(queued) = self.next_batch(&window).await {
            let Queued { number, sequence, len, mut pieces } = queued;
            let (mut send, recv) = connection.open_bi().await?;
            let header = wire::batch_header(len, sequence);
            pieces.insert(0, Bytes::copy_from_slice(&header));
            send.write_all_chunks(&mut pieces).await?;
            send.finish().map_err(|_| Fault::protocol("a batch's stream is closed already"))?;
            let (session, window, connection) = (Arc::clone(&self), Arc::clone(&window), connection.clone());
            tokio::spawn(async move {
                match receipt(recv, sequence, &connection).await {
                    Ok(()) => session.sent(&window, number, len),
                    Err(fault) => session.end(fault),
                }
            });
        }
        Ok(())
    }

    fn sent(&self, window: &Window, number: u64, len: u64) {
        window.give_back(len);
        self.batches().in_flight -= len;
        self.batches_sent.fetch_add(1, Ordering::Relaxed);
        self.batch_bytes_sent.fetch_add(len, Ordering::Relaxed);
        self.life.emit(SourceEvent::BatchSent { session: self.id, number });
        self.changed.notify_waiters();
    }

    /// The peer has said all it will: it is closing, or answers our closing.
    pub(super) fn peer_finished(&self) {
        self.close_input();
        self.peer_finished.send_replace(true);
        self.changed.notify_waiters();
    }

    fn close_input(&self) {
        self.batches().closed = true;
        self.outbox.close();
        self.changed.notify_waiters();
    }

    /// Takes no more and waits until the other end has all that was accepted, or the session ends.
    pub(super) async fn drain(&self) {
        self.close_input();
        loop {
            let changed = self.changed.notified();
            let empty = self.batches().in_flight == 0;
            if (empty && *self.peer_finished.borrow()) || self.fault.borrow().is_some() {
                return;
            }
            changed.await;
        }
    }

    /// Ends the session; the first reason stays. Nothing more is sent.
    pub(super) fn end(&self, fault: Fault) {
        self.fault.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(fault);
            is_first
        });
        let mut batches = self.batches();
        batches.closed = true;
        batches.queue.clear();
        drop(batches);
        self.outbox.discard();
        self.changed.notify_waiters();
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> Fault {
        let mut fault = self.fault.subscribe();
        match fault.wait_for(Option::is_some).await.map(|fault| fault.clone()) {
            Ok(Some(fault)) => fault,
            // The sender lives in `self`, and the value was just seen.
            Ok(None) | Err(_) => Fault::protocol("the session is gone"),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.fault.borrow().is_some()
    }

    pub(super) fn add_connection(&self, connection: Connection) {
        self.connections().push(connection);
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.connections().first().map(Connection::rtt)
    }

    pub(super) fn add_to(&self, stats: &mut LinkStats) {
        let connections = self.connections();
        connections.iter().for_each(|connection| stats.add_connection(connection));
        stats.connections = connections.iter().filter(|connection| connection.close_reason().is_none()).count();
        drop(connections);
        stats.batches_sent += self.batches_sent.load(Ordering::Relaxed);
        stats.batch_bytes_sent += self.batch_bytes_sent.load(Ordering::Relaxed);
        stats.batch_bytes_in_flight = self.batches().in_flight;
    }
}

/// Waits until the other end has handed the batch on. Its word for that is the sequence: an empty end of the stream says only
/// that nobody reads it any more.
async fn receipt(mut recv: RecvStream, sequence: u64, connection: &Connection) -> Result<(), Fault> {
    /// A target that resets a batch's stream is about to close the connection, with the reason.
    const REASON_WAIT: Duration = Duration::from_secs(5);
    let mut word = [0; RECEIPT_LEN];
    if let Err(error) = recv.read_exact(&mut word).await {
        return Err(match tokio::time::timeout(REASON_WAIT, connection.closed()).await {
            Ok(closed) => closed.into(),
            Err(_elapsed) => error.into(),
        });
    }
    if word != sequence.to_le_bytes() {
        return Err(Fault::protocol("a receipt is for another batch"));
    }
    Ok(())
}
