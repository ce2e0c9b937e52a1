//! What can go wrong, and how often it did. In prose: `docs/fault-model.md`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_uring::sim::{DiskFault, DiskOp, SimDisk, SimRng};

macro_rules! faults {
    ($($name:ident $text:literal,)+) => {
        /// Everything that the model has, and what must come of it for a run to prove anything.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Fault { $($name),+ }

        impl Fault {
            pub(crate) const ALL: &[(Self, &'static str)] = &[$((Self::$name, $text)),+];
        }
    };
}

faults! {
    LinkBreak "sessions that broke",
    Partition "partitions",
    BatchLost "batches lost",
    BatchDoubled "batches doubled",
    BatchOvertaken "batches overtaken",
    BatchCorrupt "batches corrupted",
    ControlCorrupt "control messages corrupted",
    TargetCrash "power cuts of the target",
    TargetKill "kills of the target",
    TargetStopped "times the target stood still",
    TargetEio "errors of the target's disk",
    TargetFull "writes without room at the target",
    TargetOld "targets set back to an older state",
    TargetRot "bits that rotted at the target",
    TargetClock "steps of the target's clock",
    HostCrash "power cuts of the host",
    ComparedLogged "hosts that compared what was active alone",
    ComparedAll "hosts that compared everything",
    HostOld "hosts set back to an older state",
    StateOld "state directories and logs set back to an older state",
    AgentKill "kills of the agent",
    SourceRead "reads that the source failed",
    SourceWrite "writes that the source failed",
    SourceFlush "flushes that the source failed",
    SourceSlow "slow operations of the source",
    SourceRot "bits that rotted at the source",
    SourceClock "steps of the source's clock",
    ActivityEio "errors of the activity log's disk",
    ActivityHung "times the activity log hung",
    ActivityPassed "times guests went past the activity log",
    RingFull "times the ring ran full",
    LogUsed "batches put into the disk log",
    LogFull "times the disk log was full",
    LogFailed "times the disk log failed",
    LogHung "times the disk log hung",
    LogSurvived "batches that the disk log kept over a restart",
    Moves "moves of the base",
    Points "points checked",
    Acked "writes acknowledged",
    Failed "requests that the disk failed",
    Answers "answers to sync",
    Verified "bytes verified",
    Bookmarks "bookmarks durable",
    Evicted "extents that left the activity log",
}

/// How often each happened.
#[derive(Debug)]
pub(crate) struct Coverage([AtomicU64; Fault::ALL.len()]);

impl Coverage {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(std::array::from_fn(|_| AtomicU64::new(0))))
    }

    pub(crate) fn hit(&self, fault: Fault) {
        self.add(fault, 1);
    }

    pub(crate) fn add(&self, fault: Fault, count: u64) {
        self.0[fault as usize].fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, fault: Fault) -> u64 {
        self.0[fault as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn add_all(&self, other: &Self) {
        Fault::ALL.iter().for_each(|(fault, _)| self.add(*fault, other.count(*fault)));
    }

    pub(crate) fn counts(&self) -> Vec<u64> {
        Fault::ALL.iter().map(|(fault, _)| self.count(*fault)).collect()
    }

    pub(crate) fn table(&self) -> String {
        Fault::ALL.iter().map(|(fault, text)| format!("{:>12} {text}\n", self.count(*fault))).collect()
    }

    /// Those that never happened; what is rare by nature may not.
    pub(crate) fn never(&self) -> Vec<&'static str> {
        let rare = [Fault::LogFull, Fault::StateOld];
        let never = |fault: Fault| !rare.contains(&fault) && self.count(fault) == 0;
        Fault::ALL.iter().filter(|(fault, _)| never(*fault)).map(|(_, text)| *text).collect()
    }
}

/// What a source's disk does wrong now. Rates in a thousand.
#[derive(Debug, Default)]
struct Rates {
    read: u64,
    write: u64,
    flush: u64,
    slow: u64,
}

#[derive(Debug)]
struct Plan {
    rng: SimRng,
    rates: Rates,
    /// Errors given, of any operation.
    errors: u64,
    flushes_failed: u64,
}

/// The faults of one source disk; they outlive its crashes.
#[derive(Clone, Debug)]
pub(crate) struct DiskFaults {
    plan: Arc<Mutex<Plan>>,
    coverage: Arc<Coverage>,
}

impl DiskFaults {
    pub(crate) fn new(rng: SimRng, coverage: Arc<Coverage>) -> Self {
        let plan = Plan { rng, rates: Rates::default(), errors: 0, flushes_failed: 0 };
        Self { plan: Arc::new(Mutex::new(plan)), coverage }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called anew after each crash of the disk.
    pub(crate) fn install(&self, disk: &SimDisk) {
        let of = self.clone();
        disk.set_fault(move |op| of.ask(op));
    }

    fn ask(&self, op: &DiskOp) -> DiskFault {
        let mut plan = self.plan();
        let plan = &mut *plan;
        // A flush from outside of all rings cannot wait.
        let may_wait = *op != DiskOp::Sync;
        if may_wait && plan.rates.slow > 0 && plan.rng.chance(plan.rates.slow, 1000) {
            self.coverage.hit(Fault::SourceSlow);
            let steps = u32::try_from(1 + plan.rng.below(30)).expect("small");
            return DiskFault::Delay(steps);
        }
        let (rate, fault) = match op {
            DiskOp::Read { .. } => (plan.rates.read, Fault::SourceRead),
            DiskOp::Write { .. } | DiskOp::Allocate { .. } => (plan.rates.write, Fault::SourceWrite),
            DiskOp::Sync => (plan.rates.flush, Fault::SourceFlush),
        };
        if rate == 0 || !plan.rng.chance(rate, 1000) {
            return DiskFault::None;
        }
        self.coverage.hit(fault);
        plan.errors += 1;
        plan.flushes_failed += u64::from(fault == Fault::SourceFlush);
        DiskFault::Error(libc_eio())
    }

    pub(crate) fn reads_fail(&self, rate: u64) {
        self.plan().rates.read = rate;
    }

    pub(crate) fn writes_fail(&self, rate: u64) {
        self.plan().rates.write = rate;
    }

    pub(crate) fn flushes_fail(&self, rate: u64) {
        self.plan().rates.flush = rate;
    }

    pub(crate) fn slow_down(&self, rate: u64) {
        self.plan().rates.slow = rate;
    }

    pub(crate) fn end(&self) {
        self.plan().rates = Rates::default();
    }

    pub(crate) fn errors(&self) -> u64 {
        self.plan().errors
    }

    pub(crate) fn flushes_failed(&self) -> u64 {
        self.plan().flushes_failed
    }
}

/// EIO.
pub(crate) fn libc_eio() -> i32 {
    5
}
