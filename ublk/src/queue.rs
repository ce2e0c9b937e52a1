//! One hardware queue: the thread's loop between the kernel's commands and the device's queue.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farshore_uring::{
    BlockDevice, BlockQueue, CommandCompletion, Completion, Done, Errno, FileSlot, Geometry, Io, Op, Purpose, Reactor,
    Request, Token, Wait, Waker, guest_errno,
};
use nix::sys::uio::{pread, pwrite};
use zerocopy::IntoBytes;

use crate::control::now;
use crate::descriptors::Descriptors;
use crate::info::DataPath;
use crate::request::{Asked, parse};
use crate::stats::Counters;
use crate::sys::{self, Encoding, IoCommand};

/// With up to so many requests to be copied in one turn each is copied by a system call of its own; more go through the ring,
/// which costs one more turn for all of them. Two is where the system calls are as many either way.
const COPY_CALLS_MAX: usize = 2;

/// How long the kernel may take to end the last idle tags once it has begun. It does so in one go, but for tags that were under
/// way when a living server was told to let go: their commands end only with the ring.
const LAST_WAIT: Duration = Duration::from_millis(100);

/// What a queue is made for.
#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) qid: u16,
    pub(crate) depth: u16,
    pub(crate) data_path: DataPath,
    /// Longest read or write; a multiple of the page.
    pub(crate) request_bytes: u32,
    pub(crate) geometry: Geometry,
    /// Size of the device in bytes; changes when it grows.
    pub(crate) size: Arc<AtomicU64>,
    pub(crate) encoding: Encoding,
    /// `/dev/ublkcN`.
    pub(crate) file: Arc<File>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) siblings: Arc<Siblings>,
}

/// The queues of one device, as far as they have to know of each other: a device with one queue unserved can only be handed on as
/// a whole, so when one fails, all let go.
#[derive(Default)]
pub(crate) struct Siblings {
    failed: AtomicBool,
    /// Nothing failed: the device is let go on purpose.
    ordered: AtomicBool,
    /// Bounded by the queues.
    wakers: Mutex<Vec<Waker>>,
}

impl Siblings {
    fn join(&self, waker: Waker) {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        // A queue that failed before has waked those that it knew.
        if self.have_failed() {
            waker.wake();
        }
        wakers.push(waker);
    }

    /// Makes every queue let go.
    pub(crate) fn fail(&self) {
        // Release pairs with the load in `Queue::run`; each wake orders it as well.
        self.failed.store(true, Ordering::Release);
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(Waker::wake);
    }

    /// Makes every queue let go, on purpose.
    pub(crate) fn let_go(&self) {
        self.ordered.store(true, Ordering::Relaxed);
        self.fail();
    }

    pub(crate) fn are_ordered(&self) -> bool {
        self.ordered.load(Ordering::Relaxed)
    }

    fn have_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }
}

/// A request under way.
#[derive(Clone, Copy)]
struct Current {
    asked: Asked,
}

/// What is known of one tag. Its buffer is in exactly one place: with a command, with the device, in a copy, or here.
struct Slot<B> {
    current: Option<Current>,
    buf: Option<B>,
}

/// What a front end's operation on the ring is; the low half of the token is the tag.
const COPY_IN: u64 = 1 << 32;
const COPY_OUT: u64 = 2 << 32;
const COPY: u64 = 3 << 32;

/// The driver of one queue. See [`Self::run`].
///
/// Invariants: a tag is with the kernel, or its request is under way here, or it has ended; `open` counts the first two,
/// `under_way` the second. What the kernel writes to is a buffer that a command owns.
pub(crate) struct Queue<D: BlockDevice> {
    setup: Setup,
    reactor: Reactor<D::Buf>,
    device: D::Queue,
    /// Mapped in [`Self::fetch_all`].
    descriptors: Option<Descriptors>,
    file: FileSlot,
    slots: Vec<Slot<D::Buf>>,
    /// Tags whose data is to be fetched from the guest, and brought to it, in this turn.
    copy_in: Vec<u16>,
    copy_out: Vec<u16>,
    open: u32,
    under_way: u32,
    /// The kernel has ended a tag: all others follow, those with a request under way after its answer.
    ending: bool,
    /// The first answer of the kernel that was no request and no end.
    failure: Option<io::Error>,
}

