//! The pod's own switch from end to end: the keeper arms it in a real container over real ssh, everything of ours is
//! killed, and the pod ends itself at the deadline that was told last.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{ActionState, ActionWish, Changed, PodRecord, new_intent};
use autopod_mcp::provider::{PodAction, PodStatus};
use autopod_mcp::sandbox::ClockMode;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::keeper_support::{House, kill, until};
use crate::support::userns;

const POD: &str = "switched";
/// How long a pod of the sandbox takes from its create to its sshd, in the world's seconds.
const WAY_UP: f64 = 5.0;

/// A pod with a lifetime of seconds, made by a real keeper.
struct Story {
    house: House,
}

impl Story {
    /// The world leaps over the pod's way up.
    async fn begin(house: House, seconds: i64) -> Self {
        let wish = house.wish(SignedDuration::from_secs(seconds));
        house.fleet().ensure(POD, wish, &Limits::default()).await.expect("a record");
        house.keeper().ensure_and_wake().await.expect("a keeper");
        let story = Self { house };
        story.until("its pod", |record| record.known.pod_id.is_some()).await;
        story
    }

    async fn up(seconds: i64) -> Self {
        let story = Self::begin(House::new().await, seconds).await;
        story.house.advance(WAY_UP).await;
        story
    }

    fn record(&self) -> PodRecord {
        self.house.fleet().get(POD).expect("records").expect("a record")
    }

    async fn until(&self, what: &str, is_so: impl Fn(&PodRecord) -> bool) -> PodRecord {
        until(what, async || Some(self.record()).filter(&is_so)).await
    }

    async fn until_armed(&self) -> PodRecord {
        let armed = |record: &PodRecord| {
            let known = &record.known;
            known.inside.start == Some(known.starts) && known.inside.switch_until == Some(record.reserved_until())
        };
        self.until("an armed switch", |record| armed(record) && record.expires_at() == record.reserved_until()).await
    }

    async fn extend(&self, seconds: i64) -> Timestamp {
        let record = self.record();
        let until = record.reserved_until() + SignedDuration::from_secs(seconds);
        let changed = self.house.fleet().want_extended(&record.intent, until, &Limits::default()).await;
        assert!(matches!(changed, Ok(Changed::Written(_))), "{changed:?}");
        until
    }

    /// Sends an action and leaps over the way up that follows.
    async fn act(&self, action: PodAction) {
        let wish = ActionWish { id: new_intent(), action, requested_at: Timestamp::now() };
        let changed = self.house.fleet().want_action(&self.record().intent, wish, &Limits::default()).await;
        assert!(matches!(changed, Ok(Changed::Written(_))), "{changed:?}");
        self.until("the action's answer", |record| {
            let known = record.known.action.as_ref().filter(|known| known.action == action);
            known.is_some_and(|known| known.state == ActionState::Done)
        })
        .await;
        if action != PodAction::Stop {
            self.house.advance(WAY_UP).await;
        }
    }

    /// kill -9 of everything of ours; nothing is started again.
    async fn kill_all(&self) {
        let found = self.house.processes();
        for pid in found.workers.into_iter().chain(found.guards) {
            kill(pid);
        }
        until("no process of ours", async || {
            let left = self.house.processes();
            (left.guards.is_empty() && left.workers.is_empty()).then_some(())
        })
        .await;
    }

    async fn now(&self) -> Timestamp {
        time(&self.house.raw(reqwest::Method::GET, "/_sandbox/clock", None).await.1["now"])
    }

    async fn until_past(&self, deadline: Timestamp) {
        until("the world's time", async || (self.now().await > deadline).then_some(())).await;
    }

    /// The requests by which the pod ended itself.
    fn by_the_switch(&self) -> Vec<Value> {
        let of_the_switch = |entry: &Value| {
            let agent = entry["user_agent"].as_str().unwrap_or_default();
            agent.starts_with("autopod-switch/") && entry["request_body"]["action"] == "terminate"
        };
        let requests = self.house.sandbox.requests();
        let requests = requests.iter().map(|entry| serde_json::to_value(entry).expect("JSON"));
        requests.filter(of_the_switch).collect()
    }

