//! One group: its ring, capture, sync, stream, and the front ends of its volumes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_blkfilter::sync::SyncConfig;
use farshore_blkfilter::{Alarm, BackingFile, Buf, CaptureConfig, CaptureGroup, Content, FilterVolume, VolumeSpec};
use farshore_link::identity::Identity;
use farshore_link::quic::SourceLinkConfig;
use farshore_nbd::{Listen, Server, ServerConfig, ServerHandle};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::session::SourceConfig;
use farshore_proto::{BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, Name, SLOT_BYTES, VolumeIndex};
use farshore_streamer::{
    CaptureRing, Granularity, RingSource, StreamerConfig, StreamerHandle, StreamerStatus, VolumeSet,
};
use farshore_uring::{
    Backing, BackingOptions, DirStorage, Direct, Errno, Extent, FileDevice, FileSlot, Geometry, Io, open_backing,
};

use crate::alarms::{Alarms, code};
use crate::attach::{Attached, RingOwner};
use crate::config::{AgentConfig, CompressionPolicy, GroupPolicy};
use crate::hooks::Hooks;
use crate::points::PointBoard;
use crate::state::{GroupState, StateDir, VolumeState};
use crate::sync_thread::{SyncOrder, SyncThread};
use crate::{Error, Result};

/// How long a stop waits until everything written is durable at the target. What is not by then is kept as marks.
const DRAIN: Duration = Duration::from_secs(10);

/// What a group's threads share.
pub(crate) struct Shared {
    pub name: Name,
    pub capture: Arc<CaptureGroup>,
    pub sync: SyncThread,
    pub alarms: Arc<Alarms>,
    pub points: PointBoard,
    store: StateDir<DirStorage>,
    state: Mutex<GroupState>,
    bookmarks: Mutex<VecDeque<Name>>,
    ring_closed: AtomicU64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, GroupState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn compares_everything(&self) -> bool {
        self.state().compare_everything
    }

    /// Changes the group's state, durably. `false`: it could not be written, and is as before.
    pub(crate) fn update_state(&self, change: impl FnOnce(&mut GroupState)) -> bool {
        let mut state = self.state();
        let mut new = state.clone();
        change(&mut new);
        if new == *state {
            return true;
        }
        match self.store.write_group(&self.name, &new) {
            Ok(()) => {
                *state = new;
                self.alarms.clear(code::STATE, self.name.as_str());
                true
            }
            Err(error) => {
                self.alarms.raise(code::STATE, self.name.as_str(), crate::error::chain(&error));
                false
            }
        }
    }

