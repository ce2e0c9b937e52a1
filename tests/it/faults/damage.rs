//! Stored bytes that changed by themselves: found, named, and never shown as data.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::support::rig::{GROUP, VOLUME};
use crate::support::{Guest, KIB, MIB, Rig, device};

/// Segment files of the journal, oldest first.
fn segments(rig: &Rig) -> Result<Vec<PathBuf>> {
    let files = std::fs::read_dir(rig.journal()?).context("list the journal")?;
    let mut files: Vec<PathBuf> = files
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "seg"))
        .collect();
    files.sort();
    Ok(files)
}

fn newest_segment(rig: &Rig) -> Result<(PathBuf, u64)> {
    let path = segments(rig)?.pop().context("the journal has a segment")?;
    let len = std::fs::metadata(&path).context("look at a segment")?.len();
    Ok((path, len))
}

fn verify(rig: &Rig) -> Result<farshore_cli::sites::run::Ran> {
    let (journal, bundle) = (rig.journal()?, rig.sites.path("target.bundle"));
    let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("paths of tests are text");
    rig.cli(&["journal", "verify", &text(&journal)?, "--identity", &text(&bundle)?])
}

/// Flips a bit in the middle of what the journal grows by while `write` runs, and gives the segment.
fn flip_in(rig: &Rig, write: impl FnOnce() -> Result<()>) -> Result<(PathBuf, u64)> {
    let (segment, before) = newest_segment(rig)?;
    write()?;
    let (same, after) = newest_segment(rig)?;
    ensure!(same == segment && after > before + 900 * KIB, "the noise is in this segment: {before} to {after}");
    Ok((segment, before + (after - before) / 2))
}

/// Goal: one flipped bit inside a batch's data is found by `journal verify` and named; the points that need it are refused
/// with the range, never served with other bytes; points of before, and of after the range was written again, are served.
/// Method: noise over a range between two bookmarks, so that the middle of what the journal grew by lies in that noise; then
/// enough noise to fill the segment, whose footer then says which ranges a frame holds.
#[test]
fn a_flipped_bit_is_found_and_never_shown() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (_, socket, model) = rig.protect(16 * MIB, 91)?;
            let mut guest = Guest::new(&socket, model, 92)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("whole")?;
            let whole = guest.model().to_vec();
            let (segment, at) = flip_in(rig, || {
                guest.noise(4 * MIB, 1 << 20)?;
                guest.flush()?;
                rig.wait().map(drop)
            })?;
            rig.bookmark("hurt")?;
            let hurt = guest.model().to_vec();
            // All of it is journaled: each pass over the volume is a point before the next one overwrites it, and fits the ring.
            for pass in 0..9 {
                for piece in 0..16 {
                    guest.noise(piece * MIB, 1 << 20)?;
                }
                guest.flush()?;
                rig.bookmark(&format!("pass-{pass}"))?;
                rig.wait()?;
            }
            rig.bookmark("healed")?;
            ensure!(segments(rig)?.len() > 1, "the segment is full");

            rig.sites.stop_target()?;
            verify(rig)?.ok()?;
            device::flip(&segment, at)?;
            let found = verify(rig)?;
            ensure!(found.code == Some(1), "verify finds the bit: {found}");
            ensure!(found.to_string().contains(&name_of(&segment)?), "and names the file: {found}");

            rig.expect_errors(&["unreadable", "damaged", "checksum differs"]);
            rig.sites.start_target()?;
            check_hurt(rig, &hurt)?;
            rig.check_point("bookmark:whole", &whole)?;
            rig.check_point("bookmark:healed", guest.model())?;
            guest.work(50)?;
            guest.flush()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())
        },
    );
}

/// Goal: damage in the segment that was still open, which has no footer yet, loses the batch: its points and later ones are
/// refused by name, the source is told to compare everything, and from then on points are whole again. Method: as above,
/// without filling the segment.
#[test]
fn damage_in_the_open_segment_is_healed_by_a_comparison() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, socket, model) = rig.protect(16 * MIB, 91)?;
            let mut guest = Guest::new(&socket, model, 92)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("whole")?;
            let whole = guest.model().to_vec();
            let (segment, at) = flip_in(rig, || {
                guest.noise(4 * MIB, 1 << 20)?;
                guest.flush()?;
                rig.wait().map(drop)
            })?;
            rig.bookmark("hurt")?;
            guest.noise(8 * MIB, 1 << 20)?;
            guest.flush()?;
            rig.bookmark("behind")?;
            rig.sites.stop_target()?;
            device::flip(&segment, at)?;
            ensure!(verify(rig)?.code == Some(1), "verify finds the bit");

            rig.expect_errors(&["unreadable", "damaged"]);
            // The source heals it as soon as it hears.
            rig.sites.link().cut();
            rig.sites.start_target()?;
            let heard = crate::support::until("the alarm", || rig.target_alarm("journal.damaged"))?;
            rig.sites.link().heal();
            ensure!(
                heard["text"].as_str().is_some_and(|text| text.contains("batches")),
                "the alarm says where: {heard}"
            );
            rig.check_point("bookmark:whole", &whole)?;
            rig.cli(&["view", "open", GROUP, "--at", "bookmark:hurt"])?.refused(1, "batches", false)?;
            rig.cli(&["view", "open", GROUP, "--at", "bookmark:behind"])?.refused(1, "batches", false)?;
            guest.work(50)?;
            guest.flush()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())?;
            rig.check_point("bookmark:whole", &whole)
        },
    );
}

