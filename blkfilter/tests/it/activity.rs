//! The activity log under simulation: the host goes down at any moment, and what differs then must lie in what the log says.

use std::path::Path;
use std::sync::Arc;

use farshore_blkfilter::activity::{EXTENT_BYTES, Found, GroupActivity, Keeper, KeeperConfig, Loaded};
use farshore_blkfilter::{Alarm, Buf, CaptureConfig, CaptureGroup, Content, FilterQueue, FilterVolume};
use farshore_proto::{GroupId, Position, VolumeIndex};
use farshore_ring::{Memory, Ring, RingConfig};
use farshore_uring::sim::{DiskFault, DiskOp, SECTOR, SimDisk, SimIo, SimRng, SimStorage};
use farshore_uring::{BlockDevice, BlockQueue, Errno, OpenMode, Purpose, Request, Storage, StorageFile};

use crate::random::{Seed, seeds};
use crate::rig::{Config, HoleyDisk, Rig, identity, spec};

type File = <SimStorage as Storage>::File;

const LOG: &str = "activity.log";
const GROUP: GroupId = GroupId([2; 16]);

/// Places, of 18 extents: few, so that extents come and go; more, so that they go without anybody's waiting for it.
const PLACES: [u32; 3] = [5, 8, 14];

/// A log beside a rig.
struct Logged {
    rng: SimRng,
    storage: SimStorage,
    keeper: Keeper<File>,
    places: u32,
    /// The log covers everything.
    upheld: bool,
    sessions: u64,
}

fn keeper(storage: &SimStorage, places: u32, session: u64) -> (Keeper<File>, Loaded) {
    let path = Path::new(LOG);
    let mode = if storage.exists(path).expect("a storage") { OpenMode::ReadWrite } else { OpenMode::CreateNew };
    let file = storage.open(path, mode).expect("no faults yet");
    storage.sync_dir(Path::new("")).expect("no faults yet");
    let config = KeeperConfig { places, owner: [3; 16] };
    Keeper::open(file, config, ([u8::try_from(session % 251).expect("small"); 16], session)).expect("readable")
}

impl Logged {
    fn new(seed: u64) -> (Self, Rig) {
        let mut rng = SimRng::new(seed ^ 0xac71);
        let storage = SimStorage::new(rng.fork());
        let places = PLACES[rng.index(3)];
        let (mut keeper, loaded) = keeper(&storage, places, 1);
        assert_eq!(loaded.found, Found::New);
        keeper.begin().expect("no faults yet");
        let flushes = [0, 2, 100][rng.index(3)];
        let mut config = Config { volumes: 2, guests: 4, slots: 64 * 9, flushes, ..Config::default() };
        config.capture.activity = Some(GroupActivity { log: Arc::clone(keeper.log()), group: GROUP });
        let rig = Rig::new(seed, config);
        settle(&rig);
        (Self { rng, storage, keeper, places, upheld: false, sessions: 1 }, rig)
    }

    /// What the thread of the log does when it is waked, or some of it.
    fn turn(&mut self) {
        match self.keeper.turn() {
            Ok(turn) => self.upheld = turn.upheld,
            Err(_) => {
                // What a clock does for it in earnest.
                self.keeper.log().pass();
                self.upheld = false;
                // The next turn fails if this does.
                let _ = self.keeper.begin();
            }
        }
        if self.rng.chance(1, 2)
            && let Some(job) = self.keeper.poll_flush()
        {
            let _ = job.run();
            self.keeper.handle_flushed();
        }
        if self.rng.chance(1, 20) {
            let _ = self.keeper.tidy();
        }
        if self.rng.chance(1, 200) {
            self.keeper.handle_heard();
        }
    }

    fn steps(&mut self, rig: &mut Rig, count: u64, load: u64, link: u64) {
        for _ in 0..count {
            rig.random_step(load, link);
            if self.rng.chance(1, 4) {
                self.turn();
            }
        }
    }

