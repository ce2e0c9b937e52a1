//! Both sites and what joins them; who goes next, and what goes wrong.

mod checks;

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use farshore_proto::keys::HostKey;
use farshore_proto::{Name, Now, PointId, WallTime};
use farshore_streamer::StreamEvent;
use farshore_target::lane::Output;
use farshore_uring::sim::{SimRng, StorageOp};

use crate::agent::{ACTIVITY, Agent, DISK_LOG, Start, host_id};
use crate::faults::{Coverage, DiskFaults, Fault};
use crate::host::Host;
use crate::site::{Site, name, vault_key};
use crate::tap::Log;
use crate::wire::{Arrival, LinkTrouble, Wire, corrupt};

/// Points that one check reads.
const POINTS_MAX: usize = 20;
/// Steps from one check of the offered points to the next.
const CHECK_STEPS: u64 = 1000;
/// Lives of the agent that the activity log remembers without the target's word.
const LIVES_REMEMBERED: u64 = 3;
/// By then an answer of the target has arrived, or its question is asked again.
const ANSWERS_STEPS: u64 = 1000;
/// Longest trouble of one kind, steps.
const TROUBLE_STEPS: u64 = 400;

/// What a run may have of faults. Each seed has some of them: faults that come together all the time hide each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Link,
    Transport,
    Partition,
    Target,
    TargetDisk,
    TargetOld,
    Crash,
    HostOld,
    StateOld,
    Kill,
    Reads,
    Writes,
    Flushes,
    Slow,
    Clocks,
    Activity,
    DiskLog,
}

const KINDS: [(Kind, u64); 17] = [
    (Kind::Link, 16),
    (Kind::Transport, 8),
    (Kind::Partition, 6),
    (Kind::Target, 14),
    (Kind::TargetDisk, 6),
    (Kind::TargetOld, 6),
    (Kind::Crash, 8),
    (Kind::HostOld, 3),
    (Kind::Kill, 10),
    (Kind::Reads, 3),
    (Kind::Writes, 5),
    (Kind::Flushes, 4),
    (Kind::Slow, 5),
    (Kind::Clocks, 4),
    (Kind::Activity, 8),
    (Kind::DiskLog, 8),
    (Kind::StateOld, 3),
];
/// Of so many moments for trouble, each kind has as many as its weight.
const TROUBLES: u64 = 200;

/// A run of some kinds of fault alone, which come more often, so that a rare order of them is seen.
pub(crate) struct Profile {
    /// Of [`TROUBLES`], how many are of each kind.
    pub(crate) kinds: &'static [(Kind, u64)],
    /// Of the activity log; none: as the seed has it.
    pub(crate) places: Option<u32>,
    /// Of the ring, MiB; none: as the seed has it.
    pub(crate) ring_mib: Option<u64>,
    /// Of the disk log, MiB; none: as the seed has it, which is small; 0: there is no disk log.
    pub(crate) log_mib: Option<u64>,
    /// Seeds that found something once.
    pub(crate) kept: &'static [u64],
}

impl Profile {
    /// These kinds, and else as the seed has it.
    pub(crate) const fn of(kinds: &'static [(Kind, u64)]) -> Self {
        Self { kinds, places: None, ring_mib: None, log_mib: None, kept: &[] }
    }
}

