//! PostgreSQL and verified load together on a file system on a protected device, while the agent is killed.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::postgres::{Cluster, DATABASE_LIMIT, folder_of_postgres};
use farshore_cli::sites::run::run_within;

use super::{Rows, protected};
use crate::agent::{GROUP, LIMIT_SECONDS, MIB, Rig};
use crate::rig::{Fio, Mounted, run, say};

const DISK_BYTES: u64 = 640 * MIB;
const KILLS: u32 = 3;
/// How long pgbench runs.
const SECONDS: u64 = 30;

/// A file system, and how its own tools judge it.
struct FileSystem {
    name: &'static str,
    make: &'static str,
    /// Changes nothing, and fails if there is anything to mend.
    check: &'static str,
}

const EXT4: FileSystem = FileSystem { name: "ext4", make: "mkfs.ext4 -q -F", check: "e2fsck -fn" };
const XFS: FileSystem = FileSystem { name: "xfs", make: "mkfs.xfs -q -f", check: "xfs_repair -n" };

impl FileSystem {
    fn make(&self, device: &Path) -> Result<()> {
        run(&format!("modprobe {}; {} {}", self.name, self.make, device.display())).map(drop)
    }

    fn check(&self, device: &Path) -> Result<()> {
        run(&format!("{} {}", self.check, device.display())).map(drop)
    }
}

fn cluster(mounted: &Mounted, rig: &Rig, sockets: &str) -> Result<Cluster> {
    std::fs::set_permissions(mounted.folder(), std::fs::Permissions::from_mode(0o755)).context("open the folder")?;
    Ok(Cluster::new(mounted.folder().join("data"), folder_of_postgres(&rig.sites.path(sockets))?))
}

/// Goal: the guests see nothing of killed agents, and the newest point is a database with every confirmed row. Method: pgbench,
/// a session that counts its confirmed rows, and fio on one file system; kills; then the view is mounted and its database started
/// while the load goes on, and at the end file system and replica are compared.
fn databases_outlive_the_agent(seed: u64, file_system: &FileSystem) -> Result<()> {
    protected(seed, "farshore-guest", DISK_BYTES, |_| {})?.run(|rig| {
        file_system.make(&rig.device)?;
        let mounted = Mounted::new(&rig.device)?;
        folder_of_postgres(&mounted.folder().join("data"))?;
        let mut database = cluster(&mounted, rig, "sockets")?;
        database.create()?;
        database.start()?;
        database.sql("create table seen (id bigint primary key, note text)")?;
        database.run("pgbench", &["-i", "-q", "-s", "1"])?.ok()?;
        let rows = Rows::default();
        let file = mounted.folder().join("verified");
        under_load(&database, &rows, &file, || {
            for _ in 0..KILLS {
                std::thread::sleep(Duration::from_millis(500 + rig.random(2000)));
                rig.kill_and_restart()?;
            }
            let sure = rows.confirmed.load(Ordering::SeqCst);
            ensure!(sure > 0, "no row was confirmed");
            rig.sites.wait(GROUP, LIMIT_SECONDS)?;
            check_view(rig, file_system, &rows, sure)
        })?;
        database.stop()?;
        mounted.unmount()?;
        file_system.check(&rig.device)?;
        say(&format!("{}: {} writes were cut off by {KILLS} kills", file_system.name, rig.writes_cut_off()));
        rig.check_replica()?;
        rig.check_logs()
    })
}

/// Runs `during` while pgbench, the inserting session and fio run; all of them have to end well.
fn under_load(database: &Cluster, rows: &Rows, file: &Path, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let verified = "--rw=randwrite --bsrange=4k-64k --iodepth=8 --size=32m --rate=2m --verify=crc32c --fsync=32";
    std::thread::scope(|scope| {
        let inserts = scope.spawn(|| rows.keep_inserting(database));
        let bench = scope.spawn(|| {
            let (time, limit) = (SECONDS.to_string(), Duration::from_secs(SECONDS) + DATABASE_LIMIT);
            run_within(database.program("pgbench")?.args(["-n", "-c", "2", "-j", "1", "-T", &time]), limit)?.ok()
        });
        let load = Fio::start(file, verified);
        let during = during();
        let load = load.and_then(Fio::finish);
        let bench = bench.join().expect("pgbench's thread does not panic");
        rows.stop.store(true, Ordering::SeqCst);
        let inserts = inserts.join().expect("the inserting thread does not panic");
        during.and(bench.map(drop)).and(inserts).and(load.map(drop))
    })
}

/// The newest point: mounted, its database started, its rows counted, its file system checked. All that is written to the view.
fn check_view(rig: &Rig, file_system: &FileSystem, rows: &Rows, sure: u64) -> Result<()> {
    let view = rig.open_view_at("latest")?;
    // Two file systems of one UUID: xfs refuses without being told.
    let options = if file_system.name == "xfs" { "-o nouuid" } else { "" };
    let mounted = Mounted::with(&view.device, options)?;
    let mut database = cluster(&mounted, rig, "view-sockets")?;
    // Of the life that the point interrupts.
    let _ = std::fs::remove_file(mounted.folder().join("data/postmaster.pid"));
    database.redirect()?;
    database.start().context("start PostgreSQL on the view")?;
    let count = rows.check(&database, sure)?;
    let sums = database.sql(
        "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
         and (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)",
    )?;
    ensure!(["t", ""].contains(&sums.trim()), "money was lost or made: {sums:?}");
    database.stop()?;
    mounted.unmount()?;
    file_system.check(&view.device)?;
    say(&format!("{}: {count} rows in the view, {sure} were confirmed before it", file_system.name));
    rig.close_view(&view)
}

#[test]
fn a_database_on_ext4_outlives_the_agent() -> Result<()> {
    databases_outlive_the_agent(31, &EXT4)
}

#[test]
fn a_database_on_xfs_outlives_the_agent() -> Result<()> {
    databases_outlive_the_agent(32, &XFS)
}
