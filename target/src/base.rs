//! A volume's base: the state at the horizon, as a sparse raw file or a block device, with a hash per slot beside it.
//!
//! Files, in the stream's `base` folder: `v<index>.raw` (the volume's bytes, unless a device has them), `v<index>.hashes` (a header, then 32 bytes per
//! slot), `v<index>.intent` (what the write under way will have changed). Byte tables: `docs/formats/base.md`.
//!
//! # Writing
//! Changed slots are collected in memory (at most [`CHUNK_SLOTS`]) and written as one chunk:
//! 1. the intent names the chunk's slots and their new hashes; sync,
//! 2. the slots' bytes; sync,
//! 3. the slots' hashes; sync.
//!
//! After a crash the intent is the last chunk's: each of its slots whose hash is not the new one yet gets it if its bytes have
//! it, keeps the old one if they have that, and is marked unknown otherwise (torn): it holds a mixture of the two by sectors. Readers need not
//! care: whoever moves the base has the newer versions above it still visible, and whoever syncs sends again.
//! A chunk whose write was cut short by an error is settled in the same way, durably, before another intent takes the place of its own: it alone
//! says which slots are torn. A sync that fails stops all writing until the base is opened again.
//!
//! # Damage
//! A slot whose bytes are not those of its hash cannot be changed in part. It is noted as broken instead, which its hash says from then on, and reads
//! as damaged (I10), also if its bytes could be read again, until all of it is written: a compare finds it to differ and sends it.
//!
//! # On a device
//! The volume's bytes begin at the device's first. It was made zero before its first use ([`crate::bases`]), so that a hole is
//! the same on both: a slot without a hash reads as zeroes, and is damaged if it does not. Where a slot's bytes are stored the
//! device cannot tell, so it is the hashes that say what a zeroing need not touch.

mod format;
mod identity;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::error::{Error, IoContext, Kind, Result};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::{Name, SLOT_BYTES, VolumeIndex};
use farshore_uring::{Device, OpenMode, Storage, StorageFile, replace_file};
use format::{
    BROKEN, HASH_BYTES, HASHES_AT, HEADER_BYTES, HOLE, INTENT_HEADER_BYTES, IntentEntry, UNKNOWN, check_header,
    decode_intent, encode_intent, hash_slot, hashes_header, intent_bytes,
};

/// Slots collected in memory before they are written: 16 MiB, so that three syncs are paid by as much data.
pub const CHUNK_SLOTS: usize = 256;

/// Most broken slots that are remembered by name.
const BROKEN_MAX: usize = 64;
#[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
const SLOT: usize = SLOT_BYTES as usize;

/// One volume's base.
///
/// Invariant: a slot's hash in the file is that of its bytes in the file, except for slots in the durable intent.
pub struct Base<S: Storage> {
    volume: VolumeIndex,
    name: Name,
    /// Only grows, under `writer`.
    size: AtomicU64,
    /// Most that it can grow to, where it lies on a device.
    room: Option<u64>,
    data: Arc<S::File>,
    data_path: PathBuf,
    on_device: bool,
    hashes: Arc<S::File>,
    hashes_path: PathBuf,
    intent: Arc<S::File>,
    intent_path: PathBuf,
    /// Changed slots that are not, or not wholly, in the files; `None`: it is broken. Only the holder of `writer` changes it.
    pending: RwLock<BTreeMap<u64, Option<Arc<[u8]>>>>,
    writer: Mutex<Writer>,
}

#[derive(Default)]
struct Writer {
    /// A sync failed: what is durable is unknown.
    poisoned: Option<String>,
    /// What the durable intent names was begun, and did not get to its end.
    unfinished: bool,
    /// Slots that became broken in this life, and how; the first ones only.
    broken: BTreeMap<u64, String>,
}

impl Writer {
    fn note_broken(&mut self, slot: u64, how: &str) {
        if self.broken.len() < BROKEN_MAX {
            self.broken.entry(slot).or_insert_with(|| how.to_owned());
        }
    }
}

/// One piece of damage in a base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseDamage {
    /// Volume.
    pub volume: VolumeIndex,
    /// Bytes of the volume.
    pub range: Range<u64>,
    /// What is wrong.
    pub reason: String,
}

