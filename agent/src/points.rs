//! Who waits for which recovery point.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_proto::Name;
use farshore_streamer::DurableBatch;

/// Bookmarks that are remembered for whoever asked for them.
const BOOKMARKS_MAX: usize = 256;

/// The newest durable points, as the streamer reports them.
#[derive(Default)]
pub(crate) struct PointBoard {
    state: Mutex<Board>,
    changed: Condvar,
}

#[derive(Default)]
pub(crate) struct Board {
    /// Newest durable recoverable point.
    pub newest: Option<DurableBatch>,
    /// Named points that became durable, recoverable or not.
    pub bookmarks: BTreeMap<Name, DurableBatch>,
}

impl PointBoard {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch became durable.
    pub(crate) fn note(&self, batch: &DurableBatch) {
        let mut board = self.lock();
        if batch.recoverable {
            board.newest = Some(batch.clone());
        }
        if let Some(name) = &batch.bookmark {
            if board.bookmarks.len() >= BOOKMARKS_MAX {
                board.bookmarks.pop_first();
            }
            board.bookmarks.insert(name.clone(), batch.clone());
        }
        self.changed.notify_all();
    }

    /// Something else changed that waiters look at.
    pub(crate) fn poke(&self) {
        self.changed.notify_all();
    }

    /// The newest durable recoverable point.
    pub(crate) fn newest(&self) -> Option<DurableBatch> {
        self.lock().newest.clone()
    }

    /// Forgets a named point, before one of that name is ordered.
    pub(crate) fn forget(&self, name: &Name) {
        self.lock().bookmarks.remove(name);
    }

    /// Looks until `found` gives something; `None` when `limit` is over. `found` is asked again at every change, and at least
    /// ten times a second, because not all that it looks at is announced.
    pub(crate) fn wait<T>(&self, limit: Option<Duration>, mut found: impl FnMut(&Board) -> Option<T>) -> Option<T> {
        let begin = crate::clock::now();
        let mut board = self.lock();
        loop {
            if let Some(value) = found(&board) {
                return Some(value);
            }
            let left = limit.map(|limit| limit.saturating_sub(crate::clock::now().since(begin)));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let pause = left.unwrap_or(Duration::MAX).min(Duration::from_millis(100));
            board = self.changed.wait_timeout(board, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
