//! What a crash leaves behind, and how it is put right.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::attach::Interposer;
use super::lower::{self, Known};
use super::mapper::Status;
use super::node::{self, DevNo};
use super::serve::{PassThrough, Serve, delete};
use super::sys::udev;
use crate::control::Control;
use crate::error::{Error, ErrorKind};
use crate::info::{DeviceInfo, DeviceState, is_alive};

/// Longest wait until the kernel has ended the I/O of a dead server.
const RECOVERY_MAX: Duration = Duration::from_secs(30);

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LeftoverKind {
    /// The upper is suspended: its requests wait for somebody to resume it.
    Suspended,
    /// The upper passes its requests to a device without a server: they wait or fail. If that server is to come back, it is no
    /// leftover but its work.
    DeadServer,
    /// Nothing goes through the lower, and nobody serves a device over it: an attach or a detach broke off, or the upper was
    /// removed or given another table.
    Unused,
}

/// Something that is left behind.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Leftover {
    /// What is wrong.
    pub kind: LeftoverKind,
    /// The upper, if it is still there.
    pub upper: Option<DevNo>,
    /// The lower, which a repair removes if nobody needs it.
    pub lower: DevNo,
    /// The device over the lower, if there is one.
    pub through: Option<DevNo>,
    /// For people: which devices, and what a repair will do.
    pub description: String,
}

/// What a repair did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Repaired {
    /// For people, in order.
    pub done: Vec<String>,
    /// The upper has its original table now and had ours before: writes go past the filter from here on, and some may have gone
    /// past it already. Everything has to be compared.
    pub detached: bool,
}

/// How a device over a lower is served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Service {
    /// There is no such device.
    None,
    /// By a living process, or by the kernel itself.
    Alive,
    /// By nobody; the device can be taken over, and requests wait for that.
    Recoverable,
    /// By nobody; requests fail.
    Dead,
}

impl Interposer {
    /// What crashes have left behind. Looks only.
    ///
    /// # Errors
    /// `Busy`: an attach or a detach is under way; `System`.
    pub fn leftovers(&self) -> Result<Vec<Leftover>, Error> {
        let _turn = self.turn()?;
        let lowers = lower::all(&self.mapper).map_err(|e| Error::system("list device-mapper devices", e))?;
        Ok(lowers.iter().filter_map(|known| self.examine(known)).collect())
    }

    /// Puts `leftover` right: a suspended upper goes on; a waiting device without a server is taken over by this process for the
    /// moment, without a filter, so that no request fails; the upper gets its original table; devices of ours go.
    ///
    /// # Errors
    /// `NotFound`: it is not there any more; `Busy`: another tool has loaded a table; `System`: then what was not reached stays
    /// a leftover.
    pub fn repair(&self, leftover: &Leftover) -> Result<Repaired, Error> {
        let _turn = self.turn()?;
        let gone = || Error::new(ErrorKind::NotFound, format!("nothing is left of {}", leftover.lower));
        let known = self.mapper.status(leftover.lower).ok().and_then(Known::of).ok_or_else(gone)?;
        // It may have changed since it was found.
        let found = self.examine(&known).ok_or_else(gone)?;
        let mut repaired = Repaired::default();
        self.repair_known(&known, &found, &mut repaired)?;
        for done in &repaired.done {
            tracing::info!(lower = %found.lower, "{done}");
        }
        Ok(repaired)
    }

    fn examine(&self, known: &Known) -> Option<Leftover> {
        let upper = self.upper_of(known);
        let in_path = self.in_path(known);
        let through = in_path.as_ref().map(|attached| attached.through).or_else(|| self.over(known, upper.as_ref()));
        let service = through.map_or(Service::None, service);
        let name = upper.as_ref().map_or_else(|| format!("(device {}, removed)", known.upper()), |u| u.name.clone());
        let lower_name = &known.status.name;
        let (kind, description) = if upper.as_ref().is_some_and(Status::is_suspended) {
            (LeftoverKind::Suspended, format!("{name} is suspended: to be resumed"))
        } else if in_path.is_some() && service != Service::Alive {
            let what = if service == Service::Recoverable { "waits for its server" } else { "has no server" };
            let through = through.and_then(DevNo::kernel_name).unwrap_or_else(|| "a device that is gone".to_owned());
            let text = format!("{name} passes its requests to {through}, which {what}: to get its own table again");
            (LeftoverKind::DeadServer, text)
        } else if in_path.is_none() && service != Service::Alive {
            (LeftoverKind::Unused, format!("{lower_name}, of {name}, is used by nobody: to be removed"))
        } else {
            return None;
        };
        let upper = upper.map(|upper| upper.device);
        Some(Leftover { kind, upper, lower: known.status.device, through, description })
    }

    fn upper_of(&self, known: &Known) -> Option<Status> {
        self.mapper.status(known.upper()).ok().filter(|status| known.belongs_to(status))
    }

    /// The device over a lower that the upper does not go through: one that it was about to, or else the recorded one.
    fn over(&self, known: &Known, upper: Option<&Status>) -> Option<DevNo> {
        let loaded = upper.filter(|upper| upper.has_inactive_table());
        let loaded = loaded.and_then(|upper| self.mapper.inactive_table(upper.device).ok()?.passes_to());
        let recorded = node::by_kernel_name(&known.through_name);
        // The table that is loaded may be the original, on its way back.
        recorded.or(loaded.filter(|device| device.ublk_id().is_some()))
    }

