//! The state directory: what must survive the process and the host's reboot. One small checksummed TOML file per group,
//! replaced atomically, and one bitmap file per volume with missing ranges. Layout: `docs/formats/state.md`.
//!
//! Crash safety (I4). `attached` is made durable before the first request is served and cleared only after a clean stop,
//! when every write is either durable at the target or has a durable `missing` bit:
//! 1. a crash while `attached`: the ring file, if it is still there and of this boot, holds what was not shipped; if it is
//!    gone, everything is compared;
//! 2. a crash between saving the bitmaps and clearing `attached`: as 1, the bitmaps are ignored, more is compared;
//! 3. the incarnation is made durable before a ring of that incarnation exists, so none is used twice.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_proto::{GroupId, Name, VaultId};
use farshore_streamer::Line;
use farshore_uring::{OpenMode, Storage, StorageFile, replace_file};
use serde::{Deserialize, Serialize};

use crate::evidence::Evidence;
use crate::verify::VerifyState;
use crate::{Error, Result, clock};

const FORMAT: u32 = 1;
/// Of a group's file. 2 added `ublk` to volumes, 3 `mapped` and `evidence`, 4 `verify`, 5 `boot`, 6 `log_line`; all of them are read.
const GROUP_FORMAT: u32 = 6;
const IDENTITY: &str = "agent.toml";
const GROUPS: &str = "groups";
const ACTIVITY: &str = "activity.toml";
const BITMAP_MAGIC: &[u8; 8] = b"FSBITMP1";
/// Longest state file that is read: far above a group of the most volumes.
const STATE_BYTES_MAX: u64 = 1 << 20;
/// Longest bitmap: a volume of 64 TiB.
const BITMAP_BYTES_MAX: u64 = 128 << 20;

/// Whose state this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Owner {
    format: u32,
    vault: String,
    host: String,
}

/// What is kept of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    /// Layout version.
    pub format: u32,
    /// Line of history.
    pub generation: u32,
    /// Life of the stream, as its batches say.
    pub incarnation: u64,
    /// Number of the newest ring file.
    pub ring: u64,
    /// Requests are, or were when the host went down, served through the filter.
    pub attached: bool,
    /// A difference between source and replica is possible anywhere: compare everything, whatever else this file says.
    pub compare_everything: bool,
    /// Boot in which requests went through the filter since the last start, without a break; none: they may have gone past it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// Batches of this group are in the disk log: number of its line there, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_line: Option<String>,
    /// Number of the last batch known to be durable at the target.
    pub last_number: u64,
    /// Its chain hash, hexadecimal.
    pub last_chain: String,
    /// Number of the next volume.
    pub next_volume: u16,
    /// Protected volumes.
    #[serde(default, rename = "volume")]
    pub volumes: Vec<VolumeState>,
    /// Volumes that left. The target keeps their history under these numbers, so one of the same name gets its number again.
    #[serde(default, rename = "left")]
    pub left: Vec<VolumeState>,
}

/// What is kept of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeState {
    /// Number in the group.
    pub index: u16,
    /// Name in the group.
    pub name: String,
    /// Block device or image file.
    pub source: PathBuf,
    /// What tells whether it is still the same device.
    pub identity: String,
    /// Bytes.
    pub size: u64,
    /// Logical block in bytes.
    pub block: u32,
    /// `ublk`, `ublk:N`, `nbd+unix:PATH` or `nbd+tcp:ADDR`.
    pub frontend: String,
    /// Its initial sync ended: points include it.
    pub joined: bool,
    /// Its last block device, where it is served over ublk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ublk: Option<UblkDisk>,
    /// The device that leads requests through us, where the device mapper does; none: the source itself is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapped: Option<Mapped>,
    /// What the last orderly stop knew of the source. None while it is served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Evidence>,
    /// What verify knows of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyState>,
}

/// What is kept of the host's activity log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// Layout version: 1.
    pub format: u32,
    /// Where it is.
    pub path: PathBuf,
    /// Random number of its life, hexadecimal.
    pub life: String,
    /// It covers every write: what it does not name cannot differ.
    pub upheld: bool,
    /// Boot that the life is of.
    pub boot: String,
    /// A flush failed in this boot: until the next, no log covers what the devices hold.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unstable: bool,
}

