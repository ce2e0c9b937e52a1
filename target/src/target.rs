//! A target: the data root, who may write what, and its streams.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use farshore_proto::message::{Hello, RefuseCode};
use farshore_proto::session::{TargetEvent, TargetSession};
use farshore_proto::{BatchNo, Generation, GroupId, HostId, Name, Now, Role, VaultId, WallTime, codec};
use farshore_uring::{OpenMode, Storage, StorageFile, replace_file};

use crate::alarm::{Alarm, AlarmCode, Alarms};
use crate::catalog::{Catalog, GroupRecord, HostRecord};
use crate::damage::{Damage, Damaged};
use crate::error::{Error, IoContext, Kind, Result};
use crate::group::{GroupHost, StreamId};
use crate::index::Index;
use crate::ingest::{BatchBuf, Ingest};
use crate::journal::Journal;
use crate::keys::TargetKeys;
use crate::lane::{Input, Lane, Output, SessionId};
use crate::points::Points;
use crate::segment::SEGMENT_BYTES;
use crate::segments::{FrameCache, Segments};
use crate::views::release_stale_holds;

/// Most greetings of a broken stream's source between two tries to open it.
const RETRY_GREETINGS_MAX: u32 = 16;
const IDENTITY_FILE: &str = "vault";
const IDENTITY_MAGIC: &str = "farshore target data, format 1";
/// Names that may stand in a data root.
const KNOWN_NAMES: [&str; 10] = [
    IDENTITY_FILE,
    "vault.new",
    "lock",
    "catalog",
    "catalog.new",
    "catalog.copy",
    "catalog.copy.new",
    "groups",
    "scratch",
    "lost+found",
];
/// Most groups: each costs an index in memory and open files (I11).
const STREAMS_MAX: usize = 4096;
/// Most groups that one host may write; more need more identities, which an operator issues. Keeps a host from filling the
/// catalog with groups of its own making (I7).
const HOST_GROUPS_MAX: usize = 64;

/// Settings of a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TargetConfig {
    /// Plain frames kept in memory, bytes, for all streams together. Default 128 MiB; more makes views of hot data
    /// faster.
    pub frame_cache_bytes: usize,
    /// Length at which a journal's segment is closed, bytes. Default and maximum 128 MiB. Less frees space in smaller
    /// steps and costs more files.
    pub segment_bytes: u64,
}

impl Default for TargetConfig {
    fn default() -> Self {
        Self { frame_cache_bytes: 128 << 20, segment_bytes: SEGMENT_BYTES }
    }
}

/// Who is at the other end of a session, as its certificate says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// What it may be.
    pub role: Role,
    /// Its name.
    pub name: Name,
}

/// One stream's key in the target.
pub type StreamKey = (Name, Name);

/// A target. Free of threads and sockets: sessions and batches are handed in, outputs are polled, disk calls are made
/// inline through [`Storage`]; [`crate::server`] drives it.
///
/// Inputs: [`Self::handle_up`], [`Self::handle_control`], [`Self::handle_batch`], [`Self::handle_down`]. Each gives the
/// stream that has work now, if one has: its [`Lane`] is to be run. [`Self::run`] runs all of them inline. After either,
/// [`Self::poll_output`] is drained. All methods take `&self`: lanes run on threads of their own.
pub struct Target<S: Storage> {
    storage: S,
    keys: TargetKeys,
    catalog: Arc<Catalog<S>>,
    alarms: Alarms,
    cache: Arc<FrameCache>,
    segment_bytes: u64,
    streams: RwLock<Streams<S>>,
    /// Held while a stream is opened, or the device of a base is changed.
    opening: Mutex<()>,
    sessions: Mutex<BTreeMap<SessionId, Session>>,
    outbox: Mutex<VecDeque<Output>>,
}

struct Streams<S: Storage> {
    lanes: BTreeMap<StreamKey, Arc<Lane<S>>>,
    /// Streams that cannot be opened, and why.
    broken: BTreeMap<StreamKey, Broken>,
    opened: u32,
}

/// A stream that cannot be opened. It is tried again when its source greets, ever more rarely: opening reads its journal.
struct Broken {
    why: String,
    /// Greetings from the last try to the next.
    wait: u32,
    /// Those of them still to come.
    left: u32,
}

