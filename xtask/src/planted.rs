//! Planted bugs: each is put into a copy of the workspace, and the simulation has to find it. So we know that it can see.
//!
//! `FARSHORE_PLANTED=words` runs those whose name contains one of the words (with commas between them); `FARSHORE_SEEDS=n` tries so many seeds
//! of each test (default 40), a few of each in turn.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::process::{self, show};

/// A bug: replacements of text that stands once in its file. More than one where a second check would hold alone.
struct Bug {
    name: &'static str,
    /// What it breaks.
    invariant: &'static str,
    edits: &'static [Edit],
}

struct Edit {
    file: &'static str,
    old: &'static str,
    new: &'static str,
}

/// Longest run of one turn. A bug that makes the simulation stand still counts as found.
const TURN_MAX: Duration = Duration::from_secs(120);
const SEEDS: u64 = 40;
/// Seeds of one test before the next has its turn.
const TURN: u64 = 4;

/// A simulation that looks for bugs.
struct World {
    name: &'static str,
    /// Bugs in files that begin so.
    sources: &'static str,
    package: &'static str,
    program: &'static str,
    /// Tests, each with seeds of its own.
    tests: &'static [&'static str],
}

const WORLDS: &[World] = &[
    World {
        name: "the filter's world",
        sources: "blkfilter/",
        package: "farshore-blkfilter",
        program: "it",
        tests: &["what_differs_after_a_crash"],
    },
    World {
        name: "both sites' world",
        sources: "",
        package: "farshore-tests",
        program: "sim",
        tests: &[
            "sites_agree",
            "what_the_activity_log_names",
            "an_activity_log_that_fails",
            "outages_fit_into_the_disk_log",
            "what_was_put_back",
            "errors_of_the_source",
            "errors_of_the_target",
        ],
    },
];

const fn bug(name: &'static str, invariant: &'static str, edits: &'static [Edit]) -> Bug {
    Bug { name, invariant, edits }
}

const fn edit(file: &'static str, old: &'static str, new: &'static str) -> Edit {
    Edit { file, old, new }
}

