//! Every kind of fault, seen by a client.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{GPU, Tested, answer, pod_body};

impl Tested {
    /// A create that may get no answer.
    async fn try_create(&self, name: &str) -> Result<reqwest::Response, reqwest::Error> {
        self.request(Method::POST, "/v2/pods").json(&pod_body(name)).send().await
    }

    /// A create by a client that soon loses patience; waits until the world is through with it all the same.
    async fn give_up_creating(&self, name: &str) {
        let request = self.request(Method::POST, "/v2/pods").timeout(Duration::from_millis(700));
        let error = request.json(&pod_body(name)).send().await.expect_err("no answer");
        assert!(error.is_timeout(), "{error:?}");
        for _ in 0..300 {
            if self.log().await.first().is_some_and(|entry| entry["injected"] == true) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the request never came to anything");
    }

    async fn last_logged(&self) -> Value {
        self.log().await.pop().expect("a request")
    }
}

#[tokio::test]
async fn a_status_before_or_after_the_deed() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "createPod", "kind": "status_before", "status": 503 })).await;
    let (status, body) = answer(world.try_create("before").await.expect("an answer")).await;
    assert_eq!((status, &body["status"], &body["title"]), (503, &json!(503), &json!("Service Unavailable")));
    assert!(world.list().await.is_empty());

    world.fault(json!({ "operation": "*", "kind": "status_after", "status": 500 })).await;
    assert_eq!(world.try_create("after").await.expect("an answer").status(), 500);
    assert_eq!(world.last_logged().await["injected"], true);
    assert_eq!(world.list().await[0]["name"], "after");
    assert_eq!(world.last_logged().await["injected"], false);
    world.finish().await;
}

#[tokio::test]
async fn a_storm_of_429s_says_how_long_to_wait() {
    let world = Tested::new().await;
    let storm =
        json!({ "operation": "listPods", "kind": "status_before", "status": 429, "times": 3, "retry_after": 7 });
    world.fault(storm).await;
    for _ in 0..3 {
        let response = world.request(Method::GET, "/v2/pods").send().await.expect("an answer");
        assert_eq!((response.status().as_u16(), response.headers()["retry-after"].as_bytes()), (429, &b"7"[..]));
    }
    assert_eq!(world.get("/v2/pods").await.0, 200);
    world.finish().await;
}

#[tokio::test]
async fn the_quota_is_kept() {
    let world = Tested::new().await;
    let lowered = world.call(Method::PUT, "/_sandbox/rate_limit", Some(json!({ "per_minute": 2 }))).await;
    assert_eq!(lowered.0, 200);
    assert_eq!((world.get("/v2/pods").await.0, world.get("/v2/pods").await.0), (200, 200));
    let response = world.request(Method::GET, "/v2/pods").send().await.expect("an answer");
    assert_eq!(response.status(), 429);
    assert!(response.headers()["ratelimit"].to_str().expect("text").starts_with("\"minute\";r=0;t="));
    assert!(response.headers()["retry-after"].to_str().expect("text").parse::<u64>().expect("seconds") >= 1);
    world.finish().await;
}

#[tokio::test]
async fn each_key_has_its_own_quota_which_starts_anew() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    let scoped = world.inner_pod(&id).await["scoped_key"].as_str().expect("a key").to_owned();
    let policy = json!({ "per_minute": 1, "minute_seconds": 2, "per_hour": 100 });
    let (status, body) = world.call(Method::PUT, "/_sandbox/rate_limit", Some(policy)).await;
    assert_eq!((status, &body["per_minute"], &body["per_day"]), (200, &json!(1), &json!(1_000_000)));
    for wrong in [json!({ "minute_seconds": 0 }), json!({ "per_second": 1 })] {
        assert_eq!(world.call(Method::PUT, "/_sandbox/rate_limit", Some(wrong)).await.0, 422);
    }
    let path = format!("/v2/pods/{id}");
    let of_the_pod = || async {
        let request = world.client.get(format!("{}{path}", world.sandbox.url())).bearer_auth(&scoped);
        request.send().await.expect("an answer")
    };
    // The create has used up the account's one, whichever connection it came by.
    let refused = super::client().get(format!("{}{path}", world.sandbox.url())).bearer_auth(world.sandbox.key());
    let refused = refused.send().await.expect("an answer");
    assert_eq!(refused.status(), 429);
    assert_eq!(
        refused.headers()["ratelimit-policy"],
        "\"minute\";q=1;w=2, \"hour\";q=100;w=3600, \"day\";q=1000000;w=86400"
    );
    let first = of_the_pod().await;
    assert_eq!(first.status(), 200);
    assert!(
        first.headers()["ratelimit"].to_str().expect("text").starts_with("\"minute\";r=0;t=2, \"hour\";r=99;t=3600")
    );
    let second = of_the_pod().await;
    assert_eq!(second.status(), 429);
    // Who waits as long as told gets through.
    let wait: u64 = second.headers()["retry-after"].to_str().expect("text").parse().expect("seconds");
    tokio::time::sleep(Duration::from_secs(wait)).await;
    assert_eq!(of_the_pod().await.status(), 200);
    world.finish().await;
}

