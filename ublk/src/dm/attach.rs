//! Attach and detach: a handful of steps, each of which can fail.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::lower::{self, Known};
use super::mapper::{Mapper, Status};
use super::node::{self, DevNo};
use super::serve::Serve;
use super::sys::udev;
use super::table::Table;
use crate::control::now;
use crate::error::{Error, ErrorKind};

/// Targets of which two instances over the same sectors do no harm: they keep no metadata and no cache.
const TARGETS: [&str; 3] = ["linear", "striped", "crypt"];

/// Longest wait for another interposer's work.
const LOCK_MAX: Duration = Duration::from_secs(30);

/// A step of an attach or a detach. [`Interposer::with_hook`] sees each before it is taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Attach: make the lower, without a table.
    CreateLower,
    /// Attach: load a copy of the upper's table into the lower.
    LoadLower,
    /// Attach: put it in place.
    ResumeLower,
    /// Attach: have the device over the lower started.
    Serve,
    /// Attach: write that device's name into the lower's.
    Record,
    /// Attach and detach: load the new table into the upper, beside the one in place.
    LoadUpper,
    /// Attach and detach: put it in place.
    Swap,
    /// Attach and detach: look whether it is.
    Verify,
    /// Detach: have the device over the lower ended.
    StopServing,
    /// Detach: remove the lower.
    RemoveLower,
    /// Attach and detach: all is done.
    Done,
}

impl Step {
    /// Of an attach, in order.
    pub const ATTACH: [Self; 9] = [
        Self::CreateLower,
        Self::LoadLower,
        Self::ResumeLower,
        Self::Serve,
        Self::Record,
        Self::LoadUpper,
        Self::Swap,
        Self::Verify,
        Self::Done,
    ];
    /// Of a detach, in order.
    pub const DETACH: [Self; 6] =
        [Self::LoadUpper, Self::Swap, Self::Verify, Self::StopServing, Self::RemoveLower, Self::Done];
}

const ATTACH_LIMIT: &str = "the lock on the upper 30 s; commands of the device mapper do not wait for I/O";
const SWAP_LIMIT: &str = "the disk: suspending the upper waits for the I/O that is under way";
const SERVE_LIMIT: &str = "30 s to the threads' start, 10 s to 90 s a command of the driver";
const UNDONE: &str = "the next step; an error or a crash undoes what was done, the original table stays or comes back";
/// For `docs/states.md`: each step of an attach or detach, its longest stay, what ends it.
pub const STEPS: [[&str; 3]; 11] = [
    ["create lower", ATTACH_LIMIT, UNDONE],
    ["load lower", ATTACH_LIMIT, UNDONE],
    ["resume lower", ATTACH_LIMIT, UNDONE],
    ["serve", SERVE_LIMIT, UNDONE],
    ["record", ATTACH_LIMIT, UNDONE],
    ["load upper", ATTACH_LIMIT, UNDONE],
    ["swap", SWAP_LIMIT, UNDONE],
    ["verify", ATTACH_LIMIT, UNDONE],
    ["stop serving", SERVE_LIMIT, "the next step; what is left is taken apart by the next start or `doctor --repair`"],
    ["remove lower", "5 s until its users have closed it", "the next step; left over, as above"],
    ["done", "at rest", "the last"],
];
const _: fn(&Step) -> &[&str; 3] = |step| match step {
    Step::CreateLower => &STEPS[0],
    Step::LoadLower => &STEPS[1],
    Step::ResumeLower => &STEPS[2],
    Step::Serve => &STEPS[3],
    Step::Record => &STEPS[4],
    Step::LoadUpper => &STEPS[5],
    Step::Swap => &STEPS[6],
    Step::Verify => &STEPS[7],
    Step::StopServing => &STEPS[8],
    Step::RemoveLower => &STEPS[9],
    Step::Done => &STEPS[10],
};

/// An upper with a device of ours below it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Interposed {
    /// What users have mounted.
    pub upper: DevNo,
    /// The upper's name in the device mapper.
    pub name: String,
    /// The device to which the upper passes everything.
    pub through: DevNo,
    /// The device that has the upper's original table.
    pub lower: DevNo,
    /// Length in sectors.
    pub sectors: u64,
}

