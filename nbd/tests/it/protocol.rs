//! What each request does, and what bad ones get.

use std::io;
use std::sync::Arc;

use farshore_nbd::client::{Client, Options};
use farshore_nbd::wire::{self, command, flag, transmission};
use farshore_nbd::{Listen, Server, ServerConfig, ServerHandle};
use farshore_uring::Geometry;
use nix::libc;

use crate::memory::{GEOMETRY, MemoryDevice};
use crate::rng::Rng;

pub(crate) fn serve(geometry: Geometry, change: impl FnOnce(&mut ServerConfig)) -> (Arc<MemoryDevice>, ServerHandle) {
    let device = MemoryDevice::new(geometry, 1);
    let mut config = ServerConfig::new("disk", Listen::Nowhere);
    config.description = "in memory".to_owned();
    change(&mut config);
    let server = Server::start(config, Arc::clone(&device)).expect("a good configuration");
    (device, server)
}

pub(crate) fn connect(server: &ServerHandle, options: &Options) -> Client {
    Client::over(server.connect().expect("room for one more"), options).expect("a handshake")
}

fn all_styles() -> [Options; 4] {
    let modern = Options::default();
    let simple = Options { structured: false, allocation: false, ..modern.clone() };
    let old = Options { export_name: true, no_zeroes: false, export: "disk".to_owned(), ..simple.clone() };
    let old_structured = Options { export_name: true, ..modern.clone() };
    [modern, simple, old, old_structured]
}

fn errno(result: io::Result<impl Sized>) -> i32 {
    let error = result.err().expect("an error of the server");
    error.raw_os_error().unwrap_or_else(|| panic!("not an error of the server: {error}"))
}

#[test]
fn the_export_is_described() {
    let (_, server) = serve(GEOMETRY, |_| {});
    let client = connect(&server, &Options::default());
    let info = client.info();
    assert_eq!(
        (info.size, info.name.as_deref(), info.description.as_deref()),
        (8 << 20, Some("disk"), Some("in memory"))
    );
    assert_eq!(info.block_sizes, Some([512, 4096, 32 << 20]));
    assert!(info.allocation);
    let writing = transmission::SEND_FUA
        | transmission::SEND_TRIM
        | transmission::SEND_WRITE_ZEROES
        | transmission::SEND_FAST_ZERO;
    let always = transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::CAN_MULTI_CONN;
    assert_eq!(info.flags, writing | always | transmission::SEND_DF);
    let error = Client::over(server.connect().expect("room"), &Options { export: "no".into(), ..Options::default() });
    assert_eq!(error.expect_err("no such export").kind(), io::ErrorKind::NotFound);
}

#[test]
fn data_goes_there_and_back_in_every_style() {
    for (seed, options) in (0..).zip(all_styles()) {
        let (device, server) = serve(GEOMETRY, |_| {});
        let mut client = connect(&server, &options);
        let mut rng = Rng::new(seed);
        // 300 000 bytes and more are several device requests; 512 is the smallest.
        for (offset, len) in [(0, 512), (4096, 4096), (65536 - 512, 1024), (1 << 20, 301_056), (4 << 20, 4 << 20)] {
            let data = rng.bytes(len);
            client.write(offset, &data, false).expect("a write");
            assert_eq!(client.read(offset, u32::try_from(len).expect("short")).expect("a read"), data);
        }
        client.flush().expect("a flush");
        assert_eq!(device.flushes(), 1);
        client.zeroes(4096, 2048, 0).expect("zeroes");
        client.trim(1 << 20, 4096, false).expect("a trim");
        assert!(client.read(4096, 2048).expect("a read").iter().all(|&byte| byte == 0));
        assert!(client.read(1 << 20, 4096).expect("a read").iter().all(|&byte| byte == 0));
        let totals = server.stats().totals;
        assert_eq!(
            (totals.reads, totals.writes, totals.flushes, totals.trims, totals.zeroes, totals.errors),
            (7, 5, 1, 1, 1, 0)
        );
        client.disconnect().expect("a goodbye");
    }
}

