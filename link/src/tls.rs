//! Mutual TLS 1.3 inside one vault: who is let in is decided by the CA's signature, the validity, and the one URI.

use std::sync::Arc;

use farshore_proto::{Role, VaultId, WallTime};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore, SignatureScheme};

use crate::identity::{Certified, Identity, PeerName};
use crate::{Error, Result};

/// Name and version of what is spoken on a connection; another one is refused in the handshake.
const ALPN: &[u8] = b"farshore/1";

/// Server name in the handshake. Not sent and not checked: a member is known by its URI, at whatever address.
pub(crate) const SERVER_NAME: &str = "farshore.invalid";

/// Roles that open a link.
pub(crate) const SOURCE_ROLES: &[Role] = &[Role::Agent, Role::Relay];
/// Roles that take one.
pub(crate) const UPSTREAM_ROLES: &[Role] = &[Role::Target, Role::Relay];

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone()).map_err(|error| Error::crypto("CA certificate", error))?;
    Ok(Arc::new(roots))
}

/// Configuration of the connecting end.
pub(crate) fn client_config(identity: &Identity) -> Result<rustls::ClientConfig> {
    let verifier = Verifier::new(identity, UPSTREAM_ROLES)?;
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::crypto("TLS", error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(identity.chain(), identity.private_key())
        .map_err(|error| Error::crypto("certificate and private key", error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    // A resumed session would skip the checks of the certificate, so that an expired or denied one lived on.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Configuration of the listening end.
pub(crate) fn server_config(identity: &Identity) -> Result<rustls::ServerConfig> {
    let verifier = Verifier::new(identity, SOURCE_ROLES)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Error::crypto("TLS", error))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(identity.chain(), identity.private_key())
        .map_err(|error| Error::crypto("certificate and private key", error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// Checks that an identity's own parts fit: the CA signed the certificate for an end that the role stands at, and the
/// private key is the certificate's.
pub(crate) fn check_own(what: &str, identity: &Identity, now: WallTime) -> Result<()> {
    let now = UnixTime::since_unix_epoch(std::time::Duration::from_nanos(now.0));
    let certificates = identity.chain();
    let verifier = Verifier::new(identity, &[identity.role])?;
    let end = if UPSTREAM_ROLES.contains(&identity.role) { End::Server } else { End::Client };
    verifier.check(&certificates[0], &[], now, end).map_err(|reason| Error::malformed(what, reason))?;
    let key = identity.private_key();
    rustls::sign::CertifiedKey::from_der(certificates, key, &provider())
        .map(|_| ())
        .map_err(|error| Error::malformed(format!("{what}: private_key"), error))
}

/// Role and name of a connection's peer, which the handshake has verified.
pub(crate) fn peer_name(connection: &quinn::Connection) -> Result<PeerName> {
    let missing = || Error::malformed("connection", "the peer sent no certificate");
    let identity = connection.peer_identity().ok_or_else(missing)?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().map_err(|_| missing())?;
    Ok(Certified::read(chain.first().ok_or_else(missing)?)?.member.peer)
}

/// The text of a refusal as one of our verifiers gave it, without what the TLS library wraps around it.
pub(crate) fn plain_reason(reason: &str) -> &str {
    let reason = reason.strip_prefix("other error: ").unwrap_or(reason);
    reason.strip_prefix("invalid peer certificate: ").unwrap_or(reason)
}

#[derive(Clone, Copy)]
enum End {
    Server,
    Client,
}

/// Lets in members of one vault that have one of some roles. Says plainly why it refuses, at both ends.
#[derive(Debug)]
struct Verifier {
    vault: VaultId,
    roles: Vec<Role>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(identity: &Identity, roles: &[Role]) -> Result<Self> {
        let provider = provider();
        let roots = roots(identity.ca())?;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| Error::crypto("CA certificate", error))?;
        Ok(Self { vault: identity.vault, roles: roles.to_vec(), roots, clients, provider })
    }

    /// Names first, so that the reason is one that a person can act on; then the signature, which alone decides.
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        end: End,
    ) -> std::result::Result<(), String> {
        let certified = Certified::read(certificate).map_err(|error| error.to_string())?;
        let PeerName { role, name } = &certified.member.peer;
        if certified.member.vault != self.vault {
            return Err(format!(
                "the {role}'s certificate is of vault {}, ours is {}",
                certified.member.vault, self.vault
            ));
        }
        if !self.roles.contains(role) {
            let wanted = self.roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
            return Err(format!("the certificate is one of {role} {name}, this end of a link takes {wanted} only"));
        }
        let seconds = WallTime(now.as_secs().saturating_mul(1_000_000_000));
        certified.check_time(seconds).map_err(|error| error.to_string())?;
        let signed = match end {
            End::Client => self.clients.verify_client_cert(certificate, intermediates, now).map(|_| ()),
            End::Server => ParsedCertificate::try_from(certificate).and_then(|parsed| {
                let algorithms = self.provider.signature_verification_algorithms.all;
                verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
            }),
        };
        signed.map_err(|error| format!("the certificate of {role} {name} is not one of our vault's CA: {error}"))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A refusal as the TLS library carries it. Its text also goes to the peer, in the frame that closes the connection.
#[derive(Debug)]
struct Refused(String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn refused(reason: String) -> rustls::Error {
    rustls::Error::Other(OtherError(Arc::new(Refused(reason))))
}

fn only_tls13() -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
    Err(refused("TLS 1.2 is not spoken here".to_owned()))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now, End::Server).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        only_tls13()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity, intermediates, now, End::Client).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        only_tls13()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
