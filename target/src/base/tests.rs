use farshore_uring::sim::{SimRng, SimStorage, World, is_crash};

use super::*;

const SIZE: u64 = 9 * SLOT_BYTES + 4096;

fn decl(size: u64) -> VolumeDecl {
    VolumeDecl { index: VolumeIndex(2), name: Name::new("vol").expect("a name"), size, block: 512 }
}

fn open(storage: &SimStorage) -> Result<Base<SimStorage>> {
    open_at(storage, None)
}

/// On the device at the path, or in a file.
fn open_at(storage: &SimStorage, device: Option<&Path>) -> Result<Base<SimStorage>> {
    let (folder, decl) = (PathBuf::from("base"), decl(SIZE));
    let Some(path) = device else { return Base::open_or_create(storage.clone(), folder, &decl) };
    let device = storage.open_device(path).at("open", path)?;
    Base::open_on_device(storage.clone(), folder, &decl, device, path)
}

fn crashed(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    source.is_some_and(is_crash)
}

/// One random change; the model follows.
fn change(base: &Base<SimStorage>, rng: &mut SimRng, model: &mut [u8]) -> Result<()> {
    let first = rng.below(SIZE / 512);
    let most = if rng.chance(1, 4) { 600 } else { 40 };
    let count = 1 + rng.below((SIZE / 512 - first).min(most));
    let (offset, len) = (first * 512, count * 512);
    let range = usize::try_from(offset).expect("small")..usize::try_from(offset + len).expect("small");
    if rng.chance(1, 4) {
        model[range].fill(0);
        return base.zero_unjoined(offset, len);
    }
    let mut bytes = vec![0; range.len()];
    rng.fill(&mut bytes);
    model[range].copy_from_slice(&bytes);
    base.write_unjoined(offset, &bytes)
}

fn read_all(base: &Base<SimStorage>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(SIZE).expect("small")];
    base.read(0, &mut bytes)?;
    Ok(bytes)
}

/// Goal: after a crash at any call every sector is as at the last flush or as written since, nothing reads as damaged, and what
/// is written again is there.
#[test]
fn crashes_leave_old_or_new_sectors() {
    (0..150).for_each(|seed| crash_and_look(seed, None));
}

/// Goal: the same on a device, which is larger than the volume.
#[test]
fn crashes_on_a_device_leave_old_or_new_sectors() {
    (0..150).for_each(|seed| crash_and_look(seed, Some(Path::new("/dev/sda"))));
}

fn crash_and_look(seed: u64, device: Option<&Path>) {
    let open = |storage: &SimStorage| open_at(storage, device);
    {
        let mut world = World::new(seed);
        let storage = world.storage();
        storage.add_device(Path::new("/dev/sda"), SIZE + 12_288, "A");
        let mut rng = world.rng().fork();
        let mut model = vec![0u8; usize::try_from(SIZE).expect("small")];
        let mut versions = vec![model.clone()];
        storage.crash_at(Some(rng.below(400)));
        let run = |model: &mut Vec<u8>, versions: &mut Vec<Vec<u8>>, rng: &mut SimRng| -> Result<()> {
            let base = open(&storage)?;
            for _ in 0..60 {
                versions.push(model.clone());
                let mut next = model.clone();
                let done = change(&base, rng, &mut next);
                model.clone_from(&next);
                versions.push(next);
                done?;
                if rng.chance(1, 6) {
                    base.flush()?;
                    versions.clear();
                    versions.push(model.clone());
                }
                assert_eq!(read_all(&base)?, *model, "seed {seed}, alive");
            }
            Ok(())
        };
        if let Err(error) = run(&mut model, &mut versions, &mut rng) {
            assert!(crashed(&error), "seed {seed}: {error}");
        }
        let storage = storage.crash(&mut rng);
        let base = open(&storage).expect("opens after a crash");
        let found = read_all(&base).expect("nothing reads as damaged");
        for (sector, bytes) in found.chunks(512).enumerate() {
            let range = sector * 512..sector * 512 + bytes.len();
            assert!(versions.iter().any(|version| version[range.clone()] == *bytes), "seed {seed}, sector {sector}");
        }
        let mut model = found;
        for _ in 0..20 {
            change(&base, &mut rng, &mut model).expect("no crash any more");
        }
        base.flush().expect("no crash any more");
        let whole: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at % 251).expect("small")).collect();
        assert_eq!(read_all(&open(&storage.crash(&mut rng)).expect("opens")).expect("no damage"), model, "seed {seed}");
        // Everything written anew: no slot is unknown any more.
        let base = open(&storage.crash(&mut rng)).expect("opens");
        base.write_unjoined(0, &whole).expect("no crash any more");
        base.flush().expect("no crash any more");
        assert_eq!(base.verify().expect("reads"), [], "seed {seed}");
        assert_eq!(read_all(&base).expect("no damage"), whole);
    }
}

