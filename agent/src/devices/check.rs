//! Which sources are refused, and what is said then. Each refusal names the thing, the reason and the way out; nothing was
//! opened, let alone changed, before it.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use farshore_proto::SLOT_BYTES;
use farshore_proto::text::show_size;
use farshore_ublk::dm::Interposer;
use farshore_ublk::{Control, DeviceState};

use super::graph::{Below, Graph};
use super::mounts::{Places, unescaped};
use super::users::{Sought, named_opener, writer, writer_of};
use super::{DeviceNo, FileNo, Protected, number};
use crate::config::AgentConfig;
use crate::{Error, Result};

/// Smallest source: one slot, the unit in which differences are kept.
const SOURCE_BYTES_MIN: u64 = SLOT_BYTES;

/// How a source is going to be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    /// Opened for ourselves alone: nobody else may use it.
    Exclusive,
    /// Interposed while it is in use: it may be mounted, and other devices may stand on it.
    Live,
}

/// A file or folder without which the agent does not work.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    what: &'static str,
    path: PathBuf,
}

/// All of the agent's own: state, rings, identity, configuration, socket, program and libraries, and the log if it goes to a file.
pub(crate) fn own_files(config: &AgentConfig) -> Vec<Own> {
    let mut own = Vec::new();
    let mut add = |what, path: Option<&Path>| own.extend(path.map(|path| Own { what, path: path.to_owned() }));
    add("state directory", Some(&config.state));
    add("ring folder", Some(&config.ring_dir));
    add("activity log", config.activity_log.as_deref());
    add("disk log", config.disk_log.as_ref().map(|log| log.path.as_path()));
    add("identity", Some(&config.identity));
    add("configuration", config.file.as_deref());
    add("admin socket's folder", config.socket.parent());
    add("program", program().as_deref());
    for log in ["/proc/self/fd/1", "/proc/self/fd/2"] {
        let file = std::fs::read_link(log).ok().filter(|path| path.is_file());
        add("log", file.as_deref());
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    // One of each file system is enough.
    let mut seen = BTreeSet::new();
    for (device, path) in maps.lines().filter_map(mapped_file) {
        if seen.insert(device) {
            add("program's library", Some(Path::new(path)));
        }
    }
    own
}

/// The file from which the agent is started: of a worker, which runs from memory, its supervisor's.
fn program() -> Option<PathBuf> {
    let parent = format!("/proc/{}/exe", nix::unistd::getppid());
    let links = ["/proc/self/exe", parent.as_str()].map(|link| std::fs::read_link(link).ok());
    links.into_iter().flatten().find(|path| path.is_file())
}

/// File system and path of a mapped file, of a line such as `7f00-7f01 r-xp 00000000 08:01 42    /lib/x.so`.
fn mapped_file(line: &str) -> Option<(&str, &str)> {
    let device = line.split_whitespace().nth(3)?;
    let path = &line[line.find('/')?..];
    (!path.ends_with("(deleted)")).then_some((device, path))
}

/// A source, or what stands for one.
enum Thing {
    Block(DeviceNo),
    File(FileNo, BTreeSet<DeviceNo>),
}

impl Thing {
    fn of(path: &Path, places: &Places) -> Option<Self> {
        let status = std::fs::metadata(path).ok()?;
        if status.file_type().is_block_device() {
            Some(Self::Block(number(status.rdev())))
        } else {
            Some(Self::File((number(status.dev()), status.ino()), places.of_path(path)))
        }
    }

    fn below(&self, graph: &Graph) -> Below {
        match self {
            Self::Block(device) => graph.below([*device]),
            Self::File(file, on) => {
                let mut below = graph.below(on.iter().copied());
                below.files.insert(*file);
                below
            }
        }
    }

    /// Whether what lies above `below` stands on this, or is this.
    fn is_in(&self, below: &Below) -> bool {
        match self {
            Self::Block(device) => below.devices.contains(device),
            Self::File(file, _) => below.files.contains(file),
        }
    }

    fn is(&self, device: DeviceNo) -> bool {
        matches!(self, Self::Block(own) if *own == device)
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Block(one), Self::Block(two)) => one == two,
            (Self::File(one, _), Self::File(two, _)) => one == two,
            (Self::Block(_), Self::File(..)) | (Self::File(..), Self::Block(_)) => false,
        }
    }
}

/// The host as it is at this moment.
pub(crate) struct Host {
    graph: Graph,
    places: Places,
    protected: Vec<(Protected, Thing)>,
    swaps: Vec<PathBuf>,
}

