//! Bytes of a journal segment. Byte table: `docs/formats/segment.md`.
//!
//! ```text
//! header and opening state | entry | entry | … | footer: index run, point rows, summary | trailer (last 4096 bytes)
//! ```
//! Everything begins at a multiple of 4096; what lies between parts is zero. A segment without a trailer is the active one.

use farshore_proto::batch::{BATCH_HEADER_BYTES, BatchHeader};
use farshore_proto::frame::{FRAME_HEADER_BYTES, FRAME_PLAIN_MAX, FrameHeader, LIST_PLAIN_MAX};
use farshore_proto::{
    BatchNo, ChainHash, Generation, GroupId, HostId, Incarnation, Name, PointId, Position, VaultId, VolumeIndex,
    WallTime, codec,
};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::group::{ChunkPlace, StreamId};
use crate::points::{Point, StreamState};

/// Alignment of every part: a page, which is also the largest logical block.
pub const ALIGN: usize = 4096;
/// Bytes at which a segment is closed: entries do not begin where they would end behind it (the first always fits).
pub const SEGMENT_BYTES: u64 = 128 << 20;
/// Index entries at which a segment is closed, which bounds the memory of the active one's index.
pub const SEGMENT_ENTRIES_MAX: usize = 1 << 20;
/// Bytes of a segment's header, before the opening state.
pub const SEGMENT_HEADER_BYTES: usize = 128;
/// Bytes of an entry's header.
pub const ENTRY_HEADER_BYTES: usize = 128;
/// Bytes of a resolved reference.
pub const REFERENCE_BYTES: usize = 16;
/// Bytes of a point row.
pub const POINT_ROW_BYTES: usize = 192;
/// Most bytes of an opening state or a summary: a group of [`VOLUMES_MAX`] volumes stays far below.
pub const STATE_BYTES_MAX: usize = codec::ENCODED_BYTES_MAX;
/// Most volumes of a group.
pub const VOLUMES_MAX: usize = 1024;

const MAGIC_SEGMENT: [u8; 8] = *b"FSSEGMT1";
const MAGIC_ENTRY: [u8; 8] = *b"FSENTRY1";
const MAGIC_TRAILER: [u8; 8] = *b"FSSEGEND";
const VERSION: u16 = 1;

/// Why stored bytes are not taken.
pub type Fault = String;

/// Checksum of every part.
#[must_use]
pub fn crc(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The next multiple of [`ALIGN`].
#[must_use]
pub const fn aligned(len: u64) -> u64 {
    len.next_multiple_of(ALIGN as u64)
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Whole words first: the compiler turns this into wide compares.
    let mut words = bytes.chunks_exact(64);
    words.all(|word| word.iter().fold(0, |all, byte| all | byte) == 0)
        && words.remainder().iter().all(|byte| *byte == 0)
}

/// Header of a segment.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct SegmentHeader {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    number: U32,
    vault: [u8; 16],
    group: [u8; 16],
    host: [u8; 16],
    created: U64,
    data_start: U32,
    state_len: U32,
    state_crc: U32,
    spare: [u8; 40],
    crc: U32,
}

const _: () = assert!(size_of::<SegmentHeader>() == SEGMENT_HEADER_BYTES);

/// A segment's beginning, read.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Segment's number.
    pub number: u32,
    /// First byte of the first entry.
    pub data_start: u64,
    /// State of the stream before the first entry.
    pub state: StreamState,
    /// Target's clock when the file was made.
    pub created: WallTime,
}

