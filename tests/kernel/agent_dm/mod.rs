//! The real agent below device-mapper devices in use: `farshore protect --dm`.

pub(crate) mod bypass;
mod live;
mod refused;
mod size;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use farshore_cli::sites::{Sites, SitesConfig};
use farshore_ublk::dm::Interposer;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::dm::{kit, lvm, no_strays, table};
use crate::rig::{run, until};

const GROUP: &str = "g";
/// The machine emulates its processor: syncs and shipping take their time.
const LIMIT_SECONDS: u64 = 240;

/// What the agents of one test said, and what the second site has.
struct Rig {
    sites: Sites,
    interposer: Interposer,
    /// What agents said that are dead now.
    past: Vec<String>,
    folder: TempDir,
}

impl Rig {
    /// Runs a test over fresh sites; says what the daemons said if it fails. Nobody has said that somebody must act, and nothing of ours
    /// is left in the kernel afterwards.
    fn test(test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        Self::test_with_errors(|rig| test(rig).and_then(|()| rig.check_logs()))
    }

    /// As [`Self::test`], but daemons may have said so.
    fn test_with_errors(test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let interposer = kit()?;
        let folder = tempfile::tempdir().context("make a folder")?;
        let binary = std::env::var_os("FARSHORE_BIN").context("FARSHORE_BIN names the binary under test")?;
        let sites = Sites::start(SitesConfig { ring: 128 << 20, ..SitesConfig::new(binary, folder.path()) })?;
        let mut rig = Self { sites, interposer, past: Vec::new(), folder };
        match test(&mut rig) {
            Ok(()) => {
                rig.sites.stop_agent()?;
                rig.sites.stop_target()?;
                no_strays()?;
                run("vgs vg >/dev/null 2>&1 || exit 0").map(drop)?;
                lvm("vgremove -ff -y vg || true").map(drop)
            }
            Err(error) => {
                let tail = rig.logs();
                let tail = tail[tail.len().saturating_sub(80)..].join("\n");
                Err(error.context(format!("logs of the daemons:\n{tail}\n\nwhat failed")))
            }
        }
    }

    fn logs(&self) -> Vec<String> {
        self.past.iter().cloned().chain(self.sites.logs()).collect()
    }

    /// Nobody said that somebody must act.
    fn check_logs(&self) -> Result<()> {
        let bad = |line: &String| line.contains(" ERROR ") || line.contains("panicked");
        match self.logs().into_iter().find(bad) {
            Some(line) => bail!("a daemon said: {line}"),
            None => Ok(()),
        }
    }

    /// Whether an agent, alive or dead, said this.
    fn said(&self, part: &str) -> bool {
        self.logs().iter().any(|line| line.contains(part))
    }

    fn protect(&self, source: &Path, name: &str) -> Result<Value> {
        let body = json!({ "source": source, "group": GROUP, "name": name, "dm": true });
        self.sites.agent().post("/v1/protect", &body)
    }

    /// Protects a device that is in use; its users go on by its name.
    fn protect_live(&self, source: &Path, name: &str) -> Result<()> {
        let volume = self.protect(source, name)?;
        ensure!(volume["device"] == json!(source), "another device: {volume:#}");
        self.check_attached(source, name)
    }

    fn unprotect(&self, name: &str) -> Result<Value> {
        self.sites.agent().post("/v1/unprotect", &json!({ "volume": name }))
    }

    /// What `farshore volumes` tells of a volume.
    fn volume(&self, name: &str) -> Result<Value> {
        let volumes = self.sites.agent().get("/v1/volumes")?;
        let found = volumes.as_array().and_then(|all| all.iter().find(|volume| volume["volume"] == name)).cloned();
        found.with_context(|| format!("no volume {name}: {volumes:#}"))
    }

    fn status(&self) -> Result<Value> {
        Ok(self.sites.agent().get("/v1/status")?[0].clone())
    }

