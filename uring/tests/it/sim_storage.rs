//! Goal: the simulated file system keeps what was synced and nothing else for certain, at every crash point, and reports
//! faults as told. Method: small programs that note what they were promised, crashed at each of their calls.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use farshore_uring::sim::{SimRng, SimStorage, StorageOp, World, is_crash};
use farshore_uring::{OpenMode, Storage, StorageFile, replace_file};

fn path(text: &str) -> &Path {
    Path::new(text)
}

/// Replaces one file and appends to another; `promised` holds what was acknowledged.
fn program(storage: &SimStorage, promised: &mut (u8, u8)) -> io::Result<()> {
    storage.create_dir_all(path("dir"))?;
    let log = storage.open(path("dir/log"), OpenMode::CreateNew)?;
    storage.sync_dir(path("dir"))?;
    for round in 1..5u8 {
        replace_file(storage, path("dir/state"), &[round; 3000])?;
        promised.0 = round;
        log.write_at(&[round; 700], u64::from(round - 1) * 700)?;
        log.sync()?;
        promised.1 = round;
    }
    Ok(())
}

fn read_all(storage: &SimStorage, name: &str) -> io::Result<Option<Vec<u8>>> {
    if !storage.exists(path(name))? {
        return Ok(None);
    }
    let file = storage.open(path(name), OpenMode::Read)?;
    let mut bytes = vec![0; usize::try_from(file.len()?).expect("small")];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

#[test]
fn what_was_promised_survives_a_crash_at_every_call() -> io::Result<()> {
    let calls = {
        let storage = SimStorage::new(SimRng::new(0));
        program(&storage, &mut (0, 0))?;
        storage.op_count()
    };
    let mut unpromised = 0;
    for at in 0..calls {
        for seed in 0..30 {
            let mut world = World::new(seed);
            let storage = world.storage();
            storage.crash_at(Some(at));
            let mut promised = (0, 0);
            let error = program(&storage, &mut promised).expect_err("crashed");
            assert!(is_crash(&error), "{error}");
            assert!(is_crash(&storage.exists(path("dir")).expect_err("all later calls, too")));
            let old = storage.clone();
            let storage = storage.crash(world.rng());
            assert!(is_crash(&old.exists(path("dir")).expect_err("an older life")));

            let state = read_all(&storage, "dir/state")?;
            let round = state.as_ref().map_or(0, |bytes| bytes[0]);
            assert!(
                round == promised.0 || round == promised.0 + 1,
                "call {at}, seed {seed}: {round} after {promised:?}"
            );
            if let Some(state) = state {
                assert!(state == [round; 3000], "never a mixture");
            }
            unpromised += u32::from(round > promised.0);
            if promised.1 > 0 {
                let log = read_all(&storage, "dir/log")?.expect("its name was synced");
                for round in 1..=promised.1 {
                    let start = usize::from(round - 1) * 700;
                    assert!(log[start..start + 700].iter().all(|&byte| byte == round), "call {at}, seed {seed}");
                }
            }
        }
    }
    assert!(unpromised > 0, "a crash sometimes comes after the effect");
    Ok(())
}

#[test]
fn without_the_sync_of_the_folder_a_name_may_vanish_and_without_the_sync_of_the_file_its_bytes() -> io::Result<()> {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let mut world = World::new(seed);
        let storage = world.storage();
        let file = storage.open(path("file"), OpenMode::CreateNew)?;
        file.write_at(&[1; 1024], 0)?;
        if seed % 2 == 0 {
            file.sync()?;
        } else {
            storage.sync_dir(path(""))?;
        }
        let after = read_all(&storage.crash(world.rng()), "file")?;
        seen.insert((seed % 2, after.map(|bytes| bytes.iter().filter(|&&byte| byte == 1).count())));
    }
    assert!(seen.contains(&(0, None)) && seen.contains(&(0, Some(1024))) && !seen.contains(&(0, Some(512))));
    assert!(seen.contains(&(1, Some(0))) && seen.contains(&(1, Some(512))) && seen.contains(&(1, Some(1024))));
    assert!(!seen.contains(&(1, None)));
    Ok(())
}

