//! Starts, stops, misuse, leftovers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_ublk::{Control, DataPath, DeviceState, ErrorKind, Server, ServerConfig, Stop};
use farshore_uring::NullDevice;

use crate::child::{config, null_geometry};
use crate::rig::{
    DATA_PATHS, DISK_512, Fio, Mounted, Served, Spec, attribute, fio, machine, pattern, read_at, run, run_failing,
    until, write_at,
};

fn null(bytes: u64) -> Arc<NullDevice> {
    Arc::new(NullDevice::new(null_geometry(bytes, 512)))
}

/// Goal: a device in use is not pulled away by accident, and can be on purpose. Method: stop it mounted, both ways.
#[test]
fn a_mounted_device_is_stopped_only_by_force() -> Result<()> {
    machine()?;
    let spec = Spec::filter(DISK_512, DataPath::UserCopy);
    let backing = farshore_uring::BackingOptions { direct: farshore_uring::Direct::On, read_only: false };
    let device = Arc::new(farshore_uring::FileDevice::open(Path::new(DISK_512), backing)?);
    let server = Server::start(config(&spec), device)?;
    run(&format!("mkfs.ext4 -q -F {} 256M", server.block_path().display()))?;
    let mounted = Mounted::new(&server.block_path())?;
    let refused = server.stop(Stop::IfUnused).expect_err("it is mounted");
    ensure!(refused.kind() == ErrorKind::Busy && refused.to_string().contains("unmount"), "{refused}");
    ensure!(server.is_serving());
    std::fs::write(mounted.folder().join("still"), "works")?;
    run("sync")?;
    server.stop(Stop::Anyway)?;
    ensure!(!server.is_serving() && !server.block_path().exists());
    ensure!(std::fs::write(mounted.folder().join("no"), "more").and_then(|()| sync(mounted.folder())).is_err());
    // A file system over a device that is gone.
    let _ = run(&format!("umount {}", mounted.folder().display()));
    server.stop(Stop::IfUnused)?;
    run(&format!("e2fsck -fy {DISK_512} || [ $? -le 1 ]"))?;
    Ok(())
}

fn sync(folder: &Path) -> std::io::Result<()> {
    std::fs::File::open(folder.join("no"))?.sync_all()
}

/// Goal: a stop under load ends, with errors for the load only, and loses nothing that was in the page cache before. Method: fio
/// on one end of the device, a cached write without fsync on the other.
#[test]
fn a_stop_under_load_ends_and_writes_out_the_page_cache() -> Result<()> {
    machine()?;
    for path in DATA_PATHS {
        let served = Served::start(&Spec::filter(DISK_512, path))?;
        let bytes = pattern(5, 8 << 20);
        let file = std::fs::File::options().write(true).open(&served.device)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 64 << 20)?;
        let load = "--rw=randwrite --bs=16k --iodepth=32 --size=48m --time_based --runtime=60";
        let load = Fio::start(&served.device, load)?;
        let device = served.device.clone();
        until("fio writes", || writes(&device).is_ok_and(|count| count > 500))?;
        served.stop()?;
        load.fail()?;
        drop(file);
        ensure!(read_at(Path::new(DISK_512), 64 << 20, bytes.len())? == bytes, "{path:?}");
    }
    Ok(())
}

/// Writes that the block layer has counted.
fn writes(device: &Path) -> Result<u64> {
    let stat = attribute(device, "stat")?;
    Ok(stat.split_whitespace().nth(4).context("the fifth figure")?.parse()?)
}

