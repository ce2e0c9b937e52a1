//! The protected host: guests, disks, filter, sync, cuts and the ring.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use farshore_blkfilter::sync::{SyncConfig, Syncer, VerifyEvent, VerifyOrder};
use farshore_blkfilter::{
    BackingFile, Buf, CaptureConfig, CaptureGroup, Content, Cutter, FilterQueue, FilterVolume, VolumeSpec,
};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::keys::DedupKey;
use farshore_proto::{Now, Position, SECTOR_BYTES, SLOT_BYTES, VolumeIndex, WallTime};
use farshore_ring::{Memory, Ring, RingConfig, RingIdentity};
use farshore_uring::sim::{SECTOR, SimDisk, SimIo, SimRng};
use farshore_uring::{BlockDevice, BlockQueue, Errno, Extent, FileSlot, Geometry, Io, Purpose, Request};

use crate::history::{History, stamp};
use crate::site::name;

/// A disk whose zero 4 KiB blocks are holes.
#[derive(Clone, Debug)]
pub(crate) struct HoleyDisk(SimDisk);

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

struct Pending {
    offset: u64,
    len: u64,
    /// Of a write; 0: zeroes; `None`: changes nothing.
    id: Option<u64>,
    submitted: u64,
}

struct Guest {
    volume: usize,
    io: SimIo<Buf>,
    queue: FilterQueue,
    pending: BTreeMap<u32, Pending>,
    tag: u32,
}

pub(crate) struct Host {
    rng: SimRng,
    pub(crate) ring: Arc<Ring>,
    pub(crate) group: Arc<CaptureGroup>,
    disks: Vec<SimDisk>,
    pub(crate) histories: Vec<History>,
    filters: Vec<Arc<FilterVolume<HoleyDisk>>>,
    guests: Vec<Guest>,
    pub(crate) syncer: Syncer,
    sync_io: SimIo<Buf>,
    cutter: Cutter,
    /// Position behind each cut, and its step.
    pub(crate) cuts: BTreeMap<u64, u64>,
    next_id: u64,
    recent: VecDeque<u64>,
    pub(crate) acked: u64,
    /// Passes of verify follow each other.
    pub(crate) verifies: bool,
    /// Bytes that were found the same.
    pub(crate) verified: u64,
}

const GUESTS: usize = 3;

