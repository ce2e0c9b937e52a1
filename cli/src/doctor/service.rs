//! The agent as a service of this host: whether it runs, its unit, its state directory, its identity.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use farshore_link::identity::Identity;
use farshore_proto::text::show_time;
use farshore_proto::{Role, WallTime};

use super::finding::Finding;
use super::leftovers::Known;
use super::{Agent, Host};

pub(crate) const UNIT: &str = "farshore-agent.service";

/// Where systemd looks for units, the first wins.
const UNIT_FOLDERS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

const GENERATOR: &str = "farshore-generator";

/// Where systemd looks for generators.
const GENERATOR_FOLDERS: [&str; 5] = [
    "etc/systemd/system-generators",
    "run/systemd/system-generators",
    "usr/local/lib/systemd/system-generators",
    "usr/lib/systemd/system-generators",
    "lib/systemd/system-generators",
];

/// A certificate that expires within this time is a warning, as the agent's alarm is.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);

pub(super) fn check(host: &Host, agent: &Agent, known: &Known, identity: Option<&Path>) -> Vec<Finding> {
    let mut findings = vec![running(agent)];
    findings.extend(alarms(agent));
    findings.push(unit(host));
    findings.extend(generator(host));
    findings.push(state(known));
    findings.extend(identity.map(|path| self::identity(path, now())));
    findings
}

fn running(agent: &Agent) -> Finding {
    match agent {
        Agent::Answers { socket, volumes, .. } => {
            Finding::ok("agent", format!("answers at {}, protects {} volume(s)", socket.display(), volumes.len()))
        }
        Agent::Hangs { socket } => {
            let found = format!("does not answer at {}, though something listens there", socket.display());
            Finding::problem(
                "agent",
                found,
                "volumes make their guests wait, or are served by a process that nobody can reach",
            )
            .mend("look at its log (journalctl -u farshore-agent), then systemctl restart farshore-agent")
        }
        Agent::Silent { socket, reason } => {
            let found = format!("none answers at {}: {reason}", socket.display());
            Finding::warning(
                "agent",
                found,
                "nothing is shipped while no agent runs; volumes over ublk make their guests wait",
            )
            .mend("systemctl start farshore-agent")
        }
    }
}

/// What the running agent complains of.
fn alarms(agent: &Agent) -> Option<Finding> {
    let Agent::Answers { alarms, .. } = agent else { return None };
    let codes: Vec<String> = alarms.iter().filter_map(|alarm| Some(alarm["code"].as_str()?.to_owned())).collect();
    if codes.is_empty() {
        return Some(Finding::ok("agent.alarms", "none"));
    }
    let found = format!("{} open: {}", codes.len(), codes.join(", "));
    Some(
        Finding::warning("agent.alarms", found, "see each alarm's text")
            .mend("farshore alarms; docs/operations/alarms.md"),
    )
}

fn unit(host: &Host) -> Finding {
    let check = "service.unit";
    let file = UNIT_FOLDERS.iter().map(|folder| host.path(folder).join(UNIT)).find(|file| file.exists());
    match file {
        None if !host.path("run/systemd/system").exists() => Finding::ok(check, "this host is not run by systemd")
            .means("whatever starts the agent must do so before its volumes are mounted, and restart it when it ends"),
        None => {
            let means = "nobody starts the agent before its volumes are mounted, or restarts it when it ends";
            Finding::warning(check, "not installed", means).mend("farshore install-units")
        }
        Some(file) if is_enabled(host) => Finding::ok(check, format!("{}, enabled", file.display())),
        Some(file) => {
            let means = "the agent does not start at boot: what is written until somebody starts it has to be compared";
            Finding::warning(check, format!("{}, not enabled", file.display()), means)
                .mend(format!("systemctl enable {UNIT}"))
        }
    }
}

/// Without the generator a unit is of little use.
fn generator(host: &Host) -> Option<Finding> {
    let check = "service.generator";
    if !host.path("run/systemd/system").exists() {
        return None;
    }
    let file = GENERATOR_FOLDERS.iter().map(|folder| host.path(folder).join(GENERATOR)).find(|file| file.exists());
    Some(match file {
        Some(file) => Finding::ok(check, file.display().to_string()),
        None => {
            let means = "protected file systems are mounted before the agent runs, and compared after every boot";
            Finding::warning(check, "not installed", means).mend("farshore install-units")
        }
    })
}

/// Some target wants or requires the unit.
fn is_enabled(host: &Host) -> bool {
    let folders = UNIT_FOLDERS.iter().filter_map(|folder| std::fs::read_dir(host.path(folder)).ok());
    folders.flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        (name.ends_with(".wants") || name.ends_with(".requires")) && entry.path().join(UNIT).symlink_metadata().is_ok()
    })
}

