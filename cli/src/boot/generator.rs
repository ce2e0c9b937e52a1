//! `farshore system-generator`: run by systemd before it loads units, so that what is mounted over a protected volume waits for the
//! agent, and the agent for its devices.
//!
//! Reads the agent's configuration and state directory, fstab, crypttab and mount units; nothing runs yet, no device needs to be
//! there. Where it cannot tell whether a file system lies on a protected volume (a UUID of a device that has not appeared, a state
//! directory on a file system that is not mounted yet), it makes the file system wait: that costs a moment, the opposite a compare.
//!
//! What waits *wants* the agent and comes *after* it, and does not *require* it: a file system that required it would be unmounted
//! with every restart of the agent, and could not be mounted when the agent fails (I1).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use farshore_agent::config::AgentFile;
use farshore_agent::state;

use super::tables::{Entry, crypttab, escaped, escaped_path, fstab, mount_unit, node, twin};
use crate::args::SystemGenerator;
use crate::doctor::{STATE, UNIT};

/// Where the agent's configuration is; without one there is nothing to do.
const CONFIG: &str = "etc/farshore/agent.toml";

/// Name of each drop-in.
const DROP_IN: &str = "50-farshore.conf";

/// Writes drop-ins below the first of the folders that systemd names.
pub(crate) fn run(args: &SystemGenerator) -> Result<()> {
    let Some(input) = Input::read(&args.root)? else { return Ok(()) };
    for (unit, text) in input.drop_ins() {
        let folder = args.normal.join(format!("{unit}.d"));
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let file = folder.join(DROP_IN);
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// A protected volume.
#[derive(Debug, Default)]
struct Volume {
    /// `GROUP/VOLUME`.
    label: String,
    /// Nodes by which its file system may be mounted.
    nodes: BTreeSet<String>,
    /// What the agent opens: a device, or an image file.
    source: PathBuf,
}

/// What decides.
struct Input {
    /// None: the state directory cannot be read yet.
    volumes: Option<Vec<Volume>>,
    /// Files and folders without which the agent does not start.
    own: Vec<PathBuf>,
    mounts: Vec<Entry>,
    crypttab: Vec<(String, String)>,
    /// Links of nodes that are there already (on a running system), to what they lead to.
    links: BTreeMap<String, String>,
}

/// Whether a node is a protected volume.
#[derive(Debug, PartialEq, Eq)]
enum Match {
    No,
    /// It cannot be told yet.
    Maybe,
    /// Of this volume.
    Yes(String),
}

impl Input {
    /// Of the system below `root`; none: there is no agent on it.
    fn read(root: &Path) -> Result<Option<Self>> {
        let config = root.join(CONFIG);
        if !config.exists() {
            return Ok(None);
        }
        let file = AgentFile::read(&config)?;
        let folder = file.state.unwrap_or_else(|| STATE.into());
        let volumes = match state::look(&below(root, &folder)) {
            Ok(groups) => groups.into_iter().map(|(name, group)| Some((name, group.ok()?))).collect::<Option<Vec<_>>>(),
            Err(_) => None,
        };
        let volumes = volumes.map(|groups| {
            let of = |(group, state): (farshore_proto::Name, state::GroupState)| {
                state.volumes.into_iter().map(move |volume| Volume::of(&format!("{group}/{}", volume.name), &volume))
            };
            groups.into_iter().flat_map(of).collect::<Vec<_>>()
        });
        let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
        let mut mounts = fstab(&read("etc/fstab"));
        mounts.extend(mount_units(&root.join("etc/systemd/system")));
        let own = [
            Some(folder),
            file.identity,
            Some("/etc/farshore".into()),
            std::env::current_exe().ok(),
            file.ring_dir,
            file.activity_log,
            file.log,
        ];
        let own = own.into_iter().flatten().collect();
        let mut input =
            Self { volumes, own, mounts, crypttab: crypttab(&read("etc/crypttab")), links: BTreeMap::new() };
        let nodes: BTreeSet<String> = input.all_nodes();
        input.links = nodes.into_iter().filter_map(|node| Some((node.clone(), leads_to(root, &node)?))).collect();
        Ok(Some(input))
    }

    fn all_nodes(&self) -> BTreeSet<String> {
        let mounted = self.mounts.iter().filter_map(|entry| node(&entry.device));
        let opened = self.crypttab.iter().filter_map(|(_, device)| node(device));
        let volumes = self.volumes.iter().flatten().flat_map(|volume| volume.nodes.iter().cloned());
        mounted.chain(opened).chain(volumes).collect()
    }

    /// Units, and the text of the drop-in of each.
    fn drop_ins(&self) -> BTreeMap<String, String> {
        let mut drop_ins = BTreeMap::from([(UNIT.to_owned(), self.agent())]);
        for entry in self.mounts.iter().filter(|entry| !self.is_needed(entry)) {
            let Some(node) = node(&entry.device) else { continue };
            let Some(text) = waiting(&self.is_protected(&node)) else { continue };
            // What checks the file system writes to it.
            let check = format!("systemd-fsck@{}.service", escaped_path(Path::new(&node)));
            drop_ins.insert(check, text.clone());
            drop_ins.insert(entry.unit.clone(), text);
        }
        for (name, device) in &self.crypttab {
            let Some(found) = node(device).map(|node| self.is_protected(&node)) else { continue };
            // On a guess this could make the agent's own file systems wait for it.
            if let (Match::Yes(_), Some(text)) = (&found, waiting(&found)) {
                drop_ins.insert(format!("systemd-cryptsetup@{}.service", escaped(name)), text);
            }
        }
        drop_ins
    }

    /// The agent waits for its own files, and a while for its devices.
    fn agent(&self) -> String {
        let mut text = "# Made by farshore-generator at boot.\n[Unit]\n".to_owned();
        for path in &self.own {
            text += &format!("RequiresMountsFor={}\n", quoted(path));
        }
        let mut units = BTreeSet::new();
        for volume in self.volumes.iter().flatten() {
            if volume.source.starts_with("/dev") {
                units.insert(format!("{}.device", escaped_path(&volume.source)));
            } else if let Some(deepest) =
                self.below(volume).into_iter().max_by_key(|entry| entry.point.components().count())
            {
                units.insert(deepest.unit.clone());
            }
        }
        for unit in units {
            text += &format!("Wants={unit}\nAfter={unit}\n");
        }
        text
    }

    /// The agent waits for this mount, so it cannot wait for the agent.
    fn is_needed(&self, entry: &Entry) -> bool {
        let below_image = |volume: &Volume| self.below(volume).iter().any(|below| below.unit == entry.unit);
        matches!(entry.point.to_str(), Some("/" | "/usr"))
            || self.own.iter().any(|path| path.starts_with(&entry.point))
            || self.volumes.iter().flatten().any(below_image)
    }

    /// The mounts that have to be there before the agent finds this volume's image file. None where one of them lies on a protected
    /// volume, and waits for the agent: such an image is not found at boot.
    fn below(&self, volume: &Volume) -> Vec<&Entry> {
        if volume.source.starts_with("/dev") {
            return Vec::new();
        }
        let below: Vec<_> = self.mounts.iter().filter(|entry| volume.source.starts_with(&entry.point)).collect();
        let is_protected =
            |entry: &&Entry| node(&entry.device).is_some_and(|node| matches!(self.is_protected(&node), Match::Yes(_)));
        if below.iter().any(is_protected) { Vec::new() } else { below }
    }

    fn is_protected(&self, node: &str) -> Match {
        let Some(volumes) = &self.volumes else { return Match::Maybe };
        let same = |known: &String| known == node || twin(known).as_deref() == Some(node);
        let real = self.links.get(node);
        let is = |known: &String| same(known) || real.is_some_and(|real| self.links.get(known) == Some(real));
        if let Some(volume) = volumes.iter().find(|volume| volume.nodes.iter().any(is)) {
            return Match::Yes(volume.label.clone());
        }
        let unknown = |node: &str| is_indirect(node) && !self.links.contains_key(node);
        let vague = volumes.iter().flat_map(|volume| &volume.nodes).any(|known| unknown(known));
        let devices = volumes.iter().any(|volume| !volume.nodes.is_empty());
        if devices && (unknown(node) || vague) { Match::Maybe } else { Match::No }
    }
}

impl Volume {
    fn of(label: &str, volume: &state::VolumeState) -> Self {
        let mut nodes = BTreeSet::new();
        if volume.source.starts_with("/dev") {
            nodes.insert(volume.source.display().to_string());
        }
        if let Some(mapped) = &volume.mapped {
            // What is mounted; of a bare disk that is a stub and not the source.
            nodes.insert(mapped.upper.display().to_string());
        }
        if let Some(disk) = &volume.ublk {
            nodes.insert(format!("/dev/ublkb{}", disk.id));
        }
        Self { label: label.to_owned(), nodes, source: volume.source.clone() }
    }
}

/// The drop-in of a unit that waits for the agent.
fn waiting(found: &Match) -> Option<String> {
    let why = match found {
        Match::No => return None,
        Match::Maybe => "this may be a protected volume".to_owned(),
        Match::Yes(label) => format!("this is volume {label}"),
    };
    Some(format!("# Made by farshore-generator at boot: {why}.\n[Unit]\nWants={UNIT}\nAfter={UNIT}\n"))
}

/// A link of udev's: which device it leads to is known when that has appeared.
fn is_indirect(node: &str) -> bool {
    ["/dev/disk/", "/dev/dm-", "/dev/block/"].iter().any(|start| node.starts_with(start))
}

fn leads_to(root: &Path, node: &str) -> Option<String> {
    let real = std::fs::canonicalize(below(root, Path::new(node))).ok()?;
    Some(real.display().to_string())
}

fn mount_units(folder: &Path) -> Vec<Entry> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".mount")
            && let Ok(text) = std::fs::read_to_string(entry.path())
        {
            found.extend(mount_unit(&name, &text));
        }
    }
    found
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// A path as one word of a unit file.
fn quoted(path: &Path) -> String {
    path.display().to_string().replace('%', "%%").replace(' ', "\\x20")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(label: &str, source: &str, ublk: Option<u32>) -> Volume {
        let mut nodes = BTreeSet::new();
        if source.starts_with("/dev") {
            nodes.insert(source.to_owned());
        }
        nodes.extend(ublk.map(|id| format!("/dev/ublkb{id}")));
        Volume { label: label.to_owned(), nodes, source: source.into() }
    }

    fn input(volumes: Option<Vec<Volume>>) -> Input {
        let table = "UUID=root / ext4 rw 0 1\n/dev/vg/var /var ext4 rw 0 2\n/dev/vg/data /srv/data xfs rw 0 2\n\
                     UUID=other /srv/other ext4 rw 0 2\n/dev/ublkb3 /srv/three ext4 rw 0 2\n/dev/sdz1 /srv/z ext4 rw 0 0\n\
                     /dev/vg/swap none swap sw 0 0\nhost:/x /net nfs ro 0 0\ntmpfs /tmp tmpfs rw 0 0\n";
        Input {
            volumes,
            own: vec!["/var/lib/farshore/agent".into(), "/etc/farshore".into()],
            mounts: fstab(table),
            crypttab: crypttab("safe /dev/mapper/vg-safe none luks\nhome UUID=1 none luks\n"),
            links: BTreeMap::new(),
        }
    }

    fn golden(input: &Input) -> String {
        input.drop_ins().into_iter().map(|(unit, text)| format!("== {unit}\n{text}")).collect()
    }

    /// Goal: what lies on a protected volume waits, by whichever name it is mounted; what may, waits too; the rest does not, least of
    /// all what the agent needs.
    #[test]
    fn file_systems_wait_for_the_agent() {
        let input = input(Some(vec![
            volume("g/data", "/dev/mapper/vg-data", Some(1004)),
            volume("g/three", "/dev/sdc", Some(3)),
            volume("g/safe", "/dev/vg/safe", None),
            volume("g/image", "/srv/z/image", None),
        ]));
        let wait = |what: &str| {
            format!(
                "# Made by farshore-generator at boot: {what}.\n[Unit]\nWants=farshore-agent.service\nAfter=farshore-agent.service\n"
            )
        };
        let expected = format!(
            "== farshore-agent.service\n# Made by farshore-generator at boot.\n[Unit]\n\
             RequiresMountsFor=/var/lib/farshore/agent\nRequiresMountsFor=/etc/farshore\n\
             Wants=dev-mapper-vg\\x2ddata.device\nAfter=dev-mapper-vg\\x2ddata.device\n\
             Wants=dev-sdc.device\nAfter=dev-sdc.device\nWants=dev-vg-safe.device\nAfter=dev-vg-safe.device\n\
             Wants=srv-z.mount\nAfter=srv-z.mount\n\
             == srv-data.mount\n{data}== srv-other.mount\n{maybe}== srv-three.mount\n{three}\
             == systemd-cryptsetup@safe.service\n{safe}\
             == systemd-fsck@dev-disk-by\\x2duuid-other.service\n{maybe}\
             == systemd-fsck@dev-ublkb3.service\n{three}== systemd-fsck@dev-vg-data.service\n{data}",
            data = wait("this is volume g/data"),
            maybe = wait("this may be a protected volume"),
            three = wait("this is volume g/three"),
            safe = wait("this is volume g/safe"),
        );
        assert_eq!(golden(&input), expected);
    }

    /// Goal: the agent and a file system that holds an image never wait for each other, which systemd would resolve by leaving one out.
    /// Method: the image lies on a file system by UUID that might be a protected volume; on one below another; on one that is.
    #[test]
    fn nobody_waits_in_a_circle() {
        let of = |image: &str| {
            let mut input =
                input(Some(vec![volume("g/data", "/dev/vg/data", None), volume("g/image", image, Some(7))]));
            input.mounts = fstab(
                "UUID=one /srv/one ext4 rw 0 2\n/dev/sdz1 /srv/one/two ext4 rw 0 0\n/dev/vg/data /srv/data xfs rw 0 2\n",
            );
            let drop_ins = input.drop_ins();
            let waits =
                |unit: &str| drop_ins.get(unit).is_some_and(|text| text.contains("After=farshore-agent.service"));
            let waited = |unit: &str| drop_ins[UNIT].contains(&format!("After={unit}\n"));
            ["srv-one.mount", "srv-one-two.mount", "srv-data.mount"].map(|unit| (waits(unit), waited(unit)))
        };
        assert_eq!(of("/srv/one/image"), [(false, true), (false, false), (true, false)]);
        assert_eq!(of("/srv/one/two/image"), [(false, false), (false, true), (true, false)]);
        assert_eq!(of("/srv/data/image"), [(true, false), (false, false), (true, false)]);
    }

    /// Goal: on a running system links tell what a UUID is.
    #[test]
    fn links_that_are_there_are_believed() {
        let mut input = input(Some(vec![volume("g/data", "/dev/vg/data", None)]));
        let other = "/dev/disk/by-uuid/other";
        assert_eq!(input.is_protected(other), Match::Maybe);
        input.links.insert(other.into(), "/dev/dm-7".into());
        assert_eq!(input.is_protected(other), Match::No);
        input.links.insert("/dev/vg/data".into(), "/dev/dm-7".into());
        assert_eq!(input.is_protected(other), Match::Yes("g/data".into()));
    }

    /// Goal: where the volumes are not known yet, every file system on a device waits, but for those that the agent needs.
    #[test]
    fn without_a_state_directory_all_wait() {
        let units: Vec<String> = input(None).drop_ins().into_keys().filter(|unit| unit.ends_with(".mount")).collect();
        assert_eq!(units, ["srv-data.mount", "srv-other.mount", "srv-three.mount", "srv-z.mount"]);
        // With nothing protected, nobody waits.
        let units: Vec<String> = input(Some(Vec::new())).drop_ins().into_keys().collect();
        assert_eq!(units, ["farshore-agent.service"]);
        // A volume by a link that leads nowhere yet may be any of them.
        let input = input(Some(vec![volume("g/v", "/dev/disk/by-id/x", None)]));
        assert_eq!(input.is_protected("/dev/sdz1"), Match::Maybe);
    }

    /// Goal: the real files of a system are read and the drop-ins written; a host without an agent gets none.
    #[test]
    fn a_system_below_a_folder() {
        let root = tempfile::tempdir().expect("room");
        let out = root.path().join("out");
        let args = SystemGenerator {
            normal: out.clone(),
            early: out.clone(),
            late: out.clone(),
            root: root.path().to_owned(),
        };
        run(&args).expect("nothing to do");
        assert!(!out.exists());
        std::fs::create_dir_all(root.path().join("etc/farshore")).expect("room");
        std::fs::write(root.path().join(CONFIG), "state = '/var/lib/x'\n").expect("room");
        std::fs::write(root.path().join("etc/fstab"), "/dev/vg/data /srv ext4 rw 0 2\n").expect("room");
        run(&args).expect("written");
        let agent = std::fs::read_to_string(out.join("farshore-agent.service.d").join(DROP_IN)).expect("written");
        assert!(agent.contains("RequiresMountsFor=/var/lib/x\n"), "{agent}");
        let mount = std::fs::read_to_string(out.join("srv.mount.d").join(DROP_IN)).expect("written");
        assert!(mount.contains("After=farshore-agent.service\n"), "{mount}");
    }
}
