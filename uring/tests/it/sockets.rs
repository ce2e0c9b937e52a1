//! Goal: the socket operations move every byte once and in order, survive short transfers, and end when told to.
//! Method: socket pairs with small buffers, a peer thread with plain reads and writes.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use farshore_uring::{AlignedBuf, FileSlot, NetEvent, Reactor, SEND_PIECES_MAX, SendBuf, SendList, Token, Wait};

use crate::common::{Rng, buffer, next_net};

fn pair() -> io::Result<(Reactor<AlignedBuf>, FileSlot, UnixStream)> {
    let (ours, peer) = UnixStream::pair()?;
    let mut reactor = Reactor::new(8)?;
    let slot = reactor.register_socket(ours.into())?;
    Ok((reactor, slot, peer))
}

const TOKEN: Token = Token::front(42);

#[test]
fn receive_fills_the_payload_and_then_the_next_header() -> io::Result<()> {
    let (mut reactor, slot, mut peer) = pair()?;
    peer.write_all(b"0123456789HEADERxyz")?;
    reactor.recv(TOKEN, slot, Some((buffer(12, 0), 2..12)), Some((buffer(64, 0), 1..7)), false);
    let done = next_net(&mut reactor);
    assert_eq!((done.token, done.result?), (TOKEN, 16));
    let NetEvent::Received { first: Some(first), second: Some(second) } = done.event else {
        panic!("{:?}", done.event)
    };
    assert_eq!(&first[..], b"\0\x000123456789");
    assert_eq!(&second[..8], b"\0HEADER\0");

    // Short: only part of the first piece is there.
    reactor.recv(TOKEN, slot, Some((first, 0..12)), Some((second, 0..7)), false);
    let done = next_net(&mut reactor);
    assert_eq!(done.result?, 3);
    let NetEvent::Received { first: Some(first), second: Some(second) } = done.event else {
        panic!("{:?}", done.event)
    };
    assert_eq!(&first[..3], b"xyz");

    drop(peer);
    reactor.recv(TOKEN, slot, Some((first, 0..1)), Some((second, 0..1)), false);
    assert_eq!(next_net(&mut reactor).result?, 0, "end of the stream");
    Ok(())
}

#[test]
fn receive_of_all_continues_over_the_pieces() -> io::Result<()> {
    for seed in 0..20 {
        let mut rng = Rng(seed);
        let (mut reactor, slot, mut peer) = pair()?;
        let mut sent = vec![0; 300_000];
        rng.fill(&mut sent);
        let expected = sent.clone();
        let writer = std::thread::spawn(move || {
            let mut rest = &sent[..];
            while !rest.is_empty() {
                let now = rest.len().min(1 + usize::try_from(rng.below(40_000)).expect("small"));
                peer.write_all(&rest[..now]).expect("the reader lives");
                rest = &rest[now..];
            }
        });
        let split = 123_457;
        reactor.recv(TOKEN, slot, Some((buffer(split, 0), 0..split)), Some((buffer(200_000, 0), 0..200_000)), true);
        let done = next_net(&mut reactor);
        assert_eq!(done.result? as usize, expected.len(), "short only at the end of the stream");
        let NetEvent::Received { first: Some(first), second: Some(second) } = done.event else {
            panic!("{:?}", done.event)
        };
        assert_eq!(&first[..], &expected[..split]);
        assert_eq!(&second[..expected.len() - split], &expected[split..]);
        writer.join().expect("no panic");
    }
    Ok(())
}

