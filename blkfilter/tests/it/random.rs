//! Everything at random: overlapping requests, completion order, errors, a slow and breaking link, a ring that fills, kills.

use farshore_proto::record::Kind;
use farshore_ring::Which;
use farshore_uring::sim::{DiskFault, DiskOp, SimRng};

use crate::rig::{Config, Rig};

/// Seeds per test: `FARSHORE_SEEDS` for longer runs, from `FARSHORE_FIRST` on, `FARSHORE_SEED` for one.
pub(crate) fn seeds(default: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("FARSHORE_SEED") {
        Some(seed) => vec![seed],
        None => {
            let first = number("FARSHORE_FIRST").unwrap_or(0);
            (first..first + number("FARSHORE_SEEDS").unwrap_or(default)).collect()
        }
    }
}

/// Prints the seed if the test panics.
pub(crate) struct Seed(pub(crate) u64);

#[expect(clippy::print_stderr, reason = "for the person who runs the test")]
impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("again with FARSHORE_SEED={}", self.0);
        }
    }
}

fn faulty(rig: &mut Rig, writes: u64, reads: u64) {
    for disk in rig.disks.clone() {
        let mut rng = SimRng::new(rig.rng.next_u64());
        disk.set_fault(move |op: &DiskOp| {
            let part = match op {
                DiskOp::Read { .. } => reads,
                DiskOp::Write { .. } | DiskOp::Allocate { .. } => writes,
                DiskOp::Sync => 0,
            };
            match rng.below(1000) {
                x if x < part => DiskFault::Error(libc::EIO),
                x if x < part + 30 => DiskFault::Delay(1 + u32::try_from(rng.below(60)).expect("small")),
                _ => DiskFault::None,
            }
        });
    }
}

fn mend(rig: &Rig) {
    rig.disks.iter().for_each(|disk| disk.clear_fault());
}

fn finish(rig: &mut Rig) {
    mend(rig);
    rig.settle();
    rig.check_equal();
    assert!(rig.checked_cuts > 0, "points were checked");
}

/// Goal: initial sync under load ends in points, and every point is a legal crash state.
#[test]
fn initial_sync_under_load() {
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config::default());
        rig.go_live();
        for _ in 0..6000 {
            rig.random_step(30, 90);
        }
        finish(&mut rig);
        assert_eq!(rig.failed, 0);
        assert!(rig.replica.count(Kind::Probe) <= rig.config.slots * 40, "sync does not chase its tail");
    }
}

/// Goal: in steady state with room in the ring nothing is ever missing, and every write has a ticket.
#[test]
fn steady_state_captures_everything() {
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config { slab_mib: 64, descriptors: 16384, ..Config::default() });
        rig.settle();
        for _ in 0..6000 {
            rig.random_step(30, 95);
            assert!(!rig.group.event_open() && !rig.ring.is_closed());
        }
        finish(&mut rig);
        let counters = rig.group.counters();
        assert_eq!((counters.missed, counters.errors), (0, 0));
        assert_eq!(counters.captured, counters.writes + counters.zeroes);
    }
}

/// Goal: a link that is too slow closes the ring again and again; guests see nothing of it, and points come back.
#[test]
fn slow_link_closes_and_reopens() {
    let mut closed = 0;
    for seed in seeds(6) {
        let _seed = Seed(seed);
        // Many slots, short gaps: what one gap forgets is not made good by another.
        let mut rig = Rig::new(seed, Config { slots: 250, slab_mib: 1, descriptors: 64, ..Config::default() });
        rig.settle();
        for step in 0..4000_u64 {
            let burst = step % 1000 < 150;
            rig.random_step(if burst { 60 } else { 4 }, if burst { 1 } else { 100 });
            closed += u64::from(rig.ring.is_closed());
        }
        finish(&mut rig);
        assert_eq!(rig.failed, 0, "I1");
    }
    assert!(closed > 0, "the test closes the ring");
}

/// Goal: failing writes and reads of the device, on top of all that, never make a wrong point.
#[test]
fn device_errors() {
    let mut failed = 0;
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config { slots: 200, ..Config::default() });
        rig.settle();
        faulty(&mut rig, 8, 8);
        for step in 0..8000_u64 {
            let link = if step / 2000 % 2 == 0 { 10 } else { 100 };
            rig.random_step(12, link);
        }
        finish(&mut rig);
        failed += rig.failed;
    }
    assert!(failed > 0, "the test fails writes");
}

/// Goal: breaks of the link lose answers, batches and acknowledgements; sync asks again and ends.
#[test]
fn link_breaks() {
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config { slab_mib: 1, descriptors: 128, ..Config::default() });
        rig.go_live();
        for _ in 0..10_000 {
            if rig.rng.chance(1, 150) {
                if rig.live {
                    rig.break_link();
                } else {
                    rig.go_live();
                }
            }
            rig.random_step(15, 80);
        }
        finish(&mut rig);
        assert_eq!(rig.failed, 0, "I1");
    }
}

/// Goal: an agent killed at any moment, with writes in flight on the device, forgets no difference.
#[test]
fn kills() {
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config { slab_mib: 1, descriptors: 128, ..Config::default() });
        rig.go_live();
        for _ in 0..10_000 {
            if rig.rng.chance(1, 900) {
                rig.kill_and_restart();
            }
            if !rig.live && rig.rng.chance(1, 60) {
                rig.go_live();
            }
            rig.random_step(20, 60);
        }
        finish(&mut rig);
        assert!(rig.restarts > 0);
    }
}

/// Goal: starting the stream over in the middle of everything loses nothing.
#[test]
fn start_over() {
    for seed in seeds(6) {
        let _seed = Seed(seed);
        let mut rig = Rig::new(seed, Config::default());
        rig.go_live();
        for _ in 0..8000 {
            if rig.rng.chance(1, 1500) {
                rig.break_link();
                let opened = rig.group.start_over(&mut rig.consumer, farshore_proto::WallTime(rig.step), |_| {});
                assert!(opened.is_some(), "an empty ring opens at once");
                let from = rig.consumer.freed();
                rig.replica.forget_wire(from);
                rig.go_live();
            }
            rig.random_step(25, 80);
        }
        finish(&mut rig);
        for filter in &rig.filters {
            let index = filter.volume().expect("captured").index().0;
            let bitmap = rig.ring.bitmap(index, Which::InFlight).expect("in the table");
            assert_eq!(bitmap.count_ones(), 0);
        }
    }
}
