//! When a worker is started, killed, replaced by a pass-through: decisions only, no processes.

use std::time::Duration;

use farshore_proto::Now;
use farshore_proto::states::{Limit, MachineDoc, StateDoc};

/// Workers that fail one after the other before guests are served without one.
const CRASHES_MAX: u32 = 3;
/// A worker that has served so long did not fail "in a row" with the one before.
const STEADY: Duration = Duration::from_secs(10);
/// Longest start of a worker while guests are served by a pass-through. Beyond it, it hangs.
const START_MAX: Duration = Duration::from_secs(120);
/// Between two tries to serve guests without a worker.
const BYPASS_RETRY: Duration = Duration::from_secs(1);
/// Longest pause before a worker is started again.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How a worker ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// With this exit code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// It was no child of this process.
    Unknown,
}

impl End {
    const SIGKILL: i32 = 9;

    /// Whether somebody else ended it (an operator, the out-of-memory killer): that says nothing of the next one.
    fn is_foreign(self) -> bool {
        matches!(self, Self::Signalled(Self::SIGKILL) | Self::Unknown)
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signalled(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("an end that nobody saw"),
        }
    }
}

/// What the driver has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// Start a worker.
    Start,
    /// `SIGKILL` it, for this reason.
    Kill(&'static str),
    /// `SIGTERM` it: it stops in order.
    Terminate,
    /// Serve without a worker what nobody serves.
    Bypass,
    /// End, with this exit code.
    Exit(i32),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Worker {
    /// There is none; the next may start then.
    Absent {
        start_at: Now,
    },
    /// Ordered, or running and not serving yet.
    Starting {
        since: Now,
    },
    Serving {
        since: Now,
    },
    /// Told to end; `by_us`: for a fault of its own.
    Ending {
        by_us: bool,
    },
}

/// For `docs/states.md`.
pub(crate) const MACHINE: MachineDoc = MachineDoc {
    machine: "the worker, as its supervisor sees it",
    file: file!(),
    owner: "`Machine`, the supervisor's main thread",
    states: STATES,
};
const STATES: &[StateDoc] = &[
    StateDoc {
        state: "absent",
        limit: Limit::Time(PAUSE_MAX),
        exit: "the next start: at once, after crashes in a row later and later up to the limit; where guests wait, a pass-through after `worker_gap_max` (5 s) or three crashes, alarm `agent.bypassed`",
    },
    StateDoc {
        state: "starting",
        limit: Limit::Setting(
            "`worker_gap_max` 5 s while guests wait, 120 s while a pass-through serves them; else none: nobody waits",
        ),
        exit: "ready; at the limit it is killed",
    },
    StateDoc {
        state: "serving",
        limit: Limit::Rest,
        exit: "it ends; it does not take its requests for 2 s: killed; replaced; stopped",
    },
    StateDoc {
        state: "ending",
        limit: Limit::None("killed: the kernel's; told to stop: its own, it drains for 10 s, and disks must answer"),
        exit: "it has ended",
    },
];
const _: fn(&Worker) -> &StateDoc = |worker| match worker {
    Worker::Absent { .. } => &STATES[0],
    Worker::Starting { .. } => &STATES[1],
    Worker::Serving { .. } => &STATES[2],
    Worker::Ending { .. } => &STATES[3],
};

/// One supervisor's view of its worker. Performs no I/O.
///
/// Inputs: the `handle_*` calls, in the order in which things happen; [`Self::poll_order`] after each and at every tick, until it
/// says `None`. An order that was given is taken as done unless an input says otherwise.
///
/// Invariant: a worker is started only while none runs, and guests are served by a pass-through only while no worker serves them.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Longest time without service before a pass-through (I1: 5 s).
    gap_max: Duration,
    worker: Worker,
    /// Failures without steady service between.
    crashes: u32,
    /// So many block devices are served by nobody; since when they are as many.
    unserved: Option<(Now, usize)>,
    /// I/O of a dead worker is still with a disk: nobody can be served before it has ended.
    disks_busy: bool,
    bypassed: bool,
    bypass_at: Now,
    /// No worker was ever ready.
    ever_served: bool,
    stopping: bool,
    exit: Option<i32>,
}

impl Machine {
    /// `adopted`: a worker of an earlier supervisor runs.
    pub(crate) fn new(now: Now, gap_max: Duration, adopted: bool) -> Self {
        Self {
            gap_max,
            worker: if adopted { Worker::Starting { since: now } } else { Worker::Absent { start_at: now } },
            crashes: 0,
            unserved: None,
            disks_busy: false,
            bypassed: false,
            bypass_at: now,
            ever_served: false,
            stopping: false,
            exit: None,
        }
    }

    /// The worker serves.
    pub(crate) fn handle_ready(&mut self, now: Now) {
        if let Worker::Starting { .. } = self.worker {
            self.worker = Worker::Serving { since: now };
            self.ever_served = true;
        }
    }

