//! Worker threads.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use farshore_proto::GroupId;
use farshore_proto::keys::HostKey;

use crate::seal::SegmentPool;
use crate::work::{Done, Work, Worker};
use crate::{Error, Result};

/// Threads that do [`Work`]. Bounded by the machine, which gives out at most one piece more than there are threads.
pub(crate) struct WorkPool<P> {
    work: Option<Sender<Work<P>>>,
    threads: Vec<JoinHandle<()>>,
}

impl<P: std::ops::Deref<Target = [u8]> + Send + 'static> WorkPool<P> {
    /// Starts `workers` threads; `done` takes results and must not wait.
    pub(crate) fn start(
        workers: u32,
        host_key: &HostKey,
        group: GroupId,
        segments: &SegmentPool,
        done: impl Fn(Done<P>) + Clone + Send + 'static,
    ) -> Result<Self> {
        let (sender, receiver) = bounded(workers as usize + 1);
        let mut pool = Self { work: Some(sender), threads: Vec::new() };
        for index in 0..workers {
            let worker = Worker::new(host_key.clone(), group, segments.clone());
            let (receiver, done) = (receiver.clone(), done.clone());
            let name = format!("stream-work-{index}");
            let thread = std::thread::Builder::new().name(name.clone()).spawn(move || run(worker, &receiver, &done));
            pool.threads.push(thread.map_err(|source| Error::Thread { name, source })?);
        }
        Ok(pool)
    }

    /// Gives a piece of work to a thread. `None` only if every thread died of a panic.
    pub(crate) fn give(&self, work: Work<P>) -> Option<()> {
        self.work.as_ref()?.send(work).ok()
    }
}

impl<P> Drop for WorkPool<P> {
    fn drop(&mut self) {
        self.work = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker of the streamer died of a panic");
            }
        }
    }
}

fn run<P: std::ops::Deref<Target = [u8]>>(mut worker: Worker, work: &Receiver<Work<P>>, give: &impl Fn(Done<P>)) {
    let _standing = farshore_uring::StandsBack::begin();
    for work in work {
        let (start, waited) = (clock(), waited_for_processor());
        let mut done = worker.run(work);
        done.busy = clock().saturating_duration_since(start);
        done.starved = waited_for_processor().saturating_sub(waited);
        give(done);
    }
}

#[expect(clippy::disallowed_methods, reason = "measures how long a worker was at it")]
fn clock() -> Instant {
    Instant::now()
}

/// Time for which this thread stood in line for a processor; zero where the kernel does not count it.
fn waited_for_processor() -> Duration {
    let read = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        text.split(' ').nth(1)?.trim().parse().ok()
    };
    Duration::from_nanos(read().unwrap_or(0))
}
