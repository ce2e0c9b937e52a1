//! Drives one group's [`Syncer`] on a thread and a ring of its own: it asks files for their holes, which may block.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use farshore_blkfilter::sync::{SyncConfig, SyncProgress, Syncer};
use farshore_blkfilter::{Buf, CaptureGroup, FilterVolume};
use farshore_proto::keys::DedupKey;
use farshore_proto::message::Answers;
use farshore_proto::{Position, VolumeIndex};
use farshore_uring::{FileDevice, Io, Reactor, Wait, Waker};

use crate::{Error, Result, clock};

/// Operations of sync's ring: its window of reads and some room.
const RING_DEPTH: u32 = 64;
/// Events that may wait for the thread. It empties the queue at every turn; a full queue makes the sender wait for that
/// turn, never a guest.
const QUEUE: usize = 1024;

/// What the thread is told.
pub(crate) enum SyncOrder {
    Add(Arc<FilterVolume<FileDevice>>),
    Remove(VolumeIndex, SyncSender<()>),
    Live { empty: Vec<VolumeIndex>, from: Position },
    Break,
    Answers(Answers),
    Durable(Position),
    Stop,
}

/// A group's sync.
pub(crate) struct SyncThread {
    orders: SyncSender<SyncOrder>,
    waker: Waker,
    progress: Arc<Mutex<Option<SyncProgress>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl SyncThread {
    pub(crate) fn start(group: Arc<CaptureGroup>, config: SyncConfig, key: DedupKey) -> Result<Self> {
        let (orders, inbox) = sync_channel(QUEUE);
        let (ready, started) = sync_channel(1);
        let progress = Arc::new(Mutex::new(None));
        let shown = Arc::clone(&progress);
        let thread = std::thread::Builder::new()
            .name("farshore-sync".into())
            .spawn(move || {
                let reactor = match Reactor::<Buf>::new(RING_DEPTH) {
                    Ok(reactor) => reactor,
                    Err(error) => {
                        // The receiver waits for this one message.
                        let _ = ready.send(Err(error));
                        return;
                    }
                };
                let _ = ready.send(Ok(reactor.waker()));
                group.set_sync_waker({
                    let waker = reactor.waker();
                    move || waker.wake()
                });
                let syncer = Syncer::new(group, config, key);
                Turns { reactor, syncer, inbox, shown }.run();
            })
            .map_err(|error| Error::failed("sync thread", error))?;
        let waker = started
            .recv()
            .map_err(|_| Error::failed("sync thread", "ended at once"))?
            .map_err(|error| Error::failed("sync thread's io_uring", error))?;
        Ok(Self { orders, waker, progress, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn tell(&self, order: SyncOrder) {
        // Fails only after `stop`, when there is nothing left to be told.
        if self.orders.send(order).is_ok() {
            self.waker.wake();
        }
    }

    /// Forgets a volume; returns when no read of it is wanted any more.
    pub(crate) fn remove(&self, index: VolumeIndex) {
        let (done, wait) = sync_channel(1);
        self.tell(SyncOrder::Remove(index, done));
        let _ = wait.recv();
    }

    pub(crate) fn progress(&self) -> Option<SyncProgress> {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) {
        self.tell(SyncOrder::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("sync thread panicked");
        }
    }
}

impl Drop for SyncThread {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Turns {
    reactor: Reactor<Buf>,
    syncer: Syncer,
    inbox: Receiver<SyncOrder>,
    shown: Arc<Mutex<Option<SyncProgress>>>,
}

impl Turns {
    fn run(mut self) {
        let mut shown_at = clock::now();
        while self.take_orders() {
            if self.reactor.take_wakeup() {
                self.syncer.handle_wake();
            }
            while let Some(completion) = self.reactor.poll_completion() {
                self.syncer.handle_completion(&mut self.reactor, clock::now(), completion);
            }
            self.syncer.poll(&mut self.reactor, clock::now());
            let now = clock::now();
            if now.since(shown_at).as_millis() >= 100 {
                // Counting bits is not free; people do not look more often.
                *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.syncer.progress());
                shown_at = now;
            }
            let deadline = self.syncer.poll_deadline().map(clock::instant);
            if let Err(error) = self.reactor.run_once(Wait::Until(deadline)) {
                tracing::error!(%error, "sync's io_uring failed; sync stops until the agent is started again");
                return;
            }
        }
    }

    /// `false`: stop.
    fn take_orders(&mut self) -> bool {
        while let Ok(order) = self.inbox.try_recv() {
            match order {
                SyncOrder::Add(volume) => {
                    if let Err(error) = self.syncer.add_volume(&mut self.reactor, &volume) {
                        tracing::error!(%error, "sync cannot read a volume");
                    }
                }
                SyncOrder::Remove(index, done) => {
                    self.syncer.remove_volume(&mut self.reactor, index);
                    let _ = done.send(());
                }
                SyncOrder::Live { empty, from } => self.syncer.handle_live(&empty, from),
                SyncOrder::Break => self.syncer.handle_break(),
                SyncOrder::Answers(answers) => self.syncer.handle_answers(&answers),
                SyncOrder::Durable(position) => self.syncer.handle_durable(position),
                SyncOrder::Stop => return false,
            }
        }
        true
    }
}
