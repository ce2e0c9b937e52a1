//! Records: what happened to which range, 64 bytes each, in the order of their tickets. Byte table:
//! `docs/formats/batch.md`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{ChunkId, Error, Position, Result, SLOT_SECTORS, SlotNo, VolumeIndex};

/// Bytes of a [`Record`].
pub const RECORD_BYTES: usize = 64;
/// Bytes of a record that the chain hash covers: all but where the chunk lies.
pub const RECORD_CHAINED_BYTES: usize = 56;
/// Value of `frame` in a record whose content is sent by reference: the target holds the chunk under a lease.
pub const FRAME_BY_REFERENCE: u32 = u32::MAX;

const WHAT: &str = "record";

/// What a descriptor in the ring and a record in a batch stand for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// A position that was claimed and never published (its process died); carries nothing. Ring only.
    Noop = 0,
    /// A guest's write.
    Write = 1,
    /// A guest's write of zeroes, or a write whose content is zero.
    WriteZeroes = 2,
    /// A guest's discard; reads as zeroes.
    Discard = 3,
    /// Content read by initial sync or resync under the range lock.
    SyncData = 4,
    /// Hash of a slot, read by sync without a lock; the target compares at this ticket and answers.
    Probe = 5,
    /// A range that sync found to be zero; the target compares at this ticket and answers per slot.
    ProbeZero = 6,
    /// A cut: ends a batch. Ring only; in a batch the header says it.
    Cut = 7,
    /// From here on no cut is recoverable (source and replica may differ somewhere).
    EventBegin = 8,
    /// All differences since the matching [`Kind::EventBegin`] are in the stream: cuts are recoverable again.
    EventEnd = 9,
    /// The volume's initial sync is in the stream: points include it from the next cut on.
    VolumeJoined = 10,
    /// A name for the point at the end of this batch. Ring only: the batch's annotations carry it.
    Bookmark = 11,
    /// A range that the source's device cannot read.
    Unreadable = 12,
    /// A range is zero: read by sync under the range lock.
    SyncZero = 13,
    /// The volume was taken out of protection: points do not include it from the next cut on.
    VolumeLeft = 14,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub const ALL: [Self; 15] = [
        Self::Noop,
        Self::Write,
        Self::WriteZeroes,
        Self::Discard,
        Self::SyncData,
        Self::Probe,
        Self::ProbeZero,
        Self::Cut,
        Self::EventBegin,
        Self::EventEnd,
        Self::VolumeJoined,
        Self::Bookmark,
        Self::Unreadable,
        Self::SyncZero,
        Self::VolumeLeft,
    ];

    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Changes content, by bytes that a chunk holds.
    #[must_use]
    pub fn has_chunk(self) -> bool {
        matches!(self, Self::Write | Self::SyncData)
    }

    /// Changes content, to zeroes.
    #[must_use]
    pub fn zeroes(self) -> bool {
        matches!(self, Self::WriteZeroes | Self::Discard | Self::SyncZero)
    }

    /// Changes the volume's content.
    #[must_use]
    pub fn changes_content(self) -> bool {
        self.has_chunk() || self.zeroes()
    }

    /// Was made by sync and not by a guest.
    #[must_use]
    pub fn is_sync(self) -> bool {
        matches!(self, Self::SyncData | Self::SyncZero | Self::Probe | Self::ProbeZero)
    }

    /// What it says of the cuts behind it; `None`: nothing.
    #[must_use]
    pub fn mark(self) -> Option<Mark> {
        match self {
            Self::EventBegin => Some(Mark::Event { open: true }),
            Self::EventEnd => Some(Mark::Event { open: false }),
            Self::VolumeJoined => Some(Mark::Volume { joined: true }),
            Self::VolumeLeft => Some(Mark::Volume { joined: false }),
            Self::Noop
            | Self::Write
            | Self::WriteZeroes
            | Self::Discard
            | Self::SyncData
            | Self::Probe
            | Self::ProbeZero
            | Self::Cut
            | Self::Bookmark
            | Self::Unreadable
            | Self::SyncZero => None,
        }
    }

    /// May stand in a batch's record list.
    #[must_use]
    pub fn in_batch(self) -> bool {
        !matches!(self, Self::Noop | Self::Cut | Self::Bookmark)
    }
}

/// How a record changes what later cuts are. Source and target follow the same marks, each in its own state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// No cut is recoverable while an event is open.
    Event {
        /// It begins; else it ends.
        open: bool,
    },
    /// Points include the record's volume, or no longer.
    Volume {
        /// It joins; else it leaves.
        joined: bool,
    },
}

/// One record of a batch.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    kind: u8,
    flags: u8,
    volume: U16,
    sectors: U32,
    position: U64,
    start: U64,
    id: [u8; 32],
    frame: U32,
    offset: U32,
}

