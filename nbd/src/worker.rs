//! One serving thread: a reactor, a queue of the device, and the connections dealt to it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farshore_uring::{
    BlockDevice, BlockQueue, Done, Errno, Extent, FileSlot, IoBuf, NetCompletion, NetEvent, Purpose, Reactor, Request,
    Token, Wait, Waker,
};

use crate::conn::{Backend, Bounds, Conn, Part};
use crate::extents::{Job, Jobs};
use crate::listen::{self, Address};
use crate::proto::Export;
use crate::stats::{Counters, Peer, Registry};

/// Time until the next attempt after a failed accept (out of descriptors, mostly).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// What other threads tell a worker.
pub(crate) enum Message {
    Connection { socket: OwnedFd, counters: Arc<Counters> },
    Extents { conn: u32, slot: u16, result: Result<Vec<Extent>, Errno> },
}

/// A worker's letter box. Bounded by the connections of the server and their request slots. Not used by requests in the
/// steady state.
pub(crate) struct Mailbox {
    waker: Waker,
    /// `None` after the worker's end.
    messages: Mutex<Option<Vec<Message>>>,
}

impl Mailbox {
    pub(crate) fn new(waker: Waker) -> Self {
        Self { waker, messages: Mutex::new(Some(Vec::new())) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Vec<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the threads of one server share.
pub(crate) struct Shared {
    pub(crate) export: Arc<Export>,
    pub(crate) address: Address,
    pub(crate) bounds: Bounds,
    pub(crate) connections_max: usize,
    pub(crate) handshake_max: Duration,
    pub(crate) stop_grace: Duration,
    pub(crate) registry: Registry,
    pub(crate) stopping: AtomicBool,
    pub(crate) mailboxes: Vec<Mailbox>,
    pub(crate) next_thread: AtomicUsize,
}

impl Shared {
    /// Deals a connection to the next thread.
    ///
    /// # Errors
    /// `WouldBlock`: there are too many; `NotConnected`: the server is stopping.
    pub(crate) fn deal(&self, socket: OwnedFd, peer: Peer) -> io::Result<()> {
        let thread = self.next_thread.fetch_add(1, Ordering::Relaxed) % self.mailboxes.len();
        let Some(counters) = self.registry.open(peer, thread, self.connections_max) else {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "too many connections"));
        };
        let kept = Arc::clone(&counters);
        if self.send(thread, Message::Connection { socket, counters }) {
            return Ok(());
        }
        self.registry.close(&kept);
        Err(io::Error::new(io::ErrorKind::NotConnected, "the server is stopping"))
    }

    /// `false`: that worker has ended, the message is dropped.
    pub(crate) fn send(&self, thread: usize, message: Message) -> bool {
        let mailbox = &self.mailboxes[thread];
        match &mut *mailbox.lock() {
            Some(messages) => messages.push(message),
            None => return false,
        }
        mailbox.waker.wake();
        true
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.mailboxes.iter().for_each(|mailbox| mailbox.waker.wake());
    }
}

/// Tags of the device requests in flight: who asked.
#[derive(Debug, Default)]
struct Tags {
    owners: Vec<(u32, Part)>,
    free: Vec<u32>,
}

impl Tags {
    fn take(&mut self, conn: u32, part: Part) -> u32 {
        if let Some(tag) = self.free.pop() {
            self.owners[index(tag)] = (conn, part);
            return tag;
        }
        self.owners.push((conn, part));
        u32::try_from(self.owners.len() - 1).expect("bounded by the request slots and their parts")
    }

    fn give_back(&mut self, tag: u32) -> (u32, Part) {
        self.free.push(tag);
        self.owners[index(tag)]
    }
}

fn index(value: u32) -> usize {
    usize::try_from(value).expect("u32 fits usize")
}

#[expect(clippy::disallowed_methods, reason = "a driver: deadlines on real sockets begin here")]
fn now() -> Instant {
    Instant::now()
}

/// Operations of a worker on its reactor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Accept,
    Receive(u32),
    Send(u32),
}

