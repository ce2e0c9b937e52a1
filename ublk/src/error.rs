//! What can go wrong with a device as a whole. Trouble of one request is that request's error number.

use std::io;

/// What the caller can do about an [`Error`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This kernel has no ublk driver, or not loaded: load it, or serve the device another way (NBD).
    NoDriver,
    /// Not allowed: run as root (`CAP_SYS_ADMIN`), or allow io_uring.
    Permission,
    /// The number is taken, or the device is served, open or mounted: choose another, or end that use first.
    Busy,
    /// There is no such device.
    NotFound,
    /// The kernel, or the device as it was made, lacks the feature: go without it.
    Unsupported,
    /// The configuration or the geometry cannot be served: change it.
    Invalid,
    /// The kernel did not answer in time: something below hangs; look at it before trying again.
    TimedOut,
    /// The operating system refused: see the source.
    System,
}

/// An error of a device or its server.
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

    /// As `self`, with the kernel's words.
    pub(crate) fn because(mut self, source: io::Error) -> Self {
        self.source = Some(source);
        self
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
            (ErrorKind::NoDriver | ErrorKind::Unsupported, _) => io::ErrorKind::Unsupported,
            (ErrorKind::Permission, _) => io::ErrorKind::PermissionDenied,
            (ErrorKind::Busy, _) => io::ErrorKind::ResourceBusy,
            (ErrorKind::NotFound, _) => io::ErrorKind::NotFound,
            (ErrorKind::Invalid, _) => io::ErrorKind::InvalidInput,
            (ErrorKind::TimedOut, _) => io::ErrorKind::TimedOut,
            (ErrorKind::System, Some(source)) => source.kind(),
            (ErrorKind::System, None) => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
