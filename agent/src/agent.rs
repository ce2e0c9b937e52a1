//! The agent: its groups, and what the admin API asks of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use farshore_blkfilter::Volume;
use farshore_blkfilter::activity::VolumeKey;
use farshore_blkfilter::sync::SyncState;
use farshore_link::identity::Identity;
use farshore_proto::text::show_time;
use farshore_proto::{GroupId, HostId, Name, Role, SLOT_BYTES, VolumeIndex, WallTime};
use farshore_streamer::{DurableBatch, Line, Phase, StreamerStatus};
use farshore_uring::{BackingId, DirStorage};
use serde_json::{Value, json};

use crate::activity::{Activity, Known, START_MAX};
use crate::alarms::{Alarm, Alarms, code};
use crate::api::ProtectRequest;
use crate::attach::{ring_file, ring_folder};
use crate::config::AgentConfig;
use crate::devices::{Access, Host, Protected, own_files};
use crate::disk_log::Disk;
use crate::frontend::Frontend;
use crate::gate::{self, Gate};
use crate::group::{Context, Group, NewPlace, NewVolume};
use crate::points::Cuts;
use crate::source::open_source;
use crate::state::{GroupState, StateDir, VolumeState, lock_state};
use crate::supervisor::SupervisorLink;
use crate::watch::Watch;
use crate::{Error, Result, clock, interpose};

/// An identity that expires within this time raises an alarm.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most groups: each has a ring, a link and four threads (I11).
const GROUPS_MAX: usize = 64;

/// How long a stop waits until everything written to any group is durable at the target. What is not by then is kept as marks.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a stop waits for requests under way. None takes longer than opening a source does, but with a disk that hangs.
const REQUESTS: Duration = Duration::from_secs(5);

/// A running agent.
pub struct Agent {
    context: Context,
    groups: Arc<RwLock<BTreeMap<Name, Arc<Group>>>>,
    /// Held while volumes or groups come and go.
    changes: Arc<Mutex<()>>,
    watch: Mutex<Option<Watch>>,
    /// Every request is inside: a stop waits until nobody has a group any more.
    requests: Gate,
    /// Of the state directory.
    _lock: File,
}

