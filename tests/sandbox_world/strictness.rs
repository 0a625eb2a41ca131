//! What the sandbox refuses, and how.

use reqwest::Method;
use serde_json::{Value, json};

use super::{GPU, Tested, answer, pod_body};

const VOLUME: &str = "c0mfym0d3l";

/// The proper create with some fields changed; a null takes the field out.
fn changed(changes: Value) -> Value {
    let mut body = pod_body("comfy");
    for (key, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => {
                body.as_object_mut().expect("an object").remove(key);
            }
            value => body[key] = value.clone(),
        }
    }
    body
}

#[tokio::test]
async fn broken_bodies_are_a_422_that_says_where() {
    let world = Tested::new().await;
    let cases = [
        (json!({ "bogus": 1 }), "$: additional properties 'bogus' not allowed"),
        (json!({ "name": null }), "$: missing property 'name'"),
        (json!({ "name": "" }), "$.name: minLength: got 0, want 1"),
        (json!({ "name": 5 }), "$.name: got number, want string"),
        (json!({ "image": null }), "$: missing property 'image'"),
        (json!({ "disk": "40" }), "$.disk: got string, want integer"),
        (json!({ "disk": 0 }), "$.disk: minimum: got 0, want 1"),
        (json!({ "disk": 1.5 }), "$.disk: got number, want integer"),
        (json!({ "ports": "22/tcp" }), "$.ports: got string, want array"),
        (json!({ "ports": [22] }), "$.ports[0]: got number, want string"),
        (json!({ "env": { "A": 1 } }), "$.env.A: got number, want string"),
        (json!({ "cloud": "secure" }), "$.cloud: value must be one of SECURE, COMMUNITY"),
        (json!({ "startSsh": "yes" }), "$.startSsh: got string, want boolean"),
        (json!({ "gpu": { "id": GPU, "count": 1, "x": 1 } }), "$.gpu: additional properties 'x' not allowed"),
        (json!({ "gpu": { "count": 1 } }), "$.gpu: missing property 'id'"),
        (json!({ "gpu": { "id": GPU, "count": 0 } }), "$.gpu.count: minimum: got 0, want 1"),
        (json!({ "gpu": { "id": GPU, "count": 1, "minCudaVersion": "12" } }), "$.gpu.minCudaVersion: '12' does not"),
        (json!({ "mounts": { "network": [{ "path": "/w" }] } }), "$.mounts.network[0]: missing property 'volumeId'"),
        (
            json!({ "mounts": { "network": [{ "volumeId": "a", "path": "/w" }, { "volumeId": "b", "path": "/v" }] } }),
            "$.mounts.network: maxItems: got 2, want 1",
        ),
        (json!({ "mounts": { "persistent": { "size": 5, "path": "/w" } } }), "$.mounts.persistent.size: minimum"),
        (json!({ "stopAfter": "2026-11-22T00:00:00Z" }), "$: additional properties 'stopAfter' not allowed"),
    ];
    for (changes, wanted) in cases {
        let (status, body) = world.post("/v2/pods", changed(changes.clone())).await;
        assert_eq!((status, &body["status"]), (422, &json!(422)), "{changes}: {body}");
        let errors = body["errors"].as_array().expect("errors");
        assert!(errors.iter().any(|error| error.as_str().is_some_and(|error| error.starts_with(wanted))), "{body}");
    }
    assert!(world.list().await.is_empty());
    world.finish_rude().await;
}

