//! The driver: real threads, sockets and files.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{self, Receiver};
use farshore_link::Bytes;
use farshore_link::identity::{Identity, Keys, Vault};
use farshore_link::quic::{BatchBytes, SourceEvent as LinkEvent, SourceLink, SourceLinkConfig, TargetLimits};
use farshore_proto::{BatchNo, Generation, Now, Role};
use farshore_uring::DirStorage;
use farshore_uring::sim::SimRng;

use super::assert_point;
use super::source::{Op, Source, name};
use crate::error::Kind;
use crate::server::{Clock, DataLock, Server, target_keys};
use crate::target::{Target, TargetConfig};

/// Longest wait for anything in this test: only a failure takes as long.
const PATIENCE: Duration = Duration::from_secs(30);

struct Wire {
    link: SourceLink,
    events: Receiver<LinkEvent>,
    session: u64,
    clock: Clock,
}

impl Wire {
    fn connect(address: std::net::SocketAddr, identity: &Arc<Identity>, source: &mut Source) -> Self {
        let (sender, events) = channel::bounded(1024);
        let link = SourceLink::start(SourceLinkConfig::new(address.to_string()), Arc::clone(identity), move |event| {
            let _gone = sender.send(event);
        });
        let mut wire = Self { link: link.expect("starts"), events, session: 0, clock: Clock::begin() };
        source.welcome = None;
        wire.until(source, |source| source.welcome.is_some());
        wire
    }

    fn until(&mut self, source: &mut Source, done: impl Fn(&Source) -> bool) {
        while !done(source) {
            match self.events.recv_timeout(PATIENCE).expect("an event in time") {
                LinkEvent::Up { session, .. } => {
                    self.session = session;
                    let nonce = [u8::try_from(session & 0xff).expect("a byte"); 32];
                    let volumes = source.volumes.clone();
                    source
                        .session
                        .handle_up(Now(1), nonce, Generation(0), source.incarnation, volumes)
                        .expect("few volumes");
                }
                LinkEvent::Control { bytes, .. } => {
                    source.session.handle_control(self.clock.now(), &bytes).expect("authentic");
                    source.take_events();
                }
                LinkEvent::BatchSent { .. } => {}
                LinkEvent::Down { reason, .. } => panic!("{reason}"),
            }
            while let Some(message) = source.session.poll_control() {
                self.link.send_control(self.session, message).expect("a session");
            }
        }
    }

    fn send(&self, number: BatchNo, bytes: &[u8]) {
        let batch: BatchBytes = BatchBytes::from(vec![Bytes::copy_from_slice(bytes)]);
        assert!(self.link.send_batch(self.session, number.0, batch).is_ok());
    }
}

/// Goal: the whole way over real sockets, threads and files: batches are acknowledged, survive a restart, and read back.
#[test]
fn batches_come_over_the_link_and_survive_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let clock = Clock::begin();
    let vault = Vault::in_memory(name("test"), clock.wall()).expect("a vault");
    let issue = |role, who: &str| {
        let bundle = vault.issue_at(role, name(who), 30, clock.wall()).expect("a bundle");
        Arc::new(Identity::from_bundle(&bundle, clock.wall()).expect("a good bundle"))
    };
    let (of_target, of_agent) = (issue(Role::Target, "site-b"), issue(Role::Agent, "host-a"));
    assert_eq!(target_keys(&of_agent).expect_err("an agent's").kind(), Kind::Refused);
    let lock = DataLock::acquire(folder.path()).expect("free");
    assert_eq!(DataLock::acquire(folder.path()).expect_err("taken").kind(), Kind::Refused);
    let start = || {
        let storage = DirStorage::open(folder.path()).expect("a folder");
        let keys = target_keys(&of_target).expect("a target's");
        let target = Target::open(storage, keys, TargetConfig::default()).expect("opens");
        let address = "127.0.0.1:0".parse().expect("an address");
        Server::start(Arc::new(target), address, Arc::clone(&of_target), TargetLimits::default()).expect("starts")
    };
    let Keys::Host(keys) = &of_agent.keys else { panic!("an agent has host keys") };
    let mut source = Source::with_key(vault.id(), keys[0].clone(), "db", "host-a", 2);
    let mut rng = SimRng::new(31);

    let mut server = start();
    let mut wire = Wire::connect(server.local_addr(), &of_agent, &mut source);
    let ops = source.random_ops(&mut rng, 20);
    source.batch(&ops, None);
    let joins: Vec<Op> = (0..2).map(|volume| Op::Mark(farshore_proto::record::Kind::VolumeJoined, volume)).collect();
    source.batch(&joins, None);
    for _ in 0..30 {
        let ops = source.random_ops(&mut rng, 20);
        source.batch(&ops, None);
    }
    let sent = source.sent.clone();
    sent.iter().for_each(|sent| wire.send(sent.number, &sent.bytes));
    wire.until(&mut source, |source| source.acked == BatchNo(32));
    let status = server.target().status(clock.wall());
    assert_eq!((status.len(), status[0].lane.connected, status[0].points), (1, true, 31));
    assert!(status[0].commits <= 32 && status[0].volumes.iter().all(|volume| volume.joined));
    wire.link.stop();
    server.stop();
    drop(server);

    let mut server = start();
    let mut wire = Wire::connect(server.local_addr(), &of_agent, &mut source);
    assert_eq!(source.welcome.as_ref().and_then(|welcome| welcome.tail).map(|tail| tail.number), Some(BatchNo(32)));
    let ops = source.random_ops(&mut rng, 20);
    let last = source.batch(&ops, None);
    wire.send(last.number, &last.bytes);
    wire.until(&mut source, |source| source.acked == BatchNo(33));
    let stream = server.target().stream(&name("db"), None).expect("kept");
    [3, 20, 32].iter().for_each(|at| assert_point(&stream, &source.sent[*at]));
    assert_eq!(server.target().alarm_list(), []);
    wire.link.stop();
    server.stop();
    drop(lock);
}

#[test]
fn the_clock_only_goes_forward() {
    let clock = Clock::begin();
    let last = AtomicU64::new(0);
    for _ in 0..1000 {
        let wall = clock.wall().0;
        assert!(wall >= last.swap(wall, Ordering::Relaxed));
    }
}
