//! The host goes down: its ring is gone, and what it had not made stable is anybody's guess. What is compared then.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::SitesConfig;
use farshore_cli::sites::host::Host;

use crate::support::{Guest, MIB, Rig, device, until};

fn test(test: impl FnOnce(&mut Rig, &Host) -> Result<()>) {
    let host = std::cell::OnceCell::new();
    let configure = |config: &mut SitesConfig| _ = host.set(Host::of(config));
    Rig::test(configure, |rig| match host.get() {
        Some(Ok(host)) => test(rig, host),
        Some(Err(error)) => Err(anyhow::anyhow!("{error:#}")),
        None => Err(anyhow::anyhow!("not configured")),
    });
}

/// The log covers everything, that is recorded, and nothing is left of what had to be compared.
fn until_covered(rig: &Rig) -> Result<()> {
    until("the activity log covers everything", || {
        let log = rig.status()?["activity_log"].clone();
        let covers = log["covers"] == true && log["marked_extents"] == 0;
        Ok((covers && rig.agent_alarm("activity-log.uncovered")?.is_none()).then_some(()))
    })
}

fn logged(rig: &Rig, what: &str) -> bool {
    rig.sites.logs().iter().any(|line| line.contains(what))
}

const SIZE: u64 = 96 * MIB;
/// In an extent that nobody writes to.
const COLD: u64 = 80 * MIB + 4096;
/// In one whose writes are at the target.
const WARM: u64 = 50 * MIB;

/// A volume of 24 extents, of which four were written to: the writes to two of them did not reach the target.
fn used(rig: &mut Rig) -> Result<(PathBuf, PathBuf, Vec<u8>)> {
    let (image, socket, model) = rig.protect(SIZE, 901)?;
    let mut guest = Guest::new(&socket, model, 902)?;
    rig.wait()?;
    until_covered(rig)?;
    guest.noise(WARM, 65_536)?;
    guest.noise(20 * MIB, 4096)?;
    guest.flush()?;
    rig.wait()?;
    rig.sites.link().cut();
    guest.noise(2 * MIB, 65_536)?;
    guest.noise(33 * MIB, 131_072)?;
    guest.flush()?;
    Ok((image, socket, guest.model().to_vec()))
}

/// What is compared finds what differs, and only there: a byte in a cold extent that was changed while the host was down shows who has looked.
fn patch_both(image: &Path) -> Result<Vec<u8>> {
    // As a power cut takes back what was never flushed.
    device::patch(image, WARM + 4096, &[0; 4096])?;
    device::patch(image, COLD, b"written while nobody looked")?;
    device::read_file(image)
}

/// Goal: after the host went down what was active is compared, by itself, and nothing else; and again, when it goes down before that is over.
#[test]
fn after_a_power_cut_what_was_active_is_compared() {
    test(|rig, host| {
        let (image, socket, model) = used(rig)?;
        let mut source = patch_both(&image)?;
        host.goes_down(&mut rig.sites, 1)?;
        rig.sites.start_agent()?;
        let missing = rig.status()?["missing_bytes"].as_u64().context("a number")?;
        ensure!((8 * MIB..=16 * MIB).contains(&missing), "{missing} bytes are to be compared");
        ensure!(logged(rig, "what the activity log names is compared"), "it is said");
        ensure!(rig.agent_alarm("volume.bypassed")?.is_none());
        until_covered(rig)?;
        // Before anything could be compared.
        host.goes_down(&mut rig.sites, 2)?;
        rig.sites.link().heal();
        rig.sites.start_agent()?;
        rig.wait()?;
        // What nobody has compared is what it was.
        let cold = usize::try_from(COLD)?;
        source[cold..cold + 4096].copy_from_slice(&model[cold..cold + 4096]);
        rig.check_point("latest", &source)?;
        let mut guest = Guest::new(&socket, device::read_file(&image)?, 903)?;
        guest.work(100)?;
        guest.flush()?;
        rig.wait()?;
        until_covered(rig)
    });
}

fn dumps_an_extent(rig: &Rig, log: &str) -> Result<bool> {
    let dump: serde_json::Value = serde_json::from_str(&rig.cli(&["log", "dump", log, "--json"])?.ok()?)?;
    let extents = dump["extents"].as_array().context("a list")?;
    let active = extents.iter().filter(|extent| extent["slots"].is_null());
    Ok(active.clone().count() > 0 && dump["active"].as_u64() == Some(active.count() as u64))
}

