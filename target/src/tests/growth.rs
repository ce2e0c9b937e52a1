//! Volumes grow: each point shows the size and the bytes of its time.

use std::sync::Arc;

use farshore_proto::VolumeIndex;
use farshore_proto::message::RefuseCode;
use farshore_uring::BlockDevice;
use farshore_uring::sim::{SimRng, SimStorage};

use super::source::{Clocked, Op, Sent, Source, VOLUME_BYTES, name};
use super::{open, storage};
use crate::group::GroupHost;
use crate::scratch::{RESERVE_BYTES, Space};
use crate::target::Target;
use crate::view::ViewOptions;
use crate::views::{open_view, remove_view};

const VOLUME: VolumeIndex = VolumeIndex(0);
/// Neither end lies at the end of a slot.
const GROWN: u64 = VOLUME_BYTES * 2 + 1024;

fn stream(target: &Target<SimStorage>) -> Arc<GroupHost<SimStorage>> {
    Arc::clone(&target.streams(&name("db")).expect("the group exists")[&name("host-a")])
}

/// The view of a point has the size and the content that the source had.
fn check(target: &Target<SimStorage>, sent: &Sent) {
    let options = ViewOptions {
        read_only: true,
        workers: 0,
        cache_bytes: 1 << 17,
        space: Space { limit: None, reserve: RESERVE_BYTES },
    };
    let stream = stream(target);
    let view = open_view(&stream, &name("look"), sent.point, VOLUME, options).expect("a recoverable point");
    let wanted = &sent.content[&VOLUME.0];
    assert_eq!(view.geometry().size, wanted.len() as u64, "size at {}", sent.point);
    let mut found = vec![0; wanted.len()];
    view.read(0, &mut found).expect("whole");
    assert!(found == *wanted, "content at {}", sent.point);
    drop(view);
    remove_view(&stream, &name("look"), VOLUME).expect("it is there");
}

fn tail_write(volume: &Source, byte: u8) -> Op {
    Op::Write(VOLUME.0, volume.volumes[0].size / 512 - 2, vec![byte; 1024])
}

/// Goal: points of before a growth keep size and content, later ones have the new. Method: growth said by a batch, while connected and
/// by a greeting; batches of before come again; a restart; shrinking.
#[test]
fn points_have_the_size_of_their_time() {
    let disk = storage(5);
    let mut rng = SimRng::new(5);
    let target = open(&disk).expect("an empty root");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.step(&mut world, &mut rng, 10);
    source.join_all(&mut world);
    let ops = [tail_write(&source, 1)];
    let small = source.batch(&ops, None);
    source.send(&mut world, &small.bytes);

    source.resize(0, GROWN);
    // Not before the batch that begins with it.
    source.session.announce(source.volumes.clone()).expect("few volumes");
    source.talk(&mut world);
    let between = { stream(&target).record().volumes[0].size };
    assert_eq!(between, VOLUME_BYTES);
    let ops = [tail_write(&source, 2)];
    let grown = source.batch(&ops, None);
    source.send(&mut world, &grown.bytes);
    assert_eq!((source.refused.take(), source.acked), (None, grown.number));
    source.send(&mut world, &small.bytes);
    assert_eq!(source.refused.take(), None, "a repeat");
    for sent in [&small, &grown] {
        check(&target, sent);
    }

    // Twice as large while nobody was connected; the greeting says it.
    source.resize(0, 2 * GROWN);
    source.connect(&mut world);
    assert!(source.welcome.is_some(), "{:?}", source.refused);
    let ops = [tail_write(&source, 3)];
    let later = source.batch(&ops, None);
    source.send(&mut world, &later.bytes);
    drop(target);

    let target = open(&disk).expect("as it was");
    for sent in [&small, &grown, &later] {
        check(&target, sent);
    }
    let mut world = Clocked::new(&target);
    source.resize(0, GROWN + 512);
    source.connect(&mut world);
    let (code, detail) = source.refused.take().expect("it has shrunk");
    assert!(code == RefuseCode::Volume && detail.contains(&(GROWN + 512).to_string()), "{detail}");
}
