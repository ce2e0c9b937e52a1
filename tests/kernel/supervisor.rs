//! The agent's supervisor: workers that crash, hang, are killed for want of memory, or are replaced by another program; guests that
//! go on meanwhile; and what the second site has in the end.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_ublk::DeviceState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::agent::{GROUP, Rig};
use crate::rig::{DISK_4096, Fio, Mounted, attribute, machine, run, until};

/// A load of about 20 s that checks what it wrote.
const LOAD: &str = "--rw=randwrite --bs=16k --iodepth=8 --size=40m --rate=2m --verify=crc32c";
/// One that outlasts what is done to the agent.
const LONG_LOAD: &str =
    "--rw=randwrite --bs=16k --iodepth=8 --size=40m --rate=1m --verify=crc32c --time_based --runtime=60";

fn signal(pid: u32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(i32::try_from(pid)?), signal).with_context(|| format!("send {signal} to {pid}"))
}

fn supervisor(rig: &Rig) -> Result<Value> {
    rig.sites.supervisor().get("/v1/supervisor")
}

fn is_bypassed(rig: &Rig) -> bool {
    supervisor(rig).is_ok_and(|shown| shown["bypassed"] == json!(["g/disk"]))
}

fn is_protected(rig: &Rig) -> bool {
    rig.sites.agent().get("/v1/status").is_ok_and(|status| status[0]["state"] == "protected")
}

