use farshore_proto::batch::VolumeDecl;
use farshore_uring::sim::{SimRng, SimStorage};
use farshore_uring::{DirStorage, OpenMode};

use super::*;
use crate::tests::source::{Clocked, Op, Source, VOLUME_BYTES, name};
use crate::tests::{assert_point, open, storage};

const DEVICE: &str = "/dev/sda";
const SIZE: u64 = VOLUME_BYTES + (3 << 20);

fn order(volume: &str, path: &str, overwrite: bool) -> AttachBase {
    AttachBase { group: name("db"), host: None, volume: name(volume), path: path.into(), overwrite }
}

/// A target that knows the group, and one device.
fn with_device(seed: u64) -> (SimStorage, Target<SimStorage>) {
    let disk = storage(seed);
    disk.add_device(Path::new(DEVICE), SIZE, "A");
    let target = open(&disk).expect("a good disk");
    target.add_member(&name("db"), &name("host-a")).expect("a new group");
    (disk, target)
}

fn fill<S: Storage>(storage: &S, path: &str, at: u64, bytes: &[u8]) {
    let device = storage.open_device(Path::new(path)).expect("free");
    device.file.write_at(bytes, at).expect("inside");
    device.file.sync().expect("a good disk");
}

fn refused(result: Result<BaseDevice>, text: &str) {
    let error = result.expect_err(text);
    assert!(error.kind() == Kind::Refused && error.to_string().contains(text), "{text:?}: {error}");
}

/// Initial sync, joining, writes, and the move of the base; every point is read.
fn replicate<S: Storage>(target: &Target<S>, seed: u64) -> Source {
    let mut source = Source::new("db", "host-a", 2);
    let mut rng = SimRng::new(seed);
    let mut world = Clocked::new(target);
    source.connect(&mut world);
    assert_eq!(source.refused, None);
    source.step(&mut world, &mut rng, 20);
    source.join_all(&mut world);
    for _ in 0..6 {
        source.step(&mut world, &mut rng, 8);
    }
    assert_eq!(source.acked, source.sent.last().expect("sent").number);
    check(target, &source);
    source
}

fn check<S: Storage>(target: &Target<S>, source: &Source) {
    let stream = target.stream(&name("db"), None).expect("open");
    for sent in source.sent.iter().filter(|sent| !sent.joined.is_empty()) {
        if stream.check_point(&sent.point).is_ok() {
            assert_point(&*stream, sent);
        }
    }
    assert_point(&*stream, source.sent.last().expect("sent"));
}

/// Moves the base as far as it goes; then the base alone holds the newest point.
fn move_base<S: Storage>(target: &Target<S>, source: &Source) {
    let stream = target.stream(&name("db"), None).expect("open");
    target.catalog().set_policy(&name("db"), "keep", Some("1s")).expect("a good disk");
    let mut mover = crate::retention::Mover::new(Arc::clone(&stream));
    while mover.step(farshore_proto::WallTime(1 << 60)).expect("a good disk") != crate::retention::Step::Idle {}
    let last = source.sent.last().expect("sent");
    assert_eq!(stream.record().horizon, Some(last.point));
    for (volume, base) in stream.bases() {
        let mut found = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
        base.read(0, &mut found).expect("no damage");
        assert!(found == last.content[&volume.0], "base of volume {volume}");
        assert_eq!(base.verify().expect("reads"), []);
    }
}

/// Goal: a volume's base is on the device that was named for it, from initial sync to moves of the horizon and over a
/// restart; the volume beside it has a file.
#[test]
fn a_volume_lives_on_its_device() {
    let (disk, target) = with_device(1);
    let mut seen = 0;
    let made = target.attach_base(&order("vol1", DEVICE, false), |progress| seen = progress.position);
    assert_eq!((made.expect("blank").size, seen), (SIZE, SIZE));
    let source = replicate(&target, 1);
    assert!(!disk.exists(Path::new("groups/db/host-a/base/v1.raw")).expect("a good disk"));
    assert!(disk.exists(Path::new("groups/db/host-a/base/v0.raw")).expect("a good disk"));
    assert_eq!(disk.open_device(Path::new(DEVICE)).err().map(|error| error.kind()), Some(io::ErrorKind::ResourceBusy));
    move_base(&target, &source);
    drop(target);
    let mut raw = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
    disk.open_device(Path::new(DEVICE)).expect("let go").file.read_at(&mut raw, 0).expect("a good disk");
    assert!(raw == source.content[&1], "the device holds the volume's bytes as they are");
    let target = open(&disk).expect("opens again");
    assert_eq!(target.broken().len(), 0);
    check(&target, &source);
}

