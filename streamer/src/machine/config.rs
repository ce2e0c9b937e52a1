use std::sync::Arc;

use farshore_proto::batch::VolumeDecl;
use farshore_proto::session::SourceConfig;
use farshore_proto::{BatchNo, ChainHash, Generation, Incarnation, LogMark};

use crate::coalesce::Granularity;
use crate::seal::Level;
use crate::{Error, Result, VolumeSet};

use super::backlog::LogStart;

/// Gives 32 fresh random bytes.
pub type Entropy = Box<dyn FnMut() -> [u8; 32] + Send>;

/// Settings of one group's streamer.
#[derive(Clone)]
pub struct StreamerConfig {
    /// Who the source is.
    pub session: SourceConfig,
    /// Line of history; 0: none yet, the target's is taken.
    pub generation: Generation,
    /// Life of the ring.
    pub incarnation: Incarnation,
    /// The group's volumes on this host.
    pub volumes: Vec<VolumeDecl>,
    /// For a new ring: last batch known to be durable, from a ring before; number 0 if none is known.
    pub last: (BatchNo, ChainHash),
    /// For a new ring: volumes that points include, as far as the agent knows.
    pub joined: VolumeSet,
    /// What makes a point. Default: every cut. Changing it while batches are unacknowledged and an acknowledgement was lost
    /// costs a comparison of everything: the batch formed again is another one.
    pub granularity: Granularity,
    /// Threads that coalesce, hash, compress and seal. Default 1, range 1 to 64. More help where one core cannot keep up with
    /// the guests' writes.
    pub workers: u32,
    /// Hardest compression that may be chosen. Default 3; `None`: never compress.
    pub level_max: Level,
    /// Batches under way at a time. Default 16, range 1 to 1024. With cuts 20 ms apart, 16 cover a round trip of 320 ms.
    pub window_batches: usize,
    /// Bytes of batches under way at a time, upper limit; fewer while half a second of the measured rate is less. Default
    /// 64 MiB, range 1 MiB to 4 GiB. Costs that much memory.
    pub window_bytes: u64,
    /// Bandwidth limit, bytes per second. Default: none.
    pub rate: Option<u64>,
    /// The host's activity log, if it has one.
    pub log: Option<StreamLog>,
    /// What the disk log holds, if there is one.
    pub disk_log: Option<LogStart>,
}

/// What a stream has to do with the host's activity log.
#[derive(Clone)]
pub struct StreamLog {
    /// Where its earlier lives ended, if everything that was unknown after the last one is marked as missing by what the log says: a
    /// target that has heard of no later mark holds nothing that this host does not know of.
    pub lives: Vec<LogMark>,
    /// Where it is now.
    pub now: Arc<dyn Fn() -> LogMark + Send + Sync>,
}

impl StreamerConfig {
    /// Defaults, with what has none.
    #[must_use]
    pub fn new(
        session: SourceConfig,
        generation: Generation,
        incarnation: Incarnation,
        volumes: Vec<VolumeDecl>,
    ) -> Self {
        Self {
            session,
            generation,
            incarnation,
            volumes,
            last: (BatchNo(0), ChainHash::default()),
            joined: VolumeSet::default(),
            granularity: Granularity::Cut,
            workers: 1,
            level_max: Some(3),
            window_batches: 16,
            window_bytes: 64 << 20,
            rate: None,
            log: None,
            disk_log: None,
        }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the field.
    pub fn check(&self) -> Result<()> {
        let bad = |field, reason: &str| Err(Error::Setting { field, reason: reason.to_owned() });
        if !(1..=64).contains(&self.workers) {
            return bad("workers", "must be 1 to 64");
        }
        if !(1..=1024).contains(&self.window_batches) {
            return bad("window_batches", "must be 1 to 1024");
        }
        if !(1 << 20..=4 << 30).contains(&self.window_bytes) {
            return bad("window_bytes", "must be 1 MiB to 4 GiB");
        }
        if self.rate == Some(0) {
            return bad("rate", "must be at least 1 byte per second; leave it out for no limit");
        }
        Ok(())
    }
}
