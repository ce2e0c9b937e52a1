//! Power cuts: the volume, the state directory and the activity log lie on one disk whose writes are logged (`dm-log-writes`). At a random
//! moment under load the host "goes down": all that was not flushed by then is taken off the disk again, the ring is gone, and the
//! agent finds another boot. The second site lives on, with what had reached it: also with writes that the disk has lost.

mod database;
mod ledger;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farshore_tests::log_writes;
use farshore_uring::AlignedBuf;
use farshore_uring::sim::SimRng;
use nix::libc;

use crate::agent::{GROUP, LIMIT_SECONDS, MIB, Rig};
use crate::agent_dm::bypass::OtherBoot;
use crate::rig::{DISK_512, DISK_4096, Fio, fio, machine, run, say, until};

use ledger::Ledger;

const LOGGED: &str = "farshore-cut";
const DATA: &str = "farshore-cut-data";
const STATE: &str = "farshore-cut-state";
const BLOCK: u64 = 4096;
/// 80 extents, more than may be active; no more than that, for all of it is compared after each cut, by an emulated processor.
const DATA_BYTES: u64 = 320 * MIB;
const STATE_BYTES: u64 = 64 * MIB;
const EXTENTS_MAX: u64 = 64;
const EXTENT_BYTES: u64 = 4 * MIB;
/// Cuts of the test that always runs, and of the long one.
const CUTS: u32 = 3;
const CUTS_LONG: u32 = 100;

/// The host's one disk, and what is on it after the cuts so far.
struct Disk {
    /// Blocks that are not zeroes.
    content: BTreeMap<u64, Vec<u8>>,
    /// The agent's state directory, mounted.
    mounted: PathBuf,
    random: SimRng,
}

impl Disk {
    fn make(seed: u64) -> Result<Self> {
        run("modprobe dm-log-writes")?;
        run(&format!("blkdiscard -f -z -l {} {DISK_4096}", DATA_BYTES + STATE_BYTES))?;
        let disk = Self { content: BTreeMap::new(), mounted: PathBuf::new(), random: SimRng::new(seed) };
        disk.up()?;
        run(&format!("mkfs.ext4 -q -F /dev/mapper/{STATE}"))?;
        Ok(disk)
    }

    /// The devices, with a fresh log.
    fn up(&self) -> Result<()> {
        let sectors = |bytes: u64| bytes / 512;
        let create =
            |name: &str, table: &str| run(&format!("DM_DISABLE_UDEV=1 dmsetup create {name} --table '{table}'"));
        run(&format!("blkdiscard -f -z -l {MIB} {DISK_512}"))?;
        let all = sectors(DATA_BYTES + STATE_BYTES);
        create(LOGGED, &format!("0 {all} log-writes {DISK_4096} {DISK_512}"))?;
        create(DATA, &format!("0 {} linear /dev/mapper/{LOGGED} 0", sectors(DATA_BYTES)))?;
        let state = format!("0 {} linear /dev/mapper/{LOGGED} {}", sectors(STATE_BYTES), sectors(DATA_BYTES));
        create(STATE, &state).map(drop)
    }

    fn mount(&mut self, at: &Path) -> Result<()> {
        at.clone_into(&mut self.mounted);
        run(&format!("mkdir -p {0} && mount /dev/mapper/{STATE} {0}", at.display())).map(drop)
    }

    /// From here on nothing reaches the disk.
    fn cut(&self) -> Result<()> {
        run(&format!("dmsetup message {LOGGED} 0 mark cut")).map(drop)
    }

