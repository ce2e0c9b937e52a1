//! Work that a pool does: coalesce, chunk and hash; then pack, compress and seal.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::batch::{Annotations, BatchBuilder, BatchPlace, CutFlags};
use farshore_proto::keys::HostKey;
use farshore_proto::{ChainHash, Error as ProtoError, GroupId, LogMark, Result as ProtoResult};

use crate::coalesce::{Coalescer, Granularity, RecordSet};
use crate::dedup::LeaseSet;
use crate::drain::RawBatch;
use crate::hash::Hasher;
use crate::pack::{PackPlan, Packer};
use crate::seal::{Level, SealedBatch, Sealer, SegmentPool};

/// Names one piece of work: which attempt at the stream, and which batch of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorkId {
    /// Rises whenever the machine starts over from the ring; work of an older one is thrown away.
    pub epoch: u64,
    /// Batch's number.
    pub number: u64,
}

/// One piece of work.
#[derive(Debug)]
pub enum Work<P> {
    /// Make the record list.
    List {
        /// Which.
        id: WorkId,
        /// From the ring.
        raw: Box<RawBatch<P>>,
        /// Memory to make it in.
        set: RecordSet,
        /// What makes a point.
        granularity: Granularity,
    },
    /// Make the bytes.
    Seal {
        /// Which.
        id: WorkId,
        /// From the ring.
        raw: Box<RawBatch<P>>,
        /// Its records.
        set: RecordSet,
        /// All that the header says.
        order: Box<SealOrder>,
    },
}

/// What a batch is sealed with.
#[derive(Debug)]
pub struct SealOrder {
    /// Stream and place.
    pub place: BatchPlace,
    /// Facts about the cut.
    pub cut: CutFlags,
    /// Chain hash of the predecessor.
    pub previous: ChainHash,
    /// Its own.
    pub chain: ChainHash,
    /// Fresh random bytes.
    pub fresh: [u8; 32],
    /// What else the batch says.
    pub annotations: Annotations,
    /// Contents that may be referred to.
    pub lease: Option<Arc<LeaseSet>>,
    /// Session that granted them.
    pub session: u64,
    /// How hard to compress.
    pub level: Level,
    /// Where the source's activity log is.
    pub log: Option<LogMark>,
}

/// A piece of work, done. Carries the memory back.
#[derive(Debug)]
pub struct Done<P> {
    /// Which.
    pub id: WorkId,
    /// From the ring.
    pub raw: Box<RawBatch<P>>,
    /// Its records.
    pub set: RecordSet,
    /// What came of it.
    pub result: DoneResult,
    /// Time that a worker was at it. The pool fills it in.
    pub busy: Duration,
    /// Part of it in which the worker stood in line for a processor. The pool fills it in.
    pub starved: Duration,
}

/// What came of a piece of work.
#[derive(Debug)]
pub enum DoneResult {
    /// The list is made.
    Listed,
    /// The bytes are made.
    Sealed {
        /// The bytes.
        batch: SealedBatch,
        /// Session whose lease it used.
        session: u64,
    },
    /// The format refuses it; doing it again would not help.
    Failed(ProtoError),
}

/// Everything that work needs; one per worker thread.
pub struct Worker {
    host_key: HostKey,
    coalescer: Coalescer,
    hasher: Hasher,
    packer: Packer,
    plan: PackPlan,
    sealer: Sealer,
}

impl Worker {
    /// For one group's stream under one host's key.
    #[must_use]
    pub fn new(host_key: HostKey, group: GroupId, pool: SegmentPool) -> Self {
        let hasher = Hasher::new(host_key.dedup_key(group));
        Self {
            host_key,
            coalescer: Coalescer::default(),
            hasher,
            packer: Packer::default(),
            plan: PackPlan::default(),
            sealer: Sealer::new(pool),
        }
    }

    /// Does a piece of work.
    pub fn run<P: Deref<Target = [u8]>>(&mut self, work: Work<P>) -> Done<P> {
        match work {
            Work::List { id, raw, mut set, granularity } => {
                let result = self.list(&raw, granularity, &mut set);
                let result = result.map_or_else(DoneResult::Failed, |()| DoneResult::Listed);
                Done { id, raw, set, result, busy: Duration::ZERO, starved: Duration::ZERO }
            }
            Work::Seal { id, raw, mut set, order } => {
                let result = self.seal(&raw, &mut set, &order);
                let session = order.session;
                let result = result.map_or_else(DoneResult::Failed, |batch| DoneResult::Sealed { batch, session });
                Done { id, raw, set, result, busy: Duration::ZERO, starved: Duration::ZERO }
            }
        }
    }

    /// Coalesces, chunks and hashes.
    ///
    /// # Errors
    /// A cell with other bytes than its range needs.
    pub fn list<P: Deref<Target = [u8]>>(
        &mut self,
        raw: &RawBatch<P>,
        granularity: Granularity,
        set: &mut RecordSet,
    ) -> ProtoResult<()> {
        self.coalescer.coalesce(raw, granularity, set);
        self.hasher.hash(raw, set)
    }

    /// Packs, compresses and seals.
    ///
    /// # Errors
    /// A limit of the format.
    pub fn seal<P: Deref<Target = [u8]>>(
        &mut self,
        raw: &RawBatch<P>,
        set: &mut RecordSet,
        order: &SealOrder,
    ) -> ProtoResult<SealedBatch> {
        self.packer.plan(order.place.number, raw, set, order.lease.as_deref(), &mut self.plan);
        let place = order.place;
        let builder = BatchBuilder {
            place,
            cut: order.cut,
            previous: order.previous,
            chain: order.chain,
            salt: self.host_key.salt(&order.fresh, place.incarnation, place.number.0, &order.chain),
            host_key: &self.host_key,
            raw_bytes: raw.written_bytes,
            log: order.log,
        };
        self.sealer.seal(&builder, &order.annotations, raw, set, &self.plan, order.level)
    }
}