    /// The log as the host finds it after it went down.
    fn go_down(&mut self, rig: &mut Rig) -> Loaded {
        rig.go_down();
        self.storage = self.storage.crash(&mut self.rng);
        self.sessions += 1;
        if self.rng.chance(1, 4) {
            // One bit of it has rotted; anywhere but in the superblock's unused bytes that shows, or is of no use any more.
            let path = Path::new(LOG);
            let len = self.storage.open(path, OpenMode::Read).and_then(|file| file.len()).expect("there");
            self.storage.corrupt(path, self.rng.below(len), 1 << self.rng.below(8)).expect("there");
        }
        let (keeper, loaded) = keeper(&self.storage, self.places, self.sessions);
        self.keeper = keeper;
        loaded
    }

    /// The agent alone is killed: its ring is found again, and the log goes on in a new life.
    fn kill_agent(&mut self, rig: &mut Rig) {
        self.sessions += 1;
        let (mut keeper, loaded) = keeper(&self.storage, self.places, self.sessions);
        assert_eq!(loaded.found, Found::Whole);
        keeper.begin().expect("no faults");
        rig.config.capture.activity = Some(GroupActivity { log: Arc::clone(keeper.log()), group: GROUP });
        self.keeper = keeper;
        rig.kill_and_restart();
        settle(rig);
        self.upheld = false;
    }

    fn come_back(&mut self, rig: &mut Rig, loaded: &Loaded, trusted: bool) {
        self.keeper.begin().expect("no faults");
        rig.config.capture.activity = Some(GroupActivity { log: Arc::clone(self.keeper.log()), group: GROUP });
        let ranges: Vec<_> = (0..rig.config.volumes)
            .map(|index| {
                let known = trusted && rig.replica.joined.contains(&index);
                known.then(|| loaded.ranges(&GROUP, VolumeIndex(index)))
            })
            .collect();
        rig.come_back(&ranges);
        settle(rig);
        self.upheld = false;
    }
}

/// What is known to be missing is to be covered.
fn settle(rig: &Rig) {
    for index in 0..rig.config.volumes {
        assert!(rig.group.settle(VolumeIndex(index)).is_some());
    }
}

/// Sectors where a joined volume's disk and replica differ, and those of them that are not in what the log says.
fn differing(rig: &Rig, loaded: &Loaded) -> (u64, Option<(u16, u64)>) {
    let (mut count, mut uncovered) = (0, None);
    for (index, disk) in (0_u16..).zip(&rig.disks).filter(|(index, _)| rig.replica.joined.contains(index)) {
        let mut image = vec![0; usize::try_from(disk.size()).expect("small")];
        disk.peek(0, &mut image);
        let ranges = loaded.ranges(&GROUP, VolumeIndex(index));
        let covered = |at: u64| ranges.iter().any(|(offset, len)| (*offset..offset + len).contains(&at));
        let replica = &rig.replica.images[&index];
        for (at, (ours, theirs)) in image.chunks(SECTOR).zip(replica.chunks(SECTOR)).enumerate() {
            if ours != theirs {
                count += 1;
                let at = (at * SECTOR) as u64;
                if !covered(at) {
                    uncovered.get_or_insert((index, at));
                }
            }
        }
    }
    (count, uncovered)
}

/// A rig at rest, in sync.
fn synced(seed: u64) -> (Logged, Rig) {
    let (mut logged, mut rig) = Logged::new(seed);
    rig.go_live();
    logged.steps(&mut rig, 200, 0, 100);
    rig.settle();
    (logged, rig)
}

/// Everything comes to rest, with the log's help.
fn rest(logged: &mut Logged, rig: &mut Rig) {
    for _ in 0..2_000 {
        logged.steps(rig, 20, 0, 100);
        if rig.guests.iter().all(|guest| guest.pending.is_empty()) {
            break;
        }
    }
    rig.settle();
    rig.check_equal();
}

