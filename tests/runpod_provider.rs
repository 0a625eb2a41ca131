//! The RunPod client against a scripted server on a real socket: what it sends, how it reads, what it repeats.

mod budget;
mod contract;
mod failures;
mod logs;
mod script;

use std::collections::BTreeMap;

use autopod_mcp::provider::{
    Cloud, GpuProvider, PodAction, PodSpec, PodStatus, ProviderError, SshAddress, Stock, VolumeMount, VolumeSpec,
};
use script::{Script, answer, json, problem};
use serde_json::{Value, json};

fn spec() -> PodSpec {
    PodSpec {
        name: "comfy-7".into(),
        image: Some("runpod/comfyui:latest".into()),
        template: None,
        registry: None,
        gpu: "NVIDIA GeForce RTX 4090".into(),
        gpu_count: 1,
        min_cuda: None,
        cloud: Cloud::Secure,
        data_centers: vec![],
        disk_gb: 40,
        volume: None,
        ports: vec!["8188/http".into(), "22/tcp".into()],
        env: BTreeMap::from([("PUBLIC_KEY".to_owned(), "ssh-ed25519 AAAA me".to_owned())]),
    }
}

fn full_spec() -> PodSpec {
    PodSpec {
        gpu_count: 2,
        min_cuda: Some("12.8".into()),
        cloud: Cloud::Community,
        data_centers: vec!["EU-RO-1".into(), "US-TX-3".into()],
        volume: Some(VolumeMount { volume_id: "vol1".into(), path: "/workspace".into() }),
        ports: vec!["8188/http".into()],
        env: BTreeMap::new(),
        ..spec()
    }
}

fn volume_spec() -> VolumeSpec {
    VolumeSpec { name: "models".into(), size_gb: 100, data_center: "EU-RO-1".into() }
}

const POD: &str =
    r#"{"id":"p1","name":"comfy-7","status":"RUNNING","actions":["stop","restart","terminate"],"cost":0.69}"#;
const VOLUME: &str = r#"{"id":"v1","name":"models","size":100,"dataCenter":"EU-RO-1","type":"STANDARD"}"#;

#[tokio::test]
async fn a_create_sends_exactly_the_contract() {
    let server = Script::start([json(201, POD), json(201, POD)]).await;
    let client = server.client();
    client.create_pod(&spec()).await.unwrap();
    client.create_pod(&full_spec()).await.unwrap();

    let requests = server.requests();
    assert_eq!(requests[0].line(), "POST /v2/pods");
    assert_eq!(requests[0].header("content-type"), Some("application/json"));
    assert_eq!(
        requests[0].json(),
        json!({
            "name": "comfy-7", "image": "runpod/comfyui:latest", "cloud": "SECURE", "disk": 40,
            "gpu": { "id": "NVIDIA GeForce RTX 4090", "count": 1 },
            "ports": ["8188/http", "22/tcp"], "startSsh": true,
            "env": { "PUBLIC_KEY": "ssh-ed25519 AAAA me" },
        })
    );
    assert_eq!(
        requests[1].json(),
        json!({
            "name": "comfy-7", "image": "runpod/comfyui:latest", "cloud": "COMMUNITY", "disk": 40,
            "gpu": { "id": "NVIDIA GeForce RTX 4090", "count": 2, "minCudaVersion": "12.8" },
            "dataCenterIds": ["EU-RO-1", "US-TX-3"],
            "mounts": { "network": [{ "volumeId": "vol1", "path": "/workspace" }] },
            "ports": ["8188/http"], "env": {},
        })
    );
}

#[tokio::test]
async fn a_template_brings_what_the_request_leaves_out() {
    let server = Script::start([json(201, POD), json(201, POD)]).await;
    let client = server.client();
    let registry = Some("reg1".to_owned());
    let bare = PodSpec { image: None, template: Some("30zmvf89kd".into()), registry, ..spec() };
    client.create_pod(&bare).await.unwrap();
    client.create_pod(&PodSpec { image: spec().image, ..bare }).await.unwrap();
    let bodies: Vec<_> = server.requests().iter().map(script::Request::json).collect();
    assert_eq!((&bodies[0]["templateId"], &bodies[0]["registry"]), (&json!("30zmvf89kd"), &json!("reg1")));
    assert_eq!((bodies[0].get("image"), bodies[0].get("args")), (None, None));
    assert_eq!(bodies[1]["image"], "runpod/comfyui:latest");
}

