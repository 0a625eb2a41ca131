//! A home with a sandbox beside it, worked by real processes: every `call` is the program itself, and so is the keeper
//! that it starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use autopod_mcp::background::{KeeperClient, Launcher};
use autopod_mcp::config::{Home, Limits};
use autopod_mcp::fleet::{Candidate, Fleet, PodRecord, PodRequest, new_intent};
use autopod_mcp::provider::Cloud;
use autopod_mcp::sandbox::{self, ClockMode, Sandbox, SandboxOptions};
use autopod_mcp::state;
use autopod_mcp::timing::Timing;
use autopod_mcp::tunnel::Tunnels;
use jiff::SignedDuration;
use rustix::process::{Pid, Signal};
use secrecy::SecretString;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::task::JoinHandle;

use crate::support::program::PROGRAM;
use crate::support::{self, openapi};

pub use crate::support::program::{PATIENCE, until};

pub const GPU: &str = "NVIDIA RTX A4000";

/// What one `autopod-mcp call` came to.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub value: Value,
    pub stderr: String,
}

impl Answer {
    /// The error must speak of it.
    pub fn assert_says(&self, text: &str) {
        assert!(self.stderr.contains(text), "`{text}` is missing in: {self:?}");
    }
}

pub struct House {
    pub sandbox: Sandbox,
    pub home: PathBuf,
    pub http: reqwest::Client,
    /// What the calls see beside the key, the home and the sandbox's address.
    pub path: String,
    /// False once the test sent something improper to the sandbox itself.
    pub polite: bool,
    folder: Arc<TempDir>,
    hurry: Option<JoinHandle<()>>,
}

pub fn http() -> reqwest::Client {
    // An idle connection through a tunnel would keep its ssh from ending.
    support::http::client().pool_max_idle_per_host(0).build().expect("a client")
}

/// A count that is to be read, past the test harness.
pub fn tell(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}

pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("a process id");
    // One that has just ended by itself is no failure.
    let _ = rustix::process::kill_process(pid, signal);
}

impl House {
    pub async fn new() -> Self {
        Self::with(ClockMode::Live, "home").await
    }

    pub async fn with(clock: ClockMode, name: &str) -> Self {
        Self::of(name, |options| options.clock = clock).await
    }

