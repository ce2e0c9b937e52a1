//! Bytes and clients that mean no good.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use farshore_nbd::ServerHandle;
use farshore_nbd::client::{Client, Options};
use farshore_nbd::proto::RequestHeader;
use farshore_nbd::wire::{self, command};

use crate::memory::GEOMETRY;
use crate::protocol::{connect, serve};
use crate::rng::Rng;

/// A connection in the transmission phase, raw.
fn raw(server: &ServerHandle) -> UnixStream {
    let stream = server.connect().expect("room");
    let keep = stream.try_clone().expect("a second handle");
    Client::over(stream, &Options::default()).expect("a handshake");
    keep
}

fn request(kind: u16, offset: u64, len: u32) -> [u8; wire::REQUEST_LEN] {
    RequestHeader { flags: 0, kind, cookie: 7, offset, len }.encode()
}

/// Waits until all connections but `left` are gone.
fn wait_for_connections(server: &ServerHandle, left: usize) {
    while server.connections().len() > left {
        std::thread::yield_now();
    }
}

/// Sends everything and lets go; what the server answers is read and ignored, so that it is never stuck on us.
fn pour(mut stream: UnixStream, bytes: &[u8]) {
    let mut reader = stream.try_clone().expect("a second handle");
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::copy(&mut reader, &mut std::io::sink()).ok());
        // The server may close in the middle.
        let _closed_early = stream.write_all(bytes);
        let _closed_early = stream.shutdown(Shutdown::Write);
    });
}

#[test]
fn random_bytes_in_the_handshake_disturb_nobody() {
    let (_, server) = serve(GEOMETRY, |_| {});
    let mut good = connect(&server, &Options::default());
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut bytes = if rng.below(4) == 0 { vec![] } else { vec![0, 0, 0, 3] };
        for _ in 0..rng.below(8) {
            bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
            bytes.extend_from_slice(&u32::try_from(rng.below(12)).expect("small").to_be_bytes());
            let len = [0, rng.index(40), rng.index(100_000)][rng.index(3)];
            let told = if rng.below(6) == 0 { rng.index(1 << 32) } else { len };
            bytes.extend_from_slice(&u32::try_from(told).expect("at most 2^32 - 1").to_be_bytes());
            // Small numbers make plausible lengths.
            let data = rng.bytes(len);
            bytes.extend(data.iter().map(|byte| if byte & 3 == 0 { *byte } else { 0 }));
        }
        let tail = rng.index(64);
        bytes.extend(rng.bytes(tail));
        pour(server.connect().expect("room"), &bytes);
    }
    assert_eq!(good.read(0, 512).expect("undisturbed"), [0; 512]);
    wait_for_connections(&server, 1);
}

#[test]
fn random_requests_disturb_nobody() {
    let (_, server) = serve(GEOMETRY, |config| config.threads = 2);
    let mut good = connect(&server, &Options::default());
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut bytes = Vec::new();
        for _ in 0..rng.below(20) {
            let header = RequestHeader {
                flags: u16::try_from(rng.below(64)).expect("small"),
                kind: u16::try_from(rng.below(9)).expect("small"),
                cookie: rng.next(),
                offset: if rng.below(4) == 0 { rng.next() } else { rng.below(GEOMETRY.size / 512) * 512 },
                len: u32::try_from(if rng.below(4) == 0 { rng.below(1 << 32) } else { rng.below(512) * 512 })
                    .expect("below 2^32"),
            };
            bytes.extend_from_slice(&header.encode());
            if header.kind == command::WRITE && rng.below(8) > 0 {
                bytes.resize(bytes.len() + usize::try_from(header.len.min(1 << 20)).expect("small"), 0x5a);
            }
        }
        let tail = rng.index(64);
        bytes.extend(rng.bytes(tail));
        pour(raw(&server), &bytes);
    }
    good.write(0, &[4; 512], false).expect("undisturbed");
    assert_eq!(good.read(0, 512).expect("undisturbed"), [4; 512]);
    wait_for_connections(&server, 1);
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_payload_has_written_nothing() {
    let (device, server) = serve(GEOMETRY, |_| {});
    for sent in [0, 1, 511, 512, 4095] {
        let mut stream = raw(&server);
        stream.write_all(&request(command::WRITE, 8192, 4096)).expect("sent");
        stream.write_all(&vec![0xee; sent]).expect("sent");
        drop(stream);
    }
    // In the middle of a request, and of a payload that is drained.
    let mut stream = raw(&server);
    stream.write_all(&request(command::WRITE, 8192, 4096)[..20]).expect("sent");
    drop(stream);
    let mut stream = raw(&server);
    stream.write_all(&request(command::WRITE, 1, 4096)).expect("sent");
    stream.write_all(&[0xee; 100]).expect("sent");
    drop(stream);
    wait_for_connections(&server, 0);
    assert!(device.content().iter().all(|&byte| byte == 0));
    assert_eq!(server.stats().totals.writes, 0);
}

#[test]
fn a_client_that_closes_its_sending_side_still_gets_its_replies() {
    let (_, server) = serve(GEOMETRY, |_| {});
    let mut stream = raw(&server);
    stream.write_all(&[request(command::TRIM, 0, 512), request(command::FLUSH, 0, 0)].concat()).expect("sent");
    stream.shutdown(Shutdown::Write).expect("shut down");
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).expect("replies and the end");
    assert_eq!(replies.len(), 2 * wire::SIMPLE_REPLY_LEN);
    wait_for_connections(&server, 0);
}

/// Sends until the socket takes no more.
fn stuff(stream: &mut UnixStream, bytes: &[u8]) {
    stream.set_nonblocking(true).expect("nonblocking");
    let mut refused = 0;
    // Several refusals in a row, with the server running in between: it takes no more either.
    while refused < 1000 {
        match stream.write(bytes) {
            Ok(_) => refused = 0,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_client_that_never_reads_is_bounded_and_disturbs_nobody() {
    let (device, server) = serve(GEOMETRY, |config| {
        config.requests_max = 16;
        config.connection_bytes_max = 1 << 20;
        config.stop_grace = Duration::from_millis(1);
    });
    let mut good = connect(&server, &Options::default());
    // Reads whose replies nobody takes; refused requests, whose replies nobody takes either; options, the same.
    let mut reader = raw(&server);
    stuff(&mut reader, &request(command::READ, 0, 512 << 10));
    let mut fool = raw(&server);
    stuff(&mut fool, &request(99, 0, 0).repeat(100));
    let mut prober = server.connect().expect("room");
    prober.write_all(&[0, 0, 0, 3]).expect("sent");
    let mut list = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    list.extend_from_slice(&[0, 0, 0, 3, 0, 0, 0, 0]);
    prober.write_all(&list.repeat(200)).expect("sent");
    for _ in 0..100 {
        good.write(0, &[1; 4096], false).expect("undisturbed");
        assert_eq!(good.read(0, 4096).expect("undisturbed"), [1; 4096]);
    }
    assert!(device.waiting() == 0);
    let connections = server.connections();
    assert_eq!(connections.len(), 4);
    assert!(connections.iter().all(|connection| connection.in_flight <= 16), "{connections:?}");
    server.stop().expect("stuck clients do not keep the server");
}
