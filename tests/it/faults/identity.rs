//! Who may speak to whom: certificates that are expired, foreign, of the wrong role, and hosts that may not write a group.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use farshore_cli::sites::{HOST, pause};
use farshore_link::identity::Vault;
use farshore_proto::{Name, Role, WallTime};

use crate::support::rig::{GROUP, VOLUME, start_in_vain};
use crate::support::{MIB, Rig, pattern, until};

fn issue(vault: &Vault, role: Role, name: &str, out: &Path) -> Result<()> {
    // A bundle is never written over.
    if out.exists() {
        std::fs::remove_file(out).context("remove the old bundle")?;
    }
    vault.issue(role, Name::new(name)?, 30)?.write(out).with_context(|| format!("write {}", out.display()))
}

fn own_vault(rig: &Rig) -> Result<Vault> {
    Vault::open(&rig.sites.path("vault")).context("open the sites' vault")
}

fn agent_lines(rig: &Rig, bundle: &Path, state: &str) -> String {
    format!(
        "identity = {bundle:?}\nstate = {:?}\nupstream = \"127.0.0.1:9\"\nsocket = {:?}\nring_dir = {:?}\nring = \"8MiB\"\n",
        rig.dir().join(state),
        rig.dir().join("vain.sock"),
        rig.dir()
    )
}

fn target_lines(rig: &Rig, bundle: &Path, data: &str) -> String {
    format!(
        "identity = {bundle:?}\ndata = {:?}\nlisten = \"127.0.0.1:0\"\nsocket = {:?}\n",
        rig.dir().join(data),
        rig.dir().join("vain.sock")
    )
}

/// Gives the agent another bundle and a fresh state, and protects with it.
fn run_agent_as(rig: &mut Rig, vault: &Vault, name: &str) -> Result<PathBuf> {
    rig.sites.stop_agent()?;
    std::fs::rename(rig.sites.path("agent"), rig.dir().join("agent-before")).context("put the state away")?;
    issue(vault, Role::Agent, name, &rig.sites.path("agent.bundle"))?;
    rig.sites.start_agent()?;
    let image = rig.dir().join(format!("{name}.img"));
    pattern::image(&image, 8 * MIB, 5)?;
    rig.sites.protect(&image, GROUP, VOLUME)?;
    Ok(image)
}

#[test]
fn an_expired_certificate_is_refused_at_the_start_with_its_date() {
    Rig::test(
        |_| {},
        |rig| {
            let vault = own_vault(rig)?;
            let long_ago = WallTime(1_700_000_000 * 1_000_000_000);
            let bundle = rig.dir().join("old.bundle");
            vault.issue_at(Role::Agent, Name::new("late")?, 10, long_ago)?.write(&bundle)?;
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &bundle, "s"))?;
            ran.refused(1, "expired on 2023-11-24", false)?;
            let bundle = rig.dir().join("old-target.bundle");
            vault.issue_at(Role::Target, Name::new("late")?, 10, long_ago)?.write(&bundle)?;
            let ran = start_in_vain("target", &rig.dir().join("t.toml"), &target_lines(rig, &bundle, "d"))?;
            ran.refused(1, "expired on 2023-11-24", false)
        },
    );
}

#[test]
fn a_role_cannot_do_anothers_work() {
    Rig::test(
        |_| {},
        |rig| {
            let vault = own_vault(rig)?;
            let bundle = rig.dir().join("operator.bundle");
            issue(&vault, Role::Operator, "ann", &bundle)?;
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &bundle, "s"))?;
            ran.refused(4, "operator", true)?;
            let bundle = rig.sites.path("agent.bundle");
            let ran = start_in_vain("target", &rig.dir().join("t.toml"), &target_lines(rig, &bundle, "d"))?;
            ran.refused(4, "agent source", false)
        },
    );
}

#[test]
fn a_bundle_that_is_missing_exposed_or_no_bundle_is_named() {
    Rig::test(
        |_| {},
        |rig| {
            use std::os::unix::fs::PermissionsExt;
            let missing = rig.dir().join("missing.bundle");
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &missing, "s"))?;
            ran.refused(1, "missing.bundle", false)?;
            let exposed = rig.dir().join("exposed.bundle");
            std::fs::copy(rig.sites.path("agent.bundle"), &exposed).context("copy a bundle")?;
            std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o644)).context("expose it")?;
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &exposed, "s"))?;
            ran.refused(1, "mode 0644", true)?;
            let garbage = rig.dir().join("garbage.bundle");
            std::fs::write(&garbage, "vault = 3\n").context("write garbage")?;
            std::fs::set_permissions(&garbage, std::fs::Permissions::from_mode(0o600)).context("hide it")?;
            let ran = start_in_vain("target", &rig.dir().join("t.toml"), &target_lines(rig, &garbage, "d"))?;
            ran.refused(1, "garbage.bundle", false)
        },
    );
}

