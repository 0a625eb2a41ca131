//! The pod's own switch, run by the shell as a pod's sshd would, with a scripted container and a scripted API.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use autopod_mcp::ssh::{Limits, Stdin};
use axum::Router;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::routing::any;
use tempfile::TempDir;
use tokio::process::Command;

use crate::keeper_support::{kill, until};
use crate::ssh_support::{Sshd, ssh, there_is_an_sshd};
use crate::support::program::PATIENCE;

const SWITCH: &str = include_str!("../src/keeper/inside/switch.sh");
const KEY: &str = "rpa_CANARY0123";
const CONTAINER: &[u8] =
    b"PATH=/bin\0PUBLIC_KEY=a\nRUNPOD_POD_ID=forged\0RUNPOD_API_KEY=rpa_CANARY0123\0RUNPOD_POD_ID=pod1\0";
/// What any image has.
const UTILITIES: [&str; 14] =
    ["cat", "chmod", "date", "grep", "head", "mkdir", "mv", "nohup", "rm", "sed", "setsid", "sh", "tail", "tr"];

/// One call that the switch made.
#[derive(Debug, Clone)]
struct Called {
    at: f64,
    path: String,
    authorization: String,
    agent: String,
    body: String,
}

/// A container's files, and an API that answers these codes in turn and the last one for ever.
struct Container {
    folder: TempDir,
    origin: String,
    calls: Arc<Mutex<Vec<Called>>>,
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs_f64()
}

fn found(program: &str) -> Option<PathBuf> {
    ["/usr/bin", "/bin"].iter().map(|folder| Path::new(folder).join(program)).find(|path| path.exists())
}

impl Container {
    async fn start(programs: &[&str], answers: &'static [u16]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("environ"), CONTAINER).expect("a file");
        std::fs::create_dir(folder.path().join("bin")).expect("a folder");
        for program in UTILITIES.iter().chain(programs) {
            let at = found(program).unwrap_or_else(|| panic!("{program} is needed by this test"));
            std::os::unix::fs::symlink(at, folder.path().join("bin").join(program)).expect("a link");
        }
        let calls = Arc::new(Mutex::new(Vec::new()));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let origin = format!("http://{}", listener.local_addr().expect("an address"));
        let routes = Router::new().fallback(any({
            let calls = calls.clone();
            move |request: Request| answer(calls.clone(), request, answers)
        }));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { folder, origin, calls }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `sleep` that tells for how long it was asked and hardly sleeps.
    fn hurry(&self) {
        let script = format!("#!/bin/sh\necho \"$1\" >>'{}'\nexec /bin/sleep 0.05\n", self.path("slept").display());
        let sleep = self.path("bin/sleep");
        let _ = std::fs::remove_file(&sleep);
        std::fs::write(&sleep, script).expect("a file");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&sleep, mode).expect("a mode");
    }

    fn command(&self, seconds: i64, token: &str) -> Command {
        let mut command = Command::new(self.path("bin/sh"));
        let environ = self.path("environ");
        command
            .args(["-c", SWITCH, "autopod-switch", "arm", &seconds.to_string(), &self.origin, token])
            .arg(environ)
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("TMPDIR", self.folder.path())
            .env("AUTOPOD_SWITCH", SWITCH)
            .stdin(Stdio::null());
        command
    }

