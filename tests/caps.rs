//! What may be spent: however many ask at once, the caps let through what they allow and nothing more; what turns out
//! dearer or elsewhere is ended; above the threshold somebody has to agree.

use autopod_mcp::fleet::{day, hours_by_day, later};
use autopod_mcp::state;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};
use serde_json::{Value, json};

use crate::faces_support::Server;
use crate::keeper_support::{Answer, GPU, House, answer, tell, until};

/// USD an hour of [`GPU`].
const PRICE: f64 = 0.25;
const DEAR: &str = "NVIDIA A100 80GB PCIe";
const DEARER: &str = "NVIDIA H100 80GB HBM3";

/// Eight processes, each with a pod of its own in mind: how many got one, and what the others were told.
async fn eight_race(house: &House, arguments: Value) -> (usize, Vec<Answer>) {
    let calls = (0..8).map(|number| {
        let mut arguments = arguments.clone();
        arguments["name"] = json!(format!("pod-{number}"));
        tokio::spawn(answer(house.command("create_pod_with_volume", &arguments)))
    });
    let mut refused = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        let answer = call.await.expect("a call");
        if answer.code != 0 {
            refused.push(answer);
        }
    }
    (8 - refused.len(), refused)
}

async fn race_ends_at(house: &House, what: &str, arguments: Value, expected: usize, cap: &str) {
    let (made, refused) = eight_race(house, arguments).await;
    assert_eq!(made, expected, "{refused:?}");
    for answer in refused {
        assert_eq!(answer.code, 4, "{answer:?}");
        answer.assert_says(cap);
        answer.assert_says("nothing was created");
    }
    until("all POSTs", async || (house.alive().await.len() == expected).then_some(())).await;
    // Nothing follows.
    house.end_processes();
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (expected, expected));
    tell(&format!("caps: 8 processes race {what}, {made} create, {} are refused", 8 - made));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_eight_processes_as_many_create_as_the_hourly_cap_allows() {
    let house = House::new().await;
    let cap = 1.10;
    set_limits(&house, json!({ "max_pods": 50, "max_total_per_hour": cap, "max_usd_per_day": 1000 }));
    let arguments = json!({ "gpus": [GPU], "wait_seconds": 0 });
    let expected = (cap / PRICE).floor() as usize;
    race_ends_at(&house, "a cap of $1.10/h at $0.25/h", arguments, expected, "limits.max_total_per_hour").await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_eight_processes_as_many_create_as_the_number_of_pods_allows() {
    let house = House::new().await;
    set_limits(&house, json!({ "max_pods": 3, "max_total_per_hour": 100, "max_usd_per_day": 1000 }));
    let arguments = json!({ "gpus": [GPU], "wait_seconds": 0 });
    race_ends_at(&house, "a cap of 3 pods", arguments, 3, "limits.max_pods").await;
    house.end().await;
}

/// Of a reservation only the part within a day counts there; the longest part is what the cap is held against.
#[tokio::test(flavor = "multi_thread")]
async fn of_eight_processes_as_many_create_as_the_daily_cap_allows() {
    let house = House::new().await;
    let now = Timestamp::now();
    let parts = hours_by_day(now, later(now, SignedDuration::from_mins(60)));
    let longest = parts.iter().map(|(_, hours)| *hours).fold(0.0, f64::max);
    set_limits(&house, json!({ "max_pods": 50, "max_total_per_hour": 100, "max_usd_per_day": 2.5 * PRICE * longest }));
    let arguments = json!({ "gpus": [GPU], "wait_seconds": 0, "lifetime_minutes": 60 });
    race_ends_at(&house, "a daily cap of 2.5 hours", arguments, 2, "limits.max_usd_per_day").await;
    house.end().await;
}

/// Ten hours of tomorrow's and the rest of today's fit under a cap for a day that both together would break.
#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_over_midnight_is_split() {
    let house = House::new().await;
    let now = Timestamp::now();
    let midnight = day(now).checked_add(1.day()).and_then(|date| date.to_zoned(TimeZone::UTC)).expect("a day");
    let today = midnight.timestamp().duration_since(now).as_secs_f64() / 3600.0;
    let lifetime = (today * 60.0) as i64 + 10 * 60;
    let cap = today.max(10.0) * PRICE + 0.05;
    set_limits(&house, json!({ "max_lifetime_minutes": 40 * 60, "max_usd_per_day": cap }));
    let mut arguments = json!({ "name": "night", "gpus": [GPU], "wait_seconds": 0, "lifetime_minutes": lifetime });
    let made = house.ok("create_pod_with_volume", arguments.clone()).await;
    assert!(made["reserved_usd"].as_f64().is_some_and(|usd| usd > 10.0 * PRICE), "{made}");
    arguments["name"] = json!("second");
    let refused = house.call("create_pod_with_volume", arguments).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("(UTC) beside the $");
    house.end().await;
}

