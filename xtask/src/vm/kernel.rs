//! The kernel that the virtual machine boots: a Debian package, unpacked below the build folder and never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::outside::{self, Program};
use crate::process;

/// Kernels that have what the tests need (ublk with user copy and recovery, device mapper, 9p, virtio), preferred first: the
/// long-term kernel that Debian 12 carries in its security archive. The one without `+deb12` has no ublk.
const SERIES: [&str; 1] = ["linux-image-6.12"];

/// Variable with a folder that holds the `boot/` and `lib/modules/` of another kernel, for trying a newer one.
const OTHER: &str = "FARSHORE_VM_KERNEL";

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// As in `uname -r`.
    pub(crate) release: String,
    /// Holds `boot/` and `lib/modules/`.
    pub(crate) folder: PathBuf,
}

impl Kernel {
    /// The kernel that [`OTHER`] names, else the one that is unpacked below `store` already, else the newest one that apt knows,
    /// downloaded.
    ///
    /// # Errors
    /// Says what was looked for where no package can be had.
    pub(crate) fn provide(store: &Path) -> Result<Self> {
        if let Some(folder) = std::env::var_os(OTHER) {
            let folder = PathBuf::from(folder);
            let release = release_in(&folder).with_context(|| format!("{OTHER} names a folder without lib/modules"))?;
            process::output(depmod()?.arg("-b").arg(&folder).arg(&release)).context("index the kernel's modules")?;
            return Ok(Self { release, folder });
        }
        if let Some(found) = Self::unpacked(store) {
            return Ok(found);
        }
        let package = match newest_package()? {
            Some(package) => package,
            None => {
                if outside::may_install() {
                    outside::apt(&["update"])?;
                }
                newest_package()?.with_context(|| {
                    let names: Vec<_> = SERIES.iter().map(|s| format!("{s}.N+deb12-amd64")).collect();
                    format!("apt knows no kernel package {}: Debian 12 has it in bookworm-security", names.join(" or "))
                })?
            }
        };
        let download = store.join("download");
        fs::create_dir_all(&download).with_context(|| format!("make {}", download.display()))?;
        let mut fetch = Command::new("apt-get");
        // The sandbox user of apt may not be able to write here; the package's checksum is verified all the same.
        fetch.args(["--quiet", "--option", "APT::Sandbox::User=root", "download", &package]).current_dir(&download);
        if !process::stream(&mut fetch, |_| {})?.success() {
            bail!("the kernel package {package} could not be downloaded");
        }
        let deb = one_deb(&download, &package)?;
        let folder = store.join(format!("{package}.new"));
        // Left behind by a run that was broken off.
        let _ = fs::remove_dir_all(&folder);
        process::output(Command::new("dpkg").arg("-x").arg(&deb).arg(&folder)).context("unpack the kernel package")?;
        let release = release_in(&folder).with_context(|| format!("{package} holds no modules"))?;
        process::output(depmod()?.arg("-b").arg(&folder).arg(&release)).context("index the kernel's modules")?;
        let finished = store.join(&package);
        fs::rename(&folder, &finished).context("put the unpacked kernel in its place")?;
        fs::remove_dir_all(&download).context("remove the downloaded package")?;
        Ok(Self { release, folder: finished })
    }

    fn unpacked(store: &Path) -> Option<Self> {
        let mut found: Vec<(Vec<u32>, Self)> = fs::read_dir(store)
            .ok()?
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(|n| is_wanted(n) && !n.ends_with(".new")))
            .filter_map(|entry| {
                let folder = entry.path();
                let release = release_in(&folder)?;
                Some((numbers(&release), Self { release, folder }))
            })
            .collect();
        found.sort_by(|a, b| a.0.cmp(&b.0));
        found.pop().map(|(_, kernel)| kernel)
    }

    /// The boot image. Later packages keep it beside the modules.
    pub(crate) fn image(&self) -> PathBuf {
        let beside = self.modules().join("vmlinuz");
        if beside.exists() { beside } else { self.folder.join("boot").join(format!("vmlinuz-{}", self.release)) }
    }

    /// The modules' folder.
    pub(crate) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.release)
    }

    /// Paths of `names` and of all they need, in the order in which they are loaded; what is built in is left out.
    pub(crate) fn module_files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let mut modprobe = Command::new(found("modprobe")?);
            modprobe.arg("-d").arg(&self.folder).args(["-S", &self.release, "--show-depends", name]);
            for line in process::output(&mut modprobe)?.lines() {
                // `insmod /path/of/module.ko.xz parameters`, or `builtin name`.
                let Some(path) = line.strip_prefix("insmod ") else { continue };
                let path = PathBuf::from(path.split_whitespace().next().unwrap_or_default());
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }
}

fn found(name: &'static str) -> Result<PathBuf> {
    let program = Program { name, packages: &["kmod"] };
    program.find().with_context(|| format!("{name} is missing (Debian: kmod)"))
}

fn depmod() -> Result<Command> {
    Ok(Command::new(found("depmod")?))
}

fn newest_package() -> Result<Option<String>> {
    let mut names = Vec::new();
    for series in SERIES {
        let list = process::output(Command::new("apt-cache").args(["pkgnames", series]))
            .context("ask apt for kernel packages (the machine in which kernel tests run needs a Debian kernel)")?;
        names.extend(list.lines().filter(|n| is_wanted(n)).map(str::to_owned));
    }
    names.sort_by_key(|name| numbers(name));
    Ok(names.pop())
}

/// The ordinary flavour of a wanted series: not cloud (no ublk), not real-time, not debug symbols.
fn is_wanted(package: &str) -> bool {
    let plain = package.strip_suffix(".new").unwrap_or(package);
    SERIES.iter().any(|series| plain.starts_with(series))
        && plain.strip_suffix("+deb12-amd64").is_some_and(|rest| rest.ends_with(|c: char| c.is_ascii_digit()))
}

/// The numbers in a text, for ordering versions.
fn numbers(text: &str) -> Vec<u32> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|piece| piece.parse().ok()).collect()
}

fn one_deb(folder: &Path, package: &str) -> Result<PathBuf> {
    let mut files = fs::read_dir(folder).context("look for the downloaded package")?.flatten();
    let prefix = format!("{package}_");
    let deb = files.find(|f| f.file_name().to_str().is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb")));
    Ok(deb.with_context(|| format!("apt-get download left no {package}_*.deb"))?.path())
}

fn release_in(folder: &Path) -> Option<String> {
    let modules = fs::read_dir(folder.join("lib/modules")).ok()?.flatten().next()?;
    modules.file_name().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ordinary_flavour_is_taken_and_the_newest_wins() {
        assert!(is_wanted("linux-image-6.12.117+deb12-amd64"));
        for other in [
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-amd64-dbg",
            "linux-image-6.12.117+deb12-amd64-unsigned",
            "linux-image-6.12-amd64-signed-template",
            "linux-image-6.1.0-56-amd64",
        ] {
            assert!(!is_wanted(other), "{other}");
        }
        assert!(numbers("linux-image-6.12.117+deb12-amd64") > numbers("linux-image-6.12.99+deb12-amd64"));
    }
}
