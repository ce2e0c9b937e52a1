//! The project's own rules over its tracked files: what no other tool knows.

mod arrows;
mod code;
mod layout;
mod source;
mod spec;
mod text;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::Workspace;

/// A tracked text file, or one that would be tracked if it were added.
#[derive(Debug)]
pub(crate) struct File {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
    /// For Rust: the text with comments and literals blanked, line by line in the same place. Else empty.
    code: String,
}

/// All that the rules look at.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    root: PathBuf,
    /// Where cargo builds when the environment says nothing, and where it builds now.
    target_directories: Vec<PathBuf>,
    files: Vec<File>,
}

/// One thing to mend.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    path: String,
    /// From 1; 0 stands for the whole file.
    line: usize,
    what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.what),
            line => write!(f, "{}:{line}: {}", self.path, self.what),
        }
    }
}

impl Finding {
    fn new(path: impl Into<String>, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.into(), line, what: what.into() }
    }
}

type Rule = fn(&Tree) -> Vec<Finding>;

const RULES: [(&str, Rule); 12] = [
    ("build output outside the crate target/", layout::build_output),
    ("every folder stands in ARCHITECTURE.md", layout::folders),
    ("no file past 1,000 lines", layout::file_length),
    ("fuzz targets agree", layout::fuzz_targets),
    ("crate arrows", arrows::check),
    ("SPEC.md rows name their proof", spec::check),
    ("no leftovers", code::leftovers),
    ("ignored tests have a reason", code::ignored_tests),
    ("dead code has a reason", code::dead_code),
    ("unsafe only where it is allowed", code::unsafe_code),
    ("no paths of one machine", text::machine_paths),
    ("no issue numbers", text::issue_numbers),
];

/// Runs every rule over the workspace.
pub(crate) fn check(workspace: &Workspace) -> Result<Vec<(&'static str, Vec<Finding>)>> {
    let tree = Tree::read(workspace)?;
    Ok(RULES.iter().map(|(name, rule)| (*name, rule(&tree))).collect())
}

impl Tree {
    fn read(workspace: &Workspace) -> Result<Self> {
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(&workspace.root);
        let list = process::output(&mut git).context("list the tracked files")?;
        let mut files = Vec::new();
        for path in list.split('\0').filter(|p| !p.is_empty()) {
            // A file that is deleted and not yet committed, a link to nowhere, a binary file: nothing to read.
            if let Ok(text) = fs::read_to_string(workspace.root.join(path)) {
                files.push(File::new(path, text));
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self {
            root: workspace.root.clone(),
            target_directories: vec![workspace.configured_target_directory()?, workspace.target_directory.clone()],
            files,
        })
    }

    fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|f| f.path == path)
    }

    fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|f| f.path.ends_with(".rs"))
    }

    /// The folders of the workspace's packages, from the root's Cargo.toml.
    fn members(&self) -> Vec<String> {
        let parsed = self.file("Cargo.toml").and_then(|f| f.text.parse::<toml::Table>().ok());
        let members = parsed.as_ref().and_then(|t| t.get("workspace")?.get("members")?.as_array());
        members.into_iter().flatten().filter_map(|m| Some(m.as_str()?.to_owned())).collect()
    }
}

impl File {
    fn new(path: &str, text: String) -> Self {
        let code = if path.ends_with(".rs") { source::blank(&text) } else { String::new() };
        Self { path: path.to_owned(), text, code }
    }
}

#[cfg(test)]
impl Tree {
    /// A tree in memory for the rules' tests.
    fn of(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|(path, text)| File::new(path, (*text).to_owned())).collect();
        Self { root: "/r".into(), target_directories: vec!["/r/build".into()], files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_points_at_its_line() {
        assert_eq!(Finding::new("a.rs", 3, "no").to_string(), "a.rs:3: no");
        assert_eq!(Finding::new("a.rs", 0, "no").to_string(), "a.rs: no");
    }

    #[test]
    fn members_come_from_the_root() {
        let tree = Tree::of(&[("Cargo.toml", "[workspace]\nmembers = [\"proto\", \"cli\"]")]);
        assert_eq!(tree.members(), ["proto", "cli"]);
    }
}
