//! Catalog, stock, volumes, pages and keys.

use reqwest::Method;
use serde_json::{Value, json};

use super::{GPU, Tested, pod_body};

#[tokio::test]
async fn gpus_have_prices_and_on_request_stock() {
    let world = Tested::new().await;
    let (_, plain) = world.get("/v2/catalog/gpus").await;
    let gpus = plain["gpus"].as_array().expect("gpus");
    assert!(gpus.len() >= 8 && gpus.iter().all(|gpu| gpu.get("availability").is_none()));
    let (status, stocked) = world.get("/v2/catalog/gpus?include=AVAILABILITY&product=POD&count=1&cloud=SECURE").await;
    assert_eq!(status, 200);
    let affordable = stocked["gpus"].as_array().expect("gpus").iter().filter(|gpu| {
        gpu["memory"].as_u64() >= Some(16)
            && gpu["availability"] != "NONE"
            && gpu["price"]["secure"].as_f64() < Some(0.3)
    });
    assert!(affordable.count() >= 1);
    let sold_out = stocked["gpus"].as_array().expect("gpus").iter().find(|gpu| gpu["availability"] == "NONE");
    assert!(sold_out.expect("one that is sold out").get("dataCenters").is_none());
    let (_, one) = world.get("/v2/catalog/gpus/NVIDIA%20RTX%20A4000?include=AVAILABILITY&product=POD").await;
    assert_eq!((&one["id"], &one["dataCenters"][0]["id"]), (&json!(GPU), &json!("EU-RO-1")));
    assert_eq!(world.get("/v2/catalog/gpus/RTX%209999").await.0, 404);
    let (_, romania) = world.get("/v2/catalog/gpus?include=AVAILABILITY&product=POD&countryCodes=IS").await;
    assert!(romania["gpus"].as_array().expect("gpus").iter().all(|gpu| gpu["id"] != GPU));
    world.finish().await;
}

#[tokio::test]
async fn the_catalogs_rules_hold() {
    let world = Tested::new().await;
    for (query, status) in [
        ("include=AVAILABILITY", 400),
        ("product=POD", 400),
        ("count=2", 400),
        ("cloud=SECURE", 400),
        ("include=AVAILABILITY&product=POD&cudaVersions=12.8&minCudaVersion=12", 400),
        ("include=AVAILABILITY&product=HOUSE", 422),
        ("include=EVERYTHING&product=POD", 422),
        ("include=AVAILABILITY&product=POD&count=0", 422),
        ("include=AVAILABILITY&product=POD&cudaVersions=12", 422),
        ("include=AVAILABILITY&product=POD&countryCodes=fr", 422),
        ("gpu=x", 422),
    ] {
        let (got, body) = world.get(&format!("/v2/catalog/gpus?{query}")).await;
        assert_eq!(got, status, "{query}: {body}");
    }
    world.finish_rude().await;
}

#[tokio::test]
async fn data_centers_can_be_filtered() {
    let world = Tested::new().await;
    let (_, all) = world.get("/v2/catalog/datacenters?include=GPU_AVAILABILITY").await;
    assert_eq!(all["dataCenters"].as_array().expect("centers").len(), 4);
    let romania = &all["dataCenters"][0];
    assert!(romania["gpuAvailability"].as_array().expect("stock").iter().any(|gpu| gpu["id"] == GPU));
    let (_, some) = world.get("/v2/catalog/datacenters?regions=EUROPE&networkVolumeTypes=HIGH_PERFORMANCE").await;
    assert_eq!(some["dataCenters"].as_array().expect("centers").len(), 1);
    assert_eq!(world.get("/v2/catalog/datacenters/US-TX-3").await.1["networkVolumeTypes"], json!([]));
    assert_eq!(world.get("/v2/catalog/datacenters/NOWHERE").await.0, 404);
    world.finish().await;
}

#[tokio::test]
async fn stock_runs_out_and_comes_back() {
    let world = Tested::new().await;
    let stock = json!({ "gpu": GPU, "data_center": "EU-RO-1", "secure": 1 });
    assert_eq!(world.call(Method::PUT, "/_sandbox/stock", Some(stock)).await.0, 200);
    let mut body = pod_body("first");
    body["dataCenterIds"] = json!(["EU-RO-1"]);
    let (status, first) = world.post("/v2/pods", body.clone()).await;
    assert_eq!(status, 201);
    assert_eq!(world.post("/v2/pods", body.clone()).await.0, 400);
    let id = first["id"].as_str().expect("an id");
    world.act(id, "stop").await;
    assert_eq!(world.post("/v2/pods", body).await.0, 201);
    let (status, problem) = world.act(id, "start").await;
    assert_eq!(status, 400);
    assert!(
        problem["detail"].as_str().is_some_and(|text| text.contains("not enough free GPUs on the host")),
        "{problem}"
    );
    world.finish().await;
}

