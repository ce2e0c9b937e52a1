//! Whether files and device are those of the base, by what is in them.

use std::collections::BTreeSet;
use std::path::Path;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{SLOT_BYTES, VolumeIndex};
use farshore_uring::{Device, Storage, StorageFile};

use super::format::{HASH_BYTES, HOLE, IntentEntry, hash_slot, is_without};
use super::{Base, SLOT, part};
use crate::bases::check_blank_beside;
use crate::error::{Error, IoContext, Kind, Result};

/// Slots compared when a device is opened: 4 MiB, less than a second of a slow disk.
const SAMPLES: usize = 64;

/// Whether the slot's bytes may be other than its stored hash says, because they were being changed at a crash. A range that
/// becomes a hole may have lost its hashes before its bytes.
fn is_open(intent: &[IntentEntry], slot: u64, stored: &[u8; HASH_BYTES]) -> bool {
    intent.iter().any(|entry| entry.slots().contains(&slot) && (entry.hash != *stored || entry.hash == HOLE))
}

impl<S: Storage> Base<S> {
    /// The base of a volume that the catalog knows was made once: without its hashes it is lost, and not empty.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when they are gone; otherwise from the disk.
    pub(crate) fn check_kept(storage: &S, folder: &Path, decl: &VolumeDecl) -> Result<()> {
        let path = part(folder, decl, "hashes");
        if storage.exists(&path).at("look for", &path)? {
            return Ok(());
        }
        let why = format!(
            "is missing, and with it what the base of volume {} held: restore the folder `base` (data and hashes of one \
             time) from a copy of the data folder",
            decl.name
        );
        Err(Error::damaged(&path, 0, why))
    }

