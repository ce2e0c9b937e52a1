//! The peer for replication: QEMU's storage daemon mirroring a disk to a second daemon over loopback TCP.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::fio::{Fio, FioTarget, sparse};
use super::peers::Peer;

/// Two daemons and the job between them.
pub(super) struct Mirror {
    source: Peer,
    _target: Peer,
    control: Control,
    export: PathBuf,
    size: u64,
}

/// A QMP connection.
struct Control {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Control {
    fn open(socket: &Path) -> Result<Self> {
        let writer = UnixStream::connect(socket).context("connect to QMP")?;
        writer.set_read_timeout(Some(Duration::from_secs(60))).context("limit QMP")?;
        let mut control = Self { reader: BufReader::new(writer.try_clone().context("share QMP")?), writer };
        control.read()?;
        control.call("qmp_capabilities", &json!({}))?;
        Ok(control)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line).context("read from QMP")?;
        serde_json::from_str(&line).context("parse QMP")
    }

    fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}").context("write to QMP")?;
        loop {
            let answer = self.read()?;
            if !answer["error"].is_null() {
                bail!("{command}: {}", answer["error"]);
            }
            if !answer["return"].is_null() {
                return Ok(answer["return"].clone());
            }
        }
    }
}

impl Mirror {
    /// Starts both daemons over fresh sparse images of `size` bytes in `dir` and waits until the mirror is in step.
    pub(super) fn start(dir: &Path, size: u64, granularity: Option<u64>) -> Result<Self> {
        std::fs::create_dir(dir).context("make a folder for the mirror")?;
        let port = free_port()?;
        let back = sparse(dir.join("mirror-target.img"), size)?;
        let front = sparse(dir.join("mirror-source.img"), size)?;
        let target_socket = dir.join("target.qmp");
        let mut command = daemon(&target_socket, &back);
        command.args(["--nbd-server", &format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}")]);
        command.args(["--export", "nbd,id=export0,node-name=disk0,writable=on,name=disk"]);
        let target = Peer::start(command, &target_socket)?;
        let source_socket = dir.join("source.qmp");
        let export = dir.join("source.nbd");
        let mut command = daemon(&source_socket, &front);
        command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", export.display())]);
        command.args(["--export", "nbd,id=export0,node-name=disk0,name=,writable=on"]);
        let source = Peer::start(command, &source_socket)?;
        let mut control = Control::open(&source_socket)?;
        control.call(
            "blockdev-add",
            &json!({
                "driver": "nbd", "node-name": "remote0", "export": "disk",
                "server": { "type": "inet", "host": "127.0.0.1", "port": port.to_string() },
            }),
        )?;
        let mut job = json!({ "job-id": "mirror0", "device": "disk0", "target": "remote0", "sync": "full" });
        if let Some(granularity) = granularity {
            job["granularity"] = json!(granularity);
        }
        control.call("blockdev-mirror", &job)?;
        let mut mirror = Self { source, _target: target, control, export, size };
        mirror.wait()?;
        Ok(mirror)
    }

    /// Waits until nothing is left to copy.
    fn wait(&mut self) -> Result<()> {
        loop {
            let jobs = self.control.call("query-block-jobs", &json!({}))?;
            let job = &jobs[0];
            if job["ready"] == true && job["offset"] == job["len"] && job["busy"] == false {
                return Ok(());
            }
            if job.is_null() {
                bail!("the mirror job ended");
            }
            crate::sites::pause(Duration::from_millis(10));
        }
    }

    /// Writes `bytes` and gives the replicated rate: bytes / time until the mirror is in step, in bytes per second.
    pub(super) fn replicated_rate(&mut self, rw: &str, block: u64, depth: u32, bytes: u64) -> Result<f64> {
        let fio = Fio {
            target: FioTarget::Nbd(&self.export),
            rw,
            block,
            depth,
            size: self.size,
            amount: Some(bytes),
            seconds: None,
            compressible: 50,
            rate: None,
            jobs: 1,
        };
        let written = fio.run()?;
        self.wait()?;
        let total = written.elapsed + written.end.elapsed();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        Ok(written.bytes as f64 / total.as_secs_f64())
    }

    /// Process of the source's daemon.
    pub(super) fn pid(&self) -> u32 {
        self.source.pid()
    }
}

fn daemon(control: &Path, image: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--chardev", &format!("socket,id=qmp0,path={},server=on,wait=off", control.display())]);
    command.args(["--monitor", "chardev=qmp0"]);
    command.args(["--blockdev", &image_node(image)]);
    command
}

/// An image as QEMU's daemon opens it: with direct I/O.
pub(super) fn image_node(image: &Path) -> String {
    format!("driver=file,node-name=disk0,filename={},cache.direct=on,aio=io_uring,discard=unmap", image.display())
}

pub(super) fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr().context("read the port")?.port())
}
