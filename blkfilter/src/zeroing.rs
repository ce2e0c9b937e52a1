//! Making a range of the backing device read as zeroes, in as many operations as the file system needs.

use std::io;

use farshore_uring::{AlignedBuf, Allocate, FileSlot, Op, Trouble};

use crate::Buf;

/// Ways to make a range read as zeroes; where the file system lacks one, the next is tried.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Method {
    Punch,
    ZeroRange,
    Write,
}

/// Zeroes per write where nothing better is supported.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

/// One discard or write-zeroes under way; at most one operation of it is in flight.
#[derive(Debug)]
pub(crate) struct Zeroing {
    at: u64,
    end: u64,
    method: Method,
    fua: bool,
}

/// What follows an operation's end.
#[derive(Debug)]
pub(crate) enum Step {
    Next(Op<Buf>),
    Ended(io::Result<()>),
}

impl Zeroing {
    /// A non-empty range.
    pub(crate) fn new(offset: u64, len: u64, method: Method, fua: bool) -> Self {
        Self { at: offset, end: offset + len, method, fua }
    }

    /// The first operation.
    pub(crate) fn start(&self, file: FileSlot) -> Op<Buf> {
        self.op(file, None)
    }

    fn op(&self, file: FileSlot, zeroes: Option<Buf>) -> Op<Buf> {
        let (offset, left) = (self.at, self.end - self.at);
        match self.method {
            Method::Punch => Op::Allocate { file, mode: Allocate::PunchHole, offset, len: left },
            Method::ZeroRange => Op::Allocate { file, mode: Allocate::ZeroRange, offset, len: left },
            Method::Write => {
                let bytes = left.min(ZERO_WRITE_BYTES);
                let fresh = || Buf::Other(AlignedBuf::zeroed(usize::try_from(bytes).expect("at most 1 MiB")));
                let len = u32::try_from(bytes).expect("at most 1 MiB");
                Op::Write { file, offset, buf: zeroes.unwrap_or_else(fresh), len, dsync: self.fua }
            }
        }
    }

    /// An operation ended. `best` is the first method not refused so far on this file.
    pub(crate) fn handle(
        &mut self,
        file: FileSlot,
        result: io::Result<u32>,
        buf: Option<Buf>,
        best: &mut Method,
    ) -> Step {
        let unsupported = |error: &io::Error| Trouble::of(error) == Trouble::Unsupported;
        match result {
            Err(error) if self.method != Method::Write && unsupported(&error) && self.at < self.end => {
                self.method = if self.method == Method::Punch { Method::ZeroRange } else { Method::Write };
                // What is refused once is not tried again.
                *best = (*best).max(self.method);
                Step::Next(self.op(file, None))
            }
            Err(error) => Step::Ended(Err(error)),
            Ok(bytes) if self.method == Method::Write => {
                self.at += u64::from(bytes);
                if self.at < self.end { Step::Next(self.op(file, buf)) } else { Step::Ended(Ok(())) }
            }
            Ok(_) if self.fua && self.at < self.end => {
                // `fallocate` has no FUA: sync, and come back here with nothing left.
                self.at = self.end;
                Step::Next(Op::Sync { file })
            }
            Ok(_) => Step::Ended(Ok(())),
        }
    }
}
