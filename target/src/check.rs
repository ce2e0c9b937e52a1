//! The background check: opens every journaled frame once and recomputes the ids of its contents. Only what was checked may
//! be leased; a bad frame is found here and not in the disaster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farshore_proto::BatchNo;
use farshore_proto::frame::{self, FRAME_PLAIN_MAX};
use farshore_proto::record::{Home, Record};
use farshore_uring::{Storage, StorageFile};

use crate::alarm::AlarmCode;
use crate::damage::Damaged;
use crate::error::{IoContext, Kind, Result};
use crate::group::{ChunkPlace, GroupHost};
use crate::scan::{Scan, StoredEntry};
use crate::segment::Owner;
use crate::segments::SegmentInfo;

/// Contents are leased from this many newest segments: 1 GiB of journal. Older ones are soon dropped by retention, and a
/// lease would hold that up.
const LEASE_SEGMENTS: usize = 8;
/// From so many segments on that are not checked to their end, the check is behind: soon it would lease nothing.
const BEHIND_SEGMENTS: usize = LEASE_SEGMENTS - 2;
/// Batches after which the place of the check is made durable; checking as many again after a restart costs little.
const STORE_EVERY: u64 = 4096;

/// What a bounded step of background work did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// There may be more to do at once.
    Worked,
    /// Nothing to do now.
    Idle,
}

/// Checks one stream's frames, one entry a step.
pub struct Checker<S: Storage> {
    stream: Arc<GroupHost<S>>,
    /// Where to go on: segment, byte, batch.
    place: Option<(u32, u64)>,
    done: BatchNo,
    stored: BatchNo,
}

impl<S: Storage> Checker<S> {
    /// Goes on where the catalog says; the newest segments are read again, as leases live in memory only.
    #[must_use]
    pub fn new(stream: Arc<GroupHost<S>>) -> Self {
        let stored = stream.record().checked;
        stream.checked.store(stored.0, Ordering::Relaxed);
        let segments = stream.segments.list();
        let recent = segments.iter().rev().take(LEASE_SEGMENTS).next_back().map_or(BatchNo(0), |segment| segment.first);
        let done = stored.min(BatchNo(recent.0.saturating_sub(1)));
        Self { stream, place: None, done, stored }
    }

    /// Checks the next entry.
    ///
    /// # Errors
    /// From the disk. Damage is no error: it is noted, and the check goes on behind it.
    pub fn step(&mut self) -> Result<Progress> {
        for (segment, frame_offset) in self.stream.segments.take_suspects() {
            self.examine(segment, frame_offset)?;
        }
        let Some((info, at)) = self.find_next()? else { return Ok(Progress::Idle) };
        let newest = self.stream.points().iter().next_back().map_or(BatchNo(0), |point| point.id.batch);
        let path = self.stream.segments.path(info.number);
        let file = match self.stream.segments.file(info.number) {
            Err(error) if error.kind() == Kind::NotFound => {
                // Dropped since it was listed.
                self.place = None;
                self.done = self.done.max(info.last);
                return Ok(Progress::Worked);
            }
            other => other?,
        };
        let len = file.len().at("measure", &path)?.min(info.bytes);
        let scan = Scan { file: &*file, path: &path, number: info.number, len };
        match scan.entry(at)? {
            Ok(stored) if stored.entry.point.batch > newest => return Ok(Progress::Idle),
            Ok(stored) => {
                self.check_entry(&stored, &info);
                self.place = Some((info.number, at + stored.entry.total_len()));
                self.advance(stored.entry.point.batch)?;
            }
            Err(_) => self.skip_damage(&scan, &info, at)?,
        }
        Ok(Progress::Worked)
    }

    /// So much is unchecked that it has to catch up.
    pub(crate) fn is_behind(&self) -> bool {
        let unchecked = self.stream.segments.list().into_iter().rev().take_while(|segment| segment.last > self.done);
        unchecked.take(BEHIND_SEGMENTS).count() == BEHIND_SEGMENTS
    }

