//! One group: its ring, capture, sync, stream, and the front ends of its volumes.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_blkfilter::sync::SyncConfig;
use farshore_blkfilter::{CaptureConfig, CaptureGroup, Content, FilterVolume};
use farshore_link::identity::Identity;
use farshore_link::quic::SourceLinkConfig;
use farshore_proto::batch::VolumeDecl;
use farshore_proto::session::SourceConfig;
use farshore_proto::{BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, Name, Now, VolumeIndex};
use farshore_ring::WritingRange;
use farshore_streamer::{
    CaptureRing, Granularity, LogStart, RingSource, StreamState, StreamerConfig, StreamerHandle, StreamerStatus,
    VolumeSet,
};
use farshore_uring::{Backing, BackingId, DirStorage, FileDevice};

use crate::activity::Activity;
use crate::alarms::{Alarms, code};
use crate::attach::{Attached, Predecessor, RingOwner, boot_text};
use crate::config::{AgentConfig, CompressionPolicy, GroupPolicy};
use crate::devices::writer_of;
use crate::disk_log::{self, Disk};
use crate::evidence::{Doubt, Evidence, Proof};
use crate::frontend::{self, Frontend, NotStopped, Server};
use crate::hooks::Hooks;
use crate::interpose::{self, Found, Upper};
use crate::limits::ring_unlocked;
use crate::points::Cuts;
use crate::shared::{Marks, Shared, sync_alarms};
use crate::source::{SourceFile, is_let_go, open_volume};
use crate::state::{GroupState, StateDir, UblkDisk, VolumeState};
use crate::supervisor::{RosterDisk, SupervisorLink};
use crate::sync_thread::{Restarts, SyncThread};
use crate::{Error, Result, clock};

pub(crate) mod mapped;

use mapped::{Place, Trust};

/// How long a start waits for each source that is held still, beyond what opening it waits. A dead agent's I/O ends when the disk
/// answers; the block layer's own limit is 30 s, and guests wait all the while.
const RELEASE_MAX: Duration = Duration::from_secs(20);

/// One served volume.
struct Served {
    filter: Arc<FilterVolume<FileDevice>>,
    server: Arc<Server>,
}

/// A running group.
pub(crate) struct Group {
    pub shared: Arc<Shared>,
    ring_file: PathBuf,
    policy: GroupPolicy,
    streamer: StreamerHandle,
    served: Mutex<BTreeMap<VolumeIndex, Served>>,
    /// Volumes behind the device mapper.
    places: Mutex<BTreeMap<VolumeIndex, Place>>,
}

/// A volume to be protected.
pub(crate) struct NewVolume {
    pub source: PathBuf,
    pub frontend: String,
    pub place: NewPlace,
}

/// What a new volume stands on.
pub(crate) enum NewPlace {
    /// The source, which was opened.
    Source(Backing),
    /// A device-mapper device, in use or not.
    Mapped(Upper),
}

/// What a group needs of the agent.
#[derive(Clone)]
pub(crate) struct Context {
    pub config: Arc<AgentConfig>,
    pub identity: Arc<Identity>,
    pub store: StateDir<DirStorage>,
    pub alarms: Arc<Alarms>,
    pub supervisor: SupervisorLink,
    /// The host's activity log, where it can be used.
    pub activity: Option<Arc<Activity>>,
    /// Its disk log, likewise.
    pub disk: Option<Arc<Disk>>,
}

