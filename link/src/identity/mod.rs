//! Vaults, and the bundles that make a machine one of a vault's members.

mod bundle;
mod certificate;
mod file;
mod vault;

use std::path::Path;

use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::{HostId, KeyEpoch, Name, Role, VaultId, WallTime};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

pub use bundle::Bundle;
pub(crate) use certificate::Certified;
pub use vault::Vault;

use crate::{Error, Result};

/// Role and name of a vault's member, as its certificate says.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PeerName {
    /// What it may be.
    pub role: Role,
    /// Which one it is.
    pub name: Name,
}

impl std::fmt::Display for PeerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// Data keys that came with an identity. Not shown by `Debug`.
#[derive(Clone)]
pub enum Keys {
    /// Relay, control, operator.
    None,
    /// An agent's: its own, one per epoch, oldest first.
    Host(Vec<HostKey>),
    /// A target's: the vault's, one per epoch, oldest first. Every host's key follows from them.
    Vault(Vec<(KeyEpoch, VaultKey)>),
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("Keys::None"),
            Self::Host(keys) => write!(f, "Keys::Host({} epochs)", keys.len()),
            Self::Vault(keys) => write!(f, "Keys::Vault({} epochs)", keys.len()),
        }
    }
}

/// A checked bundle: what a daemon is, and what it proves it with.
///
/// Invariant: the certificate is signed by the vault's CA, is valid at the time of loading, belongs to the private key, and
/// names exactly this vault, role and name.
pub struct Identity {
    /// The trust domain.
    pub vault: VaultId,
    /// Its name, for people.
    pub vault_name: Name,
    /// What the holder may be.
    pub role: Role,
    /// Which one it is.
    pub name: Name,
    /// The certificate's last moment.
    pub not_after: WallTime,
    /// Data keys of that role.
    pub keys: Keys,
    ca: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("vault", &self.vault)
            .field("role", &self.role)
            .field("name", &self.name)
            .field("not_after", &certificate::date(self.not_after))
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads a bundle file and checks everything in it against the system's clock.
    ///
    /// # Errors
    /// [`Error::Exposed`] if others may read the file or change it, [`Error::Expired`] with the date, [`Error::Malformed`] if
    /// the parts do not fit together (foreign CA, other role or name, other private key).
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_at(path, wall_now())
    }

    /// As [`Identity::load`], at a given time.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn load_at(path: &Path, now: WallTime) -> Result<Self> {
        let text = file::read_private(path)?;
        bundle::parse(&path.display().to_string(), &text, now)
    }

    /// Checks a bundle that is in memory.
    ///
    /// # Errors
    /// As [`Identity::load`], without those of the file.
    pub fn from_bundle(bundle: &Bundle, now: WallTime) -> Result<Self> {
        bundle::parse("bundle", bundle.as_toml(), now)
    }

    #[cfg(fuzzing)]
    pub(crate) fn from_text(text: &str, now: WallTime) -> Result<Self> {
        bundle::parse("bundle", text, now)
    }

    /// Role and name.
    #[must_use]
    pub fn peer_name(&self) -> PeerName {
        PeerName { role: self.role, name: self.name.clone() }
    }

    /// This member's id as a host.
    #[must_use]
    pub fn host_id(&self) -> HostId {
        HostId::derive(self.vault, &self.name)
    }

    /// The epoch under which new data is sealed; `None` where the role holds no keys.
    #[must_use]
    pub fn newest_epoch(&self) -> Option<KeyEpoch> {
        match &self.keys {
            Keys::None => None,
            Keys::Host(keys) => keys.iter().map(HostKey::epoch).max(),
            Keys::Vault(keys) => keys.iter().map(|(epoch, _)| *epoch).max(),
        }
    }

    /// The key of `host` of `epoch`: an agent has only its own, a target derives any.
    #[must_use]
    pub fn host_key(&self, host: HostId, epoch: KeyEpoch) -> Option<HostKey> {
        match &self.keys {
            Keys::None => None,
            Keys::Host(keys) => keys.iter().find(|key| key.host() == host && key.epoch() == epoch).cloned(),
            Keys::Vault(keys) => {
                let (_, key) = keys.iter().find(|(known, _)| *known == epoch)?;
                Some(HostKey::derive(key, host, epoch))
            }
        }
    }

    /// Whether the certificate is past its last moment.
    ///
    /// # Errors
    /// [`Error::Expired`] with the date.
    pub fn check_expiry(&self, now: WallTime) -> Result<()> {
        if now > self.not_after {
            return Err(Error::Expired { who: self.peer_name().to_string(), date: certificate::date(self.not_after) });
        }
        Ok(())
    }

    pub(crate) fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()))
    }

    /// A secret of this identity that survives restarts, for one purpose.
    pub(crate) fn secret(&self, context: &str) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(blake3::derive_key(context, &self.key))
    }
}

/// The system's clock, which certificates are checked against.
#[expect(
    clippy::disallowed_methods,
    reason = "certificates are valid by the wall clock; callers with a clock of their own use the _at functions"
)]
pub(crate) fn wall_now() -> WallTime {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::crypto("random bytes", error))?;
    Ok(bytes)
}

fn to_hex(bytes: &[u8]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(bytes.len() * 2));
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
        }
    }
    text
}

fn key_from_hex(what: &str, text: &str) -> Result<[u8; 32]> {
    let digits = text.as_bytes();
    let mut key = [0u8; 32];
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    if digits.len() != 64 {
        return Err(Error::malformed(what, "is not 64 hexadecimal digits"));
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = match (nibble(pair[0]), nibble(pair[1])) {
            (Some(high), Some(low)) => high << 4 | low,
            (None, _) | (_, None) => return Err(Error::malformed(what, "is not 64 hexadecimal digits")),
        };
    }
    Ok(key)
}