    /// A home of that name beside a world that is set up otherwise.
    pub async fn of(name: &str, change: impl FnOnce(&mut SandboxOptions)) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut options = SandboxOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            folder: folder.path().join("world"),
            clock: ClockMode::Live,
            comfyui: None,
            idle_limit: None,
            namespaces: true,
        };
        change(&mut options);
        let http = http();
        let sandbox = sandbox::start(options).await.expect("a sandbox");
        Self {
            sandbox,
            home: folder.path().join(name),
            http,
            path: std::env::var("PATH").unwrap_or_default(),
            polite: true,
            folder: Arc::new(folder),
            hurry: None,
        }
    }

    /// A world whose clock runs about twenty times as fast, so that its pods are up at once.
    pub async fn hurried() -> Self {
        let mut house = Self::new().await;
        let (http, url) = (house.http.clone(), format!("{}/_sandbox/clock", house.sandbox.url()));
        house.hurry = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let _ = http.post(&url).json(&json!({ "advance_seconds": 1 })).send().await;
            }
        }));
        house
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn home(&self) -> Home {
        Home::open(self.home.clone()).expect("a home")
    }

    pub fn fleet(&self) -> Fleet {
        Fleet::new(&self.home(), &Timing::quick())
    }

    pub fn tunnels(&self) -> Tunnels {
        Tunnels::new(&self.home(), &Timing::quick())
    }

    pub fn environment(&self) -> Vec<(String, std::ffi::OsString)> {
        vec![("PATH".into(), self.path.clone().into()), ("HOME".into(), self.folder().as_os_str().to_owned())]
    }

    pub fn launcher(&self) -> Launcher {
        Launcher { program: PROGRAM.into(), environment: self.environment() }
    }

    pub fn keeper(&self) -> KeeperClient {
        self.keeper_with(self.sandbox.key())
    }

    pub fn keeper_with(&self, key: &str) -> KeeperClient {
        let key = Some(SecretString::from(key.to_owned()));
        KeeperClient::new(&self.home(), &Timing::quick(), Some(self.launcher()), key, &self.origin(), false)
    }

    pub fn origin(&self) -> String {
        self.sandbox.url().parse::<autopod_mcp::runpod::ApiOrigin>().expect("an origin").to_string()
    }

    pub fn program(&self, arguments: &[&str]) -> Command {
        let mut command = support::program::command(arguments);
        command
            .envs(self.environment())
            .env("AUTOPOD_HOME", &self.home)
            .env("RUNPOD_API_KEY", self.sandbox.key())
            .env("RUNPOD_API_BASE_URL", self.sandbox.url());
        command
    }

    pub fn command(&self, tool: &str, arguments: &Value) -> Command {
        self.program(&["call", tool, &arguments.to_string()])
    }

    pub async fn call(&self, tool: &str, arguments: Value) -> Answer {
        answer(self.command(tool, &arguments)).await
    }

    /// A call that has to succeed.
    pub async fn ok(&self, tool: &str, arguments: Value) -> Value {
        let answer = self.call(tool, arguments.clone()).await;
        assert_eq!(answer.code, 0, "{tool} {arguments}: {answer:?}\n{}", self.keeper_log());
        answer.value
    }

    /// A pod by the tool, which has an id when this returns.
    pub async fn create(&self, name: &str) -> String {
        let made = self.ok("create_pod_with_volume", json!({ "name": name, "wait_seconds": 45 })).await;
        made["pod_id"].as_str().unwrap_or_else(|| panic!("no id: {made}")).to_owned()
    }

    /// A healthy tunnel on some free port of this machine.
    pub async fn tunnel(&self, pod: &str) -> u16 {
        let open = self.ok("start_tunnel", json!({ "pod": pod, "local_port": 0, "wait_seconds": 45 })).await;
        assert_eq!(open["done"], true, "{open}");
        u16::try_from(open["local_port"].as_u64().expect("a port")).expect("a port")
    }

    /// A wish as the create tool writes it, with a lifetime that no argument could ask for.
    pub fn wish(&self, lifetime: SignedDuration) -> PodRecord {
        let request = PodRequest {
            image: "runpod/comfyui:latest".to_owned(),
            template: None,
            registry: None,
            gpus: Vec::new(),
            min_vram_gb: 16,
            gpu_count: 1,
            min_cuda: None,
            cloud: Cloud::Secure,
            data_centers: Vec::new(),
            disk_gb: 40,
            volume: None,
            volume_name: None,
            ports: vec!["22/tcp".to_owned()],
            env: BTreeMap::new(),
        };
        let candidates = vec![Candidate { gpu: GPU.to_owned(), price_per_hour: 0.25 }];
        let mut wish = PodRecord::new(new_intent(), request, candidates, lifetime);
        wish.wanted.max_price_per_hour = Some(Limits::default().max_price_per_hour);
        wish
    }

    /// A request to the sandbox; its answer.
    pub async fn raw(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request =
            self.http.request(method, format!("{}{path}", self.sandbox.url())).bearer_auth(self.sandbox.key());
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.timeout(PATIENCE).send().await.expect("an answer of the sandbox");
        let status = response.status().as_u16();
        (status, serde_json::from_slice(&response.bytes().await.expect("a whole body")).unwrap_or_default())
    }

    pub async fn fault(&self, fault: Value) {
        let (status, body) = self.raw(reqwest::Method::POST, "/_sandbox/faults", Some(fault)).await;
        assert_eq!(status, 200, "{body}");
    }

    pub async fn advance(&self, seconds: f64) {
        let (status, body) =
            self.raw(reqwest::Method::POST, "/_sandbox/clock", Some(json!({ "advance_seconds": seconds }))).await;
        assert_eq!(status, 200, "{body}");
    }

    /// The world's time.
    pub async fn world_now(&self) -> jiff::Timestamp {
        let (_, body) = self.raw(reqwest::Method::GET, "/_sandbox/clock", None).await;
        body["now"].as_str().and_then(|now| now.parse().ok()).expect("a time")
    }

    /// What the world knows of its pods, whatever it tells its clients.
    pub async fn world_pods(&self) -> Vec<Value> {
        let (_, body) = self.raw(reqwest::Method::GET, "/_sandbox/pods", None).await;
        body["pods"].as_array().expect("pods").clone()
    }

    pub async fn alive(&self) -> Vec<Value> {
        let mut pods = self.world_pods().await;
        pods.retain(|pod| pod["ended_at"].is_null());
        pods
    }

    pub async fn until_none_alive(&self, what: &str) {
        until(what, async || self.alive().await.is_empty().then_some(())).await;
    }

    /// How often an operation was asked for.
    pub fn asked(&self, operation: &str) -> usize {
        self.sandbox.requests().iter().filter(|entry| entry["operation"] == operation).count()
    }

    /// The worker of this home's keeper, as it wrote itself into its lock.
    pub fn worker(&self) -> Option<u32> {
        let lock = self.home.join("locks/keeper");
        state::holder(&lock).filter(|_| state::is_held(&lock))
    }

    pub async fn until_worker(&self) -> u32 {
        until("a keeper", async || self.worker()).await
    }

    /// Processes of this home: guards, workers, ssh children.
    pub fn processes(&self) -> Processes {
        let mut found = Processes::default();
        let Ok(folders) = std::fs::read_dir("/proc") else { return found };
        for folder in folders.flatten() {
            let Some(pid) = folder.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Ok(line) = std::fs::read(folder.path().join("cmdline")) else { continue };
            let words: Vec<_> = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word)).collect();
            let ours = words.iter().any(|word| Path::new(word.as_ref()) == self.home);
            let says = |text: &str| words.iter().any(|word| word == text);
            if ours && says("keeper") {
                if says("--worker") { found.workers.push(pid) } else { found.guards.push(pid) }
            } else if words.iter().any(|word| word.starts_with("HostKeyAlias=autopod-"))
                && std::fs::read_link(folder.path().join("cwd")).is_ok_and(|cwd| cwd == self.home.join("ssh"))
            {
                if says("-L") { found.ssh.push(pid) } else { found.commands.push(pid) }
            }
        }
        found
    }

    pub fn keeper_log(&self) -> String {
        std::fs::read_to_string(self.home.join("logs/keeper.log")).unwrap_or_default()
    }

    /// What the tunnel's far end answers to `/system_stats`, if it does.
    pub async fn stats_through(&self, port: u16) -> Option<Value> {
        let url = format!("http://127.0.0.1:{port}/system_stats");
        let answer = self.http.get(url).timeout(Duration::from_secs(5)).send().await.ok()?;
        answer.json::<Value>().await.ok().filter(|stats| stats["devices"].is_array())
    }

    pub fn end_processes(&self) {
        // A guard that lives would start its worker again, so guards first, until nothing is found.
        for _ in 0..200 {
            let found = self.processes();
            if found.is_empty() {
                return;
            }
            for pid in found.guards.into_iter().chain(found.workers).chain(found.ssh).chain(found.commands) {
                kill(pid);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends everything of this home, proves it, and holds what was asked of the sandbox against RunPod's API.
    pub async fn end(self) {
        self.end_processes();
        let left = self.processes();
        assert!(left.is_empty(), "left: {left:?}");
        if let Some(spec) = openapi::spec() {
            let mut violations = openapi::check_log(&spec, &self.sandbox.requests());
            violations.retain(|violation| self.polite || violation.starts_with("answer"));
            assert!(violations.is_empty(), "{}", violations.join("\n"));
        }
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if std::thread::panicking() {
            use std::io::Write;
            let log = self.keeper_log();
            let tail: Vec<_> = log.lines().rev().take(30).collect();
            for line in tail.into_iter().rev() {
                let _ = writeln!(std::io::stderr(), "keeper: {line}");
            }
            for name in ["pods.json", "tunnels.json"] {
                let bytes = std::fs::read(self.home.join(name)).unwrap_or_default();
                let records: Value = serde_json::from_slice(&bytes).unwrap_or_default();
                for (entry, record) in records["entries"].as_object().into_iter().flatten() {
                    let _ = writeln!(std::io::stderr(), "{name}: {entry}: {}", record["known"]);
                }
            }
        }
        if let Some(hurry) = &self.hurry {
            hurry.abort();
        }
        self.end_processes();
    }
}

#[derive(Debug, Default)]
pub struct Processes {
    pub guards: Vec<u32>,
    pub workers: Vec<u32>,
    /// Those that hold a tunnel.
    pub ssh: Vec<u32>,
    /// Those that run a command in a pod.
    pub commands: Vec<u32>,
}

impl Processes {
    pub fn is_empty(&self) -> bool {
        let Self { guards, workers, ssh, commands } = self;
        guards.is_empty() && workers.is_empty() && ssh.is_empty() && commands.is_empty()
    }
}

pub async fn answer(mut command: Command) -> Answer {
    let output = tokio::time::timeout(Duration::from_secs(90), command.output())
        .await
        .expect("every call is bounded")
        .expect("the program");
    Answer {
        code: output.status.code().unwrap_or(-1),
        value: serde_json::from_slice(&output.stdout).unwrap_or_default(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
