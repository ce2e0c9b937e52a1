//! Goal: the real and the simulated file system behave the same as long as nothing fails. Method: one suite over both, and
//! random calls against a map of byte vectors.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use farshore_uring::sim::{SimRng, SimStorage};
use farshore_uring::{AlignedBuf, DirStorage, OpenMode, Storage, StorageFile, replace_file, replace_files};

fn on_both(check: impl Fn(&dyn Fn() -> Kind) -> io::Result<()>) -> io::Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let dir = DirStorage::open(folder.path())?;
    check(&|| Kind::Dir(dir.clone()))?;
    let sim = SimStorage::new(SimRng::new(1));
    check(&|| Kind::Sim(sim.clone()))
}

enum Kind {
    Dir(DirStorage),
    Sim(SimStorage),
}

/// Runs a generic function on whichever it is.
macro_rules! with {
    ($make:expr, $storage:ident => $body:expr) => {
        match $make() {
            Kind::Dir($storage) => $body,
            Kind::Sim($storage) => $body,
        }
    };
}

fn kind_of<T>(result: io::Result<T>) -> ErrorKind {
    result.err().map_or(ErrorKind::Other, |error| error.kind())
}

#[test]
fn names() -> io::Result<()> {
    on_both(|make| with!(make, storage => check_names(&storage)))
}

fn check_names<S: Storage>(storage: &S) -> io::Result<()> {
    let path = Path::new;
    assert_eq!(storage.list(path(""))?, Vec::<PathBuf>::new());
    assert_eq!(kind_of(storage.list(path("none"))), ErrorKind::NotFound);
    assert_eq!(kind_of(storage.open(path("none"), OpenMode::ReadWrite)), ErrorKind::NotFound);
    assert_eq!(kind_of(storage.open(path("none/file"), OpenMode::CreateNew)), ErrorKind::NotFound);
    assert_eq!(kind_of(storage.sync_dir(path("none"))), ErrorKind::NotFound);
    assert_eq!(kind_of(storage.remove(path("none"))), ErrorKind::NotFound);
    assert_eq!(kind_of(storage.rename(path("none"), path("other"))), ErrorKind::NotFound);
    for outside in ["/etc/passwd", "../x", "a/../../x"] {
        assert_eq!(kind_of(storage.open(path(outside), OpenMode::Read)), ErrorKind::InvalidInput, "{outside}");
    }

    storage.create_dir_all(path("a/b/c"))?;
    storage.create_dir_all(path("a/b"))?;
    assert!(storage.exists(path("a/b/c"))? && storage.exists(path("a"))? && !storage.exists(path("a/c"))?);
    for name in ["a/z", "a/m", "./a/k"] {
        storage.open(path(name), OpenMode::CreateNew)?.write_at(name.as_bytes(), 0)?;
    }
    assert_eq!(kind_of(storage.open(path("a/z"), OpenMode::CreateNew)), ErrorKind::AlreadyExists);
    assert_eq!(storage.list(path("a"))?, ["b", "k", "m", "z"].map(PathBuf::from));
    storage.sync_dir(path("a"))?;

    let replaced = storage.open(path("a/m"), OpenMode::Read)?;
    storage.rename(path("a/z"), path("a/m"))?;
    assert_eq!(storage.list(path("a"))?, ["b", "k", "m"].map(PathBuf::from));
    let mut bytes = [0; 3];
    storage.open(path("a/m"), OpenMode::Read)?.read_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"a/z");
    replaced.read_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"a/m", "an open file outlives its name");
    storage.rename(path("a/m"), path("a/b/c/moved"))?;
    storage.rename(path("a/b"), path("d"))?;
    assert_eq!(storage.list(path("d/c"))?, ["moved"].map(PathBuf::from));
    storage.remove(path("d/c/moved"))?;
    assert!(!storage.exists(path("d/c/moved"))?);

    replace_file(storage, path("d/state"), b"one")?;
    replace_file(storage, path("d/state"), b"two, longer")?;
    replace_file(storage, path("d/state"), b"3")?;
    let state = storage.open(path("d/state"), OpenMode::Read)?;
    assert_eq!(state.len()?, 1);
    assert_eq!(storage.list(path("d"))?, ["c", "state"].map(PathBuf::from));
    assert!(storage.free_bytes()? > 0);
    replace_files(storage, &[path("d/state"), path("d/copy")], b"both")?;
    for name in ["d/state", "d/copy"] {
        let mut bytes = [0; 4];
        storage.open(path(name), OpenMode::Read)?.read_at(&mut bytes, 0)?;
        assert_eq!(&bytes, b"both");
    }
    assert_eq!(storage.list(path("d"))?, ["c", "copy", "state"].map(PathBuf::from));
    Ok(())
}

/// Goal: a folder that was removed behind our back is made again, though it is remembered as durable.
#[test]
fn a_removed_folder_is_made_again() -> io::Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let storage = DirStorage::open(folder.path())?;
    for _ in 0..2 {
        storage.create_dir_all(Path::new("a/b"))?;
        storage.open(Path::new("a/b/file"), OpenMode::CreateNew)?.sync()?;
        std::fs::remove_dir_all(folder.path().join("a"))?;
    }
    Ok(())
}