/// Goal: what a crash leaves is found and removed, and its number is free again. Method: kill -9 of servers whose devices do not,
/// and do, outlive them.
#[test]
fn leftovers_are_found_and_removed() -> Result<()> {
    let control = machine()?;
    let mortal = Served::start(&Spec { survives: false, ..Spec::filter(DISK_512, DataPath::UserCopy) })?;
    let id = mortal.id()?;
    let device = mortal.device.clone();
    ensure!(!control.info(id)?.is_stale());
    mortal.kill()?;
    until("its disk goes away", || !device.exists())?;
    until("it is a leftover", || control.info(id).is_ok_and(|info| info.is_stale()))?;
    let busy = Server::start(ServerConfig { id: Some(id), ..ServerConfig::default() }, null(1 << 20));
    let busy = busy.expect_err("the number is taken");
    ensure!(busy.kind() == ErrorKind::Busy && busy.to_string().contains("leftover"), "{busy}");
    control.delete(id)?;
    ensure!(control.list()?.is_empty());

    let waiting = Served::start(&Spec::filter(DISK_512, DataPath::UserCopy))?;
    let id = waiting.id()?;
    waiting.kill()?;
    until("it waits", || control.info(id).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
    ensure!(!control.info(id)?.is_stale(), "it is to be recovered");
    let busy = Server::start(ServerConfig { id: Some(id), ..ServerConfig::default() }, null(1 << 20));
    let busy = busy.expect_err("the number is taken");
    ensure!(busy.to_string().contains("recover"), "{busy}");
    control.delete(id)?;
    until("its number is free", || control.info(id).is_err_and(|error| error.kind() == ErrorKind::NotFound))?;
    let again = Server::start(ServerConfig { id: Some(id), ..ServerConfig::default() }, null(1 << 20))?;
    ensure!(again.id() == id);
    again.stop(Stop::IfUnused)?;
    Ok(())
}

/// Goal: what is served is not taken by another. Method: every way to try.
#[test]
fn a_served_device_is_safe_from_others() -> Result<()> {
    let control = machine()?;
    let server = Server::start(ServerConfig { queues: 2, ..ServerConfig::default() }, null(8 << 20))?;
    let id = server.id();
    let pid = std::process::id().to_string();
    let taken = Server::start(ServerConfig { id: Some(id), ..ServerConfig::default() }, null(8 << 20));
    let taken = taken.expect_err("the number is taken");
    ensure!(taken.kind() == ErrorKind::Busy && taken.to_string().contains(&pid), "{taken}");
    let recovered = Server::recover(id, Duration::from_millis(50), null(8 << 20)).expect_err("it is served");
    ensure!(recovered.kind() == ErrorKind::Busy && recovered.to_string().contains(&pid), "{recovered}");
    let deleted = control.delete(id).expect_err("it is served");
    ensure!(deleted.kind() == ErrorKind::Busy && deleted.to_string().contains(&pid), "{deleted}");
    let none = Server::recover(id + 1000, Duration::ZERO, null(8 << 20)).expect_err("there is none");
    ensure!(none.kind() == ErrorKind::NotFound, "{none}");
    ensure!(server.is_serving());
    fio(&server.block_path(), "--rw=randwrite --bs=4k --size=4m --iodepth=8")?;
    server.stop(Stop::IfUnused)?;
    Ok(())
}

/// Goal: a device grows under its users where the kernel can, else it says that the kernel cannot; it never shrinks.
#[test]
fn a_device_grows_where_the_kernel_can() -> Result<()> {
    let control = machine()?;
    // A back end that is larger than what is served at first.
    let server = Server::start(ServerConfig::default(), null(8 << 20))?;
    let smaller = server.grow(4 << 20).expect_err("it would shrink");
    ensure!(smaller.kind() == ErrorKind::Invalid, "{smaller}");
    let grown = server.grow(16 << 20);
    if control.features().update_size() {
        grown?;
        ensure!(attribute(&server.block_path(), "size")? == (16 * 2048).to_string());
        fio(&server.block_path(), "--rw=randread --bs=4k --offset=8m --size=8m --iodepth=8")?;
    } else {
        let grown = grown.expect_err("before Linux 6.16");
        ensure!(grown.kind() == ErrorKind::Unsupported && grown.to_string().contains("6.16"), "{grown}");
        ensure!(attribute(&server.block_path(), "size")? == (8 * 2048).to_string());
    }
    server.stop(Stop::IfUnused)?;
    Ok(())
}

/// Goal: what cannot work says why and leaves nothing behind. Method: bad shapes, no right, no driver.
#[test]
fn errors_name_the_way_out() -> Result<()> {
    let control = machine()?;
    let odd = NullDevice::new(farshore_uring::Geometry { logical_block: 1024, ..null_geometry(1 << 20, 512) });
    let refused = Server::start(ServerConfig::default(), Arc::new(odd)).expect_err("no such blocks");
    ensure!(refused.kind() == ErrorKind::Invalid, "{refused}");
    let refused = Server::start(ServerConfig { depth: 0, ..ServerConfig::default() }, null(1 << 20));
    ensure!(refused.expect_err("no tags").kind() == ErrorKind::Invalid);
    ensure!(control.list()?.is_empty(), "nothing is left");
    drop(control);

    let asked = "--exact ublk::life::an_unprivileged_process_is_told --ignored --nocapture";
    let program = std::env::current_exe()?;
    let text = run(&format!("setpriv --reuid=65534 --clear-groups {} {asked}", program.display()))?;
    ensure!(text.contains("kind Permission"), "{text}");

    run("rmmod ublk_drv")?;
    let missing = Control::open().expect_err("no driver");
    ensure!(missing.kind() == ErrorKind::NoDriver, "{missing}");
    let text = missing.to_string();
    ensure!(text.contains("CONFIG_BLK_DEV_UBLK") && text.contains("NBD"), "{text}");
    run("modprobe ublk_drv")?;
    Ok(())
}

#[test]
#[ignore = "runs as another user, started by errors_name_the_way_out"]
#[allow(clippy::print_stdout, reason = "the parent reads it")]
fn an_unprivileged_process_is_told() {
    let error = Control::open().expect_err("only root may");
    println!("kind {:?}: {error}", error.kind());
}

/// Goal: what is written for Linux 6.1 works. Method: this kernel still takes the bare command numbers, and the driver is not asked
/// for its features.
#[test]
fn the_oldest_dialect_is_spoken() -> Result<()> {
    machine()?;
    let old = Control::open_as_to_linux_6_1()?;
    ensure!(old.features().bits().is_none());
    let config = ServerConfig { data_path: Some(DataPath::BufferSwap), queues: 2, ..ServerConfig::default() };
    let server = Server::start_with(old, config, null(64 << 20))?;
    fio(&server.block_path(), "--rw=randrw --bs=4k --size=8m --iodepth=32")?;
    let info = server.info()?;
    ensure!(info.state() == DeviceState::Live && info.data_path() == DataPath::BufferSwap);
    server.stop(Stop::IfUnused)?;
    // Without a wish it takes what the driver grants.
    let server = Server::start_with(Control::open_as_to_linux_6_1()?, ServerConfig::default(), null(64 << 20))?;
    ensure!(server.info()?.data_path() == DataPath::UserCopy);
    server.stop(Stop::IfUnused)?;
    Ok(())
}

/// Goal: many devices come and go. Method: ten at once, started and stopped out of order, three rounds.
#[test]
fn many_devices_come_and_go() -> Result<()> {
    let control = machine()?;
    for _ in 0..3 {
        let config = ServerConfig { depth: 16, ..ServerConfig::default() };
        let mut servers = (0..10).map(|_| Server::start(config, null(1 << 20))).collect::<Result<Vec<_>, _>>()?;
        ensure!(control.list()?.len() == 10);
        while !servers.is_empty() {
            servers.remove(servers.len() / 2).stop(Stop::IfUnused)?;
        }
        ensure!(control.list()?.is_empty());
    }
    Ok(())
}

/// Goal: a write to a stopped device's number does not reach the disk.
#[test]
fn a_stopped_device_is_gone() -> Result<()> {
    machine()?;
    let bytes = pattern(6, 4096);
    write_at(Path::new(DISK_512), 0, &bytes)?;
    let served = Served::start(&Spec::filter(DISK_512, DataPath::UserCopy))?;
    let device = served.device.clone();
    served.stop()?;
    run_failing(&format!("dd if=/dev/zero of={} bs=4k count=1 oflag=direct conv=nocreat", device.display()))?;
    ensure!(read_at(Path::new(DISK_512), 0, 4096)? == bytes);
    Ok(())
}