    /// The worker has ended, or could not be started (as exit code 1).
    pub(crate) fn handle_ended(&mut self, now: Now, end: End) {
        let was = self.worker;
        self.worker = Worker::Absent { start_at: now };
        if self.stopping {
            self.exit = Some(match end {
                End::Exited(code) => code,
                End::Signalled(_) | End::Unknown => 1,
            });
            return;
        }
        if let Worker::Serving { since } = was
            && now.since(since) >= STEADY
        {
            self.crashes = 0;
        }
        let failed = match was {
            Worker::Ending { by_us } => by_us,
            Worker::Starting { .. } | Worker::Serving { .. } | Worker::Absent { .. } => !end.is_foreign(),
        };
        if failed {
            self.crashes += 1;
        }
        // What cannot even begin, and for which nobody waits, is told at once to whoever started it.
        if !self.ever_served
            && self.unserved.is_none()
            && let End::Exited(code) = end
            && code != 0
        {
            self.exit = Some(code);
        }
        self.worker = Worker::Absent { start_at: now.plus(pause(self.crashes)) };
    }

    /// Requests wait, and the worker does not take them.
    pub(crate) fn handle_hung(&mut self) -> Option<Order> {
        let Worker::Serving { .. } = self.worker else { return None };
        self.worker = Worker::Ending { by_us: true };
        Some(Order::Kill("it does not take its requests, and no disk keeps it from that"))
    }

    /// Another program is to run as the worker, at once.
    pub(crate) fn handle_replace(&mut self, now: Now) -> Option<Order> {
        self.crashes = 0;
        match self.worker {
            Worker::Starting { .. } | Worker::Serving { .. } => {
                self.worker = Worker::Ending { by_us: false };
                Some(Order::Kill("another program takes its place"))
            }
            Worker::Absent { .. } => {
                self.worker = Worker::Absent { start_at: now };
                None
            }
            Worker::Ending { .. } => None,
        }
    }

    /// How many block devices of ours are served by nobody, and whether that is because a disk is still at a dead worker's I/O.
    pub(crate) fn handle_unserved(&mut self, now: Now, count: usize, disks_busy: bool) {
        self.disks_busy = disks_busy;
        if count == 0 {
            self.unserved = None;
            return;
        }
        // Some queue of the pass-through failed.
        self.bypassed = false;
        self.unserved = match self.unserved {
            Some((since, before)) if count == before => Some((since, count)),
            // The time of those that came: one that nobody can serve must not make the others pass by a worker that is about to.
            Some(_) | None => Some((now, count)),
        };
    }

    /// What came of [`Order::Bypass`]: whether everything is served.
    pub(crate) fn handle_bypassed(&mut self, now: Now, all: bool) {
        self.bypassed |= all;
        if !all {
            self.bypass_at = now.plus(BYPASS_RETRY);
        }
    }

    /// The pass-through let go, because a worker is about to serve.
    pub(crate) fn handle_let_go(&mut self) {
        self.bypassed = false;
        // The time without service begins anew.
        self.unserved = None;
    }

    /// Stop in order.
    pub(crate) fn handle_stop(&mut self) {
        self.stopping = true;
    }

    /// Failures in a row.
    pub(crate) fn crashes(&self) -> u32 {
        self.crashes
    }

    /// Whether a worker serves.
    pub(crate) fn is_serving(&self) -> bool {
        matches!(self.worker, Worker::Serving { .. })
    }

    /// Whether a worker runs, or was told to end and has not yet.
    pub(crate) fn has_worker(&self) -> bool {
        !matches!(self.worker, Worker::Absent { .. })
    }

    /// Guests are served without a worker.
    pub(crate) fn is_bypassed(&self) -> bool {
        self.bypassed
    }

    /// The next thing to do.
    #[must_use]
    pub(crate) fn poll_order(&mut self, now: Now) -> Option<Order> {
        if let Some(code) = self.exit {
            return Some(Order::Exit(code));
        }
        if self.stopping {
            return self.poll_stop();
        }
        if self.wants_bypass(now) {
            match self.worker {
                Worker::Starting { .. } => {
                    self.worker = Worker::Ending { by_us: true };
                    return Some(Order::Kill("its start takes too long, and guests wait"));
                }
                // Its volumes that it could not serve.
                Worker::Serving { .. } | Worker::Absent { .. } => {
                    self.bypass_at = now.plus(BYPASS_RETRY);
                    return Some(Order::Bypass);
                }
                Worker::Ending { .. } => {}
            }
        }
        match self.worker {
            Worker::Absent { start_at } if now >= start_at => {
                self.worker = Worker::Starting { since: now };
                Some(Order::Start)
            }
            Worker::Starting { since } if self.bypassed && now.since(since) > START_MAX => {
                self.worker = Worker::Ending { by_us: true };
                Some(Order::Kill("its start takes too long"))
            }
            Worker::Absent { .. } | Worker::Starting { .. } | Worker::Serving { .. } | Worker::Ending { .. } => None,
        }
    }

