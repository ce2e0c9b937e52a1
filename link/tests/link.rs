//! Both ends of the link over loopback. Events are waited for with a generous bound; nothing else depends on time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use farshore_link::identity::{Identity, PeerName, Vault};
use farshore_link::quic::{
    BatchBytes, HEADROOM_BYTES, LinkSink, MESSAGE_BYTES_MAX, RecvBuf, SourceEvent, SourceLink, SourceLinkConfig,
    TargetEvent, TargetLimits, TargetLink,
};
use farshore_link::{Bytes, Error};
use farshore_proto::{Name, Role, WallTime};

/// Beyond this an event is not late but missing.
const BOUND: Duration = Duration::from_secs(60);
const DAY_NS: u64 = 86_400 * 1_000_000_000;

fn now() -> WallTime {
    // Certificates are checked against the system's clock, so the tests' vaults are made by it too; a file's time is that.
    let made = tempfile::tempfile().and_then(|file| file.metadata()).and_then(|data| data.modified());
    let since = made.expect("files have a time").duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    WallTime(u64::try_from(since.as_nanos()).expect("before 2554"))
}

fn name(text: &str) -> Name {
    Name::new(text).expect("the tests use good names")
}

fn vault() -> Vault {
    Vault::in_memory(name("test"), now()).expect("keys can be made")
}

fn identity(vault: &Vault, role: Role, of: &str) -> Arc<Identity> {
    let bundle = vault.issue_at(role, name(of), 30, now()).expect("it issues");
    Arc::new(Identity::from_bundle(&bundle, now()).expect("it loads"))
}

/// Events as they come, to be waited for.
struct Events<E>(Receiver<E>);

struct Tx<E>(SyncSender<E>);

impl<E: Send + 'static> LinkSink<E> for Tx<E> {
    fn event(&self, event: E) {
        match self.0.try_send(event) {
            // The test may have gone on and dropped its end.
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => panic!("more events than any test here causes"),
        }
    }
}

fn events<E: Send>() -> (Tx<E>, Events<E>) {
    let (tx, rx) = sync_channel(10_000);
    (Tx(tx), Events(rx))
}

impl<E: std::fmt::Debug> Events<E> {
    fn next(&self) -> E {
        self.0.recv_timeout(BOUND).expect("an event comes")
    }

    /// The first event that `pick` takes; others are passed over.
    fn wait<T>(&self, mut pick: impl FnMut(E) -> Option<T>) -> T {
        loop {
            if let Some(picked) = pick(self.next()) {
                return picked;
            }
        }
    }

    fn rest(&self) -> Vec<E> {
        self.0.try_iter().collect()
    }
}

fn source_up(event: SourceEvent) -> Option<u64> {
    if let SourceEvent::Up { session, .. } = event { Some(session) } else { None }
}

fn target_up(event: TargetEvent) -> Option<u64> {
    if let TargetEvent::Up { session, .. } = event { Some(session) } else { None }
}

fn source_down(event: SourceEvent) -> Option<(u64, String, bool)> {
    if let SourceEvent::Down { session, reason, fatal } = event { Some((session, reason, fatal)) } else { None }
}

fn target_down(event: TargetEvent) -> Option<(u64, String)> {
    if let TargetEvent::Down { session, reason } = event { Some((session, reason)) } else { None }
}

fn limits() -> TargetLimits {
    TargetLimits::default()
}

fn any() -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)
}

fn target(vault: &Vault, limits: TargetLimits) -> (TargetLink, Events<TargetEvent>) {
    let (sink, events) = events();
    let link = TargetLink::listen(any(), identity(vault, Role::Target, "site"), limits, sink).expect("it listens");
    (link, events)
}

fn config(address: SocketAddr) -> SourceLinkConfig {
    SourceLinkConfig::new(address.to_string())
}

