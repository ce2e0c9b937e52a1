//! The suites: what each needs, what it runs, and in which order.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::count::{Counter, Tally};
use crate::outside::{self, Program};
use crate::process::{self, show};
use crate::report::{NAME_WIDTH, Report};
use crate::tidy;
use crate::vm;
use crate::workspace::{Workspace, cargo};

/// The gate's own copy is pinned, so that a new release of the tool cannot fail an old commit.
const CARGO_DENY_VERSION: &str = "0.20.2";

/// The package with the harness and everything that runs more than one crate.
const TESTS: &str = "farshore-tests";
const RING: &str = "farshore-ring";

/// What the virtual machine and the tests in it call.
const IN_THE_MACHINE: [Program; 22] = [
    outside::QEMU_X86,
    outside::BUSYBOX,
    outside::MODPROBE,
    outside::CPIO,
    outside::XZ,
    outside::FIO,
    outside::MKFS_EXT4,
    outside::E2FSCK,
    outside::BLKDISCARD,
    outside::DMSETUP,
    outside::LVM,
    outside::FSFREEZE,
    outside::DRBDADM,
    outside::UDEVADM,
    outside::SYSTEMD_ANALYZE,
    outside::MKFS_BTRFS,
    outside::INITDB,
    outside::PGBENCH,
    outside::MKFS_XFS,
    outside::HDPARM,
    outside::SFDISK,
    outside::IP,
];

/// The kernel tests of the default run, by their whole names. They take four to seven minutes on two processors.
const KERNEL_CORE: [&str; 7] = [
    "agent::twenty_kills_of_the_agent_under_verified_load",
    "agent_dm::live::file_systems_go_on",
    "dm::faults::a_crash_at_any_step_is_repaired",
    "log_writes::the_order_on_the_disk_is_the_order_of_the_stream",
    "ublk::life::leftovers_are_found_and_removed",
    "ublk::recovery::a_process_that_lives_on_loses_no_request",
    "ublk::recovery::kills_over_a_slow_disk",
];

/// One gate of the project.
pub(crate) struct Suite {
    pub(crate) name: &'static str,
    about: &'static str,
    pub(crate) needs: &'static [Program],
    /// Suites that take long run only when named.
    by_default: bool,
    run: fn(&mut Session) -> Result<()>,
}

/// All suites, in the order in which they run: what fails fast and cheaply comes first.
pub(crate) static SUITES: [Suite; 18] = [
    suite("fmt", "rustfmt over the workspace", &[], fmt),
    suite("clippy", "clippy over all targets, warnings are errors", &[], clippy),
    suite("docs", "rustdoc over the workspace, warnings are errors", &[], docs),
    suite("deny", "cargo-deny: bans, licences, sources (deny.toml)", &[], deny),
    suite("tidy", "the project's own rules: layout, crate arrows, SPEC.md rows, leftovers", &[outside::GIT], tidy),
    suite("unit", "unit and doc tests of every crate, the harness included", &[], unit),
    suite("loom", "the ring under every interleaving (cfg(loom), release, own build folder)", &[], loom),
    suite("miri", "the ring's slab under Miri; optional: only where a nightly toolchain has Miri", &[], miri),
    suite("sim", "simulation: real machines over simulated disk, link and clock, bounded seeds", &[], sim),
    suite(
        "it",
        "end to end on this machine, without foreign programs' clients",
        &[outside::MKFS_EXT4, outside::E2FSCK],
        it,
    ),
    suite(
        "clients",
        "end to end with real clients: fio, nbdkit, libnbd, nbdfuse, QEMU, PostgreSQL",
        &[
            outside::FIO,
            outside::NBDKIT,
            outside::NBDINFO,
            outside::NBDCOPY,
            outside::NBDFUSE,
            outside::FUSERMOUNT,
            outside::QEMU_IMG,
            outside::QEMU_IO,
            outside::INITDB,
            outside::PGBENCH,
            outside::MKFS_EXT4,
            outside::E2FSCK,
        ],
        clients,
    ),
    suite("fuzz", "every decoder over seeded mutations, a bounded number (no nightly needed)", &[], fuzz),
    suite(
        "kernel-core",
        "the kernel tests that stand for the others: kills, crashes, live attach, the order of writes",
        &IN_THE_MACHINE,
        kernel_core,
    ),
    named_only(
        "kernel",
        "block devices on a real kernel: ublk in a virtual machine (QEMU, a Debian kernel package)",
        &IN_THE_MACHINE,
        kernel,
    ),
    named_only("long", "the loops that tests mark #[ignore = \"…\"]", &[outside::MKFS_EXT4, outside::E2FSCK], long),
    named_only("swarm", "the simulation over random seeds, for FARSHORE_SWARM minutes (default 1)", &[], swarm),
    named_only(
        "planted",
        "the simulation finds bugs that are planted into a copy of the workspace",
        &[outside::GIT],
        planted,
    ),
    named_only("benches", "every benchmark compiles and runs once", &[], benches),
];