fn name_of(path: &std::path::Path) -> Result<String> {
    Ok(path.file_name().and_then(|name| name.to_str()).context("a segment has a name")?.to_owned())
}

/// The damaged point: whoever reads the damaged range first gets an error; from then on the point is refused with its range.
fn check_hurt(rig: &Rig, model: &[u8]) -> Result<()> {
    if let Ok(view) = rig.sites.open_view(GROUP, "bookmark:hurt", true) {
        let read = device::read_all(&device::view_socket(&view, VOLUME)?);
        rig.sites.close_view(&view)?;
        match read {
            Ok(bytes) => device::same("a damaged point", &bytes, model).context("damage was shown as data")?,
            Err(error) => {
                ensure!(format!("{error:#}").contains("Input/output"), "an I/O error was expected: {error:#}")
            }
        }
    }
    let heard = crate::support::until("the damage is noticed", || {
        if let Ok(view) = rig.sites.open_view(GROUP, "bookmark:hurt", true) {
            rig.sites.close_view(&view)?;
            return Ok(None);
        }
        rig.target_alarm("journal.damaged")
    })?;
    ensure!(heard["text"].as_str().is_some_and(|text| text.contains("batch")), "the alarm says where: {heard}");
    let ran = rig.cli(&["view", "open", GROUP, "--at", "bookmark:hurt"])?;
    ran.refused(1, "bytes", false)?;
    let inside = |at: u64| (4 * MIB..5 * MIB).contains(&at);
    let first = ran.err.split("bytes ").nth(1).and_then(|rest| rest.split("..").next()?.parse::<u64>().ok());
    ensure!(first.is_some_and(inside), "the range is one of the noise: {ran}");
    Ok(())
}

/// Goal: every byte of a journal is covered: a bit flipped anywhere that is not padding is found. Method: seeded places over
/// the whole journal; each flip is undone before the next.
#[test]
fn verify_finds_a_bit_flipped_anywhere() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, socket, model) = rig.protect(8 * MIB, 95)?;
            let mut guest = Guest::new(&socket, model, 96)?;
            rig.wait()?;
            for _ in 0..5 {
                guest.work(20)?;
                guest.flush()?;
                rig.wait()?;
            }
            rig.sites.stop_target()?;
            verify(rig)?.ok()?;
            let mut random = farshore_uring::sim::SimRng::new(97);
            for segment in segments(rig)? {
                let len = std::fs::metadata(&segment)?.len();
                for _ in 0..12 {
                    let at = random.below(len);
                    device::flip(&segment, at)?;
                    let found = verify(rig)?;
                    device::flip(&segment, at)?;
                    ensure!(
                        found.code == Some(1),
                        "a bit flipped at byte {at} of {len} of {}: {found}",
                        segment.display()
                    );
                }
            }
            verify(rig)?.ok().map(drop)
        },
    );
}

/// Goal: a journal whose end was torn off by a power cut opens, and goes on from what is whole; the source sends the rest
/// again. Method: the newest segment loses its last bytes while the target is down after `kill -9`.
#[test]
fn a_torn_tail_is_sent_again() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, socket, model) = rig.protect(8 * MIB, 101)?;
            let mut guest = Guest::new(&socket, model, 102)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("before")?;
            let before = guest.model().to_vec();
            guest.begin(100)?;
            rig.sites.kill_target();
            guest.flush()?;
            let (segment, len) = newest_segment(rig)?;
            // Half an entry, as a cut in the middle of an append leaves it.
            let garbage = crate::support::pattern::noise(3, 3000);
            device::patch(&segment, len, &garbage)?;
            rig.sites.start_target()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())?;
            rig.check_point("bookmark:before", &before)
        },
    );
}

/// Goal: a target that was put back from an old copy is noticed: the source compares everything, points go on, and nothing
/// of the old points changes. Method: the data folder is copied while the target is down, and put back later.
#[test]
fn a_target_restored_from_a_backup_is_noticed() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(8 * MIB, 111)?;
            let mut guest = Guest::new(&socket, model, 112)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("old")?;
            let old = guest.model().to_vec();
            rig.sites.stop_target()?;
            let (data, copy) = (rig.sites.path("target"), rig.dir().join("backup"));
            let text = |path: &std::path::Path| path.to_str().map(str::to_owned).context("paths of tests are text");
            farshore_cli::sites::run::call("cp", ["-a", "--sparse=always", &text(&data)?, &text(&copy)?])?;
            rig.sites.start_target()?;
            guest.work(100)?;
            guest.flush()?;
            rig.bookmark("lost")?;
            rig.sites.stop_target()?;
            std::fs::remove_dir_all(&data).context("lose the data")?;
            std::fs::rename(&copy, &data).context("put the backup in place")?;
            guest.work(50)?;
            guest.flush()?;
            rig.sites.start_target()?;
            rig.wait()?;
            guest.verify()?;
            device::same("the source", &device::read_file(&image)?, guest.model())?;
            rig.check_point("latest", guest.model())?;
            rig.check_point("bookmark:old", &old)
        },
    );
}
