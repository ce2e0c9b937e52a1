//! Goal: with the real journal and catalog below, the horizon moves, segments go, views and restores show their points, holds
//! keep them, and a crash at any call changes nothing of that.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use farshore_proto::VolumeIndex;
use farshore_uring::sim::{SimRng, SimStorage, StorageOp};

use super::source::{Clocked, Source, name};
use super::{VOLUME_BYTES, assert_point, open, storage};
use crate::error::{Kind, Result};
use crate::group::GroupHost;
use crate::retention::Mover;
use crate::scratch::{RESERVE_BYTES, Space};
use crate::target::Target;
use crate::view::ViewOptions;
use crate::views::{list_views, open_view, open_views, release_stale_holds, remove_view, remove_views, restore_volume};

const OPTIONS: ViewOptions = ViewOptions {
    read_only: false,
    workers: 0,
    cache_bytes: 1 << 17,
    space: Space { limit: None, reserve: RESERVE_BYTES },
};

fn stream(target: &Target<SimStorage>) -> Arc<GroupHost<SimStorage>> {
    Arc::clone(&target.streams(&name("db")).expect("the group exists")[&name("host-a")])
}

/// Every point that the stream still has, from the horizon on, is what the source had.
fn check_points(stream: &GroupHost<SimStorage>, source: &Source) -> usize {
    let horizon = stream.record().horizon.map_or(0, |point| point.batch.0);
    let mut checked = 0;
    for sent in source.sent.iter().filter(|sent| sent.number.0 >= horizon) {
        if stream.points().get(&sent.point).is_some_and(|point| point.recoverable) {
            assert_point(stream, sent);
            checked += 1;
        }
    }
    checked
}

fn run_mover(stream: &Arc<GroupHost<SimStorage>>, world: &Clocked<'_, SimStorage>) -> Result<()> {
    Mover::<SimStorage, GroupHost<SimStorage>>::new(Arc::clone(stream)).run(world.wall)
}

/// A source that has joined, and a target that keeps 20 s.
fn begin(target: &Target<SimStorage>, source: &mut Source, rng: &mut SimRng) -> bool {
    let mut world = Clocked::new(target);
    source.connect(&mut world);
    if source.welcome.is_none() {
        return false;
    }
    source.step(&mut world, rng, 12);
    source.join_all(&mut world);
    target.catalog().set_policy(&name("db"), "keep", Some("20s")).is_ok()
}

#[test]
fn history_moves_on_and_holds_keep_it() {
    let disk = storage(11);
    let mut rng = SimRng::new(11);
    let target = open(&disk).expect("an empty root");
    let mut source = Source::new("db", "host-a", 2);
    assert!(begin(&target, &mut source, &mut rng));
    let mut world = Clocked::new(&target);
    world.pass(Duration::from_secs(100));
    let stream = stream(&target);
    let (mut segments_most, mut held) = (0, None);
    for round in 0..60u32 {
        world.pass(Duration::from_secs(2));
        let sent = source.step(&mut world, &mut rng, 8);
        if round == 30 {
            open_view(&stream, &name("drill"), sent.point, VolumeIndex(0), OPTIONS).expect("a recoverable point");
            held = Some(sent);
        }
        run_mover(&stream, &world).expect("no faults");
        segments_most = segments_most.max(stream.segments.list().len());
        if round % 10 == 9 {
            assert!(check_points(&stream, &source) > 0);
        }
    }
    let held = held.expect("made in round 30");
    assert_eq!(stream.record().horizon, Some(held.point), "the view's point is the horizon");
    assert!(stream.segments.list()[0].number > 1, "segments were dropped");
    let view = open_view(&stream, &name("drill"), held.point, VolumeIndex(0), OPTIONS).expect("as it was left");
    let mut found = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
    view.read(0, &mut found).expect("no damage");
    assert!(found == held.content[&0]);
    let other = source.sent.last().expect("many").point;
    assert_eq!(
        open_view(&stream, &name("drill"), other, VolumeIndex(0), OPTIONS).err().expect("taken").kind(),
        Kind::Refused
    );
    assert_eq!(list_views(&stream).len(), 1);
    remove_view(&stream, &name("drill"), VolumeIndex(0)).expect("no faults");
    assert_eq!(remove_view(&stream, &name("drill"), VolumeIndex(0)).expect_err("gone").kind(), Kind::NotFound);
    run_mover(&stream, &world).expect("no faults");
    assert!(stream.record().horizon > Some(held.point), "the hold is gone");
    assert_eq!(
        open_view(&stream, &name("old"), held.point, VolumeIndex(0), OPTIONS).err().expect("gone").kind(),
        Kind::NotFound
    );
    assert!(check_points(&stream, &source) > 5);
    drop(stream);
    drop(target);
    let target = open(&disk).expect("opens again");
    let stream = self::stream(&target);
    assert!(check_points(&stream, &source) > 5, "after a restart");
    assert_eq!(target.alarm_list(), []);
    assert_eq!(stream.index.verify().len(), 0);
}

