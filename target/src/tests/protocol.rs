//! Who may write what, the order of batches, probes, leases.

use std::time::Duration;

use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::message::RefuseCode;
use farshore_proto::record::Kind;
use farshore_proto::{BatchNo, HostId, Incarnation, KeyEpoch, SLOT_BYTES};
use farshore_uring::sim::{SimRng, SimStorage};

use super::source::{Clocked, Op, Sent, Source, VAULT, VOLUME_BYTES, name};
use super::{CONFIG, assert_point, open, storage};
use crate::alarm::AlarmCode;
use crate::check::{Checker, Progress};
use crate::keys::TargetKeys;
use crate::status::{PointSpec, resolve_point};
use crate::target::Target;

/// A target with a joined source of two volumes that has sent some batches.
fn started(seed: u64) -> (Target<SimStorage>, Source, SimRng) {
    let target = open(&storage(seed)).expect("a good disk");
    let mut source = Source::new("db", "host-a", 2);
    let mut rng = SimRng::new(seed);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.step(&mut world, &mut rng, 10);
    source.join_all(&mut world);
    for _ in 0..4 {
        source.step(&mut world, &mut rng, 5);
    }
    assert_eq!(source.acked, BatchNo(6));
    (target, source, rng)
}

fn refusal(source: &Source) -> RefuseCode {
    source.refused.as_ref().expect("refused").0
}

/// Goal: each wrong batch gets its own refusal and changes nothing; a repeat is acknowledged again.
#[test]
fn wrong_batches_get_the_right_refusal() {
    type Wrong = fn(&mut Source, &mut SimRng) -> Vec<u8>;
    let next = |source: &mut Source, rng: &mut SimRng| {
        let ops = source.random_ops(rng, 3);
        source.batch(&ops, None)
    };
    let cases: [(&str, Wrong, Option<RefuseCode>); 7] = [
        ("repeated", |source, _| source.sent[3].bytes.clone(), None),
        (
            "forked",
            |source, rng| {
                source.sent.pop();
                let ops = source.random_ops(rng, 2);
                source.batch(&ops, None).bytes
            },
            Some(RefuseCode::Chain),
        ),
        (
            "forked old",
            |source, rng| {
                source.sent.truncate(3);
                let ops = source.random_ops(rng, 2);
                source.batch(&ops, None).bytes
            },
            Some(RefuseCode::Chain),
        ),
        (
            "truncated",
            |source, rng| {
                let ops = source.random_ops(rng, 2);
                let mut bytes = source.batch(&ops, None).bytes;
                bytes.pop();
                bytes
            },
            Some(RefuseCode::Malformed),
        ),
        (
            "of a lower incarnation",
            |source, rng| {
                source.incarnation = Incarnation(0);
                source.start_over(Incarnation(1));
                source.sent.last_mut().expect("sent").chain.0[0] ^= 1;
                let ops = source.random_ops(rng, 2);
                source.batch(&ops, None).bytes
            },
            Some(RefuseCode::Chain),
        ),
        (
            "of another host",
            |_, rng| {
                let mut other = Source::new("db", "host-b", 2);
                let ops = other.random_ops(rng, 2);
                other.batch(&ops, None).bytes
            },
            Some(RefuseCode::Malformed),
        ),
        (
            "beyond the volume",
            |source, _| source.batch(&[Op::ProbeZero(0, 1 << 30, 8)], None).bytes,
            Some(RefuseCode::Volume),
        ),
    ];
    for (what, wrong, expected) in cases {
        let (target, mut source, mut rng) = started(7);
        let acked = source.acked;
        let honest = source.sent.clone();
        let bytes = wrong(&mut source, &mut rng);
        source.sent = honest;
        let mut world = Clocked::new(&target);
        source.send(&mut world, &bytes);
        match expected {
            None => assert_eq!(source.refused, None, "{what}"),
            Some(code) => {
                assert_eq!(refusal(&source), code, "{what}: {:?}", source.refused);
                assert!(source.closed.is_some());
            }
        }
        assert_eq!(source.acked, acked, "{what}");
        let held = target.status(world.wall)[0].tail.expect("held").number;
        assert_eq!(held, acked, "{what}");
    }
    let (target, mut source, mut rng) = started(7);
    let good = next(&mut source, &mut rng);
    source.send(&mut Clocked::new(&target), &good.bytes);
    assert_eq!(source.acked, good.number, "the honest one is taken");
}

