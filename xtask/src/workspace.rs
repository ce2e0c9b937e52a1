//! What `cargo metadata` says about this workspace.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;

/// The workspace: where it lies, where its build output goes and what its packages contain.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target_directory: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug)]
struct Package {
    name: String,
    /// (kind, name), as in `("test", "it")`.
    targets: Vec<(String, String)>,
    dependencies: Vec<String>,
}

/// A `cargo` of the toolchain that runs this program.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

impl Workspace {
    /// Asks cargo; needs no network.
    pub(crate) fn read() -> Result<Self> {
        let json = process::output(cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
        Self::parse(&json).context("read cargo metadata")
    }

    fn parse(json: &str) -> Result<Self> {
        let metadata: Value = serde_json::from_str(json).context("parse JSON")?;
        let text = |value: &Value, key: &str| -> Result<String> {
            Ok(value[key].as_str().with_context(|| format!("{key} is missing"))?.to_owned())
        };
        let mut packages = Vec::new();
        for package in metadata["packages"].as_array().context("packages are missing")? {
            let mut targets = Vec::new();
            for target in package["targets"].as_array().context("targets are missing")? {
                for kind in target["kind"].as_array().context("kind is missing")? {
                    targets.push((kind.as_str().context("kind is no text")?.to_owned(), text(target, "name")?));
                }
            }
            let dependencies = package["dependencies"].as_array().context("dependencies are missing")?;
            let dependencies = dependencies.iter().map(|d| text(d, "name")).collect::<Result<_>>()?;
            packages.push(Package { name: text(package, "name")?, targets, dependencies });
        }
        Ok(Self {
            root: text(&metadata, "workspace_root")?.into(),
            target_directory: text(&metadata, "target_directory")?.into(),
            packages,
        })
    }

    /// Where cargo puts build output when no environment variable says otherwise.
    pub(crate) fn configured_target_directory(&self) -> Result<PathBuf> {
        let json = process::output(
            cargo()
                .args(["metadata", "--format-version", "1", "--no-deps"])
                .env_remove("CARGO_TARGET_DIR")
                .env_remove("CARGO_BUILD_TARGET_DIR")
                .current_dir(&self.root),
        )?;
        Ok(Self::parse(&json)?.target_directory)
    }

    fn package(&self, name: &str) -> Option<&Package> {
        self.packages.iter().find(|p| p.name == name)
    }

    /// Whether `package` has a target such as `("test", "it")` or `("bin", "farshore")`.
    pub(crate) fn has_target(&self, package: &str, kind: &str, name: &str) -> bool {
        self.package(package).is_some_and(|p| p.targets.iter().any(|(k, n)| k == kind && n == name))
    }

    /// Whether `package` depends on `dependency` in any way and for any target.
    pub(crate) fn depends(&self, package: &str, dependency: &str) -> bool {
        self.package(package).is_some_and(|p| p.dependencies.iter().any(|d| d == dependency))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_dependencies_are_found() {
        let json = r#"{ "workspace_root": "/w", "target_directory": "/w/build", "packages": [
            { "name": "farshore-tests", "dependencies": [{ "name": "loom" }],
              "targets": [{ "name": "it", "kind": ["test"] }, { "name": "farshore_tests", "kind": ["lib"] }] } ] }"#;
        let workspace = Workspace::parse(json).expect("valid metadata");
        assert!(workspace.has_target("farshore-tests", "test", "it"));
        assert!(!workspace.has_target("farshore-tests", "test", "sim"));
        assert!(!workspace.has_target("farshore-none", "test", "it"));
        assert!(workspace.depends("farshore-tests", "loom"));
        assert!(!workspace.depends("farshore-tests", "tokio"));
    }
}
