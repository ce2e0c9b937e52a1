//! Locks on byte ranges of one volume: overlapping requests go one after the other, in the order in which they came; nobody
//! waits by blocking a thread.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crossbeam::queue::ArrayQueue;
use farshore_uring::Waker;

/// Shards; a set of them is the bits of one word.
const SHARDS: usize = 64;
/// Bytes of volume that fall into one shard before the next begins: as long as the longest write, so that a write looks at two
/// shards at most.
const REGION_BYTES: u64 = 256 << 10;
/// Requests for which a shard has room before it allocates: what the usual queue depths put into one place.
const SHARD_ENTRIES: usize = 64;
/// Most owners (queues and sync) of one volume's lock.
pub const OWNERS_MAX: usize = 256;

/// The table of locked ranges of one volume.
///
/// A request's entry stands in every shard that its range touches. Invariants:
/// - an entry is put into all its shards at one time (all their mutexes held, taken in ascending order), so any two overlapping
///   entries stand in the same order wherever they meet, and no circle of waiting can form;
/// - `pending` of a request counts, over all its shards, the earlier entries that overlap it. It holds the lock when that is 0;
/// - critical sections are short (a scan of one shard) and never contain a system call.
pub struct RangeLock {
    shards: Box<[Shard]>,
    owners: RwLock<Vec<Option<Arc<Mailbox>>>>,
}

/// On a pair of cache lines of its own.
#[repr(align(128))]
struct Shard(Mutex<Held>);

struct Held {
    entries: Vec<Entry>,
    /// Number of the next entry: who came first.
    next: u64,
}

impl Held {
    fn conflicts(&self, range: &Range<u64>) -> u32 {
        self.entries.iter().map(|entry| u32::from(entry.overlaps(range))).sum()
    }

    fn push(&mut self, range: &Range<u64>, owner: u16, op: u16) {
        self.entries.push(Entry { start: range.start, end: range.end, number: self.next, owner, op });
        self.next += 1;
    }
}

#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    end: u64,
    number: u64,
    owner: u16,
    op: u16,
}

impl Entry {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.start < range.end && range.start < self.end
    }
}

/// Where an owner finds the requests that got their lock after waiting.
struct Mailbox {
    /// One place per request, so it is never full.
    granted: ArrayQueue<u16>,
    pending: Box<[AtomicU32]>,
    waker: Waker,
}

/// One thread's access to a [`RangeLock`]. Requests are named by numbers below the count given to [`RangeLock::owner`].
pub struct Owner {
    lock: Arc<RangeLock>,
    mailbox: Arc<Mailbox>,
    id: u16,
}

impl RangeLock {
    /// Nothing locked.
    #[must_use]
    pub fn new() -> Self {
        let shard = || Shard(Mutex::new(Held { entries: Vec::with_capacity(SHARD_ENTRIES), next: 0 }));
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), owners: RwLock::default() }
    }

    /// A new owner with `ops` requests; `waker` is its thread's. `None`: there are [`OWNERS_MAX`] already.
    #[must_use]
    pub fn owner(self: &Arc<Self>, ops: u16, waker: Waker) -> Option<Owner> {
        let pending = (0..ops).map(|_| AtomicU32::new(0)).collect();
        let mailbox = Arc::new(Mailbox { granted: ArrayQueue::new(usize::from(ops).max(1)), pending, waker });
        let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
        let id = match owners.iter().position(Option::is_none) {
            Some(free) => free,
            None if owners.len() < OWNERS_MAX => {
                owners.push(None);
                owners.len() - 1
            }
            None => return None,
        };
        owners[id] = Some(Arc::clone(&mailbox));
        Some(Owner { lock: Arc::clone(self), mailbox, id: u16::try_from(id).expect("below OWNERS_MAX") })
    }

    fn shard(&self, index: usize) -> MutexGuard<'_, Held> {
        self.shards[index].0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries in the table, a range over several shards counted once for each. For tests and gauges.
    #[must_use]
    pub fn entries(&self) -> usize {
        (0..SHARDS).map(|index| self.shard(index).entries.len()).sum()
    }
}

impl Default for RangeLock {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RangeLock").field("entries", &self.entries()).finish_non_exhaustive()
    }
}

/// The shards of a range, one bit each.
fn shards_of(range: &Range<u64>) -> u64 {
    assert!(range.start < range.end, "locks are on ranges with bytes in them");
    let (first, last) = (range.start / REGION_BYTES, (range.end - 1) / REGION_BYTES);
    if last - first >= SHARDS as u64 - 1 {
        return u64::MAX;
    }
    let count = u32::try_from(last - first + 1).expect("below the number of shards");
    let shift = u32::try_from(first % SHARDS as u64).expect("below the number of shards");
    ((1_u64 << count) - 1).rotate_left(shift)
}

/// The set bits, ascending.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (bit < 64).then_some(bit as usize)
    })
}

/// Owners to be woken once no mutex is held any more.
#[derive(Default)]
struct WakeSet([u64; OWNERS_MAX / 64]);

