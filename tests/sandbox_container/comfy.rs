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

#[tokio::test]
async fn the_sampler_paints_step_by_step_and_tells_its_client() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut mine = tunnel.socket("mine").await;
    let mut other = tunnel.socket("other").await;
    let hello = mine.next().await;
    let nothing = json!({ "status": { "exec_info": { "queue_remaining": 0 } }, "sid": "mine" });
    assert_eq!(hello, json!({ "type": "status", "data": nothing }));
    mine.send(json!({ "type": "feature_flags", "data": { "supports_preview_metadata": true } })).await;
    assert_eq!(mine.next().await["type"], "feature_flags");

    let id = tunnel.submit(sampler_workflow(u64::MAX, 10, 5), "mine").await;
    let events = mine.until_end_of(&id).await;
    // History is there when the end is heard.
    let entry = tunnel.json(&format!("/history/{id}")).await[&id].clone();
    assert_eq!(entry["status"]["completed"], true);
    assert_eq!(entry["prompt"][2]["3"]["inputs"]["seed"], u64::MAX);

    let said = |kind: &str| -> Vec<&Value> {
        events.iter().filter(|event| event["type"] == kind).map(|event| &event["data"]).collect()
    };
    assert_eq!(said("execution_start").len(), 1);
    assert_eq!(said("execution_cached")[0]["nodes"], json!([]));
    let nodes: Vec<&Value> = said("executing").iter().map(|data| &data["node"]).collect();
    assert_eq!(nodes, [&json!("3"), &json!("9"), &Value::Null]);
    let expected: Vec<Value> =
        (1..=10).map(|step| json!({ "value": step, "max": 10, "prompt_id": id, "node": "3" })).collect();
    assert_eq!(said("progress").into_iter().cloned().collect::<Vec<_>>(), expected);
    assert!(said("progress_state").iter().any(|data| data["nodes"]["3"]["value"] == 5));
    assert_eq!(said("executed")[0]["output"], entry["outputs"]["9"]);
    assert_eq!(said("executed")[0]["output"]["images"][0]["filename"], "painting_00001_.png");
    let position = |kind: &str| events.iter().position(|event| event["type"] == kind);
    assert!(position("execution_start") < position("executing"));
    assert!(position("executed") < position("execution_success"));
    assert!(!mine.previews.is_empty());
    assert!(mine.previews.iter().all(|frame| frame[..8] == [0, 0, 0, 1, 0, 0, 0, 2] && decode(&frame[8..]).0 == 48));
    assert_eq!(pod.events("progress").len(), 10);

    // Another client hears how long the queue is, and nothing of the prompt.
    let heard = other.next().await;
    assert_eq!(heard["data"]["sid"], "other");
    loop {
        let event = other.next().await;
        assert_eq!(event["type"], "status");
        if event["data"]["status"]["exec_info"]["queue_remaining"] == 0 {
            break;
        }
    }

    // The same seed paints the same, however many steps it takes; another one something else; both in many colours.
    let picture = async |entry: &Value| {
        let file = &entry["outputs"]["9"]["images"][0];
        let file = file["filename"].as_str().expect("a name").to_owned();
        decode(
            &tunnel.get(&format!("/view?filename={file}&subfolder=&type=output")).await.bytes().await.expect("bytes"),
        )
    };
    let (width, height, first) = picture(&entry).await;
    assert_eq!((width, height), (48, 32));
    let id = tunnel.submit(sampler_workflow(u64::MAX, 3, 0), "mine").await;
    assert_eq!(picture(&tunnel.history(&id).await).await.2, first);
    let id = tunnel.submit(sampler_workflow(7, 3, 0), "mine").await;
    assert_ne!(picture(&tunnel.history(&id).await).await.2, first);
    let colors: std::collections::HashSet<&[u8]> = first.chunks(3).collect();
    assert!(colors.len() > 100, "{} colours", colors.len());
}

#[tokio::test]
async fn a_client_that_connects_again_too_soon_is_deaf() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut first = tunnel.socket("me").await;
    first.next().await;
    let mut second = tunnel.socket("me").await;
    assert_eq!(second.next().await["data"]["sid"], "me");
    first.stream.close(None).await.expect("closed");
    while first.stream.next().await.is_some() {}

    let id = tunnel.submit(minimal_workflow(), "me").await;
    assert_eq!(tunnel.history(&id).await["status"]["status_str"], "success");
    let silence = tokio::time::timeout(Duration::from_millis(100), second.stream.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    // A socket of a fresh name hears again.
    let mut third = tunnel.socket("").await;
    assert_eq!(third.next().await["data"]["sid"].as_str().expect("a name").len(), 32);
}