/// A device-mapper device whose requests we are put below of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapped {
    /// What its users have: the source, or the stub over it. [`VolumeState::identity`] is of this one.
    pub upper: PathBuf,
    /// The stub that was made over the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stub: Option<StubState>,
}

/// A linear device over a bare disk, made by us.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StubState {
    /// Its name in the device mapper.
    pub name: String,
    /// What tells whether the source is still the disk that it was made over.
    pub disk: String,
}

/// A block device that outlives the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UblkDisk {
    /// The N of `/dev/ublkbN`. Asked for again when the device is made anew.
    pub id: u32,
    /// The kernel's `diskseq` of it; none: it was removed in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Boot that the number is of.
    pub boot: String,
}

impl GroupState {
    /// A group without volumes.
    #[must_use]
    pub fn new() -> Self {
        Self {
            format: GROUP_FORMAT,
            generation: 0,
            incarnation: 0,
            ring: 0,
            attached: false,
            compare_everything: false,
            boot: None,
            log_line: None,
            last_number: 0,
            last_chain: "00".repeat(32),
            next_volume: 0,
            volumes: Vec::new(),
            left: Vec::new(),
        }
    }
}

impl GroupState {
    /// There is something to protect, to recover, or (of a volume that left) to say to the target.
    #[must_use]
    pub(crate) fn is_live(&self) -> bool {
        let left = self.left.iter().any(|left| left.joined);
        self.attached || !self.volumes.is_empty() || left || self.log_line.is_some()
    }

    /// Its line in the disk log. A number that makes no sense is that of a line which nobody has.
    pub(crate) fn line(&self, group: GroupId) -> Option<Line> {
        let text = self.log_line.as_ref()?;
        Some(Line { group, number: u64::from_str_radix(text, 16).unwrap_or(u64::MAX) })
    }
}

impl Default for GroupState {
    fn default() -> Self {
        Self::new()
    }
}

/// What a look into a state directory found of each group.
pub type Groups = Vec<(Name, Result<GroupState>)>;

/// Reads the groups of a state directory without taking it: for tools beside a running agent, whatever vault and host it is of.
/// Groups that are only remembered (nothing is protected) are among them.
///
/// # Errors
/// When the folder cannot be read, or is no state directory: an empty one may be a mount point without its file system. What is
/// wrong with a group's file stands in its place.
pub fn look(folder: &Path) -> Result<Groups> {
    let opened = farshore_uring::DirStorage::open(folder).map_err(|error| Error::io("open", folder, error))?;
    std::fs::metadata(folder.join(IDENTITY)).map_err(|error| Error::io("find", &folder.join(IDENTITY), error))?;
    let state = StateDir { storage: opened, shown: folder.to_owned() };
    let read = |name: Name| state.read_group(&name).transpose().map(|group| (name, group));
    Ok(state.groups()?.into_iter().filter_map(read).collect())
}

