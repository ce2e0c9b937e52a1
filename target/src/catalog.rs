//! The catalog: what must be known durably and is not in the journals. One small document, replaced as a whole. Byte
//! table: `docs/formats/catalog.md`; why one file: `docs/decisions/0002-catalog-is-one-file.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farshore_proto::batch::VolumeDecl;
use farshore_proto::{BatchNo, Generation, Incarnation, Name, PointId, VaultId, WallTime, codec};
use farshore_uring::{OpenMode, Storage, StorageFile, replace_file, replace_files};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::alarm::{AlarmCode, Alarms};
use crate::damage::Damaged;
use crate::error::{Error, IoContext, Kind, Result};

/// The catalog and its copy, below the data root.
const FILES: [&str; 2] = ["catalog", "catalog.copy"];
/// One stream's part, beside its base.
const HOST_FILE: &str = "state";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 64;
const MAGIC_CATALOG: [u8; 8] = *b"FSCATLG1";
const MAGIC_HOST: [u8; 8] = *b"FSHSTAT1";

/// Header of a catalog file and of a stream's state file.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Debug)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    reserved: [u8; 6],
    transaction: U64,
    vault: [u8; 16],
    body_len: U32,
    body_crc: U32,
    spare: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// A pin on history.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Hold {
    /// Number within the stream, never reused.
    pub id: u64,
    /// What is pinned, with all that it needs.
    pub point: PointId,
    /// Why: a view's name, a failover, a person's words.
    pub reason: String,
    /// Since when, target's clock.
    pub since: WallTime,
}

/// One stream.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct HostRecord {
    /// The host may write the group.
    pub member: bool,
    /// The stream's main line of history.
    pub generation: Generation,
    /// Oldest recoverable point; the base may have moved up to it.
    pub horizon: Option<PointId>,
    /// Pins.
    pub holds: Vec<Hold>,
    /// Number of the next hold.
    pub next_hold: u64,
    /// The volumes, as declared.
    pub volumes: Vec<VolumeDecl>,
    /// All frames of batches up to this one were opened and their ids recomputed.
    pub checked: BatchNo,
    /// Damage found.
    pub damaged: Vec<Damaged>,
    /// The stream must go on with a higher incarnation than this, comparing everything: batches were lost here.
    pub start_over: Option<Incarnation>,
    /// Further facts by name, kept for other parts of the target (open views, …).
    pub notes: BTreeMap<String, String>,
}

/// One group.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct GroupRecord {
    /// Its hosts, by name.
    pub hosts: BTreeMap<Name, HostRecord>,
    /// Policies, by key.
    pub policy: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
struct Document {
    groups: BTreeMap<Name, GroupRecord>,
    /// Why retention may not move a horizon, if so.
    retention_suspended: Option<String>,
}

/// A stream's state file: its record and its group's policy, enough to make the catalog again.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
struct HostState {
    group: Name,
    host: Name,
    record: HostRecord,
    policy: BTreeMap<String, String>,
}

/// The catalog, open.
///
/// Every change writes, in this order, each step durable before the next:
/// 1. the state files of the streams that it touches (beside their bases),
/// 2. `catalog.copy` and `catalog`, which share the sync of their folder; each file by a temporary file and a rename.
///
/// So after a crash at any step:
/// - each file is whole, the old or the new one; the readable one with the highest transaction number is what counts;
/// - a change that was reported as done is in both catalog files; one that was not may have happened, never half: one
///   document holds all of it;
/// - with both catalog files lost, the state files hold every change that was reported as done, or later ones.
pub struct Catalog<S: Storage> {
    storage: S,
    vault: VaultId,
    inner: Mutex<Inner>,
}

struct Inner {
    document: Document,
    /// Highest number that may stand in a file, that of a failed change included.
    transaction: u64,
}

enum Found<T> {
    Missing,
    Bad(String),
    Good(u64, T),
}

