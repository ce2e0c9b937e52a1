//! Compares this crate with rublk over the same raw disk, and both with nothing below, by fio. Inside a machine with ublk, as root:
//!
//! ```text
//! compare DISK [--rublk PROGRAM] [--rounds N] [--seconds N] [--only TEXT]
//! ```
//!
//! All content of DISK is lost. The contestants take turns in every round, so that a change of the machine's speed hits all of
//! them. The table shows the best and the median of the rounds: on a machine with other work the best is what the contestant
//! can do, and many short rounds find it.

#![allow(clippy::print_stdout, reason = "a command-line program")]
#![allow(clippy::disallowed_methods, reason = "it waits for other programs")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use farshore_ublk::{Control, DataPath, Server, ServerConfig, ServerHandle, Stop};
use farshore_uring::{BackingOptions, Direct, FileDevice, Geometry, NullDevice};

type Failure = Box<dyn std::error::Error>;

/// Name, fio's options, and whether throughput is what counts.
const CASES: [(&str, &str, bool); 4] = [
    ("4k randwrite depth 32", "--rw=randwrite --bs=4k --iodepth=32", false),
    ("4k randwrite depth 1", "--rw=randwrite --bs=4k --iodepth=1", false),
    ("128k write depth 8", "--rw=write --bs=128k --iodepth=8", true),
    ("4k randread depth 32", "--rw=randread --bs=4k --iodepth=32", false),
];

#[derive(Clone, Debug)]
enum Contestant {
    Raw,
    Ours { path: DataPath, queues: u16, null: bool },
    Rublk { queues: u16, null: bool },
}

impl Contestant {
    fn name(&self) -> String {
        let over = |null: &bool| if *null { "null" } else { "disk" };
        match self {
            Self::Raw => "raw disk".to_owned(),
            Self::Ours { path: DataPath::UserCopy, queues, null } => format!("{} user copy {queues}q", over(null)),
            Self::Ours { path: DataPath::BufferSwap, queues, null } => format!("{} buffer swap {queues}q", over(null)),
            Self::Rublk { queues, null } => format!("{} rublk {queues}q", over(null)),
        }
    }
}