impl<S: Storage> Base<S> {
    /// Opens the base of a volume in `folder`, or makes an empty one. A volume that has grown makes the base grow; one that
    /// shrank keeps it: points of before have the old size.
    ///
    /// # Errors
    /// [`Kind::Damaged`] for a header that cannot be read, or data without its hashes or hashes without their data; otherwise
    /// from the disk.
    pub fn open_or_create(storage: S, folder: PathBuf, decl: &VolumeDecl) -> Result<Self> {
        storage.create_dir_all(&folder).at("create folder", &folder)?;
        let (data_path, hashes_path) = (part(&folder, decl, "raw"), part(&folder, decl, "hashes"));
        let has = |path: &Path| storage.exists(path).at("look for", path);
        let (has_data, has_hashes) = (has(&data_path)?, has(&hashes_path)?);
        if has_hashes && !has_data {
            let why = "is missing, but its hashes are there: restore it, or name the device that holds it \
                       (`farshore base attach`)";
            return Err(Error::damaged(&data_path, 0, why));
        }
        let data = open_or_new(&storage, &data_path)?;
        if !has_data {
            // Its name is durable before that of the hashes: these without it are damage.
            storage.sync_dir(&folder).at("sync folder", &folder)?;
        }
        if !has_hashes && data.next_data(0).at("seek in", &data_path)?.is_some() {
            let why = "is missing, but the volume's data is there; restore both together";
            return Err(Error::damaged(&hashes_path, 0, why));
        }
        let size = grow(&*data, decl.size).at("extend", &data_path)?;
        let base = Self::assemble(&storage, &folder, decl, (data, data_path, false), size)?;
        base.recover(&mut base.lock())?;
        Ok(base)
    }

    /// Opens the base of a volume on a device, or begins one: then the device must be blank.
    ///
    /// # Errors
    /// [`Kind::Refused`] for a device that is too small, that is not blank though no base was begun on it, or that does not hold
    /// what the hashes say; otherwise as [`Self::open_or_create`].
    pub fn open_on_device(
        storage: S,
        folder: PathBuf,
        decl: &VolumeDecl,
        device: Device<S::File>,
        path: &Path,
    ) -> Result<Self> {
        let device_size = device.size;
        let base = Self::assemble_on_device(&storage, &folder, decl, device, path)?;
        // Before anything is written: recovery makes holes where the last intent says.
        base.check_is_ours(device_size)?;
        base.recover(&mut base.lock())?;
        Ok(base)
    }

    fn assemble_on_device(
        storage: &S,
        folder: &Path,
        decl: &VolumeDecl,
        device: Device<S::File>,
        path: &Path,
    ) -> Result<Self> {
        storage.create_dir_all(folder).at("create folder", folder)?;
        if device.size < decl.size {
            let text = format!(
                "device {}: has {} bytes, volume {} has {}: name one of at least that size",
                path.display(),
                device.size,
                decl.name,
                decl.size
            );
            return Err(Error::new(Kind::Refused, text));
        }
        let hashes_path = part(folder, decl, "hashes");
        if !storage.exists(&hashes_path).at("look for", &hashes_path)? {
            crate::bases::check_blank(&device, path)?;
        }
        let base = Self::assemble(storage, folder, decl, (device.file, path.to_owned(), true), decl.size)?;
        Ok(Self { room: Some(device.size), ..base })
    }

    fn assemble(
        storage: &S,
        folder: &Path,
        decl: &VolumeDecl,
        (data, data_path, on_device): (Arc<S::File>, PathBuf, bool),
        size: u64,
    ) -> Result<Self> {
        let (hashes_path, intent_path) = (part(folder, decl, "hashes"), part(folder, decl, "intent"));
        if !storage.exists(&hashes_path).at("look for", &hashes_path)? {
            replace_file(storage, &hashes_path, &hashes_header(decl.index)).at("create", &hashes_path)?;
        }
        let hashes = storage.open(&hashes_path, OpenMode::ReadWrite).at("open", &hashes_path)?;
        check_hashes_header::<S>(&hashes, &hashes_path, decl.index)?;
        let intent = open_or_new(storage, &intent_path)?;
        let slots = size.div_ceil(SLOT_BYTES);
        grow(&*hashes, HASHES_AT + slots * HASH_BYTES as u64).at("extend", &hashes_path)?;
        storage.sync_dir(folder).at("sync folder", folder)?;
        Ok(Self {
            volume: decl.index,
            name: decl.name.clone(),
            size: AtomicU64::new(size),
            room: None,
            data,
            data_path,
            on_device,
            hashes,
            hashes_path,
            intent,
            intent_path,
            pending: RwLock::default(),
            writer: Mutex::default(),
        })
    }

