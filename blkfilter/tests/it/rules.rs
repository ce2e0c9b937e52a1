//! Single rules, each with the situation that breaks a simpler filter.

use std::sync::Arc;

use farshore_blkfilter::{Alarm, AlarmEvent, FilterVolume};
use farshore_proto::record::Kind;
use farshore_proto::{Name, Now, VolumeIndex, WallTime};
use farshore_uring::sim::{DiskFault, DiskOp};
use farshore_uring::{BlockDevice, BlockQueue, Errno, Purpose, Request};

use crate::rig::{Config, HoleyDisk, Rig, What};

const SLOT: u64 = 65536;

/// One volume in steady state, with nothing shipped from here on.
fn settled(seed: u64, config: Config) -> Rig {
    let mut rig = Rig::new(seed, config);
    rig.settle();
    rig
}

fn small() -> Config {
    Config { volumes: 1, guests: 2, slab_mib: 1, descriptors: 64, ..Config::default() }
}

fn run_guests(rig: &mut Rig) {
    rig.step += 1;
    for _ in 0..3 {
        for guest in 0..rig.guests.len() {
            while rig.turn_guest(guest) {}
        }
    }
}

fn missing(rig: &Rig) -> Vec<u64> {
    let volume = rig.filters[0].volume().expect("captured");
    (0..volume.missing().bits()).filter(|bit| volume.missing().test(*bit)).collect()
}

/// I1: with the ring full and nobody reading it, every kind of request still ends well.
#[test]
fn a_full_ring_fails_and_blocks_no_request() {
    let mut rig = settled(1, small());
    for round in 0..300_u64 {
        let offset = round % 50 * SLOT;
        rig.submit(0, offset, 4096, What::Write { fua: round % 3 == 0 });
        rig.submit(1, offset + 8192, 128 << 10, What::Write { fua: false });
        rig.submit(0, offset, 65536, What::Discard);
        rig.submit(1, offset, 4096, What::Zeroes { no_hole: true });
        rig.submit(0, offset, 512, What::Read);
        rig.submit(1, 0, 0, What::Flush);
        run_guests(&mut rig);
        assert!(rig.guests.iter().all(|guest| guest.pending.is_empty()), "round {round}");
    }
    assert_eq!(rig.failed, 0);
    assert!(rig.ring.is_closed(), "the ring is full");
    let events: Vec<AlarmEvent> = std::iter::from_fn(|| rig.group.poll_alarm()).collect();
    assert!(events.contains(&AlarmEvent { alarm: Alarm::RingClosed, raised: true }));
    rig.settle();
    rig.check_equal();
    let events: Vec<AlarmEvent> = std::iter::from_fn(|| rig.group.poll_alarm()).collect();
    assert_eq!(events.iter().rfind(|event| event.alarm == Alarm::RingClosed).map(|event| event.raised), Some(false));
}

/// I4: a write without a cell is marked before the backing device sees it, and the ring is closed; the mark stays while it is in
/// flight, whatever sync does.
#[test]
fn without_a_cell_the_mark_comes_before_the_write() {
    let mut rig = settled(2, small());
    // All cells are taken: by buffers that nobody submits.
    let mut buffers = Vec::new();
    loop {
        let buffer = rig.guests[0].queue.buffer(Purpose::Write, 4096);
        let cell = matches!(buffer, farshore_ring::CaptureBuf::Cell(_));
        if !cell {
            break;
        }
        buffers.push(buffer);
    }
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Write { .. } => DiskFault::Hang,
        DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    rig.submit(0, 5 * SLOT + 512, 4096, What::Write { fua: false });
    assert_eq!(missing(&rig), [5]);
    assert!(rig.ring.is_closed());
    drop(buffers);
    // The ring opens again and sync tries for a long time: the write is still in flight.
    for _ in 0..3000 {
        rig.step += 1;
        rig.turn_sync();
        rig.turn_cutter();
        while rig.ship() {}
        while rig.apply() {}
        while rig.hear() {}
        rig.reopen();
    }
    assert!(!rig.ring.is_closed());
    assert_eq!(missing(&rig), [5], "never cleared while a write to the piece is in flight");
    assert!(rig.replica.event_open, "and no point is made meanwhile");
    rig.disks[0].clear_fault();
    rig.settle();
    rig.check_equal();
}