fn agent(vault: &Vault, of: &str, config: SourceLinkConfig) -> (SourceLink, Events<SourceEvent>) {
    let (sink, events) = events();
    (SourceLink::start(config, identity(vault, Role::Agent, of), sink).expect("it starts"), events)
}

struct Pair {
    target: TargetLink,
    at_target: Events<TargetEvent>,
    source: SourceLink,
    at_source: Events<SourceEvent>,
    /// Names of the session at each end.
    source_session: u64,
    target_session: u64,
}

fn pair(limits: TargetLimits, change: impl FnOnce(&mut SourceLinkConfig)) -> Pair {
    let vault = vault();
    let (target, at_target) = target(&vault, limits);
    let mut config = config(target.local_addr());
    change(&mut config);
    let (source, at_source) = agent(&vault, "web", config);
    let source_session = at_source.wait(source_up);
    let target_session = at_target.wait(target_up);
    Pair { target, at_target, source, at_source, source_session, target_session }
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }
}

fn content(number: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(number);
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(64) {
        // 64 bytes from one word: enough to tell every piece of every batch from all others.
        let word = rng.next().to_le_bytes().repeat(8);
        piece.copy_from_slice(&word[..piece.len()]);
    }
    bytes
}

/// The same bytes in pieces of random lengths, empty ones too.
fn pieces(rng: &mut Rng, bytes: Vec<u8>) -> BatchBytes {
    let mut rest = Bytes::from(bytes);
    let mut pieces = vec![Bytes::new()];
    while !rest.is_empty() {
        let len = rest.len().min(1 + rng.below(400_000));
        pieces.push(rest.split_to(len));
    }
    pieces.into()
}

/// Sends, waiting where the queue is full.
fn send(pair: &Pair, number: u64, batch: BatchBytes, sent: &mut BTreeSet<u64>) {
    let mut batch = batch;
    loop {
        let Err(unsent) = pair.source.send_batch(pair.source_session, number, batch) else { return };
        assert!(matches!(unsent.error, Error::Full { .. }), "{}", unsent.error);
        batch = unsent.batch;
        sent.insert(pair.at_source.wait(batch_sent));
    }
}

fn batch_sent(event: SourceEvent) -> Option<u64> {
    match event {
        SourceEvent::BatchSent { number, .. } => Some(number),
        SourceEvent::Down { reason, .. } => panic!("the session ended: {reason}"),
        SourceEvent::Up { .. } | SourceEvent::Control { .. } => None,
    }
}

fn batch(event: TargetEvent) -> Option<(u64, RecvBuf)> {
    match event {
        TargetEvent::Batch { sequence, bytes, .. } => Some((sequence, bytes)),
        TargetEvent::Down { reason, .. } => panic!("the session ended: {reason}"),
        TargetEvent::Up { .. } | TargetEvent::Control { .. } | TargetEvent::Refused { .. } => None,
    }
}

#[test]
fn messages_go_both_ways_in_order() {
    let pair = pair(limits(), |_| ());
    let lengths = [1, 2, 100, 65_536, MESSAGE_BYTES_MAX - 1, MESSAGE_BYTES_MAX];
    for (number, len) in lengths.into_iter().enumerate() {
        let message = content(number as u64, len);
        pair.source.send_control(pair.source_session, message.clone()).expect("there is room");
        pair.target.send_control(pair.target_session, message).expect("there is room");
    }
    for (number, len) in lengths.into_iter().enumerate() {
        let wanted = content(number as u64, len);
        let TargetEvent::Control { session, bytes } = pair.at_target.next() else { panic!("a message comes") };
        assert!(session == pair.target_session && bytes == wanted, "message {number} at the target");
        let SourceEvent::Control { session, bytes } = pair.at_source.next() else { panic!("a message comes") };
        assert!(session == pair.source_session && bytes == wanted, "message {number} at the source");
    }
    for (len, limit) in [(0, 1), (MESSAGE_BYTES_MAX + 1, 1)] {
        let refused = pair.source.send_control(pair.source_session, vec![0; len]);
        assert!(matches!(refused, Err(Error::Length { .. })), "{len} {limit}");
        assert!(matches!(pair.target.send_control(pair.target_session, vec![0; len]), Err(Error::Length { .. })));
    }
    assert!(matches!(pair.source.send_control(99, vec![1]), Err(Error::Closed { session: 99 })));
    assert!(matches!(pair.target.send_control(99, vec![1]), Err(Error::Closed { session: 99 })));
    assert!(pair.source.rtt().is_some());
}

