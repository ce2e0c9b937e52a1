//! [`Io`] over io_uring, with the socket operations of a front end on the same ring.
//!
//! One thread owns a [`Reactor`] and turns it: submit operations, [`Reactor::run_once`], drain the completions. All that
//! was submitted since the last turn goes to the kernel in the same system call that waits.

mod files;
mod ops;
mod table;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use self::files::Files;
use self::ops::{Entries, Kind, Operation, Pair, Regions, Report, Scratch, Step};
use self::table::{Key, Table};
use crate::clock::now;
use crate::waker::WakeSource;
use crate::{
    AlignedBuf, CommandCompletion, Completion, FileSlot, Io, IoBuf, NetCompletion, Op, SendList, Token, Waker,
};

/// How long [`Reactor::run_once`] may wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until something completes, a wake-up comes, or the time (if any) has come.
    Until(Option<Instant>),
}

/// A ring and the operations in flight on it.
///
/// Not `Send`: make it on the thread that runs it. Per turn: [`Io::submit`] and the socket operations in any number,
/// [`Reactor::run_once`], then [`Reactor::take_wakeup`], [`Reactor::poll_completion`], [`Reactor::poll_net`] and
/// [`Reactor::poll_command`] until they have nothing more.
///
/// Invariants:
/// - every buffer named in an entry of the submission queue or in the kernel is owned by `ops`, untouched, until the last
///   completion of its operation;
/// - `owed` completions (of operations, cancels and the wake-up read) are still to come, never more than the completion
///   queue holds, so it cannot overflow;
/// - an operation is in exactly one place: `waiting`, the kernel's hands (`parts > 0`), or ended and removed.
///
/// Dropping it cancels what can be cancelled and waits for the rest; if that takes longer than 5 s (a hung disk), the
/// buffers still in the kernel's hands are leaked, never freed under it. Commands are not waited for: their driver ends them
/// when the ring is gone, so their buffers are leaked at once.
pub struct Reactor<B: IoBuf> {
    ring: IoUring,
    ops: Table<Operation<B>>,
    files: Files,
    /// To be handed to the kernel as soon as there is room, in order. Bounded by twice the operations in flight, which
    /// their submitters bound.
    waiting: VecDeque<Waiting>,
    owed: u32,
    owed_max: u32,
    ended_io: VecDeque<Completion<B>>,
    ended_net: VecDeque<NetCompletion<B>>,
    ended_commands: VecDeque<CommandCompletion<B>>,
    /// Those of `owed` that are commands.
    commands: u32,
    #[expect(clippy::vec_box, reason = "the kernel knows them by address while they are in use")]
    spare: Vec<Box<Scratch>>,
    regions: RegionList,
    wake: WakeSource,
    wake_word: Box<u64>,
    wake_armed: bool,
    dropping: bool,
    not_send: PhantomData<*mut ()>,
}

enum Waiting {
    Start(Key),
    Cancel(Key),
}

/// `user_data` of the wake-up read and of cancels; keys leave the top bits free.
const WAKE: u64 = 1 << 63;
const CANCEL: u64 = 1 << 62;
/// `user_data` bit of the sync in a linked pair.
const PART: u64 = 1 << 61;
const _: () = assert!(Key::FREE_BITS >= 3);

/// Completions per submission entry, and at least: every socket of a full file table may have a receive and a send waiting in
/// the kernel for as long as their peers like, and as many again must be left for the disk. 64 KiB of memory.
const COMPLETIONS_PER_ENTRY: u32 = 4;
const COMPLETIONS_MIN: u32 = 4096;

/// How long a dropped reactor waits for operations that cannot be cancelled.
const DROP_WAIT: Duration = Duration::from_secs(5);

impl<B: IoBuf> Reactor<B> {
    /// A ring that takes up to `depth` operations (rounded up to a power of two, 8 to 4096) into the kernel per system
    /// call. More may be submitted: they wait inside and follow.
    ///
    /// # Errors
    /// `EPERM`/`ENOSYS` where io_uring is switched off (`sysctl kernel.io_uring_disabled`, seccomp), `EMFILE`, `ENOMEM`.
    pub fn new(depth: u32) -> io::Result<Self> {
        let depth = depth.clamp(8, 4096).next_power_of_two();
        let ring = build_ring(depth)?;
        let files = Files::new(&ring)?;
        let event = event_descriptor()?;
        // Two are kept back: one for the wake-up read, one so that a linked pair always fits.
        let owed_max = ring.params().cq_entries() - 2;
        let capacity = depth as usize * 2;
        Ok(Self {
            ring,
            ops: Table::with_capacity(capacity),
            files,
            waiting: VecDeque::with_capacity(capacity),
            owed: 0,
            owed_max,
            ended_io: VecDeque::with_capacity(capacity),
            ended_net: VecDeque::with_capacity(capacity),
            ended_commands: VecDeque::new(),
            commands: 0,
            spare: Vec::new(),
            regions: RegionList::default(),
            wake: WakeSource::new(Some(event)),
            wake_word: Box::new(0),
            wake_armed: false,
            dropping: false,
            not_send: PhantomData,
        })
    }

