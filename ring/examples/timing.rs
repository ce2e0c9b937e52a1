//! Time of one write's way through the ring, without its payload: reserve + writing + publish, consume + free. Run it in release.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "it reads the clock and prints: that is its purpose"
)]

use std::hint::black_box;
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use farshore_ring::{Desc, Memory, Producer, Ring, RingConfig, RingIdentity};

const ROUNDS: u32 = 400;
const BURST: u32 = 1000;

fn main() -> Result<(), farshore_ring::Error> {
    let identity =
        RingIdentity { vault: [0; 16], group: [0; 16], host: [0; 16], boot: [0; 16], incarnation: 1, generation: 1 };
    for (name, len) in [("4 KiB", 4096), ("64 KiB", 65536), ("256 KiB", 262_144)] {
        let ring = Ring::create_in_memory(&Memory::new(), &RingConfig::new(identity))?;
        one_thread(&ring, name, len);
    }
    for producers in [1, 2] {
        let ring = Ring::create_in_memory(&Memory::new(), &RingConfig::new(identity))?;
        threads(&ring, producers);
    }
    Ok(())
}

fn write(producer: &Producer, len: usize) -> bool {
    let Ok(mut reservation) = producer.reserve(len) else { return false };
    reservation.writing(0, 4096, len as u64);
    let desc = Desc { kind: 1, len: u32::try_from(len).expect("at most 256 KiB"), ..Desc::default() };
    producer.publish(black_box(reservation), &desc).is_ok()
}

/// Processor time of this thread in nanoseconds: what other work on the machine does not blur.
fn cpu_ns() -> i64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("a thread knows its usage");
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) * 1000
}

/// Bursts, so that both halves can be timed apart. The first round touches the memory and is not counted.
fn one_thread(ring: &Ring, name: &str, len: usize) {
    let producer = ring.producer();
    let mut consumer = ring.consumer().expect("the first one");
    let burst = BURST.min(u32::try_from((200 << 20) / len).expect("small"));
    let (mut write_ns, mut read_ns) = (0, 0);
    for round in 0..=ROUNDS {
        let start = cpu_ns();
        for _ in 0..burst {
            assert!(write(&producer, len), "the burst fits");
        }
        let middle = cpu_ns();
        while let Some(entry) = consumer.next() {
            black_box(&entry);
        }
        consumer.free_to(consumer.position());
        if round > 0 {
            write_ns += middle - start;
            read_ns += cpu_ns() - middle;
        }
    }
    let operations = i64::from(ROUNDS * burst);
    println!(
        "{name}: reserve+writing+publish {} ns, next+free {} ns of processor time (bursts of {burst})",
        write_ns / operations,
        read_ns / operations
    );
}

fn threads(ring: &Ring, producers: u32) {
    let each = ROUNDS * BURST;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..producers {
            let producer = ring.producer();
            scope.spawn(move || {
                let mut written = 0;
                while written < each {
                    if write(&producer, 4096) { written += 1 } else { std::thread::yield_now() }
                }
            });
        }
        let mut consumer = ring.consumer().expect("the first one");
        let mut read = 0;
        while read < each * producers {
            match consumer.next() {
                Some(entry) => {
                    read += 1;
                    if read.is_multiple_of(64) {
                        consumer.free_to(entry.position);
                    }
                }
                None => std::thread::yield_now(),
            }
        }
        consumer.free_to(consumer.position());
    });
    let ns = start.elapsed().as_nanos() / u128::from(each * producers);
    println!("{producers} producer(s) + consumer thread, 4 KiB: {ns} ns per write, end to end");
}