    fn down(&self) -> Result<()> {
        run(&format!("umount {}", self.mounted.display()))?;
        for name in [DATA, STATE, LOGGED] {
            run(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry {name}"))?;
        }
        Ok(())
    }

    /// Takes off the disk what was written to it and not flushed before the cut: all of it, but for what a disk may have written out by itself. That
    /// is any of the writes before the next flush, whole or in part: a block is one or the other. The kernel's log has a write when it was flushed, so what is
    /// behind the mark was not.
    fn lose(&mut self) -> Result<Lost> {
        run(&format!("blockdev --flushbufs {DISK_512} && blockdev --flushbufs {DISK_4096}"))?;
        let log = File::open(DISK_512).context("open the log")?;
        let entries = log_writes::read(|at, buf| log.read_exact_at(buf, at))?;
        let is_cut = |entry: &log_writes::Entry| entry.mark.as_deref() == Some("cut");
        let cut = entries.iter().position(is_cut).context("the log has the cut")?;
        for entry in &entries[..cut] {
            for at in 0..entry.len / BLOCK {
                self.note(entry, at)?;
            }
        }
        let disk = File::options().write(true).open(DISK_4096).context("open the disk")?;
        let zeroes = vec![0; usize::try_from(BLOCK)?];
        let writes = |entries: &[log_writes::Entry]| entries.iter().filter(|entry| entry.len > 0).count();
        let mut lost = Lost { kept: writes(&entries[..cut]), lost: 0, written_out: 0, torn: 0 };
        // Whatever came after a flush of later on may have waited for that.
        let mut loose = true;
        for entry in &entries[cut..] {
            loose &= !entry.flush;
            let blocks = entry.len / BLOCK;
            let mut stays = 0;
            let fate = if loose { self.random.below(3) } else { 0 };
            for at in 0..blocks {
                if fate == 1 || fate == 2 && self.random.chance(1, 2) {
                    self.note(entry, at)?;
                    stays += 1;
                }
                let number = entry.offset / BLOCK + at;
                disk.write_all_at(self.content.get(&number).unwrap_or(&zeroes), number * BLOCK)
                    .context("take it back")?;
            }
            match stays {
                0 => lost.lost += usize::from(blocks > 0),
                all if all == blocks => lost.written_out += 1,
                _ => lost.torn += 1,
            }
        }
        disk.sync_all().context("sync the disk")?;
        drop(disk);
        run(&format!("blockdev --flushbufs {DISK_4096}"))?;
        Ok(lost)
    }

    /// One block of a write is on the disk.
    fn note(&mut self, entry: &log_writes::Entry, at: u64) -> Result<()> {
        let number = entry.offset / BLOCK + at;
        let at = usize::try_from(at * BLOCK)?;
        let bytes = entry.data.get(at..at + usize::try_from(BLOCK)?).filter(|_| !entry.discard);
        match bytes.filter(|bytes| bytes.iter().any(|byte| *byte != 0)) {
            Some(bytes) => _ = self.content.insert(number, bytes.to_vec()),
            None => _ = self.content.remove(&number),
        }
        Ok(())
    }
}

/// What became of the writes of a life: those that were flushed, and of the others those that are gone, there, or there in part.
struct Lost {
    kept: usize,
    lost: usize,
    written_out: usize,
    torn: usize,
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Best effort: the next test says what is in the way.
        let _ = self.down();
    }
}

/// What a start after a cut has to do.
struct Found {
    missing: u64,
    active: u64,
    /// The activity log said what to compare; else it did not cover everything at that moment.
    by_log: bool,
}

/// The host goes down, and comes back. `promised` notes what users were promised by then; `die` ends whoever uses the device, which fails them from then on; `check` sees the disk before an agent does.
fn power_cut(
    rig: &mut Rig,
    disk: &mut Disk,
    boot: &OtherBoot,
    number: u32,
    promised: impl FnOnce(),
    die: impl FnOnce() -> Result<()> + Send,
    check: impl FnOnce() -> Result<()>,
) -> Result<Found> {
    let begin = Instant::now();
    rig.sites.link().cut();
    promised();
    disk.cut()?;
    let id = rig.id()?;
    rig.forget_logs();
    rig.sites.kill_agent();
    // Whoever waits for the device has an error: he is as dead as the host. It goes when all of them have.
    let control = &rig.control;
    std::thread::scope(|scope| {
        let death = scope.spawn(die);
        let removed = control.delete_anyway(id).context("remove the device");
        death.join().expect("its panic is the test's").and(removed)
    })?;
    run("rm -rf /dev/shm/farshore*/*")?;
    disk.down()?;
    let Lost { kept, lost, written_out, torn } = disk.lose()?;
    disk.up()?;
    let at = disk.mounted.clone();
    disk.mount(&at)?;
    check()?;
    boot.again(number)?;
    let down = begin.elapsed();
    rig.sites.start_agent()?;
    rig.sites.await_worker(None)?;
    rig.device = rig.device_now()?.as_str().context("a device")?.into();
    let status = &rig.sites.agent().get("/v1/status")?[0];
    let logged = |part: &str| rig.sites.logs().iter().any(|line| line.contains(part));
    let by_log = logged("what the activity log names is compared");
    // The machine may have been too slow for the log just then: that is recorded, or all is compared without a reason.
    ensure!(by_log != logged("covers_last=false"), "it is said");
    ensure!(by_log != logged("everything is compared"), "only what was active is compared");
    let missing = status["missing_bytes"].as_u64().context("a number")?;
    let active = status["activity_log"]["active_extents"].as_u64().context("a number")?;
    say(&format!(
        "cut {number}: {kept} writes kept, {lost} lost, {written_out} written out, {torn} torn; {} of {} MiB to be compared; down for {:.1} s, served {:.1} s later",
        missing / MIB,
        DATA_BYTES / MIB,
        down.as_secs_f64(),
        (begin.elapsed() - down).as_secs_f64()
    ));
    ensure!(lost > 0, "a disk that loses nothing shows nothing");
    Ok(Found { missing, active, by_log })
}

