//! Which record covers which piece of which slot: `(volume, slot, batch, seq)` → where the bytes are.
//!
//! The active segment's entries are in memory ([`Index::add_batch`]); a sealed segment's footer is a sorted run
//! ([`Index::sealed`]); runs of neighbouring segments are merged in the background ([`Index::maintain`]). Byte tables:
//! `docs/formats/index.md`.
//!
//! Memory: the active segment's entries (at most about [`MEMTABLE_ENTRIES_MAX`], 56 bytes each, then [`Index::wants_seal`]
//! says so) and one key per 14,450 entries of the runs; all else is read through the page cache, block by block.
//!
//! Readers take a snapshot of the set of runs and never wait for a merge, a seal or the horizon.

mod block;
mod builder;
mod entry;
mod files;
mod memtable;
mod merge;
mod run;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use farshore_proto::{BatchNo, SLOT_BYTES, VolumeIndex};
use farshore_uring::{Storage, replace_file};

use crate::error::{Error, IoContext, Kind, Result};
use crate::group::{IndexEntry, SealedRun, UpTo, ZERO_EXTENT_SLOTS};
use builder::RunBuilder;
pub(crate) use entry::Versions;
pub use entry::sectors;
use entry::{ALL_SECTORS, Cover, EXTENT_BIT, Key, Moment, extent_place};
use files::{encode_moved, moved_path, open_footer, open_merged, read_moved};
use memtable::Memtable;
use run::Run;

/// Entries of the active segment above which [`Index::wants_seal`] asks for a new segment: 56 MiB of memory, and as much
/// again while the footer is made.
pub const MEMTABLE_ENTRIES_MAX: usize = 1 << 20;
/// Entries added under one lock, so that a reader waits for less than a millisecond.
const ADD_AT_ONCE: usize = 1024;

/// The index of one stream.
pub struct Index<S: Storage> {
    storage: S,
    folder: PathBuf,
    state: RwLock<Arc<State<S>>>,
    /// Batches up to this one are in the base; their entries are not visible any more.
    horizon: AtomicU64,
    /// Held by the one merge at a time.
    merging: Mutex<()>,
    /// The sealed segments' own runs, merged or not.
    footers: Mutex<BTreeMap<u32, SealedRun>>,
}

/// A snapshot: what readers search.
struct State<S: Storage> {
    /// Oldest first; their batches do not overlap.
    members: Vec<Member<S>>,
    /// Newer than all members.
    memtable: Arc<RwLock<Memtable>>,
}

/// A run and the batches that it stands for.
struct Member<S: Storage> {
    first: BatchNo,
    last: BatchNo,
    /// In a file of its own in the index folder.
    merged: bool,
    content: MemberContent<S>,
}

enum MemberContent<S: Storage> {
    Run(Arc<Run<S>>),
    /// Cannot be opened; reads that get this far back fail with this text.
    Damaged(Arc<str>),
}

impl<S: Storage> Clone for MemberContent<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Run(run) => Self::Run(Arc::clone(run)),
            Self::Damaged(text) => Self::Damaged(Arc::clone(text)),
        }
    }
}

impl<S: Storage> Clone for Member<S> {
    fn clone(&self) -> Self {
        Self { first: self.first, last: self.last, merged: self.merged, content: self.content.clone() }
    }
}

impl<S: Storage> Member<S> {
    fn run(&self) -> Result<&Arc<Run<S>>> {
        match &self.content {
            MemberContent::Run(run) => Ok(run),
            MemberContent::Damaged(text) => Err(Error::new(Kind::Damaged, text.to_string())),
        }
    }

    fn covers(&self, first: BatchNo, last: BatchNo) -> bool {
        self.first <= first && last <= self.last
    }
}

/// Figures of an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IndexStats {
    /// Runs that a read may have to search.
    pub runs: usize,
    /// Runs that cannot be opened.
    pub damaged_runs: usize,
    /// Entries in runs.
    pub run_entries: u64,
    /// Bytes of the runs.
    pub run_bytes: u64,
    /// Entries in memory.
    pub memory_entries: usize,
}

