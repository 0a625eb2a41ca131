//! Pods on their way up and down, what they cost, and the end of the sandbox itself.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use autopod_mcp::sandbox::{self, ClockMode};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::{Tested, client, options, pod_body};

#[tokio::test]
async fn a_pod_comes_up_step_by_step() {
    let world = Tested::new().await;
    let (status, pod) = world.post("/v2/pods", pod_body("comfy")).await;
    assert_eq!(status, 201);
    assert_eq!(pod["status"], "PROVISIONING");
    assert_eq!(pod["actions"], json!(["stop", "terminate"]));
    assert_eq!(pod["cost"], 0.25);
    assert_eq!(pod["dataCenterId"], Value::Null);
    assert_eq!(pod["ssh"], json!({ "proxy": null, "direct": null }));
    assert_eq!(pod["env"], json!({ "PUBLIC_KEY": "ssh-ed25519 AAAA test" }));
    let id = pod["id"].as_str().expect("an id").to_owned();

    world.advance(1.9).await;
    assert_eq!(world.pod(&id).await["status"], "PROVISIONING");
    world.advance(0.1).await;
    let pod = world.pod(&id).await;
    assert_eq!((&pod["status"], &pod["dataCenterId"]), (&json!("STARTING"), &json!("EU-RO-1")));
    assert_eq!(pod["ssh"]["proxy"]["host"], "ssh.runpod.io");
    assert_eq!((&pod["ssh"]["direct"], &pod["runtime"], &pod["startedAt"]), (&Value::Null, &Value::Null, &Value::Null));

    world.advance(2.0).await;
    let pod = world.pod(&id).await;
    assert_eq!(pod["status"], "RUNNING");
    assert_eq!(pod["actions"], json!(["stop", "restart", "terminate"]));
    let port = pod["ssh"]["direct"]["port"].as_u64().expect("a port") as u16;
    assert_eq!(pod["runtime"]["ports"][0]["public"], port);
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "sshd answers a second too early");
    world.advance(1.0).await;
    TcpStream::connect(("127.0.0.1", port)).await.expect("sshd");
    assert_eq!(world.pod(&id).await["runtime"]["uptime"], 1);
    world.finish().await;
}

#[tokio::test]
async fn stop_start_restart_and_terminate() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    assert_eq!(world.act(&id, "restart").await.0, 409);
    world.advance(7.0).await;
    let first = world.pod(&id).await;

    let (status, stopped) = world.act(&id, "stop").await;
    assert_eq!((status, &stopped["status"], &stopped["cost"]), (200, &json!("EXITED"), &json!(0.0)));
    assert_eq!((&stopped["runtime"], &stopped["ssh"]["direct"]), (&Value::Null, &Value::Null));
    assert_eq!(stopped["actions"], json!(["start", "terminate"]));
    assert_eq!(stopped["startedAt"], first["startedAt"]);
    let old_port = first["ssh"]["direct"]["port"].as_u64().expect("a port") as u16;
    assert!(TcpStream::connect(("127.0.0.1", old_port)).await.is_err());
    assert_eq!(world.act(&id, "stop").await.0, 409);

    assert_eq!(world.act(&id, "start").await.0, 200);
    world.advance(7.0).await;
    let second = world.pod(&id).await;
    assert_eq!(second["status"], "RUNNING");
    assert_ne!(second["startedAt"], first["startedAt"]);
    assert_eq!(second["createdAt"], first["createdAt"]);

    let (status, restarting) = world.act(&id, "restart").await;
    assert_eq!((status, &restarting["status"]), (200, &json!("STARTING")));
    world.advance(2.0).await;
    let third = world.pod(&id).await;
    assert_eq!((&third["status"], &third["startedAt"]), (&json!("RUNNING"), &second["startedAt"]));
    assert_eq!(world.inner_pod(&id).await["container_starts"], 3);

    assert_eq!(world.act(&id, "terminate").await.0, 204);
    assert_eq!(world.get(&format!("/v2/pods/{id}")).await.0, 404);
    assert_eq!(world.delete(&format!("/v2/pods/{id}")).await, 404);
    assert!(world.list().await.is_empty());
    assert!(!world.folder.path().join("sandbox/pods").join(&id).exists());
    assert_eq!(world.inner_pod(&id).await["status"], "TERMINATED");
    world.finish().await;
}

#[tokio::test]
async fn one_long_leap_takes_each_step_at_its_time() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    world.advance(3600.0).await;
    let pod = world.pod(&id).await;
    assert_eq!(pod["runtime"]["uptime"], 3596);
    world.finish().await;
}

