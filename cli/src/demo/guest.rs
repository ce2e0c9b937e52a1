//! The demonstration's guest: pipelined random writes over NBD, repeated after a crash of the agent.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_nbd::client::{Client, Options};
use farshore_nbd::wire::command;

/// Writes in flight.
const DEPTH: usize = 16;
/// How long an agent may need to serve its volumes again.
const RECONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Bytes per second at the most, so that the demonstration shows failures and not a full disk.
const RATE_MAX: f64 = 60e6;

/// A client of the protected volume.
pub(super) struct Guest {
    client: Option<Client>,
    size: u64,
    random: u64,
    written: u64,
    in_flight: HashMap<u64, Write>,
}

#[derive(Clone, Copy)]
struct Write {
    offset: u64,
    len: u32,
    seed: u64,
}

impl Write {
    /// Half of it repeats, half does not: about what databases write.
    fn content(self) -> Vec<u8> {
        let mut state = self.seed;
        let mut bytes = Vec::with_capacity(self.len as usize);
        while bytes.len() < self.len as usize {
            bytes.extend_from_slice(&next(&mut state).to_le_bytes());
            bytes.extend_from_slice(b"farshore");
        }
        bytes.truncate(self.len as usize);
        bytes
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.offset + u64::from(other.len) && other.offset < self.offset + u64::from(self.len)
    }
}

/// SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Guest {
    pub(super) fn new(socket: &Path, size: u64) -> Result<Self> {
        let client = Client::connect_unix(socket, &Options::default()).context("connect to the protected volume")?;
        Ok(Self { client: Some(client), size, random: 1, written: 0, in_flight: HashMap::new() })
    }

    /// Bytes acknowledged so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Writes for `time` and waits for the end of every write; gives the bytes written.
    pub(super) fn write_for(&mut self, time: Duration) -> Result<u64> {
        let before = self.written;
        self.begin_writes(time)?;
        self.drain()?;
        Ok(self.written - before)
    }

    /// Writes for `time`; leaves writes in flight.
    pub(super) fn begin_writes(&mut self, time: Duration) -> Result<()> {
        let begin = Instant::now();
        let start = self.written;
        while begin.elapsed() < time {
            while self.in_flight.len() < DEPTH {
                self.submit_next()?;
            }
            self.receive()?;
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let ahead = (self.written - start) as f64 / RATE_MAX - begin.elapsed().as_secs_f64();
            if ahead > 0.0 {
                crate::sites::pause(Duration::from_secs_f64(ahead.min(0.1)));
            }
        }
        Ok(())
    }

    /// Waits for the end of every write in flight.
    pub(super) fn drain(&mut self) -> Result<()> {
        while !self.in_flight.is_empty() {
            self.receive()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.drain()?;
        self.client()?.flush().context("flush")
    }

    /// Connects again after the agent died, and repeats what was in flight then: whether it happened is not known, so
    /// only repeating makes the content certain, as any guest would. Gives the number of writes repeated.
    pub(super) fn reconnect(&mut self, socket: &Path) -> Result<usize> {
        self.client = None;
        let begin = Instant::now();
        let client = loop {
            match Client::connect_unix(socket, &Options::default()) {
                Ok(client) => break client,
                Err(_) if begin.elapsed() < RECONNECT_LIMIT => crate::sites::pause(Duration::from_millis(20)),
                Err(error) => return Err(error).context("connect again to the protected volume"),
            }
        };
        self.client = Some(client);
        let open: Vec<Write> = self.in_flight.drain().map(|(_, write)| write).collect();
        for write in &open {
            self.submit(*write)?;
        }
        self.drain()?;
        Ok(open.len())
    }

    pub(super) fn disconnect(&mut self) -> Result<()> {
        self.flush()?;
        self.client.take().context("was connected")?.disconnect().context("disconnect")
    }

    fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().context("is connected")
    }

    fn submit_next(&mut self) -> Result<()> {
        loop {
            let seed = next(&mut self.random);
            let len = 4096u32 << (seed % 5);
            let places = (self.size - u64::from(len)) / 4096;
            let write = Write { offset: next(&mut self.random) % (places + 1) * 4096, len, seed };
            // Overlapping writes in flight have no defined result; a sane guest does not issue them.
            if !self.in_flight.values().any(|other| other.overlaps(&write)) {
                return self.submit(write);
            }
        }
    }

    fn submit(&mut self, write: Write) -> Result<()> {
        let content = write.content();
        let cookie = self.client()?.submit(command::WRITE, 0, write.offset, write.len, &content).context("write")?;
        self.in_flight.insert(cookie, write);
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let reply = self.client()?.receive().context("wait for a write")?;
        reply.result.context("a write failed: protection must never fail the guest")?;
        let write = self.in_flight.remove(&reply.cookie).context("an answer to a write that was not asked for")?;
        self.written += u64::from(write.len);
        Ok(())
    }
}

/// A sparse image with data in its first eighth, so that initial sync has something to find.
pub(super) fn make_image(path: &Path, size: u64) -> Result<()> {
    let file = File::create_new(path).with_context(|| format!("create {}", path.display()))?;
    file.set_len(size).context("size the image")?;
    let piece: u32 = 1 << 20;
    for index in 0..size / 8 / u64::from(piece) {
        let write = Write { offset: index * u64::from(piece), len: piece, seed: index };
        file.write_all_at(&write.content(), write.offset).context("fill the image")?;
    }
    file.sync_all().context("sync the image")
}

/// Whether two files hold the same bytes.
pub(super) fn same_bytes(a: &PathBuf, b: &PathBuf) -> Result<bool> {
    let (a, b) = (File::open(a).context("open the source")?, File::open(b).context("open the copy")?);
    let len = a.metadata().context("look at the source")?.len();
    ensure!(len == b.metadata().context("look at the copy")?.len(), "the sizes differ");
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    while offset < len {
        let piece = usize::try_from((len - offset).min(1 << 20)).unwrap_or(1 << 20);
        read(&a, &mut left[..piece], offset).and_then(|()| read(&b, &mut right[..piece], offset)).context("compare")?;
        if left[..piece] != right[..piece] {
            return Ok(false);
        }
        offset += piece as u64;
    }
    Ok(true)
}

fn read(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(buffer, offset)
}
