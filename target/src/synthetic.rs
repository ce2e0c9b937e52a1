//! A made-up history of any size, for measuring: real index runs and base, payloads that are holes.
//!
//! Everything is a function of [`SyntheticConfig`]; the same configuration makes the same bytes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{BatchNo, Name, SECTOR_BYTES, SLOT_BYTES, VolumeIndex};
use farshore_uring::sim::SimRng;
use farshore_uring::{OpenMode, Storage, StorageFile};

use crate::base::Base;
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::{ChunkPlace, Content, FrameStore, IndexEntry, SealedRun};
use crate::history::History;
use crate::index::{Index, encode_run};

/// Records in a batch.
const BATCH_RECORDS: u64 = 1024;
/// Plain bytes of a frame.
const FRAME_BYTES: u32 = 64 << 10;

/// What to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SyntheticConfig {
    /// Bytes of the volume; sparse.
    pub volume_bytes: u64,
    /// Records in all, at random places.
    pub records: u64,
    /// Bytes of a record: whole sectors, at most a slot, aligned to themselves.
    pub record_bytes: u32,
    /// Segments that they are spread over.
    pub segments: u32,
    /// Of the random places.
    pub seed: u64,
}

impl SyntheticConfig {
    /// 20 GiB of journal in 4 KiB records over a volume of 1 TiB: what `SPEC.md` promises a view's opening for.
    #[must_use]
    pub fn standard() -> Self {
        let records = 5 << 20;
        Self { volume_bytes: 1 << 40, records, record_bytes: 4096, segments: 160, seed: 1 }
    }

    fn records_of(&self, segment: u32) -> std::ops::Range<u64> {
        let share = |number: u32| self.records * u64::from(number) / u64::from(self.segments);
        share(segment)..share(segment + 1)
    }

    /// Batches are numbered from 1; each segment begins with a new one.
    fn batches_of(&self, segment: u32) -> (BatchNo, BatchNo) {
        let before: u64 = (0..segment).map(|number| self.batch_count(number)).sum();
        (BatchNo(before + 1), BatchNo(before + self.batch_count(segment)))
    }

    fn batch_count(&self, segment: u32) -> u64 {
        let records = self.records_of(segment);
        (records.end - records.start).div_ceil(BATCH_RECORDS).max(1)
    }

    /// The last batch.
    #[must_use]
    pub fn last_batch(&self) -> BatchNo {
        self.batches_of(self.segments - 1).1
    }

    /// The entries of one segment, in the order of their writing.
    #[must_use]
    pub fn entries(&self, segment: u32) -> Vec<IndexEntry> {
        let mut rng = SimRng::new(self.seed ^ u64::from(segment) << 32);
        let records = self.records_of(segment);
        let first_batch = self.batches_of(segment).0;
        let places = self.volume_bytes / u64::from(self.record_bytes);
        let per_frame = FRAME_BYTES / self.record_bytes;
        let entry = |number: u64| {
            let offset = rng.below(places) * u64::from(self.record_bytes);
            let small = |value: u64| u32::try_from(value).expect("numbers within a segment");
            let frame = small(number) / per_frame;
            IndexEntry {
                volume: VolumeIndex(1),
                slot: offset / SLOT_BYTES,
                batch: BatchNo(first_batch.0 + number / BATCH_RECORDS),
                seq: small(number % BATCH_RECORDS),
                start: u8::try_from(offset % SLOT_BYTES / SECTOR_BYTES).expect("a slot has 128 sectors"),
                count: u8::try_from(u64::from(self.record_bytes) / SECTOR_BYTES).expect("at most a slot"),
                content: Content::Chunk(ChunkPlace {
                    segment,
                    frame_offset: frame * FRAME_BYTES,
                    within: small(number) % per_frame * self.record_bytes,
                }),
            }
        };
        (0..records.end - records.start).map(entry).collect()
    }

    /// Bytes of a segment's payload.
    fn payload_bytes(&self, segment: u32) -> u64 {
        let records = self.records_of(segment);
        ((records.end - records.start) * u64::from(self.record_bytes)).next_multiple_of(u64::from(FRAME_BYTES))
    }

    fn check(&self) -> Result<()> {
        let record = u64::from(self.record_bytes);
        let sound = record >= SECTOR_BYTES
            && SLOT_BYTES.is_multiple_of(record)
            && self.volume_bytes >= record
            && self.segments > 0
            && (0..self.segments).all(|segment| self.payload_bytes(segment) < u64::from(u32::MAX));
        if sound { Ok(()) } else { Err(Error::new(Kind::Invalid, format!("synthetic history {self:?}"))) }
    }
}

