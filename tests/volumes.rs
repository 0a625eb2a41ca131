//! Network volumes: one a name, whatever happens to its create; never over the cap; deleted by a person only.

use std::collections::BTreeSet;

use autopod_mcp::fleet::{VolumePhase, VolumeRecord, Volumes};
use autopod_mcp::sandbox::ClockMode;
use autopod_mcp::timing::Timing;
use reqwest::Method;
use serde_json::{Value, json};

use crate::faces_terminal::Terminal;
use crate::keeper_support::{Answer, House, answer, kill, until};

const CENTER: &str = "EU-RO-1";

fn models(size_gb: u32) -> Value {
    json!({ "name": "models", "size_gb": size_gb, "data_center": CENTER })
}

fn with(mut arguments: Value, field: &str, value: Value) -> Value {
    arguments[field] = value;
    arguments
}

/// The account's volumes, as the world has them.
async fn volumes(house: &House) -> Vec<Value> {
    let (status, body) = house.raw(Method::GET, "/v2/network-volumes", None).await;
    assert_eq!(status, 200, "{body}");
    body["networkVolumes"].as_array().expect("volumes").clone()
}

async fn of_name(house: &House, name: &str) -> Vec<Value> {
    let mut volumes = volumes(house).await;
    volumes.retain(|volume| volume["name"] == name);
    volumes
}

fn records(house: &House) -> Volumes {
    Volumes::new(&house.home(), &Timing::quick())
}

fn record(house: &House) -> VolumeRecord {
    let mut entries = records(house).read().expect("records");
    entries.remove(&format!("{CENTER}/models")).unwrap_or_else(|| panic!("no record: {entries:?}"))
}

