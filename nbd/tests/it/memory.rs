//! A block device in memory whose requests end in a seeded random order, that can be held, and that can fail.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use farshore_uring::{BlockDevice, BlockQueue, Completion, Done, Errno, Extent, Geometry, Io, Purpose, Request, Waker};

use crate::rng::Rng;

pub(crate) const GEOMETRY: Geometry = Geometry {
    size: 8 << 20,
    logical_block: 512,
    optimal_block: 4096,
    max_request: 64 << 10,
    max_discard: 1 << 20,
    read_only: false,
    discard: true,
};

pub(crate) struct MemoryDevice {
    geometry: Geometry,
    shared: Arc<Shared>,
}

struct Shared {
    bytes: Mutex<Vec<u8>>,
    /// Which blocks of 512 bytes are allocated.
    allocated: Mutex<Vec<bool>>,
    wakers: Mutex<Vec<Waker>>,
    held: AtomicBool,
    flushes: AtomicU64,
    fua: AtomicU64,
    waiting: AtomicU64,
    failing: Mutex<Option<(Range<u64>, Errno)>>,
    seed: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test panics while it holds this")
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("a small device")
}

impl MemoryDevice {
    pub(crate) fn new(geometry: Geometry, seed: u64) -> Arc<Self> {
        let shared = Shared {
            bytes: Mutex::new(vec![0; index(geometry.size)]),
            allocated: Mutex::new(vec![false; index(geometry.size / 512)]),
            wakers: Mutex::new(Vec::new()),
            held: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            fua: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            failing: Mutex::new(None),
            seed: AtomicU64::new(seed),
        };
        Arc::new(Self { geometry, shared: Arc::new(shared) })
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        lock(&self.shared.bytes).clone()
    }

    pub(crate) fn flushes(&self) -> u64 {
        self.shared.flushes.load(Ordering::SeqCst)
    }

    /// Writes and zeroes that came with FUA.
    pub(crate) fn fua(&self) -> u64 {
        self.shared.fua.load(Ordering::SeqCst)
    }

    /// Requests submitted and not ended.
    pub(crate) fn waiting(&self) -> u64 {
        self.shared.waiting.load(Ordering::SeqCst)
    }

    /// Requests that touch `range` fail from now on.
    pub(crate) fn fail(&self, range: Range<u64>, errno: i32) {
        *lock(&self.shared.failing) = Some((range, Errno(errno)));
    }

    /// No request ends until [`Self::release`].
    pub(crate) fn hold(&self) {
        self.shared.held.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.shared.held.store(false, Ordering::SeqCst);
        lock(&self.shared.wakers).iter().for_each(Waker::wake);
    }
}

impl BlockDevice for MemoryDevice {
    type Buf = Box<[u8]>;
    type Queue = MemoryQueue;

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue<I: Io<Box<[u8]>>>(&self, io: &mut I) -> io::Result<MemoryQueue> {
        lock(&self.shared.wakers).push(io.waker());
        Ok(MemoryQueue {
            max_request: self.geometry.max_request,
            shared: Arc::clone(&self.shared),
            rng: Rng::new(self.shared.seed.fetch_add(1, Ordering::SeqCst)),
            waiting: Vec::new(),
            done: Vec::new(),
        })
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.shared.failure(offset..offset + len)?;
        let allocated = lock(&self.shared.allocated);
        let blocks = &allocated[index(offset / 512)..index((offset + len) / 512)];
        Ok(blocks.chunk_by(|a, b| a == b).map(extent).collect())
    }
}

fn extent(run: &[bool]) -> Extent {
    let len = 512 * u64::try_from(run.len()).expect("a small device");
    Extent { len, hole: !run[0], zero: !run[0] }
}

impl Shared {
    fn failure(&self, range: Range<u64>) -> Result<(), Errno> {
        match &*lock(&self.failing) {
            Some((bad, errno)) if bad.start < range.end && range.start < bad.end => Err(*errno),
            _ => Ok(()),
        }
    }

    fn execute(&self, request: Request<Box<[u8]>>) -> (Result<(), Errno>, Option<Box<[u8]>>) {
        match request {
            Request::Read { offset, len, mut buf } => {
                let range = index(offset)..index(offset + u64::from(len));
                let result = self.failure(offset..offset + u64::from(len));
                buf[..range.len()].copy_from_slice(&lock(&self.bytes)[range]);
                (result, Some(buf))
            }
            Request::Write { offset, len, buf, fua } => {
                self.fua.fetch_add(u64::from(fua), Ordering::SeqCst);
                (self.store(offset, u64::from(len), Some(&buf)), None)
            }
            Request::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
                (self.failure(0..1), None)
            }
            Request::Discard { offset, len } => (self.store(offset, len, None), None),
            Request::WriteZeroes { offset, len, fua, no_hole } => {
                self.fua.fetch_add(u64::from(fua), Ordering::SeqCst);
                let zeroes = vec![0; index(len)];
                (self.store(offset, len, no_hole.then_some(&zeroes)), None)
            }
        }
    }

    /// Stores data, or deallocates.
    fn store(&self, offset: u64, len: u64, data: Option<&[u8]>) -> Result<(), Errno> {
        self.failure(offset..offset + len)?;
        let place = &mut lock(&self.bytes)[index(offset)..index(offset + len)];
        match data {
            Some(data) => place.copy_from_slice(&data[..place.len()]),
            None => place.fill(0),
        }
        lock(&self.allocated)[index(offset / 512)..index((offset + len) / 512)].fill(data.is_some());
        Ok(())
    }
}

pub(crate) struct MemoryQueue {
    max_request: u32,
    shared: Arc<Shared>,
    rng: Rng,
    waiting: Vec<(u32, Request<Box<[u8]>>)>,
    done: Vec<Done<Box<[u8]>>>,
}

impl BlockQueue for MemoryQueue {
    type Buf = Box<[u8]>;

    fn buffer(&mut self, _purpose: Purpose, len: u32) -> Box<[u8]> {
        assert!(len <= self.max_request, "front ends split");
        // Not zero: what the server does not fill must not reach a client unnoticed.
        vec![0xa5; index(u64::from(len))].into()
    }

    fn submit<I: Io<Box<[u8]>>>(&mut self, io: &mut I, tag: u32, request: Request<Box<[u8]>>) {
        assert!(self.waiting.iter().all(|(other, _)| *other != tag), "tag {tag} is in use");
        self.waiting.push((tag, request));
        self.shared.waiting.fetch_add(1, Ordering::SeqCst);
        io.waker().wake();
    }

    fn handle_completion<I: Io<Box<[u8]>>>(&mut self, _io: &mut I, completion: Completion<Box<[u8]>>) {
        panic!("nothing was submitted to the ring: {completion:?}");
    }

    /// Ends some of the waiting requests, in any order, and comes back for the rest.
    fn handle_wake<I: Io<Box<[u8]>>>(&mut self, io: &mut I) {
        if self.shared.held.load(Ordering::SeqCst) {
            return;
        }
        while !self.waiting.is_empty() {
            let (tag, request) = self.waiting.swap_remove(self.rng.index(self.waiting.len()));
            let (result, buf) = self.shared.execute(request);
            self.shared.waiting.fetch_sub(1, Ordering::SeqCst);
            self.done.push(Done { tag, result, buf });
            if self.rng.below(4) == 0 {
                break;
            }
        }
        if !self.waiting.is_empty() {
            io.waker().wake();
        }
    }

    fn poll_done(&mut self) -> Option<Done<Box<[u8]>>> {
        self.done.pop()
    }
}