const fn suite(
    name: &'static str,
    about: &'static str,
    needs: &'static [Program],
    run: fn(&mut Session) -> Result<()>,
) -> Suite {
    Suite { name, about, needs, by_default: true, run }
}

const fn named_only(
    name: &'static str,
    about: &'static str,
    needs: &'static [Program],
    run: fn(&mut Session) -> Result<()>,
) -> Suite {
    Suite { name, about, needs, by_default: false, run }
}

impl Suite {
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        SUITES.iter().find(|s| s.name == name)
    }

    /// One line for `--list`.
    pub(crate) fn describe(&self) -> String {
        let mut line = format!("{:<NAME_WIDTH$} {}", self.name, self.about);
        if !self.by_default {
            line.push_str(" [only when named]");
        }
        if !self.needs.is_empty() {
            let needs: Vec<_> = self.needs.iter().map(|p| p.name).collect();
            line.push_str(&format!("\n          needs {}", needs.join(", ")));
        }
        line
    }

    fn report(&self, workspace: &Workspace) -> Report {
        println!("\n=== {}: {}", self.name, self.about);
        let started = Instant::now();
        let mut session = Session { workspace, tally: Tally::default(), notes: Vec::new() };
        let result = outside::provide(self.needs.iter().copied())
            .with_context(|| format!("install what is missing, or leave the suite out with --without {}", self.name))
            .and_then(|()| (self.run)(&mut session));
        if let Err(error) = result {
            session.fail(format!("{error:#}"));
        } else if session.tally == Tally::default() {
            session.fail("nothing ran".to_owned());
        }
        let Session { tally, notes, .. } = session;
        Report { suite: self.name, tally, notes, elapsed: started.elapsed() }
    }
}

/// The suites that a command line means, each with whether it was left out by name.
pub(crate) fn selected(names: &[String], without: &[String]) -> Vec<(&'static Suite, bool)> {
    let wanted = |s: &&Suite| if names.is_empty() { s.by_default } else { names.iter().any(|n| n == s.name) };
    SUITES.iter().filter(wanted).map(|s| (s, without.iter().any(|w| w == s.name))).collect()
}

/// Runs what was asked for; a failing suite does not keep the next from running.
pub(crate) fn run_all(workspace: &Workspace, names: &[String], without: &[String]) -> Vec<Report> {
    let mut reports = Vec::new();
    for (suite, left_out) in selected(names, without) {
        let report = if left_out {
            Report {
                suite: suite.name,
                tally: Tally { skipped: 1, ..Tally::default() },
                notes: vec!["left out by --without".to_owned()],
                elapsed: std::time::Duration::ZERO,
            }
        } else {
            suite.report(workspace)
        };
        reports.push(report);
    }
    reports
}

/// A suite while it runs.
struct Session<'a> {
    workspace: &'a Workspace,
    tally: Tally,
    notes: Vec<String>,
}

/// Whether a run of a test command that finds no test is an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Empty {
    Allowed,
    Fails,
}