impl Host {
    /// Looks at the running system; `protected` are the agent's volumes.
    pub(crate) fn look(protected: Vec<Protected>) -> Self {
        let places = Places::system();
        let graph = Graph::read(Path::new("/sys/dev/block"), &places);
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let mut host = Self { graph, places, protected: Vec::new(), swaps: swap_files(&swaps) };
        // Served by processes, so sysfs does not show on what they stand. Without a device mapper there are none.
        let interposed = Interposer::open().and_then(|interposer| interposer.list()).unwrap_or_default();
        for one in interposed {
            let number = |device: farshore_ublk::dm::DevNo| (u64::from(device.major), u64::from(device.minor));
            host.graph.add(number(one.through), number(one.lower));
        }
        for volume in protected {
            let Some(thing) = Thing::of(&volume.source, &host.places) else { continue };
            if let Some(device) = volume.ublk.and_then(ublk_number) {
                match &thing {
                    Thing::Block(source) => host.graph.add(device, *source),
                    Thing::File(file, on) => host.graph.add_file(device, *file, on),
                }
            }
            host.protected.push((volume, thing));
        }
        host
    }

    /// Whether `source` may be protected. What does not exist, or is neither file nor block device, is left to whoever opens it.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason and the way out; [`Error::NotFound`]: a node without a device.
    pub(crate) fn check(&self, source: &Path, access: Access, own: &[Own]) -> Result<()> {
        let Some(thing) = Thing::of(source, &self.places) else { return Ok(()) };
        let refuse = Refuse { source };
        self.check_there(source, &thing)?;
        self.check_volumes(&refuse, &thing, access)?;
        self.check_own(&refuse, &thing, own)?;
        self.check_swap(&refuse, &thing)?;
        self.check_itself(&refuse, &thing, source)?;
        self.check_servers(&refuse, &thing)?;
        self.check_use(&refuse, &thing, access)
    }

    fn check_use(&self, refuse: &Refuse<'_>, thing: &Thing, access: Access) -> Result<()> {
        match access {
            Access::Live => Ok(()),
            Access::Exclusive => {
                self.check_mounts(refuse, thing)?;
                self.check_devices_above(refuse, thing)?;
                self.check_writers(refuse, thing)
            }
        }
    }

    /// A node in /dev may have outlived its device.
    fn check_there(&self, source: &Path, thing: &Thing) -> Result<()> {
        match thing {
            // Where sysfs is not mounted nothing is known.
            Thing::Block(device)
                if self.graph.devices().next().is_some() && self.graph.kernel_name(*device).is_none() =>
            {
                Err(Error::NotFound {
                    what: "source",
                    name: source.display().to_string(),
                    hint: "; the node is there, but the device behind it is gone",
                })
            }
            Thing::Block(_) | Thing::File(..) => Ok(()),
        }
    }

    fn check_volumes(&self, refuse: &Refuse<'_>, thing: &Thing, access: Access) -> Result<()> {
        let below = thing.below(&self.graph);
        for (volume, protected) in &self.protected {
            let (label, shown) = (&volume.label, volume.source.display());
            let upper = volume.upper.as_deref().and_then(|upper| Thing::of(upper, &self.places));
            if thing.is_same(protected) || upper.is_some_and(|upper| thing.is_same(&upper)) {
                let hint = "`farshore volumes` shows its device; `farshore unprotect` ends that";
                return refuse.because(format!("is protected already as {label}"), hint);
            }
            if volume.ublk.and_then(ublk_number).is_some_and(|device| thing.is(device)) {
                let hint = "protect devices that guests do not reach through Farshore";
                return refuse.because(format!("is the device of {label} itself, which stands on {shown}"), hint);
            }
            if access == Access::Live && volume.upper.is_some() {
                // Storeys of one stack, each interposed: every write passes both, in order.
                continue;
            }
            let hint = "one of them is enough: `farshore unprotect` the other, or leave this one";
            if protected.is_in(&below) {
                return refuse.because(format!("stands on {shown}, which is protected as {label}"), hint);
            }
            if thing.is_in(&protected.below(&self.graph)) {
                return refuse.because(format!("carries {shown}, which is protected as {label}"), hint);
            }
        }
        Ok(())
    }

    fn check_own(&self, refuse: &Refuse<'_>, thing: &Thing, own: &[Own]) -> Result<()> {
        for Own { what, path } in own {
            if thing.is_in(&self.graph.below(self.places.of_path(path))) {
                let hint =
                    "keep state, rings, identity, configuration, sockets and program on a device that is not protected";
                return refuse.because(format!("holds the agent's own {what} {}", path.display()), hint);
            }
        }
        if thing.is_in(&self.graph.below(self.places.of_roots())) {
            let hint = "protect the devices that hold data; the host itself runs from this one";
            return refuse.because("holds the root file system of this host".into(), hint);
        }
        Ok(())
    }

