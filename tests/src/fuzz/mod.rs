//! The seeded fuzz loop: mutates valid inputs of every decoder, the same way every time.
//!
//! It finds less than a guided fuzzer and needs nothing but the release toolchain, so it belongs to every test run. The same
//! functions are the targets of the cargo-fuzz package in `fuzz/`.

pub mod targets;

use std::fmt;
use std::panic::{self, AssertUnwindSafe};

/// Inputs never grow past this: decoders' own limits lie above or are tested elsewhere, and short inputs mutate better.
const INPUT_BYTES_MAX: usize = 64 * 1024;

/// Mutations piled on one seed; more than a few only make noise that the first check refuses.
const MUTATIONS_MAX: u64 = 6;

/// One decoder.
pub struct Target {
    /// Name here, in `fuzz/fuzz_targets/` and in `fuzz/Cargo.toml`.
    pub name: &'static str,
    /// Decodes any bytes. Panics on a broken promise: a crash, a round trip that differs.
    pub run: fn(&[u8]),
    /// Valid inputs to start from, at least one.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// An input that broke a target.
pub struct Failure {
    target: &'static str,
    /// Round in which it came up; 0 for an unchanged or shortened seed.
    round: u64,
    input: Vec<u8>,
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fuzz target {} broke in round {} on {} bytes: ", self.target, self.round, self.input.len())?;
        self.input.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Target {
    /// Runs the seeds, every beginning of a short seed, and then `rounds` mutated inputs drawn from `seed`.
    ///
    /// # Errors
    /// The first input on which the target panicked.
    pub fn check(&self, seed: u64, rounds: u64) -> Result<(), Failure> {
        let seeds = (self.seeds)();
        assert!(!seeds.is_empty(), "fuzz target {} has no seeds", self.name);
        for whole in &seeds {
            self.try_one(0, whole)?;
            for end in 0..whole.len().min(1024) {
                self.try_one(0, &whole[..end])?;
            }
        }
        let mut random = Random(seed);
        for round in 1..=rounds {
            let mut input = random.pick(&seeds).clone();
            for _ in 0..=random.below(MUTATIONS_MAX) {
                mutate(&mut input, &seeds, &mut random);
            }
            input.truncate(INPUT_BYTES_MAX);
            self.try_one(round, &input)?;
        }
        Ok(())
    }

    fn try_one(&self, round: u64, input: &[u8]) -> Result<(), Failure> {
        panic::catch_unwind(AssertUnwindSafe(|| (self.run)(input))).map_err(|_| Failure {
            target: self.name,
            round,
            input: input.to_vec(),
        })
    }
}

/// Values at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_fffe,
    0xffff_ffff_ffff_ffff,
];

fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    if input.is_empty() {
        input.push(random.byte());
        return;
    }
    let at = random.index(input.len());
    match random.below(9) {
        0 => input[at] ^= 1 << random.below(8),
        1 => input[at] = random.byte(),
        2 => overwrite(input, at, 2, *random.pick(&EDGES)),
        3 => overwrite(input, at, 4, *random.pick(&EDGES)),
        4 => overwrite(input, at, 8, *random.pick(&EDGES)),
        5 => input.truncate(at),
        6 => {
            let end = at + random.index(input.len() - at);
            input.drain(at..end);
        }
        7 => {
            let end = at + random.index((input.len() - at).min(256));
            let copy = input[at..end].to_vec();
            let to = random.index(input.len());
            input.splice(to..to, copy);
        }
        _ => {
            let other = random.pick(seeds);
            let from = random.index(other.len().max(1)).min(other.len());
            input.truncate(at);
            input.extend_from_slice(&other[from..]);
        }
    }
}

/// Puts the low `width` bytes of `value` at `at`, as far as they fit.
fn overwrite(input: &mut [u8], at: usize, width: usize, value: u64) {
    for (to, from) in input[at..].iter_mut().zip(value.to_le_bytes().into_iter().take(width)) {
        *to = from;
    }
}

/// SplitMix64: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not 0. The bias of the remainder is of no matter here.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn index(&mut self, end: usize) -> usize {
        usize::try_from(self.below(end as u64)).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.index(from.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A decoder with a bug that only a length field with a rare value shows.
    fn planted(bytes: &[u8]) {
        if let [b'M', low, high, rest @ ..] = bytes {
            let claimed = usize::from(u16::from_le_bytes([*low, *high]));
            assert!(claimed < 0x7fff || rest.is_empty(), "planted");
        }
    }

    fn planted_seeds() -> Vec<Vec<u8>> {
        vec![b"M\x03\x00abc".to_vec()]
    }

    #[test]
    fn a_planted_bug_is_found_and_again_with_the_same_input() {
        let target = Target { name: "planted", run: planted, seeds: planted_seeds };
        let first = target.check(1, 5_000).expect_err("found");
        let again = target.check(1, 5_000).expect_err("found again");
        assert_eq!(format!("{first:?}"), format!("{again:?}"));
        assert!(first.input.starts_with(b"M") && first.round > 0);
        planted(&first.input[..3]);
    }

    #[test]
    fn a_sound_decoder_passes() {
        let target = Target { name: "sound", run: |bytes| drop(bytes.to_vec()), seeds: planted_seeds };
        target.check(1, 1_000).expect("nothing to find");
    }

    #[test]
    fn every_beginning_of_a_seed_is_tried() {
        let target = Target { name: "short", run: |bytes| assert!(bytes.len() != 4, "planted"), seeds: planted_seeds };
        let failure = target.check(1, 0).expect_err("found without a mutation");
        assert_eq!((failure.round, failure.input.as_slice()), (0, &b"M\x03\x00a"[..]));
    }
}
