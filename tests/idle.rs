//! A pod that is to end when nobody uses it: what counts as use, what can't be told, and its end.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use autopod_mcp::app;
use autopod_mcp::comfy::jobs::{JobRecord, JobState, JobStore};
use autopod_mcp::config::Limits;
use autopod_mcp::fleet::PodRecord;
use autopod_mcp::keeper::{self, Ended, KeeperOptions, inside};
use autopod_mcp::state::StateError;
use autopod_mcp::timing::Timing;
use autopod_mcp::tunnel::{LocalPort, TunnelRecord, TunnelState, name_of};
use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::keeper_support::{House, until};
use crate::ssh_support::{Sshd, ssh, there_is_an_sshd};
use crate::support::userns;

const COMFY_PORT: u16 = 8188;

/// Stands for the ComfyUI of all pods; its queue is what the test says.
#[derive(Clone)]
struct Comfy(Arc<Mutex<(StatusCode, Value)>>);

impl Comfy {
    async fn start() -> (Self, u16) {
        let comfy = Self(Arc::default());
        comfy.is_idle();
        let (listener, queue) = (tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port"), comfy.clone());
        let port = listener.local_addr().expect("an address").port();
        let stats = json!({ "system": { "os": "posix" }, "devices": [] });
        let routes = Router::new()
            .route("/system_stats", get(async move || stats.to_string()))
            .route("/queue", get(async move || queue.answer()));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (comfy, port)
    }

    fn answer(&self) -> impl IntoResponse + use<> {
        let (status, body) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (status, body.to_string())
    }

    fn set(&self, status: StatusCode, body: Value) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (status, body);
    }

    fn is_idle(&self) {
        self.set(StatusCode::OK, json!({ "queue_running": [], "queue_pending": [] }));
    }

    fn runs(&self) {
        self.set(StatusCode::OK, json!({ "queue_running": [[1, "a", {}, {}, []]], "queue_pending": [] }));
    }

    fn is_broken(&self) {
        self.set(StatusCode::INTERNAL_SERVER_ERROR, json!("broken"));
    }
}

/// A home whose keeper runs in this process and looks often.
struct Kept {
    house: House,
    comfy: Comfy,
    timing: Timing,
    stop: CancellationToken,
    keeper: Option<JoinHandle<Result<Ended, StateError>>>,
}

impl Kept {
    async fn start(idle_minute: Duration) -> Self {
        let (comfy, port) = Comfy::start().await;
        let house = House::of("home", |options| options.comfyui = Some(format!("http://127.0.0.1:{port}"))).await;
        let timing = Timing { idle_poll: Duration::from_millis(100), idle_minute, ..Timing::quick() };
        let mut kept = Self { house, comfy, timing, stop: CancellationToken::new(), keeper: None };
        kept.start_keeper();
        kept
    }

    fn start_keeper(&mut self) {
        let house = &self.house;
        self.stop = CancellationToken::new();
        self.keeper = Some(tokio::spawn(keeper::run(KeeperOptions {
            home: house.home(),
            timing: self.timing.clone(),
            origin: house.origin(),
            key: Some(SecretString::from(house.sandbox.key().to_owned())),
            connect: app::connect(Some(&house.home()), house.sandbox.url(), "autopod-keeper").expect("a connection"),
            on_key: Arc::new(|_| {}),
            ssh_environment: house.environment(),
            stop: self.stop.clone(),
        })));
    }

    async fn stop_keeper(&mut self) {
        self.stop.cancel();
        let keeper = self.keeper.take().expect("a keeper");
        tokio::time::timeout(Duration::from_secs(60), keeper)
            .await
            .expect("its end")
            .expect("no panic")
            .expect("ended");
    }

