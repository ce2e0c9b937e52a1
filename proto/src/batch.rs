//! Batches: what lies between two cuts, the unit of shipping and journaling. Byte table: `docs/formats/batch.md`.
//!
//! ```text
//! header (320) | frame 0: record list and annotations | frame 1 … n−1: packed chunks
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::{self, Compressor, FRAME_HEADER_BYTES, FRAME_PLAIN_MAX, FrameHeader, LIST_PLAIN_MAX};
use crate::keys::HostKey;
use crate::record::{RECORD_BYTES, Record};
use crate::{
    BatchNo, ChainHash, Error, Generation, GroupId, HostId, Incarnation, KeyEpoch, LogMark, Name, PointId, Position,
    Result, VaultId, VolumeIndex, WallTime, codec,
};

/// Bytes of a [`BatchHeader`].
pub const BATCH_HEADER_BYTES: usize = 320;
/// Longest batch, header included: what a receiver must be ready to hold. A source cuts far below it (16 MiB of payload
/// by default); the rest is room for incompressible data and long record lists.
pub const BATCH_BYTES_MAX: usize = 64 << 20;
/// Most records of a batch.
pub const BATCH_RECORDS_MAX: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"FSBATCH1";
const VERSION: u16 = 1;
const WHAT: &str = "batch header";

/// Facts about the cut that ends a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CutFlags {
    /// The state at the cut can be recovered to: no event was open.
    pub recoverable: bool,
    /// File systems were frozen at the cut.
    pub app_consistent: bool,
}

/// The fixed header of a batch; all of it but the checksum is associated data of the record list.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
pub struct BatchHeader {
    magic: [u8; 8],
    version: U16,
    header_len: U16,
    flags: U32,
    vault: [u8; 16],
    group: [u8; 16],
    host: [u8; 16],
    generation: U32,
    key_epoch: U32,
    incarnation: U64,
    number: U64,
    first_position: U64,
    end_position: U64,
    time: U64,
    frame_count: U32,
    record_count: U32,
    body_len: U64,
    raw_bytes: U64,
    activity_log: U64,
    previous: [u8; 32],
    chain: [u8; 32],
    salt: [u8; 32],
    activity_session: U64,
    reserved: [u8; 68],
    crc: U32,
}

const _: () = assert!(size_of::<BatchHeader>() == BATCH_HEADER_BYTES);
const _: () = assert!(core::mem::offset_of!(BatchHeader, previous) == 144);
const _: () = assert!(core::mem::offset_of!(BatchHeader, crc) == 316);

const FLAG_RECOVERABLE: u32 = 1;
const FLAG_APP: u32 = 2;

/// Which stream a batch belongs to, and its place in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchPlace {
    /// Trust domain.
    pub vault: VaultId,
    /// Group of volumes.
    pub group: GroupId,
    /// Host whose ring it comes from.
    pub host: HostId,
    /// Line of history.
    pub generation: Generation,
    /// Life of the ring.
    pub incarnation: Incarnation,
    /// Number in the stream.
    pub number: BatchNo,
    /// First ring position it covers.
    pub first: Position,
    /// Ring position after its cut.
    pub end: Position,
    /// Source clock, read before the cut was claimed.
    pub time: WallTime,
}

impl BatchPlace {
    /// The recovery point at the batch's end.
    #[must_use]
    pub fn point(&self) -> PointId {
        PointId { generation: self.generation, incarnation: self.incarnation, batch: self.number }
    }

    /// Hash that chains the batch with this place and these records to its predecessor (I6).
    #[must_use]
    pub fn chain(&self, previous: &ChainHash, records: &[Record]) -> ChainHash {
        let mut hasher = blake3::Hasher::new_derive_key("farshore 2026-11 chain v1");
        hasher.update(&previous.0).update(&self.vault.0).update(&self.group.0).update(&self.host.0);
        hasher.update(&self.generation.0.to_le_bytes()).update(&self.incarnation.0.to_le_bytes());
        for word in [self.number.0, self.first.0, self.end.0, self.time.0, records.len() as u64] {
            hasher.update(&word.to_le_bytes());
        }
        for record in records {
            hasher.update(record.chained());
        }
        ChainHash(*hasher.finalize().as_bytes())
    }
}

