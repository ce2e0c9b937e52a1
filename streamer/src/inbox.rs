//! What other threads tell the streamer's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::channel::Sender;
use crossbeam::sync::Unparker;
use farshore_link::quic::SourceEvent;
use farshore_proto::batch::VolumeDecl;
use farshore_ring::CellRef;

use crate::disk_log::LogDone;
use crate::driver::StreamerStatus;
use crate::work::Done;

/// Bytes of control messages that wait at most: several times the largest one. Beyond it, the session is dropped.
const CONTROL_BYTES_MAX: usize = 16 << 20;

/// One thing told.
pub(crate) enum Input {
    Link(SourceEvent),
    Done(Done<CellRef>),
    Log(LogDone),
    Status(Sender<StreamerStatus>),
    Volumes(Vec<VolumeDecl>),
    Rate(Option<u64>),
    Stop,
}

/// A queue that wakes its reader. Bounded: control messages in bytes; work by the machine; the rest by its askers, who are few.
#[derive(Clone)]
pub(crate) struct Inbox {
    state: Arc<Mutex<State>>,
    unparker: Unparker,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Input>,
    control_bytes: usize,
    /// Session of which messages were thrown away.
    overrun: Option<u64>,
}

impl Inbox {
    pub(crate) fn new(unparker: Unparker) -> Self {
        Self { state: Arc::default(), unparker }
    }

    pub(crate) fn push(&self, input: Input) {
        {
            let mut state = self.lock();
            if let Input::Link(SourceEvent::Control { session, bytes }) = &input {
                if state.control_bytes + bytes.len() > CONTROL_BYTES_MAX {
                    state.overrun = Some(*session);
                    return;
                }
                state.control_bytes += bytes.len();
            }
            state.queue.push_back(input);
        }
        self.wake();
    }

    pub(crate) fn pop(&self) -> Option<Input> {
        let mut state = self.lock();
        let input = state.queue.pop_front()?;
        if let Input::Link(SourceEvent::Control { bytes, .. }) = &input {
            state.control_bytes -= bytes.len();
        }
        Some(input)
    }

    /// The session of which messages were thrown away, once.
    pub(crate) fn take_overrun(&self) -> Option<u64> {
        self.lock().overrun.take()
    }

    pub(crate) fn wake(&self) {
        self.unparker.unpark();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
