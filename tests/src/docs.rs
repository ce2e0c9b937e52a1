//! Pages that are made of tables in the code. A test says when one is stale; with `FARSHORE_WRITE_DOCS=1` it writes it:
//!
//! ```text
//! FARSHORE_WRITE_DOCS=1 cargo test -p farshore-tests --lib docs
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use farshore_blkfilter::BACKING_ERRORS;
use farshore_proto::states::MachineDoc;
use farshore_target::{DISK_ERRORS, Kind};
use farshore_uring::{TROUBLES, Trouble, guest_errno};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's folder").to_owned()
}

/// Compares the page with `text`, or writes it.
fn check(page: &str, text: &str) {
    let path = root().join(page);
    if std::env::var_os("FARSHORE_WRITE_DOCS").is_some() {
        std::fs::write(&path, text).expect("the page can be written");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "{page} is not what the code says: FARSHORE_WRITE_DOCS=1 cargo test -p farshore-tests --lib docs"
    );
}

/// A machine's tables as rows.
struct Machine {
    name: String,
    file: String,
    owner: String,
    rows: Vec<[String; 3]>,
}

impl From<&MachineDoc> for Machine {
    fn from(doc: &MachineDoc) -> Self {
        let row = |state: &farshore_proto::states::StateDoc| {
            [state.state.to_owned(), state.limit.to_string(), state.exit.to_owned()]
        };
        Self {
            name: doc.machine.to_owned(),
            file: doc.file.to_owned(),
            owner: doc.owner.to_owned(),
            rows: doc.states.iter().map(row).collect(),
        }
    }
}

impl Machine {
    /// Of a crate that does not know the tables' type.
    fn plain(name: &str, file: &str, owner: &str, rows: &[[&str; 3]]) -> Self {
        let rows = rows.iter().map(|row| row.map(str::to_owned)).collect();
        Self { name: name.into(), file: file.into(), owner: owner.into(), rows }
    }
}

fn machines() -> Vec<Machine> {
    let of = |docs: &[MachineDoc]| docs.iter().map(Machine::from).collect::<Vec<_>>();
    let plain = Machine::plain;
    let mut all = vec![
        plain(
            "a connection of an NBD client",
            "nbd/src/conn.rs",
            "`Conn`, its worker's thread",
            &farshore_nbd::CONNECTION_STATES,
        ),
        plain(
            "a ublk device",
            "ublk/src/info.rs",
            "the kernel's driver; the supervisor and its worker order the changes",
            &farshore_ublk::DEVICE_STATES,
        ),
        plain(
            "an attach or detach below a device-mapper device",
            "ublk/src/dm/attach.rs",
            "`Interposer`, the thread that asked for it, under a lock for each upper",
            &farshore_ublk::dm::STEPS,
        ),
        plain(
            "a cell of the ring",
            "ring/src/layout.rs",
            "the queue that reserved it; from its ticket on the stream's thread",
            &farshore_ring::CELL_STATES,
        ),
    ];
    all.extend(of(farshore_blkfilter::MACHINES));
    all.extend(of(farshore_streamer::MACHINES));
    all.extend(of(farshore_proto::session::MACHINES));
    all.extend(of(&[farshore_link::quic::MACHINE]));
    all.extend(of(farshore_agent::MACHINES));
    all.extend(of(farshore_target::MACHINES));
    all
}

fn states_page() -> String {
    let mut page = String::from(
        "# States\n\n\
         Every machine with its states: who alone changes them, how long one may last, what ends it. *At rest*: nothing is under way, and\n\
         nobody waits. Guests wait for none of these longer than `stall_max` (50 ms), but for their own disk and for each other's writes\n\
         to the same range; SPEC.md says which tests show that.\n\n\
         Made of the tables beside the types by `FARSHORE_WRITE_DOCS=1 cargo test -p farshore-tests --lib docs`; a test fails when it is\n\
         stale. A state that is added to one of these types without a row does not compile.\n",
    );
    for machine in machines() {
        let Machine { name, file, owner, rows } = machine;
        let _ = write!(page, "\n## {name}\n\n`{file}`. Owner: {owner}.\n\n| state | limit | exit |\n|---|---|---|\n");
        for [state, limit, exit] in rows {
            let _ = writeln!(page, "| {state} | {limit} | {exit} |");
        }
    }
    page
}

