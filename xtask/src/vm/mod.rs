//! A virtual machine with a Debian kernel, for what no container has: ublk, device mapper, power cuts.
//!
//! QEMU emulates the processor, so nothing is asked of the host but root's right to read its own files. The machine sees the
//! host's file system read-only below a layer in memory: every program of the host runs inside as it is, at its usual path.

mod initramfs;
mod kernel;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::kernel::Kernel;
use crate::outside::{self, Program};
use crate::workspace::Workspace;

/// What the machine itself needs; a suite adds what its tests call.
pub(crate) const NEEDS: [Program; 5] =
    [outside::QEMU_X86, outside::BUSYBOX, outside::MODPROBE, outside::CPIO, outside::XZ];

/// A disk of the machine, made anew for each run.
#[derive(Clone, Copy, Debug)]
struct Disk {
    name: &'static str,
    bytes: u64,
    logical_block: u32,
}

/// `/dev/vda` with 512-byte and `/dev/vdb` with 4096-byte blocks; `/dev/vdc` has room for what benchmarks write.
const DISKS: [Disk; 3] = [
    Disk { name: "vda", bytes: 2 << 30, logical_block: 512 },
    Disk { name: "vdb", bytes: 2 << 30, logical_block: 4096 },
    Disk { name: "vdc", bytes: 32 << 30, logical_block: 512 },
];

/// Memory of a machine for which nobody asked for more, MiB.
const MEMORY_DEFAULT: u32 = 4096;

/// Time until a machine without a limit of its own is stopped.
const LIMIT_DEFAULT: Duration = Duration::from_secs(8 * 60);

/// The machine ends by itself when its time is over; one that cannot is killed after this. Boot is in here, too.
const GRACE: Duration = Duration::from_secs(45);

/// What to run in a machine.
#[derive(Debug)]
pub(crate) struct Job {
    /// Text for `sh`; `None`: a shell for a person, on this terminal.
    pub(crate) command: Option<String>,
    /// Variables for it. Values are quoted.
    pub(crate) environment: Vec<(String, String)>,
    /// Copied to where `$VM_PROGRAMS` names. The machine reads a program from this host's disk as it goes: one that is built anew
    /// meanwhile would change under it.
    pub(crate) programs: Vec<PathBuf>,
    /// Longest time of the command; then the machine is switched off.
    pub(crate) limit: Duration,
    /// Memory of the machine, MiB. This host gives what the machine touches.
    pub(crate) memory: u32,
}

impl Job {
    /// `command` within the usual time.
    pub(crate) fn new(command: impl Into<String>) -> Self {
        Self { command: Some(command.into()), limit: LIMIT_DEFAULT, ..Self::shell() }
    }

    /// A shell for a person, for as long as that person likes.
    pub(crate) fn shell() -> Self {
        Self {
            command: None,
            environment: Vec::new(),
            programs: Vec::new(),
            limit: Duration::from_secs(24 * 60 * 60),
            memory: MEMORY_DEFAULT,
        }
    }
}

/// How a job ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit code of the command.
    pub(crate) code: i32,
    /// The kernel's messages.
    pub(crate) kernel_log: String,
}

/// Boots a machine, runs the job, and hands each line of its output to `each_line` after printing it.
///
/// # Errors
/// If the machine cannot be made, ends without a result (a kernel panic), or runs past its limit.
pub(crate) fn run(workspace: &Workspace, job: &Job, mut each_line: impl FnMut(&str)) -> Result<Ended> {
    ensure!(cfg!(target_arch = "x86_64"), "the kernel that the machine boots is for x86-64, and so must this host be");
    outside::provide(NEEDS.into_iter())?;
    let store = workspace.target_directory.join("vm");
    let kernel = Kernel::provide(&store)?;
    let run = RunFolder::new(&store)?;
    prepare(&run, workspace, &kernel, job)?;
    let mut qemu = qemu(&run, &kernel, job.memory)?;
    println!("vm: Linux {} under QEMU, at most {} s", kernel.release, job.limit.as_secs());
    let started = Instant::now();
    if job.command.is_none() {
        let mut child = Guard(qemu.spawn().context("start QEMU")?);
        child.0.wait().context("wait for QEMU")?;
    } else {
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
        follow(Guard(child.context("start QEMU")?), started + job.limit + GRACE, &mut each_line)?;
    }
    let code = fs::read_to_string(run.share().join("exit")).ok().and_then(|text| text.trim().parse().ok());
    let kernel_log = fs::read(run.share().join("dmesg")).unwrap_or_default();
    let Some(code) = code else {
        println!("{}", String::from_utf8_lossy(&kernel_log));
        bail!("the machine ended without a result: past its time, or its kernel panicked (see the output)");
    };
    println!("vm: exit code {code} after {:.1} s", started.elapsed().as_secs_f64());
    Ok(Ended { code, kernel_log: String::from_utf8_lossy(&kernel_log).into_owned() })
}

/// The files of one run, removed at its end.
struct RunFolder(PathBuf);

impl RunFolder {
    fn new(store: &Path) -> Result<Self> {
        let folder = store.join(format!("run-{}", std::process::id()));
        // Of an earlier process with our number.
        let _ = fs::remove_dir_all(&folder);
        let run = Self(folder);
        for folder in [run.share(), run.programs()] {
            fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        }
        Ok(run)
    }

    fn share(&self) -> PathBuf {
        self.0.join("share")
    }

    fn initramfs(&self) -> PathBuf {
        self.0.join("initramfs.cpio")
    }