impl<D: BlockDevice> Queue<D> {
    /// Opens the queue. The kernel hears of it in [`Self::fetch_all`].
    pub(crate) fn open(setup: Setup, device: &D) -> io::Result<Self> {
        let depth = u32::from(setup.depth);
        // A turn may hold an answer and an operation of the device for every tag.
        let mut reactor = Reactor::new(depth * 2)?;
        // First of all: from here on no I/O of this ring can outlive the file's owner unnoticed.
        let file = reactor.register(Arc::clone(&setup.file))?;
        let device = device.open_queue(&mut reactor)?;
        let slots = (0..setup.depth).map(|_| Slot { current: None, buf: None }).collect();
        let lists = usize::from(setup.depth);
        Ok(Self {
            reactor,
            device,
            descriptors: None,
            file,
            slots,
            copy_in: Vec::with_capacity(lists),
            copy_out: Vec::with_capacity(lists),
            open: depth,
            under_way: 0,
            ending: false,
            failure: None,
            setup,
        })
    }

    /// Hands the kernel a command for every tag. To be called on the thread that [`Self::run`]s: the kernel takes a tag's commands from
    /// no other.
    ///
    /// Only then maps the requests' descriptions: with the first map the device is of this process alone, until a recovery is begun,
    /// and Linux 6.12 begins none while no queue is ready. A process that ended in between would leave a device that no other could
    /// serve. No request comes before the device is started.
    pub(crate) fn fetch_all(&mut self) -> io::Result<()> {
        for tag in 0..self.setup.depth {
            self.command(sys::io::FETCH_REQ, tag, 0);
        }
        self.reactor.run_once(Wait::No)?;
        self.descriptors = Some(Descriptors::map(&self.setup.file, self.setup.qid, self.setup.depth)?);
        self.setup.siblings.join(self.reactor.waker());
        Ok(())
    }

    /// See [`Reactor::hold_ring`].
    pub(crate) fn hold_ring(&self) -> io::Result<OwnedFd> {
        self.reactor.hold_ring()
    }

