//! The listening end.

mod driver;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use farshore_uring::BufPool;
use tokio::sync::watch;

use self::session::Session;
use super::settings::TargetLimits;
use super::wire::{Fault, code};
use super::{LinkSink, TargetEvent, recv, transport};
use crate::identity::{Identity, PeerName};
use crate::{Error, Result, tls};

/// Takes the sessions of many sources on one UDP port and reports what comes in (see [`TargetEvent`]).
///
/// The methods may be called from any thread and never wait, except [`TargetLink::stop`].
pub struct TargetLink {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    address: SocketAddr,
}

/// What the threads of a link share.
struct Shared {
    limits: TargetLimits,
    sink: Arc<dyn LinkSink<TargetEvent>>,
    pool: BufPool,
    registry: Mutex<Registry>,
    /// Held while one session takes the place of another, so that `Down` of the older precedes `Up` of the newer. Never taken
    /// by a method that a sink may call.
    admission: Mutex<()>,
    denied: Mutex<BTreeSet<PeerName>>,
    endpoints: Mutex<Vec<quinn::Endpoint>>,
    connections: AtomicUsize,
    /// Connections of each identity, also those that have not introduced themselves, so that one member cannot use up
    /// everybody's.
    by_peer: Mutex<BTreeMap<PeerName, usize>>,
    stop: watch::Sender<bool>,
}

/// A peer and which of its streams.
pub(super) type StreamName = (PeerName, [u8; 16]);

/// Sessions that stand. Invariant: each is found by its id and by its stream's name, and no two have the same name.
#[derive(Default)]
struct Registry {
    last_id: u64,
    by_id: BTreeMap<u64, Arc<Session>>,
    by_name: BTreeMap<StreamName, u64>,
}

/// One session, as [`TargetLink::sessions`] shows it.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// As in its `Up`.
    pub session: u64,
    /// Who it is.
    pub peer: PeerName,
    /// Where its first connection came from.
    pub address: SocketAddr,
    /// Bytes of its batches that are being received or held.
    pub batch_bytes_held: u64,
}

impl TargetLink {
    /// Binds `address` and starts the threads.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if the identity is neither target nor relay; [`Error::Setting`]; [`Error::Socket`];
    /// [`Error::Thread`].
    pub fn listen(
        address: SocketAddr,
        identity: Arc<Identity>,
        limits: TargetLimits,
        sink: impl LinkSink<TargetEvent>,
    ) -> Result<Self> {
        limits.check()?;
        check_role(&identity)?;
        let sockets = bind(address, &limits)?;
        let address = match sockets.first().map(UdpSocket::local_addr) {
            Some(Ok(address)) => address,
            Some(Err(source)) => return Err(Error::Socket { address, source }),
            None => return Err(Error::Setting { field: "threads", reason: "is 0".to_owned() }),
        };
        let batch_bytes_max = usize::try_from(limits.batch_bytes_max).unwrap_or(usize::MAX);
        let shared = Arc::new(Shared {
            sink: Arc::new(sink),
            pool: recv::pool(batch_bytes_max),
            registry: Mutex::default(),
            admission: Mutex::default(),
            denied: Mutex::default(),
            endpoints: Mutex::default(),
            connections: AtomicUsize::new(0),
            by_peer: Mutex::default(),
            stop: watch::Sender::new(false),
            limits,
        });
        let link = Self { shared, threads: Mutex::default(), address };
        for (index, socket) in sockets.into_iter().enumerate() {
            let thread = link.spawn(index, &identity, socket)?;
            link.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(link)
    }

    fn spawn(&self, index: usize, identity: &Identity, socket: UdpSocket) -> Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let config = self.shared.server_config(identity)?;
        let endpoint = {
            let _inside = runtime.enter();
            transport::server_endpoint(&self.shared.limits.transport, identity, config, socket)?
        };
        lock(&self.shared.endpoints).push(endpoint.clone());
        let shared = Arc::clone(&self.shared);
        let run = move || runtime.block_on(driver::run(shared, endpoint));
        std::thread::Builder::new().name(format!("link-target-{index}")).spawn(run).map_err(Error::Thread)
    }

