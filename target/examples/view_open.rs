//! Measures a view over a large made-up history: opening, first read, random reads, merging, memory.
//!
//! `cargo run --release -p farshore-target --example view_open -- <empty folder> [records] [segments]`
#![expect(clippy::print_stdout, reason = "it is what this program is for")]
#![expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use farshore_proto::{BatchNo, Generation, Incarnation, PointId, VolumeIndex};
use farshore_target::history::History;
use farshore_target::index::Index;
use farshore_target::synthetic::{Synthetic, SyntheticConfig, generate};
use farshore_target::view::{View, ViewOf, ViewOptions};
use farshore_uring::sim::SimRng;
use farshore_uring::{BlockDevice, DirStorage};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let root = PathBuf::from(args.next().ok_or("which folder?")?);
    let mut config = SyntheticConfig::standard();
    if let Some(records) = args.next() {
        config.records = records.parse()?;
    }
    if let Some(segments) = args.next() {
        config.segments = segments.parse()?;
    }
    let storage = DirStorage::open(&root)?;
    let folder = Path::new("synthetic");
    let start = Instant::now();
    generate(&storage, folder, &config)?;
    println!("made {} records in {} segments: {:?}", config.records, config.segments, start.elapsed());

    let start = Instant::now();
    let (opened, view) = open(&storage, folder, config)?;
    let open_time = start.elapsed();
    let mut out = vec![0; 4096];
    view.read(1 << 39, &mut out)?;
    println!("open {open_time:?}, to the first read {:?}; {:?}", start.elapsed(), opened.index().stats());
    reads("random 4 KiB reads, before merging", &view, config)?;
    memory("before merging")?;

    let start = Instant::now();
    opened.index().maintain(&AtomicBool::new(false))?;
    println!("merged in {:?}; {:?}", start.elapsed(), opened.index().stats());
    drop((opened, view));
    let start = Instant::now();
    let (opened, view) = open(&storage, folder, config)?;
    view.read(1 << 39, &mut out)?;
    println!("merged: open to the first read {:?}", start.elapsed());
    reads("random 4 KiB reads, merged", &view, config)?;
    memory("merged")?;

    let start = Instant::now();
    let (mut at, mut answers, mut extents) = (0, 0, 0);
    while at < 1 << 36 {
        let found = view.extents(at, (1 << 36) - at).map_err(|errno| std::io::Error::from_raw_os_error(errno.0))?;
        at += found.iter().map(|extent| extent.len).sum::<u64>();
        answers += 1;
        extents += found.len();
    }
    println!("extents of 64 GiB: {extents} in {answers} answers, {:?}", start.elapsed());
    ingest(&storage, config)?;
    drop(opened);
    Ok(())
}

type Opened = (Arc<Synthetic<DirStorage>>, View<DirStorage>);

fn open(storage: &DirStorage, folder: &Path, config: SyntheticConfig) -> Result<Opened, Box<dyn std::error::Error>> {
    let opened = Arc::new(Synthetic::open(storage, folder, config)?);
    let point = PointId { generation: Generation(1), incarnation: Incarnation(1), batch: config.last_batch() };
    let of = ViewOf { point, volume: VolumeIndex(1), size: config.volume_bytes, block: 512 };
    let history: Arc<dyn History<DirStorage>> = Arc::clone(&opened) as _;
    let view = View::open(history, storage, &folder.join("view"), of, ViewOptions::default())?;
    Ok((opened, view))
}

/// Half of the reads hit records, half are anywhere.
fn reads(what: &str, view: &View<DirStorage>, config: SyntheticConfig) -> Result<(), Box<dyn std::error::Error>> {
    let written = config.entries(config.segments / 2);
    let mut rng = SimRng::new(7);
    let mut out = vec![0; 4096];
    for hit in [true, false] {
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..20_000 {
            let offset = if hit {
                let entry = &written[rng.index(written.len())];
                entry.slot * 65536 + u64::from(entry.start) * 512
            } else {
                rng.below(config.volume_bytes / 4096) * 4096
            };
            let start = Instant::now();
            view.read(offset, &mut out)?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let at = |part: usize| times[times.len() * part / 1000];
        let kind = if hit { "of records" } else { "anywhere" };
        println!("{what}, {kind}: p50 {:?}, p99 {:?}, p99.9 {:?}", at(500), at(990), at(999));
    }
    Ok(())
}

/// What adding to the index costs ingest, and what a seal costs.
fn ingest(storage: &DirStorage, config: SyntheticConfig) -> Result<(), Box<dyn std::error::Error>> {
    let index = Index::open(storage.clone(), PathBuf::from("ingest/index"), &[])?;
    let (mut added, mut time, mut seals) = (0, Duration::ZERO, Duration::ZERO);
    for segment in 0..config.segments.min(16) {
        let entries = config.entries(segment);
        let start = Instant::now();
        for batch in entries.chunk_by(|one, other| one.batch == other.batch) {
            index.add_batch(batch);
        }
        time += start.elapsed();
        added += entries.len();
        let start = Instant::now();
        let run = index.active_run()?;
        seals += start.elapsed();
        let path = PathBuf::from(format!("ingest/{segment}.seg"));
        std::fs::write(storage.root().join(&path), &run)?;
        let (first, last) = (entries[0].batch, entries[entries.len() - 1].batch);
        let len = run.len() as u64;
        index.sealed(farshore_target::group::SealedRun { segment, path, offset: 0, len, first, last })?;
    }
    assert!(added > 0 && index.moved_to() == BatchNo(0));
    let per_record = time / u32::try_from(added)?;
    println!("index at ingest: {per_record:?} per record, seal {:?} per segment", seals / config.segments.min(16));
    Ok(())
}

fn memory(when: &str) -> Result<(), Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    for line in status.lines().filter(|line| line.starts_with("VmRSS") || line.starts_with("VmHWM")) {
        println!("{when}: {line}");
    }
    Ok(())
}