    /// The segment and byte of the first entry not checked yet.
    fn find_next(&mut self) -> Result<Option<(SegmentInfo, u64)>> {
        let mut segments = self.stream.segments.list().into_iter().filter(|segment| segment.last > self.done);
        let Some(info) = segments.next() else { return Ok(None) };
        if let Some((number, at)) = self.place
            && number == info.number
        {
            return Ok((at < info.bytes).then_some((info, at)));
        }
        let path = self.stream.segments.path(info.number);
        let file = self.stream.segments.file(info.number)?;
        let len = file.len().at("measure", &path)?.min(info.bytes);
        let scan = Scan { file: &*file, path: &path, number: info.number, len };
        let at = match scan.opening(&Owner::of(&self.stream.id)) {
            Ok(opening) => opening.data_start,
            Err(error) => {
                tracing::error!(%error, "the beginning of a segment is unreadable");
                match scan.find_entry(0, 0)? {
                    Some((at, _)) => at,
                    None => info.bytes,
                }
            }
        };
        Ok(Some((info, at)))
    }

    fn advance(&mut self, batch: BatchNo) -> Result<()> {
        self.done = self.done.max(batch);
        self.stream.checked.fetch_max(self.done.0, Ordering::Relaxed);
        if self.done.0 >= self.stored.0 + STORE_EVERY {
            self.store()?;
        }
        Ok(())
    }

    /// Makes the place of the check durable.
    ///
    /// # Errors
    /// From the disk.
    pub fn store(&mut self) -> Result<()> {
        if self.done > self.stored {
            let done = self.done;
            self.stream.update(|record| record.checked = record.checked.max(done))?;
            self.stored = done;
        }
        Ok(())
    }

    fn skip_damage<F: StorageFile>(&mut self, scan: &Scan<'_, F>, info: &SegmentInfo, at: u64) -> Result<()> {
        let next = scan.find_entry(at + crate::segment::ALIGN as u64, 0)?;
        let (next_at, before) = match next {
            Some((next_at, entry)) => (next_at, BatchNo(entry.point.batch.0.saturating_sub(1))),
            None => (info.bytes, info.last),
        };
        let from = self.done.max(BatchNo(info.first.0.saturating_sub(1))).next();
        self.damaged_between(info, at, next_at, from, before.max(from));
        self.place = Some((info.number, next_at));
        self.advance(before.max(from))
    }

    /// An entry of a segment is unreadable as a whole. Its frames may still be good, one by one; the index, which a sealed
    /// segment keeps in its footer, says which pieces lead there, and each is tried.
    fn damaged_between(&self, info: &SegmentInfo, at: u64, next_at: u64, from: BatchNo, to: BatchNo) {
        let (path, number) = (self.stream.segments.path(info.number), info.number);
        tracing::error!(path = %path.display(), at, from = from.0, to = to.0, "an entry is unreadable");
        let entries = match self.stream.index.segment_entries(number) {
            Ok(entries) => entries,
            Err(_) => {
                self.stream.note_damage(Damaged::Batches { from, to, healed: None });
                return;
            }
        };
        let detail = format!(
            "batches {from} to {to}: unreadable from byte {at} on; the index still leads to what they hold. Look at the disk"
        );
        self.stream.alarms.raise(AlarmCode::EntryDamaged, &self.stream.segment_subject(number), &detail);
        if !info.sealed {
            self.stream.rescue.store(true, Ordering::Relaxed);
        }
        let mut frames: BTreeMap<u32, (BatchNo, Vec<_>)> = BTreeMap::new();
        for entry in entries {
            if let crate::group::Content::Chunk(place) = entry.content
                && place.segment == number
                && (at..next_at).contains(&u64::from(place.frame_offset))
            {
                let pieces = &mut frames.entry(place.frame_offset).or_insert((entry.batch, Vec::new())).1;
                pieces.push((entry.volume, entry.slot, entry.start, entry.count));
            }
        }
        use crate::group::FrameStore;
        for (frame_offset, (batch, pieces)) in frames {
            if self.stream.segments.read_frame(number, frame_offset).is_err() {
                self.stream.note_damage(Damaged::Frame { segment: number, frame_offset, batch, pieces });
            }
        }
    }

