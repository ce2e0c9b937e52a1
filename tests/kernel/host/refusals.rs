//! Sources that are refused: on real devices, by the real binary, with the reason and the way out, and nothing changed.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::run as finish;
use nix::libc;

use super::{GROUP, MIB, Mounted, Rig, Undo, binary, machine, partitions};
use crate::dm::{lvm, mapped, unmapped};
use crate::rig::{DISK_512, DISK_4096, fio, run, run_failing, until};

const ONE: &str = "/dev/vda1";
const TWO: &str = "/dev/vda2";

/// Goal: what is mounted is refused, and told where: itself, by way of partitions and volumes, in another mount namespace, and in
/// file systems whose device number is anonymous.
#[test]
fn what_is_mounted_is_refused_with_its_mount_point() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 256), (300, 256)])?;
    let rig = Rig::start()?;
    run(&format!("mkfs.ext4 -q {ONE}"))?;
    let mounted = Mounted::new(ONE)?;
    rig.refused(ONE, &format!("is mounted read-write on {}", mounted.shown()))?;
    rig.refused(DISK_512, &format!("carries {ONE}, which is mounted read-write on {}", mounted.shown()))?;
    run(&format!("mount -o remount,ro {}", mounted.shown()))?;
    rig.refused(ONE, &format!("is mounted read-only on {}", mounted.shown()))?;
    drop(mounted);

    // Somebody else's mount namespace.
    let sleeper = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg(format!("mkdir -p /tmp/elsewhere && mount {ONE} /tmp/elsewhere && echo done && exec sleep 600"))
        .stdout(Stdio::piped())
        .spawn()
        .context("start a process with mounts of its own")?;
    let _stop = Undo(format!("kill {}", sleeper.id()));
    until("it is mounted there", || {
        std::fs::read_to_string(format!("/proc/{}/mountinfo", sleeper.id()))
            .is_ok_and(|table| table.contains("elsewhere"))
    })?;
    rig.refused(ONE, "is mounted read-write on /tmp/elsewhere")?;
    drop(_stop);
    sleeper.wait_with_output()?;

    run(&format!("mkfs.btrfs -q -f -d single -m single {ONE} {TWO}"))?;
    let mounted = Mounted::new(ONE)?;
    for member in [ONE, TWO] {
        rig.refused(member, &format!("is mounted read-write on {}", mounted.shown()))?;
    }
    drop(mounted);
    run(&format!("wipefs -a {ONE} {TWO}"))?;
    rig.stop()
}

/// Goal: what others stand on is refused, with their name: volumes of LVM, loops (which claim nothing), processes.
#[test]
fn what_is_used_is_refused_with_its_user() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 512)])?;
    let rig = Rig::start()?;
    lvm(&format!("vgcreate -y vg {ONE}"))?;
    lvm("lvcreate -y -Wn -L 128M -n data vg")?;
    let lv = "/dev/mapper/vg-data";
    let said = rig.refused(ONE, &format!("is used by {lv}"))?;
    ensure!(said.contains(&format!("protect {lv} instead")), "{said}");
    rig.refused(DISK_512, &format!("is used by {lv}"))?;
    run(&format!("mkfs.ext4 -q {lv}"))?;
    let mounted = Mounted::new(lv)?;
    let said = rig.refused(lv, &format!("is mounted read-write on {}", mounted.shown()))?;
    ensure!(said.contains(&format!("farshore protect {lv} --dm")), "the live way is not named: {said}");
    rig.refused(ONE, &format!("carries {lv}, which is mounted"))?;
    drop(mounted);
    lvm("vgremove -ff -y vg")?;

    let looped = run(&format!("losetup --find --show {DISK_4096}"))?.trim().to_owned();
    let undo = Undo(format!("losetup -d {looped}"));
    rig.refused(DISK_4096, &format!("is used by {looped}"))?;
    drop(undo);
    until("the loop lets go", || !Path::new(&format!("/sys/block/{}/loop", &looped[5..])).exists())?;

    let held = File::options().read(true).custom_flags(libc::O_EXCL).open(DISK_4096)?;
    let said = rig.refused(DISK_4096, "is in use")?;
    ensure!(said.contains(&format!("process {} (", std::process::id())), "who has it is not named: {said}");
    drop(held);
    // As QEMU and databases open a disk: nothing in the kernel is in the way of that.
    let writer = File::options().read(true).write(true).open(DISK_4096)?;
    let said = rig.refused(DISK_4096, "has it open for writing")?;
    ensure!(said.contains(&format!("process {} (", std::process::id())), "who has it is not named: {said}");
    drop(writer);

    // Nothing of all that is in the way any more.
    for (source, name) in [(ONE, "one"), (DISK_4096, "other")] {
        rig.protect(source, &["--name", name])?.ok()?;
        rig.cli(&["unprotect", name])?.ok()?;
    }
    rig.stop()
}

