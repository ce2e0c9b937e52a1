//! What the host gives: udev, memory, settings of the kernel, clock, processor.

use std::path::Path;

use farshore_proto::text::show_size;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Host;
use super::finding::Finding;

/// Our rules for udev.
const RULES: &str = "60-farshore.rules";

/// Where udev reads rules, the first wins.
const RULES_FOLDERS: [&str; 4] = ["etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d", "lib/udev/rules.d"];

/// What each connection asks for as its socket's buffers (`Transport::socket_buffer` of the link).
const SOCKET_BUFFER: u64 = 8 << 20;

pub(super) fn check(host: &Host, ring: u64, ring_dir: &Path) -> Vec<Finding> {
    let mut findings = vec![udev(host), rules(host)];
    findings.extend(memory_locks(host, ring));
    findings.push(ring_folder(host, ring, ring_dir));
    findings.extend(sysctls(host));
    findings.push(clock(farshore_uring::is_clock_synchronised().ok()));
    findings.push(processor());
    findings
}

fn has_udev(host: &Host) -> bool {
    host.path("run/udev/control").exists()
}

fn udev(host: &Host) -> Finding {
    let check = "udev.daemon";
    if has_udev(host) {
        return Finding::ok(check, "running");
    }
    let means = "devices have only the kernel's names (/dev/ublkbN, /dev/dm-N): no links by UUID, label or path; stubs get \
                 their link from Farshore";
    Finding::warning(check, "not running", means).mend("start systemd-udevd, or name devices by the kernel's names")
}

fn rules(host: &Host) -> Finding {
    let check = "udev.rules";
    let installed = RULES_FOLDERS.iter().map(|folder| host.path(folder).join(RULES)).find(|file| file.exists());
    match installed {
        Some(file) => Finding::ok(check, file.display().to_string()),
        None if !has_udev(host) => Finding::ok(check, "not needed without udev"),
        None => {
            let means = "udev finds the same file system on a volume and on the device below it: links by UUID and label may lead \
                         past Farshore";
            Finding::warning(check, format!("{RULES} is not installed"), means).mend("farshore install-units")
        }
    }
}

/// Bit of `CAP_IPC_LOCK` in `CapEff`: no limit counts with it.
const CAP_IPC_LOCK: u32 = 14;

fn memory_locks(host: &Host, ring: u64) -> Vec<Finding> {
    let status = host.read("proc/self/status").unwrap_or_default();
    let free = has_capability(&status, CAP_IPC_LOCK);
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    let mut findings = vec![memory_lock(limit, free, ring)];
    let overcommit = host.read("proc/sys/vm/overcommit_memory");
    if overcommit.as_deref() == Some("2") {
        let means = "the ring's memory may be refused when the host is close to its commit limit: the agent does not start then";
        let finding = Finding::warning("memory.overcommit", "vm.overcommit_memory is 2 (strict)", means);
        findings.push(finding.mend("leave room: vm.overcommit_ratio, or vm.overcommit_memory=0"));
    }
    findings
}

fn has_capability(status: &str, bit: u32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> bit & 1 == 1)
}

/// `free`: this process may lock without limit.
fn memory_lock(limit: u64, free: bool, ring: u64) -> Finding {
    let check = "memory.lock";
    if free || limit == RLIM_INFINITY {
        return Finding::ok(check, "no limit for this user");
    }
    let found = format!("at most {} may be locked, a ring has {}", show_size(limit), show_size(ring));
    if limit >= ring {
        return Finding::ok(check, found);
    }
    let means =
        "the ring may be paged out: under memory pressure a write waits for the swap device (alarm ring.unlocked)";
    Finding::warning(check, found, means)
        .mend("LimitMEMLOCK=infinity in the agent's unit (ours has it), or `ulimit -l unlimited` as root")
}

