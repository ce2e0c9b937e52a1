//! Many kills of the agent, for the record: how many writes they cut off, and how long a guest waited.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farshore_uring::AlignedBuf;
use nix::libc;

use crate::agent::{MIB, Rig, kill_under_load_by};
use crate::rig::say;

/// Where the waits are measured: behind what the load writes.
const PROBE_AT: u64 = 60 * MIB;
/// Between two writes of the probe.
const PROBE_PAUSE: Duration = Duration::from_millis(20);

/// Waits of single writes of 4 KiB, one after the other.
#[derive(Default)]
struct Waits(Vec<Duration>);

impl Waits {
    fn measure(device: &Path, stop: &AtomicBool) -> Result<Self> {
        let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(device).context("open the device")?;
        let buffer = AlignedBuf::zeroed(4096);
        let mut waits = Self::default();
        while !stop.load(Ordering::Relaxed) {
            let begin = Instant::now();
            file.write_all_at(&buffer, PROBE_AT + waits.0.len() as u64 % 256 * 4096).context("a guest's write")?;
            waits.0.push(begin.elapsed());
            std::thread::sleep(PROBE_PAUSE);
        }
        Ok(waits)
    }

    fn report(mut self) -> String {
        self.0.sort();
        let at = |share: usize| self.0.get(self.0.len().saturating_sub(1) * share / 1000).copied().unwrap_or_default();
        format!("{} single writes: p50 {:?}, p99 {:?}, longest {:?}", self.0.len(), at(500), at(990), at(1000))
    }
}

/// Longest time between a start and the next kill, in milliseconds. A worker has to live long enough to ship more than was written since
/// the last one did, or three hundred of them fill the ring; in the machine it ships some MB a second. Hence the load's rate, too.
const KILL_AFTER_MS: u64 = 4000;

/// Goal: the same as with twenty, three hundred times. `FARSHORE_KILLS` says how many else.
#[test]
#[ignore = "takes twenty minutes: FARSHORE_KERNEL_FILTER=\"three_hundred --ignored --nocapture\""]
fn three_hundred_kills_of_the_agent() -> Result<()> {
    let kills = match std::env::var("FARSHORE_KILLS") {
        Ok(text) => text.parse().context("FARSHORE_KILLS is a number")?,
        Err(_) => 300,
    };
    Rig::test(300, |rig| {
        let options = "--rw=randwrite --bsrange=4k-64k --iodepth=16 --size=24m --numjobs=2 --offset_increment=32m --rate=384k \
                       --verify=crc32c --group_reporting";
        let (device, stop) = (rig.device.clone(), AtomicBool::new(false));
        let waits = std::thread::scope(|scope| -> Result<Waits> {
            let probe = scope.spawn(|| Waits::measure(&device, &stop));
            let killed = kill_under_load_by(rig, kills, KILL_AFTER_MS, options, Rig::kill_and_restart);
            stop.store(true, Ordering::Relaxed);
            let waits = probe.join().expect("a probe does not panic");
            killed.and(waits)
        })?;
        say(&waits.report());
        rig.check_replica()
    })
}