fn state(known: &Known) -> Finding {
    let check = "state";
    let (folder, damaged) = match known {
        Known::Nowhere => {
            let means = "which devices wait for their agent is not known";
            return Finding::warning(check, "no state directory is known", means)
                .mend("name it with --state, or in /etc/farshore/agent.toml");
        }
        Known::Unreadable { folder, reason } => {
            let found = format!("{}: {reason}", folder.display());
            return Finding::warning(check, found, "which devices wait for their agent is not known")
                .mend("run this as root");
        }
        Known::Read { folder, damaged, .. } => (folder, damaged),
    };
    if let Some(reason) = damaged.first() {
        let means = "that group is not protected until it is mended";
        return Finding::problem(check, reason.clone(), means)
            .mend("move the file away: the group's volumes are protected anew");
    }
    let Ok(status) = std::fs::metadata(folder) else { return Finding::ok(check, folder.display().to_string()) };
    let mode = status.mode() & 0o7777;
    let found = format!("{}, mode {mode:o}, owner {}", folder.display(), status.uid());
    if mode & 0o022 != 0 {
        let means = "others can change what is protected, and make the agent believe that nothing has to be compared";
        return Finding::problem(check, found, means).mend(format!("chmod go-w {}", folder.display()));
    }
    Finding::ok(check, found)
}

fn identity(path: &Path, now: WallTime) -> Finding {
    let check = "identity";
    let mend = "farshore vault issue --role agent, install the bundle, restart the agent";
    match Identity::load_at(path, now) {
        Ok(identity) if identity.role != Role::Agent => {
            let found = format!("{} is of role {}", path.display(), identity.role);
            Finding::problem(check, found, "the agent refuses to start with it").mend(mend)
        }
        Ok(identity) => {
            let found = format!("{}, valid until {}", path.display(), show_time(identity.not_after));
            if identity.not_after.since(now) < EXPIRY_WARNING {
                return Finding::warning(check, found, "after that day the target refuses the agent").mend(mend);
            }
            Finding::ok(check, found)
        }
        Err(error) if is_denied(&error) => {
            Finding::warning(check, format!("{} cannot be read", path.display()), "nothing can be said of it")
                .mend("run this as root")
        }
        Err(error) => {
            Finding::problem(check, farshore_agent::chain(&error), "the agent does not start with it").mend(mend)
        }
    }
}

fn is_denied(error: &farshore_link::Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::PermissionDenied)
}

fn now() -> WallTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use farshore_link::identity::Vault;
    use farshore_proto::Name;

    use super::super::finding::Level;
    use super::*;

    #[test]
    fn a_unit_is_missing_installed_or_enabled() {
        let folder = tempfile::tempdir().expect("room");
        let host = Host::at(folder.path());
        assert!(unit(&host).found.contains("not run by systemd"));
        std::fs::create_dir_all(folder.path().join("run/systemd/system")).expect("room");
        assert_eq!(unit(&host).level, Level::Warning);
        let units = folder.path().join("etc/systemd/system");
        std::fs::create_dir_all(units.join("sysinit.target.wants")).expect("room");
        std::fs::write(units.join(UNIT), "").expect("room");
        assert!(unit(&host).found.contains("not enabled"));
        std::os::unix::fs::symlink(units.join(UNIT), units.join("sysinit.target.wants").join(UNIT)).expect("room");
        assert_eq!(unit(&host).level, Level::Ok);
        assert_eq!(generator(&host).expect("systemd runs").level, Level::Warning);
        let generators = folder.path().join("usr/lib/systemd/system-generators");
        std::fs::create_dir_all(&generators).expect("room");
        std::fs::write(generators.join(GENERATOR), "").expect("room");
        assert_eq!(generator(&host).expect("systemd runs").level, Level::Ok);
    }

    #[test]
    fn an_identity_expires_or_is_of_another_role() {
        let folder = tempfile::tempdir().expect("room");
        let now = now();
        let vault = Vault::in_memory(Name::new("v").expect("good"), now).expect("a vault");
        let written = |role, days| {
            let path = folder.path().join(format!("{role}-{days}"));
            let bundle = vault.issue_at(role, Name::new("h").expect("good"), days, now).expect("issued");
            bundle.write(&path).expect("room");
            path
        };
        assert_eq!(identity(&written(Role::Agent, 365), now).level, Level::Ok);
        assert_eq!(identity(&written(Role::Agent, 10), now).level, Level::Warning);
        assert_eq!(identity(&written(Role::Target, 365), now).level, Level::Problem);
        assert_eq!(identity(&folder.path().join("none"), now).level, Level::Problem);
    }
}