impl Operation {
    fn token(self) -> Token {
        Token::front(match self {
            Self::Accept => 0,
            Self::Receive(conn) => u64::from(conn) << 2 | 1,
            Self::Send(conn) => u64::from(conn) << 2 | 2,
        })
    }

    fn of(token: Token) -> Self {
        let conn = u32::try_from(token.value() >> 2).expect("made by `token`");
        match token.value() & 3 {
            1 => Self::Receive(conn),
            2 => Self::Send(conn),
            _ => Self::Accept,
        }
    }
}

struct Entry<B: IoBuf> {
    conn: Conn<B>,
    socket: FileSlot,
    counters: Arc<Counters>,
    /// End of the handshake's time; `None` once it is over.
    handshake_until: Option<Instant>,
    closed: bool,
    /// In the list of those to be looked at.
    touched: bool,
}

/// The device and what leads to it, for one connection.
struct Below<'a, D: BlockDevice> {
    reactor: &'a mut Reactor<D::Buf>,
    queue: &'a mut D::Queue,
    tags: &'a mut Tags,
    jobs: &'a Jobs,
    thread: usize,
    conn: u32,
}

impl<D: BlockDevice> Backend<D::Buf> for Below<'_, D> {
    fn buffer(&mut self, purpose: Purpose, len: u32) -> D::Buf {
        self.queue.buffer(purpose, len)
    }

    fn submit(&mut self, part: Part, request: Request<D::Buf>) {
        let tag = self.tags.take(self.conn, part);
        self.queue.submit(self.reactor, tag, request);
    }

    fn extents(&mut self, slot: u16, offset: u64, len: u32) {
        self.jobs.push(Job { thread: self.thread, conn: self.conn, slot, offset, len });
    }
}

/// The driver of one thread.
pub(crate) struct Worker<D: BlockDevice> {
    thread: usize,
    shared: Arc<Shared>,
    jobs: Arc<Jobs>,
    reactor: Reactor<D::Buf>,
    queue: D::Queue,
    tags: Tags,
    entries: Vec<Option<Entry<D::Buf>>>,
    /// Connections to be looked at.
    touched: Vec<u32>,
    handshakes: usize,
    listener: Option<FileSlot>,
    accepting: bool,
    accept_after: Option<Instant>,
    /// Set once the server is stopping: when patience ends.
    stop_until: Option<Instant>,
}

impl<D: BlockDevice> Worker<D> {
    pub(crate) fn new(
        thread: usize,
        shared: Arc<Shared>,
        jobs: Arc<Jobs>,
        reactor: Reactor<D::Buf>,
        queue: D::Queue,
    ) -> Self {
        Self {
            thread,
            shared,
            jobs,
            reactor,
            queue,
            tags: Tags::default(),
            entries: Vec::new(),
            touched: Vec::new(),
            handshakes: 0,
            listener: None,
            accepting: false,
            accept_after: None,
            stop_until: None,
        }
    }

    /// Makes this the thread that accepts.
    pub(crate) fn listen(&mut self, socket: OwnedFd) -> io::Result<()> {
        let listener = self.reactor.register_socket(socket)?;
        self.listener = Some(listener);
        self.accept();
        Ok(())
    }