/// Goal: no flipped bit in a batch is taken.
#[test]
fn a_flipped_bit_anywhere_is_refused() {
    let (target, mut source, mut rng) = started(8);
    let ops = source.random_ops(&mut rng, 2);
    let good = source.batch(&ops, None);
    for at in (0..good.bytes.len()).step_by(41).chain(0..330) {
        let mut bad = good.bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let mut world = Clocked::new(&target);
        source.connect(&mut world);
        source.send(&mut world, &bad);
        assert!(source.refused.is_some(), "byte {at}");
        assert_eq!(source.acked, BatchNo(6));
    }
    source.connect(&mut Clocked::new(&target));
    source.send(&mut Clocked::new(&target), &good.bytes);
    assert_eq!(source.acked, BatchNo(7));
}

/// Goal: batches may overtake each other; a missing one ends the session once, and is a refusal when a new session leaves
/// it out again.
#[test]
fn overtaking_is_fine_and_a_skipped_batch_is_found_out() {
    let (target, mut source, mut rng) = started(9);
    let mut world = Clocked::new(&target);
    let made: Vec<Sent> = (0..3)
        .map(|_| {
            let ops = source.random_ops(&mut rng, 2);
            source.batch(&ops, None)
        })
        .collect();
    source.send(&mut world, &made[2].bytes);
    source.send(&mut world, &made[1].bytes);
    assert_eq!(source.acked, BatchNo(6));
    world.pass(Duration::from_secs(9));
    source.talk(&mut world);
    assert_eq!(source.closed, None);
    world.pass(Duration::from_secs(2));
    source.talk(&mut world);
    assert!(source.closed.as_ref().is_some_and(|why| why.contains("gap")) && source.refused.is_none());
    source.connect(&mut world);
    source.send(&mut world, &made[1].bytes);
    world.pass(Duration::from_secs(11));
    source.talk(&mut world);
    assert_eq!(refusal(&source), RefuseCode::Chain);
    source.connect(&mut world);
    for index in [2, 0, 1] {
        source.send(&mut world, &made[index].bytes);
    }
    assert_eq!(source.acked, BatchNo(9), "all three, in whatever order they come");
    let stream = target.stream(&name("db"), None).expect("made");
    made.iter().for_each(|sent| assert_point(&stream, sent));
    let far = {
        let mut far = made[0].clone();
        for _ in 0..3 {
            let ops = source.random_ops(&mut rng, 1);
            far = source.batch(&ops, None);
        }
        far
    };
    source.send(&mut world, &far.bytes);
    assert_eq!(source.refused, None, "may still come");
}

/// Goal: a new incarnation goes on behind the tail; after it the old one is refused.
#[test]
fn an_older_incarnation_is_refused() {
    let (target, mut source, mut rng) = started(10);
    let mut world = Clocked::new(&target);
    source.start_over(Incarnation(3));
    let sent = source.step(&mut world, &mut rng, 2);
    assert_eq!(source.acked, sent.number);
    source.start_over(Incarnation(2));
    source.step(&mut world, &mut rng, 2);
    assert_eq!(refusal(&source), RefuseCode::Chain);
}

/// Goal: the first host owns a new group; others need to be added; a removed one is thrown out at once.
#[test]
fn only_members_write_a_group() {
    let (target, mut source, mut rng) = started(11);
    let mut world = Clocked::new(&target);
    let mut other = Source::new("db", "host-b", 1);
    other.link = 100;
    other.connect(&mut world);
    assert_eq!(refusal(&other), RefuseCode::NotAMember);
    assert!(other.refused.as_ref().is_some_and(|(_, why)| why.contains("farshore group add db host-b")));
    target.add_member(&name("db"), &name("host-b")).expect("room");
    other.connect(&mut world);
    assert!(other.welcome.is_some());
    other.step(&mut world, &mut rng, 2);
    assert_eq!(other.acked, BatchNo(1));
    target.remove_member(&name("db"), &name("host-a")).expect("a member");
    source.talk(&mut world);
    assert_eq!(refusal(&source), RefuseCode::NotAMember);
    source.connect(&mut world);
    assert_eq!(refusal(&source), RefuseCode::NotAMember);
    // A certificate of one name does not bring another's stream.
    let mut thief = Source::new("db", "host-b", 1);
    thief.link = 200;
    thief.host = name("host-c");
    thief.connect(&mut world);
    assert_eq!(refusal(&thief), RefuseCode::NotAMember);
    assert_eq!(target.streams(&name("db")).expect("group").len(), 2, "history of a removed host stays");
}