#[rustfmt::skip]
const BUGS: &[Bug] = &[
    bug("flush-before-eviction", "I4", &[edit("blkfilter/src/activity/keeper.rs",
        "let stable = || place.stamp.load(Ordering::Acquire) < volume.flushes_ended.load(Ordering::Acquire);",
        "let stable = || true || place.stamp.load(Ordering::Acquire) < volume.flushes_ended.load(Ordering::Acquire);")]),
    bug("evict-without-mark", "I4", &[edit("blkfilter/src/activity/keeper.rs",
        "        (true, false) => Ok((volume.all_slots(extent.number), position)),",
        "        (true, false) => Ok((0, position)),")]),
    bug("activate-before-sync", "I4", &[edit("blkfilter/src/activity/keeper.rs",
        "            self.write_transaction(chunk.to_vec())?;\n        }\n        self.file.sync()?;\n        self.made_durable();",
        "            self.write_transaction(chunk.to_vec())?;\n        }\n        self.made_durable();")]),
    bug("settle-forgets-marks", "I4", &[edit("blkfilter/src/activity/keeper.rs",
        "            if mask != 0 && !self.is_active(extent) {",
        "            if mask != 0 && false && !self.is_active(extent) {")]),
    bug("log-claims-cover-before-it-answers", "I4", &[
        edit("blkfilter/src/activity/keeper.rs",
            "        if self.log.passing.load(Ordering::Acquire) && !starved {", "        if self.log.passing.load(Ordering::Acquire) {"),
        edit("blkfilter/src/activity/keeper.rs",
            "let upheld = stable && !self.log.passes() && self.log.answered() >= self.owed;", "let upheld = stable;"),
    ]),
    bug("no-stall-limit", "I1", &[edit("blkfilter/src/activity/mod.rs",
        "        self.passing.store(true, Ordering::SeqCst);\n        self.volumes().values().for_each(|volume| volume.wake_queues());",
        "        self.volumes().values().for_each(|volume| volume.wake_queues());")]),
    bug("write-does-not-wait-for-its-extent", "I4", &[edit("blkfilter/src/activity/mod.rs",
        "        active || self.passes()\n", "        active || true\n")]),
    bug("skip-the-range-lock", "I3", &[edit("blkfilter/src/queue.rs",
        "let granted = self.capture.as_ref().is_none_or(|capture| capture.owner.lock(op, range));",
        "let granted = self.capture.as_ref().is_none_or(|capture| capture.owner.lock(op, range)) || op % 2 == 1;")]),
    bug("no-mark-without-ticket", "I4", &[edit("blkfilter/src/queue.rs",
        "        self.group.mark_missing(&self.volume, desc.offset, desc.length);\n        // After the mark: until",
        "        // After the mark: until")]),
    bug("failed-write-is-not-marked", "I4", &[edit("blkfilter/src/queue.rs",
        "        self.group.write_failed(&self.volume, desc.offset, desc.length, errno);", "        let _ = errno;")]),
    bug("failed-write-is-captured", "I4", &[edit("blkfilter/src/queue.rs",
        "                Err(errno) => {\n                    capture.failed(reservation, &desc, errno);\n                    None\n                }",
        "                Err(_) => capture.after(reservation, &desc),")]),
    bug("guest-does-not-hear-of-a-failed-flush", "I1", &[edit("blkfilter/src/queue.rs",
        "            result = activity.volume.answer_flush(result);", "            let _ = activity.volume.answer_flush(result);\n            result = Ok(());")]),
    bug("guests-flush-is-dropped", "I1", &[edit("blkfilter/src/queue.rs",
        "            Request::Flush if self.read_only => self.end(tag, Ok(()), None),",
        "            Request::Flush if tag % 2 == 0 || self.read_only => self.end(tag, Ok(()), None),")]),
    bug("no-event-for-a-mark", "I5", &[edit("blkfilter/src/group.rs",
        "        if !volume.joined.load(Ordering::SeqCst) || self.ring.is_closed() {\n            return;",
        "        if volume.joined.load(Ordering::SeqCst) || self.ring.is_closed() {\n            return;")]),
    bug("event-ends-over-marks", "I5", &[edit("blkfilter/src/group.rs",
        "        if !self.volumes().iter().all(whole) {\n            return None;", "        if self.volumes().is_empty() && !self.volumes().iter().all(whole) {\n            return None;")]),
    bug("restart-loses-what-was-missing", "I4", &[edit("blkfilter/src/group.rs",
        "        // What was under way with the last process is not known to have arrived.\n",
        "        volume.missing.clear_range(0, geometry.size);\n")]),
    bug("restart-loses-what-was-being-written", "I4", &[edit("blkfilter/src/group.rs",
        "        if let Some(missing) = ring.bitmap(range.volume, Which::Missing) {",
        "        if let Some(missing) = ring.bitmap(range.volume, Which::Missing).filter(|_| false) {")]),
    bug("claim-succeeds-after-closed", "I3", &[edit("ring/src/shared.rs",
        "            if now & CLOSED != 0 {\n                return None;\n            }\n            // AcqRel: the chain of claims (see 3 above).",
        "            if now & CLOSED != 0 && self.head().compare_exchange(now, now + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {\n                return Some(now & !CLOSED);\n            }\n            // AcqRel: the chain of claims (see 3 above).")]),
    bug("missing-bit-cleared-early", "I4", &[edit("blkfilter/src/sync/claim.rs",
        "                // The slot stays missing; what of it got through is true and does no harm.",
        "                of.missing.clear_range(bytes.start, len);")]),
    bug("sync-data-read-before-the-lock", "I3", &[edit("blkfilter/src/sync/slot.rs",
        "                if self.volumes[&task.volume].volume.touched.test(task.slot) {",
        "                if false && self.volumes[&task.volume].volume.touched.test(task.slot) {")]),
    bug("pieces-read-before-the-lock", "I3", &[edit("blkfilter/src/sync/slot.rs",
        "        let untouched = !self.volumes[&task.volume].volume.touched.test(task.slot);",
        "        let untouched = true;")]),
    bug("answers-count-though-written-since", "I4", &[edit("blkfilter/src/sync/claim.rs",
        "for slot in (first..first + count).filter(|slot| !volume.volume.touched.test(*slot)) {",
        "for slot in first..first + count {")]),
    bug("tickets-restart-at-0", "I3", &[edit("ring/src/recover.rs",
        "    shared.credits().store(survey.head - survey.freed, Ordering::Relaxed);\n",
        "    shared.credits().store(survey.head - survey.freed, Ordering::Relaxed);\n    if survey.head == survey.freed {\n        shared.head().store(0, Ordering::Relaxed);\n        shared.freed().store(0, Ordering::Relaxed);\n    }\n")]),
    bug("answers-to-an-older-life-count", "I4", &[edit("streamer/src/machine/deliver.rs",
        "        if self.greeted != self.state.incarnation {\n            // To", "        if false && self.greeted != self.state.incarnation {\n            // To")]),
    bug("cut-short-chunks-are-not-settled", "I10", &[edit("target/src/base.rs",
        "        if writer.unfinished {", "        if false && writer.unfinished {")]),
    bug("ack-before-fsync", "I4", &[edit("target/src/ingest.rs",
        "        self.journal.sync()?;", "        if self.state.received.0 == 0 {\n            self.journal.sync()?;\n        }")]),
    bug("base-before-horizon", "I8", &[edit("target/src/retention.rs",
        "        keeper.set_horizon(next)?;\n        keeper.drop_points_before(next.batch);\n        Ok(Step::Horizon(next))",
        "        let _ = self.move_on(next)?;\n        Ok(Step::Horizon(next))")]),
    bug("base-is-not-flushed", "I8", &[edit("target/src/retention.rs",
        "            keeper.base(volume)?.flush()?;", "            let _ = keeper.base(volume)?;")]),
    bug("base-moves-past-its-horizon", "I8", &[edit("target/src/retention.rs",
        "            let upto = UpTo::end_of(horizon.batch);", "            let upto = UpTo::end_of(BatchNo(horizon.batch.0 + 2));")]),
    bug("points-within-an-event", "I5", &[
        edit("target/src/points.rs",
            "            recoverable: header.cut().recoverable && !self.event_open && !self.joined.is_empty(),",
            "            recoverable: header.cut().recoverable && !self.joined.is_empty(),"),
        edit("streamer/src/source.rs", "        !self.event_open && !self.joined.is_empty()", "        !self.joined.is_empty()"),
    ]),
    bug("points-are-not-dated-in-order", "I7", &[edit("target/src/points.rs",
        "        self.time = self.time.max(place.time);", "        self.time = place.time;")]),
    bug("bookmarks-are-dropped", "I5", &[edit("target/src/points.rs",
        "            bookmark,\n            volumes: self.joined.as_slice().into(),", "            bookmark: bookmark.filter(|_| place.number.0 % 4 != 0),\n            volumes: self.joined.as_slice().into(),")]),
    bug("forks-are-taken-for-repeats", "I6", &[edit("proto/src/session/chain.rs",
        "    } else if same {\n        Resume::Continue", "    } else if same || tail.number >= own.number {\n        Resume::Continue")]),
    bug("older-incarnation-needs-no-proof", "I10", &[edit("streamer/src/machine/resume.rs",
        "                if proved || self.state.compared || self.is_in_log(welcome.log) =>",
        "                if proved || self.state.compared || number.0 > 0 || self.is_in_log(welcome.log) =>")]),
    bug("event-open-is-forgotten", "I5", &[
        edit("streamer/src/machine/backlog.rs",
            "                Base { position, number: last.number, chain: last.chain, flags: last.after }",
            "                Base { position, number: last.number, chain: last.chain, flags: last.before }"),
        edit("target/src/points.rs",
            "            recoverable: header.cut().recoverable && !self.event_open && !self.joined.is_empty(),",
            "            recoverable: header.cut().recoverable && !self.joined.is_empty(),"),
    ]),
    bug("ring-is-freed-before-the-log-is-durable", "I4", &[edit("streamer/src/disk_log/worker.rs",
        "        match self.log.sync() {\n            Ok(()) =>", "        match Ok::<(), std::io::Error>(()) {\n            Ok(()) =>")]),
    bug("log-gap-is-bridged", "I4", &[
        edit("streamer/src/machine/backlog.rs",
            "        (true, _) if reached >= freed => Ok(left),", "        (true, _) if reached >= freed || reached < freed => Ok(left),"),
        edit("streamer/src/drain.rs", "        if position != self.open.end {", "        if false && position != self.open.end {"),
    ]),
    bug("unsynced-log-is-believed", "I4", &[edit("streamer/src/disk_log/mod.rs",
        "        let unsure = batches.iter().position(|batch| batch.number > synced).unwrap_or(batches.len());",
        "        let unsure = batches.len();")]),
    bug("batch-number-is-used-again", "I6", &[edit("streamer/src/machine/deliver.rs",
        "            self.state.number = slot.number;\n            self.state.chain = slot.chain", "            self.state.number = BatchNo(slot.number.0 - u64::from(slot.number.0 % 16 == 0));\n            self.state.chain = slot.chain")]),
    bug("freed-before-acknowledged", "I4", &[edit("streamer/src/machine/deliver.rs",
        "        self.sent_to = number;\n        self.bucket.take(batch.len);",
        "        if let Some(end) = self.slot_mut(number).map(|slot| slot.end) {\n            self.source.free_to(end);\n        }\n        self.sent_to = number;\n        self.bucket.take(batch.len);")]),
];