    /// Which volume.
    #[must_use]
    pub fn volume(&self) -> VolumeIndex {
        self.volume
    }

    /// The volume's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// A device holds the volume's bytes.
    #[must_use]
    pub fn is_on_device(&self) -> bool {
        self.on_device
    }

    /// The file or device that holds the volume's bytes; of a file relative to the storage's root.
    #[must_use]
    pub fn data_path(&self) -> &Path {
        &self.data_path
    }

    /// Settles what the last chunk left that did not get to its end.
    fn recover(&self, writer: &mut Writer) -> Result<()> {
        if self.settle_slots()? {
            self.sync_both(writer)?;
            self.finish(writer);
        }
        writer.unfinished = false;
        Ok(())
    }

    /// Gives the slots of the last intent hashes that are true. `true`: bytes and hashes must be made durable, also those that the chunk had written
    /// by itself: its process may have died before its syncs.
    fn settle_slots(&self) -> Result<bool> {
        let Some(entries) = self.read_intent()? else {
            return Ok(false);
        };
        let mut bytes = vec![0; SLOT];
        for entry in entries {
            let (first, count) = (entry.first.get(), entry.count.get());
            if entry.hash == HOLE {
                // Making holes again is always right: the range had been promised to be zero. Of a device nobody knows
                // whether it is, when the hashes are gone already.
                if self.on_device || self.stores_something(first, first + count)? {
                    self.punch(first, count)?;
                }
                continue;
            }
            let stored = self.read_hash(first)?;
            let bytes = &mut bytes[..self.slot_len(first)];
            let read = self.data.read_at(bytes, first * SLOT_BYTES).at("read", &self.data_path);
            let new = match read.map(|()| hash_slot(self.volume, first, bytes)) {
                _ if entry.hash == BROKEN => BROKEN,
                Ok(found) if found == entry.hash => {
                    // A sync may have failed in the life before: then these are in memory, and no sync takes them from there to the disk again.
                    self.data.write_at(bytes, first * SLOT_BYTES).at("write", &self.data_path)?;
                    found
                }
                // Hashes follow their bytes' sync: the chunk was complete here, and other bytes are damage, for readers to find.
                _ if stored == entry.hash => stored,
                Ok(found) if found == stored => continue,
                // What was being written when the power went may be unreadable from then on, until it is written again.
                Err(error) if error.passes() => return Err(error),
                Ok(_) | Err(_) => UNKNOWN,
            };
            self.write_hash(first, &new)?;
        }
        Ok(true)
    }

    /// The chunk of the durable intent is complete: that it need not be settled is written down, and made durable by nobody, for to settle it is only in
    /// vain.
    fn finish(&self, writer: &mut Writer) {
        writer.unfinished = false;
        if let Err(error) = self.intent.write_at(&[0; INTENT_HEADER_BYTES], 0) {
            tracing::warn!(path = %self.intent_path.display(), %error, "cannot void the intent of a complete chunk");
        }
    }

    fn sync_both(&self, writer: &mut Writer) -> Result<()> {
        self.data.sync().at("sync", &self.data_path).inspect_err(|error| poison(writer, error))?;
        self.hashes.sync().at("sync", &self.hashes_path).inspect_err(|error| poison(writer, error))
    }