#[test]
fn send_of_a_list_far_beyond_the_socket_buffer_arrives_in_order() -> io::Result<()> {
    let (ours, mut peer) = UnixStream::pair()?;
    nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::SndBuf, &4096)?;
    // Non-blocking sockets must work too.
    ours.set_nonblocking(true)?;
    let mut reactor = Reactor::new(8)?;
    let slot = reactor.register_socket(ours.into())?;
    let mut rng = Rng(5);
    let mut list = SendList::new();
    let mut expected = Vec::new();
    while !list.is_full() {
        let len = usize::try_from(rng.below(50_000)).expect("small");
        let mut buf = AlignedBuf::zeroed(len);
        rng.fill(&mut buf);
        let start = usize::try_from(rng.below(len as u64 + 1)).expect("small");
        expected.extend_from_slice(&buf[start..]);
        if rng.below(2) == 0 { list.push_own(buf, start..len) } else { list.push_device(buf, start..len) }
    }
    assert_eq!((list.len(), list.bytes()), (SEND_PIECES_MAX, expected.len()));
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        peer.read_to_end(&mut got).expect("readable");
        got
    });
    reactor.send(TOKEN, slot, list);
    let done = next_net(&mut reactor);
    assert_eq!(done.result? as usize, expected.len());
    let NetEvent::Sent(mut list) = done.event else { panic!("{:?}", done.event) };
    assert_eq!(
        list.drain().filter(|piece| matches!(piece, SendBuf::Own(_) | SendBuf::Device(_))).count(),
        SEND_PIECES_MAX
    );
    assert!(list.is_empty() && list.bytes() == 0);
    reactor.close(slot);
    assert!(reader.join().expect("no panic") == expected, "bytes differ");
    Ok(())
}

#[test]
fn both_directions_at_once_with_sends_back_to_back() -> io::Result<()> {
    // An echo server on one ring against a client that writes and reads from two threads.
    let (mut reactor, slot, peer) = pair()?;
    let mut expected = vec![0; 2_000_000];
    Rng(11).fill(&mut expected);
    let (mut reading, mut writing) = (peer.try_clone()?, peer);
    let sent = expected.clone();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).expect("the server lives");
        writing.shutdown(std::net::Shutdown::Write).expect("connected");
    });
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        reading.read_to_end(&mut got).expect("readable");
        got
    });
    let mut list = Some(SendList::new());
    let mut input = Some(buffer(65_536, 0));
    let mut ended = false;
    while !ended || list.is_none() {
        if let Some(buf) = input.take_if(|_| !ended) {
            reactor.recv(TOKEN, slot, None, Some((buf, 0..65_536)), false);
        }
        let done = next_net(&mut reactor);
        let bytes = done.result? as usize;
        match done.event {
            NetEvent::Received { second: Some(buf), .. } if bytes > 0 => {
                let mut list = list.take().unwrap_or_default();
                list.push_own(buf, 0..bytes);
                reactor.send(TOKEN, slot, list);
            }
            NetEvent::Received { .. } => ended = true,
            NetEvent::Sent(mut sent) => {
                input = sent.drain().find_map(|piece| match piece {
                    SendBuf::Own(buf) => Some(buf),
                    SendBuf::Device(_) => None,
                });
                list = Some(sent);
            }
            other @ (NetEvent::Accepted(_) | NetEvent::Timeout) => panic!("{other:?}"),
        }
    }
    reactor.shutdown(slot);
    writer.join().expect("no panic");
    assert!(reader.join().expect("no panic") == expected, "bytes differ");
    Ok(())
}

#[test]
fn accepts_connections_and_close_cancels_the_next_accept() -> io::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    let listener = reactor.register_socket(UnixListener::bind(&path)?.into())?;
    for _ in 0..3 {
        reactor.accept(TOKEN, listener);
        let mut client = UnixStream::connect(&path)?;
        let done = next_net(&mut reactor);
        assert!(done.result.is_ok());
        let NetEvent::Accepted(Some(socket)) = done.event else { panic!("{:?}", done.event) };
        let mut served = UnixStream::from(socket);
        served.write_all(b"hello")?;
        let mut got = [0; 5];
        client.read_exact(&mut got)?;
        assert_eq!(&got, b"hello");
    }
    reactor.accept(TOKEN, listener);
    reactor.run_once(Wait::No)?;
    reactor.close(listener);
    let done = next_net(&mut reactor);
    assert_eq!(done.result.expect_err("cancelled").raw_os_error(), Some(libc::ECANCELED));
    assert!(matches!(done.event, NetEvent::Accepted(None)));
    assert!(UnixStream::connect(&path).is_err(), "closed");
    Ok(())
}

