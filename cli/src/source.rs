//! Commands that ask the agent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use farshore_agent::supervisor::supervisor_socket;
use serde_json::{Value, json};

use crate::args::Command;
use crate::client::Daemon;
use crate::failure::Failure;
use crate::output::{Output, cell, seconds, size, table};

/// Longest wait for an upgrade: the check of the new binary, its start, and the way back.
const UPGRADE_MAX: Duration = Duration::from_secs(180);

pub(crate) fn upgrade(binary: &Path, socket: &Path, output: &Output) -> Result<()> {
    let binary =
        std::path::absolute(binary).map_err(|e| Failure::usage(binary.display().to_string(), e.to_string()))?;
    let daemon = Daemon::agent(supervisor_socket(socket));
    let done = daemon.post_within("/v1/upgrade", &json!({ "binary": binary }), UPGRADE_MAX)?;
    output.show(&done, |done| {
        format!("version {} serves; volumes waited {}", cell(&done["version"]), seconds(&done["pause_s"]))
    });
    Ok(())
}

pub(crate) fn show(socket: &Path, output: &Output) -> Result<()> {
    let shown = Daemon::agent(supervisor_socket(socket)).get("/v1/supervisor")?;
    output.show(&shown, |shown| {
        let mut text = format!(
            "supervisor {} of version {}; worker {} {}, started {} time(s), last end: {}\n",
            cell(&shown["pid"]),
            cell(&shown["version"]),
            cell(&shown["worker_pid"]),
            cell(&shown["worker"]),
            cell(&shown["starts"]),
            cell(&shown["last_end"]),
        );
        for volume in shown["bypassed"].as_array().map(Vec::as_slice).unwrap_or_default() {
            text += &format!("  {} is served without capture\n", cell(volume));
        }
        text
    });
    Ok(())
}

/// Time beyond the daemon's own limit after which the command line gives up on an answer.
const GRACE: Duration = Duration::from_secs(5);

#[expect(clippy::wildcard_enum_match_arm, reason = "main sends only the agent's commands here")]
pub(crate) fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Protect { source, group, name, frontend, dm, socket } => {
            let source = std::path::absolute(&source)
                .map_err(|e| Failure::usage(source.display().to_string(), e.to_string()))?;
            let body = json!({ "source": source, "group": group, "name": name, "frontend": frontend, "dm": dm });
            let volume = Daemon::agent(&socket.agent).post("/v1/protect", &body)?;
            output.show(&volume, |volume| cell(&volume["device"]));
        }
        Command::Unprotect { volume, socket } => {
            let gone = Daemon::agent(&socket.agent).post("/v1/unprotect", &json!({ "volume": volume }))?;
            output.show(&gone, |gone| {
                format!("{}/{} is no longer protected", cell(&gone["group"]), cell(&gone["volume"]))
            });
        }
        Command::Volumes { socket } => {
            output.show(&Daemon::agent(&socket.agent).get("/v1/volumes")?, volumes_text);
        }
        Command::Status { group, watch, socket } => status(group.as_deref(), watch, &socket.agent, output)?,
        Command::Bookmark { group, name, timeout, socket } => {
            let limit = limit_of(timeout)?;
            let body = json!({ "group": group, "name": name, "timeout_s": timeout });
            let point = Daemon::agent(&socket.agent).post_within("/v1/bookmark", &body, limit + GRACE)?;
            output.show(&point, |point| format!("{name} is point {} of {}", cell(&point["id"]), cell(&point["time"])));
        }
        Command::Wait { group, timeout, socket } => {
            let daemon = Daemon::agent(&socket.agent);
            let body = json!({ "group": group, "timeout_s": timeout });
            let point = match timeout {
                None => daemon.post("/v1/wait", &body)?,
                Some(seconds) => daemon.post_within("/v1/wait", &body, limit_of(seconds)? + GRACE)?,
            };
            output.show(&point, |point| format!("recoverable up to {} ({})", cell(&point["time"]), cell(&point["id"])));
        }
        Command::Resync { volume, socket } => {
            let started = Daemon::agent(&socket.agent).post("/v1/resync", &json!({ "volume": volume }))?;
            output.show(&started, |started| {
                format!("comparing {}/{}; see `farshore status`", cell(&started["group"]), cell(&started["volume"]))
            });
        }
        Command::Verify { group, repair, timeout, socket } => {
            let limit = timeout.map(limit_of).transpose()?;
            crate::verify::verify(&group, repair, limit, &socket.agent, output)?;
        }
        Command::Alarms { target, socket } => alarms(target, socket, output)?,
        other => unreachable!("main sends only the agent's commands here, not {other:?}"),
    }
    Ok(())
}

