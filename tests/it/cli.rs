//! The command line's contract: field names, exit codes, `error:` and `hint:` lines, `--help` with an example.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use farshore_proto::text::parse_time;
use serde_json::Value;

use crate::support::rig::{GROUP, VOLUME, binary};
use crate::support::{Guest, MIB, Rig, device, until};
use farshore_cli::sites::run::run;

/// An object has all these keys. More are allowed: the contract may be extended, never renamed.
fn keys(value: &Value, wanted: &[&str]) -> Result<()> {
    let object = value.as_object().with_context(|| format!("an object was expected: {value}"))?;
    let missing: Vec<_> = wanted.iter().filter(|key| !object.contains_key(**key)).collect();
    ensure!(missing.is_empty(), "fields missing: {missing:?}: {value}");
    Ok(())
}

fn only(list: &Value) -> Result<&Value> {
    match list.as_array().map(Vec::as_slice) {
        Some([one]) => Ok(one),
        _ => anyhow::bail!("a list of one was expected: {list}"),
    }
}

fn is_time(value: &Value) -> Result<()> {
    let text = value.as_str().with_context(|| format!("a time was expected: {value}"))?;
    ensure!(text.ends_with('Z'), "times are UTC: {text}");
    parse_time(text).map(drop).with_context(|| format!("a time was expected: {text}"))
}

const STATUS: [&str; 18] = [
    "group",
    "generation",
    "state",
    "tier",
    "rpo_s",
    "lag_bytes",
    "newest_point",
    "ring_used_bytes",
    "ring_size_bytes",
    "log_used_bytes",
    "written_bytes",
    "shipped_bytes",
    "wire_bytes",
    "dedup_ratio",
    "compression_ratio",
    "link",
    "sync",
    "alarms",
];

fn check_status(status: &Value) -> Result<()> {
    keys(status, &STATUS)?;
    ensure!(status["group"] == GROUP && status["generation"].is_u64(), "{status}");
    ensure!(["ring", "log", "extents"].iter().any(|tier| status["tier"] == *tier), "{status}");
    for bytes in [
        "lag_bytes",
        "ring_used_bytes",
        "ring_size_bytes",
        "log_used_bytes",
        "written_bytes",
        "shipped_bytes",
        "wire_bytes",
    ] {
        ensure!(status[bytes].is_u64(), "{bytes} is a number of bytes: {status}");
    }
    ensure!(status["rpo_s"].is_number(), "there is a point, so there is an RPO: {status}");
    keys(&status["newest_point"], &["id", "time", "app_consistent"])?;
    is_time(&status["newest_point"]["time"])?;
    keys(&status["link"], &["connected", "rtt_s", "rate_bytes_per_s"])?;
    ensure!(status["link"]["connected"] == true && status["link"]["rtt_s"].is_number(), "{status}");
    ensure!(status["alarms"].is_array(), "{status}");
    if !status["sync"].is_null() {
        keys(&status["sync"], &["state", "done_bytes", "total_bytes", "eta_s"])?;
    }
    Ok(())
}

const POINT: [&str; 9] =
    ["id", "time", "received", "scope", "kind", "bookmark", "generation", "recoverable", "verified"];

fn check_point(point: &Value) -> Result<()> {
    keys(point, &POINT)?;
    is_time(&point["time"])?;
    is_time(&point["received"])?;
    ensure!(["group", "member"].iter().any(|scope| point["scope"] == *scope), "{point}");
    ensure!(["crash", "app"].iter().any(|kind| point["kind"] == *kind), "{point}");
    ensure!(
        point["recoverable"].is_boolean() && point["verified"].is_boolean() && point["generation"].is_u64(),
        "{point}"
    );
    Ok(())
}

