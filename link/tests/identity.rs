//! Vaults and bundles as files: what is written is read back, and every kind of misfit is refused with its reason.

use std::error::Error as StdError;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use farshore_link::Error;
use farshore_link::identity::{Identity, Keys, Vault};
use farshore_proto::{KeyEpoch, Name, Role, WallTime};

type Outcome = Result<(), Box<dyn StdError>>;

const DAY_NS: u64 = 86_400 * 1_000_000_000;
/// 2026-01-01.
const NOW: WallTime = WallTime(1_767_225_600_000_000_000);

fn name(text: &str) -> Name {
    Name::new(text).expect("the tests use good names")
}

fn vault(text: &str) -> Vault {
    Vault::in_memory(name(text), NOW).expect("keys can be made")
}

fn later(days: u64) -> WallTime {
    WallTime(NOW.0 + days * DAY_NS)
}

#[test]
fn a_vault_keeps_its_id_and_keys_and_issues_what_loads() -> Outcome {
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("vault");
    let made = Vault::init(&folder, name("demo"))?;
    assert!(matches!(Vault::init(&folder, name("demo")), Err(Error::Exists { .. })));
    let opened = Vault::open(&folder)?;
    assert_eq!((opened.id(), opened.name()), (made.id(), made.name()));
    assert_eq!(opened.keys()[0].1.expose(), made.keys()[0].1.expose());
    assert_eq!(fs::metadata(folder.join("vault.toml"))?.permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&folder)?.permissions().mode() & 0o777, 0o700);

    for role in [Role::Agent, Role::Relay, Role::Target, Role::Control, Role::Operator] {
        let file = dir.path().join(format!("{role}.toml"));
        opened.issue(role, name("one"), 30)?.write(&file)?;
        assert_eq!(fs::metadata(&file)?.permissions().mode() & 0o777, 0o600);
        let identity = Identity::load(&file)?;
        assert_eq!((identity.vault, identity.role, identity.name.as_str()), (opened.id(), role, "one"));
        assert_eq!(identity.newest_epoch().is_some(), matches!(role, Role::Agent | Role::Target));
    }
    Ok(())
}

#[test]
fn an_agent_has_its_own_keys_only_and_a_target_derives_the_same() -> Outcome {
    let dir = tempfile::tempdir()?;
    let mut vault = Vault::init(dir.path(), name("demo"))?;
    assert_eq!(vault.rotate_key()?, KeyEpoch(2));
    let vault = Vault::open(dir.path())?;
    let load = |role, of| Identity::from_bundle(&vault.issue_at(role, name(of), 30, NOW)?, NOW);
    let (web, db, target) = (load(Role::Agent, "web")?, load(Role::Agent, "db")?, load(Role::Target, "site")?);
    assert_eq!(web.newest_epoch(), Some(KeyEpoch(2)));
    for epoch in [KeyEpoch(1), KeyEpoch(2)] {
        let own = web.host_key(web.host_id(), epoch).ok_or("an agent has its key")?;
        let derived = target.host_key(web.host_id(), epoch).ok_or("a target derives it")?;
        assert_eq!(own.expose(), derived.expose());
        assert!(web.host_key(db.host_id(), epoch).is_none());
    }
    assert!(web.host_key(web.host_id(), KeyEpoch(3)).is_none());
    assert!(matches!(load(Role::Relay, "r")?.keys, Keys::None));
    let shown = format!("{web:?} {vault:?}");
    let secret = web.host_key(web.host_id(), KeyEpoch(1)).ok_or("an agent has its key")?;
    assert!(!shown.contains(&format!("{:02x}{:02x}", secret.expose()[0], secret.expose()[1])), "{shown}");
    Ok(())
}

#[test]
fn certificates_end_on_their_day() -> Outcome {
    let vault = vault("demo");
    let bundle = vault.issue_at(Role::Agent, name("web"), 10, NOW)?;
    assert!(Identity::from_bundle(&bundle, later(9)).is_ok());
    let Err(Error::Expired { who, date }) = Identity::from_bundle(&bundle, later(11)) else {
        return Err("it has expired".into());
    };
    assert_eq!((who.as_str(), date.as_str()), ("agent web", "2026-01-11T00:00:00Z"));
    let early = Identity::from_bundle(&bundle, WallTime(NOW.0 - 2 * DAY_NS));
    assert!(matches!(early, Err(Error::NotYetValid { .. })), "{early:?}");
    for days in [0, 3651] {
        assert!(matches!(vault.issue_at(Role::Agent, name("web"), days, NOW), Err(Error::Setting { .. })));
    }
    Ok(())
}