impl<S: Storage> Index<S> {
    /// Opens the index in `folder` (created if missing) with the footers of the sealed segments; reads headers only, and
    /// removes what an interrupted merge left. Beside the folder, `base/moved` says how far the base is.
    ///
    /// A footer whose header is damaged does not stop the others: reads that get as far back as it fail.
    ///
    /// # Errors
    /// From the disk; [`Kind::Damaged`] for a damaged `base/moved`, without which no read is right.
    pub fn open(storage: S, folder: PathBuf, sealed: &[SealedRun]) -> Result<Self> {
        storage.create_dir_all(&folder).at("create folder", &folder)?;
        let horizon = read_moved(&storage, &moved_path(&folder))?;
        let mut members = open_merged(&storage, &folder, horizon)?;
        for run in sealed {
            let is_covered = members.iter().any(|member| member.covers(run.first, run.last));
            if run.last > horizon && !is_covered {
                members.push(open_footer(&storage, run)?);
            }
        }
        members.sort_by_key(|member| member.first);
        if let Some(pair) = members.windows(2).find(|pair| pair[0].last >= pair[1].first) {
            let (one, other) = (&pair[0], &pair[1]);
            let text = format!(
                "index runs in {}: batches {}..{} and {}..{} overlap",
                folder.display(),
                one.first,
                one.last,
                other.first,
                other.last
            );
            return Err(Error::new(Kind::Damaged, text));
        }
        let state = State { members, memtable: Arc::default() };
        Ok(Self {
            storage,
            folder,
            state: RwLock::new(Arc::new(state)),
            horizon: AtomicU64::new(horizon.0),
            merging: Mutex::new(()),
            footers: Mutex::new(sealed.iter().map(|run| (run.segment, run.clone())).collect()),
        })
    }

    fn state(&self) -> Arc<State<S>> {
        Arc::clone(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the set of runs; `change` gets the present one under the lock.
    fn change(&self, change: impl FnOnce(&State<S>) -> State<S>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        *state = Arc::new(change(&state));
    }

    /// Adds the entries of the next batch, `seq` rising. Visible at once to readers whose point includes the batch.
    ///
    /// # Panics
    /// If an entry is older than one added before.
    pub fn add_batch(&self, entries: &[IndexEntry]) {
        let state = self.state();
        for entries in entries.chunks(ADD_AT_ONCE) {
            let mut memtable = state.memtable.write().unwrap_or_else(PoisonError::into_inner);
            entries.iter().for_each(|entry| memtable.add(entry));
        }
    }

    /// Whether the active segment should be sealed for the sake of memory.
    #[must_use]
    pub fn wants_seal(&self) -> bool {
        self.state().memtable.read().unwrap_or_else(PoisonError::into_inner).len() >= MEMTABLE_ENTRIES_MAX
    }

    /// The entries in memory as the bytes of a run: the active segment's footer.
    ///
    /// # Errors
    /// None today; building a run in memory cannot fail.
    pub fn active_run(&self) -> Result<Vec<u8>> {
        let (entries, batches) = {
            let state = self.state();
            let memtable = state.memtable.read().unwrap_or_else(PoisonError::into_inner);
            (memtable.sorted(), memtable.batches().unwrap_or((0, 0)))
        };
        build_run(&entries, BatchNo(batches.0), BatchNo(batches.1))
    }

    /// The active segment's footer is durable: `run` replaces the entries in memory. Entries of later batches stay.
    ///
    /// # Errors
    /// From reading the footer; then the entries stay in memory.
    pub fn sealed(&self, run: SealedRun) -> Result<()> {
        let last = run.last;
        let member = open_footer(&self.storage, &run)?;
        member.run()?;
        self.footers.lock().unwrap_or_else(PoisonError::into_inner).insert(run.segment, run);
        self.change(|state| {
            let memtable = state.memtable.read().unwrap_or_else(PoisonError::into_inner);
            let newer = memtable.after(last.0);
            let mut members = state.members.clone();
            members.push(member);
            State { members, memtable: Arc::new(RwLock::new(newer)) }
        });
        Ok(())
    }

    /// The entries that make up a slot at `upto`, newest first, until every sector has one; each covers at least one
    /// sector that those before do not. Sectors without one are the base's.
    ///
    /// # Errors
    /// [`Kind::Damaged`], naming volume and bytes, when a block of a run that this read needs is; otherwise from the disk.
    pub fn lookup(&self, volume: VolumeIndex, slot: u64, upto: UpTo) -> Result<Vec<IndexEntry>> {
        self.lookup_sectors(volume, slot, upto, ALL_SECTORS)
    }

    /// As [`Self::lookup`], for the sectors in `need` ([`sectors`]) only.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn lookup_sectors(&self, volume: VolumeIndex, slot: u64, upto: UpTo, need: u128) -> Result<Vec<IndexEntry>> {
        let mut cover = Cover::of(need);
        self.cover(volume, slot, upto, &mut cover).map_err(|error| {
            let (start, end) = (slot * SLOT_BYTES, (slot + 1) * SLOT_BYTES);
            let context = format!("volume {volume} bytes {start}..{end}: {}", error.context());
            Error::new(error.kind(), context).caused(error)
        })?;
        Ok(cover.entries)
    }

    fn cover(&self, volume: VolumeIndex, slot: u64, upto: UpTo, cover: &mut Cover) -> Result<()> {
        // The horizon before the runs: when a run is gone that the old horizon asks for, the base has its content.
        let horizon = self.moved_to();
        let floor: Moment = (horizon.0, u32::MAX);
        let state = self.state();
        {
            let memtable = state.memtable.read().unwrap_or_else(PoisonError::into_inner);
            search(volume, slot, floor, cover, |place, floor, visit| {
                memtable.scan_back(volume, place, upto, floor, visit);
                Ok(())
            })?;
        }
        for member in state.members.iter().rev() {
            if cover.is_complete() || member.last <= horizon {
                break;
            }
            if member.first > upto.batch {
                continue;
            }
            let run = member.run()?;
            let has_extents = run.header().has_extents;
            search(volume, slot, floor, cover, |place, floor, visit| {
                if place & EXTENT_BIT != 0 && !has_extents {
                    return Ok(());
                }
                run.scan_back(volume, place, upto, floor, visit)
            })?;
        }
        Ok(())
    }

    /// Up to `limit` slots with entries of their own, in order, from `from` on: may name slots that `upto` does not see,
    /// never leaves one out that it sees. Fewer than `limit` mean that there are no more.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn slots(&self, volume: VolumeIndex, from: u64, upto: UpTo, limit: usize) -> Result<Vec<u64>> {
        Ok(self.places(volume, from, upto, limit)?.into_iter().map(|(place, _)| place).collect())
    }