/// Goal: every batch arrives whole, whatever its size and connection. Method: sizes around every border, random pieces,
/// content that depends on the batch's number.
fn batches_arrive_whole(connections: u16, threads: u16) {
    let pair = pair(TargetLimits { threads, ..limits() }, |config| config.connections = connections);
    let mut rng = Rng(u64::from(connections));
    let mut lengths =
        vec![1, 15, 16, 17, 1200, 4095, 4096, 4097, 65_535, 65_536, 1 << 20, (1 << 20) + 1, 8 << 20, 33 << 20];
    lengths.extend((0..60).map(|_| 1 + rng.below(300_000)));
    let (mut sent, mut arrived) = (BTreeSet::new(), BTreeSet::new());
    for (number, len) in lengths.iter().enumerate() {
        let number = number as u64;
        send(&pair, number, pieces(&mut rng, content(number, *len)), &mut sent);
        // What has arrived so far is looked at now, so that it frees its part of the allowance.
        for (sequence, buf) in pair.at_target.rest().into_iter().filter_map(batch) {
            check_batch(sequence, buf, &lengths);
            assert!(arrived.insert(sequence), "{sequence} came twice");
        }
    }
    while arrived.len() < lengths.len() {
        let (sequence, buf) = pair.at_target.wait(batch);
        check_batch(sequence, buf, &lengths);
        assert!(arrived.insert(sequence), "{sequence} came twice");
    }
    while sent.len() < lengths.len() {
        sent.insert(pair.at_source.wait(batch_sent));
    }
    assert_eq!(sent, (0..lengths.len() as u64).collect());
    assert_eq!(arrived, sent);
    let stats = pair.source.stats();
    let bytes: u64 = lengths.iter().map(|len| *len as u64).sum();
    assert_eq!(
        (stats.batches_sent, stats.batch_bytes_sent, stats.batch_bytes_in_flight),
        (sent.len() as u64, bytes, 0)
    );
    assert!(stats.wire_bytes_sent > bytes, "{stats:?}");
    assert!(pair.target.sessions().iter().all(|session| session.batch_bytes_held == 0));
}

fn check_batch(sequence: u64, mut buf: RecvBuf, lengths: &[usize]) {
    let len = lengths[usize::try_from(sequence).expect("few batches")];
    assert!(buf[..] == content(sequence, len), "batch {sequence} of {len} bytes");
    assert_eq!(buf.as_ptr().addr() % 4096, 0);
    assert!(buf.headroom_mut().iter().all(|byte| *byte == 0), "nothing of an earlier batch before it");
    buf.headroom_mut()[..4].copy_from_slice(b"head");
    let whole = buf.with_headroom();
    assert_eq!(whole.len() % 4096, 0);
    assert!(whole[HEADROOM_BYTES + len..].iter().all(|byte| *byte == 0), "nor after it");
    let (memory, lease) = buf.into_parts();
    assert_eq!(&memory[..4], b"head");
    assert_eq!(memory.len(), (HEADROOM_BYTES + len).next_multiple_of(4096));
    drop((memory, lease));
}

#[test]
fn batches_arrive_whole_over_two_connections() {
    batches_arrive_whole(2, 1);
}

#[test]
fn batches_arrive_whole_over_three_connections_and_two_sockets() {
    batches_arrive_whole(3, 2);
}

