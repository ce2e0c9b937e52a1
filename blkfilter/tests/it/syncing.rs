//! Sync, step by step.

use std::time::Duration;

use farshore_blkfilter::sync::{SyncConfig, SyncState};
use farshore_blkfilter::{Alarm, AlarmEvent};
use farshore_proto::record::Kind;
use farshore_proto::{Position, VolumeIndex, WallTime};
use farshore_uring::sim::{DiskFault, DiskOp};

use crate::oracle::Said;
use crate::rig::{Config, Rig, What};

const SLOT: u64 = 65536;

fn one_volume() -> Config {
    Config { volumes: 1, guests: 1, slab_mib: 8, descriptors: 4096, ..Config::default() }
}

/// A volume in steady state whose slot `slot` is made missing by a failed write; the link is up.
fn with_missing(seed: u64, slot: u64) -> Rig {
    let mut rig = Rig::new(seed, one_volume());
    rig.settle();
    fill(&mut rig, slot);
    fail_a_write(&mut rig, slot);
    rig
}

/// Writes the whole slot; the replica has it.
fn fill(rig: &mut Rig, slot: u64) {
    rig.submit(0, slot * SLOT, SLOT, What::Write { fua: false });
    while rig.turn_guest(0) {}
    rig.settle();
}

fn fail_a_write(rig: &mut Rig, slot: u64) {
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Write { .. } => DiskFault::Error(libc::EIO),
        DiskOp::Read { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    rig.step += 1;
    rig.submit(0, slot * SLOT, 4096, What::Write { fua: false });
    while rig.turn_guest(0) {}
    rig.disks[0].clear_fault();
    assert!(rig.group.event_open());
}

fn guest_write(rig: &mut Rig, offset: u64) {
    rig.step += 1;
    rig.submit(0, offset, 512, What::Write { fua: false });
    while rig.turn_guest(0) {}
}

fn missing(rig: &Rig) -> u64 {
    rig.filters[0].volume().expect("captured").missing().count_ones()
}

/// Until sync waits for something from outside.
fn run_sync(rig: &mut Rig) {
    for _ in 0..20 {
        rig.turn_sync();
    }
}

/// Everything behind the ring: cut, ship, apply.
fn deliver(rig: &mut Rig) {
    rig.step += 100;
    rig.turn_cutter();
    while rig.ship() {}
    while rig.apply() {}
}

/// Goal: where the target holds nothing, sync asks nothing; holes and zeroes carry no payload and holes are not read.
#[test]
fn fresh_volume_is_sent_without_questions() {
    let mut rig = Rig::new(1, one_volume());
    let mut image = vec![0; usize::try_from(rig.disks[0].size()).expect("small")];
    rig.disks[0].peek(0, &mut image);
    let full = image.chunks(65536).filter(|slot| slot.iter().any(|byte| *byte != 0)).count() as u64;
    rig.settle();
    rig.check_equal();
    assert_eq!((rig.replica.count(Kind::Probe), rig.replica.count(Kind::ProbeZero)), (0, 0));
    assert_eq!(rig.replica.count(Kind::SyncData), full);
    assert_eq!(rig.replica.count(Kind::VolumeJoined), 1);
    assert_eq!(rig.disks[0].op_count(), full, "holes are not read");
    assert_eq!(rig.syncer.progress().state, SyncState::Idle);
}

/// Goal: a compare of equal volumes sends hashes only, and ends the event.
#[test]
fn equal_content_is_not_sent() {
    let mut rig = Rig::new(2, one_volume());
    rig.settle();
    let sent = rig.replica.count(Kind::SyncData) + rig.replica.count(Kind::SyncZero);
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    assert!(rig.group.event_open());
    let progress = rig.syncer.progress();
    assert_eq!((progress.state, progress.done_bytes), (SyncState::Running, 0));
    rig.settle();
    rig.check_equal();
    assert_eq!(rig.replica.count(Kind::SyncData) + rig.replica.count(Kind::SyncZero), sent);
    assert!(rig.replica.count(Kind::Probe) > 0 && rig.replica.count(Kind::ProbeZero) > 0);
    assert_eq!(rig.replica.count(Kind::EventEnd), 1);
}

/// Goal: what keeps the group from making points is compared before what nobody waits for. Method: of two volumes one has left the points and
/// is missing as a whole, as one that is new; then the other is to be compared, too.
#[test]
fn what_points_wait_for_comes_first() {
    for new in [0, 1] {
        let old = 1 - new;
        let mut rig = Rig::new(21, Config { volumes: 2, guests: 2, slots: 64 * 6, ..Config::default() });
        rig.settle();
        let index = |volume: usize| VolumeIndex(u16::try_from(volume).expect("two"));
        rig.group.unjoin(index(new)).expect("it is there");
        rig.group.resync(index(new)).expect("it is there");
        rig.group.resync(index(old)).expect("it is there");
        let mut image = vec![0; usize::try_from(rig.disks[old].size()).expect("small")];
        rig.disks[old].peek(0, &mut image);
        let full = image.chunks(65536).filter(|slot| slot.iter().any(|byte| *byte != 0)).count() as u64;
        assert!(full > 150, "{full} slots have content");
        let before = [rig.disks[0].op_count(), rig.disks[1].op_count()];
        let read = |rig: &Rig, volume: usize| rig.disks[volume].op_count() - before[volume];
        for _ in 0..10_000 {
            rig.turn_sync();
            if read(&rig, new) > 0 {
                break;
            }
            deliver(&mut rig);
            while rig.hear() {}
        }
        assert!(read(&rig, new) > 0);
        // Those of the window may still be under way.
        assert!(read(&rig, old) + 16 >= full, "{} of {full} slots were read when the other began", read(&rig, old));
        rig.settle();
        rig.check_equal();
    }
}

/// Goal: a compare finds and repairs what differs, however it came to that; zeroes included.
#[test]
fn different_content_is_repaired() {
    let mut rig = Rig::new(3, one_volume());
    rig.settle();
    let replica = rig.replica.images.get_mut(&0).expect("there");
    let len = replica.len();
    for at in [0, 70_000, 300_000, 1_000_000, len - 1] {
        replica[at] ^= 1;
    }
    let sent = rig.replica.count(Kind::SyncData) + rig.replica.count(Kind::SyncZero);
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    rig.settle();
    rig.check_equal();
    assert_eq!(rig.replica.count(Kind::SyncData) + rig.replica.count(Kind::SyncZero), sent + 5, "nothing else is sent");
}

/// Goal: where nearly every answer is "differs", sync soon sends without asking, and goes on asking now and then; a compare that is
/// ordered later begins anew, for what was found in an earlier one says nothing of it.
#[test]
fn questions_that_do_not_pay_are_not_asked() {
    let mut rig = Rig::new(5, Config { slots: 256, ..one_volume() });
    rig.settle();
    // The last one is not a whole slot.
    for slot in 0..255 {
        fill(&mut rig, slot);
    }
    let ask = |rig: &mut Rig, spoil: bool| {
        if spoil {
            rig.replica.images.get_mut(&0).expect("there").iter_mut().for_each(|byte| *byte ^= 1);
        }
        let before = rig.replica.count(Kind::Probe);
        rig.group.resync(VolumeIndex(0)).expect("it is there");
        rig.settle();
        rig.check_equal();
        rig.replica.count(Kind::Probe) - before
    };
    let all = ask(&mut rig, false);
    assert!(all >= 255, "all is equal: all is asked, not {all}");
    let asked = ask(&mut rig, true);
    assert!((61..192).contains(&asked), "{asked} questions where nothing is equal");
    assert_eq!(ask(&mut rig, false), all, "equal again: all is asked");
    let asked = ask(&mut rig, true);
    assert!((61..192).contains(&asked), "{asked} questions where nothing is equal");
}

/// Goal: where sync can do nothing (no link, ring closed), time alone does not wake it in a loop.
#[test]
fn without_a_link_sync_sleeps() {
    let mut rig = with_missing(6, 3);
    rig.break_link();
    for _ in 0..3 {
        run_sync(&mut rig);
        let deadline = rig.syncer.poll_deadline().expect("something is missing");
        assert!(deadline > rig.now(), "called again at once, with nothing to do");
        rig.step += 200;
    }
}

/// Goal: "equal" said of content that a write has changed since the read is not believed.
#[test]
fn an_answer_that_comes_after_a_write_does_not_count() {
    let mut rig = with_missing(4, 3);
    run_sync(&mut rig);
    deliver(&mut rig);
    let answers = rig.replica.said.iter().find_map(|said| match said {
        Said::Answers(answers) => Some(answers.clone()),
        Said::Durable(_) => None,
    });
    let mut answers = answers.expect("a question was asked");
    assert_eq!(answers.results.len(), 1);
    // The write is captured; but say it were not (its range would be marked again): the old answer must not clear that mark.
    guest_write(&mut rig, 3 * SLOT);
    answers.results[0].equal = true;
    rig.syncer.handle_answers(&answers);
    assert_eq!(missing(&rig), 1);
    rig.replica.said.clear();
    rig.settle();
    rig.check_equal();
}

/// Goal: data read before a write is not sent behind it.
#[test]
fn a_torn_read_is_not_sent() {
    let mut rig = Rig::new(5, one_volume());
    rig.settle();
    fill(&mut rig, 3);
    rig.live = false;
    rig.syncer.handle_break();
    let replica = rig.replica.images.get_mut(&0).expect("there");
    replica[usize::try_from(3 * SLOT).expect("small") + 9] ^= 1;
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    rig.go_live();
    // Step by step; a write into the slot between any two steps of sync, each to a sector of its own, so that none makes good what
    // another one lost.
    let mut sectors = 0..100;
    for _ in 0..400 {
        rig.step += 1;
        let reading = rig.sync_io.in_flight() > 0;
        rig.turn_sync();
        if reading && let Some(sector) = sectors.next() {
            guest_write(&mut rig, 3 * SLOT + sector * 512);
        }
        deliver(&mut rig);
        while rig.hear() {}
    }
    assert!(sectors.start > 3, "the test writes between read and claim");
    rig.settle();
    rig.check_equal();
}

/// Goal: a slot is not watched while a write to it is in flight: the read could see what was before that write, and the claim come behind
/// it.
#[test]
fn no_watch_begins_under_a_write() {
    let mut rig = Rig::new(15, one_volume());
    rig.go_live();
    // The first slot with content, which is the first that sync reads.
    let mut image = vec![0; usize::try_from(rig.disks[0].size()).expect("small")];
    rig.disks[0].peek(0, &mut image);
    let full =
        image.chunks(65536).position(|slot| slot.iter().any(|byte| *byte != 0)).expect("not all are empty") as u64;
    rig.submit(0, full * SLOT, SLOT, What::Write { fua: false });
    // Sync's read, if it makes one, runs before the write does and is heard of after it.
    rig.turn_sync();
    while rig.sync_io.step() {}
    while rig.turn_guest(0) {}
    rig.settle();
    rig.check_equal();
}

/// Goal: an answer to a question that was asked before a compare was ordered does not count.
#[test]
fn an_answer_from_before_an_order_to_compare_does_not_count() {
    let mut rig = with_missing(16, 3);
    run_sync(&mut rig);
    deliver(&mut rig);
    let mut said = rig.replica.said.drain(..).collect::<Vec<_>>();
    let asked = said.iter_mut().find_map(|said| if let Said::Answers(answers) = said { Some(answers) } else { None });
    let answers = asked.expect("a question was asked");
    answers.results[0].equal = true;
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    let before = missing(&rig);
    rig.syncer.handle_answers(answers);
    assert_eq!(missing(&rig), before);
    rig.settle();
    rig.check_equal();
}

/// Goal: a slot that was sent twice is *in flight* until the second time is durable.
#[test]
fn in_flight_lasts_until_the_last_claim_is_durable() {
    let mut rig = with_missing(17, 3);
    let in_flight = |rig: &Rig| rig.filters[0].volume().expect("captured").in_flight().count_ones();
    let differ = |rig: &mut Rig| {
        rig.replica.images.get_mut(&0).expect("there")[usize::try_from(3 * SLOT).expect("small") + 5000] ^= 1;
    };
    let sent = |rig: &Rig| rig.ring.head();
    // The answers are heard, that anything is durable is not.
    let answered = |rig: &mut Rig| {
        run_sync(rig);
        deliver(rig);
        let said: Vec<Said> = rig.replica.said.drain(..).collect();
        for said in said {
            match said {
                Said::Answers(answers) => rig.syncer.handle_answers(&answers),
                durable @ Said::Durable(_) => rig.replica.said.push_back(durable),
            }
        }
        let before = sent(rig);
        run_sync(rig);
        assert!(sent(rig) > before, "the slot is sent");
    };
    differ(&mut rig);
    answered(&mut rig);
    assert_eq!((missing(&rig), in_flight(&rig)), (0, 1));
    fail_a_write(&mut rig, 3);
    differ(&mut rig);
    answered(&mut rig);
    assert_eq!((missing(&rig), in_flight(&rig)), (0, 1));
    // Durable now: the first one, which the batches delivered so far held.
    while rig.hear() {}
    assert_eq!(in_flight(&rig), 1, "the second one is not");
    rig.settle();
    rig.check_equal();
}

/// Goal: a slot that is always being written to is read under its lock in the end, and a device that hangs then keeps the guest for no
/// longer than `stall_max`.
#[test]
fn a_locked_read_is_given_up_after_stall_max() {
    let mut rig = with_missing(6, 3);
    let mut waited = None;
    for _ in 0..40 {
        rig.step += 1;
        rig.turn_sync();
        rig.submit(0, 3 * SLOT, 512, What::Write { fua: false });
        if rig.guests[0].io.in_flight() == 0 {
            // It waits for sync's lock.
            waited = Some(rig.step);
            break;
        }
        while rig.turn_guest(0) {}
    }
    let since = waited.expect("sync takes the lock after three torn reads");
    rig.disks[0].set_fault(|op: &DiskOp| match op {
        DiskOp::Read { .. } => DiskFault::Hang,
        DiskOp::Write { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    while !rig.guests[0].pending.is_empty() {
        let deadline = rig.syncer.poll_deadline().expect("a lock is held");
        assert!(deadline.0 > rig.now().0, "time passes");
        rig.step = deadline.0.div_ceil(1_000_000);
        rig.turn_sync();
        while rig.turn_guest(0) {}
        assert!(rig.step - since <= 51, "the guest waits for {} ms", rig.step - since);
    }
    assert_eq!(rig.failed, 1, "only the one that made the slot missing");
    // The slot is due again in a second; without a link nothing can be done about that, and sync must not turn in a loop.
    rig.disks[0].clear_fault();
    run_sync(&mut rig);
    rig.break_link();
    rig.step += 2000;
    rig.turn_sync();
    assert!(rig.syncer.poll_deadline().expect("something is missing") > rig.now(), "called again at once");
    rig.go_live();
    rig.settle();
    rig.check_equal();
}

/// Goal: sectors that cannot be read are named, alarmed, and the rest of their slot is sent; sync ends.
#[test]
fn unreadable_sectors_are_named() {
    let mut rig = Rig::new(7, one_volume());
    rig.settle();
    fill(&mut rig, 3);
    let bad = 3 * SLOT + 8192;
    rig.disks[0].set_fault(move |op: &DiskOp| match op {
        DiskOp::Read { offset, len } if *offset <= bad && bad < offset + u64::from(*len) => DiskFault::Error(libc::EIO),
        DiskOp::Read { .. } | DiskOp::Write { .. } | DiskOp::Sync | DiskOp::Allocate { .. } => DiskFault::None,
    });
    rig.group.resync(VolumeIndex(0)).expect("it is there");
    rig.settle();
    assert_eq!(rig.replica.unreadable, [(0, bad, 4096)]);
    let alarm = Alarm::Unreadable { volume: VolumeIndex(0), offset: bad, len: 4096 };
    let events: Vec<AlarmEvent> = std::iter::from_fn(|| rig.group.poll_alarm()).collect();
    assert!(events.contains(&AlarmEvent { alarm, raised: true }));
    rig.check_equal();
}

/// Goal: sync keeps to its quarter of the ring and leaves the rest to the guest, and does not close it.
#[test]
fn sync_keeps_to_its_share() {
    let mut rig = Rig::new(8, Config { slab_mib: 4, ..one_volume() });
    rig.go_live();
    for _ in 0..2000 {
        rig.step += 1;
        rig.turn_sync();
        assert!(rig.ring.used_bytes() <= rig.ring.size_bytes() / 4, "{} bytes", rig.ring.used_bytes());
    }
    assert!(rig.ring.used_bytes() >= rig.ring.size_bytes() / 8, "and uses it");
    assert!(!rig.ring.is_closed());
    assert!(rig.syncer.poll_deadline().expect("waits for room").0 <= rig.now().0 + 5_000_000);
    rig.settle();
    rig.check_equal();
}

/// Goal: the rate limit holds.
#[test]
fn sync_keeps_to_its_rate() {
    let rate = 10 * SLOT;
    let sync = SyncConfig { window: 8, rate: Some(rate), ..SyncConfig::default() };
    let mut rig = Rig::new(9, Config { sync, ..one_volume() });
    rig.go_live();
    for _ in 0..1000 {
        rig.step += 1;
        rig.turn_sync();
        deliver(&mut rig);
        rig.step -= 100;
        while rig.hear() {}
    }
    let reads = rig.disks[0].op_count();
    assert!((5..=11).contains(&reads), "{reads} slots read in a second at 10 per second");
}

/// Goal: a question whose answer was lost with the session is asked again; one that the target has yet to see is not.
#[test]
fn lost_answers_are_asked_for_again() {
    let mut rig = with_missing(10, 3);
    run_sync(&mut rig);
    deliver(&mut rig);
    rig.replica.said.clear();
    rig.break_link();
    let (asked, since) = (rig.replica.count(Kind::Probe), rig.step);
    rig.settle();
    rig.check_equal();
    assert_eq!(rig.replica.count(Kind::Probe), asked + 1);
    assert!(rig.step - since < 2000, "at once, not when the answer is overdue");

    let mut rig = with_missing(10, 3);
    run_sync(&mut rig);
    rig.break_link();
    rig.settle();
    rig.check_equal();
    assert_eq!(rig.replica.count(Kind::Probe), asked, "the question was in the ring all the time");
}

/// Goal: an answer that never comes though the batch is durable is asked for again after a while.
#[test]
fn an_answer_that_never_comes_is_asked_for_again() {
    let sync = SyncConfig { answer_timeout: Duration::from_millis(500), ..SyncConfig::default() };
    let mut rig = Rig::new(11, Config { sync, ..one_volume() });
    rig.settle();
    fill(&mut rig, 3);
    fail_a_write(&mut rig, 3);
    run_sync(&mut rig);
    deliver(&mut rig);
    rig.replica.said.retain(|said| matches!(said, Said::Durable(_)));
    while rig.hear() {}
    rig.turn_sync();
    assert_eq!(missing(&rig), 1);
    rig.step += 600;
    rig.settle();
    rig.check_equal();
}

/// Goal: *in flight* is cleared by durability alone, and comes back as *missing* in a restarted agent.
#[test]
fn in_flight_is_cleared_by_durability() {
    let mut rig = with_missing(12, 3);
    // A difference, so that data is sent.
    rig.replica.images.get_mut(&0).expect("there")[usize::try_from(3 * SLOT).expect("small") + 5000] ^= 1;
    let in_flight = |rig: &Rig| rig.filters[0].volume().expect("captured").in_flight().count_ones();
    for _ in 0..5 {
        run_sync(&mut rig);
        if in_flight(&rig) > 0 {
            break;
        }
        deliver(&mut rig);
        while rig.hear() {}
    }
    assert_eq!((missing(&rig), in_flight(&rig)), (0, 1));
    rig.kill_and_restart();
    assert_eq!((missing(&rig), in_flight(&rig)), (1, 0));
    assert!(rig.group.event_open());
    rig.settle();
    rig.check_equal();
    let below = rig.ring.head();
    rig.syncer.handle_durable(Position(below));
    assert_eq!(in_flight(&rig), 0);
}

/// Goal: a volume that joins later does not pause the points of the others, and joins when it is whole; one that leaves is said to leave.
#[test]
fn adding_and_removing_a_volume_pauses_nobody() {
    let mut rig = Rig::new(13, Config { volumes: 2, guests: 2, slab_mib: 8, descriptors: 4096, ..Config::default() });
    // Only the first one is synced at first.
    let second = rig.filters[1].clone();
    rig.syncer.remove_volume(&mut rig.sync_io, VolumeIndex(1));
    rig.go_live();
    for _ in 0..4000 {
        rig.random_step(20, 95);
    }
    assert_eq!(rig.group.joined(), [VolumeIndex(0)]);
    assert!(!rig.group.event_open());
    assert!(rig.replica.cuts.iter().filter(|(_, recoverable, ..)| *recoverable).count() > 10, "points all the time");
    rig.syncer.add_volume(&mut rig.sync_io, &second).expect("few owners");
    rig.settle();
    rig.check_equal();
    assert_eq!(rig.group.joined(), [VolumeIndex(0), VolumeIndex(1)]);

    rig.syncer.remove_volume(&mut rig.sync_io, VolumeIndex(1));
    rig.guests.remove(1);
    rig.group.remove_volume(VolumeIndex(1)).expect("it is there");
    assert!(rig.group.remove_volume(VolumeIndex(1)).is_err());
    deliver(&mut rig);
    assert_eq!(rig.replica.joined.iter().collect::<Vec<_>>(), [&0]);
}

/// Goal: a sync that died is replaced by a new one, which knows nothing of what that one had put into the stream, and sends it again.
#[test]
fn a_new_sync_sends_again_what_may_be_lost() {
    let mut rig = with_missing(18, 3);
    rig.replica.images.get_mut(&0).expect("there")[usize::try_from(3 * SLOT).expect("small") + 5000] ^= 1;
    let in_flight = |rig: &Rig| rig.filters[0].volume().expect("captured").in_flight().count_ones();
    for _ in 0..5 {
        run_sync(&mut rig);
        if in_flight(&rig) > 0 {
            break;
        }
        deliver(&mut rig);
        while rig.hear() {}
    }
    assert_eq!((missing(&rig), in_flight(&rig)), (0, 1));
    rig.replace_sync();
    assert_eq!((missing(&rig), in_flight(&rig)), (1, 0));
    assert!(rig.group.event_open());
    rig.settle();
    rig.check_equal();
}

/// Goal: a sync that dies holding a range's lock keeps no guest.
#[test]
fn a_sync_that_dies_keeps_no_lock() {
    let mut rig = with_missing(19, 3);
    for _ in 0..40 {
        rig.step += 1;
        rig.turn_sync();
        rig.submit(0, 3 * SLOT, 512, What::Write { fua: false });
        if rig.guests[0].io.in_flight() == 0 {
            // It waits for sync's lock.
            break;
        }
        while rig.turn_guest(0) {}
    }
    assert_eq!(rig.guests[0].pending.len(), 1, "sync takes the lock after three torn reads");
    rig.replace_sync();
    while rig.turn_guest(0) {}
    assert!(rig.guests[0].pending.is_empty(), "the guest waits for a lock that nobody gives back");
    rig.settle();
    rig.check_equal();
}

/// Goal: a leaving that the stream lost is said again, one of a volume that is there is not.
#[test]
fn a_lost_leaving_is_said_again() {
    let mut rig = Rig::new(15, Config { volumes: 2, guests: 1, ..one_volume() });
    rig.settle();
    rig.syncer.remove_volume(&mut rig.sync_io, VolumeIndex(1));
    rig.group.remove_volume(VolumeIndex(1)).expect("it is there");
    // What said so is dropped with all that the ring holds.
    rig.break_link();
    rig.group.start_over(&mut rig.consumer, WallTime(1), |_| {});
    let from = rig.consumer.freed();
    rig.replica.forget_wire(from);
    assert_eq!(rig.replica.joined.len(), 2);
    for volume in [0, 1] {
        rig.group.say_left(VolumeIndex(volume));
    }
    rig.go_live();
    deliver(&mut rig);
    assert_eq!(rig.replica.joined.iter().collect::<Vec<_>>(), [&0]);
}

/// Goal: a join is recorded before it is said, and not said where that fails.
#[test]
fn a_join_is_recorded_first() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut rig = Rig::new(14, one_volume());
    let calls = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&calls);
    let ring = Arc::clone(&rig.ring);
    // Refuses three times; the head does not move by the join before that.
    rig.group.set_join_recorder(move |volume| {
        assert_eq!(volume, VolumeIndex(0));
        assert!(ring.head() > 0);
        seen.fetch_add(1, Ordering::Relaxed) >= 3
    });
    rig.settle();
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    assert_eq!(rig.replica.count(Kind::VolumeJoined), 1);
    rig.check_equal();
    // A restarted agent takes the volume for joined, and that it did may not be what it has recorded.
    rig.kill_and_restart();
    let seen = Arc::clone(&calls);
    rig.group.set_join_recorder(move |_| {
        seen.fetch_add(1, Ordering::Relaxed);
        true
    });
    rig.settle();
    assert_eq!(calls.load(Ordering::Relaxed), 5);
}
