//! The descriptors of one queue: memory of the kernel, mapped for reading.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::sys::{IoDescriptor, QUEUE_DEPTH_MAX};

const PAGE: usize = 4096;

/// Bytes of a queue's descriptors, as the kernel lays them out.
const fn bytes(depth: u16) -> usize {
    (depth as usize * size_of::<IoDescriptor>()).next_multiple_of(PAGE)
}

/// One queue's descriptors, by tag.
pub(crate) struct Descriptors {
    start: NonNull<IoDescriptor>,
    depth: u16,
}

impl Descriptors {
    /// Maps them from `/dev/ublkcN`.
    pub(crate) fn map(file: &File, qid: u16, depth: u16) -> io::Result<Self> {
        let len = NonZeroUsize::new(bytes(depth)).ok_or(io::ErrorKind::InvalidInput)?;
        let position = usize::from(qid) * bytes(QUEUE_DEPTH_MAX);
        let position = libc::off_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file, position) }?;
        Ok(Self { start: start.cast(), depth })
    }

    /// The descriptor of `tag`. To be read between the end of the tag's command and its answer: then it is still.
    ///
    /// # Panics
    /// If `tag` is beyond the depth.
    pub(crate) fn read(&self, tag: u16) -> IoDescriptor {
        assert!(tag < self.depth, "tag {tag} beyond the depth {}", self.depth);
        // SAFETY: the mapping holds `depth` descriptors, is page-aligned, lives as long as `self`, and any bytes are an
        // `IoDescriptor`. The kernel wrote it before it ended the command, and the ring's read of that completion orders
        // this read after; volatile, because another writer exists.
        unsafe { self.start.add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and no reference to it is handed out.
        let unmapped = unsafe { munmap(self.start.cast(), bytes(self.depth)) };
        debug_assert!(unmapped.is_ok(), "unmapping what was mapped: {unmapped:?}");
    }
}
