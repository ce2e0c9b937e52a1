//! Compress and seal: planned frames → the bytes of a batch.

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;
use crossbeam::queue::ArrayQueue;
use farshore_proto::Result as ProtoResult;
use farshore_proto::batch::{Annotations, BatchBuilder};
use farshore_proto::frame::{self, Compressor, FRAME_HEADER_BYTES, FRAME_PLAIN_MAX, TAG_BYTES};

use crate::coalesce::RecordSet;
use crate::drain::RawBatch;
use crate::look::looks_random;
use crate::pack::{FramePlan, PackPlan};

/// zstd's level, or none.
pub type Level = Option<i32>;

/// Bytes of frames in one piece of memory: few pieces per batch, each small enough to be reused soon.
const SEGMENT_BYTES: usize = 1 << 20;
/// The longest frame that may be begun in a piece that is not full.
const FRAME_BYTES_MAX: usize = FRAME_HEADER_BYTES + FRAME_PLAIN_MAX + TAG_BYTES;

/// Memory of sent batches, kept for the next ones: fresh memory costs a page fault per 4 KiB, which is a fifth of the time
/// that sealing takes. Pieces come back from whichever thread drops the last reference.
#[derive(Clone)]
pub struct SegmentPool(Arc<ArrayQueue<Vec<u8>>>);

impl SegmentPool {
    /// Keeps up to `bytes` bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let pieces = usize::try_from(bytes / SEGMENT_BYTES as u64).unwrap_or(usize::MAX).clamp(1, 1 << 12);
        Self(Arc::new(ArrayQueue::new(pieces)))
    }

    fn take(&self) -> Vec<u8> {
        self.0.pop().unwrap_or_else(|| Vec::with_capacity(SEGMENT_BYTES + FRAME_BYTES_MAX))
    }

    fn freeze(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Pooled { bytes, pool: self.clone() })
    }
}

struct Pooled {
    bytes: Vec<u8>,
    pool: SegmentPool,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        // Full: the memory is let go.
        let _ = self.pool.0.push(bytes);
    }
}

/// A batch as it goes to the target.
#[derive(Clone, Debug)]
pub struct SealedBatch {
    /// Pieces, back to back.
    pub pieces: Vec<Bytes>,
    /// Bytes of all pieces.
    pub len: u64,
    /// Bytes that went into data frames.
    pub plain_bytes: u64,
    /// Bytes of data frames, headers and tags included.
    pub frame_bytes: u64,
    /// Bytes of chunks not sent because the batch or the target has them.
    pub deduplicated_bytes: u64,
    /// Some record names a content by reference, so the batch is good only while its lease is.
    pub has_references: bool,
}

/// Compresses and seals on one thread.
pub struct Sealer {
    pool: SegmentPool,
    compressor: Option<Compressor>,
}

impl Sealer {
    /// Takes memory from `pool`.
    #[must_use]
    pub fn new(pool: SegmentPool) -> Self {
        Self { pool, compressor: None }
    }

    /// Seals a planned batch. `level` is for data frames and the record list.
    ///
    /// # Errors
    /// A limit of the format.
    pub fn seal<P: Deref<Target = [u8]>>(
        &mut self,
        builder: &BatchBuilder<'_>,
        annotations: &Annotations,
        raw: &RawBatch<P>,
        set: &RecordSet,
        plan: &PackPlan,
        level: Level,
    ) -> ProtoResult<SealedBatch> {
        let key = builder.host_key.frame_key(&builder.salt);
        let mut pieces = vec![Bytes::new()];
        let small = usize::try_from(plan.plain_bytes).unwrap_or(usize::MAX) <= SEGMENT_BYTES / 4;
        let mut segment = if small { Vec::new() } else { self.pool.take() };
        let mut frame_bytes = 0;
        for (number, planned) in (1u32..).zip(&plan.frames) {
            let start = frame::begin(&mut segment);
            gather(raw, set, plan, planned, &mut segment);
            let compressor = match level {
                Some(level) if !looks_random(&segment[start + FRAME_HEADER_BYTES..]) => Some(self.compressor(level)?),
                Some(_) | None => None,
            };
            key.seal_begun(number, start, compressor, |_| &[], &mut segment)?;
            frame_bytes += (segment.len() - start) as u64;
            if segment.len() >= SEGMENT_BYTES {
                pieces.push(self.pool.freeze(std::mem::replace(&mut segment, self.pool.take())));
            }
        }
        if small {
            pieces.push(Bytes::from(segment));
        } else {
            pieces.push(self.pool.freeze(segment));
        }
        let frames = u32::try_from(plan.frames.len()).expect("no more frames than records");
        let mut head = Vec::new();
        let compressor = match level {
            Some(level) => Some(self.compressor(level)?),
            None => None,
        };
        builder.finish(&set.records, annotations, frames, frame_bytes, compressor, &mut head)?;
        let len = head.len() as u64 + frame_bytes;
        pieces[0] = Bytes::from(head);
        pieces.retain(|piece| !piece.is_empty());
        Ok(SealedBatch {
            pieces,
            len,
            plain_bytes: plan.plain_bytes,
            frame_bytes,
            deduplicated_bytes: plan.repeated_bytes + plan.referenced_bytes,
            has_references: plan.referenced_bytes > 0,
        })
    }

    fn compressor(&mut self, level: i32) -> ProtoResult<&mut Compressor> {
        let mut compressor = match self.compressor.take() {
            Some(compressor) => compressor,
            None => Compressor::new(level)?,
        };
        compressor.set_level(level)?;
        Ok(self.compressor.insert(compressor))
    }
}

/// The one copy of the payload: from the ring's cells into the frame.
fn gather<P: Deref<Target = [u8]>>(
    raw: &RawBatch<P>,
    set: &RecordSet,
    plan: &PackPlan,
    frame: &FramePlan,
    out: &mut Vec<u8>,
) {
    for record in &plan.chunks[frame.first as usize..(frame.first + frame.count) as usize] {
        let bytes = set.bytes(raw, *record as usize).expect("hashed from the same bytes");
        out.extend_from_slice(bytes);
    }
}
