//! The operations in flight: what the kernel was asked for, and the memory that it holds meanwhile.

use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Instant;

use io_uring::types::{Fixed, FsyncFlags, Timespec};
use io_uring::{opcode, squeue};

use super::files::Files;
use crate::clock::now;
use crate::{AlignedBuf, Allocate, FileSlot, IoBuf, NetEvent, SEND_PIECES_MAX, SendBuf, SendList, Token};

/// A transient error (`EINTR`, `EAGAIN`) is answered by asking again, at most so often without progress in between: a
/// file system that never gets further must not spin the thread for ever.
const RETRIES_MAX: u8 = 100;

/// One operation. While `parts > 0` the kernel may use every address that its entries carried, and so nothing that owns
/// them is touched.
pub(super) struct Operation<B> {
    pub(super) token: Token,
    /// `None`: a timer.
    pub(super) file: Option<FileSlot>,
    pub(super) kind: Kind<B>,
    /// Bytes transferred so far.
    pub(super) done: u32,
    /// Completions that the kernel still owes.
    pub(super) parts: u8,
    pub(super) cancelled: bool,
    pub(super) retries: u8,
}

pub(super) enum Kind<B> {
    Read {
        buf: B,
        start: *mut u8,
        offset: u64,
        len: u32,
    },
    Write {
        buf: B,
        start: *const u8,
        offset: u64,
        len: u32,
        dsync: bool,
    },
    WriteThenSync {
        buf: B,
        start: *const u8,
        offset: u64,
        len: u32,
        pair: Pair,
    },
    Sync,
    Allocate {
        mode: Allocate,
        offset: u64,
        len: u64,
    },
    Accept,
    Recv {
        first: Option<(B, Range<usize>)>,
        second: Option<(AlignedBuf, Range<usize>)>,
        scratch: Box<Scratch>,
        wait_all: bool,
    },
    Send {
        list: SendList<B>,
    },
    Timeout {
        at: Instant,
        scratch: Box<Scratch>,
    },
    /// `IORING_OP_URING_CMD`: what it means is between the file's driver and the front end.
    Command {
        code: u32,
        payload: [u8; 16],
        buf: Option<B>,
    },
}

/// The two halves of [`Kind::WriteThenSync`].
#[derive(Default)]
pub(super) struct Pair {
    write: i32,
    sync: i32,
    /// The kernel took the two entries apart, so that the sync may have run before the write: sync once more.
    pub(super) torn: bool,
    /// Only the sync is (still) wanted.
    sync_only: bool,
}

/// What the kernel reads by address at submission; kept in place and reused.
pub(super) struct Scratch {
    header: libc::msghdr,
    vector: [libc::iovec; 2],
    time: Timespec,
}

impl Scratch {
    pub(super) fn new() -> Box<Self> {
        const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: `msghdr` is a C struct of integers and pointers, for which all zeroes is a value (nothing to receive).
        let header = unsafe { std::mem::zeroed() };
        Box::new(Self { header, vector: [NOTHING; 2], time: Timespec::new() })
    }
}

/// One or two entries for the submission queue.
pub(super) enum Entries {
    One(squeue::Entry),
    Linked([squeue::Entry; 2]),
}

/// What a completion means for its operation.
pub(super) enum Step {
    /// More completions of it will come.
    Wait,
    /// To be handed to the kernel again, for the rest.
    Again,
    /// Ended.
    Done(io::Result<u32>),
}

/// Which registered buffer an address range lies in.
pub(super) trait Regions {
    fn find(&self, start: *const u8, len: u32) -> Option<u16>;
}

/// The registered buffers, or none where the file's driver takes ordinary memory only.
impl<R: Regions> Regions for Option<&R> {
    fn find(&self, start: *const u8, len: u32) -> Option<u16> {
        self.and_then(|regions| regions.find(start, len))
    }
}

impl<B: IoBuf> Operation<B> {
    pub(super) fn new(token: Token, file: Option<FileSlot>, kind: Kind<B>) -> Self {
        Self { token, file, kind, done: 0, parts: 0, cancelled: false, retries: 0 }
    }

    /// Whether an operation without bytes, for which the kernel need not be asked.
    pub(super) fn is_empty_transfer(&self) -> bool {
        match &self.kind {
            Kind::Read { len, .. } | Kind::Write { len, dsync: false, .. } => *len == 0,
            Kind::Send { list } => list.bytes() == 0,
            Kind::Write { .. }
            | Kind::WriteThenSync { .. }
            | Kind::Sync
            | Kind::Allocate { .. }
            | Kind::Accept
            | Kind::Recv { .. }
            | Kind::Timeout { .. }
            | Kind::Command { .. } => false,
        }
    }

