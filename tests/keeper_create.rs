//! One pod a name, whatever happens to the create.

use std::collections::BTreeSet;

use autopod_mcp::fleet::Phase;
use reqwest::Method;
use serde_json::{Value, json};

use crate::keeper_support::{House, answer, kill, until};

#[tokio::test(flavor = "multi_thread")]
async fn eight_processes_at_once_make_one_pod() {
    let house = House::hurried().await;
    let calls = (0..8).map(|_| {
        tokio::spawn(answer(house.command("create_pod_with_volume", &json!({ "name": "one", "wait_seconds": 40 }))))
    });
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        answers.push(call.await.expect("a call"));
    }
    assert!(answers.iter().all(|answer| answer.code == 0), "{answers:?}");
    let ids: BTreeSet<_> = answers.iter().map(|answer| answer.value["pod_id"].to_string()).collect();
    let created = answers.iter().filter(|answer| answer.value["created"] == true).count();
    assert_eq!((ids.len(), created, house.asked("createPod")), (1, 1, 1), "{answers:?}");
    assert_eq!(house.alive().await.len(), 1);
    let processes = house.processes();
    assert_eq!((processes.guards.len(), processes.workers.len()), (1, 1), "{processes:?}");
    house.end().await;
}

/// What a fault at the create comes to: the answer, and that there is one pod at most.
struct Outcome {
    answer: Value,
    stderr: String,
    code: i32,
    posts: usize,
    alive: usize,
}

/// One create, in a home and a world of its own, with the fault before it.
async fn create_with(fault: Value, arguments: Value) -> (House, Outcome) {
    let house = House::hurried().await;
    house.fault(fault).await;
    let answer = house.call("create_pod_with_volume", arguments).await;
    let outcome = Outcome {
        posts: house.asked("createPod"),
        alive: house.alive().await.len(),
        answer: answer.value,
        stderr: answer.stderr,
        code: answer.code,
    };
    (house, outcome)
}

