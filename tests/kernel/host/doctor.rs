//! The doctor on a real kernel: what it sees, what it mends, and what it leaves alone.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::run::{Ran, run as finish};
use farshore_ublk::dm::Step;
use farshore_ublk::{Control, DeviceState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Rig, binary, machine, partitions};
use crate::dm::{dies, logical_volumes, lvm, no_strays, table};
use crate::rig::{DATA_PATHS, DISK_512, Mounted, Served, Spec, run, until};

/// What a doctor said.
struct Said {
    code: Option<i32>,
    document: Value,
}

impl Said {
    /// The findings of a check.
    fn of(&self, check: &str) -> Vec<&Value> {
        let all = self.document["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter(|finding| finding["check"] == check).collect()
    }

    /// The one finding of a check has this level, and says this.
    fn is(&self, check: &str, level: &str, part: &str) -> Result<()> {
        let found = self.of(check);
        let [finding] = found[..] else { anyhow::bail!("one finding was expected of {check}: {:#}", self.document) };
        let text = finding.to_string();
        ensure!(finding["level"] == level && text.contains(part), "{level} {part:?} was expected: {finding:#}");
        // What is not well says what it means and how it is mended.
        ensure!(level == "ok" || (finding["means"].is_string() && finding["mend"].is_string()), "{finding:#}");
        Ok(())
    }
}

/// `farshore --json doctor ARGS` of an agent with this socket and state directory.
fn doctor(socket: &Path, state: Option<&Path>, args: &[&str]) -> Result<Said> {
    let mut command = Command::new(binary()?);
    command.args(["--json", "doctor", "--config", "/nonexistent"]).args(args).env("FARSHORE_AGENT_SOCKET", socket);
    if let Some(state) = state {
        command.arg("--state").arg(state);
    }
    let ran: Ran = finish(&mut command)?;
    let document = serde_json::from_str(&ran.out).with_context(|| format!("a document was expected: {ran}"))?;
    Ok(Said { code: ran.code, document })
}

const NOBODY: &str = "/nonexistent/agent.sock";

/// Goal: on a clean host there is no problem, each feature of the driver is told with its fallback, and a driver that is not loaded
/// is told and loaded.
#[test]
fn a_clean_host_and_one_without_the_driver() -> Result<()> {
    machine()?;
    let said = doctor(Path::new(NOBODY), None, &[])?;
    ensure!(said.code == Some(0) && said.document["problems"] == 0, "{:#}", said.document);
    said.is("kernel.version", "ok", "Linux 6.")?;
    for check in ["ublk.driver", "ublk.recovery", "ublk.reissue", "ublk.user-copy", "dm.driver", "kernel.io_uring"] {
        said.is(check, "ok", "")?;
    }
    said.is("ublk.update-size", "ok", "ublk")?;
    said.is("leftovers.dm", "ok", "none")?;
    said.is("leftovers.ublk", "ok", "none")?;
    said.is("udev.daemon", "warning", "not running")?;
    said.is("agent", "warning", "none answers")?;

    run("rmmod ublk_drv")?;
    let said = doctor(Path::new(NOBODY), None, &[])?;
    said.is("ublk.driver", "problem", "modprobe ublk_drv")?;
    ensure!(said.code == Some(1), "{:#}", said.document);
    let said = doctor(Path::new(NOBODY), None, &["--repair"])?;
    said.is("ublk.driver", "ok", "")?;
    ensure!(said.code == Some(0), "{:#}", said.document);
    ensure!(said.document["repair"]["done"][0] == "loaded the module ublk_drv", "{:#}", said.document);
    Ok(())
}

/// Goal: a ublk device without disk and server is told and removed; one that waits for a server that is not ours is told and left.
#[test]
fn stale_devices_are_removed_and_waiting_ones_are_not() -> Result<()> {
    machine()?;
    let control = Control::open()?;
    let mortal = Served::start(&Spec { survives: false, ..Spec::filter(DISK_512, DATA_PATHS[0]) })?;
    let id = mortal.id()?;
    mortal.kill()?;
    until("it is a leftover", || control.info(id).is_ok_and(|info| info.is_stale()))?;
    let waiting = Served::start(&Spec::filter(DISK_512, DATA_PATHS[0]))?;
    let other = waiting.id()?;
    waiting.kill()?;
    until("it waits", || control.info(other).is_ok_and(|info| info.state() == DeviceState::Quiesced))?;
    let said = doctor(Path::new(NOBODY), None, &[])?;
    let texts: Vec<_> = said.of("leftovers.ublk").iter().map(|finding| finding["found"].to_string()).collect();
    ensure!(
        texts.len() == 2 && texts[0].contains("neither disk nor server") && texts[1].contains("waits"),
        "{texts:?}"
    );
    let said = doctor(Path::new(NOBODY), None, &["--repair", "--abandon"])?;
    said.is("leftovers.ublk", "warning", "waits for its server")?;
    let left: Vec<_> = control.list()?.iter().map(farshore_ublk::DeviceInfo::id).collect();
    ensure!(left == [other], "{left:?}");
    control.delete(other).map_err(Into::into)
}

/// Goal: what a crashed attach left is told, and taken apart only where no agent may come back to it. Method: a mounted logical
/// volume behind a device whose server is dead, seen by doctors that know more and less of agents.
#[test]
fn what_a_crashed_attach_left_is_taken_apart() -> Result<()> {
    machine()?;
    let rig = Rig::start()?;
    let upper = &logical_volumes(&["128M"])?[0];
    let original = table(upper)?;
    run(&format!("mkfs.ext4 -q {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let (socket, state) = (rig.sites.agent_socket(), rig.sites.path("agent"));
    let nobody = Path::new(NOBODY);
    for (name, state_known, abandon) in [("known", true, false), ("abandoned", false, true)] {
        dies("attach", upper, Step::Verify)?;
        // Nobody says whose it is: it may be an agent's.
        let said = doctor(nobody, None, &["--repair"])?;
        ensure!(said.code == Some(4), "{:#}", said.document);
        said.is("leftovers.dm", "problem", "may wait for an agent")?;
        ensure!(
            said.document["repair"]["left_alone"][0]["hint"].to_string().contains("--state"),
            "{:#}",
            said.document
        );
        // The running agent might be the one, whatever the operator says.
        let said = doctor(&socket, None, &["--repair", "--abandon"])?;
        ensure!(said.code == Some(4) && table(upper)? != original, "{:#}", said.document);

        let args: &[&str] = if abandon { &["--repair", "--abandon"] } else { &["--repair"] };
        let said = doctor(nobody, state_known.then_some(state.as_path()), args)?;
        ensure!(said.code == Some(0), "{name}: {:#}", said.document);
        said.is("leftovers.dm", "ok", "none")?;
        ensure!(said.document["repair"]["done"].to_string().contains("compares everything"), "{:#}", said.document);
        ensure!(table(upper)? == original, "{name}");
        no_strays()?;
        std::fs::write(mounted.folder().join(name), name)?;
        run("sync")?;
    }
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", upper.display()))?;
    lvm("vgremove -ff -y vg")?;
    rig.stop()
}

/// Goal: a device that waits for its agent is told with its volume and is not touched; nor is one that a living agent serves, or one
/// of an agent that hangs.
#[test]
fn what_waits_for_its_agent_is_left_alone() -> Result<()> {
    machine()?;
    partitions(DISK_512, &[(1, 64)])?;
    let mut rig = Rig::start()?;
    let device = rig.protect("/dev/vda1", &["--name", "one", "--frontend", "ublk"])?.ok()?.trim().to_owned();
    let (socket, state) = (rig.sites.agent_socket(), rig.sites.path("agent"));
    let ask = |args: &[&str]| doctor(&socket, Some(&state), args);
    let said = ask(&["--repair"])?;
    ensure!(said.code == Some(0), "{:#}", said.document);
    said.is("agent", "ok", "protects 1 volume(s)")?;
    said.is("leftovers.ublk", "ok", "none")?;

    let pid = Pid::from_raw(i32::try_from(rig.sites.agent_pid().context("it runs")?)?);
    kill(pid, Signal::SIGSTOP)?;
    let said = ask(&[]);
    kill(pid, Signal::SIGCONT)?;
    said?.is("agent", "problem", "does not answer")?;

    rig.sites.kill_agent();
    let control = Control::open()?;
    until("it waits", || control.list().is_ok_and(|all| all.iter().any(|info| info.state() == DeviceState::Quiesced)))?;
    for args in [&["--repair"][..], &["--repair", "--abandon"]] {
        let said = ask(args)?;
        ensure!(said.code == Some(4), "{:#}", said.document);
        said.is("leftovers.ublk", "problem", "of volume g/one, waits for its agent")?;
        ensure!(Path::new(&device).exists(), "it was removed");
    }
    rig.sites.start_agent()?;
    run(&format!("dd if={device} of=/dev/null bs=1M count=4 iflag=direct"))?;
    let said = ask(&[])?;
    said.is("leftovers.ublk", "ok", "none")?;
    rig.cli(&["unprotect", "one"])?.ok()?;
    rig.stop()
}
