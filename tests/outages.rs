//! What a machine does to its processes: groups are killed, terminals close, disks fill up, clocks jump, lids are shut.
//! The pods end in time all the same.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{ActionState, ActionWish, Changed, Phase, PodRecord, new_intent};
use autopod_mcp::provider::PodAction;
use autopod_mcp::state;
use jiff::{SignedDuration, Timestamp};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::keeper_support::{Answer, House, answer, kill, signal, until};
use crate::support::userns;

const NINE_HOURS: f64 = 9.0 * 3600.0;

async fn wish(house: &House, name: &str, seconds: i64) -> String {
    let wish = house.wish(SignedDuration::from_secs(seconds));
    let intent = wish.intent.clone();
    house.fleet().ensure(name, wish, &Limits::default()).await.expect("a record");
    intent
}

async fn until_record(house: &House, name: &str, what: &str, is_so: impl Fn(&PodRecord) -> bool) -> PodRecord {
    until(what, async || house.fleet().get(name).ok()?.filter(|record| is_so(record))).await
}

/// The server that was asked for the pod, and whatever it started in its process group.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_group_leaves_the_deadline_with_the_keeper() {
    let house = House::hurried().await;
    let mut server = house.program(&["serve"]).stdin(Stdio::piped()).process_group(0).spawn().expect("a server");
    let mut stdin = server.stdin.take().expect("stdin");
    let mut lines = BufReader::new(server.stdout.take().expect("stdout")).lines();
    let requests = [
        json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": { "name": "test", "version": "0" }
        } }),
        json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }),
        json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {
            "name": "create_pod_with_volume", "arguments": { "name": "orphan", "wait_seconds": 45 }
        } }),
    ];
    for request in requests {
        stdin.write_all(format!("{request}\n").as_bytes()).await.expect("a written line");
    }
    until("the answer to the create", async || {
        let line = lines.next_line().await.expect("a line").expect("no end before the answer");
        (serde_json::from_str::<Value>(&line).expect("JSON")["id"] == 2).then_some(())
    })
    .await;
    let group = Pid::from_raw(i32::try_from(server.id().expect("a process id")).expect("a process id"));
    rustix::process::kill_process_group(group.expect("a process id"), Signal::KILL).expect("a killed group");
    server.wait().await.expect("its end");
    assert_eq!(house.alive().await.len(), 1);
    house.advance(NINE_HOURS).await;
    house.until_none_alive("the deadline without a server").await;
    until_record(&house, "orphan", "a closed record", |record| !record.is_open()).await;
    house.end().await;
}

/// The program as the leader of a terminal's session; the terminal closes with the returned file.
fn at_a_terminal(house: &House, tool: &str, arguments: &Value) -> (Child, std::fs::File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pseudo-terminal");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("it is ours");
    let name = ptsname(&ours, Vec::new()).expect("its name");
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    // Not the terminal of this process.
    let flags = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
    let theirs = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).expect("its far end");
    let end = || Stdio::from(theirs.try_clone().expect("a file"));
    // Whoever runs the tests may ignore hangups, which its children inherit.
    let mut command = wrapped(house, tool, arguments, "env", &["--default-signal=HUP", "setsid", "--ctty", "--wait"]);
    let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("it starts");
    (child, std::fs::File::from(ours))
}

/// A call by way of another program.
fn wrapped(house: &House, tool: &str, arguments: &Value, program: &str, words: &[&str]) -> Command {
    let call = house.command(tool, arguments);
    let mut command = Command::new(program);
    command.args(words).arg(call.as_std().get_program()).args(call.as_std().get_args()).env_clear();
    for (name, value) in call.as_std().get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// It closes while the POST is under way: the pod is made, and it ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_terminal_leaves_the_deadline_with_the_keeper() {
    // Its pods take seconds to run, for which the call waits.
    let house = House::new().await;
    house.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 800 })).await;
    let (mut child, terminal) = at_a_terminal(&house, "create_pod_with_volume", &json!({ "name": "hung-up" }));
    until("the POST", async || (house.asked("createPod") == 1).then_some(())).await;
    drop(terminal);
    let status = child.wait().await.expect("its end");
    assert!(!status.success(), "it was to be ended by the hangup: {status:?}");
    until_record(&house, "hung-up", "the pod", |record| record.known.pod_id.is_some()).await;
    assert_eq!(house.alive().await.len(), 1);
    house.advance(NINE_HOURS).await;
    house.until_none_alive("the deadline without a terminal").await;
    until_record(&house, "hung-up", "a closed record", |record| !record.is_open()).await;
    assert_eq!(house.asked("createPod"), 1);
    house.end().await;
}

