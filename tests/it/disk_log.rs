//! An outage that is longer than the ring: what the guests write waits in the disk log, in order.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::SitesConfig;
use farshore_cli::sites::host::Host;
use serde_json::json;

use crate::faults::disk::BadDisk;
use crate::support::rig::{GROUP, start_in_vain};
use crate::support::{Guest, MIB, Rig, device, until};

const SIZE: u64 = 64 * MIB;

/// A ring that is full at once, and a disk log beside it.
fn with_log(config: &mut SitesConfig) {
    config.ring = 8 * MIB;
    config.agent_toml = format!("log = {:?}\nlog_size = '256MiB'\n", config.dir.join("disk.log"));
}

/// Writes `mib` MiB that do not compress, and waits until the log has most of it.
fn write(rig: &Rig, guest: &mut Guest, mib: u64) -> Result<()> {
    for at in 0..mib * 4 {
        guest.noise(at * 256 * 1024 % SIZE, 256 * 1024)?;
        if at % 8 == 7 {
            // As fast as the log goes, whatever else this machine does: the ring must not run full.
            until("the ring has room", || {
                let status = rig.status()?;
                let used = status["ring_used_bytes"].as_u64().context("a number")?;
                Ok((used < 5 * MIB).then_some(()))
            })?;
        }
    }
    guest.flush()
}

/// Orders a bookmark, which is cut into the stream, and does not wait until the target has it.
fn order_bookmark(rig: &Rig, name: &str) -> Result<()> {
    let body = json!({ "group": GROUP, "name": name, "timeout_s": 1 });
    let made = rig.sites.agent().post("/v1/bookmark", &body);
    ensure!(made.is_err(), "nobody can have it yet");
    Ok(())
}

fn is_in_use(rig: &Rig) -> Result<()> {
    let status = rig.status()?;
    ensure!(status["tier"] == "log" && status["ring_closed_count"] == 0, "{status}");
    ensure!(status["log_used_bytes"].as_u64() > Some(8 * MIB), "{status}");
    ensure!(rig.agent_alarm("disk-log.in-use")?.is_some() && rig.agent_alarm("ring.closed")?.is_none());
    Ok(())
}

fn nothing_was_compared(rig: &Rig) -> Result<()> {
    let said = rig.sites.logs().into_iter().find(|line| line.contains("everything is compared"));
    ensure!(said.is_none(), "{said:?}");
    Ok(())
}

fn is_over(rig: &Rig) -> Result<()> {
    until("the log is empty", || {
        let status = rig.status()?;
        let over = status["tier"] == "ring" && status["log_used_bytes"] == 0;
        Ok((over && rig.agent_alarm("disk-log.in-use")?.is_none()).then_some(()))
    })
}

/// The commands that look into a log name its batches, and a flipped byte in any of them.
fn people_can_look(rig: &Rig) -> Result<()> {
    let log = rig.dir().join("disk.log");
    let shown = |path: &Path| path.to_str().map(str::to_owned).context("a path in ASCII");
    let path = shown(&log)?;
    let dump = rig.cli(&["log", "dump", &path])?.ok()?;
    ensure!(dump.contains("first") && dump.contains("second") && dump.contains("recoverable"), "{dump}");
    rig.cli(&["log", "verify", &path])?.ok()?;
    let list = rig.cli(&["log", "dump", &path, "--json"])?.ok()?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    let entries = list["lines"][0]["entries"].as_array().context("a list")?;
    ensure!(list["batches"].as_u64() == Some(entries.len() as u64) && entries.len() > 4, "{list}");
    let bad = rig.dir().join("bad.log");
    std::fs::copy(&log, &bad)?;
    // Inside of the first segment's first batch.
    device::flip(&bad, 4096 + 4096 + entries[0]["at"].as_u64().context("a number")? + 4096 + 100)?;
    rig.cli(&["log", "verify", &shown(&bad)?])?.refused(1, "damaged", true)?;
    device::flip(&bad, 64)?;
    rig.cli(&["log", "dump", &shown(&bad)?])?.refused(1, "first block is damaged", true)?;
    rig.cli(&["log", "dump", &shown(&rig.dir().join("source.img"))?])?.refused(1, "neither", true)?;
    rig.cli(&["log", "dump", &shown(&rig.dir().join("none.log"))?])?.refused(3, "no such file", false)
}

