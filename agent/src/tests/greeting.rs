//! What a greeting of the target corrects.

use std::collections::BTreeSet;

use farshore_proto::message::Welcome;
use farshore_proto::record::Kind;
use farshore_proto::{Generation, Now, VolumeIndex, WallTime};
use farshore_ring::Consumer;
use farshore_streamer::{Capture, StreamEvent};

use super::rig::{shared, volume};
use crate::hooks::Hooks;

fn welcome(joined: &[u16]) -> StreamEvent {
    let joined = joined.iter().copied().map(VolumeIndex).collect();
    let welcome =
        Welcome { generation: Generation(1), tail: None, empty: Vec::new(), joined, event_open: false, log: None };
    StreamEvent::Greeted(welcome)
}

/// Kinds and volumes of what is new in the ring.
fn said(consumer: &mut Consumer) -> Vec<(u8, u16)> {
    std::iter::from_fn(|| consumer.next()).map(|entry| (entry.desc.kind, entry.desc.volume)).collect()
}

fn cut(hooks: &mut Hooks, at: u64) {
    hooks.cut(Now(at * 1_000_000_000), &|| WallTime(at), true);
}

/// Goal: a leaving that was lost with a ring is said again, to every greeting that does not know of it, and before any cut.
/// Method: the target holds as joined one volume that is, one that is captured anew, and one that is gone.
#[test]
fn what_left_unheard_is_said_to_leave() {
    let (_folder, shared) = shared(&[volume(0, true), volume(1, false)]);
    let mut consumer = shared.capture.ring().consumer().expect("the only one");
    let mut hooks = Hooks::new(std::sync::Arc::clone(&shared), BTreeSet::from([VolumeIndex(0)]), true);
    said(&mut consumer);
    let left = |volume| (Kind::VolumeLeft as u8, volume);
    hooks.event(welcome(&[0, 1, 2]));
    assert_eq!(said(&mut consumer), [left(1), left(2)]);
    // The link broke before that was durable.
    hooks.event(welcome(&[0, 2]));
    assert_eq!(said(&mut consumer), [left(2)]);
    hooks.event(welcome(&[0]));
    assert_eq!(said(&mut consumer), []);
    hooks.event(StreamEvent::Live);
    cut(&mut hooks, 2);
    assert_eq!(said(&mut consumer), [(Kind::Cut as u8, 0)]);
}

/// Goal: of a new ring nothing is cut before the greeting, whatever this host knows: the first point would show volumes that left.
#[test]
fn a_new_ring_is_not_cut_before_the_greeting() {
    let (_folder, shared) = shared(&[]);
    let mut consumer = shared.capture.ring().consumer().expect("the only one");
    let mut hooks = Hooks::new(std::sync::Arc::clone(&shared), BTreeSet::new(), true);
    cut(&mut hooks, 1);
    assert_eq!((said(&mut consumer), hooks.cut_deadline(true)), (Vec::new(), None));
    hooks.event(welcome(&[5]));
    hooks.event(StreamEvent::Live);
    cut(&mut hooks, 2);
    assert_eq!(said(&mut consumer), [(Kind::VolumeLeft as u8, 5), (Kind::Cut as u8, 0)]);
    // A ring that was found goes on at once.
    let mut hooks = Hooks::new(std::sync::Arc::clone(&shared), BTreeSet::new(), false);
    cut(&mut hooks, 3);
    assert_eq!(said(&mut consumer), [(Kind::Cut as u8, 0)]);
}

/// Goal: a leaving for which the ring has no room waits until it is open again.
#[test]
fn a_leaving_waits_for_room() {
    let (_folder, shared) = shared(&[volume(0, true)]);
    let mut consumer = shared.capture.ring().consumer().expect("the only one");
    let mut hooks = Hooks::new(std::sync::Arc::clone(&shared), BTreeSet::from([VolumeIndex(0)]), false);
    said(&mut consumer);
    assert!(shared.capture.ring().close());
    hooks.event(welcome(&[0, 3]));
    hooks.event(welcome(&[0, 3]));
    assert_eq!(said(&mut consumer), []);
    hooks.reopen(&mut consumer, WallTime(1));
    let kinds = said(&mut consumer);
    assert_eq!(kinds.iter().filter(|said| **said == (Kind::VolumeLeft as u8, 3)).count(), 1, "{kinds:?}");
}
