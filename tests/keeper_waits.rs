//! What an ending must not wait for, and what must not end a pod: answers that never come, a lock that somebody holds
//! on to, a clock that is wrong.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{ActionState, ActionWish, Changed, PodRecord, new_intent};
use autopod_mcp::provider::PodAction;
use autopod_mcp::state::Lock;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::keeper_lies::Lied;
use crate::keeper_support::{House, until};

const HOUR: SignedDuration = SignedDuration::from_hours(1);

async fn honest() -> Lied {
    Lied::to(House::new().await, |_, _| {}).await
}

async fn act(lied: &Lied, record: &PodRecord, action: PodAction, requested_at: Timestamp) {
    let wish = ActionWish { id: new_intent(), action, requested_at };
    let written = lied.house.fleet().want_action(&record.intent, wish, &Limits::default()).await.expect("records");
    assert!(matches!(written, Changed::Written(_)), "{written:?}");
}

/// The other pod's task waits for a list that never comes while this one's has just changed what the list would say.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_was_acted_on_ends_though_the_list_hangs() {
    let lied = honest().await;
    lied.wish("other", HOUR).await;
    lied.wish("acted", HOUR).await;
    lied.placed("other").await;
    let record = lied.placed("acted").await;
    until("a pod that runs", async || lied.house.fleet().get("acted").ok()??.known.ssh).await;
    lied.house.fault(json!({ "operation": "podAction", "kind": "delay_ms", "delay_ms": 2500 })).await;
    act(&lied, &record, PodAction::Stop, Timestamp::now()).await;
    until("the action", async || (lied.house.asked("podAction") == 1).then_some(())).await;
    let silent = lied.silence.lists.clone().write_owned().await;
    until("its answer", async || {
        let known = lied.house.fleet().get("acted").ok()??.known.action?;
        (known.state == ActionState::Done).then_some(())
    })
    .await;
    lied.house.fleet().want_gone(&record.intent).await.expect("written");
    until("its end", async || (lied.house.alive().await.len() == 1).then_some(())).await;
    drop(silent);
    lied.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_though_the_pods_own_page_hangs() {
    let lied = honest().await;
    lied.house.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": 600, "times": 1000 })).await;
    let silent = lied.silence.pages.clone().write_owned().await;
    lied.wish("quiet", SignedDuration::from_secs(4)).await;
    lied.placed("quiet").await;
    lied.house.until_none_alive("the deadline").await;
    drop(silent);
    lied.end().await;
}

/// Another process of ours hangs while it holds the lock over the records.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_while_the_records_are_locked_and_is_told_once() {
    let lied = honest().await;
    lied.wish("locked", SignedDuration::from_secs(4)).await;
    lied.placed("locked").await;
    let lock = Lock::take(&lied.house.home().lock("state"), Duration::from_secs(5)).expect("the lock");
    let held_since = Instant::now();
    lied.house.until_none_alive("the deadline").await;
    assert!(held_since.elapsed() < Duration::from_secs(4 + 7), "it took {:?}", held_since.elapsed());
    // Nothing of it can be recorded, however often it is tried.
    let deletes = lied.house.asked("deletePod");
    until("another look for proof", async || (lied.house.asked("deletePod") > deletes + 1).then_some(())).await;
    drop(lock);
    lied.closed("locked").await;
    let audit = std::fs::read_to_string(lied.house.home.join("audit.jsonl")).expect("the audit log");
    let told: Vec<Value> = audit.lines().map(|line| serde_json::from_str(line).expect("a line")).collect();
    let endings = told.iter().filter(|line| line["event"] == "ending").count();
    assert_eq!(endings, 1, "{audit}");
    lied.end().await;
}

/// A hung process that holds the lock keeps nobody from ending a pod by hand either.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_terminated_while_the_records_are_locked() {
    let house = House::new().await;
    let id = house.create("locked").await;
    house.end_processes();
    let lock = Lock::take(&house.home().lock("state"), Duration::from_secs(5)).expect("the lock");
    let ended = house.ok("terminate_pod", json!({ "pod": "locked" })).await;
    assert_eq!(
        (&ended["pod_id"], &ended["state"], &ended["still_billing"]),
        (&json!(id), &json!("gone"), &json!("no"))
    );
    assert!(ended["warning"].as_str().is_some_and(|text| text.contains("could not be written")), "{ended}");
    drop(lock);
    house.end().await;
}

