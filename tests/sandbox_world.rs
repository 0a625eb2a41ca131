//! The sandbox's world over real HTTP: RunPod's API, strictness, faults, the life of pods and their cost.

mod catalog;
mod contract;
mod faults;
mod inside;
mod life;
mod mishaps;
mod strictness;
mod templates;

use std::net::SocketAddr;
use std::time::Duration;

use autopod_mcp::sandbox::{self, ClockMode, Sandbox, SandboxOptions};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{http, openapi};

pub const GPU: &str = "NVIDIA RTX A4000";
pub const HERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// A sandbox with a client.
pub struct Tested {
    pub sandbox: Sandbox,
    pub client: Client,
    pub folder: TempDir,
}

pub fn options(folder: &TempDir, clock: ClockMode) -> SandboxOptions {
    SandboxOptions {
        listen: HERE,
        folder: folder.path().join("sandbox"),
        clock,
        comfyui: None,
        idle_limit: None,
        namespaces: true,
    }
}

pub fn client() -> Client {
    http::client().build().expect("a client")
}

impl Tested {
    pub async fn new() -> Self {
        Self::with_clock(ClockMode::Manual).await
    }

    pub async fn with_clock(clock: ClockMode) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sandbox = sandbox::start(options(&folder, clock)).await.expect("a sandbox");
        Self { sandbox, client: client(), folder }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{path}", self.sandbox.url()))
            .bearer_auth(self.sandbox.key())
            .timeout(Duration::from_secs(20))
    }

    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        answer(request.send().await.expect("an answer")).await
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.call(Method::GET, path, None).await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::POST, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> u16 {
        self.call(Method::DELETE, path, None).await.0
    }

    pub async fn advance(&self, seconds: f64) {
        let (status, _) = self.post("/_sandbox/clock", json!({ "advance_seconds": seconds })).await;
        assert_eq!(status, 200);
    }

    pub async fn fault(&self, fault: Value) {
        let (status, body) = self.post("/_sandbox/faults", fault).await;
        assert_eq!(status, 200, "{body}");
    }

    /// Creates a pod and gives its id.
    pub async fn create(&self, name: &str) -> String {
        let (status, pod) = self.post("/v2/pods", pod_body(name)).await;
        assert_eq!(status, 201, "{pod}");
        pod["id"].as_str().expect("an id").to_owned()
    }

    pub async fn pod(&self, id: &str) -> Value {
        let (status, pod) = self.get(&format!("/v2/pods/{id}")).await;
        assert_eq!(status, 200, "{pod}");
        pod
    }

    pub async fn act(&self, id: &str, action: &str) -> (u16, Value) {
        self.post(&format!("/v2/pods/{id}/action"), json!({ "action": action })).await
    }

    pub async fn list(&self) -> Vec<Value> {
        let (status, body) = self.get("/v2/pods").await;
        assert_eq!(status, 200, "{body}");
        body["pods"].as_array().expect("pods").clone()
    }

    /// What the world itself knows about its pods.
    pub async fn inner_pod(&self, id: &str) -> Value {
        let (_, body) = self.get("/_sandbox/pods").await;
        let pods = body["pods"].as_array().expect("pods").clone();
        pods.into_iter().find(|pod| pod["id"] == id).expect("a pod that once was")
    }

    pub async fn log(&self) -> Vec<Value> {
        let (_, body) = self.get("/_sandbox/requests").await;
        body["requests"].as_array().expect("requests").clone()
    }

    /// Ends a sandbox that was only asked properly; requests and answers kept to the API.
    pub async fn finish(self) {
        self.finish_with(|_| true).await;
    }

    /// Ends a sandbox that was asked improperly on purpose; its answers kept to the API.
    pub async fn finish_rude(self) {
        self.finish_with(|violation| violation.starts_with("answer")).await;
    }

    async fn finish_with(self, counts: impl Fn(&str) -> bool) {
        if let Some(spec) = openapi::spec() {
            let mut violations = openapi::check_log(&spec, &self.sandbox.requests());
            violations.retain(|violation| counts(violation));
            assert!(violations.is_empty(), "{}", violations.join("\n"));
        }
        self.sandbox.stop().await;
    }
}

pub async fn answer(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.expect("a whole body");
    (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap_or(Value::String(text)) })
}

/// A proper create.
pub fn pod_body(name: &str) -> Value {
    json!({
        "name": name,
        "image": "runpod/comfyui:latest",
        "gpu": { "id": GPU, "count": 1 },
        "cloud": "SECURE",
        "disk": 40,
        "ports": ["22/tcp", "8188/http"],
        "env": { "PUBLIC_KEY": "ssh-ed25519 AAAA test" },
        "startSsh": true,
    })
}
