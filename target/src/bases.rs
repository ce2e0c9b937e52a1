//! Bases on block devices: which device carries which volume, and how one is taken into use.
//!
//! The administrator names a device for a volume before the source brings it ([`Target::attach_base`]). It is made zero then,
//! and its identity goes into the catalog; whenever the base is opened, the device at the path must be that one. A base that
//! began in a file stays there: its bytes are not moved.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::{Name, VolumeIndex};
use farshore_uring::{BackingId, Device, Storage, StorageFile};

use crate::alarm::AlarmCode;
use crate::base::{Base, is_zero};
use crate::catalog::HostRecord;
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::StreamId;
use crate::target::Target;

/// Key of the catalog's facts, before the volume's name.
const NOTE: &str = "base ";
/// Bytes at each end of a device in which something foreign shows: all common file systems, RAID, LVM, encryption and
/// partition tables keep a header or a copy of it there (the furthest from an end: Btrfs, ReiserFS at 64 KiB, ZFS at 128 KiB).
pub const SIGNATURE_BYTES: u64 = 1 << 20;
/// Bytes made zero between two reports of progress.
const STEP_BYTES: u64 = 1 << 30;

/// The device that carries a volume's base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseDevice {
    /// Where it is.
    pub path: PathBuf,
    /// Which one it is.
    pub id: BackingId,
    /// Bytes.
    pub size: u64,
}

impl BaseDevice {
    fn key(volume: &Name) -> String {
        format!("{NOTE}{volume}")
    }

    fn value(&self) -> String {
        format!("{}\n{}\n{}", self.size, self.id, self.path.display())
    }

    fn parse(value: &str) -> Option<Self> {
        let mut fields = value.splitn(3, '\n');
        let size = fields.next()?.parse().ok()?;
        let id = BackingId::from_text(fields.next()?);
        Some(Self { size, id, path: fields.next()?.into() })
    }

    /// The device noted for a volume of a stream.
    #[must_use]
    pub fn of(record: &HostRecord, volume: &Name) -> Option<Self> {
        Self::parse(record.notes.get(&Self::key(volume))?)
    }

    /// All devices noted of a stream, by volume.
    pub fn all(record: &HostRecord) -> impl Iterator<Item = (Name, Self)> {
        record.notes.iter().filter_map(|(key, value)| {
            let volume = Name::new(key.strip_prefix(NOTE)?).ok()?;
            Some((volume, Self::parse(value)?))
        })
    }

    /// Opens it for this process alone.
    ///
    /// # Errors
    /// [`Kind::Refused`] when it is in use or another device is there; [`Kind::NotFound`] when none is.
    pub(crate) fn open<S: Storage>(&self, storage: &S) -> Result<Device<S::File>> {
        let device = open_device(storage, &self.path)?;
        if device.id == self.id {
            return Ok(device);
        }
        let text = format!(
            "device {}: is not the one that holds the base: found is {}, noted is {}; bring that one back, or if it is \
             the same under another name: `farshore base attach` compares and notes it",
            self.path.display(),
            device.id,
            self.id
        );
        Err(Error::new(Kind::Refused, text))
    }
}

fn open_device<S: Storage>(storage: &S, path: &Path) -> Result<Device<S::File>> {
    storage.open_device(path).map_err(|error| {
        let refused = |why: &str| Error::new(Kind::Refused, format!("device {}: {why}", path.display()));
        let is = |kinds: &[io::ErrorKind]| kinds.contains(&error.kind());
        if is(&[io::ErrorKind::ResourceBusy, io::ErrorKind::WouldBlock]) {
            refused(
                "is in use (mounted, swap, part of a RAID or of LVM, or a base already): free it, or name another one",
            )
        } else if is(&[io::ErrorKind::InvalidInput]) {
            refused(&format!("{error}: name a block device by its whole path"))
        } else if is(&[io::ErrorKind::ReadOnlyFilesystem]) {
            refused("is read-only: make it writable (`blockdev --setrw`)")
        } else if is(&[io::ErrorKind::PermissionDenied]) {
            refused("this process may not open it: run the target with access to it")
        } else {
            Error::io("open device", path, error)
        }
    })
}

/// Whether both ends of a device are zero, where everything that may be precious leaves its signature.
///
/// # Errors
/// [`Kind::Refused`] naming the first byte that is not; otherwise from the device.
pub(crate) fn check_blank<F: StorageFile>(device: &Device<F>, path: &Path) -> Result<()> {
    check_blank_beside(&*device.file, device.size, path, &[])
}