#[test]
fn batches_beyond_the_limit_or_of_nothing_come_back() {
    let pair = pair(TargetLimits { batch_bytes_max: 1000, ..limits() }, |_| ());
    for len in [0, 1001] {
        let unsent = pair.source.send_batch(pair.source_session, 1, Bytes::from(vec![1; len]).into());
        let unsent = unsent.expect_err("its length is refused");
        assert!(matches!(unsent.error, Error::Length { limit: 1000, .. }), "{}", unsent.error);
        assert_eq!(unsent.batch.len(), len as u64);
    }
    let unsent = pair.source.send_batch(99, 1, Bytes::from(vec![1]).into()).expect_err("no such session");
    assert!(matches!(unsent.error, Error::Closed { session: 99 }));
}

#[test]
fn the_link_comes_back_by_itself_on_the_same_port() {
    let vault = vault();
    let (first, at_first) = target(&vault, limits());
    let address = first.local_addr();
    let (source, at_source) = agent(&vault, "web", config(address));
    at_first.wait(target_up);
    let session = at_source.wait(source_up);
    drop(first);
    let (ended, reason, fatal) = at_source.wait(source_down);
    assert_eq!((ended, fatal), (session, false), "{reason}");
    assert!(reason.contains("stopped"), "{reason}");
    assert!(matches!(source.send_control(session, vec![1]), Err(Error::Closed { .. })));

    let (sink, at_second) = events();
    let second =
        TargetLink::listen(address, identity(&vault, Role::Target, "site"), limits(), sink).expect("it listens");
    source.retry_now();
    let session = at_source.wait(source_up);
    at_second.wait(target_up);
    source.send_batch(session, 7, Bytes::from_static(b"again").into()).expect("there is room");
    let (_, buf) = at_second.wait(batch);
    assert_eq!(&buf[..], b"again");
    assert_eq!(at_source.wait(batch_sent), 7);
    drop(second);
}

#[test]
fn nobody_there_is_reported_and_tried_again() {
    let vault = vault();
    // A port that was free a moment ago.
    let address = UdpSocket::bind(any()).and_then(|socket| socket.local_addr()).expect("a port is free");
    let mut config = config(address);
    config.connect_timeout = Duration::from_millis(50);
    let (source, at_source) = agent(&vault, "web", config);
    for _ in 0..2 {
        let (session, reason, fatal) = at_source.wait(source_down);
        assert_eq!((session, fatal), (0, false));
        assert!(reason.contains(&address.to_string()), "{reason}");
        source.retry_now();
    }
    let (sink, at_target) = events();
    let target =
        TargetLink::listen(address, identity(&vault, Role::Target, "site"), limits(), sink).expect("it listens");
    at_source.wait(source_up);
    at_target.wait(target_up);
    drop(target);
}

