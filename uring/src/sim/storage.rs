//! The simulated file system.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::image::Image;
use super::{SimRng, crashed};
use crate::dir_storage::check_relative;
use crate::{BackingId, Device, OpenMode, Storage, StorageFile};

/// A tree of files in memory. Clones are the same tree.
///
/// [`SimStorage::crash`] ends this life of the machine: it returns the tree that the next one finds, and all older handles,
/// files included, report [`super::is_crash`] from then on.
#[derive(Clone)]
pub struct SimStorage {
    shared: Arc<Mutex<Tree>>,
    life: u64,
}

/// One file of a [`SimStorage`].
pub struct SimFile {
    shared: Arc<Mutex<Tree>>,
    life: u64,
    path: PathBuf,
    inode: Inode,
    writable: bool,
    /// Of a device: keeps others off it.
    claim: Option<Arc<()>>,
}

/// A block device beside the tree.
struct SimDevice {
    id: BackingId,
    inode: Inode,
    claim: Weak<()>,
}

/// A call, as the fault hook sees it; the hook's path is the file's name when it was opened, or the folder's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "named after the methods of Storage and StorageFile")]
pub enum StorageOp {
    Open,
    CreateDirAll,
    List,
    Exists,
    Rename,
    Remove,
    SyncDir,
    Read,
    Write,
    Sync,
    Len,
    SetLen,
    PunchHole,
    Reserve,
    Seek,
    OpenDevice,
    Allocated,
}

trait Fault: Send {
    fn ask(&mut self, op: StorageOp, path: &Path) -> Option<io::Error>;
}

impl<F: FnMut(StorageOp, &Path) -> Option<io::Error> + Send> Fault for F {
    fn ask(&mut self, op: StorageOp, path: &Path) -> Option<io::Error> {
        self(op, path)
    }
}

struct Tree {
    life: u64,
    names: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
    /// Changes of names whose folder was not synced since, oldest first.
    changes: Vec<NameChange>,
    inodes: u64,
    devices: BTreeMap<PathBuf, SimDevice>,
    rng: SimRng,
    ops: u64,
    crash_at: Option<u64>,
    fault: Option<Box<dyn Fault>>,
    capacity: u64,
}

/// Content is shared by the names and the open files of one file.
#[derive(Clone)]
struct Inode {
    number: u64,
    content: Arc<Mutex<Image>>,
}

#[derive(Clone)]
enum Node {
    Folder,
    File(Inode),
}

#[derive(Clone)]
enum NameChange {
    Create { path: PathBuf, inode: Inode },
    RenameFile { from: PathBuf, to: PathBuf, inode: Inode },
    RenameFolder { from: PathBuf, to: PathBuf },
    Remove { path: PathBuf, inode: Inode },
}

/// Free space of a new tree: none of our tests means to fill it.
const CAPACITY: u64 = 1 << 50;

impl SimStorage {
    /// An empty tree.
    #[must_use]
    pub fn new(rng: SimRng) -> Self {
        let tree = Tree {
            life: 0,
            names: BTreeMap::new(),
            durable: BTreeMap::new(),
            changes: Vec::new(),
            inodes: 0,
            devices: BTreeMap::new(),
            rng,
            ops: 0,
            crash_at: None,
            fault: None,
            capacity: CAPACITY,
        };
        Self { shared: Arc::new(Mutex::new(tree)), life: 0 }
    }

    /// The power fails: keeps, loses and tears what was not synced, removes the faults, and returns the handle of the next
    /// life.
    #[must_use]
    pub fn crash(&self, rng: &mut SimRng) -> Self {
        let mut tree = self.lock();
        tree.crash(rng);
        Self { shared: Arc::clone(&self.shared), life: tree.life }
    }

    /// An independent copy of both states, without faults; to try several crashes of one state.
    #[must_use]
    pub fn fork(&self) -> Self {
        let mut tree = self.lock();
        let tree = tree.copy();
        let life = tree.life;
        Self { shared: Arc::new(Mutex::new(tree)), life }
    }

