//! Content of a point: base ⊕ the newest visible record of each sector.

use farshore_proto::{SECTOR_BYTES, SLOT_BYTES, SLOT_SECTORS, VolumeIndex};
use farshore_uring::Storage;

use crate::error::{Error, Kind, Result};
use crate::group::{ChunkPlace, Content, GroupHost, IndexEntry, UpTo};
use crate::history::History;
use crate::index::sectors;

/// Attempts when the base moves under a read: a move takes far longer than a read, so a second one is rare already.
const ATTEMPTS: usize = 4;
#[expect(clippy::cast_possible_truncation, reason = "512")]
const SECTOR: usize = SECTOR_BYTES as usize;

/// Reads a slot of `volume` as of `upto`. `out`: 64 KiB, or less at the volume's end.
///
/// # Errors
/// As [`read_sectors`].
pub fn read_slot<S: Storage>(
    stream: &GroupHost<S>,
    volume: VolumeIndex,
    slot: u64,
    upto: UpTo,
    out: &mut [u8],
) -> Result<()> {
    read_sectors(stream, volume, slot, 0, upto, out)
}

/// Reads whole sectors within one slot, from sector `first` on, as of `upto`. Only what these sectors need is read and
/// verified: damage elsewhere does not matter.
///
/// # Errors
/// [`Kind::Damaged`], naming volume and bytes; [`Kind::Invalid`] for a range that is not whole sectors of one slot;
/// [`Kind::NotFound`] for a volume that the stream does not have; otherwise from the disk.
pub fn read_sectors<S: Storage>(
    history: &(impl History<S> + ?Sized),
    volume: VolumeIndex,
    slot: u64,
    first: u32,
    upto: UpTo,
    out: &mut [u8],
) -> Result<()> {
    let count = u32::try_from(out.len() / SECTOR).unwrap_or(u32::MAX);
    if !out.len().is_multiple_of(SECTOR) || count == 0 || first.checked_add(count).is_none_or(|end| end > SLOT_SECTORS)
    {
        let text = format!("read of {} bytes from sector {first} of a slot", out.len());
        return Err(Error::new(Kind::Invalid, text));
    }
    for attempt in 1.. {
        let before = history.index().moved_to();
        let result = read_once(history, volume, slot, first, count, upto, out);
        match result {
            // The base moved and the segment went between the look-up and the read: the base has it now.
            Err(error)
                if error.kind() == Kind::NotFound && attempt < ATTEMPTS && history.index().moved_to() != before => {}
            done => return done,
        }
    }
    unreachable!("the last attempt returns")
}

fn read_once<S: Storage>(
    history: &(impl History<S> + ?Sized),
    volume: VolumeIndex,
    slot: u64,
    first: u32,
    count: u32,
    upto: UpTo,
    out: &mut [u8],
) -> Result<()> {
    let mut need = sectors(first, count);
    let entries = history.index().lookup_sectors(volume, slot, upto, need)?;
    for entry in &entries {
        let brings = entry_sectors(entry) & need;
        need &= !brings;
        match entry.content {
            Content::Zero | Content::ZeroExtent => {
                for (start, len) in ranges(brings) {
                    out[span(start - first, len)].fill(0);
                }
            }
            Content::Chunk(place) => read_chunk(history, entry, place, brings, first, out)?,
        }
    }
    if need == 0 {
        return Ok(());
    }
    let base = history.base(volume)?;
    for (start, len) in ranges(need) {
        let offset = slot * SLOT_BYTES + u64::from(start) * SECTOR_BYTES;
        base.read(offset, &mut out[span(start - first, len)])?;
    }
    Ok(())
}

fn read_chunk<S: Storage>(
    history: &(impl History<S> + ?Sized),
    entry: &IndexEntry,
    place: ChunkPlace,
    brings: u128,
    first: u32,
    out: &mut [u8],
) -> Result<()> {
    let name = |error: Error| {
        let start = entry.slot * SLOT_BYTES + u64::from(entry.start) * SECTOR_BYTES;
        let end = start + u64::from(entry.count) * SECTOR_BYTES;
        let (volume, batch) = (entry.volume, entry.batch);
        let context = format!("volume {volume} bytes {start}..{end} of batch {batch}: {}", error.context());
        Error::new(error.kind(), context).caused(error)
    };
    let frame = history.frames().read_frame(place.segment, place.frame_offset).map_err(name)?;
    for (start, len) in ranges(brings) {
        let from = place.within as usize + (start - u32::from(entry.start)) as usize * SECTOR;
        let Some(bytes) = frame.get(from..from + len as usize * SECTOR) else {
            let ChunkPlace { segment, frame_offset, .. } = place;
            let text = format!("frame at byte {frame_offset} of segment {segment} has {} bytes only", frame.len());
            return Err(name(Error::new(Kind::Damaged, text)));
        };
        out[span(start - first, len)].copy_from_slice(bytes);
    }
    Ok(())
}

fn entry_sectors(entry: &IndexEntry) -> u128 {
    match entry.content {
        Content::ZeroExtent => u128::MAX,
        Content::Zero | Content::Chunk(_) => sectors(u32::from(entry.start), u32::from(entry.count)),
    }
}

fn span(sector: u32, count: u32) -> std::ops::Range<usize> {
    sector as usize * SECTOR..(sector + count) as usize * SECTOR
}

/// The runs of set bits: (first, count).
pub(crate) fn ranges(mut mask: u128) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let start = mask.trailing_zeros();
        let count = (mask >> start).trailing_ones();
        mask &= !sectors(start, count);
        Some((start, count))
    })
}

/// Whether a slot is known to be zero at `upto` without reading it: nothing but zeroes was written since a base without data.
pub(crate) fn is_known_zero<S: Storage>(
    history: &(impl History<S> + ?Sized),
    volume: VolumeIndex,
    slot: u64,
    upto: UpTo,
    base_has_data: bool,
) -> Result<bool> {
    let entries = history.index().lookup(volume, slot, upto)?;
    let mut rest = u128::MAX;
    for entry in &entries {
        if matches!(entry.content, Content::Chunk(_)) {
            return Ok(false);
        }
        rest &= !entry_sectors(entry);
    }
    Ok(rest == 0 || !base_has_data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits() {
        let found = |mask| ranges(mask).collect::<Vec<_>>();
        assert_eq!(found(0), []);
        assert_eq!(found(u128::MAX), [(0, 128)]);
        assert_eq!(found(1 << 127 | 0b1101), [(0, 1), (2, 2), (127, 1)]);
    }
}
