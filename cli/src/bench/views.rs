//! Opening a view of a long history.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use farshore_proto::{BatchNo, Generation, Incarnation, PointId, VolumeIndex};
use farshore_target::history::History;
use farshore_target::synthetic::{Synthetic, SyntheticConfig, generate};
use farshore_target::view::{View, ViewOf, ViewOptions};
use farshore_uring::DirStorage;

use super::peers::private_memory;
use super::{Bench, Row};

/// Times of one opening.
struct Opened {
    seconds: f64,
    memory: u64,
}

fn open(bench: &Bench<'_>, config: SyntheticConfig, batch: BatchNo) -> Result<Opened> {
    let folder = std::path::Path::new("stream");
    let storage = DirStorage::open(&bench.dir).context("open the working folder")?;
    let begin = Instant::now();
    // What a target does after a start: open the index, open the view, read the first block.
    let history = Arc::new(Synthetic::open(&storage, folder, config).context("open the history")?);
    let of = ViewOf {
        point: PointId { generation: Generation(1), incarnation: Incarnation(1), batch },
        volume: VolumeIndex(1),
        size: config.volume_bytes,
        block: 512,
    };
    let history: Arc<dyn History<DirStorage>> = history;
    let options = ViewOptions { read_only: true, ..ViewOptions::default() };
    let view = View::open(history, &storage, std::path::Path::new("scratch"), of, options).context("open the view")?;
    let mut block = vec![0; 4096];
    view.read(0, &mut block).context("read the first block")?;
    let seconds = begin.elapsed().as_secs_f64();
    // Reads all over the volume, so that whatever the index keeps in memory is there to be counted.
    let places = config.volume_bytes / 4096;
    let mut place = 1u64;
    for _ in 0..2000 {
        place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        view.read(place % places * 4096, &mut block).context("read a block")?;
    }
    let memory = private_memory(std::process::id())?;
    Ok(Opened { seconds, memory })
}

pub(super) fn view_open(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let config = SyntheticConfig::standard();
    let storage = DirStorage::open(&bench.dir).context("open the working folder")?;
    generate(&storage, std::path::Path::new("stream"), &config).context("make the history")?;
    let newest = open(bench, config, config.last_batch())?;
    let oldest = open(bench, config, BatchNo(1))?;
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    let millions = config.records as f64 / 1e6;
    let memory = mib(newest.memory.max(oldest.memory));
    Ok(vec![
        Row::new("view of the newest point: first read after", newest.seconds, "s").at_most(1.0),
        Row::new("view of the oldest point: first read after", oldest.seconds, "s").at_most(1.0),
        Row::new("memory with the whole history open", memory, "MiB").at_most(512.0),
        Row::new("memory per million records", memory / millions, "MiB"),
    ])
}