    /// Memory that is needed to write must not be paged out through what is written.
    fn check_swap(&self, refuse: &Refuse<'_>, thing: &Thing) -> Result<()> {
        for path in &self.swaps {
            let Some(swap) = Thing::of(path, &self.places) else { continue };
            if thing.is_in(&swap.below(&self.graph)) {
                let path = path.display();
                let hint = format!("`swapoff {path}`, and swap to a device that is not protected");
                return refuse.because(format!("holds active swap ({path})"), &hint);
            }
        }
        Ok(())
    }

    fn check_itself(&self, refuse: &Refuse<'_>, thing: &Thing, source: &Path) -> Result<()> {
        let size = match thing {
            Thing::Block(device) => self.attribute(*device, "size").map(|sectors| sectors * 512),
            Thing::File(..) => std::fs::metadata(source).ok().filter(std::fs::Metadata::is_file).map(|file| file.len()),
        };
        if let Some(size) = size.filter(|size| *size < SOURCE_BYTES_MIN) {
            let hint = format!("the smallest is {}", show_size(SOURCE_BYTES_MIN));
            return refuse
                .because(format!("is too small: {size} bytes, less than {}", show_size(SOURCE_BYTES_MIN)), &hint);
        }
        if let Thing::Block(device) = thing
            && self.attribute(*device, "ro") == Some(1)
        {
            let hint = format!("nothing can change it; make it writable with `blockdev --setrw {}`", source.display());
            return refuse.because("is read-only".into(), &hint);
        }
        Ok(())
    }

    fn attribute(&self, device: DeviceNo, name: &str) -> Option<u64> {
        self.graph.attribute(device, name)?.parse().ok()
    }

    /// A ublk device without a server takes requests and does not answer them.
    fn check_servers(&self, refuse: &Refuse<'_>, thing: &Thing) -> Result<()> {
        let below = thing.below(&self.graph).devices;
        let names = below.into_iter().filter_map(|device| self.graph.kernel_name(device));
        let ids: Vec<u32> =
            names.filter_map(|name| name.strip_prefix("ublkb")?.split('p').next()?.parse().ok()).collect();
        let Some(control) = (!ids.is_empty()).then(|| Control::open().ok()).flatten() else { return Ok(()) };
        for info in ids.into_iter().filter_map(|id| control.info(id).ok()) {
            if matches!(info.state(), DeviceState::Quiesced | DeviceState::FailIo | DeviceState::Dead) {
                let path = info.block_path();
                let hint = "start its server again, or remove it with `farshore doctor --repair`";
                return refuse.because(format!("stands on {}, whose server is gone", path.display()), hint);
            }
        }
        Ok(())
    }

    fn check_mounts(&self, refuse: &Refuse<'_>, thing: &Thing) -> Result<()> {
        for mount in self.places.everywhere() {
            let devices = self.places.of_mount(&mount);
            if !thing.is_in(&self.graph.below(devices.iter().copied())) {
                continue;
            }
            let mode = if mount.read_only { "read-only" } else { "read-write" };
            let point = mount.point.display();
            let through = devices.iter().find(|device| !thing.is(**device));
            let reason = match through.filter(|_| !devices.iter().any(|device| thing.is(*device))) {
                None => format!("is mounted {mode} on {point}"),
                Some(device) => format!("carries {}, which is mounted {mode} on {point}", self.graph.show(*device)),
            };
            let mapped = devices.iter().find(|device| self.graph.is_mapped(**device));
            let hint = match mapped {
                Some(device) => {
                    let path = self.graph.show(*device);
                    format!("unmount {point}, or attach live, while it is mounted, with `farshore protect {path} --dm`")
                }
                None => format!("unmount {point}; live, while it is mounted, --dm protects device-mapper devices only"),
            };
            return refuse.because(reason, &hint);
        }
        Ok(())
    }

    /// A process that has the source, a partition of it or the disk around it open for writing would go on writing past us: opening it
    /// exclusively keeps no such process out, only mounts and other devices. Readers may look.
    fn check_writers(&self, refuse: &Refuse<'_>, thing: &Thing) -> Result<()> {
        let is_part_of = |part: DeviceNo, whole: DeviceNo| part == whole || self.graph.disk_of(part) == Some(whole);
        let who = match *thing {
            Thing::Block(device) => writer(Sought::Device, |status| {
                let other = number(status.rdev());
                status.file_type().is_block_device() && (is_part_of(other, device) || is_part_of(device, other))
            }),
            Thing::File(..) => writer_of(refuse.source),
        };
        let Some(who) = who else { return Ok(()) };
        let hint = "end that process, and have it use the volume's own device; live, while it is in use, --dm protects device-mapper devices";
        refuse.because(format!("{who} has it open for writing"), hint)
    }

