//! What a daemon tells its service manager (sd_notify): ready, stopping, and that it still turns. Without one every call does
//! nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// Signs of life within one watchdog period. Two may get lost, or come late, before the manager acts.
const SIGNS_PER_PERIOD: u32 = 3;

/// The service manager, if this process was started by one that wants to hear.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manager {
    /// Longest time between two signs of life; `None`: it does not watch.
    period: Option<Duration>,
}

impl Manager {
    /// As the environment says (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`).
    pub(crate) fn from_environment() -> Self {
        Self { period: sd_notify::watchdog_enabled() }
    }

    /// Starting has ended: what is ordered after this service may start.
    pub(crate) fn ready(self, status: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// Begins to stop. No more signs of life are owed.
    pub(crate) fn stopping(self) {
        self.tell(&[NotifyState::Stopping, NotifyState::Status("stopping in order")]);
    }

    /// A sign of life. The manager kills and restarts a process that is late with it.
    pub(crate) fn alive(self) {
        self.tell(&[NotifyState::Watchdog]);
    }

    /// How often [`Self::alive`] is to be called; `None`: never.
    pub(crate) fn interval(self) -> Option<Duration> {
        self.period.map(|period| period / SIGNS_PER_PERIOD)
    }

    /// Gives signs of life from the runtime that polls this: they stop when that runtime stops turning. Never ends.
    pub(crate) async fn keep_telling(self) {
        let Some(interval) = self.interval() else { return std::future::pending().await };
        loop {
            self.alive();
            tokio::time::sleep(interval).await;
        }
    }

    #[expect(clippy::unused_self, reason = "whoever tells has looked who listens")]
    fn tell(self, states: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(states) {
            tracing::warn!(%error, "the service manager cannot be told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: signs come often enough that one may be lost, and never where nobody watches.
    #[test]
    fn signs_come_well_within_the_period() {
        let watched = Manager { period: Some(Duration::from_secs(30)) };
        assert!(watched.interval().expect("watched") * 2 < Duration::from_secs(30));
        assert_eq!(Manager { period: None }.interval(), None);
    }
}
