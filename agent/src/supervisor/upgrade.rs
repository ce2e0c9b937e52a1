//! Another program, or another configuration: looked at aside, tried as the next worker, and become by the supervisor.

use std::ffi::{CString, OsString};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use farshore_proto::Now;
use nix::unistd::execve;
use serde_json::Value;
use tokio::sync::oneshot;

use super::image::{Abilities, Image};
use super::{Event, Supervisor, TRIAL_GAPS, signals};
use crate::{Error, Result, clock};

/// Who hears what came of an upgrade.
pub(crate) enum Reply {
    /// Whoever asked for it, if still there.
    Asker(oneshot::Sender<Result<Value>>),
    /// Nobody: it was a signal.
    Log,
}

impl Reply {
    pub(super) fn give(self, result: Result<Value>) {
        match (self, result) {
            (Self::Asker(reply), result) => _ = reply.send(result),
            (Self::Log, Ok(_)) => {}
            (Self::Log, Err(error)) => {
                tracing::error!(error = crate::error::chain(&error), "the old configuration goes on");
            }
        }
    }
}

/// What a look at a program showed.
pub(crate) struct Checked {
    binary: PathBuf,
    result: Result<(Image, Abilities)>,
    reply: Reply,
}

/// An upgrade under way.
pub(super) struct Trial {
    old: Image,
    /// The old worker was told to end.
    pub(super) begun: Now,
    /// The old worker has ended, and one of the new program was started.
    pub(super) started: bool,
    pub(super) abilities: Abilities,
    /// Block devices that nobody served before it, for reasons of their own.
    pub(super) unserved: usize,
    pub(super) reply: Reply,
}

impl Supervisor<'_> {
    /// Looks at a program, which takes time: guests are watched over meanwhile.
    pub(super) fn upgrade(&mut self, binary: PathBuf, reply: Reply) {
        if self.checking || self.trial.is_some() || self.become_at.is_some() {
            return reply.give(Err(Error::failed("upgrade", "another one is under way")));
        }
        self.checking = true;
        let (arguments, events) = (self.command.arguments.clone(), self.events.clone());
        let look = move || {
            let result = look(&binary, &arguments);
            // The loop may be over.
            let _ = events.send(Event::Checked(Box::new(Checked { binary, result, reply })));
        };
        if let Err(error) = std::thread::Builder::new().name("supervisor-check".into()).spawn(look) {
            // The reply went with the thread's work: whoever asked hears that it is gone.
            self.checking = false;
            tracing::error!(%error, "a new program cannot be looked at");
        }
    }

    /// Kills the worker, for the next to be of the new program.
    pub(super) fn take_over(&mut self, checked: Checked) {
        self.checking = false;
        let (image, abilities) = match checked.result {
            Ok(good) => good,
            Err(error) => return checked.reply.give(Err(error)),
        };
        tracing::info!(version = abilities.version, binary = %checked.binary.display(), "another program takes over");
        let now = clock::now();
        let old = std::mem::replace(&mut self.image, image);
        let unserved = self.unserved().count();
        self.trial = Some(Trial { old, begun: now, started: false, abilities, unserved, reply: checked.reply });
        if let Some(order) = self.machine.handle_replace(now) {
            self.obey(now, order);
        }
    }

    /// The new program did not get as far as serving: the old one goes on.
    pub(super) fn fail_trial(&mut self, reason: &str) {
        let Some(trial) = self.trial.take() else { return };
        self.image = trial.old;
        let error = Error::failed("upgrade", format!("the new program {reason}; the old one goes on"));
        trial.reply.give(Err(error));
    }

    /// A new program that does not come to serving, where no block device makes that urgent.
    pub(super) fn look_at_trial(&mut self, now: Now) {
        let limit = self.config.worker_gap_max * TRIAL_GAPS;
        if self.trial.as_ref().is_some_and(|trial| trial.started && now.since(trial.begun) > limit)
            && let Some(order) = self.machine.handle_replace(now)
        {
            self.obey(now, order);
        }
    }

    /// Becomes the program that the workers are of now. The worker goes on, as with any supervisor that follows another.
    pub(super) fn become_image(&mut self) {
        if !self.bypass.is_idle() {
            return;
        }
        let arguments = std::env::args_os().map(|argument| CString::new(argument.as_bytes()));
        let variables = std::env::vars_os()
            .filter(|(name, _)| !["LISTEN_FDS", "LISTEN_FDS_FIRST_FD", "LISTEN_PID"].iter().any(|ours| name == ours))
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
        let Ok(listener) = self.listener() else { return };
        let first = format!("LISTEN_FDS_FIRST_FD={}", listener.as_raw_fd()).into_bytes();
        let variables = variables.chain([b"LISTEN_FDS=1".to_vec(), first]).map(CString::new);
        let path = CString::new(self.image.path().as_os_str().as_bytes());
        let (Ok(path), Ok(arguments), Ok(variables)) = (
            path,
            arguments.collect::<std::result::Result<Vec<_>, _>>(),
            variables.collect::<std::result::Result<Vec<_>, _>>(),
        ) else {
            return;
        };
        tracing::info!("the supervisor becomes the new program");
        // Blocked signals stay blocked, and wait.
        let blocked = signals().thread_block();
        let Err(error) = execve(&path, &arguments, &variables);
        let _ = blocked.and_then(|()| signals().thread_unblock());
        tracing::error!(%error, "the supervisor stays the old program; its workers are of the new one");
    }
}

fn look(binary: &Path, arguments: &[OsString]) -> Result<(Image, Abilities)> {
    let image = Image::of(binary)?;
    let abilities = image.check(arguments)?;
    let own = Abilities::own();
    let refused = |reason: String| {
        let what = format!("program {}", binary.display());
        let hint = "install it, and restart the agent in order when its volumes are not in use".into();
        Err(Error::Refused { what, reason, hint })
    };
    if abilities.ring_layout != own.ring_layout {
        return refused(format!("reads rings of layout {}, this one has {}", abilities.ring_layout, own.ring_layout));
    }
    if abilities.roster_format != own.roster_format {
        return refused(format!(
            "reads lists of devices of format {}, this one writes {}",
            abilities.roster_format, own.roster_format
        ));
    }
    Ok((image, abilities))
}
