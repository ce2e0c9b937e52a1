//! Verify, beside guests and through everything that happens to a stream.

use std::ops::Range;

use farshore_blkfilter::sync::{VerifyEvent, VerifyFound, VerifyOrder};
use farshore_blkfilter::{Alarm, AlarmEvent};
use farshore_proto::VolumeIndex;
use farshore_proto::record::Kind;
use farshore_uring::sim::{DiskFault, DiskOp};

use crate::random::{Seed, seeds};
use crate::rig::{Config, Rig, What};

const SLOT: u64 = 65536;

fn one_volume(seed: u64) -> Rig {
    let mut rig = Rig::new(seed, Config { volumes: 1, guests: 1, slab_mib: 8, descriptors: 4096, ..Config::default() });
    rig.settle();
    rig
}

fn order(volume: u16) -> VerifyOrder {
    VerifyOrder { volume: VolumeIndex(volume), pass: 7, from: 0, rate: None }
}

/// One pass, with nothing else going on; the ranges it told of on the way, and what it found.
fn pass(rig: &mut Rig, order: VerifyOrder) -> (Vec<Range<u64>>, VerifyFound) {
    assert!(rig.syncer.begin_verify(order));
    // Of the one that it took the place of.
    while rig.syncer.poll_verify().is_some() {}
    let mut told = Vec::new();
    for _ in 0..100_000 {
        turn(rig);
        while let Some(event) = rig.syncer.poll_verify() {
            match event {
                VerifyEvent::Differs { volume, range } => {
                    assert_eq!(volume, order.volume);
                    told.push(range);
                }
                VerifyEvent::Ended { volume, pass, from, found } => {
                    assert_eq!((volume, pass, from), (order.volume, order.pass, order.from));
                    assert_eq!(rig.syncer.verify_progress(volume), None);
                    return (told, found);
                }
            }
        }
    }
    panic!("the pass does not end: {:?}", rig.syncer.verify_progress(order.volume));
}

fn slot(slot: u64) -> Vec<Range<u64>> {
    std::iter::once(slot * SLOT..(slot + 1) * SLOT).collect()
}

/// A millisecond of everything but new requests.
fn turn(rig: &mut Rig) {
    rig.step += 1;
    for guest in 0..rig.guests.len() {
        while rig.turn_guest(guest) {}
    }
    rig.turn_sync();
    rig.turn_cutter();
    while rig.ship() {}
    while rig.apply() {}
    while rig.hear() {}
}

/// From here on points are not what any guest wrote.
fn flip_replica(rig: &mut Rig, offset: u64) {
    rig.points_hold = false;
    rig.replica.images.get_mut(&0).expect("there")[usize::try_from(offset).expect("small")] ^= 1;
}

/// Past the filter, so that it is neither captured nor marked.
fn flip_source(rig: &mut Rig, offset: u64) {
    rig.points_hold = false;
    let mut byte = [0];
    rig.disks[0].peek(offset, &mut byte);
    rig.disks[0].poke(offset, &[byte[0] ^ 1]);
}

/// Goal: one pass finds every byte that differs, whichever side changed it, holes included, names its slot, and repairs nothing.
#[test]
fn a_pass_finds_what_differs_on_either_side() {
    let mut rig = one_volume(101);
    let size = rig.disks[0].size();
    let (told, found) = pass(&mut rig, order(0));
    assert_eq!((told.len(), found), (0, VerifyFound { equal_bytes: size, ..VerifyFound::default() }));
    assert!(rig.replica.count(Kind::Probe) > 0 && rig.replica.count(Kind::ProbeZero) > 0);
    let sent = |rig: &Rig| rig.replica.count(Kind::SyncData) + rig.replica.count(Kind::SyncZero);
    let before = sent(&rig);
    for slot in [3, 4, 17] {
        flip_replica(&mut rig, slot * SLOT + 77);
    }
    for slot in [9, 30] {
        flip_source(&mut rig, slot * SLOT);
    }
    flip_replica(&mut rig, size - 1);
    let (mut told, mut found) = pass(&mut rig, order(0));
    told.sort_by_key(|range| range.start);
    let slots = |range: Range<u64>| range.start * SLOT..(range.end * SLOT).min(size);
    let last = size / SLOT;
    let each = [3..4, 4..5, 9..10, 17..18, 30..31, last..last + 1].map(slots);
    assert_eq!(told, each);
    found.differing.sort_by_key(|range| range.start);
    assert_eq!(found.differing, [3..5, 9..10, 17..18, 30..31, last..last + 1].map(slots));
    assert_eq!((found.differing_bytes, found.equal_bytes + found.differing_bytes), (5 * SLOT + size % SLOT, size));
    assert_eq!((sent(&rig), rig.group.event_open()), (before, false), "verify repairs nothing");
    // What a resync has repaired is the same again.
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    rig.settle();
    rig.check_equal();
    assert_eq!(pass(&mut rig, order(0)).1.differing_bytes, 0);
}