impl<S: Storage> Catalog<S> {
    /// Opens the catalog below the storage's root; makes an empty one in an empty root; mends one bad copy from the
    /// other; makes both again from the streams' state files when both are bad.
    ///
    /// # Errors
    /// [`Kind::Foreign`] for another vault or a version that this build does not read; otherwise from the disk.
    pub fn open(storage: S, vault: VaultId, alarms: &Alarms) -> Result<Self> {
        let [first, second] = [read_document(&storage, vault, FILES[0])?, read_document(&storage, vault, FILES[1])?];
        let newest = |a: (u64, Document), b: (u64, Document)| if a.0 >= b.0 { a } else { b };
        let (transaction, document) = match (first, second) {
            (Found::Good(a, first), Found::Good(b, second)) => newest((a, first), (b, second)),
            (Found::Good(number, document), other) | (other, Found::Good(number, document)) => {
                if let Found::Bad(reason) = &other {
                    tracing::warn!(reason, "one copy of the catalog was unreadable; made again from the other");
                    alarms.raise(AlarmCode::CatalogCopyDamaged, "", reason);
                }
                (number, document)
            }
            (Found::Missing, Found::Missing) if stream_folders(&storage)?.is_empty() => (0, Document::default()),
            _ => rebuild(&storage, vault, alarms)?,
        };
        let catalog = Self { storage, vault, inner: Mutex::new(Inner { document, transaction }) };
        // Rewriting both makes them equal again whatever was found.
        catalog.change(|_| Ok(Vec::new()))?;
        Ok(catalog)
    }

    /// What is known of one stream.
    #[must_use]
    pub fn host(&self, group: &Name, host: &Name) -> Option<HostRecord> {
        self.lock().document.groups.get(group)?.hosts.get(host).cloned()
    }

    /// The group's policies, by key.
    #[must_use]
    pub fn policy(&self, group: &Name) -> BTreeMap<String, String> {
        self.lock().document.groups.get(group).map(|group| group.policy.clone()).unwrap_or_default()
    }

