//! `vault init`, `vault issue` and `vault rotate-key`.

use anyhow::Result;
use farshore_link::identity::Vault;
use farshore_proto::text::show_time;
use farshore_proto::{Name, Role};
use serde_json::json;

use crate::args::VaultCommand;
use crate::failure::Failure;
use crate::output::{Output, cell};

pub(crate) fn run(command: VaultCommand, output: &Output) -> Result<()> {
    match command {
        VaultCommand::Init { dir, name } => {
            let name = Name::new(name).map_err(|error| Failure::usage("--name", error.to_string()))?;
            let vault = Vault::init(&dir, name).map_err(|error| Failure::failed("vault", error.to_string()))?;
            let document = json!({ "vault": vault.id().to_string(), "name": vault.name().to_string(), "dir": dir });
            output.show(&document, |made| {
                format!(
                    "vault {} ({}) in {}\n\
                     Keep a copy of this folder offline: without it no replica can be opened again.",
                    cell(&made["name"]),
                    cell(&made["vault"]),
                    cell(&made["dir"])
                )
            });
        }
        VaultCommand::Issue { dir, role, name, out, days } => {
            let role: Role =
                role.parse().map_err(|error: farshore_proto::Error| Failure::usage("--role", error.to_string()))?;
            let name = Name::new(name).map_err(|error| Failure::usage("--name", error.to_string()))?;
            let failed = |error: farshore_link::Error| Failure::failed("vault", error.to_string());
            let vault = Vault::open(&dir).map_err(failed)?;
            let bundle = vault.issue(role, name, days).map_err(failed)?;
            bundle.write(&out).map_err(failed)?;
            let document = json!({
                "vault": vault.id().to_string(),
                "role": role.as_str(),
                "name": bundle.peer_name().name.to_string(),
                "not_after": show_time(bundle.not_after()),
                "out": out,
            });
            output.show(&document, |made| {
                format!(
                    "{} {} in {}, good until {}",
                    cell(&made["role"]),
                    cell(&made["name"]),
                    cell(&made["out"]),
                    cell(&made["not_after"])
                )
            });
        }
        VaultCommand::RotateKey { dir } => {
            let failed = |error: farshore_link::Error| Failure::failed("vault", error.to_string());
            let mut vault = Vault::open(&dir).map_err(failed)?;
            let epoch = vault.rotate_key().map_err(failed)?;
            let document = json!({ "vault": vault.id().to_string(), "epoch": epoch.0, "dir": dir });
            output.show(&document, |made| {
                format!(
                    "epoch {} of the data key is in {}: copy that folder offline again.\n\
                     Now issue new bundles: to the targets first, then to the agents, which seal with it from then on.\n\
                     Agents with older bundles keep working; their batches stay sealed with the older key.",
                    cell(&made["epoch"]),
                    cell(&made["dir"])
                )
            });
        }
    }
    Ok(())
}