/// Goal: what is precious is not overwritten, and one device carries one base.
#[test]
fn foreign_and_used_devices_are_refused() {
    let (disk, target) = with_device(2);
    // An ext4 superblock, a Btrfs one, a backup of a partition table.
    for at in [1080, (64 << 10) + 64, SIZE - 512] {
        fill(&disk, DEVICE, at, &[0x53, 0xef]);
        refused(target.attach_base(&order("vol0", DEVICE, false), |_| {}), "is not blank");
        fill(&disk, DEVICE, at, &[0; 2]);
    }
    fill(&disk, DEVICE, 4096, b"old");
    fill(&disk, DEVICE, SIZE / 2, b"older");
    target.attach_base(&order("vol0", DEVICE, true), |_| {}).expect("told so");
    let mut raw = vec![1; usize::try_from(SIZE).expect("small")];
    disk.open_device(Path::new(DEVICE)).expect("free").file.read_at(&mut raw, 0).expect("a good disk");
    assert!(is_zero(&raw), "all of it is zero");
    refused(target.attach_base(&order("vol1", DEVICE, true), |_| {}), "is the base of volume vol0");
    let held = disk.open_device(Path::new(DEVICE)).expect("free");
    refused(target.attach_base(&order("vol0", DEVICE, true), |_| {}), "is in use");
    drop(held);
    let missing = target.attach_base(&order("vol1", "/dev/none", true), |_| {}).expect_err("is not there");
    assert_eq!(missing.kind(), Kind::NotFound);
    assert_eq!(target.attach_base(&order("vol1", "sda", true), |_| {}).expect_err("relative").kind(), Kind::Invalid);
    target.detach_base(&name("db"), None, &name("vol0")).expect("not brought yet");
    target.attach_base(&order("vol1", DEVICE, false), |_| {}).expect("free again, and blank");
    replicate(&target, 2);
    disk.add_device(Path::new("/dev/sdb"), SIZE, "B");
    refused(target.attach_base(&order("vol0", "/dev/sdb", false), |_| {}), "in a file");
    let error = target.detach_base(&name("db"), None, &name("vol1")).expect_err("history needs it");
    assert_eq!(error.kind(), Kind::Refused);
}

/// Goal: a device that is too small, written to since, or missing stops nothing and loses nothing: the source is refused
/// with the reason and an alarm, and goes on when it is mended.
#[test]
fn a_bad_device_refuses_the_source_until_it_is_mended() {
    let disk = storage(3);
    disk.add_device(Path::new(DEVICE), VOLUME_BYTES - 512, "A");
    disk.add_device(Path::new("/dev/sdb"), SIZE, "B");
    disk.add_device(Path::new("/dev/sdc"), SIZE, "C");
    let target = open(&disk).expect("a good disk");
    target.add_member(&name("db"), &name("host-a")).expect("a new group");
    // The volume before it has a good one, which is opened first each time.
    target.attach_base(&order("vol0", "/dev/sdc", false), |_| {}).expect("blank");
    target.attach_base(&order("vol1", DEVICE, false), |_| {}).expect("blank");
    let mut source = Source::new("db", "host-a", 2);
    let mut tries = |why: &str| {
        source.connect(&mut Clocked::new(&target));
        let refused = source.refused.clone().map(|(_, detail)| detail);
        assert!(refused.as_ref().is_some_and(|detail| detail.contains(why)), "{why:?}: {refused:?}");
        assert!(target.alarms().is_raised(AlarmCode::BaseFailed, "db/host-a"), "{why}");
    };
    tries("name one of at least that size");
    target.detach_base(&name("db"), None, &name("vol0")).expect("not brought yet");
    target.attach_base(&order("vol0", "/dev/sdc", false), |_| {}).expect("let go, and blank");
    target.attach_base(&order("vol1", "/dev/sdb", false), |_| {}).expect("blank");
    fill(&disk, "/dev/sdb", 1024, b"mkfs");
    tries("is not blank");
    fill(&disk, "/dev/sdb", 1024, &[0; 4]);
    let held = disk.open_device(Path::new("/dev/sdb")).expect("free");
    tries("is in use");
    drop(held);
    replicate(&target, 3);
    assert!(!target.alarms().is_raised(AlarmCode::BaseFailed, "db/host-a"));
}

