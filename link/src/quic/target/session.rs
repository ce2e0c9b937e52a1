use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use quinn::{RecvStream, SendStream, VarInt};
use tokio::sync::watch;

use super::super::gate::Gate;
use super::super::life::Life;
use super::super::outbox::Outbox;
use super::super::settings::TargetLimits;
use super::super::wire::{self, BATCH_HEADER_LEN, Fault, code};
use super::super::{LinkSink, TargetEvent, recv};
use super::{Shared, StreamName};
use crate::identity::PeerName;

/// One session at the target.
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) token: [u8; 16],
    pub(super) peer: PeerName,
    channel: [u8; 16],
    pub(super) address: SocketAddr,
    pub(super) outbox: Outbox,
    pub(super) life: Life<TargetEvent>,
    pub(super) gate: Arc<Gate>,
    connections: AtomicU16,
    fault: watch::Sender<Option<Fault>>,
}

impl Session {
    pub(super) fn new(
        id: u64,
        token: [u8; 16],
        (peer, channel): StreamName,
        address: SocketAddr,
        limits: &TargetLimits,
        sink: Arc<dyn LinkSink<TargetEvent>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            token,
            peer,
            channel,
            address,
            outbox: Outbox::new(id, limits.control_bytes_max),
            life: Life::new(sink),
            gate: Gate::new(limits.batches_in_flight_bytes),
            connections: AtomicU16::new(0),
            fault: watch::Sender::new(None),
        })
    }

    /// Whose session it is, and of which of its streams.
    pub(super) fn stream(&self) -> StreamName {
        (self.peer.clone(), self.channel)
    }

    /// Ends the session; its connections close with the first reason given, which is returned. Reported by the connection
    /// that opened it.
    pub(super) fn end(&self, fault: Fault) -> Fault {
        let mut first = fault;
        self.fault.send_if_modified(|known| match known {
            Some(known) => {
                first = known.clone();
                false
            }
            None => {
                *known = Some(first.clone());
                true
            }
        });
        self.outbox.discard();
        first
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> Fault {
        let mut fault = self.fault.subscribe();
        match fault.wait_for(Option::is_some).await.map(|fault| fault.clone()) {
            Ok(Some(fault)) => fault,
            // The sender lives in `self`, and the value was just seen.
            Ok(None) | Err(_) => Fault::protocol("the session is gone"),
        }
    }

    /// Counts a connection of the session.
    pub(super) fn add_connection(&self, max: u16) -> Result<(), Fault> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= max {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return Err(Fault::new(code::BUSY, format!("the target takes {max} connections of a session")));
        }
        Ok(())
    }

    /// Takes one batch from its stream to the sink and gives the receipt.
    pub(super) async fn receive_batch(
        self: Arc<Self>,
        shared: Arc<Shared>,
        send: SendStream,
        mut recv: RecvStream,
    ) -> Result<(), Fault> {
        let receipt = Receipt(Some(send));
        let limits = &shared.limits;
        let mut header = [0; BATCH_HEADER_LEN];
        match tokio::time::timeout(limits.stall_timeout, recv.read_exact(&mut header)).await {
            Ok(read) => read?,
            Err(_elapsed) => return Err(Fault::new(code::STALLED, "a batch's header stood still")),
        }
        let (len, sequence) = wire::read_batch_header(&header);
        let max = limits.batch_bytes_max;
        if len == 0 || len > max {
            return Err(Fault::protocol(format!("a batch of {len} bytes, allowed are 1 to {max}")));
        }
        let Ok(length) = usize::try_from(len) else {
            return Err(Fault::protocol("a batch beyond this machine's memory"));
        };
        let lease = self.gate.enter(sequence, len).await?;
        let bytes = recv::receive(&mut recv, &shared.pool, length, lease, limits.stall_timeout).await?;
        if self.life.emit(TargetEvent::Batch { session: self.id, sequence, bytes }) {
            receipt.give(sequence).await?;
        }
        Ok(())
    }
}

/// The way back on a batch's stream. Unless the receipt is given it is reset: to drop the stream would end it as if in order.
struct Receipt(Option<SendStream>);

impl Receipt {
    async fn give(mut self, sequence: u64) -> Result<(), Fault> {
        let Some(mut send) = self.0.take() else { return Ok(()) };
        send.write_all(&sequence.to_le_bytes()).await?;
        send.finish().map_err(|_| Fault::protocol("a batch's stream is closed already"))
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if let Some(mut send) = self.0.take() {
            // Fails only if the stream is closed already, which says as much.
            let _closed = send.reset(VarInt::from_u32(code::ENDED));
        }
    }
}
