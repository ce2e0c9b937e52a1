//! What a member's certificate says, and how one is made.

use std::fmt;

use farshore_proto::{Name, Role, VaultId, WallTime};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    SanType,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::extensions::GeneralName;

use super::PeerName;
use crate::{Error, Result};

const SCHEME: &str = "farshore://";

/// How long the vault's CA lasts. Its key never leaves the vault's folder, and replacing it means new bundles everywhere.
const CA_DAYS: i64 = 30 * 365;

/// Certificates are valid from this long before they are made, because clocks of two sites differ.
const SKEW: time::Duration = time::Duration::days(1);

/// A member's name within all vaults: the certificate's URI `farshore://<vault>/<role>/<name>`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MemberName {
    pub(crate) vault: VaultId,
    pub(crate) peer: PeerName,
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.vault, self.peer.role, self.peer.name)
    }
}

impl MemberName {
    fn parse(uri: &str) -> Result<Self> {
        let bad =
            || Error::malformed("certificate", format!("its name {uri:?} is not farshore://<vault>/<role>/<name>"));
        let mut parts = uri.strip_prefix(SCHEME).ok_or_else(bad)?.split('/');
        let (Some(vault), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        Ok(Self {
            vault: vault.parse().map_err(|_| bad())?,
            peer: PeerName { role: role.parse().map_err(|_| bad())?, name: Name::new(name).map_err(|_| bad())? },
        })
    }
}

/// What a certificate claims. Says nothing of who signed it.
pub(crate) struct Certified {
    pub(crate) member: MemberName,
    pub(crate) not_before: WallTime,
    pub(crate) not_after: WallTime,
}

impl Certified {
    /// Reads name and validity. Exactly one URI, and it is ours: a certificate with several names would let each check pick
    /// its own.
    pub(crate) fn read(der: &[u8]) -> Result<Self> {
        let (uris, not_before, not_after) = read_names(der)?;
        match uris.as_slice() {
            [uri] => Ok(Self { member: MemberName::parse(uri)?, not_before, not_after }),
            _ => Err(Error::malformed("certificate", format!("carries {} names, one is needed", uris.len()))),
        }
    }

    /// # Errors
    /// [`Error::Expired`] or [`Error::NotYetValid`] with the dates.
    pub(crate) fn check_time(&self, now: WallTime) -> Result<()> {
        let who = self.member.peer.to_string();
        if now > self.not_after {
            return Err(Error::Expired { who, date: date(self.not_after) });
        }
        if now < self.not_before {
            return Err(Error::NotYetValid { who, date: date(self.not_before), now: date(now) });
        }
        Ok(())
    }
}

/// The vault that a CA certificate is of.
pub(super) fn read_ca(der: &[u8]) -> Result<VaultId> {
    let (uris, _, _) = read_names(der)?;
    let id = match uris.as_slice() {
        [uri] => uri.strip_prefix(SCHEME).and_then(|id| id.parse().ok()),
        _ => None,
    };
    id.ok_or_else(|| Error::malformed("CA certificate", "carries no vault id"))
}

fn read_names(der: &[u8]) -> Result<(Vec<String>, WallTime, WallTime)> {
    let bad = |reason: String| Error::malformed("certificate", reason);
    let (rest, certificate) = x509_parser::parse_x509_certificate(der).map_err(|error| bad(error.to_string()))?;
    if !rest.is_empty() {
        return Err(bad(format!("{} bytes follow it", rest.len())));
    }
    let names = certificate.subject_alternative_name().map_err(|error| bad(error.to_string()))?;
    let uris = names.iter().flat_map(|names| &names.value.general_names).map(|name| {
        if let GeneralName::URI(uri) = name {
            Ok((*uri).to_owned())
        } else {
            Err(bad("carries a name that is no URI".to_owned()))
        }
    });
    let validity = certificate.validity();
    let at = |time: i64| WallTime(u64::try_from(time).unwrap_or(0).saturating_mul(1_000_000_000));
    Ok((uris.collect::<Result<_>>()?, at(validity.not_before.timestamp()), at(validity.not_after.timestamp())))
}

fn offset(time: WallTime) -> Result<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.0)).map_err(|error| Error::malformed("time", error))
}

/// RFC 3339, whole seconds, UTC.
pub(crate) fn date(time: WallTime) -> String {
    let whole = WallTime(time.0 - time.0 % 1_000_000_000);
    match offset(whole).map(|time| time.format(&Rfc3339)) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) | Err(_) => format!("{} s after 1970", time.0 / 1_000_000_000),
    }
}

fn name_of(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn uri(text: String) -> Result<SanType> {
    Ok(SanType::URI(Ia5String::try_from(text).map_err(|error| Error::crypto("certificate name", error))?))
}

/// The CA's certificate. The same input gives the same issuer, so the vault need not read its certificate back to sign.
pub(super) fn ca_params(vault: VaultId, created: WallTime) -> Result<CertificateParams> {
    let created = offset(created)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name_of(&format!("Farshore vault {vault}"));
    params.subject_alt_names = vec![uri(format!("{SCHEME}{vault}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = created - SKEW;
    params.not_after = created + time::Duration::days(CA_DAYS);
    Ok(params)
}

/// A member's certificate. Its key usage allows the ends of a connection that the role may stand at, so that a stolen agent
/// certificate cannot act as a target even towards software that looks at nothing else.
pub(super) fn member_params(member: &MemberName, now: WallTime, days: u32) -> Result<CertificateParams> {
    let now = offset(now)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = name_of(member.peer.name.as_str());
    params.subject_alt_names = vec![uri(member.to_string())?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match member.peer.role {
        Role::Target => vec![ExtendedKeyUsagePurpose::ServerAuth],
        Role::Relay | Role::Control => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        Role::Agent | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.not_before = now - SKEW;
    params.not_after = now + time::Duration::days(i64::from(days));
    Ok(params)
}