    /// Calls so far, of this tree and its files.
    #[must_use]
    pub fn op_count(&self) -> u64 {
        self.lock().ops
    }

    /// The call with this number (counted by [`Self::op_count`], from 0) and all later ones report a crash; that one may have
    /// had its effect.
    pub fn crash_at(&self, op: Option<u64>) {
        self.lock().crash_at = op;
    }

    /// The call with this number fails once, without effect, with this error number.
    pub fn fail_at(&self, op: u64, errno: i32) {
        let mut left = op.checked_sub(self.op_count());
        self.set_fault(move |_, _| {
            let fails = left == Some(0);
            left = left.and_then(|left| left.checked_sub(1));
            fails.then(|| io::Error::from_raw_os_error(errno))
        });
    }

    /// After `calls` more calls all fail with this error number, until the fault is replaced.
    pub fn fail_after(&self, calls: u64, errno: i32) {
        let mut left = calls;
        self.set_fault(move |_, _| {
            if left > 0 {
                left -= 1;
                return None;
            }
            Some(io::Error::from_raw_os_error(errno))
        });
    }

    /// Asks `fault` before every call, in place of the hook before; an error it returns is reported. A write or sync that
    /// fails may have been done in part.
    pub fn set_fault(&self, fault: impl FnMut(StorageOp, &Path) -> Option<io::Error> + Send + 'static) {
        self.lock().fault = Some(Box::new(fault));
    }

    /// Removes the fault hook.
    pub fn clear_fault(&self) {
        self.lock().fault = None;
    }

    /// Bytes of the whole file system; writes beyond fail with `ENOSPC`.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = bytes;
    }

    /// Flips the bits of `mask` in one byte of a file, live and durable.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn corrupt(&self, path: &Path, offset: u64, mask: u8) -> io::Result<()> {
        let tree = self.lock();
        let inode = tree.file(&clean(path)?)?;
        inode.lock().flip(offset, mask);
        Ok(())
    }

    /// Puts a blank device of `size` bytes at `path`, in place of what was there. It outlives crashes; `id` is its identity.
    pub fn add_device(&self, path: &Path, size: u64, id: &str) {
        let mut tree = self.lock();
        tree.inodes += 1;
        let inode = Inode { number: tree.inodes, content: Arc::new(Mutex::new(Image::with_len(size))) };
        let id = BackingId::from_text(format!("sim serial={id} size={size}"));
        tree.devices.insert(path.to_owned(), SimDevice { id, inode, claim: Weak::new() });
    }

    fn lock(&self) -> MutexGuard<'_, Tree> {
        lock_tree(&self.shared)
    }

    /// Asks for faults, counts, and runs the call; see [`Tree::begin`].
    fn call<T>(
        &self,
        op: StorageOp,
        path: &Path,
        run: impl FnOnce(&mut Tree, &Path) -> io::Result<T>,
    ) -> io::Result<T> {
        let path = clean(path)?;
        let mut tree = self.lock();
        match tree.begin(self.life, op, &path)? {
            Begin::Run => run(&mut tree, &path),
            Begin::Fail(error) => Err(error),
            Begin::Crash { effect } => {
                if effect {
                    // Its result is of no interest: nobody lives to see it.
                    let _ = run(&mut tree, &path);
                }
                Err(crashed())
            }
        }
    }
}

fn lock_tree(shared: &Mutex<Tree>) -> MutexGuard<'_, Tree> {
    // A panic of a fault hook is the test's failure; the tree behind it stays consistent.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Relative, without `.`.
fn clean(path: &Path) -> io::Result<PathBuf> {
    check_relative(path)?;
    Ok(path.components().filter(|part| !matches!(part, std::path::Component::CurDir)).collect())
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(ErrorKind::NotFound, format!("{}: no such file or folder", path.display()))
}

enum Begin {
    Run,
    Fail(io::Error),
    Crash { effect: bool },
}