/// Bytes of a new segment's beginning, padded.
#[must_use]
pub fn encode_opening(id: &StreamId, number: u32, created: WallTime, state: &StreamState) -> Vec<u8> {
    let blob = codec::encode("segment state", state).expect("a stream's state is bounded by its number of volumes");
    let data_start = aligned((SEGMENT_HEADER_BYTES + blob.len()) as u64);
    let mut header = SegmentHeader {
        magic: MAGIC_SEGMENT,
        version: VERSION.into(),
        reserved: U16::ZERO,
        number: number.into(),
        vault: id.vault.0,
        group: id.group.0,
        host: id.host.0,
        created: created.0.into(),
        data_start: u32::try_from(data_start).expect("a state is at most 1 MiB").into(),
        state_len: u32::try_from(blob.len()).expect("a state is at most 1 MiB").into(),
        state_crc: crc(&blob).into(),
        spare: [0; 40],
        crc: U32::ZERO,
    };
    header.crc = crc(&header.as_bytes()[..SEGMENT_HEADER_BYTES - 4]).into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&blob);
    bytes.resize(usize::try_from(data_start).expect("a state is at most 1 MiB"), 0);
    bytes
}

/// Who a segment says that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Trust domain.
    pub vault: VaultId,
    /// Group.
    pub group: GroupId,
    /// Host.
    pub host: HostId,
}

impl Owner {
    /// That of a stream.
    #[must_use]
    pub fn of(id: &StreamId) -> Self {
        Self { vault: id.vault, group: id.group, host: id.host }
    }
}

/// Parses a segment's beginning; `bytes` start with the file and hold at least the opening state.
///
/// # Errors
/// What is wrong with it.
pub fn parse_opening(bytes: &[u8]) -> Result<(Owner, Opening), Fault> {
    let (header, rest) = SegmentHeader::read_from_prefix(bytes).map_err(|_| "too short for a header".to_owned())?;
    if header.magic != MAGIC_SEGMENT {
        return Err("not a segment (magic number differs)".into());
    }
    if crc(&bytes[..SEGMENT_HEADER_BYTES - 4]) != header.crc.get() {
        return Err("checksum of the segment header differs".into());
    }
    if header.version.get() != VERSION {
        return Err(format!("segment of version {}, this build reads {VERSION}", header.version));
    }
    let (len, data_start) = (header.state_len.get() as usize, header.data_start.get() as usize);
    if len > STATE_BYTES_MAX || data_start != usize::try_from(aligned((SEGMENT_HEADER_BYTES + len) as u64)).unwrap_or(0)
    {
        return Err("lengths of the segment header contradict each other".into());
    }
    let blob = rest.get(..len).ok_or_else(|| "the opening state is cut off".to_owned())?;
    if crc(blob) != header.state_crc.get() {
        return Err("checksum of the opening state differs".into());
    }
    if !is_zero(rest.get(len..data_start - SEGMENT_HEADER_BYTES).unwrap_or(&[1]))
        || header.reserved.get() != 0
        || !is_zero(&header.spare)
    {
        return Err("padding behind the opening state is not zero".into());
    }
    let state = codec::decode("segment state", blob).map_err(|error| error.to_string())?;
    let owner = Owner { vault: VaultId(header.vault), group: GroupId(header.group), host: HostId(header.host) };
    let created = WallTime(header.created.get());
    Ok((owner, Opening { number: header.number.get(), data_start: data_start as u64, state, created }))
}

/// How an entry holds its batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// As received.
    Whole,
    /// Without the frames that only never-joined volumes needed; their content is in the bases.
    Stripped,
}

/// Header of an entry.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct EntryHeader {
    magic: [u8; 8],
    version: U16,
    form: U16,
    data_offset: U32,
    segment: U32,
    sequence: U32,
    payload_len: U32,
    payload_crc: U32,
    reference_count: U32,
    reference_crc: U32,
    total_len: U32,
    generation: U32,
    synced: U64,
    batch: U64,
    incarnation: U64,
    received: U64,
    chain: [u8; 32],
    spare: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<EntryHeader>() == ENTRY_HEADER_BYTES);

/// What an entry's header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// How it holds the batch.
    pub form: Form,
    /// First byte of the batch, from the entry's start: 128 for one that fits the first page, else 4096.
    pub data_offset: u32,
    /// Segment that it was written to.
    pub segment: u32,
    /// Number within the segment, from 0.
    pub sequence: u32,
    /// Bytes of the batch.
    pub payload_len: u32,
    /// Their checksum.
    pub payload_crc: u32,
    /// Resolved references behind the batch.
    pub reference_count: u32,
    /// Their checksum.
    pub reference_crc: u32,
    /// Bytes of the segment that were known to be durable when this entry was written.
    pub synced: u64,
    /// The batch's point.
    pub point: PointId,
    /// Target's clock at the receipt.
    pub received: WallTime,
    /// The batch's chain hash.
    pub chain: ChainHash,
}

