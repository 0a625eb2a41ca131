//! What is spent and set aside is told truly, and each money action leaves a line that nobody can lose a pod over.

use std::os::unix::fs::PermissionsExt;

use autopod_mcp::fleet::{Actor, Audit};
use reqwest::Method;
use serde_json::{Value, json};

use crate::keeper_support::{House, until};

fn cap<'a>(spending: &'a Value, limit: &str) -> &'a Value {
    let caps = spending["caps"].as_array().expect("caps");
    caps.iter().find(|cap| cap["limit"] == limit).unwrap_or_else(|| panic!("no {limit} in {spending}"))
}

fn near(value: &Value, wanted: f64) {
    let value = value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    assert!((value - wanted).abs() < 0.01, "{value} instead of {wanted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_burns_what_is_spent_and_what_is_left_add_up() {
    let house = House::hurried().await;
    let idle = house.ok("spending", json!({})).await;
    near(&idle["burn_rate_per_hour"], 0.0);
    assert_eq!(cap(&idle, "max_pods")["left"], 2.0, "{idle}");
    let made = house.ok("create_pod_with_volume", json!({ "name": "user", "lifetime_minutes": 60 })).await;
    let price = made["price_per_hour"].as_f64().expect("a price");
    let spending = house.ok("spending", json!({})).await;
    near(&spending["burn_rate_per_hour"], price);
    let row = &spending["pods"][0];
    assert_eq!((&row["pod"], &row["owner"]), (&json!("user"), &json!("ours")));
    near(&row["price_per_hour"], price);
    assert!(row["reserved_usd"].as_f64().is_some_and(|usd| usd > 0.0 && usd <= price + 0.01), "{spending}");
    assert_eq!(cap(&spending, "max_pods")["left"], 1.0);
    near(&cap(&spending, "max_total_per_hour")["left"], 3.0 - price);
    let today = spending["today_usd"].as_f64().zip(spending["today_reserved_usd"].as_f64()).expect("sums");
    near(&cap(&spending, "max_usd_per_day")["used"], today.0 + today.1);
    near(
        &spending["volumes_monthly_usd"],
        house.ok("list_volumes", json!({})).await["total_monthly_usd"].as_f64().unwrap(),
    );
    assert!(spending["billed"]["today_usd"].is_number(), "{spending}");
    assert_eq!(spending.get("warnings"), None, "{spending}");

    house.advance(600.0).await;
    // One answer from ten minutes on could be a wrong clock's; the next one is believed.
    until("the leap in the books", async || {
        let spending = house.ok("spending", json!({})).await;
        spending["today_usd"].as_f64().filter(|usd| *usd >= price / 6.0)
    })
    .await;
    house.ok("terminate_pod", json!({ "pod": "user" })).await;
    let after = house.ok("spending", json!({ "format": "detailed" })).await;
    near(&after["burn_rate_per_hour"], 0.0);
    assert!(after["today_usd"].as_f64().is_some_and(|usd| usd >= price / 6.0), "{after}");
    near(&after["today_reserved_usd"], 0.0);
    let events: Vec<_> = after["audit"].as_array().expect("notes").iter().map(|note| note["event"].clone()).collect();
    assert!(events.contains(&json!("create_wanted")) && events.contains(&json!("terminate_wanted")), "{after}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_create_is_shown_with_its_money_and_the_next_call() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createPod", "kind": "reset_before" })).await;
    house.ok("create_pod_with_volume", json!({ "name": "lost", "wait_seconds": 3 })).await;
    let spending = house.ok("spending", json!({})).await;
    let unknown = &spending["unknown"][0];
    assert_eq!(unknown["pod"], "lost", "{spending}");
    assert!(unknown["reserved_usd"].as_f64().is_some_and(|usd| usd > 0.0), "{spending}");
    assert!(unknown["next"].as_str().is_some_and(|next| next.contains("terminate_pod")), "{spending}");
    house.advance(11.0 * 60.0).await;
    until("ten minutes of absence", async || {
        let spending = house.ok("spending", json!({})).await;
        spending["unknown"][0]["next"].as_str().filter(|next| next.contains("retry_unknown")).map(|_| ())
    })
    .await;
    house.end().await;
}

