//! When volumes are verified, and what is kept of that: the part of verify that outlives a process.
//!
//! Every `verify_every` a pass goes over each volume at `verify_rate`, and one ordered by a person goes at sync's rate. A pass that
//! was cut off goes on from where it was last kept. What differs is kept until a pass finds it equal.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use farshore_blkfilter::sync::{DIFFERENCES_MAX, VerifyEvent, VerifyFound, VerifyOrder, VerifyProgress};
use farshore_proto::text::show_time;
use farshore_proto::{VolumeIndex, WallTime};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::alarms::code;
use crate::group::Group;
use crate::state::VolumeState;
use crate::{Error, Result, clock};

/// A pass is kept at least so often: what a restart looks at again.
const KEEP_BYTES: u64 = 4 << 30;

/// What is kept of a volume's verify.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyState {
    /// When the last pass that compared everything began (nanoseconds of the source's clock): every byte was compared then or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// When the last pass that reached its end began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<u64>,
    /// Bytes that it could not compare.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// The same of a pass that has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<u64>,
    /// Byte from which on that one goes on; 0 while there is none.
    #[serde(default)]
    pub at: u64,
    /// A person has ordered it.
    #[serde(default)]
    pub ordered: bool,
    /// What differs, as (first byte, byte behind the last); at most 256 ranges.
    #[serde(default)]
    pub differing: Vec<(u64, u64)>,
}

impl VerifyState {
    /// Whether a pass is to begin, or to go on, while none is under way.
    fn is_due(&self, now: WallTime, every: Option<Duration>) -> bool {
        if self.began.is_some() {
            return self.ordered || every.is_some();
        }
        // A clock that was ahead when the last one began says nothing.
        let over = |every| self.last.is_none_or(|last| last > now.0 || now.since(WallTime(last)) >= every);
        every.is_some_and(over)
    }

    fn begin(&mut self, now: WallTime, ordered: bool) {
        (self.began, self.at, self.ordered) = (Some(now.0), 0, ordered);
    }

    /// Known at once, whatever becomes of the pass.
    fn differs(&mut self, range: &Range<u64>) {
        let touching = self.differing.iter_mut().find(|known| known.0 <= range.end && range.start <= known.1);
        if let Some(known) = touching {
            *known = (known.0.min(range.start), known.1.max(range.end));
        } else if self.differing.len() < DIFFERENCES_MAX {
            self.differing.push((range.start, range.end));
        }
    }

    /// The end of pass `pass`, which is known by when it began. Of one that another has taken the place of, nothing is kept.
    fn ended(&mut self, pass: u64, from: u64, found: &VerifyFound) {
        if self.began.take_if(|began| *began == pass).is_none() {
            return;
        }
        (self.last, self.at, self.ordered) = (Some(pass), 0, false);
        self.skipped_bytes = found.skipped_bytes;
        if found.skipped_bytes == 0 {
            self.since = Some(pass);
        }
        // What was not compared stays as it was.
        let before = 0..from;
        let named: u64 = found.skipped.iter().map(|range| range.end - range.start).sum();
        // Where not all is named that was skipped, it may be anywhere.
        let anywhere = (named < found.skipped_bytes).then_some(0..u64::MAX);
        let kept = std::iter::once(&before).chain(&found.skipped).filter(|_| anywhere.is_none()).chain(&anywhere);
        let kept: Vec<_> = kept.flat_map(|kept| parts(&self.differing, kept)).collect();
        self.differing = kept;
        found.differing.iter().for_each(|range| self.differs(range));
        self.differing.sort_unstable();
    }

    fn differing_bytes(&self) -> u64 {
        self.differing.iter().map(|range| range.1 - range.0).sum()
    }
}

/// The parts of `ranges` that lie in `within`.
fn parts(ranges: &[(u64, u64)], within: &Range<u64>) -> Vec<(u64, u64)> {
    let cut = |range: &(u64, u64)| (range.0.max(within.start), range.1.min(within.end));
    ranges.iter().map(cut).filter(|range| range.0 < range.1).collect()
}

