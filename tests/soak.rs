//! The same scenarios as in `tests/main.rs`, many times over. Not part of `cargo test`; run with
//! `cargo test --release --test soak`.

mod create_faults;
mod keeper_create;
mod keeper_kills;
mod keeper_records;
mod keeper_support;
mod kill_steps;
/// Of `tests/support`, what the scenarios need.
mod support {
    pub mod http;
    pub mod openapi;
    pub mod program;
    pub mod userns;
}

use serde_json::json;

use keeper_support::tell;

/// How many worlds work at the same time.
const AT_ONCE: usize = 4;
const ROUNDS: usize = 15;

#[tokio::test(flavor = "multi_thread")]
async fn soak_creates_without_a_clear_answer() {
    let adopted = [
        json!({ "operation": "createPod", "kind": "status_after", "status": 500 }),
        json!({ "operation": "createPod", "kind": "reset_after" }),
        json!({ "operation": "createPod", "kind": "garbage" }),
        json!({ "operation": "createPod", "kind": "hang_after" }),
    ];
    let unknown = [
        json!({ "operation": "createPod", "kind": "status_before", "status": 500 }),
        json!({ "operation": "createPod", "kind": "reset_before" }),
        json!({ "operation": "createPod", "kind": "hang_before" }),
    ];
    for _ in 0..ROUNDS {
        for faults in adopted.chunks(AT_ONCE) {
            futures_util::future::join_all(faults.iter().cloned().map(keeper_create::is_adopted_after)).await;
        }
        futures_util::future::join_all(unknown.iter().cloned().map(keeper_create::stays_unknown_after)).await;
    }
    let (adopted, unknown) = (adopted.len() * ROUNDS, unknown.len() * ROUNDS);
    tell(&format!("creates: {adopted} committed, all adopted; {unknown} not committed, none POSTed twice"));
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_create_faults() {
    create_faults::matrix(0..100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_kills() {
    keeper_kills::killed_at_random(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_records() {
    keeper_records::changed_by_many_and_killed(40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_idle_ends() {
    keeper_records::wishes_at_an_idle_end(2000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_deaths_at_each_step() {
    assert!(support::userns::are_allowed(), "a pod's own switch can't be moved without namespaces");
    let hits = kill_steps::at_each_step(6, true, AT_ONCE).await;
    tell(&format!("deaths by step: {hits:?}"));
    assert!(hits.values().sum::<usize>() >= 200, "{hits:?}");
    assert!(hits.values().all(|hits| *hits >= 5), "{hits:?}");
}
