//! Reads runs.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_proto::{BatchNo, VolumeIndex};
use farshore_uring::{Storage, StorageFile};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::block::{self, BLOCK_BYTES, BlockKind};
use super::builder::{ENTRIES_PER_BLOCK, KEYS_PER_BLOCK};
use super::entry::{ENTRY_BYTES, EXTENT_BIT, KEY_BYTES, Key, Moment, Stored, Versions};
use crate::error::{Error, IoContext, Result};
use crate::group::{IndexEntry, UpTo};

/// Most entries of a run: its keys fill 19 MiB while it is written, and merging stops there.
pub(crate) const RUN_ENTRIES_MAX: u64 = 1 << 26;
const MAGIC: [u8; 8] = *b"FSINDEX1";
const VERSION: u16 = 1;
/// Blocks that a sequential pass reads at once.
const READ_AHEAD_BLOCKS: usize = 16;

/// What a run says about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// In every block of the run, so that a block of another run is seen.
    pub(crate) tag: u32,
    /// 0: a segment's footer; n: merged from runs of level n − 1.
    pub(crate) level: u8,
    pub(crate) has_extents: bool,
    pub(crate) first: BatchNo,
    pub(crate) last: BatchNo,
    /// Without the copies in slot maps.
    pub(crate) entries: u64,
    pub(crate) entry_blocks: u32,
    pub(crate) fence_blocks: u32,
    pub(crate) top_blocks: u32,
}

impl Header {
    /// Bytes of the run.
    pub(crate) fn len(&self) -> u64 {
        let blocks = [1, self.entry_blocks, self.fence_blocks, self.top_blocks];
        blocks.iter().map(|&blocks| u64::from(blocks) * BLOCK_BYTES as u64).sum()
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    magic: [u8; 8],
    version: U16,
    level: u8,
    flags: u8,
    tag: U32,
    first: U64,
    last: U64,
    entries: U64,
    entry_blocks: U32,
    fence_blocks: U32,
    top_blocks: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 56);
const FLAG_EXTENTS: u8 = 1;

impl RawHeader {
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION.into(),
            level: header.level,
            flags: if header.has_extents { FLAG_EXTENTS } else { 0 },
            tag: header.tag.into(),
            first: header.first.0.into(),
            last: header.last.0.into(),
            entries: header.entries.into(),
            entry_blocks: header.entry_blocks.into(),
            fence_blocks: header.fence_blocks.into(),
            top_blocks: header.top_blocks.into(),
            reserved: 0.into(),
        }
    }

    fn check(&self, tag: u32) -> Result<Header, String> {
        if self.magic != MAGIC {
            return Err("is no index run".to_owned());
        }
        if self.version.get() != VERSION {
            return Err(format!("is of version {}, this program knows {VERSION}", self.version.get()));
        }
        let header = Header {
            tag,
            level: self.level,
            has_extents: self.flags & FLAG_EXTENTS != 0,
            first: BatchNo(self.first.get()),
            last: BatchNo(self.last.get()),
            entries: self.entries.get(),
            entry_blocks: self.entry_blocks.get(),
            fence_blocks: self.fence_blocks.get(),
            top_blocks: self.top_blocks.get(),
        };
        let fences = header.entry_blocks.div_ceil(KEYS_PER_BLOCK);
        let sound = self.tag.get() == tag
            && self.flags & !FLAG_EXTENTS == 0
            && self.reserved.get() == 0
            && header.entries <= u64::from(header.entry_blocks) * ENTRIES_PER_BLOCK as u64
            && header.fence_blocks == fences
            && header.top_blocks == fences.div_ceil(KEYS_PER_BLOCK);
        if sound { Ok(header) } else { Err("header contradicts itself".to_owned()) }
    }
}

/// An immutable sorted run in a file. In memory: one key per 14,450 entries.
pub(crate) struct Run<S: Storage> {
    file: Arc<S::File>,
    path: PathBuf,
    offset: u64,
    header: Header,
    top: Vec<Key>,
}

/// Place of an entry in a run, with its block.
struct Cursor {
    block: Block,
    /// Entry within the block.
    at: usize,
}

/// A checked block.
struct Block {
    /// Number in the run.
    number: u32,
    bytes: Vec<u8>,
    count: usize,
}

