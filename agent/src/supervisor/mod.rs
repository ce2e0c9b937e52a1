//! The supervisor of a protected host: a small process, locked in memory, that starts the worker (filter, streamer: [`crate::Agent`]),
//! starts it again when it dies, and serves its block devices itself when no worker can.
//!
//! ```text
//! supervisor ── starts, kills ──▶ worker ──▶ ublk devices, rings
//!     │  ◀── roster (a file in memory): which devices, who serves them
//!     └── after 5 s without service, or three crashes in a row: pass-through ──▶ the same devices
//! ```
//!
//! # Rules
//!
//! 1. A worker that is gone is followed by the next at once; what the kernel holds of its requests comes to that one.
//! 2. Guests wait at most `gap_max` for a worker (I1). Then their devices are served without capture, after a mark has been made that
//!    everything is to be compared (I4).
//! 3. Worker and pass-through never serve one device at once: the worker asks for the devices before it opens what they stand on, and
//!    the kernel hands a device to nobody whose last server has I/O under way.
//! 4. Nothing here needs a disk: the worker's program, the roster and the marks are in memory.
//! 5. The supervisor's own death changes nothing for guests: the worker goes on, and the next supervisor takes it for its own.
//!
//! Decisions are in `machine.rs`, which performs no I/O; the loop here feeds it and does what it orders.

mod admin;
mod bypass;
mod host;
mod image;
mod link;
mod machine;
mod roster;
mod upgrade;
mod watch;

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use farshore_proto::text::show_time;
use farshore_proto::{Name, Now};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;
use tokio::sync::watch as tokio_watch;

pub use self::admin::{UpgradeRequest, supervisor_socket};
pub use self::host::settle_worker;
pub use self::image::Abilities;
pub use self::link::inherited_listener;

use self::admin::{Board, Request};
use self::bypass::Bypass;
use self::image::Image;
pub(crate) use self::link::SupervisorLink;
pub(crate) use self::machine::MACHINE;
use self::machine::{End, Machine, Order};
use self::roster::{Process, Roster};
pub(crate) use self::roster::{RosterDisk, forget_bypassed, was_bypassed};
use self::upgrade::{Checked, Reply, Trial};
use self::watch::Watch;
use crate::activity::activity_log_place;
use crate::attach::ring_folder;
use crate::config::AgentConfig;
use crate::disk_log::disk_log_place;
use crate::frontend::may_survive;
use crate::{Error, Result, api, clock};

/// Between two looks while a worker serves, and while one is awaited.
const LOOK: Duration = Duration::from_millis(250);
const LOOK_SOON: Duration = Duration::from_millis(50);
/// Between two looks at a process that is no child.
const LOOK_ADOPTED: Duration = Duration::from_millis(20);
/// Between two looks for mounts that do not belong into this namespace.
const MOUNTS: Duration = Duration::from_secs(5);
/// For how many times `gap_max` a disk at a dead worker's I/O is waited for. Then a pass-through is tried all the same.
const BUSY_GAPS: u32 = 6;
/// For how many times `gap_max` a new program may start where no block device waits.
const TRIAL_GAPS: u32 = 6;
/// Events that wait for the loop; whoever has one more waits himself.
const EVENTS_MAX: usize = 64;
/// Until the answer to an upgrade has left, before this process becomes the new program.
const ANSWER: Duration = Duration::from_millis(300);

/// What the supervisor tells whoever started it (systemd).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Volumes are served.
    Ready,
    /// Still alive: at every turn of the loop.
    Alive,
    /// It stops in order.
    Stopping,
}

/// What wakes the loop.
pub(crate) enum Event {
    Ended(i32, End),
    Asked(Request),
    Checked(Box<Checked>),
    /// Read the configuration again.
    Reload,
    Stop,
}

/// How workers are started.
pub struct WorkerCommand {
    /// Arguments behind `agent worker` (and `agent check`).
    pub arguments: Vec<OsString>,
}

/// What is known of the running worker.
#[derive(Clone, Copy)]
struct Running {
    pid: i32,
    since: Now,
}

