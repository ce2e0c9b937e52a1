//! The agent's configuration: TOML → parsed ([`AgentFile`]) → validated ([`AgentConfig`]). Every flag of `farshore agent
//! run` can stand in the file; a flag wins over the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_proto::Name;
use farshore_proto::text::{parse_duration, parse_size};
use farshore_streamer::DISK_LOG_MIN;
use serde::{Deserialize, Deserializer};

use crate::disk_log::DiskLogConfig;
use crate::{Error, Result};

/// Default of [`AgentConfig::ring_dir`].
pub const RING_DIR: &str = "/dev/shm/farshore";

/// What the file may say. Unknown keys are errors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFile {
    /// Identity bundle.
    pub identity: Option<PathBuf>,
    /// State directory.
    pub state: Option<PathBuf>,
    /// `HOST:PORT` of a target or relay.
    pub upstream: Option<String>,
    /// Bytes of each group's ring.
    #[serde(default, deserialize_with = "size")]
    pub ring: Option<u64>,
    /// Folder for ring files; a tmpfs.
    pub ring_dir: Option<PathBuf>,
    /// Admin socket.
    pub socket: Option<PathBuf>,
    /// QUIC connections per group.
    pub connections: Option<usize>,
    /// Threads that hash, compress and seal, per group.
    pub workers: Option<usize>,
    /// Open sources past the page cache where the file system can (default).
    pub direct: Option<bool>,
    /// Longest time without service before volumes are served without capture.
    #[serde(default, deserialize_with = "duration")]
    pub worker_gap_max: Option<Duration>,
    /// Longest time that a worker may leave requests alone.
    #[serde(default, deserialize_with = "duration")]
    pub worker_hang_max: Option<Duration>,
    /// File or block device of the activity log.
    pub activity_log: Option<PathBuf>,
    /// Extents of 4 MiB that may be active at once.
    pub al_extents: Option<u32>,
    /// File or block device of the disk log.
    pub log: Option<PathBuf>,
    /// Its bytes.
    #[serde(default, deserialize_with = "size")]
    pub log_size: Option<u64>,
    /// Policies by group name.
    #[serde(default)]
    pub group: BTreeMap<String, GroupFile>,
    /// Where this was read; none: there is no file.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

/// A group's table in the file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupFile {
    /// Shortest time between cuts.
    #[serde(default, deserialize_with = "duration")]
    pub cut_min: Option<Duration>,
    /// Longest time between cuts.
    #[serde(default, deserialize_with = "duration")]
    pub cut_max: Option<Duration>,
    /// Longest stall that our trouble may add to a request.
    #[serde(default, deserialize_with = "duration")]
    pub stall_max: Option<Duration>,
    /// `"batch"` or `"write"`.
    pub granularity: Option<String>,
    /// Bytes per second on the wire.
    #[serde(default, deserialize_with = "size")]
    pub bandwidth: Option<u64>,
    /// Bytes per second that sync may read.
    #[serde(default, deserialize_with = "size")]
    pub sync_rate: Option<u64>,
    /// Bytes per second at which volumes are verified; `"0"`: they are not.
    #[serde(default, deserialize_with = "size")]
    pub verify_rate: Option<u64>,
    /// Time from one pass's begin to the next.
    #[serde(default, deserialize_with = "duration")]
    pub verify_every: Option<Duration>,
    /// zstd level, or `"auto"` / `"none"`.
    pub compression: Option<String>,
}

fn size<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum SizeValue {
        Bytes(u64),
        Text(String),
    }
    match SizeValue::deserialize(deserializer)? {
        SizeValue::Bytes(bytes) => Ok(Some(bytes)),
        SizeValue::Text(text) => parse_size(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_duration(&text).map(Some).map_err(serde::de::Error::custom)
}

impl AgentFile {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or with the line and the key that is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::io("read configuration", path, source))?;
        let read: Self = toml::from_str(&text)
            .map_err(|error| Error::Config { path: path.to_owned(), reason: error.to_string() })?;
        Ok(Self { path: Some(path.to_owned()), ..read })
    }
}

