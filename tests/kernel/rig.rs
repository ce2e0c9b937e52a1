//! The machine's tools, and servers as processes of their own.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use farshore_ublk::{Control, DataPath, ErrorKind};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Disk with blocks of 512 bytes.
pub(crate) const DISK_512: &str = "/dev/vda";
/// Disk with blocks of 4096 bytes.
pub(crate) const DISK_4096: &str = "/dev/vdb";

pub(crate) const DATA_PATHS: [DataPath; 2] = [DataPath::UserCopy, DataPath::BufferSwap];

/// Longest wait for anything: the machine is slow, a hang is longer.
const LIMIT: Duration = Duration::from_secs(60);

/// To be called first by every test. Loads the driver and removes what the test before has left.
pub(crate) fn machine() -> Result<Control> {
    ensure!(
        std::env::var_os("FARSHORE_VM").is_some(),
        "this is no test machine: kernel tests run with `cargo xtask test kernel`"
    );
    run("modprobe ublk_drv")?;
    let control = Control::open().context("open the ublk driver")?;
    for left in control.list()? {
        match control.delete_anyway(left.id()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context("remove what another test has left");
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(control)
}

/// A figure of a test, for whoever runs it with `--nocapture`.
#[allow(clippy::print_stdout, reason = "a figure for people")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

/// Runs a shell command; its output, both streams.
pub(crate) fn run(command: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", &format!("({command}) 2>&1")]).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "`{command}` failed ({}):\n{text}", output.status);
    Ok(text)
}

/// Runs a shell command that has to fail; its output.
pub(crate) fn run_failing(command: &str) -> Result<String> {
    match run(command) {
        Ok(text) => bail!("`{command}` worked:\n{text}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// `check` until it says yes.
pub(crate) fn until(what: &str, mut check: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !check() {
        ensure!(Instant::now() < deadline, "{what}: not within {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A value below `/sys/block/NAME/`.
pub(crate) fn attribute(device: &Path, name: &str) -> Result<String> {
    let disk = device.file_name().and_then(|n| n.to_str()).context("a device has a name")?;
    let path = format!("/sys/block/{disk}/{name}");
    Ok(std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?.trim().to_owned())
}

/// `len` bytes at `offset`, past the page cache of what was there before.
pub(crate) fn read_at(device: &Path, offset: u64, len: usize) -> Result<Vec<u8>> {
    run(&format!("blockdev --flushbufs {}", device.display()))?;
    let mut bytes = vec![0; len];
    let file = File::open(device).with_context(|| format!("open {}", device.display()))?;
    file.read_exact_at(&mut bytes, offset).with_context(|| format!("read {}", device.display()))?;
    Ok(bytes)
}

/// Writes through the page cache, and to the medium.
pub(crate) fn write_at(device: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = File::options().write(true).open(device).with_context(|| format!("open {}", device.display()))?;
    file.write_all_at(bytes, offset)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("write {}", device.display()))
}

/// What a server process serves, and how.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// `null:BYTES`, `file:PATH` (plain), or `filter:PATH` (through the filter, unprotected).
    pub(crate) backend: String,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) path: DataPath,
    pub(crate) read_only: bool,
    pub(crate) survives: bool,
    /// Take this device over instead of making one.
    pub(crate) recover: Option<u32>,
}

impl Spec {
    pub(crate) fn filter(disk: &str, path: DataPath) -> Self {
        Self {
            backend: format!("filter:{disk}"),
            queues: 2,
            depth: 64,
            path,
            read_only: false,
            survives: true,
            recover: None,
        }
    }

    pub(crate) fn to_text(&self) -> String {
        let path = if self.path == DataPath::UserCopy { "user-copy" } else { "buffer-swap" };
        let recover = self.recover.map_or("-".to_owned(), |id| id.to_string());
        let Self { backend, queues, depth, read_only, survives, .. } = self;
        format!("{backend} {queues} {depth} {path} {read_only} {survives} {recover}")
    }

    pub(crate) fn from_text(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let [backend, queues, depth, path, read_only, survives, recover] = words[..] else {
            bail!("not a spec: {text}")
        };
        Ok(Self {
            backend: backend.to_owned(),
            queues: queues.parse()?,
            depth: depth.parse()?,
            path: if path == "user-copy" { DataPath::UserCopy } else { DataPath::BufferSwap },
            read_only: read_only.parse()?,
            survives: survives.parse()?,
            recover: if recover == "-" { None } else { Some(recover.parse()?) },
        })
    }
}

/// A server process. Killed when dropped.
pub(crate) struct Served {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    pub(crate) device: PathBuf,
    spec: Spec,
}

impl Served {
    /// Starts the process and waits until its device is there.
    pub(crate) fn start(spec: &Spec) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["--exact", "child::serve", "--ignored", "--nocapture"]).env(super::child::SPEC, spec.to_text());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start a server process")?;
        let mut output = BufReader::new(child.stdout.take().context("take its output")?);
        let mut all = String::new();
        loop {
            let before = all.len();
            if output.read_line(&mut all).context("read a server's output")? == 0 {
                let _ = child.kill();
                bail!("the server process ended:\n{all}");
            }
            // libtest writes the test's name on the same line.
            if let Some((_, device)) = all[before..].trim().split_once("serving ") {
                let device = PathBuf::from(device);
                return Ok(Self { child, output, device, spec: spec.clone() });
            }
        }
    }

    pub(crate) fn id(&self) -> Result<u32> {
        let name = self.device.to_str().context("a plain path")?;
        name.trim_start_matches("/dev/ublkb").parse().context("a device's number")
    }

    /// `kill -9`; returns when the process is gone. What it served goes on waiting.
    pub(crate) fn kill(mut self) -> Result<Spec> {
        let id = self.id()?;
        self.child.kill().context("kill a server")?;
        self.child.wait().context("wait for a killed server")?;
        Ok(Spec { recover: Some(id), ..self.spec.clone() })
    }

    /// Asks it to stop its device, in use or not, and to end.
    pub(crate) fn stop(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).context("read a server's last words")?;
        let status = self.child.wait().context("wait for a server")?;
        ensure!(status.success(), "the server failed:\n{rest}");
        ensure!(!self.device.exists(), "{} is still there", self.device.display());
        Ok(())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id())
            && matches!(self.child.try_wait(), Ok(None))
        {
            // A test failed: the next one removes the device.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// A mounted file system, unmounted when dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(device: &Path) -> Result<Self> {
        Self::with(device, "")
    }

    /// With options of `mount`.
    pub(crate) fn with(device: &Path, options: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("make a mount point")?.keep();
        run(&format!("mount {options} {} {}", device.display(), folder.display()))?;
        Ok(Self(folder))
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.0
    }

    pub(crate) fn unmount(self) -> Result<()> {
        run(&format!("umount {}", self.0.display())).map(|_| ())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run(&format!("mountpoint -q {0} && umount {0}", self.0.display()));
    }
}

/// fio in the background.
pub(crate) struct Fio(Child);

/// A whole fio run over `device`; fails on any error of I/O or content.
pub(crate) fn fio(device: &Path, options: &str) -> Result<String> {
    Fio::start(device, options)?.finish()
}

impl Fio {
    pub(crate) fn start(device: &Path, options: &str) -> Result<Self> {
        let line = format!(
            "exec fio --name=job --filename={} --ioengine=io_uring --direct=1 --verify_fatal=1 {options} 2>&1",
            device.display()
        );
        let child = Command::new("sh").args(["-c", &line]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        Ok(Self(child.context("start fio")?))
    }

    pub(crate) fn is_running(&mut self) -> Result<bool> {
        Ok(self.0.try_wait().context("look after fio")?.is_none())
    }

    /// Its report; fails if it saw an error.
    pub(crate) fn finish(self) -> Result<String> {
        let output = self.0.wait_with_output().context("wait for fio")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "fio failed:\n{text}");
        let errors = text.lines().filter(|line| line.contains("err=") && !line.contains("err= 0")).count();
        ensure!(errors == 0, "fio saw errors:\n{text}");
        Ok(text)
    }

    /// What it says when it fails, which it has to.
    pub(crate) fn fail(self) -> Result<String> {
        let output = self.0.wait_with_output().context("wait for fio")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(!output.status.success(), "fio saw no error:\n{text}");
        Ok(text)
    }
}

/// Pseudo-random bytes that differ from sector to sector.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
