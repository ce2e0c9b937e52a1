//! Both sites and what joins them; who goes next.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use farshore_proto::keys::HostKey;
use farshore_proto::session::SourceConfig;
use farshore_proto::{Generation, GroupId, HostId, Incarnation, Now, PointId, Position, VolumeIndex, WallTime};
use farshore_ring::CellRef;
use farshore_streamer::{
    CaptureRing, Entropy, RingSource, SegmentPool, StreamEvent, Streamer, StreamerConfig, Work, Worker,
};
use farshore_target::lane::Output;
use farshore_target::points::Point;
use farshore_uring::sim::SimRng;

use crate::history::check_cut;
use crate::host::Host;
use crate::site::{Site, Stream, VAULT, name, read_volume, restore_volume, vault_key};
use crate::tap::{Log, Replay, Tap};
use crate::wire::Wire;

/// Points that one check reads.
const POINTS_MAX: usize = 30;
/// Steps from one check of the offered points to the next.
const CHECK_STEPS: u64 = 1000;

/// What happened in a run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Trouble {
    pub(crate) breaks: u64,
    pub(crate) crashes: u64,
    pub(crate) closed: u64,
    pub(crate) moves: u64,
    pub(crate) points: u64,
    pub(crate) acked: u64,
    pub(crate) answers: u64,
    pub(crate) verified: u64,
}