#[test]
fn a_newer_session_replaces_the_older() {
    let (target, mut source, mut rng) = started(12);
    let mut world = Clocked::new(&target);
    let mut twin = Source::new("db", "host-a", 2);
    twin.link = 50;
    twin.connect(&mut world);
    assert!(twin.welcome.is_some());
    let sent = source.step(&mut world, &mut rng, 2);
    assert!(source.acked < sent.number, "its batches are not taken any more");
}

#[test]
fn a_volume_may_not_change_its_shape() {
    let (target, mut source, _) = started(13);
    let mut world = Clocked::new(&target);
    // It may grow (`growth.rs`).
    source.volumes[1].size -= 512;
    source.connect(&mut world);
    assert_eq!(refusal(&source), RefuseCode::Volume);
    source.volumes[1].size += 512;
    source.volumes[1].name = name("vol0");
    source.connect(&mut world);
    assert_eq!(refusal(&source), RefuseCode::Volume);
}

/// Goal: no answer is taken for whole that is a part: what it does not name, the source believes to be equal. Method: more questions
/// in one batch than a message has room for the answers to; each message must name all that differs of each question in it.
#[test]
fn answers_to_a_question_are_not_torn_apart() {
    let target = open(&storage(15)).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let slots = VOLUME_BYTES / SLOT_BYTES;
    // An odd number: no power of two is a multiple of it.
    let differing: Vec<u64> = (0..slots).step_by(2).take(3).map(|slot| slot * SLOT_BYTES).collect();
    assert!(differing.len() % 2 == 1, "{slots} slots");
    let writes: Vec<_> = differing.iter().map(|offset| Op::Write(0, offset / 512, vec![1; 4096])).collect();
    let first = source.batch(&writes, None);
    source.send(&mut world, &first.bytes);
    source.join_all(&mut world);
    let questions = 20_000 / differing.len();
    let sent = source.batch(&vec![Op::ProbeZero(0, 0, VOLUME_BYTES / 512); questions], None);
    source.answers.clear();
    source.send(&mut world, &sent.bytes);
    assert!(source.answers.len() > 1, "all fits one message");
    let mut told = 0;
    for message in &source.answers {
        for answers in message.results.chunk_by(|a, b| a.position == b.position) {
            let named: Vec<u64> = answers.iter().map(|answer| answer.offset).collect();
            assert_eq!(named, differing, "question {}", answers[0].position.0);
            told += 1;
        }
    }
    assert_eq!(told, questions);
}

/// Goal: a probe is compared with the content at its own ticket, before and after the join.
#[test]
fn probes_are_answered_at_their_ticket() {
    let target = open(&storage(14)).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let welcome = source.welcome.clone().expect("welcomed");
    assert_eq!((welcome.empty.len(), welcome.joined.len(), welcome.tail), (1, 0, None));
    let (old, new) = (vec![1u8; 4096], vec![2u8; 4096]);
    let round = |source: &mut Source, world: &mut Clocked<'_, _>, before: &[u8]| {
        let ops = [
            Op::Probe(0, 8, before.to_vec()),
            Op::ProbeZero(0, 128, 300),
            Op::Write(0, 8, new.clone()),
            Op::Probe(0, 8, before.to_vec()),
            Op::Probe(0, 8, new.clone()),
            Op::Write(0, 256, old.clone()),
            Op::ProbeZero(0, 128, 300),
            Op::Zero(0, 256, 8),
            Op::Write(0, 8, before.to_vec()),
        ];
        let sent = source.batch(&ops, None);
        source.answers.clear();
        source.send(world, &sent.bytes);
        let answers: Vec<_> = source.answers.iter().flat_map(|answers| &answers.results).copied().collect();
        let told: Vec<_> = answers.iter().map(|answer| (answer.offset / 512, answer.len / 512, answer.equal)).collect();
        assert_eq!(told, [(8, 8, true), (128, 300, true), (8, 8, false), (8, 8, true), (256, 128, false)]);
        assert!(answers.windows(2).all(|pair| pair[0].position < pair[1].position));
    };
    source.send_together(&mut world, &[]);
    let first = source.batch(&[Op::Write(0, 8, old.clone())], None);
    source.send(&mut world, &first.bytes);
    round(&mut source, &mut world, &old);
    source.join_all(&mut world);
    round(&mut source, &mut world, &old);
    let stream = target.stream(&name("db"), None).expect("made");
    assert_point(&stream, source.sent.last().expect("sent"));
}