impl Inode {
    fn lock(&self) -> MutexGuard<'_, Image> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tree {
    fn begin(&mut self, life: u64, op: StorageOp, path: &Path) -> io::Result<Begin> {
        if life != self.life {
            return Err(crashed());
        }
        let number = self.ops;
        self.ops += 1;
        if let Some(at) = self.crash_at
            && number >= at
        {
            let effect = number == at && self.rng.chance(1, 2);
            return Ok(Begin::Crash { effect });
        }
        let fault = self.fault.as_mut().and_then(|fault| fault.ask(op, path));
        Ok(fault.map_or(Begin::Run, Begin::Fail))
    }

    fn is_folder(&self, path: &Path) -> bool {
        path.as_os_str().is_empty() || matches!(self.names.get(path), Some(Node::Folder))
    }

    fn parent_exists(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))?;
        if self.is_folder(parent) { Ok(()) } else { Err(not_found(parent)) }
    }

    fn file(&self, path: &Path) -> io::Result<Inode> {
        match self.names.get(path) {
            Some(Node::File(inode)) => Ok(inode.clone()),
            Some(Node::Folder) => Err(ErrorKind::IsADirectory.into()),
            None => Err(not_found(path)),
        }
    }

    fn create(&mut self, path: &Path) -> io::Result<Inode> {
        self.parent_exists(path)?;
        if self.names.contains_key(path) || self.is_folder(path) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.inodes += 1;
        let inode = Inode { number: self.inodes, content: Arc::default() };
        self.change(NameChange::Create { path: path.to_owned(), inode: inode.clone() });
        Ok(inode)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.parent_exists(to)?;
        let node = self.names.get(from).cloned().ok_or_else(|| not_found(from))?;
        if from == to {
            return Ok(());
        }
        match node {
            Node::File(inode) => {
                if self.is_folder(to) {
                    return Err(ErrorKind::IsADirectory.into());
                }
                self.change(NameChange::RenameFile { from: from.to_owned(), to: to.to_owned(), inode });
            }
            Node::Folder => {
                if to.starts_with(from) {
                    return Err(ErrorKind::InvalidInput.into());
                }
                if matches!(self.names.get(to), Some(Node::File(_))) {
                    return Err(ErrorKind::NotADirectory.into());
                }
                if children(&self.names, to).next().is_some() {
                    return Err(ErrorKind::DirectoryNotEmpty.into());
                }
                self.change(NameChange::RenameFolder { from: from.to_owned(), to: to.to_owned() });
            }
        }
        Ok(())
    }

    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.changes.push(change);
    }

    fn sync_folder(&mut self, folder: &Path) -> io::Result<()> {
        if !self.is_folder(folder) {
            return Err(not_found(folder));
        }
        let (synced, left) = std::mem::take(&mut self.changes).into_iter().partition(|change| change.touches(folder));
        self.changes = left;
        let synced: Vec<NameChange> = synced;
        for change in synced {
            change.apply(&mut self.durable);
        }
        Ok(())
    }

    fn crash(&mut self, rng: &mut SimRng) {
        let changes = std::mem::take(&mut self.changes);
        let kept = match rng.below(4) {
            0 => 0,
            1 => changes.len(),
            _ => rng.index(changes.len() + 1),
        };
        // Up to some point (a journal), or each for itself.
        let journal = rng.chance(1, 2);
        for (index, change) in changes.into_iter().enumerate() {
            if if journal { index < kept } else { rng.chance(1, 2) } {
                change.apply(&mut self.durable);
            }
        }
        // A file whose folder's rename was lost, or the reverse, has no place any more.
        let known: BTreeSet<PathBuf> = self.durable.keys().cloned().collect();
        let reachable =
            |path: &Path| path.ancestors().skip(1).all(|up| up.as_os_str().is_empty() || known.contains(up));
        self.durable.retain(|path, _| reachable(path));

        let mut seen = BTreeSet::new();
        for node in self.durable.values() {
            if let Node::File(inode) = node
                && seen.insert(inode.number)
            {
                inode.lock().crash(rng);
            }
        }
        for device in self.devices.values_mut() {
            device.inode.lock().crash(rng);
            device.claim = Weak::new();
        }
        self.names = self.durable.clone();
        self.life += 1;
        self.crash_at = None;
        self.fault = None;
    }

    fn copy(&mut self) -> Self {
        let mut copies = BTreeMap::new();
        let mut copy = |inode: &Inode| {
            let content = copies.entry(inode.number).or_insert_with(|| Arc::new(Mutex::new(inode.lock().clone())));
            Inode { number: inode.number, content: Arc::clone(content) }
        };
        let mut nodes = |names: &BTreeMap<PathBuf, Node>| -> BTreeMap<PathBuf, Node> {
            let entry = |(path, node): (&PathBuf, &Node)| {
                let node = match node {
                    Node::Folder => Node::Folder,
                    Node::File(inode) => Node::File(copy(inode)),
                };
                (path.clone(), node)
            };
            names.iter().map(entry).collect()
        };
        let (names, durable) = (nodes(&self.names), nodes(&self.durable));
        let devices = self.devices.iter().map(|(path, device)| {
            (path.clone(), SimDevice { id: device.id.clone(), inode: copy(&device.inode), claim: Weak::new() })
        });
        let devices = devices.collect();
        let changes = self.changes.iter().map(|change| change.with_inode(&mut copy)).collect();
        Self {
            life: self.life,
            names,
            durable,
            changes,
            inodes: self.inodes,
            devices,
            rng: self.rng.fork(),
            ops: self.ops,
            crash_at: None,
            fault: None,
            capacity: self.capacity,
        }
    }

    /// Bytes allocated by all files that have a name or may get one back.
    fn used(&self) -> u64 {
        let mut seen = BTreeSet::new();
        let nodes = self.names.values().chain(self.durable.values());
        let inodes = nodes.filter_map(|node| match node {
            Node::File(inode) => Some(inode),
            Node::Folder => None,
        });
        inodes.filter(|inode| seen.insert(inode.number)).map(|inode| inode.lock().allocated()).sum()
    }
}

