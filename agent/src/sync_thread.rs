//! Drives one group's [`Syncer`] on a thread and a ring of its own: it asks files for their holes, which may block. A syncer that
//! dies, of a bug or with its io_uring, is replaced by a new one after a pause; what it had under way is done again.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_blkfilter::sync::{
    DIFFERENCES_MAX, SyncConfig, SyncProgress, Syncer, VerifyEvent, VerifyFound, VerifyOrder, VerifyProgress,
};
use farshore_blkfilter::{BackingFile, Buf, CaptureGroup, FilterVolume};
use farshore_proto::keys::DedupKey;
use farshore_proto::message::Answers;
use farshore_proto::{Now, Position, VolumeIndex};
use farshore_uring::{FileDevice, Io, Reactor, Wait, Waker};

use crate::{Error, Result, clock};

/// Operations of sync's ring: its window of reads and some room.
const RING_DEPTH: u32 = 64;
/// Events that may wait for the thread. It empties the queue at every turn; a full queue makes the sender wait for that
/// turn, never a guest.
const QUEUE: usize = 1024;
/// How often the shown progress is counted anew. Counting bits is not free; people do not look more often.
const SHOW: Duration = Duration::from_millis(100);

/// Longest pause before a sync that died begins anew: a person acts on minutes.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What the thread is told.
pub(crate) enum SyncOrder<F = FileDevice> {
    Add(Arc<FilterVolume<F>>),
    Remove(VolumeIndex, SyncSender<()>),
    Live { empty: Vec<VolumeIndex>, from: Position },
    Break,
    Answers(Answers),
    Durable(Position),
    Verify(VerifyOrder),
    Stop,
}

/// What the thread tells.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SyncReport {
    /// Sync died, of this; it begins anew after a pause.
    Died(String),
    /// Sync runs again, and has for as long as the pause before was.
    Sound,
    /// Sync cannot read this volume, so nothing of it is compared or sent.
    Unread(VolumeIndex, String),
    /// Sync has this volume.
    Read(VolumeIndex),
}

/// When a sync that died begins anew.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Restarts {
    /// First pause; doubles with each death that comes before sync was sound again.
    pub first: Duration,
    /// Longest pause.
    pub max: Duration,
}

impl Default for Restarts {
    /// A second, so that a lasting trouble costs little, to [`PAUSE_MAX`].
    fn default() -> Self {
        Self { first: Duration::from_secs(1), max: PAUSE_MAX }
    }
}

/// Counts deaths. Inputs: [`Self::handle_death`], [`Self::handle_start`], [`Self::handle_turn`].
struct Health {
    restarts: Restarts,
    /// The last pause; none: sound.
    pause: Option<Duration>,
    started: Now,
}

impl Health {
    fn new(restarts: Restarts) -> Self {
        Self { restarts, pause: None, started: Now(0) }
    }

    /// The pause before the next attempt.
    fn handle_death(&mut self) -> Duration {
        let pause = self.pause.map_or(self.restarts.first, |last| last.saturating_mul(2)).min(self.restarts.max);
        self.pause = Some(pause);
        pause
    }

    fn handle_start(&mut self, now: Now) {
        self.started = now;
    }

    /// A turn ended well. `true`: sync counts as sound again, said once.
    fn handle_turn(&mut self, now: Now) -> bool {
        self.pause.take_if(|pause| now.since(self.started) >= *pause).is_some()
    }
}

/// The waker of the reactor that runs now.
#[derive(Default)]
struct CurrentWaker(RwLock<Option<Waker>>);

impl CurrentWaker {
    fn wake(&self) {
        // Written only when sync begins anew, so nobody waits here.
        if let Some(waker) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            waker.wake();
        }
    }

    fn replace(&self, waker: Waker) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(waker);
    }
}

