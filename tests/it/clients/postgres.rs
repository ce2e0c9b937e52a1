//! PostgreSQL on a protected volume. Goal: every recovery point opens as a consistent database that has every transaction
//! confirmed before the point's time, and nothing that was never sent. Method: pgbench for load, and one session that
//! inserts numbered rows and notes when each commit was confirmed; meanwhile bookmarks, a cut link, a killed target.
//!
//! `FARSHORE_PG_SECONDS`: how long pgbench runs; `FARSHORE_PG_POINTS`: how many points besides latest and the bookmarks;
//! `FARSHORE_SEED`: which.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_proto::WallTime;
use farshore_proto::text::parse_time;
use farshore_uring::sim::SimRng;
use serde_json::Value;

use farshore_cli::sites::mount::{Attached, need_machine};
use farshore_cli::sites::postgres::{Cluster, DATABASE_LIMIT, folder_of_postgres};
use farshore_cli::sites::run::{find, run_within, text};

use crate::support::rig::{GROUP, VOLUME};
use crate::support::{LIMIT, MIB, Rig, device, number, pause, until};

const IMAGE_BYTES: u64 = 768 * MIB;

/// A psql session that inserts numbered rows, each a transaction of its own.
struct Inserter {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Inserter {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut child = cluster
            .program("psql")?
            .args(["-qAtX", "-v", "ON_ERROR_STOP=1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start psql")?;
        let answers = BufReader::new(child.stdout.take().context("psql's output")?);
        Ok(Self { child, answers })
    }

    /// Returns when the commit is confirmed.
    fn insert(&mut self, id: u64) -> Result<()> {
        let input = self.child.stdin.as_mut().context("psql's input")?;
        writeln!(input, "insert into seen values ({id}, repeat(md5('{id}'), 8)) returning id;")
            .context("send a row")?;
        let mut line = String::new();
        self.answers.read_line(&mut line).context("wait for a commit")?;
        ensure!(line.trim() == id.to_string(), "row {id} was answered with {line:?}");
        Ok(())
    }
}

impl Drop for Inserter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Which rows were sent, and when each was confirmed.
#[derive(Default)]
struct Record {
    sent: AtomicU64,
    confirmed: Mutex<Vec<WallTime>>,
    stop: AtomicBool,
}

impl Record {
    fn keep_inserting(&self, cluster: &Cluster) -> Result<()> {
        let mut inserter = Inserter::start(cluster)?;
        while !self.stop.load(Ordering::SeqCst) {
            let id = self.sent.fetch_add(1, Ordering::SeqCst) + 1;
            inserter.insert(id)?;
            self.confirmed.lock().expect("no holder panics").push(farshore_tests::wall());
        }
        Ok(())
    }

    fn confirmed(&self) -> usize {
        self.confirmed.lock().expect("no holder panics").len()
    }

    /// Waits until so many more rows are confirmed.
    fn progress(&self, rows: usize) -> Result<()> {
        let from = self.confirmed();
        until("rows are committed", || {
            Ok((self.confirmed() >= from + rows || self.stop.load(Ordering::SeqCst)).then_some(()))
        })
    }