impl<S: Storage> Run<S> {
    /// Opens the run of `len` bytes at `offset` of a file; reads its header and its topmost keys.
    pub(crate) fn open(file: Arc<S::File>, path: &Path, offset: u64, len: Option<u64>) -> Result<Self> {
        let mut bytes = vec![0; BLOCK_BYTES];
        file.read_at(&mut bytes, offset).at("read index run", path)?;
        let damaged = |reason: String| Error::damaged(path, offset, format!("index run: {reason}"));
        block::check(&bytes, BlockKind::Header, 0, None, size_of::<RawHeader>()).map_err(damaged)?;
        let raw = RawHeader::read_from_prefix(block::content(&bytes)).map(|(raw, _)| raw);
        let raw = raw.map_err(|_| damaged("header is cut off".to_owned()))?;
        let header = raw.check(block::tag_of(&bytes)).map_err(damaged)?;
        if len.is_some_and(|len| len != header.len()) {
            return Err(damaged(format!("is {} bytes long by its header", header.len())));
        }
        let mut run = Self { file, path: path.to_owned(), offset, header, top: Vec::new() };
        let first = 1 + run.header.entry_blocks + run.header.fence_blocks;
        for number in first..first + run.header.top_blocks {
            let block = run.read_block(BlockKind::Top, number)?;
            let keys: Vec<Key> = run.keys(&block)?;
            run.top.extend(keys);
        }
        if run.top.len() != run.header.fence_blocks as usize {
            return Err(damaged("count of keys contradicts the header".to_owned()));
        }
        Ok(run)
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn damaged(&self, number: u32, reason: impl std::fmt::Display) -> Error {
        let at = self.offset + u64::from(number) * BLOCK_BYTES as u64;
        Error::damaged(&self.path, at, format!("index run: {reason}"))
    }

    fn read_block(&self, kind: BlockKind, number: u32) -> Result<Block> {
        let mut bytes = vec![0; BLOCK_BYTES];
        let at = self.offset + u64::from(number) * BLOCK_BYTES as u64;
        self.file.read_at(&mut bytes, at).at("read index run", &self.path)?;
        let item = if kind == BlockKind::Entries { ENTRY_BYTES } else { KEY_BYTES };
        let count = block::check(&bytes, kind, number, Some(self.header.tag), item)
            .map_err(|reason| self.damaged(number, reason))?;
        Ok(Block { number, bytes, count })
    }

    fn keys(&self, block: &Block) -> Result<Vec<Key>> {
        let items = block::content(&block.bytes).chunks_exact(KEY_BYTES).take(block.count);
        let keys: Option<Vec<Key>> = items.map(Key::decode).collect();
        keys.ok_or_else(|| self.damaged(block.number, "key makes no sense"))
    }

    fn entry(&self, block: &Block, at: usize) -> Result<Stored> {
        let item = &block::content(&block.bytes)[at * ENTRY_BYTES..(at + 1) * ENTRY_BYTES];
        Stored::decode(item).map_err(|reason| self.damaged(block.number, reason))
    }

    /// How many entries of the block are at or before `target`.
    fn count_upto(&self, block: &Block, target: &Key) -> Result<usize> {
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low.midpoint(high);
            if self.entry(block, middle)?.key <= *target {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The last entry at or before `target`.
    fn seek(&self, target: &Key) -> Result<Option<Cursor>> {
        let Some(fence_block) = self.top.partition_point(|key| key <= target).checked_sub(1) else {
            return Ok(None);
        };
        let fence_block = u32::try_from(fence_block).expect("fence blocks are counted by a u32");
        let fences = self.read_block(BlockKind::Fences, 1 + self.header.entry_blocks + fence_block)?;
        let keys = self.keys(&fences)?;
        let within = keys.partition_point(|key| key <= target).checked_sub(1);
        let within = within.ok_or_else(|| self.damaged(fences.number, "keys contradict those above them"))?;
        let within = u32::try_from(within).expect("a block has few keys");
        let block = self.read_block(BlockKind::Entries, 1 + fence_block * KEYS_PER_BLOCK + within)?;
        let at = self.count_upto(&block, target)?.checked_sub(1);
        let at = at.ok_or_else(|| self.damaged(block.number, "entries contradict the keys above them"))?;
        Ok(Some(Cursor { block, at }))
    }

    /// The entry before; `false` at the start.
    fn step_back(&self, cursor: &mut Cursor) -> Result<bool> {
        if let Some(at) = cursor.at.checked_sub(1) {
            cursor.at = at;
            return Ok(true);
        }
        if cursor.block.number <= 1 {
            return Ok(false);
        }
        cursor.block = self.read_block(BlockKind::Entries, cursor.block.number - 1)?;
        let last = cursor.block.count.checked_sub(1);
        cursor.at = last.ok_or_else(|| self.damaged(cursor.block.number, "entry block is empty"))?;
        Ok(true)
    }

    /// The place's versions up to `upto` and after `floor`, newest first, until told to stop. Once a slot map is
    /// reached, only versions that are newest for some sector follow.
    pub(crate) fn scan_back(
        &self,
        volume: VolumeIndex,
        place: u64,
        upto: UpTo,
        floor: Moment,
        visit: &mut dyn FnMut(&IndexEntry) -> ControlFlow<()>,
    ) -> Result<()> {
        let Some(mut cursor) = self.seek(&Key::last(volume, place, upto))? else {
            return Ok(());
        };
        let mut map: Option<Key> = None;
        loop {
            let stored = self.entry(&cursor.block, cursor.at)?;
            let moment = (stored.entry.batch.0, stored.entry.seq);
            if !stored.key.is_at(volume, place) || moment <= floor {
                return Ok(());
            }
            match map {
                // The map is over: it stood for all that is older.
                Some(key) if !stored.in_map || stored.key != key => return Ok(()),
                _ if stored.in_map => map = Some(stored.key),
                _ => {}
            }
            if visit(&stored.entry).is_break() || !self.step_back(&mut cursor)? {
                return Ok(());
            }
        }
    }

    /// Up to `limit` places that have versions, from `from` on, within the slots or within the extents, and what their
    /// versions are, visible or not.
    pub(crate) fn places(
        &self,
        volume: VolumeIndex,
        from: u64,
        limit: usize,
        out: &mut Vec<(u64, Versions)>,
    ) -> Result<()> {
        if from & EXTENT_BIT != 0 && !self.header.has_extents {
            return Ok(());
        }
        let mut target = Key::before(volume, from);
        let mut cursor = self.seek_after(&target)?;
        for _ in 0..limit {
            let Some(Cursor { block, at }) = &mut cursor else { return Ok(()) };
            let key = self.entry(block, *at)?.key;
            if key.volume != volume.0 || (key.place ^ from) & EXTENT_BIT != 0 {
                return Ok(());
            }
            let mut versions = Versions::default();
            let mut next = *at;
            while next < block.count && versions != Versions::ANY {
                let stored = self.entry(block, next)?;
                if stored.key.place != key.place || stored.key.volume != key.volume {
                    break;
                }
                versions = versions | Versions::of(&stored.entry);
                next += 1;
            }
            let Some(next_place) = key.place.checked_add(1) else {
                out.push((key.place, Versions::ANY));
                return Ok(());
            };
            target = Key::before(volume, next_place);
            // Mostly the next place begins where the scan stopped, or within the block.
            *at = if versions == Versions::ANY { self.count_upto(block, &target)? } else { next };
            if *at >= block.count {
                // The rest of the place's versions may be in the next block.
                versions = Versions::ANY;
                cursor = self.seek_after(&target)?;
            }
            out.push((key.place, versions));
        }
        Ok(())
    }

    /// The first entry after `target`.
    fn seek_after(&self, target: &Key) -> Result<Option<Cursor>> {
        let (number, at) = match self.seek(target)? {
            Some(cursor) if cursor.at + 1 < cursor.block.count => {
                return Ok(Some(Cursor { at: cursor.at + 1, ..cursor }));
            }
            Some(cursor) => (cursor.block.number + 1, 0),
            None => (1, 0),
        };
        if number > self.header.entry_blocks {
            return Ok(None);
        }
        let block = self.read_block(BlockKind::Entries, number)?;
        if block.count == 0 {
            return Err(self.damaged(number, "entry block is empty"));
        }
        Ok(Some(Cursor { block, at }))
    }

    /// All entries in order, without the copies in slot maps.
    pub(crate) fn entries(self: &Arc<Self>) -> Entries<S> {
        Entries { run: Arc::clone(self), next: 1, bytes: Vec::new(), blocks: 0, block: 0, at: 0, count: 0 }
    }

    /// Reads every block; what is wrong, one text per block.
    pub(crate) fn verify(&self) -> Vec<Error> {
        let mut found = Vec::new();
        let kinds = [
            (BlockKind::Entries, self.header.entry_blocks),
            (BlockKind::Fences, self.header.fence_blocks),
            (BlockKind::Top, self.header.top_blocks),
        ];
        let mut bytes = vec![0; BLOCK_BYTES];
        let header = self.file.read_at(&mut bytes, self.offset).at("read index run", &self.path).and_then(|()| {
            block::check(&bytes, BlockKind::Header, 0, Some(self.header.tag), size_of::<RawHeader>())
                .map_err(|reason| self.damaged(0, reason))
        });
        found.extend(header.err());
        let (mut number, mut entries, mut last) = (1, 0, None::<Key>);
        for (kind, blocks) in kinds {
            for number in number..number + blocks {
                match self.read_block(kind, number) {
                    Ok(block) if kind == BlockKind::Entries => match self.verify_entries(&block, &mut last) {
                        Ok(count) => entries += count,
                        Err(error) => found.push(error),
                    },
                    Ok(_) => {}
                    Err(error) => found.push(error),
                }
            }
            number += blocks;
        }
        if found.is_empty() && entries != self.header.entries {
            found.push(self.damaged(0, format!("{entries} entries where the header says {}", self.header.entries)));
        }
        found
    }

    fn verify_entries(&self, block: &Block, last: &mut Option<Key>) -> Result<u64> {
        let mut entries = 0;
        for at in 0..block.count {
            let stored = self.entry(block, at)?;
            if last.is_some_and(|last| last > stored.key) {
                return Err(self.damaged(block.number, "entries are out of order"));
            }
            *last = Some(stored.key);
            entries += u64::from(!stored.in_map);
        }
        Ok(entries)
    }
}

/// A pass over a run's entries.
pub(crate) struct Entries<S: Storage> {
    run: Arc<Run<S>>,
    next: u32,
    bytes: Vec<u8>,
    /// Blocks in `bytes`, and the present one.
    blocks: usize,
    block: usize,
    at: usize,
    count: usize,
}

impl<S: Storage> Entries<S> {
    /// The next entry.
    pub(crate) fn step(&mut self) -> Result<Option<IndexEntry>> {
        loop {
            if self.at < self.count {
                let start = self.block * BLOCK_BYTES + block::BLOCK_HEADER_BYTES + self.at * ENTRY_BYTES;
                self.at += 1;
                let number = self.next - u32::try_from(self.blocks - self.block).expect("few blocks are read at once");
                let stored = Stored::decode(&self.bytes[start..start + ENTRY_BYTES])
                    .map_err(|reason| self.run.damaged(number, reason))?;
                if stored.in_map {
                    continue;
                }
                return Ok(Some(stored.entry));
            }
            if self.block + 1 < self.blocks {
                self.block += 1;
            } else if !self.fill()? {
                return Ok(None);
            }
            let number = self.next - u32::try_from(self.blocks - self.block).expect("few blocks are read at once");
            let bytes = &self.bytes[self.block * BLOCK_BYTES..(self.block + 1) * BLOCK_BYTES];
            self.count = block::check(bytes, BlockKind::Entries, number, Some(self.run.header.tag), ENTRY_BYTES)
                .map_err(|reason| self.run.damaged(number, reason))?;
            self.at = 0;
        }
    }

    fn fill(&mut self) -> Result<bool> {
        let left = (self.run.header.entry_blocks + 1).saturating_sub(self.next) as usize;
        let blocks = left.min(READ_AHEAD_BLOCKS);
        if blocks == 0 {
            return Ok(false);
        }
        self.bytes.resize(blocks * BLOCK_BYTES, 0);
        let at = self.run.offset + u64::from(self.next) * BLOCK_BYTES as u64;
        self.run.file.read_at(&mut self.bytes, at).at("read index run", &self.run.path)?;
        self.next += u32::try_from(blocks).expect("at most the read-ahead");
        self.blocks = blocks;
        self.block = 0;
        Ok(true)
    }
}