#[test]
fn fua_reaches_the_device() {
    let (device, server) = serve(GEOMETRY, |_| {});
    let mut client = connect(&server, &Options::default());
    client.write(0, &[1; 4096], true).expect("a write");
    assert_eq!((device.fua(), device.flushes()), (1, 0));
    client.zeroes(0, 4096, flag::FUA | flag::NO_HOLE).expect("zeroes");
    assert_eq!((device.fua(), device.flushes()), (2, 0));
    client.trim(0, 4 << 20, true).expect("a trim in four parts");
    assert_eq!((device.fua(), device.flushes()), (2, 1), "a flush behind the trim");
    client.write(0, &[1; 200_192], true).expect("a write in four parts");
    assert_eq!(device.fua(), 6, "each part is durable");
}

#[test]
fn refused_requests_are_answered_and_the_connection_goes_on() {
    for options in all_styles() {
        let (device, server) = serve(GEOMETRY, |_| {});
        let mut client = connect(&server, &options);
        let mut expect = |kind, flags, offset, len, payload: &[u8], error: u32| {
            client.submit(kind, flags, offset, len, payload).expect("sent");
            let reply = client.receive().expect("a reply");
            assert_eq!(errno(reply.result), i32::try_from(error).expect("small"), "{kind} {flags} {offset} {len}");
        };
        let (end, bad) = (GEOMETRY.size, wire::error::EINVAL);
        expect(command::READ, 0, 1, 512, &[], bad);
        expect(command::READ, 0, 0, 100, &[], bad);
        expect(command::READ, 0, 0, 0, &[], bad);
        expect(command::READ, 0, end, 512, &[], bad);
        expect(command::READ, 0, u64::MAX - 511, 512, &[], bad);
        expect(command::READ, 0, 0, 40 << 20, &[], bad);
        expect(command::WRITE, 0, 7, 512, &[1; 512], bad);
        expect(command::WRITE, 0, 0, 777, &[1; 777], bad);
        expect(command::WRITE, 0, end - 512, 1024, &[1; 1024], wire::error::ENOSPC);
        expect(command::WRITE, flag::REQ_ONE, 0, 512, &[1; 512], bad);
        expect(command::WRITE, 0, 0, 33 << 20, &vec![1; 33 << 20], wire::error::ENOSPC);
        expect(command::WRITE_ZEROES, 0, end, 512, &[], wire::error::ENOSPC);
        expect(command::TRIM, 0, end, 512, &[], bad);
        expect(command::FLUSH, 0, 0, 512, &[], bad);
        expect(command::FLUSH, 0x8000, 0, 0, &[], bad);
        expect(5, 0, 0, 512, &[], bad);
        expect(0xffff, 0xffff, u64::MAX, u32::MAX, &[], bad);
        if !options.allocation {
            expect(command::BLOCK_STATUS, 0, 0, 512, &[], bad);
        }
        assert!(device.content().iter().all(|&byte| byte == 0), "nothing reached the device");
        client.write(0, &[9; 512], false).expect("the connection works");
        assert_eq!(client.read(0, 512).expect("a read"), [9; 512]);
        let totals = server.stats().totals;
        assert_eq!((totals.errors, totals.violations), (if options.allocation { 17 } else { 18 }, 0));
    }
}

#[test]
fn a_write_longer_than_the_maximum_is_drained_on_a_device_that_has_the_room() {
    let (_, server) = serve(Geometry { size: 64 << 20, ..GEOMETRY }, |_| {});
    let mut client = connect(&server, &Options::default());
    client.submit(command::WRITE, 0, 0, 33 << 20, &vec![1; 33 << 20]).expect("sent");
    assert_eq!(errno(client.receive().expect("a reply").result), libc::EINVAL);
    let data = Rng::new(5).bytes(32 << 20);
    client.write(0, &data, false).expect("the longest");
    assert!(client.read(0, 32 << 20).expect("the longest") == data);
    client.submit(command::READ, flag::DF, 0, 40 << 20, &[]).expect("sent");
    assert_eq!(errno(client.receive().expect("a reply").result), libc::EOVERFLOW);
}

