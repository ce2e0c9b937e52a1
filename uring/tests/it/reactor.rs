//! Goal: the ring does to a file what was asked, gives every buffer back once, wakes, and can be dropped at any time.
//! Method: real temporary files, cached and direct, against a byte vector.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_uring::{AlignedBuf, Allocate, FileSlot, Io, Op, Reactor, Token, Wait};

use crate::common::{Rng, buffer, next, open, run};

/// Places that operations choose from; each is one block of the test's size.
const BLOCKS: u64 = 64;

#[test]
fn random_operations_match_a_model_cached() -> io::Result<()> {
    random_operations_match_a_model(false, 4096, 1)
}

#[test]
fn random_operations_match_a_model_cached_in_sectors() -> io::Result<()> {
    random_operations_match_a_model(false, 512, 3)
}

#[test]
fn random_operations_match_a_model_direct() -> io::Result<()> {
    random_operations_match_a_model(true, 4096, 2)
}

/// Many operations in flight, never two on one block: then the order cannot matter and the model is exact.
fn random_operations_match_a_model(direct: bool, block: usize, seed: u64) -> io::Result<()> {
    let mut rng = Rng(seed);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = folder.path().join("disk");
    let file = Arc::new(open(&path, direct)?);
    file.set_len(BLOCKS * block as u64)?;
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(16)?;
    let slot = reactor.register(Arc::clone(&file))?;
    let mut model = vec![0u8; BLOCKS as usize * block];
    let mut busy = [None::<(u64, u64, bool)>; BLOCKS as usize];

    for _ in 0..2000 {
        let first = rng.below(BLOCKS);
        let count = 1 + rng.below(4.min(BLOCKS - first));
        let overlaps = |other: &Option<(u64, u64, bool)>| {
            other.is_some_and(|(start, blocks, _)| start < first + count && first < start + blocks)
        };
        if busy.iter().any(overlaps) || reactor.in_flight() > 40 {
            settle(&mut reactor, &mut busy, &model, block);
            continue;
        }
        let (offset, len) = (first * block as u64, count as usize * block);
        let range = offset as usize..offset as usize + len;
        let len32 = u32::try_from(len).expect("small");
        let token = Token::device(first);
        let mut buf = AlignedBuf::zeroed(len);
        let choice = rng.below(8);
        busy[first as usize] = Some((first, count, choice < 3));
        match choice {
            0..=2 => reactor.submit(token, Op::Read { file: slot, offset, buf, len: len32 }),
            3..=5 => {
                rng.fill(&mut buf);
                model[range].copy_from_slice(&buf);
                match choice {
                    5 => reactor.submit(token, Op::WriteThenSync { file: slot, offset, buf, len: len32 }),
                    dsync => {
                        reactor.submit(token, Op::Write { file: slot, offset, buf, len: len32, dsync: dsync == 4 })
                    }
                }
            }
            _ => {
                model[range].fill(0);
                let mode = if choice == 6 { Allocate::PunchHole } else { Allocate::ZeroRange };
                reactor.submit(token, Op::Allocate { file: slot, mode, offset, len: len as u64 });
            }
        }
    }
    settle(&mut reactor, &mut busy, &model, block);
    assert!(run(&mut reactor, Op::Sync { file: slot }).result.is_ok());
    assert_eq!(std::fs::read(&path)?, model, "seed {seed}");
    Ok(())
}

fn settle(reactor: &mut Reactor<AlignedBuf>, busy: &mut [Option<(u64, u64, bool)>], model: &[u8], block: usize) {
    while busy.iter().any(Option::is_some) {
        let done = next(reactor);
        let (first, count, read) = busy[done.token.value() as usize].take().expect("completed once");
        let bytes = count as usize * block;
        let moved = done.result.expect("no error on a plain file");
        if let Some(buf) = done.buf {
            assert_eq!((moved as usize, buf.len()), (bytes, bytes));
            if read {
                let start = first as usize * block;
                assert_eq!(&buf[..], &model[start..start + bytes]);
            }
        }
    }
    assert!(reactor.poll_completion().is_none() && reactor.in_flight() == 0, "completion of nothing");
}