#[tokio::test]
async fn volumes_are_kept_grown_and_guarded() {
    let world = Tested::new().await;
    let (_, body) = world.get("/v2/network-volumes").await;
    let volumes = body["networkVolumes"].as_array().expect("volumes");
    let models = volumes.iter().find(|volume| volume["name"] == "comfy-models").expect("the newcomer's volume").clone();
    assert_eq!((&models["size"], &models["dataCenter"]), (&json!(100), &json!("EU-RO-1")));

    let wanted = json!({ "name": "mine", "size": 20, "dataCenter": "US-KS-2" });
    let (status, mine) = world.post("/v2/network-volumes", wanted).await;
    assert_eq!((status, &mine["type"]), (201, &json!("STANDARD")));
    let path = format!("/v2/network-volumes/{}", mine["id"].as_str().expect("an id"));
    assert_eq!(world.call(Method::PATCH, &path, Some(json!({ "size": 40 }))).await.1["size"], 40);
    assert_eq!(world.call(Method::PATCH, &path, Some(json!({ "size": 30 }))).await.0, 400);
    assert_eq!(world.get(&path).await.1["size"], 40);

    let mut body = pod_body("mounted");
    body["mounts"] = json!({ "network": [{ "volumeId": mine["id"], "path": "/workspace" }] });
    body["gpu"]["id"] = json!("NVIDIA RTX A5000");
    let (status, pod) = world.post("/v2/pods", body.clone()).await;
    assert_eq!((status, &pod["mounts"]), (201, &body["mounts"]));
    world.advance(2.0).await;
    let id = pod["id"].as_str().expect("an id");
    assert_eq!(world.pod(id).await["dataCenterId"], "US-KS-2");
    assert_eq!(world.delete(&path).await, 400);
    world.delete(&format!("/v2/pods/{id}")).await;
    assert_eq!(world.delete(&path).await, 204);
    assert_eq!(world.get(&path).await.0, 404);
    world.finish().await;
}

#[tokio::test]
async fn broken_volumes_are_refused() {
    let world = Tested::new().await;
    let proper = json!({ "name": "mine", "size": 20, "dataCenter": "US-KS-2" });
    for (key, value, status) in [
        ("size", json!(9), 422),
        ("size", json!(4097), 422),
        ("name", json!(""), 422),
        ("type", json!("FAST"), 422),
        ("datacenter", json!("US-KS-2"), 422),
        ("type", json!("HIGH_PERFORMANCE"), 400),
        ("dataCenter", json!("US-TX-3"), 400),
        ("dataCenter", json!("MOON-1"), 400),
    ] {
        let mut body = proper.clone();
        body[key] = value;
        let (got, answer) = world.post("/v2/network-volumes", body.clone()).await;
        assert_eq!(got, status, "{body}: {answer}");
    }
    for (body, status) in [(json!({}), 422), (json!({ "size": 5 }), 422), (json!({ "type": "STANDARD" }), 422)] {
        assert_eq!(world.call(Method::PATCH, "/v2/network-volumes/c0mfym0d3l", Some(body)).await.0, status);
    }
    world.finish_rude().await;
}

#[tokio::test]
async fn lists_come_whole_or_in_pages() {
    let world = Tested::new().await;
    let mut created = Vec::new();
    for index in 0..5 {
        created.push(world.create(&format!("pod-{index}")).await);
    }
    let ids = |body: &Value| -> Vec<String> {
        body["pods"].as_array().expect("pods").iter().map(|pod| pod["id"].as_str().expect("id").to_owned()).collect()
    };
    let (_, whole) = world.get("/v2/pods").await;
    assert_eq!(ids(&whole), created);
    assert!(whole.get("pagination").is_none());
    let mut paged = Vec::new();
    let mut path = "/v2/pods?limit=2".to_owned();
    loop {
        let (status, page) = world.get(&path).await;
        assert_eq!(status, 200, "{page}");
        paged.extend(ids(&page));
        if page["pagination"]["hasNextPage"] == false {
            assert_eq!(page["pagination"]["nextCursor"], Value::Null);
            break;
        }
        path = format!("/v2/pods?limit=2&cursor={}", page["pagination"]["nextCursor"].as_str().expect("a cursor"));
    }
    assert_eq!(paged, created);
    assert_eq!(world.get("/v2/pods?limit=2&cursor=after:nobody").await.0, 400);
    world.finish().await;
}

#[tokio::test]
async fn the_accounts_keys_are_there_and_injected_by_start_ssh() {
    let world = Tested::new().await;
    let (_, keys) = world.get("/v2/account/ssh-keys").await;
    let mut body = pod_body("keyless");
    body["env"] = json!({});
    let (_, pod) = world.post("/v2/pods", body).await;
    assert_eq!(pod["env"]["PUBLIC_KEY"], keys["keys"][0]);
    world.finish().await;
}
