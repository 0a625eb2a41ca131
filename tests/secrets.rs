//! Secrets stay where they were given: the API key shows up in no output, no log however detailed, no file of the home,
//! and no command line or environment of a child; the values of a pod's environment in none of them either once its create
//! is settled. They are random, so wherever they are found they were leaked.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use autopod_mcp::fleet::Phase;
use autopod_mcp::state;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use crate::keeper_support::{House, until};
use crate::support::userns;
use crate::support::world::World;

const PATIENCE: Duration = Duration::from_secs(120);

struct Canary<'a> {
    world: &'a World,
    key: String,
    /// A value of the environment that the pod is to have.
    env_value: String,
    /// The key that the provider puts into the pod, once there is one.
    scoped_key: String,
}

impl Canary<'_> {
    async fn run(&self, arguments: &[&str]) -> String {
        self.run_logged(arguments).await.0
    }

    /// Runs the program with the most detailed log, and its output holds no secret: stdout and stderr.
    async fn run_logged(&self, arguments: &[&str]) -> (String, String) {
        let (success, stdout, stderr) = self.said(arguments).await;
        assert!(success, "{arguments:?}: {stdout}\n{stderr}");
        (stdout, stderr)
    }

    async fn said(&self, arguments: &[&str]) -> (bool, String, String) {
        let mut command = self.world.program(arguments);
        command.env("AUTOPOD_LOG", "trace");
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").expect("it starts");
        self.assert_not_in(&format!("stdout of {}", arguments[0]), &output.stdout);
        self.assert_not_in(&format!("stderr of {}", arguments[0]), &output.stderr);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    }

    async fn call(&self, tool: &str, arguments: Value) -> Value {
        let told = self.run(&["call", tool, &arguments.to_string()]).await;
        serde_json::from_str(&told).expect("JSON")
    }

    fn assert_not_in(&self, place: &str, bytes: &[u8]) {
        for secret in [&self.key, &self.env_value, &self.scoped_key] {
            assert!(secret.is_empty() || !holds(bytes, secret), "a secret is in {place}");
        }
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

    /// Nothing that runs on this machine carries the key, the pod's own processes included. What was to be in a pod's
    /// environment is there and nowhere else.
    fn assert_in_no_process(&self) {
        for_each_process(|path, command, environment| {
            for (part, bytes) in [("cmdline", command), ("environ", environment)] {
                let place = format!("{part} of {}: {}", path.display(), String::from_utf8_lossy(command));
                assert!(!holds(bytes, &self.key), "the key is in the {place}");
                let is_ours = holds(command, "autopod-mcp") || command.starts_with(b"ssh");
                assert!(part == "environ" && !is_ours || !holds(bytes, &self.env_value), "a value is in the {place}");
            }
        });
    }
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|part| part == secret.as_bytes())
}

fn for_each_process(mut look: impl FnMut(&Path, &[u8], &[u8])) {
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let read = |part: &str| std::fs::read(entry.path().join(part));
        if let (Ok(command), Ok(environment)) = (read("cmdline"), read("environ")) {
            look(&entry.path(), &command, &environment);
        }
    }
}