/// The copy's packages that the simulation needs, and nothing else of the tests.
const TESTS_MANIFEST: &str = "\n[[test]]\nname = \"sim\"\npath = \"sim/main.rs\"\n";
const NEEDED: &[&str] = &["farshore-ring", "farshore-target"];

/// How many bugs were found, and how many survived.
pub(crate) fn run(root: &Path, target: &Path) -> Result<(u64, u64)> {
    let copy = target.join("planted/src");
    let only = std::env::var("FARSHORE_PLANTED").unwrap_or_default();
    copy_workspace(root, &copy)?;
    // An unfit list is found before anything is built.
    for bug in BUGS {
        apply(root, bug).with_context(|| format!("planted bug {}", bug.name))?;
    }
    for world in WORLDS {
        let program = build(&copy, world)?.context("the simulation does not build without a bug")?;
        anyhow::ensure!(look(&program, world, TURN)?.is_none(), "{} fails without a bug", world.name);
    }
    let mut results: Vec<(&Bug, Option<Found>)> = Vec::new();
    let mut unbuilt = Vec::new();
    for bug in BUGS.iter().filter(|bug| only.split(',').any(|word| bug.name.contains(word))) {
        let begin = Instant::now();
        let mut good = Vec::new();
        for (file, bad) in apply(&copy, bug)? {
            let path = copy.join(file);
            good.push((path.clone(), fs::read_to_string(&path)?));
            fs::write(&path, bad)?;
        }
        let found = find(&copy, bug);
        good.into_iter().try_for_each(|(path, text)| fs::write(path, text))?;
        let Some(found) = found? else {
            println!("planted {:<44} DOES NOT BUILD", bug.name);
            unbuilt.push(bug.name);
            continue;
        };
        let verdict = match found {
            Some(Found { test, seed, tried, kept: false }) => {
                format!("found by seed {seed} of {test}, after {tried} of all tests")
            }
            Some(Found { test, seed, .. }) => format!("found by seed {seed} of {test}, which is kept"),
            None => "SURVIVED".to_owned(),
        };
        println!("planted {:<44} {:<4} {verdict} ({} s)", bug.name, bug.invariant, begin.elapsed().as_secs());
        results.push((bug, found));
    }
    let mut needed: Vec<u64> = results.iter().filter_map(|(_, found)| Some(found.as_ref()?.tried)).collect();
    needed.sort_unstable();
    let median = needed.get(needed.len() / 2).copied().unwrap_or(0);
    let survived: Vec<_> = results.iter().filter(|(_, found)| found.is_none()).map(|(bug, _)| bug.name).collect();
    println!("planted: {} found, median {median} seeds; survived: {survived:?}", needed.len());
    anyhow::ensure!(unbuilt.is_empty(), "these do not build: {unbuilt:?}");
    Ok((needed.len() as u64, survived.len() as u64))
}

