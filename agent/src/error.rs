use std::path::{Path, PathBuf};

/// What went wrong in the agent, with the thing and the reason. [`Error::exit_code`] tells the command line which exit code
/// fits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Error {
    /// A file operation.
    #[error("{action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A configuration file that does not parse.
    #[error("configuration {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    /// A setting outside its range.
    #[error("setting {key}: {reason}")]
    Setting { key: &'static str, reason: String },
    /// A group, volume or file that does not exist.
    #[error("{what} {name:?}: not found{hint}")]
    NotFound { what: &'static str, name: String, hint: &'static str },
    /// Refused, so that no data is put at risk.
    #[error("{what}: {reason}")]
    Refused { what: String, reason: String, hint: String },
    /// The operation did not succeed; nothing was lost.
    #[error("{what}: {reason}")]
    Failed { what: String, reason: String },
    /// A damaged file of the state directory.
    #[error("state file {}: {reason}", path.display())]
    State { path: PathBuf, reason: String },
    /// Bad names, formats.
    #[error(transparent)]
    Proto(#[from] farshore_proto::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn failed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Failed { what: what.into(), reason: reason.to_string() }
    }

    /// Exit code of the command line: 1 failed, 2 usage, 3 not found, 4 refused for safety.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. } | Self::Setting { .. } | Self::Proto(_) => 2,
            Self::NotFound { .. } => 3,
            Self::Refused { .. } => 4,
            Self::Io { .. } | Self::Failed { .. } | Self::State { .. } => 1,
        }
    }

    /// The way out, where there is one to name.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Refused { hint, .. } => Some(hint.as_str()).filter(|hint| !hint.is_empty()),
            Self::Io { .. }
            | Self::Config { .. }
            | Self::Setting { .. }
            | Self::NotFound { .. }
            | Self::Failed { .. }
            | Self::State { .. }
            | Self::Proto(_) => None,
        }
    }
}

/// An error with its causes, each after a colon.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let part = inner.to_string();
        if !text.ends_with(&part) {
            text = format!("{text}: {part}");
        }
        cause = inner.source();
    }
    text
}
