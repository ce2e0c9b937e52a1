//! Volumes behind the device mapper: which device is whose, what is in the kernel of them, and what a start finds.
//!
//! How tables change under their users is `farshore_ublk::dm`'s; what a group does with a volume is `group/mapped.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use farshore_proto::Name;
use farshore_ublk::ErrorKind;
use farshore_ublk::dm::{DevNo, Interposed, Interposer, Leftover};
use farshore_uring::{BackingId, BackingOptions, Direct, open_backing};

use crate::source::SourceFile;
use crate::state::{Mapped, StubState, VolumeState};
use crate::{Error, Result, frontend};

const SECTOR: u64 = 512;

/// A device-mapper device that can be protected: looked at, not opened.
pub(crate) struct Upper {
    pub mapped: Mapped,
    pub identity: BackingId,
    pub size: u64,
    pub block: u32,
    /// The stub was made just now.
    pub made: bool,
}

/// Opens the device mapper.
///
/// # Errors
/// There is none, or not allowed; with the way out.
pub(crate) fn open() -> Result<Interposer> {
    Interposer::open().map_err(|error| dm_error("device mapper", &error))
}

/// An error of the device mapper, with what to do about it.
pub(crate) fn dm_error(subject: &str, error: &farshore_ublk::Error) -> Error {
    let (what, reason) = (subject.to_owned(), crate::error::chain(error));
    let kind = error.kind();
    if kind == ErrorKind::Busy {
        let hint = "end that use, or wait for that tool; `farshore doctor` shows what a crash has left".into();
        return Error::Refused { what, reason, hint };
    }
    if matches!(kind, ErrorKind::Invalid | ErrorKind::Unsupported) {
        return Error::Refused { what, reason, hint: "nothing was changed; see docs/operations/interposer.md".into() };
    }
    Error::Failed { what, reason }
}

/// Finds the device-mapper device to attach to: `source` itself, or a stub over it, which is made.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Refused`]: no block device, a disk in use or with partitions. Nothing was made then.
pub(crate) fn prepare(source: &Path, group: &Name, volume: &Name) -> Result<Upper> {
    let interposer = open()?;
    let subject = format!("source {}", source.display());
    let (disk, _) = identify(source)?;
    let device = DevNo::of(source).map_err(|error| dm_error(&subject, &error))?;
    if device.is_mapped() {
        // Before anybody is told of the volume.
        interposer.check(source).map_err(|error| dm_error(&subject, &error))?;
        return describe(Mapped { upper: source.to_owned(), stub: None }, false);
    }
    let name = format!("protected-{group}-{volume}");
    let made = !is_below(device, &name);
    let stub = interposer.make_stub(source, &name).map_err(|error| dm_error(&subject, &error))?;
    let state = StubState { name, disk: disk.as_str().to_owned() };
    let mapped = Mapped { upper: stub.path, stub: Some(state) };
    describe(mapped, made)
}

fn describe(mapped: Mapped, made: bool) -> Result<Upper> {
    let (identity, size) = identify(&mapped.upper)?;
    let block = DevNo::of(&mapped.upper).ok().and_then(DevNo::logical_block);
    let block = block.and_then(|block| u32::try_from(block).ok()).unwrap_or(512);
    let upper = Upper { mapped, identity, size, block, made };
    if size == 0 {
        drop_stub(&upper.mapped, made);
        return Err(Error::failed(format!("source {}", upper.mapped.upper.display()), "is empty"));
    }
    Ok(upper)
}

/// Whether a device-mapper device of this name stands on `disk`.
fn is_below(disk: DevNo, name: &str) -> bool {
    let holders = std::fs::read_dir(format!("/sys/dev/block/{disk}/holders")).into_iter().flatten().flatten();
    let names = holders.filter_map(|holder| std::fs::read_to_string(holder.path().join("dm/name")).ok());
    names.into_iter().any(|held| held.trim_end() == name)
}

