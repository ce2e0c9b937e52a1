//! Goal: the simulated ring runs everything once, in any order, the same for the same seed, and its disk loses exactly what
//! a disk may lose. Method: random operations without overlaps against a byte vector; hand-made faults.

use farshore_uring::sim::{DiskFault, DiskOp, SimDisk, SimIo, World};
use farshore_uring::{AlignedBuf, Allocate, FileSlot, Io, Op, Token};

use crate::common::buffer;

const SIZE: u64 = 1 << 20;

fn world(seed: u64) -> (World, SimDisk, SimIo<AlignedBuf>, FileSlot) {
    let mut world = World::new(seed);
    let disk = world.disk(SIZE);
    let mut io = world.io(&[&disk]);
    let slot = io.register(disk.file()).expect("attached");
    (world, disk, io, slot)
}

fn write(file: FileSlot, offset: u64, byte: u8) -> Op<AlignedBuf> {
    Op::Write { file, offset, buf: buffer(4096, byte), len: 4096, dsync: false }
}

/// One run; returns the order of completions.
fn random_run(seed: u64) -> Vec<u64> {
    let (mut world, disk, mut io, slot) = world(seed);
    let mut model = vec![0u8; usize::try_from(SIZE).expect("small")];
    let mut order = Vec::new();
    for round in 0..20 {
        // Each operation of a round has its own 64 KiB.
        for place in 0..16u64 {
            let offset = place * 65_536 + world.rng().below(100) * 512;
            let len = 512 * (1 + u32::try_from(world.rng().below(20)).expect("small"));
            let at = usize::try_from(offset).expect("small");
            let range = at..at + len as usize;
            let token = Token::device(round * 16 + place);
            let mut buf = AlignedBuf::zeroed(len as usize);
            match world.rng().below(5) {
                0 => io.submit(token, Op::Read { file: slot, offset, buf, len }),
                1 => {
                    model[range].fill(0);
                    io.submit(token, Op::Allocate { file: slot, mode: Allocate::PunchHole, offset, len: len.into() });
                }
                choice => {
                    world.rng().fill(&mut buf);
                    model[range].copy_from_slice(&buf);
                    match choice {
                        2 => io.submit(token, Op::WriteThenSync { file: slot, offset, buf, len }),
                        dsync => io.submit(token, Op::Write { file: slot, offset, buf, len, dsync: dsync == 3 }),
                    }
                }
            }
        }
        io.submit(Token::device(9999), Op::Sync { file: slot });
        io.run_until_idle();
        assert_eq!(io.in_flight(), 0);
        while let Some(done) = io.poll_completion() {
            assert!(done.result.is_ok());
            order.push(done.token.value());
        }
        let mut found = vec![0; model.len()];
        disk.peek(0, &mut found);
        assert!(found == model, "seed {seed}");
    }
    assert_eq!(io.overlapping_writes(), 0);
    order
}

#[test]
fn random_operations_match_a_model_in_an_order_that_the_seed_decides() {
    let orders: Vec<_> = (0..10).map(random_run).collect();
    for (seed, order) in orders.iter().enumerate() {
        assert_eq!(order.len(), 20 * 17);
        assert!(*order == random_run(seed as u64), "seed {seed} twice");
        assert!(!order.is_sorted());
    }
    assert_ne!(orders[0], orders[1]);
}

#[test]
fn a_sync_covers_what_had_ended_and_the_rest_is_anybodys_guess() {
    let (mut survived, mut lost) = (0, 0);
    for seed in 0..100 {
        let (mut world, disk, mut io, slot) = world(seed);
        io.submit(Token::device(1), write(slot, 0, 1));
        assert!(io.finish(Token::device(1)));
        io.submit(Token::device(2), Op::Sync { file: slot });
        io.submit(Token::device(3), write(slot, 4096, 3));
        assert!(io.finish(Token::device(2)));
        io.kill();
        disk.crash(world.rng());
        let mut found = [0; 8192];
        disk.peek(0, &mut found);
        assert!(found[..4096].iter().all(|&byte| byte == 1), "seed {seed}");
        match found[4096..].iter().filter(|&&byte| byte == 3).count() {
            0 => lost += 1,
            bytes => {
                assert_eq!(bytes % 512, 0);
                survived += 1;
            }
        }
    }
    assert!(survived > 10 && lost > 10, "{survived} {lost}");
}