    /// Removes what was begun on devices for volumes that never came: hashes and intents without a data file, of volumes that
    /// are not `used`.
    ///
    /// # Durability
    /// Durable when this returns.
    ///
    /// # Errors
    /// From the disk.
    pub(crate) fn remove_begun(storage: &S, folder: &Path, used: impl Fn(VolumeIndex) -> bool) -> Result<()> {
        if !storage.exists(folder).at("look for", folder)? {
            return Ok(());
        }
        for path in storage.list(folder).at("list", folder)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let index = name.strip_prefix('v').and_then(|name| name.strip_suffix(".hashes"));
            let Some(index) = index.and_then(|index| index.parse().ok()).map(VolumeIndex) else { continue };
            let file = |end: &str| folder.join(format!("v{index}.{end}"));
            if used(index) || storage.exists(&file("raw")).at("look for", folder)? {
                continue;
            }
            for path in [file("hashes"), file("intent")] {
                if storage.exists(&path).at("look for", &path)? {
                    storage.remove(&path).at("remove", &path)?;
                }
            }
        }
        storage.sync_dir(folder).at("sync folder", folder)
    }

    /// Whether a device holds what the hashes in `folder` say, slot by slot, holes included; changes nothing on it. `progress`
    /// is told the byte reached.
    ///
    /// # Errors
    /// [`Kind::Refused`] naming the first bytes that are others; otherwise from the disks.
    pub(crate) fn compare_device(
        storage: &S,
        folder: &Path,
        decl: &VolumeDecl,
        device: Device<S::File>,
        path: &Path,
        progress: &mut impl FnMut(u64),
    ) -> Result<()> {
        let base = Self::assemble_on_device(storage, folder, decl, device, path)?;
        let intent = base.read_intent()?.unwrap_or_default();
        let mut bytes = vec![0; SLOT];
        for slot in 0..base.size().div_ceil(SLOT_BYTES) {
            let bytes = &mut bytes[..base.slot_len(slot)];
            let at = slot * SLOT_BYTES;
            let stored = base.read_hash(slot)?;
            if !is_without(&stored) && !is_open(&intent, slot, &stored) {
                base.data.read_at(bytes, at).at("read", path)?;
                if hash_slot(base.volume, slot, bytes) != stored {
                    let what = format!(
                        "device {}: bytes {at}..{} are not those of volume {}: it is another device, or was written to",
                        path.display(),
                        at + bytes.len() as u64,
                        decl.name
                    );
                    return Err(Error::new(Kind::Refused, what));
                }
            }
            progress(at);
        }
        Ok(())
    }

    /// Looks at some slots of a device before anything is written to it: names and numbers of devices are given anew after a
    /// restart. A few slots that differ are damage, for readers to find; where most do, it is another device.
    ///
    /// # Errors
    /// [`Kind::Refused`] for another device; otherwise from the disks.
    pub(super) fn check_is_ours(&self, device_size: u64) -> Result<()> {
        let intent = self.read_intent()?.unwrap_or_default();
        let samples = self.sample(&intent)?;
        if samples.is_empty() {
            return self.check_nothing_foreign(&intent, device_size);
        }
        let (mut others, mut failed, mut bytes) = (0, None, vec![0; SLOT]);
        for slot in &samples {
            let bytes = &mut bytes[..self.slot_len(*slot)];
            let stored = self.read_hash(*slot)?;
            match self.data.read_at(bytes, slot * SLOT_BYTES).at("read", &self.data_path) {
                Ok(()) => others += usize::from(hash_slot(self.volume, *slot, bytes) != stored),
                Err(error) => (others, failed) = (others + 1, Some(error)),
            }
        }
        if others * 2 <= samples.len() {
            return Ok(());
        }
        Err(failed.unwrap_or_else(|| {
            self.foreign(&format!("{others} of {} slots looked at hold something else", samples.len()))
        }))
    }

    /// Of a base without any settled slot: the device's ends are zero where nothing of ours may be.
    fn check_nothing_foreign(&self, intent: &[IntentEntry], device_size: u64) -> Result<()> {
        let bytes_of = |first: u64, end: u64| first * SLOT_BYTES..end * SLOT_BYTES;
        let mut ours: Vec<_> = intent.iter().map(|entry| bytes_of(entry.slots().start, entry.slots().end)).collect();
        let mut at = 0;
        while let Some(slot) = self.next_hashed(at, None)? {
            ours.push(bytes_of(slot, slot + 1));
            at = slot + 1;
        }
        check_blank_beside(&*self.data, device_size, &self.data_path, &ours).map_err(|error| {
            let foreign = error.kind() == Kind::Refused;
            if foreign { self.foreign("the base is empty, and it is not blank") } else { error }
        })
    }

    fn foreign(&self, found: &str) -> Error {
        let text = format!(
            "device {}: is not the one that holds the base of volume {}: {found}; nothing was written to it; bring the right \
             one back to this path, or name it with `farshore base attach`",
            self.data_path.display(),
            self.name
        );
        Error::new(Kind::Refused, text)
    }

    /// Slots whose bytes must have their stored hash: spread over the volume, and of a volume with little on it the first ones.
    fn sample(&self, intent: &[IntentEntry]) -> Result<BTreeSet<u64>> {
        let (slots, count) = (self.size().div_ceil(SLOT_BYTES), SAMPLES as u64);
        let mut found = BTreeSet::new();
        for part in 0..count {
            found.extend(self.next_settled(intent, slots * part / count, slots * (part + 1) / count)?);
        }
        let mut at = 0;
        while found.len() < SAMPLES
            && let Some(slot) = self.next_settled(intent, at, slots)?
        {
            found.insert(slot);
            at = slot + 1;
        }
        Ok(found)
    }

    /// The first slot of a range that has a hash and was not being changed at a crash.
    fn next_settled(&self, intent: &[IntentEntry], mut slot: u64, end: u64) -> Result<Option<u64>> {
        while let Some(found) = self.next_hashed(slot, Some(end * SLOT_BYTES))? {
            let stored = self.read_hash(found)?;
            if !is_without(&stored) && !is_open(intent, found, &stored) {
                return Ok(Some(found));
            }
            slot = found + 1;
        }
        Ok(None)
    }
}
