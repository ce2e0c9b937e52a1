//! Buffers that may be lent to the kernel.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use stable_deref_trait::StableDeref;

/// A buffer whose bytes stay at one address while it is moved, and which the submitter can give away for the time of an
/// operation: `Deref` to the bytes, [`StableDeref`], owned, sendable.
pub trait IoBuf: StableDeref + DerefMut<Target = [u8]> + Send + 'static {}

impl<T: StableDeref + DerefMut<Target = [u8]> + Send + 'static> IoBuf for T {}

/// Owned memory aligned to [`AlignedBuf::ALIGN`], so that it serves direct I/O on every file system.
///
/// Invariants: the memory is `capacity` bytes, all initialised; `len <= capacity`; it belongs to this value alone.
pub struct AlignedBuf {
    start: NonNull<u8>,
    capacity: usize,
    len: usize,
    /// Where the memory goes on drop.
    pool: Option<Arc<Shelf>>,
}

// SAFETY: the memory behind `start` belongs to this value alone (no other pointer to it exists outside of borrows of the
// value), and bytes have no affinity to a thread; the pool is `Sync`.
unsafe impl Send for AlignedBuf {}

// SAFETY: a shared reference gives only shared access to the bytes.
unsafe impl Sync for AlignedBuf {}

// SAFETY: `deref` returns the memory at `start`, which moves neither with the value nor with `set_len`; it is released
// only on drop.
unsafe impl StableDeref for AlignedBuf {}

impl AlignedBuf {
    /// Bytes; the page size, which is the largest alignment that direct I/O asks for.
    pub const ALIGN: usize = 4096;

    /// A buffer of `capacity` zero bytes, with a length of all of them.
    ///
    /// # Panics
    /// If `capacity` is beyond `isize::MAX`; aborts where memory is exhausted, as `Vec` does.
    #[must_use]
    pub fn zeroed(capacity: usize) -> Self {
        Self { start: allocate(capacity), capacity, len: capacity, pool: None }
    }

    /// Bytes that [`Self::set_len`] can reach.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the visible length in bytes. Bytes that come into view hold what was last written there, or zero.
    ///
    /// # Panics
    /// If `len` is beyond the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "length {len} beyond the capacity {}", self.capacity);
        self.len = len;
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `capacity >= len` initialised bytes (zeroed at allocation, never uninitialised
        // since); the borrow of `self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the exclusive borrow of the only owner keeps readers away.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // No content: it may be a guest's data.
        f.debug_struct("AlignedBuf").field("len", &self.len).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let memory = Memory { start: self.start, capacity: self.capacity };
        match self.pool.take() {
            Some(shelf) => shelf.put(memory),
            None => drop(memory),
        }
    }
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity.max(1), AlignedBuf::ALIGN)
        .expect("capacity is at most isize::MAX, rounded up to a page")
}

fn allocate(capacity: usize) -> NonNull<u8> {
    let layout = layout(capacity);
    // SAFETY: the layout's size is not zero (`max(1)`).
    let start = unsafe { alloc_zeroed(layout) };
    NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Memory of an [`AlignedBuf`] at rest.
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: sole owner of the bytes, as for `AlignedBuf`.
unsafe impl Send for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `start` came from `allocate(capacity)` with the same layout, and this value is its only owner.
        unsafe { dealloc(self.start.as_ptr(), layout(self.capacity)) }
    }
}

/// Free buffers of a few sizes, to which an [`AlignedBuf`] returns when it is dropped, on whichever thread.
///
/// Bounded: each class keeps at most the given number of buffers, more are released. The content of a reused buffer is
/// what was there before.
#[derive(Clone)]
pub struct BufPool {
    shelves: Arc<[Arc<Shelf>]>,
}

struct Shelf {
    capacity: usize,
    free: ArrayQueue<Memory>,
}

impl Shelf {
    fn put(&self, memory: Memory) {
        // A full shelf gives the memory back, and it is released.
        let _surplus = self.free.push(memory);
    }
}

impl BufPool {
    /// A pool with one class per `(capacity in bytes, most buffers kept)`.
    #[must_use]
    pub fn new(classes: &[(usize, usize)]) -> Self {
        let mut classes = classes.to_vec();
        classes.sort_unstable();
        let shelf = |(capacity, kept): (usize, usize)| Arc::new(Shelf { capacity, free: ArrayQueue::new(kept.max(1)) });
        Self { shelves: classes.into_iter().map(shelf).collect() }
    }

    /// A buffer with the length `len`: a free one of the smallest class that holds it, or a new one of that class. Beyond
    /// the largest class it is fresh memory that is released on drop.
    #[must_use]
    pub fn take(&self, len: usize) -> AlignedBuf {
        let Some(shelf) = self.shelves.iter().find(|shelf| shelf.capacity >= len) else {
            return AlignedBuf::zeroed(len);
        };
        let start = match shelf.free.pop() {
            // The memory's owner changes from the shelf's entry to the buffer.
            Some(memory) => std::mem::ManuallyDrop::new(memory).start,
            None => allocate(shelf.capacity),
        };
        AlignedBuf { start, capacity: shelf.capacity, len, pool: Some(Arc::clone(shelf)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_keeps_its_address_when_moved() {
        for capacity in [0, 1, 511, 4096, 70_000] {
            let buffer = AlignedBuf::zeroed(capacity);
            assert_eq!((buffer.len(), buffer.capacity()), (capacity, capacity));
            assert_eq!(buffer.as_ptr().addr() % AlignedBuf::ALIGN, 0);
            assert!(buffer.iter().all(|&byte| byte == 0));
            let address = buffer.as_ptr();
            let moved = [buffer];
            assert_eq!(moved[0].as_ptr(), address);
        }
    }

    #[test]
    fn length_moves_within_the_capacity_and_keeps_the_bytes() {
        let mut buffer = AlignedBuf::zeroed(8);
        buffer.copy_from_slice(b"abcdefgh");
        buffer.set_len(3);
        assert_eq!(&buffer[..], b"abc");
        buffer.set_len(8);
        assert_eq!(&buffer[..], b"abcdefgh");
    }

    #[test]
    #[should_panic(expected = "beyond the capacity")]
    fn length_beyond_the_capacity_is_refused() {
        AlignedBuf::zeroed(8).set_len(9);
    }

    #[test]
    fn pool_reuses_memory_of_the_class_and_keeps_no_more_than_told() {
        let pool = BufPool::new(&[(65536, 1), (4096, 2)]);
        let first = pool.take(512);
        assert_eq!((first.len(), first.capacity()), (512, 4096));
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(4096).as_ptr(), address, "the freed buffer comes back");
        let three: Vec<_> = (0..3).map(|_| pool.take(4096)).collect();
        drop(three);
        assert_eq!(pool.shelves[0].free.len(), 2);
        assert_eq!(pool.take(4097).capacity(), 65536);
        assert_eq!(pool.take(70_000).capacity(), 70_000, "beyond the classes");
    }
}
