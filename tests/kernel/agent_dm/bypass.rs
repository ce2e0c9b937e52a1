//! Writes past Farshore: noticed, or proved not to have been.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Rig;
use crate::dm::{logical_volumes, lvm};
use crate::rig::{Mounted, pattern, run, write_at};

/// What the agent takes for another start of the host: another id of the boot.
pub(crate) struct OtherBoot;

impl OtherBoot {
    const FILE: &'static str = "/proc/sys/kernel/random/boot_id";
    const STANDS_IN: &'static str = "/dev/shm/boot_id";

    pub(crate) fn begin(id: u32) -> Result<Self> {
        let boot = Self;
        boot.again(id)?;
        // Private: a mount on one that is shared appears on all its peers, so that each more of them would double their number.
        run(&format!("mount --bind {} {1} && mount --make-private {1}", Self::STANDS_IN, Self::FILE))?;
        Ok(boot)
    }

    /// One more start of the host. No agent may run.
    pub(crate) fn again(&self, id: u32) -> Result<()> {
        let text = format!("{id:08x}-0000-0000-0000-000000000000\n");
        std::fs::write(Self::STANDS_IN, text).context("write a boot id")
    }
}

impl Drop for OtherBoot {
    fn drop(&mut self) {
        let _ = run(&format!("umount {}", Self::FILE));
    }
}

/// Starts the agent and says whether it compares the volume.
fn start_compares(rig: &mut Rig, mounts: &[&Path]) -> Result<bool> {
    rig.sites.start_agent()?;
    let said = |part: &str| rig.sites.logs().iter().any(|line| line.contains(part));
    let compares = said("the volume is compared");
    ensure!(compares == said("volume.bypassed"), "an alarm says so");
    if compares {
        rig.check_replica(&["data"], mounts)?;
        ensure!(rig.alarm("volume.bypassed")?.is_none(), "it is compared by now");
    } else {
        // All but the slot that kept points away until it was in the path.
        ensure!(rig.status()?["missing_bytes"].as_u64().is_some_and(|bytes| bytes <= 64 << 10), "{:#}", rig.status()?);
    }
    rig.stop_agent()?;
    Ok(compares)
}

/// Goal: what is written while the agent is stopped is compared and comes to the second site; where nothing was, nothing is compared.
/// Method: below a mounted file system, on the bare volume, in the middle of it; and across a restart of the host, which another boot id
/// and a volume that is activated anew stand for.
#[test]
fn the_bypass_rule_decides() -> Result<()> {
    Rig::test(|rig| {
        let upper = &logical_volumes(&["64M"])?[0];
        run(&format!("mkfs.ext4 -q -E lazy_itable_init=0,nodiscard {}", upper.display()))?;
        let mounted = Mounted::new(upper)?;
        rig.protect_live(upper, "data")?;
        rig.wait()?;
        run("sync")?;
        rig.stop_agent()?;
        ensure!(!start_compares(rig, &[mounted.folder()])?, "nothing was written");
        std::fs::write(mounted.folder().join("past"), pattern(5, 1 << 20))?;
        run("sync")?;
        ensure!(start_compares(rig, &[mounted.folder()])?, "a file was written");
        mounted.unmount()?;
        ensure!(start_compares(rig, &[])?, "unmounting writes");
        ensure!(!start_compares(rig, &[])?, "nothing was written");
        write_at(upper, 40 << 20, &pattern(6, 4096))?;
        ensure!(start_compares(rig, &[])?, "a sector in the middle was written");
        run(&format!("blkdiscard --offset 32M --length 1M {}", upper.display()))?;
        ensure!(start_compares(rig, &[])?, "a range was discarded");
        ensure!(!start_compares(rig, &[])?, "nothing was written");

        // The host restarts: counters begin anew.
        let reactivate = || lvm("lvchange -an vg/data0").and_then(|_| lvm("lvchange -ay vg/data0")).map(drop);
        {
            let _boot = OtherBoot::begin(1)?;
            reactivate()?;
            ensure!(!start_compares(rig, &[])?, "nothing was written since the restart");
        }
        {
            let _boot = OtherBoot::begin(2)?;
            reactivate()?;
            write_at(upper, 40 << 20, &pattern(7, 4096))?;
            ensure!(start_compares(rig, &[])?, "written since the restart");
        }
        {
            // A whole life of the host without Farshore: the counters of that one are gone, its mount is not.
            let _boot = OtherBoot::begin(3)?;
            let mounted = Mounted::new(upper)?;
            std::fs::write(mounted.folder().join("unseen"), pattern(8, 1 << 20))?;
            mounted.unmount()?;
            reactivate()?;
            ensure!(start_compares(rig, &[])?, "mounted in a life without Farshore");
        }
        // What begins with nothing that notes its use is compared after a restart, for nothing would show it.
        run(&format!("wipefs -qa {}", upper.display()))?;
        ensure!(start_compares(rig, &[])?, "the file system was wiped");
        ensure!(!start_compares(rig, &[])?, "nothing was written");
        {
            let _boot = OtherBoot::begin(4)?;
            reactivate()?;
            ensure!(start_compares(rig, &[])?, "nothing would show that it was written");
        }
        rig.sites.start_agent()?;
        rig.unprotect("data").map(drop)
    })
}
