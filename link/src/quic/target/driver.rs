//! A thread of a target's link: every connection that arrives at its socket.

use std::sync::Arc;

use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use tokio::task::JoinSet;

use super::super::wire::{self, Fault, Welcome, code};
use super::super::{TargetEvent, outbox, transport};
use super::session::Session;
use super::{PeerSlot, Shared, Slot, stopping};
use crate::identity::PeerName;
use crate::tls;

/// Beyond this many open connections, a newcomer first proves that its address is its own.
const UNPROVEN_MAX: usize = 64;

/// Serves one endpoint until told to stop.
pub(super) async fn run(shared: Arc<Shared>, endpoint: Endpoint) {
    let mut stop = shared.stop.subscribe();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            Some(done) = connections.join_next(), if !connections.is_empty() => report_panic(done),
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => accept(&shared, &endpoint, &mut connections, incoming),
                None => break,
            },
        }
    }
    // No one new; those that stand end by themselves, after their messages.
    endpoint.set_server_config(None);
    while let Some(done) = connections.join_next().await {
        report_panic(done);
    }
    endpoint.close(code::STOPPED.into(), b"the target has stopped");
    transport::wind_down(&endpoint).await;
}

fn report_panic(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done {
        tracing::error!(%error, "a connection's task died");
    }
}

fn accept(shared: &Arc<Shared>, endpoint: &Endpoint, connections: &mut JoinSet<()>, incoming: Incoming) {
    if !incoming.remote_address_validated() && endpoint.open_connections() > UNPROVEN_MAX {
        // Fails only for an address that is validated already.
        let _validated = incoming.retry();
        return;
    }
    match shared.connection_slot() {
        Some(slot) => _ = connections.spawn(serve(Arc::clone(shared), slot, incoming)),
        None => incoming.refuse(),
    }
}

/// One connection, from its first packet to its end.
async fn serve(shared: Arc<Shared>, _slot: Slot, incoming: Incoming) {
    let address = incoming.remote_address();
    let mut stop = shared.stop.subscribe();
    let begun = tokio::select! {
        begun = begin(&shared, incoming) => begun,
        _ = stop.wait_for(|stop| *stop) => return,
    };
    let refused = match begun {
        Ok((introduced, connection)) => return introduced.run(&shared, connection).await,
        Err(fault) => fault,
    };
    // Who was let in before and merely comes too late is no news.
    if refused.fatal || refused.code == code::DENIED {
        tracing::warn!(%address, reason = refused.reason, "connection was refused");
        shared.sink.event(TargetEvent::Refused { address, reason: refused.reason });
    } else {
        tracing::debug!(%address, reason = refused.reason, "connection came to nothing");
    }
}

async fn begin(shared: &Arc<Shared>, incoming: Incoming) -> Result<(Introduced, Connection), Fault> {
    let limit = shared.limits.hello_timeout;
    let Ok(connected) = tokio::time::timeout(limit, incoming).await else {
        return Err(Fault::new(code::STALLED, format!("the handshake took longer than {limit:?}")));
    };
    let connection = connected?;
    match introduced(shared, &connection).await {
        Ok(introduced) => Ok((introduced, connection)),
        Err(fault) => {
            fault.close(&connection);
            Err(fault)
        }
    }
}

/// A connection that belongs to a session.
struct Introduced {
    session: Arc<Session>,
    /// The one that opened it: carries the messages, and its end is the session's.
    first: bool,
    send: SendStream,
    recv: RecvStream,
    slot: PeerSlot,
}

