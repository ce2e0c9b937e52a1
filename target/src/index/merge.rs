//! Size-tiered merging: which runs, and how.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use farshore_proto::BatchNo;
use farshore_uring::{OpenMode, Storage, StorageFile};

use super::block::BLOCK_BYTES;
use super::builder::{RunBuilder, Sink};
use super::entry::Key;
use super::run::{Entries, RUN_ENTRIES_MAX, Run};
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::IndexEntry;

/// Runs of one level that become one of the next. With 8, an entry is rewritten once per factor of eight in history, and
/// a read passes at most seven runs per level.
pub(crate) const FAN_IN: usize = 8;
/// Bytes that a merge collects before it writes.
const WRITE_BYTES: usize = 1 << 20;

/// Of runs, oldest first, as (level, entries): the neighbours to merge next.
pub(crate) fn plan(runs: &[(u8, u64)]) -> Option<std::ops::Range<usize>> {
    let mut start = 0;
    while start < runs.len() {
        let level = runs[start].0;
        let same = runs[start..].iter().take_while(|run| run.0 == level).count();
        // The oldest first: the newest of the level stay where they would be merged with those to come.
        if same >= FAN_IN {
            let range = start..start + FAN_IN;
            if level < u8::MAX && runs[range.clone()].iter().map(|run| run.1).sum::<u64>() <= RUN_ENTRIES_MAX {
                return Some(range);
            }
        }
        start += same;
    }
    None
}

/// A merged run's file name. The batches it covers are in it, so that opening can tell what replaces what.
pub(crate) fn run_name(first: BatchNo, last: BatchNo) -> PathBuf {
    PathBuf::from(format!("{:016x}-{:016x}.run", first.0, last.0))
}

/// The batches in a merged run's name.
pub(crate) fn parse_run_name(name: &Path) -> Option<(BatchNo, BatchNo)> {
    let (first, last) = name.to_str()?.strip_suffix(".run")?.split_once('-')?;
    let number = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten().map(BatchNo);
    Some((number(first)?, number(last)?))
}

/// Merges `runs`, oldest first, into a new file in `folder`; entries up to `horizon` are left out. `None`: told to stop.
///
/// Crash safety: 1. the new run is written under a temporary name and synced, 2. renamed, 3. the folder is synced; only
/// then may the inputs go. A restart removes temporary names, and of two runs where one covers the other's batches it
/// takes the wider.
pub(crate) fn merge<S: Storage>(
    storage: &S,
    folder: &Path,
    runs: &[Arc<Run<S>>],
    first: BatchNo,
    last: BatchNo,
    horizon: BatchNo,
    stop: &AtomicBool,
) -> Result<Option<Run<S>>> {
    let level = runs.iter().map(|run| run.header().level).max().unwrap_or(0).saturating_add(1);
    let bytes: u64 = runs.iter().map(|run| run.header().len()).sum();
    // Maps are made anew and may grow a little; merging is optional, ingest is not.
    if storage.free_bytes().at("ask for the free space of", folder)? < bytes.saturating_mul(2) {
        return Err(Error::new(
            Kind::NoSpace,
            format!("merge of index runs in {}: needs {bytes} bytes", folder.display()),
        ));
    }
    let name = folder.join(run_name(first, last));
    let temporary = name.with_extension("run.new");
    if storage.exists(&temporary).at("look for", &temporary)? {
        storage.remove(&temporary).at("remove", &temporary)?;
    }
    let file = storage.open(&temporary, OpenMode::CreateNew).at("create", &temporary)?;
    let mut sink =
        FileSink::<S> { file: Arc::clone(&file), path: temporary.clone(), at: BLOCK_BYTES as u64, waiting: Vec::new() };
    let mut builder = RunBuilder::new(&mut sink, level, first, last);
    let mut sources: Vec<Source<S>> = Vec::with_capacity(runs.len());
    for run in runs {
        sources.extend(Source::begin(run.entries(), horizon)?);
    }
    while let Some(source) = sources.iter_mut().min_by_key(|source| Key::of(&source.entry)) {
        if stop.load(Ordering::Relaxed) {
            storage.remove(&temporary).at("remove", &temporary)?;
            return Ok(None);
        }
        builder.push(&source.entry)?;
        if !source.advance(horizon)? {
            sources.retain(|source| !source.is_over);
        }
    }
    builder.finish()?;
    file.sync().at("sync", &temporary)?;
    storage.rename(&temporary, &name).at("rename", &temporary)?;
    storage.sync_dir(folder).at("sync folder", folder)?;
    Run::open(file, &name, 0, None).map(Some)
}

