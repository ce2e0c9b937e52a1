//! Content: what is written is read, by whatever way, and lies on the disk below.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use farshore_ublk::{Server, Stop};
use farshore_uring::{FileDevice, Geometry, NullDevice};

use crate::child::{config, null_geometry};
use crate::rig::{
    DATA_PATHS, DISK_512, DISK_4096, Fio, Mounted, Served, Spec, attribute, fio, machine, pattern, read_at, run,
    run_failing, until, write_at,
};

const MIB: usize = 1 << 20;

/// Goal: the limits that the kernel shows are those of the geometry. Method: devices over nothing, looked at in /sys.
#[test]
fn limits_are_the_geometrys() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        for block in [512, 4096] {
            let spec = Spec::filter("-", path);
            let server = Server::start(config(&spec), Arc::new(NullDevice::new(null_geometry(64 << 20, block))))?;
            let device = server.block_path();
            let shown = |name| attribute(&device, name);
            ensure!(shown("queue/logical_block_size")? == block.to_string());
            ensure!(shown("queue/physical_block_size")? == "4096");
            ensure!(shown("size")? == (64 * MIB / 512).to_string());
            ensure!(shown("queue/max_hw_sectors_kb")? == "256");
            ensure!(shown("queue/discard_max_hw_bytes")? == (64 * MIB).to_string());
            ensure!(shown("queue/write_zeroes_max_bytes")? == (64 * MIB).to_string());
            ensure!(shown("queue/write_cache")? == "write back", "flushes come through");
            ensure!(shown("queue/fua")? == "1");
            ensure!(shown("ro")? == "0");
            let info = server.info()?;
            ensure!(info.data_path() == path && info.queues() == 2 && info.depth() == 65);
            ensure!(shown("queue/nr_requests")? == "64", "one tag stays with the driver");
            server.stop(Stop::IfUnused)?;
            ensure!(!device.exists());
        }
    }
    Ok(())
}

/// Goal: file systems live on it. Method: ext4 made, filled, checked through the device; then checked on the disk below, without
/// it.
#[test]
fn a_file_system_survives_and_lies_on_the_disk() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        for disk in [DISK_512, DISK_4096] {
            let served = Served::start(&Spec::filter(disk, path))?;
            let device = served.device.display().to_string();
            run(&format!("mkfs.ext4 -q -F -E lazy_itable_init=0,nodiscard {device} 512M"))?;
            let mounted = Mounted::new(&served.device)?;
            let bytes = pattern(1, 12 * MIB);
            for file in 0..3 {
                std::fs::write(mounted.folder().join(format!("f{file}")), &bytes)?;
            }
            std::fs::remove_file(mounted.folder().join("f1"))?;
            run(&format!("fstrim {}", mounted.folder().display()))?;
            mounted.unmount()?;
            run(&format!("e2fsck -fn {device}"))?;
            served.stop()?;
            run(&format!("e2fsck -fn {disk}"))?;
            let below = Mounted::new(Path::new(disk))?;
            ensure!(std::fs::read(below.folder().join("f2"))? == bytes, "{path:?} {disk}: a file differs below");
            below.unmount()?;
        }
    }
    Ok(())
}

/// Goal: no request goes astray between queues, tags and buffers. Method: fio writes checksummed blocks from two processes at
/// depth 32 and reads them back.
#[test]
fn verified_load_on_several_queues() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        for disk in [DISK_512, DISK_4096] {
            let served = Served::start(&Spec::filter(disk, path))?;
            let common = "--verify=crc32c --iodepth=32 --numjobs=2 --group_reporting --offset_increment=64m";
            fio(&served.device, &format!("--rw=randwrite --bs=4k --size=12m {common}"))?;
            fio(&served.device, &format!("--rw=randwrite --bs=128k --size=32m {common}"))?;
            // Sizes that are no power of two, flushes and FUA in between.
            let odd = "--rw=randwrite --bsrange=4k-252k --bs_unaligned=0 --size=24m --fsync=16";
            fio(&served.device, &format!("{odd} {common}"))?;
            served.stop()?;
        }
    }
    Ok(())
}

/// Goal: a request's data is copied on its queue's thread, never by a worker of the ring, which would cost several times the copy.
/// Method: a deep load, and a look at the names of the server's threads while it goes on.
#[test]
fn no_copy_goes_to_a_kernel_worker() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        let server =
            Server::start(config(&Spec::filter("-", path)), Arc::new(NullDevice::new(null_geometry(64 << 20, 512))))?;
        let load =
            Fio::start(&server.block_path(), "--rw=randrw --bs=64k --size=32m --iodepth=32 --time_based --runtime=3")?;
        until("requests come", || server.stats().writes > 200)?;
        let threads: Vec<(String, String)> = std::fs::read_dir("/proc/self/task")?
            .flatten()
            .map(|thread| {
                let name = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
                (thread.file_name().to_string_lossy().into_owned(), name.trim().to_owned())
            })
            .collect();
        // A worker bears the number of the thread that it works for; the control device has one, rightly.
        let queues: Vec<_> = threads.iter().filter(|(_, name)| name.starts_with("ublk-")).collect();
        ensure!(queues.len() == 2, "{threads:?}");
        for (number, _) in queues {
            let worker = format!("iou-wrk-{number}");
            ensure!(!threads.iter().any(|(_, name)| *name == worker), "{path:?}: {threads:?}");
        }
        load.finish()?;
        server.stop(Stop::IfUnused)?;
    }
    Ok(())
}

