//! The server processes: this program again, told by its environment what to serve.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use farshore_blkfilter::FilterVolume;
use farshore_ublk::{Server, ServerConfig, Stop};
use farshore_uring::{BackingOptions, BlockDevice, Direct, FileDevice, Geometry, NullDevice, open_backing};

use crate::rig::Spec;

/// Variable with the text of a [`Spec`].
pub(crate) const SPEC: &str = "FARSHORE_KERNEL_SERVE";

#[test]
#[ignore = "the serving process of other tests, which start it"]
fn serve() -> Result<()> {
    let spec = Spec::from_text(&std::env::var(SPEC).context("started by another test")?)?;
    let options = BackingOptions { direct: Direct::On, read_only: spec.read_only };
    match spec.backend.split_once(':').context("a back end and its argument")? {
        ("null", bytes) => serve_device(&spec, NullDevice::new(null_geometry(bytes.parse()?, 512))),
        ("file", path) => serve_device(&spec, FileDevice::open(path.as_ref(), options)?),
        (_, path) => serve_device(&spec, FilterVolume::unprotected_backing(open_backing(path.as_ref(), options)?)),
    }
}

pub(crate) fn null_geometry(size: u64, logical_block: u32) -> Geometry {
    Geometry {
        size,
        logical_block,
        optimal_block: 4096,
        max_request: 1 << 20,
        max_discard: 64 << 20,
        read_only: false,
        discard: true,
    }
}

pub(crate) fn config(spec: &Spec) -> ServerConfig {
    ServerConfig {
        queues: spec.queues,
        depth: spec.depth,
        data_path: Some(spec.path),
        survives_its_server: spec.survives,
        ..ServerConfig::default()
    }
}

#[allow(clippy::print_stdout, reason = "the parent reads it")]
fn serve_device<D: BlockDevice>(spec: &Spec, device: D) -> Result<()> {
    let device = Arc::new(device);
    let server = match spec.recover {
        Some(id) => Server::recover(id, Duration::from_secs(20), device)?,
        None => Server::start(config(spec), device)?,
    };
    println!("\nserving {}", server.block_path().display());
    // Until the parent closes its end.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop(Stop::Anyway)?;
    Ok(())
}
