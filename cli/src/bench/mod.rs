//! `farshore bench`: the published figures, each with its peer in the same run, as ratios. What is measured and what must
//! be reached stands in SPEC.md.

mod activity;
mod blocks;
mod copiers;
mod crash;
mod fio;
mod guest;
mod ingest;
mod mirror;
mod outage;
mod peers;
mod replicate;
mod sync;
mod tee;
mod views;
mod wire;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use farshore_proto::text::parse_size;
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::{Output, table};

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Which figure; `list` names them, `all` runs them.
    #[arg(default_value = "list")]
    pub name: String,
    /// Work in this folder, on the disk to be measured; default: a temporary one.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// How long runs with a guest last.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Bytes that runs with a fixed amount write.
    #[arg(long, default_value = "2GiB", value_parser = parse_size)]
    pub size: u64,
    /// Bytes of the ring.
    #[arg(long, default_value = "256MiB", value_parser = parse_size)]
    pub ring: u64,
    /// For `sparse`: bytes of the volume.
    #[arg(long, default_value = "1TiB", value_parser = parse_size)]
    pub volume_size: u64,
    /// For `sparse`: bytes of it that are written.
    #[arg(long, default_value = "10GiB", value_parser = parse_size)]
    pub used: u64,
    /// For what needs a block device of its own: this disk. ALL of its content is lost.
    #[arg(long)]
    pub disk: Option<PathBuf>,
    /// The peer's program, for `ublk`.
    #[arg(long)]
    pub rublk: Option<PathBuf>,
    /// Rounds in which short runs take turns; their seconds are `--seconds` divided by it.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: u64,
    /// For `serve`: the file.
    #[arg(hide = true)]
    pub file: Option<PathBuf>,
    /// For `serve`: the socket.
    #[arg(hide = true)]
    pub socket: Option<PathBuf>,
    /// Open the volume's image through the page cache, as `nbdkit file` does.
    #[arg(long)]
    pub cached: bool,
}

/// One figure.
pub(crate) struct Row {
    /// What was measured.
    pub what: String,
    /// Ours.
    pub ours: f64,
    /// The peer's, with its name.
    pub peer: Option<(String, f64)>,
    /// Unit of both.
    pub unit: &'static str,
    /// What must be reached: `(at least, bound)` on the ratio, or on our value where there is no peer.
    pub must: Option<(bool, f64)>,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, ours: f64, unit: &'static str) -> Self {
        Self { what: what.into(), ours, peer: None, unit, must: None }
    }

    pub(crate) fn against(mut self, peer: impl Into<String>, value: f64) -> Self {
        self.peer = Some((peer.into(), value));
        self
    }

    pub(crate) fn at_least(mut self, bound: f64) -> Self {
        self.must = Some((true, bound));
        self
    }

    pub(crate) fn at_most(mut self, bound: f64) -> Self {
        self.must = Some((false, bound));
        self
    }

    fn ratio(&self) -> Option<f64> {
        self.peer.as_ref().filter(|(_, value)| *value > 0.0).map(|(_, value)| self.ours / value)
    }

    fn verdict(&self) -> &'static str {
        let value = self.ratio().unwrap_or(self.ours);
        match self.must {
            None => "reported",
            Some((true, bound)) if value >= bound => "reached",
            Some((false, bound)) if value <= bound => "reached",
            Some(_) => "MISSED",
        }
    }

    fn document(&self) -> Value {
        json!({
            "what": self.what,
            "ours": self.ours,
            "unit": self.unit,
            "peer": self.peer.as_ref().map(|(name, _)| name),
            "peer_value": self.peer.as_ref().map(|(_, value)| value),
            "ratio": self.ratio(),
            "bound": self.must.map(|(_, bound)| bound),
            "verdict": self.verdict(),
        })
    }

    fn cells(&self) -> Vec<String> {
        let bound = self.must.map_or_else(String::new, |(at_least, bound)| {
            let sign = if at_least { "≥" } else { "≤" };
            let unit = if self.peer.is_some() { " ×".to_owned() } else { format!(" {}", self.unit) };
            format!("{sign} {bound}{unit}")
        });
        vec![
            self.what.clone(),
            format!("{} {}", number(self.ours), self.unit),
            self.peer.as_ref().map_or_else(String::new, |(name, value)| format!("{name}: {}", number(*value))),
            self.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2} ×")),
            bound,
            self.verdict().to_owned(),
        ]
    }
}