    /// Serves until the stop, or until the reactor fails.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        while !self.is_finished() {
            self.reactor.run_once(Wait::Until(self.next_deadline()))?;
            self.turn();
        }
        Ok(())
    }

    /// Refuses all further messages and accounts for the connections that are left.
    pub(crate) fn finish(&mut self) {
        let left = self.shared.mailboxes[self.thread].lock().take();
        for message in left.into_iter().flatten() {
            if let Message::Connection { counters, .. } = message {
                self.shared.registry.close(&counters);
            }
        }
        for entry in self.entries.drain(..).flatten() {
            self.shared.registry.close(&entry.counters);
        }
    }

    fn is_finished(&self) -> bool {
        self.stop_until.is_some() && !self.accepting && self.entries.iter().all(Option::is_none)
    }

    fn turn(&mut self) {
        while let Some(completion) = self.reactor.poll_completion() {
            self.queue.handle_completion(&mut self.reactor, completion);
        }
        if self.reactor.take_wakeup() {
            self.queue.handle_wake(&mut self.reactor);
            self.take_messages();
        }
        while let Some(completion) = self.reactor.poll_net() {
            self.handle_net(completion);
        }
        self.handle_deadlines();
        self.settle();
    }

    /// Lets every touched connection take in what it can, then starts its socket operations: sends last, so that all
    /// replies of this turn go out together.
    fn settle(&mut self) {
        let mut looked = 0;
        loop {
            while let Some(done) = self.queue.poll_done() {
                self.handle_done(done);
            }
            let Some(&conn) = self.touched.get(looked) else { break };
            looked += 1;
            self.with_conn(conn, |conn, below| conn.advance(below));
        }
        for looked in 0..self.touched.len() {
            self.operate(self.touched[looked]);
        }
        self.touched.clear();
    }

    /// Runs `f` on a connection. A connection that is touched again later in the same turn is looked at again only if
    /// something ended for it; `advance` is complete in itself.
    fn with_conn(&mut self, conn: u32, f: impl FnOnce(&mut Conn<D::Buf>, &mut Below<'_, D>)) {
        let Some(Some(entry)) = self.entries.get_mut(index(conn)) else { return };
        let mut below = Below {
            reactor: &mut self.reactor,
            queue: &mut self.queue,
            tags: &mut self.tags,
            jobs: &self.jobs,
            thread: self.thread,
            conn,
        };
        f(&mut entry.conn, &mut below);
    }

    fn touch(&mut self, conn: u32) {
        if let Some(Some(entry)) = self.entries.get_mut(index(conn))
            && !std::mem::replace(&mut entry.touched, true)
        {
            self.touched.push(conn);
        }
    }

    /// Starts what the connection wants of its socket, and lets it go where nothing is left of it.
    fn operate(&mut self, conn: u32) {
        let Some(slot) = self.entries.get_mut(index(conn)) else { return };
        let Some(entry) = slot else { return };
        entry.touched = false;
        if entry.handshake_until.is_some() && !entry.conn.is_haggling() {
            entry.handshake_until = None;
            self.handshakes -= 1;
        }
        if !entry.closed {
            if entry.conn.wants_close() {
                entry.closed = true;
                self.reactor.shutdown(entry.socket);
                self.reactor.close(entry.socket);
            } else {
                if let Some(list) = entry.conn.poll_send() {
                    self.reactor.send(Operation::Send(conn).token(), entry.socket, list);
                }
                if let Some(receive) = entry.conn.poll_receive() {
                    let token = Operation::Receive(conn).token();
                    self.reactor.recv(token, entry.socket, receive.first, receive.second, receive.wait_all);
                }
            }
        }
        if entry.closed && entry.conn.is_quiet() {
            self.shared.registry.close(&entry.counters);
            tracing::debug!(connection = entry.counters.id, "connection closed");
            *slot = None;
        }
    }

    fn handle_done(&mut self, done: Done<D::Buf>) {
        let (conn, part) = self.tags.give_back(done.tag);
        self.with_conn(conn, |conn, below| conn.handle_done(below, part, done.result, done.buf));
        self.touch(conn);
    }

    fn handle_net(&mut self, completion: NetCompletion<D::Buf>) {
        let NetCompletion { token, result, event } = completion;
        match (Operation::of(token), event) {
            (Operation::Accept, NetEvent::Accepted(socket)) => self.handle_accepted(result.map(|_| socket)),
            (Operation::Receive(conn), NetEvent::Received { first, second }) => {
                if let Err(error) = &result {
                    tracing::debug!(conn, %error, "receive failed");
                }
                let received = result.ok().map(index);
                self.with_conn(conn, |conn, _| conn.handle_received(received, first, second));
                self.touch(conn);
            }
            (Operation::Send(conn), NetEvent::Sent(list)) => {
                if let Err(error) = &result {
                    tracing::debug!(conn, %error, "send failed");
                }
                self.with_conn(conn, |conn, _| conn.handle_sent(result.is_ok(), list));
                self.touch(conn);
            }
            (operation, NetEvent::Accepted(_) | NetEvent::Received { .. } | NetEvent::Sent(_) | NetEvent::Timeout) => {
                unreachable!("{operation:?} ended as another operation")
            }
        }
    }

    fn accept(&mut self) {
        if let Some(listener) = self.listener {
            self.accepting = true;
            self.accept_after = None;
            self.reactor.accept(Operation::Accept.token(), listener);
        }
    }

    fn handle_accepted(&mut self, result: io::Result<Option<OwnedFd>>) {
        self.accepting = false;
        match result {
            Ok(Some(socket)) => {
                let (socket, peer) = listen::prepare(socket, &self.shared.address);
                if let Err(error) = self.shared.deal(socket, peer) {
                    tracing::warn!(%peer, %error, "connection refused");
                }
                // Its message came to this thread's own mailbox, perhaps.
                self.take_messages();
            }
            Ok(None) => {}
            Err(_) if self.stop_until.is_some() => return,
            Err(error) => {
                tracing::warn!(%error, "accept failed; trying again");
                self.accept_after = Some(now() + ACCEPT_RETRY);
                return;
            }
        }
        self.accept();
    }

    fn take_messages(&mut self) {
        let messages = self.shared.mailboxes[self.thread].lock().as_mut().map(std::mem::take).unwrap_or_default();
        for message in messages {
            match message {
                Message::Connection { socket, counters } => self.adopt(socket, counters),
                Message::Extents { conn, slot, result } => {
                    self.with_conn(conn, |conn, _| conn.handle_extents(slot, result));
                    self.touch(conn);
                }
            }
        }
        if self.stop_until.is_none() && self.shared.stopping.load(Ordering::Acquire) {
            self.begin_stop();
        }
    }

    fn adopt(&mut self, socket: OwnedFd, counters: Arc<Counters>) {
        let socket = match self.reactor.register_socket(socket) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(connection = counters.id, %error, "connection refused");
                self.shared.registry.close(&counters);
                return;
            }
        };
        let mut conn = Conn::new(Arc::clone(&self.shared.export), self.shared.bounds, Arc::clone(&counters));
        if self.stop_until.is_some() {
            conn.handle_shutdown();
        }
        self.handshakes += 1;
        let handshake_until = Some(now() + self.shared.handshake_max);
        tracing::debug!(connection = counters.id, thread = self.thread, "connection taken");
        let entry = Some(Entry { conn, socket, counters, handshake_until, closed: false, touched: false });
        let free = self.entries.iter().position(Option::is_none).unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        });
        self.entries[free] = entry;
        self.touch(u32::try_from(free).expect("bounded by connections_max"));
    }

    fn begin_stop(&mut self) {
        self.stop_until = Some(now() + self.shared.stop_grace);
        if let Some(listener) = self.listener.take() {
            self.reactor.close(listener);
        }
        self.each_conn(Conn::handle_shutdown);
    }

    fn each_conn(&mut self, f: impl Fn(&mut Conn<D::Buf>)) {
        for conn in 0..u32::try_from(self.entries.len()).expect("bounded by connections_max") {
            self.with_conn(conn, |conn, _| f(conn));
            self.touch(conn);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let handshake = if self.handshakes == 0 {
            None
        } else {
            self.entries.iter().flatten().filter_map(|entry| entry.handshake_until).min()
        };
        [self.stop_until, self.accept_after, handshake].into_iter().flatten().min()
    }

    fn handle_deadlines(&mut self) {
        let Some(next) = self.next_deadline() else { return };
        let now = now();
        if now < next {
            return;
        }
        if self.stop_until.is_some_and(|until| until <= now) {
            // Requests below still end, however long they take: their buffers are in the device's hands.
            self.stop_until = Some(now + self.shared.stop_grace);
            self.each_conn(Conn::kill);
        }
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept();
        }
        for conn in 0..u32::try_from(self.entries.len()).expect("bounded by connections_max") {
            let late = self.entries[index(conn)].as_ref().and_then(|entry| entry.handshake_until);
            if late.is_some_and(|until| until <= now) {
                tracing::info!(conn, "handshake took too long");
                self.with_conn(conn, |conn, _| conn.kill());
                self.touch(conn);
            }
        }
    }
}