/// Goal: another device at the path is noticed and not touched; the right one under another identity is taken after every
/// slot was compared.
#[test]
fn a_swapped_device_is_noticed() {
    let (disk, target) = with_device(4);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    let source = replicate(&target, 4);
    move_base(&target, &source);
    drop(target);
    let mut content = vec![0; usize::try_from(SIZE).expect("small")];
    disk.open_device(Path::new(DEVICE)).expect("let go").file.read_at(&mut content, 0).expect("a good disk");
    disk.add_device(Path::new(DEVICE), SIZE, "X");
    let target = open(&disk).expect("opens with what it has");
    let reason = target.broken().into_values().next().expect("the stream is left out");
    assert!(reason.contains("is not the one that holds the base"), "{reason}");
    assert!(target.alarms().is_raised(AlarmCode::StreamUnavailable, "db/host-a"));
    refused(target.attach_base(&order("vol0", DEVICE, true), |_| {}), "are not those of volume vol0");
    let mut blank = vec![1; content.len()];
    disk.open_device(Path::new(DEVICE)).expect("free").file.read_at(&mut blank, 0).expect("a good disk");
    assert!(is_zero(&blank), "nothing was written to it");
    content[70_000] ^= 1;
    fill(&disk, DEVICE, 0, &content);
    refused(target.attach_base(&order("vol0", DEVICE, false), |_| {}), "bytes 65536..131072 are not those");
    content[70_000] ^= 1;
    fill(&disk, DEVICE, 0, &content);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("the same content");
    assert_eq!(target.broken().len(), 0);
    assert!(!target.alarms().is_raised(AlarmCode::StreamUnavailable, "db/host-a"));
    check(&target, &source);
}

/// Goal: bytes that rotted on a device are found, also where a hole should be.
#[test]
fn damage_on_a_device_is_found() {
    let (disk, target) = with_device(5);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    let mut source = Source::new("db", "host-a", 1);
    let mut world = Clocked::new(&target);
    source.connect(&mut world);
    let first = source.batch(&[0, 1, 2].map(|slot| Op::Write(0, slot * 128, vec![7; 65536])), None);
    source.send(&mut world, &first.bytes);
    drop(target);
    fill(&disk, DEVICE, 100, &[8]);
    fill(&disk, DEVICE, 3 * 65536, &[9]);
    let target = open(&disk).expect("opens");
    let base = target.stream(&name("db"), None).expect("open").base(VolumeIndex(0)).expect("there");
    for slot in [0, 3] {
        let error = base.read(slot * 65536, &mut [0; 512]).expect_err("damaged");
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
    }
    let ranges: Vec<_> = base.verify().expect("reads").into_iter().map(|damage| damage.range.start).collect();
    assert_eq!(ranges, [0, 3 * 65536]);
}

/// Everything above on a real file system, with `device` as the device.
fn live_on(storage: DirStorage, device: &Path) {
    let path = device.to_str().expect("a plain path");
    let target =
        Target::open(storage.clone(), crate::tests::source::keys(), crate::tests::CONFIG).expect("a good disk");
    target.add_member(&name("db"), &name("host-a")).expect("a new group");
    target.attach_base(&order("vol1", path, true), |_| {}).expect("told to overwrite");
    let source = replicate(&target, 6);
    refused(target.attach_base(&order("vol0", path, true), |_| {}), "");
    move_base(&target, &source);
    drop(target);
    let target =
        Target::open(storage.clone(), crate::tests::source::keys(), crate::tests::CONFIG).expect("a good disk");
    assert_eq!(target.broken().len(), 0, "{:?}", target.broken());
    check(&target, &source);
    let base = target.stream(&name("db"), None).expect("open").base(VolumeIndex(1)).expect("there");
    base.zero(512, VOLUME_BYTES - 1024).expect("a good disk");
    base.flush().expect("a good disk");
    assert_eq!(base.verify().expect("reads"), []);
    drop((base, target));
    let mut raw = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
    let opened = storage.open_device(device).expect("let go");
    opened.file.read_at(&mut raw, 0).expect("a good disk");
    assert!(is_zero(&raw[512..raw.len() - 512]), "zeroed on the device");
}