/// One answer comes from a machine, a proxy say, that is a day ahead.
#[tokio::test(flavor = "multi_thread")]
async fn one_wrong_date_ends_no_pod_and_costs_nothing() {
    let answers = Arc::new(AtomicUsize::new(0));
    let heard = answers.clone();
    let lied = Lied::to(House::new().await, move |_, date| {
        if heard.fetch_add(1, Ordering::Relaxed) % 4 == 3 {
            *date = Some(Timestamp::now() + HOUR * 24);
        }
    })
    .await;
    lied.wish("kept", HOUR).await;
    lied.placed("kept").await;
    until("some wrong answers", async || (answers.load(Ordering::Relaxed) >= 13).then_some(())).await;
    let record = lied.placed("kept").await;
    assert!(record.is_open() && !record.is_ending(), "{record:?}");
    assert!(record.known.cost_usd < 0.1 && record.known.cost_by_day.len() <= 2, "{:?}", record.known);
    assert!(record.expires_at() < Timestamp::now() + HOUR + SignedDuration::from_mins(2), "{record:?}");
    lied.end().await;
}

/// Our clock is nine hours behind the provider's, and the keeper has heard nothing of it when the wish comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_set_by_the_providers_clock_though_ours_is_wrong() {
    let house = House::new().await;
    house.advance(9.0 * 3600.0).await;
    let lied = Lied::to(house, |_, _| {}).await;
    lied.wish("far", HOUR).await;
    lied.placed("far").await;
    let looks = lied.house.asked("listPods");
    until("some looks at it", async || (lied.house.asked("listPods") > looks + 3).then_some(())).await;
    let record = lied.placed("far").await;
    assert!(record.is_open() && !record.is_ending(), "{record:?}");
    let left = record.expires_at().duration_since(Timestamp::now() + HOUR * 9);
    assert!(left > SignedDuration::from_mins(50) && left < SignedDuration::from_mins(65), "{left:?}");
    assert!(record.known.cost_usd < 0.1, "{:?}", record.known);
    // The leap over it is the deadline all the same.
    lied.house.advance(3600.0).await;
    lied.house.until_none_alive("the deadline").await;
    lied.end().await;
}

/// The wish lay about, its keeper dead: nobody expects the pod to restart under somebody's hands now.
#[tokio::test(flavor = "multi_thread")]
async fn an_action_of_long_ago_is_not_sent() {
    let lied = honest().await;
    lied.wish("old", HOUR).await;
    let record = lied.placed("old").await;
    act(&lied, &record, PodAction::Restart, Timestamp::now() - HOUR).await;
    let known = until("its refusal", async || {
        lied.house.fleet().get("old").ok()??.known.action.filter(|known| known.state == ActionState::Refused)
    })
    .await;
    let problem = known.problem.unwrap_or_default();
    assert_eq!(problem, "it was asked for 60 minutes ago and not sent in time; ask again");
    assert_eq!(lied.house.asked("podAction"), 0);
    lied.end().await;
}

/// Each pod may cost what was agreed to, and both together more than the caps allow.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_dearer_than_what_was_set_aside_ends_when_the_caps_have_no_room_for_it() {
    let house = House::new().await;
    std::fs::create_dir_all(&house.home).expect("a home");
    let config = json!({ "limits": { "max_total_per_hour": 0.6 } });
    std::fs::write(house.home.join("config.json"), config.to_string()).expect("written");
    let dear = Arc::new(Mutex::new(String::new()));
    let name = dear.clone();
    let lied = Lied::to(house, move |pod, _| {
        if *name.lock().expect("no panic") == pod.name {
            pod.cost_per_hour = 0.40;
        }
    })
    .await;
    lied.wish("cheap", HOUR).await;
    lied.placed("cheap").await;
    let wish = lied.house.wish(HOUR);
    *dear.lock().expect("no panic") = wish.cloud_name("dear");
    lied.house.fleet().ensure("dear", wish, &Limits::default()).await.expect("a record");
    let record = lied.closed("dear").await;
    let cause = record.known.ending_cause.unwrap_or_default();
    assert!(cause.starts_with("$0.25/h were set aside for it, and it may cost $0.40/h beside the $0.25/h"), "{cause}");
    assert_eq!(lied.house.alive().await.len(), 1);
    lied.end().await;
}
