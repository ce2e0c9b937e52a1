//! `farshore install-units`: puts the files of `dist/` where systemd and udev look for them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::args::InstallUnits;
use crate::failure::Failure;
use crate::output::Output;

/// Path of the program in the files as they stand in `dist/`.
const PROGRAM: &str = "/usr/bin/farshore";

/// A file: where it goes below the root, what is in it, its mode.
struct File {
    path: &'static str,
    text: &'static str,
    mode: u32,
}

const FILES: [File; 4] = [
    File {
        path: "etc/systemd/system/farshore-agent.service",
        text: include_str!("../../../dist/systemd/farshore-agent.service"),
        mode: 0o644,
    },
    File {
        path: "etc/systemd/system/farshore-target.service",
        text: include_str!("../../../dist/systemd/farshore-target.service"),
        mode: 0o644,
    },
    File {
        path: "etc/systemd/system-generators/farshore-generator",
        text: include_str!("../../../dist/systemd/farshore-generator"),
        mode: 0o755,
    },
    File {
        path: "etc/udev/rules.d/60-farshore.rules",
        text: include_str!("../../../dist/udev/60-farshore.rules"),
        mode: 0o644,
    },
];

/// What is left to the operator: it changes the running system.
const NEXT: [&str; 4] = [
    "systemctl daemon-reload",
    "udevadm control --reload",
    "systemctl enable --now farshore-agent      # on a protected host, with /etc/farshore/agent.toml",
    "systemctl enable --now farshore-target     # at the second site, with /etc/farshore/target.toml",
];

pub(crate) fn run(args: &InstallUnits, output: &Output) -> Result<()> {
    let program = match &args.binary {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("find this program")?,
    };
    let program = program.to_str().filter(|text| text.starts_with('/') && !text.contains(char::is_whitespace));
    let program = program.ok_or_else(|| Failure::usage("--binary", "needs an absolute path without blanks"))?;
    let mut written = Vec::new();
    for File { path, text, mode } in &FILES {
        let file = args.root.join(path);
        write(&file, &text.replace(PROGRAM, program), *mode)?;
        written.push(file);
    }
    let document = json!({ "written": written, "next": NEXT });
    output.show(&document, |_| {
        let files: String = written.iter().map(|file| format!("wrote {}\n", file.display())).collect();
        format!("{files}next:\n  {}", NEXT.join("\n  "))
    });
    Ok(())
}

fn write(file: &Path, text: &str, mode: u32) -> Result<()> {
    let doing = || format!("write {}", file.display());
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(doing)?;
    }
    // Whole or not at all: systemd may read it at any time.
    let new = file.with_extension("farshore-new");
    std::fs::write(&new, text).with_context(doing)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode)).with_context(doing)?;
    std::fs::rename(&new, file).with_context(doing)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: all files arrive, with the program's path and their mode; a second time as well.
    #[test]
    fn files_are_written_below_a_root() {
        let root = tempfile::tempdir().expect("room");
        let args = InstallUnits { root: root.path().to_owned(), binary: Some("/opt/farshore/bin/farshore".into()) };
        for _ in 0..2 {
            run(&args, &Output::new(true)).expect("written");
        }
        for File { path, mode, .. } in &FILES {
            let file = root.path().join(path);
            let text = std::fs::read_to_string(&file).expect("there");
            assert!(!text.contains(PROGRAM), "{path}");
            assert_eq!(std::fs::metadata(&file).expect("there").permissions().mode() & 0o777, *mode);
        }
        let unit = std::fs::read_to_string(root.path().join(FILES[0].path)).expect("there");
        assert!(unit.contains("ExecStart=/opt/farshore/bin/farshore agent run"), "{unit}");
        let args = InstallUnits { binary: Some("relative".into()), ..args };
        run(&args, &Output::new(true)).expect_err("not absolute");
    }
}
