//! The device-mapper interposer, below file systems in use.

mod faults;
mod live;
mod size;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farshore_ublk::dm::{Interposer, PassThrough, Step};
use farshore_ublk::{Control, ServerConfig};
use nix::libc;
use nix::sys::signal::{Signal, kill};

use crate::rig::{DISK_512, DISK_4096, machine, run};

/// Keeps LVM from waiting for udev, which the machine does not have.
const LVM: &str = "activation { udev_sync=0 udev_rules=0 } devices { use_devicesfile=0 obtain_device_list_from_udev=0 \
                   scan=[\"/dev\"] filter=[\"a|^/dev/vd|\",\"r|.*|\"] }";

/// Variable with what [`work`] shall do.
const WORK: &str = "FARSHORE_KERNEL_DM";

/// To be called first by every test: modules, and nothing left of the test before.
pub(crate) fn kit() -> Result<Interposer> {
    machine()?;
    run("modprobe -a dm_mod dm_crypt dm_snapshot loop")?;
    // Of a test that failed; nothing to do after one that passed.
    run("for m in $(awk '$2 ~ /^\\/tmp\\// {print $2}' /proc/mounts); do umount -l $m; done; \
         dmsetup ls | grep -q 'No devices' || dmsetup remove_all --force; losetup -D; \
         rm -rf /dev/vg /dev/mapper/[!c]*; true")?;
    run(&format!("for d in {DISK_512} {DISK_4096}; do dd if=/dev/zero of=$d bs=1M count=2 conv=fsync; done"))?;
    Ok(Interposer::open()?)
}

pub(crate) fn lvm(command: &str) -> Result<String> {
    run(&format!("lvm {command} --config '{LVM}'"))
}

/// A volume group over the first disk with logical volumes `data0`, `data1`… of these sizes.
pub(crate) fn logical_volumes(sizes: &[&str]) -> Result<Vec<PathBuf>> {
    lvm(&format!("vgcreate -y vg {DISK_512}"))?;
    let mut paths = Vec::new();
    for (at, size) in sizes.iter().enumerate() {
        lvm(&format!("lvcreate -y -Wn -L {size} -n data{at} vg"))?;
        paths.push(PathBuf::from(format!("/dev/mapper/vg-data{at}")));
    }
    Ok(paths)
}

/// A device by a table in the words of dmsetup, and its link, which would be udev's work.
pub(crate) fn mapped(name: &str, table: &str) -> Result<PathBuf> {
    mapped_with(name, table, "")
}

fn mapped_with(name: &str, table: &str, options: &str) -> Result<PathBuf> {
    run(&format!(
        "dmsetup create {options} {name} --table '{table}' && \
         ln -sf ../dm-$(dmsetup info -c --noheadings -o minor {name} | tr -d ' ') /dev/mapper/{name}"
    ))?;
    Ok(PathBuf::from(format!("/dev/mapper/{name}")))
}

pub(crate) fn unmapped(names: &[&str]) -> Result<()> {
    let remove = |name| run(&format!("dmsetup remove --retry {name} && rm -f /dev/mapper/{name}")).map(drop);
    names.iter().try_for_each(remove)
}

pub(crate) fn table(device: &Path) -> Result<String> {
    run(&format!("dmsetup table --showkeys {}", device.display()))
}

pub(crate) fn pass_through() -> PassThrough {
    PassThrough::new(ServerConfig { queues: 2, depth: 64, ..ServerConfig::default() })
}

/// Fails if any device of ours is left.
pub(crate) fn no_strays() -> Result<()> {
    let mapped = run("dmsetup ls")?;
    ensure!(!mapped.contains("farshore-"), "lowers are left:\n{mapped}");
    let served = Control::open()?.list()?;
    ensure!(served.is_empty(), "ublk devices are left: {served:?}");
    Ok(())
}