    /// Does the rest of a transfer with a system call of its own, where the file wants that. The result is as from the ring.
    pub(super) fn transfer_inline(&self, files: &mut Files) -> Option<i32> {
        let (read_to, write_from, offset, len) = match self.kind {
            Kind::Read { start, offset, len, .. } => (Some(start), std::ptr::null(), offset, len),
            Kind::Write { start, offset, len, dsync: false, .. } => (None, start, offset, len),
            Kind::Write { .. }
            | Kind::WriteThenSync { .. }
            | Kind::Sync
            | Kind::Allocate { .. }
            | Kind::Accept
            | Kind::Recv { .. }
            | Kind::Send { .. }
            | Kind::Timeout { .. }
            | Kind::Command { .. } => return None,
        };
        let (slot, done) = (self.file?, self.done as usize);
        let (offset, left) = (offset + u64::from(self.done), len - self.done);
        if !files.wants_inline(slot, read_to.is_none(), offset, left) {
            return None;
        }
        let (at, left) = (i64::try_from(offset).ok()?, left as usize);
        Some(files.time_inline(slot, |raw| {
            let moved = match read_to {
                // SAFETY: the pointer is to `len` bytes of the buffer that this operation owns, taken from exclusive access
                // to it, `done` of which are behind and `left` ahead; the kernel is not using it now (`parts` is 0), and is
                // done with it when the call returns. `raw` is open: the file table holds it while this operation counts.
                Some(start) => unsafe { libc::pread(raw, start.wrapping_add(done).cast(), left, at) },
                // SAFETY: as above; the bytes are only read.
                None => unsafe { libc::pwrite(raw, write_from.wrapping_add(done).cast(), left, at) },
            };
            if moved >= 0 {
                return i32::try_from(moved).expect("the kernel moves less than 2 GiB per call");
            }
            -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
        }))
    }

    /// The entries for what is still to be done. The addresses in them stay valid while the operation stays in the table:
    /// buffers keep their bytes in place ([`IoBuf`]), headers and vectors are boxed.
    pub(super) fn entries(&mut self, regions: &impl Regions) -> Entries {
        let done = self.done;
        let file = Fixed(self.file.map_or(u32::MAX, |slot| slot.0));
        Entries::One(match &mut self.kind {
            Kind::Read { start, offset, len, .. } => {
                // `done < len`, inside of the buffer.
                let (start, left, at) = (start.wrapping_add(done as usize), *len - done, *offset + u64::from(done));
                match regions.find(start, left) {
                    Some(region) => opcode::ReadFixed::new(file, start, left, region).offset(at).build(),
                    None => opcode::Read::new(file, start, left).offset(at).build(),
                }
            }
            Kind::Write { start, offset, len, dsync, .. } => {
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                write_entry(regions, file, *start, *offset, *len, done, flags)
            }
            Kind::WriteThenSync { pair: Pair { sync_only: true, .. }, .. } | Kind::Sync => sync_entry(file),
            Kind::WriteThenSync { start, offset, len, .. } => {
                let write = write_entry(regions, file, *start, *offset, *len, done, 0);
                return Entries::Linked([write.flags(squeue::Flags::IO_LINK), sync_entry(file)]);
            }
            Kind::Allocate { mode, offset, len } => {
                let mode = match mode {
                    Allocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    Allocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                };
                opcode::Fallocate::new(file, *len).offset(*offset).mode(mode).build()
            }
            Kind::Accept => {
                opcode::Accept::new(file, std::ptr::null_mut(), std::ptr::null_mut()).flags(libc::SOCK_CLOEXEC).build()
            }
            Kind::Recv { first, second, scratch, wait_all } => {
                receive_entry(file, first.as_mut(), second.as_mut(), scratch, *wait_all, done as usize)
            }
            Kind::Send { list } => send_entry(file, list, done as usize),
            Kind::Timeout { at, scratch } => {
                scratch.time = Timespec::from(at.saturating_duration_since(now()));
                opcode::Timeout::new(&raw const scratch.time).build()
            }
            Kind::Command { code, payload, .. } => opcode::UringCmd16::new(file, *code).cmd(*payload).build(),
        })
    }