#[tokio::test]
async fn volumes_meet_faults_too() {
    let world = Tested::new().await;
    let volume = json!({ "name": "models", "size": 20, "dataCenter": "EU-RO-1" });
    world.fault(json!({ "operation": "createNetworkVolume", "kind": "status_after", "status": 502 })).await;
    assert_eq!(world.post("/v2/network-volumes", volume.clone()).await.0, 502);
    world.fault(json!({ "operation": "createNetworkVolume", "kind": "hang_after" })).await;
    let hung = world.request(Method::POST, "/v2/network-volumes").timeout(Duration::from_millis(500)).json(&volume);
    assert!(hung.send().await.expect_err("no answer").is_timeout());
    let (_, listed) = world.get("/v2/network-volumes").await;
    let volumes = listed["volumes"].as_array().or(listed["networkVolumes"].as_array()).expect("volumes");
    // Names are not unique, so both are there.
    let made: Vec<&Value> = volumes.iter().filter(|listed| listed["name"] == "models").collect();
    assert_eq!(made.len(), 2);
    assert_ne!(made[0]["id"], made[1]["id"]);

    let path = format!("/v2/network-volumes/{}", made[0]["id"].as_str().expect("an id"));
    world.fault(json!({ "operation": "updateNetworkVolume", "kind": "status_after" })).await;
    assert_eq!(world.call(Method::PATCH, &path, Some(json!({ "size": 30 }))).await.0, 500);
    world.fault(json!({ "operation": "updateNetworkVolume", "kind": "hang_after" })).await;
    let hung = world.request(Method::PATCH, &path).timeout(Duration::from_millis(500)).json(&json!({ "size": 40 }));
    assert!(hung.send().await.expect_err("no answer").is_timeout());
    assert_eq!(world.get(&path).await.1["size"], 40);
    assert_eq!(world.call(Method::PATCH, &path, Some(json!({ "size": 30 }))).await.0, 400);

    let mut user = pod_body("user");
    user["mounts"] = json!({ "network": [{ "volumeId": made[0]["id"], "path": "/workspace" }] });
    let (status, pod) = world.post("/v2/pods", user).await;
    assert_eq!(status, 201, "{pod}");
    assert_eq!(world.delete(&path).await, 400);
    world.delete(&format!("/v2/pods/{}", pod["id"].as_str().expect("an id"))).await;
    assert_eq!(world.delete(&path).await, 204);
    world.finish().await;
}

#[tokio::test]
async fn no_answer_before_or_after_the_deed() {
    for (kind, done) in [("hang_before", 0), ("hang_after", 1)] {
        let world = Tested::new().await;
        world.fault(json!({ "operation": "createPod", "kind": kind })).await;
        world.give_up_creating("hung").await;
        assert_eq!(world.list().await.len(), done, "{kind}");
        let log = world.log().await;
        assert_eq!((&log[0]["status"], &log[0]["injected"]), (&Value::Null, &json!(true)));
        world.finish().await;
    }
}

#[tokio::test]
async fn the_connection_is_cut_before_or_after_the_deed() {
    for (kind, done) in [("reset_before", 0), ("reset_after", 1)] {
        let world = Tested::new().await;
        world.fault(json!({ "operation": "createPod", "kind": kind })).await;
        let error = world.try_create("cut").await.expect_err("no answer");
        assert!(!error.is_timeout() && !error.is_connect(), "{error:?}");
        assert_eq!(world.list().await.len(), done, "{kind}");
        world.finish().await;
    }
}

