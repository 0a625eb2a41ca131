//! A provider whose answers can't be true: times at the end of the calendar, a price that nobody was told. Whatever it
//! says, the pod is known and ended. The sandbox answers, and a layer above it bends what it said.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use autopod_mcp::app;
use autopod_mcp::fleet::{Ensured, PodRecord};
use autopod_mcp::keeper::{self, Ended, KeeperOptions};
use autopod_mcp::provider::{
    GpuProvider, GpuType, Pod, PodAction, PodSpec, ProviderError, Stamped, Volume, VolumeSpec,
};
use autopod_mcp::state::StateError;
use autopod_mcp::timing::Timing;
use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::keeper_support::{House, until};

/// Bends one pod as it is told, beside the `Date` of the answer.
type Lie = Arc<dyn Fn(&mut Pod, &mut Option<Timestamp>) + Send + Sync>;

struct Liar {
    honest: Arc<dyn GpuProvider>,
    lie: Lie,
}

impl std::fmt::Debug for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Liar")
    }
}

#[async_trait]
impl GpuProvider for Liar {
    async fn create_pod(&self, spec: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        let mut answer = self.honest.create_pod(spec).await?;
        (self.lie)(&mut answer.value, &mut answer.date);
        Ok(answer)
    }
    async fn pod(&self, id: &str) -> Result<Stamped<Pod>, ProviderError> {
        let mut answer = self.honest.pod(id).await?;
        (self.lie)(&mut answer.value, &mut answer.date);
        Ok(answer)
    }
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        let mut answer = self.honest.pods().await?;
        for pod in &mut answer.value {
            (self.lie)(pod, &mut answer.date);
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
    async fn gpus(&self, count: u32) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        self.honest.gpus(count).await
    }
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        self.honest.ssh_keys().await
    }
}

/// A keeper in this process that hears `lie`.
struct Lied {
    house: House,
    stop: CancellationToken,
    keeper: JoinHandle<Result<Ended, StateError>>,
}

impl Lied {
    async fn to(house: House, lie: impl Fn(&mut Pod, &mut Option<Timestamp>) + Send + Sync + 'static) -> Self {
        let stop = CancellationToken::new();
        let honest = app::connect(house.sandbox.url(), "autopod-keeper").expect("a connection");
        let lie: Lie = Arc::new(lie);
        let options = KeeperOptions {
            home: house.home(),
            timing: Timing::quick(),
            origin: house.origin(),
            key: Some(SecretString::from(house.sandbox.key().to_owned())),
            connect: Arc::new(move |key| Arc::new(Liar { honest: honest(key), lie: lie.clone() })),
            on_key: Arc::new(|_| {}),
            ssh_environment: house.environment(),
            stop: stop.clone(),
        };
        let keeper = tokio::spawn(keeper::run(options));
        Self { house, stop, keeper }
    }

    async fn wish(&self, name: &str, lifetime: SignedDuration) {
        let made = self.house.fleet().ensure(name, self.house.wish(lifetime)).await.expect("a record");
        assert!(matches!(made, Ensured::New(_)), "{made:?}");
    }

    async fn placed(&self, name: &str) -> PodRecord {
        until("a placed pod", async || self.house.fleet().get(name).ok()?.filter(|r| r.known.pod_id.is_some())).await
    }

    async fn end(self) {
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
