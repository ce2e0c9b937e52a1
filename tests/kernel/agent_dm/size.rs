//! Volumes whose tables other tools change while the agent is below them.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{GROUP, Rig, device_of};
use crate::dm::{Writer, logical_volumes, lvm, no_strays, table};
use crate::rig::{Mounted, run, until};

const MIB: u64 = 1 << 20;

/// Goal: growth below a mounted file system is followed: later points have the new size and all bytes, an earlier one keeps what it
/// showed; a refresh of the same size is a compare; a volume that was removed comes back.
#[test]
fn a_grown_volume_is_followed() -> Result<()> {
    Rig::test(|rig| {
        let upper = &logical_volumes(&["64M"])?[0];
        run(&format!("mkfs.ext4 -q {}", upper.display()))?;
        let mounted = Mounted::new(upper)?;
        let writer = Writer::start(&mounted.folder().join("file"))?;
        rig.protect_live(upper, "data")?;
        rig.wait()?;
        let bookmark = json!({ "group": GROUP, "name": "small", "timeout_s": super::LIMIT_SECONDS });
        rig.sites.agent().post("/v1/bookmark", &bookmark)?;

        lvm("lvextend -L 96M vg/data0")?;
        rig.until_alarm("volume.bypassed", "another tool")?;
        until("the volume has grown", || {
            rig.volume("data")
                .is_ok_and(|volume| volume["size_bytes"] == json!(96 * MIB) && volume["dm"]["state"] == "attached")
        })?;
        run(&format!("resize2fs {}", upper.display()))?;
        std::fs::write(mounted.folder().join("big"), vec![7u8; 60 << 20])?;
        writer.more(50)?;
        writer.finish()?;
        rig.check_replica(&["data"], &[mounted.folder()])?;
        let writer = Writer::start(&mounted.folder().join("file"))?;
        ensure!(rig.alarm("volume.bypassed")?.is_none() && rig.alarm("volume.unavailable")?.is_none());
        for (point, size) in [("latest", 96 * MIB), ("bookmark:small", 64 * MIB)] {
            rig.with_view(point, |view| {
                let device = device_of(view, "data")?;
                let is: u64 = run(&format!("blockdev --getsize64 {device}"))?.trim().parse().context("a size")?;
                ensure!(is == size, "{point} has {is} bytes");
                run(&format!("e2fsck -fn {device} || test $? -le 4")).map(drop)
            })?;
        }
        rig.kill_and_restart()?;
        rig.check_attached(upper, "data")?;

        lvm("lvchange --refresh vg/data0")?;
        rig.until_alarm("volume.bypassed", "another tool")?;
        writer.more(50)?;
        until("it is in the path again", || rig.check_attached(upper, "data").is_ok())?;
        writer.finish()?;
        rig.check_replica(&["data"], &[mounted.folder()])?;
        mounted.unmount()?;

        lvm("lvchange -an vg/data0")?;
        rig.until_alarm("volume.unavailable", "was removed")?;
        lvm("lvchange -ay vg/data0")?;
        until("it is in the path again", || rig.check_attached(upper, "data").is_ok())?;
        rig.check_replica(&["data"], &[])?;
        rig.unprotect("data")?;
        no_strays()
    })
}

/// Goal: shrinking destroys nothing: an alarm says what to do, and the volume can be grown again or let go of.
#[test]
fn a_shrunk_volume_raises_an_alarm() -> Result<()> {
    Rig::test(|rig| {
        let upper = &logical_volumes(&["64M"])?[0];
        rig.protect_live(upper, "data")?;
        rig.wait()?;
        lvm("lvreduce -f -L 32M vg/data0")?;
        rig.until_alarm("volume.unavailable", "shrunk")?;
        ensure!(rig.volume("data")?["dm"]["state"] == "bypassed" && rig.volume("data")?["device"].is_null());
        ensure!(rig.sites.wait(GROUP, 2).is_err(), "no point while it is written past us");
        lvm("lvextend -L 64M vg/data0")?;
        until("it is in the path again", || rig.check_attached(upper, "data").is_ok())?;
        rig.check_replica(&["data"], &[])?;
        lvm("lvreduce -f -L 32M vg/data0")?;
        rig.until_alarm("volume.unavailable", "shrunk")?;
        rig.unprotect("data")?;
        ensure!(!table(upper)?.contains("linear 259"));
        no_strays()
    })
}