impl Agent {
    /// Starts all groups that have state.
    ///
    /// # Errors
    /// When identity or state directory cannot be used, or another agent has a group's ring.
    pub fn start(config: AgentConfig, identity: Identity) -> Result<Self> {
        if identity.role != Role::Agent {
            return Err(Error::Refused {
                what: format!("identity {}", config.identity.display()),
                reason: format!("is of role {}, not agent", identity.role),
                hint: "issue one with `farshore vault issue --role agent`".into(),
            });
        }
        std::fs::create_dir_all(&config.state).map_err(|error| Error::io("create", &config.state, error))?;
        let lock = lock_state(&config.state)?;
        let storage = DirStorage::open(&config.state).map_err(|error| Error::io("open", &config.state, error))?;
        let store = StateDir::open(storage, &config.state, identity.vault, &identity.name)?;
        ring_folder(&config.ring_dir)?;
        let alarms = Arc::new(Alarms::default());
        let not_after = identity.not_after;
        watch_expiry(&alarms, not_after, clock::wall());
        let supervisor = SupervisorLink::new(&config.ring_dir, &identity.name);
        // Before anything is opened that a pass-through holds.
        supervisor.let_go()?;
        let host = HostId::derive(identity.vault, &identity.name);
        let names = store.groups()?;
        let (config, identity) = (Arc::new(config), Arc::new(identity));
        let known = known(&store, &identity, &names);
        let waited_for = |name: &Name| ring_file(&config.ring_dir, &identity.name, name.as_str()).exists();
        let limit = if names.iter().any(waited_for) { START_MAX.0 } else { START_MAX.1 };
        let activity = Activity::start(&config, host, &store, &alarms, known, limit)?.map(Arc::new);
        let lines = lines(&store, &identity, &names);
        let disk = Disk::open(&config, host, lines, &alarms, limit)?;
        let context = Context { config, identity, store, alarms, supervisor, activity, disk };
        let mut all_started = true;
        let agent = Self {
            context,
            groups: Arc::default(),
            changes: Arc::default(),
            watch: Mutex::default(),
            requests: Gate::default(),
            _lock: lock,
        };
        for name in names {
            let started = match agent.context.store.read_group(&name) {
                Ok(Some(state)) if state.is_live() => Group::start(&agent.context, name.clone(), state)
                    .map(|group| _ = agent.add_group(name.clone(), group)),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            match started {
                // Another agent has the group: this one must not run beside it.
                Err(error @ Error::Refused { .. }) => return Err(error),
                // One group's trouble does not end the protection of the others.
                Err(error) => {
                    all_started = false;
                    leave_path(&agent.context.store, &name);
                    let text = format!("is not protected: {}", crate::error::chain(&error));
                    agent.context.alarms.raise(code::UNAVAILABLE, name.as_str(), text);
                }
                Ok(()) => agent.report(false),
            }
        }
        if let Some(activity) = agent.context.activity.as_ref().filter(|_| all_started) {
            activity.handle_started();
        }
        let supervisor = agent.context.supervisor.clone();
        let report = move |groups: &[Arc<Group>]| {
            supervisor.report(groups.iter().flat_map(|group| group.roster()).collect(), true);
        };
        let alarms = Arc::clone(&agent.context.alarms);
        let expiry = move || watch_expiry(&alarms, not_after, clock::wall());
        let watch = Watch::start(Arc::clone(&agent.groups), Arc::clone(&agent.changes), report, expiry)?;
        *agent.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(watch);
        agent.report(true);
        Ok(agent)
    }

    /// Tells the supervisor which block devices this process serves.
    fn report(&self, ready: bool) {
        let disks = self.groups().iter().flat_map(|group| group.roster()).collect();
        self.context.supervisor.report(disks, ready);
    }

    fn changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_group(&self, name: Name, group: Group) -> Arc<Group> {
        let group = Arc::new(group);
        self.context.alarms.clear(code::UNAVAILABLE, name.as_str());
        self.groups.write().unwrap_or_else(PoisonError::into_inner).insert(name, Arc::clone(&group));
        group
    }

    fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn group(&self, name: &str) -> Result<Arc<Group>> {
        let key = Name::new(name)?;
        let groups = self.groups.read().unwrap_or_else(PoisonError::into_inner);
        groups.get(&key).cloned().ok_or_else(|| Error::NotFound {
            what: "group",
            name: name.to_owned(),
            hint: "; `farshore volumes` lists what is protected",
        })
    }

    /// A volume by `GROUP/VOLUME`, or by a name that is unique.
    fn volume(&self, text: &str) -> Result<(Arc<Group>, VolumeState)> {
        let (group, name) = text.split_once('/').map_or((None, text), |(group, name)| (Some(group), name));
        let mut found: Vec<_> = self
            .groups()
            .into_iter()
            .filter(|candidate| group.is_none_or(|group| candidate.shared.name.as_str() == group))
            .flat_map(|group| group.volumes().into_iter().map(move |volume| (Arc::clone(&group), volume)))
            .filter(|(_, volume)| volume.name == name)
            .collect();
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Ok(one),
            (Some(_), false) => Err(Error::Setting {
                key: "volume",
                reason: format!("{name:?} is in several groups; say GROUP/VOLUME"),
            }),
            (None, _) => Err(Error::NotFound {
                what: "volume",
                name: text.to_owned(),
                hint: "; `farshore volumes` lists what is protected",
            }),
        }
    }

