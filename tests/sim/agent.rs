//! One life of the agent: filter, sync, cuts, activity log, disk log and stream over the host's ring. What it decides at its start is what
//! `agent/src/group.rs`, `attach.rs` and `activity.rs` decide; the machines are the real ones.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farshore_blkfilter::activity::{ActivityLog, FlushJob, Found, GroupActivity, Keeper, KeeperConfig, Loaded};
use farshore_blkfilter::sync::{SyncConfig, Syncer, VerifyEvent, VerifyOrder};
use farshore_blkfilter::{
    Buf, CaptureConfig, CaptureGroup, Content, Cutter, FilterQueue, FilterVolume, VolumeSpec, mark_recovered,
};
use farshore_proto::keys::HostKey;
use farshore_proto::session::SourceConfig;
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, LogMark, Now, Position, SECTOR_BYTES, VolumeIndex,
    WallTime,
};
use farshore_ring::{CellRef, Ring, RingConfig, WritingRange};
use farshore_streamer::{
    CaptureRing, DiskLog, Entropy, GroupLog, Line, LogDone, LogOrder, LogStart, LogTurn, LoggedBatch, RingSource,
    SegmentPool, StreamLog, Streamer, StreamerConfig, VolumeSet, Work, Worker, bridge,
};
use farshore_uring::sim::{SimDisk, SimIo, SimRng, SimStorage};
use farshore_uring::{BlockDevice, BlockQueue, Io, OpenMode, Purpose, Request, Storage};

use crate::faults::Fault;
use crate::history::stamp;
use crate::host::{HoleyDisk, Host, LogKept};
use crate::site::{VAULT, name};
use crate::tap::{Log, Tap};

type File = <SimStorage as Storage>::File;

pub(crate) const ACTIVITY: &str = "activity.log";
pub(crate) const DISK_LOG: &str = "disk.log";
const GUESTS: usize = 3;
/// Steps, which are milliseconds.
pub(crate) const STALL_MAX: u64 = 50;
/// The log must cover everything for so many steps before that is recorded again.
const CALM: u64 = 60;
/// Between two attempts to write an activity log that failed.
const MEND: u64 = 100;

struct Pending {
    offset: u64,
    len: u64,
    /// Of a write; 0: zeroes; `None`: changes nothing.
    id: Option<u64>,
    fua: bool,
    flush: bool,
    submitted: u64,
}

struct Guest {
    volume: usize,
    io: SimIo<Buf>,
    queue: FilterQueue,
    pending: BTreeMap<u32, Pending>,
    tag: u32,
    /// Steps in a row in which it waited, and not for a device.
    waited: u64,
    /// Ranges of writes that failed: what they came to is read next.
    looks: VecDeque<(u64, u64)>,
    /// Flushes of its device that failed, and those that it was told of.
    flushes_failed: u64,
    flushes_told: u64,
}

/// The activity log's threads, and what is recorded of the log.
struct Watch {
    wanted: bool,
    since: u64,
    first: bool,
    covered: Arc<AtomicBool>,
    covers_last: bool,
    unflushed: bool,
    spoilt: bool,
    started: Option<(u64, u64)>,
    /// Requests that had been asked for, and when that was seen.
    seen: VecDeque<(u64, u64)>,
    job: Option<FlushJob>,
    /// Its disk does not answer before this step.
    hung_until: u64,
    mend_at: Option<u64>,
}

/// The disk log's thread.
struct LogThread {
    turn: LogTurn<File>,
    line: u64,
    orders: VecDeque<LogOrder>,
    hung_until: u64,
}

pub(crate) struct Agent {
    rng: SimRng,
    pub(crate) ring: Arc<Ring>,
    pub(crate) group: Arc<CaptureGroup>,
    filters: Vec<Arc<FilterVolume<HoleyDisk>>>,
    guests: Vec<Guest>,
    pub(crate) syncer: Syncer,
    sync_io: SimIo<Buf>,
    pub(crate) cutter: Cutter,
    keeper: Keeper<File>,
    log: Arc<ActivityLog>,
    watch: Watch,
    thread: LogThread,
    pub(crate) tap: Tap,
    pub(crate) streamer: Streamer<Tap>,
    worker: Worker,
    works: Vec<Work<CellRef>>,
    pub(crate) empty: Vec<VolumeIndex>,
    pub(crate) live: bool,
    /// A new ring: only the greeting tells what it builds on.
    pub(crate) hold_cuts: bool,
    known_joined: BTreeSet<VolumeIndex>,
    joining: Vec<(VolumeIndex, u64)>,
    head_before: u64,
    heard: bool,
    /// Passes of verify follow each other.
    pub(crate) verifies: bool,
    /// What verify found to differ.
    pub(crate) differs: Vec<(u16, std::ops::Range<u64>)>,
    left: u64,
}

/// How an agent finds its host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Start {
    /// The ring of the agent before may be there.
    Again,
    /// The host has started.
    Boot,
}

