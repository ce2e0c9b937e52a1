//! Volumes that have grown: points from before show the size of before.
//!
//! The catalog's declaration of a volume has its newest size. Each former one stands among the stream's notes, with the last batch
//! whose point shows it, under `size/<volume>/<batch>`.

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{BatchNo, VolumeIndex};

use crate::catalog::HostRecord;

/// Former sizes of one volume that are kept; the oldest goes first, and points from before it show the next one. A volume that
/// grows more often than that within what retention keeps is rather a script gone wrong.
const FORMER_MAX: usize = 64;

fn prefix(volume: VolumeIndex) -> String {
    format!("size/{volume}/")
}

/// Former sizes of a volume, each with the last batch that has it, oldest first.
fn former(record: &HostRecord, volume: VolumeIndex) -> Vec<(BatchNo, u64)> {
    let prefix = prefix(volume);
    let notes = record.notes.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
    notes.filter_map(|(key, size)| Some((BatchNo(key[prefix.len()..].parse().ok()?), size.parse().ok()?))).collect()
}

/// The volume has grown: points up to batch `upto` show the size that the record has. What lies before the horizon is forgotten.
pub(crate) fn note(record: &mut HostRecord, grown: &VolumeDecl, upto: BatchNo) {
    let Some(held) = record.volumes.iter_mut().find(|held| held.index == grown.index) else { return };
    let size = std::mem::replace(&mut held.size, grown.size);
    // Twenty digits: as text in the order of numbers.
    let key = |batch: BatchNo| format!("{}{:020}", prefix(grown.index), batch.0);
    // It grew twice between two batches: what was said first is what they show.
    record.notes.entry(key(upto)).or_insert_with(|| size.to_string());
    let horizon = record.horizon.map_or(BatchNo(0), |horizon| horizon.batch);
    let known = former(record, grown.index);
    let excess = known.len().saturating_sub(FORMER_MAX);
    for (at, (batch, _)) in known.into_iter().enumerate() {
        if at < excess || batch < horizon {
            record.notes.remove(&key(batch));
        }
    }
}

/// The volume as the point at the end of `batch` shows it.
pub(crate) fn as_of(record: &HostRecord, decl: VolumeDecl, batch: BatchNo) -> VolumeDecl {
    let size = former(record, decl.index).into_iter().find(|(upto, _)| batch <= *upto).map(|(_, size)| size);
    VolumeDecl { size: size.unwrap_or(decl.size), ..decl }
}

/// Whether the volume once was as `decl` says: a batch of before it grew comes late.
pub(crate) fn was(record: &HostRecord, decl: &VolumeDecl) -> bool {
    former(record, decl.index).into_iter().any(|(_, size)| size == decl.size)
}

#[cfg(test)]
mod tests {
    use farshore_proto::{Generation, Incarnation, Name, PointId};

    use super::*;

    const VOLUME: VolumeIndex = VolumeIndex(1);

    fn decl(size: u64) -> VolumeDecl {
        VolumeDecl { index: VOLUME, name: Name::new("v").expect("a name"), size, block: 512 }
    }

    fn record() -> HostRecord {
        let other = VolumeDecl { index: VolumeIndex(10), ..decl(7) };
        HostRecord { volumes: vec![decl(100), other], ..HostRecord::default() }
    }

    fn size_at(record: &HostRecord, batch: u64) -> u64 {
        as_of(record, record.volumes[0].clone(), BatchNo(batch)).size
    }

    /// Goal: each point shows the size of its time. Method: a volume grows twice, one of a number with the same first digit not.
    #[test]
    fn each_point_shows_the_size_of_its_time() {
        let mut record = record();
        assert_eq!(size_at(&record, 5), 100);
        note(&mut record, &decl(200), BatchNo(9));
        note(&mut record, &decl(300), BatchNo(20));
        let sizes = [0, 9, 10, 20, 21, u64::MAX].map(|batch| size_at(&record, batch));
        assert_eq!(sizes, [100, 100, 200, 200, 300, 300]);
        assert!(was(&record, &decl(100)) && was(&record, &decl(200)) && !was(&record, &decl(300)));
        let other = record.volumes[1].clone();
        assert_eq!(as_of(&record, other.clone(), BatchNo(3)), other);
        assert!(!was(&record, &VolumeDecl { size: 100, ..other }));
    }

    #[test]
    fn what_is_before_the_horizon_is_forgotten_and_the_rest_is_bounded() {
        let mut record = record();
        note(&mut record, &decl(200), BatchNo(9));
        note(&mut record, &decl(300), BatchNo(9));
        assert_eq!((size_at(&record, 9), size_at(&record, 10)), (100, 300), "no batch came between");
        let (generation, incarnation) = (Generation(1), Incarnation(1));
        record.horizon = Some(PointId { generation, incarnation, batch: BatchNo(15) });
        note(&mut record, &decl(400), BatchNo(20));
        assert_eq!(former(&record, VOLUME), [(BatchNo(20), 300)]);
        for step in 0..100 {
            note(&mut record, &decl(500 + step), BatchNo(30 + step));
        }
        assert_eq!(former(&record, VOLUME).len(), FORMER_MAX);
        assert_eq!(size_at(&record, 129), 598);
    }
}