/// Who found a bug, and how many seeds of all tests it took.
#[derive(Clone, Copy)]
struct Found {
    test: &'static str,
    seed: u64,
    tried: u64,
    /// It is one that found something once, and is run for that.
    kept: bool,
}

/// Who finds it: the world of its crate first, if there is one, for it is small and fast. `None`: it does not build.
fn find(copy: &Path, bug: &Bug) -> Result<Option<Option<Found>>> {
    let mut tried = 0;
    for world in WORLDS.iter().filter(|world| bug.edits.iter().all(|edit| edit.file.starts_with(world.sources))) {
        let Some(program) = build(copy, world)? else { return Ok(None) };
        if let Some(found) = look(&program, world, seeds())? {
            return Ok(Some(Some(Found { tried: tried + found.tried, ..found })));
        }
        tried += seeds() * world.tests.len() as u64;
    }
    Ok(Some(None))
}

/// Tries so many seeds of each test.
fn look(program: &Path, world: &World, seeds: u64) -> Result<Option<Found>> {
    let mut tried = 0;
    let mut from = 0;
    while from < seeds {
        let count = TURN.min(seeds - from);
        for test in world.tests {
            if let Some(at) = seeds_until_failure(program, test, from, count)? {
                return Ok(Some(Found { test, seed: from + at - 1, tried: tried + at, kept: false }));
            }
            tried += count;
        }
        from += count;
    }
    // Those that are kept for what they found once, all of a test together.
    for test in world.tests {
        if let Some((reason, seed)) = failure(program, test, &[("FARSHORE_SEEDS", "1"), ("FARSHORE_KEPT", "1")])? {
            println!("    {reason}");
            return Ok(Some(Found { test, seed: seed.unwrap_or(0), tried, kept: true }));
        }
    }
    Ok(None)
}

