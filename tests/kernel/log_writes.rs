//! The stream against the disk's own log. Goal: what the second site has is what the disk was asked to write, in an order that is
//! true. Method: below the protected device stands the kernel's `log-writes` target. Threads write stamped blocks over each other,
//! with FUA, zeroes and flushes, and number what they issue and what was acknowledged. Then disk log, stream and views have to
//! agree with these numbers and with each other.
//!
//! The disk log knows only when something became durable (`farshore_tests::log_writes`). So FUA writes have blocks of their own
//! where its content is compared, and one flush is under way at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use farshore_link::identity::Identity;
use farshore_proto::{ChunkId, KeyEpoch, PointId};
use farshore_target::server::target_keys;
use farshore_tests::log_writes::{self, Entry};
use farshore_tests::partial_order::{BLOCK, Request, Requests, What, stamp, stamped, stamps};
use farshore_uring::AlignedBuf;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use serde_json::{Value, json};

use crate::agent::{GROUP, LIMIT_SECONDS, MIB, Rig};
use crate::rig::{DISK_512, DISK_4096, machine, run, say};

/// Name of the device that logs.
const NAME: &str = "farshore-logged";
const DEVICE_BLOCKS: u64 = 8192;
const DEVICE_BYTES: u64 = DEVICE_BLOCKS * BLOCK as u64;
const SLOT_BYTES: u64 = 64 << 10;

/// Blocks where plain writes and zeroes overlap.
const PLAIN: Range<u64> = 0..512;
/// Blocks where writes with FUA overlap each other.
const DURABLE: Range<u64> = 512..768;
/// Blocks where all overlap all.
const MIXED: Range<u64> = 768..1280;
/// Blocks of the rest: writes that rarely meet.
const COLD: Range<u64> = 1280..DEVICE_BLOCKS;
/// Longest request, in blocks: some cross slots.
const LONGEST: u64 = 8;

const THREADS: u64 = 6;
const REQUESTS_PER_THREAD: u64 = 500;
/// Points that are opened.
const POINTS: usize = 20;

/// A device-mapper device over the disk of 4096-byte blocks (the log's entries have the blocks of the device, so the disk with
/// blocks of 512 bytes takes the log).
struct Logged;

impl Logged {
    fn make() -> Result<Self> {
        run("modprobe dm-log-writes")?;
        run(&format!("blkdiscard -f -z -l {DEVICE_BYTES} {DISK_4096} && blkdiscard -f -z -l {MIB} {DISK_512}"))?;
        let sectors = DEVICE_BYTES / 512;
        let table = format!("0 {sectors} log-writes {DISK_4096} {DISK_512}");
        run(&format!("DM_DISABLE_UDEV=1 dmsetup create {NAME} --table '{table}'"))?;
        Ok(Self)
    }

    fn path() -> PathBuf {
        Path::new("/dev/mapper").join(NAME)
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        // Fails if a test has failed before and something holds it: the next test says so. The removal writes the log's end.
        let _ = run(&format!("DM_DISABLE_UDEV=1 dmsetup remove --retry {NAME}"));
    }
}

/// The log, as it stands on its disk once the device is gone.
fn read_log() -> Result<Vec<Entry>> {
    ensure!(!Logged::path().exists(), "the log is still written");
    run(&format!("blockdev --flushbufs {DISK_512}"))?;
    let disk = File::open(DISK_512).context("open the log")?;
    log_writes::read(|at, buf| disk.read_exact_at(buf, at))
}

/// Writes and takes notes.
struct Client {
    plain: File,
    durable: File,
    clock: AtomicU64,
    /// What was issued; what is not acknowledged yet has `u64::MAX` there.
    requests: Mutex<Vec<Request>>,
    /// Ranges of zeroes, each used once, so that the log says which is which.
    zeroed: Mutex<BTreeSet<(u64, u64)>>,
    /// Held while a flush or a write with FUA is under way.
    flushing: Mutex<()>,
    /// Issued and acknowledged.
    flushes: Mutex<Vec<(u64, u64)>>,
}