impl Entry {
    /// Bytes from the entry's start to its references.
    #[must_use]
    pub fn references_at(&self) -> u64 {
        aligned(u64::from(self.data_offset) + u64::from(self.payload_len))
    }

    /// Bytes from the entry's start to the next one's.
    #[must_use]
    pub fn total_len(&self) -> u64 {
        self.references_at() + aligned(u64::from(self.reference_count) * REFERENCE_BYTES as u64)
    }

    /// As stored.
    #[must_use]
    pub fn encode(&self) -> [u8; ENTRY_HEADER_BYTES] {
        let mut header = EntryHeader {
            magic: MAGIC_ENTRY,
            version: VERSION.into(),
            form: match self.form {
                Form::Whole => U16::new(1),
                Form::Stripped => U16::new(2),
            },
            data_offset: self.data_offset.into(),
            segment: self.segment.into(),
            sequence: self.sequence.into(),
            payload_len: self.payload_len.into(),
            payload_crc: self.payload_crc.into(),
            reference_count: self.reference_count.into(),
            reference_crc: self.reference_crc.into(),
            total_len: u32::try_from(self.total_len()).expect("an entry is far below 4 GiB").into(),
            generation: self.point.generation.0.into(),
            synced: self.synced.into(),
            batch: self.point.batch.0.into(),
            incarnation: self.point.incarnation.0.into(),
            received: self.received.0.into(),
            chain: self.chain.0,
            spare: [0; 12],
            crc: U32::ZERO,
        };
        header.crc = crc(&header.as_bytes()[..ENTRY_HEADER_BYTES - 4]).into();
        header.as_bytes().try_into().expect("the header has this length")
    }

    /// Parses an entry's header at the start of `bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let (header, _) = EntryHeader::read_from_prefix(bytes).map_err(|_| "too short for an entry".to_owned())?;
        if header.magic != MAGIC_ENTRY {
            return Err("not an entry (magic number differs)".into());
        }
        if crc(&bytes[..ENTRY_HEADER_BYTES - 4]) != header.crc.get() {
            return Err("checksum of the entry header differs".into());
        }
        if header.version.get() != VERSION || !is_zero(&header.spare) {
            return Err(format!("entry of version {}, this build reads {VERSION}", header.version));
        }
        let form = match header.form.get() {
            1 => Form::Whole,
            2 => Form::Stripped,
            other => return Err(format!("entry of form {other}")),
        };
        let entry = Self {
            form,
            data_offset: header.data_offset.get(),
            segment: header.segment.get(),
            sequence: header.sequence.get(),
            payload_len: header.payload_len.get(),
            payload_crc: header.payload_crc.get(),
            reference_count: header.reference_count.get(),
            reference_crc: header.reference_crc.get(),
            synced: header.synced.get(),
            point: PointId {
                generation: Generation(header.generation.get()),
                incarnation: Incarnation(header.incarnation.get()),
                batch: BatchNo(header.batch.get()),
            },
            received: WallTime(header.received.get()),
            chain: ChainHash(header.chain),
        };
        let start_is_known = [ENTRY_HEADER_BYTES, ALIGN].contains(&(entry.data_offset as usize));
        if !start_is_known || entry.total_len() != u64::from(header.total_len.get()) {
            return Err("lengths of the entry contradict each other".into());
        }
        Ok(entry)
    }
}

/// A reference of a batch, resolved: where the content of record `record` lies.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Reference {
    record: U32,
    segment: U32,
    frame_offset: U32,
    within: U32,
}

const _: () = assert!(size_of::<Reference>() == REFERENCE_BYTES);

