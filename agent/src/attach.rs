//! Finds or makes a group's ring at the start, and says what that means for source and replica.

use std::collections::BTreeSet;
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_blkfilter::Content;
use farshore_proto::{GroupId, HostId, Name, VaultId};
use farshore_ring::{Dormant, Ring, RingConfig, RingIdentity, Which, WritingRange};
use farshore_streamer::{CaptureRing, Damage, LoggedBatch, RingSource, bridge};
use farshore_uring::Storage;

use crate::state::{GroupState, StateDir};
use crate::supervisor::{forget_bypassed, was_bypassed};
use crate::{Error, Result};

/// What must be known of a dead agent's volumes before its ring is used again.
pub(crate) struct Predecessor<'a> {
    /// Volumes of which the kernel issues every unanswered request again, to this agent.
    pub reissued: BTreeSet<u16>,
    /// Whether all I/O of the dead agent has ended; may wait. Asked at most once, and only if there is a ring.
    pub has_ended: &'a dyn Fn() -> bool,
    /// The activity log says what may differ where the ring is lost, if the group was served through the boot that the log is of.
    pub covered: Option<String>,
    /// What of the group is in the disk log, or why some of that is lost.
    pub logged: std::result::Result<Vec<LoggedBatch>, Damage>,
}

/// Whose ring.
pub(crate) struct RingOwner {
    pub vault: VaultId,
    pub group: GroupId,
    pub host: HostId,
    pub name: Name,
    pub host_name: Name,
}

/// A ring, ready for use.
pub(crate) struct Attached {
    pub ring: Arc<Ring>,
    /// It is the last process's ring: what was not shipped is in it.
    pub resumed: bool,
    /// The marks saved at the last stop are all there is: nothing was served since.
    pub clean: bool,
    /// What the activity log says may differ, too.
    pub from_log: bool,
    /// What was under way in the last process is not in a ring.
    pub lost: bool,
    /// What the last process was writing.
    pub writing: Vec<WritingRange>,
    /// What is known of the volumes' difference to the replica.
    pub content: Content,
    /// Batches in the disk log that go before those in the ring.
    pub logged: Vec<LoggedBatch>,
}

impl RingOwner {
    /// The ring's file in `dir`.
    pub(crate) fn file(&self, dir: &Path) -> PathBuf {
        ring_file(dir, &self.host_name, self.name.as_str())
    }

    fn identity(&self, state: &GroupState, boot: [u8; 16]) -> RingIdentity {
        RingIdentity {
            vault: self.vault.0,
            group: self.group.0,
            host: self.host.0,
            boot,
            // The ring's own number: a stream that starts over takes a new incarnation and keeps the ring.
            incarnation: state.ring,
            generation: 0,
        }
    }

