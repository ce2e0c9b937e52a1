//! The order of writes (I3, I5), seen from outside. Threads write numbered stamps over two volumes of one group, each stamp
//! only after the one before was acknowledged. So every recovery point must show, for each thread, the effect of exactly
//! its first S stamps for some S: never a later stamp without an earlier one, on whichever volume, and where stamps overlap
//! the later one on top.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_nbd::client::{Client, Options};
use farshore_nbd::wire::command;
use farshore_proto::WallTime;
use farshore_proto::text::parse_time;
use serde_json::Value;

use crate::support::rig::GROUP;
use crate::support::{LIMIT, MIB, Rig, device, number, pattern, pause, until};

const BLOCK: u64 = 4096;
const THREAD_COUNT: usize = 4;
const THREADS: u64 = THREAD_COUNT as u64;
/// Blocks of a thread: its stamps cross borders of 64 KiB slots inside.
const THREAD_BLOCKS: u64 = 64;
const VOLUMES: [&str; 2] = ["left", "right"];
const VOLUME_BYTES: u64 = 32 * MIB;

/// Where stamp `n` of a thread goes: `STEPS[(n - 1) % STEPS.len()]`. (volume, first block, blocks)
const STEPS: [(usize, u64, u64); 6] = [(0, 0, 1), (1, 0, 1), (0, 14, 4), (0, 16, 1), (1, 15, 2), (1, 15, 1)];
/// All that stamps touch: (volume, first block, blocks).
const PLACES: [(usize, u64, u64); 4] = [(0, 0, 1), (0, 14, 4), (1, 0, 1), (1, 15, 2)];

fn step(stamp: u64) -> (usize, u64, u64) {
    let at = (stamp - 1) % STEPS.len() as u64;
    STEPS[usize::try_from(at).expect("below the number of steps")]
}

/// The stamp that a block shows after the first `stamps`; 0: none.
fn expected(stamps: u64, volume: usize, block: u64) -> u64 {
    let touches = |stamp: &u64| {
        let (at, first, blocks) = step(*stamp);
        at == volume && (first..first + blocks).contains(&block)
    };
    (stamps.saturating_sub(STEPS.len() as u64)..=stamps).rev().filter(|stamp| *stamp > 0).find(touches).unwrap_or(0)
}

fn block_of(thread: u64, stamp: u64) -> Vec<u8> {
    let pair = [(thread + 1).to_le_bytes(), stamp.to_le_bytes()].concat();
    pair.repeat(usize::try_from(BLOCK).expect("a block fits") / pair.len())
}

/// The stamp of one block; an error if the block is torn or another thread's.
fn stamp_of(thread: u64, block: &[u8]) -> Result<u64> {
    let stamp = u64::from_le_bytes(block[8..16].try_into().expect("eight bytes"));
    let whole = if stamp == 0 { block.iter().all(|byte| *byte == 0) } else { block == block_of(thread, stamp) };
    ensure!(whole, "a block of thread {thread} is torn around stamp {stamp}: {:02x?}", &block[..32]);
    Ok(stamp)
}

fn wall() -> WallTime {
    farshore_tests::wall()
}

/// The writing threads of a run.
#[derive(Default)]
struct Writers {
    /// Pause between the stamps of a thread, so that a ring of known size bridges a break.
    pace: Duration,
    stop: AtomicBool,
    /// Stamps begun, by thread.
    begun: [AtomicU64; THREAD_COUNT],
    /// When each stamp was acknowledged, by thread.
    acknowledged: [Mutex<Vec<WallTime>>; THREAD_COUNT],
}