impl BatchHeader {
    /// Parses and checks the header at the start of `bytes`.
    ///
    /// # Errors
    /// Truncation, magic, checksum, version, or a field out of range.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Ok((header, _)) = Self::read_from_prefix(bytes) else {
            return Err(Error::truncated(WHAT, BATCH_HEADER_BYTES, bytes.len()));
        };
        if header.magic != MAGIC {
            return Err(Error::Magic { what: WHAT });
        }
        let computed = crc_fast::crc32_iscsi(&bytes[..BATCH_HEADER_BYTES - 4]);
        if computed != header.crc.get() {
            return Err(Error::Checksum { what: WHAT, stored: header.crc.get(), computed });
        }
        if header.version.get() != VERSION {
            return Err(Error::Version { what: WHAT, found: header.version.get(), known: VERSION });
        }
        header.check_ranges()?;
        Ok(header)
    }

    fn check_ranges(&self) -> Result<()> {
        let range = |field, value, allowed| Err(Error::Range { what: WHAT, field, value, allowed });
        if usize::from(self.header_len.get()) != BATCH_HEADER_BYTES {
            return range("header length", self.header_len.get().into(), "320");
        }
        if self.flags.get() & !(FLAG_RECOVERABLE | FLAG_APP) != 0 || self.reserved.iter().any(|byte| *byte != 0) {
            return range("flags", self.flags.get().into(), "known bits, reserved bytes zero");
        }
        if self.body_len.get() > (BATCH_BYTES_MAX - BATCH_HEADER_BYTES) as u64 {
            return range("body length", self.body_len.get(), "64 MiB less the header");
        }
        if self.record_count.get() as usize > BATCH_RECORDS_MAX {
            return range("record count", self.record_count.get().into(), "up to 2^20");
        }
        let frames = u64::from(self.frame_count.get());
        if frames == 0 || frames * FRAME_HEADER_BYTES as u64 > self.body_len.get() {
            return range("frame count", frames, "1 and up, within the body");
        }
        if self.number.get() == 0 || self.incarnation.get() == 0 || self.generation.get() == 0 {
            return range("number", self.number.get(), "number, incarnation and generation from 1");
        }
        if self.end_position.get() <= self.first_position.get() {
            return range("end position", self.end_position.get(), "after the first position");
        }
        Ok(())
    }

    /// Stream and place.
    #[must_use]
    pub fn place(&self) -> BatchPlace {
        BatchPlace {
            vault: VaultId(self.vault),
            group: GroupId(self.group),
            host: HostId(self.host),
            generation: Generation(self.generation.get()),
            incarnation: Incarnation(self.incarnation.get()),
            number: BatchNo(self.number.get()),
            first: Position(self.first_position.get()),
            end: Position(self.end_position.get()),
            time: WallTime(self.time.get()),
        }
    }

    /// Facts about the cut.
    #[must_use]
    pub fn cut(&self) -> CutFlags {
        let flags = self.flags.get();
        CutFlags { recoverable: flags & FLAG_RECOVERABLE != 0, app_consistent: flags & FLAG_APP != 0 }
    }

    /// Chain hash of the predecessor (zeroes for the first batch).
    #[must_use]
    pub fn previous(&self) -> ChainHash {
        ChainHash(self.previous)
    }

    /// Chain hash of this batch.
    #[must_use]
    pub fn chain(&self) -> ChainHash {
        ChainHash(self.chain)
    }

    /// Epoch of the key that seals it.
    #[must_use]
    pub fn key_epoch(&self) -> KeyEpoch {
        KeyEpoch(self.key_epoch.get())
    }

    /// Frames, the record list included.
    #[must_use]
    pub fn frame_count(&self) -> u32 {
        self.frame_count.get()
    }

    /// Records in the list.
    #[must_use]
    pub fn record_count(&self) -> usize {
        self.record_count.get() as usize
    }

    /// Header and body in bytes.
    #[must_use]
    pub fn total_len(&self) -> usize {
        BATCH_HEADER_BYTES + usize::try_from(self.body_len.get()).expect("checked against the batch limit")
    }

    /// Bytes that guests wrote, before coalescing; for figures only.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes.get()
    }

    /// Where the source's activity log was when the batch was made, so behind every write in it.
    #[must_use]
    pub fn log(&self) -> Option<LogMark> {
        LogMark { session: self.activity_session.get(), number: self.activity_log.get() }.known()
    }

    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[..BATCH_HEADER_BYTES - 4]
    }
}