#[tokio::test]
async fn the_clock_only_goes_forward() {
    let world = Tested::new().await;
    let (_, before) = world.get("/_sandbox/clock").await;
    for wrong in
        [json!({ "advance_seconds": -1 }), json!({ "advance_seconds": 1e12 }), json!({ "seconds": 1 }), json!(1)]
    {
        assert_eq!(world.post("/_sandbox/clock", wrong.clone()).await.0, 422, "{wrong}");
    }
    assert_eq!(world.get("/_sandbox/clock").await.1, before);
    world.finish().await;
}

#[tokio::test]
async fn an_empty_start_command_keeps_everything_down() {
    let world = Tested::new().await;
    let mut body = pod_body("silent");
    body["args"] = json!("");
    let (status, pod) = world.post("/v2/pods", body).await;
    assert_eq!(status, 201);
    world.advance(60.0).await;
    let id = pod["id"].as_str().expect("an id");
    let pod = world.pod(id).await;
    assert_eq!(pod["status"], "RUNNING");
    let port = pod["ssh"]["direct"]["port"].as_u64().expect("a port") as u16;
    assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err());
    world.finish().await;
}

#[tokio::test]
async fn cost_accrues_while_a_pod_holds_its_gpu() {
    let world = Tested::new().await;
    let mut body = pod_body("pair");
    body["gpu"]["count"] = json!(2);
    let (_, pod) = world.post("/v2/pods", body).await;
    assert_eq!(pod["cost"], 0.5);
    let id = pod["id"].as_str().expect("an id").to_owned();
    world.advance(7200.0).await;
    world.act(&id, "stop").await;
    world.advance(7200.0).await;
    let close = |value: &Value, wanted: f64| (value.as_f64().expect("a number") - wanted).abs() < 1e-6;
    assert!(close(&world.inner_pod(&id).await["accrued_gpu_usd"], 1.0));
    world.act(&id, "start").await;
    world.advance(3600.0).await;
    assert_eq!(world.delete(&format!("/v2/pods/{id}")).await, 204);
    world.advance(3600.0).await;
    let inner = world.inner_pod(&id).await;
    assert!(close(&inner["accrued_gpu_usd"], 1.5), "{inner}");
    assert!(close(&inner["accrued_disk_usd"], 3.0 * 40.0 * 0.1 / 720.0), "{inner}");

    let (status, bill) = world.get(&format!("/v2/billing/pods?podId={id}&bucketSize=hour&lastN=12")).await;
    assert_eq!(status, 200, "{bill}");
    assert!(close(&bill["metadata"]["totals"]["gpuAmount"], 1.5), "{bill}");
    let records = bill["records"].as_array().expect("records");
    let sum: f64 = records.iter().filter_map(|record| record["gpuAmount"].as_f64()).sum();
    assert!((sum - 1.5).abs() < 1e-6 && records.len() >= 3, "{bill}");
    for size in ["day", "week", "month", "year"] {
        let (status, bill) = world.get(&format!("/v2/billing/pods?bucketSize={size}&lastN=2")).await;
        assert_eq!((status, &bill["metadata"]["query"]["bucketSize"]), (200, &json!(size)));
        assert!(close(&bill["metadata"]["totals"]["gpuAmount"], 1.5), "{bill}");
        assert!(bill["records"][0]["startTime"].as_str().is_some_and(|time| time.ends_with("T00:00:00Z")), "{bill}");
    }
    assert_eq!(world.get("/v2/billing/pods?lastN=2&endTime=2026-01-01T00:00:00Z").await.0, 400);
    let (_, other) = world.get("/v2/billing/pods?podId=another").await;
    assert_eq!(other["metadata"]["recordCount"], 0);
    world.finish().await;
}

#[tokio::test]
async fn every_answer_has_the_worlds_date_and_the_quota() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    world.advance(86_400.0 * 365.0).await;
    let (_, clock) = world.get("/_sandbox/clock").await;
    let now: jiff::Timestamp = clock["now"].as_str().expect("a time").parse().expect("a timestamp");
    for path in [format!("/v2/pods/{id}"), "/v2/pods/none".to_owned()] {
        let response = world.request(Method::GET, &path).send().await.expect("an answer");
        let date = response.headers()["date"].to_str().expect("a date");
        let date = jiff::fmt::rfc2822::parse(date).expect("a date").timestamp();
        assert_eq!(date.as_second(), now.as_second());
        assert!(response.headers()["ratelimit"].to_str().expect("text").starts_with("\"minute\";r="));
        assert!(response.headers()["ratelimit-policy"].to_str().expect("text").contains(";w=60"));
    }
    world.finish().await;
}

