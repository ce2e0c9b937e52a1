//! The ring's table of registered files.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use io_uring::IoUring;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};

use crate::FileSlot;
use crate::clock::now;

/// Most files and sockets of one reactor. Fewer where `RLIMIT_NOFILE` says so (the kernel refuses a larger table).
const FILES_MAX: u32 = 1024;

/// Below this there is no point in going on: a listener, a device and a few connections.
const FILES_MIN: u32 = 16;

/// Invariants: an entry with operations is never reused; `ops` counts the operations in the table of the reactor that
/// name the entry, handed to the kernel or not.
pub(super) struct Files {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

struct Entry {
    held: Held,
    ops: u32,
    /// To be released when `ops` is 0.
    closing: bool,
    inline: Inline,
    /// A character device: its driver may take ordinary memory only (ublk refuses registered buffers).
    no_regions: bool,
    /// Operations that still go through the ring after an inline one was slow.
    pause: u32,
}

impl Entry {
    const FREE: Self =
        Self { held: Held::Nothing, ops: 0, closing: false, inline: Inline::Nothing, no_regions: false, pause: 0 };
}

/// Which transfers are done by a plain system call on the reactor's thread instead of through the ring.
///
/// The ring hands a buffered write to a kernel worker wherever the file system cannot do it without waiting: ext4 and tmpfs
/// never can, and tmpfs not even a read. That hand-over costs several times what the copy into the page cache does
/// (measured on tmpfs, 4 KiB at depth 32: 100 k writes/s through the workers, 330 k/s inline). Whole pages need no read
/// first, so such a write waits only where the kernel throttles dirty pages or commits its journal; if one does, the ring
/// takes over for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Inline {
    Nothing,
    /// Cached, on a file system that cannot write without waiting.
    PageWrites,
    /// In memory anyway.
    Transfers,
}

/// An inline transfer longer than this has waited for something: two orders above the copy of the largest request.
const INLINE_SLOW: Duration = Duration::from_millis(2);

/// Transfers that go through the ring afterwards: some queue depths, so that a disk under load is probed rarely.
const INLINE_PAUSE_OPS: u32 = 512;

const PAGE: u64 = 4096;

fn inline_mode(file: &File) -> Inline {
    let cached =
        fcntl(file, FcntlArg::F_GETFL).is_ok_and(|flags| !OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT));
    if !cached || !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Inline::Nothing;
    }
    match fstatfs(file).map(|status| status.filesystem_type()) {
        Ok(TMPFS_MAGIC) => Inline::Transfers,
        Ok(EXT4_SUPER_MAGIC) => Inline::PageWrites,
        Ok(_) | Err(_) => Inline::Nothing,
    }
}

enum Held {
    Nothing,
    File(Arc<File>),
    Socket(OwnedFd),
}

impl Held {
    fn raw(&self) -> Option<RawFd> {
        match self {
            Self::Nothing => None,
            Self::File(file) => Some(file.as_raw_fd()),
            Self::Socket(socket) => Some(socket.as_raw_fd()),
        }
    }
}

impl Files {
    pub(super) fn new(ring: &IoUring) -> io::Result<Self> {
        let mut count = FILES_MAX;
        while let Err(error) = ring.submitter().register_files_sparse(count) {
            if error.raw_os_error() != Some(libc::EMFILE) || count / 2 < FILES_MIN {
                return Err(error);
            }
            count /= 2;
        }
        let entries = (0..count).map(|_| Entry::FREE).collect();
        Ok(Self { entries, free: (0..count).rev().collect() })
    }

    pub(super) fn add_file(&mut self, ring: &IoUring, file: Arc<File>) -> io::Result<FileSlot> {
        self.add(ring, Held::File(file))
    }

    pub(super) fn add_socket(&mut self, ring: &IoUring, socket: OwnedFd) -> io::Result<FileSlot> {
        self.add(ring, Held::Socket(socket))
    }