impl Group {
    /// Takes in what sync has found, and begins what is due. Called every second.
    pub(crate) fn watch_verify(&self) {
        // Before what was found is taken: what is kept as dealt with must not be ahead of what is kept as found.
        let progress: BTreeMap<u16, VerifyProgress> = self
            .volumes()
            .iter()
            .filter_map(|of| Some((of.index, self.shared.sync.verify_progress(VolumeIndex(of.index))?)))
            .collect();
        let mut unkept = Vec::new();
        for event in self.shared.sync.take_verify_events() {
            let kept = match &event {
                VerifyEvent::Differs { volume, range } => {
                    let kept = self.update_verify(*volume, |known| known.differs(range));
                    if kept {
                        let subject = self.shared.volume_subject(*volume);
                        tracing::error!(volume = subject, ?range, "source and replica differ");
                    }
                    kept
                }
                VerifyEvent::Ended { volume, pass, from, found } => {
                    let kept = self.update_verify(*volume, |known| known.ended(*pass, *from, found));
                    if kept {
                        let subject = self.shared.volume_subject(*volume);
                        let VerifyFound { equal_bytes, differing_bytes, skipped_bytes, .. } = found;
                        tracing::info!(volume = subject, from, equal_bytes, differing_bytes, skipped_bytes, "verified");
                        if *from == 0 && *differing_bytes == 0 && *skipped_bytes == 0 {
                            // All of the device was read since, and is what the replica has.
                            for code in [code::WRITE_FAILED, code::UNREADABLE, code::DROPPED] {
                                self.shared.alarms.clear_before(WallTime(*pass), code, &subject);
                            }
                        }
                    }
                    kept
                }
            };
            if !kept {
                unkept.push(event);
            }
        }
        if !unkept.is_empty() {
            // The state cannot be written (`state.failed`): said all the same, and kept when it can.
            for volume in self.volumes() {
                let mut known = volume.verify.unwrap_or_default();
                for event in &unkept {
                    match event {
                        VerifyEvent::Differs { volume: of, range } if of.0 == volume.index => known.differs(range),
                        VerifyEvent::Differs { .. } | VerifyEvent::Ended { .. } => {}
                    }
                }
                self.tell_of_differences(VolumeIndex(volume.index), &known);
            }
            return self.shared.sync.give_back_verify_events(unkept);
        }
        for volume in self.volumes() {
            self.go_on_verifying(&volume, progress.get(&volume.index));
        }
    }

    /// `progress`: of its pass, if there is one under way.
    fn go_on_verifying(&self, volume: &VolumeState, progress: Option<&VerifyProgress>) {
        let index = VolumeIndex(volume.index);
        let known = volume.verify.clone().unwrap_or_default();
        self.tell_of_differences(index, &known);
        if let Some(progress) = progress {
            // Not beyond what it could not compare: that is known to the pass alone, so one that goes on looks again.
            let far = progress.at >= known.at.saturating_add(KEEP_BYTES.min(volume.size / 16));
            // Of this pass, not of one that it has taken the place of. (Orders come under the mutex that this is called under.)
            let own = known.began == Some(progress.pass);
            if far && own && progress.found.skipped_bytes == 0 {
                self.update_verify(index, |known| known.at = progress.at);
            }
            return;
        }
        let captured = self.shared.capture.volume(index);
        let policy = self.policy();
        let every = policy.verify_rate.map(|_| policy.verify_every);
        if captured.is_some_and(|it| it.announced()) && known.is_due(clock::wall(), every) {
            let pass = known.began.unwrap_or(clock::wall().0);
            let goes_on = known.began.is_some();
            if !goes_on && !self.update_verify(index, |known| known.begin(WallTime(pass), false)) {
                return;
            }
            let rate = if known.ordered { policy.sync_rate } else { policy.verify_rate };
            self.shared.sync.verify(VerifyOrder { volume: index, pass, from: known.at, rate });
        }
    }

    fn tell_of_differences(&self, index: VolumeIndex, known: &VerifyState) {
        let subject = self.shared.volume_subject(index);
        match known.differing.first() {
            None => self.shared.alarms.clear(code::DIFFERS, &subject),
            Some((from, to)) => {
                let text = format!(
                    "source and replica differ in {} bytes, first in {from} to {to}: find out which side is right; \
                     `farshore verify --repair` makes the replica like the source (the points before keep what it was)",
                    known.differing_bytes()
                );
                self.shared.alarms.raise(code::DIFFERS, &subject, text);
            }
        }
    }

    /// `false`: it could not be kept.
    fn update_verify(&self, index: VolumeIndex, change: impl FnOnce(&mut VerifyState)) -> bool {
        self.shared.update_state(|state| {
            if let Some(volume) = state.volumes.iter_mut().find(|volume| volume.index == index.0) {
                change(volume.verify.get_or_insert_default());
            }
        })
    }

    /// Begins a pass over every volume of the group. `repair`: what is known to differ is compared and sent first, as by a resync.
    ///
    /// # Errors
    /// The group has no volume, or the order cannot be kept.
    pub(crate) fn order_verify(&self, repair: bool) -> Result<Value> {
        let volumes = self.volumes();
        if volumes.is_empty() {
            return Err(Error::failed(format!("group {}", self.shared.name), "has no volume to verify"));
        }
        let mut ordered = Vec::new();
        for volume in &volumes {
            let index = VolumeIndex(volume.index);
            let known = volume.verify.clone().unwrap_or_default();
            if let (true, Some(captured)) = (repair, self.shared.capture.volume(index)) {
                for (from, to) in &known.differing {
                    let to = (*to).min(captured.size());
                    if *from < to {
                        self.shared.capture.mark_missing(&captured, *from, to - from);
                    }
                }
            }
            let began = clock::wall();
            if !self.update_verify(index, |known| known.begin(began, true)) {
                return Err(Error::failed(format!("state of group {}", self.shared.name), "cannot be written"));
            }
            self.shared.sync.verify(VerifyOrder {
                volume: index,
                pass: began.0,
                from: 0,
                rate: self.policy().sync_rate,
            });
            ordered.push(json!({ "volume": volume.name, "began": show_time(began) }));
        }
        Ok(json!(ordered))
    }