/// Goal: wherever the host goes down, source and replica differ only where the log says (I4); comparing that alone makes them equal again;
/// and it is not everything. Method: load, breaks of the link, crashes that keep, lose and tear what was not stable.
#[test]
fn what_differs_after_a_crash_is_in_the_log() {
    let (mut differed, mut trusted, mut partly) = (0, 0, 0);
    for seed in seeds(8) {
        let _seed = Seed(seed);
        let (mut logged, mut rig) = synced(seed);
        for _ in 0..4 {
            let (load, link) = (2 + logged.rng.below(60), logged.rng.below(110));
            if !rig.live && logged.rng.chance(3, 4) {
                rig.go_live();
            }
            let count = 100 + logged.rng.below(2500);
            logged.steps(&mut rig, count, load, link);
            if logged.rng.chance(1, 4) {
                rig.break_link();
                logged.steps(&mut rig, count, load, link);
            }
            // (A log that did not cover everything says nothing of what an agent that goes on from there does.)
            if logged.upheld && !logged.keeper.log().passes() && logged.rng.chance(1, 2) {
                logged.kill_agent(&mut rig);
                let count = 1 + logged.rng.below(600);
                logged.steps(&mut rig, count, load / 2, link);
            }
            let upheld = logged.upheld && !logged.keeper.log().passes();
            let loaded = logged.go_down(&mut rig);
            // A transaction that was torn is told from a damaged one by nothing.
            let good = loaded.found == Found::Whole && upheld;
            // An agent may have other reasons to compare everything.
            let trust = good && logged.rng.chance(3, 4);
            let (count, uncovered) = differing(&rig, &loaded);
            if good {
                assert_eq!(uncovered, None, "differs outside of the log (volume, byte); {count} sectors differ");
                differed += count;
                trusted += 1;
                let extents: u64 =
                    (0..2).map(|v| loaded.ranges(&GROUP, VolumeIndex(v)).iter().map(|r| r.1).sum::<u64>()).sum();
                partly += u64::from(extents < rig.disks.iter().map(SimDisk::size).sum());
            }
            logged.come_back(&mut rig, &loaded, trust);
            if logged.rng.chance(1, 2) {
                rig.go_live();
                rest(&mut logged, &mut rig);
            }
        }
    }
    assert!(
        differed > 0 && trusted > 0 && partly > 0,
        "{differed} sectors differed, {trusted} logs were good, {partly} told a part"
    );
}

/// A volume of `extents` extents in a group with a log of `places`.
struct Bare {
    storage: SimStorage,
    keeper: Keeper<File>,
    group: Arc<CaptureGroup>,
    filter: Arc<FilterVolume<HoleyDisk>>,
    disk: SimDisk,
    io: SimIo<Buf>,
    queue: FilterQueue,
}

impl Bare {
    fn new(seed: u64, places: u32, extents: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let storage = SimStorage::new(rng.fork());
        let (mut keeper, _) = keeper(&storage, places, 1);
        keeper.begin().expect("no faults yet");
        let config = RingConfig { slab_bytes: 8 << 20, descriptors: Some(4096), ..RingConfig::new(identity()) };
        let ring = Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("a ring"));
        let activity = Some(GroupActivity { log: Arc::clone(keeper.log()), group: GROUP });
        let group = CaptureGroup::new(ring, CaptureConfig { activity, ..CaptureConfig::default() });
        let disk = SimDisk::new(extents * EXTENT_BYTES, rng.fork());
        let filter = group.add_volume(spec(0, Content::AsMarked, true), HoleyDisk(disk.clone())).expect("room");
        assert!(group.settle(VolumeIndex(0)).is_some());
        keeper.turn().expect("no faults yet");
        let mut io = SimIo::new(rng.fork());
        io.attach(&disk);
        let queue = filter.open_queue(&mut io).expect("few owners");
        Self { storage, keeper, group, filter, disk, io, queue }
    }

    /// Writes a sector of each of these extents, as far as it gets.
    fn write(&mut self, extents: impl IntoIterator<Item = u64>) {
        for extent in extents {
            let buf = self.queue.buffer(Purpose::Write, 512);
            let request = Request::Write { offset: extent * EXTENT_BYTES, len: 512, buf, fua: false };
            self.queue.submit(&mut self.io, u32::try_from(extent).expect("few"), request);
        }
    }

    /// Requests that have ended, well.
    fn run(&mut self) -> Vec<u32> {
        let ended = self.results();
        ended.iter().for_each(|(tag, result)| assert_eq!(*result, Ok(()), "request {tag}"));
        ended.into_iter().map(|(tag, _)| tag).collect()
    }

    /// Requests that have ended, and how.
    fn results(&mut self) -> Vec<(u32, Result<(), Errno>)> {
        let mut ended = Vec::new();
        for _ in 0..10_000 {
            let mut moved = self.io.step();
            while let Some(completion) = self.io.poll_completion() {
                self.queue.handle_completion(&mut self.io, completion);
                moved = true;
            }
            if self.io.take_wakeup() {
                self.queue.handle_wake(&mut self.io);
                moved = true;
            }
            while let Some(done) = self.queue.poll_done() {
                ended.push((done.tag, done.result));
            }
            if !moved {
                break;
            }
        }
        ended
    }

    fn flush(&mut self) {
        if let Some(job) = self.keeper.poll_flush() {
            assert!(job.run());
            self.keeper.handle_flushed();
        }
    }
}

