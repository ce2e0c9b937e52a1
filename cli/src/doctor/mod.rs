//! `farshore doctor`: looks at a host without any daemon's help, says of each thing how it stands, what that means for protection
//! and how to mend it, and mends what is safe.

mod finding;
mod host;
mod kernel;
mod leftovers;
mod service;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use farshore_agent::config::{AgentFile, RING_DIR};
use serde_json::{Value, json};

use crate::args::DoctorArgs;
use crate::client::Daemon;
use crate::daemon;
use crate::failure::{Failure, Said};
use crate::output::Output;
use finding::{Finding, Level};
use leftovers::{Found, Known, Repaired};

pub(crate) use service::UNIT;

/// Where an agent keeps its state if nobody says otherwise.
pub(crate) const STATE: &str = "/var/lib/farshore/agent";

/// Longest wait for the agent's answer: it looks at nothing but its memory.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// The host's files below a folder, for tests another one than the root.
struct Host {
    root: PathBuf,
    is_root: bool,
}

impl Host {
    fn at(root: &Path) -> Self {
        Self { root: root.to_owned(), is_root: nix::unistd::geteuid().is_root() }
    }

    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// A small file, trimmed; none: it is not there, or not to be read.
    fn read(&self, path: &str) -> Option<String> {
        Some(std::fs::read_to_string(self.path(path)).ok()?.trim().to_owned())
    }
}

/// The agent that is asked.
enum Agent {
    Answers {
        socket: PathBuf,
        volumes: Vec<Value>,
        alarms: Vec<Value>,
    },
    /// Something listens and does not answer.
    Hangs {
        socket: PathBuf,
    },
    Silent {
        socket: PathBuf,
        reason: String,
    },
}

impl Agent {
    fn ask(socket: &Path) -> Self {
        let socket = socket.to_owned();
        if let Err(error) = std::os::unix::net::UnixStream::connect(&socket) {
            return Self::Silent { socket, reason: error.to_string() };
        }
        let daemon = Daemon::agent(&socket);
        let list = |path| Some(daemon.get_within(path, ANSWER_MAX).ok()?.as_array()?.clone());
        let answers = list("/v1/volumes").and_then(|volumes| Some((volumes, list("/v1/alarms")?)));
        match answers {
            Some((volumes, alarms)) => Self::Answers { socket, volumes, alarms },
            None => Self::Hangs { socket },
        }
    }
}

/// Where to look, as flags and configuration say.
struct Places {
    socket: PathBuf,
    state: Option<PathBuf>,
    identity: Option<PathBuf>,
    ring: u64,
    ring_dir: PathBuf,
    /// What is wrong with the configuration.
    config: Option<Finding>,
}

impl Places {
    fn of(args: &DoctorArgs) -> Result<Self> {
        let (file, config) = match args.config.exists().then(|| AgentFile::read(&args.config)) {
            None => (AgentFile::default(), None),
            Some(Ok(file)) => {
                let found = args.config.display().to_string();
                (file, Some(Finding::ok("config", found)))
            }
            Some(Err(error)) => {
                let finding =
                    Finding::problem("config", farshore_agent::chain(&error), "the agent does not start with it");
                (AgentFile::default(), Some(finding.mend("correct the line that is named")))
            }
        };
        let usual = Path::new(STATE);
        Ok(Self {
            socket: args.socket.agent.clone(),
            state: args.state.clone().or(file.state).or_else(|| usual.exists().then(|| usual.to_owned())),
            identity: file.identity,
            ring: file.ring.unwrap_or_else(|| daemon::memory_bytes().map_or(RING_MAX, |bytes| RING_MAX.min(bytes / 8))),
            ring_dir: file.ring_dir.unwrap_or_else(|| RING_DIR.into()),
            config,
        })
    }
}

/// The ring's default: see `AgentConfig::ring`.
const RING_MAX: u64 = 256 << 20;

pub(crate) fn run(args: &DoctorArgs, output: &Output) -> Result<()> {
    let host = Host::at(Path::new("/"));
    let places = Places::of(args)?;
    let mut repaired = Repaired::default();
    if args.repair {
        repaired.done.extend(kernel::load_modules());
        let more = leftovers::repair(&Known::read(places.state.as_deref()), &Agent::ask(&places.socket), args.abandon);
        repaired.done.extend(more.done);
        (repaired.left, repaired.failed) = (more.left, more.failed);
    }
    let findings = look(&host, &places);
    let document = document(&findings, args.repair.then_some(&repaired));
    output.show(&document, |_| text(&findings, &repaired));
    end(&findings, &repaired, output)
}

fn look(host: &Host, places: &Places) -> Vec<Finding> {
    let agent = Agent::ask(&places.socket);
    let known = Known::read(places.state.as_deref());
    let mut findings = Vec::new();
    if !host.is_root {
        let means = "devices, keys and other users' processes cannot be looked at";
        findings.push(Finding::warning("user", "this is not run as root", means).mend("sudo farshore doctor"));
    }
    findings.extend(kernel::check(host));
    findings.extend(host::check(host, places.ring, &places.ring_dir));
    findings.extend(places.config.clone());
    findings.extend(service::check(host, &agent, &known, places.identity.as_deref()));
    findings.extend(Found::look().findings(&known, &agent));
    findings
}

fn count(findings: &[Finding], level: Level) -> usize {
    findings.iter().filter(|finding| finding.level == level).count()
}

fn document(findings: &[Finding], repaired: Option<&Repaired>) -> Value {
    let left = |one: &Repaired| -> Vec<Value> {
        one.left.iter().map(|(what, way_out)| json!({ "what": what, "hint": way_out })).collect()
    };
    json!({
        "problems": count(findings, Level::Problem),
        "warnings": count(findings, Level::Warning),
        "findings": findings,
        "repair": repaired.map(|one| json!({ "done": one.done, "left_alone": left(one), "failed": one.failed })),
    })
}

fn text(findings: &[Finding], repaired: &Repaired) -> String {
    let mut text: String = findings.iter().map(Finding::text).collect();
    for (title, lines) in [("repaired", &repaired.done), ("not repaired", &repaired.failed)] {
        text.extend(lines.iter().map(|line| format!("{title}: {line}\n")));
    }
    let (problems, warnings) = (count(findings, Level::Problem), count(findings, Level::Warning));
    text + &format!("{problems} problem(s), {warnings} warning(s)")
}

/// The exit code, and the error that goes with it.
fn end(findings: &[Finding], repaired: &Repaired, output: &Output) -> Result<()> {
    if let Some((what, way_out)) = repaired.left.first() {
        if output.is_json() {
            return Err(Said(4).into());
        }
        let more = match repaired.left.len() {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        return Err(Failure::refused("repair", format!("left alone: {what}{more}")).hint(*way_out).into());
    }
    if count(findings, Level::Problem) > 0 || !repaired.failed.is_empty() { Err(Said(1).into()) } else { Ok(()) }
}
