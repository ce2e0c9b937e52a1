//! A guest that knows what it was promised: numbered blocks, and how far flushes were answered.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use farshore_uring::AlignedBuf;
use nix::libc;

use super::BLOCK;

/// Blocks, at the start of the volume: an extent of its own.
const BLOCKS: u64 = 1024;
/// Writes between two flushes.
const BETWEEN: u64 = 8;
/// Far from each other, and all of them in turn.
const STRIDE: u64 = 389;

/// Goes through the power cuts: write `n` puts `n` into block `n * STRIDE % BLOCKS`, all over it.
#[derive(Default)]
pub(super) struct Ledger {
    /// Number of the last write.
    sent: Arc<AtomicU64>,
    /// All writes up to this one were before a flush that was answered.
    flushed: Arc<AtomicU64>,
    flushes: Arc<AtomicU64>,
    /// `flushed` when the host went down: what is answered while it does is promised by nobody.
    promised: Arc<AtomicU64>,
    /// The highest number that was ever sent.
    most: u64,
}

/// It writes.
pub(super) struct Writing<'a> {
    ledger: &'a mut Ledger,
    thread: JoinHandle<Result<()>>,
}

impl Ledger {
    pub(super) fn start(&mut self, device: &Path) -> Result<Writing<'_>> {
        let open = File::options().write(true).custom_flags(libc::O_DIRECT).open(device);
        let device = open.with_context(|| format!("open {}", device.display()))?;
        let (sent, flushed, flushes) = (Arc::clone(&self.sent), Arc::clone(&self.flushed), Arc::clone(&self.flushes));
        flushes.store(0, Ordering::SeqCst);
        let thread = std::thread::spawn(move || {
            let mut block = AlignedBuf::zeroed(usize::try_from(BLOCK)?);
            loop {
                for _ in 0..BETWEEN {
                    let number = sent.fetch_add(1, Ordering::SeqCst) + 1;
                    block.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
                    device.write_all_at(&block, number * STRIDE % BLOCKS * BLOCK).context("write")?;
                }
                device.sync_data().context("flush")?;
                flushed.store(sent.load(Ordering::SeqCst), Ordering::SeqCst);
                flushes.fetch_add(1, Ordering::SeqCst);
            }
        });
        Ok(Writing { ledger: self, thread })
    }

    /// Every block has its last flushed number, or a later one that was sent. What was sent and not promised is sent again by the next life.
    fn check(&mut self, disk: &Path) -> Result<()> {
        let open = File::options().read(true).custom_flags(libc::O_DIRECT).open(disk);
        let disk = open.with_context(|| format!("open {}", disk.display()))?;
        let mut all = AlignedBuf::zeroed(usize::try_from(BLOCKS * BLOCK)?);
        disk.read_exact_at(&mut all, 0).context("read the disk")?;
        let flushed = self.promised.load(Ordering::SeqCst);
        self.most = self.most.max(self.sent.load(Ordering::SeqCst));
        let sent = self.most;
        for (at, block) in (0..).zip(all.chunks_exact(usize::try_from(BLOCK)?)) {
            let (found, rest) = block.split_first_chunk::<8>().context("a block has words")?;
            ensure!(rest.chunks_exact(8).all(|word| word == found), "block {at} is torn");
            let found = u64::from_le_bytes(*found);
            let promised = (flushed.saturating_sub(BLOCKS - 1)..=flushed).rev().find(|n| n * STRIDE % BLOCKS == at);
            let promised = promised.unwrap_or(0);
            ensure!(
                found >= promised && found <= sent && (found == 0 || found * STRIDE % BLOCKS == at),
                "block {at} holds write {found}; {promised} was flushed, {sent} was the last"
            );
        }
        self.sent.store(flushed, Ordering::SeqCst);
        self.flushed.store(flushed, Ordering::SeqCst);
        Ok(())
    }
}

impl Writing<'_> {
    /// How many were answered.
    pub(super) fn flushes(&self) -> u64 {
        self.ledger.flushes.load(Ordering::SeqCst)
    }

    /// To be called when the host goes down.
    pub(super) fn note(&self) -> impl FnOnce() + use<> {
        let (flushed, promised) = (Arc::clone(&self.ledger.flushed), Arc::clone(&self.ledger.promised));
        move || promised.store(flushed.load(Ordering::SeqCst), Ordering::SeqCst)
    }

    /// Its device is gone; the disk has what it was promised.
    pub(super) fn end(self, disk: &Path) -> Result<()> {
        let ended = self.thread.join().expect("its panic is the test's");
        ensure!(ended.is_err(), "it writes until it cannot");
        self.ledger.check(disk)
    }
}