#[tokio::test]
async fn the_books_are_read_as_one_sum_a_pod() {
    let record = |pod: &str, total: f64| {
        json!({ "podId": pod, "totalAmount": total, "gpuAmount": total, "cpuAmount": 0,
        "startTime": "2026-11-06T00:00:00Z", "endTime": "2026-11-06T01:00:00Z", "diskAmount": 0.01 })
    };
    let books = json!({ "records": [record("p2", 0.5), record("p1", 0.69), record("p2", 0.25)], "metadata": {} });
    let more = json!({ "records": [record("p1", 0.01)], "pagination": { "hasNextPage": false } });
    let first = json!({ "records": [record("p1", 0.02)], "pagination": { "nextCursor": "a", "hasNextPage": true } });
    let steps = [json(200, &books.to_string()), json(200, &first.to_string()), json(200, &more.to_string())];
    let refusals = [problem(403, "", "{}"), problem(404, "", "{}")];
    let server = Script::start(steps.into_iter().chain(refusals)).await;
    let client = server.client();
    let (from, until) = ("2026-11-06T00:00:00Z".parse().unwrap(), "2026-11-07T00:00:00Z".parse().ok());
    let bills = client.billing(from, until).await.unwrap().value;
    let sums: Vec<_> = bills.iter().map(|bill| (bill.pod_id.as_str(), bill.total_usd, bill.disk_usd)).collect();
    assert_eq!(sums, [("p1", 0.69, 0.01), ("p2", 0.75, 0.02)]);
    // The same pod on two pages is charged on both.
    assert_eq!(client.billing(from, None).await.unwrap().value[0].total_usd, 0.03);
    assert!(matches!(client.billing(from, None).await, Err(ProviderError::Forbidden { .. })));
    assert!(matches!(client.billing(from, None).await, Err(ProviderError::NotFound { .. })));
    let lines: Vec<_> = server.requests().iter().map(script::Request::line).collect();
    let span = "startTime=2026-11-06T00%3A00%3A00Z";
    assert_eq!(lines[0], format!("GET /v2/billing/pods?bucketSize=hour&{span}&endTime=2026-11-07T00%3A00%3A00Z"));
    assert_eq!(lines[1], format!("GET /v2/billing/pods?bucketSize=hour&{span}"));
}

#[tokio::test]
async fn the_other_changes_send_exactly_the_contract() {
    let gone = || answer(204, "", "");
    let server = Script::start([json(200, POD), json(201, VOLUME), json(200, VOLUME), gone(), gone()]).await;
    let client = server.client();
    client.control_pod("p1", PodAction::Stop).await.unwrap();
    client.create_volume(&volume_spec()).await.unwrap();
    client.grow_volume("v1", 200).await.unwrap();
    client.delete_pod("p1").await.unwrap();
    client.delete_volume("v1").await.unwrap();

    let sent: Vec<_> = server.requests().iter().map(|request| (request.line(), request.body.clone())).collect();
    let body = |value: Value| value.to_string();
    assert_eq!(sent[0], ("POST /v2/pods/p1/action".into(), body(json!({ "action": "stop" }))));
    let volume = json!({ "name": "models", "size": 100, "dataCenter": "EU-RO-1" });
    assert_eq!(sent[1], ("POST /v2/network-volumes".into(), body(volume)));
    assert_eq!(sent[2], ("PATCH /v2/network-volumes/v1".into(), body(json!({ "size": 200 }))));
    assert_eq!(sent[3], ("DELETE /v2/pods/p1".into(), String::new()));
    assert_eq!(sent[4], ("DELETE /v2/network-volumes/v1".into(), String::new()));
}

#[tokio::test]
async fn every_request_says_who_asks_and_with_what_key() {
    let server = Script::start([json(200, POD)]).await;
    server.client().pod("p1").await.unwrap();
    let request = &server.requests()[0];
    assert_eq!(request.line(), "GET /v2/pods/p1");
    assert_eq!(request.header("authorization"), Some("Bearer rpa_TESTKEY0123456789"));
    assert_eq!(request.header("user-agent"), Some("autopod-test/1.2.3"));
}

#[tokio::test]
async fn the_date_of_the_answer_is_the_providers_clock() {
    let date = "Date: Sun, 06 Nov 2026 08:49:37 GMT\r\n";
    let wrong = "Date: yesterday\r\n";
    let right = "Date: Fri, 06 Nov 2026 08:49:37 GMT\r\n";
    let steps = [answer(200, right, POD), answer(200, date, POD), answer(200, wrong, POD), json(200, POD)];
    let server = Script::start(steps).await;
    let client = server.client();
    let dated = client.pod("p1").await.unwrap().date;
    assert_eq!(dated, Some("2026-11-06T08:49:37Z".parse().unwrap()));
    // A date that contradicts itself, one that is none, and none at all are no reason to fail.
    for _ in 0..3 {
        assert_eq!(client.pod("p1").await.unwrap().date, None);
    }
}

