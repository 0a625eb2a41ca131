//! What is refused: before anything is sent, and by ComfyUI.

use autopod_mcp::tools::{ErrorKind, StillBilling};
use serde_json::{Value, json};

use super::{picture, sampler};
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_the_name_of_its_field() {
    let world = World::new().await;
    let editors = world.file("editor.json", br#"{"nodes": [{"id": 1, "type": "SaveImage"}], "links": []}"#);
    let broken = world.file("broken.json", b"{\"1\": {\n  nonsense");
    let png = world.file("input.png", &picture());
    let loading = json!({ "1": { "class_type": "LoadImage", "inputs": { "image": "a.png" } } });
    let with_input =
        |path: Value, node: &str| json!({ "workflow": loading, "inputs": [{ "path": path, "node": node }] });
    let cases: Vec<(Value, &str, &str)> = vec![
        (json!({}), "`workflow`", "workflow_path"),
        (json!({ "workflow": sampler(1, 0), "workflow_path": editors }), "`workflow`", "not both"),
        (json!({ "workflow": {} }), "`workflow`", "no nodes"),
        (json!({ "workflow": [] }), "`workflow`", "expected an object"),
        (json!({ "workflow": { "1": { "inputs": {} } } }), "`workflow`", "class_type"),
        (json!({ "workflow_path": editors }), "`workflow_path`", "Export (API)"),
        (json!({ "workflow_path": broken }), "`workflow_path`", "line 2"),
        (json!({ "workflow_path": png }), "`workflow_path`", "a picture"),
        (json!({ "workflow_path": world.folder() }), "`workflow_path`", "not a file"),
        (json!({ "workflow_path": world.folder().join("none.json") }), "`workflow_path`", "No such file"),
        (json!({ "workflow_path": "workflow.json" }), "`workflow_path`", "absolute"),
        (json!({ "workflow": sampler(1, 0), "output_dir": "out" }), "`output_dir`", "absolute"),
        (json!({ "workflow": sampler(1, 0), "output_dir": png }), "`output_dir`", "not a folder"),
        (json!({ "workflow": sampler(1, 0), "inputs": [{ "path": png }] }), "`inputs`", "no node that loads"),
        (with_input(json!("a.png"), "1"), "`inputs[0].path`", "absolute"),
        (with_input(json!(world.folder().join("none.png")), "1"), "`inputs[0].path`", "No such file"),
        (with_input(json!(world.folder()), "1"), "`inputs[0].path`", "not a file"),
        (with_input(json!(png), "7"), "`inputs`", "no node \"7\""),
        (with_input(json!(5), "1"), "`inputs[0].path`", "string"),
        (json!({ "workflow": sampler(1, 0), "url": "ftp://x" }), "`url`", "http"),
        (json!({ "workflow": sampler(1, 0), "url": "http://127.0.0.1:1", "pod": "a" }), "`url`", "not both"),
        (json!({ "workflow": sampler(1, 0), "wait_seconds": 46 }), "`wait_seconds`", "at most 45"),
        (json!({ "workflow": sampler(1, 0), "seed": 5 }), "`seed`", "unknown field"),
    ];
    for (arguments, field, what) in cases {
        let error = world.refusal("comfy_run", arguments.clone()).await;
        assert_eq!(error.kind, ErrorKind::InvalidInput, "{arguments}: {error}");
        assert!(error.message.contains(field) && error.message.contains(what), "{arguments}: {error}");
    }
    let missing = world.refusal("comfy_run", json!({ "workflow": sampler(1, 0), "pod": "nobody" })).await;
    assert_eq!(missing.kind, ErrorKind::NotFound, "{missing}");
    let malformed = world.refusal("comfy_job", json!({ "prompt_id": "../../etc/passwd" })).await;
    assert!(malformed.kind == ErrorKind::InvalidInput && malformed.message.contains("`prompt_id`"), "{malformed}");
    assert!(!world.home.jobs().exists(), "something was begun");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comfyui_refuses_is_told_per_node() {
    let world = World::new().await;
    world.ready_pod().await;
    let mut bad = sampler(101, 0);
    bad["1"]["inputs"]["width"] = json!(1);
    let error = world.refusal("comfy_run", json!({ "workflow": bad })).await;
    assert_eq!((error.kind, error.still_billing), (ErrorKind::InvalidInput, Some(StillBilling::Yes)), "{error}");
    for part in ["node 1 (SandboxSampler)", "steps", "width", "value_bigger_than_max", "value_smaller_than_min"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    assert!(error.hint.as_ref().is_some_and(|hint| hint.contains("into the range")), "{error}");

    let unknown = json!({ "1": { "class_type": "NobodysNode", "inputs": {} } });
    let error = world.refusal("comfy_run", json!({ "workflow": unknown })).await;
    assert!(error.kind == ErrorKind::InvalidInput && error.message.contains("NobodysNode"), "{error}");

    let mut outside = sampler(1, 0);
    outside["2"]["inputs"]["filename_prefix"] = json!("../../outside");
    let error = world.refusal("comfy_run", json!({ "workflow": outside })).await;
    assert!(error.kind == ErrorKind::Failed && error.message.contains("node 2 (SaveImage)"), "{error}");
    assert!(error.hint.is_some(), "{error}");
    let queue = world.ask("comfy_queue", json!({ "history": 1 })).await;
    assert_eq!(queue["history"][0]["status"], "failed", "{queue}");
    assert!(queue["history"][0]["job"].is_string(), "{queue}");
}
