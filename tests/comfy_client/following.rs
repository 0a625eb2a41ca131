//! Following a run, with everything that can go wrong on the way.

use std::time::Duration;

use autopod_mcp::comfy::ComfyTimeouts;
use autopod_mcp::comfy::jobs::{DriveOptions, JobState, drive};
use autopod_mcp::comfy::watch::{Outcome, Progress, Watch, watch};
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::scripted::{Server, client_at, timeouts};
use super::{Home, saved_image, start, submit_one, workflow};

#[tokio::test]
async fn losing_the_socket_loses_nothing() {
    let server = Server::start().await;
    let client = server.client();
    let (id, client_id) = submit_one(&server, &client).await;
    let following = watch(&client, &id, &client_id, None, |_| {});
    let script = async {
        server.until("a socket", |world| !world.sockets.is_empty()).await;
        server.begin();
        server.cut_sockets();
        server.until("a second socket", |world| world.sockets.len() > 1).await;
        server.cut_sockets();
        server.finish(saved_image("", "x.png"));
    };
    let (outcome, ()) = tokio::join!(following, script);
    assert!(matches!(outcome.unwrap(), Outcome::Done(entry) if entry.outputs.contains_key("2")));
}

#[tokio::test]
async fn the_end_is_what_history_says_not_what_the_socket_says() {
    let server = Server::start().await;
    let client = server.client();
    let client_id = Uuid::new_v4().simple().to_string();
    let opened = Watch::open(&client, &client_id, workflow().classes()).await;
    let id = client.submit(Uuid::new_v4(), &client_id, &workflow()).await.unwrap().prompt_id;
    server.begin();
    server.tell("execution_error", json!({"prompt_id": id, "exception_type": "ExecutionBlocked", "node_id": "1"}));
    server.tell("execution_success", json!({"prompt_id": id}));
    let script = async {
        let looks = server.world().requests.len();
        server.until("looks after the end was told", |world| world.requests.len() > looks + 6).await;
        let error = json!({"node_id": "2", "node_type": "SaveImage", "exception_message": "no space",
            "exception_type": "OSError", "traceback": ["line 1"], "current_inputs": {"x": "<NaN>"}});
        server.end(json!({}), json!({"status_str": "error", "messages": [["execution_error", error]]}));
    };
    let (outcome, ()) = tokio::join!(opened.follow(&id, None, |_| {}), script);
    let Outcome::Failed(failure, entry) = outcome.unwrap() else { panic!("not failed") };
    assert_eq!(failure.to_string(), "node 2 (SaveImage) failed: OSError: no space");
    // Python's NaN was on the wire and is readable.
    assert_eq!(entry.messages[0].1["current_inputs"]["x"], Value::Null);
}

#[tokio::test]
async fn a_prompt_that_is_nowhere_is_lost_and_never_done() {
    let server = Server::start().await;
    let (home, mut job) = Home::new();
    let client = server.client();
    // Far away: only there so that a client that never notices fails instead of hanging.
    let options = DriveOptions { until: Some(Instant::now() + Duration::from_secs(30)), ..DriveOptions::default() };
    let driving = drive(&client, &mut job, Some(start()), options, |_| {});
    let script = async {
        server.until("submitted", |world| !world.pending.is_empty()).await;
        server.begin();
        // A restarted server remembers nothing.
        server.world().running.clear();
        server.cut_sockets();
    };
    tokio::join!(driving, script).0.unwrap();
    assert_eq!(home.record().state, JobState::Lost);
    assert!(home.record().error.unwrap().contains("restarted"));
}

#[tokio::test]
async fn an_interrupted_run_is_told_as_such() {
    let server = Server::start().await;
    let client = server.client();
    let (id, client_id) = submit_one(&server, &client).await;
    assert!(!client.interrupt(&id).await.unwrap(), "it was pending, not running");
    assert!(!client.delete_pending("another").await.unwrap());
    server.begin();
    let messages = json!([["execution_interrupted", {"prompt_id": id, "node_id": "2"}]]);
    server.end(json!({}), json!({"status_str": "error", "messages": messages}));
    let outcome = watch(&client, &id, &client_id, None, |_| {}).await.unwrap();
    assert!(matches!(outcome, Outcome::Interrupted(_)));

    client.submit(Uuid::new_v4(), "c", &workflow()).await.unwrap();
    let second = client.queue().await.unwrap().pending.remove(0);
    assert_eq!((second.position, second.nodes, second.client_id.as_deref()), (1, 2, Some("c")));
    assert!(client.delete_pending(&second.prompt_id).await.unwrap());
    assert!(server.world().pending.is_empty());
}

#[tokio::test]
async fn a_socket_that_went_silent_is_opened_again() {
    let server = Server::start().await;
    server.world().deaf = true;
    let client = client_at(&server.url, ComfyTimeouts { ping: Duration::from_millis(20), ..timeouts() });
    let (id, client_id) = submit_one(&server, &client).await;
    let (steps, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let following = watch(&client, &id, &client_id, None, |progress| steps.send(progress.clone()).unwrap());
    let script = async {
        server.until("a socket", |world| !world.sockets.is_empty()).await;
        server.world().deaf = false;
        server.until("a second socket", |world| world.sockets.len() > 1).await;
        server.begin();
        // What a server says to a socket that comes back bears no prompt's id.
        server.tell("executing", json!({"node": "2"}));
        loop {
            if let Some(Progress::Running { node: Some(node), .. }) = seen.recv().await {
                assert_eq!(node, "2");
                break;
            }
        }
        server.finish(json!({}));
    };
    let (outcome, ()) = tokio::join!(following, script);
    assert!(matches!(outcome.unwrap(), Outcome::Done(_)));
}

#[tokio::test]
async fn an_outage_is_told_and_outlived() {
    let server = Server::start().await;
    let patient = ComfyTimeouts { give_up: Duration::from_secs(60), ..timeouts() };
    let client = client_at(&server.url, patient);
    let (id, client_id) = submit_one(&server, &client).await;
    let (steps, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let following = watch(&client, &id, &client_id, None, |progress| steps.send(progress.clone()).unwrap());
    let script = async {
        server.world().outage = true;
        while !matches!(seen.recv().await, Some(Progress::OutOfContact { .. })) {}
        server.begin();
        server.world().outage = false;
        while !matches!(seen.recv().await, Some(Progress::Running { .. })) {}
        server.finish(json!({}));
    };
    let (outcome, ()) = tokio::join!(following, script);
    assert!(matches!(outcome.unwrap(), Outcome::Done(_)));
}
