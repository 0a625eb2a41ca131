//! The one background process of a home: it makes true what the records want.
//!
//! It alone creates and ends pods and holds every ssh child, so there is one writer and nothing depends on the server
//! or terminal that asked. Its loop only compares; each pod and each tunnel has a task of its own, so nothing waits for
//! the network of another. A guard process (`keeper/guard.rs`) starts the worker again when it dies.

mod clocks;
pub mod guard;
mod idle_task;
pub mod inside;
mod inside_task;
mod pod_task;
mod snapshot;
mod socket;
mod tunnel_task;
mod volume_task;

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::clocks::ProviderClock;
use self::snapshot::Snapshot;
use crate::background::{account_of, socket_path, version};
use crate::config::Home;
use crate::errors::chain;
use crate::fleet::{
    Actor, Audit, ENV_EXPIRES_AT, ENV_OWNER, Fleet, HomeIdentity, PodRecord, VolumeRecord, Volumes, WantedState, later,
    name_of, new_intent,
};
use crate::provider::{GpuProvider, Pod, PodStatus, ProviderError};
use crate::ssh::Ssh;
use crate::state::{self, Lock, StateError};
use crate::timing::Timing;
use crate::tunnel::{TunnelRecord, Tunnels};

/// A pod of ours that no record knew lives at least this long after it was found, so that a wrong clock or an old
/// deadline doesn't end it under somebody's hands.
const ADOPTED_LIVES_AT_LEAST: SignedDuration = SignedDuration::from_mins(15);
/// No create could have asked for more, whatever stands in the pod's environment.
const ADOPTED_LIVES_AT_MOST: SignedDuration = SignedDuration::from_hours(24);
const LOST_PODS_LOOKED_FOR_EVERY: Duration = Duration::from_secs(300);
/// How long a pod's task waits for the lock over the records: its deadline may come meanwhile, and what couldn't be
/// written is written with the next step.
const LONGEST_WAIT_FOR_PODS: Duration = Duration::from_secs(2);
/// How long a lock may be held by somebody who only looks at it.
const LONGEST_LOOK: Duration = Duration::from_millis(300);

/// Makes the provider from a key; passed in, for only `app` picks one.
pub type Connect = Arc<dyn Fn(SecretString) -> Arc<dyn GpuProvider> + Send + Sync>;

pub type OnKey = Arc<dyn Fn(SecretString) + Send + Sync>;

pub struct KeeperOptions {
    pub home: Home,
    pub timing: Timing,
    pub origin: String,
    pub key: Option<SecretString>,
    pub connect: Connect,
    /// Told of a key that came over the socket, so that the guard has it when the worker dies.
    pub on_key: OnKey,
    /// What ssh may see of the environment.
    pub ssh_environment: Vec<(String, OsString)>,
    /// Cancelled from outside: start nothing new, end the ssh children, end.
    pub stop: CancellationToken,
}

/// Why a keeper ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nothing was wanted for long enough.
    Idle,
    /// Another keeper holds the lock.
    Another,
    Stopped,
    /// A newer version takes over.
    Retired,
}

/// What the loop and the tasks share.
struct Keeper {
    home: Home,
    timing: Timing,
    fleet: Fleet,
    volumes: Volumes,
    audit: Audit,
    tunnels: Tunnels,
    ssh: Ssh,
    origin: String,
    provider: watch::Sender<Option<Arc<dyn GpuProvider>>>,
    clock: ProviderClock,
    snapshot: Snapshot,
    account: watch::Sender<Option<String>>,
    connect: Connect,
    on_key: OnKey,
    /// Counts turns; a change means: compare now.
    turn: watch::Sender<u64>,
    last_turn: watch::Sender<Instant>,
    /// There may be pods of ours without a record: none was looked for yet, or a record has vanished.
    pods_may_be_lost: watch::Sender<bool>,
    retire: CancellationToken,
    stop: CancellationToken,
}

