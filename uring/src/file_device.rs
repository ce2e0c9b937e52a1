//! A block device that is nothing but a file or another block device: no capture, no history.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use crate::backing::{seek_data, seek_hole};
use crate::{
    AlignedBuf, Allocate, Backing, BackingOptions, BlockDevice, BlockQueue, BufPool, Completion, Done, Errno, Extent,
    FileSlot, Geometry, Io, Op, Purpose, Request, Token, Trouble, guest_errno, open_backing,
};

/// Serves a [`Backing`] as it is. Buffers come from a pool per queue; in the steady state nothing is allocated.
#[derive(Debug)]
pub struct FileDevice {
    backing: Backing,
}

impl FileDevice {
    /// Opens and serves `path`.
    ///
    /// # Errors
    /// As [`open_backing`].
    pub fn open(path: &Path, options: BackingOptions) -> io::Result<Self> {
        open_backing(path, options).map(Self::new)
    }

    /// Serves what is open already.
    #[must_use]
    pub fn new(backing: Backing) -> Self {
        Self { backing }
    }

    /// What it stands on.
    #[must_use]
    pub fn backing(&self) -> &Backing {
        &self.backing
    }
}

/// Most extents of one answer; the caller asks again from where it ends.
const EXTENTS_MAX: usize = 1024;

/// Free buffers kept per queue, by size: the usual depth of 32 to 256 small requests, and enough to stream.
const POOL: [(usize, usize); 4] = [(4 << 10, 256), (32 << 10, 64), (256 << 10, 32), (1 << 20, 16)];

impl BlockDevice for FileDevice {
    type Buf = AlignedBuf;
    type Queue = FileQueue;

    fn geometry(&self) -> Geometry {
        self.backing.geometry
    }

    fn open_queue<I: Io<AlignedBuf>>(&self, io: &mut I) -> io::Result<FileQueue> {
        let file = io.register(Arc::clone(&self.backing.file))?;
        Ok(FileQueue {
            file,
            read_only: self.backing.geometry.read_only,
            pool: BufPool::new(&POOL),
            done: VecDeque::new(),
            zeroing: Vec::new(),
            free: Vec::new(),
            no_punch: false,
            no_zero_range: false,
        })
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        let data = |len| Extent { len, hole: false, zero: false };
        if self.backing.is_block_device {
            return Ok(vec![data(len)]);
        }
        let block = u64::from(self.backing.geometry.logical_block);
        let file = self.backing.file.as_fd();
        let end = offset + len;
        let (mut at, mut found) = (offset, Vec::new());
        while at < end && found.len() < EXTENTS_MAX {
            // A block with any data counts as data.
            let start = match seek_data(file, at) {
                Ok(start) => start.map_or(end, |start| start / block * block).clamp(at, end),
                // A file system that cannot tell: all of it is data.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => at,
                Err(error) => return Err(guest_errno(&error)),
            };
            if start > at {
                found.push(Extent { len: start - at, hole: true, zero: true });
                at = start;
                continue;
            }
            let stop = match seek_hole(file, at) {
                Ok(stop) => stop.map_or(end, |stop| stop.next_multiple_of(block)).min(end),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => end,
                Err(error) => return Err(guest_errno(&error)),
            };
            // The file may have changed between the two calls; a step is at least one block.
            let stop = stop.max((at + block).min(end));
            found.push(data(stop - at));
            at = stop;
        }
        Ok(found)
    }
}

/// One thread's part of a [`FileDevice`].
pub struct FileQueue {
    file: FileSlot,
    read_only: bool,
    pool: BufPool,
    done: VecDeque<Done<AlignedBuf>>,
    /// Discards and zeroes under way, which may take several operations each; bounded by the front end's tags.
    zeroing: Vec<Option<Zeroing>>,
    free: Vec<u32>,
    /// What the file system has refused once is not tried again.
    no_punch: bool,
    no_zero_range: bool,
}

/// Ways to make a range read as zeroes; where the file system lacks one, the next is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Method {
    Punch,
    ZeroRange,
    Write,
}

#[derive(Debug)]
struct Zeroing {
    tag: u32,
    at: u64,
    end: u64,
    method: Method,
    fua: bool,
}

/// What a token's operation is; the low half of the token is the tag, or the index in `zeroing`.
const READ: u64 = 0;
const WRITE: u64 = 1 << 32;
const FLUSH: u64 = 2 << 32;
const ZERO: u64 = 3 << 32;
const KIND: u64 = 3 << 32;

/// Zeroes per write where nothing better is supported.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

impl BlockQueue for FileQueue {
    type Buf = AlignedBuf;

    fn buffer(&mut self, _purpose: Purpose, len: u32) -> AlignedBuf {
        self.pool.take(len as usize)
    }

