//! A whole block device as a [`crate::StorageFile`]: aligned direct I/O below, any range above.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::fcntl::FallocateFlags;

use crate::dir_storage::{allocate, is_unsupported};
use crate::{AlignedBuf, Backing};

/// Bytes that go through a thread's aligned buffer at once: two slots of a base.
const BOUNCE_BYTES: usize = 128 << 10;
/// Bytes zeroed by one call: short enough that a device which writes zeroes itself is not asked for minutes of work at once.
const ZERO_BYTES_MAX: u64 = 1 << 30;

thread_local! {
    static BOUNCE: RefCell<AlignedBuf> = RefCell::new(AlignedBuf::zeroed(BOUNCE_BYTES));
}

/// The device's own calls that make a range zero, best first; what it has refused once is not tried again. `fallocate` on a
/// block device is `BLKZEROOUT`, with and without leave to unmap.
const METHODS: [FallocateFlags; 2] = [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE];

/// An open device.
#[derive(Debug)]
pub(crate) struct DeviceFile {
    backing: Backing,
    /// Of [`METHODS`], the first that was not refused; beyond them zeroes are written.
    method: AtomicU8,
}

impl DeviceFile {
    pub(crate) fn new(backing: Backing) -> Self {
        Self { backing, method: AtomicU8::new(0) }
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.backing.geometry.size
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        self.backing.file.sync_data()
    }

    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.is_inside(offset, buf.len() as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.through_bounce(offset, buf.len(), |bounce, aligned, part, piece| {
            self.backing.file.read_exact_at(bounce, aligned)?;
            buf[piece].copy_from_slice(&bounce[part]);
            Ok(())
        })
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if !self.is_inside(offset, bytes.len() as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the device"));
        }
        self.through_bounce(offset, bytes.len(), |bounce, aligned, part, piece| {
            if part.len() < bounce.len() {
                // A block is written whole: what surrounds the bytes stays.
                self.backing.file.read_exact_at(bounce, aligned)?;
            }
            bounce[part].copy_from_slice(&bytes[piece]);
            self.backing.file.write_all_at(bounce, aligned)
        })
    }

    /// The range reads as zeroes afterwards.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.size());
        let block = u64::from(self.backing.geometry.logical_block);
        let first = offset.next_multiple_of(block).min(end);
        let last = (end / block * block).max(first);
        self.write_zeroes(offset, first)?;
        let mut at = first;
        while at < last {
            let step = (last - at).min(ZERO_BYTES_MAX);
            self.zero_blocks(at, at + step)?;
            at += step;
        }
        self.write_zeroes(last, end)
    }

    fn zero_blocks(&self, at: u64, end: u64) -> io::Result<()> {
        loop {
            let method = self.method.load(Ordering::Relaxed);
            let Some(flags) = METHODS.get(usize::from(method)) else { return self.write_zeroes(at, end) };
            match allocate(&self.backing.file, *flags | FallocateFlags::FALLOC_FL_KEEP_SIZE, at, end - at) {
                Err(error) if is_unsupported(&error) => {
                    // Two threads may find the same: then one of them has moved on already.
                    let _ = self.method.compare_exchange(method, method + 1, Ordering::Relaxed, Ordering::Relaxed);
                }
                done => return done,
            }
        }
    }

    fn write_zeroes(&self, mut at: u64, end: u64) -> io::Result<()> {
        static ZEROES: [u8; BOUNCE_BYTES] = [0; BOUNCE_BYTES];
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            self.write_at(&ZEROES[..bytes], at)?;
            at += bytes as u64;
        }
        Ok(())
    }

    fn is_inside(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size())
    }

    /// Calls `run` for each piece of a range: an aligned buffer for whole blocks, where these begin on the device, the piece
    /// within the buffer, the piece within the range.
    fn through_bounce(
        &self,
        offset: u64,
        len: usize,
        mut run: impl FnMut(&mut [u8], u64, Range<usize>, Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let block = if self.backing.direct { self.backing.geometry.logical_block as usize } else { 1 };
        BOUNCE.with_borrow_mut(|bounce| {
            let mut done = 0;
            while done < len {
                let position = offset + done as u64;
                let aligned = position / block as u64 * block as u64;
                let start = usize::try_from(position - aligned).expect("less than a block");
                let bytes = (len - done).min(BOUNCE_BYTES - start);
                let whole = (start + bytes).next_multiple_of(block);
                run(&mut bounce[..whole], aligned, start..start + bytes, done..done + bytes)?;
                done += bytes;
            }
            Ok(())
        })
    }
}
