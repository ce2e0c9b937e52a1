//! One connection: from received bytes to device requests, and from their ends to replies.

use std::ops::Range;
use std::sync::Arc;

use farshore_uring::{AlignedBuf, Errno, Extent, IoBuf, Purpose, Request, SendList};

use crate::haggle::{Haggle, Outcome};
use crate::output::{Body, Output};
use crate::proto::{self, Command, Export, Negotiated, RequestHeader};
use crate::reply::{self, Head};
use crate::stats::Counters;
use crate::wire::{self, error};

/// Bytes of the buffer for what is not received straight into a device's buffer: requests, options, and small payloads
/// that come behind them. Sixteen writes of 4 KiB: taking them in with one receive and copying them from the cache costs a
/// fraction of the receive, the turn and the send that each would need alone.
const INPUT_LEN: usize = 64 << 10;
/// Payload from which on copying does not pay: it is received where it belongs, and a receive waits for all of it (fewer
/// turns of the loop, as the bytes trickle in by socket buffers). After such a write only its successor's header is asked for.
const DIRECT_MIN: usize = 32 << 10;
/// Most device requests in flight for one guest request; more than that wait. In the usual pieces of 128 KiB that is 4 MiB,
/// twice what a fast disk has under way.
const PARTS_MAX: u32 = 32;

/// Names a part of a request of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    pub(crate) slot: u16,
    pub(crate) part: u32,
}

/// What a connection needs from below.
pub(crate) trait Backend<B> {
    fn buffer(&mut self, purpose: Purpose, len: u32) -> B;
    /// Ends with [`Conn::handle_done`], never from inside this call.
    fn submit(&mut self, part: Part, request: Request<B>);
    /// Asks for extents, off this thread. Ends with [`Conn::handle_extents`].
    fn extents(&mut self, slot: u16, offset: u64, len: u32);
}

/// What a connection may take at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Requests from header to sent reply.
    pub(crate) requests: u16,
    /// Bytes of data of these; a single request may pass it alone.
    pub(crate) bytes: u64,
}

/// A receive that the connection wants.
pub(crate) struct Receive<B> {
    pub(crate) first: Option<(B, Range<usize>)>,
    pub(crate) second: Option<(AlignedBuf, Range<usize>)>,
    pub(crate) wait_all: bool,
}

enum Phase {
    Haggle(Box<Haggle>),
    Transmit,
    /// Nothing more is read; closed when all replies are out.
    Leaving,
    /// Closed as soon as nothing is in flight.
    Dead,
}

/// For `docs/states.md`: each state of a connection, its longest stay, what ends it.
pub const CONNECTION_STATES: [[&str; 3]; 4] = [
    ["handshake", "`handshake_max` 10 s", "agreed, given up or refused; at the limit the connection is closed"],
    [
        "transmission",
        "none: as long as the client keeps it; `connections_max` bounds them",
        "disconnect, violation, stop",
    ],
    [
        "leaving",
        "none: requests below end and the client reads its replies; at a stop of the server `stop_grace` 2 s",
        "all replies are out; the client is gone",
    ],
    [
        "dead",
        "none: what is in flight below ends, however long the disk takes: it has the buffers",
        "nothing is in flight",
    ],
];
const _: fn(&Phase) -> &[&str; 3] = |phase| match phase {
    Phase::Haggle(_) => &CONNECTION_STATES[0],
    Phase::Transmit => &CONNECTION_STATES[1],
    Phase::Leaving => &CONNECTION_STATES[2],
    Phase::Dead => &CONNECTION_STATES[3],
};

/// The payload being received: one part of a write.
struct Fill<B> {
    slot: u16,
    /// `None` while lent to the receive.
    buf: Option<B>,
    filled: usize,
    len: usize,
    /// The write ends with this part, so a request follows.
    last: bool,
}

/// Payload of a refused write, to be dropped before its reply.
struct Skip {
    slot: u16,
    left: usize,
}

