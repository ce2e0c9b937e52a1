//! A host that loses its power: what is compared then with the activity log, and how long it takes; against a compare of the whole
//! volume, which is what happens without one.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::fio::{Fio, sparse};
use super::replicate::{GROUP, WAIT_SECONDS, status};
use super::sync::{drop_caches, fill, median};
use super::{Bench, Row};
use crate::client::Daemon;
use crate::sites::host::Host;
use crate::sites::run::{is_root, until};
use crate::sites::{Sites, SitesConfig, pause};

const EXTENT_BYTES: u64 = 4 << 20;
/// Most extents that may be active: the agent's default, but an eighth of a volume for which that would be nearly all.
const EXTENTS_MAX: u64 = 1024;
/// Fewest that the agent takes.
const EXTENTS_MIN: u64 = 64;
/// What the guest writes before the cut, bytes per second.
const RATE: u64 = 4_000_000;

/// What one crash cost.
struct Cost {
    /// Extents that were active when last asked, before the cut. The log on the disk names those too that have left since its last record.
    active: u64,
    compared: u64,
    time: Duration,
}

struct Rig {
    sites: Sites,
    host: Host,
    image: PathBuf,
    socket: PathBuf,
    boots: u32,
}

/// `farshore bench crash`.
pub(super) fn crash(bench: &Bench<'_>) -> Result<Vec<Row>> {
    ensure!(is_root(), "the agent's host is made with mount namespaces: run this as root");
    let size = bench.args.size;
    let extents = (size / EXTENT_BYTES / 8).clamp(EXTENTS_MIN, EXTENTS_MAX);
    ensure!(size >= 2 * extents * EXTENT_BYTES, "--size: at least {} bytes", 2 * EXTENTS_MIN * EXTENT_BYTES);
    let image = sparse(bench.dir.join("source.img"), size)?;
    fill(&image, 1, Some(0..size))?;
    let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, &bench.dir);
    config.ring = bench.args.ring;
    config.direct_link = true;
    config.agent_toml = format!("al_extents = {extents}\n");
    let host = Host::of(&mut config)?;
    let sites = Sites::start(config)?;
    let socket = sites.protect(&image, GROUP, "disk")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let mut rig = Rig { sites, host, image, socket, boots: 0 };
    let seconds = bench.args.seconds.div_ceil(bench.args.rounds).max(1);
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..bench.args.rounds {
        let order = if round.is_multiple_of(2) { [true, false] } else { [false, true] };
        for log in order {
            let cost = rig.crash(size, seconds, log)?;
            if log { with.push(cost) } else { without.push(cost) }
        }
    }
    rig.sites.stop_agent()?;
    rig.sites.stop_target()?;
    let middle = |costs: &[Cost], of: fn(&Cost) -> u64| {
        let mut all: Vec<u64> = costs.iter().map(of).collect();
        all.sort_unstable();
        #[expect(clippy::cast_precision_loss, reason = "bytes for people")]
        let middle = all[all.len() / 2] as f64 / 1e6;
        middle
    };
    let seconds = |costs: &[Cost]| median(&costs.iter().map(|cost| cost.time).collect::<Vec<_>>()).as_secs_f64();
    let of = format!("{} MiB, {extents} extents may be active", size >> 20);
    // Of each crash, not of their middle.
    let excess = with.iter().filter(|cost| cost.compared > extents * EXTENT_BYTES).count();
    #[expect(clippy::cast_precision_loss, reason = "counts for people")]
    let (excess, bound) = (excess as f64, (extents * EXTENT_BYTES) as f64 / 1e6);
    Ok(vec![
        Row::new(format!("bytes compared after a power cut ({of})"), middle(&with, |cost| cost.compared), "MB")
            .against("extents that may be active × 4 MiB", bound)
            .at_most(1.0),
        Row::new("the same", middle(&with, |cost| cost.compared), "MB")
            .against("extents active just before × 4 MiB", middle(&with, |cost| cost.active * EXTENT_BYTES)),
        Row::new("power cuts after which more was compared than that", excess, "").at_most(0.0),
        Row::new("bytes compared after a power cut", middle(&with, |cost| cost.compared), "MB")
            .against("whole-disk compare", middle(&without, |cost| cost.compared)),
        Row::new("from the agent's start to a recovery point", seconds(&with), "s")
            .against("with a whole-disk compare", seconds(&without)),
    ])
}

impl Rig {
    /// The guest writes everywhere, the host goes down, and comes back; `log`: with its activity log.
    fn crash(&mut self, size: u64, seconds: u64, log: bool) -> Result<Cost> {
        until("the activity log covers everything", || {
            let log = status(&self.sites)?["activity_log"].clone();
            let alarms = self.sites.agent().get("/v1/alarms")?;
            // It goes when the state directory has it, too.
            let mut alarms = alarms.as_array().context("alarms are a list")?.iter();
            let recorded = alarms.all(|alarm| alarm["code"] != "activity-log.uncovered");
            Ok((log["covers"] == true && log["marked_extents"] == 0 && recorded).then_some(()))
        })?;
        Fio::scattered(&self.socket, size, seconds, Some(RATE)).run()?;
        let active = status(&self.sites)?["activity_log"]["active_extents"].as_u64().context("a number")?;
        self.boots += 1;
        self.host.goes_down(&mut self.sites, self.boots)?;
        if !log {
            std::fs::remove_file(self.sites.path("agent").join("activity.log")).context("remove the log")?;
        }
        drop_caches(&[&self.image, &self.sites.path("target")])?;
        let (compared, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let agent = self.sites.agent();
        let begin = Instant::now();
        let time = std::thread::scope(|scope| {
            scope.spawn(|| watch(&agent, &compared, &ended));
            let back = self.sites.start_agent().and_then(|()| self.sites.wait(GROUP, WAIT_SECONDS));
            let time = begin.elapsed();
            ended.store(true, Ordering::Release);
            back.map(|_| time)
        })?;
        let compared = compared.into_inner();
        ensure!(compared > 0, "nothing was seen to be compared: a larger --size takes longer");
        ensure!(log || compared >= size, "without its log {compared} bytes of {size} were compared");
        Ok(Cost { active, compared, time })
    }
}

/// Most that sync had to look at, over all of it.
fn watch(agent: &Daemon, compared: &AtomicU64, ended: &AtomicBool) {
    while !ended.load(Ordering::Acquire) {
        // It may not answer yet.
        let status = agent.get(&format!("/v1/status?group={GROUP}")).unwrap_or_default();
        for bytes in [&status[0]["missing_bytes"], &status[0]["sync"]["total_bytes"]] {
            compared.fetch_max(bytes.as_u64().unwrap_or(0), Ordering::AcqRel);
        }
        pause(Duration::from_millis(2));
    }
}
