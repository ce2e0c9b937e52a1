//! Hash: ids of chunks. A chunk of zeroes becomes a record of zeroes, which has none.

use std::ops::Deref;

use farshore_proto::keys::DedupKey;
use farshore_proto::record::{Kind, Record};
use farshore_proto::{ChunkId, Error as ProtoError, Result as ProtoResult};

use crate::coalesce::{Origin, RecordSet};
use crate::drain::RawBatch;

/// Gives every record of a batch its id.
pub struct Hasher {
    key: DedupKey,
    /// Records with content, of the batch at hand.
    chunks: Vec<usize>,
}

impl Hasher {
    /// With the key of the dedup domain.
    #[must_use]
    pub fn new(key: DedupKey) -> Self {
        Self { key, chunks: Vec::new() }
    }

    /// Sets ids; turns chunks of zeroes into records of zeroes.
    ///
    /// # Errors
    /// A record whose bytes are not in the ring: a probe without its hash.
    pub fn hash<P: Deref<Target = [u8]>>(&mut self, raw: &RawBatch<P>, set: &mut RecordSet) -> ProtoResult<()> {
        self.chunks.clear();
        for index in 0..set.records.len() {
            let record = set.records[index];
            if record.kind().has_chunk() {
                let bytes = set.bytes(raw, index).ok_or_else(|| lacks_bytes("chunk"))?;
                if is_zero(bytes) {
                    set.records[index] = zeroed(&record);
                    set.origins[index] = Origin::NONE;
                } else {
                    self.chunks.push(index);
                }
            } else if record.kind() == Kind::Probe {
                set.records[index] = record.with_id(self.probe_id(raw, set, index)?);
                set.origins[index] = Origin::NONE;
            }
        }
        self.hash_chunks(raw, set);
        Ok(())
    }

    fn hash_chunks<P: Deref<Target = [u8]>>(&self, raw: &RawBatch<P>, set: &mut RecordSet) {
        // Taken apart: ids are set while other records' bytes are still looked up.
        let mut records = std::mem::take(&mut set.records);
        let contents = self.chunks.iter().map(|index| {
            let len = usize::try_from(records[*index].len_bytes()).expect("a chunk is at most one slot");
            set.bytes_at(raw, *index, len).expect("looked up above")
        });
        let contents: Vec<&[u8]> = contents.collect();
        self.key.chunk_ids(contents, |at, id| {
            let record = &mut records[self.chunks[at]];
            *record = record.with_id(id);
        });
        set.records = records;
    }

    /// A probe's cell holds either the slot's id (32 bytes) or its content.
    fn probe_id<P: Deref<Target = [u8]>>(
        &self,
        raw: &RawBatch<P>,
        set: &RecordSet,
        index: usize,
    ) -> ProtoResult<ChunkId> {
        let payload = raw.entries.get(set.origins[index].entry as usize).and_then(|entry| entry.payload.as_deref());
        match payload {
            Some(bytes) if bytes.len() as u64 == set.records[index].len_bytes() => Ok(self.key.chunk_id(bytes)),
            Some(bytes) => bytes.try_into().map(ChunkId).map_err(|_| lacks_bytes("probe")),
            None => Err(lacks_bytes("probe")),
        }
    }
}

fn zeroed(record: &Record) -> Record {
    let kind = if record.kind() == Kind::Write { Kind::WriteZeroes } else { Kind::SyncZero };
    Record::new(kind, record.volume(), record.position(), record.start(), record.sectors())
}

fn lacks_bytes(what: &'static str) -> ProtoError {
    ProtoError::Malformed { what, reason: "the ring's cell holds other bytes than the range needs".into() }
}

/// All bytes are zero. Leaves at the first block that is not, which is nearly always the first one.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |or, byte| or | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}
