//! The host's disk log, as the agent opens it, and what a group finds in it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use farshore_proto::{GroupId, HostId};
use farshore_streamer::{DISK_LOG_MIN, Damage, DiskLog, GroupLog, Line, LoggedBatch, is_disk_log};
use farshore_uring::{DirFile, StorageFile};

use crate::alarms::{Alarms, code};
use crate::config::AgentConfig;
use crate::own_file::{self, fresh};
use crate::state::GroupState;
use crate::{Error, Result};

/// Where the disk log is and how large it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLogConfig {
    /// File or block device, never on a protected volume.
    pub path: PathBuf,
    /// Bytes, at least [`DISK_LOG_MIN`]. Default 10 GiB, or all of a device. A file takes them at once, so that a full file system shows
    /// then and not in an outage.
    pub size: Option<u64>,
}

/// Default size of a file.
const SIZE: u64 = 10 << 30;

/// The log, and what keeps other agents from it.
pub(crate) struct Disk {
    log: Arc<DiskLog<DirFile>>,
    path: PathBuf,
    _lock: Option<File>,
}

/// What a group's line is found to hold.
pub(crate) struct Taken {
    /// The line that goes on, or a new one; none: there is no log.
    pub line: Option<GroupLog<DirFile>>,
    /// What it holds, or why some of that is lost.
    pub batches: std::result::Result<Vec<LoggedBatch>, Damage>,
}

impl Disk {
    /// Opens the log, if one is configured. `kept`: lines that groups have in it. `None`: there is none in this life; if one is configured, an
    /// alarm says so. Nobody waits for it longer than `limit`.
    ///
    /// # Errors
    /// [`Error::Refused`]: something else is there, or the log of another agent.
    pub(crate) fn open(
        config: &AgentConfig,
        host: HostId,
        kept: BTreeSet<Line>,
        alarms: &Alarms,
        limit: Duration,
    ) -> Result<Option<Arc<Self>>> {
        let Some(DiskLogConfig { path, size }) = config.disk_log.clone() else { return Ok(None) };
        let failed = |reason: &str| {
            let text = format!(
                "{}: {reason}; where the link does not keep up and the ring is full, points pause until a resync has ended",
                path.display()
            );
            alarms.raise(code::LOG_FAILED, "", text);
            Ok(None)
        };
        if own_file::holds_something_else(&path, is_disk_log) {
            return if kept.is_empty() {
                Err(refused(&path, "holds something else"))
            } else {
                failed("holds something else")
            };
        }
        let (sender, opened) = sync_channel(1);
        let of_thread = path.clone();
        let open = move || {
            let (file, lock) = own_file::open(&of_thread)?;
            let size = match size {
                Some(size) => size,
                None if own_file::is_device(&of_thread) => file.len()?,
                None => SIZE,
            };
            if size < DISK_LOG_MIN {
                let text = format!("{size} bytes are too small, at least {DISK_LOG_MIN} are needed");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            Ok::<_, io::Error>((DiskLog::open(file, host, size, fresh()?, &kept)?, lock))
        };
        // Where a disk hangs, this thread waits for it and nobody else.
        let thread = std::thread::Builder::new().name("farshore-disklog".into()).spawn(move || _ = sender.send(open()));
        thread.map_err(|error| Error::failed("disk log's thread", error))?;
        match opened.recv_timeout(limit) {
            Ok(Ok((log, lock))) => {
                tracing::info!(path = %path.display(), size = log.size_bytes(), "disk log");
                Ok(Some(Arc::new(Self { log, path, _lock: lock })))
            }
            Ok(Err(error)) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::ResourceBusy) => {
                Err(refused(&path, &error.to_string()))
            }
            Ok(Err(error)) => failed(&error.to_string()),
            Err(_) => failed("its disk does not answer"),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// What a group has in the log, by its state.
pub(crate) fn take_up(disk: Option<&Disk>, group: GroupId, state: &GroupState) -> Result<Taken> {
    let begin = |disk: &Disk| {
        let number = u64::from_le_bytes(fresh().map_err(|error| Error::failed("random numbers", error))?);
        Ok::<_, Error>(disk.log.begin(Line { group, number }))
    };
    let Some(line) = state.line(group) else {
        return Ok(Taken { line: disk.map(begin).transpose()?, batches: Ok(Vec::new()) });
    };
    let Some(disk) = disk else {
        let reason = Damage("the disk log that it was put in is not there".into());
        return Ok(Taken { line: None, batches: Err(reason) });
    };
    let taken = disk.log.take_up(line).and_then(|(log, batches)| match why_not(state, &batches) {
        None => Ok((log, batches)),
        Some(reason) => Err(Damage(reason)),
    });
    Ok(match taken {
        Ok((log, batches)) => Taken { line: Some(log), batches: Ok(batches) },
        Err(damage) => Taken { line: Some(begin(disk)?), batches: Err(damage) },
    })
}

/// Why these batches are not what the group's state goes on with.
fn why_not(state: &GroupState, batches: &[LoggedBatch]) -> Option<String> {
    let last = batches.last()?;
    if last.incarnation.0 > state.incarnation {
        return Some(format!(
            "it holds incarnation {}, and the state knows {}: it is older",
            last.incarnation, state.incarnation
        ));
    }
    let other = batches.iter().find(|batch| batch.generation.0 != state.generation)?;
    Some(format!("it holds generation {}, and the group is at {}", other.generation, state.generation))
}

/// Looks at the place where the disk log is to be, without touching it.
///
/// # Errors
/// [`Error::Refused`]: something else is there.
pub fn disk_log_place(config: &AgentConfig) -> Result<()> {
    match &config.disk_log {
        Some(log) if own_file::holds_something_else(&log.path, is_disk_log) => {
            Err(refused(&log.path, "holds something else"))
        }
        Some(_) | None => Ok(()),
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Refused {
        what: format!("disk log {}", path.display()),
        reason: reason.to_owned(),
        hint: "give this agent a file or block device of its own (`--log`, `--log-size`), or clear that one: what was in it is compared then"
            .into(),
    }
}
