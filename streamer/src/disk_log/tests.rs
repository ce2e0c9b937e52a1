use farshore_uring::sim::{SimRng, SimStorage};
use farshore_uring::{OpenMode, Storage};

use farshore_proto::GroupId;

use super::*;
use crate::source::VolumeSet;

type File = <SimStorage as Storage>::File;

const OWNER: HostId = HostId([5; 16]);
const GROUPS: [GroupId; 2] = [GroupId([1; 16]), GroupId([2; 16])];
const SIZE: u64 = 24 << 20;
const PLACE: &str = "disk.log";

fn open(storage: &SimStorage, size: u64, kept: &BTreeSet<Line>) -> io::Result<Arc<DiskLog<File>>> {
    let path = std::path::Path::new(PLACE);
    let mode = if storage.exists(path)? { OpenMode::ReadWrite } else { OpenMode::CreateNew };
    let file = storage.open(path, mode)?;
    storage.sync_dir(std::path::Path::new(""))?;
    let id = [u8::try_from(storage.op_count() % 251).expect("small"); 16];
    DiskLog::open(file, OWNER, size, id, kept)
}

fn batch(number: u64, previous: ChainHash, len: u64) -> LoggedBatch {
    let flags = StreamFlags { event_open: false, joined: VolumeSet::default() };
    let mut chain = ChainHash([7; 32]);
    chain.0[..8].copy_from_slice(&number.to_le_bytes());
    LoggedBatch {
        generation: Generation(1),
        incarnation: Incarnation(1),
        number: BatchNo(number),
        end: Position(number * 10),
        time: WallTime(number),
        recoverable: true,
        app_consistent: false,
        bookmark: None,
        before: flags,
        after: flags,
        previous,
        chain,
        payload_bytes: len,
        written_bytes: len,
        len,
    }
}

fn bytes_of(number: u64, len: u64) -> Bytes {
    let mut rng = SimRng::new(number);
    (0..len.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).take(usize::try_from(len).expect("small")).collect()
}

/// A line as it should be: numbers and lengths of batches that were not forgotten.
struct Model {
    log: GroupLog<File>,
    held: VecDeque<(u64, u64)>,
    /// How many of them were synced.
    synced: usize,
    next: u64,
    last: ChainHash,
}

impl Model {
    fn new(log: GroupLog<File>) -> Self {
        Self { log, held: VecDeque::new(), synced: 0, next: 1, last: ChainHash::default() }
    }

    fn append(&mut self, len: u64) -> bool {
        let batch = batch(self.next, self.last, len);
        let bytes = bytes_of(self.next, len);
        let half = bytes.len() / 2;
        match self.log.append(&batch, &[bytes.slice(..half), bytes.slice(half..)]) {
            Ok(()) => {
                self.held.push_back((self.next, len));
                self.next += 1;
                self.last = batch.chain;
                true
            }
            Err(NotAppended::Full) => false,
            Err(NotAppended::Failed(error)) => panic!("{error}"),
        }
    }

    fn check(&self) {
        for (number, len) in &self.held {
            assert!(self.log.load(BatchNo(*number)).expect("sound") == bytes_of(*number, *len), "batch {number}");
        }
    }
}

