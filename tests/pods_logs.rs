//! What a pod has said, and what it says from now on.

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::keeper_support::{House, PATIENCE, until};

#[tokio::test(flavor = "multi_thread")]
async fn the_last_lines_are_read_oldest_first() {
    let house = House::hurried().await;
    house.create("talks").await;
    let logs = until("all of its lines", async || {
        let logs = house.ok("pod_logs", json!({ "pod": "talks" })).await;
        logs["lines"].as_array()?.last()?.as_str()?.contains("To see the GUI").then_some(logs)
    })
    .await;
    let lines: Vec<_> = logs["lines"].as_array().expect("lines").iter().filter_map(|line| line.as_str()).collect();
    let at = |what: &str| lines.iter().position(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {logs}"));
    assert!(at("create container") < at("start container") && at("start container") < at("sshd listens"), "{logs}");
    assert_eq!((&logs["more"], &logs["cut"]), (&json!(false), &json!(0)), "{logs}");

    let last = house.ok("pod_logs", json!({ "pod": "talks", "tail": 1, "source": "container" })).await;
    assert_eq!(last["lines"], json!([lines[lines.len() - 1]]), "{last}");
    let system = house.ok("pod_logs", json!({ "since": "2000-01-01T00:00:00Z", "source": "system" })).await;
    let system = system["lines"].as_array().expect("lines");
    assert!(!system.is_empty() && system.iter().all(|line| line.as_str().is_some_and(|l| l.contains(" system "))));
    let both = house.call("pod_logs", json!({ "pod": "talks", "tail": 1, "since": "10m" })).await;
    assert_eq!(both.code, 2, "{both:?}");
    assert_eq!(house.call("pod_logs", json!({ "pod": "nobody" })).await.code, 3);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_pod_is_followed_to_its_end() {
    let house = House::hurried().await;
    house.create("talks").await;
    let mut follower = house.program(&["pod", "logs", "talks", "--follow"]).spawn().expect("the program");
    let mut lines = BufReader::new(follower.stdout.take().expect("stdout")).lines();
    let mut until_told = async |what: &str| {
        tokio::time::timeout(PATIENCE, async {
            while let Some(line) = lines.next_line().await.expect("text") {
                if line.contains(what) {
                    return;
                }
            }
            panic!("it ended before it told `{what}`");
        })
        .await
        .expect("it tells it");
    };
    until_told("start container").await;
    house.ok("control_pod", json!({ "pod": "talks", "action": "restart" })).await;
    until_told("restart container").await;
    house.ok("terminate_pod", json!({ "pod": "talks" })).await;
    let ended = tokio::time::timeout(PATIENCE, follower.wait()).await.expect("its end").expect("a status");
    assert_eq!(ended.code(), Some(0));
    house.end().await;
}