/// A write that was in flight when the ring closed is marked before it is unlocked and acknowledged.
#[test]
fn a_failed_claim_marks() {
    let mut rig = settled(3, small());
    rig.submit(0, 7 * SLOT, 4096, What::Write { fua: false });
    rig.submit(0, 9 * SLOT, 4096, What::Discard);
    assert_eq!(missing(&rig), Vec::<u64>::new(), "their reservations note the ranges");
    rig.ring.close();
    run_guests(&mut rig);
    assert_eq!(missing(&rig), [7, 9]);
    assert_eq!(rig.failed, 0, "I1");
    assert_eq!(rig.group.counters().missed, 2);
    rig.settle();
    rig.check_equal();
}

/// A failed backing write: the guest gets the device's error, the range is missing, an event is open before the guest hears of it, and
/// the payload is in no record.
#[test]
fn a_failed_write_opens_an_event() {
    let mut rig = settled(4, small());
    let writes = rig.replica.count(Kind::Write);
    for (what, code) in [(What::Write { fua: false }, libc::EIO), (What::Discard, libc::ENOSPC)] {
        rig.disks[0].set_fault(move |_: &DiskOp| DiskFault::Error(code));
        rig.submit(0, 3 * SLOT, 8192, what);
        let tag = *rig.guests[0].pending.keys().next().expect("just submitted");
        let guest = &mut rig.guests[0];
        guest.io.run_until_idle();
        let completion = guest.io.poll_completion().expect("it ended");
        guest.queue.handle_completion(&mut guest.io, completion);
        assert!(rig.group.event_open(), "before the guest hears of it");
        assert_eq!(missing(&rig), [3]);
        let done = rig.guests[0].queue.poll_done().expect("it ended");
        assert_eq!((done.tag, done.result), (tag, Err(Errno(code))));
        rig.guests[0].pending.clear();
        rig.disks[0].clear_fault();
        // Nothing of it was acknowledged, so the history has nothing to say; make the slot whole.
        rig.submit(0, 3 * SLOT, 8192, What::Zeroes { no_hole: false });
        rig.settle();
        rig.check_equal();
    }
    assert_eq!(rig.replica.count(Kind::Write), writes);
    let failed = std::iter::from_fn(|| rig.group.poll_alarm()).filter(|e| matches!(e.alarm, Alarm::WriteFailed { .. }));
    assert_eq!(failed.count(), 2);
}

/// I3: of two overlapping writes on different queues the second reaches the device only after the first has its ticket, in that order.
#[test]
fn overlapping_writes_go_one_after_the_other() {
    let mut rig = settled(5, small());
    rig.submit(0, 4096, 8192, What::Write { fua: false });
    rig.submit(1, 8192, 8192, What::Write { fua: true });
    rig.submit(1, 512 << 10, 4096, What::Write { fua: false });
    assert_eq!(
        (rig.guests[0].io.in_flight(), rig.guests[1].io.in_flight()),
        (1, 1),
        "one waits, the third does not care"
    );
    while rig.turn_guest(1) {}
    assert_eq!(rig.guests[1].pending.len(), 1, "a queue that turns without its turn having come");
    let head = rig.ring.head();
    while rig.turn_guest(0) {}
    assert_eq!(rig.ring.head(), head + 1);
    assert_eq!(rig.guests[1].io.in_flight(), 0, "woken on its own thread, not started by another");
    while rig.turn_guest(1) {}
    assert_eq!(rig.ring.head(), head + 2);
    assert!(rig.guests.iter().all(|guest| guest.pending.is_empty()));
    assert_eq!(rig.group.counters().lock_waits, 1);
    rig.settle();
    rig.check_equal();
}

