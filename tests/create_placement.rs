//! What a create asks the provider for, GPU by GPU, and what becomes of each refusal.

use serde_json::{Value, json};

use crate::caps::set_limits;
use crate::keeper_support::{Answer, GPU, House, tell};

const DEAR: &str = "NVIDIA GeForce RTX 4090";

async fn create(house: &House, arguments: Value) -> Answer {
    house.call("create_pod_with_volume", arguments).await
}

/// The bodies of all creates that were sent.
fn posted(house: &House) -> Vec<Value> {
    let requests = house.sandbox.requests();
    let creates = requests.iter().filter(|entry| entry["operation"] == "createPod");
    creates.map(|entry| entry["request_body"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_reaches_the_wire() {
    let house = House::hurried().await;
    set_limits(
        &house,
        json!({ "max_pods": 9, "max_total_per_hour": 99, "max_price_per_hour": 9, "max_usd_per_day": 999 }),
    );
    let arguments = json!({
        "name": "exact", "gpus": ["rtx 4090", GPU], "gpu_count": 2, "min_cuda": "12.4", "data_centers": ["US-TX-3"],
        "registry": "6n2k8v4d", "disk_gb": 55, "env": { "MODE": "fast", "EMPTY": "" }, "expose_http": true,
        "image": "example/private:1", "confirm_price": 2,
    });
    let made = house.ok("create_pod_with_volume", arguments).await;
    assert_eq!((&made["gpu"], &made["data_center"]), (&json!(DEAR), &json!("US-TX-3")), "{made}");
    let template = json!({ "name": "templated", "template": "30zmvf89kd", "gpus": ["A4000"], "cloud": "community" });
    house.ok("create_pod_with_volume", template).await;
    let mounted = json!({ "name": "mounted", "volume": "datasets", "mount_path": "/data" });
    house.ok("create_pod_with_volume", mounted).await;
    let posted = posted(&house);
    assert_eq!(posted.len(), 3);
    let [exact, templated, mounted] = &posted[..] else { panic!("three") };
    assert_eq!(exact["gpu"], json!({ "id": DEAR, "count": 2, "minCudaVersion": "12.4" }));
    assert_eq!(exact["image"], "example/private:1");
    assert_eq!(exact["dataCenterIds"], json!(["US-TX-3"]));
    assert_eq!(
        (&exact["registry"], &exact["disk"], &exact["cloud"]),
        (&json!("6n2k8v4d"), &json!(55), &json!("SECURE"))
    );
    assert_eq!((&exact["env"]["MODE"], &exact["env"]["EMPTY"]), (&json!("fast"), &json!("")));
    assert_eq!(exact["ports"], json!(["22/tcp", "8188/http"]));
    assert_eq!(exact["startSsh"], true);
    assert!(exact.get("templateId").is_none() && exact.get("args").is_none(), "{exact}");
    assert_eq!((&templated["templateId"], templated.get("image")), (&json!("30zmvf89kd"), None));
    assert_eq!((&templated["gpu"]["id"], &templated["cloud"]), (&json!(GPU), &json!("COMMUNITY")));
    assert_eq!(mounted["mounts"], json!({ "network": [{ "volumeId": "tr4in1ngs3", "path": "/data" }] }));
    assert_eq!((&mounted["dataCenterIds"], &mounted["cloud"]), (&json!(["US-KS-2"]), &json!("SECURE")));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_means_several_gpus_or_none_is_no_choice() {
    let house = House::new().await;
    let ambiguous = create(&house, json!({ "gpus": [GPU, "RTX"] })).await;
    assert_eq!(ambiguous.code, 2, "{ambiguous:?}");
    for word in ["`RTX` is ambiguous", DEAR, "NVIDIA GeForce RTX 3090"] {
        ambiguous.assert_says(word);
    }
    let none = create(&house, json!({ "gpus": ["RTX 4091"] })).await;
    assert_eq!(none.code, 2, "{none:?}");
    none.assert_says("there is no GPU `RTX 4091`");
    none.assert_says("RTX 4090");
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (0, 0));
    house.end().await;
}

/// What can't be is told before anything is asked for or set aside.
#[tokio::test(flavor = "multi_thread")]
async fn what_contradicts_itself_is_refused_before_anything_is_sent() {
    let house = House::new().await;
    let cases = [
        (json!({ "volume": "comfy-models", "cloud": "community" }), 2, "`cloud`: network volumes"),
        (json!({ "volume": "comfy-models", "data_centers": ["US-TX-3"] }), 2, "comfy-models is in EU-RO-1"),
        (json!({ "volume": "no-such-volume" }), 3, "no-such-volume"),
        (json!({ "image": "a:1", "template": "c0mfyt3mpl" }), 2, "an image or a template, not both"),
        (json!({ "mount_path": "workspace" }), 2, "`mount_path`"),
        (json!({ "env": { "PUBLIC_KEY": "mine" } }), 2, "`PUBLIC_KEY` is set by this program or by RunPod"),
        (json!({ "env": { "AUTOPOD_OWNER": "me" } }), 2, "`AUTOPOD_OWNER` is set by this program or by RunPod"),
        (json!({ "env": { "1ST": "x" } }), 2, "`1ST` can't be a variable"),
        (json!({ "min_vram_gb": 200 }), 4, "no GPU with at least 200 GB"),
        (json!({ "lifetime_minutes": 1441 }), 4, "limits.max_lifetime_minutes"),
        (json!({ "name": "Upper" }), 2, "`name`"),
    ];
    for (arguments, code, says) in cases {
        let refused = create(&house, arguments.clone()).await;
        assert_eq!(refused.code, code, "{arguments}: {refused:?}");
        refused.assert_says(says);
    }
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (0, 0));
    house.end().await;
}

/// A create of two GPUs of which the first meets this.
async fn after(fault: Value) -> (House, Answer) {
    let house = House::hurried().await;
    house.fault(fault).await;
    let answer = create(&house, json!({ "name": "tried", "gpus": [GPU, DEAR] })).await;
    (house, answer)
}

async fn skips(fault: Value, says: &str) {
    let (house, answer) = after(fault).await;
    assert_eq!((answer.code, &answer.value["gpu"]), (0, &json!(DEAR)), "{answer:?}");
    let refused = answer.value["refused"].as_array().expect("attempts");
    assert_eq!((refused.len(), &refused[0]["gpu"]), (1, &json!(GPU)), "{answer:?}");
    assert!(refused[0]["outcome"].as_str().is_some_and(|outcome| outcome.contains(says)), "{answer:?}");
    let gpus: Vec<_> = posted(&house).iter().map(|body| body["gpu"]["id"].clone()).collect();
    assert_eq!(gpus, [json!(GPU), json!(DEAR)]);
    // What it has set aside is the price of what it got.
    let record = house.fleet().get("tried").expect("records").expect("a record");
    assert!((record.reserved_per_hour() - 0.69).abs() < 0.001, "{}", record.reserved_per_hour());
    house.end().await;
}

async fn stops(status: u16, says: &str) {
    let (house, answer) = after(json!({ "operation": "createPod", "kind": "status_before", "status": status })).await;
    assert_ne!(answer.code, 0, "{status}: {answer:?}");
    answer.assert_says(says);
    answer.assert_says("Still being billed: no.");
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 0), "{status}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_one_gpu_is_tried_with_the_next() {
    let before = |status: u16| json!({ "operation": "createPod", "kind": "status_before", "status": status });
    let sold_out = json!({ "operation": "createPod", "kind": "no_capacity", "gpu": GPU });
    tokio::join!(skips(before(403), "may not do that"), skips(sold_out, "no longer any instances"), async {
        let (house, answer) = after(before(429)).await;
        assert_eq!((answer.code, &answer.value["gpu"]), (0, &json!(GPU)), "a wait and no refusal: {answer:?}");
        assert_eq!((house.asked("createPod"), answer.value.get("refused")), (2, None), "{answer:?}");
        house.end().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_other_gpu_mends_stops_the_create() {
    tokio::join!(
        stops(401, "refused the API key"),
        stops(402, "balance is too low"),
        stops(422, "rejected the request")
    );
}

/// Each attempt is told with its reason; when all are refused alike it is not the stock.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_all_gpus_are_told_each_or_as_one() {
    let refused = |times: u32, detail: &str| json!({ "operation": "createPod", "kind": "status_before", "status": 400, "times": times, "detail": detail });
    let (alike, each) = tokio::join!(after(refused(2, "this image can't be had")), async {
        let house = House::hurried().await;
        house.fault(refused(1, "the first is broken")).await;
        house.fault(refused(1, "the second is too")).await;
        let answer = create(&house, json!({ "name": "tried", "gpus": [GPU, DEAR] })).await;
        (house, answer)
    });
    for ((house, answer), says) in [
        (alike, vec!["all 2 GPUs were refused alike, so it may be the request", "this image can't be had"]),
        (each, vec![GPU, "the first is broken", DEAR, "the second is too"]),
    ] {
        assert_eq!(answer.code, 5, "{answer:?}");
        for word in says {
            answer.assert_says(word);
        }
        answer.assert_says("Still being billed: no.");
        assert_eq!((house.asked("createPod"), house.alive().await.len()), (2, 0));
        house.end().await;
    }
}

/// The way to the POST is short, for a fresh home with a volume and for one that has made pods before.
#[tokio::test(flavor = "multi_thread")]
async fn a_create_takes_at_most_five_requests_up_to_its_post() {
    let house = House::hurried().await;
    let mut before = 0;
    for (name, what) in [("first", "the first of a home"), ("second", "another one")] {
        house.ok("create_pod_with_volume", json!({ "name": name, "volume": "comfy-models" })).await;
        let requests = house.sandbox.requests().split_off(before);
        let post = requests.iter().position(|entry| entry["operation"] == "createPod").expect("a POST");
        let up_to: Vec<_> = requests[..=post].iter().filter_map(|entry| entry["operation"].as_str()).collect();
        // Those that follow the pods that are there are no part of it.
        let own: Vec<_> = up_to.iter().filter(|operation| before == 0 || **operation != "listPods").copied().collect();
        tell(&format!("create, {what}: {} requests up to its POST: {}", own.len(), own.join(", ")));
        assert!(own.len() <= 5, "{own:?}");
        before = house.sandbox.requests().len();
    }
    house.end().await;
}
