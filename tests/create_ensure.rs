//! A create by a name that is there already, row by row: which pod it joins, what it refuses, and what it never does.

use autopod_mcp::fleet::{Fleet, Phase, PodRecord};
use autopod_mcp::provider::PodStatus;
use autopod_mcp::sandbox::ClockMode;
use jiff::SignedDuration;
use reqwest::Method;
use serde_json::{Value, json};

use crate::keeper_support::{Answer, GPU, House, until};

fn record(fleet: &Fleet, name: &str) -> PodRecord {
    fleet.get(name).expect("records").expect("a record")
}

async fn create(house: &House, arguments: Value) -> Answer {
    house.call("create_pod_with_volume", arguments).await
}

async fn until_status(house: &House, name: &str, status: PodStatus) {
    let fleet = house.fleet();
    until(&format!("{status:?}"), async || fleet.get(name).ok()?.filter(|record| record.known.status == Some(status)))
        .await;
}

/// Whatever step the pod is at, the same request finds it, and what is no part of the request makes no difference.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_finds_the_pod_at_each_of_its_steps() {
    let house = House::with(ClockMode::Manual, "home").await;
    let made = house.ok("create_pod_with_volume", json!({ "name": "same", "gpus": [GPU], "wait_seconds": 0 })).await;
    assert_eq!(made["created"], true, "{made}");
    let wishes = [
        json!({ "wait_seconds": 0 }),
        json!({ "wait_seconds": 0, "lifetime_minutes": 30, "idle_minutes": 5 }),
        json!({ "wait_seconds": 0, "max_price_per_hour": 0.5, "confirm_price": 0.4 }),
    ];
    let steps = [
        (PodStatus::Provisioning, 0.0, "starting"),
        (PodStatus::Starting, 2.5, "starting"),
        (PodStatus::Running, 30.0, "running"),
        (PodStatus::Exited, 0.0, "stopped"),
    ];
    for (status, leap, state) in steps {
        house.advance(leap).await;
        if status == PodStatus::Exited {
            let path = format!("/v2/pods/{}/action", house.alive().await[0]["id"].as_str().expect("an id"));
            assert_eq!(house.raw(Method::POST, &path, Some(json!({ "action": "stop" }))).await.0, 200);
        }
        until_status(&house, "same", status).await;
        for wish in &wishes {
            let mut arguments = wish.clone();
            arguments["name"] = json!("same");
            arguments["gpus"] = json!(["RTX A4000"]);
            let found = house.ok("create_pod_with_volume", arguments).await;
            assert_eq!(
                (&found["created"], &found["intent"], &found["state"], &found["expires_at"]),
                (&json!(false), &made["intent"], &json!(state), &json!(record(&house.fleet(), "same").expires_at())),
                "{found}"
            );
            if status == PodStatus::Exited {
                let next = found["next"].as_str().unwrap_or_default();
                assert!(next.contains("control_pod") && next.contains("start"), "{found}");
            }
        }
    }
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    house.end().await;
}

/// Each field of the request by itself; of an environment the names are told and never the values.
#[tokio::test(flavor = "multi_thread")]
async fn another_request_is_refused_with_its_differences() {
    let house = House::hurried().await;
    let there = json!({
        "name": "other", "gpus": [GPU], "volume": "comfy-models", "env": { "MODE": "fast-v4lue", "TOKEN": "first-v4lue" }
    });
    house.ok("create_pod_with_volume", there.clone()).await;
    let asked = |change: Value| {
        let mut arguments = there.clone();
        for (name, value) in change.as_object().expect("an object") {
            arguments[name] = value.clone();
        }
        arguments
    };
    let cases = [
        (json!({ "image": "runpod/comfyui:old" }), "image: runpod/comfyui:latest there, runpod/comfyui:old asked"),
        (json!({ "template": "c0mfyt3mpl" }), "template: none there, c0mfyt3mpl asked"),
        (json!({ "registry": "6n2k8v4d" }), "registry: none there, 6n2k8v4d asked"),
        (json!({ "mount_path": "/models" }), "volume: c0mfym0d3l at /workspace there, c0mfym0d3l at /models asked"),
        (json!({ "gpus": ["RTX 4090"] }), "gpus: NVIDIA RTX A4000 there, NVIDIA GeForce RTX 4090 asked"),
        (json!({ "gpu_count": 2 }), "gpu_count: 1 there, 2 asked"),
        (json!({ "min_vram_gb": 12 }), "min_vram_gb: 0 there, 12 asked"),
        (json!({ "min_cuda": "12.4" }), "min_cuda: none there, 12.4 asked"),
        (json!({ "disk_gb": 50 }), "disk_gb: 40 there, 50 asked"),
        (json!({ "expose_http": true }), "ports: 22/tcp there, 22/tcp, 8188/http asked"),
        (json!({ "env": { "TOKEN": "second-v4lue", "NEW": "1-v4lue" } }), "env: another value of TOKEN"),
        (
            json!({ "env": { "TOKEN": "first-v4lue", "NEW": "1-v4lue" } }),
            "env: MODE there, not asked; env: NEW asked, not there",
        ),
    ];
    for (change, says) in cases {
        let refused = create(&house, asked(change.clone())).await;
        assert_eq!(refused.code, 4, "{change}: {refused:?}");
        refused.assert_says(says);
        refused.assert_says("Still being billed: yes");
        assert!(!refused.stderr.contains("v4lue"), "a value of the environment is told: {refused:?}");
    }
    // Without the volume another cloud can be asked for.
    let mut bare = json!({ "name": "other", "gpus": [GPU], "cloud": "community" });
    let refused = create(&house, bare.clone()).await;
    refused.assert_says("cloud: Secure there, Community asked");
    refused.assert_says("volume: c0mfym0d3l at /workspace there, none asked");
    bare["cloud"] = json!("secure");
    bare["data_centers"] = json!(["US-TX-3"]);
    create(&house, bare).await.assert_says("data_centers: EU-RO-1 there, US-TX-3 asked");
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_in_error_has_to_be_terminated_first() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "error_state" })).await;
    let arguments = json!({ "name": "broken", "gpus": [GPU], "wait_seconds": 40 });
    let first = create(&house, arguments.clone()).await;
    assert_ne!(first.code, 0, "{first:?}");
    first.assert_says("in the state ERROR");
    first.assert_says("Still being billed: yes");
    let again = create(&house, arguments.clone()).await;
    assert_eq!(again.code, 4, "{again:?}");
    again.assert_says("terminate_pod {\"pod\": \"broken\"}");
    assert_eq!(house.asked("createPod"), 1);
    house.ok("terminate_pod", json!({ "pod": "broken" })).await;
    let made = house.ok("create_pod_with_volume", arguments).await;
    assert_eq!((&made["created"], house.alive().await.len()), (&json!(true), 1), "{made}");
    house.end().await;
}

