//! Volumes of a running agent as block devices of the kernel: kills, stops, and what the second site has in the end.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use farshore_cli::sites::{Sites, SitesConfig};
use farshore_ublk::{Control, DeviceState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rig::{DISK_512, Fio, Mounted, fio, machine, pattern, run, until};

pub(crate) const GROUP: &str = "g";
pub(crate) const VOLUME: &str = "disk";
pub(crate) const MIB: u64 = 1 << 20;
/// Size of the protected partition.
const PARTITION_BYTES: u64 = 64 * MIB;
/// The machine emulates its processor: syncs and shipping take their time.
pub(crate) const LIMIT_SECONDS: u64 = 240;

/// What a failed test shows of the log of each daemon.
const LOG_LINES: usize = 60;
/// What a failed test shows of the machine: its processes but the kernel's own, what they wait for, and what there is of mounts and memory.
const PROCESSES: &str = "ps --ppid 2 -p 2 --deselect -o pid,ppid,stat,etime,time,rss,wchan:24,args | cut -c1-160; \
                         echo mounts: $(wc -l </proc/self/mountinfo); df /tmp /dev/shm; free -m";

/// How long a write to a slow disk takes, in milliseconds: long beside the restart of an agent's first steps.
const SLOW_MS: u32 = 700;
/// Name of the device that makes a disk slow.
const SLOW: &str = "farshore-slow";

/// A partition of the machine's first disk, or a slow device over it. Gone when dropped, so that the other tests find the disk as it
/// was.
struct Partition {
    slow: bool,
}

impl Partition {
    const START: u64 = MIB;

    fn make(slow: bool) -> Result<Self> {
        let sectors = |bytes: u64| u32::try_from(bytes / 512).expect("a small disk").to_le_bytes();
        let mut table = vec![0; 512];
        table[446 + 4] = 0x83;
        table[446 + 8..446 + 12].copy_from_slice(&sectors(Self::START));
        table[446 + 12..446 + 16].copy_from_slice(&sectors(PARTITION_BYTES));
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        let mut partition = Self { slow: false };
        write_table(&table)?;
        // What an earlier test has left there must not be synced.
        run(&format!("blkdiscard -f {}", partition.path().display()))?;
        if slow {
            let (below, sectors) = (partition.path(), PARTITION_BYTES / 512);
            let below = below.display();
            run("modprobe dm-delay")?;
            run(&format!(
                "DM_DISABLE_UDEV=1 dmsetup create {SLOW} --table '0 {sectors} delay {below} 0 0 {below} 0 {SLOW_MS}'"
            ))?;
            partition.slow = true;
        }
        Ok(partition)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(if self.slow { format!("/dev/mapper/{SLOW}") } else { format!("{DISK_512}1") })
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        let removed =
            if self.slow { run(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry {SLOW}")).map(drop) } else { Ok(()) };
        // Best effort: the next test that needs the disk says what is in the way.
        let _ = removed.and_then(|()| write_table(&[0; 512]));
    }
}

fn write_table(table: &[u8]) -> Result<()> {
    let disk = File::options().write(true).open(DISK_512).context("open the disk")?;
    disk.write_all_at(table, 0).and_then(|()| disk.sync_all()).context("write the partition table")?;
    drop(disk);
    run(&format!("blockdev --rereadpt {DISK_512}")).map(drop)
}

/// Both sites, and a protected device.
pub(crate) struct Rig {
    pub(crate) sites: Sites,
    pub(crate) device: PathBuf,
    pub(crate) control: Control,
    /// What agents said that are dead now.
    past: Vec<String>,
    random: u64,
    _folder: TempDir,
    /// What made the protected device, taken apart last.
    _below: Box<dyn Any>,
}

impl Rig {
    /// Protects the partition over ublk, and waits until it is at the second site.
    pub(crate) fn start(seed: u64, slow: bool) -> Result<Self> {
        let control = machine()?;
        let partition = Partition::make(slow)?;
        Self::over(seed, control, &partition.path(), Box::new(partition), |_| {})
    }

    /// Protects `source` over ublk, and waits until it is at the second site. `below` is what made it.
    pub(crate) fn over(
        seed: u64,
        control: Control,
        source: &Path,
        below: Box<dyn Any>,
        configure: impl FnOnce(&mut SitesConfig),
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let binary = std::env::var_os("FARSHORE_BIN").context("FARSHORE_BIN names the binary under test")?;
        let mut config = SitesConfig { ring: 256 * MIB, ..SitesConfig::new(binary, folder.path()) };
        // The machine emulates its processors, and shares them: what is to be tried is not how fast a process starts.
        config.agent_toml = "worker_gap_max = '60s'\nworker_hang_max = '6s'\n".to_owned();
        configure(&mut config);
        let sites = Sites::start(config)?;
        let body = json!({ "source": source, "group": GROUP, "name": VOLUME, "frontend": "ublk" });
        let volume = sites.agent().post("/v1/protect", &body)?;
        let device = PathBuf::from(volume["device"].as_str().context("a device")?);
        let rig = Self { sites, device, control, past: Vec::new(), random: seed, _folder: folder, _below: below };
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        Ok(rig)
    }

    /// A pseudo-random number below `end` (SplitMix64).
    pub(crate) fn random(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    pub(crate) fn id(&self) -> Result<u32> {
        let name = self.device.to_str().context("a plain path")?;
        name.trim_start_matches("/dev/ublkb").parse().context("a device's number")
    }

    pub(crate) fn state(&self) -> Result<DeviceState> {
        Ok(self.control.info(self.id()?)?.state())
    }

    pub(crate) fn device_now(&self) -> Result<Value> {
        Ok(self.sites.agent().get("/v1/volumes")?[0]["device"].clone())
    }

    /// `kill -9` of the agent's worker; its supervisor starts a new one, which has to find everything.
    pub(crate) fn kill_and_restart(&mut self) -> Result<()> {
        let victim = self.sites.agent_pid();
        self.sites.kill_worker()?;
        self.sites.await_worker(victim)?;
        self.check_found()
    }

    /// `kill -9` of the agent as a whole, and a new one, which has to find everything.
    pub(crate) fn kill_all_and_restart(&mut self) -> Result<()> {
        self.past.extend(self.sites.logs());
        self.sites.kill_agent();
        self.sites.start_agent()?;
        self.sites.await_worker(None)?;
        self.check_found()
    }

    /// What dead agents said is of no account any more.
    pub(crate) fn forget_logs(&mut self) {
        self.past.clear();
    }

    fn check_found(&self) -> Result<()> {
        ensure!(self.device_now()? == json!(self.device), "the device is {}", self.device_now()?);
        self.check_nothing_missing()
    }

    /// Nothing was ever marked missing, so nothing is to be compared or sent a second time.
    pub(crate) fn check_nothing_missing(&self) -> Result<()> {
        let status = &self.sites.agent().get("/v1/status")?[0];
        let good = status["tier"] == "ring" && status["missing_bytes"] == 0 && status["ring_closed_count"] == 0;
        ensure!(good, "something is missing: {status:#}");
        Ok(())
    }

    /// Writes that the dead agents had handed to the disk and not published yet, as those after them found.
    pub(crate) fn writes_cut_off(&self) -> u64 {
        let lines = self.past.iter().cloned().chain(self.sites.logs());
        let found = lines.filter(|line| line.contains("ring of the last process found"));
        found.filter_map(|line| line.split_once("writing=")?.1.split_whitespace().next()?.parse::<u64>().ok()).sum()
    }

    /// No agent, alive or dead, said that it compares anything, or that somebody must act.
    pub(crate) fn check_logs(&self) -> Result<()> {
        let logs = self.past.iter().cloned().chain(self.sites.logs());
        let bad = |line: &String| line.contains("compared") || line.contains(" ERROR ") || line.contains("panicked");
        match logs.into_iter().find(bad) {
            Some(line) => bail!("a daemon said: {line}"),
            None => Ok(()),
        }
    }

    /// Opens the newest point as a block device.
    fn open_view(&self) -> Result<View> {
        self.open_view_at("latest")
    }

    /// Opens a point as a block device.
    pub(crate) fn open_view_at(&self, point: &str) -> Result<View> {
        let body = json!({ "group": GROUP, "at": point, "export": "ublk", "read_only": false });
        let view = self.sites.target().post("/v1/view/open", &body)?;
        let device = PathBuf::from(view["volumes"][0]["device"].as_str().context("a device")?);
        Ok(View { id: view["id"].clone(), device })
    }

    pub(crate) fn close_view(&self, view: &View) -> Result<()> {
        self.sites.target().post("/v1/view/close", &json!({ "id": view.id })).map(drop)
    }

    /// All that was written is at the second site: byte for byte.
    pub(crate) fn check_replica(&self) -> Result<()> {
        self.sites.wait(GROUP, LIMIT_SECONDS)?;
        let view = self.open_view()?;
        run(&format!("cmp {} {}", self.device.display(), view.device.display()))?;
        self.close_view(&view)?;
        ensure!(!view.device.exists(), "{} is still there", view.device.display());
        Ok(())
    }

    /// Ends the protection; nothing of it stays in the kernel.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.sites.agent().post("/v1/unprotect", &json!({ "volume": VOLUME }))?;
        ensure!(!self.device.exists(), "{} is still there", self.device.display());
        ensure!(self.control.list()?.is_empty(), "devices are left: {:?}", self.control.list()?);
        self.sites.stop_agent()?;
        self.sites.stop_target()
    }

    /// Runs a test; says what the daemons said if it fails.
    pub(crate) fn test(seed: u64, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        Self::test_on(seed, false, test)
    }

    /// The same over a disk whose writes take their time.
    fn test_on(seed: u64, slow: bool, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        Self::start(seed, slow)?.run(|rig| test(rig).and_then(|()| rig.check_logs()))
    }

    /// Runs a test and ends the protection; says what the daemons said if it fails.
    pub(crate) fn run(mut self, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match test(&mut self) {
            Ok(()) => self.finish(),
            Err(error) => {
                let logs: Vec<_> = self.past.iter().cloned().chain(self.sites.logs()).collect();
                let (agent, target): (Vec<_>, Vec<_>) = logs.into_iter().partition(|line| line.starts_with("agent: "));
                // Each has its own end: one that says much must not hide the other.
                let tail = |lines: &[String]| lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
                let processes = run(PROCESSES).unwrap_or_else(|error| format!("{error:#}"));
                let (agent, target) = (tail(&agent), tail(&target));
                Err(error.context(format!(
                    "logs of the daemons:\n{agent}\n{target}\n\nprocesses:\n{processes}\nwhat failed"
                )))
            }
        }
    }
}

/// An open view.
pub(crate) struct View {
    id: Value,
    pub(crate) device: PathBuf,
}

/// Longest time between a start and the next kill, in milliseconds.
const KILL_AFTER_MS: u64 = 1200;

/// Kills the agent's worker `kills` times under a load that checks what it reads; the load must see nothing of it.
fn kill_under_load(rig: &mut Rig, kills: u32, options: &str) -> Result<()> {
    kill_under_load_by(rig, kills, KILL_AFTER_MS, options, Rig::kill_and_restart)
}

/// The same, killed by `kill`, up to `after_ms` milliseconds after the last start.
pub(crate) fn kill_under_load_by(
    rig: &mut Rig,
    kills: u32,
    after_ms: u64,
    options: &str,
    kill: impl Fn(&mut Rig) -> Result<()>,
) -> Result<()> {
    let mut load = Fio::start(&rig.device, options)?;
    let mut busy = 0;
    for killed in 0..kills {
        std::thread::sleep(Duration::from_millis(rig.random(after_ms)));
        // Every second kill hits requests, on a machine of any speed; the others what they find.
        let is_aimed = killed % 2 == 1;
        loop {
            // Writes and the reads that verify them alternate for as long as there are kills to come.
            if !load.is_running()? {
                load.finish()?;
                load = Fio::start(&rig.device, options)?;
            }
            let hits = is_busy(&rig.device)?;
            if hits || !is_aimed {
                busy += u32::from(hits);
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        kill(rig)?;
    }
    load.finish()?;
    println!("{kills} kills: {busy} hit requests under way, {} writes were cut off", rig.writes_cut_off());
    rig.check_nothing_missing()
}

fn is_busy(device: &Path) -> Result<bool> {
    Ok(crate::rig::attribute(device, "inflight")?.split_whitespace().any(|n| n != "0"))
}

/// Goal: a killed agent costs its guests no error, the stream no record, and nobody a resync. Method: kills at random moments under
/// verified load, then the newest point against the source.
#[test]
fn twenty_kills_of_the_agent_under_verified_load() -> Result<()> {
    Rig::test(20, |rig| {
        let options = "--rw=randwrite --bsrange=4k-64k --iodepth=16 --size=24m --numjobs=2 --offset_increment=32m --rate=2m \
                       --verify=crc32c --group_reporting";
        kill_under_load(rig, 20, options)?;
        rig.check_replica()
    })
}

/// Goal: the same while writes of the dead agent are still on their way to the disk when the next one comes: it waits for them.
#[test]
fn kills_of_the_agent_over_a_slow_disk() -> Result<()> {
    Rig::test_on(8, true, |rig| {
        let options = "--rw=randwrite --bs=16k --iodepth=16 --size=8m --numjobs=2 --offset_increment=32m \
                       --verify=crc32c --group_reporting";
        kill_under_load(rig, 8, options)?;
        ensure!(rig.writes_cut_off() > 50, "only {} writes were under way", rig.writes_cut_off());
        rig.check_replica()
    })
}

/// Goal: the same while nobody takes the stream, and with supervisor and worker killed together: the ring holds it through all kills,
/// and the next agent ships it.
#[test]
fn kills_of_the_agent_while_the_target_is_down() -> Result<()> {
    Rig::test(5, |rig| {
        rig.sites.kill_target();
        let options = "--rw=randwrite --bs=16k --iodepth=16 --size=32m --rate=4m --verify=crc32c";
        kill_under_load_by(rig, 8, KILL_AFTER_MS, options, Rig::kill_all_and_restart)?;
        rig.sites.start_target()?;
        rig.check_replica()
    })
}

/// Goal: a worker that stands still is found out, killed and followed by another; its guests wait, and no more.
#[test]
fn a_worker_that_stands_still_is_replaced() -> Result<()> {
    Rig::test(10, |rig| {
        let load = Fio::start(&rig.device, "--rw=randwrite --bs=16k --iodepth=8 --size=16m --rate=2m --verify=crc32c")?;
        let stopped = rig.sites.await_worker(None)?;
        std::thread::sleep(Duration::from_secs(1));
        kill(Pid::from_raw(i32::try_from(stopped)?), Signal::SIGSTOP)?;
        rig.sites.await_worker(Some(stopped))?;
        load.finish()?;
        rig.check_nothing_missing()?;
        rig.check_replica()
    })
}

/// Goal: neither a stop nor `unprotect` takes a device away under a mounted file system, or from a process that has it open; both
/// take it away when nobody uses it. And a view's file system can be mounted.
#[test]
fn a_mounted_file_system_keeps_its_device() -> Result<()> {
    Rig::test(3, |rig| {
        run(&format!("mkfs.ext4 -q -F {}", rig.device.display()))?;
        let mounted = Mounted::new(&rig.device)?;
        let unprotect = |rig: &Rig| rig.sites.agent().post("/v1/unprotect", &json!({ "volume": VOLUME }));
        let refused = unprotect(rig).expect_err("it is mounted");
        ensure!(format!("{refused:#}").contains("in use"), "{refused:#}");

        let bytes = pattern(3, 4 << 20);
        std::fs::write(mounted.folder().join("before"), &bytes)?;
        rig.sites.stop_agent()?;
        until("the device waits", || rig.state().is_ok_and(|state| state == DeviceState::Quiesced))?;
        let writer = std::thread::spawn({
            let (path, bytes) = (mounted.folder().join("meanwhile"), bytes.clone());
            move || -> std::io::Result<()> {
                let mut file = File::create(path)?;
                file.write_all(&bytes)?;
                file.sync_all()
            }
        });
        rig.sites.start_agent()?;
        writer.join().expect("the writer only writes")?;
        rig.check_nothing_missing()?;

        mounted.unmount()?;
        let open = File::open(&rig.device)?;
        let refused = unprotect(rig).expect_err("it is open");
        ensure!(format!("{refused:#}").contains("has it open"), "{refused:#}");
        drop(open);
        rig.sites.stop_agent()?;
        ensure!(!rig.device.exists(), "nobody uses it, and it is still there");
        rig.sites.start_agent()?;
        ensure!(rig.device_now()? == json!(rig.device), "another number: {}", rig.device_now()?);
        rig.check_nothing_missing()?;
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;

        let view = rig.open_view()?;
        run(&format!("cmp {} {}", rig.device.display(), view.device.display()))?;
        let mounted = Mounted::new(&view.device)?;
        for file in ["before", "meanwhile"] {
            ensure!(std::fs::read(mounted.folder().join(file))? == bytes, "{file} is another in the view");
        }
        std::fs::write(mounted.folder().join("in the view"), &bytes)?;
        let refused = rig.close_view(&view).expect_err("it is mounted");
        ensure!(format!("{refused:#}").contains("in use"), "{refused:#}");
        mounted.unmount()?;
        rig.close_view(&view)?;
        ensure!(!view.device.exists(), "{} is still there", view.device.display());
        Ok(())
    })
}

/// Goal: what a killed target leaves of its views in the kernel is removed, and the views are served again.
#[test]
fn views_come_back_after_a_crash_of_the_target() -> Result<()> {
    Rig::test(4, |rig| {
        fio(&rig.device, "--rw=randwrite --bs=16k --iodepth=8 --size=4m")?;
        rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        let view = rig.open_view()?;
        rig.sites.kill_target();
        until("the view's disk goes with its process", || !view.device.exists())?;
        rig.sites.start_target()?;
        let views = rig.sites.target().get("/v1/views")?;
        let device = PathBuf::from(views[0]["volumes"][0]["device"].as_str().context("a device")?);
        run(&format!("cmp {} {}", rig.device.display(), device.display()))?;
        ensure!(rig.control.list()?.len() == 2, "devices are left: {:?}", rig.control.list()?);
        rig.close_view(&View { id: views[0]["id"].clone(), device })
    })
}

/// Goal: a number that is taken is refused by name, and nothing is left of the attempt. A free one is given.
#[test]
fn a_device_of_a_certain_number() -> Result<()> {
    Rig::test(6, |rig| {
        let image = rig.sites.path("image");
        File::create(&image)?.set_len(MIB)?;
        let protect = |number: u32| {
            let body =
                json!({ "source": image, "group": "other", "name": "image", "frontend": format!("ublk:{number}") });
            rig.sites.agent().post("/v1/protect", &body)
        };
        let refused = protect(rig.id()?).expect_err("it is taken");
        ensure!(format!("{refused:#}").contains("exists already"), "{refused:#}");
        ensure!(rig.sites.agent().get("/v1/volumes")?.as_array().map(Vec::len) == Some(1));
        let volume = protect(41)?;
        ensure!(volume["device"] == "/dev/ublkb41", "{volume:#}");
        fio(Path::new("/dev/ublkb41"), "--rw=write --bs=64k --size=1m --verify=crc32c")?;
        rig.sites.agent().post("/v1/unprotect", &json!({ "volume": "image" })).map(drop)
    })
}
