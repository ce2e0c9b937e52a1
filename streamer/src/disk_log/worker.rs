//! The thread that waits for the log's disk, so that nobody else does.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam::channel::{Receiver, Sender, bounded};
use farshore_proto::BatchNo;
use farshore_uring::{DirFile, StorageFile};

use super::{GroupLog, LoggedBatch, NotAppended};
use crate::{Error, Result};

/// Orders that wait for the disk, at most. Those that carry bytes are fewer, by the machine's own limits.
const ORDERS: usize = 1024;
/// Appended batches that one sync makes durable, at most: the ring waits for it.
const TURN_BYTES: u64 = 32 << 20;

/// What the streamer wants of its disk log. `epoch`: rises whenever the log is emptied; answers repeat it.
#[derive(Debug)]
pub enum LogOrder {
    /// A line begins: record durably that there is one, then [`crate::Streamer::handle_log_begun`].
    Begin,
    /// Put a batch behind the last one, durably.
    Append {
        /// Life of the log.
        epoch: u64,
        /// What is known of it.
        batch: Box<LoggedBatch>,
        /// Its bytes.
        pieces: Vec<Bytes>,
    },
    /// Read a batch.
    Load {
        /// Life of the log.
        epoch: u64,
        /// Which.
        number: BatchNo,
    },
    /// The target has everything up to this batch.
    Trim {
        /// Last of them.
        number: BatchNo,
    },
    /// The line is at its end: record durably that there is none, then empty the log.
    End,
    /// As [`Self::End`], whatever is in it: what it held is compared.
    GiveUp,
    /// See whether an empty log that was in trouble can be written again.
    Probe {
        /// Life of the log.
        epoch: u64,
    },
}

/// What came of an order.
#[derive(Debug)]
pub enum LogDone {
    /// Everything up to this batch is durable in the log.
    Appended {
        /// Life of the log.
        epoch: u64,
        /// Last of them.
        number: BatchNo,
    },
    /// There is no room for this batch, nor for those behind it.
    Full {
        /// Life of the log.
        epoch: u64,
    },
    /// The log takes nothing any more.
    Failed {
        /// Life of the log.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// It can be written again.
    Probed {
        /// Life of the log.
        epoch: u64,
    },
    /// A batch was read.
    Loaded {
        /// Life of the log.
        epoch: u64,
        /// Which.
        number: BatchNo,
        /// Its bytes.
        bytes: Bytes,
    },
    /// A batch cannot be read.
    Unreadable {
        /// Life of the log.
        epoch: u64,
        /// Which.
        number: BatchNo,
        /// Why.
        reason: String,
    },
}

pub(crate) enum ToWorker {
    Order(LogOrder),
    /// Empty the log; the line that comes next.
    Clear(u64),
}

/// A thread with one group's log. Bounded by the machine, which has few orders open at a time.
pub(crate) struct LogWorker {
    orders: Option<Sender<ToWorker>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) used: Arc<AtomicU64>,
    pub(crate) size: u64,
}

impl LogWorker {
    /// Starts it; `done` takes answers and must not wait.
    pub(crate) fn start(name: String, log: GroupLog<DirFile>, done: impl Fn(LogDone) + Send + 'static) -> Result<Self> {
        let (sender, receiver) = bounded(ORDERS);
        let (used, size) = (log.used(), log.size_bytes());
        let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
            farshore_uring::work_in_background();
            run(log, &receiver, &done);
        });
        let thread = thread.map_err(|source| Error::Thread { name, source })?;
        Ok(Self { orders: Some(sender), thread: Some(thread), used, size })
    }

    /// Gives an order. `Err`: too many wait. One to a thread that died is lost, and its batches stay in the ring.
    pub(crate) fn give(&self, order: ToWorker) -> std::result::Result<(), ToWorker> {
        use crossbeam::channel::TrySendError;
        match self.orders.as_ref().map(|orders| orders.try_send(order)) {
            Some(Err(TrySendError::Full(order))) => Err(order),
            Some(Ok(()) | Err(TrySendError::Disconnected(_))) | None => Ok(()),
        }
    }

    /// Ends the thread, unless it waits for a disk that does not answer: then it ends with the process.
    pub(crate) fn stop(mut self, wait: bool) {
        self.orders = None;
        if let Some(thread) = self.thread.take().filter(|thread| wait || thread.is_finished())
            && thread.join().is_err()
        {
            tracing::error!("the disk log's thread died of a panic");
        }
    }
}

