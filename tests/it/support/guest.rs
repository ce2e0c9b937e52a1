//! A guest: pipelined writes, zeroes and trims over NBD, and a model of what the volume holds for it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use farshore_nbd::client::Client;
use farshore_nbd::wire::command;
use farshore_uring::sim::SimRng;

use super::{device, pattern, until};

/// Requests in flight.
const DEPTH: usize = 16;
/// All requests are multiples of this, at multiples of this.
const GRAIN: u64 = 4096;

#[derive(Clone, Copy)]
enum Kind {
    Write(u64),
    Zero,
    Trim,
}

#[derive(Clone, Copy)]
struct Op {
    kind: Kind,
    offset: u64,
    len: u32,
}

impl Op {
    fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    fn content(&self) -> Vec<u8> {
        match self.kind {
            Kind::Write(seed) => pattern::bytes(seed, self.len as usize),
            Kind::Zero | Kind::Trim => Vec::new(),
        }
    }
}

/// The server is gone, as after a kill.
#[derive(Debug)]
struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection broke")
    }
}

/// Whether that is what an error of a connection says.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

/// An error of the connection, in words.
fn said(error: io::Error, what: &'static str) -> anyhow::Error {
    let gone = is_gone(&error);
    let error = anyhow::Error::new(error).context(what);
    if gone { error.context(Gone) } else { error }
}

/// A client of one protected volume.
pub(crate) struct Guest {
    client: Option<Client>,
    socket: PathBuf,
    model: Vec<u8>,
    random: SimRng,
    in_flight: BTreeMap<u64, Op>,
}

impl Guest {
    /// Connects to a volume that holds `model` now.
    pub(crate) fn new(socket: &Path, model: Vec<u8>, seed: u64) -> Result<Self> {
        let client = Some(device::connect(socket)?);
        Ok(Self { client, socket: socket.to_owned(), model, random: SimRng::new(seed), in_flight: BTreeMap::new() })
    }

    /// What the volume holds once all in flight is done.
    pub(crate) fn model(&self) -> &[u8] {
        &self.model
    }

    /// `count` more requests at random places; returns when all but the last few are done.
    pub(crate) fn begin(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            if self.in_flight.len() == DEPTH {
                self.receive()?;
            }
            let op = self.choose();
            self.submit(op)?;
        }
        Ok(())
    }

    /// Requests at random places until the server is gone; gives how many were answered. Whatever else goes wrong is an error.
    pub(crate) fn work_until_gone(&mut self) -> Result<u64> {
        let mut answered = 0;
        loop {
            let is_full = self.in_flight.len() == DEPTH;
            let step = if is_full {
                self.receive()
            } else {
                let op = self.choose();
                self.submit(op)
            };
            match step {
                Ok(()) => answered += u64::from(is_full),
                Err(error) if error.is::<Gone>() => return Ok(answered),
                Err(error) => return Err(error),
            }
        }
    }

    /// `count` more requests, done when this returns.
    pub(crate) fn work(&mut self, count: usize) -> Result<()> {
        self.begin(count)?;
        self.drain()
    }

    /// Writes noise (nothing to compress, nothing to deduplicate) over a range.
    pub(crate) fn noise(&mut self, offset: u64, len: u32) -> Result<()> {
        self.drain()?;
        let seed = self.random.next_u64() & !3;
        self.submit(Op { kind: Kind::Write(seed), offset, len })?;
        self.drain()
    }

    /// Waits for all that is in flight.
    pub(crate) fn drain(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.receive()?;
        }
        Ok(())
    }

    /// All done and durable.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.drain()?;
        self.client()?.flush().context("flush")
    }

    /// Connects again after the agent died, looks whether all is there that was acknowledged, and repeats what was in flight: whether
    /// that happened is not known, and only repeating makes the content certain, as any guest would.
    pub(crate) fn reconnect(&mut self) -> Result<()> {
        self.client = None;
        let socket = self.socket.clone();
        self.client = Some(until("the volume is served again", || Ok(device::connect(&socket).ok()))?);
        let mut found = device::read_all(&socket)?;
        for op in self.in_flight.values() {
            let range = usize::try_from(op.offset)?..usize::try_from(op.end())?;
            found[range.clone()].copy_from_slice(&self.model[range]);
        }
        device::same("what was acknowledged", &found, &self.model)?;
        let open = std::mem::take(&mut self.in_flight);
        for op in open.into_values() {
            self.send(op)?;
        }
        self.drain()
    }

    /// Compares the volume with the model.
    pub(crate) fn verify(&mut self) -> Result<()> {
        self.drain()?;
        device::same("the protected volume", &device::read_all(&self.socket)?, &self.model)
    }

    /// Leaves the volume in order.
    pub(crate) fn leave(&mut self) -> Result<()> {
        self.flush()?;
        self.client.take().context("the guest is connected")?.disconnect().context("disconnect")
    }

    fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().context("the guest is connected")
    }

    /// Overlapping requests in flight have no defined result; a sane guest does not issue them.
    fn choose(&mut self) -> Op {
        let size = self.model.len() as u64;
        loop {
            let len = GRAIN << self.random.below(6);
            let offset = self.random.below((size - len) / GRAIN + 1) * GRAIN;
            let kind = match self.random.below(16) {
                0 => Kind::Trim,
                1 => Kind::Zero,
                _ => Kind::Write(self.random.next_u64()),
            };
            let op = Op { kind, offset, len: u32::try_from(len).expect("at most 128 KiB") };
            if !self.in_flight.values().any(|other| other.overlaps(&op)) {
                return op;
            }
        }
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        let range = usize::try_from(op.offset)?..usize::try_from(op.end())?;
        let place = self.model.get_mut(range).context("the guest writes inside of its volume")?;
        match op.kind {
            Kind::Write(_) => place.copy_from_slice(&op.content()),
            Kind::Zero | Kind::Trim => place.fill(0),
        }
        self.send(op)
    }

    fn send(&mut self, op: Op) -> Result<()> {
        let kind = match op.kind {
            Kind::Write(_) => command::WRITE,
            Kind::Zero => command::WRITE_ZEROES,
            Kind::Trim => command::TRIM,
        };
        let client = self.client.as_mut().context("the guest is connected")?;
        let cookie = client.submit(kind, 0, op.offset, op.len, &op.content());
        match cookie {
            Ok(cookie) => self.in_flight.insert(cookie, op),
            Err(error) => {
                // Not sent, or not wholly: repeated with the rest after a reconnect.
                self.in_flight.insert(u64::MAX - self.in_flight.len() as u64, op);
                return Err(said(error, "send a request"));
            }
        };
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let reply = self.client()?.receive().map_err(|error| said(error, "wait for a request"))?;
        reply.result.context("a request failed: protection must never fail the guest")?;
        ensure!(self.in_flight.remove(&reply.cookie).is_some(), "an answer to a request that was not made");
        Ok(())
    }
}
