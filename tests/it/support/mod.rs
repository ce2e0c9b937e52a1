//! What the tests stand on: both sites in a folder of their own, a guest that knows what it wrote, foreign programs.

pub(crate) mod device;
pub(crate) mod guest;
pub(crate) mod pattern;
pub(crate) mod rig;
pub(crate) mod run;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

pub(crate) use farshore_cli::sites::pause;
pub(crate) use guest::Guest;
pub(crate) use rig::Rig;

/// Longest that anything is waited for. Only a hang gets there: a busy machine needs a small part of it.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// [`LIMIT`] as the agent's API wants it.
pub(crate) const LIMIT_SECONDS: u64 = 120;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// Asks again and again until there is an answer. An error ends it.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = look()? {
            return Ok(answer);
        }
        ensure!(begin.elapsed() < LIMIT, "waited {LIMIT:?} in vain: {what}");
        pause(Duration::from_millis(10));
    }
}

/// A number from the environment, else `default`.
pub(crate) fn number(variable: &str, default: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().map_err(|_| anyhow::anyhow!("{variable}={text} is no number")),
        Err(_) => Ok(default),
    }
}
