use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use farshore_proto::Role;

/// What went wrong with an identity or a link. [`Error::hint`] says what to do about it, where there is something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the vault or a bundle cannot be read or written.
    #[error("{path}: cannot {action}")]
    File {
        /// Which file or folder.
        path: PathBuf,
        /// The step that failed, as a verb.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The place already holds a vault.
    #[error("{path}: a vault is already there")]
    Exists {
        /// The vault's document.
        path: PathBuf,
    },
    /// A file with secret keys that others may read or change.
    #[error("{path}: mode {mode:04o} lets other users at the keys in it")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A document or certificate that does not say what it should.
    #[error("{what}: {reason}")]
    Malformed {
        /// The document, and its part.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate past its last day.
    #[error("the certificate of {who} expired on {date}")]
    Expired {
        /// Role and name.
        who: String,
        /// RFC 3339, UTC.
        date: String,
    },
    /// A certificate before its first day: a clock is wrong.
    #[error("the certificate of {who} is valid from {date} on, this machine's clock says {now}")]
    NotYetValid {
        /// Role and name.
        who: String,
        /// RFC 3339, UTC.
        date: String,
        /// RFC 3339, UTC.
        now: String,
    },
    /// The identity's role cannot do what was asked.
    #[error("an identity of role {role} cannot {what}")]
    WrongRole {
        /// The identity's role.
        role: Role,
        /// What was asked.
        what: &'static str,
    },
    /// Making or using a key or certificate failed.
    #[error("{what}: {reason}")]
    Crypto {
        /// The step.
        what: &'static str,
        /// The library's reason.
        reason: String,
    },
    /// A setting outside its range.
    #[error("setting {field}: {reason}")]
    Setting {
        /// Name of the field.
        field: &'static str,
        /// Range and value.
        reason: String,
    },
    /// The local socket cannot be made.
    #[error("cannot listen on or send from udp {address}")]
    Socket {
        /// Local address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// A thread or its runtime cannot be started.
    #[error("cannot start a link thread")]
    Thread(#[source] io::Error),
    /// The session is over (or never was); wait for the next `Up`.
    #[error("session {session} is over")]
    Closed {
        /// As given by the caller.
        session: u64,
    },
    /// A queue is at its limit; try again after the next event of this session.
    #[error("session {session}: {queue} is full ({limit} bytes)")]
    Full {
        /// As given by the caller.
        session: u64,
        /// Which queue.
        queue: &'static str,
        /// Its limit in bytes.
        limit: u64,
    },
    /// A message or batch beyond what the other end takes, or an empty batch; no retry will help.
    #[error("session {session}: {what} of {len} bytes, allowed are 1 to {limit}")]
    Length {
        /// As given by the caller.
        session: u64,
        /// Message or batch.
        what: &'static str,
        /// Its length in bytes.
        len: u64,
        /// The limit in bytes.
        limit: u64,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The way out, for the `hint:` line of the command line.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Exists { .. } => {
                Some("give another folder, or issue identities from the vault that is there".to_owned())
            }
            Self::Exposed { path, .. } => Some(format!("chmod 600 {}", path.display())),
            Self::Expired { .. } => Some("issue a new bundle with `farshore vault issue` and install it".to_owned()),
            Self::NotYetValid { .. } => Some("correct this machine's clock".to_owned()),
            Self::WrongRole { .. } => {
                Some("issue a bundle of the right role with `farshore vault issue --role …`".to_owned())
            }
            Self::File { .. }
            | Self::Malformed { .. }
            | Self::Crypto { .. }
            | Self::Setting { .. }
            | Self::Socket { .. }
            | Self::Thread(_)
            | Self::Closed { .. }
            | Self::Full { .. }
            | Self::Length { .. } => None,
        }
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn crypto(what: &'static str, reason: impl ToString) -> Self {
        Self::Crypto { what, reason: reason.to_string() }
    }
}