fn segment_path(folder: &Path, segment: u32) -> PathBuf {
    folder.join("journal").join(format!("{segment:08}.seg"))
}

/// Makes the history in `folder`: segments that are holes with an index run behind, and an empty base.
///
/// # Errors
/// [`Kind::Invalid`] for a configuration that makes no sense; otherwise from the disk.
pub fn generate<S: Storage>(storage: &S, folder: &Path, config: &SyntheticConfig) -> Result<()> {
    config.check()?;
    let journal = folder.join("journal");
    storage.create_dir_all(&journal).at("create folder", &journal)?;
    for segment in 0..config.segments {
        let path = segment_path(folder, segment);
        let file = storage.open(&path, OpenMode::CreateNew).at("create", &path)?;
        let run = encode_run(&config.entries(segment))?;
        file.write_at(&run, config.payload_bytes(segment)).at("write", &path)?;
    }
    storage.sync_dir(&journal).at("sync folder", &journal)
}

/// A made-up history, open.
pub struct Synthetic<S: Storage> {
    config: SyntheticConfig,
    index: Index<S>,
    base: Arc<Base<S>>,
    frames: SyntheticFrames,
}

impl<S: Storage> Synthetic<S> {
    /// Opens what [`generate`] made.
    ///
    /// # Errors
    /// From the disk.
    pub fn open(storage: &S, folder: &Path, config: SyntheticConfig) -> Result<Self> {
        config.check()?;
        let mut sealed = Vec::new();
        for segment in 0..config.segments {
            let path = segment_path(folder, segment);
            let file = storage.open(&path, OpenMode::Read).at("open", &path)?;
            let offset = config.payload_bytes(segment);
            let len = file.len().at("ask for the length of", &path)?.saturating_sub(offset);
            let (first, last) = config.batches_of(segment);
            sealed.push(SealedRun { segment, path, offset, len, first, last });
        }
        let index = Index::open(storage.clone(), folder.join("index"), &sealed)?;
        let name = Name::new("synthetic").map_err(|error| Error::new(Kind::Invalid, error.to_string()))?;
        let decl = VolumeDecl { index: VolumeIndex(1), name, size: config.volume_bytes, block: 512 };
        let base = Base::open_or_create(storage.clone(), folder.join("base"), &decl)?;
        Ok(Self { config, index, base: Arc::new(base), frames: SyntheticFrames })
    }

    /// What it is.
    #[must_use]
    pub fn config(&self) -> &SyntheticConfig {
        &self.config
    }
}

impl<S: Storage> History<S> for Synthetic<S> {
    fn index(&self) -> &Index<S> {
        &self.index
    }

    fn frames(&self) -> &dyn FrameStore {
        &self.frames
    }

    fn base(&self, volume: VolumeIndex) -> Result<Arc<Base<S>>> {
        if volume == VolumeIndex(1) {
            Ok(Arc::clone(&self.base))
        } else {
            Err(Error::new(Kind::NotFound, "no such volume"))
        }
    }
}

/// Frames that are made when they are read.
struct SyntheticFrames;

impl FrameStore for SyntheticFrames {
    fn read_frame(&self, segment: u32, frame_offset: u32) -> Result<Arc<[u8]>> {
        let mut bytes = vec![0; FRAME_BYTES as usize];
        SimRng::new(u64::from(segment) << 32 | u64::from(frame_offset)).fill(&mut bytes);
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use farshore_uring::sim::World;

    use super::*;
    use crate::group::UpTo;
    use crate::reader::read_sectors;

    #[test]
    fn a_small_one_reads_as_it_was_made() {
        let storage = World::new(1).storage();
        let config =
            SyntheticConfig { volume_bytes: 1 << 24, records: 5000, record_bytes: 4096, segments: 20, seed: 3 };
        generate(&storage, Path::new("s"), &config).expect("storage has no faults");
        let made = Synthetic::open(&storage, Path::new("s"), config).expect("just made");
        assert_eq!(made.index.stats().run_entries, 5000);
        made.index.maintain(&std::sync::atomic::AtomicBool::new(false)).expect("storage has no faults");
        assert_eq!(made.index.stats().run_entries, 5000);
        assert!(made.index.stats().runs < 8);
        let last = config.entries(19).pop().expect("250 records");
        let Content::Chunk(place) = last.content else { panic!("records are chunks") };
        let frame = made.frames.read_frame(place.segment, place.frame_offset).expect("always");
        let mut out = [0; 4096];
        let upto = UpTo::end_of(config.last_batch());
        read_sectors(&made, last.volume, last.slot, u32::from(last.start), upto, &mut out).expect("no damage");
        assert_eq!(out, frame[place.within as usize..][..4096]);
    }
}