    /// Device mapper and md claim what they stand on; a loop does not, and would write past us.
    fn check_devices_above(&self, refuse: &Refuse<'_>, thing: &Thing) -> Result<()> {
        let on_it = |device: &DeviceNo| !thing.is(*device) && thing.is_in(&self.graph.below([*device]));
        // A partition is no user; whoever uses it stands on this, too.
        let user = self.graph.devices().filter(on_it).find(|device| self.graph.disk_of(*device).is_none());
        let Some(user) = user else { return Ok(()) };
        let path = self.graph.show(user);
        refuse.because(format!("is used by {path}"), &format!("protect {path} instead, or take that apart first"))
    }
}

/// What the kernel says of a source that it did not open: with the process that has it.
pub(crate) fn busy(source: &Path, reason: &str) -> Error {
    let who = named_opener(source).map(|who| format!("; {who} has it open")).unwrap_or_default();
    Error::Refused {
        what: format!("source {}", source.display()),
        reason: format!("is in use: {reason}{who}"),
        hint: "unmount it, or end whatever uses it; a volume is written through Farshore only, and by one agent".into(),
    }
}

struct Refuse<'a> {
    source: &'a Path,
}

impl Refuse<'_> {
    fn because(&self, reason: String, hint: &str) -> Result<()> {
        Err(Error::Refused { what: format!("source {}", self.source.display()), reason, hint: hint.to_owned() })
    }
}

fn ublk_number(id: u32) -> Option<DeviceNo> {
    super::graph::parse(std::fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).ok()?.trim())
}

