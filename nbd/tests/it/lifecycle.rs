//! Start, stop, addresses, connections.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use farshore_nbd::client::{Client, Options};
use farshore_nbd::wire::command;
use farshore_nbd::{Address, ConnectionState, ErrorKind, Listen, Peer, Server, ServerConfig};
use nix::libc;

use crate::memory::{GEOMETRY, MemoryDevice};
use crate::protocol::{connect, serve};

#[test]
fn serves_a_unix_socket_and_removes_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("a b.sock");
    let listen = Listen::Unix { path: path.clone(), mode: 0o600 };
    let (device, server) = serve(GEOMETRY, |config| config.listen = listen.clone());
    assert_eq!(server.address(), &Address::Unix(path.clone()));
    let mut client = Client::connect_uri(&server.uri().expect("it listens"), &Options::default()).expect("a handshake");
    client.write(0, &[7; 512], false).expect("a write");
    assert_eq!(device.content()[..512], [7; 512]);
    let connections = server.connections();
    let me = Peer::Unix { pid: i32::try_from(std::process::id()).expect("a pid"), uid: nix::unistd::getuid().as_raw() };
    assert_eq!((connections.len(), connections[0].peer), (1, me));
    assert_eq!((connections[0].state, connections[0].totals.writes), (ConnectionState::Transmission, 1));

    let second = Server::start(ServerConfig::new("", listen), Arc::clone(&device));
    assert_eq!(second.expect_err("the first one answers").kind(), ErrorKind::InUse);

    server.stop().expect("a clean stop");
    assert!(!path.exists());
    assert!(client.read(0, 512).is_err(), "closed");
    server.stop().expect("nothing more to do");
    assert_eq!(server.stats().connections_open, 0);
    assert!(server.connect().is_err(), "no more connections");
}

#[test]
fn serves_tcp() {
    let (_, server) = serve(GEOMETRY, |config| config.listen = Listen::Tcp(([127, 0, 0, 1], 0).into()));
    let uri = server.uri().expect("it listens");
    let mut client = Client::connect_uri(&uri, &Options::default()).expect("a handshake");
    let data = vec![5; 3 << 20];
    client.write(512, &data, true).expect("a write");
    assert!(client.read(512, 3 << 20).expect("a read") == data);
    assert!(matches!(server.connections()[0].peer, Peer::Tcp(_)));
    client.disconnect().expect("a goodbye");
}

#[test]
fn deals_connections_to_threads_in_turn() {
    let (device, server) = serve(GEOMETRY, |config| config.threads = 3);
    let mut clients: Vec<_> = (0..6).map(|_| connect(&server, &Options::default())).collect();
    let mut threads: Vec<_> = server.connections().iter().map(|connection| connection.thread).collect();
    threads.sort_unstable();
    assert_eq!(threads, [0, 0, 1, 1, 2, 2]);
    for (offset, client) in (0..).step_by(512).zip(&mut clients) {
        client.write(offset, &[1; 512], false).expect("a write");
    }
    // One flush, by any of them, is one of the device and so covers all.
    clients[3].flush().expect("a flush");
    assert_eq!(device.flushes(), 1);
    assert_eq!(clients[0].read(0, 6 * 512).expect("a read"), [1; 6 * 512]);
}

#[test]
fn turns_away_more_connections_than_allowed() {
    let (_, server) = serve(GEOMETRY, |config| config.connections_max = 2);
    let first = connect(&server, &Options::default());
    let _second = connect(&server, &Options::default());
    assert_eq!(server.connect().expect_err("full").kind(), io::ErrorKind::WouldBlock);
    assert_eq!(server.stats().connections_refused, 1);
    first.disconnect().expect("a goodbye");
    // The goodbye is answered by closing; the place is free a moment later.
    while server.connections().len() > 1 {
        std::thread::yield_now();
    }
    connect(&server, &Options::default());
}

#[test]
fn a_silent_client_is_disconnected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("s");
    let (_, server) = serve(GEOMETRY, |config| {
        config.listen = Listen::Unix { path: path.clone(), mode: 0o600 };
        config.handshake_max = Duration::from_millis(5);
    });
    let mut silent = UnixStream::connect(&path).expect("a connection");
    let mut greeting = Vec::new();
    silent.read_to_end(&mut greeting).expect("the greeting, then the end");
    assert_eq!(greeting.len(), 18);
    drop(server);
}

/// Goal: a stop waits for the device and gives the replies away; later requests are refused, not dropped.
#[test]
fn a_stop_waits_for_requests_in_flight() {
    let (device, server) = serve(GEOMETRY, |config| config.stop_grace = Duration::from_secs(60));
    let mut client = connect(&server, &Options::default());
    device.hold();
    let held = client.submit(command::WRITE, 0, 0, 512, &[8; 512]).expect("sent");
    while device.waiting() == 0 {
        std::thread::yield_now();
    }
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| server.stop());
        loop {
            // Does not pass through the device's queue, so it is answered until the stop begins.
            client.submit(command::BLOCK_STATUS, 0, 0, 512, &[]).expect("sent");
            match client.receive().expect("a reply").result {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ESHUTDOWN));
                    break;
                }
            }
        }
        assert!(!stop.is_finished(), "the write is still in the device");
        device.release();
        let reply = client.receive().expect("the reply to the held write");
        assert_eq!(reply.cookie, held);
        reply.result.expect("written");
        stop.join().expect("no panic").expect("a clean stop");
    });
    assert_eq!(device.content()[..512], [8; 512]);
}

#[test]
fn a_stop_does_not_wait_for_clients_that_are_gone_or_silent() {
    let (device, server) = serve(GEOMETRY, |config| config.stop_grace = Duration::from_millis(1));
    let _idle = connect(&server, &Options::default());
    let _in_handshake = server.connect().expect("room");
    device.hold();
    let mut gone = connect(&server, &Options::default());
    gone.submit(command::READ, 0, 0, 512, &[]).expect("sent");
    while device.waiting() == 0 {
        std::thread::yield_now();
    }
    drop(gone);
    device.release();
    server.stop().expect("a clean stop");
    assert_eq!(device.waiting(), 0);
}

#[test]
fn bad_configurations_are_refused() {
    let device = MemoryDevice::new(GEOMETRY, 1);
    let start = |change: fn(&mut ServerConfig)| {
        let mut config = ServerConfig::new("", Listen::Nowhere);
        change(&mut config);
        Server::start(config, Arc::clone(&device)).map(|_| ()).map_err(|error| error.kind())
    };
    assert_eq!(start(|_| {}), Ok(()));
    assert_eq!(start(|config| config.threads = 0), Err(ErrorKind::Invalid));
    assert_eq!(start(|config| config.requests_max = 0), Err(ErrorKind::Invalid));
    assert_eq!(start(|config| config.name = "x".repeat(5000)), Err(ErrorKind::Invalid));
    assert_eq!(
        start(|config| config.listen = Listen::Unix { path: "/no/such/folder/s".into(), mode: 0o600 }),
        Err(ErrorKind::System)
    );
}