impl Group {
    /// Starts a group from its state: finds its ring, serves its volumes, connects. A volume that cannot be served is left
    /// out with an alarm; the others are served.
    pub(crate) fn start(context: &Context, name: Name, mut state: GroupState) -> Result<Self> {
        let Context { config, identity, store, alarms, supervisor: _, activity, disk } = context;
        let epoch = identity.newest_epoch().ok_or_else(|| Error::failed("identity", "holds no data key"))?;
        let host = HostId::derive(identity.vault, &identity.name);
        let host_key =
            identity.host_key(host, epoch).ok_or_else(|| Error::failed("identity", "holds no key of this host"))?;
        let group_id = GroupId::derive(identity.vault, &name);
        let owner = RingOwner {
            vault: identity.vault,
            group: group_id,
            host,
            name: name.clone(),
            host_name: identity.name.clone(),
        };
        // Once anything is served it shows nothing any more. Forgotten before that, but not before what was asked is marked: if this start
        // is cut off in between, the next one asks again. Of a volume behind the device mapper that is when it is in the path again; if
        // the next one finds a device in the path and evidence all the same, it knows that nobody has asked.
        let of = |volume: &VolumeState| Some((volume.index, volume.evidence.clone()?));
        let evidence: BTreeMap<u16, Evidence> = state.volumes.iter().filter_map(of).collect();
        let volumes = state.volumes.clone();
        let mut found = Found::of(&volumes);
        let surviving = |volume: &&VolumeState| match volume.mapped {
            Some(_) => found.waiting.contains_key(&volume.index),
            None => volume.ublk.as_ref().is_some_and(|disk| frontend::surviving(disk).is_ok_and(|id| id.is_some())),
        };
        let reissued: BTreeSet<u16> = volumes.iter().filter(surviving).map(|volume| volume.index).collect();
        let (unclean, asked) = (state.attached, Cell::new(false));
        let has_ended = || {
            asked.set(true);
            let mut held = volumes.iter().flat_map(|volume| found.held(volume));
            held.all(|path| is_let_go(&path, config, RELEASE_MAX))
        };
        // Before any source is opened: that, too, may leave a trace on it.
        let proofs: BTreeMap<u16, Proof> = volumes
            .iter()
            .filter(|volume| volume.mapped.is_none())
            .filter_map(|volume| Some((volume.index, evidence.get(&volume.index)?.check(&volume.source))))
            .collect();
        // Where the host went down: only what happened since its start can have been past us.
        let covers_last = activity.as_ref().is_some_and(|activity| activity.covers_last());
        let covered = activity.as_ref().filter(|_| covers_last).map(|activity| activity.last_boot().to_owned());
        let crash = covered.clone().map(|boot| Evidence::Crash { boot });
        let since_boot: BTreeMap<u16, Proof> = volumes
            .iter()
            .filter(|volume| unclean && volume.mapped.is_none())
            .filter_map(|volume| Some((volume.index, crash.as_ref()?.check(&volume.source))))
            .collect();
        let taken = disk_log::take_up(disk.as_deref(), group_id, &state)?;
        let lost_log = taken.batches.as_ref().err().map(ToString::to_string);
        let predecessor = Predecessor { reissued, has_ended: &has_ended, covered, logged: taken.batches };
        let attached = owner.attach(&config.ring_dir, config.ring, &mut state, store, &predecessor)?;
        let reissued = predecessor.reissued;
        if let Some(reason) = lost_log {
            let then = match state.compare_everything {
                true => "everything is compared, and the points between are lost",
                false => "nothing that was in it is needed any more",
            };
            alarms.raise(code::LOG_LOST, name.as_str(), format!("{reason}: {then}"));
            state.log_line = None;
        }
        if unclean && !asked.get() && !has_ended() {
            tracing::warn!(group = %name, "a source is still held by another process");
        }
        let (in_stream, held) = joined_in_stream(&attached, &state)?;
        if !attached.ring.locked() {
            alarms.raise(code::UNLOCKED, name.as_str(), ring_unlocked(attached.ring.size_bytes()));
        }
        let policy = config.policy(&name);
        let resumed = attached.resumed;
        let ring = Arc::clone(&attached.ring);
        let capture = CaptureGroup::new(
            Arc::clone(&ring),
            CaptureConfig {
                activity: activity.as_ref().map(|it| it.of_group(group_id, policy.stall_max)),
                ..capture_config(&policy)
            },
        );
        let sync_config = SyncConfig { rate: policy.sync_rate, ..SyncConfig::default() };
        let report = sync_alarms(name.clone(), Arc::clone(&capture), Arc::clone(alarms));
        let key = host_key.dedup_key(group_id);
        let sync = SyncThread::start(Arc::clone(&capture), sync_config, key, Restarts::default(), report)?;
        let shared = Shared::new(
            (name.clone(), group_id),
            capture,
            sync,
            Arc::clone(alarms),
            (store.clone(), state.clone()),
            activity.clone(),
        );
        let open = |volume: &VolumeState| match &volume.mapped {
            None => Some(open_volume(volume, config)),
            Some(_) => found.waiting.get(&volume.index).map(|attached| interpose::open_waiting(volume, attached)),
        };
        let volumes: Vec<(VolumeState, Option<Result<SourceFile>>)> =
            state.volumes.iter().map(|volume| (volume.clone(), open(volume))).collect();
        let (mut filters, mut pending) = (Vec::new(), Vec::new());
        for (volume, opened) in volumes {
            let joined = in_stream.all.contains(&VolumeIndex(volume.index));
            // A ring that was found does not tell "all of it is in the stream" from "killed before it was marked", or "left".
            // And where its device is gone, so are the requests that would have come again.
            let gone =
                volume.ublk.as_ref().is_some_and(|disk| disk.sequence.is_some()) && !reissued.contains(&volume.index);
            let known = if resumed { joined && volume.joined && !gone } else { !attached.from_log || volume.joined };
            let content = if known { attached.content } else { Content::Unknown };
            let marks = match activity {
                Some(activity) if attached.from_log && known => {
                    Marks::Log(activity.ranges(&group_id, VolumeIndex(volume.index)))
                }
                _ if attached.clean => Marks::Saved,
                _ => Marks::None,
            };
            let added = match opened {
                Some(opened) => opened
                    .and_then(|file| shared.add(&volume, file, content, joined, marks))
                    .map(|filter| filters.push((volume.clone(), filter))),
                None => shared.add_pending(&volume, content, joined, marks).map(|()| pending.push(volume.clone())),
            };
            if let Err(error) = added {
                shared.volume_failed(&volume, &error);
                shared.add_absent(&volume, joined);
                continue;
            }
            let proof = proofs.get(&volume.index);
            if volume.evidence.is_some() && found.waiting.contains_key(&volume.index) {
                let reason = "the last start was cut off before it was known whether somebody had written to it";
                shared.bypassed(VolumeIndex(volume.index), reason);
            } else if let Some(Err(doubt)) = proof {
                shared.bypassed(VolumeIndex(volume.index), &doubt.to_string());
            } else if let Some(Err(doubt)) = since_boot.get(&volume.index).filter(|_| attached.from_log) {
                shared.bypassed(VolumeIndex(volume.index), &doubt.to_string());
            } else if proof.is_none()
                && volume.mapped.is_none()
                && attached.clean
                && !attached.from_log
                && content != Content::Unknown
            {
                shared.bypassed(VolumeIndex(volume.index), &Doubt::Nothing.to_string());
            }
        }
        let open_in_log = attached.logged.last().is_some_and(|last| last.after.event_open);
        if resumed || attached.lost || open_in_log {
            shared.capture.begin_event();
        }
        let moving = shared.capture.volumes().iter().any(|volume| volume.in_flight().next_set(0).is_some());
        if !attached.lost && !moving {
            // Where nothing is missing it is over, whether or not there is a link: what is written in an outage has its points.
            shared.capture.end_event();
        }
        if resumed && !covers_last {
            shared.cover_again(filters.iter().map(|(_, filter)| filter), pending.is_empty(), &held);
        }
        // What they showed is marked.
        shared.update_state(|state| {
            state.volumes.iter_mut().filter(|it| it.mapped.is_none()).for_each(|volume| volume.evidence = None);
            if activity.is_none() {
                // Nothing tells from here on what happens, whatever an earlier life's log says.
                state.boot = None;
            }
        });
        let mut settings = StreamerConfig::new(
            SourceConfig { vault: identity.vault, group: name.clone(), host: identity.name.clone(), host_key },
            Generation(state.generation),
            Incarnation(state.incarnation),
            declarations(&state),
        );
        settings.last = (BatchNo(state.last_number), state.last_chain.parse::<ChainHash>()?);
        settings.joined = VolumeSet::from_iter(in_stream.all.iter().copied());
        settings.workers = u32::try_from(config.workers).unwrap_or(1);
        settings.rate = policy.bandwidth;
        settings.level_max = match policy.compression {
            CompressionPolicy::Auto => settings.level_max,
            CompressionPolicy::None => None,
            CompressionPolicy::Level(level) => Some(level),
        };
        settings.log = activity.as_ref().map(|activity| activity.of_stream());
        let first_cuts_wait = !in_stream.sent && attached.logged.is_empty();
        settings.disk_log =
            taken.line.is_some().then_some(LogStart { batches: attached.logged, begun: state.log_line.is_some() });
        if policy.every_write {
            settings.granularity = Granularity::Write;
        }
        let mut link = SourceLinkConfig::new(config.upstream.clone());
        link.channel = group_id.0;
        link.connections = u16::try_from(config.connections).unwrap_or(2);
        let hooked = Arc::clone(&shared);
        let streamer = StreamerHandle::start(settings, link, Arc::clone(identity), &ring, taken.line, move |waker| {
            hooked.capture.set_consumer_waker(move || waker.wake());
            Box::new(Hooks::new(Arc::clone(&hooked), in_stream.at_target, first_cuts_wait))
        })
        .map_err(|error| Error::failed(format!("group {name}"), crate::error::chain(&error)))?;
        for volume in &state.volumes {
            // They are in the ring now, and in the activity log.
            store.remove_bitmap(&name, volume.index);
        }
        let group = Self {
            shared,
            ring_file: owner.file(&config.ring_dir),
            policy,
            streamer,
            served: Mutex::default(),
            places: Mutex::default(),
        };
        for (volume, filter) in filters {
            if let Err(error) = group.serve(&volume, filter) {
                if reissued.contains(&volume.index) {
                    // Nobody knows whether what waits in the device will ever come. It is in the group, so this cannot fail.
                    let _ = group.shared.capture.resync(VolumeIndex(volume.index));
                }
                if volume.ublk.is_some() {
                    // Its source is let go: the supervisor serves it, without a filter.
                    group.shared.sync.remove(VolumeIndex(volume.index));
                }
                group.shared.volume_failed(&volume, &error);
            } else if let Some(attached) = found.waiting.remove(&volume.index) {
                group.note_waiting(VolumeIndex(volume.index), attached);
                group.forget_evidence(&volume);
            }
        }
        for volume in pending {
            let nothing = "its device was taken out of the path without an orderly stop";
            let known = evidence.get(&volume.index).cloned();
            let known = known.or_else(|| crash.clone().filter(|_| attached.from_log));
            let trust = known.map_or_else(|| Trust::Compare(nothing.into()), Trust::Evidence);
            if let Err(error) = group.attach_again(VolumeIndex(volume.index), trust) {
                group.shared.volume_failed(&volume, &error);
                group.out(VolumeIndex(volume.index));
            }
            group.forget_evidence(&volume);
        }
        group.note_in_path();
        Ok(group)
    }

