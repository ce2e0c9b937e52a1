use std::sync::{Arc, Mutex, PoisonError};

use farshore_proto::states::{Limit, MachineDoc, StateDoc};

use super::LinkSink;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Up,
    Down,
}

/// For `docs/states.md`.
pub const MACHINE: MachineDoc = MachineDoc {
    machine: "session of the link, both ends",
    file: file!(),
    owner: "`Life`, the link's threads",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "new",
        limit: Limit::Setting("`connect_timeout` 5 s at the source, `hello_timeout` 10 s at the target"),
        exit: "introduced and welcomed; at the limit the connection is closed, and the source tries again after 0.1 s, doubling to 5 s (60 s where a person must act)",
    },
    StateDoc {
        state: "up",
        limit: Limit::Setting("`idle_timeout` 15 s of silence; `stall_timeout` 30 s within a batch"),
        exit: "either end closes, the limit, a newer session of the host",
    },
    StateDoc { state: "down", limit: Limit::Rest, exit: "the last: the next session is another one" },
];
const _: fn(&Stage) -> &StateDoc = |stage| match stage {
    Stage::New => &STATES[0],
    Stage::Up => &STATES[1],
    Stage::Down => &STATES[2],
};

/// Puts the events of one session in order: none before `Up`, none after `Down`, one at a time.
pub(crate) struct Life<E> {
    stage: Mutex<Stage>,
    sink: Arc<dyn LinkSink<E>>,
}

impl<E: 'static> Life<E> {
    pub(crate) fn new(sink: Arc<dyn LinkSink<E>>) -> Self {
        Self { stage: Mutex::new(Stage::New), sink }
    }

    /// Reports the beginning; `false` if the session ended before it began.
    pub(crate) fn up(&self, event: E) -> bool {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if *stage != Stage::New {
            return false;
        }
        *stage = Stage::Up;
        self.sink.event(event);
        true
    }

    /// Reports something in between; `false`, and not reported, outside of the session's life.
    pub(crate) fn emit(&self, event: E) -> bool {
        let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        if *stage != Stage::Up {
            return false;
        }
        self.sink.event(event);
        true
    }

    /// Reports the end, once, and only if there was a beginning.
    pub(crate) fn down(&self, event: E) {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let was = std::mem::replace(&mut *stage, Stage::Down);
        if was == Stage::Up {
            self.sink.event(event);
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) == Stage::Up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<u8>>);

    impl LinkSink<u8> for Log {
        fn event(&self, event: u8) {
            self.0.lock().expect("no event panics").push(event);
        }
    }

    impl Log {
        fn events(&self) -> Vec<u8> {
            self.0.lock().expect("no event panics").clone()
        }
    }

    #[test]
    fn nothing_before_up_or_after_down() {
        let log = Arc::new(Log::default());
        let life = Life::new(log.clone());
        assert!(!life.emit(1));
        assert!(life.up(2));
        assert!(!life.up(3));
        assert!(life.emit(4));
        life.down(5);
        life.down(6);
        assert!(!life.emit(7));
        assert_eq!(log.events(), [2, 4, 5]);
    }

    #[test]
    fn a_session_that_ends_before_it_begins_says_nothing() {
        let log = Arc::new(Log::default());
        let life = Life::new(log.clone());
        life.down(1);
        assert!(!life.up(2));
        assert!(log.events().is_empty());
    }
}