/// The names directly in a folder.
fn children<'a>(names: &'a BTreeMap<PathBuf, Node>, folder: &'a Path) -> impl Iterator<Item = &'a Path> {
    names.keys().map(PathBuf::as_path).filter(move |path| path.parent() == Some(folder))
}

impl NameChange {
    /// In any state of the names, also one in which earlier changes were lost.
    fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        let holds = |names: &BTreeMap<PathBuf, Node>, path: &Path, inode: &Inode| matches!(names.get(path), Some(Node::File(there)) if there.number == inode.number);
        match self {
            Self::Create { path, inode } => {
                names.insert(path.clone(), Node::File(inode.clone()));
            }
            Self::RenameFile { from, to, inode } => {
                if holds(names, from, inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), Node::File(inode.clone()));
            }
            Self::RenameFolder { from, to } => {
                let moved: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
                for path in moved {
                    let node = names.remove(&path).expect("listed above");
                    let below = path.strip_prefix(from).expect("filtered by it");
                    // Joining nothing would leave a slash at the end.
                    let path = if below.as_os_str().is_empty() { to.clone() } else { to.join(below) };
                    names.insert(path, node);
                }
            }
            Self::Remove { path, inode } => {
                if holds(names, path, inode) {
                    names.remove(path);
                }
            }
        }
    }

    fn touches(&self, folder: &Path) -> bool {
        let inside = |path: &Path| path.parent() == Some(folder);
        match self {
            Self::Create { path, .. } | Self::Remove { path, .. } => inside(path),
            Self::RenameFile { from, to, .. } | Self::RenameFolder { from, to } => inside(from) || inside(to),
        }
    }

    fn with_inode(&self, copy: &mut impl FnMut(&Inode) -> Inode) -> Self {
        match self {
            Self::Create { path, inode } => Self::Create { path: path.clone(), inode: copy(inode) },
            Self::Remove { path, inode } => Self::Remove { path: path.clone(), inode: copy(inode) },
            Self::RenameFile { from, to, inode } => {
                Self::RenameFile { from: from.clone(), to: to.clone(), inode: copy(inode) }
            }
            Self::RenameFolder { .. } => self.clone(),
        }
    }
}