    fn submit<I: Io<AlignedBuf>>(&mut self, io: &mut I, tag: u32, request: Request<AlignedBuf>) {
        let file = self.file;
        let token = |kind| Token::device(kind | u64::from(tag));
        match request {
            Request::Read { offset, len, buf } => io.submit(token(READ), Op::Read { file, offset, buf, len }),
            Request::Flush if self.read_only => self.done.push_back(Done { tag, result: Ok(()), buf: None }),
            Request::Flush => io.submit(token(FLUSH), Op::Sync { file }),
            Request::Write { .. } | Request::Discard { .. } | Request::WriteZeroes { .. } if self.read_only => {
                self.done.push_back(Done { tag, result: Err(Errno(libc::EROFS)), buf: None });
            }
            Request::Write { offset, len, buf, fua } => {
                io.submit(token(WRITE), Op::Write { file, offset, buf, len, dsync: fua });
            }
            Request::Discard { offset, len } => self.zero(io, tag, offset, len, false, Method::Punch),
            Request::WriteZeroes { offset, len, fua, no_hole } => {
                self.zero(io, tag, offset, len, fua, if no_hole { Method::ZeroRange } else { Method::Punch });
            }
        }
    }

    fn handle_completion<I: Io<AlignedBuf>>(&mut self, io: &mut I, completion: Completion<AlignedBuf>) {
        let Completion { token, result, buf } = completion;
        let value = token.value();
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the tag or index")]
        let low = value as u32;
        if value & KIND == ZERO {
            return self.zeroed(io, low, result, buf);
        }
        let result = result.map(|_| ()).map_err(|error| guest_errno(&error));
        // A write's buffer goes back to the pool.
        let buf = if value & KIND == READ { buf } else { None };
        self.done.push_back(Done { tag: low, result, buf });
    }

    fn handle_wake<I: Io<AlignedBuf>>(&mut self, _io: &mut I) {}

    fn poll_done(&mut self) -> Option<Done<AlignedBuf>> {
        self.done.pop_front()
    }

    fn close<I: Io<AlignedBuf>>(&mut self, io: &mut I) {
        io.unregister(self.file);
    }
}

impl FileQueue {
    fn zero<I: Io<AlignedBuf>>(&mut self, io: &mut I, tag: u32, offset: u64, len: u64, fua: bool, method: Method) {
        if len == 0 {
            self.done.push_back(Done { tag, result: Ok(()), buf: None });
            return;
        }
        let zeroing = Zeroing { tag, at: offset, end: offset + len, method: self.supported(method), fua };
        let index = self.free.pop().unwrap_or_else(|| {
            self.zeroing.push(None);
            u32::try_from(self.zeroing.len() - 1).expect("no more than tags, which are u32")
        });
        self.zeroing[index as usize] = Some(zeroing);
        self.zero_step(io, index, None);
    }

    /// The wanted method, or the next one that was not refused.
    fn supported(&self, wanted: Method) -> Method {
        match wanted {
            Method::Punch if !self.no_punch => Method::Punch,
            Method::Punch | Method::ZeroRange if !self.no_zero_range => Method::ZeroRange,
            Method::Punch | Method::ZeroRange | Method::Write => Method::Write,
        }
    }

    /// Submits the next operation of a zeroing that is not at its end.
    fn zero_step<I: Io<AlignedBuf>>(&mut self, io: &mut I, index: u32, zeroes: Option<AlignedBuf>) {
        let zeroing = self.zeroing[index as usize].as_ref().expect("under way");
        let (file, offset, left) = (self.file, zeroing.at, zeroing.end - zeroing.at);
        let op = match zeroing.method {
            Method::Punch => Op::Allocate { file, mode: Allocate::PunchHole, offset, len: left },
            Method::ZeroRange => Op::Allocate { file, mode: Allocate::ZeroRange, offset, len: left },
            Method::Write => {
                let bytes = left.min(ZERO_WRITE_BYTES);
                let buf = zeroes.unwrap_or_else(|| AlignedBuf::zeroed(usize::try_from(bytes).expect("at most 1 MiB")));
                Op::Write { file, offset, buf, len: u32::try_from(bytes).expect("at most 1 MiB"), dsync: zeroing.fua }
            }
        };
        io.submit(Token::device(ZERO | u64::from(index)), op);
    }

    fn zeroed<I: Io<AlignedBuf>>(&mut self, io: &mut I, index: u32, result: io::Result<u32>, buf: Option<AlignedBuf>) {
        let zeroing = self.zeroing[index as usize].as_mut().expect("under way");
        let result = match result {
            Err(error) if zeroing.method != Method::Write && is_unsupported(&error) && zeroing.at < zeroing.end => {
                let refused = zeroing.method;
                if refused == Method::Punch {
                    self.no_punch = true
                } else {
                    self.no_zero_range = true
                }
                let method = self.supported(refused);
                self.zeroing[index as usize].as_mut().expect("under way").method = method;
                return self.zero_step(io, index, None);
            }
            Err(error) => Err(guest_errno(&error)),
            Ok(bytes) if zeroing.method == Method::Write => {
                zeroing.at += u64::from(bytes);
                if zeroing.at < zeroing.end {
                    return self.zero_step(io, index, buf);
                }
                Ok(())
            }
            Ok(_) if zeroing.fua && zeroing.at < zeroing.end => {
                // `fallocate` has no FUA: sync, and come back here with nothing left.
                zeroing.at = zeroing.end;
                return io.submit(Token::device(ZERO | u64::from(index)), Op::Sync { file: self.file });
            }
            Ok(_) => Ok(()),
        };
        let tag = zeroing.tag;
        self.zeroing[index as usize] = None;
        self.free.push(index);
        self.done.push_back(Done { tag, result, buf: None });
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    Trouble::of(error) == Trouble::Unsupported
}
