//! Volumes whose tables other tools change: growth, shrinking, refreshes.

use anyhow::{Context, Result, ensure};
use farshore_ublk::ErrorKind;
use farshore_ublk::dm::Change;

use super::{Writer, kit, logical_volumes, lvm, no_strays, pass_through, table};
use crate::rig::{Mounted, run};

const MIB: u64 = 2048;

/// Goal: growth by LVM below a mounted file system is noticed and followed. Method: lvextend, attach again, grow the file system through
/// our device.
#[test]
fn a_grown_logical_volume_is_followed() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["128M"])?[0];
    run(&format!("mkfs.ext4 -q {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let writer = Writer::start(&mounted.folder().join("file"))?;
    let mut serve = pass_through();
    let attached = interposer.attach(upper, &mut serve)?;
    ensure!(interposer.reattach(&attached, &mut serve).expect_err("nothing changed").kind() == ErrorKind::Busy);
    writer.more(50)?;

    lvm("lvextend -L 256M vg/data0")?;
    ensure!(interposer.change(&attached)? == Change::Bypassed { was: 128 * MIB, is: 256 * MIB });
    ensure!(interposer.size_changed(&attached)? == Some(256 * MIB));
    ensure!(interposer.detach(&attached, &mut serve).expect_err("it is bypassed").kind() == ErrorKind::Busy);
    let theirs = table(upper)?;
    let attached = interposer.reattach(&attached, &mut serve).context("after lvextend")?;
    ensure!(attached.sectors == 256 * MIB && interposer.change(&attached)? == Change::None);
    run(&format!("resize2fs {}", upper.display()))?;
    std::fs::write(mounted.folder().join("big"), vec![7u8; 160 << 20])?;
    writer.more(50)?;

    // The same size, and past us all the same.
    lvm("lvchange --refresh vg/data0")?;
    ensure!(interposer.change(&attached)? == Change::Bypassed { was: 256 * MIB, is: 256 * MIB });
    ensure!(interposer.size_changed(&attached)?.is_none());
    let attached = interposer.reattach(&attached, &mut serve).context("after a refresh")?;
    interposer.detach(&attached, &mut serve)?;
    ensure!(table(upper)? == theirs);
    writer.finish()?;
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", upper.display()))?;
    no_strays()?;
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: shrinking is not followed. Method: lvreduce of an attached volume; it can be let go of.
#[test]
fn a_shrunk_logical_volume_is_refused() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["128M"])?[0];
    let mut serve = pass_through();
    let attached = interposer.attach(upper, &mut serve)?;
    lvm("lvreduce -f -L 64M vg/data0")?;
    ensure!(interposer.size_changed(&attached)? == Some(64 * MIB));
    let refused = interposer.reattach(&attached, &mut serve).expect_err("it has shrunk");
    ensure!(refused.kind() == ErrorKind::Invalid && refused.to_string().contains("shrunk"), "{refused}");
    ensure!(interposer.change(&attached)? == Change::Bypassed { was: 128 * MIB, is: 64 * MIB }, "nothing was touched");
    interposer.abandon(&attached, &mut serve)?;
    no_strays()?;
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: a stub follows its disk. Method: a loop device whose file grows, attached and not.
#[test]
fn a_stub_follows_its_disk() -> Result<()> {
    let interposer = kit()?;
    run("truncate --size 64M /dev/shm/growing")?;
    let disk = run("losetup --find --show --direct-io=off /dev/shm/growing")?.trim().to_owned();
    let stub = interposer.make_stub(disk.as_ref(), "growing")?;
    let grow = |size: &str| run(&format!("truncate --size {size} /dev/shm/growing && losetup --set-capacity {disk}"));
    grow("96M")?;
    ensure!(interposer.grow_stub("growing")? == 96 * MIB);
    let mut serve = pass_through();
    let attached = interposer.attach(&stub.path, &mut serve)?;
    ensure!(attached.sectors == 96 * MIB);
    ensure!(interposer.grow_stub("growing")? == 96 * MIB && interposer.change(&attached)? == Change::None);
    grow("128M")?;
    ensure!(interposer.grow_stub("growing")? == 128 * MIB);
    ensure!(interposer.size_changed(&attached)? == Some(128 * MIB));
    let attached = interposer.reattach(&attached, &mut serve)?;
    ensure!(attached.sectors == 128 * MIB);
    interposer.detach(&attached, &mut serve)?;
    interposer.remove_stub("growing")?;
    run(&format!("losetup --detach {disk} && rm /dev/shm/growing"))?;
    no_strays()
}
