//! The age of the newest point, whatever the wall clock does.

use std::time::Duration;

use farshore_proto::{Now, WallTime};

/// Knows since when the newest point is the newest. A wall clock that goes back, by a correction or with a battery that is empty, would
/// make it look as young as if it had just been made, for as long as the step was: the one figure that must not look good while nothing
/// arrives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Age {
    newest: WallTime,
    since: Now,
}

impl Age {
    pub(crate) const fn new(now: Now) -> Self {
        Self { newest: WallTime(0), since: now }
    }

    /// The time of the newest point; called whenever it may be another.
    pub(crate) fn handle_newest(&mut self, now: Now, newest: WallTime) {
        if newest != self.newest {
            *self = Self { newest, since: now };
        }
    }

    /// At least as old as the wall clock said, and as long as it has been the newest here.
    pub(crate) fn at_least(&self, now: Now, by_wall: Duration) -> Duration {
        by_wall.max(now.since(self.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 86_400 * SECOND;

    /// Goal: with no new point the age grows, also when the wall clock goes back a day; with one it begins anew; a clock that is right
    /// is believed where it knows more (after a restart).
    #[test]
    fn a_clock_that_goes_back_does_not_make_a_point_young() {
        let mut age = Age::new(Now(0));
        let newest = WallTime(100 * DAY);
        age.handle_newest(Now(5 * SECOND), newest);
        let at = |age: &Age, seconds: u64, wall: u64| {
            age.at_least(Now(seconds * SECOND), WallTime(wall).since(newest)).as_secs()
        };
        assert_eq!(at(&age, 6, 100 * DAY + SECOND), 1);
        age.handle_newest(Now(6 * SECOND), newest);
        assert_eq!(at(&age, 65, 99 * DAY), 60, "the clock is a day behind");
        assert_eq!(at(&age, 65, 101 * DAY), 86_400, "it was made long before this process");
        let newest = WallTime(99 * DAY + 70 * SECOND);
        age.handle_newest(Now(70 * SECOND), newest);
        assert_eq!(age.at_least(Now(71 * SECOND), WallTime(99 * DAY + 71 * SECOND).since(newest)).as_secs(), 1);
    }
}