fn write(path: &Path, text: &str, mode: u32) -> Outcome {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

#[test]
fn files_that_others_can_read_are_refused_with_the_way_out() -> Outcome {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("agent.toml");
    let bundle = vault("demo").issue_at(Role::Agent, name("web"), 10, NOW)?;
    for (mode, good) in [(0o600, true), (0o640, true), (0o644, false), (0o620, false), (0o604, false), (0o606, false)] {
        write(&file, bundle.as_toml(), mode)?;
        match Identity::load_at(&file, NOW) {
            Ok(_) => assert!(good, "{mode:o}"),
            Err(error) => {
                assert!(!good && matches!(error, Error::Exposed { .. }), "{mode:o}: {error}");
                assert!(error.hint().is_some_and(|hint| hint.contains("chmod 600")));
            }
        }
    }
    Ok(())
}

/// The value of a key in a bundle, several lines long or not.
fn value<'a>(document: &'a str, key: &str) -> &'a str {
    let start = document.find(&format!("\n{key} = ")).expect("the key is there") + key.len() + 4;
    let rest = &document[start..];
    let quote = if rest.starts_with("\"\"\"") { "\"\"\"" } else { "\"" };
    let end = rest[quote.len()..].find(quote).expect("the value ends") + 2 * quote.len();
    &rest[..end]
}

#[test]
fn parts_that_do_not_belong_together_are_refused() -> Outcome {
    let (ours, theirs) = (vault("demo"), vault("other"));
    let good = ours.issue_at(Role::Agent, name("web"), 10, NOW)?;
    let foreign = theirs.issue_at(Role::Agent, name("web"), 10, NOW)?;
    let sibling = ours.issue_at(Role::Agent, name("db"), 10, NOW)?;
    let (good, foreign, sibling) = (good.as_toml(), foreign.as_toml(), sibling.as_toml());
    let swap = |key: &str, from: &str| good.replace(value(good, key), value(from, key));
    let cases = [
        ("another vault's CA", swap("ca", foreign), "CA"),
        ("another vault's certificate", swap("certificate", foreign), "document says"),
        ("another agent's certificate", swap("certificate", sibling), "document says"),
        ("another agent's private key", swap("private_key", sibling), "private_key"),
        ("another name", swap("name", sibling), "document says"),
        ("another role", good.replace("role = \"agent\"", "role = \"target\""), "document says"),
        ("an unknown key", format!("more = 1\n{good}"), "more"),
        ("another format", good.replace("format = 1", "format = 2"), "format"),
        ("no data key", good.split("[[keys]]").next().unwrap_or_default().to_owned(), "keys"),
        ("epoch 0", good.replace("epoch = 1", "epoch = 0"), "epochs"),
        ("a short key", good.replace("\nkey = \"", "\nkey = \"0"), "hexadecimal"),
        ("nothing", String::new(), "not a bundle"),
        ("half of it", good[..good.len() / 2].to_owned(), ""),
    ];
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bundle.toml");
    for (what, text, wanted) in cases {
        assert_ne!(text, good, "{what}: the case changes something");
        write(&file, &text, 0o600)?;
        let error = Identity::load_at(&file, NOW).err().ok_or_else(|| format!("{what} was taken"))?.to_string();
        assert!(error.contains(wanted), "{what}: {error}");
        assert!(error.contains("bundle.toml"), "{what}: names the file: {error}");
        assert!(!error.contains("PRIVATE"), "{what}: keeps secrets: {error}");
    }
    Ok(())
}

#[test]
fn a_forged_ca_with_the_right_vault_id_does_not_help() -> Outcome {
    // Method: a CA of the same id, made by another's key, as an attacker would.
    let ours = vault("demo");
    let bundle = ours.issue_at(Role::Agent, name("web"), 10, NOW)?;
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    let uri = rcgen::string::Ia5String::try_from(format!("farshore://{}", ours.id()))?;
    params.subject_alt_names = vec![rcgen::SanType::URI(uri)];
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("Farshore vault {}", ours.id()));
    let forged = params.self_signed(&key)?.pem();
    let text = bundle.as_toml().replace(value(bundle.as_toml(), "ca"), &format!("\"\"\"\n{forged}\"\"\""));
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bundle.toml");
    write(&file, &text, 0o600)?;
    let error = Identity::load_at(&file, NOW).err().ok_or("it was taken")?.to_string();
    assert!(error.contains("not one of our vault's CA"), "{error}");
    Ok(())
}
