//! What the stream must say: the history of every sector, and the replica that the stream makes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use farshore_blkfilter::CUT_APP_CONSISTENT;
use farshore_proto::keys::DedupKey;
use farshore_proto::message::{Answer, Answers};
use farshore_proto::record::Kind;
use farshore_proto::{BatchNo, Position, SLOT_BYTES, VolumeIndex};
use farshore_ring::{Consumer, Desc};

pub(crate) const SECTOR: usize = 512;

/// Content of a sector that the write `id` left: 0 is zeroes.
pub(crate) fn stamp(bytes: &mut [u8], id: u64) {
    bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = id.to_le_bytes());
}

/// Whose content a sector has; whole sectors only.
pub(crate) fn id_of(sector: &[u8]) -> u64 {
    let words = sector.as_chunks::<8>().0;
    let id = u64::from_le_bytes(words[0]);
    assert!(words.iter().all(|word| u64::from_le_bytes(*word) == id), "a sector is of one write");
    id
}

#[derive(Clone, Copy, Debug)]
struct Version {
    id: u64,
    submitted: u64,
    /// `u64::MAX`: never acknowledged.
    acked: u64,
}

/// Per sector of one volume, what it held, in order. Overlapping requests are serialised by the filter, so the order of their ends is the
/// order in which the device executed them.
pub(crate) struct History {
    sectors: Vec<Vec<Version>>,
}

impl History {
    pub(crate) fn new(image: &[u8]) -> Self {
        let first = |sector: &[u8]| vec![Version { id: id_of(sector), submitted: 0, acked: 0 }];
        Self { sectors: image.chunks(SECTOR).map(first).collect() }
    }

    pub(crate) fn wrote(&mut self, sector: u64, id: u64, submitted: u64, acked: u64) {
        self.sectors[usize::try_from(sector).expect("small")].push(Version { id, submitted, acked });
    }

    /// For each sector the versions that it may be: (written at, acknowledged overwriting at).
    fn candidates(&self, image: &[u8]) -> Vec<Vec<(u64, u64)>> {
        let of = |(versions, bytes): (&Vec<Version>, &[u8])| {
            let id = id_of(bytes);
            let mut next = u64::MAX;
            let mut found = Vec::new();
            for version in versions.iter().rev() {
                if version.id == id {
                    found.push((version.submitted, next));
                }
                next = next.min(version.acked);
            }
            found
        };
        self.sectors.iter().zip(image.chunks(SECTOR)).map(of).collect()
    }
}

/// Whether the images together are a state that a power cut at or after the step `cut` could have left: no write in it that was submitted after
/// one was acknowledged that is not in it, and nothing lost that was acknowledged before `cut`.
pub(crate) fn check_cut(volumes: &[(&History, &[u8])], cut: u64) -> Result<(), String> {
    let all: Vec<_> = volumes
        .iter()
        .enumerate()
        .flat_map(|(volume, (history, image))| {
            history.candidates(image).into_iter().enumerate().map(move |(sector, found)| (volume, sector, found))
        })
        .collect();
    if let Some((volume, sector, _)) = all.iter().find(|(_, _, found)| found.is_empty()) {
        return Err(format!("sector {sector} of volume {volume} holds what it never held on the source"));
    }
    let mut moments: BTreeSet<u64> = all.iter().flat_map(|(_, _, found)| found.iter().map(|(from, _)| *from)).collect();
    moments = moments.split_off(&cut);
    moments.insert(cut);
    let fits = |moment: u64, found: &[(u64, u64)]| found.iter().any(|(from, to)| *from <= moment && moment <= *to);
    let mut best = None;
    for moment in moments {
        match all.iter().find(|(_, _, found)| !fits(moment, found)) {
            None => return Ok(()),
            Some(bad) => best = Some((moment, bad)),
        }
    }
    Err(format!("no moment from {cut} on explains the state; at the last tried: {best:?}"))
}

/// One entry on its way.
pub(crate) struct Shipped {
    pub(crate) position: u64,
    pub(crate) desc: Desc,
    pub(crate) payload: Vec<u8>,
}

/// What the target says to the source.
#[derive(Debug)]
pub(crate) enum Said {
    Answers(Answers),
    /// Everything below.
    Durable(u64),
}

/// The other side: takes whole batches, keeps one image per volume, answers questions at their ticket.
pub(crate) struct Replica {
    pub(crate) images: BTreeMap<u16, Vec<u8>>,
    pub(crate) joined: BTreeSet<u16>,
    pub(crate) event_open: bool,
    pub(crate) wire: VecDeque<Shipped>,
    pub(crate) said: VecDeque<Said>,
    /// Everything below is durable here.
    pub(crate) tail: u64,
    /// Position up to which this session has shipped.
    shipped: u64,
    number: u64,
    key: DedupKey,
    /// Cuts seen: (position, recoverable, bookmark, application-consistent).
    pub(crate) cuts: Vec<(u64, bool, String, bool)>,
    /// Records seen, by kind.
    pub(crate) seen: BTreeMap<u8, u64>,
    pub(crate) unreadable: Vec<(u16, u64, u64)>,
}

