//! `farshore agent run`: the supervisor; and the worker that it starts.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use farshore_agent::config::{AgentConfig, AgentFile};
use farshore_agent::supervisor::{self, Abilities, Notice, WorkerCommand};
use farshore_agent::{Agent, activity_log_place, api, disk_log_place, ring_folder};
use farshore_link::identity::Identity;

use crate::args::AgentRun;
use crate::daemon;
use crate::failure::Failure;
use crate::notify::Manager;
use crate::output::Output;

const CONFIG: &str = "/etc/farshore/agent.toml";

/// The supervisor, until it is stopped.
pub(crate) fn run(args: AgentRun) -> Result<()> {
    daemon::start_log();
    let arguments = to_arguments(&args);
    let (config, identity) = settings(args)?;
    let manager = Manager::from_environment();
    let signs = daemon::Signs::new(manager);
    let notify = |notice| match notice {
        Notice::Ready => manager.ready("serving"),
        Notice::Alive => signs.alive(),
        Notice::Stopping => manager.stopping(),
    };
    let code = supervisor::run(&config, &identity.name, WorkerCommand { arguments }, &notify)?;
    match u8::try_from(code) {
        Ok(0) => Ok(()),
        // The worker has said why.
        code => Err(daemon::Ended(ExitCode::from(code.unwrap_or(1))).into()),
    }
}

/// The worker.
pub(crate) fn work(args: AgentRun) -> Result<()> {
    daemon::start_log();
    supervisor::settle_worker();
    let (config, identity) = settings(args)?;
    let socket = config.socket.clone();
    let agent = Arc::new(Agent::start(config, identity)?);
    let runtime = daemon::runtime()?;
    let served = runtime.block_on(async {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn({
            let agent = Arc::clone(&agent);
            async move {
                match supervisor::inherited_listener() {
                    Some(listener) => api::serve_on(agent, listener, &socket, stopped).await,
                    None => api::serve(agent, &socket, stopped).await,
                }
            }
        });
        daemon::until_stopped(stop, server).await
    });
    let stopped = agent.stop();
    served.context("admin socket")?;
    stopped?;
    Ok(())
}

/// Says what this program is, if it could work with these flags.
pub(crate) fn check(args: AgentRun, output: &Output) -> Result<()> {
    let (config, _) = settings(args)?;
    ring_folder(&config.ring_dir)?;
    activity_log_place(&config)?;
    disk_log_place(&config)?;
    output.document(&serde_json::to_value(Abilities::own()).context("encode")?);
    Ok(())
}

fn settings(args: AgentRun) -> Result<(AgentConfig, Identity)> {
    let mut file = match &args.config {
        Some(path) => AgentFile::read(path)?,
        None if Path::new(CONFIG).exists() => AgentFile::read(Path::new(CONFIG))?,
        None => AgentFile::default(),
    };
    file.identity = args.identity.or(file.identity);
    file.state = args.state.or(file.state);
    file.upstream = args.upstream.or(file.upstream);
    file.ring = args.ring.or(file.ring);
    file.ring_dir = args.ring_dir.or(file.ring_dir);
    file.activity_log = args.activity_log.or(file.activity_log);
    file.log = args.log.or(file.log);
    file.log_size = args.log_size.or(file.log_size);
    file.socket = args.socket.or(file.socket);
    let config = AgentConfig::validate(file, daemon::memory_bytes()?)?;
    let identity = Identity::load(&config.identity).map_err(|error| Failure::from_link(&error))?;
    Ok((config, identity))
}

/// The flags, as another process is given them.
fn to_arguments(args: &AgentRun) -> Vec<OsString> {
    let AgentRun { identity, state, upstream, ring, ring_dir, activity_log, log, log_size, socket, config } = args;
    let path = |path: &Option<std::path::PathBuf>| path.clone().map(OsString::from);
    let flags = [
        ("--identity", path(identity)),
        ("--state", path(state)),
        ("--upstream", upstream.clone().map(OsString::from)),
        ("--ring", ring.map(|bytes| bytes.to_string().into())),
        ("--ring-dir", path(ring_dir)),
        ("--activity-log", path(activity_log)),
        ("--log", path(log)),
        ("--log-size", log_size.map(|bytes| bytes.to_string().into())),
        ("--socket", path(socket)),
        ("--config", path(config)),
    ];
    let given = flags.into_iter().filter_map(|(flag, value)| {
        // One word, so that no value is taken for a flag.
        let mut word = OsString::from(flag);
        word.push("=");
        word.push(value?);
        Some(word)
    });
    given.collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{AgentCommand, Cli, Command};

    /// Goal: a worker has the flags of its supervisor, whatever is in them.
    #[test]
    fn flags_reach_the_worker() {
        let flags = [
            "--identity=-a b",
            "--state=run",
            "--upstream=h:1",
            "--ring=8388608",
            "--ring-dir=/x",
            "--socket=/s",
            "--config=c",
        ];
        let parse = |words: Vec<OsString>| {
            let all = ["farshore", "agent", "run"].into_iter().map(OsString::from).chain(words);
            let command = Cli::try_parse_from(all).expect("good flags").command;
            let Command::Agent(AgentCommand::Run(args)) = command else { panic!("{command:?}") };
            args
        };
        let args = parse(flags.iter().map(OsString::from).collect());
        let again = to_arguments(&args);
        assert_eq!(again, flags.map(OsString::from));
        assert_eq!(format!("{:?}", parse(again)), format!("{args:?}"));
    }
}