    fn repair_known(&self, known: &Known, found: &Leftover, repaired: &mut Repaired) -> Result<(), Error> {
        let lower = found.lower;
        if let Some(upper) = self.upper_of(known) {
            self.calm(&upper, found, repaired)?;
        }
        let attached = self.in_path(known);
        let service = found.through.map_or(Service::None, service);
        if service == Service::Alive {
            return Ok(());
        }
        let mut pass_through = PassThrough::default();
        if let Some(attached) = &attached {
            let table = self.table(lower)?;
            if service == Service::Recoverable {
                self.take_over(attached.through, lower, &mut pass_through)?;
                repaired.done.push(format!("served {} in place of its dead server", attached.name));
            }
            self.replace(attached.upper, &table).map_err(|error| {
                let settled = self.settle(attached.upper);
                Error::system(format!("put the original table of {} back ({settled:?})", attached.name), error)
            })?;
            repaired.detached = true;
            repaired.done.push(format!("put the original table of {} back", attached.name));
        }
        let failed = |what: &str| {
            let context = format!("remove {what}");
            move |error| Error::system(context, error)
        };
        if let Some((through, name)) = found.through.and_then(|through| Some((through, through.kernel_name()?))) {
            if attached.is_some() && service == Service::Recoverable {
                pass_through.stop(&PathBuf::from(format!("/dev/{name}"))).map_err(failed(&name))?;
            } else if let Some(id) = through.ublk_id() {
                delete(id).map_err(failed(&name))?;
            }
            repaired.done.push(format!("removed {name}"));
        } else if let Some(id) = recorded_id(known) {
            // Its disk is gone, the rest of it may be there.
            remove_if_dead(id).map_err(failed(&known.through_name))?;
        }
        lower::remove(&self.mapper, lower).map_err(failed(&known.status.name))?;
        repaired.done.push(format!("removed {}", known.status.name));
        Ok(())
    }

    /// Forgets a table of ours that never came into place, and resumes the upper.
    fn calm(&self, upper: &Status, found: &Leftover, repaired: &mut Repaired) -> Result<(), Error> {
        let failed = |error| Error::system(format!("resume {}", upper.name), error);
        if upper.has_inactive_table() {
            let loaded = self.mapper.inactive_table(upper.device).map_err(failed)?;
            let ours = loaded.passes_to().is_some_and(|device| Some(device) == found.through);
            if !ours && loaded != self.table(found.lower)? {
                let what = format!("a table is loaded into {} that is not ours: another tool is at it", upper.name);
                return Err(Error::new(ErrorKind::Busy, what));
            }
            self.mapper.clear(upper.device).map_err(failed)?;
            repaired.done.push(format!("forgot the table that was loaded into {}", upper.name));
        }
        if upper.is_suspended() {
            self.mapper.resume(upper.device, udev::UNCHANGED).map_err(failed)?;
            repaired.done.push(format!("resumed {}", upper.name));
        }
        Ok(())
    }

    /// Serves the device of a dead server over its lower, in this process.
    fn take_over(&self, through: DevNo, lower: DevNo, by: &mut PassThrough) -> Result<(), Error> {
        let gone = || Error::new(ErrorKind::NotFound, format!("{through} or {lower} is gone"));
        let id = through.ublk_id().ok_or_else(gone)?;
        let path = PathBuf::from(format!("/dev/{}", lower.kernel_name().ok_or_else(gone)?));
        let recovered = by.recover(id, RECOVERY_MAX, &path);
        recovered.map_err(|error| Error::system(format!("serve ublk device {id} in place of its dead server"), error))
    }
}

fn service(device: DevNo) -> Service {
    let Some(id) = device.ublk_id() else {
        // Something else than ublk is served by the kernel, as long as it is there.
        return if device.exists() { Service::Alive } else { Service::Dead };
    };
    let Ok(info) = Control::open().and_then(|control| control.info(id)) else { return Service::Dead };
    let served = info.server_pid().is_some_and(is_alive);
    match info.state() {
        DeviceState::Live if served => Service::Alive,
        // The kernel notices the end of a server a moment later.
        DeviceState::Live | DeviceState::Quiesced | DeviceState::FailIo if info.survives_its_server() => {
            Service::Recoverable
        }
        DeviceState::Live | DeviceState::Quiesced | DeviceState::FailIo | DeviceState::Dead | DeviceState::Other(_) => {
            Service::Dead
        }
    }
}

fn recorded_id(known: &Known) -> Option<u32> {
    known.through_name.strip_prefix("ublkb")?.parse().ok()
}

/// Removes what is left of a ublk device without a disk, unless a process is about to start it.
fn remove_if_dead(id: u32) -> io::Result<()> {
    let info = Control::open().and_then(|control| control.info(id));
    let dead = |info: DeviceInfo| info.state() == DeviceState::Dead && !info.server_pid().is_some_and(is_alive);
    if info.is_ok_and(dead) { delete(id) } else { Ok(()) }
}
