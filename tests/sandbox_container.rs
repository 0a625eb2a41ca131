//! The inside of a sandbox pod, from outside: the real `ssh`, real HTTP and WebSocket through its forward.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use autopod_mcp::sandbox::container::{Container, ContainerSpec};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::support::http;
use crate::support::program::PATIENCE;
use crate::support::userns;

mod comfy;
mod files;
mod isolation;
mod ssh;
mod validation;

/// What a tunnel's session runs, which works with and without namespaces: with stdin at its end it ends at once.
const LOGIN: &str = "echo in; exec cat >/dev/null";

/// A container and a folder with the key that may enter it.
struct Pod {
    container: Arc<Container>,
    home: TempDir,
}

/// `ssh -L` to a pod, ended when dropped.
struct Tunnel {
    child: Child,
    url: String,
    http: reqwest::Client,
}

impl Pod {
    /// A container with nothing open yet.
    async fn closed() -> Pod {
        Pod::closed_with(|spec| spec).await
    }

    async fn closed_with(change: impl FnOnce(ContainerSpec) -> ContainerSpec) -> Pod {
        let home = TempDir::new().expect("a temporary folder");
        std::fs::create_dir(home.path().join("ssh")).expect("a folder for keys");
        make_key(&home.path().join("ssh/id_ed25519"));
        let keys = std::fs::read_to_string(home.path().join("ssh/id_ed25519.pub")).expect("the public key");
        let spec = Pod::spec(&home, format!("# not a key\nnonsense\n{keys}"));
        let container = Container::start(change(spec)).await.expect("the container starts");
        Pod { container: Arc::new(container), home }
    }

    /// A container whose SSH server and ComfyUI answer.
    async fn open() -> Pod {
        let pod = Pod::closed().await;
        pod.container.open_ssh().await.expect("sshd");
        pod.container.open_comfy().await.expect("ComfyUI");
        pod
    }

    async fn open_with(change: impl FnOnce(ContainerSpec) -> ContainerSpec) -> Pod {
        let pod = Pod::closed_with(change).await;
        pod.container.open_ssh().await.expect("sshd");
        pod
    }

    fn spec(home: &TempDir, authorized_keys: String) -> ContainerSpec {
        ContainerSpec {
            pod_id: "pod123".into(),
            address: Ipv4Addr::LOCALHOST,
            former_port: None,
            folder: home.path().join("disk"),
            volume: None,
            authorized_keys,
            env: BTreeMap::new(),
            namespaces: true,
            comfyui: None,
            gpu_name: "NVIDIA GeForce RTX 4090".into(),
            vram_gb: 24,
        }
    }

    fn disk(&self) -> PathBuf {
        self.home.path().join("disk").canonicalize().expect("the disk is there")
    }

    /// The client's options that matter to the server, as the product's own tunnel gives them.
    fn ssh_as(&self, user: &str, key: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-T"]);
        for option in [
            "BatchMode=yes",
            "ExitOnForwardFailure=yes",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=3",
            "ConnectTimeout=10",
            "StrictHostKeyChecking=accept-new",
            "UserKnownHostsFile=known_hosts",
            "HostKeyAlias=autopod-pod123-1",
            "UpdateHostKeys=no",
            "ControlMaster=no",
            "ControlPath=none",
            "PermitLocalCommand=no",
            "RemoteCommand=none",
            "StdinNull=no",
            "ForkAfterAuthentication=no",
            "SessionType=default",
            "LogLevel=INFO",
            "IdentitiesOnly=yes",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args(["-i", key]);
        let path = std::env::var_os("PATH").unwrap_or_default();
        ssh.env_clear().env("PATH", path).env("HOME", self.home.path()).env("LANG", "C.UTF-8");
        ssh.current_dir(self.home.path().join("ssh")).kill_on_drop(true);
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let port = self.container.ssh_port().to_string();
        ssh.args(["-p", &port, &format!("{user}@127.0.0.1")]);
        ssh
    }

    fn ssh(&self) -> Command {
        self.ssh_as("root", "id_ed25519")
    }

    /// Runs a command with stdin at its end.
    async fn run(&self, command: &str) -> Output {
        finish(self.ssh().arg(command).stdin(Stdio::null())).await
    }

    async fn tunnel(&self) -> Tunnel {
        self.tunnel_to(8188).await
    }

    async fn tunnel_to(&self, port: u16) -> Tunnel {
        let local = free_port();
        let mut ssh = self.ssh();
        ssh.args(["-L", &format!("127.0.0.1:{local}:127.0.0.1:{port}")]);
        let mut child = ssh.arg("echo AUTOPOD_READY; exec cat >/dev/null").spawn().expect("ssh starts");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("an answer").expect("a line");
        assert_eq!(line.as_deref(), Some("AUTOPOD_READY"));
        Tunnel { child, url: format!("http://127.0.0.1:{local}"), http: http_client() }
    }

    fn events(&self, name: &str) -> Vec<Value> {
        self.container.events().into_iter().filter(|event| event["event"] == name).collect()
    }
}

impl Tunnel {
    async fn get(&self, path: &str) -> reqwest::Response {
        self.http.get(format!("{}{path}", self.url)).send().await.expect("an answer")
    }