#[test]
fn json_documents_have_the_fields_of_the_contract() {
    Rig::test(
        |_| {},
        |rig| {
            ensure!(rig.cli(&["--json", "status"])?.json()? == Value::Array(Vec::new()), "nothing is protected yet");
            let (image, socket, model) = rig.protect(8 * MIB, 1)?;
            Guest::new(&socket, model, 2)?.work(20)?;
            check_point_of_cli(rig)?;

            let volumes = rig.cli(&["--json", "volumes"])?.json()?;
            let volume = only(&volumes)?;
            keys(volume, &["volume", "group", "source", "device", "size_bytes", "frontend", "tier"])?;
            ensure!(volume["volume"] == VOLUME && volume["group"] == GROUP, "{volume}");
            ensure!(volume["size_bytes"] == 8 * MIB && volume["tier"] == "ring", "{volume}");
            ensure!(volume["source"] == image.to_str().context("text")?, "{volume}");
            ensure!(volume["device"].as_str().is_some_and(|device| device.contains("nbd+unix:")), "{volume}");

            until("the status is settled", || {
                let status = rig.cli(&["--json", "status", GROUP])?.json()?;
                Ok(status["newest_point"].is_object().then_some(()))
            })?;
            check_status(&rig.cli(&["--json", "status", GROUP])?.json()?)?;
            check_status(only(&rig.cli(&["--json", "status"])?.json()?)?)
        },
    );
}

fn check_point_of_cli(rig: &Rig) -> Result<()> {
    let reached = rig.cli(&["--json", "wait", GROUP, "--timeout", "60"])?.json()?;
    ensure!(reached["id"].is_string(), "{reached}");
    is_time(&reached["time"])?;
    let mark = rig.cli(&["--json", "bookmark", GROUP, "before-upgrade"])?.json()?;
    let points = rig.cli(&["--json", "points", GROUP])?.json()?;
    let list = points.as_array().context("points are a list")?;
    ensure!(!list.is_empty(), "there are points");
    list.iter().try_for_each(check_point)?;
    let named = list.iter().find(|point| point["bookmark"] == "before-upgrade").context("the bookmark is listed")?;
    ensure!(named["id"] == mark["id"] && named["recoverable"] == true, "{named} {mark}");
    let (from, to) = (named["time"].as_str().context("text")?, named["time"].as_str().context("text")?);
    let between = rig.cli(&["--json", "points", GROUP, "--from", from])?.json()?;
    ensure!(between.as_array().is_some_and(|few| few.iter().any(|point| point["id"] == mark["id"])), "{between}");
    let before = rig.cli(&["--json", "points", GROUP, "--to", to])?.json()?;
    ensure!(before.as_array().is_some_and(|few| few.len() <= list.len()), "{before}");
    Ok(())
}

