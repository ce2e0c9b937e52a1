//! What the filter has done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one volume's queues have done since the volume was added. Bytes and requests; each only grows.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// One queue's, alone on its cache lines: it has one writer.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub(crate) struct QueueCounters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl QueueCounters {
            fn read(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Counters {
            /// Sum, field by field.
            #[must_use]
            pub fn plus(self, other: Self) -> Self {
                Self { $($name: self.$name + other.$name,)* }
            }
        }
    };
}

counters! {
    /// Read requests ended.
    reads,
    /// Bytes of successful reads.
    read_bytes,
    /// Write requests ended.
    writes,
    /// Bytes of successful writes.
    written_bytes,
    /// Flush requests ended.
    flushes,
    /// Discards and write-zeroes ended.
    zeroes,
    /// Bytes of successful discards and write-zeroes.
    zeroed_bytes,
    /// Writes, discards and zeroes that got a ticket.
    captured,
    /// Bytes of payload in the stream.
    captured_bytes,
    /// Successful writes, discards and zeroes without a ticket: marked missing.
    missed,
    /// Failed requests of any kind.
    errors,
    /// Requests that had to wait for the activity log.
    activity_waits,
    /// Requests that had to wait for an overlapping one.
    lock_waits,
    /// Write buffers for which no cell was free.
    cell_misses,
}

/// Adds to a counter that only this thread changes: no locked instruction.
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(value), Ordering::Relaxed);
}

/// A volume's counters: those of its queues, and the sum of those that are gone.
#[derive(Debug, Default)]
pub(crate) struct VolumeCounters {
    inner: Mutex<(Counters, Vec<Arc<QueueCounters>>)>,
}

impl VolumeCounters {
    pub(crate) fn open(&self) -> Arc<QueueCounters> {
        let counters = Arc::new(QueueCounters::default());
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).1.push(Arc::clone(&counters));
        counters
    }

    pub(crate) fn close(&self, counters: &Arc<QueueCounters>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let before = inner.1.len();
        inner.1.retain(|open| !Arc::ptr_eq(open, counters));
        if inner.1.len() < before {
            inner.0 = inner.0.plus(counters.read());
        }
    }

    pub(crate) fn read(&self) -> Counters {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.1.iter().fold(inner.0, |sum, queue| sum.plus(queue.read()))
    }
}
