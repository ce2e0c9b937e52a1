use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::wire::Fault;

/// Allowance of one session: bytes of batches that are being received or held.
///
/// Granted in the order of the batches' sequence, whatever order their streams arrive in: the receiver commits in that order,
/// so if a later batch could take the last bytes, the earlier one would wait for it and it for the earlier one, for ever.
///
/// Invariant: `held <= limit`; every sequence below `next` has been granted.
pub(crate) struct Gate {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: u64,
    next: u64,
    /// Bounded by the streams that a session may have open.
    waiting: BTreeMap<u64, (u64, oneshot::Sender<()>)>,
}

/// Bytes of a session's allowance; given back on drop.
pub(crate) struct Lease {
    gate: Arc<Gate>,
    bytes: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.held -= self.bytes;
        self.gate.grant(&mut state);
    }
}

impl Gate {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes held now.
    pub(crate) fn held(&self) -> u64 {
        self.lock().held
    }

    /// Waits for the turn of batch `sequence` and for `bytes` (at most the limit).
    pub(crate) async fn enter(self: &Arc<Self>, sequence: u64, bytes: u64) -> Result<Lease, Fault> {
        let granted = {
            let mut state = self.lock();
            if sequence < state.next || state.waiting.contains_key(&sequence) || bytes > self.limit {
                return Err(Fault::protocol(format!("batch {sequence} of {bytes} bytes came twice or is too long")));
            }
            let (grant, granted) = oneshot::channel();
            state.waiting.insert(sequence, (bytes, grant));
            self.grant(&mut state);
            granted
        };
        match granted.await {
            Ok(()) => Ok(Lease { gate: Arc::clone(self), bytes }),
            // The sender is dropped only after sending, or with the gate, which we hold.
            Err(_closed) => Err(Fault::protocol("the session's allowance is gone")),
        }
    }

    fn grant(&self, state: &mut State) {
        while let Some(first) = state.waiting.first_entry() {
            if *first.key() != state.next || state.held + first.get().0 > self.limit {
                return;
            }
            let (bytes, grant) = first.remove();
            state.next += 1;
            // A receiver that is gone belonged to a connection that is gone, and the session with it.
            if grant.send(()).is_ok() {
                state.held += bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn later_batches_wait_for_earlier_ones_even_where_there_is_room() {
        let gate = Gate::new(100);
        let mut second = pin!(gate.enter(1, 10));
        assert!(poll(second.as_mut()).is_pending());
        let mut first = pin!(gate.enter(0, 95));
        let Poll::Ready(Ok(lease)) = poll(first.as_mut()) else { panic!("the first has room") };
        assert!(poll(second.as_mut()).is_pending(), "no room");
        assert_eq!(gate.held(), 95);
        drop(lease);
        let Poll::Ready(Ok(lease)) = poll(second.as_mut()) else { panic!("room and turn") };
        assert_eq!(gate.held(), 10);
        drop(lease);
        assert_eq!(gate.held(), 0);
    }

    #[test]
    fn repeated_sequences_and_too_long_batches_are_refused() {
        let gate = Gate::new(100);
        let mut early = pin!(gate.enter(5, 1));
        assert!(poll(early.as_mut()).is_pending());
        assert!(matches!(poll(pin!(gate.enter(5, 1))), Poll::Ready(Err(_))));
        assert!(matches!(poll(pin!(gate.enter(0, 101))), Poll::Ready(Err(_))));
        let Poll::Ready(Ok(_lease)) = poll(pin!(gate.enter(0, 100))) else { panic!("fits") };
        assert!(matches!(poll(pin!(gate.enter(0, 1))), Poll::Ready(Err(_))));
    }
}
