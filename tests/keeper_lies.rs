//! A provider whose answers can't be true: times at the end of the calendar, a price that nobody was told. Whatever it
//! says, the pod is known and ended. The sandbox answers, and a layer above it bends what it said.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use autopod_mcp::app;
use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{Ensured, Phase, PodRecord};
use autopod_mcp::keeper::{self, Ended, KeeperOptions};
use autopod_mcp::provider::{
    Cloud, GpuProvider, GpuType, LogLimits, LogPage, LogQuery, LogStream, Pod, PodAction, PodBill, PodSpec,
    ProviderError, Stamped, Volume, VolumeSpec,
};
use autopod_mcp::state::{Lock, StateError};
use autopod_mcp::timing::Timing;
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use serde_json::json;
use tokio::sync::RwLock;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::keeper_support::{House, until};

/// Bends one pod as it is told, beside the `Date` of the answer.
type Lie = Arc<dyn Fn(&mut Pod, &mut Option<Timestamp>) + Send + Sync>;

struct Liar {
    honest: Arc<dyn GpuProvider>,
    lie: Lie,
    /// How far its clock is from the right one.
    ahead: SignedDuration,
    silence: Silence,
}

/// While the test holds one for writing, no question of that kind is answered.
#[derive(Debug, Default, Clone)]
pub struct Silence {
    pub lists: Arc<RwLock<()>>,
    pub pages: Arc<RwLock<()>>,
}

impl Liar {
    fn told<T>(&self, answer: Stamped<T>) -> Stamped<T> {
        Stamped { date: answer.date.map(|date| date.saturating_add(self.ahead).expect("a time")), ..answer }
    }

    fn bent(&self, pod: &mut Pod, date: &mut Option<Timestamp>) {
        pod.created_at = pod.created_at.map(|at| at.saturating_add(self.ahead).expect("a time"));
        (self.lie)(pod, date);
    }
}

impl std::fmt::Debug for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Liar")
    }
}

#[async_trait]
impl GpuProvider for Liar {
    async fn create_pod(&self, spec: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        let mut answer = self.told(self.honest.create_pod(spec).await?);
        self.bent(&mut answer.value, &mut answer.date);
        Ok(answer)
    }
    async fn pod(&self, id: &str) -> Result<Stamped<Pod>, ProviderError> {
        let mut answer = self.told(self.honest.pod(id).await?);
        drop(self.silence.pages.read().await);
        self.bent(&mut answer.value, &mut answer.date);
        Ok(answer)
    }
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        let mut answer = self.told(self.honest.pods().await?);
        drop(self.silence.lists.read().await);
        for pod in &mut answer.value {
            self.bent(pod, &mut answer.date);
        }
        Ok(answer)
    }
    async fn control_pod(&self, id: &str, action: PodAction) -> Result<Stamped<Pod>, ProviderError> {
        self.honest.control_pod(id, action).await
    }
    async fn delete_pod(&self, id: &str) -> Result<Stamped<()>, ProviderError> {
        let answer = self.honest.delete_pod(id).await?;
        Ok(Stamped { date: None, ..answer })
    }
    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError> {
        self.honest.volumes().await
    }
    async fn create_volume(&self, spec: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError> {
        self.honest.create_volume(spec).await
    }
    async fn grow_volume(&self, id: &str, size_gb: u32) -> Result<Stamped<Volume>, ProviderError> {
        self.honest.grow_volume(id, size_gb).await
    }
    async fn gpus(&self, count: u32, cloud: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        self.honest.gpus(count, cloud).await
    }
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        Ok(self.told(self.honest.ssh_keys().await?))
    }
    async fn delete_volume(&self, id: &str) -> Result<Stamped<()>, ProviderError> {
        self.honest.delete_volume(id).await
    }
    async fn pod_logs(&self, id: &str, query: &LogQuery, limits: &LogLimits) -> Result<LogPage, ProviderError> {
        self.honest.pod_logs(id, query, limits).await
    }
    async fn follow_logs(&self, id: &str, query: &LogQuery) -> Result<LogStream, ProviderError> {
        self.honest.follow_logs(id, query).await
    }
    async fn billing(&self, from: Timestamp, until: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError> {
        self.honest.billing(from, until).await
    }
}

/// A keeper in this process that hears `lie`.
pub struct Lied {
    pub house: House,
    pub silence: Silence,
    stop: CancellationToken,
    keeper: JoinHandle<Result<Ended, StateError>>,
}

impl Lied {
    pub async fn to(house: House, lie: impl Fn(&mut Pod, &mut Option<Timestamp>) + Send + Sync + 'static) -> Self {
        Self::with_clock(house, lie, SignedDuration::ZERO).await
    }

