//! The threads of a server: one per hardware queue, on the processors from which that queue's requests come.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use farshore_uring::BlockDevice;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::control::Control;
use crate::error::{Error, ErrorKind};
use crate::queue::{Queue, Setup, Siblings};

/// Bytes of a mask of processors, as many as `CpuSet` holds.
const MASK_BYTES: usize = size_of::<CpuSet>();

/// Longest time from a thread's start until its commands are with the kernel. It opens a queue of the device, which may register
/// much memory.
const READY_MAX: Duration = Duration::from_secs(30);

/// The thread that serves a queue, and its keeper: a thread that closes the queue's ring when the serving one has ended.
///
/// A ring must not be closed while the thread that served it lives (seen on Linux 6.12): the kernel then still lets that thread run
/// what the driver has for it, and a request that comes in just then is handed to the ring that is being closed. Nobody ends
/// such a request, so the device can never be recovered nor stopped. Of a thread that has ended the driver takes the requests back,
/// as it does when a process dies.
pub(crate) struct Thread {
    /// Name of the thread that serves.
    name: String,
    keeper: JoinHandle<io::Result<()>>,
}

impl Thread {
    /// Closes `ring` once the thread that serves it has ended.
    fn keep(serving: Serving, ring: OwnedFd) -> Result<Self, Error> {
        let name = serving.thread().name().unwrap_or("ublk").to_owned();
        let run = move || {
            let ended = serving.join();
            drop(ring);
            ended.unwrap_or_else(|panic| resume_unwind(panic))
        };
        let keeper = Builder::new().name(format!("keep-{name}")).spawn(run);
        let keeper = keeper.map_err(|e| Error::system("start a thread that waits for a ublk queue", e))?;
        Ok(Self { name, keeper })
    }

    /// Whether the queue is no longer served, and its ring closed.
    pub(crate) fn is_finished(&self) -> bool {
        self.keeper.is_finished()
    }
}

/// A thread that serves a queue.
type Serving = JoinHandle<io::Result<()>>;

/// A thread that is to serve a queue, and what is said to and by it, in this order.
struct Starting {
    thread: Serving,
    /// Its queue is open; its ring, to be held.
    opened: Receiver<io::Result<OwnedFd>>,
    /// Begin. Dropped: end instead.
    go: SyncSender<()>,
    /// Its commands are with the kernel.
    begun: Receiver<io::Result<()>>,
}

/// Starts a thread per queue and returns when every tag's command is with the kernel.
///
/// No queue begins before all are open. *(A recovery that ended between the first queue's beginning and the last one's cannot be
/// begun again: Linux 6.12 then follows a null pointer. Opening a queue can fail and takes its time, and the kernel hears nothing of it;
/// beginning does neither.)*
///
/// # Errors
/// Those of opening a queue: then none has begun. Threads that did begin end by themselves when the device is stopped or deleted.
pub(crate) fn start<D: BlockDevice>(
    control: &Control,
    id: u32,
    queues: u16,
    device: &Arc<D>,
    setup: impl Fn(u16) -> Setup,
) -> Result<Vec<Thread>, Error> {
    let mut starting = Vec::with_capacity(usize::from(queues));
    for qid in 0..queues {
        let affinity = affinity(control, id, qid);
        starting.push(start_one(id, setup(qid), Arc::clone(device), affinity)?);
    }
    let mut threads = Vec::with_capacity(starting.len());
    let mut open = Vec::with_capacity(starting.len());
    for (qid, Starting { thread, opened, go, begun }) in starting.into_iter().enumerate() {
        let ring = answer(&opened, || format!("open queue {qid} of ublk device {id}"))?;
        threads.push(Thread::keep(thread, ring)?);
        open.push((go, begun));
    }
    for (go, _) in &open {
        // One that has ended since says nothing below.
        let _ = go.send(());
    }
    for (qid, (_, begun)) in open.iter().enumerate() {
        answer(begun, || format!("begin queue {qid} of ublk device {id}"))?;
    }
    Ok(threads)
}

/// What a thread has to say.
fn answer<T>(from: &Receiver<io::Result<T>>, what: impl Fn() -> String) -> Result<T, Error> {
    match from.recv_timeout(READY_MAX) {
        Ok(answer) => answer.map_err(|error| Error::system(what(), error)),
        Err(_) => Err(Error::new(ErrorKind::TimedOut, format!("cannot {}: no answer of its thread", what()))),
    }
}