#[tokio::test]
async fn an_unreadable_answer_to_a_deed_done() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "createPod", "kind": "garbage" })).await;
    let response = world.try_create("garbled").await.expect("an answer");
    assert_eq!(response.status(), 201);
    assert!(response.json::<Value>().await.is_err());
    assert_eq!(world.list().await.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_client_that_goes_away_doesnt_undo_its_create() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 1500 })).await;
    world.give_up_creating("left").await;
    assert_eq!(world.list().await[0]["name"], "left");
    world.finish().await;
}

#[tokio::test]
async fn a_gpu_can_be_declared_sold_out() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "createPod", "kind": "no_capacity", "gpu": GPU, "times": 2 })).await;
    let mut other = pod_body("other");
    other["gpu"]["id"] = json!("NVIDIA L4");
    assert_eq!(world.post("/v2/pods", other).await.0, 201);
    for _ in 0..2 {
        let (status, body) = world.post("/v2/pods", pod_body("wanted")).await;
        assert_eq!(status, 400);
        assert!(body["detail"].as_str().is_some_and(|text| text.starts_with("There are no longer any instances")));
    }
    let id = world.create("wanted").await;
    world.advance(7.0).await;
    world.act(&id, "stop").await;
    world.fault(json!({ "operation": "podAction", "kind": "no_capacity" })).await;
    assert_eq!(world.act(&id, "start").await.0, 400);
    assert_eq!(world.act(&id, "start").await.0, 200);
    world.finish().await;
}

#[tokio::test]
async fn a_list_can_lag() {
    let world = Tested::new().await;
    let id = world.create("young").await;
    world.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": 30, "times": 3 })).await;
    assert!(world.list().await.is_empty());
    assert_eq!(world.pod(&id).await["name"], "young");
    world.advance(29.0).await;
    assert!(world.list().await.is_empty());
    world.advance(1.0).await;
    assert_eq!(world.list().await.len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn faults_can_be_looked_at_and_taken_back() {
    let world = Tested::new().await;
    world.fault(json!({ "operation": "getPod", "kind": "status_before" })).await;
    assert_eq!(world.get("/_sandbox/faults").await.1["faults"][0]["kind"], "status_before");
    assert_eq!(world.delete("/_sandbox/faults").await, 200);
    world.create("fine").await;
    for never in [
        json!({ "operation": "getPod", "kind": "lagging_list" }),
        json!({ "operation": "getPod", "kind": "garbage", "times": 0 }),
        json!({ "operation": "getPod", "kind": "magic" }),
        json!({ "operation": "getPod", "kind": "garbage", "bogus": 1 }),
        json!({ "operation": "getPod", "kind": "price" }),
        json!({ "operation": "createPod", "kind": "changed_gpu" }),
        json!({ "operation": "podAction", "kind": "changed_gpu", "gpu": "RTX 4090" }),
        json!({ "operation": "createPod", "kind": "elsewhere", "data_center": "MOON-1" }),
        json!({ "operation": "createPod", "kind": "error_state", "stage": "comfy_up" }),
        json!({ "operation": "createPod", "kind": "price", "cost": -1 }),
    ] {
        assert_eq!(world.post("/_sandbox/faults", never.clone()).await.0, 422, "{never}");
    }
    world.finish().await;
}

#[tokio::test]
async fn the_log_has_every_request_with_its_answer() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    world.get("/v2/pods?limit=1").await;
    world.delete(&format!("/v2/pods/{id}")).await;
    let log = world.log().await;
    assert_eq!(log.len(), 3, "control routes are no part of it");
    assert_eq!(
        (&log[0]["method"], &log[0]["path"], &log[0]["status"]),
        (&json!("POST"), &json!("/v2/pods"), &json!(201))
    );
    assert_eq!((&log[0]["request_body"], &log[0]["operation"]), (&pod_body("comfy"), &json!("createPod")));
    assert_eq!((&log[0]["response_body"]["id"], &log[0]["user_agent"]), (&json!(id), &json!("autopod-test")));
    assert_eq!((&log[1]["query"], &log[2]["status"]), (&json!("limit=1"), &json!(204)));
    world.finish().await;
}
