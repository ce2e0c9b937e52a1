//! What makes a host bring Farshore up at boot: units, udev's links.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::run as finish;
use farshore_link::identity::Vault;
use farshore_proto::{Name, Role, WallTime};
use farshore_ublk::dm::{DevNo, Interposed};

use super::{MIB, Undo, binary, machine, partitions};
use crate::dm::{no_strays, pass_through};
use crate::rig::{DISK_512, DISK_4096, run, until};

/// LVM as it is set up on a host with udev, but for its devices file.
const LVM: &str = "devices { use_devicesfile=0 filter=[\"a|^/dev/vd|\",\"r|.*|\"] }";

/// Goal: systemd takes the units, and every setting in them is one that it knows.
#[test]
fn systemd_knows_the_units() -> Result<()> {
    let root = tempfile::tempdir()?;
    let mut install = Command::new(binary()?);
    install.arg("install-units").arg("--root").arg(root.path()).arg("--binary").arg(binary()?);
    finish(&mut install)?.ok()?;
    for unit in ["farshore-agent.service", "farshore-target.service"] {
        let file = root.path().join("etc/systemd/system").join(unit);
        let ran =
            finish(Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=one"]).arg(&file))?;
        let about: Vec<_> = ran.err.lines().filter(|line| line.contains("farshore")).collect();
        ensure!(ran.code == Some(0) && about.is_empty(), "systemd complains: {ran}");
    }
    // What a setting that it does not know looks like.
    let file = root.path().join("etc/systemd/system/farshore-agent.service");
    let text = std::fs::read_to_string(&file)?.replace("KillMode=process", "KillMode=nobody\nNoSuchSetting=yes");
    std::fs::write(&file, text)?;
    let ran =
        finish(Command::new("systemd-analyze").args(["verify", "--man=no", "--recursive-errors=one"]).arg(&file))?;
    ensure!(ran.err.contains("NoSuchSetting") && ran.err.contains("nobody"), "nothing is found: {ran}");
    Ok(())
}

/// udev with our rules; both gone when dropped.
struct Udev(#[expect(dead_code, reason = "ends udev when it is dropped")] Undo);

impl Udev {
    fn start() -> Result<Self> {
        let mut install = Command::new(binary()?);
        finish(install.args(["install-units", "--binary"]).arg(binary()?))?.ok()?;
        run("/lib/systemd/systemd-udevd --daemon")?;
        let undo =
            Undo("udevadm control --exit; rm -rf /run/udev /dev/disk /etc/udev/rules.d/60-farshore.rules".to_owned());
        until("udev runs", || Path::new("/run/udev/control").exists())?;
        let udev = Self(undo);
        udev.coldplug()?;
        Ok(udev)
    }

    /// Has all events of the past again, as at boot and after an update of rules.
    fn coldplug(&self) -> Result<()> {
        run(
            "udevadm trigger --action=add --subsystem-match=block && udevadm trigger --action=change --subsystem-match=block",
        )?;
        settle()
    }
}

fn settle() -> Result<()> {
    run("udevadm settle --timeout=60").map(drop)
}

/// Every link of udev, and the device that it leads to.
fn links() -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut found = BTreeMap::new();
    for link in run("find /dev/disk /dev/mapper /dev/vg -type l 2>/dev/null; true")?.lines() {
        let to = std::fs::canonicalize(link).with_context(|| format!("{link} leads nowhere"))?;
        found.insert(PathBuf::from(link), to);
    }
    Ok(found)
}

fn node(device: DevNo) -> Result<PathBuf> {
    std::fs::canonicalize(format!("/dev/block/{device}"))
        .or_else(|_| {
            std::fs::canonicalize(format!("/sys/dev/block/{device}"))
                .map(|path| Path::new("/dev").join(path.file_name().unwrap_or_default()))
        })
        .with_context(|| format!("find {device}"))
}

/// No link for mounting leads to what stands below the upper; the given ones lead to it.
fn check(attached: &Interposed, upper: &Path, wanted: &[String]) -> Result<()> {
    let (lower, through) = (node(attached.lower)?, node(attached.through)?);
    let links = links()?;
    for (link, to) in &links {
        ensure!(*to != lower && *to != through, "{} leads to {}", link.display(), to.display());
    }
    for link in wanted {
        let to = links.get(Path::new(link)).with_context(|| format!("{link} is gone: {links:?}"))?;
        ensure!(to == upper, "{link} leads to {}, not to {}", to.display(), upper.display());
    }
    Ok(())
}

/// Goal: under udev, links by UUID, by label and by name lead to the volume before, while and after it is attached, and never to the
/// lower or the device over it; also after udev has seen all devices anew. Method: a logical volume with a file system, and a stub over a
/// bare disk with another.
#[test]
fn links_lead_to_the_upper_only() -> Result<()> {
    machine()?;
    let udev = Udev::start()?;
    let lvm = |command: &str| run(&format!("lvm {command} --config '{LVM}'"));
    lvm(&format!("vgcreate -y vg {DISK_512}"))?;
    lvm("lvcreate -y -Wn -L 128M -n data vg")?;
    run("mkfs.ext4 -q -L on-volume -U 11111111-2222-3333-4444-555555555555 /dev/vg/data")?;
    run(&format!("mkfs.ext4 -q -F -L on-disk -U 66666666-7777-8888-9999-aaaaaaaaaaaa {DISK_4096}"))?;
    udev.coldplug()?;
    let interposer = farshore_ublk::dm::Interposer::open()?;
    let stub = interposer.make_stub(Path::new(DISK_4096), "stub")?;
    udev.coldplug()?;
    let of_volume = [
        "/dev/disk/by-uuid/11111111-2222-3333-4444-555555555555",
        "/dev/disk/by-label/on-volume",
        "/dev/vg/data",
        "/dev/mapper/vg-data",
    ];
    let of_stub =
        ["/dev/disk/by-uuid/66666666-7777-8888-9999-aaaaaaaaaaaa", "/dev/disk/by-label/on-disk", "/dev/mapper/stub"];
    let mut serve = pass_through();
    for (path, wanted) in [("/dev/mapper/vg-data", &of_volume[..]), ("/dev/mapper/stub", &of_stub)] {
        let wanted: Vec<String> = wanted.iter().map(|link| (*link).to_owned()).collect();
        let upper = std::fs::canonicalize(path)?;
        let before = links()?;
        for link in &wanted {
            ensure!(before.get(Path::new(link)) == Some(&upper), "{link} before: {before:?}");
        }
        let attached = interposer.attach(Path::new(path), &mut serve)?;
        settle()?;
        check(&attached, &upper, &wanted).with_context(|| format!("{path}, attached"))?;
        udev.coldplug()?;
        check(&attached, &upper, &wanted).with_context(|| format!("{path}, after all events anew"))?;
        let properties = run(&format!("udevadm info {}", node(attached.lower)?.display()))?;
        ensure!(properties.contains("SYSTEMD_READY=0") && !properties.contains("ID_FS_UUID="), "{properties}");
        interposer.detach(&attached, &mut serve)?;
        settle()?;
        ensure!(links()? == before, "after the detach: {:?}, not {before:?}", links()?);
    }
    no_strays()?;
    interposer.remove_stub("stub")?;
    settle()?;
    ensure!(!stub.path.exists(), "the stub's link is left");
    lvm("vgremove -ff -y vg")?;
    settle()?;
    drop(udev);
    Ok(())
}

/// Units of the whole boot, beside ours: what systemd itself needs.
const UNITS: &str = "sysinit.target basic.target local-fs.target local-fs-pre.target shutdown.target umount.target final.target \
                     poweroff.target systemd-poweroff.service modprobe@.service systemd-fsck@.service";

/// Where the system that is booted keeps what it needs, and leaves what it has to say.
const BOOT: &str = "/run/boot";

/// A host with an agent and a protected partition, to be booted by systemd as a system of its own: in namespaces for processes and
/// mounts, with the machine's kernel and udev.
struct System {
    _undo: Undo,
    _udev: Udev,
}

impl System {
    /// Our units, the generator and fstab in place, one volume protected, and the agent stopped in order.
    fn install() -> Result<Self> {
        let udev = Udev::start()?;
        let undo = Undo(format!(
            "rm -rf {BOOT} /etc/farshore /var/lib/farshore /dev/shm/boot /srv/three /etc/systemd/system/farshore-* /run/systemd \
             /etc/systemd/system-generators/farshore-generator; mv -f /etc/fstab.before /etc/fstab"
        ));
        run("cp /etc/fstab /etc/fstab.before; mkdir -p /srv/three /dev/shm/boot /etc/farshore; \
             echo '/dev/ublkb3 /srv/three ext4 rw 0 2' >/etc/fstab")?;
        run(&format!("mkdir -p {BOOT}/units {BOOT}/generators && cd /lib/systemd/system && cp {UNITS} {BOOT}/units/"))?;
        run(&format!(
            "ln -s /lib/systemd/system-generators/systemd-fstab-generator {BOOT}/generators/; \
                      ln -s /etc/systemd/system-generators/farshore-generator {BOOT}/generators/; \
                      ln -s /etc/systemd/system/farshore-agent.service {BOOT}/units/; mkdir {BOOT}/units/farshore-agent.service.d"
        ))?;
        // There is no journal; and the boots of a test follow one another faster than those of a host.
        let log = format!("[Service]\nStandardError=append:{BOOT}/agent.log\n");
        std::fs::write(format!("{BOOT}/units/farshore-agent.service.d/log.conf"), log)?;
        std::fs::write(format!("{BOOT}/units/check.target"), "[Unit]\nRequires=check.service\nAfter=check.service\n")?;
        let check = format!(
            "[Unit]\nRequires=local-fs.target\nAfter=local-fs.target\n\
                             [Service]\nType=oneshot\nExecStart=/bin/sh {BOOT}/check.sh\n"
        );
        std::fs::write(format!("{BOOT}/units/check.service"), check)?;

        let vault = Vault::in_memory(Name::new("v")?, now()?)?;
        vault.issue_at(Role::Agent, Name::new("host")?, 30, now()?)?.write(Path::new("/etc/farshore/agent.bundle"))?;
        let toml = format!(
            "identity = '/etc/farshore/agent.bundle'\nstate = '/var/lib/farshore/agent'\nupstream = '127.0.0.1:1'\n\
                            ring = {}\nring_dir = '/dev/shm/boot'\nsocket = '/run/farshore/agent.sock'\n",
            8 * MIB
        );
        std::fs::write("/etc/farshore/agent.toml", toml)?;
        run("mkfs.ext4 -q /dev/vda1")?;
        let program = binary()?.display().to_string();
        run(&format!(
            "{program} agent run --config /etc/farshore/agent.toml 2>{BOOT}/first.log & agent=$!; \
                      for i in $(seq 600); do {program} status >/dev/null 2>&1 && break; sleep 0.1; done; \
                      {program} protect /dev/vda1 --group g --name three --frontend ublk:3; code=$?; \
                      kill $agent; wait $agent && [ $code = 0 ] && [ ! -e /dev/ublkb3 ]"
        ))?;
        Ok(Self { _undo: undo, _udev: udev })
    }

    /// Boots the system, runs `check` in it when its local file systems are there, and shuts it down; what `check` printed.
    fn boot(&self, check: &str) -> Result<String> {
        let script = format!("({check}) >{BOOT}/out 2>&1\necho $? >{BOOT}/code\nsystemctl --no-block poweroff\n");
        std::fs::write(format!("{BOOT}/check.sh"), script)?;
        let generated = "/run/systemd/generator.early:/run/systemd/generator:/run/systemd/generator.late";
        // It ends by a signal: that is how a namespace's first process switches off.
        run(&format!(
            "rm -rf {BOOT}/code /run/systemd; timeout 150 unshare --mount --propagation private --pid --fork --ipc --mount-proc \
             --kill-child env -i container=test PATH=$PATH SYSTEMD_UNIT_PATH={BOOT}/units:{generated} \
             SYSTEMD_GENERATOR_PATH={BOOT}/generators /lib/systemd/systemd --system --unit=check.target --log-target=kmsg \
             --show-status=no; [ $? != 124 ]"
        ))?;
        let read = |name: &str| std::fs::read_to_string(format!("{BOOT}/{name}"));
        let said = || {
            format!(
                "{}\n{}",
                read("agent.log").unwrap_or_default(),
                run("dmesg | grep systemd | tail -60").unwrap_or_default()
            )
        };
        let code = read("code").with_context(|| format!("the check did not run:\n{}", said()))?;
        let out = read("out")?;
        ensure!(code.trim() == "0", "the check ended with {code}:\n{out}\n{}", said());
        Ok(out)
    }
}

fn now() -> Result<WallTime> {
    let since = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH)?;
    Ok(WallTime(u64::try_from(since.as_nanos())?))
}

