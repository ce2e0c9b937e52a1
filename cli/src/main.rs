//! `farshore`: the one binary. Commands and exit codes: see `--help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    farshore_cli::main()
}