enum Session {
    /// Up, not greeted.
    Fresh(Peer, Box<TargetSession>),
    /// Handed to a lane.
    Attached(StreamKey),
}

impl<S: Storage> Target<S> {
    /// Opens the data root, making it if it is empty, and all streams in it. A stream that cannot be opened is left out
    /// with an alarm; the others are served.
    ///
    /// # Errors
    /// [`Kind::Foreign`] for a root of another vault, of another format, or with files that are not ours; otherwise from
    /// the disk.
    pub fn open(storage: S, keys: TargetKeys, config: TargetConfig) -> Result<Self> {
        let alarms = Alarms::default();
        check_root(&storage, keys.vault())?;
        let catalog = Arc::new(Catalog::open(storage.clone(), keys.vault(), &alarms)?);
        if let Some(reason) = catalog.retention_suspended() {
            // Also when it was at an earlier start that the catalog was made again.
            alarms.raise(
                AlarmCode::CatalogRebuilt,
                "",
                &format!("{reason}; put them back, then `farshore target resume-retention`"),
            );
        }
        let target = Self {
            storage,
            keys,
            catalog,
            alarms,
            cache: Arc::new(FrameCache::new(config.frame_cache_bytes)),
            segment_bytes: config.segment_bytes,
            streams: RwLock::new(Streams { lanes: BTreeMap::new(), broken: BTreeMap::new(), opened: 0 }),
            opening: Mutex::default(),
            sessions: Mutex::default(),
            outbox: Mutex::default(),
        };
        for (group, record) in target.catalog.groups() {
            for host in record.hosts.into_keys() {
                if let Err(error) = target.open_stream(&group, &host) {
                    target.break_stream((group.clone(), host), &error);
                }
            }
        }
        Ok(target)
    }

    fn break_stream(&self, key: StreamKey, error: &Error) {
        let subject = format!("{}/{}", key.0, key.1);
        tracing::error!(stream = subject, %error, "a stream cannot be opened");
        self.alarms.raise(AlarmCode::StreamUnavailable, &subject, error.context());
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        let wait = streams.broken.get(&key).map_or(1, |broken| (broken.wait * 2).min(RETRY_GREETINGS_MAX));
        streams.broken.insert(key, Broken { why: error.to_string(), wait, left: wait });
    }

    fn open_stream(&self, group: &Name, host: &Name) -> Result<Arc<Lane<S>>> {
        let number = {
            let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
            streams.opened += 1;
            streams.opened
        };
        let id = StreamId::derive(self.keys.vault(), group, host);
        let lane = Arc::new(Lane::new(self.load_stream(id, number)?));
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.broken.remove(&(group.clone(), host.clone()));
        streams.lanes.insert((group.clone(), host.clone()), Arc::clone(&lane));
        Ok(lane)
    }

    fn load_stream(&self, id: StreamId, number: u32) -> Result<Ingest<S>> {
        let folder = id.folder();
        let keys = Arc::new(self.keys.stream(id.group, id.host));
        let record = self.catalog.host(&id.group_name, &id.host_name).unwrap_or_default();
        let horizon = record.horizon.map_or(BatchNo(0), |point| point.batch);
        let segments = Segments::new(
            self.storage.clone(),
            folder.join("journal"),
            number,
            Arc::clone(&keys),
            Arc::clone(&self.cache),
        );
        let segments = Arc::new(segments);
        let storage = self.storage.clone();
        let (mut journal, opened) =
            Journal::open(id.clone(), storage, Arc::clone(&segments), &keys, horizon, self.segment_bytes)?;
        let index = Index::open(self.storage.clone(), folder.join("index"), &opened.runs)?;
        let mut points = Points::default();
        for point in &opened.points {
            points.push(point.clone());
        }
        let replayed = journal.replay(&opened, &keys, |entries, point| {
            index.add_batch(&entries);
            points.push(point);
        })?;
        // Points below the horizon cannot be shown any more: the base has moved past them.
        points.retain(|point| point.id.batch >= horizon);
        let subject = id.subject();
        let stream = Arc::new(GroupHost {
            id,
            storage: self.storage.clone(),
            folder,
            keys,
            segments,
            index,
            alarms: self.alarms.clone(),
            counters: crate::counters::Counters::default(),
            leases: Mutex::default(),
            points: RwLock::new(points),
            bases: RwLock::default(),
            damage: RwLock::new(Damage::new(record.damaged.iter().cloned())),
            catalog: Arc::clone(&self.catalog),
            checked: AtomicU64::new(record.checked.0),
            rescue: AtomicBool::new(false),
        });
        for number in &opened.rebuilt {
            let detail = format!("the footer of segment {number} was unreadable; made again from its entries");
            self.alarms.raise(AlarmCode::FooterRebuilt, &subject, &detail);
        }
        let mut state = replayed.state;
        self.adopt(&stream, &record, &state)?;
        release_stale_holds(&stream)?;
        self.settle_damage(&stream, opened.damaged.into_iter().chain(replayed.damaged), &mut state)?;
        Ok(Ingest::new(stream, journal, state))
    }