    /// Hands over what was submitted, waits as told (not if a completion or wake-up is already there), and collects what
    /// has ended. One system call; none where there is nothing to hand over and nothing to wait for.
    ///
    /// # Errors
    /// The kernel's, where the ring itself is unusable; operations keep their own errors.
    pub fn run_once(&mut self, wait: Wait) -> io::Result<()> {
        self.arm_wake();
        while self.hand_over() {
            self.enter(None)?;
            self.reap();
            if self.ring.submission().is_full() {
                // The kernel takes none for now (out of memory): not a reason to spin.
                break;
            }
        }
        let idle = self.ended_io.is_empty() && self.ended_net.is_empty() && self.ended_commands.is_empty();
        match wait {
            Wait::Until(deadline) if idle && self.wake.fall_asleep() => {
                let entered = self.enter(Some(deadline));
                self.wake.awake();
                entered?;
            }
            Wait::No | Wait::Until(_) if self.kernel_has_work() => self.enter(None)?,
            Wait::No | Wait::Until(_) => {}
        }
        self.reap();
        Ok(())
    }

    /// The next ended operation of [`Io::submit`].
    #[must_use]
    pub fn poll_completion(&mut self) -> Option<Completion<B>> {
        self.ended_io.pop_front()
    }

    /// The next ended socket or timer operation.
    #[must_use]
    pub fn poll_net(&mut self) -> Option<NetCompletion<B>> {
        self.ended_net.pop_front()
    }

    /// The next ended [`Reactor::command`].
    #[must_use]
    pub fn poll_command(&mut self) -> Option<CommandCompletion<B>> {
        self.ended_commands.pop_front()
    }

    /// Whether another thread called [`Waker::wake`] since the last call. Take it before looking for the work it announced.
    pub fn take_wakeup(&mut self) -> bool {
        self.wake.take()
    }

