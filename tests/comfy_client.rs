//! The ComfyUI client against a scripted server on a real loopback socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use autopod_mcp::comfy::jobs::{DriveOptions, Job, JobInput, JobRecord, JobState, JobStore, Start, drive};
use autopod_mcp::comfy::outputs::{DownloadLimits, OutputFile, SaveError, save};
use autopod_mcp::comfy::watch::{Progress, watch};
use autopod_mcp::comfy::workflow::Workflow;
use autopod_mcp::comfy::{ComfyClient, ComfyError};
use axum::http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

mod following;
mod scripted;

use scripted::{OnPrompt, OnView, Server, client_at, timeouts};

fn workflow() -> Workflow {
    let load = json!({"class_type": "LoadImage", "inputs": {"image": "old.png"}});
    let save = json!({"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t/autopod"}});
    Workflow::parse(&json!({"1": load, "2": save})).unwrap()
}

fn start() -> Start {
    Start { workflow: workflow(), inputs: Vec::new() }
}

fn saved_image(subfolder: &str, name: &str) -> Value {
    json!({"2": {"images": [{"filename": name, "subfolder": subfolder, "type": "output"}]}})
}

fn output(subfolder: &str, name: &str) -> OutputFile {
    let [node, kind, filename, subfolder, folder] = ["2", "images", name, subfolder, "output"].map(str::to_owned);
    OutputFile { node, kind, filename, subfolder, folder }
}

/// A home with one job that writes to `home/out`.
struct Home {
    folder: tempfile::TempDir,
    store: JobStore,
    id: Uuid,
}

impl Home {
    fn new() -> (Self, Job) {
        let folder = tempfile::tempdir().unwrap();
        let (store, id) = (JobStore::new(folder.path()), Uuid::new_v4());
        let record = JobRecord::new(id, Timestamp::UNIX_EPOCH, "comfy", &folder.path().join("out"));
        let job = store.create(record).unwrap();
        (Self { folder, store, id }, job)
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn record(&self) -> JobRecord {
        self.store.read(self.id).unwrap()
    }

    /// Every file below the home but records and locks.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.folder.path()).unwrap().display().to_string();
                match path.is_dir() {
                    true if name != "jobs" && name != "locks" => folders.push(path),
                    true => {}
                    false => found.push(name),
                }
            }
        }
        found.sort();
        found
    }
}

async fn submit_one(server: &Server, client: &ComfyClient) -> (String, String) {
    let client_id = Uuid::new_v4().simple().to_string();
    let submitted = client.submit(Uuid::new_v4(), &client_id, &workflow()).await.unwrap();
    assert_eq!(server.world().prompts.len(), 1);
    (submitted.prompt_id, client_id)
}

#[tokio::test]
async fn a_run_from_upload_to_the_picture_on_disk() {
    let server = Server::start().await;
    let client = server.client();
    assert_eq!(client.system_stats().await.unwrap().system.comfyui_version.as_deref(), Some("0.3.64"));
    let (home, mut job) = Home::new();
    let picture = home.folder.path().join("cat.png");
    std::fs::write(&picture, b"a cat").unwrap();
    server.put_file("output", "t", "autopod_00001_.png", b"a picture");
    let inputs = vec![JobInput { selector: String::new(), path: picture, uploaded: None }];
    let start = Some(Start { workflow: workflow(), inputs });

    let (changes, mut changed) = tokio::sync::mpsc::unbounded_channel();
    let driving = drive(&client, &mut job, start, DriveOptions::default(), |record| {
        changes.send((record.state, record.progress.clone())).unwrap();
    });
    let script = async {
        server.until("submitted", |world| !world.pending.is_empty()).await;
        let id = server.begin();
        server.tell("progress", json!({"prompt_id": "another", "node": "1", "value": 7, "max": 9}));
        server.tell("execution_start", json!({"prompt_id": id}));
        server.tell("execution_cached", json!({"prompt_id": id, "nodes": ["1"]}));
        server.tell("executing", json!({"prompt_id": id, "node": "2"}));
        server.tell("progress", json!({"prompt_id": id, "node": "2", "value": 3, "max": 4}));
        let states = json!({"2": {"value": 3.0, "max": 4.0, "state": "running"}});
        server.tell("progress_state", json!({"prompt_id": id, "nodes": states}));
        // Nothing ends before the steps were seen, so that the test doesn't depend on who is quicker.
        loop {
            if let Some((_, Some(progress @ Progress::Step { .. }))) = changed.recv().await {
                let (node, class_type) = ("2".to_owned(), Some("SaveImage".to_owned()));
                let (value, max, nodes_done, nodes_total) = (3.0, 4.0, 1, 2);
                assert_eq!(progress, Progress::Step { node, class_type, value, max, nodes_done, nodes_total });
                break;
            }
        }
        server.tell("execution_success", json!({"prompt_id": id}));
        server.finish(saved_image("t", "autopod_00001_.png"));
    };
    let (driven, ()) = tokio::join!(driving, script);
    driven.unwrap();

    let record = home.record();
    assert_eq!((record.state, record.error), (JobState::Done, None));
    let target = home.out().canonicalize().unwrap().join("t/autopod_00001_.png");
    assert_eq!(record.saved[0].path, target);
    assert_eq!(std::fs::read(&target).unwrap(), b"a picture");
    let world = server.world();
    assert_eq!(world.uploads, [("cat.png".to_owned(), b"a cat".to_vec())]);
    assert_eq!(world.prompts.len(), 1);
    assert_eq!(world.prompts[0]["prompt"]["1"]["inputs"]["image"], "given (1).png");
    assert_eq!(world.prompts[0]["prompt_id"], json!(home.id));
    assert_eq!(world.sockets, [record.client_id]);
    let socket = world.requests.iter().position(|request| request == "GET /ws");
    assert!(socket < world.requests.iter().position(|request| request == "POST /prompt"));
    assert_eq!(world.origins, 0);
}

