//! Priority of threads beside those that serve guests.

/// How much less of a busy processor a background thread gets than one that serves guests: a third (`nice(2)`: a tenth less a step).
const NICE: libc::c_int = 5;

/// Makes the calling thread one whose work may wait a moment: where guests are served on the same processors, it never takes one from
/// them because it woke up, and gets a third of what they get of one that is always busy. It still goes on: what is captured is
/// shipped on a busy host, too. No right is needed.
pub fn work_in_background() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // Neither fails for a thread that makes itself less important, a seccomp profile aside, and that costs latency only.
    // SAFETY: `parameters` is a valid structure during the call; 0 means the calling thread.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    // SAFETY: no pointers; 0 means the calling thread, which on Linux has a value of its own.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: only the calling thread changes. Method: another thread changes itself; both look.
    #[test]
    fn the_calling_thread_alone_waits() {
        // SAFETY: no pointers; 0 means the calling thread.
        let now = || unsafe { (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0)) };
        let before = now();
        let changed = std::thread::spawn(move || {
            work_in_background();
            now()
        });
        assert_eq!(changed.join().expect("the thread ends"), (libc::SCHED_BATCH, NICE));
        assert_eq!(now(), before);
    }
}
