//! Flipped bits at rest: found, named, and never served as content.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::message::RefuseCode;
use farshore_proto::record::Kind as RecordKind;
use farshore_proto::session::{Resume, SourceTail, resume};
use farshore_uring::sim::{SimRng, SimStorage};
use farshore_uring::{OpenMode, Storage, StorageFile};

use super::source::{Clocked, Op, Source, VAULT, name};
use super::{assert_point, open, read_volume, storage};
use crate::alarm::AlarmCode;
use crate::catalog;
use crate::check::{Checker, Progress};
use crate::damage::Damaged;
use crate::error::Kind;
use crate::verify::{dump_segment, verify_journal, verify_segment};

const FOLDER: &str = "groups/db/host-a/journal";

/// Several sealed segments and an active one.
fn filled(seed: u64) -> (SimStorage, Source) {
    let disk = storage(seed);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 2);
    let mut rng = SimRng::new(seed);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.step(&mut world, &mut rng, 10);
    source.join_all(&mut world);
    for _ in 0..12 {
        source.step(&mut world, &mut rng, 6);
    }
    assert_eq!(source.acked, source.sent.last().expect("sent").number);
    (disk, source)
}

fn segments(disk: &SimStorage) -> Vec<(PathBuf, u64)> {
    let folder = Path::new(FOLDER);
    let mut found = Vec::new();
    for listed in disk.list(folder).expect("there") {
        let path = folder.join(listed.file_name().expect("a file"));
        let len = disk.open(&path, OpenMode::Read).expect("there").len().expect("a good disk");
        found.push((path, len));
    }
    assert!(found.len() >= 3, "{}", found.len());
    found
}

/// Goal: verify finds a flipped bit in every block of every segment. Method: one random bit per 512 bytes, one by one.
#[test]
fn verify_finds_a_flipped_bit_in_every_block() {
    let (disk, _) = filled(21);
    let good = verify_journal(&disk, Path::new(FOLDER), None).expect("a good disk");
    assert_eq!(good.faults, []);
    assert_eq!(good.entries, 14);
    let mut rng = SimRng::new(5);
    for (path, len) in segments(&disk) {
        for block in 0..len.div_ceil(512) {
            let at = block * 512 + rng.below((len - block * 512).min(512));
            let mask = 1 << rng.below(8);
            disk.corrupt(&path, at, mask).expect("there");
            let report = verify_segment(&disk, &path, None).expect("a good disk");
            assert!(!report.faults.is_empty(), "{} byte {at} mask {mask}", path.display());
            disk.corrupt(&path, at, mask).expect("there");
        }
        let dump = dump_segment(&disk, &path).expect("a good disk");
        assert!(dump.faults.is_empty() && !dump.entries.is_empty());
    }
    assert_eq!(verify_journal(&disk, Path::new(FOLDER), None).expect("a good disk"), good);
}

/// Goal: with a flipped bit anywhere in a segment, the target opens, and each point is either served right or refused;
/// never served wrong. Method: one random bit in every third page of all segments; every third point is read.
#[test]
fn no_flipped_bit_is_ever_served() {
    let (disk, source) = filled(22);
    let mut rng = SimRng::new(6);
    let (mut refused, mut served) = (0, 0);
    for (path, len) in segments(&disk) {
        for page in (rng.below(3)..len / 4096).step_by(3) {
            let disk = disk.fork();
            disk.corrupt(&path, page * 4096 + rng.below(4096), 1 << rng.below(8)).expect("there");
            let target = open(&disk).expect("opens with damage");
            let Ok(stream) = target.stream(&name("db"), None) else {
                assert_eq!(target.broken().len(), 1, "not open: an alarm says why");
                continue;
            };
            let mut checker = Checker::new(Arc::clone(&stream));
            while checker.step().expect("damage is no error") == Progress::Worked {}
            for sent in source.sent[1..].iter().step_by(3) {
                match stream.check_point(&sent.point) {
                    Ok(_) => {
                        served += 1;
                        for volume in &sent.joined {
                            match read_volume(&stream, *volume, sent) {
                                Ok(content) => assert!(
                                    content == sent.content[volume],
                                    "{} page {page}: wrong bytes at {}",
                                    path.display(),
                                    sent.point
                                ),
                                Err(error) => assert_eq!(error.kind(), Kind::Damaged, "{error}"),
                            }
                        }
                    }
                    Err(error) => {
                        refused += 1;
                        let cut_off = error.kind() == Kind::NotFound && sent.number == source.acked;
                        assert!(matches!(error.kind(), Kind::Damaged | Kind::Refused) || cut_off, "{error}");
                    }
                }
            }
        }
    }
    assert!(refused > 0 && served > refused, "{served} served, {refused} refused");
}

