//! kill -9 at every named step of create, action, extend and terminate, of the caller and of the keeper's worker, with
//! and without anything that is started later: the deadline is kept, nothing is lost, no pod is made twice.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{ActionState, ActionWish, Changed, Phase, PodRecord, new_intent};
use autopod_mcp::provider::PodAction;
use autopod_mcp::{steps, tools};
use futures_util::StreamExt;
use jiff::{SignedDuration, Timestamp};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::keeper_support::{Answer, House, answer, signal, tell, until};
use crate::support::userns;

const POD: &str = "killed";
/// Beyond every deadline here by the provider's clock.
const LONG_AFTER: f64 = 30.0 * 3600.0;

/// A home in which whoever comes first to a step is killed there.
struct Dying {
    house: House,
    step: &'static str,
    mark: PathBuf,
}

impl Dying {
    async fn at(step: &'static str) -> Self {
        let house = House::hurried().await;
        let mark = house.folder().join("died");
        Self { house, step, mark }
    }

    /// A call that dies there itself, or whose keeper does.
    fn command(&self, tool: &str, arguments: &Value) -> Command {
        let mut command = self.house.command(tool, arguments);
        command.env("AUTOPOD_DIE_AT", format!("{}={}", self.step, self.mark.display()));
        command
    }

    async fn call(&self, tool: &str, arguments: Value) -> Answer {
        let answer = answer(self.command(tool, &arguments)).await;
        if self.step.starts_with("caller: ") {
            assert_eq!(answer.code, -1, "{} was not killed: {answer:?}", self.step);
        }
        answer
    }

    async fn until_dead(&self) {
        until(&format!("the death at `{}`", self.step), async || self.mark.exists().then_some(())).await;
    }

    /// The guard has put another worker in the place of the one that died, which lives on.
    async fn until_replaced(&self) {
        self.until_dead().await;
        until("one guard and one worker", async || {
            let found = self.house.processes();
            let lives = self.house.worker().is_some_and(|worker| found.workers == [worker]);
            (lives && found.guards.len() == 1).then_some(())
        })
        .await;
    }

    fn record(&self) -> Option<PodRecord> {
        let mut records = self.house.fleet().read().expect("readable records");
        assert!(records.len() <= 1, "{}: {records:?}", self.step);
        records.remove(POD)
    }

    async fn until_record(&self, what: &str, is_so: impl Fn(&PodRecord) -> bool) -> PodRecord {
        let what = format!("{what} after the death at `{}`", self.step);
        until(&what, async || self.record().filter(|record| is_so(record))).await
    }

    /// A pod that runs and whose switch is armed, and no keeper.
    async fn with_pod(step: &'static str) -> (Self, PodRecord) {
        let dying = Self::at(step).await;
        dying.house.create(POD).await;
        let record = dying.until_record("an armed switch", |record| record.known.inside.switch_until.is_some()).await;
        dying.house.end_processes();
        (dying, record)
    }

    /// What only looks, and starts a keeper where one is wanted.
    async fn later_start(&self, is_there: bool) {
        if is_there {
            self.house.ok("list_pods", json!({})).await;
        }
    }

    /// The caller dies after its wish was written: a keeper that lives carries it out, or the next one.
    async fn caller_of_control_pod(&self, action: &str, later_start: bool) {
        if !later_start {
            self.house.keeper().ensure_and_wake().await.expect("a keeper");
        }
        self.call("control_pod", json!({ "pod": POD, "action": action })).await;
        self.until_dead().await;
        self.later_start(later_start).await;
    }

    /// Its deadline is kept though nobody asks for anything, and one POST is all that was ever sent.
    async fn ends_in_time(self, posts: usize, alive: usize) {
        let house = &self.house;
        assert_eq!((house.asked("createPod"), house.alive().await.len()), (posts, alive), "{}", self.step);
        house.advance(LONG_AFTER).await;
        house.until_none_alive(&format!("the deadline after the death at `{}`", self.step)).await;
        self.until_record("a closed record", |record| !record.is_open()).await;
        assert_eq!(house.asked("createPod"), posts, "{}", self.step);
        self.house.end().await;
    }
}

