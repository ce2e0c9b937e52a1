//! When to cut the stream.

use std::collections::VecDeque;
use std::sync::Arc;

use farshore_proto::record::Kind;
use farshore_proto::{Name, Now, Position, WallTime};
use farshore_ring::{Desc, Producer};

use crate::{CUT_APP_CONSISTENT, CaptureGroup, Error};

/// Most bookmarks that wait for their cut.
const BOOKMARKS_MAX: usize = 16;

/// Puts cuts into one group's ring. Performs no I/O; owned by whoever ships batches.
///
/// [`Cutter::poll`] after every change of its arguments and at [`Cutter::poll_deadline`]. A cut comes
/// - at once for every bookmark;
/// - `cut_min` after the last one, if something was captured since and a shipping slot is free;
/// - `cut_max` after the last one, if a shipping slot is free (then even an empty one, as a heartbeat) or something was captured
///   since.
///
/// None while the ring is closed.
pub struct Cutter {
    group: Arc<CaptureGroup>,
    producer: Producer,
    /// Time of the last cut, and the position behind it.
    last: Option<(Now, u64)>,
    bookmarks: VecDeque<(Name, bool)>,
}

/// A cut that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Its place: the batch ends there.
    pub position: Position,
    /// Whose name the point bears, if any.
    pub bookmark: Option<Name>,
}

impl Cutter {
    /// For `group`; the first cut comes at once.
    #[must_use]
    pub fn new(group: Arc<CaptureGroup>) -> Self {
        let producer = group.ring().producer();
        Self { group, producer, last: None, bookmarks: VecDeque::new() }
    }

    /// The next cut bears `name` and does not wait. `app_consistent`: file systems are frozen until [`Cutter::poll`] has
    /// returned the cut.
    ///
    /// # Errors
    /// The stream is closed, or too many bookmarks wait.
    pub fn bookmark(&mut self, name: Name, app_consistent: bool) -> Result<(), Error> {
        if self.group.ring().is_closed() {
            return Err(Error::Closed);
        }
        if self.bookmarks.len() >= BOOKMARKS_MAX {
            return Err(Error::Bookmarks(BOOKMARKS_MAX));
        }
        self.bookmarks.push_back((name, app_consistent));
        Ok(())
    }

    /// Makes a cut if it is time for one. `slot_free`: a batch could be shipped at once. `wall` becomes the point's time, so it is
    /// read just before.
    pub fn poll(&mut self, now: Now, wall: WallTime, slot_free: bool) -> Option<Cut> {
        if !self.due(now, slot_free) {
            return None;
        }
        let mut bookmark = self.bookmarks.front();
        let mut name = bookmark.map_or(&b""[..], |(name, _)| name.as_str().as_bytes());
        let mut reservation = match self.producer.reserve_marker(name.len()) {
            Ok(reservation) => reservation,
            // A ring in which the name finds no room may be full of what has no cut, and that leaves it only when there is one. The
            // bookmark waits for the next.
            Err(_) if self.changed() => {
                (bookmark, name) = (None, b"");
                self.producer.reserve_marker(0).ok()?
            }
            Err(_) => return None,
        };
        reservation[..name.len()].copy_from_slice(name);
        let desc = Desc {
            kind: Kind::Cut as u8,
            len: u32::try_from(name.len()).expect("names have at most 63 bytes"),
            time: wall.0,
            aux: if bookmark.is_some_and(|(_, app)| *app) { CUT_APP_CONSISTENT } else { 0 },
            ..Desc::default()
        };
        let named = bookmark.is_some();
        let position = self.producer.publish(reservation, &desc).ok()?;
        self.last = Some((now, position + 1));
        self.group.cut_made(position);
        if self.producer.consumer_sleeping() {
            self.group.wake_consumer();
        }
        let bookmark = if named { self.bookmarks.pop_front().map(|(name, _)| name) } else { None };
        Some(Cut { position: Position(position), bookmark })
    }

    /// Something was captured since the last cut.
    fn changed(&self) -> bool {
        self.last.is_none_or(|(_, behind)| self.group.ring().head() != behind)
    }

    fn due(&self, now: Now, slot_free: bool) -> bool {
        let Some((last, behind)) = self.last else { return true };
        let config = self.group.config();
        let since = now.since(last);
        // A link that is down must not fill the ring with heartbeats.
        let changed = self.group.ring().head() != behind;
        !self.bookmarks.is_empty()
            || (since >= config.cut_min && slot_free && changed)
            || (since >= config.cut_max && (slot_free || changed))
    }

    /// When to call [`Self::poll`] at the latest if nothing else happens.
    #[must_use]
    pub fn poll_deadline(&self, slot_free: bool) -> Option<Now> {
        let Some((last, behind)) = self.last else { return Some(Now(0)) };
        if !self.bookmarks.is_empty() {
            return Some(Now(0));
        }
        let changed = self.group.ring().head() != behind;
        let config = self.group.config();
        match (slot_free, changed) {
            (true, true) => Some(last.plus(config.cut_min)),
            (true, false) | (false, true) => Some(last.plus(config.cut_max)),
            (false, false) => None,
        }
    }
}

impl std::fmt::Debug for Cutter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cutter")
            .field("last", &self.last)
            .field("bookmarks", &self.bookmarks.len())
            .finish_non_exhaustive()
    }
}
