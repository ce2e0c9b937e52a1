use std::time::Duration;

use crate::{Error, Result};

const MIB: u32 = 1 << 20;

/// Part of a connection's window that batches leave free, so that a target that reads no batches still gets messages:
/// several of the longest ones.
pub(crate) const CONTROL_RESERVE: u32 = 4 * MIB;

/// How the congestion window moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Congestion {
    /// The default: fair to others; slow on long paths with random loss.
    #[default]
    Cubic,
    /// For long lossy paths. The library calls its implementation experimental.
    Bbr,
}

/// Settings of the QUIC connections, at both ends.
#[derive(Clone, Debug)]
pub struct Transport {
    /// Largest UDP payload in bytes that path discovery tries. Default 1452 (fits Ethernet with IPv6), range 1200 to 6500.
    /// Above 6500, ten segments exceed what one segmented send may carry, and the kernel drops all of it.
    pub mtu_max: u16,
    /// Bytes that a peer may have on the way on one stream. Default 32 MiB: 1 Gbit/s over 200 ms is 25 MB. Range 64 KiB to
    /// 1 GiB. Costs that much memory per stream that nobody reads.
    pub stream_window: u32,
    /// The same for one connection, and the limit of unacknowledged bytes that we keep for re-sending. Default 64 MiB, at
    /// least 4 MiB above `stream_window`, at most 2 GiB.
    pub connection_window: u32,
    /// Kernel buffer of each socket and direction in bytes, as far as the kernel allows. Default 8 MiB.
    pub socket_buffer: u32,
    /// Silence after which a peer counts as gone. Default 15 s, at least twice `keep_alive`.
    pub idle_timeout: Duration,
    /// The connecting end sends at least this often. Default 5 s.
    pub keep_alive: Duration,
    /// See [`Congestion`].
    pub congestion: Congestion,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            mtu_max: 1452,
            stream_window: 32 * MIB,
            connection_window: 64 * MIB,
            socket_buffer: 8 * MIB,
            idle_timeout: Duration::from_secs(15),
            keep_alive: Duration::from_secs(5),
            congestion: Congestion::Cubic,
        }
    }
}

fn range<T: PartialOrd + std::fmt::Debug>(field: &'static str, value: T, low: T, high: T) -> Result<()> {
    if value < low || value > high {
        return Err(Error::Setting { field, reason: format!("is {value:?}, allowed is {low:?} to {high:?}") });
    }
    Ok(())
}

impl Transport {
    pub(crate) fn check(&self) -> Result<()> {
        range("mtu_max", self.mtu_max, 1200, 6500)?;
        range("stream_window", self.stream_window, 64 << 10, 1 << 30)?;
        range("connection_window", self.connection_window, self.stream_window + CONTROL_RESERVE, 2 << 30)?;
        range("socket_buffer", self.socket_buffer, 64 << 10, 1 << 30)?;
        range("keep_alive", self.keep_alive, Duration::from_millis(10), Duration::from_secs(600))?;
        range("idle_timeout", self.idle_timeout, self.keep_alive * 2, Duration::from_secs(3600))
    }
}

/// Settings of a [`super::SourceLink`].
#[derive(Clone, Debug)]
pub struct SourceLinkConfig {
    /// `host:port` of the target or relay. All addresses of the name are tried.
    pub upstream: String,
    /// Which of this identity's streams the session brings (a group's id); default zeroes. A newer session of the same
    /// identity and channel replaces an older one.
    pub channel: [u8; 16],
    /// Connections of a session, each with a socket and a thread. Default 2, range 1 to 16. One connection is driven by one
    /// core.
    pub connections: u16,
    /// QUIC.
    pub transport: Transport,
    /// Bytes of batches accepted and not yet reported as sent. Default 64 MiB, at least 1 MiB; one batch is accepted in any
    /// case. Raise it where rate × round trip is more.
    pub inflight_bytes_max: u64,
    /// Bytes of messages queued. Default 8 MiB, at least 1 MiB.
    pub control_bytes_max: u64,
    /// Longest wait for one address to answer. Default 5 s.
    pub connect_timeout: Duration,
    /// First wait after a failure; doubles, with jitter. Default 100 ms.
    pub backoff_min: Duration,
    /// Longest wait after a failure that may pass by itself. Default 5 s.
    pub backoff_max: Duration,
    /// Wait after a failure that somebody must act on. Default 60 s.
    pub fatal_retry: Duration,
    /// Longest time that `stop` takes to get out what was accepted. Default 5 s.
    pub drain: Duration,
}

