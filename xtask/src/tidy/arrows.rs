//! Which crate may depend on which. A new arrow is a decision with a note in docs/decisions/.

use toml::{Table, Value};

use super::{Finding, Tree};

/// The allowed arrows, top of the map last. `cli`, `tests` and `benches` put everything together.
const ARROWS: [(&str, &[&str]); 15] = [
    ("proto", &[]),
    ("ring", &[]),
    ("uring", &[]),
    ("link", &["proto", "uring"]),
    ("blkfilter", &["ring", "uring", "proto"]),
    ("ublk", &["uring"]),
    ("nbd", &["uring"]),
    ("streamer", &["ring", "uring", "proto", "link"]),
    ("target", &["uring", "proto", "nbd", "ublk", "link"]),
    ("agent", &["proto", "ring", "uring", "link", "blkfilter", "nbd", "ublk", "streamer"]),
    ("control", &["proto"]),
    ("cli", ALL),
    // The end-to-end tests use the pair of sites that the demonstration runs on.
    ("tests", AND_CLI),
    (
        "benches",
        &["tests", "proto", "ring", "uring", "link", "blkfilter", "ublk", "nbd", "streamer", "target", "agent"],
    ),
    ("xtask", &[]),
];

const ALL: &[&str] =
    &["proto", "ring", "uring", "link", "blkfilter", "ublk", "nbd", "streamer", "target", "agent", "control"];

const AND_CLI: &[&str] =
    &["proto", "ring", "uring", "link", "blkfilter", "ublk", "nbd", "streamer", "target", "agent", "control", "cli"];

/// Compares every member's dependencies with the allowed arrows. Tests inside a crate follow the same arrows.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for member in tree.members() {
        let path = format!("{member}/Cargo.toml");
        let Some(file) = tree.file(&path) else {
            findings.push(Finding::new(path, 0, "is missing"));
            continue;
        };
        let manifest = match file.text.parse::<Table>() {
            Ok(manifest) => manifest,
            Err(error) => {
                findings.push(Finding::new(path, 0, format!("is no TOML: {error}")));
                continue;
            }
        };
        let name = manifest.get("package").and_then(|p| p.get("name")).and_then(Value::as_str).unwrap_or_default();
        if name != format!("farshore-{member}") {
            findings.push(Finding::new(&path, 0, format!("the package is named {name}, not farshore-{member}")));
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == member) else {
            findings.push(Finding::new(path, 0, "no arrows are declared for this crate in xtask/src/tidy/arrows.rs"));
            continue;
        };
        for to in our_dependencies(&manifest) {
            // A crate may depend on itself: that is how its tests switch on a feature of it.
            if to != member && !allowed.contains(&to.as_str()) {
                findings.push(Finding::new(&path, 0, format!("the arrow {member} -> {to} is not allowed")));
            }
        }
    }
    findings
}

/// The folders of our own crates that a manifest depends on, in any kind and for any platform.
fn our_dependencies(manifest: &Table) -> Vec<String> {
    let mut found = Vec::new();
    let platforms = manifest.get("target").and_then(Value::as_table);
    let tables = platforms.into_iter().flat_map(Table::values).filter_map(Value::as_table);
    for table in std::iter::once(manifest).chain(tables) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (key, value) in table.get(kind).and_then(Value::as_table).into_iter().flatten() {
                let name = value.get("package").and_then(Value::as_str).unwrap_or(key);
                if let Some(folder) = name.strip_prefix("farshore-") {
                    found.push(folder.to_owned());
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(member: &str, dependencies: &str) -> Vec<String> {
        let root = format!("[workspace]\nmembers = [\"{member}\"]");
        let manifest = format!("[package]\nname = \"farshore-{member}\"\n{dependencies}");
        let tree = Tree::of(&[("Cargo.toml", &root), (&format!("{member}/Cargo.toml"), &manifest)]);
        check(&tree).into_iter().map(|f| f.what).collect()
    }

    #[test]
    fn allowed_arrows_pass() {
        assert_eq!(whats("nbd", "[dependencies]\nfarshore-uring.workspace = true\nnix = \"1\""), [""; 0]);
        assert_eq!(
            whats("nbd", "[dev-dependencies]\nfarshore-nbd = { path = \".\", features = [\"client\"] }"),
            [""; 0]
        );
        assert_eq!(whats("cli", "[dependencies]\nfarshore-target.workspace = true"), [""; 0]);
    }

    #[test]
    fn forbidden_arrows_are_found_in_every_kind_of_table() {
        let expected = ["the arrow streamer -> target is not allowed"];
        assert_eq!(whats("streamer", "[dependencies]\nfarshore-target.workspace = true"), expected);
        assert_eq!(whats("streamer", "[dev-dependencies]\nfarshore-target = { path = \"../target\" }"), expected);
        assert_eq!(whats("streamer", "[target.'cfg(loom)'.dependencies]\nfarshore-target.workspace = true"), expected);
        assert_eq!(whats("streamer", "[build-dependencies]\nt = { package = \"farshore-target\" }"), expected);
    }

    #[test]
    fn an_unknown_crate_or_a_misnamed_package_is_found() {
        assert!(whats("common", "")[0].contains("no arrows are declared"));
        let tree = Tree::of(&[
            ("Cargo.toml", "[workspace]\nmembers = [\"nbd\", \"ring\"]"),
            ("nbd/Cargo.toml", "[package]\nname = \"nbd\""),
        ]);
        let findings = check(&tree);
        assert_eq!(findings.len(), 2);
        assert!(findings[0].what.contains("not farshore-nbd"));
        assert_eq!(findings[1].path, "ring/Cargo.toml");
    }

    #[test]
    fn arrows_point_down_only() {
        // Crates stand in the table in an order in which each arrow leads to an earlier row, tests excepted.
        let place = |name: &str| ARROWS.iter().position(|(from, _)| *from == name).expect("every arrow ends at a row");
        for (from, to) in ARROWS {
            assert!(to.iter().all(|to| place(to) < place(from)), "{from} points up");
        }
    }
}
