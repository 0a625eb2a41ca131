//! The ComfyUI tools against a sandbox, through a real keeper and its real ssh.

mod jobs;
mod refusals;

use autopod_mcp::tools::{self, ErrorKind};
use axum::Router;
use serde_json::{Value, json};

use crate::support::world::World;

/// A red, green, blue and translucent picture of 2 x 2.
const PIXELS: [u8; 12] = [255, 0, 0, 0, 128, 0, 10, 20, 30, 200, 201, 202];

pub fn picture() -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 2, 2);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().and_then(|mut writer| writer.write_image_data(&PIXELS)).expect("a picture");
    file
}

/// A workflow whose one sampler takes its time.
pub fn sampler(steps: u32, step_ms: u32) -> Value {
    let sampler = json!({ "width": 32, "height": 32, "steps": steps, "seed": u64::MAX, "step_ms": step_ms });
    json!({
        "1": { "class_type": "SandboxSampler", "inputs": sampler },
        "2": { "class_type": "SaveImage", "inputs": { "images": ["1", 0], "filename_prefix": "slow" } },
    })
}

/// Kills the ssh child of the tunnel to the pod `comfy`, and only that.
pub fn kill_ssh(world: &World) {
    let records = std::fs::read(world.home.tunnels_file()).expect("tunnels.json");
    let records: Value = serde_json::from_slice(&records).expect("JSON");
    let pid = records.pointer("/entries/comfy:8188/known/ssh_pid").and_then(Value::as_i64).expect("a pid");
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("ssh was there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_goes_there_and_comes_back() {
    let world = World::new().await;
    let pod_id = world.ready_pod().await;
    let workflow = json!({
        "1": { "class_type": "LoadImage", "inputs": { "image": "to be replaced.png" } },
        "2": { "class_type": "ImageInvert", "inputs": { "image": ["1", 0] } },
        "9": { "class_type": "SaveImage", "inputs": { "images": ["2", 0], "filename_prefix": "below/inverted" } },
    });
    let workflow = world.file("workflow.json", workflow.to_string().as_bytes());
    let input = world.file("input.png", &picture());
    let output_dir = world.folder().join("pictures");
    let answer = world
        .ask("comfy_run", json!({ "workflow_path": workflow, "inputs": [{ "path": input }], "output_dir": output_dir }))
        .await;
    assert_eq!((&answer["state"], &answer["done"], &answer["pod"]), (&json!("done"), &json!(true), &json!("comfy")));
    let files = answer["files"].as_array().expect("files");
    assert_eq!(files.len(), 1, "{answer}");
    assert_eq!(files[0]["node"], "9");
    let path = std::path::Path::new(files[0]["path"].as_str().expect("a path"));
    assert!(path.starts_with(output_dir.canonicalize().expect("the folder").join("below")), "{}", path.display());
    let saved = std::fs::read(path).expect("the picture");
    assert_eq!(files[0]["bytes"], saved.len());
    let mut reader = png::Decoder::new(std::io::Cursor::new(saved)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let frame = reader.next_frame(&mut pixels).expect("pixels");
    assert_eq!((frame.width, frame.height, frame.color_type), (2, 2, png::ColorType::Rgb));
    assert_eq!(pixels[..frame.buffer_size()], PIXELS.map(|channel| 255 - channel));

    let queue = world.ask("comfy_queue", json!({ "history": 5 })).await;
    assert_eq!(queue["history"][0]["job"], answer["prompt_id"], "{queue}");
    assert_eq!(queue["history"][0]["outputs"].as_array().map(Vec::len), Some(1), "{queue}");

    // All of it went through the pod's own ssh.
    let events = world.events(&pod_id).await;
    let requests: Vec<_> = events.iter().filter(|event| event["event"] == "comfy").collect();
    let path_of = |request: &Value| request["path"].as_str().unwrap_or_default().to_owned();
    let paths: Vec<_> = requests.iter().map(|request| path_of(request)).collect();
    for wanted in ["/system_stats", "/upload/image", "/ws", "/prompt", "/view", "/queue", "/history"] {
        assert!(paths.iter().any(|path| path.starts_with(wanted)), "{wanted} is not among {paths:?}");
    }
    assert_eq!(paths.iter().filter(|path| *path == "/prompt").count(), 1);
    for request in requests {
        assert_eq!(request["via"], "direct-tcpip", "{request}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_step_told_was_taken_in_the_pod() {
    let world = World::new().await;
    let pod_id = world.ready_pod().await;
    let (context, told) = world.context_with_progress();
    let answer = tools::call(&context, "comfy_run", json!({ "workflow": sampler(12, 40) })).await.expect("a run").value;
    assert_eq!(answer["state"], "done", "{answer}");
    let told = told.lock().expect("no panic while told").clone();
    assert!(told.windows(2).all(|pair| pair[0].value <= pair[1].value), "{told:?}");
    let steps: Vec<_> = told
        .iter()
        .filter(|update| update.message.contains("SandboxSampler (node 1): step"))
        .map(|update| (update.value, update.total))
        .collect();
    assert!(steps.len() >= 5, "{told:?}");
    let events = world.events(&pod_id).await;
    let taken: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "progress")
        .map(|event| (event["value"].as_f64().expect("a value"), event["max"].as_f64()))
        .collect();
    for step in &steps {
        assert!(taken.contains(step), "{step:?} is not among {taken:?}");
    }
    for phase in ["submitting", "downloading", "done"] {
        assert!(told.iter().any(|update| update.message.starts_with(phase)), "{phase} is not among {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_the_truth_when_ssh_is_killed() {
    let world = World::new().await;
    let nothing = world.ask("comfy_status", json!({ "wait_seconds": 0 })).await;
    assert_eq!(nothing["ready"], false);
    assert!(nothing["cause"].as_str().is_some_and(|cause| cause.contains("there is no pod")), "{nothing}");
    assert!(nothing["next"].as_str().is_some_and(|next| next.contains("create_pod_with_volume")), "{nothing}");

    // A pod that is still starting is waited for only as long as asked, and nothing is submitted meanwhile.
    world.ask("create_pod_with_volume", json!({ "wait_seconds": 0 })).await;
    let early = world.ask("comfy_run", json!({ "workflow": sampler(1, 0), "wait_seconds": 0 })).await;
    assert_eq!((&early["state"], &early["done"]), (&json!("waiting"), &json!(false)), "{early}");
    assert!(early["prompt_id"].is_null() && early["waiting_for"].is_string(), "{early}");
    assert!(early["next"].as_str().is_some_and(|next| next.starts_with("comfy_run again")), "{early}");
    world.ready_pod().await;

    let status = world.ask("comfy_status", json!({ "wait_seconds": 0 })).await;
    assert_eq!(status["ready"], true, "{status}");
    assert!(status["devices"][0]["vram_total_gb"].as_f64().is_some_and(|size| size > 0.0), "{status}");
    assert_eq!((&status["running"], &status["pending"]), (&json!(0), &json!(0)));
    let url = status["url"].as_str().expect("an address").to_owned();

    kill_ssh(&world);
    let down = world.ask("comfy_status", json!({ "wait_seconds": 0 })).await;
    assert_eq!(down["ready"], false, "{down}");
    assert!(down["cause"].is_string() && down["next"].is_string(), "{down}");
    let back = world.ask("comfy_status", json!({})).await;
    assert_eq!((&back["ready"], &back["url"]), (&json!(true), &json!(url)), "{back}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_address_needs_no_pod() {
    let world = World::new().await;
    // A port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let closed = world.ask("comfy_status", json!({ "url": format!("http://{free}"), "wait_seconds": 0 })).await;
    assert_eq!(closed["ready"], false);
    assert!(closed["cause"].as_str().is_some_and(|cause| cause.contains("nothing listens")), "{closed}");
    // What answers there is something else.
    let page = Router::new().fallback(|| async { "a page of somebody else" });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let other = format!("http://{}", listener.local_addr().expect("an address"));
    let server = tokio::spawn(async move { axum::serve(listener, page).await });
    let status = world.ask("comfy_status", json!({ "url": other })).await;
    assert_eq!(status["ready"], false);
    assert!(status["cause"].as_str().is_some_and(|cause| cause.contains("is not ComfyUI")), "{status}");
    let refusal = world.refusal("comfy_queue", json!({ "url": other })).await;
    assert!(refusal.kind == ErrorKind::Failed && refusal.message.contains("is not ComfyUI"), "{refusal}");
    server.abort();
}
