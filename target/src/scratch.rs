//! What was written to a view: a sparse file, and a durable map of the blocks that are in it.
//!
//! Files, in the view's folder: `data` (the view's bytes) and `map` (a header, then one bit per logical block in sectors with
//! their own checksum). Byte tables: `docs/formats/scratch.md`.
//!
//! # Crash safety
//! A write goes to `data`, then its bits are set in memory. A flush: 1. copies the changed sectors of the map, 2. syncs
//! `data`, 3. writes the copies to `map`, 4. syncs `map`. So a block whose bit is durable has its data; a block whose bit is
//! not reads as the point below, as if the write, which nobody flushed, had not been. Bits are only ever set, and a sector of
//! the map is written whole. A sync that fails stops all writing and flushing until the view is opened again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use farshore_proto::{PointId, SECTOR_BYTES, VolumeIndex};
use farshore_uring::{OpenMode, Storage, StorageFile, replace_file};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, IoContext, Kind, Result};

/// Bits in one sector of the map.
const SECTOR_BITS: u64 = 4032;
const BITMAP_BYTES: usize = 504;
#[expect(clippy::cast_possible_truncation, reason = "512")]
const SECTOR: usize = SECTOR_BYTES as usize;
/// Where the map's sectors begin.
const HEADER_BYTES: usize = 4096;
const MAP_AT: u64 = HEADER_BYTES as u64;
/// Unchanged sectors of the map kept in memory: 16 MiB, enough for 126 GiB written in 4 KiB blocks; beyond it they are read
/// again when needed.
const CLEAN_SECTORS_MAX: usize = 32_768;
/// Changed sectors of the map that make a write flush first: 4 MiB.
const DIRTY_SECTORS_MAX: usize = 8192;

/// What a scratch belongs to; fixed when it is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScratchOf {
    /// The point below.
    pub point: PointId,
    /// Volume.
    pub volume: VolumeIndex,
    /// Bytes.
    pub size: u64,
    /// Bytes of a logical block: 512 or 4096.
    pub block: u32,
}

/// How much disk a scratch may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// Bytes that its data may take; `None`: as many as the volume has.
    pub limit: Option<u64>,
    /// Free bytes of the disk that it leaves to others.
    pub reserve: u64,
}

/// Free bytes that views leave to the rest of the target unless told otherwise: ingest stops 32 MiB before the disk is full, so
/// this is what a group can still take in while a forgotten view has eaten all it can.
pub const RESERVE_BYTES: u64 = 1 << 30;

/// Writes over a point. Shared by all queues of a view.
pub struct Scratch<S: Storage> {
    of: ScratchOf,
    storage: S,
    space: Space,
    data: Arc<S::File>,
    data_path: PathBuf,
    map_file: Arc<S::File>,
    map_path: PathBuf,
    map: RwLock<Map>,
    /// Held through a flush.
    flushing: Mutex<()>,
    /// Why no more is written: a sync failed, what is durable is unknown.
    failed: OnceLock<String>,
}

/// The part of the map in memory.
#[derive(Default)]
struct Map {
    clean: BTreeMap<u64, Box<Bits>>,
    dirty: BTreeMap<u64, Box<Bits>>,
}

type Bits = [u64; BITMAP_BYTES / 8];

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MapHeader {
    magic: [u8; 8],
    version: U16,
    volume: U16,
    block: U32,
    size: U64,
    generation: U32,
    reserved: U32,
    incarnation: U64,
    batch: U64,
    reserved_too: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<MapHeader>() == 64);
const MAGIC: [u8; 8] = *b"FSSCRMP1";
const VERSION: u16 = 1;

/// A run of blocks that are all in the scratch, or all not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// In the scratch.
    pub present: bool,
}