/// What a start came to.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Started {
    pub(crate) resumed: bool,
    pub(crate) from_log: bool,
    pub(crate) logged: u64,
    /// There is a reason to compare everything or to start over.
    pub(crate) doubt: bool,
}

fn entropy(rng: &mut SimRng) -> Entropy {
    let mut rng = rng.fork();
    Box::new(move || {
        let mut bytes = [0; 32];
        rng.fill(&mut bytes);
        bytes
    })
}

pub(crate) fn group_id() -> GroupId {
    GroupId::derive(VAULT, &name("db"))
}

pub(crate) fn host_id() -> HostId {
    HostId::derive(VAULT, &name("host"))
}

fn open(storage: &SimStorage, path: &str) -> Arc<File> {
    let path = Path::new(path);
    let there = storage.exists(path).expect("no faults at a start");
    let mode = if there { OpenMode::ReadWrite } else { OpenMode::CreateNew };
    let file = storage.open(path, mode).expect("no faults at a start");
    storage.sync_dir(Path::new("")).expect("no faults at a start");
    file
}

fn open_activity(host: &mut Host) -> (Keeper<File>, Loaded, bool, u64) {
    let file = open(&host.storage, ACTIVITY);
    let mut id = [0; 16];
    host.rng.fill(&mut id);
    let life = host.rng.next_u64().max(1);
    let config = KeeperConfig { places: host.places, owner: [3; 16] };
    let (mut keeper, loaded) = Keeper::open(file, config, (id, life)).expect("readable");
    let kept = &host.kept.log;
    let named = loaded.lives.iter().any(|mark| mark.session == kept.life);
    let covers_last = kept.upheld && loaded.found == Found::Whole && named;
    keeper.begin().expect("no faults at a start");
    let unstable = kept.unstable && kept.boot == host.boot;
    let last_boot =
        std::mem::replace(&mut host.kept.log, LogKept { life, upheld: false, boot: host.boot, unstable }).boot;
    (keeper, loaded, covers_last, last_boot)
}

fn open_disk_log(host: &mut Host) -> (GroupLog<File>, Vec<LoggedBatch>, bool) {
    let file = open(&host.storage, DISK_LOG);
    let group = group_id();
    let kept: BTreeSet<Line> = host.kept.line.map(|number| Line { group, number }).into_iter().collect();
    let mut id = [0; 16];
    host.rng.fill(&mut id);
    let log = DiskLog::open(file, host_id(), host.log_bytes, id, &kept).expect("no faults at a start");
    let next = host.rng.next_u64();
    let begin = |number| log.begin(Line { group, number });
    let Some(line) = kept.first() else { return (begin(next), Vec::new(), false) };
    let (incarnation, generation) = (host.kept.incarnation, host.kept.generation);
    let fits = |batches: &[LoggedBatch]| {
        batches.last().is_none_or(|last| last.incarnation.0 <= incarnation)
            && batches.iter().all(|batch| batch.generation.0 == generation)
    };
    match log.take_up(*line) {
        Ok((log, batches)) if fits(&batches) => (log, batches, false),
        Ok(_) | Err(_) => (begin(next), Vec::new(), true),
    }
}

/// A ring, and what is known by it.
struct Attached {
    ring: Arc<Ring>,
    resumed: bool,
    from_log: bool,
    first: bool,
    logged: Vec<LoggedBatch>,
    writing: Vec<WritingRange>,
}

/// As `RingOwner::attach`.
fn attach(host: &mut Host, start: Start, covered: bool, taken: (Vec<LoggedBatch>, bool)) -> Attached {
    let (logged, log_lost) = taken;
    let mut from_log = false;
    let opened = match start {
        Start::Again => Some(Ring::open(&host.ring_file, &host.identity())),
        Start::Boot => None,
    };
    if let Some(Err(farshore_ring::Error::OtherIncarnation { found, expected })) = &opened
        && found > expected
    {
        host.kept.compare_everything = true;
        host.kept.incarnation = host.kept.incarnation.max(*found);
        host.kept.attached = true;
    }
    let first = !host.kept.attached;
    if host.kept.attached {
        match opened.and_then(Result::ok) {
            Some(found) => {
                let writing = found.recovery().writing.clone();
                mark_recovered(&found);
                let ring = Arc::new(found.resume());
                let source = CaptureRing::new(Arc::clone(&ring)).expect("the only consumer");
                let fits = match source.load_state() {
                    None => Ok(Vec::new()),
                    Some(stream) if stream.incarnation.0 != host.kept.incarnation => Err("older".to_owned()),
                    Some(stream) => bridge(&stream, source.freed(), logged.clone()),
                };
                drop(source);
                if let Ok(logged) = fits {
                    return Attached { ring, resumed: true, from_log: false, first: false, logged, writing };
                }
                host.kept.compare_everything = true;
            }
            None => {
                from_log = covered && !host.kept.compare_everything;
                host.kept.compare_everything |= !from_log;
            }
        }
    }
    if log_lost {
        host.kept.compare_everything = true;
        host.kept.line = None;
        from_log = false;
    }
    host.kept.incarnation += 1;
    host.kept.ring = host.kept.incarnation;
    host.kept.attached = true;
    if !from_log {
        host.kept.boot = None;
    }
    host.ring_file = host.next_ring_file();
    let config = RingConfig { slab_bytes: host.slab_bytes, descriptors: Some(512), ..RingConfig::new(host.identity()) };
    let ring = Arc::new(Ring::create(&host.ring_file, &config).expect("a ring"));
    Attached { ring, resumed: false, from_log, first, logged, writing: Vec::new() }
}

