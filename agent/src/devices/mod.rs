//! The host's block devices, and which of them can be protected.
//!
//! Before a source is opened this looks at what it stands on, what stands on it, what is mounted or swaps by way of it, and where
//! the agent's own files lie. An agent whose own writes would pass through itself, or a host whose memory would be paged out through
//! it, waits for itself. What the kernel would refuse anyway (a claimed device) is refused here too, with a name.
//!
//! | file | what it knows |
//! |---|---|
//! | `graph.rs` | what stands on what: partitions, device mapper, md, loops, zram, ublk |
//! | `mounts.rs` | mount tables, and the devices of a file system or a file, anonymous device numbers included |
//! | `check.rs` | the refusals |
//! | `users.rs` | which process has a device open |
//!
//! Not seen: what a server in user space stands on (FUSE, an NBD client of this host), and network file systems.

mod check;
mod graph;
mod mounts;
mod users;

use std::path::PathBuf;

pub(crate) use check::{Access, Host, busy, own_files};
pub(crate) use users::{opener, writer_of};

use nix::sys::stat::{major, minor};

/// Major and minor number.
type DeviceNo = (u64, u64);
/// Device that a file lies on, and its inode.
type FileNo = (DeviceNo, u64);

fn number(device: u64) -> DeviceNo {
    (major(device), minor(device))
}

/// A volume of this agent, as far as devices are concerned.
#[derive(Clone, Debug)]
pub(crate) struct Protected {
    /// `GROUP/VOLUME`.
    pub label: String,
    /// Its source.
    pub source: PathBuf,
    /// What its users have open, where it is interposed: the source, or the stub over it.
    pub upper: Option<PathBuf>,
    /// The N of its `/dev/ublkbN`, if it is served by one.
    pub ublk: Option<u32>,
}
