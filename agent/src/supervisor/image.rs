//! The program of the workers, kept in memory: starting one must not need the disk that it is to serve.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::roster;
use crate::{Error, Result, clock};

/// `linux/memfd.h`, Linux 6.3: the file may be executed, whatever the system's default is.
const MFD_EXEC: u32 = 0x10;

/// Longest time that a program may take to say what it is.
const CHECK_MAX: Duration = Duration::from_secs(20);

/// What a program says of itself (`farshore agent check`): what it must share with the one before it to go on where that was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// For people.
    pub version: String,
    /// Layout of the ring in shared memory.
    pub ring_layout: u32,
    /// Format of the list of devices that are served. Absent: 1.
    #[serde(default = "first")]
    pub roster_format: u32,
}

fn first() -> u32 {
    1
}

impl Abilities {
    /// Of this program.
    #[must_use]
    pub fn own() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ring_layout: farshore_ring::LAYOUT_VERSION,
            roster_format: roster::FORMAT,
        }
    }
}

/// A program.
#[derive(Debug)]
pub(crate) struct Image {
    /// Keeps what `path` names.
    _file: Option<File>,
    path: PathBuf,
}

impl Image {
    /// This program.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn own() -> Result<Self> {
        Self::of(Path::new("/proc/self/exe"))
    }

    /// The program in `path`, copied into memory. Where the system forbids executing from there, `path` itself.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let named = |error| Error::io("read the program", path, error);
        let mut from = File::open(path).map_err(named)?;
        match in_memory(&mut from) {
            Ok(file) => {
                // Of this process; its children look at it before they become the program.
                let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                Ok(Self { _file: Some(file), path })
            }
            Err(error) => {
                tracing::warn!(%error, "the program cannot be kept in memory: workers are started from disk");
                Ok(Self { _file: None, path: std::fs::canonicalize(path).map_err(named)? })
            }
        }
    }

    /// What to execute.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Asks the program what it is and whether it can work with these arguments. Changes nothing.
    ///
    /// # Errors
    /// It does not run here, or says what is wrong.
    pub(crate) fn check(&self, arguments: &[std::ffi::OsString]) -> Result<Abilities> {
        let failed = |reason: String| Error::failed("new program", reason);
        let mut child = Command::new(&self.path)
            .args(["agent", "check"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("does not start: {error}")))?;
        let deadline = clock::now().plus(CHECK_MAX);
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if clock::now() < deadline => std::thread::park_timeout(Duration::from_millis(5)),
                Ok(None) | Err(_) => {
                    // Fails only if it has ended meanwhile.
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(failed(format!("does not say what it is within {} s", CHECK_MAX.as_secs())));
                }
            }
        };
        let text = |from: Option<&mut dyn Read>| {
            let mut text = String::new();
            // An answer that is no text is none.
            from.map(|from| from.take(64 << 10).read_to_string(&mut text));
            text
        };
        let said = text(child.stdout.as_mut().map(|out| out as &mut dyn Read));
        let complaint = text(child.stderr.as_mut().map(|out| out as &mut dyn Read));
        if !status.success() {
            return Err(failed(format!("cannot take over ({status}): {}", complaint.trim())));
        }
        serde_json::from_str(said.trim()).map_err(|error| failed(format!("is no agent that can take over: {error}")))
    }
}

fn in_memory(from: &mut File) -> io::Result<File> {
    let make = |flags| memfd_create("farshore", flags);
    // Older kernels do not know the second flag, and need none.
    let executable = MFdFlags::MFD_CLOEXEC | MFdFlags::from_bits_retain(MFD_EXEC);
    let memory = make(executable).or_else(|_| make(MFdFlags::MFD_CLOEXEC))?;
    let mut memory = File::from(memory);
    io::copy(from, &mut memory)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(text: &str) -> (tempfile::TempDir, PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("program");
        std::fs::write(&path, text).expect("room");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("ours");
        (folder, path)
    }

    /// Goal: a program that cannot take over is refused with its own words. Method: scripts, which stand for programs.
    #[test]
    fn what_cannot_take_over_is_refused() {
        for (script, part) in [
            ("#!/bin/sh\necho 'error: identity: expired' >&2\nexit 1\n", "identity: expired"),
            ("#!/bin/sh\necho farshore 9\n", "no agent that can take over"),
            ("#!/no/such/interpreter\n", "does not start"),
        ] {
            let (_folder, path) = program(script);
            // A script in memory has no name that its interpreter could open.
            let image = Image { _file: None, path };
            let error = image.check(&[]).expect_err(script).to_string();
            assert!(error.contains(part), "{error}");
        }
        let (_folder, path) = program("#!/bin/sh\necho '{\"version\":\"9\",\"ring_layout\":7}'\n");
        let abilities = Image { _file: None, path }.check(&[]).expect("good");
        assert_eq!(abilities, Abilities { version: "9".into(), ring_layout: 7, roster_format: 1 });
        assert!(Image::of(Path::new("/no/such/program")).is_err());
    }

    /// Goal: a program runs from memory after its file is gone.
    #[test]
    fn a_program_in_memory_needs_no_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("true");
        std::fs::copy("/bin/true", &path).expect("a program that every system has");
        let image = Image::of(&path).expect("readable");
        std::fs::remove_file(&path).expect("ours");
        assert!(Command::new(image.path()).status().expect("it runs").success());
    }
}
