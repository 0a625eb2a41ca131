use super::*;

/// The answer to a prompt that must be refused.
async fn refused(tunnel: &Tunnel, prompt: Value) -> Value {
    let (status, answer) = tunnel.post("/prompt", json!({ "prompt": prompt })).await;
    assert_eq!(status, 400, "{answer}");
    answer
}

/// The minimal workflow with one input of one node changed; null takes it away.
fn changed(node: &str, input: &str, value: Value) -> Value {
    let mut workflow = minimal_workflow();
    let inputs = workflow[node]["inputs"].as_object_mut().expect("inputs");
    if value.is_null() {
        inputs.shift_remove(input);
    } else {
        inputs.insert(input.into(), value);
    }
    workflow
}

#[tokio::test]
async fn wrong_inputs_are_told_by_node_as_comfyui_does() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let answer = refused(&tunnel, changed("1", "width", json!(0))).await;
    let config = json!(["INT", { "default": 512, "min": 1, "max": 16384 }]);
    assert_eq!(
        answer,
        json!({
            "error": {
                "type": "prompt_outputs_failed_validation",
                "message": "Prompt outputs failed validation",
                "details": "",
                "extra_info": {},
            },
            "node_errors": { "1": {
                "errors": [{
                    "type": "value_smaller_than_min",
                    "message": "Value 0 smaller than min of 1",
                    "details": "width",
                    "extra_info": { "input_name": "width", "input_config": config, "received_value": 0 },
                }],
                "dependent_outputs": ["2"],
                "class_type": "EmptyImage",
            } },
        })
    );

    let scaled = |method: &str| {
        let mut workflow = minimal_workflow();
        workflow["3"] = json!({ "class_type": "ImageScale", "inputs": {
            "image": ["1", 0], "upscale_method": method, "width": 8, "height": 8, "crop": "disabled" } });
        workflow["2"]["inputs"]["images"] = json!(["3", 0]);
        workflow
    };
    let load = json!({
        "1": { "class_type": "LoadImage", "inputs": { "image": "nothing.png" } },
        "2": { "class_type": "SaveImage", "inputs": { "images": ["1", 0], "filename_prefix": "x" } },
    });
    let mut mask = load.clone();
    mask["2"]["inputs"]["images"] = json!(["1", 1]);
    let mut traversal = load.clone();
    traversal["1"]["inputs"]["image"] = json!("../../../../../../../../etc/hostname");
    for (prompt, node, kind, details) in [
        (changed("1", "width", Value::Null), "1", "required_input_missing", "width"),
        (changed("1", "height", json!(16_385)), "1", "value_bigger_than_max", "height"),
        (changed("1", "height", json!(u64::MAX)), "1", "value_bigger_than_max", "height"),
        (changed("1", "width", json!("wide")), "1", "invalid_input_type", "width, wide, invalid literal"),
        (changed("1", "width", json!({})), "1", "invalid_input_type", "width, {}, int() argument"),
        (changed("2", "images", json!(["1"])), "2", "bad_linked_input", "images"),
        (mask, "2", "return_type_mismatch", "images, received_type(MASK) mismatch input_type(IMAGE)"),
        (changed("2", "images", json!(["7", 0])), "2", "exception_during_validation", "'7'"),
        (changed("2", "images", json!(["1", 5])), "2", "exception_during_validation", "tuple index out of range"),
        (scaled("lanczos"), "3", "value_not_in_list", "upscale_method: 'lanczos' not in ['nearest-exact', 'bilinear']"),
        (load, "1", "custom_validation_failed", "image - Invalid image file: nothing.png"),
        (traversal, "1", "custom_validation_failed", "image - Invalid image file: ../"),
    ] {
        let answer = refused(&tunnel, prompt).await;
        let error = &answer["node_errors"][node]["errors"][0];
        assert_eq!(error["type"], kind, "{answer}");
        assert!(error["details"].as_str().expect("details").starts_with(details), "{answer}");
        assert_eq!(answer["error"]["type"], "prompt_outputs_failed_validation");
    }
    assert_eq!(tunnel.json("/queue").await, json!({ "queue_running": [], "queue_pending": [] }));
    assert_eq!(tunnel.json("/history").await, json!({}));
}