fn limit_of(seconds: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| Failure::usage("--timeout", format!("{seconds} is not a number of seconds")).into())
}

fn alarms(target: bool, socket: Option<PathBuf>, output: &Output) -> Result<()> {
    let (variable, default) = if target {
        ("FARSHORE_TARGET_SOCKET", "/run/farshore/target.sock")
    } else {
        ("FARSHORE_AGENT_SOCKET", "/run/farshore/agent.sock")
    };
    let socket = socket.or_else(|| std::env::var_os(variable).map(PathBuf::from)).unwrap_or_else(|| default.into());
    let daemon = if target { Daemon::target(&socket) } else { Daemon::agent(&socket) };
    output.show(&daemon.get("/v1/alarms")?, |alarms| match alarms.as_array() {
        Some(list) if !list.is_empty() => list
            .iter()
            .map(|alarm| format!("{}  {}  {}\n", cell(&alarm["since"]), cell(&alarm["code"]), cell(&alarm["text"])))
            .collect(),
        _ => "no alarms".into(),
    });
    Ok(())
}

fn status(group: Option<&str>, watch: bool, socket: &Path, output: &Output) -> Result<()> {
    let daemon = Daemon::agent(socket);
    let path = group.map_or_else(|| "/v1/status".into(), |group| format!("/v1/status?group={group}"));
    loop {
        let status = daemon.get(&path)?;
        // One group asked for: one document; several: a list.
        let shown = if group.is_some() { status[0].clone() } else { status };
        output.show(&shown, |status| match status.as_array() {
            Some(groups) if groups.is_empty() => "nothing is protected".into(),
            Some(groups) => groups.iter().map(group_text).collect::<Vec<_>>().join("\n"),
            None => group_text(status),
        });
        if !watch {
            return Ok(());
        }
        crate::sites::pause(Duration::from_secs(1));
    }
}

fn volumes_text(volumes: &Value) -> String {
    let rows: Vec<Vec<String>> = volumes
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .map(|volume| {
            vec![
                cell(&volume["volume"]),
                cell(&volume["group"]),
                size(&volume["size_bytes"]),
                cell(&volume["tier"]),
                cell(&volume["source"]),
                cell(&volume["device"]),
            ]
        })
        .collect();
    table(&["VOLUME", "GROUP", "SIZE", "TIER", "SOURCE", "DEVICE"], &rows)
}

fn group_text(group: &Value) -> String {
    let mut text = format!(
        "{}: {}, tier {}, RPO {}, lag {}\n",
        cell(&group["group"]),
        cell(&group["state"]),
        cell(&group["tier"]),
        seconds(&group["rpo_s"]),
        size(&group["lag_bytes"]),
    );
    let link = &group["link"];
    text += &format!(
        "  link {}, round trip {}, {}/s; ring {} of {}\n",
        if link["connected"] == true { "up" } else { "down" },
        link["rtt_s"].as_f64().map_or_else(|| "-".into(), |rtt| format!("{:.1} ms", rtt * 1000.0)),
        size(&link["rate_bytes_per_s"]),
        size(&group["ring_used_bytes"]),
        size(&group["ring_size_bytes"]),
    );
    text += &format!(
        "  written {}, shipped {}, on the wire {}\n",
        size(&group["written_bytes"]),
        size(&group["shipped_bytes"]),
        size(&group["wire_bytes"])
    );
    if group["newest_point"].is_object() {
        let point = &group["newest_point"];
        text += &format!("  newest point {} of {}\n", cell(&point["id"]), cell(&point["time"]));
    }
    if group["sync"].is_object() {
        let sync = &group["sync"];
        text += &format!(
            "  {}: {} of {}, ETA {}\n",
            cell(&sync["state"]),
            size(&sync["done_bytes"]),
            size(&sync["total_bytes"]),
            seconds(&sync["eta_s"])
        );
    }
    for volume in group["verify"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let since = &volume["verified_since"];
        let since = if since.is_null() { "not yet".to_owned() } else { format!("since {}", cell(since)) };
        text += &format!("  {} verified {since}", cell(&volume["volume"]));
        if !volume["running_since"].is_null() {
            text += &format!(", {} of {} in this pass", size(&volume["done_bytes"]), size(&volume["total_bytes"]));
        }
        if volume["differing_bytes"] != 0 {
            text += &format!("; {} DIFFER", size(&volume["differing_bytes"]));
        }
        text.push('\n');
    }
    for alarm in group["alarms"].as_array().map(Vec::as_slice).unwrap_or_default() {
        text += &format!("  alarm {}: {}\n", cell(&alarm["code"]), cell(&alarm["text"]));
    }
    text
}