/// What has become of an upper since it was attached ([`Interposer::change`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Change {
    /// Everything goes through our device.
    None,
    /// Somebody has loaded another table (`lvextend`, `lvchange --refresh`, `pvmove`…): requests go past our device.
    Bypassed {
        /// Sectors when it was attached.
        was: u64,
        /// Sectors of the table in place.
        is: u64,
    },
    /// The upper was removed (`lvchange -an`).
    UpperGone,
}

type Hook = Box<dyn Fn(Step) -> io::Result<()> + Send + Sync>;

/// Attaches and detaches. Several threads may share one; they take turns.
pub struct Interposer {
    pub(super) mapper: Mapper,
    hook: Option<Hook>,
    turn: Mutex<()>,
}

/// Keeps other interposers, of this process and others, away.
pub(super) struct Turn<'a> {
    mapper: &'a Mapper,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.mapper.control().unlock() {
            tracing::warn!(%error, "the lock on the device mapper's control device was not released");
        }
    }
}

impl Interposer {
    /// Opens the device mapper.
    ///
    /// # Errors
    /// `NoDriver`: there is none, or it is not loaded; `Permission`; `System`.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { mapper: Mapper::open()?, hook: None, turn: Mutex::new(()) })
    }

    /// Calls `hook` before each step; what it fails with, the step fails with. For tests.
    #[must_use]
    pub fn with_hook(self, hook: impl Fn(Step) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { hook: Some(Box::new(hook)), ..self }
    }

    /// Puts a device that `serve` makes below the device-mapper device `upper`, in use or not.
    ///
    /// # Errors
    /// `Invalid`: it is no device-mapper device (make a [`super::Stub`]), or the served device does not fit; `Unsupported`: its
    /// targets, or it is read-only; `Busy`: attached already, left over from a crash, suspended, or another tool is at it;
    /// `System`. In every case the upper has the table that it had, and no device of ours is left; where undoing failed too,
    /// the error says so, and [`Self::leftovers`] finds what is left.
    pub fn attach(&self, upper: &Path, serve: &mut dyn Serve) -> Result<Interposed, Error> {
        let _turn = self.turn()?;
        let (status, table) = self.candidate(upper)?;
        let mut attempt = Attempt { to: self, upper: &status, table: &table, lower: None, served: None, loaded: false };
        let attached = attempt.run(serve);
        if let Err(error) = attached {
            return Err(undone(error, attempt.undo(serve)));
        }
        tracing::info!(upper = %status.device, name = status.name, "attached");
        attached
    }

    /// Whether [`Self::attach`] would take `upper`. Looks only.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn check(&self, upper: &Path) -> Result<(), Error> {
        let _turn = self.turn()?;
        self.candidate(upper).map(drop)
    }

    /// Takes our device out of `attached`, in use or not; `serve` ends it.
    ///
    /// # Errors
    /// `Busy`: the upper has another table than ours (see [`Self::change`]), or another tool is at it; `System`. If the upper's
    /// table could not be changed, all is as before: attached. If `serve` or the removal of the lower failed after it was, the
    /// error says so: the upper has its original table, and [`Self::leftovers`] finds the rest.
    pub fn detach(&self, attached: &Interposed, serve: &mut dyn Serve) -> Result<(), Error> {
        let _turn = self.turn()?;
        let table = self.original(attached)?;
        if let Err(error) = self.replace(attached.upper, &table) {
            let error = Error::system(format!("put the original table of {} back", attached.name), error);
            return Err(undone(error, self.put_back(attached)));
        }
        self.dismantle(attached, serve)?;
        self.step(Step::Done).map_err(|e| Error::system("end a detach", e))?;
        tracing::info!(upper = %attached.upper, name = attached.name, "detached");
        Ok(())
    }

    /// Whether requests to the upper still go through our device.
    ///
    /// # Errors
    /// `System`.
    pub fn change(&self, attached: &Interposed) -> Result<Change, Error> {
        let Ok(status) = self.mapper.status(attached.upper) else { return Ok(Change::UpperGone) };
        // Its number may be another device's by now.
        let lower = self.mapper.status(attached.lower).ok().and_then(Known::of);
        if lower.is_some_and(|lower| !lower.belongs_to(&status)) {
            return Ok(Change::UpperGone);
        }
        let table = self.table(attached.upper)?;
        if table.passes_to() == Some(attached.through) && table.sectors() == attached.sectors {
            return Ok(Change::None);
        }
        Ok(Change::Bypassed { was: attached.sectors, is: table.sectors() })
    }

    /// Whether the upper has another length than when it was attached, and which, in sectors.
    ///
    /// # Errors
    /// `System`.
    pub fn size_changed(&self, attached: &Interposed) -> Result<Option<u64>, Error> {
        match self.change(attached)? {
            Change::Bypassed { was, is } if was != is => Ok(Some(is)),
            Change::Bypassed { .. } | Change::None | Change::UpperGone => Ok(None),
        }
    }

    /// After [`Change::Bypassed`]: ends our device, takes the table that the upper has now for its original, and attaches again;
    /// the upper may have grown. Writes of the meantime were seen by nobody: the caller has to take everything as changed.
    ///
    /// # Errors
    /// `Invalid`: the upper has shrunk, which is not followed (nothing was changed: detach, or grow it again); `Busy`: it is not
    /// bypassed; else as [`Self::attach`]: then the upper goes on with the table that the other tool has loaded.
    pub fn reattach(&self, attached: &Interposed, serve: &mut dyn Serve) -> Result<Interposed, Error> {
        let name = &attached.name;
        match self.change(attached)? {
            Change::None => {
                return Err(Error::new(ErrorKind::Busy, format!("{name} is attached: nothing has changed its table")));
            }
            Change::UpperGone => return Err(Error::new(ErrorKind::NotFound, format!("{name} was removed"))),
            Change::Bypassed { was, is } if is < was => {
                let what = format!(
                    "{name} has shrunk from {was} to {is} sectors, and a protected volume cannot: grow it again, or unprotect it"
                );
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            Change::Bypassed { .. } => {}
        }
        {
            let _turn = self.turn()?;
            self.dismantle(attached, serve)?;
        }
        let path = attached.upper.kernel_name().map(|name| Path::new("/dev").join(name));
        let path = path.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{name} was removed")))?;
        self.attach(&path, serve)
    }

    /// Ends our device below an upper that was bypassed for good or removed.
    ///
    /// # Errors
    /// `Busy`: the upper still passes everything to it (detach instead); else as [`Self::detach`].
    pub fn abandon(&self, attached: &Interposed, serve: &mut dyn Serve) -> Result<(), Error> {
        if self.change(attached)? == Change::None {
            return Err(Error::new(ErrorKind::Busy, format!("{} is attached: detach it", attached.name)));
        }
        let _turn = self.turn()?;
        self.dismantle(attached, serve)
    }

    /// All uppers with a device of ours below them, whoever serves it, and whether it is served.
    ///
    /// # Errors
    /// `System`.
    pub fn list(&self) -> Result<Vec<Interposed>, Error> {
        let lowers = lower::all(&self.mapper).map_err(|e| Error::system("list device-mapper devices", e))?;
        Ok(lowers.iter().filter_map(|known| self.in_path(known)).collect())
    }

    /// The upper and the device over `known`, if requests go this way.
    pub(super) fn in_path(&self, known: &Known) -> Option<Interposed> {
        let upper = self.mapper.status(known.upper()).ok().filter(|status| known.belongs_to(status))?;
        let table = self.mapper.table(upper.device).ok()?;
        let through = table.passes_to()?;
        // A plain linear table that was there before us stands in the lower as well.
        let original = self.mapper.table(known.status.device).ok()?;
        if original.passes_to() == Some(through) || through == known.status.device {
            return None;
        }
        // Another tool's table may pass everything to one device as well (`pvmove`).
        if through.kernel_name().is_some_and(|name| name != known.through_name) {
            return None;
        }
        let lower = known.status.device;
        Some(Interposed { upper: upper.device, name: upper.name, through, lower, sectors: table.sectors() })
    }

    /// The devices on which `device` stands, all the way down, itself included: through tables, through our servers to their
    /// lowers, and through whatever else the kernel shows. A process must not have its own files on an upper that it serves.
    ///
    /// # Errors
    /// `System`.
    pub fn stack(&self, device: DevNo) -> Result<Vec<DevNo>, Error> {
        let attached = self.list()?;
        let mut found = vec![device];
        let mut at = 0;
        while let Some(&device) = found.get(at) {
            at += 1;
            let mut below = node::slaves(device);
            if device.is_mapped() {
                let named = |error| Error::system(format!("ask on what {device} stands"), error);
                below.extend(self.mapper.dependencies(device).map_err(named)?);
            }
            below.extend(attached.iter().filter(|one| one.through == device).map(|one| one.lower));
            for device in below {
                if !found.contains(&device) {
                    found.push(device);
                }
            }
        }
        Ok(found)
    }

    /// By how many mounts, devices above and processes `device` is open.
    ///
    /// # Errors
    /// `System`.
    pub fn users(&self, device: DevNo) -> Result<u32, Error> {
        let status = self.mapper.status(device).map_err(|error| Error::system(format!("describe {device}"), error))?;
        Ok(status.users)
    }

    /// Holds back all requests to a device-mapper device, and waits for those under way; until [`Self::release`]. With `freeze` a
    /// mounted file system writes out and freezes first. A process that holds the device of its own files hangs.
    ///
    /// # Errors
    /// `System`.
    pub fn hold(&self, device: DevNo, freeze: bool) -> Result<(), Error> {
        self.mapper.suspend(device, freeze).map_err(|error| Error::system(format!("suspend {device}"), error))
    }

    /// Lets requests go on, by the table that was loaded meanwhile if one was.
    ///
    /// # Errors
    /// `System`.
    pub fn release(&self, device: DevNo) -> Result<(), Error> {
        let resumed = self.mapper.resume(device, udev::UNCHANGED);
        resumed.map_err(|error| Error::system(format!("resume {device}"), error))
    }

    /// Whether `upper` can be attached; what it is.
    fn candidate(&self, path: &Path) -> Result<(Status, Table), Error> {
        let device = DevNo::of(path)?;
        let name = path.display();
        let refused = |kind, reason: String| Err(Error::new(kind, format!("cannot attach {name}: {reason}")));
        if !device.is_mapped() {
            let reason = "it is no device-mapper device; make a linear stub over it once, and mount that instead";
            return refused(ErrorKind::Invalid, reason.to_owned());
        }
        let status = self.mapper.status(device).map_err(|e| Error::system(format!("describe {name}"), e))?;
        if lower::is_lower(&status) {
            return refused(ErrorKind::Busy, "it is the lower half of an attached device".to_owned());
        }
        let lowers = lower::all(&self.mapper).map_err(|e| Error::system("list device-mapper devices", e))?;
        if let Some(known) = lowers.iter().find(|known| known.belongs_to(&status)) {
            let reason = match self.in_path(known) {
                Some(_) => "it is attached already".to_owned(),
                None => format!("{} is left of an earlier attach; repair that first", known.status.name),
            };
            return refused(ErrorKind::Busy, reason);
        }
        if status.is_suspended() || status.has_inactive_table() {
            return refused(
                ErrorKind::Busy,
                "another tool is changing it: it is suspended, or a table is loaded".to_owned(),
            );
        }
        if !status.has_table() {
            return refused(ErrorKind::Invalid, "it has no table".to_owned());
        }
        if status.is_read_only() {
            return refused(ErrorKind::Unsupported, "it is read-only, so nothing can change it".to_owned());
        }
        let table = self.table(device)?;
        if let Some(target) = table.targets.iter().find(|target| !TARGETS.contains(&target.kind.as_str())) {
            let reason = format!(
                "it has a `{}` target; only linear, striped and crypt can have a second instance (others keep metadata or \
                 caches, which two would corrupt): attach the device below it or above it",
                target.kind
            );
            return refused(ErrorKind::Unsupported, reason);
        }
        Ok((status, table))
    }

    /// The original table of an attached upper, after making sure that it is attached.
    fn original(&self, attached: &Interposed) -> Result<Table, Error> {
        let name = &attached.name;
        if self.change(attached)? != Change::None {
            let what = format!(
                "cannot detach {name}: its table is not ours any more, another tool has loaded one; our devices are out of the way \
                 of its requests"
            );
            return Err(Error::new(ErrorKind::Busy, what));
        }
        let status = self.mapper.status(attached.upper).map_err(|e| Error::system(format!("describe {name}"), e))?;
        if status.is_suspended() || status.has_inactive_table() {
            let what =
                format!("cannot detach {name}: another tool is changing it (it is suspended, or a table is loaded)");
            return Err(Error::new(ErrorKind::Busy, what));
        }
        self.table(attached.lower)
    }

    /// After a failed detach: our table is in place again.
    fn put_back(&self, attached: &Interposed) -> io::Result<()> {
        self.settle(attached.upper)?;
        if self.mapper.table(attached.upper)?.passes_to() == Some(attached.through) {
            return Ok(());
        }
        self.mapper.load(attached.upper, &Table::linear(attached.through, attached.sectors))?;
        self.mapper.resume(attached.upper, udev::UNCHANGED)
    }

    /// Ends the device over the lower, and the lower. The upper no longer uses them.
    fn dismantle(&self, attached: &Interposed, serve: &mut dyn Serve) -> Result<(), Error> {
        let left = |what: &str, error| {
            let context = format!("{} has its own table again, but {what} is left behind", attached.name);
            Error::system(context, error)
        };
        if let Some(name) = attached.through.kernel_name() {
            let path = PathBuf::from(format!("/dev/{name}"));
            self.step(Step::StopServing).and_then(|()| serve.stop(&path)).map_err(|error| left(&name, error))?;
        }
        let removed = self.step(Step::RemoveLower).and_then(|()| lower::remove(&self.mapper, attached.lower));
        removed.map_err(|error| left("its lower device", error))
    }

    /// Loads a table into an upper, puts it in place and looks whether it is there.
    pub(super) fn replace(&self, upper: DevNo, table: &Table) -> io::Result<()> {
        self.step(Step::LoadUpper)?;
        self.mapper.load(upper, table)?;
        self.step(Step::Swap)?;
        self.mapper.resume(upper, udev::UNCHANGED)?;
        self.step(Step::Verify)?;
        if self.mapper.table(upper)? == *table && !self.mapper.status(upper)?.is_suspended() {
            return Ok(());
        }
        Err(io::Error::other("the kernel has not put the table in place"))
    }

    /// After a failed [`Self::replace`]: forgets a table that is not in place, and lets requests go on.
    pub(super) fn settle(&self, upper: DevNo) -> io::Result<()> {
        let status = self.mapper.status(upper)?;
        if status.has_inactive_table() {
            self.mapper.clear(upper)?;
        }
        // The kernel may refuse a table after it has suspended the device for it.
        if status.is_suspended() { self.mapper.resume(upper, udev::UNCHANGED) } else { Ok(()) }
    }

    pub(super) fn table(&self, device: DevNo) -> Result<Table, Error> {
        self.mapper.table(device).map_err(|error| Error::system(format!("read the table of {device}"), error))
    }

    pub(super) fn step(&self, step: Step) -> io::Result<()> {
        tracing::trace!(?step);
        self.hook.as_ref().map_or(Ok(()), |hook| hook(step))
    }

    pub(super) fn turn(&self) -> Result<Turn<'_>, Error> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = now() + LOCK_MAX;
        loop {
            match self.mapper.control().try_lock() {
                Ok(()) => return Ok(Turn { mapper: &self.mapper, _turn: turn }),
                Err(std::fs::TryLockError::WouldBlock) if now() < deadline => node::pause(),
                Err(std::fs::TryLockError::WouldBlock) => {
                    let what = "another process is attaching or detaching, and has not come to an end in 30 s";
                    return Err(Error::new(ErrorKind::Busy, what));
                }
                Err(std::fs::TryLockError::Error(error)) => {
                    return Err(Error::system("lock the device mapper's control device", error));
                }
            }
        }
    }
}

