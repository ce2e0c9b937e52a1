//! What a peer with a valid certificate, or a stolen one of another role, can do to the other end: nothing but lose its own
//! session. Method: hand-made connections against the real ends.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use farshore_proto::{Name, Role, WallTime};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;

use super::wire::{self, Fault, Hello, code};
use super::{SourceEvent, SourceLink, SourceLinkConfig, TargetEvent, TargetLimits, TargetLink, Transport, transport};
use crate::identity::{Identity, Vault, wall_now};
use crate::tls;

const BOUND: Duration = Duration::from_secs(60);
/// More events than any test here causes.
const EVENTS_MAX: usize = 10_000;
const DAY_NS: u64 = 86_400 * 1_000_000_000;

fn name(text: &str) -> Name {
    Name::new(text).expect("the tests use good names")
}

fn vault() -> Vault {
    Vault::in_memory(name("test"), wall_now()).expect("keys can be made")
}

fn identity(vault: &Vault, role: Role, at: WallTime) -> Arc<Identity> {
    let bundle = vault.issue_at(role, name("x"), 10, at).expect("it issues");
    Arc::new(Identity::from_bundle(&bundle, at).expect("it loads"))
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts")
}

fn any() -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)
}

fn target(vault: &Vault, limits: TargetLimits) -> (TargetLink, Receiver<TargetEvent>) {
    let (tx, rx) = sync_channel(EVENTS_MAX);
    let sink = move |event| _ = tx.try_send(event);
    let link = TargetLink::listen(any(), identity(vault, Role::Target, wall_now()), limits, sink).expect("it listens");
    (link, rx)
}

async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, work).await.expect("it happens within the bound")
}

async fn connect(identity: &Identity, address: SocketAddr) -> (Endpoint, Result<Connection, Fault>) {
    let settings = Transport::default();
    let endpoint = transport::client_endpoint(&settings, address).expect("a socket opens");
    let config = transport::client_config(&settings, identity).expect("the identity is whole");
    let connecting = endpoint.connect_with(config, address, tls::SERVER_NAME).expect("the address is good");
    let connection = bounded(connecting).await.map_err(Fault::from);
    (endpoint, connection)
}

/// A hand-made source with a session.
struct Raw {
    _endpoint: Endpoint,
    connection: Connection,
    send: SendStream,
    _recv: RecvStream,
}

async fn raw(identity: &Identity, address: SocketAddr) -> Raw {
    let (endpoint, connection) = connect(identity, address).await;
    let connection = connection.expect("it is let in");
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream opens");
    wire::write_message(
        &mut send,
        Hello { version: wire::VERSION, token: [1; 16], index: 0, channel: [0; 16] }.encode(),
    )
    .await
    .expect("it goes");
    wire::read_welcome(&mut recv, BOUND).await.expect("it is welcome");
    Raw { _endpoint: endpoint, connection, send, _recv: recv }
}

/// How the target ends a session in which `attack` is done.
fn fate<F: AsyncFnOnce(&mut Raw)>(limits: TargetLimits, attack: F) -> Fault {
    let vault = vault();
    let (target, events) = target(&vault, limits);
    let agent = identity(&vault, Role::Agent, wall_now());
    let fault = runtime().block_on(async {
        let mut raw = raw(&agent, target.local_addr()).await;
        attack(&mut raw).await;
        Fault::from(bounded(raw.connection.closed()).await)
    });
    let down = loop {
        match events.recv_timeout(BOUND).expect("the session ends") {
            TargetEvent::Down { reason, .. } => break reason,
            TargetEvent::Up { .. } | TargetEvent::Control { .. } | TargetEvent::Batch { .. } => {}
            event @ TargetEvent::Refused { .. } => panic!("{event:?}"),
        }
    };
    assert_eq!(down, fault.reason, "both ends read the same");
    assert!(target.sessions().is_empty());
    fault
}

async fn batch(raw: &Raw, len: u64, sequence: u64, body: &[u8]) -> (SendStream, RecvStream) {
    let (mut send, recv) = raw.connection.open_bi().await.expect("a stream opens");
    send.write_all(&wire::batch_header(len, sequence)).await.expect("it goes");
    // The target may close in the middle: that is what is tested.
    let _closed = send.write_all(body).await;
    (send, recv)
}

#[test]
fn a_message_beyond_the_limit_ends_the_session() {
    for len in [0, (1 << 20) + 1, u32::MAX] {
        let fault = fate(TargetLimits::default(), async |raw| {
            raw.send.write_all(&len.to_le_bytes()).await.expect("it goes");
        });
        assert_eq!(fault.code, code::PROTOCOL);
        assert!(fault.reason.contains("a message of"), "{}", fault.reason);
    }
}