async fn create_dies_at(step: &'static str, later_start: bool) {
    let dying = Dying::at(step).await;
    let wait = if step == "keeper: create journaled" { 5 } else { 45 };
    let answer = dying.call("create_pod_with_volume", json!({ "name": POD, "wait_seconds": wait })).await;
    dying.until_dead().await;
    match step {
        "caller: create resolved" | "caller: create wanted" => {
            let left = dying.house.processes();
            assert!(left.guards.is_empty() && left.workers.is_empty(), "who was to start the keeper died: {left:?}");
            assert_eq!(dying.house.asked("createPod"), 0);
            dying.later_start(later_start).await;
            let is_wanted = step == "caller: create wanted";
            assert_eq!(dying.record().is_some(), is_wanted);
            if !(later_start && is_wanted) {
                // Nobody is there who could make it, and nothing is billed.
                assert_eq!(dying.house.asked("createPod"), 0);
                return dying.house.end().await;
            }
        }
        "caller: keeper woken" => dying.later_start(later_start).await,
        _ => {
            assert_eq!(answer.code, 0, "{step}: {answer:?}");
            dying.until_replaced().await;
            dying.later_start(later_start).await;
        }
    }
    if step == "keeper: create journaled" {
        // Whether it was sent nobody knows, so it is never sent again, and its money stays set aside.
        let record = dying.until_record("a look at the list", |record| record.known.lacked.is_some()).await;
        assert!(record.is_unknown() && record.reserved_per_hour() > 0.0, "{record:?}");
        return dying.ends_in_time(0, 0).await;
    }
    dying.until_record("the pod", |record| record.known.pod_id.is_some()).await;
    dying.ends_in_time(1, 1).await;
}

/// An action is sent at most once, and what came of it is told.
async fn action_dies_at(step: &'static str, later_start: bool) {
    let (dying, record) = Dying::with_pod(step).await;
    if step == "caller: action wanted" {
        dying.caller_of_control_pod("stop", later_start).await;
    } else {
        let wish = ActionWish { id: new_intent(), action: PodAction::Stop, requested_at: Timestamp::now() };
        let changed = dying.house.fleet().want_action(&record.intent, wish, &Limits::default()).await;
        assert!(matches!(changed, Ok(Changed::Written(_))), "{changed:?}");
        dying.call("list_pods", json!({})).await;
        dying.until_replaced().await;
        dying.later_start(later_start).await;
    }
    let settled =
        |record: &PodRecord| record.known.action.as_ref().is_some_and(|known| known.state != ActionState::Sent);
    let action = dying.until_record("a settled action", settled).await.known.action.expect("it was settled");
    let (state, sent) = match step {
        "keeper: action journaled" => (ActionState::Unclear, 0),
        "keeper: action answered" => (ActionState::Unclear, 1),
        _ => (ActionState::Done, 1),
    };
    assert_eq!((action.state, dying.house.asked("podAction")), (state, sent), "{step}");
    assert_eq!(action.problem.is_some(), state == ActionState::Unclear, "{step}: {action:?}");
    dying.ends_in_time(1, 1).await;
}

async fn extend_dies_at(step: &'static str, later_start: bool) {
    let (dying, record) = Dying::with_pod(step).await;
    let before = record.expires_at();
    let until = before + SignedDuration::from_hours(1);
    if step == "caller: extend wanted" {
        dying.caller_of_control_pod("extend", later_start).await;
    } else {
        let changed = dying.house.fleet().want_extended(&record.intent, until, &Limits::default()).await;
        assert!(matches!(changed, Ok(Changed::Written(_))), "{changed:?}");
        dying.call("list_pods", json!({})).await;
        dying.until_replaced().await;
        dying.later_start(later_start).await;
    }
    let moved = |record: &PodRecord| record.expires_at() == until && record.known.inside.switch_until == Some(until);
    dying.until_record("a later deadline", moved).await;
    // It lives past the old one.
    let now = dying.house.raw(reqwest::Method::GET, "/_sandbox/clock", None).await.1["now"].clone();
    let now: Timestamp = now.as_str().and_then(|now| now.parse().ok()).expect("a time");
    dying.house.advance(before.duration_since(now).as_secs_f64() + 600.0).await;
    let seen = before + SignedDuration::from_mins(5);
    dying.until_record("a look past the old deadline", |record| record.known.cost_counted_at > Some(seen)).await;
    dying.ends_in_time(1, 1).await;
}

