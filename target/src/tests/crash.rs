//! Kills and full disks at every operation.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farshore_proto::session::{Resume, SourceTail, resume};
use farshore_proto::{BatchNo, ChainHash};
use farshore_uring::Storage;
use farshore_uring::sim::{SimRng, SimStorage, StorageOp, is_crash};

use super::source::{Clocked, Source, name};
use super::{assert_point, open, storage};
use crate::error::Kind;
use crate::group::GroupHost;
use crate::target::Target;

const SEED: u64 = 0x5eed_0001;

/// The scenario: initial sync of two volumes, their join, writes over several segments, one bookmark. Ends early when the
/// disk dies.
fn scenario(target: &Target<SimStorage>, source: &mut Source, rng: &mut SimRng) {
    let mut world = Clocked::new(target);
    source.connect(&mut world);
    if source.welcome.is_none() {
        return;
    }
    source.step(&mut world, rng, 12);
    source.join_all(&mut world);
    for round in 0..5 {
        if source.refused.is_some() || source.paused.is_some() {
            return;
        }
        let ops = [source.random_ops(rng, 6), source.random_ops(rng, 6)];
        let bookmark = (round == 2).then_some("middle");
        let (first, second) = (source.batch(&ops[0], None), source.batch(&ops[1], bookmark));
        source.send_together(&mut world, &[&first.bytes, &second.bytes]);
    }
    source.send_together(&mut world, &[]);
}

/// After a restart: what was acknowledged is there, the chain is the source's, every point it shows is right, and the
/// stream goes on to the end.
fn check_restart(disk: &SimStorage, source: &mut Source) {
    let target = open(disk).expect("opens after a crash");
    let mut world = Clocked::new(&target);
    let acked = source.acked;
    source.connect(&mut world);
    let welcome = source.welcome.clone().expect("welcomed after a crash");
    let held = welcome.tail.map_or(BatchNo(0), |tail| tail.number);
    assert!(held >= acked, "acknowledged {acked}, held {held}");
    if let Some(tail) = welcome.tail {
        let sent = source.sent.iter().find(|sent| sent.number == tail.number).expect("only what was sent");
        assert_eq!(sent.chain, tail.chain, "no fork");
    }
    let own_chain =
        source.sent.iter().find(|sent| sent.number == acked).map_or_else(ChainHash::default, |sent| sent.chain);
    let own = SourceTail { incarnation: source.incarnation, number: acked, chain: own_chain, unsent: false };
    let how = resume(&own, welcome.tail.as_ref());
    assert!(matches!(how, Resume::Continue | Resume::CatchUp { .. }), "{how:?}");
    // The greeting says what is held; only what lies behind it is sent again.
    source.acked = held;
    let rest: Vec<_> = source.sent.iter().filter(|sent| sent.number > held).cloned().collect();
    for sent in &rest {
        source.send(&mut world, &sent.bytes);
    }
    assert_eq!(source.refused, None);
    assert_eq!(source.acked, source.sent.last().map_or(BatchNo(0), |sent| sent.number));
    if let Ok(streams) = target.streams(&name("db")) {
        check_points(&streams[&name("host-a")], source);
    }
    assert_eq!(target.alarm_list(), [], "a crash is no damage");
}

fn check_points<S: Storage>(stream: &GroupHost<S>, source: &Source) {
    // Every point is listed; reading all of them as often as these tests restart would take minutes.
    let last = source.sent.len().saturating_sub(1);
    for (at, sent) in source.sent.iter().enumerate() {
        match stream.check_point(&sent.point) {
            Ok(point) => {
                assert_eq!(point.chain, sent.chain);
                if at % 4 == 2 || at == last {
                    assert_point(stream, sent);
                }
            }
            Err(error) => assert!(sent.joined.is_empty(), "{error}"),
        }
    }
}