    /// `None`: never written, or torn before the chunk began.
    fn read_intent(&self) -> Result<Option<Vec<IntentEntry>>> {
        let len = self.intent.len().at("ask for the length of", &self.intent_path)?;
        let most = intent_bytes(CHUNK_SLOTS);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; len];
        self.intent.read_at(&mut bytes, 0).at("read", &self.intent_path)?;
        let Some(entries) = decode_intent(&bytes, self.volume, CHUNK_SLOTS) else {
            return Ok(None);
        };
        let slots = self.size().div_ceil(SLOT_BYTES);
        let inside = |entry: &IntentEntry| {
            entry.first.get().checked_add(entry.count.get()).is_some_and(|end| end <= slots) && entry.count.get() > 0
        };
        if !entries.iter().all(inside) {
            return Err(Error::damaged(&self.intent_path, 0, "names slots beyond the volume's end"));
        }
        Ok(Some(entries))
    }

    /// Step 1 of a chunk.
    fn begin(&self, writer: &mut Writer, entries: &[IntentEntry]) -> Result<()> {
        if writer.unfinished {
            self.recover(writer)?;
        }
        // An intent for which there was no room is torn and so void, and the chunk before is complete: try again.
        self.write_intent(entries).inspect_err(|error| {
            if !error.passes() {
                poison(writer, error);
            }
        })?;
        writer.unfinished = true;
        Ok(())
    }

    fn write_intent(&self, entries: &[IntentEntry]) -> Result<()> {
        let bytes = encode_intent(entries, self.volume);
        self.intent.write_sync_at(&bytes, 0).at("write and sync", &self.intent_path)
    }

    fn slot_len(&self, slot: u64) -> usize {
        let left = self.size().saturating_sub(slot * SLOT_BYTES).min(SLOT_BYTES);
        usize::try_from(left).expect("at most a slot")
    }

    fn hash_at(slot: u64) -> u64 {
        HASHES_AT + slot * HASH_BYTES as u64
    }

    fn read_hash(&self, slot: u64) -> Result<[u8; HASH_BYTES]> {
        let mut hash = HOLE;
        self.hashes.read_at(&mut hash, Self::hash_at(slot)).at("read", &self.hashes_path)?;
        Ok(hash)
    }

    fn write_hash(&self, slot: u64, hash: &[u8; HASH_BYTES]) -> Result<()> {
        self.hashes.write_at(hash, Self::hash_at(slot)).at("write", &self.hashes_path)
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_to_write(&self) -> Result<MutexGuard<'_, Writer>> {
        let writer = self.lock();
        match &writer.poisoned {
            None => Ok(writer),
            Some(reason) => {
                let text = format!(
                    "base of volume {} takes no more writes since a sync failed: {reason}; restart the target",
                    self.name
                );
                Err(Error::new(Kind::Storage, text))
            }
        }
    }

    fn pending_slot(&self, slot: u64) -> Option<Option<Arc<[u8]>>> {
        self.pending.read().unwrap_or_else(PoisonError::into_inner).get(&slot).cloned()
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.size()) {
            return Ok(());
        }
        let text = format!("volume {} has {} bytes; {len} at {offset} reach beyond", self.name, self.size());
        Err(Error::new(Kind::Invalid, text))
    }

    /// Makes it at least `size` bytes long while it is in use; what is new reads as zeroes. A shorter size changes nothing: points of
    /// before have the old one.
    ///
    /// # Durability
    /// Durable when this returns.
    ///
    /// # Errors
    /// [`Kind::Refused`] where it lies on a device that is smaller; otherwise from the disk.
    pub(crate) fn grow(&self, size: u64) -> Result<()> {
        if let Some(room) = self.room.filter(|room| *room < size) {
            let text = format!(
                "device {}: has {room} bytes, volume {} has grown to {size}: enlarge it and restart the target, or name another \
                 one (`farshore base attach`)",
                self.data_path.display(),
                self.name
            );
            return Err(Error::new(Kind::Refused, text));
        }
        let mut writer = self.lock_to_write()?;
        // The last slot may get longer: none of its old length waits.
        self.commit(&mut writer)?;
        if self.size() >= size {
            return Ok(());
        }
        if !self.on_device {
            grow(&*self.data, size).at("extend", &self.data_path)?;
        }
        grow(&*self.hashes, HASHES_AT + size.div_ceil(SLOT_BYTES) * HASH_BYTES as u64)
            .at("extend", &self.hashes_path)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Reads `out.len()` bytes at `offset`, verified against the slots' hashes; what was written but not flushed included.
    ///
    /// # Errors
    /// [`Kind::Damaged`] naming volume and bytes; [`Kind::Invalid`] beyond the end; otherwise from the disk.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.check_range(offset, out.len() as u64)?;
        let mut slot_bytes = Vec::new();
        for (slot, within, piece) in pieces(offset, out.len()) {
            let out = &mut out[piece];
            if out.len() == self.slot_len(slot) {
                self.read_slot(slot, out)?;
                continue;
            }
            slot_bytes.resize(self.slot_len(slot), 0);
            self.read_slot(slot, &mut slot_bytes)?;
            out.copy_from_slice(&slot_bytes[within..within + out.len()]);
        }
        Ok(())
    }

    /// The range will be read soon; a hint.
    pub(crate) fn will_need(&self, range: Range<u64>) {
        let end = range.end.min(self.size());
        if range.start < end {
            self.data.will_need(range.start, end - range.start);
        }
    }

    /// Reads one whole slot, verified.
    fn read_slot(&self, slot: u64, out: &mut [u8]) -> Result<()> {
        match self.try_slot(slot, out) {
            // Perhaps a chunk was written between the two reads: look again while nobody writes.
            Err(error) if error.kind() == Kind::Damaged => {
                let _writer = self.lock();
                self.try_slot(slot, out)
            }
            done => done,
        }
    }

    /// One attempt; a write at the same time looks like damage.
    fn try_slot(&self, slot: u64, out: &mut [u8]) -> Result<()> {
        let start = slot * SLOT_BYTES;
        match self.pending_slot(slot) {
            Some(Some(bytes)) => {
                out.copy_from_slice(&bytes);
                return Ok(());
            }
            Some(None) => return Err(self.damaged_slot(start, out.len(), "it was damaged and changed in part")),
            None => {}
        }
        let hash = self.read_hash(slot)?;
        if hash == HOLE {
            let next = self.data.next_data(start).at("seek in", &self.data_path)?;
            if next.is_none_or(|next| next >= start + out.len() as u64) {
                out.fill(0);
                return Ok(());
            }
        }
        self.data.read_at(out, start).at("read", &self.data_path)?;
        if hash == UNKNOWN || hash_slot(self.volume, slot, out) == hash {
            return Ok(());
        }
        let what = match hash {
            HOLE => "there are bytes where a hole should be",
            BROKEN => "it was damaged and changed in part",
            _ => "its hash is another",
        };
        Err(self.damaged_slot(start, out.len(), what))
    }

    fn damaged_slot(&self, start: u64, len: usize, what: &str) -> Error {
        let end = start + len as u64;
        let text = format!("volume {} bytes {start}..{end}: {}: {what}", self.name, self.data_path.display());
        Error::new(Kind::Damaged, text)
    }

    /// Writes bytes of a volume that no point includes yet: initial sync.
    ///
    /// # Durability
    /// After [`Self::flush`].
    ///
    /// # Errors
    /// [`Kind::NoSpace`] (try again later), otherwise from the disk. A slot that is changed in part and was damaged is no error: see
    /// [`Self::broken`].
    pub fn write_unjoined(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write(offset, bytes)
    }

    /// Makes a range of such a volume zero; whole slots become holes.
    ///
    /// # Durability
    /// After [`Self::flush`].
    ///
    /// # Errors
    /// As [`Self::write_unjoined`].
    pub fn zero_unjoined(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(offset, len)
    }

    /// Writes bytes; see [`Self::write_unjoined`]. Moving the horizon uses it too.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_range(offset, bytes.len() as u64)?;
        let mut writer = self.lock_to_write()?;
        for (slot, within, piece) in pieces(offset, bytes.len()) {
            let bytes = &bytes[piece];
            let new: Option<Arc<[u8]>> = if bytes.len() == self.slot_len(slot) {
                Some(bytes.into())
            } else {
                let mut whole = vec![0; self.slot_len(slot)];
                match self.try_slot(slot, &mut whole) {
                    Ok(()) => {
                        whole[within..within + bytes.len()].copy_from_slice(bytes);
                        Some(whole.into())
                    }
                    Err(error) if error.kind() == Kind::Damaged => {
                        writer.note_broken(slot, error.context());
                        None
                    }
                    Err(error) => return Err(error),
                }
            };
            self.put(&mut writer, slot, new)?;
        }
        Ok(())
    }

    fn put(&self, writer: &mut Writer, slot: u64, bytes: Option<Arc<[u8]>>) -> Result<()> {
        let (full, known) = {
            let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
            (pending.len() >= CHUNK_SLOTS, pending.contains_key(&slot))
        };
        if full && !known {
            self.commit(writer)?;
        }
        self.pending.write().unwrap_or_else(PoisonError::into_inner).insert(slot, bytes);
        Ok(())
    }

    /// Makes a range zero; see [`Self::zero_unjoined`].
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let end = offset + len;
        // Whole slots, the volume's last short one included.
        let first = offset.div_ceil(SLOT_BYTES);
        let last = if end == self.size() { end.div_ceil(SLOT_BYTES) } else { end / SLOT_BYTES };
        if first >= last {
            return self.write(offset, &vec![0; usize::try_from(len).expect("less than two slots")]);
        }
        let head = first * SLOT_BYTES - offset;
        self.write(offset, &vec![0; usize::try_from(head).expect("less than a slot")])?;
        let tail = end.saturating_sub(last * SLOT_BYTES);
        self.write(end - tail, &vec![0; usize::try_from(tail).expect("less than a slot")])?;
        let mut writer = self.lock_to_write()?;
        let waits = self.pending.read().unwrap_or_else(PoisonError::into_inner).range(first..last).next().is_some();
        // A sparse volume's initial sync brings one range of zeroes after the other: what is zero already costs no sync, and what waits
        // beside it goes on waiting.
        if !waits && !self.stores_something(first, last)? {
            return Ok(());
        }
        // What waits for the range's slots is older; and one intent holds one chunk.
        self.commit(&mut writer)?;
        let entry = IntentEntry { first: first.into(), count: (last - first).into(), hash: HOLE };
        self.begin(&mut writer, &[entry])?;
        self.punch(first, last - first)?;
        self.sync_both(&mut writer)?;
        self.finish(&mut writer);
        writer.broken.retain(|slot, _| !(first..last).contains(slot));
        Ok(())
    }

    fn stores_something(&self, first: u64, last: u64) -> Result<bool> {
        if self.on_device {
            return Ok(self.next_hashed(first, Some(last * SLOT_BYTES))?.is_some());
        }
        let data = self.data.next_data(first * SLOT_BYTES).at("seek in", &self.data_path)?;
        let hashes = self.hashes.next_data(Self::hash_at(first)).at("seek in", &self.hashes_path)?;
        Ok(data.is_some_and(|at| at < last * SLOT_BYTES) || hashes.is_some_and(|at| at < Self::hash_at(last)))
    }

    /// Makes holes of slots, bytes and hashes.
    fn punch(&self, first: u64, count: u64) -> Result<()> {
        let end = ((first + count) * SLOT_BYTES).min(self.size());
        self.data.punch_hole(first * SLOT_BYTES, end - first * SLOT_BYTES).at("punch a hole into", &self.data_path)?;
        let len = count * HASH_BYTES as u64;
        self.hashes.punch_hole(Self::hash_at(first), len).at("punch a hole into", &self.hashes_path)
    }

    /// Makes everything written durable, data and hashes.
    ///
    /// # Errors
    /// As [`Self::write_unjoined`].
    pub fn flush(&self) -> Result<()> {
        let mut writer = self.lock_to_write()?;
        self.commit(&mut writer)
    }

    /// Slots that became broken since it was opened and were not written whole since: how the first one was damaged; more than
    /// 64 are not told from that many.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        let writer = self.lock();
        let (_, first) = writer.broken.first_key_value()?;
        let more = writer.broken.len() - 1;
        Some(if more == 0 { first.clone() } else { format!("{first}; and {more} more slots") })
    }

    /// Writes the pending slots as one chunk.
    fn commit(&self, writer: &mut Writer) -> Result<()> {
        let slots: Vec<(u64, Option<Arc<[u8]>>)> = {
            let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
            pending.iter().map(|(&slot, bytes)| (slot, bytes.clone())).collect()
        };
        if slots.is_empty() {
            return Ok(());
        }
        let entry = |(slot, bytes): &(u64, Option<Arc<[u8]>>)| IntentEntry {
            first: (*slot).into(),
            count: 1.into(),
            hash: bytes.as_ref().map_or(BROKEN, |bytes| hash_slot(self.volume, *slot, bytes)),
        };
        let entries: Vec<IntentEntry> = slots.iter().map(entry).collect();
        self.begin(writer, &entries)?;
        for ((slot, bytes), entry) in slots.iter().zip(&entries) {
            let Some(bytes) = bytes else { continue };
            let (start, len) = (slot * SLOT_BYTES, bytes.len() as u64);
            if entry.hash == HOLE {
                self.data.punch_hole(start, len).at("punch a hole into", &self.data_path)?;
            } else {
                self.data.write_at(bytes, start).at("write", &self.data_path)?;
            }
        }
        self.data.sync().at("sync", &self.data_path).inspect_err(|error| poison(writer, error))?;
        let mut at = 0;
        while at < entries.len() {
            // Neighbours' hashes in one write.
            let first = entries[at].first.get();
            let run = entries[at..].iter().zip(first..).take_while(|(entry, slot)| entry.first.get() == *slot).count();
            let bytes: Vec<u8> = entries[at..at + run].iter().flat_map(|entry| entry.hash).collect();
            self.hashes.write_at(&bytes, Self::hash_at(first)).at("write", &self.hashes_path)?;
            at += run;
        }
        self.hashes.sync().at("sync", &self.hashes_path).inspect_err(|error| poison(writer, error))?;
        self.finish(writer);
        slots.iter().filter(|(_, bytes)| bytes.is_some()).for_each(|(slot, _)| _ = writer.broken.remove(slot));
        self.pending.write().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Start of the first bytes at or after `offset` that may be other than zero; `None`: only zeroes follow.
    ///
    /// # Errors
    /// From the disk.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>> {
        let slot = offset / SLOT_BYTES;
        let pending = {
            let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner);
            pending.range(slot..).next().map(|(&slot, _)| (slot * SLOT_BYTES).max(offset))
        };
        let stored =
            if offset < self.size() { self.data.next_data(offset).at("seek in", &self.data_path)? } else { None };
        // A slot whose bytes were lost by the file system must be read to be noticed.
        let hashed = self.hashes.next_data(Self::hash_at(slot)).at("seek in", &self.hashes_path)?;
        let hashed = match hashed {
            // Only where data and hashes disagree is the hash of interest; a page of hashes covers 8 MiB.
            Some(at) if stored.is_none_or(|stored| Self::hash_at(stored / SLOT_BYTES) > at) => {
                self.next_hashed((at - HASHES_AT.min(at)) / HASH_BYTES as u64, stored)?
            }
            _ => None,
        };
        let hashed = hashed.map(|slot| (slot * SLOT_BYTES).max(offset));
        Ok([pending, stored, hashed].into_iter().flatten().min())
    }

    /// The first slot from `slot` on, before the one of `stored`, that has a hash.
    fn next_hashed(&self, mut slot: u64, stored: Option<u64>) -> Result<Option<u64>> {
        const AT_ONCE: usize = 128;
        let end = stored.unwrap_or(self.size()).div_ceil(SLOT_BYTES).min(self.size().div_ceil(SLOT_BYTES));
        let mut bytes = vec![0; AT_ONCE * HASH_BYTES];
        while slot < end {
            let count = usize::try_from(end - slot).unwrap_or(AT_ONCE).min(AT_ONCE);
            let bytes = &mut bytes[..count * HASH_BYTES];
            self.hashes.read_at(bytes, Self::hash_at(slot)).at("read", &self.hashes_path)?;
            if let Some(found) = bytes.chunks_exact(HASH_BYTES).position(|hash| hash != HOLE) {
                return Ok(Some(slot + found as u64));
            }
            slot += count as u64;
            let next = self.hashes.next_data(Self::hash_at(slot)).at("seek in", &self.hashes_path)?;
            let Some(next) = next else { return Ok(None) };
            slot = slot.max((next - HASHES_AT.min(next)) / HASH_BYTES as u64);
        }
        Ok(None)
    }

    /// Whether all of it is zero.
    ///
    /// # Errors
    /// From the disk.
    pub fn holds_nothing(&self) -> Result<bool> {
        if self.on_device {
            // It was made zero, and nothing was written to it since.
            let pending = self.pending.read().unwrap_or_else(PoisonError::into_inner).is_empty();
            return Ok(pending && self.next_hashed(0, None)?.is_none());
        }
        Ok(self.next_data(0)?.is_none())
    }

    /// Reads everything that is stored and checks it; all damage found, and slots that a crash left unknown.
    ///
    /// # Errors
    /// From the disk, other than for damage.
    pub fn verify(&self) -> Result<Vec<BaseDamage>> {
        let mut found = Vec::new();
        if let Err(error) = check_hashes_header::<S>(&self.hashes, &self.hashes_path, self.volume) {
            found.push(BaseDamage { volume: self.volume, range: 0..self.size(), reason: error.context().to_owned() });
        }
        let (mut at, mut bytes) = (0, vec![0; SLOT]);
        while let Some(next) = self.next_data(at)? {
            let slot = next / SLOT_BYTES;
            let bytes = &mut bytes[..self.slot_len(slot)];
            let range = slot * SLOT_BYTES..slot * SLOT_BYTES + bytes.len() as u64;
            let mut report =
                |reason: String| found.push(BaseDamage { volume: self.volume, range: range.clone(), reason });
            match self.read_slot(slot, bytes) {
                Ok(()) if self.pending_slot(slot).is_none() && self.read_hash(slot)? == UNKNOWN => {
                    report("a crash tore the slot; the next move of the base writes it again".to_owned());
                }
                Ok(()) => {}
                Err(error) => report(error.context().to_owned()),
            }
            at = (slot + 1) * SLOT_BYTES;
            if at >= self.size() {
                break;
            }
        }
        Ok(found)
    }
}