    fn check_entry(&self, stored: &StoredEntry, info: &SegmentInfo) {
        let batch = stored.entry.point.batch;
        let lose = |reason: &str| {
            tracing::error!(batch = batch.0, reason, "a journaled batch cannot be opened");
            self.stream.note_damage(Damaged::Batches { from: batch, to: batch, healed: None });
        };
        let (list, placement) = match (stored.open_list(&self.stream.keys), stored.placement()) {
            (Ok(list), Ok(placement)) => (list, placement),
            (Err(reason), _) | (_, Err(reason)) => return lose(&reason),
        };
        let mut by_frame: BTreeMap<u32, Vec<&Record>> = BTreeMap::new();
        for record in &list.records {
            if let Home::Here { frame, .. } = record.home() {
                by_frame.entry(frame).or_default().push(record);
            }
        }
        let leasable = self.is_recent(info.number);
        for (number, at) in placement.frames.iter().skip(1) {
            let records = by_frame.remove(number).unwrap_or_default();
            let frame_offset = placement.payload_at + at;
            match self.check_frame(stored, *at, &records) {
                Ok(()) if leasable => {
                    let mut leases = self.stream.leases();
                    for record in &records {
                        if let Home::Here { offset, .. } = record.home() {
                            let place = ChunkPlace { segment: info.number, frame_offset, within: offset };
                            leases.learn(
                                record.id(),
                                place,
                                u32::try_from(record.len_bytes()).expect("at most a slot"),
                            );
                        }
                    }
                }
                Ok(()) => {}
                Err(reason) => {
                    tracing::error!(batch = batch.0, frame = number, reason, "a journaled frame is bad");
                    let pieces = records.iter().map(|record| piece(record)).collect();
                    self.stream.note_damage(Damaged::Frame { segment: info.number, frame_offset, batch, pieces });
                }
            }
            self.stream.counters.frames_checked.add(1);
        }
    }

    fn is_recent(&self, number: u32) -> bool {
        self.stream.segments.list().iter().rev().take(LEASE_SEGMENTS).any(|segment| segment.number == number)
    }

    fn check_frame(&self, stored: &StoredEntry, at: u32, records: &[&Record]) -> Result<(), String> {
        let text = |error: farshore_proto::Error| error.to_string();
        let (header, sealed) = frame::split(&stored.payload[at as usize..], FRAME_PLAIN_MAX).map_err(text)?;
        let keys = &self.stream.keys;
        let host_key = keys.host_key(header.key_epoch()).map_err(|error| error.to_string())?;
        let dedup = keys.dedup_key(header.key_epoch()).map_err(|error| error.to_string())?;
        let (mut scratch, mut plain) = (Vec::new(), Vec::new());
        host_key.frame_key(header.salt()).open(&header, sealed, &[], &mut scratch, &mut plain).map_err(text)?;
        for record in records {
            let Home::Here { offset, .. } = record.home() else { continue };
            let start = offset as usize;
            let len = usize::try_from(record.len_bytes()).expect("at most a slot");
            let content = plain.get(start..start + len).ok_or("a content ends behind its frame")?;
            if dedup.chunk_id(content) != record.id() {
                return Err(format!("the content at byte {start} has another id than its record says"));
            }
        }
        Ok(())
    }

    /// A reader stumbled over a frame: notes which pieces are in it.
    fn examine(&self, segment: u32, frame_offset: u32) -> Result<()> {
        let Some(info) = self.stream.segments.list().into_iter().find(|info| info.number == segment) else {
            return Ok(());
        };
        let path = self.stream.segments.path(segment);
        let file = self.stream.segments.file(segment)?;
        let len = file.len().at("measure", &path)?.min(info.bytes);
        let scan = Scan { file: &*file, path: &path, number: segment, len };
        let mut from = 0;
        let mut holder = None;
        while let Some((at, entry)) = scan.find_entry(from, 0)? {
            if at > u64::from(frame_offset) {
                break;
            }
            holder = Some((at, entry));
            from = at + entry.total_len().max(crate::segment::ALIGN as u64);
        }
        if let Some((at, entry)) = holder {
            match scan.entry(at)? {
                Ok(stored) => self.check_entry(&stored, &info),
                Err(_) => self.damaged_between(&info, at, at + entry.total_len(), entry.point.batch, entry.point.batch),
            }
        }
        Ok(())
    }
}

fn piece(record: &Record) -> (farshore_proto::VolumeIndex, u64, u8, u8) {
    let slot = farshore_proto::SlotNo::of_sector(record.start());
    let start = u8::try_from(record.start() - slot.start_sector()).expect("below 128");
    (record.volume(), slot.0, start, u8::try_from(record.sectors()).expect("a chunk has at most 128 sectors"))
}
