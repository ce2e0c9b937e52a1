//! Volumes behind the device mapper: put into the path of their users' requests, watched, and taken out, live.
//!
//! Rules:
//! 1. A volume is captured, and what is missing of it said in the stream, before its device is in the path; sync has it only
//!    afterwards. *(Sync would else take for sent what is then written past us.)*
//! 2. While a volume is not in the path no point that would include it is made: a mark of it stays, for sync does not have it.
//! 3. Whoever leaves the path notes the counters of the upper *before*: each write past us is counted later.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::states::{Limit, MachineDoc, StateDoc};
use farshore_proto::{Now, VolumeIndex};
use farshore_ublk::dm::{Change, DevNo, Interposed, Interposer, Lower, Serve};
use farshore_uring::FileDevice;
use serde_json::{Value, json};

use super::{Group, Served, declarations, removed};
use crate::alarms::code;
use crate::evidence::{Counters, Doubt, Evidence};
use crate::frontend::Frontend;
use crate::state::{Mapped, VolumeState};
use crate::sync_thread::SyncOrder;
use crate::{Error, Result, clock, interpose};

/// How long after a failed attach the next one is tried: an attach that fails costs the disk next to nothing, and users should not
/// have to wait for a volume that was activated late.
const RETRY: Duration = Duration::from_secs(5);

/// Where the device of a volume stands.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// All requests go through it.
    In(Interposed),
    /// It is there, and another tool has led the requests past it.
    Past(Interposed),
    /// There is none; to be tried again at this time.
    Out(Now),
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "a volume behind the device mapper",
    file: file!(),
    owner: "`Group`, the agent's watch thread and its admin threads, one at a time",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "in the path",
        limit: Limit::Rest,
        exit: "taken out in order; another tool loads another table; the device is gone",
    },
    StateDoc {
        state: "past (another table leads by it)",
        limit: Limit::Setting("looked at every second"),
        exit: "put into the path again, compared; alarm `volume.bypassed`",
    },
    StateDoc {
        state: "out",
        limit: Limit::Time(RETRY),
        exit: "put into the path again, or tried again; users go on by their own table; alarm `volume.unavailable`",
    },
];
const _: fn(&Place) -> &StateDoc = |place| match place {
    Place::In(_) => &STATES[0],
    Place::Past(_) => &STATES[1],
    Place::Out(_) => &STATES[2],
};

/// What is known of writes past us when a volume is put into the path again.
pub(crate) enum Trust {
    /// What was noted when it left.
    Evidence(Evidence),
    /// Nothing; why.
    Compare(String),
}

/// Serves the lower of one of the group's volumes.
struct Through<'a> {
    group: &'a Group,
    index: VolumeIndex,
}

impl Serve for Through<'_> {
    fn start(&mut self, lower: &Lower) -> io::Result<PathBuf> {
        self.group.serve_lower(self.index, lower).map_err(io::Error::other)
    }

    fn stop(&mut self, device: &Path) -> io::Result<()> {
        self.group.stop_lower(self.index, device).map_err(io::Error::other)
    }
}

impl Group {
    fn state_of(&self, index: VolumeIndex) -> Result<(VolumeState, Mapped)> {
        let found = self.shared.state().volumes.iter().find(|volume| volume.index == index.0).cloned();
        let mapped = found.as_ref().and_then(|volume| volume.mapped.clone());
        found
            .zip(mapped)
            .ok_or_else(|| Error::failed(self.shared.volume_subject(index), "is not behind the device mapper"))
    }

    fn place(&self, index: VolumeIndex, place: Option<Place>) {
        let mut places = self.places();
        match place {
            Some(place) => _ = places.insert(index, place),
            None => _ = places.remove(&index),
        }
    }

    /// Its requests go through the device of a dead agent that is served again.
    pub(super) fn note_waiting(&self, index: VolumeIndex, attached: Interposed) {
        self.place(index, Some(Place::In(attached)));
    }

    /// The device that users go on using, if requests to it are served.
    pub(super) fn mapped_device(&self, index: VolumeIndex, mapped: &Mapped) -> Option<String> {
        let in_path = matches!(self.places().get(&index), Some(Place::In(_)));
        let serves = self.served().get(&index).is_some_and(|served| served.server.address().is_some());
        (in_path && serves).then(|| mapped.upper.display().to_string())
    }

