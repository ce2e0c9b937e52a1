//! Kill loops (I1, I4): daemons that die again and again, at any moment, under a guest that knows what was acknowledged. A short form in
//! every run; the long ones are named with `--ignored`, and `FARSHORE_KILLS` says how many.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farshore_uring::sim::SimRng;
use serde_json::Value;

use super::kill::check_all;
use crate::support::rig::GROUP;
use crate::support::{Guest, MIB, Rig, number, pause, until};

/// Kills of the forms that always run, and of the long ones.
const FEW: u64 = 12;
const MANY: u64 = 1000;
/// After so many kills, and after the last one, source, model and newest point are compared.
const LOOK_EVERY: u64 = 10;
/// Longest time between a start and the next kill: as long as some starts take, so that half-done ones are hit, too.
const KILL_AFTER_MS: u64 = 200;
const VOLUME_BYTES: u64 = 16 * MIB;
/// Between the requests of a guest that nobody interrupts: as much as the ring bridges while a target starts.
const PACE: Duration = Duration::from_millis(2);

/// How many kills were asked for.
fn many() -> Result<u64> {
    number("FARSHORE_KILLS", MANY)
}

/// History as short as it may be, so that retention works through all kills, and a long run fits the disk.
fn keep_little(rig: &Rig) -> Result<()> {
    rig.cli(&["policy", "set", GROUP, "size_limit=64MiB", "keep=1s"])?.ok().map(drop)
}

/// All that the daemons had to alarm about is over, but that the identities of tests are short-lived.
fn until_quiet(rig: &Rig) -> Result<()> {
    let alarms = || -> Result<Vec<Value>> {
        let lists = [rig.sites.agent().get("/v1/alarms")?, rig.sites.target().get("/v1/alarms")?];
        let open = lists.iter().filter_map(Value::as_array).flatten();
        Ok(open.filter(|alarm| alarm["code"] != "identity.expires").cloned().collect())
    };
    until("no alarm is open", || Ok(alarms()?.is_empty().then_some(())))
        .with_context(|| format!("alarms: {:?}", alarms()))
}

#[expect(clippy::print_stderr, reason = "a figure for whoever runs it with --nocapture")]
fn say(text: &str) {
    eprintln!("{text}");
}

/// Which processes of the agent die, in turn.
fn kill_agent(rig: &mut Rig, kind: u64) -> Result<()> {
    match kind % 4 {
        // Its supervisor starts the next worker.
        0 | 1 => rig.sites.kill_worker(),
        2 => {
            rig.sites.kill_agent();
            rig.sites.start_agent()
        }
        // The worker outlives its supervisor, and dies under the next one.
        _ => {
            rig.sites.kill_supervisor();
            rig.sites.start_agent()?;
            rig.sites.await_worker(None)?;
            rig.sites.kill_worker()
        }
    }
}

/// Goal: however often the agent dies, what it acknowledged is on the source, and soon at the target; its guest sees a connection that
/// breaks, and nothing else. Method: kills at random moments while requests come and go.
fn kills_of_the_agent(kills: u64) {
    Rig::test(
        |config| config.ring = 32 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 111)?;
            let mut guest = Guest::new(&socket, model, 112)?;
            rig.wait()?;
            keep_little(rig)?;
            let (begin, mut random, mut answered, mut looks) = (Instant::now(), SimRng::new(113), 0, 0);
            for kill in 1..=kills {
                let wait = Duration::from_millis(random.below(KILL_AFTER_MS));
                answered += std::thread::scope(|scope| {
                    let load = scope.spawn(|| guest.work_until_gone());
                    pause(wait);
                    let killed = kill_agent(rig, kill);
                    let answered = load.join().expect("a guest does not panic");
                    killed.and(answered)
                })
                .with_context(|| format!("kill {kill}"))?;
                guest.reconnect().with_context(|| format!("after kill {kill}"))?;
                if kill % LOOK_EVERY == 0 || kill == kills {
                    check_all(rig, &mut guest, &image).with_context(|| format!("after kill {kill}"))?;
                    looks += 1;
                }
                if kill % 100 == 0 {
                    say(&format!("{kill} kills of the agent, {:.0} s", begin.elapsed().as_secs_f64()));
                }
            }
            until_quiet(rig)?;
            say(&format!(
                "{kills} kills of the agent in {:.0} s: {answered} requests answered, newest point compared {looks} times",
                begin.elapsed().as_secs_f64()
            ));
            Ok(())
        },
    );
}

