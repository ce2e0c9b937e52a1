//! Whether a worker still takes its requests, seen from outside: a block device with requests under way that ends none, while the
//! disk below has nothing to do.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use farshore_proto::Now;

use super::roster::RosterDisk;

/// Looks in a row that must all show the same: a supervisor that was itself held up has looked only once.
const LOOKS_MIN: u32 = 6;

/// What one look at a device shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Look {
    /// Requests under way at our device.
    pub waiting: u64,
    /// Requests that it has ended since it was made.
    pub ended: u64,
    /// Requests under way at the disk below; `None`: it cannot be told.
    pub below: Option<u64>,
}

/// A device that has shown no progress.
#[derive(Clone, Copy, Debug)]
struct Still {
    ended: u64,
    since: Now,
    looks: u32,
}

/// Watches several devices. Performs no I/O: [`Self::handle_look`] says when one hangs.
#[derive(Debug)]
pub(crate) struct Watch {
    hang_max: Duration,
    still: BTreeMap<u32, Still>,
}

impl Watch {
    pub(crate) fn new(hang_max: Duration) -> Self {
        Self { hang_max, still: BTreeMap::new() }
    }

    /// Forgets everything: another worker.
    pub(crate) fn clear(&mut self) {
        self.still.clear();
    }

    /// Whether device `id` hangs by its server's fault.
    pub(crate) fn handle_look(&mut self, now: Now, id: u32, look: Look) -> bool {
        if look.waiting == 0 || look.below.is_some_and(|requests| requests > 0) {
            self.still.remove(&id);
            return false;
        }
        let still = self.still.entry(id).or_insert(Still { ended: look.ended, since: now, looks: 0 });
        if still.ended != look.ended {
            *still = Still { ended: look.ended, since: now, looks: 0 };
        }
        still.looks += 1;
        // Where nobody can tell what the disk does, it may be at work.
        let patience = if look.below.is_some() { self.hang_max } else { self.hang_max * 5 };
        still.looks >= LOOKS_MIN && now.since(still.since) >= patience
    }
}

/// Looks at a device; `None`: it is gone.
pub(crate) fn look(disk: &RosterDisk) -> Option<Look> {
    let folder = format!("/sys/block/ublkb{}", disk.disk.id);
    let waiting = in_flight(Path::new(&folder))?;
    let stat = std::fs::read_to_string(format!("{folder}/stat")).ok()?;
    let fields: Vec<u64> = stat.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Documentation/block/stat.rst: reads, writes, discards and flushes that have ended.
    let ended = [0, 4, 11, 15].iter().filter_map(|&at| fields.get(at)).sum();
    Some(Look { waiting, ended, below: below(&disk.backing) })
}

/// Requests under way at what a device stands on.
pub(crate) fn below(backing: &Path) -> Option<u64> {
    use std::os::unix::fs::FileTypeExt;
    let status = std::fs::metadata(backing).ok()?;
    let number = if status.file_type().is_block_device() { status.rdev() } else { status.dev() };
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    in_flight(Path::new(&format!("/sys/dev/block/{major}:{minor}")))
}

fn in_flight(folder: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(folder.join("inflight")).ok()?;
    Some(text.split_whitespace().filter_map(|field| field.parse::<u64>().ok()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(watch: &mut Watch, from: u64, count: u64, look: impl Fn(u64) -> Look) -> Option<u64> {
        (from * 4..(from + count) * 4)
            .find(|quarter| watch.handle_look(Now(quarter * 250_000_000), 7, look(*quarter)))
            .map(|quarter| quarter / 4)
    }

    /// Goal: only a device that has requests, ends none and has no disk to wait for hangs, and only after the time.
    #[test]
    fn who_hangs() {
        let mut watch = Watch::new(Duration::from_secs(2));
        let look = Look { waiting: 3, ended: 10, below: Some(0) };
        assert_eq!(seconds(&mut watch, 0, 100, |_| Look { waiting: 0, ..look }), None, "nothing to do");
        assert_eq!(seconds(&mut watch, 100, 100, |n| Look { ended: n, ..look }), None, "slow, but works");
        assert_eq!(seconds(&mut watch, 200, 100, |_| Look { below: Some(1), ..look }), None, "the disk is slow");
        assert_eq!(seconds(&mut watch, 300, 100, |_| look), Some(302));
        watch.clear();
        assert_eq!(seconds(&mut watch, 400, 100, |_| Look { below: None, ..look }), Some(410), "who knows");
    }

    /// Goal: whoever was held up itself accuses nobody after one look.
    #[test]
    fn a_gap_between_looks_is_not_a_hang() {
        let mut watch = Watch::new(Duration::from_secs(2));
        let look = Look { waiting: 3, ended: 10, below: Some(0) };
        for minute in 0..5 {
            assert!(!watch.handle_look(Now(minute * 60_000_000_000), 7, look), "minute {minute}");
        }
        assert!(watch.handle_look(Now(300_000_000_000), 7, look));
    }
}