/// Goal: the page of states is what the code says.
#[test]
fn states() {
    check("docs/states.md", &states_page());
}

fn errno_page() -> String {
    let mut page = String::from(
        "# Errors of disks\n\n\
         What an error number of a disk means, and what is done about it at either site. The first table is `uring/src/trouble.rs`, which\n\
         classifies for both; what is not in it counts as *failed*.\n\n\
         | number | means | a guest hears | at the target |\n|---|---|---|---|\n",
    );
    for (number, name, trouble) in TROUBLES {
        let heard = guest_errno(&std::io::Error::from_raw_os_error(number)).0;
        let heard = TROUBLES.iter().find(|(known, ..)| *known == heard).map_or("EIO", |(_, name, _)| *name);
        let passes = matches!(Kind::of(trouble), Kind::NoSpace | Kind::NoResources);
        let at_target = if passes { "passes" } else { "does not pass" };
        let _ = writeln!(page, "| `{name}` | {} | `{heard}` | {at_target} |", meaning(trouble));
    }
    page.push_str(
        "\n## At the source\n\n\
         Errors of a protected volume's own disk. No trouble of ours is among them: state directory, activity log and ring have alarms\n\
         of their own and fail no guest's request.\n\n\
         | what fails | the guest gets | protection | tried again by | a person hears by |\n|---|---|---|---|---|\n",
    );
    for [what, guest, protection, again, alarm] in BACKING_ERRORS {
        let _ = writeln!(page, "| {what} | {guest} | {protection} | {again} | {alarm} |");
    }
    page.push_str(
        "\n## At the target\n\n| where | an error that passes | any other | a person hears by |\n|---|---|---|---|\n",
    );
    for [place, passes, other, alarm] in DISK_ERRORS {
        let _ = writeln!(page, "| {place} | {passes} | {other} | {alarm} |");
    }
    page.push_str(
        "\n## The agent's own files\n\n\
         | what | any error | a person hears by |\n|---|---|---|\n\
         | state directory | what was to be recorded is tried again every second, and what waits for it (a join, a new incarnation, \"compare everything\") waits; guests go on | `state.failed` |\n\
         | activity log | all of it is written anew every second; guests wait for it no longer than `stall_max`; after a crash of the host everything is compared | `activity-log.failed`, `activity-log.uncovered` |\n\
         | the ring's memory | taken whole at the start, which fails where there is not enough | the start's message |\n\n\
         Made of tables in the code, as [states.md](states.md).\n",
    );
    page
}

fn meaning(trouble: Trouble) -> &'static str {
    match trouble {
        Trouble::Full => "no space",
        Trouble::Short => "the system lends no more",
        Trouble::Again => "not now",
        Trouble::ReadOnly => "no writes any more",
        Trouble::Gone => "the device is gone, or the way to it",
        Trouble::Failed => "failed: what was given or asked for may be lost",
        Trouble::Unsupported => "not known to it: another way is taken where there is one",
        Trouble::Misused => "makes no sense to it",
    }
}

/// Goal: the page of errors is what the code does.
#[test]
fn errors() {
    check("docs/errno.md", &errno_page());
}

