//! A stream, as views and retention see it.

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore_proto::{BatchNo, PointId, VolumeIndex};
use farshore_uring::Storage;

use crate::base::Base;
use crate::error::{Kind, Result};
use crate::group::{FrameStore, GroupHost};
use crate::history::{History, Keeper, PointMark};
use crate::index::Index;

impl<S: Storage> History<S> for GroupHost<S> {
    fn index(&self) -> &Index<S> {
        &self.index
    }

    fn frames(&self) -> &dyn FrameStore {
        &*self.segments
    }

    fn base(&self, volume: VolumeIndex) -> Result<Arc<Base<S>>> {
        Self::base(self, volume)
    }
}

impl<S: Storage> Keeper<S> for GroupHost<S> {
    fn subject(&self) -> String {
        self.id.subject()
    }

    fn points(&self) -> Vec<PointMark> {
        let points = Self::points(self);
        let mark = |point: &crate::points::Point| PointMark {
            id: point.id,
            received: point.received,
            recoverable: point.recoverable,
            bytes: point.bytes,
        };
        points.iter().map(mark).collect()
    }

    fn oldest_hold(&self) -> Option<BatchNo> {
        self.record().holds.iter().map(|hold| hold.point.batch).min()
    }

    fn horizon(&self) -> Option<PointId> {
        self.record().horizon
    }

    fn set_horizon(&self, point: PointId) -> Result<()> {
        Self::set_horizon(self, point)
    }

    fn check_point(&self, point: PointId) -> Result<()> {
        Self::check_point(self, &point).map(drop)
    }

    fn drop_points_before(&self, batch: BatchNo) {
        self.points_mut().retain(|point| point.id.batch >= batch);
    }

    fn volumes(&self) -> Vec<VolumeIndex> {
        self.bases().into_keys().collect()
    }

    fn droppable(&self, horizon: BatchNo) -> Vec<u32> {
        self.segments.droppable(horizon)
    }

    fn drop_segment(&self, number: u32) -> Result<bool> {
        match Self::drop_segment(self, number) {
            Ok(()) => Ok(true),
            // Its contents are under lease; it goes another time.
            Err(error) if error.kind() == Kind::Refused => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn policy(&self) -> BTreeMap<String, String> {
        Self::policy(self)
    }
}
