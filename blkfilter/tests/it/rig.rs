//! A simulated host with one group: guests on several queues, a disk per volume, the filter, sync, the cutter, a link and a target.
//! One seed decides everything.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use farshore_blkfilter::sync::{SyncConfig, Syncer};
use farshore_blkfilter::{
    BackingFile, Buf, CaptureConfig, CaptureGroup, Content, Cutter, FilterQueue, FilterVolume, VolumeSpec,
    mark_recovered,
};
use farshore_proto::keys::{DedupKey, HostKey};
use farshore_proto::{GroupId, HostId, KeyEpoch, Name, Now, Position, SLOT_BYTES, VolumeIndex, WallTime};
use farshore_ring::{Consumer, Ring, RingConfig, RingIdentity};
use farshore_uring::sim::{SimDisk, SimIo, SimRng};
use farshore_uring::{BlockDevice, BlockQueue, Errno, Extent, FileSlot, Geometry, Io, Purpose, Request};

use crate::oracle::{History, Replica, SECTOR, Said, check_cut, id_of, stamp};

/// A disk whose zero 4 KiB blocks are holes.
#[derive(Clone, Debug)]
pub(crate) struct HoleyDisk(pub(crate) SimDisk);

impl BackingFile for HoleyDisk {
    fn geometry(&self) -> Geometry {
        self.0.backing().geometry
    }

    fn register<I: Io<Buf>>(&self, io: &mut I) -> io::Result<FileSlot> {
        io.register(self.0.file())
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let mut bytes = vec![0; usize::try_from(len).expect("small")];
        self.0.peek(offset, &mut bytes);
        let zero: Vec<bool> = bytes.chunks(4096).map(|block| block.iter().all(|byte| *byte == 0)).collect();
        let mut left = len;
        let extent = |run: &[bool]| {
            let len = (run.len() as u64 * 4096).min(left);
            left -= len;
            Extent { len, hole: run[0], zero: run[0] }
        };
        Ok(zero.chunk_by(|a, b| a == b).map(extent).collect())
    }

    fn flusher(&self) -> Box<dyn Fn() -> io::Result<()> + Send + Sync> {
        let disk = self.0.clone();
        Box::new(move || disk.flush())
    }
}

/// What a guest has asked for and waits for.
pub(crate) struct Pending {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// `None`: reads and flushes. 0: zeroes.
    pub(crate) id: Option<u64>,
    submitted: u64,
}

pub(crate) struct Guest {
    pub(crate) volume: usize,
    pub(crate) io: SimIo<Buf>,
    pub(crate) queue: FilterQueue,
    pub(crate) pending: BTreeMap<u32, Pending>,
    tag: u32,
}

pub(crate) struct Config {
    pub(crate) volumes: u16,
    pub(crate) guests: usize,
    pub(crate) slots: u64,
    pub(crate) slab_mib: u64,
    pub(crate) descriptors: u64,
    /// Sectors that half of the requests begin in: few make many overlaps. The others begin anywhere.
    pub(crate) hot_sectors: u64,
    /// Chance in a hundred that a flush is one, and not a write.
    pub(crate) flushes: u64,
    pub(crate) sync: SyncConfig,
    pub(crate) capture: CaptureConfig,
}

impl Default for Config {
    fn default() -> Self {
        let ms = std::time::Duration::from_millis;
        Self {
            volumes: 2,
            guests: 3,
            slots: 60,
            slab_mib: 2,
            descriptors: 512,
            hot_sectors: 200,
            flushes: 100,
            sync: SyncConfig { window: 4, ..SyncConfig::default() },
            capture: CaptureConfig { cut_min: ms(8), cut_max: ms(60), stall_max: ms(50), ..CaptureConfig::default() },
        }
    }
}

