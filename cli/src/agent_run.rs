//! `farshore agent run`.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use farshore_agent::config::{AgentConfig, AgentFile};
use farshore_agent::{Agent, api};
use farshore_link::identity::Identity;

use crate::args::AgentRun;
use crate::daemon;
use crate::failure::Failure;

const CONFIG: &str = "/etc/farshore/agent.toml";

pub(crate) fn run(args: AgentRun) -> Result<()> {
    daemon::start_log();
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
    file.socket = args.socket.or(file.socket);
    let config = AgentConfig::validate(file, daemon::memory_bytes()?)?;
    let identity = Identity::load(&config.identity).map_err(|error| Failure::from_link(&error))?;
    let socket = config.socket.clone();
    let agent = Arc::new(Agent::start(config, identity)?);
    let runtime = daemon::runtime()?;
    let served = runtime.block_on(async {
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn({
            let agent = Arc::clone(&agent);
            async move { api::serve(agent, &socket, stopped).await }
        });
        daemon::until_stopped(stop, server).await
    });
    let stopped = agent.stop();
    served.context("admin socket")?;
    stopped?;
    Ok(())
}