/// Goal: the same through the real storage's device calls, a regular file standing for the device.
#[test]
fn a_file_stands_for_a_device() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let device = folder.path().join("device");
    std::fs::write(&device, vec![0xa5; usize::try_from(SIZE).expect("small")]).expect("a good disk");
    let data = folder.path().join("data");
    std::fs::create_dir(&data).expect("a good disk");
    let plain = DirStorage::open(&data).expect("a folder");
    let error = open_device(&plain, &device).expect_err("a regular file is no device");
    assert!(error.kind() == Kind::Refused && error.to_string().contains("is no block device"), "{error}");
    live_on(plain.with_files_as_devices(), &device);
}

/// Goal: the same on a real block device, which is overwritten. Method: `FARSHORE_TEST_DEVICE` names it.
#[test]
#[ignore = "overwrites the block device that FARSHORE_TEST_DEVICE names"]
fn a_real_device_carries_a_base() {
    let device = std::env::var_os("FARSHORE_TEST_DEVICE").expect("FARSHORE_TEST_DEVICE names a block device");
    let folder = tempfile::tempdir().expect("a temporary folder");
    live_on(DirStorage::open(folder.path()).expect("a folder"), Path::new(&device));
}

/// Goal: hashes whose data file is gone are damage, and not a base of zeroes.
#[test]
fn a_lost_data_file_is_damage() {
    let disk = storage(7);
    let decl = VolumeDecl { index: VolumeIndex(0), name: name("vol0"), size: 1 << 20, block: 512 };
    let open = || Base::open_or_create(disk.clone(), PathBuf::from("base"), &decl);
    drop(open().expect("a good disk"));
    disk.remove(Path::new("base/v0.raw")).expect("it is there");
    assert_eq!(open().err().map(|error| error.kind()), Some(Kind::Damaged));
    assert!(disk.open(Path::new("base/v0.raw"), OpenMode::Read).is_err(), "none was made in its place");
}

/// What is on a device that nobody has open.
fn content(disk: &SimStorage, path: &str) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).expect("small")];
    disk.open_device(Path::new(path)).expect("free").file.read_at(&mut bytes, 0).expect("a good disk");
    bytes
}

fn why_broken(target: &Target<SimStorage>) -> String {
    target.broken().into_values().next().expect("the stream is left out")
}

/// Goal: another device that has the noted identity (numbers given anew after a restart) is refused before recovery makes the
/// holes of the last intent on it.
#[test]
fn another_device_of_the_same_identity_is_not_touched() {
    let (disk, target) = with_device(8);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    replicate(&target, 8);
    let base = target.stream(&name("db"), None).expect("open").base(VolumeIndex(0)).expect("there");
    base.write(0, &vec![7; 3 * 65536]).expect("a good disk");
    base.zero(65536, VOLUME_BYTES - 65536).expect("a good disk");
    drop((base, target));
    let right = content(&disk, DEVICE);
    disk.add_device(Path::new(DEVICE), SIZE, "A");
    let foreign = vec![0xa5; right.len()];
    fill(&disk, DEVICE, 0, &foreign);
    let target = open(&disk).expect("opens with what it has");
    assert!(why_broken(&target).contains("1 of 1 slots looked at hold something else"), "{}", why_broken(&target));
    assert!(target.alarms().is_raised(AlarmCode::BaseFailed, "db/host-a"));
    assert!(content(&disk, DEVICE) == foreign, "nothing was written to it");
    fill(&disk, DEVICE, 0, &right);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("the right one");
    assert_eq!(target.broken().len(), 0);
    assert!(!target.alarms().is_raised(AlarmCode::BaseFailed, "db/host-a"));
}

/// Goal: an empty base takes no device with something on it, whether it has the noted identity or is attached anew.
#[test]
fn an_empty_base_takes_blank_devices_only() {
    let (disk, target) = with_device(9);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    let mut source = Source::new("db", "host-a", 1);
    source.connect(&mut Clocked::new(&target));
    assert_eq!(source.refused, None);
    drop(target);
    fill(&disk, DEVICE, 1080, &[0x53, 0xef]);
    let target = open(&disk).expect("opens with what it has");
    assert!(why_broken(&target).contains("the base is empty, and it is not blank"), "{}", why_broken(&target));
    // In the middle, where signatures are not looked for.
    disk.add_device(Path::new("/dev/sdb"), SIZE, "B");
    fill(&disk, "/dev/sdb", VOLUME_BYTES / 2, b"precious");
    refused(target.attach_base(&order("vol0", "/dev/sdb", false), |_| {}), "are not those of volume vol0");
    fill(&disk, "/dev/sdb", VOLUME_BYTES / 2, &[0; 8]);
    target.attach_base(&order("vol0", "/dev/sdb", false), |_| {}).expect("blank");
    assert_eq!(target.broken().len(), 0);
}