    /// Notes that all requests go through us from here on, if they do: until a host that goes down has the next boot, or we leave the path.
    fn note_in_path(&self) {
        let out = |place: &Place| matches!(place, Place::Out(_));
        if self.shared.activity.is_none() || self.places().values().any(out) {
            return;
        }
        match boot_text() {
            Ok(boot) => _ = self.shared.update_state(|state| state.boot = Some(boot)),
            Err(error) => {
                tracing::warn!(error = crate::error::chain(&error), "after a crash of the host everything is compared")
            }
        }
    }

    /// What was noted of `volume` at the last stop has been asked.
    fn forget_evidence(&self, volume: &VolumeState) {
        if volume.evidence.is_some() {
            // If it stays, the next start compares.
            self.shared.update_state(|state| {
                if let Some(known) = state.volumes.iter_mut().find(|known| known.index == volume.index) {
                    known.evidence = None;
                }
            });
        }
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<VolumeIndex, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<VolumeIndex, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, volume: &VolumeState, filter: Arc<FilterVolume<FileDevice>>) -> Result<()> {
        let index = VolumeIndex(volume.index);
        let description = format!("{}/{}", self.shared.name, volume.name);
        let server =
            Frontend::parse(&volume.frontend)?.serve(&description, volume.ublk.as_ref(), Arc::clone(&filter))?;
        let disk = server.disk();
        self.served().insert(index, Served { filter, server: Arc::new(server) });
        if disk.is_some() && !self.note_disk(index, |kept| *kept = disk) {
            // Served it is all the same (I1); state.failed is raised.
            tracing::error!(volume = description, "the next agent will not find this volume's block device");
        }
        Ok(())
    }