    /// Protects a source.
    ///
    /// # Errors
    /// Bad names, a source that cannot be opened or is in use, a name or source that is protected already.
    pub fn protect(&self, request: &ProtectRequest) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let _changes = self.changes();
        let group_name = Name::new(request.group.clone())?;
        let name = match &request.name {
            Some(name) => Name::new(name.clone())?,
            None => default_name(&request.source)?,
        };
        let config = &self.context.config;
        self.refuse_known(&request.source, |volume| volume.source == request.source)?;
        // What stands on a device-mapper device goes through what is put below it.
        let access = if request.dm { Access::Live } else { Access::Exclusive };
        Host::look(self.protected()).check(&request.source, access, &own_files(config))?;
        let new = self.new_volume(request, &group_name, &name)?;
        let stub = match &new.place {
            NewPlace::Mapped(upper) => Some((upper.mapped.clone(), upper.made)),
            NewPlace::Source(_) => None,
        };
        let known = self.groups.read().unwrap_or_else(PoisonError::into_inner).get(&group_name).cloned();
        let protect = |group: &Group| group.protect(new, name);
        let protected = match known {
            Some(group) => protect(&group).map(|volume| (group, volume)),
            None => self.with_new_group(group_name, protect),
        };
        let (group, volume) = protected.inspect_err(|_| {
            if let Some((mapped, made)) = stub {
                interpose::drop_stub(&mapped, made);
            }
        })?;
        self.report(true);
        Ok(volume_document(&group, &volume))
    }

    /// Looks at what is to be protected, before a group is made for it.
    fn new_volume(&self, request: &ProtectRequest, group: &Name, name: &Name) -> Result<NewVolume> {
        let config = &self.context.config;
        let (source, frontend) = (request.source.clone(), request.frontend.clone());
        if request.dm {
            let frontend = frontend.unwrap_or_else(|| "ublk".into());
            let parsed = Frontend::parse(&frontend)?;
            if parsed != Frontend::Ublk(None) {
                let reason =
                    format!("{frontend:?} does not go with --dm, which needs ublk and chooses the number itself");
                return Err(Error::Setting { key: "frontend", reason });
            }
            parsed.check_host()?;
            if let Ok((id, _)) = BackingId::of_block_device(&source) {
                self.refuse_known(&source, |volume| interpose::is_of(volume, &id))?;
            }
            let upper = interpose::prepare(&source, group, name)?;
            return Ok(NewVolume { source, frontend, place: NewPlace::Mapped(upper) });
        }
        let frontend = frontend.unwrap_or_else(|| default_frontend(&config.state, group, name));
        Frontend::parse(&frontend)?.check_host()?;
        let backing = open_source(&source, config)?;
        self.refuse_known(&source, |volume| {
            volume.identity == backing.id.as_str() || interpose::is_of(volume, &backing.id)
        })?;
        Ok(NewVolume { source, frontend, place: NewPlace::Source(backing) })
    }

    /// The agent's volumes, as far as devices are concerned.
    fn protected(&self) -> Vec<Protected> {
        let of = |group: &Arc<Group>| {
            let name = group.shared.name.clone();
            let protected = move |volume: VolumeState| Protected {
                label: format!("{name}/{}", volume.name),
                upper: volume.mapped.map(|mapped| mapped.upper),
                source: volume.source,
                ublk: volume.ublk.filter(|disk| disk.sequence.is_some()).map(|disk| disk.id),
            };
            group.volumes().into_iter().map(protected)
        };
        self.groups().iter().flat_map(of).collect()
    }

    /// Refuses a source that is protected already, whether or not it is there.
    fn refuse_known(&self, source: &Path, same: impl Fn(&VolumeState) -> bool) -> Result<()> {
        for group in self.groups() {
            if let Some(volume) = group.volumes().iter().find(|volume| same(volume)) {
                return Err(Error::Refused {
                    what: format!("source {}", source.display()),
                    reason: format!("is protected already as {}/{}", group.shared.name, volume.name),
                    hint: "`farshore volumes` shows its device; `farshore unprotect` ends that".into(),
                });
            }
        }
        Ok(())
    }

    /// Starts a group for its first volume. Without it, there is no group.
    fn with_new_group<T>(&self, name: Name, protect: impl FnOnce(&Group) -> Result<T>) -> Result<(Arc<Group>, T)> {
        if self.groups().len() >= GROUPS_MAX {
            return Err(Error::Refused {
                what: format!("group {name}"),
                reason: format!("there are {GROUPS_MAX} groups already"),
                hint: "protect the volume in one of them".into(),
            });
        }
        let state = self.context.store.read_group(&name)?.unwrap_or_default();
        let group = Group::start(&self.context, name.clone(), state)?;
        match protect(&group) {
            Err(error) if group.volumes().is_empty() => {
                // There is nothing to drain. The state stays, with the incarnation that was used.
                if let Err(error) = group.stop(clock::now()) {
                    let error = crate::error::chain(&error);
                    tracing::error!(group = %name, error, "an empty group did not stop in order");
                }
                self.context.alarms.forget(name.as_str());
                Err(error)
            }
            protected => {
                let group = self.add_group(name, group);
                protected.map(|volume| (group, volume))
            }
        }
    }

    /// Ends a volume's protection.
    ///
    /// # Errors
    /// No such volume, or the front end cannot be stopped.
    pub fn unprotect(&self, text: &str) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let _changes = self.changes();
        let (group, volume) = self.volume(text)?;
        let index = VolumeIndex(volume.index);
        if group.device(index).is_none() {
            // The supervisor may serve it meanwhile.
            self.context.supervisor.let_go()?;
        }
        let unprotected = group.unprotect(index);
        self.report(true);
        unprotected?;
        Ok(volume_document(&group, &volume))
    }

    /// Compares a whole volume.
    ///
    /// # Errors
    /// No such volume.
    pub fn resync(&self, text: &str) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let (group, volume) = self.volume(text)?;
        let capture = &group.shared.capture;
        capture.resync(VolumeIndex(volume.index)).map_err(|error| Error::failed("resync", error))?;
        group.shared.settle(VolumeIndex(volume.index));
        Ok(volume_document(&group, &volume))
    }

    /// Begins to verify all volumes of a group; `repair`: after a resync of what is known to differ.
    ///
    /// # Errors
    /// No such group, or nothing in it.
    pub fn verify(&self, group: &str, repair: bool) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let group = self.group(group)?;
        // Nobody begins a pass between the look at what is known and the order.
        let _changes = self.changes();
        group.order_verify(repair)
    }

    /// All protected volumes.
    ///
    /// # Errors
    /// The agent is stopping.
    pub fn volumes(&self) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let documents: Vec<Value> = self
            .groups()
            .iter()
            .flat_map(|group| group.volumes().iter().map(|volume| volume_document(group, volume)).collect::<Vec<_>>())
            .collect();
        Ok(json!(documents))
    }

    /// All open alarms.
    #[must_use]
    pub fn alarms(&self) -> Vec<Alarm> {
        self.context.alarms.list(None)
    }

    /// How protection stands.
    ///
    /// # Errors
    /// No such group.
    pub fn status(&self, group: Option<&str>) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let groups = match group {
            Some(name) => vec![self.group(name)?],
            None => self.groups(),
        };
        Ok(json!(groups.iter().map(|group| self.group_document(group)).collect::<Vec<_>>()))
    }

    fn group_document(&self, group: &Group) -> Value {
        let name = group.shared.name.as_str();
        let status = group.status().unwrap_or_default();
        let stream = &status.stream;
        let capture = &group.shared.capture;
        let counters = capture.counters();
        json!({
            "group": name,
            "generation": stream.generation.0,
            "incarnation": stream.incarnation.0,
            "state": state_of(group, &status),
            "tier": tier_of(group, &status),
            "rpo_s": stream.rpo.map(|age| age.as_secs_f64()),
            "lag_bytes": stream.lag_bytes,
            "newest_point": group.shared.points.newest().map(|point| point_document(&point)),
            "ring_used_bytes": capture.ring().used_bytes(),
            "ring_size_bytes": capture.ring().size_bytes(),
            "ring_closed_count": group.shared.ring_closed_count(),
            "log_used_bytes": status.log_bytes.0,
            "log_size_bytes": status.log_bytes.1,
            "log_batches": stream.log.batches,
            "log_path": self.context.disk.as_ref().map(|disk| disk.path()),
            "missing_bytes": capture.volumes().iter().map(|volume| missing_bytes(volume)).sum::<u64>(),
            "written_bytes": counters.written_bytes,
            "shipped_bytes": stream.shipped_bytes,
            "wire_bytes": status.link.wire_bytes_sent,
            "batches": stream.batches,
            "dedup_ratio": stream.dedup_ratio,
            "compression_ratio": stream.compression_ratio,
            "link": {
                "connected": stream.phase == Phase::Live || stream.phase == Phase::Paused,
                "rtt_s": stream.rtt.or(status.link_rtt).map(|rtt| rtt.as_secs_f64()),
                "rate_bytes_per_s": stream.rate,
                "reason": stream.reason,
            },
            "cut_min_s": group.policy().cut_min.as_secs_f64(),
            "sync": sync_document(group),
            "verify": group.verify_document(),
            "activity_log": group.shared.activity.as_ref().map(|activity| {
                activity.document(&group.shared.id, capture.volumes().iter().map(|volume| volume.index()))
            }),
            "alarms": self.context.alarms.list(Some(name)),
        })
    }

    /// Waits until all that was written so far is a recovery point (`name` none), or makes and awaits a named one.
    ///
    /// # Errors
    /// No such group; the time is over (with what stands in the way).
    pub fn point(&self, group: &str, name: Option<&str>, limit: Option<Duration>) -> Result<Value> {
        let _inside = self.requests.enter()?;
        let group = self.group(group)?;
        let name = name.map(Name::new).transpose()?;
        // Somebody waits: what ships does not stand back behind guests meanwhile.
        let _haste = farshore_uring::Haste::begin();
        let begin = clock::now();
        let left = || limit.map(|limit| limit.saturating_sub(clock::now().since(begin)));
        let late = || match group.shared.points.is_closed() {
            true => gate::stopping(),
            false => Error::failed(format!("group {}", group.shared.name), why_no_point(&group)),
        };
        let points = &group.shared.points;
        if let Some(name) = &name {
            return points.named(name, left, &*group).map(|point| point_document(&point)).ok_or_else(late);
        }
        loop {
            // Points can only be made while nothing is missing.
            points.wait(left(), |_| group.is_whole().then_some(())).ok_or_else(late)?;
            let head = group.head();
            let point = points.wait(left(), |board| {
                let newest = board.newest.clone().filter(|point| point.end.0 >= head);
                newest.map(Some).or_else(|| (!group.is_whole()).then_some(None))
            });
            // `None`: an event came between; once more.
            if let Some(point) = point.ok_or_else(late)? {
                return Ok(point_document(&point));
            }
        }
    }

    /// Lets no more requests in; those that wait for a point end with an error. The first step of a stop.
    pub fn refuse_requests(&self) {
        self.requests.close();
        self.groups().iter().for_each(|group| group.shared.points.close());
    }

    /// Stops all groups in order, and at the same time, after [`Self::refuse_requests`].
    ///
    /// # Errors
    /// The first error; the other groups are stopped all the same.
    pub fn stop(&self) -> Result<()> {
        self.stop_within(DRAIN)
    }

    pub(crate) fn stop_within(&self, drain: Duration) -> Result<()> {
        self.refuse_requests();
        // It shares the groups.
        drop(self.watch.lock().unwrap_or_else(PoisonError::into_inner).take());
        let inside = self.requests.wait_empty(REQUESTS);
        if inside > 0 {
            tracing::warn!(inside, "requests do not end; the groups that they hold keep their rings");
        }
        let groups = std::mem::take(&mut *self.groups.write().unwrap_or_else(PoisonError::into_inner));
        let deadline = clock::now().plus(drain);
        all_at_once(groups, |name, group| match Arc::try_unwrap(group) {
            Ok(group) => group.stop(deadline),
            Err(_) => Err(Error::failed(format!("group {name}"), "is in use by a request still; its ring is kept")),
        })
    }
}