fn number(value: f64) -> String {
    if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

/// Where a benchmark works and for how long.
pub(crate) struct Bench<'a> {
    pub args: &'a BenchArgs,
    pub dir: PathBuf,
}

type Figure = (&'static str, &'static str, fn(&Bench<'_>) -> Result<Vec<Row>>);

const FIGURES: &[Figure] = &[
    ("guest", "IOPS and latency: passthrough against nbdkit, protected against passthrough", guest::guest),
    ("random", "replicated rate of 4 KiB random writes against QEMU's mirror", replicate::random),
    ("sequential", "replicated rate of 128 KiB sequential writes against QEMU's mirror", replicate::sequential),
    ("noise", "replicated rate of incompressible data against a bare QUIC stream", replicate::noise),
    ("rpo", "age of the newest point at 20 MB/s of random writes; the agent's memory", replicate::rpo),
    ("wire", "bytes on the wire of a pgbench run against zstd -3 of its writes", wire::wire),
    ("ingest", "target alone against fio's sequential direct writes", ingest::ingest),
    ("ublk", "ublk against rublk and the bare disk; needs --disk, --rublk", blocks::ublk),
    ("drbd", "protected and shipping over ublk against DRBD; needs --disk", blocks::drbd),
    ("latency", "what protection adds to ublk at depth 1; needs --disk", blocks::latency),
    (
        "outage",
        "the target is away for longer than the ring lasts: the disk log, and how fast it is caught up",
        outage::outage,
    ),
    ("activity", "what the activity log costs writes to cold extents, and to active ones", activity::activity),
    (
        "sync",
        "initial sync and resync: changed data against nbdcopy over TLS, unchanged against rsync over ssh",
        sync::sync,
    ),
    (
        "sparse",
        "initial sync of a volume of --volume-size with --used of it written, against nbdcopy over TLS",
        sync::sparse_volume,
    ),
    ("crash", "what is compared after a power cut, against a compare of the whole volume; needs root", crash::crash),
    ("view", "opening a view of 20 GiB of 4 KiB records; the target's memory", views::view_open),
];

pub(crate) fn run(args: &BenchArgs, output: &Output) -> Result<()> {
    match args.name.as_str() {
        "serve" => return guest::serve(args),
        "list" => {
            let rows: Vec<_> =
                FIGURES.iter().map(|(name, what, _)| vec![(*name).to_owned(), (*what).to_owned()]).collect();
            let document =
                json!(FIGURES.iter().map(|(name, what, _)| json!({ "name": name, "what": what })).collect::<Vec<_>>());
            output.show(&document, |_| table(&["NAME", "MEASURES"], &rows));
            return Ok(());
        }
        _ => {}
    }
    // Without a disk to spend, `all` means what needs none.
    let wanted = |(name, what, _): &&Figure| {
        args.name == *name || args.name == "all" && (args.disk.is_some() || !what.contains("--disk"))
    };
    let chosen: Vec<&Figure> = FIGURES.iter().filter(wanted).collect();
    if chosen.is_empty() {
        return Err(Failure::usage(args.name.clone(), "is no benchmark")
            .hint("`farshore bench list` names them")
            .into());
    }
    let temporary = match &args.dir {
        Some(dir) => tempfile::Builder::new().prefix("farshore-bench-").tempdir_in(dir),
        None => tempfile::Builder::new().prefix("farshore-bench-").tempdir(),
    }
    .context("make a working folder")?;
    let mut rows = Vec::new();
    for (name, _, figure) in chosen {
        let dir = temporary.path().join(name);
        std::fs::create_dir(&dir).context("make a working folder")?;
        let bench = Bench { args, dir: dir.clone() };
        rows.extend(figure(&bench).with_context(|| format!("benchmark {name}"))?);
        std::fs::remove_dir_all(dir).context("clean up")?;
    }
    let document = json!({ "machine": machine(), "figures": rows.iter().map(Row::document).collect::<Vec<_>>() });
    output.show(&document, |_| {
        let cells: Vec<_> = rows.iter().map(Row::cells).collect();
        format!("{}\n{}", machine(), table(&["FIGURE", "OURS", "PEER", "RATIO", "MUST", ""], &cells))
    });
    Ok(())
}

/// What the figures were measured on.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} × {model}, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}