pub(crate) struct Rig {
    pub(crate) rng: SimRng,
    pub(crate) config: Config,
    folder: tempfile::TempDir,
    ring_file: PathBuf,
    pub(crate) ring: Arc<Ring>,
    pub(crate) group: Arc<CaptureGroup>,
    pub(crate) disks: Vec<SimDisk>,
    pub(crate) histories: Vec<History>,
    pub(crate) filters: Vec<Arc<FilterVolume<HoleyDisk>>>,
    pub(crate) guests: Vec<Guest>,
    pub(crate) syncer: Syncer,
    pub(crate) sync_io: SimIo<Buf>,
    pub(crate) cutter: Cutter,
    pub(crate) consumer: Consumer,
    pub(crate) replica: Replica,
    pub(crate) live: bool,
    pub(crate) empty: Vec<VolumeIndex>,
    /// The clock: one step is a millisecond.
    pub(crate) step: u64,
    next_id: u64,
    cut_steps: BTreeMap<u64, u64>,
    pub(crate) checked_cuts: u64,
    /// Guests' requests that failed.
    pub(crate) failed: u64,
    pub(crate) restarts: u64,
    /// Points are checked. Not after a test has spoilt a side.
    pub(crate) points_hold: bool,
}

pub(crate) fn identity() -> RingIdentity {
    RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 1, generation: 1 }
}

pub(crate) fn key() -> DedupKey {
    HostKey::from_parts([7; 32], HostId([3; 16]), KeyEpoch(1)).dedup_key(GroupId([2; 16]))
}

/// Size of a volume: the last slot is short, and no multiple of 4 KiB.
fn volume_size(slots: u64) -> u64 {
    (slots - 1) * SLOT_BYTES + 7 * SECTOR as u64
}

pub(crate) fn spec(index: u16, content: Content, joined: bool) -> VolumeSpec {
    let name = Name::new(format!("v{index}")).expect("a good name");
    VolumeSpec { index: VolumeIndex(index), name, id: [u8::try_from(index).expect("few"); 16], content, joined }
}

impl Rig {
    pub(crate) fn new(seed: u64, config: Config) -> Self {
        let mut rng = SimRng::new(seed);
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
        let ring_file = folder.path().join("ring");
        let ring_config = RingConfig {
            slab_bytes: config.slab_mib << 20,
            descriptors: Some(config.descriptors),
            ..RingConfig::new(identity())
        };
        let ring = Arc::new(Ring::create(&ring_file, &ring_config).expect("a ring"));
        let group = CaptureGroup::new(Arc::clone(&ring), config.capture.clone());
        let mut replica = Replica::new(key());
        let (mut disks, mut histories, mut filters) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..config.volumes {
            let disk = SimDisk::new(volume_size(config.slots), rng.fork());
            let image = initial_image(&mut rng, index, config.slots);
            disk.poke(0, &image);
            histories.push(History::new(&image));
            replica.images.insert(index, vec![0; image.len()]);
            let filter = group.add_volume(spec(index, Content::Unknown, false), HoleyDisk(disk.clone()));
            filters.push(filter.expect("room for the bitmaps"));
            disks.push(disk);
        }
        let consumer = ring.consumer().expect("the only one");
        let cutter = Cutter::new(Arc::clone(&group));
        let syncer = Syncer::new(Arc::clone(&group), config.sync.clone(), key());
        let sync_io = SimIo::new(rng.fork());
        let empty = (0..config.volumes).map(VolumeIndex).collect();
        let mut rig = Self {
            rng,
            folder,
            ring_file,
            ring,
            group,
            disks,
            histories,
            filters,
            guests: Vec::new(),
            syncer,
            sync_io,
            cutter,
            consumer,
            replica,
            live: false,
            empty,
            step: 1,
            next_id: 1,
            cut_steps: BTreeMap::new(),
            checked_cuts: 0,
            failed: 0,
            restarts: 0,
            points_hold: true,
            config,
        };
        rig.open();
        rig
    }

    /// Queues for guests, and sync's files.
    fn open(&mut self) {
        let waker = self.sync_io.waker();
        self.group.set_sync_waker(move || waker.wake());
        for filter in &self.filters {
            self.sync_io.attach(&filter.file().0);
            self.syncer.add_volume(&mut self.sync_io, filter).expect("few owners");
        }
        for guest in 0..self.config.guests {
            let volume = guest % self.filters.len();
            let mut io = SimIo::new(self.rng.fork());
            io.attach(&self.disks[volume]);
            let queue = self.filters[volume].open_queue(&mut io).expect("few owners");
            self.guests.push(Guest { volume, io, queue, pending: BTreeMap::new(), tag: 0 });
        }
    }

