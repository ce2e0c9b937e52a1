//! Rate at which the target takes batches.

use std::time::Duration;

use farshore_proto::Now;

/// Time over which one reading is taken.
const SPAN: Duration = Duration::from_millis(200);

/// Bytes per second, smoothed over about a second. Only time with batches under way counts, so an idle stream does not make
/// the link look slow.
#[derive(Clone, Debug)]
pub(super) struct Meter {
    rate: f64,
    bytes: u64,
    busy: Duration,
    since: Option<Now>,
}

impl Meter {
    pub(super) fn new() -> Self {
        Self { rate: 0.0, bytes: 0, busy: Duration::ZERO, since: None }
    }

    /// Batches are (or are no longer) under way.
    pub(super) fn handle_busy(&mut self, now: Now, busy: bool) {
        if let Some(since) = self.since.take() {
            self.busy += now.since(since);
        }
        if busy {
            self.since = Some(now);
        }
        if self.busy >= SPAN {
            let reading = self.bytes as f64 / self.busy.as_secs_f64();
            // About five readings to follow a change.
            self.rate = if self.rate == 0.0 { reading } else { self.rate * 0.7 + reading * 0.3 };
            self.bytes = 0;
            self.busy = Duration::ZERO;
        }
    }

    /// The target took `bytes`.
    pub(super) fn handle_taken(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// Bytes per second.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate is positive and far below 2^63"
    )]
    pub(super) fn rate(&self) -> u64 {
        self.rate as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_does_not_count() {
        let mut meter = Meter::new();
        let mut now = Now(0);
        for _ in 0..100 {
            meter.handle_busy(now, true);
            now = now.plus(Duration::from_millis(50));
            meter.handle_taken(5_000_000);
            meter.handle_busy(now, false);
            now = now.plus(Duration::from_secs(3));
        }
        assert!((99_000_000..=101_000_000).contains(&meter.rate()), "{}", meter.rate());
    }
}