impl<S: Storage> Scratch<S> {
    /// Opens the scratch in `folder`, or makes an empty one.
    ///
    /// # Durability
    /// The empty one is durable when this returns.
    ///
    /// # Errors
    /// [`Kind::Refused`] when the folder holds the scratch of another point or volume; [`Kind::Damaged`]; otherwise from the
    /// disk.
    pub fn open_or_create(storage: &S, folder: &Path, of: ScratchOf, space: Space) -> Result<Self> {
        if !matches!(of.block, 512 | 4096) || !of.size.is_multiple_of(u64::from(of.block)) {
            return Err(Error::new(Kind::Invalid, format!("scratch of {} bytes in blocks of {}", of.size, of.block)));
        }
        storage.create_dir_all(folder).at("create folder", folder)?;
        let (data_path, map_path) = (folder.join("data"), folder.join("map"));
        if !storage.exists(&map_path).at("look for", &map_path)? {
            // The map last: without it there is no scratch, and data that lies there is an interrupted making's or removal's.
            // The data's length needs no sync here: where it was lost it is set again below, and until a flush has synced both
            // no block is said to be there.
            if storage.exists(&data_path).at("look for", &data_path)? {
                storage.remove(&data_path).at("remove", &data_path)?;
            }
            storage.open(&data_path, OpenMode::CreateNew).at("create", &data_path)?;
            storage.sync_dir(folder).at("sync folder", folder)?;
            let mut bytes = header(&of).as_bytes().to_vec();
            bytes.resize(HEADER_BYTES, 0);
            replace_file(storage, &map_path, &bytes).at("create", &map_path)?;
        }
        let data = storage.open(&data_path, OpenMode::ReadWrite).at("open", &data_path)?;
        let map_file = storage.open(&map_path, OpenMode::ReadWrite).at("open", &map_path)?;
        check_header::<S>(&map_file, &map_path, &of)?;
        let data_len = data.len().at("ask for the length of", &data_path)?;
        if data_len < of.size {
            if map_file.next_data(MAP_AT).at("seek in", &map_path)?.is_some() {
                return Err(Error::damaged(&data_path, data_len, "ends here, and the map says that more was written"));
            }
            data.set_len(of.size).at("extend", &data_path)?;
        }
        let sectors = (of.size / u64::from(of.block)).div_ceil(SECTOR_BITS);
        let len = MAP_AT + sectors * SECTOR_BYTES;
        if map_file.len().at("ask for the length of", &map_path)? < len {
            map_file.set_len(len).at("extend", &map_path)?;
        }
        Ok(Self {
            of,
            storage: storage.clone(),
            space,
            data,
            data_path,
            map_file,
            map_path,
            map: RwLock::default(),
            flushing: Mutex::default(),
            failed: OnceLock::new(),
        })
    }

