//! Counters of a server, one set per queue, each written by its queue's thread only.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device's queues have done since the server started.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Reads ended.
    pub reads: u64,
    /// Writes ended.
    pub writes: u64,
    /// Flushes ended.
    pub flushes: u64,
    /// Discards and write-zeroes ended.
    pub discards: u64,
    /// Requests among these that ended with an error.
    pub errors: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written, zeroes not counted.
    pub bytes_written: u64,
    /// Turns of the queues' loops. Grows while requests come; one turn is one entry into the kernel.
    pub turns: u64,
    /// Entries into the kernel to wait for the next turn: one more than turns of each queue that waits now.
    pub waits: u64,
    /// System calls made for a single request's data, apart from the turns.
    pub copy_calls: u64,
}

macro_rules! counters {
    ($($name:ident),+) => {
        /// The counters of one queue.
        #[derive(Default, Debug)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)+
        }

        impl Stats {
            /// The sum over all queues.
            pub(crate) fn sum<'a>(queues: impl Iterator<Item = &'a Counters>) -> Self {
                let mut stats = Self::default();
                for queue in queues {
                    $(stats.$name += queue.$name.0.load(Ordering::Relaxed);)+
                }
                stats
            }
        }
    };
}

counters!(reads, writes, flushes, discards, errors, bytes_read, bytes_written, turns, waits, copy_calls);

impl Counters {
    /// The turn that the queue's thread is at; `None`: it waits in the kernel.
    pub(crate) fn turn(&self) -> Option<u64> {
        let (turns, waits) = (self.turns.0.load(Ordering::Relaxed), self.waits.0.load(Ordering::Relaxed));
        (waits == turns).then_some(turns)
    }
}

/// A counter with one writer.
#[derive(Default, Debug)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Relaxed, load and store: only one thread writes, and readers want a recent value, no order.
    pub(crate) fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }
}