/// FUA is durable at completion, as is a write of zeroes with FUA; discards of 64 MiB are one request.
#[test]
fn fua_is_durable() {
    let mut rig = settled(6, small());
    rig.submit(0, 0, 4096, What::Write { fua: true });
    rig.submit(0, 128 << 10, 1024, What::Zeroes { no_hole: true });
    run_guests(&mut rig);
    let (mut live, mut durable) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    rig.disks[0].peek(0, &mut live);
    rig.disks[0].peek_durable(0, &mut durable);
    assert_eq!(live[..4096], durable[..4096]);
    assert_eq!(live[128 << 10..][..1024], durable[128 << 10..][..1024]);
    let geometry = rig.filters[0].geometry();
    assert_eq!((geometry.max_request, geometry.max_discard), (256 << 10, 64 << 20));
}

/// Where the file system has no way to deallocate or zero, zeroes are written, and discards still read as zeroes.
#[test]
fn discards_read_as_zeroes_everywhere() {
    let mut rig = settled(7, small());
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Allocate { .. } => DiskFault::Error(libc::EOPNOTSUPP),
        DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Write { .. } => DiskFault::None,
    });
    for slot in 0..20 {
        rig.submit(1, slot * SLOT, SLOT, What::Write { fua: false });
    }
    run_guests(&mut rig);
    rig.submit(0, 512, 20 * SLOT - 1024, What::Discard);
    run_guests(&mut rig);
    assert_eq!(rig.failed, 0);
    let mut bytes = vec![1; 20 * 65536 - 1024];
    rig.disks[0].peek(512, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0));
    rig.settle();
    rig.check_equal();
}

/// More requests than there are places wait in line and all end.
#[test]
fn more_requests_than_places() {
    let mut rig = settled(8, Config { slab_mib: 16, descriptors: 4096, ..small() });
    for request in 0..3000_u64 {
        rig.submit(0, request % 500 * 4096, 512, What::Write { fua: false });
    }
    assert_eq!(rig.guests[0].queue.changes_in_flight(), 3000);
    run_guests(&mut rig);
    assert!(rig.guests[0].pending.is_empty());
    rig.settle();
    rig.check_equal();
}

/// A dropped queue holds no range, and what it had in flight is missing.
#[test]
fn a_dropped_queue_holds_nothing() {
    let mut rig = settled(9, small());
    rig.submit(0, 0, 4096, What::Write { fua: false });
    rig.submit(0, 2048, 4096, What::Write { fua: false });
    rig.submit(1, 1024, 4096, What::Write { fua: false });
    let gone = rig.guests.remove(0);
    gone.io.kill();
    drop(gone.queue);
    assert_eq!(missing(&rig), [0]);
    assert!(rig.group.event_open());
    run_guests(&mut rig);
    assert!(rig.guests[0].pending.is_empty(), "the other queue's request got its range");
    let dropped = std::iter::from_fn(|| rig.group.poll_alarm()).find(|e| matches!(e.alarm, Alarm::QueueDropped { .. }));
    assert_eq!(
        dropped,
        Some(AlarmEvent { alarm: Alarm::QueueDropped { volume: VolumeIndex(0), requests: 1 }, raised: true })
    );
}

/// An unprotected volume serves requests and nothing else.
#[test]
fn unprotected_passes_through() {
    let mut rig = settled(10, small());
    let disk = rig.disks[0].clone();
    let filter = FilterVolume::unprotected(HoleyDisk(disk.clone()));
    let mut io = farshore_uring::sim::SimIo::new(rig.rng.fork());
    io.attach(&disk);
    let mut queue = filter.open_queue(&mut io).expect("no owners needed");
    let head = rig.ring.head();
    let mut buf = queue.buffer(Purpose::Write, 4096);
    buf[..4096].fill(0xa5);
    queue.submit(&mut io, 1, Request::Write { offset: 4096, len: 4096, buf, fua: true });
    queue.submit(&mut io, 2, Request::Discard { offset: 65536, len: 65536 });
    queue.submit(&mut io, 3, Request::Flush);
    io.run_until_idle();
    while let Some(completion) = io.poll_completion() {
        queue.handle_completion(&mut io, completion);
    }
    let buf = queue.buffer(Purpose::Read, 4096);
    queue.submit(&mut io, 4, Request::Read { offset: 4096, len: 4096, buf });
    io.run_until_idle();
    while let Some(completion) = io.poll_completion() {
        queue.handle_completion(&mut io, completion);
    }
    let done: Vec<_> = std::iter::from_fn(|| queue.poll_done()).collect();
    assert_eq!(done.len(), 4);
    assert!(done.iter().all(|done| done.result.is_ok()));
    let read =
        done.iter().find(|done| done.tag == 4).and_then(|done| done.buf.as_ref()).expect("a read gives its buffer");
    assert!(read[..4096].iter().all(|byte| *byte == 0xa5));
    assert_eq!(rig.ring.head(), head, "nothing captured");
    queue.close(&mut io);
}

