//! What the streamer's thread asks of a group and tells it.

use std::collections::BTreeSet;
use std::sync::Arc;

use farshore_blkfilter::Cutter;
use farshore_proto::message::RefuseCode;
use farshore_proto::{Incarnation, Now, Position, VolumeIndex, WallTime};
use farshore_ring::Consumer;
use farshore_streamer::{Capture, LogNews, StreamEvent};

use crate::alarms::code;
use crate::shared::Shared;
use crate::sync_thread::SyncOrder;

/// Durable batches behind a resync's end until its last marks are surely cleared: sync hears of each on a thread of its own.
const MARKS_SETTLE: u32 = 2;

/// The group's side of the streamer. Lives on the streamer's thread.
pub(crate) struct Hooks {
    shared: Arc<Shared>,
    cutter: Cutter,
    /// Volumes that the target must know as joined, because that became durable.
    known_joined: BTreeSet<VolumeIndex>,
    /// Volumes that joined later, with the ring position from which on that is durable.
    joining: Vec<(VolumeIndex, u64)>,
    /// Volumes of which the target holds nothing, as its greeting says.
    empty: Vec<VolumeIndex>,
    /// No cuts yet: this life of the ring is new, and only the target's greeting tells whether it holds what this stream builds on, and what it
    /// takes for joined: a volume that left, or that an older state of this host has not joined yet, must be said to have left before an event's end makes
    /// a point.
    hold_cuts: bool,
    /// What lies behind this ring position was written in this process's life.
    head_before: u64,
    /// The target has some of that.
    heard: bool,
    /// Batches in a row that became durable and left nothing to be compared.
    whole_for: u32,
}

impl Hooks {
    pub(crate) fn new(shared: Arc<Shared>, known_joined: BTreeSet<VolumeIndex>, hold_cuts: bool) -> Self {
        let cutter = Cutter::new(Arc::clone(&shared.capture));
        let head_before = shared.capture.ring().head();
        Self {
            shared,
            cutter,
            known_joined,
            joining: Vec::new(),
            empty: Vec::new(),
            hold_cuts,
            head_before,
            heard: false,
            whole_for: 0,
        }
    }

    /// Notes which volumes the target must know as joined from now on.
    fn note_joined(&mut self, durable: Position) {
        let head = self.shared.capture.ring().head();
        let in_points = self.shared.capture.joined();
        // Those that left; their number may come again, with a volume that has yet to join.
        self.known_joined.retain(|volume| in_points.contains(volume));
        self.joining.retain(|(volume, _)| in_points.contains(volume));
        for volume in in_points {
            if !self.known_joined.contains(&volume) && self.joining.iter().all(|(known, _)| *known != volume) {
                self.joining.push((volume, head));
            }
        }
        self.joining.retain(|(volume, position)| {
            let done = *position <= durable.0;
            if done {
                self.known_joined.insert(*volume);
            }
            !done
        });
    }

    /// Everything was compared and is in the stream: the next start need not do it again.
    fn note_whole(&mut self) {
        let group = &self.shared.capture;
        let whole =
            !group.event_open() && !group.ring().is_closed() && group.volumes().iter().all(|volume| volume.joined());
        self.whole_for = if whole { self.whole_for.saturating_add(1) } else { 0 };
        if self.whole_for == MARKS_SETTLE {
            self.shared.activity.iter().for_each(|activity| activity.handle_whole());
        }
        if whole {
            self.shared.bypass_is_over();
        }
        if whole && self.shared.compares_everything() && self.shared.captures_all() {
            self.shared.update_state(|state| state.compare_everything = false);
        }
    }
}

impl Hooks {
    fn handle_log(&self, news: LogNews) {
        let group = self.shared.name.as_str();
        let alarms = &self.shared.alarms;
        match news {
            LogNews::InUse => {
                let cause = match alarms.is_raised(code::LINK_DOWN, group) {
                    true => "the target is not reached",
                    false => "the link is slower than the guests write",
                };
                let text = format!(
                    "{cause}: batches wait in the disk log, in order. It ends by itself once the target has them; `farshore status` \
                     shows how full the log is (`log_used_bytes`), and beyond it points pause"
                );
                alarms.raise(code::LOG_IN_USE, group, text);
            }
            LogNews::Empty => {
                alarms.clear(code::LOG_IN_USE, group);
                alarms.clear(code::LOG_FULL, group);
            }
            LogNews::Full => {
                let text = "the disk log is full: what guests write now stays in the ring, and where that is full, points pause until a resync \
                            has ended";
                alarms.raise(code::LOG_FULL, group, text);
            }
            LogNews::Failed(reason) => alarms.raise(
                code::LOG_FAILED,
                group,
                format!("the disk log cannot be written ({reason}): it takes nothing more before it is empty"),
            ),
            LogNews::Slow => alarms.raise(code::LOG_FAILED, group, "the disk log's disk has not answered for 5 s"),
            LogNews::Sound => {
                alarms.clear(code::LOG_FAILED, group);
                alarms.clear(code::LOG_FULL, group);
            }
            LogNews::Kept(end) => self.shared.capture.note_durable(end),
        }
    }
}