impl Session<'_> {
    fn fail(&mut self, why: String) {
        self.tally.failed += 1;
        self.notes.push(why);
    }

    fn skip(&mut self, why: &str) {
        self.tally.skipped += 1;
        self.notes.push(why.to_owned());
    }

    /// `cargo` in the workspace's root.
    fn cargo(&self, args: &[&str]) -> Command {
        let mut command = cargo();
        command.args(args).current_dir(&self.workspace.root);
        command
    }

    /// Runs a gate that is no test: its exit status is its one result.
    fn gate(&mut self, command: &mut Command) -> Result<()> {
        let status = process::stream(command, |_| {})?;
        if status.success() {
            self.tally.passed += 1;
        } else {
            self.fail(format!("{} failed", show(command)));
        }
        Ok(())
    }

    /// Runs a test command and counts its tests.
    fn tests(&mut self, command: &mut Command, empty: Empty) -> Result<()> {
        let mut counter = Counter::default();
        let status = process::stream(command, |line| counter.line(line))?;
        self.tally.add(&counter.tally);
        self.notes.extend(counter.ignored.iter().map(|test| format!("ignored: {test}")));
        if !status.success() {
            // A build that fails, or a test that takes its process down, is in no count.
            self.tally.failed += u64::from(counter.tally.failed == 0);
            self.notes.push(format!("{} failed", show(command)));
        } else if empty == Empty::Fails && counter.tally.ran() == 0 {
            self.fail(format!("{} ran no test", show(command)));
        }
        Ok(())
    }

    /// Runs one test target of the tests package, or says that there is none.
    fn test_target(&mut self, target: &str, prepare: fn(&Session, &mut Command) -> Result<()>) -> Result<()> {
        if !self.workspace.has_target(TESTS, "test", target) {
            self.skip(&format!("no such test target: {TESTS} has no test target `{target}`"));
            return Ok(());
        }
        let mut command = self.cargo(&["test", "--package", TESTS, "--test", target]);
        prepare(self, &mut command)?;
        self.tests(&mut command, Empty::Fails)
    }
}

fn fmt(session: &mut Session) -> Result<()> {
    session.gate(&mut session.cargo(&["fmt", "--all", "--check"]))
}

