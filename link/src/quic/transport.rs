//! Sockets, endpoints and their QUIC settings.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use socket2::{Domain, Protocol, Socket, Type};
use zeroize::Zeroizing;

use super::settings::{Congestion, Transport};
use crate::identity::{Identity, random};
use crate::{Error, Result, tls};

const RESET_KEY: &str = "farshore 2026-11 quic reset key v1";

/// Settings of one direction of opening streams: how many the peer may open.
fn transport_config(
    settings: &Transport,
    peer_bidi: u32,
    peer_uni: u32,
    keep_alive: bool,
) -> Result<Arc<TransportConfig>> {
    let mut config = TransportConfig::default();
    let idle = IdleTimeout::try_from(settings.idle_timeout)
        .map_err(|error| Error::Setting { field: "idle_timeout", reason: error.to_string() })?;
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(settings.mtu_max);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(peer_bidi))
        .max_concurrent_uni_streams(VarInt::from_u32(peer_uni))
        .stream_receive_window(VarInt::from_u32(settings.stream_window))
        .receive_window(VarInt::from_u32(settings.connection_window))
        .send_window(u64::from(settings.connection_window))
        // A batch's bytes leave before the next one's: the target reads them in that order, so a later batch must not use up
        // the window that an earlier one needs.
        .send_fairness(false)
        .mtu_discovery_config(Some(discovery))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(keep_alive.then_some(settings.keep_alive))
        .datagram_receive_buffer_size(None);
    match settings.congestion {
        Congestion::Cubic => config.congestion_controller_factory(Arc::new(quinn::congestion::CubicConfig::default())),
        Congestion::Bbr => config.congestion_controller_factory(Arc::new(quinn::congestion::BbrConfig::default())),
    };
    Ok(Arc::new(config))
}

/// How an identity connects.
pub(crate) fn client_config(settings: &Transport, identity: &Identity) -> Result<quinn::ClientConfig> {
    let crypto =
        QuicClientConfig::try_from(tls::client_config(identity)?).map_err(|error| Error::crypto("QUIC", error))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport_config(settings, 0, 0, true)?);
    Ok(config)
}

/// How an identity listens; `bidi` and `uni` are the streams that a peer may have open.
pub(crate) fn server_config(
    settings: &Transport,
    identity: &Identity,
    bidi: u32,
    uni: u32,
) -> Result<quinn::ServerConfig> {
    let crypto =
        QuicServerConfig::try_from(tls::server_config(identity)?).map_err(|error| Error::crypto("QUIC", error))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport_config(settings, bidi, uni, false)?).max_incoming(INCOMING_MAX);
    Ok(config)
}

/// Connections that have sent a first packet and are not yet looked at; more are refused.
const INCOMING_MAX: usize = 1024;

/// An endpoint that connects to `remote`, on a socket of its own. Call within a runtime.
pub(crate) fn client_endpoint(settings: &Transport, remote: SocketAddr) -> Result<quinn::Endpoint> {
    let any = if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = udp_socket(SocketAddr::new(any, 0), settings.socket_buffer, false)?;
    endpoint(settings, EndpointConfig::default(), None, socket)
}

/// An endpoint that listens on `socket`. Call within a runtime.
///
/// Its resets are keyed by the identity: a source whose target was killed and started again learns so from its next packet,
/// not from silence.
pub(crate) fn server_endpoint(
    settings: &Transport,
    identity: &Identity,
    config: quinn::ServerConfig,
    socket: UdpSocket,
) -> Result<quinn::Endpoint> {
    let mut endpoint_config = EndpointConfig::new(Arc::new(ResetKey(identity.secret(RESET_KEY))));
    let seed: [u8; 32] = random()?;
    endpoint_config.cid_generator(move || Box::new(RandomIds { seed, next: 0 }));
    endpoint(settings, endpoint_config, Some(config), socket)
}

fn endpoint(
    settings: &Transport,
    mut config: EndpointConfig,
    server: Option<quinn::ServerConfig>,
    socket: UdpSocket,
) -> Result<quinn::Endpoint> {
    let address = socket.local_addr().unwrap_or_else(|_| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
    config
        .max_udp_payload_size(settings.mtu_max.max(1472))
        .map_err(|error| Error::Setting { field: "mtu_max", reason: error.to_string() })?;
    quinn::Endpoint::new(config, server, socket, Arc::new(TokioRuntime))
        .map_err(|source| Error::Socket { address, source })
}

/// A bound socket with large buffers, as far as the kernel allows.
pub(crate) fn udp_socket(address: SocketAddr, buffer: u32, shared_port: bool) -> Result<UdpSocket> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        if shared_port {
            setsockopt(&socket, sockopt::ReusePort, &true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let socket = open().map_err(|source| Error::Socket { address, source })?;
    grow_buffers(&socket, buffer);
    Ok(socket.into())
}

/// Beyond `net.core.{r,w}mem_max` only with CAP_NET_ADMIN; without it the kernel caps the size, and a burst may lose packets.
fn grow_buffers(socket: &Socket, bytes: u32) {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _capped = socket.set_recv_buffer_size(bytes);
    }
    if setsockopt(socket, sockopt::SndBufForce, &bytes).is_err() {
        let _capped = socket.set_send_buffer_size(bytes);
    }
    // The kernel reports twice what it grants, for its own bookkeeping.
    let granted = socket.recv_buffer_size().unwrap_or(0) / 2;
    if granted < bytes {
        tracing::debug!(granted, wanted = bytes, "socket buffer is smaller than asked for; raise net.core.rmem_max");
    }
}

/// Waits until closed connections have said so to their peers, but not for long: a peer that is gone does not answer.
pub(crate) async fn wind_down(endpoint: &quinn::Endpoint) {
    let _late = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
}

/// Signs reset tokens; the same after a restart.
struct ResetKey(Zeroizing<[u8; 32]>);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> std::result::Result<(), CryptoError> {
        // blake3::Hash compares in constant time.
        let given: [u8; blake3::OUT_LEN] = signature.try_into().map_err(|_| CryptoError)?;
        if blake3::keyed_hash(&self.0, data) == blake3::Hash::from_bytes(given) { Ok(()) } else { Err(CryptoError) }
    }
}

/// Connection ids that any process of this identity accepts as possibly its own: the library's default generator rejects
/// those of an earlier process before it would send a reset.
struct RandomIds {
    seed: [u8; 32],
    next: u64,
}

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        self.next += 1;
        let id = blake3::keyed_hash(&self.seed, &self.next.to_le_bytes());
        ConnectionId::new(&id.as_bytes()[..self.cid_len()])
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