/// A pod that is to end is nobody's any more, whatever is asked for by its name.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_being_terminated_is_never_adopted() {
    let house = House::hurried().await;
    let first = house.create("ending").await;
    house.fault(json!({ "operation": "deletePod", "kind": "status_before", "status": 500, "times": 9999 })).await;
    house.ok("terminate_pod", json!({ "pod": "ending", "wait_seconds": 0 })).await;
    let refused = create(&house, json!({ "name": "ending" })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("is being terminated");
    refused.assert_says("call again when it is gone");
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    assert_eq!(house.raw(Method::DELETE, "/_sandbox/faults", None).await.0, 200);
    until("its end", async || house.fleet().get("ending").ok()?.filter(|record| !record.is_open())).await;
    let second = house.create("ending").await;
    assert_ne!(first, second);
    assert_eq!(house.alive().await.len(), 1);
    house.end().await;
}

/// The POST takes its time: another caller joins it, and another request is told what is in the making.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_intent_is_joined() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 2500 })).await;
    let arguments = json!({ "name": "open", "gpus": [GPU], "wait_seconds": 0 });
    let first = house.ok("create_pod_with_volume", arguments.clone()).await;
    until("the POST", async || (house.asked("createPod") > 0).then_some(())).await;
    let second = house.ok("create_pod_with_volume", arguments).await;
    assert_eq!((&first["created"], &second["created"]), (&json!(true), &json!(false)), "{first} {second}");
    assert_eq!((&first["intent"], &second["state"]), (&second["intent"], &json!("placing")), "{second}");
    assert_eq!(second["still_billing"], "possible", "{second}");
    let other = create(&house, json!({ "name": "open", "gpus": [GPU], "disk_gb": 41 })).await;
    assert_eq!(other.code, 4, "{other:?}");
    other.assert_says("disk_gb: 40 there, 41 asked");
    until_status(&house, "open", PodStatus::Running).await;
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    // In the cloud nobody else has its name.
    let intent = first["intent"].as_str().expect("an intent");
    assert_eq!(house.alive().await[0]["name"], format!("autopod-open-{intent}"));
    house.end().await;
}

/// A create whose pod was made and that nobody can see: the answer was lost, and the list lags for so long.
async fn hidden(house: &House, name: &str, lag: u64) -> PodRecord {
    house.fault(json!({ "operation": "createPod", "kind": "status_after", "status": 500 })).await;
    house.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": lag, "times": 9999 })).await;
    house.ok("create_pod_with_volume", json!({ "name": name, "gpus": [GPU], "wait_seconds": 0 })).await;
    let fleet = house.fleet();
    until("no clear answer", async || fleet.get(name).ok()?.filter(|record| record.known.phase == Phase::Unknown)).await
}

