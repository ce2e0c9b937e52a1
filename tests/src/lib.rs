//! What the tests that run more than one crate share: harness and fuzz targets.
#![forbid(unsafe_code)]

#[cfg(test)]
mod docs;
pub mod fuzz;
pub mod log_writes;
pub mod partial_order;

use std::time::SystemTime;

use farshore_proto::WallTime;

/// The wall clock, as the sites under test read it.
#[must_use]
pub fn wall() -> WallTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