/// What a batch says beside its records. Not part of the chain hash: it may differ between two sendings of one batch.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Annotations {
    /// Name of the point at the end.
    pub bookmark: Option<Name>,
    /// The group's volumes; sent with a session's first batch and after changes, so that a journal explains itself.
    pub volumes: Vec<VolumeDecl>,
}

/// A volume as its agent describes it.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct VolumeDecl {
    /// Number in the group.
    pub index: VolumeIndex,
    /// Name, unique in the group.
    pub name: Name,
    /// Bytes.
    pub size: u64,
    /// Logical block in bytes, 512 or 4096.
    pub block: u32,
}

/// Assembles one batch. Frames are sealed by [`crate::frame::FrameKey::seal`] under the key of [`BatchBuilder::salt`],
/// possibly on several threads; [`BatchBuilder::finish`] makes header and record list.
pub struct BatchBuilder<'a> {
    /// Stream and place.
    pub place: BatchPlace,
    /// Facts about the cut.
    pub cut: CutFlags,
    /// Chain hash of the predecessor.
    pub previous: ChainHash,
    /// This batch's, from [`BatchPlace::chain`].
    pub chain: ChainHash,
    /// From [`HostKey::salt`].
    pub salt: [u8; 32],
    /// Key that seals.
    pub host_key: &'a HostKey,
    /// Bytes that guests wrote.
    pub raw_bytes: u64,
    /// Where the source's activity log is, if it has one; read after the batch's last write got its position.
    pub log: Option<LogMark>,
}

impl BatchBuilder<'_> {
    /// Appends header and frame 0 to `out`. The caller sends `data_frames` (count) frames of `data_len` bytes in all
    /// behind them, in the order of their numbers.
    ///
    /// # Errors
    /// [`Error::TooLong`] when a limit of the format is passed.
    pub fn finish(
        &self,
        records: &[Record],
        annotations: &Annotations,
        data_frames: u32,
        data_len: u64,
        compressor: Option<&mut Compressor>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if records.len() > BATCH_RECORDS_MAX {
            return Err(Error::TooLong {
                what: "record list",
                value: records.len() as u64,
                limit: BATCH_RECORDS_MAX as u64,
            });
        }
        let mut plain = Vec::with_capacity(records.len() * RECORD_BYTES + 64);
        plain.extend_from_slice(records.as_bytes());
        plain.extend_from_slice(&codec::encode("batch annotations", annotations)?);
        let start = out.len();
        out.resize(start + BATCH_HEADER_BYTES, 0);
        let mut header = self.header(records.len(), data_frames + 1);
        let bound = &mut header;
        self.host_key.frame_key(&self.salt).seal(
            0,
            &plain,
            compressor,
            |list_len| {
                bound.body_len = (list_len as u64 + data_len).into();
                bound.authenticated()
            },
            out,
        )?;
        let total = BATCH_HEADER_BYTES as u64 + header.body_len.get();
        if total > BATCH_BYTES_MAX as u64 {
            return Err(Error::TooLong { what: "batch", value: total, limit: BATCH_BYTES_MAX as u64 });
        }
        header.crc = crc_fast::crc32_iscsi(header.authenticated()).into();
        out[start..start + BATCH_HEADER_BYTES].copy_from_slice(header.as_bytes());
        Ok(())
    }

    fn header(&self, records: usize, frames: u32) -> BatchHeader {
        let place = &self.place;
        let flag = |on, bit| if on { bit } else { 0 };
        BatchHeader {
            magic: MAGIC,
            version: VERSION.into(),
            header_len: U16::new(320),
            flags: (flag(self.cut.recoverable, FLAG_RECOVERABLE) | flag(self.cut.app_consistent, FLAG_APP)).into(),
            vault: place.vault.0,
            group: place.group.0,
            host: place.host.0,
            generation: place.generation.0.into(),
            key_epoch: self.host_key.epoch().0.into(),
            incarnation: place.incarnation.0.into(),
            number: place.number.0.into(),
            first_position: place.first.0.into(),
            end_position: place.end.0.into(),
            time: place.time.0.into(),
            frame_count: frames.into(),
            record_count: u32::try_from(records).expect("checked against the record limit").into(),
            body_len: U64::ZERO,
            raw_bytes: self.raw_bytes.into(),
            activity_log: self.log.map_or(0, |log| log.number).into(),
            previous: self.previous.0,
            chain: self.chain.0,
            salt: self.salt,
            activity_session: self.log.map_or(0, |log| log.session).into(),
            reserved: [0; 68],
            crc: U32::ZERO,
        }
    }
}