#[test]
fn a_batch_beyond_the_limit_ends_the_session() {
    for len in [0, (64 << 20) + 1, u64::MAX] {
        let fault = fate(TargetLimits::default(), async |raw| {
            let _streams = batch(raw, len, 0, b"").await;
            bounded(raw.connection.closed()).await;
        });
        assert_eq!(fault.code, code::PROTOCOL);
        assert!(fault.reason.contains("a batch of"), "{}", fault.reason);
    }
}

#[test]
fn a_batch_of_another_length_than_it_says_ends_the_session() {
    for (len, wanted) in [(99u64, "longer"), (101, "ended after 100")] {
        let fault = fate(TargetLimits::default(), async |raw| {
            let (mut send, _recv) = batch(raw, len, 0, &[1; 100]).await;
            let _closed = send.finish();
            bounded(raw.connection.closed()).await;
        });
        assert!(fault.code == code::PROTOCOL && fault.reason.contains(wanted), "{}", fault.reason);
    }
}

#[test]
fn a_sequence_that_comes_twice_ends_the_session() {
    let fault = fate(TargetLimits::default(), async |raw| {
        let (mut send, mut recv) = batch(raw, 3, 0, b"abc").await;
        send.finish().expect("it is open");
        bounded(recv.read_to_end(8)).await.expect("the first is taken");
        let _streams = batch(raw, 3, 0, b"abc").await;
        bounded(raw.connection.closed()).await;
    });
    assert!(fault.code == code::PROTOCOL && fault.reason.contains("twice"), "{}", fault.reason);
}

#[test]
fn a_reset_batch_ends_the_session() {
    let fault = fate(TargetLimits::default(), async |raw| {
        let (mut send, _recv) = batch(raw, 1000, 0, b"abc").await;
        send.reset(0u32.into()).expect("it is open");
        bounded(raw.connection.closed()).await;
    });
    assert_eq!(fault.code, code::PROTOCOL);
}

#[test]
fn a_batch_that_stands_still_ends_its_session_and_no_other() {
    let vault = vault();
    let (target, events) =
        target(&vault, TargetLimits { stall_timeout: Duration::from_millis(100), ..TargetLimits::default() });
    let relay = identity(&vault, Role::Relay, wall_now());
    let agent = identity(&vault, Role::Agent, wall_now());
    runtime().block_on(async {
        let good = raw(&relay, target.local_addr()).await;
        let bad = raw(&agent, target.local_addr()).await;
        let _streams = batch(&bad, 1000, 0, &[1; 500]).await;
        let fault = Fault::from(bounded(bad.connection.closed()).await);
        assert!(fault.code == code::STALLED && fault.reason.contains("after 500 bytes"), "{}", fault.reason);
        let (mut send, mut recv) = batch(&good, 3, 0, b"abc").await;
        send.finish().expect("it is open");
        let receipt = bounded(recv.read_to_end(8)).await.expect("it is taken");
        assert_eq!(receipt, 0u64.to_le_bytes());
    });
    let batches = events.try_iter().filter(|event| matches!(event, TargetEvent::Batch { .. })).count();
    assert_eq!(batches, 1);
}

#[test]
fn introductions_that_are_none_are_refused() {
    let vault = vault();
    let limits = TargetLimits { hello_timeout: Duration::from_millis(100), ..TargetLimits::default() };
    let (target, _events) = target(&vault, limits);
    let agent = identity(&vault, Role::Agent, wall_now());
    let hello = Hello { version: wire::VERSION, token: [1; 16], index: 0, channel: [0; 16] };
    let cases: [(&str, Option<Vec<u8>>, u32); 5] = [
        ("silence", None, code::STALLED),
        ("an empty message", Some(vec![0; 4]), code::PROTOCOL),
        ("noise", Some([32u32.to_le_bytes().to_vec(), vec![9; 32]].concat()), code::PROTOCOL),
        ("a later version", Some(framed(Hello { version: 2, ..hello })), code::VERSION),
        ("joining nothing", Some(framed(Hello { index: 1, ..hello })), code::ENDED),
    ];
    runtime().block_on(async {
        for (what, message, wanted) in cases {
            let (_endpoint, connection) = connect(&agent, target.local_addr()).await;
            let connection = connection.expect("it is let in");
            let mut streams = None;
            if let Some(message) = message {
                let (mut send, recv) = connection.open_bi().await.expect("a stream opens");
                send.write_all(&message).await.expect("it goes");
                streams = Some((send, recv));
            }
            let fault = Fault::from(bounded(connection.closed()).await);
            assert_eq!((fault.code, fault.fatal), (wanted, wanted == code::VERSION), "{what}: {}", fault.reason);
            drop(streams);
        }
    });
    assert!(target.sessions().is_empty());
}

