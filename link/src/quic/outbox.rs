use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use quinn::{RecvStream, SendStream};
use tokio::sync::Notify;

use super::wire::{self, Fault, MESSAGE_BYTES_MAX};
use crate::{Error, Result};

/// Control messages that wait for the stream. Bounded in bytes; a message counts at least 64, for its place in the queue.
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// Signalled after every change that the one reader may wait for.
    changed: Notify,
    bytes_max: u64,
    session: u64,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    bytes: u64,
    closed: bool,
}

fn cost(message: &[u8]) -> u64 {
    (message.len() as u64).max(64)
}

impl Outbox {
    pub(crate) fn new(session: u64, bytes_max: u64) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), bytes_max, session }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, message: Vec<u8>) -> Result<()> {
        let session = self.session;
        let limit = MESSAGE_BYTES_MAX as u64;
        if message.is_empty() || message.len() > MESSAGE_BYTES_MAX {
            return Err(Error::Length { session, what: "message", len: message.len() as u64, limit });
        }
        let mut state = self.lock();
        if state.closed {
            return Err(Error::Closed { session });
        }
        if state.bytes + cost(&message) > self.bytes_max {
            return Err(Error::Full { session, queue: "the queue of messages", limit: self.bytes_max });
        }
        state.bytes += cost(&message);
        state.queue.push_back(message);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Takes no more; what is queued still goes out.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Takes no more and drops what is queued.
    pub(crate) fn discard(&self) {
        *self.lock() = State { closed: true, ..State::default() };
        self.changed.notify_one();
    }

    async fn pop(&self) -> Option<Vec<u8>> {
        loop {
            {
                let mut state = self.lock();
                if let Some(message) = state.queue.pop_front() {
                    state.bytes -= cost(&message);
                    return Some(message);
                }
                if state.closed {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Writes messages until the box is closed and empty; then ends the stream.
    pub(crate) async fn write_to(&self, mut send: SendStream) -> std::result::Result<(), Fault> {
        while let Some(message) = self.pop().await {
            wire::write_message(&mut send, message).await?;
        }
        send.finish().map_err(|_| Fault::protocol("the control stream is closed already"))
    }
}

/// Reads messages until the peer ends the stream.
pub(crate) async fn read_from(
    mut recv: RecvStream,
    mut deliver: impl FnMut(Vec<u8>),
) -> std::result::Result<(), Fault> {
    while let Some(message) = wire::read_message(&mut recv, MESSAGE_BYTES_MAX).await? {
        deliver(message);
    }
    Ok(())
}