    /// Notes what becomes of a volume's block device, durably.
    fn note_disk(&self, index: VolumeIndex, note: impl FnOnce(&mut Option<UblkDisk>)) -> bool {
        self.shared.update_state(|state| {
            if let Some(volume) = state.volumes.iter_mut().find(|volume| volume.index == index.0) {
                note(&mut volume.ublk);
            }
        })
    }

    /// Protects one more volume.
    pub(crate) fn protect(&self, new: NewVolume, name: Name) -> Result<VolumeState> {
        let state = self.shared.state().clone();
        if state.volumes.iter().any(|volume| volume.name == name.as_str()) {
            return Err(Error::Refused {
                what: format!("volume {}/{name}", self.shared.name),
                reason: "a volume of this name is protected already".into(),
                hint: "give this one another --name".into(),
            });
        }
        let NewVolume { source, frontend, place } = new;
        let (identity, size, block) = match &place {
            NewPlace::Source(backing) => (&backing.id, backing.geometry.size, backing.geometry.logical_block),
            NewPlace::Mapped(upper) => (&upper.identity, upper.size, upper.block),
        };
        let left = state.left.iter().find(|left| left.name == name.as_str());
        if let Some(left) = left.filter(|left| left.size > size || left.block != block) {
            return Err(Error::Refused {
                what: format!("volume {}/{name}", self.shared.name),
                reason: format!(
                    "the target keeps history of one of this name with {} bytes in blocks of {}",
                    left.size, left.block
                ),
                hint: "give this one another --name".into(),
            });
        }
        let volume = VolumeState {
            index: left.map_or(state.next_volume, |left| left.index),
            name: name.to_string(),
            source,
            identity: identity.as_str().to_owned(),
            size,
            block,
            frontend,
            joined: false,
            ublk: left.and_then(|left| left.ublk.clone()),
            mapped: match &place {
                NewPlace::Source(_) => None,
                NewPlace::Mapped(upper) => Some(upper.mapped.clone()),
            },
            evidence: None,
            verify: None,
        };
        if usize::from(volume.index) >= farshore_ring::MAX_VOLUMES {
            return Err(Error::Refused {
                what: format!("group {}", self.shared.name),
                reason: format!("has had {} volumes; numbers are not used again", farshore_ring::MAX_VOLUMES),
                hint: "protect it in another group".into(),
            });
        }
        // Durable before the first write passes: a crash from here on finds the volume in the state.
        let recorded = self.shared.update_state(|state| {
            state.next_volume = state.next_volume.max(volume.index + 1);
            state.left.retain(|left| left.index != volume.index);
            state.volumes.push(volume.clone());
        });
        if !recorded {
            return Err(Error::failed(format!("state of group {}", self.shared.name), "cannot be written"));
        }
        // Before sync can say anything of it.
        self.streamer.set_volumes(declarations(&self.shared.state()));
        let served = match place {
            NewPlace::Source(backing) => self
                .shared
                .add(&volume, SourceFile(backing), Content::Unknown, false, Marks::None)
                .and_then(|filter| self.serve(&volume, filter)),
            NewPlace::Mapped(_) => self.attach_new(VolumeIndex(volume.index)),
        };
        served.inspect_err(|_| {
            // What cannot be served is not protected; the source is as it was.
            if let Err(error) = self.forget(VolumeIndex(volume.index)) {
                tracing::error!(%error, "a volume that could not be served stays in the state");
            }
        })?;
        Ok(volume)
    }

