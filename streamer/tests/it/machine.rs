//! The machine against a naive target, with breaks, lost acknowledgements and kills at random points.

mod logged;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::record::Kind;
use farshore_proto::session::{ChainCheck, SourceConfig};
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, Incarnation, LogMark, Now, SECTOR_BYTES, VolumeIndex, WallTime,
};
use farshore_streamer::{
    Done, DurableBatch, LogDone, LogOrder, LogStart, LoggedBatch, Phase, RingSource, SegmentPool, StreamEvent,
    StreamLog, Streamer, StreamerConfig, TokenBucket, VolumeSet, Work, Worker,
};

use crate::common::{Cell, Image, Rng, Said, SharedRing, VAULT, host_key, name};
use crate::target::{Journal, Target, foreign_tail};

const SLOTS: u64 = 4;

fn config(incarnation: u64) -> StreamerConfig {
    let session = SourceConfig { vault: VAULT, group: name("group"), host: name("host"), host_key: host_key() };
    let volumes = (0..2)
        .map(|index| VolumeDecl {
            index: VolumeIndex(index),
            name: name(&format!("v{index}")),
            size: SLOTS * 65536,
            block: 512,
        })
        .collect();
    let mut config = StreamerConfig::new(session, Generation(1), Incarnation(incarnation), volumes);
    config.workers = 2;
    config.window_batches = 5;
    config
}

struct World {
    rng: Rng,
    now: Now,
    ring: SharedRing,
    incarnation: u64,
    streamer: Option<Streamer<SharedRing>>,
    worker: Worker,
    works: Vec<Work<Cell>>,
    session: u64,
    up: bool,
    /// Ends the session at the next step.
    to_target: VecDeque<Vec<u8>>,
    to_source: VecDeque<Vec<u8>>,
    batches: Vec<(u64, Vec<u8>)>,
    target: Target,
    journal: Journal,
    /// What guests wrote, by incarnation and position.
    log: VecDeque<((u64, u64), Said)>,
    disk: Option<Disk>,
    /// Image of the source at the target's tail, and in all.
    at_tail: Image,
    whole: Image,
    events: Vec<StreamEvent>,
    durable: Vec<DurableBatch>,
    time: u64,
    crashes: u32,
    /// After a crash: everything is sent once there is room.
    sync_due: bool,
}

/// The disk log in memory.
#[derive(Default)]
struct Disk {
    held: VecDeque<(LoggedBatch, Vec<u8>)>,
    /// Of `held`, what survives the host.
    durable: usize,
    /// Recorded in the agent's state.
    line: bool,
    orders: VecDeque<LogOrder>,
    epoch: u64,
    /// Batches that it takes.
    room: usize,
    logged: usize,
    loaded: usize,
    refused: usize,
}

impl Disk {
    fn start(&self) -> LogStart {
        let batches = if self.line { self.held.iter().map(|(batch, _)| batch.clone()).collect() } else { Vec::new() };
        LogStart { batches, begun: self.line }
    }

    /// Obeys one order, as the log's thread does.
    fn obey(&mut self, streamer: &mut Streamer<SharedRing>, now: Now, order: LogOrder) {
        match order {
            LogOrder::Append { epoch, batch, pieces } => {
                self.epoch = epoch;
                let follows = self.held.back().is_none_or(|(last, _)| batch.number == last.number.next());
                if !follows || self.held.len() >= self.room {
                    self.refused += 1;
                    self.sync(streamer, now);
                    streamer.handle_log(now, LogDone::Full { epoch });
                    return;
                }
                let before = self.held.back().map(|(last, _)| (last.chain, last.after));
                assert!(before.is_none_or(|before| before == (batch.previous, batch.before)), "without a gap");
                self.held.push_back((*batch, pieces.concat()));
                self.logged += 1;
            }
            LogOrder::Load { epoch, number } => {
                let found = self.held.iter().find(|(batch, _)| batch.number == number);
                let bytes = found.map(|(_, bytes)| bytes.clone()).expect("asked for what is there");
                self.loaded += 1;
                streamer.handle_log(now, LogDone::Loaded { epoch, number, bytes: bytes.into() });
            }
            LogOrder::Trim { number } => {
                while self.held.pop_front_if(|(batch, _)| batch.number <= number).is_some() {
                    self.durable = self.durable.saturating_sub(1);
                }
            }
            LogOrder::Probe { epoch } => {
                assert!(!self.line && self.held.is_empty(), "a log in use tells by itself");
                streamer.handle_log(now, LogDone::Probed { epoch });
            }
            LogOrder::Begin => {
                self.line = true;
                streamer.handle_log_begun();
            }
            LogOrder::End | LogOrder::GiveUp => {
                if matches!(order, LogOrder::End) {
                    assert!(self.held.is_empty(), "nothing is forgotten that is not at the target");
                }
                self.held.clear();
                self.durable = 0;
                self.line = false;
                streamer.handle_log_ended();
            }
        }
    }