/// Writes and syncs small blocks of a file, one after the other, and notes the longest time that one took.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
    blocks: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Writer {
    pub(crate) fn start(file: &Path) -> Result<Self> {
        let (stop, longest_us, blocks) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let file = File::options().create(true).truncate(false).write(true).custom_flags(libc::O_DIRECT).open(file)?;
        file.set_len(4 << 20)?;
        let thread = std::thread::spawn({
            let (stop, longest_us, blocks) = (Arc::clone(&stop), Arc::clone(&longest_us), Arc::clone(&blocks));
            move || {
                let buffer = vec![0xa5u8; 8192];
                let start = buffer.as_ptr().align_offset(4096);
                let mut at = 0;
                let mut last = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    file.write_all_at(&buffer[start..start + 4096], at % (4 << 20))?;
                    at += 4096;
                    let took = u64::try_from(last.elapsed().as_micros()).unwrap_or(u64::MAX);
                    longest_us.fetch_max(took, Ordering::Relaxed);
                    last = Instant::now();
                    blocks.fetch_add(1, Ordering::Relaxed);
                }
                file.sync_all()
            }
        });
        Ok(Self { stop, longest_us, blocks, thread })
    }

    /// The longest time since the last call.
    pub(crate) fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Returns when `count` more blocks are written.
    pub(crate) fn more(&self, count: u64) -> Result<()> {
        let start = self.blocks.load(Ordering::Relaxed);
        crate::rig::until("the writer goes on", || {
            self.thread.is_finished() || self.blocks.load(Ordering::Relaxed) >= start + count
        })?;
        ensure!(!self.thread.is_finished(), "the writer saw an error");
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer returns its errors").context("the writer saw an error")
    }
}

fn step(text: &str) -> Result<Step> {
    let all = Step::ATTACH.into_iter().chain(Step::DETACH);
    let found = all.into_iter().find(|step| format!("{step:?}") == text);
    found.with_context(|| format!("no such step: {text}"))
}

/// What a process of its own does, and before which step it dies.
enum Work {
    Attach,
    Detach,
    /// Attach to a ublk device that does not outlive its server.
    AttachMortal,
}

impl FromStr for Work {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "attach" => Ok(Self::Attach),
            "detach" => Ok(Self::Detach),
            "mortal" => Ok(Self::AttachMortal),
            other => bail!("no such work: {other}"),
        }
    }
}

#[test]
#[ignore = "the interposing process of other tests, which start it"]
fn work() -> Result<()> {
    let text = std::env::var(WORK).context("started by another test")?;
    let [work, upper, at] = text.split(' ').collect::<Vec<_>>()[..] else { bail!("not a job: {text}") };
    let (work, at) = (work.parse::<Work>()?, step(at)?);
    let die = move |step| {
        if step == at {
            // There is no way back from this.
            let _ = kill(nix::unistd::getpid(), Signal::SIGKILL);
        }
        Ok(())
    };
    let mut serve = match work {
        Work::AttachMortal => PassThrough::new(ServerConfig { survives_its_server: false, ..ServerConfig::default() }),
        Work::Attach | Work::Detach => pass_through(),
    };
    match work {
        Work::Attach | Work::AttachMortal => {
            Interposer::open()?.with_hook(die).attach(Path::new(upper), &mut serve)?;
        }
        Work::Detach => {
            let attached = Interposer::open()?.attach(Path::new(upper), &mut serve)?;
            Interposer::open()?.with_hook(die).detach(&attached, &mut serve)?;
        }
    }
    bail!("still alive after {at:?}")
}

/// Runs [`work`] until it kills itself.
pub(crate) fn dies(work: &str, upper: &Path, at: Step) -> Result<()> {
    let output = Command::new(std::env::current_exe().context("find this program")?)
        .args(["--exact", "dm::work", "--ignored", "--nocapture"])
        .env(WORK, format!("{work} {} {at:?}", upper.display()))
        .output()
        .context("start an interposing process")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code().is_none(), "it was not killed at {at:?}: {}\n{text}", output.status);
    Ok(())
}