/// Files and devices of a table as in `/proc/swaps`.
fn swap_files(table: &str) -> Vec<PathBuf> {
    table.lines().skip(1).filter_map(|line| Some(PathBuf::from(unescaped(line.split_whitespace().next()?)))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::graph::tests::Sysfs;
    use super::*;

    const DISK: DeviceNo = (8, 0);

    /// A host with this tree, and nothing mounted.
    fn host(sysfs: &Sysfs) -> Host {
        let places = Places::none();
        let graph = Graph::read(&sysfs.numbers(), &places);
        Host { graph, places, protected: Vec::new(), swaps: Vec::new() }
    }

    fn refused(result: Result<()>, part: &str) {
        let error = result.expect_err(part);
        assert!(error.exit_code() == 4 && error.to_string().contains(part) && error.hint().is_some(), "{error}");
    }

    /// Goal: neighbours are not in each other's way; what is above or below a protected device is.
    #[test]
    fn one_place_of_a_stack_is_protected_once() {
        let sysfs = Sysfs::new();
        sysfs.device("sda", "8:0", &[]);
        sysfs.partition("sda/sda1", "8:1");
        sysfs.partition("sda/sda2", "8:2");
        sysfs.device("dm-0", "253:0", &["8:2"]);
        sysfs.device("dm-1", "253:1", &["8:2"]);
        sysfs.device("ublkb0", "259:7", &[]);
        sysfs.device("dm-2", "253:2", &["259:7"]);
        let mut host = host(&sysfs);
        host.graph.add((259, 7), (253, 0));
        let volume = Protected { label: "g/v".into(), source: "/dev/vg/a".into(), upper: None, ublk: None };
        host.protected.push((volume, Thing::Block((253, 0))));
        let refuse = Refuse { source: Path::new("/dev/x") };
        let check = |device| host.check_volumes(&refuse, &Thing::Block(device), Access::Exclusive);
        refused(check((253, 0)), "is protected already as g/v");
        for above in [(259, 7), (253, 2)] {
            refused(check(above), "stands on /dev/vg/a, which is protected as g/v");
        }
        for below in [(8, 2), DISK] {
            refused(check(below), "carries /dev/vg/a");
        }
        check((8, 1)).expect("another partition");
        check((253, 1)).expect("another volume of the same group");
    }

    /// Goal: whoever stands on a device is named; its partitions are no users of it.
    #[test]
    fn devices_above_are_named() {
        let sysfs = Sysfs::new();
        sysfs.device("sda", "8:0", &[]);
        sysfs.partition("sda/sda1", "8:1");
        let refuse = Refuse { source: Path::new("/dev/sda") };
        let check = |device, access| host(&sysfs).check_use(&refuse, &Thing::Block(device), access);
        check(DISK, Access::Exclusive).expect("free");
        let lv = sysfs.device("dm-0", "253:0", &["8:1"]);
        std::fs::create_dir(lv.join("dm")).expect("room");
        std::fs::write(lv.join("dm/name"), "vg-lv\n").expect("room");
        refused(check(DISK, Access::Exclusive), "is used by /dev/mapper/vg-lv");
        check((253, 0), Access::Exclusive).expect("free");
        check(DISK, Access::Live).expect("whoever stands on it goes through what is put below");
    }

    /// Goal: what cannot be served is told by its size and mode.
    #[test]
    fn small_and_read_only_devices_are_refused() {
        let sysfs = Sysfs::new();
        let folder = sysfs.device("sda", "8:0", &[]);
        let refuse = Refuse { source: Path::new("/dev/sda") };
        let check = || host(&sysfs).check_itself(&refuse, &Thing::Block(DISK), Path::new("/dev/sda"));
        std::fs::write(folder.join("size"), "127\n").expect("room");
        std::fs::write(folder.join("ro"), "0\n").expect("room");
        refused(check(), "too small: 65024 bytes");
        std::fs::write(folder.join("size"), "128\n").expect("room");
        check().expect("just large enough");
        std::fs::write(folder.join("ro"), "1\n").expect("room");
        refused(check(), "read-only");
    }

    #[test]
    fn swap_is_read_from_the_kernels_table() {
        let table = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                     /dev/dm-1                               partition\t999420\t\t0\t\t-2\n\
                     /var/a\\040b                             file\t\t1024\t\t0\t\t-3\n";
        assert_eq!(swap_files(table), [PathBuf::from("/dev/dm-1"), PathBuf::from("/var/a b")]);
        assert!(swap_files("Filename\n").is_empty() && swap_files("").is_empty());
    }

    #[test]
    fn mapped_files_are_read_from_the_kernels_table() {
        let line = "7f1c000-7f1d000 r-xp 00000000 08:01 1234   /usr/lib/x y.so";
        assert_eq!(mapped_file(line), Some(("08:01", "/usr/lib/x y.so")));
        for other in ["7f1c000-7f1d000 rw-p 00000000 00:00 0 [heap]", "7f1c-7f1d r--p 0 08:01 1 /a (deleted)", ""] {
            assert_eq!(mapped_file(other), None, "{other}");
        }
    }

    /// Goal: all of the agent's own is looked at, on this very machine.
    #[test]
    fn the_agents_own_files_are_known() {
        let file = crate::config::AgentFile {
            identity: Some("/i".into()),
            state: Some("/s".into()),
            upstream: Some("h:1".into()),
            path: Some("/c".into()),
            ..Default::default()
        };
        let own = own_files(&AgentConfig::validate(file, 1 << 34).expect("valid"));
        for what in ["state directory", "ring folder", "identity", "configuration", "admin socket's folder", "program"]
        {
            assert!(own.iter().any(|own| own.what == what), "{what} is missing: {own:?}");
        }
        assert!(own.iter().any(|own| own.path.starts_with("/") && own.what == "program's library"), "{own:?}");
    }

    /// Goal: an image that is the device of the agent's own file system, as a loop, is refused; another one is not.
    #[test]
    fn an_image_that_holds_own_files_is_refused() {
        let sysfs = Sysfs::new();
        let own = tempfile::tempdir().expect("a folder");
        let (image, other) = (own.path().join("a.img"), own.path().join("b.img"));
        for path in [&image, &other] {
            std::fs::write(path, "").expect("room");
        }
        let files = [Own { what: "state directory", path: own.path().to_owned() }];
        let check = |path: &Path| {
            let host = host(&sysfs);
            let thing = Thing::of(path, &host.places).expect("there");
            host.check_own(&Refuse { source: path }, &thing, &files)
        };
        check(&image).expect("nothing is known of the device");
        // Its file system's number as the kernel gives it where there is no mount table: not anonymous.
        let status = std::fs::metadata(own.path()).expect("there");
        let place = number(status.dev());
        let folder = sysfs.device("loop0", "7:0", &[]);
        std::fs::create_dir(folder.join("loop")).expect("room");
        std::fs::write(folder.join("loop/backing_file"), format!("{}\n", image.display())).expect("room");
        sysfs.device("dm-0", &format!("{}:{}", place.0, place.1), &["7:0"]);
        if place.0 != 0 {
            refused(check(&image), "own state directory");
        }
        check(&other).expect("it does not");
    }
}
