//! In and out under load, on one volume, on several, on stacks of them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use farshore_ublk::ErrorKind;
use farshore_ublk::dm::{Change, DevNo};

use super::{Writer, kit, logical_volumes, lvm, mapped, mapped_with, no_strays, pass_through, table, unmapped};
use crate::rig::{DISK_512, DISK_4096, Fio, Mounted, fio, pattern, read_at, run, write_at};

const LOAD: &str = "--rw=randwrite --bsrange=4k-32k --size=10m --iodepth=16 --verify=crc32c --fsync=64";

/// Goal: attach and detach are live: a file system, its load and its content see nothing. Method: ext4 on a logical volume, fio that
/// verifies, a second writer whose longest wait is the guest's pause; five rounds; fsck.
#[test]
#[allow(clippy::print_stdout, reason = "the figures")]
fn a_file_system_on_a_logical_volume_goes_on() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["512M"])?[0];
    let original = table(upper)?;
    run(&format!("mkfs.ext4 -q -E lazy_itable_init=0,nodiscard {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let kept = pattern(11, 4 << 20);
    std::fs::write(mounted.folder().join("kept"), &kept)?;
    let mut load = Fio::start(&mounted.folder().join("load"), LOAD)?;
    let writer = Writer::start(&mounted.folder().join("gap"))?;
    writer.more(200)?;
    let mut serve = pass_through();
    let mut figures = Vec::new();
    for round in 0..5 {
        if !load.is_running()? {
            load.finish()?;
            load = Fio::start(&mounted.folder().join("load"), LOAD)?;
        }
        writer.longest();
        writer.more(100)?;
        let alone = writer.longest();
        let attached = interposer.attach(upper, &mut serve).with_context(|| format!("attach, round {round}"))?;
        writer.more(20)?;
        let attach = writer.longest();
        ensure!(interposer.change(&attached)? == Change::None);
        ensure!(interposer.list()? == std::slice::from_ref(&attached));
        ensure!(table(upper)?.trim() == format!("0 {} linear {} 0", attached.sectors, attached.through));
        let before = served_writes(attached.through)?;
        writer.more(200)?;
        ensure!(served_writes(attached.through)? >= before + 200, "writes go through our device");
        let through = writer.longest();
        interposer.detach(&attached, &mut serve).with_context(|| format!("detach, round {round}"))?;
        writer.more(20)?;
        let detach = writer.longest();
        ensure!(table(upper)? == original);
        no_strays()?;
        figures.push(format!("alone {alone:?}, attach {attach:?}, attached {through:?}, detach {detach:?}"));
    }
    load.finish()?;
    writer.finish()?;
    run("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(std::fs::read(mounted.folder().join("kept"))? == kept);
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", upper.display()))?;
    for (round, line) in figures.iter().enumerate() {
        println!("longest wait of a 4 KiB writer beside fio, round {round}: {line}");
    }
    lvm("vgremove -ff -y vg").map(drop)
}

/// Writes that the block layer has counted.
fn served_writes(device: DevNo) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{device}/stat"))?;
    Ok(stat.split_whitespace().nth(4).context("the fifth figure")?.parse()?)
}

/// Goal: volumes do not get into each other's way. Method: three logical volumes attached in turn under load, detached in another
/// order.
#[test]
fn several_volumes_at_once() -> Result<()> {
    let interposer = kit()?;
    let uppers = logical_volumes(&["128M", "128M", "128M"])?;
    let originals = uppers.iter().map(|upper| table(upper)).collect::<Result<Vec<_>>>()?;
    let loads = uppers.iter().map(|upper| Fio::start(upper, LOAD)).collect::<Result<Vec<_>>>()?;
    let mut serve = pass_through();
    let mut attached = Vec::new();
    for upper in &uppers {
        attached.push(interposer.attach(upper, &mut serve)?);
    }
    ensure!(interposer.list()?.len() == 3 && interposer.leftovers()?.is_empty());
    for load in loads {
        load.finish()?;
    }
    for at in [1, 2, 0] {
        fio(&uppers[at], LOAD)?;
        interposer.detach(&attached[at], &mut serve)?;
        fio(&uppers[at], "--rw=read --bs=32k --size=10m")?;
        ensure!(table(&uppers[at])? == originals[at]);
    }
    no_strays()?;
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: stacks work, and every storey can be attached. Method: striped and linear below, dm-crypt above, a file system on top;
/// attach both storeys; the walk down the stack goes through our servers.
#[test]
fn storeys_of_a_stack() -> Result<()> {
    let interposer = kit()?;
    let size = 262_144;
    let bottom = mapped(
        "bottom",
        &format!("0 {size} striped 2 128 {DISK_512} 2048 {DISK_512} 1050624\n{size} 8192 linear {DISK_512} 3000000"),
    )?;
    let key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    let crypt = format!("0 {size} crypt aes-xts-plain64 {key} 0 {} 8192", bottom.display());
    let top = mapped("top", &crypt)?;
    let (bottom_table, top_table) = (table(&bottom)?, table(&top)?);
    ensure!(top_table.contains(key));
    run(&format!("mkfs.ext4 -q {}", top.display()))?;
    let mounted = Mounted::new(&top)?;
    let load = Fio::start(&mounted.folder().join("load"), LOAD)?;
    let (mut above, mut below) = (pass_through(), pass_through());
    let on_top = interposer.attach(&top, &mut above)?;
    let on_bottom = interposer.attach(&bottom, &mut below)?;
    let disk = DevNo::of(Path::new(DISK_512))?;
    let stack = interposer.stack(on_top.upper)?;
    let storeys = [on_top.through, on_top.lower, on_bottom.upper, on_bottom.through, on_bottom.lower, disk];
    ensure!(storeys.iter().all(|storey| stack.contains(storey)), "{stack:?}");
    load.finish()?;
    fio(&mounted.folder().join("load"), LOAD)?;
    interposer.detach(&on_top, &mut above)?;
    fio(&mounted.folder().join("load"), LOAD)?;
    interposer.detach(&on_bottom, &mut below)?;
    ensure!(table(&top)? == top_table && table(&bottom)? == bottom_table);
    no_strays()?;
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", top.display()))?;
    unmapped(&["top", "bottom"])
}

/// Goal: what must not be attached is refused, with the reason, and stays as it was. Method: one of each.
#[test]
fn what_cannot_be_attached_is_refused() -> Result<()> {
    let interposer = kit()?;
    let mut serve = pass_through();
    let mut refused = |path: &Path, kind: ErrorKind, reason: &str| -> Result<()> {
        let error = interposer.attach(path, &mut serve).expect_err("it is refused");
        ensure!(
            error.kind() == kind && error.to_string().contains(reason),
            "{}: {error} ({:?})",
            path.display(),
            error.kind()
        );
        Ok(())
    };
    refused(Path::new(DISK_512), ErrorKind::Invalid, "stub")?;
    refused(Path::new("/dev/null"), ErrorKind::Invalid, "no block device")?;
    refused(Path::new("/dev/mapper/none"), ErrorKind::NotFound, "no /dev/mapper/none")?;
    let zero = mapped("zero", "0 8192 zero")?;
    refused(&zero, ErrorKind::Unsupported, "`zero` target")?;
    let origin = mapped("base", &format!("0 8192 linear {DISK_512} 2048"))?;
    let cow = mapped("cow", &format!("0 8192 linear {DISK_512} 20480"))?;
    let snapshot = mapped("snap", &format!("0 8192 snapshot {} {} N 8", origin.display(), cow.display()))?;
    refused(&snapshot, ErrorKind::Unsupported, "`snapshot` target")?;
    let mixed = mapped("mixed", &format!("0 8192 linear {DISK_512} 40960\n8192 8 error"))?;
    refused(&mixed, ErrorKind::Unsupported, "`error` target")?;
    let read_only = mapped_with("ro", &format!("0 8192 linear {DISK_4096} 2048"), "--readonly")?;
    refused(&read_only, ErrorKind::Unsupported, "read-only")?;
    let plain = mapped("plain", &format!("0 8192 linear {DISK_4096} 20480"))?;
    run("dmsetup suspend plain")?;
    refused(&plain, ErrorKind::Busy, "another tool")?;
    run("dmsetup resume plain")?;
    run(&format!("dmsetup load plain --table '0 8192 linear {DISK_4096} 40960'"))?;
    refused(&plain, ErrorKind::Busy, "another tool")?;
    run("dmsetup clear plain")?;
    no_strays()?;

    let mut serve = pass_through();
    let attached = interposer.attach(&plain, &mut serve)?;
    let twice = interposer.attach(&plain, &mut serve).expect_err("it is attached");
    ensure!(twice.kind() == ErrorKind::Busy && twice.to_string().contains("attached already"), "{twice}");
    let lower = format!("/dev/dm-{}", attached.lower.minor);
    let half = interposer.attach(Path::new(&lower), &mut serve).expect_err("it is ours");
    ensure!(half.to_string().contains("lower half"), "{half}");
    interposer.detach(&attached, &mut serve)?;
    no_strays()?;
    unmapped(&["snap", "cow", "base", "zero", "mixed", "ro", "plain"])
}

/// Goal: a bare disk gets a stub once and is attached live then; bad uses are refused. Method: content by way of the disk, the stub,
/// and our device.
#[test]
fn a_stub_over_a_bare_disk() -> Result<()> {
    let interposer = kit()?;
    let disk = Path::new(DISK_4096);
    let bytes = pattern(12, 1 << 20);
    write_at(disk, 8 << 20, &bytes)?;
    run(&format!("mkfs.ext4 -q {DISK_512} 256M"))?;
    let mounted = Mounted::new(Path::new(DISK_512))?;
    let busy = interposer.make_stub(Path::new(DISK_512), "in-use").expect_err("it is mounted");
    ensure!(busy.kind() == ErrorKind::Busy && busy.to_string().contains("unmount"), "{busy}");
    mounted.unmount()?;
    let stub = interposer.make_stub(disk, "stub")?;
    ensure!(stub.path == Path::new("/dev/mapper/stub") && DevNo::of(&stub.path)? == stub.device);
    ensure!(interposer.make_stub(disk, "stub")? == stub, "made once, found again");
    ensure!(interposer.make_stub(Path::new(DISK_512), "stub").is_err(), "another disk's");
    ensure!(interposer.make_stub(&stub.path, "stub2").is_err(), "needs none");
    ensure!(read_at(&stub.path, 8 << 20, bytes.len())? == bytes);
    let mut serve = pass_through();
    let attached = interposer.attach(&stub.path, &mut serve)?;
    ensure!(interposer.make_stub(disk, "stub")? == stub, "found again while it is attached");
    ensure!(interposer.remove_stub("stub").expect_err("attached").kind() == ErrorKind::Busy);
    fio(&stub.path, LOAD)?;
    ensure!(read_at(&stub.path, 64 << 20, 4096).is_ok());
    interposer.detach(&attached, &mut serve)?;
    interposer.remove_stub("stub")?;
    ensure!(!stub.path.exists() && interposer.remove_stub("stub").is_err());
    no_strays()
}
