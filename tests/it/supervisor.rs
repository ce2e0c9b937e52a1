//! The agent's two processes, without block devices: over NBD, as anybody may run them.

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::support::rig::{Rig, binary};
use crate::support::until;

const MIB: u64 = 1 << 20;

/// Goal: a worker that dies is followed by another, with the same volumes; a supervisor that dies is, too, and takes the worker over.
#[test]
fn either_process_may_die() {
    Rig::test(
        |_| {},
        |rig| {
            rig.protect(8 * MIB, 41)?;
            rig.wait()?;
            let first = rig.sites.await_worker(None)?;
            rig.sites.kill_worker()?;
            let second = rig.sites.await_worker(Some(first))?;
            rig.wait()?;
            rig.sites.kill_supervisor();
            rig.sites.start_agent()?;
            ensure!(rig.sites.await_worker(None)? == second, "the worker was not taken over");
            ensure!(rig.sites.agent().get("/v1/volumes")?.as_array().map(Vec::len) == Some(1), "the volume is gone");
            rig.sites.kill_worker()?;
            rig.sites.await_worker(Some(second))?;
            rig.wait()?;
            rig.sites.stop_agent()
        },
    );
}

/// Goal: SIGHUP brings a changed configuration in; one that is refused changes nothing.
#[test]
fn a_changed_configuration_is_read_again() {
    Rig::test(
        |_| {},
        |rig| {
            rig.expect_errors(&["the old configuration goes on"]);
            rig.protect(8 * MIB, 42)?;
            rig.wait()?;
            let first = rig.sites.await_worker(None)?;
            let pid = Pid::from_raw(i32::try_from(rig.sites.supervisor_pid().context("it runs")?)?);
            let file = rig.sites.path("agent.toml");
            let old = std::fs::read_to_string(&file)?;
            std::fs::write(&file, format!("{old}no_such_key = 1\n"))?;
            kill(pid, Signal::SIGHUP)?;
            until("it is refused", || {
                let said = rig.sites.logs().iter().any(|line| line.contains("no_such_key"));
                Ok(said.then_some(()))
            })?;
            ensure!(rig.sites.await_worker(None)? == first, "another worker was started");
            std::fs::write(&file, format!("{old}[group.g]\ncut_min = '33ms'\n"))?;
            kill(pid, Signal::SIGHUP)?;
            rig.sites.await_worker(Some(first))?;
            rig.wait()?;
            ensure!(rig.status()?["cut_min_s"] == json!(0.033), "{:#}", rig.status()?);
            rig.sites.stop_agent()
        },
    );
}

/// Goal: another binary takes over, and the supervisor becomes it; one that is none is refused with its own words.
#[test]
fn another_binary_takes_over() {
    Rig::test(
        |_| {},
        |rig| {
            rig.protect(8 * MIB, 43)?;
            rig.wait()?;
            let first = rig.sites.await_worker(None)?;
            let upgrade = |path: &str| rig.sites.supervisor().post("/v1/upgrade", &json!({ "binary": path }));
            let refused = format!("{:#}", upgrade("/bin/false").expect_err("it is no agent"));
            ensure!(refused.contains("cannot take over"), "{refused}");
            let copy = rig.sites.path("next");
            std::fs::copy(binary()?, &copy)?;
            let done = upgrade(copy.to_str().context("a plain path")?)?;
            ensure!(done["worker_pid"] != json!(first), "{done}");
            std::fs::remove_file(&copy)?;
            let pid = rig.sites.supervisor_pid().context("it runs")?;
            until("the supervisor becomes it", || {
                let exe = std::fs::read_link(format!("/proc/{pid}/exe"))?;
                Ok(exe.to_string_lossy().contains("farshore (deleted)").then_some(()))
            })?;
            rig.wait()?;
            rig.sites.stop_agent()
        },
    );
}