    /// Ends the protection of a volume.
    ///
    /// # Errors
    /// [`Error::Refused`]: its block device is in use; it is protected as before.
    pub(crate) fn unprotect(&self, index: VolumeIndex) -> Result<()> {
        let mapped = self.volumes().into_iter().find(|volume| volume.index == index.0).and_then(|it| it.mapped);
        if let Some(mapped) = mapped {
            self.detach(index)?;
            self.note_disk(index, removed);
            self.forget(index)?;
            interpose::drop_stub(&mapped, true);
            return Ok(());
        }
        let server = self.served().get(&index).map(|served| Arc::clone(&served.server));
        match server {
            Some(server) => match server.stop() {
                Ok(()) => _ = self.served().remove(&index),
                Err(NotStopped::InUse(error) | NotStopped::Failed(error)) => return Err(error),
            },
            // Not served, for want of its source perhaps: its device may wait.
            None => {
                let disk = self.volumes().into_iter().find(|volume| volume.index == index.0).and_then(|it| it.ublk);
                disk.as_ref().map_or(Ok(()), frontend::remove_waiting)?;
            }
        }
        self.note_disk(index, removed);
        self.forget(index)
    }

    fn forget(&self, index: VolumeIndex) -> Result<()> {
        let subject = self.shared.volume_subject(index);
        self.shared.sync.remove(index);
        // Not there: it could not be added, or the state could not be written the last time.
        if let Err(error) = self.shared.capture.remove_volume(index) {
            tracing::info!(volume = subject, %error, "nothing of the volume was captured");
        }
        self.shared.alarms.forget(&subject);
        let recorded = self.shared.update_state(|state| {
            let gone = state.volumes.extract_if(.., |volume| volume.index == index.0).collect::<Vec<_>>();
            state.left.extend(gone);
        });
        if !recorded {
            return Err(Error::failed(format!("state of group {}", self.shared.name), "cannot be written"));
        }
        self.streamer.set_volumes(declarations(&self.shared.state()));
        Ok(())
    }