    /// Takes over what only the journal knows (after a rebuilt catalog), and opens the bases.
    fn adopt(&self, stream: &Arc<GroupHost<S>>, record: &HostRecord, state: &crate::points::StreamState) -> Result<()> {
        if record.volumes.is_empty() && !state.volumes.is_empty() || record.generation < state.generation {
            let (volumes, generation) = (state.volumes.clone(), state.generation);
            stream.update(|record| {
                if record.volumes.is_empty() {
                    record.volumes = volumes;
                }
                record.generation = record.generation.max(generation);
            })?;
        }
        for decl in &stream.record().volumes {
            stream.add_base(decl, true).inspect_err(|error| crate::bases::alarm(stream, decl.index, error))?;
        }
        self.alarms.clear(AlarmCode::BaseFailed, &stream.id.subject());
        Ok(())
    }

    /// Known and new damage: while lost batches are not healed, no cut is recoverable and the source must start over.
    fn settle_damage(
        &self,
        stream: &Arc<GroupHost<S>>,
        found: impl Iterator<Item = Damaged>,
        state: &mut crate::points::StreamState,
    ) -> Result<()> {
        for place in found {
            stream.note_damage(place);
        }
        for place in stream.damage().iter() {
            self.alarms.raise(AlarmCode::JournalDamaged, &stream.id.subject(), &place.to_string());
        }
        if stream.damage().needs_compare() {
            state.event_open = true;
            let incarnation = state.tail.map_or_else(Default::default, |tail| tail.incarnation);
            if stream.record().start_over.is_none() {
                stream.update(|record| record.start_over = Some(incarnation))?;
            }
        } else if stream.record().start_over.is_some() {
            stream.update(|record| record.start_over = None)?;
        }
        Ok(())
    }

    /// A session is up.
    pub fn handle_up(&self, session: SessionId, peer: Peer) {
        let machine = Box::new(TargetSession::new(self.keys.vault()));
        self.sessions().insert(session, Session::Fresh(peer, machine));
    }

    /// A control message came.
    pub fn handle_control(&self, session: SessionId, bytes: Vec<u8>) -> Option<StreamKey> {
        // Taken in a statement of its own: in the match's head the lock would be held through its arms.
        let known = self.sessions().remove(&session)?;
        let (peer, machine) = match known {
            Session::Attached(key) => {
                self.sessions().insert(session, Session::Attached(key.clone()));
                self.lane(&key)?.push(Input::Control { session, bytes });
                return Some(key);
            }
            Session::Fresh(peer, machine) => (peer, machine),
        };
        self.greet(session, peer, machine, &bytes)
    }