    async fn with_clock(
        house: House,
        lie: impl Fn(&mut Pod, &mut Option<Timestamp>) + Send + Sync + 'static,
        ahead: SignedDuration,
    ) -> Self {
        let stop = CancellationToken::new();
        let honest = app::connect(Some(&house.home()), house.sandbox.url(), "autopod-keeper").expect("a connection");
        let lie: Lie = Arc::new(lie);
        let silence = Silence::default();
        let quiet = silence.clone();
        let options = KeeperOptions {
            home: house.home(),
            timing: Timing::quick(),
            origin: house.origin(),
            key: Some(SecretString::from(house.sandbox.key().to_owned())),
            connect: Arc::new(move |key| {
                Arc::new(Liar { honest: honest(key), lie: lie.clone(), ahead, silence: quiet.clone() })
            }),
            on_key: Arc::new(|_| {}),
            ssh_environment: house.environment(),
            stop: stop.clone(),
        };
        let keeper = tokio::spawn(keeper::run(options));
        Self { house, silence, stop, keeper }
    }

    pub async fn wish(&self, name: &str, lifetime: SignedDuration) {
        let made =
            self.house.fleet().ensure(name, self.house.wish(lifetime), &Limits::default()).await.expect("a record");
        assert!(matches!(made, Ensured::New(_)), "{made:?}");
    }

    pub async fn placed(&self, name: &str) -> PodRecord {
        until("a placed pod", async || self.house.fleet().get(name).ok()?.filter(|r| r.known.pod_id.is_some())).await
    }

    pub async fn closed(&self, name: &str) -> PodRecord {
        until("a closed record", async || self.house.fleet().get(name).ok()?.filter(|r| !r.is_open())).await
    }

    pub async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(60), self.keeper).await.expect("an end").expect("no panic").ok();
        self.house.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_made_at_the_end_of_all_time_is_known_and_ends() {
    let lied = Lied::to(House::new().await, |pod, _| pod.created_at = Some(Timestamp::MAX)).await;
    lied.wish("late", SignedDuration::from_secs(6)).await;
    let record = lied.placed("late").await;
    assert!(record.expires_at() < Timestamp::now() + SignedDuration::from_secs(60), "{record:?}");
    lied.house.until_none_alive("the deadline").await;
    lied.end().await;
}

/// The pod that no record knows is taken back at a time after which there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_date_at_the_end_of_all_time_keeps_no_pod_from_being_taken_back() {
    let house = House::new().await;
    let id = house.create("lost").await;
    house.end_processes();
    std::fs::remove_file(house.home.join("pods.json")).expect("removed");
    let lied = Lied::to(house, |_, date| *date = Some(Timestamp::MAX)).await;
    let fleet = lied.house.fleet();
    until("the pod in the records", async || {
        fleet.read().ok()?.into_values().find(|record| record.known.pod_id.as_ref() == Some(&id))
    })
    .await;
    lied.end().await;
}

/// The price that is told with the pod is another than the catalog's, or told late.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_costs_more_than_was_allowed_is_ended() {
    let answers = AtomicUsize::new(0);
    let lied = Lied::to(House::hurried().await, move |pod, _| {
        let is_first = answers.fetch_add(1, Ordering::Relaxed) == 0;
        pod.cost_per_hour = if is_first { 0.0 } else { 0.40 };
    })
    .await;
    let mut wish = lied.house.wish(SignedDuration::from_mins(5));
    wish.wanted.max_price_per_hour = Some(0.30);
    lied.house.fleet().ensure("dear", wish, &Limits::default()).await.expect("a record");
    let record = lied.closed("dear").await;
    assert_eq!(record.known.ending_cause.as_deref(), Some("it costs $0.40/h, more than the $0.30/h that were allowed"));
    assert_eq!((lied.house.asked("createPod"), lied.house.alive().await.len()), (1, 0));
    lied.end().await;
}

/// The file has lost the record and the provider's list doesn't show the pod yet: only the keeper's memory knows of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_has_left_the_file_is_written_again_from_memory() {
    let lied = Lied::to(House::new().await, |_, _| {}).await;
    lied.house.fault(json!({ "operation": "listPods", "kind": "lagging_list", "seconds": 600, "times": 1000 })).await;
    lied.wish("forgotten", SignedDuration::from_secs(20)).await;
    let before = lied.placed("forgotten").await;
    std::fs::remove_file(lied.house.home.join("pods.json")).expect("removed");
    let after = lied.placed("forgotten").await;
    assert_eq!((&after.intent, &after.known.pod_id), (&before.intent, &before.known.pod_id));
    assert_eq!(after.expires_at(), before.expires_at());
    lied.house.until_none_alive("the deadline").await;
    lied.end().await;
}