/// Volumes that points include: at the end of what is in the ring, and at what is durable; and what the ring holds.
fn joined_in_stream(host: &Host, attached: &Attached) -> (VolumeSet, VolumeSet, Vec<WritingRange>) {
    let indices = || (0..u16::try_from(host.volumes.len()).expect("few")).map(VolumeIndex);
    if !attached.resumed {
        let lost = !attached.first;
        let before = attached.logged.first().map(|first| first.before.joined);
        let all: VolumeSet = indices().filter(|index| lost || host.kept.joined.contains(&index.0)).collect();
        let at_target =
            indices().filter(|it| all.contains(*it) && before.is_none_or(|before| before.contains(*it))).collect();
        return (all, at_target, Vec::new());
    }
    let mut ring = CaptureRing::new(Arc::clone(&attached.ring)).expect("the only consumer");
    let mut flags = ring.load_state().unwrap_or_default().flags;
    let at_target = indices().filter(|index| flags.joined.contains(*index)).collect();
    flags = attached.logged.last().map_or(flags, |last| last.after);
    let mut held = attached.writing.clone();
    while let Some(entry) = ring.next_entry().expect("whole") {
        flags.apply(entry.kind, entry.volume);
        if entry.kind.changes_content() {
            held.push(WritingRange { volume: entry.volume.0, offset: entry.offset, length: entry.length });
        }
    }
    ring.rewind();
    (indices().filter(|index| flags.joined.contains(*index)).collect(), at_target, held)
}

impl Guest {
    fn read(&mut self, offset: u64, len: u64, step: u64) {
        let short = u32::try_from(len).expect("short");
        let buf = self.queue.buffer(Purpose::Read, short);
        self.tag += 1;
        self.pending.insert(self.tag, Pending { offset, len, id: None, fua: false, flush: false, submitted: step });
        self.queue.submit(&mut self.io, self.tag, Request::Read { offset, len: short, buf });
    }
}

fn peek(disk: &SimDisk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).expect("small")];
    disk.peek(offset, &mut bytes);
    bytes
}

