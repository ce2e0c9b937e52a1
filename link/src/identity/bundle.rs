//! The document that makes a machine a member: certificate, private key, data keys.

use std::path::Path;

use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::{HostId, KeyEpoch, Name, Role, VaultId, WallTime};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::{Certified, Identity, Keys, PeerName, certificate, file, key_from_hex, to_hex};
use crate::{Error, Result, tls};

/// Version of the document's layout.
const FORMAT: u32 = 1;

/// Most key epochs in one bundle: one a week for 20 years, so only a forged document has more.
pub(super) const EPOCHS_MAX: usize = 1024;

/// One data key in a document.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyDocument {
    pub(super) epoch: u32,
    pub(super) key: String,
}

impl Drop for KeyDocument {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl KeyDocument {
    pub(super) fn new(epoch: KeyEpoch, key: &[u8; 32]) -> Self {
        Self { epoch: epoch.0, key: to_hex(key).to_string() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    vault: String,
    vault_name: String,
    role: String,
    name: String,
    not_after: String,
    ca: String,
    certificate: String,
    private_key: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    keys: Vec<KeyDocument>,
}

impl Drop for Document {
    fn drop(&mut self) {
        self.private_key.zeroize();
    }
}

/// What a bundle is made of, before it is text.
pub(super) struct Parts<'a> {
    pub(super) vault: VaultId,
    pub(super) vault_name: &'a Name,
    pub(super) peer: &'a PeerName,
    pub(super) not_after: WallTime,
    pub(super) ca: &'a str,
    pub(super) certificate: String,
    pub(super) private_key: String,
    pub(super) keys: &'a Keys,
}

/// A freshly issued bundle: one TOML document with secret keys.
pub struct Bundle {
    text: Zeroizing<String>,
    peer: PeerName,
    not_after: WallTime,
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bundle({}, until {})", self.peer, certificate::date(self.not_after))
    }
}

impl Bundle {
    pub(super) fn new(parts: Parts<'_>) -> Result<Self> {
        let keys = match parts.keys {
            Keys::None => Vec::new(),
            Keys::Host(keys) => keys.iter().map(|key| KeyDocument::new(key.epoch(), key.expose())).collect(),
            Keys::Vault(keys) => keys.iter().map(|(epoch, key)| KeyDocument::new(*epoch, key.expose())).collect(),
        };
        let document = Document {
            format: FORMAT,
            vault: parts.vault.to_string(),
            vault_name: parts.vault_name.to_string(),
            role: parts.peer.role.to_string(),
            name: parts.peer.name.to_string(),
            not_after: certificate::date(parts.not_after),
            ca: parts.ca.to_owned(),
            certificate: parts.certificate,
            private_key: parts.private_key,
            keys,
        };
        let text = toml::to_string(&document).map_err(|error| Error::malformed("bundle", error))?;
        Ok(Self { text: Zeroizing::new(text), peer: parts.peer.clone(), not_after: parts.not_after })
    }

    /// The document. Secret.
    #[must_use]
    pub fn as_toml(&self) -> &str {
        &self.text
    }

    /// Whom it is for.
    #[must_use]
    pub fn peer_name(&self) -> &PeerName {
        &self.peer
    }

    /// The certificate's last moment.
    #[must_use]
    pub fn not_after(&self) -> WallTime {
        self.not_after
    }

    /// Writes the document with mode 0600, replacing an older one.
    ///
    /// # Errors
    /// [`Error::File`].
    ///
    /// # Durability
    /// On disk when this returns; a crash before leaves the older file whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        file::write_private(path, &self.text)
    }
}

/// Reads a document and checks that all its parts belong together.
pub(super) fn parse(what: &str, text: &str, now: WallTime) -> Result<Identity> {
    let bad = |part: &str, reason: &dyn std::fmt::Display| Error::malformed(format!("{what}: {part}"), reason);
    // Only the message: the full error quotes the document, which holds keys.
    let document: Document = toml::from_str(text).map_err(|error| bad("not a bundle", &error.message()))?;
    if document.format != FORMAT {
        return Err(bad("format", &format!("is {}, this build reads {FORMAT}", document.format)));
    }
    let vault: VaultId = document.vault.parse().map_err(|error| bad("vault", &error))?;
    let vault_name = Name::new(document.vault_name.as_str()).map_err(|error| bad("vault_name", &error))?;
    let role: Role = document.role.parse().map_err(|error| bad("role", &error))?;
    let name = Name::new(document.name.as_str()).map_err(|error| bad("name", &error))?;
    let ca = CertificateDer::from_pem_slice(document.ca.as_bytes()).map_err(|error| bad("ca", &error))?;
    let certificate =
        CertificateDer::from_pem_slice(document.certificate.as_bytes()).map_err(|error| bad("certificate", &error))?;
    let key = PrivatePkcs8KeyDer::from_pem_slice(document.private_key.as_bytes())
        .map_err(|error| bad("private_key", &error))?;
    let identity = Identity {
        keys: read_keys(what, &document.keys, role, HostId::derive(vault, &name))?,
        vault,
        vault_name,
        role,
        name,
        not_after: WallTime(0),
        ca,
        certificate,
        key: Zeroizing::new(key.secret_pkcs8_der().to_vec()),
    };
    check(what, identity, now)
}

fn check(what: &str, mut identity: Identity, now: WallTime) -> Result<Identity> {
    let certified = Certified::read(&identity.certificate)?;
    let says = MemberOf(&identity);
    if certified.member.vault != identity.vault || certified.member.peer != identity.peer_name() {
        let reason = format!("the certificate is {}'s, the document says {says}", certified.member);
        return Err(Error::malformed(what, reason));
    }
    if certificate::read_ca(&identity.ca)? != identity.vault {
        return Err(Error::malformed(what, format!("its CA is not that of vault {}", identity.vault)));
    }
    certified.check_time(now)?;
    identity.not_after = certified.not_after;
    tls::check_own(what, &identity, now)?;
    Ok(identity)
}

struct MemberOf<'a>(&'a Identity);

impl std::fmt::Display for MemberOf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        certificate::MemberName { vault: self.0.vault, peer: self.0.peer_name() }.fmt(f)
    }
}

fn read_keys(what: &str, documents: &[KeyDocument], role: Role, host: HostId) -> Result<Keys> {
    let bad = |reason: &str| Error::malformed(format!("{what}: keys"), reason);
    if documents.len() > EPOCHS_MAX {
        return Err(bad("more epochs than 1024"));
    }
    if !documents.is_sorted_by(|a, b| a.epoch < b.epoch) || documents.first().is_some_and(|first| first.epoch == 0) {
        return Err(bad("epochs do not rise from 1"));
    }
    let read = |document: &KeyDocument| {
        Ok((
            KeyEpoch(document.epoch),
            key_from_hex(&format!("{what}: key of epoch {}", document.epoch), &document.key)?,
        ))
    };
    let keys = documents.iter().map(read).collect::<Result<Vec<_>>>()?;
    match (role, keys.is_empty()) {
        (Role::Agent | Role::Target, true) => Err(bad("there are none, and this role needs them")),
        (Role::Agent, false) => {
            Ok(Keys::Host(keys.into_iter().map(|(epoch, key)| HostKey::from_parts(key, host, epoch)).collect()))
        }
        (Role::Target, false) => {
            Ok(Keys::Vault(keys.into_iter().map(|(epoch, key)| (epoch, VaultKey::new(key))).collect()))
        }
        (Role::Relay | Role::Control | Role::Operator, true) => Ok(Keys::None),
        (Role::Relay | Role::Control | Role::Operator, false) => Err(bad("this role must not hold any")),
    }
}