impl WakeSet {
    fn add(&mut self, owner: u16) {
        self.0[usize::from(owner) / 64] |= 1 << (owner % 64);
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

impl Owner {
    /// Locks `range` for request `op`, which has no lock and waits for none. `true`: it has the lock now; `false`: it waits its
    /// turn, and [`Self::poll_granted`] will name it.
    ///
    /// # Panics
    /// If the range is empty or `op` is out of range.
    #[must_use]
    pub fn lock(&self, op: u16, range: Range<u64>) -> bool {
        self.insert(op, range, true)
    }

    /// As [`Self::lock`], but does nothing where it would have to wait.
    ///
    /// # Panics
    /// As [`Self::lock`].
    #[must_use]
    pub fn try_lock(&self, op: u16, range: Range<u64>) -> bool {
        self.insert(op, range, false)
    }

    fn insert(&self, op: u16, range: Range<u64>, wait: bool) -> bool {
        let mask = shards_of(&range);
        let pending = &self.mailbox.pending[usize::from(op)];
        if mask.is_power_of_two() {
            // Nearly every request.
            let mut shard = self.lock.shard(mask.trailing_zeros() as usize);
            let conflicts = shard.conflicts(&range);
            if conflicts > 0 && !wait {
                return false;
            }
            pending.store(conflicts, Ordering::Relaxed);
            shard.push(&range, self.id, op);
            return conflicts == 0;
        }
        let mut held: [Option<MutexGuard<'_, Held>>; SHARDS] = [const { None }; SHARDS];
        let mut conflicts = 0;
        for index in bits(mask) {
            let shard = self.lock.shard(index);
            conflicts += shard.conflicts(&range);
            held[index] = Some(shard);
        }
        if conflicts > 0 && !wait {
            return false;
        }
        // Before any shard is let go: whoever lowers it has seen the entry there. Relaxed: the mutexes order it.
        pending.store(conflicts, Ordering::Relaxed);
        held.iter_mut().flatten().for_each(|shard| shard.push(&range, self.id, op));
        conflicts == 0
    }

    /// Gives back the lock of request `op` on `range`, or its place in the queue. Those who have waited for it last get the lock
    /// and are woken on their own thread; own requests are only put where [`Self::poll_granted`] finds them.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn unlock(&self, op: u16, range: Range<u64>) {
        let mut wake = WakeSet::default();
        for index in bits(shards_of(&range)) {
            let mut shard = self.lock.shard(index);
            let mine = |entry: &Entry| entry.owner == self.id && entry.op == op;
            let at = shard.entries.iter().position(mine).expect("what is unlocked was locked");
            let gone = shard.entries.swap_remove(at);
            debug_assert_eq!((gone.start, gone.end), (range.start, range.end));
            for later in shard.entries.iter().filter(|entry| entry.number > gone.number && entry.overlaps(&range)) {
                self.lower(later, &mut wake);
            }
        }
        if !wake.is_empty() {
            self.wake(&wake);
        }
    }

    /// One obstacle less for a waiting request.
    fn lower(&self, entry: &Entry, wake: &mut WakeSet) {
        if entry.owner == self.id {
            self.mailbox.lower(entry.op);
            return;
        }
        let owners = self.lock.owners.read().unwrap_or_else(PoisonError::into_inner);
        let mailbox = owners[usize::from(entry.owner)].as_ref().expect("owners outlive their entries");
        if mailbox.lower(entry.op) {
            wake.add(entry.owner);
        }
    }

    fn wake(&self, wake: &WakeSet) {
        let owners = self.lock.owners.read().unwrap_or_else(PoisonError::into_inner);
        for (base, word) in (0..).step_by(64).zip(wake.0) {
            for bit in bits(word) {
                // An owner that left meanwhile has taken its requests with it.
                if let Some(mailbox) = owners.get(base + bit).and_then(Option::as_ref) {
                    mailbox.waker.wake();
                }
            }
        }
    }

    /// A request that waited and has its lock now.
    #[must_use]
    pub fn poll_granted(&self) -> Option<u16> {
        self.mailbox.granted.pop()
    }
}

impl Mailbox {
    /// Whether that was the last obstacle.
    fn lower(&self, op: u16) -> bool {
        // AcqRel: obstacles in several shards go under several mutexes; the last one to go hands on what the others did.
        let last = self.pending[usize::from(op)].fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            self.granted.push(op).expect("one place per request, and a request is granted once");
        }
        last
    }
}

impl Drop for Owner {
    /// Gives back what it still holds or waits for: its thread died of a bug, and an entry left behind would block its range, and
    /// with it a guest, for good.
    fn drop(&mut self) {
        let mut left = BTreeSet::new();
        for index in 0..SHARDS {
            let shard = self.lock.shard(index);
            let mine = shard.entries.iter().filter(|entry| entry.owner == self.id);
            left.extend(mine.map(|entry| (entry.op, entry.start, entry.end)));
        }
        for (op, start, end) in left {
            self.unlock(op, start..end);
        }
        let mut owners = self.lock.owners.write().unwrap_or_else(PoisonError::into_inner);
        owners[usize::from(self.id)] = None;
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_sets_wrap_and_saturate() {
        assert_eq!(shards_of(&(0..1)), 1);
        assert_eq!(shards_of(&(REGION_BYTES - 1..REGION_BYTES + 1)), 0b11);
        let last = 63 * REGION_BYTES;
        assert_eq!(shards_of(&(last..last + REGION_BYTES + 1)), 1 << 63 | 1);
        assert_eq!(shards_of(&(5..5 + 64 * REGION_BYTES)), u64::MAX);
        assert_eq!(shards_of(&(0..63 * REGION_BYTES)), u64::MAX >> 1);
        assert_eq!(shards_of(&(0..64 * REGION_BYTES)), u64::MAX);
        assert_eq!(bits(0b1001_0001).collect::<Vec<_>>(), [0, 4, 7]);
    }
}