/// The newest point is what is on the disk itself, byte for byte. Reading that through the agent, too, and both by way of the page cache in
/// pieces of its choice, took most of a cut's time.
fn check_disk(rig: &Rig, disk: &Path) -> Result<()> {
    rig.sites.wait(GROUP, LIMIT_SECONDS)?;
    let view = rig.open_view_at("latest")?;
    let open = |path: &Path| {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
        file.with_context(|| format!("open {}", path.display()))
    };
    let (source, replica) = (open(disk)?, open(&view.device)?);
    let piece = usize::try_from(MIB)?;
    let (mut wanted, mut got) = (AlignedBuf::zeroed(piece), AlignedBuf::zeroed(piece));
    for at in (0..DATA_BYTES).step_by(piece) {
        source.read_exact_at(&mut wanted, at).context("read the disk")?;
        replica.read_exact_at(&mut got, at).context("read the newest point")?;
        if wanted[..] != got[..] {
            let first = wanted.iter().zip(got.iter()).position(|(wanted, got)| wanted != got).unwrap_or_default();
            bail!("the newest point differs from the disk at byte {}", at + u64::try_from(first)?);
        }
    }
    drop((source, replica));
    rig.close_view(&view)
}

/// Sizes of the load's writes: some are of several blocks, which a disk may write out in part.
const SIZES: &str = "--bssplit=4k/80:16k/20";

/// Goal: after power cuts under load source and replica are the same again after a compare of what was active or had not reached the second site, and of nothing
/// else. Method: see the head of this file; a load that goes all over the volume, and one that stays in a part of it.
#[test]
fn after_power_cuts_only_what_was_active_is_compared() -> Result<()> {
    power_cuts(CUTS)
}

/// The same for about half an hour: `FARSHORE_KERNEL_FILTER="--ignored power_cut --nocapture" cargo xtask test kernel`.
#[test]
#[ignore = "takes half an hour"]
fn a_hundred_power_cuts() -> Result<()> {
    let cuts = match std::env::var("FARSHORE_CUTS") {
        Ok(text) => text.parse().context("FARSHORE_CUTS is a number")?,
        Err(_) => CUTS_LONG,
    };
    power_cuts(cuts)
}

fn power_cuts(cuts: u32) -> Result<()> {
    let control = machine()?;
    let boot = OtherBoot::begin(u32::MAX)?;
    let mut made = Some(Disk::make(31)?);
    let mut mounted = None;
    let source = Path::new("/dev/mapper").join(DATA);
    let rig = Rig::over(31, control, &source, Box::new(()), |config| {
        // An emulated disk takes its time.
        config.agent_toml += &format!("al_extents = {EXTENTS_MAX}\n[group.{GROUP}]\nstall_max = '1s'\n");
        mounted = made.take().map(|mut disk| disk.mount(&config.dir.join("agent")).map(|()| disk));
    })?;
    let mut disk = mounted.context("it was mounted")??;
    say("both sites are up and the same");
    let mut ledger = Ledger::default();
    rig.run(|rig| {
        let mut by_log = 0;
        for number in 1..=cuts {
            // Written over and over with flushes of its own, as a database does; the second site gets all of it soon.
            // Where it goes everywhere it is slow enough for what leaves the log to be at the second site by then.
            let area = if number % 2 == 1 {
                "--size=24m --offset=64m --rate_iops=1000 --fsync=50"
            } else {
                "--size=312m --offset=4m --rate_iops=40 --fsync=8"
            };
            let options =
                format!("--rw=randwrite {SIZES} --iodepth=8 --allow_file_create=0 --time_based --runtime=600 {area}");
            let mut load = Fio::start(&rig.device, &options)?;
            let writing = ledger.start(&rig.device)?;
            until("flushes are answered", || writing.flushes() > 1)?;
            std::thread::sleep(Duration::from_millis(2500 + rig.random(4000)));
            ensure!(load.is_running()?, "the load goes on until the cut");
            let flushes = writing.flushes();
            let note = writing.note();
            let die = || load.fail().map(drop);
            let found = power_cut(rig, &mut disk, &boot, number, note, die, || writing.end(&source))?;
            say(&format!("cut {number}: all of at least {flushes} answered flushes are on the disk"));
            ensure!(found.active <= EXTENTS_MAX, "{} extents are active", found.active);
            by_log += u32::from(found.by_log);
            // What was active, and a little beside it that had left the log and not reached the second site.
            let most = EXTENTS_MAX * EXTENT_BYTES + DATA_BYTES / 16;
            ensure!(!found.by_log || found.missing <= most, "{} bytes are to be compared", found.missing);
            let begin = Instant::now();
            rig.sites.link().heal();
            check_disk(rig, &source)?;
            say(&format!("cut {number}: compared and checked after {:.1} s", begin.elapsed().as_secs_f64()));
        }
        say(&format!("the log told {by_log} of {cuts} times what to compare"));
        ensure!(by_log > cuts / 2, "the log covered everything {by_log} of {cuts} times");
        rig.check_replica()
    })?;
    drop(disk);
    Ok(())
}