fn ring_folder(host: &Host, ring: u64, folder: &Path) -> Finding {
    let check = "memory.ring-folder";
    let shown = folder.display();
    // The agent makes it, where there is none yet.
    let below = |folder: &Path| host.path(folder.strip_prefix("/").unwrap_or(folder));
    let above = folder.parent().filter(|above| above.parent().is_some() && !below(folder).exists());
    let folder = below(above.unwrap_or(folder));
    let (Ok(room), Ok(kind)) = (nix::sys::statvfs::statvfs(&folder), nix::sys::statfs::statfs(&folder)) else {
        let means = "the ring has no place that survives the agent's death: every restart compares everything";
        return Finding::problem(check, format!("{shown} is not there"), means).mend("mount a tmpfs there");
    };
    if kind.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
        let means = "the ring goes through the page cache to a disk: slower, and the disk may be a protected one";
        return Finding::warning(check, format!("{shown} is no tmpfs"), means).mend("set `ring_dir` to a tmpfs");
    }
    let (size, free) = (room.blocks() * room.fragment_size(), room.blocks_available() * room.fragment_size());
    let found = format!("{shown}: {} of {} are free, a ring has {}", show_size(free), show_size(size), show_size(ring));
    if free >= ring {
        return Finding::ok(check, found);
    }
    let means = "there is no room for one more ring: a new group cannot start";
    Finding::warning(check, found, means).mend(format!("mount -o remount,size=… {shown}, or a smaller `ring`"))
}

fn sysctls(host: &Host) -> Vec<Finding> {
    let number = |name: &str| host.read(&format!("proc/sys/{}", name.replace('.', "/")))?.parse::<u64>().ok();
    let mut findings = Vec::new();
    for name in ["net.core.rmem_max", "net.core.wmem_max"] {
        let check = if name.contains("rmem") { "sysctl.rmem" } else { "sysctl.wmem" };
        let Some(value) = number(name) else { continue };
        let found = format!("{name} is {value}");
        findings.push(if value >= SOCKET_BUFFER {
            Finding::ok(check, found)
        } else if host.is_root {
            Finding::ok(check, found).means("root (CAP_NET_ADMIN) takes larger buffers nevertheless")
        } else {
            let means = format!("bursts of the link lose packets: {SOCKET_BUFFER} bytes are asked for");
            Finding::warning(check, found, means)
                .mend(format!("sysctl -w {name}={SOCKET_BUFFER}, and the same in /etc/sysctl.d/60-farshore.conf"))
        });
    }
    if number("kernel.hung_task_panic") == Some(1) {
        let seconds = number("kernel.hung_task_timeout_secs").unwrap_or(120);
        let means = format!("a guest that waits {seconds} s for an agent that is down takes the whole host with it");
        let finding = Finding::warning("sysctl.hung-task", "kernel.hung_task_panic is 1", means);
        findings.push(
            finding.mend("sysctl -w kernel.hung_task_panic=0, or see that an agent is always restarted (systemd)"),
        );
    }
    if number("vm.panic_on_oom").is_some_and(|value| value > 0) {
        let means = "the host panics where it could kill a process; what was not shipped is compared after the reboot";
        let finding = Finding::warning("sysctl.oom", "vm.panic_on_oom is set", means);
        findings.push(finding.mend("sysctl -w vm.panic_on_oom=0"));
    }
    if number("vm.memfd_noexec") == Some(2) {
        let means =
            "the supervisor cannot keep its program in memory, and depends on the disk that the program lies on";
        let finding = Finding::warning("sysctl.memfd", "vm.memfd_noexec is 2", means);
        findings.push(finding.mend("sysctl -w vm.memfd_noexec=1"));
    }
    findings
}

fn clock(synchronised: Option<bool>) -> Finding {
    let check = "clock";
    let means = "recovery points carry wrong times; certificates may seem expired, or not valid yet";
    match synchronised {
        Some(true) => Finding::ok(check, "synchronised"),
        Some(false) => Finding::warning(check, "nothing keeps it right", means)
            .mend("enable systemd-timesyncd or chrony: timedatectl set-ntp true"),
        None => Finding::warning(check, "unknown: the kernel does not say", means).mend("timedatectl status"),
    }
}

