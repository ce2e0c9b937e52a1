//! What the activity log costs a guest that writes everywhere, and that it costs one nothing who stays where he was.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::fio::{Fio, FioResult, sparse};
use super::replicate::{GROUP, WAIT_SECONDS, status};
use super::{Bench, Row};
use crate::sites::{Sites, SitesConfig};

/// Extents of 4 MiB that may be active: all of the volume's, and the default.
const ALL: u64 = 16_384;
const DEFAULT: u64 = 1024;
/// Its extents, and the places that the log keeps free, are fewer than [`ALL`]: where all may be active, none ever leaves.
const VOLUME_BYTES: u64 = 48 << 30;
/// Well within what either can do, so that what is seen is what a write waits.
const RATE: u64 = 4_000_000;

/// Both sites, over an image of their own.
struct Contestant {
    sites: Sites,
    socket: PathBuf,
    runs: Vec<FioResult>,
}

impl Contestant {
    fn start(bench: &Bench<'_>, extents: u64) -> Result<Self> {
        let dir = bench.dir.join(extents.to_string());
        std::fs::create_dir(&dir).context("make a folder")?;
        let image = sparse(dir.join("source.img"), VOLUME_BYTES)?;
        let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &dir);
        config.ring = bench.args.ring;
        config.direct_link = true;
        config.agent_toml = format!("al_extents = {extents}\n");
        let sites = Sites::start(config)?;
        let socket = sites.protect(&image, GROUP, "disk")?;
        sites.wait(GROUP, WAIT_SECONDS)?;
        Ok(Self { sites, socket, runs: Vec::new() })
    }

    fn load(&self, size: u64, seconds: u64, rate: Option<u64>) -> Result<FioResult> {
        Fio::scattered(&self.socket, size, seconds, rate).run()
    }

    fn log(&self, what: &str) -> Result<u64> {
        status(&self.sites)?["activity_log"][what].as_u64().context("a number")
    }
}

/// `farshore bench activity`.
pub(super) fn activity(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let seconds = bench.args.seconds.div_ceil(bench.args.rounds).max(1);
    let mut all = Contestant::start(bench, ALL)?;
    let mut default = Contestant::start(bench, DEFAULT)?;
    // Until everything is active where it can be.
    while all.log("active_extents")? < VOLUME_BYTES / (4 << 20) * 99 / 100 {
        all.load(VOLUME_BYTES, 10, None)?;
        all.sites.wait(GROUP, WAIT_SECONDS)?;
    }
    default.load(VOLUME_BYTES, 10, Some(RATE))?;
    let mut rows = Vec::new();
    let (before, asked) = (default.log("passed")?, default.log("activations")?);
    let mut writes = 0;
    for _ in 0..bench.args.rounds {
        for contestant in [&mut all, &mut default] {
            let run = contestant.load(VOLUME_BYTES, seconds, Some(RATE))?;
            contestant.runs.push(run);
        }
        writes += default.runs.last().map_or(0, |run| run.bytes / 4096);
    }
    let (passed, asked) = (default.log("passed")? - before, default.log("activations")? - asked);
    let micro = |contestant: &Contestant, of: fn(&FioResult) -> Duration| {
        let mut all: Vec<Duration> = contestant.runs.iter().map(of).collect();
        all.sort();
        all[all.len() / 2].as_secs_f64() * 1e6
    };
    type Of = fn(&FioResult) -> Duration;
    for (name, of, bound) in [("p50", (|run| run.p50) as Of, None), ("p99", |run| run.p99, Some(1.5))] {
        let what = format!("4 KiB random writes over 48 GiB, 1,024 extents active, {name}");
        let row = Row::new(what, micro(&default, of), "µs").against("all extents active", micro(&all, of));
        rows.push(match bound {
            Some(bound) => row.at_most(bound),
            None => row,
        });
    }
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    let share = |count: u64| count as f64 / writes.max(1) as f64;
    rows.push(Row::new("writes that waited for the log", share(asked), "of 1"));
    rows.push(Row::new("writes that went past it", share(passed), "of 1"));
    // Where they have been.
    let area = DEFAULT / 2 * (4 << 20);
    default.load(area, seconds, None)?;
    let asked = default.log("activations")?;
    let inside = default.load(area, seconds, None)?;
    #[expect(clippy::cast_precision_loss, reason = "a count for people")]
    let extra = (default.log("activations")? - asked) as f64;
    rows.push(Row::new(format!("activations in {} writes within 2 GiB", inside.bytes / 4096), extra, "").at_most(0.0));
    for mut contestant in [all, default] {
        contestant.sites.stop_agent()?;
        contestant.sites.stop_target()?;
    }
    Ok(rows)
}
