//! The tools that people use on disks.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::protected;
use crate::agent::{GROUP, LIMIT_SECONDS, MIB, Rig};
use crate::rig::{Mounted, pattern, run, until};

/// XFS takes nothing below 300 MB.
const DISK_BYTES: u64 = 320 * MIB;

/// Makes a point that can be opened later.
fn bookmark(rig: &Rig, name: &str) -> Result<String> {
    let body = json!({ "group": GROUP, "name": name, "timeout_s": LIMIT_SECONDS });
    rig.sites.agent().post("/v1/bookmark", &body)?;
    Ok(format!("bookmark:{name}"))
}

/// A partition of a disk whose name ends with a digit.
fn partition(device: &Path, number: u32) -> PathBuf {
    PathBuf::from(format!("{}p{number}", device.display()))
}

/// Some files of this machine on a new file system; its own tool finds nothing to mend, on the device and on the view.
fn file_system(rig: &Rig, make: &str, check: &str) -> Result<()> {
    let device = rig.device.display();
    run(&format!("{make} {device}"))?;
    let mounted = Mounted::new(&rig.device)?;
    let folder = mounted.folder().display().to_string();
    run(&format!("cp -r /usr/share/perl5 /etc {folder}/ 2>/dev/null; rm -r {folder}/etc; sync -f {folder}"))?;
    run(&format!("find {folder} -type f | wc -l"))?;
    mounted.unmount()?;
    run(&format!("{check} {device}"))?;
    let mounted = Mounted::with(&rig.device, "-o ro")?;
    rig.sites.wait(GROUP, LIMIT_SECONDS)?;
    let view = rig.open_view_at("latest")?;
    run(&format!("{check} {}", view.device.display()))?;
    let options = if make.contains("xfs") { "-o ro,nouuid" } else { "-o ro" };
    let copy = Mounted::with(&view.device, options)?;
    run(&format!("diff -r {} {}", mounted.folder().display(), copy.folder().display()))?;
    copy.unmount()?;
    mounted.unmount()?;
    rig.close_view(&view)
}

#[test]
fn file_systems_and_their_checkers() -> Result<()> {
    protected(41, "farshore-tools", DISK_BYTES, |_| {})?.run(|rig| {
        run("modprobe xfs")?;
        file_system(rig, "mkfs.xfs -q -f", "xfs_repair -n")?;
        file_system(rig, "mkfs.ext4 -q -F", "e2fsck -fn")?;
        rig.check_replica()?;
        rig.check_logs()
    })
}

#[test]
fn raw_reads_and_writes_by_dd_and_hdparm() -> Result<()> {
    protected(42, "farshore-tools", DISK_BYTES, |_| {})?.run(|rig| {
        let device = rig.device.display();
        let source = rig.sites.path("random");
        std::fs::write(&source, pattern(42, 24 << 20)).context("write a file")?;
        let source = source.display();
        run(&format!("dd if={source} of={device} bs=1M seek=100 oflag=direct conv=fsync,notrunc"))?;
        run(&format!("dd if={source} of={device} bs=4k seek=50000 conv=fdatasync,notrunc"))?;
        for at in [100 * MIB, 50000 * 4096] {
            run(&format!("blockdev --flushbufs {device} && cmp -n {} -i 0:{at} {source} {device}", 24 * MIB))?;
        }
        let report = run(&format!("hdparm -t --direct {device}; hdparm -tT {device}"))?;
        ensure!(report.matches("MB/sec").count() == 3, "hdparm did not read:\n{report}");
        rig.check_nothing_missing()?;
        rig.check_replica()?;
        rig.check_logs()
    })
}

/// Goal: partitions made on the protected device work, and are found on a view.
#[test]
fn partitions_on_the_device_and_on_its_view() -> Result<()> {
    protected(43, "farshore-tools", DISK_BYTES, |_| {})?.run(|rig| {
        let device = rig.device.display();
        run(&format!("printf 'label: gpt\\nsize=100M\\nsize=100M\\n' | sfdisk --wipe always {device}"))?;
        let first = partition(&rig.device, 1);
        until("partitions are there", || first.exists() && partition(&rig.device, 2).exists())?;
        run(&format!("mkfs.ext4 -q -F {}", first.display()))?;
        let mounted = Mounted::new(&first)?;
        std::fs::write(mounted.folder().join("file"), pattern(43, 4 << 20)).context("write a file")?;
        mounted.unmount()?;
        run(&format!("e2fsck -fn {} && mkswap {}", first.display(), partition(&rig.device, 2).display()))?;
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        let view = rig.open_view_at("latest")?;
        let copy = partition(&view.device, 1);
        until("the view's partitions are there", || copy.exists())?;
        run(&format!("e2fsck -fn {} && sfdisk --verify {}", copy.display(), view.device.display()))?;
        let mounted = Mounted::new(&copy)?;
        ensure!(std::fs::read(mounted.folder().join("file"))? == pattern(43, 4 << 20), "the file is another");
        mounted.unmount()?;
        rig.close_view(&view)?;
        // Partitions keep their disk from being taken away no longer than they are in use.
        run(&format!("sfdisk --delete {device}"))?;
        rig.check_replica()?;
        rig.check_logs()
    })
}

/// Goal: what is discarded reads as zeroes, on the device and in points from then on, and not in points before.
#[test]
fn a_discard_is_seen_from_its_point_on() -> Result<()> {
    protected(44, "farshore-tools", DISK_BYTES, |_| {})?.run(|rig| {
        let device = rig.device.display();
        let bytes = pattern(44, 16 << 20);
        crate::rig::write_at(&rig.device, 0, &bytes)?;
        let before = bookmark(rig, "before")?;
        run(&format!("blkdiscard -f -o {} -l {} {device}", 4 * MIB, 4 * MIB))?;
        let piece = bookmark(rig, "piece")?;
        run(&format!("blkdiscard -f {device}"))?;
        run(&format!("blockdev --flushbufs {device} && cmp -n {DISK_BYTES} {device} /dev/zero"))?;
        rig.check_nothing_missing()?;
        let mut holed = bytes.clone();
        holed[4 << 20..8 << 20].fill(0);
        for (point, expected) in [(before, bytes), (piece, holed)] {
            let view = rig.open_view_at(&point)?;
            let seen = crate::rig::read_at(&view.device, 0, expected.len())?;
            ensure!(seen == expected, "{point} is another");
            rig.close_view(&view)?;
        }
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        let view = rig.open_view_at("latest")?;
        run(&format!("cmp -n {DISK_BYTES} {} /dev/zero", view.device.display()))?;
        rig.close_view(&view)?;
        rig.check_logs()
    })
}
