//! Our ssh against Debian's real sshd.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use autopod_mcp::ssh::{Cause, Forward, Ssh};
use axum::Router;
use axum::extract::WebSocketUpgrade;
use axum::extract::ws::WebSocket;
use axum::routing::get;
use futures_util::{SinkExt, StreamExt};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::keeper_support::{http, tell, until};

const SSHD: &str = "/usr/sbin/sshd";
const READY_WITHIN: Duration = Duration::from_secs(30);

/// One sshd on loopback, which ends with this value.
struct Sshd {
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

/// Whether there is an sshd to test with; without one the test is skipped, which is said.
fn there_is_an_sshd() -> bool {
    if Path::new(SSHD).exists() {
        return true;
    }
    let required = std::env::var("AUTOPOD_TEST_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|item| item == "sshd"), "sshd is required, but {SSHD} is not there");
    tell("skipped: there is no sshd, so ssh is not tried against a real one");
    false
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

impl Sshd {
    async fn start(authorized: &str) -> Self {
        // Where its privileged half locks itself up; a package that was never started has not made it.
        if rustix::process::getuid().is_root() {
            std::fs::create_dir_all("/run/sshd").expect("/run/sshd");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(folder.path().join("authorized_keys"), format!("{authorized}\n")).expect("a written file");
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
             UsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nAllowTcpForwarding yes\n",
            path("host_key"),
            path("authorized_keys"),
        );
        std::fs::write(folder.path().join("config"), config).expect("a written file");
        let mut sshd = Self { folder, port, child: None };
        sshd.begin().await;
        sshd
    }

    /// Starts it with a host key of its own for this start, as a pod has.
    async fn begin(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("its end");
        }
        let key = self.folder.path().join("host_key");
        let _ = std::fs::remove_file(&key);
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().await;
        assert!(made.expect("ssh-keygen").success());
        let mut command = Command::new(SSHD);
        command.args(["-D", "-e", "-f"]).arg(self.folder.path().join("config"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        self.child = Some(command.spawn().expect("sshd"));
        until("sshd", async || tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.ok()).await;
    }
}

fn ssh(folder: PathBuf) -> Ssh {
    let environment = ["PATH", "HOME"].iter().filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?)));
    Ssh { folder, environment: environment.collect() }
}

async fn user() -> String {
    let output = Command::new("id").arg("-un").output().await.expect("id");
    String::from_utf8(output.stdout).expect("a name").trim().to_owned()
}

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
    let forward = Forward {
        user: user().await,
        host: "127.0.0.1".to_owned(),
        port: sshd.port,
        host_key_alias: "autopod-real-1".to_owned(),
        local_port: free_port(),
        remote_port,
    };

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
    let next = Forward { host_key_alias: "autopod-real-2".to_owned(), ..forward.clone() };
    let mut tunnel = ours.forward(&next).expect("ssh");
    tunnel.ready(READY_WITHIN).await.expect("a tunnel");

    // sshd dies under it: with the sessions, as a container that ends takes them along.
    tunnel.stop().await;
    sshd.child.take().expect("sshd").kill().await.expect("its end");
    let mut nobody = ours.forward(&next).expect("ssh");
    assert_eq!(nobody.ready(READY_WITHIN).await, Err(Cause::SshdNotUp));
}
