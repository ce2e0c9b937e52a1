//! Serves a file, a block device or nothing as `/dev/ublkbN` until SIGTERM or SIGINT, for trying out and for measuring:
//!
//! ```text
//! serve (FILE | null:BYTES) [--id N] [--queues N] [--depth N] [--data-path user-copy|buffer-swap] [--cached] [--read-only]
//!       [--block 512|4096] [--recover]
//! serve --list
//! serve --delete N
//! ```
//!
//! Prints the device's path when it is there. `--recover` takes over `--id` from a server that died. Killed, it leaves its
//! device waiting for that.

#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::sync::Arc;
use std::time::Duration;

use farshore_ublk::{Control, DataPath, Server, ServerConfig, ServerHandle, Stop};
use farshore_uring::{BackingOptions, BlockDevice, Direct, FileDevice, Geometry, NullDevice};
use nix::sys::signal::{SigSet, Signal};

type Failure = Box<dyn std::error::Error>;

struct Options {
    config: ServerConfig,
    backing: BackingOptions,
    block: u32,
    recover: bool,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().ok_or("usage: serve (FILE | null:BYTES) [--id N] ...")?;
    if what == "--list" {
        return list();
    }
    if what == "--delete" {
        Control::open()?.delete(arguments.next().ok_or("--delete wants a number")?.parse()?)?;
        return Ok(());
    }
    let options = parse(arguments)?;
    // Before any thread is made, so that all of them leave these to us.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    match what.strip_prefix("null:") {
        Some(bytes) => {
            let geometry = Geometry {
                size: bytes.parse()?,
                logical_block: options.block,
                optimal_block: 4096,
                max_request: 1 << 20,
                max_discard: 1 << 30,
                read_only: options.backing.read_only,
                discard: true,
            };
            serve(&options, NullDevice::new(geometry), &signals)
        }
        None => serve(&options, FileDevice::open(what.as_ref(), options.backing)?, &signals),
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, Failure> {
    let mut options = Options {
        config: ServerConfig::default(),
        backing: BackingOptions { direct: Direct::Auto, read_only: false },
        block: 512,
        recover: false,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--id" => options.config.id = Some(value()?.parse()?),
            "--queues" => options.config.queues = value()?.parse()?,
            "--depth" => options.config.depth = value()?.parse()?,
            "--data-path" => {
                options.config.data_path = match value()?.as_str() {
                    "user-copy" => Some(DataPath::UserCopy),
                    "buffer-swap" => Some(DataPath::BufferSwap),
                    other => return Err(format!("no data path {other}").into()),
                }
            }
            "--block" => options.block = value()?.parse()?,
            "--cached" => options.backing.direct = Direct::Off,
            "--read-only" => options.backing.read_only = true,
            "--recover" => options.recover = true,
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    Ok(options)
}

fn list() -> Result<(), Failure> {
    let control = Control::open()?;
    println!("features: {}", control.features().names().join(" "));
    for info in control.list()? {
        let (path, state, queues, depth) = (info.block_path(), info.state(), info.queues(), info.depth());
        println!("{} {state:?} {queues}x{depth} {:?} server {:?}", path.display(), info.data_path(), info.server_pid());
    }
    Ok(())
}

fn serve<D: BlockDevice>(options: &Options, device: D, signals: &SigSet) -> Result<(), Failure> {
    let device = Arc::new(device);
    let server: ServerHandle = if options.recover {
        let id = options.config.id.ok_or("--recover wants --id")?;
        Server::recover(id, Duration::from_secs(10), device)?
    } else {
        Server::start(options.config, device)?
    };
    println!("{}", server.block_path().display());
    signals.wait()?;
    server.stop(Stop::Anyway)?;
    println!("{:?}", server.stats());
    Ok(())
}