    /// The volume is in the path, and the agent says so.
    fn check_attached(&self, upper: &Path, name: &str) -> Result<()> {
        let volume = self.volume(name)?;
        ensure!(volume["device"] == json!(upper) && volume["dm"]["state"] == "attached", "{volume:#}");
        let through = volume["dm"]["through"].as_str().context("a device")?;
        let number = run(&format!("lsblk -dno MAJ:MIN {through}"))?;
        let table = table(upper)?;
        ensure!(table.contains(&format!("linear {} 0", number.trim())), "{upper:?} has the table {table}");
        Ok(())
    }

    /// What the filter of a volume writes to.
    fn lower(&self, name: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(self.volume(name)?["dm"]["lower"].as_str().context("it is attached")?))
    }

    /// Nothing was ever marked missing, so nothing is to be compared or sent a second time.
    fn check_nothing_missing(&self) -> Result<()> {
        let status = self.status()?;
        let good = status["tier"] == "ring" && status["missing_bytes"] == 0 && status["ring_closed_count"] == 0;
        ensure!(good && !self.said("compared"), "something is compared: {status:#}");
        Ok(())
    }

    fn keep_logs(&mut self) {
        self.past.extend(self.sites.logs().into_iter().filter(|line| line.starts_with("agent")));
    }

    fn kill_and_restart(&mut self) -> Result<()> {
        self.keep_logs();
        self.sites.kill_agent();
        self.sites.start_agent()
    }

    fn stop_agent(&mut self) -> Result<()> {
        self.sites.stop_agent()
    }

    fn wait(&self) -> Result<()> {
        self.sites.wait(GROUP, LIMIT_SECONDS).map(drop)
    }

    fn alarm(&self, code: &str) -> Result<Option<String>> {
        let alarms = self.sites.agent().get("/v1/alarms")?;
        let found = alarms.as_array().and_then(|all| all.iter().find(|alarm| alarm["code"] == code));
        Ok(found.and_then(|alarm| alarm["text"].as_str()).map(str::to_owned))
    }

    fn until_alarm(&self, code: &str, part: &str) -> Result<()> {
        until(&format!("alarm {code}: {part}"), || {
            self.alarm(code).is_ok_and(|text| text.is_some_and(|text| text.contains(part)))
        })
        .with_context(|| format!("{:?}", self.sites.agent().get("/v1/alarms")))
    }

    /// All that was written is at the second site, byte for byte: the newest point against what is below the filter. Mounted file
    /// systems are frozen meanwhile, so that nothing more comes.
    fn check_replica(&self, names: &[&str], mounts: &[&Path]) -> Result<()> {
        mounts.iter().try_for_each(|folder| run(&format!("fsfreeze -f {}", folder.display())).map(drop))?;
        let same = self.wait().and_then(|()| self.compare(names));
        mounts.iter().try_for_each(|folder| run(&format!("fsfreeze -u {}", folder.display())).map(drop))?;
        same
    }

    fn compare(&self, names: &[&str]) -> Result<()> {
        self.with_view("latest", |view| {
            for name in names {
                let (lower, copy) = (self.lower(name)?, device_of(view, name)?);
                run(&format!("dd if={} bs=1M iflag=direct status=none | cmp - {copy}", lower.display()))?;
            }
            Ok(())
        })
    }

    fn with_view<T>(&self, at: &str, look: impl FnOnce(&Value) -> Result<T>) -> Result<T> {
        let body = json!({ "group": GROUP, "at": at, "export": "ublk", "read_only": true });
        let view = self.sites.target().post("/v1/view/open", &body)?;
        let seen = look(&view);
        self.sites.target().post("/v1/view/close", &json!({ "id": view["id"] }))?;
        seen
    }
}

/// The block device of a volume in a view.
fn device_of(view: &Value, name: &str) -> Result<String> {
    let volumes = view["volumes"].as_array().context("volumes")?;
    let found = volumes.iter().find(|volume| volume["volume"] == name);
    let device = found.and_then(|volume| volume["device"].as_str()).map(str::to_owned);
    device.with_context(|| format!("no volume {name} in {view:#}"))
}
