//! Both sites in a temporary folder, and short forms for what tests ask of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use farshore_cli::sites::{Sites, SitesConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{LIMIT, LIMIT_SECONDS, device, pattern, until};
use farshore_cli::sites::run::{Ran, run_within};

/// The group that most tests protect into.
pub(crate) const GROUP: &str = "g";
/// The volume that most tests protect.
pub(crate) const VOLUME: &str = "disk";

/// Where the binary under test is.
pub(crate) fn binary() -> Result<PathBuf> {
    let path = std::env::var_os("FARSHORE_BIN")
        .context("FARSHORE_BIN does not name the binary under test; `cargo xtask test it` builds it and says so")?;
    let path = PathBuf::from(path);
    ensure!(path.is_file(), "FARSHORE_BIN={} is no file", path.display());
    Ok(path)
}

/// A pair of sites.
pub(crate) struct Rig {
    pub(crate) sites: Sites,
    folder: TempDir,
    /// Parts of ERROR lines that the test provokes.
    expected: Vec<&'static str>,
}

impl Rig {
    /// Runs a test over fresh sites; shows the daemons' logs if it fails. A daemon that panicked, or said ERROR (somebody must
    /// act) where nothing of that kind was provoked, fails it in any case.
    pub(crate) fn test(configure: impl FnOnce(&mut SitesConfig), test: impl FnOnce(&mut Self) -> Result<()>) {
        let result = Self::start(configure).and_then(|mut rig| {
            let result = test(&mut rig);
            let result = result.map_err(|error| rig.with_deaths(error));
            let logs = rig.sites.logs();
            match (result, logs.iter().find(|line| rig.is_bad(line)).cloned()) {
                (Ok(()), None) => Ok(()),
                (Ok(()), Some(line)) => Err(anyhow!("a daemon is in trouble that was not provoked: {line}")),
                (Err(error), _) => {
                    let tail = logs[logs.len().saturating_sub(60)..].join("\n");
                    Err(error.context(format!("logs of the daemons:\n{tail}\n\nwhat failed")))
                }
            }
        });
        if let Err(error) = result {
            panic!("{error:#}");
        }
    }

    /// From now on ERROR lines with any of these parts are what the test wants to see.
    pub(crate) fn expect_errors(&mut self, parts: &[&'static str]) {
        self.expected.extend_from_slice(parts);
    }

    fn is_bad(&self, line: &str) -> bool {
        let provoked = self.expected.iter().any(|part| line.contains(part));
        line.contains("panicked at") || (line.contains(" ERROR ") && !provoked)
    }

    /// Says which daemon died, if one did: that explains most other errors.
    fn with_deaths(&self, mut error: anyhow::Error) -> anyhow::Error {
        for (name, pid) in [("agent", self.sites.supervisor_pid()), ("target", self.sites.target_pid())] {
            let status = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
            if status.is_some_and(|status| status.contains("State:\tZ")) {
                error = error.context(format!("the {name} died"));
            }
        }
        error
    }

    /// Fresh sites with the smallest ring but one.
    pub(crate) fn start(configure: impl FnOnce(&mut SitesConfig)) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fs-it-").tempdir().context("make a folder")?;
        let mut config = SitesConfig::new(binary()?, folder.path());
        config.ring = 16 << 20;
        // To look closer at a failure: FARSHORE_LOG=debug.
        if let Ok(log) = std::env::var("FARSHORE_LOG") {
            config.log = log;
        }
        configure(&mut config);
        Ok(Self { sites: Sites::start(config)?, folder, expected: Vec::new() })
    }

    /// Folder of everything.
    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// Makes an image and protects it as [`GROUP`]/[`VOLUME`]; gives the image's path, the socket, and the content.
    pub(crate) fn protect(&self, size: u64, seed: u64) -> Result<(PathBuf, PathBuf, Vec<u8>)> {
        let image = self.dir().join("source.img");
        let model = pattern::image(&image, size, seed)?;
        let socket = self.sites.protect(&image, GROUP, VOLUME)?;
        Ok((image, socket, model))
    }

    /// Waits until all that was written is a point.
    pub(crate) fn wait(&self) -> Result<Value> {
        self.sites.wait(GROUP, LIMIT_SECONDS)
    }

