//! Waking a thread that waits in its ring.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering};

/// Makes the owner of an [`crate::Io`] leave its wait, from any thread. Cheap to clone; harmless after the owner is gone.
///
/// Wakes that come before the owner looked ([`crate::Reactor::take_wakeup`]) count as one. A system call is made only
/// if the owner sleeps.
#[derive(Clone, Debug)]
pub struct Waker {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    flags: Flags,
    /// `None`: the owner never sleeps in the kernel (simulation).
    event: Option<OwnedFd>,
}

impl Waker {
    /// Wakes the owner.
    pub fn wake(&self) {
        if self.shared.flags.notify()
            && let Some(event) = &self.shared.event
        {
            #[expect(clippy::host_endian_bytes, reason = "the kernel counts in the host's order")]
            let one = 1u64.to_ne_bytes();
            // Cannot fail while the counter stays below 2^64 - 1: the owner empties it, and one write comes per sleep.
            let _ = nix::unistd::write(event.as_fd(), &one);
        }
    }
}

/// The owner's side of a [`Waker`].
#[derive(Debug)]
pub(crate) struct WakeSource {
    shared: Arc<Shared>,
}

impl WakeSource {
    pub(crate) fn new(event: Option<OwnedFd>) -> Self {
        Self { shared: Arc::new(Shared { flags: Flags::new(), event }) }
    }

    pub(crate) fn waker(&self) -> Waker {
        Waker { shared: Arc::clone(&self.shared) }
    }

    /// The event, for arming a read.
    pub(crate) fn event(&self) -> Option<&OwnedFd> {
        self.shared.event.as_ref()
    }

    /// Announces sleep. `false`: a wake is pending, do not sleep.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.shared.flags.fall_asleep()
    }

    /// Ends what [`Self::fall_asleep`] began.
    pub(crate) fn awake(&self) {
        self.shared.flags.awake();
    }

    /// Whether a wake came since the last call. Call it before looking for the work that the wake announced.
    pub(crate) fn take(&self) -> bool {
        self.shared.flags.take()
    }
}

/// The protocol that saves the system call: either the owner finds `notified` and does not sleep, or the waker finds
/// `asleep` and writes the event. Checked by loom (`cfg(loom)`).
#[derive(Debug)]
struct Flags {
    /// A wake has come that the owner has not taken yet.
    notified: AtomicBool,
    /// The owner is in the kernel or about to be, and nobody has undertaken to write the event since.
    asleep: AtomicBool,
}

impl Flags {
    fn new() -> Self {
        Self { notified: AtomicBool::new(false), asleep: AtomicBool::new(false) }
    }

    /// `true`: the caller must write the event.
    fn notify(&self) -> bool {
        // AcqRel, pairs with `fall_asleep`: of the two read-modify-writes of `notified` one comes first. If that is the
        // owner's, this one reads from it, and so sees the `asleep` set before it. Pairs with `take`, too: what the waker
        // prepared before is visible to the owner after.
        //
        // If it was set already, an earlier wake did, or is about to do, the rest; the owner has not taken it yet.
        !self.notified.swap(true, Ordering::AcqRel) && self.asleep.swap(false, Ordering::AcqRel)
    }

    fn fall_asleep(&self) -> bool {
        // Release by the next line, which the waker's swap of `notified` acquires; AcqRel keeps the two in order.
        self.asleep.swap(true, Ordering::AcqRel);
        // A read-modify-write, not a load: it reads the newest value, and orders itself against the waker's swap.
        if self.notified.fetch_or(false, Ordering::AcqRel) {
            self.awake();
            return false;
        }
        true
    }

    fn awake(&self) {
        // Relaxed: a waker that still reads `true` writes the event once more than needed, nothing else.
        self.asleep.store(false, Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        // Acquire pairs with the release in `notify`. The load before saves the bus where nothing came.
        self.notified.load(Ordering::Relaxed) && self.notified.swap(false, Ordering::AcqRel)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::AtomicU32;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::*;

    /// Goal: an owner that sleeps until all wakes' work was seen never sleeps for ever. Method: loom, with a counting event in
    /// place of the eventfd; a lost wake is a deadlock, which loom reports.
    #[test]
    fn no_wake_is_lost() {
        // Three forced switches already reach every order of the four read-modify-writes; without a bound it takes minutes.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Arc::new((Flags::new(), Mutex::new(0u32), Condvar::new(), AtomicU32::new(0)));
            let wakers: Vec<_> = (0..2)
                .map(|_| {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || {
                        let (flags, event, written, work) = &*shared;
                        work.fetch_add(1, Ordering::Relaxed);
                        if flags.notify() {
                            *event.lock().expect("no panic") += 1;
                            written.notify_one();
                        }
                    })
                })
                .collect();
            let (flags, event, written, work) = &*shared;
            loop {
                flags.take();
                if work.load(Ordering::Relaxed) == 2 {
                    break;
                }
                if flags.fall_asleep() {
                    let mut count = event.lock().expect("no panic");
                    while *count == 0 {
                        count = written.wait(count).expect("no panic");
                    }
                    *count = 0;
                    drop(count);
                    flags.awake();
                }
            }
            for waker in wakers {
                waker.join().expect("no panic");
            }
        });
    }
}