    /// What it belongs to.
    #[must_use]
    pub fn of(&self) -> &ScratchOf {
        &self.of
    }

    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        let block = u64::from(self.of.block);
        debug_assert!(offset.is_multiple_of(block) && len.is_multiple_of(block), "requests come in whole blocks");
        offset / block..(offset + len).div_ceil(block)
    }

    /// The pieces of a range, in order.
    ///
    /// # Errors
    /// [`Kind::Damaged`] naming the bytes of the view that the map's damage touches; otherwise from the disk.
    pub fn pieces(&self, offset: u64, len: u64) -> Result<Vec<Piece>> {
        let block = u64::from(self.of.block);
        let range = self.blocks(offset, len);
        let mut found: Vec<Piece> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (sector, first) = (at / SECTOR_BITS, at % SECTOR_BITS);
            let end = range.end.min((sector + 1) * SECTOR_BITS);
            let bits = self.bits(sector)?;
            // Over a huge untouched range in one step.
            let end = match &bits {
                Some(_) => end,
                None => self.next_sector(sector)?.map_or(range.end, |next| (next * SECTOR_BITS).clamp(end, range.end)),
            };
            let mut bit = first;
            let last = first + (end - at);
            while bit < last {
                let present = bits.as_deref().is_some_and(|bits| test(bits, bit));
                let stop = bits.as_deref().map_or(last, |bits| next_other(bits, bit, last, present));
                let piece = Piece { offset: (sector * SECTOR_BITS + bit) * block, len: (stop - bit) * block, present };
                match found.last_mut() {
                    Some(before) if before.present == present => before.len += piece.len,
                    _ => found.push(piece),
                }
                bit = stop;
            }
            at = end;
        }
        Ok(found)
    }

    /// A sector of the map; `None`: no bit is set.
    fn bits(&self, sector: u64) -> Result<Option<Box<Bits>>> {
        {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(bits) = map.dirty.get(&sector).or_else(|| map.clean.get(&sector)) {
                return Ok(Some(bits.clone()));
            }
        }
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        Ok(self.load(&mut map, sector)?.map(|bits| Box::new(*bits)))
    }

    /// The first sector of the map after `sector` that may have bits set.
    fn next_sector(&self, sector: u64) -> Result<Option<u64>> {
        let from = sector + 1;
        let known = {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            [&map.dirty, &map.clean].map(|known| known.range(from..).next().map(|(&sector, _)| sector))
        };
        let stored = self.map_file.next_data(MAP_AT + from * SECTOR_BYTES).at("seek in", &self.map_path)?;
        let stored = stored.map(|at| (at - MAP_AT.min(at)) / SECTOR_BYTES);
        Ok([known[0], known[1], stored].into_iter().flatten().min())
    }

    /// Loads a sector that is perhaps not in memory.
    fn load<'m>(&self, map: &'m mut Map, sector: u64) -> Result<Option<&'m Bits>> {
        if !map.dirty.contains_key(&sector) && !map.clean.contains_key(&sector) {
            let at = MAP_AT + sector * SECTOR_BYTES;
            let next = self.map_file.next_data(at).at("seek in", &self.map_path)?;
            if next.is_none_or(|next| next >= at + SECTOR_BYTES) {
                return Ok(None);
            }
            let mut bytes = [0; SECTOR];
            self.map_file.read_at(&mut bytes, at).at("read", &self.map_path)?;
            let bits = decode_sector(&bytes, sector).map_err(|reason| {
                let start = sector * SECTOR_BITS * u64::from(self.of.block);
                let end = (start + SECTOR_BITS * u64::from(self.of.block)).min(self.of.size);
                let volume = self.of.volume;
                let path = self.map_path.display();
                Error::new(
                    Kind::Damaged,
                    format!("view of volume {volume} bytes {start}..{end}: {path} at byte {at}: {reason}"),
                )
            })?;
            let Some(bits) = bits else { return Ok(None) };
            if map.clean.len() >= CLEAN_SECTORS_MAX {
                map.clean.clear();
            }
            map.clean.insert(sector, bits);
        }
        Ok(map.dirty.get(&sector).or_else(|| map.clean.get(&sector)).map(|bits| &**bits))
    }

    /// Sets the bits of a range.
    fn mark(&self, offset: u64, len: u64) -> Result<()> {
        let range = self.blocks(offset, len);
        let mut at = range.start;
        while at < range.end {
            let (sector, first) = (at / SECTOR_BITS, at % SECTOR_BITS);
            let end = range.end.min((sector + 1) * SECTOR_BITS);
            let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
            self.load(&mut map, sector)?;
            let is_set = |bits: &Bits| next_other(bits, first, first + (end - at), true) == first + (end - at);
            let present = map.dirty.get(&sector).or_else(|| map.clean.get(&sector));
            if !present.is_some_and(|bits| test(bits, first) && is_set(bits)) {
                let clean = map.clean.remove(&sector);
                let bits =
                    map.dirty.entry(sector).or_insert_with(|| clean.unwrap_or_else(|| Box::new([0; BITMAP_BYTES / 8])));
                (first..first + (end - at)).for_each(|bit| bits[word(bit)] |= 1 << (bit % 64));
            }
            at = end;
        }
        Ok(())
    }

    /// Reads bytes that are present.
    ///
    /// # Errors
    /// From the disk.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.data.read_at(out, offset).at("read", &self.data_path)
    }

    /// Writes whole blocks.
    ///
    /// # Durability
    /// After [`Self::flush`].
    ///
    /// # Errors
    /// [`Kind::NoSpace`], also where the disk has some but the view's limit or the reserve is reached: then nothing changed.
    /// Otherwise from the disk; the range then holds old and new bytes.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_space(bytes.len() as u64)?;
        self.make_room()?;
        self.data.write_at(bytes, offset).at("write", &self.data_path)?;
        self.mark(offset, bytes.len() as u64)
    }

    /// Makes whole blocks zero.
    ///
    /// # Durability
    /// After [`Self::flush`].
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.make_room()?;
        self.data.punch_hole(offset, len).at("punch a hole into", &self.data_path)?;
        self.mark(offset, len)
    }

    /// Room for `len` more bytes. Writes at the same time do not see each other: what they may exceed the bounds by is a request
    /// of each worker.
    fn check_space(&self, len: u64) -> Result<()> {
        let full = |why: String| Err(Error::new(Kind::NoSpace, format!("view of volume {}: {why}", self.of.volume)));
        if let Some(limit) = self.space.limit {
            let taken = self.data.allocated().at("ask for the size of", &self.data_path)?;
            if taken.saturating_add(len) > limit {
                return full(format!(
                    "{taken} bytes were written to it, {limit} are its limit; close it, or raise view_limit"
                ));
            }
        }
        let free = self.storage.free_bytes().at("ask for the free space of", Path::new("the data folder"))?;
        let reserve = self.space.reserve;
        if free < reserve.saturating_add(len) {
            return full(format!(
                "{free} bytes are free on the target's disk, {reserve} are kept from views; close views, or make room"
            ));
        }
        Ok(())
    }

    /// Keeps the changed part of the map small.
    fn make_room(&self) -> Result<()> {
        if self.map.read().unwrap_or_else(PoisonError::into_inner).dirty.len() >= DIRTY_SECTORS_MAX {
            self.flush()?;
        }
        self.check_failed()
    }

    fn check_failed(&self) -> Result<()> {
        match self.failed.get() {
            None => Ok(()),
            Some(reason) => {
                let text = format!(
                    "view takes no more writes since a sync of its scratch failed: {reason}; close and open it"
                );
                Err(Error::new(Kind::Storage, text))
            }
        }
    }

    /// Makes everything written before the call durable.
    ///
    /// # Errors
    /// From the disk; writes since the last flush may be lost then.
    pub fn flush(&self) -> Result<()> {
        let _one = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_failed()?;
        let fail = |error: &Error| {
            // The first reason stays.
            let _ = self.failed.set(error.context().to_owned());
        };
        let dirty: Vec<(u64, Box<Bits>)> = {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            map.dirty.iter().map(|(&sector, bits)| (sector, bits.clone())).collect()
        };
        self.data.sync().at("sync", &self.data_path).inspect_err(fail)?;
        if dirty.is_empty() {
            return Ok(());
        }
        for (sector, bits) in &dirty {
            let bytes = encode_sector(bits, *sector);
            self.map_file.write_at(&bytes, MAP_AT + sector * SECTOR_BYTES).at("write", &self.map_path)?;
        }
        self.map_file.sync().at("sync", &self.map_path).inspect_err(fail)?;
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if map.clean.len() + dirty.len() > CLEAN_SECTORS_MAX {
            map.clean.clear();
        }
        for (sector, bits) in dirty {
            // A sector that was changed meanwhile stays.
            if map.dirty.get(&sector) == Some(&bits) {
                map.dirty.remove(&sector);
                map.clean.insert(sector, bits);
            }
        }
        Ok(())
    }

    /// Whether a present range is a hole in the data file, and so zero: its end, or the start of the next data.
    pub(crate) fn data_extent(&self, offset: u64, end: u64) -> Result<(bool, u64)> {
        let block = u64::from(self.of.block);
        let next = self.data.next_data(offset).at("seek in", &self.data_path)?.map(|at| at / block * block);
        if next.is_none_or(|next| next > offset) {
            return Ok((true, next.unwrap_or(end).min(end)));
        }
        let hole = self.data.next_hole(offset).at("seek in", &self.data_path)?;
        Ok((false, hole.next_multiple_of(block).clamp(offset + block, end)))
    }

    /// Removes a scratch and all that was written to it; one that is not there is gone already.
    ///
    /// # Errors
    /// From the disk.
    pub fn remove(storage: &S, folder: &Path) -> Result<()> {
        if !storage.exists(folder).at("look for", folder)? {
            return Ok(());
        }
        // The map first, durably: what has none is no scratch, and whatever comes back of the rest is not taken for one.
        let map_path = folder.join("map");
        if storage.exists(&map_path).at("look for", &map_path)? {
            storage.remove(&map_path).at("remove", &map_path)?;
            storage.sync_dir(folder).at("sync folder", folder)?;
        }
        for name in ["data", "map.new"] {
            let path = folder.join(name);
            if storage.exists(&path).at("look for", &path)? {
                storage.remove(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }
}

fn header(of: &ScratchOf) -> MapHeader {
    let mut header = MapHeader {
        magic: MAGIC,
        version: VERSION.into(),
        volume: of.volume.0.into(),
        block: of.block.into(),
        size: of.size.into(),
        generation: of.point.generation.0.into(),
        reserved: 0.into(),
        incarnation: of.point.incarnation.0.into(),
        batch: of.point.batch.0.into(),
        reserved_too: [0; 12],
        crc: 0.into(),
    };
    header.crc = crc_fast::crc32_iscsi(&header.as_bytes()[..60]).into();
    header
}

fn check_header<S: Storage>(file: &Arc<S::File>, path: &Path, of: &ScratchOf) -> Result<()> {
    let mut bytes = [0; 64];
    file.read_at(&mut bytes, 0).at("read", path)?;
    let found = MapHeader::read_from_bytes(&bytes).map_err(|_| Error::damaged(path, 0, "header is cut off"))?;
    if found.magic != MAGIC || crc_fast::crc32_iscsi(&bytes[..60]) != found.crc.get() {
        return Err(Error::damaged(path, 0, "header of the scratch's map is damaged"));
    }
    if found.version.get() != VERSION {
        return Err(Error::new(Kind::Foreign, format!("{} is of version {}", path.display(), found.version)));
    }
    if bytes != header(of).as_bytes() {
        let (volume, batch) = (found.volume, found.batch);
        let text = format!(
            "{} holds writes over volume {volume} at batch {batch} in blocks of {}, not over volume {} at batch {}; remove that view, or use another name",
            path.display(),
            found.block,
            of.volume,
            of.point.batch
        );
        return Err(Error::new(Kind::Refused, text));
    }
    Ok(())
}

fn word(bit: u64) -> usize {
    usize::try_from(bit / 64).expect("bits of one sector")
}

fn test(bits: &Bits, bit: u64) -> bool {
    bits[word(bit)] >> (bit % 64) & 1 == 1
}

/// The first bit from `from` on, before `end`, that is not `value`; `end` if there is none.
fn next_other(bits: &Bits, from: u64, end: u64, value: bool) -> u64 {
    let mut bit = from;
    while bit < end {
        let word = if value { !bits[word(bit)] } else { bits[word(bit)] } >> (bit % 64);
        if word != 0 {
            return (bit + u64::from(word.trailing_zeros())).min(end);
        }
        bit = (bit / 64 + 1) * 64;
    }
    end
}

fn encode_sector(bits: &Bits, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (word, out) in bits.iter().zip(bytes.as_chunks_mut::<8>().0) {
        *out = word.to_le_bytes();
    }
    #[expect(clippy::cast_possible_truncation, reason = "enough of the number to see a misplaced sector")]
    bytes[BITMAP_BYTES..BITMAP_BYTES + 4].copy_from_slice(&(sector as u32).to_le_bytes());
    let crc = crc_fast::crc32_iscsi(&bytes[..SECTOR - 4]);
    bytes[SECTOR - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// `None`: never written.
fn decode_sector(bytes: &[u8; SECTOR], sector: u64) -> Result<Option<Box<Bits>>, &'static str> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    if crc_fast::crc32_iscsi(&bytes[..SECTOR - 4]).to_le_bytes() != bytes[SECTOR - 4..] {
        return Err("checksum of the map's sector is wrong");
    }
    #[expect(clippy::cast_possible_truncation, reason = "as it was written")]
    if (sector as u32).to_le_bytes() != bytes[BITMAP_BYTES..BITMAP_BYTES + 4] {
        return Err("sector of the map lies in the wrong place");
    }
    let mut bits = Box::new([0; BITMAP_BYTES / 8]);
    for (word, bytes) in bits.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    Ok(Some(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_of_the_map_are_checked() {
        let mut bits: Bits = [0; BITMAP_BYTES / 8];
        bits[3] = 0b1011;
        let bytes = encode_sector(&bits, 77);
        assert_eq!(decode_sector(&bytes, 77), Ok(Some(Box::new(bits))));
        assert!(decode_sector(&bytes, 78).is_err());
        assert_eq!(decode_sector(&[0; SECTOR], 5), Ok(None));
        for bit in 0..SECTOR * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_sector(&bad, 77).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn runs_of_bits() {
        let mut bits: Bits = [0; BITMAP_BYTES / 8];
        (60..200u64).for_each(|bit| bits[word(bit)] |= 1 << (bit % 64));
        assert_eq!(next_other(&bits, 0, 4032, false), 60);
        assert_eq!(next_other(&bits, 60, 4032, true), 200);
        assert_eq!(next_other(&bits, 60, 100, true), 100);
        assert_eq!(next_other(&bits, 200, 4032, false), 4032);
    }
}