    /// With everything of ours dead, and not before its deadline.
    async fn ends_itself_at(self, deadline: Timestamp) {
        self.kill_all().await;
        self.house.until_none_alive("the pod's own end").await;
        let pods = self.house.world_pods().await;
        assert_eq!((pods.len(), self.house.asked("createPod"), self.house.asked("deletePod")), (1, 1, 0));
        let late_by = time(&pods[0]["ended_at"]).duration_since(deadline);
        // Its clock counts whole seconds, and a busy machine takes its time.
        assert!(late_by > SignedDuration::from_secs(-1) && late_by < SignedDuration::from_secs(10), "{late_by:?}");
        let sent = self.by_the_switch();
        assert_eq!(sent.first().map(|entry| &entry["status"]), Some(&json!(204)), "{sent:?}");
        // Whoever looks next is told that it isn't shown any more, and pays for no time after its end.
        self.house.advance(3600.0).await;
        let listed = self.house.ok("list_pods", json!({})).await;
        let row = &listed["pods"][0];
        assert_eq!((&row["status"], &listed["burn_rate_per_hour"]), (&json!("NOT_LISTED"), &json!(0.0)), "{listed}");
        let record = self.until("a closed record", |record| !record.is_open()).await;
        assert_eq!(record.known.ending_cause.as_deref(), Some("its own switch ended it"));
        assert!(record.known.cost_usd < record.price() / 10.0, "{:?}", record.known);
        self.house.end().await;
    }
}

