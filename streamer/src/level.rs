//! How hard to compress: harder while the link is what we wait for or there is little to do, less while it is the processor.

use std::time::Duration;

use farshore_proto::Now;

use crate::seal::Level;

/// Levels from the cheapest; above 3, zstd gains little on 64 KiB.
const LADDER: [Level; 6] = [None, Some(-20), Some(-7), Some(-1), Some(1), Some(3)];
/// How far down it goes by itself. Not to none: a byte on the wire costs more of the processor (sealing, QUIC, the copy into the
/// kernel) than zstd takes for a byte at −20, and what does not look as if it could shrink is not tried at any level
/// (`docs/decisions/0007-never-uncompressed.md`).
const FLOOR: usize = 1;
/// Where it begins: cheap, and right for the link that protection usually has.
const START: usize = 2;
/// How often it decides. Several batches, so that one slow acknowledgement decides nothing.
const INTERVAL: Duration = Duration::from_millis(100);
/// Up to this share of the workers' time (percent) there is little to do: bytes on the wire and in the journal cost more than
/// the processor does. Far enough below the share at which a short processor sends it down that one step up does not undo itself.
const LIGHT: u128 = 10;
/// Intervals of the same wish before a step up. Down goes at once: a guest pays for the processor.
const PATIENCE: u32 = 3;

/// Chooses the level from how long we waited for the link and how busy the workers were. Deterministic in its inputs.
///
/// | link limits | workers busy | processor short | step |
/// |---|---|---|---|
/// | ≥ 1/2 of the time | < 60 % | no | up, after three intervals |
/// | – | some, < 10 % | – | up, after three intervals |
/// | < 1/2 | > 50 % | – | down |
/// | – | > 20 % | yes | two down |
/// | else | | | stay |
#[derive(Clone, Debug)]
pub struct LevelControl {
    step: usize,
    cap: usize,
    wishes: u32,
    since: Now,
    limited: Duration,
    limited_since: Option<Now>,
    busy: Duration,
    starved: Duration,
    workers: u32,
}

impl LevelControl {
    /// For `workers` threads; never above `max` (zstd's level, or none).
    #[must_use]
    pub fn new(workers: u32, max: Level, now: Now) -> Self {
        let cap = LADDER.iter().rposition(|level| *level <= max).unwrap_or(0);
        Self {
            step: START.min(cap),
            cap,
            wishes: 0,
            since: now,
            limited: Duration::ZERO,
            limited_since: None,
            busy: Duration::ZERO,
            starved: Duration::ZERO,
            workers: workers.max(1),
        }
    }

    /// The level for the next batch.
    #[must_use]
    pub fn level(&self) -> Level {
        LADDER[self.step]
    }

    /// From now on there is (or is not) data that waits for nothing but the link.
    pub fn handle_limited(&mut self, now: Now, limited: bool) {
        match (self.limited_since, limited) {
            (None, true) => self.limited_since = Some(now),
            (Some(since), false) => {
                self.limited += now.since(since.max(self.since));
                self.limited_since = None;
            }
            (None, false) | (Some(_), true) => {}
        }
    }

    /// A worker was at it for `busy`, of which it stood in line for the processor for `starved`.
    pub fn handle_work(&mut self, busy: Duration, starved: Duration) {
        self.busy += busy;
        self.starved += starved.min(busy);
    }

    /// Decides, if it is time.
    pub fn handle_timeout(&mut self, now: Now) {
        let elapsed = now.since(self.since);
        if elapsed < INTERVAL {
            return;
        }
        let limited =
            self.limited + self.limited_since.map_or(Duration::ZERO, |since| now.since(since.max(self.since)));
        let limited = limited * 2 >= elapsed;
        let busy = percent(self.busy, elapsed * self.workers);
        let short = percent(self.starved, self.busy) >= 25;
        self.decide(limited, busy, short);
        self.since = now;
        self.limited = Duration::ZERO;
        self.busy = Duration::ZERO;
        self.starved = Duration::ZERO;
    }