    /// The group's volumes, as kept.
    pub(crate) fn volumes(&self) -> Vec<VolumeState> {
        self.shared.state().volumes.clone()
    }

    /// The block devices that outlive this process, and whether they are served now.
    pub(crate) fn roster(&self) -> Vec<RosterDisk> {
        let group = self.shared.name.to_string();
        let disk_of = |volume: VolumeState| {
            let disk = volume.ublk.clone().filter(|disk| disk.sequence.is_some())?;
            let served = self.device(VolumeIndex(volume.index)).is_some();
            let name = format!("{group}/{}", volume.name);
            let backing = volume.backing_node().ok()?;
            let identity = match volume.mapped {
                None => volume.identity,
                // Found by its own name just now.
                Some(_) => BackingId::of_block_device(&backing).ok()?.0.as_str().to_owned(),
            };
            Some(RosterDisk { volume: name, group: group.clone(), disk, backing, identity, served })
        };
        self.volumes().into_iter().filter_map(disk_of).collect()
    }

    /// What serves, to be looked at without holding anything: with the name of its volume.
    pub(crate) fn servers(&self) -> Vec<(String, Arc<Server>)> {
        let served = self.served();
        served.iter().map(|(&index, it)| (self.shared.volume_subject(index), Arc::clone(&it.server))).collect()
    }

    /// Looks whether anybody else has a source open for writing: a process that came before the volume was served, or that opened it
    /// all the same, which nothing in the kernel keeps it from. (Of a volume behind the device mapper that is how it is used.)
    pub(crate) fn watch_writers(&self) {
        for volume in self.volumes().iter().filter(|volume| volume.mapped.is_none()) {
            let subject = self.shared.volume_subject(VolumeIndex(volume.index));
            match writer_of(&volume.source) {
                Some(who) => {
                    let text = format!(
                        "{who} has {} open for writing: what it writes there is not captured, and not known to be missing",
                        volume.source.display()
                    );
                    self.shared.alarms.raise(code::OTHER_WRITER, &subject, text);
                }
                None => self.shared.alarms.clear(code::OTHER_WRITER, &subject),
            }
        }
    }

    /// What a guest opens; none while it cannot be served.
    pub(crate) fn device(&self, index: VolumeIndex) -> Option<String> {
        let mapped = self.shared.state().volumes.iter().find(|volume| volume.index == index.0)?.mapped.clone();
        if let Some(mapped) = mapped {
            return self.mapped_device(index, &mapped);
        }
        self.served().get(&index).and_then(|served| served.server.address())
    }

    /// Figures of the stream.
    pub(crate) fn status(&self) -> Option<StreamerStatus> {
        self.streamer.status()
    }

