//! A link as bad as they come, and daemons that stand still (I1, I5): the guest notices nothing, and points go on.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::Weather;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::kill;
use crate::support::{Guest, MIB, Rig, until};

const VOLUME_BYTES: u64 = 16 * MIB;

fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The source, the newest point, and what the guest believes are one; nothing was given up on the way.
fn check_all(rig: &Rig, guest: &mut Guest, image: &Path) -> Result<()> {
    kill::check_all(rig, guest, image)?;
    let status = rig.status()?;
    ensure!(status["tier"] == "ring" && status["ring_closed_count"] == 0, "the ring was to bridge it: {status}");
    Ok(())
}

/// Goal: a link that is slow, loses, doubles and reorders datagrams delays points and changes none. Method: each alone, then all of it, with
/// a bookmark in each, which shows in the end what it showed then.
#[test]
fn a_bad_link_delays_points_and_changes_none() {
    let fine = Weather::default();
    let weathers = [
        ("delay", Weather { delay: millis(60), ..fine }),
        ("loss", Weather { lost: 50, ..fine }),
        ("reordering", Weather { jitter: millis(20), ..fine }),
        ("doubles", Weather { doubled: 200, ..fine }),
        ("all of it", Weather { delay: millis(30), jitter: millis(15), lost: 20, doubled: 20 }),
    ];
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 131)?;
            let mut guest = Guest::new(&socket, model, 132)?;
            rig.wait()?;
            let mut marks = Vec::new();
            for (number, (name, weather)) in weathers.into_iter().enumerate() {
                rig.sites.link().set_weather(weather);
                guest.work(100)?;
                guest.flush()?;
                let mark = format!("weather-{number}");
                rig.bookmark(&mark).with_context(|| format!("under {name}"))?;
                marks.push((mark, guest.model().to_vec()));
                check_all(rig, &mut guest, &image).with_context(|| format!("under {name}"))?;
            }
            rig.sites.link().set_weather(fine);
            guest.work(50)?;
            check_all(rig, &mut guest, &image)?;
            marks.iter().try_for_each(|(mark, model)| rig.check_point(&format!("bookmark:{mark}"), model))
        },
    );
}

/// Goal: a source whose address changes, as behind a NAT that forgets, goes on; so it does from a black hole into which all fell for longer
/// than the link waits. Method: new addresses under load, then a cut until the alarm, with a new address behind it.
#[test]
fn new_addresses_and_black_holes_are_survived() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 141)?;
            let mut guest = Guest::new(&socket, model, 142)?;
            rig.wait()?;
            for round in 0..5 {
                guest.work(30)?;
                rig.sites.link().rebind();
                guest.work(30)?;
                check_all(rig, &mut guest, &image).with_context(|| format!("new address {round}"))?;
            }
            rig.sites.link().cut();
            guest.work(60)?;
            rig.until_agent_alarm("link.down")?;
            rig.sites.link().rebind();
            rig.sites.link().heal();
            check_all(rig, &mut guest, &image).context("behind the black hole")?;
            until("the alarm is over", || Ok(rig.agent_alarm("link.down")?.is_none().then_some(())))
        },
    );
}

fn send(pid: Option<u32>, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid.context("it runs")?).context("a process id")?;
    signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal}"))
}

/// Goal: a target that stands still (as a stopped, swapped out or suspended one does) keeps no guest, is an alarm at the source, and goes on
/// where it was. Method: stopped until the source gives the link up, and only for a moment.
#[test]
fn a_stopped_target_keeps_no_guest() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 151)?;
            let mut guest = Guest::new(&socket, model, 152)?;
            rig.wait()?;
            for is_long in [false, true] {
                guest.begin(50)?;
                send(rig.sites.target_pid(), Signal::SIGSTOP)?;
                // All of it is answered while the target stands.
                guest.work(100)?;
                guest.flush()?;
                if is_long {
                    rig.until_agent_alarm("link.down")?;
                }
                send(rig.sites.target_pid(), Signal::SIGCONT)?;
                check_all(rig, &mut guest, &image).with_context(|| format!("long: {is_long}"))?;
            }
            Ok(())
        },
    );
}

/// How many times the target has said that its source is gone.
fn gone(rig: &Rig) -> usize {
    rig.sites.logs().iter().filter(|line| line.starts_with("target: ") && line.contains("a source is gone")).count()
}

/// Goal: an agent that stands still loses nothing: its guest waits, and when it goes on so do guest and points. Method: both of its processes
/// stopped with requests under way, for a moment, and until the target says that its source is gone.
#[test]
fn a_stopped_agent_goes_on() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(VOLUME_BYTES, 161)?;
            let mut guest = Guest::new(&socket, model, 162)?;
            rig.wait()?;
            let worker = Some(rig.sites.await_worker(None)?);
            for is_long in [false, true] {
                let before = gone(rig);
                guest.begin(50)?;
                // The supervisor first: else it might take the worker for one that hangs.
                for pid in [rig.sites.supervisor_pid(), worker] {
                    send(pid, Signal::SIGSTOP)?;
                }
                if is_long {
                    until("the target misses its source", || Ok((gone(rig) > before).then_some(())))?;
                }
                for pid in [worker, rig.sites.supervisor_pid()] {
                    send(pid, Signal::SIGCONT)?;
                }
                guest.work(50)?;
                check_all(rig, &mut guest, &image).with_context(|| format!("long: {is_long}"))?;
                ensure!(rig.sites.agent_pid() == worker, "the worker is another one");
            }
            Ok(())
        },
    );
}