/// What the thread shows to whoever looks.
#[derive(Default)]
struct Shown {
    progress: Option<SyncProgress>,
    passes: BTreeMap<u16, VerifyProgress>,
    /// Orders for passes that the thread has not taken: [`Self::passes`] has them already.
    ordered: usize,
    /// Findings that nobody has taken; of each volume at most [`DIFFERENCES_MAX`] and its passes' ends.
    events: Vec<VerifyEvent>,
}

/// A group's sync.
pub(crate) struct SyncThread<F = FileDevice> {
    orders: SyncSender<SyncOrder<F>>,
    waker: Arc<CurrentWaker>,
    shown: Arc<Mutex<Shown>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<F: BackingFile> SyncThread<F> {
    /// `report` is called on the thread and must not wait for it.
    pub(crate) fn start(
        group: Arc<CaptureGroup>,
        config: SyncConfig,
        key: DedupKey,
        restarts: Restarts,
        report: impl Fn(SyncReport) + Send + 'static,
    ) -> Result<Self> {
        let (orders, inbox) = sync_channel(QUEUE);
        let (ready, started) = sync_channel(1);
        let waker = Arc::<CurrentWaker>::default();
        group.set_sync_waker({
            let waker = Arc::clone(&waker);
            move || waker.wake()
        });
        let shown = Arc::<Mutex<Shown>>::default();
        let life = Life {
            group,
            config,
            key,
            inbox,
            shown: Arc::clone(&shown),
            waker: Arc::clone(&waker),
            report: Box::new(report),
            volumes: BTreeMap::new(),
            live: false,
            health: Health::new(restarts),
        };
        let thread = std::thread::Builder::new()
            .name("farshore-sync".into())
            .spawn(move || {
                farshore_uring::work_in_background();
                match Reactor::new(RING_DEPTH) {
                    Ok(reactor) => {
                        // The receiver waits for this one message.
                        let _ = ready.send(Ok(()));
                        life.run(reactor);
                    }
                    Err(error) => _ = ready.send(Err(error)),
                }
            })
            .map_err(|error| Error::failed("sync thread", error))?;
        started
            .recv()
            .map_err(|_| Error::failed("sync thread", "ended at once"))?
            .map_err(|error| Error::failed("sync thread's io_uring", error))?;
        Ok(Self { orders, waker, shown, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn tell(&self, order: SyncOrder<F>) {
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
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).progress
    }

    /// Begins a pass. It shows as under way from now on, until it has ended or its syncer has.
    pub(crate) fn verify(&self, order: VerifyOrder) {
        let VerifyOrder { volume, pass, from, .. } = order;
        let begun = VerifyProgress { pass, at: from, found: VerifyFound::default() };
        {
            let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            shown.passes.insert(volume.0, begun);
            shown.ordered += 1;
        }
        self.tell(SyncOrder::Verify(order));
    }

    /// How far the pass over a volume is; `None`: there is none under way.
    pub(crate) fn verify_progress(&self, volume: VolumeIndex) -> Option<VerifyProgress> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).passes.get(&volume.0).cloned()
    }

    /// What could not be kept: given again by the next [`Self::take_verify_events`].
    pub(crate) fn give_back_verify_events(&self, mut events: Vec<VerifyEvent>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        events.append(&mut shown.events);
        shown.events = events;
    }

    /// What passes have found since the last call.
    pub(crate) fn take_verify_events(&self) -> Vec<VerifyEvent> {
        std::mem::take(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner).events)
    }
}

impl<F> SyncThread<F> {
    pub(crate) fn stop(&self) {
        if self.orders.send(SyncOrder::Stop).is_ok() {
            self.waker.wake();
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("sync thread panicked");
        }
    }
}

impl<F> Drop for SyncThread<F> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The thread: one syncer after the other, and what a new one must be told.
struct Life<F> {
    group: Arc<CaptureGroup>,
    config: SyncConfig,
    key: DedupKey,
    inbox: Receiver<SyncOrder<F>>,
    shown: Arc<Mutex<Shown>>,
    waker: Arc<CurrentWaker>,
    report: Box<dyn Fn(SyncReport) + Send>,
    volumes: BTreeMap<u16, Arc<FilterVolume<F>>>,
    live: bool,
    health: Health,
}

