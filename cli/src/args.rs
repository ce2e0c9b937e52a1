//! The command line: names and flags only. What each command does lies in the module of its name.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use farshore_proto::text::parse_size;

/// Continuous data protection and disaster recovery for Linux block devices.
#[derive(Debug, Parser)]
#[command(name = "farshore", version, propagate_version = true, max_term_width = 110)]
pub(crate) struct Cli {
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Both sites on loopback: protect a volume, run real writes, break things, recover, check every byte.
    #[command(after_help = "Example:\n  farshore demo --size 256MiB --seconds 20")]
    Demo(DemoArgs),
    /// Make a vault and issue identities.
    #[command(subcommand)]
    Vault(VaultCommand),
    /// The daemon on a protected host.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// The daemon of the second site.
    #[command(subcommand)]
    Target(TargetCommand),

    /// Protect a block device or image file (agent).
    #[command(
        after_help = "Example:\n  farshore protect /srv/db.img --group db --frontend nbd+unix:/run/farshore/db.sock\n  farshore protect /dev/sdb --group db --frontend ublk\n  farshore protect /dev/vg0/data --group db --dm"
    )]
    Protect {
        /// Block device or image file.
        source: PathBuf,
        /// Volumes of one group share recovery points.
        #[arg(long)]
        group: String,
        /// Name of the volume in the group; default: the source's file name.
        #[arg(long)]
        name: Option<String>,
        /// How the guest reaches the volume: nbd+unix:PATH, nbd+tcp:ADDR, ublk (a block device of this host; needs root) or
        /// ublk:N (as /dev/ublkbN).
        #[arg(long)]
        frontend: Option<String>,
        /// Put it below a device-mapper device (LVM, dm-crypt) while that is in use: users keep the device that they have. Of a
        /// bare disk that nobody uses a device-mapper device is made, to be mounted from then on.
        #[arg(long)]
        dm: bool,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// End the protection of a volume; its history at the target stays (agent).
    #[command(after_help = "Example:\n  farshore unprotect db")]
    Unprotect {
        /// Volume, as GROUP/VOLUME or just its name where that is unique.
        volume: String,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// List protected volumes (agent).
    #[command(after_help = "Example:\n  farshore volumes --json")]
    Volumes {
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Show how protection stands (agent).
    #[command(after_help = "Example:\n  farshore status db --watch")]
    Status {
        /// Only this group.
        group: Option<String>,
        /// Print again every second.
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Name a recovery point; returns when it is durable at the target (agent).
    #[command(after_help = "Example:\n  farshore bookmark db before-upgrade")]
    Bookmark {
        /// Group.
        group: String,
        /// Name of the point.
        name: String,
        /// Give up after so many seconds.
        #[arg(long, default_value_t = 60.0)]
        timeout: f64,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Wait until all that was written so far is a recovery point at the target (agent).
    #[command(after_help = "Example:\n  farshore wait db --timeout 30")]
    Wait {
        /// Group.
        group: String,
        /// Give up after so many seconds.
        #[arg(long)]
        timeout: Option<f64>,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Compare a whole volume with its replica and send what differs (agent).
    #[command(after_help = "Example:\n  farshore resync db")]
    Resync {
        /// Volume.
        volume: String,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Compare a group's volumes with their replicas, byte for byte, while they are in use (agent). Exit 1 if they differ.
    #[command(after_help = "Example:\n  farshore verify db")]
    Verify {
        /// Group.
        group: String,
        /// Make the replica like the source where they differ, and verify once more. Older points keep what the replica was.
        #[arg(long)]
        repair: bool,
        /// Seconds after which to stop waiting; the pass goes on.
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// List what needs attention (agent, or target with --target).
    #[command(after_help = "Example:\n  farshore alarms")]
    Alarms {
        /// Ask the target instead of the agent.
        #[arg(long)]
        target: bool,
        /// Admin socket of that daemon.
        #[arg(long)]
        socket: Option<PathBuf>,
    },
    /// Look at this host: what the kernel can do, what is installed, what a crash has left behind; and how to mend it.
    #[command(
        after_help = "Exit code: 0 no problem, 1 a problem, 4 something was left alone that an agent serves or may come back to.\n\n\
                      Example:\n  farshore doctor\n  farshore doctor --repair"
    )]
    Doctor(DoctorArgs),
    /// Install units for systemd, its generator and udev rules.
    #[command(
        after_help = "Example:\n  farshore install-units\n  farshore install-units --root /mnt/image --binary /usr/bin/farshore"
    )]
    InstallUnits(InstallUnits),
    /// Run by systemd at boot: makes what is mounted over a protected volume wait for the agent.
    #[command(hide = true, after_help = "Example:\n  farshore system-generator /run/systemd/generator /tmp /tmp")]
    SystemGenerator(SystemGenerator),

    /// List the groups that the target keeps (target).
    #[command(after_help = "Example:\n  farshore groups --json")]
    Groups {
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Say which hosts may write a group (target).
    #[command(subcommand)]
    Group(GroupCommand),
    /// Put the base (replica) of a volume on a block device (target).
    #[command(subcommand)]
    Base(BaseCommand),
    /// List recovery points (target).
    #[command(after_help = "Example:\n  farshore points db --from 2026-01-31T08:00:00Z")]
    Points {
        /// Group.
        group: String,
        /// Not before this RFC 3339 time.
        #[arg(long)]
        from: Option<String>,
        /// Not after this RFC 3339 time.
        #[arg(long)]
        to: Option<String>,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Keep a point from retention (target).
    #[command(subcommand)]
    Hold(HoldCommand),
    /// Open recovery points as block devices (target).
    #[command(subcommand)]
    View(ViewCommand),
    /// Copy a recovery point out (target).
    #[command(after_help = "Example:\n  farshore restore db/data --at latest --out /srv/restored.img")]
    Restore {
        /// GROUP/VOLUME.
        volume: String,
        /// latest, bookmark:NAME, a point id, or an RFC 3339 time.
        #[arg(long)]
        at: String,
        /// File (made new) or block device (overwritten).
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// How long history is kept (target).
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Look into journal files.
    #[command(subcommand)]
    Journal(JournalCommand),
    /// Look into an agent's activity log or disk log.
    #[command(subcommand)]
    Log(LogCommand),
    /// Measure the published figures.
    #[command(
        after_help = "Example:\n  farshore bench list\n  farshore bench guest --seconds 60 --dir /mnt/scratch\n  farshore bench sync --size 4GiB --rounds 5 --dir /mnt/scratch"
    )]
    Bench(crate::bench::BenchArgs),
}

/// Where the agent's daemon listens.
#[derive(Debug, Args)]
pub(crate) struct AgentSocket {
    /// Admin socket of the agent.
    #[arg(long = "socket", env = "FARSHORE_AGENT_SOCKET", default_value = "/run/farshore/agent.sock")]
    pub agent: PathBuf,
}

/// Where the target's daemon listens.
#[derive(Debug, Args)]
pub(crate) struct TargetSocket {
    /// Admin socket of the target.
    #[arg(long = "socket", env = "FARSHORE_TARGET_SOCKET", default_value = "/run/farshore/target.sock")]
    pub target: PathBuf,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Work here instead of in a temporary folder.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Size of the protected volume.
    #[arg(long, default_value = "256MiB", value_parser = parse_size)]
    pub size: u64,
    /// How long to write.
    #[arg(long, default_value_t = 20)]
    pub seconds: u64,
    /// Keep the folder.
    #[arg(long)]
    pub keep: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Mend what is safe: load modules, take apart what a crashed attach left, remove ublk devices without disk and server.
    #[arg(long)]
    pub repair: bool,
    /// Give up on an agent that will not come back: devices that wait for it get their original tables, and the next agent
    /// compares everything. Not while an agent answers.
    #[arg(long, requires = "repair")]
    pub abandon: bool,
    /// Configuration file of the agent.
    #[arg(long, default_value = "/etc/farshore/agent.toml")]
    pub config: PathBuf,
    /// State directory of the agent; default: as the configuration says, else /var/lib/farshore/agent.
    #[arg(long)]
    pub state: Option<PathBuf>,
    #[command(flatten)]
    pub socket: AgentSocket,
}

/// Arguments of `install-units`.
#[derive(Debug, Args)]
pub(crate) struct InstallUnits {
    /// Root of the system to install into.
    #[arg(long, default_value = "/")]
    pub root: PathBuf,
    /// Path of the program on that system; default: this one.
    #[arg(long)]
    pub binary: Option<PathBuf>,
}

/// Arguments of a generator, see systemd.generator(7).
#[derive(Debug, Args)]
pub(crate) struct SystemGenerator {
    /// Folder for units of normal priority.
    pub normal: PathBuf,
    /// Folder for units that override the administrator's.
    pub early: PathBuf,
    /// Folder for units that everything else overrides.
    pub late: PathBuf,
    /// Root of the system that is looked at.
    #[arg(long, default_value = "/")]
    pub root: PathBuf,
}

/// `vault …`
#[derive(Debug, Subcommand)]
pub(crate) enum VaultCommand {
    /// Make a new vault: certificate authority and data key.
    #[command(after_help = "Example:\n  farshore vault init /srv/vault --name acme")]
    Init {
        /// Folder; must not hold a vault yet.
        dir: PathBuf,
        /// Name of the vault.
        #[arg(long, default_value = "vault")]
        name: String,
    },
    /// Issue an identity bundle.
    #[command(after_help = "Example:\n  farshore vault issue /srv/vault --role agent --name db1 --out db1.bundle")]
    Issue {
        /// The vault's folder.
        dir: PathBuf,
        /// agent, relay, target, control or operator.
        #[arg(long)]
        role: String,
        /// Name of the host or person.
        #[arg(long)]
        name: String,
        /// File to write, readable by its owner only.
        #[arg(long)]
        out: PathBuf,
        /// Days until it expires.
        #[arg(long, default_value_t = 365)]
        days: u32,
    },
    /// Add a data key of the next epoch. Bundles issued from now on carry it; older ones keep working.
    #[command(after_help = "Example:\n  farshore vault rotate-key /srv/vault")]
    RotateKey {
        /// The vault's folder.
        dir: PathBuf,
    },
}

/// `agent …`
#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Run the daemon.
    #[command(
        after_help = "Example:\n  farshore agent run --identity db1.bundle --state /var/lib/farshore/agent --upstream dr.example:7400"
    )]
    Run(AgentRun),
    /// The process that the daemon starts for the work, and starts again when it dies.
    #[command(hide = true, after_help = "Started by `farshore agent run`, with the same flags.")]
    Worker(AgentRun),
    /// Say whether this program could run the daemon with these flags; changes nothing.
    #[command(hide = true, after_help = "Asked by `farshore agent upgrade`.")]
    Check(AgentRun),
    /// Let another binary go on with the same volumes: under load, without an error for their users and without a resync. A binary that
    /// does not come to serving is replaced by the old one.
    #[command(after_help = "Example:\n  farshore agent upgrade /usr/bin/farshore")]
    Upgrade {
        /// The binary.
        binary: PathBuf,
        #[command(flatten)]
        socket: AgentSocket,
    },
    /// Show the daemon's processes: how often the worker was started, how it ended last, and what is served without it.
    #[command(after_help = "Example:\n  farshore agent show --json")]
    Show {
        #[command(flatten)]
        socket: AgentSocket,
    },
}

/// Flags of `agent run`; each can stand in the configuration file.
#[derive(Debug, Clone, Args)]
pub(crate) struct AgentRun {
    /// Identity bundle.
    #[arg(long)]
    pub identity: Option<PathBuf>,
    /// State directory.
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// HOST:PORT of a target.
    #[arg(long)]
    pub upstream: Option<String>,
    /// Size of each group's ring.
    #[arg(long, value_parser = parse_size)]
    pub ring: Option<u64>,
    /// Folder for ring files (a tmpfs).
    #[arg(long)]
    pub ring_dir: Option<PathBuf>,
    /// File or block device of the activity log; never on a protected volume. Default: activity.log in the state directory.
    #[arg(long)]
    pub activity_log: Option<PathBuf>,
    /// File or block device of the disk log, which takes batches while the link does not keep up; never on a protected volume.
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// Its size. Default: 10GiB, or all of a device.
    #[arg(long, value_parser = parse_size)]
    pub log_size: Option<u64>,
    /// Admin socket.
    #[arg(long, env = "FARSHORE_AGENT_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Configuration file.
    #[arg(long)]
    pub config: Option<PathBuf>,
}

/// `target …`
#[derive(Debug, Subcommand)]
pub(crate) enum TargetCommand {
    /// Run the daemon.
    #[command(
        after_help = "Example:\n  farshore target run --identity dr.bundle --data /srv/farshore --listen 0.0.0.0:7400"
    )]
    Run(TargetRun),
    /// Let retention go on after the catalog was made again without its holds (alarm catalog.rebuilt). Put the holds back first:
    /// what retention takes then is gone.
    #[command(after_help = "Example:\n  farshore hold add db bookmark:audit\n  farshore target resume-retention")]
    ResumeRetention {
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// Flags of `target run`; each can stand in the configuration file.
#[derive(Debug, Args)]
pub(crate) struct TargetRun {
    /// Identity bundle.
    #[arg(long)]
    pub identity: Option<PathBuf>,
    /// Data directory.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Address to listen on (UDP).
    #[arg(long)]
    pub listen: Option<String>,
    /// Admin socket.
    #[arg(long, env = "FARSHORE_TARGET_SOCKET")]
    pub socket: Option<PathBuf>,
    /// Configuration file.
    #[arg(long)]
    pub config: Option<PathBuf>,
}

/// `group …`
#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// Let a host write a group.
    #[command(after_help = "Example:\n  farshore group add db db1")]
    Add {
        /// Group.
        group: String,
        /// Host.
        host: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// No longer let a host write a group; its history stays.
    #[command(after_help = "Example:\n  farshore group remove db db1")]
    Remove {
        /// Group.
        group: String,
        /// Host.
        host: String,
        /// Even if the host is connected now.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// `base …`
#[derive(Debug, Subcommand)]
pub(crate) enum BaseCommand {
    /// Give a device to a volume that no source has brought yet: makes ALL of the device zero, then keeps the volume's replica
    /// on it. For a volume that has its base on a device already: takes the same device under another identity, after
    /// comparing all of it.
    #[command(
        after_help = "Example:\n  farshore group add db db1\n  farshore base attach db/data /dev/disk/by-id/nvme-eui.0025385\n\nThe device must be at least as large as the volume, unmounted, and blank at both ends (or --overwrite)."
    )]
    Attach {
        /// GROUP/VOLUME.
        volume: String,
        /// Block device, by its whole path; one below /dev/disk/by-id keeps its name.
        device: PathBuf,
        /// All that is on the device may go.
        #[arg(long)]
        overwrite: bool,
        /// Host whose volume it is, in a group of several hosts.
        #[arg(long)]
        host: Option<String>,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Take a device back from a volume that no source has brought yet.
    #[command(after_help = "Example:\n  farshore base detach db/data")]
    Detach {
        /// GROUP/VOLUME.
        volume: String,
        /// Host whose volume it is, in a group of several hosts.
        #[arg(long)]
        host: Option<String>,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// List where the bases of a group's volumes are.
    #[command(after_help = "Example:\n  farshore base list db")]
    List {
        /// Group.
        group: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// `hold …`
#[derive(Debug, Subcommand)]
pub(crate) enum HoldCommand {
    /// Keep a point.
    #[command(after_help = "Example:\n  farshore hold add db bookmark:before-upgrade")]
    Add {
        /// Group.
        group: String,
        /// Point.
        point: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Let a point go.
    #[command(after_help = "Example:\n  farshore hold remove db bookmark:before-upgrade")]
    Remove {
        /// Group.
        group: String,
        /// Point.
        point: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// List holds.
    #[command(after_help = "Example:\n  farshore hold list db")]
    List {
        /// Group.
        group: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// `view …`
#[derive(Debug, Subcommand)]
pub(crate) enum ViewCommand {
    /// Open a point; prints one URI or device per volume.
    #[command(after_help = "Example:\n  farshore view open db --at latest --export nbd+unix:/run/farshore/views")]
    Open {
        /// Group.
        group: String,
        /// latest, bookmark:NAME, a point id, or an RFC 3339 time.
        #[arg(long)]
        at: String,
        /// nbd+unix:DIR (a socket per volume), nbd+tcp:ADDR, or ublk (a block device of this host per volume; needs root).
        #[arg(long)]
        export: Option<String>,
        /// Refuse writes.
        #[arg(long)]
        read_only: bool,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// List open views.
    #[command(after_help = "Example:\n  farshore view list")]
    List {
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Close a view and drop what was written to it.
    #[command(after_help = "Example:\n  farshore view close v1")]
    Close {
        /// The view's id.
        id: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// `policy …`
#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show a group's policy.
    #[command(after_help = "Example:\n  farshore policy show db")]
    Show {
        /// Group.
        group: String,
        #[command(flatten)]
        socket: TargetSocket,
    },
    /// Change a group's policy: keep=DURATION, size_limit=SIZE.
    #[command(after_help = "Example:\n  farshore policy set db keep=24h size_limit=200GiB")]
    Set {
        /// Group.
        group: String,
        /// KEY=VALUE pairs.
        #[arg(required = true)]
        settings: Vec<String>,
        #[command(flatten)]
        socket: TargetSocket,
    },
}

/// `journal …`
#[derive(Debug, Subcommand)]
pub(crate) enum JournalCommand {
    /// Print what a journal holds.
    #[command(
        after_help = "Example:\n  farshore journal dump /srv/farshore/vault/groups/db/db1/journal\n  farshore journal dump 00000001.seg --records --identity dr.bundle"
    )]
    Dump {
        /// Segment file or journal folder.
        path: PathBuf,
        /// Each record of each batch too, in the order of the stream.
        #[arg(long, requires = "identity")]
        records: bool,
        /// Identity bundle of a target, which opens the record lists.
        #[arg(long)]
        identity: Option<PathBuf>,
    },
    /// Check every byte of a journal.
    #[command(
        after_help = "Example:\n  farshore journal verify /srv/farshore/vault/groups/db/db1/journal --identity dr.bundle"
    )]
    Verify {
        /// Segment file or journal folder.
        path: PathBuf,
        /// Identity bundle of a target: also opens every record list and checks the chain.
        #[arg(long)]
        identity: Option<PathBuf>,
    },
}

/// `log …`
#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// Print what an activity log or a disk log holds.
    #[command(after_help = "Example:\n  farshore log dump /var/lib/farshore/activity.log")]
    Dump {
        /// File or block device.
        path: PathBuf,
    },
    /// Check every byte of an activity log or a disk log. While its agent runs, what is written meanwhile may seem damaged.
    #[command(after_help = "Example:\n  farshore log verify /dev/vg0/farshore-log")]
    Verify {
        /// File or block device.
        path: PathBuf,
    },
}