    fn sync(&mut self, streamer: &mut Streamer<SharedRing>, now: Now) {
        if self.durable < self.held.len() {
            self.durable = self.held.len();
            let number = self.held.back().expect("not empty").0.number;
            streamer.handle_log(now, LogDone::Appended { epoch: self.epoch, number });
        }
    }
}

impl World {
    fn new(seed: u64) -> Self {
        Self::with(seed, config(1))
    }

    fn with(seed: u64, config: StreamerConfig) -> Self {
        let ring = SharedRing::new(1);
        let mut world = Self {
            rng: Rng(seed),
            now: Now(1),
            incarnation: 1,
            streamer: None,
            worker: Worker::new(host_key(), GroupId::derive(VAULT, &name("group")), SegmentPool::new(4 << 20)),
            works: Vec::new(),
            session: 0,
            up: false,
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            batches: Vec::new(),
            target: Target::new(),
            journal: Journal::new(),
            log: VecDeque::new(),
            disk: None,
            at_tail: Image::default(),
            whole: Image::default(),
            events: Vec::new(),
            durable: Vec::new(),
            time: 0,
            crashes: 0,
            sync_due: false,
            ring,
        };
        world.open(config);
        world
    }

    /// With a small ring and a disk log for `room` batches.
    fn with_log(seed: u64, room: usize) -> Self {
        let mut config = config(1);
        config.disk_log = Some(LogStart::default());
        let mut world = Self::with(seed, config);
        world.ring.lock().size_entries = 96;
        world.disk = Some(Disk { room, ..Disk::default() });
        world
    }

    /// Passes orders to the log; does some of them.
    fn turn_log(&mut self, most: usize) {
        self.die_if_due();
        let (now, Some(mut disk)) = (self.now, self.disk.take()) else { return };
        let streamer = self.streamer.as_mut().expect("alive");
        while let Some(order) = streamer.poll_log(now) {
            match order {
                LogOrder::Begin | LogOrder::End | LogOrder::GiveUp => {
                    // Recorded by the streamer's own thread, before it goes on; the log hears of it behind what it was told before.
                    while let Some(order) = disk.orders.pop_front() {
                        disk.obey(streamer, now, order);
                    }
                    disk.obey(streamer, now, order);
                }
                other @ (LogOrder::Append { .. }
                | LogOrder::Load { .. }
                | LogOrder::Trim { .. }
                | LogOrder::Probe { .. }) => {
                    disk.orders.push_back(other);
                }
            }
        }
        for _ in 0..most {
            let Some(order) = disk.orders.pop_front() else { break };
            disk.obey(streamer, now, order);
            if self.ring.lock().dies_in == Some(0) {
                break;
            }
        }
        self.disk = Some(disk);
        self.die_if_due();
    }

    /// A process that was killed between two stores does nothing more.
    fn die_if_due(&mut self) {
        if self.ring.lock().dies_in == Some(0) {
            self.kill();
        }
    }

    fn sync_log(&mut self) {
        let (now, Some(mut disk)) = (self.now, self.disk.take()) else { return };
        disk.sync(self.streamer.as_mut().expect("alive"), now);
        self.disk = Some(disk);
        self.die_if_due();
    }

    fn open(&mut self, config: StreamerConfig) {
        let mut rng = Rng(self.rng.next());
        let entropy = Box::new(move || rng.bytes(32).try_into().expect("32 bytes"));
        let streamer = Streamer::new(self.now, config, self.ring.clone(), entropy).expect("a sound ring");
        self.streamer = Some(streamer);
    }

    fn streamer(&mut self) -> &mut Streamer<SharedRing> {
        self.streamer.as_mut().expect("alive")
    }