/// Goal: where no worker lives, guests are served without one, with an alarm; a worker that lives takes the device back, everything
/// is compared, and the second site has all that was written. Method: workers find no identity, which ends each at once.
#[test]
fn guests_are_served_while_workers_crash() -> Result<()> {
    Rig::start(30, false)?.run(|rig| {
        let mut load = Fio::start(&rig.device, LONG_LOAD)?;
        let identity = rig.sites.path("agent.bundle");
        let aside = rig.sites.path("agent.bundle.aside");
        std::fs::rename(&identity, &aside)?;
        let begin = Instant::now();
        rig.sites.kill_worker()?;
        until("guests are served without a worker", || is_bypassed(rig))?;
        println!("served without a worker after {:?}", begin.elapsed());
        until("guests get answers", || {
            let before = attribute(&rig.device, "stat").unwrap_or_default();
            std::thread::sleep(Duration::from_millis(100));
            attribute(&rig.device, "stat").is_ok_and(|after| after != before)
        })?;
        ensure!(load.is_running()?, "the load has ended before the worker came back");
        let status = rig.sites.agent().get("/v1/status")?;
        ensure!(status[0]["state"] == "pass-through" && status[0]["group"] == GROUP, "{status:#}");
        let alarms = rig.sites.agent().get("/v1/alarms")?;
        ensure!(alarms[0]["code"] == "agent.bypassed", "{alarms:#}");
        let refused = rig.sites.agent().post("/v1/wait", &json!({ "group": GROUP })).expect_err("no worker");
        ensure!(format!("{refused:#}").contains("worker is down"), "{refused:#}");

        std::fs::rename(&aside, &identity)?;
        rig.sites.await_worker(None)?;
        ensure!(!is_bypassed(rig), "the worker serves, and the pass-through too");
        let text = rig.sites.logs().join("\n");
        ensure!(text.contains("was served without capture: everything is compared"), "nothing is compared");
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: a pass-through outlives neither its supervisor nor the knowledge that it was: the next agent compares everything. Method: both
/// are killed while guests are served without a worker.
#[test]
fn what_went_past_the_filter_is_not_forgotten() -> Result<()> {
    Rig::start(31, false)?.run(|rig| {
        let load = Fio::start(&rig.device, LOAD)?;
        let identity = rig.sites.path("agent.bundle");
        let aside = rig.sites.path("agent.bundle.aside");
        std::fs::rename(&identity, &aside)?;
        rig.sites.kill_worker()?;
        until("guests are served without a worker", || is_bypassed(rig))?;
        std::thread::sleep(Duration::from_secs(1));
        rig.sites.kill_agent();
        until("the device waits", || rig.state().is_ok_and(|state| state == DeviceState::Quiesced))?;
        std::fs::rename(&aside, &identity)?;
        rig.sites.start_agent()?;
        rig.sites.await_worker(None)?;
        load.finish()?;
        let text = rig.sites.logs().join("\n");
        ensure!(text.contains("was served without capture: everything is compared"), "nothing is compared");
        rig.check_replica()
    })
}

/// Goal: workers that die of a fault of their own again and again are not waited for. Method: `SIGABRT`, as a panic gives, at each
/// worker as soon as it runs.
#[test]
fn a_crash_loop_ends_in_a_pass_through() -> Result<()> {
    Rig::start(32, false)?.run(|rig| {
        let load = Fio::start(&rig.device, LONG_LOAD)?;
        let mut last = None;
        until("guests are served without a worker", || {
            let pid = rig.sites.agent_pid();
            if let Some(pid) = pid.filter(|_| pid != last) {
                let _ = signal(pid, Signal::SIGABRT);
                last = Some(pid);
            }
            is_bypassed(rig)
        })?;
        ensure!(supervisor(rig)?["crashes_in_row"].as_u64() >= Some(3), "{:#}", supervisor(rig)?);
        rig.sites.await_worker(None)?;
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: a worker that is killed for want of memory is followed by the next, and nobody sees an error or a resync. Method: the
/// kernel's own killer, by a control group that is too small for the worker.
#[test]
fn workers_are_killed_for_want_of_memory() -> Result<()> {
    Rig::test(33, |rig| {
        run("mkdir -p /sys/fs/cgroup && (mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup)")?;
        run("echo +memory > /sys/fs/cgroup/cgroup.subtree_control")?;
        let load = Fio::start(&rig.device, LOAD)?;
        for round in 0..3 {
            let victim = rig.sites.await_worker(None)?;
            let group = format!("/sys/fs/cgroup/small{round}");
            run(&format!("mkdir -p {group} && echo {victim} > {group}/cgroup.procs"))?;
            // What it has stays charged elsewhere; what it takes from now on is too much.
            run(&format!("echo 64k > {group}/memory.max"))?;
            let killed = || std::fs::read_to_string(format!("{group}/memory.events")).unwrap_or_default();
            until("the killer comes", || {
                killed().lines().any(|line| line.starts_with("oom_kill ") && line != "oom_kill 0")
            })?;
            rig.sites.await_worker(Some(victim))?;
            rig.check_nothing_missing()?;
        }
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: a host that is short of memory and swaps to another device goes on through kills of the worker: nobody waits for somebody
/// who waits for him. Method: a hog that takes more than there is, and a file system on the protected device full of dirty pages.
#[test]
fn kills_while_the_host_swaps() -> Result<()> {
    Rig::test(34, |rig| {
        run(&format!("mkfs.ext4 -q -F {}", rig.device.display()))?;
        rig.sites.wait(GROUP, 240)?;
        let mounted = Mounted::new(&rig.device)?;
        run(&format!("mkswap {DISK_4096} && swapon {DISK_4096}"))?;
        let hog = Hog::start()?;
        let file = mounted.folder().join("data");
        let mut load = std::process::Command::new("timeout")
            .args([
                "600",
                "fio",
                "--name=job",
                "--ioengine=psync",
                "--rw=write",
                "--bs=64k",
                "--size=24m",
                "--verify=crc32c",
                "--loops=3",
            ])
            .arg("--end_fsync=1")
            .arg(format!("--filename={}", file.display()))
            .stdout(std::process::Stdio::null())
            .spawn()
            .context("start fio")?;
        let mut kills = 0;
        let mut swapped = 0;
        while load.try_wait()?.is_none() && kills < 12 {
            std::thread::sleep(Duration::from_millis(rig.random(1500)));
            rig.kill_and_restart()?;
            kills += 1;
            swapped = swapped.max(used_swap()?);
        }
        let status = load.wait()?;
        drop(hog);
        ensure!(status.success(), "fio: {status}");
        println!("{kills} kills; at most {} MiB were swapped out", swapped >> 10);
        ensure!(kills > 0 && swapped > 0, "no kill while the host swapped");
        mounted.unmount()?;
        run(&format!("fsck.ext4 -fn {}", rig.device.display()))?;
        rig.check_replica()
    })
}

/// Takes more memory than there is, and goes on writing to some of it, here and there: a host that swaps all the time is one, a host
/// that does nothing else is not. Ends when dropped, swap included.
struct Hog {
    writer: std::process::Child,
    folder: tempfile::TempDir,
}

impl Hog {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let path = folder.path().display();
        // So much more than there is that the host has to swap, and so little that the swap takes it.
        let megabytes = (memory("MemAvailable:")? >> 10) + 300;
        run(&format!("mount -t tmpfs -o size=100% hog {path}"))?;
        run(&format!("dd if=/dev/zero of={path}/hog bs=1M count={megabytes}"))?;
        let parts = megabytes / 32;
        let again = format!(
            "part=0; while dd if=/dev/zero of={path}/hog bs=32M count=1 seek=$part conv=notrunc 2>/dev/null; do \
             part=$(( (part + 7) % {parts} )); sleep 0.3; done"
        );
        let writer = std::process::Command::new("sh").args(["-c", &again]).spawn().context("start the hog")?;
        Ok(Self { writer, folder })
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        // The next test says what is in its way.
        let _ = self.writer.kill();
        let _ = self.writer.wait();
        let _ = run(&format!("umount -l {}; swapoff {DISK_4096}", self.folder.path().display()));
    }
}

/// KiB.
fn used_swap() -> Result<u64> {
    Ok(memory("SwapTotal:")? - memory("SwapFree:")?)
}

/// A value of /proc/meminfo, KiB.
fn memory(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("a line of /proc/meminfo")?;
    line.trim().trim_end_matches(" kB").parse().context("a number")
}

/// Goal: the supervisor's death changes nothing; the next one takes the worker for its own, and follows it.
#[test]
fn a_worker_outlives_its_supervisor() -> Result<()> {
    Rig::test(35, |rig| {
        let load = Fio::start(&rig.device, LOAD)?;
        let worker = rig.sites.await_worker(None)?;
        rig.sites.kill_supervisor();
        rig.sites.start_agent()?;
        ensure!(rig.sites.await_worker(None)? == worker, "another worker was started");
        rig.check_nothing_missing()?;
        rig.sites.kill_worker()?;
        rig.sites.await_worker(Some(worker))?;
        rig.check_nothing_missing()?;
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: another program goes on under load, without an error or a resync; its supervisor becomes that program, too.
#[test]
fn an_upgrade_under_load() -> Result<()> {
    Rig::test(36, |rig| {
        let binary = std::env::var("FARSHORE_BIN").context("FARSHORE_BIN")?;
        let copy = rig.sites.path("farshore-next");
        std::fs::copy(&binary, &copy)?;
        let load = Fio::start(&rig.device, LOAD)?;
        let before = rig.sites.await_worker(None)?;
        let socket = rig.sites.agent_socket();
        let text = run(&format!("{binary} --json agent upgrade {} --socket {}", copy.display(), socket.display()))?;
        let done: Value = serde_json::from_str(text.trim()).with_context(|| text.clone())?;
        println!("guests waited {} s for the new program", done["pause_s"]);
        std::fs::remove_file(&copy)?;
        ensure!(rig.sites.await_worker(Some(before))? != before, "the old worker serves");
        rig.check_nothing_missing()?;
        let pid = rig.sites.supervisor_pid().context("it runs")?;
        until("the supervisor becomes the new program", || {
            std::fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.to_string_lossy().contains("memfd:farshore"))
        })?;
        // And works as one.
        rig.sites.await_worker(None)?;
        rig.kill_and_restart()?;
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: a program that cannot take over is refused before anything happens, and one that fails later is replaced by the old one.
#[test]
fn upgrades_that_fail_change_nothing() -> Result<()> {
    Rig::test(37, |rig| {
        let load = Fio::start(&rig.device, LOAD)?;
        let worker = rig.sites.await_worker(None)?;
        let upgrade = |path: &Path| rig.sites.supervisor().post("/v1/upgrade", &json!({ "binary": path }));
        for (path, part) in
            [("/bin/false", "cannot take over"), ("/no/such/file", "read the program"), ("/bin/echo", "no agent")]
        {
            let error = format!("{:#}", upgrade(Path::new(path)).expect_err(path));
            ensure!(error.contains(part), "{path}: {error}");
        }
        ensure!(rig.sites.await_worker(None)? == worker, "another worker was started");

        let (source, liar) = (rig.sites.path("liar.c"), rig.sites.path("liar"));
        let mut says = serde_json::to_value(farshore_agent::supervisor::Abilities::own())?;
        let program = |says: &Value| {
            let says = serde_json::to_string(&says.to_string()).expect("a string");
            std::fs::write(
                &source,
                format!(
                    "#include <stdio.h>\n#include <string.h>\nint main(int c, char **v) {{\n\
                     if (c > 2 && !strcmp(v[2], \"check\")) {{ puts({says}); return 0; }}\n\
                     return 1;\n}}\n"
                ),
            )?;
            run(&format!("cc -o {} {}", liar.display(), source.display()))
        };
        for part in ["ring_layout", "roster_format"] {
            let own = std::mem::replace(&mut says[part], json!(1000));
            program(&says)?;
            let error = format!("{:#}", upgrade(&liar).expect_err("it reads something else"));
            ensure!(error.contains("1000"), "{part}: {error}");
            ensure!(rig.sites.await_worker(None)? == worker, "another worker was started");
            says[part] = own;
        }
        program(&says)?;
        let error = format!("{:#}", upgrade(&liar).expect_err("it never serves"));
        ensure!(error.contains("the old one goes on"), "{error}");
        rig.sites.await_worker(Some(worker))?;
        rig.check_nothing_missing()?;
        load.finish()?;
        rig.check_replica()
    })
}

/// Goal: a file system that was mounted before the agent started is let go by the agent's own namespace when the host unmounts it.
#[test]
fn the_agents_mounts_hold_nothing() -> Result<()> {
    machine()?;
    Rig::test(38, |rig| {
        run(&format!("mkfs.ext4 -q -F {}", rig.device.display()))?;
        let mounted = Mounted::new(&rig.device)?;
        rig.kill_all_and_restart()?;
        ensure!(supervisor(rig)?["own_mounts"] == true, "the agent shares the host's mounts");
        let pid = rig.sites.supervisor_pid().context("it runs")?;
        let name = rig.device.display().to_string();
        until("the agent does not see the mount", || {
            std::fs::read_to_string(format!("/proc/{pid}/mounts")).is_ok_and(|mounts| !mounts.contains(&name))
        })?;
        ensure!(std::fs::read_to_string("/proc/self/mounts")?.contains(&name), "the host's mount is gone");
        mounted.unmount()?;
        run(&format!("fsck.ext4 -fn {}", rig.device.display()))?;
        until("all is well", || is_protected(rig))
    })
}