/// Goal: no write and no point of an outage is lost, order is kept, nothing is compared, whatever becomes of the agent's process in between.
#[test]
fn an_outage_longer_than_the_ring_loses_no_point() {
    Rig::test(with_log, |rig| {
        let (image, socket, model) = rig.protect(SIZE, 31)?;
        let mut guest = Guest::new(&socket, model, 32)?;
        rig.wait()?;
        rig.sites.link().cut();
        write(rig, &mut guest, 24)?;
        order_bookmark(rig, "first")?;
        let first = guest.model().to_vec();
        write(rig, &mut guest, 24)?;
        is_in_use(rig)?;
        // Killed: the ring is there, and what it gave away is in the log.
        rig.sites.kill_agent();
        rig.sites.start_agent()?;
        guest.reconnect()?;
        write(rig, &mut guest, 24)?;
        is_in_use(rig)?;
        order_bookmark(rig, "second")?;
        let second = guest.model().to_vec();
        // Stopped: what is in the ring goes there, too, and order and points go on with the next ring.
        guest.leave()?;
        rig.sites.stop_agent()?;
        people_can_look(rig)?;
        rig.sites.start_agent()?;
        guest.reconnect()?;
        ensure!(rig.status()?["missing_bytes"] == 0, "{}", rig.status()?);
        guest.noise(0, 4096)?;
        guest.flush()?;
        rig.sites.link().heal();
        rig.wait()?;
        rig.check_point("bookmark:first", &first)?;
        rig.check_point("bookmark:second", &second)?;
        rig.check_point("latest", guest.model())?;
        is_over(rig)?;
        nothing_was_compared(rig)?;
        guest.leave()?;
        device::same("the source", &device::read_file(&image)?, guest.model())
    });
}

/// Goal: after the host went down what is in the log is shipped in order, with its points, and only what was active is compared.
#[test]
fn the_log_survives_the_host() {
    let host = std::cell::OnceCell::new();
    let configure = |config: &mut SitesConfig| {
        with_log(config);
        _ = host.set(Host::of(config));
    };
    Rig::test(configure, |rig| {
        let host = host.get().context("configured")?.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let (image, socket, model) = rig.protect(SIZE, 41)?;
        let mut guest = Guest::new(&socket, model, 42)?;
        rig.wait()?;
        until("the activity log covers everything", || {
            let covers = rig.status()?["activity_log"]["covers"] == true;
            Ok((covers && rig.agent_alarm("activity-log.uncovered")?.is_none()).then_some(()))
        })?;
        rig.sites.link().cut();
        write(rig, &mut guest, 12)?;
        order_bookmark(rig, "before")?;
        let before = guest.model().to_vec();
        write(rig, &mut guest, 24)?;
        is_in_use(rig)?;
        host.goes_down(&mut rig.sites, 1)?;
        rig.sites.start_agent()?;
        rig.sites.link().heal();
        rig.wait()?;
        rig.check_point("bookmark:before", &before)?;
        rig.check_point("latest", &device::read_file(&image)?)?;
        is_over(rig)?;
        nothing_was_compared(rig)
    });
}

/// Goal: a log that is gone is said, and everything is compared: nothing is claimed of what was in it.
#[test]
fn a_lost_log_is_said_and_compared() {
    Rig::test(with_log, |rig| {
        let (_, socket, model) = rig.protect(SIZE, 51)?;
        let mut guest = Guest::new(&socket, model, 52)?;
        rig.wait()?;
        rig.sites.link().cut();
        write(rig, &mut guest, 24)?;
        is_in_use(rig)?;
        rig.sites.kill_agent();
        std::fs::remove_file(rig.dir().join("disk.log")).context("remove the log")?;
        rig.sites.start_agent()?;
        guest.reconnect()?;
        let text = rig.until_agent_alarm("disk-log.lost")?;
        ensure!(text.contains("everything is compared"), "{text}");
        rig.sites.link().heal();
        rig.wait()?;
        rig.check_point("latest", guest.model())
    });
}