#[test]
fn a_pair_is_durable_when_it_ends_and_dsync_too() {
    for seed in 0..50 {
        let (mut world, disk, mut io, slot) = world(seed);
        io.submit(Token::device(1), Op::WriteThenSync { file: slot, offset: 0, buf: buffer(512, 1), len: 512 });
        io.submit(Token::device(2), Op::Write { file: slot, offset: 512, buf: buffer(512, 2), len: 512, dsync: true });
        io.run_until_idle();
        io.kill();
        disk.crash(world.rng());
        let mut found = [0; 1024];
        disk.peek(0, &mut found);
        assert!(found[..512] == [1; 512] && found[512..] == [2; 512]);
        disk.peek_durable(0, &mut found);
        assert_eq!(found[0], 1);
    }
}

#[test]
fn faults_errors_delays_hangs() {
    let (_world, disk, mut io, slot) = world(5);
    disk.set_fault(|op| match op {
        DiskOp::Write { offset: 0, .. } => DiskFault::Error(libc::EIO),
        DiskOp::Write { offset: 8192, .. } => DiskFault::Hang,
        DiskOp::Write { offset: 16384, .. } => DiskFault::Delay(1000),
        DiskOp::Write { .. } | DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    for (tag, offset) in [(0, 0), (1, 4096), (2, 8192), (3, 16384)] {
        io.submit(Token::device(tag), write(slot, offset, 9));
    }
    io.run_until_idle();
    let ended: Vec<_> =
        std::iter::from_fn(|| io.poll_completion()).map(|done| (done.token.value(), done.result)).collect();
    assert_eq!(ended.len(), 3);
    assert_eq!(ended[2].0, 3, "the delayed one comes last");
    let failed = ended.iter().find(|(tag, _)| *tag == 0).expect("ended");
    assert_eq!(failed.1.as_ref().err().and_then(std::io::Error::raw_os_error), Some(libc::EIO));
    assert_eq!(io.in_flight(), 1);
    assert!(!io.step() && !io.finish(Token::device(2)));
    disk.clear_fault();
    io.run_until_idle();
    assert_eq!(io.poll_completion().map(|done| done.token), Some(Token::device(2)));
}

#[test]
fn nothing_ends_after_the_crash_point() {
    let (mut world, disk, mut io, slot) = world(6);
    disk.crash_at(Some(3));
    for tag in 0..10 {
        io.submit(Token::device(tag), write(slot, tag * 4096, 1));
    }
    io.run_until_idle();
    assert!(disk.has_crashed());
    assert_eq!((disk.op_count(), io.in_flight()), (3, 7));
    io.kill();
    let fork = disk.fork();
    disk.crash(world.rng());
    assert!(!disk.has_crashed());
    let mut io: SimIo<AlignedBuf> = world.io(&[&fork]);
    let slot = io.register(fork.file()).expect("attached");
    assert!(io.register(disk.file()).is_err(), "not attached to this one");
    io.submit(Token::device(1), Op::Sync { file: slot });
    io.run_until_idle();
    assert!(io.poll_completion().expect("ended").result.is_ok());
}

#[test]
fn overlapping_writes_are_counted_and_wakes_are_seen() {
    let (_world, _disk, mut io, slot) = world(7);
    io.submit(Token::device(1), write(slot, 0, 1));
    io.submit(Token::device(2), write(slot, 4096, 1));
    assert_eq!(io.overlapping_writes(), 0);
    let zero = Op::Allocate { file: slot, mode: Allocate::ZeroRange, offset: 4096, len: 512 };
    io.submit(Token::device(3), zero);
    assert_eq!(io.overlapping_writes(), 1);
    let waker = io.waker();
    assert!(!io.take_wakeup());
    waker.wake();
    waker.wake();
    assert!(io.take_wakeup() && !io.take_wakeup());
}

#[test]
#[should_panic(expected = "outside of a disk")]
fn operations_outside_of_the_disk_are_the_callers_fault() {
    let (_world, _disk, mut io, slot) = world(8);
    io.submit(Token::device(1), write(slot, SIZE - 512, 1));
}
