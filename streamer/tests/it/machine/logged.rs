//! The stream with a disk log.

use super::*;

/// Goal: an outage that is longer than the ring loses neither a write nor a point, and whatever dies in it, the order stays: the stream
/// goes on where it was, without a comparison but for what a lost ring held.
/// Method: seeded worlds with a ring of 96 entries and a disk log, as below; links that are down most of the time, kills of the process,
/// crashes of the host, a log that is full now and then.
#[test]
fn what_the_ring_cannot_hold_waits_in_the_disk_log() {
    let (mut logged, mut loaded, mut refused, mut crashes, mut older) = (0, 0, 0, 0, 0);
    for seed in 0..24 {
        let room = if seed % 3 == 0 { 6 } else { 1000 };
        let mut world = World::with_log(seed, room);
        world.join_volumes();
        for _ in 0..2000 {
            let ring_full = world.ring.lock().entries.len() > 80;
            world.step_logged(ring_full, seed % 4 == 0);
        }
        world.settle_after_crash();
        world.settle();
        // What it was told of the last acknowledgements.
        world.turn_log(100);
        world.check_settled();
        assert_eq!(world.started_over(), 0, "seed {seed}");
        let compared =
            world.events.iter().filter(|event| matches!(event, StreamEvent::CompareEverything { .. })).count();
        assert_eq!(compared, 0, "seed {seed}");
        let disk = world.disk.as_ref().expect("there is one");
        assert!(disk.held.is_empty(), "seed {seed}: the log is empty in the end");
        older += world
            .journal
            .batches
            .iter()
            .filter(|batch| batch.place().incarnation < Incarnation(world.incarnation))
            .count();
        (logged, loaded, refused) = (logged + disk.logged, loaded + disk.loaded, refused + disk.refused);
        crashes += world.crashes;
    }
    assert!(
        logged > 3000 && loaded > 3000 && refused > 5 && crashes > 2 && older > 500,
        "{logged} {loaded} {refused} {crashes} {older}"
    );
}

/// Goal: a log that cannot be read makes everything be compared, and nothing before.
#[test]
fn a_log_that_cannot_be_read_starts_over() {
    let mut world = World::with_log(5, 1000);
    world.connect();
    world.join_volumes();
    for _ in 0..300 {
        world.step(false);
    }
    world.break_link();
    for _ in 0..2000 {
        let ring_full = world.ring.lock().entries.len() > 80;
        world.step_outage(ring_full);
    }
    let held = world.disk.as_ref().expect("there is one").durable;
    assert!(held > 3, "{held} batches");
    let number = world.streamer().state().number.next();
    let now = world.now;
    world.streamer().handle_log(now, LogDone::Unreadable { epoch: 0, number, reason: "rot".into() });
    world.connect();
    for _ in 0..20 {
        world.drain();
        world.turn_log(1);
        world.carry_control();
    }
    assert!(world.batches.is_empty(), "nothing is sent before it is recorded");
    assert_eq!(world.started_over(), 1);
    world.start_over(Incarnation(2));
    for _ in 0..500 {
        world.step(true);
        world.turn_log(2);
        world.sync_log();
    }
    world.settle();
    world.check_settled();
    assert!(world.disk.as_ref().expect("there is one").held.is_empty());
}

/// Goal: a power cut that comes when all of the disk log is at the target, and more behind it, and before that was recorded, has nothing
/// compared if the activity log knows of what the target holds, and everything without; the stream is not started over. Method: the log as it
/// stood before the last batches went past it.
#[test]
fn a_target_that_is_ahead_of_the_disk_log_is_followed() {
    const SHIPPED: LogMark = LogMark { session: 9, number: 40 };
    let lives = |lives: Vec<LogMark>| Some(StreamLog { lives, now: Arc::new(|| SHIPPED) });
    for known in [true, false] {
        let start = StreamerConfig { disk_log: Some(LogStart::default()), log: lives(vec![]), ..config(1) };
        let mut world = World::with(7, start);
        world.ring.lock().size_entries = 96;
        world.disk = Some(Disk { room: 1000, ..Disk::default() });
        world.connect();
        world.join_volumes();
        for _ in 0..300 {
            world.step(false);
        }
        world.break_link();
        for _ in 0..2000 {
            let ring_full = world.ring.lock().entries.len() > 80;
            world.step_outage(ring_full);
        }
        let batches = world.disk.as_ref().expect("there is one").start().batches;
        assert!(batches.len() > 3, "{} batches", batches.len());
        world.settle();
        let tail = world.journal.tail().expect("it holds something");
        assert!(tail.number > batches.last().expect("not empty").number);
        // Another boot: another ring.
        world.unplug();
        world.ring = SharedRing::new(2);
        world.incarnation = 2;
        let mut config = config(2);
        config.joined = [VolumeIndex(0), VolumeIndex(1)].into_iter().collect::<VolumeSet>();
        config.log = lives(if known { vec![SHIPPED] } else { vec![] });
        config.disk_log = Some(LogStart { batches, begun: true });
        world.disk = Some(Disk { room: 1000, line: true, ..Disk::default() });
        world.open(config);
        let events = world.events.len();
        for _ in 0..200 {
            if !world.up {
                world.connect();
            }
            world.drain();
            world.turn_log(2);
            world.carry_control();
            let asked =
                world.events[events..].iter().any(|event| matches!(event, StreamEvent::CompareEverything { .. }));
            assert!(!(asked && known), "everything is compared");
            if asked {
                break;
            }
        }
        if !known {
            world.send_everything();
            let now = world.now;
            world.streamer().handle_compared(now);
        }
        world.settle();
        world.check_settled();
        assert_eq!(world.started_over(), 0);
        let first = world.journal.batches.iter().find(|batch| batch.place().incarnation.0 == 2).expect("appended");
        assert_eq!(first.place().number, tail.number.next());
        assert!(!world.disk.as_ref().expect("there is one").line, "the line is at its end");
    }
}
