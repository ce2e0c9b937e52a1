//! What capturing a write costs, counted by the kernel on the program as it is shipped: system calls, allocations and copies of the
//! threads that serve a protected device, under a steady load of 4 KiB writes at depth 32.
//!
//! Method: histograms of the kernel's tracing, by thread. System calls: every entry. Allocations: probes on the C library's
//! allocator. Copies: a probe on the C library's `memmove` for lengths from a sector on (an aligned payload that is copied by
//! anything else would have to be copied by code inlined into the program, in pieces), and one on the driver's read, by which a
//! guest's data comes in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::libc;

use crate::agent::Rig;
use crate::rig::{fio, run, say};

const TRACING: &str = "/sys/kernel/tracing";
const BLOCK: u64 = 4096;

/// Where the C library has a function: file and position in it. That of `memcpy` is chosen when a program starts, by the
/// processor; this process has the same processor.
fn in_library(address: usize) -> Result<(PathBuf, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").context("read the memory map")?;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [range, _, offset, _, _, path] = words[..] else { continue };
        let (start, end) = range.split_once('-').context("a range")?;
        let hex = |text: &str| usize::from_str_radix(text, 16).context("a number");
        if (hex(start)?..hex(end)?).contains(&address) {
            return Ok((PathBuf::from(path), address - hex(start)? + hex(offset)?));
        }
    }
    anyhow::bail!("nothing is mapped at {address:#x}")
}

/// A counting probe; its trigger counts by thread. Gone when dropped.
struct Probe {
    event: String,
    name: Option<String>,
    trigger: String,
}

impl Probe {
    /// On an event that the kernel has.
    fn on_event(event: &str, trigger: &str) -> Result<Self> {
        let probe = Self { event: format!("{TRACING}/events/{event}"), name: None, trigger: trigger.to_owned() };
        write(&format!("{}/trigger", probe.event), trigger)?;
        Ok(probe)
    }

    /// On a new event; `kind` is `uprobe` or `kprobe`.
    fn on_new(kind: &str, name: &str, definition: &str, trigger: &str) -> Result<Self> {
        let letter = if kind == "kprobe" { "r" } else { "p" };
        append(&format!("{TRACING}/{kind}_events"), &format!("{letter}:farshore/{name} {definition}"))?;
        let event = format!("{TRACING}/events/farshore/{name}");
        let probe = Self {
            event: event.clone(),
            name: Some(format!("{TRACING}/{kind}_events -:farshore/{name}")),
            trigger: trigger.to_owned(),
        };
        write(&format!("{event}/trigger"), trigger)?;
        Ok(probe)
    }

    /// (hits, sum of `len`) by thread so far.
    fn counts(&self) -> Result<BTreeMap<u32, (u64, u64)>> {
        let text = std::fs::read_to_string(format!("{}/hist", self.event)).context("read a histogram")?;
        let mut counts = BTreeMap::new();
        for line in text.lines().filter(|line| line.starts_with('{')) {
            let words: Vec<&str> = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
            let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
            let after =
                |key: &str| words.iter().position(|word| *word == key).and_then(|at| words.get(at + 1)?.parse().ok());
            let thread = after("common_pid").with_context(|| format!("no thread in {line}"))?;
            let hits = after("hitcount").with_context(|| format!("no count in {line}"))?;
            counts.insert(u32::try_from(thread)?, (hits, after("len").unwrap_or(0)));
        }
        Ok(counts)
    }

    /// The sum over some threads.
    fn of(&self, threads: &[u32]) -> Result<(u64, u64)> {
        let counts = self.counts()?;
        let found = threads.iter().filter_map(|thread| counts.get(thread));
        Ok(found.fold((0, 0), |sum, (hits, bytes)| (sum.0 + hits, sum.1 + bytes)))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = write(&format!("{}/trigger", self.event), &format!("!{}", self.trigger));
        if let Some((file, removal)) = self.name.as_deref().and_then(|name| name.split_once(' ')) {
            let _ = append(file, removal);
        }
    }
}

fn write(path: &str, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {text} to {path}"))
}

fn append(path: &str, text: &str) -> Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::options().append(true).open(path).with_context(|| format!("open {path}"))?;
    file.write_all(text.as_bytes()).with_context(|| format!("append {text} to {path}"))
}

/// The threads that serve a device.
fn queue_threads(pid: u32) -> Result<Vec<u32>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).context("list threads")? {
        let path = entry?.path();
        if std::fs::read_to_string(path.join("comm"))?.starts_with("ublk-") {
            let id = path.file_name().and_then(|name| name.to_str()).context("a thread's number")?;
            threads.push(id.parse().context("a thread's number")?);
        }
    }
    ensure!(!threads.is_empty(), "no thread serves a device");
    Ok(threads)
}