/// One figure of one run.
#[derive(Clone, Copy, Debug)]
struct Figure {
    iops: f64,
    megabytes: f64,
    p50_us: f64,
    p99_us: f64,
    /// System calls of the serving threads per request; `None`: not known.
    calls: Option<f64>,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let disk =
        PathBuf::from(arguments.next().ok_or("usage: compare DISK [--rublk PROGRAM] [--rounds N] [--seconds N]")?);
    let (mut rublk, mut rounds, mut seconds, mut only) = (None, 3, 5, String::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--rublk" => rublk = Some(PathBuf::from(value()?)),
            "--rounds" => rounds = value()?.parse()?,
            "--seconds" => seconds = value()?.parse()?,
            "--only" => only = value()?,
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    let mut contestants = vec![Contestant::Raw];
    for (null, queues) in [(false, 1), (true, 1), (true, 2)] {
        contestants.push(Contestant::Ours { path: DataPath::UserCopy, queues, null });
        contestants.push(Contestant::Ours { path: DataPath::BufferSwap, queues, null });
        if rublk.is_some() {
            contestants.push(Contestant::Rublk { queues, null });
        }
    }
    contestants.retain(|contestant| contestant.name().contains(&only));
    let mut figures: BTreeMap<(usize, usize), Vec<Figure>> = BTreeMap::new();
    for round in 0..rounds {
        for (at, contestant) in contestants.iter().enumerate() {
            for (case, figure) in run(contestant, &disk, rublk.as_deref(), seconds)? {
                figures.entry((case, at)).or_default().push(figure);
            }
        }
        println!("round {} of {rounds} done", round + 1);
    }
    print_table(&contestants, &figures);
    Ok(())
}

/// All cases over one contestant.
fn run(who: &Contestant, disk: &Path, rublk: Option<&Path>, seconds: u32) -> Result<Vec<(usize, Figure)>, Failure> {
    let mut server: Option<ServerHandle> = None;
    let device = match who {
        Contestant::Raw => disk.to_owned(),
        Contestant::Ours { path, queues, null } => {
            let config = ServerConfig { queues: *queues, data_path: Some(*path), ..ServerConfig::default() };
            let started = if *null {
                Server::start(config, Arc::new(NullDevice::new(null_geometry())))?
            } else {
                let options = BackingOptions { direct: Direct::On, read_only: false };
                Server::start(config, Arc::new(FileDevice::open(disk, options)?))?
            };
            let device = started.block_path();
            server = Some(started);
            device
        }
        Contestant::Rublk { queues, null } => start_rublk(rublk.ok_or("no rublk")?, disk, *queues, *null)?,
    };
    let mut all = Vec::new();
    for (case, (_, options, _)) in CASES.iter().enumerate() {
        let before = server.as_ref().map(ServerHandle::stats);
        let mut figure = fio(&device, options, seconds)?;
        if let (Some(server), Some(before)) = (&server, before) {
            let now = server.stats();
            let requests = (now.reads + now.writes + now.flushes) - (before.reads + before.writes + before.flushes);
            let calls = (now.turns + now.copy_calls) - (before.turns + before.copy_calls);
            figure.calls = Some(count(calls) / count(requests).max(1.0));
        }
        all.push((case, figure));
    }
    match (server, who) {
        (Some(server), _) => server.stop(Stop::IfUnused)?,
        (None, Contestant::Rublk { .. }) => {
            let id = device.to_string_lossy().trim_start_matches("/dev/ublkb").to_owned();
            Command::new(rublk.ok_or("no rublk")?).args(["del", "-n", &id]).stdout(Stdio::null()).status()?;
            // Its server takes a moment to let go of the disk.
            while !Control::open()?.list()?.is_empty() {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        (None, Contestant::Raw | Contestant::Ours { .. }) => {}
    }
    Ok(all)
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
fn count(n: u64) -> f64 {
    n as f64
}

fn null_geometry() -> Geometry {
    Geometry {
        size: 2 << 30,
        logical_block: 512,
        optimal_block: 4096,
        max_request: 1 << 20,
        max_discard: 1 << 30,
        read_only: false,
        discard: true,
    }
}

fn start_rublk(program: &Path, disk: &Path, queues: u16, null: bool) -> Result<PathBuf, Failure> {
    let mut command = Command::new(program);
    command.arg("add");
    if null {
        command.arg("null");
    } else {
        command.arg("loop").arg("--file").arg(disk);
    }
    command.args(["--number", "77", "--queue", &queues.to_string(), "--depth", "128"]);
    // It leaves a daemon behind, which would hold a pipe open.
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    let device = PathBuf::from("/dev/ublkb77");
    for _ in 0..500 {
        if device.exists() {
            return Ok(device);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("rublk made no device ({status})").into())
}

fn fio(device: &Path, options: &str, seconds: u32) -> Result<Figure, Failure> {
    let line = format!(
        "fio --name=x --filename={} --ioengine=io_uring --direct=1 --size=1g --randrepeat=1 --time_based \
         --runtime={seconds} --output-format=terse --terse-version=3 {options}",
        device.display()
    );
    let output = Command::new("sh").args(["-c", &line]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let fields: Vec<&str> = text.lines().find(|l| l.starts_with("3;")).ok_or("fio said nothing")?.split(';').collect();
    // Reads begin at field 5, writes at 46 (from 0): total, bandwidth in KiB/s, IOPS, ..., percentiles at 12 from there.
    let base = if options.contains("read") { 5 } else { 46 };
    let number =
        |at: usize| -> Result<f64, Failure> { Ok(fields.get(base + at).ok_or("a short line of fio")?.parse()?) };
    let percentile = |wanted: &str| -> f64 {
        let found = fields[base..base + 41].iter().find_map(|field| field.strip_prefix(wanted)?.parse().ok());
        found.unwrap_or(f64::NAN)
    };
    Ok(Figure {
        iops: number(2)?,
        megabytes: number(1)? * 1024.0 / 1e6,
        p50_us: percentile("50.000000%="),
        p99_us: percentile("99.000000%="),
        calls: None,
    })
}

fn print_table(contestants: &[Contestant], figures: &BTreeMap<(usize, usize), Vec<Figure>>) {
    for (case, (name, _, throughput)) in CASES.iter().enumerate() {
        println!("\n{name}");
        for (at, contestant) in contestants.iter().enumerate() {
            let Some(runs) = figures.get(&(case, at)) else { continue };
            let of = |f: fn(&Figure) -> f64| median(runs.iter().map(f).collect());
            let spread: Vec<String> =
                runs.iter().map(|r| format!("{:.0}", if *throughput { r.megabytes } else { r.iops })).collect();
            let main = if *throughput {
                format!("{:8.0} best {:8.0} median MB/s", best(runs, |f| f.megabytes), of(|f| f.megabytes))
            } else {
                format!("{:8.0} best {:8.0} median IOPS", best(runs, |f| f.iops), of(|f| f.iops))
            };
            let calls =
                runs.iter().rev().find_map(|r| r.calls).map_or(String::new(), |c| format!(" {c:.2} calls/request"));
            println!(
                "  {:<22} {main}  p50 {:6.0} us  p99 {:7.0} us {calls}  [{}]",
                contestant.name(),
                -best(runs, |f| -f.p50_us),
                -best(runs, |f| -f.p99_us),
                spread.join(" ")
            );
        }
    }
}

fn best(runs: &[Figure], of: fn(&Figure) -> f64) -> f64 {
    runs.iter().map(of).fold(f64::NEG_INFINITY, f64::max)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