#[tokio::test]
async fn wrong_prompts_are_refused_as_a_whole() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let unknown = json!({ "1": { "class_type": "KSampler", "inputs": {} } });
    let nothing_out = json!({ "1": minimal_workflow()["1"] });
    let gui = json!({ "last_node_id": { }, "nodes": [{ "id": 1, "type": "EmptyImage" }], "links": [] });
    for (prompt, kind) in [
        (unknown, "invalid_prompt"),
        (nothing_out, "prompt_no_outputs"),
        (json!({}), "prompt_no_outputs"),
        (gui, "invalid_prompt"),
    ] {
        let answer = refused(&tunnel, prompt).await;
        assert_eq!(answer["error"]["type"], kind, "{answer}");
        assert_eq!(answer["node_errors"], json!({}));
    }
    let (status, answer) = tunnel.post("/prompt", json!({ "workflow": {} })).await;
    assert_eq!((status, &answer["error"]["type"]), (400, &json!("no_prompt")));
    for id in [json!("not-a-uuid"), json!("6F1C1A52-7C1F-4F5E-9A53-0C6D6A8A2B11"), json!(5)] {
        let (status, _) = tunnel.post("/prompt", json!({ "prompt": minimal_workflow(), "prompt_id": id })).await;
        assert_eq!(status, 400, "{id}");
    }
    // Some shapes the real server only stumbles over.
    for prompt in [json!([1]), json!("text"), json!({ "nodes": 5 })] {
        assert_eq!(tunnel.post("/prompt", json!({ "prompt": prompt })).await.0, 500);
    }
    // Links in a circle, and far too many of them.
    let invert = |from: String| json!({ "class_type": "ImageInvert", "inputs": { "image": [from, 0] } });
    let mut circle = changed("2", "images", json!(["3", 0]));
    circle["3"] = invert("4".into());
    circle["4"] = invert("3".into());
    refused(&tunnel, circle).await;
    let mut chain = changed("2", "images", json!(["20000", 0]));
    for node in 3..=20_000 {
        chain[node.to_string()] = invert(if node == 3 { "1".into() } else { (node - 1).to_string() });
    }
    refused(&tunnel, chain).await;
    // A circle that no output needs runs along unharmed.
    let mut aside = minimal_workflow();
    aside["3"] = invert("4".into());
    aside["4"] = invert("3".into());
    let id = tunnel.submit(aside, "me").await;
    assert_eq!(tunnel.history(&id).await["status"]["status_str"], "success");
}

#[tokio::test]
async fn good_outputs_run_beside_bad_ones_and_values_are_converted() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let mut workflow = changed("1", "width", json!("32"));
    workflow["1"]["inputs"]["height"] = json!(16.9);
    workflow["3"] = json!({ "class_type": "PreviewImage", "inputs": {} });
    let (status, answer) = tunnel.post("/prompt", json!({ "prompt": workflow })).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["node_errors"]["3"]["errors"][0]["type"], "required_input_missing");
    let entry = tunnel.history(answer["prompt_id"].as_str().expect("an id")).await;
    assert_eq!(entry["prompt"][4], json!(["2"]));
    let file = std::fs::read(pod.disk().join("ComfyUI/output/t/autopod_00001_.png")).expect("the picture");
    let (width, height, _) = decode(&file);
    assert_eq!((width, height), (32, 16));

    // Only the outputs that are wanted.
    let mut two = minimal_workflow();
    two["3"] = json!({ "class_type": "PreviewImage", "inputs": { "images": ["1", 0] } });
    let request = json!({ "prompt": two, "partial_execution_targets": ["3"] });
    let (_, answer) = tunnel.post("/prompt", request).await;
    let entry = tunnel.history(answer["prompt_id"].as_str().expect("an id")).await;
    let shown = &entry["outputs"]["3"]["images"][0];
    assert_eq!((&shown["type"], &shown["subfolder"]), (&json!("temp"), &json!("")));
    assert!(entry["outputs"].get("2").is_none());
    let name = shown["filename"].as_str().expect("a name");
    assert_eq!(tunnel.get(&format!("/view?filename={name}&type=temp&subfolder=")).await.status(), 200);
}

#[tokio::test]
async fn the_door_is_guarded_like_the_real_one() {
    let pod = Pod::open().await;
    let tunnel = pod.tunnel().await;
    let stats = format!("{}/system_stats", tunnel.url);
    for (origin, status) in [
        ("http://evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("http://localhost", 403),
        (tunnel.url.as_str(), 200),
        ("http://127.0.0.1", 200),
    ] {
        let response = tunnel.http.get(&stats).header("Origin", origin).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{origin}");
    }
    let crossing = tunnel.http.get(&stats).header("Sec-Fetch-Site", "cross-site").send().await.expect("an answer");
    assert_eq!(crossing.status(), 403);

    let broken =
        tunnel.http.post(format!("{}/prompt", tunnel.url)).body("{\"prompt\": ").send().await.expect("an answer");
    assert_eq!(broken.status(), 500);
    assert!(broken.headers()["content-type"].to_str().expect("a text").starts_with("text/plain"));
    let large = vec![b' '; 100 * 1024 * 1024 + 1];
    let large = tunnel.http.post(format!("{}/prompt", tunnel.url)).body(large).send().await.expect("an answer");
    assert_eq!(large.status(), 413);
    // And it still answers.
    tunnel.json("/system_stats").await;
}
