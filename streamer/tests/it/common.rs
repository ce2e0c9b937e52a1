//! A ring of plain memory, a target's apply, and a seeded generator.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use farshore_proto::batch::{self, RecordList};
use farshore_proto::frame::{self, FRAME_PLAIN_MAX};
use farshore_proto::keys::{HostKey, VaultKey};
use farshore_proto::record::{Home, Kind};
use farshore_proto::{HostId, KeyEpoch, Name, Position, SECTOR_BYTES, VaultId, VolumeIndex, WallTime};
use farshore_streamer::{Fill, Result, RingEntry, RingSource, StreamState};

pub const VAULT: VaultId = VaultId([7; 16]);

pub fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

pub fn host_key() -> HostKey {
    HostKey::derive(&VaultKey::new([3; 32]), HostId::derive(VAULT, &name("host")), KeyEpoch(1))
}

/// SplitMix64.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// Shared bytes of a cell.
#[derive(Clone, Debug)]
pub struct Cell(pub Arc<[u8]>);

impl std::ops::Deref for Cell {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// What a descriptor says.
#[derive(Clone, Debug)]
pub struct Said {
    pub kind: Kind,
    pub volume: VolumeIndex,
    pub offset: u64,
    pub length: u64,
    pub time: WallTime,
    pub aux: u64,
    pub payload: Option<Cell>,
}

impl Said {
    pub fn new(kind: Kind) -> Self {
        Self { kind, volume: VolumeIndex(0), offset: 0, length: 0, time: WallTime(0), aux: 0, payload: None }
    }

    pub fn range(kind: Kind, volume: u16, sector: u64, sectors: u64) -> Self {
        Self {
            volume: VolumeIndex(volume),
            offset: sector * SECTOR_BYTES,
            length: sectors * SECTOR_BYTES,
            ..Self::new(kind)
        }
    }

    pub fn data(kind: Kind, volume: u16, sector: u64, bytes: Vec<u8>) -> Self {
        let sectors = bytes.len() as u64 / SECTOR_BYTES;
        Self { payload: Some(Cell(bytes.into())), ..Self::range(kind, volume, sector, sectors) }
    }

    pub fn cut(time: u64) -> Self {
        Self { time: WallTime(time), ..Self::new(Kind::Cut) }
    }
}

/// A ring that outlives its streamer: what shared memory is to the process.
#[derive(Debug)]
pub struct MemoryRing {
    pub entries: VecDeque<Said>,
    pub freed: u64,
    pub next: u64,
    pub incarnation: u64,
    pub state: Option<StreamState>,
    pub closed: bool,
    pub size_entries: u64,
    /// The process dies before the store number that this counts down to (counted over stores and frees).
    pub dies_in: Option<u32>,
}

impl MemoryRing {
    pub fn new(incarnation: u64) -> Self {
        Self {
            entries: VecDeque::new(),
            freed: 0,
            next: 0,
            incarnation,
            state: None,
            closed: false,
            size_entries: 65536,
            dies_in: None,
        }
    }

    pub fn publish(&mut self, said: Said) -> u64 {
        self.entries.push_back(said);
        self.freed + self.entries.len() as u64 - 1
    }

    /// True: the process is dead, nothing takes effect any more.
    fn is_dead(&mut self) -> bool {
        match &mut self.dies_in {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }
}

impl RingSource for MemoryRing {
    type Payload = Cell;

    fn next_entry(&mut self) -> Result<Option<RingEntry<Cell>>> {
        let index = usize::try_from(self.next - self.freed).expect("small");
        let Some(said) = self.entries.get(index) else { return Ok(None) };
        let position = Position(self.next);
        self.next += 1;
        Ok(Some(RingEntry {
            position,
            kind: said.kind,
            volume: said.volume,
            offset: said.offset,
            length: said.length,
            time: said.time,
            aux: said.aux,
            payload: said.payload.clone(),
        }))
    }

    fn free_to(&mut self, position: Position) {
        if self.is_dead() {
            return;
        }
        assert!(position.0 >= self.freed && position.0 <= self.next, "frees what was read, once");
        while self.freed < position.0 {
            self.entries.pop_front().expect("published");
            self.freed += 1;
        }
    }

    fn rewind(&mut self) {
        self.next = self.freed;
    }

    fn freed(&self) -> Position {
        Position(self.freed)
    }

    fn head(&self) -> Position {
        Position(self.freed + self.entries.len() as u64)
    }

    fn load_state(&self) -> Option<StreamState> {
        self.state
    }

    fn store_state(&mut self, state: &StreamState) {
        if !self.is_dead() {
            self.state = Some(*state);
        }
    }

    fn is_closed(&self) -> bool {
        self.closed
    }

    fn fill(&self) -> Fill {
        let used_bytes =
            self.entries.iter().filter_map(|said| said.payload.as_ref()).map(|cell| cell.len() as u64).sum();
        Fill {
            used_bytes,
            size_bytes: 256 << 20,
            used_entries: self.entries.len() as u64,
            size_entries: self.size_entries,
        }
    }
}

/// Volumes as bytes, grown on demand.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Image(pub BTreeMap<u16, Vec<u8>>);

impl Image {
    pub fn write(&mut self, volume: u16, offset: u64, bytes: &[u8]) {
        let image = self.0.entry(volume).or_default();
        let offset = usize::try_from(offset).expect("small");
        let end = offset + bytes.len();
        if image.len() < end {
            image.resize(end, 0);
        }
        image[offset..end].copy_from_slice(bytes);
    }

