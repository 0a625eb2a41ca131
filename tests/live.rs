//! What only a live account can show. Not part of `cargo test`, and never run by itself:
//!
//! ```sh
//! RUNPOD_API_KEY=... cargo test --test live -- --ignored reads     # costs nothing
//! RUNPOD_API_KEY=... cargo test --test live -- --ignored spends    # two cheap pods, below $1
//! ```
//!
//! It uses a home of its own in a temporary folder. `RUNPOD_API_BASE_URL` may point it to a sandbox
//! (`autopod-mcp sandbox`), by which the test itself is tried; `AUTOPOD_LIVE_MINUTES` is then better a small lifetime.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::Command;

const MOST_PRICE: f64 = 0.5;
/// An image may have to be pulled.
const PATIENCE: Duration = Duration::from_secs(35 * 60);
/// After its deadline a pod has to be gone within this: the switch looks every 30 s, and the provider takes its time.
const GONE_WITHIN: Duration = Duration::from_secs(5 * 60);

struct Live {
    home: PathBuf,
    _folder: tempfile::TempDir,
}

impl Live {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self { home: folder.path().join("home"), _folder: folder }
    }

    async fn call(&self, tool: &str, arguments: Value) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_autopod-mcp"));
        command.args(["call", tool, &arguments.to_string()]).env("AUTOPOD_HOME", &self.home).stdin(Stdio::null());
        let output = command.output().await.expect("the program");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{tool} {arguments}: {stderr}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Repeats the call until its answer says that it is done.
    async fn until_done(&self, tool: &str, arguments: Value) -> Value {
        let started = Instant::now();
        loop {
            let answer = self.call(tool, arguments.clone()).await;
            if answer["done"] == true {
                return answer;
            }
            assert!(started.elapsed() < PATIENCE, "{tool} is not done: {answer}");
        }
    }

    async fn pod(&self, name: &str, lifetime_minutes: u32) -> Value {
        let wish = json!({
            "name": name, "max_price_per_hour": MOST_PRICE, "lifetime_minutes": lifetime_minutes, "wait_seconds": 45,
        });
        self.until_done("create_pod_with_volume", wish).await;
        self.until_done("get_pod", json!({ "pod": name, "wait_for": "ssh", "wait_seconds": 45 })).await
    }

    async fn ids(&self) -> Vec<Value> {
        let listed = self.call("list_pods", json!({})).await;
        listed["pods"].as_array().expect("pods").iter().map(|pod| pod["pod_id"].clone()).collect()
    }

    /// Guard and worker of this home, as `kill -9` finds them.
    fn kill_keeper(&self) {
        for _ in 0..50 {
            for pid in keepers(&self.home) {
                let _ = kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(keepers(&self.home).is_empty(), "a keeper is left");
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        for pid in keepers(&self.home) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

fn keepers(home: &Path) -> Vec<Pid> {
    let folders = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    folders
        .filter_map(|folder| {
            let pid = Pid::from_raw(folder.file_name().to_str()?.parse().ok()?)?;
            let line = std::fs::read(folder.path().join("cmdline")).ok()?;
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let is_ours = words.contains(&b"keeper".as_slice()) && words.contains(&home.as_os_str().as_encoded_bytes());
            is_ours.then_some(pid)
        })
        .collect()
}

#[tokio::test]
#[ignore = "needs an account"]
async fn reads_what_there_is() {
    let live = Live::new();
    let gpus = live.call("list_gpus", json!({ "min_vram_gb": 16 })).await;
    assert!(gpus["gpus"].as_array().is_some_and(|gpus| !gpus.is_empty()), "{gpus}");
    live.call("list_volumes", json!({})).await;
    live.call("list_pods", json!({})).await;
    live.call("spending", json!({})).await;
    let planned = live.call("create_pod_with_volume", json!({ "name": "live", "dry_run": true })).await;
    assert!(planned["candidates"].as_array().is_some_and(|candidates| !candidates.is_empty()), "{planned}");
}

/// Create, SSH, tunnel, ComfyUI, stop, start, proof of the end; and the pod that the keeper is dead for ends itself.
#[tokio::test]
#[ignore = "needs an account, and spends its money"]
async fn spends_on_a_pod_that_ends_also_without_its_keeper() {
    let live = Live::new();
    let pod = live.pod("live-story", 60).await;
    assert!(pod["switch"].as_str().is_some_and(|switch| switch.starts_with("armed until")), "{pod}");
    live.until_done("get_pod", json!({ "pod": "live-story", "wait_for": "comfy", "wait_seconds": 45 })).await;
    for action in ["stop", "start"] {
        live.until_done("control_pod", json!({ "pod": "live-story", "action": action, "wait_seconds": 45 })).await;
    }
    live.until_done("terminate_pod", json!({ "pod": "live-story", "wait_seconds": 45 })).await;
    assert!(!live.ids().await.contains(&pod["pod_id"]));

    // The lifetime has to cover the pulling of the image.
    let minutes = std::env::var("AUTOPOD_LIVE_MINUTES").map_or(40, |text| text.parse().expect("minutes"));
    let pod = live.pod("live-switch", minutes).await;
    assert!(pod["switch"].as_str().is_some_and(|switch| switch.starts_with("armed until")), "{pod}");
    let expires_at: jiff::Timestamp = pod["expires_at"].as_str().expect("a deadline").parse().expect("a time");
    live.kill_keeper();
    // Whoever lists with this home starts a keeper, which would end the pod, too; so another home looks.
    let other = Live::new();
    let given_up_at = expires_at + jiff::SignedDuration::try_from(GONE_WITHIN).expect("minutes");
    while other.ids().await.contains(&pod["pod_id"]) {
        assert!(jiff::Timestamp::now() < given_up_at, "its own switch did not end it");
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    assert!(jiff::Timestamp::now() >= expires_at, "it ended before its deadline");
}