    fn add(&mut self, ring: &IoUring, held: Held) -> io::Result<FileSlot> {
        let raw = held.raw().expect("both callers hold something");
        let Some(slot) = self.free.pop() else {
            let full = format!("file table of the ring is full: {} entries", self.entries.len());
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, full));
        };
        if let Err(error) = ring.submitter().register_files_update(slot, &[raw]) {
            self.free.push(slot);
            return Err(error);
        }
        let inline = match &held {
            Held::File(file) => inline_mode(file),
            Held::Socket(_) | Held::Nothing => Inline::Nothing,
        };
        let no_regions = match &held {
            Held::File(file) => file.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device()),
            Held::Socket(_) | Held::Nothing => false,
        };
        self.entries[slot as usize] = Entry { held, inline, no_regions, ..Entry::FREE };
        Ok(FileSlot(slot))
    }

    /// The descriptor of an entry that is in use.
    pub(super) fn raw(&self, slot: FileSlot) -> Option<RawFd> {
        self.entries.get(slot.0 as usize).and_then(|entry| entry.held.raw())
    }

    pub(super) fn is_closing(&self, slot: FileSlot) -> bool {
        self.entries[slot.0 as usize].closing
    }

    /// Whether buffers named in an operation on the entry may be registered ones.
    pub(super) fn takes_regions(&self, slot: FileSlot) -> bool {
        !self.entries[slot.0 as usize].no_regions
    }

    /// Whether the transfer is to be done inline now.
    pub(super) fn wants_inline(&mut self, slot: FileSlot, write: bool, offset: u64, len: u32) -> bool {
        let entry = &mut self.entries[slot.0 as usize];
        let suits = match entry.inline {
            Inline::Nothing => false,
            Inline::PageWrites => write && offset.is_multiple_of(PAGE) && u64::from(len).is_multiple_of(PAGE),
            Inline::Transfers => true,
        };
        let paused = suits && entry.pause > 0;
        entry.pause -= u32::from(paused);
        suits && !paused
    }

    /// Runs an inline transfer and judges its time.
    pub(super) fn time_inline(&mut self, slot: FileSlot, transfer: impl FnOnce(RawFd) -> i32) -> i32 {
        let entry = &mut self.entries[slot.0 as usize];
        let raw = entry.held.raw().expect("an operation holds its entry");
        let start = now();
        let result = transfer(raw);
        if now() - start > INLINE_SLOW {
            entry.pause = INLINE_PAUSE_OPS;
        }
        result
    }

    /// Lets go of all files before the ring does, which would do so some time later.
    pub(super) fn release_all(&mut self, ring: &IoUring) {
        // Fails only if the table was never made.
        let _ = ring.submitter().unregister_files();
        self.entries.clear();
    }

    /// One more operation on the entry.
    ///
    /// # Panics
    /// If the slot was not given out or was given back: the operation would hit whatever comes there next.
    pub(super) fn begin(&mut self, slot: FileSlot) {
        let entry = self.entries.get_mut(slot.0 as usize).expect("a slot of this reactor");
        assert!(entry.held.raw().is_some() && !entry.closing, "file slot {} used after it was given back", slot.0);
        entry.ops += 1;
    }

    /// One operation less.
    pub(super) fn end(&mut self, ring: &IoUring, slot: FileSlot) {
        let entry = &mut self.entries[slot.0 as usize];
        entry.ops -= 1;
        if entry.closing && entry.ops == 0 {
            self.release(ring, slot);
        }
    }

    /// Gives the entry back once its last operation has ended.
    pub(super) fn close(&mut self, ring: &IoUring, slot: FileSlot) {
        let entry = &mut self.entries[slot.0 as usize];
        if entry.held.raw().is_none() || entry.closing {
            return;
        }
        entry.closing = true;
        if entry.ops == 0 {
            self.release(ring, slot);
        }
    }

    fn release(&mut self, ring: &IoUring, slot: FileSlot) {
        // If the kernel cannot clear its entry, that file stays open until the ring ends; the slot may still be used
        // again, because an update replaces what is there.
        let _ = ring.submitter().register_files_update(slot.0, &[-1]);
        self.entries[slot.0 as usize] = Entry::FREE;
        self.free.push(slot.0);
    }
}
