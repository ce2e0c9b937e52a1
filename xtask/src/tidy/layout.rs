//! Rules over the tree's shape.

use std::collections::BTreeSet;
use std::path::Path;

use super::source::words;
use super::{Finding, Tree};

/// A file past this holds two ideas.
const FILE_LINES_MAX: usize = 1000;

/// `target/` is the target role's crate: `cargo clean` would delete it if build output went there.
pub(super) fn build_output(tree: &Tree) -> Vec<Finding> {
    let source = tree.root.join("target");
    let mut findings = Vec::new();
    for directory in &tree.target_directories {
        if directory.starts_with(&source) {
            let what = format!("build output goes to {}, which is source", directory.display());
            findings.push(Finding::new(".cargo/config.toml", 0, what));
        }
    }
    // target/generated is a file, which keeps a derive macro from making a folder of that name: it says why itself.
    for mark in ["CACHEDIR.TAG", "debug", "release", "doc", "nextest", "generated/"] {
        if source.join(mark).exists() {
            findings.push(Finding::new("target/", 0, format!("holds build output ({mark}): remove it by hand")));
        }
    }
    findings
}

/// Whoever looks for something starts in ARCHITECTURE.md.
pub(super) fn folders(tree: &Tree) -> Vec<Finding> {
    const MAP: &str = "ARCHITECTURE.md";
    let Some(map) = tree.file(MAP) else { return vec![Finding::new(MAP, 0, "is missing")] };
    let folders: BTreeSet<&str> = tree
        .files
        .iter()
        .filter_map(|f| f.path.split_once('/').map(|(folder, _)| folder))
        .filter(|folder| !folder.starts_with('.'))
        .collect();
    let named = |folder: &str| {
        map.text.match_indices(&format!("{folder}/")).any(|(at, _)| {
            !map.text[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '/' | '.'))
        })
    };
    let missing = folders.into_iter().filter(|f| !named(f));
    missing.map(|f| Finding::new(MAP, 0, format!("does not name the folder {f}/"))).collect()
}

/// Long Rust files.
pub(super) fn file_length(tree: &Tree) -> Vec<Finding> {
    let lengths = tree.rust().map(|f| (f, f.text.lines().count()));
    let long = lengths.filter(|(_, lines)| *lines > FILE_LINES_MAX);
    long.map(|(f, lines)| Finding::new(&f.path, 0, format!("{lines} lines, at most {FILE_LINES_MAX}"))).collect()
}

/// A decoder that only one of the two fuzzers knows is fuzzed half: the seeded loop's table in the tests package, the
/// files of the cargo-fuzz package and its manifest name the same targets.
pub(super) fn fuzz_targets(tree: &Tree) -> Vec<Finding> {
    const TABLE: &str = "tests/src/fuzz/targets.rs";
    const MANIFEST: &str = "fuzz/Cargo.toml";
    let table: BTreeSet<String> = tree.file(TABLE).map(|f| table_names(&f.text)).unwrap_or_default();
    let files: BTreeSet<String> = tree
        .rust()
        .filter_map(|f| Some(f.path.strip_prefix("fuzz/fuzz_targets/")?.strip_suffix(".rs")?.to_owned()))
        .collect();
    let manifest: BTreeSet<String> = tree
        .file(MANIFEST)
        .and_then(|f| f.text.parse::<toml::Table>().ok())
        .and_then(|t| {
            Some(t.get("bin")?.as_array()?.iter().filter_map(|b| Some(b.get("name")?.as_str()?.to_owned())).collect())
        })
        .unwrap_or_default();
    let mut findings = Vec::new();
    for name in table.iter().chain(&files).chain(&manifest).collect::<BTreeSet<_>>() {
        for (place, has) in [(TABLE, &table), ("fuzz/fuzz_targets/", &files), (MANIFEST, &manifest)] {
            if !has.contains(name) {
                findings.push(Finding::new(place, 0, format!("lacks the fuzz target {name}")));
            }
        }
    }
    findings
}

/// The names in `Target { name: "…", … }` rows.
fn table_names(text: &str) -> BTreeSet<String> {
    let rows = words(text, "name").filter_map(|at| text[at..].strip_prefix("name: \"")?.split_once('"'));
    rows.map(|(name, _)| name.to_owned()).collect()
}

/// Whether `path` is a file of the folder `folder` at the root.
pub(super) fn is_in(path: &str, folder: &str) -> bool {
    Path::new(path).starts_with(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|f| f.what.as_str()).collect()
    }

    #[test]
    fn build_output_in_the_source_crate_is_found() {
        let mut tree = Tree::of(&[]);
        assert_eq!(build_output(&tree), []);
        tree.target_directories = vec!["/r/target".into()];
        assert_eq!(build_output(&tree).len(), 1);
        tree.target_directories = vec!["/r/target/ci".into()];
        assert_eq!(build_output(&tree).len(), 1);
        tree.target_directories = vec!["/elsewhere/target".into(), "/r/targets".into()];
        assert_eq!(build_output(&tree), []);
    }

    #[test]
    fn every_folder_is_on_the_map() {
        let tree = Tree::of(&[
            ("ARCHITECTURE.md", "`uring/` is below, see docs/ring/ too"),
            ("uring/a.rs", ""),
            ("ring/a.rs", ""),
            ("docs/a.md", ""),
            (".ci/run", ""),
            ("README.md", ""),
        ]);
        assert_eq!(whats(&folders(&tree)), ["does not name the folder ring/"]);
        assert_eq!(whats(&folders(&Tree::of(&[("uring/a.rs", "")]))), ["is missing"]);
    }

    #[test]
    fn long_rust_files_are_found_and_long_lists_are_not() {
        let long = "x\n".repeat(FILE_LINES_MAX + 1);
        let edge = "x\n".repeat(FILE_LINES_MAX);
        let tree = Tree::of(&[("a.rs", &long), ("b.rs", &edge), ("Cargo.lock", &long)]);
        assert_eq!(file_length(&tree).iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["a.rs"]);
    }

    #[test]
    fn fuzz_targets_stand_in_all_three_places() {
        let table = "pub const TARGETS: &[Target] = &[Target { name: \"batch\", run: batch }];";
        let manifest = "[[bin]]\nname = \"batch\"\npath = \"fuzz_targets/batch.rs\"";
        let whole = Tree::of(&[
            ("tests/src/fuzz/targets.rs", table),
            ("fuzz/Cargo.toml", manifest),
            ("fuzz/fuzz_targets/batch.rs", ""),
        ]);
        assert_eq!(fuzz_targets(&whole), []);
        let half = Tree::of(&[("tests/src/fuzz/targets.rs", table), ("fuzz/fuzz_targets/frame.rs", "")]);
        assert_eq!(fuzz_targets(&half).len(), 4, "each of two targets lacks two places");
        assert_eq!(fuzz_targets(&Tree::of(&[])), []);
    }
}