/// A newer version has written the records while we still hold the pods.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_though_the_records_cannot_be_read() {
    let lied = Lied::to(House::new().await, |_, _| {}).await;
    lied.wish("unread", SignedDuration::from_secs(6)).await;
    lied.placed("unread").await;
    let text = r#"{"schema": 2, "revision": 7, "entries": {}}"#;
    // Whoever writes holds the lock, or a change that was begun before would end in its place.
    let lock = Lock::take(&lied.house.home().lock("state"), Duration::from_secs(5)).expect("the lock");
    std::fs::write(lied.house.home.join("pods.json"), text).expect("written");
    drop(lock);
    lied.house.until_none_alive("the deadline").await;
    assert_eq!(std::fs::read_to_string(lied.house.home.join("pods.json")).expect("the file"), text);
    lied.end().await;
}

/// Tunnels of a newer version are no reason to leave pods alone.
#[tokio::test(flavor = "multi_thread")]
async fn pods_are_kept_though_the_tunnels_cannot_be_read() {
    let house = House::new().await;
    std::fs::create_dir_all(&house.home).expect("a home");
    std::fs::write(house.home.join("tunnels.json"), r#"{"schema": 2, "revision": 7, "entries": {}}"#).expect("written");
    let lied = Lied::to(house, |_, _| {}).await;
    lied.wish("kept", SignedDuration::from_secs(3)).await;
    lied.placed("kept").await;
    lied.house.until_none_alive("the deadline").await;
    lied.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_ends_sends_no_post_any_more() {
    let lied = Lied::to(House::new().await, |_, _| {}).await;
    lied.house.fault(json!({ "operation": "getSshKeys", "kind": "delay_ms", "delay_ms": 1500 })).await;
    lied.wish("too late", SignedDuration::from_mins(5)).await;
    until("the question before the POST", async || (lied.house.asked("getSshKeys") == 1).then_some(())).await;
    lied.stop.cancel();
    let Lied { house, keeper, .. } = lied;
    assert_eq!(keeper.await.expect("no panic").expect("an end"), Ended::Stopped);
    let record = house.fleet().get("too late").expect("records").expect("a record");
    assert_eq!((house.asked("createPod"), record.known.phase), (0, Phase::Journaled));
    house.end().await;
}

/// The machine slept, or nobody started a keeper: whoever asked has gone home.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_of_long_ago_makes_no_pod() {
    let lied = Lied::to(House::new().await, |_, _| {}).await;
    let mut wish = lied.house.wish(SignedDuration::from_hours(24));
    wish.wanted.requested_at -= SignedDuration::from_hours(9);
    lied.house.fleet().ensure("old", wish, &Limits::default()).await.expect("a record");
    let record = lied.closed("old").await;
    assert_eq!(record.known.phase, Phase::Refused);
    assert_eq!(
        record.known.problem.as_deref(),
        Some("it was asked for 540 minutes ago and not made in time; ask again")
    );
    assert_eq!(lied.house.asked("createPod"), 0);
    lied.end().await;
}

/// Something lies where the keeper would listen: it keeps the pod, and listens when it can.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_nobody_can_speak_to_keeps_its_pods() {
    let house = House::new().await;
    let in_the_way = house.home().root().join("keeper.sock");
    std::fs::create_dir_all(&in_the_way).expect("a folder");
    let lied = Lied::to(house, |_, _| {}).await;
    lied.wish("quiet", SignedDuration::from_secs(3)).await;
    lied.placed("quiet").await;
    lied.house.until_none_alive("the deadline").await;
    std::fs::remove_dir(&in_the_way).expect("removed");
    until("an answer", async || lied.house.keeper().hello().await).await;
    lied.end().await;
}

/// The provider's clock is hours away from ours: no pod ends at once for it, and none lives longer.
async fn lives_as_long_as_it_should(ahead: SignedDuration, keys_can_be_read: bool) {
    let lied = Lied::with_clock(House::new().await, |_, _| {}, ahead).await;
    if !keys_can_be_read {
        lied.house.fault(json!({ "operation": "getSshKeys", "kind": "status_before", "status": 403 })).await;
    }
    let lifetime = SignedDuration::from_secs(6);
    lied.wish("skewed", lifetime).await;
    lied.house.until_none_alive("the deadline").await;
    lied.closed("skewed").await;
    let pods = lied.house.world_pods().await;
    let time = |what: &str| pods[0][what].as_str().and_then(|text| text.parse::<Timestamp>().ok()).expect(what);
    let lived = time("ended_at").duration_since(time("created_at"));
    let least = lifetime - SignedDuration::from_secs(1);
    assert!(lived >= least && lived < lifetime + SignedDuration::from_secs(10), "{ahead:?}: it lived for {lived:?}");
    lied.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_hours_away_neither_ends_a_pod_nor_keeps_it() {
    let hours = SignedDuration::from_hours;
    tokio::join!(
        lives_as_long_as_it_should(hours(3), true),
        lives_as_long_as_it_should(hours(-3), true),
        lives_as_long_as_it_should(hours(3), false),
        lives_as_long_as_it_should(hours(-3), false),
    );
}
