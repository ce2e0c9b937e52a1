//! Source and replica that differ, by nobody's fault that we know of: found, named, kept in mind, repaired on request only.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::Ran;

use crate::support::rig::{GROUP, VOLUME};
use crate::support::{Guest, KIB, MIB, Rig, device, until};

const SLOT: u64 = 64 * KIB;

fn verify(rig: &Rig, more: &[&str]) -> Result<Ran> {
    rig.cli(&[&["verify", GROUP, "--timeout", "120"][..], more].concat())
}

/// What `status` knows of the volume.
fn known(rig: &Rig) -> Result<serde_json::Value> {
    Ok(rig.status()?["verify"][0].clone())
}

fn differs_at(rig: &Rig, slots: &[u64]) -> Result<()> {
    let ranges: Vec<_> = slots.iter().map(|slot| serde_json::json!({ "offset": slot * SLOT, "len": SLOT })).collect();
    let known = known(rig)?;
    ensure!(known["differing"] == serde_json::json!(ranges), "{known}");
    Ok(())
}

/// The file in which the target keeps the volume.
fn base_file(rig: &Rig) -> Result<PathBuf> {
    fn find(folder: &Path) -> Option<PathBuf> {
        let entries: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
        let here = entries.iter().find(|path| path.file_name().is_some_and(|name| name == "v0.raw")).cloned();
        here.or_else(|| entries.iter().find_map(|path| find(path)))
    }
    find(&rig.sites.path("target")).context("the target has a base")
}

/// Goal: a byte of the source that was changed past everybody is found in one pass, named, alarmed and remembered through a
/// kill; nothing is repaired before somebody asks, and then the points before keep what the replica was.
#[test]
fn one_byte_of_the_source_is_found_and_repaired_on_request() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(16 * MIB, 401)?;
            rig.wait()?;
            let fine = verify(rig, &[])?;
            ensure!(fine.code == Some(0) && fine.out.contains("the same as its replica"), "{fine}");
            ensure!(known(rig)?["verified_since"].is_string() && rig.agent_alarm("volume.differs")?.is_none());
            let mut guest = Guest::new(&socket, model, 402)?;
            guest.work(200)?;
            let at_source = 100;
            guest.flush()?;
            rig.wait()?;
            rig.bookmark("before")?;
            let before = guest.model().to_vec();

            rig.expect_errors(&["differ", "checksum", "unreadable", "damaged"]);
            device::flip(&image, at_source * SLOT + 5)?;
            let found = verify(rig, &[])?;
            ensure!(found.code == Some(1) && found.out.contains(&format!("from {} on", at_source * SLOT)), "{found}");
            ensure!(found.err.contains("--repair"), "{found}");
            rig.until_agent_alarm("volume.differs")?;
            differs_at(rig, &[at_source])?;
            rig.check_point("latest", &before)?;

            rig.sites.kill_agent();
            rig.sites.start_agent()?;
            rig.until_agent_alarm("volume.differs")?;
            differs_at(rig, &[at_source])?;

            let repaired = verify(rig, &["--repair"])?;
            ensure!(repaired.code == Some(0), "{repaired}");
            until("the alarm is over", || Ok(rig.agent_alarm("volume.differs")?.is_none().then_some(())))?;
            rig.wait()?;
            let now = device::read_file(&image)?;
            ensure!(now != before, "the byte stays as the source has it");
            rig.check_point("latest", &now)?;
            rig.check_point("bookmark:before", &before)
        },
    );
}

/// Goal: damage in the target's copy is found by a verify, under load, and healed by its repair. Method: a byte of the base, in a slot
/// that only the initial sync wrote.
#[test]
fn damage_of_the_replica_is_found_and_healed() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, socket, model) = rig.protect(16 * MIB, 411)?;
            rig.wait()?;
            let slot = (0..256).find(|slot| {
                let from = usize::try_from(slot * SLOT).expect("small");
                model[from..from + 4096].iter().all(|byte| *byte != 0)
            });
            let slot = slot.context("a slot with content")?;
            rig.expect_errors(&["differ", "checksum", "unreadable", "damaged"]);
            rig.sites.stop_target()?;
            device::flip(&base_file(rig)?, slot * SLOT + 9)?;
            rig.sites.start_target()?;
            let found = verify(rig, &["--json"])?;
            ensure!(found.code == Some(1), "{found}");
            differs_at(rig, &[slot])?;
            ensure!(verify(rig, &["--repair"])?.code == Some(0));
            let mut guest = Guest::new(&socket, model, 412)?;
            guest.begin(200)?;
            let fine = verify(rig, &[])?;
            ensure!(fine.code == Some(0), "under load: {fine}");
            guest.flush()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())
        },
    );
}

/// Goal: bad input is named. Method: no such group, a time that is over, a policy out of range.
#[test]
fn bad_orders_are_named() {
    Rig::test(
        |_| {},
        |rig| {
            rig.protect(4 * MIB, 421)?;
            rig.wait()?;
            rig.cli(&["verify", "nosuch"])?.refused(3, "nosuch", false)?;
            rig.cli(&["verify", GROUP, "--timeout=-1"])?.refused(2, "--timeout", false)?;
            rig.sites.link().cut();
            let late = rig.cli(&["verify", GROUP, "--timeout", "1"])?;
            ensure!(late.code == Some(1) && late.err.contains("within the time"), "{late}");
            rig.sites.link().heal();
            until("the pass goes on by itself", || Ok(known(rig)?["verified_since"].is_string().then_some(())))?;
            ensure!(rig.cli(&["unprotect", VOLUME])?.code == Some(0));
            let empty = rig.cli(&["verify", GROUP])?;
            ensure!(empty.code != Some(0), "{empty}");
            Ok(())
        },
    );
}
