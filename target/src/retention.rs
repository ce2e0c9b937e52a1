//! Retention: which history is kept, and moving the base up to the horizon.
//!
//! One [`Mover`] per stream; [`Mover::step`] does a bounded piece of work and can be called again at any time. What is to be
//! done follows from durable state alone, so a crash at any step is nothing special:
//! 1. *plan*: the new horizon is a recoverable point, not past a hold, and never past the newest recoverable point;
//! 2. it is made durable ([`Keeper::set_horizon`]); only then may the base's bytes change (I8);
//! 3. points before it are dropped from memory;
//! 4. the newest version of every slot up to the horizon goes into the base, in address order. Reads see no difference: the
//!    journal's versions above the base are visible until
//! 5. the base is flushed and *moved* is made durable ([`crate::index::Index::set_moved_to`]);
//! 6. segments that nothing needs any more are dropped.
//!
//! With a horizon ahead of *moved*, a restart goes on with 3. A frame that cannot be opened stops it with an error, and
//! nothing is dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use farshore_proto::text::{parse_duration, parse_size};
use farshore_proto::{BatchNo, PointId, SLOT_BYTES, VolumeIndex, WallTime};
use farshore_uring::Storage;

use crate::error::{Error, Kind, Result};
use crate::group::{UpTo, ZERO_EXTENT_SLOTS};
use crate::history::{Keeper, PointMark};
use crate::reader::read_sectors;

/// Slots moved in one step: 16 MiB of base, one chunk of it.
const SLOTS_PER_STEP: usize = 256;
/// The horizon moves when the oldest point is older than what is kept by this part of it, so that the base is not moved for
/// every single point.
const SLACK_PART: u32 = 16;

/// What is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    /// History by receive time. Policy key `keep`, default 24 h, at least 1 s.
    pub keep: Duration,
    /// Bytes of the journal above the horizon; `None`: no limit. Policy key `size_limit`.
    pub size_limit: Option<u64>,
}

impl Default for Policy {
    fn default() -> Self {
        Self { keep: Duration::from_hours(24), size_limit: None }
    }
}

impl Policy {
    /// Reads the policy's keys; unknown keys belong to others.
    ///
    /// # Errors
    /// [`Kind::Invalid`] naming the key.
    pub fn parse(keys: &BTreeMap<String, String>) -> Result<Self> {
        let invalid =
            |key: &str, error: farshore_proto::Error| Error::new(Kind::Invalid, format!("policy {key}: {error}"));
        let mut policy = Self::default();
        if let Some(text) = keys.get("keep") {
            policy.keep = parse_duration(text).map_err(|error| invalid("keep", error))?;
            if policy.keep < Duration::from_secs(1) {
                return Err(Error::new(Kind::Invalid, format!("policy keep: {text:?} is less than 1 s")));
            }
        }
        if let Some(text) = keys.get("size_limit") {
            policy.size_limit = Some(parse_size(text).map_err(|error| invalid("size_limit", error))?);
        }
        Ok(policy)
    }
}

/// The horizon that the policy asks for now; `None`: where it is, it is right.
///
/// `hold`: the oldest batch that a hold keeps. Points are given oldest first.
#[must_use]
pub fn plan(
    policy: &Policy,
    points: &[PointMark],
    horizon: Option<PointId>,
    hold: Option<BatchNo>,
    now: WallTime,
) -> Option<PointId> {
    let after = horizon.map_or(BatchNo(0), |point| point.batch);
    let newest = points.iter().rfind(|point| point.recoverable)?.id.batch;
    let limit = hold.map_or(newest, |hold| hold.min(newest));
    let usable: Vec<&PointMark> =
        points.iter().filter(|p| p.recoverable && p.id.batch > after && p.id.batch <= limit).collect();
    let oldest = points.iter().find(|point| point.recoverable && point.id.batch >= after)?;
    let too_old = |point: &PointMark, age: Duration| now.since(point.received) >= age;
    // The whole of `keep` stays reachable: the horizon is the newest point that is at least that old.
    let by_age = if too_old(oldest, policy.keep + policy.keep / SLACK_PART) {
        usable.iter().rfind(|point| too_old(point, policy.keep)).map(|point| point.id)
    } else {
        None
    };
    by_age.max(policy.size_limit.and_then(|limit| by_size(limit, points, &usable, after)))
}