/// Goal: a pass that goes on where another was cut off looks at nothing before.
#[test]
fn a_pass_begins_where_it_is_told_to() {
    let mut rig = one_volume(102);
    flip_replica(&mut rig, 3 * SLOT);
    flip_replica(&mut rig, 40 * SLOT);
    let (told, found) = pass(&mut rig, VerifyOrder { from: 40 * SLOT, ..order(0) });
    assert_eq!(told, slot(40));
    assert_eq!(found.equal_bytes + found.differing_bytes, rig.disks[0].size() - 40 * SLOT);
    assert!(!rig.syncer.begin_verify(order(7)), "there is no such volume");
}

/// Goal: whatever guests write, whatever breaks and dies, nothing is called different that is not; and what is, is found all the same.
/// Method: passes without end under random load on hot slots, link breaks, failing writes, sync's deaths and kills; then a flip.
#[test]
fn a_busy_volume_gives_no_false_alarm() {
    let (mut ended, mut looked) = (0, 0);
    for seed in seeds(10) {
        let _seed = Seed(seed);
        // With a small ring, which often has no room for questions, and with a large one.
        let slab_mib = if seed % 3 == 0 { 4 } else { 32 };
        // And with few slots, which are always being written to.
        let (slots, load) = if seed % 2 == 0 { (60, 8) } else { (4, 20) };
        let mut rig = Rig::new(seed, Config { slots, slab_mib, descriptors: 8192, ..Config::default() });
        rig.go_live();
        for _ in 0..15_000 {
            rig.random_step(load, 95);
            rig.turn_sync();
            disturb(&mut rig);
            for volume in 0..2 {
                if rig.syncer.verify_progress(VolumeIndex(volume)).is_none() {
                    rig.syncer.begin_verify(order(volume));
                }
            }
            while let Some(event) = rig.syncer.poll_verify() {
                match event {
                    VerifyEvent::Differs { .. } => panic!("step {}: {event:?}", rig.step),
                    VerifyEvent::Ended { found, .. } => {
                        ended += 1;
                        looked += found.equal_bytes;
                    }
                }
            }
        }
        rig.disks[0].clear_fault();
        rig.settle();
        rig.check_equal();
        flip_source(&mut rig, 2 * SLOT + 4000);
        assert_eq!(pass(&mut rig, order(0)).0, slot(2));
    }
    assert!(ended > 50 && looked > ended * SLOT, "{ended} passes, {looked} bytes");
}

/// Now and then something breaks, or is whole again.
fn disturb(rig: &mut Rig) {
    match rig.rng.below(10_000) {
        0 | 1 => rig.break_link(),
        2 => rig.replace_sync(),
        3 => rig.kill_and_restart(),
        4 | 5 => rig.disks[0].set_fault(|op: &DiskOp| match op {
            DiskOp::Write { .. } => DiskFault::Error(libc::EIO),
            DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
        }),
        6..100 => rig.disks[0].clear_fault(),
        _ => {}
    }
    if !rig.live && rig.rng.chance(1, 50) {
        rig.go_live();
    }
}