impl<F: BackingFile> Life<F> {
    fn run(mut self, first: Reactor<Buf>) {
        let mut reactor = Some(first);
        loop {
            // What is in an odd state after a panic is thrown away with the syncer; the group's own state is only changed where
            // nothing can panic.
            let ended = catch_unwind(AssertUnwindSafe(|| self.live_once(reactor.take())));
            let reason = match ended {
                Ok(Ok(())) => return,
                Ok(Err(error)) => format!("its io_uring failed: {error}"),
                Err(panic) => format!("it panicked: {}", message(&*panic)),
            };
            {
                let mut shown = self.shown();
                shown.progress = None;
                shown.passes.clear();
            }
            let pause = self.health.handle_death();
            tracing::error!(reason, ?pause, "sync died; it begins anew after a pause");
            (self.report)(SyncReport::Died(reason));
            if !self.rest(pause) {
                return;
            }
        }
    }

    /// One syncer, until it is told to stop.
    fn live_once(&mut self, reactor: Option<Reactor<Buf>>) -> std::io::Result<()> {
        let mut reactor = reactor.map_or_else(|| Reactor::new(RING_DEPTH), Ok)?;
        self.waker.replace(reactor.waker());
        // Dropped before the reactor: a read that hangs there must not keep its range's lock (I1).
        let mut syncer = Syncer::new(Arc::clone(&self.group), self.config.clone(), self.key.clone());
        for volume in self.volumes.values() {
            self.add(&mut syncer, &mut reactor, volume);
        }
        if self.live {
            // Whether the target is still empty is not known any more: everything is asked about.
            syncer.handle_live(&[], Position(0));
        }
        let mut shown_at = clock::now();
        self.health.handle_start(shown_at);
        while self.take_orders(&mut syncer, &mut reactor) {
            if reactor.take_wakeup() {
                syncer.handle_wake();
            }
            while let Some(completion) = reactor.poll_completion() {
                syncer.handle_completion(&mut reactor, clock::now(), completion);
            }
            syncer.poll(&mut reactor, clock::now());
            self.note_verify(&mut syncer);
            let now = clock::now();
            if now.since(shown_at) >= SHOW {
                self.show(&syncer);
                shown_at = now;
            }
            if self.health.handle_turn(now) {
                (self.report)(SyncReport::Sound);
            }
            let deadline = syncer.poll_deadline().map(clock::instant);
            reactor.run_once(Wait::Until(deadline))?;
        }
        Ok(())
    }

    fn add(&self, syncer: &mut Syncer, reactor: &mut Reactor<Buf>, volume: &Arc<FilterVolume<F>>) {
        let Some(index) = volume.volume().map(|volume| volume.index()) else { return };
        (self.report)(match syncer.add_volume(reactor, volume) {
            Ok(()) => SyncReport::Read(index),
            Err(error) => SyncReport::Unread(index, error.to_string()),
        });
    }

    /// `false`: stop.
    fn take_orders(&mut self, syncer: &mut Syncer, reactor: &mut Reactor<Buf>) -> bool {
        while let Ok(order) = self.inbox.try_recv() {
            self.note(&order);
            match order {
                SyncOrder::Add(volume) => self.add(syncer, reactor, &volume),
                SyncOrder::Remove(index, done) => {
                    syncer.remove_volume(reactor, index);
                    let _ = done.send(());
                }
                SyncOrder::Live { empty, from } => syncer.handle_live(&empty, from),
                SyncOrder::Break => syncer.handle_break(),
                SyncOrder::Answers(answers) => syncer.handle_answers(&answers),
                SyncOrder::Durable(position) => syncer.handle_durable(position),
                SyncOrder::Verify(order) => {
                    let begun = syncer.begin_verify(order);
                    let mut shown = self.shown();
                    shown.ordered = shown.ordered.saturating_sub(1);
                    if !begun {
                        // Ordered again when sync has the volume.
                        shown.passes.remove(&order.volume.0);
                    }
                }
                SyncOrder::Stop => return false,
            }
        }
        true
    }

