//! Initial sync and resync of a volume, against programs that copy.
//!
//! The same rules for all: the source's image is read from the disk, not from the page cache (what of it, and of the copy, is in
//! memory is dropped before each run); a run ends when the copy is whole and durable. Ours is more than that then: a recovery
//! point that keeps what was there before.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use super::copiers::{NbdcopyTarget, Rsync};
use super::fio::sparse;
use super::replicate::{GROUP, WAIT_SECONDS, mega, start};
use super::{Bench, Row};
use crate::sites::Sites;

const VOLUME: &str = "disk";
/// Content is made, and used parts of a sparse volume are, in pieces of this size.
const PIECE: usize = 4 << 20;

/// Times of one contestant, one of each round.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    /// Megabytes of `bytes` per second, by the median.
    fn rate(&self, bytes: u64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let bytes = bytes as f64;
        mega(bytes / median(&self.0).as_secs_f64())
    }
}

pub(super) fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}

/// A comparison: ours and the peer's times.
#[derive(Default)]
struct Duel {
    ours: Times,
    peer: Times,
}

impl Duel {
    fn row(&self, what: &str, bytes: u64, peer: &str) -> Row {
        let ratio = |ours: &Duration, peer: &Duration| peer.as_secs_f64() / ours.as_secs_f64();
        let ratios: Vec<f64> = self.ours.0.iter().zip(&self.peer.0).map(|(ours, peer)| ratio(ours, peer)).collect();
        let low = ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let high = ratios.iter().copied().fold(0.0, f64::max);
        let what = format!("{what} (rounds: {low:.2}–{high:.2} ×)");
        Row::new(what, self.ours.rate(bytes), "MB/s").against(peer, self.peer.rate(bytes))
    }

    /// Runs both, who begins depending on `round`.
    fn round(
        &mut self,
        round: u64,
        ours: impl FnOnce() -> Result<Duration>,
        peer: impl FnOnce() -> Result<Duration>,
    ) -> Result<()> {
        let (ours, peer) = if round.is_multiple_of(2) {
            let ours = ours()?;
            (ours, peer()?)
        } else {
            let peer = peer()?;
            (ours()?, peer)
        };
        self.ours.0.push(ours);
        self.peer.0.push(peer);
        Ok(())
    }
}

/// `farshore bench sync`.
pub(super) fn sync(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let size = bench.args.size;
    let (mut initial, mut changed, mut equal) = (Duel::default(), Duel::default(), Duel::default());
    let rsync = Rsync::start(&bench.dir.join("ssh"))?;
    for round in 0..bench.args.rounds {
        let dir = bench.dir.join(format!("round-{round}"));
        std::fs::create_dir(&dir).context("make a folder")?;
        let inner = Bench { args: bench.args, dir: dir.clone() };
        let image = sparse(dir.join("source.img"), size)?;
        let copy = sparse(dir.join("copy.img"), size)?;
        let mut sites = start(&inner)?;
        let peer = NbdcopyTarget::start(&dir.join("nbd"), &copy)?;
        let caches = || drop_caches(&[&image, &copy, &sites.path("target")]);
        let nbdcopy = || {
            caches()?;
            peer.copy(&image, false)
        };
        let resync = || {
            caches()?;
            let begin = Instant::now();
            sites.agent().post("/v1/resync", &json!({ "volume": VOLUME }))?;
            sites.wait(GROUP, WAIT_SECONDS)?;
            Ok(begin.elapsed())
        };
        fill(&image, 2 * round, Some(0..size))?;
        let protect = || {
            caches()?;
            protected(&sites, &image)
        };
        initial.round(round, protect, nbdcopy)?;
        equal.round(round, resync, || {
            caches()?;
            rsync.copy(&image, &copy)
        })?;
        fill(&image, 2 * round + 1, Some(0..size))?;
        changed.round(round, resync, nbdcopy)?;
        sites.stop_agent()?;
        sites.stop_target()?;
        drop((sites, peer));
        std::fs::remove_dir_all(dir).context("clean up")?;
    }
    let (nbdcopy, rsync) = ("nbdcopy --flush over TLS", "rsync --inplace --no-whole-file over ssh");
    Ok(vec![
        initial.row("initial sync", size, nbdcopy).at_least(1.0),
        changed.row("resync, all of it changed", size, nbdcopy).at_least(1.0),
        equal.row("resync, nothing changed", size, rsync).at_least(2.0),
    ])
}

