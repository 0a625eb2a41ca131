//! The whole story from a shell: a script of `call`s, the commands for people, and what their exit codes mean.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use crate::story_support::{Said, Story, colours, painting, said, write_picture};
use crate::support::program::{PATIENCE, PROGRAM};

#[tokio::test]
async fn a_shell_script_tells_the_whole_story() {
    let story = Story::begin();
    let mut script = Command::new("/bin/sh");
    script
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/story.sh"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").expect("a PATH"))
        .env("AUTOPOD", PROGRAM)
        .env("AUTOPOD_HOME", story.home.path())
        .current_dir(story.home.folder())
        .kill_on_drop(true);
    let said = said(script).await;
    assert_eq!(said.code, 0, "{said:?}");
    let picture = Path::new(said.stdout.trim());
    assert!(colours(picture) > 1000, "{said:?}");
    story.end().await;
}

fn assert_ends_with(said: &Said, code: i32, words: &[&str]) {
    assert_eq!(said.code, code, "{said:?}");
    said.assert_words(words);
}

#[tokio::test]
async fn people_have_commands_and_scripts_have_exit_codes() {
    let story = Story::begin();
    let folder = story.home.folder();
    std::fs::write(folder.join("workflow_api.json"), painting(10).to_string()).expect("a file");
    let inverting = json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "unset.png"}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}}
    });
    std::fs::write(folder.join("invert.json"), inverting.to_string()).expect("a file");
    write_picture(&folder.join("picture.png"));

    assert_ends_with(&story.run(&["pod", "list"]).await, 0, &["No pods"]);
    assert_ends_with(&story.run(&["comfy", "status"]).await, 1, &["not ready", "create one with `pod create`"]);
    assert_ends_with(&story.run(&["pod", "info"]).await, 3, &["there is no pod"]);

    let create = story.run(&["pod", "create", "one", "--volume", "comfy-models", "--lifetime-minutes", "10"]).await;
    assert_ends_with(&create, 0, &["Created the pod one", "comfy-models at /workspace", "Next: `tunnel start one`"]);
    // Not waited for: the work goes on in the keeper, and that it is not done yet is a failure to a script.
    let two = story.run(&["pod", "create", "two", "--timeout", "0s"]).await;
    assert_ends_with(&two, 1, &["Created the pod two", "not done within 0s", "billed"]);
    let pods = story.run(&["pod", "list"]).await;
    assert_ends_with(&pods, 0, &["one", "two", "RUNNING", "an hour"]);
    for alias in ["ls", "ps"] {
        assert_ends_with(&story.run(&[alias]).await, 0, &["one", "two"]);
    }
    assert_ends_with(
        &story.run(&["info", "one", "--wait-for", "ssh"]).await,
        0,
        &["EU-RO-1", "a tunnel: open it with `tunnel start`"],
    );

    let three = story.run(&["pod", "create", "three"]).await;
    assert_ends_with(&three, 4, &["the cap is 2", "one, two"]);
    let dear = story.run(&["pod", "create", "three", "--gpu", "A100 PCIe"]).await;
    assert_ends_with(&dear, 4, &["$1.50/h", "$1.64/h", "nothing was created"]);
    let other = story.run(&["pod", "create", "one", "--gpu", "L4"]).await;
    assert_ends_with(&other, 4, &["another request", "`pod kill`"]);
    assert_ends_with(&story.run(&["pod", "kill"]).await, 2, &["POD"]);
    assert_ends_with(&story.run(&["pod", "kill", "three"]).await, 3, &["three", "one, two"]);
    assert_ends_with(&story.run(&["pod", "list", "--colour"]).await, 2, &["--colour"]);
    assert_ends_with(&story.run(&["tunnel", "start"]).await, 2, &["several pods", "one, two"]);

    assert_ends_with(&story.run(&["kill", "two"]).await, 0, &["two is gone"]);
    assert_ends_with(&story.run(&["tunnel", "start"]).await, 0, &["port 8188 of the pod one"]);
    assert_ends_with(&story.run(&["tunnel", "list"]).await, 0, &["one", "healthy", "http://127.0.0.1:"]);
    assert_ends_with(&story.run(&["comfy", "status"]).await, 0, &["ready at http://127.0.0.1:", "DEVICE"]);

    let run = story.run(&["comfy", "run", "workflow_api.json", "--output-dir", "pictures"]).await;
    assert_ends_with(&run, 0, &["is done", "pictures/story_"]);
    assert!(colours(&only_picture(&folder.join("pictures"))) > 1000);
    let run = story.run(&["comfy", "run", "invert.json", "--input", "picture.png", "--output-dir", "inverted"]).await;
    assert_ends_with(&run, 0, &["is done", "inverted/inverted_"]);
    assert_eq!(colours(&only_picture(&folder.join("inverted"))), 32 * 32);
    let run = story.run(&["comfy", "run", "invert.json", "--input", "nowhere.png"]).await;
    assert_ends_with(&run, 2, &["inputs[0].path", "nowhere.png"]);
    assert_ends_with(&story.run(&["comfy", "queue", "--history", "3"]).await, 0, &["queue is empty", "done"]);

    // `--json` is what `call` gives.
    let by_command = story.run(&["gpu", "list", "--json", "--min-vram-gb", "48"]).await.json();
    assert_eq!(by_command, story.call("list_gpus", json!({"min_vram_gb": 48})).await.json());
    let killed = story.run(&["pod", "rm", "one", "--json"]).await.json();
    assert_eq!((&killed["state"], &killed["tunnels_stopped"]), (&json!("gone"), &json!(1)), "{killed}");
    assert_ends_with(&story.run(&["tunnel", "ls"]).await, 0, &["No tunnels"]);
    story.assert_nothing_is_up().await;
    story.end().await;
}

