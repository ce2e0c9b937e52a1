//! A second site that is away, and disks that fail below a protected device.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::{alarm, protected, status};
use crate::agent::{GROUP, LIMIT_SECONDS, MIB, Rig, VOLUME};
use crate::rig::{Fio, fio, machine, pattern, read_at, run, until, write_at};

const DISK_BYTES: u64 = 96 * MIB;

/// Goal: without a target the ring takes what it can, then writes are only marked, and no guest notices; when the target comes, all is
/// sent by itself. Method: several rings of verified load with the target down.
#[test]
fn a_target_that_is_away_for_the_whole_run() -> Result<()> {
    protected(51, "farshore-faults", DISK_BYTES, |config| config.ring = 16 * MIB)?.run(|rig| {
        rig.sites.kill_target();
        fio(&rig.device, "--rw=randwrite --bs=16k --iodepth=8 --size=8m --verify=crc32c")?;
        ensure!(status(rig, "tier")? == "ring", "half a ring of writes closed it");
        fio(&rig.device, "--rw=randwrite --bs=64k --iodepth=16 --size=64m --verify=crc32c")?;
        ensure!(status(rig, "tier")? == "extents", "four rings of writes are in one");
        let closed = alarm(rig, "ring.closed")?.context("an alarm says so")?;
        ensure!(closed["subject"].as_str().is_some_and(|subject| subject.contains(GROUP)), "{closed:#}");
        // The link's time limit has to pass.
        until("an alarm says that the target is away", || alarm(rig, "link.down").is_ok_and(|alarm| alarm.is_some()))?;
        rig.sites.start_target()?;
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        rig.check_replica()?;
        ensure!(status(rig, "tier")? == "ring" && status(rig, "missing_bytes")? == 0, "{}", status(rig, "tier")?);
        until("the alarms are over", || {
            ["ring.closed", "link.down", "group.resync"].iter().all(|code| matches!(alarm(rig, code), Ok(None)))
        })
    })
}

/// Goal: a disk that fails gives its guests its own errors and an alarm, keeps nobody waiting, and what it may have lost is sent anew
/// when it works again. Method: its table is replaced by one that fails everything, under load.
#[test]
fn a_disk_that_fails_for_a_while() -> Result<()> {
    protected(52, "farshore-faults", DISK_BYTES, |_| {})?.run(|rig| {
        write_at(&rig.device, 0, &pattern(52, 8 << 20))?;
        let load =
            Fio::start(&rig.device, "--rw=randwrite --bs=16k --iodepth=16 --size=64m --time_based --runtime=60")?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let sectors = DISK_BYTES / 512;
        swap_table(&format!("0 {sectors} error"))?;
        let report = load.fail()?;
        ensure!(report.contains("Input/output error"), "the guest got another error:\n{report}");
        until("an alarm names the disk", || matches!(alarm(rig, "volume.write-failed"), Ok(Some(_))))?;
        crate::rig::run_failing(&format!("dd if={} of=/dev/null bs=64k count=1 iflag=direct", rig.device.display()))?;
        swap_table(&format!("0 {sectors} linear {} 0", crate::rig::DISK_512))?;
        fio(&rig.device, "--rw=randwrite --bs=16k --iodepth=8 --size=8m --verify=crc32c")?;
        rig.check_replica()?;
        ensure!(status(rig, "missing_bytes")? == 0, "{} bytes are missing", status(rig, "missing_bytes")?);
        Ok(())
    })
}

fn swap_table(table: &str) -> Result<()> {
    let dmsetup = "DM_DISABLE_UDEV=1 dmsetup";
    run(&format!(
        "{dmsetup} reload farshore-faults --table '{table}' && {dmsetup} suspend --noflush --nolockfs farshore-faults && \
         {dmsetup} resume farshore-faults"
    ))
    .map(drop)
}

/// A disk that can be pulled out.
struct Pluggable;

impl Pluggable {
    fn plug(bytes: u64) -> Result<(Self, PathBuf)> {
        run(&format!("modprobe sd_mod && modprobe scsi_debug dev_size_mb={} delay=0", bytes / MIB))?;
        let plugged = Self;
        let mut name = None;
        until("the disk is there", || {
            name = std::fs::read_dir("/sys/bus/pseudo/drivers/scsi_debug").ok().and_then(|_| disk_of_scsi_debug().ok());
            name.is_some()
        })?;
        Ok((plugged, PathBuf::from("/dev").join(name.context("found")?)))
    }
}

fn disk_of_scsi_debug() -> Result<String> {
    let found = run("for d in /sys/block/sd*; do grep -q scsi_debug $d/device/model && basename $d; done; true")?;
    match found.lines().next() {
        Some(name) => Ok(name.to_owned()),
        None => bail!("no such disk"),
    }
}

impl Drop for Pluggable {
    fn drop(&mut self) {
        // The agent may hold what is left of it for a moment.
        let _ = until("scsi_debug is unloaded", || run("modprobe -r scsi_debug").is_ok());
    }
}

/// Goal: a disk that is pulled out under load gives its guests errors; the agent says so, serves on, and lets go of it. Nothing hangs,
/// and what was a point before is one.
#[test]
fn a_disk_that_is_pulled_out() -> Result<()> {
    let control = machine()?;
    let (plugged, source) = Pluggable::plug(64 * MIB)?;
    let disk = source.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
    Rig::over(53, control, &source, Box::new(plugged), |_| {})?.run(|rig| {
        let bytes = pattern(53, 8 << 20);
        write_at(&rig.device, 0, &bytes)?;
        let body = json!({ "group": GROUP, "name": "before", "timeout_s": LIMIT_SECONDS });
        rig.sites.agent().post("/v1/bookmark", &body)?;
        let options = "--rw=randwrite --bs=16k --iodepth=16 --offset=8m --size=48m --time_based --runtime=60";
        let load = Fio::start(&rig.device, options)?;
        std::thread::sleep(std::time::Duration::from_millis(1500));
        run(&format!("echo 1 > /sys/block/{disk}/device/delete"))?;
        load.fail()?;
        until("an alarm names the disk", || matches!(alarm(rig, "volume.write-failed"), Ok(Some(_))))?;
        // Reads end, too: with the disk's error, or with the nothing that a disk without size has.
        run(&format!("dd if={} of=/dev/null bs=64k count=1 iflag=direct; true", rig.device.display()))?;
        until("an alarm says that it cannot be read", || matches!(alarm(rig, "volume.unreadable"), Ok(Some(_))))?;
        let view = rig.open_view_at("bookmark:before")?;
        ensure!(read_at(&view.device, 0, bytes.len())? == bytes, "the point before is another");
        rig.close_view(&view)?;
        // Said once; the second goes on.
        let refused =
            rig.sites.agent().post("/v1/unprotect", &json!({ "volume": VOLUME })).expect_err("its disk is gone");
        ensure!(format!("{refused:#}").contains("Input/output error"), "{refused:#}");
        Ok(())
    })
}
