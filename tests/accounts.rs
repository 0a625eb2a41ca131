//! Two accounts and one home, two homes and one account: nobody ends what he can't see, and a deadline is kept by
//! the key that made the pod.

use autopod_mcp::fleet::{HomeIdentity, later};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::faces_support::Server;
use crate::keeper_support::{Answer, GPU, House, answer, until};

/// A call with the key of the other account.
async fn by_other_key(house: &House, tool: &str, arguments: Value) -> Answer {
    let mut command = house.command(tool, &arguments);
    command.env("RUNPOD_API_KEY", house.sandbox.other_key());
    answer(command).await
}

/// Key B starts a server, lists, terminates and creates in the home of key A's pod, with A's keeper dead or alive.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_account_ends_nothing_and_keeps_no_deadline_from_being_kept() {
    let house = House::new().await;
    let made = house.ok("create_pod_with_volume", json!({ "name": "kept", "gpus": [GPU], "wait_seconds": 1 })).await;
    until("the pod", async || (house.alive().await.len() == 1).then_some(())).await;
    let record = house.fleet().get("kept").expect("records").expect("a record");
    let identity = HomeIdentity::read(&house.home()).expect("home.json");
    for keeper_lives in [true, false] {
        if !keeper_lives {
            house.end_processes();
        }
        let mut command = house.program(&["serve"]);
        command.env("RUNPOD_API_KEY", house.sandbox.other_key());
        let mut server = Server::start(command);
        let who = json!({ "name": "test", "version": "1" });
        let greeting = json!({ "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": who });
        server.ask(1, "initialize", greeting).await;
        server.send(json!({ "jsonrpc": "2.0", "method": "notifications/initialized" })).await;
        for (id, pod) in [(2, "kept"), (3, made["pod_id"].as_str().unwrap_or("kept"))] {
            let params = json!({ "name": "terminate_pod", "arguments": { "pod": pod, "allow_unmanaged": true } });
            let refused = server.ask(id, "tools/call", params).await;
            let error = &refused["result"]["_meta"]["autopod-mcp/error"];
            assert_eq!((&error["kind"], &error["still_billing"]), (&json!("refused"), &json!("possible")), "{refused}");
        }
        for (tool, arguments) in [
            ("terminate_pod", json!({ "pod": "kept" })),
            ("create_pod_with_volume", json!({ "name": "kept", "gpus": [GPU] })),
            ("create_pod_with_volume", json!({ "name": "another", "gpus": [GPU] })),
        ] {
            let refused = by_other_key(&house, tool, arguments).await;
            assert_eq!(refused.code, 4, "{refused:?}");
            refused.assert_says("another API key or provider");
            refused.assert_says("Still being billed: possibly");
        }
        // Not seeing the pod proves nothing of it.
        let listed = by_other_key(&house, "list_pods", json!({})).await;
        assert_eq!(listed.code, 0, "{listed:?}");
        assert_ne!(listed.value["still_billing"], "no", "{listed:?}");
        drop(server.stdin.take());
        server.ended().await;
    }
    let after = house.fleet().get("kept").expect("records").expect("a record");
    assert_eq!((after.intent, after.wanted, after.known.pod_id), (record.intent, record.wanted, record.known.pod_id));
    assert_eq!(after.known.expires_at, record.known.expires_at);
    assert_eq!(HomeIdentity::read(&house.home()).expect("home.json"), identity);
    assert_eq!((house.alive().await.len(), house.asked("createPod"), house.asked("deletePod")), (1, 1, 0));
    // A's keeper, whom any call by A starts, ends it in time.
    assert_eq!(house.ok("list_pods", json!({})).await["pods"].as_array().map(Vec::len), Some(1));
    house.until_worker().await;
    assert_eq!(house.alive().await.len(), 1, "in time is not early");
    house.advance(4.0 * 3600.0 + 60.0).await;
    house.until_none_alive("its deadline").await;
    let closed = until("a closed record", async || house.fleet().get("kept").ok()?.filter(|record| !record.is_open()));
    let cause = closed.await.known.ending_cause.unwrap_or_default();
    assert!(cause.contains("deadline"), "{cause}");
    // Nothing of A's is open, so B may have the home; it has no money.
    let poor = by_other_key(&house, "create_pod_with_volume", json!({ "name": "poor", "gpus": [GPU] })).await;
    assert_eq!(poor.code, 5, "{poor:?}");
    poor.assert_says("balance is too low");
    house.end().await;
}