/// Goal: one place of a stack is protected once, whoever asks: by another name, above, below, or by another agent.
#[test]
fn what_is_protected_is_refused_in_every_form() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 64), (100, 64)])?;
    let rig = Rig::start()?;
    let device = rig.protect(ONE, &["--name", "one", "--frontend", "ublk"])?.ok()?.trim().to_owned();
    rig.refused(ONE, "is protected already as g/one")?;
    let link = rig.sites.path("link");
    std::os::unix::fs::symlink(ONE, &link)?;
    rig.refused(&link.display().to_string(), "is protected already as g/one")?;
    rig.refused(DISK_512, &format!("carries {ONE}, which is protected as g/one"))?;
    rig.refused(&device, "is the device of g/one itself")?;

    let above = mapped("above", &format!("0 65536 linear {device} 0"))?;
    rig.refused(&above.display().to_string(), &format!("stands on {ONE}, which is protected as g/one"))?;
    run(&format!("mkfs.ext4 -q {}", above.display()))?;
    {
        let mounted = Mounted::new(&above.display().to_string())?;
        let image = format!("{}/image", mounted.shown());
        File::create(&image)?.set_len(MIB)?;
        rig.refused(&image, &format!("stands on {ONE}, which is protected as g/one"))?;
    }
    unmapped(&["above"])?;

    let image = rig.sites.path("image.img");
    File::create(&image)?.set_len(4 * MIB)?;
    rig.protect(&image.display().to_string(), &["--name", "image"])?.ok()?;
    let looped = run(&format!("losetup --find --show {}", image.display()))?.trim().to_owned();
    let undo = Undo(format!("losetup -d {looped}"));
    rig.refused(&looped, &format!("stands on {}, which is protected as g/image", image.display()))?;
    drop(undo);

    let other = Rig::start()?;
    let said = other.refused(ONE, "is in use")?;
    ensure!(said.contains("(farshore) has it open"), "the other agent is not named: {said}");
    other.stop()?;

    // A neighbour is in nobody's way.
    rig.protect(TWO, &["--name", "two"])?.ok()?;
    for volume in ["two", "image", "one"] {
        rig.cli(&["unprotect", volume])?.ok()?;
    }
    rig.stop()
}

