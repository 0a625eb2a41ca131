//! The whole story through MCP: an assistant's client starts the program as its configuration says.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use autopod_mcp::state::is_held;
use rmcp::model::{CallToolRequestParams, ClientConfig, ProgressNotificationParam};
use rmcp::service::{NotificationContext, RunningService};
use rmcp::{ClientHandler, RoleClient, ServiceExt};
use serde_json::{Value, json};
use tokio::process::Child;

use crate::faces_support::{Server, start};
use crate::story_support::{Story, assert_as_promised, colours, painting};
use crate::support::program::{PATIENCE, until};

/// A client that keeps every progress notification.
#[derive(Clone, Default)]
struct Watcher {
    seen: Arc<Mutex<Vec<ProgressNotificationParam>>>,
}

impl ClientHandler for Watcher {
    fn get_info(&self) -> ClientConfig {
        ClientConfig::default()
    }

    async fn on_progress(&self, progress: ProgressNotificationParam, _: NotificationContext<RoleClient>) {
        self.seen.lock().expect("nobody panicked").push(progress);
    }
}

struct Assistant {
    server: Child,
    client: RunningService<RoleClient, Watcher>,
    watcher: Watcher,
    tools: Vec<Value>,
}

impl Assistant {
    /// Starts the server as a configuration in the form of `mcp.json` says.
    async fn connect(story: &Story, arguments: Value) -> Self {
        let config = json!({"mcpServers": {"autopod": {"command": "autopod-mcp", "args": arguments}}});
        let arguments = config["mcpServers"]["autopod"]["args"].as_array().expect("arguments");
        let arguments: Vec<&str> = arguments.iter().filter_map(Value::as_str).collect();
        let (server, pipes) = start(story.home.command(&arguments));
        let watcher = Watcher::default();
        let session = tokio::time::timeout(PATIENCE, watcher.clone().serve(pipes)).await.expect("it greets");
        let client = session.expect("a session");
        let tools = client.list_all_tools().await.expect("a list of tools");
        let tools = tools.iter().map(|tool| serde_json::to_value(tool).expect("a tool is JSON")).collect();
        Self { server, client, watcher, tools }
    }

    /// Ends the session, and with it the server.
    async fn leave(mut self) {
        self.client.cancel().await.expect("the session ends");
        let ended = tokio::time::timeout(PATIENCE, self.server.wait()).await.expect("the server ends with its stdin");
        assert!(ended.expect("its end can be waited for").success());
    }

    /// One call; its structured answer, which has the promised shape.
    async fn call(&self, name: &'static str, arguments: Value) -> Value {
        let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
        let call = self.client.call_tool(CallToolRequestParams::new(name).with_arguments(arguments));
        let result = tokio::time::timeout(PATIENCE, call).await.expect("it answers").expect("an answer");
        let result = serde_json::to_value(result).expect("a result is JSON");
        assert_ne!(result["isError"], true, "{name}: {result}");
        assert!(result["content"][0]["text"].as_str().is_some_and(|text| !text.is_empty()), "{name}: {result}");
        let tool = self.tools.iter().find(|tool| tool["name"] == name).unwrap_or_else(|| panic!("{name} is listed"));
        assert_as_promised(&tool["outputSchema"], name, &result["structuredContent"]);
        result["structuredContent"].clone()
    }

    /// Calls until it is done, as an assistant does.
    async fn until_done(&self, name: &'static str, arguments: Value) -> Value {
        loop {
            let answer = self.call(name, arguments.clone()).await;
            if answer["done"] != false {
                return answer;
            }
        }
    }
}