    async fn arm(&self, seconds: i64, token: &str) -> String {
        let output = tokio::time::timeout(PATIENCE, self.command(seconds, token).output()).await;
        let output = output.expect("it ends though its loop goes on").expect("sh");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Arms it and gives the deadline.
    async fn armed(&self, seconds: i64, token: &str) -> f64 {
        let said = self.arm(seconds, token).await;
        let deadline: f64 = said.strip_prefix("AUTOPOD_ARMED ").and_then(|epoch| epoch.parse().ok()).expect(&said);
        assert!((now() + seconds as f64 - deadline).abs() < 5.0, "{said}");
        deadline
    }

    fn calls(&self) -> Vec<Called> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The loops of this container, by their tokens.
    fn loops(&self) -> Vec<(u32, String)> {
        let folders = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = folders.filter_map(|folder| folder.file_name().to_str()?.parse::<u32>().ok());
        pids.filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            assert!(!line.windows(KEY.len()).any(|window| window == KEY.as_bytes()), "the key is in a command line");
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            let at = words.iter().position(|word| word == "watch")?;
            (words.get(at + 2)? == &self.origin).then(|| Some((pid, words.get(at + 3)?.to_string())))?
        })
        .collect()
    }

    async fn until_loops(&self, tokens: &[&str]) {
        until("these loops", async || {
            let mut there: Vec<_> = self.loops().into_iter().map(|(_, token)| token).collect();
            // A loop's own children carry its command line for a moment.
            there.sort();
            there.dedup();
            (there == tokens).then_some(())
        })
        .await;
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.loops().into_iter().for_each(|(pid, _)| kill(pid));
    }
}