/// The oldest usable point above which the journal has no more than `limit` bytes, else the newest usable.
fn by_size(limit: u64, points: &[PointMark], usable: &[&PointMark], after: BatchNo) -> Option<PointId> {
    let mut above: u64 = points.iter().filter(|point| point.id.batch > after).map(|point| point.bytes).sum();
    if above <= limit {
        return None;
    }
    let mut rest = points.iter().filter(|point| point.id.batch > after).peekable();
    for point in usable {
        while let Some(below) = rest.next_if(|below| below.id.batch <= point.id.batch) {
            above -= below.bytes;
        }
        if above <= limit {
            return Some(point.id);
        }
    }
    usable.last().map(|point| point.id)
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Nothing is due.
    Idle,
    /// A new horizon is durable.
    Horizon(PointId),
    /// A piece of the base was moved; call again.
    Moved {
        /// Volume.
        volume: VolumeIndex,
        /// Slots written.
        slots: usize,
    },
    /// The base is at the horizon, durably.
    Finished(BatchNo),
    /// Segments were dropped.
    Dropped {
        /// How many.
        segments: usize,
    },
}

/// Keeps one stream's history as its policy says. Its own state is only where it was; losing it costs work, nothing else.
pub struct Mover<S: Storage, K: Keeper<S> + ?Sized> {
    keeper: Arc<K>,
    moving: Option<Moving>,
    _storage: std::marker::PhantomData<fn() -> S>,
}

/// A base move under way.
#[derive(Clone, Debug)]
struct Moving {
    horizon: PointId,
    /// Volumes still to do, the present one last.
    volumes: Vec<VolumeIndex>,
    /// Next slot of the present one.
    slot: u64,
}

impl<S: Storage, K: Keeper<S> + ?Sized> Mover<S, K> {
    /// The mover of a stream. One at a time.
    #[must_use]
    pub fn new(keeper: Arc<K>) -> Self {
        Self { keeper, moving: None, _storage: std::marker::PhantomData }
    }

    /// The next piece of work. `now`: the target's wall clock. Call it again while it is not [`Step::Idle`].
    ///
    /// # Errors
    /// [`Kind::Damaged`] stops the horizon: raise an alarm and call again later; [`Kind::NoSpace`] likewise; [`Kind::Refused`]
    /// while retention is suspended. Nothing is lost by an error.
    pub fn step(&mut self, now: WallTime) -> Result<Step> {
        let moved = self.keeper.index().moved_to();
        let horizon = self.keeper.horizon().filter(|horizon| horizon.batch > moved);
        if let Some(horizon) = horizon {
            return self.move_on(horizon);
        }
        if moved > BatchNo(0) {
            let dropped = self.drop_segments(moved)?;
            if dropped > 0 {
                return Ok(Step::Dropped { segments: dropped });
            }
        }
        let policy = Policy::parse(&self.keeper.policy())?;
        let keeper = &self.keeper;
        let Some(next) = plan(&policy, &keeper.points(), keeper.horizon(), keeper.oldest_hold(), now) else {
            return Ok(Step::Idle);
        };
        keeper.check_point(next)?;
        keeper.set_horizon(next)?;
        keeper.drop_points_before(next.batch);
        Ok(Step::Horizon(next))
    }

