//! Sync's positions in the ring: its share of it, and what becomes of the bits.

use std::sync::Arc;

use farshore_proto::message::Answer;
use farshore_proto::record::Kind;
use farshore_proto::{ChunkId, SLOT_BYTES, SlotNo};
use farshore_ring::{Desc, Reservation};

use super::slot::Job;
use super::{Question, Syncer};
use crate::group::NoRoom;

/// Content of sync's in the stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) position: u64,
    pub(super) volume: u16,
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Claim {
    fn overlaps(&self, other: &Self) -> bool {
        let apart = self.first + self.count <= other.first || other.first + other.count <= self.first;
        self.volume == other.volume && !apart
    }
}

/// Bytes of ring that a payload of `len` takes.
pub(super) fn cell_bytes(len: usize) -> u64 {
    (len as u64).next_power_of_two().max(4096)
}

/// Of each of `count` slots from `first` on, whether the results of a question name it as different.
pub(super) fn differing(first: u64, count: u64, results: &[Answer]) -> Vec<bool> {
    let slots = first..first + count;
    let mut differs = vec![false; usize::try_from(count).expect("at most ZERO_RUN")];
    for answer in results.iter().filter(|answer| !answer.equal && answer.len > 0) {
        let last = SlotNo::of_byte(answer.offset.saturating_add(answer.len - 1)).0;
        let named = SlotNo::of_byte(answer.offset).0.max(slots.start)..last.saturating_add(1).min(slots.end);
        for slot in named {
            differs[usize::try_from(slot - slots.start).expect("at most ZERO_RUN")] = true;
        }
    }
    differs
}

impl Syncer {
    /// Forgets what of sync's has left the ring.
    pub(super) fn account(&mut self) {
        let freed = self.group.ring().freed();
        while let Some((_, bytes)) = self.in_ring.pop_front_if(|(position, _)| *position < freed) {
            self.in_ring_bytes -= bytes;
        }
    }

    /// Reserves within sync's share. Without payload for `len` 0.
    pub(super) fn reserve(&mut self, len: usize) -> Result<Reservation, NoRoom> {
        let ring = self.group.ring();
        let part = self.config.ring_part.max(1);
        let bytes = if len == 0 { 0 } else { cell_bytes(len) };
        let held = self.in_ring_bytes + self.reserved_bytes;
        // The guest's writes first: in a ring that they have filled by half, sync takes nothing more.
        let own = held + bytes <= (ring.size_bytes() / part).max(4 * SLOT_BYTES)
            && (self.in_ring.len() as u64) < (ring.descriptors() / part).max(2);
        let fits = own && ring.used_bytes() + bytes <= ring.size_bytes() / 4 * 3;
        let fits = fits && ring.used_descriptors() < ring.descriptors() / 4 * 3;
        let reserved = match (fits, len) {
            (false, _) => None,
            (true, 0) => self.producer.reserve_bare().ok(),
            (true, _) => self.producer.reserve(len).ok(),
        };
        if reserved.is_none() {
            self.no_room = true;
        }
        reserved.ok_or(NoRoom)
    }

    fn noted(&mut self, position: u64, bytes: u64) {
        self.in_ring.push_back((position, bytes));
        self.in_ring_bytes += bytes;
    }

    /// Claims content of `count` slots from `first` on. The caller holds their range lock and knows that they are untouched (or has held
    /// the lock since before the read), so no write is in flight there and the content is theirs.
    ///
    /// `pieces`: the records, as (kind, offset, length, payload), all of them or none.
    pub(super) fn claim_content(
        &mut self,
        volume: u16,
        first: u64,
        count: u64,
        pieces: Vec<(Kind, u64, u64, Reservation)>,
    ) -> Result<(), NoRoom> {
        let group = Arc::clone(&self.group);
        let of = Arc::clone(&self.volumes.get(&volume).ok_or(NoRoom)?.volume);
        let bytes = of.bytes_of(first, count);
        let len = bytes.end - bytes.start;
        // Whoever drops the stream's past (and marks everything) comes wholly before or wholly after this.
        let claims = group.try_claims()?;
        let before = of.in_flight.test_range(bytes.start, len);
        of.in_flight.set_range(bytes.start, len);
        let mut last = None;
        for (kind, offset, length, reservation) in pieces {
            let payload = reservation.len();
            let desc = Desc {
                kind: kind as u8,
                volume,
                len: u32::try_from(payload).expect("at most a slot"),
                offset,
                length,
                ..Desc::default()
            };
            let Ok(position) = self.producer.publish(reservation, &desc) else {
                // The slot stays missing; what of it got through is true and does no harm.
                if !before {
                    of.in_flight.clear_range(bytes.start, len);
                }
                return Err(NoRoom);
            };
            self.noted(position, if payload == 0 { 0 } else { cell_bytes(payload) });
            last = Some(position);
        }
        of.missing.clear_range(bytes.start, len);
        drop(claims);
        if let Some(position) = last {
            if before {
                self.shared_below = position;
            }
            self.unacked.push_back(Claim { position, volume, first, count });
        }
        self.dealt_with(volume, first, count);
        Ok(())
    }