/// Goal: a bad frame in a sealed segment is found by the background check; exactly the points that show it are refused,
/// with volume and range.
#[test]
fn a_bad_frame_refuses_exactly_the_points_that_show_it() {
    let disk = storage(23);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let before = source.join_all(&mut world);
    let during = source.batch(&[Op::Write(0, 16, vec![9; 4096])], None);
    source.send(&mut world, &during.bytes);
    let beside = source.batch(&[Op::Write(0, 300, vec![8; 4096])], None);
    source.send(&mut world, &beside.bytes);
    let after = source.batch(&[Op::Zero(0, 16, 8)], None);
    source.send(&mut world, &after.bytes);
    target.lane(&(name("db"), name("host-a"))).expect("open").seal().expect("a good disk");
    let stream = target.stream(&name("db"), None).expect("made");
    let mut checker = Checker::new(Arc::clone(&stream));
    let path = Path::new(FOLDER).join("00000001.seg");
    let dump = dump_segment(&disk, &path).expect("a good disk");
    let entry = dump.entries.iter().find(|entry| entry.point == during.point).expect("stored");
    // The last byte of the stored batch lies in its only data frame.
    let inline = if u64::from(entry.bytes) + 128 <= 4096 { 128 } else { 4096 };
    disk.corrupt(&path, entry.at + inline + u64::from(entry.bytes) - 1, 4).expect("there");
    while checker.step().expect("damage is no error") == Progress::Worked {}
    assert!(stream.check_point(&before.point).is_ok());
    for point in [during.point, beside.point] {
        let error = stream.check_point(&point).expect_err("shows the bad frame");
        assert_eq!(error.kind(), Kind::Damaged);
        assert!(error.to_string().contains("volume 0 bytes 8192..12288"), "{error}");
    }
    assert!(stream.check_point(&after.point).is_ok(), "overwritten: not needed any more");
    assert_point(&stream, &after);
    assert!(target.alarm_list().iter().any(|alarm| alarm.code.as_str() == "journal.damaged"));
    drop((stream, checker, target));
    let target = open(&disk).expect("opens again");
    let stream = target.stream(&name("db"), None).expect("kept");
    assert!(stream.check_point(&during.point).is_err(), "known after a restart");
}

/// Goal: a lost record list in the middle of the active segment is damage, not a torn tail: later batches stay, points
/// from it on are refused, the source is made to start over, and points after that are good again.
#[test]
fn a_lost_batch_in_the_middle_makes_the_source_compare() {
    let disk = storage(24);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let before = source.join_all(&mut world);
    let content = vec![9; 4096];
    let lost = source.batch(&[Op::Write(0, 16, content.clone())], None);
    source.send(&mut world, &lost.bytes);
    let after = source.batch(&[Op::Write(0, 300, vec![8; 4096])], None);
    source.send(&mut world, &after.bytes);
    let last = source.batch(&[Op::Write(0, 400, vec![8; 512])], None);
    source.send(&mut world, &last.bytes);
    drop(target);
    let path = Path::new(FOLDER).join("00000001.seg");
    let dump = dump_segment(&disk, &path).expect("a good disk");
    let at = dump.entries.iter().find(|entry| entry.point == lost.point).expect("stored").at;
    disk.corrupt(&path, at + 4096 + 330, 1).expect("there");

    let target = open(&disk).expect("opens with damage");
    let mut world = Clocked::new(&target);
    let stream = target.stream(&name("db"), None).expect("kept");
    assert!(stream.check_point(&before.point).is_ok());
    let error = stream.check_point(&last.point).expect_err("may lack the lost batch");
    assert!(error.kind() == Kind::Damaged && error.to_string().contains("batches 2 to 2"), "{error}");
    source.connect(&mut world);
    let welcome = source.welcome.clone().expect("welcomed");
    assert!(welcome.event_open);
    let own = SourceTail { incarnation: source.incarnation, number: last.number, chain: last.chain, unsent: false };
    let Resume::StartOver { incarnation } = resume(&own, welcome.tail.as_ref()) else { panic!("must compare") };
    let early = source.batch(&[Op::Write(0, 500, vec![8; 512])], None);
    source.send(&mut world, &early.bytes);
    assert!(source.refused.is_some(), "the old incarnation may not go on");
    source.sent.pop();
    source.connect(&mut world);
    source.start_over(incarnation);
    let compare = source.batch(&[Op::Mark(RecordKind::EventBegin, 0), Op::Probe(0, 16, content.clone())], None);
    source.answers.clear();
    source.send(&mut world, &compare.bytes);
    assert_eq!(source.answers.iter().flat_map(|answers| &answers.results).filter(|answer| !answer.equal).count(), 1);
    let healed = source.batch(&[Op::Write(0, 16, content), Op::Mark(RecordKind::EventEnd, 0)], None);
    source.send(&mut world, &healed.bytes);
    assert_eq!(source.acked, healed.number);
    assert!(stream.check_point(&last.point).is_err(), "stays in doubt");
    assert!(stream.check_point(&healed.point).is_ok());
    drop((stream, target));
    let target = open(&disk).expect("opens again");
    let stream = target.stream(&name("db"), None).expect("kept");
    assert!(stream.check_point(&last.point).is_err() && stream.check_point(&healed.point).is_ok());
    let slot = read_volume(&stream, 0, &healed).expect("readable");
    assert!(slot[16 * 512..16 * 512 + 4096].iter().all(|byte| *byte == 9));
}