/// Goal: a device that holds what the agent needs is refused, also where the file system's device number is anonymous. Method: an
/// overlay whose upper layer lies on a btrfs of two partitions; a program on ext4; a root file system of its own.
#[test]
fn what_holds_the_agents_own_files_is_refused() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 300), (400, 300)])?;
    run(&format!("mkfs.btrfs -q -f -d single -m single {ONE} {TWO}"))?;
    let below = Mounted::new(ONE)?;
    run(&format!("mkdir {0}/lower {0}/upper {0}/work", below.shown()))?;
    let layers = below.shown();
    {
        let overlay = Mounted::new(&format!(
            "-t overlay -o lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work overlay"
        ))?;
        let rig = Rig::start_in(&overlay.0, &binary()?)?;
        for member in [ONE, TWO, DISK_512] {
            rig.refused(member, "holds the agent's own state directory")?;
        }
        rig.stop()?;
    }
    drop(below);
    run(&format!("wipefs -a {ONE} {TWO}"))?;

    run(&format!("mkfs.ext4 -q {ONE}"))?;
    let mounted = Mounted::new(ONE)?;
    let program = format!("{}/farshore", mounted.shown());
    std::fs::copy(binary()?, &program).context("copy the program")?;
    let folder = tempfile::tempdir()?;
    let rig = Rig::start_in(folder.path(), Path::new(&program))?;
    rig.refused(ONE, "holds the agent's own program")?;
    rig.refused(DISK_512, "holds the agent's own program")?;
    rig.stop()?;

    // The whole system on that partition, but for the folders that the test itself needs.
    let root = mounted.shown();
    run(&format!(
        "cd {root} && mkdir -p proc dev tmp sys && for d in proc dev sys tmp; do mount --rbind /$d $d; done; \
                  for d in bin sbin lib lib64 usr etc; do [ -e /$d ] && {{ if [ -L /$d ]; then cp -P /$d $d; else mkdir -p $d && \
                  mount --bind /$d $d; fi; }}; done; true"
    ))?;
    let inside = tempfile::tempdir()?;
    let (program, wrapper) = (inside.path().join("farshore"), inside.path().join("in-root"));
    std::fs::copy(binary()?, &program).context("copy the program")?;
    std::fs::write(&wrapper, format!("#!/bin/sh\nexec chroot {root} {} \"$@\"\n", program.display()))?;
    run(&format!("chmod 755 {}", wrapper.display()))?;
    let rig = Rig::start_in(inside.path(), &wrapper)?;
    rig.refused(ONE, "holds the root file system of this host")?;
    rig.stop()
}

/// Goal: nothing is protected through which memory is paged out.
#[test]
fn what_holds_swap_is_refused() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 64), (100, 128)])?;
    let rig = Rig::start()?;
    let _off = Undo("swapoff -a".into());
    run(&format!("mkswap {ONE} && swapon {ONE}"))?;
    let said = rig.refused(ONE, &format!("holds active swap ({ONE})"))?;
    ensure!(said.contains(&format!("swapoff {ONE}")), "{said}");
    rig.refused(DISK_512, &format!("holds active swap ({ONE})"))?;
    run(&format!("swapoff {ONE}"))?;

    let mapping = mapped("paged", &format!("0 65536 linear {TWO} 0"))?;
    run(&format!("mkswap {0} && swapon {0}", mapping.display()))?;
    rig.refused(TWO, "holds active swap (/dev/")?;
    run("swapoff -a")?;
    unmapped(&["paged"])?;

    run(&format!("mkfs.ext4 -q {TWO}"))?;
    let mounted = Mounted::new(TWO)?;
    let file = format!("{}/swap", mounted.shown());
    run(&format!("dd if=/dev/zero of={file} bs=1M count=16 && chmod 600 {file} && mkswap {file} && swapon {file}"))?;
    rig.refused(TWO, &format!("holds active swap ({file})"))?;
    rig.refused(&file, &format!("holds active swap ({file})"))?;
    run("swapoff -a")?;
    drop(mounted);
    rig.stop()
}

/// Goal: what cannot be served is told by what is wrong with it.
#[test]
fn what_is_too_small_read_only_or_gone_is_refused() -> Result<()> {
    machine()?;
    let rig = Rig::start()?;
    let small = mapped("small", &format!("0 120 linear {DISK_512} 2048"))?;
    let said = rig.refused(&small.display().to_string(), "is too small: 61440 bytes")?;
    ensure!(said.contains("64.0 KiB"), "the smallest is not named: {said}");
    unmapped(&["small"])?;
    run(&format!("blockdev --setro {DISK_4096}"))?;
    let writable = Undo(format!("blockdev --setrw {DISK_4096}"));
    let said = rig.refused(DISK_4096, "is read-only")?;
    ensure!(said.contains("blockdev --setrw"), "{said}");
    drop(writable);

    let node = rig.sites.path("node");
    run(&format!("mknod {} b 250 77", node.display()))?;
    rig.protect(&node.display().to_string(), &[])?.refused(3, "the device behind it is gone", false)?;
    rig.protect("/dev/nothing", &[])?.refused(3, "/dev/nothing", false)?;
    rig.protect("/dev/null", &[])?.refused(1, "neither a regular file nor a block device", false)?;
    rig.stop()
}