/// Goal: a guest hears of every flush that failed, also where it was one of ours: a device says so once, and a guest that hears "stable"
/// drops what it could write again. It hears of it once; a person hears of it, too; the log covers nothing from then on.
#[test]
fn a_guest_hears_of_a_flush_that_failed_for_the_log() {
    for ours in [false, true] {
        let mut bare = Bare::new(8, 4, 16);
        bare.group.note_durable(Position(1 << 40));
        bare.write(0..4);
        bare.keeper.turn().expect("no faults");
        assert_eq!(bare.run().len(), 4);
        bare.write(8..9);
        assert!(bare.keeper.turn().expect("no faults").starved, "a flush is needed");
        bare.disk.set_fault(|op: &DiskOp| match op {
            DiskOp::Sync => DiskFault::Error(libc::EIO),
            DiskOp::Read { .. } | DiskOp::Write { .. } | DiskOp::Allocate { .. } => DiskFault::None,
        });
        if ours {
            assert!(!bare.keeper.poll_flush().expect("it is wanted").run(), "the device fails it");
            bare.keeper.handle_flushed();
            // The device has said it, and works again.
            bare.disk.clear_fault();
        }
        bare.queue.submit(&mut bare.io, 99, Request::Flush);
        assert_eq!(bare.results(), [(99, Err(Errno(libc::EIO)))], "ours: {ours}");
        bare.disk.clear_fault();
        let alarms: Vec<_> = std::iter::from_fn(|| bare.group.poll_alarm()).map(|event| event.alarm).collect();
        assert!(alarms.contains(&Alarm::FlushFailed { volume: VolumeIndex(0), errno: libc::EIO }), "{alarms:?}");
        bare.queue.submit(&mut bare.io, 100, Request::Flush);
        assert_eq!(bare.run(), [100], "once");
        bare.keeper.turn().expect("no faults");
        bare.run();
        assert!(!bare.keeper.turn().expect("no faults").upheld, "ours: {ours}");
    }
}

/// Goal: wherever the writing of a long batch is cut off, an extent whose write was let go is in the log. Method: a power cut at every
/// operation of the log's storage while hundreds of extents become active at once, several of each.
#[test]
fn a_batch_that_is_cut_off_loses_nothing_that_was_answered() {
    let mut whole = 0;
    for cut in 0.. {
        let mut bare = Bare::new(cut, 200, 400);
        bare.write(0..60);
        bare.keeper.turn().expect("no faults yet");
        let mut answered = bare.run();
        bare.group.note_durable(Position(1 << 40));
        let begin = bare.storage.op_count();
        bare.storage.crash_at(Some(begin + cut));
        // More than there are places: some of the first have to leave.
        bare.write(100..270);
        for _ in 0..6 {
            // Fails where the storage has crashed.
            let turned = bare.keeper.turn();
            answered.extend(bare.run());
            bare.flush();
            if turned.is_err() {
                break;
            }
        }
        let reached = bare.storage.op_count() >= begin + cut;
        let mut rng = SimRng::new(cut);
        for _ in 0..4 {
            let fork = bare.storage.fork().crash(&mut rng);
            let (_, loaded) = keeper(&fork, 200, 2);
            if loaded.found != Found::Whole {
                continue;
            }
            whole += 1;
            let ranges = loaded.ranges(&GROUP, VolumeIndex(0));
            // What has left was flushed and is durable; what was answered last has not.
            for tag in answered.iter().filter(|tag| **tag >= 100) {
                let at = u64::from(*tag) * EXTENT_BYTES;
                assert!(
                    ranges.iter().any(|(offset, len)| (*offset..offset + len).contains(&at)),
                    "cut {cut}: extent {tag}"
                );
            }
        }
        if !reached {
            break;
        }
        bare.storage.crash_at(None);
    }
    assert!(whole > 20, "{whole} logs were whole");
}