#[tokio::test]
async fn without_a_client_progress_is_for_everyone() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("watcher").await;
    let (_, answer) = tunnel.post("/prompt", json!({ "prompt": sampler_workflow(1, 4, 0) })).await;
    let mut kinds = std::collections::BTreeSet::new();
    loop {
        let event = socket.next().await;
        kinds.insert(event["type"].as_str().expect("a type").to_owned());
        if event["data"]["value"] == 4 {
            assert_eq!(event["data"]["prompt_id"], answer["prompt_id"]);
            break;
        }
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["progress", "progress_state", "status"]);
}

#[tokio::test]
async fn an_identical_prompt_executes_nothing_again() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("me").await;
    let first = tunnel.submit(minimal_workflow(), "me").await;
    socket.until_end_of(&first).await;

    let second = tunnel.submit(minimal_workflow(), "me").await;
    let events = socket.until_end_of(&second).await;
    let cached = events.iter().find(|event| event["type"] == "execution_cached").expect("it says what is cached");
    assert_eq!(cached["data"]["nodes"], json!(["1", "2"]));
    let executing = events.iter().filter(|event| event["type"] == "executing").count();
    assert_eq!(executing, 1, "only the end");
    let history = tunnel.json("/history").await;
    assert_eq!(history[&second]["outputs"], history[&first]["outputs"]);
    assert_eq!(std::fs::read_dir(pod.disk().join("ComfyUI/output/t")).expect("the folder").count(), 1);

    // Another name: the picture is kept, only saving is done again.
    let mut other = minimal_workflow();
    other["2"]["inputs"]["filename_prefix"] = json!("again");
    let third = tunnel.submit(other, "me").await;
    let events = socket.until_end_of(&third).await;
    let cached = events.iter().find(|event| event["type"] == "execution_cached").expect("it says what is cached");
    assert_eq!(cached["data"]["nodes"], json!(["1"]));
    // What the last prompt did not have is forgotten; the old file is counted on from.
    let fourth = tunnel.submit(minimal_workflow(), "me").await;
    let entry = tunnel.history(&fourth).await;
    assert_eq!(entry["outputs"]["2"]["images"][0]["filename"], "autopod_00002_.png");

    // Freed memory forgets all.
    assert_eq!(tunnel.post("/free", json!({ "free_memory": true })).await.0, 200);
    let fifth = tunnel.submit(minimal_workflow(), "me").await;
    let entry = tunnel.history(&fifth).await;
    assert_eq!(entry["outputs"]["2"]["images"][0]["filename"], "autopod_00003_.png");
}

#[tokio::test]
async fn an_interrupt_ends_what_runs_and_nothing_else() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("me").await;
    let running = tunnel.submit(sampler_workflow(1, 100, 500), "me").await;
    let waiting = tunnel.submit(sampler_workflow(2, 2, 0), "me").await;
    while socket.next().await["type"] != "progress" {}

    let queue = tunnel.json("/queue").await;
    assert_eq!(queue["queue_running"][0][1], json!(running));
    assert_eq!(queue["queue_pending"][0][1], json!(waiting));
    assert_eq!(queue["queue_pending"][0][4], json!(["9"]));

    // Not for the one that waits, and deleting what runs does nothing either.
    assert_eq!(tunnel.post("/interrupt", json!({ "prompt_id": waiting })).await.0, 200);
    assert_eq!(tunnel.post("/queue", json!({ "delete": [running] })).await, (200, json!("")));
    assert_eq!(tunnel.json("/queue").await["queue_running"][0][1], json!(running));

    assert_eq!(tunnel.post("/interrupt", json!({ "prompt_id": running })).await.0, 200);
    let events = socket.until_end_of(&running).await;
    let interrupted = events.iter().find(|event| event["type"] == "execution_interrupted").expect("it says so");
    assert_eq!(interrupted["data"]["node_id"], "3");
    assert_eq!(interrupted["data"]["node_type"], "SandboxSampler");
    let entry = tunnel.history(&running).await;
    assert_eq!(entry["status"]["status_str"], "error");
    assert_eq!(entry["status"]["completed"], false);
    let messages = entry["status"]["messages"].as_array().expect("messages");
    assert_eq!(messages.last().expect("one")[0], "execution_interrupted");
    assert_eq!(entry["outputs"], json!({}));
    assert_eq!(tunnel.history(&waiting).await["status"]["status_str"], "success");

    // With nothing running it is for nobody, not for the next one.
    assert_eq!(tunnel.post("/interrupt", json!({})).await.0, 200);
    let next = tunnel.submit(sampler_workflow(3, 2, 0), "me").await;
    assert_eq!(tunnel.history(&next).await["status"]["status_str"], "success");
}