#[test]
fn restores_show_their_point() {
    let disk = storage(12);
    let mut rng = SimRng::new(12);
    let target = open(&disk).expect("an empty root");
    let mut source = Source::new("db", "host-a", 2);
    assert!(begin(&target, &mut source, &mut rng));
    let mut world = Clocked::new(&target);
    let stream = stream(&target);
    let folder = tempfile::tempdir().expect("a temporary folder");
    for round in 0..6u32 {
        let sent = source.step(&mut world, &mut rng, 8);
        let path = folder.path().join(format!("{round}.raw"));
        let done = restore_volume(&stream, sent.point, VolumeIndex(1), &path, |_| true).expect("no damage");
        assert_eq!((done.position, done.size), (VOLUME_BYTES, VOLUME_BYTES));
        assert!(std::fs::read(&path).expect("just made") == sent.content[&1]);
        let error = restore_volume(&stream, sent.point, VolumeIndex(1), &path, |_| true).expect_err("the file exists");
        assert_eq!(error.kind(), Kind::Refused);
        let stopped = restore_volume(&stream, sent.point, VolumeIndex(1), &folder.path().join("stopped"), |_| false);
        assert_eq!(stopped.expect_err("told to stop").kind(), Kind::Refused);
        std::fs::remove_file(folder.path().join("stopped")).expect("it was begun");
        let missing = restore_volume(&stream, sent.point, VolumeIndex(9), Path::new("unused"), |_| true);
        assert_eq!(missing.expect_err("no such volume").kind(), Kind::NotFound);
    }
    assert_eq!(stream.record().holds, [], "restores let their holds go");
    stream.add_hold(source.sent.last().expect("six").point, "restore of volume 1").expect("no faults");
    release_stale_holds(&stream).expect("no faults");
    assert_eq!(stream.record().holds, []);
}

/// The life that crashes; errors are the crash.
fn life(target: &Target<SimStorage>, source: &mut Source, rng: &mut SimRng) -> Result<()> {
    if !begin(target, source, rng) || source.refused.is_some() {
        return Ok(());
    }
    let mut world = Clocked::new(target);
    world.pass(Duration::from_secs(100));
    for round in 0..14u32 {
        world.pass(Duration::from_secs(9));
        let sent = source.step(&mut world, rng, 8);
        if source.refused.is_some() || source.paused.is_some() || source.acked < sent.number {
            return Ok(());
        }
        let stream = stream(target);
        if round == 6 {
            let view = open_view(&stream, &name("drill"), sent.point, VolumeIndex(0), OPTIONS)?;
            view.flush()?;
        }
        if round == 10 {
            remove_view(&stream, &name("drill"), VolumeIndex(0))?;
        }
        run_mover(&stream, &world)?;
    }
    Ok(())
}