    fn greet(
        &self,
        session: SessionId,
        peer: Peer,
        mut machine: Box<TargetSession>,
        bytes: &[u8],
    ) -> Option<StreamKey> {
        let vault = self.keys.vault();
        let spoken = machine.handle_control(bytes, |hello: &Hello, epoch| {
            self.keys.answer_key(HostId::derive(vault, &hello.host_name), epoch)
        });
        let hello = match spoken {
            Ok(Some(TargetEvent::Hello(hello))) => hello,
            Ok(Some(TargetEvent::Volumes(_) | TargetEvent::Bye) | None) => {
                self.end(session, &mut machine, "the greeting was refused");
                return None;
            }
            Err(error @ farshore_proto::Error::UnknownKey { .. }) => {
                tracing::warn!(peer = peer.name.as_str(), %error, "a source was refused");
                self.alarms.raise(AlarmCode::KeyUnknown, peer.name.as_str(), &error.to_string());
                self.end(session, &mut machine, &error.to_string());
                return None;
            }
            Err(error) => {
                tracing::warn!(peer = peer.name.as_str(), %error, "a greeting cannot be read");
                machine.refuse(RefuseCode::Malformed, error.to_string());
                self.end(session, &mut machine, "the greeting cannot be read");
                return None;
            }
        };
        self.alarms.clear(AlarmCode::KeyUnknown, peer.name.as_str());
        match self.authorise(&peer, &hello) {
            Ok(key) => {
                let lane = self.lane(&key)?;
                self.sessions().insert(session, Session::Attached(key.clone()));
                lane.push(Input::Attach { session, machine, hello });
                Some(key)
            }
            Err((code, detail)) => {
                tracing::warn!(peer = peer.name.as_str(), ?code, detail, "a source was refused");
                if code == RefuseCode::NotAMember {
                    self.alarms.raise(
                        AlarmCode::NotAMember,
                        &format!("{}/{}", hello.group_name, hello.host_name),
                        &detail,
                    );
                }
                machine.refuse(code, detail.clone());
                self.end(session, &mut machine, &detail);
                None
            }
        }
    }

    fn end(&self, session: SessionId, machine: &mut TargetSession, reason: &str) {
        let mut outbox = self.outbox();
        while let Some(bytes) = machine.poll_control() {
            outbox.push_back(Output::Control { session, bytes });
        }
        outbox.push_back(Output::Close { session, reason: reason.to_owned() });
    }

    /// Whether the peer may bring this stream; makes a new group for its first host.
    fn authorise(&self, peer: &Peer, hello: &Hello) -> Result<StreamKey, (RefuseCode, String)> {
        let (group, host) = (&hello.group_name, &hello.host_name);
        let refuse = |code, detail: String| Err((code, detail));
        let vouched = match peer.role {
            Role::Agent => peer.name == *host,
            // A relay forwards for hosts that the group has already; it cannot bring a new one in.
            Role::Relay => self.catalog.host(group, host).is_some_and(|record| record.member),
            Role::Target | Role::Control | Role::Operator => false,
        };
        if !vouched {
            let detail = format!("{} {} may not bring the stream of host {host}", peer.role, peer.name);
            return refuse(RefuseCode::NotAMember, detail);
        }
        if hello.group != GroupId::derive(self.keys.vault(), group) {
            return refuse(RefuseCode::Malformed, format!("the id of group {group} is not the one of its name"));
        }
        let key = (group.clone(), host.clone());
        let known = self.catalog.groups().remove(group).unwrap_or_default();
        match known.hosts.get(host) {
            Some(record) if record.member => {}
            None if known.hosts.values().all(|record| !record.member) => {
                let groups = self.catalog.groups();
                let written = groups.values().filter(|group| group.hosts.get(host).is_some_and(|record| record.member));
                if written.count() >= HOST_GROUPS_MAX {
                    let detail = format!("host {host} writes {HOST_GROUPS_MAX} groups already; remove one of them");
                    return refuse(RefuseCode::NotAMember, detail);
                }
                self.add_member(group, host).map_err(|error| (RefuseCode::Unavailable, error.to_string()))?;
            }
            _ => {
                let detail = format!(
                    "host {host} may not write group {group}: `farshore group add {group} {host}` at the target"
                );
                return refuse(RefuseCode::NotAMember, detail);
            }
        }
        self.alarms.clear(AlarmCode::NotAMember, &format!("{group}/{host}"));
        if self.lane(&key).is_none()
            && let Err(why) = self.retry_stream(&key)
        {
            return refuse(RefuseCode::Unavailable, format!("stream of {host} in {group}: {why}"));
        }
        Ok(key)
    }

