//! PostgreSQL on the disk that loses what was not flushed.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::postgres::{Cluster, folder_of_postgres};

use super::{DATA, Disk, EXTENTS_MAX, power_cut};
use crate::agent::{GROUP, LIMIT_SECONDS, Rig};
use crate::agent_dm::bypass::OtherBoot;
use crate::guests::Rows;
use crate::rig::{Mounted, machine, run, say, until};

const CUTS: u32 = 3;

/// Goal: a database on a protected volume comes back from a power cut with every commit that it confirmed, and its replica is the same, without a
/// compare of more than what was active. Method: a session that counts its confirmed rows; cuts; the database is started on the volume and its
/// rows are counted.
#[test]
fn a_database_survives_power_cuts() -> Result<()> {
    let control = machine()?;
    let boot = OtherBoot::begin(u32::MAX)?;
    let mut made = Some(Disk::make(33)?);
    let mut mounted = None;
    let source = Path::new("/dev/mapper").join(DATA);
    let rig = Rig::over(33, control, &source, Box::new(()), |config| {
        config.agent_toml += &format!("al_extents = {EXTENTS_MAX}\n[group.{GROUP}]\nstall_max = '1s'\n");
        mounted = made.take().map(|mut disk| disk.mount(&config.dir.join("agent")).map(|()| disk));
    })?;
    let mut disk = mounted.context("it was mounted")??;
    // User postgres has to get to its files.
    std::fs::set_permissions(rig.sites.path(""), std::fs::Permissions::from_mode(0o755)).context("open the folder")?;
    rig.run(|rig| {
        run(&format!("mkfs.ext4 -q -F {}", rig.device.display()))?;
        let rows = Rows::default();
        let promised = AtomicU64::new(0);
        for number in 1..=CUTS + 1 {
            let volume = Mounted::new(&rig.device)?;
            std::fs::set_permissions(volume.folder(), std::fs::Permissions::from_mode(0o755)).context("open it")?;
            let data = folder_of_postgres(&volume.folder().join("data"))?;
            let mut database = Cluster::new(data.clone(), folder_of_postgres(&rig.sites.path("sockets"))?);
            if number == 1 {
                database.create()?;
                database.start()?;
                database.sql("create table seen (id bigint primary key, note text)")?;
            } else {
                // Of the life before the cut.
                let _ = std::fs::remove_file(data.join("postmaster.pid"));
                database.start().context("start PostgreSQL after the cut")?;
                let confirmed = promised.load(Ordering::SeqCst);
                let count = rows.check(&database, confirmed)?;
                say(&format!("cut {}: {count} rows, {confirmed} were confirmed", number - 1));
                rows.sent.store(count, Ordering::SeqCst);
            }
            if number > CUTS {
                database.stop()?;
                volume.unmount()?;
                run(&format!("e2fsck -fn {}", rig.device.display()))?;
                break;
            }
            let before = rows.confirmed.load(Ordering::SeqCst);
            std::thread::scope(|scope| {
                let inserts = scope.spawn(|| rows.keep_inserting(&database));
                until("rows are confirmed", || rows.confirmed.load(Ordering::SeqCst) > before + 20)?;
                std::thread::sleep(Duration::from_millis(500 + rig.random(3000)));
                let note = || promised.store(rows.confirmed.load(Ordering::SeqCst), Ordering::SeqCst);
                let die = || {
                    // Those that wait for the device die with it.
                    let gone = || run("pkill -9 -u postgres; sleep 0.2; ! pgrep -u postgres").is_ok();
                    until("the database is dead", gone)?;
                    volume.unmount()
                };
                let found = power_cut(rig, &mut disk, &boot, number, note, die, || Ok(()))?;
                ensure!(inserts.join().expect("its panic is the test's").is_err(), "it inserts until it cannot");
                ensure!(found.active <= EXTENTS_MAX, "{} extents are active", found.active);
                Ok(())
            })?;
            rig.sites.link().heal();
            rig.sites.wait(GROUP, LIMIT_SECONDS)?;
        }
        rig.check_replica()
    })?;
    drop(disk);
    Ok(())
}
