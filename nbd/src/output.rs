//! The replies of one connection on their way to its socket: queued, then gathered into one send at a time.

use std::collections::VecDeque;

use farshore_uring::{AlignedBuf, IoBuf, SEND_PIECES_MAX, SendBuf, SendList};

use crate::reply::Head;

/// Bytes of one header buffer: a page, the smallest that an [`AlignedBuf`] occupies.
const ARENA_LEN: usize = 4096;
/// Longest own piece of one item; longer texts become several items. Half an arena, so that every item fits a fresh one.
const PIECE_MAX: usize = ARENA_LEN / 2;
/// Bytes at which a list is closed. A list's buffers are reused only after all of it is sent, so one huge list would stop
/// the pipeline; 512 KiB is more than a socket buffer takes at once.
const LIST_BYTES: usize = 512 << 10;
/// Most pieces that one item adds: the arena in use, a fresh one, the data.
const ITEM_PIECES: usize = 3;

/// What follows a head.
pub(crate) enum Body<B> {
    Empty,
    /// The first bytes of a device's buffer.
    Data(B, u32),
    Bytes(Vec<u8>),
}

struct Item<B> {
    head: Head,
    body: Body<B>,
    /// The request slot that is free once this is sent.
    finishes: Option<u16>,
}

/// Bounded by the requests of the connection: each has its slot until its reply is sent.
pub(crate) struct Output<B: IoBuf> {
    items: VecDeque<Item<B>>,
    /// `None` while a send is in flight.
    list: Option<SendList<B>>,
    /// Header buffers at rest.
    arenas: Vec<AlignedBuf>,
    /// Where the next arena begins to be filled, so that headers do not all fall into the same cache set.
    colour: usize,
    /// Slots of the list in flight.
    finishing: Vec<u16>,
}

impl<B: IoBuf> Output<B> {
    pub(crate) fn new() -> Self {
        Self {
            items: VecDeque::new(),
            list: Some(SendList::new()),
            arenas: Vec::new(),
            colour: 0,
            finishing: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, head: Head, body: Body<B>, finishes: Option<u16>) {
        self.items.push_back(Item { head, body, finishes });
    }

    /// Queues text of any length behind `head`.
    pub(crate) fn push_bytes(&mut self, head: Head, bytes: &[u8], finishes: Option<u16>) {
        let mut pieces = bytes.chunks(PIECE_MAX).peekable();
        let mut head = Some(head);
        while let Some(piece) = pieces.next() {
            let finishes = if pieces.peek().is_none() { finishes } else { None };
            self.push(head.take().unwrap_or(Head::NONE), Body::Bytes(piece.to_vec()), finishes);
        }
    }

    /// Nothing waits and nothing is being sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.items.is_empty() && !self.is_sending()
    }

    pub(crate) fn is_sending(&self) -> bool {
        self.list.is_none()
    }

    /// Forgets what waits (the connection is dead).
    pub(crate) fn clear(&mut self) {
        self.items.clear();
    }

    /// The next send, if there is something and no send is in flight.
    pub(crate) fn poll_send(&mut self) -> Option<SendList<B>> {
        if self.items.is_empty() {
            return None;
        }
        let mut list = self.list.take()?;
        let mut run = self.open_run();
        while let Some(item) = self.items.front() {
            let own = item.head.bytes().len() + if let Body::Bytes(bytes) = &item.body { bytes.len() } else { 0 };
            if list.len() + ITEM_PIECES > SEND_PIECES_MAX || list.bytes() + run.len() >= LIST_BYTES {
                break;
            }
            if own > run.room() {
                let full = std::mem::replace(&mut run, self.open_run());
                self.close_run(&mut list, full);
            }
            let item = self.items.pop_front().expect("just seen");
            run.put(item.head.bytes());
            match item.body {
                Body::Empty => {}
                Body::Bytes(bytes) => run.put(&bytes),
                Body::Data(buf, len) => {
                    let full = std::mem::replace(&mut run, self.open_run());
                    self.close_run(&mut list, full);
                    list.push_device(buf, 0..usize::try_from(len).expect("a request's length"));
                }
            }
            self.finishing.extend(item.finishes);
        }
        self.close_run(&mut list, run);
        Some(list)
    }

    /// The send ended, well or not. Yields the slots that are free now.
    pub(crate) fn handle_sent(&mut self, mut list: SendList<B>) -> impl Iterator<Item = u16> {
        for buf in list.drain() {
            if let SendBuf::Own(arena) = buf {
                self.arenas.push(arena);
            }
        }
        self.list = Some(list);
        self.finishing.drain(..)
    }

    fn open_run(&mut self) -> Run {
        let arena = self.arenas.pop().unwrap_or_else(|| AlignedBuf::zeroed(ARENA_LEN));
        self.colour = (self.colour + 128) % (ARENA_LEN - PIECE_MAX - 128);
        Run { arena, start: self.colour, end: self.colour }
    }

    fn close_run(&mut self, list: &mut SendList<B>, run: Run) {
        if run.len() == 0 {
            self.arenas.push(run.arena);
        } else {
            list.push_own(run.arena, run.start..run.end);
        }
    }
}

/// Own bytes that follow each other in a list.
struct Run {
    arena: AlignedBuf,
    start: usize,
    end: usize,
}

impl Run {
    fn len(&self) -> usize {
        self.end - self.start
    }

    fn room(&self) -> usize {
        ARENA_LEN - self.end
    }

    fn put(&mut self, bytes: &[u8]) {
        self.arena[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }
}
