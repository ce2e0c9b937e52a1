//! The running streamer over a real ring and a real link, to the naive target.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farshore_link::identity::{Identity, Vault};
use farshore_link::quic::{SourceLinkConfig, TargetEvent, TargetLimits, TargetLink};
use farshore_proto::record::Kind;
use farshore_proto::session::SourceConfig;
use farshore_proto::{Generation, Incarnation, Now, Role, WallTime};
use farshore_ring::{Consumer, Desc, Memory, Producer, Ring, RingConfig, RingIdentity};
use farshore_streamer::{Capture, StreamEvent, StreamWaker, StreamerConfig, StreamerHandle, StreamerStatus};

use crate::common::{Image, Rng, Said, VAULT, host_key, name};
use crate::target::{Journal, Target};

const DRAIN: Duration = Duration::from_secs(60);
const NOW: WallTime = WallTime(1_790_000_000_000_000_000);

fn identity(vault: &Vault, role: Role, of: &str) -> Identity {
    let bundle = vault.issue_at(role, name(of), 3650, NOW).expect("issued");
    Identity::from_bundle(&bundle, NOW).expect("of our vault")
}

fn ring() -> Arc<Ring> {
    let identity =
        RingIdentity { vault: VAULT.0, group: [1; 16], host: [2; 16], boot: [3; 16], incarnation: 1, generation: 1 };
    let config = RingConfig { slab_bytes: 32 << 20, ..RingConfig::new(identity) };
    Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("memory"))
}

/// Cuts whenever a batch could go; notes what it is told.
struct Cuts {
    ring: Arc<Ring>,
    producer: Producer,
    behind: u64,
    seen: Arc<Mutex<Vec<StreamEvent>>>,
}

impl Capture for Cuts {
    fn cut(&mut self, _: Now, wall: &dyn Fn() -> WallTime, slot_free: bool) {
        if slot_free && self.ring.head() != self.behind {
            let desc = Desc { kind: Kind::Cut as u8, time: wall().0, ..Desc::default() };
            let reservation = self.producer.reserve_marker(0).expect("a marker fits");
            self.behind = self.producer.publish(reservation, &desc).expect("open") + 1;
        }
    }
    fn cut_deadline(&self, _: bool) -> Option<Now> {
        None
    }
    fn reopen(&mut self, _: &mut Consumer, _: WallTime) {
        panic!("the test does not fill the ring");
    }
    fn start_over(&mut self, _: &mut Consumer, _: Incarnation, _: WallTime, reason: &str) -> bool {
        panic!("nothing diverged: {reason}");
    }
    fn compare_everything(&mut self, reason: &str) -> bool {
        panic!("nothing is unknown: {reason}");
    }
    fn log_begins(&mut self, _: u64) -> bool {
        panic!("there is no disk log");
    }
    fn log_ends(&mut self) -> bool {
        panic!("there is no disk log");
    }
    fn event(&mut self, event: StreamEvent) {
        self.seen.lock().expect("not poisoned").push(event);
    }
    fn unreachable(&mut self, _: &str, _: bool) {}
}

/// The target behind its link; its thread ends with the channel.
struct Site {
    link: Arc<TargetLink>,
    journal: Arc<Mutex<Journal>>,
    thread: Option<std::thread::JoinHandle<()>>,
    stop: crossbeam::channel::Sender<TargetEvent>,
}

impl Site {
    fn start(vault: &Vault) -> Self {
        let (sender, receiver) = crossbeam::channel::bounded(1024);
        let sink = sender.clone();
        let link = TargetLink::listen(
            "127.0.0.1:0".parse().expect("an address"),
            Arc::new(identity(vault, Role::Target, "site")),
            TargetLimits::default(),
            move |event: TargetEvent| _ = sink.send(event),
        );
        let link = Arc::new(link.expect("listens"));
        let journal = Arc::new(Mutex::new(Journal::new()));
        let (of_thread, journal_of_thread) = (Arc::clone(&link), Arc::clone(&journal));
        let thread = std::thread::spawn(move || serve(&receiver, &of_thread, &journal_of_thread));
        Self { link, journal, thread: Some(thread), stop: sender }
    }

    fn stop(&mut self) -> Journal {
        self.link.stop();
        self.stop.send(TargetEvent::Down { session: u64::MAX, reason: String::new() }).expect("the thread lives");
        self.thread.take().expect("once").join().expect("no check failed");
        self.journal.lock().expect("not poisoned").clone()
    }
}

fn serve(events: &crossbeam::channel::Receiver<TargetEvent>, link: &TargetLink, journal: &Mutex<Journal>) {
    let mut target: Option<(u64, Target)> = None;
    for event in events {
        let mut journal = journal.lock().expect("not poisoned");
        match event {
            TargetEvent::Up { session, .. } => target = Some((session, Target::new())),
            TargetEvent::Down { session: u64::MAX, .. } => return,
            TargetEvent::Down { session, .. } => _ = target.take_if(|(own, _)| *own == session),
            TargetEvent::Refused { reason, .. } => panic!("refused: {reason}"),
            TargetEvent::Control { session, bytes } => {
                if let Some((_, target)) = target.as_mut().filter(|(own, _)| *own == session) {
                    target.control(&journal, &bytes);
                }
            }
            TargetEvent::Batch { session, bytes, .. } => {
                if let Some((_, target)) = target.as_mut().filter(|(own, _)| *own == session) {
                    target.batch(&mut journal, bytes.to_vec());
                    assert_eq!(target.refused, None);
                    target.acknowledge(&journal);
                    target.lease(&journal, 500, 4);
                }
            }
        }
        if let Some((session, target)) = &mut target {
            let outbox: VecDeque<Vec<u8>> = std::mem::take(&mut target.outbox);
            // A session that is just ending takes no more, which is what a lost acknowledgement is.
            outbox.into_iter().for_each(|bytes| _ = link.send_control(*session, bytes));
        }
    }
}