/// Goal: nor does a disk that fails now and then leave anything that reads as damaged, wherever it goes down or the process dies. Method: a failed change is
/// tried again, over a base opened anew where a sync has failed; in between, and at the end, the power goes.
#[test]
fn errors_and_crashes_leave_old_or_new_sectors() {
    for seed in 0..300 {
        let mut world = World::new(seed);
        let mut rng = world.rng().fork();
        let mut storage = world.storage();
        let mut base = open(&storage).expect("no faults yet");
        let mut model = vec![0u8; usize::try_from(SIZE).expect("small")];
        let mut versions = vec![model.clone()];
        for _ in 0..40 {
            let (rate, mut faults, full) = (rng.below(250), rng.fork(), rng.chance(1, 4));
            storage.set_fault(move |_, _| {
                faults.chance(rate, 1000).then(|| std::io::Error::from_raw_os_error(if full { 28 } else { 5 }))
            });
            versions.push(model.clone());
            let before = rng.clone();
            let mut next = model.clone();
            let mut done = change(&base, &mut rng, &mut next);
            versions.push(next.clone());
            for _ in 0..rng.below(8) {
                if done.is_ok() {
                    break;
                }
                done = change(&base, &mut before.clone(), &mut next);
            }
            let flushed = done.is_ok() && rng.chance(1, 3) && base.flush().is_ok();
            storage.clear_fault();
            let again = done.is_err() || base.flush().is_err() || rng.chance(1, 4);
            if again {
                // The process ends, or the power goes.
                drop(base);
                if rng.chance(1, 2) {
                    storage = storage.crash(&mut rng);
                }
                base = open(&storage).expect("opens");
            }
            let found = read_all(&base).expect("nothing reads as damaged");
            for (sector, bytes) in found.chunks(512).enumerate() {
                let range = sector * 512..sector * 512 + bytes.len();
                let known = versions.iter().any(|version| version[range.clone()] == *bytes);
                assert!(known && (!flushed || next[range] == *bytes), "seed {seed}, sector {sector}");
            }
            base.flush().expect("no faults");
            (model, versions) = (found.clone(), vec![found]);
        }
    }
}

