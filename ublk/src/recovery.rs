//! From one server to the next.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::control::{Control, now};
use crate::error::{Error, ErrorKind};
use crate::info::{DeviceState, is_alive};

/// Tags of a queue that never carry a request.
///
/// Until Linux 6.14 (seen on 6.12) the driver learns of its server's death by the commands that the kernel then cancels. A queue
/// of which every tag is under way has none with the kernel, and such a death is seen only when a request times out (30 s by default): that
/// long its guests stand still, and all who ask for the device with them. So the queue is made one deeper than the block
/// layer may use ([`show_deaths`]).
pub(crate) const IDLE_TAGS: u16 = 1;

/// After how long the block layer asks the driver about a request: nothing happens to it while its server lives, so this is
/// about how late a death is seen where the queue has its full depth again: setting another scheduler does that. (Seen on
/// Linux 6.12: at once with an idle tag, after 2 s with this alone, after 32 s with neither.)
const REQUEST_CHECK: Duration = Duration::from_secs(1);

/// Makes the kernel see at once when the device's server dies. `depth` is the driver's.
pub(crate) fn show_deaths(id: u32, depth: u16) {
    let settings = [
        ("nr_requests", u64::from(depth.saturating_sub(IDLE_TAGS))),
        ("io_timeout", u64::try_from(REQUEST_CHECK.as_millis()).expect("a second")),
    ];
    for (name, wanted) in settings {
        let path = PathBuf::from(format!("/sys/block/ublkb{id}/queue/{name}"));
        // Setting what is there already would drain the queue for nothing.
        let is = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        if is == Some(wanted) {
            continue;
        }
        if let Err(error) = std::fs::write(&path, wanted.to_string()) {
            let path = path.display();
            tracing::warn!(id, %path, wanted, %error, "a dead server of this device may be noticed late: set this by hand");
        }
    }
}

/// Waits until the kernel has noticed that the old server is gone. Asks for nothing that its driver answers only after that.
pub(crate) fn await_death(control: &Control, id: u32, deadline: Instant) -> Result<(), Error> {
    loop {
        let state = control.info(id)?.state();
        match state {
            DeviceState::Quiesced | DeviceState::FailIo => return Ok(()),
            DeviceState::Live | DeviceState::Other(_) if now() < deadline => pause(),
            DeviceState::Live | DeviceState::Other(_) => return Err(still_there(control, id, None)),
            DeviceState::Dead => {
                let what = format!("cannot recover ublk device {id}: it is stopped; delete it and start a new one");
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        }
    }
}

/// Begins to take over a device whose old server is gone; waits until the I/O of that one has ended.
pub(crate) fn begin(control: &Control, id: u32, deadline: Instant) -> Result<(), Error> {
    loop {
        let error = match control.begin_recovery(id) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if now() < deadline => pause(),
            Some(libc::EBUSY) => return Err(still_there(control, id, Some(error))),
            // A recovery was begun before, and broke off before its first queue was ready: nothing is left to begin.
            Some(libc::EINVAL) if control.info(id)?.state() != DeviceState::Dead => return Ok(()),
            _ => return Err(Error::system(format!("begin to recover ublk device {id}"), error)),
        }
    }
}

fn still_there(control: &Control, id: u32, error: Option<std::io::Error>) -> Error {
    let who = match control.info(id).ok().and_then(|info| info.server_pid()) {
        Some(pid) if is_alive(pid) => format!("process {pid} still serves it, or another holds its queues"),
        Some(_) | None => "I/O of its old server has not ended: the disk below hangs".to_owned(),
    };
    let refused = Error::new(ErrorKind::Busy, format!("cannot recover ublk device {id}: {who}"));
    match error {
        Some(error) => refused.because(error),
        None => refused,
    }
}

/// A moment until the kernel may have got further: there is no event for it.
pub(crate) fn pause() {
    let _ = nix::poll::poll(&mut [], 2u8);
}
