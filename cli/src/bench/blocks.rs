//! What a guest sees on a block device of the kernel: ublk against rublk and the bare disk, protection against DRBD and against
//! ublk without protection. For a machine that has ublk (`cargo xtask vm`), as root; all content of the disk is lost.
//!
//! Contestants take turns, so that a change of the machine's speed hits all of them. Where rounds are short the best of each
//! counts: on a machine with other work that is what it can do.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_ublk::{Control, DataPath, Server, ServerConfig, ServerHandle, Stop};
use farshore_uring::{BackingOptions, Direct, FileDevice, Geometry, NullDevice};
use serde_json::json;

use super::fio::{Fio, FioResult, FioTarget};
use super::replicate::{GROUP, WAIT_SECONDS, mega, status};
use super::{Bench, Row};
use crate::sites::run::{call, until};
use crate::sites::{Sites, SitesConfig};

/// Kind of load, block, depth, and whether bytes are what counts.
type Case = (&'static str, &'static str, u64, u32, bool);

const CASES: [Case; 4] = [
    ("4 KiB random write, depth 32", "randwrite", 4096, 32, false),
    ("4 KiB random write, depth 1", "randwrite", 4096, 1, false),
    ("128 KiB write, depth 8", "write", 128 << 10, 8, true),
    ("4 KiB random read, depth 32", "randread", 4096, 32, false),
];

/// Bytes that a run works on.
const AREA_BYTES: u64 = 512 << 20;
/// Bytes of each piece of the disk: the area, and DRBD's metadata.
const PIECE_BYTES: u64 = AREA_BYTES + (64 << 20);

fn load(device: &Path, case: &Case, seconds: u64) -> Result<FioResult> {
    paced(device, case, seconds, None)
}

/// At most `rate` bytes per second.
fn paced(device: &Path, case: &Case, seconds: u64, rate: Option<u64>) -> Result<FioResult> {
    let (_, rw, block, depth, _) = *case;
    Fio {
        target: FioTarget::Device(device),
        rw,
        block,
        depth,
        size: AREA_BYTES,
        amount: None,
        seconds: Some(seconds),
        compressible: 50,
        rate,
        jobs: 1,
    }
    .run()
}

/// What counts of a run, and its unit.
fn figure(case: &Case, result: &FioResult) -> (f64, &'static str) {
    if case.4 { (mega(result.bytes_per_second), "MB/s") } else { (result.iops, "IOPS") }
}

fn disk<'a>(bench: &'a Bench<'_>) -> Result<&'a Path> {
    bench.args.disk.as_deref().context("--disk names a disk whose content may be lost")
}

fn shell(command: &str) -> Result<String> {
    call("sh", ["-c", command])
}

/// A ublk device in this process. Nothing is kept of what is written, so data may go either way (`docs/decisions/0006`).
fn serve(disk: &Path, data_path: DataPath) -> Result<ServerHandle> {
    let options = BackingOptions { direct: Direct::On, read_only: false };
    let device = FileDevice::open(disk, options).context("open the disk")?;
    let config = ServerConfig { data_path: Some(data_path), ..ServerConfig::default() };
    Server::start(config, Arc::new(device)).context("serve the disk")
}

fn serve_nothing(queues: u16) -> Result<ServerHandle> {
    let geometry = Geometry {
        size: 2 << 30,
        logical_block: 512,
        optimal_block: 4096,
        max_request: 1 << 20,
        max_discard: 1 << 30,
        read_only: false,
        discard: true,
    };
    let config = ServerConfig { queues, ..ServerConfig::default() };
    Server::start(config, Arc::new(NullDevice::new(geometry))).context("serve nothing")
}

/// rublk's loop over the disk, removed when dropped.
struct Rublk(PathBuf);

impl Rublk {
    const NUMBER: &'static str = "77";

    fn start(program: &Path, disk: &Path) -> Result<Self> {
        let program_text = program.display();
        // It leaves a daemon behind, which would hold a pipe open.
        shell(&format!(
            "{program_text} add loop --file {} --number {} --queue 1 --depth 128 </dev/null >/dev/null 2>&1",
            disk.display(),
            Self::NUMBER
        ))?;
        let rublk = Self(program.to_owned());
        until("rublk's device is there", || Ok(rublk.device().exists().then_some(())))?;
        Ok(rublk)
    }

    fn device(&self) -> PathBuf {
        Path::new("/dev").join(format!("ublkb{}", Self::NUMBER))
    }
}

impl Drop for Rublk {
    fn drop(&mut self) {
        // Its server takes a moment to let go of the disk.
        let gone = || Ok(Control::open()?.list()?.is_empty().then_some(()));
        let _ = shell(&format!("{} del -n {} >/dev/null 2>&1", self.0.display(), Self::NUMBER));
        let _ = until("rublk lets go", gone);
    }
}

