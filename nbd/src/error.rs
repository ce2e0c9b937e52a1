//! What can go wrong with a server as a whole. Trouble of one connection ends that connection and is only logged.

use std::io;

/// What the caller can do about an [`Error`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The configuration or the device's geometry cannot be served: change it.
    Invalid,
    /// Another server answers at the address: choose another, or stop it.
    InUse,
    /// The operating system refused: see the source.
    System,
}

/// An error of a server.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    kind: ErrorKind,
    context: String,
    #[source]
    source: Option<io::Error>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    pub(crate) fn system(context: impl Into<String>, source: io::Error) -> Self {
        Self { kind: ErrorKind::System, context: context.into(), source: Some(source) }
    }

    /// What to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match (error.kind, &error.source) {
            (ErrorKind::Invalid, _) => io::ErrorKind::InvalidInput,
            (ErrorKind::InUse, _) => io::ErrorKind::AddrInUse,
            (ErrorKind::System, Some(source)) => source.kind(),
            (ErrorKind::System, None) => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
