//! Runs fio and reads its figures.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A job.
pub(super) struct Fio<'a> {
    pub target: FioTarget<'a>,
    pub rw: &'a str,
    pub block: u64,
    pub depth: u32,
    /// Bytes of the area, each block once.
    pub size: u64,
    /// Bytes to write, where that is less than the area.
    pub amount: Option<u64>,
    /// Run for this long, over and over the area.
    pub seconds: Option<u64>,
    /// Share of each block that compresses, in percent.
    pub compressible: u32,
    /// Bytes per second at the most.
    pub rate: Option<u64>,
    /// Processes, each with a connection of its own.
    pub jobs: u32,
}

/// What it writes to.
pub(super) enum FioTarget<'a> {
    /// An NBD server on a unix socket.
    Nbd(&'a Path),
    /// A block device, with direct I/O.
    Device(&'a Path),
    /// A file, with direct I/O, synced with fdatasync every so many writes.
    File(&'a Path, u32),
}

/// What it measured.
pub(super) struct FioResult {
    pub iops: f64,
    pub bytes_per_second: f64,
    pub p99: Duration,
    pub p50: Duration,
    pub bytes: u64,
    /// When fio had its last acknowledgement.
    pub end: Instant,
    pub elapsed: Duration,
}

impl<'a> Fio<'a> {
    /// A guest that writes 4 KiB all over a volume for so many seconds, `rate` bytes in each at the most: cold extents all the time.
    pub(super) fn scattered(socket: &'a Path, size: u64, seconds: u64, rate: Option<u64>) -> Self {
        Self {
            target: FioTarget::Nbd(socket),
            rw: "randwrite",
            block: 4096,
            depth: 8,
            size,
            amount: None,
            seconds: Some(seconds),
            compressible: 50,
            rate,
            jobs: 1,
        }
    }
}

impl Fio<'_> {
    fn arguments(&self) -> Vec<String> {
        let mut list: Vec<String> = [
            "--name=bench",
            "--output-format=json",
            "--group_reporting",
            "--randrepeat=1",
            "--allrandrepeat=1",
            "--refill_buffers",
            "--lat_percentiles=1",
            "--clat_percentiles=0",
        ]
        .iter()
        .map(ToString::to_string)
        .collect();
        let mut add = |key: &str, value: String| list.push(format!("--{key}={value}"));
        match self.target {
            FioTarget::Nbd(socket) => {
                add("ioengine", "nbd".into());
                add("uri", format!("nbd+unix:///?socket={}", socket.display()));
            }
            FioTarget::Device(path) => {
                add("ioengine", "io_uring".into());
                add("direct", "1".into());
                add("filename", path.display().to_string());
            }
            FioTarget::File(path, sync_every) => {
                add("ioengine", "libaio".into());
                add("direct", "1".into());
                add("filename", path.display().to_string());
                add("fdatasync", sync_every.to_string());
            }
        }
        add("rw", self.rw.into());
        add("bs", self.block.to_string());
        add("iodepth", self.depth.to_string());
        add("size", self.size.to_string());
        add("numjobs", self.jobs.to_string());
        add("buffer_compress_percentage", self.compressible.to_string());
        add("buffer_compress_chunk", self.block.min(4096).to_string());
        if let Some(amount) = self.amount {
            add("io_size", amount.to_string());
        }
        if let Some(seconds) = self.seconds {
            add("runtime", seconds.to_string());
            list.push("--time_based".into());
        }
        if let Some(rate) = self.rate {
            list.push(format!("--rate={rate}"));
            list.push("--rate_process=poisson".into());
        }
        list
    }

    pub(super) fn run(&self) -> Result<FioResult> {
        let begin = Instant::now();
        let output = Command::new("fio").args(self.arguments()).output().context("run fio (Debian package fio)")?;
        let end = Instant::now();
        ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let start = text.find('{').context("fio printed no JSON")?;
        let document: Value = serde_json::from_str(&text[start..]).context("read fio's JSON")?;
        let job = &document["jobs"][0];
        ensure!(job["error"] == 0, "fio reports error {}", job["error"]);
        let side = if self.rw.contains("read") { &job["read"] } else { &job["write"] };
        let latency = |key: &str| Duration::from_nanos(side["lat_ns"]["percentile"][key].as_u64().unwrap_or(0));
        Ok(FioResult {
            iops: side["iops"].as_f64().context("fio's IOPS")?,
            bytes_per_second: side["bw_bytes"].as_f64().context("fio's rate")?,
            p99: latency("99.000000"),
            p50: latency("50.000000"),
            bytes: side["io_bytes"].as_u64().context("fio's bytes")?,
            end,
            elapsed: Duration::from_millis(side["runtime"].as_u64().unwrap_or(0)),
        })
        .inspect(|_| tracing::debug!(seconds = begin.elapsed().as_secs_f64(), "fio ended"))
    }
}

/// A sparse file of `size` bytes.
pub(super) fn sparse(path: PathBuf, size: u64) -> Result<PathBuf> {
    std::fs::File::create_new(&path)
        .and_then(|file| file.set_len(size))
        .with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

/// A file of `size` bytes that is allocated and written once, so that no run pays for allocation.
pub(super) fn written(path: PathBuf, size: u64) -> Result<PathBuf> {
    use std::io::Write;
    let mut file = std::fs::File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
    let piece = vec![0x5au8; 4 << 20];
    let mut left = size;
    while left > 0 {
        let len = usize::try_from(left.min(piece.len() as u64)).unwrap_or(piece.len());
        file.write_all(&piece[..len]).context("fill the image")?;
        left -= len as u64;
    }
    file.sync_all().context("sync the image")?;
    Ok(path)
}