#[cfg(test)]
impl Agent {
    pub(crate) fn requests_inside(&self) -> usize {
        self.requests.wait_empty(Duration::ZERO)
    }
}

/// A group cannot be started: what is written to its volumes from here on goes past us, whatever becomes of the host.
fn leave_path(store: &StateDir<DirStorage>, group: &Name) {
    let Ok(Some(state)) = store.read_group(group) else { return };
    if state.boot.is_some()
        && let Err(error) = store.write_group(group, &GroupState { boot: None, ..state })
    {
        tracing::error!(%group, error = crate::error::chain(&error), "if the host goes down now, run `farshore resync` of its volumes");
    }
}

/// What an activity log may know of.
fn known(store: &StateDir<DirStorage>, identity: &Identity, names: &[Name]) -> Known {
    let mut known = Known::default();
    for name in names {
        let group = GroupId::derive(identity.vault, name);
        known.groups.insert(group);
        match store.read_group(name) {
            Ok(state) => {
                let volumes = state.map(|state| state.volumes).unwrap_or_default();
                known.volumes.extend(volumes.iter().map(|it| VolumeKey::new(&group, VolumeIndex(it.index))));
            }
            Err(_) => _ = known.unread.insert(group),
        }
    }
    known
}

/// Lines of the disk log that groups have.
fn lines(store: &StateDir<DirStorage>, identity: &Identity, names: &[Name]) -> BTreeSet<Line> {
    let of = |name: &Name| store.read_group(name).ok()??.line(GroupId::derive(identity.vault, name));
    names.iter().filter_map(of).collect()
}

