//! Open conditions that need attention, by code and subject.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use farshore_proto::WallTime;
use farshore_proto::text::show_time;
use serde::Serialize;

use crate::clock;

/// Codes are stable: scripts and pages in `docs/operations/` go by them.
pub(crate) mod code {
    /// The stream is closed: writes are only marked.
    pub(crate) const RING_CLOSED: &str = "ring.closed";
    /// Source and replica may differ somewhere; resync runs.
    pub(crate) const RESYNC: &str = "group.resync";
    /// Sync died, or cannot read a volume.
    pub(crate) const SYNC: &str = "sync.failed";
    /// The backing device failed a write.
    pub(crate) const WRITE_FAILED: &str = "volume.write-failed";
    /// The backing device cannot be read somewhere.
    pub(crate) const UNREADABLE: &str = "volume.unreadable";
    /// Verify has found that source and replica differ.
    pub(crate) const DIFFERS: &str = "volume.differs";
    /// A volume cannot be served.
    pub(crate) const UNAVAILABLE: &str = "volume.unavailable";
    /// It was, or may have been, written past us.
    pub(crate) const WRITTEN_PAST: &str = "volume.bypassed";
    /// Somebody else has its source open for writing.
    pub(crate) const OTHER_WRITER: &str = "volume.other-writer";
    /// The front end dropped requests.
    pub(crate) const DROPPED: &str = "volume.requests-dropped";
    /// No session with the target.
    pub(crate) const LINK_DOWN: &str = "link.down";
    /// The target takes no batches for now.
    pub(crate) const PAUSED: &str = "target.paused";
    /// The target refuses the stream.
    pub(crate) const REFUSED: &str = "target.refused";
    /// The ring is not locked in memory.
    pub(crate) const UNLOCKED: &str = "ring.unlocked";
    /// The activity log cannot be used.
    pub(crate) const ACTIVITY: &str = "activity-log.failed";
    /// It does not cover every write.
    pub(crate) const UNCOVERED: &str = "activity-log.uncovered";
    /// Batches wait in the disk log.
    pub(crate) const LOG_IN_USE: &str = "disk-log.in-use";
    /// It takes no more.
    pub(crate) const LOG_FULL: &str = "disk-log.full";
    /// It cannot be used, or does not answer.
    pub(crate) const LOG_FAILED: &str = "disk-log.failed";
    /// What was in it is lost.
    pub(crate) const LOG_LOST: &str = "disk-log.lost";
    /// State could not be written.
    pub(crate) const STATE: &str = "state.failed";
    /// No worker serves the volumes, and their requests wait.
    pub(crate) const WORKER_DOWN: &str = "agent.worker-down";
    /// No worker serves the volumes: writes go to the disks without capture.
    pub(crate) const BYPASSED: &str = "agent.bypassed";
    /// The certificate expires soon.
    pub(crate) const EXPIRES: &str = "identity.expires";
}

/// One open condition.
#[derive(Debug, Clone, Serialize)]
pub struct Alarm {
    /// Stable code.
    pub code: &'static str,
    /// Group, `group/volume`, or empty for the whole agent.
    pub subject: String,
    /// Particulars, the latest.
    pub text: String,
    /// When it was raised first, RFC 3339.
    pub since: String,
}

/// Code and subject.
type Key = (&'static str, String);

/// What is kept of one.
struct Open {
    since: WallTime,
    /// When it was raised last.
    last: WallTime,
    text: String,
}

/// The agent's open alarms.
#[derive(Default)]
pub(crate) struct Alarms(Mutex<BTreeMap<Key, Open>>);

impl Alarms {
    /// Raises or updates.
    pub(crate) fn raise(&self, code: &'static str, subject: &str, text: impl Into<String>) {
        let text = text.into();
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match open.get_mut(&(code, subject.to_owned())) {
            Some(old) => (old.last, old.text) = (clock::wall(), text),
            None => {
                tracing::warn!(code, subject, text, "alarm");
                let now = clock::wall();
                open.insert((code, subject.to_owned()), Open { since: now, last: now, text });
            }
        }
    }

    /// Clears, if it is raised.
    pub(crate) fn clear(&self, code: &'static str, subject: &str) {
        let gone = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(code, subject.to_owned()));
        if gone.is_some() {
            tracing::info!(code, subject, "alarm cleared");
        }
    }

    /// Whether it is raised.
    pub(crate) fn is_raised(&self, code: &'static str, subject: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&(code, subject.to_owned()))
    }

    /// Clears what was not raised since `time`.
    pub(crate) fn clear_before(&self, time: WallTime, code: &'static str, subject: &str) {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = open.get(&(code, subject.to_owned())).is_some_and(|open| open.last < time);
        if over {
            open.remove(&(code, subject.to_owned()));
            tracing::info!(code, subject, "alarm cleared");
        }
    }

    /// Clears all of a subject and what lies below it.
    pub(crate) fn forget(&self, subject: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, of), _| !concerns(of, subject));
    }

    /// Those of `subject` and what lies below it; all for none.
    pub(crate) fn list(&self, subject: Option<&str>) -> Vec<Alarm> {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter()
            .filter(|((_, of), _)| subject.is_none_or(|subject| concerns(of, subject)))
            .map(|((code, of), Open { since, text, .. })| Alarm {
                code,
                subject: of.clone(),
                text: text.clone(),
                since: show_time(*since),
            })
            .collect()
    }
}

fn concerns(of: &str, subject: &str) -> bool {
    of.strip_prefix(subject).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what a later look has found to be over is cleared, and what was raised since that look began is not, however long it is
    /// open.
    #[test]
    fn what_was_raised_since_stays() {
        let alarms = Alarms::default();
        alarms.raise(code::UNREADABLE, "g/v", "first");
        let after = WallTime(clock::wall().0 + 1);
        alarms.clear_before(WallTime(1), code::UNREADABLE, "g/v");
        assert_eq!(alarms.list(None).len(), 1, "the look began before it");
        while clock::wall() < after {
            std::hint::spin_loop();
        }
        alarms.raise(code::UNREADABLE, "g/v", "again");
        alarms.clear_before(after, code::UNREADABLE, "g/v");
        assert_eq!(alarms.list(None)[0].text, "again");
        alarms.clear_before(WallTime(u64::MAX), code::UNREADABLE, "g/v");
        assert!(alarms.list(None).is_empty());
    }
}
