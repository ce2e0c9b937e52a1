//! Counters of connections and of a server: written by one thread each, read by any.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::proto::{Command, RequestHeader};

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    /// A process on this host, by `SO_PEERCRED`.
    Unix {
        /// Process id at the time it connected; 0 if unknown.
        pid: i32,
        /// User id at the time it connected.
        uid: u32,
    },
    /// A host.
    Tcp(SocketAddr),
    /// A socket that was handed in.
    Other,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix { pid, uid } => write!(f, "pid {pid} (uid {uid})"),
            Self::Tcp(address) => address.fmt(f),
            Self::Other => f.write_str("local"),
        }
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectionState {
    /// Options are being haggled.
    Handshake,
    /// Requests are served.
    Transmission,
    /// The client left or broke the protocol, or the server is stopping.
    Leaving,
}

/// Requests since the start, by kind, and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Totals {
    /// Reads answered.
    pub reads: u64,
    /// Writes answered.
    pub writes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Trims answered.
    pub trims: u64,
    /// Zeroing requests answered.
    pub zeroes: u64,
    /// Block-status requests answered.
    pub statuses: u64,
    /// Of all these: answered with an error, and refused requests.
    pub errors: u64,
    /// Bytes of successful reads.
    pub read_bytes: u64,
    /// Bytes of successful writes.
    pub written_bytes: u64,
    /// Breaches of the protocol, each of which ended a connection.
    pub violations: u64,
}

/// One open connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnectionInfo {
    /// Unique in this server; grows.
    pub id: u64,
    /// Who it is.
    pub peer: Peer,
    /// The serving thread, from 0.
    pub thread: usize,
    /// Where it stands.
    pub state: ConnectionState,
    /// Requests between header and sent reply.
    pub in_flight: u64,
    /// What it did so far.
    pub totals: Totals,
}

/// What a server did so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Connections taken since the start.
    pub connections_accepted: u64,
    /// Connections turned away because there were too many.
    pub connections_refused: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Sum over all connections, closed ones included.
    pub totals: Totals,
}

/// The counters of one connection. Only its thread writes them, so plain loads and stores suffice.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) id: u64,
    peer: Peer,
    thread: usize,
    state: AtomicU8,
    in_flight: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    trims: AtomicU64,
    zeroes: AtomicU64,
    statuses: AtomicU64,
    errors: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    violations: AtomicU64,
}

const HANDSHAKE: u8 = 0;
const TRANSMISSION: u8 = 1;
const LEAVING: u8 = 2;

impl Counters {
    pub(crate) fn new(id: u64, peer: Peer, thread: usize) -> Self {
        Self {
            id,
            peer,
            thread,
            state: AtomicU8::new(HANDSHAKE),
            in_flight: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            trims: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
            statuses: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            violations: AtomicU64::new(0),
        }
    }

    pub(crate) fn set_transmitting(&self) {
        self.state.store(TRANSMISSION, Ordering::Relaxed);
    }

    pub(crate) fn set_leaving(&self) {
        self.state.store(LEAVING, Ordering::Relaxed);
    }

    pub(crate) fn set_in_flight(&self, requests: usize) {
        self.in_flight.store(u64::try_from(requests).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn add_violation(&self) {
        add(&self.violations, 1);
    }

    pub(crate) fn add_request(&self, header: &RequestHeader, command: Command, error: u32) {
        if error != 0 {
            add(&self.errors, 1);
        }
        let len = if error == 0 { u64::from(header.len) } else { 0 };
        match command {
            Command::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            Command::Write { .. } => {
                add(&self.writes, 1);
                add(&self.written_bytes, len);
            }
            Command::Flush => add(&self.flushes, 1),
            Command::Trim { .. } => add(&self.trims, 1),
            Command::WriteZeroes { .. } => add(&self.zeroes, 1),
            Command::BlockStatus { .. } => add(&self.statuses, 1),
            Command::Disconnect => {}
        }
    }

    /// A request that was refused before it became a command.
    pub(crate) fn add_refused(&self) {
        add(&self.errors, 1);
    }

    fn totals(&self) -> Totals {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            reads: load(&self.reads),
            writes: load(&self.writes),
            flushes: load(&self.flushes),
            trims: load(&self.trims),
            zeroes: load(&self.zeroes),
            statuses: load(&self.statuses),
            errors: load(&self.errors),
            read_bytes: load(&self.read_bytes),
            written_bytes: load(&self.written_bytes),
            violations: load(&self.violations),
        }
    }

    fn info(&self) -> ConnectionInfo {
        let state = match self.state.load(Ordering::Relaxed) {
            HANDSHAKE => ConnectionState::Handshake,
            TRANSMISSION => ConnectionState::Transmission,
            _ => ConnectionState::Leaving,
        };
        let in_flight = self.in_flight.load(Ordering::Relaxed);
        ConnectionInfo { id: self.id, peer: self.peer, thread: self.thread, state, in_flight, totals: self.totals() }
    }
}

/// One writer: no read-modify-write needed.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

impl std::ops::AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.trims += other.trims;
        self.zeroes += other.zeroes;
        self.statuses += other.statuses;
        self.errors += other.errors;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.violations += other.violations;
    }
}

/// All connections of a server.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    open: Vec<Arc<Counters>>,
    closed: Totals,
    accepted: u64,
    refused: u64,
}

impl Registry {
    /// Counts a new connection in, unless there are `max` already.
    pub(crate) fn open(&self, peer: Peer, thread: usize, max: usize) -> Option<Arc<Counters>> {
        let mut inner = self.lock();
        if inner.open.len() >= max {
            inner.refused += 1;
            return None;
        }
        inner.accepted += 1;
        let counters = Arc::new(Counters::new(inner.accepted, peer, thread));
        inner.open.push(Arc::clone(&counters));
        Some(counters)
    }

    pub(crate) fn close(&self, counters: &Counters) {
        let mut inner = self.lock();
        inner.open.retain(|open| open.id != counters.id);
        inner.closed += counters.totals();
    }

    pub(crate) fn stats(&self) -> Stats {
        let inner = self.lock();
        let mut totals = inner.closed;
        inner.open.iter().for_each(|open| totals += open.totals());
        Stats {
            connections_accepted: inner.accepted,
            connections_refused: inner.refused,
            connections_open: u64::try_from(inner.open.len()).unwrap_or(u64::MAX),
            totals,
        }
    }

    pub(crate) fn connections(&self) -> Vec<ConnectionInfo> {
        self.lock().open.iter().map(|open| open.info()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Numbers only: after a panic elsewhere they are still numbers.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