    /// Serves until the kernel has ended every tag's command: the device was stopped, or let go of.
    ///
    /// # Errors
    /// If the ring fails, a command was refused, or another queue of the device has failed. The device then waits for the next
    /// server, as soon as all queues are dropped.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let ended = self.turns();
        // What has ended is not in a turn.
        self.setup.counters.waits.add(1);
        ended
    }

    fn turns(&mut self) -> io::Result<()> {
        while self.open > 0 {
            let last = self.ending && self.under_way == 0;
            let deadline = last.then(|| now() + LAST_WAIT);
            self.setup.counters.waits.add(1);
            self.reactor.run_once(Wait::Until(deadline))?;
            if deadline.is_some_and(|deadline| now() >= deadline) {
                break;
            }
            self.setup.counters.turns.add(1);
            self.turn();
            if let Some(error) = self.failure.take() {
                return Err(error);
            }
        }
        self.device.close(&mut self.reactor);
        Ok(())
    }

    fn turn(&mut self) {
        while let Some(completion) = self.reactor.poll_completion() {
            if completion.token.is_front() {
                self.handle_copied(completion);
            } else {
                self.device.handle_completion(&mut self.reactor, completion);
            }
        }
        if self.reactor.take_wakeup() {
            if self.setup.siblings.have_failed() {
                self.failure.get_or_insert_with(|| io::Error::other("another queue of the device has failed"));
                return;
            }
            self.device.handle_wake(&mut self.reactor);
        }
        while let Some(completion) = self.reactor.poll_command() {
            self.handle_command(completion);
        }
        self.start_copies_in();
        while let Some(done) = self.device.poll_done() {
            self.handle_done(done);
        }
        self.start_copies_out();
    }

    /// A tag's command ended: a request, or the end.
    fn handle_command(&mut self, completion: CommandCompletion<D::Buf>) {
        let tag = tag_of(completion.token);
        match completion.result {
            Ok(0) => self.begin(tag, completion.buf),
            Ok(other) => self.end_tag(tag, io::Error::other(format!("answer {other}, which was not asked for"))),
            // The device is stopped or let go of.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.open -= 1;
                self.ending = true;
            }
            Err(error) => self.end_tag(tag, error),
        }
    }

    fn end_tag(&mut self, tag: u16, error: io::Error) {
        tracing::debug!(qid = self.setup.qid, tag, %error, "a command was refused");
        self.open -= 1;
        self.failure.get_or_insert(error);
    }

    fn begin(&mut self, tag: u16, buf: Option<D::Buf>) {
        let iod = self.descriptors.as_ref().expect("mapped before any request comes").read(tag);
        self.under_way += 1;
        self.slots[usize::from(tag)].buf = buf;
        let geometry = Geometry { size: self.setup.size.load(Ordering::Relaxed), ..self.setup.geometry };
        let asked = match parse(&iod, &geometry, self.setup.request_bytes) {
            Ok(asked) => asked,
            Err(errno) => {
                tracing::warn!(qid = self.setup.qid, tag, ?iod, errno = errno.0, "a request that cannot be");
                return self.answer(tag, Err(errno), 0);
            }
        };
        self.slots[usize::from(tag)].current = Some(Current { asked });
        let user_copy = self.setup.data_path == DataPath::UserCopy;
        match asked {
            Asked::Write { len, .. } if user_copy => {
                self.slots[usize::from(tag)].buf = Some(self.device.buffer(Purpose::Write, len));
                self.copy_in.push(tag);
            }
            Asked::Write { .. } => self.submit_write(tag),
            Asked::Read { offset, len } => {
                let slot = &mut self.slots[usize::from(tag)];
                // Swapping, the buffer of the tag serves reads as well: it goes back to the kernel with the answer.
                let buf = slot.buf.take().unwrap_or_else(|| self.device.buffer(Purpose::Read, len));
                self.device.submit(&mut self.reactor, u32::from(tag), Request::Read { offset, len, buf });
            }
            Asked::Flush => self.device.submit(&mut self.reactor, u32::from(tag), Request::Flush),
            Asked::Discard { offset, len } => {
                self.device.submit(&mut self.reactor, u32::from(tag), Request::Discard { offset, len });
            }
            Asked::WriteZeroes { offset, len, fua, no_hole } => {
                let request = Request::WriteZeroes { offset, len, fua, no_hole };
                self.device.submit(&mut self.reactor, u32::from(tag), request);
            }
        }
    }

    /// Hands a write whose data is here to the device.
    fn submit_write(&mut self, tag: u16) {
        let slot = &mut self.slots[usize::from(tag)];
        let Some(Current { asked: Asked::Write { offset, len, fua } }) = slot.current else {
            unreachable!("only writes are filled from the guest")
        };
        let buf = slot.buf.take().expect("a write's data is in its tag's buffer");
        self.device.submit(&mut self.reactor, u32::from(tag), Request::Write { offset, len, buf, fua });
    }

    fn start_copies_in(&mut self) {
        let through_ring = self.copy_in.len() > COPY_CALLS_MAX;
        while let Some(tag) = self.copy_in.pop() {
            let position = sys::data_position(self.setup.qid, tag);
            let slot = &mut self.slots[usize::from(tag)];
            let Some(Current { asked: Asked::Write { len, .. } }) = slot.current else {
                unreachable!("only writes are in this list")
            };
            if through_ring {
                let buf = slot.buf.take().expect("made for this copy");
                let op = Op::Read { file: self.file, offset: position, buf, len };
                self.reactor.submit(Token::front(COPY_IN | u64::from(tag)), op);
                continue;
            }
            let buf = slot.buf.as_mut().expect("made for this copy");
            self.setup.counters.copy_calls.add(1);
            let copied = transfer(len, |done| {
                let at = file_position(position, done);
                pread(&self.setup.file, &mut buf[done..as_size(len)], at)
            });
            self.copied_in(tag, copied);
        }
    }

    fn start_copies_out(&mut self) {
        let through_ring = self.copy_out.len() > COPY_CALLS_MAX;
        while let Some(tag) = self.copy_out.pop() {
            let position = sys::data_position(self.setup.qid, tag);
            let slot = &mut self.slots[usize::from(tag)];
            let Some(Current { asked: Asked::Read { len, .. } }) = slot.current else {
                unreachable!("only reads are in this list")
            };
            let buf = slot.buf.take().expect("a read's data is in its tag's buffer");
            if through_ring {
                let op = Op::Write { file: self.file, offset: position, buf, len, dsync: false };
                self.reactor.submit(Token::front(COPY_OUT | u64::from(tag)), op);
                continue;
            }
            self.setup.counters.copy_calls.add(1);
            let copied =
                transfer(len, |done| pwrite(&self.setup.file, &buf[done..as_size(len)], file_position(position, done)));
            self.end(tag, copied);
        }
    }

    /// A copy through the ring ended.
    fn handle_copied(&mut self, completion: Completion<D::Buf>) {
        let tag = tag_of(completion.token);
        let result = completion.result.map(|_| ()).map_err(|error| guest_errno(&error));
        if completion.token.value() & COPY == COPY_IN {
            self.slots[usize::from(tag)].buf = completion.buf;
            self.copied_in(tag, result);
        } else {
            self.end(tag, result);
        }
    }

    fn copied_in(&mut self, tag: u16, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.submit_write(tag),
            Err(_) => {
                self.slots[usize::from(tag)].buf = None;
                self.end(tag, result);
            }
        }
    }

    /// The device is done with a request.
    fn handle_done(&mut self, done: Done<D::Buf>) {
        let tag = u16::try_from(done.tag).expect("tags are ours");
        let slot = &mut self.slots[usize::from(tag)];
        let current = slot.current.expect("a request ends once");
        if let Asked::Read { .. } = current.asked {
            slot.buf = done.buf;
            if self.setup.data_path == DataPath::UserCopy && done.result.is_ok() {
                self.copy_out.push(tag);
                return;
            }
        }
        self.end(tag, done.result);
    }

    /// Answers a request and accounts for it.
    fn end(&mut self, tag: u16, result: Result<(), Errno>) {
        let slot = &mut self.slots[usize::from(tag)];
        let Current { asked } = slot.current.take().expect("a request ends once");
        if self.setup.data_path == DataPath::UserCopy {
            slot.buf = None;
        }
        let counters = &self.setup.counters;
        counters.errors.add(u64::from(result.is_err()));
        let bytes = match asked {
            Asked::Read { len, .. } => {
                counters.reads.add(1);
                counters.bytes_read.add(u64::from(len));
                len
            }
            Asked::Write { len, .. } => {
                counters.writes.add(1);
                counters.bytes_written.add(u64::from(len));
                len
            }
            Asked::Flush => {
                counters.flushes.add(1);
                0
            }
            Asked::Discard { .. } | Asked::WriteZeroes { .. } => {
                counters.discards.add(1);
                0
            }
        };
        self.answer(tag, result, bytes);
    }

    /// Tells the kernel the result, and asks for the tag's next request in the same command.
    fn answer(&mut self, tag: u16, result: Result<(), Errno>, bytes: u32) {
        let result = match result {
            Ok(()) => i32::try_from(bytes).expect("requests are at most 32 MiB"),
            // The kernel takes a positive number for bytes.
            Err(Errno(number)) => -number.abs().max(1),
        };
        self.under_way -= 1;
        self.command(sys::io::COMMIT_AND_FETCH_REQ, tag, result);
    }

    fn command(&mut self, number: u8, tag: u16, result: i32) {
        let swap = self.setup.data_path == DataPath::BufferSwap;
        let request_bytes = self.setup.request_bytes;
        // After a read it holds the data, which the kernel takes while it takes the command; else it is free.
        let buf = swap.then(|| {
            let kept = self.slots[usize::from(tag)].buf.take();
            let mut buf = kept.unwrap_or_else(|| self.device.buffer(Purpose::Write, request_bytes));
            assert!(buf.len() >= as_size(request_bytes), "the device's buffer is shorter than was asked for");
            let addr = buf.as_mut_ptr().expose_provenance() as u64;
            (buf, addr)
        });
        let (buf, addr) = buf.map_or((None, 0), |(buf, addr)| (Some(buf), addr));
        let payload = IoCommand { qid: self.setup.qid, tag, result, addr };
        let mut bytes = [0; 16];
        bytes.copy_from_slice(payload.as_bytes());
        let code = self.setup.encoding.io(number);
        // SAFETY: the only address in the payload is that of `buf`, which goes along and stays in place (`IoBuf`). The kernel
        // transfers at most `max_sectors` there, which is `request_bytes`, and `buf` was just checked to be as long.
        unsafe { self.reactor.command(Token::front(u64::from(tag)), self.file, code, bytes, buf) };
    }
}

/// Repeats a positioned transfer until `len` bytes are through.
fn transfer(len: u32, mut step: impl FnMut(usize) -> nix::Result<usize>) -> Result<(), Errno> {
    let mut done = 0;
    while done < as_size(len) {
        match step(done) {
            Ok(0) => return Err(Errno(libc::EIO)),
            Ok(moved) => done += moved,
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Errno(error as i32)),
        }
    }
    Ok(())
}

fn file_position(position: u64, done: usize) -> libc::off_t {
    libc::off_t::try_from(position + done as u64).expect("positions of data are below 2^54")
}

fn as_size(bytes: u32) -> usize {
    usize::try_from(bytes).expect("u32 fits usize")
}

fn tag_of(token: Token) -> u16 {
    u16::try_from(token.value() & 0xffff).expect("masked")
}
