//! The check against RunPod's OpenAPI file finds what it should find.

use serde_json::{Value, json};

use super::Tested;
use crate::support::openapi::{check_log, spec};

#[tokio::test]
async fn a_broken_answer_or_request_is_found() {
    let Some(spec) = spec() else { return };
    let world = Tested::new().await;
    world.create("comfy").await;
    world.get("/v2/pods?includeClusterPods=true&limit=5").await;
    let log = world.log().await;
    assert_eq!(check_log(&spec, &log), Vec::<String>::new());

    let violations = |change: &dyn Fn(&mut Value)| {
        let mut create = log[0].clone();
        change(&mut create);
        check_log(&spec, &[create])
    };
    let found = |change: &dyn Fn(&mut Value), wanted: &str| {
        let violations = violations(change);
        assert!(violations.iter().any(|violation| violation.starts_with(wanted)), "{wanted}: {violations:?}");
    };
    found(&|entry| drop(entry["response_body"].as_object_mut().expect("a pod").remove("cost")), "answer");
    found(&|entry| entry["response_body"]["status"] = json!("DREAMING"), "answer");
    found(&|entry| entry["response_body"]["createdAt"] = json!("yesterday"), "answer");
    found(&|entry| entry["response_body"]["mounts"] = json!({ "bogus": 1 }), "answer");
    found(&|entry| entry["content_type"] = json!("text/html"), "answer");
    found(&|entry| entry["request_body"]["bogus"] = json!(1), "request");
    found(&|entry| entry["request_body"]["gpu"]["bogus"] = json!(1), "request");
    found(&|entry| drop(entry["request_body"].as_object_mut().expect("a body").remove("image")), "request");
    found(&|entry| entry["request_body"] = Value::Null, "request");
    found(&|entry| entry["query"] = json!("bogus=1"), "request");
    found(&|entry| entry["path"] = json!("/v1/pods"), "request");

    // An answer made by a fault is nobody's; the request still counts.
    let injected = |entry: &mut Value| {
        entry["injected"] = json!(true);
        entry["response_body"] = json!("garbage");
    };
    assert_eq!(violations(&injected), Vec::<String>::new());
    found(
        &|entry| {
            injected(entry);
            entry["request_body"]["bogus"] = json!(1);
        },
        "request",
    );
    world.finish().await;
}