/// The events of the audit log that speak of volumes.
fn events(house: &House) -> Vec<String> {
    let text = std::fs::read_to_string(house.home.join("audit.jsonl")).unwrap_or_default();
    let notes = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"));
    let events = notes.filter_map(|note| note["event"].as_str().map(str::to_owned));
    events.filter(|event| event.starts_with("volume")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_made_once_grows_and_never_shrinks() {
    let house = House::new().await;
    let made = house.ok("create_volume", models(50)).await;
    assert_eq!((&made["created"], &made["state"], &made["size_gb"]), (&json!(true), &json!("present"), &json!(50)));
    assert_eq!((&made["monthly_usd"], &made["still_billing"]), (&json!(3.5), &json!("yes")), "{made}");
    let again = house.ok("create_volume", json!({ "name": "models", "size_gb": 50 })).await;
    assert_eq!((&again["created"], &again["volume_id"]), (&json!(false), &made["volume_id"]));
    let grown = house.ok("create_volume", json!({ "name": "models", "size_gb": 80 })).await;
    assert_eq!((&grown["created"], &grown["size_gb"]), (&json!(false), &json!(80)), "{grown}");
    assert!(grown["note"].as_str().is_some_and(|note| note.contains("from 50 GB")), "{grown}");
    let smaller = house.ok("create_volume", models(20)).await;
    assert_eq!((&smaller["size_gb"], &smaller["volume_id"]), (&json!(80), &made["volume_id"]));
    assert!(smaller["note"].as_str().is_some_and(|note| note.contains("never shrink")), "{smaller}");
    assert_eq!((house.asked("createNetworkVolume"), house.asked("updateNetworkVolume")), (1, 1));
    assert_eq!(of_name(&house, "models").await[0]["size"], 80);
    let expected =
        ["volume_wanted", "volume_posted", "volume_created", "volume_wanted", "volume_grow_sent", "volume_grown"];
    assert_eq!(events(&house), expected);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_volume_needs_a_place_and_a_name_of_several_an_id() {
    let house = House::new().await;
    let placeless = house.call("create_volume", json!({ "name": "new", "size_gb": 10 })).await;
    assert_eq!(placeless.code, 2, "{placeless:?}");
    placeless.assert_says("`data_center`");
    placeless.assert_says("US-KS-2");
    let nowhere = with(models(10), "data_center", json!("XX-1"));
    let nowhere = house.call("create_volume", nowhere).await;
    assert_eq!(nowhere.code, 5, "{nowhere:?}");
    nowhere.assert_says("no volume was created");
    for _ in 0..2 {
        let body = json!({ "name": "twin", "size": 10, "dataCenter": CENTER });
        assert_eq!(house.raw(Method::POST, "/v2/network-volumes", Some(body)).await.0, 201);
    }
    let twins = house.call("create_volume", json!({ "name": "twin", "size_gb": 10, "data_center": CENTER })).await;
    assert_eq!(twins.code, 2, "{twins:?}");
    for twin in of_name(&house, "twin").await {
        twins.assert_says(twin["id"].as_str().expect("an id"));
    }
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn six_processes_at_once_make_one_volume() {
    let house = House::new().await;
    let calls = (0..6).map(|_| tokio::spawn(answer(house.command("create_volume", &models(50)))));
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        answers.push(call.await.expect("a call"));
    }
    assert!(answers.iter().all(|answer| answer.code == 0 && answer.value["done"] == true), "{answers:?}");
    let ids: BTreeSet<_> = answers.iter().map(|answer| answer.value["volume_id"].to_string()).collect();
    let created = answers.iter().filter(|answer| answer.value["created"] == true).count();
    assert_eq!((ids.len(), created, house.asked("createNetworkVolume")), (1, 1, 1), "{answers:?}");
    assert_eq!(of_name(&house, "models").await.len(), 1);
    house.end().await;
}

async fn is_adopted_after(fault: Value) {
    let house = House::new().await;
    house.fault(fault.clone()).await;
    let made = house.ok("create_volume", models(50)).await;
    let there = of_name(&house, "models").await;
    assert_eq!((there.len(), house.asked("createNetworkVolume")), (1, 1), "{fault}");
    assert_eq!((&made["volume_id"], &made["done"]), (&there[0]["id"], &json!(true)), "{fault}");
    until("its note", async || events(&house).contains(&"volume_adopted".to_owned()).then_some(())).await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_create_had_no_clear_answer_is_adopted() {
    let fault = |kind| json!({ "operation": "createNetworkVolume", "kind": kind });
    tokio::join!(
        is_adopted_after(fault("status_after")),
        is_adopted_after(fault("reset_after")),
        is_adopted_after(fault("garbage")),
        is_adopted_after(fault("hang_after")),
    );
}

/// Nothing was made, and nobody can know that: it is never POSTed again by itself, and counts for the cap.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_outcome_is_told_counted_and_retried_only_when_asked_for() {
    let house = House::with(ClockMode::Live, "home").await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "status_before", "status": 500 })).await;
    let before = house.ok("list_volumes", json!({})).await["total_monthly_usd"].as_f64().expect("a sum");
    let unknown = house.ok("create_volume", with(models(100), "wait_seconds", json!(2))).await;
    assert_eq!((&unknown["state"], &unknown["still_billing"]), (&json!("unknown"), &json!("possible")), "{unknown}");
    let listed = house.ok("list_volumes", json!({})).await;
    assert_eq!(listed["total_monthly_usd"].as_f64(), Some(before + 7.0), "{listed}");
    assert_eq!(listed["open"][0]["name"], "models", "{listed}");
    let intent = record(&house).intent;
    // It is joined, and not replaced before its time.
    let again = house.ok("create_volume", with(models(100), "wait_seconds", json!(1))).await;
    assert_eq!((&again["created"], &again["done"]), (&json!(false), &json!(false)), "{again}");
    let retry = with(models(100), "retry_unknown", json!(intent));
    let early = house.call("create_volume", retry.clone()).await;
    assert_eq!(early.code, 4, "{early:?}");
    early.assert_says("may still turn up");
    house.advance(11.0 * 60.0).await;
    until("ten minutes of absence", async || {
        let listed = house.ok("list_volumes", json!({})).await;
        listed["open"][0]["next"].as_str().filter(|next| next.contains(&intent)).map(|_| ())
    })
    .await;
    assert_eq!(house.asked("createNetworkVolume"), 1);
    let made = house.ok("create_volume", retry).await;
    assert_eq!((&made["created"], &made["done"]), (&json!(true), &json!(true)), "{made}");
    assert_eq!((house.asked("createNetworkVolume"), of_name(&house, "models").await.len()), (2, 1));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_never_turned_up_is_given_up_after_a_day() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "reset_before" })).await;
    house.ok("create_volume", with(models(50), "wait_seconds", json!(1))).await;
    until("a search", async || record(&house).known.lacked).await;
    house.advance(25.0 * 3600.0).await;
    until("its end", async || (record(&house).known.phase == VolumePhase::Refused).then_some(())).await;
    assert_eq!(house.ok("list_volumes", json!({})).await.get("open"), None);
    assert_eq!(events(&house).last().map(String::as_str), Some("volume_refused"));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growth_without_a_clear_answer_comes_to_its_size() {
    let house = House::new().await;
    house.ok("create_volume", models(50)).await;
    for (kind, size_gb) in [("status_after", 60), ("reset_before", 70)] {
        house.fault(json!({ "operation": "updateNetworkVolume", "kind": kind })).await;
        let grown = house.ok("create_volume", models(size_gb)).await;
        assert_eq!((&grown["done"], &grown["size_gb"]), (&json!(true), &json!(size_gb)), "{kind}: {grown}");
        assert_eq!(of_name(&house, "models").await[0]["size"], size_gb, "{kind}");
    }
    house.end().await;
}

