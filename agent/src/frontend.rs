//! How guests reach a volume: over NBD, or as a block device of the kernel (ublk).
//!
//! A ublk device outlives the agent. When its server dies, the kernel keeps every request that was not answered and issues it again
//! to the next one. Hence three rules, which `docs/decisions/0008-ublk-under-the-agent.md` argues for:
//!
//! 1. A range that the dead agent was writing needs no mark if its device is taken over: the request comes again, is written again
//!    and captured again. Where the device is gone, the whole volume is compared.
//! 2. A device is taken over only with a filter over the ring that was found, and that ring is used again only when all I/O of the
//!    dead agent has ended (`attach.rs`).
//! 3. Only an unused device is ever taken away. What is mounted or open waits for the next agent, at an orderly stop, too.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farshore_nbd::Listen;
use farshore_ublk::{Control, DeviceState, ErrorKind, Stop};
use farshore_uring::BlockDevice;

use crate::devices::opener;
use crate::state::UblkDisk;
use crate::{Error, Result, attach, clock};

/// How long somebody may look at a device that is to go.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Most queues of a device. Each is a thread with a ring; from four on they get in each other's way at the one capture ring.
const QUEUES_MAX: usize = 4;

/// Processors for each queue. A queue's thread runs on the processors that its requests come from. With one for each it takes its
/// guest's only processor away (measured: a third of the requests per second, `docs/decisions/0006-ublk-data-path.md`).
const PROCESSORS_PER_QUEUE: usize = 2;

/// How long a takeover waits for the kernel to end the I/O of the dead agent. Its disk has been opened by then, so that I/O has
/// ended already; what is left is the kernel's own tidying.
const TAKEOVER_MAX: Duration = Duration::from_secs(30);

/// Where a volume is to be served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frontend {
    /// NBD, at this address.
    Nbd(Listen),
    /// `/dev/ublkbN`; none: any number, the last one if it is free.
    Ublk(Option<u32>),
}

impl Frontend {
    /// `nbd+unix:PATH`, `nbd+tcp:IP:PORT`, `ublk` or `ublk:N`.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |reason: &str| Err(Error::Setting { key: "frontend", reason: format!("{text:?} {reason}") });
        if text == "ublk" {
            return Ok(Self::Ublk(None));
        }
        if let Some(number) = text.strip_prefix("ublk:") {
            return match number.parse() {
                Ok(number) if number < 1 << 20 => Ok(Self::Ublk(Some(number))),
                _ => bad("needs a number below 1048576, the N of /dev/ublkbN"),
            };
        }
        if let Some(path) = text.strip_prefix("nbd+unix:") {
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                return bad("needs an absolute path");
            }
            return Ok(Self::Nbd(Listen::Unix { path, mode: 0o600 }));
        }
        if let Some(address) = text.strip_prefix("nbd+tcp:") {
            return match address.parse::<SocketAddr>() {
                Ok(address) => Ok(Self::Nbd(Listen::Tcp(address))),
                Err(_) => bad("needs IP:PORT"),
            };
        }
        bad("is none of ublk, ublk:N, nbd+unix:PATH and nbd+tcp:IP:PORT")
    }

    /// Whether this host can serve volumes this way at all. To be asked before anything is made for one.
    ///
    /// # Errors
    /// No ublk in this kernel, or not allowed; with the way out.
    pub(crate) fn check_host(&self) -> Result<()> {
        match self {
            Self::Nbd(_) => Ok(()),
            Self::Ublk(_) => Control::open().map(drop).map_err(|error| ublk_error("front end ublk", &error)),
        }
    }

    /// Serves `device`. `disk` is what is kept of the volume's last device; if that waits for its server, it is taken over.
    ///
    /// # Errors
    /// The server's. A device that waits goes on waiting.
    pub(crate) fn serve<D: BlockDevice>(
        &self,
        description: &str,
        disk: Option<&UblkDisk>,
        device: Arc<D>,
    ) -> Result<Server> {
        let subject = || format!("volume {description}");
        match self {
            Self::Nbd(listen) => {
                let mut config = farshore_nbd::ServerConfig::new("", listen.clone());
                config.description = description.to_owned();
                let server = farshore_nbd::Server::start(config, device);
                server.map(Server::Nbd).map_err(|error| Error::failed(subject(), crate::error::chain(&error)))
            }
            Self::Ublk(wanted) => {
                let waiting = disk.map(surviving).transpose()?.flatten();
                let server = match waiting {
                    Some(id) => farshore_ublk::Server::recover(id, TAKEOVER_MAX, device),
                    None => make(*wanted, disk.map(|disk| disk.id), &device),
                };
                server.map(|server| Server::Ublk(Box::new(server))).map_err(|error| ublk_error(&subject(), &error))
            }
        }
    }
}