impl Client {
    fn open(device: &Path) -> Result<Self> {
        let open = |flags| File::options().read(true).write(true).custom_flags(flags).open(device);
        Ok(Self {
            plain: open(libc::O_DIRECT).context("open the device")?,
            durable: open(libc::O_DIRECT | libc::O_DSYNC).context("open the device")?,
            clock: AtomicU64::new(1),
            requests: Mutex::default(),
            zeroed: Mutex::default(),
            flushing: Mutex::default(),
            flushes: Mutex::default(),
        })
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Does one request, with its notes. `run` gets its number.
    fn request(&self, what: What, blocks: Range<u64>, run: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        let number = {
            let mut requests = self.requests.lock().expect("no holder panics");
            let issued = self.tick();
            requests.push(Request { what, blocks, issued, acknowledged: u64::MAX });
            requests.len()
        };
        run(number as u64)?;
        let acknowledged = self.tick();
        self.requests.lock().expect("no holder panics")[number - 1].acknowledged = acknowledged;
        Ok(())
    }

    fn write(&self, what: What, blocks: Range<u64>) -> Result<()> {
        let _alone = (what == What::Fua).then(|| self.flushing.lock().expect("no holder panics"));
        let file = if what == What::Fua { &self.durable } else { &self.plain };
        self.request(what, blocks.clone(), |number| {
            let content: Vec<u8> = blocks.clone().flat_map(|at| stamped(number, at)).collect();
            let mut aligned = AlignedBuf::zeroed(content.len());
            aligned.copy_from_slice(&content);
            file.write_all_at(&aligned, blocks.start * BLOCK as u64).context("write")
        })
    }

    /// By write zeroes; discards are not offered by a device over `log-writes`, for that cannot discard to zeroes.
    fn zero(&self, blocks: Range<u64>) -> Result<()> {
        // Within one slot, so that it makes one record.
        let slot_blocks = SLOT_BYTES / BLOCK as u64;
        let blocks = blocks.start..blocks.end.min((blocks.start / slot_blocks + 1) * slot_blocks);
        if !self.zeroed.lock().expect("no holder panics").insert((blocks.start, blocks.end)) {
            return Ok(());
        }
        let (offset, len) = (blocks.start * BLOCK as u64, (blocks.end - blocks.start) * BLOCK as u64);
        self.request(What::Zeroes, blocks, |_| {
            let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&self.plain, mode, i64::try_from(offset)?, i64::try_from(len)?).context("write zeroes")
        })
    }

    fn flush(&self) -> Result<()> {
        let _alone = self.flushing.lock().expect("no holder panics");
        let issued = self.tick();
        self.plain.sync_data().context("flush")?;
        self.flushes.lock().expect("no holder panics").push((issued, self.tick()));
        Ok(())
    }

