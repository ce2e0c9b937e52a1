//! Taking batches: judge → open the record list → resolve references → bases of volumes that have no point yet → append →
//! one sync for all that waits → index, points, acknowledgement, answers.
//!
//! Crash safety of one group of batches:
//! 1. Content of never-joined volumes is written to their bases and flushed before any entry of the group is written: a
//!    journaled batch never lacks what was stripped from it. Written again by a repeat, it ends the same: those volumes have
//!    no point, and a batch's records are applied in order.
//! 2. Nothing in memory (chain, state, index, points) moves before the sync; an error leaves them at the last durable batch.
//! 3. The acknowledgement follows 2. So does the end of a lease: the segment that refers is known before the pin goes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use farshore_proto::batch::{self, BatchFrames, BatchHeader, RecordList, VolumeDecl};
use farshore_proto::frame::{self, FRAME_PLAIN_MAX};
use farshore_proto::keys::HostKey;
use farshore_proto::message::{Answer, Answers, RefuseCode, Tail, Welcome};
use farshore_proto::record::{Home, Kind, Record};
use farshore_proto::session::{ChainCheck, Verdict};
use farshore_proto::{BatchNo, ChainHash, Generation, Incarnation, LogMark, VolumeIndex, WallTime};
use farshore_uring::{AlignedBuf, Storage};

use crate::alarm::AlarmCode;
use crate::bases;
use crate::compare;
use crate::entries::{Placement, index_entries};
use crate::error::{Error, Result};
use crate::group::{ChunkPlace, Content, FrameStore, GroupHost, IndexEntry, SealedRun};
use crate::growth;
use crate::journal::{Append, Appended, Journal};
use crate::points::StreamState;
use crate::segment::{ALIGN, Form, REFERENCE_BYTES, Reference, VOLUMES_MAX};

/// Most batches that share one sync: bounds what a crash throws away and how long the first of them waits.
pub const GROUP_BATCHES_MAX: usize = 64;
/// Most answers in one message: half of a control message's limit.
const ANSWERS_MAX: usize = 16 << 10;
/// Largest volume: 1 PiB, so that offsets, entries of one batch and hashes stay in their limits.
const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Segment number of a chunk that the batch at hand brings, until it has a place.
const HERE: u32 = u32::MAX;

/// A received batch: [`ALIGN`] bytes of room, then the batch, in one piece, so that an entry's header and the batch go to
/// disk in one write from the buffer in which they arrived.
pub trait BatchBuf: Send + 'static {
    /// The batch.
    fn bytes(&self) -> &[u8];
    /// Room and batch.
    fn with_headroom(&mut self) -> &mut [u8];
}

/// A batch in memory of its own.
pub struct OwnedBatch(AlignedBuf);

impl OwnedBatch {
    /// Copies `bytes`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let mut buf = AlignedBuf::zeroed(ALIGN + bytes.len());
        buf[ALIGN..].copy_from_slice(bytes);
        Self(buf)
    }
}

impl BatchBuf for OwnedBatch {
    fn bytes(&self) -> &[u8] {
        &self.0[ALIGN..]
    }