fn clippy(session: &mut Session) -> Result<()> {
    session.gate(&mut session.cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}

fn docs(session: &mut Session) -> Result<()> {
    let mut command = session.cargo(&["doc", "--workspace", "--no-deps"]);
    command.env("RUSTDOCFLAGS", appended("RUSTDOCFLAGS", "--deny warnings"));
    session.gate(&mut command)
}

fn deny(session: &mut Session) -> Result<()> {
    let program = cargo_deny(session)?;
    let mut command = Command::new(program);
    command
        .args(["--offline", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"])
        .current_dir(&session.workspace.root);
    session.gate(&mut command)
}

/// cargo-deny: the machine's, else our own copy below the build folder, built at first use (2 to 3 minutes on two cores).
fn cargo_deny(session: &Session) -> Result<PathBuf> {
    if let Some(found) = (Program { name: "cargo-deny", packages: &[] }).find() {
        return Ok(found);
    }
    let tools = session.workspace.target_directory.join("tools");
    let own = tools.join("bin/cargo-deny");
    if !own.exists() {
        let mut install = session.cargo(&["install", "--locked", "cargo-deny", "--version", CARGO_DENY_VERSION]);
        install.arg("--root").arg(&tools).env("CARGO_TARGET_DIR", tools.join("build"));
        if !process::stream(&mut install, |_| {})?.success() {
            bail!("cargo-deny could not be installed: install it by hand, or leave the suite out with --without deny");
        }
    }
    Ok(own)
}

fn tidy(session: &mut Session) -> Result<()> {
    for (rule, findings) in tidy::check(session.workspace)? {
        if findings.is_empty() {
            session.tally.passed += 1;
            continue;
        }
        println!("tidy: {rule}: {} finding(s)", findings.len());
        for finding in &findings {
            println!("  {finding}");
        }
        session.fail(format!("{rule}: {} finding(s), first: {}", findings.len(), findings[0]));
    }
    Ok(())
}

fn unit(session: &mut Session) -> Result<()> {
    let mut command = if (Program { name: "cargo-nextest", packages: &[] }).find().is_some() {
        session.cargo(&["nextest", "run", "--no-fail-fast"])
    } else {
        session.cargo(&["test", "--no-fail-fast", "--lib", "--bins", "--tests"])
    };
    session.tests(command.args(["--workspace", "--exclude", TESTS]), Empty::Fails)?;
    session.tests(&mut session.cargo(&["test", "--no-fail-fast", "--package", TESTS, "--lib"]), Empty::Allowed)?;
    session.tests(&mut session.cargo(&["test", "--no-fail-fast", "--workspace", "--doc"]), Empty::Allowed)
}

/// Models stand in the test target `loom`, or in the library's module `models`.
fn loom(session: &mut Session) -> Result<()> {
    if !session.workspace.depends(RING, "loom") {
        session.skip(&format!("no such test target: {RING} does not depend on loom"));
        return Ok(());
    }
    let mut command = session.cargo(&["test", "--release", "--no-fail-fast", "--package", RING]);
    if session.workspace.has_target(RING, "test", "loom") {
        command.args(["--test", "loom"]);
    } else {
        command.args(["--lib", "models"]);
    }
    // Its own build folder: the flag changes every dependency, and two sets in one folder would rebuild each other.
    command.env("RUSTFLAGS", appended("RUSTFLAGS", "--cfg loom"));
    command.env("CARGO_TARGET_DIR", session.workspace.target_directory.join("loom"));
    session.tests(&mut command, Empty::Fails)
}

/// Tests for Miri stand in the ring's library in modules whose path holds `miri`: they map no file.
fn miri(session: &mut Session) -> Result<()> {
    if process::output(Command::new("rustup").args(["run", "nightly", "cargo", "miri", "--version"])).is_err() {
        session
            .skip("optional: no nightly toolchain with Miri here (rustup toolchain install nightly --component miri)");
        return Ok(());
    }
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "miri", "test", "--package", RING, "--lib", "miri"]);
    // rustup sets these for the toolchain that runs us; the nightly one must find its own.
    command.env_remove("CARGO").env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN").current_dir(&session.workspace.root);
    session.tests(&mut command, Empty::Fails)
}

fn sim(session: &mut Session) -> Result<()> {
    session.test_target("sim", |_, _| Ok(()))
}

fn swarm(session: &mut Session) -> Result<()> {
    session.test_target("sim", |_, command| {
        command.args(["--", "--ignored", "--nocapture", "swarm"]);
        Ok(())
    })
}

fn planted(session: &mut Session) -> Result<()> {
    let (found, survived) = crate::planted::run(&session.workspace.root, &session.workspace.target_directory)?;
    session.tally.add(&Tally { passed: found, failed: survived, skipped: 0 });
    Ok(())
}

fn it(session: &mut Session) -> Result<()> {
    session.test_target("it", |session, command| {
        command.args(["--no-fail-fast", "--", "--skip", "clients::"]);
        with_binary(session, command)
    })
}

fn clients(session: &mut Session) -> Result<()> {
    session.test_target("it", |session, command| {
        command.args(["--no-fail-fast", "--", "clients::"]);
        with_binary(session, command)
    })
}

/// Longest time of the kernel tests, the boot of their machine included. Without a limit a machine that hangs would hang us.
const KERNEL_MAX: Duration = Duration::from_secs(80 * 60);
const KERNEL_CORE_MAX: Duration = Duration::from_secs(20 * 60);

fn kernel(session: &mut Session) -> Result<()> {
    in_the_machine(session, &std::env::var("FARSHORE_KERNEL_FILTER").unwrap_or_default(), KERNEL_MAX)
}

fn kernel_core(session: &mut Session) -> Result<()> {
    in_the_machine(session, &format!("--exact {}", KERNEL_CORE.join(" ")), KERNEL_CORE_MAX)?;
    // A test that was renamed must not drop out unseen.
    let ran = usize::try_from(session.tally.ran()).unwrap_or(usize::MAX);
    if ran != KERNEL_CORE.len() {
        session.fail(format!("{ran} tests ran in the machine, {} are named", KERNEL_CORE.len()));
    }
    Ok(())
}

/// Builds the tests here and runs those that `filter` (libtest's arguments) means inside the machine, one after the other: they
/// share its disks.
fn in_the_machine(session: &mut Session, filter: &str, limit: Duration) -> Result<()> {
    if !session.workspace.has_target(TESTS, "test", "kernel") {
        session.skip(&format!("no such test target: {TESTS} has no test target `kernel`"));
        return Ok(());
    }
    let tests = test_program(session, "kernel")?;
    let name = tests.file_name().and_then(|name| name.to_str()).context("cargo names programs in plain text")?;
    let run = format!("FARSHORE_BIN=\"$VM_PROGRAMS/farshore\" exec \"$VM_PROGRAMS/{name}\" --test-threads=1 {filter}");
    let mut job = vm::Job::new(run);
    job.programs = vec![build_binary(session)?, tests.clone()];
    job.limit = limit;
    for name in ["FARSHORE_KILLS", "FARSHORE_CUTS"] {
        job.environment.extend(std::env::var(name).ok().map(|times| (name.to_owned(), times)));
    }
    let mut counter = Counter::default();
    let ended = vm::run(session.workspace, &job, |line| counter.line(line))?;
    session.tally.add(&counter.tally);
    session.notes.extend(counter.ignored.iter().map(|test| format!("ignored: {test}")));
    if ended.code != 0 {
        session.tally.failed += u64::from(counter.tally.failed == 0);
        session.notes.push(format!("the tests in the machine ended with code {}", ended.code));
    } else if counter.tally.ran() == 0 {
        session.fail("the machine ran no test".to_owned());
    }
    let complaints = vm::complaints(&ended.kernel_log);
    if let Some(first) = complaints.first() {
        println!("{}", ended.kernel_log);
        session.fail(format!("the kernel complained {} time(s), first: {first}", complaints.len()));
    }
    Ok(())
}

/// Builds a test target of the tests package and says where the program is.
fn test_program(session: &Session, target: &str) -> Result<PathBuf> {
    let mut build = session.cargo(&["test", "--package", TESTS, "--test", target, "--no-run"]);
    build.args(["--message-format", "json-render-diagnostics"]);
    println!("$ {}", show(&build));
    let json = process::output(&mut build)?;
    let messages = json.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut programs = messages
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == target)
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next().with_context(|| format!("cargo names no program for the test target {target}"))
}