    /// One thread's load.
    fn load(&self, thread: u64) -> Result<()> {
        let mut random = Random(thread + 1);
        let place = |random: &mut Random, area: Range<u64>, longest: u64| {
            let blocks = 1 + random.below(longest);
            let first = area.start + random.below(area.end - area.start - blocks);
            first..first + blocks
        };
        for _ in 0..REQUESTS_PER_THREAD {
            match random.below(100) {
                0..2 => self.flush()?,
                2..6 => self.zero(place(&mut random, PLAIN, LONGEST))?,
                6..9 => self.zero(place(&mut random, MIXED, LONGEST))?,
                9..20 => self.write(What::Fua, place(&mut random, DURABLE, LONGEST))?,
                20..28 => self.write(What::Fua, place(&mut random, MIXED, LONGEST))?,
                28..40 => self.write(What::Write, place(&mut random, MIXED, LONGEST))?,
                40..85 => self.write(What::Write, place(&mut random, PLAIN, LONGEST))?,
                _ => self.write(What::Write, place(&mut random, COLD, LONGEST))?,
            }
        }
        Ok(())
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Requests in the order of the stream, each with the number of its batch.
struct Stream(Vec<(u64, u64)>);

impl Stream {
    /// Reads it out of the target's journal with the program's own tools.
    fn read(rig: &Rig, requests: &Requests) -> Result<Self> {
        let bundle = rig.sites.path("target.bundle");
        let identity = Identity::load(&bundle).context("read the target's identity")?;
        let keys = target_keys(&identity).context("take the target's keys")?;
        let (mut order, mut pieces): (Vec<(u64, u64)>, BTreeMap<u64, u64>) = Default::default();
        for segment in segments(&rig.sites.path("target"))? {
            let documents = dump(rig, &segment, &bundle)?;
            for document in documents.as_array().context("a list of segments")? {
                let id = |name: &str| document[name].as_str().context("an id");
                let stream = keys.stream(id("group")?.parse()?, id("host")?.parse()?);
                let known = known_pieces(requests, |content| {
                    Ok(stream.dedup_key(KeyEpoch(1)).context("the first key")?.chunk_id(content))
                })?;
                for record in document["records"].as_array().context("records")? {
                    let Some(piece) = Piece::of(record)? else { continue };
                    let number = *known.get(&piece).with_context(|| format!("nobody wrote {record}"))?;
                    let (position, batch) =
                        (record["position"].as_u64().context("a position")?, batch(&record["point"])?);
                    // Pieces of one request stand at one position.
                    match pieces.insert(number, position) {
                        None => order.push((number, batch)),
                        Some(first) => ensure!(first == position, "{number} stands at {first} and at {position}"),
                    }
                }
            }
        }
        Ok(Self(order))
    }

    fn numbers(&self) -> Vec<u64> {
        self.0.iter().map(|(number, _)| *number).collect()
    }

    /// What a point holds.
    fn until(&self, batch: u64) -> impl Iterator<Item = u64> {
        self.0.iter().filter(move |(_, at)| *at <= batch).map(|(number, _)| *number)
    }
}

/// A record's range in bytes, and its content where it has one.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    offset: u64,
    bytes: u64,
    content: Option<String>,
}

impl Piece {
    /// `None`: no guest's record.
    fn of(record: &Value) -> Result<Option<Self>> {
        let kind = record["kind"].as_str().context("a kind")?;
        if !["write", "discard", "write zeroes"].contains(&kind) {
            return Ok(None);
        }
        let number = |name: &str| record[name].as_u64().context("a number");
        let content = record["content"].as_str().map(str::to_owned);
        Ok(Some(Self { offset: number("offset")?, bytes: number("bytes")?, content }))
    }
}

/// The records that each request makes: one per slot, zeroes in one piece.
fn known_pieces(requests: &Requests, id: impl Fn(&[u8]) -> Result<ChunkId>) -> Result<BTreeMap<Piece, u64>> {
    let mut known = BTreeMap::new();
    let block = BLOCK as u64;
    for (number, request) in requests.numbered() {
        let (mut offset, end) = (request.blocks.start * block, request.blocks.end * block);
        while offset < end {
            let stop = if request.what == What::Zeroes { end } else { end.min((offset / SLOT_BYTES + 1) * SLOT_BYTES) };
            let content: Vec<u8> = (offset / block..stop / block).flat_map(|at| stamped(number, at)).collect();
            let content = if request.what == What::Zeroes { None } else { Some(id(&content)?.to_string()) };
            known.insert(Piece { offset, bytes: stop - offset, content }, number);
            offset = stop;
        }
    }
    Ok(known)
}

/// The number of the batch at a point's end.
fn batch(point: &Value) -> Result<u64> {
    let id: PointId = point.as_str().context("a point's id")?.parse().context("a point's id")?;
    Ok(id.batch.0)
}

fn segments(folder: &Path) -> Result<Vec<PathBuf>> {
    let found = run(&format!("find {} -name '*.seg' | sort", folder.display()))?;
    Ok(found.lines().map(PathBuf::from).collect())
}

fn dump(rig: &Rig, segment: &Path, bundle: &Path) -> Result<Value> {
    let binary = std::env::var("FARSHORE_BIN").context("FARSHORE_BIN names the binary under test")?;
    let out = rig.sites.path("dump.json");
    let (segment, bundle, out_text) = (segment.display(), bundle.display(), out.display());
    run(&format!("{binary} journal dump {segment} --records --identity {bundle} --json > {out_text}"))?;
    serde_json::from_slice(&std::fs::read(out).context("read the dump")?).context("the dump is JSON")
}

/// The numbers in all blocks of a device.
fn state_of(device: &Path) -> Result<Vec<u64>> {
    run(&format!("blockdev --flushbufs {}", device.display()))?;
    let mut bytes = vec![0; usize::try_from(DEVICE_BYTES)?];
    File::open(device).and_then(|file| file.read_exact_at(&mut bytes, 0)).context("read a device")?;
    stamps(&bytes)
}

/// Opens points all over the run. Each has to be exactly what the stream holds up to it, and by the client's notes alone a prefix.
fn check_points(rig: &mut Rig, requests: &Requests, stream: &Stream, marks: &[(String, u64)]) -> Result<()> {
    let points = rig.sites.target().get(&format!("/v1/points?group={GROUP}"))?;
    let points: Vec<&Value> = points.as_array().context("a list of points")?.iter().collect();
    let mut chosen: Vec<(String, u64)> = marks.to_vec();
    while chosen.len() < POINTS {
        let at = usize::try_from(rig.random(points.len() as u64))?;
        chosen.push((points[at]["id"].as_str().context("an id")?.to_owned(), 0));
    }
    let mut sizes = BTreeSet::new();
    for (point, sure) in chosen {
        let view = rig.open_view_at(&point)?;
        let state = state_of(&view.device).with_context(|| format!("point {point}"))?;
        rig.close_view(&view)?;
        requests.check_state(&state, sure).with_context(|| format!("point {point}"))?;
        let inside: Vec<u64> = stream.until(batch(&json!(point))?).collect();
        sizes.insert(inside.len());
        let expected = requests.replayed(inside, state.len())?;
        let differs = expected.iter().zip(&state).position(|(expected, seen)| expected != seen);
        ensure!(differs.is_none(), "point {point}: block {differs:?} is not what the stream says");
    }
    ensure!(sizes.len() > 5, "the points show only {} different states", sizes.len());
    say(&format!("{POINTS} points opened, {} states of up to {:?} requests", sizes.len(), sizes.last()));
    Ok(())
}

/// Requests in the order of the disk's log.
fn logged_order(log: &[Entry], requests: &Requests) -> Result<Vec<u64>> {
    let zeroes: BTreeMap<(u64, u64), u64> = requests
        .numbered()
        .filter(|(_, request)| request.what == What::Zeroes)
        .map(|(number, request)| ((request.blocks.start, request.blocks.end), number))
        .collect();
    let mut order = Vec::new();
    for entry in log.iter().filter(|entry| entry.len > 0) {
        let first = entry.offset / BLOCK as u64;
        let blocks = first..first + entry.len / BLOCK as u64;
        let shown = if entry.discard { vec![0] } else { stamps_at(&entry.data, first)? };
        ensure!(shown.iter().all(|number| *number == shown[0]), "one write of two requests: {shown:?}");
        let number = match shown[0] {
            0 => *zeroes.get(&(blocks.start, blocks.end)).with_context(|| format!("nobody made {blocks:?} zero"))?,
            number => number,
        };
        let request = requests.get(number)?;
        ensure!(request.blocks == blocks, "{number} wrote {:?} and the log says {blocks:?}", request.blocks);
        ensure!(
            entry.fua == (request.what == What::Fua),
            "{number} is {:?}, in the log FUA is {}",
            request.what,
            entry.fua
        );
        order.push(number);
    }
    Ok(order)
}

fn stamps_at(data: &[u8], first: u64) -> Result<Vec<u64>> {
    (first..).zip(data.chunks_exact(BLOCK)).map(|(at, block)| stamp(block, at)).collect()
}

/// Wherever the log's order says something, it says what client and stream say: see the head of this file.
fn compare_orders(requests: &Requests, flushes: &[(u64, u64)], log: &[u64], stream: &[u64]) -> Result<()> {
    ensure!(log.len() == requests.count(), "{} requests, {} in the log", requests.count(), log.len());
    let place = |order: &[u64]| -> BTreeMap<u64, usize> { order.iter().copied().zip(0..).collect() };
    let (in_log, in_stream) = (place(log), place(stream));
    let flushed = |first: &Request, second: &Request| {
        flushes.iter().any(|(issued, acknowledged)| first.acknowledged < *issued && *acknowledged < second.issued)
    };
    let (mut ordered, mut overlapping) = (0u64, 0u64);
    for (number, request) in requests.numbered() {
        let place = in_log[&number];
        for (other, second) in requests.numbered().filter(|(other, _)| *other != number) {
            let (fua, other_fua) = (request.what == What::Fua, second.what == What::Fua);
            let logged_as_ended = fua || !other_fua || flushed(request, second);
            if request.is_before(second) && logged_as_ended {
                ordered += 1;
                ensure!(place < in_log[&other], "the log turns {number} and {other} around");
            }
            if number < other && fua == other_fua && request.overlaps(second) {
                overlapping += 1;
                let agree = (place < in_log[&other]) == (in_stream[&number] < in_stream[&other]);
                ensure!(agree, "{number} and {other} overlap; log and stream have them in different order");
            }
        }
    }
    say(&format!("{ordered} pairs in order, {overlapping} overlapping pairs with one order in log and stream"));
    ensure!(overlapping > 1000, "only {overlapping} pairs overlap: too few to show anything");
    Ok(())
}

/// The log by itself: its end is the disk's content, and what every flush in it covers is a prefix.
fn check_replay(log: &[Entry], order: &[u64], requests: &Requests, content: &[u64]) -> Result<()> {
    let end = requests.replayed(order.iter().copied(), content.len())?;
    let comparable = |at: usize| !MIXED.contains(&(at as u64));
    let differs = (0..content.len()).find(|at| comparable(*at) && end[*at] != content[*at]);
    ensure!(differs.is_none(), "block {differs:?} is not what the log says");
    let (mut seen, mut flushes) = (0, 0);
    for entry in log {
        seen += usize::from(entry.len > 0);
        // Every tenth: a check takes a look at every request.
        flushes += usize::from(entry.flush);
        if entry.flush && flushes % 10 == 0 {
            let plain = order[..seen]
                .iter()
                .copied()
                .filter(|number| requests.get(*number).is_ok_and(|request| request.blocks.end <= PLAIN.end));
            let state = requests.replayed(plain, usize::try_from(PLAIN.end)?)?;
            let plain = Requests::new(plain_only(requests));
            plain.check_state(&state, 0).with_context(|| format!("the log up to its flush {flushes}"))?;
        }
    }
    ensure!(flushes >= 20, "only {flushes} flushes in the log");
    Ok(())
}

/// The requests with those outside of the plain blocks taken out of time: numbers stay.
fn plain_only(requests: &Requests) -> Vec<Request> {
    let never =
        |request: &Request| Request { blocks: 0..0, issued: u64::MAX, acknowledged: u64::MAX, ..request.clone() };
    let plain = |request: &Request| request.blocks.end <= PLAIN.end;
    requests.numbered().map(|(_, request)| if plain(request) { request.clone() } else { never(request) }).collect()
}

/// What a run leaves.
struct Run {
    requests: Requests,
    flushes: Vec<(u64, u64)>,
    stream: Stream,
    content: Vec<u64>,
}

fn load_and_look(rig: &mut Rig) -> Result<Run> {
    let client = Client::open(&rig.device)?;
    let mut marks: Vec<(String, u64)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let client = &client;
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || client.load(thread))).collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            let sure = client.tick();
            let body = json!({ "group": GROUP, "name": format!("mark-{}", marks.len()), "timeout_s": LIMIT_SECONDS });
            let point = rig.sites.agent().post("/v1/bookmark", &body)?;
            if marks.len() < POINTS / 2 {
                marks.push((point["id"].as_str().context("a point's id")?.to_owned(), sure));
            }
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        threads.into_iter().try_for_each(|thread| thread.join().expect("a writer does not panic"))
    })?;
    client.flush()?;
    rig.check_nothing_missing()?;
    rig.check_replica()?;
    let content = state_of(&rig.device)?;
    let Client { requests, flushes, .. } = client;
    let requests = Requests::new(requests.into_inner().context("no holder panicked")?);
    requests.check_state(&content, u64::MAX - 1).context("the device at the end")?;
    let stream = Stream::read(rig, &requests)?;
    requests.check_order(&stream.numbers()).context("the stream")?;
    check_points(rig, &requests, &stream, &marks)?;
    Ok(Run { requests, flushes: flushes.into_inner().context("no holder panicked")?, stream, content })
}

#[test]
fn the_order_on_the_disk_is_the_order_of_the_stream() -> Result<()> {
    let control = machine()?;
    let logged = Logged::make()?;
    let rig = Rig::over(11, control, &Logged::path(), Box::new(logged), |config| {
        config.agent_toml += &format!("[group.{GROUP}]\ngranularity = \"write\"\n");
    })?;
    let mut found = None;
    rig.run(|rig| {
        found = Some(load_and_look(rig)?);
        rig.check_logs()
    })?;
    let Run { requests, flushes, stream, content } = found.context("it ran")?;
    let log = read_log()?;
    let order = logged_order(&log, &requests)?;
    say(&format!("{} requests, {} flushes, {} entries in the disk's log", requests.count(), flushes.len(), log.len()));
    compare_orders(&requests, &flushes, &order, &stream.numbers())?;
    check_replay(&log, &order, &requests, &content)
}