impl Reference {
    /// Of the record with index `record` in the list.
    #[must_use]
    pub fn new(record: u32, place: ChunkPlace) -> Self {
        Self {
            record: record.into(),
            segment: place.segment.into(),
            frame_offset: place.frame_offset.into(),
            within: place.within.into(),
        }
    }

    /// Index of the record.
    #[must_use]
    pub fn record(&self) -> u32 {
        self.record.get()
    }

    /// Where its content lies.
    #[must_use]
    pub fn place(&self) -> ChunkPlace {
        ChunkPlace { segment: self.segment.get(), frame_offset: self.frame_offset.get(), within: self.within.get() }
    }
}

/// The references behind a batch, checked.
///
/// # Errors
/// What is wrong with them.
pub fn parse_references(entry: &Entry, bytes: &[u8]) -> Result<Vec<Reference>, Fault> {
    let len = entry.reference_count as usize * REFERENCE_BYTES;
    let list = bytes.get(..len).ok_or_else(|| "the references are cut off".to_owned())?;
    if entry.reference_count > 0 && crc(list) != entry.reference_crc {
        return Err("checksum of the references differs".into());
    }
    let parse = |bytes| Reference::read_from_bytes(bytes).expect("chunks have a reference's length");
    Ok(list.chunks_exact(REFERENCE_BYTES).map(parse).collect())
}

/// Frames of a stored batch: number and byte offset of the header in the batch as stored, record list first. For both
/// forms; nothing is opened. `check`: read the sealed bytes' checksums too.
///
/// # Errors
/// What is wrong.
pub fn stored_frames(payload: &[u8], check: bool) -> Result<(BatchHeader, Vec<(u32, u32)>), Fault> {
    let header = BatchHeader::parse(payload).map_err(|error| error.to_string())?;
    let mut frames: Vec<(u32, u32)> = Vec::new();
    let mut at = BATCH_HEADER_BYTES;
    while at < payload.len() {
        let plain_max = if frames.is_empty() { LIST_PLAIN_MAX } else { FRAME_PLAIN_MAX };
        let frame = FrameHeader::parse(&payload[at..], plain_max).map_err(|error| format!("byte {at}: {error}"))?;
        let sealed = payload
            .get(at + FRAME_HEADER_BYTES..at + frame.total_len())
            .ok_or_else(|| format!("byte {at}: the frame is cut off"))?;
        if check {
            frame.check_sealed(sealed).map_err(|error| format!("byte {at}: {error}"))?;
        }
        let in_order = frames.last().map_or(frame.number() == 0, |(last, _)| frame.number() > *last);
        if !in_order || frame.number() >= header.frame_count() {
            return Err(format!("byte {at}: frame {} is out of order", frame.number()));
        }
        frames.push((frame.number(), u32::try_from(at).map_err(|_| "a batch over 4 GiB".to_owned())?));
        at += frame.total_len();
    }
    if frames.is_empty() { Err("no record list".into()) } else { Ok((header, frames)) }
}

/// One point in a footer.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct PointRow {
    batch: U64,
    incarnation: U64,
    generation: U32,
    flags: U32,
    end: U64,
    time: U64,
    received: U64,
    bytes: U64,
    chain: [u8; 32],
    entry_at: U32,
    volumes: U32,
    name_len: u8,
    name: [u8; 63],
    spare: [u8; 28],
    crc: U32,
}

const _: () = assert!(size_of::<PointRow>() == POINT_ROW_BYTES);

const ROW_RECOVERABLE: u32 = 1;
const ROW_APP: u32 = 2;

/// A point with the place of its entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedPoint {
    /// The point.
    pub point: Point,
    /// Byte of its entry in the segment.
    pub entry_at: u32,
}

/// What a footer says beside the rows.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Summary {
    /// State of the stream after the last entry.
    pub state: StreamState,
    /// The sets of volumes that the rows name by number.
    pub sets: Vec<Vec<VolumeIndex>>,
    /// Earlier segments that entries of this one refer to.
    pub refers_to: Vec<u32>,
}

