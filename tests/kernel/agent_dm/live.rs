//! In and out of the path, and through the agent's death, below mounted file systems under load.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::json;

use super::Rig;
use crate::dm::{Writer, logical_volumes, mapped, no_strays, table, unmapped};
use crate::rig::{DISK_512, Fio, Mounted, fio, pattern, run, until};

const LOAD: &str = "--rw=randwrite --bsrange=4k-32k --size=8m --iodepth=8 --rate=2m --verify=crc32c --fsync=64";
const KILLS: usize = 4;

/// A file system with a load that checks what it reads.
struct Loaded {
    mounted: Mounted,
    load: Fio,
}

impl Loaded {
    fn start(upper: &Path, make: &str) -> Result<Self> {
        run(&format!("{make} {}", upper.display()))?;
        let mounted = Mounted::new(upper)?;
        let load = Fio::start(&mounted.folder().join("load"), LOAD)?;
        Ok(Self { mounted, load })
    }

    /// Starts the load anew if it has come to its end, which must be a good one.
    fn keep_up(&mut self) -> Result<()> {
        if !self.load.is_running()? {
            let next = Fio::start(&self.mounted.folder().join("load"), LOAD)?;
            std::mem::replace(&mut self.load, next).finish()?;
        }
        Ok(())
    }
}

