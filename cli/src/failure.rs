//! What a command ends with when it does not succeed: one line, a hint, an exit code.

use std::fmt;

use serde_json::{Value, json};

/// An error with its exit code: 1 failed, 2 usage, 3 not found, 4 refused for safety.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The thing.
    pub what: String,
    /// The reason.
    pub why: String,
    /// The way out.
    pub hint: Option<String>,
    /// Exit code.
    pub code: u8,
}

impl Failure {
    /// It did not work.
    #[must_use]
    pub fn failed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into(), hint: None, code: 1 }
    }

    /// The command makes no sense as given.
    #[must_use]
    pub fn usage(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { code: 2, ..Self::failed(what, why) }
    }

    /// The thing does not exist.
    #[must_use]
    pub fn not_found(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { code: 3, ..Self::failed(what, why) }
    }

    /// Refused for safety.
    #[must_use]
    pub fn refused(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { code: 4, ..Self::failed(what, why) }
    }

    /// From the link's errors, with their hint.
    #[must_use]
    pub fn from_link(error: &farshore_link::Error) -> Self {
        let text = farshore_agent::chain(error);
        let (what, why) = text.split_once(": ").unwrap_or(("identity", &text));
        Self { what: what.into(), why: why.into(), hint: error.hint(), code: 1 }
    }

    /// From the agent's errors.
    #[must_use]
    pub fn from_agent(error: &farshore_agent::Error) -> Self {
        let text = farshore_agent::chain(error);
        let (what, why) = text.split_once(": ").unwrap_or(("agent", &text));
        Self { what: what.into(), why: why.into(), hint: error.hint().map(Into::into), code: error.exit_code() }
    }

    /// With the way out.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// From a daemon's error document.
    #[must_use]
    pub fn from_answer(answer: &Value, status: u16) -> Self {
        let error = &answer["error"];
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        Self {
            what: text("what").unwrap_or_else(|| "daemon".into()),
            why: text("why").unwrap_or_else(|| format!("answered with status {status}")),
            hint: text("hint"),
            code: error["code"].as_u64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
        }
    }

    /// As the daemons and `--json` say it.
    #[must_use]
    pub fn document(&self) -> Value {
        json!({ "error": { "what": self.what, "why": self.why, "hint": self.hint, "code": self.code } })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl std::error::Error for Failure {}

/// All was said already; what is left is the exit code.
#[derive(Debug, Clone, Copy)]
pub struct Said(pub u8);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Said {}