/// What was spent stays spent when its pod is gone, and when its name is used again.
#[tokio::test(flavor = "multi_thread")]
async fn closed_pods_of_today_still_count() {
    let house = House::hurried().await;
    let cap = 1.2 * PRICE;
    let create = |name: &str, minutes: u32| json!({ "name": name, "gpus": [GPU], "lifetime_minutes": minutes });
    house.ok("create_pod_with_volume", create("spent", 240)).await;
    house.advance(2.0 * 3600.0).await;
    // One answer from two hours on could be a wrong clock's; the next one is believed.
    until("the leap in the books", async || {
        house.fleet().get("spent").ok()?.filter(|record| record.known.cost_usd > 1.9 * PRICE)
    })
    .await;
    let done = house.ok("terminate_pod", json!({ "pod": "spent" })).await;
    assert!(done["cost_usd"].as_f64().is_some_and(|usd| usd > 1.9 * PRICE), "{done}");
    set_limits(&house, json!({ "max_usd_per_day": cap }));
    for name in ["spent", "another"] {
        let refused = house.call("create_pod_with_volume", create(name, 60)).await;
        assert_eq!(refused.code, 4, "{name}: {refused:?}");
        refused.assert_says("limits.max_usd_per_day");
    }
    // A new pod of that name makes the closed record no younger.
    set_limits(&house, json!({ "max_usd_per_day": 15 }));
    house.ok("create_pod_with_volume", create("spent", 60)).await;
    let records = house.fleet().read().expect("records");
    assert!(records.keys().any(|key| key.starts_with("spent~")), "{:?}", records.keys());
    house.ok("terminate_pod", json!({ "pod": "spent" })).await;
    set_limits(&house, json!({ "max_usd_per_day": cap }));
    let refused = house.call("create_pod_with_volume", create("another", 60)).await;
    refused.assert_says("limits.max_usd_per_day");
    assert_eq!(house.asked("createPod"), 2);
    house.end().await;
}

