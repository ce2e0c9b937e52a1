//! What stands behind the `farshore` binary: its commands, and [`sites`], which runs both sites on one machine for the
//! demonstration, the benchmarks and the end-to-end tests.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line prints")]

mod agent_run;
mod args;
mod bench;
mod boot;
pub mod client;
mod daemon;
mod demo;
mod doctor;
pub mod failure;
mod journal;
mod logs;
mod notify;
mod output;
pub mod sites;
mod source;
mod target_api;
mod target_run;
mod vault;
mod verify;
mod views;

use std::process::ExitCode;

use args::{AgentCommand, Cli, Command, TargetCommand};
use clap::Parser;
use failure::{Failure, Said};
use output::Output;

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json);
    match run(cli.command, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error, &output),
    }
}
fn run(command: Command, output: &Output) -> anyhow::Result<()> {
    match command {
        Command::Demo(args) => demo::run(&args, output),
        Command::Vault(command) => vault::run(command, output),
        Command::Agent(AgentCommand::Run(args)) => agent_run::run(args),
        Command::Agent(AgentCommand::Worker(args)) => agent_run::work(args),
        Command::Agent(AgentCommand::Check(args)) => agent_run::check(args, output),
        Command::Agent(AgentCommand::Upgrade { binary, socket }) => source::upgrade(&binary, &socket.agent, output),
        Command::Agent(AgentCommand::Show { socket }) => source::show(&socket.agent, output),
        Command::Target(TargetCommand::Run(args)) => target_run::run(args),
        Command::Target(TargetCommand::ResumeRetention { socket }) => views::resume_retention(&socket, output),
        Command::Journal(command) => journal::run(command, output),
        Command::Log(command) => logs::run(command, output),
        Command::Bench(args) => bench::run(&args, output),
        Command::Doctor(args) => doctor::run(&args, output),
        Command::InstallUnits(args) => boot::install(&args, output),
        Command::SystemGenerator(args) => boot::generate(&args),
        command @ (Command::Protect { .. }
        | Command::Unprotect { .. }
        | Command::Volumes { .. }
        | Command::Status { .. }
        | Command::Bookmark { .. }
        | Command::Wait { .. }
        | Command::Resync { .. }
        | Command::Verify { .. }
        | Command::Alarms { .. }) => source::run(command, output),
        command @ (Command::Groups { .. }
        | Command::Group(_)
        | Command::Base(_)
        | Command::Points { .. }
        | Command::Hold(_)
        | Command::View(_)
        | Command::Restore { .. }
        | Command::Policy(_)) => views::run(command, output),
    }
}

/// Prints `error: what: why` and the hint, and gives the exit code.
fn report(error: &anyhow::Error, output: &Output) -> ExitCode {
    if let Some(daemon::Ended(code)) = error.downcast_ref() {
        return *code;
    }
    if let Some(Said(code)) = error.downcast_ref() {
        return ExitCode::from(*code);
    }
    let of_agent = error.downcast_ref::<farshore_agent::Error>().map(Failure::from_agent);
    let failure = of_agent.as_ref().or_else(|| error.downcast_ref::<Failure>());
    if output.is_json() {
        let document = failure.map_or_else(|| Failure::failed("farshore", chain(error)).document(), Failure::document);
        output.document(&document);
    } else if let Some(failure) = failure {
        eprintln!("error: {failure}");
    } else {
        eprintln!("error: {}", chain(error));
    }
    if let Some(hint) = failure.and_then(|failure| failure.hint.as_deref())
        && !output.is_json()
    {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(failure.map_or(1, |failure| failure.code))
}

/// An error with its causes, each after a colon, without repeating what a cause already said.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let part = cause.to_string();
        if !text.ends_with(&part) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&part);
        }
    }
    text
}