/// Goal: a device that hangs under a check keeps a guest for no longer than `stall_max`, and the slot is looked at later.
#[test]
fn a_check_gives_its_lock_back_after_stall_max() {
    let mut rig = one_volume(103);
    rig.submit(0, 3 * SLOT, SLOT, What::Write { fua: false });
    rig.settle();
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Read { .. } => DiskFault::Hang,
        DiskOp::Write { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    assert!(rig.syncer.begin_verify(VerifyOrder { from: 3 * SLOT, ..order(0) }));
    rig.turn_sync();
    let since = rig.step;
    rig.submit(0, 3 * SLOT, 512, What::Write { fua: false });
    assert_eq!(rig.guests[0].io.in_flight(), 0, "it waits for the check's lock");
    while !rig.guests[0].pending.is_empty() {
        let deadline = rig.syncer.poll_deadline().expect("a lock is held");
        assert!(deadline > rig.now(), "time passes");
        rig.step = deadline.0.div_ceil(1_000_000);
        rig.turn_sync();
        while rig.turn_guest(0) {}
        assert!(rig.step - since <= 51, "the guest waits for {} ms", rig.step - since);
    }
    rig.disks[0].clear_fault();
    flip_replica(&mut rig, 3 * SLOT + 5000);
    let mut found = None;
    for _ in 0..10_000 {
        turn(&mut rig);
        if let Some(VerifyEvent::Ended { found: of, .. }) = std::iter::from_fn(|| rig.syncer.poll_verify()).last() {
            found = Some(of);
            break;
        }
    }
    assert_eq!(found.expect("the pass ends").differing, slot(3));
}

/// Goal: a pass whose volume goes, or which another takes the place of, in the middle of a check leaves no lock behind.
#[test]
fn a_pass_that_is_given_up_leaves_no_lock() {
    for replaced in [false, true] {
        let mut rig = one_volume(104);
        rig.submit(0, 3 * SLOT, SLOT, What::Write { fua: false });
        rig.settle();
        assert!(rig.syncer.begin_verify(VerifyOrder { from: 3 * SLOT, ..order(0) }));
        rig.turn_sync();
        rig.submit(0, 3 * SLOT, 512, What::Write { fua: false });
        assert_eq!(rig.guests[0].io.in_flight(), 0, "it waits for the check's lock");
        if replaced {
            assert_eq!(pass(&mut rig, order(0)).1.differing_bytes, 0);
        } else {
            rig.syncer.remove_volume(&mut rig.sync_io, VolumeIndex(0));
        }
        while rig.turn_guest(0) {}
        assert!(rig.guests[0].pending.is_empty(), "the guest waits for a lock that nobody gives back");
    }
}

/// Goal: a pass keeps to its rate, and to its volume's state: nothing is asked while an event is open.
#[test]
fn a_pass_keeps_to_its_rate_and_waits_for_events() {
    let mut rig = one_volume(105);
    let reads = rig.disks[0].op_count();
    assert!(rig.syncer.begin_verify(VerifyOrder { rate: Some(10 * SLOT), ..order(0) }));
    for _ in 0..3000 {
        turn(&mut rig);
    }
    let reads = rig.disks[0].op_count() - reads;
    assert!((10..=40).contains(&reads), "{reads} slots read in three seconds at 10 per second, and holes besides");
    rig.break_link();
    let at = rig.syncer.verify_progress(VolumeIndex(0)).expect("under way").at;
    rig.group.begin_event();
    for _ in 0..1000 {
        rig.step += 1;
        rig.turn_sync();
        assert!(rig.syncer.poll_deadline().expect("it has a pass") > rig.now(), "called again at once");
    }
    assert_eq!(rig.syncer.verify_progress(VolumeIndex(0)).expect("under way").at, at);
}

/// Goal: an unreadable slot is told of and the pass ends.
#[test]
fn an_unreadable_slot_does_not_stop_a_pass() {
    let mut rig = one_volume(106);
    rig.submit(0, 3 * SLOT, SLOT, What::Write { fua: false });
    rig.settle();
    rig.disks[0].set_fault(move |op: &DiskOp| match op {
        DiskOp::Read { offset, .. } if *offset == 3 * SLOT => DiskFault::Error(libc::EIO),
        DiskOp::Read { .. } | DiskOp::Write { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    let found = pass(&mut rig, order(0)).1;
    assert_eq!((found.equal_bytes, found.differing_bytes), (rig.disks[0].size() - SLOT, 0));
    assert_eq!((found.skipped_bytes, found.skipped), (SLOT, slot(3)), "it does not count as compared");
    let wanted =
        AlarmEvent { alarm: Alarm::Unreadable { volume: VolumeIndex(0), offset: 3 * SLOT, len: SLOT }, raised: true };
    assert!(std::iter::from_fn(|| rig.group.poll_alarm()).any(|event| event == wanted));
}

/// Goal: a check keeps back nobody who does not touch what is being written: a slow write somewhere in the slot is its own matter. Method:
/// a write that hangs, a pass that wants its slot, and a write elsewhere in that slot.
#[test]
fn a_check_does_not_wait_in_line_behind_a_slow_write() {
    let mut rig = one_volume(107);
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Write { offset, .. } if *offset == 3 * SLOT => DiskFault::Hang,
        DiskOp::Write { .. } | DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    rig.submit(0, 3 * SLOT, 512, What::Write { fua: false });
    while rig.turn_guest(0) {}
    assert!(rig.syncer.begin_verify(VerifyOrder { from: 3 * SLOT, ..order(0) }));
    let mut waited = 0;
    for _ in 0..5_000 {
        rig.step += 1;
        rig.turn_sync();
        if rig.guests[0].pending.len() == 1 {
            rig.submit(0, 3 * SLOT + 8192, 512, What::Write { fua: false });
            waited = 0;
        }
        while rig.turn_guest(0) {}
        waited += u64::from(rig.guests[0].pending.len() > 1);
        assert!(waited <= 51, "a write waits {waited} ms for a check that waits for another write");
    }
    rig.disks[0].clear_fault();
}