    /// Steps until nothing is due.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn run(&mut self, now: WallTime) -> Result<()> {
        while self.step(now)? != Step::Idle {}
        Ok(())
    }

    fn move_on(&mut self, horizon: PointId) -> Result<Step> {
        let keeper = &self.keeper;
        let moving = match &mut self.moving {
            Some(moving) if moving.horizon == horizon => moving,
            other => {
                // The first step for this horizon, perhaps in another life of the process.
                keeper.drop_points_before(horizon.batch);
                let mut volumes = keeper.volumes();
                volumes.reverse();
                other.insert(Moving { horizon, volumes, slot: 0 })
            }
        };
        if let Some(&volume) = moving.volumes.last() {
            let upto = UpTo::end_of(horizon.batch);
            let (slots, next) = move_slots(&**keeper, volume, moving.slot, upto)?;
            match next {
                Some(next) => moving.slot = next,
                None => {
                    moving.volumes.pop();
                    moving.slot = 0;
                }
            }
            return Ok(Step::Moved { volume, slots });
        }
        for volume in keeper.volumes() {
            keeper.base(volume)?.flush()?;
        }
        keeper.index().set_moved_to(horizon.batch)?;
        self.moving = None;
        Ok(Step::Finished(horizon.batch))
    }

    fn drop_segments(&self, moved: BatchNo) -> Result<usize> {
        let mut dropped = 0;
        for segment in self.keeper.droppable(moved) {
            dropped += usize::from(self.keeper.drop_segment(segment)?);
        }
        Ok(dropped)
    }
}

/// Writes the next slots from `from` on, as of `upto`, into a volume's base. Gives how many, and where to go on.
fn move_slots<S: Storage, K: Keeper<S> + ?Sized>(
    keeper: &K,
    volume: VolumeIndex,
    from: u64,
    upto: UpTo,
) -> Result<(usize, Option<u64>)> {
    let base = keeper.base(volume)?;
    let slots = keeper.index().slots(volume, from, upto, SLOTS_PER_STEP)?;
    // Up to here the list of slots is complete.
    let end = if slots.len() < SLOTS_PER_STEP { u64::MAX } else { slots.last().map_or(u64::MAX, |last| last + 1) };
    let mut written = 0;
    let mut bytes = vec![0; usize::try_from(SLOT_BYTES).expect("64 KiB")];
    let mut ahead = slots.iter().copied().peekable();
    let mut at = from;
    loop {
        let extent = next_extent(keeper, volume, at, upto)?.filter(|(first, _)| *first < end);
        let slot = ahead.peek().copied();
        match (slot, extent) {
            // Zero extents between slots of their own: whole ranges at once.
            (slot, Some((first, last))) if slot.is_none_or(|slot| first < slot) => {
                let last = last.min(end).min(slot.unwrap_or(u64::MAX));
                let size = base.size();
                let (start, stop) = ((first * SLOT_BYTES).min(size), (last.saturating_mul(SLOT_BYTES)).min(size));
                if start < stop {
                    base.zero(start, stop - start)?;
                }
                at = last;
            }
            (Some(slot), _) => {
                ahead.next();
                at = slot + 1;
                // Perhaps only versions above the horizon.
                if slot * SLOT_BYTES < base.size() && !keeper.index().lookup(volume, slot, upto)?.is_empty() {
                    let len =
                        usize::try_from((base.size() - slot * SLOT_BYTES).min(SLOT_BYTES)).expect("at most a slot");
                    read_sectors(keeper, volume, slot, 0, upto, &mut bytes[..len])?;
                    base.write(slot * SLOT_BYTES, &bytes[..len])?;
                    written += 1;
                }
            }
            (None, None) => break,
            (None, Some(_)) => unreachable!("taken by the first arm"),
        }
    }
    Ok((written, (end != u64::MAX).then_some(end)))
}

/// The next slots from `at` on that a visible zero extent covers: (first, end). The end is the extent's.
fn next_extent<S: Storage, K: Keeper<S> + ?Sized>(
    keeper: &K,
    volume: VolumeIndex,
    at: u64,
    upto: UpTo,
) -> Result<Option<(u64, u64)>> {
    let mut from = at;
    loop {
        let Some(first) = keeper.index().zero_extents(volume, from, upto, 1)?.first().copied() else {
            return Ok(None);
        };
        let end = first + ZERO_EXTENT_SLOTS;
        let visible = keeper.index().covers_extent(volume, first, upto)?;
        if end > at && visible {
            return Ok(Some((first.max(at), end)));
        }
        from = end;
    }
}

