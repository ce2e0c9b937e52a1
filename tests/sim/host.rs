//! The protected host: what outlives its agents. Disks, what guests know, the state directory, the disk of the logs, the ring's memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use farshore_blkfilter::{BackingFile, Buf};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::{SECTOR_BYTES, SLOT_BYTES, VolumeIndex};
use farshore_ring::RingIdentity;
use farshore_uring::sim::{SECTOR, SimDisk, SimRng, SimStorage};
use farshore_uring::{Errno, Extent, FileSlot, Geometry, Io};

use crate::faults::{Coverage, DiskFaults, Fault};
use crate::history::{History, stamp};
use crate::site::name;

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

/// What the state directory says. Written whole or not at all, and durable at once.
#[derive(Clone, Default, Debug)]
pub(crate) struct Kept {
    pub(crate) incarnation: u64,
    /// The ring's own number.
    pub(crate) ring: u64,
    pub(crate) attached: bool,
    pub(crate) compare_everything: bool,
    /// Boot since which all requests went through us.
    pub(crate) boot: Option<u64>,
    pub(crate) joined: BTreeSet<u16>,
    /// Number of the disk log's line.
    pub(crate) line: Option<u64>,
    pub(crate) generation: u32,
    pub(crate) log: LogKept,
}

/// What it says of the activity log.
#[derive(Clone, Default, Debug)]
pub(crate) struct LogKept {
    pub(crate) life: u64,
    pub(crate) upheld: bool,
    pub(crate) boot: u64,
    /// A flush failed in this boot: what disks hold is anybody's guess until the next.
    pub(crate) unstable: bool,
}

/// A state that the host can be put back to.
pub(crate) struct Backup {
    disks: Vec<SimDisk>,
    own: OwnBackup,
}

/// The agent's part of it: state directory and logs.
pub(crate) struct OwnBackup {
    storage: SimStorage,
    kept: Kept,
}

/// One volume of the host.
pub(crate) struct Disk {
    pub(crate) disk: SimDisk,
    pub(crate) faults: DiskFaults,
    pub(crate) history: History,
    /// Errors that guests were told of.
    told: u64,
}

pub(crate) struct Host {
    pub(crate) rng: SimRng,
    pub(crate) volumes: Vec<Disk>,
    pub(crate) kept: Kept,
    /// Where the logs lie.
    pub(crate) storage: SimStorage,
    pub(crate) coverage: Arc<Coverage>,
    folder: tempfile::TempDir,
    pub(crate) ring_file: PathBuf,
    rings: u64,
    pub(crate) boot: u64,
    pub(crate) places: u32,
    pub(crate) slab_bytes: u64,
    pub(crate) log_bytes: u64,
    /// There is a disk log.
    pub(crate) logs: bool,
    pub(crate) compresses: bool,
    /// Position behind each cut, by incarnation, and its step.
    pub(crate) cuts: BTreeMap<(u64, u64), u64>,
    next_id: u64,
    recent: VecDeque<u64>,
    backup: Option<Backup>,
    own_backup: Option<OwnBackup>,
}

/// Slots at the start of each extent that guests write to.
const HOT_SLOTS: u64 = 10;
const EXTENT_SLOTS: u64 = 64;

impl Host {
    pub(crate) fn new(rng: &mut SimRng, coverage: Arc<Coverage>) -> Self {
        let folder = tempfile::Builder::new().prefix("farshore-sim").tempdir_in("/dev/shm").expect("room");
        let mut host = Self {
            rng: rng.fork(),
            volumes: Vec::new(),
            kept: Kept::default(),
            storage: SimStorage::new(rng.fork()),
            coverage,
            ring_file: folder.path().join("none"),
            folder,
            rings: 0,
            boot: 1,
            places: [4, 5, 8][rng.index(3)],
            slab_bytes: (2 + rng.below(4)) << 20,
            log_bytes: (2 + rng.below(2)) * (1 << 20) + 4096,
            logs: true,
            compresses: rng.chance(1, 2),
            cuts: BTreeMap::new(),
            next_id: 1 << 20,
            recent: VecDeque::new(),
            backup: None,
            own_backup: None,
        };
        for _ in 0..1 + rng.below(2) {
            host.add_volume();
        }
        host
    }

    fn add_volume(&mut self) {
        // The last slot is short, and no multiple of 4 KiB.
        let size = ((2 + self.rng.below(5)) * EXTENT_SLOTS - self.rng.below(40)) * SLOT_BYTES + 7 * SECTOR_BYTES;
        let disk = SimDisk::new(size, self.rng.fork());
        let mut image = vec![0; usize::try_from(size).expect("small")];
        for (at, slot) in (0..).zip(image.chunks_mut(usize::try_from(SLOT_BYTES).expect("small"))) {
            let kind = if at % EXTENT_SLOTS < HOT_SLOTS { self.rng.below(3) } else { 2 };
            for sector in slot.chunks_mut(SECTOR) {
                if kind == 0 || (kind == 1 && self.rng.chance(1, 4)) {
                    stamp(sector, 1 + self.rng.below(1 << 16));
                }
            }
        }
        disk.poke(0, &image);
        let faults = DiskFaults::new(self.rng.fork(), Arc::clone(&self.coverage));
        faults.install(&disk);
        self.volumes.push(Disk { disk, faults, history: History::new(&image), told: 0 });
    }