/// Goal: a device is one's alone, keeps its size, and holds what is written to it at any offset and length.
#[test]
fn devices() -> io::Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = folder.path().join("device");
    // A size that is a multiple of 512 but not of 4096 rules direct I/O out on file systems that want 4096.
    for size in [300 * 4096, 300 * 4096 + 512] {
        std::fs::write(&path, vec![0; size])?;
        let dir = DirStorage::open(folder.path())?;
        assert_eq!(kind_of(dir.open_device(&path)), ErrorKind::InvalidInput, "a file is no device");
        assert_eq!(kind_of(dir.open_device(Path::new("device"))), ErrorKind::InvalidInput, "a relative path");
        check_device(&dir.with_files_as_devices(), &path, size)?;
        let sim = SimStorage::new(SimRng::new(1));
        sim.add_device(&path, size as u64, "A");
        check_device(&sim, &path, size)?;
        assert_eq!(kind_of(sim.open_device(Path::new("/dev/none"))), ErrorKind::NotFound);
    }
    Ok(())
}

fn check_device<S: Storage>(storage: &S, path: &Path, size: usize) -> io::Result<()> {
    let device = storage.open_device(path)?;
    let busy = kind_of(storage.open_device(path));
    assert!(matches!(busy, ErrorKind::ResourceBusy | ErrorKind::WouldBlock), "{busy}");
    let (file, end) = (&*device.file, size as u64);
    assert_eq!((device.size, file.len()?, file.allocated()?), (end, end, end));
    assert_eq!((file.next_data(7)?, file.next_data(end)?, file.next_hole(7)?), (Some(7), None, end));
    assert!(file.set_len(end + 512).is_err() && file.write_at(&[1; 2], end - 1).is_err());
    assert_eq!(kind_of(file.read_at(&mut [0; 2], end - 1)), ErrorKind::UnexpectedEof);
    let mut rng = SimRng::new(end);
    let mut model = vec![0; size];
    for round in 0..60 {
        let offset = rng.index(size);
        let len = 1 + rng.index((size - offset).min(if round % 8 == 0 { 400_000 } else { 9000 }));
        let range = offset..offset + len;
        if rng.chance(1, 3) {
            file.punch_hole(offset as u64, len as u64)?;
            model[range].fill(0);
        } else {
            rng.fill(&mut model[range.clone()]);
            file.write_at(&model[range], offset as u64)?;
        }
    }
    file.sync()?;
    let id = device.id.clone();
    drop(device);
    let again = storage.open_device(path)?;
    assert_eq!(again.id, id);
    let mut found = vec![1; size];
    again.file.read_at(&mut found, 0)?;
    assert!(found == model);
    let mut piece = vec![0; 1000];
    again.file.read_at(&mut piece, 4095)?;
    assert!(piece == model[4095..5095]);
    again.file.punch_hole(0, u64::MAX)?;
    again.file.read_at(&mut found, 0)?;
    assert!(found.iter().all(|byte| *byte == 0), "all of it is zero");
    Ok(())
}

#[test]
fn content() -> io::Result<()> {
    on_both(|make| with!(make, storage => check_content(&storage)))
}

fn check_content<S: Storage>(storage: &S) -> io::Result<()> {
    let file = storage.open(Path::new("file"), OpenMode::CreateNew)?;
    assert!(file.is_empty()?);
    assert_eq!((file.next_data(0)?, file.next_hole(0)?), (None, 0));
    file.write_at(b"hello", 3)?;
    assert_eq!(file.len()?, 8);
    let mut bytes = [9; 8];
    file.read_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"\0\0\0hello");
    assert_eq!(kind_of(file.read_at(&mut bytes, 1)), ErrorKind::UnexpectedEof);
    file.write_sync_at(&[5; 4096], 1 << 20)?;
    file.write_sync_at(b"", 0)?;
    assert_eq!((file.next_hole(0)?, file.next_data(4096)?), (4096, Some(1 << 20)));
    assert_eq!(file.next_hole(1 << 20)?, (1 << 20) + 4096);
    assert_eq!((file.next_data(1 << 21)?, file.next_hole(1 << 21)?), (None, 1 << 21), "past the end");
    file.punch_hole(1 << 20, 4096)?;
    assert_eq!((file.len()?, file.next_data(4096)?), ((1 << 20) + 4096, None));
    file.punch_hole(0, 4)?;
    file.read_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"\0\0\0\0ello");
    file.set_len(5)?;
    file.set_len(8)?;
    file.read_at(&mut bytes, 0)?;
    assert_eq!(&bytes, b"\0\0\0\0e\0\0\0");
    file.reserve(0, 1 << 16)?;
    assert_eq!(file.len()?, 8, "reserving keeps the length");
    file.start_writeback(0, 8);
    file.sync()?;
    let reader = storage.open(Path::new("file"), OpenMode::Read)?;
    assert!(reader.write_at(b"x", 0).is_err() && reader.set_len(0).is_err(), "opened for reading");
    assert_eq!(reader.len()?, 8);
    Ok(())
}

