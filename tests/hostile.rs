//! Arguments, files, names and browsers that mean no good: every call is answered, in words that harm nobody.

mod provider;

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::faces_support::TestHome;
use crate::support::program::PATIENCE;
use autopod_mcp::background::KeeperClient;
use autopod_mcp::config::{Config, Home};
use autopod_mcp::fleet::{Audit, Fleet, Volumes};
use autopod_mcp::provider::GpuProvider;
use autopod_mcp::sandbox::{self, ClockMode, SandboxOptions};
use autopod_mcp::ssh::Ssh;
use autopod_mcp::timing::Timing;
use autopod_mcp::tools::context::Services;
use autopod_mcp::tools::{self, Answer, Context, ErrorKind, TOOLS, ToolError};
use autopod_mcp::tunnel::Tunnels;
use provider::{Hostile, Stalling};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A home of its own, whose keeper can't be started, with a provider that is given.
struct House {
    folder: TempDir,
    services: Arc<Services>,
}

impl House {
    fn new(provider: Option<Arc<dyn GpuProvider>>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let home = Home::open(folder.path().join("home")).expect("a home");
        let timing = Timing {
            call_limit: Duration::from_millis(400),
            keeper_hello: Duration::from_millis(1),
            record_poll: Duration::from_millis(1),
            ..Timing::quick()
        };
        let services = Services {
            fleet: Fleet::new(&home, &timing),
            volumes: Volumes::new(&home, &timing),
            audit: Audit::new(&home),
            tunnels: Tunnels::new(&home, &timing),
            keeper: KeeperClient::new(&home, &timing, None, None, "http://127.0.0.1:9", false),
            ssh: Ssh { folder: home.ssh(), environment: Vec::new() },
            config: Ok(Config::default()),
            provider,
            timing,
            home,
        };
        Self { folder, services: Arc::new(services) }
    }

    /// As a server calls, whose work may go on after the answer.
    async fn call(&self, tool: &str, arguments: Value) -> Result<Answer, ToolError> {
        let context = Context { after_answer: Some(Default::default()), ..Context::new(self.services.clone()) };
        let answer = tokio::time::timeout(PATIENCE, tools::call(&context, tool, arguments)).await;
        answer.unwrap_or_else(|_| panic!("{tool} hangs"))
    }

    async fn refusal(&self, tool: &str, arguments: Value) -> ToolError {
        match self.call(tool, arguments).await {
            Ok(answer) => panic!("{tool} worked: {}", answer.value),
            Err(error) => error,
        }
    }
}

fn hostile_values() -> Vec<Value> {
    let mut deep = json!(1);
    for level in 0..500 {
        deep = if level % 2 == 0 { json!([deep]) } else { json!({ "a": deep }) };
    }
    vec![
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1.5),
        json!(1e308),
        json!(-1e308),
        json!(5e-324),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!(" "),
        json!("\0"),
        json!("\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}31m\r\n\u{202e}"),
        json!("../../../etc/passwd"),
        json!("/dev/zero"),
        json!("-oProxyCommand=id"),
        json!("https://[::1"),
        json!("http://user:pass@127.0.0.1:1"),
        json!("💥".repeat(1000)),
        json!("x".repeat(1 << 20)),
        json!([]),
        json!([[[]]]),
        json!([null, 1, "\u{1b}"]),
        json!(vec!["x"; 200]),
        json!({}),
        json!({ "prompt": { "1": { "class_type": "\u{1b}[2J", "inputs": { "a": ["1", -1e308] } } } }),
        deep,
    ]
}