impl Agent {
    pub(crate) fn start(
        host: &mut Host,
        (now, step): (Now, u64),
        start: Start,
        host_key: &HostKey,
        log: &Rc<RefCell<Log>>,
    ) -> (Self, Started) {
        let mut rng = host.rng.fork();
        let (keeper, loaded, covers_last, last_boot) = open_activity(host);
        let covered = covers_last && host.kept.boot.is_some() && host.kept.boot == Some(last_boot);
        let had_line = host.kept.line.is_some();
        let (line, batches, log_lost) = open_disk_log(host);
        let attached = attach(host, start, covered, (batches, log_lost));
        if log_lost {
            host.kept.line = None;
        }
        let (all, at_target, held) = joined_in_stream(host, &attached);
        let activity = Arc::clone(keeper.log());
        let ms = std::time::Duration::from_millis;
        let config = CaptureConfig {
            cut_min: ms(8),
            cut_max: ms(60),
            stall_max: ms(STALL_MAX),
            activity: Some(GroupActivity { log: Arc::clone(&activity), group: group_id() }),
            ..CaptureConfig::default()
        };
        let group = CaptureGroup::new(Arc::clone(&attached.ring), config);
        let dedup = host_key.dedup_key(group_id());
        let sync = SyncConfig { window: 4, ..SyncConfig::default() };
        let syncer = Syncer::new(Arc::clone(&group), sync, dedup);
        let (resumed, from_log, first) = (attached.resumed, attached.from_log, attached.first);
        let line_number = line.line().number;
        let ring = Arc::clone(&attached.ring);
        let mut filters = Vec::new();
        for (at, volume) in (0_u16..).zip(&host.volumes) {
            let index = VolumeIndex(at);
            let joined = all.contains(index);
            let kept = host.kept.joined.contains(&at);
            let known = if resumed { joined && kept } else { !first && (!from_log || kept) };
            let content = match known && !host.kept.compare_everything {
                true => Content::AsMarked,
                false => Content::Unknown,
            };
            let spec = VolumeSpec {
                index,
                name: name(&format!("v{at}")),
                id: [u8::try_from(at).expect("few"); 16],
                content,
                joined,
            };
            let filter = group.add_volume(spec, HoleyDisk(volume.disk.clone())).expect("room for the bitmaps");
            if from_log && known {
                let captured = group.volume(index).expect("added");
                for (offset, len) in loaded.ranges(&group_id(), index) {
                    if offset < captured.size() {
                        group.mark_missing(&captured, offset, len.min(captured.size() - offset));
                    }
                }
            }
            assert!(group.settle(index).is_some(), "it is in the log");
            filters.push(filter);
        }
        let lost = !resumed && !first;
        let open_in_log = attached.logged.last().is_some_and(|last| last.after.event_open);
        if resumed || lost || open_in_log {
            group.begin_event();
        }
        let moving = group.volumes().iter().any(|volume| volume.in_flight().next_set(0).is_some());
        if !lost && !moving {
            group.end_event();
        }
        if resumed && !covers_last {
            for WritingRange { volume, offset, length } in &held {
                let volume = group.volume(VolumeIndex(*volume)).expect("added");
                group.cover(&volume, *offset, *length);
            }
        }
        let session = SourceConfig { vault: VAULT, group: name("db"), host: name("host"), host_key: host_key.clone() };
        let mut settings = StreamerConfig::new(
            session,
            Generation(host.kept.generation),
            Incarnation(host.kept.incarnation),
            host.declared(),
        );
        settings.last = (BatchNo(0), ChainHash::default());
        settings.joined = all;
        settings.workers = 2;
        settings.window_batches = 8;
        if !host.compresses {
            settings.level_max = None;
        }
        let cover = Arc::new(AtomicBool::new(false));
        let (of_log, of_cover) = (Arc::clone(&activity), Arc::clone(&cover));
        let mark = move || {
            let mark = of_log.mark();
            if of_cover.load(Ordering::Acquire) && !of_log.passes() { mark } else { LogMark::default() }
        };
        settings.log = Some(StreamLog { lives: loaded.lives.clone(), now: Arc::new(mark) });
        let logged = attached.logged.len() as u64;
        let begun = host.kept.line.is_some();
        assert!(begun || logged == 0);
        settings.disk_log = host.logs.then_some(LogStart { batches: attached.logged, begun });
        let capture_ring = CaptureRing::new(Arc::clone(&ring)).expect("the only consumer");
        let sent = resumed && capture_ring.load_state().is_some_and(|state| state.sent);
        // A host that was put back may use a number again; the target takes it for what it is.
        let mut number = host.kept.incarnation;
        while !resumed && log.borrow().knows(number) {
            log.borrow_mut().used_again.insert(host.kept.incarnation);
            number += 1 << 40;
        }
        let tap = Tap {
            ring: Rc::new(RefCell::new(capture_ring)),
            log: Rc::clone(log),
            incarnation: Rc::new(Cell::new(if resumed { log.borrow().last_life.max(number) } else { number })),
        };
        log.borrow_mut().last_life = tap.incarnation.get();
        let streamer = Streamer::new(now, settings, tap.clone(), entropy(&mut rng)).expect("fits");
        let mut known_joined = BTreeSet::new();
        known_joined.extend(
            (0..u16::try_from(host.volumes.len()).expect("few")).map(VolumeIndex).filter(|it| at_target.contains(*it)),
        );
        let mut agent = Self {
            filters,
            guests: Vec::new(),
            syncer,
            sync_io: SimIo::new(rng.fork()),
            cutter: Cutter::new(Arc::clone(&group)),
            watch: Watch {
                wanted: covers_last,
                since: step,
                first: true,
                covered: cover,
                covers_last,
                // As `flush_first`, by the thread of the log.
                unflushed: resumed && !covers_last,
                spoilt: host.kept.log.unstable,
                started: None,
                seen: VecDeque::new(),
                job: None,
                hung_until: 0,
                mend_at: None,
            },
            keeper,
            log: activity,
            thread: LogThread { turn: LogTurn::new(line), line: line_number, orders: VecDeque::new(), hung_until: 0 },
            tap,
            streamer,
            worker: Worker::new(host_key.clone(), group_id(), SegmentPool::new(16 << 20)),
            works: Vec::new(),
            empty: Vec::new(),
            live: false,
            hold_cuts: !sent && logged == 0,
            known_joined,
            joining: Vec::new(),
            head_before: ring.head(),
            heard: false,
            verifies: true,
            differs: Vec::new(),
            left: 0,
            ring,
            group,
            rng,
        };
        agent.open(host);
        host.kept.boot = Some(host.boot);
        agent.watch.started = Some((agent.log.asked(), agent.log.ordered()));
        // A start waits for what is marked to be covered, before anything is served.
        agent.turn_log(host, step);
        let doubt = (had_line && log_lost) || (!resumed && !first && !from_log);
        (agent, Started { resumed, from_log, logged, doubt })
    }

