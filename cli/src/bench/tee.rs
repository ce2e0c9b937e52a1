//! A block device that notes what is written to it: the write stream that a benchmark repeats and gives to its peer.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farshore_uring::{BlockDevice, BlockQueue, Completion, Done, Errno, Extent, Geometry, Io, Purpose, Request};

/// What a noted request was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum What {
    Write,
    Zeroes,
    Discard,
    Flush,
}

/// A noted request.
#[derive(Debug)]
pub(super) struct Noted {
    pub what: What,
    /// Since the first note.
    pub at: Duration,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// Of a write.
    pub content: Vec<u8>,
}

/// Header of a note: microseconds, offset, length, kind.
const HEADER: usize = 8 + 8 + 4 + 1;

/// Where notes go while it is on.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    file: BufWriter<File>,
    begin: Instant,
    failed: Option<io::Error>,
}

impl Recorder {
    /// Notes go to a new file from now on.
    pub(super) fn start(&self, path: &Path) -> Result<()> {
        let file = File::create_new(path).with_context(|| format!("create {}", path.display()))?;
        let state = State { file: BufWriter::with_capacity(1 << 20, file), begin: Instant::now(), failed: None };
        *self.lock() = Some(state);
        Ok(())
    }

    /// No more notes; the file is complete.
    pub(super) fn stop(&self) -> Result<()> {
        let mut state = self.lock().take().context("it was started")?;
        state.failed.map_or(Ok(()), Err).context("note a write")?;
        state.file.flush().context("note a write")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, what: What, offset: u64, len: u64, content: &[u8]) {
        let mut guard = self.lock();
        let Some(state) = guard.as_mut() else { return };
        let at = u64::try_from(state.begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut header = Vec::with_capacity(HEADER);
        header.extend(at.to_le_bytes());
        header.extend(offset.to_le_bytes());
        header.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        header.push(what as u8);
        if let Err(error) = state.file.write_all(&header).and_then(|()| state.file.write_all(content)) {
            state.failed.get_or_insert(error);
        }
    }
}

/// Calls `each` for every note of a file, in order.
pub(super) fn read_notes(path: &Path, mut each: impl FnMut(Noted) -> Result<()>) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut left = file.metadata().context("look at the notes")?.len();
    let mut file = BufReader::with_capacity(1 << 20, file);
    while left > 0 {
        let mut header = [0; HEADER];
        file.read_exact(&mut header).context("read a note")?;
        let (at, rest) = header.split_first_chunk::<8>().context("a note's time")?;
        let (offset, rest) = rest.split_first_chunk::<8>().context("a note's place")?;
        let (len, rest) = rest.split_first_chunk::<4>().context("a note's length")?;
        let what = [What::Write, What::Zeroes, What::Discard, What::Flush]
            .into_iter()
            .find(|what| rest == [*what as u8])
            .context("a note's kind")?;
        let len = u32::from_le_bytes(*len);
        let mut content = vec![0; if what == What::Write { len as usize } else { 0 }];
        file.read_exact(&mut content).context("read a note")?;
        left = left.saturating_sub((HEADER + content.len()) as u64);
        let at = Duration::from_micros(u64::from_le_bytes(*at));
        each(Noted { what, at, offset: u64::from_le_bytes(*offset), len, content })?;
    }
    Ok(())
}

/// `device`, with notes of what is written to it, in the order in which requests came.
#[derive(Debug)]
pub(super) struct Tee<D> {
    pub device: D,
    pub recorder: Arc<Recorder>,
}

impl<D: BlockDevice> BlockDevice for Tee<D> {
    type Buf = D::Buf;
    type Queue = TeeQueue<D::Queue>;

    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn open_queue<I: Io<Self::Buf>>(&self, io: &mut I) -> io::Result<Self::Queue> {
        Ok(TeeQueue { queue: self.device.open_queue(io)?, recorder: Arc::clone(&self.recorder) })
    }

    fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Errno> {
        self.device.extents(offset, len)
    }
}

/// A queue of [`Tee`].
#[derive(Debug)]
pub(super) struct TeeQueue<Q> {
    queue: Q,
    recorder: Arc<Recorder>,
}

impl<Q: BlockQueue> BlockQueue for TeeQueue<Q> {
    type Buf = Q::Buf;

    fn buffer(&mut self, purpose: Purpose, len: u32) -> Self::Buf {
        self.queue.buffer(purpose, len)
    }

    fn submit<I: Io<Self::Buf>>(&mut self, io: &mut I, tag: u32, request: Request<Self::Buf>) {
        match &request {
            Request::Read { .. } => {}
            Request::Write { offset, len, buf, .. } => {
                self.recorder.note(What::Write, *offset, u64::from(*len), &buf[..*len as usize]);
            }
            Request::Flush => self.recorder.note(What::Flush, 0, 0, &[]),
            Request::Discard { offset, len } => self.recorder.note(What::Discard, *offset, *len, &[]),
            Request::WriteZeroes { offset, len, .. } => self.recorder.note(What::Zeroes, *offset, *len, &[]),
        }
        self.queue.submit(io, tag, request);
    }

    fn handle_completion<I: Io<Self::Buf>>(&mut self, io: &mut I, completion: Completion<Self::Buf>) {
        self.queue.handle_completion(io, completion);
    }

    fn handle_wake<I: Io<Self::Buf>>(&mut self, io: &mut I) {
        self.queue.handle_wake(io);
    }

    fn poll_done(&mut self) -> Option<Done<Self::Buf>> {
        self.queue.poll_done()
    }

    fn close<I: Io<Self::Buf>>(&mut self, io: &mut I) {
        self.queue.close(io);
    }
}
