//! Which states and which orders a set of acknowledged writes allows.
//!
//! A client numbers what it does: one counter, taken before a request is issued and again after it was acknowledged. A request
//! is *before* another if it was acknowledged before the other was issued; else the two are concurrent, and either may have
//! come first. Every block of a write carries the number of its request, so a state says which request it shows in each
//! block.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Result, ensure};

/// Bytes of a stamped block.
pub const BLOCK: usize = 4096;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Writes stamped blocks.
    Write,
    /// The same, durable at its end.
    Fua,
    /// Makes the range read as zeroes.
    Zeroes,
}

/// An acknowledged request. Its number is its place in the list, from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// What it did.
    pub what: What,
    /// Blocks of the device.
    pub blocks: Range<u64>,
    /// Counter before it was issued.
    pub issued: u64,
    /// Counter after it was acknowledged.
    pub acknowledged: u64,
}

impl Request {
    /// Acknowledged before `other` was issued.
    #[must_use]
    pub fn is_before(&self, other: &Self) -> bool {
        self.acknowledged < other.issued
    }

    /// Has a block in common with `other`.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.blocks.start < other.blocks.end && other.blocks.start < self.blocks.end
    }
}

/// The content of block `at` as request `number` writes it.
#[must_use]
pub fn stamped(number: u64, at: u64) -> Vec<u8> {
    [number.to_le_bytes(), at.to_le_bytes()].concat().repeat(BLOCK / 16)
}

/// The number in a block; 0: zeroes.
///
/// # Errors
/// If it is torn, or was written to another place.
pub fn stamp(block: &[u8], at: u64) -> Result<u64> {
    let number = u64::from_le_bytes(block[..8].try_into().expect("eight bytes"));
    let whole = if number == 0 { block.iter().all(|byte| *byte == 0) } else { block == stamped(number, at) };
    ensure!(whole, "block {at} is torn or misplaced: {:02x?}", &block[..32]);
    Ok(number)
}

/// The numbers in all blocks of a device.
///
/// # Errors
/// As [`stamp`].
pub fn stamps(device: &[u8]) -> Result<Vec<u64>> {
    (0..).zip(device.chunks_exact(BLOCK)).map(|(at, block)| stamp(block, at)).collect()
}

/// All requests of a run.
pub struct Requests(Vec<Request>);

impl Requests {
    /// In the order of their numbers.
    #[must_use]
    pub fn new(requests: Vec<Request>) -> Self {
        Self(requests)
    }