    fn open(&mut self, host: &mut Host) {
        let waker = self.sync_io.waker();
        self.group.set_sync_waker(move || waker.wake());
        for filter in &self.filters {
            self.sync_io.attach(&filter.file().0);
            self.syncer.add_volume(&mut self.sync_io, filter).expect("few owners");
        }
        for guest in 0..GUESTS {
            let volume = guest % self.filters.len();
            let mut io = SimIo::new(self.rng.fork());
            io.attach(&host.volumes[volume].disk);
            let queue = self.filters[volume].open_queue(&mut io).expect("few owners");
            self.guests.push(Guest {
                volume,
                io,
                queue,
                pending: BTreeMap::new(),
                tag: 0,
                waited: 0,
                looks: VecDeque::new(),
                flushes_failed: 0,
                flushes_told: 0,
            });
        }
    }

    /// The process ends at once. Its ring stays, with what it holds now.
    pub(crate) fn kill(self, host: &mut Host, step: u64) {
        // What is dropped below happens to the old one.
        let next = host.next_ring_file();
        std::fs::copy(&host.ring_file, &next).expect("room in /dev/shm");
        // Not what the file is read from any more.
        let _ = std::fs::remove_file(&host.ring_file);
        host.ring_file = next;
        for Guest { volume, io, queue, pending, .. } in self.guests {
            io.kill();
            drop(queue);
            for pending in pending.values() {
                let Some(id) = pending.id else { continue };
                let found = peek(&host.volumes[volume].disk, pending.offset, pending.len);
                let times = (pending.submitted, step);
                host.volumes[volume].history.perhaps_wrote(pending.offset, id, times, &found);
            }
        }
        self.sync_io.kill();
    }

    // Guests.

    /// One more request, of any guest and kind.
    pub(crate) fn submit(&mut self, host: &mut Host, step: u64) {
        let index = self.rng.index(self.guests.len());
        if self.guests[index].pending.len() >= 12 {
            return;
        }
        if let Some((offset, bytes)) = self.guests[index].looks.pop_front() {
            self.guests[index].read(offset, bytes, step);
            return;
        }
        let (start, most) = host.place(self.guests[index].volume);
        let kind = self.rng.below(20);
        let len = match kind {
            0 => 0,
            1 | 2 => 1 + self.rng.below(most.min(64)),
            3 | 4 => 1 + self.rng.below(most.min(400)),
            5 => 1 + self.rng.below(most.min(512)),
            6..=11 => 1 + self.rng.below(most.min(128)),
            _ => 1 + self.rng.below(most.min(16)),
        };
        let (offset, bytes) = (start * SECTOR_BYTES, len * SECTOR_BYTES);
        let short = u32::try_from(bytes).expect("short");
        let id = match kind {
            0..=2 => None,
            3 | 4 => Some(0),
            _ => Some(host.content()),
        };
        let flag = self.rng.chance(1, 2);
        let fua = kind == 5 || (kind == 4 && flag);
        let guest = &mut self.guests[index];
        let request = match kind {
            0 => Request::Flush,
            1 | 2 => Request::Read { offset, len: short, buf: guest.queue.buffer(Purpose::Read, short) },
            3 => Request::Discard { offset, len: bytes },
            4 => Request::WriteZeroes { offset, len: bytes, fua, no_hole: !flag },
            _ => {
                let mut buf = guest.queue.buffer(Purpose::Write, short);
                stamp(&mut buf[..usize::try_from(bytes).expect("short")], id.expect("a write has content"));
                Request::Write { offset, len: short, buf, fua }
            }
        };
        guest.tag += 1;
        guest.pending.insert(guest.tag, Pending { offset, len: bytes, id, fua, flush: kind == 0, submitted: step });
        guest.queue.submit(&mut guest.io, guest.tag, request);
    }

    /// Any guest's I/O goes one step.
    pub(crate) fn turn_any_guest(&mut self, host: &mut Host, step: u64) {
        let index = self.rng.index(self.guests.len());
        self.turn_guest(host, index, step);
    }