/// One request from its header to its sent reply.
struct Slot<B> {
    header: RequestHeader,
    command: Command,
    /// Bytes handed to the device.
    issued: u32,
    /// Parts handed to the device (or extents asked for) and not ended.
    pending: u32,
    parts: u32,
    /// The protocol's number of the first error; 0: none.
    error: u32,
    /// A flush, or a trim with FUA: the device's flush is submitted.
    flushed: bool,
    /// It never was a command; `command` says nothing.
    refused: bool,
    /// Of a read, by part.
    data: Vec<Option<B>>,
    /// Bytes of data held for it.
    held: u64,
}

/// The server's side of one connection. Performs no I/O; a device and a socket are reached by its owner.
///
/// Inputs: `handle_*`; after each, [`Self::advance`]. Outputs: [`Self::poll_receive`] and [`Self::poll_send`], each to be
/// carried out and answered by `handle_received` and `handle_sent`; [`Self::wants_close`], [`Self::is_quiet`].
///
/// Invariants: a slot is in use from the header of its request until its reply is sent, so the replies that wait are
/// bounded by the slots; after a breach of the protocol nothing more is read.
pub(crate) struct Conn<B: IoBuf> {
    export: Arc<Export>,
    bounds: Bounds,
    counters: Arc<Counters>,
    phase: Phase,
    negotiated: Negotiated,
    shutting_down: bool,
    /// `None` while lent to the receive.
    input: Option<AlignedBuf>,
    /// Received and not looked at.
    unread: Range<usize>,
    /// Where the second piece of the receive in flight begins.
    receive_at: usize,
    receiving: bool,
    /// Bytes beyond the expected payload that the next receive asks for.
    window: usize,
    fill: Option<Fill<B>>,
    skip: Option<Skip>,
    /// A good header that waits for a slot or for room.
    stalled: Option<RequestHeader>,
    slots: Vec<Slot<B>>,
    free: Vec<u16>,
    /// Bytes of data of the requests in flight.
    bytes: u64,
    /// Sum of `pending` of all slots.
    below: u32,
    output: Output<B>,
}

impl<B: IoBuf> Conn<B> {
    pub(crate) fn new(export: Arc<Export>, bounds: Bounds, counters: Arc<Counters>) -> Self {
        let mut conn = Self {
            phase: Phase::Haggle(Box::new(Haggle::new(Arc::clone(&export)))),
            export,
            bounds,
            counters,
            negotiated: Negotiated::default(),
            shutting_down: false,
            input: Some(AlignedBuf::zeroed(INPUT_LEN)),
            unread: 0..0,
            receive_at: 0,
            receiving: false,
            window: INPUT_LEN,
            fill: None,
            skip: None,
            stalled: None,
            slots: Vec::new(),
            free: Vec::new(),
            bytes: 0,
            below: 0,
            output: Output::new(),
        };
        conn.haggle_output();
        conn
    }

    /// A receive ended: `received` bytes (0: the client sends no more) or an error.
    pub(crate) fn handle_received(&mut self, received: Option<usize>, first: Option<B>, second: Option<AlignedBuf>) {
        self.receiving = false;
        if let Some(second) = second {
            self.input = Some(second);
        }
        if let (Some(fill), Some(first)) = (&mut self.fill, first) {
            fill.buf = Some(first);
        }
        let Some(mut count) = received else {
            self.kill();
            return;
        };
        if count == 0 {
            self.leave();
            return;
        }
        if let Some(fill) = &mut self.fill {
            let taken = count.min(fill.len - fill.filled);
            fill.filled += taken;
            count -= taken;
        }
        if count > 0 {
            self.unread.end = self.receive_at + count;
        }
    }

    /// A send ended. Its slots are free now.
    pub(crate) fn handle_sent(&mut self, sent: bool, list: SendList<B>) {
        for slot in self.output.handle_sent(list) {
            self.bytes -= self.slots[usize::from(slot)].held;
            self.free.push(slot);
        }
        self.counters.set_in_flight(self.slots.len() - self.free.len());
        if !sent {
            self.kill();
        }
    }

    /// A device request ended.
    pub(crate) fn handle_done(
        &mut self,
        backend: &mut impl Backend<B>,
        part: Part,
        result: Result<(), Errno>,
        buf: Option<B>,
    ) {
        self.below -= 1;
        let slot = &mut self.slots[usize::from(part.slot)];
        slot.pending -= 1;
        if let Err(errno) = result
            && slot.error == 0
        {
            slot.error = proto::error_number(errno);
        }
        if slot.command == Command::Read {
            let index = usize::try_from(part.part).expect("a part of a request");
            slot.data[index] = buf;
        }
        self.proceed(backend, part.slot);
    }

