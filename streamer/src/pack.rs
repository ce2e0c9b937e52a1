//! Pack: which chunk goes into which frame.

use std::ops::Deref;

use farshore_proto::BatchNo;
use farshore_proto::frame::FRAME_PLAIN_TARGET;
use farshore_proto::record::{Home, Kind};

use crate::coalesce::RecordSet;
use crate::dedup::{LeaseSet, Seen};
use crate::drain::RawBatch;

/// Frames of one batch: their chunks by record, in order.
#[derive(Debug, Default)]
pub struct PackPlan {
    /// Data frames; the first is number 1.
    pub frames: Vec<FramePlan>,
    /// Records whose bytes are packed, frame after frame.
    pub chunks: Vec<u32>,
    /// Bytes of all frames before compression.
    pub plain_bytes: u64,
    /// Bytes of chunks that are not sent because one like it is in the batch.
    pub repeated_bytes: u64,
    /// Bytes of chunks that are not sent because the target has them.
    pub referenced_bytes: u64,
    /// The next chunk starts a frame.
    closed: bool,
}

/// One frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FramePlan {
    /// Its first chunk's place in [`PackPlan::chunks`].
    pub first: u32,
    /// Chunks in it.
    pub count: u32,
    /// Plain bytes.
    pub len: u32,
}

/// Gives every chunk its home.
///
/// Chunks of volumes that have not joined the points go into frames of their own, behind the others: the target writes them to
/// the replica at once and need not journal those frames. Neither kind shares a home with the other.
#[derive(Default)]
pub struct Packer {
    seen: Seen,
}

impl Packer {
    /// Plans the frames of batch `number` and sets the homes of its records.
    pub fn plan<P: Deref<Target = [u8]>>(
        &mut self,
        number: BatchNo,
        raw: &RawBatch<P>,
        set: &mut RecordSet,
        lease: Option<&LeaseSet>,
        plan: &mut PackPlan,
    ) {
        *plan = PackPlan {
            frames: std::mem::take(&mut plan.frames),
            chunks: std::mem::take(&mut plan.chunks),
            ..PackPlan::default()
        };
        plan.frames.clear();
        plan.chunks.clear();
        for joined in [true, false] {
            self.seen.clear();
            plan.closed = true;
            self.plan_class(number, raw, set, lease, plan, joined);
        }
    }

    fn plan_class<P>(
        &mut self,
        number: BatchNo,
        raw: &RawBatch<P>,
        set: &mut RecordSet,
        lease: Option<&LeaseSet>,
        plan: &mut PackPlan,
        joined: bool,
    ) {
        let mut flags = raw.before;
        // One look-up serves a run of records of one volume.
        let mut last = None;
        for index in 0..set.records.len() {
            let record = set.records[index];
            if matches!(record.kind(), Kind::VolumeJoined | Kind::VolumeLeft) {
                flags.apply(record.kind(), record.volume());
                last = None;
            }
            if !record.kind().has_chunk() {
                continue;
            }
            let class = match last {
                Some((volume, class)) if volume == record.volume() => class,
                _ => flags.joined.contains(record.volume()),
            };
            last = Some((record.volume(), class));
            if class != joined {
                continue;
            }
            let at = u32::try_from(index).expect("a batch has at most 2^20 records");
            let first = self.seen.first_with(at, |other| set.records[other as usize].id());
            let home = if let Some(first) = first {
                plan.repeated_bytes += record.len_bytes();
                set.records[first as usize].home()
            } else if lease.is_some_and(|lease| lease.covers(number, record.id())) {
                plan.referenced_bytes += record.len_bytes();
                Home::Reference
            } else {
                plan.add(at, u32::try_from(record.len_bytes()).expect("a chunk is at most one slot"))
            };
            set.records[index] = record.with_home(home);
        }
    }
}

impl PackPlan {
    /// Puts a chunk into the open frame.
    fn add(&mut self, record: u32, len: u32) -> Home {
        if self.closed || self.frames.last().is_none_or(|frame| frame.len as usize >= FRAME_PLAIN_TARGET) {
            self.closed = false;
            let first = u32::try_from(self.chunks.len()).expect("a batch has at most 2^20 records");
            self.frames.push(FramePlan { first, count: 0, len: 0 });
        }
        let frame = self.frames.last_mut().expect("one is open");
        let offset = frame.len;
        frame.count += 1;
        frame.len += len;
        let number = u32::try_from(self.frames.len()).expect("no more frames than records");
        self.chunks.push(record);
        self.plain_bytes += u64::from(len);
        Home::Here { frame: number, offset }
    }
}
