//! Rules over the text of every tracked file.

use super::{Finding, Tree};

/// Folders of the machines this was developed on. In pieces, so that this file does not find itself.
const MACHINE_FOLDERS: [&str; 3] = [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/ro", "ot/")];

/// Files that a tool writes.
const GENERATED: [&str; 2] = ["Cargo.lock", "package-lock.json"];

/// A path of one machine works nowhere else.
pub(super) fn machine_paths(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| !GENERATED.iter().any(|g| f.path.ends_with(g))) {
        for (at, line) in file.text.lines().enumerate() {
            if let Some(folder) = MACHINE_FOLDERS.iter().find(|folder| line.contains(**folder)) {
                findings.push(Finding::new(&file.path, at + 1, format!("a path of one machine ({folder})")));
            }
        }
    }
    findings
}

/// A number of some tracker tells a reader nothing; the reason itself belongs here.
pub(super) fn issue_numbers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.files.iter().filter(|f| !GENERATED.iter().any(|g| f.path.ends_with(g))) {
        for (at, line) in file.text.lines().enumerate() {
            if names_an_issue(&line.to_lowercase()) {
                findings.push(Finding::new(&file.path, at + 1, "names an issue number: say what it was about"));
            }
        }
    }
    findings
}

/// Whether the word for an issue, or its plural, stands before a number or a number sign.
fn names_an_issue(line: &str) -> bool {
    const WORD: &str = "issue";
    line.match_indices(WORD).any(|(at, _)| {
        let rest = &line[at + WORD.len()..];
        let rest = rest.strip_prefix('s').unwrap_or(rest);
        let number = rest.strip_prefix([' ', '-']).unwrap_or(rest);
        let starts_word = !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        starts_word && number.starts_with(|c: char| c == '#' || c.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_paths_are_found_in_every_kind_of_file_but_generated_ones() {
        let line = format!("see {}main", MACHINE_FOLDERS[0]);
        let tree = Tree::of(&[("docs/a.md", &line), (".ci/run", &line), ("Cargo.lock", &line), ("b.md", "net/work")]);
        let paths: Vec<_> = machine_paths(&tree).into_iter().map(|f| f.path).collect();
        assert_eq!(paths, ["docs/a.md", ".ci/run"]);
    }

    #[test]
    fn issue_numbers_are_found_and_ordinary_words_are_not() {
        let word = "issue";
        for bad in [" #12", " 2", "#7", "s #1 and #2", "-3", " #TBD"] {
            assert!(names_an_issue(&format!("see {word}{bad}")), "{bad}");
        }
        for good in ["issue of 2 kinds", "vault issue DIR", "an issue.", "reissue 2", "issues", "issued 3 times"] {
            assert!(!names_an_issue(good), "{good}");
        }
    }
}
