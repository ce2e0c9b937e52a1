//! Finds or makes a group's ring at the start, and says what that means for source and replica.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_blkfilter::{Content, mark_recovered};
use farshore_proto::{GroupId, HostId, Name, VaultId};
use farshore_ring::{Ring, RingConfig, RingIdentity};
use farshore_streamer::{CaptureRing, RingSource};
use farshore_uring::Storage;

use crate::state::{GroupState, StateDir};
use crate::{Error, Result};

/// Whose ring.
pub(crate) struct RingOwner {
    pub vault: VaultId,
    pub group: GroupId,
    pub host: HostId,
    pub name: Name,
    pub host_name: Name,
}

/// A ring, ready for use.
pub(crate) struct Attached {
    pub ring: Arc<Ring>,
    /// It is the last process's ring: what was not shipped is in it.
    pub resumed: bool,
    /// The marks saved at the last stop are all there is: nothing was served since.
    pub clean: bool,
    /// What is known of the volumes' difference to the replica.
    pub content: Content,
}

impl RingOwner {
    /// The ring's file in `dir`.
    pub(crate) fn file(&self, dir: &Path) -> PathBuf {
        dir.join(format!("farshore-{}-{}.ring", self.host_name, self.name))
    }

    fn identity(&self, state: &GroupState, boot: [u8; 16]) -> RingIdentity {
        RingIdentity {
            vault: self.vault.0,
            group: self.group.0,
            host: self.host.0,
            boot,
            // The ring's own number: a stream that starts over takes a new incarnation and keeps the ring.
            incarnation: state.ring,
            generation: 0,
        }
    }

    /// Opens the ring that an unclean stop left, or makes one. `state` is changed and written before a ring of a new
    /// incarnation exists, and says `attached` when this returns.
    ///
    /// # Errors
    /// When another agent has the ring, or neither ring nor state can be written.
    pub(crate) fn attach<S: Storage>(
        &self,
        dir: &Path,
        slab_bytes: u64,
        state: &mut GroupState,
        store: &StateDir<S>,
    ) -> Result<Attached> {
        let boot = boot_id()?;
        let path = self.file(dir);
        let mut clean = !state.attached;
        if state.attached {
            match Ring::open(&path, &self.identity(state, boot)) {
                // The streamer stores its state before the first request is served. So the last start was cut off, perhaps before
                // the saved marks were in this ring: they are taken again. (If that start had found its ring lost,
                // `compare_everything` says so.)
                Ok(found) if found.recovery().stream.is_none() => {
                    tracing::info!(group = %self.name, "the last start did not get as far as serving");
                    clean = true;
                }
                Ok(found) => {
                    let recovery = found.recovery();
                    tracing::info!(
                        group = %self.name,
                        writing = recovery.writing.len(),
                        entries = recovery.head - recovery.freed,
                        "ring of the last process found"
                    );
                    mark_recovered(&found);
                    let ring = Arc::new(found.resume());
                    if self.stream_fits(&ring, state)? {
                        let content = if state.compare_everything { Content::Unknown } else { Content::AsMarked };
                        return Ok(Attached { ring, resumed: true, clean: false, content });
                    }
                    tracing::warn!(group = %self.name, "the ring is of an older incarnation: everything is compared");
                    state.compare_everything = true;
                }
                Err(error @ farshore_ring::Error::InUse { .. }) => {
                    return Err(Error::Refused {
                        what: format!("group {}", self.name),
                        reason: error.to_string(),
                        hint: "two agents cannot protect one group; stop the other one".into(),
                    });
                }
                Err(error) => {
                    tracing::warn!(group = %self.name, %error, "the ring of the last process is lost: everything is compared");
                    state.compare_everything = true;
                }
            }
        }
        state.incarnation += 1;
        state.ring = state.incarnation;
        state.attached = true;
        store.write_group(&self.name, state)?;
        let config = RingConfig { identity: self.identity(state, boot), slab_bytes, descriptors: None };
        let ring = Ring::create(&path, &config)
            .map_err(|error| Error::failed(format!("ring {}", path.display()), crate::error::chain(&error)))?;
        let content = if state.compare_everything { Content::Unknown } else { Content::AsMarked };
        Ok(Attached { ring: Arc::new(ring), resumed: false, clean, content })
    }

    /// A kill between recording a new incarnation and telling the ring leaves a stream that must not go on.
    fn stream_fits(&self, ring: &Arc<Ring>, state: &GroupState) -> Result<bool> {
        let source =
            CaptureRing::new(Arc::clone(ring)).map_err(|error| Error::failed("ring", crate::error::chain(&error)))?;
        Ok(source.load_state().is_none_or(|stream| stream.incarnation.0 == state.incarnation))
    }
}

/// Id of this boot.
fn boot_id() -> Result<[u8; 16]> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|error| Error::io("read", path, error))?;
    let hex: String = text.trim().chars().filter(|c| *c != '-').collect();
    let id: VaultId = hex.parse().map_err(|_| Error::failed("boot id", "is not a UUID"))?;
    Ok(id.0)
}