impl Replica {
    pub(crate) fn new(key: DedupKey) -> Self {
        Self {
            images: BTreeMap::new(),
            joined: BTreeSet::new(),
            event_open: false,
            wire: VecDeque::new(),
            said: VecDeque::new(),
            tail: 0,
            shipped: 0,
            number: 0,
            key,
            cuts: Vec::new(),
            seen: BTreeMap::new(),
            unreadable: Vec::new(),
        }
    }

    pub(crate) fn count(&self, kind: Kind) -> u64 {
        self.seen.get(&(kind as u8)).copied().unwrap_or(0)
    }

    /// Takes the next entry of the ring onto the wire.
    pub(crate) fn ship(&mut self, consumer: &mut Consumer) -> bool {
        let Some(entry) = consumer.next() else { return false };
        if entry.position >= self.tail {
            assert!(entry.position >= self.shipped, "positions rise");
            self.shipped = entry.position + 1;
            let payload = entry.payload.as_ref().map_or(Vec::new(), |cell| cell.to_vec());
            self.wire.push_back(Shipped { position: entry.position, desc: entry.desc, payload });
        }
        true
    }

    /// The link breaks: what was under way is lost on both ways.
    pub(crate) fn lose_link(&mut self) {
        self.wire.clear();
        self.said.clear();
        self.shipped = self.tail;
    }

    /// The stream was started over.
    pub(crate) fn forget_wire(&mut self, from: u64) {
        self.lose_link();
        self.tail = from;
        self.shipped = from;
    }

    /// Applies the next batch, if it is whole. Returns the cut's position and whether it is recoverable.
    pub(crate) fn apply_batch(&mut self) -> Option<(u64, bool)> {
        let cut = self.wire.iter().position(|entry| entry.desc.kind == Kind::Cut as u8)?;
        let batch: Vec<Shipped> = self.wire.drain(..=cut).collect();
        let mut results = Vec::new();
        for entry in &batch {
            self.apply(entry, &mut results);
        }
        let last = batch.last().expect("it has a cut");
        self.number += 1;
        self.tail = last.position + 1;
        if !results.is_empty() {
            self.said.push_back(Said::Answers(Answers { number: BatchNo(self.number), results }));
        }
        self.said.push_back(Said::Durable(self.tail));
        Some((last.position, !self.event_open))
    }

    fn apply(&mut self, entry: &Shipped, results: &mut Vec<Answer>) {
        let desc = &entry.desc;
        *self.seen.entry(desc.kind).or_default() += 1;
        let kind = Kind::from_u8(desc.kind).expect("a known kind");
        let (start, end) = (desc.offset, desc.offset + desc.length);
        let range = usize::try_from(start).expect("small")..usize::try_from(end).expect("small");
        let image = self.images.entry(desc.volume).or_default();
        match kind {
            Kind::Write | Kind::SyncData => {
                assert_eq!(entry.payload.len(), range.len(), "the payload is the range's");
                image[range].copy_from_slice(&entry.payload);
            }
            Kind::WriteZeroes | Kind::Discard | Kind::SyncZero => {
                assert!(entry.payload.is_empty());
                image[range].fill(0);
            }
            Kind::Probe => {
                let equal = self.key.chunk_id(&image[range]).0 == entry.payload[..];
                results.push(answer(entry, start, desc.length, equal));
            }
            Kind::ProbeZero => {
                let differs: Vec<u64> = (start / SLOT_BYTES..end.div_ceil(SLOT_BYTES))
                    .filter(|slot| {
                        let from = usize::try_from(slot * SLOT_BYTES).expect("small");
                        let to = (from + usize::try_from(SLOT_BYTES).expect("small")).min(range.end);
                        image[from..to].iter().any(|byte| *byte != 0)
                    })
                    .collect();
                for slot in &differs {
                    let len = SLOT_BYTES.min(end - slot * SLOT_BYTES);
                    results.push(answer(entry, slot * SLOT_BYTES, len, false));
                }
                if differs.is_empty() {
                    results.push(answer(entry, start, desc.length, true));
                }
            }
            Kind::EventBegin => self.event_open = true,
            Kind::EventEnd => self.event_open = false,
            Kind::VolumeJoined => {
                self.joined.insert(desc.volume);
            }
            Kind::VolumeLeft => {
                self.joined.remove(&desc.volume);
            }
            Kind::Unreadable => self.unreadable.push((desc.volume, desc.offset, desc.length)),
            Kind::Cut => {
                let name = String::from_utf8(entry.payload.clone()).expect("names are text");
                self.cuts.push((entry.position, !self.event_open, name, desc.aux & CUT_APP_CONSISTENT != 0));
            }
            Kind::Noop | Kind::Bookmark => {}
        }
    }
}

fn answer(entry: &Shipped, offset: u64, len: u64, equal: bool) -> Answer {
    Answer { volume: VolumeIndex(entry.desc.volume), position: Position(entry.position), offset, len, equal }
}