impl Storage for SimStorage {
    type File = SimFile;

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<SimFile>> {
        self.call(StorageOp::Open, path, |tree, path| {
            let inode = if mode == OpenMode::CreateNew { tree.create(path)? } else { tree.file(path)? };
            let (shared, path, writable) = (Arc::clone(&self.shared), path.to_owned(), mode != OpenMode::Read);
            Ok(Arc::new(SimFile { shared, life: self.life, path, inode, writable, claim: None }))
        })
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.call(StorageOp::CreateDirAll, path, |tree, path| {
            let mut folders: Vec<&Path> = path.ancestors().filter(|up| !up.as_os_str().is_empty()).collect();
            folders.reverse();
            for folder in folders {
                if matches!(tree.names.get(folder), Some(Node::File(_))) {
                    return Err(ErrorKind::AlreadyExists.into());
                }
                tree.names.insert(folder.to_owned(), Node::Folder);
                tree.durable.insert(folder.to_owned(), Node::Folder);
            }
            Ok(())
        })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.call(StorageOp::List, path, |tree, path| {
            if !tree.is_folder(path) {
                return Err(not_found(path));
            }
            Ok(children(&tree.names, path).filter_map(|path| path.file_name().map(PathBuf::from)).collect())
        })
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.call(StorageOp::Exists, path, |tree, path| Ok(tree.is_folder(path) || tree.names.contains_key(path)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let to = clean(to)?;
        self.call(StorageOp::Rename, from, |tree, from| tree.rename(from, &to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call(StorageOp::Remove, path, |tree, path| {
            let inode = tree.file(path)?;
            tree.change(NameChange::Remove { path: path.to_owned(), inode });
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.call(StorageOp::SyncDir, path, Tree::sync_folder)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let tree = self.lock();
        if tree.life != self.life {
            return Err(crashed());
        }
        Ok(tree.capacity.saturating_sub(tree.used()))
    }

    fn open_device(&self, path: &Path) -> io::Result<Device<SimFile>> {
        let mut tree = self.lock();
        match tree.begin(self.life, StorageOp::OpenDevice, path)? {
            Begin::Run => {}
            Begin::Fail(error) => return Err(error),
            Begin::Crash { .. } => return Err(crashed()),
        }
        let device = tree.devices.get_mut(path).ok_or_else(|| not_found(path))?;
        if device.claim.upgrade().is_some() {
            return Err(ErrorKind::ResourceBusy.into());
        }
        let claim = Arc::new(());
        device.claim = Arc::downgrade(&claim);
        let (inode, id) = (device.inode.clone(), device.id.clone());
        let size = inode.lock().len();
        let (shared, path) = (Arc::clone(&self.shared), path.to_owned());
        let file = SimFile { shared, life: self.life, path, inode, writable: true, claim: Some(claim) };
        Ok(Device { file: Arc::new(file), size, id })
    }
}

impl SimFile {
    /// A device keeps its length.
    fn check_length(&self, end: u64) -> io::Result<()> {
        if self.claim.is_some() && end > self.inode.lock().len() {
            return Err(ErrorKind::InvalidInput.into());
        }
        Ok(())
    }

    /// Asks for faults, counts, and runs the call. `partly`: what a failing call still does.
    fn call<T>(
        &self,
        op: StorageOp,
        run: impl FnOnce(&mut Image, &mut SimRng) -> io::Result<T>,
        partly: impl FnOnce(&mut Image, &mut SimRng),
    ) -> io::Result<T> {
        let mut tree = lock_tree(&self.shared);
        let begin = tree.begin(self.life, op, &self.path)?;
        let mut image = self.inode.lock();
        match begin {
            Begin::Run => run(&mut image, &mut tree.rng),
            Begin::Fail(error) => {
                partly(&mut image, &mut tree.rng);
                Err(error)
            }
            Begin::Crash { effect } => {
                if effect {
                    // Its result is of no interest: nobody lives to see it.
                    let _ = run(&mut image, &mut tree.rng);
                }
                Err(crashed())
            }
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EBADF)) }
    }

    /// Room for `len` bytes at `offset`; holes that become data count as what they add.
    fn check_space(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_length(offset.saturating_add(len))?;
        if self.claim.is_some() {
            return Ok(());
        }
        let tree = lock_tree(&self.shared);
        // Counting all files at every write is only worth it where a test has set a limit.
        if tree.capacity == CAPACITY {
            return Ok(());
        }
        let (used, capacity) = (tree.used(), tree.capacity);
        let image = self.inode.lock();
        let mut copy = image.clone();
        drop(image);
        let before = copy.allocated();
        copy.write(offset, &vec![0; usize::try_from(len).expect("a write fits into memory")]);
        if used + (copy.allocated() - before) > capacity {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        } else {
            Ok(())
        }
    }
}

impl StorageFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let read = |image: &mut Image, _: &mut SimRng| {
            if image.read(offset, buf) { Ok(()) } else { Err(io::Error::from(ErrorKind::UnexpectedEof)) }
        };
        self.call(StorageOp::Read, read, |_, _| {})
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check_space(offset, buf.len() as u64)?;
        let write = |image: &mut Image, _: &mut SimRng| {
            image.write(offset, buf);
            Ok(())
        };
        self.call(StorageOp::Write, write, |image, rng| image.write_some(offset, buf, rng))
    }

    fn sync(&self) -> io::Result<()> {
        let sync = |image: &mut Image, _: &mut SimRng| {
            image.sync();
            Ok(())
        };
        self.call(StorageOp::Sync, sync, Image::sync_failed)
    }

    fn len(&self) -> io::Result<u64> {
        self.call(StorageOp::Len, |image, _| Ok(image.len()), |_, _| {})
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_writable()?;
        if self.claim.is_some() && len != self.inode.lock().len() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let set = |image: &mut Image, _: &mut SimRng| {
            image.set_len(len);
            Ok(())
        };
        self.call(StorageOp::SetLen, set, |_, _| {})
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        let punch = |image: &mut Image, _: &mut SimRng| {
            image.zero(offset, len);
            Ok(())
        };
        self.call(StorageOp::PunchHole, punch, |_, _| {})
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        if self.claim.is_some() {
            return Ok(());
        }
        let free = {
            let tree = lock_tree(&self.shared);
            tree.capacity.saturating_sub(tree.used())
        };
        let reserve = |image: &mut Image, _: &mut SimRng| {
            let new = (offset + len).saturating_sub(image.len().max(offset));
            if new > free { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
        };
        self.call(StorageOp::Reserve, reserve, |_, _| {})
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let is_device = self.claim.is_some();
        let next = |image: &mut Image, _: &mut SimRng| {
            if is_device { Ok((offset < image.len()).then_some(offset)) } else { Ok(image.next_data(offset)) }
        };
        self.call(StorageOp::Seek, next, |_, _| {})
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let is_device = self.claim.is_some();
        let next = |image: &mut Image, _: &mut SimRng| {
            if is_device { Ok(image.len().max(offset)) } else { Ok(image.next_hole(offset)) }
        };
        self.call(StorageOp::Seek, next, |_, _| {})
    }

    fn allocated(&self) -> io::Result<u64> {
        let is_device = self.claim.is_some();
        let bytes = |image: &mut Image, _: &mut SimRng| Ok(if is_device { image.len() } else { image.allocated() });
        self.call(StorageOp::Allocated, bytes, |_, _| {})
    }
}

impl fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimStorage").field("life", &self.life).finish_non_exhaustive()
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile").field("path", &self.path).finish_non_exhaustive()
    }
}