/// Every form of naming a point, holds, views, restore and policies, through the command line alone.
#[test]
fn the_targets_commands_do_what_they_say() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(8 * MIB, 1)?;
            let mut guest = Guest::new(&socket, model, 2)?;
            guest.work(30)?;
            guest.flush()?;
            let mark = rig.cli(&["--json", "bookmark", GROUP, "here"])?.json()?;
            let (id, time) = (mark["id"].as_str().context("text")?, mark["time"].as_str().context("text")?);
            for at in ["latest", "bookmark:here", id, "2199-01-01T00:00:00Z"] {
                rig.check_point(at, guest.model()).with_context(|| format!("at {at}"))?;
            }
            rig.cli(&["--json", "hold", "add", GROUP, "bookmark:here"])?.json()?;
            let holds = rig.cli(&["--json", "hold", "list", GROUP])?.json()?;
            ensure!(only(&holds)?["point"] == id, "{holds}");
            rig.cli(&["hold", "remove", GROUP, id])?.ok()?;
            ensure!(
                rig.cli(&["--json", "hold", "list", GROUP])?.json()? == Value::Array(Vec::new()),
                "the hold is gone"
            );

            let folder = format!("nbd+unix:{}", rig.dir().join("exports").display());
            let view = rig.cli(&["--json", "view", "open", GROUP, "--at", id, "--export", &folder])?.json()?;
            let device = device::view_socket(&view, VOLUME)?;
            device::connect(&device)?.write(0, &[0x5a; 8192], true)?;
            let listed = rig.cli(&["--json", "view", "list"])?.json()?;
            ensure!(only(&listed)?["id"] == view["id"] && only(&listed)?["point"] == id, "{listed}");
            // A writable view outlives the target, with what was written to it.
            rig.sites.kill_target();
            rig.sites.start_target()?;
            let mut wanted = guest.model().to_vec();
            wanted[..8192].fill(0x5a);
            device::same("the view after a restart", &device::read_all(&device)?, &wanted)?;
            rig.cli(&["view", "close", view["id"].as_str().context("text")?])?.ok()?;
            ensure!(device::connect(&device).is_err(), "a closed view is not served");
            rig.check_point(time, guest.model()).context("views never change points")?;
            // The time that is shown means the point that it is shown of, though it leaves out its nanoseconds.
            let there = rig.cli(&["--json", "points", GROUP, "--from", time, "--to", time])?.json()?;
            let there = there.as_array().context("a list")?;
            ensure!(there.iter().any(|point| point["id"] == id), "{there:?}");
            let view = rig.cli(&["--json", "view", "open", GROUP, "--at", time, "--export", &folder])?.json()?;
            ensure!(view["point"] == id, "{view}");
            rig.cli(&["view", "close", view["id"].as_str().context("text")?])?.ok()?;
            let tcp = rig.cli(&[
                "--json",
                "view",
                "open",
                GROUP,
                "--at",
                "latest",
                "--export",
                "nbd+tcp:127.0.0.1:0",
                "--read-only",
            ])?;
            let tcp = tcp.json()?;
            let uri = tcp["volumes"][0]["device"].as_str().context("a device")?.to_owned();
            let mut client =
                farshore_nbd::client::Client::connect_uri(&uri, &farshore_nbd::client::Options::default())?;
            ensure!(client.read(0, 4096)? == guest.model()[..4096], "over TCP too");
            ensure!(client.write(0, &[1; 4096], false).is_err(), "read-only is read-only");
            drop(client);
            rig.cli(&["view", "close", tcp["id"].as_str().context("text")?])?.ok()?;

            let out = rig.dir().join("restored.img");
            let out = out.to_str().context("text")?;
            rig.cli(&["restore", &format!("{GROUP}/{VOLUME}"), "--at", id, "--out", out])?.ok()?;
            device::same("the restored image", &device::read_file(out.as_ref())?, guest.model())?;
            device::same("the source", &device::read_file(&image)?, guest.model())?;
            rig.cli(&["restore", &format!("{GROUP}/{VOLUME}"), "--at", id, "--out", out])?.refused(
                4,
                "restored.img",
                false,
            )?;

            let bases = rig.cli(&["--json", "base", "list", GROUP])?.json()?;
            let base = only(&bases)?;
            ensure!(base["volume"] == VOLUME && base["device"].is_null() && base["state"] == "in use", "{base}");
            let resumed = rig.cli(&["--json", "target", "resume-retention"])?.json()?;
            ensure!(resumed["reason"].is_null(), "it was not suspended: {resumed}");

            let policy = rig.cli(&["--json", "policy", "set", GROUP, "keep=2h", "size_limit=1GiB"])?.json()?;
            ensure!(policy["keep"] == "2h" && policy["size_limit"] == "1GiB", "{policy}");
            ensure!(rig.cli(&["--json", "policy", "show", GROUP])?.json()? == policy, "kept");
            let groups = rig.cli(&["--json", "groups"])?.json()?;
            ensure!(only(&groups)?["group"] == GROUP && only(&groups)?["hosts"][0] == "source", "{groups}");
            Ok(())
        },
    );
}