/// Holds the home until nothing is wanted any more or it is told to stop.
pub async fn run(options: KeeperOptions) -> Result<Ended, StateError> {
    let Some(lock) = take_keeper_lock(&options.home).await? else { return Ok(Ended::Another) };
    state::sweep_temporary_files(options.home.root());
    state::sweep_temporary_files(&options.home.ssh());
    let account = options.key.as_ref().map(|key| account_of(&options.origin, key));
    let provider = options.key.map(|key| (options.connect)(key));
    let impatient =
        Timing { state_lock: options.timing.state_lock.min(LONGEST_WAIT_FOR_PODS), ..options.timing.clone() };
    let keeper = Arc::new(Keeper {
        fleet: Fleet::new(&options.home, &impatient),
        volumes: Volumes::new(&options.home, &options.timing),
        audit: Audit::new(&options.home),
        tunnels: Tunnels::new(&options.home, &options.timing),
        timing: options.timing,
        ssh: Ssh { folder: options.home.ssh(), environment: options.ssh_environment },
        home: options.home,
        provider: watch::Sender::new(provider),
        clock: ProviderClock::default(),
        snapshot: Snapshot::default(),
        account: watch::Sender::new(account),
        origin: options.origin,
        connect: options.connect,
        on_key: options.on_key,
        turn: watch::Sender::new(0),
        last_turn: watch::Sender::new(Instant::now()),
        pods_may_be_lost: watch::Sender::new(true),
        retire: CancellationToken::new(),
        stop: options.stop,
    });
    // A full disk keeps nobody from ending pods.
    if let Err(error) = version::announce(&keeper.home) {
        tracing::error!(error = %chain(&error), "which version keeps this home can't be written");
    }
    let socket = socket::serve(keeper.clone());
    let (ended, state_lock) = keeper.clone().compare_until_idle().await;
    socket.abort();
    let _ = std::fs::remove_file(socket_path(&keeper.home));
    if ended == Ended::Idle {
        version::withdraw(&keeper.home);
    }
    drop(lock);
    // Only now may somebody write a wish: whoever does finds no keeper and starts one.
    drop(state_lock);
    tracing::info!(?ended, "the keeper ends");
    Ok(ended)
}