fn fuzz(session: &mut Session) -> Result<()> {
    session.test_target("fuzz", |_, _| Ok(()))
}

fn long(session: &mut Session) -> Result<()> {
    let targets: Vec<&str> =
        ["sim", "it", "fuzz"].into_iter().filter(|t| session.workspace.has_target(TESTS, "test", t)).collect();
    if targets.is_empty() {
        session.skip(&format!("no such test target: {TESTS} has none"));
        return Ok(());
    }
    let mut command = session.cargo(&["test", "--no-fail-fast", "--package", TESTS]);
    command.args(targets.iter().flat_map(|t| ["--test", t])).args(["--", "--ignored"]);
    with_binary(session, &mut command)?;
    session.tests(&mut command, Empty::Fails)
}

fn benches(session: &mut Session) -> Result<()> {
    session.gate(&mut session.cargo(&["test", "--benches", "--package", "farshore-benches"]))
}

/// Builds `farshore` and tells the tests where it is: cargo gives a package only the binaries of its own.
fn with_binary(session: &Session, command: &mut Command) -> Result<()> {
    command.env("FARSHORE_BIN", build_binary(session)?);
    Ok(())
}

/// Builds `farshore`.
fn build_binary(session: &Session) -> Result<PathBuf> {
    let mut build = session.cargo(&["build", "--package", "farshore-cli", "--bin", "farshore"]);
    if !process::stream(&mut build, |_| {})?.success() {
        bail!("{} failed", show(&build));
    }
    Ok(session.workspace.target_directory.join("debug/farshore"))
}

/// The value of an environment variable of flags with `more` behind it.
fn appended(variable: &str, more: &str) -> OsString {
    let mut value = std::env::var_os(variable).unwrap_or_default();
    if !value.is_empty() {
        value.push(" ");
    }
    value.push(more);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str], without: &[&str]) -> Vec<(&'static str, bool)> {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        selected(&owned(names), &owned(without)).into_iter().map(|(s, out)| (s.name, out)).collect()
    }

    #[test]
    fn the_default_run_has_every_gate_in_order_and_no_long_loop() {
        let all: Vec<_> = names(&[], &[]).into_iter().map(|(name, _)| name).collect();
        let expected = [
            "fmt",
            "clippy",
            "docs",
            "deny",
            "tidy",
            "unit",
            "loom",
            "miri",
            "sim",
            "it",
            "clients",
            "fuzz",
            "kernel-core",
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn named_suites_run_in_the_fixed_order_and_a_suite_left_out_stays_in_sight() {
        assert_eq!(names(&["tidy", "fmt"], &[]), [("fmt", false), ("tidy", false)]);
        assert_eq!(names(&["long"], &[]), [("long", false)]);
        assert!(names(&[], &["clients"]).contains(&("clients", true)));
    }

    #[test]
    fn a_command_that_fails_without_a_count_still_counts_as_a_failure() {
        let workspace = Workspace::read().expect("the tests run inside the workspace");
        let mut session = Session { workspace: &workspace, tally: Tally::default(), notes: Vec::new() };
        session.tests(Command::new("sh").args(["-c", "exit 101"]), Empty::Allowed).expect("sh runs");
        assert_eq!(session.tally, Tally { failed: 1, ..Tally::default() });
        session.tests(&mut Command::new("true"), Empty::Fails).expect("true runs");
        assert_eq!(session.tally.failed, 2, "a filter that matches nothing must not look green");
        let counted = "echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out'; exit 101";
        session.tests(Command::new("sh").args(["-c", counted]), Empty::Fails).expect("sh runs");
        assert_eq!(session.tally, Tally { passed: 1, failed: 3, skipped: 0 }, "counted once");
    }
}