    fn kill(&mut self) {
        self.streamer = None;
        self.works.clear();
        self.ring.lock().dies_in = None;
        self.unplug();
        let mut config = config(self.incarnation);
        config.joined = [VolumeIndex(0), VolumeIndex(1)].into_iter().collect();
        if let Some(disk) = &mut self.disk {
            disk.orders.clear();
            let left = disk.durable
                + usize::try_from(self.rng.below((disk.held.len() - disk.durable) as u64 + 1)).expect("small");
            disk.held.truncate(left);
            // What is read at the start is made durable before it is relied upon.
            disk.durable = left;
            config.disk_log = Some(disk.start());
            disk.epoch = 0;
        }
        self.open(config);
    }

    /// The host goes down: the ring is lost, and with it what is not in the disk log. Everything is compared, as far as the agent knows.
    fn crash_host(&mut self) {
        let disk = self.disk.as_mut().expect("with a log");
        disk.held.truncate(disk.durable);
        let kept = disk.held.back().map_or((self.incarnation, 0), |(batch, _)| (batch.incarnation.0, batch.end.0));
        let tail = self.journal.tail().map_or((0, 0), |tail| (tail.incarnation.0, tail.end.0));
        self.log.retain(|(position, _)| *position < kept.max(tail));
        self.incarnation += 1;
        let entries = self.ring.lock().size_entries;
        self.ring = SharedRing::new(self.incarnation);
        self.ring.lock().size_entries = entries;
        self.publish(Said::new(Kind::EventBegin));
        self.kill();
        self.crashes += 1;
        self.sync_due = true;
    }

    fn unplug(&mut self) {
        self.up = false;
        self.to_target.clear();
        self.to_source.clear();
        self.batches.clear();
    }

    fn break_link(&mut self) {
        self.break_link_for("cut by the test");
    }

    fn break_link_for(&mut self, reason: &str) {
        if self.up {
            let (now, session) = (self.now, self.session);
            self.unplug();
            self.streamer().handle_link_down(now, session, reason);
        }
    }

    fn connect(&mut self) {
        self.session += 1;
        self.up = true;
        self.target = Target::new();
        let (now, session) = (self.now, self.session);
        self.streamer().handle_link_up(now, session).expect("greets");
    }

    fn publish(&mut self, said: Said) {
        if said.kind.changes_content() {
            self.whole.apply(&said);
        }
        let position = self.ring.lock().publish(said.clone());
        self.log.push_back(((self.incarnation, position), said));
    }

    fn cut(&mut self) {
        self.time += 1;
        let time = self.time;
        self.publish(Said::cut(time));
    }

    fn write_something(&mut self) {
        let volume = u16::try_from(self.rng.below(2)).expect("small");
        let sector = self.rng.below(SLOTS * 128 - 64);
        let sectors = 1 + self.rng.below(64);
        let len = usize::try_from(sectors * SECTOR_BYTES).expect("small");
        let said = match self.rng.below(12) {
            0 => Said::range(Kind::WriteZeroes, volume, sector, sectors),
            1 => Said::range(Kind::Discard, volume, sector, sectors),
            2 => Said {
                payload: Some(Cell(vec![1; 32].into())),
                ..Said::range(Kind::Probe, volume, sector / 128 * 128, 128)
            },
            3 => Said::new(Kind::Noop),
            // Contents that come again, so that leases are of use.
            4..=6 => {
                let content = self.rng.below(4);
                Said::data(Kind::Write, volume, sector / 8 * 8, Rng(content).bytes(4096))
            }
            _ => {
                let bytes = self.rng.bytes(len);
                Said::data(Kind::Write, volume, sector, bytes)
            }
        };
        self.publish(said);
    }

    /// Moves everything that the streamer has to say.
    fn drain(&mut self) {
        let now = self.now;
        let streamer = self.streamer.as_mut().expect("alive");
        streamer.pull(now);
        while let Some(work) = streamer.poll_work(now) {
            self.works.push(work);
        }
        while let Some((session, bytes)) = streamer.poll_control() {
            assert_eq!(session, self.session);
            self.to_target.push_back(bytes);
        }
        while let Some(out) = streamer.poll_batch(now) {
            assert_eq!(out.session, self.session);
            self.batches.push((out.number.0, out.batch.pieces.concat()));
        }
        let drop = streamer.poll_drop();
        while let Some(event) = streamer.poll_event() {
            if let StreamEvent::Durable(batch) = &event {
                self.durable.push(batch.clone());
            }
            self.events.push(event);
        }
        if let Some((_, reason)) = drop {
            self.break_link_for(&reason);
        }
    }

