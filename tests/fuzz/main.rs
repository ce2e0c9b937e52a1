//! Every fuzz target over a bounded number of seeded mutations.
//!
//! `FARSHORE_FUZZ_ROUNDS` and `FARSHORE_FUZZ_SEED` replay a failure or search wider.
#![forbid(unsafe_code)]

use farshore_tests::fuzz::targets::TARGETS;

/// Inputs per target: a few seconds for all of them, unoptimised.
const ROUNDS: u64 = 5_000;

/// Any fixed number; the same inputs in every run.
const SEED: u64 = 0xfa25_40e5;

fn number(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        Err(_) => default,
    }
}

fn check(name: &str) {
    let (seed, rounds) = (number("FARSHORE_FUZZ_SEED", SEED), number("FARSHORE_FUZZ_ROUNDS", ROUNDS));
    let target = TARGETS.iter().find(|t| t.name == name).expect("every test names a target");
    if let Err(failure) = target.check(seed, rounds) {
        panic!("{failure:?}\nreplay with FARSHORE_FUZZ_SEED={seed} FARSHORE_FUZZ_ROUNDS={rounds}");
    }
}

macro_rules! tests {
    ($($name:ident),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                check(stringify!($name));
            }
        )+

        #[test]
        fn no_target_is_left_out() {
            let here = [$(stringify!($name)),+];
            let table: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(table, here);
        }
    };
}

tests!(batch, record_list, frame, source_message, target_message, text, activity_log, disk_log);
