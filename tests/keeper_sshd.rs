//! Our ssh against Debian's real sshd.

use std::time::Duration;

use autopod_mcp::ssh::{Cause, Forward};
use axum::Router;
use axum::extract::WebSocketUpgrade;
use axum::extract::ws::WebSocket;
use axum::routing::get;
use futures_util::{SinkExt, StreamExt};

use crate::keeper_support::http;
use crate::ssh_support::{Sshd, free_port, ssh, there_is_an_sshd};

const READY_WITHIN: Duration = Duration::from_secs(30);

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if socket.send(message).await.is_err() {
            return;
        }
    }
}

/// Stands for what runs in the pod.
async fn far_end() -> u16 {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let upgrade = |upgrade: WebSocketUpgrade| async { upgrade.on_upgrade(echo) };
    let routes = Router::new().route("/", get(async || "through")).route("/ws", get(upgrade));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_sshd_forwards_and_its_refusals_are_told_apart() {
    if !there_is_an_sshd() {
        return;
    }
    let home = tempfile::tempdir().expect("a temporary folder");
    let ours = ssh(home.path().join("a b%c"));
    let mut sshd = Sshd::start(&ours.public_key().await.expect("a key")).await;
    let remote_port = far_end().await;
    let forward = Forward { target: sshd.target("autopod-real-1").await, local_port: free_port(), remote_port };

    let mut tunnel = ours.forward(&forward).expect("ssh");
    tunnel.ready(READY_WITHIN).await.expect("a tunnel");
    let text = http().get(format!("http://127.0.0.1:{}/", forward.local_port)).send().await.expect("an answer");
    assert_eq!(text.text().await.expect("a body"), "through");
    let url = format!("ws://127.0.0.1:{}/ws", forward.local_port);
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await.expect("a WebSocket");
    socket.send("there and back".into()).await.expect("a sent message");
    let back = socket.next().await.expect("a message").expect("no error");
    assert_eq!(back.to_text().expect("text"), "there and back");
    drop(socket);

    // A second one on the same port of ours.
    let mut second = ours.forward(&forward).expect("ssh");
    assert_eq!(second.ready(READY_WITHIN).await, Err(Cause::PortInUse));
    tunnel.stop().await;

    let strange = ssh(home.path().join("strange"));
    strange.public_key().await.expect("a key");
    let mut refused = strange.forward(&forward).expect("ssh");
    assert_eq!(refused.ready(READY_WITHIN).await, Err(Cause::KeyRefused));

    sshd.begin().await;
    let mut changed = ours.forward(&forward).expect("ssh");
    assert_eq!(changed.ready(READY_WITHIN).await, Err(Cause::HostKeyChanged));
    // Another start has another name.
    let next = Forward { target: sshd.target("autopod-real-2").await, ..forward.clone() };
    let mut tunnel = ours.forward(&next).expect("ssh");
    tunnel.ready(READY_WITHIN).await.expect("a tunnel");

    // sshd dies under it: with the sessions, as a container that ends takes them along.
    tunnel.stop().await;
    sshd.child.take().expect("sshd").kill().await.expect("its end");
    let mut nobody = ours.forward(&next).expect("ssh");
    assert_eq!(nobody.ready(READY_WITHIN).await, Err(Cause::SshdNotUp));
}