    /// Sync dies of a bug in the middle of what it does, and a new one begins.
    pub(crate) fn replace_sync(&mut self) {
        self.syncer = Syncer::new(Arc::clone(&self.group), self.config.sync.clone(), key());
        std::mem::replace(&mut self.sync_io, SimIo::new(self.rng.fork())).kill();
        for filter in &self.filters {
            self.sync_io.attach(&filter.file().0);
            self.syncer.add_volume(&mut self.sync_io, filter).expect("few owners");
        }
        if self.live {
            self.syncer.handle_live(&[], Position(0));
        }
    }

    pub(crate) fn now(&self) -> Now {
        Now(self.step * 1_000_000)
    }

    // Guests.

    /// A request, as a guest would make it. `id` is made up.
    pub(crate) fn submit(&mut self, guest: usize, offset: u64, len: u64, what: What) {
        let id = match what {
            What::Write { .. } => {
                self.next_id += 1;
                Some(self.next_id)
            }
            What::Zeroes { .. } | What::Discard => Some(0),
            What::Read | What::Flush => None,
        };
        let guest = &mut self.guests[guest];
        guest.tag += 1;
        let short = u32::try_from(len).expect("short");
        let request = match what {
            What::Write { fua } => {
                let mut buf = guest.queue.buffer(Purpose::Write, short);
                stamp(&mut buf[..usize::try_from(len).expect("short")], id.expect("made above"));
                Request::Write { offset, len: short, buf, fua }
            }
            What::Zeroes { no_hole } => Request::WriteZeroes {
                offset,
                len,
                fua: len.is_multiple_of(1024) && self.config.flushes == 100,
                no_hole,
            },
            What::Discard => Request::Discard { offset, len },
            What::Read => Request::Read { offset, len: short, buf: guest.queue.buffer(Purpose::Read, short) },
            What::Flush => Request::Flush,
        };
        guest.pending.insert(guest.tag, Pending { offset, len, id, submitted: self.step });
        guest.queue.submit(&mut guest.io, guest.tag, request);
    }

    fn random_request(&mut self, guest: usize) {
        let sectors = self.disks[self.guests[guest].volume].size() / SECTOR as u64;
        let hot = self.rng.chance(1, 2);
        let start = self.rng.below(if hot { self.config.hot_sectors.min(sectors) } else { sectors });
        let most = sectors - start;
        let kind = self.rng.below(20);
        let stable =
            matches!(kind, 0 | 5 | 6) && (self.config.flushes == 100 || self.rng.chance(self.config.flushes, 100));
        let (what, len) = match kind {
            0 | 5 | 6 if !stable => (What::Write { fua: false }, 1 + self.rng.below(most.min(128))),
            0 => (What::Flush, 0),
            1 | 2 => (What::Read, 1 + self.rng.below(most.min(64))),
            3 => (What::Discard, 1 + self.rng.below(most.min(600))),
            4 => (What::Zeroes { no_hole: self.rng.chance(1, 2) }, 1 + self.rng.below(most.min(300))),
            5 | 6 => (What::Write { fua: true }, 1 + self.rng.below(most.min(512))),
            7..12 => (What::Write { fua: false }, 1 + self.rng.below(most.min(128))),
            _ => (What::Write { fua: false }, 1 + self.rng.below(most.min(16))),
        };
        let (offset, len) = if let What::Flush = what { (0, 0) } else { (start * 512, len * 512) };
        self.submit(guest, offset, len, what);
    }

    /// Lets a guest's I/O go one step and takes what has ended.
    pub(crate) fn turn_guest(&mut self, guest: usize) -> bool {
        let of = &mut self.guests[guest];
        let mut moved = of.io.step();
        while let Some(completion) = of.io.poll_completion() {
            of.queue.handle_completion(&mut of.io, completion);
            moved = true;
        }
        if of.io.take_wakeup() {
            of.queue.handle_wake(&mut of.io);
            moved = true;
        }
        while let Some(done) = self.guests[guest].queue.poll_done() {
            self.done(guest, done.tag, done.result);
        }
        moved
    }

