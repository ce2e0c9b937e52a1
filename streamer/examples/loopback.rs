//! Throughput of the running streamer over loopback, to a target that checks and acknowledges but stores nothing.
//!
//! Run: `cargo run --release -p farshore-streamer --example loopback -- [seconds] [record bytes] [compressible per cent] [MB/s written]`.
#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farshore_link::identity::{Identity, Vault};
use farshore_link::quic::{SourceLinkConfig, TargetEvent, TargetLimits, TargetLink};
use farshore_proto::batch;
use farshore_proto::message::Welcome;
use farshore_proto::record::Kind;
use farshore_proto::session::{ChainCheck, SourceConfig, TargetEvent as Said, TargetSession, Verdict};
use farshore_proto::{Generation, Incarnation, Name, Now, Role, WallTime};
use farshore_ring::{Consumer, Desc, Memory, Producer, Ring, RingConfig, RingIdentity};
use farshore_streamer::{Capture, StreamEvent, StreamWaker, StreamerConfig, StreamerHandle};

fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

/// The cutter of the filter, without bookmarks.
struct Cuts {
    ring: Arc<Ring>,
    producer: Producer,
    behind: u64,
    last: Now,
}

const CUT_MIN: Duration = Duration::from_millis(20);

impl Capture for Cuts {
    fn cut(&mut self, now: Now, wall: &dyn Fn() -> WallTime, slot_free: bool) {
        if !slot_free || self.ring.head() == self.behind || now.since(self.last) < CUT_MIN {
            return;
        }
        let desc = Desc { kind: Kind::Cut as u8, time: wall().0, ..Desc::default() };
        if let Ok(reservation) = self.producer.reserve_marker(0) {
            self.behind = self.producer.publish(reservation, &desc).map_or(self.behind, |position| position + 1);
            self.last = now;
        }
    }
    fn cut_deadline(&self, slot_free: bool) -> Option<Now> {
        (slot_free && self.ring.head() != self.behind).then(|| self.last.plus(CUT_MIN))
    }
    fn reopen(&mut self, _: &mut Consumer, _: WallTime) {}
    fn start_over(&mut self, _: &mut Consumer, _: Incarnation, _: WallTime, _: &str) -> bool {
        false
    }
    fn compare_everything(&mut self, _: &str) -> bool {
        false
    }
    fn log_begins(&mut self, _: u64) -> bool {
        false
    }
    fn log_ends(&mut self) -> bool {
        false
    }
    fn event(&mut self, _: StreamEvent) {}
    fn unreachable(&mut self, reason: &str, _: bool) {
        println!("link: {reason}");
    }
}

fn serve(
    events: &crossbeam::channel::Receiver<TargetEvent>,
    link: &Mutex<Option<Arc<TargetLink>>>,
    config: &SourceConfig,
) {
    let mut session = TargetSession::new(config.vault);
    let mut check = ChainCheck::new(Generation(1), None);
    let mut ahead = std::collections::BTreeMap::new();
    for event in events {
        let id = match event {
            TargetEvent::Control { session: id, bytes } => {
                let said = session
                    .handle_control(&bytes, |_, _| Some(config.host_key.answer_key()))
                    .expect("an honest source");
                if let Some(Said::Hello(_)) = said {
                    session.welcome(Welcome {
                        generation: Generation(1),
                        tail: None,
                        empty: Vec::new(),
                        joined: Vec::new(),
                        event_open: false,
                        log: None,
                    });
                }
                id
            }
            TargetEvent::Batch { session: id, bytes, .. } => {
                let frames = batch::parse(&bytes).expect("a whole batch");
                ahead.insert(frames.header.place().number, frames.header);
                while let Some(entry) = ahead.first_entry() {
                    if check.judge(entry.get(), |_| None) != Verdict::Next {
                        break;
                    }
                    let header = entry.remove();
                    check.advance(&header);
                    let place = header.place();
                    session.durable(place.incarnation, place.number, header.chain(), WallTime(1));
                }
                id
            }
            TargetEvent::Down { .. } => return,
            TargetEvent::Up { .. } | TargetEvent::Refused { .. } => continue,
        };
        let link = link.lock().expect("not poisoned").clone().expect("set before it listens to anyone");
        while let Some(bytes) = session.poll_control() {
            link.send_control(id, bytes).expect("the session stands");
        }
    }
}