    /// As [`Self::slots`], with what each slot's versions are, visible or not.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub(crate) fn survey(
        &self,
        volume: VolumeIndex,
        from: u64,
        upto: UpTo,
        limit: usize,
    ) -> Result<Vec<(u64, Versions)>> {
        self.places(volume, from, upto, limit)
    }

    /// As [`Self::slots`], for the first slots of zero extents ([`crate::group::Content::ZeroExtent`]).
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn zero_extents(&self, volume: VolumeIndex, from: u64, upto: UpTo, limit: usize) -> Result<Vec<u64>> {
        let places = self.places(volume, extent_place(from), upto, limit)?;
        Ok(places.into_iter().map(|(place, _)| place & !EXTENT_BIT).collect())
    }

    /// Whether `upto` sees a zero extent over the slots from `first` on.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub(crate) fn covers_extent(&self, volume: VolumeIndex, first: u64, upto: UpTo) -> Result<bool> {
        let horizon = self.moved_to();
        let (place, floor) = (extent_place(first), (horizon.0, u32::MAX));
        let state = self.state();
        let mut seen = false;
        let mut see = |_: &IndexEntry| {
            seen = true;
            ControlFlow::Break(())
        };
        state.memtable.read().unwrap_or_else(PoisonError::into_inner).scan_back(volume, place, upto, floor, &mut see);
        for member in state.members.iter().filter(|member| member.first <= upto.batch && member.last > horizon) {
            let run = member.run()?;
            if run.header().has_extents {
                run.scan_back(volume, place, upto, floor, &mut see)?;
            }
        }
        Ok(seen)
    }

    fn places(&self, volume: VolumeIndex, from: u64, upto: UpTo, limit: usize) -> Result<Vec<(u64, Versions)>> {
        let horizon = self.moved_to();
        let state = self.state();
        let mut found = Vec::new();
        // Beyond the end of a list that was cut off, other lists are incomplete too.
        let mut end = u64::MAX;
        let mut part = Vec::new();
        let mut take = |part: &mut Vec<(u64, Versions)>| {
            if part.len() >= limit
                && let Some(&(last, _)) = part.last()
            {
                end = end.min(last);
            }
            found.append(part);
        };
        state.memtable.read().unwrap_or_else(PoisonError::into_inner).places(volume, from, limit, &mut part);
        take(&mut part);
        for member in state.members.iter().filter(|member| member.first <= upto.batch && member.last > horizon) {
            let context = |error: Error| {
                let context =
                    format!("volume {volume} from byte {}: {}", (from & !EXTENT_BIT) * SLOT_BYTES, error.context());
                Error::new(error.kind(), context).caused(error)
            };
            member.run().and_then(|run| run.places(volume, from, limit, &mut part)).map_err(context)?;
            take(&mut part);
        }
        found.sort_unstable_by_key(|&(place, _)| place);
        found.dedup_by(|next, first| {
            let same = next.0 == first.0;
            if same {
                first.1 = first.1 | next.1;
            }
            same
        });
        found.retain(|&(place, _)| place <= end);
        found.truncate(limit);
        Ok(found)
    }

    /// The first slot from `from` on that may have an entry, zero extents included: may name one that `upto` does not see.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn next_slot(&self, volume: VolumeIndex, from: u64, upto: UpTo) -> Result<Option<u64>> {
        let slot = self.slots(volume, from, upto, 1)?.first().copied();
        let extent = self.zero_extents(volume, from, upto, 1)?.first().copied();
        // An extent that began before `from` covers it.
        let extent = extent.map(|first| if first + ZERO_EXTENT_SLOTS > from { first.max(from) } else { first });
        Ok([slot, extent].into_iter().flatten().min())
    }

    /// The last batch that is in the base: entries up to it are not visible any more.
    #[must_use]
    pub fn moved_to(&self) -> BatchNo {
        BatchNo(self.horizon.load(Ordering::Acquire))
    }

    /// The base has all of the batches up to `batch`, durably: forgets their entries. The runs' files in the index folder
    /// go; segments that only they needed may go afterwards.
    ///
    /// # Durability
    /// Durable before any run is forgotten.
    ///
    /// # Errors
    /// From the disk; then nothing is forgotten.
    pub fn set_moved_to(&self, batch: BatchNo) -> Result<()> {
        if batch <= self.moved_to() {
            return Ok(());
        }
        let path = moved_path(&self.folder);
        if let Some(folder) = path.parent() {
            self.storage.create_dir_all(folder).at("create folder", folder)?;
        }
        replace_file(&self.storage, &path, &encode_moved(batch)).at("replace", &path)?;
        self.horizon.fetch_max(batch.0, Ordering::AcqRel);
        let mut gone = Vec::new();
        self.change(|state| {
            let (old, members) = state.members.iter().cloned().partition(|member| member.last <= batch);
            gone = old;
            State { members, memtable: Arc::clone(&state.memtable) }
        });
        self.remove_files(&gone);
        self.footers.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, run| run.last > batch);
        Ok(())
    }

    /// All entries of a sealed segment, from its own footer, or of the active one; in the order of a run. Slow: for finding
    /// out what damage touches.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the footer is; otherwise from the disk.
    pub fn segment_entries(&self, segment: u32) -> Result<Vec<IndexEntry>> {
        let footer = self.footers.lock().unwrap_or_else(PoisonError::into_inner).get(&segment).cloned();
        let Some(footer) = footer else {
            return Ok(self.state().memtable.read().unwrap_or_else(PoisonError::into_inner).sorted());
        };
        let member = open_footer(&self.storage, &footer)?;
        let mut pass = member.run()?.entries();
        let mut entries = Vec::new();
        while let Some(entry) = pass.step()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Removes the files of merged runs that nothing leads to. What cannot be removed now goes at the next opening.
    fn remove_files(&self, members: &[Member<S>]) {
        for member in members.iter().filter(|member| member.merged) {
            let path = self.folder.join(merge::run_name(member.first, member.last));
            if let Err(error) = self.storage.remove(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove an index run that is not needed any more");
            }
        }
    }

    /// Merges runs until none is due. `true`: something was merged. Blocks for as long as writing the merged run takes;
    /// readers and ingest go on. Ends early, without effect of the merge under way, when `stop` is set.
    ///
    /// # Errors
    /// From the disk; the index is as before. A damaged run stops merging, not reading.
    pub fn maintain(&self, stop: &AtomicBool) -> Result<bool> {
        let _one = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut merged_any = false;
        while !stop.load(Ordering::Relaxed) && self.merge_once(stop)? {
            merged_any = true;
        }
        Ok(merged_any)
    }

    fn merge_once(&self, stop: &AtomicBool) -> Result<bool> {
        let state = self.state();
        let level = |member: &Member<S>| match &member.content {
            MemberContent::Run(run) => (run.header().level, run.header().entries),
            // No neighbour is of this level.
            MemberContent::Damaged(_) => (u8::MAX, 0),
        };
        let Some(range) = merge::plan(&state.members.iter().map(level).collect::<Vec<_>>()) else {
            return Ok(false);
        };
        let inputs = &state.members[range];
        let (first, last) = (inputs[0].first, inputs[inputs.len() - 1].last);
        let runs = inputs.iter().map(|member| member.run().map(Arc::clone)).collect::<Result<Vec<_>>>()?;
        let Some(run) = merge::merge(&self.storage, &self.folder, &runs, first, last, self.moved_to(), stop)? else {
            return Ok(false);
        };
        let merged = Member { first, last, merged: true, content: MemberContent::Run(Arc::new(run)) };
        let mut gone = Vec::new();
        self.change(|state| {
            let mut members = state.members.clone();
            // The horizon may have taken some of the inputs, or all, in the meantime.
            let place = members.iter().position(|member| merged.covers(member.first, member.last));
            if let Some(place) = place {
                gone = members.extract_if(.., |member| merged.covers(member.first, member.last)).collect();
                members.insert(place, merged.clone());
            } else {
                gone = vec![merged.clone()];
            }
            State { members, memtable: Arc::clone(&state.memtable) }
        });
        self.remove_files(&gone);
        Ok(true)
    }

    /// Reads every block of every run; all damage found.
    #[must_use]
    pub fn verify(&self) -> Vec<Error> {
        let state = self.state();
        let verify = |member: &Member<S>| match member.run() {
            Ok(run) => run.verify(),
            Err(error) => vec![error],
        };
        state.members.iter().flat_map(verify).collect()
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        let state = self.state();
        let mut stats = IndexStats { runs: state.members.len(), ..IndexStats::default() };
        for member in &state.members {
            match &member.content {
                MemberContent::Run(run) => {
                    stats.run_entries += run.header().entries;
                    stats.run_bytes += run.header().len();
                }
                MemberContent::Damaged(_) => stats.damaged_runs += 1,
            }
        }
        stats.memory_entries = state.memtable.read().unwrap_or_else(PoisonError::into_inner).len();
        stats
    }

    /// The runs' files, oldest first: for `dump`.
    #[must_use]
    pub fn run_files(&self) -> Vec<(PathBuf, BatchNo, BatchNo)> {
        let state = self.state();
        let file = |member: &Member<S>| match &member.content {
            MemberContent::Run(run) => (run.path().to_owned(), member.first, member.last),
            MemberContent::Damaged(text) => (PathBuf::from(text.as_ref()), member.first, member.last),
        };
        state.members.iter().map(file).collect()
    }
}