/// Makes a device: with the number that was asked for, else with the last one if that is free.
fn make<D: BlockDevice>(
    wanted: Option<u32>,
    last: Option<u32>,
    device: &Arc<D>,
) -> std::result::Result<farshore_ublk::ServerHandle, farshore_ublk::Error> {
    let control = Control::open()?;
    let first = wanted.or(last);
    if let Some(id) = first
        && control.info(id).is_ok_and(|info| info.is_stale())
    {
        tracing::info!(id, "a ublk device without a disk and without a server is removed");
        control.delete(id)?;
    }
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let queues = u16::try_from((processors / PROCESSORS_PER_QUEUE).clamp(1, QUEUES_MAX)).unwrap_or(1);
    let config = farshore_ublk::ServerConfig { id: first, queues, ..farshore_ublk::ServerConfig::default() };
    match farshore_ublk::Server::start_with(control, config, Arc::clone(device)) {
        Err(error) if error.kind() == ErrorKind::Busy && wanted.is_none() && first.is_some() => {
            farshore_ublk::Server::start(farshore_ublk::ServerConfig { id: None, ..config }, Arc::clone(device))
        }
        started => started,
    }
}

/// A volume's server.
pub(crate) enum Server {
    Nbd(farshore_nbd::ServerHandle),
    Ublk(Box<farshore_ublk::ServerHandle>),
}

/// Why a server has not been stopped.
pub(crate) enum NotStopped {
    /// Somebody uses the device; nothing has changed.
    InUse(Error),
    Failed(Error),
}

impl Server {
    /// What a guest opens; none once it is not served any more.
    pub(crate) fn address(&self) -> Option<String> {
        match self {
            Self::Nbd(server) => server.uri(),
            Self::Ublk(server) => server.is_serving().then(|| server.block_path().display().to_string()),
        }
    }

    /// Whether a block device is served no longer, though nobody asked for that.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(self, Self::Ublk(server) if server.has_failed())
    }

    /// Of each queue of a block device the turn that does not end; see [`ServerHandle::turns_under_way`].
    pub(crate) fn turns_under_way(&self) -> Vec<Option<u64>> {
        match self {
            Self::Nbd(_) => Vec::new(),
            Self::Ublk(server) => server.turns_under_way(),
        }
    }

    /// What is to be kept of a device that outlives this process.
    pub(crate) fn disk(&self) -> Option<UblkDisk> {
        match self {
            Self::Nbd(_) => None,
            Self::Ublk(server) => {
                let id = server.id();
                let sequence = sequence(id).ok().flatten();
                Some(UblkDisk { id, sequence, boot: attach::boot_text().unwrap_or_default() })
            }
        }
    }

    /// Stops a block device below the device mapper, which its users do not go through any more. Waits for udev's look at it.
    ///
    /// # Errors
    /// Somebody has claimed it all the same, or the kernel refuses.
    pub(crate) fn stop_unused(&self) -> Result<()> {
        let Self::Ublk(server) = self else { return Ok(()) };
        stop_unused(server)
    }

    /// Stops serving, unless it is a block device that somebody uses.
    pub(crate) fn stop(&self) -> std::result::Result<(), NotStopped> {
        match self {
            Self::Nbd(server) => server.stop().map_err(|error| NotStopped::Failed(Error::failed("front end", error))),
            Self::Ublk(server) => {
                let path = server.block_path();
                if let Some(pid) = opener(&path) {
                    return Err(NotStopped::InUse(in_use(&path, &format!("process {pid} has it open"))));
                }
                server.stop(Stop::IfUnused).map_err(|error| {
                    if error.kind() == ErrorKind::Busy {
                        NotStopped::InUse(in_use(&path, "it is mounted, or held by device mapper or swap"))
                    } else {
                        NotStopped::Failed(ublk_error("front end", &error))
                    }
                })
            }
        }
    }
}

/// Stops a block device that nobody uses. Waits for udev's look at it.
///
/// # Errors
/// Somebody uses it all the same, or the kernel refuses.
pub(crate) fn stop_unused(server: &farshore_ublk::ServerHandle) -> Result<()> {
    let deadline = clock::now().plus(LOOK_MAX);
    loop {
        match server.stop(Stop::IfUnused) {
            Err(error) if error.kind() == ErrorKind::Busy && clock::now() < deadline => {
                // There is no event for "the last one has closed it".
                let _ = nix::poll::poll(&mut [], 10u8);
            }
            stopped => return stopped.map_err(|error| ublk_error("front end", &error)),
        }
    }
}