#[test]
fn a_rename_is_whole_or_absent_and_removed_names_may_come_back() -> io::Result<()> {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let mut world = World::new(seed);
        let storage = world.storage();
        storage.create_dir_all(path("d"))?;
        for name in ["a", "d/b", "c"] {
            storage.open(path(name), OpenMode::CreateNew)?.write_sync_at(name.as_bytes(), 0)?;
        }
        storage.sync_dir(path(""))?;
        storage.sync_dir(path("d"))?;
        storage.rename(path("a"), path("d/b"))?;
        storage.remove(path("c"))?;
        let after = storage.crash(world.rng());
        let (from, to) = (read_all(&after, "a")?, read_all(&after, "d/b")?.expect("always one of the two"));
        match from {
            Some(from) => assert!(from == *b"a" && to == *b"d/b"),
            None => assert_eq!(to, b"a"),
        }
        seen.insert((after.exists(path("a"))?, after.exists(path("c"))?));
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
    Ok(())
}

#[test]
fn a_fork_goes_its_own_way_and_the_same_seed_gives_the_same_crash() -> io::Result<()> {
    for seed in 0..50 {
        let mut world = World::new(seed);
        let storage = world.storage();
        let mut promised = (0, 0);
        storage.crash_at(Some(17));
        program(&storage, &mut promised).expect_err("crashed");
        let copy = storage.fork();
        assert!(copy.exists(path("dir"))?, "a fork has no faults");
        let rng = world.rng().clone();
        let (one, two) = (storage.crash(&mut rng.clone()), copy.crash(&mut rng.clone()));
        assert_eq!(one.list(path("dir"))?, two.list(path("dir"))?);
        for name in one.list(path("dir"))? {
            let name = PathBuf::from("dir").join(name);
            let name = name.to_str().expect("ASCII");
            assert!(read_all(&one, name)? == read_all(&two, name)?, "seed {seed}");
        }
    }
    Ok(())
}

#[test]
fn faults_hit_the_call_they_were_meant_for() -> io::Result<()> {
    let storage = SimStorage::new(SimRng::new(3));
    let file = storage.open(path("file"), OpenMode::CreateNew)?;
    storage.fail_at(storage.op_count() + 1, libc::EIO);
    file.write_at(b"one", 0)?;
    assert_eq!(file.sync().expect_err("told to").raw_os_error(), Some(libc::EIO));
    file.sync()?;

    storage.fail_after(1, libc::ENOSPC);
    file.write_at(b"two", 0)?;
    for _ in 0..3 {
        assert_eq!(file.write_at(b"three", 0).expect_err("full").raw_os_error(), Some(libc::ENOSPC));
    }
    storage.set_fault(|op, path| {
        (op == StorageOp::Rename && path == Path::new("file")).then(|| io::Error::from_raw_os_error(libc::EACCES))
    });
    file.write_at(b"four", 0)?;
    assert_eq!(storage.rename(path("file"), path("other")).expect_err("told to").raw_os_error(), Some(libc::EACCES));
    storage.clear_fault();
    storage.rename(path("file"), path("other"))?;

    storage.set_capacity(8192);
    assert_eq!(storage.free_bytes()?, 4096);
    let other = storage.open(path("file"), OpenMode::CreateNew)?;
    other.write_at(&[1; 4096], 0)?;
    assert_eq!(other.write_at(&[1; 1], 4096).expect_err("full").raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(other.reserve(0, 8192).expect_err("full").raw_os_error(), Some(libc::ENOSPC));
    other.write_at(&[2; 4096], 0)?;
    other.punch_hole(0, 4096)?;
    assert_eq!(storage.free_bytes()?, 4096);

    storage.corrupt(path("other"), 0, 0x80)?;
    let mut byte = [0];
    storage.open(path("other"), OpenMode::Read)?.read_at(&mut byte, 0)?;
    assert_eq!(byte[0] & 0x80, 0x80);
    Ok(())
}
