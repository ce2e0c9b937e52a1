//! A target whose disk is full or read-only.

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::SitesConfig;

use super::disk::SmallDisk;
use crate::support::rig::start_in_vain;
use crate::support::{Guest, KIB, MIB, Rig, device, until};
use farshore_cli::sites::run::call;

/// Goal: a full disk stops acknowledgements, with an alarm on both sides, and nothing else: no error for the guest, no lost
/// point, nothing lost when there is space again. Method: a disk of which nearly all is taken away, noise, and back.
#[test]
fn a_full_disk_pauses_replication_and_loses_nothing() {
    let disk = SmallDisk::mount(768 * MIB).expect("a small disk");
    Rig::test(
        |config: &mut SitesConfig| {
            config.target_data = Some(disk.data());
            config.ring = 32 << 20;
        },
        |rig| {
            let (image, socket, model) = rig.protect(32 * MIB, 61)?;
            let mut guest = Guest::new(&socket, model, 62)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("before")?;
            let before = guest.model().to_vec();
            let free = 768 * MIB - used(&disk)?;
            rig.expect_errors(&["no space", "are free on the target's disk"]);
            disk.fill(free - 16 * MIB)?;
            let mut place = 0;
            let alarm = until("the target says that its disk is full", || {
                guest.noise(place * MIB % (32 * MIB), 1 << 20)?;
                place += 1;
                rig.target_alarm("target.disk_full")
            })?;
            ensure!(
                alarm["subject"].as_str().is_some_and(|subject| !subject.is_empty()),
                "the group is named: {alarm}"
            );
            rig.until_agent_alarm("target.paused")?;
            let paused = rig.points()?.len();
            guest.work(100)?;
            guest.flush()?;
            ensure!(rig.points()?.len() == paused, "no point is promised while the disk is full");
            rig.cli(&["wait", "g", "--timeout", "0.3"])?.refused(1, "g", false)?;
            rig.check_point("bookmark:before", &before)?;
            disk.empty()?;
            until("the pause ends", || Ok(rig.agent_alarm("target.paused")?.is_none().then_some(())))?;
            rig.wait()?;
            ensure!(rig.target_alarm("target.disk_full")?.is_none(), "the target's alarm is over");
            guest.verify()?;
            device::same("the source", &device::read_file(&image)?, guest.model())?;
            rig.check_point("latest", guest.model())?;
            rig.check_point("bookmark:before", &before)
        },
    );
}

fn used(disk: &SmallDisk) -> Result<u64> {
    let stat = nix::sys::statvfs::statvfs(disk.path()).context("look at the disk")?;
    Ok((stat.blocks() - stat.blocks_free()) * stat.fragment_size())
}

/// Goal: a full disk at the start, or a target killed while it is full, is no end either.
#[test]
fn a_target_killed_with_a_full_disk_comes_back() {
    let disk = SmallDisk::mount(768 * MIB).expect("a small disk");
    Rig::test(
        |config: &mut SitesConfig| {
            config.target_data = Some(disk.data());
            config.ring = 32 << 20;
        },
        |rig| {
            let (_, socket, model) = rig.protect(16 * MIB, 71)?;
            let mut guest = Guest::new(&socket, model, 72)?;
            rig.wait()?;
            rig.expect_errors(&["no space", "are free on the target's disk"]);
            disk.fill(768 * MIB - used(&disk)? - 8 * MIB)?;
            let mut place = 0;
            until("the disk is full", || {
                guest.noise(place * MIB % (16 * MIB), 1 << 20)?;
                place += 1;
                rig.target_alarm("target.disk_full")
            })?;
            rig.sites.kill_target();
            disk.empty()?;
            rig.sites.start_target()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())
        },
    );
}

#[test]
fn a_read_only_disk_is_named() {
    let disk = SmallDisk::mount(16 * MIB).expect("a small disk");
    let place = disk.path().to_str().expect("a temporary folder's name is text").to_owned();
    call("mount", ["-o", "remount,ro", &place]).expect("remount");
    Rig::test(
        |_| {},
        |rig| {
            let lines = format!(
                "identity = {:?}\ndata = {:?}\nlisten = \"127.0.0.1:0\"\nsocket = {:?}\n",
                rig.sites.path("target.bundle"),
                disk.data(),
                rig.dir().join("vain.sock")
            );
            let ran = start_in_vain("target", &rig.dir().join("t.toml"), &lines)?;
            ran.refused(1, disk.data().to_str().context("text")?, false)?;
            let lines = format!(
                "identity = {:?}\nstate = {:?}\nupstream = \"127.0.0.1:9\"\nsocket = {:?}\n",
                rig.sites.path("agent.bundle"),
                disk.path().join("state"),
                rig.dir().join("vain.sock")
            );
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &lines)?;
            ran.refused(1, disk.path().join("state").to_str().context("text")?, false)
        },
    );
}

/// The smallest piece that the stream moves is written again and again: the journal grows, the view stays right, and
/// retention by size gives the space back without touching the newest point.
#[test]
fn retention_by_size_keeps_the_newest_point_right() {
    Rig::test(
        |config| config.ring = 32 << 20,
        |rig| {
            let (_, socket, model) = rig.protect(16 * MIB, 81)?;
            let mut guest = Guest::new(&socket, model, 82)?;
            rig.wait()?;
            rig.cli(&["policy", "set", "g", "size_limit=64MiB", "keep=1s"])?.ok()?;
            let mut round = 0;
            until("the journal is cut", || {
                for _ in 0..16 {
                    guest.noise(round * 256 * KIB % (16 * MIB), 256 << 10)?;
                    round += 1;
                }
                let point = rig.bookmark(&format!("mark-{round}"))?;
                rig.check_point("latest", guest.model()).with_context(|| format!("after {point}"))?;
                let oldest = rig.points()?.first().cloned().context("there are points")?;
                // The very first marks are gone once the horizon passed them.
                Ok((round > 64 && oldest["bookmark"] != "mark-16" && !has_bookmark(rig, "mark-16")?).then_some(()))
            })?;
            rig.cli(&["view", "open", "g", "--at", "bookmark:mark-16"])?.refused(3, "mark-16", false)
        },
    );
}

fn has_bookmark(rig: &Rig, name: &str) -> Result<bool> {
    Ok(rig.points()?.iter().any(|point| point["bookmark"] == name))
}