    /// Operations submitted that have not ended. Ended ones that were not polled yet do not count.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ops.len()
    }

    /// Another descriptor of the ring. While it is open, the drop of the reactor leaves the ring as it is in the kernel, and with it
    /// the commands there.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn hold_ring(&self) -> io::Result<OwnedFd> {
        // SAFETY: the ring is open for as long as `self.ring` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }.try_clone_to_owned()
    }

    /// Registers memory with the kernel, so that reads and writes of buffers that lie inside skip the pinning per
    /// operation. At most 16 GiB in all.
    ///
    /// # Errors
    /// `ENOMEM` beyond `RLIMIT_MEMLOCK`, `EOPNOTSUPP`/`EFAULT` for memory that cannot be pinned (a file on a disk file
    /// system). Everything works without; the caller may go on.
    ///
    /// # Safety
    /// `[start, start + len)` is mapped readable and writable, and stays so until the reactor is dropped.
    pub unsafe fn register_buffer_region(&mut self, start: *const u8, len: usize) -> io::Result<()> {
        // SAFETY: the caller's promise is the one that the list asks for.
        unsafe { self.regions.register(&self.ring, start, len) }
    }

    /// Makes a socket (connected or listening) known. It is switched to blocking mode: the ring waits for it.
    ///
    /// # Errors
    /// The kernel's, or `OutOfMemory` when the file table is full; the socket is closed then.
    pub fn register_socket(&mut self, socket: OwnedFd) -> io::Result<FileSlot> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&socket, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        }
        self.files.add_socket(&self.ring, socket)
    }

    /// Waits for one connection.
    ///
    /// # Panics
    /// As all socket operations: if the slot was given back.
    pub fn accept(&mut self, token: Token, listener: FileSlot) {
        self.start(Operation::new(token, Some(listener), Kind::Accept));
    }

    /// Receives into the range of `first` and then that of `second`, as much as is there (at least one byte, or the end of
    /// the stream); with `wait_all` until both are full, short only at the end of the stream. One receive at a time per
    /// socket.
    ///
    /// # Panics
    /// If both ranges are empty, together beyond `u32::MAX` bytes, or outside of their buffers.
    pub fn recv(
        &mut self,
        token: Token,
        socket: FileSlot,
        first: Option<(B, Range<usize>)>,
        second: Option<(AlignedBuf, Range<usize>)>,
        wait_all: bool,
    ) {
        let in_first = first.as_ref().map_or(0, |(buf, range)| buf[range.clone()].len());
        let in_second = second.as_ref().map_or(0, |(buf, range)| buf[range.clone()].len());
        assert!(
            u32::try_from(in_first + in_second).is_ok_and(|bytes| bytes > 0),
            "{in_first} + {in_second} bytes to receive"
        );
        let scratch = self.scratch();
        self.start(Operation::new(token, Some(socket), Kind::Recv { first, second, scratch, wait_all }));
    }

    /// Sends the whole list. One send at a time per socket: a second one could overtake the rest of the first.
    pub fn send(&mut self, token: Token, socket: FileSlot, list: SendList<B>) {
        self.start(Operation::new(token, Some(socket), Kind::Send { list }));
    }

    /// Completes at `at`.
    pub fn timeout(&mut self, token: Token, at: Instant) {
        let scratch = self.scratch();
        self.start(Operation::new(token, None, Kind::Timeout { at, scratch }));
    }

    /// Cancels the socket and timer operations with this token: they end with `ECANCELED`, or as they would have if they
    /// were just ending.
    pub fn cancel(&mut self, token: Token) {
        self.cancel_where(|op| op.token == token && op.kind.is_network());
    }

    /// Shuts down both directions: operations on the socket end, the peer sees the end of the stream.
    pub fn shutdown(&mut self, socket: FileSlot) {
        if let Some(raw) = self.files.raw(socket) {
            // SAFETY: `raw` is open: the file table owns it and is not touched during this call.
            let socket = unsafe { BorrowedFd::borrow_raw(raw) };
            // Fails only where there is no connection (any more), which is what was asked for.
            let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
    }

    /// Cancels the socket's operations (each still completes) and closes it when they have ended. The slot must not be
    /// used again.
    pub fn close(&mut self, socket: FileSlot) {
        self.cancel_where(|op| op.file == Some(socket));
        self.files.close(&self.ring, socket);
    }

    /// Hands a command (`IORING_OP_URING_CMD`) to the driver behind `file`. It ends when the driver says so, which may be
    /// never; it cannot be cancelled. `buf` belongs to it until then and comes back in its completion.
    ///
    /// # Safety
    /// Every address in `payload` points into `buf`, or to memory that lives until the ring is gone; the driver keeps within
    /// the bytes that this command gives it there.
    ///
    /// # Panics
    /// If the slot was given back.
    pub unsafe fn command(&mut self, token: Token, file: FileSlot, code: u32, payload: [u8; 16], buf: Option<B>) {
        self.start(Operation::new(token, Some(file), Kind::Command { code, payload, buf }));
    }

    fn scratch(&mut self) -> Box<Scratch> {
        self.spare.pop().unwrap_or_else(Scratch::new)
    }

    fn start(&mut self, op: Operation<B>) {
        if let Some(file) = op.file {
            self.files.begin(file);
        }
        let empty = op.is_empty_transfer();
        let key = self.ops.insert(op);
        if empty {
            self.finish(key, Ok(0));
        } else {
            self.waiting.push_back(Waiting::Start(key));
        }
    }

    fn cancel_where(&mut self, wanted: impl Fn(&Operation<B>) -> bool) {
        for (key, op) in self.ops.iter_mut() {
            if !op.cancelled && wanted(op) {
                op.cancelled = true;
                self.waiting.push_back(Waiting::Cancel(key));
            }
        }
    }

    /// Moves waiting entries to the submission queue. `true`: the queue is full and more are waiting that the kernel has
    /// room for.
    fn hand_over(&mut self) -> bool {
        while let Some(next) = self.waiting.front() {
            if self.owed >= self.owed_max {
                return false;
            }
            let pushed = match *next {
                Waiting::Start(key) => self.push_operation(key),
                Waiting::Cancel(key) => self.push_cancel(key),
            };
            if !pushed {
                return true;
            }
            self.waiting.pop_front();
        }
        false
    }

    /// `false`: no room.
    fn push_operation(&mut self, key: Key) -> bool {
        let Some(op) = self.ops.get_mut(key) else { return true };
        if op.cancelled {
            // Never reached the kernel.
            self.finish(key, Err(io::Error::from_raw_os_error(libc::ECANCELED)));
            return true;
        }
        if let Some(result) = op.transfer_inline(&mut self.files) {
            op.parts = 1;
            self.handle(key, 0, result);
            return true;
        }
        let takes_regions = op.file.is_none_or(|file| self.files.takes_regions(file));
        let is_command = op.kind.is_command();
        let entries = match op.entries(&takes_regions.then_some(&self.regions)) {
            Entries::One(entry) => [Some(entry.user_data(key.raw())), None],
            Entries::Linked([first, second]) => {
                [Some(first.user_data(key.raw())), Some(second.user_data(key.raw() | PART))]
            }
        };
        let parts = if entries[1].is_some() { 2 } else { 1 };
        let mut queue = self.ring.submission();
        if queue.capacity() - queue.len() < parts {
            return false;
        }
        for entry in entries.iter().flatten() {
            // SAFETY: all addresses in the entry point into the operation `key` of the table (bytes of an `IoBuf`, which
            // stay in place, or boxed headers; for a command its submitter promised that), and the table keeps the operation, untouched, until the kernel has
            // reported every part of it; `Drop` waits or leaks. The file is an entry of the registered table.
            unsafe { queue.push(entry) }.expect("there was room for all parts");
        }
        drop(queue);
        op.parts = u8::try_from(parts).expect("one or two");
        self.owed += u32::from(op.parts);
        self.commands += u32::from(is_command);
        true
    }

    /// `false`: no room.
    fn push_cancel(&mut self, key: Key) -> bool {
        if self.ops.get_mut(key).is_none_or(|op| op.parts == 0) {
            return true;
        }
        let entry = opcode::AsyncCancel::new(key.raw()).build().user_data(CANCEL);
        self.push_plain(&entry)
    }

    /// Pushes an entry without addresses of buffers.
    fn push_plain(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the callers' entries carry no address (cancels) or that of `wake_word`, which is boxed and outlives its
        // read: `Drop` waits for it or leaks it.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.owed += u32::from(pushed);
        pushed
    }

    fn arm_wake(&mut self) {
        if self.wake_armed {
            return;
        }
        let event = Fd(self.wake.event().expect("a reactor's wake source has one").as_raw_fd());
        let word: *mut u64 = &raw mut *self.wake_word;
        let entry = opcode::Read::new(event, word.cast(), 8).build().user_data(WAKE);
        self.wake_armed = self.push_plain(&entry);
    }

    /// Whether entering the kernel without waiting changes anything: entries to take, or completions to post.
    fn kernel_has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// One `io_uring_enter`; waits for a completion if told so, until the time if there is one.
    fn enter(&mut self, wait: Option<Option<Instant>>) -> io::Result<()> {
        let entered = match wait {
            None => self.ring.submit(),
            Some(None) => self.ring.submit_and_wait(1),
            Some(Some(deadline)) => {
                let time = Timespec::from(deadline.saturating_duration_since(now()));
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        if !self.ring.submission().is_empty() {
            self.mark_torn();
        }
        match entered {
            Ok(_) => Ok(()),
            // A signal, the deadline, completions to be collected first, memory to be had later: the next turn goes on.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The kernel left entries in the queue. If it stopped within a linked pair, it has started the write without its link.
    fn mark_torn(&mut self) {
        for (_, op) in self.ops.iter_mut() {
            if let Kind::WriteThenSync { pair, .. } = &mut op.kind {
                pair.torn = true;
            }
        }
    }

    fn reap(&mut self) {
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            self.owed -= 1;
            let (data, result) = (entry.user_data(), entry.result());
            if data == WAKE {
                // Re-armed at the next turn. An error leaves the counter up, and the next read ends at once.
                self.wake_armed = false;
            } else if data != CANCEL {
                self.handle(Key::from_raw(data & !PART), (data & PART) / PART, result);
            }
        }
    }

    fn handle(&mut self, key: Key, part: u64, result: i32) {
        let op = self.ops.get_mut(key).expect("an operation stays in the table until its last completion");
        self.commands -= u32::from(op.kind.is_command());
        let ended = self.dropping
            || op.cancelled
            || op.file.is_some_and(|file| op.kind.is_network() && self.files.is_closing(file));
        match op.handle(part, result, ended) {
            Step::Wait => {}
            Step::Again => self.waiting.push_back(Waiting::Start(key)),
            Step::Done(result) => self.finish(key, result),
        }
    }

    fn finish(&mut self, key: Key, result: io::Result<u32>) {
        let op = self.ops.remove(key).expect("an operation ends once");
        if let Some(file) = op.file {
            self.files.end(&self.ring, file);
        }
        let token = op.token;
        match op.kind.report(result) {
            Report::Io(buf, result) => self.ended_io.push_back(Completion { token, result, buf }),
            Report::Net(event, result, scratch) => {
                self.spare.extend(scratch);
                self.ended_net.push_back(NetCompletion { token, result, event });
            }
            Report::Command(buf, result) => self.ended_commands.push_back(CommandCompletion { token, result, buf }),
        }
    }
}

impl<B: IoBuf> Io<B> for Reactor<B> {
    fn submit(&mut self, token: Token, op: Op<B>) {
        let (file, kind) = match op {
            Op::Read { file, offset, mut buf, len } => {
                let start = buf[..len as usize].as_mut_ptr();
                (file, Kind::Read { buf, start, offset, len })
            }
            Op::Write { file, offset, buf, len, dsync } => {
                let start = buf[..len as usize].as_ptr();
                (file, Kind::Write { buf, start, offset, len, dsync })
            }
            Op::WriteThenSync { file, offset, buf, len } => {
                let start = buf[..len as usize].as_ptr();
                (file, Kind::WriteThenSync { buf, start, offset, len, pair: Pair::default() })
            }
            Op::Sync { file } => (file, Kind::Sync),
            Op::Allocate { file, mode, offset, len } => (file, Kind::Allocate { mode, offset, len }),
        };
        self.start(Operation::new(token, Some(file), kind));
    }

    fn register(&mut self, file: Arc<File>) -> io::Result<FileSlot> {
        self.files.add_file(&self.ring, file)
    }

    fn unregister(&mut self, file: FileSlot) {
        self.files.close(&self.ring, file);
    }

    fn waker(&self) -> Waker {
        self.wake.waker()
    }
}

impl<B: IoBuf> Drop for Reactor<B> {
    fn drop(&mut self) {
        self.dropping = true;
        // What never reached the kernel needs no cancel.
        self.waiting.clear();
        let deadline = now() + DROP_WAIT;
        let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(CANCEL);
        let mut cancelled = false;
        while self.owed > self.commands {
            if !cancelled {
                cancelled = self.push_plain(&cancel);
            }
            if self.enter(Some(Some(deadline))).is_err() || now() >= deadline {
                break;
            }
            self.reap();
        }
        if self.owed > 0 {
            std::mem::forget(std::mem::replace(&mut self.ops, Table::with_capacity(0)));
            std::mem::forget(std::mem::take(&mut self.wake_word));
        } else {
            self.files.release_all(&self.ring);
        }
    }
}

/// Memory registered with the ring.
#[derive(Default)]
struct RegionList {
    known: Vec<Range<usize>>,
    table: bool,
}

/// The kernel takes at most 1 GiB per registered buffer.
const REGION_BYTES_MAX: usize = 1 << 30;
const REGIONS_MAX: u32 = 16;

impl RegionList {
    /// # Safety
    /// As [`Reactor::register_buffer_region`].
    unsafe fn register(&mut self, ring: &IoUring, start: *const u8, len: usize) -> io::Result<()> {
        if !self.table {
            ring.submitter().register_buffers_sparse(REGIONS_MAX)?;
            self.table = true;
        }
        for done in (0..len).step_by(REGION_BYTES_MAX) {
            let index = u32::try_from(self.known.len()).expect("at most REGIONS_MAX");
            if index == REGIONS_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    "table of registered buffers is full (16 x 1 GiB)",
                ));
            }
            let piece = start.wrapping_add(done);
            let bytes = (len - done).min(REGION_BYTES_MAX);
            let vector = [libc::iovec { iov_base: piece.cast_mut().cast(), iov_len: bytes }];
            // SAFETY: the caller promised that the memory stays mapped until the reactor, and with it the ring, is gone.
            unsafe { ring.submitter().register_buffers_update(index, &vector, None) }?;
            self.known.push(piece.addr()..piece.addr() + bytes);
        }
        Ok(())
    }
}

impl Regions for RegionList {
    fn find(&self, start: *const u8, len: u32) -> Option<u16> {
        let (start, end) = (start.addr(), start.addr() + len as usize);
        let index = self.known.iter().position(|region| region.start <= start && end <= region.end)?;
        u16::try_from(index).ok()
    }
}

fn build_ring(depth: u32) -> io::Result<IoUring> {
    let completions = (depth * COMPLETIONS_PER_ENTRY).max(COMPLETIONS_MIN);
    // Completions are collected when this thread asks for them (6.1), or at least without interrupting it (5.19).
    let newest = IoUring::builder()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(completions)
        .dontfork()
        .build(depth);
    match newest {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder()
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(completions)
            .dontfork()
            .build(depth),
        other => other,
    }
}

fn event_descriptor() -> io::Result<OwnedFd> {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    // Blocking: the ring's read waits for the first write.
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
    Ok(event.into())
}
