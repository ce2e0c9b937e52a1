//! The segment files of one stream: which there are, their frames, and dropping them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use farshore_proto::BatchNo;
use farshore_proto::frame::{FRAME_HEADER_BYTES, FRAME_PLAIN_MAX, FrameHeader};
use farshore_uring::{OpenMode, Storage, StorageFile};

use crate::error::{Error, IoContext, Kind, Result};
use crate::group::FrameStore;
use crate::keys::StreamKeys;

/// Segment files kept open per stream: a view of a busy stream reads a handful at a time; more would eat descriptors.
const OPEN_FILES_MAX: usize = 64;
/// Bytes read in one go for a frame: its header and, mostly, all of it.
const FRAME_READ_BYTES: usize = 80 << 10;
/// Unreadable frames remembered until somebody takes them (I11).
const SUSPECTS_MAX: usize = 256;

/// One segment, as others see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentInfo {
    /// Number.
    pub number: u32,
    /// First batch in it; 0: none yet.
    pub first: BatchNo,
    /// Last batch in it; 0: none yet.
    pub last: BatchNo,
    /// Bytes of entries, header included.
    pub bytes: u64,
    /// It has a footer and takes no more entries.
    pub sealed: bool,
    /// Earlier segments that its entries refer to.
    pub refers_to: BTreeSet<u32>,
}

/// The segments of one stream. Ingest adds and grows them, views read their frames, retention drops them.
pub struct Segments<S: Storage> {
    storage: S,
    folder: PathBuf,
    /// Stream's number within this process: keeps streams apart in the cache that they share.
    stream: u32,
    keys: Arc<StreamKeys>,
    known: RwLock<BTreeMap<u32, SegmentInfo>>,
    files: Mutex<OpenFiles<S>>,
    cache: Arc<FrameCache>,
    suspects: Mutex<Vec<(u32, u32)>>,
}

struct OpenFiles<S: Storage> {
    open: BTreeMap<u32, (Arc<S::File>, u64)>,
    clock: u64,
}

impl<S: Storage> Segments<S> {
    /// An empty registry over `folder` (the stream's `journal`).
    #[must_use]
    pub fn new(storage: S, folder: PathBuf, stream: u32, keys: Arc<StreamKeys>, cache: Arc<FrameCache>) -> Self {
        Self {
            storage,
            folder,
            stream,
            keys,
            known: RwLock::default(),
            files: Mutex::new(OpenFiles { open: BTreeMap::new(), clock: 0 }),
            cache,
            suspects: Mutex::default(),
        }
    }

    /// Path of a segment's file.
    #[must_use]
    pub fn path(&self, number: u32) -> PathBuf {
        self.folder.join(file_name(number))
    }

    /// The folder of the files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Tells of a segment, new or changed.
    pub(crate) fn set(&self, info: SegmentInfo) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(info.number, info);
    }

    /// All, by number.
    #[must_use]
    pub fn list(&self) -> Vec<SegmentInfo> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Bytes of all segments' entries.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.known.read().unwrap_or_else(PoisonError::into_inner).values().map(|segment| segment.bytes).sum()
    }

    /// Sealed segments that nothing needs when the base is at `horizon`: all their batches are at or below it, and no
    /// segment that stays refers to them.
    #[must_use]
    pub fn droppable(&self, horizon: BatchNo) -> Vec<u32> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        // Not the segment that ends with the horizon: its footer holds that point, which is offered still.
        let past = |segment: &SegmentInfo| segment.sealed && segment.last < horizon;
        let mut needed = BTreeSet::new();
        // A reference leads straight to the frame that holds the bytes, so what a segment refers to matters only while
        // its own batches do.
        for segment in known.values() {
            if !past(segment) {
                needed.extend(segment.refers_to.iter().copied());
            }
        }
        known.values().filter(|segment| past(segment) && !needed.contains(&segment.number)).map(|s| s.number).collect()
    }

    /// Removes a segment's file. Call [`crate::group::GroupHost::drop_segment`], which asks the leases first.
    pub(crate) fn drop_segment(&self, number: u32) -> Result<()> {
        {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            known.remove(&number);
        }
        self.files.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&number);
        self.cache.forget_segment(self.stream, number);
        let path = self.path(number);
        match self.storage.remove(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &path, error)),
            _ => self.storage.sync_dir(&self.folder).at("sync", &self.folder),
        }
    }

    /// The file of a segment.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none (dropped); otherwise from opening.
    pub fn file(&self, number: u32) -> Result<Arc<S::File>> {
        if !self.known.read().unwrap_or_else(PoisonError::into_inner).contains_key(&number) {
            return Err(Error::new(Kind::NotFound, format!("segment {number} of {}", self.folder.display())));
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.clock += 1;
        let clock = files.clock;
        if let Some((file, used)) = files.open.get_mut(&number) {
            *used = clock;
            return Ok(Arc::clone(file));
        }
        let path = self.path(number);
        let file = self.storage.open(&path, OpenMode::Read).at("open", &path)?;
        if files.open.len() >= OPEN_FILES_MAX
            && let Some(oldest) = files.open.iter().min_by_key(|(_, (_, used))| *used).map(|(number, _)| *number)
        {
            files.open.remove(&oldest);
        }
        files.open.insert(number, (Arc::clone(&file), clock));
        Ok(file)
    }

    /// Frames that turned out unreadable since the last call: `(segment, offset)`.
    #[must_use]
    pub(crate) fn take_suspects(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn load(&self, segment: u32, at: u32) -> Result<Arc<[u8]>> {
        let file = self.file(segment)?;
        let path = self.path(segment);
        let len = file.len().at("measure", &path)?;
        let left = usize::try_from(len.saturating_sub(u64::from(at))).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(FRAME_READ_BYTES)];
        file.read_at(&mut bytes, u64::from(at)).at("read", &path)?;
        let damaged = |error: farshore_proto::Error| Error::damaged(&path, u64::from(at), &error).caused(error);
        let header = FrameHeader::parse(&bytes, FRAME_PLAIN_MAX).map_err(damaged)?;
        if header.total_len() > left {
            return Err(Error::damaged(&path, u64::from(at), "the frame ends behind the file"));
        }
        if header.total_len() > bytes.len() {
            let have = bytes.len();
            bytes.resize(header.total_len(), 0);
            file.read_at(&mut bytes[have..], u64::from(at) + have as u64).at("read", &path)?;
        }
        let sealed = &bytes[FRAME_HEADER_BYTES..header.total_len()];
        header.check_sealed(sealed).map_err(damaged)?;
        let key = self.keys.host_key(header.key_epoch())?.frame_key(header.salt());
        let (mut scratch, mut plain) = (Vec::new(), Vec::new());
        key.open(&header, sealed, &[], &mut scratch, &mut plain).map_err(damaged)?;
        Ok(plain.into())
    }
}

