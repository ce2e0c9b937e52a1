use std::sync::{Arc, Mutex, PoisonError};

use super::LinkSink;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    New,
    Up,
    Down,
}

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