/// Stops each of `groups` on a thread of its own: one that waits for its link takes no time from the others.
///
/// # Errors
/// The first error, in the order of names.
fn all_at_once<T: Send>(groups: BTreeMap<Name, T>, stop: impl Fn(&Name, T) -> Result<()> + Sync) -> Result<()> {
    let stop = &stop;
    std::thread::scope(|scope| {
        let spawn = |(name, group): (Name, T)| {
            let thread = std::thread::Builder::new().name(format!("stop-{name}"));
            let of = name.clone();
            (name, thread.spawn_scoped(scope, move || stop(&of, group)))
        };
        let threads: Vec<_> = groups.into_iter().map(spawn).collect();
        let mut result = Ok(());
        for (name, thread) in threads {
            let failed = |reason: String| Err(Error::failed(format!("stop of group {name}"), reason));
            let stopped = match thread.map(|thread| thread.join()) {
                Ok(Ok(stopped)) => stopped,
                Ok(Err(_)) => failed("panicked".into()),
                Err(error) => failed(error.to_string()),
            };
            if let Err(error) = stopped {
                tracing::error!(group = %name, error = crate::error::chain(&error), "group did not stop in order");
                result = result.and(Err(error));
            }
        }
        result
    })
}

fn default_name(source: &Path) -> Result<Name> {
    let stem = source.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    Ok(Name::new(stem.replace(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-'), "-"))?)
}

/// A socket in the state directory. Names hold no `~` (and URIs may), so no two volumes share one.
fn default_frontend(state: &Path, group: &Name, volume: &Name) -> String {
    format!("nbd+unix:{}", state.join(format!("{group}~{volume}.sock")).display())
}

fn why_no_point(group: &Group) -> String {
    let status = group.status().unwrap_or_default();
    let capture = &group.shared.capture;
    let reason = if capture.volumes().is_empty() {
        "it has no volume".into()
    } else if status.stream.phase != Phase::Live {
        let reason = status.stream.reason.unwrap_or_else(|| "not connected".into());
        format!("the target is not reached ({reason})")
    } else if capture.ring().is_closed() {
        "the ring is full and being shipped".into()
    } else if status.stream.log.batches > 0 {
        format!("{} batches in the disk log are being shipped", status.stream.log.batches)
    } else if let Some(absent) = group.volumes().iter().find(|volume| group.device(VolumeIndex(volume.index)).is_none())
    {
        format!("volume {} is not served (see its alarm)", absent.name)
    } else if capture.event_open() || !capture.volumes().iter().all(|volume| volume.joined()) {
        "a sync is running".into()
    } else {
        format!("{} bytes are still to be shipped", status.stream.lag_bytes)
    };
    format!("no such recovery point within the time: {reason}")
}

fn tier_of(group: &Group, status: &StreamerStatus) -> &'static str {
    if group.shared.capture.ring().is_closed() {
        "extents"
    } else if status.stream.log.batches > 0 {
        "log"
    } else {
        "ring"
    }
}

fn state_of(group: &Group, status: &StreamerStatus) -> &'static str {
    let capture = &group.shared.capture;
    let volumes = capture.volumes();
    if volumes.is_empty() {
        "idle"
    } else if status.stream.phase != Phase::Live {
        status.stream.phase.as_str()
    } else if volumes.iter().any(|volume| !volume.joined()) {
        "initial-sync"
    } else if capture.event_open() || capture.ring().is_closed() {
        "resync"
    } else {
        "protected"
    }
}

fn sync_document(group: &Group) -> Option<Value> {
    let progress = group.shared.sync.progress().filter(|progress| progress.state != SyncState::Idle)?;
    let state = match progress.state {
        SyncState::Idle => "idle",
        SyncState::NoLink => "no-link",
        SyncState::Closed => "ring-closed",
        SyncState::Running => "running",
    };
    Some(json!({
        "state": state,
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "rate_bytes_per_s": progress.rate,
        "eta_s": progress.eta.map(|eta| eta.as_secs_f64()),
    }))
}

/// Bytes that resync has to look at, in whole slots.
fn missing_bytes(volume: &Volume) -> u64 {
    (volume.missing().count_ones() + volume.in_flight().count_ones()) * SLOT_BYTES
}

fn point_document(point: &DurableBatch) -> Value {
    json!({
        "id": point.point.to_string(),
        "time": show_time(point.time),
        "received": point.received.map(|received: WallTime| show_time(received)),
        "app_consistent": point.app_consistent,
        "bookmark": point.bookmark.as_ref().map(ToString::to_string),
    })
}

fn volume_document(group: &Group, volume: &VolumeState) -> Value {
    let joined = group.shared.capture.volume(VolumeIndex(volume.index)).is_some_and(|volume| volume.joined());
    json!({
        "volume": volume.name,
        "group": group.shared.name.to_string(),
        "source": volume.source,
        "device": group.device(VolumeIndex(volume.index)),
        "size_bytes": volume.size,
        "frontend": volume.frontend,
        "tier": tier_of(group, &group.status().unwrap_or_default()),
        "in_points": joined,
        "dm": group.mapped_document(volume),
    })
}

/// Says that the certificate expires, from [`EXPIRY_WARNING`] before: also to an agent that has run since long before.
fn watch_expiry(alarms: &Alarms, not_after: WallTime, now: WallTime) {
    if not_after.since(now) < EXPIRY_WARNING {
        alarms.raise(code::EXPIRES, "", format!("the certificate expires on {}", show_time(not_after)));
    } else {
        // Where the clock was wrong.
        alarms.clear(code::EXPIRES, "");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// Goal: a certificate's end is announced a month before, not only by an agent that is started then.
    #[test]
    fn a_certificate_that_expires_is_announced() {
        let day = |days: u64| WallTime(days * 86_400 * 1_000_000_000);
        let alarms = Alarms::default();
        watch_expiry(&alarms, day(400), day(369));
        assert!(alarms.list(None).is_empty());
        for now in [371, 399, 400, 500] {
            watch_expiry(&alarms, day(400), day(now));
            assert_eq!(alarms.list(None)[0].code, code::EXPIRES, "day {now}");
        }
        watch_expiry(&alarms, day(400), day(300));
        assert!(alarms.list(None).is_empty(), "the clock was ahead");
    }

    /// Goal: groups stop at the same time, and the first error is told. Method: each waits for the others.
    #[test]
    fn groups_stop_at_once() {
        let barrier = Barrier::new(3);
        let groups = ["a", "b", "c"].map(|name| (Name::new(name).expect("a good name"), name == "a"));
        let stopped = all_at_once(BTreeMap::from(groups), |name, good| {
            barrier.wait();
            if good { Ok(()) } else { Err(Error::failed(format!("group {name}"), "does not stop")) }
        });
        assert_eq!(stopped.expect_err("two fail").to_string(), "group b: does not stop");
    }
}