    fn turn_guest(&mut self, host: &mut Host, index: usize, step: u64) {
        let guest = &mut self.guests[index];
        let failed = host.volumes[guest.volume].faults.flushes_failed();
        guest.io.step();
        let failed = host.volumes[guest.volume].faults.flushes_failed() - failed;
        if failed > 0 {
            host.volumes[guest.volume].history.flush_failed(step);
            guest.flushes_failed += failed;
        }
        while let Some(completion) = guest.io.poll_completion() {
            guest.queue.handle_completion(&mut guest.io, completion);
        }
        if guest.io.take_wakeup() {
            guest.queue.handle_wake(&mut guest.io);
        }
        while let Some(done) = guest.queue.poll_done() {
            let pending = guest.pending.remove(&done.tag).expect("a tag ends once");
            let volume = &mut host.volumes[guest.volume];
            match (done.result, pending.id) {
                (Ok(()), Some(id)) => {
                    host.coverage.hit(Fault::Acked);
                    volume.history.wrote(pending.offset, pending.len, id, pending.submitted, step, pending.fua);
                }
                (Ok(()), None) if pending.flush => volume.history.flushed(pending.submitted),
                (Ok(()), None) => {
                    // What a write under way has put there is no version's that is known.
                    let found = peek(&volume.disk, pending.offset, pending.len);
                    volume.history.saw(pending.offset, &found, pending.submitted, step);
                }
                (Err(_), id) => {
                    if let Some(id) = id {
                        let found = peek(&volume.disk, pending.offset, pending.len);
                        volume.history.perhaps_wrote(pending.offset, id, (pending.submitted, step), &found);
                        guest.looks.push_back((pending.offset, pending.len));
                    }
                    guest.flushes_told += u64::from(pending.flush || pending.fua);
                    host.told_error(guest.volume);
                }
            }
        }
        if guest.pending.is_empty() {
            let Guest { flushes_failed, flushes_told, .. } = guest;
            assert!(
                *flushes_told >= *flushes_failed,
                "{flushes_failed} flushes failed, the guest heard of {flushes_told}"
            );
        }
    }

    pub(crate) fn turn_all_guests(&mut self, host: &mut Host, step: u64) {
        (0..self.guests.len()).for_each(|guest| self.turn_guest(host, guest, step));
    }

    /// I1: whoever waits while no device of its volume works waits for us, and not for long.
    pub(crate) fn watch_guests(&mut self, coverage_worst: &mut u64) {
        let busy: Vec<bool> = (0..self.filters.len())
            .map(|volume| self.guests.iter().any(|guest| guest.volume == volume && guest.io.in_flight() > 0))
            .collect();
        for guest in &mut self.guests {
            let waits = !guest.pending.is_empty() && !busy[guest.volume];
            guest.waited = if waits { guest.waited + 1 } else { 0 };
            *coverage_worst = (*coverage_worst).max(guest.waited);
            assert!(guest.waited <= STALL_MAX + 30, "a guest waits for us for {} ms", guest.waited);
        }
    }

    // Sync.

    pub(crate) fn turn_sync(&mut self, host: &mut Host, now: Now) {
        self.sync_io.step();
        while let Some(completion) = self.sync_io.poll_completion() {
            self.syncer.handle_completion(&mut self.sync_io, now, completion);
        }
        if self.sync_io.take_wakeup() {
            self.syncer.handle_wake();
        }
        self.syncer.poll(&mut self.sync_io, now);
        self.note_joins(host);
        while let Some(event) = self.syncer.poll_verify() {
            match event {
                VerifyEvent::Differs { volume, range } => self.differs.push((volume.0, range)),
                VerifyEvent::Ended { found, .. } => host.coverage.add(Fault::Verified, found.equal_bytes),
            }
        }
        let volumes = if self.verifies { self.filters.len() } else { 0 };
        for volume in 0..u16::try_from(volumes).expect("few") {
            let joined = self.group.volume(VolumeIndex(volume)).is_some_and(|volume| volume.joined());
            if joined && self.syncer.verify_progress(VolumeIndex(volume)).is_none() {
                self.begin_verify(volume);
            }
        }
    }

    /// A pass over a volume, in place of one that is under way.
    pub(crate) fn begin_verify(&mut self, volume: u16) {
        self.syncer.begin_verify(VerifyOrder { volume: VolumeIndex(volume), pass: 1, from: 0, rate: None });
    }

    pub(crate) fn is_verifying(&self) -> bool {
        self.group.volumes().iter().any(|volume| self.syncer.verify_progress(volume.index()).is_some())
    }

    // Cuts and the stream; `Hooks` and `Driver`.

    pub(crate) fn cut(&mut self, host: &mut Host, step: u64, (now, wall): (Now, WallTime), slot_free: bool) {
        if self.hold_cuts {
            return;
        }
        if let Some(cut) = self.cutter.poll(now, wall, slot_free) {
            let Position(position) = cut.position;
            host.cuts.insert((self.tap.incarnation.get(), position + 1), step);
        }
    }

    pub(crate) fn take_work(&mut self, now: Now) {
        while let Some(work) = self.streamer.poll_work(now) {
            self.works.push(work);
        }
    }

    pub(crate) fn work(&mut self, now: Now) {
        if self.works.is_empty() {
            return;
        }
        let work = self.works.swap_remove(self.rng.index(self.works.len()));
        let mut done = self.worker.run(work);
        done.busy = std::time::Duration::from_micros(100);
        self.streamer.handle_done(now, done);
    }

    pub(crate) fn reopen(&mut self, wall: WallTime) {
        self.group.reopen(self.tap.ring.borrow_mut().consumer_mut(), wall);
    }

