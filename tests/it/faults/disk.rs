//! Disks that are small, fail or hang. A small tmpfs stands for the disk, or holds it; both need root.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FallocateFlags, fallocate};

use farshore_cli::sites::run::{call, is_root};

/// A tmpfs that is unmounted at the end.
pub(crate) struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    pub(crate) fn mount(size: u64) -> Result<Self> {
        ensure!(is_root(), "mounting a small tmpfs needs root");
        let folder = tempfile::Builder::new().prefix("fs-disk-").tempdir()?;
        let options = format!("size={size}");
        let place = folder.path().to_str().context("a temporary folder's name is text")?;
        call("mount", ["-t", "tmpfs", "-o", &options, "farshore-test", place])?;
        Ok(Self { folder })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// Takes so many bytes away.
    pub(crate) fn fill(&self, bytes: u64) -> Result<()> {
        let file = File::create_new(self.path().join("filler")).context("create the filler")?;
        fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(bytes)?).context("fill the disk")
    }

    pub(crate) fn empty(&self) -> Result<()> {
        std::fs::remove_file(self.path().join("filler")).context("remove the filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a daemon of a failed test may still run.
        let place = self.folder.path().to_string_lossy().into_owned();
        let _ = call("umount", ["--lazy", &place]);
    }
}

/// A file system that hangs or fails when it is told to: ext4 on a sparse image in a [`SmallDisk`]. Frozen, it lets nobody write; without
/// room below it, each write to a block that the image has not got yet is an I/O error.
pub(crate) struct BadDisk {
    below: SmallDisk,
    place: tempfile::TempDir,
}

impl BadDisk {
    pub(crate) fn mount(size: u64) -> Result<Self> {
        let below = SmallDisk::mount(size)?;
        let image = below.path().join("image");
        File::create_new(&image).and_then(|file| file.set_len(size)).context("make the image")?;
        let place = tempfile::Builder::new().prefix("fs-bad-").tempdir()?;
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a temporary folder's name is text");
        // No journal and no reserve: what is written is what the test's file needs.
        call("mkfs.ext4", ["-q", "-O", "^has_journal", "-m", "0", "-E", "nodiscard", &text(&image)?])?;
        call("mount", ["-o", "loop", &text(&image)?, &text(place.path())?])?;
        Ok(Self { below, place })
    }

    pub(crate) fn path(&self) -> &Path {
        self.place.path()
    }

    pub(crate) fn hang(&self) -> Result<()> {
        self.freeze("--freeze")
    }

    pub(crate) fn go_on(&self) -> Result<()> {
        self.freeze("--unfreeze")
    }

    fn freeze(&self, how: &str) -> Result<()> {
        call("fsfreeze", [how, self.path().to_str().context("text")?]).map(drop)
    }

    /// From now on writes fail; see above.
    pub(crate) fn fail(&self) -> Result<()> {
        let stat = nix::sys::statvfs::statvfs(self.below.path()).context("look at the disk")?;
        self.below.fill(stat.blocks_available() * stat.fragment_size())
    }

    pub(crate) fn heal(&self) -> Result<()> {
        self.below.empty()
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let _ = self.go_on();
        let _ = call("umount", ["--lazy", &self.place.path().to_string_lossy()]);
    }
}