/// The machine sleeps over a deadline: guard and worker stand still, then go on. A wish from meanwhile comes second.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_sleep_what_is_overdue_ends_before_anything_new_begins() {
    let house = House::new().await;
    wish(&house, "overdue", 4).await;
    house.keeper().ensure_and_wake().await.expect("a keeper");
    let record = until_record(&house, "overdue", "the pod", |record| record.known.pod_id.is_some()).await;
    let found = house.processes();
    let ours: Vec<_> = found.guards.into_iter().chain(found.workers).collect();
    let lock = house.home.join("locks/state");
    until("a moment in which the records can be written", async || {
        ours.iter().for_each(|pid| signal(*pid, Signal::STOP));
        if state::is_held(&lock) {
            ours.iter().for_each(|pid| signal(*pid, Signal::CONT));
            return None;
        }
        Some(())
    })
    .await;
    wish(&house, "fresh", 600).await;
    until("the deadline", async || (Timestamp::now() > record.expires_at()).then_some(())).await;
    assert_eq!(house.alive().await.len(), 1);
    for pid in ours {
        signal(pid, Signal::CONT);
    }
    until_record(&house, "fresh", "the next pod", |record| record.known.pod_id.is_some()).await;
    ended_first(&house);
    house.end().await;
}

/// The provider's clock leaps by nine hours, which is heard of at the next answer at the latest.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_leap_what_is_overdue_ends_before_anything_new_begins() {
    let house = House::hurried().await;
    house.create("overdue").await;
    // None of the two waits for the other's news.
    house.end_processes();
    house.advance(NINE_HOURS).await;
    wish(&house, "fresh", 6000).await;
    // Whoever makes the new pod hears of the time first.
    house.fault(json!({ "operation": "listPods", "kind": "delay_ms", "delay_ms": 1000, "times": 4 })).await;
    house.ok("list_pods", json!({})).await;
    until_record(&house, "fresh", "the next pod", |record| record.known.pod_id.is_some()).await;
    ended_first(&house);
    until_record(&house, "overdue", "a closed record", |record| !record.is_open()).await;
    assert_eq!(house.alive().await.len(), 1);
    house.end().await;
}

/// The DELETE of the one pod went out before the POST of the other.
fn ended_first(house: &House) {
    let requests = house.sandbox.requests();
    let changes: Vec<_> = requests.iter().filter(|entry| entry["method"] != "GET").collect();
    let operations: Vec<_> = changes.iter().map(|entry| entry["operation"].as_str().unwrap_or_default()).collect();
    assert_eq!(operations[..3], ["createPod", "deletePod", "createPod"], "{operations:?}");
}

/// A file system of 256 KiB that only this world's processes see, mounted over the home.
struct SmallDisk {
    house: House,
    /// Holds the namespaces open.
    holder: Child,
    seen_from_outside: PathBuf,
}

impl SmallDisk {
    async fn new() -> Self {
        let house = House::hurried().await;
        std::fs::create_dir(&house.home).expect("a folder");
        let mount = "mount -t tmpfs -o size=256k,mode=700 small \"$0\" && echo mounted && exec sleep 600";
        let mut holder = Command::new("unshare")
            .args(["-Urm", "sh", "-c", mount])
            .arg(&house.home)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("unshare");
        let mut lines = BufReader::new(holder.stdout.take().expect("stdout")).lines();
        assert_eq!(lines.next_line().await.expect("a line").as_deref(), Some("mounted"));
        let pid = holder.id().expect("a process id");
        let seen_from_outside = Path::new(&format!("/proc/{pid}/root")).join(house.home.strip_prefix("/").expect("/"));
        Self { house, holder, seen_from_outside }
    }

    async fn call(&self, tool: &str, arguments: Value) -> Answer {
        let holder = self.holder.id().expect("it lives").to_string();
        answer(wrapped(
            &self.house,
            tool,
            &arguments,
            "nsenter",
            &["-t", &holder, "-U", "-m", "--preserve-credentials"],
        ))
        .await
    }

    async fn ok(&self, tool: &str, arguments: Value) -> Value {
        let answer = self.call(tool, arguments).await;
        assert_eq!(answer.code, 0, "{tool}: {answer:?}");
        answer.value
    }

    fn ballast(&self) -> PathBuf {
        self.seen_from_outside.join("ballast")
    }