/// Which device is at `path`, and its size in bytes.
pub(crate) fn identify(path: &Path) -> Result<(BackingId, u64)> {
    BackingId::of_block_device(path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            let name = path.display().to_string();
            return Error::NotFound { what: "source", name, hint: "; if it is a logical volume, activate it" };
        }
        if error.kind() == std::io::ErrorKind::InvalidInput {
            let what = format!("source {}", path.display());
            let reason = "is no block device, so no device mapper leads to it".into();
            return Error::Refused { what, reason, hint: "protect an image file without --dm".into() };
        }
        Error::io("look at", path, error)
    })
}

/// Removes a stub that nobody uses, if it is to go.
pub(crate) fn drop_stub(mapped: &Mapped, unwanted: bool) {
    let Some(stub) = mapped.stub.as_ref().filter(|_| unwanted) else { return };
    match open().and_then(|dm| dm.remove_stub(&stub.name).map_err(|error| dm_error("stub", &error))) {
        Ok(()) => tracing::info!(stub = stub.name, "stub removed"),
        Err(error) => tracing::info!(stub = stub.name, error = crate::error::chain(&error), "the stub stays"),
    }
}

/// Makes sure that a volume's upper is there and is the one that was protected; makes its stub again. Its size in bytes.
///
/// # Errors
/// It is not there, or another device is in its place.
pub(crate) fn restore(interposer: &Interposer, volume: &VolumeState, mapped: &Mapped) -> Result<u64> {
    if let Some(stub) = &mapped.stub {
        let (disk, _) = identify(&volume.source)?;
        expect_same(&volume.source, &disk, &stub.disk)?;
        let subject = format!("stub {}", stub.name);
        interposer.make_stub(&volume.source, &stub.name).map_err(|error| dm_error(&subject, &error))?;
    }
    let (identity, size) = identify(&mapped.upper)?;
    expect_same(&mapped.upper, &identity, &volume.identity)?;
    Ok(size)
}

fn expect_same(path: &Path, is: &BackingId, was: &str) -> Result<()> {
    if is.is_same_but_for_size(&BackingId::from_text(was)) {
        return Ok(());
    }
    Err(Error::Refused {
        what: format!("device {}", path.display()),
        reason: format!("is another device than the one protected ({is} is not {was})"),
        hint: "bring the device back, or `farshore unprotect` the volume and protect the new one".into(),
    })
}

/// Whether a volume is `device`, which may have grown since, or stands on it by a stub.
pub(crate) fn is_of(volume: &VolumeState, device: &BackingId) -> bool {
    let disk = volume.mapped.as_ref().and_then(|mapped| mapped.stub.as_ref()).map(|stub| stub.disk.clone());
    [Some(volume.identity.clone()), disk]
        .into_iter()
        .flatten()
        .any(|known| device.is_same_but_for_size(&BackingId::from_text(known)))
}

/// Where requests of a volume go through a device over its lower, whoever serves that.
fn in_path(interposer: &Interposer, volume: &VolumeState) -> Result<Option<Interposed>> {
    let all = interposer.list().map_err(|error| dm_error("device mapper", &error))?;
    let is_ours = |one: &Interposed| {
        let id = one.upper.node().and_then(|node| BackingId::of_block_device(&node).ok());
        id.is_some_and(|(id, _)| id.is_same_but_for_size(&BackingId::from_text(volume.identity.clone())))
    };
    Ok(all.into_iter().find(is_ours))
}

impl VolumeState {
    /// The block device or file that the volume's filter writes to: the lower of a volume behind the device mapper, else the source.
    /// Whoever serves the volume in the agent's place, without a filter, has to open this one.
    ///
    /// # Errors
    /// The volume's device is not in the path of its users' requests, so nobody has to serve anything; or the device mapper does not
    /// answer.
    pub fn backing_node(&self) -> Result<PathBuf> {
        if self.mapped.is_none() {
            return Ok(self.source.clone());
        }
        let lower = in_path(&open()?, self)?.and_then(|found| found.lower.node());
        lower.ok_or_else(|| Error::NotFound { what: "lower device of volume", name: self.name.clone(), hint: "" })
    }
}

/// What a start finds in the kernel of its volumes behind the device mapper.
#[derive(Default)]
pub(crate) struct Found {
    /// Their requests wait in a device of the dead agent.
    pub waiting: BTreeMap<u16, Interposed>,
    /// Devices that a dead agent may still have I/O to.
    lowers: BTreeMap<u16, Vec<PathBuf>>,
}

