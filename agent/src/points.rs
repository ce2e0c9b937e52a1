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
    /// Nothing more is said here.
    closed: bool,
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
            board.bookmarks.insert(name.clone(), batch.clone());
            if board.bookmarks.len() > BOOKMARKS_MAX {
                let oldest = board.bookmarks.iter().min_by_key(|(_, point)| point.end).map(|(name, _)| name.clone());
                oldest.map(|name| board.bookmarks.remove(&name));
            }
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

    /// The group stops: nobody waits any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Looks until `found` gives something; `None` when `limit` is over or the board closed. `found` is asked again at every change, and at least
    /// ten times a second, because not all that it looks at is announced.
    pub(crate) fn wait<T>(&self, limit: Option<Duration>, mut found: impl FnMut(&Board) -> Option<T>) -> Option<T> {
        let begin = crate::clock::now();
        let mut board = self.lock();
        loop {
            if let Some(value) = found(&board) {
                return Some(value);
            }
            let left = limit.map(|limit| limit.saturating_sub(crate::clock::now().since(begin)));
            if board.closed || left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            let pause = left.unwrap_or(Duration::MAX).min(Duration::from_millis(100));
            board = self.changed.wait_timeout(board, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use farshore_proto::{BatchNo, Generation, Incarnation, PointId, Position, WallTime};

    use super::*;

    fn named(end: u64, name: &str) -> DurableBatch {
        DurableBatch {
            point: PointId { generation: Generation(1), incarnation: Incarnation(1), batch: BatchNo(end) },
            end: Position(end),
            time: WallTime(end),
            recoverable: true,
            app_consistent: false,
            bookmark: Some(Name::new(name).expect("a good name")),
            received: None,
        }
    }

    /// Goal: whoever waits for a new bookmark finds it, whatever its name; the oldest one is forgotten.
    #[test]
    fn the_oldest_bookmark_is_forgotten() {
        let board = PointBoard::default();
        let names: Vec<String> = (0..BOOKMARKS_MAX).rev().map(|number| format!("m{number:03}")).collect();
        for (end, name) in (1..).zip(&names) {
            board.note(&named(end, name));
        }
        let known = |name: &str| board.lock().bookmarks.contains_key(&Name::new(name).expect("a good name"));
        // Said again, it takes nobody's place, and is the newest.
        board.note(&named(1000, &names[0]));
        assert!(names.iter().all(|name| known(name)));
        board.note(&named(1001, "a"));
        board.note(&named(1002, "z"));
        assert!(known("a") && known("z") && known(&names[0]));
        assert!(!known(&names[1]) && !known(&names[2]) && known(&names[3]));
    }
}
