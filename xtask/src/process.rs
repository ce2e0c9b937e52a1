//! Runs a command: output goes through as it comes, each line is also handed to the caller, and nothing runs for ever.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest time of one command. A build from nothing takes about 10 minutes on two cores; what takes longer than this
/// hangs, and a hanging gate tells nobody why.
const COMMAND_MAX: Duration = Duration::from_secs(25 * 60);

/// Lines in flight between the readers and the printer; full means the command waits for the terminal.
const LINES_MAX: usize = 1024;

enum Output {
    Stdout(String),
    Stderr(String),
}

/// Runs `command` to its end and calls `each_line` with every line of its output, streams mixed as they came.
///
/// # Errors
/// If the command cannot be started, or was killed because it ran longer than [`COMMAND_MAX`].
pub(crate) fn stream(command: &mut Command, mut each_line: impl FnMut(&str)) -> Result<ExitStatus> {
    println!("$ {}", show(command));
    if io::stdout().is_terminal() && std::env::var_os("CARGO_TERM_COLOR").is_none() {
        // cargo sees a pipe; the person behind it still has a terminal.
        command.env("CARGO_TERM_COLOR", "always");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", show(command)))?;
    let (sender, receiver) = sync_channel(LINES_MAX);
    let stdout = child.stdout.take().context("take the command's stdout")?;
    let stderr = child.stderr.take().context("take the command's stderr")?;
    let out_sender = sender.clone();
    let readers = [
        thread::spawn(move || forward(stdout, &out_sender, Output::Stdout)),
        thread::spawn(move || forward(stderr, &sender, Output::Stderr)),
    ];
    let deadline = Instant::now() + COMMAND_MAX;
    let mut in_time = true;
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Output::Stdout(line)) => {
                print!("{line}");
                each_line(&line);
            }
            Ok(Output::Stderr(line)) => {
                eprint!("{line}");
                each_line(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                in_time = false;
                kill_tree(child.id());
                break;
            }
        }
    }
    // Ends a reader that waits on a full channel; one that waits on a pipe ends with the last process that holds it.
    drop(receiver);
    let status = child.wait().context("wait for the command")?;
    if !in_time {
        bail!("{} ran longer than {} minutes and was killed", show(command), COMMAND_MAX.as_secs() / 60);
    }
    for reader in readers {
        reader.join().expect("a reader only copies lines and does not panic");
    }
    Ok(status)
}

/// Runs `command` silently and returns its standard output.
///
/// # Errors
/// If it cannot be started or fails; the error holds what it wrote to standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {}", show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", show(command), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("read the output of {}", show(command)))
}

/// The command as a person would type it, without its environment.
pub(crate) fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

fn forward(from: impl Read, to: &SyncSender<Output>, wrap: fn(String) -> Output) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        match from.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if to.send(wrap(String::from_utf8_lossy(&line).into_owned())).is_err() {
                    return;
                }
            }
        }
    }
}

/// Kills a process and all that descend from it. Test binaries are grandchildren: killing cargo alone leaves them.
fn kill_tree(root: u32) {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        if let Some(parent) = parent_in_stat(&stat) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut doomed = vec![root];
    let mut next = 0;
    while next < doomed.len() {
        doomed.extend(children.remove(&doomed[next]).unwrap_or_default());
        next += 1;
    }
    for pid in doomed {
        if let Ok(pid) = i32::try_from(pid) {
            // A process that is gone already is what was wanted.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Parent in a line of `/proc/PID/stat`; the command's name before it is in parentheses and may hold anything.
fn parent_in_stat(stat: &str) -> Option<u32> {
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_arrive_and_the_status_is_the_commands() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; printf three; exit 7"]);
        let status = stream(&mut command, |line| lines.push(line.trim().to_owned())).expect("sh runs");
        assert_eq!(status.code(), Some(7));
        lines.sort();
        assert_eq!(lines, ["one", "three", "two"]);
    }

    #[test]
    fn the_parent_is_found_behind_any_command_name() {
        assert_eq!(parent_in_stat("12 (cat) S 7 12 12 0"), Some(7));
        assert_eq!(parent_in_stat("12 (a) b (c) S 9 12 12 0"), Some(9));
        assert_eq!(parent_in_stat("nonsense"), None);
    }

    #[test]
    fn a_killed_tree_takes_the_grandchildren_along() {
        // The shell stays the parent of `sleep`, which holds the pipe: reading to its end proves that it died too.
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000 & echo started; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh starts");
        let mut out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut line = String::new();
        out.read_line(&mut line).expect("the shell says that it started");
        kill_tree(child.id());
        line.clear();
        assert_eq!(out.read_to_string(&mut line).expect("the pipe ends"), 0);
        assert!(!child.wait().expect("the shell is gone").success());
    }
}
