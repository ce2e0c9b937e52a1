//! The threads of a source's link: one opens the session, the others join it.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::SourceEvent;
use super::super::outbox;
use super::super::transport;
use super::super::wire::{self, Fault, Hello, Welcome, code};
use super::session::Session;
use super::{LinkStats, Shared};
use crate::identity::{PeerName, random, wall_now};
use crate::tls;

/// Most addresses of the upstream's name that are tried.
const ADDRESSES_MAX: usize = 16;

/// A session that stood this long ends the doubling of the wait, so that one that fails at once again and again does not
/// become a storm of handshakes.
const STEADY: Duration = Duration::from_secs(5);

/// Waits between attempts: doubling, with jitter, so that many agents do not come back in step.
struct Backoff {
    next: Duration,
    min: Duration,
    max: Duration,
}

impl Backoff {
    fn new(min: Duration, max: Duration) -> Self {
        Self { next: min, min, max }
    }

    fn reset(&mut self) {
        self.next = self.min;
    }

    fn slow_down(&mut self) {
        self.next = self.max;
    }

    /// Half to all of the wait that is due.
    fn delay(&mut self) -> Duration {
        let due = self.next;
        self.next = (due * 2).min(self.max);
        let chance = random::<1>().map_or(255, |[byte]| byte);
        due / 2 + due / 2 * u32::from(chance) / 255
    }
}

/// A connection that was introduced and welcomed.
struct Joined {
    endpoint: Endpoint,
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    welcome: Welcome,
    peer: PeerName,
}

/// The first connection: opens sessions until told to stop.
pub(super) async fn run_first(shared: Arc<Shared>) {
    let mut backoff = Backoff::new(shared.config.backoff_min, shared.config.backoff_max);
    let mut last = 0;
    loop {
        let opened = tokio::select! {
            biased;
            () = shared.stopped() => return,
            opened = open(&shared) => opened,
        };
        let fatal = match opened {
            Err((address, fault)) => {
                shared.report_failure(address, &fault.reason, fault.fatal);
                fault.fatal
            }
            Ok((joined, token)) => {
                last += 1;
                let began = Instant::now();
                let fault = run_session(&shared, joined, last, token).await;
                if began.elapsed() >= STEADY {
                    backoff.reset();
                }
                if fault.code == code::REPLACED {
                    backoff.slow_down();
                }
                fault.fatal
            }
        };
        let wait = if fatal { shared.config.fatal_retry } else { backoff.delay() };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.retry.notified() => {}
            () = shared.stopped() => return,
        }
    }
}

/// Tries all addresses of the upstream.
async fn open(shared: &Shared) -> Result<(Joined, [u8; 16]), (Option<SocketAddr>, Fault)> {
    let token = random::<16>().map_err(|error| (None, Fault::fatal(error.to_string())))?;
    let upstream = &shared.config.upstream;
    let found = tokio::net::lookup_host(upstream.as_str()).await;
    let addresses = found.map_err(|error| (None, Fault::new(code::LOST, format!("no address: {error}"))))?;
    let mut failure = (None, Fault::new(code::LOST, "the name has no address"));
    for address in addresses.take(ADDRESSES_MAX) {
        match join(shared, address, Hello { version: wire::VERSION, token, index: 0, channel: shared.config.channel })
            .await
        {
            Ok(joined) => return Ok((joined, token)),
            // What somebody must act on is said rather than that another address is silent.
            Err(fault) if fault.fatal || !failure.1.fatal => failure = (Some(address), fault),
            Err(_) => {}
        }
    }
    Err(failure)
}

/// Connects, introduces itself, and waits for the welcome: only that shows that the other end has taken our certificate.
async fn join(shared: &Shared, address: SocketAddr, hello: Hello) -> Result<Joined, Fault> {
    let identity = shared.identity();
    let fatal = |error: crate::Error| Fault::fatal(error.to_string());
    identity.check_expiry(wall_now()).map_err(fatal)?;
    let settings = &shared.config.transport;
    let config = transport::client_config(settings, &identity).map_err(fatal)?;
    let unreachable = |reason: String| Fault::new(code::LOST, reason);
    let endpoint = transport::client_endpoint(settings, address).map_err(|error| unreachable(error.to_string()))?;
    let connecting = endpoint
        .connect_with(config, address, tls::SERVER_NAME)
        .map_err(|error| unreachable(format!("cannot connect: {error}")))?;
    let limit = shared.config.connect_timeout;
    let Ok(connected) = tokio::time::timeout(limit, connecting).await else {
        return Err(unreachable(format!("no answer within {limit:?}")));
    };
    let connection = connected?;
    let introduced = introduce(&connection, hello, limit).await;
    let (send, recv, welcome) = match introduced {
        Ok(introduced) => introduced,
        Err(fault) => {
            fault.close(&connection);
            return Err(fault);
        }
    };
    let peer = tls::peer_name(&connection).map_err(fatal)?;
    Ok(Joined { endpoint, connection, send, recv, welcome, peer })
}

async fn introduce(
    connection: &Connection,
    hello: Hello,
    limit: Duration,
) -> Result<(SendStream, RecvStream, Welcome), Fault> {
    let (mut send, mut recv) = connection.open_bi().await?;
    // Messages overtake batches. A stream that is closed already shows itself in the write that follows.
    let _closed = send.set_priority(1);
    wire::write_message(&mut send, hello.encode()).await?;
    let welcome = wire::read_welcome(&mut recv, limit).await?;
    Ok((send, recv, welcome))
}