    /// All of them, with their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (u64, &Request)> {
        (1..).zip(&self.0)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The request of a number.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, number: u64) -> Result<&Request> {
        let request = usize::try_from(number).ok().and_then(|at| self.0.get(at.checked_sub(1)?));
        request.ok_or_else(|| anyhow::anyhow!("there is no request {number}"))
    }

    /// The blocks' numbers after these requests, in this order.
    ///
    /// # Errors
    /// If one does not exist.
    pub fn replayed(&self, order: impl IntoIterator<Item = u64>, device_blocks: usize) -> Result<Vec<u64>> {
        let mut state = vec![0; device_blocks];
        for number in order {
            let request = self.get(number)?;
            let range = usize::try_from(request.blocks.start)?..usize::try_from(request.blocks.end)?;
            state[range].fill(if request.what == What::Zeroes { 0 } else { number });
        }
        Ok(state)
    }

    /// Checks that every request is in `order` once, and none stands behind one that it is before.
    ///
    /// # Errors
    /// With the first that does.
    pub fn check_order(&self, order: &[u64]) -> Result<()> {
        let all: BTreeSet<u64> = order.iter().copied().collect();
        ensure!(all.len() == order.len(), "{} of {} are there twice", order.len() - all.len(), order.len());
        ensure!(all.len() == self.0.len(), "{} requests of {} are there", all.len(), self.0.len());
        // The one issued last among those passed: who was acknowledged before that stands too late.
        let mut latest: Option<(u64, &Request)> = None;
        for number in order {
            let request = self.get(*number)?;
            if let Some((passed, behind)) = latest {
                ensure!(
                    !request.is_before(behind),
                    "{number} was acknowledged before {passed} was issued, and follows it"
                );
            }
            if latest.is_none_or(|(_, behind)| request.issued > behind.issued) {
                latest = Some((*number, request));
            }
        }
        Ok(())
    }

    /// Checks that a state shows the requests of some set that holds, with each request, all that are before it (a prefix of the
    /// partial order), and all that were acknowledged at or before `sure`; overlapping ones with the later on top.
    ///
    /// Which zeroes made a block zero cannot be seen; any that may have is taken.
    ///
    /// # Errors
    /// With the first block that shows something else.
    pub fn check_state(&self, state: &[u64], sure: u64) -> Result<()> {
        let shown: BTreeSet<u64> = state.iter().copied().filter(|number| *number > 0).collect();
        let mut newest = sure.saturating_add(1);
        for number in &shown {
            newest = newest.max(self.get(*number)?.issued);
        }
        let inside = |number: u64, request: &Request| request.acknowledged < newest || shown.contains(&number);
        let by_block = self.by_block(state.len())?;
        for (at, number) in state.iter().enumerate() {
            let here = &by_block[at];
            let over = |top: &Request| {
                let later = |(number, request): &&(u64, &Request)| inside(*number, request) && top.is_before(request);
                here.iter().find(later).map(|(number, _)| *number)
            };
            if *number > 0 {
                let top = self.get(*number)?;
                ensure!(
                    top.what != What::Zeroes && top.blocks.contains(&(at as u64)),
                    "block {at} shows {number}, which wrote elsewhere"
                );
                if let Some(later) = over(top) {
                    anyhow::bail!("block {at} shows {number}, and {later}, which came after it, has to be there");
                }
                continue;
            }
            let zeroes: Vec<_> = here.iter().filter(|(_, request)| request.what == What::Zeroes).collect();
            for (write, request) in here.iter().filter(|(_, request)| request.what != What::Zeroes) {
                let may_be_zero = zeroes.iter().any(|(_, zero)| !zero.is_before(request));
                ensure!(
                    may_be_zero || !inside(*write, request),
                    "block {at} is zero, and {write}, which nothing made zero, has to be there"
                );
            }
        }
        Ok(())
    }

    /// For each block the requests that touch it, in the order of their numbers.
    fn by_block(&self, device_blocks: usize) -> Result<Vec<Vec<(u64, &Request)>>> {
        let mut by_block = vec![Vec::new(); device_blocks];
        for (number, request) in self.numbered() {
            let range = usize::try_from(request.blocks.start)?..usize::try_from(request.blocks.end)?;
            for block in &mut by_block[range] {
                block.push((number, request));
            }
        }
        Ok(by_block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(what: What, blocks: Range<u64>, issued: u64, acknowledged: u64) -> Request {
        Request { what, blocks, issued, acknowledged }
    }

    /// 1 before 2; 3 concurrent with both; 4 zeroes after all.
    fn requests() -> Requests {
        Requests::new(vec![
            request(What::Write, 0..2, 1, 2),
            request(What::Write, 1..3, 4, 6),
            request(What::Fua, 3..4, 0, 7),
            request(What::Zeroes, 0..1, 8, 9),
        ])
    }

    #[test]
    fn orders_that_turn_two_requests_around_are_found() {
        for good in [[1, 2, 3, 4], [3, 1, 2, 4], [1, 3, 2, 4]] {
            requests().check_order(&good).expect("a good order");
        }
        for (bad, part) in [
            (vec![2, 1, 3, 4], "1 was acknowledged before 2"),
            (vec![1, 2, 4, 3], "3 was acknowledged before 4"),
            (vec![1, 2, 3], "3 requests of 4"),
            (vec![1, 2, 2, 3, 4], "twice"),
            (vec![1, 2, 3, 5], "no request 5"),
        ] {
            let error = requests().check_order(&bad).expect_err(part).to_string();
            assert!(error.contains(part), "{bad:?}: {error}");
        }
    }

    #[test]
    fn states_that_are_no_prefix_are_found() {
        let requests = requests();
        let check = |state: [u64; 4], sure: u64| requests.check_state(&state, sure);
        // Nothing yet; each prefix.
        for good in [[0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 2, 0], [0, 0, 0, 3], [1, 1, 0, 3], [1, 2, 2, 3], [0, 2, 2, 3]] {
            check(good, 0).expect("a prefix");
        }
        let bad = |state, sure, part: &str| {
            let error = check(state, sure).expect_err(part).to_string();
            assert!(error.contains(part), "{state:?} {sure}: {error}");
        };
        bad([0, 0, 2, 0], 0, "block 1 is zero");
        bad([1, 1, 2, 0], 0, "block 1 shows 1, and 2");
        bad([1, 2, 2, 2], 0, "wrote elsewhere");
        bad([4, 0, 0, 0], 0, "wrote elsewhere");
        bad([0, 0, 0, 9], 0, "no request 9");
        // What was acknowledged has to be there, whatever is shown.
        bad([0, 0, 0, 0], 2, "block 1 is zero");
        bad([1, 1, 0, 0], 7, "block 1 shows 1");
        bad([1, 2, 2, 3], 9, "block 0 shows 1, and 4");
        check([0, 2, 2, 3], 9).expect("all of it");
    }

    #[test]
    fn a_replay_puts_the_later_on_top() {
        let state = requests().replayed([1, 2, 3, 4], 5).expect("all exist");
        assert_eq!(state, [0, 2, 2, 3, 0]);
        requests().replayed([7], 5).expect_err("does not exist");
    }

    #[test]
    fn stamps_show_request_and_place() {
        assert_eq!(stamp(&stamped(7, 3), 3).expect("whole"), 7);
        assert_eq!(stamp(&[0; BLOCK], 3).expect("zeroes"), 0);
        stamp(&stamped(7, 4), 3).expect_err("misplaced");
        let mut torn = stamped(7, 3);
        torn[BLOCK - 1] ^= 1;
        stamp(&torn, 3).expect_err("torn");
        let device = [stamped(1, 0), vec![0; BLOCK], stamped(2, 2)].concat();
        assert_eq!(stamps(&device).expect("whole"), [1, 0, 2]);
    }
}