/// Goal: discards and zeroes leave zeroes, above and below, and nothing beside them. Method: blkdiscard in a written range.
#[test]
fn discards_and_zeroes_read_as_zeroes() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        for disk in [DISK_512, DISK_4096] {
            let served = Served::start(&Spec::filter(disk, path))?;
            let device = served.device.clone();
            let bytes = pattern(2, 4 * MIB);
            write_at(&device, 0, &bytes)?;
            let name = device.display();
            run(&format!("blkdiscard --offset {} --length {} {name}", MIB, MIB))?;
            run(&format!("blkdiscard --zeroout --offset {} --length {} {name}", 2 * MIB, MIB))?;
            let mut expected = bytes.clone();
            expected[MIB..3 * MIB].fill(0);
            ensure!(read_at(&device, 0, 4 * MIB)? == expected, "{path:?} {disk}: above");
            run(&format!("dd if={name} of=/dev/null bs=1M count=64 iflag=direct"))?;
            served.stop()?;
            ensure!(read_at(Path::new(disk), 0, 4 * MIB)? == expected, "{path:?} {disk}: below");
        }
    }
    Ok(())
}

/// Goal: a read-only device is one to the kernel, and reads what lies below.
#[test]
fn a_read_only_device_takes_no_write() -> Result<()> {
    machine()?;
    let bytes = pattern(3, MIB);
    write_at(Path::new(DISK_512), 0, &bytes)?;
    for path in DATA_PATHS {
        let served = Served::start(&Spec { read_only: true, ..Spec::filter(DISK_512, path) })?;
        ensure!(attribute(&served.device, "ro")? == "1");
        ensure!(read_at(&served.device, 0, MIB)? == bytes);
        run_failing(&format!("dd if=/dev/zero of={} bs=4k count=1 oflag=direct", served.device.display()))?;
        run_failing(&format!("blkdiscard {}", served.device.display()))?;
        served.stop()?;
        ensure!(read_at(Path::new(DISK_512), 0, MIB)? == bytes);
    }
    Ok(())
}

/// Goal: partitions of the disk below are partitions of the device. Method: a table by hand; a write to the partition lies where
/// the table says.
#[test]
fn partitions_are_found() -> Result<()> {
    machine()?;
    let (start, sectors) = (2048u32, 32_768u32);
    let mut table = vec![0u8; 512];
    // One entry: Linux (0x83), by sectors.
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&start.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    write_at(Path::new(DISK_512), 0, &table)?;
    let served = Served::start(&Spec::filter(DISK_512, DATA_PATHS[0]))?;
    let partition = format!("{}p1", served.device.display());
    let partition = Path::new(&partition);
    until("the partition is there", || partition.exists())?;
    let bytes = pattern(4, MIB);
    write_at(partition, 4096, &bytes)?;
    ensure!(read_at(&served.device, u64::from(start) * 512 + 4096, MIB)? == bytes);
    served.stop()?;
    write_at(Path::new(DISK_512), 0, &[0; 512])?;
    ensure!(read_at(Path::new(DISK_512), u64::from(start) * 512 + 4096, MIB)? == bytes);
    Ok(())
}

/// Goal: an image file serves as well as a disk. Method: verified load over a file on tmpfs, served as a plain file device.
#[test]
fn an_image_file_is_served() -> Result<()> {
    machine()?;
    run("truncate --size 256M /dev/shm/image")?;
    for path in DATA_PATHS {
        let options = farshore_uring::BackingOptions { direct: farshore_uring::Direct::Off, read_only: false };
        let device = FileDevice::open(Path::new("/dev/shm/image"), options)?;
        let geometry: Geometry = farshore_uring::BlockDevice::geometry(&device);
        ensure!(geometry.size == 256 << 20);
        let server = Server::start(config(&Spec::filter("-", path)), Arc::new(device))?;
        let options =
            "--rw=randwrite --bs=4k --size=16m --verify=crc32c --iodepth=32 --numjobs=2 --offset_increment=64m";
        fio(&server.block_path(), options)?;
        let stats = server.stats();
        ensure!(stats.writes >= 2 * 4096 && stats.errors == 0, "{stats:?}");
        server.stop(Stop::IfUnused)?;
    }
    run("rm /dev/shm/image")?;
    Ok(())
}