/// Rows and sets of a segment's points.
#[must_use]
pub fn encode_points(points: &[PlacedPoint]) -> (Vec<u8>, Vec<Vec<VolumeIndex>>) {
    let mut sets: Vec<Vec<VolumeIndex>> = Vec::new();
    let mut bytes = Vec::with_capacity(points.len() * POINT_ROW_BYTES);
    for PlacedPoint { point, entry_at } in points {
        if sets.last().is_none_or(|last| **last != *point.volumes) {
            sets.push(point.volumes.to_vec());
        }
        let text = point.bookmark.as_ref().map_or(&b""[..], |name| name.as_str().as_bytes());
        let mut name = [0; 63];
        name[..text.len()].copy_from_slice(text);
        let flag = |on, bit| if on { bit } else { 0 };
        let mut row = PointRow {
            batch: point.id.batch.0.into(),
            incarnation: point.id.incarnation.0.into(),
            generation: point.id.generation.0.into(),
            flags: (flag(point.recoverable, ROW_RECOVERABLE) | flag(point.app_consistent, ROW_APP)).into(),
            end: point.end.0.into(),
            time: point.time.0.into(),
            received: point.received.0.into(),
            bytes: point.bytes.into(),
            chain: point.chain.0,
            entry_at: (*entry_at).into(),
            volumes: u32::try_from(sets.len() - 1).expect("one set per entry at most").into(),
            name_len: u8::try_from(text.len()).expect("names have at most 63 bytes"),
            name,
            spare: [0; 28],
            crc: U32::ZERO,
        };
        row.crc = crc(&row.as_bytes()[..POINT_ROW_BYTES - 4]).into();
        bytes.extend_from_slice(row.as_bytes());
    }
    (bytes, sets)
}

/// The opposite of [`encode_points`].
///
/// # Errors
/// What is wrong with the rows.
pub fn decode_points(bytes: &[u8], sets: &[Vec<VolumeIndex>]) -> Result<Vec<PlacedPoint>, Fault> {
    let sets: Vec<std::sync::Arc<[VolumeIndex]>> = sets.iter().map(|set| set.as_slice().into()).collect();
    let rows = bytes.chunks_exact(POINT_ROW_BYTES);
    if !rows.remainder().is_empty() {
        return Err("the point rows have an odd length".into());
    }
    rows.map(|bytes| decode_row(bytes, &sets)).collect()
}

fn decode_row(bytes: &[u8], sets: &[std::sync::Arc<[VolumeIndex]>]) -> Result<PlacedPoint, Fault> {
    let row = PointRow::read_from_bytes(bytes).map_err(|_| "a point row is cut off".to_owned())?;
    if crc(&bytes[..POINT_ROW_BYTES - 4]) != row.crc.get() || !is_zero(&row.spare) {
        return Err("checksum of a point row differs".into());
    }
    let text = row.name.get(..usize::from(row.name_len)).ok_or_else(|| "a name over 63 bytes".to_owned())?;
    let bookmark = match text {
        [] => None,
        text => Some(Name::new(String::from_utf8_lossy(text)).map_err(|error| error.to_string())?),
    };
    let volumes = sets.get(row.volumes.get() as usize).ok_or_else(|| "a point row names no known set".to_owned())?;
    let point = Point {
        id: PointId {
            generation: Generation(row.generation.get()),
            incarnation: Incarnation(row.incarnation.get()),
            batch: BatchNo(row.batch.get()),
        },
        time: WallTime(row.time.get()),
        received: WallTime(row.received.get()),
        end: Position(row.end.get()),
        chain: ChainHash(row.chain),
        recoverable: row.flags.get() & ROW_RECOVERABLE != 0,
        app_consistent: row.flags.get() & ROW_APP != 0,
        bookmark,
        volumes: volumes.clone(),
        bytes: row.bytes.get(),
    };
    Ok(PlacedPoint { point, entry_at: row.entry_at.get() })
}

/// A part of a footer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Part {
    at: U64,
    len: U64,
    crc: U32,
    spare: U32,
}