    /// A pod that ends after one such minute without use, and the port of its healthy tunnel.
    async fn pod(&self, name: &str) -> u16 {
        let mut wish = self.house.wish(SignedDuration::from_mins(30));
        wish.wanted.idle_minutes = Some(1);
        self.house.fleet().ensure(name, wish, &Limits::default()).await.expect("a record");
        let id = until("a placed pod", async || self.record(name).known.pod_id).await;
        let tunnels = self.house.tunnels();
        let tunnel = name_of(name, COMFY_PORT);
        tunnels.want_open(&tunnel, TunnelRecord::new(name, &id, COMFY_PORT, LocalPort::Any)).await.expect("a record");
        self.house.advance(10.0).await;
        until("a healthy tunnel", async || {
            let known = tunnels.get(&tunnel).ok()??.known;
            known.local_port.filter(|_| known.state == TunnelState::Healthy)
        })
        .await
    }

    fn record(&self, name: &str) -> PodRecord {
        self.house.fleet().get(name).expect("records").expect("a record")
    }

    async fn until_idle(&self, name: &str) -> Timestamp {
        until("idleness", async || self.record(name).known.idle_since).await
    }

    async fn until_in_use(&self, name: &str, how: &str) {
        until(how, async || self.record(name).known.idle_since.is_none().then_some(())).await;
        assert_eq!(self.record(name).known.idle_unknown, None, "{how}");
    }

    /// After something that leaves a trace only: idleness is counted anew.
    async fn until_idle_anew(&self, name: &str, before: Timestamp, how: &str) -> Timestamp {
        until(how, async || self.record(name).known.idle_since.filter(|since| *since != before)).await
    }

    async fn end(mut self) {
        self.stop_keeper().await;
        self.house.end().await;
    }
}

/// Another program's connection, open until its stdin ends.
fn connect(port: u16) -> Child {
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && echo connected && read -r _");
    Command::new("bash")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("bash")
}