fn run<F: StorageFile>(log: GroupLog<F>, orders: &Receiver<ToWorker>, give: &impl Fn(LogDone)) {
    let mut turn = LogTurn::new(log);
    while let Ok(first) = orders.recv() {
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(order) = next {
            if let ToWorker::Order(LogOrder::Append { batch, .. }) = &order {
                bytes += batch.len;
            }
            match order {
                ToWorker::Order(order) => turn.obey(order, give),
                ToWorker::Clear(line) => turn.clear(line),
            }
            next = if bytes < TURN_BYTES { orders.try_recv().ok() } else { None };
        }
        turn.sync(give);
    }
}

/// What a group's log does with its orders. Blocks. After some of them [`Self::sync`]: then what was appended is answered.
#[derive(Debug)]
pub struct LogTurn<F> {
    log: GroupLog<F>,
    /// A write failed: what the file holds is not known, and nothing is appended to it.
    broken: Option<String>,
    unsynced: Option<(u64, BatchNo)>,
}

impl<F: StorageFile> LogTurn<F> {
    /// Over a line that was begun or taken up.
    #[must_use]
    pub fn new(log: GroupLog<F>) -> Self {
        Self { log, broken: None, unsynced: None }
    }

    /// One order; what comes of it goes to `give`.
    ///
    /// # Panics
    /// If it is one that something has to be recorded for: [`LogOrder::Begin`], [`LogOrder::End`], [`LogOrder::GiveUp`].
    pub fn obey(&mut self, order: LogOrder, give: &impl Fn(LogDone)) {
        match order {
            LogOrder::Append { epoch, batch, pieces } => {
                if let Some(reason) = &self.broken {
                    return give(LogDone::Failed { epoch, reason: reason.clone() });
                }
                // Behind one that found no room.
                if self.log.last().is_some_and(|last| batch.number != last.next()) {
                    return give(LogDone::Full { epoch });
                }
                match self.log.append(&batch, &pieces) {
                    Ok(()) => self.unsynced = Some((epoch, batch.number)),
                    Err(NotAppended::Full) => {
                        // Those before it are taken, and must not be given again.
                        self.sync(give);
                        give(LogDone::Full { epoch });
                    }
                    Err(NotAppended::Failed(error)) => self.fail(epoch, &error, give),
                }
            }
            LogOrder::Load { epoch, number } => give(match self.log.load(number) {
                Ok(bytes) => LogDone::Loaded { epoch, number, bytes: bytes.into() },
                Err(error) => LogDone::Unreadable { epoch, number, reason: error.to_string() },
            }),
            LogOrder::Trim { number } => self.log.trim(number),
            LogOrder::Probe { epoch } => match self.log.probe() {
                Ok(()) => give(LogDone::Probed { epoch }),
                Err(error) => give(LogDone::Failed { epoch, reason: error.to_string() }),
            },
            LogOrder::Begin | LogOrder::End | LogOrder::GiveUp => {
                unreachable!("the streamer's thread obeys these")
            }
        }
    }

    /// Empties the log, which becomes the line of this number.
    pub fn clear(&mut self, line: u64) {
        self.unsynced = None;
        self.broken = None;
        self.log.clear(line);
    }

    /// Makes durable what was appended, and answers for it.
    pub fn sync(&mut self, give: &impl Fn(LogDone)) {
        let Some((epoch, number)) = self.unsynced.take() else { return };
        match self.log.sync() {
            Ok(()) => give(LogDone::Appended { epoch, number }),
            Err(error) => self.fail(epoch, &error, give),
        }
    }

    fn fail(&mut self, epoch: u64, error: &std::io::Error, give: &impl Fn(LogDone)) {
        self.unsynced = None;
        self.broken = Some(error.to_string());
        give(LogDone::Failed { epoch, reason: error.to_string() });
    }
}