    /// The extents asked for.
    pub(crate) fn handle_extents(&mut self, slot: u16, result: Result<Vec<Extent>, Errno>) {
        self.below -= 1;
        let state = &mut self.slots[usize::from(slot)];
        state.pending -= 1;
        let header = state.header;
        let extents = match result {
            Ok(extents) => extents,
            Err(errno) => {
                state.error = proto::error_number(errno);
                self.finish(slot);
                return;
            }
        };
        if matches!(self.phase, Phase::Dead) {
            return;
        }
        self.counters.add_request(&header, state.command, 0);
        let one = state.command == Command::BlockStatus { one: true };
        let block = self.export.geometry().logical_block;
        let extents = reply::status_extents(&extents, header.offset, header.len, block, one);
        let head = Head::status(header.cookie, extents.len());
        self.output.push_bytes(head, &reply::encode_extents(&extents), Some(slot));
    }

    /// The server is stopping: requests from now on are refused with `ESHUTDOWN`.
    pub(crate) fn handle_shutdown(&mut self) {
        self.shutting_down = true;
        if matches!(self.phase, Phase::Haggle(_)) {
            self.leave();
        }
    }

    /// Gives the connection up: the client is gone, or out of patience.
    pub(crate) fn kill(&mut self) {
        self.phase = Phase::Dead;
        self.output.clear();
        self.stalled = None;
        self.counters.set_leaving();
    }

    /// Looks at what was received, as far as slots and bytes allow.
    pub(crate) fn advance(&mut self, backend: &mut impl Backend<B>) {
        if self.receiving {
            return;
        }
        while match self.phase {
            Phase::Haggle(_) => self.advance_haggle(),
            Phase::Transmit => self.advance_transmit(backend),
            Phase::Leaving | Phase::Dead => false,
        } {}
        if self.unread.is_empty() {
            self.unread = 0..0;
        }
    }

    /// The next receive, if one is wanted now.
    pub(crate) fn poll_receive(&mut self) -> Option<Receive<B>> {
        let wanted = match self.phase {
            // While answers wait, a client that does not read them is not listened to.
            Phase::Haggle(_) => self.output.is_idle(),
            Phase::Transmit => self.stalled.is_none(),
            Phase::Leaving | Phase::Dead => false,
        };
        if self.receiving || !wanted {
            return None;
        }
        self.receiving = true;
        if let Some(fill) = &mut self.fill {
            let range = fill.filled..fill.len;
            let wait_all = range.len() >= DIRECT_MIN;
            let first = fill.buf.take().map(|buf| (buf, range));
            let next_request = fill.last && !wait_all;
            let second = if next_request { self.lend_input(self.window) } else { None };
            return Some(Receive { first, second, wait_all });
        }
        let len = match (&self.phase, &self.skip) {
            (Phase::Haggle(_), _) => INPUT_LEN,
            (_, Some(skip)) => skip.left.saturating_add(wire::REQUEST_LEN),
            (_, None) => self.window,
        };
        let second = self.lend_input(len);
        Some(Receive { first: None, second, wait_all: false })
    }

    /// The next send, if there is something to send and no send in flight.
    pub(crate) fn poll_send(&mut self) -> Option<SendList<B>> {
        if matches!(self.phase, Phase::Dead) { None } else { self.output.poll_send() }
    }

    /// Whether the socket is of no use any more.
    pub(crate) fn wants_close(&self) -> bool {
        let drained = self.free.len() == self.slots.len() && self.output.is_idle() && self.stalled.is_none();
        match self.phase {
            Phase::Haggle(_) => false,
            Phase::Transmit => self.shutting_down && drained && self.fill.is_none() && self.skip.is_none(),
            Phase::Leaving => drained,
            Phase::Dead => true,
        }
    }

    /// Whether neither the device nor the socket holds anything of it: the state may be dropped.
    pub(crate) fn is_quiet(&self) -> bool {
        self.below == 0 && !self.receiving && !self.output.is_sending()
    }

