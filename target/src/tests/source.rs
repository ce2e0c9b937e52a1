//! A source in memory: makes batches from random writes, keeps what each point must look like, and speaks the protocol.

use std::collections::BTreeMap;

use farshore_proto::batch::{Annotations, BatchBuilder, BatchPlace, CutFlags, VolumeDecl};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::message::{Answers, Lease, RefuseCode, Welcome};
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::session::{SourceConfig, SourceEvent, SourceSession};
use farshore_proto::{
    BatchNo, ChainHash, ChunkId, Generation, GroupId, HostId, Incarnation, KeyEpoch, Name, Now, PointId, Position,
    VaultId, VolumeIndex, WallTime,
};
use farshore_uring::Storage;
use farshore_uring::sim::SimRng;

use crate::ingest::OwnedBatch;
use crate::keys::TargetKeys;
use crate::lane::{Output, SessionId};
use crate::target::{Peer, Target};

pub(crate) const VAULT: VaultId = VaultId([0x11; 16]);
/// Bytes of each test volume: eight slots and a half, so that the last one is short.
pub(crate) const VOLUME_BYTES: u64 = 8 * 65536 + 32768;

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a good name")
}

pub(crate) fn keys() -> TargetKeys {
    TargetKeys::new(VAULT, [(KeyEpoch(1), VaultKey::new([7; 32]))]).expect("one key")
}

/// One thing that happens in a batch.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(u16, u64, Vec<u8>),
    Zero(u16, u64, u64),
    /// By reference: the content of that id, which is these bytes.
    Refer(u16, u64, Vec<u8>),
    Probe(u16, u64, Vec<u8>),
    ProbeZero(u16, u64, u64),
    Mark(Kind, u16),
}

/// A batch as it was sent.
#[derive(Clone)]
pub(crate) struct Sent {
    pub(crate) number: BatchNo,
    pub(crate) chain: ChainHash,
    pub(crate) bytes: Vec<u8>,
    pub(crate) point: PointId,
    /// What the volumes hold at its end.
    pub(crate) content: BTreeMap<u16, Vec<u8>>,
    pub(crate) joined: Vec<u16>,
}

pub(crate) struct Source {
    vault: VaultId,
    pub(crate) group: Name,
    pub(crate) host: Name,
    pub(crate) key: HostKey,
    pub(crate) session: SourceSession,
    pub(crate) volumes: Vec<VolumeDecl>,
    /// The next batch says the volumes.
    unsaid: bool,
    pub(crate) incarnation: Incarnation,
    pub(crate) sent: Vec<Sent>,
    pub(crate) acked: BatchNo,
    position: u64,
    pub(crate) content: BTreeMap<u16, Vec<u8>>,
    pub(crate) joined: Vec<u16>,
    /// Set while a cut may not be recovered to.
    pub(crate) event_open: bool,
    pub(crate) link: SessionId,
    pub(crate) welcome: Option<Welcome>,
    pub(crate) refused: Option<(RefuseCode, String)>,
    pub(crate) closed: Option<String>,
    pub(crate) paused: Option<String>,
    pub(crate) answers: Vec<Answers>,
    pub(crate) lease: Option<Lease>,
}

impl Source {
    pub(crate) fn new(group: &str, host: &str, volumes: u16) -> Self {
        let key = HostKey::derive(&VaultKey::new([7; 32]), HostId::derive(VAULT, &name(host)), KeyEpoch(1));
        Self::with_key(VAULT, key, group, host, volumes)
    }

