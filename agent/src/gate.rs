//! Requests under way, so that a stop can let no more in and wait for those inside.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Error, Result};

/// Counts requests, and closes for good.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    inside: usize,
}

/// A request under way, until it is dropped.
pub(crate) struct Inside<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins.
    ///
    /// # Errors
    /// The gate is closed: the agent is stopping.
    pub(crate) fn enter(&self) -> Result<Inside<'_>> {
        let mut state = self.lock();
        if state.closed {
            return Err(stopping());
        }
        state.inside += 1;
        Ok(Inside(self))
    }

    /// Lets nobody in any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    /// Waits until nobody is inside, at most for `limit`; how many still are.
    pub(crate) fn wait_empty(&self, limit: Duration) -> usize {
        let busy = |state: &mut State| state.inside > 0;
        let (state, _) = self.left.wait_timeout_while(self.lock(), limit, busy).unwrap_or_else(PoisonError::into_inner);
        state.inside
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.lock().inside -= 1;
        self.0.left.notify_all();
    }
}

/// What requests hear that come too late, or still wait.
pub(crate) fn stopping() -> Error {
    Error::failed("agent", "is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: nobody enters a closed gate, and whoever waits hears of the last one to leave.
    #[test]
    fn a_closed_gate_empties() {
        let gate = Gate::default();
        assert_eq!(gate.wait_empty(Duration::MAX), 0);
        let inside = [gate.enter().expect("open"), gate.enter().expect("open")];
        gate.close();
        assert!(gate.enter().is_err());
        assert_eq!(gate.wait_empty(Duration::ZERO), 2);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(inside));
            assert_eq!(gate.wait_empty(Duration::MAX), 0);
        });
    }
}