#[tokio::test]
async fn a_refused_workflow_names_every_node_and_error() {
    let server = Server::start().await;
    let error =
        |kind: &str, details: &str| json!({"type": kind, "message": "Bad value", "details": details, "extra_info": {}});
    let body = json!({
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation",
            "details": "", "extra_info": {}},
        "node_errors": {
            "1": {"class_type": "LoadImage", "dependent_outputs": ["2"],
                "errors": [error("value_not_in_list", "image: 'x' not in []"), error("required_input_missing", "mask")]},
            "2": {"class_type": "SaveImage", "dependent_outputs": [], "errors": [error("bad_linked_input", "images")]},
        }
    });
    server.world().on_prompt.push_back(OnPrompt::Answer(StatusCode::BAD_REQUEST, body));
    let (home, mut job) = Home::new();
    drive(&server.client(), &mut job, Some(start()), DriveOptions::default(), |_| {}).await.unwrap();
    let record = home.record();
    assert_eq!((record.state, record.node_errors.len()), (JobState::Rejected, 3));
    let told = record.error.unwrap();
    for part in ["image: 'x' not in []", "required_input_missing", "node 2 (SaveImage): Bad value: images"] {
        assert!(told.contains(part), "{part:?} is missing in {told}");
    }
}

#[tokio::test]
async fn a_lost_answer_is_looked_for_and_never_posted_again() {
    for planned in [OnPrompt::CutAfterAccepting, OnPrompt::OwnId("theirs")] {
        let own_id = matches!(planned, OnPrompt::OwnId(_));
        let server = Server::start().await;
        server.world().on_prompt.push_back(planned);
        let id = Uuid::new_v4();
        let submitted = server.client().submit(id, "only-mine", &workflow()).await.unwrap();
        assert_eq!(submitted.prompt_id, if own_id { "theirs".to_owned() } else { id.to_string() });
        assert_eq!(server.world().prompts.len(), 1);
    }

    let server = Server::start().await;
    server.world().on_prompt.push_back(OnPrompt::CutWithoutAccepting);
    let (home, mut job) = Home::new();
    let driven = drive(&server.client(), &mut job, Some(start()), DriveOptions::default(), |_| {}).await;
    assert!(driven.unwrap_err().to_string().contains("was not accepted, run it again"));
    assert_eq!((home.record().state, server.world().prompts.len()), (JobState::NotSubmitted, 1));
}

#[tokio::test]
async fn a_redirected_submit_is_an_error() {
    let server = Server::start().await;
    server.world().on_prompt.push_back(OnPrompt::Redirect);
    let error = server.client().submit(Uuid::new_v4(), "c", &workflow()).await.unwrap_err();
    assert!(matches!(&error, ComfyError::Redirected { to, .. } if to == "/prompt2"), "{error}");
    assert_eq!(server.world().requests, ["POST /prompt"]);
}

#[tokio::test]
async fn whatever_else_answers_is_told_apart() {
    let server = Server::start().await;
    let client = server.client();
    let others = [("text/html", "<html>Jupyter</html>"), ("application/json", "{\"ok\": true}"), ("text/plain", "")];
    for (kind, body) in others {
        server.world().stats = Some((kind, body));
        let error = client.system_stats().await.unwrap_err();
        assert!(matches!(&error, ComfyError::WrongService { found, .. } if found.contains(kind)), "{error}");
    }
    let stats =
        r#"{"system": {"os": "nt"}, "devices": [{"name": "a", "type": "cpu", "index": null, "vram_free": NaN}]}"#;
    server.world().stats = Some(("application/json", stats));
    assert_eq!(client.system_stats().await.unwrap().devices[0].vram_free, None);
    let elsewhere = client_at(&format!("{}/sub", server.url), timeouts()).system_stats().await.unwrap_err();
    assert!(matches!(elsewhere, ComfyError::WrongService { .. }), "{elsewhere}");
    assert!(client.object_info_class("EmptyImage").await.unwrap().is_some());
    assert!(client.object_info_class("No/Such?").await.unwrap().is_none());
}