    pub(crate) fn with_key(vault: VaultId, key: HostKey, group: &str, host: &str, volumes: u16) -> Self {
        let (group, host) = (name(group), name(host));
        let config = SourceConfig { vault, group: group.clone(), host: host.clone(), host_key: key.clone() };
        let decl = |index: u16| VolumeDecl {
            index: VolumeIndex(index),
            name: name(&format!("vol{index}")),
            size: VOLUME_BYTES,
            block: 512,
        };
        let blank = || vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
        Self {
            vault,
            group,
            host,
            key,
            session: SourceSession::new(config),
            volumes: (0..volumes).map(decl).collect(),
            unsaid: true,
            incarnation: Incarnation(1),
            sent: Vec::new(),
            acked: BatchNo(0),
            position: 1,
            content: (0..volumes).map(|index| (index, blank())).collect(),
            joined: Vec::new(),
            event_open: false,
            link: 0,
            welcome: None,
            refused: None,
            closed: None,
            paused: None,
            answers: Vec::new(),
            lease: None,
        }
    }

    /// Seals with another key from now on, as with another bundle.
    pub(crate) fn use_key(&mut self, key: HostKey) {
        let config = SourceConfig { host_key: key.clone(), ..self.session.config().clone() };
        (self.key, self.session) = (key, SourceSession::new(config));
    }

    pub(crate) fn id_of(&self, content: &[u8]) -> ChunkId {
        self.key.dedup_key(GroupId::derive(self.vault, &self.group)).chunk_id(content)
    }

    /// Random writes, zeroes and one write by several pieces, in all volumes.
    pub(crate) fn random_ops(&self, rng: &mut SimRng, count: usize) -> Vec<Op> {
        let volumes = u64::try_from(self.volumes.len()).expect("small");
        let sectors = VOLUME_BYTES / 512;
        (0..count)
            .map(|_| {
                let volume = u16::try_from(rng.below(volumes)).expect("small");
                let start = rng.below(sectors);
                let slot_end = ((start / 128 + 1) * 128).min(sectors);
                let len = 1 + rng.below((slot_end - start).min(40));
                if rng.chance(1, 5) {
                    return Op::Zero(volume, start, (1 + rng.below(300)).min(sectors - start));
                }
                let mut bytes =
                    vec![u8::try_from(rng.below(256)).expect("a byte"); usize::try_from(len * 512).expect("small")];
                rng.fill(&mut bytes[..200]);
                Op::Write(volume, start, bytes)
            })
            .collect()
    }

