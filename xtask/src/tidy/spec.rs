//! SPEC.md: every promise names the test or the bench that shows it, or says "untested".
//!
//! Each table has a column `shown by`. A cell holds, in backquotes, `path::test_name` or `farshore bench NAME` (several are
//! fine), or the word `untested`.

use super::layout::is_in;
use super::source::{line_of, words};
use super::{File, Finding, Tree};

const SPEC: &str = "SPEC.md";
const COLUMN: &str = "shown by";

/// Lines above a function in which its test attribute stands.
const ATTRIBUTE_LINES: usize = 8;

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let Some(spec) = tree.file(SPEC) else { return vec![Finding::new(SPEC, 0, "is missing")] };
    let mut findings = Vec::new();
    let mut column = None;
    let mut rows = 0;
    let lines: Vec<&str> = spec.text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let mut report = |what: String| findings.push(Finding::new(SPEC, at + 1, what));
        if !line.trim_start().starts_with('|') {
            column = None;
            continue;
        }
        let cells = cells(line);
        if lines.get(at + 1).is_some_and(|next| is_separator(next)) {
            column = cells.iter().position(|c| c.eq_ignore_ascii_case(COLUMN));
            if column.is_none() {
                report(format!("the table has no column `{COLUMN}`"));
            }
        } else if let (Some(column), false) = (column, is_separator(line)) {
            rows += 1;
            for what in check_cell(tree, cells.get(column).copied().unwrap_or_default()) {
                report(what);
            }
        }
    }
    if rows == 0 {
        findings.push(Finding::new(SPEC, 0, format!("has no table row with a column `{COLUMN}`")));
    }
    findings
}

fn check_cell(tree: &Tree, cell: &str) -> Vec<String> {
    let proofs: Vec<&str> = cell.split('`').skip(1).step_by(2).collect();
    if proofs.is_empty() && words(cell, "untested").next().is_none() {
        return vec!["the row names no test, no bench and is not marked untested".to_owned()];
    }
    proofs.into_iter().filter_map(|proof| wrong(tree, proof)).collect()
}

/// What is wrong with one proof.
fn wrong(tree: &Tree, proof: &str) -> Option<String> {
    if let Some(name) = proof.strip_prefix("farshore bench ") {
        let name = name.split_whitespace().next().unwrap_or_default();
        let literal = format!("\"{name}\"");
        let known =
            tree.rust().any(|f| (is_in(&f.path, "benches") || is_in(&f.path, "cli")) && f.text.contains(&literal));
        return (!known).then(|| format!("there is no bench `{name}`"));
    }
    let Some((path, test)) = proof.rsplit_once("::") else {
        return Some(format!("`{proof}` is neither path::test_name nor farshore bench NAME"));
    };
    (!tree.rust().any(|f| lies_in(f, path) && has_test(f, test))).then(|| format!("there is no test `{proof}`"))
}

/// Whether a file is what a module or file path means: every part is a folder, the file itself or a module inside it.
fn lies_in(file: &File, path: &str) -> bool {
    let stem = file.path.strip_suffix(".rs").unwrap_or(&file.path);
    path.trim_end_matches(".rs").split(['/', ':']).filter(|p| !p.is_empty()).all(|part| {
        let folder = part.strip_prefix("farshore_").unwrap_or(part);
        stem.split('/').any(|p| p == folder)
            || words(&file.code, folder).any(|at| file.code[..at].trim_end().ends_with("mod"))
    })
}

/// Whether `file` holds a test function of that name.
fn has_test(file: &File, name: &str) -> bool {
    let functions = words(&file.code, name).filter(|&at| file.code[..at].trim_end().ends_with("fn"));
    functions.map(|at| line_of(&file.code, at)).any(|line| {
        let above = file.code.lines().take(line).skip(line.saturating_sub(ATTRIBUTE_LINES));
        above.map(str::trim).any(|l| l.contains("#[test") || l.contains("::test"))
    })
}

/// The cells of a table line, trimmed; a bar behind a backslash belongs to its cell.
fn cells(line: &str) -> Vec<&str> {
    let line = line.trim().trim_start_matches('|');
    let mut cells = Vec::new();
    let mut start = 0;
    for (at, _) in line.match_indices('|') {
        if !line[..at].ends_with('\\') {
            cells.push(line[start..at].trim());
            start = at + 1;
        }
    }
    if start < line.len() {
        cells.push(line[start..].trim());
    }
    cells
}

fn is_separator(line: &str) -> bool {
    let line = line.trim();
    line.starts_with('|') && line.contains("--") && line.chars().all(|c| matches!(c, '|' | '-' | ':' | ' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_row(shown_by: &str) -> Vec<String> {
        let spec = format!("| id | promise | shown by |\n|---|---|---|\n| S-1 | a \\| b | {shown_by} |\n");
        let tree = Tree::of(&[
            (SPEC, &spec),
            ("tests/it/backpressure.rs", "#[test]\nfn latency_stays_bounded() {}\n\n\n\n\n\n\n\n\nfn helper() {}"),
            ("ring/src/slab.rs", "mod tests {\n    #[test]\n    fn cells_are_freed() {}\n}"),
            ("benches/src/lib.rs", "const NAMES: [&str; 1] = [\"latency\"];"),
        ]);
        check(&tree).into_iter().map(|f| f.what).collect()
    }

    #[test]
    fn a_test_is_found_by_module_and_by_file() {
        assert_eq!(check_row("`it::backpressure::latency_stays_bounded`"), [""; 0]);
        assert_eq!(check_row("`tests/it/backpressure.rs::latency_stays_bounded`"), [""; 0]);
        assert_eq!(check_row("`farshore_ring::slab::tests::cells_are_freed`, `farshore bench latency`"), [""; 0]);
        assert_eq!(check_row("untested"), [""; 0]);
        assert_eq!(check_row("untested (needs 10 Gbit/s)"), [""; 0]);
    }

    #[test]
    fn a_proof_that_does_not_exist_is_found() {
        for wrong in [
            "`it::backpressure::no_such_test`",
            "`it::other::latency_stays_bounded`",
            "`it::backpressure::helper`",
            "`farshore bench throughput`",
            "`latency_stays_bounded`",
            "it::backpressure::latency_stays_bounded",
            "",
        ] {
            assert_eq!(check_row(wrong).len(), 1, "{wrong}");
        }
    }

    #[test]
    fn a_table_without_the_column_and_a_spec_without_rows_are_found() {
        let tree = Tree::of(&[(SPEC, "| id | promise |\n|---|---|\n| S-1 | much |\n")]);
        let findings = check(&tree);
        assert_eq!(findings.iter().map(|f| f.line).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(check(&Tree::of(&[]))[0].what, "is missing");
    }
}
