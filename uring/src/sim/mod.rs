//! Simulated twins of the ring, the disk and the file system: in memory, without threads or clocks, the same run for the
//! same seed. For tests of everything that stands on [`crate::Io`] and [`crate::Storage`].
//!
//! # Fault model
//! - **Content.** A write is in the *live* image at once and in the *durable* image after a sync. At a crash every 512-byte
//!   sector written since the last sync holds what it held at that sync or after any write since: writes are kept, lost and
//!   torn independently of their order. Lengths follow; a file may also come back longer with zeroes where its data was lost.
//! - **Names.** A created, renamed or removed name is durable after the sync of its folder. At a crash the changes since are
//!   kept up to some point in their order (a journaling file system) or each for itself (none); a rename is whole or absent.
//!   Syncing a file does not make its name durable.
//! - **Failed sync.** Some of the data became durable, the rest never will unless it is written again: a second sync says
//!   all is well and changes nothing (as Linux does).
//! - **Failed write.** Any of its sectors may have been written.
//! - **Order.** Operations in flight run in any order, and end some time after they ran.
//! - **Crash at operation n.** The operation may have had its effect or not; it and all later ones report
//!   [`is_crash`]. Then ask for the image that a restart finds.
//!
//! Not modelled: reordering of a sync before data it covers (a lying disk), hard links, permissions.

mod disk;
mod image;
mod io;
mod rng;
mod storage;

use std::fmt;
use std::io::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use disk::{DiskFault, DiskOp, SimDisk};
pub use io::SimIo;
pub use rng::SimRng;
pub use storage::{SimFile, SimStorage, StorageOp};

/// Sectors are written whole or not at all.
pub const SECTOR: usize = 512;

/// The pieces of one simulated machine, all from one seed.
#[derive(Debug)]
pub struct World {
    seed: u64,
    rng: SimRng,
    clock: SimClock,
}

impl World {
    /// A new one. Print the seed where a test fails.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, rng: SimRng::new(seed), clock: SimClock::default() }
    }

    /// As given.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The generator for the test's own choices.
    pub fn rng(&mut self) -> &mut SimRng {
        &mut self.rng
    }

    /// The machine's clock.
    #[must_use]
    pub fn clock(&self) -> SimClock {
        self.clock.clone()
    }

    /// An empty file system.
    pub fn storage(&mut self) -> SimStorage {
        SimStorage::new(self.rng.fork())
    }

    /// A disk of zeroes.
    pub fn disk(&mut self, size: u64) -> SimDisk {
        SimDisk::new(size, self.rng.fork())
    }

    /// A ring on which `disks` can be registered.
    pub fn io<B>(&mut self, disks: &[&SimDisk]) -> SimIo<B> {
        let mut io = SimIo::new(self.rng.fork());
        for disk in disks {
            io.attach(disk);
        }
        io
    }
}

/// A clock that moves when it is told to. Clones show the same time.
#[derive(Clone, Debug, Default)]
pub struct SimClock {
    nanos: Arc<AtomicU64>,
}

impl SimClock {
    /// Nanoseconds since the simulation began.
    #[must_use]
    pub fn nanos(&self) -> u64 {
        self.nanos.load(Ordering::SeqCst)
    }

    /// Moves it on; returns the new time.
    ///
    /// # Panics
    /// After 584 years.
    pub fn advance(&self, by: Duration) -> u64 {
        let by = u64::try_from(by.as_nanos()).expect("less than 584 years");
        self.nanos.fetch_add(by, Ordering::SeqCst) + by
    }
}

/// What every operation reports from the simulated crash on.
#[derive(Debug)]
struct Crashed;

impl fmt::Display for Crashed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated crash: the machine is gone")
    }
}

impl std::error::Error for Crashed {}

fn crashed() -> Error {
    Error::other(Crashed)
}

/// Whether the error is the simulated crash (and not a fault that the code under test should survive).
#[must_use]
pub fn is_crash(error: &Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = error.get_ref().map(|inner| inner as _);
    while let Some(inner) = source {
        if inner.is::<Crashed>() || inner.downcast_ref::<Error>().is_some_and(is_crash) {
            return true;
        }
        source = inner.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_recognised_through_wrappers() {
        assert!(is_crash(&crashed()));
        assert!(is_crash(&Error::other(crashed())));
        assert!(!is_crash(&Error::other("simulated crash")));
        assert!(!is_crash(&Error::from_raw_os_error(5)));
    }

    #[test]
    fn the_clock_is_shared() {
        let clock = World::new(1).clock();
        assert_eq!(clock.clone().advance(Duration::from_micros(3)), 3000);
        assert_eq!(clock.nanos(), 3000);
    }
}
