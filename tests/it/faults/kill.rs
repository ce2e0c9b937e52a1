//! Daemons that die (I1, I4): the guest loses nothing, and what it wrote is what a view shows in the end.

use anyhow::{Context, Result, ensure};

use crate::support::rig::VOLUME;
use crate::support::{Guest, MIB, Rig, device};

const ROUNDS: usize = 5;

/// The source, the newest point, and what the guest believes are one.
pub(super) fn check_all(rig: &Rig, guest: &mut Guest, image: &std::path::Path) -> Result<()> {
    guest.flush()?;
    guest.verify()?;
    rig.wait()?;
    device::same("the source", &device::read_file(image)?, guest.model())?;
    rig.check_point("latest", guest.model())
}

/// Goal: after `kill -9` of the agent under load nothing that was acknowledged is lost on either side, and bookmarks of
/// before still show what they showed. Method: five times, with requests in flight, which the guest repeats.
#[test]
fn the_agent_may_be_killed_at_any_time() {
    Rig::test(
        |config| config.ring = 32 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(64 * MIB, 11)?;
            let mut guest = Guest::new(&socket, model, 12)?;
            rig.wait()?;
            let mut marks = Vec::new();
            for round in 0..ROUNDS {
                guest.begin(300)?;
                rig.sites.kill_agent();
                rig.sites.start_agent().with_context(|| format!("start number {round}"))?;
                guest.reconnect()?;
                guest.verify()?;
                guest.work(50)?;
                guest.flush()?;
                let name = format!("after-{round}");
                rig.bookmark(&name)?;
                marks.push((name, guest.model().to_vec()));
            }
            guest.work(100)?;
            check_all(rig, &mut guest, &image)?;
            marks.iter().try_for_each(|(name, model)| rig.check_point(&format!("bookmark:{name}"), model))
        },
    );
}

/// Goal: after `kill -9` of the target under load no point that was acknowledged is lost, and the source notices nothing.
/// Method: five times, while batches are under way; bookmarks are acknowledged points.
#[test]
fn the_target_may_be_killed_at_any_time() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, model) = rig.protect(64 * MIB, 21)?;
            let mut guest = Guest::new(&socket, model, 22)?;
            rig.wait()?;
            let mut marks = Vec::new();
            for round in 0..ROUNDS {
                guest.work(200)?;
                guest.flush()?;
                let name = format!("before-{round}");
                rig.bookmark(&name)?;
                marks.push((name, guest.model().to_vec()));
                guest.begin(200)?;
                rig.sites.kill_target();
                guest.work(100)?;
                rig.sites.start_target().with_context(|| format!("start number {round}"))?;
                let (name, model) = marks.last().context("just added")?;
                rig.check_point(&format!("bookmark:{name}"), model)?;
            }
            check_all(rig, &mut guest, &image)?;
            marks.iter().try_for_each(|(name, model)| rig.check_point(&format!("bookmark:{name}"), model))
        },
    );
}

/// Goal: both at once, as when a rack loses power and both sites stand in it. Method: as above, three times.
#[test]
fn both_may_be_killed_together() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(32 * MIB, 31)?;
            let mut guest = Guest::new(&socket, model, 32)?;
            // The first two rounds do not even wait for the initial sync.
            for _ in 0..3 {
                guest.begin(150)?;
                rig.sites.kill_agent();
                rig.sites.kill_target();
                rig.sites.start_target()?;
                rig.sites.start_agent()?;
                guest.reconnect()?;
            }
            check_all(rig, &mut guest, &image)
        },
    );
}

/// Goal: a ring that is gone is noticed, and everything is compared: also what was written while nobody looked. Method: the
/// agent is killed, the ring's file removed, and the source changed behind its back where it had not been written before.
#[test]
fn a_lost_ring_means_that_everything_is_compared() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(32 * MIB, 41)?;
            let mut guest = Guest::new(&socket, model, 42)?;
            rig.wait()?;
            guest.work(200)?;
            guest.flush()?;
            let bookmark = rig.bookmark("before")?;
            let before = guest.model().to_vec();
            rig.sites.link().cut();
            guest.work(50)?;
            rig.sites.kill_agent();
            let ring = rig.sites.ring_file()?;
            std::fs::remove_file(&ring).with_context(|| format!("remove {}", ring.display()))?;
            device::patch(&image, 5 * MIB + 12_288, b"written while nobody looked")?;
            let source = device::read_file(&image)?;
            rig.sites.link().heal();
            rig.sites.start_agent()?;
            let point = rig.wait()?;
            ensure!(point["id"] != bookmark["id"], "points go on: {point}");
            rig.check_point("latest", &source)?;
            rig.check_point("bookmark:before", &before)?;
            let mut guest = Guest::new(&socket, source, 43)?;
            guest.work(100)?;
            check_all(rig, &mut guest, &image)
        },
    );
}

/// Goal: a clean stop needs no comparison and loses nothing; the volume can be changed only by those who are told.
/// Method: stop both in either order with data on the way, start again, compare.
#[test]
fn a_clean_stop_loses_nothing() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(32 * MIB, 51)?;
            let mut guest = Guest::new(&socket, model, 52)?;
            rig.wait()?;
            guest.work(200)?;
            guest.leave()?;
            rig.sites.stop_agent()?;
            // Drained on the way down: the target has it all although nobody waited.
            rig.check_point("latest", guest.model())?;
            rig.sites.stop_target()?;
            rig.sites.start_agent()?;
            let mut guest = Guest::new(&socket, guest.model().to_vec(), 53)?;
            guest.work(100)?;
            rig.sites.start_target()?;
            check_all(rig, &mut guest, &image)?;
            guest.work(50)?;
            guest.leave()?;
            rig.sites.stop_target()?;
            // Nobody to drain to: what is left is kept for the next start.
            rig.sites.stop_agent()?;
            rig.sites.start_target()?;
            rig.sites.start_agent()?;
            let mut guest = Guest::new(&socket, guest.model().to_vec(), 54)?;
            check_all(rig, &mut guest, &image)?;
            ensure!(rig.read_point("latest", VOLUME)? == guest.model(), "the view stays what it was");
            Ok(())
        },
    );
}
