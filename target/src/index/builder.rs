//! Writes runs: sorted entries in, blocks out.

use farshore_proto::BatchNo;
use zerocopy::IntoBytes;

use super::block::{BLOCK_BYTES, BLOCK_ROOM, BlockKind, seal};
use super::entry::{ALL_SECTORS, Cover, ENTRY_BYTES, KEY_BYTES, Key, Stored};
use super::run::{Header, RawHeader};
use crate::error::Result;
use crate::group::{Content, IndexEntry};

/// Entries in a block.
pub(crate) const ENTRIES_PER_BLOCK: usize = BLOCK_ROOM / ENTRY_BYTES;
/// Keys in a fence block.
pub(crate) const KEYS_PER_BLOCK: u32 = 170;
const _: () = assert!(KEYS_PER_BLOCK as usize == BLOCK_ROOM / KEY_BYTES);
/// Versions of one slot between two slot maps: the most that a read of a cold sector beside a hot one must pass by.
pub(crate) const MAP_EVERY: usize = 64;

/// Where blocks go, in order; the header comes last, at the run's start.
pub(crate) trait Sink {
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
    /// The header block; before this the run is not one.
    fn finish(&mut self, header: &[u8]) -> Result<()>;
}

/// A run in memory: room for the header, then the blocks.
impl Sink for Vec<u8> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.is_empty() {
            self.resize(BLOCK_BYTES, 0);
        }
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self, header: &[u8]) -> Result<()> {
        if self.is_empty() {
            self.resize(BLOCK_BYTES, 0);
        }
        self[..BLOCK_BYTES].copy_from_slice(header);
        Ok(())
    }
}

/// Builds one run. Memory: one block, the versions of one slot since its last map, and a key per entry block.
pub(crate) struct RunBuilder<'a, K: Sink> {
    sink: &'a mut K,
    header: Header,
    content: Vec<u8>,
    in_block: usize,
    blocks: u32,
    fences: Vec<Key>,
    last: Option<Key>,
    /// The present place's last map (newest first) and the versions since (oldest first).
    map: Vec<IndexEntry>,
    since: Vec<IndexEntry>,
    scratch: Vec<u8>,
}

impl<'a, K: Sink> RunBuilder<'a, K> {
    /// A run of `level` for the batches `first` to `last`.
    pub(crate) fn new(sink: &'a mut K, level: u8, first: BatchNo, last: BatchNo) -> Self {
        let mut seed = Vec::with_capacity(17);
        seed.extend_from_slice(&first.0.to_le_bytes());
        seed.extend_from_slice(&last.0.to_le_bytes());
        seed.push(level);
        let header = Header {
            tag: crc_fast::crc32_iscsi(&seed),
            level,
            has_extents: false,
            first,
            last,
            entries: 0,
            entry_blocks: 0,
            fence_blocks: 0,
            top_blocks: 0,
        };
        Self {
            sink,
            header,
            content: Vec::with_capacity(BLOCK_ROOM),
            in_block: 0,
            blocks: 1,
            fences: Vec::new(),
            last: None,
            map: Vec::new(),
            since: Vec::new(),
            scratch: Vec::with_capacity(BLOCK_BYTES),
        }
    }

    /// Adds the next entry; keys never fall.
    pub(crate) fn push(&mut self, entry: &IndexEntry) -> Result<()> {
        let key = Key::of(entry);
        let same_place = match self.last {
            Some(last) => {
                assert!(last <= key, "entries of a run come sorted");
                (last.volume, last.place) == (key.volume, key.place)
            }
            None => false,
        };
        if !same_place {
            self.map.clear();
            self.since.clear();
        } else if self.since.len() >= MAP_EVERY && self.last != Some(key) {
            // Only between two moments: a read up to a moment must see all of its entries or none.
            self.write_map()?;
        }
        self.last = Some(key);
        self.since.push(*entry);
        self.header.has_extents |= entry.content == Content::ZeroExtent;
        self.header.entries += 1;
        self.put(&Stored { key, in_map: false, entry: *entry })
    }

    /// The newest entry of every sector so far, as copies behind the last entry.
    fn write_map(&mut self) -> Result<()> {
        let mut cover = Cover::of(ALL_SECTORS);
        for entry in self.since.iter().rev().chain(&self.map) {
            if cover.take(entry) {
                break;
            }
        }
        let key = self.last.expect("a map follows an entry");
        // Oldest first: a read goes backwards.
        for entry in cover.entries.iter().rev() {
            self.put(&Stored { key, in_map: true, entry: *entry })?;
        }
        self.map = cover.entries;
        self.since.clear();
        Ok(())
    }

    fn put(&mut self, stored: &Stored) -> Result<()> {
        if self.in_block == 0 {
            self.fences.push(stored.key);
        }
        stored.encode(&mut self.content);
        self.in_block += 1;
        if self.in_block == ENTRIES_PER_BLOCK {
            self.end_block(BlockKind::Entries)?;
        }
        Ok(())
    }

    fn end_block(&mut self, kind: BlockKind) -> Result<()> {
        self.scratch.clear();
        seal(kind, self.blocks, self.header.tag, self.in_block, &self.content, &mut self.scratch);
        self.blocks = self.blocks.checked_add(1).expect("runs are limited to RUN_ENTRIES_MAX");
        self.in_block = 0;
        self.content.clear();
        self.sink.append(&self.scratch)
    }

    /// Writes fences and header.
    pub(crate) fn finish(mut self) -> Result<Header> {
        if self.in_block > 0 {
            self.end_block(BlockKind::Entries)?;
        }
        self.header.entry_blocks = self.blocks - 1;
        let fences = std::mem::take(&mut self.fences);
        self.header.fence_blocks = self.write_keys(BlockKind::Fences, &fences)?;
        let top: Vec<Key> = fences.iter().step_by(KEYS_PER_BLOCK as usize).copied().collect();
        self.header.top_blocks = self.write_keys(BlockKind::Top, &top)?;
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        seal(BlockKind::Header, 0, self.header.tag, 1, RawHeader::of(&self.header).as_bytes(), &mut block);
        self.sink.finish(&block)?;
        Ok(self.header)
    }

    fn write_keys(&mut self, kind: BlockKind, keys: &[Key]) -> Result<u32> {
        let before = self.blocks;
        for keys in keys.chunks(KEYS_PER_BLOCK as usize) {
            keys.iter().for_each(|key| key.encode(&mut self.content));
            self.in_block = keys.len();
            self.end_block(kind)?;
        }
        Ok(self.blocks - before)
    }
}