    /// Makes the next batch and remembers it.
    pub(crate) fn batch(&mut self, ops: &[Op], bookmark: Option<&str>) -> Sent {
        let (mut content, mut joined, mut event) = (self.content.clone(), self.joined.clone(), self.event_open);
        let first = self.position;
        let number = self.sent.last().map_or(BatchNo(1), |sent| sent.number.next());
        let previous = self.sent.last().map_or_else(ChainHash::default, |sent| sent.chain);
        let mut at = first;
        let mut records = Vec::new();
        // Frames as the streamer packs them: those of never-joined volumes apart.
        let mut frames: Vec<(bool, Vec<u8>)> = Vec::new();
        for op in ops {
            let position = Position(at);
            at += 1;
            let record = |kind, volume: &u16, start: u64, sectors: usize| {
                Record::new(kind, VolumeIndex(*volume), position, start, u32::try_from(sectors).expect("small"))
            };
            let mut put = |volume: &u16, start: &u64, bytes: &[u8]| {
                let from = usize::try_from(start * 512).expect("small");
                content.get_mut(volume).expect("declared")[from..from + bytes.len()].copy_from_slice(bytes);
            };
            records.push(match op {
                Op::Write(volume, start, bytes) => {
                    put(volume, start, bytes);
                    let is_joined = joined.contains(volume);
                    if frames.last().is_none_or(|(of, plain)| *of != is_joined || plain.len() > 20_000) {
                        frames.push((is_joined, Vec::new()));
                    }
                    let frame = u32::try_from(frames.len()).expect("small");
                    let plain = &mut frames.last_mut().expect("pushed above").1;
                    let home = Home::Here { frame, offset: u32::try_from(plain.len()).expect("small") };
                    plain.extend_from_slice(bytes);
                    record(Kind::Write, volume, *start, bytes.len() / 512).with_id(self.id_of(bytes)).with_home(home)
                }
                Op::Refer(volume, start, bytes) => {
                    put(volume, start, bytes);
                    record(Kind::Write, volume, *start, bytes.len() / 512)
                        .with_id(self.id_of(bytes))
                        .with_home(Home::Reference)
                }
                Op::Zero(volume, start, sectors) => {
                    let sectors = usize::try_from(*sectors).expect("small");
                    put(volume, start, &vec![0; sectors * 512]);
                    record(Kind::WriteZeroes, volume, *start, sectors)
                }
                Op::Probe(volume, start, bytes) => {
                    record(Kind::Probe, volume, *start, bytes.len() / 512).with_id(self.id_of(bytes))
                }
                Op::ProbeZero(volume, start, sectors) => {
                    record(Kind::ProbeZero, volume, *start, usize::try_from(*sectors).expect("small"))
                }
                Op::Mark(kind, volume) => {
                    assert!(!kind.changes_content(), "a mark");
                    if *kind == Kind::VolumeJoined {
                        joined.push(*volume);
                    } else if *kind == Kind::VolumeLeft {
                        joined.retain(|of| of != volume);
                    } else {
                        event = *kind == Kind::EventBegin;
                    }
                    record(*kind, volume, 0, 0)
                }
            });
        }
        let place = BatchPlace {
            vault: self.vault,
            group: GroupId::derive(self.vault, &self.group),
            host: HostId::derive(self.vault, &self.host),
            generation: Generation(1),
            incarnation: self.incarnation,
            number,
            first: Position(first),
            end: Position(at + 1),
            time: WallTime(number.0 * 1000),
        };
        let chain = place.chain(&previous, &records);
        let salt = self.key.salt(&[3; 32], self.incarnation, number.0, &chain);
        let frame_key = self.key.frame_key(&salt);
        let mut data = Vec::new();
        for (index, (_, plain)) in frames.iter().enumerate() {
            let number = u32::try_from(index + 1).expect("small");
            frame_key.seal(number, plain, None, |_| &[], &mut data).expect("small frames");
        }
        let builder = BatchBuilder {
            place,
            cut: CutFlags { recoverable: !event, app_consistent: false },
            previous,
            chain,
            salt,
            host_key: &self.key,
            raw_bytes: 1,
            log: None,
        };
        let volumes = if std::mem::take(&mut self.unsaid) { self.volumes.clone() } else { Vec::new() };
        let annotations = Annotations { bookmark: bookmark.map(name), volumes };
        let mut bytes = Vec::new();
        let count = u32::try_from(frames.len()).expect("small");
        builder.finish(&records, &annotations, count, data.len() as u64, None, &mut bytes).expect("within the limits");
        bytes.extend_from_slice(&data);
        self.position = at + 1;
        (self.content, self.joined, self.event_open) = (content, joined, event);
        let sent = Sent {
            number,
            chain,
            bytes,
            point: place.point(),
            content: self.content.clone(),
            joined: self.joined.clone(),
        };
        self.sent.push(sent.clone());
        sent
    }

    /// A volume has another size from the next batch on.
    pub(crate) fn resize(&mut self, volume: u16, bytes: u64) {
        self.volumes[usize::from(volume)].size = bytes;
        self.content.get_mut(&volume).expect("declared").resize(usize::try_from(bytes).expect("small"), 0);
        self.unsaid = true;
    }

    /// Begins a new incarnation, behind the target's tail.
    pub(crate) fn start_over(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
        self.position = 1;
    }

    /// Connects: greets and reads the answer.
    pub(crate) fn connect<S: Storage>(&mut self, world: &mut Clocked<'_, S>) {
        self.link += 1;
        (self.welcome, self.refused, self.closed, self.paused) = (None, None, None, None);
        let peer = Peer { role: farshore_proto::Role::Agent, name: self.host.clone() };
        world.target.handle_up(self.link, peer);
        let mut nonce = [5; 32];
        nonce[..8].copy_from_slice(&self.link.to_le_bytes());
        self.session
            .handle_up(world.now, nonce, Generation(0), self.incarnation, self.volumes.clone())
            .expect("few volumes");
        self.talk(world);
    }

