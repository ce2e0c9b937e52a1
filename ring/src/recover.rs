//! What a killed process left behind, and how the next one goes on from it.
//!
//! The kill model: every thread stops after some prefix of its stores in program order, prefixes of different threads being
//! consistent with what each read from the others. (Stores that were executed are seen by whoever maps the memory later;
//! compilers are kept in line by the orderings.) The argument, kill point by kill point:
//!
//! 1. *Reserve* (credit, count, bit, header = Filling): nothing was written anywhere. Credits, counts, maps and headers are
//!    rebuilt from the published descriptors, so the reservation is undone.
//! 2. *`writing`* (range, then state = Writing with Release): before the state, no write was submitted; after it, the range
//!    is reported. A range is never reported with another's offset: range words change only in state Filling or Writing of the
//!    same owner, and a second call for one reservation names the same request.
//! 3. *Claim* (head), state = Published(position), fields, `sequence` (Release): until `sequence` is stored the position is
//!    unpublished and becomes a no-op; its cell is Writing, or Published at an unpublished position: reported in both cases.
//!    From `sequence` on everything is in the stream: fields, payload and header came before it. The guest's completion comes
//!    later still, so no acknowledged write is ever in the first case.
//! 4. *Closed instead of claimed*: the reservation comes back with the error and is Writing until the caller drops it, which it
//!    does after marking the range missing. The same holds for a failed backing write.
//! 5. *`free_to`* (cursor, then cells, then credits): cells Published at a position below the cursor are freed by the rebuild.
//!    Positions at or above the cursor still own their cells.
//! 6. *Readers* (`readers` > 1) die with the process: counts start at one again.
//! 7. *`close`, `reopen`* are one atomic each; the re-opening event is published before it. A kill between the two leaves a
//!    published slot *at* the head of a closed ring: [`resume`] unpublishes it.
//! 8. *Recovery itself* is in two steps so that it can be killed as well. [`survey`] only reads. [`resume`] changes, after the
//!    caller has marked what was reported (in the bitmaps, that is in the same memory). Killed inside `resume`, the next survey
//!    may report less, all of it marked already; everything else it finds the same.

use crate::layout::{CLOSED, CellState, StateWord};
use crate::shared::Shared;
use crate::slab::CellId;
use crate::state::StreamState;
use crate::sync::Ordering;
use crate::{Desc, Error};

/// A range whose content on the backing device may differ from what is in the stream. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WritingRange {
    /// Index of the volume.
    pub volume: u16,
    /// Start.
    pub offset: u64,
    /// Length.
    pub length: u64,
}

/// What was found in a ring at its opening.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovery {
    /// Writes that may have reached the backing device and are not in the stream. Where requests are not issued again by the
    /// kernel (NBD), mark them missing before [`crate::Dormant::resume`].
    pub writing: Vec<WritingRange>,
    /// Positions that were claimed and not published; they become no-ops (kind 0).
    pub unpublished: Vec<u64>,
    /// First unfreed position: the consumer starts here.
    pub freed: u64,
    /// The next position to be claimed.
    pub head: u64,
    /// The ring was closed and still is.
    pub closed: bool,
    /// The last owner had stopped in order.
    pub was_clean: bool,
    /// The streamer's scratch; `None` if it never wrote any.
    pub stream: Option<StreamState>,
}

/// What the rebuild needs beside the report.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) head: u64,
    pub(crate) closed: bool,
    pub(crate) freed: u64,
    pub(crate) unpublished: Vec<u64>,
    pub(crate) writing: Vec<WritingRange>,
    /// Cells of published, unfreed positions.
    owned: Vec<(CellId, u64)>,
}

/// Reads the ring without changing it.
///
/// # Errors
/// `Corrupt`: no sequence of kills leads here.
pub(crate) fn survey(shared: &Shared) -> Result<Survey, Error> {
    let word = shared.head().load(Ordering::Acquire);
    let (head, closed) = (word & !CLOSED, word & CLOSED != 0);
    let freed = shared.freed().load(Ordering::Acquire);
    if freed > head || head - freed > shared.geometry.descriptors {
        return Err(Error::Corrupt { what: "freed cursor and head do not fit together", value: freed });
    }
    let mut survey = Survey { head, closed, freed, unpublished: vec![], writing: vec![], owned: vec![] };
    for position in freed..head {
        if !shared.is_published(position) {
            survey.unpublished.push(position);
            continue;
        }
        let (desc, holder) = shared.read(position);
        let cell = shared.cell_of(holder);
        match cell.map_err(|value| Error::Corrupt { what: "descriptor names no cell of the slab", value })? {
            Some(cell) if desc.len as usize <= cell.class.bytes() => survey.owned.push((cell, position)),
            None if desc.len == 0 => {}
            Some(_) | None => return Err(Error::Corrupt { what: "payload longer than its cell", value: position }),
        }
    }
    check_owned(shared, &mut survey.owned)?;
    survey.writing = find_writing(shared, &survey)?;
    Ok(survey)
}

/// No cell belongs to two positions, cells do not overlap, a page has one class.
fn check_owned(shared: &Shared, owned: &mut [(CellId, u64)]) -> Result<(), Error> {
    owned.sort_unstable_by_key(|(cell, _)| cell.unit);
    for pair in owned.windows(2) {
        let [(a, _), (b, position)] = pair else { continue };
        let overlap = a.unit as usize + (1 << a.class.raw()) > b.unit as usize;
        if overlap || (a.page() == b.page() && a.class != b.class) {
            return Err(Error::Corrupt { what: "two descriptors share a cell", value: *position });
        }
    }
    for &(cell, position) in &*owned {
        let header = shared.slab.header(cell);
        let state = StateWord::decode(header.state.load(Ordering::Relaxed))?;
        if state.state != CellState::Published || header.position.load(Ordering::Relaxed) != position {
            return Err(Error::Corrupt { what: "cell of a published descriptor says otherwise", value: position });
        }
    }
    Ok(())
}

fn find_writing(shared: &Shared, survey: &Survey) -> Result<Vec<WritingRange>, Error> {
    let mut found = vec![];
    for header in shared.slab.headers.iter() {
        let state = StateWord::decode(header.state.load(Ordering::Relaxed))?;
        let is_open = match state.state {
            CellState::Free | CellState::Filling => false,
            CellState::Writing => true,
            CellState::Published => survey.unpublished.binary_search(&header.position.load(Ordering::Relaxed)).is_ok(),
        };
        let range = WritingRange {
            volume: state.volume,
            offset: header.offset.load(Ordering::Relaxed),
            length: header.length.load(Ordering::Relaxed),
        };
        // A published marker's cell has no range; unpublished, it is lost with its marker.
        if is_open && range.length > 0 {
            found.push(range);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Makes the ring usable: no-ops for unpublished positions, free lists and credits rebuilt. Alone with the memory.
pub(crate) fn resume(shared: &Shared, survey: &Survey) {
    for &position in &survey.unpublished {
        shared.fill(position, &Desc::default(), None);
    }
    if survey.head - survey.freed < shared.geometry.descriptors {
        // 7 above. Any value but head + 1 will do.
        shared.slot(survey.head).sequence.store(0, Ordering::Relaxed);
    }
    shared.slab.rebuild(&survey.owned);
    shared.credits().store(survey.head - survey.freed, Ordering::Relaxed);
    shared.waiting().store(0, Ordering::Relaxed);
    // Release: whoever gets the ring from here on sees all of the above (the hand-over of the `Ring` itself orders as well).
    shared.clean().store(0, Ordering::Release);
}