/// As [`check_blank`], leaving out the ranges of bytes that are ours.
///
/// # Errors
/// As there.
pub(crate) fn check_blank_beside<F: StorageFile>(file: &F, end: u64, path: &Path, ours: &[Range<u64>]) -> Result<()> {
    for range in [0..SIGNATURE_BYTES.min(end), end.saturating_sub(SIGNATURE_BYTES)..end] {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("at most 1 MiB")];
        file.read_at(&mut bytes, range.start).at("read", path)?;
        for own in ours {
            let within =
                |at: u64| usize::try_from(at.clamp(range.start, range.end) - range.start).expect("at most 1 MiB");
            bytes[within(own.start)..within(own.end)].fill(0);
        }
        if is_zero(&bytes) {
            continue;
        }
        let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(0) as u64;
        let text = format!(
            "device {}: is not blank (byte {} and on): it may hold a file system, RAID or LVM member, or partition table; \
             look with `wipefs` or `blkid`, and say --overwrite if all of it may go",
            path.display(),
            range.start + first
        );
        return Err(Error::new(Kind::Refused, text));
    }
    Ok(())
}

/// Order for [`Target::attach_base`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachBase {
    /// Group.
    pub group: Name,
    /// Host whose volume it is; not needed where the group has one host.
    pub host: Option<Name>,
    /// Volume, by the name under which the source will bring it.
    pub volume: Name,
    /// The device, by its whole path. One that stays the same (`/dev/disk/by-id/…`) saves trouble later.
    pub path: PathBuf,
    /// All that is on the device may go.
    pub overwrite: bool,
}

/// How far taking a device into use is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttachProgress {
    /// Bytes made zero, or compared.
    pub position: u64,
    /// Bytes of the device.
    pub size: u64,
}

impl<S: Storage> Target<S> {
    /// Makes a device the base of a volume that the source has not brought yet: makes all of it zero, and notes it in the
    /// catalog. For a volume whose base is on a device already (which has another identity now), compares every slot with the
    /// stored hashes instead, changes nothing on the device, and notes it.
    ///
    /// # Durability
    /// Durable when this returns. After a crash in between the device is not noted and may be zero in part.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a group that does not exist; [`Kind::Refused`] when the base is in a file already, the device is
    /// in use, carries another base, or is not blank and `overwrite` is not said, or the base is open on its device and takes
    /// writes there; [`Kind::Damaged`] when the hashes to compare with are gone; otherwise from the device.
    pub fn attach_base(&self, order: &AttachBase, mut progress: impl FnMut(AttachProgress)) -> Result<BaseDevice> {
        let host = self.host_of(&order.group, order.host.as_ref())?;
        check_path(&order.path)?;
        let record = self.catalog().host(&order.group, &host).unwrap_or_default();
        let known = record.volumes.iter().find(|decl| decl.name == order.volume);
        if known.is_some() && BaseDevice::of(&record, &order.volume).is_none() {
            let text = format!(
                "volume {} of group {}: has its base in a file, from when the source brought it first; only a new volume can \
                 have it on a device",
                order.volume, order.group
            );
            return Err(Error::new(Kind::Refused, text));
        }
        if known.is_some() {
            self.check_closed(order, &host)?;
        }
        let device = open_device(self.storage(), &order.path)?;
        let made = BaseDevice { path: order.path.clone(), id: device.id.clone(), size: device.size };
        self.check_unused(&made, (&order.group, &host, &order.volume))?;
        let size = device.size;
        let mut report = |position| progress(AttachProgress { position, size });
        let folder = StreamId::derive(self.vault(), &order.group, &host).folder().join("base");
        match known {
            Some(decl) => {
                Base::check_kept(self.storage(), &folder, decl)?;
                Base::compare_device(self.storage(), &folder, decl, device, &order.path, &mut report)?;
            }
            None => prepare(&device, &order.path, order.overwrite, &mut report)?,
        }
        self.note_base(order, &host, &made, known.is_some())?;
        if known.is_some() {
            self.reopen_stream(&order.group, &host)?;
        }
        Ok(made)
    }

    /// A stream that is open has the base open and goes on writing to the device it has.
    fn check_closed(&self, order: &AttachBase, host: &Name) -> Result<()> {
        if self.lane(&(order.group.clone(), host.clone())).is_none() {
            return Ok(());
        }
        let text = format!(
            "volume {} of group {}: its base is open on the device that it has, and is written there; to use another one, \
             stop the target, take the old one away, start the target, and attach the new one",
            order.volume, order.group
        );
        Err(Error::new(Kind::Refused, text))
    }

    /// `known`: the volume had been brought when the device was compared; else it was made zero.
    fn note_base(&self, order: &AttachBase, host: &Name, made: &BaseDevice, known: bool) -> Result<()> {
        // The stream is not opened on the old device meanwhile.
        let _opening = self.opening();
        if known {
            self.check_closed(order, host)?;
        }
        // Meanwhile the source may have brought the volume, or another device been noted elsewhere.
        self.check_unused(made, (&order.group, host, &order.volume))?;
        let noted = self.catalog().update_host(&order.group, host, |record| {
            let brought = record.volumes.iter().any(|decl| decl.name == order.volume);
            if brought != known {
                return false;
            }
            record.notes.insert(BaseDevice::key(&order.volume), made.value());
            true
        })?;
        if noted {
            return Ok(());
        }
        let text = format!("volume {}: the source brought it meanwhile, and its base is elsewhere now", order.volume);
        Err(Error::new(Kind::Refused, text))
    }