#[tokio::test]
async fn broken_rules_are_a_400() {
    let world = Tested::new().await;
    let network = |volume: &str, path: &str| json!({ "network": [{ "volumeId": volume, "path": path }] });
    let both = json!({
        "network": [{ "volumeId": VOLUME, "path": "/w" }], "persistent": { "size": 10, "path": "/v" }
    });
    let many: Vec<String> = (8000..8011).map(|port| format!("{port}/http")).collect();
    let mounts = |mounts: Value| json!({ "mounts": mounts });
    let cases = [
        (json!({ "image": "" }), 400, "image"),
        (json!({ "gpu": null }), 400, "exactly one of gpu or cpu"),
        (json!({ "cpu": { "id": "cpu5c", "vcpuCount": 4 } }), 400, "exactly one of gpu or cpu"),
        (json!({ "cpu": { "id": "cpu5c", "vcpuCount": 4 }, "gpu": null }), 501, "CPU pods"),
        (json!({ "gpu": { "id": GPU } }), 400, "create pod: There are no instances currently available"),
        (json!({ "gpu": { "id": "RTX 4090", "count": 1 } }), 400, "unknown GPU type"),
        (json!({ "gpu": { "id": GPU, "count": 9 } }), 400, "This machine does not have the resources"),
        (json!({ "gpu": { "id": "NVIDIA H100 80GB HBM3", "count": 1 } }), 400, "There are no longer any instances"),
        (json!({ "gpu": { "id": "NVIDIA GeForce RTX 3070", "count": 1 } }), 400, "could not find any pods"),
        (json!({ "gpu": { "id": GPU, "count": 1, "minCudaVersion": "13.5" } }), 400, "could not find any pods"),
        (
            json!({ "gpu": { "id": GPU, "count": 1, "minCudaVersion": "12.8", "allowedCudaVersions": ["12.8"] } }),
            400,
            "mutually exclusive",
        ),
        (json!({ "ports": ["22"] }), 400, "is not a port"),
        (json!({ "ports": ["53/udp"] }), 400, "is not a port"),
        (json!({ "ports": many }), 400, "at most 10 HTTP ports"),
        (json!({ "dataCenterIds": ["MOON-1"] }), 400, "unknown data center"),
        (json!({ "dataCenterIds": ["EUR-IS-1"] }), 400, "There are no longer any instances"),
        (mounts(both), 400, "mutually exclusive"),
        (mounts(network("nothere", "/w")), 404, "not found"),
        (mounts(network(VOLUME, "workspace")), 400, "must be absolute"),
        (json!({ "mounts": network(VOLUME, "/w"), "cloud": "COMMUNITY" }), 400, "secure cloud only"),
        (json!({ "mounts": network(VOLUME, "/w"), "dataCenterIds": ["US-KS-2"] }), 400, "not in dataCenterIds"),
        (json!({ "templateId": "abc" }), 404, "template not found"),
    ];
    for (changes, status, wanted) in cases {
        let (got, body) = world.post("/v2/pods", changed(changes.clone())).await;
        assert_eq!(got, status, "{changes}: {body}");
        assert!(body["detail"].as_str().is_some_and(|detail| detail.contains(wanted)), "{changes}: {body}");
    }
    assert!(world.list().await.is_empty());
    world.finish().await;
}

#[tokio::test]
async fn only_the_key_opens() {
    let world = Tested::new().await;
    let url = format!("{}/v2/pods", world.sandbox.url());
    let (status, body) = answer(world.client.get(&url).send().await.expect("an answer")).await;
    assert_eq!((status, &body["detail"]), (401, &json!("missing bearer token")));
    for wrong in ["", "rpa_wrong"] {
        assert_eq!(world.client.get(&url).bearer_auth(wrong).send().await.expect("an answer").status(), 401);
    }
    let in_query = format!("{url}?api_key={}", world.sandbox.key());
    assert_eq!(world.client.get(in_query).send().await.expect("an answer").status(), 401);
    let nameless = world.request(Method::GET, "/v2/pods").header("user-agent", "").send().await.expect("an answer");
    assert_eq!(nameless.status(), 403);
    let log = serde_json::to_string(&world.log().await).expect("text");
    assert!(!log.contains("Bearer") && !log.contains("rpa_wrong"), "a key is in the log");
    world.finish_rude().await;
}

#[tokio::test]
async fn what_is_missing_is_a_loud_501() {
    let world = Tested::new().await;
    for (method, path) in
        [(Method::GET, "/v2/serverless"), (Method::PATCH, "/v2/pods/abc"), (Method::PUT, "/v2/account/ssh-keys")]
    {
        let (status, body) = world.call(method.clone(), path, None).await;
        assert_eq!((status, &body["title"]), (501, &json!("Not Implemented")));
        let detail = body["detail"].as_str().expect("a detail");
        assert!(detail.contains(method.as_str()) && detail.contains(path), "{detail}");
    }
    assert_eq!(world.get("/v1/pods").await.0, 501);
    assert_eq!(world.post("/graphql", json!({})).await.0, 501);
    world.finish_rude().await;
}