/// Goal: no machine is left out of the page, and no file that it names is gone. Method: every enum in the sources whose name says that it
/// is a state stands in a file that the page names, or in the list below with the reason.
#[test]
fn every_machine_is_there() {
    // Type's name by file. No machine, or one that another stands for.
    const OTHERS: [(&str, &str); 8] = [
        // Chosen once: how a file is opened, how a volume is served.
        ("uring/src/storage.rs", "OpenMode"),
        ("blkfilter/src/volume.rs", "Mode"),
        // An answer: what comes next.
        ("blkfilter/src/zeroing.rs", "Step"),
        // Simulation.
        ("uring/src/sim/io.rs", "Stage"),
        // Within one operation of the kernel.
        ("uring/src/reactor/ops.rs", "Step"),
        // Shown as the phase of the machine in `conn.rs`, of which it is the summary; and the parts of its handshake, which share one limit.
        ("nbd/src/stats.rs", "ConnectionState"),
        ("nbd/src/haggle.rs", "State"),
        // The page has its summary, `Phase`, which matches on it.
        ("streamer/src/machine/mod.rs", "Mode"),
    ];
    let named: Vec<String> = machines().into_iter().map(|machine| machine.file).collect();
    for file in &named {
        assert!(root().join(file).is_file(), "{file} is not there");
    }
    let mut files = Vec::new();
    for of in ["proto", "ring", "uring", "link", "blkfilter", "ublk", "nbd", "streamer", "target", "agent"] {
        sources(&root().join(of).join("src"), &mut files);
    }
    assert!(files.len() > 100, "the sources are there");
    let mut seen = 0;
    for path in files {
        let text = std::fs::read_to_string(&path).expect("a source");
        let file = path.strip_prefix(root()).expect("below the root").to_str().expect("ASCII").to_owned();
        for line in text.lines().map(str::trim_start) {
            let Some((_, rest)) =
                line.split_once("enum ").filter(|(before, _)| before.is_empty() || before.starts_with("pub"))
            else {
                continue;
            };
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric()).collect();
            if !["State", "Stage", "Phase", "Mode", "Step"].iter().any(|end| name.ends_with(end)) {
                continue;
            }
            seen += 1;
            let excused = OTHERS.contains(&(file.as_str(), name.as_str()));
            assert!(
                excused || named.contains(&file),
                "{file}: {name} has no rows in docs/states.md, and no excuse in tests/src/docs.rs"
            );
        }
    }
    assert!(seen > 15, "only {seen} enums were looked at");
}

/// Goal: each alarm has its section, in the place that the list of alarms leads to, and no section is of an alarm that is gone. Method: the codes are
/// read from the two sources that define them.
#[test]
fn every_alarm_has_its_section() {
    let text = |path: &str| std::fs::read_to_string(root().join(path)).expect("it is there");
    let mut codes: Vec<String> = Vec::new();
    for (file, before) in [("agent/src/alarms.rs", ": &str = \""), ("target/src/alarm.rs", "=> \"")] {
        let source = text(file);
        let of = source.lines().filter_map(|line| Some(line.split_once(before)?.1.split_once('"')?.0.to_owned()));
        let found: Vec<String> = of.filter(|code| code.contains('.')).collect();
        assert!(found.len() > 10, "{file} defines alarms");
        codes.extend(found);
    }
    let list = text("docs/operations/alarms.md");
    let sections: Vec<&str> = list.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    for code in &codes {
        assert!(list.contains(&format!("| [`{code}`](#{}) |", code.replace('.', ""))), "{code} is not in the list");
        let Some((_, body)) = list.split_once(&format!("\n### {code}\n\n")) else { panic!("{code} has no section") };
        let body = body.split("\n#").next().expect("a section");
        match body.strip_prefix("See [").and_then(|rest| rest.split_once("](")?.1.split_once('#')) {
            Some((page, _)) => {
                let page = text(&format!("docs/operations/{page}"));
                assert!(
                    page.contains(&format!("\n### {code}\n")) || page.contains(&format!("\n## {code}\n")),
                    "{code}"
                );
            }
            None => assert!(
                body.contains("Clears") || body.contains("clears") || body.contains("restart"),
                "{code}: its end"
            ),
        }
    }
    for section in sections {
        assert!(codes.iter().any(|code| code == section), "no alarm is called {section}");
    }
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push(path);
        }
    }
}
