//! Where a ring lies: a file mapped shared (tmpfs, memfd, regular file), or heap memory for interpreters and simulations.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Error;
use crate::layout::UNIT_BYTES;

/// Heap memory that stands for a ring file: it keeps its content between a drop of the ring and the next open, as a file does
/// between two processes.
#[derive(Clone, Default, Debug)]
pub struct Memory(Arc<MemoryFile>);

#[derive(Default, Debug)]
struct MemoryFile {
    /// (offset, piece), in the order in which they were first mapped.
    pieces: Mutex<Vec<(u64, Arc<HeapPiece>)>>,
    locked: AtomicBool,
}

/// What a ring is mapped from. Holds the lock that keeps a second process (or a second ring over the same memory) out.
#[derive(Debug)]
pub(crate) enum Backing {
    File { file: File, path: PathBuf },
    Memory(Memory),
}

/// Which pages of a mapping are to be in memory (locked, where a limit allows).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Resident {
    /// All, from the start.
    All,
    /// Those that were touched: a sparse bitmap stays sparse.
    AsTouched,
}

impl Backing {
    /// Takes the exclusive lock.
    #[cfg(not(loom))]
    pub(crate) fn file(file: File, path: &Path) -> Result<Self, Error> {
        match file.try_lock() {
            Ok(()) => Ok(Self::File { file, path: path.to_owned() }),
            Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { path: path.to_owned() }),
            Err(std::fs::TryLockError::Error(source)) => {
                Err(Error::Io { action: "lock", path: path.to_owned(), source })
            }
        }
    }

    /// Takes the exclusive lock.
    pub(crate) fn memory(memory: &Memory) -> Result<Self, Error> {
        // Acquire: pairs with the Release in `drop`, so that the next owner sees everything the last one wrote.
        if memory.0.locked.swap(true, Ordering::Acquire) {
            return Err(Error::InUse { path: "<memory>".into() });
        }
        Ok(Self::Memory(memory.clone()))
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } => path,
            Self::Memory(_) => Path::new("<memory>"),
        }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> Result<u64, Error> {
        match self {
            Self::File { file, .. } => Ok(file.metadata().map_err(|e| self.error("read the length of", e))?.len()),
            Self::Memory(memory) => Ok(memory.len()),
        }
    }

    /// Empties it: every byte reads as zero afterwards.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        match self {
            Self::File { file, .. } => file.set_len(0).map_err(|e| self.error("empty", e)),
            Self::Memory(memory) => {
                memory.0.pieces.lock().unwrap_or_else(PoisonError::into_inner).clear();
                Ok(())
            }
        }
    }

    /// Makes it at least `len` bytes long; with `allocate` every byte from `from` on has memory behind it, so that no
    /// later touch can fail (a full tmpfs answers a touch of a hole with SIGBUS).
    pub(crate) fn grow(&self, from: u64, len: u64, allocate: bool) -> Result<(), Error> {
        let Self::File { file, .. } = self else { return Ok(()) };
        if self.len()? < len {
            file.set_len(len).map_err(|e| self.error("extend", e))?;
        }
        if allocate {
            allocate_range(file, from, len - from).map_err(|e| self.error("allocate", e))?;
        }
        Ok(())
    }

    /// Maps `[offset, offset + len)`, which must lie inside; `offset` is a multiple of 4096.
    pub(crate) fn map(&self, offset: u64, len: usize, resident: Resident) -> Result<Mapping, Error> {
        assert!(offset.is_multiple_of(UNIT_BYTES as u64) && len > 0, "mappings start at pages");
        match self {
            Self::File { file, .. } => Mapping::of_file(file, offset, len, resident).map_err(|e| self.error("map", e)),
            Self::Memory(memory) => Ok(memory.map(offset, len)),
        }
    }

    fn error(&self, action: &'static str, source: io::Error) -> Error {
        Error::Io { action, path: self.path().to_owned(), source }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Self::Memory(memory) = self {
            // Release: pairs with the Acquire in `Backing::memory`.
            memory.0.locked.store(false, Ordering::Release);
        }
    }
}