/// Goal: what was synced is there after a crash, whatever of the rest is; batches come back whole, in order, each line its own; and space
/// that is given back is used again.
#[test]
fn what_was_synced_survives() {
    let (mut crashes, mut cut_off, mut full, mut wrapped) = (0, 0, 0, 0u64);
    for seed in 0..40 {
        let mut rng = SimRng::new(seed);
        let mut storage = SimStorage::new(rng.fork());
        let mut log = open(&storage, SIZE, &BTreeSet::new()).expect("empty");
        let mut models: Vec<Model> =
            GROUPS.map(|group| Model::new(log.begin(Line { group, number: seed + 1 }))).into_iter().collect();
        for _ in 0..120 {
            let which = usize::from(rng.chance(1, 3));
            let model = &mut models[which];
            match rng.below(100) {
                0..=49 => {
                    let len = if rng.chance(1, 6) { rng.below(9 << 20) } else { rng.below(200 << 10) } + 1;
                    full += u64::from(!model.append(len));
                }
                50..=69 => {
                    model.log.sync().expect("sound");
                    model.synced = model.held.len();
                }
                70..=91 => {
                    // The target has some more; as a rule most.
                    let count = usize::try_from(rng.below(model.held.len() as u64 + 1)).expect("small");
                    if let Some((number, _)) = model.held.get(count) {
                        let number = *number - 1;
                        model.log.trim(BatchNo(number));
                        while model.held.pop_front_if(|(held, _)| *held <= number).is_some() {
                            model.synced = model.synced.saturating_sub(1);
                        }
                    } else if model.synced == model.held.len() {
                        model.log.trim(BatchNo(model.next));
                        model.held.clear();
                        model.synced = 0;
                    }
                }
                92..=94 => {
                    let line = rng.next_u64();
                    model.log.clear(line);
                    model.held.clear();
                    (model.synced, model.last) = (0, ChainHash::default());
                }
                _ => {
                    storage = storage.crash(&mut rng);
                    crashes += 1;
                    let kept: BTreeSet<Line> = models.iter().map(|model| model.log.line()).collect();
                    log = open(&storage, SIZE, &kept).expect("ours");
                    for model in &mut models {
                        let line = model.log.line();
                        wrapped += model.log.next_index;
                        let (taken, batches) = log.take_up(line).expect("undamaged");
                        model.log = taken;
                        let first = model.held.front().map_or(model.next, |(number, _)| *number);
                        let found: Vec<u64> =
                            batches.iter().map(|batch| batch.number.0).filter(|number| *number >= first).collect();
                        cut_off += u64::from(found.len() < model.held.len());
                        assert!(found.len() >= model.synced, "seed {seed}: {found:?} of {:?}", model.held);
                        assert!(found.iter().zip(&model.held).all(|(found, (held, _))| found == held), "seed {seed}");
                        model.held.truncate(found.len());
                        model.synced = model.held.len();
                        // Trims are not durable: what was forgotten may be there again. The target's word is.
                        model.log.trim(BatchNo(first - 1));
                        if let Some((number, _)) = model.held.back() {
                            (model.next, model.last) = (number + 1, batch(*number, ChainHash::default(), 0).chain);
                        } else {
                            model.next = first;
                            model.last = batch(first - 1, ChainHash::default(), 0).chain;
                        }
                    }
                }
            }
        }
        models.iter().for_each(Model::check);
    }
    assert!(crashes > 100 && cut_off > 20 && full > 5 && wrapped > 500, "{crashes} {cut_off} {full} {wrapped}");
}

/// Goal: a flipped bit anywhere in what was synced is found, at the start or when the batch is read: never another batch, never fewer.
#[test]
fn rot_is_found() {
    let storage = SimStorage::new(SimRng::new(1));
    let log = open(&storage, SIZE, &BTreeSet::new()).expect("empty");
    let line = Line { group: GROUPS[0], number: 4 };
    let mut model = Model::new(log.begin(line));
    for len in [5000, 1, 9000, 4096] {
        assert!(model.append(len));
        // Each knows of those before it.
        model.log.sync().expect("sound");
    }
    let start = segment_at(&log.superblock, model.log.segments[0]);
    let kept = BTreeSet::from([line]);
    let (mut at_start, mut at_read) = (0, 0);
    // But for the last, which may pass for one that was not synced.
    let last = model.log.entries.back().expect("four").at;
    for at in (0..BLOCK as u64 + last).step_by(97) {
        let copy = storage.fork();
        copy.corrupt(std::path::Path::new(PLACE), start + at, 0x10).expect("there");
        let log = open(&copy, SIZE, &kept).expect("ours");
        match log.take_up(line) {
            // A damaged header of the segment is missed as what it began.
            Ok((_, batches)) if batches.is_empty() => assert!(at < BLOCK as u64),
            Ok((taken, batches)) => {
                assert_eq!(batches.len(), 4, "at {at}");
                let bad = model.held.iter().filter(|(number, len)| {
                    taken.load(BatchNo(*number)).ok().is_none_or(|bytes| bytes != bytes_of(*number, *len))
                });
                let errors = model.held.iter().filter(|(number, _)| taken.load(BatchNo(*number)).is_err()).count();
                assert_eq!(bad.count(), errors, "what is read is what was written, or an error: at {at}");
                at_read += errors;
            }
            Err(_) => at_start += 1,
        }
    }
    assert!(at_start > 10 && at_read > 10, "{at_start} {at_read}");
}