/// The agent's settings, checked.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Identity bundle.
    pub identity: PathBuf,
    /// State directory. Durable: groups, volumes, incarnations, bitmaps.
    pub state: PathBuf,
    /// `HOST:PORT` of a target or relay.
    pub upstream: String,
    /// Bytes of each group's ring. Default 256 MiB or an eighth of the memory, whichever is less; from 8 MiB. A larger
    /// ring bridges a longer hiccup of the link before history becomes coarse, and costs that much locked memory.
    pub ring: u64,
    /// Folder for ring files, of the agent alone. Default [`RING_DIR`]: it must survive the process and should not survive the boot.
    pub ring_dir: PathBuf,
    /// Admin socket.
    pub socket: PathBuf,
    /// QUIC connections per group, 1 to 16, default 2: loss on one does not stop the other.
    pub connections: usize,
    /// Threads that hash, compress and seal, per group, 1 to 64. Default 1; each more costs about 24 MiB.
    pub workers: usize,
    /// Open sources past the page cache where the file system can. Default true: a guest's flush means the same as on the
    /// bare device, and memory is not spent twice.
    pub direct: bool,
    /// Longest time that block devices are served by nobody before the supervisor serves them without capture (I1). Default 5 s, 1 s to
    /// 10 min. Raising it lets guests wait longer for a worker, and saves the compare of everything that follows a pass-through.
    pub worker_gap_max: Duration,
    /// Longest time that a worker may end no request while some wait and no disk is at work. Then it is killed. Default 2 s, 500 ms to
    /// 10 min.
    pub worker_hang_max: Duration,
    /// File or block device of the activity log. Default: `activity.log` in the state directory. Never on a protected volume. A file is
    /// made if there is none; it takes 1 MiB, and more while much is marked (`docs/formats/activity-log.md`).
    pub activity_log: Option<PathBuf>,
    /// Extents of 4 MiB that may be active at once, over all volumes. Default 1024, 64 to 16,384. More: fewer writes that wait for the
    /// log, more to compare after a crash.
    pub al_extents: u32,
    /// The disk log. Default: none; where the link does not keep up and the ring is full, points pause until a resync has ended.
    pub disk_log: Option<DiskLogConfig>,
    /// Policies by group name; a group without an entry has [`GroupPolicy::default`].
    pub groups: BTreeMap<Name, GroupPolicy>,
    /// The configuration file, if there is one.
    pub file: Option<PathBuf>,
}

/// Source policies of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupPolicy {
    /// Shortest time between cuts. Default 20 ms, 1 ms to `cut_max`.
    pub cut_min: Duration,
    /// Longest time between cuts. Default 1 s, to 1 h.
    pub cut_max: Duration,
    /// Longest stall that our trouble may add to a request (I1). Default 50 ms, 1 ms to 5 s.
    pub stall_max: Duration,
    /// Every write is a point, nothing is coalesced.
    pub every_write: bool,
    /// Bytes per second on the wire; none: as fast as it goes.
    pub bandwidth: Option<u64>,
    /// Bytes per second that sync reads; none: as fast as it goes.
    pub sync_rate: Option<u64>,
    /// Bytes per second at which the source is compared with its replica all the time; none: only when a person asks. Default 1 MiB,
    /// 64 KiB or more: a volume of 100 GiB takes 28 hours. A pass holds the range of one slot while it reads that.
    pub verify_rate: Option<u64>,
    /// Time from one pass's begin to the next, or as long as the pass takes. Default 24 h, 1 min to a year.
    pub verify_every: Duration,
    /// How hard to compress.
    pub compression: CompressionPolicy,
}

/// How hard to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionPolicy {
    /// By what is scarce: link or CPU.
    Auto,
    /// Not at all.
    None,
    /// At this zstd level.
    Level(i32),
}

impl Default for GroupPolicy {
    fn default() -> Self {
        Self {
            cut_min: Duration::from_millis(20),
            cut_max: Duration::from_secs(1),
            stall_max: Duration::from_millis(50),
            every_write: false,
            bandwidth: None,
            sync_rate: None,
            verify_rate: Some(1 << 20),
            verify_every: Duration::from_secs(24 * 60 * 60),
            compression: CompressionPolicy::Auto,
        }
    }
}

/// Smallest ring: a few of the largest cells of every class and the reserve for markers.
const RING_MIN: u64 = 8 << 20;
const RING_DEFAULT: u64 = 256 << 20;

