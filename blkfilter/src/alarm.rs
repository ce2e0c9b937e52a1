//! What a person should know.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use farshore_proto::VolumeIndex;

/// A trouble that the filter or sync met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Alarm {
    /// The capture ring was full and the stream is closed: writes are only marked, no recovery points are made until the stream is open
    /// again and the marked ranges are in it. Cleared by re-opening.
    RingClosed,
    /// Sync is not done with what an event left behind: no recovery points. Cleared by its end.
    EventOpen,
    /// The backing device failed a write; the guest got the error. Never cleared by the filter.
    WriteFailed {
        /// Which volume.
        volume: VolumeIndex,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Error number of the device.
        errno: i32,
    },
    /// The backing device failed a flush; the guest got the error. What was written since the last one that ended well may be lost
    /// there, while the points have it. Never cleared by the filter.
    FlushFailed {
        /// Which volume.
        volume: VolumeIndex,
        /// Error number that the guest got.
        errno: i32,
    },
    /// Sync cannot read a range of the backing device; the points lack it. Never cleared by the filter.
    Unreadable {
        /// Which volume.
        volume: VolumeIndex,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A queue was dropped with writes in flight; their ranges are marked missing. A front end broke its contract.
    QueueDropped {
        /// Which volume.
        volume: VolumeIndex,
        /// Writes, discards and zeroes in flight.
        requests: u64,
    },
}

/// A change of an [`Alarm`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AlarmEvent {
    /// Which.
    pub alarm: Alarm,
    /// Raised; `false`: cleared.
    pub raised: bool,
}

/// Most events kept for an agent that does not look; more are dropped, the newest first.
const EVENTS_MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Alarms {
    events: Mutex<VecDeque<AlarmEvent>>,
    closed: AtomicBool,
    event_open: AtomicBool,
}

impl Alarms {
    pub(crate) fn raise(&self, alarm: Alarm) {
        self.push(alarm, true);
    }

    pub(crate) fn set_closed(&self, closed: bool) {
        if self.closed.swap(closed, Ordering::AcqRel) != closed {
            self.push(Alarm::RingClosed, closed);
        }
    }

    pub(crate) fn set_event_open(&self, open: bool) {
        if self.event_open.swap(open, Ordering::AcqRel) != open {
            self.push(Alarm::EventOpen, open);
        }
    }

    fn push(&self, alarm: Alarm, raised: bool) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // Changes of state always fit, so that the last word on them is never lost: there are two of them, and they alternate.
        let state = matches!(alarm, Alarm::RingClosed | Alarm::EventOpen);
        if events.len() >= EVENTS_MAX {
            if !state {
                return;
            }
            // The pair of the same alarm that is oldest says nothing any more.
            events.retain(|event| event.alarm != alarm);
        }
        events.push_back(AlarmEvent { alarm, raised });
    }

    pub(crate) fn poll(&self) -> Option<AlarmEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_state_is_kept_however_many_events_nobody_looked_at() {
        let alarms = Alarms::default();
        let failed = Alarm::WriteFailed { volume: VolumeIndex(1), offset: 0, len: 512, errno: 5 };
        alarms.set_closed(true);
        alarms.set_closed(true);
        (0..2 * EVENTS_MAX).for_each(|_| alarms.raise(failed.clone()));
        alarms.set_closed(false);
        alarms.set_closed(true);
        let events: Vec<_> = std::iter::from_fn(|| alarms.poll()).collect();
        assert!(events.len() <= EVENTS_MAX + 2);
        assert_eq!(events.last(), Some(&AlarmEvent { alarm: Alarm::RingClosed, raised: true }));
        assert!(events.contains(&AlarmEvent { alarm: failed, raised: true }));
    }
}
