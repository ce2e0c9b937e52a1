//! SplitMix64: small, seeded, the same everywhere.

use std::io::{Cursor, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, sync_channel};

pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(u64::try_from(bound).expect("usize fits u64"))).expect("below a usize")
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// A stream whose writes go out in pieces of random length, so that headers and payloads arrive torn, and whose other
/// direction is always taken in, so that a client that is busy writing never keeps the server from answering.
pub(crate) struct Chopped {
    stream: UnixStream,
    rng: Rng,
    longest: usize,
    received: Receiver<Vec<u8>>,
    unread: Cursor<Vec<u8>>,
}

impl Chopped {
    pub(crate) fn new(stream: UnixStream, seed: u64, longest: usize) -> Self {
        let mut reader = stream.try_clone().expect("a second handle");
        // Far more than all replies in flight.
        let (give, received) = sync_channel(1 << 16);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if give.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { stream, rng: Rng::new(seed), longest, received, unread: Cursor::default() }
    }
}

impl Read for Chopped {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        let count = self.unread.read(buf)?;
        if count > 0 || buf.is_empty() {
            return Ok(count);
        }
        // The reader's end is the stream's.
        let Ok(bytes) = self.received.recv() else { return Ok(0) };
        self.unread = Cursor::new(bytes);
        self.unread.read(buf)
    }
}

impl Write for Chopped {
    fn write(&mut self, buf: &[u8]) -> Result<usize> {
        let len = (1 + self.rng.index(self.longest)).min(buf.len());
        self.stream.write(&buf[..len])
    }

    fn flush(&mut self) -> Result<()> {
        self.stream.flush()
    }
}