/// Goal: a slot that is damaged can be changed in part, stays damaged, also when its bytes come back, and is sound when all of it was written.
#[test]
fn a_damaged_slot_stays_so_until_it_is_written_whole() {
    let storage = World::new(6).storage();
    let base = open(&storage).expect("no faults");
    base.write_unjoined(0, &[1; 65536 * 3]).expect("no faults");
    base.flush().expect("no faults");
    let data = Path::new("base/v2.raw");
    storage.corrupt(data, 65536 + 9, 4).expect("it is there");
    assert_eq!(base.broken(), None);
    base.write_unjoined(65536 - 512, &[2; 1024]).expect("its neighbour takes it");
    let mut bytes = [0; 512];
    for flushed in [false, true] {
        assert_eq!(base.read(65536, &mut bytes).expect_err("not as it was written").kind(), Kind::Damaged, "{flushed}");
        base.flush().expect("no faults");
    }
    let text = base.broken().expect("it is said");
    assert!(text.contains("65536..131072"), "{text}");
    base.read(65536 - 512, &mut bytes).expect("its neighbour is sound");
    assert_eq!(bytes, [2; 512]);
    drop(base);
    storage.corrupt(data, 65536 + 9, 4).expect("the byte is right again");
    let base = open(&storage).expect("no faults");
    let error = base.read(65536, &mut bytes).expect_err("it lacks what was written");
    assert!(error.kind() == Kind::Damaged && error.context().contains("changed in part"), "{error}");
    assert_eq!(base.verify().expect("reads").len(), 1);
    base.write_unjoined(65536 + 512, &[3; 512]).expect("once more");
    assert!(base.broken().is_some());
    base.write_unjoined(65536, &[4; 65536]).expect("no faults");
    base.flush().expect("no faults");
    assert_eq!((base.broken(), base.verify().expect("reads")), (None, Vec::new()));
    base.read(65536 * 2 - 512, &mut bytes).expect("sound");
    assert_eq!(bytes, [4; 512]);
    storage.corrupt(data, 65536 + 9, 4).expect("it is there");
    base.zero_unjoined(65536 + 512, 65536).expect("begins in the slot");
    base.flush().expect("no faults");
    assert!(base.broken().is_some(), "zeroes in part are no better");
    base.zero_unjoined(65536, 65536).expect("no faults");
    assert_eq!((base.broken(), base.verify().expect("reads")), (None, Vec::new()));
}

#[test]
fn zeroes_become_holes() {
    let storage = World::new(1).storage();
    let base = Base::open_or_create(storage.clone(), PathBuf::from("base"), &decl(1 << 40)).expect("no faults");
    assert!(base.holds_nothing().expect("no faults"));
    base.zero_unjoined(0, 1 << 40).expect("costs nothing");
    base.write_unjoined(1 << 35, &[1; 8192]).expect("no faults");
    assert_eq!(base.next_data(5).expect("no faults"), Some(1 << 35), "before the flush");
    base.flush().expect("no faults");
    let next = base.next_data(5).expect("no faults");
    assert_eq!(next, Some(1 << 35));
    base.write_unjoined((1 << 35) + 4096, &[0; 4096]).expect("no faults");
    base.write_unjoined(1 << 35, &[0; 4096]).expect("no faults");
    base.flush().expect("no faults");
    assert!(base.holds_nothing().expect("no faults"), "a slot that became zero is a hole");
    base.write_unjoined(4096, &[3; 512]).expect("no faults");
    base.write_unjoined((1 << 40) - 512, &[4; 512]).expect("no faults");
    base.flush().expect("no faults");
    base.zero_unjoined(512, (1 << 40) - 512).expect("no faults");
    base.flush().expect("no faults");
    assert!(base.holds_nothing().expect("no faults"));
    assert_eq!(base.verify().expect("no faults"), []);
}

#[test]
fn volumes_grow_and_keep_their_bytes() {
    let storage = World::new(2).storage();
    let base = open(&storage).expect("no faults");
    base.write_unjoined(SIZE - 512, &[5; 512]).expect("no faults");
    base.flush().expect("no faults");
    drop(base);
    let base = Base::open_or_create(storage, PathBuf::from("base"), &decl(SIZE - 512)).expect("a volume that shrank");
    assert_eq!(base.size(), SIZE);
    let mut bytes = [0; 512];
    base.read(SIZE - 512, &mut bytes).expect("still there");
    assert_eq!(bytes, [5; 512]);
    assert_eq!(base.read(SIZE, &mut bytes).expect_err("beyond the end").kind(), Kind::Invalid);
    assert_eq!(base.write_unjoined(u64::MAX, &bytes).expect_err("beyond the end").kind(), Kind::Invalid);
}

