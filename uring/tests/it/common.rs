//! What several tests need.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use farshore_uring::{AlignedBuf, Completion, Io, NetCompletion, Op, Reactor, Token, Wait};

/// Small deterministic generator (SplitMix64): the same seed, the same test.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

pub(crate) fn open(path: &Path, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(path)
}

pub(crate) fn buffer(len: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    buf.fill(byte);
    buf
}

/// Turns the ring until an operation of [`Io::submit`] has ended.
pub(crate) fn next(reactor: &mut Reactor<AlignedBuf>) -> Completion<AlignedBuf> {
    loop {
        if let Some(completion) = reactor.poll_completion() {
            return completion;
        }
        assert!(reactor.in_flight() > 0, "nothing in flight to wait for");
        reactor.run_once(Wait::Until(None)).expect("the ring turns");
    }
}

/// Turns the ring until a socket or timer operation has ended.
pub(crate) fn next_net(reactor: &mut Reactor<AlignedBuf>) -> NetCompletion<AlignedBuf> {
    loop {
        if let Some(completion) = reactor.poll_net() {
            return completion;
        }
        assert!(reactor.in_flight() > 0, "nothing in flight to wait for");
        reactor.run_once(Wait::Until(None)).expect("the ring turns");
    }
}

/// One operation from start to end.
pub(crate) fn run(reactor: &mut Reactor<AlignedBuf>, op: Op<AlignedBuf>) -> Completion<AlignedBuf> {
    let token = Token::device(0x00c0_ffee);
    reactor.submit(token, op);
    let completion = next(reactor);
    assert_eq!(completion.token, token);
    completion
}