impl Part {
    /// A part with these bytes from `at`.
    #[must_use]
    pub fn of(at: u64, bytes: &[u8]) -> Self {
        Self { at: at.into(), len: (bytes.len() as u64).into(), crc: crc(bytes).into(), spare: U32::ZERO }
    }

    /// First byte in the file.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at.get()
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len.get()
    }

    /// Byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.at.get().saturating_add(self.len.get())
    }

    /// Checks its checksum.
    ///
    /// # Errors
    /// When it differs.
    pub fn check(&self, what: &str, bytes: &[u8]) -> Result<(), Fault> {
        if crc(bytes) == self.crc.get() { Ok(()) } else { Err(format!("checksum of the {what} differs")) }
    }
}

/// The last page of a sealed segment.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct Trailer {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    number: U32,
    /// The run of the index.
    pub run: Part,
    /// The point rows.
    pub points: Part,
    /// The summary.
    pub summary: Part,
    data_start: U64,
    entries_end: U64,
    first: U64,
    last: U64,
    crc: U32,
}

/// Bytes of a [`Trailer`] before its padding.
pub const TRAILER_BYTES: usize = size_of::<Trailer>();
const _: () = assert!(TRAILER_BYTES == 124);

/// Where the entries of a segment lie and which batches they hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// First byte of the first entry.
    pub data_start: u64,
    /// Byte behind the last entry.
    pub entries_end: u64,
    /// First batch.
    pub first: BatchNo,
    /// Last batch.
    pub last: BatchNo,
}

impl Trailer {
    /// Of segment `number`.
    #[must_use]
    pub fn new(number: u32, run: Part, points: Part, summary: Part, span: Span) -> Self {
        let mut trailer = Self {
            magic: MAGIC_TRAILER,
            version: VERSION.into(),
            reserved: U16::ZERO,
            number: number.into(),
            run,
            points,
            summary,
            data_start: span.data_start.into(),
            entries_end: span.entries_end.into(),
            first: span.first.0.into(),
            last: span.last.0.into(),
            crc: U32::ZERO,
        };
        trailer.crc = crc(&trailer.as_bytes()[..TRAILER_BYTES - 4]).into();
        trailer
    }

