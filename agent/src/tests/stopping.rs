//! Stops that somebody is in the way of.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::yield_now;

use super::rig::{NO_DRAIN, Rig, protect};
use crate::api;

const MIB: u64 = 1 << 20;

/// Goal: a request that waits does not keep a group from stopping in order; it ends, and says why. None comes in afterwards.
#[test]
fn a_waiting_request_ends_with_the_agent() {
    let rig = Rig::new();
    let image = rig.image("a.img", MIB);
    let agent = rig.start().expect("starts");
    protect(&agent, &image, "g", "one").expect("protected");
    std::thread::scope(|scope| {
        // There is no target, so no point comes. (Where the stop is first, it hears the same.)
        let waiting = scope.spawn(|| agent.point("g", None, None));
        while agent.requests_inside() == 0 && !waiting.is_finished() {
            std::thread::yield_now();
        }
        agent.stop_within(NO_DRAIN).expect("stops in order");
        let error = waiting.join().expect("no panic").expect_err("no point");
        assert!(error.to_string().contains("stopping"), "{error}");
    });
    assert!(rig.rings().is_empty(), "{:?}", rig.rings());
    let error = protect(&agent, &rig.image("b.img", MIB), "h", "two").expect_err("it has stopped");
    assert!(error.to_string().contains("stopping"), "{error}");
    assert!(rig.rings().is_empty(), "{:?}", rig.rings());
}

/// Goal: a ring file that is gone does not fail a stop.
#[test]
fn a_ring_that_is_gone_is_removed() {
    let rig = Rig::new();
    let image = rig.image("a.img", MIB);
    let agent = rig.start().expect("starts");
    protect(&agent, &image, "g", "one").expect("protected");
    for ring in rig.rings() {
        std::fs::remove_file(ring).expect("it is there");
    }
    agent.stop_within(NO_DRAIN).expect("stops in order");
    drop(agent);
    // All of it was kept.
    let agent = rig.start().expect("starts");
    assert_eq!(agent.volumes().expect("runs").as_array().map(Vec::len), Some(1));
    agent.stop_within(NO_DRAIN).expect("stops in order");
}

/// Goal: the admin server ends while somebody waits for a point without a limit.
#[test]
fn a_waiting_request_does_not_keep_the_server() {
    let rig = Rig::new();
    let agent = Arc::new(rig.start().expect("starts"));
    protect(&agent, &rig.image("a.img", MIB), "g", "one").expect("protected");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (stop, stopped) = oneshot::channel();
        let (served, socket) = (Arc::clone(&agent), rig.path("admin.sock"));
        let server = tokio::spawn(async move { api::serve(served, &socket, stopped).await });
        let mut client = loop {
            match UnixStream::connect(rig.path("admin.sock")).await {
                Ok(client) => break client,
                Err(_) => yield_now().await,
            }
        };
        let body = r#"{"group":"g"}"#;
        let head = "POST /v1/wait HTTP/1.1\r\nhost: agent\r\ncontent-type: application/json";
        let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        client.write_all(request.as_bytes()).await.expect("the server reads");
        while agent.requests_inside() == 0 {
            yield_now().await;
        }
        stop.send(()).expect("the server runs");
        server.await.expect("no panic").expect("ends in order");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("an answer, and the end");
        assert!(answer.contains("stopping"), "{answer}");
    });
    agent.stop_within(NO_DRAIN).expect("stops in order");
}