#[tokio::test]
async fn the_proxy_shows_exposed_ports_only() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    let proxied = |port: u16| world.client.get(format!("{}/_proxy/{id}-{port}/", world.sandbox.url())).send();
    world.advance(5.0).await;
    assert_eq!(proxied(8188).await.expect("an answer").status(), 502);
    world.advance(2.0).await;
    assert_eq!(proxied(8188).await.expect("an answer").status(), 200);
    assert_eq!(proxied(22).await.expect("an answer").status(), 404);
    world.act(&id, "stop").await;
    assert_eq!(proxied(8188).await.expect("an answer").status(), 502);
    world.finish().await;
}

#[tokio::test]
async fn logs_come_as_events() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    world.advance(10.0).await;
    let mut stream = world.request(Method::GET, &format!("/v2/pods/{id}/logs?tail=2")).send().await.expect("an answer");
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    let first = stream.chunk().await.expect("a chunk").expect("lines");
    let text = String::from_utf8(first.to_vec()).expect("text");
    assert_eq!(text.matches("data: ").count(), 2, "{text}");
    assert!(text.contains("\"source\":\"container\"") && text.contains("id: "), "{text}");
    world.act(&id, "stop").await;
    let second = stream.chunk().await.expect("a chunk").expect("a line");
    assert!(String::from_utf8_lossy(&second).contains("stop container"));
    world.delete(&format!("/v2/pods/{id}")).await;
    assert!(stream.chunk().await.expect("the end").is_none());
    world.finish().await;
}

#[tokio::test]
async fn logs_are_resumed_where_they_were_left() {
    let world = Tested::new().await;
    let id = world.create("comfy").await;
    world.advance(10.0).await;
    let read = async |query: &str, resume: Option<&str>| {
        let mut request = world.request(Method::GET, &format!("/v2/pods/{id}/logs{query}"));
        if let Some(resume) = resume {
            request = request.header("last-event-id", resume);
        }
        let mut stream = request.send().await.expect("an answer");
        assert_eq!(
            (stream.status().as_u16(), &stream.headers()["cache-control"]),
            (200, &"no-cache".parse().expect("a value"))
        );
        let text = String::from_utf8(stream.chunk().await.expect("a chunk").expect("lines").to_vec()).expect("text");
        let events = text.split("\n\n").filter(|event| !event.is_empty()).map(|event| {
            let (first, second) = event.split_once('\n').expect("two lines");
            let data: Value = serde_json::from_str(second.strip_prefix("data: ").expect("data")).expect("JSON");
            assert_eq!(data["ts"], first.strip_prefix("id: ").expect("an id"));
            data
        });
        events.collect::<Vec<Value>>()
    };
    let all = read("", None).await;
    assert!(all.len() >= 5, "{all:?}");
    let second = all[1]["ts"].as_str().expect("a time");
    let after: Vec<Value> = all.iter().filter(|line| line["ts"].as_str() > Some(second)).cloned().collect();
    assert!(after.len() >= 2 && after.len() < all.len());
    // `tail` counts for nothing beside a place to go on from, and the header goes before the parameter.
    assert_eq!(read(&format!("?tail=1&since={second}"), None).await, after);
    assert_eq!(read("?since=2020-01-01T00:00:00Z", Some(second)).await, after);
    assert_eq!(read("?tail=1", None).await, all[all.len() - 1..]);
    let system = read("?source=system&tail=5000", None).await;
    assert!(!system.is_empty() && system.iter().all(|line| line["source"] == "system"), "{system:?}");
    for wrong in ["?tail=5001", "?tail=-1", "?since=yesterday", "?source=all", "?follow=true"] {
        assert_eq!(world.get(&format!("/v2/pods/{id}/logs{wrong}")).await.0, 422, "{wrong}");
    }
    world.finish_rude().await;
}

