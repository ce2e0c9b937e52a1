//! The one error of this crate.

use std::fmt;
use std::io;
use std::path::Path;

use farshore_proto::BatchNo;
use farshore_uring::Trouble;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// The disk is full: nothing was half done; try again when there is space.
    NoSpace,
    /// The system lends no more files or memory at the moment: nothing was half done; try again.
    NoResources,
    /// The disk failed, or failed to make data durable: stop using what it was writing.
    Storage,
    /// Stored bytes are not what was written. Points that need them cannot be had.
    Damaged,
    /// The request names what does not exist.
    NotFound,
    /// Refused for safety; the text says what to do.
    Refused,
    /// The data belongs to somebody else, or to another version.
    Foreign,
    /// Bytes of a peer or an operator that make no sense.
    Invalid,
}

impl Kind {
    /// What a disk's trouble means for whoever wrote to it. (That a file is not there is no trouble of a disk: [`Error::io`] says so.) An
    /// error in making data durable is [`Kind::Storage`], whatever its number: the bytes may be gone, and waiting does not bring them
    /// back.
    #[must_use]
    pub const fn of(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Full => Self::NoSpace,
            Trouble::Short | Trouble::Again => Self::NoResources,
            Trouble::ReadOnly | Trouble::Gone | Trouble::Failed | Trouble::Unsupported | Trouble::Misused => {
                Self::Storage
            }
        }
    }
}

/// Something that this crate could not do.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a deeper cause. `context` says what, why, and the way out.
    #[must_use]
    pub fn new(kind: Kind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// With the error that caused it.
    #[must_use]
    pub fn caused(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// From a failed disk call: `verb` (as in "append to") and the path.
    #[must_use]
    pub fn io(verb: &str, path: &Path, error: io::Error) -> Self {
        let missing = error.kind() == io::ErrorKind::NotFound;
        let kind = if missing { Kind::NotFound } else { Kind::of(Trouble::of(&error)) };
        Self { kind, context: format!("{verb} {}: {error}", path.display()), source: Some(Box::new(error)) }
    }

    /// Stored bytes of a file are not what was written.
    #[must_use]
    pub fn damaged(path: &Path, offset: u64, reason: impl fmt::Display) -> Self {
        Self::new(Kind::Damaged, format!("{} at byte {offset}: {reason}", path.display()))
    }

    /// A batch whose bytes are damaged.
    #[must_use]
    pub fn damaged_batch(batch: BatchNo, reason: impl fmt::Display) -> Self {
        Self::new(Kind::Damaged, format!("batch {batch}: {reason}"))
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What went wrong, without the causes below.
    #[must_use]
    pub fn context(&self) -> &str {
        &self.context
    }

    /// Whether trying the same again later may succeed, and nothing is lost until then.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self.kind, Kind::NoSpace | Kind::NoResources)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| {
            let source: &(dyn std::error::Error + 'static) = &**source;
            source
        })
    }
}

/// Adds the verb and the path to the errors of disk calls.
pub trait IoContext<T> {
    /// As [`Error::io`].
    ///
    /// # Errors
    /// The same error with its context.
    fn at(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|error| Error::io(verb, path, error))
    }
}