    /// Whether the handshake is still going on.
    pub(crate) fn is_haggling(&self) -> bool {
        matches!(self.phase, Phase::Haggle(_))
    }

    /// Nothing more is read. What was begun but not wholly received never becomes a request.
    fn leave(&mut self) {
        if matches!(self.phase, Phase::Dead) {
            return;
        }
        self.phase = Phase::Leaving;
        self.counters.set_leaving();
        self.stalled = None;
        if let Some(skip) = self.skip.take() {
            self.drop_slot(skip.slot);
        }
        if let Some(fill) = self.fill.take() {
            let slot = &mut self.slots[usize::from(fill.slot)];
            // Parts that went to the device before end without a reply.
            slot.header.len = slot.issued;
            slot.error = error::EIO;
            if slot.pending == 0 {
                self.drop_slot(fill.slot);
            }
        }
    }

    fn drop_slot(&mut self, slot: u16) {
        self.bytes -= self.slots[usize::from(slot)].held;
        self.free.push(slot);
    }

    /// Lends room for `len` more bytes behind what is unread.
    fn lend_input(&mut self, len: usize) -> Option<(AlignedBuf, Range<usize>)> {
        let mut input = self.input.take()?;
        if self.unread.start > 0 {
            input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        let partial = if self.fill.is_none() && self.skip.is_none() { self.unread.len() } else { 0 };
        let end = self.unread.end.saturating_add(len - partial.min(len - 1)).min(INPUT_LEN);
        self.receive_at = self.unread.end;
        Some((input, self.unread.end..end))
    }

    fn haggle_output(&mut self) {
        if let Phase::Haggle(haggle) = &mut self.phase {
            self.output.push_bytes(Head::NONE, &haggle.poll_output(), None);
        }
    }

    /// One step of the handshake; `false`: nothing to do now.
    fn advance_haggle(&mut self) -> bool {
        let (Phase::Haggle(haggle), Some(input)) = (&mut self.phase, &self.input) else { return false };
        if self.unread.is_empty() || !self.output.is_idle() {
            return false;
        }
        self.unread.start += haggle.handle_bytes(&input[self.unread.clone()]);
        let outcome = haggle.outcome();
        self.haggle_output();
        match outcome {
            None => return false,
            Some(Outcome::Transmission(negotiated)) => {
                self.negotiated = negotiated;
                self.phase = Phase::Transmit;
                self.counters.set_transmitting();
                tracing::debug!(connection = self.counters.id, ?negotiated, "transmission begins");
            }
            Some(Outcome::Aborted) => self.leave(),
            Some(Outcome::Refused(violation)) => {
                self.counters.add_violation();
                tracing::info!(connection = self.counters.id, %violation, "handshake refused");
                self.leave();
            }
        }
        true
    }

    /// One step of the transmission; `false`: more bytes, a slot or room is needed.
    fn advance_transmit(&mut self, backend: &mut impl Backend<B>) -> bool {
        if self.fill.is_some() {
            return self.advance_fill(backend);
        }
        if let Some(skip) = &mut self.skip {
            let taken = skip.left.min(self.unread.len());
            skip.left -= taken;
            self.unread.start += taken;
            if skip.left > 0 {
                return false;
            }
            let slot = skip.slot;
            self.skip = None;
            self.finish(slot);
            return true;
        }
        let Some(header) = self.stalled.take().map_or_else(|| self.next_header(), Some) else { return false };
        let room = self.bytes == 0 || self.bytes + data_len(&header) <= self.bounds.bytes;
        let slot = if room { self.take_slot() } else { None };
        let Some(slot) = slot else {
            self.stalled = Some(header);
            return false;
        };
        self.begin(backend, slot, header);
        true
    }

    fn next_header(&mut self) -> Option<RequestHeader> {
        let input = self.input.as_ref()?;
        let bytes = input[self.unread.clone()].first_chunk::<{ wire::REQUEST_LEN }>()?;
        match RequestHeader::parse(bytes) {
            Ok(header) => {
                self.unread.start += wire::REQUEST_LEN;
                Some(header)
            }
            Err(violation) => {
                self.counters.add_violation();
                tracing::warn!(connection = self.counters.id, %violation, "connection ended");
                self.leave();
                None
            }
        }
    }

    fn take_slot(&mut self) -> Option<u16> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let next = u16::try_from(self.slots.len()).ok().filter(|&next| next < self.bounds.requests)?;
        let header = RequestHeader { flags: 0, kind: 0, cookie: 0, offset: 0, len: 0 };
        let command = Command::Flush;
        let slot = Slot {
            header,
            command,
            issued: 0,
            pending: 0,
            parts: 0,
            error: 0,
            flushed: false,
            refused: false,
            data: Vec::new(),
            held: 0,
        };
        self.slots.push(slot);
        Some(next)
    }

