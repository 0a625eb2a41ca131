//! Every pod ends: at its deadline with nothing but the keeper running, and when it is told to, whatever fails.

use std::time::{Duration, Instant};

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{Ensured, Phase};
use autopod_mcp::provider::delete_and_prove;
use jiff::SignedDuration;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::keeper_support::{House, answer, kill, signal, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_by_the_keeper_alone() {
    let house = House::new().await;
    let made = house
        .fleet()
        .ensure("short", house.wish(SignedDuration::from_secs(4)), &Limits::default())
        .await
        .expect("a record");
    assert!(matches!(made, Ensured::New(_)), "{made:?}");
    house.keeper().ensure_and_wake().await.expect("a keeper");
    until("the pod", async || house.alive().await.pop()).await;
    // From here on nobody asks for anything.
    house.until_none_alive("the deadline").await;
    let record = until("the proof", async || {
        house.fleet().get("short").expect("records").filter(|record| record.known.phase == Phase::Gone)
    })
    .await;
    assert_eq!(record.known.ending_cause.as_deref(), Some("its deadline passed"));
    assert!(record.known.cost_usd > 0.0, "{record:?}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_by_the_providers_clock_is_kept_too() {
    let house = House::new().await;
    house.create("leap").await;
    house.advance(4.0 * 3600.0 + 60.0).await;
    house.until_none_alive("the deadline after a leap").await;
    house.end().await;
}

/// The deadline passes while nothing of ours runs; whoever comes next starts the keeper, which ends the pod first.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_missed_by_a_dead_keeper_is_kept_by_the_next() {
    let house = House::new().await;
    house
        .fleet()
        .ensure("missed", house.wish(SignedDuration::from_secs(5)), &Limits::default())
        .await
        .expect("a record");
    house.keeper().ensure_and_wake().await.expect("a keeper");
    until("the pod", async || house.alive().await.pop()).await;
    until("its record", async || house.fleet().get("missed").ok()??.known.pod_id).await;
    let found = house.processes();
    for pid in found.workers.into_iter().chain(found.guards) {
        kill(pid);
    }
    let expires_at = house.fleet().get("missed").expect("records").expect("a record").expires_at();
    until("the deadline", async || (jiff::Timestamp::now() > expires_at).then_some(())).await;
    assert_eq!(house.alive().await.len(), 1);
    house.ok("list_pods", json!({})).await;
    house.until_none_alive("the next keeper").await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_ended_while_its_post_is_in_flight_does_not_stay() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 2500 })).await;
    let create = tokio::spawn(answer(house.command("create_pod_with_volume", &json!({ "name": "early" }))));
    until("the POST", async || (house.asked("createPod") == 1).then_some(())).await;
    let at_once = house.ok("terminate_pod", json!({ "pod": "early", "wait_seconds": 0 })).await;
    assert_eq!((&at_once["state"], &at_once["still_billing"]), (&json!("terminating"), &json!("possible")));
    let done = house.ok("terminate_pod", json!({ "pod": "early" })).await;
    assert_eq!((&done["state"], &done["still_billing"]), (&json!("gone"), &json!("no")), "{done}");
    let create = create.await.expect("a call");
    assert_eq!(create.code, 1, "{create:?}");
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 0));
    assert_eq!(house.world_pods().await.len(), 1, "the POST had gone out");
    house.end().await;
}

/// The keeper hangs: the tool itself ends the pod, within its time, and the hung keeper is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_keeper_does_not_keep_a_pod_alive() {
    let house = House::hurried().await;
    house.create("hung").await;
    let processes = house.processes();
    let worker = house.until_worker().await;
    signal(worker, Signal::STOP);
    let started = Instant::now();
    let call = tokio::spawn(answer(house.command("terminate_pod", &json!({ "pod": "hung", "wait_seconds": 40 }))));
    house.until_none_alive("the tool's own DELETE").await;
    let took = started.elapsed();
    let done = call.await.expect("a call");
    assert_eq!((done.code, &done.value["done"]), (0, &json!(true)), "{done:?}");
    assert!(took < Duration::from_secs(40), "{took:?}");
    // The record is closed by the keeper that takes the hung one's place.
    until("a closed record", async || house.fleet().get("hung").ok()?.filter(|record| !record.is_open())).await;
    assert_ne!(house.worker(), Some(worker), "{processes:?}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ending_that_is_refused_for_a_while_goes_on() {
    let house = House::hurried().await;
    let id = house.create("stubborn").await;
    house.fault(json!({ "operation": "deletePod", "kind": "status_before", "status": 500, "times": 8 })).await;
    let first = house.ok("terminate_pod", json!({ "pod": "stubborn", "wait_seconds": 1 })).await;
    assert_eq!((&first["done"], &first["still_billing"]), (&json!(false), &json!("possible")), "{first}");
    house.until_none_alive("an end in spite of errors").await;
    let done = house.ok("terminate_pod", json!({ "pod": id })).await;
    assert_eq!(done["done"], true, "{done}");
    house.end().await;
}