impl Found {
    /// Looks only.
    pub(crate) fn of(volumes: &[VolumeState]) -> Self {
        let mut found = Self::default();
        if volumes.iter().all(|volume| volume.mapped.is_none()) {
            return found;
        }
        // Without a device mapper nothing of it can wait; each volume says so when it is to be attached.
        let Ok(interposer) = open() else { return found };
        for volume in volumes.iter().filter(|volume| volume.mapped.is_some()) {
            let attached = in_path(&interposer, volume).ok().flatten();
            let ours = volume.ublk.as_ref().and_then(|disk| frontend::surviving(disk).ok().flatten());
            let mut lowers: Vec<_> =
                leftovers(&interposer, volume).iter().filter_map(|left| left.lower.node()).collect();
            lowers.extend(attached.iter().filter_map(|one| one.lower.node()));
            found.lowers.insert(volume.index, lowers);
            if let Some(attached) = attached.filter(|one| ours.is_some() && one.through.ublk_id() == ours) {
                found.waiting.insert(volume.index, attached);
            }
        }
        found
    }

    /// What a dead agent held of a volume until the last of its I/O had ended.
    pub(crate) fn held(&self, volume: &VolumeState) -> Vec<PathBuf> {
        match volume.mapped {
            None => vec![volume.source.clone()],
            Some(_) => self.lowers.get(&volume.index).cloned().unwrap_or_default(),
        }
    }
}

/// What crashes have left of a volume's devices.
fn leftovers(interposer: &Interposer, volume: &VolumeState) -> Vec<Leftover> {
    let all = interposer.leftovers().unwrap_or_default();
    let number = volume.mapped.as_ref().and_then(|mapped| DevNo::of(&mapped.upper).ok());
    let disk = volume.ublk.as_ref().and_then(|disk| frontend::surviving(disk).ok().flatten());
    let is_ours = |left: &Leftover| {
        (number.is_some() && left.upper == number) || (disk.is_some() && left.through.and_then(DevNo::ublk_id) == disk)
    };
    all.into_iter().filter(is_ours).collect()
}

/// Puts right what crashes have left of a volume's devices: its upper has its own table afterwards, and nothing of ours is there.
///
/// # Errors
/// Another tool is at it, or the kernel refuses.
pub(crate) fn repair(interposer: &Interposer, volume: &VolumeState) -> Result<()> {
    for left in leftovers(interposer, volume) {
        tracing::warn!(volume = volume.name, left = left.description, "what an earlier agent has left is put right");
        interposer.repair(&left).map_err(|error| dm_error(&format!("volume {}", volume.name), &error))?;
    }
    Ok(())
}

/// Opens the lower of a volume: past the page cache in any case, or what its users read by way of the upper later would not be what
/// was written.
///
/// # Errors
/// It is in use, or of another shape than `volume`.
pub(crate) fn open_lower(volume: &VolumeState, lower: &Path) -> Result<SourceFile> {
    let backing = open_backing(lower, BackingOptions { direct: Direct::On, read_only: false })
        .map_err(|error| Error::failed(format!("lower device {}", lower.display()), crate::error::chain(&error)))?;
    let (size, block) = (backing.geometry.size, backing.geometry.logical_block);
    if (size, block) == (volume.size, volume.block) {
        return Ok(SourceFile(backing));
    }
    let reason = format!("has {size} bytes in blocks of {block}, not {} in blocks of {}", volume.size, volume.block);
    Err(Error::failed(format!("lower device {}", lower.display()), reason))
}

/// Opens the lower of a volume whose requests wait for their server.
///
/// # Errors
/// As [`open_lower`].
pub(crate) fn open_waiting(volume: &VolumeState, attached: &Interposed) -> Result<SourceFile> {
    let gone = || Error::NotFound { what: "lower device of volume", name: volume.name.clone(), hint: "" };
    open_lower(volume, &attached.lower.node().ok_or_else(gone)?)
}

/// A length in sectors, in bytes.
pub(crate) fn bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(SECTOR)
}