async fn terminate_dies_at(step: &'static str, later_start: bool) {
    let (dying, _) = Dying::with_pod(step).await;
    let house = &dying.house;
    let arguments = json!({ "pod": POD, "wait_seconds": 45 });
    match step {
        // With the keeper dead too only what is started later can end it.
        "caller: terminate wanted" => {
            if !later_start {
                house.keeper().ensure_and_wake().await.expect("a keeper");
            }
            dying.call("terminate_pod", arguments).await;
            dying.later_start(later_start).await;
        }
        "caller: deleted without keeper" => {
            house.keeper().ensure_and_wake().await.expect("a keeper");
            let worker = house.until_worker().await;
            signal(worker, Signal::STOP);
            dying.call("terminate_pod", arguments).await;
            assert_eq!(house.alive().await.len(), 0, "the tool itself ended it");
            signal(worker, Signal::CONT);
            dying.later_start(later_start).await;
        }
        _ => {
            let done = dying.call("terminate_pod", arguments).await;
            assert_eq!((done.code, &done.value["done"]), (0, &json!(true)), "{step}: {done:?}");
            dying.until_replaced().await;
            dying.later_start(later_start).await;
        }
    }
    dying.until_dead().await;
    house.until_none_alive(&format!("the end after the death at `{step}`")).await;
    let record = dying.until_record("a closed record", |record| !record.is_open()).await;
    assert_eq!((record.known.phase, house.asked("createPod")), (Phase::Gone, 1), "{step}");
    dying.house.end().await;
}

/// False for a step that can't be come to here, which is told.
async fn dies_at(step: &'static str, later_start: bool) -> bool {
    match step {
        "caller: create resolved" | "caller: create wanted" | "caller: keeper woken" => {
            create_dies_at(step, later_start).await;
        }
        _ if step.starts_with("keeper: create ") => create_dies_at(step, later_start).await,
        _ if step.starts_with("keeper: action ") => action_dies_at(step, later_start).await,
        "caller: action wanted" | "caller: extend wanted" if tools::find("control_pod").is_none() => return false,
        "caller: action wanted" => action_dies_at(step, later_start).await,
        "caller: extend wanted" | "keeper: switch moved" | "keeper: extend recorded" => {
            extend_dies_at(step, later_start).await;
        }
        _ => terminate_dies_at(step, later_start).await,
    }
    true
}

/// How often each step was died at. The worlds work several at a time.
pub async fn at_each_step(rounds: usize, both: bool, at_once: usize) -> BTreeMap<&'static str, usize> {
    let kills = (0..rounds).flat_map(|round| {
        let steps = steps::ALL.iter().enumerate();
        steps.flat_map(move |(index, step)| {
            let first = (index + round) % 2 == 0;
            let starts = if both { vec![first, !first] } else { vec![first] };
            starts.into_iter().map(move |later_start| (*step, later_start))
        })
    });
    let done = futures_util::stream::iter(kills).map(async |(step, later_start)| {
        let hit = tokio::time::timeout(Duration::from_secs(150), dies_at(step, later_start)).await;
        (step, hit.unwrap_or_else(|_| panic!("`{step}`, later start: {later_start}: it goes on and on")))
    });
    let mut hits = BTreeMap::new();
    let mut done = std::pin::pin!(done.buffer_unordered(at_once));
    while let Some((step, hit)) = done.next().await {
        if hit {
            *hits.entry(step).or_insert(0) += 1;
        }
    }
    hits
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_any_step_loses_nothing() {
    if !userns::are_allowed() {
        return;
    }
    let hits = at_each_step(1, false, 8).await;
    tell(&format!("deaths by step: {hits:?}"));
}