/// The worker dies while the answer to its POST is awaited; the guard's next one finds the volume.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_killed_between_the_post_and_its_answer_adopts_the_volume() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "hang_after" })).await;
    let call = tokio::spawn(answer(house.command("create_volume", &models(50))));
    until("the volume in the world", async || of_name(&house, "models").await.pop()).await;
    let worker = house.until_worker().await;
    kill(worker);
    let made = call.await.expect("a call");
    assert_eq!((made.code, &made.value["done"]), (0, &json!(true)), "{made:?}");
    assert_ne!(house.worker(), Some(worker));
    let there = of_name(&house, "models").await;
    assert_eq!((there.len(), house.asked("createNetworkVolume")), (1, 1));
    assert_eq!(made.value["volume_id"], there[0]["id"]);
    house.end().await;
}

/// Whether the request had arrived can't be known after the worker's death, so it is not sent again.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_killed_while_it_posts_does_not_post_again() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "hang_before" })).await;
    let call = tokio::spawn(answer(house.command("create_volume", &with(models(50), "wait_seconds", json!(4)))));
    until("the journal", async || {
        let journaled = records(&house).read().expect("records").into_values().next()?;
        (journaled.known.phase == VolumePhase::Posting).then_some(())
    })
    .await;
    kill(house.until_worker().await);
    until("the next worker's search", async || record(&house).known.lacked).await;
    let told = call.await.expect("a call");
    assert_eq!((told.code, &told.value["state"]), (0, &json!("unknown")), "{told:?}");
    assert!(house.asked("createNetworkVolume") <= 1);
    assert_eq!((record(&house).known.phase, of_name(&house, "models").await.len()), (VolumePhase::Unknown, 0));
    house.end().await;
}

/// Guard and worker die with the wish on disk; the next look at the volumes starts them again.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_survives_its_keeper() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "hang_after" })).await;
    let call = tokio::spawn(answer(house.command("create_volume", &with(models(50), "wait_seconds", json!(2)))));
    until("the volume in the world", async || of_name(&house, "models").await.pop()).await;
    call.await.expect("a call");
    house.end_processes();
    assert!(record(&house).is_open());
    house.ok("list_volumes", json!({})).await;
    until("the volume in the records", async || (record(&house).known.phase == VolumePhase::Placed).then_some(()))
        .await;
    assert_eq!(house.asked("createNetworkVolume"), 1);
    house.end().await;
}

fn set_cap(house: &House, usd: f64) {
    std::fs::create_dir_all(&house.home).expect("a home");
    let config = json!({ "limits": { "max_volumes_per_month": usd } });
    std::fs::write(house.home.join("config.json"), config.to_string()).expect("a config");
}