    pub(crate) fn handle_greeted(
        &mut self,
        host: &mut Host,
        joined: &[VolumeIndex],
        empty: Vec<VolumeIndex>,
        generation: u32,
    ) {
        for volume in self.known_joined.clone() {
            if !joined.contains(&volume) {
                self.known_joined.remove(&volume);
                self.group.unjoin(volume).expect("volumes do not leave");
            }
        }
        joined.iter().for_each(|volume| self.group.say_left(*volume));
        self.empty = empty;
        host.kept.generation = generation;
    }

    pub(crate) fn handle_durable(&mut self, host: &mut Host, end: Position, recoverable: bool) {
        self.group.note_durable(end);
        if !self.heard && end.0 > self.head_before {
            self.heard = true;
            self.keeper.handle_heard();
        }
        self.syncer.handle_durable(end);
        let head = self.ring.head();
        for volume in self.group.joined() {
            if !self.known_joined.contains(&volume) && self.joining.iter().all(|(known, _)| *known != volume) {
                self.joining.push((volume, head));
            }
        }
        let known = &mut self.known_joined;
        self.joining.retain(|(volume, position)| {
            let done = *position <= end.0;
            if done {
                known.insert(*volume);
            }
            !done
        });
        let whole = !self.group.event_open()
            && !self.ring.is_closed()
            && self.group.volumes().iter().all(|volume| volume.joined());
        if recoverable && whole {
            host.kept.compare_everything = false;
        }
    }

    /// `Shared::record_join`: nothing is killed between this and the word in the stream.
    fn note_joins(&self, host: &mut Host) {
        let joined = self.group.volumes().into_iter().filter(|volume| volume.announced());
        host.kept.joined.extend(joined.map(|volume| volume.index().0));
    }

    pub(crate) fn compare_everything(&mut self, host: &mut Host, now: Now) {
        host.kept.compare_everything = true;
        self.group.begin_event();
        for volume in self.group.volumes() {
            self.group.resync(volume.index()).expect("volumes do not leave");
        }
        self.streamer.handle_compared(now);
    }

    pub(crate) fn start_over(&mut self, host: &mut Host, (now, wall): (Now, WallTime), incarnation: Incarnation) {
        host.kept.incarnation = incarnation.0;
        host.kept.compare_everything = true;
        self.group.start_over(self.tap.ring.borrow_mut().consumer_mut(), wall, |_| {});
        self.joining.clear();
        self.hold_cuts = true;
        self.tap.incarnation.set(incarnation.0);
        self.tap.log.borrow_mut().forget(incarnation.0);
        self.tap.log.borrow_mut().last_life = incarnation.0;
        self.streamer.handle_started_over(now, incarnation);
    }

    // The disk log.

    pub(crate) fn obey_log(&mut self, host: &mut Host, now: Now) {
        while let Some(order) = self.streamer.poll_log(now) {
            match order {
                LogOrder::Begin => {
                    host.kept.line = Some(self.thread.line);
                    self.streamer.handle_log_begun();
                }
                LogOrder::End | LogOrder::GiveUp => {
                    host.kept.line = None;
                    self.thread.orders.clear();
                    self.thread.line = host.rng.next_u64();
                    self.thread.turn.clear(self.thread.line);
                    self.streamer.handle_log_ended();
                }
                LogOrder::Append { .. } | LogOrder::Load { .. } | LogOrder::Trim { .. } | LogOrder::Probe { .. } => {
                    self.thread.orders.push_back(order);
                }
            }
        }
    }

    /// The log's thread does some of what it was told.
    pub(crate) fn turn_disk_log(&mut self, host: &Host, (now, step): (Now, u64)) {
        if step < self.thread.hung_until {
            return;
        }
        let done = RefCell::new(Vec::new());
        let give = |it: LogDone| done.borrow_mut().push(it);
        for _ in 0..1 + self.rng.below(3) {
            let Some(order) = self.thread.orders.pop_front() else { break };
            if matches!(order, LogOrder::Append { .. }) {
                host.coverage.hit(Fault::LogUsed);
            }
            self.thread.turn.obey(order, &give);
        }
        // The power may fail before its disk has answered.
        if self.rng.chance(1, 2) {
            self.thread.turn.sync(&give);
        }
        for it in done.into_inner() {
            match &it {
                LogDone::Full { .. } => host.coverage.hit(Fault::LogFull),
                LogDone::Failed { .. } | LogDone::Unreadable { .. } => host.coverage.hit(Fault::LogFailed),
                LogDone::Appended { .. } | LogDone::Loaded { .. } | LogDone::Probed { .. } => {}
            }
            self.streamer.handle_log(now, it);
        }
    }

    pub(crate) fn hang_disk_log(&mut self, until: u64) {
        self.thread.hung_until = until;
    }

    // The activity log.

    pub(crate) fn hang_activity(&mut self, until: u64) {
        self.watch.hung_until = until;
    }