#[tokio::test]
async fn bodies_must_be_json_and_parameters_known() {
    let world = Tested::new().await;
    let raw = |kind: &'static str, body: &'static str| {
        world.request(Method::POST, "/v2/pods").header("content-type", kind).body(body).send()
    };
    assert_eq!(raw("application/json", "{").await.expect("an answer").status(), 400);
    assert_eq!(raw("text/plain", "{}").await.expect("an answer").status(), 415);
    assert_eq!(raw("application/json", "").await.expect("an answer").status(), 400);
    assert_eq!(raw("application/json", "[]").await.expect("an answer").status(), 422);
    let huge = world.request(Method::POST, "/v2/pods").body(vec![b' '; 2 << 20]).send().await.expect("an answer");
    assert_eq!(huge.status(), 413);
    for path in ["/v2/pods?bogus=1", "/v2/pods?limit=0", "/v2/pods?includeClusterPods=maybe", "/v2/pods?cursor=x"] {
        assert_eq!(world.get(path).await.0, 422, "{path}");
    }
    let id = world.create("comfy").await;
    assert_eq!(world.act(&id, "explode").await.0, 422);
    assert_eq!(world.post(&format!("/v2/pods/{id}/action"), json!({ "action": "stop", "x": 1 })).await.0, 422);
    assert_eq!(world.act("nothere", "stop").await.0, 404);
    world.finish_rude().await;
}

#[tokio::test]
async fn a_pods_own_key_is_good_for_its_pod_alone() {
    let world = Tested::new().await;
    let (own, other) = (world.create("own").await, world.create("other").await);
    world.advance(10.0).await;
    let state = world.get("/_sandbox/pods").await.1;
    let key = state["pods"][0]["scoped_key"].as_str().expect("a key").to_owned();
    let with_key = |method: Method, path: String| {
        world.client.request(method, format!("{}{path}", world.sandbox.url())).bearer_auth(&key)
    };
    assert_eq!(with_key(Method::GET, "/v2/pods".to_owned()).send().await.expect("an answer").status(), 403);
    let wrong = with_key(Method::DELETE, format!("/v2/pods/{other}")).send().await.expect("an answer");
    assert_eq!(wrong.status(), 403);
    for action in ["start", "stop", "restart"] {
        let action = with_key(Method::POST, format!("/v2/pods/{own}/action")).json(&json!({ "action": action }));
        assert_eq!(action.send().await.expect("an answer").status(), 403);
    }
    for path in ["/logs", ""] {
        let status = with_key(Method::GET, format!("/v2/pods/{own}{path}")).send().await.expect("an answer").status();
        assert_eq!(status, if path.is_empty() { 200 } else { 403 });
    }
    assert_eq!(
        with_key(Method::POST, "/v2/pods".to_owned()).json(&pod_body("x")).send().await.expect("an answer").status(),
        403
    );
    let action = with_key(Method::POST, format!("/v2/pods/{own}/action")).json(&json!({ "action": "terminate" }));
    assert_eq!(action.send().await.expect("an answer").status(), 204);
    // What waits in the pod for its end reads that it is gone, and not that its key is wrong.
    for (method, path) in [(Method::GET, own.clone()), (Method::DELETE, own.clone())] {
        let gone = with_key(method, format!("/v2/pods/{path}")).send().await.expect("an answer");
        assert_eq!(gone.status(), 404);
    }
    let again = with_key(Method::POST, format!("/v2/pods/{own}/action")).json(&json!({ "action": "terminate" }));
    assert_eq!(again.send().await.expect("an answer").status(), 404);
    assert_eq!(with_key(Method::GET, format!("/v2/pods/{other}")).send().await.expect("an answer").status(), 403);
    world.finish().await;
}