impl AgentConfig {
    /// Checks a file's content (flags merged into it by the caller) against `memory_bytes` of the host.
    ///
    /// # Errors
    /// Names the setting, its value and what is allowed.
    pub fn validate(file: AgentFile, memory_bytes: u64) -> Result<Self> {
        let missing = |what: &'static str| Error::Setting { key: what, reason: "is not given".into() };
        let ring_limit = memory_bytes / 8;
        let ring = file.ring.unwrap_or_else(|| RING_DEFAULT.min(ring_limit).max(RING_MIN));
        if ring < RING_MIN || ring > ring_limit.max(RING_MIN) {
            return Err(Error::Setting {
                key: "ring",
                reason: format!("{ring} bytes, allowed is {RING_MIN} to {ring_limit} (an eighth of the memory)"),
            });
        }
        let connections = in_range("connections", file.connections.unwrap_or(2), 1, 16)?;
        let workers = in_range("workers", file.workers.unwrap_or(1), 1, 64)?;
        let al_extents = file.al_extents.unwrap_or(1024);
        if !(64..=16_384).contains(&al_extents) {
            let reason = format!("{al_extents}, allowed is 64 to 16384");
            return Err(Error::Setting { key: "al_extents", reason });
        }
        let disk_log = match (file.log, file.log_size) {
            (None, Some(_)) => {
                return Err(Error::Setting {
                    key: "log_size",
                    reason: "says how large `log` is, which is not given".into(),
                });
            }
            (Some(_), Some(size)) if size < DISK_LOG_MIN => {
                let reason = format!("{size} bytes, allowed is {DISK_LOG_MIN} or more");
                return Err(Error::Setting { key: "log_size", reason });
            }
            (path, size) => path.map(|path| DiskLogConfig { path, size }),
        };
        let worker = |key, given: Option<Duration>, default: u64, least: u64| {
            let (default, least) = (Duration::from_millis(default), Duration::from_millis(least));
            in_range_of_time(key, given.unwrap_or(default), least, Duration::from_secs(600))
        };
        let worker_gap_max = worker("worker_gap_max", file.worker_gap_max, 5000, 1000)?;
        let worker_hang_max = worker("worker_hang_max", file.worker_hang_max, 2000, 500)?;
        let mut groups = BTreeMap::new();
        for (name, table) in file.group {
            groups.insert(Name::new(name)?, GroupPolicy::validate(&table)?);
        }
        let upstream = file.upstream.ok_or_else(|| missing("upstream"))?;
        if upstream.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            return Err(Error::Setting { key: "upstream", reason: format!("{upstream:?} is not HOST:PORT") });
        }
        Ok(Self {
            identity: file.identity.ok_or_else(|| missing("identity"))?,
            state: file.state.ok_or_else(|| missing("state"))?,
            upstream,
            ring,
            ring_dir: file.ring_dir.unwrap_or_else(|| PathBuf::from(RING_DIR)),
            socket: file.socket.unwrap_or_else(|| PathBuf::from("/run/farshore/agent.sock")),
            connections,
            workers,
            direct: file.direct.unwrap_or(true),
            worker_gap_max,
            worker_hang_max,
            activity_log: file.activity_log,
            al_extents,
            disk_log,
            groups,
            file: file.path,
        })
    }

    /// The policy of `group`.
    #[must_use]
    pub fn policy(&self, group: &Name) -> GroupPolicy {
        self.groups.get(group).cloned().unwrap_or_default()
    }
}

fn in_range(key: &'static str, value: usize, min: usize, max: usize) -> Result<usize> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(Error::Setting { key, reason: format!("{value}, allowed is {min} to {max}") })
    }
}

fn in_range_of_time(key: &'static str, value: Duration, min: Duration, max: Duration) -> Result<Duration> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(Error::Setting { key, reason: format!("{value:?}, allowed is {min:?} to {max:?}") })
    }
}