    /// Checks the rows of a point of `time`: a prefix of what was sent, with all that was confirmed before.
    fn check(&self, rows: &str, time: WallTime) -> Result<()> {
        let ids: Vec<u64> = rows.lines().map(str::parse).collect::<Result<_, _>>().context("ids are numbers")?;
        let count = ids.len() as u64;
        let gap = ids.iter().zip(1..).find(|(id, wanted)| *id != wanted);
        ensure!(gap.is_none(), "rows are missing or doubled: (row, expected) = {gap:?} of {count}");
        let sure = self.confirmed.lock().expect("no holder panics").partition_point(|at| *at < time) as u64;
        let sent = self.sent.load(Ordering::SeqCst);
        ensure!(count >= sure, "{count} rows are there, {sure} were confirmed before the point's time");
        ensure!(count <= sent, "{count} rows are there, only {sent} were ever sent");
        Ok(())
    }
}

#[test]
fn every_point_is_a_consistent_database() {
    need_machine().expect("what the test needs");
    Rig::test(
        |config| config.ring = 128 << 20,
        |rig| {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(rig.dir(), std::fs::Permissions::from_mode(0o755)).context("open the folder")?;
            let image = rig.dir().join("source.img");
            std::fs::File::create_new(&image).and_then(|file| file.set_len(IMAGE_BYTES)).context("make the image")?;
            let socket = rig.sites.protect(&image, GROUP, VOLUME)?;
            rig.wait()?;
            let mut disk = Attached::new(&socket, &rig.dir().join("source-disk"))?;
            run_within(Command::new(find("mkfs.ext4", "e2fsprogs")?).args(["-q", "-F", disk.device()?]), LIMIT)?
                .ok()?;
            let place = rig.dir().join("source-mount");
            disk.mount(&place)?;
            let data = folder_of_postgres(&place.join("data"))?;
            let mut cluster = Cluster::new(data, folder_of_postgres(&rig.dir().join("source-pg"))?);
            cluster.create()?;
            cluster.start()?;
            cluster.sql("create extension amcheck; create table seen (id bigint primary key, note text)")?;
            cluster.run("pgbench", &["-i", "-q", "-s", "2"])?.ok()?;
            // From here on every point has the tables.
            rig.bookmark("tables")?;
            let ready = farshore_tests::wall();
            let record = Record::default();
            live(rig, &cluster, &record)?;
            rig.wait()?;
            let points = chosen(rig, ready)?;
            for point in &points {
                check_point(rig, &record, point).with_context(|| format!("point {point}"))?;
            }
            cluster.stop()?;
            disk.detach()?;
            restored_equals_source(rig, &image)
        },
    );
}

/// The run: load, bookmarks, a cut link, a killed target.
fn live(rig: &mut Rig, cluster: &Cluster, record: &Record) -> Result<()> {
    let seconds = number("FARSHORE_PG_SECONDS", 60)?;
    let part = Duration::from_secs(seconds) / 6;
    std::thread::scope(|scope| {
        let inserts = scope.spawn(|| {
            let result = record.keep_inserting(cluster);
            record.stop.store(true, Ordering::SeqCst);
            result
        });
        let bench = scope.spawn(|| {
            let time = seconds.to_string();
            let args = ["-n", "-c", "3", "-j", "1", "-T", &time];
            run_within(cluster.program("pgbench")?.args(args), Duration::from_secs(seconds) + DATABASE_LIMIT)?.ok()
        });
        let mut events = || -> Result<()> {
            record.progress(10)?;
            pause(part);
            rig.bookmark("quiet")?;
            rig.sites.link().cut();
            pause(part);
            record.progress(10)?;
            rig.sites.link().heal();
            rig.bookmark("after-the-break")?;
            pause(part);
            rig.sites.kill_target();
            record.progress(10)?;
            pause(part);
            rig.sites.start_target()?;
            rig.bookmark("after-the-crash")?;
            record.progress(10)
        };
        let events = events();
        let bench = bench.join().expect("pgbench's thread does not panic");
        record.stop.store(true, Ordering::SeqCst);
        let inserts = inserts.join().expect("the inserting thread does not panic");
        events.and(inserts).and(bench.map(drop))
    })
}

/// Latest, the bookmarks, and some of the rest.
fn chosen(rig: &Rig, ready: WallTime) -> Result<Vec<Value>> {
    let time = |point: &Value| point["time"].as_str().and_then(|time| parse_time(time).ok()).unwrap_or_default();
    let points: Vec<Value> = rig.points()?.into_iter().filter(|point| time(point) >= ready).collect();
    let mut chosen: Vec<Value> = points.iter().filter(|point| point["bookmark"].is_string()).cloned().collect();
    ensure!(chosen.len() == 3, "three bookmarks were made: {chosen:?}");
    chosen.extend(points.last().cloned());
    let mut random = SimRng::new(number("FARSHORE_SEED", 1)?);
    for _ in 0..number("FARSHORE_PG_POINTS", 20)? {
        chosen.push(points[random.index(points.len())].clone());
    }
    Ok(chosen)
}

/// Opens a point and puts it through everything.
///
/// The point is a state as after a power cut, so the file system's journal has to be replayed before `e2fsck` may judge:
/// with `-n` it does not replay and would judge metadata that the journal is about to correct. So the kernel mounts it
/// (which replays) and unmounts it, and then `e2fsck -fn` must find nothing at all. All that is written to the view.
fn check_point(rig: &Rig, record: &Record, point: &Value) -> Result<()> {
    let id = point["id"].as_str().context("a point has an id")?;
    let time = parse_time(point["time"].as_str().context("a point has a time")?)?;
    let view = rig.sites.open_view(GROUP, id, false)?;
    let work = rig.dir().join("point");
    std::fs::create_dir(&work).context("make a folder")?;
    let mut disk = Attached::new(&device::view_socket(&view, VOLUME)?, &work.join("disk"))?;
    let place = work.join("mount");
    disk.mount(&place).context("mount the point")?;
    disk.unmount()?;
    disk.check()?;
    disk.mount(&place)?;
    let mut cluster = Cluster::new(place.join("data"), folder_of_postgres(&work.join("pg"))?);
    // Of the life that the point interrupts.
    let _ = std::fs::remove_file(place.join("data/postmaster.pid"));
    cluster.redirect()?;
    cluster.start().context("start PostgreSQL on the point")?;
    cluster.run("pg_amcheck", &["--all", "--install-missing"])?.ok().context("pg_amcheck")?;
    record.check(&cluster.sql("select id from seen order by id")?, time)?;
    let sums = cluster.sql(
        "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
         and (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)",
    )?;
    ensure!(["t", ""].contains(&sums.trim()), "money was lost or made: {sums:?}");
    cluster.stop()?;
    disk.detach()?;
    rig.sites.close_view(&view)?;
    std::fs::remove_dir_all(&work).context("remove the folder")
}

fn restored_equals_source(rig: &mut Rig, image: &Path) -> Result<()> {
    rig.wait()?;
    rig.sites.stop_agent()?;
    let out = rig.dir().join("restored.img");
    rig.cli(&["restore", &format!("{GROUP}/{VOLUME}"), "--at", "latest", "--out", text(&out)?])?.ok()?;
    run_within(Command::new("cmp").args([text(image)?, text(&out)?]), LIMIT)?
        .ok()
        .context("restored and source differ")
        .map(drop)
}