/// Whatever it is that the pod is otherwise than it was to be, it is ended at once, and told.
async fn is_ended_for(fault: Value, arguments: Value, says: &[&str]) {
    let house = House::hurried().await;
    house.fault(fault.clone()).await;
    let refused = house.call("create_pod_with_volume", arguments).await;
    assert_ne!(refused.code, 0, "{fault}: {refused:?}");
    for word in says {
        refused.assert_says(word);
    }
    house.until_none_alive("its end").await;
    assert_eq!((house.asked("createPod"), house.world_pods().await.len()), (1, 1), "{fault}");
    let record =
        until("a closed record", async || house.fleet().get("surprise").ok()?.filter(|record| !record.is_open())).await;
    let cause = record.known.ending_cause.unwrap_or_default();
    assert!(says.iter().all(|word| cause.contains(word)), "{cause}");
    let audit = std::fs::read_to_string(house.home().audit_file()).expect("an audit log");
    assert!(audit.lines().any(|line| line.contains("\"gone\"") && line.contains(says[0])), "{audit}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_not_what_was_asked_for_is_ended_at_once() {
    let create = |more: Value| {
        let mut arguments = json!({ "name": "surprise", "gpus": [GPU], "wait_seconds": 20 });
        arguments.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        arguments
    };
    let price = |cost: f64| json!({ "operation": "createPod", "kind": "price", "cost": cost });
    let elsewhere = json!({ "operation": "createPod", "kind": "elsewhere", "data_center": "US-TX-3" });
    tokio::join!(
        is_ended_for(price(5.0), create(json!({})), &["$5.00/h", "$1.00/h that were allowed"]),
        is_ended_for(
            price(0.35),
            create(json!({ "max_price_per_hour": 0.3 })),
            &["$0.35/h", "$0.30/h that were allowed"]
        ),
        is_ended_for(elsewhere.clone(), create(json!({ "volume": "comfy-models" })), &["US-TX-3", "EU-RO-1 was asked"]),
        is_ended_for(elsewhere, create(json!({ "data_centers": ["EU-RO-1"] })), &["US-TX-3", "EU-RO-1 was asked"]),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn above_the_threshold_the_price_has_to_be_agreed_to() {
    let house = House::new().await;
    set_limits(&house, json!({ "max_price_per_hour": 2.0 }));
    let create =
        |confirm: Value| json!({ "name": "dear", "gpus": [DEAR], "wait_seconds": 0, "confirm_price": confirm });
    for confirm in [Value::Null, json!(1.0), json!(1.6)] {
        let refused = house.call("create_pod_with_volume", create(confirm)).await;
        assert_eq!(refused.code, 4, "{refused:?}");
        for word in ["$1.64", "$1.00", "nobody can be asked", "confirm_price: 1.64"] {
            refused.assert_says(word);
        }
    }
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (0, 0));
    // Agreeing raises no cap, and what can't be had is not asked for.
    set_limits(&house, json!({ "max_price_per_hour": 1.5 }));
    let refused = house.call("create_pod_with_volume", create(json!(5.0))).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_says("limits.max_price_per_hour");
    set_limits(&house, json!({ "max_price_per_hour": 2.0 }));
    let made = house.ok("create_pod_with_volume", create(json!(1.64))).await;
    assert_eq!(made["created"], true, "{made}");
    // Who finds it spends nothing more.
    assert_eq!(house.ok("create_pod_with_volume", create(Value::Null)).await["created"], false);
    house.end().await;
}

/// A server whose client can be asked, with a call of create under way; the id of its question.
async fn asked(server: &mut Server, id: u64, arguments: &Value) -> Value {
    let params = json!({ "name": "create_pod_with_volume", "arguments": arguments });
    server.send(json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params })).await;
    let question = server.receive().await;
    assert_eq!(question["method"], "elicitation/create", "{question}");
    question
}

async fn say_yes(server: &mut Server, question: &Value) {
    let yes = json!({ "action": "accept", "content": { "confirm": true } });
    server.send(json!({ "jsonrpc": "2.0", "id": question["id"], "result": yes })).await;
}

