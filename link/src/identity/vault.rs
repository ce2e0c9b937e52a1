//! The vault: a certificate authority and the data keys, in one folder of the operator's.

use std::path::{Path, PathBuf};

use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::{HostId, KeyEpoch, Name, Role, VaultId, WallTime};
use rcgen::{Issuer, KeyPair};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::bundle::{EPOCHS_MAX, KeyDocument, Parts};
use super::certificate::{self, MemberName};
use super::{Bundle, Keys, PeerName, file, key_from_hex, random, wall_now};
use crate::{Error, Result};

/// Version of the document's layout.
const FORMAT: u32 = 1;
const FILE: &str = "vault.toml";

/// Longest life of a member's certificate: it is the way back from a stolen one where no deny list reaches.
const DAYS_MAX: u32 = 3650;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    id: String,
    name: String,
    created: u64,
    ca: String,
    ca_private_key: String,
    keys: Vec<KeyDocument>,
}

impl Drop for Document {
    fn drop(&mut self) {
        self.ca_private_key.zeroize();
    }
}

/// One trust domain: who holds this folder decides who is a member.
pub struct Vault {
    id: VaultId,
    name: Name,
    created: WallTime,
    ca: String,
    ca_key: KeyPair,
    keys: Vec<(KeyEpoch, VaultKey)>,
    /// Where it is kept; `None` for one that lives in memory only.
    file: Option<PathBuf>,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vault({} {}, {} key epochs)", self.name, self.id, self.keys.len())
    }
}

impl Vault {
    /// Makes a vault in `dir`: a new id, CA and data key.
    ///
    /// # Errors
    /// [`Error::Exists`] if the folder holds one already; [`Error::File`], [`Error::Crypto`].
    ///
    /// # Durability
    /// On disk when this returns.
    pub fn init(dir: &Path, name: Name) -> Result<Self> {
        let path = dir.join(FILE);
        if path.symlink_metadata().is_ok() {
            return Err(Error::Exists { path });
        }
        file::create_private_dir(dir)?;
        let mut vault = Self::in_memory(name, wall_now())?;
        vault.file = Some(path);
        vault.save()?;
        Ok(vault)
    }

    /// Makes a vault that is kept nowhere, for demonstrations and tests.
    ///
    /// # Errors
    /// [`Error::Crypto`].
    pub fn in_memory(name: Name, now: WallTime) -> Result<Self> {
        let id = VaultId(random()?);
        let ca_key = KeyPair::generate().map_err(|error| Error::crypto("CA key", error))?;
        let certificate =
            certificate::ca_params(id, now)?.self_signed(&ca_key).map_err(|error| Error::crypto("CA", error))?;
        let keys = vec![(KeyEpoch(1), VaultKey::new(random()?))];
        Ok(Self { id, name, created: now, ca: certificate.pem(), ca_key, keys, file: None })
    }

