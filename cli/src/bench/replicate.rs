//! How fast writes become recoverable at the target.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_link::bench_bare::bare_stream;
use farshore_link::quic::Transport;
use serde_json::Value;

use super::fio::{Fio, FioTarget, sparse};
use super::mirror::Mirror;
use super::peers::private_memory;
use super::{Bench, Row};
use crate::sites::{Sites, SitesConfig};

pub(super) const GROUP: &str = "bench";
/// What the peer writes where it is too slow for the whole amount.
const PEER_BYTES: u64 = 256 << 20;
/// Longest wait for the last write to become recoverable.
pub(super) const WAIT_SECONDS: u64 = 600;

struct Replicated {
    bytes_per_second: f64,
    lag: f64,
    status: Value,
}

pub(super) fn start(bench: &Bench<'_>) -> Result<Sites> {
    let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &bench.dir);
    config.ring = bench.args.ring;
    config.direct_link = true;
    Sites::start(config)
}

pub(super) fn status(sites: &Sites) -> Result<Value> {
    Ok(sites.agent().get(&format!("/v1/status?group={GROUP}"))?[0].clone())
}

fn replicated(bench: &Bench<'_>, rw: &str, block: u64, depth: u32, compressible: u32) -> Result<Replicated> {
    let image = sparse(bench.dir.join("source.img"), bench.args.size)?;
    let mut sites = start(bench)?;
    let socket = sites.protect(&image, GROUP, "disk")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let fio = Fio {
        target: FioTarget::Nbd(&socket),
        rw,
        block,
        depth,
        size: bench.args.size,
        amount: None,
        seconds: None,
        compressible,
        rate: None,
        jobs: 1,
    };
    let written = fio.run()?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let lag = written.end.elapsed();
    let status = status(&sites)?;
    sites.stop_agent()?;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = written.bytes as f64 / (written.elapsed + lag).as_secs_f64();
    Ok(Replicated { bytes_per_second: rate, lag: lag.as_secs_f64(), status })
}

pub(super) fn mega(bytes_per_second: f64) -> f64 {
    bytes_per_second / 1e6
}

fn mirror(
    bench: &Bench<'_>,
    name: &str,
    granularity: Option<u64>,
    rw: &str,
    block: u64,
    depth: u32,
    bytes: u64,
) -> Result<f64> {
    let mut peer = Mirror::start(&bench.dir.join(name), bench.args.size, granularity)?;
    peer.replicated_rate(rw, block, depth, bytes).with_context(|| format!("mirror by process {}", peer.pid()))
}

pub(super) fn random(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let bytes = bench.args.size.min(PEER_BYTES);
    let fine = mirror(bench, "fine", Some(4096), "randwrite", 4096, 32, bytes)?;
    let coarse = mirror(bench, "coarse", None, "randwrite", 4096, 32, bytes)?;
    let ours = replicated(bench, "randwrite", 4096, 32, 50)?;
    let rate = mega(ours.bytes_per_second);
    Ok(vec![
        Row::new("4 KiB random, replicated", rate, "MB/s").against("QEMU mirror", mega(coarse)).at_least(20.0),
        Row::new("4 KiB random, replicated", rate, "MB/s")
            .against("QEMU mirror, granularity 4096", mega(fine))
            .at_least(3.0),
        Row::new("last write recoverable after", ours.lag, "s").at_most(1.0),
        wire_row(&ours.status),
    ])
}

pub(super) fn sequential(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let peer = mirror(bench, "mirror", None, "write", 128 << 10, 8, bench.args.size)?;
    let ours = replicated(bench, "write", 128 << 10, 8, 50)?;
    let rate = mega(ours.bytes_per_second);
    Ok(vec![
        Row::new("128 KiB sequential, replicated", rate, "MB/s").against("QEMU mirror", mega(peer)).at_least(2.0),
        wire_row(&ours.status),
    ])
}

pub(super) fn noise(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let bare = bare_stream(bench.args.size, &Transport::default()).context("bare QUIC stream")?.bytes_per_second();
    let ours = replicated(bench, "write", 128 << 10, 8, 0)?;
    let rate = mega(ours.bytes_per_second);
    Ok(vec![
        Row::new("128 KiB incompressible, replicated", rate, "MB/s")
            .against("bare QUIC stream", mega(bare))
            .at_least(0.5),
        wire_row(&ours.status),
    ])
}

#[expect(clippy::cast_precision_loss, reason = "a ratio")]
fn wire_row(status: &Value) -> Row {
    let field = |key: &str| status[key].as_u64().unwrap_or(0) as f64;
    Row::new("bytes on the wire", field("wire_bytes") / 1e6, "MB")
        .against("bytes written", field("written_bytes") / 1e6)
}

/// RPO sampled from `status` while 20 MB/s of random 4 KiB writes run; and the agent's memory beside the ring.
pub(super) fn rpo(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let image = sparse(bench.dir.join("source.img"), bench.args.size)?;
    let mut sites = start(bench)?;
    let socket = sites.protect(&image, GROUP, "disk")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let (samples, memory) = sample_under_load(&sites, &socket, bench)?;
    sites.stop_agent()?;
    let at = |share: usize| samples[(samples.len() - 1) * share / 100];
    #[expect(clippy::cast_precision_loss, reason = "a size for people")]
    let memory = memory as f64 / f64::from(1 << 20);
    Ok(vec![
        Row::new("RPO at 20 MB/s of random 4 KiB writes, p50", at(50), "s").at_most(0.15),
        Row::new("RPO at 20 MB/s of random 4 KiB writes, p99", at(99), "s").at_most(0.5),
        Row::new("agent's memory beyond the ring", memory, "MiB").at_most(64.0),
    ])
}

fn sample_under_load(sites: &Sites, socket: &Path, bench: &Bench<'_>) -> Result<(Vec<f64>, u64)> {
    let seconds = bench.args.seconds;
    let (size, path) = (bench.args.size, socket.to_owned());
    let load = std::thread::spawn(move || {
        Fio {
            target: FioTarget::Nbd(&path),
            rw: "randwrite",
            block: 4096,
            depth: 32,
            size,
            amount: None,
            seconds: Some(seconds),
            compressible: 50,
            rate: Some(20_000_000),
            jobs: 1,
        }
        .run()
    });
    let begin = Instant::now();
    let mut samples = Vec::new();
    let mut memory = 0;
    let pids = [sites.supervisor_pid(), sites.agent_pid()].map(|pid| pid.context("the agent runs"));
    let [supervisor, worker] = pids;
    let (supervisor, worker) = (supervisor?, worker?);
    while !load.is_finished() {
        crate::sites::pause(Duration::from_millis(17));
        // The first second is fio's start.
        if begin.elapsed() > Duration::from_secs(1) {
            samples.push(status(sites)?["rpo_s"].as_f64().context("no recovery point yet")?);
            memory = memory.max(private_memory(supervisor)? + private_memory(worker)?);
        }
    }
    load.join().map_err(|_| anyhow::anyhow!("the load's thread panicked"))??;
    ensure!(samples.len() >= 20, "too few samples: let it run longer");
    samples.sort_by(f64::total_cmp);
    Ok((samples, memory))
}