fn assert_over_cap(refused: &Answer) {
    assert_eq!(refused.code, 4, "{refused:?}");
    for words in ["limits.max_volumes_per_month", "$0.07", "$0.05", "nothing was changed"] {
        refused.assert_says(words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cap_holds_for_all_volumes_together_however_many_ask_at_once() {
    let house = House::new().await;
    let there = house.ok("list_volumes", json!({})).await["total_monthly_usd"].as_f64().expect("a sum");
    // Room for three of the five.
    set_cap(&house, there + 3.0 * 3.5 + 1.0);
    let calls = (0..5).map(|number| {
        let arguments = with(models(50), "name", json!(format!("models-{number}")));
        tokio::spawn(answer(house.command("create_volume", &arguments)))
    });
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        answers.push(call.await.expect("a call"));
    }
    let (made, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.code == 0);
    assert_eq!((made.len(), refused.len(), house.asked("createNetworkVolume")), (3, 2, 3), "{answers:?}");
    refused.into_iter().for_each(assert_over_cap);
    // Growing counts, too; what is there already is found whatever the cap says.
    let name = made[0].value["volume"].clone();
    assert_over_cap(&house.call("create_volume", json!({ "name": name, "size_gb": 100 })).await);
    house.ok("create_volume", json!({ "name": name, "size_gb": 50 })).await;
    assert_eq!(house.asked("updateNetworkVolume"), 0);
    house.end().await;
}

/// A broken file has lost the record of a create whose answer is awaited: the keeper's memory writes it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_has_left_the_file_is_written_again() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createNetworkVolume", "kind": "status_before", "status": 500 })).await;
    house.ok("create_volume", with(models(50), "wait_seconds", json!(2))).await;
    let before = record(&house);
    std::fs::remove_file(house.home.join("volumes.json")).expect("removed");
    let after = until("the record", async || records(&house).of_intent(&before.intent).expect("records")).await;
    assert!(after.is_unknown());
    assert_eq!(after.known.listed_before, before.known.listed_before);
    assert_eq!(house.asked("createNetworkVolume"), 1);
    house.end().await;
}

/// Without the journal on disk there is no POST.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_cannot_be_written_make_no_volume() {
    let house = House::new().await;
    std::fs::create_dir_all(house.home.join("volumes.json")).expect("a folder in its place");
    let failed = house.call("create_volume", models(50)).await;
    assert_ne!(failed.code, 0, "{failed:?}");
    assert_eq!((house.asked("createNetworkVolume"), of_name(&house, "models").await.len()), (0, 0));
    house.end().await;
}

/// The disk fails between the wish and the journal: the keeper sends nothing until it can write again.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_cannot_journal_sends_nothing_until_it_can() {
    let house = House::new().await;
    house.fault(json!({ "operation": "listNetworkVolumes", "kind": "delay_ms", "delay_ms": 1500, "times": 2 })).await;
    let call = tokio::spawn(answer(house.command("create_volume", &models(50))));
    // The first list is the caller's, the second the keeper's before its POST.
    let lists = |house: &House| {
        let requests = house.sandbox.requests();
        requests.iter().filter(|entry| entry["method"] == "GET" && entry["path"] == "/v2/network-volumes").count()
    };
    until("the keeper's list", async || (lists(&house) == 2).then_some(())).await;
    let (file, aside) = (house.home.join("volumes.json"), house.home.join("aside"));
    std::fs::rename(&file, &aside).expect("moved");
    std::fs::create_dir(&file).expect("a folder in its place");
    let log = house.home.join("logs/keeper.log");
    let told = || std::fs::read_to_string(&log).unwrap_or_default().contains("what is known can't be written");
    until("the keeper's complaint", async || told().then_some(())).await;
    call.await.expect("a call");
    assert_eq!(house.asked("createNetworkVolume"), 0);
    std::fs::remove_dir(&file).expect("removed");
    std::fs::rename(&aside, &file).expect("moved back");
    until("the volume", async || (record(&house).known.phase == VolumePhase::Placed).then_some(())).await;
    assert_eq!((house.asked("createNetworkVolume"), of_name(&house, "models").await.len()), (1, 1));
    house.end().await;
}