/// Books that can't be read, a list that fails and a key that is missing: what can be told is told, with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_known_is_said_and_the_rest_is_told() {
    let house = House::hurried().await;
    house.create("user").await;
    for (operation, status, says) in [
        ("listPodBilling", 403, "may not read"),
        ("listPods", 403, "from our records"),
        ("listNetworkVolumes", 403, "volumes"),
    ] {
        house.raw(Method::DELETE, "/_sandbox/faults", None).await;
        house.fault(json!({ "operation": operation, "kind": "status_before", "status": status, "times": 3 })).await;
        let spending = house.ok("spending", json!({})).await;
        assert_eq!(spending["pods"][0]["pod"], "user", "{operation}: {spending}");
        assert!(spending["warnings"].to_string().contains(says), "{operation}: {spending}");
    }
    house.raw(Method::DELETE, "/_sandbox/faults", None).await;
    let mut keyless = house.program(&["call", "spending", "{}"]);
    keyless.env_remove("RUNPOD_API_KEY");
    let keyless = crate::keeper_support::answer(keyless).await;
    assert_eq!((keyless.code, &keyless.value["pods"][0]["pod"]), (0, &json!("user")), "{keyless:?}");
    assert!(keyless.value["warnings"].to_string().contains("not verified"), "{keyless:?}");
    house.end().await;
}

/// Two writers at once: every line is whole, none is lost, the file only grows, and nobody else may read it.
#[test]
fn the_audit_log_is_only_appended_to_and_private() {
    let folder = tempfile::tempdir().expect("a folder");
    let home = autopod_mcp::config::Home::open(folder.path().join("home")).expect("a home");
    let audit = Audit::new(&home);
    audit.note(Actor::Keeper, "first", json!({ "pod": "a" }));
    let first = std::fs::read_to_string(home.audit_file()).expect("the log");
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let audit = audit.clone();
            scope.spawn(move || {
                for number in 0..200 {
                    let facts = json!({ "writer": writer, "number": number, "padding": "x".repeat(900), "none": null });
                    audit.note(Actor::Tool("test"), "noted", facts);
                }
            });
        }
    });
    let text = std::fs::read_to_string(home.audit_file()).expect("the log");
    assert!(text.starts_with(&first), "what was written stays");
    let notes: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a whole line")).collect();
    assert_eq!(notes.len(), 401);
    for writer in 0..2 {
        let mine = notes.iter().filter(|note| note["writer"] == writer).map(|note| note["number"].as_u64());
        assert!(mine.eq((0..200).map(Some)), "writer {writer}");
    }
    let mode = std::fs::metadata(home.audit_file()).expect("the log").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let last = audit.last(3).expect("notes");
    assert_eq!(last.len(), 3);
    assert_eq!(Value::Object(last[2].clone()), notes[400]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_holds_no_key_and_no_value_of_an_environment() {
    let house = House::hurried().await;
    let secret = "hunter2-canary";
    house.ok("create_pod_with_volume", json!({ "name": "user", "env": { "TOKEN": secret } })).await;
    house.ok("create_volume", json!({ "name": "models", "size_gb": 10, "data_center": "EU-RO-1" })).await;
    house.ok("terminate_pod", json!({ "pod": "user" })).await;
    let text = std::fs::read_to_string(house.home.join("audit.jsonl")).expect("the log");
    assert!(text.lines().count() >= 4, "{text}");
    assert!(!text.contains(secret) && !text.contains(house.sandbox.key()), "{text}");
    house.end().await;
}

/// A folder stands where the log should be, so that no note can be written.
#[tokio::test(flavor = "multi_thread")]
async fn an_audit_log_that_cannot_be_written_keeps_no_pod_alive() {
    let house = House::hurried().await;
    std::fs::create_dir_all(house.home.join("audit.jsonl")).expect("a folder");
    house.create("user").await;
    let ended = house.ok("terminate_pod", json!({ "pod": "user" })).await;
    assert_eq!((&ended["done"], house.alive().await.len()), (&json!(true), 0), "{ended}");
    let spending = house.ok("spending", json!({ "format": "detailed" })).await;
    assert!(spending["warnings"].to_string().contains("audit log"), "{spending}");
    house.end().await;
}
