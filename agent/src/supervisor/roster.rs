//! Which block devices a host's workers serve: a small file beside the rings, in memory, written by the worker and read by the
//! supervisor. It outlives both, and needs no disk.
//!
//! The mark of a pass-through lies there as well, per group ([`mark_bypassed`]): writes have gone past the filter, and nothing tells
//! which. Ring, roster and mark are on one tmpfs: a reboot takes them together, and a lost ring means the same as the mark.

use std::io;
use std::path::{Path, PathBuf};

use farshore_proto::Name;
use serde::{Deserialize, Serialize};

use crate::state::UblkDisk;
use crate::{Error, Result};

/// Of the file. One of another format is not read: its devices are found by the worker. 2 added `identity`.
pub(super) const FORMAT: u32 = 2;
/// Longest file that is read: 64 groups of 16 volumes with long paths.
const BYTES_MAX: u64 = 4 << 20;

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    format: u32,
    /// Who wrote it.
    pub worker: Option<Process>,
    /// It has started everything.
    pub ready: bool,
    /// All block devices that are to be served.
    pub disks: Vec<RosterDisk>,
}

/// A block device that outlives its server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RosterDisk {
    /// `group/volume`.
    pub volume: String,
    pub group: String,
    pub disk: UblkDisk,
    /// What it stands on: a block device, or an image file.
    pub backing: PathBuf,
    /// What is known of that, so that nothing else in its place is written to.
    pub identity: String,
    /// The worker serves it.
    pub served: bool,
}

/// A process that is not mistaken for a later one with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub pid: i32,
    /// Start, in clock ticks since boot.
    started: u64,
}

impl Process {
    /// The one with this number, if there is one.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything.
        let fields: Vec<&str> = text.get(text.rfind(')')? + 2..)?.split(' ').collect();
        // Dead, and not yet waited for. While one of its threads is still ending, it holds all its files.
        let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        if matches!(fields.first(), Some(&("Z" | "X"))) && threads() <= 1 {
            return None;
        }
        // Fields 3 and up; the start is field 22.
        Some(Self { pid, started: fields.get(19)?.parse().ok()? })
    }

    /// This one.
    pub(crate) fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

impl Default for Roster {
    fn default() -> Self {
        Self::new(None, false, Vec::new())
    }
}

impl Roster {
    pub(crate) fn new(worker: Option<Process>, ready: bool, disks: Vec<RosterDisk>) -> Self {
        Self { format: FORMAT, worker, ready, disks }
    }

    /// Whether process `pid` serves `disk`.
    pub(crate) fn serves(&self, pid: i32, disk: &RosterDisk) -> bool {
        disk.served && self.worker.is_some_and(|worker| worker.pid == pid)
    }

    fn file(dir: &Path, host: &Name) -> PathBuf {
        dir.join(format!("farshore-{host}.roster"))
    }

    /// The host's roster. None yet, or none that can be read: an empty one.
    pub(crate) fn read(dir: &Path, host: &Name) -> Self {
        let path = Self::file(dir, host);
        let read = || -> io::Result<Self> {
            if std::fs::metadata(&path)?.len() > BYTES_MAX {
                return Err(io::Error::other("is too long"));
            }
            let roster: Self = serde_json::from_slice(&std::fs::read(&path)?)?;
            if roster.format != FORMAT {
                return Err(io::Error::other(format!("is of format {}, this build reads {FORMAT}", roster.format)));
            }
            Ok(roster)
        };
        match read() {
            Ok(roster) => roster,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "the roster of block devices cannot be read");
                }
                Self::default()
            }
        }
    }

    /// Replaces the host's roster; readers see the old one or the new one.
    ///
    /// # Errors
    /// When it cannot be written: the old one stays.
    pub(crate) fn write(&self, dir: &Path, host: &Name) -> Result<()> {
        let path = Self::file(dir, host);
        let text = serde_json::to_vec(self).map_err(|error| Error::failed("roster", error))?;
        let new = path.with_extension("roster.new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|error| Error::io("write", &path, error))
    }
}