fn assert_harmless(tool: &str, result: &Result<Answer, ToolError>) {
    let told = match result {
        Ok(answer) => answer.text.clone(),
        Err(error) => {
            assert_ne!(error.kind, ErrorKind::Internal, "{tool}: {error}");
            error.to_string()
        }
    };
    let steers = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(!told.chars().any(steers), "{tool} tells what steers a terminal: {told:?}");
    assert!(told.chars().count() < 20_000, "{tool} tells {} characters", told.chars().count());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_arguments_break_a_tool() {
    let without_key = House::new(None);
    let with_key = House::new(Some(Arc::new(Hostile)));
    let mut calls = 0;
    for house in [&without_key, &with_key] {
        for tool in TOOLS {
            let example: Value = serde_json::from_str(tool.example).expect("an example is JSON");
            let schema = (tool.input_schema)();
            let fields: Vec<String> = schema["properties"].as_object().expect("fields").keys().cloned().collect();
            for value in hostile_values() {
                assert_harmless(tool.name, &house.call(tool.name, value.clone()).await);
                calls += 1;
                for field in fields.iter().map(String::as_str).chain(["\u{1b}[2J"]) {
                    let mut arguments = example.clone();
                    if fields.iter().any(|field| field == "wait_seconds") {
                        arguments["wait_seconds"] = json!(0);
                    }
                    arguments[field] = value.clone();
                    assert_harmless(tool.name, &house.call(tool.name, arguments).await);
                    calls += 1;
                }
            }
        }
    }
    assert!(calls > 3000, "only {calls} calls were made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_stalls_keeps_nobody_waiting() {
    let house = House::new(Some(Arc::new(Stalling)));
    for tool in TOOLS {
        let example: Value = serde_json::from_str(tool.example).expect("an example is JSON");
        assert_harmless(tool.name, &house.call(tool.name, example).await);
    }
    let created = house.refusal("create_pod_with_volume", json!({})).await;
    assert_eq!(created.kind, ErrorKind::UnknownOutcome, "{created}");
    let listed = house.refusal("list_gpus", json!({})).await;
    assert_eq!((listed.kind, listed.retryable), (ErrorKind::Network, true), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_the_provider_can_not_steer_a_terminal() {
    let house = House::new(Some(Arc::new(Hostile)));
    for (tool, arguments) in [
        ("list_volumes", json!({})),
        ("list_gpus", json!({ "include_unavailable": true })),
        ("list_pods", json!({})),
        ("create_pod_with_volume", json!({ "volume": "none such" })),
        ("create_pod_with_volume", json!({ "gpus": ["none such"] })),
        ("terminate_pod", json!({ "pod": "none such" })),
    ] {
        assert_harmless(tool, &house.call(tool, arguments).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_never_end_or_never_begin_are_refused() {
    let house = House::new(None);
    let pipe = house.folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    for path in [pipe.to_str().expect("text"), "/dev/zero", "/dev/full", "/"] {
        let error = house.refusal("comfy_run", json!({ "workflow_path": path })).await;
        assert_eq!(error.kind, ErrorKind::InvalidInput, "{path}: {error}");
        let workflow = json!({ "1": { "class_type": "LoadImage", "inputs": { "image": "a" } } });
        let error = house.refusal("comfy_run", json!({ "workflow": workflow, "inputs": [{ "path": path }] })).await;
        assert_eq!(error.kind, ErrorKind::InvalidInput, "{path}: {error}");
        assert!(error.message.contains("inputs[0].path"), "{error}");
    }
    let endless = house.folder.path().join("endless.json");
    let file = std::fs::File::create(&endless).expect("a file");
    file.set_len(1 << 40).expect("a sparse file");
    let error = house.refusal("comfy_run", json!({ "workflow_path": endless })).await;
    assert!(error.message.contains("too many"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sandbox_answers_no_page_of_another_site() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = SandboxOptions {
        listen: "127.0.0.1:0".parse().expect("an address"),
        folder: folder.path().join("sandbox"),
        clock: ClockMode::Manual,
        comfyui: None,
        idle_limit: None,
        namespaces: true,
    };
    let sandbox = sandbox::start(options).await.expect("a sandbox");
    let address = sandbox.url().strip_prefix("http://").expect("http").to_owned();
    let port = address.rsplit_once(':').expect("a port").1;
    let key = sandbox.key();
    let ask = async |path: &str, host: &str, more: &str| {
        let mut stream = tokio::net::TcpStream::connect(&address).await.expect("a connection");
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: test\r\nAuthorization: Bearer {key}\r\n{more}\
             Connection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it answers");
        answer.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()).expect("a status")
    };
    for path in ["/v2/pods", "/_sandbox/requests"] {
        for host in [address.clone(), format!("localhost:{port}")] {
            assert_eq!(ask(path, &host, "").await, 200, "{path} {host}");
        }
        assert_eq!(ask(path, &address, &format!("Origin: http://{address}\r\n")).await, 200, "{path}");
        for host in ["evil.example".to_owned(), format!("evil.example:{port}"), "127.0.0.1:1".to_owned()] {
            assert_eq!(ask(path, &host, "").await, 403, "{path} {host}");
        }
        for origin in ["https://evil.example", "null", "http://127.0.0.1:1"] {
            assert_eq!(ask(path, &address, &format!("Origin: {origin}\r\n")).await, 403, "{path} {origin}");
        }
    }
    sandbox.stop().await;
}

/// Its end would close the records of pods that go on running, and so cost money.
#[tokio::test]
async fn no_sandbox_runs_in_the_home_of_a_real_account() {
    let home = TestHome::new();
    let root = home.path();
    std::fs::create_dir_all(root.join("locks")).expect("a folder");
    let bound = json!({ "schema": 1, "owner": "0123", "account": "https://api.runpod.io 4567" });
    std::fs::write(root.join("home.json"), bound.to_string()).expect("a file");
    let (code, _, told) = home.run(&["sandbox", "--folder", root.to_str().expect("text")]).await;
    assert!(code == 4 && told.contains("real account"), "{code}: {told}");
    // As if an earlier sandbox had left its lock there, by which `--sandbox` knows a sandbox's home.
    std::fs::write(root.join("locks/sandbox"), "").expect("a file");
    let (code, _, told) = home.run(&["--sandbox", "call", "list_pods"]).await;
    assert!(code == 4 && told.contains("real account"), "{code}: {told}");
    assert!(!root.join("sandbox.json").exists(), "a sandbox was begun");
}
