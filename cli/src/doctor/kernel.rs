//! What the kernel can do: its version and options, ublk and each of its features, io_uring, the device mapper.

use std::path::Path;
use std::process::Command;

use farshore_ublk::dm::Interposer;
use farshore_ublk::{Control, Error, ErrorKind, Features};

use super::Host;
use super::finding::Finding;

/// Oldest kernel on which everything that protection needs is there.
const KERNEL_MIN: (u32, u32) = (6, 1);

pub(super) fn check(host: &Host) -> Vec<Finding> {
    let release = host.read("proc/sys/kernel/osrelease").unwrap_or_default();
    let mut findings = vec![version(&release)];
    findings.push(io_uring(host.read("proc/sys/kernel/io_uring_disabled").as_deref(), host.is_root));
    match Control::open() {
        Ok(control) => {
            findings.push(Finding::ok("ublk.driver", "loaded and answering"));
            findings.extend(features(control.features()));
        }
        Err(error) => findings.push(no_ublk(&error, option(host, &release, "BLK_DEV_UBLK", "ublk_drv"))),
    }
    findings.push(match Interposer::open() {
        Ok(_) => Finding::ok("dm.driver", "loaded and answering"),
        Err(error) => no_device_mapper(&error, option(host, &release, "BLK_DEV_DM", "dm_mod")),
    });
    findings
}

fn version(release: &str) -> Finding {
    let check = "kernel.version";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL_MIN => Finding::ok(check, format!("Linux {release}")),
        (Some(_), Some(_)) => {
            let means =
                "block devices of this host cannot be protected; image files and virtual machines can, over NBD";
            let (major, minor) = KERNEL_MIN;
            Finding::problem(check, format!("Linux {release}, before {major}.{minor}"), means)
                .mend(format!("boot Linux {major}.{minor} or later, or use --frontend nbd+unix:PATH"))
        }
        _ => Finding::warning(check, "unknown: /proc/sys/kernel/osrelease cannot be read", "nothing can be said of it"),
    }
}

/// `setting` is that of `kernel.io_uring_disabled`; none: a kernel before Linux 6.6, which has no such switch.
fn io_uring(setting: Option<&str>, is_root: bool) -> Finding {
    let check = "kernel.io_uring";
    let mend = "sysctl -w kernel.io_uring_disabled=0, and the same in /etc/sysctl.d/60-farshore.conf";
    match setting {
        Some("2") => {
            Finding::problem(check, "forbidden (kernel.io_uring_disabled is 2)", "the agent cannot run").mend(mend)
        }
        Some("1") if !is_root => {
            let found =
                "allowed to root and to the group in kernel.io_uring_group only (kernel.io_uring_disabled is 1)";
            Finding::warning(check, found, "an agent that does not run as root cannot run").mend(mend)
        }
        _ => match farshore_uring::Reactor::<farshore_uring::AlignedBuf>::new(2) {
            Ok(_) => Finding::ok(check, "works"),
            Err(error) => Finding::problem(check, format!("does not work here: {error}"), "the agent cannot run")
                .mend("allow io_uring in the container's or the unit's seccomp profile"),
        },
    }
}

/// Whether a kernel option is there, as far as anybody tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum KernelOption {
    BuiltIn,
    Module,
    Missing,
    Unknown,
}

fn option(host: &Host, release: &str, name: &str, module: &str) -> KernelOption {
    let modules = host.path("lib/modules").join(release);
    let listed = |file: &str| {
        let text = std::fs::read_to_string(modules.join(file)).ok()?;
        Some(text.lines().any(|line| is_module(line, module)))
    };
    match config(host, release).map(|config| value(&config, name)) {
        Some(Some('y')) => KernelOption::BuiltIn,
        Some(Some('m')) if listed("modules.dep") == Some(false) => KernelOption::Missing,
        Some(Some('m')) => KernelOption::Module,
        Some(_) => KernelOption::Missing,
        None => match (listed("modules.builtin"), listed("modules.dep")) {
            (Some(true), _) => KernelOption::BuiltIn,
            (_, Some(true)) => KernelOption::Module,
            (Some(false), Some(false)) => KernelOption::Missing,
            _ => KernelOption::Unknown,
        },
    }
}