/// The mark that writes to a group's volumes went past the filter.
fn bypass_mark(dir: &Path, host: &Name, group: &str) -> PathBuf {
    dir.join(format!("farshore-{host}-{group}.bypassed"))
}

/// Notes, before it happens, that writes to volumes of `group` go past the filter: everything is to be compared. Where the mark cannot be
/// made, the group's ring goes: that means the same.
///
/// # Errors
/// When neither could be done.
///
/// # Durability
/// As long as the ring itself: until the reboot, after which the missing ring says it.
pub(crate) fn mark_bypassed(dir: &Path, host: &Name, group: &str, ring: &Path) -> io::Result<()> {
    let mark = bypass_mark(dir, host, group);
    let Err(error) = std::fs::write(&mark, "") else { return Ok(()) };
    match std::fs::remove_file(ring) {
        Err(other) if other.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether writes to volumes of `group` went past the filter since [`forget_bypassed`].
pub(crate) fn was_bypassed(dir: &Path, host: &Name, group: &str) -> bool {
    // What cannot be told is taken for a yes.
    !matches!(bypass_mark(dir, host, group).try_exists(), Ok(false))
}

/// Removes the mark, after "compare everything" has become durable elsewhere. One that stays costs one more compare.
pub(crate) fn forget_bypassed(dir: &Path, host: &Name, group: &str) {
    if let Err(error) = std::fs::remove_file(bypass_mark(dir, host, group))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(group, %error, "the mark of a pass-through stays: the next start compares once more");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Name {
        Name::new("h").expect("good")
    }

    /// Goal: a roster comes back as it was written; what is no roster, or a later one, is none.
    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        assert_eq!(Roster::read(dir, &host()), Roster::default());
        let disk = RosterDisk {
            volume: "g/v".into(),
            group: "g".into(),
            disk: UblkDisk { id: 3, sequence: Some(9), boot: "b".into() },
            backing: "/dev/sdb".into(),
            identity: "block serial=1 size=512".into(),
            served: true,
        };
        let roster = Roster::new(Process::own(), true, vec![disk]);
        roster.write(dir, &host()).expect("room");
        assert_eq!(Roster::read(dir, &host()), roster);
        for bad in ["", "{", "{\"format\":3,\"worker\":null,\"ready\":true,\"disks\":[]}"] {
            std::fs::write(Roster::file(dir, &host()), bad).expect("room");
            assert_eq!(Roster::read(dir, &host()), Roster::default(), "{bad}");
        }
    }

    /// Goal: a mark is there until it is forgotten; without room for one, the ring goes instead.
    #[test]
    fn a_pass_through_is_marked_or_the_ring_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        let ring = dir.join("ring");
        std::fs::write(&ring, "").expect("room");
        assert!(!was_bypassed(dir, &host(), "g"));
        mark_bypassed(dir, &host(), "g", &ring).expect("room");
        assert!(was_bypassed(dir, &host(), "g") && !was_bypassed(dir, &host(), "other") && ring.exists());
        forget_bypassed(dir, &host(), "g");
        assert!(!was_bypassed(dir, &host(), "g"));

        std::fs::create_dir(bypass_mark(dir, &host(), "g")).expect("room");
        mark_bypassed(dir, &host(), "g", &ring).expect("the ring could be removed");
        assert!(!ring.exists());
        mark_bypassed(dir, &host(), "g", &ring).expect("there is none");
        let folder = dir.join("folder");
        std::fs::create_dir(&folder).expect("room");
        mark_bypassed(dir, &host(), "g", &folder).expect_err("neither can be done");
    }

    #[test]
    fn processes_are_told_apart() {
        let own = Process::own().expect("this one");
        assert!(own.is_alive());
        assert!(!Process { started: own.started + 1, ..own }.is_alive());
        assert_eq!(Process::of(i32::MAX), None);
        // The test program's name may hold parentheses and spaces; a name is not taken for a field.
        assert!(own.started > 0);
    }
}