    /// All groups.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<Name, GroupRecord> {
        self.lock().document.groups.clone()
    }

    /// Why no horizon may move, if so.
    #[must_use]
    pub fn retention_suspended(&self) -> Option<String> {
        self.lock().document.retention_suspended.clone()
    }

    /// An operator looked at a rebuilt catalog and says that its holds are complete: retention may go on.
    ///
    /// # Errors
    /// From the disk.
    pub fn resume_retention(&self) -> Result<()> {
        self.change(|document| {
            document.retention_suspended = None;
            Ok(Vec::new())
        })
    }

    /// Changes one stream's record, which comes into being with this where it is new. Durable at `Ok`.
    ///
    /// # Errors
    /// From the disk; then the record is on disk as before or as changed, and in memory as before.
    pub fn update_host<T>(&self, group: &Name, host: &Name, change: impl FnOnce(&mut HostRecord) -> T) -> Result<T> {
        let mut out = None;
        self.change(|document| {
            let record = document.groups.entry(group.clone()).or_default().hosts.entry(host.clone()).or_default();
            out = Some(change(record));
            Ok(vec![(group.clone(), host.clone())])
        })?;
        Ok(out.expect("the change above ran: it returned Ok"))
    }

    /// Sets, or with `None` removes, one key of a group's policy. Durable at `Ok`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a group that does not exist; otherwise from the disk.
    pub fn set_policy(&self, group: &Name, key: &str, value: Option<&str>) -> Result<()> {
        self.change(|document| {
            let Some(record) = document.groups.get_mut(group) else {
                return Err(Error::new(Kind::NotFound, format!("group {group}")));
            };
            match value {
                Some(value) => drop(record.policy.insert(key.to_owned(), value.to_owned())),
                None => drop(record.policy.remove(key)),
            }
            Ok(record.hosts.keys().map(|host| (group.clone(), host.clone())).collect())
        })
    }

    fn change(&self, change: impl FnOnce(&mut Document) -> Result<Vec<(Name, Name)>>) -> Result<()> {
        let mut inner = self.lock();
        let mut document = inner.document.clone();
        let touched = change(&mut document)?;
        let body = encode("catalog", &document)?;
        inner.transaction += 1;
        for (group, host) in &touched {
            self.write_state(&document, inner.transaction, group, host)?;
        }
        let bytes = framed(MAGIC_CATALOG, self.vault, inner.transaction, &body);
        replace_files(&self.storage, &FILES.map(Path::new), &bytes).at("replace", Path::new(FILES[0]))?;
        inner.document = document;
        Ok(())
    }

    fn write_state(&self, document: &Document, transaction: u64, group: &Name, host: &Name) -> Result<()> {
        let Some(record) = document.groups.get(group) else { return Ok(()) };
        let Some(host_record) = record.hosts.get(host) else { return Ok(()) };
        let state = HostState {
            group: group.clone(),
            host: host.clone(),
            record: host_record.clone(),
            policy: record.policy.clone(),
        };
        let body = encode("state of a stream", &state)?;
        let folder = host_folder(group.as_str(), host.as_str());
        self.storage.create_dir_all(&folder).at("create", &folder)?;
        let path = folder.join(HOST_FILE);
        replace_file(&self.storage, &path, &framed(MAGIC_HOST, self.vault, transaction, &body)).at("replace", &path)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Checks both copies as stored, without mending anything: every byte is covered by a checksum or must be zero.
///
/// # Errors
/// [`Kind::Damaged`] naming the file; otherwise from the disk.
pub fn verify<S: Storage>(storage: &S, vault: VaultId) -> Result<()> {
    for name in FILES {
        match read_document(storage, vault, name)? {
            Found::Good(..) => {}
            Found::Missing => return Err(Error::new(Kind::Damaged, format!("{name}: missing"))),
            Found::Bad(reason) => return Err(Error::new(Kind::Damaged, format!("{name}: {reason}"))),
        }
    }
    Ok(())
}

fn encode<T: bincode::Encode>(what: &'static str, value: &T) -> Result<Vec<u8>> {
    let full = || Error::new(Kind::Refused, format!("{what}: over its limit of 1 MiB: remove groups, holds or notes"));
    let body = codec::encode(what, value).map_err(|error| full().caused(error))?;
    if body.len() <= codec::ENCODED_BYTES_MAX { Ok(body) } else { Err(full()) }
}

fn host_folder(group: &str, host: &str) -> PathBuf {
    Path::new("groups").join(group).join(host)
}

fn framed(magic: [u8; 8], vault: VaultId, transaction: u64, body: &[u8]) -> Vec<u8> {
    let mut header = Header {
        magic,
        version: VERSION.into(),
        reserved: [0; 6],
        transaction: transaction.into(),
        vault: vault.0,
        body_len: u32::try_from(body.len()).expect("the codec's limit is 1 MiB").into(),
        body_crc: crc_fast::crc32_iscsi(body).into(),
        spare: [0; 12],
        crc: U32::ZERO,
    };
    header.crc = crc_fast::crc32_iscsi(&header.as_bytes()[..HEADER_BYTES - 4]).into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn read_all<S: Storage>(storage: &S, path: &Path) -> Result<Option<Vec<u8>>> {
    if !storage.exists(path).at("look for", path)? {
        return Ok(None);
    }
    let file = storage.open(path, OpenMode::Read).at("open", path)?;
    let limit = (HEADER_BYTES + codec::ENCODED_BYTES_MAX) as u64;
    // One byte more than any good file has shows that there is too much.
    let len = file.len().at("measure", path)?.min(limit + 1);
    let mut bytes = vec![0; usize::try_from(len).expect("below the limit above")];
    file.read_at(&mut bytes, 0).at("read", path)?;
    Ok(Some(bytes))
}

fn read_framed<S: Storage, T: bincode::Decode<()>>(
    storage: &S,
    vault: VaultId,
    path: &Path,
    magic: [u8; 8],
) -> Result<Found<T>> {
    let Some(bytes) = read_all(storage, path)? else { return Ok(Found::Missing) };
    let Ok((header, body)) = Header::read_from_prefix(&bytes) else {
        return Ok(Found::Bad(format!("{} bytes are too few", bytes.len())));
    };
    if header.magic != magic {
        return Ok(Found::Bad("not one of ours (magic number differs)".into()));
    }
    if crc_fast::crc32_iscsi(&bytes[..HEADER_BYTES - 4]) != header.crc.get() {
        return Ok(Found::Bad("checksum of the header differs".into()));
    }
    if header.version.get() != VERSION {
        let what = format!("{}: version {}, this build reads {VERSION}", path.display(), header.version);
        return Err(Error::new(Kind::Foreign, what));
    }
    if header.vault != vault.0 {
        let theirs = VaultId(header.vault);
        let what = format!("{}: belongs to vault {theirs}, this target serves {vault}", path.display());
        return Err(Error::new(Kind::Foreign, what));
    }
    if body.len() != header.body_len.get() as usize || crc_fast::crc32_iscsi(body) != header.body_crc.get() {
        return Ok(Found::Bad("checksum of the body differs".into()));
    }
    Ok(match codec::decode("catalog", body) {
        Ok(value) => Found::Good(header.transaction.get(), value),
        Err(error) => Found::Bad(error.to_string()),
    })
}

fn read_document<S: Storage>(storage: &S, vault: VaultId, name: &str) -> Result<Found<Document>> {
    read_framed(storage, vault, Path::new(name), MAGIC_CATALOG)
}

/// Names of all stream folders: `(group, host)`.
pub(crate) fn stream_folders<S: Storage>(storage: &S) -> Result<Vec<(Name, Name)>> {
    let root = Path::new("groups");
    if !storage.exists(root).at("look for", root)? {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for group in names(storage, root)? {
        for host in names(storage, &root.join(group.as_str()))? {
            found.push((group.clone(), host));
        }
    }
    Ok(found)
}

fn names<S: Storage>(storage: &S, folder: &Path) -> Result<Vec<Name>> {
    let mut found = Vec::new();
    for path in storage.list(folder).at("list", folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        found.push(Name::new(name.clone()).map_err(|error| {
            let what = format!("{}: {name:?} is not ours: move it away", folder.display());
            Error::new(Kind::Foreign, what).caused(error)
        })?);
    }
    Ok(found)
}

/// Makes the document again from the streams' state files. A stream without a readable one keeps its journal (its volumes
/// and points come from there), but its holds are unknown, so no horizon may move until a person says so.
fn rebuild<S: Storage>(storage: &S, vault: VaultId, alarms: &Alarms) -> Result<(u64, Document)> {
    let mut document = Document::default();
    let (mut transaction, mut lost) = (0, Vec::new());
    for (group, host) in stream_folders(storage)? {
        let path = host_folder(group.as_str(), host.as_str()).join(HOST_FILE);
        let record = document.groups.entry(group.clone()).or_default();
        match read_framed::<S, HostState>(storage, vault, &path, MAGIC_HOST)? {
            Found::Good(number, state) => {
                transaction = transaction.max(number);
                record.policy.extend(state.policy);
                record.hosts.insert(host, state.record);
            }
            Found::Missing | Found::Bad(_) => {
                lost.push(format!("{group}/{host}"));
                let unknown = HostRecord { member: true, generation: Generation(1), ..HostRecord::default() };
                record.hosts.insert(host, unknown);
            }
        }
    }
    let mut what = "both copies of the catalog were unreadable; it was made again from the streams' folders".to_owned();
    if !lost.is_empty() {
        what = format!("{what}; holds and policies are unknown of {}", lost.join(", "));
        document.retention_suspended = Some(what.clone());
    }
    tracing::error!(reason = what, "catalog rebuilt");
    alarms.raise(AlarmCode::CatalogRebuilt, "", &what);
    Ok((transaction, document))
}
