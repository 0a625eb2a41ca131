//! The check against RunPod's OpenAPI file finds what it should find.

use reqwest::Method;
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

/// A body, with every value in it, at every depth, replaced by each of some odd ones or taken out.
fn variations(body: &Value) -> Vec<Value> {
    let odd = [
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(7),
        json!(1.5),
        json!(12.0),
        json!(5000),
        json!(""),
        json!("x"),
        json!("12.8"),
        json!([]),
        json!([1]),
        json!(["x"]),
        json!({}),
        json!({ "x": "y" }),
        json!({ "x": 1 }),
    ];
    let mut all = Vec::new();
    for pointer in pointers(body, "") {
        for value in &odd {
            let mut changed = body.clone();
            *changed.pointer_mut(&pointer).expect("a value") = value.clone();
            all.push(changed);
        }
        let Some((parent, key)) = pointer.rsplit_once('/') else { continue };
        let mut without = body.clone();
        if let Some(map) = without.pointer_mut(parent).and_then(Value::as_object_mut) {
            map.remove(key);
            map.insert("bogus".to_owned(), json!(1));
            all.push(without.clone());
            without.pointer_mut(parent).and_then(Value::as_object_mut).expect("the map").remove("bogus");
            all.push(without);
        }
    }
    all
}

fn pointers(value: &Value, here: &str) -> Vec<String> {
    let mut all = vec![here.to_owned()];
    match value {
        Value::Object(map) => all.extend(map.iter().flat_map(|(key, value)| pointers(value, &format!("{here}/{key}")))),
        Value::Array(items) => {
            let items = items.iter().enumerate();
            all.extend(items.flat_map(|(index, value)| pointers(value, &format!("{here}/{index}"))));
        }
        _ => {}
    }
    all
}

/// The sandbox's reading of a body and the schema's agree on what is a 422, neither stricter nor more lenient.
#[tokio::test]
async fn a_body_is_a_422_exactly_when_the_schema_says_so() {
    let Some(spec) = spec() else { return };
    let world = Tested::new().await;
    let mut pod = super::pod_body("comfy");
    pod["args"] = json!("--listen");
    pod["registry"] = Value::Null;
    pod["dataCenterIds"] = json!(["EU-RO-1"]);
    pod["globalNetworking"] = json!(false);
    pod["startJupyter"] = json!(false);
    pod["templateId"] = json!("abc");
    pod["cpu"] = json!({ "id": "cpu5c", "vcpuCount": 4 });
    pod["gpu"] = json!({ "id": "x", "count": 1, "allowedCudaVersions": ["12.8"], "minCudaVersion": "12.4" });
    pod["mounts"] = json!({
        "network": [{ "volumeId": "x", "path": "/w" }], "persistent": { "size": 10, "path": "/v" }
    });
    let volume = json!({ "name": "mine", "size": 20, "dataCenter": "US-KS-2", "type": "STANDARD" });
    for (method, path, body) in [
        (Method::POST, "/v2/pods", pod),
        (Method::POST, "/v2/network-volumes", volume),
        (Method::PATCH, "/v2/network-volumes/c0mfym0d3l", json!({ "name": "models", "size": 200 })),
        (Method::POST, "/v2/pods/nothere/action", json!({ "action": "stop" })),
    ] {
        for body in variations(&body) {
            world.call(method.clone(), path, Some(body)).await;
        }
    }
    let log = world.log().await;
    let violations = check_log(&spec, &log);
    let mut invalid = 0;
    let mut differences = Vec::new();
    for entry in &log {
        // A JSON null as the whole body reads as no body in the log.
        if entry["request_body"].is_null() {
            continue;
        }
        let label = format!("request #{} ", entry["number"]);
        let of_this = violations.iter().filter(|violation| violation.starts_with(&label)).collect::<Vec<_>>();
        let broken = !of_this.is_empty();
        invalid += usize::from(broken);
        if (entry["status"] == 422) != broken {
            let (body, answer) = (&entry["request_body"], &entry["response_body"]);
            differences.push(format!("{body}\n  sandbox: {answer}\n  schema: {of_this:?}"));
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    assert!(invalid > 300 && log.len() - invalid > 100, "{invalid} of {} are invalid", log.len());
    world.finish_rude().await;
}
