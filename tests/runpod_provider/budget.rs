//! The rate budget: quotas that are told are kept to before anybody is refused, by all processes of a home.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use autopod_mcp::provider::{GpuProvider, ProviderError};
use autopod_mcp::runpod::{RunPod, RunPodTimeouts, SharedBudget};

use super::script::{Script, Step, answer, json, problem, quick, with_budget};
use super::{POD, spec};

/// A server with a quota for each window of some seconds, that refuses what is beyond it.
struct Limited {
    script: Script,
    refused: Arc<Mutex<usize>>,
}

impl Limited {
    async fn to(quota: usize, window: Duration) -> Self {
        let refused = Arc::new(Mutex::new(0));
        let counter = refused.clone();
        let state = Mutex::new((Instant::now(), 0));
        let script = Script::answering(move |request| {
            let mut state = state.lock().unwrap();
            if state.0.elapsed() >= window {
                *state = (Instant::now(), 0);
            }
            let seconds = (window.saturating_sub(state.0.elapsed())).as_secs_f64().ceil();
            let headers = |left: usize| {
                let length = window.as_secs();
                format!(
                    "RateLimit: \"minute\";r={left};t={seconds}\r\nRateLimit-Policy: \"minute\";q={quota};w={length}\r\n"
                )
            };
            if state.1 == quota {
                *counter.lock().unwrap() += 1;
                return problem(429, &format!("{}Retry-After: {seconds}\r\n", headers(0)), "{}");
            }
            state.1 += 1;
            match request.method.as_str() {
                "DELETE" => answer(204, &headers(quota - state.1), ""),
                _ => answer(200, &headers(quota - state.1), POD),
            }
        });
        Self { script: script.await, refused }
    }

    fn refused(&self) -> usize {
        *self.refused.lock().unwrap()
    }
}

fn budget_in(folder: &std::path::Path) -> SharedBudget {
    SharedBudget { file: folder.join("rate-limit.json"), lock: folder.join("locks/rate-limit") }
}

/// Waits that long for room, and has time to spare for the request itself.
fn patient_for(wait: Duration) -> RunPodTimeouts {
    let connect = Duration::from_secs(5);
    RunPodTimeouts { total: wait + connect, connect, create: wait, ..quick() }
}

async fn storm(clients: [RunPod; 2], calls: usize) -> Vec<Result<(), ProviderError>> {
    let clients = clients.map(Arc::new);
    let tasks: Vec<_> = (0..calls)
        .map(|number| {
            let client = clients[number % 2].clone();
            tokio::spawn(async move { client.pod("p1").await.map(drop) })
        })
        .collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}

#[tokio::test]
async fn two_clients_of_a_home_stay_below_the_quota_and_leave_a_reserve() {
    let folder = tempfile::tempdir().unwrap();
    let server = Limited::to(60, Duration::from_secs(60)).await;
    let client = || with_budget(&server.script.url, patient_for(Duration::from_secs(1)), budget_in(folder.path()));
    let results = storm([client(), client()], 200).await;
    let done = results.iter().filter(|result| result.is_ok()).count();
    let limited = |error: &ProviderError| matches!(error, ProviderError::RateLimited { .. });
    assert!(results.iter().all(|result| result.as_ref().err().is_none_or(limited)), "{results:?}");
    assert!((30..=56).contains(&done), "{done}");
    // Who waited for others' answers may have run out of time; one call after the other uses up what there is.
    let last = client();
    while last.pod("p1").await.is_ok() {}
    assert_eq!((server.script.requests().len(), server.refused()), (56, 0), "what was held back was never sent");

    // A third process knows it from the first moment; a create is refused before it is sent, an ending goes through.
    let started = Instant::now();
    let third = client();
    let error = third.create_pod(&spec()).await.unwrap_err();
    assert!(matches!(error, ProviderError::RateLimited { .. }) && !error.may_have_happened(), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "it is known at once that the wait would be too long");
    for _ in 0..4 {
        third.delete_pod("p1").await.unwrap();
    }
    assert_eq!((server.script.requests().len(), server.refused()), (60, 0));
}