impl Writers {
    fn spawn<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        sockets: &'s [PathBuf; 2],
    ) -> Vec<ScopedJoinHandle<'s, Result<()>>> {
        (0..THREADS).map(|thread| scope.spawn(move || self.write(thread, sockets))).collect()
    }

    fn write(&self, thread: u64, sockets: &[PathBuf; 2]) -> Result<()> {
        let mut clients = [device::connect(&sockets[0])?, device::connect(&sockets[1])?];
        let at = usize::try_from(thread).context("a thread's number")?;
        let mut stamp = 0;
        while !self.stop.load(Ordering::SeqCst) {
            stamp += 1;
            let (volume, first, blocks) = step(stamp);
            let content = block_of(thread, stamp).repeat(usize::try_from(blocks)?);
            self.begun[at].store(stamp, Ordering::SeqCst);
            let offset = (thread * THREAD_BLOCKS + first) * BLOCK;
            clients[volume].write(offset, &content, false).context("a stamp's write")?;
            let mut acknowledged = self.acknowledged[at].lock().expect("no holder panics");
            acknowledged.push(wall());
            drop(acknowledged);
            if !self.pace.is_zero() {
                pause(self.pace);
            }
        }
        Ok(())
    }

    /// Ends the writing; an error if a write failed.
    fn stop(&self, threads: Vec<ScopedJoinHandle<'_, Result<()>>>) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        threads.into_iter().try_for_each(|thread| thread.join().expect("a writer does not panic"))
    }

    /// Stamps begun by all threads.
    fn begun(&self) -> u64 {
        self.begun.iter().map(|begun| begun.load(Ordering::SeqCst)).sum()
    }

    /// Stamps of a thread that were acknowledged before `time`.
    fn acknowledged_before(&self, thread: usize, time: WallTime) -> u64 {
        let acknowledged = self.acknowledged[thread].lock().expect("no holder panics");
        acknowledged.partition_point(|at| *at < time) as u64
    }
}

/// How many stamps of each thread a point shows; an error if that is no state that could have been.
fn read_stamps(sockets: &[PathBuf; 2]) -> Result<Vec<u64>> {
    let mut blocks: Vec<Vec<(usize, u64, u64)>> = vec![Vec::new(); THREAD_COUNT];
    for (volume, socket) in sockets.iter().enumerate() {
        let mut client = device::connect(socket)?;
        let mut asked = std::collections::BTreeMap::new();
        for thread in 0..THREADS {
            for (_, first, count) in PLACES.iter().filter(|place| place.0 == volume) {
                let offset = (thread * THREAD_BLOCKS + first) * BLOCK;
                let cookie = client.submit(command::READ, 0, offset, u32::try_from(count * BLOCK)?, &[])?;
                asked.insert(cookie, (thread, *first));
            }
        }
        while client.in_flight() > 0 {
            let reply = client.receive()?;
            reply.result.context("read a stamp")?;
            let (thread, first) = asked.remove(&reply.cookie).context("an answer to no question")?;
            for (number, block) in (first..).zip(reply.data.chunks_exact(usize::try_from(BLOCK)?)) {
                blocks[usize::try_from(thread)?].push((volume, number, stamp_of(thread, block)?));
            }
        }
        client.disconnect()?;
    }
    let judge = |(thread, seen): (usize, Vec<(usize, u64, u64)>)| {
        let stamps = seen.iter().map(|(.., stamp)| *stamp).max().unwrap_or(0);
        for (volume, block, stamp) in seen {
            let wanted = expected(stamps, volume, block);
            ensure!(
                stamp == wanted,
                "thread {thread}: stamp {stamps} is there, but block {block} of volume {} shows stamp {stamp} instead of {wanted}",
                VOLUMES[volume]
            );
        }
        Ok(stamps)
    };
    blocks.into_iter().enumerate().map(judge).collect()
}

fn view_stamps(rig: &Rig, point: &Value) -> Result<Vec<u64>> {
    let id = point["id"].as_str().context("a point has an id")?;
    let view = rig.sites.open_view(GROUP, id, true).with_context(|| format!("open a view of {id}"))?;
    let sockets = [device::view_socket(&view, VOLUMES[0])?, device::view_socket(&view, VOLUMES[1])?];
    let stamps = read_stamps(&sockets).with_context(|| format!("point {point}"))?;
    rig.sites.close_view(&view).with_context(|| format!("close the view of {id}"))?;
    Ok(stamps)
}

