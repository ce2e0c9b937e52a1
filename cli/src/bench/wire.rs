//! What a database's writes cost on the wire, against `zstd -3` of the same write stream.
//!
//! PostgreSQL runs pgbench on ext4 on an image whose writes are noted. Then a copy of the image as it was is protected, and
//! what was noted is written to it again at the pace at which it came. So the peer compresses exactly the bytes that we ship,
//! as one stream.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_blkfilter::FilterVolume;
use farshore_nbd::client::{Client, Options};
use farshore_nbd::{Listen, Server, ServerConfig};
use farshore_uring::{BackingOptions, open_backing};

use super::fio::sparse;
use super::replicate::{GROUP, WAIT_SECONDS, mega, start, status};
use super::tee::{Noted, Recorder, Tee, What, read_notes};
use super::{Bench, Row};
use crate::sites::mount::{Attached, need_machine};
use crate::sites::postgres::{Cluster, DATABASE_LIMIT, folder_of_postgres};
use crate::sites::run::{LIMIT, call, find, run_within, text};

/// The peer's level.
const LEVEL: i32 = 3;
/// Size of the database: about 300 MB, several times what PostgreSQL here keeps in memory.
const SCALE: &str = "20";

pub(super) fn wire(bench: &Bench<'_>) -> Result<Vec<Row>> {
    need_machine()?;
    let noted = record(bench)?;
    let (written, peer) = compress(&noted.notes)?;
    let mut sites = start(bench)?;
    let socket = sites.protect(&noted.before, GROUP, "disk")?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let sent = || -> Result<u64> { status(&sites)?["wire_bytes"].as_u64().context("bytes on the wire") };
    let before = sent()?;
    repeat(&noted.notes, &socket)?;
    sites.wait(GROUP, WAIT_SECONDS)?;
    let ours = sent()? - before;
    sites.stop_agent()?;
    #[expect(clippy::cast_precision_loss, reason = "sizes for people")]
    let [written, peer, ours] = [written, peer, ours].map(|bytes| mega(bytes as f64));
    Ok(vec![
        Row::new("bytes on the wire of a pgbench run", ours, "MB").against("bytes written", written),
        Row::new("bytes on the wire of a pgbench run", ours, "MB").against("zstd -3 of its writes", peer).at_most(0.8),
    ])
}

/// A noted run.
struct NotedRun {
    /// The image as it was when the notes begin.
    before: PathBuf,
    notes: PathBuf,
}

/// Runs pgbench on an image and notes the writes.
fn record(bench: &Bench<'_>) -> Result<NotedRun> {
    use std::os::unix::fs::PermissionsExt;
    // User postgres has to get to its files.
    for folder in bench.dir.ancestors().take(2) {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).context("open the folder")?;
    }
    let image = sparse(bench.dir.join("pgbench.img"), bench.args.size)?;
    let run = NotedRun { before: bench.dir.join("source.img"), notes: bench.dir.join("notes") };
    let recorder = Arc::new(Recorder::default());
    let backing = open_backing(&image, BackingOptions::default()).context("open the image")?;
    let device = Tee { device: FilterVolume::unprotected_backing(backing), recorder: Arc::clone(&recorder) };
    let socket = bench.dir.join("pgbench.sock");
    let listen = Listen::Unix { path: socket.clone(), mode: 0o600 };
    let server = Server::start(ServerConfig::new("", listen), Arc::new(device)).context("serve the image")?;
    let mut disk = Attached::new(&socket, &bench.dir.join("disk"))?;
    run_within(Command::new(find("mkfs.ext4", "e2fsprogs")?).args(["-q", "-F", disk.device()?]), LIMIT)?.ok()?;
    let place = bench.dir.join("mount");
    disk.mount(&place)?;
    let mut cluster =
        Cluster::new(folder_of_postgres(&place.join("data"))?, folder_of_postgres(&bench.dir.join("postgres"))?);
    cluster.create()?;
    cluster.start()?;
    cluster.run("pgbench", &["-i", "-q", "-s", SCALE])?.ok()?;
    cluster.sql("checkpoint")?;
    call("sync", ["-f", text(&place)?])?;
    recorder.start(&run.notes)?;
    // What is written while it is copied is noted as well, so the copy and the notes together are whole.
    call("cp", ["--sparse=always", text(&image)?, text(&run.before)?])?;
    let time = bench.args.seconds.to_string();
    let limit = Duration::from_secs(bench.args.seconds) + DATABASE_LIMIT;
    run_within(cluster.program("pgbench")?.args(["-n", "-c", "4", "-j", "1", "-T", &time]), limit)?.ok()?;
    recorder.stop()?;
    cluster.stop()?;
    disk.detach()?;
    drop(server);
    std::fs::remove_file(&image).context("remove the image")?;
    Ok(run)
}

/// Counts bytes.
#[derive(Default)]
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes written, and what zstd makes of them.
fn compress(notes: &Path) -> Result<(u64, u64)> {
    let mut encoder = zstd::Encoder::new(Count::default(), LEVEL).context("start zstd")?;
    let mut written = 0;
    read_notes(notes, |noted| {
        written += noted.content.len() as u64;
        encoder.write_all(&noted.content).context("compress")
    })?;
    ensure!(written > 0, "pgbench wrote nothing");
    Ok((written, encoder.finish().context("compress")?.0))
}

/// Writes what was noted, in order, no earlier than it came.
fn repeat(notes: &Path, socket: &Path) -> Result<()> {
    let mut client = Client::connect_unix(socket, &Options::default()).context("connect to the protected volume")?;
    let begin = Instant::now();
    read_notes(notes, |noted| {
        let Noted { what, at, offset, len, content } = noted;
        if let Some(early) = at.checked_sub(begin.elapsed()) {
            crate::sites::pause(early);
        }
        match what {
            What::Write => client.write(offset, &content, false),
            What::Zeroes => client.zeroes(offset, len, 0),
            What::Discard => client.trim(offset, len, false),
            What::Flush => client.flush(),
        }
        .with_context(|| format!("repeat {what:?} of {len} bytes at {offset}"))
    })?;
    client.disconnect().context("leave the volume")
}