/// Goal: a kill at any disk operation loses nothing that was acknowledged and forks nothing. Method: the scenario is run
/// once to count its operations, then once per operation with the disk dying there and a random part of what was not synced
/// lost; at every third operation twice.
#[test]
fn a_kill_at_every_operation_loses_nothing_that_was_acknowledged() {
    let run = |crash_at: Option<u64>, loss: u64| {
        let disk = storage(SEED);
        disk.crash_at(crash_at);
        let mut source = Source::new("db", "host-a", 2);
        let mut rng = SimRng::new(SEED);
        match open(&disk) {
            Ok(target) => scenario(&target, &mut source, &mut rng),
            Err(error) => assert!(crash_at.is_some(), "{error}"),
        }
        let operations = disk.op_count();
        let disk = disk.crash(&mut SimRng::new(loss));
        check_restart(&disk, &mut source);
        operations
    };
    let operations = run(None, 1);
    assert!(operations > 100, "{operations}");
    for at in 0..operations {
        for loss in 0..=u64::from(at % 3 == 0) {
            run(Some(at), at * 2 + loss);
        }
    }
}

/// Goal: as above when the restart itself is killed at every operation.
#[test]
fn a_kill_at_every_operation_of_a_restart_loses_nothing() {
    let prepared = || {
        let disk = storage(SEED + 1);
        let mut source = Source::new("db", "host-a", 2);
        let target = open(&disk).expect("a good disk");
        // Dies in the middle of the scenario, so that there is a tail to judge.
        disk.crash_at(Some(disk.op_count() + 170));
        scenario(&target, &mut source, &mut SimRng::new(SEED));
        (disk.crash(&mut SimRng::new(9)), source)
    };
    let (disk, _) = prepared();
    let before = disk.op_count();
    drop(open(&disk).expect("opens"));
    let operations = disk.op_count() - before;
    for at in 0..operations {
        let (disk, mut source) = prepared();
        disk.crash_at(Some(disk.op_count() + at));
        // Fails, or leaves the stream out with an alarm, or was done before the disk died.
        drop(open(&disk));
        let disk = disk.crash(&mut SimRng::new(at));
        check_restart(&disk, &mut source);
    }
}

/// Goal: a sync that fails is never believed: nothing of it is acknowledged, the stream stops with an alarm, and a restart
/// goes on from what is really there. Method: every sync of the scenario fails once.
#[test]
fn a_failed_sync_stops_the_stream_and_acknowledges_nothing() {
    let run = |fail: Option<u64>| {
        let disk = storage(SEED + 2);
        let target = open(&disk).expect("a good disk");
        let mut source = Source::new("db", "host-a", 2);
        let mut rng = SimRng::new(SEED);
        let count = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&count);
        disk.set_fault(move |op, path| {
            let is_journal = path.to_string_lossy().contains(".seg");
            if op != StorageOp::Sync || !is_journal {
                return None;
            }
            let number = seen.fetch_add(1, Ordering::Relaxed);
            (Some(number) == fail).then(|| std::io::Error::from_raw_os_error(5))
        });
        scenario(&target, &mut source, &mut rng);
        let syncs = count.load(Ordering::Relaxed);
        if fail.is_some() {
            let (code, detail) = source.refused.clone().expect("the stream is stopped");
            assert_eq!(code, farshore_proto::message::RefuseCode::Unavailable, "{detail}");
            let codes: Vec<_> = target.alarm_list().iter().map(|alarm| alarm.code.as_str()).collect();
            assert_eq!(codes, ["journal.sync_failed"]);
            let acked = source.acked;
            source.connect(&mut Clocked::new(&target));
            assert!(source.refused.is_some() && source.acked == acked, "it stays stopped");
        }
        drop(target);
        let disk = disk.crash(&mut SimRng::new(fail.unwrap_or(99)));
        check_restart(&disk, &mut source);
        syncs
    };
    let syncs = run(None);
    assert!(syncs >= 6, "{syncs}");
    for number in 0..syncs {
        run(Some(number));
    }
}

/// Goal: a full disk at any operation acknowledges nothing by half, pauses with the reason, and goes on when there is
/// space; so does a system that lends no more memory or files. Method: every write, reservation and creation fails once with ENOSPC,
/// or ENOMEM.
#[test]
fn a_full_disk_at_every_operation_pauses_and_resumes() {
    for (errno, code) in [(28, "target.disk_full"), (12, "target.no_resources")] {
        let operations = pauses_and_resumes(None, errno, code);
        assert!(operations > 30, "{operations}");
        for at in 0..operations {
            pauses_and_resumes(Some(at), errno, code);
        }
    }
}