const _: () = assert!(size_of::<Record>() == RECORD_BYTES);

/// Where a chunk's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Home {
    /// The record has no bytes.
    None,
    /// In frame `frame` (1 and up) of this batch, from byte `offset` of its plain content.
    Here {
        /// Number of the frame in the batch.
        frame: u32,
        /// Byte within the frame's plain content.
        offset: u32,
    },
    /// At the target already; the id says which.
    Reference,
}

impl Record {
    /// A record of `kind` over `sectors` sectors from `start`.
    #[must_use]
    pub fn new(kind: Kind, volume: VolumeIndex, position: Position, start: u64, sectors: u32) -> Self {
        Self {
            kind: kind as u8,
            flags: 0,
            volume: volume.0.into(),
            sectors: sectors.into(),
            position: position.0.into(),
            start: start.into(),
            id: [0; 32],
            frame: U32::ZERO,
            offset: U32::ZERO,
        }
    }

    /// With the chunk's id.
    #[must_use]
    pub fn with_id(mut self, id: ChunkId) -> Self {
        self.id = id.0;
        self
    }

    /// With the chunk's home.
    #[must_use]
    pub fn with_home(mut self, home: Home) -> Self {
        let (frame, offset) = match home {
            Home::None => (0, 0),
            Home::Here { frame, offset } => (frame, offset),
            Home::Reference => (FRAME_BY_REFERENCE, 0),
        };
        self.frame = frame.into();
        self.offset = offset.into();
        self
    }

    /// What happened. Only checked records exist outside this crate's parser, so the number is known.
    #[must_use]
    pub fn kind(&self) -> Kind {
        Kind::from_u8(self.kind).expect("checked when it was parsed or made")
    }

    /// To which volume.
    #[must_use]
    pub fn volume(&self) -> VolumeIndex {
        VolumeIndex(self.volume.get())
    }

    /// At which place of the ring.
    #[must_use]
    pub fn position(&self) -> Position {
        Position(self.position.get())
    }

    /// First sector.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start.get()
    }

    /// Length in sectors.
    #[must_use]
    pub fn sectors(&self) -> u32 {
        self.sectors.get()
    }

    /// First byte.
    #[must_use]
    pub fn start_byte(&self) -> u64 {
        self.start() * crate::SECTOR_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.sectors()) * crate::SECTOR_BYTES
    }

    /// The chunk's id (zeroes where there is no chunk).
    #[must_use]
    pub fn id(&self) -> ChunkId {
        ChunkId(self.id)
    }

    /// Where the bytes are.
    #[must_use]
    pub fn home(&self) -> Home {
        match self.frame.get() {
            0 => Home::None,
            FRAME_BY_REFERENCE => Home::Reference,
            frame => Home::Here { frame, offset: self.offset.get() },
        }
    }

    /// The bytes that the chain hash covers.
    #[must_use]
    pub fn chained(&self) -> &[u8] {
        &self.as_bytes()[..RECORD_CHAINED_BYTES]
    }

    /// Checks what can be checked of one record alone.
    ///
    /// # Errors
    /// [`Error::Range`] naming the field.
    pub fn check(&self, frame_count: u32) -> Result<()> {
        let range = |field, value, allowed| Err(Error::Range { what: WHAT, field, value, allowed });
        let Some(kind) = Kind::from_u8(self.kind).filter(|kind| kind.in_batch()) else {
            return range("kind", self.kind.into(), "a kind that may stand in a batch");
        };
        if self.flags != 0 {
            return range("flags", self.flags.into(), "0");
        }
        let ranged = kind.changes_content() || matches!(kind, Kind::Probe | Kind::ProbeZero | Kind::Unreadable);
        if ranged
            && (self.sectors() == 0 || self.start().checked_add(self.sectors().into()).is_none_or(|end| end > 1 << 55))
        {
            return range("sectors", self.sectors().into(), "1 and up, ending below 2^64 bytes");
        }
        if (kind.has_chunk() || kind == Kind::Probe) && !self.inside_one_slot() {
            return range("sectors", self.sectors().into(), "no further than the slot's end");
        }
        match self.home() {
            Home::None if kind.has_chunk() => range("frame", 0, "a frame or a reference for a kind with content"),
            Home::Here { .. } | Home::Reference if !kind.has_chunk() => {
                range("frame", self.frame.get().into(), "0 for a kind without content")
            }
            Home::Here { frame, .. } if frame >= frame_count => {
                range("frame", frame.into(), "below the batch's frame count")
            }
            Home::None | Home::Here { .. } | Home::Reference => Ok(()),
        }
    }

    fn inside_one_slot(&self) -> bool {
        let within = self.start() - SlotNo::of_sector(self.start()).start_sector();
        within + u64::from(self.sectors()) <= u64::from(SLOT_SECTORS)
    }
}
