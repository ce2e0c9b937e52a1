//! Both sites on one machine, as separate processes of this binary: for the demonstration, the benchmarks and the
//! end-to-end tests. The link goes through a small UDP relay, so that it can be cut and healed.

pub mod host;
pub mod mount;
pub mod postgres;
mod relay;
pub mod run;

use std::fs::DirBuilder;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farshore_link::identity::Vault;
use farshore_proto::{Name, Role};
use serde_json::{Value, json};

use crate::client::Daemon;
pub use relay::{UdpRelay, Weather};

/// How long a daemon may take until its admin socket answers: a target replays its journal first.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a daemon may take to stop cleanly.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Ports of targets: below those that the kernel gives to clients (`ip_local_port_range` begins at 32768).
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

/// Name of the protected host.
pub const HOST: &str = "source";

/// Settings of a pair of sites.
#[derive(Debug, Clone)]
pub struct SitesConfig {
    /// The `farshore` binary.
    pub binary: PathBuf,
    /// What the agent is started with, where that is not the binary itself: a program that becomes it, with its arguments.
    pub agent_program: Option<PathBuf>,
    /// Folder for everything; must exist.
    pub dir: PathBuf,
    /// Folder of the target's data; none: below `dir`.
    pub target_data: Option<PathBuf>,
    /// Bytes of the ring.
    pub ring: u64,
    /// More lines of the agent's configuration file.
    pub agent_toml: String,
    /// More lines of the target's configuration file.
    pub target_toml: String,
    /// The agent talks to the target itself, not through the relay that can be cut.
    pub direct_link: bool,
    /// The target runs in a network namespace of its own; none: beside the agent, on loopback.
    pub elsewhere: Option<Elsewhere>,
    /// Value of `RUST_LOG` of both daemons.
    pub log: String,
}

/// A network namespace (`ip netns`) and an address in it that this process reaches.
#[derive(Debug, Clone)]
pub struct Elsewhere {
    /// Name of the namespace.
    pub namespace: String,
    /// Where the target listens.
    pub address: IpAddr,
}

impl SitesConfig {
    /// Defaults in `dir`, running `binary`.
    #[must_use]
    pub fn new(binary: impl Into<PathBuf>, dir: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            agent_program: None,
            dir: dir.into(),
            target_data: None,
            ring: 64 << 20,
            direct_link: false,
            agent_toml: String::new(),
            target_toml: String::new(),
            elsewhere: None,
            log: "info".into(),
        }
    }
}

/// An agent and a target on loopback. Dropping it kills both.
pub struct Sites {
    config: SitesConfig,
    relay: UdpRelay,
    target_address: SocketAddr,
    target: Option<Process>,
    agent: Option<Process>,
}

struct Process {
    name: &'static str,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Sites {
    /// Makes a vault and identities in the folder, and starts target and agent.
    ///
    /// # Errors
    /// When a daemon does not come up; with the end of its log.
    pub fn start(config: SitesConfig) -> Result<Self> {
        let vault = Vault::init(&config.dir.join("vault"), Name::new("demo")?).context("make a vault")?;
        for (role, name) in [(Role::Agent, HOST), (Role::Target, "second-site")] {
            let bundle = vault.issue(role, Name::new(name)?, 30).context("issue an identity")?;
            bundle.write(&config.dir.join(format!("{role}.bundle"))).context("write an identity")?;
        }
        let target_address = target_address(&config);
        let relay = UdpRelay::start(target_address).context("start the link's relay")?;
        let mut sites = Self { config, relay, target_address, target: None, agent: None };
        sites.start_target()?;
        sites.start_agent()?;
        Ok(sites)
    }

    /// Starts the target.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_target(&mut self) -> Result<()> {
        let file = self.path("target.toml");
        let data = self.config.target_data.clone().unwrap_or_else(|| self.path("target"));
        let text = format!(
            "identity = {:?}\ndata = {:?}\nlisten = \"{}\"\nsocket = {:?}\n{}",
            self.path("target.bundle"),
            data,
            self.target_address,
            self.target_socket(),
            self.config.target_toml
        );
        std::fs::write(&file, text).context("write the target's configuration")?;
        self.target = Some(self.spawn("target", &file)?);
        self.wait_for("target")
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_agent(&mut self) -> Result<()> {
        let file = self.path("agent.toml");
        let upstream = match self.config.direct_link {
            true => self.target_address,
            false => SocketAddr::from(([127, 0, 0, 1], self.relay.port())),
        };
        let text = format!(
            "identity = {:?}\nstate = {:?}\nupstream = \"{upstream}\"\nsocket = {:?}\nring = {}\nring_dir = {:?}\n{}",
            self.path("agent.bundle"),
            self.path("agent"),
            self.agent_socket(),
            self.config.ring,
            self.ring_dir()?,
            self.config.agent_toml
        );
        std::fs::write(&file, text).context("write the agent's configuration")?;
        self.agent = Some(self.spawn("agent", &file)?);
        self.wait_for("agent")
    }