/// Goal: without the driver, and without rights, it is said what is missing and how to do without; a driver in use stays.
#[test]
fn missing_drivers_and_rights_are_named() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 64)])?;
    let rig = Rig::start()?;
    run("rmmod ublk_drv")?;
    let ran = rig.protect(ONE, &["--frontend", "ublk"])?;
    ran.refused(1, "modprobe ublk_drv", false)?;
    ensure!(ran.err.contains("CONFIG_BLK_DEV_UBLK") && ran.err.contains("NBD"), "{ran}");
    ensure!(rig.volumes()?.as_array().is_some_and(Vec::is_empty), "it is protected");
    run("modprobe ublk_drv")?;
    let device = rig.protect(ONE, &["--frontend", "ublk", "--name", "one"])?.ok()?;
    run_failing("rmmod ublk_drv")?;
    fio(Path::new(device.trim()), "--rw=randwrite --bs=4k --size=1m --verify=crc32c")?;
    rig.cli(&["unprotect", "one"])?.ok()?;
    rig.stop()?;

    // As nobody, whose folder this is.
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let nobody = dir.join("as-nobody");
    std::fs::write(
        &nobody,
        format!(
            "#!/bin/sh\nchown -R 65534:65534 {0} /dev/shm; exec setpriv --reuid=65534 --regid=65534 \
                                     --clear-groups --inh-caps=-all --bounding-set=-all prlimit --memlock=65536 {1} \"$@\"\n",
            dir.display(),
            binary()?.display()
        ),
    )?;
    run(&format!("chmod 755 {} && chmod 711 {} && chmod 1777 /dev/shm", nobody.display(), dir.display()))?;
    let rig = Rig::start_in(dir, &nobody)?;
    rig.protect(ONE, &[])?.refused(1, "run the agent as root", false)?;
    let image = dir.join("image");
    File::create(&image)?.set_len(MIB)?;
    run(&format!("chown 65534 {}", image.display()))?;
    rig.protect(&image.display().to_string(), &["--frontend", "ublk"])?.refused(1, "run as root", false)?;
    rig.protect(&image.display().to_string(), &["--name", "image"])?.ok()?;
    let alarms = rig.sites.agent().get("/v1/alarms")?;
    let unlocked = alarms.as_array().and_then(|list| list.iter().find(|alarm| alarm["code"] == "ring.unlocked"));
    let text = unlocked.and_then(|alarm| alarm["text"].as_str()).context("no alarm of the memory-lock limit")?;
    ensure!(text.contains("64.0 KiB") && text.contains("LimitMEMLOCK"), "{text}");
    let doctor = finish(Command::new(nobody).args(["--json", "doctor", "--state"]).arg(dir.join("agent")))?;
    ensure!(doctor.code == Some(1) || doctor.code == Some(0), "{doctor}");
    ensure!(doctor.out.contains("memory.lock") && doctor.out.contains("64.0 KiB"), "{doctor}");
    rig.cli(&["unprotect", &format!("{GROUP}/image")])?.ok()?;
    rig.stop()
}

/// Goal: a device whose server died is not taken for a source.
#[test]
fn a_device_without_a_server_is_refused() -> Result<()> {
    use crate::rig::{DATA_PATHS, Served, Spec};
    machine()?;
    let served = Served::start(&Spec::filter(DISK_4096, DATA_PATHS[0]))?;
    let device = served.device.display().to_string();
    served.kill()?;
    let control = farshore_ublk::Control::open()?;
    until("the kernel has noticed", || {
        control.list().is_ok_and(|all| all.iter().all(|one| one.state() == farshore_ublk::DeviceState::Quiesced))
    })?;
    let rig = Rig::start()?;
    let said = rig.refused(&device, &format!("stands on {device}, whose server is gone"))?;
    ensure!(said.contains("farshore doctor"), "{said}");
    rig.stop()
}
