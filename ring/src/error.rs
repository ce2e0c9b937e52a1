//! Why a ring could not be made, opened or used.

use std::io;
use std::path::PathBuf;

/// Why a ring could not be made, opened or extended. Nothing in here ever concerns a guest request: those meet only
/// [`crate::Full`] and [`crate::Closed`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened, sized or mapped. The way out depends on `source`; a missing file is a lost ring.
    #[error("cannot {action} ring file {path}")]
    Io {
        /// Verb and object.
        action: &'static str,
        /// The ring's file, or `<memory>`.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process has the ring open. Stop it first; two agents on one ring would corrupt it.
    #[error("ring file {path} is in use by another process; stop that one first")]
    InUse {
        /// The ring's file.
        path: PathBuf,
    },
    /// Not a ring, or one whose creation did not finish.
    #[error("not a ring: wrong magic bytes; create a new ring and compare everything")]
    WrongMagic,
    /// Written by a newer program. Start that one, or create a new ring and compare everything.
    #[error("ring has layout version {found}, this program knows up to {known}")]
    NewerVersion {
        /// In the file.
        found: u32,
        /// Newest that this program reads.
        known: u32,
    },
    /// The static header's checksum is wrong; nothing in the file can be trusted.
    #[error("checksum of the ring's static header is {found:#010x}, should be {expected:#010x}")]
    HeaderChecksum {
        /// In the file.
        found: u32,
        /// Computed over the header.
        expected: u32,
    },
    /// The machine was started anew since: a ring lives in memory and never survives that honestly.
    #[error("ring belongs to another boot of this machine")]
    OtherBoot,
    /// The ring belongs to something else.
    #[error("ring belongs to another {field}")]
    OtherIdentity {
        /// `vault`, `group`, `host` or `generation`.
        field: &'static str,
    },
    /// It is this boot's ring of the same group, in another life of it.
    #[error("ring is of incarnation {found}, not {expected}")]
    OtherIncarnation {
        /// In the file.
        found: u64,
        /// What the caller takes for the last one. If it is below `found`, what the caller remembers is old.
        expected: u64,
    },
    /// The sizes in the header contradict one another.
    #[error("ring's header says {found} bytes, its geometry needs {expected}")]
    SizeMismatch {
        /// Total in the header, bytes.
        found: u64,
        /// Computed from the counts, bytes.
        expected: u64,
    },
    /// The file is shorter than its header says.
    #[error("ring file has {found} bytes, its header says {expected}")]
    Truncated {
        /// Length of the file, bytes.
        found: u64,
        /// At least this many bytes.
        expected: u64,
    },
    /// The live part contradicts itself.
    #[error("ring is corrupt: {what} ({value:#x})")]
    Corrupt {
        /// What is impossible.
        what: &'static str,
        /// The value that shows it.
        value: u64,
    },
    /// The sizes asked for are out of range.
    #[error("ring cannot be made: {what}")]
    Config {
        /// Which limit, and what would be right.
        what: &'static str,
    },
    /// The volume's index or capacity does not fit the volume table.
    #[error("volume {volume}: {what}")]
    Volume {
        /// Index asked for.
        volume: u16,
        /// Reason.
        what: &'static str,
    },
}

impl Error {
    /// Whether the captured content is gone for good: the caller makes a new ring (with a higher incarnation) and, where the durable
    /// in-use flag was set, compares everything. `false`: the cause can be removed and the open tried again.
    #[must_use]
    pub fn ring_is_lost(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::InUse { .. } | Self::NewerVersion { .. } | Self::Config { .. } | Self::Volume { .. } => false,
            Self::WrongMagic
            | Self::HeaderChecksum { .. }
            | Self::OtherBoot
            | Self::OtherIdentity { .. }
            | Self::OtherIncarnation { .. }
            | Self::SizeMismatch { .. }
            | Self::Truncated { .. }
            | Self::Corrupt { .. } => true,
        }
    }
}