    /// For people and scripts: how the device mapper leads to a volume.
    pub(crate) fn mapped_document(&self, volume: &VolumeState) -> Option<Value> {
        let mapped = volume.mapped.as_ref()?;
        let places = self.places();
        let (state, devices) = match places.get(&VolumeIndex(volume.index)) {
            Some(Place::In(attached)) => ("attached", Some(attached)),
            Some(Place::Past(attached)) => ("bypassed", Some(attached)),
            Some(Place::Out(_)) | None => ("detached", None),
        };
        let node = |device: fn(&Interposed) -> DevNo| devices.and_then(|attached| device(attached).node());
        Some(json!({
            "upper": mapped.upper,
            "stub": mapped.stub.as_ref().map(|stub| &stub.name),
            "state": state,
            "lower": node(|attached| attached.lower),
            "through": node(|attached| attached.through),
        }))
    }

    /// Puts a new volume into the path. Its users notice a pause.
    ///
    /// # Errors
    /// The upper has the table that it had, and nothing is captured.
    pub(super) fn attach_new(&self, index: VolumeIndex) -> Result<()> {
        let (volume, mapped) = self.state_of(index)?;
        self.attach(&interpose::open()?, &volume, &mapped)?;
        self.begin_sync(index);
        Ok(())
    }

    /// Puts a volume into the path again that is captured as pending.
    ///
    /// # Errors
    /// As [`Self::attach_new`]; the volume stays pending.
    pub(super) fn attach_again(&self, index: VolumeIndex, trust: Trust) -> Result<()> {
        let (volume, mapped) = self.state_of(index)?;
        let interposer = interpose::open()?;
        let size = interpose::restore(&interposer, &volume, &mapped)?;
        if size < volume.size {
            return Err(shrunk(&volume, size));
        }
        interpose::repair(&interposer, &volume)?;
        let before = match &trust {
            Trust::Evidence(evidence) => evidence.check_content(&mapped.upper).map_err(|doubt| doubt.to_string()),
            Trust::Compare(reason) => Err(reason.clone()),
        };
        // At once: a kill after the swap must find it marked.
        if let Err(reason) = &before {
            self.shared.bypassed(index, reason);
        }
        self.attach(&interposer, &volume, &mapped)?;
        let below = mapped.stub.as_ref().map(|_| volume.source.as_path());
        // What went past us has ended by now, and is counted.
        if let (Ok(()), Trust::Evidence(evidence)) = (before, &trust)
            && let Err(doubt) = evidence.check_counters(&mapped.upper, below)
        {
            self.shared.bypassed(index, &doubt.to_string());
        }
        self.begin_sync(index);
        self.shared.alarms.clear(code::UNAVAILABLE, &self.shared.volume_subject(index));
        Ok(())
    }

    fn attach(&self, interposer: &Interposer, volume: &VolumeState, mapped: &Mapped) -> Result<()> {
        let index = VolumeIndex(volume.index);
        let subject = format!("volume {}/{}", self.shared.name, volume.name);
        let attached = interposer.attach(&mapped.upper, &mut Through { group: self, index });
        let attached = attached.map_err(|error| interpose::dm_error(&subject, &error))?;
        self.place(index, Some(Place::In(attached)));
        Ok(())
    }

    fn begin_sync(&self, index: VolumeIndex) {
        if let Some(served) = self.served().get(&index) {
            self.shared.sync.tell(SyncOrder::Add(Arc::clone(&served.filter)));
        }
    }

    /// Makes a device with the volume's filter over `lower`, which nothing goes through yet.
    fn serve_lower(&self, index: VolumeIndex, lower: &Lower) -> Result<PathBuf> {
        let (mut volume, mapped) = self.state_of(index)?;
        let size = interpose::bytes(lower.sectors);
        if size > volume.size && self.shared.capture.volume(index).is_some() {
            volume = self.grow(&volume, &mapped, size)?;
        }
        let backing = interpose::open_lower(&volume, &lower.path)?;
        let filter = self.shared.capture_again(&volume, FileDevice::new(backing.0))?;
        let description = format!("{}/{}", self.shared.name, volume.name);
        let server = Frontend::Ublk(Some(lower.ublk_id)).serve(&description, None, Arc::clone(&filter))?;
        let (address, disk) = (server.address(), server.disk());
        let served = Served { filter, server: Arc::new(server) };
        let noted = self.note_disk(index, |kept| *kept = disk);
        match address.filter(|_| noted) {
            Some(address) => {
                self.served().insert(index, served);
                Ok(address.into())
            }
            None => {
                served.server.stop_unused()?;
                Err(Error::failed(format!("state of group {}", self.shared.name), "cannot be written"))
            }
        }
    }