fn framed(hello: Hello) -> Vec<u8> {
    let message = hello.encode();
    [u32::try_from(message.len()).expect("short").to_le_bytes().to_vec(), message].concat()
}

#[test]
fn one_member_cannot_use_up_the_connections_of_all() {
    let vault = vault();
    let limits = TargetLimits { connections_per_session: 2, channels_per_identity: 1, ..TargetLimits::default() };
    let (target, _events) = target(&vault, limits);
    let (agent, relay) = (identity(&vault, Role::Agent, wall_now()), identity(&vault, Role::Relay, wall_now()));
    runtime().block_on(async {
        let mut silent = Vec::new();
        for _ in 0..4 {
            let (endpoint, connection) = connect(&agent, target.local_addr()).await;
            silent.push((endpoint, connection.expect("it is let in")));
        }
        let (_endpoint, connection) = connect(&agent, target.local_addr()).await;
        let extra = connection.expect("the handshake is not refused");
        // Whichever of the five came last is refused.
        let closed = silent
            .iter()
            .map(|(_, connection)| connection)
            .chain([&extra])
            .map(|connection| Box::pin(connection.closed()));
        let fault = Fault::from(bounded(first_of(closed.collect())).await);
        assert!(fault.code == code::BUSY && fault.reason.contains("4 connections"), "{}", fault.reason);
        let _other = raw(&relay, target.local_addr()).await;
    });
}

/// Waits for the first of several futures.
async fn first_of<F: Future + Unpin>(mut futures: Vec<F>) -> F::Output {
    std::future::poll_fn(|cx| {
        let ready = futures.iter_mut().find_map(|future| match std::pin::Pin::new(future).poll(cx) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        });
        ready.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
    })
    .await
}

/// Nobody joins the session of another, even one who knows its token.
#[test]
fn a_token_is_of_no_use_to_another_member() {
    let vault = vault();
    let (target, _events) = target(&vault, TargetLimits::default());
    let (agent, relay) = (identity(&vault, Role::Agent, wall_now()), identity(&vault, Role::Relay, wall_now()));
    runtime().block_on(async {
        let _raw = raw(&agent, target.local_addr()).await;
        let (_endpoint, connection) = connect(&relay, target.local_addr()).await;
        let connection = connection.expect("it is let in");
        let (mut send, _recv) = connection.open_bi().await.expect("a stream opens");
        let hello = Hello { version: wire::VERSION, token: [1; 16], index: 1, channel: [0; 16] };
        wire::write_message(&mut send, hello.encode()).await.expect("it goes");
        assert_eq!(Fault::from(bounded(connection.closed()).await).code, code::ENDED);
    });
    assert_eq!(target.sessions().len(), 1);
}

#[test]
fn streams_beyond_the_limit_do_not_open() {
    let vault = vault();
    let (target, _events) = target(&vault, TargetLimits { streams_per_connection: 3, ..TargetLimits::default() });
    let agent = identity(&vault, Role::Agent, wall_now());
    runtime().block_on(async {
        let raw = raw(&agent, target.local_addr()).await;
        let mut streams = Vec::new();
        for sequence in 1..=3 {
            // Not their turn: they stay open until batch 0 comes.
            streams.push(batch(&raw, 3, sequence, b"abc").await);
        }
        tokio::select! {
            biased;
            _ = raw.connection.open_bi() => panic!("a fifth stream opened"),
            _ = raw.connection.open_uni() => panic!("a unidirectional stream opened"),
            () = tokio::task::yield_now() => {}
        }
    });
}

/// How the target refuses a client with this identity, as both ends see it.
fn refusal(vault: &Vault, client: &Identity) -> (String, String) {
    let (target, events) = target(vault, TargetLimits::default());
    let at_client = runtime().block_on(async {
        let (_endpoint, connection) = connect(client, target.local_addr()).await;
        match connection {
            // TLS 1.3: the client is done before the server has looked at its certificate.
            Ok(connection) => Fault::from(bounded(connection.closed()).await),
            Err(fault) => fault,
        }
    });
    assert!(at_client.fatal, "{}", at_client.reason);
    let TargetEvent::Refused { reason, .. } = events.recv_timeout(BOUND).expect("it is refused") else {
        panic!("it was let in")
    };
    (at_client.reason, reason)
}