/// The list lacked a pod for ten minutes and shows it then: what took its place lives, and it is ended on sight.
#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_pod_that_turns_up_is_terminated_on_sight() {
    let house = House::new().await;
    let first = hidden(&house, "late", 900).await;
    let retry = json!({ "name": "late", "gpus": [GPU], "wait_seconds": 0, "retry_unknown": first.intent });
    let fleet = house.fleet();
    for leap in [0.0, 300.0] {
        house.advance(leap).await;
        until("a look at the list", async || {
            let record = record(&fleet, "late");
            (record.known.lacked.is_some() && record.lacked_for().as_secs_f64() >= leap).then_some(())
        })
        .await;
        let early = create(&house, retry.clone()).await;
        assert_eq!(early.code, 4, "{early:?}");
        early.assert_says("may still turn up");
        early.assert_says("Still being billed: possibly");
    }
    // Nobody supersedes what he doesn't name, and nobody else's.
    for wrong in [Value::Null, json!("0123456789ab")] {
        let joined = house
            .ok(
                "create_pod_with_volume",
                json!({ "name": "late", "gpus": [GPU], "wait_seconds": 0, "retry_unknown": wrong }),
            )
            .await;
        assert_eq!((&joined["intent"], &joined["state"]), (&json!(first.intent), &json!("unknown")), "{joined}");
    }
    house.advance(301.0).await;
    let ten = SignedDuration::from_mins(10);
    until("ten minutes", async || Some(()).filter(|()| record(&fleet, "late").lacked_for() >= ten)).await;
    let told = house.ok("create_pod_with_volume", json!({ "name": "late", "gpus": [GPU], "wait_seconds": 0 })).await;
    let next = told["next"].as_str().unwrap_or_default();
    assert!(next.contains(&format!("retry_unknown: \"{}\"", first.intent)), "{told}");
    let made = house.ok("create_pod_with_volume", retry).await;
    assert_eq!(made["created"], true, "{made}");
    until("both pods, of which one is hidden", async || (house.alive().await.len() == 2).then_some(())).await;
    house.advance(400.0).await;
    until("the end of the first", async || {
        let record = fleet.of_intent(&first.intent).ok()??;
        (record.known.phase == Phase::Gone).then_some(())
    })
    .await;
    let alive = house.alive().await;
    let name = format!("autopod-late-{}", made["intent"].as_str().expect("an intent"));
    assert_eq!((alive.len(), &alive[0]["name"]), (1, &json!(name)), "{alive:?}");
    assert_eq!(house.asked("createPod"), 2);
    house.end().await;
}

/// Cancelled before anybody knows what came of it; then the pod turns up.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminate_of_an_unknown_create_ends_its_pod_on_sight() {
    let house = House::new().await;
    let unknown = hidden(&house, "cancelled", 120).await;
    let asked = house.ok("terminate_pod", json!({ "pod": "cancelled", "wait_seconds": 0 })).await;
    assert_eq!((&asked["done"], &asked["still_billing"]), (&json!(false), &json!("possible")), "{asked}");
    let refused = create(&house, json!({ "name": "cancelled", "gpus": [GPU] })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("is being terminated");
    refused.assert_says(&format!("retry_unknown: \"{}\"", unknown.intent));
    assert_eq!(house.alive().await.len(), 1, "hidden as yet");
    house.advance(121.0).await;
    house.until_none_alive("the end of the pod that turned up").await;
    let done = house.ok("terminate_pod", json!({ "pod": "cancelled" })).await;
    assert_eq!((&done["done"], house.asked("createPod")), (&json!(true), 1), "{done}");
    house.end().await;
}

/// Who cancelled a create without a clear answer needn't wait for its deadline to use the name again.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_unknown_create_can_be_superseded() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createPod", "kind": "status_before", "status": 500 })).await;
    house.ok("create_pod_with_volume", json!({ "name": "again", "gpus": [GPU], "wait_seconds": 0 })).await;
    let fleet = house.fleet();
    let looked = async || fleet.get("again").ok()?.filter(|record| record.known.lacked.is_some());
    let intent = until("a look at the list", looked).await.intent;
    house.ok("terminate_pod", json!({ "pod": "again", "wait_seconds": 0 })).await;
    // Another request, too: nothing of the old one is wanted.
    let retry = json!({ "name": "again", "gpus": [GPU], "disk_gb": 41, "wait_seconds": 0, "retry_unknown": intent });
    let early = create(&house, retry.clone()).await;
    assert_eq!(early.code, 4, "{early:?}");
    early.assert_says("may still turn up");
    house.advance(601.0).await;
    let ten = SignedDuration::from_mins(10);
    until("ten minutes", async || (record(&fleet, "again").lacked_for() >= ten).then_some(())).await;
    let made = house.ok("create_pod_with_volume", retry).await;
    assert_eq!(made["created"], true, "{made}");
    until("the pod", async || (house.alive().await.len() == 1).then_some(())).await;
    assert_eq!(house.asked("createPod"), 2);
    house.end().await;
}

/// Cancelled while the POST is under way, which makes the pod all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminate_of_an_open_intent_ends_its_pod_on_sight() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 1500 })).await;
    house.ok("create_pod_with_volume", json!({ "name": "hasty", "gpus": [GPU], "wait_seconds": 0 })).await;
    until("the POST", async || (house.asked("createPod") > 0).then_some(())).await;
    let done = house.ok("terminate_pod", json!({ "pod": "hasty" })).await;
    assert_eq!(done["done"], true, "{done}");
    let pods = house.world_pods().await;
    assert_eq!((pods.len(), house.alive().await.len()), (1, 0), "{pods:?}");
    assert_eq!(house.asked("createPod"), 1);
    house.end().await;
}
