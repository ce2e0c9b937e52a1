//! A relay for UDP datagrams that can be cut: the link between two sites on one machine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the threads look whether they shall stop.
const LOOK: Duration = Duration::from_millis(50);
/// Longest datagram that passes.
const DATAGRAM_MAX: usize = 65_536;

/// Forwards datagrams between clients and one server until it is cut or dropped.
pub struct UdpRelay {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    server: SocketAddr,
    cut: AtomicBool,
    stop: AtomicBool,
    bytes: AtomicU64,
}

impl UdpRelay {
    /// Listens on a free loopback port and forwards to `server`.
    ///
    /// # Errors
    /// When no socket can be made.
    pub fn start(server: SocketAddr) -> io::Result<Self> {
        let front = UdpSocket::bind("127.0.0.1:0")?;
        let port = front.local_addr()?.port();
        enlarge(&front);
        front.set_read_timeout(Some(LOOK))?;
        let shared = Arc::new(Shared {
            server,
            cut: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.forward_clients(&Arc::new(front)))
        };
        Ok(Self { port, shared, thread: Some(thread) })
    }

    /// Port for the client.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Drops every datagram from now on.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
    }

    /// Forwards again.
    pub fn heal(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// Bytes of payload that passed, both ways.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // The thread only ends by the flag.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Whether a datagram of `len` bytes may pass.
    fn pass(&self, len: usize) -> bool {
        let open = !self.cut.load(Ordering::SeqCst);
        if open {
            self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        }
        open
    }

    /// One socket to the server for each client address, so that answers find their way.
    fn forward_clients(self: &Arc<Self>, front: &Arc<UdpSocket>) {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut threads = Vec::new();
        let mut buffer = vec![0; DATAGRAM_MAX];
        while !self.stopped() {
            let Ok((len, client)) = front.recv_from(&mut buffer) else { continue };
            if !self.pass(len) {
                continue;
            }
            let back = match backs.entry(client) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let Ok(back) = self.connect() else { continue };
                    let back = Arc::new(back);
                    let (shared, front, answers) = (Arc::clone(self), Arc::clone(front), Arc::clone(&back));
                    threads.push(std::thread::spawn(move || shared.forward_answers(&answers, &front, client)));
                    new.insert(back)
                }
            };
            // A datagram that cannot be sent is lost, as on any network.
            let _ = back.send(&buffer[..len]);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn connect(&self) -> io::Result<UdpSocket> {
        // Loopback reaches nobody else.
        let own: IpAddr = if self.server.ip().is_loopback() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0].into() };
        let back = UdpSocket::bind((own, 0))?;
        enlarge(&back);
        back.connect(self.server)?;
        back.set_read_timeout(Some(LOOK))?;
        Ok(back)
    }

    fn forward_answers(&self, back: &UdpSocket, front: &UdpSocket, client: SocketAddr) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        while !self.stopped() {
            let Ok(len) = back.recv(&mut buffer) else { continue };
            if self.pass(len) {
                let _ = front.send_to(&buffer[..len], client);
            }
        }
    }
}

/// Bursts of a fast link must not be lost here; best effort.
fn enlarge(socket: &UdpSocket) {
    let socket = socket2::SockRef::from(socket);
    let _ = socket.set_recv_buffer_size(8 << 20);
    let _ = socket.set_send_buffer_size(8 << 20);
}
