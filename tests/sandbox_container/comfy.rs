use super::*;

#[tokio::test]
async fn the_minimal_workflow_paints_red_through_the_tunnel() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;

    let stats = tunnel.json("/system_stats").await;
    assert_eq!(stats["devices"][0]["vram_total"], 24u64 << 30);
    assert!(stats["devices"][0]["name"].as_str().expect("a name").contains("RTX 4090"));

    let id = tunnel.submit(minimal_workflow(), "me").await;
    let entry = tunnel.history(&id).await;
    assert_eq!(entry["status"]["status_str"], "success");
    assert_eq!(entry["prompt"][3]["client_id"], "me");
    let images = json!([{ "filename": "autopod_00001_.png", "subfolder": "t", "type": "output" }]);
    assert_eq!(entry["outputs"], json!({ "2": { "images": images } }));

    let picture = tunnel.get("/view?filename=autopod_00001_.png&subfolder=t&type=output").await;
    assert_eq!(picture.headers()["content-type"], "image/png");
    let (width, height, pixels) = decode(&picture.bytes().await.expect("bytes"));
    assert_eq!((width, height), (64, 64));
    assert!(pixels.chunks(3).all(|pixel| pixel == [255, 0, 0]));

    let requests = pod.events("comfy");
    assert!(requests.iter().all(|request| request["via"] == "direct-tcpip" && request["pod"] == "pod123"));
    assert!(
        requests
            .iter()
            .any(|request| { request["method"] == "POST" && request["path"] == "/prompt" && request["status"] == 200 })
    );
}