/// Goal: a flush that began before a write had ended does not let its extent leave.
#[test]
fn a_flush_counts_for_what_had_ended_before_it() {
    let mut bare = Bare::new(1, 4, 40);
    bare.group.note_durable(Position(1 << 40));
    bare.write(0..4);
    bare.keeper.turn().expect("no faults");
    // The guest's flush is under way from before its write ends.
    bare.queue.submit(&mut bare.io, 999, Request::Flush);
    bare.io.step();
    assert_eq!(bare.run().len(), 5);
    bare.write(10..12);
    for _ in 0..4 {
        assert!(bare.keeper.turn().expect("no faults").starved, "all four have unstable writes");
        assert_eq!(bare.run(), []);
    }
    bare.flush();
    for _ in 0..2 {
        bare.keeper.turn().expect("no faults");
    }
    assert_eq!(bare.run().len(), 2);
}

/// Goal: a log that fails keeps nobody (I1), says so, and covers again what went past it when it works again.
#[test]
fn a_failing_log_lets_go_and_catches_up() {
    let mut bare = Bare::new(2, 16, 64);
    bare.storage.fail_after(0, libc::EIO);
    bare.write(0..3);
    assert!(bare.keeper.turn().is_err());
    assert_eq!(bare.run(), []);
    let log = Arc::clone(bare.keeper.log());
    assert!(log.answered() < log.asked());
    log.pass();
    assert_eq!(bare.run().len(), 3);
    assert!(log.passes() && log.passed() >= 3);
    bare.write(8..10);
    assert_eq!(bare.run().len(), 2, "nobody waits");
    assert!(bare.keeper.turn().is_err(), "it has to be begun anew");
    bare.storage.clear_fault();
    bare.keeper.begin().expect("it works again");
    assert!(bare.keeper.turn().expect("it works again").upheld);
    assert!(!log.passes());
    let (_, loaded) = keeper(&bare.storage, 16, 2);
    let ranges = loaded.ranges(&GROUP, VolumeIndex(0));
    for extent in [0, 1, 2, 8, 9] {
        assert!(ranges.contains(&(extent * EXTENT_BYTES, EXTENT_BYTES)), "extent {extent}");
    }
    drop(bare.filter);
}

/// Goal: what became active by a log that was written anew after an error is in it, also when nothing was written to it since. Method: an
/// error at each operation of a turn; the log is read as it stands then.
#[test]
fn an_error_in_between_loses_nothing_that_was_answered() {
    for at in 0..4 {
        let mut bare = Bare::new(6, 16, 64);
        bare.write(0..3);
        bare.keeper.turn().expect("no faults yet");
        assert_eq!(bare.run().len(), 3);
        bare.storage.fail_after(at, libc::EIO);
        bare.write(8..10);
        let failed = bare.keeper.turn().is_err();
        bare.storage.clear_fault();
        if failed {
            bare.keeper.begin().expect("it works again");
            bare.keeper.turn().expect("it works again");
        }
        assert_eq!(bare.run().len(), 2);
        let (_, loaded) = keeper(&bare.storage, 16, 2);
        assert_eq!(loaded.found, Found::Whole, "fault {at}");
        let ranges = loaded.ranges(&GROUP, VolumeIndex(0));
        for extent in [0, 1, 2, 8, 9] {
            assert!(ranges.contains(&(extent * EXTENT_BYTES, EXTENT_BYTES)), "fault {at}: extent {extent}");
        }
    }
}