/// Goal: a bookmark whose name finds no room does not keep the ring from being cut: what is in it would never leave it. It has the first cut
/// for whose name there is room.
#[test]
fn a_bookmark_without_room_does_not_keep_back_the_cut() {
    let mut rig = settled(13, Config { descriptors: 4096, ..small() });
    let mut cutter = farshore_blkfilter::Cutter::new(Arc::clone(&rig.group));
    assert!(cutter.poll(Now(1), WallTime(1), true).is_some());
    rig.submit(0, 0, 512, What::Write { fua: false });
    run_guests(&mut rig);
    let producer = rig.ring.producer();
    let held: Vec<_> = std::iter::from_fn(|| producer.reserve_marker(8).ok()).collect();
    let name = Name::new("full").expect("a good name");
    cutter.bookmark(name.clone(), false).expect("open");
    let cut = cutter.poll(Now(2), WallTime(2), false).expect("what was written is cut");
    assert_eq!(cut.bookmark, None);
    assert_eq!(cutter.poll(Now(3), WallTime(3), true), None, "nothing new to cut, and no room for the name");
    drop(held);
    let cut = cutter.poll(Now(4), WallTime(4), false).expect("there is room");
    assert_eq!(cut.bookmark, Some(name));
}

/// Cuts: at once, then `cut_min` apart under load, `cut_max` when idle, none without a slot to ship in; bookmarks at once.
#[test]
fn cuts_come_when_they_should() {
    let mut rig = settled(11, Config { slab_mib: 8, descriptors: 4096, ..small() });
    let ms = |ms: u64| Now(ms * 1_000_000);
    let mut cutter = farshore_blkfilter::Cutter::new(Arc::clone(&rig.group));
    let mut cut = |rig: &Rig, at: u64, free: bool| {
        let _ = rig;
        cutter.poll(ms(at), WallTime(at), free).is_some()
    };
    let write = |rig: &mut Rig| {
        rig.submit(0, 0, 512, What::Write { fua: false });
        run_guests(rig);
    };
    assert!(cut(&rig, 1000, false), "the first at once");
    assert!(!cut(&rig, 1030, true), "nothing new");
    write(&mut rig);
    assert!(!cut(&rig, 1007, true), "too early");
    assert!(cut(&rig, 1008, true));
    assert!(!cut(&rig, 1067, true), "idle");
    assert!(cut(&rig, 1068, true), "heartbeat");
    assert!(!cut(&rig, 2000, false), "no heartbeat into a link that is down");
    write(&mut rig);
    assert!(cut(&rig, 2000, false), "but a cut of what was written");
    assert!(!cut(&rig, 2059, false));

    let name = Name::new("before-upgrade").expect("a good name");
    cutter.bookmark(name.clone(), true).expect("open");
    let made = cutter.poll(ms(2000), WallTime(5), false).expect("a bookmark does not wait");
    assert_eq!(made.bookmark, Some(name.clone()));
    rig.ring.close();
    assert!(cutter.bookmark(name.clone(), false).is_err());
    assert_eq!(cutter.poll(ms(90_000), WallTime(5), true), None, "no cut in a closed stream");
    rig.settle();
    let (_, _, _, app) =
        *rig.replica.cuts.iter().find(|(_, _, bookmark, _)| bookmark == name.as_str()).expect("shipped");
    assert!(app);
}