#[tokio::test]
async fn a_whole_pod_is_read() {
    let body = json!({
        "id": "p1", "name": "comfy-7", "status": "RUNNING", "actions": ["stop", "hibernate", "terminate"],
        "image": "runpod/comfyui:latest", "args": "", "disk": 40, "gpu": { "id": "G", "count": 2 }, "cloud": "COMMUNITY",
        "dataCenterId": "EU-RO-1", "mounts": { "network": [{ "volumeId": "v1", "path": "/workspace" }] },
        "ports": ["22/tcp"], "env": { "A": "b" }, "cost": 0.69, "createdAt": "2026-11-06T08:00:00Z", "startedAt": null,
        "ssh": {
            "proxy": { "host": "ssh.runpod.io", "port": 22, "username": "p1-x", "command": "" },
            "direct": { "host": "203.0.113.7", "port": 40022, "username": "root", "command": "" },
        },
        "runtime": { "uptime": 61, "gpus": [{ "util": 5 }], "ports": [] },
    });
    let server = Script::start([json(200, &body.to_string())]).await;
    let pod = server.client().pod("p1").await.unwrap().value;
    assert_eq!((pod.id.as_str(), pod.name.as_str(), pod.status), ("p1", "comfy-7", PodStatus::Running));
    assert_eq!(pod.actions, [PodAction::Stop, PodAction::Terminate]);
    assert_eq!((pod.gpu.as_deref(), pod.gpu_count, pod.cloud), (Some("G"), 2, Some(Cloud::Community)));
    assert_eq!(pod.data_center.as_deref(), Some("EU-RO-1"));
    assert_eq!(pod.volume, Some(VolumeMount { volume_id: "v1".into(), path: "/workspace".into() }));
    assert_eq!((pod.disk_gb, pod.cost_per_hour, pod.uptime_seconds), (40, 0.69, Some(61)));
    assert_eq!((pod.created_at, pod.started_at), (Some("2026-11-06T08:00:00Z".parse().unwrap()), None));
    assert_eq!(pod.ssh, Some(SshAddress { host: "203.0.113.7".into(), port: 40022, user: "root".into() }));
    assert!(pod.has_ssh_proxy);
    assert_eq!((pod.env["A"].as_str(), pod.ports), ("b", vec!["22/tcp".to_owned()]));
}