fn main() {
    let argument = |index: usize, default: u64| {
        std::env::args().nth(index).map_or(default, |text| text.parse().expect("a number"))
    };
    let (seconds, record) = (argument(1, 5), usize::try_from(argument(2, 4096)).expect("small"));
    let (compressible, rate) = (argument(3, 0), argument(4, 0));
    let vault = Vault::in_memory(name("vault"), wall()).expect("keys");
    let identity = |role, of| {
        let bundle = vault.issue_at(role, name(of), 30, wall()).expect("issued");
        Arc::new(Identity::from_bundle(&bundle, wall()).expect("ours"))
    };
    let agent = identity(Role::Agent, "host");
    let host_key = agent.host_key(agent.host_id(), agent.newest_epoch().expect("a key")).expect("a key");
    let session = SourceConfig { vault: vault.id(), group: name("group"), host: name("host"), host_key };
    let (sender, receiver) = crossbeam::channel::bounded(1024);
    let link = Arc::new(Mutex::new(None));
    let target = TargetLink::listen(
        "127.0.0.1:0".parse().expect("an address"),
        identity(Role::Target, "site"),
        TargetLimits::default(),
        move |event: TargetEvent| _ = sender.send(event),
    );
    let target = Arc::new(target.expect("listens"));
    *link.lock().expect("not poisoned") = Some(Arc::clone(&target));
    let (of_thread, config) = (Arc::clone(&link), session.clone());
    std::thread::spawn(move || serve(&receiver, &of_thread, &config));

    let ids = RingIdentity {
        vault: vault.id().0,
        group: [1; 16],
        host: [2; 16],
        boot: [3; 16],
        incarnation: 1,
        generation: 1,
    };
    let ring = Ring::create_in_memory(&Memory::new(), &RingConfig::new(ids)).expect("memory");
    let ring = Arc::new(ring);
    let of_capture = Arc::clone(&ring);
    let handle = StreamerHandle::start(
        StreamerConfig::new(session, Generation(1), Incarnation(1), Vec::new()),
        SourceLinkConfig::new(target.local_addr().to_string()),
        agent,
        &ring,
        None,
        move |_: StreamWaker| -> Box<dyn Capture> {
            Box::new(Cuts {
                producer: of_capture.producer(),
                behind: of_capture.head(),
                ring: of_capture,
                last: Now(0),
            })
        },
    );
    let handle = handle.expect("starts");
    let wrote = write(&ring, &handle, Duration::from_secs(seconds), record, compressible, rate);
    let start = Instant::now();
    let status = handle.stop(Duration::from_secs(60));
    println!(
        "wrote {} MB, drained in {:.2} s more, lag {} bytes",
        wrote / 1_000_000,
        start.elapsed().as_secs_f64(),
        status.stream.lag_bytes
    );
    println!("{:?}\n{:?}", status.stream, status.link);
}

/// Writes records as fast as the ring takes them, or at `rate` MB/s; prints a line each second.
fn write(
    ring: &Arc<Ring>,
    handle: &StreamerHandle,
    time: Duration,
    record: usize,
    compressible: u64,
    rate: u64,
) -> u64 {
    let (producer, waker) = (ring.producer(), handle.waker());
    let (start, mut wrote, mut told, mut seed) = (Instant::now(), 0u64, 0, 1u64);
    let joined = Desc { kind: Kind::VolumeJoined as u8, ..Desc::default() };
    producer.publish(producer.reserve_marker(0).expect("an empty ring"), &joined).expect("open");
    let zeroes = record * usize::try_from(compressible).expect("per cent") / 100;
    while start.elapsed() < time {
        let second = start.elapsed().as_secs();
        if second > told {
            told = second;
            let status = handle.status().expect("answers").stream;
            let micros = status.rpo.unwrap_or_default().as_micros();
            println!(
                "{second:>3} s: written {:>6} MB, durable {:>6} MB, lag {:>4} MB, window {:>2}/{:>3} MB of {:>3}, level {:?}, rpo {micros} µs",
                wrote / 1_000_000,
                status.written_bytes / 1_000_000,
                status.lag_bytes / 1_000_000,
                status.window.0,
                status.window.1 / 1_000_000,
                status.window_limit / 1_000_000,
                status.level,
            );
        }
        if rate > 0 && wrote > rate * 1_000_000 * u64::try_from(start.elapsed().as_millis()).unwrap_or(0) / 1000 {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let Ok(mut reservation) = producer.reserve(record) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        for word in reservation[zeroes..].as_chunks_mut::<8>().0 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *word = (seed >> 7).to_le_bytes();
        }
        reservation[..zeroes].fill(b'x');
        let blocks = (1u64 << 30) / record as u64;
        let desc = Desc {
            kind: Kind::Write as u8,
            len: u32::try_from(record).expect("small"),
            offset: (seed >> 30) % blocks * record as u64,
            length: record as u64,
            ..Desc::default()
        };
        producer.publish(reservation, &desc).expect("open");
        if producer.consumer_sleeping() {
            waker.wake();
        }
        wrote += record as u64;
    }
    wrote
}
