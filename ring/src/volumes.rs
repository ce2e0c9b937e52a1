//! The volume table and the bitmaps behind it, in the ring's file after the ring.
//!
//! A line goes live in one store (its first word), after the file has been extended and the rest of the line written: a
//! kill before it leaves the line as it was, and space behind the ring that the next addition takes.

use std::sync::{Arc, PoisonError};

use crate::Error;
use crate::bitmap::{Bitmap, BitmapShape};
use crate::crc::crc32c_words;
use crate::layout::{MAX_VOLUMES, UNIT_BYTES, VolumeEntry, index};
use crate::memory::Resident;
use crate::ring::Ring;
use crate::sync::Ordering;

/// Which of a volume's bitmaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    /// Content that is not in the stream.
    Missing,
    /// Content that is in the stream and not yet durable at the target.
    Unacked,
    /// Missing content that sync has read and that is under way.
    InFlight,
}

/// One line of the volume table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeInfo {
    /// Index in the group: 0 to [`MAX_VOLUMES`] - 1.
    pub volume: u16,
    /// Who it is.
    pub id: [u8; 16],
    /// Bytes that its bitmaps cover.
    pub capacity: u64,
}

/// The bitmaps of a live volume.
#[derive(Clone, Debug)]
pub(crate) struct VolumeMaps {
    missing: Bitmap,
    unacked: Bitmap,
    in_flight: Bitmap,
}

/// Bitmaps up to this size (all three of a volume; about 10 TiB of volume) get their memory when the volume is added; larger ones as they
/// are touched, which a full tmpfs answers with SIGBUS. The price of a fixed promise would be 384 MiB for 64 TiB.
const PREALLOCATE_BYTES_MAX: u64 = 64 << 20;

/// Largest volume: 1 PiB, so that sizes stay far from the ends of integers.
const CAPACITY_MAX: u64 = 1 << 50;

// Words of a line.
const STATE: usize = 0;
const CAPACITY: usize = STATE + 1;
const OFFSET: usize = CAPACITY + 1;
const LENGTH: usize = OFFSET + 1;
const ID: usize = LENGTH + 1;
const CHECKSUM: usize = ID + 2;
const _: () = assert!(CHECKSUM == 6);

const STATE_NONE: u64 = 0;
const STATE_LIVE: u64 = 1;
/// Was live; its bytes may be taken by the same line again.
const STATE_REMOVED: u64 = 2;

/// A line in parts.
#[derive(Clone, Copy, Debug)]
struct Line {
    capacity: u64,
    offset: u64,
    length: u64,
    id: [u8; 16],
}

impl Line {
    fn words(&self) -> [u64; CHECKSUM - 1] {
        let [low, high] = [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| self.id[at + i])));
        [self.capacity, self.offset, self.length, low, high]
    }

    /// `None` for a line that never was live.
    ///
    /// # Errors
    /// `Corrupt`.
    fn load(entry: &VolumeEntry) -> Result<Option<(bool, Self)>, Error> {
        // Acquire: pairs with the Release in `go_live`.
        let state = entry.words[STATE].load(Ordering::Acquire);
        let live = match state {
            STATE_NONE => return Ok(None),
            STATE_LIVE => true,
            STATE_REMOVED => false,
            value => return Err(Error::Corrupt { what: "volume in an unknown state", value }),
        };
        let words: [u64; CHECKSUM - 1] = std::array::from_fn(|i| entry.words[CAPACITY + i].load(Ordering::Relaxed));
        let checksum = entry.words[CHECKSUM].load(Ordering::Relaxed);
        if live && checksum != u64::from(crc32c_words(words)) {
            return Err(Error::Corrupt { what: "checksum of a line of the volume table is wrong", value: checksum });
        }
        let [capacity, offset, length, low, high] = words;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&low.to_le_bytes());
        id[8..].copy_from_slice(&high.to_le_bytes());
        Ok(Some((live, Self { capacity, offset, length, id })))
    }

    fn go_live(&self, entry: &VolumeEntry) {
        let words = self.words();
        for (i, word) in words.into_iter().enumerate() {
            entry.words[CAPACITY + i].store(word, Ordering::Relaxed);
        }
        entry.words[CHECKSUM].store(u64::from(crc32c_words(words)), Ordering::Relaxed);
        // Release: pairs with the Acquire in `load`.
        entry.words[STATE].store(STATE_LIVE, Ordering::Release);
    }
}

impl Ring {
    /// Adds a volume: three empty bitmaps for `capacity` bytes (the volume's size, or more if it may grow). Does nothing if this volume
    /// is there already with this id and capacity. Makes system calls; not for the way of a write.
    ///
    /// # Errors
    /// `Volume`: the index is out of range or another volume has it; `Io`: no room for the bitmaps.
    pub fn add_volume(&self, volume: u16, id: [u8; 16], capacity: u64) -> Result<(), Error> {
        let entry = self.entry(volume)?;
        if capacity == 0 || capacity > CAPACITY_MAX {
            return Err(Error::Volume { volume, what: "capacity must be between 1 byte and 1 PiB" });
        }
        let mut maps = self.volume_maps.lock().unwrap_or_else(PoisonError::into_inner);
        let line = Line::load(entry)?;
        if let Some((true, line)) = line {
            let same = line.id == id && line.capacity == capacity;
            let taken =
                Error::Volume { volume, what: "another volume (or another capacity) has this index; remove it first" };
            return if same { Ok(()) } else { Err(taken) };
        }
        let length = 3 * BitmapShape::new(capacity).bytes() as u64;
        let old = line.map(|(_, line)| line).filter(|old| self.holds(old) && old.length >= length);
        let offset = match old {
            Some(old) => old.offset,
            None => self.end_of_areas()?,
        };
        let line = Line { capacity, offset, length: old.map_or(length, |old| old.length), id };
        let backing = self.backing();
        backing.grow(offset, offset + length, length <= PREALLOCATE_BYTES_MAX)?;
        let new = self.map_line(&line)?;
        // A removed volume's bytes, taken again: emptied while the line is not live.
        for bitmap in [&new.missing, &new.unacked, &new.in_flight] {
            bitmap.for_each_word(|word, _| {
                bitmap.swap_word(word, 0);
            });
        }
        line.go_live(entry);
        maps[usize::from(volume)] = Some(new);
        Ok(())
    }