    fn poll_stop(&mut self) -> Option<Order> {
        match self.worker {
            Worker::Absent { .. } => {
                self.exit = Some(0);
                Some(Order::Exit(0))
            }
            Worker::Starting { .. } | Worker::Serving { .. } => {
                self.worker = Worker::Ending { by_us: false };
                Some(Order::Terminate)
            }
            Worker::Ending { .. } => None,
        }
    }

    fn wants_bypass(&self, now: Now) -> bool {
        let Some((since, _)) = self.unserved else { return false };
        if self.bypassed || self.disks_busy || now < self.bypass_at {
            return false;
        }
        let hopeless = self.crashes >= CRASHES_MAX && !self.has_worker();
        hopeless || now.since(since) >= self.gap_max
    }
}

/// Before the next start, after so many failures in a row: none at first, a guest may be waiting.
fn pause(crashes: u32) -> Duration {
    match crashes {
        0 | 1 => Duration::ZERO,
        2 => Duration::from_millis(200),
        more => Duration::from_secs(1 << (more - CRASHES_MAX).min(6)).min(PAUSE_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GAP: Duration = Duration::from_secs(5);
    const CRASH: End = End::Signalled(6);
    const KILLED: End = End::Signalled(9);

    struct Rig {
        machine: Machine,
        now: Now,
        /// There is a block device, which outlives workers.
        disk: bool,
        busy: bool,
    }

    impl Rig {
        fn new(disk: bool) -> Self {
            Self { machine: Machine::new(Now(0), GAP, false), now: Now(0), disk, busy: false }
        }

        fn pass(&mut self, ms: u64) {
            self.now = self.now.plus(Duration::from_millis(ms));
        }

        /// One order, as the driver asks for it.
        fn order(&mut self) -> Option<Order> {
            let served = self.machine.is_serving() || self.machine.is_bypassed();
            self.machine.handle_unserved(self.now, usize::from(self.disk && !served), self.busy);
            self.machine.poll_order(self.now)
        }

        fn ready(&mut self) {
            assert_eq!(self.order(), Some(Order::Start));
            self.machine.handle_ready(self.now);
            assert_eq!(self.order(), None);
        }

        fn ended(&mut self, end: End) {
            self.machine.handle_ended(self.now, end);
        }
    }

    /// Goal: workers that are killed from outside are followed at once by the next, however often, and guests are never passed by.
    #[test]
    fn kills_from_outside_are_no_crashes() {
        let mut rig = Rig::new(true);
        for _ in 0..100 {
            rig.ready();
            rig.pass(300);
            rig.ended(KILLED);
        }
        assert_eq!(rig.machine.crashes(), 0);
    }

    /// Goal: after three failures in a row guests are served without a worker, workers are tried at growing distances, and the
    /// one that is healthy takes over.
    #[test]
    fn three_crashes_in_a_row_end_in_a_pass_through() {
        let mut rig = Rig::new(true);
        rig.ready();
        for crash in 1..=3 {
            rig.ended(CRASH);
            rig.pass(200);
            if crash < 3 {
                rig.ready();
            }
        }
        assert_eq!(rig.order(), Some(Order::Bypass));
        rig.machine.handle_bypassed(rig.now, true);
        assert_eq!(rig.order(), None, "the next start has to wait");
        let mut starts = 0;
        for _ in 0..200 {
            rig.pass(1000);
            while let Some(order) = rig.order() {
                assert_eq!(order, Order::Start);
                starts += 1;
                rig.ended(CRASH);
            }
        }
        assert!((3..=9).contains(&starts), "{starts} starts in 200 s");
        rig.pass(60_000);
        assert_eq!(rig.order(), Some(Order::Start));
        rig.machine.handle_let_go();
        assert!(!rig.machine.is_bypassed());
        rig.machine.handle_ready(rig.now);
        rig.pass(20_000);
        assert_eq!(rig.order(), None);
        rig.ended(CRASH);
        assert_eq!(rig.machine.crashes(), 1, "steady service ends the row");
    }

    /// Goal: a worker that does not get to serving within the time is killed and replaced by a pass-through; not while its disks
    /// are at the I/O of the last one, for nobody could be served then.
    #[test]
    fn a_start_that_takes_too_long_ends_in_a_pass_through() {
        let mut rig = Rig::new(true);
        rig.busy = true;
        assert_eq!(rig.order(), Some(Order::Start));
        rig.pass(8000);
        assert_eq!(rig.order(), None);
        rig.busy = false;
        assert!(matches!(rig.order(), Some(Order::Kill(_))));
        assert_eq!(rig.order(), None, "until it has ended");
        rig.ended(KILLED);
        assert_eq!(rig.order(), Some(Order::Bypass));
        rig.machine.handle_bypassed(rig.now, false);
        assert_eq!(rig.order(), Some(Order::Start), "a pass-through that cannot be had keeps no worker from trying");
        rig.pass(1000);
        assert!(matches!(rig.order(), Some(Order::Kill(_))), "and is tried again");
    }

    /// Goal: a hung worker is killed, and counts as crashed; a replaced one is killed and does not.
    #[test]
    fn hung_and_replaced_workers_are_killed() {
        let mut rig = Rig::new(true);
        rig.ready();
        assert!(matches!(rig.machine.handle_hung(), Some(Order::Kill(_))));
        assert_eq!(rig.machine.handle_hung(), None, "once");
        rig.ended(KILLED);
        assert_eq!(rig.machine.crashes(), 1);
        rig.ready();
        assert!(matches!(rig.machine.handle_replace(rig.now), Some(Order::Kill(_))));
        rig.ended(KILLED);
        assert_eq!(rig.machine.crashes(), 0);
        rig.ready();
    }

    /// Goal: without a block device, what cannot start says so to whoever started it; with one that waits, it is tried again.
    #[test]
    fn a_first_start_that_fails_is_told() {
        let mut rig = Rig::new(false);
        assert_eq!(rig.order(), Some(Order::Start));
        rig.ended(End::Exited(4));
        assert_eq!(rig.order(), Some(Order::Exit(4)));

        let mut rig = Rig::new(true);
        assert_eq!(rig.order(), Some(Order::Start));
        rig.ended(End::Exited(4));
        assert_eq!(rig.order(), Some(Order::Start));
    }

    /// Goal: a stop asks the worker, waits for it, and ends with its code; without one it just ends.
    #[test]
    fn stops_in_order() {
        let mut rig = Rig::new(true);
        rig.ready();
        rig.machine.handle_stop();
        assert_eq!(rig.order(), Some(Order::Terminate));
        assert_eq!(rig.order(), None);
        rig.pass(60_000);
        assert_eq!(rig.order(), None, "however long it takes");
        rig.ended(End::Exited(1));
        assert_eq!(rig.order(), Some(Order::Exit(1)));

        let mut rig = Rig::new(true);
        rig.machine.handle_stop();
        assert_eq!(rig.order(), Some(Order::Exit(0)));
    }

    /// Goal: a volume that the worker could not serve does not make its guests wait for ever.
    #[test]
    fn what_a_worker_leaves_unserved_is_passed_through() {
        let mut rig = Rig::new(false);
        rig.ready();
        rig.machine.handle_unserved(rig.now, 3, false);
        assert_eq!(rig.machine.poll_order(rig.now), None);
        rig.pass(4000);
        rig.machine.handle_unserved(rig.now, 2, false);
        rig.pass(4000);
        rig.machine.handle_unserved(rig.now, 2, false);
        assert_eq!(rig.machine.poll_order(rig.now), None, "it gets on");
        rig.pass(1000);
        assert_eq!(rig.machine.poll_order(rig.now), Some(Order::Bypass));
    }

    /// Goal: a disk that nobody can serve, for hours, does not make the guests of the others pass by a worker that is killed and comes
    /// back. Method: one unserved all the time, more for the time of a start.
    #[test]
    fn one_lost_disk_does_not_pass_the_others_by() {
        let mut rig = Rig::new(false);
        rig.ready();
        let look = |rig: &mut Rig, unserved| {
            rig.machine.handle_unserved(rig.now, unserved, false);
            rig.machine.poll_order(rig.now)
        };
        for _ in 0..60 {
            rig.pass(60_000);
            if look(&mut rig, 1) == Some(Order::Bypass) {
                rig.machine.handle_bypassed(rig.now, false);
            }
        }
        rig.ended(KILLED);
        assert_eq!(look(&mut rig, 4), Some(Order::Start));
        rig.pass(800);
        assert_eq!(look(&mut rig, 4), None);
        rig.machine.handle_ready(rig.now);
        assert_eq!(look(&mut rig, 1), None);
        rig.pass(5000);
        assert_eq!(look(&mut rig, 1), Some(Order::Bypass), "that one is tried again");
    }

    /// Goal: a supervisor that comes later watches the worker that is there.
    #[test]
    fn an_adopted_worker_is_not_started_again() {
        let mut machine = Machine::new(Now(0), GAP, true);
        assert_eq!(machine.poll_order(Now(0)), None);
        machine.handle_ready(Now(1));
        assert_eq!(machine.poll_order(Now(2)), None);
        machine.handle_ended(Now(3), End::Unknown);
        assert_eq!(machine.poll_order(Now(3)), Some(Order::Start));
    }
}