/// Goal: a footer that is lost is made again from its entries.
#[test]
fn a_lost_footer_is_made_again() {
    let (disk, source) = filled(25);
    let (path, len) = segments(&disk)[0].clone();
    disk.corrupt(&path, len - 4000, 255).expect("there");
    let target = open(&disk).expect("opens");
    let stream = target.stream(&name("db"), None).expect("kept");
    source.sent[1..].iter().for_each(|sent| assert_point(&stream, sent));
    assert!(target.alarm_list().iter().any(|alarm| alarm.code.as_str() == "journal.footer_rebuilt"));
    assert_eq!(verify_segment(&disk, &path, None).expect("a good disk").faults, []);
}

/// Goal: a lost segment file is damage, named.
#[test]
fn a_lost_segment_is_noticed() {
    let (disk, source) = filled(26);
    let (path, _) = segments(&disk)[1].clone();
    disk.remove(&path).expect("there");
    disk.sync_dir(Path::new(FOLDER)).expect("a good disk");
    let target = open(&disk).expect("opens");
    let stream = target.stream(&name("db"), None).expect("kept");
    let error = stream.check_point(&source.sent.last().expect("sent").point).expect_err("its history has a hole");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
}

/// Goal: the catalog survives one bad copy without loss and two with an alarm; verify finds a bit in every block of both.
#[test]
fn the_catalog_is_verified_mended_and_rebuilt() {
    let (disk, source) = filled(27);
    {
        let target = open(&disk).expect("a good disk");
        let stream = target.stream(&name("db"), None).expect("made");
        stream.add_hold(source.sent[4].point, "drill").expect("a good point");
        target.catalog().set_policy(&name("db"), "keep", Some("all for 2h")).expect("a good disk");
    }
    catalog::verify(&disk, VAULT).expect("good");
    let mut rng = SimRng::new(8);
    for file in ["catalog", "catalog.copy"].map(Path::new) {
        let len = disk.open(file, OpenMode::Read).expect("there").len().expect("a good disk");
        for at in (0..len).step_by(64).map(|at| at + rng.below((len - at).min(64))) {
            disk.corrupt(file, at, 1).expect("there");
            assert!(catalog::verify(&disk, VAULT).is_err(), "{} byte {at}", file.display());
            disk.corrupt(file, at, 1).expect("there");
        }
    }
    let holds = |disk: &SimStorage| {
        let target = open(disk).expect("opens");
        let codes: Vec<_> = target.alarm_list().iter().map(|alarm| alarm.code.as_str()).collect();
        let stream = target.stream(&name("db"), None).expect("kept");
        source.sent[1..].iter().for_each(|sent| assert_point(&stream, sent));
        let suspended = target.catalog().retention_suspended().is_some();
        (stream.record().holds.len(), stream.policy().len(), codes, suspended)
    };
    let one = disk.fork();
    one.corrupt(Path::new("catalog"), 70, 1).expect("there");
    assert_eq!(holds(&one), (1, 1, vec!["catalog.copy_damaged"], false));
    assert_eq!(holds(&one), (1, 1, vec![], false), "mended");
    let both = disk.fork();
    both.corrupt(Path::new("catalog"), 70, 1).expect("there");
    both.corrupt(Path::new("catalog.copy"), 90, 1).expect("there");
    assert_eq!(holds(&both.fork()), (1, 1, vec!["catalog.rebuilt"], false), "from the stream's state file");
    both.remove(Path::new("groups/db/host-a/state")).expect("there");
    assert_eq!(holds(&both), (0, 0, vec!["catalog.rebuilt"], true), "from the segments: no horizon may move");
    assert_eq!(holds(&both), (0, 0, vec!["catalog.rebuilt"], true), "nor after a restart");
    {
        let target = open(&both).expect("opens");
        let stream = target.stream(&name("db"), None).expect("kept");
        let error = stream.set_horizon(source.sent[4].point).expect_err("suspended");
        assert!(error.to_string().contains("resume-retention"), "{error}");
        let reason = target.resume_retention().expect("a good disk");
        assert!(reason.is_some_and(|reason| reason.contains("db/host-a")));
        assert_eq!(target.resume_retention().expect("a good disk"), None);
        stream.set_horizon(source.sent[4].point).expect("goes on");
    }
    assert!(open(&both).expect("opens").alarm_list().is_empty());
}