    pub fn read(&self, volume: u16, offset: u64, len: u64) -> Vec<u8> {
        let (offset, len) = (usize::try_from(offset).expect("small"), usize::try_from(len).expect("small"));
        let image = self.0.get(&volume).map_or(&[][..], Vec::as_slice);
        (offset..offset + len).map(|at| image.get(at).copied().unwrap_or(0)).collect()
    }

    /// Applies a ring entry as it is.
    pub fn apply(&mut self, said: &Said) {
        if said.kind.has_chunk() {
            self.write(said.volume.0, said.offset, said.payload.as_ref().expect("a write has bytes"));
        } else if said.kind.zeroes() {
            self.write(said.volume.0, said.offset, &vec![0; usize::try_from(said.length).expect("small")]);
        }
    }

    /// Without trailing zeroes, so that images of different length compare by content.
    pub fn trimmed(&self) -> Self {
        let trim = |bytes: &Vec<u8>| bytes[..bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1)].to_vec();
        Self(
            self.0
                .iter()
                .map(|(volume, bytes)| (*volume, trim(bytes)))
                .filter(|(_, bytes)| !bytes.is_empty())
                .collect(),
        )
    }
}

/// A batch as the target sees it: checked, list and frames opened.
pub struct Opened {
    pub header: batch::BatchHeader,
    pub list: RecordList,
    pub frames: Vec<Vec<u8>>,
}

pub fn open(bytes: &[u8]) -> Opened {
    let frames = batch::parse(bytes).expect("a whole batch");
    let list = batch::open_list(bytes, &frames, &host_key()).expect("the list opens");
    let (list_header, _) = frame::split(&bytes[frames.offsets[0] as usize..], frame::LIST_PLAIN_MAX).expect("frame 0");
    let key = host_key().frame_key(list_header.salt());
    let (mut scratch, mut plains) = (Vec::new(), vec![Vec::new()]);
    for offset in &frames.offsets[1..] {
        let (header, sealed) = frame::split(&bytes[*offset as usize..], FRAME_PLAIN_MAX).expect("a whole frame");
        let mut plain = Vec::new();
        key.open(&header, sealed, &[], &mut scratch, &mut plain).expect("the frame opens");
        plains.push(plain);
    }
    Opened { header: frames.header, list, frames: plains }
}

impl Opened {
    /// Applies all records; `held` gives the content of referenced ids and learns those that are here. `probe` sees every
    /// verify record with the image at its ticket.
    pub fn apply(
        &self,
        image: &mut Image,
        held: &mut BTreeMap<[u8; 32], Vec<u8>>,
        mut probe: impl FnMut(&farshore_proto::record::Record, &Image),
    ) {
        let dedup = host_key().dedup_key(farshore_proto::GroupId::derive(VAULT, &name("group")));
        for record in &self.list.records {
            let len = usize::try_from(record.len_bytes()).expect("small");
            match record.home() {
                Home::Here { frame, offset } => {
                    let bytes = &self.frames[frame as usize][offset as usize..offset as usize + len];
                    assert_eq!(dedup.chunk_id(bytes), record.id(), "the id is the content's");
                    held.insert(record.id().0, bytes.to_vec());
                    image.write(record.volume().0, record.start_byte(), bytes);
                }
                Home::Reference => {
                    let bytes = held.get(&record.id().0).expect("a reference resolves").clone();
                    image.write(record.volume().0, record.start_byte(), &bytes);
                }
                Home::None if record.kind().zeroes() => {
                    image.write(record.volume().0, record.start_byte(), &vec![0; len]);
                }
                Home::None => {}
            }
            if matches!(record.kind(), Kind::Probe | Kind::ProbeZero) {
                probe(record, image);
            }
        }
    }
}

/// The ring as a process sees it: outlives every streamer that opens it.
#[derive(Clone, Debug)]
pub struct SharedRing(pub Arc<std::sync::Mutex<MemoryRing>>);

impl SharedRing {
    pub fn new(incarnation: u64) -> Self {
        Self(Arc::new(std::sync::Mutex::new(MemoryRing::new(incarnation))))
    }

    pub fn lock(&self) -> std::sync::MutexGuard<'_, MemoryRing> {
        self.0.lock().expect("no test thread panics while holding it")
    }
}

impl RingSource for SharedRing {
    type Payload = Cell;

    fn next_entry(&mut self) -> Result<Option<RingEntry<Cell>>> {
        self.lock().next_entry()
    }
    fn free_to(&mut self, position: Position) {
        self.lock().free_to(position);
    }
    fn rewind(&mut self) {
        self.lock().rewind();
    }
    fn freed(&self) -> Position {
        self.lock().freed()
    }
    fn head(&self) -> Position {
        self.lock().head()
    }
    fn load_state(&self) -> Option<StreamState> {
        self.lock().load_state()
    }
    fn store_state(&mut self, state: &StreamState) {
        self.lock().store_state(state);
    }
    fn is_closed(&self) -> bool {
        self.lock().is_closed()
    }
    fn fill(&self) -> Fill {
        self.lock().fill()
    }
}
