//! NBD exports as the tests look at them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use farshore_nbd::client::{Client, Options};
use serde_json::Value;

use super::{LIMIT, MIB};

/// Connects to an export on a unix socket. A request that gets no answer in time is an error, not a hang.
pub(crate) fn connect(socket: &Path) -> Result<Client> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(LIMIT)).context("limit an export")?;
    stream.set_write_timeout(Some(LIMIT)).context("limit an export")?;
    Client::over(stream, &Options::default()).with_context(|| format!("greet {}", socket.display()))
}

/// The URI of an export on a unix socket.
pub(crate) fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

/// Socket of a view's volume.
pub(crate) fn view_socket(view: &Value, volume: &str) -> Result<PathBuf> {
    let volumes = view["volumes"].as_array().context("a view lists its volumes")?;
    let found = volumes.iter().find(|entry| entry["volume"] == volume);
    let device = found.and_then(|entry| entry["device"].as_str());
    let device = device.with_context(|| format!("the view has no volume {volume}: {view}"))?;
    Ok(PathBuf::from(device.split_once("socket=").context("the view is on a unix socket")?.1))
}

/// All bytes of an export.
pub(crate) fn read_all(socket: &Path) -> Result<Vec<u8>> {
    let mut client = connect(socket)?;
    let size = client.info().size;
    let mut bytes = Vec::with_capacity(usize::try_from(size).context("the device fits in memory")?);
    let mut offset = 0;
    while offset < size {
        let len = u32::try_from(MIB.min(size - offset)).context("a piece fits")?;
        bytes.extend(
            client
                .read(offset, len)
                .with_context(|| format!("read {len} bytes at {offset} of {}", socket.display()))?,
        );
        offset += u64::from(len);
    }
    client.disconnect().context("leave a device")?;
    Ok(bytes)
}

/// All bytes of a file.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// Compares two contents; names the ranges that differ.
pub(crate) fn same(what: &str, got: &[u8], wanted: &[u8]) -> Result<()> {
    ensure!(got.len() == wanted.len(), "{what}: {} bytes instead of {}", got.len(), wanted.len());
    let bad: Vec<usize> = (0..got.len().div_ceil(512)).filter(|&at| sector(got, at) != sector(wanted, at)).collect();
    let Some(first) = bad.first() else { return Ok(()) };
    let head = |bytes: &[u8]| format!("{:02x?}", &sector(bytes, *first)[..16]);
    ensure!(
        bad.is_empty(),
        "{what}: {} of {} sectors differ, the first ones are {:?}; sector {first} begins with {} instead of {}",
        bad.len(),
        got.len().div_ceil(512),
        &bad[..bad.len().min(16)],
        head(got),
        head(wanted)
    );
    Ok(())
}

fn sector(bytes: &[u8], at: usize) -> &[u8] {
    &bytes[at * 512..bytes.len().min(at * 512 + 512)]
}

/// Overwrites part of a file behind everybody's back.
pub(crate) fn patch(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).open(path).with_context(|| format!("open {}", path.display()))?;
    file.write_all_at(bytes, offset).and_then(|()| file.sync_all()).with_context(|| format!("write {}", path.display()))
}

/// Turns one bit of a file.
pub(crate) fn flip(path: &Path, offset: u64) -> Result<()> {
    let mut byte = [0];
    let file = File::options().read(true).open(path).with_context(|| format!("open {}", path.display()))?;
    file.read_exact_at(&mut byte, offset).with_context(|| format!("read {}", path.display()))?;
    patch(path, offset, &[byte[0] ^ 0x10])
}
