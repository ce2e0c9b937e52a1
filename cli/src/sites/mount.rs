//! An NBD export as a mounted file system: nbdfuse makes a file of it, a loop device makes a block device of that file.
//! (The kernel's own NBD client would do, but not every kernel has it.)

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::run::{Running, call, find, is_root, run, text, until};

/// Looks for what this needs of the machine.
///
/// # Errors
/// Names what is missing.
pub fn need_machine() -> Result<()> {
    ensure!(is_root(), "mounting needs root");
    for node in ["/dev/fuse", "/dev/loop-control"] {
        ensure!(Path::new(node).exists(), "{node} is missing (kernel support)");
    }
    for (program, package) in
        [("nbdfuse", "nbdfuse or libnbd-bin"), ("fusermount3", "fuse3"), ("losetup", "mount"), ("e2fsck", "e2fsprogs")]
    {
        find(program, package)?;
    }
    Ok(())
}

/// A block device over an export. Dropping it takes everything apart, mounts included.
#[derive(Debug)]
pub struct Attached {
    fuse: Option<Running>,
    folder: PathBuf,
    loop_device: Option<String>,
    mounted: Option<PathBuf>,
}

impl Attached {
    /// Below `folder`, which is made.
    ///
    /// # Errors
    /// It cannot be made or a program fails.
    pub fn new(socket: &Path, folder: &Path) -> Result<Self> {
        std::fs::create_dir(folder).with_context(|| format!("create {}", folder.display()))?;
        let file = folder.join("disk");
        let fuse = Running::start(
            Command::new(find("nbdfuse", "nbdfuse")?)
                .args([text(&file)?, &format!("nbd+unix:///?socket={}", socket.display())]),
        )?;
        let mut attached = Self { fuse: Some(fuse), folder: folder.to_owned(), loop_device: None, mounted: None };
        until("nbdfuse shows its file", || {
            attached.fuse.as_mut().context("nbdfuse runs")?.check()?;
            Ok(std::fs::metadata(&file).ok().filter(|meta| meta.len() > 0).map(drop))
        })?;
        let out = call(find("losetup", "mount")?, ["--find", "--show", "--direct-io=on", text(&file)?])?;
        attached.loop_device = Some(out.trim().to_owned());
        Ok(attached)
    }

    /// The block device.
    ///
    /// # Errors
    /// It was detached.
    pub fn device(&self) -> Result<&str> {
        self.loop_device.as_deref().context("the loop device is there")
    }

    /// Mounts it; an ext4 replays its journal by that.
    ///
    /// # Errors
    /// As `mount`.
    pub fn mount(&mut self, place: &Path) -> Result<()> {
        std::fs::create_dir_all(place).with_context(|| format!("create {}", place.display()))?;
        call("mount", ["-t", "ext4", self.device()?, text(place)?])?;
        self.mounted = Some(place.to_owned());
        Ok(())
    }

    /// Unmounts it; all is on the device when this returns.
    ///
    /// # Errors
    /// As `umount`.
    pub fn unmount(&mut self) -> Result<()> {
        let place = self.mounted.take().context("it is mounted")?;
        // A process that just ended may hold it for a moment longer.
        until("the file system is unmounted", || Ok(call("umount", [text(&place)?]).ok().map(drop)))
    }

    /// `e2fsck -fn`: checks all and changes nothing.
    ///
    /// # Errors
    /// It finds something.
    pub fn check(&self) -> Result<()> {
        let ran = run(Command::new(find("e2fsck", "e2fsprogs")?).args(["-f", "-n", self.device()?]))?;
        ran.ok().context("the file system is not clean").map(drop)
    }

    /// Takes it apart in order; everything written is in the export when this returns.
    ///
    /// # Errors
    /// Something holds it.
    pub fn detach(mut self) -> Result<()> {
        if self.mounted.is_some() {
            self.unmount()?;
        }
        let device = self.loop_device.take().context("the loop device is there")?;
        call("losetup", ["--detach", &device])?;
        // The kernel may let go of the file a moment after losetup returned.
        until("the loop device is gone", || {
            let left =
                call("losetup", ["--list", "--noheadings", "--output", "BACK-FILE", &device]).unwrap_or_default();
            Ok((!left.contains(text(&self.folder)?)).then_some(()))
        })?;
        until("nbdfuse is unmounted", || Ok(call("fusermount3", ["-u", text(&self.folder)?]).ok()))?;
        self.fuse.take().context("nbdfuse runs")?.ended()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // The way of a failed test: best effort, from top to bottom.
        if let Some(place) = self.mounted.take() {
            let _ = call("umount", ["--lazy", &place.to_string_lossy()]);
        }
        if let Some(device) = self.loop_device.take() {
            let _ = call("losetup", ["--detach", &device]);
        }
        if self.fuse.take().is_some() {
            let _ = call("fusermount3", ["-u", "-z", &self.folder.to_string_lossy()]);
        }
    }
}