/// A file system of its own for the log. Thawed and unmounted when dropped.
struct LogDisk(PathBuf);

impl LogDisk {
    fn make(at: &Path) -> Result<Self> {
        run(&format!("mkfs.ext4 -q -F {DISK_4096} 65536 && mkdir -p {0} && mount {DISK_4096} {0}", at.display()))?;
        Ok(Self(at.to_owned()))
    }

    fn freeze(&self) -> Result<()> {
        run(&format!("fsfreeze --freeze {}", self.0.display())).map(drop)
    }

    fn thaw(&self) -> Result<()> {
        run(&format!("fsfreeze --unfreeze {}", self.0.display())).map(drop)
    }
}

impl Drop for LogDisk {
    fn drop(&mut self) {
        let _ = self.thaw();
        let _ = run(&format!("umount {}", self.0.display()));
    }
}

/// Goal: a log whose disk hangs keeps no guest (I1), which is said; when the disk comes back the log covers everything again. Method: the log's file
/// system is frozen under a load that goes to cold extents all the time.
#[test]
fn a_log_that_hangs_keeps_nobody() -> Result<()> {
    let control = machine()?;
    let (mut log, sectors) = (None, DATA_BYTES / 512);
    run(&format!("blkdiscard -f -z -l {DATA_BYTES} {DISK_512}"))?;
    run(&format!("DM_DISABLE_UDEV=1 dmsetup create {DATA} --table '0 {sectors} linear {DISK_512} 0'"))?;
    let source = Path::new("/dev/mapper").join(DATA);
    let rig = Rig::over(32, control, &source, Box::new(()), |config| {
        let at = config.dir.join("log");
        config.agent_toml += &format!("al_extents = {EXTENTS_MAX}\nactivity_log = {:?}\n", at.join("activity.log"));
        log = Some(LogDisk::make(&at));
    })?;
    let log = log.context("it was made")??;
    rig.run(|rig| {
        let state = |rig: &Rig| Ok::<_, anyhow::Error>(rig.sites.agent().get("/v1/status")?[0]["activity_log"].clone());
        let covers = |rig: &Rig| state(rig).is_ok_and(|state| state["covers"] == true);
        until("the log covers everything", || covers(rig))?;
        log.freeze()?;
        let options = "--rw=randwrite --bs=4k --iodepth=4 --size=316m --io_size=8m --verify=crc32c";
        let report = fio(&rig.device, options)?;
        let longest = report.lines().find(|line| line.trim_start().starts_with("lat (")).unwrap_or_default();
        let frozen = state(rig)?;
        say(&format!("while the log's disk hung: {} writes went past it; {}", frozen["passed"], longest.trim()));
        ensure!(frozen["covers"] == false && frozen["passed"].as_u64().is_some_and(|passed| passed > 0), "{frozen}");
        let alarms = rig.sites.agent().get("/v1/alarms")?.to_string();
        ensure!(alarms.contains("activity-log.uncovered"), "{alarms}");
        log.thaw()?;
        until("the log covers everything again", || covers(rig))?;
        let alarms = rig.sites.agent().get("/v1/alarms")?.to_string();
        ensure!(!alarms.contains("activity-log."), "{alarms}");
        rig.check_replica()
    })?;
    drop(log);
    run(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry {DATA}")).map(drop)
}
