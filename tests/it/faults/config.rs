//! Configuration that makes no sense, and places that may not be used.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::support::Rig;
use crate::support::rig::{binary, start_in_vain};
use farshore_cli::sites::run::{find, is_root, run_within};

fn agent_lines(rig: &Rig, more: &str) -> String {
    format!(
        "identity = {:?}\nstate = {:?}\nsocket = {:?}\nring_dir = {:?}\n{more}",
        rig.sites.path("agent.bundle"),
        rig.dir().join("state"),
        rig.dir().join("vain.sock"),
        rig.dir()
    )
}

#[test]
fn settings_that_make_no_sense_are_named() {
    Rig::test(
        |_| {},
        |rig| {
            let file = rig.dir().join("agent-bad.toml");
            let upstream = "upstream = \"127.0.0.1:9\"\n";
            for (more, part) in [
                ("ringg = 1", "ringg"),
                ("ring = \"1KiB\"", "ring"),
                ("ring = \"many\"", "many"),
                ("connections = 99", "connections"),
                ("[group.db]\ncut_mni = \"2s\"", "cut_mni"),
                ("[group.db]\ngranularity = \"day\"", "granularity"),
                ("[group.db]\ncut_min = \"soon\"", "soon"),
                ("= 3", "agent-bad.toml"),
            ] {
                let ran = start_in_vain("agent", &file, &agent_lines(rig, &format!("{upstream}{more}\n")))?;
                ran.refused(2, part, false).with_context(|| format!("for {more:?}"))?;
            }
            for (more, part) in [("upstream = \"nowhere\"\n", "nowhere"), ("", "upstream")] {
                let ran = start_in_vain("agent", &file, &agent_lines(rig, more))?;
                ran.refused(2, part, false).with_context(|| format!("for {more:?}"))?;
            }
            let file = rig.dir().join("target-bad.toml");
            let base = format!(
                "identity = {:?}\ndata = {:?}\nsocket = {:?}\n",
                rig.sites.path("target.bundle"),
                rig.dir().join("data"),
                rig.dir().join("vain.sock")
            );
            for (more, part) in [
                ("listen = \"127.0.0.1:0\"\nlisten_more = 1\n", "listen_more"),
                ("listen = \"nowhere\"\n", "nowhere"),
                ("", "listen"),
            ] {
                let ran = start_in_vain("target", &file, &format!("{base}{more}"))?;
                ran.refused(2, part, false).with_context(|| format!("for {more:?}"))?;
            }
            let missing = rig.dir().join("no-such.toml");
            let ran = Command::new(binary()?).args(["agent", "run", "--config"]).arg(&missing).output()?;
            let text = String::from_utf8_lossy(&ran.stderr).into_owned();
            ensure!(!ran.status.success() && text.contains("no-such.toml"), "a missing file is named: {text}");
            Ok(())
        },
    );
}

#[test]
fn a_second_daemon_on_the_same_socket_or_state_is_refused() {
    Rig::test(
        |_| {},
        |rig| {
            let agent =
                std::fs::read_to_string(rig.sites.path("agent.toml")).context("read the agent's configuration")?;
            start_in_vain("agent", &rig.dir().join("twin.toml"), &agent)?.refused(4, "another", true)?;
            let target =
                std::fs::read_to_string(rig.sites.path("target.toml")).context("read the target's configuration")?;
            let ran = start_in_vain("target", &rig.dir().join("twin.toml"), &target)?;
            ensure!(ran.code.is_some_and(|code| (1..=4).contains(&code)), "refused: {ran}");
            // Both go on.
            rig.sites.agent().get("/v1/status")?;
            rig.sites.target().get("/v1/groups").map(drop)
        },
    );
}

/// Runs a daemon as a user who may not use its folder. Root may use any, so root becomes nobody for it.
fn start_as_nobody(rig: &Rig, role: &str, config: &Path) -> Result<farshore_cli::sites::run::Ran> {
    let binary = binary()?;
    let mut command = if is_root() {
        // The build folder and the identities need not be open to everybody.
        let copy = rig.dir().join("farshore-copy");
        if !copy.exists() {
            std::fs::copy(&binary, &copy).context("copy the binary")?;
        }
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755))?;
        std::fs::set_permissions(rig.dir(), std::fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(find("setpriv", "util-linux")?);
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(copy);
        command
    } else {
        Command::new(binary)
    };
    run_within(command.args([role, "run", "--config"]).arg(config), Duration::from_secs(30))
}

/// A bundle that the unprivileged user may read.
fn own_bundle(rig: &Rig, bundle: &str) -> Result<std::path::PathBuf> {
    let copy = rig.dir().join(format!("nobody-{bundle}"));
    std::fs::copy(rig.sites.path(bundle), &copy).context("copy a bundle")?;
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o600))?;
    if is_root() {
        std::os::unix::fs::chown(&copy, Some(65534), Some(65534)).context("give the bundle away")?;
    }
    Ok(copy)
}

#[test]
fn folders_that_may_not_be_written_are_named() {
    Rig::test(
        |_| {},
        |rig| {
            let closed = rig.dir().join("closed");
            std::fs::create_dir(&closed)?;
            std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555))?;
            let config = rig.dir().join("nobody.toml");
            let open = rig.dir().join("open");
            std::fs::create_dir(&open)?;
            std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777))?;
            let socket = open.join("vain.sock");
            // A ring folder that others can write to is refused whoever asks; one that is not there is made.
            for (rings, code, part) in [(open.join("rings"), 1, "closed/state"), (open.clone(), 4, "ring folder")] {
                let identity = own_bundle(rig, "agent.bundle")?;
                let state = closed.join("state");
                std::fs::write(
                    &config,
                    format!(
                        "identity = {identity:?}\nstate = {state:?}\nupstream = \"127.0.0.1:9\"\nsocket = {socket:?}\n\
                         ring_dir = {rings:?}\n"
                    ),
                )?;
                start_as_nobody(rig, "agent", &config)?.refused(code, part, false)?;
            }
            std::fs::write(
                &config,
                format!(
                    "identity = {:?}\ndata = {:?}\nlisten = \"127.0.0.1:0\"\nsocket = {socket:?}\n",
                    own_bundle(rig, "target.bundle")?,
                    closed.join("data")
                ),
            )?;
            start_as_nobody(rig, "target", &config)?.refused(1, "closed/data", false)
        },
    );
}
