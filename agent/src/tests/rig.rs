//! What the tests share: one group's shared parts over memory, and a whole agent in a temporary folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::sync::SyncConfig;
use farshore_blkfilter::{CaptureConfig, CaptureGroup};
use farshore_link::identity::{Identity, Vault};
use farshore_proto::keys::{DedupKey, HostKey};
use farshore_proto::{GroupId, HostId, KeyEpoch, Name, Role, VaultId, VolumeIndex};
use farshore_ring::{Memory, Ring, RingConfig, RingIdentity};
use farshore_uring::DirStorage;
use serde_json::Value;
use tempfile::TempDir;

use crate::alarms::Alarms;
use crate::api::ProtectRequest;
use crate::config::AgentConfig;
use crate::shared::Shared;
use crate::state::{GroupState, StateDir, VolumeState};
use crate::sync_thread::{Restarts, SyncThread};
use crate::{Agent, Result, clock};

pub(super) fn name(text: &str) -> Name {
    Name::new(text).expect("a good name")
}

pub(super) fn ring() -> Arc<Ring> {
    let identity =
        RingIdentity { vault: [1; 16], group: [2; 16], host: [3; 16], boot: [4; 16], incarnation: 1, generation: 1 };
    let config = RingConfig { slab_bytes: 2 << 20, descriptors: Some(256), ..RingConfig::new(identity) };
    Arc::new(Ring::create_in_memory(&Memory::new(), &config).expect("memory"))
}

pub(super) fn key() -> DedupKey {
    HostKey::from_parts([7; 32], HostId([3; 16]), KeyEpoch(1)).dedup_key(GroupId([2; 16]))
}

pub(super) fn volume(index: u16, joined: bool) -> VolumeState {
    VolumeState {
        index,
        name: format!("v{index}"),
        source: PathBuf::from(format!("/nowhere/{index}")),
        identity: format!("id {index}"),
        size: 1 << 20,
        block: 512,
        frontend: format!("nbd+unix:/nowhere/{index}.sock"),
        joined,
        ublk: None,
        mapped: None,
        evidence: None,
        verify: None,
    }
}

/// A group's shared parts, with these volumes in its state and captured as absent ones.
pub(super) fn shared(volumes: &[VolumeState]) -> (TempDir, Arc<Shared>) {
    let (folder, shared) = shared_without(volumes);
    for volume in volumes {
        shared.add_absent(volume, volume.joined);
        assert!(shared.capture.volume(VolumeIndex(volume.index)).is_some());
    }
    (folder, shared)
}

/// The same, with nothing captured yet.
pub(super) fn shared_without(volumes: &[VolumeState]) -> (TempDir, Arc<Shared>) {
    let folder = tempfile::tempdir().expect("a folder");
    let storage = DirStorage::open(folder.path()).expect("it is there");
    let store = StateDir::open(storage, folder.path(), VaultId([1; 16]), &name("host")).expect("is empty");
    let capture = CaptureGroup::new(ring(), CaptureConfig::default());
    let sync = SyncThread::start(Arc::clone(&capture), SyncConfig::default(), key(), Restarts::default(), |_| {})
        .expect("a thread");
    let state = GroupState { volumes: volumes.to_vec(), next_volume: 16, ..GroupState::new() };
    let shared =
        Shared::new((name("g"), GroupId([7; 16])), capture, sync, Arc::<Alarms>::default(), (store, state), None);
    (folder, shared)
}

/// An agent that never reaches its target.
pub(super) struct Rig {
    folder: TempDir,
    vault: Vault,
}

impl Rig {
    pub(super) fn new() -> Self {
        let vault = Vault::in_memory(name("vault"), clock::wall()).expect("keys");
        Self { folder: tempfile::tempdir().expect("a folder"), vault }
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    pub(super) fn start(&self) -> Result<Agent> {
        let bundle = self.vault.issue(Role::Agent, name("host"), 365).expect("issued");
        let identity = Identity::from_bundle(&bundle, clock::wall()).expect("of this vault");
        let config = AgentConfig {
            identity: self.path("identity"),
            state: self.path("state"),
            // Nobody listens on the port of TCP's multiplexer, and QUIC's packets to it vanish.
            upstream: "127.0.0.1:1".into(),
            ring: 8 << 20,
            ring_dir: self.path("rings"),
            socket: self.path("agent.sock"),
            connections: 1,
            workers: 1,
            direct: true,
            worker_gap_max: Duration::from_secs(5),
            worker_hang_max: Duration::from_secs(2),
            activity_log: None,
            al_extents: 1024,
            disk_log: None,
            groups: BTreeMap::new(),
            file: None,
        };
        Agent::start(config, identity)
    }

    /// A new image.
    pub(super) fn image(&self, file: &str, bytes: u64) -> PathBuf {
        let path = self.path(file);
        std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).expect("room");
        path
    }

    pub(super) fn rings(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("rings")).expect("the agent made it");
        let paths = entries.map(|entry| entry.expect("readable").path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "ring")).collect()
    }
}

pub(super) fn protect(agent: &Agent, source: &Path, group: &str, volume: &str) -> Result<Value> {
    protect_at(agent, source, group, volume, None)
}

pub(super) fn protect_at(
    agent: &Agent,
    source: &Path,
    group: &str,
    volume: &str,
    frontend: Option<&str>,
) -> Result<Value> {
    agent.protect(&ProtectRequest {
        source: source.to_owned(),
        group: group.into(),
        name: Some(volume.into()),
        frontend: frontend.map(str::to_owned),
        dm: false,
    })
}

/// What nothing would be drained in anyway.
pub(super) const NO_DRAIN: Duration = Duration::ZERO;
