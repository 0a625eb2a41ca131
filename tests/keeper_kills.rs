//! kill -9 of everything that holds pods and tunnels: they come back by themselves, or with the next command.

use std::collections::BTreeMap;
use std::time::Duration;

use autopod_mcp::background::KeeperClient;
use autopod_mcp::config::Limits;
use autopod_mcp::fleet::PodRecord;
use autopod_mcp::timing::Timing;
use autopod_mcp::tunnel::TunnelState;
use jiff::SignedDuration;
use rustix::process::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::keeper_support::{House, kill, signal, tell, until};

/// A home with a pod and a tunnel to it.
struct Held {
    house: House,
    pod_id: String,
    port: u16,
    record: PodRecord,
}

impl Held {
    async fn new() -> Self {
        let house = House::hurried().await;
        let pod_id = house.create("held").await;
        let port = house.tunnel("held").await;
        let record = house.fleet().get("held").expect("records").expect("a record");
        Self { house, pod_id, port, record }
    }

    /// One guard, one worker, one ssh, and ComfyUI answers on the same port as ever, of the same pod.
    async fn is_whole(&self, after: &str) {
        until(&format!("the tunnel after {after}"), async || self.house.stats_through(self.port).await).await;
        until(&format!("one of each after {after}"), async || {
            let found = self.house.processes();
            let tunnel = self.house.tunnels().get("held:8188").ok()??.known;
            let healthy = tunnel.state == TunnelState::Healthy && found.ssh == Vec::from_iter(tunnel.ssh_pid);
            (found.guards.len() == 1 && found.workers.len() == 1 && healthy).then_some(())
        })
        .await;
        let record = self.house.fleet().get("held").expect("records").expect("a record");
        assert_eq!(record.known.pod_id.as_ref(), Some(&self.pod_id), "after {after}");
        assert_eq!(record.expires_at(), self.record.expires_at(), "after {after}");
        let tunnel = self.house.tunnels().get("held:8188").expect("records").expect("a record");
        assert_eq!(tunnel.known.local_port, Some(self.port), "after {after}");
        let (alive, posts) = (self.house.alive().await.len(), self.house.asked("createPod"));
        assert_eq!((alive, posts), (1, 1), "after {after}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_or_guard_comes_back_by_itself() {
    let held = Held::new().await;
    for round in 0..2 {
        let before = held.house.until_worker().await;
        kill(before);
        until("another worker", async || held.house.worker().filter(|worker| *worker != before)).await;
        held.is_whole(&format!("kill -9 of the worker, round {round}")).await;

        // Whoever frees memory asks politely first.
        let before = held.house.until_worker().await;
        signal(before, Signal::TERM);
        until("another worker", async || held.house.worker().filter(|worker| *worker != before)).await;
        held.is_whole(&format!("the end of the worker, round {round}")).await;

        let guard = held.house.processes().guards[0];
        kill(guard);
        until("another guard", async || {
            let found = held.house.processes();
            (found.guards.len() == 1 && found.guards[0] != guard).then_some(())
        })
        .await;
        held.is_whole(&format!("kill -9 of the guard, round {round}")).await;
    }
    held.house.end().await;
}

/// An ssh that somebody is connected through outlives its stdin, and would hold the port.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_connection_does_not_keep_the_port_from_the_next_ssh() {
    let held = Held::new().await;
    let mut connected = TcpStream::connect(("127.0.0.1", held.port)).await.expect("a connection");
    connected.write_all(b"GET /system_stats HTTP/1.1\r\nHost: pod\r\n\r\n").await.expect("a written request");
    assert!(connected.read(&mut [0; 16]).await.expect("an answer") > 0);
    let ssh = held.house.processes().ssh;
    let worker = held.house.until_worker().await;
    kill(worker);
    until("another worker", async || held.house.worker().filter(|now| *now != worker)).await;
    // The old ssh serves on for a moment, so a healthy tunnel alone doesn't tell whose it is.
    until("another ssh", async || {
        let now = held.house.processes().ssh;
        (now.len() == 1 && now != ssh).then_some(())
    })
    .await;
    held.is_whole("the worker was killed with a connection open").await;
    held.house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_is_told_to_end_takes_its_worker_along() {
    let held = Held::new().await;
    let found = held.house.processes();
    signal(found.guards[0], Signal::TERM);
    until("no keeper", async || {
        let left = held.house.processes();
        (left.guards.is_empty() && left.workers.is_empty() && left.ssh.is_empty()).then_some(())
    })
    .await;
    // Nothing is lost by it: the next look at the pods starts a keeper again.
    let listed = held.house.ok("list_pods", json!({})).await;
    assert_eq!(listed["pods"].as_array().map(Vec::len), Some(1), "{listed}");
    held.is_whole("SIGTERM to the guard and the next command").await;
    held.house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_guard_and_worker_killed_the_next_command_heals() {
    let held = Held::new().await;
    for (tool, arguments) in [
        ("list_pods", json!({})),
        ("list_tunnels", json!({})),
        ("get_pod", json!({ "pod": "held" })),
        ("start_tunnel", json!({ "pod": "held" })),
        ("create_pod_with_volume", json!({ "name": "held" })),
    ] {
        let found = held.house.processes();
        // The worker first: one whose guard has died starts another at once, a guard pauses before it does.
        for pid in found.workers.into_iter().chain(found.guards) {
            kill(pid);
        }
        until("the end of ssh, which dies with its holder", async || {
            let found = held.house.processes();
            (found.guards.is_empty() && found.workers.is_empty() && found.ssh.is_empty()).then_some(())
        })
        .await;
        let answer = held.house.ok(tool, arguments).await;
        held.is_whole(&format!("both were killed and {tool} answered {answer}")).await;
    }
    held.house.end().await;
}

/// Whatever is killed, at whatever moment: afterwards, with one command, all is as it was.
pub async fn killed_at_random(rounds: usize) {
    let held = Held::new().await;
    let mut hits = BTreeMap::new();
    for round in 0..rounds {
        let random = uuid::Uuid::new_v4().as_u128();
        let call = held.house.command("start_tunnel", &json!({ "pod": "held", "wait_seconds": 5 })).spawn();
        let mut call = call.expect("the program");
        tokio::time::sleep(Duration::from_millis(u64::try_from(random % 400).expect("small"))).await;
        let found = held.house.processes();
        let (kind, victims) = match (random >> 64) % 4 {
            0 => ("guard", found.guards),
            1 => ("worker", found.workers),
            2 => ("ssh", found.ssh),
            _ => ("caller", Vec::from_iter(call.id())),
        };
        for victim in victims {
            kill(victim);
            *hits.entry(kind).or_insert(0) += 1;
        }
        let _ = call.wait().await;
        held.house.tunnels().read().expect("readable records");
        held.house.fleet().read().expect("readable records");
        held.house.ok("list_tunnels", json!({})).await;
        held.is_whole(&format!("round {round}, a {kind} was killed")).await;
    }
    tell(&format!("random kills: {rounds} rounds, hits {hits:?}, the pod and its tunnel were there after each"));
    held.house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_moment_loses_nothing() {
    killed_at_random(5).await;
}

/// The key that the keeper has was revoked, and the user set a new one of the same account.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_of_the_same_account_is_taken_over_by_the_keeper() {
    let held = Held::new().await;
    let house = held.house;
    house.end_processes();
    // As it is after a rotation: the home is bound to the old key, and a keeper with the old key lives.
    let identity = std::fs::read_to_string(house.home.join("home.json")).expect("home.json");
    let mut identity: serde_json::Value = serde_json::from_str(&identity).expect("JSON");
    identity["account"] = json!(format!("{} revoked", house.origin()));
    std::fs::write(house.home.join("home.json"), identity.to_string()).expect("a written file");
    house.keeper_with("revoked-key").ensure_and_wake().await.expect("a keeper");
    until("a refusal of the old key", async || house.fleet().get("held").ok()??.known.problem).await;
    let done = house.ok("terminate_pod", json!({ "pod": "held" })).await;
    assert_eq!((&done["done"], house.alive().await.len()), (&json!(true), 0), "{done}");
    until("a closed record", async || house.fleet().get("held").ok()?.filter(|record| !record.is_open())).await;
    house.end().await;
}

/// A program without the key that would replace the keeper, being newer or at another provider, leaves it alone: the
/// successor could keep no deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_with_the_key_is_not_replaced_by_one_without() {
    let house = House::new().await;
    house.fleet().ensure("kept", house.wish(SignedDuration::from_mins(5)), &Limits::default()).await.expect("a record");
    house.keeper().ensure_and_wake().await.expect("a keeper");
    let worker = house.until_worker().await;
    let elsewhere = "http://127.0.0.1:9";
    let keyless = KeeperClient::new(&house.home(), &Timing::quick(), Some(house.launcher()), None, elsewhere, false);
    keyless.ensure_and_wake().await.expect("the keeper that is there");
    let hello = keyless.hello().await.expect("a keeper");
    assert_eq!((hello.pid, hello.has_key, hello.is_ending), (worker, true, false), "{hello:?}");
    house.end().await;
}