    /// One completion came for `part` (0; of a linked pair 1 is the sync).
    pub(super) fn handle(&mut self, part: u64, result: i32, ended: bool) -> Step {
        self.parts -= 1;
        if let Kind::WriteThenSync { len, pair, .. } = &mut self.kind {
            if part == 0 && !pair.sync_only {
                pair.write = result;
            } else {
                pair.sync = result;
            }
            if self.parts > 0 {
                return Step::Wait;
            }
            let (len, write, sync) = (*len, pair.write, pair.sync);
            if !pair.sync_only {
                match self.transferred(write, len, ended) {
                    Step::Done(Ok(_)) => {}
                    unfinished @ (Step::Wait | Step::Again | Step::Done(Err(_))) => return unfinished,
                }
            }
            let Kind::WriteThenSync { pair, .. } = &mut self.kind else { unreachable!("matched above") };
            if pair.torn && !ended && sync >= 0 {
                *pair = Pair { sync_only: true, ..Pair::default() };
                return Step::Again;
            }
            return Step::Done(if sync < 0 { Err(io::Error::from_raw_os_error(-sync)) } else { Ok(len) });
        }
        match &mut self.kind {
            Kind::Read { len, .. } | Kind::Write { len, .. } => {
                let len = *len;
                self.transferred(result, len, ended)
            }
            Kind::Send { list } => {
                let len = u32::try_from(list.bytes()).expect("checked when the pieces were pushed");
                self.transferred(result, len, ended)
            }
            Kind::Recv { wait_all: true, .. } if result > 0 => {
                self.done += result.unsigned_abs();
                if self.done < self.receive_capacity() && !ended { Step::Again } else { Step::Done(Ok(self.done)) }
            }
            Kind::Recv { .. } | Kind::Sync | Kind::Allocate { .. } | Kind::Accept if result < 0 => {
                self.failed(result, ended)
            }
            Kind::Recv { .. } => Step::Done(Ok(self.done + result.unsigned_abs())),
            Kind::Sync | Kind::Allocate { .. } => Step::Done(Ok(0)),
            Kind::Accept => Step::Done(Ok(result.unsigned_abs())),
            Kind::Timeout { .. } if result == -libc::ETIME || result == 0 => Step::Done(Ok(0)),
            Kind::Timeout { .. } => self.failed(result, true),
            // Its results are the driver's: none of them means "again" to us.
            Kind::Command { .. } if result < 0 => self.failed(result, true),
            Kind::Command { .. } => Step::Done(Ok(result.unsigned_abs())),
            Kind::WriteThenSync { .. } => unreachable!("handled above"),
        }
    }

    /// A transfer of `len` bytes moved on by `result`.
    fn transferred(&mut self, result: i32, len: u32, ended: bool) -> Step {
        if result < 0 {
            return self.failed(result, ended);
        }
        self.done += result.unsigned_abs();
        if self.done >= len {
            return Step::Done(Ok(len));
        }
        if result == 0 {
            let reading = matches!(self.kind, Kind::Read { .. });
            let kind = if reading { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
            return Step::Done(Err(kind.into()));
        }
        self.retries = 0;
        if ended { Step::Done(Err(io::Error::from_raw_os_error(libc::ECANCELED))) } else { Step::Again }
    }

    fn failed(&mut self, result: i32, ended: bool) -> Step {
        if (result == -libc::EINTR || result == -libc::EAGAIN) && !ended && self.retries < RETRIES_MAX {
            self.retries += 1;
            return Step::Again;
        }
        Step::Done(Err(io::Error::from_raw_os_error(-result)))
    }

    fn receive_capacity(&self) -> u32 {
        let Kind::Recv { first, second, .. } = &self.kind else { return 0 };
        let bytes =
            first.as_ref().map_or(0, |(_, range)| range.len()) + second.as_ref().map_or(0, |(_, range)| range.len());
        u32::try_from(bytes).expect("checked at submission")
    }
}

/// How an ended operation is reported.
pub(super) enum Report<B> {
    Io(Option<B>, io::Result<u32>),
    Net(NetEvent<B>, io::Result<u32>, Option<Box<Scratch>>),
    Command(Option<B>, io::Result<u32>),
}

impl<B: IoBuf> Kind<B> {
    pub(super) fn report(self, result: io::Result<u32>) -> Report<B> {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } | Self::WriteThenSync { buf, .. } => {
                Report::Io(Some(buf), result)
            }
            Self::Sync | Self::Allocate { .. } => Report::Io(None, result),
            Self::Accept => {
                let accepted = result.as_ref().ok().map(|&raw| {
                    let raw = i32::try_from(raw).expect("came as a non-negative i32");
                    // SAFETY: the kernel has just returned this descriptor as the result of our accept; nobody else
                    // knows it.
                    unsafe { OwnedFd::from_raw_fd(raw) }
                });
                Report::Net(NetEvent::Accepted(accepted), result.map(|_| 0), None)
            }
            Self::Recv { first, second, scratch, .. } => {
                let event = NetEvent::Received { first: first.map(|(buf, _)| buf), second: second.map(|(buf, _)| buf) };
                Report::Net(event, result, Some(scratch))
            }
            Self::Send { list } => Report::Net(NetEvent::Sent(list), result, None),
            Self::Timeout { scratch, .. } => Report::Net(NetEvent::Timeout, result, Some(scratch)),
            Self::Command { buf, .. } => Report::Command(buf, result),
        }
    }

    pub(super) fn is_command(&self) -> bool {
        matches!(self, Self::Command { .. })
    }

    pub(super) fn is_network(&self) -> bool {
        matches!(self, Self::Accept | Self::Recv { .. } | Self::Send { .. } | Self::Timeout { .. })
    }
}