    fn done(&mut self, guest: usize, tag: u32, result: Result<(), Errno>) {
        let volume = self.guests[guest].volume;
        let pending = self.guests[guest].pending.remove(&tag).expect("a tag ends once");
        let Some(id) = pending.id else { return };
        match result {
            Ok(()) => {
                for sector in pending.offset / 512..(pending.offset + pending.len) / 512 {
                    self.histories[volume].wrote(sector, id, pending.submitted, self.step);
                }
            }
            Err(_) => {
                self.failed += 1;
                self.perhaps_wrote(volume, &pending);
            }
        }
    }

    /// A write that was never acknowledged: whatever of it is there.
    fn perhaps_wrote(&mut self, volume: usize, pending: &Pending) {
        let Some(id) = pending.id else { return };
        let mut bytes = vec![0; usize::try_from(pending.len).expect("small")];
        self.disks[volume].peek(pending.offset, &mut bytes);
        for (sector, bytes) in (pending.offset / 512..).zip(bytes.chunks(SECTOR)) {
            if id_of(bytes) == id {
                self.histories[volume].wrote(sector, id, pending.submitted, u64::MAX);
            }
        }
    }

    // Sync, stream, target.

    pub(crate) fn turn_sync(&mut self) -> bool {
        let now = self.now();
        let mut moved = self.sync_io.step();
        while let Some(completion) = self.sync_io.poll_completion() {
            self.syncer.handle_completion(&mut self.sync_io, now, completion);
            moved = true;
        }
        if self.sync_io.take_wakeup() {
            self.syncer.handle_wake();
        }
        self.syncer.poll(&mut self.sync_io, now);
        moved
    }

    pub(crate) fn turn_cutter(&mut self) {
        let slot_free = self.live && self.replica.wire.len() < 64;
        if let Some(cut) = self.cutter.poll(self.now(), WallTime(self.step), slot_free) {
            self.cut_steps.insert(cut.position.0, self.step);
        }
    }

    pub(crate) fn go_live(&mut self) {
        self.live = true;
        self.consumer.rewind();
        self.replica.lose_link();
        self.durable(self.replica.tail);
        let empty = std::mem::take(&mut self.empty);
        self.syncer.handle_live(&empty, Position(self.replica.tail));
    }

    pub(crate) fn break_link(&mut self) {
        self.live = false;
        self.replica.lose_link();
        self.syncer.handle_break();
    }

    fn durable(&mut self, below: u64) {
        // A source that was restarted reads again what the target has.
        while self.consumer.position() < below {
            assert!(self.consumer.next().is_some(), "what the target has is in the ring or freed");
        }
        if below > self.consumer.freed() {
            self.consumer.free_to(below);
        }
        self.group.note_durable(Position(below));
        self.syncer.handle_durable(Position(below));
        self.reopen();
    }

    pub(crate) fn reopen(&mut self) {
        self.group.reopen(&mut self.consumer, WallTime(self.step));
    }

    /// Takes one entry off the ring.
    pub(crate) fn ship(&mut self) -> bool {
        self.live && self.replica.ship(&mut self.consumer)
    }

    /// The target takes a batch; its state is checked if it is a point.
    pub(crate) fn apply(&mut self) -> bool {
        let Some((position, recoverable)) = self.replica.apply_batch() else { return false };
        // Not every one: a check looks at every sector.
        if self.points_hold
            && recoverable
            && !self.replica.joined.is_empty()
            && (self.checked_cuts < 5 || self.rng.chance(1, 4))
        {
            let joined = self
                .replica
                .joined
                .iter()
                .map(|index| (&self.histories[usize::from(*index)], self.replica.images[index].as_slice()));
            let cut = self.cut_steps.get(&position).copied().unwrap_or(0);
            if let Err(why) = check_cut(&joined.collect::<Vec<_>>(), cut) {
                panic!("point at {position} (step {}): {why}", self.step);
            }
            self.checked_cuts += 1;
        }
        true
    }

    /// The source hears one thing that the target said.
    pub(crate) fn hear(&mut self) -> bool {
        match self.replica.said.pop_front() {
            None => false,
            Some(Said::Answers(answers)) => {
                self.syncer.handle_answers(&answers);
                true
            }
            Some(Said::Durable(below)) => {
                self.durable(below);
                true
            }
        }
    }

