//! A relay for UDP datagrams that can be cut, and be as bad as a wide area network: the link between two sites on one machine.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farshore_uring::sim::SimRng;

/// How often the threads look whether they shall stop.
const LOOK: Duration = Duration::from_millis(50);
/// Longest datagram that passes.
const DATAGRAM_MAX: usize = 65_536;

/// Datagrams on their way in one direction, as long as a router's queue; more are lost.
const WAITING_MAX: usize = 16_384;

/// What happens to datagrams on their way, in either direction. The default is a fine day.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Weather {
    /// How much later each one comes.
    pub delay: Duration,
    /// Up to how much later than that, each by itself: so they overtake each other.
    pub jitter: Duration,
    /// How many of a thousand are lost.
    pub lost: u64,
    /// How many of a thousand come twice.
    pub doubled: u64,
}

impl Weather {
    /// Nothing happens to datagrams.
    fn is_fine(&self) -> bool {
        *self == Self::default()
    }
}

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
    weather: Mutex<Weather>,
    /// Raised when clients get other addresses.
    binding: AtomicU64,
}

/// Datagrams on their way in one direction, with what says where to. Performs no I/O and reads no clock.
struct Way<T> {
    random: SimRng,
    /// By when they are due, and in which order they came.
    waiting: BTreeMap<(Instant, u64), T>,
    count: u64,
    /// The socket listens for less than [`LOOK`], because something is on its way.
    is_short: bool,
}

impl<T: Clone> Way<T> {
    fn new(seed: u64) -> Self {
        Self { random: SimRng::new(seed), waiting: BTreeMap::new(), count: 0, is_short: false }
    }

    fn handle_datagram(&mut self, now: Instant, weather: Weather, datagram: &T) {
        if self.random.chance(weather.lost, 1000) {
            return;
        }
        let times = 1 + u64::from(self.random.chance(weather.doubled, 1000));
        for _ in 0..times {
            let share = u32::try_from(self.random.below(1024)).unwrap_or_default();
            if self.waiting.len() < WAITING_MAX {
                self.count += 1;
                let due = now + weather.delay + weather.jitter * share / 1024;
                self.waiting.insert((due, self.count), datagram.clone());
            }
        }
    }

    /// The next one that is due, if there is any.
    #[must_use]
    fn poll_due(&mut self, now: Instant) -> Option<T> {
        let first = self.waiting.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(first.remove())
    }

    /// How long to listen before looking for what is due, at most [`LOOK`].
    fn patience(&self, now: Instant) -> Duration {
        let due = self.waiting.first_key_value().map_or(LOOK, |((due, _), _)| due.saturating_duration_since(now));
        // A socket takes no timeout of zero.
        due.clamp(Duration::from_millis(1), LOOK)
    }
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
            weather: Mutex::default(),
            binding: AtomicU64::new(0),
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

    /// From now on this happens to datagrams.
    pub fn set_weather(&self, weather: Weather) {
        *self.shared.weather.lock().unwrap_or_else(PoisonError::into_inner) = weather;
    }

