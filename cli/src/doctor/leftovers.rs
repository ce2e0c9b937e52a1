//! What crashes have left in the kernel, whose it is, and how it is taken away.
//!
//! A device whose server is gone may be a leftover, or an agent's that comes back in a moment. The kernel cannot tell; the agent's
//! admin socket and its state directory can. What an agent serves, or may come back to, is never touched on a guess.

use std::path::{Path, PathBuf};

use farshore_agent::state;
use farshore_proto::Name;
use farshore_ublk::dm::{Interposer, Leftover, LeftoverKind};
use farshore_ublk::{Control, DeviceInfo, DeviceState, Error, ErrorKind};

use super::Agent;
use super::finding::Finding;

/// What a state directory says of devices.
pub(super) enum Known {
    /// No state directory is known.
    Nowhere,
    /// It cannot be read.
    Unreadable { folder: PathBuf, reason: String },
    /// What it says, and what is wrong with it.
    Read { folder: PathBuf, devices: Vec<Device>, damaged: Vec<String> },
}

/// A ublk device that the kernel has and that is an agent's.
pub(super) struct Device {
    /// `GROUP/VOLUME`.
    label: String,
    id: u32,
}

impl Known {
    /// Reads `folder`, if there is one to read.
    pub(super) fn read(folder: Option<&Path>) -> Self {
        let Some(folder) = folder else { return Self::Nowhere };
        let folder = folder.to_owned();
        let groups = match state::look(&folder) {
            Ok(groups) => groups,
            Err(error) => return Self::Unreadable { folder, reason: farshore_agent::chain(&error) },
        };
        let (mut devices, mut damaged) = (Vec::new(), Vec::new());
        for (group, state) in groups {
            match state {
                Ok(state) => devices.extend(state.volumes.iter().filter_map(|volume| {
                    let disk = volume.ublk.as_ref().filter(|disk| is_there(disk))?;
                    Some(Device { label: format!("{group}/{}", volume.name), id: disk.id })
                })),
                Err(error) => damaged.push(farshore_agent::chain(&error)),
            }
        }
        Self::Read { folder, devices, damaged }
    }

    /// Notes in the state directory that a device's volume is written past its agent.
    fn note_bypassed(&self, id: Option<u32>) -> farshore_agent::Result<()> {
        match (self, self.owner(id)) {
            (Self::Read { folder, .. }, Owner::Agent(label)) => {
                let group = label.split_once('/').map_or(label, |(group, _)| group);
                state::note_bypassed(folder, &Name::new(group)?)
            }
            _ => Ok(()),
        }
    }

    /// Whose a ublk device is.
    fn owner(&self, id: Option<u32>) -> Owner<'_> {
        match (self, id) {
            (Self::Read { devices, damaged, .. }, Some(id)) => match devices.iter().find(|device| device.id == id) {
                Some(device) => Owner::Agent(&device.label),
                None if damaged.is_empty() => Owner::Nobody,
                None => Owner::Unknown,
            },
            (Self::Read { .. }, None) => Owner::Nobody,
            (Self::Nowhere | Self::Unreadable { .. }, _) => Owner::Unknown,
        }
    }
}

