//! Goal: a file served as a device reads back what was written, whatever the file system lacks, and is opened by one at a
//! time. Method: random requests against a byte vector over the real ring (cached and direct) and the simulated one.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use farshore_uring::sim::{DiskFault, DiskOp, SimIo, SimRng, World};
use farshore_uring::{
    AlignedBuf, Allocate, BackingOptions, BlockDevice, BlockQueue, Completion, Direct, Done, Errno, Extent, FileDevice,
    FileQueue, Io, Purpose, Reactor, Request, Wait, open_backing,
};

const SIZE: usize = 4 << 20;

fn disk_file(size: usize) -> io::Result<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = folder.path().join("disk");
    std::fs::File::create(&path)?.set_len(size as u64)?;
    Ok((folder, path))
}

/// A ring that a test can turn.
trait Turn: Io<AlignedBuf> {
    fn turn(&mut self) -> Option<Completion<AlignedBuf>>;
}

impl Turn for Reactor<AlignedBuf> {
    fn turn(&mut self) -> Option<Completion<AlignedBuf>> {
        loop {
            let done = self.poll_completion();
            if done.is_some() || self.in_flight() == 0 {
                return done;
            }
            self.run_once(Wait::Until(None)).expect("the ring turns");
        }
    }
}

impl Turn for SimIo<AlignedBuf> {
    fn turn(&mut self) -> Option<Completion<AlignedBuf>> {
        loop {
            let done = self.poll_completion();
            if done.is_some() || !self.step() {
                return done;
            }
        }
    }
}

fn run<I: Turn>(io: &mut I, queue: &mut FileQueue, request: Request<AlignedBuf>) -> Done<AlignedBuf> {
    queue.submit(io, 77, request);
    loop {
        if let Some(done) = queue.poll_done() {
            assert_eq!(done.tag, 77);
            return done;
        }
        let completion = io.turn().expect("something is in flight");
        queue.handle_completion(io, completion);
    }
}

fn random_requests<I: Turn>(io: &mut I, device: &FileDevice, seed: u64, count: u32) -> Vec<u8> {
    let mut rng = SimRng::new(seed);
    let mut queue = device.open_queue(io).expect("a queue");
    let block = device.geometry().logical_block as usize;
    let mut model = vec![0u8; SIZE];
    for _ in 0..count {
        let start = rng.index(SIZE / block) * block;
        let longest = if rng.chance(1, 10) { SIZE - start } else { (64 << 10).min(SIZE - start) };
        let bytes = (1 + rng.index(longest / block)) * block;
        let (offset, range) = (start as u64, start..start + bytes);
        let len = u32::try_from(bytes.min(device.geometry().max_request as usize)).expect("small");
        let request = match rng.below(6) {
            0 | 1 => Request::Read { offset, len, buf: queue.buffer(Purpose::Read, len) },
            2 | 3 => {
                let mut buf = queue.buffer(Purpose::Write, len);
                rng.fill(&mut buf);
                model[start..start + len as usize].copy_from_slice(&buf[..len as usize]);
                Request::Write { offset, len, buf, fua: rng.chance(1, 8) }
            }
            4 => {
                model[range].fill(0);
                Request::Discard { offset, len: bytes as u64 }
            }
            _ => {
                model[range].fill(0);
                Request::WriteZeroes { offset, len: bytes as u64, fua: rng.chance(1, 8), no_hole: rng.chance(1, 2) }
            }
        };
        let reads = matches!(request, Request::Read { .. });
        let done = run(io, &mut queue, request);
        assert_eq!(done.result, Ok(()), "seed {seed}");
        assert_eq!(done.buf.is_some(), reads);
        if let Some(buf) = done.buf {
            assert!(buf[..len as usize] == model[start..start + len as usize], "seed {seed}");
        }
    }
    assert_eq!(run(io, &mut queue, Request::Flush).result, Ok(()));
    queue.close(io);
    model
}

#[test]
fn random_requests_cached_and_direct() -> io::Result<()> {
    for (seed, direct) in [(1, Direct::Off), (2, Direct::Auto), (3, Direct::On)] {
        let (_folder, path) = disk_file(SIZE)?;
        let device = FileDevice::open(&path, BackingOptions { direct, read_only: false })?;
        assert!(device.backing().direct || direct != Direct::On);
        let mut reactor = Reactor::new(16)?;
        let model = random_requests(&mut reactor, &device, seed, 500);
        assert!(std::fs::read(&path)? == model);
        let extents = device.extents(0, SIZE as u64).expect("extents");
        assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), SIZE as u64);
        let mut at = 0;
        for extent in extents {
            let end = at + usize::try_from(extent.len).expect("small");
            assert!(!extent.zero || model[at..end].iter().all(|&byte| byte == 0), "zero extent at {at} holds data");
            at = end;
        }
    }
    Ok(())
}

