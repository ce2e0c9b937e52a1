//! Rules over Rust code: leftovers, silenced tests and lints, unsafe.

use super::source::{in_parentheses, line_of, words};
use super::{File, Finding, Tree};

/// Crates that may hold unsafe code; every other crate root forbids it.
const UNSAFE_CRATES: [&str; 3] = ["ring", "uring", "ublk"];

/// Macros that mark unfinished work.
pub(super) fn leftovers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for name in ["todo", "unimplemented", "dbg"] {
            for at in words(&file.code, name) {
                let after = file.code[at + name.len()..].trim_start();
                if after.starts_with('!') && !after.starts_with("!=") {
                    findings.push(Finding::new(
                        &file.path,
                        line_of(&file.code, at),
                        format!("{name}! left in the code"),
                    ));
                }
            }
        }
    }
    findings
}

/// `#[ignore]` has to say why, and how the test is run then.
pub(super) fn ignored_tests(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for at in words(&file.code, "ignore") {
            let before = file.code[..at].trim_end();
            let in_attribute = before.ends_with("#[") || (before.ends_with(',') && opens_cfg_attr(before));
            let bare = !file.code[at + "ignore".len()..].trim_start().starts_with('=');
            if in_attribute && (bare || reason_is_empty(file, at + "ignore".len())) {
                let what = "an ignored test without a reason: #[ignore = \"why, and what runs it\"]";
                findings.push(Finding::new(&file.path, line_of(&file.code, at), what));
            }
        }
    }
    findings
}

/// Whether the innermost attribute that is open at the end of `before` is a `cfg_attr`.
fn opens_cfg_attr(before: &str) -> bool {
    before.rfind("#[").is_some_and(|start| before[start..].starts_with("#[cfg_attr") && !before[start..].contains(']'))
}

/// Whether the string literal behind a `=` at `offset` of the code is empty. Literals are blank in the code, so this
/// reads the line of the original.
fn reason_is_empty(file: &File, offset: usize) -> bool {
    let line = file.text.lines().nth(line_of(&file.code, offset) - 1).unwrap_or_default();
    line.split_once('=').is_some_and(|(_, value)| value.trim_start().starts_with("\"\""))
}

/// `allow(dead_code)` and `expect(dead_code)` have to carry `reason = "…"`.
pub(super) fn dead_code(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        for level in ["allow", "expect"] {
            for at in words(&file.code, level) {
                let Some(inside) = in_parentheses(&file.code[at + level.len()..]) else { continue };
                let names_it = words(inside, "dead_code").next().is_some();
                let has_reason = words(inside, "reason").next().is_some();
                if names_it && !has_reason {
                    let what = format!("{level}(dead_code) without a reason");
                    findings.push(Finding::new(&file.path, line_of(&file.code, at), what));
                }
            }
        }
    }
    findings
}

/// Unsafe code stands only in the crates that were made for it, and the others' roots forbid it.
pub(super) fn unsafe_code(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in tree.rust() {
        let folder = file.path.split('/').next().unwrap_or_default();
        if UNSAFE_CRATES.contains(&folder) {
            continue;
        }
        for at in words(&file.code, "unsafe") {
            // In an attribute it is a lint's or an attribute's word, as in `#[unsafe(no_mangle)]`: that counts as well.
            let what = format!("unsafe outside {}", UNSAFE_CRATES.join("/, "));
            findings.push(Finding::new(&file.path, line_of(&file.code, at), format!("{what}/")));
        }
    }
    for member in tree.members().iter().filter(|m| !UNSAFE_CRATES.contains(&m.as_str())) {
        for root in crate_roots(tree, member) {
            let squeezed: String = root.code.chars().filter(|c| !c.is_whitespace()).collect();
            if !squeezed.contains("#![forbid(unsafe_code)]") {
                findings.push(Finding::new(&root.path, 1, "the crate root lacks #![forbid(unsafe_code)]"));
            }
        }
    }
    findings
}

fn crate_roots<'a>(tree: &'a Tree, member: &str) -> impl Iterator<Item = &'a File> {
    let source = format!("{member}/src/");
    tree.rust().filter(move |f| {
        f.path.strip_prefix(&source).is_some_and(|rest| {
            rest == "lib.rs" || rest == "main.rs" || rest.strip_prefix("bin/").is_some_and(|b| !b.contains('/'))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(rule: fn(&Tree) -> Vec<Finding>, text: &str) -> Vec<usize> {
        rule(&Tree::of(&[("proto/src/a.rs", text)])).iter().map(|f| f.line).collect()
    }

    #[test]
    fn leftovers_are_macros_in_code_and_nothing_else() {
        assert_eq!(lines(leftovers, "fn a() {\n    todo!()\n}"), [2]);
        assert_eq!(lines(leftovers, "let x = dbg ! (y);\nunimplemented!(\"later\")"), [2, 1]);
        assert_eq!(lines(leftovers, "// todo!()\nlet s = \"dbg!(x)\"; if todo != 3 {} my_todo!();"), [0; 0]);
    }

    #[test]
    fn an_ignored_test_needs_a_reason() {
        assert_eq!(lines(ignored_tests, "#[test]\n#[ignore]\nfn a() {}"), [2]);
        assert_eq!(lines(ignored_tests, "#[ignore = \"\"]\nfn a() {}"), [1]);
        assert_eq!(lines(ignored_tests, "#[cfg_attr(miri, ignore)]\nfn a() {}"), [1]);
        assert_eq!(lines(ignored_tests, "#[cfg_attr(miri, ignore = \"maps a file\")]\nfn a() {}"), [0; 0]);
        assert_eq!(lines(ignored_tests, "#[ignore = \"an hour: cargo xtask test long\"]\nfn a() {}"), [0; 0]);
        assert_eq!(lines(ignored_tests, "fn ignore() {}\nf(a, ignore);"), [0; 0]);
    }

    #[test]
    fn silenced_dead_code_needs_a_reason() {
        assert_eq!(lines(dead_code, "\n#[allow(dead_code)]\nfn a() {}"), [2]);
        assert_eq!(lines(dead_code, "#![allow(\n    clippy::all,\n    dead_code,\n)]"), [1]);
        assert_eq!(lines(dead_code, "#[expect(dead_code)]"), [1]);
        assert_eq!(lines(dead_code, "#[allow(dead_code, reason = \"read by the kernel\")]"), [0; 0]);
        assert_eq!(lines(dead_code, "#[allow(unused)] // allow(dead_code)"), [0; 0]);
    }

    #[test]
    fn unsafe_is_found_in_code_outside_its_crates() {
        assert_eq!(lines(unsafe_code, "// unsafe\nunsafe { f() }"), [2]);
        let tree = Tree::of(&[("ring/src/a.rs", "unsafe { f() }"), ("uring/src/a.rs", "unsafe fn f() {}")]);
        assert_eq!(unsafe_code(&tree), []);
    }

    #[test]
    fn crate_roots_forbid_unsafe() {
        let workspace = ("Cargo.toml", "[workspace]\nmembers = [\"proto\", \"ring\", \"cli\"]");
        let good = "#![forbid(unsafe_code)]\n";
        let tree =
            Tree::of(&[workspace, ("proto/src/lib.rs", "// #![forbid(unsafe_code)]"), ("cli/src/main.rs", good)]);
        let findings = unsafe_code(&tree);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].path, "proto/src/lib.rs");
        let tree = Tree::of(&[workspace, ("ring/src/lib.rs", ""), ("cli/src/bin/x.rs", ""), ("cli/src/a.rs", "")]);
        assert_eq!(unsafe_code(&tree).iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["cli/src/bin/x.rs"]);
    }
}