/// Goal: an entry that rots in the active segment while the target runs is not lost: the alarm names it, the segment is
/// closed, and a restart serves every point.
#[test]
fn an_entry_that_rots_in_the_open_segment_is_rescued() {
    let disk = storage(28);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.join_all(&mut world);
    for at in [16, 300, 400] {
        let sent = source.batch(&[Op::Write(0, at, vec![9; 4096])], None);
        source.send(&mut world, &sent.bytes);
    }
    let path = Path::new(FOLDER).join("00000001.seg");
    let dump = dump_segment(&disk, &path).expect("a good disk");
    let entry = dump.entries.iter().find(|entry| entry.point == source.sent[1].point).expect("stored");
    // In the record list, behind the batch's header.
    disk.corrupt(&path, entry.at + 4096 + 330, 1).expect("there");
    let stream = target.stream(&name("db"), None).expect("made");
    let mut checker = Checker::new(Arc::clone(&stream));
    while checker.step().expect("damage is no error") == Progress::Worked {}
    let subject = "db/host-a segment 1";
    assert!(target.alarms().is_raised(AlarmCode::EntryDamaged, subject), "{:?}", target.alarm_list());
    source.talk(&mut world);
    assert_eq!((source.refused.clone(), source.closed.clone()), (None, None), "the source is not disturbed");
    let more = source.batch(&[Op::Write(0, 500, vec![7; 512])], None);
    source.send(&mut world, &more.bytes);
    assert_eq!(source.acked, more.number);
    drop((stream, checker, target));
    let target = open(&disk).expect("opens again");
    let stream = target.stream(&name("db"), None).expect("kept");
    assert!(stream.damage().is_empty(), "{:?}", stream.damage());
    for sent in &source.sent {
        stream.check_point(&sent.point).expect("whole");
        assert_point(&stream, sent);
    }
}

/// Goal: batches found lost while the target runs make the source compare at once, not at the next restart, and no point
/// counts as healed before it has; also when more are found lost while it compares.
#[test]
fn batches_lost_at_run_time_make_the_source_compare() {
    let disk = storage(29);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.join_all(&mut world);
    let lost = source.batch(&[Op::Write(0, 16, vec![9; 4096])], None);
    source.send(&mut world, &lost.bytes);
    let stream = target.stream(&name("db"), None).expect("made");
    let lose = |batch| stream.note_damage(Damaged::Batches { from: batch, to: batch, healed: None });
    let begin_again = |source: &mut Source, world: &mut Clocked<'_, SimStorage>| {
        let (code, _) = source.refused.clone().expect("sent away");
        assert_eq!(code, RefuseCode::Unavailable, "a source comes again by itself");
        source.connect(world);
        let welcome = source.welcome.clone().expect("welcomed");
        assert!(welcome.event_open);
        let last = source.sent.last().expect("sent");
        let own = SourceTail { incarnation: source.incarnation, number: last.number, chain: last.chain, unsent: false };
        let Resume::StartOver { incarnation } = resume(&own, welcome.tail.as_ref()) else { panic!("must compare") };
        source.start_over(incarnation);
        let event = source.batch(&[Op::Mark(RecordKind::EventBegin, 0)], None);
        source.send(world, &event.bytes);
        assert_eq!(source.acked, event.number);
    };
    lose(lost.number);
    let late = source.batch(&[Op::Write(0, 300, vec![8; 4096])], None);
    source.send(&mut world, &late.bytes);
    source.sent.pop();
    begin_again(&mut source, &mut world);
    lose(source.acked);
    source.talk(&mut world);
    begin_again(&mut source, &mut world);
    assert!(stream.damage().needs_compare());
    let healed = source.batch(&[Op::Write(0, 16, vec![9; 4096]), Op::Mark(RecordKind::EventEnd, 0)], None);
    source.send(&mut world, &healed.bytes);
    assert!(!stream.damage().needs_compare());
    assert!(stream.check_point(&lost.point).is_err() && stream.check_point(&healed.point).is_ok());
    drop((stream, target));
    let target = open(&disk).expect("opens again");
    let stream = target.stream(&name("db"), None).expect("kept");
    assert!(stream.check_point(&lost.point).is_err() && stream.check_point(&healed.point).is_ok());
}
