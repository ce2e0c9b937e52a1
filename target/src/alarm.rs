//! Alarms: conditions that a person must know of, with stable codes, from raise to clear.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_proto::WallTime;

/// Most alarms kept; beyond it new ones are only logged (I11). A target with more open conditions than this has one cause
/// behind them, and that one came first.
const ALARMS_MAX: usize = 4096;

/// What is wrong. The text of each is an interface: monitoring matches on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum AlarmCode {
    /// The disk is full: the stream is paused until there is space.
    DiskFull,
    /// The system lends no more files or memory: the stream is paused until it does.
    NoResources,
    /// Making a journal durable failed: the stream is stopped until the target is restarted.
    JournalSyncFailed,
    /// Stored bytes of a journal are not what was written.
    JournalDamaged,
    /// An entry of a segment is unreadable as stored; the index still leads to all that it holds, so that nothing is lost yet.
    EntryDamaged,
    /// A footer was unreadable and was made again from its segment's entries.
    FooterRebuilt,
    /// A stream's journal cannot be opened.
    StreamUnavailable,
    /// One of the catalog's two copies was unreadable and was made again from the other.
    CatalogCopyDamaged,
    /// Both copies were unreadable: the catalog was made again from the segments.
    CatalogRebuilt,
    /// A source's batch was refused.
    BatchRefused,
    /// A host that may not write the group tried to.
    NotAMember,
    /// A host seals with keys of an epoch that this target was not given.
    KeyUnknown,
    /// The source's device has sectors that cannot be read; their content is unknown here too.
    SourceUnreadable,
    /// A base could not be written.
    BaseFailed,
    /// Retention could not go on.
    RetentionStopped,
    /// A hold or view pins history for long, or pins much of it.
    HoldOld,
}

impl AlarmCode {
    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DiskFull => "target.disk_full",
            Self::NoResources => "target.no_resources",
            Self::JournalSyncFailed => "journal.sync_failed",
            Self::JournalDamaged => "journal.damaged",
            Self::EntryDamaged => "journal.entry_damaged",
            Self::FooterRebuilt => "journal.footer_rebuilt",
            Self::StreamUnavailable => "stream.unavailable",
            Self::CatalogCopyDamaged => "catalog.copy_damaged",
            Self::CatalogRebuilt => "catalog.rebuilt",
            Self::BatchRefused => "stream.batch_refused",
            Self::NotAMember => "stream.not_a_member",
            Self::KeyUnknown => "stream.key_unknown",
            Self::SourceUnreadable => "source.unreadable",
            Self::BaseFailed => "base.failed",
            Self::RetentionStopped => "retention.stopped",
            Self::HoldOld => "hold.old",
        }
    }
}

impl fmt::Display for AlarmCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One open condition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Alarm {
    /// What.
    pub code: AlarmCode,
    /// On what: `group/host`, or empty for the whole target.
    pub subject: String,
    /// Particulars, the latest.
    pub detail: String,
    /// When it was raised first.
    pub since: WallTime,
}

/// The target's open alarms, shared. It also keeps the time that the driver told last, for those who raise.
#[derive(Clone, Debug, Default)]
pub struct Alarms {
    open: Arc<Mutex<BTreeMap<(AlarmCode, String), Alarm>>>,
    now: Arc<AtomicU64>,
}

impl Alarms {
    /// Tells the time.
    pub fn set_now(&self, wall: WallTime) {
        self.now.store(wall.0, Ordering::Relaxed);
    }

    /// The time told last.
    #[must_use]
    pub fn now(&self) -> WallTime {
        WallTime(self.now.load(Ordering::Relaxed))
    }

    /// Raises the alarm, or renews its detail.
    pub fn raise(&self, code: AlarmCode, subject: &str, detail: &str) {
        let mut open = self.lock();
        let (since, room) = (self.now(), open.len() < ALARMS_MAX);
        match open.get_mut(&(code, subject.to_owned())) {
            Some(alarm) => detail.clone_into(&mut alarm.detail),
            None if room => {
                let alarm = Alarm { code, subject: subject.to_owned(), detail: detail.to_owned(), since };
                open.insert((code, subject.to_owned()), alarm);
            }
            None => tracing::error!(code = code.as_str(), subject, detail, "alarm not kept: too many are open"),
        }
    }

    /// The condition is over.
    pub fn clear(&self, code: AlarmCode, subject: &str) {
        self.lock().remove(&(code, subject.to_owned()));
    }

    /// Those open, by code and subject.
    #[must_use]
    pub fn list(&self) -> Vec<Alarm> {
        self.lock().values().cloned().collect()
    }

    /// Whether it is open.
    #[must_use]
    pub fn is_raised(&self, code: AlarmCode, subject: &str) -> bool {
        self.lock().contains_key(&(code, subject.to_owned()))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(AlarmCode, String), Alarm>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
