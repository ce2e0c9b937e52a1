//! How much of the time the frame check may take: all of it while the source is quiet, a tenth while it sends and the check is not
//! far behind.
//!
//! The check costs about as much per byte as taking a batch does. Beside a source that sends as fast as it can it took a fifth of
//! both processors from the link and the lane; what it finds is not worth less a minute later. But only what was checked while it was
//! recent is leased, and nothing should be dropped unchecked: so a check that falls behind is not held back.

use std::time::Duration;

use farshore_proto::Now;

/// A source that sent nothing for so long is quiet.
const QUIET: Duration = Duration::from_millis(200);
/// Pause after work beside a source that sends, in lengths of that work.
const PAUSE: u32 = 9;
/// Longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Paces the check of one stream.
#[derive(Debug)]
pub(crate) struct Pace {
    received: u64,
    sent_at: Now,
    next: Now,
}

impl Pace {
    pub(crate) fn new(now: Now) -> Self {
        Self { received: 0, sent_at: now, next: now }
    }

    /// How long to wait before the next piece of work; zero: not at all. `received`: bytes that the source has sent so far;
    /// `behind`: the check must catch up.
    pub(crate) fn wait(&mut self, now: Now, received: u64, behind: bool) -> Duration {
        if received != self.received {
            self.received = received;
            self.sent_at = now;
        }
        if behind || now.since(self.sent_at) >= QUIET { Duration::ZERO } else { self.next.since(now) }
    }

    /// Work was done from `begin` to `end`.
    pub(crate) fn worked(&mut self, begin: Now, end: Now) {
        self.next = end.plus((end.since(begin) * PAUSE).min(PAUSE_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_sends_goes_first() {
        let at = |ms: u64| Now(ms * 1_000_000);
        let mut pace = Pace::new(at(0));
        assert_eq!(pace.wait(at(1), 10, false), Duration::ZERO, "the first piece");
        pace.worked(at(1), at(3));
        assert_eq!(pace.wait(at(4), 20, false), Duration::from_millis(17), "nine times as long as it worked");
        assert_eq!(pace.wait(at(21), 30, false), Duration::ZERO);
        pace.worked(at(21), at(1021));
        assert_eq!(pace.wait(at(1021), 40, true), Duration::ZERO, "too far behind");
        assert_eq!(pace.wait(at(1021), 40, false), PAUSE_MAX);
        assert_eq!(pace.wait(at(1220), 40, false), Duration::from_millis(801), "not quiet for long enough");
        assert_eq!(pace.wait(at(1221), 40, false), Duration::ZERO, "quiet: as fast as it goes");
    }
}
