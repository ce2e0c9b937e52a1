//! The keys of a target, and of one stream at it.

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore_proto::keys::{AnswerKey, DedupKey, HostKey, VaultKey};
use farshore_proto::{GroupId, HostId, KeyEpoch, VaultId};

use crate::error::{Error, Kind, Result};

/// A target's keys: those of its vault, by epoch.
#[derive(Clone)]
pub struct TargetKeys {
    vault: VaultId,
    epochs: Arc<BTreeMap<KeyEpoch, VaultKey>>,
}

impl std::fmt::Debug for TargetKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetKeys")
            .field("vault", &self.vault)
            .field("epochs", &self.epochs.len())
            .finish_non_exhaustive()
    }
}

impl TargetKeys {
    /// Wraps them.
    ///
    /// # Errors
    /// [`Kind::Refused`] without any key.
    pub fn new(vault: VaultId, epochs: impl IntoIterator<Item = (KeyEpoch, VaultKey)>) -> Result<Self> {
        let epochs: BTreeMap<_, _> = epochs.into_iter().collect();
        if epochs.is_empty() {
            return Err(Error::new(Kind::Refused, "the identity holds no vault key: a target needs a target's bundle"));
        }
        Ok(Self { vault, epochs: Arc::new(epochs) })
    }

    /// Trust domain.
    #[must_use]
    pub fn vault(&self) -> VaultId {
        self.vault
    }

    /// Key under which answers to `host` are authenticated: that of `epoch`, or of the newest one; `None` when this target was
    /// not given a key of that epoch.
    #[must_use]
    pub fn answer_key(&self, host: HostId, epoch: Option<KeyEpoch>) -> Option<AnswerKey> {
        let epoch = epoch.or_else(|| self.epochs.keys().next_back().copied())?;
        Some(HostKey::derive(self.epochs.get(&epoch)?, host, epoch).answer_key())
    }

    /// Keys of one stream.
    #[must_use]
    pub fn stream(&self, group: GroupId, host: HostId) -> StreamKeys {
        let keys = self.epochs.iter().map(|(epoch, key)| {
            let host_key = HostKey::derive(key, host, *epoch);
            let dedup = host_key.dedup_key(group);
            (*epoch, (host_key, dedup))
        });
        StreamKeys { keys: keys.collect() }
    }
}

/// One host's keys, with the dedup keys for one group.
pub struct StreamKeys {
    keys: BTreeMap<KeyEpoch, (HostKey, DedupKey)>,
}

impl StreamKeys {
    fn of(&self, epoch: KeyEpoch) -> Result<&(HostKey, DedupKey)> {
        self.keys.get(&epoch).ok_or_else(|| {
            let have: Vec<_> = self.keys.keys().map(ToString::to_string).collect();
            Error::new(Kind::Invalid, format!("key of epoch {epoch}: this target has {}", have.join(", ")))
        })
    }

    /// The host's key of one epoch.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an epoch that this target has no key of.
    pub fn host_key(&self, epoch: KeyEpoch) -> Result<&HostKey> {
        Ok(&self.of(epoch)?.0)
    }

    /// Computes chunk ids as a source does that seals with keys of `epoch`.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an epoch that this target has no key of.
    pub fn dedup_key(&self, epoch: KeyEpoch) -> Result<&DedupKey> {
        Ok(&self.of(epoch)?.1)
    }
}
