//! A tunnel is there as long as its pod, on the same port, and says why when it can't be.

use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;

use autopod_mcp::tunnel::TunnelState;
use reqwest::Method;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use crate::keeper_support::{House, kill, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_ssh_comes_back_on_the_same_port() {
    let house = House::hurried().await;
    house.create("again").await;
    let port = house.tunnel("again").await;
    for round in 1..=3 {
        let ssh = house.processes().ssh;
        assert_eq!(ssh.len(), 1, "{ssh:?}");
        kill(ssh[0]);
        until("another ssh", async || {
            let tunnel = house.tunnels().get("again:8188").ok()??;
            (tunnel.known.reconnects == round && tunnel.known.state == TunnelState::Healthy).then_some(())
        })
        .await;
        assert!(house.stats_through(port).await.is_some(), "round {round}");
    }
    let rows = house.ok("list_tunnels", json!({})).await;
    assert_eq!((&rows["tunnels"][0]["reconnects"], &rows["tunnels"][0]["state"]), (&json!(3), &json!("healthy")));
    house.end().await;
}

/// What somebody does at the provider's console.
async fn act(house: &House, id: &str, action: &str) {
    let body = Some(json!({ "action": action }));
    let (status, body) = house.raw(Method::POST, &format!("/v2/pods/{id}/action"), body).await;
    assert_eq!(status, 200, "{body}");
}

async fn follows(action: &str) {
    let house = House::hurried().await;
    let id = house.create("moving").await;
    let port = house.tunnel("moving").await;
    let before = house.fleet().get("moving").expect("records").expect("a record").known;
    let first_port = house.alive().await[0]["ssh_port"].clone();
    if action == "restart" {
        act(&house, &id, "restart").await;
    } else {
        act(&house, &id, "stop").await;
        until("a parked tunnel", async || {
            let tunnel = house.tunnels().get("moving:8188").ok()??;
            (tunnel.known.state == TunnelState::WaitingForPod).then_some(())
        })
        .await;
        act(&house, &id, "start").await;
    }
    until(&format!("the pod after {action}"), async || {
        let now = house.alive().await[0]["ssh_port"].clone();
        (!now.is_null() && now != first_port).then_some(())
    })
    .await;
    until(&format!("the tunnel after {action}"), async || house.stats_through(port).await).await;
    let after = house.fleet().get("moving").expect("records").expect("a record").known;
    assert!(after.starts > before.starts, "{action}: {before:?} {after:?}");
    let tunnel = until(&format!("health after {action}"), async || {
        let tunnel = house.tunnels().get("moving:8188").ok()??;
        (tunnel.known.state == TunnelState::Healthy).then_some(tunnel)
    })
    .await;
    assert_eq!((tunnel.known.local_port, tunnel.known.cause), (Some(port), None), "{action}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_moves_is_followed_with_its_new_host_key() {
    tokio::join!(follows("stop and start"), follows("restart"));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_host_key_within_one_start_is_refused() {
    let house = House::hurried().await;
    house.create("pinned").await;
    house.tunnel("pinned").await;
    let file = house.home.join("ssh/known_hosts");
    let known = std::fs::read_to_string(&file).expect("known_hosts");
    let (alias, _) = known.split_once(' ').expect("a line");
    let strange = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIOlRgo4a9LTxE6Yjm1AU3EZHm0sF8VGGz6fZtB5Bg7B";
    std::fs::write(&file, format!("{alias} {strange}\n")).expect("a written file");
    kill(house.processes().ssh[0]);
    let failed = until("a refused connection", async || {
        house.tunnels().get("pinned:8188").ok()?.filter(|tunnel| tunnel.known.state == TunnelState::Failed)
    })
    .await;
    let cause = failed.known.cause.expect("a cause");
    assert!(cause.contains("host key changed within one start"), "{cause}");
    assert_eq!(house.processes().ssh.len(), 0);
    let refused = house.call("start_tunnel", json!({ "pod": "pinned", "local_port": 0 })).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.assert_says("host key changed");
    // A tunnel that failed leaves with its pod.
    house.ok("terminate_pod", json!({ "pod": "pinned" })).await;
    until("no record", async || house.tunnels().read().ok()?.is_empty().then_some(())).await;
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_refused_by_name_and_passed_over_by_default() {
    let house = House::hurried().await;
    house.create("ports").await;
    let foreign = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let taken = foreign.local_addr().expect("an address").port();
    let refused = house.call("start_tunnel", json!({ "pod": "ports", "local_port": taken })).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    refused.assert_says(&format!("port {taken} on this machine is in use"));
    // Whoever has 8188 now, it is not free.
    let _default = TcpListener::bind(("127.0.0.1", 8188));
    let open = house.ok("start_tunnel", json!({ "pod": "ports", "wait_seconds": 45 })).await;
    let port = open["local_port"].as_u64().expect("a port");
    assert!(open["done"] == true && port > 8188 && port < 8300, "{open}");
    let other = house.call("start_tunnel", json!({ "pod": "ports", "local_port": taken })).await;
    assert_eq!(other.code, 2, "{other:?}");
    other.assert_says(&format!("on port {port} already"));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_leaves_with_its_pod() {
    let house = House::hurried().await;
    let (told, ended) = tokio::join!(house.create("told"), house.create("ended"));
    let _ = told;
    let ports = tokio::join!(house.tunnel("told"), house.tunnel("ended"));
    let done = house.ok("terminate_pod", json!({ "pod": "told" })).await;
    assert_eq!((&done["done"], &done["tunnels_stopped"]), (&json!(true), &json!(1)), "{done}");
    // Ended behind our back.
    let (status, _) = house.raw(Method::DELETE, &format!("/v2/pods/{ended}"), None).await;
    assert_eq!(status, 204);
    until("no tunnel", async || house.tunnels().read().ok()?.is_empty().then_some(())).await;
    until("no ssh", async || house.processes().ssh.is_empty().then_some(())).await;
    assert!(house.stats_through(ports.0).await.is_none() && house.stats_through(ports.1).await.is_none());
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_a_hostile_ssh_config_nor_an_odd_home_keeps_a_tunnel_away() {
    let mut house = House::hurried().await;
    house.home = house.folder().join("a b%c");
    let config = house.folder().join(".ssh");
    std::fs::create_dir_all(&config).expect("a folder");
    std::fs::write(
        config.join("config"),
        "Host *\n RemoteCommand false\n StdinNull yes\n SessionType none\n ForkAfterAuthentication yes\n \
         ClearAllForwardings yes\n ProxyJump nowhere\n ControlMaster auto\n ControlPath ~/.ssh/%C\n",
    )
    .expect("a written file");
    house.create("odd").await;
    let port = house.tunnel("odd").await;
    assert!(house.stats_through(port).await.is_some());
    // ssh finds its user's config by the password file and not by HOME, so that it reads none is seen on its command.
    let ssh = house.processes().ssh;
    let line = std::fs::read(format!("/proc/{}/cmdline", ssh[0])).expect("a command line");
    let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    assert!(words.windows(2).any(|pair| pair[0] == "-F" && pair[1] == "none"), "{words:?}");
    let files: Vec<_> = std::fs::read_dir(house.home.join("ssh")).expect("a folder").flatten().collect();
    let names: Vec<_> = files.iter().map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.contains(&"known_hosts".to_owned()), "{names:?}");
    let beside: Vec<_> = std::fs::read_dir(house.folder()).expect("a folder").flatten().collect();
    let beside: Vec<_> = beside.iter().map(|file| file.file_name()).collect();
    assert_eq!(beside.len(), 3, "a stray file: {beside:?}");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_ssh_the_way_out_is_told() {
    let mut house = House::hurried().await;
    let empty = house.folder().join("empty");
    std::fs::create_dir_all(&empty).expect("a folder");
    let real_path = std::mem::replace(&mut house.path, empty.display().to_string());
    let refused = house.call("create_pod_with_volume", json!({ "name": "bare" })).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.assert_says("install an OpenSSH client");
    refused.assert_says("Still being billed: no.");
    house.end_processes();
    let empty_path = std::mem::replace(&mut house.path, real_path);
    house.create("bare").await;
    house.end_processes();
    house.path = empty_path;
    let refused = house.call("start_tunnel", json!({ "pod": "bare", "local_port": 0 })).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.assert_says("no `ssh` was found on PATH");
    house.end().await;
}

/// What a client does that ends: its server's whole process group is killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_outlives_the_server_that_opened_it() {
    let house = House::hurried().await;
    let pod_id = house.create("outlives").await;
    // The server starts the keeper itself, so that the keeper would be in its group if it didn't leave it.
    house.end_processes();
    let mut server = house.program(&["serve"]).stdin(Stdio::piped()).process_group(0).spawn().expect("a server");
    let mut stdin = server.stdin.take().expect("stdin");
    let mut lines = BufReader::new(server.stdout.take().expect("stdout")).lines();
    let requests = [
        json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": { "name": "test", "version": "0" }
        } }),
        json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }),
        json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {
            "name": "start_tunnel", "arguments": { "pod": "outlives", "local_port": 0, "wait_seconds": 45 }
        } }),
    ];
    for request in requests {
        stdin.write_all(format!("{request}\n").as_bytes()).await.expect("a written line");
    }
    let answer = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let line = lines.next_line().await.expect("a line").expect("no end before the answer");
            let message: Value = serde_json::from_str(&line).expect("JSON");
            if message["id"] == 2 {
                break message;
            }
        }
    })
    .await
    .expect("an answer in time");
    let opened = &answer["result"]["structuredContent"];
    assert_eq!(opened["done"], true, "{answer}");
    let port = u16::try_from(opened["local_port"].as_u64().expect("a port")).expect("a port");
    let group = Pid::from_raw(i32::try_from(server.id().expect("a process id")).expect("a process id"));
    rustix::process::kill_process_group(group.expect("a process id"), Signal::KILL).expect("a killed group");
    server.wait().await.expect("its end");
    assert!(house.stats_through(port).await.is_some());
    let pods = house.ok("list_pods", json!({})).await;
    assert_eq!(pods["pods"][0]["pod_id"], pod_id, "{pods}");
    assert_eq!(pods["pods"][0]["tunnels"], json!([format!("http://127.0.0.1:{port}")]), "{pods}");
    let tunnel = house.tunnels().get("outlives:8188").expect("records").expect("a tunnel");
    assert_eq!((tunnel.known.state, tunnel.known.reconnects), (TunnelState::Healthy, 0));
    house.end().await;
}
