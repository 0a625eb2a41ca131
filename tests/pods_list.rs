//! What is there is shown as the provider tells it, with what our records add.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};

use crate::keeper_support::{GPU, House, until};

/// A pod that somebody else made: another home, or nobody of ours.
async fn foreign(house: &House, name: &str, env: Value) -> String {
    let body = json!({
        "name": name, "image": "runpod/comfyui:latest", "gpu": { "id": GPU, "count": 1 }, "cloud": "SECURE",
        "disk": 40, "ports": ["22/tcp"], "env": env,
    });
    let (status, body) = house.raw(Method::POST, "/v2/pods", Some(body)).await;
    assert!((200..300).contains(&status), "{status} {body}");
    body["id"].as_str().expect("an id").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_pod_is_listed_with_its_owner_and_only_ours_are_changed() {
    let house = House::hurried().await;
    house.create("ours").await;
    let elsewhere = foreign(&house, "autopod-ours-0123456789ab", json!({ "AUTOPOD_OWNER": "another" })).await;
    let stray = foreign(&house, "stray", json!({})).await;
    let listed = house.ok("list_pods", json!({})).await;
    let rows = listed["pods"].as_array().expect("rows");
    let owner = |id: &str| rows.iter().find(|row| row["pod_id"] == id).map(|row| row["owner"].clone());
    assert_eq!((rows.len(), &rows[0]["pod"], &rows[0]["owner"]), (3, &json!("ours"), &json!("ours")), "{listed}");
    assert_eq!(owner(&elsewhere), Some(json!("other_machine")), "{listed}");
    assert_eq!(owner(&stray), Some(json!("unmanaged")), "{listed}");
    assert_eq!(listed["burn_rate_per_hour"], 0.75, "{listed}");
    assert!(rows[0]["billed_seconds"].is_null(), "{listed}");
    let detailed = house.ok("list_pods", json!({ "format": "detailed" })).await;
    assert!(detailed["pods"][0]["billed_seconds"].is_u64(), "{detailed}");
    assert!(detailed["pods"][0]["switch"].is_string() && detailed["pods"][1]["switch"].is_null(), "{detailed}");

    for (pod, whose) in [(&elsewhere, "another machine"), (&stray, "not made by this program")] {
        for action in ["stop", "extend"] {
            let refused = house.call("control_pod", json!({ "pod": pod, "action": action })).await;
            assert_eq!(refused.code, 4, "{refused:?}");
            refused.assert_says(whose);
        }
        let waited = house.call("get_pod", json!({ "pod": pod, "wait_for": "ssh" })).await;
        assert_eq!(waited.code, 4, "{waited:?}");
    }
    let shown = house.ok("get_pod", json!({ "pod": stray })).await;
    assert_eq!((&shown["owner"], &shown["cost_usd"]), (&json!("unmanaged"), &Value::Null), "{shown}");
    assert_eq!(house.asked("podAction"), 0);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pods_come_in_pages() {
    let house = House::new().await;
    for number in 0..27 {
        foreign(&house, &format!("stray-{number}"), json!({})).await;
    }
    let first = house.ok("list_pods", json!({})).await;
    assert_eq!((first["pods"].as_array().map(Vec::len), &first["total"]), (Some(25), &json!(27)), "{first}");
    assert_eq!((&first["next"], &first["burn_rate_per_hour"]), (&json!("list_pods {\"page\": 2}"), &json!(6.75)));
    let second = house.ok("list_pods", json!({ "page": 2 })).await;
    assert!(second["next"].is_null(), "{second}");
    let rows = [&first, &second].into_iter().flat_map(|page| page["pods"].as_array().expect("rows"));
    let ids: BTreeSet<_> = rows.map(|row| row["pod_id"].to_string()).collect();
    assert_eq!(ids.len(), 27);
    let beyond = house.program(&["pod", "list", "--page", "9"]).output().await.expect("the program");
    let beyond = String::from_utf8_lossy(&beyond.stdout).into_owned();
    assert!(beyond.contains("No pods on this page") && beyond.contains("$6.75 an hour"), "{beyond}");
    for number in 27..53 {
        foreign(&house, &format!("stray-{number}"), json!({})).await;
    }
    let nobody = house.call("get_pod", json!({ "pod": "nobody" })).await;
    nobody.assert_says("and 33 more (list_pods)");
    let spending = house.ok("spending", json!({})).await;
    assert_eq!((spending["pods"].as_array().map(Vec::len), &spending["more_pods"]), (Some(50), &json!(3)));
    assert_eq!(spending["burn_rate_per_hour"], 13.25, "pods that aren't shown cost as much");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_listing_is_an_error_and_a_wrong_clock_is_told() {
    let house = House::new().await;
    assert!(house.ok("list_pods", json!({})).await["warning"].is_null());
    house.advance(300.0).await;
    let listed = house.ok("list_pods", json!({})).await;
    assert!(listed["warning"].as_str().is_some_and(|text| text.contains("behind the provider's")), "{listed}");
    house.fault(json!({ "operation": "listPods", "kind": "status_before", "status": 500, "times": 50 })).await;
    let failed = house.call("list_pods", json!({})).await;
    assert_eq!(failed.code, 5, "{failed:?}");
    failed.assert_says("Still being billed: possibly.");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_without_a_known_outcome_tells_the_way_out() {
    let house = House::hurried().await;
    house.fault(json!({ "operation": "createPod", "kind": "status_before", "status": 500 })).await;
    let made = house.ok("create_pod_with_volume", json!({ "name": "lost", "wait_seconds": 3 })).await;
    assert_eq!(made["state"], "unknown", "{made}");
    let intent = made["intent"].as_str().expect("an intent").to_owned();
    let listed = house.ok("list_pods", json!({})).await;
    let row = &listed["pods"][0];
    assert_eq!((&row["status"], &row["intent"]), (&json!("UNKNOWN_OUTCOME"), &json!(intent)), "{listed}");
    assert!(row["next"].as_str().is_some_and(|next| next.contains("terminate_pod")), "{listed}");
    house.advance(700.0).await;
    until("ten minutes of lacking it", async || {
        let shown = house.ok("get_pod", json!({ "pod": "lost" })).await;
        shown["next"].as_str()?.contains(&format!("retry_unknown: \"{intent}\"")).then_some(())
    })
    .await;

    let anew = json!({ "name": "lost", "retry_unknown": intent, "wait_seconds": 45 });
    assert_eq!(house.ok("create_pod_with_volume", anew).await["state"], "running");
    let listed = house.ok("list_pods", json!({ "format": "detailed" })).await;
    let old = listed["pods"].as_array().expect("rows").iter().find(|row| row["pod"] == format!("lost~{intent}"));
    let old = old.unwrap_or_else(|| panic!("the superseded one is missing: {listed}"));
    assert_eq!(old["status"], "CANCELLED", "{listed}");
    assert!(old["problem"].as_str().is_some_and(|text| text.contains("ended on sight")), "{listed}");

    // Nothing proves a pod gone that was never seen.
    let key = format!("lost~{intent}");
    let ended = house.ok("terminate_pod", json!({ "pod": key, "wait_seconds": 0 })).await;
    assert_eq!((&ended["done"], &ended["still_billing"]), (&json!(false), &json!("possible")), "{ended}");
    assert!(ended["cancelled"].as_str().is_some_and(|text| text.contains("was cancelled")), "{ended}");
    house.advance(4.0 * 3600.0).await;
    until("its deadline", async || {
        let record = house.fleet().of_intent(&intent).ok()?;
        record.is_none_or(|record| !record.is_open()).then_some(())
    })
    .await;
    let told = house.ok("terminate_pod", json!({ "pod": key })).await;
    assert!(told["cancelled"].as_str().is_some_and(|text| text.contains("never turned up")), "{told}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_comfyui_is_told_step_by_step() {
    let house = House::new().await;
    let at_once = house.ok("create_pod_with_volume", json!({ "name": "ladder", "wait_seconds": 0 })).await;
    assert_eq!(at_once["done"], false, "{at_once}");
    let shown = house.ok("get_pod", json!({ "pod": "ladder" })).await;
    assert_eq!((&shown["readiness"][4]["done"], &shown["done"]), (&json!(false), &Value::Null), "{shown}");
    let asked = house.asked("getPod");
    let up = house.ok("get_pod", json!({ "pod": "ladder", "wait_for": "ssh", "wait_seconds": 45 })).await;
    assert_eq!((&up["done"], &up["status"], &up["still_billing"]), (&json!(true), &json!("RUNNING"), &json!("yes")));
    assert!(house.asked("getPod") <= asked + 1, "who waits leaves the asking to the keeper");
    assert!(house.tunnels().read().expect("records").is_empty(), "ssh needs no tunnel");
    assert!(up["waiting_for"].as_str().is_some_and(|text| text.contains("start_tunnel")), "{up}");

    let ready = house.ok("get_pod", json!({ "pod": "ladder", "wait_for": "comfy", "wait_seconds": 45 })).await;
    assert_eq!((&ready["done"], &ready["waiting_for"]), (&json!(true), &Value::Null), "{ready}");
    let steps = ready["readiness"].as_array().expect("steps");
    let names: Vec<_> = steps.iter().filter_map(|step| step["step"].as_str()).collect();
    assert_eq!(names, ["allocated", "container", "sshd", "tunnel", "comfyui"]);
    assert!(steps.iter().all(|step| step["done"] == true), "{ready}");
    let reached: Vec<jiff::Timestamp> =
        steps.iter().filter_map(|step| step["reached_at"].as_str()?.parse().ok()).collect();
    assert!(reached.len() >= 4 && reached.is_sorted(), "{ready}");
    assert!(steps[1]["elapsed_seconds"].is_f64() && steps[2]["elapsed_seconds"].is_f64(), "{ready}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_pod_that_does_not_come_up() {
    let house = House::hurried().await;
    house.create("down").await;
    let stop = json!({ "pod": "down", "action": "stop", "wait_seconds": 0 });
    house.ok("control_pod", stop).await;
    let settled = house.ok("get_pod", json!({ "pod": "down", "wait_for": "change", "wait_seconds": 45 })).await;
    assert_eq!((&settled["done"], &settled["status"]), (&json!(true), &json!("EXITED")), "{settled}");
    for goal in ["ssh", "comfy"] {
        let refused = house.call("get_pod", json!({ "pod": "down", "wait_for": goal })).await;
        assert_eq!(refused.code, 1, "{refused:?}");
        refused.assert_says("is stopped");
        refused.assert_says("control_pod");
    }
    house.end().await;
}
