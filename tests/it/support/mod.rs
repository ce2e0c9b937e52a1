//! What the tests stand on: both sites in a folder of their own, a guest that knows what it wrote, foreign programs.

pub(crate) mod device;
pub(crate) mod guest;
pub(crate) mod pattern;
pub(crate) mod rig;

use anyhow::Result;

pub(crate) use farshore_cli::sites::pause;
pub(crate) use farshore_cli::sites::run::{LIMIT, until};
pub(crate) use guest::Guest;
pub(crate) use rig::Rig;

/// [`LIMIT`] as the agent's API wants it.
pub(crate) const LIMIT_SECONDS: u64 = 120;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// A number from the environment, else `default`.
pub(crate) fn number(variable: &str, default: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().map_err(|_| anyhow::anyhow!("{variable}={text} is no number")),
        Err(_) => Ok(default),
    }
}