fn small_file(len: u64) -> io::Result<(tempfile::TempDir, Arc<std::fs::File>)> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let file = Arc::new(open(&folder.path().join("file"), false)?);
    file.set_len(len)?;
    Ok((folder, file))
}

#[test]
fn read_past_the_end_is_unexpected_eof_and_gives_the_buffer_back() -> io::Result<()> {
    let (_folder, file) = small_file(6000)?;
    let mut reactor = Reactor::new(8)?;
    let slot = reactor.register(file)?;
    let done = run(&mut reactor, Op::Read { file: slot, offset: 4096, buf: buffer(4096, 1), len: 4096 });
    assert_eq!(done.result.expect_err("short").kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(done.buf.map(|buf| buf.len()), Some(4096));
    Ok(())
}

#[test]
fn errors_name_the_operation_and_leave_the_others_alone() -> io::Result<()> {
    let (folder, file) = small_file(8192)?;
    let read_only = Arc::new(std::fs::File::open(folder.path().join("file"))?);
    let mut reactor = Reactor::new(8)?;
    let (good, bad) = (reactor.register(file)?, reactor.register(read_only)?);
    for (tag, file) in [(1, good), (2, bad), (3, good)] {
        reactor.submit(Token::device(tag), Op::WriteThenSync { file, offset: 0, buf: buffer(512, 7), len: 512 });
    }
    let mut ended: Vec<_> = (0..3).map(|_| next(&mut reactor)).collect();
    ended.sort_by_key(|done| done.token);
    assert_eq!(ended[0].result.as_ref().ok(), Some(&512));
    assert_eq!(ended[1].result.as_ref().err().and_then(io::Error::raw_os_error), Some(libc::EBADF));
    assert_eq!(ended[2].result.as_ref().ok(), Some(&512));
    assert!(ended.iter().all(|done| done.buf.is_some()));
    Ok(())
}

#[test]
fn many_more_operations_than_the_ring_holds_all_end() -> io::Result<()> {
    let (_folder, file) = small_file(1 << 20)?;
    let mut reactor = Reactor::new(8)?;
    let slot = reactor.register(Arc::clone(&file))?;
    for tag in 0..1000u64 {
        let buf = buffer(512, u8::try_from(tag % 251).expect("small"));
        reactor.submit(Token::device(tag), Op::WriteThenSync { file: slot, offset: tag * 512, buf, len: 512 });
    }
    let mut seen = [false; 1000];
    for _ in 0..1000 {
        let done = next(&mut reactor);
        assert_eq!(done.result.expect("written"), 512);
        assert!(!std::mem::replace(&mut seen[done.token.value() as usize], true), "ended twice");
    }
    let mut back = vec![0; 512];
    for tag in 0..1000u64 {
        file.read_exact_at(&mut back, tag * 512)?;
        assert!(back.iter().all(|&byte| u64::from(byte) == tag % 251));
    }
    assert_eq!(reactor.in_flight(), 0);
    Ok(())
}

#[test]
fn a_slot_is_reused_only_after_its_operations() -> io::Result<()> {
    let (_folder, first) = small_file(4096)?;
    let (_other_folder, second) = small_file(4096)?;
    let mut reactor = Reactor::new(8)?;
    let slot = reactor.register(Arc::clone(&first))?;
    // Not handed to the kernel yet when the slot is given back.
    reactor
        .submit(Token::device(1), Op::Write { file: slot, offset: 0, buf: buffer(4096, 9), len: 4096, dsync: false });
    reactor.unregister(slot);
    let other = reactor.register(Arc::clone(&second))?;
    assert_ne!(slot, other);
    assert!(next(&mut reactor).result.is_ok());
    let mut byte = [0];
    first.read_exact_at(&mut byte, 4095)?;
    assert_eq!(byte, [9]);
    second.read_exact_at(&mut byte, 4095)?;
    assert_eq!(byte, [0]);
    assert_eq!(Arc::strong_count(&first), 1, "given back after its last operation");
    assert_eq!(reactor.register(first)?, slot);
    Ok(())
}

#[test]
#[should_panic(expected = "used after it was given back")]
fn a_slot_that_was_given_back_is_refused() {
    let (_folder, file) = small_file(4096).expect("temporary file");
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8).expect("ring");
    let slot = reactor.register(file).expect("registered");
    reactor.unregister(slot);
    reactor.submit(Token::device(1), Op::Sync { file: slot });
}