#[tokio::test]
async fn the_whole_story_through_mcp() {
    let story = Story::begin();
    let assistant = Assistant::connect(&story, json!(["serve", "--sandbox"])).await;
    let greeting = assistant.client.peer_info().expect("the server introduced itself");
    assert_eq!(serde_json::to_value(greeting).expect("JSON")["serverInfo"]["name"], "autopod-mcp");
    assert_eq!(assistant.tools.len(), autopod_mcp::tools::TOOLS.len());
    assert!(!story.home.path().exists(), "nothing is made before the first call");

    let gpus = assistant.call("list_gpus", json!({"min_vram_gb": 16})).await;
    assert!(gpus["gpus"].as_array().is_some_and(|gpus| gpus.len() >= 3), "{gpus}");
    let volumes = assistant.call("list_volumes", json!({})).await;
    assert_eq!(volumes["volumes"][0]["name"], "comfy-models", "{volumes}");

    let wanted = json!({"volume": "comfy-models", "lifetime_minutes": 10});
    let pod = assistant.until_done("create_pod_with_volume", wanted.clone()).await;
    assert_eq!((&pod["pod"], &pod["state"], &pod["created"]), (&json!("comfy"), &json!("running"), &json!(true)));
    assert_eq!(pod["volume"]["name"], "comfy-models", "{pod}");
    let again = assistant.call("create_pod_with_volume", wanted).await;
    assert_eq!((&again["created"], &again["pod_id"]), (&json!(false), &pod["pod_id"]), "{again}");

    let tunnel = assistant.until_done("start_tunnel", json!({"pod": "comfy"})).await;
    assert!(tunnel["url"].as_str().is_some_and(|url| url.starts_with("http://127.0.0.1:")), "{tunnel}");
    let status = assistant.call("comfy_status", json!({})).await;
    assert_eq!((&status["ready"], &status["url"]), (&json!(true), &tunnel["url"]), "{status}");
    let shown = assistant.call("get_pod", json!({})).await;
    let steps = shown["readiness"].as_array().expect("steps");
    assert!(steps.iter().all(|step| step["done"] == true), "{shown}");

    assistant.watcher.seen.lock().expect("nobody panicked").clear();
    let ran = assistant.call("comfy_run", json!({"workflow": painting(120)})).await;
    let seen = assistant.watcher.seen.lock().expect("nobody panicked").clone();
    assert!(seen.windows(2).all(|pair| pair[0].progress < pair[1].progress), "{seen:?}");
    let steps = seen.iter().filter(|update| update.total == Some(24.0) && update.progress >= 1.0).count();
    assert!(steps >= 5, "only {steps} of the sampler's steps: {seen:?}");
    assert!(seen.iter().all(|update| update.progress_token == seen[0].progress_token), "{seen:?}");

    let (run, ran) = (ran["prompt_id"].clone(), ran);
    assert_eq!((&ran["state"], &ran["done"]), (&json!("done"), &json!(true)), "{ran}");
    let picture = PathBuf::from(ran["files"][0]["path"].as_str().expect("a picture"));
    assert!(picture.starts_with(story.world().join("outputs")), "{ran}");
    assert!(colours(&picture) > 1000, "{} colours", colours(&picture));
    let queue = assistant.call("comfy_queue", json!({"history": 5})).await;
    assert_eq!((&queue["running"], &queue["pending_total"]), (&json!([]), &json!(0)), "{queue}");
    assert_eq!((&queue["history"][0]["job"], &queue["history"][0]["status"]), (&run, &json!("done")), "{queue}");
    let job = assistant.call("comfy_job", json!({"prompt_id": run})).await;
    assert_eq!(job["files"], ran["files"], "{job}");

    let pods = assistant.call("list_pods", json!({})).await;
    assert_eq!(pods["pods"].as_array().map(Vec::len), Some(1), "{pods}");
    assert_eq!((&pods["pods"][0]["status"], &pods["source"]), (&json!("RUNNING"), &json!("provider")), "{pods}");
    let tunnels = assistant.call("list_tunnels", json!({})).await;
    assert_eq!(tunnels["tunnels"][0]["state"], "healthy", "{tunnels}");
    // An assistant that knows only what the server told it can paint.
    let about = serde_json::to_value(assistant.client.peer_info().expect("a greeting")).expect("JSON");
    let told = about["instructions"].as_str().expect("instructions");
    let (_, workflow) = told.split_once("runs there: ").expect("a workflow for the sandbox");
    let workflow: Value = serde_json::from_str(workflow.trim_end_matches('.')).expect("the workflow is JSON");
    let painted = assistant.until_done("comfy_run", json!({"workflow": workflow})).await;
    assert_eq!(painted["files"].as_array().map(Vec::len), Some(1), "{painted}");

    let ended = assistant.until_done("terminate_pod", json!({"pod": "comfy"})).await;
    assert_eq!((&ended["state"], &ended["still_billing"]), (&json!("gone"), &json!("no")), "{ended}");
    assert_eq!(ended["tunnels_stopped"], 1, "{ended}");
    let pods = assistant.call("list_pods", json!({})).await;
    assert_eq!(pods["pods"], json!([]), "{pods}");
    let tunnels = assistant.call("list_tunnels", json!({})).await;
    assert_eq!(tunnels["tunnels"], json!([]), "{tunnels}");
    let job = assistant.call("comfy_job", json!({"prompt_id": run})).await;
    assert_eq!((&job["files"], &job["still_billing"]), (&ran["files"], &json!("no")), "{job}");
    assert!(colours(&picture) > 1000, "the picture outlives its pod");

    assistant.leave().await;
    story.end().await;
}

