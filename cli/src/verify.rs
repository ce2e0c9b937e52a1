//! `farshore verify`: compares a group's volumes with their replicas, and waits for what comes of it.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use crate::client::Daemon;
use crate::failure::Failure;
use crate::output::{Output, cell, size};
use crate::sites::pause;

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(500);

pub(crate) fn verify(group: &str, repair: bool, limit: Option<Duration>, socket: &Path, output: &Output) -> Result<()> {
    let mut left = limit;
    let mut volumes = pass(group, false, &mut left, socket, output)?;
    if repair && differing(&volumes) > 0 {
        if !output.is_json() {
            show(&volumes, output);
        }
        volumes = pass(group, true, &mut left, socket, output)?;
    }
    show(&volumes, output);
    let skipped: u64 = list(&volumes).iter().filter_map(|volume| volume["skipped_bytes"].as_u64()).sum();
    match differing(&volumes) {
        0 if skipped == 0 => Ok(()),
        0 => {
            let why = format!("{skipped} bytes could not be compared (unreadable, or written to all the time)");
            Err(Failure::failed(format!("group {group}"), why).hint("see `farshore alarms`; try again").into())
        }
        bytes => {
            let why = format!("{bytes} bytes of source and replica differ");
            let hint = "find out which side is right; --repair makes the replica like the source (older points keep what it was)";
            Err(Failure::failed(format!("group {group}"), why).hint(hint).into())
        }
    }
}

/// Orders a pass and waits for its end; the group's volumes as verified.
fn pass(group: &str, repair: bool, left: &mut Option<Duration>, socket: &Path, output: &Output) -> Result<Value> {
    let daemon = Daemon::agent(socket);
    let ordered = daemon.post("/v1/verify", &json!({ "group": group, "repair": repair }))?;
    let total =
        |volumes: &Value, key: &str| list(volumes).iter().filter_map(|volume| volume[key].as_u64()).sum::<u64>();
    let mut progress = output.progress("verified", 0);
    loop {
        let status = daemon.get(&format!("/v1/status?group={group}"))?;
        let volumes = &status[0]["verify"];
        let mut over = true;
        for order in list(&ordered) {
            let Some(volume) = list(volumes).iter().find(|volume| volume["volume"] == order["volume"]) else {
                let why = format!("volume {} left it and was not verified", cell(&order["volume"]));
                return Err(Failure::failed(format!("group {group}"), why).into());
            };
            let (began, ended) = (&order["began"], &volume["last_pass"]);
            if ended != began && volume["running_since"] != *began {
                let why = format!("the pass over volume {} was replaced by another order", cell(&order["volume"]));
                return Err(Failure::failed(format!("group {group}"), why).hint("see `farshore status`").into());
            }
            over &= ended == began;
        }
        if over {
            progress.finish();
            return Ok(volumes.clone());
        }
        progress.set(total(volumes, "done_bytes"), total(volumes, "total_bytes"));
        if let Some(left) = left {
            if left.is_zero() {
                let state = cell(&status[0]["state"]);
                let why =
                    format!("is not verified within the time; it goes on by itself (the group is in state {state})");
                return Err(Failure::failed(format!("group {group}"), why).hint("see `farshore status`").into());
            }
            *left = left.saturating_sub(LOOK);
        }
        pause(LOOK);
    }
}

fn list(of: &Value) -> &[Value] {
    of.as_array().map_or(&[], Vec::as_slice)
}

fn differing(volumes: &Value) -> u64 {
    list(volumes).iter().filter_map(|volume| volume["differing_bytes"].as_u64()).sum()
}

fn show(volumes: &Value, output: &Output) {
    output.show(volumes, |volumes| list(volumes).iter().map(volume_text).collect());
}

fn volume_text(volume: &Value) -> String {
    let name = cell(&volume["volume"]);
    let mut text = match volume["differing_bytes"].as_u64() {
        Some(0) if volume["skipped_bytes"] != 0 => {
            format!("{name}: the same as its replica, but {} could not be compared\n", size(&volume["skipped_bytes"]))
        }
        Some(0) => {
            format!("{name}: the same as its replica, all of it compared since {}\n", cell(&volume["verified_since"]))
        }
        _ => format!("{name}: {} differ from its replica\n", size(&volume["differing_bytes"])),
    };
    for range in list(&volume["differing"]) {
        text += &format!("  {} bytes from {} on\n", cell(&range["len"]), cell(&range["offset"]));
    }
    text
}
