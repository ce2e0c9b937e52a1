//! What the benchmarks share: a timing loop and a line of figures.
//!
//! Run them with `cargo bench -p farshore-benches`, on a machine that does nothing else.
#![forbid(unsafe_code)]

use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Rounds of which the median counts.
const ROUNDS: usize = 9;
/// Shortest round: long against a clock tick and a scheduler's slice.
const ROUND_MIN: Duration = Duration::from_millis(100);

/// Time of one run of `work` by the wall clock: the median of nine rounds of at least 100 ms each, after a run to warm up.
pub fn time<T>(mut work: impl FnMut() -> T) -> Duration {
    black_box(work());
    let mut rounds: Vec<Duration> = (0..ROUNDS).map(|_| round(&mut work)).collect();
    rounds.sort();
    rounds[ROUNDS / 2]
}

fn round<T>(work: &mut impl FnMut() -> T) -> Duration {
    let start = Instant::now();
    let mut runs = 0;
    loop {
        black_box(work());
        runs += 1;
        let passed = start.elapsed();
        if passed >= ROUND_MIN {
            return passed / runs;
        }
    }
}

/// One line of a benchmark's output: `{name} {ns} ns/record {rate} MB/s`.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// What was measured.
    pub name: &'a str,
    /// Time of one run.
    pub time: Duration,
    /// Records in one run; not 0.
    pub records: u64,
    /// Payload bytes in one run.
    pub bytes: u64,
}

impl fmt::Display for Figures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_record = self.time.as_secs_f64() * 1e9 / self.records as f64;
        let rate = self.bytes as f64 / self.time.as_secs_f64() / 1e6;
        write!(f, "{:<40} {per_record:>9.1} ns/record {rate:>9.0} MB/s", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_per_record_and_second() {
        let figures = Figures { name: "x", time: Duration::from_millis(2), records: 1000, bytes: 4_000_000 };
        let text = figures.to_string();
        assert!(text.starts_with("x ") && text.ends_with("2000.0 ns/record      2000 MB/s"), "{text}");
    }
}
