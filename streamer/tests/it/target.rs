//! A target in memory: the real session and chain check over a naive journal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use farshore_proto::batch::BatchHeader;
use farshore_proto::message::{Answer, Answers, Lease, Tail, Welcome};
use farshore_proto::record::{Home, Kind};
use farshore_proto::session::{ChainCheck, TargetEvent, TargetSession, Verdict};
use farshore_proto::{BatchNo, ChainHash, Generation, Incarnation, Position, VolumeIndex, WallTime};

use crate::common::{Image, Opened, VAULT, host_key, open};

/// What it keeps: survives sessions and restarts.
#[derive(Clone)]
pub struct Journal {
    pub check: ChainCheck,
    pub chains: BTreeMap<u64, ChainHash>,
    pub image: Image,
    pub held: BTreeMap<[u8; 32], Vec<u8>>,
    pub event_open: bool,
    pub joined: BTreeSet<VolumeIndex>,
    /// Batches journaled: their headers.
    pub batches: Vec<BatchHeader>,
    pub repeats: u64,
    pub references: u64,
}

impl Journal {
    pub fn new() -> Self {
        Self {
            check: ChainCheck::new(Generation(1), None),
            chains: BTreeMap::new(),
            image: Image::default(),
            held: BTreeMap::new(),
            event_open: false,
            joined: BTreeSet::new(),
            batches: Vec::new(),
            repeats: 0,
            references: 0,
        }
    }

    pub fn tail(&self) -> Option<Tail> {
        self.check.tail().copied()
    }
}

/// One session of it.
pub struct Target {
    pub session: TargetSession,
    /// Batches that came ahead of their turn.
    waiting: BTreeMap<u64, Vec<u8>>,
    leased: BTreeSet<[u8; 32]>,
    through: u64,
    pub paused: bool,
    pub refused: Option<String>,
    pub outbox: VecDeque<Vec<u8>>,
}

impl Target {
    pub fn new() -> Self {
        Self {
            session: TargetSession::new(VAULT),
            waiting: BTreeMap::new(),
            leased: BTreeSet::new(),
            through: 0,
            paused: false,
            refused: None,
            outbox: VecDeque::new(),
        }
    }

    pub fn control(&mut self, journal: &Journal, bytes: &[u8]) {
        let event = self.session.handle_control(bytes, |_, _| Some(host_key().answer_key())).expect("an honest source");
        if let Some(TargetEvent::Hello(hello)) = event {
            let empty =
                hello.volumes.iter().map(|volume| volume.index).filter(|v| !journal.joined.contains(v)).collect();
            self.session.welcome(Welcome {
                generation: Generation(1),
                tail: journal.tail(),
                empty,
                joined: journal.joined.iter().copied().collect(),
                event_open: journal.event_open,
                log: journal.batches.last().and_then(BatchHeader::log),
            });
        }
        self.drain();
    }

    pub fn drain(&mut self) {
        while let Some(bytes) = self.session.poll_control() {
            self.outbox.push_back(bytes);
        }
    }

    /// Takes a batch; journals what continues the chain. Gives the batches journaled.
    pub fn batch(&mut self, journal: &mut Journal, bytes: Vec<u8>) -> Vec<Opened> {
        if self.paused {
            return Vec::new();
        }
        let opened = open(&bytes);
        self.waiting.insert(opened.header.place().number.0, bytes);
        let mut journaled = Vec::new();
        while let Some((number, bytes)) = self.waiting.pop_first() {
            let next = journal.tail().map_or(0, |tail| tail.number.0) + 1;
            if number > next {
                self.waiting.insert(number, bytes);
                break;
            }
            let opened = open(&bytes);
            match journal.check.judge(&opened.header, |number| journal.chains.get(&number.0).copied()) {
                Verdict::Next => self.journal(journal, &opened),
                Verdict::Repeat => {
                    journal.repeats += 1;
                    self.acknowledge(journal);
                    continue;
                }
                Verdict::Refuse(code, reason) => {
                    self.refused = Some(reason.clone());
                    self.session.refuse(code, reason);
                    break;
                }
            }
            journaled.push(opened);
        }
        self.drain();
        journaled
    }

    fn journal(&mut self, journal: &mut Journal, opened: &Opened) {
        let number = opened.header.place().number;
        for record in &opened.list.records {
            match record.kind() {
                Kind::EventBegin => journal.event_open = true,
                Kind::EventEnd => journal.event_open = false,
                Kind::VolumeJoined => _ = journal.joined.insert(record.volume()),
                Kind::VolumeLeft => _ = journal.joined.remove(&record.volume()),
                Kind::Noop
                | Kind::Write
                | Kind::WriteZeroes
                | Kind::Discard
                | Kind::SyncData
                | Kind::Probe
                | Kind::ProbeZero
                | Kind::Cut
                | Kind::Bookmark
                | Kind::Unreadable
                | Kind::SyncZero => {}
            }
            if record.home() == Home::Reference {
                journal.references += 1;
                let known = self.leased.contains(&record.id().0) && number.0 <= self.through;
                assert!(known, "batch {number} refers to a content that is not under lease");
            }
        }
        let mut results = Vec::new();
        let mut held = std::mem::take(&mut journal.held);
        opened.apply(&mut journal.image, &mut held, |record, _| {
            results.push(Answer {
                volume: record.volume(),
                position: record.position(),
                offset: record.start_byte(),
                len: record.len_bytes(),
                equal: false,
            });
        });
        journal.held = held;
        let recoverable = !journal.event_open && !journal.joined.is_empty();
        assert_eq!(
            opened.header.cut().recoverable,
            recoverable,
            "batch {number}: source and target agree on its point"
        );
        journal.check.advance(&opened.header);
        journal.chains.insert(number.0, opened.header.chain());
        journal.batches.push(opened.header);
        // Before the acknowledgement, which is the harder order for the source.
        if !results.is_empty() {
            self.session.answer(Answers { number, results });
        }
    }

    pub fn acknowledge(&mut self, journal: &Journal) {
        if let Some(tail) = journal.tail() {
            self.session.durable(tail.incarnation, tail.number, tail.chain, WallTime(1));
            self.drain();
        }
    }

    /// Vouches for some of what it holds.
    pub fn lease(&mut self, journal: &Journal, take: usize, batches: u64) {
        let ids: Vec<_> = journal.held.keys().rev().take(take).copied().collect();
        self.through = journal.tail().map_or(0, |tail| tail.number.0) + batches;
        self.leased.extend(ids.iter().copied());
        let ids = ids.into_iter().map(farshore_proto::ChunkId).collect();
        self.session.lease(Lease { through: BatchNo(self.through), ids });
        self.drain();
    }

    pub fn pause(&mut self) {
        self.paused = true;
        self.waiting.clear();
        self.session.pause("disk full".into());
        self.drain();
    }

    pub fn resume(&mut self) {
        self.paused = false;
        self.session.resume();
        self.drain();
    }
}

/// A tail that no stream of ours has.
pub fn foreign_tail(incarnation: u64, number: u64) -> Tail {
    Tail {
        incarnation: Incarnation(incarnation),
        number: BatchNo(number),
        chain: ChainHash([0xee; 32]),
        end: Position(5),
    }
}