    /// Source policies.
    pub(crate) fn policy(&self) -> &GroupPolicy {
        &self.policy
    }

    /// Stops in order: no more requests, backing devices flushed, everything shipped if the link allows before `deadline`. What is
    /// not durable at the target is kept as marks; then the ring is not needed any more.
    ///
    /// A volume behind the device mapper is taken out of the path; its users go on. Another block device in use is not taken away: it
    /// is served for as long as the process lives, and waits for the next agent then; so the ring stays as a dead agent would leave it.
    pub(crate) fn stop(self, deadline: Now) -> Result<()> {
        // From here on somebody may write past us, and a host that goes down leaves no trace of it.
        if !self.shared.update_state(|state| state.boot = None) {
            let what = format!("state of group {}", self.shared.name);
            return Err(Error::failed(what, "cannot be written; its volumes stay as they are for the next agent"));
        }
        let (mut noted, all_out) = self.detach_all();
        let (mut filters, mut stopped) = (Vec::new(), Vec::new());
        let mut in_use = !all_out;
        for (index, served) in std::mem::take(&mut *self.served()) {
            if self.places().contains_key(&index) {
                // It could not be taken out of the path, and is served on.
                filters.push(served.filter);
                continue;
            }
            match served.server.stop() {
                Ok(()) => {
                    self.note_disk(index, removed);
                    stopped.push(index);
                }
                Err(NotStopped::InUse(reason)) => {
                    let volume = self.shared.volume_subject(index);
                    tracing::warn!(volume, %reason, "the volume's device stays, and waits for the next agent");
                    in_use = true;
                }
                Err(NotStopped::Failed(error)) => return Err(error),
            }
            filters.push(served.filter);
        }
        for filter in &filters {
            let file = &filter.file().backing().file;
            file.sync_data().map_err(|error| Error::failed("flush of a protected device", error))?;
        }
        self.shared.sync.stop();
        let last = self.streamer.stop(deadline.since(clock::now()));
        // Nothing of ours writes any more, and nobody else can before the filters go.
        noted.extend(stopped.into_iter().filter_map(|index| Some((index, self.shared.evidence_of(index)?))));
        let note = |state: &mut GroupState| {
            for volume in &mut state.volumes {
                let of = noted.iter().find(|(index, _)| index.0 == volume.index);
                volume.evidence = of.map(|(_, evidence)| evidence.clone());
            }
        };
        if in_use {
            // Requests still come, and are captured in the ring. Their marks are in it, too.
            self.shared.update_state(note);
            return Ok(());
        }
        let shared = self.shared;
        mark_unshipped(&shared)?;
        for volume in shared.capture.volumes() {
            volume.in_flight().move_all_to(volume.missing());
            let mut words = vec![0; volume.missing().words()];
            volume.missing().for_each_word(|at, word| words[at] = word);
            shared.store.write_bitmap(&shared.name, volume.index().0, &words)?;
        }
        let joined = shared.capture.joined();
        let (number, chain) = last.stream.durable;
        let complete = shared.captures_all();
        let written = shared.update_state(|state| {
            note(state);
            state.attached = false;
            state.boot = None;
            // Of a volume that was not captured, no marks were saved.
            state.compare_everything |= !complete;
            state.last_number = number.0;
            state.last_chain = chain.to_string();
            for volume in &mut state.volumes {
                volume.joined = joined.contains(&VolumeIndex(volume.index));
            }
        });
        if !written {
            return Err(Error::failed(
                format!("state of group {}", shared.name),
                "cannot be written; the ring is kept",
            ));
        }
        drop(filters);
        match std::fs::remove_file(&self.ring_file) {
            // Somebody else did; it holds nothing that is not kept.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(|error| Error::io("remove ring", &self.ring_file, error)),
        }
    }
}

impl Cuts for Group {
    fn is_whole(&self) -> bool {
        let capture = &self.shared.capture;
        let volumes = capture.volumes();
        !volumes.is_empty()
            && volumes.iter().all(|volume| volume.joined())
            && !capture.ring().is_closed()
            && !capture.event_open()
    }

    fn head(&self) -> u64 {
        self.shared.capture.ring().head()
    }

