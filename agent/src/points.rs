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
    bookmarks: BTreeMap<Name, DurableBatch>,
    /// How often the stream has started over: cuts that were made before may be lost.
    starts: u64,
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

    /// The stream starts over: whoever waits for a point orders it again.
    pub(crate) fn handle_start_over(&self) {
        self.lock().starts += 1;
        self.changed.notify_all();
    }

    /// Has a point of that name made, and waits until a recoverable one is durable; `None` as [`Self::wait`].
    ///
    /// It is ordered once: an order outlives events, and what was cut comes to the target. It is ordered again only where what it
    /// gave is of no use, cut while source and replica may have differed, or lost with its stream; else there would be two of that
    /// name.
    pub(crate) fn named(
        &self,
        name: &Name,
        left: impl Fn() -> Option<Duration>,
        capture: &impl Cuts,
    ) -> Option<DurableBatch> {
        loop {
            self.wait(left(), |_| capture.is_whole().then_some(()))?;
            // A point of this name that was ordered before, and becomes durable only now, is not the one.
            let head = capture.head();
            let starts = {
                let mut board = self.lock();
                board.bookmarks.remove(name);
                board.starts
            };
            capture.order(name);
            let point = self.wait(left(), |board| {
                let made = board.bookmarks.get(name).filter(|point| point.end.0 > head);
                made.cloned().map(Some).or_else(|| (board.starts != starts).then_some(None))
            })?;
            if let Some(point) = point.filter(|point| point.recoverable) {
                return Some(point);
            }
        }
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

/// Where points are cut: a group, as seen by who waits for one.
pub(crate) trait Cuts {
    /// Nothing is missing, and points include every volume.
    fn is_whole(&self) -> bool;

    /// Position of what is captured next.
    fn head(&self) -> u64;

    /// Orders a point of that name at the next turn.
    fn order(&self, name: &Name);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc::{SyncSender, sync_channel};

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

    /// Says when a point is ordered.
    struct Group {
        whole: AtomicBool,
        head: AtomicU64,
        orders: SyncSender<Name>,
    }

    impl Cuts for Group {
        fn is_whole(&self) -> bool {
            self.whole.load(Ordering::SeqCst)
        }

        fn head(&self) -> u64 {
            self.head.load(Ordering::SeqCst)
        }

        fn order(&self, name: &Name) {
            self.orders.send(name.clone()).expect("the test listens");
        }
    }

    /// Goal: whoever asks for one point gets one, and one that is of use. Method: an event between order and durability, then what makes
    /// an order vain: an older point of that name, a cut within an event, a stream that starts over.
    #[test]
    fn a_named_point_is_ordered_again_only_if_it_was_in_vain() {
        let (orders, ordered) = sync_channel(8);
        let group = Group { whole: AtomicBool::new(true), head: AtomicU64::new(10), orders };
        let board = PointBoard::default();
        let name = Name::new("a").expect("a good name");
        board.note(&named(20, "a"));
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| board.named(&name, || None, &group));
            assert_eq!(ordered.recv(), Ok(name.clone()));
            group.whole.store(false, Ordering::SeqCst);
            board.poke();
            group.whole.store(true, Ordering::SeqCst);
            board.poke();
            board.note(&named(10, "a"));
            board.note(&named(11, "b"));
            board.note(&DurableBatch { recoverable: false, ..named(12, "a") });
            assert_eq!(ordered.recv(), Ok(name.clone()), "what was cut in an event is of no use");
            board.handle_start_over();
            assert_eq!(ordered.recv(), Ok(name.clone()), "it may be lost with the old stream");
            board.note(&named(13, "a"));
            let point = asked.join().expect("asks").expect("no limit");
            assert_eq!((point.end, point.recoverable), (Position(13), true));
        });
        assert!(ordered.try_recv().is_err(), "ordered for nothing");
    }
}