struct Source {
    vault: Vault,
    site: Site,
    ring: Arc<Ring>,
    producer: Producer,
    image: Image,
    rng: Rng,
    seen: Arc<Mutex<Vec<StreamEvent>>>,
}

impl Source {
    fn new() -> Self {
        let vault = Vault::in_memory(name("vault"), NOW).expect("keys can be made");
        let (site, ring) = (Site::start(&vault), ring());
        let producer = ring.producer();
        Self { vault, site, producer, ring, image: Image::default(), rng: Rng(11), seen: Arc::default() }
    }

    fn stream(&self) -> StreamerHandle {
        let session = SourceConfig { vault: VAULT, group: name("group"), host: name("host"), host_key: host_key() };
        let mut config = StreamerConfig::new(session, Generation(1), Incarnation(1), Vec::new());
        config.workers = 2;
        let link = SourceLinkConfig::new(self.site.link.local_addr().to_string());
        let identity = Arc::new(identity(&self.vault, Role::Agent, "host"));
        let (ring, seen) = (Arc::clone(&self.ring), Arc::clone(&self.seen));
        let capture = move |_: StreamWaker| -> Box<dyn Capture> {
            Box::new(Cuts { producer: ring.producer(), behind: ring.head(), ring, seen })
        };
        StreamerHandle::start(config, link, identity, &self.ring, None, capture).expect("starts")
    }

    fn publish(&mut self, said: &Said, waker: &StreamWaker) {
        self.image.apply(said);
        let bytes = said.payload.as_deref().unwrap_or_default();
        let desc = Desc {
            kind: said.kind as u8,
            volume: said.volume.0,
            len: u32::try_from(bytes.len()).expect("small"),
            offset: said.offset,
            length: said.length,
            ..Desc::default()
        };
        let mut reservation =
            if bytes.is_empty() { self.producer.reserve_marker(0) } else { self.producer.reserve(bytes.len()) }
                .expect("the test stays below the ring's size");
        reservation.copy_from_slice(bytes);
        self.producer.publish(reservation, &desc).expect("open");
        if self.producer.consumer_sleeping() {
            waker.wake();
        }
    }

    fn write(&mut self, count: usize, waker: &StreamWaker) {
        for _ in 0..count {
            let sector = self.rng.below(2000) * 8;
            let content = self.rng.below(300);
            let said = Said::data(Kind::Write, 0, sector, Rng(content).bytes(4096));
            self.publish(&said, waker);
        }
    }

    fn check(&mut self, status: &StreamerStatus) {
        assert_eq!((status.stream.lag_bytes, self.ring.used_descriptors()), (0, 0), "{status:?}");
        let journal = self.site.stop();
        assert!(journal.image.trimmed() == self.image.trimmed(), "images differ");
        assert_eq!(journal.tail().map(|tail| (tail.number, tail.chain)), Some(status.stream.durable));
        let durable: Vec<_> = self.seen.lock().expect("not poisoned").iter().filter_map(end_of).collect();
        assert!(durable.is_sorted_by(|a, b| a < b) && durable.last() == Some(&self.ring.freed()));
    }
}

fn end_of(event: &StreamEvent) -> Option<u64> {
    if let StreamEvent::Durable(batch) = event { Some(batch.end.0) } else { None }
}

/// Goal: what is written while the stream runs is at the target when `stop` returns, points included.
#[test]
fn a_running_stream_ships_everything() {
    let mut source = Source::new();
    let handle = source.stream();
    source.publish(&Said::new(Kind::VolumeJoined), &handle.waker());
    source.write(2000, &handle.waker());
    let running = handle.status().expect("answers");
    assert_eq!(running.stream.ring.size_bytes, 32 << 20);
    source.write(1000, &handle.waker());
    let status = handle.stop(DRAIN);
    assert!(status.stream.rpo.is_some() && status.link.wire_bytes_sent > 0 && status.stream.dedup_ratio > 1.0);
    source.check(&status);
}

/// Goal: sessions that end under way, a streamer that is dropped with batches under way, and one that finds a ring with
/// content, lose nothing.
#[test]
fn broken_sessions_and_a_restart_lose_nothing() {
    let mut source = Source::new();
    for round in 0..4 {
        let handle = source.stream();
        if round == 0 {
            source.publish(&Said::new(Kind::VolumeJoined), &handle.waker());
        }
        for _ in 0..5 {
            source.write(200, &handle.waker());
            for session in source.site.link.sessions() {
                source.site.link.close(session.session, "closed by the test");
            }
        }
        drop(handle);
    }
    let handle = source.stream();
    source.write(100, &handle.waker());
    let status = handle.stop(DRAIN);
    source.check(&status);
}