/// Goal: no cut is recoverable while an event is open or nothing has joined; bookmarks and specs lead to their points.
#[test]
fn points_follow_events_and_joins() {
    let (target, mut source, mut rng) = started(15);
    let mut world = Clocked::new(&target);
    let ops = source.random_ops(&mut rng, 2);
    let marked = source.batch(&ops, Some("before-upgrade"));
    source.send(&mut world, &marked.bytes);
    let during = source.batch(&[Op::Mark(Kind::EventBegin, 0)], None);
    source.send(&mut world, &during.bytes);
    let stream = target.stream(&name("db"), None).expect("made");
    let newest = |stream: &crate::group::GroupHost<_>| resolve_point(stream, &PointSpec::Latest).expect("one").id;
    assert_eq!(newest(&stream), marked.point);
    assert!(stream.check_point(&during.point).is_err() && stream.check_point(&source.sent[0].point).is_err());
    let after = source.batch(&[Op::Mark(Kind::EventEnd, 0), Op::Mark(Kind::VolumeLeft, 1)], None);
    source.send(&mut world, &after.bytes);
    assert_eq!(newest(&stream), after.point);
    assert_eq!(stream.check_point(&after.point).expect("recoverable").volumes.len(), 1);
    let named: PointSpec = "bookmark:before-upgrade".parse().expect("a spec");
    assert_eq!(resolve_point(&stream, &named).expect("kept").id, marked.point);
    let listed = target.points(&name("db"), None, None).expect("a group");
    assert!(listed.iter().any(|info| info.point.bookmark == Some(name("before-upgrade"))));
    // A volume that left goes on being journaled: older points still show what it had.
    source.step(&mut world, &mut rng, 8);
    assert_point(&stream, &marked);
}

/// Goal: a reference is taken only under a lease, leads to the right bytes, also after a restart, and pins its segment.
#[test]
fn references_are_honoured_under_a_lease_only() {
    let disk = storage(16);
    let target = open(&disk).expect("a good disk");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    source.join_all(&mut world);
    let contents: Vec<Vec<u8>> = (0..300u32).map(|n| n.to_le_bytes().repeat(128)).collect();
    let writes: Vec<Op> = (0u64..).zip(&contents).map(|(at, bytes)| Op::Write(0, at, bytes.clone())).collect();
    let sent = source.batch(&writes, None);
    source.send(&mut world, &sent.bytes);
    let honest = source.sent.clone();
    let refer = [Op::Refer(0, 900, contents[5].clone())];
    let early = source.batch(&refer, None);
    source.send(&mut world, &early.bytes);
    assert_eq!(refusal(&source), RefuseCode::Unavailable, "nothing was checked yet");
    source.sent = honest;

    let stream = target.stream(&name("db"), None).expect("made");
    let mut checker = Checker::new(std::sync::Arc::clone(&stream));
    while checker.step().expect("a good disk") == Progress::Worked {}
    assert_eq!(stream.checked(), sent.number);
    source.connect(&mut world);
    world.pass(Duration::from_secs(3));
    source.talk(&mut world);
    let lease = source.lease.clone().expect("granted");
    assert!(lease.ids.contains(&source.id_of(&contents[5])) && lease.through > sent.number);
    source.sent.push(early.clone());
    source.send(&mut world, &early.bytes);
    assert_eq!(source.acked, early.number);
    assert_point(&stream, &early);
    // Segments roll on; the one referred to stays while the batch that refers to it does.
    let mut rng = SimRng::new(1);
    for _ in 0..40 {
        source.step(&mut world, &mut rng, 8);
    }
    let sealed: Vec<_> = stream.segments.list().into_iter().filter(|segment| segment.sealed).collect();
    assert!(sealed.len() >= 3, "{}", sealed.len());
    let holder = sealed.iter().find(|segment| segment.last >= sent.number).expect("sealed").number;
    assert!(!stream.segments.droppable(BatchNo(0)).contains(&holder));
    drop(stream);
    drop(target);
    let target = open(&disk).expect("opens again");
    let stream = target.stream(&name("db"), None).expect("kept");
    source.sent[1..].iter().for_each(|sent| assert_point(&stream, sent));
}