    /// Lets `host` write `group`; both come into being where they are new.
    ///
    /// # Errors
    /// [`Kind::Refused`] at the limit of streams; otherwise from the disk.
    pub fn add_member(&self, group: &Name, host: &Name) -> Result<()> {
        let count: usize = self.catalog.groups().values().map(|group| group.hosts.len()).sum();
        if count >= STREAMS_MAX && self.catalog.host(group, host).is_none() {
            return Err(Error::new(Kind::Refused, format!("a target has at most {STREAMS_MAX} streams")));
        }
        self.catalog.update_host(group, host, |record| {
            record.member = true;
            record.generation = record.generation.max(Generation(1));
        })?;
        self.reopen_stream(group, host)
    }

    /// An operator has put back the holds of a catalog that was made again without them: retention may go on, and the alarm ends.
    /// Gives why it was suspended, if it was.
    ///
    /// # Errors
    /// From the disk.
    pub fn resume_retention(&self) -> Result<Option<String>> {
        let reason = self.catalog.retention_suspended();
        if reason.is_some() {
            self.catalog.resume_retention()?;
        }
        self.alarms.clear(AlarmCode::CatalogRebuilt, "");
        Ok(reason)
    }

    /// Opens a stream that could not be opened before.
    ///
    /// # Errors
    /// Why it still cannot be opened.
    pub(crate) fn reopen_stream(&self, group: &Name, host: &Name) -> Result<()> {
        let _opening = self.opening();
        let key = (group.clone(), host.clone());
        if self.lane(&key).is_some() {
            return Ok(());
        }
        self.open_stream(group, host).inspect_err(|error| self.break_stream(key, error))?;
        self.alarms.clear(AlarmCode::StreamUnavailable, &format!("{group}/{host}"));
        Ok(())
    }

    /// Opens a stream again whose source greets, when it is time for a try: a device may have come late.
    fn retry_stream(&self, key: &StreamKey) -> Result<(), String> {
        {
            let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
            let broken = streams.broken.get_mut(key).ok_or("it is not open")?;
            broken.left = broken.left.saturating_sub(1);
            if broken.left > 0 {
                return Err(broken.why.clone());
            }
        }
        self.reopen_stream(&key.0, &key.1).map_err(|error| error.to_string())
    }

    /// Forbids `host` to write `group`; what it wrote stays. Its session ends.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when it is no member; otherwise from the disk.
    pub fn remove_member(&self, group: &Name, host: &Name) -> Result<()> {
        if !self.catalog.host(group, host).is_some_and(|record| record.member) {
            return Err(Error::new(Kind::NotFound, format!("host {host} is no member of group {group}")));
        }
        self.catalog.update_host(group, host, |record| record.member = false)?;
        if let Some(lane) = self.lane(&(group.clone(), host.clone())) {
            let detail = format!("host {host} was removed from group {group}");
            lane.push(Input::Expel { code: RefuseCode::NotAMember, detail });
        }
        Ok(())
    }

    /// A batch came.
    pub fn handle_batch(&self, session: SessionId, buf: Box<dyn BatchBuf>) -> Option<StreamKey> {
        let key = match self.sessions().get(&session)? {
            Session::Attached(key) => key.clone(),
            // Nobody may send batches before the greeting is answered.
            Session::Fresh(..) => return None,
        };
        self.lane(&key)?.push(Input::Batch { session, buf });
        Some(key)
    }

    /// The session is gone.
    pub fn handle_down(&self, session: SessionId) -> Option<StreamKey> {
        match self.sessions().remove(&session)? {
            Session::Fresh(..) => None,
            Session::Attached(key) => {
                self.lane(&key)?.push(Input::Down { session });
                Some(key)
            }
        }
    }

    /// Runs every lane inline. Gives when to run again even if nothing comes in.
    pub fn run(&self, now: Now, wall: WallTime) -> Option<Now> {
        self.alarms.set_now(wall);
        self.lanes().values().filter_map(|lane| lane.run(now, wall)).min()
    }

    /// The next thing for the link to do.
    #[must_use]
    pub fn poll_output(&self) -> Option<Output> {
        let own = self.outbox().pop_front();
        let next = own.or_else(|| self.lanes().values().find_map(|lane| lane.poll_output()))?;
        Some(self.note_output(next))
    }

    /// The next thing for the link to do that comes from no lane.
    #[must_use]
    pub fn poll_own_output(&self) -> Option<Output> {
        let next = self.outbox().pop_front()?;
        Some(self.note_output(next))
    }

    fn note_output(&self, output: Output) -> Output {
        if let Output::Close { session, .. } = &output {
            self.sessions().remove(session);
        }
        output
    }