/// Watches for children that live for a moment only, until it is told to end; how many it saw. Those that the test itself
/// gives the key to are none of them.
fn watch_children(key: &str) -> (Arc<AtomicBool>, JoinHandle<usize>) {
    let (key, stop) = (key.to_owned(), Arc::new(AtomicBool::new(false)));
    let watched = {
        let stop = stop.clone();
        std::thread::spawn(move || {
            let mut seen = HashSet::new();
            while !stop.load(Ordering::Relaxed) {
                for_each_process(|path, command, environment| {
                    let is_child = ["ssh", "sh", "sleep", "unshare", "curl", "wget"].iter().any(|name| {
                        command.split(|byte| *byte == 0).next().is_some_and(|word| word.ends_with(name.as_bytes()))
                    });
                    if is_child {
                        assert!(!holds(command, &key) && !holds(environment, &key), "the key is in {}", path.display());
                        seen.insert(path.to_owned());
                    }
                });
                std::thread::sleep(Duration::from_millis(5));
            }
            seen.len()
        })
    };
    (stop, watched)
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

/// The pod's own switch runs in it, with the key that the provider put there.
async fn until_armed(world: &World) {
    if !userns::are_allowed() {
        return;
    }
    let fleet = world.context().services.fleet.clone();
    let started = Instant::now();
    while fleet.get("comfy").expect("records").and_then(|record| record.known.inside.switch_until).is_none() {
        assert!(started.elapsed() < PATIENCE, "the switch was not armed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_found_nowhere_but_where_they_were_given() {
    let world = World::new().await;
    let random = || uuid::Uuid::new_v4().simple().to_string();
    let mut canary = Canary {
        world: &world,
        key: world.sandbox.key().to_owned(),
        env_value: format!("canary-{}", random()),
        scoped_key: String::new(),
    };
    let (stop, watched) = watch_children(&canary.key);
    let log = world.folder().join("keeper.trace");
    let mut keeper = talkative_keeper(&world, &log).await;
    let (_, listed) = canary.run_logged(&["gpu", "list"]).await;
    assert!(listed.contains("TRACE"), "the log is not detailed: {listed}");
    let wanted = json!({ "volume": "comfy-models", "env": { "TOKEN": canary.env_value } });
    let created = canary.call("create_pod_with_volume", wanted).await;
    assert_eq!(created["done"], true, "{created}");
    canary.scoped_key = world.sandbox_get("pods").await["pods"][0]["scoped_key"].as_str().expect("a key").to_owned();
    let other = json!({ "volume": "comfy-models", "env": { "TOKEN": format!("{}!", canary.env_value) } });
    let (success, _, told) = canary.said(&["call", "create_pod_with_volume", &other.to_string()]).await;
    assert!(!success && told.contains("another value of TOKEN"), "{told}");
    let tunnel = canary.call("start_tunnel", json!({})).await;
    assert_eq!(tunnel["done"], true, "{tunnel}");
    let workflow = json!({
        "1": { "class_type": "EmptyImage", "inputs": { "width": 8, "height": 8, "batch_size": 1, "color": 7 } },
        "2": { "class_type": "SaveImage", "inputs": { "images": ["1", 0], "filename_prefix": "canary" } },
    });
    let ran = canary.call("comfy_run", json!({ "workflow": workflow })).await;
    assert_eq!(ran["done"], true, "{ran}");
    until_armed(&world).await;
    if userns::are_allowed() {
        let names = canary
            .run(&["pod", "exec", "comfy", "--", "sh", "-c", "tr '\\0' '\\n' </proc/1/environ | cut -d= -f1"])
            .await;
        assert!(names.contains("RUNPOD_API_KEY") && names.contains("TOKEN"), "{names}");
    }
    // Now the keeper, its ssh and the pod's switch live, and no process that was given the key in its environment.
    canary.assert_in_no_process();
    for row in ROWS_OF_A_LIVING_POD {
        canary.run(row).await;
    }
    // It may find something to mend in this home; what counts is what it prints.
    canary.said(&["doctor"]).await;
    let ended = canary.call("terminate_pod", json!({ "pod": "comfy" })).await;
    assert_eq!(ended["done"], true, "{ended}");
    assert!(canary.assert_not_below(world.home.root()) >= 8, "the home has hardly a file");
    drop(keeper.stdin.take());
    tokio::time::timeout(PATIENCE, keeper.wait()).await.expect("it ends with its tether").expect("its status");
    let told = std::fs::read(&log).expect("its log");
    assert!(String::from_utf8_lossy(&told).contains("TRACE"), "the keeper's log is not detailed");
    canary.assert_not_in("the keeper's log", &told);
    stop.store(true, Ordering::Relaxed);
    assert!(watched.join().expect("no child carries the key") > 0, "no child was seen");
}

const ROWS_OF_A_LIVING_POD: [&[&str]; 11] = [
    &["pod", "list"],
    &["pod", "info", "comfy"],
    &["pod", "extend", "comfy", "--minutes", "10"],
    &["pod", "logs", "comfy"],
    &["tunnel", "list"],
    &["comfy", "status"],
    &["volume", "list"],
    &["spending"],
    &["config", "show"],
    &["config", "path"],
    &["tools"],
];

/// A create that is refused, one that is cancelled before it was sent and one without a clear answer leave no value of
/// the environment behind either.
#[tokio::test(flavor = "multi_thread")]
async fn an_environment_is_forgotten_whatever_the_create_came_to() {
    let house = House::hurried().await;
    let value = format!("canary-{}", uuid::Uuid::new_v4().simple());
    for (name, fault) in [
        ("made", None),
        ("refused", Some(json!({ "operation": "createPod", "kind": "status_before", "status": 402 }))),
        (
            "echoed",
            Some(
                json!({ "operation": "createPod", "kind": "status_before", "status": 422, "detail": format!("bad env {value}") }),
            ),
        ),
        ("unknown", Some(json!({ "operation": "createPod", "kind": "status_before", "status": 500 }))),
    ] {
        if let Some(fault) = fault {
            house.fault(fault).await;
        }
        let arguments = json!({ "name": name, "env": { "TOKEN": value }, "wait_seconds": 30 });
        let mut arguments = arguments;
        if name == "unknown" {
            arguments["wait_seconds"] = json!(0);
        }
        let answer = house.call("create_pod_with_volume", arguments).await;
        assert!(!format!("{answer:?}").contains(&value), "{name}: the answer tells a value");
        until("a settled create", async || {
            let record = house.fleet().get(name).ok()??;
            (!matches!(record.known.phase, Phase::Journaled | Phase::Posting)).then_some(())
        })
        .await;
        for entry in walk(&house.home) {
            assert!(
                !holds(&std::fs::read(&entry).unwrap_or_default(), &value),
                "{name}: a value is in {}",
                entry.display()
            );
        }
    }
    house.end().await;
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let below = entries.map(|entry| entry.path()).flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] });
    below.collect()
}