#[cfg(target_arch = "x86_64")]
fn processor() -> Finding {
    let has = [
        ("AES", std::arch::is_x86_feature_detected!("aes")),
        ("PCLMULQDQ", std::arch::is_x86_feature_detected!("pclmulqdq")),
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
    ];
    let missing: Vec<&str> = has.iter().filter(|(_, there)| !there).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Finding::ok("processor", "AES, PCLMULQDQ and AVX2 are there");
    }
    let means = "sealing and hashing take several times as much processor time: less is shipped per second";
    Finding::warning("processor", format!("without {}", missing.join(", ")), means)
        .mend("of a virtual machine: give it the host's processor model")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> Finding {
    Finding::ok("processor", std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let folder = tempfile::tempdir().expect("room");
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("not the root")).expect("room");
            std::fs::write(path, text).expect("room");
        }
        let host = Host { is_root: false, ..Host::at(folder.path()) };
        (folder, host)
    }

    #[test]
    fn rules_matter_where_udev_runs() {
        let (_folder, none) = host(&[]);
        assert_eq!((udev(&none).level, rules(&none).level), (Level::Warning, Level::Ok));
        let (_folder, without) = host(&[("run/udev/control", "")]);
        assert_eq!((udev(&without).level, rules(&without).level), (Level::Ok, Level::Warning));
        let (_folder, with) = host(&[("run/udev/control", ""), ("etc/udev/rules.d/60-farshore.rules", "")]);
        assert_eq!(rules(&with).level, Level::Ok);
    }

    #[test]
    fn a_ring_above_the_limit_is_a_warning() {
        assert_eq!(memory_lock(8 << 20, false, 256 << 20).level, Level::Warning);
        assert_eq!(memory_lock(8 << 20, true, 256 << 20).level, Level::Ok);
        assert_eq!(memory_lock(256 << 20, false, 256 << 20).level, Level::Ok);
        assert_eq!(memory_lock(RLIM_INFINITY, false, 256 << 20).level, Level::Ok);
        assert!(has_capability("Name:\tx\nCapEff:\t0000000000004000\n", CAP_IPC_LOCK));
        assert!(!has_capability("CapEff:\t0000000000003fff\n", CAP_IPC_LOCK) && !has_capability("", CAP_IPC_LOCK));
    }

    #[test]
    fn settings_that_hurt_are_named() {
        let (_folder, good) =
            host(&[("proc/sys/net/core/rmem_max", "8388608"), ("proc/sys/kernel/hung_task_panic", "0")]);
        assert!(sysctls(&good).iter().all(|finding| finding.level == Level::Ok));
        let (_folder, bad) = host(&[
            ("proc/sys/net/core/rmem_max", "212992"),
            ("proc/sys/kernel/hung_task_panic", "1"),
            ("proc/sys/vm/panic_on_oom", "2"),
            ("proc/sys/vm/memfd_noexec", "2"),
        ]);
        let found: Vec<_> = sysctls(&bad).into_iter().map(|finding| (finding.check, finding.level)).collect();
        let expected = ["sysctl.rmem", "sysctl.hung-task", "sysctl.oom", "sysctl.memfd"];
        assert_eq!(found, expected.map(|check| (check, Level::Warning)));
    }

    #[test]
    fn a_ring_needs_a_tmpfs_with_room() {
        let (folder, host) = host(&[]);
        assert_eq!(ring_folder(&host, 1, Path::new("/none")).level, Level::Problem);
        let shm = Host::at(Path::new("/"));
        let finding = ring_folder(&shm, u64::MAX, Path::new("/dev/shm"));
        assert!(finding.level == Level::Warning && finding.found.contains("are free"), "{finding:?}");
        drop(folder);
    }

    #[test]
    fn a_clock_that_nobody_keeps_is_a_warning() {
        assert_eq!(
            [Some(true), Some(false), None].map(|it| clock(it).level),
            [Level::Ok, Level::Warning, Level::Warning]
        );
    }
}