impl Capture for Hooks {
    fn cut(&mut self, now: Now, wall: &dyn Fn() -> WallTime, slot_free: bool) {
        self.shared.take_alarms();
        if self.hold_cuts {
            return;
        }
        for name in self.shared.take_bookmarks() {
            if let Err(error) = self.cutter.bookmark(name.clone(), false) {
                // The ring is closed, or too many wait: at a later turn. The asker may have missed that anything was in the way.
                tracing::debug!(%name, %error, "bookmark not cut yet");
                self.shared.order_bookmark(name);
            }
        }
        while let Some(cut) = self.cutter.poll(now, wall(), slot_free) {
            tracing::trace!(position = cut.position.0, "cut");
            if self.cutter.poll_deadline(slot_free) != Some(Now(0)) {
                break;
            }
        }
    }

    fn cut_deadline(&self, slot_free: bool) -> Option<Now> {
        if self.hold_cuts { None } else { self.cutter.poll_deadline(slot_free) }
    }

    fn reopen(&mut self, consumer: &mut Consumer, wall: WallTime) {
        if self.shared.capture.reopen(consumer, wall).is_some() {
            tracing::info!(group = %self.shared.name, "capture stream open again; resync of what is missing begins");
        }
    }

    fn start_over(&mut self, consumer: &mut Consumer, incarnation: Incarnation, wall: WallTime, reason: &str) -> bool {
        tracing::warn!(group = %self.shared.name, incarnation = incarnation.0, reason, "the stream starts over; everything is compared");
        let recorded = self.shared.update_state(|state| {
            state.incarnation = incarnation.0;
            state.compare_everything = true;
        });
        if recorded {
            // The ring keeps its own number; the stream's is in the streamer's state in it.
            self.shared.capture.start_over(consumer, wall, |_| {});
            self.joining.clear();
            self.hold_cuts = true;
            self.shared.points.handle_start_over();
        }
        recorded
    }

    fn compare_everything(&mut self, reason: &str) -> bool {
        tracing::warn!(group = %self.shared.name, reason, "everything is compared");
        let recorded = self.shared.update_state(|state| state.compare_everything = true);
        if recorded {
            let capture = &self.shared.capture;
            capture.begin_event();
            for volume in capture.volumes() {
                // The volume was in the group a moment ago; if it left meanwhile, nothing of it matters any more.
                let _ = capture.resync(volume.index());
            }
        }
        recorded
    }

    fn log_begins(&mut self, line: u64) -> bool {
        self.shared.update_state(|state| state.log_line = Some(format!("{line:016x}")))
    }

    fn log_ends(&mut self) -> bool {
        self.shared.update_state(|state| state.log_line = None)
    }

    fn event(&mut self, event: StreamEvent) {
        let group = self.shared.name.as_str();
        let alarms = &self.shared.alarms;
        match event {
            StreamEvent::Greeted(welcome) => {
                for volume in self.known_joined.clone() {
                    if !welcome.joined.contains(&volume) {
                        self.known_joined.remove(&volume);
                        // Unknown only if the volume left the group meanwhile.
                        let _ = self.shared.capture.unjoin(volume);
                    }
                }
                // Those that left while nobody heard it, with a stop that could not drain or a ring that was lost.
                welcome.joined.iter().for_each(|volume| self.shared.capture.say_left(*volume));
                self.empty = welcome.empty;
                self.shared.update_state(|state| state.generation = welcome.generation.0);
            }
            StreamEvent::Live => {
                self.hold_cuts = false;
                alarms.clear(code::LINK_DOWN, group);
                alarms.clear(code::REFUSED, group);
                alarms.clear(code::PAUSED, group);
                let from = Position(self.shared.capture.ring().freed());
                self.shared.sync.tell(SyncOrder::Live { empty: self.empty.clone(), from });
            }
            StreamEvent::Durable(batch) => {
                self.shared.capture.note_durable(batch.end);
                if !self.heard && batch.end.0 > self.head_before {
                    self.heard = true;
                    self.shared.activity.iter().for_each(|activity| activity.handle_heard(self.shared.id));
                }
                self.shared.sync.tell(SyncOrder::Durable(batch.end));
                self.note_joined(batch.end);
                if batch.recoverable {
                    self.note_whole();
                } else {
                    self.whole_for = 0;
                }
                self.shared.points.note(&batch);
            }
            StreamEvent::Answers(answers) => self.shared.sync.tell(SyncOrder::Answers(answers)),
            StreamEvent::Down { reason } => {
                alarms.raise(code::LINK_DOWN, group, reason);
                self.shared.sync.tell(SyncOrder::Break);
            }
            StreamEvent::Paused { reason } => alarms.raise(code::PAUSED, group, reason),
            StreamEvent::Resumed => alarms.clear(code::PAUSED, group),
            StreamEvent::Log(news) => self.handle_log(news),
            StreamEvent::Refused { code: RefuseCode::Replaced, detail } => {
                alarms.raise(code::REFUSED, group, format!("another agent of this name took over: {detail}"));
            }
            StreamEvent::Refused { code: why, detail } => {
                alarms.raise(code::REFUSED, group, format!("{why:?}: {detail}"));
            }
            StreamEvent::CompareEverything { .. } | StreamEvent::StartOver { .. } => {
                unreachable!("the driver asks for these by calls of their own")
            }
        }
        self.shared.points.poke();
    }

    fn unreachable(&mut self, reason: &str, fatal: bool) {
        let text = if fatal { format!("{reason} (not before somebody acts)") } else { reason.to_owned() };
        self.shared.alarms.raise(code::LINK_DOWN, self.shared.name.as_str(), text);
    }
}