    /// Opens the vault in `dir`.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Exposed`], [`Error::Malformed`].
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let what = path.display().to_string();
        let text = file::read_private(&path)?;
        // Only the message: the full error quotes the document, which holds keys.
        let document: Document =
            toml::from_str(&text).map_err(|error| Error::malformed(format!("{what}: not a vault"), error.message()))?;
        let bad = |part: &str, reason: &dyn std::fmt::Display| Error::malformed(format!("{what}: {part}"), reason);
        if document.format != FORMAT {
            return Err(bad("format", &format!("is {}, this build reads {FORMAT}", document.format)));
        }
        let ca_key = KeyPair::from_pem(&document.ca_private_key).map_err(|error| bad("ca_private_key", &error))?;
        let rising = document.keys.is_sorted_by(|a, b| a.epoch < b.epoch);
        if document.keys.is_empty() || document.keys.len() > EPOCHS_MAX || !rising || document.keys[0].epoch == 0 {
            return Err(bad("keys", &"epochs do not rise from 1"));
        }
        let read = |key: &KeyDocument| Ok((KeyEpoch(key.epoch), VaultKey::new(key_from_hex(&what, &key.key)?)));
        Ok(Self {
            id: document.id.parse().map_err(|error| bad("id", &error))?,
            name: Name::new(document.name.as_str()).map_err(|error| bad("name", &error))?,
            created: WallTime(document.created),
            ca: document.ca.clone(),
            ca_key,
            keys: document.keys.iter().map(read).collect::<Result<_>>()?,
            file: Some(path),
        })
    }

    /// Issues an identity that is valid for `days` (1 to 3650) from now on.
    ///
    /// # Errors
    /// [`Error::Setting`] for `days`, [`Error::Crypto`].
    pub fn issue(&self, role: Role, name: Name, days: u32) -> Result<Bundle> {
        self.issue_at(role, name, days, wall_now())
    }

    /// As [`Vault::issue`], from a given time on.
    ///
    /// # Errors
    /// As [`Vault::issue`].
    pub fn issue_at(&self, role: Role, name: Name, days: u32, now: WallTime) -> Result<Bundle> {
        if days == 0 || days > DAYS_MAX {
            return Err(Error::Setting { field: "days", reason: format!("is {days}, allowed are 1 to {DAYS_MAX}") });
        }
        let keys = self.keys_for(role, &name);
        let member = MemberName { vault: self.id, peer: PeerName { role, name } };
        let params = certificate::member_params(&member, now, days)?;
        let not_after = WallTime(u64::try_from(params.not_after.unix_timestamp()).unwrap_or(0) * 1_000_000_000);
        let key = KeyPair::generate().map_err(|error| Error::crypto("private key", error))?;
        let issuer = Issuer::new(certificate::ca_params(self.id, self.created)?, &self.ca_key);
        let signed = params.signed_by(&key, &issuer).map_err(|error| Error::crypto("certificate", error))?;
        Bundle::new(Parts {
            vault: self.id,
            vault_name: &self.name,
            peer: &member.peer,
            not_after,
            ca: &self.ca,
            certificate: signed.pem(),
            private_key: key.serialize_pem(),
            keys: &keys,
        })
    }

    /// Adds a data key of the next epoch. Bundles issued from now on carry it; older ones keep working with the older keys.
    ///
    /// # Errors
    /// [`Error::Setting`] after 1024 epochs; [`Error::File`].
    ///
    /// # Durability
    /// On disk when this returns; on an error the vault is unchanged.
    pub fn rotate_key(&mut self) -> Result<KeyEpoch> {
        let newest = self.keys.last().map_or(0, |(epoch, _)| epoch.0);
        if self.keys.len() >= EPOCHS_MAX {
            return Err(Error::Setting { field: "keys", reason: "has 1024 epochs already".to_owned() });
        }
        let epoch = KeyEpoch(newest + 1);
        self.keys.push((epoch, VaultKey::new(random()?)));
        if let Err(error) = self.save() {
            self.keys.pop();
            return Err(error);
        }
        Ok(epoch)
    }

    /// The trust domain's id.
    #[must_use]
    pub fn id(&self) -> VaultId {
        self.id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The data keys, oldest first: what the operator's offline backup needs besides the folder.
    #[must_use]
    pub fn keys(&self) -> &[(KeyEpoch, VaultKey)] {
        &self.keys
    }

    fn keys_for(&self, role: Role, name: &Name) -> Keys {
        match role {
            Role::Agent => {
                let host = HostId::derive(self.id, name);
                Keys::Host(self.keys.iter().map(|(epoch, key)| HostKey::derive(key, host, *epoch)).collect())
            }
            Role::Target => Keys::Vault(self.keys.clone()),
            Role::Relay | Role::Control | Role::Operator => Keys::None,
        }
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        let document = Document {
            format: FORMAT,
            id: self.id.to_string(),
            name: self.name.to_string(),
            created: self.created.0,
            ca: self.ca.clone(),
            ca_private_key: self.ca_key.serialize_pem(),
            keys: self.keys.iter().map(|(epoch, key)| KeyDocument::new(*epoch, key.expose())).collect(),
        };
        let text = Zeroizing::new(toml::to_string(&document).map_err(|error| Error::malformed("vault", error))?);
        file::write_private(path, &text)
    }
}