    /// Carries messages both ways until nothing moves.
    pub(crate) fn talk<S: Storage>(&mut self, world: &mut Clocked<'_, S>) {
        loop {
            let mut moved = false;
            while let Some(bytes) = self.session.poll_control() {
                world.target.handle_control(self.link, bytes);
                moved = true;
            }
            world.target.run(world.now, world.wall);
            while let Some(output) = world.target.poll_output() {
                moved = true;
                self.handle(output, world.now);
            }
            if !moved {
                break;
            }
        }
    }

    fn handle(&mut self, output: Output, now: Now) {
        match output {
            Output::Control { session, bytes } if session == self.link => {
                self.session.handle_control(now, &bytes).expect("an authentic answer in its place");
            }
            Output::Close { session, reason } if session == self.link => self.closed = Some(reason),
            Output::Control { .. } | Output::Close { .. } => {}
        }
        self.take_events();
    }

    /// Takes what the session says.
    pub(crate) fn take_events(&mut self) {
        while let Some(event) = self.session.poll_event() {
            match event {
                SourceEvent::Live(welcome) => self.welcome = Some(welcome),
                SourceEvent::Durable { number, chain, .. } => {
                    let sent = self.sent.iter().find(|sent| sent.number == number).expect("only what was sent");
                    assert_eq!(sent.chain, chain, "the acknowledged batch is the one sent");
                    assert!(number >= self.acked, "acknowledgements only rise");
                    self.acked = number;
                }
                SourceEvent::Answers(answers) => self.answers.push(answers),
                SourceEvent::Lease(lease) => self.lease = Some(lease),
                SourceEvent::Paused { reason } => self.paused = Some(reason),
                SourceEvent::Resumed => self.paused = None,
                SourceEvent::Refused { code, detail } => self.refused = Some((code, detail)),
                SourceEvent::Broken { reason } => panic!("{reason}"),
            }
        }
    }

    /// Sends bytes as a batch.
    pub(crate) fn send<S: Storage>(&mut self, world: &mut Clocked<'_, S>, bytes: &[u8]) {
        world.target.handle_batch(self.link, Box::new(OwnedBatch::new(bytes)));
        self.talk(world);
    }

    /// Sends several batches before the target looks.
    pub(crate) fn send_together<S: Storage>(&mut self, world: &mut Clocked<'_, S>, batches: &[&[u8]]) {
        for bytes in batches {
            world.target.handle_batch(self.link, Box::new(OwnedBatch::new(bytes)));
        }
        self.talk(world);
    }

    /// Makes and sends a batch of random writes.
    pub(crate) fn step<S: Storage>(&mut self, world: &mut Clocked<'_, S>, rng: &mut SimRng, count: usize) -> Sent {
        let ops = self.random_ops(rng, count);
        let sent = self.batch(&ops, None);
        self.send(world, &sent.bytes);
        sent
    }

    /// Makes and sends a batch in which all volumes join.
    pub(crate) fn join_all<S: Storage>(&mut self, world: &mut Clocked<'_, S>) -> Sent {
        let marks: Vec<Op> = self.volumes.iter().map(|decl| Op::Mark(Kind::VolumeJoined, decl.index.0)).collect();
        let sent = self.batch(&marks, None);
        self.send(world, &sent.bytes);
        sent
    }
}

/// A target and the time.
pub(crate) struct Clocked<'a, S: Storage> {
    pub(crate) target: &'a Target<S>,
    pub(crate) now: Now,
    pub(crate) wall: WallTime,
}

impl<'a, S: Storage> Clocked<'a, S> {
    pub(crate) fn new(target: &'a Target<S>) -> Self {
        Self { target, now: Now(1), wall: WallTime(1_000_000) }
    }

    pub(crate) fn pass(&mut self, time: std::time::Duration) {
        self.now = self.now.plus(time);
        self.wall = WallTime(self.wall.0 + u64::try_from(time.as_nanos()).expect("short"));
    }
}