/// The configuration with which the kernel was built.
fn config(host: &Host, release: &str) -> Option<String> {
    if let Some(text) = host.read(&format!("boot/config-{release}")) {
        return Some(text);
    }
    let packed = host.path("proc/config.gz");
    if !packed.exists() {
        return None;
    }
    let output = Command::new("gzip").arg("-dc").arg(packed).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}

/// `CONFIG_NAME=y` or `=m`; none: not set.
fn value(config: &str, name: &str) -> Option<char> {
    let start = format!("CONFIG_{name}=");
    config.lines().find_map(|line| line.strip_prefix(&start))?.chars().next()
}

/// Whether a line of `modules.dep` or `modules.builtin` is about a module, in either spelling.
fn is_module(line: &str, module: &str) -> bool {
    let file = line.split(':').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
    file.split('.').next().is_some_and(|name| name.replace('-', "_") == module)
}

fn no_ublk(error: &Error, option: KernelOption) -> Finding {
    let check = "ublk.driver";
    let means = "block devices of this host cannot be protected; image files and virtual machines can, over NBD";
    let found = farshore_agent::chain(error);
    match (error.kind(), option) {
        (ErrorKind::Permission, _) => {
            Finding::warning(check, found, "what it can do is not known").mend("run this as root")
        }
        (_, KernelOption::Missing) => {
            let found = "this kernel has no ublk (CONFIG_BLK_DEV_UBLK)";
            Finding::problem(check, found, means)
                .mend("boot a kernel with CONFIG_BLK_DEV_UBLK (not every cloud flavour has it), or use --frontend nbd+unix:PATH")
        }
        (ErrorKind::NoDriver, KernelOption::Module | KernelOption::Unknown) => {
            let mend =
                "modprobe ublk_drv, and a line `ublk_drv` in /etc/modules-load.d/farshore.conf; --repair loads it now";
            Finding::problem(check, found, means).mend(mend)
        }
        _ => Finding::problem(check, found, means),
    }
}

fn no_device_mapper(error: &Error, option: KernelOption) -> Finding {
    let check = "dm.driver";
    let means = "no device can be protected while it is mounted (protect --dm); those that are not in use can";
    let found = farshore_agent::chain(error);
    match (error.kind(), option) {
        (ErrorKind::Permission, _) => {
            Finding::warning(check, found, "what it can do is not known").mend("run this as root")
        }
        (_, KernelOption::Missing) => {
            Finding::warning(check, "this kernel has no device mapper (CONFIG_BLK_DEV_DM)", means)
                .mend("boot a kernel with CONFIG_BLK_DEV_DM")
        }
        (ErrorKind::NoDriver, KernelOption::Module | KernelOption::Unknown) => {
            let mend =
                "modprobe dm_mod, and a line `dm_mod` in /etc/modules-load.d/farshore.conf; --repair loads it now";
            Finding::warning(check, found, means).mend(mend)
        }
        _ => Finding::warning(check, found, means),
    }
}

/// A feature of the driver: its check, its name in [`Features::names`], what is used without it, and from which Linux on it is there.
struct Feature {
    check: &'static str,
    name: &'static str,
    without: &'static str,
    since: &'static str,
    /// Nothing works without it.
    needed: bool,
}

const FEATURES: [Feature; 6] = [
    Feature {
        check: "ublk.recovery",
        name: "recovery",
        without: "a device ends with the agent that serves it: its guests get I/O errors when the agent is killed",
        since: "6.1",
        needed: true,
    },
    Feature {
        check: "ublk.reissue",
        name: "recovery-reissue",
        without: "requests under way when the agent is killed fail",
        since: "6.1",
        needed: true,
    },
    Feature {
        check: "ublk.ioctl-codes",
        name: "ioctl-codes",
        without: "the command numbers of Linux 6.1 are spoken: no drawback",
        since: "6.4",
        needed: false,
    },
    Feature {
        check: "ublk.user-copy",
        name: "user-copy",
        without: "buffers are swapped: every write holds a buffer of the longest request until it is shipped, so the ring \
                  closes sooner under small writes; give it more memory (`ring`)",
        since: "6.5",
        needed: false,
    },
    Feature {
        check: "ublk.update-size",
        name: "update-size",
        without: "a volume that grows gets a new ublk device below its name; the guest notices a pause",
        since: "6.16",
        needed: false,
    },
    Feature {
        check: "ublk.quiesce",
        name: "quiesce",
        without: "an agent that is upgraded ends before the next one takes its devices over; requests wait for about a second",
        since: "6.16",
        needed: false,
    },
];