    /// Gives each client another address, as a NAT does that has forgotten it: the server sees the next datagram come from elsewhere,
    /// and what it sends to the old address is lost.
    pub fn rebind(&self) {
        self.shared.binding.fetch_add(1, Ordering::SeqCst);
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

    fn weather(&self) -> Weather {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One socket to the server for each client address, so that answers find their way.
    fn forward_clients(self: &Arc<Self>, front: &Arc<UdpSocket>) {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let mut buffer = vec![0; DATAGRAM_MAX];
        let mut way = Way::new(1);
        let mut binding = 0;
        while !self.stopped() {
            let Some((len, client)) =
                listen(&mut way, |(back, bytes): (Arc<UdpSocket>, Vec<u8>)| _ = back.send(&bytes), front, &mut buffer)
            else {
                continue;
            };
            if !self.pass(len) {
                continue;
            }
            let now = self.binding.load(Ordering::SeqCst);
            if now != binding {
                binding = now;
                backs.clear();
                threads.retain(|thread| !thread.is_finished());
            }
            let back = match backs.entry(client) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let Ok(back) = self.connect() else { continue };
                    let back = Arc::new(back);
                    let (shared, front, answers) = (Arc::clone(self), Arc::clone(front), Arc::clone(&back));
                    threads.push(std::thread::spawn(move || shared.forward_answers(binding, &answers, &front, client)));
                    new.insert(back)
                }
            };
            match self.weather() {
                weather if weather.is_fine() && way.waiting.is_empty() => _ = back.send(&buffer[..len]),
                weather => way.handle_datagram(Instant::now(), weather, &(Arc::clone(back), buffer[..len].to_vec())),
            }
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

    fn forward_answers(&self, binding: u64, back: &UdpSocket, front: &UdpSocket, client: SocketAddr) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        let mut way = Way::new(2);
        while !self.stopped() && self.binding.load(Ordering::SeqCst) == binding {
            let heard = listen(&mut way, |bytes: Vec<u8>| _ = front.send_to(&bytes, client), back, &mut buffer);
            if let Some((len, _)) = heard.filter(|(len, _)| self.pass(*len)) {
                match self.weather() {
                    weather if weather.is_fine() && way.waiting.is_empty() => _ = front.send_to(&buffer[..len], client),
                    weather => way.handle_datagram(Instant::now(), weather, &buffer[..len].to_vec()),
                }
            }
        }
    }
}

/// Sends on what is due, and then waits a moment for one datagram more. One that cannot be sent is lost, as on any network.
fn listen<T: Clone>(
    way: &mut Way<T>,
    mut send: impl FnMut(T),
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> Option<(usize, SocketAddr)> {
    while let Some(datagram) = way.poll_due(Instant::now()) {
        send(datagram);
    }
    if !way.waiting.is_empty() || way.is_short {
        way.is_short = !way.waiting.is_empty();
        socket.set_read_timeout(Some(way.patience(Instant::now()))).ok()?;
    }
    socket.recv_from(buffer).ok()
}

/// Bursts of a fast link must not be lost here; best effort.
fn enlarge(socket: &UdpSocket) {
    let socket = socket2::SockRef::from(socket);
    let _ = socket.set_recv_buffer_size(8 << 20);
    let _ = socket.set_send_buffer_size(8 << 20);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of a way into which `count` numbers went, one a millisecond.
    fn check(weather: Weather, count: u64) -> Vec<u64> {
        let (mut way, begin) = (Way::new(7), Instant::now());
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let mut out = Vec::new();
        for number in 0..count {
            way.handle_datagram(at(number), weather, &number);
            out.extend(std::iter::from_fn(|| way.poll_due(at(number))));
        }
        let end = at(count) + weather.delay + weather.jitter;
        out.extend(std::iter::from_fn(|| way.poll_due(end)));
        out
    }

    #[test]
    fn fine_weather_changes_nothing() {
        assert_eq!(check(Weather::default(), 500), (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn a_delay_keeps_the_order_and_jitter_does_not() {
        let delay = Duration::from_millis(20);
        assert_eq!(check(Weather { delay, ..Weather::default() }, 500), (0..500).collect::<Vec<_>>());
        let mut shaken = check(Weather { jitter: delay, ..Weather::default() }, 500);
        assert!(!shaken.is_sorted(), "none was overtaken");
        shaken.sort_unstable();
        assert_eq!(shaken, (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn some_are_lost_and_some_come_twice() {
        let lost = check(Weather { lost: 100, ..Weather::default() }, 1000).len();
        assert!((800..980).contains(&lost), "{lost} of 1000 came");
        let doubled = check(Weather { doubled: 100, ..Weather::default() }, 1000).len();
        assert!((1020..1200).contains(&doubled), "{doubled} of 1000 came");
    }

    #[test]
    fn what_waits_is_bounded() {
        let weather = Weather { delay: Duration::from_secs(3600), ..Weather::default() };
        assert_eq!(check(weather, WAITING_MAX as u64 + 100).len(), WAITING_MAX);
    }
}
