//! Recovery points of one stream, in memory: made by ingest, rebuilt at start from the segments' footers.

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore_proto::batch::{BatchHeader, VolumeDecl};
use farshore_proto::message::Tail;
use farshore_proto::record::{Kind, Mark, Record};
use farshore_proto::{BatchNo, ChainHash, Generation, LogMark, Name, PointId, Position, VolumeIndex, WallTime};

/// The state at one cut.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Point {
    /// Its id.
    pub id: PointId,
    /// Source's clock, read before the cut; clamped so that it never runs backwards along the stream.
    pub time: WallTime,
    /// Target's clock at the receipt; what retention goes by.
    pub received: WallTime,
    /// Ring position after the cut.
    pub end: Position,
    /// Chain hash of the batch.
    pub chain: ChainHash,
    /// A state that can be recovered to.
    pub recoverable: bool,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
    /// Its name.
    pub bookmark: Option<Name>,
    /// The volumes it includes.
    pub volumes: Arc<[VolumeIndex]>,
    /// Bytes that the batch takes in the journal.
    pub bytes: u64,
}

/// What ingest must remember of a stream from batch to batch. Stored in every segment's header and footer, so that a
/// segment explains itself when those before it are gone.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct StreamState {
    /// Line of history; 0: nothing yet.
    pub generation: Generation,
    /// Last batch.
    pub tail: Option<Tail>,
    /// An event is open: no cut is recoverable.
    pub event_open: bool,
    /// Time of the last point: the clamp.
    pub time: WallTime,
    /// Receive time of the last batch: it never runs backwards either.
    pub received: WallTime,
    /// Volumes that points include.
    pub joined: Vec<VolumeIndex>,
    /// Volumes that were included once: their records are journaled for ever after, else history would be overwritten.
    pub journaled: Vec<VolumeIndex>,
    /// The volumes as the source declared them last.
    pub volumes: Vec<VolumeDecl>,
    /// Where the source's activity log was by the last batch.
    pub log: HeardLog,
}

/// Where a source's activity log was by a batch's header. Not among what segments keep of a stream's state: it is read from the headers
/// of what is journaled in the newest segment. Where that holds no batch yet, nothing is known, and a source that asks compares everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HeardLog(pub Option<LogMark>);

impl bincode::Encode for HeardLog {
    fn encode<E: bincode::enc::Encoder>(&self, _: &mut E) -> Result<(), bincode::error::EncodeError> {
        Ok(())
    }
}

impl<C> bincode::Decode<C> for HeardLog {
    fn decode<D: bincode::de::Decoder<Context = C>>(_: &mut D) -> Result<Self, bincode::error::DecodeError> {
        Ok(Self::default())
    }
}

bincode::impl_borrow_decode!(HeardLog);

impl StreamState {
    /// Applies the records of a batch that change what points are.
    pub fn apply_marks(&mut self, records: &[Record]) {
        for record in records {
            self.apply_mark(record.kind(), record.volume());
        }
    }

    /// Applies one record's kind.
    pub fn apply_mark(&mut self, kind: Kind, volume: VolumeIndex) {
        match kind.mark() {
            Some(Mark::Event { open }) => self.event_open = open,
            Some(Mark::Volume { joined: true }) => {
                insert(&mut self.joined, volume);
                insert(&mut self.journaled, volume);
            }
            Some(Mark::Volume { joined: false }) => self.joined.retain(|joined| *joined != volume),
            None => {}
        }
    }

    /// The batch is journaled: moves the tail and makes its point. Call after [`Self::apply_marks`].
    pub fn finish(&mut self, header: &BatchHeader, bookmark: Option<Name>, received: WallTime, bytes: u64) -> Point {
        let place = header.place();
        self.generation = place.generation;
        self.time = self.time.max(place.time);
        self.received = self.received.max(received);
        self.log = HeardLog(header.log());
        self.tail =
            Some(Tail { incarnation: place.incarnation, number: place.number, chain: header.chain(), end: place.end });
        Point {
            id: place.point(),
            time: self.time,
            received: self.received,
            end: place.end,
            chain: header.chain(),
            recoverable: header.cut().recoverable && !self.event_open && !self.joined.is_empty(),
            app_consistent: header.cut().app_consistent,
            bookmark,
            volumes: self.joined.as_slice().into(),
            bytes,
        }
    }

    /// Whether the volume's records go to the journal.
    #[must_use]
    pub fn is_journaled(&self, volume: VolumeIndex) -> bool {
        self.journaled.binary_search(&volume).is_ok()
    }
}

fn insert(list: &mut Vec<VolumeIndex>, volume: VolumeIndex) {
    if let Err(place) = list.binary_search(&volume) {
        list.insert(place, volume);
    }
}

/// The points of one stream, by batch number (which never restarts).
#[derive(Clone, Debug, Default)]
pub struct Points {
    by_batch: BTreeMap<BatchNo, Point>,
}

impl Points {
    /// Adds the newest. Volume sets that equal the one before share its memory.
    pub(crate) fn push(&mut self, mut point: Point) {
        if let Some((_, last)) = self.by_batch.last_key_value()
            && last.volumes == point.volumes
        {
            point.volumes = Arc::clone(&last.volumes);
        }
        self.by_batch.insert(point.id.batch, point);
    }

    /// The point with this id.
    #[must_use]
    pub fn get(&self, id: &PointId) -> Option<Point> {
        self.by_batch.get(&id.batch).filter(|point| point.id == *id).cloned()
    }

    /// The point at the end of this batch.
    #[must_use]
    pub fn at_batch(&self, batch: BatchNo) -> Option<&Point> {
        self.by_batch.get(&batch)
    }

    /// All, oldest first; recoverable or not.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Point> {
        self.by_batch.values()
    }

    /// Recoverable ones, oldest first.
    pub fn recoverable(&self) -> impl DoubleEndedIterator<Item = &Point> {
        self.by_batch.values().filter(|point| point.recoverable)
    }

    /// The newest recoverable one.
    #[must_use]
    pub fn newest(&self) -> Option<&Point> {
        self.recoverable().next_back()
    }

    /// The newest recoverable application-consistent one.
    #[must_use]
    pub fn newest_app(&self) -> Option<&Point> {
        self.recoverable().rfind(|point| point.app_consistent)
    }

    /// The newest recoverable one with this name.
    #[must_use]
    pub fn bookmark(&self, name: &Name) -> Option<&Point> {
        self.recoverable().rfind(|point| point.bookmark.as_ref() == Some(name))
    }

    /// The newest recoverable one not after `time` (source's clock).
    #[must_use]
    pub fn at_time(&self, time: WallTime) -> Option<&Point> {
        self.recoverable().rfind(|point| point.time <= time)
    }

    /// Points held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_batch.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_batch.is_empty()
    }

    /// Drops those for which `keep` is false. The newest recoverable one stays in any case.
    pub fn retain(&mut self, mut keep: impl FnMut(&Point) -> bool) {
        let newest = self.newest().map(|point| point.id.batch);
        self.by_batch.retain(|batch, point| Some(*batch) == newest || keep(point));
    }
}