/// One of a base's files.
fn part(folder: &Path, decl: &VolumeDecl, end: &str) -> PathBuf {
    folder.join(format!("v{}.{end}", decl.index))
}

fn poison(writer: &mut Writer, error: &Error) {
    writer.poisoned = Some(error.context().to_owned());
}

/// The slots of a range: (slot, first byte within it, the range's bytes).
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= len {
            return None;
        }
        let position = offset + at as u64;
        let within = usize::try_from(position % SLOT_BYTES).expect("less than a slot");
        let piece = at..(at + SLOT - within).min(len);
        at = piece.end;
        Some((position / SLOT_BYTES, within, piece))
    })
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| *word == [0; 16]) && rest.iter().all(|&byte| byte == 0)
}

fn check_hashes_header<S: Storage>(file: &Arc<S::File>, path: &Path, volume: VolumeIndex) -> Result<()> {
    let mut bytes = vec![0; HEADER_BYTES];
    file.read_at(&mut bytes, 0).at("read", path)?;
    match check_header(&bytes, volume) {
        Ok(()) => Ok(()),
        Err(Some(version)) => Err(Error::new(Kind::Foreign, format!("{} is of version {version}", path.display()))),
        Err(None) => Err(Error::damaged(path, 0, format!("is not the header of the hashes of volume {volume}"))),
    }
}

fn open_or_new<S: Storage>(storage: &S, path: &Path) -> Result<Arc<S::File>> {
    match storage.open(path, OpenMode::ReadWrite) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            storage.open(path, OpenMode::CreateNew).at("create", path)
        }
        opened => opened.at("open", path),
    }
}

/// Makes a file at least `len` bytes long, durably; gives its length.
fn grow<F: StorageFile>(file: &F, len: u64) -> std::io::Result<u64> {
    let present = file.len()?;
    if present >= len {
        return Ok(present);
    }
    file.set_len(len)?;
    file.sync()?;
    Ok(len)
}

#[cfg(test)]
mod tests;