    /// One random thing happens. `load`: chance in a hundred that it is a new request.
    pub(crate) fn random_step(&mut self, load: u64, link: u64) {
        self.step += 1;
        if self.rng.chance(load, 100) {
            let guest = self.rng.index(self.guests.len());
            if self.guests[guest].pending.len() < 12 {
                self.random_request(guest);
            }
        }
        match self.rng.below(10) {
            0..5 => {
                let guest = self.rng.index(self.guests.len());
                self.turn_guest(guest);
            }
            5 | 6 => {
                self.turn_sync();
            }
            7 => self.turn_cutter(),
            _ => {
                for _ in 0..self.rng.below(4) {
                    if self.rng.chance(link, 100) {
                        self.ship();
                    }
                }
                if self.rng.chance(link, 100) {
                    self.apply();
                }
                if self.rng.chance(link, 100) {
                    self.hear();
                }
            }
        }
    }

    /// The guests stop; everything comes to rest.
    pub(crate) fn settle(&mut self) {
        if !self.live {
            self.go_live();
        }
        for _ in 0..200_000 {
            self.step += 1;
            let mut moved = false;
            for guest in 0..self.guests.len() {
                moved |= self.turn_guest(guest);
            }
            moved |= self.turn_sync();
            self.turn_cutter();
            while self.ship() {}
            while self.apply() {}
            while self.hear() {
                moved = true;
            }
            self.reopen();
            if !moved && self.is_whole() {
                return;
            }
        }
        panic!("does not come to rest: {:?} {:?} pending {:?}", self.group, self.syncer, self.pending());
    }

    fn pending(&self) -> Vec<usize> {
        self.guests.iter().map(|guest| guest.pending.len()).collect()
    }

    fn is_whole(&self) -> bool {
        let clean = |filter: &Arc<FilterVolume<HoleyDisk>>| {
            let volume = filter.volume().expect("captured");
            volume.missing().count_ones() == 0 && volume.in_flight().count_ones() == 0 && volume.announced()
        };
        self.guests.iter().all(|guest| guest.pending.is_empty())
            && self.filters.iter().all(clean)
            && !self.group.event_open()
            && !self.ring.is_closed()
            && !self.replica.event_open
            // Only empty cuts are left.
            && self.replica.wire.is_empty()
    }

    /// At rest: source and replica are the same, and nothing is held anywhere.
    pub(crate) fn check_equal(&self) {
        for (index, disk) in (0_u16..).zip(&self.disks) {
            let mut image = vec![0; usize::try_from(disk.size()).expect("small")];
            disk.peek(0, &mut image);
            let replica = &self.replica.images[&index];
            let differs = image.chunks(SECTOR).zip(replica.chunks(SECTOR)).position(|(a, b)| a != b);
            assert_eq!(differs, None, "volume {index}: first sector that differs");
        }
        for guest in &self.guests {
            assert_eq!(guest.io.overlapping_writes(), 0, "overlapping writes are never in flight together");
            assert_eq!(guest.queue.changes_in_flight(), 0);
        }
        assert_eq!(self.replica.joined.len(), self.filters.len(), "all volumes have joined");
    }

    /// The host goes down: its memory is gone, and what its disks had not made stable is anybody's guess. What is on the wire may still
    /// arrive. Then it has a new ring, [`Self::come_back`].
    pub(crate) fn go_down(&mut self) {
        self.restarts += 1;
        self.live = false;
        // Histories know nothing of acknowledged writes that are taken back.
        self.points_hold = false;
        for Guest { io, queue, .. } in std::mem::take(&mut self.guests) {
            io.kill();
            drop(queue);
        }
        std::mem::replace(&mut self.sync_io, SimIo::new(self.rng.fork())).kill();
        for disk in &self.disks {
            disk.crash(&mut self.rng);
        }
        while self.rng.chance(1, 2) && self.replica.apply_batch().is_some() {}
    }