#[tokio::test]
async fn the_queue_runs_in_order_and_can_be_changed() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let long = tunnel.submit(sampler_workflow(1, 100, 500), "me").await;
    let tunnel_submit = async |seed: u64, more: Value| {
        let mut request = json!({ "prompt": sampler_workflow(seed, 1, 0), "extra_data": { "note": seed } });
        request.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        tunnel.post("/prompt", request).await.1
    };
    let own_id = "6f1c1a52-7c1f-4f5e-9a53-0c6d6a8a2b11";
    let normal = tunnel_submit(2, json!({ "prompt_id": own_id })).await;
    assert_eq!(normal["prompt_id"], own_id);
    let dropped = tunnel_submit(3, json!({})).await;
    let front = tunnel_submit(4, json!({ "front": true })).await;
    assert!(front["number"].as_i64() < Some(0));
    let numbered = tunnel_submit(5, json!({ "number": 0.5 })).await;
    assert_eq!(numbered["number"], 0.5);
    assert_eq!(tunnel.json("/prompt").await["exec_info"]["queue_remaining"], 5);
    let pending = tunnel.json("/queue").await["queue_pending"].clone();
    let own = pending.as_array().expect("a list").iter().find(|job| job[1] == own_id).expect("it waits");
    assert_eq!(own[3]["note"], 2);

    tunnel.post("/queue", json!({ "delete": [dropped["prompt_id"]] })).await;
    tunnel.post("/interrupt", json!({})).await;
    tunnel.history(own_id).await;
    let history = tunnel.json("/api/history").await;
    let order: Vec<&String> = history.as_object().expect("an object").keys().collect();
    let text = |answer: &Value| answer["prompt_id"].as_str().expect("an id").to_owned();
    assert_eq!(order, [&long, &text(&front), &text(&numbered), &own_id.to_owned()]);

    // Pages of the history.
    let keys =
        async |path: &str| tunnel.json(path).await.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys("/history?max_items=1").await, [own_id]);
    assert_eq!(keys("/history?max_items=2&offset=1").await, [text(&front), text(&numbered)]);
    assert_eq!(tunnel.json("/history/nobody").await, json!({}));
    tunnel.post("/history", json!({ "delete": [long] })).await;
    assert_eq!(keys("/history").await.len(), 3);
    tunnel.post("/history", json!({ "clear": true })).await;
    assert_eq!(keys("/history").await.len(), 0);
}

#[tokio::test]
async fn an_error_while_running_is_told_in_full() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("me").await;
    let mut outside = minimal_workflow();
    outside["2"]["inputs"]["filename_prefix"] = json!("../../outside");
    let id = tunnel.submit(outside, "me").await;
    let events = socket.until_end_of(&id).await;
    let error = &events.iter().find(|event| event["type"] == "execution_error").expect("it says so")["data"];
    assert_eq!((&error["node_id"], &error["node_type"]), (&json!("2"), &json!("SaveImage")));
    assert_eq!(error["exception_type"], "Exception");
    assert!(error["exception_message"].as_str().expect("a text").contains("outside the output folder"));
    assert!(error["traceback"].as_array().expect("a list").iter().all(Value::is_string));
    assert_eq!(error["executed"], json!(["1"]));
    assert_eq!(tunnel.history(&id).await["status"]["status_str"], "error");
    for folder in [pod.disk(), pod.disk().join("ComfyUI")] {
        let mut names = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        assert!(names.all(|name| !name.to_string_lossy().starts_with("outside")));
    }

    // Too large for the machine, said before it tries.
    let mut huge = minimal_workflow();
    huge["1"]["inputs"]["width"] = json!(16_384);
    huge["1"]["inputs"]["height"] = json!(16_384);
    let id = tunnel.submit(huge, "me").await;
    let entry = tunnel.history(&id).await;
    let last = entry["status"]["messages"].as_array().expect("messages").last().expect("one").clone();
    assert_eq!(last[1]["exception_type"], "torch.OutOfMemoryError");
}

#[tokio::test]
async fn the_page_and_the_lists_are_there() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let page = tunnel.get("/").await.text().await.expect("a page");
    assert!(page.contains("autopod sandbox"));
    assert_eq!(tunnel.get("/nowhere").await.status(), 404);
    let all = tunnel.json("/object_info").await;
    assert_eq!(all.as_object().expect("an object").len(), 7);
    assert_eq!(all["SaveImage"]["output_node"], true);
    assert_eq!(all["SaveImage"]["input_order"]["required"], json!(["images", "filename_prefix"]));
    assert_eq!(tunnel.json("/api/object_info/LoadImage").await["LoadImage"], all["LoadImage"]);
    assert_eq!(tunnel.json("/object_info/Nothing").await, json!({}));
    assert!(tunnel.json("/models").await.as_array().expect("a list").contains(&json!("checkpoints")));
    assert_eq!(tunnel.json("/models/checkpoints").await, json!([]));
    assert_eq!(tunnel.get("/models/..%2F..").await.status(), 404);
    assert_eq!(tunnel.json("/embeddings").await, json!([]));
    assert_eq!(tunnel.json("/features").await["max_upload_size"], 100 * 1024 * 1024);
}