/// The bytes of a run with these entries, in any order: for a footer that must be made again.
///
/// # Errors
/// None today; building a run in memory cannot fail.
pub fn encode_run(entries: &[IndexEntry]) -> Result<Vec<u8>> {
    let mut sorted = entries.to_vec();
    sorted.sort_by_key(Key::of);
    let batches = || entries.iter().map(|entry| entry.batch);
    build_run(&sorted, batches().min().unwrap_or_default(), batches().max().unwrap_or_default())
}

/// The bytes of a run with these entries, sorted by (volume, slot, batch, seq), zero extents after a volume's slots.
pub(crate) fn build_run(sorted: &[IndexEntry], first: BatchNo, last: BatchNo) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut builder = RunBuilder::new(&mut bytes, 0, first, last);
    for entry in sorted {
        builder.push(entry)?;
    }
    builder.finish()?;
    Ok(bytes)
}

/// Searches one source: first the newest extent over the slot, then the slot's versions newer than that.
fn search(
    volume: VolumeIndex,
    slot: u64,
    floor: Moment,
    cover: &mut Cover,
    scan: impl Fn(u64, Moment, &mut dyn FnMut(&IndexEntry) -> ControlFlow<()>) -> Result<()>,
) -> Result<()> {
    if cover.is_complete() {
        return Ok(());
    }
    let mut extent = None;
    scan(extent_place(slot), floor, &mut |entry| {
        debug_assert_eq!(entry.volume, volume, "a scan stays within its volume");
        extent = Some(*entry);
        ControlFlow::Break(())
    })?;
    let floor = extent.map_or(floor, |entry| floor.max((entry.batch.0, entry.seq)));
    scan(slot, floor, &mut |entry| if cover.take(entry) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })?;
    if let Some(extent) = extent {
        cover.take(&extent);
    }
    Ok(())
}
