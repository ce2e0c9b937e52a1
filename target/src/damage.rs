//! Damage found in a journal, and which points it touches.

use std::collections::BTreeSet;
use std::fmt;

use farshore_proto::{BatchNo, VolumeIndex};
use farshore_uring::Storage;

use crate::error::{Error, Kind, Result};
use crate::group::{Content, GroupHost, UpTo};
use crate::points::Point;

/// Most places remembered one by one; when more are found, whole batches are (I11).
const PLACES_MAX: usize = 64;

/// One damaged place.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, bincode::Encode, bincode::Decode)]
pub enum Damaged {
    /// A frame cannot be opened or holds another content than its records say: the versions in it cannot be had.
    Frame {
        /// Segment.
        segment: u32,
        /// Byte of the frame's header.
        frame_offset: u32,
        /// Batch that brought it.
        batch: BatchNo,
        /// Volume, slot, first sector and sectors of a record in it.
        pieces: Vec<(VolumeIndex, u64, u8, u8)>,
    },
    /// The record lists of these batches are lost: what they changed is unknown, so no later point can be trusted until
    /// the source has compared everything.
    Batches {
        /// First lost.
        from: BatchNo,
        /// Last lost.
        to: BatchNo,
        /// The first batch whose point may be trusted again.
        healed: Option<BatchNo>,
    },
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame { segment, frame_offset, batch, pieces } => {
                write!(f, "batch {batch}: frame at byte {frame_offset} of segment {segment} is unreadable;")?;
                for (volume, slot, start, count) in pieces.iter().take(4) {
                    let first = slot * farshore_proto::SLOT_BYTES + u64::from(*start) * farshore_proto::SECTOR_BYTES;
                    let len = u64::from(*count) * farshore_proto::SECTOR_BYTES;
                    write!(f, " volume {volume} bytes {first}..{}", first + len)?;
                }
                if pieces.len() > 4 { write!(f, " and {} more ranges", pieces.len() - 4) } else { Ok(()) }
            }
            Self::Batches { from, to, healed } => {
                write!(f, "batches {from} to {to} are unreadable, all volumes are affected ")?;
                match healed {
                    Some(batch) => write!(f, "up to batch {batch}"),
                    None => write!(f, "until the source has compared everything"),
                }
            }
        }
    }
}

/// All damage known of one stream.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Damage {
    places: BTreeSet<Damaged>,
    /// How often lost batches were added since the stream was opened.
    lost: u64,
}

impl Damage {
    /// From the catalog.
    pub(crate) fn new(places: impl IntoIterator<Item = Damaged>) -> Self {
        Self { places: places.into_iter().collect(), lost: 0 }
    }

    /// Adds a place; `false` if it is known.
    pub(crate) fn add(&mut self, place: Damaged) -> bool {
        let place = match place {
            Damaged::Frame { batch, .. } if self.places.len() >= PLACES_MAX => {
                Damaged::Batches { from: batch, to: batch, healed: None }
            }
            Damaged::Frame { .. } | Damaged::Batches { .. } => place,
        };
        if let Damaged::Batches { from, to, .. } = place
            && self
                .places
                .iter()
                .any(|known| matches!(known, Damaged::Batches { from: a, to: b, .. } if *a <= from && to <= *b))
        {
            return false;
        }
        if self.places.len() >= 2 * PLACES_MAX {
            // One entry that says "from here on" replaces the rest: coarser, still honest.
            let from = self.places.iter().map(Damaged::first_batch).min().unwrap_or(place.first_batch());
            self.lost += 1;
            self.places = BTreeSet::from([Damaged::Batches { from, to: place.first_batch().max(from), healed: None }]);
            return true;
        }
        let is_lost = matches!(place, Damaged::Batches { .. });
        let fresh = self.places.insert(place);
        self.lost += u64::from(fresh && is_lost);
        fresh
    }

    /// A number that rises whenever lost batches are added: the source must compare everything again.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    /// The source compared everything: points from `batch` on are whole again as far as lost batches go.
    pub(crate) fn heal_batches(&mut self, batch: BatchNo) -> bool {
        let open = |place: &Damaged| matches!(place, Damaged::Batches { healed: None, .. });
        if !self.places.iter().any(open) {
            return false;
        }
        self.places = std::mem::take(&mut self.places)
            .into_iter()
            .map(|place| match place {
                Damaged::Batches { from, to, healed: None } => Damaged::Batches { from, to, healed: Some(batch) },
                Damaged::Frame { .. } | Damaged::Batches { .. } => place,
            })
            .collect();
        true
    }

    /// Forgets what lies in history that retention took. `true`: there was some.
    pub(crate) fn forget_below(&mut self, horizon: BatchNo, segments: &BTreeSet<u32>) -> bool {
        let before = self.places.len();
        self.places.retain(|place| match place {
            Damaged::Frame { segment, .. } => segments.contains(segment),
            Damaged::Batches { healed, .. } => healed.is_none_or(|batch| batch > horizon),
        });
        self.places.len() < before
    }

    /// All places.
    pub fn iter(&self) -> impl Iterator<Item = &Damaged> {
        self.places.iter()
    }

    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether some lost batch is not healed yet.
    #[must_use]
    pub fn needs_compare(&self) -> bool {
        self.places.iter().any(|place| matches!(place, Damaged::Batches { healed: None, .. }))
    }

    /// Refuses a point that needs damaged bytes.
    pub(crate) fn check<S: Storage>(&self, stream: &GroupHost<S>, point: &Point) -> Result<()> {
        let batch = point.id.batch;
        let mut reasons = Vec::new();
        for place in &self.places {
            let touched = match place {
                Damaged::Batches { from, healed, .. } => batch >= *from && healed.is_none_or(|healed| batch < healed),
                Damaged::Frame { batch: at, .. } if batch < *at => false,
                Damaged::Frame { segment, frame_offset, pieces, .. } => {
                    shows(stream, batch, (*segment, *frame_offset), pieces)?
                }
            };
            if touched {
                reasons.push(place.to_string());
            }
        }
        if reasons.is_empty() {
            return Ok(());
        }
        let context = format!("point {} of {}: {}", point.id, stream.id.subject(), reasons.join("; "));
        Err(Error::new(Kind::Damaged, context))
    }
}

impl Damaged {
    fn first_batch(&self) -> BatchNo {
        match self {
            Self::Frame { batch, .. } => *batch,
            Self::Batches { from, .. } => *from,
        }
    }
}

/// Whether the newest visible versions at `batch` still lead into the frame.
fn shows<S: Storage>(
    stream: &GroupHost<S>,
    batch: BatchNo,
    frame: (u32, u32),
    pieces: &[(VolumeIndex, u64, u8, u8)],
) -> Result<bool> {
    for (volume, slot, ..) in pieces {
        let entries = stream.index.lookup(*volume, *slot, UpTo::end_of(batch))?;
        let leads_there = |entry: &crate::group::IndexEntry| matches!(entry.content, Content::Chunk(place) if (place.segment, place.frame_offset) == frame);
        if entries.iter().any(leads_there) {
            return Ok(true);
        }
    }
    Ok(false)
}