#[test]
fn a_kill_at_any_call_keeps_every_point() {
    let total = {
        let disk = storage(13);
        let target = open(&disk).expect("an empty root");
        let mut source = Source::new("db", "host-a", 2);
        life(&target, &mut source, &mut SimRng::new(13)).expect("no faults");
        disk.op_count()
    };
    let mut crash_rng = SimRng::new(99);
    let (mut at, mut lives) = (crash_rng.below(10), 0);
    while at < total {
        lives += 1;
        let disk = storage(13);
        let mut source = Source::new("db", "host-a", 2);
        disk.crash_at(Some(at));
        if let Ok(target) = open(&disk) {
            let _died = life(&target, &mut source, &mut SimRng::new(13));
        }
        let disk = disk.crash(&mut crash_rng);
        let target = open(&disk).expect("opens after a crash");
        assert_eq!(target.alarm_list(), [], "crash at call {at} is no damage");
        if let Ok(streams) = target.streams(&name("db")) {
            let stream = Arc::clone(&streams[&name("host-a")]);
            check_points(&stream, &source);
            let mut world = Clocked::new(&target);
            world.pass(Duration::from_secs(100_000));
            let newest = stream.points().newest().map(|point| point.id);
            run_mover(&stream, &world).expect("goes on after a crash");
            assert_eq!(stream.points().newest().map(|point| point.id), newest, "the newest point stays");
            check_points(&stream, &source);
            for view in list_views(&stream) {
                let shown = open_view(&stream, &view.id, view.of.point, view.of.volume, OPTIONS).expect("it survives");
                let sent = source.sent.iter().find(|sent| sent.point == view.of.point).expect("only what was sent");
                let mut found = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
                shown.read(0, &mut found).expect("no damage");
                assert!(found == sent.content[&view.of.volume.0], "crash at call {at}: the view's point");
            }
            assert_eq!(stream.record().holds.len(), list_views(&stream).len(), "a hold for each view and none else");
        }
        at += 1 + crash_rng.below(total / 60);
    }
    assert!(lives > 60);
}

/// Goal: opening and closing a view of two volumes costs few syncs: one change of the catalog each (5), and per volume the
/// making of its scratch (3) or the removal of its map (1).
#[test]
fn opening_and_closing_a_view_costs_few_syncs() {
    let disk = storage(13);
    let target = open(&disk).expect("an empty root");
    let mut source = Source::new("db", "host-a", 2);
    assert!(begin(&target, &mut source, &mut SimRng::new(13)));
    let (stream, point) = (stream(&target), source.sent.last().expect("sent").point);
    let syncs = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&syncs);
    disk.set_fault(move |op, _| {
        counter.fetch_add(u64::from(matches!(op, StorageOp::Sync | StorageOp::SyncDir)), Ordering::Relaxed);
        None
    });
    let volumes = [VolumeIndex(0), VolumeIndex(1)];
    let note = Some(("export drill", "somewhere"));
    let read_only = ViewOptions { read_only: true, ..OPTIONS };
    for (id, options, opening, closing) in [("drill", OPTIONS, 5 + 2 * 3, 5 + 2), ("look", read_only, 5, 5)] {
        let views = open_views(&stream, &name(id), point, &volumes, options, note).expect("no faults");
        assert_eq!(syncs.swap(0, Ordering::Relaxed), opening, "open {id}");
        let record = stream.record();
        assert_eq!((views.len(), record.holds.len(), list_views(&stream).len()), (2, 2, 2));
        assert_eq!(record.notes.get("export drill").map(String::as_str), Some("somewhere"));
        drop(open_views(&stream, &name(id), point, &volumes, options, note).expect("known"));
        assert_eq!(syncs.swap(0, Ordering::Relaxed), 0, "open {id} once more");
        drop(views);
        remove_views(&stream, &name(id), "export drill").expect("no faults");
        assert_eq!(syncs.swap(0, Ordering::Relaxed), closing, "close {id}");
        let record = stream.record();
        assert!(record.holds.is_empty() && record.notes.is_empty(), "{record:?}");
    }
}
