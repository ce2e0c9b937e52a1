//! What the doctor says of one thing.

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be, or nothing can be told from here that would be wrong.
    Ok,
    /// Protection works, with a drawback or a risk.
    Warning,
    /// Protection does not work, or would hurt, until this is mended.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Finding {
    /// Stable name, such as `ublk.driver`.
    pub check: &'static str,
    /// How bad.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What that means for protection; none: nothing to worry about.
    pub means: Option<String>,
    /// The command or the file that mends it.
    pub mend: Option<String>,
}

impl Finding {
    /// As it should be.
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), means: None, mend: None }
    }

    /// A drawback or a risk.
    pub(super) fn warning(check: &'static str, found: impl Into<String>, means: impl Into<String>) -> Self {
        Self { level: Level::Warning, means: Some(means.into()), ..Self::ok(check, found) }
    }

    /// Must be mended.
    pub(super) fn problem(check: &'static str, found: impl Into<String>, means: impl Into<String>) -> Self {
        Self { level: Level::Problem, ..Self::warning(check, found, means) }
    }

    /// What it means, where all is well nevertheless.
    pub(super) fn means(self, means: impl Into<String>) -> Self {
        Self { means: Some(means.into()), ..self }
    }

    /// With the way to mend it.
    pub(super) fn mend(self, mend: impl Into<String>) -> Self {
        Self { mend: Some(mend.into()), ..self }
    }

    /// For people: a line, and what belongs to it below.
    pub(super) fn text(&self) -> String {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        let mut text = format!("{level:<8}{:<20}{}\n", self.check, self.found);
        for (name, value) in [("means", &self.means), ("mend", &self.mend)] {
            if let Some(value) = value {
                text += &format!("{:8}{:<20}{name}: {value}\n", "", "");
            }
        }
        text
    }
}