#[tokio::test]
async fn a_short_wait_is_waited_for_window_after_window() {
    let folder = tempfile::tempdir().unwrap();
    let server = Limited::to(24, Duration::from_secs(1)).await;
    let client = || with_budget(&server.script.url, patient_for(Duration::from_secs(20)), budget_in(folder.path()));
    let results = storm([client(), client()], 60).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!((server.script.requests().len(), server.refused()), (60, 0));
}

#[tokio::test]
async fn a_refusal_holds_the_others_of_the_home_back_too() {
    let folder = tempfile::tempdir().unwrap();
    let server = Script::start([problem(429, "Retry-After: 30\r\n", "{}"), json(200, POD), answer(204, "", "")]).await;
    let client = |total| with_budget(&server.url, patient_for(total), budget_in(folder.path()));
    client(Duration::from_secs(1)).pod("p1").await.unwrap_err();
    let other = client(Duration::from_secs(1));
    assert!(matches!(other.pods().await, Err(ProviderError::RateLimited { .. })));
    assert_eq!(server.requests().len(), 1);
    // An ending is sent whatever is known.
    other.delete_pod("p1").await.unwrap();
    assert_eq!(server.requests().len(), 2);
    // Another key is another account.
    super::script::client_with_key(&server.url, quick(), "rpa_ANOTHERKEY").delete_pod("p1").await.unwrap();
}

#[tokio::test]
async fn garbage_in_headers_and_files_holds_nobody_back() {
    let garbage = [
        "\"minute\"",
        "minute;r=;t=",
        "\"minute\";r=-1;t=5",
        "\"minute\";r=0",
        "\"minute\";t=9",
        ";;;,,,==",
        "\"minute\";r=0.5;t=1",
        "\"\";r=0;t=60",
        "\"min\u{fc}te\";r=0;t=60",
        "\"minute\";r=99999999999999999999999;t=1",
    ];
    let steps: Vec<Step> = garbage
        .iter()
        .map(|text| answer(200, &format!("RateLimit: {text}\r\nRateLimit-Policy: {text}\r\n"), POD))
        .collect();
    let count = steps.len();
    let server = Script::start(steps).await;
    let folder = tempfile::tempdir().unwrap();
    let budget = budget_in(folder.path());
    for (number, content) in (0..count).zip(["", "{", "[]", "{\"windows\":7}", "null"].into_iter().cycle()) {
        std::fs::write(&budget.file, content).unwrap();
        with_budget(&server.url, patient_for(Duration::from_millis(900)), budget.clone()).pod("p1").await.unwrap();
        assert_eq!(server.requests().len(), number + 1);
    }
}

#[tokio::test]
async fn a_place_that_can_not_be_written_does_no_harm() {
    let server = Limited::to(12, Duration::from_secs(60)).await;
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    let client = |budget| with_budget(&server.script.url, patient_for(Duration::from_millis(500)), budget);
    // A home that was removed is not made anew.
    client(budget_in(&gone)).pod("p1").await.unwrap();
    assert!(!gone.exists());
    // Where nothing can be written each client still keeps to what it was told itself.
    let full = SharedBudget { file: "/dev/null/rate-limit.json".into(), lock: "/dev/null/lock".into() };
    let blocked = SharedBudget { file: folder.path().to_owned(), lock: folder.path().join("lock") };
    for budget in [full, blocked] {
        client(budget.clone()).pod("p1").await.unwrap();
    }
    let alone = client(SharedBudget { file: "/dev/full".into(), lock: "/dev/full".into() });
    let results = storm_of(&alone, 20).await;
    assert!(results.contains(&false) && results.contains(&true) && server.refused() == 0, "{results:?}");
}

async fn storm_of(client: &RunPod, calls: usize) -> Vec<bool> {
    let calls = (0..calls).map(|_| client.pod("p1"));
    futures_util::future::join_all(calls).await.iter().map(Result::is_ok).collect()
}