    /// Where ring files are kept: a tmpfs folder of these sites alone.
    fn ring_dir(&self) -> Result<PathBuf> {
        let mark = self.config.dir.to_string_lossy().replace('/', "_");
        let dir = Path::new("/dev/shm").join(format!("farshore{mark}"));
        // Of this user alone, whatever the umask.
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).context("make a folder for the ring")?;
        Ok(dir)
    }

    /// The file of the ring, or of one where there are several groups.
    ///
    /// # Errors
    /// There is none.
    pub fn ring_file(&self) -> Result<PathBuf> {
        let folder = self.ring_dir()?;
        let files = std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?;
        let ring =
            files.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|end| end == "ring"));
        ring.with_context(|| format!("no ring in {}", folder.display()))
    }

    fn spawn(&self, role: &'static str, config: &Path) -> Result<Process> {
        let mut command = match &self.config.elsewhere {
            // It becomes the daemon, so the process id is the daemon's.
            Some(Elsewhere { namespace, .. }) if role == "target" => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(&self.config.binary);
                command
            }
            Some(_) | None => {
                let program = self.config.agent_program.as_ref().filter(|_| role == "agent");
                Command::new(program.unwrap_or(&self.config.binary))
            }
        };
        let mut child = command
            .args([role, "run", "--config"])
            .arg(config)
            .env("RUST_LOG", &self.config.log)
            .env_remove("FARSHORE_AGENT_SOCKET")
            .env_remove("FARSHORE_TARGET_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {} {role}", self.config.binary.display()))?;
        let stderr = child.stderr.take().context("take the daemon's log")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Process { name: role, child, log })
    }

    fn wait_for(&mut self, role: &'static str) -> Result<()> {
        let begin = Instant::now();
        loop {
            let process = if role == "agent" { self.agent.as_mut() } else { self.target.as_mut() };
            let process = process.context("the daemon was started")?;
            if let Some(status) = process.child.try_wait().context("look at the daemon")? {
                bail!("{role} ended at once ({status}):\n{}", process.tail());
            }
            let answers = if role == "agent" {
                self.agent().get("/v1/status").is_ok()
            } else {
                self.target().get("/v1/groups").is_ok()
            };
            if answers {
                return Ok(());
            }
            let process = if role == "agent" { &self.agent } else { &self.target };
            let tail = || process.as_ref().map(Process::tail).unwrap_or_default();
            ensure!(begin.elapsed() < START_LIMIT, "{role} does not answer on its socket:\n{}", tail());
            pause(Duration::from_millis(20));
        }
    }

    /// The agent's API.
    #[must_use]
    pub fn agent(&self) -> Daemon {
        Daemon::agent(self.agent_socket())
    }

    /// The target's API.
    #[must_use]
    pub fn target(&self) -> Daemon {
        Daemon::target(self.target_socket())
    }

    /// Path of the agent's admin socket.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.path("agent.sock")
    }

    /// Path of the target's admin socket.
    #[must_use]
    pub fn target_socket(&self) -> PathBuf {
        self.path("target.sock")
    }

    /// A path in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.config.dir.join(name)
    }

    /// The link between the sites.
    #[must_use]
    pub fn link(&self) -> &UdpRelay {
        &self.relay
    }

    /// Protects `source` as `group`/`name` on a unix socket and gives that socket's path.
    ///
    /// # Errors
    /// The agent's.
    pub fn protect(&self, source: &Path, group: &str, name: &str) -> Result<PathBuf> {
        let socket = self.path(&format!("{group}-{name}.nbd"));
        let frontend = format!("nbd+unix:{}", socket.display());
        let body = json!({ "source": source, "group": group, "name": name, "frontend": frontend });
        self.agent().post("/v1/protect", &body)?;
        Ok(socket)
    }

    /// Waits until all written so far is a recovery point; gives the point.
    ///
    /// # Errors
    /// The agent's, also when the time is over.
    pub fn wait(&self, group: &str, seconds: u64) -> Result<Value> {
        self.agent().post("/v1/wait", &json!({ "group": group, "timeout_s": seconds }))
    }

    /// Opens a view; gives the answer of the target.
    ///
    /// # Errors
    /// The target's.
    pub fn open_view(&self, group: &str, at: &str, read_only: bool) -> Result<Value> {
        let export = format!("nbd+unix:{}", self.path("views").display());
        self.target()
            .post("/v1/view/open", &json!({ "group": group, "at": at, "export": export, "read_only": read_only }))
    }

    /// Closes a view.
    ///
    /// # Errors
    /// The target's.
    pub fn close_view(&self, view: &Value) -> Result<()> {
        self.target().post("/v1/view/close", &json!({ "id": view["id"] })).map(drop)
    }

    /// `kill -9` of the agent: of its supervisor, and of its worker.
    pub fn kill_agent(&mut self) {
        self.kill_supervisor();
        // Found by what it was started with: a supervisor that has just begun does not answer yet.
        let config = format!("--config={}", self.path("agent.toml").display());
        workers(&config).into_iter().for_each(kill_and_await);
    }

    /// `kill -9` of the agent's supervisor; the worker goes on.
    pub fn kill_supervisor(&mut self) {
        if let Some(mut process) = self.agent.take() {
            process.kill();
        }
    }

    /// `kill -9` of the agent's worker. Its supervisor starts the next one.
    ///
    /// # Errors
    /// There is none.
    pub fn kill_worker(&self) -> Result<()> {
        kill_and_await(self.agent_pid().context("a worker runs")?);
        Ok(())
    }

    /// Waits until the agent answers, with a worker that is not `but`.
    ///
    /// # Errors
    /// None does within the time.
    pub fn await_worker(&self, but: Option<u32>) -> Result<u32> {
        let begin = Instant::now();
        loop {
            let shown = self.supervisor().get("/v1/supervisor").unwrap_or_default();
            let pid = shown["worker_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            if let Some(pid) = pid.filter(|_| shown["worker"] == "serving" && pid != but) {
                return Ok(pid);
            }
            ensure!(begin.elapsed() < START_LIMIT, "no worker serves: {shown}");
            pause(Duration::from_millis(10));
        }
    }

    /// `kill -9` of the target.
    pub fn kill_target(&mut self) {
        if let Some(mut process) = self.target.take() {
            process.kill();
        }
    }

    /// Stops the agent cleanly.
    ///
    /// # Errors
    /// When it does not stop, or says that it failed.
    pub fn stop_agent(&mut self) -> Result<()> {
        self.agent.take().map_or(Ok(()), Process::stop)
    }

    /// Stops the target cleanly.
    ///
    /// # Errors
    /// When it does not stop, or says that it failed.
    pub fn stop_target(&mut self) -> Result<()> {
        self.target.take().map_or(Ok(()), Process::stop)
    }

    /// Process id of the agent's worker.
    #[must_use]
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref()?;
        let shown = self.supervisor().get("/v1/supervisor").ok()?;
        u32::try_from(shown["worker_pid"].as_u64()?).ok()
    }

    /// Process id of the agent's supervisor.
    #[must_use]
    pub fn supervisor_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(|process| process.child.id())
    }

    /// The supervisor's API.
    #[must_use]
    pub fn supervisor(&self) -> Daemon {
        Daemon::agent(farshore_agent::supervisor::supervisor_socket(&self.agent_socket()))
    }

    /// Process id of the target.
    #[must_use]
    pub fn target_pid(&self) -> Option<u32> {
        self.target.as_ref().map(|process| process.child.id())
    }

    /// Log lines of both daemons that now run, for the message of a failed check.
    #[must_use]
    pub fn logs(&self) -> Vec<String> {
        [&self.agent, &self.target].into_iter().flatten().flat_map(Process::lines).collect()
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        self.kill_agent();
        self.kill_target();
        if let Ok(dir) = self.ring_dir() {
            // Best effort: a tmpfs folder of our own.
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

impl Process {
    fn lines(&self) -> Vec<String> {
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("{}: {line}", self.name)).collect()
    }

    fn tail(&self) -> String {
        let lines = self.lines();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn kill(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn stop(mut self) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).context("process id")?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).context("ask the daemon to stop")?;
        let begin = Instant::now();
        while begin.elapsed() < STOP_LIMIT {
            if let Some(status) = self.child.try_wait().context("look at the daemon")? {
                ensure!(status.success(), "{} stopped with {status}:\n{}", self.name, self.tail());
                return Ok(());
            }
            pause(Duration::from_millis(10));
        }
        let tail = self.tail();
        self.kill();
        bail!("{} did not stop within {STOP_LIMIT:?}:\n{tail}", self.name)
    }
}