/// The processors of a queue. With one queue that is all of them.
fn affinity(control: &Control, id: u32, qid: u16) -> Option<CpuSet> {
    let mask = control.queue_affinity(id, qid, MASK_BYTES).ok()?;
    let mut set = CpuSet::new();
    let mut any = false;
    for cpu in 0..CpuSet::count() {
        // The mask is an array of longs; on a little-endian machine its bytes are in order.
        if mask[cpu / 8] & (1 << (cpu % 8)) != 0 {
            any |= set.set(cpu).is_ok();
        }
    }
    any.then_some(set)
}

fn start_one<D: BlockDevice>(
    id: u32,
    setup: Setup,
    device: Arc<D>,
    affinity: Option<CpuSet>,
) -> Result<Starting, Error> {
    let (tell_opened, opened) = sync_channel(1);
    let (go, told_to_go) = sync_channel(1);
    let (tell_begun, begun) = sync_channel(1);
    let qid = setup.qid;
    let siblings = Arc::clone(&setup.siblings);
    let run = move || {
        if let Some(set) = affinity
            && let Err(error) = sched_setaffinity(Pid::from_raw(0), &set)
        {
            // The process is confined to others: it serves from there.
            tracing::debug!(id, qid, %error, "queue thread not pinned");
        }
        flush_io(id, qid);
        let opened = Queue::open(setup, &*device).and_then(|queue| Ok((queue.hold_ring()?, queue)));
        drop(device);
        let (ring, mut queue) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let _starter_gone = tell_opened.send(Err(error));
                return Ok(());
            }
        };
        if tell_opened.send(Ok(ring)).is_err() || told_to_go.recv().is_err() {
            // Another queue could not be opened.
            return Ok(());
        }
        // Dropped also where the queue panics.
        let watch = FailureWatch { siblings, armed: true };
        let begun = queue.fetch_all();
        let has_begun = begun.is_ok();
        let _starter_gone = tell_begun.send(begun);
        if has_begun { serve(id, queue, watch) } else { Ok(()) }
    };
    let name = format!("ublk-{id}-{qid}");
    let thread = Builder::new().name(name).spawn(run).map_err(|e| Error::system("start a ublk queue thread", e))?;
    Ok(Starting { thread, opened, go, begun })
}

/// Tells the other queues if this one ends otherwise than well.
struct FailureWatch {
    siblings: Arc<Siblings>,
    armed: bool,
}

impl Drop for FailureWatch {
    fn drop(&mut self) {
        if self.armed {
            self.siblings.fail();
        }
    }
}

fn serve<D: BlockDevice>(id: u32, mut queue: Queue<D>, mut watch: FailureWatch) -> io::Result<()> {
    let result = queue.run();
    match &result {
        Ok(()) => watch.armed = false,
        Err(_) if watch.siblings.are_ordered() => {}
        Err(error) => tracing::error!(id, %error, "a ublk queue is no longer served"),
    }
    result
}

/// Tells the kernel that this thread writes blocks on behalf of others: an allocation in here must not wait until dirty pages
/// are written, for they may be on this very device.
fn flush_io(id: u32, qid: u16) {
    if let Err(error) = become_io_flusher() {
        tracing::warn!(id, qid, %error, "queue thread is no I/O flusher (CAP_SYS_RESOURCE): memory pressure may block it");
    }
}

/// Makes the calling thread an I/O flusher (`PR_SET_IO_FLUSHER`): its allocations never wait for the write-out of dirty pages,
/// which may go to a device that this process serves. Threads started later, and programs executed, inherit it.
///
/// # Errors
/// The kernel's: without `CAP_SYS_RESOURCE`, or before Linux 5.6.
pub fn become_io_flusher() -> io::Result<()> {
    /// `linux/prctl.h`.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    const NONE: libc::c_ulong = 0;
    const ON: libc::c_ulong = 1;
    // SAFETY: sets a flag of the calling thread; takes no address.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, ON, NONE, NONE, NONE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits for the threads' ends.
///
/// # Errors
/// The first failure among them.
pub(crate) fn join(threads: Vec<Thread>) -> Result<(), Error> {
    let mut failure = None;
    for thread in threads {
        let Thread { name, keeper } = thread;
        let error = match keeper.join() {
            Ok(Ok(())) => continue,
            Ok(Err(source)) => Error::system(format!("thread {name} failed"), source),
            Err(_) => Error::new(ErrorKind::System, format!("thread {name} panicked")),
        };
        failure.get_or_insert(error);
    }
    failure.map_or(Ok(()), Err)
}