impl std::fmt::Debug for Interposer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interposer").field("mapper", &self.mapper).finish_non_exhaustive()
    }
}

/// An attach under way, and what it has made so far.
struct Attempt<'a> {
    to: &'a Interposer,
    upper: &'a Status,
    /// The upper's original table.
    table: &'a Table,
    lower: Option<DevNo>,
    served: Option<PathBuf>,
    /// A table of ours may be loaded into the upper.
    loaded: bool,
}

impl Attempt<'_> {
    fn run(&mut self, serve: &mut dyn Serve) -> Result<Interposed, Error> {
        let (to, upper) = (self.to, self.upper.device);
        let name = &self.upper.name;
        let failed = |what: &str| {
            let context = format!("attach {name}: {what}");
            move |error| Error::system(context, error)
        };
        to.step(Step::CreateLower).map_err(failed("make its lower device"))?;
        let lower = lower::create(&to.mapper, self.upper).map_err(failed("make its lower device"))?;
        self.lower = Some(lower);
        to.step(Step::LoadLower)
            .and_then(|()| to.mapper.load(lower, self.table))
            .map_err(failed("load a copy of its table (of dm-crypt: the key may be gone from the keyring)"))?;
        to.step(Step::ResumeLower)
            .and_then(|()| to.mapper.resume(lower, udev::HIDDEN))
            .map_err(failed("put a copy of its table in place"))?;
        let described = lower::describe(lower, upper, self.table).map_err(failed("describe its lower device"))?;
        to.step(Step::Serve).map_err(failed("serve its lower device"))?;
        let served = serve.start(&described).map_err(failed("serve its lower device"))?;
        self.served = Some(served.clone());
        let through = self.fitting(&served)?;
        to.step(Step::Record)
            .and_then(|()| lower::record(&to.mapper, lower, upper, through))
            .map_err(failed("name its lower device"))?;
        // The lower has what the upper had: somebody else may have changed that meanwhile.
        if to.table(upper)? != *self.table {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("cannot attach {name}: another tool has changed its table"),
            ));
        }
        // Or be about to: its table would be lost by ours, and its resume would put ours in place.
        let status = to.mapper.status(upper).map_err(failed("describe it"))?;
        if status.is_suspended() || status.has_inactive_table() {
            return Err(Error::new(ErrorKind::Busy, format!("cannot attach {name}: another tool is changing it")));
        }
        self.loaded = true;
        let sectors = self.table.sectors();
        to.replace(upper, &Table::linear(through, sectors)).map_err(failed("put the served device below it"))?;
        to.step(Step::Done).map_err(failed("end"))?;
        Ok(Interposed { upper, name: name.clone(), through, lower, sectors })
    }

    /// Whether the served device can stand below the upper.
    fn fitting(&self, served: &Path) -> Result<DevNo, Error> {
        let (through, upper) = (DevNo::of(served)?, self.upper.device);
        let (wanted, has) = (self.table.sectors(), through.sectors());
        let misfit = |what: String| {
            let what = format!("cannot attach {}: {} {what}", self.upper.name, served.display());
            Err(Error::new(ErrorKind::Invalid, what))
        };
        if has.is_none_or(|has| has < wanted) {
            return misfit(format!("has {} sectors, {wanted} are needed", has.unwrap_or(0)));
        }
        // A file system on it counts in blocks of the upper's size.
        let (above, below) = (upper.logical_block(), through.logical_block());
        if below > above {
            return misfit(format!("has larger blocks: {below:?} bytes, {above:?} above"));
        }
        Ok(through)
    }

    /// Takes back what was done, last things first.
    fn undo(&mut self, serve: &mut dyn Serve) -> io::Result<()> {
        let mapper = &self.to.mapper;
        if self.loaded {
            self.to.settle(self.upper.device)?;
        }
        let through = self.served.as_deref().and_then(|path| DevNo::of(path).ok());
        if through.is_some() && mapper.table(self.upper.device)?.passes_to() == through {
            mapper.load(self.upper.device, self.table)?;
            mapper.resume(self.upper.device, udev::UNCHANGED)?;
        }
        if let Some(served) = self.served.take() {
            serve.stop(&served)?;
        }
        match self.lower.take() {
            Some(lower) => lower::remove(mapper, lower),
            None => Ok(()),
        }
    }
}

/// `error`, and what came of undoing what had been done before it.
fn undone(error: Error, undo: io::Result<()>) -> Error {
    match undo {
        Ok(()) => error,
        Err(undo) => {
            tracing::error!(%undo, "undoing a failed change of a device-mapper device failed: repair it");
            Error::system(
                format!("{error} (and undoing it failed: {undo}; leftovers are to be repaired)"),
                io::Error::other(error),
            )
        }
    }
}