    fn work(&mut self) {
        if !self.works.is_empty() {
            let index = usize::try_from(self.rng.below(self.works.len() as u64)).expect("small");
            let work = self.works.swap_remove(index);
            let mut done: Done<Cell> = self.worker.run(work);
            done.busy = Duration::from_micros(100);
            let now = self.now;
            self.streamer().handle_done(now, done);
        }
    }

    fn carry_control(&mut self) {
        if let Some(bytes) = self.to_target.pop_front() {
            self.target.control(&self.journal, &bytes);
        }
        self.to_source.append(&mut self.target.outbox);
        if let Some(bytes) = self.to_source.pop_front() {
            let (now, session) = (self.now, self.session);
            self.streamer().handle_control(now, session, &bytes);
        }
    }

    /// Delivers any batch that is under way, and checks what the target then holds.
    fn carry_batch(&mut self) {
        if self.batches.is_empty() {
            return;
        }
        let index = usize::try_from(self.rng.below(self.batches.len() as u64)).expect("small");
        let (_, bytes) = self.batches.swap_remove(index);
        let session = self.session;
        self.streamer().handle_sent(session);
        // Several come at once when one had overtaken others; the image is that of the last.
        if let Some(opened) = self.target.batch(&mut self.journal, bytes).pop() {
            let place = opened.header.place();
            let end = (place.incarnation.0, place.end.0);
            while self.log.front().is_some_and(|(position, _)| *position < end) {
                let (_, said) = self.log.pop_front().expect("looked at");
                self.at_tail.apply(&said);
            }
            if opened.header.cut().recoverable {
                let same = self.journal.image.trimmed() == self.at_tail.trimmed();
                assert!(same, "images differ at batch {}", opened.header.place().number);
            }
        }
        assert_eq!(self.target.refused, None);
    }

    fn acknowledge(&mut self) {
        if self.up && self.target.session.is_live() {
            self.target.acknowledge(&self.journal);
        }
    }

    fn step(&mut self, trouble: bool) {
        self.now = self.now.plus(Duration::from_micros(self.rng.below(30_000)));
        let now = self.now;
        match self.rng.below(if trouble { 100 } else { 94 }) {
            0..=24 => self.write_something(),
            25..=36 if self.streamer().slot_free() || self.rng.chance(30) => self.cut(),
            37..=54 => self.work(),
            55..=69 => self.carry_batch(),
            70..=82 => self.carry_control(),
            83..=88 => self.acknowledge(),
            89..=91 if !self.up => self.connect(),
            92 if self.target.session.is_live() => self.target.lease(&self.journal, 2000, 3),
            93 => self.streamer().handle_timeout(now).expect("greets"),
            94..=95 => self.break_link(),
            96 => {
                let in_stores = u32::try_from(self.rng.below(4)).expect("small");
                self.ring.lock().dies_in = Some(in_stores);
            }
            97 => self.kill(),
            98 if self.target.session.is_live() && !self.target.paused => self.target.pause(),
            99 if self.target.paused => self.target.resume(),
            _ => {}
        }
        self.die_if_due();
        self.drain();
    }

    /// A step of a world with a log. Writes wait while the ring is full, as the stream would be closed.
    fn step_logged(&mut self, ring_full: bool, crashing: bool) {
        match self.rng.below(100) {
            0..=62 if ring_full => {
                self.carry_control();
                self.carry_batch();
                self.acknowledge();
                self.drain();
            }
            0..=62 => self.step(true),
            63..=64 => {
                for _ in 0..60 {
                    let ring_full = self.ring.lock().entries.len() > 80;
                    self.step_outage(ring_full);
                }
            }
            65..=94 => {
                let most = usize::try_from(self.rng.below(4)).expect("small");
                self.turn_log(most);
                self.drain();
            }
            95..=98 => {
                self.sync_log();
                self.drain();
            }
            99 if crashing && !self.sync_due && self.durable.len() > 3 => self.crash_host(),
            _ => {
                self.break_link();
                self.settle_after_crash();
            }
        }
        self.turn_log(0);
    }