impl Memory {
    /// Empty memory, as a new file is.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A copy of the content, unlocked: what a kill at this moment leaves.
    ///
    /// # Safety
    /// No other thread uses a ring over this memory meanwhile, and no `&mut` to a cell is live.
    #[cfg(all(test, not(loom)))]
    pub(crate) unsafe fn image(&self) -> Self {
        let image = Self::new();
        for (offset, piece) in self.0.pieces.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let copy = HeapPiece::zeroed(piece.layout.size());
            // SAFETY: both are whole allocations of layout.size() bytes, different ones, initialised (zeroed at first), and the
            // caller promised that nobody writes.
            unsafe { copy.ptr.copy_from_nonoverlapping(piece.ptr, piece.layout.size()) };
            image.0.pieces.lock().unwrap_or_else(PoisonError::into_inner).push((*offset, Arc::new(copy)));
        }
        image
    }

    fn len(&self) -> u64 {
        let pieces = self.0.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.iter().map(|(offset, piece)| offset + piece.layout.size() as u64).max().unwrap_or(0)
    }

    fn map(&self, offset: u64, len: usize) -> Mapping {
        let mut pieces = self.0.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        let found = pieces.iter().find(|(at, piece)| *at == offset && piece.layout.size() >= len);
        let piece = match found {
            Some((_, piece)) => Arc::clone(piece),
            None => {
                let piece = Arc::new(HeapPiece::zeroed(len));
                pieces.push((offset, Arc::clone(&piece)));
                piece
            }
        };
        Mapping { ptr: piece.ptr, len, locked: true, kind: Kind::Heap(piece) }
    }
}

#[derive(Debug)]
struct HeapPiece {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the piece is plain memory that it owns until its drop; access goes through a `Mapping`, whose users keep to
// atomics or to exclusive cells.
unsafe impl Send for HeapPiece {}
// SAFETY: as for Send; a shared reference gives nothing but the address.
unsafe impl Sync for HeapPiece {}

impl HeapPiece {
    fn zeroed(len: usize) -> Self {
        let layout = Layout::from_size_align(len, UNIT_BYTES).expect("a page-aligned length far below isize::MAX");
        // SAFETY: the layout's size is not zero: `Backing::map` asserts len > 0.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, layout }
    }
}

impl Drop for HeapPiece {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this very layout; the last `Arc` is gone, so no mapping is left.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

/// A piece of a ring's memory, mapped until dropped. Page-aligned. Hands out nothing but its address: who makes references
/// keeps the mapping alive and to the rules of the shared structures (atomics, or cells owned by exactly one handle).
#[derive(Debug)]
pub(crate) struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    locked: bool,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    #[cfg_attr(loom, allow(dead_code, reason = "the models run over the heap"))]
    File,
    #[allow(dead_code, reason = "kept for its drop")]
    Heap(Arc<HeapPiece>),
}

// SAFETY: a mapping is an address range that stays mapped until drop, from whichever thread; it gives no references itself.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Whether the pages are locked in memory.
    pub(crate) fn locked(&self) -> bool {
        self.locked
    }

    /// The address `offset` bytes in, for `bytes` bytes.
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> NonNull<u8> {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.len), "inside the mapping");
        // SAFETY: offset ≤ len (just asserted), so the result is inside or one past the same mapping.
        unsafe { self.ptr.add(offset) }
    }

    #[cfg(not(any(loom, miri)))]
    fn of_file(file: &File, offset: u64, len: usize, resident: Resident) -> io::Result<Self> {
        use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};

        let length = std::num::NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no other memory. That the file is not cut
        // shorter under us is upheld by the exclusive lock on it and its mode 0600.
        let ptr = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)
        }?
        .cast::<u8>();
        // SAFETY: [ptr, ptr + len) was mapped just above; DONTDUMP changes nothing but core dumps, which must not carry
        // guests' data. A kernel that refuses it leaves the dump as it is.
        let _ = unsafe { madvise(ptr.cast(), len, MmapAdvise::MADV_DONTDUMP) };
        // SAFETY: the mapping made above.
        let locked = unsafe { lock(ptr, len, resident) };
        Ok(Self { ptr, len, locked, kind: Kind::File })
    }

    #[cfg(any(loom, miri))]
    fn of_file(_: &File, _: u64, _: usize, _: Resident) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Locks the pages in memory; false where a limit forbids that.
