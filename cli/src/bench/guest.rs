//! What a guest sees: passthrough against `nbdkit file`, protected and shipping against passthrough.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use farshore_blkfilter::FilterVolume;
use farshore_nbd::{Listen, Server, ServerConfig};
use farshore_uring::{BackingOptions, Direct, open_backing};

use super::fio::{Fio, FioResult, FioTarget, written};
use super::peers::Peer;
use super::{Bench, BenchArgs, Row};
use crate::sites::{Sites, SitesConfig};

/// `bench serve FILE SOCKET`: the filter without protection, until killed.
pub(super) fn serve(args: &BenchArgs) -> Result<()> {
    let file = args.file.as_deref().context("bench serve FILE SOCKET")?;
    let socket = args.socket.clone().context("bench serve FILE SOCKET")?;
    let direct = if args.cached { Direct::Off } else { Direct::On };
    let backing =
        open_backing(file, BackingOptions { direct, ..BackingOptions::default() }).context("open the image")?;
    let device = Arc::new(FilterVolume::unprotected_backing(backing));
    let _server = Server::start(ServerConfig::new("", Listen::Unix { path: socket, mode: 0o600 }), device)
        .context("serve the image")?;
    loop {
        std::thread::park();
    }
}

fn random_writes(socket: &std::path::Path, size: u64, seconds: u64) -> Result<FioResult> {
    Fio {
        target: FioTarget::Nbd(socket),
        rw: "randwrite",
        block: 4096,
        depth: 32,
        size,
        amount: None,
        seconds: Some(seconds),
        compressible: 50,
        rate: None,
        jobs: 1,
    }
    .run()
}

pub(super) fn guest(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let args = bench.args;
    let image = written(bench.dir.join("guest.img"), args.size)?;
    // Best of rounds that take turns: the machine is shared, and a slow minute must not decide.
    let turns = 2;
    let seconds = args.seconds.div_ceil(turns).max(1);
    let (mut kit, mut plain) = (0f64, 0f64);
    for _ in 0..turns {
        let peer = Peer::nbdkit(&image, bench.dir.join("nbdkit.sock"), args.cached)?;
        kit = kit.max(random_writes(&peer.socket, args.size, seconds)?.iops);
        drop(peer);
        let ours = Peer::passthrough(&image, bench.dir.join("plain.sock"), args.cached)?;
        plain = plain.max(random_writes(&ours.socket, args.size, seconds)?.iops);
        drop(ours);
        // Both leave their socket's name behind when they are killed.
        for name in ["nbdkit.sock", "plain.sock"] {
            let _ = std::fs::remove_file(bench.dir.join(name));
        }
    }
    let ours = Peer::passthrough(&image, bench.dir.join("plain.sock"), args.cached)?;
    let passthrough = random_writes(&ours.socket, args.size, args.seconds)?;
    drop(ours);
    let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &bench.dir);
    config.ring = args.ring;
    config.direct_link = true;
    config.agent_toml = format!("direct = {}\n", !args.cached);
    let mut sites = Sites::start(config)?;
    let socket = sites.protect(&image, "bench", "disk")?;
    sites.wait("bench", 600)?;
    let protected = random_writes(&socket, args.size, args.seconds)?;
    let status = sites.agent().get("/v1/status?group=bench")?[0].clone();
    let begin = protected.end;
    sites.wait("bench", 600)?;
    let lag = begin.elapsed().as_secs_f64();
    sites.stop_agent()?;
    ensure!(
        protected.bytes >= 8 * args.ring || args.seconds < 60,
        "the run wrote less than 8 rings: it hides in the ring"
    );
    let direct = if args.cached { "cached" } else { "direct" };
    #[expect(clippy::cast_precision_loss, reason = "a count")]
    let closed = status["ring_closed_count"].as_u64().unwrap_or(0) as f64;
    Ok(vec![
        Row::new(format!("4 KiB random write IOPS, passthrough, {direct}"), plain, "IOPS")
            .against("nbdkit file", kit)
            .at_least(0.9),
        Row::new("4 KiB random write IOPS, protected", protected.iops, "IOPS")
            .against("passthrough", passthrough.iops)
            .at_least(0.7),
        Row::new("p99 latency, protected", protected.p99.as_secs_f64() * 1e6, "µs")
            .against("passthrough", passthrough.p99.as_secs_f64() * 1e6)
            .at_most(2.0),
        Row::new("p50 latency, protected", protected.p50.as_secs_f64() * 1e6, "µs")
            .against("passthrough", passthrough.p50.as_secs_f64() * 1e6),
        Row::new("times the ring closed in that run", closed, "").at_most(0.0),
        Row::new("lag at its end", lag, "s").at_most(1.0),
    ])
}