struct Supervisor<'a> {
    config: &'a AgentConfig,
    host: Name,
    command: WorkerCommand,
    notify: &'a dyn Fn(Notice),
    image: Image,
    /// The agent's admin socket, for workers and for the time without one. None while a worker of an earlier supervisor answers on its
    /// own.
    listener: Option<Arc<UnixListener>>,
    machine: Machine,
    worker: Option<Running>,
    bypass: Bypass,
    watch: Watch,
    roster: Roster,
    events: SyncSender<Event>,
    board: Arc<Board>,
    /// The socket, while this process answers on it.
    answer_on: tokio_watch::Sender<Option<Arc<UnixListener>>>,
    /// A disk has kept guests waiting since.
    busy_since: Option<Now>,
    looked: Now,
    mounts_looked: Now,
    /// A program is being looked at, on a thread of its own.
    checking: bool,
    trial: Option<Trial>,
    /// Become the new program then.
    become_at: Option<Now>,
    ready_told: bool,
}

/// Runs the supervisor until it is told to stop (SIGTERM, SIGINT); gives the exit code.
///
/// # Errors
/// Another agent of this host runs; the sockets or this program cannot be used.
pub fn run(config: &AgentConfig, host: &Name, command: WorkerCommand, notify: &dyn Fn(Notice)) -> Result<i32> {
    ring_folder(&config.ring_dir)?;
    activity_log_place(config)?;
    disk_log_place(config)?;
    let _lock = lock(&config.ring_dir, host)?;
    host::settle();
    let image = Image::own()?;
    let roster = Roster::read(&config.ring_dir, host);
    let adopted = roster.worker.filter(|worker| worker.is_alive());
    let listener = if adopted.is_some() { None } else { Some(listener(&config.socket, false)?) };
    let own = api::listen_std(&supervisor_socket(&config.socket), true)?;
    let (events, inbox) = sync_channel(EVENTS_MAX);
    let board = Board::new(events.clone());
    let (answer_on, on) = tokio_watch::channel(None);
    let of_thread = Arc::clone(&board);
    let (listening, listens) = sync_channel(1);
    std::thread::Builder::new()
        .name("supervisor-admin".into())
        .spawn(move || {
            if let Err(error) = admin::serve(&of_thread, own, on, &listening) {
                tracing::error!(%error, "the supervisor does not answer on its sockets");
            }
        })
        .map_err(|error| Error::failed("supervisor", error))?;
    // An end without a message is told in the log.
    let _ = listens.recv();
    // Where this program has taken another's place: signals of the time between have waited.
    if let Err(error) = signals().thread_unblock() {
        tracing::warn!(%error, "signals stay blocked");
    }
    let now = clock::now();
    let mut supervisor = Supervisor {
        config,
        host: host.clone(),
        command,
        notify,
        image,
        listener,
        machine: Machine::new(now, config.worker_gap_max, adopted.is_some()),
        worker: None,
        bypass: Bypass::new(config, host.clone()),
        watch: Watch::new(config.worker_hang_max),
        roster,
        events,
        board,
        answer_on,
        busy_since: None,
        looked: now,
        mounts_looked: Now(0),
        checking: false,
        trial: None,
        become_at: None,
        ready_told: false,
    };
    if let Some(worker) = adopted {
        tracing::info!(pid = worker.pid, "a worker of an earlier supervisor runs: it goes on");
        supervisor.follow(worker.pid);
    }
    let code = supervisor.run(&inbox);
    // As the worker has left it, or as its death did.
    let disks = Roster::read(&config.ring_dir, host).disks;
    supervisor.bypass.stop(&disks);
    for socket in [&config.socket, &supervisor_socket(&config.socket)] {
        // The names are ours; sockets left behind are replaced at the next start.
        let _ = std::fs::remove_file(socket);
    }
    code
}

/// Signals that order something. The program that another becomes would end by them until it listens.
fn signals() -> SigSet {
    SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP])
}