#[tokio::test]
async fn nothing_there_nothing_behind_it_and_no_answer_are_three_things() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let hasty = autopod_mcp::comfy::ComfyTimeouts { request: Duration::from_millis(100), ..timeouts() };
    let client = client_at(&url, hasty);
    // The kernel accepts for a listener that never does.
    let silent = client.system_stats().await.unwrap_err();
    assert!(matches!(silent, ComfyError::TimedOut { .. }), "{silent}");

    // As a tunnel does when nothing listens at its far end.
    let closing = tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
        }
    });
    let closed = client_at(&url, timeouts()).system_stats().await.unwrap_err();
    assert!(matches!(closed, ComfyError::Cut { .. }), "{closed}");
    let lost = client_at(&url, timeouts()).submit(Uuid::new_v4(), "c", &workflow()).await.unwrap_err();
    assert!(matches!(lost, ComfyError::OutcomeUnknown { .. }), "{lost}");

    closing.abort();
    let _ = closing.await;
    let refused = client.system_stats().await.unwrap_err();
    assert!(matches!(refused, ComfyError::Refused { .. }) && refused.was_never_sent(), "{refused}");
    let secure = client_at(&url.replace("http:", "https:"), timeouts()).system_stats().await.unwrap_err();
    assert!(matches!(secure, ComfyError::Refused { .. } | ComfyError::Setup(_)), "{secure}");
    let given_up = watch(&client_at(&url, timeouts()), "id", "c", None, |_| {}).await.unwrap_err();
    assert!(matches!(given_up, ComfyError::Refused { .. }), "{given_up}");
}

#[tokio::test]
async fn hostile_names_are_skipped_and_the_rest_is_saved() {
    let server = Server::start().await;
    let (home, mut job) = Home::new();
    let hostile =
        [("", "../../x"), ("", "/etc/x"), ("", "a\0b"), ("../..", "x"), ("/etc", "x"), ("a\\..", "x"), ("", "")];
    let mut items: Vec<_> = hostile.iter().map(|(sub, name)| json!({"filename": name, "subfolder": sub})).collect();
    items.push(json!({"filename": "gone.png", "subfolder": "", "type": "output"}));
    items.push(json!({"filename": "good.png", "subfolder": "", "type": "temp"}));
    for (subfolder, name) in hostile {
        server.put_file("output", subfolder, name, b"evil");
    }
    server.put_file("temp", "", "good.png", b"good");
    let client = server.client();
    let driving = drive(&client, &mut job, Some(start()), DriveOptions::default(), |_| {});
    let script = async {
        server.until("submitted", |world| !world.pending.is_empty()).await;
        server.begin();
        server.finish(json!({"2": {"images": items, "text": ["a caption"]}}));
    };
    tokio::join!(driving, script).0.unwrap();
    let record = home.record();
    assert_eq!((record.state, record.skipped.len()), (JobState::Done, hostile.len() + 1));
    assert!(record.skipped.last().unwrap().reason.contains("doesn't have the file any more"));
    assert_eq!(home.files(), ["out/good.png"]);
    assert_eq!(record.texts[0].text, "a caption");
}

#[tokio::test]
async fn downloads_are_whole_or_not_there() {
    let server = Server::start().await;
    let (home, _job) = Home::new();
    let client = server.client();
    server.put_file("output", "", "x.png", b"0123456789");
    server.world().on_view.extend([OnView::Truncate, OnView::Answer(StatusCode::BAD_GATEWAY)]);
    let saved = save(&client, &output("", "x.png"), &home.out(), 10).await.unwrap();
    assert_eq!((std::fs::read(&saved.path).unwrap(), saved.bytes), (b"0123456789".to_vec(), 10));

    server.put_file("output", "", "y.png", b"0123456789");
    server.world().on_view.extend([OnView::Truncate, OnView::Truncate, OnView::Truncate]);
    let broken = save(&client, &output("", "y.png"), &home.out(), 10).await.unwrap_err();
    assert!(matches!(broken, SaveError::Comfy(ComfyError::Cut { .. })), "{broken}");
    let large = save(&client, &output("", "y.png"), &home.out(), 9).await.unwrap_err();
    assert!(matches!(&large, SaveError::Skip(reason) if reason.contains("limit of 9 bytes")), "{large}");
    assert_eq!(home.files(), ["out/x.png"]);
}