fn features(features: Features) -> Vec<Finding> {
    let names = features.names();
    let Some(_) = features.bits() else {
        // Before Linux 6.5 the driver does not tell; 6.1 has what is needed, and nothing else.
        return FEATURES.iter().map(|feature| missing(feature, feature.needed)).collect();
    };
    FEATURES.iter().map(|feature| missing(feature, names.contains(&feature.name))).collect()
}

fn missing(feature: &Feature, there: bool) -> Finding {
    if there {
        return Finding::ok(feature.check, "there");
    }
    let found = format!("not there (Linux {} has it)", feature.since);
    if feature.needed {
        Finding::problem(feature.check, found, feature.without).mend("boot a later kernel")
    } else if feature.check == "ublk.user-copy" {
        Finding::warning(feature.check, found, feature.without).mend("boot a later kernel, or raise `ring`")
    } else {
        Finding::ok(feature.check, found).means(feature.without)
    }
}

/// Loads what is missing and can be loaded; what was done.
pub(super) fn load_modules() -> Vec<String> {
    let mut done = Vec::new();
    let mut load = |module: &str| {
        let loaded = Command::new("modprobe").arg(module).output().is_ok_and(|output| output.status.success());
        if loaded {
            done.push(format!("loaded the module {module}"));
        }
    };
    if Control::open().is_err_and(|error| error.kind() == ErrorKind::NoDriver)
        && !Path::new("/sys/module/ublk_drv").exists()
    {
        load("ublk_drv");
    }
    if Interposer::open().is_err_and(|error| error.kind() == ErrorKind::NoDriver) {
        load("dm_mod");
    }
    done
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    #[test]
    fn kernels_before_the_floor_are_a_problem() {
        for (release, level) in [
            ("6.1.0-13-amd64", Level::Ok),
            ("6.12.38+deb12", Level::Ok),
            ("7.0", Level::Ok),
            ("5.15.0-91-generic", Level::Problem),
            ("6.0.9", Level::Problem),
            ("", Level::Warning),
        ] {
            assert_eq!(version(release).level, level, "{release}");
        }
    }

    #[test]
    fn io_uring_is_forbidden_to_some_or_to_all() {
        assert_eq!(io_uring(Some("2"), true).level, Level::Problem);
        assert_eq!(io_uring(Some("1"), false).level, Level::Warning);
    }

    /// Goal: options are found in either place, in the words of both.
    #[test]
    fn options_of_the_kernel() {
        let folder = tempfile::tempdir().expect("room");
        let host = Host::at(folder.path());
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("not the root")).expect("room");
            std::fs::write(path, text).expect("room");
        };
        let ublk = || option(&host, "6.1", "BLK_DEV_UBLK", "ublk_drv");
        assert_eq!(ublk(), KernelOption::Unknown);
        write("lib/modules/6.1/modules.builtin", "kernel/drivers/md/dm-mod.ko\n");
        write("lib/modules/6.1/modules.dep", "kernel/drivers/block/loop.ko:\n");
        assert_eq!(ublk(), KernelOption::Missing);
        assert_eq!(option(&host, "6.1", "BLK_DEV_DM", "dm_mod"), KernelOption::BuiltIn);
        write("lib/modules/6.1/modules.dep", "kernel/drivers/block/ublk_drv.ko.xz: a.ko\n");
        assert_eq!(ublk(), KernelOption::Module);
        write("boot/config-6.1", "CONFIG_BLK_DEV_UBLK_X=y\n# CONFIG_BLK_DEV_UBLK is not set\n");
        assert_eq!(ublk(), KernelOption::Missing);
        write("boot/config-6.1", "CONFIG_BLK_DEV_UBLK=m\n");
        assert_eq!(ublk(), KernelOption::Module);
        write("boot/config-6.1", "CONFIG_BLK_DEV_UBLK=y\n");
        assert_eq!(ublk(), KernelOption::BuiltIn);
    }

    /// Goal: every feature has a finding, and its fallback where it is not there.
    #[test]
    fn features_that_are_missing_name_the_fallback() {
        for feature in &FEATURES {
            assert_eq!(missing(feature, true).level, Level::Ok);
            let finding = missing(feature, false);
            assert!(finding.found.contains(feature.since) && finding.means.is_some(), "{finding:?}");
            assert_eq!(finding.level == Level::Problem, feature.needed, "{finding:?}");
        }
    }
}