/// One supervisor for a host's rings.
fn lock(dir: &Path, host: &Name) -> Result<std::fs::File> {
    let path = dir.join(format!("farshore-{host}.supervisor"));
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| Error::io("open", &path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => Err(Error::Refused {
            what: format!("agent {host}"),
            reason: format!("another agent of this name runs on this host ({} is locked)", path.display()),
            hint: "stop that one; `farshore agent show` tells its process".into(),
        }),
    }
}

/// The agent's admin socket, to be inherited by workers. `replace`: whoever had its name is gone.
fn listener(socket: &Path, replace: bool) -> Result<Arc<UnixListener>> {
    let listener = match inherited_listener() {
        Some(listener) => listener,
        None => api::listen_std(socket, replace)?,
    };
    let shared =
        listener.set_nonblocking(true).and_then(|()| Ok(fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty()))?));
    shared.map_err(|error| Error::io("share", socket, error))?;
    Ok(Arc::new(listener))
}

impl Supervisor<'_> {
    fn run(&mut self, inbox: &Receiver<Event>) -> Result<i32> {
        loop {
            let now = clock::now();
            self.look(now);
            while let Some(order) = self.machine.poll_order(now) {
                if let Order::Exit(code) = order {
                    return Ok(code);
                }
                self.obey(now, order);
            }
            self.show();
            (self.notify)(Notice::Alive);
            if self.become_at.is_some_and(|at| now >= at) {
                // What was said to this program the next one would not hear.
                match inbox.try_recv() {
                    Ok(event) => {
                        self.handle(now, event);
                        continue;
                    }
                    Err(_) => {
                        self.become_at = None;
                        self.become_image();
                    }
                }
            }
            let soon = !self.machine.is_serving() || self.become_at.is_some();
            match inbox.recv_timeout(if soon { LOOK_SOON } else { LOOK }) {
                Ok(event) => self.handle(clock::now(), event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    fn handle(&mut self, now: Now, event: Event) {
        match event {
            Event::Ended(pid, end) if self.worker.is_some_and(|worker| worker.pid == pid) => {
                let served = self.worker.take().map(|worker| now.since(worker.since));
                tracing::warn!(pid, %end, ?served, "the worker has ended");
                self.board.shown().last_end = Some(format!("{end} on {}", show_time(clock::wall())));
                self.machine.handle_ended(now, end);
                self.watch.clear();
                if self.trial.as_ref().is_some_and(|trial| trial.started) {
                    self.fail_trial(&format!("ended ({end}) before it served"));
                }
            }
            Event::Ended(..) => {}
            Event::Stop => {
                tracing::info!("stopping in order");
                (self.notify)(Notice::Stopping);
                self.become_at = None;
                self.machine.handle_stop();
            }
            Event::Reload => {
                tracing::info!("SIGHUP: a worker with the configuration as it is now takes over");
                // Nobody waits for the answer; a configuration that is refused is in the log.
                self.upgrade(Path::new("/proc/self/exe").to_owned(), Reply::Log);
            }
            Event::Checked(checked) => self.take_over(*checked),
            Event::Asked(Request::LetGo(reply)) => {
                if self.bypass.let_go() {
                    tracing::info!("a worker takes the devices over");
                    self.machine.handle_let_go();
                }
                // Whoever asked may have gone.
                let _ = reply.send(());
            }
            Event::Asked(Request::Upgrade(binary, reply)) => self.upgrade(binary, Reply::Asker(reply)),
        }
    }

    /// Takes in what has changed since the last look.
    fn look(&mut self, now: Now) {
        if !self.machine.is_serving() || now.since(self.looked) >= LOOK {
            self.looked = now;
            let roster = Roster::read(&self.config.ring_dir, &self.host);
            if roster.disks != self.roster.disks {
                // On a host whose mounts are private nobody else would let go of these.
                self.mounts_looked = Now(0);
            }
            self.roster = roster;
        }
        if let Some(worker) = self.worker
            && self.roster.ready
            && self.roster.worker.is_some_and(|of| of.pid == worker.pid)
            && !self.machine.is_serving()
        {
            self.machine.handle_ready(now);
            if self.machine.is_serving() {
                self.worker_is_ready(now, worker);
            }
        }
        let serving = self.machine.is_serving();
        let waiting: Vec<_> = self.unserved().collect();
        let busy = waiting.iter().any(|disk| is_block_device(&disk.backing) && watch::below(&disk.backing) > Some(0));
        let unserved = waiting.len();
        self.busy_since = if busy { self.busy_since.or(Some(now)) } else { None };
        let patience = self.config.worker_gap_max * BUSY_GAPS;
        let kept = self.busy_since.is_some_and(|since| now.since(since) < patience);
        self.machine.handle_unserved(now, unserved, kept);
        if serving && now == self.looked {
            self.look_for_hangs(now);
        }
        self.look_at_trial(now);
        if now.since(self.mounts_looked) >= MOUNTS && host::has_own_mounts() {
            self.mounts_looked = now;
            host::detach_own(&self.roster.disks);
        }
    }

    /// Devices that wait, and are served by nobody.
    fn unserved(&self) -> impl Iterator<Item = &RosterDisk> {
        let by_worker = |disk: &RosterDisk| self.worker.is_some_and(|worker| self.roster.serves(worker.pid, disk));
        let alone = move |disk: &&RosterDisk| !by_worker(disk) && !self.bypass.serves(disk.disk.id);
        self.roster.disks.iter().filter(alone).filter(|disk| may_survive(&disk.disk))
    }

    fn look_for_hangs(&mut self, now: Now) {
        let mut hung = None;
        for disk in self.roster.disks.iter().filter(|disk| disk.served) {
            if watch::look(disk).is_some_and(|look| self.watch.handle_look(now, disk.disk.id, look)) {
                hung = Some(disk.volume.clone());
            }
        }
        if let Some(volume) = hung
            && let Some(order) = self.machine.handle_hung()
        {
            tracing::warn!(volume, "requests wait, and the worker ends none");
            self.obey(now, order);
        }
    }

    fn worker_is_ready(&mut self, now: Now, worker: Running) {
        tracing::info!(pid = worker.pid, after = ?now.since(worker.since), "the worker serves");
        self.tell_ready();
        let left = self.unserved().count();
        if self.trial.as_ref().is_some_and(|trial| left > trial.unserved) {
            self.fail_trial(&format!("left {left} block device(s) unserved"));
            if let Some(order) = self.machine.handle_replace(now) {
                self.obey(now, order);
            }
            return;
        }
        let Some(trial) = self.trial.take() else { return };
        let pause = now.since(trial.begun);
        tracing::info!(version = trial.abilities.version, ?pause, "the new program serves");
        let done = json!({
            "version": trial.abilities.version,
            "worker_pid": worker.pid,
            "pause_s": pause.as_secs_f64(),
        });
        trial.reply.give(Ok(done));
        self.become_at = Some(now.plus(ANSWER));
    }

    fn tell_ready(&mut self) {
        if !std::mem::replace(&mut self.ready_told, true) {
            (self.notify)(Notice::Ready);
        }
    }

    fn obey(&mut self, now: Now, order: Order) {
        match order {
            Order::Start => {
                if let Err(error) = self.start() {
                    tracing::error!(error = crate::error::chain(&error), "a worker could not be started");
                    self.machine.handle_ended(now, End::Exited(1));
                    self.fail_trial(&crate::error::chain(&error));
                }
            }
            Order::Kill(reason) => {
                tracing::warn!(reason, "the worker is killed");
                self.signal(Signal::SIGKILL);
            }
            Order::Terminate => self.signal(Signal::SIGTERM),
            Order::Bypass => self.engage(now),
            Order::Exit(_) => {}
        }
    }

    fn start(&mut self) -> Result<()> {
        let listener = self.listener()?;
        let mut command = Command::new(self.image.path());
        command
            .args(["agent", "worker"])
            .args(&self.command.arguments)
            .env(link::SUPERVISOR, supervisor_socket(&self.config.socket))
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDS_FIRST_FD", listener.as_raw_fd().to_string())
            .env_remove("LISTEN_PID")
            .env_remove("NOTIFY_SOCKET")
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            // A key pressed on the terminal is for the supervisor, which stops the worker in order.
            .process_group(0);
        let child = command.spawn().map_err(|error| Error::failed("worker", error))?;
        let pid = i32::try_from(child.id()).map_err(|error| Error::failed("worker", error))?;
        self.board.shown().starts += 1;
        tracing::info!(pid, "worker started");
        self.follow(pid);
        if let Some(trial) = &mut self.trial {
            trial.started = true;
        }
        Ok(())
    }

    /// The admin socket; opened when the worker that had it is gone.
    fn listener(&mut self) -> Result<Arc<UnixListener>> {
        let listener = match self.listener.take() {
            Some(listener) => listener,
            None => listener(&self.config.socket, true)?,
        };
        Ok(Arc::clone(self.listener.insert(listener)))
    }

    /// Waits for the end of a process on a thread of its own.
    fn follow(&mut self, pid: i32) {
        self.worker = Some(Running { pid, since: clock::now() });
        let events = self.events.clone();
        let wait = move || {
            let end = await_end(pid);
            // The loop may be over.
            let _ = events.send(Event::Ended(pid, end));
        };
        if let Err(error) = std::thread::Builder::new().name("supervisor-wait".into()).spawn(wait) {
            tracing::error!(%error, "the worker's end will not be seen");
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(worker) = self.worker
            && let Err(error) = kill(Pid::from_raw(worker.pid), signal)
            && error != Errno::ESRCH
        {
            tracing::error!(pid = worker.pid, %error, "the worker cannot be signalled");
        }
    }

    fn engage(&mut self, now: Now) {
        let serving = self.machine.is_serving();
        let mut all = true;
        let unserved: Vec<_> = self.unserved().cloned().collect();
        for disk in &unserved {
            // A disk that is held costs a try a second or two.
            (self.notify)(Notice::Alive);
            if let Err(error) = self.bypass.engage(disk) {
                all = false;
                tracing::warn!(error = crate::error::chain(&error), "cannot be served without a worker; tried again");
            }
        }
        // Volumes that a living worker left alone leave the machine as it is: it looks at what is unserved.
        if !serving {
            self.machine.handle_bypassed(now, all);
        }
        if all {
            self.tell_ready();
        }
    }

    fn show(&mut self) {
        let served = self.machine.is_serving();
        let here = !served && !self.machine.has_worker() || self.machine.is_bypassed();
        if here != self.answer_on.borrow().is_some() {
            // Without a socket nobody asks.
            let on = if here { self.listener().ok() } else { None };
            self.answer_on.send_replace(on);
        }
        let mut shown = self.board.shown();
        shown.worker_pid = self.worker.map(|worker| worker.pid);
        shown.worker = match (served, self.worker.is_some()) {
            (true, _) => "serving",
            (false, true) => "starting",
            (false, false) => "down",
        };
        shown.crashes_in_row = self.machine.crashes();
        shown.bypassed =
            self.roster.disks.iter().map(|disk| disk.disk.id).filter(|id| self.bypass.serves(*id)).collect();
        shown.since = if served { None } else { shown.since.take().or_else(|| Some(show_time(clock::wall()))) };
        if shown.disks != self.roster.disks {
            shown.disks.clone_from(&self.roster.disks);
        }
    }
}

fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|status| status.file_type().is_block_device())
}

/// Blocks until the process has ended, a child or not.
fn await_end(pid: i32) -> End {
    let process = Process::of(pid);
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return End::Exited(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return End::Signalled(signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            // Another supervisor's.
            Err(_) => {
                if !process.is_some_and(Process::is_alive) {
                    return End::Unknown;
                }
                std::thread::park_timeout(LOOK_ADOPTED);
            }
        }
    }
}