/// A received batch whose header, frame headers and checksums were checked; nothing was opened yet.
#[derive(Clone, Debug)]
pub struct BatchFrames {
    /// The header.
    pub header: BatchHeader,
    /// Byte at which each frame's header starts, by frame number.
    pub offsets: Vec<u32>,
}

/// Checks a batch's outer shape: header, every frame header and every frame's checksum, exact length.
///
/// # Errors
/// The first thing that is wrong; nothing of the batch may be used then.
pub fn parse(bytes: &[u8]) -> Result<BatchFrames> {
    let header = BatchHeader::parse(bytes)?;
    if bytes.len() != header.total_len() {
        return Err(Error::truncated("batch", header.total_len(), bytes.len()));
    }
    let mut offsets = Vec::with_capacity(header.frame_count() as usize);
    let mut at = BATCH_HEADER_BYTES;
    for number in 0..header.frame_count() {
        let plain_max = if number == 0 { LIST_PLAIN_MAX } else { FRAME_PLAIN_MAX };
        let frame = FrameHeader::parse(&bytes[at..], plain_max)?;
        let sealed = bytes
            .get(at + FRAME_HEADER_BYTES..at + frame.total_len())
            .ok_or_else(|| Error::truncated("frame", frame.total_len(), bytes.len() - at))?;
        frame.check_sealed(sealed)?;
        if frame.number() != number || *frame.salt() != header.salt || frame.key_epoch() != header.key_epoch() {
            return Err(Error::Range {
                what: "frame",
                field: "number",
                value: frame.number().into(),
                allowed: "the frame's place in a batch of its own salt",
            });
        }
        offsets.push(u32::try_from(at).expect("a batch is at most 64 MiB"));
        at += frame.total_len();
    }
    if at == bytes.len() {
        Ok(BatchFrames { header, offsets })
    } else {
        Err(Error::Malformed { what: "batch", reason: format!("{} bytes behind the last frame", bytes.len() - at) })
    }
}

/// The opened record list of a batch.
#[derive(Clone, Debug)]
pub struct RecordList {
    /// Records in the order of their tickets.
    pub records: Vec<Record>,
    /// What else the batch says.
    pub annotations: Annotations,
}

/// Opens and checks frame 0 of a batch that [`parse`] accepted: authenticity, every record, order of positions, chain
/// hash.
///
/// # Errors
/// [`Error::Forged`] for another key or changed bytes; otherwise what is wrong with the list.
pub fn open_list(bytes: &[u8], frames: &BatchFrames, key: &HostKey) -> Result<RecordList> {
    let header = &frames.header;
    let (frame, sealed) = frame::split(&bytes[frames.offsets[0] as usize..], LIST_PLAIN_MAX)?;
    let (mut scratch, mut plain) = (Vec::new(), Vec::new());
    key.frame_key(&header.salt).open(&frame, sealed, header.authenticated(), &mut scratch, &mut plain)?;
    let list_len = header.record_count() * RECORD_BYTES;
    let (list, rest) =
        plain.split_at_checked(list_len).ok_or_else(|| Error::truncated("record list", list_len, plain.len()))?;
    let records: Vec<Record> = list
        .chunks_exact(RECORD_BYTES)
        .map(|bytes| Record::read_from_bytes(bytes).expect("chunks have a record's length"))
        .collect();
    check_records(header, &records)?;
    let annotations = codec::decode("batch annotations", rest)?;
    Ok(RecordList { records, annotations })
}

fn check_records(header: &BatchHeader, records: &[Record]) -> Result<()> {
    let place = header.place();
    let mut last = place.first;
    for record in records {
        record.check(header.frame_count())?;
        if record.position() < last || record.position() >= place.end {
            return Err(Error::Range {
                what: "record",
                field: "position",
                value: record.position().0,
                allowed: "rising, within the batch",
            });
        }
        last = record.position();
    }
    if place.chain(&header.previous(), records) == header.chain() {
        Ok(())
    } else {
        Err(Error::Forged { what: "chain hash of the record list" })
    }
}