/// Goal: a table that is full of a volume that is not there yet, or never comes, keeps nobody for good. Method: a new life of a full log, in which
/// another volume is written to first; then the old one comes.
#[test]
fn a_full_table_makes_room() {
    let mut bare = Bare::new(7, 4, 64);
    bare.write(0..4);
    bare.keeper.turn().expect("no faults");
    assert_eq!(bare.run().len(), 4);
    for comes in [true, false] {
        let storage = bare.storage.fork();
        let (mut keeper, loaded) = keeper(&storage, 4, 2);
        assert_eq!(loaded.active(), 4);
        keeper.begin().expect("no faults");
        let config = RingConfig { slab_bytes: 8 << 20, descriptors: Some(4096), ..RingConfig::new(identity()) };
        let ring = Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("a ring"));
        let activity = Some(GroupActivity { log: Arc::clone(keeper.log()), group: GROUP });
        let group = CaptureGroup::new(ring, CaptureConfig { activity, ..CaptureConfig::default() });
        let disk = || HoleyDisk(SimDisk::new(64 * EXTENT_BYTES, SimRng::new(9)));
        group.add_volume(spec(1, Content::AsMarked, true), disk()).expect("room");
        assert!(group.settle(VolumeIndex(1)).is_some());
        group.cover(&group.volume(VolumeIndex(1)).expect("added"), 0, EXTENT_BYTES);
        for _ in 0..3 {
            let _ = keeper.turn().expect("no faults");
            if comes && group.volume(VolumeIndex(0)).is_none() {
                group.add_volume(spec(0, Content::AsMarked, true), disk()).expect("room");
                assert!(group.settle(VolumeIndex(0)).is_some());
            }
            if let Some(job) = keeper.poll_flush() {
                assert!(job.run());
                keeper.handle_flushed();
            }
        }
        let log = keeper.log();
        assert_eq!((log.answered(), log.obeyed()), (log.asked(), log.ordered()), "comes: {comes}");
        let (_, loaded) = self::keeper(&storage, 4, 3);
        for (volume, extents) in [(1, vec![0]), (0, vec![0, 1, 2, 3])] {
            let ranges = loaded.ranges(&GROUP, VolumeIndex(volume));
            let covered = |at: u64| ranges.iter().any(|(offset, len)| (*offset..offset + len).contains(&at));
            assert!(
                extents.iter().all(|extent| covered(extent * EXTENT_BYTES)),
                "comes: {comes}, volume {volume}: {ranges:?}"
            );
        }
    }
}

/// Goal: hot extents cost no I/O; and an extent that was used last is not the one to leave.
#[test]
fn what_is_active_costs_nothing() {
    let mut bare = Bare::new(3, 16, 64);
    bare.group.note_durable(Position(1 << 40));
    bare.write(0..10);
    bare.keeper.turn().expect("no faults");
    assert_eq!(bare.run().len(), 10);
    let before = bare.storage.op_count();
    for _ in 0..50 {
        bare.write(0..10);
        assert_eq!(bare.run().len(), 10, "nobody waits");
    }
    assert_eq!((bare.storage.op_count(), bare.keeper.log().answered()), (before, bare.keeper.log().asked()));
}