    /// A step in which the target is not there.
    fn step_outage(&mut self, ring_full: bool) {
        self.break_link();
        self.die_if_due();
        if !ring_full {
            self.write_something();
            if self.rng.chance(30) {
                self.cut();
            }
        }
        self.drain();
        self.work();
        self.turn_log(2);
        if self.rng.chance(30) {
            self.sync_log();
        }
        self.drain();
    }

    fn settle_after_crash(&mut self) {
        if std::mem::take(&mut self.sync_due) {
            self.send_everything();
        }
    }

    /// No more trouble: everything arrives.
    fn settle(&mut self) {
        self.ring.lock().dies_in = None;
        self.cut();
        for _ in 0..20_000 {
            if self.streamer().is_drained() {
                return;
            }
            self.now = self.now.plus(Duration::from_millis(20));
            let now = self.now;
            if !self.up {
                self.connect();
            }
            if self.target.paused {
                self.target.resume();
            }
            self.drain();
            self.work();
            // Acknowledgements and answers: more than one a step.
            (0..4).for_each(|_| self.carry_control());
            self.carry_batch();
            self.acknowledge();
            self.turn_log(1);
            self.sync_log();
            self.streamer().handle_timeout(now).expect("greets");
            self.drain();
        }
        panic!("does not settle: {:?}", self.streamer().status(WallTime(0)));
    }

    fn check_settled(&mut self) {
        assert!(self.journal.image.trimmed() == self.whole.trimmed(), "images differ in the end");
        let state = *self.streamer().state();
        let tail = self.journal.tail().expect("batches were journaled");
        assert_eq!((state.number, state.chain, state.position), (tail.number, tail.chain, tail.end));
        let ring = self.ring.lock();
        assert_eq!((ring.freed, ring.entries.len()), (tail.end.0, 0), "the ring is free");
    }

    fn started_over(&self) -> usize {
        self.events.iter().filter(|event| matches!(event, StreamEvent::StartOver { .. })).count()
    }

    /// What the agent does on `StartOver`: nothing of the ring stays; sync sends everything.
    fn start_over(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation.0;
        {
            let mut ring = self.ring.lock();
            let head = ring.head().0;
            ring.entries.clear();
            ring.freed = head;
            ring.next = head;
            ring.incarnation = incarnation.0;
        }
        self.send_everything();
        let now = self.now;
        self.streamer().handle_started_over(now, incarnation);
    }

    fn send_everything(&mut self) {
        self.publish(Said::new(Kind::EventBegin));
        for volume in 0..2 {
            for slot in 0..SLOTS {
                let bytes = self.whole.read(volume, slot * 65536, 65536);
                self.publish(Said::data(Kind::SyncData, volume, slot * 128, bytes));
            }
            self.publish(Said { volume: VolumeIndex(volume), ..Said::new(Kind::VolumeJoined) });
        }
        self.publish(Said::new(Kind::EventEnd));
    }

    fn join_volumes(&mut self) {
        for volume in 0..2 {
            self.publish(Said { volume: VolumeIndex(volume), ..Said::new(Kind::VolumeJoined) });
        }
    }
}

/// Goal: no gap, no fork, no loss, no needless start over, whatever breaks in between.
/// Method: 30 seeded worlds; after every journaled batch the target's image is the source's at that ticket; in the end both
/// are equal and the ring is free.
#[test]
fn breaks_lost_acknowledgements_and_kills_lose_nothing() {
    let (mut repeats, mut references, mut batches, mut kills) = (0, 0, 0, 0);
    for seed in 0..30 {
        let mut world = World::new(seed);
        world.join_volumes();
        for _ in 0..1500 {
            world.step(true);
        }
        kills += world.events.iter().filter(|event| matches!(event, StreamEvent::Down { .. })).count();
        world.settle();
        world.check_settled();
        assert_eq!(world.started_over(), 0, "seed {seed}");
        // Positions of what was reported durable rise; numbers have no gap (kills may repeat none: they were freed).
        assert!(world.durable.windows(2).all(|pair| pair[0].end < pair[1].end), "seed {seed}");
        repeats += world.journal.repeats;
        references += world.journal.references;
        batches += world.journal.batches.len();
    }
    assert!(
        repeats > 0 && references > 10 && batches > 1000 && kills > 100,
        "{repeats} {references} {batches} {kills}"
    );
}