#[test]
fn file_table_full_is_an_error_and_recovers() -> io::Result<()> {
    let (_folder, file) = small_file(0)?;
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    let mut slots: Vec<FileSlot> = Vec::new();
    let error = loop {
        match reactor.register(Arc::clone(&file)) {
            Ok(slot) => slots.push(slot),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    assert!(slots.len() >= 16);
    reactor.unregister(slots.pop().expect("many"));
    reactor.register(file)?;
    Ok(())
}

#[test]
fn buffers_in_a_registered_region_are_read_and_written() -> io::Result<()> {
    let (_folder, file) = small_file(1 << 20)?;
    // A leaked mapping stays for as long as any reactor.
    let region: &'static mut [u8] = Box::leak(vec![0u8; 1 << 20].into_boxed_slice());
    let mut reactor: Reactor<&'static mut [u8]> = Reactor::new(8)?;
    // SAFETY: leaked, so mapped for ever.
    unsafe { reactor.register_buffer_region(region.as_ptr(), region.len()) }?;
    let slot = reactor.register(file)?;
    let (data, rest) = region.split_at_mut(4096);
    data.fill(0xa5);
    reactor.submit(Token::device(1), Op::Write { file: slot, offset: 8192, buf: data, len: 4096, dsync: true });
    while reactor.in_flight() > 0 {
        reactor.run_once(Wait::Until(None))?;
    }
    assert_eq!(reactor.poll_completion().expect("ended").result?, 4096);
    reactor.submit(Token::device(2), Op::Read { file: slot, offset: 8192, buf: rest, len: 4096 });
    while reactor.in_flight() > 0 {
        reactor.run_once(Wait::Until(None))?;
    }
    let done = reactor.poll_completion().expect("ended");
    assert_eq!(done.result?, 4096);
    assert!(done.buf.expect("given back")[..4096].iter().all(|&byte| byte == 0xa5));
    Ok(())
}

#[test]
fn wakes_from_other_threads_are_never_lost() -> io::Result<()> {
    // Each round waits without a deadline for a wake that another thread sends at an arbitrary moment: a lost wake hangs.
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    let waker = reactor.waker();
    let (go, went) = std::sync::mpsc::sync_channel::<()>(0);
    let other = std::thread::spawn(move || {
        let mut spin = Rng(3);
        while went.recv().is_ok() {
            for _ in 0..spin.below(2000) {
                std::hint::spin_loop();
            }
            waker.wake();
        }
    });
    for _ in 0..20_000 {
        go.send(()).expect("the other thread lives");
        while !reactor.take_wakeup() {
            reactor.run_once(Wait::Until(None))?;
        }
    }
    drop(go);
    other.join().expect("no panic");
    assert!(!reactor.take_wakeup());
    Ok(())
}

#[test]
fn a_wake_before_the_wait_ends_it_and_a_deadline_does_too() -> io::Result<()> {
    let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
    reactor.waker().wake();
    reactor.run_once(Wait::Until(None))?;
    assert!(reactor.take_wakeup());
    let deadline = Instant::now() + Duration::from_millis(5);
    while Instant::now() < deadline {
        reactor.run_once(Wait::Until(Some(deadline)))?;
    }
    assert!(!reactor.take_wakeup());
    reactor.run_once(Wait::No)?;
    Ok(())
}

#[test]
fn dropped_with_operations_in_every_stage() -> io::Result<()> {
    for submitted in [0, 1, 7, 100] {
        for turns in [0, 1, 3] {
            let (_folder, file) = small_file(1 << 20)?;
            let mut reactor = Reactor::new(8)?;
            let slot = reactor.register(Arc::clone(&file))?;
            for tag in 0..submitted {
                let (offset, buf) = (tag * 4096, buffer(4096, 3));
                reactor.submit(Token::device(tag), Op::WriteThenSync { file: slot, offset, buf, len: 4096 });
            }
            for _ in 0..turns {
                reactor.run_once(Wait::No)?;
            }
            drop(reactor);
            assert_eq!(Arc::strong_count(&file), 1);
        }
    }
    Ok(())
}