async fn greeted(house: &House) -> Server {
    let mut server = Server::start(house.program(&["serve"]));
    let capabilities = json!({ "elicitation": {} });
    let who = json!({ "name": "test", "version": "1" });
    let greeting = json!({ "protocolVersion": "2025-06-18", "capabilities": capabilities, "clientInfo": who });
    server.ask(1, "initialize", greeting).await;
    server.send(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await;
    server
}

fn says(question: &Value, words: &[&str]) {
    let text = question.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
}

async fn set_stock(house: &House, gpu: &str, data_center: &str, secure: u32) {
    let stock = json!({ "gpu": gpu, "data_center": data_center, "secure": secure, "community": 0 });
    assert_eq!(house.raw(reqwest::Method::PUT, "/_sandbox/stock", Some(stock)).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_is_asked_and_prices_and_caps_are_looked_at_again() {
    let house = House::new().await;
    set_limits(&house, json!({ "max_price_per_hour": 4.0, "max_total_per_hour": 8.0, "max_usd_per_day": 1000 }));
    let mut server = greeted(&house).await;
    let mut arguments = json!({ "name": "asked", "min_vram_gb": 80, "wait_seconds": 30, "lifetime_minutes": 60 });
    let question = asked(&mut server, 2, &arguments).await;
    says(&question, &["Create the pod asked", "$1.64 an hour", "$1.00 an hour"]);
    assert!(house.fleet().read().expect("records").is_empty(), "nothing is set aside while somebody thinks");
    // Meanwhile only a dearer one is left, to which nobody has agreed.
    for data_center in ["EU-RO-1", "US-TX-3"] {
        set_stock(&house, DEAR, data_center, 0).await;
    }
    set_stock(&house, DEARER, "US-TX-3", 4).await;
    say_yes(&mut server, &question).await;
    let question = server.receive().await;
    says(&question, &["elicitation/create", "$2.99 an hour"]);
    // And now a cap is lowered.
    set_limits(&house, json!({ "max_price_per_hour": 2.5, "max_total_per_hour": 8.0, "max_usd_per_day": 1000 }));
    say_yes(&mut server, &question).await;
    let refused = server.receive().await;
    says(&refused, &["costs more than $2.50/h", "nothing was created"]);
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (0, 0));
    // With the agreement it is made.
    set_stock(&house, DEAR, "EU-RO-1", 4).await;
    arguments["wait_seconds"] = json!(5);
    let question = asked(&mut server, 3, &arguments).await;
    says(&question, &["$1.64 an hour"]);
    say_yes(&mut server, &question).await;
    let made = server.receive().await;
    assert_eq!(made["result"]["structuredContent"]["created"], true, "{made}");
    until("the pod", async || (house.alive().await.len() == 1).then_some(())).await;
    assert_eq!(house.alive().await[0]["gpu"], DEAR);
    // A no is a no.
    arguments["name"] = json!("declined");
    let question = asked(&mut server, 4, &arguments).await;
    server.send(json!({ "jsonrpc": "2.0", "id": question["id"], "result": { "action": "decline" } })).await;
    says(&server.receive().await, &["declined", "confirm_price: 1.64", "nothing was changed"]);
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (1, 1));
    drop(server.stdin.take());
    server.ended().await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_everything_and_makes_nothing() {
    let house = House::new().await;
    let dry = async |mut arguments: Value| {
        arguments["dry_run"] = json!(true);
        house.ok("create_pod_with_volume", arguments).await
    };
    let told = dry(json!({ "gpus": ["RTX 4090", "RTX A4000"], "lifetime_minutes": 120 })).await;
    assert_eq!(
        (&told["state"], &told["created"], &told["caps"]),
        (&json!("dry_run"), &json!(false), &json!("allowed"))
    );
    let candidates = json!([
        { "gpu": "NVIDIA GeForce RTX 4090", "price_per_hour": 0.69, "total_usd": 1.38 },
        { "gpu": GPU, "price_per_hour": 0.25, "total_usd": 0.5 },
    ]);
    assert_eq!(told["candidates"], candidates, "{told}");
    let (reserved, billing) = (told["reserved_usd"].as_f64(), &told["still_billing"]);
    assert!(reserved.is_some_and(|usd| (usd - 1.38).abs() < 0.011), "{told}");
    assert_eq!((&told["price_per_hour"], billing), (&json!(0.69), &json!("no")), "{told}");
    // What needs an agreement is left out where something else is there, and nobody is asked.
    let all = dry(json!({ "min_vram_gb": 24 })).await;
    let prices: Vec<_> =
        all["candidates"].as_array().expect("rows").iter().map(|row| row["price_per_hour"].as_f64()).collect();
    assert!(prices.len() >= 4 && prices.is_sorted() && prices.iter().all(|price| *price <= Some(1.0)), "{all}");
    // The caller's price only tightens.
    let cheap = dry(json!({ "max_price_per_hour": 0.26 })).await;
    assert_eq!(cheap["candidates"].as_array().map(Vec::len), Some(1), "{cheap}");
    for (gpu, most) in [(DEAR, 1.7), (DEARER, 1000.0)] {
        let arguments = json!({ "gpus": [gpu], "max_price_per_hour": most, "confirm_price": 1000, "dry_run": true });
        let refused = house.call("create_pod_with_volume", arguments).await;
        assert_eq!(refused.code, 4, "{refused:?}");
        refused.assert_says("limits.max_price_per_hour");
    }
    set_limits(&house, json!({ "max_price_per_hour": 2.0 }));
    let dear = dry(json!({ "gpus": [DEAR] })).await;
    assert!(dear["caps"].as_str().is_some_and(|caps| caps.contains("confirm_price: 1.64")), "{dear}");
    assert_eq!(dry(json!({ "gpus": [DEAR], "confirm_price": 1.64 })).await["caps"], "allowed");
    set_limits(&house, json!({ "max_total_per_hour": 0.3 }));
    let over = dry(json!({ "gpus": ["RTX 4090"] })).await;
    assert!(over["caps"].as_str().is_some_and(|caps| caps.contains("refused") && caps.contains("max_total_per_hour")));
    assert_eq!((house.asked("createPod"), house.fleet().read().expect("records").len()), (0, 0));
    assert_eq!(house.processes().workers.len(), 0, "nobody was started for it");
    house.end().await;
}

/// What this home's `config.json` says of limits.
pub fn set_limits(house: &House, limits: Value) {
    let file = house.home().config_file();
    state::write_json(&file, &json!({ "limits": limits })).expect("a written file");
}
