//! The one place of this crate that reads the clock, or asks about it.

use std::io;
use std::time::Instant;

/// For the driver's own business only: turning deadlines into the durations that the kernel wants, and bounding its waits.
pub(crate) fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "the reactor is the driver that waits for the machines")]
    Instant::now()
}

/// Whether the kernel thinks that something keeps the system's clock right (`adjtimex(2)`): an NTP client, or a hypervisor's.
///
/// # Errors
/// The kernel does not say (a seccomp profile).
pub fn is_clock_synchronised() -> io::Result<bool> {
    // SAFETY: `timex` is a C struct of integers, for which all zeroes is a value; without a mode nothing is changed.
    let mut time: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `time` is writable and of the kernel's type; the kernel keeps no reference to it.
    let state = unsafe { libc::adjtimex(&raw mut time) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(state != libc::TIME_ERROR && time.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the answer is on this machine, there is one.
    #[test]
    fn the_kernel_tells_of_its_clock() {
        is_clock_synchronised().expect("adjtimex without a mode is allowed to everybody");
    }
}