/// Goal: while a stream is open, its base's device is not changed under it.
#[test]
fn an_open_base_keeps_its_device() {
    let (disk, target) = with_device(10);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    let source = replicate(&target, 10);
    let base = target.stream(&name("db"), None).expect("open").base(VolumeIndex(0)).expect("there");
    let mut copy = vec![0; usize::try_from(VOLUME_BYTES).expect("small")];
    base.read(0, &mut copy).expect("no damage");
    drop(base);
    disk.add_device(Path::new("/dev/sdb"), SIZE, "B");
    fill(&disk, "/dev/sdb", 0, &copy);
    refused(
        target.attach_base(&order("vol0", "/dev/sdb", false), |_| {}),
        "its base is open on the device that it has",
    );
    drop(target);
    let target = open(&disk).expect("opens");
    assert_eq!(target.broken().len(), 0, "the device noted is the one written to");
    check(&target, &source);
}

/// Goal: a base that was there and is gone is damage, and not an empty base: in a file, on a device, and to a device attached.
#[test]
fn a_lost_base_is_not_made_anew() {
    let (disk, target) = with_device(11);
    target.attach_base(&order("vol1", DEVICE, false), |_| {}).expect("blank");
    replicate(&target, 11);
    drop(target);
    let base = Path::new("groups/db/host-a/base");
    let lost = |names: &[&str], disk: &SimStorage| {
        for name in names {
            disk.remove(&base.join(name)).expect("it is there");
        }
        let target = open(disk).expect("opens with what it has");
        assert!(why_broken(&target).contains("is missing, and with it"), "{}", why_broken(&target));
        assert!(!disk.exists(&base.join(names[0])).expect("a good disk"), "none was made in its place");
        target
    };
    lost(&["v0.hashes", "v0.raw", "v0.intent"], &disk.fork());
    disk.add_device(Path::new(DEVICE), SIZE, "A");
    let target = lost(&["v1.hashes", "v1.intent"], &disk);
    let error = target.attach_base(&order("vol1", DEVICE, false), |_| {}).expect_err("nothing to compare with");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
}

/// Goal: a device that a greeting began a base on, and that is detached then, leaves nothing that keeps the volume from a file.
#[test]
fn a_detached_volume_begins_in_a_file() {
    let (disk, target) = with_device(12);
    disk.add_device(Path::new("/dev/sdb"), VOLUME_BYTES - 512, "B");
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    target.attach_base(&order("vol1", "/dev/sdb", false), |_| {}).expect("blank");
    let mut source = Source::new("db", "host-a", 2);
    source.connect(&mut Clocked::new(&target));
    assert!(source.refused.is_some(), "the second one is too small");
    assert!(disk.exists(Path::new("groups/db/host-a/base/v0.hashes")).expect("a good disk"), "begun");
    for volume in ["vol0", "vol1"] {
        target.detach_base(&name("db"), None, &name(volume)).expect("not brought yet");
    }
    let source = replicate(&target, 12);
    drop(target);
    check(&open(&disk).expect("opens"), &source);
}

/// Goal: a stream whose device came late is opened when its source greets; tries grow rarer.
#[test]
fn a_late_device_opens_its_stream() {
    let (disk, target) = with_device(13);
    target.attach_base(&order("vol0", DEVICE, false), |_| {}).expect("blank");
    let mut source = replicate(&target, 13);
    drop(target);
    let held = disk.open_device(Path::new(DEVICE)).expect("let go");
    let target = open(&disk).expect("opens with what it has");
    let mut greet = || {
        source.connect(&mut Clocked::new(&target));
        source.refused.is_none()
    };
    assert!(why_broken(&target).contains("is in use") && !greet());
    drop(held);
    assert_eq!([greet(), greet()], [false, true], "the second greeting after a try is the next try");
    assert!(target.broken().is_empty() && !target.alarms().is_raised(AlarmCode::StreamUnavailable, "db/host-a"));
    check(&target, &source);
}