    pub(crate) fn take_bookmarks(&self) -> VecDeque<Name> {
        std::mem::take(&mut *self.bookmarks.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A named cut is wanted; asked for twice before it is made, it is made once.
    pub(crate) fn order_bookmark(&self, name: Name) {
        let mut bookmarks = self.bookmarks.lock().unwrap_or_else(PoisonError::into_inner);
        if !bookmarks.contains(&name) {
            bookmarks.push_back(name);
        }
    }

    /// Every volume of the state is captured, if only as absent.
    pub(crate) fn captures_all(&self) -> bool {
        self.state().volumes.iter().all(|volume| self.capture.volume(VolumeIndex(volume.index)).is_some())
    }

    fn volume_subject(&self, index: VolumeIndex) -> String {
        let name = self.capture.volume(index).map_or_else(|| index.to_string(), |volume| volume.name().to_string());
        format!("{}/{name}", self.name)
    }

    /// Passes on what the filter has to say.
    pub(crate) fn take_alarms(&self) {
        let group = self.name.as_str();
        while let Some(event) = self.capture.poll_alarm() {
            let set = |code, text: &str| match event.raised {
                true => self.alarms.raise(code, group, text),
                false => self.alarms.clear(code, group),
            };
            match event.alarm {
                Alarm::RingClosed => {
                    if event.raised {
                        self.ring_closed.fetch_add(1, Ordering::Relaxed);
                    }
                    set(
                        code::RING_CLOSED,
                        "the ring is full: writes are marked and will be sent by a resync; no new points until then",
                    );
                }
                Alarm::EventOpen => {
                    set(code::RESYNC, "source and replica may differ; no new points until the resync ends")
                }
                Alarm::WriteFailed { volume, offset, len, errno } => self.alarms.raise(
                    code::WRITE_FAILED,
                    &self.volume_subject(volume),
                    format!("the device failed a write of {len} bytes at {offset} (errno {errno}); the guest was told"),
                ),
                Alarm::Unreadable { volume, offset, len } => self.alarms.raise(
                    code::UNREADABLE,
                    &self.volume_subject(volume),
                    format!("{len} bytes at {offset} cannot be read; points lack them"),
                ),
                Alarm::QueueDropped { volume, requests } => self.alarms.raise(
                    code::DROPPED,
                    &self.volume_subject(volume),
                    format!("{requests} requests were dropped in flight; their ranges are compared"),
                ),
            }
            self.points.poke();
        }
    }
}

/// One served volume.
struct Served {
    filter: Arc<FilterVolume<FileDevice>>,
    server: ServerHandle,
}

/// A running group.
pub(crate) struct Group {
    pub shared: Arc<Shared>,
    config: Arc<AgentConfig>,
    ring_file: PathBuf,
    policy: GroupPolicy,
    streamer: StreamerHandle,
    served: Mutex<BTreeMap<VolumeIndex, Served>>,
}

/// What a group needs of the agent.
#[derive(Clone)]
pub(crate) struct Context {
    pub config: Arc<AgentConfig>,
    pub identity: Arc<Identity>,
    pub store: StateDir<DirStorage>,
    pub alarms: Arc<Alarms>,
}

impl Group {
    /// Starts a group from its state: finds its ring, serves its volumes, connects. A volume that cannot be served is left
    /// out with an alarm; the others are served.
    pub(crate) fn start(context: &Context, name: Name, mut state: GroupState) -> Result<Self> {
        let Context { config, identity, store, alarms } = context;
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
        let attached = owner.attach(&config.ring_dir, config.ring, &mut state, store)?;
        let in_stream = joined_in_stream(&attached, &state)?;
        if !attached.ring.locked() {
            alarms.raise(
                code::UNLOCKED,
                name.as_str(),
                "the ring is not locked in memory (raise the memory-lock limit)",
            );
        }
        let policy = config.policy(&name);
        let resumed = attached.resumed;
        let ring = Arc::clone(&attached.ring);
        let capture = CaptureGroup::new(Arc::clone(&ring), capture_config(&policy));
        let sync_config = SyncConfig { rate: policy.sync_rate, ..SyncConfig::default() };
        let sync = SyncThread::start(Arc::clone(&capture), sync_config, host_key.dedup_key(group_id))?;
        let shared = Arc::new(Shared {
            name: name.clone(),
            capture,
            sync,
            alarms: Arc::clone(alarms),
            points: PointBoard::default(),
            store: store.clone(),
            state: Mutex::new(state.clone()),
            bookmarks: Mutex::default(),
            ring_closed: AtomicU64::new(0),
        });
        let volumes: Vec<(VolumeState, Result<FilterFile>)> =
            state.volumes.iter().map(|volume| (volume.clone(), open_volume(volume, config))).collect();
        let mut filters = Vec::new();
        for (volume, opened) in volumes {
            let joined = in_stream.all.contains(&VolumeIndex(volume.index));
            // A ring that was found does not tell "all of it is in the stream" from "killed before it was marked", or "left".
            let known = !resumed || (joined && volume.joined);
            let content = if known { attached.content } else { Content::Unknown };
            match opened.and_then(|file| shared.add(&volume, file, content, joined, attached.clean)) {
                Ok(filter) => filters.push((volume, filter)),
                Err(error) => {
                    shared.volume_failed(&volume, &error);
                    shared.add_absent(&volume, joined);
                }
            }
        }
        if resumed {
            shared.capture.begin_event();
        }
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
        if policy.every_write {
            settings.granularity = Granularity::Write;
        }
        let mut link = SourceLinkConfig::new(config.upstream.clone());
        link.channel = group_id.0;
        link.connections = u16::try_from(config.connections).unwrap_or(2);
        let hooked = Arc::clone(&shared);
        let streamer = StreamerHandle::start(settings, link, Arc::clone(identity), &ring, move |waker| {
            hooked.capture.set_consumer_waker(move || waker.wake());
            Box::new(Hooks::new(Arc::clone(&hooked), in_stream.at_target, !resumed))
        })
        .map_err(|error| Error::failed(format!("group {name}"), crate::error::chain(&error)))?;
        let group = Self {
            shared,
            config: Arc::clone(config),
            ring_file: owner.file(&config.ring_dir),
            policy,
            streamer,
            served: Mutex::default(),
        };
        for (volume, filter) in filters {
            if let Err(error) = group.serve(&volume, filter) {
                group.shared.volume_failed(&volume, &error);
            }
        }
        Ok(group)
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<VolumeIndex, Served>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, volume: &VolumeState, filter: Arc<FilterVolume<FileDevice>>) -> Result<()> {
        let subject = format!("volume {}/{}", self.shared.name, volume.name);
        let mut config = ServerConfig::new("", parse_frontend(&volume.frontend)?);
        config.description = format!("{}/{}", self.shared.name, volume.name);
        let server = Server::start(config, Arc::clone(&filter)).map_err(|error| Error::failed(subject, error))?;
        self.served().insert(VolumeIndex(volume.index), Served { filter, server });
        Ok(())
    }

    /// Protects one more volume.
    pub(crate) fn protect(&self, source: &Path, name: Name, frontend: String) -> Result<VolumeState> {
        parse_frontend(&frontend)?;
        let backing = open_source(source, &self.config)?;
        let state = self.shared.state().clone();
        if state.volumes.iter().any(|volume| volume.name == name.as_str()) {
            return Err(Error::Refused {
                what: format!("volume {}/{name}", self.shared.name),
                reason: "a volume of this name is protected already".into(),
                hint: "give this one another --name".into(),
            });
        }
        let left = state.left.iter().find(|left| left.name == name.as_str());
        let geometry = (backing.geometry.size, backing.geometry.logical_block);
        if let Some(left) = left.filter(|left| (left.size, left.block) != geometry) {
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
            source: source.to_owned(),
            identity: backing.id.as_str().to_owned(),
            size: backing.geometry.size,
            block: backing.geometry.logical_block,
            frontend,
            joined: false,
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
        let served = self
            .shared
            .add(&volume, FilterFile(backing), Content::Unknown, false, false)
            .and_then(|filter| self.serve(&volume, filter));
        served.inspect_err(|_| {
            // What cannot be served is not protected; the source is as it was.
            if let Err(error) = self.forget(VolumeIndex(volume.index)) {
                tracing::error!(%error, "a volume that could not be served stays in the state");
            }
        })?;
        Ok(volume)
    }

    /// Ends the protection of a volume.
    pub(crate) fn unprotect(&self, index: VolumeIndex) -> Result<()> {
        if let Some(served) = self.served().remove(&index) {
            served.server.stop().map_err(|error| Error::failed("front end", error))?;
        }
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

    /// Orders a named point; the caller waits for it at the board.
    pub(crate) fn bookmark(&self, name: Name) {
        self.shared.points.forget(&name);
        self.shared.order_bookmark(name);
        self.streamer.waker().wake();
    }

    /// The group's volumes, as kept.
    pub(crate) fn volumes(&self) -> Vec<VolumeState> {
        self.shared.state().volumes.clone()
    }

    /// Address of a volume's front end; none while it cannot be served.
    pub(crate) fn device(&self, index: VolumeIndex) -> Option<String> {
        self.served().get(&index).and_then(|served| served.server.uri())
    }

    /// Figures of the stream.
    pub(crate) fn status(&self) -> Option<StreamerStatus> {
        self.streamer.status()
    }

    /// How often the ring ran full.
    pub(crate) fn ring_closed_count(&self) -> u64 {
        self.shared.ring_closed.load(Ordering::Relaxed)
    }

    /// Source policies.
    pub(crate) fn policy(&self) -> &GroupPolicy {
        &self.policy
    }

    /// Stops in order: no more requests, backing devices flushed, everything shipped if the link allows. What is not
    /// durable at the target is kept as marks; then the ring is not needed any more.
    pub(crate) fn stop(self) -> Result<()> {
        let mut filters = Vec::new();
        for (_, served) in std::mem::take(&mut *self.served()) {
            served.server.stop().map_err(|error| Error::failed("front end", error))?;
            filters.push(served.filter);
        }
        for filter in &filters {
            let file = &filter.file().backing().file;
            file.sync_data().map_err(|error| Error::failed("flush of a protected device", error))?;
        }
        self.shared.sync.stop();
        let last = self.streamer.stop(DRAIN);
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
            state.attached = false;
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
        std::fs::remove_file(&self.ring_file).map_err(|error| Error::io("remove ring", &self.ring_file, error))
    }
}

impl Shared {
    /// Adds an opened volume to capture and sync. `clean`: the last stop was in order, so the saved marks are complete.
    fn add(
        &self,
        volume: &VolumeState,
        file: FilterFile,
        content: Content,
        joined: bool,
        clean: bool,
    ) -> Result<Arc<FilterVolume<FileDevice>>> {
        let saved = match clean {
            // Saved marks that cannot be read are none: everything is compared, and the guest has its volume.
            true => self.store.read_bitmap(&self.name, volume.index).unwrap_or_else(|error| {
                tracing::warn!(error = crate::error::chain(&error), "saved marks are lost: the volume is compared");
                None
            }),
            false => None,
        };
        // A clean start without marks knows nothing of the volume.
        let content = if clean && saved.is_none() { Content::Unknown } else { content };
        let filter = self.capture_volume(volume, FileDevice::new(file.0), content, joined)?;
        if let (Some(words), Some(captured)) = (saved, self.capture.volume(VolumeIndex(volume.index))) {
            for (at, word) in words.iter().enumerate() {
                for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                    let offset = (at as u64 * 64 + bit) * SLOT_BYTES;
                    if offset < captured.size() {
                        self.capture.mark_missing(&captured, offset, SLOT_BYTES.min(captured.size() - offset));
                    }
                }
            }
        }
        self.sync.tell(SyncOrder::Add(Arc::clone(&filter)));
        Ok(filter)
    }

    fn capture_volume<F: BackingFile>(
        &self,
        volume: &VolumeState,
        file: F,
        content: Content,
        joined: bool,
    ) -> Result<Arc<FilterVolume<F>>> {
        let name = Name::new(volume.name.clone())?;
        let mut id = [0; 16];
        let text = format!("{} {} {}", self.name, volume.index, volume.identity);
        id.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
        let spec = VolumeSpec { index: VolumeIndex(volume.index), name, id, content, joined };
        self.capture.add_volume(spec, file).map_err(|error| {
            Error::failed(format!("volume {}/{}", self.name, volume.name), crate::error::chain(&error))
        })
    }

    /// Captures a volume that cannot be opened as one of which everything is missing. Sync never hears of it, so while it is absent
    /// no point of the group claims to be whole (its own last writes may be only marks), "compare everything" stays, and a stop
    /// saves that all of it must be compared.
    fn add_absent(&self, volume: &VolumeState, joined: bool) {
        if self.capture.volume(VolumeIndex(volume.index)).is_some() {
            return;
        }
        if let Err(error) = self.capture_volume(volume, Absent::new(volume), Content::Unknown, joined) {
            tracing::error!(error = crate::error::chain(&error), "an absent volume cannot be marked");
        }
    }

    /// A volume that cannot be served may be changed by anybody: the next time everything is compared.
    fn volume_failed(&self, volume: &VolumeState, error: &Error) {
        let text = format!("is not served: {}", crate::error::chain(error));
        self.alarms.raise(code::UNAVAILABLE, &format!("{}/{}", self.name, volume.name), text);
        self.update_state(|state| state.compare_everything = true);
    }
}

/// Stands for a source that cannot be opened. Nobody reads or writes it.
struct Absent(Geometry);

impl Absent {
    fn new(volume: &VolumeState) -> Self {
        Self(Geometry {
            size: volume.size,
            logical_block: volume.block,
            optimal_block: volume.block,
            max_request: volume.block,
            max_discard: 0,
            read_only: true,
            discard: false,
        })
    }
}

impl BackingFile for Absent {
    fn geometry(&self) -> Geometry {
        self.0
    }

    fn register<I: Io<Buf>>(&self, _io: &mut I) -> std::io::Result<FileSlot> {
        Err(std::io::ErrorKind::NotFound.into())
    }

    fn extents(&self, _offset: u64, _len: u64) -> std::result::Result<Vec<Extent>, Errno> {
        Ok(Vec::new())
    }
}

/// A source that passed all checks.
struct FilterFile(Backing);

fn open_source(source: &Path, config: &AgentConfig) -> Result<Backing> {
    let direct = if config.direct { Direct::Auto } else { Direct::Off };
    let opened = open_backing(source, BackingOptions { direct, read_only: false }).map_err(|error| {
        let what = format!("source {}", source.display());
        let kind = error.kind();
        if kind == std::io::ErrorKind::NotFound {
            Error::NotFound { what: "source", name: source.display().to_string(), hint: "" }
        } else if matches!(kind, std::io::ErrorKind::ResourceBusy | std::io::ErrorKind::WouldBlock) {
            Error::Refused {
                what,
                reason: format!("is in use: {}", crate::error::chain(&error)),
                hint: "unmount it, or end whatever uses it; a volume is written through Farshore only".into(),
            }
        } else {
            Error::Failed { what, reason: crate::error::chain(&error) }
        }
    });
    opened.and_then(|backing| match backing.geometry.size {
        0 => Err(Error::failed(format!("source {}", source.display()), "is empty")),
        _ => Ok(backing),
    })
}

fn open_volume(volume: &VolumeState, config: &AgentConfig) -> Result<FilterFile> {
    let backing = open_source(&volume.source, config)?;
    let refused = |reason: String| {
        Err(Error::Refused {
            what: format!("source {}", volume.source.display()),
            reason,
            hint: "bring the device back, or `farshore unprotect` the volume and protect the new one".into(),
        })
    };
    if backing.geometry.size != volume.size {
        return refused(format!("has {} bytes, it was protected with {}", backing.geometry.size, volume.size));
    }
    if backing.id.as_str() != volume.identity {
        return refused(format!(
            "is another device than the one protected ({} is not {})",
            backing.id, volume.identity
        ));
    }
    if backing.geometry.logical_block != volume.block {
        return refused(format!("has blocks of {} bytes now, not {}", backing.geometry.logical_block, volume.block));
    }
    Ok(FilterFile(backing))
}

/// Volumes that points include, by what the stream says.
struct Joined {
    /// At the end of what is in the ring.
    all: BTreeSet<VolumeIndex>,
    /// At the last batch that is durable at the target.
    at_target: BTreeSet<VolumeIndex>,
}

/// A ring that was found says exactly who joined. With a new one after a clean stop the state does. After a lost ring nobody
/// knows: all are taken as joined, so that no point is made before all were compared; the target's greeting corrects that.
fn joined_in_stream(attached: &Attached, state: &GroupState) -> Result<Joined> {
    let indices = || state.volumes.iter().map(|volume| VolumeIndex(volume.index));
    if !attached.resumed {
        let lost = state.compare_everything;
        let all: BTreeSet<_> = state
            .volumes
            .iter()
            .filter(|volume| lost || volume.joined)
            .map(|volume| VolumeIndex(volume.index))
            .collect();
        return Ok(Joined { at_target: all.clone(), all });
    }
    let mut ring = CaptureRing::new(Arc::clone(&attached.ring))
        .map_err(|error| Error::failed("ring", crate::error::chain(&error)))?;
    let mut flags = ring.load_state().unwrap_or_default().flags;
    let at_target = indices().filter(|index| flags.joined.contains(*index)).collect();
    while let Some(entry) = ring.next_entry().map_err(|error| Error::failed("ring", crate::error::chain(&error)))? {
        flags.apply(entry.kind, entry.volume);
    }
    ring.rewind();
    Ok(Joined { all: indices().filter(|index| flags.joined.contains(*index)).collect(), at_target })
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

/// `nbd+unix:PATH` or `nbd+tcp:IP:PORT`.
pub(crate) fn parse_frontend(text: &str) -> Result<Listen> {
    let bad = |reason: &str| Err(Error::Setting { key: "frontend", reason: format!("{text:?} {reason}") });
    if let Some(path) = text.strip_prefix("nbd+unix:") {
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return bad("needs an absolute path");
        }
        return Ok(Listen::Unix { path, mode: 0o600 });
    }
    if let Some(address) = text.strip_prefix("nbd+tcp:") {
        return match address.parse::<SocketAddr>() {
            Ok(address) => Ok(Listen::Tcp(address)),
            Err(_) => bad("needs IP:PORT"),
        };
    }
    bad("is neither nbd+unix:PATH nor nbd+tcp:IP:PORT")
}
