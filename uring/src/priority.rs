//! Priority of threads beside those that serve guests.

use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How much less of a busy processor a background thread gets than one that serves guests: a third (`nice(2)`: a tenth less a step).
const NICE: libc::c_int = 5;
/// The same for a thread that stands back: a seventieth.
const NICE_BACK: libc::c_int = 19;

/// Makes the calling thread one whose work may wait a moment: where guests are served on the same processors, it never takes one from
/// them because it woke up, and gets a third of what they get of one that is always busy. It still goes on: what is captured is
/// shipped on a busy host, too. No right is needed.
pub fn work_in_background() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // Neither fails for a thread that makes itself less important, a seccomp profile aside, and that costs latency only.
    // SAFETY: `parameters` is a valid structure during the call; 0 means the calling thread.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) };
    // 0 means the calling thread, which on Linux has a value of its own.
    set_nice(0, NICE);
}

/// `false`: not allowed, or there is no such thread.
fn set_nice(thread: libc::pid_t, nice: libc::c_int) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.cast_unsigned(), nice) == 0 }
}

/// Threads of this process that stand back, and how many have asked them not to.
struct Standing {
    threads: Vec<libc::pid_t>,
    hasty: usize,
}

static STANDING: Mutex<Standing> = Mutex::new(Standing { threads: Vec::new(), hasty: 0 });

impl Standing {
    fn lock() -> MutexGuard<'static, Self> {
        STANDING.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nice(&self) -> libc::c_int {
        if self.hasty == 0 { NICE_BACK } else { NICE }
    }

    fn apply(&self) {
        for &thread in &self.threads {
            // A thread leaves the list before it ends, so it is there; and it was allowed when it came.
            set_nice(thread, self.nice());
        }
    }
}

/// A background thread that takes almost nothing from guests while nobody of this process is in [`Haste`]. For work that has no
/// hurry as long as the ring has room, and that holds no lock which a thread that serves guests waits for.
///
/// Lowering a priority is free to all, taking it back needs CAP_SYS_NICE or RLIMIT_NICE (Linux, `getrlimit(2)`). Where that is
/// missing the thread works as after [`work_in_background`], about.
#[derive(Debug)]
#[must_use = "the thread stands back as long as this lives"]
pub struct StandsBack {
    thread: Option<libc::pid_t>,
    /// It is the calling thread's.
    _not_send: PhantomData<*const ()>,
}

impl StandsBack {
    /// For the calling thread.
    pub fn begin() -> Self {
        work_in_background();
        // One step down and back shows whether there is a way back.
        let thread = (set_nice(0, NICE + 1) && set_nice(0, NICE)).then(|| {
            // SAFETY: no arguments; it cannot fail.
            let thread = unsafe { libc::gettid() };
            let mut standing = Standing::lock();
            standing.threads.push(thread);
            set_nice(thread, standing.nice());
            thread
        });
        Self { thread, _not_send: PhantomData }
    }
}

impl Drop for StandsBack {
    fn drop(&mut self) {
        if let Some(own) = self.thread {
            Standing::lock().threads.retain(|&thread| thread != own);
            set_nice(own, NICE);
        }
    }
}

/// While one lives, threads that stand back get what other background threads get.
#[derive(Debug)]
#[must_use = "the haste is over when this is dropped"]
pub struct Haste(());

impl Haste {
    /// One more is in haste.
    pub fn begin() -> Self {
        let mut standing = Standing::lock();
        standing.hasty += 1;
        if standing.hasty == 1 {
            standing.apply();
        }
        Self(())
    }
}

impl Drop for Haste {
    fn drop(&mut self) {
        let mut standing = Standing::lock();
        standing.hasty -= 1;
        if standing.hasty == 0 {
            standing.apply();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    /// Policy and nice value of the calling thread.
    fn own() -> (libc::c_int, libc::c_int) {
        // SAFETY: no pointers; 0 means the calling thread.
        unsafe { (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0)) }
    }

    /// Goal: only the calling thread changes. Method: another thread changes itself; both look.
    #[test]
    fn the_calling_thread_alone_waits() {
        let before = own();
        let changed = std::thread::spawn(|| {
            work_in_background();
            own()
        });
        assert_eq!(changed.join().expect("the thread ends"), (libc::SCHED_BATCH, NICE));
        assert_eq!(own(), before);
    }

    /// Goal: haste reaches a thread that stands back, from outside, for as long as anybody has it, and no thread that has left.
    /// Method: a thread tells its value at each step; where there is no way back it must never have left the usual place.
    #[test]
    fn haste_reaches_those_who_stand_back() {
        let ((ask, asked), (tell, told)) = (sync_channel::<()>(0), sync_channel(0));
        let thread = std::thread::spawn(move || {
            let standing = StandsBack::begin();
            for () in asked {
                tell.send((standing.thread.is_some(), own())).expect("somebody asks");
            }
            drop(standing);
            own()
        });
        let look = || {
            ask.send(()).expect("the thread goes on");
            told.recv().expect("the thread goes on")
        };
        let (way_back, first) = look();
        let (back, near) = if way_back { (NICE_BACK, NICE) } else { (NICE + 1, NICE + 1) };
        assert_eq!(first, (libc::SCHED_BATCH, back));
        let one = Haste::begin();
        assert_eq!(look().1.1, near);
        let two = Haste::begin();
        drop(one);
        assert_eq!(look().1.1, near, "one is still in haste");
        drop(two);
        assert_eq!(look().1.1, back);
        drop(ask);
        assert_eq!(thread.join().expect("the thread ends").1, near);
        let last = Haste::begin();
        assert!(Standing::lock().threads.is_empty(), "who left is not named any more");
        drop(last);
    }
}