    /// One stream's lane.
    #[must_use]
    pub fn lane(&self, key: &StreamKey) -> Option<Arc<Lane<S>>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).lanes.get(key).cloned()
    }

    /// All lanes.
    #[must_use]
    pub fn lanes(&self) -> BTreeMap<StreamKey, Arc<Lane<S>>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).lanes.clone()
    }

    /// The streams of one group, by host.
    ///
    /// # Errors
    /// [`Kind::NotFound`] when there is none.
    pub fn streams(&self, group: &Name) -> Result<BTreeMap<Name, Arc<GroupHost<S>>>> {
        let found: BTreeMap<_, _> = self
            .lanes()
            .into_iter()
            .filter(|((of, _), _)| of == group)
            .map(|((_, host), lane)| (host, Arc::clone(lane.stream())))
            .collect();
        if found.is_empty() { Err(Error::new(Kind::NotFound, format!("group {group}"))) } else { Ok(found) }
    }

    /// Streams that cannot be opened, and why.
    #[must_use]
    pub fn broken(&self) -> BTreeMap<StreamKey, String> {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        streams.broken.iter().map(|(key, broken)| (key.clone(), broken.why.clone())).collect()
    }

    /// All groups as the catalog has them.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<Name, GroupRecord> {
        self.catalog.groups()
    }

    /// The catalog.
    #[must_use]
    pub fn catalog(&self) -> &Arc<Catalog<S>> {
        &self.catalog
    }

    /// Open alarms.
    #[must_use]
    pub fn alarm_list(&self) -> Vec<Alarm> {
        self.alarms.list()
    }

    /// The alarms, to raise and clear.
    #[must_use]
    pub fn alarms(&self) -> &Alarms {
        &self.alarms
    }

    /// Trust domain.
    #[must_use]
    pub fn vault(&self) -> VaultId {
        self.keys.vault()
    }

    /// Where everything lies.
    #[must_use]
    pub fn storage(&self) -> &S {
        &self.storage
    }

    pub(crate) fn opening(&self) -> MutexGuard<'_, ()> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<SessionId, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outbox(&self) -> MutexGuard<'_, VecDeque<Output>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks that the data root is this vault's, or makes it so if it is empty.
fn check_root<S: Storage>(storage: &S, vault: VaultId) -> Result<()> {
    let root = PathBuf::new();
    let mut names = Vec::new();
    for path in storage.list(&root).at("list", Path::new("the data folder"))? {
        names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    if let Some(foreign) = names.iter().find(|name| !KNOWN_NAMES.contains(&name.as_str())) {
        let what =
            format!("the data folder holds {foreign:?}, which is not ours: give an empty folder, or move it away");
        return Err(Error::new(Kind::Foreign, what));
    }
    let path = Path::new(IDENTITY_FILE);
    let expected = format!("{IDENTITY_MAGIC}\nvault {vault}\n");
    if !names.iter().any(|name| name == IDENTITY_FILE) {
        if names.iter().any(|name| name == "groups" || name.starts_with("catalog")) {
            let what = "the data folder holds data but no file \"vault\": restore that file, or give another folder";
            return Err(Error::new(Kind::Foreign, what));
        }
        return replace_file(storage, path, expected.as_bytes()).at("write to the data folder: create", path);
    }
    let file = storage.open(path, OpenMode::Read).at("open", path)?;
    let len = file.len().at("measure", path)?.min(codec::ENCODED_BYTES_MAX as u64);
    let mut bytes = vec![0; usize::try_from(len).expect("limited above")];
    file.read_at(&mut bytes, 0).at("read", path)?;
    let found = String::from_utf8_lossy(&bytes);
    let mut lines = found.lines();
    let (magic, theirs) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    if magic != IDENTITY_MAGIC {
        let what = format!("the data folder is of another format ({magic:?}); this build reads {IDENTITY_MAGIC:?}");
        return Err(Error::new(Kind::Foreign, what));
    }
    if theirs != format!("vault {vault}") {
        let what =
            format!("the data folder belongs to {theirs}, the identity to vault {vault}: give the right one of both");
        return Err(Error::new(Kind::Foreign, what));
    }
    Ok(())
}