    /// Asks whether a slot at the target has the content `id`, or (without one) whether `count` slots are zero there.
    pub(super) fn ask(
        &mut self,
        volume: u16,
        first: u64,
        count: u64,
        id: Option<ChunkId>,
        tries: u8,
    ) -> Result<(), NoRoom> {
        let position = self.publish_question(volume, first, count, id, false)?;
        let question = Question { volume, first, count, zero: id.is_none(), tries, durable: None };
        self.questions.insert(position, question);
        Ok(())
    }

    /// Puts a question into the stream; its position. `locked`: the caller holds a range lock, and so does not wait for somebody who
    /// drops a whole ring.
    pub(super) fn publish_question(
        &mut self,
        volume: u16,
        first: u64,
        count: u64,
        id: Option<ChunkId>,
        locked: bool,
    ) -> Result<u64, NoRoom> {
        let of = Arc::clone(&self.volumes.get(&volume).ok_or(NoRoom)?.volume);
        let payload = id.as_ref().map_or(&[][..], |ChunkId(bytes)| &bytes[..]);
        let mut reservation = self.reserve(payload.len())?;
        reservation[..payload.len()].copy_from_slice(payload);
        let bytes = of.bytes_of(first, count);
        let desc = Desc {
            kind: if id.is_some() { Kind::Probe } else { Kind::ProbeZero } as u8,
            volume,
            len: u32::try_from(payload.len()).expect("32 bytes"),
            offset: bytes.start,
            length: bytes.end - bytes.start,
            ..Desc::default()
        };
        let group = Arc::clone(&self.group);
        let claims = if locked { group.try_claims()? } else { group.claims() };
        // A question claimed after a new epoch began is answered in it.
        let position = self.producer.publish(reservation, &desc).map_err(|_| NoRoom)?;
        let epoch = group.epoch();
        drop(claims);
        self.noted(position, if payload.is_empty() { 0 } else { cell_bytes(payload.len()) });
        if epoch != self.epoch {
            self.check_epoch();
        }
        Ok(position)
    }

    /// The results of one question: those that differ are named (or one "equal" for all).
    pub(super) fn answered(&mut self, question: &Question, results: &[Answer]) {
        let differs = differing(question.first, question.count, results);
        if let Some(volume) = self.volumes.get_mut(&question.volume).filter(|_| !question.zero) {
            differs.iter().for_each(|differs| volume.answers.answered(!differs));
        }
        let mut at = question.first;
        for run in differs.chunk_by(|a, b| a == b) {
            let count = run.len() as u64;
            if run[0] {
                self.send(question, at, count);
            } else {
                self.equal(question.volume, at, count, question.tries);
            }
            at += count;
        }
    }

    fn send(&mut self, question: &Question, first: u64, count: u64) {
        let (volume, tries) = (question.volume, question.tries);
        if question.zero {
            self.jobs.push_back(Job::Zero { volume, first, count, probe: false, tries });
        } else {
            // Still watched: what the second read finds untouched was not changed since the first.
            self.jobs.push_back(Job::Read { volume, slot: first, probe: false, tries, watched: true });
        }
    }

    /// The target has the content of the slots, as of the question's ticket.
    fn equal(&mut self, index: u16, first: u64, count: u64, tries: u8) {
        let brief = self.brief_op();
        let group = Arc::clone(&self.group);
        let Some(volume) = self.volumes.get(&index) else { return };
        let epoch = self.epoch;
        let cleared = volume.with_brief_lock(brief, volume.volume.bytes_of(first, count), |volume| {
            let mut cleared = 0;
            // Not if the stream is being started over in this very moment, or was.
            let claims = group.try_claims();
            if claims.is_ok() && group.epoch() == epoch {
                for slot in (first..first + count).filter(|slot| !volume.volume.touched.test(*slot)) {
                    volume.volume.missing.clear(slot);
                    cleared += 1;
                }
            }
            drop(claims);
            cleared
        });
        match cleared {
            Some(cleared) => {
                self.run.done_bytes += cleared * SLOT_BYTES;
                // The touched ones are still missing and are found again, unless that is all there is: then their torn reads are counted.
                if cleared == 0 && count == 1 {
                    self.torn(index, first, true, tries);
                } else {
                    self.release(index, first, count);
                }
            }
            None if count == 1 => self.torn(index, first, true, tries),
            // A write is in flight somewhere in it: piece by piece.
            None => {
                let half = count / 2;
                self.equal(index, first, half, tries);
                self.equal(index, first + half, count - half, tries);
            }
        }
    }

    /// Everything below `position` is durable: it is not *in flight* any more, unless a later claim has it again.
    pub(super) fn settle(&mut self, position: u64) {
        while let Some(claim) = self.unacked.pop_front_if(|claim| claim.position < position) {
            self.not_in_flight(&claim);
        }
    }

    /// What was claimed is not *in flight* any more, but where a later claim has it. It is not among `unacked`.
    pub(super) fn not_in_flight(&self, claim: &Claim) {
        let Some(volume) = self.volumes.get(&claim.volume) else { return };
        let bytes = volume.volume.bytes_of(claim.first, claim.count);
        volume.volume.in_flight.clear_range(bytes.start, bytes.end - bytes.start);
        if claim.position >= self.shared_below {
            return;
        }
        for later in self.unacked.iter().filter(|later| later.overlaps(claim)) {
            let bytes = volume.volume.bytes_of(later.first, later.count);
            volume.volume.in_flight.set_range(bytes.start, bytes.end - bytes.start);
        }
    }
}
