//! What people put on block devices, on a protected one: databases and file systems, the tools of a disk, and disks that fail.
//! The target stands in a network namespace of its own.

mod databases;
mod faults;
mod tools;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::postgres::Cluster;
use farshore_cli::sites::{Elsewhere, SitesConfig};
use serde_json::Value;

use crate::agent::{GROUP, Rig};
use crate::rig::{DISK_512, machine, run};

/// A piece of the machine's first disk, as a device-mapper device whose table a test can change. Gone when dropped.
pub(crate) struct Disk {
    name: &'static str,
    sectors: u64,
}

impl Disk {
    pub(crate) fn make(name: &'static str, bytes: u64) -> Result<Self> {
        // What an earlier test has left there must not be synced.
        run(&format!("modprobe dm_mod && blkdiscard -f -l {bytes} {DISK_512}"))?;
        let disk = Self { name, sectors: bytes / 512 };
        run(&format!("DM_DISABLE_UDEV=1 dmsetup create {name} --table '{}'", disk.linear()))?;
        Ok(disk)
    }

    fn linear(&self) -> String {
        format!("0 {} linear {DISK_512} 0", self.sectors)
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Fails if a test has failed before and something holds it: the next test says so.
        let _ = run(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry {}", self.name));
    }
}

/// A second host's network, as a namespace at the other end of a virtual cable. Gone when dropped.
pub(crate) struct Far;

impl Far {
    const NAMESPACE: &'static str = "far";
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    pub(crate) fn make() -> Result<Self> {
        let far = Self;
        run(&format!(
            "ip netns add {0} && ip link add near type veth peer name far netns {0} && \
             ip addr add 10.77.0.1/24 dev near && ip link set near up && \
             ip netns exec {0} ip addr add {1}/24 dev far && ip netns exec {0} ip link set far up && \
             ip netns exec {0} ip link set lo up",
            Self::NAMESPACE,
            Self::ADDRESS
        ))?;
        Ok(far)
    }

    fn elsewhere() -> Elsewhere {
        Elsewhere { namespace: Self::NAMESPACE.into(), address: IpAddr::V4(Self::ADDRESS) }
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = run(&format!("ip link del near; ip netns del {}", Self::NAMESPACE));
    }
}

/// A protected disk whose target is in the other namespace.
fn protected(seed: u64, name: &'static str, bytes: u64, configure: impl FnOnce(&mut SitesConfig)) -> Result<Rig> {
    let control = machine()?;
    let (disk, far) = (Disk::make(name, bytes)?, Far::make()?);
    let source = disk.path();
    let rig = Rig::over(seed, control, &source, Box::new((disk, far)), |config| {
        config.elsewhere = Some(Far::elsewhere());
        configure(config);
    })?;
    // User postgres has to get to its files.
    std::fs::set_permissions(rig.sites.path(""), std::fs::Permissions::from_mode(0o755)).context("open the folder")?;
    Ok(rig)
}

/// The agent's alarm of a code.
fn alarm(rig: &Rig, code: &str) -> Result<Option<Value>> {
    let alarms = rig.sites.agent().get("/v1/alarms")?;
    Ok(alarms.as_array().context("a list of alarms")?.iter().find(|alarm| alarm["code"] == code).cloned())
}

/// A value of the group's status.
fn status(rig: &Rig, key: &str) -> Result<Value> {
    Ok(rig.sites.agent().get(&format!("/v1/status?group={GROUP}"))?[0][key].clone())
}

/// A psql session that inserts numbered rows, each a transaction of its own.
struct Inserter {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Inserter {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut command = cluster.program("psql")?;
        command.args(["-qAtX", "-v", "ON_ERROR_STOP=1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start psql")?;
        let answers = BufReader::new(child.stdout.take().context("psql's output")?);
        Ok(Self { child, answers })
    }

    /// Returns when the commit is confirmed.
    fn insert(&mut self, id: u64) -> Result<()> {
        let input = self.child.stdin.as_mut().context("psql's input")?;
        writeln!(input, "insert into seen values ({id}, repeat(md5('{id}'), 8)) returning id;")?;
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

/// Rows that were sent and confirmed.
#[derive(Default)]
pub(crate) struct Rows {
    pub(crate) sent: AtomicU64,
    pub(crate) confirmed: AtomicU64,
    stop: AtomicBool,
}

impl Rows {
    pub(crate) fn keep_inserting(&self, cluster: &Cluster) -> Result<()> {
        let mut inserter = Inserter::start(cluster)?;
        while !self.stop.load(Ordering::SeqCst) {
            let id = self.sent.fetch_add(1, Ordering::SeqCst) + 1;
            inserter.insert(id)?;
            self.confirmed.store(id, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Checks the rows of a database: a prefix of what was sent, with the first `sure`.
    pub(crate) fn check(&self, cluster: &Cluster, sure: u64) -> Result<u64> {
        let rows = cluster.sql("select id from seen order by id")?;
        let ids: Vec<u64> = rows.lines().map(str::parse).collect::<Result<_, _>>().context("ids are numbers")?;
        let count = ids.len() as u64;
        let gap = ids.iter().zip(1..).find(|(id, wanted)| *id != wanted);
        ensure!(gap.is_none(), "rows are missing or doubled: (row, expected) = {gap:?} of {count}");
        ensure!(count >= sure, "{count} rows are there, {sure} were confirmed before");
        let sent = self.sent.load(Ordering::SeqCst);
        ensure!(count <= sent, "{count} rows are there, only {sent} were ever sent");
        Ok(count)
    }
}
