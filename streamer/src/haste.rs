//! When shipping takes processors from those who are served.
//!
//! | | begins | ends |
//! |---|---|---|
//! | cells or descriptors in use | more than half | at most a quarter |
//! | age of the newest recoverable point | 60 s | under 20 s |
//! | no recoverable point, or none at present (an event is open) | at once | at the first |
//! | stopping | at once | |
//!
//! It begins with any line and ends when all allow it.

use std::time::Duration;

use farshore_uring::Haste;

use crate::source::Fill;

const OLD: Duration = Duration::from_secs(60);
const YOUNG: Duration = Duration::from_secs(20);

/// What the decision needs of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    /// The ring.
    pub(crate) fill: Fill,
    /// Age of the newest recoverable point that is durable at the target.
    pub(crate) age: Option<Duration>,
    /// What is durable cannot be recovered to before an event ends.
    pub(crate) event_open: bool,
}

impl Pressure {
    fn begins(&self) -> bool {
        let Fill { used_bytes, size_bytes, used_entries, size_entries } = self.fill;
        let half = used_bytes > size_bytes / 2 || used_entries > size_entries / 2;
        half || self.event_open || self.age.is_none_or(|age| age >= OLD)
    }

    fn ends(&self) -> bool {
        self.fill.is_low() && !self.event_open && self.age.is_some_and(|age| age < YOUNG)
    }
}

/// Whether the threads that ship are in haste.
#[derive(Debug, Default)]
pub(crate) struct Urgency(Option<Haste>);

impl Urgency {
    pub(crate) fn handle(&mut self, pressure: Pressure, stopping: bool) {
        match self.0 {
            None if stopping || pressure.begins() => self.0 = Some(Haste::begin()),
            Some(_) if !stopping && pressure.ends() => self.0 = None,
            None | Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pressure(used_bytes: u64, age: Option<u64>) -> Pressure {
        let fill = Fill { used_bytes, size_bytes: 100, used_entries: 0, size_entries: 100 };
        Pressure { fill, age: age.map(Duration::from_secs), event_open: false }
    }

    /// Goal: the table. Method: one situation after the other, each with what must hold after it.
    #[test]
    fn haste_begins_with_any_need_and_ends_with_the_last() {
        let mut urgency = Urgency::default();
        let calm = pressure(20, Some(1));
        let entries = Pressure { fill: Fill { used_entries: 51, ..calm.fill }, ..calm };
        let event = Pressure { event_open: true, ..calm };
        let steps = [
            (pressure(0, None), false, true),
            (calm, false, false),
            (pressure(50, Some(59)), false, false),
            (pressure(51, Some(1)), false, true),
            (pressure(26, Some(1)), false, true),
            (pressure(25, Some(1)), false, false),
            (pressure(0, Some(60)), false, true),
            (pressure(0, Some(20)), false, true),
            (pressure(0, Some(19)), false, false),
            (entries, false, true),
            (calm, false, false),
            (event, false, true),
            (calm, false, false),
            (calm, true, true),
            (calm, true, true),
        ];
        for (step, (pressure, stopping, expected)) in steps.into_iter().enumerate() {
            urgency.handle(pressure, stopping);
            assert_eq!(urgency.0.is_some(), expected, "step {step}");
        }
    }
}
