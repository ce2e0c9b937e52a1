//! Servers die; their devices do not.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_ublk::{DataPath, DeviceState, ErrorKind, Server};
use farshore_uring::{FileDevice, NullDevice};

use crate::child::null_geometry;
use crate::rig::{DISK_512, DISK_4096, Fio, Mounted, Served, Spec, attribute, fio, machine, pattern, run, until};

/// What has to be under way at a kill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum UnderWay {
    Any,
    Writes,
}

/// Kills the server `kills` times under a verified load; the load must see nothing of it.
fn kill_under_load(disk: &str, path: DataPath, kills: u32, under_way: UnderWay) -> Result<()> {
    let control = machine()?;
    let mut served = Served::start(&Spec::filter(disk, path))?;
    let id = served.id()?;
    let options = "--rw=randwrite --bsrange=4k-64k --iodepth=32 --size=64m --numjobs=2 --offset_increment=512m \
                   --verify=crc32c --group_reporting";
    let mut load = Fio::start(&served.device, options)?;
    for kill in 0..kills {
        // Different moments in the life of requests; no randomness is needed for the machine is not that regular.
        std::thread::sleep(Duration::from_millis(u64::from(137 * kill % 400)));
        loop {
            // Writes and the reads that verify them alternate for as long as there are kills to come.
            if !load.is_running()? {
                load.finish()?;
                load = Fio::start(&served.device, options)?;
            }
            let inflight = attribute(&served.device, "inflight")?;
            let (reads, writes) = inflight.split_once(char::is_whitespace).context("reads and writes")?;
            if writes.trim() != "0" || (under_way == UnderWay::Any && reads.trim() != "0") {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let spec = served.kill()?;
        served = Served::start(&spec)?;
        ensure!(served.id()? == id);
        ensure!(control.info(id)?.state() == DeviceState::Live);
    }
    load.finish()?;
    served.stop()
}

#[test]
fn twenty_kills_under_verified_load_with_user_copy() -> Result<()> {
    kill_under_load(DISK_512, DataPath::UserCopy, 20, UnderWay::Any)
}

#[test]
fn ten_kills_under_verified_load_with_buffer_swap() -> Result<()> {
    kill_under_load(DISK_4096, DataPath::BufferSwap, 10, UnderWay::Any)
}

/// Goal: a write of the dead server does not land on top of the same request issued again. Method: writes that the disk keeps back
/// for 200 ms are under way at every kill; what is there in the end is verified.
#[test]
fn kills_over_a_slow_disk() -> Result<()> {
    machine()?;
    let slow = SlowDisk::new()?;
    kill_under_load(SlowDisk::PATH, DataPath::UserCopy, 5, UnderWay::Writes)?;
    drop(slow);
    Ok(())
}

/// Goal: a server's death is noticed soon even where it held every request that its queue can carry; before Linux 6.15 the driver
/// has no sign of it but the commands that wait in the kernel. Method: a shallow queue over the slow disk, always full: as the
/// server leaves it, and with all tags in use, as a change of the scheduler does. The kernel alone takes 30 s.
#[test]
fn a_full_queue_shows_its_servers_death() -> Result<()> {
    let control = machine()?;
    let _slow = SlowDisk::new()?;
    let spec = Spec { queues: 1, depth: 4, ..Spec::filter(SlowDisk::PATH, DataPath::UserCopy) };
    let mut served = Served::start(&spec)?;
    ensure!(attribute(&served.device, "queue/nr_requests")? == "4");
    ensure!(attribute(&served.device, "queue/io_timeout")? == "1000");
    for full in [4, 5] {
        // A scheduler holds back some of the writes.
        let queue = format!("/sys/block/ublkb{}/queue", served.id()?);
        run(&format!("echo none > {queue}/scheduler && echo {full} > {queue}/nr_requests"))?;
        let load = Fio::start(&served.device, "--rw=randwrite --bs=64k --size=16m --iodepth=32 --verify=crc32c")?;
        let device = served.device.clone();
        let writes = || -> Result<u32> {
            let inflight = attribute(&device, "inflight")?;
            Ok(inflight.split_whitespace().nth(1).context("reads and writes")?.parse()?)
        };
        until("the queue fills", || writes().is_ok_and(|writes| writes >= 4))?;
        // The last one is there as soon as the load is in its stride; Linux 7.3 never lets all five in.
        std::thread::sleep(Duration::from_millis(100));
        let spec = served.kill()?;
        let id = spec.recover.context("the device's number")?;
        let deadline = std::time::Instant::now() + Duration::from_secs(15);
        while control.info(id)?.state() != DeviceState::Quiesced {
            ensure!(std::time::Instant::now() < deadline, "the kernel has not noticed, with {full} requests");
            std::thread::sleep(Duration::from_millis(5));
        }
        served = Served::start(&spec)?;
        load.finish()?;
    }
    served.stop()
}

/// [`DISK_512`] with writes that take 200 ms more.
struct SlowDisk;

impl SlowDisk {
    const PATH: &str = "/dev/mapper/slow";

    fn new() -> Result<Self> {
        run("modprobe dm_delay")?;
        let sectors = run(&format!("blockdev --getsz {DISK_512}"))?;
        let table = format!("0 {} delay {DISK_512} 0 0 {DISK_512} 0 200", sectors.trim());
        // Nobody runs udev here, which would make the node.
        run(&format!("dmsetup create slow --noudevsync --table '{table}' && dmsetup mknodes slow"))?;
        Ok(Self)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Of a killed server the last write may still be under way.
        let _ = run("dmsetup remove --retry --noudevsync slow");
    }
}

/// Goal: a mounted file system waits for the next server and goes on. Method: a kill in the middle of a copy; the copy ends after
/// the recovery and is whole.
#[test]
fn a_mounted_file_system_waits() -> Result<()> {
    let control = machine()?;
    let served = Served::start(&Spec::filter(DISK_512, DataPath::UserCopy))?;
    run(&format!("mkfs.ext4 -q -F {} 512M", served.device.display()))?;
    let mounted = Mounted::new(&served.device)?;
    let id = served.id()?;
    let bytes = pattern(7, 64 << 20);
    let file = mounted.folder().join("file");
    let writer = std::thread::spawn({
        let (file, bytes) = (file.clone(), bytes.clone());
        move || -> std::io::Result<()> {
            std::fs::write(&file, &bytes)?;
            std::fs::File::open(&file)?.sync_all()
        }
    });
    let device = served.device.clone();
    until("the copy is under way", || {
        attribute(&device, "inflight").is_ok_and(|text| text.split_whitespace().any(|n| n != "0"))
    })?;
    let spec = served.kill()?;
    until("it waits", || control.info(id).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
    let served = Served::start(&spec)?;
    writer.join().expect("the writer only writes")?;
    run("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(std::fs::read(&file)? == bytes);
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", served.device.display()))?;
    served.stop()
}

/// Goal: a living server hands its device to another one under load where the kernel can, else it says that it cannot and serves on.
#[test]
fn a_living_server_lets_go() -> Result<()> {
    let control = machine()?;
    let backing = farshore_uring::BackingOptions { direct: farshore_uring::Direct::On, read_only: false };
    let config = farshore_ublk::ServerConfig { queues: 2, ..farshore_ublk::ServerConfig::default() };
    let mut server = Server::start(config, Arc::new(FileDevice::open(DISK_512.as_ref(), backing)?))?;
    let id = server.id();
    let load = Fio::start(&server.block_path(), "--rw=randwrite --bs=16k --size=48m --iodepth=16 --verify=crc32c")?;
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(200));
        let let_go = server.let_go(Duration::from_secs(10));
        if !control.features().quiesce() {
            let refused = let_go.expect_err("before Linux 6.16");
            ensure!(refused.kind() == ErrorKind::Unsupported && server.is_serving(), "{refused}");
            break;
        }
        let_go?;
        ensure!(!server.is_serving());
        ensure!(control.info(id)?.state() == DeviceState::Quiesced, "{:?}", control.info(id)?);
        ensure!(server.has_failed() && !server.is_serving(), "who serves does not hear of it");
        drop(server);
        server = Server::recover(id, Duration::from_secs(20), Arc::new(FileDevice::open(DISK_512.as_ref(), backing)?))?;
    }
    load.finish()?;
    server.stop(farshore_ublk::Stop::IfUnused)?;
    Ok(())
}

/// Goal: only the same device takes over. Method: back ends that differ, then the right one.
#[test]
fn another_back_end_is_refused_and_the_device_waits_on() -> Result<()> {
    let control = machine()?;
    let spec = Spec { backend: format!("null:{}", 64 << 20), ..Spec::filter("-", DataPath::UserCopy) };
    let served = Served::start(&spec)?;
    let id = served.id()?;
    let spec = served.kill()?;
    let recover = |size, block| {
        Server::recover(id, Duration::from_secs(5), Arc::new(NullDevice::new(null_geometry(size, block))))
    };
    let small = recover(32 << 20, 512).expect_err("too small");
    ensure!(small.kind() == ErrorKind::Invalid, "{small}");
    let blocks = recover(64 << 20, 4096).expect_err("other blocks");
    ensure!(blocks.kind() == ErrorKind::Invalid && blocks.to_string().contains("4096"), "{blocks}");
    until("it waits on", || control.info(id).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
    let served = Served::start(&spec)?;
    fio(&served.device, "--rw=randread --bs=4k --size=4m --iodepth=8")?;
    served.stop()
}

/// Goal: a device that goes with its server cannot be recovered, and says so.
#[test]
fn a_mortal_device_is_not_recovered() -> Result<()> {
    machine()?;
    let spec = Spec { backend: format!("null:{}", 1 << 20), survives: false, ..Spec::filter("-", DataPath::UserCopy) };
    let served = Served::start(&spec)?;
    let id = served.id()?;
    served.kill()?;
    let refused = Server::recover(id, Duration::ZERO, Arc::new(NullDevice::new(null_geometry(1 << 20, 512))));
    let refused = refused.expect_err("it is dead");
    ensure!(refused.kind() == ErrorKind::Unsupported, "{refused}");
    Ok(())
}

/// Goal: the same process takes its device back after its queues have failed. Method: a back end whose queue panics at a certain
/// write.
#[test]
fn a_queue_that_panics_leaves_a_device_to_be_recovered() -> Result<()> {
    let control = machine()?;
    let backing = farshore_uring::BackingOptions { direct: farshore_uring::Direct::On, read_only: false };
    let config = farshore_ublk::ServerConfig { queues: 2, ..farshore_ublk::ServerConfig::default() };
    let server = Server::start(config, Arc::new(odd(Fault::Panic)?))?;
    let id = server.id();
    let load = Fio::start(&server.block_path(), "--rw=randwrite --bs=4k --size=16m --iodepth=16 --verify=crc32c")?;
    until("a queue panics", || !server.is_serving())?;
    until("it waits", || control.info(id).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
    drop(server);
    let sound = FileDevice::open(DISK_512.as_ref(), backing)?;
    let server = Server::recover(id, Duration::from_secs(20), Arc::new(sound))?;
    load.finish()?;
    server.stop(farshore_ublk::Stop::IfUnused)?;
    Ok(())
}

/// Goal: a process that lives on lets go of its device under load as one that dies does: no request stays behind in a ring that
/// closes. Method: often, and with threads that take their time between the end of their queue and their own, as on a busy machine.
#[test]
fn a_process_that_lives_on_loses_no_request() -> Result<()> {
    let control = machine()?;
    let device = || odd(Fault::SlowEnd).map(Arc::new);
    let mut server = Server::start(farshore_ublk::ServerConfig::default(), device()?)?;
    let id = server.id();
    let options = "--rw=randwrite --bs=4k --size=16m --iodepth=32 --numjobs=3 --offset_increment=64m \
                   --verify=crc32c --group_reporting";
    let mut load = Fio::start(&server.block_path(), options)?;
    for _ in 0..100 {
        if !load.is_running()? {
            load.finish()?;
            load = Fio::start(&server.block_path(), options)?;
        }
        std::thread::sleep(Duration::from_millis(20));
        server.abandon();
        until("it waits", || control.info(id).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
        server = Server::recover(id, Duration::from_secs(20), device()?)?;
    }
    load.finish()?;
    server.stop(farshore_ublk::Stop::IfUnused)?;
    Ok(())
}

/// Goal: who serves sees which of its queues hangs, whatever the other one does. Method: a back end that stands still in one queue,
/// which is sent requests by one processor; the other one goes on.
#[test]
fn a_queue_that_hangs_is_seen() -> Result<()> {
    machine()?;
    let config = farshore_ublk::ServerConfig { queues: 2, ..farshore_ublk::ServerConfig::default() };
    let device = odd(Fault::Hang)?;
    let go_on = Arc::clone(&device.go_on);
    let server = Server::start(config, Arc::new(device))?;
    let held = Fio::start(&server.block_path(), "--rw=randwrite --bs=4k --size=4m --iodepth=4 --cpus_allowed=0")?;
    let mut hangs = None;
    until("a queue hangs", || {
        let before = server.turns_under_way();
        std::thread::sleep(Duration::from_millis(500));
        hangs = (0..2).find(|&at| before[at].is_some() && server.turns_under_way()[at] == before[at]);
        hangs.is_some()
    })?;
    let hangs = hangs.context("a queue")?;
    let (turn, turns) = (server.turns_under_way()[hangs], server.stats().turns);
    fio(&server.block_path(), "--rw=randread --bs=4k --size=1m --iodepth=4 --cpus_allowed=1")?;
    ensure!(server.stats().turns > turns, "the other queue serves");
    ensure!(turn.is_some() && server.turns_under_way()[hangs] == turn && server.turns_under_way()[1 - hangs].is_none());
    go_on.store(true, std::sync::atomic::Ordering::Relaxed);
    held.finish()?;
    until("both wait", || server.turns_under_way() == [None, None])?;
    server.stop(farshore_ublk::Stop::IfUnused)?;
    ensure!(server.turns_under_way() == [None, None], "what has ended hangs nowhere");
    Ok(())
}

/// The disk, through a program with a fault.
fn odd(fault: Fault) -> Result<Odd> {
    let backing = farshore_uring::BackingOptions { direct: farshore_uring::Direct::On, read_only: false };
    Ok(Odd { disk: FileDevice::open(DISK_512.as_ref(), backing)?, fault, go_on: Arc::default() })
}

use odd::{Fault, Odd};

mod odd {
    //! Devices with a fault in their program.

    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use farshore_uring::{
        AlignedBuf, BlockDevice, BlockQueue, Completion, Done, Errno, Extent, FileDevice, FileQueue, Geometry, Io,
        Purpose, Request,
    };

    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(super) enum Fault {
        /// Each queue panics at its 300th write.
        Panic,
        /// The queue's thread takes 20 ms to give up its queue, after that has closed its ring.
        SlowEnd,
        /// Each queue stands still at its 300th write until it is told to go on.
        Hang,
    }

    pub(super) struct Odd {
        pub(super) disk: FileDevice,
        pub(super) fault: Fault,
        pub(super) go_on: Arc<AtomicBool>,
    }

    pub(super) struct OddQueue {
        queue: FileQueue,
        fault: Fault,
        go_on: Arc<AtomicBool>,
        writes: u32,
    }

    impl BlockDevice for Odd {
        type Buf = AlignedBuf;
        type Queue = OddQueue;

        fn geometry(&self) -> Geometry {
            self.disk.geometry()
        }

        fn open_queue<I: Io<AlignedBuf>>(&self, io: &mut I) -> io::Result<OddQueue> {
            let (queue, go_on) = (self.disk.open_queue(io)?, Arc::clone(&self.go_on));
            Ok(OddQueue { queue, fault: self.fault, go_on, writes: 0 })
        }

        fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
            self.disk.extents(offset, len)
        }
    }

    impl BlockQueue for OddQueue {
        type Buf = AlignedBuf;

        fn buffer(&mut self, purpose: Purpose, len: u32) -> AlignedBuf {
            self.queue.buffer(purpose, len)
        }

        fn submit<I: Io<AlignedBuf>>(&mut self, io: &mut I, tag: u32, request: Request<AlignedBuf>) {
            self.writes += u32::from(matches!(request, Request::Write { .. }));
            assert!(self.fault != Fault::Panic || self.writes < 300, "the fault of this device");
            while self.fault == Fault::Hang && self.writes == 300 && !self.go_on.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
            }
            self.queue.submit(io, tag, request);
        }

        fn handle_completion<I: Io<AlignedBuf>>(&mut self, io: &mut I, completion: Completion<AlignedBuf>) {
            self.queue.handle_completion(io, completion);
        }

        fn handle_wake<I: Io<AlignedBuf>>(&mut self, io: &mut I) {
            self.queue.handle_wake(io);
        }

        fn poll_done(&mut self) -> Option<Done<AlignedBuf>> {
            self.queue.poll_done()
        }
    }

    impl Drop for OddQueue {
        fn drop(&mut self) {
            if self.fault == Fault::SlowEnd {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
