//! One tuned QUIC stream and nothing else: what the link is measured against.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use farshore_proto::{Name, Role};

use crate::identity::{Identity, Vault, wall_now};
use crate::quic::{Transport, transport};
use crate::{Error, Result, tls};

/// Bytes per write: as large as the pieces of a batch usually are.
const PIECE: usize = 1 << 20;

/// What one run took.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Bytes that arrived.
    pub bytes: u64,
    /// From the first write to the last byte's arrival.
    pub elapsed: Duration,
}

impl Bare {
    /// Bytes per second.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        // Precision of a figure for people.
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no 53 bits")]
        let bytes = self.bytes as f64;
        bytes / self.elapsed.as_secs_f64()
    }
}

#[expect(clippy::disallowed_methods, reason = "the clock of a measurement")]
fn clock() -> Instant {
    Instant::now()
}

/// Sends `bytes` through one unidirectional stream over loopback, between two threads with a runtime each, with the settings
/// and certificates of a link.
///
/// # Errors
/// As of connecting; a lost connection is [`Error::Crypto`] with the reason.
pub fn bare_stream(bytes: u64, settings: &Transport) -> Result<Bare> {
    let now = wall_now();
    let vault = Vault::in_memory(Name::new("bench").map_err(|error| Error::malformed("name", error))?, now)?;
    let identity = |role, name: &str| {
        let name = Name::new(name).map_err(|error| Error::malformed("name", error))?;
        Identity::from_bundle(&vault.issue_at(role, name, 1, now)?, now)
    };
    let (target, agent) = (identity(Role::Target, "target")?, identity(Role::Agent, "agent")?);
    let socket = transport::udp_socket(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0), settings.socket_buffer, false)?;
    let address = socket.local_addr().map_err(Error::Thread)?;
    let (done, arrived) = mpsc::sync_channel(1);
    std::thread::scope(|scope| {
        let settings = &settings;
        let receiver = scope.spawn(move || -> Result<()> {
            let runtime = runtime()?;
            runtime.block_on(async {
                let config = transport::server_config(settings, &target, 0, 1)?;
                let endpoint = transport::server_endpoint(settings, &target, config, socket)?;
                let got = receive(&endpoint).await?;
                // Taken by the sender's thread, which waits for it.
                let _gone = done.send((got, clock()));
                transport::wind_down(&endpoint).await;
                Ok(())
            })
        });
        let started = runtime()?.block_on(send(settings, &agent, address, bytes, &arrived));
        let received = receiver.join().map_err(|_| failed("the receiving thread died"))?;
        let (started, (got, ended)) = started?;
        received?;
        Ok(Bare { bytes: got, elapsed: ended.duration_since(started) })
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)
}

fn failed(reason: impl ToString) -> Error {
    Error::crypto("bare stream", reason)
}

async fn receive(endpoint: &quinn::Endpoint) -> Result<u64> {
    let incoming = endpoint.accept().await.ok_or_else(|| failed("the endpoint closed"))?;
    let connection = incoming.await.map_err(failed)?;
    let mut stream = connection.accept_uni().await.map_err(failed)?;
    let mut pieces: [Bytes; 32] = std::array::from_fn(|_| Bytes::new());
    let mut got = 0;
    while let Some(count) = stream.read_chunks(&mut pieces).await.map_err(failed)? {
        got += pieces[..count].iter_mut().map(|piece| std::mem::take(piece).len() as u64).sum::<u64>();
    }
    connection.close(0u32.into(), b"done");
    Ok(got)
}

async fn send(
    settings: &Transport,
    identity: &Identity,
    address: SocketAddr,
    bytes: u64,
    arrived: &mpsc::Receiver<(u64, Instant)>,
) -> Result<(Instant, (u64, Instant))> {
    let endpoint = transport::client_endpoint(settings, address)?;
    let config = transport::client_config(settings, identity)?;
    let connection = endpoint.connect_with(config, address, tls::SERVER_NAME).map_err(failed)?.await.map_err(failed)?;
    let mut stream = connection.open_uni().await.map_err(failed)?;
    let piece = Bytes::from(vec![0x5a; PIECE]);
    let started = clock();
    let mut left = bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        stream.write_chunk(piece.slice(..part)).await.map_err(failed)?;
        left -= part as u64;
    }
    stream.finish().map_err(failed)?;
    // Until the receiver has closed: the runtime must go on sending what is buffered.
    connection.closed().await;
    let arrived = arrived.recv().map_err(|_| failed("the receiver failed"))?;
    transport::wind_down(&endpoint).await;
    Ok((started, arrived))
}