    /// Keeps what the next syncer must be told.
    fn note(&mut self, order: &SyncOrder<F>) {
        match order {
            SyncOrder::Add(volume) => {
                if let Some(index) = volume.volume().map(|volume| volume.index()) {
                    self.volumes.insert(index.0, Arc::clone(volume));
                }
            }
            SyncOrder::Remove(index, _) => _ = self.volumes.remove(&index.0),
            SyncOrder::Live { .. } => self.live = true,
            SyncOrder::Break => self.live = false,
            SyncOrder::Answers(_) | SyncOrder::Durable(_) | SyncOrder::Verify(_) | SyncOrder::Stop => {}
        }
    }

    /// Takes orders for as long as the pause lasts; `false`: stop. Answers are to questions of the dead, and what is durable concerns
    /// only what they claimed.
    fn rest(&mut self, pause: Duration) -> bool {
        let end = clock::now().plus(pause);
        loop {
            match self.inbox.recv_timeout(end.since(clock::now())) {
                Ok(SyncOrder::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => return true,
                Ok(order) => {
                    self.note(&order);
                    match order {
                        SyncOrder::Remove(_, done) => _ = done.send(()),
                        SyncOrder::Verify(order) => {
                            // Ordered again when there is a syncer.
                            let mut shown = self.shown();
                            shown.ordered = shown.ordered.saturating_sub(1);
                            shown.passes.remove(&order.volume.0);
                        }
                        SyncOrder::Add(_) | SyncOrder::Live { .. } | SyncOrder::Break => {}
                        SyncOrder::Answers(_) | SyncOrder::Durable(_) | SyncOrder::Stop => {}
                    }
                }
            }
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what verify has found.
    fn note_verify(&self, syncer: &mut Syncer) {
        while let Some(event) = syncer.poll_verify() {
            let mut shown = self.shown();
            match &event {
                VerifyEvent::Ended { volume, .. } => _ = shown.passes.remove(&volume.0),
                VerifyEvent::Differs { volume, .. } => {
                    let of_it =
                        |event: &&VerifyEvent| matches!(event, VerifyEvent::Differs { volume: of, .. } if of == volume);
                    if shown.events.iter().filter(of_it).count() >= DIFFERENCES_MAX {
                        continue;
                    }
                }
            }
            shown.events.push(event);
        }
    }

    fn show(&self, syncer: &Syncer) {
        let progress = syncer.progress();
        let of = |index: &u16| Some((*index, syncer.verify_progress(VolumeIndex(*index))?));
        let passes: BTreeMap<u16, VerifyProgress> = self.volumes.keys().filter_map(of).collect();
        let mut shown = self.shown();
        shown.progress = Some(progress);
        if shown.ordered == 0 {
            shown.passes = passes;
        }
    }
}

/// What a panic said.
fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the pause doubles while sync keeps dying, and only a sync that lives as long as it paused counts as sound.
    #[test]
    fn sound_is_what_outlives_its_pause() {
        let seconds = Duration::from_secs;
        let mut health = Health::new(Restarts { first: seconds(1), max: seconds(5) });
        assert!(!health.handle_turn(Now(0)), "nothing was wrong");
        let pauses: Vec<Duration> = (0..4).map(|_| health.handle_death()).collect();
        assert_eq!(pauses, [1, 2, 4, 5].map(seconds));
        let start = Now(0).plus(seconds(100));
        health.handle_start(start);
        assert!(!health.handle_turn(start.plus(seconds(4))));
        assert!(health.handle_turn(start.plus(seconds(5))));
        assert!(!health.handle_turn(start.plus(seconds(6))), "said once");
        assert_eq!(health.handle_death(), seconds(1));
    }
}