/// DELETE was done but its answer lost, and the list shows the pod for a while or hides it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_delete_is_asked_again() {
    let house = House::hurried().await;
    house.create("lost").await;
    house.fault(json!({ "operation": "deletePod", "kind": "reset_after" })).await;
    house.fault(json!({ "operation": "listPods", "kind": "status_before", "status": 503, "times": 4 })).await;
    let done = house.ok("terminate_pod", json!({ "pod": "lost" })).await;
    assert_eq!(done["done"], true, "{done}");
    assert_eq!(house.alive().await.len(), 0);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn terminating_twice_is_fine_and_an_unknown_pod_is_named() {
    let house = House::hurried().await;
    let id = house.create("twice").await;
    let both = [
        tokio::spawn(answer(house.command("terminate_pod", &json!({ "pod": "twice" })))),
        tokio::spawn(answer(house.command("terminate_pod", &json!({ "pod": id })))),
    ];
    for call in both {
        let done = call.await.expect("a call");
        assert_eq!((done.code, &done.value["done"]), (0, &json!(true)), "{done:?}");
    }
    let again = house.ok("terminate_pod", json!({ "pod": "twice" })).await;
    assert_eq!((&again["state"], &again["still_billing"]), (&json!("gone"), &json!("no")));
    let unknown = house.call("terminate_pod", json!({ "pod": "nobody" })).await;
    assert_eq!(unknown.code, 3, "{unknown:?}");
    unknown.assert_says("nobody");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_homes_on_one_account_leave_each_others_pods_alone() {
    let mut house = House::hurried().await;
    let mine = house.create("mine").await;
    let second_home = house.folder().join("second");
    let first_home = std::mem::replace(&mut house.home, second_home);
    let theirs = house.create("mine").await;
    assert_ne!(mine, theirs);
    let rows = house.ok("list_pods", json!({})).await;
    let owner = |id: &str| {
        let rows = rows["pods"].as_array().expect("rows");
        rows.iter().find(|row| row["pod_id"] == id).map(|row| row["owner"].clone()).expect("a row")
    };
    assert_eq!((owner(&mine), owner(&theirs)), (json!("other_machine"), json!("ours")));
    let refused = house.call("terminate_pod", json!({ "pod": mine })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("belongs to another machine");
    house.ok("terminate_pod", json!({ "pod": "mine" })).await;
    let alive = house.alive().await;
    assert_eq!((alive.len(), &alive[0]["id"]), (1, &json!(mine)));
    // A pod that nobody of us made needs the argument that says so.
    let body = json!({
        "name": "stranger", "image": "runpod/comfyui:latest", "gpu": { "id": crate::keeper_support::GPU, "count": 1 },
        "cloud": "SECURE", "disk": 40, "ports": ["22/tcp"], "env": {}
    });
    let (status, stranger) = house.raw(Method::POST, "/v2/pods", Some(body)).await;
    assert_eq!(status, 201, "{stranger}");
    let refused = house.call("terminate_pod", json!({ "pod": stranger["id"] })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    let id = &stranger["id"];
    let done = house.ok("terminate_pod", json!({ "pod": id, "allow_unmanaged": true, "confirm_pod_id": id })).await;
    assert_eq!(done["done"], true, "{done}");
    house.end_processes();
    house.home = first_home;
    assert_eq!(house.ok("terminate_pod", json!({ "pod": "mine" })).await["done"], true);
    house.end().await;
}

/// The key of another account must not touch what is recorded here, and nothing recorded is lost by trying.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_key_changes_nothing() {
    let house = House::hurried().await;
    let other = House::hurried().await;
    let id = house.create("kept").await;
    let foreign = async |tool: &str, arguments| {
        let mut command = house.command(tool, &arguments);
        command.env("RUNPOD_API_KEY", other.sandbox.key()).env("RUNPOD_API_BASE_URL", other.sandbox.url());
        answer(command).await
    };
    for (tool, arguments) in [
        ("terminate_pod", json!({ "pod": "kept" })),
        ("create_pod_with_volume", json!({ "name": "another" })),
        ("start_tunnel", json!({ "pod": "kept" })),
    ] {
        let refused = foreign(tool, arguments).await;
        assert_eq!(refused.code, 4, "{tool}: {refused:?}");
        refused.assert_says("another API key or provider");
    }
    assert_eq!(foreign("list_tunnels", json!({})).await.code, 0);
    // Not even when it was lost whose home this is.
    std::fs::remove_file(house.home().home_file()).expect("removed");
    let refused = foreign("create_pod_with_volume", json!({ "name": "another" })).await;
    refused.assert_says("another API key or provider");
    assert!(!house.home().home_file().exists());
    assert_eq!(other.world_pods().await.len(), 0);
    let alive = house.alive().await;
    assert_eq!((alive.len(), &alive[0]["id"]), (1, &json!(id)));
    // The right key still does; after that nothing is open, and the other account may have the home.
    assert_eq!(house.ok("terminate_pod", json!({ "pod": "kept" })).await["done"], true);
    let made = foreign("create_pod_with_volume", json!({ "name": "theirs" })).await;
    assert_eq!((made.code, other.alive().await.len()), (0, 1), "{made:?}");
    let done = foreign("terminate_pod", json!({ "pod": "theirs" })).await;
    assert_eq!((done.code, other.alive().await.len()), (0, 0), "{done:?}");
    house.end().await;
    other.end().await;
}

/// A volume's pod, found again and ended by a later call alone.
#[tokio::test(flavor = "multi_thread")]
async fn an_ending_by_a_later_call_tells_the_cost() {
    let house = House::hurried().await;
    let made = house.ok("create_pod_with_volume", json!({ "name": "paid", "volume": "c0mfym0d3l" })).await;
    assert_eq!(made["volume"]["id"], "c0mfym0d3l", "{made}");
    let done = house.ok("terminate_pod", json!({ "pod": "paid" })).await;
    assert!(done["cost_usd"].as_f64().is_some_and(|cost| cost > 0.0), "{done}");
    assert_eq!(house.processes().ssh.len(), 0);
    house.end().await;
}

/// A record may have been closed by a mistake of the provider's; what it shows alive is ended all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_record_says_gone_and_which_lives_is_ended() {
    let house = House::hurried().await;
    for wanted in ["early", "its id"] {
        let id = house.create("early").await;
        house.end_processes();
        let fleet = house.fleet();
        let intent = fleet.get("early").expect("records").expect("a record").intent;
        fleet.know(&intent, |record| record.known.phase = Phase::Gone).await.expect("a closed record");
        let pod = if wanted == "early" { "early" } else { id.as_str() };
        let ended = house.ok("terminate_pod", json!({ "pod": pod })).await;
        assert_eq!((&ended["done"], &ended["pod_id"]), (&json!(true), &json!(id)), "{ended}");
        assert_eq!(house.alive().await.len(), 0, "by {wanted}");
    }
    house.end().await;
}

/// Right after a create DELETE, page and list may all lack a pod that is there and bills.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_shown_yet_is_not_proven_gone() {
    let house = House::hurried().await;
    let id = house.create("young").await;
    let key = house.sandbox.key().to_owned().into();
    let provider =
        autopod_mcp::app::connect(Some(&house.home()), &house.origin(), "autopod-mcp").expect("a provider")(key);
    house.fault(json!({ "operation": "deletePod", "kind": "status_before", "status": 404 })).await;
    house.fault(json!({ "operation": "getPod", "kind": "status_before", "status": 404, "times": 20 })).await;
    house.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": 100_000, "times": 20 })).await;
    let proven = delete_and_prove(&*provider, &id, true).await.expect("an answer");
    assert!(!proven.value.is_proven, "a pod that isn't shown yet counted as gone");
    assert_eq!(house.alive().await.len(), 1);
    let proven = delete_and_prove(&*provider, &id, true).await.expect("an answer");
    assert!(proven.value.is_proven, "it was ended, and nothing shows it any more");
    assert_eq!(house.alive().await.len(), 0);
    let again = delete_and_prove(&*provider, &id, false).await.expect("an answer");
    assert!(again.value.is_proven, "one that is old enough and nowhere is gone");
    house.end().await;
}
