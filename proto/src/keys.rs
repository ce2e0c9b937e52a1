//! Keys and what is derived from what. All derivations are BLAKE3 in its key-derivation mode, each with a context of its
//! own, so that no key serves two purposes.
//!
//! ```text
//! vault key (targets, offline backup)
//!   └─ host key        = KDF(vault key, host, epoch)        all that an agent gets
//!        ├─ frame key  = KDF(host key, salt)                one per batch
//!        ├─ answer key = KDF(host key, "answers")           MACs of what the target tells the source
//!        └─ dedup key  = KDF(host key, group)               chunk ids of one dedup domain
//! ```

use zeroize::Zeroizing;

use crate::{ChainHash, ChunkId, GroupId, HostId, Incarnation, KeyEpoch};

const HOST_KEY: &str = "farshore 2026-11 host key v1";
const FRAME_KEY: &str = "farshore 2026-11 frame key v1";
const ANSWER_KEY: &str = "farshore 2026-11 answer key v1";
const DEDUP_KEY: &str = "farshore 2026-11 dedup key v1";
const SALT_KEY: &str = "farshore 2026-11 salt key v1";

type Secret = Zeroizing<[u8; 32]>;

fn derive(context: &str, parts: &[&[u8]]) -> Secret {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for part in parts {
        hasher.update(part);
    }
    Zeroizing::new(*hasher.finalize().as_bytes())
}

/// The vault's data key of one epoch. Lives at targets only.
#[derive(Clone)]
pub struct VaultKey(Secret);

impl VaultKey {
    /// Wraps 32 secret bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes, to be written into a target's bundle.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// One host's key of one epoch.
#[derive(Clone)]
pub struct HostKey {
    secret: Secret,
    host: HostId,
    epoch: KeyEpoch,
}

impl HostKey {
    /// What the vault gives to `host`.
    #[must_use]
    pub fn derive(vault_key: &VaultKey, host: HostId, epoch: KeyEpoch) -> Self {
        let secret = derive(HOST_KEY, &[vault_key.expose(), &host.0, &epoch.0.to_le_bytes()]);
        Self { secret, host, epoch }
    }

    /// From an agent's bundle.
    #[must_use]
    pub fn from_parts(secret: [u8; 32], host: HostId, epoch: KeyEpoch) -> Self {
        Self { secret: Zeroizing::new(secret), host, epoch }
    }

    /// The bytes, to be written into an agent's bundle.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.secret
    }

    /// Whose key this is.
    #[must_use]
    pub fn host(&self) -> HostId {
        self.host
    }

    /// Of which epoch.
    #[must_use]
    pub fn epoch(&self) -> KeyEpoch {
        self.epoch
    }

    /// A batch's salt. Fresh randomness alone would repeat after a clone of the virtual machine, and a repeated key and
    /// nonce is fatal to GCM; so the salt also depends on what the batch says and holds.
    #[must_use]
    pub fn salt(&self, fresh: &[u8; 32], incarnation: Incarnation, number: u64, chain: &ChainHash) -> [u8; 32] {
        let key = derive(SALT_KEY, &[&*self.secret]);
        let mut hasher = blake3::Hasher::new_keyed(&key);
        hasher.update(fresh).update(&self.host.0);
        hasher.update(&incarnation.0.to_le_bytes()).update(&number.to_le_bytes()).update(&chain.0);
        *hasher.finalize().as_bytes()
    }

    /// The key of all frames that carry `salt`.
    #[must_use]
    pub fn frame_key(&self, salt: &[u8; 32]) -> crate::frame::FrameKey {
        crate::frame::FrameKey::new(&derive(FRAME_KEY, &[&*self.secret, salt]), self.epoch, *salt)
    }

    /// The key under which the target vouches for its answers.
    #[must_use]
    pub fn answer_key(&self) -> AnswerKey {
        AnswerKey(derive(ANSWER_KEY, &[&*self.secret]))
    }

    /// The key of chunk ids in `group`.
    #[must_use]
    pub fn dedup_key(&self, group: GroupId) -> DedupKey {
        DedupKey(derive(DEDUP_KEY, &[&*self.secret, &group.0]))
    }
}

/// Computes chunk ids of one dedup domain.
#[derive(Clone)]
pub struct DedupKey(Secret);

impl DedupKey {
    /// The id of `content`.
    #[must_use]
    pub fn chunk_id(&self, content: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(&self.0, content).as_bytes())
    }

    /// The ids of many contents, handed to `give` with the content's index, in order.
    ///
    /// One at a time on purpose: sharing BLAKE3's lanes between contents would be half as fast again at 4 KiB, but its
    /// assembly for two inputs loads 16 bytes beyond the first, which is harmless only where the second lies behind it. A content at
    /// the end of the capture slab made that a fault.
    pub fn chunk_ids<'a>(&self, contents: impl IntoIterator<Item = &'a [u8]>, mut give: impl FnMut(usize, ChunkId)) {
        for (index, content) in contents.into_iter().enumerate() {
            give(index, self.chunk_id(content));
        }
    }
}

/// Authenticates answers from target to source, end to end.
#[derive(Clone)]
pub struct AnswerKey(Secret);

impl AnswerKey {
    /// MAC over one answer: bound to the session by the source's random `nonce` and to its place by `counter`, so that a
    /// relay can neither forge, replay nor re-order it.
    #[must_use]
    pub fn mac(&self, nonce: &[u8; 32], counter: u64, body: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(nonce).update(&counter.to_le_bytes()).update(body);
        *hasher.finalize().as_bytes()
    }

    /// Whether `mac` is right, in constant time.
    #[must_use]
    pub fn verify(&self, nonce: &[u8; 32], counter: u64, body: &[u8], mac: &[u8; 32]) -> bool {
        blake3::Hash::from_bytes(self.mac(nonce, counter, body)) == blake3::Hash::from_bytes(*mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_many_are_the_ids_of_each() {
        let key = DedupKey(Zeroizing::new([5; 32]));
        let bytes: Vec<u8> = (0..400_000_usize).map(|at| (at * at / 977).to_le_bytes()[0]).collect();
        let lengths = [4096, 512, 4096, 8192, 8192, 1024, 65536, 0, 2048, 16384];
        let contents: Vec<&[u8]> = (0..90)
            .map(|at| &bytes[at * 3000..][..lengths[at * at % 10].min(if at < 40 { usize::MAX } else { 4096 })])
            .collect();
        let mut ids = vec![None; contents.len()];
        key.chunk_ids(contents.iter().copied(), |index, id| assert!(ids[index].replace(id).is_none()));
        for (content, id) in contents.iter().zip(ids) {
            assert_eq!(id, Some(key.chunk_id(content)));
        }
    }
}
