//! A server: its configuration, its threads, and the handle to it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_uring::{BlockDevice, Io, Reactor, Waker};

use crate::conn::Bounds;
use crate::error::{Error, ErrorKind};
use crate::extents::{self, Jobs};
use crate::listen::{Address, Listen, Listener, SocketFile};
use crate::proto::Export;
use crate::stats::{ConnectionInfo, Peer, Registry, Stats};
use crate::worker::{Mailbox, Shared, Worker};

/// Entries of a thread's submission queue: the requests of several busy connections between two turns.
const REACTOR_DEPTH: u32 = 256;

/// What to serve, where, and within which bounds.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name of the export, at most 4096 bytes. The empty name, which clients use for "the default", means it too.
    pub name: String,
    /// Description of the export for people, at most 4096 bytes.
    pub description: String,
    /// Where clients connect.
    pub listen: Listen,
    /// Serving threads. Default 1, range 1 to 64. More help only with several busy connections: one connection stays on
    /// one thread.
    pub threads: usize,
    /// Most connections at once. Default 64, range 1 to 4096; more are closed at once. Each costs about 90 KiB, and up to
    /// `connection_bytes_max` while its requests are in flight.
    pub connections_max: usize,
    /// Most requests in flight of one connection; more wait in its socket. Default 128, range 1 to 4096.
    pub requests_max: u16,
    /// Most bytes of data of the requests in flight of one connection; a single request may pass it alone. Default
    /// 32 MiB, range 1 MiB to 1 GiB.
    pub connection_bytes_max: u64,
    /// Longest handshake; whoever takes longer is disconnected, so that silent clients do not use up `connections_max`.
    /// Default 10 s.
    pub handshake_max: Duration,
    /// How long a stop waits for clients to take their replies. Default 2 s. Requests in the device are always waited for.
    pub stop_grace: Duration,
}

impl ServerConfig {
    /// Defaults for an export called `name`.
    #[must_use]
    pub fn new(name: impl Into<String>, listen: Listen) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            listen,
            threads: 1,
            connections_max: 64,
            requests_max: 128,
            connection_bytes_max: 32 << 20,
            handshake_max: Duration::from_secs(10),
            stop_grace: Duration::from_secs(2),
        }
    }

    fn check(&self) -> Result<(), Error> {
        let checks = [
            ((1..=64).contains(&self.threads), "threads: 1 to 64"),
            ((1..=4096).contains(&self.connections_max), "connections_max: 1 to 4096"),
            ((1..=4096).contains(&self.requests_max), "requests_max: 1 to 4096"),
            ((1 << 20..=1 << 30).contains(&self.connection_bytes_max), "connection_bytes_max: 1 MiB to 1 GiB"),
        ];
        match checks.iter().find(|(good, _)| !good) {
            Some((_, range)) => Err(Error::new(ErrorKind::Invalid, format!("NBD server out of range; {range}"))),
            None => Ok(()),
        }
    }
}

/// Starts servers.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Serves `device` until [`ServerHandle::stop`]. When this returns, clients can connect.
    ///
    /// # Errors
    /// `Invalid`: the configuration or the device's geometry cannot be served; `InUse`: another server answers at the
    /// address; `System`: what the operating system said.
    pub fn start<D: BlockDevice>(config: ServerConfig, device: Arc<D>) -> Result<ServerHandle, Error> {
        config.check()?;
        let export = Arc::new(Export::new(&config.name, &config.description, device.geometry())?);
        let Listener { address, mut socket, file } = Listener::open(&config.listen)?;
        let jobs = Arc::new(Jobs::default());
        let starting: Vec<Starting> = (0..config.threads)
            .map(|thread| start_thread(thread, Arc::clone(&device), Arc::clone(&jobs), socket.take()))
            .collect::<Result<_, _>>()?;
        let mut mailboxes = Vec::with_capacity(starting.len());
        for thread in &starting {
            // A thread that ended early has said why, or panicked.
            let ready = thread.ready.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended")));
            mailboxes.push(Mailbox::new(ready.map_err(|error| Error::system("start an NBD thread", error))?));
        }
        let shared = Arc::new(Shared {
            export,
            address,
            bounds: Bounds { requests: config.requests_max, bytes: config.connection_bytes_max },
            connections_max: config.connections_max,
            handshake_max: config.handshake_max,
            stop_grace: config.stop_grace,
            registry: Registry::default(),
            stopping: AtomicBool::new(false),
            mailboxes,
            next_thread: AtomicUsize::new(0),
        });
        let mut threads = Vec::with_capacity(starting.len());
        for thread in starting {
            // It waits for exactly this; if it is gone, the join reports it.
            let _gone = thread.go.send(Arc::clone(&shared));
            threads.push(thread.handle);
        }
        let extents = spawn("nbd-extents".to_owned(), {
            let (jobs, shared) = (Arc::clone(&jobs), Arc::clone(&shared));
            move || {
                extents::serve(&jobs, &*device, &shared);
                Ok(())
            }
        });
        let handle = ServerHandle { shared, jobs, threads: Mutex::new(threads), file: Mutex::new(file) };
        // On failure the handle's drop stops the rest.
        let extents = extents?;
        handle.lock_threads().push(extents);
        Ok(handle)
    }
}