/// Probes on the C library's functions.
fn on_library(functions: &[(&str, usize)], arguments: &str, trigger: &str) -> Result<Vec<Probe>> {
    let mut probes: BTreeMap<usize, Probe> = BTreeMap::new();
    for (name, address) in functions {
        let (library, at) = in_library(*address)?;
        // The kernel wants the file below the overlay to be readable by pages; a copy in memory is not what the program runs.
        let library: &Path = &library;
        if let std::collections::btree_map::Entry::Vacant(vacant) = probes.entry(at) {
            let definition = format!("{}:{at:#x} {arguments}", library.display());
            vacant.insert(Probe::on_new("uprobe", name, &definition, trigger)?);
        }
    }
    Ok(probes.into_values().collect())
}

/// Per request or byte: what the queue threads did.
struct Cost {
    calls: u64,
    allocations: u64,
    copied_bytes: u64,
    fetched_bytes: u64,
    requests: u64,
}

fn measure(rig: &Rig, pid: u32) -> Result<Cost> {
    let by_thread = "hist:keys=common_pid";
    let calls = Probe::on_event("raw_syscalls/sys_enter", by_thread)?;
    let allocator = [
        ("malloc", libc::malloc as *const () as usize),
        ("calloc", libc::calloc as *const () as usize),
        ("realloc", libc::realloc as *const () as usize),
        ("posix_memalign", libc::posix_memalign as *const () as usize),
    ];
    let allocations = on_library(&allocator, "", by_thread)?;
    let movers = [("memcpy", libc::memcpy as *const () as usize), ("memmove", libc::memmove as *const () as usize)];
    let copies = on_library(&movers, "len=%dx:u64", "hist:keys=common_pid:vals=len if len >= 512")?;
    let fetches = Probe::on_new(
        "kprobe",
        "fetch",
        "ublk_ch_read_iter len=$retval:s64",
        "hist:keys=common_pid:vals=len if len > 0",
    )?;
    let threads = queue_threads(pid)?;
    let sum = |probes: &[Probe]| -> Result<(u64, u64)> {
        probes.iter().try_fold((0, 0), |sum: (u64, u64), probe| {
            let (hits, bytes) = probe.of(&threads)?;
            Ok((sum.0 + hits, sum.1 + bytes))
        })
    };
    let requests = || -> Result<u64> {
        let fields = crate::rig::attribute(&rig.device, "stat")?;
        fields.split_whitespace().nth(4).context("writes")?.parse().context("a count")
    };
    let anybody = |probes: &[Probe]| -> Result<u64> {
        probes.iter().try_fold(0, |sum, probe| Ok(sum + probe.counts()?.values().map(|(hits, _)| hits).sum::<u64>()))
    };
    let before = (requests()?, calls.of(&threads)?.0, sum(&allocations)?.0, sum(&copies)?.1, fetches.of(&threads)?.1);
    fio(&rig.device, "--rw=randwrite --bs=4k --iodepth=32 --size=40m --time_based --runtime=10")?;
    let cost = Cost {
        requests: requests()? - before.0,
        calls: calls.of(&threads)?.0 - before.1,
        allocations: sum(&allocations)?.0 - before.2,
        copied_bytes: sum(&copies)?.1 - before.3,
        fetched_bytes: fetches.of(&threads)?.1 - before.4,
    };
    // Others allocate and copy all the time: the shipping threads, this test.
    ensure!(anybody(&allocations)? > 100 && anybody(&copies)? > 100, "the library's probes saw nothing of anybody");
    Ok(cost)
}

/// Goal: in the steady state a written byte is copied once, a request allocates nothing and takes at most one system call.
#[test]
fn the_capture_path_is_counted() -> Result<()> {
    run(&format!("mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}"))?;
    Rig::test(60, |rig| {
        let pid = rig.sites.agent_pid().context("the agent runs")?;
        // Pools and lists grow to what the load needs.
        fio(&rig.device, "--rw=randwrite --bs=4k --iodepth=32 --size=40m --time_based --runtime=5")?;
        let cost = measure(rig, pid)?;
        rig.check_nothing_missing()?;
        let Cost { calls, allocations, copied_bytes, fetched_bytes, requests } = cost;
        let written = requests * BLOCK;
        #[expect(clippy::cast_precision_loss, reason = "ratios of counts")]
        let per = |count: u64, of: u64| count as f64 / of as f64;
        let (called, allocated) = (per(calls, requests), per(allocations, requests));
        let (copies, fetched) = (per(copied_bytes + fetched_bytes, written), per(fetched_bytes, written));
        say(&format!(
            "{requests} requests: {called:.3} system calls and {allocated:.5} allocations each ({allocations} in all); \
             {copies:.4} copies per byte, {fetched:.4} of them out of the guest"
        ));
        ensure!(requests > 500, "only {requests} requests");
        ensure!(calls > 0 && fetched_bytes > 0, "the kernel's probes saw nothing");
        ensure!(called <= 1.0, "{calls} system calls for {requests} requests");
        ensure!(allocations * 1000 <= requests, "{allocations} allocations for {requests} requests");
        ensure!((0.99..=1.01).contains(&copies), "a byte is copied {copies} times");
        Ok(())
    })
}