/// Runs one session from `Up` to `Down`.
async fn run_session(shared: &Arc<Shared>, joined: Joined, id: u64, token: [u8; 16]) -> Fault {
    let Joined { endpoint, connection, send, recv, welcome, peer } = joined;
    let address = connection.remote_address();
    let session = Session::new(id, token, address, welcome, &shared.config, Arc::clone(&shared.sink));
    session.add_connection(connection.clone());
    tracing::info!(session = id, %peer, %address, "link is up");
    // Known before it is reported, so that the sink can answer at once.
    shared.current.send_replace(Some(Arc::clone(&session)));
    session.life.up(SourceEvent::Up { session: id, peer, address, rtt: connection.rtt() });

    let mut tasks = JoinSet::new();
    spawn_ending(&mut tasks, &session, Arc::clone(&session).send_batches(connection.clone()));
    let (writer, reader) = (Arc::clone(&session), Arc::clone(&session));
    spawn_ending(&mut tasks, &session, async move { writer.outbox.write_to(send).await });
    spawn_ending(&mut tasks, &session, async move {
        let deliver = |bytes| _ = reader.life.emit(SourceEvent::Control { session: id, bytes });
        outbox::read_from(recv, deliver).await?;
        reader.peer_finished();
        Ok(())
    });
    let lost = connection.clone();
    spawn_ending(&mut tasks, &session, async move { Err(lost.closed().await.into()) });

    let fault = tokio::select! {
        fault = session.ended() => fault,
        fault = finish(shared, &session) => fault,
    };
    session.end(fault.clone());
    fault.close(&connection);
    retire(shared, &session);
    tracing::info!(session = id, reason = fault.reason, "link is down");
    session.life.down(SourceEvent::Down { session: id, reason: fault.reason.clone(), fatal: fault.fatal });
    if *shared.stop.borrow() {
        transport::wind_down(&endpoint).await;
    }
    fault
}

/// Waits for the order to stop, then gets out what was accepted.
async fn finish(shared: &Shared, session: &Session) -> Fault {
    shared.stopped().await;
    let drained = tokio::time::timeout(shared.config.drain, session.drain()).await.is_ok();
    Fault::new(
        code::STOPPED,
        if drained { "the source has stopped" } else { "the source has stopped before all was sent" },
    )
}

/// Runs `work`; its failure ends the session.
fn spawn_ending(
    tasks: &mut JoinSet<()>,
    session: &Arc<Session>,
    work: impl Future<Output = Result<(), Fault>> + Send + 'static,
) {
    let session = Arc::clone(session);
    tasks.spawn(async move {
        if let Err(fault) = work.await {
            session.end(fault);
        }
    });
}

/// Takes a session away from the methods and adds its figures to those of the link.
fn retire(shared: &Shared, session: &Session) {
    let mut ended = shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
    session.add_to(&mut ended);
    *ended = LinkStats { connections: 0, batch_bytes_in_flight: 0, ..*ended };
    shared.current.send_replace(None);
}

/// A further connection: joins each session that stands, until told to stop.
pub(super) async fn run_further(shared: Arc<Shared>, index: u16) {
    let mut current = shared.current.subscribe();
    let mut served = 0;
    loop {
        let session = tokio::select! {
            biased;
            () = shared.stopped() => return,
            next = current.wait_for(|now| now.as_ref().is_some_and(|session| session.id > served)) => {
                match next.map(|next| next.clone()) {
                    Ok(Some(session)) => session,
                    // The sender lives in `shared`, and the value was just seen.
                    Ok(None) | Err(_) => return,
                }
            }
        };
        served = session.id;
        if index < session.welcome.connections {
            serve(&shared, &session, index).await;
        }
    }
}

/// Joins one session and sends batches in it until it ends.
async fn serve(shared: &Arc<Shared>, session: &Arc<Session>, index: u16) {
    let mut backoff = Backoff::new(shared.config.backoff_min, shared.config.backoff_max);
    let hello = Hello { version: wire::VERSION, token: session.token, index, channel: shared.config.channel };
    let joined = loop {
        let joined = tokio::select! {
            _ = session.ended() => return,
            joined = join(shared, session.address, hello) => joined,
        };
        match joined {
            Ok(joined) => break joined,
            Err(fault) => {
                tracing::debug!(session = session.id, index, reason = fault.reason, "connection did not join")
            }
        }
        tokio::select! {
            _ = session.ended() => return,
            () = tokio::time::sleep(backoff.delay()) => {}
        }
    };
    let Joined { endpoint, connection, send, recv, .. } = joined;
    if session.is_over() {
        session.ended().await.close(&connection);
        return;
    }
    session.add_connection(connection.clone());
    let mut tasks = JoinSet::new();
    spawn_ending(&mut tasks, session, Arc::clone(session).send_batches(connection.clone()));
    let lost = connection.clone();
    spawn_ending(&mut tasks, session, async move { Err(lost.closed().await.into()) });
    let fault = session.ended().await;
    // Held open until here: dropping them would end the stream under the target's eyes.
    drop((send, recv));
    fault.close(&connection);
    if *shared.stop.borrow() {
        transport::wind_down(&endpoint).await;
    }
}