/// A thread between its spawn and its first turn.
struct Starting {
    handle: JoinHandle<io::Result<()>>,
    ready: Receiver<io::Result<Waker>>,
    /// Dropped without a message: the server does not come up, the thread ends.
    go: SyncSender<Arc<Shared>>,
}

fn spawn(
    name: String,
    f: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<JoinHandle<io::Result<()>>, Error> {
    let builder = std::thread::Builder::new().name(name);
    builder.spawn(f).map_err(|source| Error::system("start an NBD thread", source))
}

fn start_thread<D: BlockDevice>(
    thread: usize,
    device: Arc<D>,
    jobs: Arc<Jobs>,
    socket: Option<OwnedFd>,
) -> Result<Starting, Error> {
    let (tell, ready) = sync_channel(1);
    let (go, wait) = sync_channel::<Arc<Shared>>(1);
    let run = move || {
        // Reactor and queue belong to this thread, so they are made here.
        let opened = Reactor::new(REACTOR_DEPTH).and_then(|mut reactor| {
            let queue = device.open_queue(&mut reactor)?;
            Ok((reactor, queue))
        });
        let (reactor, queue) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _starter_gone = tell.send(Err(error));
                return Ok(());
            }
        };
        let _starter_gone = tell.send(Ok(reactor.waker()));
        let Ok(shared) = wait.recv() else { return Ok(()) };
        serve(Worker::<D>::new(thread, shared, jobs, reactor, queue), socket)
    };
    let handle = spawn(format!("nbd-{thread}"), run)?;
    Ok(Starting { handle, ready, go })
}

fn serve<D: BlockDevice>(mut worker: Worker<D>, socket: Option<OwnedFd>) -> io::Result<()> {
    let listening = socket.map_or(Ok(()), |socket| worker.listen(socket));
    let result = listening.and_then(|()| worker.run());
    worker.finish();
    if let Err(error) = &result {
        tracing::error!(%error, "an NBD thread ended; its connections are closed");
    }
    result
}

/// A running server. Dropping it stops it.
pub struct ServerHandle {
    shared: Arc<Shared>,
    jobs: Arc<Jobs>,
    threads: Mutex<Vec<JoinHandle<io::Result<()>>>>,
    file: Mutex<Option<SocketFile>>,
}

impl ServerHandle {
    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.shared.address
    }

    /// The NBD URI of the export; `None` if the server listens nowhere.
    #[must_use]
    pub fn uri(&self) -> Option<String> {
        self.shared.address.uri(self.shared.export.name())
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.registry.stats()
    }

    /// The open connections, oldest first.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.shared.registry.connections()
    }

    /// Serves a connected stream socket, of any family.
    ///
    /// # Errors
    /// `WouldBlock`: there are too many connections; `NotConnected`: the server is stopping.
    pub fn attach(&self, socket: OwnedFd) -> io::Result<()> {
        self.shared.deal(socket, Peer::Other)
    }

    /// A new connection from inside this process; the handshake is the caller's.
    ///
    /// # Errors
    /// As [`Self::attach`], and those of `socketpair`.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.attach(theirs.into())?;
        Ok(ours)
    }

    /// Stops: accepts nothing more, refuses new requests with `ESHUTDOWN`, waits for those in flight and for their replies
    /// to be taken (the latter at most `stop_grace`), closes all connections, removes the socket file. Blocks; a second
    /// call does nothing.
    ///
    /// # Errors
    /// `System`: a thread had failed before, and its connections with it.
    pub fn stop(&self) -> Result<(), Error> {
        // No longer found from now on, even while requests end.
        drop(self.file.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.shared.stop();
        let mut threads = self.lock_threads();
        let mut failure = None;
        let count = self.shared.mailboxes.len().min(threads.len());
        for thread in threads.drain(..count) {
            failure = join(thread).err().or(failure);
        }
        // Only now: connections wait for the answers of that thread.
        self.jobs.close();
        for thread in threads.drain(..) {
            failure = join(thread).err().or(failure);
        }
        failure.map_or(Ok(()), Err)
    }

    fn lock_threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<io::Result<()>>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn join(thread: JoinHandle<io::Result<()>>) -> Result<(), Error> {
    let name = thread.thread().name().unwrap_or("nbd").to_owned();
    match thread.join() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(Error::system(format!("thread {name} failed"), source)),
        Err(_) => Err(Error::new(ErrorKind::System, format!("thread {name} panicked"))),
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "NBD server stopped");
        }
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerHandle").field("address", &self.shared.address).finish_non_exhaustive()
    }
}