/// Goal: a log that cannot be relied on, or a volume that was changed since the host's start, has everything compared, and that is said.
/// Method: the log's newest blocks are overwritten; it is removed; the image is changed after the start.
#[test]
fn without_evidence_everything_is_compared() {
    for (case, said) in [("damaged", "damaged"), ("removed", "everything is compared"), ("changed", "was changed")] {
        test(|rig, host| {
            let (image, socket, _) = used(rig)?;
            let source = patch_both(&image)?;
            host.goes_down_before(&mut rig.sites, 1, if case == "changed" { 0 } else { 2 })?;
            let log = rig.sites.path("agent").join("activity.log");
            match case {
                "damaged" => device::patch(&log, 4096, &vec![0xa5; 64 * 4096])?,
                "removed" => std::fs::remove_file(&log).context("remove the log")?,
                _ => {}
            }
            let shown = log.to_str().context("a path in ASCII")?;
            let verified = rig.cli(&["log", "verify", shown])?;
            match case {
                "damaged" => verified.refused(1, "everything is compared", true)?,
                "removed" => verified.refused(3, "no such file", false)?,
                _ => ensure!(verified.ok()?.contains("whole at transaction") && dumps_an_extent(rig, shown)?),
            }
            rig.sites.link().heal();
            rig.sites.start_agent()?;
            ensure!(logged(rig, said), "{case}: it is said");
            ensure!(rig.agent_alarm("volume.bypassed")?.is_some() == (case == "changed"), "{case}");
            rig.wait()?;
            rig.check_point("latest", &source)?;
            until_covered(rig)?;
            // And from then on the log is good again.
            let mut guest = Guest::new(&socket, source, 911)?;
            guest.noise(10 * MIB, 4096)?;
            guest.flush()?;
            host.goes_down(&mut rig.sites, 2)?;
            rig.sites.start_agent()?;
            ensure!(logged(rig, "what the activity log names is compared"), "{case}: it is said");
            guest.reconnect()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())
        });
    }
}

/// Goal: a host whose disks were put back to an older state (a snapshot of it) is told so by the target, and everything is compared.
#[test]
fn a_host_that_was_put_back_is_seen() {
    test(|rig, host| {
        let (image, socket, model) = rig.protect(SIZE, 921)?;
        let mut guest = Guest::new(&socket, model, 922)?;
        rig.wait()?;
        guest.noise(8 * MIB, 4096)?;
        guest.flush()?;
        rig.wait()?;
        until_covered(rig)?;
        rig.sites.kill_agent();
        let (state, kept) = (rig.sites.path("agent"), rig.sites.path("agent.kept"));
        let copy = |from: &Path, to: &Path| -> Result<()> {
            let _ = std::fs::remove_dir_all(to);
            let copied =
                std::process::Command::new("cp").args(["--archive"]).arg(from).arg(to).status().context("copy")?;
            ensure!(copied.success(), "cp failed");
            Ok(())
        };
        copy(&state, &kept)?;
        let old = device::read_file(&image)?;
        rig.sites.start_agent()?;
        guest.reconnect()?;
        guest.noise(60 * MIB, 65_536)?;
        guest.flush()?;
        rig.wait()?;
        let newer = guest.model().to_vec();
        rig.bookmark("newer")?;
        drop(guest);
        rig.sites.kill_agent();
        copy(&kept, &state)?;
        device::patch(&image, 0, &old)?;
        host.goes_down(&mut rig.sites, 1)?;
        rig.sites.start_agent()?;
        rig.wait()?;
        ensure!(logged(rig, "its activity log does not know of them either"), "the reason is said");
        rig.check_point("latest", &old)?;
        rig.check_point("bookmark:newer", &newer)
    });
}

/// Goal: what is not an activity log is not overwritten, and one that cannot be opened protects nobody less. Method: a file with other content; a
/// folder that is not there.
#[test]
fn a_bad_place_for_the_log_is_refused_or_said() {
    Rig::test(
        |_| {},
        |rig| {
            let other = rig.dir().join("other");
            std::fs::write(&other, "somebody's notes").context("write a file")?;
            rig.sites.stop_agent()?;
            let start = |path: &Path| {
                let (config, log) = (rig.sites.path("agent.toml"), path.display().to_string());
                rig.cli(&["agent", "run", "--config", &config.display().to_string(), "--activity-log", &log])
            };
            let refused = start(&other)?;
            ensure!(refused.code == Some(4) && refused.err.contains("holds something else"), "{refused}");
            ensure!(std::fs::read_to_string(&other).context("read it")? == "somebody's notes");
            Ok(())
        },
    );
}