async fn introduced(shared: &Arc<Shared>, connection: &Connection) -> Result<Introduced, Fault> {
    let peer: PeerName = tls::peer_name(connection).map_err(|error| Fault::fatal(error.to_string()))?;
    shared.check_denied(&peer)?;
    let slot = shared.peer_slot(&peer)?;
    let limit = shared.limits.hello_timeout;
    let Ok(stream) = tokio::time::timeout(limit, connection.accept_bi()).await else {
        return Err(Fault::new(code::STALLED, format!("no introduction within {limit:?}")));
    };
    let (mut send, mut recv) = stream?;
    let hello = wire::read_hello(&mut recv, limit).await?;
    if *shared.stop.borrow() {
        return Err(stopping());
    }
    let first = hello.index == 0;
    let session = if first {
        shared.admit((peer, hello.channel), hello.token, connection.remote_address())?
    } else {
        shared.find(&(peer, hello.channel), hello.token)?
    };
    let welcome = Welcome {
        batch_bytes_max: shared.limits.batch_bytes_max,
        stream_window: shared.limits.transport.stream_window,
        connection_window: shared.limits.transport.connection_window,
        connections: shared.limits.connections_per_session,
    };
    let welcomed = match session.add_connection(shared.limits.connections_per_session) {
        Ok(()) => wire::write_message(&mut send, welcome.encode()).await,
        Err(fault) => Err(fault),
    };
    match welcomed {
        Ok(()) => Ok(Introduced { session, first, send, recv, slot }),
        Err(fault) if first => {
            shared.finish(&session, fault.clone());
            Err(fault)
        }
        Err(fault) => Err(fault),
    }
}

/// What a task of a connection was for.
enum Done {
    Batch,
    /// The source has ended its messages: it is closing, or answers our closing.
    PeerFinished,
    /// Our messages are out.
    Written,
}

type Tasks = JoinSet<Result<Done, Fault>>;

impl Introduced {
    async fn run(self, shared: &Arc<Shared>, connection: Connection) {
        let Self { session, first, send, recv, slot: _slot } = self;
        let mut tasks = Tasks::new();
        if first {
            spawn_messages(&mut tasks, &session, send, recv);
        } else {
            tasks.spawn(silence(send, recv));
        }
        let fault = drive(shared, &session, &connection, &mut tasks, first).await;
        let fault = session.end(fault);
        fault.close(&connection);
        if first {
            shared.finish(&session, fault);
        }
    }
}

fn spawn_messages(tasks: &mut Tasks, session: &Arc<Session>, send: SendStream, recv: RecvStream) {
    let (writer, reader) = (Arc::clone(session), Arc::clone(session));
    tasks.spawn(async move { writer.outbox.write_to(send).await.map(|()| Done::Written) });
    tasks.spawn(async move {
        let deliver = |bytes| _ = reader.life.emit(TargetEvent::Control { session: reader.id, bytes });
        outbox::read_from(recv, deliver).await?;
        // Answered in kind: the source waits for it before it closes.
        reader.outbox.close();
        Ok(Done::PeerFinished)
    });
}

/// The control stream of a further connection stays open and says nothing.
async fn silence(_send: SendStream, mut recv: RecvStream) -> Result<Done, Fault> {
    match recv.read_chunk(1, true).await? {
        None => Ok(Done::Batch),
        Some(_) => Err(Fault::protocol("a message on a connection that carries none")),
    }
}

/// Serves a connection until it or its session ends; returns why.
async fn drive(
    shared: &Arc<Shared>,
    session: &Arc<Session>,
    connection: &Connection,
    tasks: &mut Tasks,
    first: bool,
) -> Fault {
    let mut stop = shared.stop.subscribe();
    let (mut stopped, mut peer_finished, mut written) = (false, false, false);
    let mut deadline = None;
    loop {
        if stopped && first && peer_finished && written {
            return stopping();
        }
        tokio::select! {
            fault = session.ended() => return fault,
            error = connection.closed() => return error.into(),
            stream = connection.accept_bi(), if !stopped => match stream {
                Ok((send, recv)) => {
                    let receive = Arc::clone(session).receive_batch(Arc::clone(shared), send, recv);
                    tasks.spawn(async move { receive.await.map(|()| Done::Batch) });
                }
                Err(error) => return error.into(),
            },
            Some(done) = tasks.join_next(), if !tasks.is_empty() => match done {
                Ok(Ok(Done::Batch)) => {}
                Ok(Ok(Done::PeerFinished)) => peer_finished = true,
                Ok(Ok(Done::Written)) => written = true,
                Ok(Err(fault)) => return fault,
                Err(error) => return Fault::protocol(format!("the target failed: {error}")),
            },
            _ = stop.wait_for(|stop| *stop), if !stopped => {
                stopped = true;
                session.outbox.close();
                deadline = Some(tokio::time::Instant::now() + shared.limits.drain);
            },
            () = until(deadline) => return stopping(),
        }
    }
}

async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
