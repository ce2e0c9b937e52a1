//! The one place of this crate that reads the clock.

use std::time::Instant;

/// For the driver's own business only: turning deadlines into the durations that the kernel wants, and bounding its waits.
pub(crate) fn now() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "the reactor is the driver that waits for the machines")]
    Instant::now()
}