async fn until_connected(child: &mut Child) {
    use tokio::io::AsyncReadExt;
    let mut word = [0; 10];
    child.stdout.take().expect("a pipe").read_exact(&mut word).await.expect("it connects");
    assert_eq!(&word, b"connected\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unused_pod_is_ended_and_one_that_is_used_is_not() {
    let kept = Kept::start(Duration::from_secs(2)).await;
    kept.comfy.runs();
    let port = kept.pod("used").await;
    kept.pod("unused").await;
    let mut connected = connect(port);
    until_connected(&mut connected).await;
    kept.comfy.is_idle();
    until("the end of the unused pod", async || (!kept.record("unused").is_open()).then_some(())).await;
    let ended = kept.record("unused").known;
    assert_eq!(ended.ending_cause.as_deref(), Some("nobody used it for 1 minute"));
    let used = kept.record("used");
    assert!(used.is_open() && !used.is_ending() && used.known.idle_since.is_none(), "{:?}", used.known);
    let audit = std::fs::read_to_string(kept.house.home().audit_file()).expect("the audit log");
    let notes: Vec<Value> = audit.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let noted = |note: &&Value| note["event"] == "ending" && note["pod"] == "unused";
    let note = notes.iter().find(noted).expect("a note of the end");
    assert!(note["cause"] == "nobody used it for 1 minute" && note["idle_since"].is_string(), "{note}");
    drop(connected.stdin.take());
    kept.house.until_none_alive("the end of the other one").await;
    kept.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_use_begins_the_count_anew() {
    let mut kept = Kept::start(Duration::from_secs(600)).await;
    let port = kept.pod("comfy").await;
    // Its own looks, and those of the tunnel, are no use. What the call that opened the tunnel did last may still be.
    let checked = || kept.house.tunnels().get("comfy:8188").ok()??.known.checked_at;
    let mut stayed = None;
    for _ in 0..5 {
        let (since, looks) = (kept.until_idle("comfy").await, checked());
        until("another check of the tunnel", async || (checked() > looks).then_some(())).await;
        stayed = kept.record("comfy").known.idle_since.filter(|now| *now == since);
        if stayed.is_some() {
            break;
        }
    }
    let since = stayed.expect("idleness that a check of the tunnel didn't end");

    let status = kept.house.ok("comfy_status", json!({ "pod": "comfy" })).await;
    assert_eq!(status["ready"], true, "{status}");
    let since = kept.until_idle_anew("comfy", since, "a tool's call").await;

    kept.comfy.runs();
    kept.until_in_use("comfy", "a run in ComfyUI").await;
    kept.comfy.is_idle();
    kept.until_idle("comfy").await;

    let mut connected = connect(port);
    until_connected(&mut connected).await;
    kept.until_in_use("comfy", "a connection").await;
    drop(connected.stdin.take());
    kept.until_idle("comfy").await;

    let jobs = JobStore::new(kept.house.home().root());
    let mut job = JobRecord::new(uuid::Uuid::new_v4(), Timestamp::now(), "comfy", kept.house.folder());
    job.state = JobState::Downloading;
    drop(jobs.create(job.clone()).expect("a job"));
    kept.until_in_use("comfy", "outputs that nobody has fetched").await;
    job.state = JobState::Done;
    drop(jobs.create(job).expect("a job"));
    let before = kept.until_idle("comfy").await;
    assert_ne!(before, since);

    let record = kept.record("comfy");
    let later = record.expires_at() + SignedDuration::from_mins(10);
    kept.house.fleet().want_extended(&record.intent, later, &Limits::default()).await.expect("a wish");
    let since = kept.until_idle_anew("comfy", before, "a later deadline").await;

    // Nobody looked while there was no keeper.
    kept.stop_keeper().await;
    kept.start_keeper();
    kept.until_idle_anew("comfy", since, "another keeper").await;
    assert!(!kept.record("comfy").is_ending());
    kept.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_in_the_pod_is_use_as_long_as_it_goes_on() {
    if !userns::are_allowed() {
        return;
    }
    let kept = Kept::start(Duration::from_secs(600)).await;
    kept.pod("comfy").await;
    kept.until_idle("comfy").await;
    let mut command = kept.house.program(&["pod", "exec", "comfy", "--", "cat"]);
    let mut running = command.stdin(Stdio::piped()).spawn().expect("it starts");
    kept.until_in_use("comfy", "a command").await;
    drop(running.stdin.take());
    assert!(running.wait().await.expect("its end").success());
    kept.until_idle("comfy").await;
    kept.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_can_not_be_read_is_not_known_to_be_empty() {
    let kept = Kept::start(Duration::from_secs(2)).await;
    kept.comfy.is_broken();
    kept.pod("broken").await;
    let why = until("the reason", async || {
        let known = kept.record("broken").known;
        known.idle_unknown.filter(|why| why.contains("500"))
    })
    .await;
    assert!(why.contains("queue can't be read"), "{why}");
    let told = kept.house.ok("get_pod", json!({ "pod": "broken" })).await;
    assert!(told["idle_unknown"].as_str().is_some_and(|why| why.contains("500")), "{told}");
    let unknown = kept.record("broken").known;
    assert_eq!((unknown.idle_since, unknown.ending_since), (None, None));
    kept.comfy.is_idle();
    kept.house.until_none_alive("the end of a pod whose queue is empty").await;
    kept.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_tunnel_is_asked_over_ssh() {
    if !there_is_an_sshd() {
        return;
    }
    let home = tempfile::tempdir().expect("a temporary folder");
    let ours = ssh(home.path().join("ssh"));
    let sshd = Sshd::start(&ours.public_key().await.expect("a key")).await;
    let target = sshd.target("autopod-queue-1").await;
    let (comfy, port) = Comfy::start().await;
    assert!(inside::queue(&ours, &target, port).await.expect("a queue").is_empty());
    comfy.runs();
    assert!(!inside::queue(&ours, &target, port).await.expect("a queue").is_empty());
    comfy.is_broken();
    let error = inside::queue(&ours, &target, port).await.expect_err("no queue").to_string();
    assert!(error.contains("500") && error.contains("exit code"), "{error}");
    comfy.set(StatusCode::OK, json!({ "queue_running": [] }));
    assert!(inside::queue(&ours, &target, port).await.is_err(), "half a queue is none");
}