    /// The host comes back with a new ring. `ranges`: of each volume, what its log says; `None`: everything.
    pub(crate) fn come_back(&mut self, ranges: &[Option<Vec<(u64, u64)>>]) {
        let joined: Vec<bool> = (0..self.config.volumes).map(|index| self.replica.joined.contains(&index)).collect();
        self.ring_file = self.folder.path().join(format!("ring{}", self.restarts));
        let ring_config = RingConfig {
            slab_bytes: self.config.slab_mib << 20,
            descriptors: Some(self.config.descriptors),
            ..RingConfig::new(identity())
        };
        self.ring = Arc::new(Ring::create(&self.ring_file, &ring_config).expect("a ring"));
        self.replica.forget_wire(0);
        self.group = CaptureGroup::new(Arc::clone(&self.ring), self.config.capture.clone());
        self.filters.clear();
        for (((index, disk), joined), ranges) in (0_u16..).zip(&self.disks).zip(joined).zip(ranges) {
            let content = if ranges.is_some() { Content::AsMarked } else { Content::Unknown };
            let filter = self.group.add_volume(spec(index, content, joined), HoleyDisk(disk.clone())).expect("room");
            let volume = filter.volume().expect("captured");
            for (offset, len) in ranges.iter().flatten().filter(|(offset, _)| *offset < volume.size()) {
                self.group.mark_missing(volume, *offset, (*len).min(volume.size() - offset));
            }
            self.filters.push(filter);
        }
        self.group.begin_event();
        self.consumer = self.ring.consumer().expect("the only one");
        self.cutter = Cutter::new(Arc::clone(&self.group));
        self.syncer = Syncer::new(Arc::clone(&self.group), self.config.sync.clone(), key());
        self.open();
    }

    /// The agent is killed and started again.
    pub(crate) fn kill_and_restart(&mut self) {
        self.restarts += 1;
        self.live = false;
        // The mapping is shared, so the file is what the kernel would keep; what drops below happens to the old one.
        let next = self.folder.path().join(format!("ring{}", self.restarts));
        std::fs::copy(&self.ring_file, &next).expect("room in /dev/shm");
        self.ring_file = next;
        for Guest { volume, io, queue, pending, .. } in std::mem::take(&mut self.guests) {
            io.kill();
            drop(queue);
            for pending in pending.values() {
                self.perhaps_wrote(volume, pending);
            }
        }
        let joined: Vec<bool> = self.filters.iter().map(|f| f.volume().expect("captured").joined()).collect();
        self.replica.lose_link();
        let dormant = Ring::open(&self.ring_file, &identity()).expect("a ring survives a kill");
        mark_recovered(&dormant);
        self.ring = Arc::new(dormant.resume());
        self.group = CaptureGroup::new(Arc::clone(&self.ring), self.config.capture.clone());
        self.filters.clear();
        for ((index, disk), joined) in (0_u16..).zip(&self.disks).zip(joined) {
            let filter = self.group.add_volume(spec(index, Content::AsMarked, joined), HoleyDisk(disk.clone()));
            self.filters.push(filter.expect("as before"));
        }
        self.group.begin_event();
        self.consumer = self.ring.consumer().expect("the only one");
        self.cutter = Cutter::new(Arc::clone(&self.group));
        self.syncer = Syncer::new(Arc::clone(&self.group), self.config.sync.clone(), key());
        std::mem::replace(&mut self.sync_io, SimIo::new(self.rng.fork())).kill();
        self.open();
    }
}

/// Kinds of requests.
#[derive(Clone, Copy, Debug)]
pub(crate) enum What {
    Write { fua: bool },
    Zeroes { no_hole: bool },
    Discard,
    Read,
    Flush,
}

/// Some slots full, some with holes, some empty.
fn initial_image(rng: &mut SimRng, volume: u16, slots: u64) -> Vec<u8> {
    let mut image = vec![0; usize::try_from(volume_size(slots)).expect("small")];
    for (slot, bytes) in image.chunks_mut(usize::try_from(SLOT_BYTES).expect("small")).enumerate() {
        let kind = rng.below(3);
        for (sector, bytes) in bytes.chunks_mut(SECTOR).enumerate() {
            if kind == 0 || (kind == 1 && rng.chance(1, 4)) {
                stamp(bytes, 1 << 40 | u64::from(volume) << 32 | (slot * 128 + sector) as u64);
            }
        }
    }
    image
}