    /// Makes a bookmark; gives the point.
    pub(crate) fn bookmark(&self, name: &str) -> Result<Value> {
        let body = json!({ "group": GROUP, "name": name, "timeout_s": LIMIT_SECONDS });
        self.sites.agent().post("/v1/bookmark", &body)
    }

    /// Status of [`GROUP`].
    pub(crate) fn status(&self) -> Result<Value> {
        Ok(self.sites.agent().get(&format!("/v1/status?group={GROUP}"))?[0].clone())
    }

    /// All points of [`GROUP`], oldest first.
    pub(crate) fn points(&self) -> Result<Vec<Value>> {
        let points = self.sites.target().get(&format!("/v1/points?group={GROUP}"))?;
        points.as_array().cloned().context("points are a list")
    }

    /// The open alarm of that code at the agent.
    pub(crate) fn agent_alarm(&self, code: &str) -> Result<Option<Value>> {
        alarm(&self.sites.agent().get("/v1/alarms")?, code)
    }

    /// The open alarm of that code at the target.
    pub(crate) fn target_alarm(&self, code: &str) -> Result<Option<Value>> {
        alarm(&self.sites.target().get("/v1/alarms")?, code)
    }

    /// Waits for an alarm at the agent; gives its text.
    pub(crate) fn until_agent_alarm(&self, code: &str) -> Result<String> {
        let raised = until(&format!("alarm {code} at the agent"), || self.agent_alarm(code));
        let raised = raised.with_context(|| format!("alarms: {:?}", self.sites.agent().get("/v1/alarms")))?;
        Ok(raised["text"].as_str().unwrap_or_default().to_owned())
    }

    /// Reads one volume of a point through a read-only view.
    pub(crate) fn read_point(&self, at: &str, volume: &str) -> Result<Vec<u8>> {
        let view = self.sites.open_view(GROUP, at, true).with_context(|| format!("open a view at {at}"))?;
        let bytes = device::view_socket(&view, volume).and_then(|socket| device::read_all(&socket));
        self.sites.close_view(&view).with_context(|| format!("close the view at {at}"))?;
        bytes.with_context(|| format!("read the view at {at}"))
    }

    /// Checks that a point shows `wanted`.
    pub(crate) fn check_point(&self, at: &str, wanted: &[u8]) -> Result<()> {
        device::same(&format!("the view at {at}"), &self.read_point(at, VOLUME)?, wanted)
    }

    /// Runs the command line against these sites.
    pub(crate) fn cli(&self, args: &[&str]) -> Result<Ran> {
        run_within(
            Command::new(binary()?)
                .args(args)
                .env("FARSHORE_AGENT_SOCKET", self.sites.agent_socket())
                .env("FARSHORE_TARGET_SOCKET", self.sites.target_socket()),
            LIMIT,
        )
    }

    /// Folder of the group's journal at the target.
    pub(crate) fn journal(&self) -> Result<PathBuf> {
        fn find(folder: &Path) -> Option<PathBuf> {
            let mut inner: Vec<PathBuf> = std::fs::read_dir(folder)
                .ok()?
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .collect();
            inner.sort();
            let here = inner.iter().find(|path| path.file_name().is_some_and(|name| name == "journal")).cloned();
            here.or_else(|| inner.iter().find_map(|path| find(path)))
        }
        find(&self.sites.path("target")).context("the target has a journal")
    }
}

fn alarm(alarms: &Value, code: &str) -> Result<Option<Value>> {
    let list = alarms.as_array().context("alarms are a list")?;
    Ok(list.iter().find(|alarm| alarm["code"] == code).cloned())
}

/// Starts a daemon of the binary that must not come up, with a configuration file of these lines.
pub(crate) fn start_in_vain(role: &str, config: &Path, lines: &str) -> Result<Ran> {
    std::fs::write(config, lines).with_context(|| format!("write {}", config.display()))?;
    let ran = run_within(Command::new(binary()?).args([role, "run", "--config"]).arg(config), Duration::from_secs(30));
    match ran {
        Ok(ran) if ran.code == Some(0) => bail!("the {role} came up and ended in order, but must not come up: {ran}"),
        other => other.with_context(|| format!("the {role} must refuse to start")),
    }
}