    /// Opens the ring that an unclean stop left, or makes one. `state` is changed and written before a ring of a new
    /// incarnation exists, and says `attached` when this returns.
    ///
    /// A ring that was found goes on in this order:
    /// 1. It is ours alone (its lock), so no thread of the dead agent runs any more.
    /// 2. All I/O of the dead agent has ended. *(Else a cell that its last write still reads from would get a new owner, and that
    ///    owner's bytes would land where the old write goes.)* Where that takes too long, the ring is given up: a new one has other
    ///    memory.
    /// 3. What the dead agent was writing is marked missing, but for volumes whose requests come again: those are written and
    ///    captured again before anybody hears that they succeeded. Nobody can issue them before 4, for that needs a filter.
    /// 4. The ring is resumed.
    ///
    /// Killed between 4 and the last request's coming again, the next start finds nothing of it in the ring, and need not: the kernel
    /// still has the request. If the device is gone by then, [`crate::group`] compares the whole volume.
    ///
    /// # Errors
    /// When another agent has the ring, or neither ring nor state can be written.
    pub(crate) fn attach<S: Storage>(
        &self,
        dir: &Path,
        slab_bytes: u64,
        state: &mut GroupState,
        store: &StateDir<S>,
        predecessor: &Predecessor<'_>,
    ) -> Result<Attached> {
        let boot = boot_id()?;
        let path = self.file(dir);
        let noted = store.is_bypassed(&self.name)?;
        if noted || was_bypassed(dir, &self.host_name, self.name.as_str()) {
            tracing::warn!(group = %self.name, "was served without capture: everything is compared");
            state.compare_everything = true;
            store.write_group(&self.name, state)?;
            forget_bypassed(dir, &self.host_name, self.name.as_str());
            if noted {
                store.forget_bypassed(&self.name)?;
            }
        }
        let found = Ring::open(&path, &self.identity(state, boot));
        let newer = match &found {
            Err(farshore_ring::Error::OtherIncarnation { found, expected }) if found > expected => Some(*found),
            Ok(_) | Err(_) => None,
        };
        if let Some(newer) = newer {
            // What that ring held and the target has not is in nobody's memory, nor in a log that was put back with the state.
            tracing::warn!(
                group = %self.name,
                "the state directory is older than the ring of this boot (was it restored from a copy?): everything is compared"
            );
            state.compare_everything = true;
            state.incarnation = state.incarnation.max(newer);
        }
        let mut clean = !state.attached && newer.is_none();
        let mut from_log = false;
        if state.attached {
            match found {
                // The streamer stores its state before the first request is served. So the last start was cut off, perhaps before
                // the saved marks were in this ring: they are taken again. (If that start had found its ring lost,
                // `compare_everything` says so.)
                Ok(found) if found.recovery().stream.is_none() => {
                    tracing::info!(group = %self.name, "the last start did not get as far as serving");
                    clean = true;
                    // That start may have had the log to go by.
                    from_log = is_covered(state, predecessor);
                }
                Ok(found) if !(predecessor.has_ended)() => {
                    drop(found);
                    from_log =
                        self.lost(state, predecessor, "a source is still held: the last agent's ring is given up");
                }
                Ok(found) => {
                    let recovery = found.recovery();
                    tracing::info!(
                        group = %self.name,
                        writing = recovery.writing.len(),
                        entries = recovery.head - recovery.freed,
                        "ring of the last process found"
                    );
                    let writing = recovery.writing.clone();
                    mark_recovered(&found, &predecessor.reissued);
                    let ring = Arc::new(found.resume());
                    match self.stream_fits(&ring, state, predecessor)? {
                        Ok(logged) => {
                            let content = if state.compare_everything { Content::Unknown } else { Content::AsMarked };
                            let (clean, from_log, lost) = (false, false, false);
                            return Ok(Attached {
                                ring,
                                resumed: true,
                                clean,
                                from_log,
                                lost,
                                writing,
                                content,
                                logged,
                            });
                        }
                        Err(reason) => tracing::warn!(group = %self.name, "{reason}: everything is compared"),
                    }
                    state.compare_everything = true;
                }
                Err(error @ farshore_ring::Error::InUse { .. }) => {
                    return Err(Error::Refused {
                        what: format!("group {}", self.name),
                        reason: error.to_string(),
                        hint: "two agents cannot protect one group; stop the other one".into(),
                    });
                }
                Err(error) => {
                    from_log =
                        self.lost(state, predecessor, &format!("the ring of the last process is lost ({error})"));
                }
            }
        } else {
            // Its lock goes before the next ring is made.
            drop(found);
        }
        let logged = match &predecessor.logged {
            // With everything compared, a line of batches that goes before it is as good as it was.
            Ok(logged) => logged.clone(),
            Err(damage) => {
                tracing::warn!(group = %self.name, %damage, "the disk log is lost: everything is compared");
                state.compare_everything = true;
                state.log_line = None;
                from_log = false;
                Vec::new()
            }
        };
        state.incarnation += 1;
        state.ring = state.incarnation;
        state.attached = true;
        if !from_log {
            // Said again when all that is known of the volumes is marked, and all are in the path.
            state.boot = None;
        }
        store.write_group(&self.name, state)?;
        let config = RingConfig { identity: self.identity(state, boot), slab_bytes, descriptors: None };
        let ring = Ring::create(&path, &config)
            .map_err(|error| Error::failed(format!("ring {}", path.display()), crate::error::chain(&error)))?;
        let content = if state.compare_everything { Content::Unknown } else { Content::AsMarked };
        Ok(Attached {
            ring: Arc::new(ring),
            resumed: false,
            clean,
            from_log,
            lost: !clean,
            writing: Vec::new(),
            content,
            logged,
        })
    }