/// The very device that was noted, not another one of its number.
fn is_there(disk: &state::UblkDisk) -> bool {
    let read = |path: &str| Some(std::fs::read_to_string(path).ok()?.trim().to_owned());
    let sequence = read(&format!("/sys/block/ublkb{}/diskseq", disk.id)).and_then(|text| text.parse::<u64>().ok());
    disk.sequence.is_some()
        && sequence == disk.sequence
        && read("/proc/sys/kernel/random/boot_id").is_some_and(|boot| boot == disk.boot)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owner<'a> {
    /// A volume of the agent with this state directory.
    Agent(&'a str),
    Nobody,
    Unknown,
}

/// What may be done about a leftover.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Repair,
    /// Why not, and the way out.
    Leave(String, &'static str),
}

const START: &str =
    "start its agent (systemctl start farshore-agent); if it will never come back: farshore doctor --repair --abandon";
const RESTART: &str = "see `farshore alarms`, then restart the agent; `farshore unprotect` gives a volume up in order";

/// Whether something whose server is gone may be taken apart.
fn verdict(owner: Owner<'_>, agent: &Agent, abandon: bool) -> Verdict {
    let alive = !matches!(agent, Agent::Silent { .. });
    match owner {
        Owner::Nobody => Verdict::Repair,
        Owner::Agent(label) if alive => Verdict::Leave(format!("is of volume {label}, whose agent runs"), RESTART),
        Owner::Unknown if alive => Verdict::Leave(
            "may be the running agent's, whose state directory is not known".into(),
            "name it with --state",
        ),
        Owner::Agent(_) | Owner::Unknown if abandon => Verdict::Repair,
        Owner::Agent(label) => Verdict::Leave(format!("waits for the agent of volume {label}"), START),
        Owner::Unknown => Verdict::Leave(
            "may wait for an agent, whose state directory is not known".into(),
            "name the state directory with --state, or give up on that agent with --abandon",
        ),
    }
}

/// Everything that is left, as the kernel shows it.
pub(super) struct Found {
    mapped: Result<Vec<Leftover>, Error>,
    stale: Vec<DeviceInfo>,
    /// Their servers are gone, and no leftover of the device mapper names them.
    waiting: Vec<DeviceInfo>,
    ublk: Option<Error>,
}

impl Found {
    /// Looks only.
    pub(super) fn look() -> Self {
        let mapped = Interposer::open().and_then(|interposer| interposer.leftovers());
        let (devices, ublk) = match Control::open().and_then(|control| control.list()) {
            Ok(devices) => (devices, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let ids: Vec<u32> = mapped.iter().flatten().filter_map(ublk_id).collect();
        let (stale, rest): (Vec<_>, Vec<_>) = devices.into_iter().partition(DeviceInfo::is_stale);
        let is_waiting = |info: &DeviceInfo| {
            matches!(info.state(), DeviceState::Quiesced | DeviceState::FailIo) && !ids.contains(&info.id())
        };
        Self { mapped, stale, waiting: rest.into_iter().filter(is_waiting).collect(), ublk }
    }

    /// What to say of it.
    pub(super) fn findings(&self, known: &Known, agent: &Agent) -> Vec<Finding> {
        let mut findings = Vec::new();
        match &self.mapped {
            Ok(leftovers) if leftovers.is_empty() => findings.push(Finding::ok("leftovers.dm", "none")),
            Ok(leftovers) => {
                findings.extend(leftovers.iter().map(|leftover| mapped_finding(leftover, known, agent)));
            }
            Err(error) => findings.push(unseen("leftovers.dm", error)),
        }
        if let Some(error) = &self.ublk {
            findings.push(unseen("leftovers.ublk", error));
        } else if self.stale.is_empty() && self.waiting.is_empty() {
            findings.push(Finding::ok("leftovers.ublk", "none"));
        }
        for info in &self.stale {
            let found = format!("ublk device {} has neither disk nor server", info.id());
            let means = "its number is taken; nothing else";
            findings.push(Finding::warning("leftovers.ublk", found, means).mend("farshore doctor --repair"));
        }
        findings.extend(self.waiting.iter().map(|info| waiting_finding(info, known, agent)));
        findings
    }
}

fn ublk_id(leftover: &Leftover) -> Option<u32> {
    let device = leftover.through?;
    let folder = std::fs::canonicalize(format!("/sys/dev/block/{device}")).ok()?;
    folder.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()
}

fn mapped_finding(leftover: &Leftover, known: &Known, agent: &Agent) -> Finding {
    let means = match leftover.kind {
        LeftoverKind::Suspended => "whatever uses the device hangs",
        LeftoverKind::DeadServer => "whatever uses the device waits, or gets I/O errors",
        LeftoverKind::Unused => "nothing goes through it; it is in the way of the next attach",
        _ => "an attach or a detach broke off",
    };
    let description = &leftover.description;
    match verdict(known.owner(ublk_id(leftover)), agent, false) {
        Verdict::Repair => Finding::problem("leftovers.dm", description, means).mend("farshore doctor --repair"),
        Verdict::Leave(reason, way_out) => {
            Finding::problem("leftovers.dm", format!("{description}; {reason}"), means).mend(way_out)
        }
    }
}

fn waiting_finding(info: &DeviceInfo, known: &Known, agent: &Agent) -> Finding {
    let path = info.block_path();
    let shown = path.display();
    match known.owner(Some(info.id())) {
        Owner::Agent(label) => {
            let way_out = match agent {
                Agent::Silent { .. } => "systemctl start farshore-agent",
                Agent::Answers { .. } | Agent::Hangs { .. } => RESTART,
            };
            let found = format!("{shown}, of volume {label}, waits for its agent");
            Finding::problem("leftovers.ublk", found, "whatever uses the device waits").mend(way_out)
        }
        Owner::Nobody | Owner::Unknown => {
            let server = info.server_pid().map(|pid| format!(", process {pid}")).unwrap_or_default();
            let found = format!("{shown} waits for its server{server}, which is gone");
            let means = "whatever uses the device waits; --repair leaves it alone, for it is not known to be ours";
            Finding::warning("leftovers.ublk", found, means).mend("start the program again that served it")
        }
    }
}

/// What cannot be looked at.
fn unseen(check: &'static str, error: &Error) -> Finding {
    let reason = farshore_agent::chain(error);
    if error.kind() == ErrorKind::NoDriver {
        return Finding::ok(check, "none: the driver is not there");
    }
    let is_denied = error.kind() == ErrorKind::Permission;
    let mend = if is_denied { "run this as root" } else { "try again in a moment" };
    Finding::warning(check, reason, "what crashes have left is not known").mend(mend)
}

/// What a repair did.
#[derive(Default)]
pub(super) struct Repaired {
    /// For people, in order.
    pub(super) done: Vec<String>,
    /// Left alone, with the reason and the way out.
    pub(super) left: Vec<(String, &'static str)>,
    /// Tried in vain.
    pub(super) failed: Vec<String>,
}

/// Mends what is safe.
pub(super) fn repair(known: &Known, agent: &Agent, abandon: bool) -> Repaired {
    let mut repaired = Repaired::default();
    let found = Found::look();
    match &found.mapped {
        Ok(leftovers) if leftovers.is_empty() => {}
        Ok(leftovers) => match Interposer::open() {
            Ok(interposer) => {
                for leftover in leftovers {
                    repair_mapped(&interposer, leftover, (known, agent, abandon), &mut repaired);
                }
            }
            Err(error) => repaired.failed.push(farshore_agent::chain(&error)),
        },
        Err(error) if error.kind() == ErrorKind::NoDriver => {}
        Err(error) => repaired.failed.push(farshore_agent::chain(error)),
    }
    for info in &found.waiting {
        if let Owner::Agent(label) = known.owner(Some(info.id())) {
            let shown = info.block_path();
            let what = format!("{} waits for the agent of volume {label}", shown.display());
            repaired
                .left
                .push((what, "start that agent; if the volume is to be given up, `farshore unprotect` it there"));
        }
    }
    let Ok(control) = Control::open() else { return repaired };
    for id in found.stale.iter().map(DeviceInfo::id) {
        // It may have got a server meanwhile, or have gone with the device below it.
        if !control.info(id).is_ok_and(|info| info.is_stale()) {
            continue;
        }
        match control.delete(id) {
            Ok(()) => repaired.done.push(format!("removed ublk device {id}, which had neither disk nor server")),
            Err(error) => repaired.failed.push(farshore_agent::chain(&error)),
        }
    }
    repaired
}

fn repair_mapped(
    interposer: &Interposer,
    leftover: &Leftover,
    (known, agent, abandon): (&Known, &Agent, bool),
    repaired: &mut Repaired,
) {
    if let Verdict::Leave(reason, way_out) = verdict(known.owner(ublk_id(leftover)), agent, abandon) {
        repaired.left.push((format!("{}; {reason}", leftover.description), way_out));
        return;
    }
    // Its next agent must know, also if the host goes down before it is started.
    if let Err(error) = known.note_bypassed(ublk_id(leftover)) {
        repaired.failed.push(format!("{} is left alone: {}", leftover.description, farshore_agent::chain(&error)));
        return;
    }
    match interposer.repair(leftover) {
        Ok(one) => {
            repaired.done.extend(one.done);
            if one.detached {
                repaired
                    .done
                    .push("that volume is written without Farshore now; its next agent compares everything".into());
            }
        }
        // Another repair was faster.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => repaired.failed.push(farshore_agent::chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Agent {
        Agent::Silent { socket: "/s".into(), reason: "r".into() }
    }

    /// Goal: nothing that an agent serves, or may come back to, is taken apart unless an operator says so; and never while it runs.
    #[test]
    fn what_an_agent_may_come_back_to_is_left_alone() {
        let answers = Agent::Answers { socket: "/s".into(), volumes: Vec::new(), alarms: Vec::new() };
        let hangs = Agent::Hangs { socket: "/s".into() };
        let ours = Owner::Agent("g/v");
        for agent in [&answers, &hangs] {
            for abandon in [false, true] {
                assert_eq!(verdict(Owner::Nobody, agent, abandon), Verdict::Repair);
                assert!(matches!(verdict(ours, agent, abandon), Verdict::Leave(reason, _) if reason.contains("g/v")));
                assert!(
                    matches!(verdict(Owner::Unknown, agent, abandon), Verdict::Leave(_, way) if way.contains("--state"))
                );
            }
        }
        assert_eq!(verdict(Owner::Nobody, &silent(), false), Verdict::Repair);
        for owner in [ours, Owner::Unknown] {
            assert!(matches!(verdict(owner, &silent(), false), Verdict::Leave(_, way) if way.contains("--abandon")));
            assert_eq!(verdict(owner, &silent(), true), Verdict::Repair);
        }
    }

    /// Goal: a device is known by number, and not knowing is not the same as nobody's.
    #[test]
    fn the_state_directory_says_whose_a_device_is() {
        let read = |damaged: Vec<String>| Known::Read {
            folder: "/f".into(),
            devices: vec![Device { label: "g/v".into(), id: 1000 }],
            damaged,
        };
        assert_eq!(read(Vec::new()).owner(Some(1000)), Owner::Agent("g/v"));
        assert_eq!(read(Vec::new()).owner(Some(1001)), Owner::Nobody);
        assert_eq!(read(Vec::new()).owner(None), Owner::Nobody);
        assert_eq!(read(vec!["h".into()]).owner(Some(1001)), Owner::Unknown);
        assert_eq!(Known::Nowhere.owner(Some(1000)), Owner::Unknown);
        let folder = tempfile::tempdir().expect("room");
        assert!(matches!(Known::read(Some(&folder.path().join("none"))), Known::Unreadable { .. }));
    }
}