/// Goal: a receiver that keeps its buffers is not sent more than it allows, the source's queue has its bound, and messages
/// pass all the same. Method: nothing is released until the source says that its queue is full and a message has passed.
#[test]
fn back_pressure_holds_its_bounds() {
    const LEN: usize = 1 << 20;
    const HELD_MAX: u64 = 4 << 20;
    let pair =
        pair(TargetLimits { batches_in_flight_bytes: HELD_MAX, batch_bytes_max: 2 << 20, ..limits() }, |config| {
            config.inflight_bytes_max = 16 << 20
        });
    let mut accepted = 0u64;
    let refused = loop {
        match pair.source.send_batch(pair.source_session, accepted, Bytes::from(content(accepted, LEN)).into()) {
            Ok(()) => accepted += 1,
            Err(unsent) => break unsent,
        }
        assert!(accepted <= 20, "4 MiB held, 16 MiB queued");
    };
    assert!(matches!(refused.error, Error::Full { limit: 0x100_0000, .. }), "{}", refused.error);

    let mut held: BTreeMap<u64, RecvBuf> = BTreeMap::new();
    let mut take = |event: TargetEvent| match event {
        TargetEvent::Batch { sequence, bytes, .. } => {
            held.insert(sequence, bytes);
            None
        }
        TargetEvent::Control { bytes, .. } => Some(bytes),
        TargetEvent::Up { .. } | TargetEvent::Down { .. } | TargetEvent::Refused { .. } => panic!("{event:?}"),
    };
    pair.source.send_control(pair.source_session, b"still here?".to_vec()).expect("messages have their own queue");
    assert_eq!(pair.at_target.wait(&mut take), b"still here?");
    pair.target.send_control(pair.target_session, b"yes".to_vec()).expect("there is room");
    pair.at_source.wait(|event| if let SourceEvent::Control { .. } = event { Some(()) } else { None });

    let mut released = 0;
    while released < accepted {
        let bytes: usize = held.values().map(|buf| buf.len()).sum();
        assert!(bytes as u64 <= HELD_MAX);
        assert!(pair.target.sessions()[0].batch_bytes_held <= HELD_MAX);
        // In order, as a target commits.
        if let Some(buf) = held.remove(&released) {
            assert!(buf[..] == content(released, LEN));
            released += 1;
        } else {
            let (sequence, buf) = pair.at_target.wait(batch);
            held.insert(sequence, buf);
        }
    }
    let mut sent = BTreeSet::new();
    send(&pair, accepted, refused.batch, &mut sent);
    assert_eq!(pair.at_target.wait(batch).0, accepted);
}

#[test]
fn a_foreign_vault_is_refused_with_both_names_at_both_ends() {
    let (ours, theirs) = (vault(), vault());
    let (target, at_target) = target(&theirs, limits());
    let (source, at_source) = agent(&ours, "web", config(target.local_addr()));
    let (session, reason, fatal) = at_source.wait(source_down);
    assert_eq!((session, fatal), (0, true));
    let wanted = format!("the target's certificate is of vault {}, ours is {}", theirs.id(), ours.id());
    assert!(reason.contains(&wanted), "{reason}");
    let refused =
        at_target.wait(|event| if let TargetEvent::Refused { reason, .. } = event { Some(reason) } else { None });
    assert!(refused.contains(&wanted), "{refused}");
    // Not tried again by itself for a minute, but at once when told to.
    source.retry_now();
    assert!(at_source.wait(source_down).2);
}

#[test]
fn an_expired_certificate_is_refused_with_its_date() {
    let vault = vault();
    let past = WallTime(now().0 - 20 * DAY_NS);
    let expired = |role, of| {
        let bundle = vault.issue_at(role, name(of), 10, past).expect("it issues");
        Arc::new(Identity::from_bundle(&bundle, past).expect("it was valid then"))
    };
    let (sink, _at_target) = events();
    let target = TargetLink::listen(any(), expired(Role::Target, "site"), limits(), sink).expect("it listens");
    let (source, at_source) = agent(&vault, "web", config(target.local_addr()));
    let (_, reason, fatal) = at_source.wait(source_down);
    assert!(fatal && reason.contains("target site expired on 20"), "{reason}");

    // Renewed at the target: the link comes up.
    target.replace_identity(&identity(&vault, Role::Target, "site")).expect("it is a target's");
    source.retry_now();
    at_source.wait(source_up);

    let (sink, at_source) = events();
    let source = SourceLink::start(config(target.local_addr()), expired(Role::Agent, "db"), sink).expect("it starts");
    let (_, reason, fatal) = at_source.wait(source_down);
    assert!(fatal && reason.contains("agent db expired on 20"), "{reason}");
    source.replace_identity(identity(&vault, Role::Agent, "db")).expect("it is an agent's");
    source.retry_now();
    at_source.wait(source_up);
}