#[test]
fn errors_of_the_device_reach_the_client_as_the_protocols() {
    let cases =
        [(libc::EIO, libc::EIO), (libc::EROFS, libc::EPERM), (libc::ENOSPC, libc::ENOSPC), (libc::ENODEV, libc::EIO)];
    for options in all_styles() {
        let (device, server) = serve(GEOMETRY, |_| {});
        let mut client = connect(&server, &options);
        for (device_error, expected) in cases {
            device.fail((1 << 20)..(1 << 20) + 512, device_error);
            assert_eq!(errno(client.read(1 << 20, 4096)), expected);
            assert_eq!(errno(client.write(1 << 20, &[1; 4096], false)), expected);
            assert_eq!(errno(client.trim(1 << 20, 4096, true)), expected);
            assert_eq!(errno(client.zeroes(1 << 20, 4096, 0)), expected);
            // One bad part of many.
            assert_eq!(errno(client.read(0, 2 << 20)), expected);
            assert_eq!(errno(client.write(0, &vec![1; 2 << 20], false)), expected);
            assert_eq!(client.read(0, 4096).expect("elsewhere all is well"), [1; 4096]);
            if options.allocation {
                assert_eq!(errno(client.block_status(1 << 20, 512, false)), expected);
            }
        }
    }
}

#[test]
fn read_only_and_block_size_of_4096() {
    let (_, server) = serve(Geometry { read_only: true, logical_block: 4096, ..GEOMETRY }, |_| {});
    let mut client = connect(&server, &Options::default());
    assert_ne!(client.info().flags & transmission::READ_ONLY, 0);
    assert_eq!(client.info().block_sizes, Some([4096, 4096, 32 << 20]));
    assert_eq!(errno(client.write(0, &[1; 4096], false)), libc::EPERM);
    assert_eq!(errno(client.trim(0, 4096, false)), libc::EPERM);
    assert_eq!(errno(client.zeroes(0, 4096, 0)), libc::EPERM);
    assert_eq!(errno(client.read(512, 4096)), libc::EINVAL);
    assert_eq!(client.read(4096, 4096).expect("a read"), [0; 4096]);
}

#[test]
fn fast_zero_fails_fast_where_zeroing_is_writing() {
    let (_, server) = serve(Geometry { discard: false, ..GEOMETRY }, |_| {});
    let mut client = connect(&server, &Options::default());
    assert_eq!(client.info().flags & transmission::SEND_TRIM, 0);
    assert_eq!(errno(client.zeroes(0, 4096, flag::FAST_ZERO)), libc::EOPNOTSUPP);
    client.zeroes(0, 4096, 0).expect("slow is fine");
    assert_eq!(errno(client.trim(0, 4096, false)), libc::EOPNOTSUPP);
}

#[test]
fn block_status_tells_holes() {
    let (_, server) = serve(GEOMETRY, |_| {});
    let mut client = connect(&server, &Options::default());
    client.write(4096, &[1; 8192], false).expect("a write");
    let hole = wire::STATE_HOLE | wire::STATE_ZERO;
    assert_eq!(client.block_status(0, 65536, false).expect("a status"), [(4096, hole), (8192, 0), (53248, hole)]);
    assert_eq!(client.block_status(8192, 65536, true).expect("a status"), [(4096, 0)]);
    // Far more extents than a reply takes: what comes is right, and the client asks again from there.
    for block in (0..8192).step_by(2) {
        client.write(block * 512, &[1; 512], false).expect("a write");
    }
    let extents = client.block_status(0, 4 << 20, false).expect("a status");
    assert_eq!(extents.len(), 1024);
    let from = u64::from(extents.iter().map(|extent| extent.0).sum::<u32>());
    assert_eq!(
        client.block_status(from, 512, false).expect("a status"),
        [(512, if from % 1024 == 0 { 0 } else { hole })]
    );
}

#[test]
fn a_breach_of_the_protocol_ends_one_connection_only() {
    let (_, server) = serve(GEOMETRY, |_| {});
    let mut good = connect(&server, &Options::default());
    let mut bad = connect(&server, &Options::default());
    bad.write(0, &[3; 512], false).expect("still good");
    // A payload without its request: the next 28 bytes are not a request.
    bad.submit(command::READ, 0, 0, 512, &[0xee; 64]).expect("sent");
    assert_eq!(bad.receive().expect("the request before is answered").data, [3; 512]);
    assert_eq!(bad.receive().expect_err("closed").kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(good.read(0, 512).expect("undisturbed"), [3; 512]);
    assert_eq!(server.stats().totals.violations, 1);
}