    pub(crate) fn identity(&self) -> RingIdentity {
        let mut boot = [0; 16];
        boot[..8].copy_from_slice(&self.boot.to_le_bytes());
        RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot, incarnation: self.kept.ring, generation: 0 }
    }

    /// Where the next ring is.
    pub(crate) fn next_ring_file(&mut self) -> PathBuf {
        self.rings += 1;
        self.folder.path().join(format!("ring{}", self.rings))
    }

    pub(crate) fn sizes(&self) -> Vec<u64> {
        self.volumes.iter().map(|volume| volume.disk.size()).collect()
    }

    pub(crate) fn declared(&self) -> Vec<VolumeDecl> {
        let decl = |(index, volume): (u16, &Disk)| VolumeDecl {
            index: VolumeIndex(index),
            name: name(&format!("v{index}")),
            size: volume.disk.size(),
            block: 512,
        };
        (0..).zip(&self.volumes).map(decl).collect()
    }

    /// What the device holds now.
    pub(crate) fn image(&self, volume: usize) -> Vec<u8> {
        let disk = &self.volumes[volume].disk;
        let mut image = vec![0; usize::try_from(disk.size()).expect("small")];
        disk.peek(0, &mut image);
        image
    }

    /// Content for a write; now and then one that was written before, which the target may hold already.
    pub(crate) fn content(&mut self) -> u64 {
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

    /// Where a guest's request begins, and the sectors that it may have there.
    pub(crate) fn place(&mut self, volume: usize) -> (u64, u64) {
        let sectors = self.volumes[volume].disk.size() / SECTOR_BYTES;
        let (extent, hot) = (EXTENT_SLOTS * 128, HOT_SLOTS * 128);
        // Half of them near the start, so that many overlap.
        let start = match self.rng.below(4) {
            0 | 1 => self.rng.below(200),
            2 => self.rng.below(sectors.div_ceil(extent)) * extent + self.rng.below(hot),
            // Across a border of extents.
            _ if self.rng.chance(1, 8) => (1 + self.rng.below(sectors / extent)) * extent - self.rng.below(32),
            _ => self.rng.below(sectors.div_ceil(extent)) * extent + self.rng.below(300),
        };
        let start = start.min(sectors - 1);
        let start = if self.rng.chance(1, 2) { start / 8 * 8 } else { start };
        (start, sectors - start)
    }

    /// A request failed: somebody's disk must have.
    pub(crate) fn told_error(&mut self, volume: usize) {
        self.coverage.hit(Fault::Failed);
        let volume = &mut self.volumes[volume];
        volume.told += 1;
        assert!(volume.told <= volume.faults.errors(), "a guest hears of an error that its disk never had");
    }

    /// The power fails; agents must be gone. `false`: what is there then is of another time.
    pub(crate) fn go_down(&mut self, step: u64, to_backup: bool) -> bool {
        self.boot += 1;
        let backup = if to_backup { self.backup.take() } else { None };
        let is_old = backup.is_some();
        if let Some(Backup { disks, own }) = backup {
            self.coverage.hit(Fault::HostOld);
            for (volume, disk) in self.volumes.iter_mut().zip(disks) {
                volume.disk = disk;
            }
            (self.storage, self.kept) = (own.storage, own.kept);
        } else {
            self.coverage.hit(Fault::HostCrash);
        }
        self.storage = self.storage.crash(&mut self.rng);
        for volume in &mut self.volumes {
            volume.faults.end();
            volume.disk.crash(&mut self.rng);
            volume.faults.install(&volume.disk);
        }
        for at in 0..self.volumes.len() {
            let image = self.image(at);
            let checked = self.volumes[at].history.went_down(&image, step, !is_old);
            if let Err(why) = checked {
                panic!("step {step}, volume {at}: {why}");
            }
        }
        !is_old
    }

    /// See [`crate::tap::Log::is_taken_for`].
    pub(crate) fn cuts_are_of(&mut self, life: u64, number: u64) {
        self.cuts.retain(|(of, _), _| *of != number);
        let renamed = |((of, at), step)| ((if of == life { number } else { of }, at), step);
        self.cuts = std::mem::take(&mut self.cuts).into_iter().map(renamed).collect();
    }

    /// Somebody makes a copy of all of the host's disks at this moment.
    pub(crate) fn back_up(&mut self) {
        let disks = self.volumes.iter().map(|volume| volume.disk.fork()).collect();
        self.backup = Some(Backup { disks, own: self.copy_own() });
    }

    fn copy_own(&self) -> OwnBackup {
        OwnBackup { storage: self.storage.fork(), kept: self.kept.clone() }
    }

    /// Somebody makes a copy of the agent's own files, or puts them back to the last one; the agent must be gone then. `true`: they were put back.
    pub(crate) fn swap_own(&mut self) -> bool {
        let Some(OwnBackup { storage, kept }) = self.own_backup.take() else {
            self.own_backup = Some(self.copy_own());
            return false;
        };
        self.coverage.hit(Fault::StateOld);
        (self.storage, self.kept) = (storage, kept);
        true
    }

    pub(crate) fn has_own_backup(&self) -> bool {
        self.own_backup.is_some()
    }

    pub(crate) fn has_backup(&self) -> bool {
        self.backup.is_some()
    }

    /// No more trouble.
    pub(crate) fn spare(&mut self) {
        self.volumes.iter().for_each(|volume| volume.faults.end());
        self.storage.clear_fault();
    }
}