#[tokio::test]
async fn an_interrupted_run_is_exit_code_130_and_can_be_found_again() {
    let story = Story::begin();
    story.call("create_pod_with_volume", json!({})).await.json();
    story.call("start_tunnel", json!({})).await.json();
    std::fs::write(story.home.folder().join("workflow_api.json"), painting(100).to_string()).expect("a file");
    let running = story.command(&["call", "comfy_run", "{\"workflow_path\": \"workflow_api.json\"}"]);
    let mut running = Running::start(running);
    running.until_told("step 1 of 24").await;
    assert_ends_with(&running.interrupt().await, 130, &["interrupted"]);

    let queue = story.call("comfy_queue", json!({})).await.json();
    let run = queue["running"][0]["job"].as_str().unwrap_or_else(|| panic!("the run goes on: {queue}")).to_owned();
    let found = story.run(&["comfy", "job", &run]).await;
    assert_ends_with(&found, 0, &["is done", "story_"]);
    let picture = found.stdout.lines().find(|line| line.ends_with(".png")).expect("the picture's path");
    assert!(colours(Path::new(picture)) > 1000, "{found:?}");
    story.call("terminate_pod", json!({"pod": "comfy"})).await.json();
    story.end().await;
}

/// A process whose progress on stderr is followed.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("it starts");
        let stderr = child.stderr.take().expect("stderr is a pipe");
        Self { child, lines: BufReader::new(stderr).lines() }
    }

    async fn until_told(&mut self, words: &str) {
        let told = async {
            loop {
                let line = self.lines.next_line().await.expect("text").expect("it goes on");
                if line.contains(words) {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, told).await.expect("it tells its progress");
    }

    /// What it says from here to its end.
    async fn interrupt(mut self) -> Said {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)).expect("it runs");
        kill_process(pid, Signal::INT).expect("the signal is sent");
        let mut stderr = String::new();
        let end = async {
            while let Some(line) = self.lines.next_line().await.expect("text") {
                stderr.push_str(&line);
            }
            self.child.wait().await.expect("its end can be waited for").code().expect("it ends by itself")
        };
        let code = tokio::time::timeout(PATIENCE, end).await.expect("it ends");
        Said { code, stdout: String::new(), stderr }
    }
}

fn only_picture(folder: &Path) -> std::path::PathBuf {
    let files: Vec<_> = std::fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path()).collect();
    let [only] = files.as_slice() else { panic!("not one file: {files:?}") };
    only.clone()
}