#[test]
fn random_requests_where_the_file_system_lacks_holes() {
    for (seed, punches, zeroes) in [(0, true, true), (1, false, true), (2, true, false), (3, false, false)] {
        let mut world = World::new(seed);
        let disk = world.disk(SIZE as u64);
        let device = FileDevice::new(disk.backing());
        let mut io: SimIo<AlignedBuf> = world.io(&[&disk]);
        disk.set_fault(move |op| match op {
            DiskOp::Allocate { mode: Allocate::PunchHole, .. } if !punches => DiskFault::Error(libc::EOPNOTSUPP),
            DiskOp::Allocate { mode: Allocate::ZeroRange, .. } if !zeroes => DiskFault::Error(libc::EOPNOTSUPP),
            DiskOp::Allocate { .. } | DiskOp::Read { .. } | DiskOp::Write { .. } | DiskOp::Sync => DiskFault::None,
        });
        let model = random_requests(&mut io, &device, seed, 300);
        let mut found = vec![0; SIZE];
        disk.peek(0, &mut found);
        assert!(found == model, "seed {seed}");
    }
}

#[test]
fn a_refused_method_is_tried_once_and_the_others_stay_in_use() {
    let mut world = World::new(9);
    let disk = world.disk(SIZE as u64);
    let device = FileDevice::new(disk.backing());
    let mut io: SimIo<AlignedBuf> = world.io(&[&disk]);
    let mut queue = device.open_queue(&mut io).expect("a queue");
    let log = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&log);
    // As tmpfs does.
    disk.set_fault(move |op| {
        noted.lock().expect("no panic").push(*op);
        let refused = matches!(op, DiskOp::Allocate { mode: Allocate::ZeroRange, .. });
        if refused { DiskFault::Error(libc::EOPNOTSUPP) } else { DiskFault::None }
    });
    for _ in 0..2 {
        run(&mut io, &mut queue, Request::WriteZeroes { offset: 0, len: 3 << 19, fua: true, no_hole: true });
        run(&mut io, &mut queue, Request::Discard { offset: 0, len: 4096 });
    }
    let allocate = |mode, len| DiskOp::Allocate { mode, offset: 0, len };
    let write = |offset, len| DiskOp::Write { offset, len, dsync: true };
    let rest = [write(0, 1 << 20), write(1 << 20, 1 << 19), allocate(Allocate::PunchHole, 4096)];
    let mut expected = vec![allocate(Allocate::ZeroRange, 3 << 19)];
    expected.extend(rest);
    expected.extend(rest);
    assert_eq!(*log.lock().expect("no panic"), expected);
}

#[test]
fn errors_reach_the_guest_with_their_number() {
    let mut world = World::new(4);
    let disk = world.disk(SIZE as u64);
    let device = FileDevice::new(disk.backing());
    let mut io: SimIo<AlignedBuf> = world.io(&[&disk]);
    let mut queue = device.open_queue(&mut io).expect("a queue");
    disk.set_fault(|_| DiskFault::Error(libc::ENOSPC));
    let buf = queue.buffer(Purpose::Write, 512);
    let requests = [
        Request::Write { offset: 0, len: 512, buf, fua: false },
        Request::Flush,
        Request::Discard { offset: 0, len: 512 },
        Request::WriteZeroes { offset: 0, len: 512, fua: true, no_hole: true },
    ];
    for request in requests {
        assert_eq!(run(&mut io, &mut queue, request).result, Err(Errno(libc::ENOSPC)));
    }
}

#[test]
fn fua_zeroes_are_durable_and_so_is_a_flush() {
    for seed in 0..40 {
        let mut world = World::new(seed);
        let disk = world.disk(SIZE as u64);
        disk.poke(0, &[9; 8192]);
        let device = FileDevice::new(disk.backing());
        let mut io: SimIo<AlignedBuf> = world.io(&[&disk]);
        let mut queue = device.open_queue(&mut io).expect("a queue");
        run(&mut io, &mut queue, Request::WriteZeroes { offset: 0, len: 4096, fua: true, no_hole: false });
        run(&mut io, &mut queue, Request::Discard { offset: 4096, len: 4096 });
        if seed % 2 == 0 {
            run(&mut io, &mut queue, Request::Flush);
        }
        io.kill();
        disk.crash(world.rng());
        let mut found = [1; 8192];
        disk.peek(0, &mut found);
        let durable = if seed % 2 == 0 { 8192 } else { 4096 };
        assert!(found[..durable].iter().all(|&byte| byte == 0), "seed {seed}");
    }
}

