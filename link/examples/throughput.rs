//! Bytes per second of 4 MiB batches one way over loopback, beside one bare QUIC stream in the same process; and bytes per
//! second of processor time (both ends, user and system), which says more where the machine is busy with other things.
//!
//! `cargo run --release -p farshore-link --example throughput -- [GIB] [CONNECTIONS] [RUNS]`
#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "an example that measures prints its figures")]

use std::error::Error as StdError;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use farshore_link::bench_bare::bare_stream;
use farshore_link::identity::{Identity, Vault};
use farshore_link::quic::{
    SourceEvent, SourceLink, SourceLinkConfig, TargetEvent, TargetLimits, TargetLink, Transport,
};
use farshore_link::{Bytes, Error};
use farshore_proto::{Name, Role};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

const BATCH: usize = 4 << 20;
/// Pieces of a batch, as the streamer's frames are.
const PIECE: usize = 64 << 10;

fn link(vault: &std::path::Path, bytes: u64, connections: u16) -> Result<f64, Box<dyn StdError>> {
    let load = |file: &str| Identity::load(&vault.join(file)).map(Arc::new);
    let batches_max = usize::try_from(bytes)? / BATCH + 1;
    let (arrived, arrivals) = sync_channel(batches_max);
    let any = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let target = TargetLink::listen(any, load("target.toml")?, TargetLimits::default(), move |event| {
        if let TargetEvent::Batch { bytes, .. } = event {
            // The main thread waits for it until all have come.
            let _gone = arrived.try_send(bytes.len() as u64);
        }
    })?;
    let (tell, events) = sync_channel(batches_max + 100);
    let mut config = SourceLinkConfig::new(target.local_addr().to_string());
    config.connections = connections;
    let source = SourceLink::start(config, load("agent.toml")?, move |event| {
        let _gone = tell.try_send(event);
    })?;
    let session = loop {
        if let SourceEvent::Up { session, .. } = events.recv()? {
            break session;
        }
    };
    while source.stats().connections < usize::from(connections) {
        std::thread::yield_now();
    }
    let content = Bytes::from(vec![0x5a; BATCH]);
    let pieces: Vec<Bytes> =
        (0..BATCH / PIECE).map(|piece| content.slice(piece * PIECE..(piece + 1) * PIECE)).collect();
    let count = bytes / BATCH as u64;
    let started = Instant::now();
    for number in 0..count {
        let mut batch = pieces.clone().into();
        while let Err(unsent) = source.send_batch(session, number, batch) {
            if !matches!(unsent.error, Error::Full { .. }) {
                return Err(unsent.error.into());
            }
            batch = unsent.batch;
            // Room comes with a batch that was sent; everything else would end the run.
            let SourceEvent::BatchSent { .. } = events.recv()? else { return Err("the link broke".into()) };
        }
    }
    let mut got = 0;
    while got < count * BATCH as u64 {
        got += arrivals.recv()?;
    }
    let seconds = started.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate needs no 53 bits")]
    Ok(got as f64 / seconds)
}

/// User and system time of the process so far.
fn processor_time() -> Result<Duration, Box<dyn StdError>> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: TimeVal| time.tv_sec() * 1_000_000 + time.tv_usec();
    Ok(Duration::from_micros(u64::try_from(micros(usage.user_time()) + micros(usage.system_time()))?))
}

fn last(figures: &[Vec<f64>; 2]) -> String {
    let of = |figures: &Vec<f64>| figures.last().copied().unwrap_or(f64::NAN);
    format!("{:.3} GB/s ({:.3} GB per cpu-s)", of(&figures[0]), of(&figures[1]))
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<(), Box<dyn StdError>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (bytes, connections, runs) = (next(2)? << 30, u16::try_from(next(2)?)?, next(5)?);
    let dir = tempfile::tempdir()?;
    let vault = Vault::init(&dir.path().join("vault"), Name::new("bench")?)?;
    for role in [Role::Agent, Role::Target] {
        vault.issue(role, Name::new("bench")?, 1)?.write(&dir.path().join(format!("{role}.toml")))?;
    }
    let gigabytes = Duration::from_secs(bytes).as_secs_f64() / 1e9;
    let (mut bare, mut linked) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for run in 0..runs {
        let start = processor_time()?;
        bare[0].push(bare_stream(bytes, &Transport::default())?.bytes_per_second() / 1e9);
        let between = processor_time()?;
        linked[0].push(link(dir.path(), bytes, connections)? / 1e9);
        bare[1].push(gigabytes / (between - start).as_secs_f64());
        linked[1].push(gigabytes / (processor_time()? - between).as_secs_f64());
        println!("run {run}: bare {}, link {}", last(&bare), last(&linked));
    }
    let [bare, bare_cpu] = bare.map(median);
    let [linked, linked_cpu] = linked.map(median);
    println!("median, GB per cpu-s: bare {bare_cpu:.3}, link {linked_cpu:.3} ({:.0} %)", linked_cpu / bare_cpu * 100.0);
    println!(
        "median: bare stream {bare:.3} GB/s, link {linked:.3} GB/s over {connections} connections ({:.0} %)",
        linked / bare * 100.0
    );
    Ok(())
}