/// Operation `fail` fails with `errno`. Gives how many there were.
fn pauses_and_resumes(fail: Option<u64>, errno: i32, code: &str) -> u64 {
    let disk = storage(SEED + 3);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 2);
    let mut rng = SimRng::new(SEED);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let count = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&count);
    disk.set_fault(move |op, _| {
        let takes_space =
            matches!(op, StorageOp::Write | StorageOp::Reserve | StorageOp::CreateDirAll | StorageOp::Open);
        let now = takes_space && Some(seen.fetch_add(1, Ordering::Relaxed)) == fail;
        now.then(|| std::io::Error::from_raw_os_error(errno))
    });
    source.step(&mut world, &mut rng, 12);
    source.join_all(&mut world);
    for _ in 0..8 {
        let ops = source.random_ops(&mut rng, 8);
        let sent = source.batch(&ops, None);
        source.send(&mut world, &sent.bytes);
    }
    if source.paused.is_some() {
        assert!(target.alarm_list().iter().any(|alarm| alarm.code.as_str() == code));
        world.pass(std::time::Duration::from_secs(2));
        source.talk(&mut world);
        assert_eq!(source.paused, None, "there is space again");
    }
    disk.clear_fault();
    let operations = count.load(Ordering::Relaxed);
    let held = source.acked;
    let rest: Vec<_> = source.sent.iter().filter(|sent| sent.number > held).cloned().collect();
    rest.iter().for_each(|sent| source.send(&mut world, &sent.bytes));
    assert_eq!(source.refused, None);
    assert_eq!(source.acked, source.sent.last().expect("sent above").number);
    check_points(&target.streams(&name("db")).expect("made")[&name("host-a")], &source);
    assert_eq!(target.alarm_list(), []);
    drop(target);
    check_restart(&disk.crash(&mut SimRng::new(4)), &mut source);
    operations
}

/// Goal: each error number that a disk can give the journal has the end that the table says: a pause that ends by itself, or a stop
/// until somebody acts; neither acknowledges what is not on the disk. Method: one write of the journal fails with it.
#[test]
fn every_error_of_the_journals_disk_has_its_end() {
    for (errno, errno_name, trouble) in farshore_uring::TROUBLES {
        let disk = storage(SEED + 5);
        let target = open(&disk).expect("a good disk");
        let mut source = Source::new("db", "host-a", 1);
        let mut rng = SimRng::new(SEED);
        let mut world = Clocked::new(&target);
        source.connect(&mut world);
        source.join_all(&mut world);
        let acked = source.acked;
        assert!(acked.0 > 0);
        let failed = Arc::new(AtomicU64::new(0));
        let once = Arc::clone(&failed);
        disk.set_fault(move |op, path| {
            let journal = op == StorageOp::Write && path.to_string_lossy().contains(".seg");
            (journal && once.fetch_add(1, Ordering::Relaxed) == 0).then(|| std::io::Error::from_raw_os_error(errno))
        });
        let ops = source.random_ops(&mut rng, 8);
        let sent = source.batch(&ops, None);
        source.send(&mut world, &sent.bytes);
        assert!(failed.load(Ordering::Relaxed) > 0, "{errno_name}: nothing was written");
        assert_eq!(source.acked, acked, "{errno_name}: acknowledged without being there");
        let codes: Vec<_> = target.alarm_list().iter().map(|alarm| alarm.code.as_str()).collect();
        let kind = Kind::of(trouble);
        let code = if kind == Kind::NoSpace {
            "target.disk_full"
        } else if kind == Kind::NoResources {
            "target.no_resources"
        } else {
            "journal.sync_failed"
        };
        assert_eq!(codes, [code], "{errno_name}");
        if trouble.passes() {
            assert!(source.paused.is_some() && source.refused.is_none(), "{errno_name}");
            world.pass(std::time::Duration::from_secs(2));
            source.talk(&mut world);
            assert_eq!(source.paused, None, "{errno_name}");
            source.send(&mut world, &sent.bytes);
            assert_eq!(source.acked, sent.number, "{errno_name}");
            assert_eq!(target.alarm_list(), [], "{errno_name}");
        } else {
            assert!(source.refused.is_some(), "{errno_name}");
            source.connect(&mut world);
            assert!(source.refused.is_some() && source.acked == acked, "{errno_name}: it stays stopped");
        }
    }
}

#[test]
fn a_dead_disk_reports_itself() {
    let disk = storage(1);
    disk.crash_at(Some(0));
    let error = open(&disk).err().expect("dead");
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    assert!(source.is_some_and(is_crash), "{error}");
}