    async fn json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), 200, "{path}");
        response.json().await.expect("JSON")
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self.http.post(format!("{}{path}", self.url)).json(&body).send().await.expect("an answer");
        let status = response.status().as_u16();
        let text = response.text().await.expect("a body");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Queues a workflow that must be accepted, and returns its id.
    async fn submit(&self, prompt: Value, client: &str) -> String {
        let (status, answer) = self.post("/prompt", json!({ "prompt": prompt, "client_id": client })).await;
        assert_eq!(status, 200, "{answer}");
        answer["prompt_id"].as_str().expect("an id").to_owned()
    }

    /// Waits for the history of a prompt.
    async fn history(&self, id: &str) -> Value {
        let waiting = async {
            loop {
                let history = self.json(&format!("/history/{id}")).await;
                if let Some(entry) = history.get(id) {
                    return entry.clone();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("the prompt ends")
    }

    async fn socket(&self, client: &str) -> Socket {
        let url = format!("{}/ws?clientId={client}", self.url.replace("http", "ws"));
        let (stream, _) = tokio_tungstenite::connect_async(url).await.expect("a WebSocket");
        Socket { stream, previews: Vec::new() }
    }
}

struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    previews: Vec<Vec<u8>>,
}

impl Socket {
    /// The next text event.
    async fn next(&mut self) -> Value {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.stream.next()).await.expect("an event in time");
            match message.expect("the socket is open").expect("a message") {
                Message::Text(text) => return serde_json::from_str(&text).expect("JSON"),
                Message::Binary(frame) => self.previews.push(frame.to_vec()),
                _ => {}
            }
        }
    }

    /// All events up to the end of the prompt `id`.
    async fn until_end_of(&mut self, id: &str) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            let event = self.next().await;
            let ended = event["type"] == "executing" && event["data"]["node"].is_null();
            let mine = event["data"]["prompt_id"] == id;
            events.push(event);
            if ended && mine {
                return events;
            }
        }
    }

    async fn send(&mut self, message: Value) {
        self.stream.send(Message::text(message.to_string())).await.expect("sent");
    }
}

fn make_key(path: &Path) {
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .status()
        .expect("ssh-keygen runs");
    assert!(made.success());
}

async fn finish(command: &mut Command) -> Output {
    let running = command.output();
    tokio::time::timeout(PATIENCE, running).await.expect("ssh ends in time").expect("ssh runs")
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().map(|address: SocketAddr| address.port()).expect("its number")
}

fn http_client() -> reqwest::Client {
    http::client().timeout(PATIENCE).build().expect("a client")
}

/// A red picture of 64 by 64 pixels.
fn minimal_workflow() -> Value {
    json!({
        "1": { "class_type": "EmptyImage", "inputs": { "width": 64, "height": 64, "batch_size": 1, "color": 0xFF0000 } },
        "2": { "class_type": "SaveImage", "inputs": { "images": ["1", 0], "filename_prefix": "t/autopod" } },
    })
}

fn sampler_workflow(seed: u64, steps: u32, step_ms: u32) -> Value {
    json!({
        "3": {
            "class_type": "SandboxSampler",
            "inputs": { "width": 48, "height": 32, "steps": steps, "seed": seed, "step_ms": step_ms },
        },
        "9": { "class_type": "SaveImage", "inputs": { "images": ["3", 0], "filename_prefix": "painting" } },
    })
}

/// Width, height and RGB bytes.
fn decode(png: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let frame = reader.next_frame(&mut pixels).expect("pixels");
    assert_eq!(frame.color_type, png::ColorType::Rgb);
    (frame.width, frame.height, pixels)
}
