//! Templates and registries, and pods made from them.

use serde_json::{Value, json};

use super::{Tested, pod_body};

#[tokio::test]
async fn templates_are_listed_and_filled_in() {
    let world = Tested::new().await;
    let (status, own) = world.get("/v2/templates").await;
    assert_eq!((status, own["templates"].as_array().map(Vec::len)), (200, Some(2)));
    let (status, public) = world.get("/v2/catalog/templates?source=official").await;
    assert_eq!((status, &public["templates"][0]["id"]), (200, &json!("30zmvf89kd")));
    assert_eq!(world.get("/v2/catalog/templates?source=community").await.1, json!({ "templates": [] }));
    for id in ["c0mfyt3mpl", "30zmvf89kd"] {
        assert_eq!(world.get(&format!("/v2/templates/{id}")).await.1["id"], id);
    }
    assert_eq!(world.get("/v2/templates/none").await.0, 404);

    let gpu = json!({ "id": "NVIDIA RTX A4000", "count": 1 });
    let body =
        json!({ "name": "a", "templateId": "c0mfyt3mpl", "gpu": gpu, "env": { "COMFYUI_ARGS": "mine", "X": "1" } });
    let (status, pod) = world.post("/v2/pods", body).await;
    assert_eq!(status, 201, "{pod}");
    assert_eq!((&pod["image"], &pod["disk"]), (&json!("runpod/comfyui:latest"), &json!(60)));
    assert_eq!((&pod["ports"], &pod["template"]), (&json!(["22/tcp", "8188/http"]), &Value::Null));
    assert_eq!((&pod["env"]["COMFYUI_ARGS"], &pod["env"]["X"]), (&json!("mine"), &json!("1")));
    assert!(pod["env"]["PUBLIC_KEY"].as_str().is_some_and(|key| key.starts_with("ssh-")), "startSsh counts: {pod}");
    world.advance(10.0).await;
    let id = pod["id"].as_str().expect("an id");
    assert_eq!(world.pod(id).await["cudaVersion"], "13.0");

    // What the body says goes before the template.
    let gpu = json!({ "id": "NVIDIA RTX A4000", "count": 1, "minCudaVersion": "12.4" });
    let body = json!({
        "name": "b", "templateId": "c0mfyt3mpl", "gpu": gpu, "image": "mine:1", "disk": 30, "ports": ["22/tcp"], "startSsh": false
    });
    let (status, pod) = world.post("/v2/pods", body).await;
    assert_eq!((status, &pod["image"], &pod["disk"]), (201, &json!("mine:1"), &json!(30)));
    assert_eq!((&pod["ports"], &pod["env"]["PUBLIC_KEY"]), (&json!(["22/tcp"]), &Value::Null));
    world.advance(10.0).await;
    assert_eq!(world.pod(pod["id"].as_str().expect("an id")).await["cudaVersion"], "12.8");

    for (template, status) in [("w0rk3rt3mp", 422), ("nothere", 404)] {
        let mut body = pod_body("c");
        body["templateId"] = json!(template);
        assert_eq!(world.post("/v2/pods", body).await.0, status);
    }
    world.finish().await;
}

#[tokio::test]
async fn registries_are_listed_and_echoed() {
    let world = Tested::new().await;
    let (_, listed) = world.get("/v2/registries").await;
    let id = listed["registries"][0]["id"].as_str().expect("an id");
    assert_eq!(world.get(&format!("/v2/registries/{id}")).await.0, 200);
    assert_eq!(world.get("/v2/registries/none").await.0, 404);
    let mut body = pod_body("private");
    body["registry"] = json!(id);
    assert_eq!(world.post("/v2/pods", body.clone()).await.1["registry"], id);
    body["registry"] = json!("none");
    assert_eq!(world.post("/v2/pods", body).await.0, 404);
    world.finish().await;
}