    fn want(&mut self, host: &mut Host, step: u64, upheld: bool) {
        let upheld = upheld && !self.log.passes();
        if self.watch.wanted != upheld {
            self.watch.wanted = upheld;
            self.watch.since = step;
        }
        self.record(host, step);
    }

    /// `keep_record`.
    fn record(&mut self, host: &mut Host, step: u64) {
        let watch = &mut self.watch;
        let calm = if watch.wanted && !watch.first { CALM } else { 0 };
        if watch.wanted != host.kept.log.upheld && step >= watch.since + calm {
            watch.first &= !watch.wanted;
            host.kept.log.upheld = watch.wanted;
        }
        watch.covered.store(watch.wanted && host.kept.log.upheld, Ordering::Release);
    }

    /// `keep`: turns the keeper.
    pub(crate) fn turn_log(&mut self, host: &mut Host, step: u64) {
        if step < self.watch.hung_until {
            return;
        }
        if self.watch.unflushed {
            self.watch.unflushed = false;
            for volume in &mut host.volumes {
                if volume.disk.flush().is_err() {
                    volume.history.flush_failed(step);
                    self.watch.spoilt = true;
                }
            }
        }
        if let Some(job) = self.watch.job.take() {
            let failed: Vec<u64> = host.volumes.iter().map(|volume| volume.faults.flushes_failed()).collect();
            let _ = job.run();
            for (volume, failed) in host.volumes.iter_mut().zip(failed) {
                if volume.faults.flushes_failed() > failed {
                    volume.history.flush_failed(step);
                }
            }
            self.keeper.handle_flushed();
        }
        if let Some(at) = self.watch.mend_at {
            if step < at {
                return;
            }
            match self.keeper.begin() {
                Ok(()) => self.watch.mend_at = None,
                Err(_) => self.watch.mend_at = Some(step + MEND),
            }
        }
        let tidied = if self.rng.chance(1, 100) { self.keeper.tidy().map(|_| ()) } else { Ok(()) };
        match tidied.and_then(|()| self.keeper.turn()) {
            Ok(turn) => {
                host.kept.log.unstable |= !turn.stable;
                let found = |(asked, ordered)| self.log.answered() >= asked && self.log.obeyed() >= ordered;
                let based = self.watch.covers_last || self.watch.started.is_some_and(found);
                self.want(host, step, turn.upheld && based && !self.watch.spoilt);
            }
            Err(_) => {
                self.pass(host, step);
                self.watch.mend_at = Some(step + MEND);
            }
        }
        if self.watch.job.is_none() {
            self.watch.job = self.keeper.poll_flush();
        }
        host.coverage.add(Fault::Evicted, self.keeper.left() - self.left);
        self.left = self.keeper.left();
    }

    fn pass(&mut self, host: &mut Host, step: u64) {
        self.want(host, step, false);
        host.coverage.hit(Fault::ActivityPassed);
        self.log.pass();
        self.want(host, step, false);
    }

    /// `watch_stalls`.
    pub(crate) fn watch_stalls(&mut self, host: &mut Host, step: u64) {
        self.record(host, step);
        if self.log.answered() >= self.log.asked() || self.log.passes() {
            self.watch.seen.clear();
            return;
        }
        let asked = self.log.asked();
        if self.watch.seen.back().is_none_or(|(last, _)| *last < asked) {
            self.watch.seen.push_back((asked, step));
        }
        while self.watch.seen.front().is_some_and(|(number, _)| *number <= self.log.answered()) {
            self.watch.seen.pop_front();
        }
        let age = self.watch.seen.front().map_or(0, |(_, since)| step - since);
        if age >= STALL_MAX / 2 {
            self.want(host, step, false);
        }
        if age >= STALL_MAX {
            self.pass(host, step);
        }
    }

    // For the end of a run.

    /// No request is under way, nothing is missing or being compared, all volumes have joined.
    pub(crate) fn is_whole(&self) -> bool {
        let clean = |filter: &Arc<FilterVolume<HoleyDisk>>| {
            let volume = filter.volume().expect("captured");
            volume.missing().count_ones() == 0 && volume.in_flight().count_ones() == 0 && volume.announced()
        };
        self.guests.iter().all(|guest| guest.pending.is_empty())
            && self.filters.iter().all(clean)
            && !self.group.event_open()
            && !self.ring.is_closed()
    }

    /// What keeps each volume from being whole: missing, under way, not announced, not joined.
    pub(crate) fn open_ends(&self) -> Vec<(u64, u64, bool, bool)> {
        let of = |filter: &Arc<FilterVolume<HoleyDisk>>| {
            let volume = filter.volume().expect("captured");
            let (missing, in_flight) = (volume.missing().count_ones(), volume.in_flight().count_ones());
            (missing, in_flight, !volume.announced(), !volume.joined())
        };
        self.filters.iter().map(of).collect()
    }

    pub(crate) fn pending(&self) -> usize {
        self.guests.iter().map(|guest| guest.pending.len()).sum()
    }
}
