//! The API key stays where it was given: it shows up in no output, no log however detailed, no file of the home, and
//! no command line or environment of a child. The sandbox's key is random, so wherever it is found it was leaked.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use autopod_mcp::state;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::support::world::World;

const PATIENCE: Duration = Duration::from_secs(120);

struct Canary<'a> {
    world: &'a World,
    key: String,
}

impl Canary<'_> {
    async fn run(&self, arguments: &[&str]) -> String {
        self.run_logged(arguments).await.0
    }

    /// Runs the program with the most detailed log, and its output holds no secret: stdout and stderr.
    async fn run_logged(&self, arguments: &[&str]) -> (String, String) {
        let mut command = self.world.program(arguments);
        command.env("AUTOPOD_LOG", "trace");
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {stdout}\n{stderr}");
        self.assert_not_in("stdout", stdout.as_bytes());
        self.assert_not_in("stderr", stderr.as_bytes());
        (stdout, stderr)
    }

    async fn call(&self, tool: &str, arguments: Value) -> Value {
        let told = self.run(&["call", tool, &arguments.to_string()]).await;
        serde_json::from_str(&told).expect("JSON")
    }

    fn assert_not_in(&self, place: &str, bytes: &[u8]) {
        let key = self.key.as_bytes();
        assert!(!bytes.windows(key.len()).any(|part| part == key), "the key is in {place}");
    }

    /// Every file below, read whole; returns how many there were.
    fn assert_not_below(&self, folder: &Path) -> usize {
        let mut files = 0;
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            let kind = entry.file_type().expect("a kind");
            if kind.is_dir() {
                files += self.assert_not_below(&path);
            } else if kind.is_file() && path.file_name().is_some_and(|name| name != "config.json") {
                self.assert_not_in(&path.display().to_string(), &std::fs::read(&path).expect("a file"));
                files += 1;
            }
        }
        files
    }

    /// Nothing that runs on this machine carries it.
    fn assert_in_no_process(&self) {
        for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
            for part in ["cmdline", "environ"] {
                let path = entry.path().join(part);
                if let Ok(bytes) = std::fs::read(&path) {
                    self.assert_not_in(&path.display().to_string(), &bytes);
                }
            }
        }
    }
}

/// A keeper with the most detailed log; those that the program starts itself log warnings only.
async fn talkative_keeper(world: &World, log: &Path) -> Child {
    let mut command: Command = world.program(&["keeper", "--worker", world.home.root().to_str().expect("text")]);
    command.env_remove("RUNPOD_API_KEY").env("AUTOPOD_LOG", "trace");
    command.stdin(Stdio::piped()).stderr(std::fs::File::create(log).expect("a log"));
    let mut keeper = command.spawn().expect("it starts");
    let seed = json!({ "key": world.sandbox.key(), "origin": world.sandbox.url(), "tethered": true });
    let stdin = keeper.stdin.as_mut().expect("a pipe");
    stdin.write_all(format!("{seed}\n").as_bytes()).await.expect("it reads");
    while !state::is_held(&world.home.lock("keeper")) {
        assert!(keeper.try_wait().expect("its state").is_none(), "the keeper ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    keeper
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_found_nowhere_but_where_it_was_given() {
    let world = World::new().await;
    let canary = Canary { world: &world, key: world.sandbox.key().to_owned() };
    let log = world.folder().join("keeper.trace");
    let mut keeper = talkative_keeper(&world, &log).await;
    let (_, listed) = canary.run_logged(&["gpu", "list"]).await;
    assert!(listed.contains("TRACE"), "the log is not detailed: {listed}");
    let created = canary.call("create_pod_with_volume", json!({ "volume": "comfy-models" })).await;
    assert_eq!(created["done"], true, "{created}");
    let tunnel = canary.call("start_tunnel", json!({})).await;
    assert_eq!(tunnel["done"], true, "{tunnel}");
    let workflow = json!({
        "1": { "class_type": "EmptyImage", "inputs": { "width": 8, "height": 8, "batch_size": 1, "color": 7 } },
        "2": { "class_type": "SaveImage", "inputs": { "images": ["1", 0], "filename_prefix": "canary" } },
    });
    let ran = canary.call("comfy_run", json!({ "workflow": workflow })).await;
    assert_eq!(ran["done"], true, "{ran}");
    // Now the keeper and its ssh live, and no process that was given the key in its environment.
    canary.assert_in_no_process();
    for row in [&["pod", "list"][..], &["tunnel", "list"], &["comfy", "status"], &["volume", "list"]] {
        canary.run(row).await;
    }
    let ended = canary.call("terminate_pod", json!({ "pod": "comfy" })).await;
    assert_eq!(ended["done"], true, "{ended}");
    assert!(canary.assert_not_below(world.home.root()) >= 8, "the home has hardly a file");
    drop(keeper.stdin.take());
    tokio::time::timeout(PATIENCE, keeper.wait()).await.expect("it ends with its tether").expect("its status");
    let told = std::fs::read(&log).expect("its log");
    assert!(String::from_utf8_lossy(&told).contains("TRACE"), "the keeper's log is not detailed");
    canary.assert_not_in("the keeper's log", &told);
}
