//! What views and retention need of a stream, as traits: so that they can be tested over less than a whole target.

use std::sync::Arc;

use farshore_proto::{BatchNo, PointId, VolumeIndex, WallTime};
use farshore_uring::Storage;

use crate::base::Base;
use crate::error::Result;
use crate::group::FrameStore;
use crate::index::Index;

/// The stored history of one stream: base, and what lies above it.
pub trait History<S: Storage>: Send + Sync + 'static {
    /// Which record covers what.
    fn index(&self) -> &Index<S>;
    /// The bytes of records.
    fn frames(&self) -> &dyn FrameStore;
    /// A volume's base.
    ///
    /// # Errors
    /// [`crate::Kind::NotFound`] for a volume that the stream does not have.
    fn base(&self, volume: VolumeIndex) -> Result<Arc<Base<S>>>;
}

/// A point, as retention sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PointMark {
    /// Which.
    pub id: PointId,
    /// Target's clock at its receipt.
    pub received: WallTime,
    /// Whether it can be recovered to.
    pub recoverable: bool,
    /// Bytes of its batch in the journal.
    pub bytes: u64,
}

/// A stream whose horizon can be moved.
pub trait Keeper<S: Storage>: History<S> {
    /// Its name in messages: `group/host`.
    fn subject(&self) -> String;
    /// All points, oldest first.
    fn points(&self) -> Vec<PointMark>;
    /// The oldest batch that a hold keeps.
    fn oldest_hold(&self) -> Option<BatchNo>;
    /// Where the horizon is.
    fn horizon(&self) -> Option<PointId>;
    /// Moves the horizon, durably.
    ///
    /// # Errors
    /// Refused past a hold or onto a point that cannot be recovered; otherwise from the disk.
    fn set_horizon(&self, point: PointId) -> Result<()>;
    /// Refuses a point that known damage touches.
    ///
    /// # Errors
    /// Says which.
    fn check_point(&self, point: PointId) -> Result<()>;
    /// Forgets the points before `batch` (metadata only).
    fn drop_points_before(&self, batch: BatchNo);
    /// All volumes with a base.
    fn volumes(&self) -> Vec<VolumeIndex>;
    /// Segments that nothing needs with the base at `horizon`.
    fn droppable(&self, horizon: BatchNo) -> Vec<u32>;
    /// Removes a segment. `false`: something still needs it; it goes another time.
    ///
    /// # Errors
    /// From the disk.
    fn drop_segment(&self, number: u32) -> Result<bool>;
    /// The group's policy, by key.
    fn policy(&self) -> std::collections::BTreeMap<String, String>;
}