/// Processes that were started as workers with this argument.
fn workers(argument: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"worker") && words.any(|word| word == argument.as_bytes())
    };
    pids.filter(is_one).collect()
}

/// Returns when the process is gone, whoever's child it is.
fn kill_and_await(pid: u32) {
    let Ok(pid) = i32::try_from(pid).map(nix::unistd::Pid::from_raw) else { return };
    // Fails for a process that has ended already.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    let begin = Instant::now();
    // Until it has been waited for, its entry says that it is dead.
    let lives = || {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
    };
    while lives() && begin.elapsed() < STOP_LIMIT {
        pause(Duration::from_millis(1));
    }
}

/// Waits a moment before looking again at another process.
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// An address for a target of these sites that nobody else takes, not even while the
/// target is down: this process has a loopback address of its own, and each of its sites
/// a port below those that the kernel gives to clients.
fn target_address(config: &SitesConfig) -> SocketAddr {
    static SITES: AtomicU16 = AtomicU16::new(0);
    let [low, middle, high, _] = std::process::id().to_le_bytes();
    // The bit keeps clear of 127.0.0.1, where everybody else is.
    let own = IpAddr::from([127, high | 0x80, middle, low]);
    let address = config.elsewhere.as_ref().map_or(own, |elsewhere| elsewhere.address);
    SocketAddr::new(address, FIRST_PORT + SITES.fetch_add(1, Ordering::Relaxed) % PORTS)
}