    /// There is no ring to go by. `true`: the activity log tells what to compare; else that is everything.
    fn lost(&self, state: &mut GroupState, predecessor: &Predecessor<'_>, reason: &str) -> bool {
        let from_log = is_covered(state, predecessor);
        let what = if from_log { "what the activity log names" } else { "everything" };
        tracing::warn!(group = %self.name, "{reason}: {what} is compared");
        state.compare_everything |= !from_log;
        from_log
    }

    /// A kill between recording a new incarnation and telling the ring leaves a stream that must not go on; and what the ring gave to the
    /// disk log must be there. Gives what is.
    fn stream_fits(
        &self,
        ring: &Arc<Ring>,
        state: &GroupState,
        predecessor: &Predecessor<'_>,
    ) -> Result<std::result::Result<Vec<LoggedBatch>, String>> {
        let source =
            CaptureRing::new(Arc::clone(ring)).map_err(|error| Error::failed("ring", crate::error::chain(&error)))?;
        let Some(stream) = source.load_state() else { return Ok(Ok(Vec::new())) };
        if stream.incarnation.0 != state.incarnation {
            return Ok(Err("the ring is of an older incarnation".into()));
        }
        let (logged, damage) = match &predecessor.logged {
            Ok(logged) => (logged.clone(), None),
            Err(damage) => (Vec::new(), Some(damage)),
        };
        let bridged = bridge(&stream, source.freed(), logged);
        Ok(bridged.map_err(|reason| damage.map_or(reason, |damage| format!("the disk log is lost: {damage}"))))
    }
}

/// What the log says is all that may differ: the group was in the path for as long as the log's last life was.
fn is_covered(state: &GroupState, predecessor: &Predecessor<'_>) -> bool {
    predecessor.covered.is_some() && predecessor.covered == state.boot && !state.compare_everything
}

/// Makes the folder of the rings, if there is none, and looks whose it is.
///
/// # Errors
/// [`Error::Refused`]: others could put files there, and so have the agent serve other devices, or keep it from serving.
pub fn ring_folder(folder: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| Error::io("create", folder, error))?;
    let look = |status: std::io::Result<std::fs::Metadata>| status.map_err(|error| Error::io("look at", folder, error));
    let status = look(std::fs::metadata(folder))?;
    let own = nix::unistd::geteuid().as_raw();
    // A link's owner can lead it elsewhere.
    let owners = [look(std::fs::symlink_metadata(folder))?.uid(), status.uid()];
    let reason = if let Some(other) = owners.into_iter().find(|owner| *owner != own) {
        format!("belongs to user {other}, and the agent runs as user {own}")
    } else if status.mode() & 0o022 != 0 {
        format!("may be written to by others (mode {:o})", status.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(Error::Refused {
        what: format!("ring folder {}", folder.display()),
        reason,
        hint: "set `ring_dir` to a folder of the agent alone, on a tmpfs".into(),
    })
}

/// The ring of a group on `host`.
pub(crate) fn ring_file(dir: &Path, host: &Name, group: &str) -> PathBuf {
    dir.join(format!("farshore-{host}-{group}.ring"))
}

/// Marks what the dead agent had under way. Ranges of volumes that the ring does not know are left out: such a volume is compared.
fn mark_recovered(ring: &Dormant, reissued: &BTreeSet<u16>) {
    for range in ring.recovery().writing.iter().filter(|range| !reissued.contains(&range.volume)) {
        if let Some(missing) = ring.bitmap(range.volume, Which::Missing) {
            missing.set_range(range.offset, range.length);
        }
    }
}

/// Id of this boot, as the kernel writes it.
pub(crate) fn boot_text() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", path, error))?;
    Ok(text.trim().to_owned())
}