/// `farshore bench ublk`: passthrough against rublk and the bare disk; two queues against one.
pub(super) fn ublk(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let disk = disk(bench)?;
    let rublk = bench.args.rublk.as_deref().context("--rublk names the program rublk")?;
    let seconds = bench.args.seconds.div_ceil(bench.args.rounds).max(1);
    let mut best = [[0f64; 4]; CASES.len()];
    for _ in 0..bench.args.rounds {
        for (case, best) in CASES.iter().zip(&mut best) {
            let mut note = |at: usize, device: &Path| -> Result<()> {
                best[at] = best[at].max(figure(case, &load(device, case, seconds)?).0);
                Ok(())
            };
            for (at, path) in [(0, DataPath::BufferSwap), (1, DataPath::UserCopy)] {
                let ours = serve(disk, path)?;
                note(at, &ours.block_path())?;
                ours.stop(Stop::IfUnused).context("stop our device")?;
            }
            let peer = Rublk::start(rublk, disk)?;
            note(2, &peer.device())?;
            drop(peer);
            note(3, disk)?;
        }
    }
    let mut rows = Vec::new();
    for (case, [ours, copied, peer, raw]) in CASES.iter().zip(best) {
        let unit = if case.4 { "MB/s" } else { "IOPS" };
        rows.push(
            Row::new(format!("ublk by buffer swap, {}", case.0), ours, unit).against("rublk loop", peer).at_least(1.0),
        );
        rows.push(Row::new(format!("ublk by user copy, {}", case.0), copied, unit).against("rublk loop", peer));
        rows.push(Row::new(format!("ublk by buffer swap, {}", case.0), ours, unit).against("bare disk", raw));
    }
    let mut queues = [0f64; 2];
    for _ in 0..bench.args.rounds {
        for (at, count) in [(0, 1), (1, 2)] {
            let ours = serve_nothing(count)?;
            queues[at] = queues[at].max(load(&ours.block_path(), &CASES[0], seconds)?.iops);
            ours.stop(Stop::IfUnused).context("stop our device")?;
        }
    }
    rows.push(Row::new("nothing below, two queues", queues[1], "IOPS").against("one queue", queues[0]));
    Ok(rows)
}

/// Pieces of the disk as devices of their own. Gone when dropped.
struct Pieces(usize);

impl Pieces {
    fn make(disk: &Path, count: usize) -> Result<Self> {
        let pieces = Self(count);
        for at in 0..count {
            let sectors = PIECE_BYTES / 512;
            let table = format!("0 {sectors} linear {} {}", disk.display(), at as u64 * sectors);
            shell(&format!("DM_DISABLE_UDEV=1 dmsetup create farshore-bench-{at} --table '{table}'"))?;
        }
        Ok(pieces)
    }

    fn path(at: usize) -> PathBuf {
        PathBuf::from(format!("/dev/mapper/farshore-bench-{at}"))
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        for at in 0..self.0 {
            let _ = shell(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry farshore-bench-{at}"));
        }
    }
}

/// DRBD 8.4, protocol A, both ends in this kernel: two resources whose connections meet on loopback.
struct Drbd;

impl Drbd {
    const SETUP: &'static str = "/usr/lib/drbd/drbdsetup-84";

    fn start(first: &Path, second: &Path) -> Result<Self> {
        shell("modprobe drbd usermode_helper=/bin/true minor_count=4")?;
        let drbd = Self;
        let setup = Self::SETUP;
        for (minor, disk) in [(0, first), (1, second)] {
            let (disk, own, other) = (disk.display(), 7700 + minor, 7701 - minor);
            shell(&format!(
                "yes yes | drbdmeta --force {minor} v08 {disk} internal create-md && \
                 {setup} new-resource r{minor} && {setup} new-minor r{minor} {minor} 0 && \
                 {setup} attach {minor} {disk} {disk} internal && \
                 {setup} connect r{minor} ipv4:127.0.0.1:{own} ipv4:127.0.0.1:{other} --protocol=A --sndbuf-size=10M"
            ))?;
        }
        let proc_says = |what: &'static str| {
            move || Ok(std::fs::read_to_string("/proc/drbd")?.matches(what).count().eq(&2).then_some(()))
        };
        until("DRBD is connected", proc_says("cs:Connected"))?;
        // Both are taken as equal: nothing is copied before the run.
        shell(&format!("{setup} new-current-uuid --clear-bitmap 0"))?;
        until("DRBD's ends are equal", proc_says("ds:UpToDate/UpToDate"))?;
        shell(&format!("{setup} primary 0"))?;
        Ok(drbd)
    }
}

impl Drop for Drbd {
    fn drop(&mut self) {
        let setup = Self::SETUP;
        let _ = shell(&format!("{setup} down r0; {setup} down r1; modprobe -r drbd"));
    }
}

/// Both sites with a protected piece of the disk.
struct Protected {
    sites: Sites,
    device: PathBuf,
}