    fn begin(&mut self, backend: &mut impl Backend<B>, slot: u16, header: RequestHeader) {
        let payload = usize::try_from(header.payload_len()).expect("u32 fits usize");
        self.window = if payload < DIRECT_MIN { INPUT_LEN } else { wire::REQUEST_LEN };
        let checked = header.check(&self.export, self.negotiated);
        let checked = match checked {
            Ok(command) if self.shutting_down && command != Command::Disconnect => Err(error::ESHUTDOWN),
            other => other,
        };
        let command = match checked {
            Ok(Command::Disconnect) => {
                self.free.push(slot);
                self.leave();
                return;
            }
            Ok(command) => command,
            // Only for the reply's form, which follows the header.
            Err(_) => Command::Flush,
        };
        let in_flight = self.slots.len() - self.free.len();
        let state = &mut self.slots[usize::from(slot)];
        state.held = data_len(&header);
        self.bytes += state.held;
        self.counters.set_in_flight(in_flight);
        state.header = header;
        state.command = command;
        (state.issued, state.pending, state.parts, state.flushed) = (0, 0, 0, false);
        state.refused = checked.is_err();
        state.error = checked.err().unwrap_or(0);
        state.data.clear();
        if state.error != 0 {
            self.counters.add_refused();
            if payload > 0 {
                self.skip = Some(Skip { slot, left: payload });
            } else {
                self.finish(slot);
            }
            return;
        }
        match command {
            Command::Write { .. } => self.open_fill(backend, slot),
            Command::BlockStatus { .. } => {
                state.pending = 1;
                self.below += 1;
                backend.extents(slot, header.offset, header.len);
            }
            Command::Read
            | Command::Flush
            | Command::Trim { .. }
            | Command::WriteZeroes { .. }
            | Command::Disconnect => self.proceed(backend, slot),
        }
    }

    fn open_fill(&mut self, backend: &mut impl Backend<B>, slot: u16) {
        let state = &self.slots[usize::from(slot)];
        let left = state.header.len - state.issued;
        let len = left.min(self.export.part_len());
        let buf = backend.buffer(Purpose::Write, len);
        let size = usize::try_from(len).expect("u32 fits usize");
        self.fill = Some(Fill { slot, buf: Some(buf), filled: 0, len: size, last: len == left });
    }

    /// Moves payload that came with the headers, and hands a full part to the device.
    fn advance_fill(&mut self, backend: &mut impl Backend<B>) -> bool {
        let Some(fill) = &mut self.fill else { return false };
        let Some(buf) = &mut fill.buf else { return false };
        let taken = (fill.len - fill.filled).min(self.unread.len());
        if taken > 0 {
            let input = self.input.as_ref().expect("it holds unread bytes, so it is here");
            let from = self.unread.start;
            buf[fill.filled..fill.filled + taken].copy_from_slice(&input[from..from + taken]);
            fill.filled += taken;
            self.unread.start += taken;
        }
        if fill.filled < fill.len {
            return false;
        }
        let Some(Fill { slot, buf: Some(buf), len, last, .. }) = self.fill.take() else { return false };
        let len = u32::try_from(len).expect("from a u32");
        let state = &mut self.slots[usize::from(slot)];
        let offset = state.header.offset + u64::from(state.issued);
        // The last part alone makes nothing before it durable, so every part carries the flag.
        let fua = state.command == Command::Write { fua: true };
        let part = Part { slot, part: state.parts };
        state.issued += len;
        state.parts += 1;
        state.pending += 1;
        self.below += 1;
        backend.submit(part, Request::Write { offset, len, buf, fua });
        if !last {
            self.open_fill(backend, slot);
        }
        true
    }