    /// Ends the volume's device, through which nothing goes any more, and closes its lower.
    fn stop_lower(&self, index: VolumeIndex, device: &Path) -> Result<()> {
        let served = self.served().get(&index).map(|served| Arc::clone(&served.server));
        let Some(server) = served else {
            // Of an earlier process.
            return Serve::stop(&mut farshore_ublk::dm::PassThrough::default(), device)
                .map_err(|error| Error::failed(format!("device {}", device.display()), error));
        };
        server.stop_unused()?;
        self.shared.sync.remove(index);
        let served = self.served().remove(&index);
        if let Some(served) = served {
            let flushed = served.filter.file().backing().file.sync_data();
            flushed.map_err(|error| Error::failed("flush of a protected device", error))?;
        }
        self.note_disk(index, removed);
        Ok(())
    }

    /// The volume's device has grown: later points have the new size.
    fn grow(&self, volume: &VolumeState, mapped: &Mapped, size: u64) -> Result<VolumeState> {
        let (identity, _) = interpose::identify(&mapped.upper)?;
        // Nothing is known of its new part: whatever happens, it joins anew.
        let joined = false;
        let grown = VolumeState { size, identity: identity.as_str().to_owned(), joined, ..volume.clone() };
        let recorded = self.shared.update_state(|state| {
            state
                .volumes
                .iter_mut()
                .filter(|known| known.index == volume.index)
                .for_each(|known| *known = grown.clone());
        });
        if !recorded {
            return Err(Error::failed(format!("state of group {}", self.shared.name), "cannot be written"));
        }
        tracing::info!(volume = volume.name, was = volume.size, is = size, "the volume has grown");
        // Before sync can say anything of what is behind the old end.
        self.streamer.set_volumes(declarations(&self.shared.state()));
        Ok(grown)
    }

    /// Takes a volume's device out of the path and removes it. Its users notice a pause. `true`: all requests went through it until
    /// then.
    ///
    /// # Errors
    /// Requests go through the device as before. Or the upper has its own table again, and devices of ours are left behind.
    pub(super) fn detach(&self, index: VolumeIndex) -> Result<bool> {
        let (volume, _) = self.state_of(index)?;
        let subject = format!("volume {}/{}", self.shared.name, volume.name);
        let interposer = interpose::open()?;
        let place = self.places().remove(&index);
        let in_path = matches!(place, Some(Place::In(_)));
        let mut through = Through { group: self, index };
        let (attached, result) = match place {
            Some(Place::In(attached)) => {
                let detached = interposer.detach(&attached, &mut through);
                match detached {
                    Err(error) if interposer.change(&attached).is_ok_and(|change| change == Change::None) => {
                        self.place(index, Some(Place::In(attached)));
                        return Err(interpose::dm_error(&subject, &error));
                    }
                    // It was led past us, or out already.
                    Err(_) => (Some(attached.clone()), interposer.abandon(&attached, &mut through)),
                    Ok(()) => (None, Ok(())),
                }
            }
            Some(Place::Past(attached)) => (Some(attached.clone()), interposer.abandon(&attached, &mut through)),
            Some(Place::Out(_)) | None => (None, Ok(())),
        };
        let was_in_path = in_path && attached.is_none();
        if let Err(error) = result {
            self.place(index, attached.map(Place::Past));
            return Err(interpose::dm_error(&subject, &error));
        }
        // Of a volume that could not be served: what waits there for its server.
        interpose::repair(&interposer, &volume).map(|()| was_in_path)
    }

    /// Takes all volumes out of the path, for an orderly stop: their users go on by their own tables. What was noted of each; `false`:
    /// requests go through some device as before.
    pub(super) fn detach_all(&self) -> (Vec<(VolumeIndex, Evidence)>, bool) {
        let (mut noted, mut all) = (Vec::new(), true);
        let indices: Vec<_> = self.places().keys().copied().collect();
        for index in indices {
            let subject = self.shared.volume_subject(index);
            match self.detach_noting(index) {
                Ok(Ok(evidence)) => noted.push((index, evidence)),
                Ok(Err(doubt)) => tracing::warn!(volume = subject, %doubt, "the next start compares this volume"),
                Err(error) => {
                    let error = crate::error::chain(&error);
                    tracing::error!(volume = subject, error, "the volume's device stays, and waits for the next agent");
                    all = false;
                }
            }
        }
        (noted, all)
    }

    fn detach_noting(&self, index: VolumeIndex) -> Result<std::result::Result<Evidence, Doubt>> {
        let (_, mapped) = self.state_of(index)?;
        let counters = Counters::read(&mapped.upper);
        if !self.detach(index)? {
            return Ok(Err(Doubt::Nothing));
        }
        let users = DevNo::of(&mapped.upper).and_then(|upper| Interposer::open()?.users(upper));
        let in_use = !users.is_ok_and(|users| users == 0);
        Ok(counters.and_then(|counters| {
            let evidence = Evidence::of_device(&mapped.upper, counters, in_use)?;
            // Somebody may have come and gone since it left the path: what he wrote is in the hash, which says nothing then.
            if in_use || Counters::read(&mapped.upper)? == counters {
                return Ok(evidence);
            }
            Evidence::of_device(&mapped.upper, counters, true)
        }))
    }

