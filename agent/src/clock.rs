//! The clocks that the agent's threads hand to the machines.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use farshore_proto::{Now, WallTime};

static ZERO: OnceLock<Instant> = OnceLock::new();

/// The monotonic clock; one zero for the whole process.
#[expect(clippy::disallowed_methods, reason = "this is where the clock is read for those who may not")]
pub(crate) fn now() -> Now {
    let zero = *ZERO.get_or_init(Instant::now);
    Now(u64::try_from(zero.elapsed().as_nanos()).unwrap_or(u64::MAX))
}

/// The instant of a [`Now`].
#[expect(clippy::disallowed_methods, reason = "as above")]
pub(crate) fn instant(at: Now) -> Instant {
    *ZERO.get_or_init(Instant::now) + std::time::Duration::from_nanos(at.0)
}

/// The wall clock.
#[expect(clippy::disallowed_methods, reason = "as above")]
pub(crate) fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
