//! A pod of the world from a client's point of view: ssh to where the API says, ComfyUI through the tunnel and through
//! the HTTP proxy, files on the volume.

use std::path::Path;
use std::process::Stdio;

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_tungstenite::connect_async;

use super::{Tested, pod_body};
use crate::support::{program, userns};

/// What ssh needs to reach the pod's address as the API tells it, with a key made for the test.
fn ssh(folder: &Path, pod: &Value) -> Command {
    let mut command = Command::new("ssh");
    command.args(["-F", "none", "-T", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"]);
    command.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=10"]);
    command.arg("-i").arg(folder.join("key")).arg("-p").arg(pod["ssh"]["direct"]["port"].to_string());
    command.arg(format!("root@{}", pod["ssh"]["direct"]["host"].as_str().expect("a host")));
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// A create whose pod lets a new key of the folder in.
async fn body_with_key(folder: &Path) -> Value {
    let mut keygen = Command::new("ssh-keygen");
    let made = keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.join("key")).status();
    assert!(made.await.expect("ssh-keygen").success());
    let mut body = pod_body("inside");
    body["env"]["PUBLIC_KEY"] = json!(std::fs::read_to_string(folder.join("key.pub")).expect("a key"));
    body
}

#[tokio::test]
async fn a_pod_can_end_itself_from_inside() {
    if !userns::are_allowed() {
        return;
    }
    let world = Tested::new().await;
    let folder = world.folder.path().to_owned();
    let (_, pod) = world.post("/v2/pods", body_with_key(&folder).await).await;
    let id = pod["id"].as_str().expect("an id").to_owned();
    world.advance(7.0).await;
    let pod = world.pod(&id).await;
    // The pod's identity is with process 1 alone; the API is on the network that pod and machine share.
    let switch = format!(
        r#"test -z "$RUNPOD_POD_ID$RUNPOD_API_KEY" || exit 9
        export $(tr '\0' '\n' </proc/1/environ | grep ^RUNPOD_)
        body='{{"action":"terminate"}}'; url={}/v2/pods/$RUNPOD_POD_ID/action
        setsid sh -c 'sleep 0.2; if command -v curl; then
          curl -A switch -H "authorization: Bearer $RUNPOD_API_KEY" -H "content-type: application/json" -d "$1" "$2"
        else
          wget -U switch --header "authorization: Bearer $RUNPOD_API_KEY" --header "content-type: application/json" \
            -O- --post-data "$1" "$2"
        fi' sh "$body" "$url" >/tmp/switch.log 2>&1 & "#,
        world.sandbox.url()
    );
    let output = ssh(&folder, &pod).arg(switch).output().await.expect("ssh");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program::until("the pod to be gone", async || (world.inner_pod(&id).await["status"] == "TERMINATED").then_some(()))
        .await;
    let log = world.log().await;
    let last = log.iter().rfind(|entry| entry["operation"] == "podAction").expect("the switch's request");
    assert_eq!((&last["status"], &last["user_agent"]), (&json!(204), &json!("switch")));
    world.finish().await;
}

#[tokio::test]
async fn a_pod_is_reached_where_the_api_says() {
    let world = Tested::new().await;
    let folder = world.folder.path().to_owned();
    let mut body = body_with_key(&folder).await;
    body["mounts"] = json!({ "network": [{ "volumeId": "c0mfym0d3l", "path": "/workspace" }] });
    let (status, pod) = world.post("/v2/pods", body).await;
    assert_eq!(status, 201, "{pod}");
    let id = pod["id"].as_str().expect("an id").to_owned();
    world.advance(7.0).await;
    let pod = world.pod(&id).await;
    let output = ssh(&folder, &pod).arg("echo inside; exec cat >/dev/null").output().await.expect("ssh");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "inside\n", "{}", String::from_utf8_lossy(&output.stderr));

    let origin = format!("{}/_proxy/{id}-8188", world.sandbox.url());
    let stats: Value =
        world.client.get(format!("{origin}/system_stats")).send().await.expect("an answer").json().await.expect("JSON");
    assert!(stats["devices"][0]["name"].as_str().is_some_and(|name| name.contains("A4000")), "{stats}");
    let (mut socket, _) =
        connect_async(format!("{}/ws?clientId=a", origin.replace("http:", "ws:"))).await.expect("a WebSocket");
    let first = socket.next().await.expect("an event").expect("no error");
    assert!(first.to_text().expect("text").contains("status"), "{first}");
    let events = world.inner_pod(&id).await["events"].clone();
    assert!(!events.as_array().expect("events").is_empty());

    world.act(&id, "stop").await;
    assert!(socket.next().await.is_none_or(|event| event.is_err() || event.is_ok_and(|event| event.is_close())));
    let failed = ssh(&folder, &pod).arg("true").status().await.expect("ssh");
    assert_eq!(failed.code(), Some(255));
    assert!(
        world.inner_pod(&id).await["events"].as_array().expect("events").len()
            >= events.as_array().expect("events").len()
    );
    world.finish().await;
}