/// The keeper was started with B's key before A's pod was there, as after a change of the config.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_with_another_accounts_key_takes_no_pod_for_gone() {
    let house = House::new().await;
    house.ok("create_pod_with_volume", json!({ "name": "kept", "gpus": [GPU], "wait_seconds": 1 })).await;
    until("the pod", async || (house.alive().await.len() == 1).then_some(())).await;
    house.end_processes();
    let fleet = house.fleet();
    let intent = fleet.get("kept").expect("records").expect("a record").intent;
    // Long past the time in which a new pod may be missing from the answers.
    let long_ago = later(Timestamp::now(), SignedDuration::from_hours(-1));
    fleet.know(&intent, move |record| record.known.posted_at = Some(long_ago)).await.expect("a record");
    // Past the check that every call makes.
    house.keeper_with(house.sandbox.other_key()).ensure_and_wake().await.expect("a keeper");
    let before = house.asked("listPods");
    house.advance(120.0).await;
    until("looks at another account's list", async || (house.asked("listPods") > before + 5).then_some(())).await;
    let record = house.fleet().get("kept").expect("records").expect("a record");
    assert!(record.is_open(), "a key that shows nothing proved the pod gone: {:?}", record.known);
    assert_eq!(house.alive().await.len(), 1);
    // The right key takes over, and the deadline stands.
    house.ok("list_pods", json!({})).await;
    let done = house.ok("terminate_pod", json!({ "pod": "kept" })).await;
    assert_eq!((&done["done"], house.alive().await.len()), (&json!(true), 0), "{done}");
    house.end().await;
}

/// One account, two homes with pods of the same name: each keeper keeps to its own, over deadlines and restarts.
#[tokio::test(flavor = "multi_thread")]
async fn two_homes_keep_to_their_own_pods() {
    let mut house = House::new().await;
    let create =
        |minutes: u32| json!({ "name": "twin", "gpus": [GPU], "wait_seconds": 0, "lifetime_minutes": minutes });
    let id = async |house: &House| {
        let placed = async || house.fleet().get("twin").ok()??.known.pod_id;
        until("the pod", placed).await
    };
    house.ok("create_pod_with_volume", create(60)).await;
    let first = id(&house).await;
    let second_home = house.folder().join("second");
    let first_home = std::mem::replace(&mut house.home, second_home.clone());
    house.ok("create_pod_with_volume", create(180)).await;
    let second = id(&house).await;
    assert_ne!(first, second);
    // Both keepers begin anew and look for what they own.
    for home in [&first_home, &second_home] {
        house.home = home.clone();
        house.end_processes();
        house.ok("list_pods", json!({})).await;
        house.until_worker().await;
    }
    house.advance(61.0 * 60.0).await;
    until("the first one's deadline", async || (house.alive().await.len() == 1).then_some(())).await;
    assert_eq!(house.alive().await[0]["id"], second);
    assert_eq!(house.fleet().read().expect("records").len(), 1, "the other home's pod was taken in");
    house.advance(121.0 * 60.0).await;
    house.until_none_alive("the second one's deadline").await;
    let deletes = house.sandbox.requests();
    let deletes: Vec<_> = deletes.iter().filter(|entry| entry["operation"] == "deletePod").collect();
    assert!(deletes.iter().all(|entry| entry["status"] == 204 || entry["status"] == 404), "{deletes:?}");
    for home in [first_home, second_home] {
        house.home = home;
        until("closed records", async || {
            let records = house.fleet().read().ok()?;
            (records.len() == 1 && !records.values().any(|record| record.is_open())).then_some(())
        })
        .await;
        house.end_processes();
    }
    house.end().await;
}