#[test]
fn close_ends_a_waiting_receive_and_a_stuck_send_and_then_the_peer_sees_it() -> io::Result<()> {
    for submitted in [false, true] {
        let (mut reactor, slot, mut peer) = pair()?;
        let mut list = SendList::new();
        list.push_own(buffer(4 << 20, 1), 0..4 << 20);
        reactor.send(Token::front(1), slot, list);
        reactor.recv(Token::front(2), slot, Some((buffer(16, 0), 0..16)), None, false);
        if submitted {
            reactor.run_once(Wait::No)?;
        }
        reactor.close(slot);
        for _ in 0..2 {
            let done = next_net(&mut reactor);
            assert_eq!(done.result.expect_err("cancelled").raw_os_error(), Some(libc::ECANCELED));
            match done.event {
                NetEvent::Sent(list) => assert_eq!((done.token, list.len()), (Token::front(1), 1)),
                NetEvent::Received { first, .. } => assert_eq!((done.token, first.is_some()), (Token::front(2), true)),
                other @ (NetEvent::Accepted(_) | NetEvent::Timeout) => panic!("{other:?}"),
            }
        }
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest)?;
        assert!(rest.len() < 4 << 20);
    }
    Ok(())
}

#[test]
fn a_peer_that_has_gone_is_an_error_not_a_signal() -> io::Result<()> {
    let (mut reactor, slot, peer) = pair()?;
    drop(peer);
    let mut list = SendList::new();
    list.push_own(buffer(16, 1), 0..16);
    list.push_device(buffer(16, 1), 0..16);
    reactor.send(TOKEN, slot, list);
    let done = next_net(&mut reactor);
    assert_eq!(done.result.expect_err("gone").raw_os_error(), Some(libc::EPIPE));
    Ok(())
}

#[test]
fn an_empty_send_ends_at_once() -> io::Result<()> {
    let (mut reactor, slot, _peer) = pair()?;
    reactor.send(TOKEN, slot, SendList::new());
    assert_eq!(reactor.poll_net().expect("ended").result?, 0);
    Ok(())
}

#[test]
fn timers_fire_in_order_and_can_be_cancelled() -> io::Result<()> {
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    let start = Instant::now();
    reactor.timeout(Token::front(3), start + Duration::from_secs(3600));
    reactor.timeout(Token::front(2), start + Duration::from_millis(30));
    reactor.timeout(Token::front(1), start + Duration::from_millis(10));
    for expected in [1, 2] {
        let done = next_net(&mut reactor);
        assert_eq!(done.token, Token::front(expected));
        assert!(done.result.is_ok() && matches!(done.event, NetEvent::Timeout));
    }
    assert!(start.elapsed() >= Duration::from_millis(30), "not early");
    reactor.cancel(Token::front(3));
    let done = next_net(&mut reactor);
    assert_eq!(done.result.expect_err("cancelled").raw_os_error(), Some(libc::ECANCELED));
    Ok(())
}

#[test]
fn dropped_while_sockets_and_timers_wait() -> io::Result<()> {
    for turns in [0, 1, 2] {
        let (mut reactor, slot, mut peer) = pair()?;
        reactor.recv(TOKEN, slot, Some((buffer(16, 0), 0..16)), Some((buffer(16, 0), 0..16)), true);
        let mut list = SendList::new();
        list.push_own(buffer(4 << 20, 1), 0..4 << 20);
        reactor.send(TOKEN, slot, list);
        reactor.timeout(TOKEN, Instant::now() + Duration::from_secs(3600));
        for _ in 0..turns {
            reactor.run_once(Wait::No)?;
        }
        drop(reactor);
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest)?;
    }
    Ok(())
}

#[test]
fn a_socket_slot_takes_any_descriptor_kind_of_stream() -> io::Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let mut client = std::net::TcpStream::connect(listener.local_addr()?)?;
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    let listening = reactor.register_socket(OwnedFd::from(listener))?;
    reactor.accept(TOKEN, listening);
    let NetEvent::Accepted(Some(socket)) = next_net(&mut reactor).event else { panic!("not accepted") };
    let slot = reactor.register_socket(socket)?;
    client.write_all(b"ping")?;
    reactor.recv(TOKEN, slot, None, Some((buffer(4, 0), 0..4)), true);
    let done = next_net(&mut reactor);
    assert_eq!(done.result?, 4);
    Ok(())
}
