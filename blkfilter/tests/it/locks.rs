//! The range lock against a naive model: one list of requests in the order in which they came.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use farshore_blkfilter::range_lock::{OWNERS_MAX, Owner, RangeLock};
use farshore_uring::sim::{SimIo, SimRng};
use farshore_uring::{AlignedBuf, Io};
use proptest::prelude::*;

const OPS: u16 = 8;

struct Side {
    owner: Owner,
    io: SimIo<AlignedBuf>,
}

fn sides(lock: &Arc<RangeLock>, count: usize) -> Vec<Side> {
    let side = |_| {
        let io = SimIo::<AlignedBuf>::new(SimRng::new(1));
        Side { owner: lock.owner(OPS, io.waker()).expect("few owners"), io }
    };
    (0..count).map(side).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Lock {
        side: usize,
        op: u16,
        start: u64,
        len: u64,
    },
    TryLock {
        side: usize,
        op: u16,
        start: u64,
        len: u64,
    },
    Unlock {
        pick: usize,
    },
    /// An owner dies with all that it holds and waits for; a new one takes its place.
    Die {
        side: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Lengths from a sector to more than all shards; starts close together so that most things overlap.
    let len = prop_oneof![4 => 1_u64..64, 2 => 1_u64..2000, 1 => Just(40_000_u64), 1 => Just(140_000_u64)];
    let start = prop_oneof![3 => 0_u64..128, 1 => 0_u64..40_000, 1 => Just(511_u64)];
    let place = (0..3_usize, 0..OPS, start, len);
    let step = prop_oneof![
        4 => place.clone().prop_map(|(side, op, start, len)| Step::Lock { side, op, start, len }),
        1 => place.prop_map(|(side, op, start, len)| Step::TryLock { side, op, start, len }),
        4 => any::<usize>().prop_map(|pick| Step::Unlock { pick }),
        1 => (0..3_usize).prop_map(|side| Step::Die { side }),
    ];
    proptest::collection::vec(step, 1..200)
}

/// (side, op, range), in the order of arrival.
type Model = Vec<(usize, u16, Range<u64>)>;

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Requests with nothing that overlaps before them.
fn holders(model: &Model) -> BTreeSet<(usize, u16)> {
    let free = |at: usize| !model[..at].iter().any(|(_, _, before)| overlap(before, &model[at].2));
    (0..model.len()).filter(|at| free(*at)).map(|at| (model[at].0, model[at].1)).collect()
}

/// After `side` gave something up.
fn check_grants(
    sides: &mut [Side],
    side: usize,
    model: &Model,
    granted: &mut BTreeSet<(usize, u16)>,
) -> Result<(), TestCaseError> {
    let now = holders(model);
    for (index, other) in sides.iter_mut().enumerate() {
        let new: BTreeSet<u16> = std::iter::from_fn(|| other.owner.poll_granted()).collect();
        let expected: BTreeSet<u16> =
            now.iter().filter(|(s, o)| *s == index && !granted.contains(&(*s, *o))).map(|(_, o)| *o).collect();
        prop_assert_eq!(&new, &expected, "those that come to hold the lock are told, and nobody else");
        let woken = other.io.take_wakeup();
        prop_assert_eq!(woken, index != side && !new.is_empty(), "others are woken, oneself is not");
        granted.extend(new.into_iter().map(|op| (index, op)));
    }
    Ok(())
}

fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let lock = Arc::new(RangeLock::new());
    let mut sides = sides(&lock, 3);
    let mut model = Model::new();
    let mut granted = BTreeSet::new();
    for step in steps {
        match step {
            Step::Lock { side, op, start, len } | Step::TryLock { side, op, start, len } => {
                if model.iter().any(|(s, o, _)| (*s, *o) == (side, op)) {
                    continue;
                }
                let range = start * 512..(start + len) * 512;
                let free = !model.iter().any(|(_, _, other)| overlap(other, &range));
                let wait = matches!(step, Step::Lock { .. });
                let owner = &sides[side].owner;
                let got = if wait { owner.lock(op, range.clone()) } else { owner.try_lock(op, range.clone()) };
                prop_assert_eq!(got, free);
                if got {
                    granted.insert((side, op));
                }
                if got || wait {
                    model.push((side, op, range));
                }
            }
            Step::Unlock { pick } => {
                if model.is_empty() {
                    continue;
                }
                // Waiting ones, too: a place in the queue can be given up.
                let (side, op, range) = model.remove(pick % model.len());
                granted.remove(&(side, op));
                sides[side].owner.unlock(op, range);
                check_grants(&mut sides, side, &model, &mut granted)?;
            }
            Step::Die { side } => {
                let heir = lock.owner(OPS, sides[side].io.waker()).expect("few owners");
                drop(std::mem::replace(&mut sides[side].owner, heir));
                model.retain(|(owner, ..)| *owner != side);
                granted.retain(|(owner, _)| *owner != side);
                check_grants(&mut sides, side, &model, &mut granted)?;
            }
        }
        prop_assert_eq!(&granted, &holders(&model));
    }
    for (side, op, range) in model {
        sides[side].owner.unlock(op, range);
    }
    prop_assert_eq!(lock.entries(), 0);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: first come, first served among what overlaps; nothing else waits; who gets the lock is told on its own thread.
    #[test]
    fn like_a_list(steps in steps()) {
        run(steps)?;
    }
}

#[test]
fn owners_are_bounded_and_their_places_are_used_again() {
    let lock = Arc::new(RangeLock::new());
    let io = SimIo::<AlignedBuf>::new(SimRng::new(1));
    let mut owners: Vec<Owner> = (0..OWNERS_MAX).map(|_| lock.owner(1, io.waker()).expect("below the limit")).collect();
    assert!(lock.owner(1, io.waker()).is_none());
    owners.remove(17);
    let again = lock.owner(1, io.waker()).expect("one place is free");
    assert!(again.lock(0, 0..512));
    again.unlock(0, 0..512);
}