#[test]
fn read_only_refuses_changes_and_shares_with_readers() -> io::Result<()> {
    let (_folder, path) = disk_file(SIZE)?;
    let options = BackingOptions { direct: Direct::Off, read_only: true };
    let device = FileDevice::open(&path, options)?;
    let _second = FileDevice::open(&path, options)?;
    assert!(device.geometry().read_only && !device.geometry().discard);
    let mut reactor = Reactor::new(8)?;
    let mut queue = device.open_queue(&mut reactor)?;
    let buf = queue.buffer(Purpose::Write, 512);
    for request in [Request::Write { offset: 0, len: 512, buf, fua: false }, Request::Discard { offset: 0, len: 512 }] {
        assert_eq!(run(&mut reactor, &mut queue, request).result, Err(Errno(libc::EROFS)));
    }
    assert_eq!(run(&mut reactor, &mut queue, Request::Flush).result, Ok(()));
    let writer = open_backing(&path, BackingOptions { direct: Direct::Off, read_only: false });
    assert_eq!(writer.expect_err("readers hold it").kind(), ErrorKind::WouldBlock);
    Ok(())
}

#[test]
fn one_writer_at_a_time_and_none_left_behind_by_a_ring() -> io::Result<()> {
    let (_folder, path) = disk_file(SIZE)?;
    let mut ids = Vec::new();
    for _ in 0..20 {
        let device = FileDevice::open(&path, BackingOptions::default())?;
        ids.push(device.backing().id.clone());
        let mut reactor: Reactor<AlignedBuf> = Reactor::new(8)?;
        let mut queue = device.open_queue(&mut reactor)?;
        let buf = queue.buffer(Purpose::Write, 4096);
        queue.submit(&mut reactor, 1, Request::Write { offset: 0, len: 4096, buf, fua: false });
        reactor.run_once(Wait::No)?;
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "the same file, the same id");
    let _held = open_backing(&path, BackingOptions::default())?;
    assert_eq!(open_backing(&path, BackingOptions::default()).expect_err("held").kind(), ErrorKind::WouldBlock);
    let (_other_folder, other) = disk_file(SIZE)?;
    assert_ne!(open_backing(&other, BackingOptions::default())?.id, ids[0]);
    Ok(())
}

#[test]
fn geometry_follows_size_and_wish() -> io::Result<()> {
    let (_folder, odd) = disk_file(SIZE + 100)?;
    assert_eq!(open_backing(&odd, BackingOptions::default()).expect_err("odd size").kind(), ErrorKind::InvalidInput);
    let (_folder, sectors) = disk_file(SIZE + 512)?;
    let backing = open_backing(&sectors, BackingOptions { direct: Direct::Off, read_only: false })?;
    assert_eq!((backing.geometry.size, backing.geometry.logical_block), (SIZE as u64 + 512, 512));
    assert!(!backing.direct && !backing.is_block_device && !backing.geometry.read_only);
    let folder = tempfile::tempdir()?;
    assert_eq!(
        open_backing(folder.path(), BackingOptions::default()).expect_err("a folder").kind(),
        ErrorKind::InvalidInput
    );
    let missing = open_backing(&folder.path().join("none"), BackingOptions::default()).expect_err("missing");
    assert!(missing.kind() == ErrorKind::NotFound && missing.to_string().contains("none"), "{missing}");
    Ok(())
}

#[test]
fn extents_of_a_sparse_file() -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let (_folder, path) = disk_file(SIZE)?;
    let device = FileDevice::open(&path, BackingOptions { direct: Direct::Off, read_only: false })?;
    device.backing().file.write_all_at(&[1; 8192], 65536)?;
    let hole = |len| Extent { len, hole: true, zero: true };
    let data = |len| Extent { len, hole: false, zero: false };
    assert_eq!(device.extents(0, SIZE as u64), Ok(vec![hole(65536), data(8192), hole(SIZE as u64 - 73728)]));
    assert_eq!(device.extents(65536 + 512, 512), Ok(vec![data(512)]));
    assert_eq!(device.extents(0, 4096), Ok(vec![hole(4096)]));
    Ok(())
}