impl<S: Storage> FrameStore for Segments<S> {
    fn read_frame(&self, segment: u32, frame_offset: u32) -> Result<Arc<[u8]>> {
        let key = (self.stream, segment, frame_offset);
        if let Some(plain) = self.cache.find(key) {
            return Ok(plain);
        }
        match self.load(segment, frame_offset) {
            Ok(plain) => {
                self.cache.keep(key, &plain);
                Ok(plain)
            }
            Err(error) => {
                if error.kind() == Kind::Damaged {
                    let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
                    if suspects.len() < SUSPECTS_MAX && !suspects.contains(&(segment, frame_offset)) {
                        suspects.push((segment, frame_offset));
                    }
                }
                Err(error)
            }
        }
    }
}

/// Name of a segment's file.
#[must_use]
pub fn file_name(number: u32) -> String {
    format!("{number:08}.seg")
}

/// The number in a segment's file name.
#[must_use]
pub fn number_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    let number: u32 = name.strip_suffix(".seg")?.parse().ok()?;
    (file_name(number) == name).then_some(number)
}

type FrameId = (u32, u32, u32);

/// Plain frames kept in memory, least recently used go first; one for all streams of a target.
pub struct FrameCache {
    inner: Mutex<CacheInner>,
    bytes_max: usize,
}

#[derive(Default)]
struct CacheInner {
    frames: HashMap<FrameId, (Arc<[u8]>, u64)>,
    /// Uses in their order; a frame's entry counts only if its stamp is the frame's latest.
    uses: VecDeque<(FrameId, u64)>,
    stamp: u64,
    bytes: usize,
}

impl FrameCache {
    /// A cache of at most `bytes_max` bytes of content.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { inner: Mutex::default(), bytes_max }
    }

    fn find(&self, id: FrameId) -> Option<Arc<[u8]>> {
        let mut inner = self.lock();
        inner.stamp += 1;
        let stamp = inner.stamp;
        let (plain, used) = inner.frames.get_mut(&id)?;
        *used = stamp;
        let plain = Arc::clone(plain);
        inner.uses.push_back((id, stamp));
        inner.compact();
        Some(plain)
    }

    fn keep(&self, id: FrameId, plain: &Arc<[u8]>) {
        if plain.len() > self.bytes_max {
            return;
        }
        let mut inner = self.lock();
        inner.stamp += 1;
        let stamp = inner.stamp;
        inner.bytes += plain.len();
        if let Some((old, _)) = inner.frames.insert(id, (Arc::clone(plain), stamp)) {
            inner.bytes -= old.len();
        }
        inner.uses.push_back((id, stamp));
        while inner.bytes > self.bytes_max {
            let Some((oldest, stamp)) = inner.uses.pop_front() else { break };
            if inner.frames.get(&oldest).is_some_and(|(_, used)| *used == stamp) {
                inner.remove(oldest);
            }
        }
        inner.compact();
    }

    fn forget_segment(&self, stream: u32, segment: u32) {
        let mut inner = self.lock();
        let mut gone: Vec<FrameId> =
            inner.uses.iter().map(|(id, _)| *id).filter(|id| (id.0, id.1) == (stream, segment)).collect();
        gone.sort_unstable();
        gone.dedup();
        gone.into_iter().for_each(|id| inner.remove(id));
    }

    fn lock(&self) -> MutexGuard<'_, CacheInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CacheInner {
    fn remove(&mut self, id: FrameId) {
        if let Some((plain, _)) = self.frames.remove(&id) {
            self.bytes -= plain.len();
        }
    }

    /// Keeps the list of uses in proportion to the frames: outdated entries go when they outnumber the others.
    fn compact(&mut self) {
        if self.uses.len() > 4 * self.frames.len() + 64 {
            let frames = &self.frames;
            self.uses.retain(|(id, stamp)| frames.get(id).is_some_and(|(_, used)| used == stamp));
        }
    }
}