    /// Below the host's files, which the machine keeps in memory, unlike those of the share.
    fn programs(&self) -> PathBuf {
        self.0.join("programs")
    }

    fn disk(&self, disk: &Disk) -> PathBuf {
        self.0.join(format!("{}.img", disk.name))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("vm: cannot remove {}: {error}", self.0.display());
        }
    }
}

/// QEMU never outlives the runner's interest in it.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Fails where it has ended, which is what was wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn prepare(run: &RunFolder, workspace: &Workspace, kernel: &Kernel, job: &Job) -> Result<()> {
    initramfs::build(kernel, &run.0, &run.initramfs())?;
    for disk in &DISKS {
        let file = File::create(run.disk(disk)).context("make a disk image")?;
        file.set_len(disk.bytes).context("size a disk image")?;
    }
    for program in &job.programs {
        let copy = run.programs().join(program.file_name().context("a program has a name")?);
        fs::copy(program, &copy).with_context(|| format!("copy {}", program.display()))?;
    }
    let mut environment = format!(
        "export VM_MODULES={} VM_FOLDER={} VM_PROGRAMS={} VM_SECONDS={} FARSHORE_VM={}\n",
        quoted(&kernel.modules().display().to_string()),
        quoted(&workspace.root.display().to_string()),
        quoted(&run.programs().display().to_string()),
        job.limit.as_secs(),
        initramfs::SHARE,
    );
    for (name, value) in &job.environment {
        environment.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    fs::write(run.share().join("environment"), environment).context("write the machine's environment")?;
    match &job.command {
        Some(command) => fs::write(run.share().join("command"), command).context("write the machine's command"),
        None => fs::write(run.share().join("interactive"), "").context("ask for a shell"),
    }
}

/// `text` as one word of a shell.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn qemu(run: &RunFolder, kernel: &Kernel, memory: u32) -> Result<Command> {
    let program = outside::QEMU_X86.find().context("qemu-system-x86_64 is missing (Debian: qemu-system-x86)")?;
    let mut command = Command::new(program);
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m"]).arg(memory.to_string());
    command.args(["-nographic", "-no-reboot", "-nic", "none"]);
    command.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(run.initramfs());
    // Only what ends the kernel shows on the console; the rest is in its log.
    command.args(["-append", "console=ttyS0 quiet loglevel=2 panic=-1 mitigations=off"]);
    let share = run.share();
    let share = share.to_str().filter(|s| !s.contains(',')).context("the build folder's path is plain text")?;
    command.args(["-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"]);
    command.arg("-virtfs").arg(format!("local,path={share},mount_tag=share,security_model=none"));
    for disk in &DISKS {
        let file = run.disk(disk);
        let file = file.to_str().context("the build folder's path is plain text")?;
        let Disk { name, logical_block, .. } = disk;
        command.arg("-drive").arg(format!("file={file},format=raw,if=none,id={name},cache=unsafe,discard=unmap"));
        command.arg("-device").arg(format!(
            "virtio-blk-pci,drive={name},serial={name},logical_block_size={logical_block},physical_block_size=4096"
        ));
    }
    Ok(command)
}

/// Passes the machine's output on until it ends or its time is over.
fn follow(mut qemu: Guard, deadline: Instant, each_line: &mut impl FnMut(&str)) -> Result<()> {
    let mut output = BufReader::new(qemu.0.stdout.take().context("take QEMU's output")?);
    // Lines in flight; full means that the machine waits for the terminal.
    let (sender, receiver) = sync_channel(1024);
    let reader = thread::spawn(move || {
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let colours = std::io::stdout().is_terminal();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // The firmware clears the screen.
                let line = if colours { line } else { without_escapes(&line) };
                println!("{line}");
                each_line(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                drop(qemu);
                bail!("the machine ran past its time and was killed");
            }
        }
    }
    reader.join().expect("a reader only copies lines and does not panic");
    qemu.0.wait().context("wait for QEMU")?;
    Ok(())
}

/// A line without terminal control sequences.
fn without_escapes(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '\u{1b}' {
            out.push(c);
            continue;
        }
        if chars.next_if_eq(&'[').is_some() {
            while chars.next_if(|c| !c.is_ascii_alphabetic()).is_some() {}
        }
        chars.next();
    }
    out
}

/// What a kernel says when something is wrong inside it. Lines with these words in a log make a run a failure.
pub(crate) fn complaints(kernel_log: &str) -> Vec<&str> {
    const WORDS: [&str; 8] = [
        "BUG:",
        "WARNING:",
        "Oops",
        "kernel panic",
        "blocked for more than",
        "soft lockup",
        "rcu_preempt detected stalls",
        "general protection fault",
    ];
    kernel_log.lines().filter(|line| WORDS.iter().any(|word| line.contains(word))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_word_stays_one_word() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    #[test]
    fn control_sequences_go_and_text_stays() {
        assert_eq!(without_escapes("\u{1b}[2J\u{1b}[1;31mred\u{1b}[0m text"), "red text");
        assert_eq!(without_escapes("\u{1b}cplain"), "plain");
    }

    #[test]
    fn the_kernels_complaints_are_found() {
        let log =
            "[1.0] fine\n[2.0] WARNING: CPU: 0 PID: 1 at x\n[3.0] INFO: task x blocked for more than 120 seconds.";
        assert_eq!(complaints(log).len(), 2);
        assert!(complaints("[1.0] loop: module loaded").is_empty());
    }
}