/// Notes, durably, that a group's volumes are or were written past the agent, for those who do not take the directory: the next
/// start compares everything, also after the host went down. Blocks.
///
/// # Errors
/// When it cannot be written.
pub fn note_bypassed(folder: &Path, group: &Name) -> Result<()> {
    let storage = farshore_uring::DirStorage::open(folder).map_err(|error| Error::io("open", folder, error))?;
    let path = bypassed_file(group);
    let noted = match storage.open(&path, OpenMode::CreateNew) {
        Ok(file) => file.sync(),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    noted.and_then(|()| storage.sync_dir(Path::new(GROUPS))).map_err(|e| Error::io("write", &folder.join(path), e))
}

/// How long another process may still hold what it locked: a worker that was killed a moment ago.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// Takes the lock of a file or folder for this process alone; its end gives it back. Waits for a process that is about to be gone.
///
/// # Errors
/// `ResourceBusy`: another agent has it.
pub(crate) fn lock_alone(file: &File) -> std::io::Result<()> {
    let end = clock::now().plus(LOCK_WAIT);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if clock::now() < end => {
                let _ = nix::poll::poll(&mut [], 20u8);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(std::io::Error::new(std::io::ErrorKind::ResourceBusy, "another agent uses it"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Takes a state directory for this process: whoever writes it keeps in memory what it says, so a second one would undo what the first has
/// recorded ("compare everything", a new incarnation). Rings and sockets may lie elsewhere for each, so they do not tell.
///
/// # Errors
/// [`Error::Refused`]: another agent has it.
pub(crate) fn lock_state(folder: &Path) -> Result<File> {
    let lock = File::open(folder).map_err(|error| Error::io("open", folder, error))?;
    match lock_alone(&lock) {
        Ok(()) => Ok(lock),
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Err(Error::Refused {
            what: format!("state directory {}", folder.display()),
            reason: error.to_string(),
            hint: "stop that one, or give each agent a state directory of its own (--state)".into(),
        }),
        Err(error) => Err(Error::io("lock", folder, error)),
    }
}

/// What the state directory says of the activity log, for those who do not take the directory. `None`: nothing.
pub(crate) fn look_at_log(folder: &Path) -> Option<LogState> {
    let storage = farshore_uring::DirStorage::open(folder).ok()?;
    StateDir { storage, shown: folder.to_owned() }.read_log_state().ok()?
}

/// The state directory of one agent.
#[derive(Clone)]
pub struct StateDir<S> {
    storage: S,
    shown: PathBuf,
}

impl<S: Storage> StateDir<S> {
    /// Opens the directory, or makes it the state of `host` in `vault` if it is empty. `shown` is its path, for messages.
    ///
    /// # Errors
    /// [`Error::Refused`] for the state of another host or vault; [`Error::State`] for a damaged or newer file.
    pub fn open(storage: S, shown: &Path, vault: VaultId, host: &Name) -> Result<Self> {
        let state = Self { storage, shown: shown.to_owned() };
        state.storage.create_dir_all(Path::new(GROUPS)).map_err(|e| Error::io("create state folder", shown, e))?;
        let ours = Owner { format: FORMAT, vault: vault.to_string(), host: host.to_string() };
        match state.read_document::<Owner>(Path::new(IDENTITY))? {
            None => state.write_document(Path::new(IDENTITY), &ours)?,
            Some(owner) if owner.format != FORMAT => {
                return Err(
                    state.damaged(IDENTITY, format!("is of format {}, this build reads {FORMAT}", owner.format))
                );
            }
            Some(owner) if owner != ours => {
                return Err(Error::Refused {
                    what: format!("state directory {}", shown.display()),
                    reason: format!("belongs to host {} of vault {}", owner.host, owner.vault),
                    hint: "give each agent a state directory of its own (--state)".into(),
                });
            }
            Some(_) => {}
        }
        Ok(state)
    }

    /// Names of the groups that have state.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn groups(&self) -> Result<Vec<Name>> {
        let names = self.storage.list(Path::new(GROUPS)).map_err(|e| Error::io("list groups in", &self.shown, e))?;
        names
            .iter()
            .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
            .filter_map(|path| path.file_stem()?.to_str())
            .map(|stem| Name::new(stem).map_err(Error::from))
            .collect()
    }

    /// Reads a group's state; `None` if there is none yet.
    ///
    /// # Errors
    /// [`Error::State`] for a damaged file: the caller must not guess.
    pub fn read_group(&self, group: &Name) -> Result<Option<GroupState>> {
        let path = group_file(group);
        let state: Option<GroupState> = self.read_document(&path)?;
        match state {
            Some(state) if !(1..=GROUP_FORMAT).contains(&state.format) => {
                Err(self.damaged(&path, format!("is of format {}, this build reads 1 to {GROUP_FORMAT}", state.format)))
            }
            // Written in the newest one from now on.
            other => Ok(other.map(|state| GroupState { format: GROUP_FORMAT, ..state })),
        }
    }

    /// Replaces a group's state, durably.
    ///
    /// # Errors
    /// When it cannot be written; the old state is kept then.
    pub fn write_group(&self, group: &Name, state: &GroupState) -> Result<()> {
        self.write_document(&group_file(group), state)
    }

    /// Removes a group's state.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove_group(&self, group: &Name) -> Result<()> {
        let path = group_file(group);
        let removed = self.storage.remove(&path).and_then(|()| self.storage.sync_dir(Path::new(GROUPS)));
        removed.map_err(|e| Error::io("remove", &self.shown.join(path), e))
    }

    /// What was kept of the activity log; `None`: nothing yet.
    ///
    /// # Errors
    /// [`Error::State`] for a damaged file.
    pub fn read_log_state(&self) -> Result<Option<LogState>> {
        self.read_document(Path::new(ACTIVITY))
    }

    /// Replaces what is kept of the activity log, durably.
    ///
    /// # Errors
    /// When it cannot be written; it is as before then.
    pub fn write_log_state(&self, state: &LogState) -> Result<()> {
        self.write_document(Path::new(ACTIVITY), state)
    }

    /// Removes the marks that were saved at the last stop: they are kept elsewhere from now on. That they stay would do no harm, but
    /// for a compare more than needed.
    pub fn remove_bitmap(&self, group: &Name, volume: u16) {
        if let Err(error) = self.storage.remove(&bitmap_file(group, volume)) {
            tracing::debug!(%group, volume, %error, "saved marks stay");
        }
    }

    /// The group's volumes were written past the agent ([`note_bypassed`]).
    ///
    /// # Errors
    /// When that cannot be seen.
    pub fn is_bypassed(&self, group: &Name) -> Result<bool> {
        let path = bypassed_file(group);
        self.storage.exists(&path).map_err(|e| Error::io("look for", &self.shown.join(path), e))
    }

    /// That is kept elsewhere by now.
    ///
    /// # Errors
    /// When the note stays.
    pub fn forget_bypassed(&self, group: &Name) -> Result<()> {
        let path = bypassed_file(group);
        let removed = self.storage.remove(&path).and_then(|()| self.storage.sync_dir(Path::new(GROUPS)));
        removed.map_err(|e| Error::io("remove", &self.shown.join(path), e))
    }

    /// Saves the slots with a bit set, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_bitmap(&self, group: &Name, volume: u16, words: &[u64]) -> Result<()> {
        let mut bytes = BITMAP_MAGIC.to_vec();
        bytes.extend_from_slice(&(words.len() as u64).to_le_bytes());
        for word in words {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let hash = *blake3::hash(&bytes).as_bytes();
        bytes.extend_from_slice(&hash);
        let path = bitmap_file(group, volume);
        replace_file(&self.storage, &path, &bytes).map_err(|e| Error::io("write", &self.shown.join(path), e))
    }

    /// Reads what [`Self::write_bitmap`] saved; `None` if nothing was.
    ///
    /// # Errors
    /// [`Error::State`] for a damaged file: the caller compares everything.
    pub fn read_bitmap(&self, group: &Name, volume: u16) -> Result<Option<Vec<u64>>> {
        let path = bitmap_file(group, volume);
        let Some(bytes) = self.read_bytes(&path, BITMAP_BYTES_MAX + 48)? else { return Ok(None) };
        let whole = bytes.split_last_chunk::<32>().filter(|(body, hash)| blake3::hash(body).as_bytes() == *hash);
        let words = whole.and_then(|(body, _)| {
            let words = body.strip_prefix(BITMAP_MAGIC)?.get(8..)?;
            let count = u64::from_le_bytes(body.get(8..16)?.try_into().ok()?);
            (words.len() as u64 == count.checked_mul(8)?).then(|| {
                words.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("chunks of eight"))).collect()
            })
        });
        words.map(Some).ok_or_else(|| self.damaged(path, "checksum differs".into()))
    }

    fn damaged(&self, path: impl AsRef<Path>, reason: String) -> Error {
        Error::State { path: self.shown.join(path), reason }
    }

    fn read_bytes(&self, path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
        let read = || -> std::io::Result<Option<Vec<u8>>> {
            if !self.storage.exists(path)? {
                return Ok(None);
            }
            let file = self.storage.open(path, OpenMode::Read)?;
            let len = file.len()?;
            if len > limit {
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "is longer than such a file can be"));
            }
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            file.read_at(&mut bytes, 0)?;
            Ok(Some(bytes))
        };
        read().map_err(|e| Error::io("read", &self.shown.join(path), e))
    }

    /// A document is TOML behind a first line with the hash of the rest.
    fn read_document<T: serde::de::DeserializeOwned>(&self, path: &Path) -> Result<Option<T>> {
        let Some(bytes) = self.read_bytes(path, STATE_BYTES_MAX)? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|_| self.damaged(path, "is not text".into()))?;
        let (first, body) = text.split_once('\n').unwrap_or((&text, ""));
        if first.strip_prefix("# blake3 ") != Some(blake3::hash(body.as_bytes()).to_hex().as_str()) {
            return Err(self.damaged(path, "checksum differs".into()));
        }
        toml::from_str(body).map(Some).map_err(|error| self.damaged(path, error.message().into()))
    }

    fn write_document<T: Serialize>(&self, path: &Path, value: &T) -> Result<()> {
        let body = toml::to_string(value).map_err(|error| self.damaged(path, error.to_string()))?;
        let text = format!("# blake3 {}\n{body}", blake3::hash(body.as_bytes()).to_hex());
        replace_file(&self.storage, path, text.as_bytes()).map_err(|e| Error::io("write", &self.shown.join(path), e))
    }
}