pub async fn is_adopted_after(fault: Value) {
    let (house, outcome) = create_with(fault.clone(), json!({ "name": "lost", "wait_seconds": 40 })).await;
    assert_eq!(
        (outcome.code, outcome.posts, outcome.alive),
        (0, 1, 1),
        "{fault}: {} {}",
        outcome.answer,
        outcome.stderr
    );
    let alive = house.alive().await;
    assert_eq!(outcome.answer["pod_id"], alive[0]["id"], "{fault}");
    assert_eq!(outcome.answer["still_billing"], "yes", "{fault}");
    // The same request again finds the same pod.
    let again = house.ok("create_pod_with_volume", json!({ "name": "lost" })).await;
    assert_eq!((&again["pod_id"], &again["created"]), (&alive[0]["id"], &json!(false)), "{fault}");
    assert_eq!(house.asked("createPod"), 1, "{fault}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_create_had_no_clear_answer_is_adopted() {
    tokio::join!(
        is_adopted_after(json!({ "operation": "createPod", "kind": "status_after", "status": 500 })),
        is_adopted_after(json!({ "operation": "createPod", "kind": "reset_after" })),
        is_adopted_after(json!({ "operation": "createPod", "kind": "garbage" })),
        is_adopted_after(json!({ "operation": "createPod", "kind": "hang_after" })),
    );
}

/// An answer that says nothing about a pod that was not made: it stays unknown, is never POSTed again, and money stays
/// reserved until a terminate has waited for it to turn up.
pub async fn stays_unknown_after(fault: Value) {
    let (house, outcome) = create_with(fault.clone(), json!({ "name": "lost", "wait_seconds": 0 })).await;
    assert_eq!(outcome.code, 0, "{fault}: {} {}", outcome.answer, outcome.stderr);
    until("no clear answer", async || {
        house.fleet().get("lost").expect("records").filter(|record| record.known.phase == Phase::Unknown)
    })
    .await;
    let answer = house.ok("create_pod_with_volume", json!({ "name": "lost", "wait_seconds": 0 })).await;
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 0), "{fault}");
    assert_eq!((&answer["state"], &answer["done"]), (&json!("unknown"), &json!(false)), "{fault}");
    assert_eq!(answer["still_billing"], "possible", "{fault}");
    assert!(answer["reserved_usd"].as_f64().is_some_and(|usd| usd > 0.0), "{answer}");
    let again = house.ok("create_pod_with_volume", json!({ "name": "lost", "wait_seconds": 1 })).await;
    assert_eq!((&again["created"], &again["still_billing"]), (&json!(false), &json!("possible")), "{fault}");
    let ending = house.ok("terminate_pod", json!({ "pod": "lost", "wait_seconds": 1 })).await;
    assert_eq!((&ending["done"], &ending["still_billing"]), (&json!(false), &json!("possible")), "{fault}");
    // Five hours later the list has lacked it for long enough.
    house.advance(5.0 * 3600.0).await;
    until("the end of an unknown pod", async || {
        house.fleet().get("lost").expect("records").filter(|record| record.known.phase == Phase::Gone)
    })
    .await;
    assert_eq!(house.asked("createPod"), 1, "{fault}");
    // Now the name is free again.
    let new = house.ok("create_pod_with_volume", json!({ "name": "lost" })).await;
    assert_eq!((&new["created"], house.alive().await.len()), (&json!(true), 1), "{fault}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_without_a_clear_answer_and_without_a_pod_stays_unknown() {
    tokio::join!(
        stays_unknown_after(json!({ "operation": "createPod", "kind": "status_before", "status": 500 })),
        stays_unknown_after(json!({ "operation": "createPod", "kind": "reset_before" })),
        stays_unknown_after(json!({ "operation": "createPod", "kind": "hang_before" })),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_without_stock_is_followed_by_the_next() {
    let gpus = json!(["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090"]);
    let fault = json!({ "operation": "createPod", "kind": "no_capacity", "gpu": "NVIDIA RTX A4000" });
    let (house, outcome) = create_with(fault, json!({ "name": "next", "gpus": gpus })).await;
    assert_eq!((outcome.code, outcome.posts, outcome.alive), (0, 2, 1), "{} {}", outcome.answer, outcome.stderr);
    assert_eq!(outcome.answer["gpu"], "NVIDIA GeForce RTX 4090");
    assert_eq!(outcome.answer["refused"][0]["gpu"], "NVIDIA RTX A4000", "{}", outcome.answer);
    house.end().await;
}

async fn is_refused_by(status: u16, says: &str) {
    let fault = json!({ "operation": "createPod", "kind": "status_before", "status": status });
    let (house, outcome) = create_with(fault, json!({ "name": "poor" })).await;
    assert_eq!((outcome.code, outcome.posts, outcome.alive), (5, 1, 0), "{status}: {}", outcome.stderr);
    assert!(outcome.stderr.contains(says), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("Still being billed: no."), "{}", outcome.stderr);
    // A definite refusal leaves nothing behind that would stand in the way.
    let made = house.ok("create_pod_with_volume", json!({ "name": "poor" })).await;
    assert_eq!((&made["created"], house.alive().await.len()), (&json!(true), 1));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_account_makes_no_pod_and_says_so() {
    tokio::join!(is_refused_by(401, "refused the API key"), is_refused_by(402, "balance is too low"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rate_limit_is_waited_for() {
    let fault = json!({ "operation": "createPod", "kind": "status_before", "status": 429, "retry_after": 2 });
    let (house, outcome) = create_with(fault, json!({ "name": "patient" })).await;
    assert_eq!((outcome.code, outcome.posts, outcome.alive), (0, 2, 1), "{} {}", outcome.answer, outcome.stderr);
    house.end().await;
}

/// The worker dies while the answer to its POST is awaited; the guard's next one finds the pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_killed_between_the_post_and_its_answer_adopts_the_pod() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "hang_after" })).await;
    let call = tokio::spawn(answer(house.command("create_pod_with_volume", &json!({ "name": "cut" }))));
    until("the pod in the world", async || (!house.alive().await.is_empty()).then_some(())).await;
    let worker = house.until_worker().await;
    kill(worker);
    let made = call.await.expect("a call");
    assert_eq!(made.code, 0, "{made:?}");
    assert_ne!(house.worker(), Some(worker));
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    assert_eq!(made.value["pod_id"], house.alive().await[0]["id"]);
    house.end().await;
}

/// A list that lags behind must not make a create be repeated or a pod be forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn a_lagging_list_hides_a_pod_for_a_while_only() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "status_after", "status": 502 })).await;
    house.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": 3600, "times": 4 })).await;
    let made = house.ok("create_pod_with_volume", json!({ "name": "late" })).await;
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));
    assert_eq!(made["pod_id"], house.alive().await[0]["id"]);
    assert_eq!(house.raw(Method::GET, "/_sandbox/faults", None).await.1["faults"], json!([]));
    house.end().await;
}
