//! The peers of sync: nbdcopy into a server over TLS, and rsync over ssh. Both on loopback, with keys made for the run.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::mirror::{free_port, image_node};
use super::peers::Peer;
use crate::sites::run::{Running, find, is_root, run_within, text, until};

/// Longest that a copy may take.
const COPY_LIMIT: Duration = Duration::from_secs(3600);
const USER: &str = "farshore";

/// QEMU's storage daemon over an image, with direct I/O, reached over TLS.
pub(super) struct NbdcopyTarget {
    _server: Peer,
    nbdcopy: PathBuf,
    uri: String,
}

impl NbdcopyTarget {
    /// Serves `image`; keys and sockets go to `dir`, which must not exist.
    pub(super) fn start(dir: &Path, image: &Path) -> Result<Self> {
        let nbdcopy = find("nbdcopy", "libnbd-bin")?;
        let server = find("qemu-storage-daemon", "qemu-system-common")?;
        std::fs::create_dir(dir).context("make a folder for the peer")?;
        // A key of both sides spares certificates; after the handshake TLS is the same.
        let mut key = [0; 32];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").context("open /dev/urandom")?, &mut key)
            .context("make a key")?;
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        write_private(&dir.join("keys.psk"), &format!("{USER}:{key}\n"))?;
        let port = free_port()?;
        let control = dir.join("server.qmp");
        let mut command = Command::new(server);
        command.args(["--object", &format!("tls-creds-psk,id=tls0,endpoint=server,dir={}", text(dir)?)]);
        command.args(["--blockdev", &image_node(image)]);
        let listen = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},tls-creds=tls0");
        command.args(["--nbd-server", &listen]);
        command.args(["--export", "nbd,id=export0,node-name=disk0,writable=on,name=disk"]);
        command.args(["--chardev", &format!("socket,id=qmp0,path={},server=on,wait=off", text(&control)?)]);
        command.args(["--monitor", "chardev=qmp0"]);
        let server = Peer::start(command, &control)?;
        await_port(port)?;
        let keys = dir.join("keys.psk");
        let uri = format!("nbds://{USER}@127.0.0.1:{port}/disk?tls-psk-file={}", text(&keys)?);
        Ok(Self { _server: server, nbdcopy, uri })
    }

    /// Copies `source` there; `zero`: the destination is, which spares nbdcopy the zeroes. Returns when all of it is flushed.
    pub(super) fn copy(&self, source: &Path, zero: bool) -> Result<Duration> {
        let mut command = Command::new(&self.nbdcopy);
        command.arg("--flush");
        if zero {
            command.arg("--destination-is-zero");
        }
        timed(command.arg(source).arg(&self.uri))
    }
}

/// An ssh server of our own, and rsync through it.
pub(super) struct Rsync {
    _server: Running,
    rsync: PathBuf,
    shell: String,
}

impl Rsync {
    /// Starts the server; keys go to `dir`, which must not exist.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let rsync = find("rsync", "rsync")?;
        let server = find("sshd", "openssh-server")?;
        let client = find("ssh", "openssh-client")?;
        let keygen = find("ssh-keygen", "openssh-client")?;
        // An argument of rsync's is taken apart at blanks.
        ensure!(!text(dir)?.contains(char::is_whitespace), "no blanks in the folder's path: {}", dir.display());
        std::fs::DirBuilder::new().mode(0o700).create(dir).context("make a folder for the peer")?;
        for name in ["host", "user"] {
            let mut command = Command::new(&keygen);
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(name));
            run_within(&mut command, COPY_LIMIT)?.ok()?;
        }
        std::fs::copy(dir.join("user.pub"), dir.join("authorized")).context("allow the key")?;
        let port = free_port()?;
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             PermitRootLogin prohibit-password\nLogLevel ERROR\n",
            text(dir)?
        );
        write_private(&dir.join("config"), &config)?;
        if is_root() {
            // The server's empty root directory, which Debian makes when its service starts.
            let mut folder = std::fs::DirBuilder::new();
            folder.recursive(true).mode(0o755).create("/run/sshd").context("make /run/sshd")?;
        }
        let mut command = Command::new(&server);
        let mut server = Running::start(command.args(["-D", "-e", "-f"]).arg(dir.join("config")))?;
        await_port(port)?;
        server.check()?;
        let shell = format!(
            "{} -F none -p {port} -i {1}/user -o IdentitiesOnly=yes -o BatchMode=yes -o StrictHostKeyChecking=accept-new \
             -o UserKnownHostsFile={1}/known",
            text(&client)?,
            text(dir)?
        );
        Ok(Self { _server: server, rsync, shell })
    }

    /// Makes `destination` equal to `source` by hashes, whatever their times say.
    pub(super) fn copy(&self, source: &Path, destination: &Path) -> Result<Duration> {
        let mut command = Command::new(&self.rsync);
        command.args(["--inplace", "--no-whole-file", "--ignore-times", "--rsh", &self.shell]);
        timed(command.arg(source).arg(format!("127.0.0.1:{}", text(destination)?)))
    }
}

fn timed(command: &mut Command) -> Result<Duration> {
    let begin = Instant::now();
    run_within(command, COPY_LIMIT)?.ok()?;
    Ok(begin.elapsed())
}

/// Without connecting: a server that speaks TLS or ssh complains of somebody who leaves at once.
fn await_port(port: u16) -> Result<()> {
    const LISTENS: &str = "0A";
    let address = format!("0100007F:{port:04X}");
    until("a peer listens", || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").context("list sockets")?;
        let mut fields = sockets.lines().map(|line| line.split_whitespace().skip(1));
        let listens = fields.any(|mut of| of.next() == Some(&*address) && of.nth(1) == Some(LISTENS));
        Ok(listens.then_some(()))
    })
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
        .with_context(|| format!("write {}", path.display()))
}