/// A mounted ext4 with a writer.
fn written(upper: &Path) -> Result<(Mounted, Writer)> {
    run(&format!("mkfs.ext4 -q -E lazy_itable_init=0,nodiscard {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let writer = Writer::start(&mounted.folder().join("gap"))?;
    Ok((mounted, writer))
}

/// Goal: file systems in use are protected, survive deaths of the agent and are let go, live: no error, no wrong byte, nothing
/// compared, and the second site has all. Method: ext4 and xfs on logical volumes with fio that verifies; a second writer
/// whose longest wait is the guest's pause.
#[test]
#[allow(clippy::print_stdout, reason = "the figures")]
fn file_systems_go_on() -> Result<()> {
    Rig::test(|rig| {
        let uppers = logical_volumes(&["96M", "320M"])?;
        let originals = [table(&uppers[0])?, table(&uppers[1])?];
        let mut ext4 = Loaded::start(&uppers[0], "mkfs.ext4 -q -E lazy_itable_init=0,nodiscard")?;
        let mut xfs = Loaded::start(&uppers[1], "mkfs.xfs -q -K")?;
        let writer = Writer::start(&ext4.mounted.folder().join("gap"))?;
        writer.more(50)?;
        writer.longest();
        writer.more(100)?;
        let mut figures = vec![format!("alone {:?}", writer.longest())];
        let measure = |what: &str, figures: &mut Vec<String>| -> Result<()> {
            writer.more(20)?;
            figures.push(format!("{what} {:?}", writer.longest()));
            Ok(())
        };

        rig.protect_live(&uppers[0], "ext4")?;
        measure("attach", &mut figures)?;
        rig.protect_live(&uppers[1], "xfs")?;
        rig.wait()?;
        ensure!(rig.interposer.list()?.len() == 2);
        writer.more(100)?;
        figures.push(format!("protected {:?}", writer.longest()));

        for round in 0..KILLS {
            ext4.keep_up()?;
            xfs.keep_up()?;
            writer.more(30)?;
            writer.longest();
            rig.kill_and_restart()?;
            measure(&format!("agent killed, round {round}"), &mut figures)?;
            rig.check_attached(&uppers[0], "ext4")?;
            rig.check_attached(&uppers[1], "xfs")?;
            rig.check_nothing_missing()?;
        }
        ensure!(rig.said("ring of the last process found"), "no agent found its predecessor's ring");
        // Nobody writes while they are frozen: the kernel complains of a task that waits for two minutes.
        ext4.load.finish()?;
        xfs.load.finish()?;
        writer.finish()?;
        rig.check_replica(&["ext4", "xfs"], &[ext4.mounted.folder(), xfs.mounted.folder()])?;

        let load = Fio::start(&ext4.mounted.folder().join("load"), LOAD)?;
        let writer = Writer::start(&ext4.mounted.folder().join("gap"))?;
        writer.more(30)?;
        writer.longest();
        rig.unprotect("ext4")?;
        writer.more(20)?;
        figures.push(format!("detach {:?}", writer.longest()));
        ensure!(table(&uppers[0])? == originals[0]);
        rig.unprotect("xfs")?;
        ensure!(table(&uppers[1])? == originals[1]);
        no_strays()?;

        load.finish()?;
        writer.finish()?;
        ext4.mounted.unmount()?;
        xfs.mounted.unmount()?;
        run(&format!("e2fsck -fn {} && xfs_repair -n {}", uppers[0].display(), uppers[1].display()))?;
        println!("longest wait of a 4 KiB writer beside fio below ext4: {}", figures.join(", "));
        Ok(())
    })
}

/// Goal: an agent that stops leaves the path and comes back into it, below a mounted file system; a load that goes on makes that a
/// compare. Method: stop and start under load; then at rest.
#[test]
#[allow(clippy::print_stdout, reason = "the figures")]
fn an_agent_stops_and_starts_below_a_mounted_file_system() -> Result<()> {
    Rig::test(|rig| {
        let upper = &logical_volumes(&["96M"])?[0];
        let original = table(upper)?;
        let (mounted, writer) = written(upper)?;
        rig.protect_live(upper, "ext4")?;
        rig.wait()?;
        writer.more(30)?;
        writer.longest();
        rig.keep_logs();
        rig.stop_agent()?;
        writer.more(20)?;
        let stop = writer.longest();
        ensure!(table(upper)? == original, "the guest goes on by its own table");
        no_strays()?;
        rig.sites.start_agent()?;
        writer.more(20)?;
        println!("longest wait of a 4 KiB writer: agent stops {stop:?}, starts {:?}", writer.longest());
        rig.check_attached(upper, "ext4")?;
        rig.until_alarm("volume.bypassed", "sectors were written")?;
        writer.finish()?;
        rig.check_replica(&["ext4"], &[mounted.folder()])?;
        ensure!(rig.alarm("volume.bypassed")?.is_none(), "it is compared by now");
        mounted.unmount()
    })
}

/// Goal: an agent that is stopped while none of its workers comes up leaves nobody waiting: users go on by their own tables, and the
/// next start compares. Method: workers find no identity; a stop before the pass-through has begun, and while it serves.
#[test]
fn a_stop_without_a_worker_leaves_nobody_waiting() -> Result<()> {
    Rig::test_with_errors(|rig| {
        let upper = &logical_volumes(&["96M"])?[0];
        let original = table(upper)?;
        let (mounted, writer) = written(upper)?;
        rig.protect_live(upper, "ext4")?;
        let (identity, aside) = (rig.sites.path("agent.bundle"), rig.sites.path("agent.bundle.aside"));
        for passed_through in [false, true] {
            rig.wait()?;
            std::fs::rename(&identity, &aside)?;
            rig.sites.kill_worker()?;
            if passed_through {
                let shown = || rig.sites.supervisor().get("/v1/supervisor");
                until("it is served without a worker", || shown().is_ok_and(|shown| shown["bypassed"] != json!([])))?;
            }
            // It ends as the last worker did, which may have been at its start.
            let ended = rig.stop_agent();
            ensure!(table(upper)? == original, "the guest goes on by its own table ({ended:?})");
            no_strays()?;
            writer.more(20)?;
            std::fs::rename(&aside, &identity)?;
            rig.sites.start_agent()?;
            rig.check_attached(upper, "ext4")?;
            let compared = |line: &String| line.contains("was served without capture: everything is compared");
            ensure!(rig.sites.logs().iter().any(compared), "nothing is compared");
        }
        writer.finish()?;
        rig.check_replica(&["ext4"], &[mounted.folder()])?;
        mounted.unmount()?;
        rig.unprotect("ext4").map(drop)
    })
}

/// Goal: the same of a stack: what is on top can only be changed while what is below answers. Method: the top comes first by its name.
#[test]
fn a_stack_is_left_without_a_worker() -> Result<()> {
    Rig::test_with_errors(|rig| {
        let size = 65_536;
        let bottom = mapped("bottom", &format!("0 {size} linear {DISK_512} 2048"))?;
        let top = mapped("top", &format!("0 {size} linear {} 0", bottom.display()))?;
        let tables = [table(&top)?, table(&bottom)?];
        rig.protect_live(&bottom, "b")?;
        rig.protect_live(&top, "a")?;
        rig.wait()?;
        let load = Fio::start(&top, LOAD)?;
        let (identity, aside) = (rig.sites.path("agent.bundle"), rig.sites.path("agent.bundle.aside"));
        std::fs::rename(&identity, &aside)?;
        rig.sites.kill_worker()?;
        let ended = rig.stop_agent();
        ensure!(table(&top)? == tables[0] && table(&bottom)? == tables[1], "the agent ended with {ended:?}");
        no_strays()?;
        load.finish()?;
        std::fs::rename(&aside, &identity)?;
        rig.sites.start_agent()?;
        rig.check_attached(&top, "a")?;
        rig.check_attached(&bottom, "b")?;
        rig.check_replica(&["a", "b"], &[])?;
        rig.unprotect("a")?;
        rig.unprotect("b")?;
        unmapped(&["top", "bottom"])
    })
}

/// Goal: stacks: dm-crypt over a protected volume, and itself protected; another volume beside it. Method: load on both storeys' top,
/// a death of the agent, then stop and start.
#[test]
fn storeys_of_a_stack_are_protected() -> Result<()> {
    Rig::test(|rig| {
        let size = 65_536;
        let bottom = mapped("bottom", &format!("0 {size} linear {DISK_512} 2048"))?;
        let key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        let top = mapped("top", &format!("0 {size} crypt aes-xts-plain64 {key} 0 {} 0", bottom.display()))?;
        let tables = [table(&top)?, table(&bottom)?];
        let load = Fio::start(&top, LOAD)?;
        rig.protect_live(&top, "top")?;
        rig.protect_live(&bottom, "bottom")?;
        rig.wait()?;
        rig.kill_and_restart()?;
        rig.check_nothing_missing()?;
        load.finish()?;
        rig.check_replica(&["top", "bottom"], &[])?;
        rig.stop_agent()?;
        ensure!(table(&top)? == tables[0] && table(&bottom)? == tables[1]);
        no_strays()?;
        rig.sites.start_agent()?;
        rig.check_attached(&top, "top")?;
        rig.check_attached(&bottom, "bottom")?;
        rig.unprotect("bottom")?;
        rig.unprotect("top")?;
        ensure!(table(&top)? == tables[0] && table(&bottom)? == tables[1]);
        unmapped(&["top", "bottom"])
    })
}

/// Goal: a bare disk gets a stub, which is what users mount from then on; it is made again after it was lost, and goes when nobody
/// needs it. Method: file system on the stub; stop; the stub is removed as a restart of the host would; start.
#[test]
fn a_bare_disk_gets_a_stub() -> Result<()> {
    Rig::test(|rig| {
        // Not on a file system of the agent's own files.
        run("mount -t tmpfs tmpfs /mnt && truncate --size 64M /mnt/bare")?;
        let disk = PathBuf::from(run("losetup --find --show /mnt/bare")?.trim());
        let disk = disk.as_path();
        run(&format!("mkfs.ext4 -q {}", disk.display()))?;
        let mounted = Mounted::new(disk)?;
        let refused = rig.protect(disk, "disk").expect_err("it is mounted");
        ensure!(format!("{refused:#}").contains("unmount"), "{refused:#}");
        mounted.unmount()?;
        ensure!(
            rig.sites.agent().get("/v1/volumes")? == json!([]) && !Path::new("/dev/mapper/protected-g-disk").exists()
        );

        let volume = rig.protect(disk, "disk")?;
        let stub = Path::new("/dev/mapper/protected-g-disk");
        ensure!(volume["device"] == json!(stub) && volume["source"] == json!(disk), "{volume:#}");
        rig.check_attached(stub, "disk")?;
        let again = rig.protect(disk, "disk2").expect_err("it is protected");
        ensure!(format!("{again:#}").contains("protected already"), "{again:#}");
        let again = rig.protect(stub, "disk2").expect_err("it is protected");
        ensure!(format!("{again:#}").contains("protected already"), "{again:#}");
        let mounted = Mounted::new(stub)?;
        let bytes = pattern(21, 4 << 20);
        std::fs::write(mounted.folder().join("kept"), &bytes)?;
        rig.check_replica(&["disk"], &[mounted.folder()])?;
        mounted.unmount()?;
        rig.wait()?;

        rig.stop_agent()?;
        unmapped(&["protected-g-disk"])?;
        rig.sites.start_agent()?;
        rig.check_attached(stub, "disk")?;
        // Another device than before in this boot, so nothing is known.
        rig.until_alarm("volume.bypassed", "not the same device")?;
        let mounted = Mounted::new(stub)?;
        ensure!(std::fs::read(mounted.folder().join("kept"))? == bytes);
        rig.check_replica(&["disk"], &[mounted.folder()])?;

        rig.unprotect("disk")?;
        fio(&mounted.folder().join("more"), "--rw=write --bs=64k --size=2m")?;
        ensure!(stub.exists(), "it is mounted");
        mounted.unmount()?;
        let volume = rig.protect(disk, "disk")?;
        ensure!(volume["device"] == json!(stub));
        rig.unprotect("disk")?;
        ensure!(!stub.exists(), "nobody uses it");
        run(&format!("e2fsck -fn {0} && losetup --detach {0} && umount /mnt", disk.display())).map(drop)
    })
}