impl Protected {
    fn start(bench: &Bench<'_>, source: &Path) -> Result<Self> {
        let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &bench.dir);
        config.ring = bench.args.ring;
        config.direct_link = true;
        let sites = Sites::start(config)?;
        let body = json!({ "source": source, "group": GROUP, "name": "disk", "frontend": "ublk" });
        let volume = sites.agent().post("/v1/protect", &body)?;
        let device = PathBuf::from(volume["device"].as_str().context("a device")?);
        sites.wait(GROUP, WAIT_SECONDS)?;
        Ok(Self { sites, device })
    }

    fn closed(&self) -> Result<u64> {
        status(&self.sites)?["ring_closed_count"].as_u64().context("a count")
    }

    fn finish(mut self) -> Result<()> {
        self.sites.agent().post("/v1/unprotect", &json!({ "volume": "disk" }))?;
        self.sites.stop_agent()?;
        self.sites.stop_target()
    }
}

/// `farshore bench drbd`: protected and shipping against DRBD.
pub(super) fn drbd(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let disk = disk(bench)?;
    let _pieces = Pieces::make(disk, 3)?;
    let ours = Protected::start(bench, &Pieces::path(0))?;
    let _peer = Drbd::start(&Pieces::path(1), &Pieces::path(2))?;
    let mut rows = Vec::new();
    for case in &CASES[..3] {
        let peer = load(Path::new("/dev/drbd0"), case, bench.args.seconds)?;
        let (value, unit) = figure(case, &peer);
        let run = protected_run(bench, &ours, case, None)?;
        let name = case.0;
        rows.push(
            Row::new(format!("protected, {name}"), run.figure, unit)
                .against("DRBD 8.4, protocol A", value)
                .at_least(1.0),
        );
        rows.extend(run.rows(name));
        if run.closed > 0.0 {
            // The guest outran the link. Does it hold at the peer's pace?
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
            let rate = (peer.bytes_per_second * 1.05) as u64;
            let run = protected_run(bench, &ours, case, Some(rate))?;
            let name = format!("{name}, at 1.05 × DRBD's pace");
            rows.push(Row::new(format!("protected, {name}"), run.figure, unit).against("DRBD 8.4, protocol A", value));
            rows.extend(run.rows(&name));
        }
    }
    ours.finish()?;
    Ok(rows)
}

/// A run over the protected device.
struct ProtectedRun {
    figure: f64,
    /// Times that the ring closed.
    closed: f64,
    replicated: f64,
    lag: Duration,
}

impl ProtectedRun {
    fn rows(&self, name: &str) -> [Row; 3] {
        [
            Row::new(format!("times the ring closed, {name}"), self.closed, "").at_most(0.0),
            Row::new(format!("replicated, {name}"), self.replicated, "MB/s"),
            Row::new(format!("lag at the end, {name}"), self.lag.as_secs_f64(), "s"),
        ]
    }
}

fn protected_run(bench: &Bench<'_>, ours: &Protected, case: &Case, rate: Option<u64>) -> Result<ProtectedRun> {
    let closed = ours.closed()?;
    let run = paced(&ours.device, case, bench.args.seconds, rate)?;
    let closed = ours.closed()? - closed;
    ours.sites.wait(GROUP, WAIT_SECONDS)?;
    let lag = run.end.elapsed();
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    let (bytes, closed) = (run.bytes as f64, closed as f64);
    let replicated = mega(bytes / (run.elapsed + lag).as_secs_f64());
    Ok(ProtectedRun { figure: figure(case, &run).0, closed, replicated, lag })
}

/// `farshore bench latency`: what protection adds to a guest that writes one block at a time.
pub(super) fn latency(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let disk = disk(bench)?;
    let _pieces = Pieces::make(disk, 2)?;
    let ours = Protected::start(bench, &Pieces::path(0))?;
    let seconds = bench.args.seconds.div_ceil(bench.args.rounds).max(1);
    let mut runs: [Vec<FioResult>; 3] = Default::default();
    for _ in 0..bench.args.rounds {
        runs[0].push(load(&ours.device, &CASES[1], seconds)?);
        for (at, path) in [(1, DataPath::UserCopy), (2, DataPath::BufferSwap)] {
            let plain = serve(&Pieces::path(1), path)?;
            runs[at].push(load(&plain.block_path(), &CASES[1], seconds)?);
            plain.stop(Stop::IfUnused).context("stop our device")?;
        }
    }
    ensure!(ours.closed()? == 0, "the ring closed: this was no steady state");
    ours.finish()?;
    let micro = |at: usize, of: fn(&FioResult) -> Duration| {
        let mut all: Vec<Duration> = runs[at].iter().map(of).collect();
        all.sort();
        all[all.len() / 2].as_secs_f64() * 1e6
    };
    let mut rows = Vec::new();
    for (name, of) in [("p50", (|run| run.p50) as fn(&FioResult) -> Duration), ("p99", |run| run.p99)] {
        for (at, peer) in [(1, "ublk without protection"), (2, "the same by buffer swap")] {
            let row = Row::new(format!("latency at depth 1, protected, {name}"), micro(0, of), "µs");
            let row = row.against(peer, micro(at, of));
            rows.push(if name == "p50" && at == 1 { row.at_most(1.1) } else { row });
        }
    }
    Ok(rows)
}