    fn order(&self, name: &Name) {
        self.shared.order_bookmark(name.clone());
        self.streamer.waker().wake();
    }
}

/// The device is no more; its number is asked for again.
fn removed(disk: &mut Option<UblkDisk>) {
    if let Some(disk) = disk {
        disk.sequence = None;
    }
}

/// Volumes that points include, by what the stream says.
struct Joined {
    /// At the end of what is in the ring.
    all: BTreeSet<VolumeIndex>,
    /// At the last batch that is durable at the target.
    at_target: BTreeSet<VolumeIndex>,
    /// Something of this life of the ring may be at the target: it was greeted for.
    sent: bool,
}

/// A ring that was found says exactly who joined. With a new one after a clean stop the state does. After a lost ring nobody
/// knows: all are taken as joined, so that no point is made before all were compared; the target's greeting corrects that.
///
/// And what a ring that was found holds, or was about to.
fn joined_in_stream(attached: &Attached, state: &GroupState) -> Result<(Joined, Vec<WritingRange>)> {
    let indices = || state.volumes.iter().map(|volume| VolumeIndex(volume.index));
    if !attached.resumed {
        let lost = state.compare_everything || attached.lost || attached.from_log;
        let before = attached.logged.first().map(|first| first.before.joined);
        let all: BTreeSet<_> = state
            .volumes
            .iter()
            .filter(|volume| lost || volume.joined)
            .map(|volume| VolumeIndex(volume.index))
            .collect();
        let at_target =
            all.iter().copied().filter(|index| before.is_none_or(|before| before.contains(*index))).collect();
        return Ok((Joined { at_target, all, sent: false }, Vec::new()));
    }
    let mut ring = CaptureRing::new(Arc::clone(&attached.ring))
        .map_err(|error| Error::failed("ring", crate::error::chain(&error)))?;
    let StreamState { mut flags, sent, .. } = ring.load_state().unwrap_or_default();
    let at_target = indices().filter(|index| flags.joined.contains(*index)).collect();
    // What is in the disk log goes before what is in the ring.
    flags = attached.logged.last().map_or(flags, |last| last.after);
    let mut held = attached.writing.clone();
    while let Some(entry) = ring.next_entry().map_err(|error| Error::failed("ring", crate::error::chain(&error)))? {
        flags.apply(entry.kind, entry.volume);
        if entry.kind.changes_content() {
            held.push(WritingRange { volume: entry.volume.0, offset: entry.offset, length: entry.length });
        }
    }
    ring.rewind();
    let all = indices().filter(|index| flags.joined.contains(*index)).collect();
    Ok((Joined { all, at_target, sent }, held))
}

/// Marks what the ring still holds: it is given up, and must be compared.
fn mark_unshipped(shared: &Shared) -> Result<()> {
    let ring = shared.capture.ring();
    let Some(mut consumer) = ring.consumer() else {
        return Err(Error::failed("ring", "has a consumer still"));
    };
    consumer.rewind();
    while let Some(entry) = consumer.next() {
        let changes = farshore_proto::record::Kind::from_u8(entry.desc.kind).is_some_and(|kind| kind.changes_content());
        if let Some(volume) = shared.capture.volume(VolumeIndex(entry.desc.volume)).filter(|_| changes) {
            volume.missing().set_range(entry.desc.offset, entry.desc.length);
        }
    }
    // A thread that died between claim and publication: what lies behind it cannot be read here, but by the next start.
    if consumer.position() < ring.head() {
        return Err(Error::failed("ring", "holds an unfinished entry; it is kept"));
    }
    Ok(())
}

fn declarations(state: &GroupState) -> Vec<VolumeDecl> {
    state
        .volumes
        .iter()
        .filter_map(|volume| {
            Some(VolumeDecl {
                index: VolumeIndex(volume.index),
                name: Name::new(volume.name.clone()).ok()?,
                size: volume.size,
                block: volume.block,
            })
        })
        .collect()
}

fn capture_config(policy: &GroupPolicy) -> CaptureConfig {
    CaptureConfig {
        cut_min: policy.cut_min,
        cut_max: policy.cut_max,
        stall_max: policy.stall_max,
        ..CaptureConfig::default()
    }
}