/// `farshore bench sparse`.
pub(super) fn sparse_volume(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let (size, used) = (bench.args.volume_size, bench.args.used);
    let pieces = used.div_ceil(PIECE as u64).max(1);
    ensure!(used <= size, "--used is more than --volume-size");
    let stride = (size / pieces).next_multiple_of(64 << 10);
    let places: Vec<_> =
        (0..pieces).map(|at| (at * stride)..(at * stride + PIECE as u64)).filter(|place| place.end <= size).collect();
    let image = sparse(bench.dir.join("source.img"), size)?;
    fill(&image, 1, places.iter().cloned())?;
    let used = places.len() as u64 * PIECE as u64;
    let mut duel = Duel::default();
    let mut sent = Vec::new();
    for round in 0..bench.args.rounds {
        let dir = bench.dir.join(format!("round-{round}"));
        std::fs::create_dir(&dir).context("make a folder")?;
        let inner = Bench { args: bench.args, dir: dir.clone() };
        let copy = sparse(dir.join("copy.img"), size)?;
        let mut sites = start(&inner)?;
        let peer = NbdcopyTarget::start(&dir.join("nbd"), &copy)?;
        let caches = || drop_caches(&[&image, &copy, &sites.path("target")]);
        let ours = || {
            caches()?;
            protected(&sites, &image)
        };
        duel.round(round, ours, || {
            caches()?;
            peer.copy(&image, true)
        })?;
        sent.push(super::replicate::status(&sites)?["wire_bytes"].as_u64().context("bytes on the wire")?);
        sites.stop_agent()?;
        sites.stop_target()?;
        drop((sites, peer));
        std::fs::remove_dir_all(dir).context("clean up")?;
    }
    sent.sort_unstable();
    let of = format!("{} GiB with {} MiB used", size >> 30, used >> 20);
    #[expect(clippy::cast_precision_loss, reason = "bytes for people")]
    let sent = mega(sent[sent.len() / 2] as f64);
    Ok(vec![
        duel.row(&format!("initial sync of {of}, rate of what is used"), used, "nbdcopy --flush over TLS")
            .at_least(1.0),
        Row::new("the same, time", median(&duel.ours.0).as_secs_f64(), "s")
            .against("nbdcopy", median(&duel.peer.0).as_secs_f64()),
        Row::new("bytes on the wire for it", sent, "MB"),
    ])
}

/// Protects `image` and waits for its first point; how long that took.
fn protected(sites: &Sites, image: &Path) -> Result<Duration> {
    let begin = Instant::now();
    sites.protect(image, GROUP, VOLUME)?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    Ok(begin.elapsed())
}

/// Writes places of a file with content of which half compresses, and of which no 4 KiB are the same twice, nor with another `seed`.
pub(super) fn fill(path: &Path, seed: u64, places: impl IntoIterator<Item = std::ops::Range<u64>>) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path).context("open the image")?;
    let mut piece = vec![0; PIECE];
    for place in places {
        let mut at = place.start;
        while at < place.end {
            let len = usize::try_from(place.end - at).unwrap_or(PIECE).min(PIECE);
            for (block, offset) in piece[..len].chunks_mut(4096).zip((at..).step_by(4096)) {
                content(block, seed, offset);
            }
            file.write_all_at(&piece[..len], at).context("fill the image")?;
            at += len as u64;
        }
    }
    file.sync_all().context("sync the image")
}

fn content(block: &mut [u8], seed: u64, offset: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ offset.wrapping_mul(0xd134_2543_de82_ef95) | 1;
    let half = block.len() / 2;
    let (noise, rest) = block.split_at_mut(half);
    for word in noise.chunks_mut(8) {
        // xorshift64*.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bytes = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
    rest.fill(0x5a);
}

/// Writes out what of these files is only in memory, and drops it there. A folder: all files in it.
pub(super) fn drop_caches(paths: &[&Path]) -> Result<()> {
    for path in paths {
        for file in files(path)? {
            // A file may be gone by now.
            let Ok(file) = std::fs::File::open(&file) else { continue };
            file.sync_all().context("sync a file")?;
            posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .context("drop a file's cache")?;
        }
    }
    Ok(())
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type().context("look at a file")?);
        if kind.is_dir() {
            found.extend(files(&path)?);
        } else if kind.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Goal: no block is made twice, in one image or in two, so that nobody gains by knowing one of them; half of each compresses.
    #[test]
    fn no_content_comes_twice() {
        let mut seen = BTreeSet::new();
        for seed in 0..4 {
            for number in 0..512 {
                let mut block = [0; 4096];
                content(&mut block, seed, number * 4096);
                assert!(block[2048..].iter().all(|byte| *byte == 0x5a));
                assert!(seen.insert(block[..2048].to_vec()), "seed {seed}, block {number}");
            }
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        let times = [5, 1, 9].map(Duration::from_secs);
        assert_eq!(median(&times), Duration::from_secs(5));
    }
}