/// Goal: writes past the cache (long and aligned) and cached ones (all else) to the same pages are seen in the order in which they
/// were made, through the cache and after a new opening. Method: both kinds at random, against bytes in memory.
#[test]
fn long_writes_and_short_ones_agree() -> io::Result<()> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let storage = DirStorage::open(folder.path())?;
    let path = Path::new("file");
    let file = storage.open(path, OpenMode::CreateNew)?;
    let mut rng = SimRng::new(7);
    let mut content = vec![0; 1 << 20];
    file.set_len(content.len() as u64)?;
    let mut buffer = AlignedBuf::zeroed(400 << 10);
    for round in 0..200u32 {
        let len = if round % 2 == 0 { (64 << 10) + rng.index(300 << 10) } else { 1 + rng.index(9000) };
        let at = rng.index(content.len() - len);
        let at = if round % 4 < 2 { at / 4096 * 4096 } else { at };
        buffer[..len].iter_mut().for_each(|byte| *byte = u8::try_from(rng.index(256)).unwrap_or(0));
        file.write_at(&buffer[..len], at as u64)?;
        content[at..at + len].copy_from_slice(&buffer[..len]);
        let from = rng.index(content.len() - 5000);
        let mut read = vec![0; 5000];
        file.read_at(&mut read, from as u64)?;
        assert!(read == content[from..from + 5000], "round {round}: the bytes at {from} differ");
    }
    file.sync()?;
    let mut read = vec![0; content.len()];
    storage.open(path, OpenMode::Read)?.read_at(&mut read, 0)?;
    assert!(read == content, "what was opened anew differs");
    assert_eq!(file.len()?, content.len() as u64);
    Ok(())
}

#[test]
fn random_calls_match_a_model() -> io::Result<()> {
    for seed in 0..5 {
        on_both(|make| with!(make, storage => check_model(&storage, seed)))?;
    }
    Ok(())
}

fn check_model<S: Storage>(storage: &S, seed: u64) -> io::Result<()> {
    let mut rng = SimRng::new(seed);
    let mut model: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for _ in 0..400 {
        let name = PathBuf::from(format!("f{}", rng.below(6)));
        let other = PathBuf::from(format!("f{}", rng.below(6)));
        let known = model.contains_key(&name);
        match rng.below(9) {
            0 => assert_eq!(storage.open(&name, OpenMode::CreateNew).is_ok(), model.try_insert_new(&name)),
            1 => assert_eq!(storage.remove(&name).is_ok(), model.remove(&name).is_some()),
            2 => {
                assert_eq!(storage.rename(&name, &other).is_ok(), known);
                if let Some(content) = model.remove(&name) {
                    model.insert(other, content);
                }
            }
            3 => storage.sync_dir(Path::new(""))?,
            _ if !known => assert!(!storage.exists(&name)?),
            choice => {
                let file = storage.open(&name, OpenMode::ReadWrite)?;
                let content = model.get_mut(&name).expect("known");
                change(&*file, content, choice, &mut rng)?;
                let mut found = vec![0; content.len()];
                file.read_at(&mut found, 0)?;
                assert!(file.len()? == content.len() as u64 && found == *content, "seed {seed}");
            }
        }
        assert!(storage.list(Path::new(""))?.iter().eq(model.keys()), "seed {seed}");
    }
    Ok(())
}

fn change<F: StorageFile>(file: &F, content: &mut Vec<u8>, choice: u64, rng: &mut SimRng) -> io::Result<()> {
    let (offset, len) = (rng.index(20_000), rng.index(10_000));
    match choice {
        4 | 5 => {
            let mut bytes = vec![0; len];
            rng.fill(&mut bytes);
            if choice == 4 {
                file.write_at(&bytes, offset as u64)?
            } else {
                file.write_sync_at(&bytes, offset as u64)?
            }
            if len > 0 && content.len() < offset + len {
                content.resize(offset + len, 0);
            }
            if len > 0 {
                content[offset..offset + len].copy_from_slice(&bytes);
            }
        }
        6 => {
            file.set_len(offset as u64)?;
            content.resize(offset, 0);
        }
        7 => {
            file.punch_hole(offset as u64, len as u64)?;
            let end = content.len();
            content[offset.min(end)..(offset + len).min(end)].fill(0);
        }
        _ => file.sync()?,
    }
    Ok(())
}

/// `true`: it was not there.
trait InsertNew {
    fn try_insert_new(&mut self, path: &Path) -> bool;
}

impl InsertNew for BTreeMap<PathBuf, Vec<u8>> {
    fn try_insert_new(&mut self, path: &Path) -> bool {
        let new = !self.contains_key(path);
        self.entry(path.to_owned()).or_default();
        new
    }
}
