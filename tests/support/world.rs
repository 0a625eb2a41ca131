//! A whole world for tests of tools: a home, a sandbox in this process, and the real keeper as a process of its own,
//! tethered to this one. Tools are called as every face calls them, through the registry.
//!
//! Needs a multi-threaded runtime: dropping a world ends its pods and keeper, and waits for that.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use autopod_mcp::app;
use autopod_mcp::background::{KeeperClient, Launcher};
use autopod_mcp::config::{Config, Home};
use autopod_mcp::sandbox::{self, ClockMode, Sandbox, SandboxOptions};
use autopod_mcp::tools::context::{Progress, ProgressUpdate, Services};
use autopod_mcp::tools::{self, Context, ToolError};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use super::program::{self, PROGRAM};
use super::{http, openapi};

const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// How long the keeper may take to end with its tether.
const FAREWELL: Duration = Duration::from_secs(30);

pub struct World {
    /// `None` only while it is dropped.
    services: Option<Arc<Services>>,
    pub sandbox: Sandbox,
    pub home: Home,
    folder: TempDir,
    http: reqwest::Client,
}

impl World {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let user_home = folder.path().join("user");
        std::fs::create_dir(&user_home).expect("a folder");
        let options = SandboxOptions {
            listen: HERE,
            folder: folder.path().join("sandbox"),
            clock: ClockMode::Live,
            comfyui: None,
            idle_limit: None,
            namespaces: true,
        };
        let sandbox = sandbox::start(options).await.expect("a sandbox");
        let home = Home::open(folder.path().join("home")).expect("a home");
        let launcher = Launcher { program: PROGRAM.into(), environment: environment(&user_home) };
        let key = Some(sandbox.key().to_owned().into());
        let services = app::wire(home.clone(), Ok(Config::default()), key, sandbox.url(), launcher, true);
        let http = http::client().build().expect("a client");
        Self { services: Some(services.expect("services")), sandbox, home, folder, http }
    }

    /// For a call whose process goes on after the answer, as that of a server does; without progress.
    pub fn context(&self) -> Context {
        let services = self.services.clone().expect("a world that lives");
        Context { after_answer: Some(Default::default()), ..Context::new(services) }
    }

    /// With the progress that it tells.
    pub fn context_with_progress(&self) -> (Context, Arc<Mutex<Vec<ProgressUpdate>>>) {
        let told: Arc<Mutex<Vec<ProgressUpdate>>> = Arc::default();
        let sink = Arc::clone(&told);
        let progress = Progress::to(move |update| sink.lock().expect("no panic while told").push(update));
        (Context { progress, ..self.context() }, told)
    }

    pub async fn call(&self, tool: &str, arguments: Value) -> Result<Value, ToolError> {
        Ok(tools::call(&self.context(), tool, arguments).await?.value)
    }

    /// The answer of a call that must work.
    pub async fn ask(&self, tool: &str, arguments: Value) -> Value {
        match self.call(tool, arguments.clone()).await {
            Ok(answer) => answer,
            Err(error) => panic!("{tool} {arguments}: {error}"),
        }
    }

    /// The error of a call that must not work.
    pub async fn refusal(&self, tool: &str, arguments: Value) -> ToolError {
        match self.call(tool, arguments.clone()).await {
            Ok(answer) => panic!("{tool} {arguments} worked: {answer}"),
            Err(error) => error,
        }
    }

    /// Creates the pod `comfy`, waits until its ComfyUI answers, and gives the pod's id. The world's clock leaps over
    /// the seconds in which a pod starts.
    pub async fn ready_pod(&self) -> String {
        let placed = async {
            while self.sandbox_get("pods").await["pods"].as_array().expect("pods").is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let url = format!("{}/_sandbox/clock", self.sandbox.url());
            let leap = self.http.post(url).bearer_auth(self.sandbox.key()).json(&json!({ "advance_seconds": 10 }));
            leap.send().await.and_then(reqwest::Response::error_for_status).expect("a leap");
        };
        let (pod, ()) = tokio::join!(self.ask("create_pod_with_volume", json!({})), placed);
        let status = self.ask("comfy_status", json!({})).await;
        assert_eq!(status["ready"], true, "{status}");
        pod["pod_id"].as_str().expect("an id").to_owned()
    }

    /// One of the sandbox's own pages, such as `pods`.
    pub async fn sandbox_get(&self, page: &str) -> Value {
        let url = format!("{}/_sandbox/{page}", self.sandbox.url());
        let answer = self.http.get(url).bearer_auth(self.sandbox.key()).send().await.expect("an answer");
        answer.json().await.expect("JSON")
    }

    /// What the sandbox itself recorded of a pod, such as each request to its ComfyUI.
    pub async fn events(&self, pod_id: &str) -> Vec<Value> {
        let body = self.sandbox_get("pods").await;
        let mut pods = body["pods"].as_array().expect("pods").iter();
        let pod = pods.find(|pod| pod["id"] == pod_id).expect("the pod");
        pod["events"].as_array().expect("events").clone()
    }

    /// The program itself, as a user of this home starts it.
    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = program::command(arguments);
        command.envs(environment(&self.folder.path().join("user")));
        command.env("AUTOPOD_HOME", self.home.root());
        command.env("RUNPOD_API_KEY", self.sandbox.key()).env("RUNPOD_API_BASE_URL", self.sandbox.url());
        command
    }

    /// A file for the test's use, outside the home.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).expect("a file");
        path
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    async fn end(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        let context = self.context();
        let pods = context.services.fleet.read().unwrap_or_default();
        for (name, _) in pods.into_iter().filter(|(_, record)| record.is_open()) {
            if let Err(error) = tools::call(&context, "terminate_pod", json!({ "pod": name })).await {
                wrong.push(format!("a pod is left: {error}"));
            }
        }
        let timing = context.services.timing.clone();
        drop(context);
        // With the last of them goes the keeper's tether.
        self.services = None;
        let keeper = KeeperClient::new(&self.home, &timing, None, None, self.sandbox.url(), false);
        let started = Instant::now();
        while keeper.is_alive() {
            if started.elapsed() > FAREWELL {
                wrong.push("the keeper is left".to_owned());
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if let Some(spec) = openapi::spec() {
            wrong.extend(openapi::check_log(&spec, &self.sandbox.requests()));
        }
        wrong
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let wrong = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(self.end()));
        if !wrong.is_empty() && !std::thread::panicking() {
            panic!("{}", wrong.join("\n"));
        }
    }
}

/// What children may see of this process's environment.
fn environment(user_home: &Path) -> Vec<(String, OsString)> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    vec![("PATH".to_owned(), path), ("HOME".to_owned(), user_home.into())]
}