    /// Parses the last page of the file of segment `number` with `file_len` bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(page: &[u8], number: u32, file_len: u64) -> Result<Self, Fault> {
        let (trailer, rest) = Self::read_from_prefix(page).map_err(|_| "too short for a trailer".to_owned())?;
        if page.len() != ALIGN || trailer.magic != MAGIC_TRAILER {
            return Err("no trailer (magic number differs)".into());
        }
        if crc(&page[..TRAILER_BYTES - 4]) != trailer.crc.get() || !is_zero(rest) || trailer.reserved.get() != 0 {
            return Err("checksum of the trailer differs".into());
        }
        if trailer.version.get() != VERSION || trailer.number.get() != number {
            return Err(format!("trailer of segment {}, version {}", trailer.number, trailer.version));
        }
        let span = trailer.span();
        let parts = [trailer.run, trailer.points, trailer.summary];
        let ordered = span.data_start <= span.entries_end
            && span.entries_end == trailer.run.at()
            && parts.windows(2).all(|pair| pair[0].end() == pair[1].at())
            && aligned(trailer.summary.end()) + ALIGN as u64 == file_len
            && span.first <= span.last;
        if ordered { Ok(trailer) } else { Err("places in the trailer contradict each other".into()) }
    }

    /// Where the entries are.
    #[must_use]
    pub fn span(&self) -> Span {
        Span {
            data_start: self.data_start.get(),
            entries_end: self.entries_end.get(),
            first: BatchNo(self.first.get()),
            last: BatchNo(self.last.get()),
        }
    }

    /// The whole last page.
    #[must_use]
    pub fn page(&self) -> Vec<u8> {
        let mut page = self.as_bytes().to_vec();
        page.resize(ALIGN, 0);
        page
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn id() -> StreamId {
        let name = |text| Name::new(text).expect("a good name");
        StreamId::derive(VaultId([1; 16]), &name("db"), &name("host-a"))
    }

    fn state() -> StreamState {
        StreamState { generation: Generation(1), joined: vec![VolumeIndex(3)], ..StreamState::default() }
    }

    fn entry() -> Entry {
        Entry {
            form: Form::Stripped,
            data_offset: 4096,
            segment: 7,
            sequence: 9,
            payload_len: 10_000,
            payload_crc: 0x1122_3344,
            reference_count: 2,
            reference_crc: 0x5566_7788,
            synced: 8192,
            point: PointId { generation: Generation(1), incarnation: Incarnation(2), batch: BatchNo(3) },
            received: WallTime(4),
            chain: ChainHash([5; 32]),
        }
    }

    fn point() -> PlacedPoint {
        let point = Point {
            id: entry().point,
            time: WallTime(6),
            received: WallTime(7),
            end: Position(8),
            chain: ChainHash([9; 32]),
            recoverable: true,
            app_consistent: true,
            bookmark: Some(Name::new("before-upgrade").expect("a good name")),
            volumes: Arc::from([VolumeIndex(3), VolumeIndex(4)]),
            bytes: 10,
        };
        PlacedPoint { point, entry_at: 4096 }
    }

    fn trailer() -> Trailer {
        let run = Part::of(20_480, b"run");
        let points = Part::of(run.end(), b"points");
        let summary = Part::of(points.end(), b"summary");
        let span = Span { data_start: 4096, entries_end: 20_480, first: BatchNo(1), last: BatchNo(3) };
        Trailer::new(7, run, points, summary, span)
    }

    /// Goal: every part comes back, and no flipped bit in it is taken.
    #[test]
    fn parts_come_back_and_flipped_bits_do_not() {
        let opening = encode_opening(&id(), 7, WallTime(1), &state());
        let (owner, read) = parse_opening(&opening).expect("good");
        assert_eq!((owner, read.number, read.state), (Owner::of(&id()), 7, state()));
        assert_eq!(Entry::parse(&entry().encode()).expect("good"), entry());
        assert_eq!(entry().total_len(), 4096 + 12_288 + 4096);
        let (rows, sets) = encode_points(&[point(), point()]);
        assert_eq!((decode_points(&rows, &sets).expect("good"), sets.len()), (vec![point(), point()], 1));
        let page = trailer().page();
        assert_eq!(Trailer::parse(&page, 7, 28_672).expect("good").span(), trailer().span());
        assert!(Trailer::parse(&page, 8, 28_672).is_err() && Trailer::parse(&page, 7, 32_768).is_err());
        type Check = fn(&[u8]) -> bool;
        let parts: [(&[u8], Check); 4] = [
            (&opening, |bytes| parse_opening(bytes).is_ok()),
            (&entry().encode(), |bytes| Entry::parse(bytes).is_ok()),
            (&rows, |bytes| decode_points(bytes, &[vec![VolumeIndex(3), VolumeIndex(4)]]).is_ok()),
            (&page, |bytes| Trailer::parse(bytes, 7, 28_672).is_ok()),
        ];
        for (bytes, is_taken) in parts {
            for at in 0..bytes.len() {
                let mut bad = bytes.to_vec();
                bad[at] ^= 1 << (at % 8);
                assert!(!is_taken(&bad), "byte {at} of {}", bytes.len());
                assert!(!is_taken(&bytes[..at]) || at % POINT_ROW_BYTES == 0, "cut at {at}");
            }
        }
    }

    /// Goal: the format does not change by accident. A change of these hashes is a new version with a reader for this one.
    #[test]
    fn golden_bytes_of_version_1() {
        let golden = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
        let parts = [
            golden(&encode_opening(&id(), 7, WallTime(1), &state())),
            golden(&entry().encode()),
            golden(&encode_points(&[point()]).0),
            golden(&trailer().page()),
        ];
        assert_eq!(parts, ["47b173ef4a26efa9", "4b9b2148983af00d", "e283921f46f51445", "b756528337907f6a"]);
    }
}