/// Goal: an agent of another vault is turned away and says why, naming both vaults; the target stays as it was.
#[test]
fn an_agent_of_another_vault_is_turned_away() {
    Rig::test(
        |_| {},
        |rig| {
            let foreign = Vault::init(&rig.dir().join("foreign"), Name::new("elsewhere")?)?;
            let own = own_vault(rig)?.id().to_string();
            run_agent_as(rig, &foreign, HOST)?;
            let text = until("the reason", || {
                let alarm = rig.agent_alarm("link.down")?;
                Ok(alarm
                    .and_then(|alarm| alarm["text"].as_str().filter(|text| text.contains("vault")).map(str::to_owned)))
            })?;
            ensure!(text.contains(&foreign.id().to_string()) && text.contains(&own), "both vaults are named: {text}");
            let ran = rig.cli(&["wait", GROUP, "--timeout", "0.2"])?;
            ran.refused(1, GROUP, false)?;
            let groups = rig.sites.target().get("/v1/groups")?;
            ensure!(groups.as_array().is_some_and(Vec::is_empty), "the target must know nothing of it: {groups}");
            Ok(())
        },
    );
}

/// Goal: the first host that protects into a group owns it; another is refused with an alarm on both sides until
/// somebody says `group add`, and nothing of the group changes meanwhile (I7).
#[test]
fn another_hosts_group_is_refused() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, _, model) = rig.protect(8 * MIB, 3)?;
            rig.wait()?;
            let points = rig.points()?.len();
            let vault = own_vault(rig)?;
            run_agent_as(rig, &vault, "intruder")?;
            let text = rig.until_agent_alarm("target.refused")?;
            ensure!(text.contains(GROUP) && text.contains("intruder"), "who and what is named: {text}");
            let heard = until("the target's alarm", || rig.target_alarm("stream.not_a_member"))?;
            ensure!(heard.to_string().contains("intruder"), "the target names the host: {heard}");
            let ran = rig.cli(&["wait", GROUP, "--timeout", "0.2"])?;
            ran.refused(1, GROUP, false)?;
            pause(Duration::from_millis(100));
            ensure!(rig.points()?.len() >= points, "the owner's points stay");
            rig.check_point("latest", &model)
        },
    );
}

#[test]
fn a_state_directory_belongs_to_one_host_of_one_vault() {
    Rig::test(
        |_| {},
        |rig| {
            rig.sites.stop_agent()?;
            let other = rig.dir().join("other.bundle");
            issue(&own_vault(rig)?, Role::Agent, "other", &other)?;
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &other, "agent"))?;
            ran.refused(4, "belongs to host source", true)?;
            let foreign = Vault::init(&rig.dir().join("foreign"), Name::new("elsewhere")?)?;
            let stranger = rig.dir().join("stranger.bundle");
            issue(&foreign, Role::Agent, HOST, &stranger)?;
            let ran = start_in_vain("agent", &rig.dir().join("a.toml"), &agent_lines(rig, &stranger, "agent"))?;
            ran.refused(4, "belongs to host source", true)
        },
    );
}

#[test]
fn a_data_directory_belongs_to_one_vault() {
    Rig::test(
        |_| {},
        |rig| {
            rig.protect(4 * MIB, 1)?;
            rig.wait()?;
            rig.sites.stop_target()?;
            let foreign = Vault::init(&rig.dir().join("foreign"), Name::new("elsewhere")?)?;
            let stranger = rig.dir().join("stranger.bundle");
            issue(&foreign, Role::Target, "second-site", &stranger)?;
            let ran = start_in_vain("target", &rig.dir().join("t.toml"), &target_lines(rig, &stranger, "target"))?;
            let code = ran.code.context("it ended by itself")?;
            ensure!([1, 4].contains(&code), "refused: {ran}");
            ran.refused(code, "vault", false)?;
            rig.sites.start_target()?;
            rig.wait().map(drop)
        },
    );
}