impl Trouble {
    fn counts(&self) -> [(&'static str, u64); 8] {
        [
            ("broken sessions", self.breaks),
            ("crashes of the target", self.crashes),
            ("times the ring ran full", self.closed),
            ("moves of the base", self.moves),
            ("points checked", self.points),
            ("writes acknowledged", self.acked),
            ("answers to sync", self.answers),
            ("bytes verified", self.verified),
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.breaks += other.breaks;
        self.crashes += other.crashes;
        self.closed += other.closed;
        self.moves += other.moves;
        self.points += other.points;
        self.acked += other.acked;
        self.answers += other.answers;
        self.verified += other.verified;
    }

    /// A run in which nothing went wrong proves nothing.
    pub(crate) fn assert_all_happened(&self) {
        for (what, count) in self.counts() {
            assert!(count > 0, "no {what} in all seeds: {self:?}");
        }
    }
}

fn entropy(rng: &mut SimRng) -> Entropy {
    let mut rng = rng.fork();
    Box::new(move || {
        let mut bytes = [0; 32];
        rng.fill(&mut bytes);
        bytes
    })
}

pub(crate) struct World {
    rng: SimRng,
    /// The clock: one step is a millisecond.
    step: u64,
    host: Host,
    log: Rc<RefCell<Log>>,
    first: u64,
    tap: Tap,
    streamer: Streamer<Tap>,
    worker: Worker,
    works: Vec<Work<CellRef>>,
    empty: Vec<VolumeIndex>,
    live: bool,
    site: Site,
    wires: Vec<Wire>,
    sessions: u64,
    was_closed: bool,
    settling: bool,
    pub(crate) trouble: Trouble,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let (epoch, key) = vault_key();
        let host_key = HostKey::derive(&key, HostId::derive(VAULT, &name("host")), epoch);
        let group = GroupId::derive(VAULT, &name("db"));
        let host = Host::new(&mut rng, host_key.dedup_key(group));
        let session = SourceConfig { vault: VAULT, group: name("db"), host: name("host"), host_key: host_key.clone() };
        let mut config = StreamerConfig::new(session, Generation(0), Incarnation(1), host.declared());
        config.workers = 2;
        config.window_batches = 8;
        let log = Rc::<RefCell<Log>>::default();
        let ring = CaptureRing::new(std::sync::Arc::clone(&host.ring)).expect("the only consumer");
        let tap = Tap { ring: Rc::new(RefCell::new(ring)), log: Rc::clone(&log) };
        let first = tap.freed().0;
        let streamer = Streamer::new(Now(1), config, tap.clone(), entropy(&mut rng)).expect("a new ring");
        Self {
            step: 1,
            log,
            first,
            tap,
            streamer,
            worker: Worker::new(host_key, group, SegmentPool::new(16 << 20)),
            works: Vec::new(),
            empty: Vec::new(),
            live: false,
            site: Site::new(rng.fork()),
            wires: Vec::new(),
            sessions: 0,
            was_closed: false,
            settling: false,
            trouble: Trouble::default(),
            host,
            rng,
        }
    }

    fn now(&self) -> Now {
        Now(self.step * 1_000_000)
    }

    fn wall(&self) -> WallTime {
        WallTime(1_000_000_000_000 + self.step * 1_000_000)
    }

    // The source.

    /// What the streamer's driver does in one turn.
    fn turn_streamer(&mut self) {
        let (now, wall) = (self.now(), self.wall());
        if self.streamer.poll_deadline().is_some_and(|deadline| deadline <= now) {
            self.streamer.handle_timeout(now).expect("few volumes");
        }
        self.streamer.pull(now);
        // Heartbeats come faster than some links answer: at the end there are none, so that the ring can run empty.
        let heartbeats = !(self.settling && self.host.is_whole());
        let slot_free = heartbeats && (self.streamer.slot_free() || self.streamer.wants_cut());
        self.host.cut(self.step, now, wall, slot_free);
        self.streamer.pull(now);
        while let Some(work) = self.streamer.poll_work(now) {
            self.works.push(work);
        }
        self.send();
        self.take_events();
        let closed = self.host.ring.is_closed();
        self.trouble.closed += u64::from(closed && !self.was_closed);
        self.was_closed = closed;
        self.reopen();
    }

    fn reopen(&mut self) {
        if self.host.ring.is_closed() {
            let wall = self.wall();
            self.host.group.reopen(self.tap.ring.borrow_mut().consumer_mut(), wall);
        }
    }

    fn send(&mut self) {
        let (now, step) = (self.now(), self.step);
        while let Some((session, bytes)) = self.streamer.poll_control() {
            if let Some(wire) = self.wires.iter_mut().find(|wire| wire.session == session) {
                wire.control_to_target(step, &mut self.rng, bytes);
            }
        }
        while let Some(out) = self.streamer.poll_batch(now) {
            match self.wires.iter_mut().find(|wire| wire.session == out.session) {
                Some(wire) if wire.batch_fits() => {
                    let bytes = out.batch.pieces.concat();
                    assert_eq!(bytes.len() as u64, out.batch.len);
                    wire.send_batch(step, &mut self.rng, bytes);
                }
                Some(_) => {
                    self.streamer.handle_unsent(out.session, out.number, true);
                    break;
                }
                None => panic!("batch {} for a session that is gone", out.number),
            }
        }
        if let Some((session, reason)) = self.streamer.poll_drop() {
            self.break_at_source(session, &reason);
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.streamer.poll_event() {
            match event {
                StreamEvent::Greeted(welcome) => self.empty = welcome.empty,
                StreamEvent::Live => {
                    self.live = true;
                    let from = Position(self.host.ring.freed());
                    self.host.syncer.handle_live(&self.empty, from);
                }
                StreamEvent::Durable(batch) => self.host.syncer.handle_durable(batch.end),
                StreamEvent::Answers(answers) => {
                    self.trouble.answers += 1;
                    self.host.syncer.handle_answers(&answers);
                }
                StreamEvent::Down { .. } => {
                    self.live = false;
                    self.host.syncer.handle_break();
                }
                StreamEvent::Paused { .. }
                | StreamEvent::Resumed
                | StreamEvent::Log(_)
                | StreamEvent::Refused { .. } => {}
                // The ring is never lost here, and what was acknowledged is durable: the stream can always go on.
                StreamEvent::CompareEverything { reason } | StreamEvent::StartOver { reason, .. } => {
                    panic!("step {}: the stream cannot go on: {reason}", self.step)
                }
            }
        }
    }

    fn work(&mut self) {
        if self.works.is_empty() {
            return;
        }
        let work = self.works.swap_remove(self.rng.index(self.works.len()));
        let mut done = self.worker.run(work);
        done.busy = Duration::from_micros(100);
        let now = self.now();
        self.streamer.handle_done(now, done);
    }

    // The link.

    fn connect(&mut self) {
        if !self.site.is_up() || self.wires.iter().any(|wire| wire.source_up) {
            return;
        }
        self.sessions += 1;
        let session = self.sessions;
        self.wires.push(Wire::new(session, &mut self.rng));
        self.site.handle_up(session);
        let now = self.now();
        self.streamer.handle_link_up(now, session).expect("few volumes");
    }

    fn break_at_source(&mut self, session: u64, reason: &str) {
        let (now, step) = (self.now(), self.step);
        if let Some(wire) = self.wires.iter_mut().find(|wire| wire.session == session && wire.source_up) {
            wire.cut_at_source(step, &mut self.rng);
            self.trouble.breaks += 1;
            self.streamer.handle_link_down(now, session, reason);
        }
    }

    /// Something arrives at the target, over any session that it has.
    fn arrive_at_target(&mut self) {
        if self.wires.is_empty() || !self.site.is_up() {
            return;
        }
        let index = self.rng.index(self.wires.len());
        let wire = &mut self.wires[index];
        let (session, up) = (wire.session, wire.source_up);
        if let Some(arrival) = wire.at_target(self.step, &mut self.rng) {
            if up && matches!(arrival, crate::wire::Arrival::Batch(_)) {
                self.streamer.handle_sent(session);
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
        if let Some(bytes) = wire.at_source(step) {
            self.streamer.handle_control(now, session, &bytes);
        } else if wire.ends_at_source() {
            let reason = wire.closing.clone().unwrap_or_default();
            self.break_at_source(session, &reason);
        }
    }

    // The target.

    fn turn_target(&mut self) {
        for output in self.site.run(self.now(), self.wall()) {
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
        if !self.site.take_death(&mut self.rng) {
            return;
        }
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

    // The scheduler.

    fn turn_any(&mut self) {
        match self.rng.below(100) {
            0..=21 => self.host.turn_any_guest(self.step),
            22..=33 => self.host.turn_sync(self.now()),
            34..=48 => self.turn_streamer(),
            49..=59 => self.work(),
            60..=71 => self.arrive_at_target(),
            72..=83 => self.arrive_at_source(),
            84..=91 => self.turn_target(),
            92..=93 => self.connect(),
            94..=97 => {
                let wall = self.wall();
                self.site.chore(wall);
                self.look_for_death();
            }
            98 => {
                self.site.seal();
                self.look_for_death();
            }
            _ => self.trouble(),
        }
    }

    fn trouble(&mut self) {
        match self.rng.below(20) {
            0..=2 => {
                if let Some(session) = self.wires.iter().find(|wire| wire.source_up).map(|wire| wire.session) {
                    self.break_at_source(session, "cut by the test");
                }
            }
            // Dies at a call of the work that comes next, or soon.
            3 if self.site.is_up() => self.site.die_within(60, &mut self.rng),
            4..=14 => self.boot(),
            15 if self.site.stream().is_some() => {
                self.site.keep("1s");
                self.look_for_death();
            }
            _ => {}
        }
    }

    /// `steps` milliseconds of load and trouble.
    pub(crate) fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step += 1;
            // Bursts fill the ring; in between sync can end.
            let load = if self.step % 1000 < 250 { 80 } else { 15 };
            if self.rng.chance(load, 100) {
                self.host.submit(self.step);
            }
            for _ in 0..6 {
                self.turn_any();
            }
            if self.step.is_multiple_of(CHECK_STEPS) {
                self.check_points(5);
            }
        }
    }

    /// No more load and trouble: everything becomes durable.
    pub(crate) fn settle(&mut self) {
        self.site.spare();
        self.settling = true;
        self.host.verifies = false;
        for _ in 0..40_000 {
            self.step += 2;
            self.boot();
            self.connect();
            self.host.turn_all_guests(self.step);
            self.host.turn_sync(self.now());
            self.turn_streamer();
            self.work();
            self.arrive_at_target();
            self.turn_target();
            self.arrive_at_source();
            if self.live && self.host.is_whole() && self.streamer.is_drained() {
                self.trouble.crashes = self.site.crashes;
                self.trouble.moves = self.site.moves;
                self.trouble.acked = self.host.acked;
                self.trouble.verified = self.host.verified;
                return;
            }
        }
        panic!(
            "does not come to rest: {} requests, live {}, missing {:?}, {:?}, {:?}, {:?}",
            self.host.pending(),
            self.live,
            self.host.open_ends(),
            self.host.group,
            self.host.syncer,
            self.streamer.status(self.wall())
        );
    }

    // The checks.

    fn point_images(&self, stream: &Stream, point: &Point) -> Vec<(usize, Vec<u8>)> {
        let sizes = self.host.sizes();
        let read = |volume: &VolumeIndex| {
            let index = usize::from(volume.0);
            (index, read_volume(stream, *volume, sizes[index], point))
        };
        point.volumes.iter().map(read).collect()
    }

    /// Some of the points that the target offers now.
    fn check_points(&mut self, most: usize) {
        let Some(stream) = self.site.stream() else { return };
        // Reading counts as the machine's work: it must not die of the check.
        self.site.spare();
        let mut points: Vec<Point> = stream.points().recoverable().cloned().collect();
        while points.len() > most {
            // The newest stays.
            let index = self.rng.index(points.len() - 1);
            points.remove(index);
        }
        let log = Rc::clone(&self.log);
        let mut replay = Replay::new(&self.host.sizes(), self.first);
        for point in &points {
            assert_eq!(stream.check_point(&point.id).as_ref().ok(), Some(point), "an offered point can be had");
            replay.advance(&log.borrow(), point.end.0);
            let images = self.point_images(&stream, point);
            for (volume, image) in &images {
                let differs = image.iter().zip(&replay.images[*volume]).position(|(a, b)| a != b);
                assert_eq!(differs, None, "volume {volume} at {}: first byte that is not the stream's", point.id);
            }
            let cut = self.host.cuts.get(&point.end.0).copied();
            let cut = cut.unwrap_or_else(|| panic!("{} is no cut that was made", point.id));
            let held: Vec<_> = images.iter().map(|(at, image)| (&self.host.histories[*at], image.as_slice())).collect();
            if let Err(why) = check_cut(&held, cut) {
                panic!("{} of position {}: {why}", point.id, point.end);
            }
            self.trouble.points += 1;
        }
    }

    /// At rest: the newest point is what the source's disks hold, and every older one is what it should be.
    pub(crate) fn check_settled(&mut self) {
        let stream = self.site.stream().expect("the target is up and knows the stream");
        let newest = stream.points().newest().cloned().expect("a point");
        assert_eq!(newest.end.0, self.host.ring.head(), "all of the ring is in it");
        let sizes = self.host.sizes();
        assert_eq!(newest.volumes.len(), sizes.len(), "all volumes have joined");
        for (volume, image) in self.point_images(&stream, &newest) {
            let disk = self.host.image(volume);
            let differs = image.iter().zip(&disk).position(|(a, b)| a != b);
            assert_eq!(differs, None, "volume {volume}: first byte that differs from the source's disk");
            let index = VolumeIndex(u16::try_from(volume).expect("few"));
            let restored = restore_volume(&stream, index, sizes[volume], &newest);
            assert!(restored == disk, "volume {volume} restores to something else than the source's disk");
        }
        self.check_points(POINTS_MAX);
        // Another life of the target offers the same.
        let ids = |stream: &Stream| stream.points().recoverable().map(|point| point.id).collect::<Vec<_>>();
        let before = ids(&stream);
        drop(stream);
        self.site.die_now(&mut self.rng);
        self.site.boot();
        let stream = self.site.stream().expect("opens again");
        let after = ids(&stream);
        // The base alone still holds the horizon's own point, but its row goes with its segment: a restart may forget it.
        let horizon = stream.record().horizon;
        let above = |ids: &[PointId]| ids.iter().copied().filter(|id| Some(*id) != horizon).collect::<Vec<_>>();
        assert_eq!(above(&after), above(&before), "no point is lost or made by a crash at rest");
        assert_eq!(after.last(), before.last(), "nor is the newest, wherever the horizon is");
        self.check_points(3);
    }

    /// What tells two runs apart.
    pub(crate) fn digest(&self) -> (u64, u64, u64, u64, Vec<Vec<u8>>) {
        let images = (0..self.host.sizes().len()).map(|volume| self.host.image(volume)).collect();
        let state = self.streamer.state();
        (self.step, self.host.ring.head(), state.number.0, self.sessions, images)
    }
}
