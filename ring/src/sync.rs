//! The atomics of the shared structures: the standard library's; loom's when the models run; counted ones in the unit tests, which
//! stop ("kill") a thread before any chosen store.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(any(loom, test)))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

#[cfg(all(test, not(loom)))]
pub(crate) use counted::{AtomicU64, kill_before};
#[cfg(all(test, not(loom)))]
pub(crate) use std::sync::atomic::{Ordering, fence};

#[cfg(all(test, not(loom)))]
mod counted {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64 as Std, Ordering};

    thread_local! {
        /// Stores that this thread may still make.
        static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Runs `work` and stops it before its `stores`-th store; whether it was stopped. What unwinding drops stores nothing.
    pub(crate) fn kill_before(stores: u64, work: impl FnOnce()) -> bool {
        LEFT.set(stores);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        LEFT.set(u64::MAX);
        match result {
            Ok(()) => false,
            Err(panic) if panic.is::<Stopped>() => true,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    struct Stopped;

    /// Whether the store may be made.
    fn alive() -> bool {
        match LEFT.get() {
            u64::MAX => true,
            0 if std::thread::panicking() => false,
            0 => std::panic::resume_unwind(Box::new(Stopped)),
            left => {
                LEFT.set(left - 1);
                true
            }
        }
    }

    #[repr(transparent)]
    pub(crate) struct AtomicU64(Std);

    impl AtomicU64 {
        pub(crate) const fn new(value: u64) -> Self {
            Self(Std::new(value))
        }

        pub(crate) fn load(&self, order: Ordering) -> u64 {
            self.0.load(order)
        }

        pub(crate) fn store(&self, value: u64, order: Ordering) {
            if alive() {
                self.0.store(value, order);
            }
        }

        pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
            if alive() { self.0.swap(value, order) } else { self.0.load(Ordering::Relaxed) }
        }

        pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            if alive() { self.0.fetch_add(value, order) } else { self.0.load(Ordering::Relaxed) }
        }

        pub(crate) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            if alive() { self.0.fetch_sub(value, order) } else { self.0.load(Ordering::Relaxed) }
        }

        pub(crate) fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            if alive() { self.0.fetch_or(value, order) } else { self.0.load(Ordering::Relaxed) }
        }

        pub(crate) fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            if alive() { self.0.fetch_and(value, order) } else { self.0.load(Ordering::Relaxed) }
        }

        pub(crate) fn compare_exchange(&self, old: u64, new: u64, ok: Ordering, not: Ordering) -> Result<u64, u64> {
            if alive() { self.0.compare_exchange(old, new, ok, not) } else { Ok(old) }
        }

        pub(crate) fn compare_exchange_weak(
            &self,
            old: u64,
            new: u64,
            ok: Ordering,
            not: Ordering,
        ) -> Result<u64, u64> {
            self.compare_exchange(old, new, ok, not)
        }
    }
}
