//! A pod that is there is started, stopped, restarted and given more time: each asked of the provider once.

use std::os::unix::fs::OpenOptionsExt;

use autopod_mcp::fleet::{ActionState, PodRecord};
use jiff::SignedDuration;
use serde_json::{Value, json};

use crate::keeper_support::{House, answer, kill, until};

fn limit(house: &House, limits: Value) {
    use std::io::Write;
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(house.home.join("config.json"));
    file.expect("a file").write_all(json!({ "limits": limits }).to_string().as_bytes()).expect("a written file");
}

fn record(house: &House, name: &str) -> PodRecord {
    house.fleet().get(name).expect("records").expect("a record")
}

fn act(pod: &str, action: &str) -> Value {
    json!({ "pod": pod, "action": action, "wait_seconds": 45 })
}

/// A pod that was stopped by the tool.
async fn stopped(name: &str) -> House {
    let house = House::hurried().await;
    house.create(name).await;
    let stopped = house.ok("control_pod", act(name, "stop")).await;
    assert_eq!((&stopped["state"], &stopped["done"]), (&json!("stopped"), &json!(true)), "{stopped}");
    house
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_on_another_gpu_is_told() {
    let house = stopped("swapped").await;
    let before = record(&house, "swapped").known.gpu.expect("a GPU");
    house.fault(json!({ "operation": "podAction", "kind": "changed_gpu", "gpu": "NVIDIA L4" })).await;
    let started = house.ok("control_pod", act("swapped", "start")).await;
    assert_eq!((&started["state"], &started["gpu"]), (&json!("running"), &json!("NVIDIA L4")), "{started}");
    assert_eq!(started["gpu_before"], json!(before), "{started}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_pod_comes_up_elsewhere_and_its_tunnel_follows() {
    let house = House::hurried().await;
    let id = house.create("moving").await;
    let port = house.tunnel("moving").await;
    let before = record(&house, "moving").known;
    let stopped = house.ok("control_pod", act("moving", "stop")).await;
    assert_eq!((&stopped["state"], &stopped["done"]), (&json!("stopped"), &json!(true)), "{stopped}");
    assert_eq!((&stopped["still_billing"], &stopped["reserved_usd"]), (&json!("possible"), &json!(0.0)), "{stopped}");
    assert_eq!(house.alive().await[0]["status"], "EXITED");
    let again = house.ok("control_pod", act("moving", "stop")).await;
    assert_eq!((&again["done"], &again["changed"]), (&json!(true), &json!(false)), "{again}");
    assert_eq!(house.asked("podAction"), 1, "a pod that is stopped isn't stopped again");

    let started = house.ok("control_pod", act(&id, "start")).await;
    assert_eq!((&started["state"], &started["done"]), (&json!("running"), &json!(true)), "{started}");
    assert_eq!((&started["pod"], &started["still_billing"]), (&json!("moving"), &json!("yes")), "{started}");
    until("the tunnel after the start", async || house.stats_through(port).await).await;
    let after = record(&house, "moving").known;
    assert!(after.starts > before.starts && after.ssh != before.ssh, "{before:?} {after:?}");
    let again = house.ok("control_pod", act("moving", "start")).await;
    assert_eq!((&again["done"], &again["changed"]), (&json!(true), &json!(false)), "{again}");
    let told = started["ssh_before"].as_str().expect("where it was");
    assert!(told.ends_with(&before.ssh.expect("an address").port.to_string()), "{started}");
    assert_eq!((house.asked("podAction"), house.asked("createPod")), (2, 1));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_done_when_the_container_runs_again() {
    let house = House::hurried().await;
    house.create("again").await;
    let starts = record(&house, "again").known.starts;
    let restarted = house.ok("control_pod", act("again", "restart")).await;
    assert_eq!((&restarted["state"], &restarted["done"]), (&json!("running"), &json!(true)), "{restarted}");
    assert!(record(&house, "again").known.starts > starts);
    assert_eq!(house.asked("podAction"), 1);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_pod_does_not_allow_is_refused_with_what_it_does() {
    let house = stopped("still").await;
    let refused = house.call("control_pod", act("still", "restart")).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("is EXITED");
    refused.assert_says(r#"control_pod {"pod": "still", "action": "start"}, or terminate_pod {"pod": "still"}"#);
    let refused = house.call("control_pod", json!({ "pod": "still", "action": "start", "minutes": 5 })).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    assert_eq!(house.call("control_pod", act("nobody", "start")).await.code, 3);
    assert_eq!(house.asked("podAction"), 1);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_what_is_in_a_stopped_pod() {
    let house = stopped("asleep").await;
    let start = r#"control_pod {"pod": "asleep", "action": "start"}"#;
    let refused = house.call("start_tunnel", json!({ "pod": "asleep" })).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.assert_says("is stopped");
    refused.assert_says("Still being billed: possibly");
    refused.assert_says(start);
    let status = house.ok("comfy_status", json!({ "pod": "asleep" })).await;
    assert_eq!((&status["next"], &status["still_billing"]), (&json!(start), &json!("possible")), "{status}");
    let shown = house.ok("get_pod", json!({ "pod": "asleep" })).await;
    assert_eq!(shown["next"], start, "{shown}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_keeps_to_the_caps_and_to_what_the_user_agreed_to() {
    let house = stopped("dear").await;
    limit(&house, json!({ "max_total_per_hour": 0.1 }));
    let refused = house.call("control_pod", act("dear", "start")).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("limits.max_total_per_hour");
    limit(&house, json!({ "confirm_above_per_hour": 0.1 }));
    let refused = house.call("control_pod", act("dear", "start")).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("confirm_price: 0.25");
    assert_eq!(house.asked("podAction"), 1, "nothing was sent but the stop");
    let agreed = json!({ "pod": "dear", "action": "start", "confirm_price": 0.25, "wait_seconds": 45 });
    assert_eq!(house.ok("control_pod", agreed).await["done"], true);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_free_gpu_a_start_is_refused_and_may_be_asked_for_again() {
    let house = stopped("full").await;
    house.fault(json!({ "operation": "podAction", "kind": "no_capacity" })).await;
    let refused = house.call("control_pod", act("full", "start")).await;
    assert_eq!(refused.code, 5, "{refused:?}");
    refused.assert_says("not enough free GPUs");
    refused.assert_says("Still being billed: possibly.");
    let shown = house.ok("get_pod", json!({ "pod": "full" })).await;
    assert!(shown["action"].as_str().is_some_and(|action| action.starts_with("start: refused")), "{shown}");
    assert_eq!(house.ok("control_pod", act("full", "start")).await["state"], "running");
    house.end().await;
}

async fn loses_the_answer(fault: Value) {
    let house = House::hurried().await;
    house.create("lost").await;
    house.fault(fault.clone()).await;
    let stopped = house.ok("control_pod", act("lost", "stop")).await;
    assert_eq!((&stopped["state"], &stopped["done"]), (&json!("stopped"), &json!(true)), "{fault}: {stopped}");
    assert_eq!(record(&house, "lost").known.action.expect("an action").state, ActionState::Unclear, "{fault}");
    assert_eq!(house.asked("podAction"), 1, "{fault}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_whose_answer_is_lost_is_not_sent_again() {
    tokio::join!(
        loses_the_answer(json!({ "operation": "podAction", "kind": "status_after", "status": 502 })),
        loses_the_answer(json!({ "operation": "podAction", "kind": "hang_after" })),
        loses_the_answer(json!({ "operation": "podAction", "kind": "garbage" })),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_without_a_trace_is_told_as_unclear() {
    let house = House::hurried().await;
    house.create("unclear").await;
    house.fault(json!({ "operation": "podAction", "kind": "status_before", "status": 500 })).await;
    let unclear = house.call("control_pod", json!({ "pod": "unclear", "action": "stop", "wait_seconds": 3 })).await;
    assert_eq!(unclear.code, 6, "{unclear:?}");
    unclear.assert_says("was not sent again");
    assert_eq!((house.asked("podAction"), &house.alive().await[0]["status"]), (1, &json!("RUNNING")));
    // Asking again is another wish.
    assert_eq!(house.ok("control_pod", act("unclear", "stop")).await["state"], "stopped");
    assert_eq!(house.asked("podAction"), 2);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_killed_before_the_answer_does_not_send_the_action_again() {
    let house = stopped("cut").await;
    house.fault(json!({ "operation": "podAction", "kind": "hang_after" })).await;
    let call = tokio::spawn(answer(house.command("control_pod", &act("cut", "start"))));
    until("the action", async || (house.asked("podAction") == 2).then_some(())).await;
    let worker = house.until_worker().await;
    kill(worker);
    let started = call.await.expect("a call");
    assert_eq!((started.code, &started.value["state"]), (0, &json!("running")), "{started:?}");
    assert_ne!(house.worker(), Some(worker));
    assert_eq!(house.asked("podAction"), 2);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_moved_within_the_caps_only() {
    let house = House::hurried().await;
    house.create("longer").await;
    let before = record(&house, "longer").expires_at();
    let more = house.ok("control_pod", json!({ "pod": "longer", "action": "extend", "minutes": 30 })).await;
    assert_eq!((&more["state"], &more["done"]), (&json!("extended"), &json!(true)), "{more}");
    let after = record(&house, "longer");
    assert_eq!(after.expires_at(), before + SignedDuration::from_mins(30));
    assert_eq!(
        (&more["expires_at"], &more["expires_at_before"]),
        (&json!(after.expires_at()), &json!(before)),
        "{more}"
    );
    assert!(more["switch"].is_string() && more["reserved_usd"].as_f64() > Some(1.0), "{more}");

    let refused = house.call("control_pod", json!({ "pod": "longer", "action": "extend", "minutes": 1440 })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("limits.max_lifetime_minutes");
    limit(&house, json!({ "max_usd_per_day": 0.5 }));
    let refused = house.call("control_pod", json!({ "pod": "longer", "action": "extend" })).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("limits.max_usd_per_day");
    assert_eq!(record(&house, "longer").expires_at(), after.expires_at());
    let audit = std::fs::read_to_string(house.home.join("audit.jsonl")).expect("an audit log");
    assert_eq!(audit.matches("\"extension_wanted\"").count(), 1, "{audit}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn people_control_pods_by_commands() {
    let house = House::hurried().await;
    house.create("byhand").await;
    let said = async |arguments: &[&str]| {
        let output = house.program(arguments).output().await.expect("the program");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        text
    };
    let stopped = said(&["stop", "byhand"]).await;
    assert!(
        stopped.contains("is stopped") && stopped.contains("Next: `pod start byhand`, or `pod kill byhand`"),
        "{stopped}"
    );
    let refused = house.program(&["pod", "exec", "byhand", "--", "true"]).output().await.expect("the program");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("see `pod info byhand`"), "{refused}");
    let listed = said(&["pod", "list"]).await;
    assert!(listed.contains("EXITED") && listed.contains("BILLED"), "{listed}");
    assert!(said(&["pod", "start", "byhand"]).await.contains("is running"));
    let extended = said(&["pod", "extend", "byhand", "--minutes", "5"]).await;
    assert!(extended.contains("is extended") && extended.contains("instead of"), "{extended}");
    let shown = said(&["pod", "info", "byhand", "--wait-for", "comfy"]).await;
    assert!(shown.contains("+ comfyui") && shown.contains("Billed for"), "{shown}");
    house.end().await;
}