impl GroupPolicy {
    fn validate(table: &GroupFile) -> Result<Self> {
        let default = Self::default();
        let policy = Self {
            cut_min: table.cut_min.unwrap_or(default.cut_min),
            cut_max: table.cut_max.unwrap_or(default.cut_max),
            stall_max: table.stall_max.unwrap_or(default.stall_max),
            every_write: match table.granularity.as_deref() {
                None | Some("batch") => false,
                Some("write") => true,
                Some(other) => {
                    return Err(Error::Setting {
                        key: "granularity",
                        reason: format!("{other:?}, allowed is \"batch\" or \"write\""),
                    });
                }
            },
            bandwidth: table.bandwidth,
            sync_rate: table.sync_rate,
            verify_rate: table.verify_rate.map_or(default.verify_rate, |rate| (rate > 0).then_some(rate)),
            verify_every: table.verify_every.unwrap_or(default.verify_every),
            compression: compression(table.compression.as_deref())?,
        };
        let ms = Duration::from_millis;
        in_range_of_time("cut_max", policy.cut_max, ms(1), ms(3_600_000))?;
        in_range_of_time("cut_min", policy.cut_min, ms(1), policy.cut_max)?;
        in_range_of_time("stall_max", policy.stall_max, ms(1), ms(5000))?;
        in_range_of_time("verify_every", policy.verify_every, ms(60_000), ms(365 * 86_400_000))?;
        for (key, value) in
            [("bandwidth", policy.bandwidth), ("sync_rate", policy.sync_rate), ("verify_rate", policy.verify_rate)]
        {
            if value.is_some_and(|rate| rate < 64 << 10) {
                return Err(Error::Setting { key, reason: "is below 64 KiB per second".into() });
            }
        }
        Ok(policy)
    }
}

fn compression(text: Option<&str>) -> Result<CompressionPolicy> {
    match text {
        None | Some("auto") => Ok(CompressionPolicy::Auto),
        Some("none") => Ok(CompressionPolicy::None),
        Some(level) => match level.parse::<i32>() {
            Ok(level) if (-7..=19).contains(&level) => Ok(CompressionPolicy::Level(level)),
            _ => Err(Error::Setting {
                key: "compression",
                reason: format!("{level:?}, allowed is \"auto\", \"none\" or a zstd level from -7 to 19"),
            }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig> {
        let file: AgentFile = toml::from_str(text)
            .map_err(|error| Error::Config { path: PathBuf::from("test"), reason: error.to_string() })?;
        AgentConfig::validate(file, 16 << 30)
    }

    const BASE: &str = "identity = 'a'\nstate = 'b'\nupstream = 'h:1'\n";

    #[test]
    fn defaults_and_overrides() {
        let config =
            parse(&format!("{BASE}ring = '64MiB'\n[group.db]\ncut_max = '5s'\ncompression = '3'")).expect("valid");
        assert_eq!(config.ring, 64 << 20);
        let policy = config.policy(&Name::new("db").expect("name"));
        assert_eq!(policy.cut_max, Duration::from_secs(5));
        assert_eq!(policy.compression, CompressionPolicy::Level(3));
        assert_eq!(config.policy(&Name::new("other").expect("name")), GroupPolicy::default());
        let off = parse(&format!("{BASE}[group.db]\nverify_rate = 0")).expect("valid");
        assert_eq!(off.policy(&Name::new("db").expect("name")).verify_rate, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("ringg = 1", "ringg"),
            ("ring = '1MiB'", "ring"),
            ("ring = '4GiB'", "ring"),
            ("log = '/l'\nlog_size = '1MiB'", "log_size"),
            ("log_size = '1GiB'", "log_size"),
            ("connections = 0", "connections"),
            ("worker_gap_max = '500ms'", "worker_gap_max"),
            ("[group.db]\ncut_min = '2s'", "cut_min"),
            ("[group.db]\ncut_mni = '2s'", "cut_mni"),
            ("[group.db]\nverify_rate = 1000", "verify_rate"),
            ("[group.db]\nverify_every = '1s'", "verify_every"),
            ("[group.db]\ngranularity = 'day'", "granularity"),
            ("[group.'a/b']\n", "a/b"),
            ("[group.db]\ncompression = '99'", "compression"),
        ] {
            let error = parse(&format!("{BASE}{text}")).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let error = parse("identity = 'a'\nstate = 'b'\nupstream = 'nowhere'").expect_err("upstream").to_string();
        assert!(error.contains("nowhere"), "{error}");
    }
}