#[tokio::test]
async fn what_this_version_does_not_know_is_no_error() {
    let odd = r#"{"id":"p1","status":"HIBERNATING","cloud":"LUNAR","newField":{"x":[1]},"gpu":null,"mounts":{},
        "ssh":{"proxy":null,"direct":null},"runtime":null,"createdAt":"some day","dataCenterId":""}"#;
    let server =
        Script::start([json(200, odd), json(200, r#"{"id":"p2","mounts":null,"ports":null,"env":null}"#)]).await;
    let client = server.client();
    let pod = client.pod("p1").await.unwrap().value;
    assert_eq!((pod.status, pod.cloud, pod.gpu, pod.gpu_count), (PodStatus::Unknown, None, None, 0));
    assert_eq!((pod.volume, pod.ssh, pod.created_at, pod.data_center), (None, None, None, None));
    assert_eq!(client.pod("p2").await.unwrap().value.status, PodStatus::Unknown);
}

#[tokio::test]
async fn lists_are_read_with_and_without_pages() {
    let page = |ids: &[&str], pagination: Value| {
        let pods: Vec<_> = ids.iter().map(|id| json!({ "id": id })).collect();
        json(200, &json!({ "pods": pods, "pagination": pagination, "more": 1 }).to_string())
    };
    let server = Script::start([
        json(200, r#"{"pods":[{"id":"p1"},{"id":"p2"}]}"#),
        page(&["p1", "p2"], json!({ "nextCursor": "a b&c", "hasNextPage": true })),
        page(&["p2", "p3"], json!({ "nextCursor": "d" })),
        page(&[], json!({ "nextCursor": null, "hasNextPage": false })),
    ])
    .await;
    let client = server.client();
    let ids = async || -> Vec<String> { client.pods().await.unwrap().value.into_iter().map(|pod| pod.id).collect() };
    assert_eq!(ids().await, ["p1", "p2"]);
    assert_eq!(ids().await, ["p1", "p2", "p3"]);
    let lines: Vec<_> = server.requests().iter().map(script::Request::line).collect();
    let expected = ["GET /v2/pods", "GET /v2/pods", "GET /v2/pods?cursor=a+b%26c", "GET /v2/pods?cursor=d"];
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn a_list_that_is_not_whole_is_an_error() {
    let circle = r#"{"pods":[{"id":"p1"}],"pagination":{"nextCursor":"a","hasNextPage":true}}"#;
    let lost = r#"{"pods":[{"id":"p1"}],"pagination":{"hasNextPage":true}}"#;
    let server = Script::start([json(200, circle), json(200, circle), json(200, lost), json(200, "{}")]).await;
    let client = server.client();
    for expected in ["lead back", "no cursor", "missing field `pods`"] {
        let error = client.pods().await.unwrap_err();
        assert!(matches!(error, ProviderError::Unreadable { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn the_second_page_may_fail_and_the_list_with_it() {
    let first = r#"{"pods":[{"id":"p1"}],"pagination":{"nextCursor":"a","hasNextPage":true}}"#;
    let server = Script::start([json(200, first), problem(403, "", r#"{"detail":"no"}"#)]).await;
    assert!(matches!(server.client().pods().await, Err(ProviderError::Forbidden { .. })));
}

#[tokio::test]
async fn the_catalog_is_asked_with_stock_and_read() {
    let gpus = json!({ "gpus": [{
        "id": "NVIDIA GeForce RTX 4090", "name": "RTX 4090", "memory": 24, "secure": true, "community": false,
        "price": { "secure": 0.69, "community": 0 }, "maxCount": { "secure": 8, "community": 0 }, "availability": "HIGH",
        "dataCenters": [{ "id": "EU-RO-1", "name": "x", "availability": "LOW" }, { "id": "US-TX-3", "availability": "NONE" }],
    }]});
    let server = Script::start([json(200, &gpus.to_string())]).await;
    let gpu = server.client().gpus(2, Cloud::Community).await.unwrap().value.remove(0);
    let line = server.requests()[0].line();
    assert_eq!(line, "GET /v2/catalog/gpus?include=AVAILABILITY&product=POD&count=2&cloud=COMMUNITY");
    assert_eq!((gpu.id.as_str(), gpu.name.as_str(), gpu.vram_gb), ("NVIDIA GeForce RTX 4090", "RTX 4090", 24));
    assert_eq!((gpu.secure_price, gpu.community_price), (Some(0.69), None));
    assert_eq!((gpu.max_count_secure, gpu.max_count_community, gpu.stock), (8, 0, Stock::High));
    assert_eq!(gpu.data_centers, [("EU-RO-1".to_owned(), Stock::Low), ("US-TX-3".to_owned(), Stock::None)]);
}

#[tokio::test]
async fn volumes_and_keys_are_read() {
    let volumes = format!(r#"{{"networkVolumes":[{VOLUME}]}}"#);
    let server = Script::start([json(200, &volumes), json(200, r#"{"keys":["ssh-ed25519 AAAA me"]}"#)]).await;
    let client = server.client();
    let volume = client.volumes().await.unwrap().value.remove(0);
    assert_eq!((volume.id.as_str(), volume.name.as_str(), volume.size_gb), ("v1", "models", 100));
    assert_eq!((volume.data_center.as_str(), volume.tier.as_deref()), ("EU-RO-1", Some("STANDARD")));
    assert_eq!(client.ssh_keys().await.unwrap().value, ["ssh-ed25519 AAAA me"]);
}

#[tokio::test]
async fn nothing_is_sent_that_could_mean_something_else() {
    let server = Script::start([]).await;
    let client = server.client();
    for id in ["", ".", "..", "a/b", "a?b", "p1/../../x", "p%31", "p 1", "ü"] {
        assert!(matches!(client.delete_pod(id).await, Err(ProviderError::NotFound { what: "pod", .. })), "{id}");
        assert!(matches!(client.pod(id).await, Err(ProviderError::NotFound { .. })), "{id}");
    }
    let terminate = client.control_pod("p1", PodAction::Terminate).await.unwrap_err();
    assert!(matches!(&terminate, ProviderError::Invalid { .. }) && !terminate.may_have_happened());
    let keyless = script::client_with_key(&server.url, script::quick(), " \n");
    assert!(matches!(keyless.pods().await, Err(ProviderError::MissingKey)));
    let broken_key = script::client_with_key(&server.url, script::quick(), "rpa_\u{7f}garbled");
    let error = broken_key.pods().await.unwrap_err();
    assert!(matches!(&error, ProviderError::Setup(text) if !text.contains("garbled")), "{error}");
    assert_eq!(server.requests().len(), 0);
}
