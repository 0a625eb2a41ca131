//! One pod a name, whatever happens to the create.

use std::collections::BTreeSet;

use autopod_mcp::fleet::Phase;
use reqwest::Method;
use serde_json::{Value, json};

use crate::keeper_support::{House, answer, kill, until};

#[tokio::test(flavor = "multi_thread")]
async fn eight_processes_at_once_make_one_pod() {
    let house = House::new().await;
    let calls = (0..8).map(|_| {
        tokio::spawn(answer(house.command("create_pod_with_volume", &json!({ "name": "one", "wait_seconds": 40 }))))
    });
    let mut answers = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        answers.push(call.await.expect("a call"));
    }
    assert!(answers.iter().all(|answer| answer.code == 0), "{answers:?}");
    let ids: BTreeSet<_> = answers.iter().map(|answer| answer.value["pod_id"].to_string()).collect();
    let created = answers.iter().filter(|answer| answer.value["created"] == true).count();
    assert_eq!((ids.len(), created, house.asked("createPod")), (1, 1, 1), "{answers:?}");
    assert_eq!(house.alive().await.len(), 1);
    let processes = house.processes();
    assert_eq!((processes.guards.len(), processes.workers.len()), (1, 1), "{processes:?}");
    house.end().await;
}
