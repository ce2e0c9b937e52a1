//! What makes a host bring Farshore up at boot: units, udev's links.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::run as finish;
use farshore_ublk::dm::{DevNo, Interposed};

use super::{Undo, binary, machine};
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