impl Host {
    pub(crate) fn new(rng: &mut SimRng, key: DedupKey) -> Self {
        let identity = RingIdentity {
            vault: [1; 16],
            group: [2; 16],
            host: [3; 16],
            boot: [4; 16],
            incarnation: 1,
            generation: 1,
        };
        let config =
            RingConfig { slab_bytes: (2 + rng.below(4)) << 20, descriptors: Some(512), ..RingConfig::new(identity) };
        let ring = Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("a ring"));
        let ms = std::time::Duration::from_millis;
        let config = CaptureConfig { cut_min: ms(8), cut_max: ms(60), stall_max: ms(50), ..CaptureConfig::default() };
        let group = CaptureGroup::new(Arc::clone(&ring), config);
        let sync = SyncConfig { window: 4, ..SyncConfig::default() };
        let mut host = Self {
            rng: rng.fork(),
            syncer: Syncer::new(Arc::clone(&group), sync, key),
            sync_io: SimIo::new(rng.fork()),
            cutter: Cutter::new(Arc::clone(&group)),
            ring,
            group,
            disks: Vec::new(),
            histories: Vec::new(),
            filters: Vec::new(),
            guests: Vec::new(),
            cuts: BTreeMap::new(),
            next_id: 1 << 20,
            recent: VecDeque::new(),
            acked: 0,
            verifies: true,
            verified: 0,
        };
        for index in 0..1 + u16::try_from(rng.below(2)).expect("few") {
            host.add_volume(index);
        }
        host.open();
        host
    }

    fn add_volume(&mut self, index: u16) {
        // The last slot is short, and no multiple of 4 KiB.
        let size = (16 + self.rng.below(46)) * SLOT_BYTES + 7 * SECTOR_BYTES;
        let disk = SimDisk::new(size, self.rng.fork());
        let mut image = vec![0; usize::try_from(size).expect("small")];
        for slot in image.chunks_mut(usize::try_from(SLOT_BYTES).expect("small")) {
            let kind = self.rng.below(3);
            for sector in slot.chunks_mut(SECTOR) {
                if kind == 0 || (kind == 1 && self.rng.chance(1, 4)) {
                    stamp(sector, 1 + self.rng.below(1 << 16));
                }
            }
        }
        disk.poke(0, &image);
        self.histories.push(History::new(&image));
        let id = [u8::try_from(index).expect("few"); 16];
        let spec = VolumeSpec {
            index: VolumeIndex(index),
            name: name(&format!("v{index}")),
            id,
            content: Content::Unknown,
            joined: false,
        };
        let filter = self.group.add_volume(spec, HoleyDisk(disk.clone())).expect("room for the bitmaps");
        self.filters.push(filter);
        self.disks.push(disk);
    }

    fn open(&mut self) {
        let waker = self.sync_io.waker();
        self.group.set_sync_waker(move || waker.wake());
        for filter in &self.filters {
            self.sync_io.attach(&filter.file().0);
            self.syncer.add_volume(&mut self.sync_io, filter).expect("few owners");
        }
        for guest in 0..GUESTS {
            let volume = guest % self.filters.len();
            let mut io = SimIo::new(self.rng.fork());
            io.attach(&self.disks[volume]);
            let queue = self.filters[volume].open_queue(&mut io).expect("few owners");
            self.guests.push(Guest { volume, io, queue, pending: BTreeMap::new(), tag: 0 });
        }
    }

    pub(crate) fn sizes(&self) -> Vec<u64> {
        self.disks.iter().map(SimDisk::size).collect()
    }

    pub(crate) fn declared(&self) -> Vec<VolumeDecl> {
        let decl = |(index, disk): (u16, &SimDisk)| VolumeDecl {
            index: VolumeIndex(index),
            name: name(&format!("v{index}")),
            size: disk.size(),
            block: 512,
        };
        (0..).zip(&self.disks).map(decl).collect()
    }

    /// What the device holds now.
    pub(crate) fn image(&self, volume: usize) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(self.disks[volume].size()).expect("small")];
        self.disks[volume].peek(0, &mut image);
        image
    }

    /// Content for a write; now and then one that was written before, which the target may hold already.
    fn content(&mut self) -> u64 {
        if !self.recent.is_empty() && self.rng.chance(1, 4) {
            return self.recent[self.rng.index(self.recent.len())];
        }
        self.next_id += 1;
        self.recent.push_back(self.next_id);
        if self.recent.len() > 40 {
            self.recent.pop_front();
        }
        self.next_id
    }

    /// One more request, of any guest and kind.
    pub(crate) fn submit(&mut self, step: u64) {
        let index = self.rng.index(self.guests.len());
        if self.guests[index].pending.len() >= 12 {
            return;
        }
        let sectors = self.disks[self.guests[index].volume].size() / SECTOR_BYTES;
        // Half of them near the start, so that many overlap.
        let start = if self.rng.chance(1, 2) { self.rng.below(200) } else { self.rng.below(sectors) };
        let start = if self.rng.chance(1, 2) { start / 8 * 8 } else { start };
        let most = sectors - start;
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
            _ => Some(self.content()),
        };
        let flag = self.rng.chance(1, 2);
        let guest = &mut self.guests[index];
        let request = match kind {
            0 => Request::Flush,
            1 | 2 => Request::Read { offset, len: short, buf: guest.queue.buffer(Purpose::Read, short) },
            3 => Request::Discard { offset, len: bytes },
            4 => Request::WriteZeroes { offset, len: bytes, fua: flag, no_hole: !flag },
            _ => {
                let mut buf = guest.queue.buffer(Purpose::Write, short);
                stamp(&mut buf[..usize::try_from(bytes).expect("short")], id.expect("a write has content"));
                Request::Write { offset, len: short, buf, fua: kind == 5 }
            }
        };
        guest.tag += 1;
        guest.pending.insert(guest.tag, Pending { offset, len: bytes, id, submitted: step });
        guest.queue.submit(&mut guest.io, guest.tag, request);
    }

    /// Any guest's I/O goes one step.
    pub(crate) fn turn_any_guest(&mut self, step: u64) {
        let index = self.rng.index(self.guests.len());
        self.turn_guest(index, step);
    }

    fn turn_guest(&mut self, index: usize, step: u64) {
        let guest = &mut self.guests[index];
        guest.io.step();
        while let Some(completion) = guest.io.poll_completion() {
            guest.queue.handle_completion(&mut guest.io, completion);
        }
        if guest.io.take_wakeup() {
            guest.queue.handle_wake(&mut guest.io);
        }
        while let Some(done) = guest.queue.poll_done() {
            let pending = guest.pending.remove(&done.tag).expect("a tag ends once");
            assert_eq!(done.result, Ok(()), "no trouble of link or target reaches a guest");
            if let Some(id) = pending.id {
                self.acked += 1;
                self.histories[guest.volume].wrote(pending.offset, pending.len, id, pending.submitted, step);
            }
        }
    }

    pub(crate) fn turn_all_guests(&mut self, step: u64) {
        (0..self.guests.len()).for_each(|guest| self.turn_guest(guest, step));
    }

    pub(crate) fn turn_sync(&mut self, now: Now) {
        self.sync_io.step();
        while let Some(completion) = self.sync_io.poll_completion() {
            self.syncer.handle_completion(&mut self.sync_io, now, completion);
        }
        if self.sync_io.take_wakeup() {
            self.syncer.handle_wake();
        }
        self.syncer.poll(&mut self.sync_io, now);
        while let Some(event) = self.syncer.poll_verify() {
            match event {
                // Nothing here changes a disk past the filter, so nothing can.
                VerifyEvent::Differs { volume, range } => panic!("{range:?} of volume {volume} is said to differ"),
                VerifyEvent::Ended { found, .. } => self.verified += found.equal_bytes,
            }
        }
        for volume in (0..self.disks.len()).filter(|_| self.verifies) {
            let volume = VolumeIndex(u16::try_from(volume).expect("few"));
            if self.syncer.verify_progress(volume).is_none() {
                self.syncer.begin_verify(VerifyOrder { volume, pass: 1, from: 0, rate: None });
            }
        }
    }

    pub(crate) fn cut(&mut self, step: u64, now: Now, wall: WallTime, slot_free: bool) {
        if let Some(cut) = self.cutter.poll(now, wall, slot_free) {
            let Position(position) = cut.position;
            self.cuts.insert(position + 1, step);
        }
    }

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