    /// The bound address, with the port that the system chose if 0 was asked for.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Queues a message for a source, behind those queued before.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Full`], [`Error::Length`] (1 byte to 1 MiB).
    pub fn send_control(&self, session: u64, message: Vec<u8>) -> Result<()> {
        let found = lock(&self.shared.registry).by_id.get(&session).cloned();
        found.ok_or(Error::Closed { session })?.outbox.push(message)
    }

    /// Ends a session; the source reads `reason`. It will come back: to keep it out, use [`TargetLink::deny`]. Nothing
    /// happens if the session is over.
    pub fn close(&self, session: u64, reason: &str) {
        let found = lock(&self.shared.registry).by_id.get(&session).cloned();
        if let Some(session) = found {
            session.end(Fault::new(code::CLOSED, reason));
        }
    }

    /// Replaces the list of identities that are not let in, though their certificates are valid, and ends their sessions.
    pub fn deny(&self, list: impl IntoIterator<Item = PeerName>) {
        let list: BTreeSet<PeerName> = list.into_iter().collect();
        *lock(&self.shared.denied) = list.clone();
        let sessions: Vec<_> = lock(&self.shared.registry).by_id.values().cloned().collect();
        for session in sessions.iter().filter(|session| list.contains(&session.peer)) {
            session.end(denied(&session.peer));
        }
    }

    /// The sessions that stand.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let info = |session: &Arc<Session>| SessionInfo {
            session: session.id,
            peer: session.peer.clone(),
            address: session.address,
            batch_bytes_held: session.gate.held(),
        };
        lock(&self.shared.registry).by_id.values().filter(|session| session.life.is_up()).map(info).collect()
    }

    /// Uses a renewed identity for connections from now on; sessions that stand go on.
    ///
    /// # Errors
    /// [`Error::WrongRole`], [`Error::Crypto`].
    pub fn replace_identity(&self, identity: &Identity) -> Result<()> {
        check_role(identity)?;
        let config = self.shared.server_config(identity)?;
        for endpoint in lock(&self.shared.endpoints).iter() {
            endpoint.set_server_config(Some(config.clone()));
        }
        Ok(())
    }

    /// Takes no more, gets queued messages out (for at most `drain`), closes all sessions, and waits for the threads. The last
    /// event has been reported when it returns. Also done on drop. Must not be called by the sink.
    pub fn stop(&self) {
        self.shared.stop.send_replace(true);
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("a thread of the link died of a panic");
            }
        }
        let left: Vec<_> = lock(&self.shared.registry).by_id.values().cloned().collect();
        for session in left {
            self.shared.finish(&session, stopping());
        }
    }
}

impl Drop for TargetLink {
    fn drop(&mut self) {
        self.stop();
    }
}

impl std::fmt::Debug for TargetLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetLink").field("address", &self.address).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_role(identity: &Identity) -> Result<()> {
    let role = identity.role;
    if tls::UPSTREAM_ROLES.contains(&role) {
        Ok(())
    } else {
        Err(Error::WrongRole { role, what: "take the links of sources" })
    }
}

/// One socket per thread, all on one port.
fn bind(address: SocketAddr, limits: &TargetLimits) -> Result<Vec<UdpSocket>> {
    let mut sockets: Vec<UdpSocket> = Vec::new();
    for _ in 0..limits.threads {
        let address = match sockets.first() {
            Some(first) => first.local_addr().map_err(|source| Error::Socket { address, source })?,
            None => address,
        };
        sockets.push(transport::udp_socket(address, limits.transport.socket_buffer, limits.threads > 1)?);
    }
    Ok(sockets)
}

fn denied(peer: &PeerName) -> Fault {
    Fault::new(code::DENIED, format!("the target's deny list names {peer}"))
}

fn stopping() -> Fault {
    Fault::new(code::STOPPED, "the target has stopped")
}

impl Shared {
    fn server_config(&self, identity: &Identity) -> Result<quinn::ServerConfig> {
        // Batches, and the control stream.
        let streams = u32::from(self.limits.streams_per_connection) + 1;
        transport::server_config(&self.limits.transport, identity, streams, 0)
    }