#[test]
fn a_target_refuses_the_expired_and_those_of_other_roles() {
    let vault = vault();
    let past = WallTime(wall_now().0 - 20 * DAY_NS);
    let cases = [
        (identity(&vault, Role::Agent, past), "the certificate of agent x expired on 20"),
        (identity(&vault, Role::Target, wall_now()), "one of target x, this end of a link takes agent or relay only"),
        (identity(&vault, Role::Operator, wall_now()), "one of operator x"),
        (identity(&vault, Role::Control, wall_now()), "one of control x"),
    ];
    for (client, wanted) in cases {
        let (at_client, at_target) = refusal(&vault, &client);
        assert!(at_target.contains(wanted), "{at_target}");
        assert!(at_client.contains(wanted) && at_client.contains("refused us"), "{at_client}");
    }
}

/// A listener with the given identity, as a thief of it would set up.
fn impostor(runtime: &Runtime, identity: &Identity, address: SocketAddr) -> Endpoint {
    let _inside = runtime.enter();
    let settings = Transport::default();
    let config = transport::server_config(&settings, identity, 10, 0).expect("the identity is whole");
    let socket = transport::udp_socket(address, settings.socket_buffer, false).expect("the port is free");
    transport::server_endpoint(&settings, identity, config, socket).expect("it listens")
}

#[test]
fn an_agent_that_acts_as_a_target_is_refused() {
    let vault = vault();
    let runtime = runtime();
    let thief = identity(&vault, Role::Agent, wall_now());
    let endpoint = impostor(&runtime, &thief, any());
    let (tx, events) = sync_channel(EVENTS_MAX);
    let config = SourceLinkConfig::new(endpoint.local_addr().expect("it is bound").to_string());
    let sink = move |event| _ = tx.try_send(event);
    let source = SourceLink::start(config, identity(&vault, Role::Agent, wall_now()), sink).expect("it starts");
    let at_thief = runtime.block_on(async {
        let incoming = bounded(endpoint.accept()).await.expect("it comes");
        Fault::from(bounded(incoming.into_future()).await.expect_err("the source hangs up"))
    });
    let SourceEvent::Down { session: 0, reason, fatal: true } = events.recv_timeout(BOUND).expect("it is reported")
    else {
        panic!("it must not come up")
    };
    let wanted = "one of agent x, this end of a link takes target or relay only";
    assert!(reason.contains(wanted), "{reason}");
    assert!(at_thief.reason.contains(wanted), "{}", at_thief.reason);
    drop(source);
}

/// A target that was killed says nothing; one that is started again on the same port tells its old peers at once.
#[test]
fn a_killed_target_resets_its_old_sessions_when_it_is_back() {
    let vault = vault();
    let site = identity(&vault, Role::Target, wall_now());
    let agent = identity(&vault, Role::Agent, wall_now());
    let first = runtime();
    let endpoint = impostor(&first, &site, any());
    let address = endpoint.local_addr().expect("it is bound");
    let (killed, kill) = tokio::sync::oneshot::channel();
    let client = std::thread::spawn(move || {
        runtime().block_on(async {
            let (_endpoint, connection) = connect(&agent, address).await;
            let connection = connection.expect("it is let in");
            let (mut send, _recv) = connection.open_bi().await.expect("a stream opens");
            send.write_all(b"hello").await.expect("it goes");
            bounded(kill).await.expect("the target is killed and back");
            send.write_all(b"are you there?").await.expect("it is buffered");
            bounded(connection.closed()).await
        })
    });
    let connection = first.block_on(async {
        let incoming = bounded(endpoint.accept()).await.expect("it comes");
        let connection = bounded(incoming.into_future()).await.expect("it is let in");
        let (_send, mut recv) = bounded(connection.accept_bi()).await.expect("a stream opens");
        let mut word = [0; 5];
        bounded(recv.read_exact(&mut word)).await.expect("it arrives");
        connection
    });
    // Tasks are dropped with the runtime, in the middle of everything: no last packet is sent.
    drop(first);
    drop((connection, endpoint));
    let second = runtime();
    let endpoint = impostor(&second, &site, address);
    killed.send(()).expect("the client waits");
    let error = second.block_on(async {
        let serving = async {
            while let Some(incoming) = endpoint.accept().await {
                incoming.ignore();
            }
        };
        let joined = tokio::task::spawn_blocking(move || client.join().expect("the client is right"));
        tokio::select! {
            joined = joined => joined.expect("the thread ends"),
            () = serving => panic!("the endpoint closed"),
        }
    });
    assert!(matches!(error, quinn::ConnectionError::Reset), "{error}");
}