#[test]
fn exit_codes_and_messages_are_those_of_the_contract() {
    Rig::test(
        |_| {},
        |rig| {
            rig.protect(4 * MIB, 1)?;
            rig.wait()?;
            let cases: &[(i32, &[&str], &str, bool)] = &[
                (3, &["status", "nosuch"], "nosuch", false),
                (3, &["wait", "nosuch", "--timeout", "1"], "nosuch", false),
                (3, &["bookmark", "nosuch", "b"], "nosuch", false),
                (3, &["unprotect", "nosuch"], "nosuch", false),
                (3, &["resync", "nosuch"], "nosuch", false),
                (2, &["bookmark", "g", "a/b"], "a/b", false),
                (3, &["points", "nosuch"], "nosuch", true),
                (3, &["view", "open", "g", "--at", "bookmark:nosuch"], "nosuch", true),
                (3, &["view", "open", "g", "--at", "g9-i9-b999999999"], "g9-i9-b999999999", true),
                (3, &["view", "open", "g", "--at", "2001-01-01T00:00:00Z"], "2001", true),
                (2, &["view", "open", "g", "--at", "yesterday"], "yesterday", false),
                (2, &["view", "open", "g", "--at", "latest", "--export", "smb:x"], "smb:x", false),
                (3, &["view", "close", "nosuch"], "nosuch", true),
                (3, &["hold", "add", "g", "bookmark:nosuch"], "nosuch", true),
                (2, &["policy", "set", "g", "keep"], "KEY=VALUE", false),
                (2, &["policy", "set", "g", "keep=long"], "long", false),
                (2, &["policy", "set", "g", "kept=1h"], "kept", false),
                (3, &["policy", "show", "nosuch"], "nosuch", true),
                (2, &["restore", "g", "--at", "latest", "--out", "/nonexistent"], "GROUP/VOLUME", false),
                (3, &["restore", "g/nosuch", "--at", "latest", "--out", "/nonexistent/x"], "nosuch", false),
                (3, &["restore", "g/disk", "--at", "latest", "--out", "/nonexistent/x"], "/nonexistent", false),
                (4, &["group", "remove", "g", "source"], "source", true),
                (3, &["group", "remove", "nosuch", "source"], "nosuch", false),
                (3, &["base", "list", "nosuch"], "nosuch", true),
                (2, &["base", "attach", "g", "/dev/null"], "GROUP/VOLUME", false),
                (3, &["base", "attach", "nosuch/v", "/dev/null"], "nosuch", false),
                (4, &["base", "attach", "g/other", "/dev/null"], "no block device", false),
                (4, &["base", "attach", "g/disk", "/dev/null"], "in a file", false),
                (3, &["base", "detach", "g/disk"], "has no device", false),
            ];
            for (code, args, part, hint) in cases {
                rig.cli(args)?.refused(*code, part, *hint).with_context(|| format!("farshore {}", args.join(" ")))?;
                let json = rig.cli(&[&["--json"], *args].concat())?;
                ensure!(json.code == Some(*code), "the same code with --json: {json}");
                let document: Value =
                    serde_json::from_str(&json.out).with_context(|| format!("an error document: {json}"))?;
                ensure!(document["error"]["code"] == *code, "{document}");
            }
            Ok(())
        },
    );
}

#[test]
fn without_a_daemon_the_command_line_says_which_and_how_to_start_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("none.sock");
    let socket = socket.to_str().expect("text");
    for (command, role) in [("status", "agent"), ("volumes", "agent"), ("groups", "target")] {
        let ran =
            run(Command::new(binary().expect("the binary")).args([command, "--socket", socket])).expect("it ends");
        ran.refused(1, role, true).expect(command);
    }
    for args in [vec!["nonsense"], vec!["protect"], vec!["points"], vec!["wait", "g", "--timeout", "x"]] {
        let ran = run(Command::new(binary().expect("the binary")).args(&args)).expect("it ends");
        assert_eq!(ran.code, Some(2), "{ran}");
    }
}