#[test]
fn roles_stand_at_their_end_only() {
    let vault = vault();
    for role in [Role::Agent, Role::Control, Role::Operator] {
        let listening = TargetLink::listen(any(), identity(&vault, role, "x"), limits(), |_| ());
        assert!(matches!(listening, Err(Error::WrongRole { .. })), "{role}");
    }
    for role in [Role::Target, Role::Control, Role::Operator] {
        let connecting = SourceLink::start(SourceLinkConfig::new("127.0.0.1:9"), identity(&vault, role, "x"), |_| ());
        assert!(matches!(connecting, Err(Error::WrongRole { .. })), "{role}");
    }
    // A relay stands at both.
    let (sink, at_relay) = events();
    let relay = TargetLink::listen(any(), identity(&vault, Role::Relay, "edge"), limits(), sink).expect("it listens");
    let (sink, at_source) = events();
    let source = SourceLink::start(config(relay.local_addr()), identity(&vault, Role::Relay, "far"), sink);
    let SourceEvent::Up { peer, .. } = at_source.next() else { panic!("they meet") };
    assert_eq!(peer, PeerName { role: Role::Relay, name: name("edge") });
    let TargetEvent::Up { peer, .. } = at_relay.next() else { panic!("they meet") };
    assert_eq!(peer, PeerName { role: Role::Relay, name: name("far") });
    drop(source);
}

#[test]
fn a_newer_session_of_the_same_name_replaces_the_older() {
    let vault = vault();
    let (target, at_target) = target(&vault, limits());
    let (older, at_older) = agent(&vault, "web", config(target.local_addr()));
    let first = at_target.wait(target_up);
    at_older.wait(source_up);
    let (other, at_other) = agent(&vault, "db", config(target.local_addr()));
    let bystander = at_target.wait(target_up);
    at_other.wait(source_up);

    let (newer, at_newer) = agent(&vault, "web", config(target.local_addr()));
    at_newer.wait(source_up);
    // `Down` of the older comes before `Up` of the newer.
    let (ended, reason) = target_down(at_target.next()).expect("the older ends first");
    assert!(ended == first && reason.contains("replaced"), "{reason}");
    let second = target_up(at_target.next()).expect("the newer is up");
    let (_, reason, fatal) = at_older.wait(source_down);
    assert!(!fatal && reason.contains("replaced"), "{reason}");
    drop(older);
    let up: BTreeSet<u64> = target.sessions().iter().map(|session| session.session).collect();
    assert!(up.contains(&bystander) && up.contains(&second), "{up:?}");
    drop((newer, other));
}

#[test]
fn denied_identities_are_thrown_out_and_kept_out() {
    let vault = vault();
    let (target, at_target) = target(&vault, limits());
    let (source, at_source) = agent(&vault, "web", config(target.local_addr()));
    at_source.wait(source_up);
    at_target.wait(target_up);
    target.deny([PeerName { role: Role::Agent, name: name("web") }]);
    let (_, reason, fatal) = at_source.wait(source_down);
    assert!(fatal && reason.contains("deny list"), "{reason}");
    assert!(at_target.wait(target_down).1.contains("deny list"));
    source.retry_now();
    let (session, _, fatal) = at_source.wait(source_down);
    assert_eq!((session, fatal), (0, true));
    target.deny([]);
    source.retry_now();
    at_source.wait(source_up);
}

#[test]
fn the_target_can_close_a_session_with_a_reason() {
    let pair = pair(limits(), |_| ());
    pair.target.close(pair.target_session, "the group belongs to another host");
    let (session, reason, fatal) = pair.at_source.wait(source_down);
    assert_eq!((session, reason.as_str(), fatal), (pair.source_session, "the group belongs to another host", false));
    assert_eq!(pair.at_target.wait(target_down), (pair.target_session, reason));
    // And the source comes back.
    pair.at_source.wait(source_up);
}