/// Opens every point given and checks it against the writers' record.
fn check_points(rig: &Rig, writers: &Writers, points: &[Value]) -> Result<()> {
    let (next, begin) = (AtomicUsize::new(0), Instant::now());
    let shown: Vec<Mutex<Vec<u64>>> = points.iter().map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some(at) = Some(next.fetch_add(1, Ordering::SeqCst)).filter(|at| *at < points.len()) {
                *shown[at].lock().expect("no holder panics") = view_stamps(rig, &points[at])?;
            }
            Ok(())
        };
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().try_for_each(|thread| thread.join().expect("a checker does not panic"))
    })?;
    report(points.len(), begin.elapsed());
    let mut before = vec![0; THREAD_COUNT];
    for (point, stamps) in points.iter().zip(shown) {
        let stamps = stamps.into_inner().expect("no holder panics");
        let time = parse_time(point["time"].as_str().context("a point has a time")?)?;
        for (thread, (stamps, before)) in stamps.iter().zip(&mut before).enumerate() {
            ensure!(
                stamps >= before,
                "point {point} shows less of thread {thread} than the one before: {stamps} < {before}"
            );
            *before = *stamps;
            let sure = writers.acknowledged_before(thread, time);
            ensure!(
                *stamps >= sure,
                "point {point} shows {stamps} stamps of thread {thread}, {sure} were acknowledged before it"
            );
            ensure!(*stamps <= writers.begun[thread].load(Ordering::SeqCst), "more stamps than were written");
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a figure for whoever runs it with --nocapture")]
fn report(points: usize, took: Duration) {
    eprintln!("{points} points opened, read and closed in {took:.1?}");
}

/// At most `limit` of the points, evenly spread, the newest among them.
fn spread(points: &[Value], limit: usize) -> Vec<Value> {
    let every = points.len().div_ceil(limit.max(1)).max(1);
    let mut chosen: Vec<Value> = points.iter().rev().step_by(every).cloned().collect();
    chosen.reverse();
    chosen
}

/// Points from `ready` on: those of before may lack a volume that had not joined yet.
fn points_since(rig: &Rig, ready: WallTime) -> Result<Vec<Value>> {
    let time = |point: &Value| point["time"].as_str().and_then(|time| parse_time(time).ok()).unwrap_or_default();
    Ok(rig.points()?.into_iter().filter(|point| time(point) > ready).collect())
}

fn protect_both(rig: &Rig) -> Result<[PathBuf; 2]> {
    let protect = |name: &str| -> Result<PathBuf> {
        let image = rig.dir().join(format!("{name}.img"));
        std::fs::File::create_new(&image).and_then(|file| file.set_len(VOLUME_BYTES)).context("make an image")?;
        rig.sites.protect(&image, GROUP, name)
    };
    let sockets = [protect(VOLUMES[0])?, protect(VOLUMES[1])?];
    rig.wait()?;
    Ok(sockets)
}

/// The newest point shows every stamp that was acknowledged.
fn check_newest(rig: &Rig, writers: &Writers) -> Result<()> {
    let point = rig.wait()?;
    let stamps = view_stamps(rig, &point)?;
    for (thread, stamps) in stamps.iter().enumerate() {
        let written = writers.begun[thread].load(Ordering::SeqCst);
        ensure!(*stamps == written, "the newest point shows {stamps} of {written} stamps of thread {thread}");
    }
    Ok(())
}

/// Noise over the end of the left volume, as fast as it goes, until told to stop. With an endless stream of it a link that is
/// slower than the disk would never catch up, rightly; so it is only for the time of a break.
fn noise(socket: &Path, stop: &AtomicBool) -> Result<()> {
    let stream = UnixStream::connect(socket).context("connect")?;
    stream.set_read_timeout(Some(LIMIT)).context("limit")?;
    let mut client = Client::over(stream, &Options::default()).context("greet")?;
    let (first, piece) = (8 * MIB, 256 << 10);
    for round in 0u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let offset = first + round * piece % (VOLUME_BYTES - first);
        client.write(offset, &pattern::noise(round, usize::try_from(piece)?), false).context("write noise")?;
    }
    client.disconnect().context("leave")
}

const EAGER: &str = "[group.g]\ncut_min = \"1ms\"\ncut_max = \"20ms\"\n";

/// Goal: a thousand points under load, each a state that could have been. Method: points as close as the agent makes them,
/// every one of them opened as a view over NBD.
#[test]
fn every_point_of_a_run_is_a_prefix_of_what_was_written() {
    Rig::test(
        |config| {
            config.ring = 64 << 20;
            config.agent_toml = EAGER.into();
        },
        |rig| {
            let wanted = usize::try_from(number("FARSHORE_ORDER_POINTS", 1000)?)?;
            let (sockets, ready) = (protect_both(rig)?, wall());
            let writers = Writers::default();
            let points = std::thread::scope(|scope| {
                let threads = writers.spawn(scope, &sockets);
                let points = until("enough points", || {
                    let points = points_since(rig, ready)?;
                    Ok((points.len() >= wanted).then_some(points))
                });
                writers.stop(threads)?;
                points
            })?;
            check_newest(rig, &writers)?;
            check_points(rig, &writers, &points[points.len() - wanted..])
        },
    );
}

/// Goal: order holds through a ring that is full: points pause, what was missed is found again, then points go on.
/// Method: the smallest ring, noise on top of the stamps, and a link that is cut until writes are only marked.
#[test]
fn a_full_ring_and_a_broken_link_leave_no_point_that_never_was() {
    Rig::test(
        |config| {
            config.ring = 8 << 20;
            config.agent_toml = EAGER.into();
        },
        |rig| {
            let (sockets, ready) = (protect_both(rig)?, wall());
            let writers = Writers { pace: Duration::from_millis(5), ..Writers::default() };
            std::thread::scope(|scope| -> Result<()> {
                let threads = writers.spawn(scope, &sockets);
                let events = (0..3).try_for_each(|_| overflow(rig, &sockets[0]));
                writers.stop(threads).and(events)
            })?;
            check_newest(rig, &writers)?;
            let points = points_since(rig, ready)?;
            let limit = usize::try_from(number("FARSHORE_ORDER_POINTS", 1000)?)? / 4;
            check_points(rig, &writers, &spread(&points, limit))
        },
    );
}

/// Cuts the link until the ring is full, heals it, and waits for a point of after that.
fn overflow(rig: &Rig, socket: &Path) -> Result<()> {
    rig.sites.link().cut();
    let quiet = AtomicBool::new(false);
    let full = std::thread::scope(|scope| {
        let loud = scope.spawn(|| noise(socket, &quiet));
        let full = until("the ring is full", || {
            let status = rig.status()?;
            Ok((status["tier"] == "extents").then_some(status))
        });
        let heard = full.and_then(|_| rig.until_agent_alarm("ring.closed"));
        quiet.store(true, Ordering::SeqCst);
        loud.join().expect("the noise does not panic").and(heard)
    });
    rig.sites.link().heal();
    full?;
    let after = wall();
    until("a point of after the break", || {
        let newest = rig.points()?.pop().context("there were points before")?;
        Ok((parse_time(newest["time"].as_str().unwrap_or_default())? > after).then_some(()))
    })
}

/// Goal: a break that the ring bridges costs no history. Method: the link is cut and healed again and again under stamps;
/// the tier stays "ring", and points of during the breaks are there and right.
#[test]
fn breaks_that_the_ring_bridges_leave_no_gap() {
    Rig::test(
        |config| {
            config.ring = 256 << 20;
            config.agent_toml = EAGER.into();
        },
        |rig| {
            let (sockets, ready) = (protect_both(rig)?, wall());
            let writers = Writers { pace: Duration::from_millis(10), ..Writers::default() };
            let mut breaks = Vec::new();
            std::thread::scope(|scope| -> Result<()> {
                let threads = writers.spawn(scope, &sockets);
                let result = (0..3).try_for_each(|round| -> Result<()> {
                    let (begin, written) = (wall(), writers.begun());
                    rig.sites.link().cut();
                    // Breaks that the link's own patience bridges, and one that ends the session.
                    let seen = match round {
                        2 => rig.until_agent_alarm("link.down").map(drop),
                        _ => until("stamps", || Ok((writers.begun() > written + 300).then_some(()))),
                    };
                    ensure!(rig.status()?["tier"] == "ring", "the ring was to bridge this: {}", rig.status()?);
                    rig.sites.link().heal();
                    seen?;
                    breaks.push((begin, wall()));
                    until("the link is up again", || Ok(rig.agent_alarm("link.down")?.is_none().then_some(())))?;
                    rig.wait().map(drop)
                });
                writers.stop(threads)?;
                result
            })?;
            check_newest(rig, &writers)?;
            let points = points_since(rig, ready)?;
            for (begin, end) in breaks {
                let inside = |point: &&Value| {
                    point["time"]
                        .as_str()
                        .and_then(|time| parse_time(time).ok())
                        .is_some_and(|time| time > begin && time < end)
                };
                ensure!(points.iter().any(|point| inside(&point)), "no point of during a break");
            }
            let limit = usize::try_from(number("FARSHORE_ORDER_POINTS", 1000)?)? / 8;
            check_points(rig, &writers, &spread(&points, limit))
        },
    );
}