#[tokio::test]
async fn a_leap_of_nine_hours_finds_the_pods_as_time_left_them() {
    let world = Tested::new().await;
    let (running, stopped) = (world.create("running").await, world.create("stopped").await);
    let mut own_disk = pod_body("own disk");
    own_disk["mounts"] = json!({ "persistent": { "size": 100, "path": "/data" } });
    let (_, own_disk) = world.post("/v2/pods", own_disk).await;
    let own_disk = own_disk["id"].as_str().expect("an id");
    for id in [&stopped, own_disk] {
        world.act(id, "stop").await;
    }
    world.advance(9.0 * 3600.0).await;
    assert_eq!(world.pod(&running).await["runtime"]["uptime"], 9 * 3600 - 4);
    let accrued = async |id: &str| world.inner_pod(id).await["accrued_usd"].as_f64().expect("a number");
    let close = |sum: f64, wanted: f64| (sum - wanted).abs() < 1e-6;
    assert!(close(accrued(&running).await, 9.0 * (0.25 + 40.0 * 0.1 / 720.0)));
    assert!(close(accrued(&stopped).await, 0.0));
    // What a stopped pod keeps on a disk of its own costs twice as much as while it runs.
    assert!(close(accrued(own_disk).await, 9.0 * 100.0 * 0.2 / 720.0));
    world.finish().await;
}

#[tokio::test]
async fn a_live_world_needs_nobody_to_move_it() {
    let world = Tested::with_clock(ClockMode::Live).await;
    let id = world.create("comfy").await;
    // A leap works on a live clock too, so that this needn't wait for real seconds.
    world.advance(6.9).await;
    let port = world.pod(&id).await["ssh"]["direct"]["port"].as_u64().expect("a port") as u16;
    TcpStream::connect(("127.0.0.1", port)).await.expect("sshd");
    let start = world.create("by itself").await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    // Only the control route is asked, and it would not be needed either.
    while world.inner_pod(&start).await["status"] == "PROVISIONING" {
        assert!(tokio::time::Instant::now() < deadline, "nothing moves");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    world.finish().await;
}

#[tokio::test]
async fn files_of_the_world_are_private_and_go_with_it() {
    let world = Tested::new().await;
    let folder = world.folder.path().join("sandbox");
    let mode = |name: &str| std::fs::metadata(folder.join(name)).expect("a file").permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("world.key"), mode("sandbox.json")), (0o700, 0o600, 0o600));
    let about = std::fs::read_to_string(folder.join("sandbox.json")).expect("a file");
    let about: Value = serde_json::from_str(&about).expect("JSON");
    assert_eq!((&about["url"], &about["pid"]), (&json!(world.sandbox.url()), &json!(std::process::id())));
    let key = std::fs::read_to_string(about["key_file"].as_str().expect("a path")).expect("a file");
    assert_eq!(key.trim(), world.sandbox.key());
    world.create("comfy").await;
    let temporary = world.folder;
    world.sandbox.stop().await;
    let left = std::fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").file_name());
    assert_eq!(left.collect::<Vec<_>>(), Vec::<std::ffi::OsString>::new());
    drop(temporary);
}

#[tokio::test]
async fn an_idle_world_ends_but_not_with_a_pod() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut idle = options(&folder, ClockMode::Manual);
    idle.idle_limit = Some(Duration::from_millis(1500));
    let sandbox = sandbox::start(idle).await.expect("a sandbox");
    let url = format!("{}/v2/pods", sandbox.url());
    let created =
        client().post(&url).bearer_auth(sandbox.key()).json(&pod_body("comfy")).send().await.expect("an answer");
    let pod: Value = created.json().await.expect("a pod");
    assert!(tokio::time::timeout(Duration::from_millis(2500), sandbox.ended()).await.is_err(), "it ended under a pod");
    let pod_url = format!("{url}/{}", pod["id"].as_str().expect("an id"));
    client().delete(pod_url).bearer_auth(sandbox.key()).send().await.expect("an answer");
    // The keeper's requests don't keep it awake.
    let (keeper, key) = (client(), sandbox.key().to_owned());
    let knocking = tokio::spawn(async move {
        loop {
            let request = keeper.get(&url).bearer_auth(&key).header("user-agent", "autopod-keeper/0.1");
            if request.send().await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    tokio::time::timeout(Duration::from_secs(30), sandbox.ended()).await.expect("it ends by itself");
    tokio::time::timeout(Duration::from_secs(30), knocking).await.expect("nobody listens any more").expect("no panic");
}

#[tokio::test]
async fn only_loopback_is_listened_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut open = options(&folder, ClockMode::Manual);
    open.listen = "0.0.0.0:0".parse().expect("an address");
    let error = sandbox::start(open).await.expect_err("refused");
    assert!(error.to_string().contains("loopback"), "{error}");
}