    /// Looks whether requests still go the way that they should, and does what can be done if not. To be called every second or so. `true`:
    /// a device has come or gone.
    pub(crate) fn watch_mapped(&self) -> bool {
        let volumes = self.volumes();
        for volume in volumes.iter().filter(|volume| volume.mapped.is_some()) {
            if let Err(error) = self.watch_volume(volume) {
                self.shared.volume_failed(volume, &error);
            }
        }
        self.volumes() != volumes
    }

    fn watch_volume(&self, volume: &VolumeState) -> Result<()> {
        let index = VolumeIndex(volume.index);
        let place = self.places().get(&index).cloned();
        let (attached, known) = match place {
            Some(Place::In(attached)) => (attached, false),
            Some(Place::Past(attached)) => (attached, true),
            Some(Place::Out(due)) if due <= clock::now() => return self.try_again(index),
            Some(Place::Out(_)) | None => return Ok(()),
        };
        let interposer = interpose::open()?;
        let subject = self.shared.volume_subject(index);
        let change = interposer.change(&attached).map_err(|error| interpose::dm_error(&subject, &error))?;
        match change {
            Change::None => grow_stub(&interposer, volume, &attached),
            Change::Bypassed { was, is } => {
                self.led_past(
                    index,
                    &attached,
                    known,
                    &format!("another tool has changed its table, {was} to {is} sectors"),
                );
                self.follow(&interposer, volume, &attached)
            }
            Change::UpperGone => {
                self.led_past(index, &attached, known, "its device was removed");
                self.detach(index)?;
                self.out(index);
                Err(Error::failed(format!("device {}", attached.name), "was removed: activate it again, or unprotect"))
            }
            _ => Err(Error::failed(subject, "the device mapper tells something unknown of it")),
        }
    }

    /// From here on no point is made until all was compared, which sync may not begin while writes go past us.
    fn led_past(&self, index: VolumeIndex, attached: &Interposed, known: bool, reason: &str) {
        if known {
            return;
        }
        self.shared.sync.remove(index);
        self.shared.bypassed(index, reason);
        self.place(index, Some(Place::Past(attached.clone())));
    }

    /// After another tool's table: takes that for the original, with its size.
    fn follow(&self, interposer: &Interposer, volume: &VolumeState, attached: &Interposed) -> Result<()> {
        let index = VolumeIndex(volume.index);
        match interposer.reattach(attached, &mut Through { group: self, index }) {
            Ok(attached) => {
                self.place(index, Some(Place::In(attached)));
                self.begin_sync(index);
                self.shared.alarms.clear(code::UNAVAILABLE, &self.shared.volume_subject(index));
                Ok(())
            }
            Err(error) => {
                if !self.served().contains_key(&index) {
                    self.out(index);
                }
                Err(interpose::dm_error(&format!("volume {}/{}", self.shared.name, volume.name), &error))
            }
        }
    }

    /// A volume is not in the path; it is tried again later.
    pub(super) fn out(&self, index: VolumeIndex) {
        self.place(index, Some(Place::Out(clock::now().plus(RETRY))));
    }

    fn try_again(&self, index: VolumeIndex) -> Result<()> {
        self.out(index);
        let attached = self.attach_again(index, Trust::Compare("it was out of the path for a while".into()));
        attached.inspect(|()| {
            tracing::info!(volume = self.shared.volume_subject(index), "in the path again");
            self.note_in_path();
        })
    }
}

/// A stub follows its disk.
fn grow_stub(interposer: &Interposer, volume: &VolumeState, attached: &Interposed) -> Result<()> {
    let stub = volume.mapped.as_ref().and_then(|mapped| mapped.stub.as_ref());
    let disk = DevNo::of(&volume.source).ok().and_then(DevNo::sectors);
    if let (Some(stub), true) = (stub, disk.is_some_and(|sectors| sectors > attached.sectors)) {
        let grown = interposer.grow_stub(&stub.name);
        // It leads past us now, which the next look finds.
        grown.map_err(|error| interpose::dm_error(&format!("stub {}", stub.name), &error))?;
    }
    Ok(())
}

fn shrunk(volume: &VolumeState, size: u64) -> Error {
    Error::Refused {
        what: format!("source {}", volume.source.display()),
        reason: format!("has shrunk from {} to {size} bytes, which a protected volume cannot", volume.size),
        hint: "grow it again, or `farshore unprotect` the volume and protect it under another name".into(),
    }
}