/// `None` when another keeper holds it. Who looks whether a keeper lives takes the lock for a moment, which must not
/// pass for a keeper.
async fn take_keeper_lock(home: &Home) -> Result<Option<Lock>, StateError> {
    let path = home.lock("keeper");
    let taken = tokio::task::spawn_blocking(move || Lock::take(&path, LONGEST_LOOK)).await;
    match taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Ok(lock) => Ok(Some(lock)),
        Err(StateError::Locked { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Keeper {
    /// The reason to end, and for an idle end the lock over the records, under which nobody can add a wish.
    async fn compare_until_idle(self: Arc<Self>) -> (Ended, Option<Lock>) {
        let mut tasks: HashMap<String, JoinHandle<()>> = HashMap::new();
        let mut idle_since = Instant::now();
        let mut turn = self.turn.subscribe();
        let adoption = tokio::spawn(self.clone().take_back_our_pods());
        let ended = loop {
            self.last_turn.send_replace(Instant::now());
            let wanted = self.start_missing_tasks(&mut tasks);
            if wanted || *self.pods_may_be_lost.borrow() && self.provider.borrow().is_some() {
                idle_since = Instant::now();
            } else if idle_since.elapsed() >= self.timing.keeper_idle
                && let Ok(Some(lock)) = self.lock_if_still_idle().await
            {
                break (Ended::Idle, Some(lock));
            }
            tokio::select! {
                () = self.stop.cancelled() => break (Ended::Stopped, None),
                () = self.retire.cancelled() => break (Ended::Retired, None),
                _ = turn.changed() => {}
                () = tokio::time::sleep(self.timing.keeper_turn) => self.turn.send_modify(|turn| *turn += 1),
            }
            turn.mark_unchanged();
        };
        adoption.abort();
        self.finish(tasks).await;
        ended
    }

    /// Starts a task for each pod and tunnel that has none. True when anything is wanted or not proven gone.
    fn start_missing_tasks(self: &Arc<Self>, tasks: &mut HashMap<String, JoinHandle<()>>) -> bool {
        tasks.retain(|_, task| !task.is_finished());
        // No file keeps what stands in another from being done; and one that can't be read is no proof that
        // nothing is wanted.
        let mut unread = false;
        let mut failed = |error: StateError| {
            tracing::error!(error = %chain(&error), "the records can't be read");
            unread = true;
        };
        let pods = self.fleet.read().map_err(&mut failed).unwrap_or_default();
        let tunnels = self.tunnels.read().map_err(&mut failed).unwrap_or_default();
        let volumes = self.volumes.read().map_err(&mut failed).unwrap_or_default();
        for (name, record) in pods.iter().filter(|(_, record)| record.is_open()) {
            let (name, intent) = (name_of(name), &record.intent);
            tasks
                .entry(format!("pod {intent}"))
                .or_insert_with(|| tokio::spawn(pod_task::look_after(self.clone(), name.to_owned(), intent.clone())));
            tasks.entry(format!("inside {intent}")).or_insert_with(|| {
                tokio::spawn(inside_task::look_inside(self.clone(), name.to_owned(), intent.clone()))
            });
            if record.wanted.idle_minutes.is_some() {
                tasks.entry(format!("idle {intent}")).or_insert_with(|| {
                    tokio::spawn(idle_task::look_for_use(self.clone(), name.to_owned(), intent.clone()))
                });
            }
        }
        for record in volumes.values().filter(|record| record.is_open()) {
            tasks
                .entry(format!("volume {}", record.intent))
                .or_insert_with(|| tokio::spawn(volume_task::look_after(self.clone(), record.intent.clone())));
        }
        for (name, record) in tunnels.iter().filter(|(_, record)| record.needs_keeper()) {
            tasks
                .entry(format!("tunnel {}", record.intent))
                .or_insert_with(|| tokio::spawn(tunnel_task::hold(self.clone(), name.clone(), record.intent.clone())));
        }
        unread || !tasks.is_empty()
    }

    /// The lock over the records, if under it nothing is wanted.
    async fn lock_if_still_idle(&self) -> Result<Option<Lock>, StateError> {
        let (path, patience) = (self.home.lock("state"), self.timing.state_lock);
        let lock = tokio::task::spawn_blocking(move || Lock::take(&path, patience))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let pods = self.fleet.read()?.values().any(PodRecord::is_open);
        let volumes = self.volumes.read()?.values().any(VolumeRecord::is_open);
        let wanted = pods || volumes || self.tunnels.read()?.values().any(TunnelRecord::needs_keeper);
        Ok((!wanted).then_some(lock))
    }

    /// Lets a POST in flight finish, for its answer is the only trace of a pod; everything else is dropped at once.
    async fn finish(&self, tasks: HashMap<String, JoinHandle<()>>) {
        self.stop.cancel();
        let longest = self.timing.http_create + Duration::from_secs(5);
        for (_, mut task) in tasks {
            if tokio::time::timeout(longest, &mut task).await.is_err() {
                // Whoever keeps this home next takes up what it left.
                task.abort();
            }
        }
    }

    fn provider(&self) -> Option<Arc<dyn GpuProvider>> {
        self.provider.borrow().clone()
    }

    /// By the provider's clock and by ours, each from where it stood when the pod was made.
    fn is_due(&self, record: &PodRecord) -> bool {
        let by_provider = self.clock.told().zip(record.known.expires_at).is_some_and(|(now, at)| now >= at);
        by_provider || Timestamp::now() >= record.expires_by_our_clock()
    }

    /// Waits for the next turn, the order to stop, or until `most` is over.
    async fn wait(&self, turn: &mut watch::Receiver<u64>, most: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            _ = turn.changed() => {}
            () = tokio::time::sleep(most) => {}
        }
    }

    /// Pods of this home that no record knows come back into the records with their deadline: at the start, whenever a
    /// record has vanished, and every few minutes.
    async fn take_back_our_pods(self: Arc<Self>) {
        let mut may_be_lost = self.pods_may_be_lost.subscribe();
        let mut provider = self.provider.subscribe();
        let mut pause = self.timing.backoff_first;
        loop {
            // Now and then for no reason: what no record knows would stay for ever.
            tokio::select! {
                told = may_be_lost.wait_for(|lost| *lost) => if told.is_err() { return },
                () = tokio::time::sleep(LOST_PODS_LOOKED_FOR_EVERY) => {}
            }
            if provider.wait_for(Option::is_some).await.is_err() {
                return;
            }
            match self.look_for_lost_pods().await {
                Ok(()) => pause = self.timing.backoff_first,
                Err(error) => {
                    tracing::warn!(%error, "pods of this home without a record can't be looked for");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(self.timing.backoff_most);
                }
            }
        }
    }

    /// The error as text, for it may be the disk's or the provider's.
    async fn look_for_lost_pods(&self) -> Result<(), String> {
        // Cleared first: what vanishes from here on is looked for again.
        self.pods_may_be_lost.send_replace(false);
        let looked = async {
            let Some(identity) = HomeIdentity::read(&self.home).map_err(|error| chain(&error))? else { return Ok(()) };
            let Some(provider) = self.provider() else { return Ok(()) };
            let listed = match provider.pods().await {
                Ok(listed) => listed,
                // A key that may not list won't find them later either; another key makes us look again.
                Err(
                    error @ (ProviderError::MissingKey
                    | ProviderError::Unauthorized { .. }
                    | ProviderError::Forbidden { .. }
                    | ProviderError::Setup(_)),
                ) => {
                    tracing::warn!(error = %chain(&error), "our pods can't be listed");
                    return Ok(());
                }
                // Anything else passes, as the login page of a hotel's network does.
                Err(error) => return Err(chain(&error)),
            };
            if let Some(date) = listed.date {
                self.clock.heard(date);
            }
            let now = self.clock.now();
            for pod in listed.value.iter().filter(|pod| pod.env.get(ENV_OWNER) == Some(&identity.owner)) {
                if pod.status != PodStatus::Terminated {
                    self.take_back(pod, now).await.map_err(|error| chain(&error))?;
                }
            }
            self.turn.send_modify(|turn| *turn += 1);
            Ok(())
        };
        let outcome = looked.await;
        if outcome.is_err() {
            self.pods_may_be_lost.send_replace(true);
        }
        outcome
    }

    async fn take_back(&self, pod: &Pod, now: Timestamp) -> Result<(), StateError> {
        let entries = self.fleet.read()?;
        let known = |name: &str, record: &PodRecord| {
            // Of two by one name each needs a record of its own.
            record.known.pod_id.as_ref().map_or_else(|| record.cloud_name(name) == pod.name, |id| *id == pod.id)
        };
        let mut of_this_pod = entries.iter().filter(|(name, record)| known(name, record)).map(|(_, record)| record);
        if of_this_pod.clone().any(PodRecord::is_open) {
            return Ok(());
        }
        // A record that was closed too early: a pod that was to end still is.
        let was_to_end = of_this_pod.any(PodRecord::is_ending);
        let (name, intent) = pod
            .name
            .strip_prefix("autopod-")
            .and_then(|rest| rest.rsplit_once('-'))
            .map_or_else(|| (pod.id.clone(), new_intent()), |(name, intent)| (name.to_owned(), intent.to_owned()));
        let name = if entries.get(&name).is_some_and(PodRecord::is_open) { pod.id.clone() } else { name };
        let deadline = pod.env.get(ENV_EXPIRES_AT).and_then(|text| text.parse::<Timestamp>().ok());
        let (least, most) = (later(now, ADOPTED_LIVES_AT_LEAST), later(now, ADOPTED_LIVES_AT_MOST));
        let deadline = deadline.unwrap_or(now).clamp(least, most);
        let mut record = PodRecord::of_existing(pod, intent, deadline.duration_since(now));
        record.known.expires_at = Some(deadline);
        record.learn(pod, now);
        if was_to_end {
            record.wanted.state = WantedState::Gone;
        }
        if self.fleet.adopt(&name, record).await? {
            tracing::warn!(pod = pod.id, name, %deadline, was_to_end, "a pod of this home was taken back");
            let facts =
                json!({ "pod": name, "pod_id": pod.id, "expires_at": deadline, "usd_per_hour": pod.cost_per_hour });
            self.audit.note(Actor::Keeper, "taken_back", facts);
        } else {
            // Somebody was given its name at this moment; there is another one for it.
            tokio::time::sleep(self.timing.backoff_first).await;
            self.pods_may_be_lost.send_replace(true);
        }
        Ok(())
    }
}
