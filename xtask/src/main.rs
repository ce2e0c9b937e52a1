//! Farshore's task runner: `cargo xtask test` runs every gate of the project, each also alone by name.
//!
//! One command has to be enough on a fresh machine, so a suite names what it needs from outside and the runner installs
//! it where it may; and a suite that did not run is always in the summary, with the reason.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a task runner talks to a terminal")]

mod count;
mod outside;
mod planted;
mod process;
mod report;
mod suites;
mod tidy;
mod vm;
mod workspace;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::suites::{SUITES, Suite};
use crate::workspace::Workspace;

const USAGE: &str = "\
Farshore's task runner.

    cargo xtask test [SUITE…] [--without SUITE,…] [--list]
        Run every suite, or the named ones, in the order of --list. Exit 0 only if nothing failed.
        --without   leave suites out; the summary says so
        --list      say which suites there are and what each needs, and stop
    cargo xtask setup [SUITE…]
        Install what the suites need from outside (Debian, as root), and run nothing.
    cargo xtask vm [--limit SECONDS] [--memory MIB] [-- COMMAND…]
        Boot a virtual machine with a kernel that has ublk and device mapper; the host's files are there, read-only.
        Run the words of COMMAND in a shell and return its exit code; without a command, open a shell on this terminal
        (Ctrl-A X switches the machine off).

Examples:
    cargo xtask test
    cargo xtask test fmt clippy tidy
    cargo xtask test --without clients,fuzz";

/// What the command line asked for.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Help,
    List,
    Setup { suites: Vec<String> },
    Test { suites: Vec<String>, without: Vec<String> },
    Vm { command: Option<String>, limit: Option<u64>, memory: Option<u32> },
}

fn parse(args: &[String]) -> Result<Request> {
    let (command, rest) = match args.split_first() {
        None => return Ok(Request::Help),
        Some((first, rest)) => (first.as_str(), rest),
    };
    if command == "vm" {
        return parse_vm(rest);
    }
    if rest.iter().chain(args.first()).any(|a| a == "--help" || a == "-h" || a == "help") {
        return Ok(Request::Help);
    }
    let mut suites = Vec::new();
    let mut without = Vec::new();
    let mut list = false;
    let mut rest = rest.iter();
    while let Some(arg) = rest.next() {
        if arg == "--list" {
            list = true;
        } else if let Some(names) = arg.strip_prefix("--without=") {
            without.extend(names.split(',').map(str::to_owned));
        } else if arg == "--without" {
            let names = rest.next().context("--without needs suite names: --without clients,fuzz")?;
            without.extend(names.split(',').map(str::to_owned));
        } else if arg.starts_with('-') {
            bail!("unknown flag {arg}\n\n{USAGE}");
        } else {
            suites.push(arg.clone());
        }
    }
    for name in suites.iter().chain(&without) {
        if Suite::named(name).is_none() {
            let known: Vec<_> = SUITES.iter().map(|s| s.name).collect();
            bail!("there is no suite {name:?}; known: {}", known.join(", "));
        }
    }
    match command {
        "test" if list => Ok(Request::List),
        "test" => Ok(Request::Test { suites, without }),
        "setup" if without.is_empty() && !list => Ok(Request::Setup { suites }),
        _ => bail!("unknown command {command:?}\n\n{USAGE}"),
    }
}

fn parse_vm(args: &[String]) -> Result<Request> {
    let (flags, words) = match args.iter().position(|a| a == "--") {
        Some(at) => (&args[..at], &args[at + 1..]),
        None => (args, &args[args.len()..]),
    };
    let (mut limit, mut memory) = (None, None);
    for flag in flags.chunks(2) {
        match flag {
            [flag, ..] if flag == "--help" || flag == "-h" => return Ok(Request::Help),
            [flag, value] if flag == "--limit" => {
                limit = Some(value.parse().context("--limit needs a number of seconds")?);
            }
            [flag, value] if flag == "--memory" => {
                memory = Some(value.parse().context("--memory needs a number of MiB")?);
            }
            _ => bail!("cargo xtask vm takes --limit SECONDS, --memory MIB, and a command behind --\n\n{USAGE}"),
        }
    }
    let command = if words.is_empty() { None } else { Some(words.join(" ")) };
    Ok(Request::Vm { command, limit, memory })
}

fn run() -> Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match parse(&args)? {
        Request::Help => {
            println!("{USAGE}");
            Ok(true)
        }
        Request::List => {
            for suite in &SUITES {
                println!("{}", suite.describe());
            }
            Ok(true)
        }
        Request::Setup { suites } => {
            let needs = suites::selected(&suites, &[]).into_iter().flat_map(|(s, _)| s.needs.iter().copied());
            outside::provide(needs)?;
            Ok(true)
        }
        Request::Test { suites, without } => {
            let workspace = Workspace::read()?;
            let reports = suites::run_all(&workspace, &suites, &without);
            print!("{}", report::summary(&reports));
            Ok(reports.iter().all(report::Report::is_good))
        }
        Request::Vm { command, limit, memory } => {
            let mut job = command.map_or_else(vm::Job::shell, vm::Job::new);
            job.memory = memory.unwrap_or(job.memory);
            job.limit = limit.map_or(job.limit, std::time::Duration::from_secs);
            let ended = vm::run(&Workspace::read()?, &job, |_| {})?;
            std::process::exit(ended.code)
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Request> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn command_line_forms() {
        let test = |suites: &[&str], without: &[&str]| Request::Test {
            suites: suites.iter().map(|s| (*s).to_owned()).collect(),
            without: without.iter().map(|s| (*s).to_owned()).collect(),
        };
        assert_eq!(parse_words("test").expect("plain"), test(&[], &[]));
        assert_eq!(parse_words("test fmt tidy").expect("named"), test(&["fmt", "tidy"], &[]));
        assert_eq!(parse_words("test --without clients,fuzz").expect("two words"), test(&[], &["clients", "fuzz"]));
        assert_eq!(parse_words("test --without=miri it").expect("one word"), test(&["it"], &["miri"]));
        assert_eq!(parse_words("test --list").expect("list"), Request::List);
        assert_eq!(parse_words("").expect("nothing"), Request::Help);
    }

    #[test]
    fn a_misspelt_suite_or_flag_is_an_error_and_never_ignored() {
        assert!(parse_words("test clipy").expect_err("misspelt").to_string().contains("clippy"), "names what exists");
        parse_words("test --without nothing").expect_err("unknown suite left out");
        parse_words("test --fast").expect_err("unknown flag");
        parse_words("test --without").expect_err("no names");
        parse_words("deploy").expect_err("unknown command");
        parse_words("vm uname").expect_err("a command without --");
    }

    #[test]
    fn a_machine_takes_limits_and_words_for_its_shell() {
        let vm =
            |command: Option<&str>, limit| Request::Vm { command: command.map(str::to_owned), limit, memory: None };
        assert_eq!(parse_words("vm").expect("a shell"), vm(None, None));
        assert_eq!(parse_words("vm -- uname -r").expect("a command"), vm(Some("uname -r"), None));
        assert_eq!(parse_words("vm --limit 60 -- exit 3").expect("both"), vm(Some("exit 3"), Some(60)));
        let large = Request::Vm { command: Some("true".to_owned()), limit: Some(9), memory: Some(8192) };
        assert_eq!(parse_words("vm --memory 8192 --limit 9 -- true").expect("all"), large);
        parse_words("vm --limit soon").expect_err("no number");
        parse_words("vm --limit").expect_err("no value");
    }
}