#[tokio::test]
async fn what_is_there_is_reused_or_left_alone() {
    let server = Server::start().await;
    let (home, _job) = Home::new();
    let client = server.client();
    let put = async |content: &[u8]| {
        server.put_file("output", "t", "x.png", content);
        save(&client, &output("t", "x.png"), &home.out(), 1000).await
    };
    put(b"one").await.unwrap();
    put(b"one").await.unwrap();
    put(b"two").await.unwrap();
    put(b"two").await.unwrap();
    assert_eq!(home.files(), ["out/t/x (1).png", "out/t/x.png"]);

    // A link under the wanted name isn't followed, and neither is a linked folder.
    let outside = home.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(outside.join("z.png"), home.out().join("z.png")).unwrap();
    server.put_file("output", "", "z.png", b"z");
    let beside = save(&client, &output("", "z.png"), &home.out(), 1000).await.unwrap();
    assert!(beside.path.ends_with("z (1).png"));
    std::os::unix::fs::symlink(&outside, home.out().join("linked")).unwrap();
    let linked = save(&client, &output("linked", "z.png"), &home.out(), 1000).await.unwrap_err();
    assert!(linked.to_string().contains("symbolic link"), "{linked}");
    assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
}

#[tokio::test]
async fn a_job_left_behind_is_taken_up_where_it_stands() {
    let server = Server::start().await;
    let (home, mut job) = Home::new();
    let client = server.client();
    let soon = DriveOptions { until: Some(Instant::now() + Duration::from_millis(300)), ..DriveOptions::default() };
    drive(&client, &mut job, Some(start()), soon, |_| {}).await.unwrap();
    assert_eq!(home.record().state, JobState::Pending);
    drop(job);

    // The run ends while nobody looks; the first download breaks, the next process finishes it.
    server.put_file("output", "", "a.png", b"a");
    server.put_file("output", "", "b.png", b"b");
    server.begin();
    let images = json!([{"filename": "a.png", "subfolder": ""}, {"filename": "b.png", "subfolder": ""}]);
    server.finish(json!({"2": {"images": images}}));
    server.world().on_view.extend([OnView::Truncate, OnView::Truncate, OnView::Truncate]);
    let mut job = home.store.take(home.id).unwrap();
    assert!(drive(&client, &mut job, None, DriveOptions::default(), |_| {}).await.is_err());
    assert_eq!(home.record().state, JobState::Downloading);
    assert!(home.record().error.is_some());
    drop(job);

    // Even when the server has forgotten the run by then.
    server.world().history.clear();
    let mut job = home.store.take(home.id).unwrap();
    let limits = DownloadLimits { per_file: 1, total: 2 };
    // In a task of its own, as a run that goes on after its caller was answered.
    let resumed = async move { drive(&client, &mut job, None, DriveOptions { until: None, limits }, |_| {}).await };
    tokio::spawn(resumed).await.unwrap().unwrap();
    let record = home.record();
    assert_eq!((record.state, record.saved.len(), record.error), (JobState::Done, 2, None));
    assert_eq!(home.files(), ["out/a.png", "out/b.png"]);
    assert_eq!(server.world().prompts.len(), 1);
}

#[tokio::test]
async fn a_job_whose_process_died_before_the_submit_says_run_again() {
    let server = Server::start().await;
    let client = server.client();
    let (home, job) = Home::new();
    drop(job);
    let mut job = home.store.take(home.id).unwrap();
    drive(&client, &mut job, None, DriveOptions::default(), |_| {}).await.unwrap();
    assert_eq!(home.record().state, JobState::NotSubmitted);

    // While it was being sent, only the server knows.
    for reached in [false, true] {
        let (home, job) = Home::new();
        rewrite(&home, |record| record["state"] = json!("submitting"));
        drop(job);
        if reached {
            client.submit(home.id, &home.record().client_id, &workflow()).await.unwrap();
            server.begin();
            server.finish(json!({}));
        }
        let mut job = home.store.take(home.id).unwrap();
        drive(&client, &mut job, None, DriveOptions::default(), |_| {}).await.unwrap();
        let expected = if reached { JobState::Done } else { JobState::NotSubmitted };
        assert_eq!(home.record().state, expected);
    }
    assert_eq!(server.world().prompts.len(), 1);
}

fn rewrite(home: &Home, change: impl FnOnce(&mut Value)) {
    let path: &Path = &home.folder.path().join(format!("jobs/{}.json", home.id));
    let mut record: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    change(&mut record);
    std::fs::write(path, record.to_string()).unwrap();
}