#[test]
fn a_few_kills_of_the_agent() {
    kills_of_the_agent(FEW);
}

/// `FARSHORE_BIN=… cargo test -p farshore-tests --test it -- --ignored --nocapture a_thousand_kills_of_the_agent`
#[test]
#[ignore = "takes ten minutes"]
fn a_thousand_kills_of_the_agent() {
    kills_of_the_agent(many().expect("a number"));
}

/// A guest that nobody interrupts, until told to stop. It is free between two bursts.
fn work_on(guest: &Mutex<Guest>, stop: &AtomicBool) -> Result<u64> {
    let mut requests = 0;
    while !stop.load(Ordering::SeqCst) {
        guest.lock().expect("no holder panics").begin(4)?;
        requests += 4;
        pause(PACE * 4);
    }
    Ok(requests)
}

/// Goal: however often the target dies, no point that it acknowledged is lost, the newest one comes to be what the source is, and the
/// guest at the source sees nothing at all. Method: kills at random moments while it receives, starts and drops history; a bookmark is an
/// acknowledged point.
fn kills_of_the_target(kills: u64) {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 121)?;
            let guest = Mutex::new(Guest::new(&socket, model, 122)?);
            rig.wait()?;
            keep_little(rig)?;
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let load = scope.spawn(|| work_on(&guest, &stop));
                let killed = kill_targets(rig, &guest, &image, kills);
                stop.store(true, Ordering::SeqCst);
                let requests = load.join().expect("a guest does not panic")?;
                say(&format!("{} and {requests} requests without an error", killed?));
                Ok(())
            })
        },
    );
}

fn kill_targets(rig: &mut Rig, guest: &Mutex<Guest>, image: &Path, kills: u64) -> Result<String> {
    let (begin, mut random, mut looks) = (Instant::now(), SimRng::new(123), 0);
    for kill in 1..=kills {
        pause(Duration::from_millis(random.below(KILL_AFTER_MS)));
        rig.sites.kill_target();
        rig.sites.start_target().with_context(|| format!("start after kill {kill}"))?;
        if kill % LOOK_EVERY == 0 || kill == kills {
            let mut guest = guest.lock().expect("no holder panics");
            check_all(rig, &mut guest, image).with_context(|| format!("after kill {kill}"))?;
            looks += 1;
            // What was acknowledged is there after the next kill, too: nobody sends it again.
            rig.bookmark("acknowledged")?;
            rig.sites.link().cut();
            rig.sites.kill_target();
            rig.sites.start_target()?;
            rig.check_point("bookmark:acknowledged", guest.model())
                .with_context(|| format!("a bookmark after kill {kill}"))?;
            rig.sites.link().heal();
        }
        if kill % 100 == 0 {
            say(&format!("{kill} kills of the target, {:.0} s", begin.elapsed().as_secs_f64()));
        }
    }
    rig.wait()?;
    until_quiet(rig)?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(format!("{kills} kills of the target in {seconds:.0} s: newest point compared {looks} times"))
}

#[test]
fn a_few_kills_of_the_target() {
    kills_of_the_target(FEW);
}

/// `FARSHORE_BIN=… cargo test -p farshore-tests --test it -- --ignored --nocapture a_thousand_kills_of_the_target`
#[test]
#[ignore = "takes ten minutes"]
fn a_thousand_kills_of_the_target() {
    kills_of_the_target(many().expect("a number"));
}