///
/// # Safety
/// `[ptr, ptr + len)` is one mapping of this process, shared and writable.
#[cfg(not(any(loom, miri)))]
unsafe fn lock(ptr: NonNull<u8>, len: usize, resident: Resident) -> bool {
    let flags = match resident {
        Resident::All => 0,
        Resident::AsTouched => libc::MLOCK_ONFAULT,
    };
    // SAFETY: the caller's mapping; locking changes residency only.
    if unsafe { libc::mlock2(ptr.as_ptr().cast(), len, flags) } == 0 {
        return true;
    }
    if resident == Resident::All {
        // At least no first-touch faults on the way of a write. A kernel without it (before 5.14) faults later.
        // SAFETY: the caller's mapping; populating writes nothing.
        let _ = unsafe { libc::madvise(ptr.as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
    }
    false
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match &self.kind {
            #[cfg(not(any(loom, miri)))]
            Kind::File => {
                // SAFETY: mapped by `of_file` with this length and unmapped only here; whoever made references into it
                // holds (an Arc of) this mapping, so none is left. Failure is impossible for a range that is mapped.
                let _ = unsafe { nix::sys::mman::munmap(self.ptr.cast(), self.len) };
            }
            #[cfg(any(loom, miri))]
            Kind::File => {}
            Kind::Heap(_) => {}
        }
    }
}

#[cfg(not(any(loom, miri)))]
fn allocate_range(file: &File, from: u64, len: u64) -> io::Result<()> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    let len = i64::try_from(len).map_err(io::Error::other)?;
    match nix::fcntl::fallocate(file, nix::fcntl::FallocateFlags::empty(), from, len) {
        // File systems without fallocate: the bytes are there, only not promised.
        Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(any(loom, miri))]
fn allocate_range(_: &File, _: u64, _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A slice of shared structures inside a mapping (in the models: a slice of its own).
pub(crate) struct View<T> {
    #[cfg(not(loom))]
    ptr: NonNull<T>,
    #[cfg(not(loom))]
    len: usize,
    #[cfg(loom)]
    items: Box<[T]>,
}

#[cfg(not(loom))]
impl<T> View<T> {
    /// # Safety
    /// `[offset, offset + len * size_of::<T>())` of `mapping` holds valid `T` (structures of atomics: any bytes), is only
    /// ever accessed as such while the view exists, and the owner of the view keeps `mapping` alive at least as long.
    pub(crate) unsafe fn new(mapping: &Mapping, offset: usize, len: usize) -> Self {
        let ptr = mapping.at(offset, len * size_of::<T>()).cast::<T>();
        assert!(ptr.is_aligned(), "the layout aligns every structure");
        Self { ptr, len }
    }
}

#[cfg(loom)]
impl<T> View<T> {
    pub(crate) fn owned(len: usize, make: impl Fn() -> T) -> Self {
        Self { items: (0..len).map(|_| make()).collect() }
    }
}

impl<T> Deref for View<T> {
    type Target = [T];

    #[cfg(not(loom))]
    fn deref(&self) -> &[T] {
        // SAFETY: `new`'s caller promised valid `T` for `len` items for as long as the view exists, only shared access
        // (T is made of atomics), and the alignment was asserted there.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    #[cfg(loom)]
    fn deref(&self) -> &[T] {
        &self.items
    }
}

// SAFETY: a view is a shared reference to `[T]`; sending or sharing it is sharing `T`.
#[cfg(not(loom))]
unsafe impl<T: Sync> Send for View<T> {}
// SAFETY: as for Send.
#[cfg(not(loom))]
unsafe impl<T: Sync> Sync for View<T> {}

impl<T> std::fmt::Debug for View<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} items]", self.len())
    }
}