fn write_entry(
    regions: &impl Regions,
    file: Fixed,
    start: *const u8,
    offset: u64,
    len: u32,
    done: u32,
    flags: i32,
) -> squeue::Entry {
    let (start, left, at) = (start.wrapping_add(done as usize), len - done, offset + u64::from(done));
    match regions.find(start, left) {
        Some(region) => opcode::WriteFixed::new(file, start, left, region).offset(at).rw_flags(flags).build(),
        None => opcode::Write::new(file, start, left).offset(at).rw_flags(flags).build(),
    }
}

fn sync_entry(file: Fixed) -> squeue::Entry {
    opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build()
}

fn receive_entry<B: IoBuf>(
    file: Fixed,
    first: Option<&mut (B, Range<usize>)>,
    second: Option<&mut (AlignedBuf, Range<usize>)>,
    scratch: &mut Scratch,
    wait_all: bool,
    mut skip: usize,
) -> squeue::Entry {
    let mut count = 0;
    let pieces =
        [first.map(|(buf, range)| &mut buf[range.clone()]), second.map(|(buf, range)| &mut buf[range.clone()])];
    for piece in pieces.into_iter().flatten() {
        let skipped = skip.min(piece.len());
        skip -= skipped;
        if skipped < piece.len() {
            let rest = &mut piece[skipped..];
            scratch.vector[count] = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
            count += 1;
        }
    }
    let flags = if wait_all { libc::MSG_WAITALL } else { 0 };
    if count == 1 {
        let len = u32::try_from(scratch.vector[0].iov_len).expect("checked at submission");
        return opcode::Recv::new(file, scratch.vector[0].iov_base.cast(), len).flags(flags).build();
    }
    scratch.header.msg_iov = scratch.vector.as_mut_ptr();
    scratch.header.msg_iovlen = count;
    opcode::RecvMsg::new(file, &raw mut scratch.header).flags(flags.unsigned_abs()).build()
}

fn send_entry<B: IoBuf>(file: Fixed, list: &mut SendList<B>, mut skip: usize) -> squeue::Entry {
    let inner = &mut *list.inner;
    let mut count = 0;
    for piece in &inner.pieces {
        let bytes: &[u8] = match &piece.buf {
            SendBuf::Own(buf) => &buf[piece.range.clone()],
            SendBuf::Device(buf) => &buf[piece.range.clone()],
        };
        let skipped = skip.min(bytes.len());
        skip -= skipped;
        if skipped < bytes.len() {
            let rest = &bytes[skipped..];
            inner.vector[count] = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            count += 1;
        }
    }
    debug_assert!(count <= SEND_PIECES_MAX);
    // WAITALL: the kernel itself goes on after a short send. NOSIGNAL: a peer that has gone is an error, not a signal.
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    if count == 1 {
        let len = u32::try_from(inner.vector[0].iov_len).expect("checked when the pieces were pushed");
        return opcode::Send::new(file, inner.vector[0].iov_base.cast(), len).flags(flags).build();
    }
    inner.header.msg_iov = inner.vector.as_mut_ptr();
    inner.header.msg_iovlen = count;
    opcode::SendMsg::new(file, &raw const inner.header).flags(flags.unsigned_abs()).build()
}