pub(crate) struct World {
    rng: SimRng,
    /// The clock: one step is a millisecond.
    step: u64,
    host: Host,
    host_key: HostKey,
    /// `None`: the host is down, or its agent is.
    agent: Option<Agent>,
    start: Start,
    log: Rc<RefCell<Log>>,
    site: Site,
    /// The target does nothing before this step.
    stopped_until: u64,
    wires: Vec<Wire>,
    sessions: u64,
    /// No session comes up before this step.
    apart_until: u64,
    link: LinkTrouble,
    /// What the two wall clocks show beside the steps, in ms.
    clocks: [i64; 2],
    kinds: Vec<(Kind, u64)>,
    /// The target may have answered by then for what it could not read.
    unread_until: u64,
    /// Trouble that lasts ends then.
    ends: u64,
    /// Starts of the agent since the target had something of one.
    unheard: u64,
    was_closed: bool,
    settling: bool,
    /// There was a reason to compare everything, or to start over.
    excused: bool,
    /// What was acknowledged to the source last, by a target that was not set back since.
    acked: Option<PointId>,
    /// The target was set back, and has not been greeted since: what the source still takes for acknowledged may be gone.
    set_back: bool,
    bookmarks: Vec<(PointId, Name)>,
    named: u64,
    traces: bool,
    /// Longest that a guest waited for us, steps.
    pub(crate) worst: u64,
    pub(crate) coverage: Arc<Coverage>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::make(seed, None)
    }

    /// With some kinds of fault alone.
    pub(crate) fn with(seed: u64, profile: &Profile) -> Self {
        Self::make(seed, Some(profile))
    }

    fn make(seed: u64, profile: Option<&Profile>) -> Self {
        let mut rng = SimRng::new(seed);
        let (epoch, key) = vault_key();
        let coverage = Coverage::new();
        let mut host = Host::new(&mut rng, Arc::clone(&coverage));
        host.places = profile.and_then(|profile| profile.places).unwrap_or(host.places);
        host.slab_bytes = profile.and_then(|profile| profile.ring_mib).map_or(host.slab_bytes, |mib| mib << 20);
        match profile.and_then(|profile| profile.log_mib) {
            Some(0) => host.logs = false,
            Some(mib) => host.log_bytes = (mib << 20) + 4096,
            None => {}
        }
        let site = Site::new(rng.fork(), Arc::clone(&coverage));
        let (mut kinds, rare): (Vec<_>, Vec<_>) = KINDS.into_iter().partition(|(kind, _)| *kind != Kind::StateOld);
        kinds.retain(|_| rng.chance(1, 2));
        // After one of these much is excused.
        kinds.extend(rare.into_iter().filter(|_| SimRng::new(!seed).chance(1, 4)));
        if let Some(profile) = profile {
            kinds = profile.kinds.to_vec();
        }
        let mut world = Self {
            step: 1,
            host_key: HostKey::derive(&key, host_id(), epoch),
            agent: None,
            start: Start::Boot,
            log: Rc::default(),
            site,
            stopped_until: 0,
            wires: Vec::new(),
            sessions: 0,
            apart_until: 0,
            link: LinkTrouble::default(),
            clocks: [0, 0],
            kinds,
            unread_until: 0,
            ends: 0,
            unheard: 0,
            was_closed: false,
            settling: false,
            excused: false,
            acked: None,
            set_back: false,
            bookmarks: Vec::new(),
            named: 0,
            worst: 0,
            traces: std::env::var_os("FARSHORE_TRACE").is_some(),
            coverage,
            host,
            rng,
        };
        world.start_agent();
        world
    }

    fn now(&self) -> Now {
        Now(self.step * 1_000_000)
    }

    fn wall(&self, clock: usize) -> WallTime {
        let ms = 1_000_000_000_000_i64 + i64::try_from(self.step).expect("short") + self.clocks[clock];
        WallTime(u64::try_from(ms).expect("after 1970") * 1_000_000)
    }

    // The source.

    fn start_agent(&mut self) {
        if self.agent.is_some() {
            return;
        }
        self.host.storage.clear_fault();
        let at = (self.now(), self.step);
        let first = !self.host.kept.attached;
        let (agent, started) = Agent::start(&mut self.host, at, self.start, &self.host_key, &self.log);
        self.coverage.add(Fault::LogSurvived, started.logged);
        self.trace(|| {
            format!("agent starts {:?}, incarnation {}: {started:?}", self.start, self.host.kept.incarnation)
        });
        self.excused |= started.doubt;
        self.unheard += 1;
        if started.from_log {
            self.coverage.hit(Fault::ComparedLogged);
        } else if !started.resumed && !first {
            self.coverage.hit(Fault::ComparedAll);
        }
        self.was_closed = agent.ring.is_closed();
        self.agent = Some(agent);
        self.start = Start::Again;
    }

    fn kill_agent(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        agent.kill(&mut self.host, self.step);
        for wire in self.wires.iter_mut().filter(|wire| wire.source_up) {
            wire.cut_at_source(self.step, &mut self.rng);
        }
        self.take_unreadable();
    }

    fn crash_host(&mut self, to_backup: bool) {
        self.kill_agent();
        let forward = self.host.go_down(self.step, to_backup);
        self.excused |= !forward;
        self.start = Start::Boot;
    }

    /// What the streamer's driver does in one turn.
    fn turn_streamer(&mut self) {
        let (now, wall) = (self.now(), self.wall(0));
        let Some(agent) = &mut self.agent else { return };
        if agent.streamer.poll_deadline().is_some_and(|deadline| deadline <= now) {
            agent.streamer.handle_timeout(now).expect("few volumes");
        }
        agent.streamer.pull(now);
        // Heartbeats come faster than some links answer: at the end there are none, so that the ring can run empty.
        let heartbeats = !(self.settling && agent.is_whole());
        let slot_free = heartbeats && (agent.streamer.slot_free() || agent.streamer.wants_cut());
        agent.cut(&mut self.host, self.step, (now, wall), slot_free);
        agent.streamer.pull(now);
        agent.take_work(now);
        self.send();
        let Some(agent) = &mut self.agent else { return };
        agent.obey_log(&mut self.host, now);
        self.take_events();
        let Some(agent) = &mut self.agent else { return };
        let closed = agent.ring.is_closed();
        self.coverage.add(Fault::RingFull, u64::from(closed && !self.was_closed));
        self.was_closed = closed;
        if closed {
            agent.reopen(wall);
        }
    }

    fn take_unreadable(&mut self) {
        for (volume, offset, len) in std::mem::take(&mut self.log.borrow_mut().unreadable) {
            self.host.volumes[volume].history.unreadable(offset, len);
        }
    }

    fn send(&mut self) {
        let (now, step) = (self.now(), self.step);
        let Some(agent) = &mut self.agent else { return };
        while let Some((session, bytes)) = agent.streamer.poll_control() {
            if let Some(wire) = self.wires.iter_mut().find(|wire| wire.session == session && wire.source_up) {
                wire.control_to_target(step, &mut self.rng, bytes);
            }
        }
        while let Some(out) = agent.streamer.poll_batch(now) {
            match self.wires.iter_mut().find(|wire| wire.session == out.session) {
                Some(wire) if wire.batch_fits() => {
                    let bytes = out.batch.pieces.concat();
                    assert_eq!(bytes.len() as u64, out.batch.len);
                    wire.send_batch(step, &mut self.rng, bytes, (self.link, &self.coverage));
                }
                Some(_) => {
                    agent.streamer.handle_unsent(out.session, out.number, true);
                    break;
                }
                None => panic!("batch {} for a session that is gone", out.number),
            }
        }
        if let Some((session, reason)) = agent.streamer.poll_drop() {
            self.break_at_source(session, &reason);
        }
    }

    fn take_events(&mut self) {
        let now = self.now();
        let wall = self.wall(0);
        self.take_unreadable();
        let Some(agent) = &mut self.agent else { return };
        while let Some(event) = agent.streamer.poll_event() {
            if self.traces && !matches!(event, StreamEvent::Durable(_) | StreamEvent::Answers(_)) {
                crate::say(&format!("{:>6} {event:?}", self.step));
            }
            match event {
                StreamEvent::Greeted(welcome) => {
                    self.set_back = false;
                    if let Some(acked) = &self.acked {
                        let held = welcome.tail.map(|tail| (tail.incarnation, tail.number));
                        let known = (acked.incarnation, acked.batch);
                        assert!(
                            held.is_some_and(|held| held >= known),
                            "the target held {known:?}, and holds {held:?}"
                        );
                    }
                    // By the last batch that it holds the log did not cover everything.
                    self.excused |= welcome.tail.is_some() && welcome.log.is_none();
                    let mut log = self.log.borrow_mut();
                    match welcome.tail {
                        Some(tail) if tail.incarnation.0 < agent.tap.incarnation.get() => {
                            log.continues(tail.incarnation.0, tail.end.0);
                        }
                        Some(_) => {}
                        None => log.begins(),
                    }
                    drop(log);
                    agent.handle_greeted(&mut self.host, &welcome.joined, welcome.empty, welcome.generation.0);
                }
                StreamEvent::Live => {
                    agent.live = true;
                    let (life, number) = (agent.tap.incarnation.get(), self.host.kept.incarnation);
                    if life != number {
                        self.log.borrow_mut().is_taken_for(life, number);
                        self.host.cuts_are_of(life, number);
                        agent.tap.incarnation.set(number);
                    }
                    agent.hold_cuts = false;
                    let from = farshore_proto::Position(agent.ring.freed());
                    let empty = agent.empty.clone();
                    agent.syncer.handle_live(&empty, from);
                }
                StreamEvent::Durable(batch) => {
                    self.acked = Some(batch.point).filter(|_| !self.set_back);
                    self.unheard = 0;
                    if let Some(named) = batch.bookmark.filter(|_| batch.recoverable && !self.set_back) {
                        self.coverage.hit(Fault::Bookmarks);
                        self.bookmarks.push((batch.point, named));
                    }
                    agent.handle_durable(&mut self.host, batch.end, batch.recoverable);
                }
                StreamEvent::Answers(answers) => {
                    self.coverage.hit(Fault::Answers);
                    agent.syncer.handle_answers(&answers);
                }
                StreamEvent::Down { .. } => {
                    agent.live = false;
                    agent.syncer.handle_break();
                }
                StreamEvent::Log(farshore_streamer::LogNews::Kept(end)) => agent.group.note_durable(end),
                StreamEvent::Paused { .. }
                | StreamEvent::Resumed
                | StreamEvent::Log(_)
                | StreamEvent::Refused { .. } => {}
                StreamEvent::CompareEverything { reason } => {
                    // After a power cut what fills the disk log ahead of the first greeting follows what the log held, and the target may be
                    // ahead of that. And the activity log remembers a few lives only.
                    let excused = self.excused
                        || reason.contains("what this host has logged since follows another")
                        || self.unheard > LIVES_REMEMBERED && reason.contains("does not know of them either");
                    assert!(excused, "step {}: everything is compared for no reason: {reason}", self.step);
                    agent.compare_everything(&mut self.host, now);
                    // What the disk log held is given up.
                    let (life, from) = (agent.tap.incarnation.get(), agent.streamer.state().position);
                    self.log.borrow_mut().starts.insert(life, from.0);
                }
                StreamEvent::StartOver { incarnation, reason } => {
                    assert!(self.excused, "step {}: the stream starts over for no reason: {reason}", self.step);
                    agent.start_over(&mut self.host, (now, wall), incarnation);
                }
            }
        }
        for (volume, range) in std::mem::take(&mut agent.differs) {
            // Nothing here changes a disk past the filter, so only what could not be read, on either side, differs.
            let known = self.host.volumes[usize::from(volume)].history.is_known(range.start, range.end - range.start);
            assert!(!known || self.step < self.unread_until, "{range:?} of volume {volume} is said to differ");
        }
    }

    // The link.

    fn connect(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let apart = self.step < self.apart_until;
        if apart || !self.site.is_up() || self.wires.iter().any(|wire| wire.source_up) {
            return;
        }
        self.sessions += 1;
        let session = self.sessions;
        self.wires.push(Wire::new(session, &mut self.rng));
        self.site.handle_up(session);
        let now = Now(self.step * 1_000_000);
        agent.streamer.handle_link_up(now, session).expect("few volumes");
    }

    fn break_at_source(&mut self, session: u64, reason: &str) {
        let (now, step) = (self.now(), self.step);
        if let Some(wire) = self.wires.iter_mut().find(|wire| wire.session == session && wire.source_up) {
            wire.cut_at_source(step, &mut self.rng);
            self.coverage.hit(Fault::LinkBreak);
            if let Some(agent) = &mut self.agent {
                agent.streamer.handle_link_down(now, session, reason);
            }
        }
    }

    /// Something arrives at the target, over any session that it has.
    fn arrive_at_target(&mut self) {
        if self.wires.is_empty() || !self.site.is_up() || self.step < self.stopped_until {
            return;
        }
        let index = self.rng.index(self.wires.len());
        let wire = &mut self.wires[index];
        let (session, up) = (wire.session, wire.source_up);
        if let Some(mut arrival) = wire.at_target(self.step, &mut self.rng, &self.coverage) {
            if let (true, Arrival::Batch(_), Some(agent)) = (up, &arrival, &mut self.agent) {
                agent.streamer.handle_sent(session);
            }
            if let Arrival::Control(bytes) = &mut arrival
                && self.rng.chance(self.link.corrupt, 1000)
            {
                self.coverage.hit(Fault::ControlCorrupt);
                corrupt(&mut self.rng, bytes);
            }
            self.site.handle(session, arrival);
        } else if !up && wire.target_down.is_some_and(|at| at <= self.step) {
            self.wires.swap_remove(index);
            self.site.handle_down(session);
        }
        self.look_for_death();
    }

    fn arrive_at_source(&mut self) {
        let (now, step) = (self.now(), self.step);
        let Some(wire) = self.wires.iter_mut().find(|wire| wire.source_up) else { return };
        let session = wire.session;
        if wire.breaks_at.is_some_and(|at| at <= step) {
            self.break_at_source(session, "something was lost for good");
        } else if let Some(mut bytes) = wire.at_source(step) {
            if self.rng.chance(self.link.corrupt, 1000) {
                self.coverage.hit(Fault::ControlCorrupt);
                corrupt(&mut self.rng, &mut bytes);
            }
            if let Some(agent) = &mut self.agent {
                agent.streamer.handle_control(now, session, &bytes);
            }
        } else if wire.ends_at_source() {
            let reason = wire.closing.clone().unwrap_or_default();
            self.break_at_source(session, &reason);
        }
    }

    // The target.

    fn turn_target(&mut self) {
        if self.step < self.stopped_until {
            return;
        }
        for output in self.site.run(self.now(), self.wall(1)) {
            let of = match &output {
                Output::Control { session, .. } | Output::Close { session, .. } => *session,
            };
            let Some(wire) = self.wires.iter_mut().find(|wire| wire.session == of) else { continue };
            match output {
                Output::Control { bytes, .. } => wire.control_to_source(self.step, &mut self.rng, bytes),
                Output::Close { reason, .. } if wire.source_up => drop(wire.closing.get_or_insert(reason)),
                Output::Close { .. } => drop(wire.target_down.get_or_insert(self.step)),
            }
        }
        self.look_for_death();
    }

    fn look_for_death(&mut self) {
        if self.site.take_death(&mut self.rng) {
            self.lose_target();
        }
    }

    /// The target's process is gone.
    fn lose_target(&mut self) {
        self.wires.retain(|wire| wire.source_up);
        for wire in &mut self.wires {
            wire.cut_at_target(&mut self.rng);
            wire.target_down = Some(0);
        }
    }

    fn boot(&mut self) {
        if !self.site.is_up() {
            self.site.boot();
            self.look_for_death();
        }
    }

    fn chore(&mut self) {
        if self.step < self.stopped_until {
            return;
        }
        let wall = self.wall(1);
        self.site.chore(wall);
        self.look_for_death();
    }

    // The scheduler.

    fn turn_any(&mut self) {
        let (now, step) = (self.now(), self.step);
        match self.rng.below(108) {
            0..=21 => {
                if let Some(agent) = &mut self.agent {
                    agent.turn_any_guest(&mut self.host, step);
                }
            }
            22..=33 => {
                if let Some(agent) = &mut self.agent {
                    agent.turn_sync(&mut self.host, now);
                }
            }
            34..=48 => self.turn_streamer(),
            49..=59 => {
                if let Some(agent) = &mut self.agent {
                    agent.work(now);
                }
            }
            60..=71 => self.arrive_at_target(),
            72..=83 => self.arrive_at_source(),
            84..=91 => self.turn_target(),
            92..=93 => self.connect(),
            94..=97 => self.chore(),
            98 => {
                self.site.seal();
                self.look_for_death();
            }
            99..=101 => {
                if let Some(agent) = &mut self.agent {
                    agent.turn_log(&mut self.host, step);
                }
            }
            102..=106 => {
                if let Some(agent) = &mut self.agent {
                    agent.turn_disk_log(&self.host, (now, step));
                }
            }
            _ => self.trouble(),
        }
    }

    fn trouble(&mut self) {
        if self.rng.chance(1, 2) {
            // What is down comes back.
            if self.site.needs_restart() && self.site.is_up() && self.step >= self.ends {
                self.site.spare();
                self.site.kill();
                self.lose_target();
            }
            self.boot();
            if self.rng.chance(1, 2) {
                self.start_agent();
            }
            return;
        }
        if self.rng.chance(1, 20) && self.site.stream().is_some() {
            self.site.keep("1s");
            self.look_for_death();
        }
        let mut at = self.rng.below(TROUBLES);
        let found = self.kinds.iter().find_map(|(kind, weight)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here.then_some(*kind)
        });
        if let Some(kind) = found {
            self.happen(kind);
        }
    }

    /// With `FARSHORE_TRACE`, for the person who looks for a seed's reason.
    fn trace(&self, text: impl FnOnce() -> String) {
        if self.traces {
            crate::say(&format!("{:>6} {}", self.step, text()));
        }
    }

    fn happen(&mut self, kind: Kind) {
        self.trace(|| format!("{kind:?}"));
        let until = self.step + 1 + self.rng.below(TROUBLE_STEPS);
        match kind {
            Kind::Link => {
                if let Some(session) = self.wires.iter().find(|wire| wire.source_up).map(|wire| wire.session) {
                    self.break_at_source(session, "cut by the test");
                }
            }
            Kind::Transport => {
                let mut rate = || self.rng.below(2) * self.rng.below(60);
                self.link = LinkTrouble { lose: rate(), double: rate(), corrupt: rate() / 2 };
                self.ends = self.ends.max(until);
            }
            Kind::Partition => {
                let until = self.step + self.rng.below(2000);
                self.coverage.hit(Fault::Partition);
                self.apart_until = until;
                for wire in &mut self.wires {
                    wire.stalled_until = until;
                    if self.rng.chance(1, 2) {
                        wire.breaks_at.get_or_insert(self.step + self.rng.below(600));
                    }
                }
            }
            Kind::Target if !self.site.is_up() => {}
            Kind::Target => match self.rng.below(4) {
                0 => {
                    self.site.kill();
                    self.lose_target();
                }
                1 => {
                    self.coverage.hit(Fault::TargetStopped);
                    self.stopped_until = until;
                }
                // Dies at a call of the work that comes next, or soon.
                _ => self.site.die_within(60, &mut self.rng),
            },
            Kind::TargetDisk if self.site.is_up() => {
                let (full, rate) = (self.rng.chance(1, 2), 1 + self.rng.below(300));
                self.site.fail(full, rate, self.rng.fork());
                self.ends = self.ends.max(until);
            }
            Kind::TargetDisk => {}
            Kind::TargetOld => {
                if self.rng.chance(1, 2) {
                    self.site.back_up();
                } else if self.site.go_back(&mut self.rng) {
                    self.lose_target();
                    // What it said after that copy was made is not heard any more.
                    self.wires.iter_mut().for_each(Wire::hush);
                    self.take_events();
                    self.excused = true;
                    (self.acked, self.set_back) = (None, true);
                    self.bookmarks.clear();
                }
            }
            Kind::Crash => self.crash_host(false),
            Kind::HostOld if self.host.has_backup() => self.crash_host(true),
            Kind::HostOld => self.host.back_up(),
            Kind::StateOld => {
                // A copy is made of what a living agent writes, too.
                if self.host.has_own_backup() {
                    self.kill_agent();
                }
                self.excused |= self.host.swap_own();
            }
            Kind::Kill => {
                if self.agent.is_some() {
                    self.coverage.hit(Fault::AgentKill);
                    self.kill_agent();
                }
            }
            Kind::Reads => self.trouble_disk(until, |faults, rate| faults.reads_fail(rate / 4)),
            Kind::Writes => self.trouble_disk(until, DiskFaults::writes_fail),
            Kind::Flushes => self.trouble_disk(until, |faults, rate| faults.flushes_fail(rate * 4)),
            Kind::Slow => self.trouble_disk(until, |faults, rate| faults.slow_down(rate * 3)),
            Kind::Clocks => {
                let clock = self.rng.index(2);
                self.coverage.hit([Fault::SourceClock, Fault::TargetClock][clock]);
                let most = [1_000, 100_000, 200_000_000][self.rng.index(3)];
                let by = i64::try_from(self.rng.below(most)).expect("small");
                self.clocks[clock] += if self.rng.chance(1, 2) { by } else { -by };
            }
            Kind::Activity | Kind::DiskLog => {
                let Some(agent) = &mut self.agent else { return };
                let path = if kind == Kind::Activity { ACTIVITY } else { DISK_LOG };
                if self.rng.chance(1, 2) {
                    if kind == Kind::Activity {
                        self.coverage.hit(Fault::ActivityHung);
                        agent.hang_activity(until);
                    } else {
                        self.coverage.hit(Fault::LogHung);
                        agent.hang_disk_log(until);
                    }
                } else {
                    let (rate, mut rng) = (1 + self.rng.below(400), self.rng.fork());
                    let coverage = Arc::clone(&self.coverage);
                    // What the disk log cannot read again is compared.
                    self.excused |= kind == Kind::DiskLog;
                    self.host.storage.set_fault(move |op, of: &Path| {
                        let concerned = matches!(op, StorageOp::Write | StorageOp::Sync | StorageOp::Read);
                        if of != Path::new(path) || !concerned || !rng.chance(rate, 1000) {
                            return None;
                        }
                        if path == ACTIVITY {
                            coverage.hit(Fault::ActivityEio);
                        }
                        Some(std::io::Error::from_raw_os_error(5))
                    });
                    self.ends = self.ends.max(until);
                }
            }
        }
    }

    fn trouble_disk(&mut self, until: u64, make: impl FnOnce(&DiskFaults, u64)) {
        let at = self.rng.index(self.host.volumes.len());
        make(&self.host.volumes[at].faults, 1 + self.rng.below(200));
        self.ends = self.ends.max(until);
    }

    /// Trouble that lasted is over.
    fn ease(&mut self) {
        if self.ends == 0 || self.step < self.ends {
            return;
        }
        self.ends = 0;
        self.link = LinkTrouble::default();
        self.host.spare();
        self.site.storage_heals();
    }

    fn order_bookmark(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        self.named += 1;
        // Closed: not now.
        let _ = agent.cutter.bookmark(name(&format!("b{}", self.named)), false);
    }

    fn watch(&mut self) {
        if self.site.take_failed_read() {
            self.unread_until = self.step + ANSWERS_STEPS;
        }
        let Some(agent) = &mut self.agent else { return };
        // Everything was compared, and is there: what comes later has to have another reason.
        let over = self.excused && self.ends == 0 && !self.set_back && !self.host.kept.compare_everything;
        if over && agent.live && agent.is_whole() && agent.streamer.is_drained() {
            self.excused = false;
        }
        agent.watch_stalls(&mut self.host, self.step);
        agent.watch_guests(&mut self.worst);
    }

    /// `steps` milliseconds of load and trouble.
    pub(crate) fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step += 1;
            // Bursts fill the ring; in between sync can end.
            let load = if self.step % 1000 < 250 { 80 } else { 15 };
            if self.rng.chance(load, 100)
                && let Some(agent) = &mut self.agent
            {
                agent.submit(&mut self.host, self.step);
            }
            if self.rng.chance(1, 100) {
                self.order_bookmark();
            }
            for _ in 0..6 {
                self.turn_any();
            }
            self.ease();
            self.watch();
            if self.step.is_multiple_of(CHECK_STEPS) {
                self.check_points(4);
            }
        }
    }

    /// No more load and trouble: everything becomes durable.
    pub(crate) fn settle(&mut self) {
        self.ends = 0;
        self.link = LinkTrouble::default();
        self.host.spare();
        self.site.spare();
        self.apart_until = 0;
        self.stopped_until = 0;
        self.wires.iter_mut().for_each(|wire| wire.stalled_until = 0);
        if self.site.needs_restart() && self.site.is_up() {
            self.site.kill();
            self.lose_target();
        }
        self.start_agent();
        self.settling = true;
        for _ in 0..60_000 {
            // Where a greeting was refused, the next one waits for seconds.
            self.step += if self.agent.as_ref().is_some_and(|agent| !agent.live) { 10 } else { 2 };
            let (now, step) = (self.now(), self.step);
            self.boot();
            self.connect();
            let agent = self.agent.as_mut().expect("started");
            agent.verifies = false;
            agent.turn_all_guests(&mut self.host, step);
            agent.turn_sync(&mut self.host, now);
            agent.turn_log(&mut self.host, step);
            agent.turn_disk_log(&self.host, (now, step));
            self.turn_streamer();
            self.agent.as_mut().expect("started").work(now);
            self.arrive_at_target();
            self.turn_target();
            self.arrive_at_source();
            self.watch();
            let agent = self.agent.as_ref().expect("started");
            if agent.live && agent.is_whole() && agent.streamer.is_drained() {
                return;
            }
        }
        let agent = self.agent.as_ref().expect("started");
        panic!(
            "does not come to rest: {} requests, live {}, missing {:?}, {:?}, {:?}, {:?}",
            agent.pending(),
            agent.live,
            agent.open_ends(),
            agent.group,
            agent.syncer,
            agent.streamer.status(self.wall(0))
        );
    }

    /// What tells two runs apart.
    pub(crate) fn digest(&self) -> (u64, u64, u64, Vec<u64>, Vec<Vec<u8>>) {
        let images = (0..self.host.volumes.len()).map(|volume| self.host.image(volume)).collect();
        let head = self.agent.as_ref().map_or(0, |agent| agent.ring.head());
        let number = self.agent.as_ref().map_or(0, |agent| agent.streamer.state().number.0);
        (self.step, head, number + (self.sessions << 32), self.coverage.counts(), images)
    }
}
