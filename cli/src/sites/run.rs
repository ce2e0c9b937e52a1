//! Programs: run to their end within a limit, or kept running until dropped.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::pause;

/// Longest that anything is waited for. Only a hang gets there: a busy machine needs a small part of it.
pub const LIMIT: Duration = Duration::from_secs(120);

/// How a program ended.
#[derive(Debug)]
pub struct Ran {
    /// The command, for messages.
    command: String,
    /// Exit code; none: killed by a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// Its standard output, if it ended with 0.
    ///
    /// # Errors
    /// How it ended and what it printed.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == Some(0), "{self}");
        Ok(self.out)
    }

    /// Its standard output as one JSON document, if it ended with 0.
    ///
    /// # Errors
    /// How it ended and what it printed.
    pub fn json(self) -> Result<Value> {
        let command = self.command.clone();
        let out = self.ok()?;
        serde_json::from_str(&out).with_context(|| format!("{command} printed no JSON document: {out}"))
    }

    /// Checks that it failed as `docs` promise: this code, `error: …` that names `part`, and a hint if there must be one.
    ///
    /// # Errors
    /// What of it is not so.
    pub fn refused(&self, code: i32, part: &str, hint: bool) -> Result<()> {
        ensure!(self.code == Some(code), "exit code {code} was expected: {self}");
        let line = self.err.lines().find(|line| line.starts_with("error: "));
        let line = line.with_context(|| format!("no line `error: …`: {self}"))?;
        ensure!(line.matches(": ").count() >= 2, "not `error: what: why`: {self}");
        ensure!(self.err.contains(part), "the message does not name {part:?}: {self}");
        ensure!(!hint || self.err.lines().any(|line| line.starts_with("hint: ")), "no line `hint: …`: {self}");
        Ok(())
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {:?}\nstdout: {}\nstderr: {}", self.command, self.code, self.out, self.err)
    }
}

fn drain(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before an error is what there is to show.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a program to its end. One that takes longer than `limit` is killed, and that is an error.
///
/// # Errors
/// It cannot be started, or does not end in time.
pub fn run_within(command: &mut Command, limit: Duration) -> Result<Ran> {
    let shown = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {shown}"))?;
    let (out, err) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("look at {shown}"))? {
            break Some(status);
        }
        if begin.elapsed() > limit {
            // Fails only if it ended just now.
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        pause(Duration::from_millis(3));
    };
    let text = |thread: JoinHandle<String>| thread.join().unwrap_or_default();
    match status {
        Some(status) => Ok(Ran { command: shown, code: status.code(), out: text(out), err: text(err) }),
        None => bail!("{shown} did not end within {limit:?}\nstdout: {}\nstderr: {}", text(out), text(err)),
    }
}

/// As [`run_within`] the usual limit.
///
/// # Errors
/// As that.
pub fn run(command: &mut Command) -> Result<Ran> {
    run_within(command, LIMIT)
}

/// Runs a program whose success is all that matters; gives what it printed.
///
/// # Errors
/// It cannot be started, or fails.
pub fn call<'a>(program: impl AsRef<Path>, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
    run(Command::new(program.as_ref()).args(args))?.ok()
}

/// A program that runs until this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = format!("{command:?}");
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, name })
    }

    /// Looks whether it still runs.
    ///
    /// # Errors
    /// It ended already.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("look at a program")? {
            None => Ok(()),
            Some(status) => bail!("{} ended early: {status}", self.name),
        }
    }

    /// Waits for its end by itself.
    ///
    /// # Errors
    /// It goes on.
    pub fn ended(&mut self) -> Result<()> {
        until(&self.name.clone(), || Ok(self.child.try_wait().context("look at a program")?.map(drop)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again until there is an answer. An error ends it.
///
/// # Errors
/// That of `look`, or no answer within [`LIMIT`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = look()? {
            return Ok(answer);
        }
        ensure!(begin.elapsed() < LIMIT, "waited {LIMIT:?} in vain: {what}");
        pause(Duration::from_millis(10));
    }
}

/// Where a program is: on `PATH`, or where Debian keeps what only root or PostgreSQL uses.
///
/// # Errors
/// It is nowhere; names `package`.
pub fn find(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let postgres = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .chain(postgres.map(|version| version.path().join("bin")))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
        .with_context(|| format!("{name} is missing (Debian package {package})"))
}

/// Whether this process is root.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// A path as an argument.
///
/// # Errors
/// It is not UTF-8.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