/// The device that a dead agent served and that waits for the next one: the very same, not another of its number.
///
/// # Errors
/// It cannot be told (no memory, no descriptors): it is not to be given up for that.
pub(crate) fn surviving(disk: &UblkDisk) -> Result<Option<u32>> {
    if disk.sequence.is_none() || attach::boot_text()? != disk.boot {
        return Ok(None);
    }
    let named = format!("device /dev/ublkb{}", disk.id);
    let now = sequence(disk.id).map_err(|error| Error::failed(named.clone(), error))?;
    if now != disk.sequence {
        return Ok(None);
    }
    let info = match Control::open().and_then(|control| control.info(disk.id)) {
        Ok(info) => info,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NoDriver) => return Ok(None),
        Err(error) => return Err(Error::failed(named, crate::error::chain(&error))),
    };
    // Right after a kill the kernel may still call it live.
    let waits = matches!(info.state(), DeviceState::Live | DeviceState::Quiesced);
    Ok((waits && info.survives_its_server()).then_some(disk.id))
}

/// Whether [`surviving`] gives a device, or cannot tell.
pub(crate) fn may_survive(disk: &UblkDisk) -> bool {
    surviving(disk).map_or(true, |id| id.is_some())
}

/// Removes a device that waits for its server, for a volume that is given up.
///
/// # Errors
/// [`Error::Refused`] while somebody uses it.
pub(crate) fn remove_waiting(disk: &UblkDisk) -> Result<()> {
    let Some(id) = surviving(disk)? else { return Ok(()) };
    let control = Control::open().map_err(|error| ublk_error("front end", &error))?;
    let info = control.info(id).map_err(|error| ublk_error("front end", &error))?;
    let path = info.block_path();
    if let Some(pid) = opener(&path) {
        return Err(in_use(&path, &format!("process {pid} has it open")));
    }
    // Held until the disk is gone, so that nobody mounts it meanwhile.
    let held = open_exclusive(&path).map_err(|error| in_use(&path, &error.to_string()))?;
    let deleted = control.delete(id);
    drop(held);
    deleted.map_err(|error| ublk_error("front end", &error))
}

fn open_exclusive(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::File::options().read(true).custom_flags(nix::libc::O_EXCL | nix::libc::O_CLOEXEC).open(path)
}

fn in_use(path: &Path, how: &str) -> Error {
    Error::Refused {
        what: format!("device {}", path.display()),
        reason: format!("is in use: {how}"),
        hint: "unmount it, or end whatever uses it; an agent that stops leaves it waiting for the next one".into(),
    }
}

fn ublk_error(subject: &str, error: &farshore_ublk::Error) -> Error {
    let reason = crate::error::chain(error);
    if error.kind() != ErrorKind::Busy {
        return Error::Failed { what: subject.to_owned(), reason };
    }
    Error::Refused {
        what: subject.to_owned(),
        reason,
        hint: "let the kernel choose the number with --frontend ublk".into(),
    }
}

/// The kernel's number of a disk: never given twice in one boot, whatever the disk is called.
/// None: there is no such disk, or the kernel has no such number.
fn sequence(id: u32) -> std::io::Result<Option<u64>> {
    match std::fs::read_to_string(format!("/sys/block/ublkb{id}/diskseq")) {
        Ok(text) => Ok(text.trim().parse().ok()),
        // The disk went away while it was read, in the second case.
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_ends_by_their_names() {
        assert_eq!(Frontend::parse("ublk").expect("good"), Frontend::Ublk(None));
        assert_eq!(Frontend::parse("ublk:7").expect("good"), Frontend::Ublk(Some(7)));
        assert!(matches!(Frontend::parse("nbd+unix:/run/a").expect("good"), Frontend::Nbd(Listen::Unix { .. })));
        for bad in ["ublk:", "ublk:x", "ublk:-1", "ublk:1048576", "ublk0", "nbd+unix:a", "nbd+tcp:x", "iscsi:1"] {
            let error = Frontend::parse(bad).expect_err(bad);
            assert!(error.exit_code() == 2 && error.to_string().contains(bad), "{error}");
        }
    }

    #[test]
    fn a_device_of_another_boot_or_of_none_does_not_survive() {
        let boot = attach::boot_text().expect("Linux");
        assert_eq!(surviving(&UblkDisk { id: 1_048_575, sequence: None, boot: boot.clone() }).expect("told"), None);
        assert_eq!(surviving(&UblkDisk { id: 1_048_575, sequence: Some(1), boot }).expect("told"), None);
        assert_eq!(surviving(&UblkDisk { id: 0, sequence: Some(1), boot: "another".into() }).expect("told"), None);
    }

    /// Where there is no driver, it says which option is missing and what to do without; where there is one, all is well.
    #[test]
    fn a_host_without_ublk_is_told_the_way_out() {
        if let Err(error) = Frontend::Ublk(None).check_host() {
            let text = error.to_string();
            let helps = ["CONFIG_BLK_DEV_UBLK", "root", "devtmpfs", "io_uring"].iter().any(|part| text.contains(part));
            assert!(helps && error.exit_code() == 1, "{text}");
        }
    }
}