fn seeds() -> u64 {
    std::env::var("FARSHORE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS)
}

/// The files with the bug in them.
fn apply(root: &Path, bug: &Bug) -> Result<BTreeMap<&'static str, String>> {
    let mut files: BTreeMap<&'static str, String> = BTreeMap::new();
    for Edit { file, old, new } in bug.edits {
        let text = match files.remove(file) {
            Some(text) => text,
            None => fs::read_to_string(root.join(file)).with_context(|| format!("read {file}"))?,
        };
        let count = text.matches(old).count();
        anyhow::ensure!(count == 1, "its text stands {count} times in {file}, not once: put it right");
        files.insert(file, text.replace(old, new));
    }
    Ok(files)
}

/// What git knows of, with newer files only where they differ, so that little is built again.
fn copy_workspace(root: &Path, copy: &Path) -> Result<()> {
    let mut list = Command::new("git");
    list.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root);
    for file in process::output(&mut list)?.lines() {
        let (from, to) = (root.join(file), copy.join(file));
        if !from.is_file() {
            continue;
        }
        let mut bytes = fs::read(&from)?;
        if file == "tests/Cargo.toml" {
            bytes = slim(&String::from_utf8(bytes)?).into_bytes();
        }
        if fs::read(&to).is_ok_and(|before| before == bytes) {
            continue;
        }
        fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
        fs::write(&to, bytes)?;
    }
    Ok(())
}

/// The tests' manifest with the simulation alone.
fn slim(manifest: &str) -> String {
    let head = manifest.split("[dev-dependencies]").next().unwrap_or(manifest);
    let needed: String = NEEDED.iter().map(|name| format!("{name}.workspace = true\n")).collect();
    format!("{head}[dev-dependencies]\n{needed}{TESTS_MANIFEST}")
}

/// The simulation's program; none: it does not build.
fn build(copy: &Path, world: &World) -> Result<Option<PathBuf>> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["test", "--quiet", "--package", world.package, "--test", world.program, "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]).current_dir(copy);
    command.env("CARGO_TARGET_DIR", copy.with_file_name("build"));
    let Ok(json) = process::output(&mut command) else {
        println!("{} failed", show(&command));
        return Ok(None);
    };
    let messages = json.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs = messages
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == world.program)
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    Ok(programs.next())
}

/// How many seeds it takes, from the first one on; none: so many find nothing.
fn seeds_until_failure(program: &Path, test: &str, first: u64, seeds: u64) -> Result<Option<u64>> {
    let (count, from) = (seeds.to_string(), first.to_string());
    let failed = failure(program, test, &[("FARSHORE_SEEDS", &count), ("FARSHORE_FIRST", &from)])?;
    Ok(failed.map(|(reason, seed)| {
        println!("    {reason}");
        // Without a word: it stands still in some seed.
        seed.map_or(seeds, |seed| seed.saturating_sub(first) + 1).min(seeds)
    }))
}

/// Why a test fails with such settings, and by which seed.
fn failure(program: &Path, test: &str, settings: &[(&str, &str)]) -> Result<Option<(String, Option<u64>)>> {
    let limit = TURN_MAX.as_secs().to_string();
    let mut command = Command::new("timeout");
    command.arg(limit).arg(program).arg(test).arg("--nocapture").env("RUST_BACKTRACE", "0");
    ["FARSHORE_SEED", "FARSHORE_SEEDS", "FARSHORE_KEPT"].iter().for_each(|name| _ = command.env_remove(name));
    let output = command.envs(settings.iter().copied()).output().context("run the simulation")?;
    if output.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    let seed = text.lines().find_map(|line| {
        let rest = line.split_once("FARSHORE_SEED=")?.1;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    let reason = text.lines().skip_while(|line| !line.contains("panicked")).nth(1).unwrap_or("it stands still");
    Ok(Some((reason.chars().take(160).collect(), seed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry that fits nothing any more would find nothing.
    #[test]
    fn every_planted_bug_fits() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("in the workspace");
        for bug in BUGS {
            apply(root, bug).unwrap_or_else(|error| panic!("{}: {error}", bug.name));
        }
        assert!(BUGS.len() >= 25);
    }
}