#[test]
fn without_trouble_each_batch_is_sent_once() {
    for seed in 100..110 {
        let mut world = World::new(seed);
        world.connect();
        world.join_volumes();
        for _ in 0..1500 {
            world.step(false);
        }
        world.settle();
        world.check_settled();
        assert_eq!(world.journal.repeats, 0);
    }
}

/// Goal: a kill at every store of the acknowledgement path leaves a state that goes on.
#[test]
fn every_kill_point_of_an_acknowledgement_resumes() {
    for stores in 0..6 {
        let mut world = World::new(7);
        world.connect();
        world.join_volumes();
        for _ in 0..400 {
            world.step(false);
        }
        world.ring.lock().dies_in = Some(stores);
        for _ in 0..200 {
            if world.ring.lock().dies_in == Some(0) {
                break;
            }
            world.step(false);
        }
        world.kill();
        world.settle();
        world.check_settled();
        assert_eq!(world.started_over(), 0);
    }
}

/// Goal: a target set back to an older state makes the source start over and send everything, and nothing before the agent has
/// recorded that.
#[test]
fn a_target_set_back_makes_a_new_incarnation() {
    let mut world = World::new(3);
    world.connect();
    world.join_volumes();
    for _ in 0..300 {
        world.step(false);
    }
    world.settle();
    let backup = world.journal.clone();
    for _ in 0..600 {
        world.step(false);
    }
    world.settle();
    world.break_link();
    world.journal = backup;
    world.connect();
    for _ in 0..50 {
        world.drain();
        world.carry_control();
        world.write_something();
        world.cut();
    }
    let StreamEvent::StartOver { incarnation, .. } =
        world.events.iter().find(|event| matches!(event, StreamEvent::StartOver { .. })).expect("demanded").clone()
    else {
        unreachable!("looked for")
    };
    assert_eq!(incarnation, Incarnation(2));
    assert!(
        world.batches.is_empty() && world.streamer().poll_work(Now(0)).is_none(),
        "nothing is sent before it is recorded"
    );
    world.start_over(incarnation);
    for _ in 0..500 {
        world.step(true);
    }
    world.settle();
    world.check_settled();
    assert_eq!(world.journal.tail().map(|tail| tail.incarnation), Some(Incarnation(2)));
    assert_eq!(world.started_over(), 1);
}

/// Goal: an empty target (replaced machine) and a foreign tail of a higher incarnation start over above both.
#[test]
fn an_empty_target_and_a_foreign_tail_start_over() {
    for (tail, expected) in [(None, 2), (Some(foreign_tail(6, 40)), 7)] {
        let mut world = World::new(4);
        world.connect();
        world.join_volumes();
        for _ in 0..300 {
            world.step(false);
        }
        world.settle();
        world.break_link();
        world.journal = Journal::new();
        world.journal.check = ChainCheck::new(Generation(1), tail);
        world.connect();
        for _ in 0..10 {
            world.drain();
            world.carry_control();
        }
        assert_eq!(world.streamer().status(WallTime(0)).phase, Phase::StartingOver);
        world.start_over(Incarnation(expected));
        world.settle();
        world.check_settled();
        let first = world.journal.batches.first().expect("journaled").place();
        assert_eq!((first.incarnation.0, first.number.0), (expected, tail.map_or(0, |tail| tail.number.0) + 1));
    }
}