fn group_file(group: &Name) -> PathBuf {
    PathBuf::from(GROUPS).join(format!("{group}.toml"))
}

fn bypassed_file(group: &Name) -> PathBuf {
    PathBuf::from(GROUPS).join(format!("{group}.bypassed"))
}

fn bitmap_file(group: &Name, volume: u16) -> PathBuf {
    PathBuf::from(GROUPS).join(format!("{group}.{volume}.missing"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path) -> StateDir<farshore_uring::DirStorage> {
        let storage = farshore_uring::DirStorage::open(folder).expect("a folder");
        StateDir::open(storage, folder, VaultId([1; 16]), &Name::new("host").expect("good")).expect("ours")
    }

    fn write(folder: &Path, body: &str) {
        let text = format!("# blake3 {}\n{body}", blake3::hash(body.as_bytes()).to_hex());
        std::fs::write(folder.join("groups/g.toml"), text).expect("room");
    }

    /// Goal: what builds before block devices have written is read, and a later format is not guessed at.
    #[test]
    fn older_formats_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, group) = (open(folder.path()), Name::new("g").expect("good"));
        let body = "format = 1\ngeneration = 2\nincarnation = 3\nring = 3\nattached = true\ncompare_everything = false\n\
                    last_number = 9\nlast_chain = \"00\"\nnext_volume = 1\n\n[[volume]]\nindex = 0\nname = \"v\"\n\
                    source = \"/dev/sdb\"\nidentity = \"x\"\nsize = 512\nblock = 512\nfrontend = \"nbd+unix:/a\"\njoined = true\n";
        write(folder.path(), body);
        let mut state = store.read_group(&group).expect("read").expect("there");
        assert_eq!((state.format, state.incarnation, &state.volumes[0].ublk), (6, 3, &None));
        write(folder.path(), &body.replace("format = 1", "format = 2"));
        assert_eq!(store.read_group(&group).expect("read"), Some(state.clone()));

        state.volumes[0].ublk = Some(UblkDisk { id: 3, sequence: Some(77), boot: "b".into() });
        state.left.push(VolumeState { index: 1, ublk: None, ..state.volumes[0].clone() });
        store.write_group(&group, &state).expect("written");
        assert_eq!(store.read_group(&group).expect("read"), Some(state.clone()));
        state.volumes[0].ublk = Some(UblkDisk { id: 3, sequence: None, boot: "b".into() });
        let stub = Some(StubState { name: "protected-g-v".into(), disk: "block serial=S size=512".into() });
        state.volumes[0].mapped = Some(Mapped { upper: "/dev/mapper/protected-g-v".into(), stub });
        state.volumes[0].evidence =
            Some(Evidence::File { inode: u64::MAX.to_string(), size: 512, changed: "7.000000001".into() });
        state.volumes[0].verify =
            Some(VerifyState { since: Some(7), differing: vec![(0, 512), (4096, 8192)], ..VerifyState::default() });
        store.write_group(&group, &state).expect("written");
        assert_eq!(store.read_group(&group).expect("read"), Some(state));

        let seen = look(folder.path()).expect("ours");
        assert!(matches!(&seen[..], [(name, Ok(found))] if *name == group && found.volumes.len() == 1), "{seen:?}");
        write(folder.path(), &body.replace("format = 1", "format = 7"));
        let error = store.read_group(&group).expect_err("newer").to_string();
        assert!(error.contains("format 7"), "{error}");
        let seen = look(folder.path()).expect("ours");
        assert!(matches!(&seen[..], [(_, Err(Error::State { .. }))]), "damage stands in the group's place: {seen:?}");
        look(&folder.path().join(GROUPS)).expect_err("no state directory");
    }
}
