//! Block status may wait for file-system metadata, so it is asked for on a thread of its own.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use farshore_uring::BlockDevice;

use crate::worker::{Message, Shared};

/// One question.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// Whose mailbox gets the answer.
    pub(crate) thread: usize,
    pub(crate) conn: u32,
    pub(crate) slot: u16,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// Questions on their way. Bounded by the request slots of all connections: each has at most one here.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    closed: bool,
}

impl Jobs {
    pub(crate) fn push(&self, job: Job) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).waiting.push_back(job);
        self.changed.notify_one();
    }

    /// Lets [`serve`] return once the queue is empty.
    pub(crate) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = state.waiting.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Answers questions until [`Jobs::close`].
pub(crate) fn serve<D: BlockDevice>(jobs: &Jobs, device: &D, shared: &Shared) {
    while let Some(Job { thread, conn, slot, offset, len }) = jobs.next() {
        let result = device.extents(offset, u64::from(len));
        // The connection stays until its questions are answered, so the mailbox is open.
        let _open = shared.send(thread, Message::Extents { conn, slot, result });
    }
}