#[test]
fn sessions_have_a_limit() {
    let vault = vault();
    let (target, at_target) = target(&vault, TargetLimits { sessions: 1, ..limits() });
    let (first, at_first) = agent(&vault, "web", config(target.local_addr()));
    at_first.wait(source_up);
    at_target.wait(target_up);
    let (second, at_second) = agent(&vault, "db", config(target.local_addr()));
    let (_, reason, fatal) = at_second.wait(source_down);
    assert!(!fatal && reason.contains("1 sessions already"), "{reason}");
    // The same name may come again: it replaces its own.
    let (again, at_again) = agent(&vault, "web", config(target.local_addr()));
    at_again.wait(source_up);
    drop((first, again));
    second.retry_now();
    at_second.wait(source_up);
}

#[test]
fn garbage_on_the_port_does_no_harm() {
    let pair = pair(limits(), |_| ());
    let noise = UdpSocket::bind(any()).expect("a port is free");
    let mut rng = Rng(1);
    for number in 0..2000 {
        let len = 1 + rng.below(1400);
        let mut bytes = content(number, len);
        if number % 3 == 0 {
            // A long header of QUIC version 1.
            bytes.splice(0..len.min(5), [0xc0, 0, 0, 0, 1].into_iter().take(len.min(5)));
        }
        noise.send_to(&bytes, pair.target.local_addr()).expect("it is sent");
        if number % 200 == 0 {
            let batch = content(number, 100_000);
            pair.source
                .send_batch(pair.source_session, number, Bytes::from(batch.clone()).into())
                .expect("there is room");
            assert!(pair.at_target.wait(self::batch).1[..] == batch);
        }
    }
    assert_eq!(pair.target.sessions().len(), 1);
}

/// Goal: what the source was told is sent has arrived, and all messages too, when it stops in the middle of sending.
#[test]
fn a_source_that_stops_has_delivered_what_it_accepted() {
    let pair = pair(limits(), |_| ());
    let mut sent = BTreeSet::new();
    for number in 0..40 {
        send(&pair, number, Bytes::from(content(number, 700_000)).into(), &mut sent);
        pair.source.send_control(pair.source_session, number.to_le_bytes().to_vec()).expect("there is room");
    }
    pair.source.stop();
    for event in pair.at_source.rest() {
        match event {
            SourceEvent::BatchSent { number, .. } => _ = sent.insert(number),
            SourceEvent::Down { reason, fatal, .. } => {
                assert!(!fatal && reason == "the source has stopped", "{reason}")
            }
            SourceEvent::Up { .. } | SourceEvent::Control { .. } => panic!("nothing begins"),
        }
    }
    assert_eq!(sent.len(), 40, "all that was accepted was sent");
    let (mut batches, mut messages) = (BTreeSet::new(), Vec::new());
    let reason = pair.at_target.wait(|event| match event {
        TargetEvent::Batch { sequence, bytes, .. } => {
            assert!(bytes[..] == content(sequence, 700_000));
            batches.insert(sequence);
            None
        }
        TargetEvent::Control { bytes, .. } => {
            messages.push(bytes);
            None
        }
        TargetEvent::Down { reason, .. } => Some(reason),
        TargetEvent::Up { .. } | TargetEvent::Refused { .. } => None,
    });
    assert_eq!(reason, "the source has stopped");
    assert_eq!(batches, sent);
    assert_eq!(messages, (0..40u64).map(|number| number.to_le_bytes().to_vec()).collect::<Vec<_>>());
}