#[cfg(test)]
mod tests {
    use farshore_proto::{Generation, Incarnation};

    use super::*;

    fn point(batch: u64, age: u64, bytes: u64) -> PointMark {
        let id = PointId { generation: Generation(1), incarnation: Incarnation(1), batch: BatchNo(batch) };
        PointMark { id, received: WallTime((10_000 - age) * 1_000_000_000), recoverable: true, bytes }
    }

    const NOW: WallTime = WallTime(10_000 * 1_000_000_000);

    fn check(policy: &Policy, points: &[PointMark], horizon: Option<u64>, hold: Option<u64>) -> Option<u64> {
        let horizon = horizon.map(|batch| point(batch, 0, 0).id);
        plan(policy, points, horizon, hold.map(BatchNo), NOW).map(|point| point.batch.0)
    }

    #[test]
    fn age() {
        let policy = Policy { keep: Duration::from_secs(100), size_limit: None };
        let points: Vec<_> = (1..=20).map(|batch| point(batch, (20 - batch) * 10, 1)).collect();
        // Batch 10 is 100 s old: all of the last 100 s can be reached from it.
        assert_eq!(check(&policy, &points, None, None), Some(10));
        assert_eq!(check(&policy, &points, Some(5), None), Some(10));
        assert_eq!(check(&policy, &points, Some(10), None), None);
        assert_eq!(check(&policy, &points, None, Some(4)), Some(4), "not past a hold");
        assert_eq!(check(&policy, &points, Some(4), Some(4)), None);
        let young: Vec<_> = (1..=5).map(|batch| point(batch, 104 - batch, 1)).collect();
        assert_eq!(check(&policy, &young, None, None), None, "not for every single point");
    }

    #[test]
    fn the_newest_recoverable_point_stays() {
        let policy = Policy { keep: Duration::from_secs(1), size_limit: Some(0) };
        let mut points: Vec<_> = (1..=9).map(|batch| point(batch, 5000, 10)).collect();
        points[7].recoverable = false;
        points[8].recoverable = false;
        assert_eq!(check(&policy, &points, None, None), Some(7));
        points.iter_mut().for_each(|point| point.recoverable = false);
        assert_eq!(check(&policy, &points, None, None), None);
        assert_eq!(check(&policy, &[], Some(3), None), None);
    }

    #[test]
    fn size() {
        let policy = Policy { keep: Duration::from_secs(1_000_000), size_limit: Some(50) };
        let points: Vec<_> = (1..=10).map(|batch| point(batch, 5, 10)).collect();
        assert_eq!(check(&policy, &points, None, None), Some(5));
        assert_eq!(check(&policy, &points, Some(5), None), None);
        assert_eq!(check(&policy, &points, None, Some(2)), Some(2));
        let unlimited = Policy { size_limit: None, ..policy };
        assert_eq!(check(&unlimited, &points, None, None), None);
    }

    #[test]
    fn policy_keys() {
        let parse = |pairs: &[(&str, &str)]| {
            Policy::parse(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
        };
        assert_eq!(parse(&[]).expect("defaults"), Policy::default());
        let policy = parse(&[("keep", "2h"), ("size_limit", "20GiB"), ("other", "x")]).expect("both are well-formed");
        assert_eq!(policy, Policy { keep: Duration::from_secs(7200), size_limit: Some(20 << 30) });
        for bad in [("keep", "0"), ("keep", "soon"), ("size_limit", "much")] {
            let error = parse(&[bad]).expect_err("malformed");
            assert!(error.context().contains(bad.0), "{error}");
        }
    }
}