async fn answer(calls: Arc<Mutex<Vec<Called>>>, request: Request, answers: &[u16]) -> StatusCode {
    let (head, body) = request.into_parts();
    let body: Bytes = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned();
    let called = Called {
        at: now(),
        path: format!("{} {}", head.method, head.uri),
        authorization: header("authorization"),
        agent: header("user-agent"),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
    calls.push(called);
    StatusCode::from_u16(answers[calls.len().min(answers.len()) - 1]).expect("a code")
}

async fn fires_by(client: &'static str) {
    let container = Container::start(&[client, "sleep"], &[404]).await;
    let deadline = container.armed(2, "first").await;
    let called = until("the call", async || container.calls().first().cloned()).await;
    assert!(called.at >= deadline && called.at < deadline + 1.0, "{deadline}: {called:?}");
    assert_eq!(called.path, "POST /v2/pods/pod1/action");
    assert_eq!(called.authorization, format!("Bearer {KEY}"));
    assert_eq!(called.body, r#"{"action":"terminate"}"#);
    assert!(called.agent.starts_with("autopod-switch/"), "{called:?}");
    container.until_loops(&[]).await;
    assert_eq!(container.calls().len(), 1);
    let left: Vec<_> = std::fs::read_dir(container.path("autopod-switch-pod1")).expect("a folder").flatten().collect();
    assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), ["armed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fires_by_curl_alone() {
    fires_by("curl").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fires_by_wget_alone() {
    fires_by("wget").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fires_by_python_alone() {
    fires_by("python3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_asks_again_until_the_pod_is_gone() {
    let container = Container::start(&["curl"], &[500, 401, 204, 404]).await;
    container.hurry();
    container.armed(0, "first").await;
    container.until_loops(&[]).await;
    assert_eq!(container.calls().len(), 4);
    let slept = std::fs::read_to_string(container.path("slept")).expect("a file");
    assert_eq!(slept.lines().filter(|line| *line == "30").count(), 3, "{slept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_looks_up_at_least_every_half_minute() {
    let container = Container::start(&["curl"], &[404]).await;
    container.hurry();
    container.armed(10_000, "first").await;
    let slept = until("some turns", async || {
        let slept = std::fs::read_to_string(container.path("slept")).unwrap_or_default();
        (slept.lines().filter(|line| *line == "30").count() > 3).then_some(slept)
    })
    .await;
    assert!(slept.lines().all(|line| line.parse::<f64>().is_ok_and(|seconds| seconds <= 30.0)), "{slept}");
    // Without its file it keeps the deadline that it knows.
    std::fs::remove_file(container.path("autopod-switch-pod1/armed")).expect("it is there");
    let turns = slept.lines().count();
    until("more turns", async || {
        let slept = std::fs::read_to_string(container.path("slept")).unwrap_or_default();
        (slept.lines().count() > turns + 3).then_some(())
    })
    .await;
    container.until_loops(&["first"]).await;
    assert!(container.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_arming_takes_the_place_of_the_old_one() {
    let container = Container::start(&["curl", "sleep"], &[404]).await;
    let old = container.armed(2, "old").await;
    container.armed(600, "new").await;
    // Past the first deadline nothing is ended, and one loop is left.
    container.until_loops(&["new"]).await;
    assert!(now() >= old - 1.0);
    assert!(container.calls().is_empty(), "{:?}", container.calls());
    // Many at once leave the one whose token stands in the file.
    let tokens: Vec<_> = (0..6).map(|number| format!("racer{number}")).collect();
    container.hurry();
    let armings = tokens.iter().map(|token| container.arm(500, token));
    let said = futures_util::future::join_all(armings).await;
    assert!(said.iter().any(|said| said.starts_with("AUTOPOD_ARMED ")), "{said:?}");
    let named = std::fs::read_to_string(container.path("autopod-switch-pod1/armed")).expect("a file");
    let winner = named.split(' ').next().expect("a token");
    for (pid, token) in container.loops() {
        // Those from before the hurry sleep for half a minute yet.
        if token == "new" {
            kill(pid);
        }
    }
    container.until_loops(&[winner]).await;
    assert!(container.calls().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named() {
    let whole = String::from_utf8_lossy(CONTAINER).into_owned();
    let cases = [
        ("", "RUNPOD_POD_ID"),
        ("RUNPOD_POD_ID=pod1\0", "RUNPOD_API_KEY"),
        ("RUNPOD_POD_ID=../x\0RUNPOD_API_KEY=k\0", "RUNPOD_POD_ID"),
        ("RUNPOD_POD_ID=pod1\0RUNPOD_API_KEY=k\"\0", "RUNPOD_API_KEY"),
        (&whole, "neither curl nor wget nor python3"),
    ];
    let container = Container::start(&["sleep"], &[404]).await;
    for (environ, missing) in cases {
        std::fs::write(container.path("environ"), environ).expect("a file");
        let said = container.arm(0, "first").await;
        assert!(said.starts_with("AUTOPOD_NOT_ARMED ") && said.contains(missing), "{environ:?}: {said}");
    }
    std::fs::remove_file(container.path("environ")).expect("it is there");
    assert!(container.arm(0, "first").await.contains("RUNPOD_POD_ID"));
    assert!(container.loops().is_empty());

    // A full disk, as far as the shell can tell.
    let container = Container::start(&["curl", "sleep"], &[404]).await;
    std::fs::write(container.path("autopod-switch-pod1"), "no folder").expect("a file");
    let said = container.arm(0, "first").await;
    assert!(said.starts_with("AUTOPOD_NOT_ARMED ") && said.contains("autopod-switch-pod1"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_outlives_the_connection_that_armed_it() {
    if !there_is_an_sshd() {
        return;
    }
    let container = Container::start(&["curl", "sleep"], &[404]).await;
    let ssh = ssh(container.path("ssh"));
    let mut sshd = Sshd::start(&ssh.public_key().await.expect("a key")).await;
    let target = sshd.target("autopod-real-1").await;
    let at = |name: &str| container.path(name).display().to_string();
    let command = format!(
        "export TMPDIR={} PATH={}; AUTOPOD_SWITCH=$(cat) && export AUTOPOD_SWITCH && \
         exec sh -c \"$AUTOPOD_SWITCH\" autopod-switch arm 3 {} first {}",
        container.folder.path().display(),
        at("bin"),
        container.origin,
        at("environ"),
    );
    let limits = Limits { timeout: PATIENCE, max_output: 10_000 };
    let output = ssh.run(&target, &command, Stdin::Bytes(SWITCH.into()), limits).await.expect("a command that ran");
    assert!(output.stdout.starts_with(b"AUTOPOD_ARMED "), "{output:?}");
    sshd.child.take().expect("sshd").kill().await.expect("its end");
    until("the call", async || container.calls().first().cloned()).await;
    container.until_loops(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loop_needs_no_setsid() {
    let container = Container::start(&["curl", "sleep"], &[404]).await;
    std::fs::remove_file(container.path("bin/setsid")).expect("it is there");
    container.armed(1, "first").await;
    until("the call", async || container.calls().first().cloned()).await;
}
