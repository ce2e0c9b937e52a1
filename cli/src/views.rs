//! Commands that ask the target.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::args::{BaseCommand, Command, GroupCommand, HoldCommand, PolicyCommand, TargetSocket, ViewCommand};
use crate::client::Daemon;
use crate::failure::Failure;
use crate::output::{Output, cell, seconds, size, table};

/// How often a long job is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

#[expect(clippy::wildcard_enum_match_arm, reason = "main sends only the target's commands here")]
pub(crate) fn run(command: Command, output: &Output) -> Result<()> {
    match command {
        Command::Groups { socket } => {
            output.show(&Daemon::target(&socket.target).get("/v1/groups")?, groups_text);
        }
        Command::Group(GroupCommand::Add { group, host, socket }) => {
            let body = json!({ "group": group, "host": host });
            let done = Daemon::target(&socket.target).post("/v1/group/add", &body)?;
            output.show(&done, |_| format!("{host} may write {group}"));
        }
        Command::Group(GroupCommand::Remove { group, host, force, socket }) => {
            let body = json!({ "group": group, "host": host, "force": force });
            let done = Daemon::target(&socket.target).post("/v1/group/remove", &body)?;
            output.show(&done, |_| format!("{host} may no longer write {group}; its history stays"));
        }
        Command::Points { group, from, to, socket } => {
            let mut path = format!("/v1/points?group={}", escape(&group));
            for (key, value) in [("from", from), ("to", to)] {
                if let Some(value) = value {
                    path += &format!("&{key}={}", escape(&value));
                }
            }
            output.show(&Daemon::target(&socket.target).get(&path)?, points_text);
        }
        Command::Base(command) => base(command, output)?,
        Command::Hold(command) => hold(command, output)?,
        Command::View(command) => view(command, output)?,
        Command::Restore { volume, at, out, socket } => {
            let out =
                std::path::absolute(&out).map_err(|e| Failure::usage(out.display().to_string(), e.to_string()))?;
            let body = json!({ "volume": volume, "at": at, "out": out });
            restore(&Daemon::target(&socket.target), &volume, &body, output)?;
        }
        Command::Policy(PolicyCommand::Show { group, socket }) => {
            let policy = Daemon::target(&socket.target).get(&format!("/v1/policy?group={}", escape(&group)))?;
            output.show(&policy, policy_text);
        }
        Command::Policy(PolicyCommand::Set { group, settings, socket }) => {
            let mut pairs = serde_json::Map::new();
            for setting in settings {
                let (key, value) =
                    setting.split_once('=').ok_or_else(|| Failure::usage(setting.clone(), "is not KEY=VALUE"))?;
                pairs.insert(key.to_owned(), json!(value));
            }
            let policy = Daemon::target(&socket.target).post("/v1/policy", &json!({ "group": group, "set": pairs }))?;
            output.show(&policy, policy_text);
        }
        other => unreachable!("main sends only the target's commands here, not {other:?}"),
    }
    Ok(())
}

