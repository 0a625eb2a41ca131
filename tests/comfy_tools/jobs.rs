//! Runs that outlive the call or the process that began them.

use std::time::Duration;

use autopod_mcp::tools::ErrorKind;
use axum::Router;
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::{kill_ssh, picture, sampler};
use crate::support::world::World;

fn id_of(answer: &Value) -> String {
    answer["prompt_id"].as_str().unwrap_or_else(|| panic!("no id in {answer}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_call_had_no_time_for_is_found_again() {
    let world = World::new().await;
    let pod_id = world.ready_pod().await;
    let answer = world.ask("comfy_run", json!({ "workflow": sampler(30, 100), "wait_seconds": 1 })).await;
    assert_eq!(answer["done"], false, "{answer}");
    let id = id_of(&answer);
    assert_eq!(answer["next"], format!("comfy_job {{\"prompt_id\": \"{id}\"}}"));
    let queue = world.ask("comfy_queue", json!({})).await;
    assert_eq!((&queue["running"][0]["job"], &queue["running"][0]["position"]), (&json!(id), &json!(0)), "{queue}");
    let now = world.ask("comfy_job", json!({ "prompt_id": id, "wait_seconds": 0 })).await;
    assert_eq!((&now["done"], &now["prompt_id"]), (&json!(false), &json!(id)), "{now}");
    // Nor is it lost with the tunnel, which comes back under it.
    kill_ssh(&world);
    let end = world.ask("comfy_job", json!({ "prompt_id": id })).await;
    assert_eq!((&end["state"], &end["files"].as_array().map(Vec::len)), (&json!("done"), &Some(1)), "{end}");
    let again = world.ask("comfy_job", json!({ "prompt_id": id })).await;
    assert_eq!(again["files"], end["files"]);
    let events = world.events(&pod_id).await;
    assert_eq!(events.iter().filter(|event| event["path"] == "/prompt").count(), 1);

    let unknown = world.refusal("comfy_job", json!({ "prompt_id": uuid::Uuid::new_v4() })).await;
    assert_eq!(unknown.kind, ErrorKind::NotFound);
    assert!(unknown.hint.is_some_and(|hint| hint.contains(&id)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_ends_leaves_a_run_for_others_to_finish() {
    let world = World::new().await;
    let pod_id = world.ready_pod().await;
    let workflow = world.file("workflow.json", sampler(30, 100).to_string().as_bytes());
    let arguments = json!({ "workflow_path": workflow, "wait_seconds": 0 }).to_string();
    let output = world.program(&["call", "comfy_run", &arguments]).output().await.expect("the program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    // The one exception to the time limit: it stayed until ComfyUI had the run.
    assert!(["pending", "running"].contains(&answer["state"].as_str().unwrap_or_default()), "{answer}");
    let id = id_of(&answer);
    let end = world.ask("comfy_job", json!({ "prompt_id": id })).await;
    assert_eq!(end["state"], "done", "{end}");
    let path = end["files"][0]["path"].as_str().expect("a path");
    let outputs = world.home.outputs().join(&id).canonicalize().expect("the folder");
    assert!(std::path::Path::new(path).starts_with(outputs), "{path}");
    assert!(std::fs::read(path).expect("the picture").starts_with(b"\x89PNG"));
    let events = world.events(&pod_id).await;
    assert_eq!(events.iter().filter(|event| event["path"] == "/prompt").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_wait_with_bounded_calls_until_it_is_done() {
    let world = World::new().await;
    world.ready_pod().await;
    let workflow = world.file("workflow.json", sampler(20, 100).to_string().as_bytes());
    let workflow = workflow.to_str().expect("a path");
    let output = world.program(&["comfy", "run", workflow, "--timeout", "1s", "--json"]).output().await;
    let output = output.expect("the program");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!((output.status.code(), &answer["done"]), (Some(1), &json!(false)), "{answer}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&format!("`comfy job {}`", id_of(&answer))), "{said}");
    let output = world.program(&["comfy", "job", &id_of(&answer), "--json"]).output().await.expect("the program");
    let answer: Value = serde_json::from_slice(&output.stdout).expect("an answer");
    assert_eq!((output.status.code(), &answer["state"]), (Some(0), &json!("done")), "{answer}");

    let status = world.program(&["comfy", "status"]).output().await.expect("the program");
    assert_eq!(status.status.code(), Some(0), "{}", String::from_utf8_lossy(&status.stdout));
    let ended = world.program(&["pod", "kill", "comfy"]).output().await.expect("the program");
    assert_eq!(ended.status.code(), Some(0), "{}", String::from_utf8_lossy(&ended.stderr));
    let status = world.program(&["comfy", "status"]).output().await.expect("the program");
    let said = String::from_utf8_lossy(&status.stdout);
    assert_eq!(status.status.code(), Some(1), "{said}");
    assert!(said.contains("not ready") && said.contains("Next:"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_died_before_the_submit_says_run_again() {
    let world = World::new().await;
    // A ComfyUI that never gets to the end of an upload.
    let (began, mut uploads) = tokio::sync::mpsc::channel::<()>(1);
    let stats = json!({ "system": { "comfyui_version": "0.3.64" }, "devices": [] });
    let upload = move || async move {
        let _ = began.send(()).await;
        std::future::pending::<()>().await;
    };
    let server = Router::new()
        .route("/system_stats", get(move || async move { axum::Json(stats) }))
        .route("/upload/image", post(upload));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let server = tokio::spawn(async move { axum::serve(listener, server).await });

    let workflow = json!({
        "1": { "class_type": "LoadImage", "inputs": { "image": "a.png" } },
        "2": { "class_type": "PreviewImage", "inputs": { "images": ["1", 0] } },
    });
    let input = world.file("input.png", &picture());
    let arguments = json!({ "workflow": workflow, "inputs": [{ "path": input }], "url": url }).to_string();
    let mut child = world.program(&["call", "comfy_run", &arguments]).spawn().expect("the program");
    tokio::time::timeout(Duration::from_secs(30), uploads.recv()).await.expect("an upload").expect("an upload");
    let mut jobs = std::fs::read_dir(world.home.jobs()).expect("jobs");
    let name = jobs.next().expect("a job").expect("a job").file_name();
    let id = name.to_str().and_then(|name| name.strip_suffix(".json")).expect("an id").to_owned();
    let meanwhile = world.ask("comfy_job", json!({ "prompt_id": id, "wait_seconds": 0 })).await;
    assert_eq!((&meanwhile["state"], &meanwhile["done"]), (&json!("uploading"), &json!(false)), "{meanwhile}");

    child.kill().await.expect("it was there");
    let answer = world.ask("comfy_job", json!({ "prompt_id": id })).await;
    assert_eq!((&answer["state"], &answer["done"]), (&json!("not_submitted"), &json!(true)), "{answer}");
    assert!(answer["next"].as_str().is_some_and(|next| next.starts_with("run again")), "{answer}");
    server.abort();
}

/// A ComfyUI that takes a prompt and dies before it answers.
async fn dying_comfyui(listener: TcpListener) {
    loop {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = vec![0; 16 * 1024];
        let length = stream.read(&mut request).await.expect("a request");
        if request[..length].starts_with(b"POST /prompt") {
            return;
        }
        let body = json!({ "system": { "comfyui_version": "0.3.64" }, "devices": [] }).to_string();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_submit_is_an_unknown_outcome() {
    let world = World::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let comfyui = tokio::spawn(dying_comfyui(listener));
    let error = world.refusal("comfy_run", json!({ "workflow": sampler(1, 0), "url": url })).await;
    comfyui.await.expect("it died of the prompt");
    assert_eq!((error.kind, error.retryable), (ErrorKind::UnknownOutcome, false), "{error}");
    let hint = error.hint.clone().unwrap_or_default();
    let id = hint.split('"').nth(3).unwrap_or_else(|| panic!("no id in {error}"));
    let answer = world.ask("comfy_job", json!({ "prompt_id": id, "wait_seconds": 0 })).await;
    assert_eq!((&answer["state"], &answer["done"]), (&json!("submitting"), &json!(false)), "{answer}");
    assert!(answer["waiting_for"].as_str().is_some_and(|what| what.contains("nothing listens")), "{answer}");
}
