//! Volumes that join the points.

use std::sync::mpsc::sync_channel;

use farshore_blkfilter::Content;
use farshore_proto::record::Kind;
use farshore_proto::{Position, VolumeIndex};
use farshore_uring::{BackingOptions, open_backing};

use super::rig::{name, shared_without, volume};
use crate::shared::Marks;
use crate::source::SourceFile;
use crate::sync_thread::SyncOrder;

/// Goal: that a volume joins is on disk before the stream says so: a start that finds the word in the ring need not compare the volume.
#[test]
fn a_join_is_on_disk_before_it_is_said() {
    let volume = volume(0, false);
    let (folder, shared) = shared_without(std::slice::from_ref(&volume));
    let (published, wakes) = sync_channel(1);
    shared.capture.set_consumer_waker(move || _ = published.try_send(()));
    let mut consumer = shared.capture.ring().consumer().expect("the only one");
    let image = folder.path().join("image");
    std::fs::File::create(&image).and_then(|file| file.set_len(volume.size)).expect("room");
    let backing = open_backing(&image, BackingOptions::default()).expect("a good image");
    shared.add(&volume, SourceFile(backing), Content::Unknown, false, Marks::None).expect("room");
    // The target holds nothing: all is sent, and nothing need be answered.
    shared.sync.tell(SyncOrder::Live { empty: vec![VolumeIndex(0)], from: Position(0) });
    loop {
        match consumer.next() {
            Some(entry) if entry.desc.kind == Kind::VolumeJoined as u8 => break,
            Some(_) => {}
            None if consumer.prepare_sleep() => wakes.recv().expect("the group lives"),
            None => {}
        }
    }
    let state = shared.store.read_group(&name("g")).expect("readable").expect("written");
    assert!(state.volumes[0].joined);
}