/// Goal: what is no log of ours is not written to.
#[test]
fn other_logs_are_refused() {
    let storage = SimStorage::new(SimRng::new(2));
    let none = BTreeSet::new();
    drop(open(&storage, SIZE, &none).expect("empty"));
    let file = storage.open(std::path::Path::new(PLACE), OpenMode::ReadWrite).expect("there");
    let refused = |result: io::Result<Arc<DiskLog<File>>>, part: &str| {
        let error = result.expect_err(part);
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(DiskLog::open(Arc::clone(&file), HostId([6; 16]), SIZE, [1; 16], &none), "another host");
    refused(DiskLog::open(Arc::clone(&file), OWNER, 1 << 18, [1; 16], &none), "too small");
    let mut block = [0; BLOCK];
    file.read_at(&mut block, 0).expect("there");
    block[24] = 2;
    let sum = blake3::hash(&block[..496]);
    block[496..512].copy_from_slice(&sum.as_bytes()[..16]);
    file.write_at(&block, 0).expect("there");
    refused(DiskLog::open(file, OWNER, SIZE, [1; 16], &none), "format 2");
}

/// Goal: a log whose first block is lost says so of each line that was in it; and begins anew.
#[test]
fn a_lost_first_block_is_said() {
    let storage = SimStorage::new(SimRng::new(3));
    let line = Line { group: GROUPS[1], number: 8 };
    let log = open(&storage, SIZE, &BTreeSet::new()).expect("empty");
    let mut model = Model::new(log.begin(line));
    assert!(model.append(10));
    model.log.sync().expect("sound");
    storage.corrupt(std::path::Path::new(PLACE), 60, 1).expect("there");
    let kept = BTreeSet::from([line]);
    let log = open(&storage, SIZE, &kept).expect("begins anew");
    let error = log.take_up(line).expect_err("lost");
    assert!(error.to_string().contains("damaged"), "{error}");
    assert_eq!(open(&storage, SIZE, &kept).expect("whole").take_up(line).expect("empty").1, []);
}

/// Goal: what was written by this version is read by later ones. Method: the first blocks of a log with one batch, byte for byte.
#[test]
fn the_golden_log_is_read() {
    let golden = include_bytes!("../../tests/golden/disk-log.bin");
    let storage = SimStorage::new(SimRng::new(4));
    let file = storage.open(std::path::Path::new(PLACE), OpenMode::CreateNew).expect("new");
    let line = Line { group: GROUPS[0], number: 7 };
    let log = DiskLog::open(Arc::clone(&file), HostId([3; 16]), 2 * SEGMENT_MIN + 4096, [9; 16], &BTreeSet::new());
    let mut model = Model::new(log.expect("empty").begin(line));
    assert!(model.append(3000) && model.append(100));
    model.log.sync().expect("sound");
    let mut made = vec![0; golden.len()];
    file.read_at(&mut made, 0).expect("there");
    assert!(made == golden, "the format has changed: give it a version, and read the old one");
}
