//! What the host must be like: refused sources, the doctor, udev.

mod boot;
mod doctor;
mod refusals;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::{Ran, run as finish};
use farshore_cli::sites::{Sites, SitesConfig};
use serde_json::Value;
use tempfile::TempDir;

use crate::dm::kit;
use crate::rig::run;

const GROUP: &str = "g";
const MIB: u64 = 1 << 20;

fn binary() -> Result<PathBuf> {
    Ok(std::env::var_os("FARSHORE_BIN").context("FARSHORE_BIN names the binary under test")?.into())
}

/// Both sites, over the real binary.
struct Rig {
    sites: Sites,
    _folder: Option<TempDir>,
}

impl Rig {
    /// In a folder of its own.
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let sites = Sites::start(config(&binary()?, folder.path()))?;
        Ok(Self { sites, _folder: Some(folder) })
    }

    /// With state, identity, socket and configuration in `dir`.
    fn start_in(dir: &Path, binary: &Path) -> Result<Self> {
        Ok(Self { sites: Sites::start(config(binary, dir))?, _folder: None })
    }

    /// `farshore ARGS`, asking this agent.
    fn cli(&self, args: &[&str]) -> Result<Ran> {
        finish(Command::new(binary()?).args(args).env("FARSHORE_AGENT_SOCKET", self.sites.agent_socket()))
    }

    fn protect(&self, source: &str, more: &[&str]) -> Result<Ran> {
        self.cli(&[&["protect", source, "--group", GROUP], more].concat())
    }

    /// Protecting `source` is refused with exit code 4, this reason and a way out; and nothing is protected that was not.
    fn refused(&self, source: &str, reason: &str) -> Result<String> {
        let before = self.volumes()?;
        let ran = self.protect(source, &["--name", "refused"])?;
        ran.refused(4, reason, true)?;
        ensure!(ran.err.contains(source), "the source is not named: {ran}");
        ensure!(self.volumes()? == before, "{source} was refused, and is protected");
        Ok(ran.err)
    }

    fn volumes(&self) -> Result<Value> {
        self.sites.agent().get("/v1/volumes")
    }

    fn stop(mut self) -> Result<()> {
        self.sites.stop_agent()?;
        self.sites.stop_target()
    }
}

fn config(binary: &Path, dir: &Path) -> SitesConfig {
    SitesConfig { ring: 8 * MIB, ..SitesConfig::new(binary, dir) }
}

/// Writes a partition table: places and lengths in MiB. To be called after [`kit`], which clears what was there.
fn partitions(disk: &str, places: &[(u64, u64)]) -> Result<()> {
    let sectors = |mib: u64| u32::try_from(mib * MIB / block(disk)).expect("a small disk").to_le_bytes();
    let mut table = vec![0; 512];
    for (at, (start, length)) in places.iter().enumerate() {
        let entry = 446 + at * 16;
        table[entry + 4] = 0x83;
        table[entry + 8..entry + 12].copy_from_slice(&sectors(*start));
        table[entry + 12..entry + 16].copy_from_slice(&sectors(*length));
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = File::options().write(true).open(disk).context("open the disk")?;
    file.write_all_at(&table, 0).and_then(|()| file.sync_all()).context("write the partition table")?;
    drop(file);
    run(&format!("blockdev --rereadpt {disk}")).map(drop)
}

/// A partition table counts in the disk's blocks.
fn block(disk: &str) -> u64 {
    if disk == crate::rig::DISK_4096 { 4096 } else { 512 }
}

/// A mounted file system on a folder of its own; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(what: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a mount point")?.keep();
        run(&format!("mount {what} {}", folder.display()))?;
        Ok(Self(folder))
    }

    fn shown(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Best effort: the next test says what is in the way.
        let _ = run(&format!("umount -R {0} || umount -R -l {0}", self.0.display()));
    }
}

/// Undoes what a test has set up, even if it failed.
struct Undo(String);

impl Drop for Undo {
    fn drop(&mut self) {
        // Best effort: the next test says what is in the way.
        let _ = run(&self.0);
    }
}

/// Clean disks without partitions, and all modules.
fn machine() -> Result<()> {
    run("swapoff -a; true")?;
    kit()?;
    run("modprobe -a btrfs ext4; for d in /dev/vda /dev/vdb; do blockdev --setrw $d; blockdev --rereadpt $d; done")
        .map(drop)
}