/// Goal: growing changes the length of the last slot, which has a hash of its own length.
#[test]
fn growth_within_the_last_slot_is_no_damage() {
    let storage = World::new(9).storage();
    let base = open(&storage).expect("no faults");
    base.write_unjoined(SIZE - 512, &[5; 512]).expect("no faults");
    base.flush().expect("no faults");
    drop(base);
    let base = Base::open_or_create(storage, PathBuf::from("base"), &decl(SIZE + 8192)).expect("a volume that grew");
    let mut bytes = [0; 8704];
    base.read(SIZE - 512, &mut bytes).expect("no damage");
    assert!(bytes[..512] == [5; 512] && bytes[512..].iter().all(|&byte| byte == 0));
    assert_eq!(base.verify().expect("reads"), []);
}

#[test]
fn missing_hashes_are_refused() {
    let storage = World::new(3).storage();
    let base = open(&storage).expect("no faults");
    base.write_unjoined(0, &[1; 512]).expect("no faults");
    base.flush().expect("no faults");
    drop(base);
    storage.remove(Path::new("base/v2.hashes")).expect("it is there");
    assert_eq!(open(&storage).err().expect("data without hashes").kind(), Kind::Damaged);
}

/// Goal: where nothing is stored, a range of zeroes costs no sync, also while other slots wait; where something waits or is stored, the
/// zeroes win. Method: a disk whose syncs fail for as long as there must be none.
#[test]
fn zeroes_where_nothing_is_cost_no_sync() {
    let storage = World::new(5).storage();
    let base = open(&storage).expect("no faults");
    storage
        .set_fault(|op, _| (op == farshore_uring::sim::StorageOp::Sync).then(|| std::io::Error::from_raw_os_error(5)));
    for slot in [1, 3, 5] {
        base.write_unjoined(slot * SLOT_BYTES, &[7; 65536]).expect("in memory");
        base.zero_unjoined((slot + 1) * SLOT_BYTES, SLOT_BYTES).expect("nothing is synced");
    }
    storage.clear_fault();
    base.zero_unjoined(SLOT_BYTES, SLOT_BYTES).expect("it waits");
    base.flush().expect("no faults");
    base.zero_unjoined(3 * SLOT_BYTES, SLOT_BYTES).expect("it is stored");
    let base = open(&storage).expect("no faults");
    let all = read_all(&base).expect("no damage");
    let full: Vec<usize> = (0..).zip(all.chunks(65536)).filter(|(_, slot)| slot[0] == 7).map(|(at, _)| at).collect();
    assert_eq!(full, [5]);
    assert!(all.iter().filter(|byte| **byte != 0).count() == 65536, "the rest is zero");
}

/// Goal: no room leaves the base as it was, and the write can be done again; a failed sync stops writing.
#[test]
fn full_disks_and_failed_syncs() {
    let storage = World::new(4).storage();
    let base = open(&storage).expect("no faults");
    base.write_unjoined(0, &[1; 65536]).expect("no faults");
    base.flush().expect("no faults");
    storage.fail_after(1, 28);
    base.write_unjoined(65536, &[2; 65536]).expect("in memory");
    assert_eq!(base.flush().expect_err("no room").kind(), Kind::NoSpace);
    storage.clear_fault();
    base.flush().expect("there is room again");
    let mut bytes = [0; 4];
    base.read(65536, &mut bytes).expect("no damage");
    assert_eq!(bytes, [2; 4]);
    base.write_unjoined(0, &[3; 512]).expect("in memory");
    storage
        .set_fault(|op, _| (op == farshore_uring::sim::StorageOp::Sync).then(|| std::io::Error::from_raw_os_error(5)));
    assert_eq!(base.flush().expect_err("sync fails").kind(), Kind::Storage);
    storage.clear_fault();
    let error = base.flush().expect_err("what is durable is unknown");
    assert!(error.context().contains("no more writes"), "{error}");
    base.read(65536, &mut bytes).expect("reads go on");
}