fn greeting() -> Value {
    json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}})
}

async fn greeted(story: &Story, arguments: &[&str]) -> Server {
    let mut server = Server::start(story.home.command(arguments));
    server.ask(1, "initialize", greeting()).await;
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    server
}

#[tokio::test]
async fn a_client_that_goes_away_in_the_middle_of_a_run_finds_it_again() {
    let story = Story::begin();
    story.call("create_pod_with_volume", json!({"volume": "comfy-models"})).await.json();
    story.call("start_tunnel", json!({})).await.json();

    let mut server = greeted(&story, &["--sandbox", "serve"]).await;
    let params = json!({
        "name": "comfy_run", "arguments": {"workflow": painting(300)}, "_meta": {"progressToken": "run"}
    });
    server.send(json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params})).await;
    loop {
        let message = server.receive().await;
        assert_eq!(message["method"], "notifications/progress", "{message}");
        assert_eq!(message["params"]["progressToken"], "run", "{message}");
        if message["params"]["total"] == 24.0 {
            break;
        }
    }
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0);

    // The run takes 7 s; that it still runs shows that the server did not stay for it.
    let assistant = Assistant::connect(&story, json!(["--sandbox", "serve"])).await;
    let queue = assistant.call("comfy_queue", json!({})).await;
    let run = queue["running"][0]["job"].clone();
    assert!(run.is_string(), "the run goes on in the pod, and is known as ours: {queue}");
    let now = assistant.call("comfy_job", json!({"prompt_id": run, "wait_seconds": 0})).await;
    assert_eq!(now["done"], false, "{now}");
    let done = assistant.until_done("comfy_job", json!({"prompt_id": run})).await;
    let picture = PathBuf::from(done["files"][0]["path"].as_str().expect("a picture"));
    assert!(colours(&picture) > 1000, "{} colours", colours(&picture));

    assistant.until_done("terminate_pod", json!({"pod": "comfy"})).await;
    assistant.leave().await;
    story.end().await;
}

#[tokio::test]
async fn a_server_whose_sandbox_was_ended_says_so_once_and_goes_on_with_a_fresh_one() {
    let story = Story::begin();
    let mut server = greeted(&story, &["serve", "--sandbox"]).await;
    let create = json!({"name": "create_pod_with_volume", "arguments": {"name": "old", "wait_seconds": 0}});
    let created = server.ask(2, "tools/call", create).await;
    assert_eq!(created["result"]["structuredContent"]["pod"], "old", "{created}");
    let pid = story.sandbox_file()["pid"].as_i64().expect("a process id");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("the sandbox is killed");
    // A dying process loses its command line a moment before its locks.
    until("the sandbox to be dead", async || (!is_held(&story.world().join("locks/sandbox"))).then_some(())).await;

    let listed = server.ask(3, "tools/call", json!({"name": "list_pods", "arguments": {}})).await;
    assert_eq!(listed["result"]["isError"], true, "{listed}");
    let text = listed["result"]["content"][0]["text"].as_str().expect("a text");
    assert!(text.contains("sandbox") && text.contains("ended") && text.contains("call again"), "{text}");
    let listed = server.ask(4, "tools/call", json!({"name": "list_pods", "arguments": {}})).await;
    assert_eq!(listed["result"]["structuredContent"]["pods"], json!([]), "{listed}");
    let records = std::fs::read(story.world().join("pods.json")).expect("the records are there");
    let records: Value = serde_json::from_slice(&records).expect("the records are JSON");
    assert_eq!(records["entries"]["old"]["known"]["phase"], "gone", "{records}");
    assert_eq!(records["entries"]["old"]["known"]["ending_cause"], "world_ended", "{records}");

    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0);
    story.end().await;
}