/// The other way round: the target stops while batches are on the way.
#[test]
fn a_target_that_stops_has_everything_that_was_reported_as_sent() {
    let pair = pair(limits(), |_| ());
    let mut sent = BTreeSet::new();
    for number in 0..60 {
        if number == 40 {
            pair.target.send_control(pair.target_session, b"last words".to_vec()).expect("there is room");
            pair.target.stop();
        }
        match pair.source.send_batch(pair.source_session, number, Bytes::from(content(number, 700_000)).into()) {
            Ok(()) => {}
            Err(unsent) if matches!(unsent.error, Error::Closed { .. }) => break,
            Err(_full) => sent.extend(pair.at_source.rest().into_iter().filter_map(batch_sent)),
        }
    }
    let mut heard = false;
    let reason = pair.at_source.wait(|event| match event {
        SourceEvent::BatchSent { number, .. } => {
            sent.insert(number);
            None
        }
        SourceEvent::Control { bytes, .. } => {
            heard = bytes == b"last words";
            None
        }
        SourceEvent::Down { reason, .. } => Some(reason),
        SourceEvent::Up { .. } => None,
    });
    assert!(heard, "messages go out before the end");
    assert_eq!(reason, "the target has stopped");
    let arrived: BTreeSet<u64> = pair
        .at_target
        .rest()
        .into_iter()
        .filter_map(|event| match event {
            TargetEvent::Batch { sequence, bytes, .. } => {
                assert!(bytes[..] == content(sequence, 700_000));
                Some(sequence)
            }
            TargetEvent::Up { .. }
            | TargetEvent::Control { .. }
            | TargetEvent::Down { .. }
            | TargetEvent::Refused { .. } => None,
        })
        .collect();
    assert!(sent.is_subset(&arrived), "{sent:?} {arrived:?}");
}

#[test]
fn many_agents_at_once() {
    let vault = vault();
    let (target, at_target) = target(&vault, limits());
    let agents: Vec<_> =
        (0..8).map(|number| agent(&vault, &format!("host{number}"), config(target.local_addr()))).collect();
    for (number, (source, events)) in agents.iter().enumerate() {
        let session = events.wait(source_up);
        source.send_batch(session, 1, Bytes::from(content(number as u64, 200_000)).into()).expect("there is room");
    }
    let mut names = BTreeMap::new();
    let mut seen = 0;
    while seen < agents.len() {
        match at_target.next() {
            TargetEvent::Up { session, peer, .. } => _ = names.insert(session, peer.name.to_string()),
            TargetEvent::Batch { session, bytes, .. } => {
                let number: u64 = names[&session].trim_start_matches("host").parse().expect("as given");
                assert!(bytes[..] == content(number, 200_000), "the batch is of the agent that sent it");
                seen += 1;
            }
            event @ (TargetEvent::Control { .. } | TargetEvent::Down { .. } | TargetEvent::Refused { .. }) => {
                panic!("{event:?}")
            }
        }
    }
    assert_eq!(target.sessions().len(), agents.len());
}

#[test]
fn settings_out_of_range_are_refused() {
    let vault = vault();
    let agent = identity(&vault, Role::Agent, "web");
    type Change = fn(&mut SourceLinkConfig);
    let changes: [(&str, Change); 6] = [
        ("upstream", |config| config.upstream = "site.example".to_owned()),
        ("upstream", |config| config.upstream = ":4433".to_owned()),
        ("mtu_max", |config| config.transport.mtu_max = 6501),
        ("connections", |config| config.connections = 0),
        ("connection_window", |config| config.transport.connection_window = config.transport.stream_window),
        ("idle_timeout", |config| config.transport.idle_timeout = config.transport.keep_alive),
    ];
    for (wanted, change) in changes {
        let mut config = SourceLinkConfig::new("127.0.0.1:9");
        change(&mut config);
        let Err(Error::Setting { field, .. }) = SourceLink::start(config, Arc::clone(&agent), |_| ()) else {
            panic!("{wanted} was taken")
        };
        assert_eq!(field, wanted);
    }
    let limits = TargetLimits { batches_in_flight_bytes: 1, ..limits() };
    let listening = TargetLink::listen(any(), identity(&vault, Role::Target, "site"), limits, |_| ());
    assert!(matches!(listening, Err(Error::Setting { field: "batches_in_flight_bytes", .. })));
}