/// Goal: at boot the agent is ready before the file system over its volume is checked and mounted; at shutdown the file system goes
/// first and the agent stops in order, so that the next boot compares nothing. Method: two whole boots of systemd.
#[test]
fn a_whole_boot_and_the_next() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 64)])?;
    let system = System::install()?;
    let times = "for unit in farshore-agent.service systemd-fsck@dev-ublkb3.service srv-three.mount; do \
                 systemctl show --value -p ActiveEnterTimestampMonotonic $unit; done";
    let out = system.boot(&format!("mountpoint -q /srv/three && {times} && echo kept >/srv/three/file && sync"))?;
    let times: Vec<u64> =
        out.lines().map(str::parse).collect::<Result<_, _>>().with_context(|| format!("times: {out}"))?;
    ensure!(times.len() == 3 && times[0] > 0 && times.is_sorted(), "agent, fsck, mount: {times:?}");
    ensure!(!Path::new("/dev/ublkb3").exists(), "the agent stopped before the file system was unmounted");

    let log = std::fs::read_to_string(format!("{BOOT}/agent.log"))?;
    ensure!(log.contains("SIGTERM: stopping in order"), "{log}");
    let out = system.boot("cat /srv/three/file && systemctl is-active farshore-agent")?;
    ensure!(out == "kept\nactive\n", "{out}");
    let second = std::fs::read_to_string(format!("{BOOT}/agent.log"))?.split_off(log.len());
    for bad in ["ring of the last process found", "is lost", "compared", "ERROR"] {
        ensure!(!second.contains(bad), "the stop before was not in order ({bad}):\n{second}");
    }
    Ok(())
}