/// Goal: a log that is full ends in the extents tier, not in a guest's error, and that ends by itself.
#[test]
fn a_full_log_falls_back_to_extents() {
    Rig::test(with_log, |rig| {
        let (_, socket, model) = rig.protect(SIZE, 61)?;
        let mut guest = Guest::new(&socket, model, 62)?;
        rig.wait()?;
        rig.sites.link().cut();
        let is_full = || Ok::<_, anyhow::Error>(rig.agent_alarm("disk-log.full")?.is_some());
        let mut at = 0;
        until("the log is full and the ring closed", || {
            for _ in 0..8 {
                guest.noise(at * 256 * 1024 % SIZE, 256 * 1024)?;
                at += 1;
            }
            until("the ring has room, or the log has none", || {
                let room = rig.status()?["ring_used_bytes"].as_u64().context("a number")? < 5 * MIB;
                Ok((room || is_full()?).then_some(()))
            })?;
            Ok((is_full()? && rig.status()?["tier"] == "extents").then_some(()))
        })?;
        rig.sites.link().heal();
        rig.wait()?;
        rig.check_point("latest", guest.model())?;
        is_over(rig)?;
        ensure!(rig.agent_alarm("disk-log.full")?.is_none());
        guest.verify()
    });
}

/// Goal: a log whose disk hangs, or fails, keeps no guest: their writes go on, into the ring and then into the extents, with an alarm; and all of it
/// ends by itself. Method: the log lies on a file system that is frozen, or whose blocks cannot be written.
#[test]
fn a_log_on_a_bad_disk_keeps_no_guest() {
    for hangs in [true, false] {
        let bad = BadDisk::mount(384 * MIB).expect("a disk that can be told to fail");
        let configure = |config: &mut SitesConfig| {
            config.ring = 8 * MIB;
            config.agent_toml = format!("log = {:?}\nlog_size = '256MiB'\n", bad.path().join("disk.log"));
        };
        Rig::test(configure, |rig| {
            let (_, socket, model) = rig.protect(SIZE, 71)?;
            let mut guest = Guest::new(&socket, model, 72)?;
            rig.wait()?;
            rig.sites.link().cut();
            if hangs {
                bad.hang()?;
            } else {
                rig.expect_errors(&["disk log"]);
                bad.fail()?;
            }
            // Far more than the ring holds, each write answered before the next: none waits for the log.
            for at in 0..96 {
                guest.noise(at * 256 * 1024 % SIZE, 256 * 1024)?;
            }
            guest.flush()?;
            let text = rig.until_agent_alarm("disk-log.failed")?;
            ensure!(text.contains("has not answered") == hangs, "{text}");
            until("the ring is closed", || Ok((rig.status()?["tier"] == "extents").then_some(())))?;
            guest.verify()?;
            if hangs {
                bad.go_on()?;
            } else {
                bad.heal()?;
            }
            rig.sites.link().heal();
            rig.wait()?;
            rig.check_point("latest", guest.model())?;
            is_over(rig)?;
            until("the alarm is over", || Ok(rig.agent_alarm("disk-log.failed")?.is_none().then_some(())))?;
            guest.leave()
        });
    }
}

#[test]
fn places_that_cannot_be_used_are_named() {
    Rig::test(with_log, |rig| {
        let lines = |more: &str| {
            format!(
                "identity = {:?}\nstate = {:?}\nsocket = {:?}\nring_dir = {:?}\nupstream = '127.0.0.1:9'\n{more}\n",
                rig.sites.path("agent.bundle"),
                rig.dir().join("state-2"),
                rig.dir().join("vain.sock"),
                rig.dir().join("rings-2"),
            )
        };
        let file = rig.dir().join("vain.toml");
        let ours = rig.dir().join("disk.log");
        let foreign = rig.dir().join("foreign");
        std::fs::write(&foreign, b"somebody's data").context("write")?;
        let newer = rig.dir().join("newer");
        std::fs::write(&newer, newer_log()).context("write")?;
        for (more, code, part) in [
            ("log_size = '1GiB'".to_owned(), 2, "log_size"),
            (format!("log = {foreign:?}\nlog_size = '1MiB'"), 2, "log_size"),
            (format!("log = {foreign:?}"), 4, "holds something else"),
            (format!("log = {ours:?}"), 4, "another agent"),
            (format!("log = {newer:?}\nlog_size = '256MiB'"), 4, "format 9"),
        ] {
            let ran = start_in_vain("agent", &file, &lines(&more))?;
            ran.refused(code, part, code == 4).with_context(|| format!("for {more:?}"))?;
        }
        ensure!(std::fs::read(&foreign).context("read")? == b"somebody's data", "nothing was touched");
        Ok(())
    });
}

/// The first block of a log of a format that is not there yet.
fn newer_log() -> Vec<u8> {
    let mut block = vec![0; 4096];
    block[..8].copy_from_slice(b"FARSDLG1");
    block[24] = 9;
    let sum = blake3::hash(&block[..496]);
    block[496..512].copy_from_slice(&sum.as_bytes()[..16]);
    block
}