async fn delete(house: &House, arguments: &[&str]) -> Answer {
    answer(house.program(&[&["volume", "delete"], arguments].concat())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_deleted_by_id_empty_of_pods_and_confirmed() {
    let house = House::hurried().await;
    let made = house.ok("create_volume", models(50)).await;
    let id = made["volume_id"].as_str().expect("an id").to_owned();
    let pod = json!({ "name": "user", "volume": id, "wait_seconds": 45 });
    house.ok("create_pod_with_volume", pod).await;
    let listed = house.ok("list_volumes", json!({})).await;
    let row = listed["volumes"].as_array().expect("rows").iter().find(|row| row["id"] == *id).expect("the row").clone();
    assert_eq!(row["pods"], json!(["user"]), "{listed}");

    let by_name = delete(&house, &["models", "--confirm", "models"]).await;
    assert_eq!(by_name.code, 2, "{by_name:?}");
    by_name.assert_says(&id);
    let mounted = delete(&house, &[&id, "--confirm", "models"]).await;
    assert_eq!(mounted.code, 4, "{mounted:?}");
    mounted.assert_says("mounted by user");
    house.ok("terminate_pod", json!({ "pod": "user" })).await;
    let unasked = delete(&house, &[&id]).await;
    assert_eq!(unasked.code, 4, "{unasked:?}");
    unasked.assert_says("--confirm");
    let misnamed = delete(&house, &[&id, "--confirm", "model"]).await;
    assert_eq!(misnamed.code, 4, "{misnamed:?}");
    assert_eq!(house.asked("deleteNetworkVolume"), 0, "nothing was sent so far");

    let deleted = delete(&house, &[&id, "--confirm", "models"]).await;
    assert_eq!(deleted.code, 0, "{deleted:?}");
    assert_eq!(of_name(&house, "models").await.len(), 0);
    assert_eq!(events(&house).last().map(String::as_str), Some("volume_deleted"));
    // The name is free at once, though the last create was a moment ago.
    let anew = house.ok("create_volume", models(10)).await;
    assert_eq!(anew["created"], true, "{anew}");
    assert_ne!(anew["volume_id"], made["volume_id"]);
    let gone = delete(&house, &[&id, "--confirm", "models"]).await;
    assert_eq!(gone.code, 3, "{gone:?}");
    house.end().await;
}

/// At a terminal only the whole name, typed after the question, is a yes.
#[tokio::test(flavor = "multi_thread")]
async fn a_person_types_the_name_of_the_volume_that_is_to_go() {
    let house = House::new().await;
    let made = house.ok("create_volume", models(50)).await;
    let id = made["volume_id"].as_str().expect("an id");
    for (keys, code, left) in [("y\n", 4, 1), ("\u{4}", 4, 1), ("models\n", 0, 0)] {
        let mut terminal = Terminal::of(house.program(&["volume", "delete", id]));
        terminal.types("models\n");
        terminal.shows("Type the volume's name").await;
        terminal.types(keys);
        assert_eq!(terminal.ended().await, Some(code), "{keys:?}");
        assert_eq!(of_name(&house, "models").await.len(), left, "{keys:?}");
    }
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_without_a_clear_answer_is_proven_by_the_list() {
    let house = House::new().await;
    let made = house.ok("create_volume", models(50)).await;
    let id = made["volume_id"].as_str().expect("an id");
    house.fault(json!({ "operation": "deleteNetworkVolume", "kind": "reset_after", "times": 1 })).await;
    let deleted = delete(&house, &[id, "--confirm", "models"]).await;
    assert_eq!((deleted.code, of_name(&house, "models").await.len()), (0, 0), "{deleted:?}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_volumes_come_in_pages() {
    let house = House::new().await;
    let before = volumes(&house).await.len();
    for number in 0..60 - before {
        let body = json!({ "name": format!("v{number}"), "size": 10, "dataCenter": CENTER });
        let (status, body) = house.raw(Method::POST, "/v2/network-volumes", Some(body)).await;
        assert_eq!(status, 201, "{body}");
    }
    let first = house.ok("list_volumes", json!({})).await;
    assert_eq!((first["volumes"].as_array().map(Vec::len), &first["total"]), (Some(50), &json!(60)), "{first}");
    assert_eq!(first["next"], r#"list_volumes {"page": 2}"#);
    let second = house.ok("list_volumes", json!({ "page": 2 })).await;
    assert_eq!((second["volumes"].as_array().map(Vec::len), second.get("next")), (Some(10), None), "{second}");
    assert_eq!(first["total_monthly_usd"], second["total_monthly_usd"]);
    house.end().await;
}