/// One input of a merge.
struct Source<S: Storage> {
    entries: Entries<S>,
    entry: IndexEntry,
    is_over: bool,
}

impl<S: Storage> Source<S> {
    fn begin(mut entries: Entries<S>, horizon: BatchNo) -> Result<Option<Self>> {
        let entry = next_after(&mut entries, horizon)?;
        Ok(entry.map(|entry| Self { entries, entry, is_over: false }))
    }

    fn advance(&mut self, horizon: BatchNo) -> Result<bool> {
        match next_after(&mut self.entries, horizon)? {
            Some(entry) => self.entry = entry,
            None => self.is_over = true,
        }
        Ok(!self.is_over)
    }
}

fn next_after<S: Storage>(entries: &mut Entries<S>, horizon: BatchNo) -> Result<Option<IndexEntry>> {
    while let Some(entry) = entries.step()? {
        if entry.batch > horizon {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

struct FileSink<S: Storage> {
    file: Arc<S::File>,
    path: PathBuf,
    at: u64,
    waiting: Vec<u8>,
}

impl<S: Storage> FileSink<S> {
    fn write_out(&mut self) -> Result<()> {
        self.file.write_at(&self.waiting, self.at).at("write", &self.path)?;
        // Not left to the sync at the end: a burst of hundreds of MiB would delay the journal's syncs.
        self.file.start_writeback(self.at, self.waiting.len() as u64);
        self.at += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

impl<S: Storage> Sink for FileSink<S> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= WRITE_BYTES { self.write_out() } else { Ok(()) }
    }

    fn finish(&mut self, header: &[u8]) -> Result<()> {
        self.write_out()?;
        self.file.write_at(header, 0).at("write", &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_the_oldest_eight_neighbours_of_a_level() {
        assert_eq!(plan(&[(0, 1); 7]), None);
        assert_eq!(plan(&[(0, 1); 20]), Some(0..8));
        let mut runs = vec![(2, 64), (1, 8), (1, 8)];
        runs.extend([(0, 1); 9]);
        assert_eq!(plan(&runs), Some(3..11));
        assert_eq!(plan(&[(1, RUN_ENTRIES_MAX / 2); 8]), None, "the result would be too large");
    }

    #[test]
    fn a_read_passes_a_handful_of_runs() {
        // 160 sealed segments, merged whenever a merge is due.
        let mut runs: Vec<(u8, u64)> = Vec::new();
        let mut most = 0;
        for _ in 0..160 {
            runs.push((0, 32_768));
            while let Some(range) = plan(&runs) {
                let merged = (runs[range.start].0 + 1, runs[range.clone()].iter().map(|run| run.1).sum());
                runs.splice(range, [merged]);
            }
            most = most.max(runs.len());
        }
        assert!(most <= 16 && runs.len() <= 6, "most {most}, at the end {}", runs.len());
    }

    #[test]
    fn names() {
        let name = run_name(BatchNo(1), BatchNo(0xabc));
        assert_eq!(name.to_str(), Some("0000000000000001-0000000000000abc.run"));
        assert_eq!(parse_run_name(&name), Some((BatchNo(1), BatchNo(0xabc))));
        for bad in ["1-2.run", "0000000000000001-0000000000000abc.run.new", "x", "0000000000000001.run"] {
            assert_eq!(parse_run_name(Path::new(bad)), None, "{bad}");
        }
    }
}
