//! A config that breaks a rule: nothing that costs money is begun, and pods are listed and ended all the same.

use serde_json::{Value, json};
use tokio::process::Command;

use crate::faces_support::Server;
use crate::keeper_support::{Answer, House, answer};

/// A mistyped cap.
const BAD_LIMIT: &str = r#"{"limits": {"max_pods": "many"}}"#;

fn write(house: &House, text: &str) {
    autopod_mcp::state::write_file(&house.home.join("config.json"), text.as_bytes()).expect("written");
}

/// The key and the address in the file, and what else stands there.
fn file_with(house: &House, rest: &str) -> String {
    format!(r#"{{"api_key": "{}", "api_base_url": "{}"{rest}}}"#, house.sandbox.key(), house.sandbox.url())
}

/// Without what the environment says of the provider.
fn keyless(mut command: Command) -> Command {
    command.env_remove("RUNPOD_API_KEY").env_remove("RUNPOD_API_BASE_URL");
    command
}

async fn call(house: &House, tool: &str, arguments: Value) -> Answer {
    answer(keyless(house.command(tool, &arguments))).await
}

fn assert_warns(answer: &Answer, words: &[&str]) {
    assert_eq!(answer.code, 0, "{answer:?}");
    let warning = answer.value["warning"].as_str().unwrap_or_else(|| panic!("no warning: {answer:?}"));
    assert!(words.iter().all(|word| warning.contains(word)), "{words:?}: {warning}");
}

async fn refuses_to_create(house: &House, words: &[&str]) {
    let asked = house.asked("createPod");
    let refused = call(house, "create_pod_with_volume", json!({ "name": "more" })).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    for word in words {
        refused.assert_says(word);
    }
    assert_eq!(house.asked("createPod"), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_limit_keeps_nobody_from_listing_and_ending() {
    let house = House::hurried().await;
    house.create("there").await;
    write(&house, &file_with(&house, &format!(", {}", &BAD_LIMIT[1..BAD_LIMIT.len() - 1])));
    let told = ["config.json", "limits.max_pods", "\"many\"", "nothing that costs money is begun"];
    let listed = call(&house, "list_pods", json!({})).await;
    assert_warns(&listed, &told);
    assert_eq!((&listed.value["source"], &listed.value["pods"][0]["pod"]), (&json!("provider"), &json!("there")));
    assert_warns(&call(&house, "get_pod", json!({ "pod": "there" })).await, &told);
    refuses_to_create(&house, &told[..3]).await;
    let refused = call(&house, "control_pod", json!({ "pod": "there", "action": "extend", "minutes": 60 })).await;
    refused.assert_says("limits.max_pods");
    let volume = json!({ "name": "v", "size_gb": 20, "data_center": "EU-RO-1" });
    call(&house, "create_volume", volume).await.assert_says("limits.max_pods");
    assert_eq!(house.asked("createNetworkVolume"), 0);
    let spending = call(&house, "spending", json!({})).await;
    assert!(spending.code == 0 && spending.value["caps"] == json!([]), "{spending:?}");
    assert!(spending.value["warnings"].to_string().contains("limits.max_pods"), "{spending:?}");
    // What makes it cheaper goes on.
    let stopped = call(&house, "control_pod", json!({ "pod": "there", "action": "stop" })).await;
    assert_eq!(stopped.code, 0, "{stopped:?}");
    let refused = call(&house, "control_pod", json!({ "pod": "there", "action": "start" })).await;
    refused.assert_says("limits.max_pods");
    let ended = call(&house, "terminate_pod", json!({ "pod": "there" })).await;
    assert_warns(&ended, &told);
    assert_eq!(ended.value["done"], true, "{ended:?}");
    house.until_none_alive("the end").await;
    write(&house, &file_with(&house, ""));
    let mended = call(&house, "list_pods", json!({})).await;
    assert!(mended.code == 0 && mended.value["warning"].is_null(), "{mended:?}");
    house.end().await;
}

/// The key is in the file and can't be read, but the keeper has it.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_file_keeps_nobody_from_listing_and_ending() {
    let house = House::hurried().await;
    house.create("there").await;
    write(&house, r#"{"api_key": "rpa_half"#);
    let told = ["config.json", "not JSON"];
    let listed = call(&house, "list_pods", json!({})).await;
    assert_warns(&listed, &told);
    assert_eq!((&listed.value["source"], &listed.value["pods"][0]["pod"]), (&json!("records"), &json!("there")));
    refuses_to_create(&house, &told).await;
    let with_a_key = answer(house.command("list_pods", &json!({}))).await;
    assert_warns(&with_a_key, &told);
    assert_eq!(with_a_key.value["source"], "provider", "the environment comes first");
    let ended = call(&house, "terminate_pod", json!({ "pod": "there" })).await;
    assert_warns(&ended, &told);
    assert_eq!(ended.value["done"], true, "{ended:?}");
    assert!(house.alive().await.is_empty());
    // With no keeper and no key nothing can be ended, which is said.
    house.end_processes();
    let volumes = call(&house, "list_volumes", json!({})).await;
    assert_eq!(volumes.code, 1, "{volumes:?}");
    volumes.assert_says("no RunPod API key could be read");
    volumes.assert_says("not JSON");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_address_is_told_with_the_place_where_it_stands() {
    let house = House::hurried().await;
    house.create("there").await;
    write(&house, r#"{"api_key": "rpa_x", "api_base_url": "http://10.0.0.1"}"#);
    let told = ["`api_base_url` in ", "config.json", "unencrypted", "10.0.0.1"];
    let listed = call(&house, "list_pods", json!({})).await;
    assert_warns(&listed, &told);
    assert!(!listed.value["warning"].to_string().contains("RUNPOD_API_BASE_URL"), "{listed:?}");
    refuses_to_create(&house, &told).await;
    let ended = call(&house, "terminate_pod", json!({ "pod": "there" })).await;
    assert!(ended.code == 0 && ended.value["done"] == true, "{ended:?}");
    let mut command = house.command("list_pods", &json!({}));
    command.env("RUNPOD_API_BASE_URL", "ftp://somewhere");
    let wrong = answer(command).await;
    assert_eq!(wrong.code, 1, "{wrong:?}");
    wrong.assert_says("RUNPOD_API_BASE_URL: ");
    house.end().await;
}

/// Somebody saves the file in the middle of an edit.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_keeps_its_key_while_the_file_is_broken() {
    let house = House::hurried().await;
    house.create("there").await;
    write(&house, &file_with(&house, ""));
    let mut server = Server::start(keyless(house.program(&["serve"])));
    let client =
        json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}});
    server.ask(1, "initialize", client).await;
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    let list = json!({"name": "list_pods", "arguments": {}});
    for (round, text) in ["", &file_with(&house, "")[..40], r#"{"api_base_url": "nowhere"}"#].into_iter().enumerate() {
        if round > 0 {
            write(&house, text);
        }
        let answer = server.ask(2 + round as u64, "tools/call", list.clone()).await;
        let told = &answer["result"]["structuredContent"];
        assert_eq!(told["source"], "provider", "{text}: {answer}");
        assert_eq!(told["warning"].is_string(), round > 0, "{text}: {answer}");
    }
    let create = json!({"name": "create_pod_with_volume", "arguments": {"name": "more"}});
    let refused = server.ask(8, "tools/call", create).await;
    assert!(refused["result"]["isError"] == true && refused.to_string().contains("api_base_url"), "{refused}");
    let end = json!({"name": "terminate_pod", "arguments": {"pod": "there"}});
    let ended = server.ask(9, "tools/call", end).await;
    assert_eq!(ended["result"]["structuredContent"]["done"], true, "{ended}");
    assert!(ended["result"]["content"][0]["text"].as_str().is_some_and(|text| text.contains("Warning: ")), "{ended}");
    write(&house, &file_with(&house, ""));
    let mended = server.ask(10, "tools/call", list).await;
    assert!(mended["result"]["structuredContent"]["warning"].is_null(), "{mended}");
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0);
    house.end().await;
}