    /// How verify stands, per volume.
    pub(crate) fn verify_document(&self) -> Value {
        let document = |volume: &VolumeState| {
            let known = volume.verify.clone().unwrap_or_default();
            let progress = self.shared.sync.verify_progress(VolumeIndex(volume.index));
            let at = progress.filter(|it| known.began == Some(it.pass)).map_or(known.at, |it| it.at);
            let ranges = known.differing.iter().map(|(from, to)| json!({ "offset": from, "len": to - from }));
            json!({
                "volume": volume.name,
                "verified_since": known.since.map(|since| show_time(WallTime(since))),
                "last_pass": known.last.map(|last| show_time(WallTime(last))),
                "skipped_bytes": known.skipped_bytes,
                "running_since": known.began.map(|began| show_time(WallTime(began))),
                "ordered": known.ordered,
                "done_bytes": at,
                "total_bytes": volume.size,
                "differing_bytes": known.differing_bytes(),
                "differing": ranges.collect::<Vec<_>>(),
            })
        };
        json!(self.volumes().iter().map(document).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(differing: Option<Range<u64>>) -> VerifyFound {
        VerifyFound { differing: differing.into_iter().collect(), ..VerifyFound::default() }
    }

    /// Goal: passes come when they are due, one cut off goes on, and an ordered one goes on even where none are scheduled.
    #[test]
    fn passes_come_when_they_are_due() {
        let day = Duration::from_secs(86_400);
        let at = |seconds: u64| WallTime(seconds * 1_000_000_000);
        let mut known = VerifyState::default();
        assert!(known.is_due(at(5), Some(day)) && !known.is_due(at(5), None));
        known.begin(at(5), false);
        assert!(known.is_due(at(6), Some(day)) && !known.is_due(at(6), None), "it goes on");
        known.ended(at(4).0, 0, &found(Some(7..9)));
        assert_eq!((known.since, known.began, known.differing.len()), (None, Some(at(5).0), 0), "another pass's end");
        known.ended(at(5).0, 0, &found(None));
        assert_eq!((known.since, known.began), (Some(at(5).0), None));
        assert!(!known.is_due(at(86_404), Some(day)) && known.is_due(at(86_405), Some(day)));
        known.begin(at(90_000), true);
        assert!(known.is_due(at(90_000), None));
        known.ended(at(90_000).0, 0, &found(None));
        assert!(known.is_due(at(80_000), Some(day)), "the clock was ahead");
    }

    /// Goal: what differs is known from the first finding on, and until a pass that looked there finds it equal.
    #[test]
    fn differences_stay_until_they_are_looked_at_again() {
        let mut known = VerifyState::default();
        known.begin(WallTime(1), false);
        known.differs(&(10..20));
        known.differs(&(10..20));
        known.differs(&(70..80));
        assert_eq!(known.differing_bytes(), 20);
        // The pass was cut off at 50 and went on.
        known.ended(1, 50, &found(Some(90..95)));
        assert_eq!(known.differing, [(10, 20), (90, 95)]);
        known.begin(WallTime(2), false);
        known.ended(2, 0, &found(None));
        assert_eq!((known.differing_bytes(), known.since), (0, Some(2)));
        // Of what lies before the point where it went on, and of what it could not compare, nothing new is known.
        known.differing = vec![(10, 60), (70, 80)];
        known.begin(WallTime(3), false);
        let skipped = std::iter::once(75..90).collect();
        known.ended(3, 50, &VerifyFound { skipped_bytes: 15, skipped, ..VerifyFound::default() });
        assert_eq!(
            (known.differing.as_slice(), known.since, known.last),
            (&[(10, 50), (75, 80)][..], Some(2), Some(3))
        );
        known.differing = vec![(10, 60), (70, 80)];
        known.begin(WallTime(4), false);
        let unnamed = VerifyFound { skipped_bytes: 15, ..VerifyFound::default() };
        known.ended(4, 0, &unnamed);
        assert_eq!(known.differing, [(10, 60), (70, 80)], "it may have skipped these");
        known.differs(&(60..70));
        assert_eq!(known.differing_bytes(), 70);
        for n in 0..1000 {
            known.differs(&(n * 3..n * 3 + 1));
        }
        assert_eq!(known.differing.len(), DIFFERENCES_MAX);
    }
}