    /// Until not a single byte more is taken.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).expect("a file");
        for size in [4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        assert!(std::fs::write(self.seen_from_outside.join("more"), "more").is_err(), "there is room yet");
        let _ = std::fs::remove_file(self.seen_from_outside.join("more"));
    }

    fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("removed");
    }

    async fn until_closed(&self, name: &str) {
        until("a closed record", async || {
            let records = std::fs::read(self.seen_from_outside.join("pods.json")).ok()?;
            let records: Value = serde_json::from_slice(&records).expect("readable records");
            let record = &records["entries"][name];
            (record.is_null() || record["known"]["phase"] == json!(Phase::Gone)).then_some(())
        })
        .await;
    }

    async fn end(mut self) {
        self.house.end_processes();
        self.holder.kill().await.expect("killed");
        self.house.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_file_system_makes_no_pod_and_keeps_none_alive() {
    if !userns::are_allowed() {
        return;
    }
    let disk = SmallDisk::new().await;
    let house = &disk.house;
    // A home that was never used, and one that has all it needs but room.
    disk.fill();
    let refused = disk.call("create_pod_with_volume", json!({ "name": "none" })).await;
    assert_ne!(refused.code, 0, "{refused:?}");
    disk.free();
    let made = disk.ok("create_pod_with_volume", json!({ "name": "first", "wait_seconds": 45 })).await;
    assert_eq!(made["done"], true, "{made}");
    disk.fill();
    let refused = disk.call("create_pod_with_volume", json!({ "name": "none" })).await;
    assert_ne!(refused.code, 0, "{refused:?}");
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (1, 1));

    // By the keeper, at its deadline.
    house.advance(NINE_HOURS).await;
    house.until_none_alive("the deadline with a full disk").await;
    disk.free();
    disk.until_closed("first").await;

    // By the tool.
    disk.ok("create_pod_with_volume", json!({ "name": "second", "wait_seconds": 45 })).await;
    disk.fill();
    let done = disk.ok("terminate_pod", json!({ "pod": "second" })).await;
    assert_eq!((&done["done"], house.alive().await.len()), (&json!(true), 0), "{done}");
    house.end_processes();
    disk.free();
    // What the next start finds is healed by it.
    disk.ok("list_pods", json!({})).await;
    disk.until_closed("second").await;
    disk.ok("create_pod_with_volume", json!({ "name": "second", "wait_seconds": 45 })).await;
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (3, 1));
    disk.end().await;
}

async fn want(house: &House, name: &str, action: PodAction) -> String {
    let record = house.fleet().get(name).expect("records").expect("a record");
    let wish = ActionWish { id: new_intent(), action, requested_at: Timestamp::now() };
    let id = wish.id.clone();
    let changed = house.fleet().want_action(&record.intent, wish, &Limits::default()).await;
    assert!(matches!(changed, Ok(Changed::Written(_))), "{changed:?}");
    id
}

/// The answer to a stop is lost: it is never sent again, and that nobody knows is told.
async fn a_stop_without_an_answer(kind: &str, is_killed: bool) {
    let house = House::hurried().await;
    house.create("unclear").await;
    house.fault(json!({ "operation": "podAction", "kind": kind })).await;
    let wish = want(&house, "unclear", PodAction::Stop).await;
    until("the action", async || (house.asked("podAction") == 1).then_some(())).await;
    if is_killed {
        let worker = house.until_worker().await;
        kill(worker);
        until("another worker", async || house.worker().filter(|now| *now != worker)).await;
    }
    let settled = |record: &PodRecord| {
        let known = record.known.action.as_ref().filter(|known| known.id == wish);
        known.is_some_and(|known| known.state == ActionState::Unclear && known.problem.is_some())
    };
    until_record(&house, "unclear", &format!("what came of {kind}"), settled).await;
    // Long after, it has been sent once; the next wish is another one, and is sent.
    let next = want(&house, "unclear", PodAction::Stop).await;
    until_record(&house, "unclear", "the next action", |record| {
        record.known.action.as_ref().is_some_and(|known| known.id == next && known.state != ActionState::Sent)
    })
    .await;
    assert_eq!((house.asked("podAction"), house.alive().await.len()), (2, 1), "{kind}");
    house.advance(NINE_HOURS).await;
    house.until_none_alive("the deadline after an unclear action").await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_without_a_clear_answer_is_never_sent_again() {
    tokio::join!(
        a_stop_without_an_answer("reset_before", false),
        a_stop_without_an_answer("reset_after", false),
        a_stop_without_an_answer("hang_after", true),
        a_stop_without_an_answer("hang_before", true),
        a_stop_without_an_answer("garbage", false),
    );
}