#[test]
fn a_vault_is_made_once_and_issues_what_it_should() {
    let check = || -> Result<()> {
        let folder = tempfile::tempdir()?;
        let vault = folder.path().join("vault");
        let (vault, out) = (vault.to_str().context("text")?, folder.path().join("a.bundle"));
        let out = out.to_str().context("text")?;
        let cli = |args: &[&str]| run(Command::new(binary()?).args(args));
        cli(&["--json", "vault", "init", vault, "--name", "acme"])?.json()?;
        let again = cli(&["vault", "init", vault, "--name", "acme"])?;
        ensure!([Some(1), Some(4)].contains(&again.code) && again.err.contains("already"), "{again}");
        let issued =
            cli(&["--json", "vault", "issue", vault, "--role", "agent", "--name", "db1", "--out", out])?.json()?;
        ensure!(issued["role"] == "agent" && issued["name"] == "db1", "{issued}");
        is_time(&issued["not_after"])?;
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(out)?.permissions().mode() & 0o777;
        ensure!(mode == 0o600, "others may read the keys: {mode:o}");
        let rotated = cli(&["--json", "vault", "rotate-key", vault])?.json()?;
        ensure!(rotated["epoch"] == 2 && rotated["vault"] == issued["vault"], "{rotated}");
        let newer = folder.path().join("newer.bundle");
        let newer = newer.to_str().context("text")?;
        cli(&["vault", "issue", vault, "--role", "agent", "--name", "db1", "--out", newer])?.ok()?;
        let epochs = |path: &str| -> Result<usize> {
            let identity = farshore_link::identity::Identity::load(path.as_ref())?;
            Ok(identity.newest_epoch().context("an agent has keys")?.0.try_into()?)
        };
        ensure!(epochs(out)? == 1 && epochs(newer)? == 2, "the older bundle stays, the newer has the new key");
        let issue = |more: &[&str]| cli(&[&["vault", "issue", vault], more].concat());
        let late = folder.path().join("b.bundle");
        let late = late.to_str().context("text")?;
        issue(&["--role", "king", "--name", "x", "--out", late])?.refused(2, "king", false)?;
        issue(&["--role", "agent", "--name", "a/b", "--out", late])?.refused(2, "a/b", false)?;
        let days = issue(&["--role", "agent", "--name", "x", "--out", late, "--days", "0"])?;
        ensure!(days.code.is_some_and(|code| code == 1 || code == 2) && days.err.contains("days"), "{days}");
        let none = folder.path().join("none");
        let none = none.to_str().context("text")?;
        let missing = cli(&["vault", "issue", none, "--role", "agent", "--name", "x", "--out", late])?;
        ensure!([Some(1), Some(3)].contains(&missing.code) && missing.err.contains("none"), "{missing}");
        Ok(())
    };
    if let Err(error) = check() {
        panic!("{error:#}");
    }
}

#[test]
fn every_command_has_help_with_an_example() {
    for command in [
        "demo",
        "vault init",
        "vault issue",
        "vault rotate-key",
        "agent run",
        "target run",
        "target resume-retention",
        "protect",
        "unprotect",
        "volumes",
        "status",
        "bookmark",
        "wait",
        "resync",
        "verify",
        "alarms",
        "doctor",
        "install-units",
        "system-generator",
        "groups",
        "group add",
        "group remove",
        "base attach",
        "base detach",
        "base list",
        "points",
        "hold add",
        "base attach",
        "base detach",
        "base list",
        "hold remove",
        "hold list",
        "view open",
        "view list",
        "view close",
        "restore",
        "policy show",
        "policy set",
        "journal dump",
        "journal verify",
        "bench",
    ] {
        let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let ran = run(Command::new(binary().expect("the binary")).args(&args)).expect("it ends");
        let text = ran.ok().expect(command);
        assert!(text.contains("Example:") && text.contains(&format!("farshore {command}")), "{command}: {text}");
    }
}
