//! One front end's thread at a view.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::channel::Sender;
use farshore_uring::{AlignedBuf, BlockQueue, BufPool, Completion, Done, Io, Purpose, Request, Storage, Waker};

use super::{Core, errno};
use crate::error::{Error, Kind, Result};

/// Free buffers kept per queue, by size.
const POOL: [(usize, usize); 3] = [(4 << 10, 128), (64 << 10, 32), (1 << 20, 8)];

/// A queue: hands requests to the view's workers and collects what they did. Bounded by the front end's tags.
pub struct ViewQueue<S: Storage> {
    core: Arc<Core<S>>,
    /// `None`: requests are served here.
    workers: Option<Sender<Work>>,
    ended: Arc<Ended>,
    pool: BufPool,
}

struct Ended {
    done: Mutex<VecDeque<Done<AlignedBuf>>>,
    waker: Waker,
}

/// One request on its way through a worker.
pub(super) struct Work {
    tag: u32,
    request: Request<AlignedBuf>,
    ended: Arc<Ended>,
}

/// Serves one request.
pub(super) fn run<S: Storage>(core: &Core<S>, work: Work) {
    let Work { tag, request, ended } = work;
    let mut read = None;
    let result: Result<()> = match request {
        Request::Read { offset, len, mut buf } => {
            let result = match buf.get_mut(..len as usize) {
                Some(out) => core.read(offset, out),
                None => Err(Error::new(Kind::Invalid, format!("read of {len} bytes into a shorter buffer"))),
            };
            read = Some(buf);
            result
        }
        Request::Write { offset, len, buf, fua } => match buf.get(..len as usize) {
            Some(bytes) => core.write(offset, bytes, fua),
            None => Err(Error::new(Kind::Invalid, format!("write of {len} bytes from a shorter buffer"))),
        },
        Request::Flush => core.flush(),
        Request::Discard { offset, len } => core.zero(offset, len, false),
        Request::WriteZeroes { offset, len, fua, no_hole: _ } => core.zero(offset, len, fua),
    };
    let result = result.map_err(|error| {
        tracing::error!(error = error.context(), "request to a view failed");
        errno(&error)
    });
    ended.done.lock().unwrap_or_else(PoisonError::into_inner).push_back(Done { tag, result, buf: read });
    ended.waker.wake();
}

impl<S: Storage> ViewQueue<S> {
    pub(super) fn new(core: Arc<Core<S>>, workers: Option<Sender<Work>>, waker: Waker) -> Self {
        let ended = Arc::new(Ended { done: Mutex::default(), waker });
        Self { core, workers, ended, pool: BufPool::new(&POOL) }
    }
}

impl<S: Storage> BlockQueue for ViewQueue<S> {
    type Buf = AlignedBuf;

    fn buffer(&mut self, _purpose: Purpose, len: u32) -> AlignedBuf {
        self.pool.take(len as usize)
    }

    fn submit<I: Io<AlignedBuf>>(&mut self, _io: &mut I, tag: u32, request: Request<AlignedBuf>) {
        let work = Work { tag, request, ended: Arc::clone(&self.ended) };
        match &self.workers {
            Some(workers) => {
                // Workers go only when no sender is left; should they have died, the request is served here.
                if let Err(error) = workers.send(work) {
                    run(&*self.core, error.into_inner());
                }
            }
            None => run(&*self.core, work),
        }
    }

    fn handle_completion<I: Io<AlignedBuf>>(&mut self, _io: &mut I, _completion: Completion<AlignedBuf>) {
        // A view's queue starts no operations of its own.
    }

    fn handle_wake<I: Io<AlignedBuf>>(&mut self, _io: &mut I) {}

    fn poll_done(&mut self) -> Option<Done<AlignedBuf>> {
        self.ended.done.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}