impl SourceLinkConfig {
    /// Defaults, with the one setting that has none.
    #[must_use]
    pub fn new(upstream: impl Into<String>) -> Self {
        Self {
            upstream: upstream.into(),
            channel: [0; 16],
            connections: 2,
            transport: Transport::default(),
            inflight_bytes_max: u64::from(64 * MIB),
            control_bytes_max: u64::from(8 * MIB),
            connect_timeout: Duration::from_secs(5),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            fatal_retry: Duration::from_secs(60),
            drain: Duration::from_secs(5),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.transport.check()?;
        let port =
            self.upstream.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            return Err(Error::Setting { field: "upstream", reason: format!("is {:?}, not HOST:PORT", self.upstream) });
        }
        range("connections", self.connections, 1, 16)?;
        range("inflight_bytes_max", self.inflight_bytes_max, u64::from(MIB), 1 << 40)?;
        range("control_bytes_max", self.control_bytes_max, u64::from(MIB), 1 << 32)?;
        range("connect_timeout", self.connect_timeout, Duration::from_millis(10), Duration::from_secs(600))?;
        range("backoff_min", self.backoff_min, Duration::from_millis(1), Duration::from_secs(600))?;
        range("backoff_max", self.backoff_max, self.backoff_min, Duration::from_secs(3600))?;
        range("fatal_retry", self.fatal_retry, self.backoff_min, Duration::from_secs(86400))
    }
}

/// Limits of a [`super::TargetLink`]: what others can make it hold.
///
/// Worst case in bytes: `sessions` × (`batches_in_flight_bytes` + `connections_per_session` × `connection_window` +
/// `control_bytes_max`).
#[derive(Clone, Debug)]
pub struct TargetLimits {
    /// QUIC.
    pub transport: Transport,
    /// Sockets on the port, each with a thread; the kernel spreads connections over them. Default 1, range 1 to 16. With more
    /// than one, a source whose address changes loses its session (and gets the next at once).
    pub threads: u16,
    /// Sessions at a time; one per identity and channel, because a newer one of the same stream replaces the older. Default 256.
    pub sessions: usize,
    /// Channels of one identity: an agent has one for each of its groups. Default 64, range 1 to 1024.
    pub channels_per_identity: u16,
    /// Connections of one session. Default 8, range 1 to 16.
    pub connections_per_session: u16,
    /// Batches on the way on one connection. Default 256, range 1 to 4096.
    pub streams_per_connection: u16,
    /// Longest batch in bytes. Default 64 MiB, at most 1 GiB.
    pub batch_bytes_max: u64,
    /// Bytes of batches of one session that are being received or whose buffers are not yet dropped. Default 128 MiB, at
    /// least `batch_bytes_max`. At the limit the session is not read further.
    pub batches_in_flight_bytes: u64,
    /// Bytes of messages queued for one session. Default 8 MiB, at least 1 MiB.
    pub control_bytes_max: u64,
    /// Longest time from a connection's first packet to its introduction. Default 10 s.
    pub hello_timeout: Duration,
    /// Longest pause in a batch that has begun to be read. Default 30 s; then the session is closed.
    pub stall_timeout: Duration,
    /// Longest time that `stop` takes to get messages out. Default 2 s.
    pub drain: Duration,
}

impl Default for TargetLimits {
    fn default() -> Self {
        Self {
            transport: Transport::default(),
            threads: 1,
            sessions: 256,
            channels_per_identity: 64,
            connections_per_session: 8,
            streams_per_connection: 256,
            batch_bytes_max: u64::from(64 * MIB),
            batches_in_flight_bytes: u64::from(128 * MIB),
            control_bytes_max: u64::from(8 * MIB),
            hello_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            drain: Duration::from_secs(2),
        }
    }
}

impl TargetLimits {
    pub(crate) fn check(&self) -> Result<()> {
        self.transport.check()?;
        range("threads", self.threads, 1, 16)?;
        range("sessions", self.sessions, 1, 1 << 20)?;
        range("channels_per_identity", self.channels_per_identity, 1, 1024)?;
        range("connections_per_session", self.connections_per_session, 1, 16)?;
        range("streams_per_connection", self.streams_per_connection, 1, 4096)?;
        range("batch_bytes_max", self.batch_bytes_max, 1, 1 << 30)?;
        range("batches_in_flight_bytes", self.batches_in_flight_bytes, self.batch_bytes_max, 1 << 40)?;
        range("control_bytes_max", self.control_bytes_max, u64::from(MIB), 1 << 32)?;
        range("hello_timeout", self.hello_timeout, Duration::from_millis(10), Duration::from_secs(600))?;
        range("stall_timeout", self.stall_timeout, Duration::from_millis(10), Duration::from_secs(3600))
    }
}