    fn with_headroom(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Why a batch or greeting was not taken.
#[derive(Debug)]
pub enum Denied {
    /// The source's fault or state: the session is refused.
    Refuse(RefuseCode, String),
    /// No space, or none of what the system lends: nothing was kept of this batch and those behind it; they are asked for again.
    Pause(Error),
    /// The stream cannot go on before somebody acts.
    Stop(Error),
}

impl Denied {
    fn malformed(error: impl std::fmt::Display) -> Self {
        Self::Refuse(RefuseCode::Malformed, error.to_string())
    }
}

impl From<Error> for Denied {
    fn from(error: Error) -> Self {
        if error.passes() { Self::Pause(error) } else { Self::Stop(error) }
    }
}

/// What became of a group of batches.
#[derive(Debug, Default)]
pub struct Taken {
    /// Acknowledge up to the tail.
    pub acknowledge: bool,
    /// Answers to probes, in order.
    pub answers: Vec<Answers>,
    /// Why the rest was not taken.
    pub denied: Option<Denied>,
}

/// The writing half of a stream; one per stream, on one thread at a time.
pub struct Ingest<S: Storage> {
    stream: Arc<GroupHost<S>>,
    journal: Journal<S>,
    chain: ChainCheck,
    state: StreamState,
    /// Sizes of the volumes, as the catalog has them: it is asked once and not for every batch.
    sizes: BTreeMap<VolumeIndex, u64>,
    /// Batches up to this incarnation are refused: some were lost here.
    start_over: Option<Incarnation>,
    /// [`crate::damage::Damage::lost`] when the source was last made to start over.
    lost_seen: u64,
    /// A footer that is written and that the index has not taken over yet.
    unannounced: Option<SealedRun>,
    /// Volumes whose base has [broken](crate::base::Base::broken) slots.
    broken: BTreeSet<VolumeIndex>,
}

/// A batch that was checked and waits for its place.
struct Staged {
    buf: Box<dyn BatchBuf>,
    len: usize,
    header: BatchHeader,
    list: RecordList,
    form: Form,
    references: Vec<Reference>,
    entries: Vec<IndexEntry>,
    answers: BTreeMap<u32, Vec<Answer>>,
    /// The stream's state before it.
    before: StreamState,
    /// And after its marks.
    after: StreamState,
}

impl<S: Storage> Ingest<S> {
    /// Over an opened journal in `state`.
    #[must_use]
    pub fn new(stream: Arc<GroupHost<S>>, journal: Journal<S>, state: StreamState) -> Self {
        let record = stream.record();
        let chain = ChainCheck::new(record.generation, state.tail);
        let sizes = record.volumes.iter().map(|decl| (decl.index, decl.size)).collect();
        let (start_over, lost_seen) = (record.start_over, stream.damage().lost());
        Self { stream, journal, chain, state, sizes, start_over, lost_seen, unannounced: None, broken: BTreeSet::new() }
    }

    /// The stream.
    #[must_use]
    pub fn stream(&self) -> &Arc<GroupHost<S>> {
        &self.stream
    }

    /// Last batch held.
    #[must_use]
    pub fn tail(&self) -> Option<&Tail> {
        self.state.tail.as_ref()
    }

    /// State after the last batch held.
    #[must_use]
    pub fn state(&self) -> &StreamState {
        &self.state
    }

    /// Receive time of the last batch held.
    #[must_use]
    pub fn received(&self) -> WallTime {
        self.state.received
    }

    /// What a greeting is answered with. Volumes that are new get their bases first.
    ///
    /// # Errors
    /// [`Denied::Refuse`] when the volumes or the line of history contradict what is held.
    pub fn welcome(&mut self, generation: Generation, volumes: &[VolumeDecl]) -> Result<Welcome, Denied> {
        let ours = self.stream.record().generation;
        if generation.0 != 0 && generation != ours {
            let detail = format!("the source is on generation {generation}, the group's main line is {ours}");
            return Err(Denied::Refuse(RefuseCode::Generation, detail));
        }
        self.declare(volumes, Some(self.last_number()))?;
        let mut empty = Vec::new();
        for (volume, base) in self.stream.bases() {
            if !self.state.is_journaled(volume) && base.holds_nothing()? {
                empty.push(volume);
            }
        }
        let start_over = self.start_over;
        let tail = self.state.tail.map(|tail| Tail {
            // Batches were lost here. A tail of a higher incarnation makes the source begin a new one and compare all.
            incarnation: start_over.map_or(tail.incarnation, |lost| Incarnation(lost.0 + 1).max(tail.incarnation)),
            ..tail
        });
        let joined = self.state.joined.clone();
        Ok(Welcome { generation: ours, tail, empty, joined, event_open: self.state.event_open, log: self.heard_log() })
    }

    /// Nothing, where batches were lost: what the source heard of may be among them.
    fn heard_log(&self) -> Option<LogMark> {
        self.state.log.0.filter(|_| self.start_over.is_none())
    }

    fn last_number(&self) -> BatchNo {
        self.state.tail.map_or(BatchNo(0), |tail| tail.number)
    }

    /// The source names its volumes. One may have grown: points up to batch `upto` show its former size; `None`: not known yet, growth
    /// is left to the batch that begins with it.
    ///
    /// # Errors
    /// [`Denied::Refuse`] when they contradict what is held.
    pub fn declare(&mut self, volumes: &[VolumeDecl], upto: Option<BatchNo>) -> Result<(), Denied> {
        let record = self.stream.record();
        let known = &record.volumes;
        let (mut fresh, mut grown) = (Vec::new(), Vec::new());
        for decl in volumes {
            let refuse = |why: String| Err(Denied::Refuse(RefuseCode::Volume, format!("volume {}: {why}", decl.name)));
            let block = u64::from(decl.block);
            if !matches!(block, 512 | 4096) || decl.size == 0 || decl.size % block != 0 || decl.size > VOLUME_BYTES_MAX
            {
                return refuse(format!("size {} with blocks of {block} bytes is not possible", decl.size));
            }
            if known.contains(decl) || fresh.contains(decl) {
                continue;
            }
            let same =
                |held: &&VolumeDecl| (held.index, &held.name, held.block) == (decl.index, &decl.name, decl.block);
            if let Some(held) = known.iter().find(same) {
                if decl.size > held.size {
                    grown.push(decl.clone());
                    continue;
                }
                if growth::was(&record, decl) {
                    continue;
                }
            }
            if let Some(held) =
                known.iter().chain(&fresh).find(|held| held.index == decl.index || held.name == decl.name)
            {
                return refuse(format!(
                    "declared as number {} with {} bytes; held is {} as number {} with {} bytes",
                    decl.index, decl.size, held.name, held.index, held.size
                ));
            }
            fresh.push(decl.clone());
        }
        if known.len() + fresh.len() > VOLUMES_MAX {
            let detail = format!("a group has at most {VOLUMES_MAX} volumes");
            return Err(Denied::Refuse(RefuseCode::Volume, detail));
        }
        if let Some(upto) = upto {
            self.grow(grown, upto)?;
        }
        if fresh.is_empty() {
            return Ok(());
        }
        for decl in &fresh {
            self.add_base(decl)?;
        }
        // After the bases: a volume that the catalog knows always has one.
        let bases = self.stream.bases();
        let sizes: Vec<_> = fresh.iter().map(|decl| (decl.index, decl.size)).collect();
        let stored = self.stream.update(|record| {
            let moved = |decl: &VolumeDecl| {
                let base = bases.get(&decl.index).filter(|base| base.is_on_device());
                let noted = bases::BaseDevice::of(record, &decl.name);
                base.map(|base| base.data_path()) != noted.as_ref().map(|noted| noted.path.as_path())
            };
            let consistent = !fresh.iter().any(moved);
            if consistent {
                record.volumes.extend(fresh);
            }
            consistent
        })?;
        if !stored {
            let detail = "the place of a volume's base was changed just now; connect again".to_owned();
            return Err(Denied::Refuse(RefuseCode::Unavailable, detail));
        }
        self.sizes.extend(sizes);
        Ok(())
    }

    /// Bases first: a record never has more than its base.
    fn grow(&mut self, grown: Vec<VolumeDecl>, upto: BatchNo) -> Result<(), Denied> {
        for decl in &grown {
            let base = self.stream.base(decl.index);
            self.base_answers(decl, base.and_then(|base| base.grow(decl.size)))?;
        }
        if grown.is_empty() {
            return Ok(());
        }
        self.stream.update(|record| grown.iter().for_each(|decl| growth::note(record, decl, upto)))?;
        for decl in grown {
            tracing::info!(stream = self.stream.id.subject(), volume = %decl.name, size = decl.size, "volume has grown");
            self.sizes.insert(decl.index, decl.size);
        }
        Ok(())
    }

    /// A base that cannot be had now (its device is in use, missing, another, too small) stops nothing: the source is refused
    /// and comes again, and finds it mended.
    fn add_base(&self, decl: &VolumeDecl) -> Result<(), Denied> {
        self.base_answers(decl, self.stream.add_base(decl, false))
    }

    fn base_answers(&self, decl: &VolumeDecl, added: Result<()>) -> Result<(), Denied> {
        use crate::error::Kind;
        match &added {
            Ok(()) => self.stream.alarms.clear(AlarmCode::BaseFailed, &self.stream.id.subject()),
            Err(error) if matches!(error.kind(), Kind::Refused | Kind::NotFound) => {
                bases::alarm(&self.stream, decl.index, error);
                let detail = format!("volume {}: {}", decl.name, error.context());
                return Err(Denied::Refuse(RefuseCode::Unavailable, detail));
            }
            Err(_) => {}
        }
        Ok(added?)
    }

    /// Takes batches in the order of their numbers, all under one sync. The buffers are free again afterwards.
    pub fn take(&mut self, batches: Vec<Box<dyn BatchBuf>>, received: WallTime) -> Taken {
        let mut taken = Taken::default();
        let received = received.max(self.state.received);
        let staged = self.stage_all(batches, received, &mut taken);
        if let Err(denied) = self.store(staged, received, &mut taken) {
            // What the staging objected to lies behind this and will be judged again.
            taken.denied = Some(denied);
        }
        if matches!(taken.denied, Some(Denied::Refuse(..))) {
            self.stream.counters.refused.add(1);
        }
        taken
    }

    fn stage_all(&mut self, batches: Vec<Box<dyn BatchBuf>>, received: WallTime, taken: &mut Taken) -> Vec<Staged> {
        let (mut chain, mut state) = (self.chain, self.state.clone());
        let mut staged: Vec<Staged> = Vec::with_capacity(batches.len());
        let mut written = BTreeSet::new();
        for buf in batches {
            match self.stage(buf, &chain, &state, &staged, &mut written) {
                Ok(Some(next)) => {
                    chain.advance(&next.header);
                    state = next.after.clone();
                    // The next one begins behind this one's tail and not before its time.
                    let _point = state.finish(&next.header, None, received, 0);
                    staged.push(next);
                }
                Ok(None) => {
                    self.stream.counters.repeats.add(1);
                    taken.acknowledge = true;
                }
                Err(denied) => {
                    taken.denied = Some(denied);
                    break;
                }
            }
        }
        if let Err(error) = self.flush(&written) {
            taken.denied = Some(error.into());
            staged.clear();
        }
        staged
    }

    fn flush(&mut self, written: &BTreeSet<VolumeIndex>) -> Result<()> {
        for volume in written {
            let base = self.stream.base(*volume)?;
            base.flush().inspect_err(|error| self.base_alarm(error))?;
            self.note_broken(*volume, base.broken());
        }
        Ok(())
    }

    /// Slots of a volume that are damaged: said until they were sent again.
    fn note_broken(&mut self, volume: VolumeIndex, broken: Option<String>) {
        // Hardly ever is there anything to say, and this is the way of every batch of an initial sync.
        if broken.is_none() && !self.broken.contains(&volume) {
            return;
        }
        let subject = self.stream.id.subject();
        match broken {
            Some(what) => {
                if self.broken.insert(volume) {
                    tracing::error!(stream = subject, %volume, what, "the base is damaged where the source changes it");
                }
                self.stream.alarms.raise(AlarmCode::BaseFailed, &subject, &what);
            }
            None => {
                self.broken.remove(&volume);
                if self.broken.is_empty() {
                    self.stream.alarms.clear(AlarmCode::BaseFailed, &subject);
                }
            }
        }
    }

    fn base_alarm(&self, error: &Error) {
        if !error.passes() {
            self.stream.alarms.raise(AlarmCode::BaseFailed, &self.stream.id.subject(), error.context());
        }
    }

    /// Checks one batch and does what comes before its append. `None`: held already.
    fn stage(
        &mut self,
        buf: Box<dyn BatchBuf>,
        chain: &ChainCheck,
        before: &StreamState,
        ahead: &[Staged],
        written: &mut BTreeSet<VolumeIndex>,
    ) -> Result<Option<Staged>, Denied> {
        let frames = batch::parse(buf.bytes()).map_err(Denied::malformed)?;
        self.check_stream(&frames.header)?;
        match chain.judge(&frames.header, |number| self.chain_of(number, ahead)) {
            Verdict::Next => {}
            Verdict::Repeat => return Ok(None),
            Verdict::Refuse(code, detail) => return Err(Denied::Refuse(code, detail)),
        }
        let keys = Arc::clone(&self.stream.keys);
        let key = keys.host_key(frames.header.key_epoch()).map_err(Denied::malformed)?;
        let list = batch::open_list(buf.bytes(), &frames, key).map_err(Denied::malformed)?;
        if !list.annotations.volumes.is_empty() {
            let number = frames.header.place().number;
            self.declare(&list.annotations.volumes, Some(BatchNo(number.0.saturating_sub(1))))?;
        }
        self.check_ranges(&list.records)?;
        let references = self.resolve(&list.records)?;
        let mut staged = Staged {
            len: buf.bytes().len(),
            buf,
            header: frames.header,
            list,
            form: Form::Whole,
            references,
            entries: Vec::new(),
            answers: BTreeMap::new(),
            before: before.clone(),
            after: before.clone(),
        };
        let kept = self.apply_unjoined(&mut staged, &frames, written)?;
        let stored = strip(&mut staged, &frames, &kept);
        let placement = Placement {
            segment: HERE,
            payload_at: 0,
            frames: stored,
            references: staged.references.iter().map(|reference| (reference.record(), reference.place())).collect(),
        };
        let number = staged.header.place().number;
        staged.entries =
            index_entries(&mut staged.after, number, &staged.list.records, &placement).map_err(Denied::malformed)?;
        if !staged.list.annotations.volumes.is_empty() {
            staged.after.volumes.clone_from(&staged.list.annotations.volumes);
        }
        Ok(Some(staged))
    }

    fn check_stream(&self, header: &BatchHeader) -> Result<(), Denied> {
        let (place, id) = (header.place(), &self.stream.id);
        if place.vault != id.vault {
            return Err(Denied::Refuse(RefuseCode::Vault, format!("batch of vault {}", place.vault)));
        }
        if place.group != id.group || place.host != id.host {
            let detail =
                format!("batch of group {}, host {} in the stream of {}", place.group, place.host, id.subject());
            return Err(Denied::Refuse(RefuseCode::Malformed, detail));
        }
        match self.start_over {
            Some(lost) if place.incarnation <= lost => {
                let detail =
                    format!("batches of incarnation {} were lost here: a higher one must compare everything", lost);
                Err(Denied::Refuse(RefuseCode::Chain, detail))
            }
            _ => Ok(()),
        }
    }

    fn chain_of(&self, number: BatchNo, ahead: &[Staged]) -> Option<ChainHash> {
        let waiting = ahead.iter().find(|staged| staged.header.place().number == number);
        let waiting = waiting.map(|staged| staged.header.chain());
        waiting
            .or_else(|| self.state.tail.filter(|tail| tail.number == number).map(|tail| tail.chain))
            .or_else(|| self.stream.points().at_batch(number).map(|point| point.chain))
    }

    fn check_ranges(&self, records: &[Record]) -> Result<(), Denied> {
        for record in records {
            let kind = record.kind();
            let on_group = matches!(kind, Kind::EventBegin | Kind::EventEnd);
            let end = record.start_byte().saturating_add(record.len_bytes());
            match self.sizes.get(&record.volume()) {
                _ if on_group => {}
                Some(size) if end <= *size => {}
                Some(size) => {
                    let detail =
                        format!("volume {}: a record ends at byte {end}, the volume at {size}", record.volume());
                    return Err(Denied::Refuse(RefuseCode::Volume, detail));
                }
                None => {
                    let detail = format!("volume {} was never declared", record.volume());
                    return Err(Denied::Refuse(RefuseCode::Volume, detail));
                }
            }
            if kind == Kind::Unreadable {
                let range = format!("volume {} bytes {}..{end}", record.volume(), record.start_byte());
                self.stream.alarms.raise(AlarmCode::SourceUnreadable, &self.stream.id.subject(), &range);
            }
        }
        Ok(())
    }

    fn resolve(&self, records: &[Record]) -> Result<Vec<Reference>, Denied> {
        let leases = self.stream.leases();
        let mut references = Vec::new();
        for (seq, record) in records.iter().enumerate() {
            if record.home() != Home::Reference {
                continue;
            }
            let Some(place) = leases.resolve(&record.id(), record.len_bytes()) else {
                let detail =
                    format!("record {seq} refers to a content that is not under lease; connect again and send it");
                return Err(Denied::Refuse(RefuseCode::Unavailable, detail));
            };
            references.push(Reference::new(u32::try_from(seq).expect("a list has at most 2^20 records"), place));
        }
        Ok(references)
    }

    /// Writes the records of never-joined volumes to their bases, in order, and answers the probes between them. Gives
    /// the frames that the journal must keep.
    fn apply_unjoined(
        &self,
        staged: &mut Staged,
        frames: &BatchFrames,
        written: &mut BTreeSet<VolumeIndex>,
    ) -> Result<BTreeSet<u32>, Denied> {
        let mut kept = BTreeSet::new();
        let mut state = staged.before.clone();
        let keys = Arc::clone(&self.stream.keys);
        let epoch = staged.header.key_epoch();
        let dedup = keys.dedup_key(epoch).map_err(Denied::malformed)?;
        let mut opener = Opener::new(keys.host_key(epoch).map_err(Denied::malformed)?, frames);
        let references: BTreeMap<u32, ChunkPlace> = staged.references.iter().map(|r| (r.record(), r.place())).collect();
        for (seq, record) in (0u32..).zip(&staged.list.records) {
            compare::read_ahead(&staged.list.records, seq as usize, |volume| {
                // Those of the others are compared later.
                self.stream.base(volume).ok().filter(|_| !state.is_journaled(volume))
            });
            let kind = record.kind();
            if state.is_journaled(record.volume()) || !(kind.changes_content() || kind.is_sync()) {
                if let Home::Here { frame, .. } = record.home() {
                    kept.insert(frame);
                }
                state.apply_mark(kind, record.volume());
                continue;
            }
            let base = self.stream.base(record.volume())?;
            if kind.has_chunk() {
                let len = usize::try_from(record.len_bytes()).expect("a chunk is at most a slot");
                let content = match references.get(&seq) {
                    Some(place) => {
                        let plain =
                            self.stream.segments.read_frame(place.segment, place.frame_offset).map_err(|error| {
                                let detail = format!("record {seq}: the content that it refers to: {error}; send it");
                                Denied::Refuse(RefuseCode::Unavailable, detail)
                            })?;
                        slice(&plain, place.within, len)?.to_vec()
                    }
                    None => opener.chunk(staged.buf.bytes(), record, len)?.to_vec(),
                };
                if dedup.chunk_id(&content) != record.id() {
                    return Err(Denied::malformed(format!("record {seq}: its content has another id")));
                }
                base.write_unjoined(record.start_byte(), &content).inspect_err(|error| self.base_alarm(error))?;
                self.stream.counters.base_bytes.add(content.len() as u64);
                written.insert(record.volume());
            } else if kind.zeroes() {
                base.zero_unjoined(record.start_byte(), record.len_bytes())
                    .inspect_err(|error| self.base_alarm(error))?;
                written.insert(record.volume());
            } else {
                staged.answers.insert(seq, compare::with_base(&base, record, dedup));
            }
        }
        Ok(kept)
    }

    /// Appends, syncs, publishes; in more than one round when a segment ends in between.
    fn store(&mut self, staged: Vec<Staged>, received: WallTime, taken: &mut Taken) -> Result<(), Denied> {
        self.announce()?;
        let mut written: Vec<(Staged, Appended)> = Vec::with_capacity(staged.len());
        let mut outcome = Ok(());
        for mut next in staged {
            let room = next.len as u64 + (next.references.len() * REFERENCE_BYTES) as u64;
            if self.journal.is_full_for(room) || self.stream.index.wants_seal() {
                self.finish(std::mem::take(&mut written), received, taken)?;
                if let Err(error) = self.roll() {
                    outcome = Err(error.into());
                    break;
                }
            }
            let bytes = &mut next.buf.with_headroom()[..ALIGN + next.len];
            let mut append =
                Append { bytes, form: next.form, header: &next.header, references: &next.references, received };
            match self.journal.append(&mut append, &next.before) {
                Ok(appended) => written.push((next, appended)),
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        if matches!(outcome, Err(Denied::Stop(_))) {
            return outcome;
        }
        self.finish(written, received, taken)?;
        outcome
    }

    /// Makes what was appended durable and shows it.
    fn finish(
        &mut self,
        written: Vec<(Staged, Appended)>,
        received: WallTime,
        taken: &mut Taken,
    ) -> Result<(), Denied> {
        if written.is_empty() {
            return Ok(());
        }
        self.journal.sync()?;
        self.stream.counters.commits.add(1);
        for (mut staged, appended) in written {
            place_entries(&mut staged.entries, &appended);
            self.stream.index.add_batch(&staged.entries);
            let raw_bytes = staged.header.raw_bytes();
            let mut state = staged.after;
            let bookmark = staged.list.annotations.bookmark.take();
            let point = state.finish(&staged.header, bookmark, received, appended.bytes);
            self.state = state;
            self.chain.advance(&staged.header);
            self.journal.note_point(&appended, &point, staged.entries.len());
            self.stream.leases().retire(point.id.batch);
            let (number, recoverable) = (point.id.batch, point.recoverable);
            self.stream.points_mut().push(point);
            let counters = &self.stream.counters;
            counters.batches.add(1);
            counters.received_bytes.add(staged.buf.bytes().len() as u64);
            counters.raw_bytes.add(raw_bytes);
            counters.journal_bytes.add(appended.bytes);
            counters.references.add(staged.references.len() as u64);
            if recoverable {
                self.note_healed(number);
            }
            self.answer(
                number,
                &staged.header,
                &staged.list.records,
                staged.answers,
                &staged.before,
                &mut taken.answers,
            );
            taken.acknowledge = true;
        }
        Ok(())
    }

    /// Acts on what the background check found. An unreadable entry of the active segment: closes the segment, whose footer then
    /// says what the entry held. Lost batches: the source is sent away, and told at its next greeting to begin a new
    /// incarnation and compare everything; until it has, no cut is recoverable.
    ///
    /// # Errors
    /// [`Denied::Refuse`] in the second case; otherwise from the disk, and then it is tried again.
    pub fn attend(&mut self) -> Result<(), Denied> {
        if self.stream.rescue.swap(false, Ordering::Relaxed)
            && let Err(error) = self.roll()
        {
            self.stream.rescue.store(true, Ordering::Relaxed);
            return Err(error.into());
        }
        let lost = self.stream.damage().lost();
        if lost == self.lost_seen {
            return Ok(());
        }
        let incarnation = self.state.tail.map_or_else(Default::default, |tail| tail.incarnation);
        self.stream.update(|record| record.start_over = Some(incarnation))?;
        (self.start_over, self.lost_seen) = (Some(incarnation), lost);
        self.state.event_open = true;
        let detail = "batches were lost here (the target's alarms name them): connect again and compare everything";
        Err(Denied::Refuse(RefuseCode::Unavailable, detail.to_owned()))
    }

    /// A recoverable point after lost batches: the source has compared everything since; unless some were lost that it was not
    /// told of.
    fn note_healed(&self, batch: BatchNo) {
        let healed = self.stream.damage().lost() == self.lost_seen
            && self.stream.damage().needs_compare()
            && self.stream.damage.write().unwrap_or_else(PoisonError::into_inner).heal_batches(batch);
        if healed {
            self.stream.keep_damage();
            tracing::info!(
                stream = self.stream.id.subject(),
                batch = batch.0,
                "the source has compared everything since batches were lost"
            );
        }
    }

    fn answer(
        &self,
        number: BatchNo,
        header: &BatchHeader,
        records: &[Record],
        mut results: BTreeMap<u32, Vec<Answer>>,
        before: &StreamState,
        answers: &mut Vec<Answers>,
    ) {
        let mut state = before.clone();
        for (seq, record) in (0u32..).zip(records) {
            compare::read_ahead(records, seq as usize, |volume| {
                self.stream.base(volume).ok().filter(|_| state.is_journaled(volume))
            });
            let kind = record.kind();
            if matches!(kind, Kind::Probe | Kind::ProbeZero) && state.is_journaled(record.volume()) {
                let answer = match self.stream.keys.dedup_key(header.key_epoch()) {
                    Ok(dedup) => compare::with_stream(&self.stream, record, number, seq, dedup),
                    Err(_) => vec![compare::whole(record, false)],
                };
                results.insert(seq, answer);
            }
            state.apply_mark(kind, record.volume());
        }
        self.stream.counters.probes.add(results.len() as u64);
        answers.extend(messages(number, results.into_values()));
    }

    /// Closes the active segment; the next batch begins a new one.
    ///
    /// # Errors
    /// One that [`Error::passes`]: the segment stays open. Otherwise the stream must stop.
    pub fn roll(&mut self) -> Result<()> {
        let run = self.stream.index.active_run()?;
        self.unannounced = self.journal.seal(&run, &self.state)?;
        self.announce()
    }

    /// Lets the index take over a footer. Until it has, no batch may come: its entries would be counted to that footer.
    fn announce(&mut self) -> Result<()> {
        if let Some(sealed) = &self.unannounced {
            self.stream.index.sealed(sealed.clone())?;
            self.unannounced = None;
        }
        Ok(())
    }

    /// Why the journal is stopped, if it is.
    #[must_use]
    pub fn is_failed(&self) -> Option<&str> {
        self.journal.is_failed()
    }
}

/// Puts answers into messages. All answers to one question are in one message: the source takes what is not named for equal.
fn messages(number: BatchNo, questions: impl Iterator<Item = Vec<Answer>>) -> Vec<Answers> {
    let mut messages: Vec<Answers> = Vec::new();
    for mut results in questions {
        if results.len() > ANSWERS_MAX
            && let (Some(first), Some(last)) = (results.first().copied(), results.last())
        {
            // More is sent than differs; nothing that differs is taken for equal.
            results = vec![Answer { len: last.offset + last.len - first.offset, ..first }];
        }
        match messages.last_mut() {
            Some(message) if message.results.len() + results.len() <= ANSWERS_MAX => message.results.extend(results),
            Some(_) | None => messages.push(Answers { number, results }),
        }
    }
    messages
}

/// Puts the frames that the journal keeps one behind the other in the buffer; gives their places.
fn strip(staged: &mut Staged, frames: &BatchFrames, kept: &BTreeSet<u32>) -> Vec<(u32, u32)> {
    let numbered = (0u32..).zip(frames.offsets.iter().copied());
    let data_frames = frames.offsets.len() - 1;
    if kept.len() == data_frames {
        return numbered.collect();
    }
    let total = staged.len;
    let ends = frames.offsets.iter().skip(1).map(|at| *at as usize).chain([total]);
    let bytes = &mut staged.buf.with_headroom()[ALIGN..];
    let (mut stored, mut at) = (Vec::with_capacity(kept.len() + 1), frames.offsets[0] as usize);
    for ((number, from), end) in numbered.zip(ends) {
        if number == 0 || kept.contains(&number) {
            bytes.copy_within(from as usize..end, at);
            stored.push((number, u32::try_from(at).expect("a batch is at most 64 MiB")));
            at += end - from as usize;
        }
    }
    staged.len = at;
    staged.form = Form::Stripped;
    stored
}

fn place_entries(entries: &mut [IndexEntry], appended: &Appended) {
    for entry in entries {
        if let Content::Chunk(place) = &mut entry.content
            && place.segment == HERE
        {
            place.segment = appended.segment;
            place.frame_offset += appended.payload_at;
        }
    }
}

fn slice(plain: &[u8], within: u32, len: usize) -> Result<&[u8], Denied> {
    let start = within as usize;
    plain.get(start..start + len).ok_or_else(|| Denied::malformed("a record's content ends behind its frame"))
}

/// Opens a batch's frames one after the other; keeps the last, as records follow the frames' order.
struct Opener<'a> {
    host_key: &'a HostKey,
    key: Option<frame::FrameKey>,
    frames: &'a BatchFrames,
    open: Option<u32>,
    scratch: Vec<u8>,
    plain: Vec<u8>,
}

impl<'a> Opener<'a> {
    fn new(host_key: &'a HostKey, frames: &'a BatchFrames) -> Self {
        Self { host_key, key: None, frames, open: None, scratch: Vec::new(), plain: Vec::new() }
    }

    fn chunk(&mut self, bytes: &[u8], record: &Record, len: usize) -> Result<&[u8], Denied> {
        let Home::Here { frame: number, offset } = record.home() else {
            return Err(Denied::malformed("a record with content has none"));
        };
        if self.open != Some(number) {
            let at = self.frames.offsets[number as usize] as usize;
            let (header, sealed) = frame::split(&bytes[at..], FRAME_PLAIN_MAX).map_err(Denied::malformed)?;
            self.open = None;
            let key = self.key.get_or_insert_with(|| self.host_key.frame_key(header.salt()));
            key.open(&header, sealed, &[], &mut self.scratch, &mut self.plain).map_err(Denied::malformed)?;
            self.open = Some(number);
        }
        slice(&self.plain, offset, len)
    }
}
