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
    acked: u64,
}

/// Per sector of one volume, what it held, in order. The filter serialises overlapping requests, so they ended in the order in
/// which the device executed them.
#[derive(Debug)]
pub(crate) struct History {
    sectors: Vec<Vec<Version>>,
}

impl History {
    pub(crate) fn new(image: &[u8]) -> Self {
        let first = |sector: &[u8]| {
            let id = id_of(sector).expect("the first image was stamped");
            vec![Version { id, submitted: 0, acked: 0 }]
        };
        Self { sectors: image.chunks(SECTOR).map(first).collect() }
    }

    /// A guest was told that its write is done. `id` 0: zeroes.
    pub(crate) fn wrote(&mut self, offset: u64, len: u64, id: u64, submitted: u64, acked: u64) {
        let index = |at: u64| usize::try_from(at / SECTOR_BYTES).expect("a small volume");
        for versions in &mut self.sectors[index(offset)..index(offset + len)] {
            versions.push(Version { id, submitted, acked });
        }
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

/// Whether the images together are what a power cut at or after the step `cut` could have left: nothing in it that was
/// submitted after something was acknowledged that is not in it, and nothing lost that was acknowledged before `cut`.
pub(crate) fn check_cut(volumes: &[(&History, &[u8])], cut: u64) -> Result<(), String> {
    // +1 where a sector's bytes become possible, -1 behind where they stop being so.
    let mut edges: Vec<(u64, i64)> = Vec::new();
    let mut sectors = 0;
    for (volume, (history, image)) in volumes.iter().enumerate() {
        for (sector, (versions, bytes)) in history.sectors.iter().zip(image.chunks(SECTOR)).enumerate() {
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
    history.wrote(0, 512, 20, 1, 2);
    history.wrote(512, 512, 21, 3, 4);
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