fn time(value: &Value) -> Timestamp {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no time: {value}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_the_pod_though_everything_of_ours_is_dead() {
    if !userns::are_allowed() {
        return;
    }
    let story = Story::up(12).await;
    let record = story.until_armed().await;
    assert_eq!(record.known.inside.switch_problem, None);
    story.ends_itself_at(record.expires_at()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extension_moves_it_first() {
    if !userns::are_allowed() {
        return;
    }
    let story = Story::up(12).await;
    let before = story.until_armed().await.expires_at();
    story.extend(2).await;
    let until = story.extend(3).await;
    let record = story.until_armed().await;
    assert_eq!((record.expires_at(), until), (until, before + SignedDuration::from_secs(5)));
    story.kill_all().await;
    story.until_past(before + SignedDuration::from_secs(2)).await;
    assert_eq!(story.house.alive().await.len(), 1, "it ended at the old deadline");
    story.ends_itself_at(until).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_armed_anew_for_each_start() {
    if !userns::are_allowed() {
        return;
    }
    let story = Story::up(30).await;
    let first = story.until_armed().await;
    story.act(PodAction::Restart).await;
    story.until("the restart", |record| record.known.status == Some(PodStatus::Running)).await;
    let second = story.until_armed().await;
    assert!(second.known.starts > first.known.starts, "{second:?}");
    story.act(PodAction::Stop).await;
    story.until("the stop", |record| record.known.status == Some(PodStatus::Exited)).await;
    // A stopped pod gets more time without a switch.
    let until = story.extend(1).await;
    story.until("the later deadline", |record| record.expires_at() == until).await;
    story.act(PodAction::Start).await;
    story.until("the start", |record| record.known.status == Some(PodStatus::Running)).await;
    let third = story.until_armed().await;
    assert!(third.known.starts > second.known.starts, "{third:?}");
    // What is left but for some seconds.
    let left = until.duration_since(story.now().await).as_secs_f64();
    assert!(left > 0.0, "the machine is too slow for this test");
    story.ends_itself_at(until).await;
}

/// The one window that is left: nobody ends it until anything of ours is started.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_lost_all_of_us_before_the_arming_is_ended_by_the_next_start() {
    let story = Story::begin(House::new().await, 3).await;
    story.kill_all().await;
    let record = story.record();
    assert_eq!(record.known.inside.switch_until, None);
    story.until_past(record.expires_at() + SignedDuration::from_secs(2)).await;
    assert_eq!(story.house.alive().await.len(), 1);
    let listed = story.house.program(&["pod", "list"]).output().await.expect("the program");
    assert!(listed.status.success(), "{listed:?}");
    story.house.until_none_alive("the next start").await;
    story.until("a closed record", |record| !record.is_open()).await;
    assert_eq!((story.by_the_switch().len(), story.house.asked("createPod")), (0, 1));
    story.house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_cannot_be_armed_is_told_and_the_keeper_keeps_the_deadline() {
    let story = Story::begin(House::of("home", |options| options.namespaces = false).await, 12).await;
    story.house.advance(WAY_UP).await;
    let record = story.until("the reason", |record| record.known.inside.switch_problem.is_some()).await;
    let problem = record.known.inside.switch_problem.clone().expect("it was there");
    assert!(problem.contains("user namespaces are switched off"), "{problem}");
    assert_eq!(record.known.inside.switch_until, None);
    // More time can be had all the same, and that there is no switch still stands.
    let until = story.extend(1).await;
    let record = story.until("the later deadline", |record| record.expires_at() == until).await;
    assert!(record.known.inside.switch_problem.is_some() && record.known.inside.switch_until.is_none());
    story.house.until_none_alive("the keeper's deadline").await;
    assert!(time(&story.house.world_pods().await[0]["ended_at"]) >= until);
    assert_eq!((story.by_the_switch().len(), story.house.asked("createPod")), (0, 1));
    story.house.end().await;
}

/// Its port is mapped, and nobody listens there yet, or ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_sshd_gets_more_time_too() {
    if !userns::are_allowed() {
        return;
    }
    let story = Story::begin(House::with(ClockMode::Manual, "home").await, 600).await;
    story.house.advance(WAY_UP - 1.0).await;
    story.until("an address", |record| record.known.ssh.is_some()).await;
    let until = story.extend(60).await;
    let record = story.until("the later deadline", |record| record.expires_at() == until).await;
    assert_eq!(record.known.inside.switch_until, None);
    assert_eq!(record.known.inside.switch_problem.as_deref(), Some("nothing answers at the pod's SSH port"));
    story.house.advance(1.0).await;
    let record = story.until_armed().await;
    assert_eq!((record.expires_at(), record.known.inside.switch_problem), (until, None));
    story.house.end().await;
}

/// An `ssh` with moods: it waits as long as there is the file `waits`, fails while there is `fails`, and says that the
/// pod lacks something while there is `lacks`, counting there how often it was asked.
fn moody_ssh(house: &mut House) -> PathBuf {
    let folder = house.folder().join("bin");
    std::fs::create_dir(&folder).expect("a folder");
    let path = &house.path;
    let script = format!(
        r#"#!/bin/sh
PATH='{path}'
cd '{}' || exit
while [ -e waits ]; do sleep 0.05; done
[ -e fails ] && exit 255
[ -e lacks ] && echo asked >>lacks && echo AUTOPOD_NOT_ARMED no way && exit
cd "$OLDPWD" && exec ssh "$@"
"#,
        folder.display()
    );
    std::fs::write(folder.join("ssh"), script).expect("a script");
    std::fs::set_permissions(folder.join("ssh"), PermissionsExt::from_mode(0o755)).expect("a mode");
    house.path = format!("{}:{path}", folder.display());
    folder
}

/// A switch that can't be moved would end the pod at the old deadline, so no later one is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_does_not_move_ahead_of_an_armed_switch() {
    if !userns::are_allowed() {
        return;
    }
    let mut house = House::new().await;
    let fails = moody_ssh(&mut house).join("fails");
    let story = Story::begin(house, 600).await;
    story.house.advance(WAY_UP).await;
    let before = story.until_armed().await.expires_at();
    std::fs::write(&fails, "").expect("a file");
    let until = story.extend(60).await;
    let record = story.until("the reason", |record| record.known.inside.switch_problem.is_some()).await;
    assert_eq!((record.expires_at(), record.known.inside.switch_until), (before, Some(before)));
    std::fs::remove_file(&fails).expect("removed");
    let record = story.until_armed().await;
    assert_eq!((record.expires_at(), record.known.inside.switch_problem), (until, None));
    story.house.end().await;
}

/// While the first arming hangs, the deadline moves twice, and the pod is restarted under it.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_ssh_hangs_is_armed_for_in_the_end() {
    if !userns::are_allowed() {
        return;
    }
    let mut house = House::new().await;
    let waits = moody_ssh(&mut house).join("waits");
    std::fs::write(&waits, "").expect("a file");
    let story = Story::begin(house, 20).await;
    story.house.advance(WAY_UP).await;
    let log = story.house.home.join("ssh");
    until("an ssh that hangs", async || {
        let files = std::fs::read_dir(&log).ok()?.flatten();
        files.into_iter().any(|file| file.file_name().to_string_lossy().starts_with(".writing-")).then_some(())
    })
    .await;
    story.extend(1).await;
    story.act(PodAction::Restart).await;
    let until = story.extend(2).await;
    std::fs::remove_file(&waits).expect("removed");
    let record = story.until_armed().await;
    assert_eq!((record.expires_at(), record.known.status), (until, Some(PodStatus::Running)));
    story.ends_itself_at(until).await;
}

/// The image has no client, say. That is found out once for each deadline, and more time can be had all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_can_have_no_switch_gets_more_time_without() {
    let mut house = House::new().await;
    let lacks = moody_ssh(&mut house).join("lacks");
    std::fs::write(&lacks, "").expect("a file");
    let story = Story::begin(house, 600).await;
    story.house.advance(WAY_UP).await;
    for round in 1..=3 {
        let asked = || std::fs::read_to_string(&lacks).expect("a file").lines().count();
        let until = if round == 1 { story.record().reserved_until() } else { story.extend(60).await };
        until_asked(round, asked).await;
        let record = story
            .until("the reason", |record| record.expires_at() == until && record.known.inside.switch_problem.is_some());
        let inside = record.await.known.inside;
        assert_eq!(inside.switch_problem.as_deref(), Some("the pod can't end itself: no way"));
        assert_eq!((inside.switch_until, asked()), (None, round));
    }
    story.house.end().await;
}

async fn until_asked(times: usize, asked: impl Fn() -> usize) {
    until("ssh", async || (asked() >= times).then_some(())).await;
}