    /// Hands the next parts of a request to the device, or finishes it.
    fn proceed(&mut self, backend: &mut impl Backend<B>, index: u16) {
        if matches!(self.phase, Phase::Dead) {
            return;
        }
        let (part_len, max_discard) = (self.export.part_len(), self.export.geometry().max_discard);
        let slot = &mut self.slots[usize::from(index)];
        let before = slot.pending;
        if slot.error == 0 {
            match slot.command {
                Command::Read => {
                    while let Some((part, offset, len)) = slot.next_part(index, part_len) {
                        let buf = backend.buffer(Purpose::Read, len);
                        slot.data.push(None);
                        backend.submit(part, Request::Read { offset, len, buf });
                    }
                }
                Command::Trim { .. } => {
                    while let Some((part, offset, len)) = slot.next_part(index, max_discard) {
                        backend.submit(part, Request::Discard { offset, len: u64::from(len) });
                    }
                }
                Command::WriteZeroes { fua, no_hole } => {
                    while let Some((part, offset, len)) = slot.next_part(index, max_discard) {
                        let len = u64::from(len);
                        backend.submit(part, Request::WriteZeroes { offset, len, fua, no_hole });
                    }
                }
                Command::Write { .. } | Command::Flush | Command::BlockStatus { .. } | Command::Disconnect => {}
            }
            let flush = matches!(slot.command, Command::Flush | Command::Trim { fua: true });
            if flush && slot.pending == 0 && !slot.flushed {
                slot.flushed = true;
                slot.pending = 1;
                backend.submit(Part { slot: index, part: slot.parts }, Request::Flush);
            }
        }
        self.below += slot.pending - before;
        // A write's payload is received to its end, error or not.
        let whole = slot.issued == slot.header.len || !matches!(slot.command, Command::Write { .. });
        if slot.pending == 0 && whole {
            self.finish(index);
        }
    }

    /// Queues the reply.
    fn finish(&mut self, index: u16) {
        if matches!(self.phase, Phase::Dead) {
            return;
        }
        let Slot { header, command, error, data, refused, .. } = &mut self.slots[usize::from(index)];
        if !*refused {
            self.counters.add_request(header, *command, *error);
        }
        let chunked = proto::is_chunked(header.kind, self.negotiated);
        if *error != 0 {
            let head = if chunked { Head::error(header.cookie, *error) } else { Head::simple(header.cookie, *error) };
            data.clear();
            self.output.push(head, Body::Empty, Some(index));
            return;
        }
        if *command != Command::Read {
            self.output.push(Head::simple(header.cookie, 0), Body::Empty, Some(index));
            return;
        }
        let mut head =
            if chunked { Head::data(header.cookie, header.offset, header.len) } else { Head::simple(header.cookie, 0) };
        let mut left = header.len;
        for part in data.drain(..) {
            let buf = part.expect("a read that ended well gives its buffer back");
            let len = left.min(self.export.part_len());
            left -= len;
            let finishes = (left == 0).then_some(index);
            self.output.push(std::mem::replace(&mut head, Head::NONE), Body::Data(buf, len), finishes);
        }
    }
}

impl<B> Slot<B> {
    /// Accounts for the next part of at most `longest` bytes: its name, offset and length.
    fn next_part(&mut self, index: u16, longest: u32) -> Option<(Part, u64, u32)> {
        if self.issued == self.header.len || self.pending == PARTS_MAX {
            return None;
        }
        let len = (self.header.len - self.issued).min(longest);
        let offset = self.header.offset + u64::from(self.issued);
        let part = Part { slot: index, part: self.parts };
        self.issued += len;
        self.parts += 1;
        self.pending += 1;
        Some((part, offset, len))
    }
}

/// Bytes of data that a request holds in memory while in flight.
fn data_len(header: &RequestHeader) -> u64 {
    use wire::command;
    if matches!(header.kind, command::READ | command::WRITE) && header.len <= wire::PAYLOAD_MAX {
        u64::from(header.len)
    } else {
        0
    }
}