    fn connections_max(&self) -> usize {
        self.limits.sessions.saturating_mul(usize::from(self.limits.connections_per_session))
    }

    /// Counts a connection, unless there are too many.
    fn connection_slot(self: &Arc<Self>) -> Option<Slot> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= self.connections_max() {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Slot(Arc::clone(self)))
    }

    /// Counts a connection of `peer`: as many as its sessions may have, twice, because an older session's are still closing when
    /// the newer one's come.
    fn peer_slot(self: &Arc<Self>, peer: &PeerName) -> std::result::Result<PeerSlot, Fault> {
        let max = usize::from(self.limits.connections_per_session) * 2 * usize::from(self.limits.channels_per_identity);
        let mut by_peer = lock(&self.by_peer);
        let count = by_peer.entry(peer.clone()).or_default();
        if *count >= max {
            return Err(Fault::new(code::BUSY, format!("{peer} has {max} connections already")));
        }
        *count += 1;
        Ok(PeerSlot { shared: Arc::clone(self), peer: peer.clone() })
    }

    fn check_denied(&self, peer: &PeerName) -> std::result::Result<(), Fault> {
        if lock(&self.denied).contains(peer) { Err(denied(peer)) } else { Ok(()) }
    }

    /// Begins a session; an older one of the same stream ends first.
    fn admit(
        &self,
        stream: StreamName,
        token: [u8; 16],
        address: SocketAddr,
    ) -> std::result::Result<Arc<Session>, Fault> {
        let _one_at_a_time = lock(&self.admission);
        let (older, session) = {
            let mut registry = lock(&self.registry);
            let older = registry.by_name.get(&stream).and_then(|id| registry.by_id.get(id)).cloned();
            if older.is_none() && registry.by_id.len() >= self.limits.sessions {
                return Err(Fault::new(
                    code::BUSY,
                    format!("the target has {} sessions already", self.limits.sessions),
                ));
            }
            registry.last_id += 1;
            let session = Session::new(registry.last_id, token, stream, address, &self.limits, Arc::clone(&self.sink));
            if let Some(older) = &older {
                registry.by_id.remove(&older.id);
            }
            registry.by_id.insert(session.id, Arc::clone(&session));
            registry.by_name.insert(session.stream(), session.id);
            (older, session)
        };
        if let Some(older) = older {
            let reason = format!("replaced by a newer session of {} from {address}", older.peer);
            self.finish(&older, Fault::new(code::REPLACED, reason));
        }
        let (id, peer) = (session.id, session.peer.clone());
        tracing::info!(session = id, %peer, %address, "session is up");
        session.life.up(TargetEvent::Up { session: id, peer, address });
        Ok(session)
    }

    /// Finds the session that a further connection belongs to.
    fn find(&self, stream: &StreamName, token: [u8; 16]) -> std::result::Result<Arc<Session>, Fault> {
        let registry = lock(&self.registry);
        let session = registry.by_name.get(stream).and_then(|id| registry.by_id.get(id));
        match session {
            Some(session) if session.token == token && session.life.is_up() => Ok(Arc::clone(session)),
            Some(_) | None => Err(Fault::new(code::ENDED, "the session to join is over")),
        }
    }

    /// Ends a session for good: reports it and forgets it. The first reason stays.
    fn finish(&self, session: &Arc<Session>, fault: Fault) {
        let reason = session.end(fault).reason;
        {
            let mut registry = lock(&self.registry);
            registry.by_id.remove(&session.id);
            let stream = session.stream();
            if registry.by_name.get(&stream) == Some(&session.id) {
                registry.by_name.remove(&stream);
            }
        }
        tracing::info!(session = session.id, reason, "session is down");
        session.life.down(TargetEvent::Down { session: session.id, reason });
    }
}

/// One connection among those allowed.
struct Slot(Arc<Shared>);

/// One connection among those allowed to one identity.
struct PeerSlot {
    shared: Arc<Shared>,
    peer: PeerName,
}

impl Drop for PeerSlot {
    fn drop(&mut self) {
        let mut by_peer = lock(&self.shared.by_peer);
        if let Some(count) = by_peer.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