    /// Removes a volume; its bitmaps' content is gone. Drop those still held before the index is used again: they may lie on the
    /// same memory as the next volume's.
    ///
    /// # Errors
    /// `Volume`: there is none of this index.
    pub fn remove_volume(&self, volume: u16) -> Result<(), Error> {
        let entry = self.entry(volume)?;
        let mut maps = self.volume_maps.lock().unwrap_or_else(PoisonError::into_inner);
        if maps[usize::from(volume)].take().is_none() {
            return Err(Error::Volume { volume, what: "there is no volume of this index in the ring" });
        }
        // Release: after whatever the caller did with the bitmaps.
        entry.words[STATE].store(STATE_REMOVED, Ordering::Release);
        Ok(())
    }

    /// The volumes in the table.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let maps = self.volume_maps.lock().unwrap_or_else(PoisonError::into_inner);
        (0_u16..)
            .zip(maps.iter())
            .filter(|(_, maps)| maps.is_some())
            .filter_map(|(volume, _)| {
                let (_, line) = Line::load(&self.volume_table[usize::from(volume)]).ok()??;
                Some(VolumeInfo { volume, id: line.id, capacity: line.capacity })
            })
            .collect()
    }

    /// A volume's bitmap; `None` for a volume that is not in the table. Takes a lock: fetch it once and keep it.
    #[must_use]
    pub fn bitmap(&self, volume: u16, which: Which) -> Option<Bitmap> {
        let maps = self.volume_maps.lock().unwrap_or_else(PoisonError::into_inner);
        let maps = maps.get(usize::from(volume))?.as_ref()?;
        Some(match which {
            Which::Missing => maps.missing.clone(),
            Which::Unacked => maps.unacked.clone(),
            Which::InFlight => maps.in_flight.clone(),
        })
    }

    /// Maps the bitmaps of all live lines.
    pub(crate) fn map_volumes(&self) -> Result<(), Error> {
        let file = self.backing().len()?;
        let mut maps = self.volume_maps.lock().unwrap_or_else(PoisonError::into_inner);
        for (entry, maps) in self.volume_table.iter().zip(maps.iter_mut()) {
            let Some((true, line)) = Line::load(entry)? else { continue };
            if !self.holds(&line) || line.length < 3 * BitmapShape::new(line.capacity).bytes() as u64 {
                return Err(Error::Corrupt { what: "bitmaps of a volume lie outside their place", value: line.offset });
            }
            let end = line.offset + line.length;
            if end > file {
                return Err(Error::Truncated { found: file, expected: end });
            }
            *maps = Some(self.map_line(&line)?);
        }
        Ok(())
    }

    fn map_line(&self, line: &Line) -> Result<VolumeMaps, Error> {
        let shape = BitmapShape::new(line.capacity);
        let mapping = Arc::new(self.backing().map(line.offset, 3 * shape.bytes(), Resident::AsTouched)?);
        let bitmap = |number: usize| {
            // SAFETY: the mapping has three times shape.bytes() bytes; each third is used as one bitmap; the areas of
            // different lines do not overlap (`end_of_areas` counts every line that ever was live).
            unsafe { Bitmap::new(&self.shared, &mapping, number * shape.bytes(), shape) }
        };
        Ok(VolumeMaps { missing: bitmap(0), unacked: bitmap(1), in_flight: bitmap(2) })
    }

    /// Whether a line's area lies behind the ring, aligned, in range of sane numbers.
    fn holds(&self, line: &Line) -> bool {
        line.offset.is_multiple_of(UNIT_BYTES as u64)
            && line.offset >= self.total_bytes()
            && line.offset < 1 << 56
            && line.length < 1 << 50
            && line.capacity > 0
            && line.capacity <= CAPACITY_MAX
    }

    /// Behind the ring and the areas of all lines that are or were live.
    fn end_of_areas(&self) -> Result<u64, Error> {
        let mut end = self.total_bytes();
        for entry in self.volume_table.iter() {
            if let Some((_, line)) = Line::load(entry)?.filter(|(_, line)| self.holds(line)) {
                end = end.max(line.offset + line.length);
            }
        }
        Ok(end.next_multiple_of(UNIT_BYTES as u64))
    }

    fn entry(&self, volume: u16) -> Result<&VolumeEntry, Error> {
        let entry = self.volume_table.get(usize::from(volume));
        const { assert!(MAX_VOLUMES == 16, "as the message says") };
        entry.ok_or(Error::Volume { volume, what: "a group has at most 16 volumes on one host, numbered from 0" })
    }

    fn total_bytes(&self) -> u64 {
        self.shared.geometry.total() as u64
    }
}

const _: () = assert!(index(CAPACITY_MAX) == 1 << 50);