    /// Forgets the device of a volume that the source has not brought yet. Gives what was noted.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when none is noted; [`Kind::Refused`] when the base is in use; otherwise from the disk.
    pub fn detach_base(&self, group: &Name, host: Option<&Name>, volume: &Name) -> Result<BaseDevice> {
        let host = self.host_of(group, host)?;
        let freed = self.catalog().update_host(group, &host, |record| {
            let noted = BaseDevice::of(record, volume);
            let noted = noted.ok_or_else(|| {
                Error::new(Kind::NotFound, format!("volume {volume} of group {group}: has no device"))
            })?;
            if record.volumes.iter().any(|decl| decl.name == *volume) {
                let text = format!("volume {volume} of group {group}: the device holds its base, which history needs");
                return Err(Error::new(Kind::Refused, text));
            }
            record.notes.remove(&BaseDevice::key(volume));
            Ok(noted)
        })??;
        let lane = self.lane(&(group.clone(), host.clone()));
        if let Some(lane) = &lane {
            // Open from a greeting that failed at another volume.
            lane.stream().forget_base(volume);
        }
        // What that greeting began would keep the volume from beginning in a file.
        let open = lane.map(|lane| lane.stream().bases()).unwrap_or_default();
        let brought = self.catalog().host(group, &host).unwrap_or_default().volumes;
        let used = |index| open.contains_key(&index) || brought.iter().any(|decl| decl.index == index);
        let folder = StreamId::derive(self.vault(), group, &host).folder().join("base");
        Base::remove_begun(self.storage(), &folder, used)?;
        Ok(freed)
    }

    /// The host of a group with one, or the one named.
    fn host_of(&self, group: &Name, host: Option<&Name>) -> Result<Name> {
        let missing = |what: String| Error::new(Kind::NotFound, what);
        let record = self.groups().remove(group).ok_or_else(|| {
            missing(format!(
                "group {group}: the target keeps no such group: `farshore group add {group} HOST` makes it"
            ))
        })?;
        let mut hosts = record.hosts.into_keys().filter(|known| host.is_none_or(|host| host == known));
        match (hosts.next(), hosts.next()) {
            (Some(host), None) => Ok(host),
            (None, _) => Err(missing(format!("group {group}: has no such host"))),
            (Some(_), Some(_)) => Err(Error::new(Kind::Invalid, format!("group {group}: has several hosts: name one"))),
        }
    }

    /// No other volume has the device, nor the path.
    fn check_unused(&self, made: &BaseDevice, of: (&Name, &Name, &Name)) -> Result<()> {
        for (group, record) in self.groups() {
            for (host, record) in record.hosts {
                for (volume, noted) in BaseDevice::all(&record) {
                    let taken = noted.id == made.id || noted.path == made.path;
                    if taken && (&group, &host, &volume) != of {
                        let text = format!(
                            "device {}: is the base of volume {volume} of group {group} (host {host}): name another one",
                            made.path.display()
                        );
                        return Err(Error::new(Kind::Refused, text));
                    }
                }
            }
        }
        Ok(())
    }
}

fn check_path(path: &Path) -> Result<()> {
    let text = path.to_str().filter(|text| path.is_absolute() && !text.chars().any(char::is_control));
    match text {
        Some(_) => Ok(()),
        None => Err(Error::new(Kind::Invalid, format!("device {}: is not the whole path of a device", path.display()))),
    }
}

fn prepare<F: StorageFile>(
    device: &Device<F>,
    path: &Path,
    overwrite: bool,
    report: &mut impl FnMut(u64),
) -> Result<()> {
    if !overwrite {
        check_blank(device, path)?;
    }
    let mut at = 0;
    while at < device.size {
        let len = (device.size - at).min(STEP_BYTES);
        device.file.punch_hole(at, len).at("make zero", path)?;
        at += len;
        report(at);
    }
    device.file.sync().at("sync", path)?;
    // A device that says it made a range zero and did not is found here, and not as damage later.
    check_blank(device, path)
}

/// Raises the alarm for a base that cannot be opened: the source is refused, and comes again by itself.
pub(crate) fn alarm<S: Storage>(stream: &Arc<crate::group::GroupHost<S>>, volume: VolumeIndex, error: &Error) {
    let text = format!("volume {volume}: {}", error.context());
    stream.alarms.raise(AlarmCode::BaseFailed, &stream.id.subject(), &text);
}

#[cfg(test)]
mod tests;