    fn decide(&mut self, limited: bool, busy: u128, short: bool) {
        if short && busy > 20 {
            self.wishes = 0;
            self.down(2);
        } else if !limited && busy > 50 {
            self.wishes = 0;
            self.down(1);
        } else if (limited && busy < 60 && !short) || (0 < busy && busy < LIGHT) {
            self.wishes += 1;
            if self.wishes >= PATIENCE {
                self.wishes = 0;
                self.step = (self.step + 1).min(self.cap);
            }
        } else {
            self.wishes = 0;
        }
    }

    fn down(&mut self, steps: usize) {
        self.step = self.step.saturating_sub(steps).max(FLOOR.min(self.cap));
    }

    /// When to call [`Self::handle_timeout`] while there is work.
    #[must_use]
    pub fn deadline(&self) -> Now {
        self.since.plus(INTERVAL)
    }
}

fn percent(part: Duration, whole: Duration) -> u128 {
    part.as_nanos() * 100 / whole.as_nanos().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `intervals` with a share of time limited by the link, busy and starved workers (per cent).
    fn run(control: &mut LevelControl, now: &mut Now, intervals: u32, limited: u64, busy: u64, starved: u64) {
        for _ in 0..intervals {
            control.handle_limited(*now, limited > 0);
            control.handle_limited(now.plus(Duration::from_millis(limited)), false);
            control.handle_work(Duration::from_millis(busy), Duration::from_millis(busy * starved / 100));
            *now = now.plus(INTERVAL);
            control.handle_timeout(*now);
        }
    }

    #[test]
    fn a_slow_link_raises_and_a_short_processor_drops() {
        let mut now = Now(5);
        let mut control = LevelControl::new(1, Some(3), now);
        assert_eq!(control.level(), Some(-7));
        run(&mut control, &mut now, 3, 90, 15, 0);
        assert_eq!(control.level(), Some(-1), "one step after three intervals");
        run(&mut control, &mut now, 30, 90, 30, 0);
        assert_eq!(control.level(), Some(3), "as hard as it goes");
        run(&mut control, &mut now, 10, 90, 80, 0);
        assert_eq!(control.level(), Some(3), "link and workers both full: balance");
        run(&mut control, &mut now, 2, 100, 40, 50);
        assert_eq!(control.level(), Some(-20), "processor short: down within 200 ms, and no further");
        run(&mut control, &mut now, 50, 0, 0, 0);
        assert_eq!(control.level(), Some(-20), "idle changes nothing");
        run(&mut control, &mut now, 50, 0, 15, 0);
        assert_eq!(control.level(), Some(-20), "some load on a fast link changes nothing");
        run(&mut control, &mut now, 3, 90, 15, 0);
        assert_eq!(control.level(), Some(-7));
        run(&mut control, &mut now, 9, 0, 90, 0);
        assert_eq!(control.level(), Some(-20), "workers full, link not: down, but never to none");
    }

    #[test]
    fn a_light_load_is_compressed_hard_also_after_a_heavy_one() {
        let mut now = Now(5);
        let mut control = LevelControl::new(1, Some(3), now);
        run(&mut control, &mut now, 3, 0, 90, 50);
        assert_eq!(control.level(), Some(-20), "an initial sync beside a busy guest");
        run(&mut control, &mut now, 12, 0, 5, 60);
        assert_eq!(control.level(), Some(3), "a little work, though the guest keeps the processor busy");
    }

    #[test]
    fn the_cap_holds() {
        let mut now = Now(0);
        for (max, expected) in
            [(None, None), (Some(-50), None), (Some(-5), Some(-7)), (Some(0), Some(-1)), (Some(19), Some(3))]
        {
            let mut control = LevelControl::new(2, max, now);
            run(&mut control, &mut now, 40, 100, 0, 0);
            assert_eq!(control.level(), expected);
            run(&mut control, &mut now, 40, 0, 100, 100);
            assert!(control.level() <= expected, "{max:?}");
        }
    }
}