/// Goal: a target that has heard of a later life, or of more of this one, than the log knows of is told that it does not cover; a log that
/// went on from there does (a disk that was put back to an older state).
#[test]
fn a_log_that_was_put_back_is_seen() {
    let mut bare = Bare::new(4, 16, 64);
    bare.write(0..1);
    bare.keeper.turn().expect("no faults");
    let old = bare.storage.fork();
    let then = bare.keeper.log().mark();
    bare.write(1..2);
    bare.keeper.turn().expect("no faults");
    let later = bare.keeper.log().mark();
    assert!(later.number > then.number && later.session == then.session);

    let (_, loaded) = keeper(&bare.storage, 16, 2);
    assert!(then.is_in(&loaded.lives) && later.is_in(&loaded.lives));
    let (mut back, loaded) = keeper(&old, 16, 3);
    assert!(then.is_in(&loaded.lives) && !later.is_in(&loaded.lives));
    // It goes on, further than the other had come, and is started again: still no way from one to the other.
    for _ in 0..4 {
        back.begin().expect("no faults");
    }
    let (mut next, loaded) = keeper(&old, 16, 4);
    assert!(then.is_in(&loaded.lives) && back.log().mark().is_in(&loaded.lives) && !later.is_in(&loaded.lives));
    // Heard of by the target: nothing older counts.
    next.handle_heard();
    next.begin().expect("no faults");
    let (_, loaded) = keeper(&old, 16, 5);
    assert!(next.log().mark().is_in(&loaded.lives) && !then.is_in(&loaded.lives));
}

/// Goal: rot in what counts of a log is not passed over for an older state of it. Method: one flipped bit in each block that the last
/// transaction or the table needs, and in a page of marks; one in a block that has had its time is of no account.
#[test]
fn rot_is_not_taken_for_an_older_state() {
    let mut bare = Bare::new(5, 200, 300);
    // Nothing is durable at the target: extents that leave are marked.
    for first in [0, 100, 200] {
        bare.write(first..first + 90);
        for _ in 0..4 {
            bare.keeper.turn().expect("no faults");
            bare.flush();
            bare.run();
        }
    }
    let path = Path::new(LOG);
    let last = bare.keeper.log().mark().number;
    let found = |block: u64| {
        let fork = bare.storage.fork();
        fork.corrupt(path, block * 4096 + 70, 4).expect("there");
        keeper(&fork, 200, 2).1.found
    };
    assert!(bare.keeper.marked() > 0 && last > 5);
    assert!(matches!(found(0), Found::Damaged(_)), "the superblock");
    // 200 places are two slices.
    assert!(matches!(found(1 + last), Found::Damaged(_)) && matches!(found(last), Found::Damaged(_)));
    assert!(matches!(found(257), Found::Damaged(_)) && matches!(found(258), Found::Damaged(_)), "a page's halves");
    assert_eq!(found(1), Found::Whole, "never used, and far away");
    assert_eq!(found(2), Found::Whole, "the first transaction, long since repeated");
}

/// Goal: a start that is cut off while it writes the log anew leaves all of it. Method: a full table of two slices, of which the first has lost
/// its first extents by then; a power cut, or a kill, at every operation of the next life's begin.
#[test]
fn a_start_that_is_cut_off_leaves_the_log_whole() {
    let mut bare = Bare::new(8, 200, 400);
    bare.group.note_durable(Position(1 << 40));
    for first in [0, 60, 120] {
        bare.write(first..first + 60);
        bare.keeper.turn().expect("no faults");
        bare.run();
    }
    // Others in the places of the first.
    bare.write(300..330);
    for _ in 0..4 {
        bare.keeper.turn().expect("no faults");
        bare.flush();
        bare.run();
    }
    let (_, before) = keeper(&bare.storage, 200, 2);
    let before = before.ranges(&GROUP, VolumeIndex(0));
    let mut rng = SimRng::new(8);
    let mut whole = 0;
    for cut in 0.. {
        let storage = bare.storage.fork();
        let (mut next, _) = keeper(&storage, 200, 3);
        let begin = storage.op_count();
        storage.crash_at(Some(begin + cut));
        let begun = next.begin().is_ok();
        for killed in [true, false, false, false] {
            let after = if killed { storage.fork() } else { storage.fork().crash(&mut rng) };
            let (_, loaded) = keeper(&after, 200, 4);
            if loaded.found == Found::Whole {
                whole += 1;
                let now = loaded.ranges(&GROUP, VolumeIndex(0));
                let lost: Vec<_> = before.iter().filter(|range| !now.contains(range)).collect();
                assert!(lost.is_empty(), "cut {cut}, killed {killed}: {lost:?}");
            }
        }
        if begun {
            break;
        }
    }
    assert!(whole > 8, "{whole} logs were whole");
}
