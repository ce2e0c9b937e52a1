//! Protecting volumes: what is refused, and what a failure leaves behind.

use super::rig::{NO_DRAIN, Rig, protect, protect_at};
use crate::api::ProtectRequest;

const MIB: u64 = 1 << 20;

/// Goal: a source that is known under another path is refused while its own path is missing.
#[test]
fn a_source_is_known_by_more_than_its_path() {
    let rig = Rig::new();
    let (image, moved) = (rig.image("a.img", MIB), rig.path("b.img"));
    let agent = rig.start().expect("starts");
    protect(&agent, &image, "g", "one").expect("protected");
    agent.stop_within(NO_DRAIN).expect("stops");
    drop(agent);
    std::fs::rename(&image, &moved).expect("renamed");

    let agent = rig.start().expect("starts");
    let error = protect(&agent, &moved, "h", "two").expect_err("the same source");
    assert!(error.exit_code() == 4 && error.to_string().contains("g/one"), "{error}");
    assert_eq!(agent.volumes().expect("runs").as_array().map(Vec::len), Some(1));
    agent.stop_within(NO_DRAIN).expect("stops");
}

/// Goal: a `protect` that fails leaves no group, no ring and no alarm. Method: it fails before the group is made, and after.
#[test]
fn a_failed_protect_leaves_nothing() {
    let rig = Rig::new();
    let agent = rig.start().expect("starts");
    let missing = protect(&agent, &rig.path("missing.img"), "g", "one").expect_err("no such file");
    assert_eq!(missing.exit_code(), 3, "{missing}");
    assert!(rig.rings().is_empty(), "{:?}", rig.rings());

    let image = rig.image("a.img", MIB);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let frontend = format!("nbd+tcp:{}", taken.local_addr().expect("bound"));
    protect_at(&agent, &image, "g", "one", Some(&frontend)).expect_err("the port is taken");
    assert!(rig.rings().is_empty(), "{:?}", rig.rings());
    assert_eq!(agent.status(None).expect("status"), serde_json::json!([]));
    assert!(agent.alarms().is_empty(), "{:?}", agent.alarms());
    agent.stop_within(NO_DRAIN).expect("stops");
    drop(agent);

    // Nor does the next start make it.
    let agent = rig.start().expect("starts");
    assert_eq!(agent.status(None).expect("status"), serde_json::json!([]));
    drop(taken);
    protect_at(&agent, &image, "g", "one", Some(&frontend)).expect("the port is free");
    assert_eq!(rig.rings().len(), 1);
    agent.stop_within(NO_DRAIN).expect("stops");
    assert!(rig.rings().is_empty(), "{:?}", rig.rings());
}

/// Goal: names with the same text between them get sockets of their own.
#[test]
fn default_sockets_do_not_collide() {
    let rig = Rig::new();
    let agent = rig.start().expect("starts");
    let first = protect(&agent, &rig.image("a.img", MIB), "a-b", "c").expect("protected");
    let second = protect(&agent, &rig.image("b.img", MIB), "a", "b-c").expect("protected");
    assert_ne!(first["frontend"], second["frontend"]);
    agent.stop_within(NO_DRAIN).expect("stops");
}

/// Goal: the device mapper is refused where it makes no sense or is not there, with the reason, before anything is made. Method: a
/// front end that does not go with it, and an image file on whatever this host is.
#[test]
fn the_device_mapper_is_refused_before_anything_is_made() {
    let rig = Rig::new();
    let agent = rig.start().expect("starts");
    let request = |frontend: Option<&str>| ProtectRequest {
        source: rig.image("a.img", MIB),
        group: "g".into(),
        name: None,
        frontend: frontend.map(str::to_owned),
        dm: true,
    };
    for frontend in ["nbd+tcp:127.0.0.1:0", "ublk:3"] {
        let error = agent.protect(&request(Some(frontend))).expect_err(frontend);
        assert!(error.exit_code() == 2 && error.to_string().contains("--dm"), "{error}");
    }
    let error = agent.protect(&request(None)).expect_err("an image file");
    assert!(matches!(error.exit_code(), 1 | 4) && !error.to_string().is_empty(), "{error}");
    assert!(rig.rings().is_empty() && agent.alarms().is_empty());
    assert_eq!(agent.volumes().expect("runs"), serde_json::json!([]));
    agent.stop_within(NO_DRAIN).expect("stops");
}
