//! A host that goes down: what the agent takes for the kernel's start, its boot id and its time, is ours to change.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::{Sites, SitesConfig};

/// Files that stand in for the kernel's, in a mount namespace of the agent's own. Needs root.
#[derive(Debug)]
pub struct Host(PathBuf);

impl Host {
    /// A host for the agent of these sites, which are yet to be started.
    ///
    /// # Errors
    /// The files cannot be made.
    pub fn of(config: &mut SitesConfig) -> Result<Self> {
        let host = Self(config.dir.join("host"));
        std::fs::create_dir(&host.0).context("make a folder")?;
        let program = host.0.join("farshore-on-host");
        let dir = host.0.display();
        let script = format!(
            "#!/bin/sh\nexec unshare --mount sh -c 'mount --bind {dir}/boot_id /proc/sys/kernel/random/boot_id && \
             mount --bind {dir}/stat /proc/stat && exec {} \"$@\"' sh \"$@\"\n",
            config.binary.display()
        );
        std::fs::write(&program, script).context("write a program")?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).context("make it one")?;
        config.agent_program = Some(program);
        host.starts(0, 0)?;
        Ok(host)
    }

    /// The host has been started for the `number`th time, at `time` (seconds since 1970).
    fn starts(&self, number: u32, time: u64) -> Result<()> {
        let id = format!("00000000-0000-4000-8000-{number:012}\n");
        std::fs::write(self.0.join("boot_id"), id).context("write the boot's id")?;
        std::fs::write(self.0.join("stat"), format!("cpu 0 0 0 0\nbtime {time}\n")).context("write the boot's time")
    }

    /// It goes down, with the agent, and is started again, later than everything that was done to its disks.
    ///
    /// # Errors
    /// There is no ring to be lost.
    pub fn goes_down(&self, sites: &mut Sites, number: u32) -> Result<()> {
        self.goes_down_before(sites, number, 2)
    }

    /// As [`Self::goes_down`], its start so many seconds from now; 0: long ago, before everything.
    ///
    /// # Errors
    /// As that.
    pub fn goes_down_before(&self, sites: &mut Sites, number: u32, seconds: u64) -> Result<()> {
        sites.kill_agent();
        let ring = sites.ring_file()?;
        std::fs::remove_file(&ring).with_context(|| format!("remove {}", ring.display()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?.as_secs();
        self.starts(number, if seconds == 0 { 1 } else { now + seconds })
    }
}