/// Goal: data folders that are not ours are refused with the reason.
#[test]
fn foreign_folders_are_refused() {
    use crate::error::Kind::Foreign;
    use crate::keys::TargetKeys;
    use crate::target::TargetConfig;
    use farshore_proto::keys::VaultKey;
    use farshore_proto::{KeyEpoch, VaultId};
    use farshore_uring::{Storage, replace_file};

    let disk = storage(17);
    drop(open(&disk).expect("a good disk"));
    let other = TargetKeys::new(VaultId([0x22; 16]), [(KeyEpoch(1), VaultKey::new([7; 32]))]).expect("one key");
    let error = Target::open(disk.clone(), other, TargetConfig::default()).err().expect("refused");
    assert!(error.kind() == Foreign && error.to_string().contains("belongs to vault 1111"), "{error}");
    replace_file(&disk, std::path::Path::new("holiday.jpg"), b"x").expect("a good disk");
    let error = open(&disk).err().expect("refused");
    assert!(error.kind() == Foreign && error.to_string().contains("holiday.jpg"), "{error}");
    let fresh = storage(18);
    fresh.create_dir_all(std::path::Path::new("groups")).expect("a good disk");
    let error = open(&fresh).err().expect("refused");
    assert_eq!(error.kind(), Foreign, "{error}");
}

/// Goal: one host cannot fill the catalog with groups of its own making.
#[test]
fn a_host_owns_only_so_many_groups() {
    let target = open(&storage(19)).expect("a good disk");
    let mut world = Clocked::new(&target);
    let mut refused = 0;
    for number in 0..66 {
        let mut source = Source::new(&format!("g{number}"), "host-a", 1);
        source.link = 1000 + number;
        source.connect(&mut world);
        refused += u32::from(source.refused.is_some_and(|(code, _)| code == RefuseCode::NotAMember));
    }
    assert_eq!((refused, target.groups().len()), (2, 64));
}

/// Goal: after a rotation of the vault's key an agent with an older bundle is served as before, and so is one with the new
/// bundle; one whose key the target was not given is sent away with an alarm until the target has its new bundle.
#[test]
fn a_rotated_key_locks_nobody_out() {
    let vault_key = |epoch: u32| (KeyEpoch(epoch), VaultKey::new([6 + u8::try_from(epoch).expect("small"); 32]));
    let bundle = |epochs: std::ops::RangeInclusive<u32>| TargetKeys::new(VAULT, epochs.map(vault_key)).expect("keys");
    let key = |epoch| HostKey::derive(&vault_key(epoch).1, HostId::derive(VAULT, &name("host-a")), KeyEpoch(epoch));
    let disk = storage(31);
    let reopen = |epochs| Target::open(disk.clone(), bundle(epochs), CONFIG).expect("a good disk");
    let mut source = Source::with_key(VAULT, key(1), "db", "host-a", 1);
    let mut rng = SimRng::new(31);
    let mut go_on = |source: &mut Source, target: &Target<SimStorage>, connects: bool| {
        let mut world = Clocked::new(target);
        source.connect(&mut world);
        assert_eq!(source.welcome.is_some(), connects, "{:?}", source.closed);
        if connects {
            let sent = source.step(&mut world, &mut rng, 4);
            assert_eq!(source.acked, sent.number);
        }
    };
    {
        let target = reopen(1..=1);
        go_on(&mut source, &target, true);
        source.join_all(&mut Clocked::new(&target));
    }
    go_on(&mut source, &reopen(1..=2), true);
    source.use_key(key(2));
    go_on(&mut source, &reopen(1..=2), true);
    source.use_key(key(3));
    {
        let target = reopen(1..=2);
        go_on(&mut source, &target, false);
        assert!(source.closed.as_ref().is_some_and(|why| why.contains("epoch 3")), "{:?}", source.closed);
        assert!(target.alarms().is_raised(AlarmCode::KeyUnknown, "host-a"));
        source.use_key(key(2));
        go_on(&mut source, &target, true);
        assert!(!target.alarms().is_raised(AlarmCode::KeyUnknown, "host-a"));
    }
    source.use_key(key(3));
    let target = reopen(1..=3);
    go_on(&mut source, &target, true);
    let stream = target.stream(&name("db"), None).expect("open");
    source.sent.iter().filter(|sent| !sent.joined.is_empty()).for_each(|sent| assert_point(&stream, sent));
}