/// Goal: a new ring goes on behind its predecessor's tail without a compare only if that tail is the last batch known, or all that the target
/// holds is in the host's activity log. Method: the log of the life that shipped it, of one more transaction, of one less (a disk that was put
/// back), of another life, and none.
#[test]
fn a_new_ring_appends_with_proof_or_compares() {
    const SHIPPED: LogMark = LogMark { session: 9, number: 40 };
    let log = |lives: Vec<LogMark>, now: LogMark| Some(StreamLog { lives, now: Arc::new(move || now) });
    let mark = |session, number| LogMark { session, number };
    let cases = [
        (true, None, true),
        (false, None, false),
        (false, Some(vec![SHIPPED]), true),
        (false, Some(vec![mark(8, 90), mark(9, 41)]), true),
        (false, Some(vec![mark(9, 39)]), false),
        (false, Some(vec![mark(8, 90)]), false),
        (false, Some(vec![]), false),
    ];
    for (same, lives, proved) in cases {
        let mut world = World::with(5, StreamerConfig { log: log(vec![], SHIPPED), ..config(1) });
        world.connect();
        world.join_volumes();
        for _ in 0..300 {
            world.step(false);
        }
        world.settle();
        let state = *world.streamer().state();
        // A reboot: another ring, everything else is gone.
        world.unplug();
        world.ring = SharedRing::new(2);
        {
            let mut ring = world.ring.lock();
            ring.freed = 100_000;
            ring.next = 100_000;
        }
        world.incarnation = 2;
        let mut config = config(2);
        config.joined = [VolumeIndex(0), VolumeIndex(1)].into_iter().collect::<VolumeSet>();
        config.last = (state.number, if same { state.chain } else { ChainHash([1; 32]) });
        config.log = lives.and_then(|lives| log(lives, mark(10, 50)));
        world.open(config);
        world.connect();
        for _ in 0..20 {
            world.drain();
            world.carry_control();
        }
        let asked = world.events.iter().any(|event| matches!(event, StreamEvent::CompareEverything { .. }));
        assert_eq!(asked, !proved);
        if !proved {
            world.cut();
            world.drain();
            assert!(world.works.is_empty() && world.batches.is_empty(), "nothing is sent before it is recorded");
            world.send_everything();
            let now = world.now;
            world.streamer().handle_compared(now);
        }
        for _ in 0..800 {
            world.step(true);
        }
        world.settle();
        world.check_settled();
        assert_eq!(world.started_over(), 0);
        let number = world.journal.batches.iter().find(|batch| batch.place().incarnation.0 == 2).expect("appended");
        assert_eq!(number.place().number, state.number.next());
        assert!(
            world.journal.batches.iter().filter(|it| it.place().incarnation.0 == 1).all(|it| it.log() == Some(SHIPPED))
        );
    }
}

/// Goal: forged, misplaced or wrong acknowledgements free nothing and end the session.
#[test]
fn acknowledgements_must_be_authentic_and_ours() {
    for forgery in 0..4 {
        let mut world = World::new(6);
        world.connect();
        world.join_volumes();
        for _ in 0..200 {
            world.step(false);
        }
        world.settle();
        world.write_something();
        world.cut();
        for _ in 0..10 {
            world.drain();
            world.work();
            world.carry_control();
        }
        world.drain();
        assert_eq!(world.batches.len(), 1, "one batch is under way");
        let before = *world.streamer().state();
        let next = before.number.next();
        let (incarnation, number, chain) = match forgery {
            // Never sent; sent with another content; of another incarnation; an authentic message with a flipped bit.
            0 => (Incarnation(1), BatchNo(next.0 + 5), ChainHash([1; 32])),
            1 => (Incarnation(1), next, ChainHash([1; 32])),
            2 => (Incarnation(9), next, ChainHash([1; 32])),
            _ => (Incarnation(1), before.number, before.chain),
        };
        world.target.session.durable(incarnation, number, chain, WallTime(1));
        world.target.drain();
        let mut bytes = world.target.outbox.pop_back().expect("said");
        if forgery == 3 {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let (now, session) = (world.now, world.session);
        world.streamer().handle_control(now, session, &bytes);
        assert!(world.streamer().poll_drop().is_some(), "forgery {forgery} ends the session");
        assert_eq!(*world.streamer().state(), before);
        world.break_link();
        world.settle();
        world.check_settled();
    }
}

#[test]
fn a_bandwidth_limit_holds_batches_back() {
    let mut world = World::new(8);
    let now = world.now;
    world.streamer().set_rate(now, Some(100_000));
    world.connect();
    world.join_volumes();
    let (mut sent, start) = (0u64, world.now);
    for round in 0..400 {
        let bytes = world.rng.bytes(8192);
        world.publish(Said::data(Kind::Write, 0, round % 32 * 16, bytes));
        world.cut();
        for _ in 0..6 {
            world.drain();
            world.work();
            world.carry_control();
        }
        world.drain();
        sent += world.batches.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
        while !world.batches.is_empty() {
            world.carry_batch();
        }
        world.acknowledge();
        world.now = world.now.plus(Duration::from_millis(50));
        let now = world.now;
        world.streamer().handle_timeout(now).expect("greets");
    }
    let seconds = world.now.since(start).as_secs();
    assert!(sent > 90_000 * seconds && sent < 110_000 * (seconds + 1), "{sent} bytes in {seconds} s");
    assert!(TokenBucket::new(None, now).is_open(now));
}