/// Id of this boot.
fn boot_id() -> Result<[u8; 16]> {
    let text = boot_text()?;
    let hex: String = text.trim().chars().filter(|c| *c != '-').collect();
    let id: VaultId = hex.parse().map_err(|_| Error::failed("boot id", "is not a UUID"))?;
    Ok(id.0)
}

#[cfg(test)]
mod tests {
    use farshore_proto::Name;
    use farshore_uring::DirStorage;

    use super::*;

    const MIB: u64 = 1 << 20;

    struct Rig {
        folder: tempfile::TempDir,
        owner: RingOwner,
        store: StateDir<DirStorage>,
    }

    impl Rig {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let name = Name::new("g").expect("good");
            let owner = RingOwner {
                vault: VaultId([1; 16]),
                group: GroupId([2; 16]),
                host: HostId([3; 16]),
                name: name.clone(),
                host_name: name.clone(),
            };
            let storage = DirStorage::open(folder.path()).expect("a folder");
            let store = StateDir::open(storage, folder.path(), VaultId([1; 16]), &name).expect("empty");
            Self { folder, owner, store }
        }

        fn attach(&self, state: &mut GroupState, reissued: &[u16], has_ended: &dyn Fn() -> bool) -> Result<Attached> {
            let reissued = reissued.iter().copied().collect();
            let predecessor = Predecessor { reissued, has_ended, covered: None, logged: Ok(Vec::new()) };
            self.owner.attach(self.folder.path(), MIB * 8, state, &self.store, &predecessor)
        }

