//! Bandwidth limit: a token bucket that may run into debt by one batch.

use std::time::Duration;

use farshore_proto::Now;

/// Longest burst: what the rate gives in this time. Long enough that a limit of a few Mbit/s still lets a small batch go at
/// once, short enough that a meter with one-second buckets sees the limit kept.
const BURST: Duration = Duration::from_millis(200);

/// Lets bytes through at a rate. A batch goes when the bucket is not in debt, whatever its length, and is paid for afterwards;
/// so the rate holds over any time longer than one batch takes.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Bytes per second; `None`: unlimited.
    rate: Option<u64>,
    /// Bytes, in billionths (bytes × 10⁹ per second × ns).
    level: i128,
    at: Now,
}

const SCALE: i128 = 1_000_000_000;

impl TokenBucket {
    /// `rate` in bytes per second, at least 1.
    #[must_use]
    pub fn new(rate: Option<u64>, now: Now) -> Self {
        let mut bucket = Self { rate: rate.map(|rate| rate.max(1)), level: 0, at: now };
        bucket.level = bucket.burst();
        bucket
    }

    /// Changes the rate from now on.
    pub fn set_rate(&mut self, rate: Option<u64>, now: Now) {
        self.refill(now);
        self.rate = rate.map(|rate| rate.max(1));
        self.level = self.level.min(self.burst());
    }

    /// Something may be sent now.
    pub fn is_open(&mut self, now: Now) -> bool {
        self.refill(now);
        self.rate.is_none() || self.level >= 0
    }

    /// `bytes` were sent.
    pub fn take(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.level -= i128::from(bytes) * SCALE;
        }
    }

    /// When [`Self::is_open`] becomes true; `None` if it is now.
    #[must_use]
    pub fn opens_at(&self) -> Option<Now> {
        let rate = i128::from(self.rate?);
        (self.level < 0).then(|| {
            let nanos = u64::try_from((-self.level + rate - 1) / rate).unwrap_or(u64::MAX);
            self.at.plus(Duration::from_nanos(nanos))
        })
    }

    fn burst(&self) -> i128 {
        self.rate.map_or(0, |rate| i128::from(rate) * i128::try_from(BURST.as_nanos()).expect("far below 2^127"))
    }

    fn refill(&mut self, now: Now) {
        if let Some(rate) = self.rate {
            let nanos = i128::from(now.0.saturating_sub(self.at.0));
            self.level = (self.level + nanos * i128::from(rate)).min(self.burst());
        }
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rate_over_time() {
        let mut now = Now(0);
        let mut bucket = TokenBucket::new(Some(1_000_000), now);
        let mut sent = 0;
        while now.0 < 10 * 1_000_000_000 {
            while bucket.is_open(now) {
                bucket.take(70_000);
                sent += 70_000u64;
            }
            now = bucket.opens_at().expect("in debt");
            assert!(bucket.clone().is_open(now), "opens when it says");
        }
        assert!((9_900_000..=10_400_000).contains(&sent), "{sent}");
        bucket.set_rate(None, now);
        bucket.take(u64::MAX);
        assert!(bucket.is_open(now));
    }
}
