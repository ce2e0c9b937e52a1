//! Serves a file or block device over NBD until standard input ends, for tests against real clients:
//! `serve FILE [--unix PATH | --tcp ADDRESS] [--threads N] [--direct] [--read-only] [--name NAME]`

#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::io::Read;
use std::sync::Arc;

use farshore_nbd::{Listen, Server, ServerConfig};
use farshore_uring::{BackingOptions, Direct, FileDevice};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().ok_or("usage: serve FILE [--unix PATH | --tcp ADDRESS] ...")?;
    let mut config = ServerConfig::new("", Listen::Unix { path: "nbd.sock".into(), mode: 0o600 });
    config.description.clone_from(&file);
    let mut options = BackingOptions { direct: Direct::Off, read_only: false };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--unix" => config.listen = Listen::Unix { path: value()?.into(), mode: 0o600 },
            "--tcp" => config.listen = Listen::Tcp(value()?.parse()?),
            "--threads" => config.threads = value()?.parse()?,
            "--name" => config.name = value()?,
            "--direct" => options.direct = Direct::On,
            "--read-only" => options.read_only = true,
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    let device = Arc::new(FileDevice::open(file.as_ref(), options)?);
    let server = Server::start(config, device)?;
    println!("{}", server.uri().unwrap_or_default());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop()?;
    println!("{:#?}", server.stats());
    Ok(())
}
