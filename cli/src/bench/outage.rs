//! A link that is away for longer than the ring lasts: what goes to the disk log, and how fast it comes back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::fio::{Fio, FioTarget, sparse};
use super::replicate::{GROUP, WAIT_SECONDS, status};
use super::{Bench, Row};
use crate::sites::{Sites, SitesConfig, pause};

const VOLUME_BYTES: u64 = 8 << 30;
/// What the guest writes, bytes per second, all the while.
const RATE: u64 = 50_000_000;
const LOG_BYTES: u64 = 10 << 30;
/// Longest time for catching up.
const LIMIT: Duration = Duration::from_secs(600);

/// `farshore bench outage`.
pub(super) fn outage(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let image = sparse(bench.dir.join("source.img"), VOLUME_BYTES)?;
    let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &bench.dir);
    config.ring = bench.args.ring;
    config.direct_link = true;
    config.agent_toml = format!("log = {:?}\nlog_size = {LOG_BYTES}\n", bench.dir.join("disk.log"));
    let mut sites = Sites::start(config)?;
    let socket = sites.protect(&image, GROUP, "disk")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let load = |seconds| {
        Fio {
            target: FioTarget::Nbd(&socket),
            rw: "randwrite",
            block: 64 << 10,
            depth: 8,
            size: VOLUME_BYTES,
            amount: None,
            seconds: Some(seconds),
            compressible: 50,
            rate: Some(RATE),
            jobs: 1,
        }
        .run()
    };
    sites.kill_target();
    let away = load(bench.args.seconds)?;
    let used = number_of(&sites, "log_used_bytes")?;
    ensure!(used > 0, "the ring alone was enough: `--seconds` is too short");
    let cuts = number_of(&sites, "log_batches")?;
    sites.start_target()?;
    let shipped = number_of(&sites, "shipped_bytes")?;
    let (caught_up, during) = std::thread::scope(|scope| {
        // Longer than it should take.
        let writer = scope.spawn(|| load(bench.args.seconds));
        let begin = clock();
        let caught_up = loop {
            if status(&sites)?["tier"] == "ring" {
                let bytes = number_of(&sites, "shipped_bytes")? - shipped;
                #[expect(clippy::cast_precision_loss, reason = "bytes for people")]
                let bytes = bytes as f64;
                break bytes / clock().saturating_duration_since(begin).as_secs_f64();
            }
            ensure!(clock().saturating_duration_since(begin) < LIMIT, "the log is not empty after {LIMIT:?}");
            pause(Duration::from_millis(50));
        };
        let during = writer.join().map_err(|_| anyhow::anyhow!("the writer died"))??;
        Ok::<_, anyhow::Error>((caught_up, during))
    })?;
    let closed = number_of(&sites, "ring_closed_count")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let points = sites.target().get(&format!("/v1/points?group={GROUP}"))?;
    let points = points.as_array().map_or(0, Vec::len);
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    let rows = vec![
        Row::new("batches in the log at the end of the outage", cuts as f64, ""),
        Row::new("bytes of the log then", used as f64 / 1e6, "MB"),
        Row::new("times that the ring closed (points lost, resync)", closed as f64, "").at_most(0.0),
        Row::new("points at the target in the end", points as f64, ""),
        Row::new("catching up", caught_up / 1e6, "MB/s")
            .against("what the guest writes", RATE as f64 / 1e6)
            .at_least(3.0),
        Row::new("guest's p99 while the target is away", away.p99.as_secs_f64() * 1e6, "µs")
            .against("while catching up", during.p99.as_secs_f64() * 1e6),
    ];
    Ok(rows)
}

fn number_of(sites: &Sites, what: &str) -> Result<u64> {
    status(sites)?[what].as_u64().with_context(|| format!("{what} is a number"))
}

fn clock() -> Instant {
    Instant::now()
}