/// Percent-encodes what may not stand in a query.
fn escape(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b':' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// `target resume-retention`
pub(crate) fn resume_retention(socket: &TargetSocket, output: &Output) -> Result<()> {
    let done = Daemon::target(&socket.target).post("/v1/retention/resume", &json!({}))?;
    output.show(&done, |done| match done["reason"].as_str() {
        None => "retention was not suspended".to_owned(),
        Some(reason) => format!("retention goes on; it was suspended: {reason}"),
    });
    Ok(())
}

fn base(command: BaseCommand, output: &Output) -> Result<()> {
    match command {
        BaseCommand::Attach { volume, device, overwrite, host, socket } => {
            let body = json!({ "volume": volume, "device": device, "overwrite": overwrite, "host": host });
            let target = Daemon::target(&socket.target);
            let job = follow(&target, "/v1/base/attach", &format!("prepare {}", device.display()), &body, output)?;
            output.show(&job, |job| {
                format!("{} carries the base of {volume} ({})", cell(&job["device"]), size(&job["size_bytes"]))
            });
        }
        BaseCommand::Detach { volume, host, socket } => {
            let body = json!({ "volume": volume, "host": host });
            let gone = Daemon::target(&socket.target).post("/v1/base/detach", &body)?;
            output.show(&gone, |gone| format!("{} is free again", cell(&gone["device"])));
        }
        BaseCommand::List { group, socket } => {
            let bases = Daemon::target(&socket.target).get(&format!("/v1/bases?group={}", escape(&group)))?;
            output.show(&bases, |bases| {
                rows(bases, &["VOLUME", "HOST", "DEVICE", "SIZE", "STATE"], |base| {
                    let device = base["device"].as_str().unwrap_or("(file)");
                    vec![
                        cell(&base["volume"]),
                        cell(&base["host"]),
                        device.to_owned(),
                        size(&base["size_bytes"]),
                        cell(&base["state"]),
                    ]
                })
            });
        }
    }
    Ok(())
}

fn hold(command: HoldCommand, output: &Output) -> Result<()> {
    match command {
        HoldCommand::Add { group, point, socket } => {
            let held = Daemon::target(&socket.target).post("/v1/hold/add", &json!({ "group": group, "at": point }))?;
            output.show(&held, |held| format!("{} is kept", cell(&held["point"])));
        }
        HoldCommand::Remove { group, point, socket } => {
            let gone =
                Daemon::target(&socket.target).post("/v1/hold/remove", &json!({ "group": group, "at": point }))?;
            output.show(&gone, |gone| format!("{} is no longer kept", cell(&gone["point"])));
        }
        HoldCommand::List { group, socket } => {
            let holds = Daemon::target(&socket.target).get(&format!("/v1/holds?group={}", escape(&group)))?;
            output.show(&holds, |holds| {
                rows(holds, &["POINT", "TIME", "REASON"], |hold| {
                    vec![cell(&hold["point"]), cell(&hold["time"]), cell(&hold["reason"])]
                })
            });
        }
    }
    Ok(())
}

fn view(command: ViewCommand, output: &Output) -> Result<()> {
    match command {
        ViewCommand::Open { group, at, export, read_only, socket } => {
            let body = json!({ "group": group, "at": at, "export": export, "read_only": read_only });
            let view = Daemon::target(&socket.target).post("/v1/view/open", &body)?;
            output.show(&view, |view| {
                let volumes = view["volumes"].as_array().map(Vec::as_slice).unwrap_or_default();
                let mut text =
                    format!("view {} of {} ({})\n", cell(&view["id"]), cell(&view["point"]), cell(&view["time"]));
                for volume in volumes {
                    text += &format!("{}  {}\n", cell(&volume["volume"]), cell(&volume["device"]));
                }
                text
            });
        }
        ViewCommand::List { socket } => {
            output.show(&Daemon::target(&socket.target).get("/v1/views")?, |views| {
                rows(views, &["ID", "GROUP", "POINT", "TIME", "ACCESS"], |view| {
                    let access = if view["read_only"] == true { "read-only" } else { "read-write" };
                    vec![
                        cell(&view["id"]),
                        cell(&view["group"]),
                        cell(&view["point"]),
                        cell(&view["time"]),
                        access.into(),
                    ]
                })
            });
        }
        ViewCommand::Close { id, socket } => {
            let closed = Daemon::target(&socket.target).post("/v1/view/close", &json!({ "id": id }))?;
            output.show(&closed, |_| format!("view {id} is closed"));
        }
    }
    Ok(())
}

/// Starts a job and shows its progress until it ends; gives its last document.
fn follow(target: &Daemon, path: &str, title: &str, body: &Value, output: &Output) -> Result<Value> {
    let started = target.post(path, body)?;
    let path = format!("/v1/job?id={}", cell(&started["job"]));
    let mut progress = output.progress(title, started["total_bytes"].as_u64().unwrap_or(0));
    let job = loop {
        let job = target.get(&path)?;
        progress.set(job["done_bytes"].as_u64().unwrap_or(0), job["total_bytes"].as_u64().unwrap_or(0));
        if job["state"] != "running" {
            break job;
        }
        crate::sites::pause(LOOK_INTERVAL);
    };
    progress.finish();
    if job["state"] == "failed" {
        return Err(Failure::from_answer(&job, 500).into());
    }
    Ok(job)
}

fn restore(target: &Daemon, what: &str, body: &Value, output: &Output) -> Result<()> {
    let job = follow(target, "/v1/restore", &format!("restore {what}"), body, output)?;
    output.show(&job, |job| {
        format!(
            "restored {what} at {} ({}): {} in {}",
            cell(&job["time"]),
            cell(&job["point"]),
            size(&job["total_bytes"]),
            seconds(&job["seconds"])
        )
    });
    Ok(())
}

fn rows(list: &Value, head: &[&str], row: impl Fn(&Value) -> Vec<String>) -> String {
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    table(head, &list.iter().map(row).collect::<Vec<_>>())
}

fn groups_text(groups: &Value) -> String {
    rows(groups, &["GROUP", "HOSTS", "STATE", "POINTS", "OLDEST", "NEWEST", "JOURNAL"], |group| {
        let hosts = group["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
        vec![
            cell(&group["group"]),
            hosts.iter().map(cell).collect::<Vec<_>>().join(","),
            cell(&group["state"]),
            cell(&group["points"]),
            cell(&group["oldest_point"]["time"]),
            cell(&group["newest_point"]["time"]),
            size(&group["journal_bytes"]),
        ]
    })
}

fn points_text(points: &Value) -> String {
    rows(points, &["POINT", "TIME", "KIND", "RECOVERABLE", "VERIFIED", "BOOKMARK"], |point| {
        ["id", "time", "kind", "recoverable", "verified", "bookmark"].iter().map(|key| cell(&point[*key])).collect()
    })
}

fn policy_text(policy: &Value) -> String {
    policy
        .as_object()
        .map(|pairs| pairs.iter().map(|(key, value)| format!("{key} = {}\n", cell(value))).collect())
        .unwrap_or_default()
}
