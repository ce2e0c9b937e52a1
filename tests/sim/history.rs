//! What every sector of a volume held, by what the guests were told: known without any look at the stream.

use farshore_proto::SECTOR_BYTES;
use farshore_uring::sim::{SECTOR, SimRng};

/// Fills whole sectors with the content of the write `id`. 0 is zeroes; odd ones compress well, even ones do not.
pub(crate) fn stamp(bytes: &mut [u8], id: u64) {
    if id.is_multiple_of(2) && id != 0 {
        let mut sector = [0; SECTOR];
        SimRng::new(id).fill(&mut sector);
        sector[..8].copy_from_slice(&id.to_le_bytes());
        bytes.chunks_mut(SECTOR).for_each(|chunk| chunk.copy_from_slice(&sector));
    } else {
        bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = id.to_le_bytes());
    }
}

/// Whose content a sector has; `None`: of no write that was ever made whole.
fn id_of(sector: &[u8]) -> Option<u64> {
    let id = u64::from_le_bytes(sector[..8].try_into().expect("a sector has more than 8 bytes"));
    let mut expected = [0; SECTOR];
    stamp(&mut expected, id);
    (sector == expected).then_some(id)
}

#[derive(Clone, Copy, Debug)]
struct Version {
    id: u64,
    submitted: u64,
    /// From then on it may not be missing: its guest was told, or somebody has read it.
    acked: u64,
    /// When its end was heard of.
    ended: u64,
}

/// Sectors that are looked at as one while nobody writes to them.
const RUN: usize = 128;

/// Per sector of one volume, what it held, in order. The filter serialises overlapping requests, so they ended in the order in
/// which the device executed them.
#[derive(Clone, Debug)]
pub(crate) struct History {
    sectors: Vec<Vec<Version>>,
    /// The first of `sectors` that a power cut may leave.
    floors: Vec<usize>,
    /// Runs of sectors that hold zeroes, and always did.
    blank: Vec<bool>,
    /// Sectors that could not be read: what points hold of them is not known.
    unknown: Vec<bool>,
    /// A flush failed then: what had been written before may never become stable.
    failed: u64,
}

impl History {
    pub(crate) fn new(image: &[u8]) -> Self {
        let first = |sector: &[u8]| {
            let id = id_of(sector).expect("the first image was stamped");
            vec![Version { id, submitted: 0, acked: 0, ended: 0 }]
        };
        let sectors: Vec<_> = image.chunks(SECTOR).map(first).collect();
        let blank = image.chunks(SECTOR * RUN).map(is_zero).collect();
        Self { floors: vec![0; sectors.len()], blank, unknown: vec![false; sectors.len()], sectors, failed: 0 }
    }

    fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
        let index = |at: u64| usize::try_from(at / SECTOR_BYTES).expect("a small volume");
        index(offset)..index(offset + len)
    }

    /// A guest was told that its write is done. `id` 0: zeroes. `stable`: it is so (FUA), unless a flush has failed meanwhile, and dropped it.
    pub(crate) fn wrote(&mut self, offset: u64, len: u64, id: u64, submitted: u64, acked: u64, stable: bool) {
        for at in Self::range(offset, len) {
            self.blank[at / RUN] = false;
            self.sectors[at].push(Version { id, submitted, acked, ended: acked });
            if stable && submitted > self.failed {
                self.floors[at] = self.sectors[at].len() - 1;
            }
        }
    }

    /// A write failed, or its process ended before it: any of its sectors may hold it. `times`: of its submission, and of its end.
    pub(crate) fn perhaps_wrote(&mut self, offset: u64, id: u64, times: (u64, u64), found: &[u8]) {
        let (submitted, ended) = times;
        let range = Self::range(offset, found.len() as u64);
        for (at, bytes) in range.zip(found.chunks(SECTOR)) {
            if id_of(bytes) == Some(id) {
                self.blank[at / RUN] = false;
                self.sectors[at].push(Version { id, submitted, acked: u64::MAX, ended });
            }
        }
    }

    /// A guest has read these bytes, and may act on them: what a write that failed has left is as good as acknowledged from then on.
    pub(crate) fn saw(&mut self, offset: u64, found: &[u8], submitted: u64, step: u64) {
        let range = Self::range(offset, found.len() as u64);
        for (at, bytes) in range.zip(found.chunks(SECTOR)) {
            if let Some(last) = self.sectors[at].last_mut()
                && last.acked == u64::MAX
                && last.ended < submitted
                && id_of(bytes) == Some(last.id)
            {
                last.acked = step;
            }
        }
    }

    /// A guest was told that its flush, submitted then, is done.
    pub(crate) fn flushed(&mut self, submitted: u64) {
        let failed = self.failed;
        for (versions, floor) in self.sectors.iter().zip(&mut self.floors) {
            // One that ended after a flush had failed may have been in what that flush lost.
            let stable = |version: &Version| version.acked < submitted && version.submitted > failed;
            if let Some(last) = versions.iter().rposition(stable) {
                *floor = (*floor).max(last);
            }
        }
    }

    pub(crate) fn flush_failed(&mut self, step: u64) {
        self.failed = self.failed.max(step);
    }

    /// The host went down, and its disk holds `image` now: what it was told to keep, and of the rest anything. `checked`: else it is the
    /// image of another time.
    pub(crate) fn went_down(&mut self, image: &[u8], step: u64, checked: bool) -> Result<(), String> {
        for (at, bytes) in image.chunks(SECTOR).enumerate() {
            if self.blank[at / RUN] {
                continue;
            }
            let id = id_of(bytes).ok_or_else(|| format!("sector {at} holds what nobody wrote"))?;
            let versions = &mut self.sectors[at];
            if checked && !versions[self.floors[at]..].iter().any(|version| version.id == id) {
                let kept = versions[self.floors[at]];
                return Err(format!("sector {at} holds {id} after a power cut, and was flushed with {kept:?}"));
            }
            versions.push(Version { id, submitted: step, acked: step, ended: step });
            self.floors[at] = versions.len() - 1;
        }
        Ok(())
    }

    /// These bytes could not be read.
    pub(crate) fn unreadable(&mut self, offset: u64, len: u64) {
        self.unknown[Self::range(offset, len)].fill(true);
    }

    /// Whether it is known what the sectors of the range hold in points.
    pub(crate) fn is_known(&self, offset: u64, len: u64) -> bool {
        !self.unknown[Self::range(offset, len)].contains(&true)
    }

    /// First byte that differs, of those that are known.
    pub(crate) fn difference(&self, image: &[u8], other: &[u8]) -> Option<usize> {
        let pairs = image.chunks(SECTOR).zip(other.chunks(SECTOR)).zip(&self.unknown).enumerate();
        pairs.filter(|(_, ((a, b), unknown))| a != b && !**unknown).map(|(at, _)| at * SECTOR).next()
    }

    /// The moments at which a sector may have held these bytes: from the submission of a write of them to the acknowledgement
    /// of the first write after it. Merged, in order.
    fn moments(versions: &[Version], bytes: &[u8]) -> Vec<(u64, u64)> {
        let Some(id) = id_of(bytes) else { return Vec::new() };
        let mut next = u64::MAX;
        let mut found: Vec<(u64, u64)> = Vec::new();
        for version in versions.iter().rev() {
            if version.id == id {
                match found.last_mut() {
                    Some(later) if later.0 <= next => later.0 = later.0.min(version.submitted),
                    _ => found.push((version.submitted, next)),
                }
            }
            next = next.min(version.acked);
        }
        found
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Whether the images together are what a power cut at or after the step `cut` could have left: nothing in it that was
/// submitted after something was acknowledged that is not in it, and nothing lost that was acknowledged before `cut`.
pub(crate) fn check_cut(volumes: &[(&History, &[u8])], cut: u64) -> Result<(), String> {
    // +1 where a sector's bytes become possible, -1 behind where they stop being so.
    let mut edges: Vec<(u64, i64)> = Vec::new();
    let mut sectors = 0;
    for (volume, (history, image)) in volumes.iter().enumerate() {
        for (run, bytes) in image.chunks(SECTOR * RUN).enumerate().filter(|(run, _)| history.blank[*run]) {
            if !is_zero(bytes) {
                return Err(format!("sectors from {} on of volume {volume} hold what nobody wrote", run * RUN));
            }
        }
        for (sector, (versions, bytes)) in history.sectors.iter().zip(image.chunks(SECTOR)).enumerate() {
            if history.blank[sector / RUN] || history.unknown[sector] {
                continue;
            }
            let found = History::moments(versions, bytes);
            let late: Vec<_> = found.iter().filter(|(_, to)| *to >= cut).collect();
            if late.is_empty() {
                let held = &versions[versions.len().saturating_sub(4)..];
                return Err(format!(
                    "sector {sector} of volume {volume} holds {:?}, possible at {found:?}, the cut was at {cut}; it last held {held:?}",
                    id_of(bytes)
                ));
            }
            for (from, to) in late {
                edges.push(((*from).max(cut), 1));
                edges.push((to.saturating_add(1), -1));
            }
            sectors += 1;
        }
    }
    // Ends first: a sector whose times follow each other without a gap is not counted twice.
    edges.sort_unstable();
    let (mut possible, mut most) = (0, (0, 0));
    for (at, change) in edges {
        possible += change;
        most = most.max((possible, at));
        if possible == sectors {
            return Ok(());
        }
    }
    Err(format!("no moment from {cut} on explains all {sectors} sectors; best: {} at {}", most.0, most.1))
}

#[test]
fn lost_and_reordered_writes_are_found() {
    let mut first = vec![0; 2 * SECTOR];
    stamp(&mut first, 11);
    let mut history = History::new(&first);
    history.wrote(0, 512, 20, 1, 2, false);
    history.wrote(512, 512, 21, 3, 4, false);
    let image = |ids: [u64; 2]| {
        let mut bytes = vec![0; 2 * SECTOR];
        bytes.chunks_mut(SECTOR).zip(ids).for_each(|(sector, id)| stamp(sector, id));
        bytes
    };
    let check = |ids, cut| check_cut(&[(&history, &image(ids))], cut).is_ok();
    assert!(check([11, 11], 0) && check([20, 11], 0) && check([20, 21], 0));
    assert!(check([20, 11], 3), "the second write was not acknowledged at the cut");
    assert!(!check([11, 21], 0), "the second write without the first");
    assert!(!check([11, 11], 3) && !check([20, 11], 5), "lost an acknowledged write");
    assert!(!check([20, 99], 0), "never written");
}

#[test]
fn what_a_failed_write_left_may_be_missing_until_it_was_read() {
    let mut first = vec![0; SECTOR];
    stamp(&mut first, 11);
    let mut found = first.clone();
    stamp(&mut found, 20);
    let mut history = History::new(&first);
    history.perhaps_wrote(0, 20, (1, 2), &found);
    let old = |history: &History| check_cut(&[(history, first.as_slice())], 9).is_ok();
    assert!(old(&history));
    history.saw(0, &found, 2, 3);
    assert!(old(&history), "that read may have been done before it failed");
    history.saw(0, &first, 3, 4);
    assert!(old(&history), "something else was read");
    history.saw(0, &found, 3, 4);
    assert!(!old(&history) && check_cut(&[(&history, found.as_slice())], 9).is_ok());
}

#[test]
fn what_was_flushed_is_asked_for_after_a_power_cut() {
    let mut first = vec![0; 2 * SECTOR];
    stamp(&mut first, 11);
    let after = |id: u64, failed: bool| {
        let mut history = History::new(&first);
        history.wrote(0, 512, 20, 1, 2, false);
        if failed {
            history.flush_failed(3);
        }
        history.flushed(4);
        history.wrote(0, 512, 22, 5, 6, false);
        let mut image = first.clone();
        stamp(&mut image[..SECTOR], id);
        history.went_down(&image, 9, true).is_ok()
    };
    assert!(after(20, false) && after(22, false) && !after(11, false) && !after(99, false));
    assert!(after(11, true), "a flush that failed keeps nothing");
}
