//! The little file system from which the machine starts: busybox and the modules that it takes to reach the host's files.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use crate::outside;
use crate::process;

/// What reaches the host's files; everything else is loaded from there.
const MODULES: [&str; 3] = ["9pnet_virtio", "9p", "overlay"];

/// The first process: see the file.
const INIT: &str = include_str!("init.sh");

/// Where the machine finds what the runner gave it, and leaves its result.
pub(super) const SHARE: &str = "/run/farshore-vm";

/// Builds the archive into `file`; `work` is a scratch folder of the caller's.
pub(super) fn build(kernel: &Kernel, work: &Path, file: &Path) -> Result<()> {
    let root = work.join("initramfs");
    for folder in ["bin", "modules", "dev", "proc", "sys", "host", "rw", "new", "share"] {
        fs::create_dir_all(root.join(folder)).context("lay out the initramfs")?;
    }
    let busybox = outside::BUSYBOX.find().context("busybox is missing (Debian: busybox-static)")?;
    let bytes = fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?;
    // An interpreter segment names a dynamic linker, which is not in the archive.
    ensure!(
        !bytes.windows(4).any(|w| w == b"/ld-"),
        "{} is not statically linked: install busybox-static",
        busybox.display()
    );
    fs::copy(&busybox, root.join("bin/busybox")).context("copy busybox")?;
    let mut order = String::new();
    for (at, module) in kernel.module_files(&MODULES)?.iter().enumerate() {
        let name = format!("{at:02}.ko");
        unpack(module, &root.join("modules").join(&name))?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(root.join("modules/order"), order).context("list the modules")?;
    let init = root.join("init");
    fs::write(&init, INIT).context("write init")?;
    process::output(Command::new("chmod").arg("755").arg(&init).arg(root.join("bin/busybox")))?;
    pack(&root, file)
}

fn unpack(module: &Path, to: &Path) -> Result<()> {
    let is_xz = module.extension().is_some_and(|e| e == "xz");
    if !is_xz {
        fs::copy(module, to).with_context(|| format!("copy {}", module.display()))?;
        return Ok(());
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(module).output().context("start xz")?;
    ensure!(output.status.success(), "xz could not unpack {}", module.display());
    fs::write(to, output.stdout).with_context(|| format!("write {}", to.display()))
}

fn pack(root: &Path, file: &Path) -> Result<()> {
    let mut names = String::new();
    list(root, root, &mut names)?;
    let archive = fs::File::create(file).with_context(|| format!("write {}", file.display()))?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(archive)
        .spawn()
        .context("start cpio")?;
    cpio.stdin.take().context("reach cpio")?.write_all(names.as_bytes()).context("list files to cpio")?;
    ensure!(cpio.wait().context("wait for cpio")?.success(), "cpio failed");
    Ok(())
}

/// Paths below `folder` relative to `root`, folders before what they hold.
fn list(root: &Path, folder: &Path, names: &mut String) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder).context("list the initramfs")?.flatten().map(|e| e.path()).collect();
    entries.sort();
    for path in entries {
        let name = path.strip_prefix(root).context("stay inside the initramfs")?;
        names.push_str(name.to_str().context("names here are ASCII")?);
        names.push('\n');
        if path.is_dir() {
            list(root, &path, names)?;
        }
    }
    Ok(())
}