        /// A ring whose owner died with a write to two volumes under way, after it had served.
        fn killed(&self, state: &mut GroupState) {
            let attached = self.attach(state, &[], &|| unreachable!("there is no ring yet")).expect("a ring");
            let ring = &attached.ring;
            for volume in [0, 1] {
                ring.add_volume(volume, [7; 16], MIB).expect("room");
                let producer = ring.producer();
                let mut cell = producer.reserve(4096).expect("room");
                cell.writing(volume, 64 << 10, 4096);
                // A dead process gives nothing back.
                std::mem::forget(cell);
            }
            let mut source = CaptureRing::new(Arc::clone(ring)).expect("the only consumer");
            let mut stream = source.load_state().unwrap_or_default();
            stream.incarnation.0 = state.incarnation;
            source.store_state(&stream);
            // Its lock does not outlive a process, but what is forgotten here does: the same bytes in a file of their own.
            let path = self.owner.file(self.folder.path());
            let copy = path.with_extension("copy");
            std::fs::copy(&path, &copy).and_then(|_| std::fs::rename(&copy, &path)).expect("room");
        }
    }

    /// Goal: what was being written is marked, but for volumes whose requests come again; and not before old I/O has ended.
    #[test]
    fn requests_that_come_again_need_no_mark() {
        let rig = Rig::new();
        let mut state = GroupState::new();
        rig.killed(&mut state);
        let asked = std::cell::Cell::new(0);
        let has_ended = || {
            asked.set(asked.get() + 1);
            true
        };
        let attached = rig.attach(&mut state, &[1], &has_ended).expect("found");
        assert!(attached.resumed && asked.get() == 1, "asked {} times", asked.get());
        let missing = |volume| attached.ring.bitmap(volume, Which::Missing).expect("added").count_ones();
        assert_eq!((missing(0), missing(1)), (1, 0));
        assert_eq!(attached.content, Content::AsMarked);
    }

    /// Goal: without a ring the activity log is believed only if the group was in the path for all of the log's last life, nothing else calls
    /// for a compare, and nobody was led past us meanwhile, as noted in the state directory.
    #[test]
    fn a_lost_ring_goes_by_the_log_only_on_evidence() {
        let lost = GroupState { attached: true, boot: Some("b".into()), ..GroupState::new() };
        let cases = [
            (lost.clone(), Some("b"), false, true),
            (lost.clone(), None, false, false),
            (lost.clone(), Some("another"), false, false),
            (GroupState { boot: None, ..lost.clone() }, Some("b"), false, false),
            (GroupState { boot: None, ..lost.clone() }, None, false, false),
            (GroupState { compare_everything: true, ..lost.clone() }, Some("b"), false, false),
            (lost, Some("b"), true, false),
        ];
        for (mut state, covered, noted, expected) in cases {
            let rig = Rig::new();
            let name = Name::new("g").expect("good");
            if noted {
                crate::state::note_bypassed(rig.folder.path(), &name).expect("room");
            }
            let covered = covered.map(str::to_owned);
            let predecessor =
                Predecessor { reissued: BTreeSet::new(), has_ended: &|| true, covered, logged: Ok(Vec::new()) };
            let attached = rig.owner.attach(rig.folder.path(), MIB * 8, &mut state, &rig.store, &predecessor);
            let attached = attached.expect("a ring");
            assert!(attached.lost && !attached.resumed && !attached.clean);
            assert_eq!((attached.from_log, state.compare_everything), (expected, !expected), "{state:?}");
            assert_eq!(attached.content, if expected { Content::AsMarked } else { Content::Unknown });
            assert!(!rig.store.is_bypassed(&name).expect("readable"), "it is in the group's state by now");
            let written = rig.store.read_group(&name).expect("readable").expect("written");
            assert_eq!((written.boot.is_some(), written.compare_everything), (expected, !expected));
        }
    }

    /// Goal: a folder that others can write to is refused; one that is not there is made for the agent alone.
    #[test]
    fn rings_are_in_a_folder_of_ones_own() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let own = folder.path().join("a/b");
        ring_folder(&own).expect("made");
        assert_eq!(std::fs::metadata(&own).expect("made").mode() & 0o777, 0o700);
        for (mode, good) in [(0o755, true), (0o1777, false), (0o770, false)] {
            std::fs::set_permissions(&own, std::fs::Permissions::from_mode(mode)).expect("ours");
            let looked = ring_folder(&own);
            assert_eq!(looked.is_ok(), good, "{mode:o}");
            let text = looked.err().map(|error| error.to_string());
            assert!(text.is_none_or(|text| text.contains("a/b") && text.contains("may be written to by others")));
        }
    }

    /// Goal: a state that was put back, while a ring of this boot tells of a later life, is not believed, whatever it says of its end and of
    /// the activity log.
    #[test]
    fn a_state_that_is_older_than_the_ring_compares_everything() {
        for attached in [false, true] {
            let rig = Rig::new();
            let mut state = GroupState { attached, boot: Some("b".into()), ..GroupState::new() };
            let old = state.clone();
            let name = Name::new("g").expect("good");
            for _ in 0..3 {
                state.attached = false;
                rig.killed(&mut state);
            }
            let mut old = GroupState { incarnation: 1, ring: 1, ..old };
            rig.store.write_group(&name, &old).expect("room");
            let predecessor = Predecessor {
                reissued: BTreeSet::new(),
                has_ended: &|| true,
                covered: Some("b".into()),
                logged: Ok(Vec::new()),
            };
            let started = rig.owner.attach(rig.folder.path(), MIB * 8, &mut old, &rig.store, &predecessor);
            let started = started.expect("a ring");
            assert!(!started.resumed && !started.clean && !started.from_log && started.lost && old.compare_everything);
            assert_eq!((started.content, old.incarnation), (Content::Unknown, state.incarnation + 1));
        }
    }

    /// Goal: while old I/O may still read from the ring's memory, that memory is not used again.
    #[test]
    fn a_ring_that_old_io_may_use_is_given_up() {
        let rig = Rig::new();
        let mut state = GroupState::new();
        rig.killed(&mut state);
        let incarnation = state.incarnation;
        let attached = rig.attach(&mut state, &[0, 1], &|| false).expect("a new one");
        assert!(!attached.resumed && state.compare_everything && state.incarnation == incarnation + 1);
        assert_eq!(attached.content, Content::Unknown);
        assert_eq!(attached.ring.used_bytes(), 0);
    }
}
