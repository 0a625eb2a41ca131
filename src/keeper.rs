//! The one background process of a home: it makes true what the records want.
//!
//! It alone creates and ends pods and holds every ssh child, so there is one writer and nothing depends on the server
//! or terminal that asked. Its loop only compares; each pod and each tunnel has a task of its own, so nothing waits for
//! the network of another. A guard process (`keeper/guard.rs`) starts the worker again when it dies.

pub mod guard;
mod pod_task;
mod socket;
mod tunnel_task;

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::background::socket_path;
use crate::config::Home;
use crate::errors::chain;
use crate::fleet::{ENV_EXPIRES_AT, ENV_OWNER, Fleet, HomeIdentity, PodRecord, new_intent};
use crate::provider::{GpuProvider, Pod};
use crate::ssh::Ssh;
use crate::state::{Lock, StateError};
use crate::timing::Timing;
use crate::tunnel::Tunnels;

/// A pod of ours that no record knew lives at least this long after it was found, so that a wrong clock or an old
/// deadline doesn't end it under somebody's hands.
const ADOPTED_LIVES_AT_LEAST: SignedDuration = SignedDuration::from_mins(15);

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
    tunnels: Tunnels,
    ssh: Ssh,
    origin: String,
    provider: watch::Sender<Option<Arc<dyn GpuProvider>>>,
    connect: Connect,
    on_key: OnKey,
    /// Counts turns; a change means: compare now.
    turn: watch::Sender<u64>,
    last_turn: watch::Sender<Instant>,
    retire: CancellationToken,
    stop: CancellationToken,
}

/// Holds the home until nothing is wanted any more or it is told to stop.
pub async fn run(options: KeeperOptions) -> Result<Ended, StateError> {
    let Some(lock) = Lock::try_take(&options.home.lock("keeper"))? else { return Ok(Ended::Another) };
    let provider = options.key.map(|key| (options.connect)(key));
    let keeper = Arc::new(Keeper {
        fleet: Fleet::new(&options.home, &options.timing),
        tunnels: Tunnels::new(&options.home, &options.timing),
        timing: options.timing,
        ssh: Ssh { folder: options.home.ssh(), environment: options.ssh_environment },
        home: options.home,
        provider: watch::Sender::new(provider),
        origin: options.origin,
        connect: options.connect,
        on_key: options.on_key,
        turn: watch::Sender::new(0),
        last_turn: watch::Sender::new(Instant::now()),
        retire: CancellationToken::new(),
        stop: options.stop,
    });
    let socket = socket::serve(keeper.clone())?;
    let ended = keeper.clone().compare_until_idle().await;
    socket.abort();
    let state_lock = match ended {
        // Under the lock over the records nobody can add a wish between the last look and the freeing of our lock.
        Ended::Idle => keeper.lock_if_still_idle().await?,
        _ => None,
    };
    let _ = std::fs::remove_file(socket_path(&keeper.home));
    drop(lock);
    drop(state_lock);
    tracing::info!(?ended, "the keeper ends");
    Ok(ended)
}

impl Keeper {
    async fn compare_until_idle(self: Arc<Self>) -> Ended {
        let mut tasks: HashMap<String, JoinHandle<()>> = HashMap::new();
        let mut idle_since = Instant::now();
        let mut turn = self.turn.subscribe();
        let adoption = tokio::spawn(self.clone().take_back_our_pods());
        let ended = loop {
            self.last_turn.send_replace(Instant::now());
            let wanted = self.start_missing_tasks(&mut tasks);
            if wanted || !adoption.is_finished() && self.provider.borrow().is_some() {
                idle_since = Instant::now();
            } else if idle_since.elapsed() >= self.timing.keeper_idle
                && matches!(self.clone().lock_if_still_idle().await, Ok(Some(_)))
            {
                break Ended::Idle;
            }
            tokio::select! {
                () = self.stop.cancelled() => break Ended::Stopped,
                () = self.retire.cancelled() => break Ended::Retired,
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
        let (pods, tunnels) = match (self.fleet.read(), self.tunnels.read()) {
            (Ok(pods), Ok(tunnels)) => (pods, tunnels),
            (Err(error), _) | (_, Err(error)) => {
                // Unreadable records are no proof that nothing is wanted.
                tracing::error!(error = %chain(&error), "the records can't be read");
                return true;
            }
        };
        for (name, record) in pods.iter().filter(|(_, record)| record.is_open()) {
            tasks.entry(format!("pod {}", record.intent)).or_insert_with(|| {
                tokio::spawn(pod_task::look_after(self.clone(), name.clone(), record.intent.clone()))
            });
        }
        for (name, record) in tunnels.iter().filter(|(_, record)| record.is_open() || !record.wanted.open) {
            tasks
                .entry(format!("tunnel {}", record.intent))
                .or_insert_with(|| tokio::spawn(tunnel_task::hold(self.clone(), name.clone(), record.intent.clone())));
        }
        !tasks.is_empty()
    }

    /// The lock over the records, if under it nothing is wanted.
    async fn lock_if_still_idle(&self) -> Result<Option<Lock>, StateError> {
        let (path, patience) = (self.home.lock("state"), self.timing.state_lock);
        let lock = tokio::task::spawn_blocking(move || Lock::take(&path, patience))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let wanted = self.fleet.read()?.values().any(PodRecord::is_open) || !self.tunnels.read()?.is_empty();
        Ok((!wanted).then_some(lock))
    }

    /// Lets a POST in flight finish, for its answer is the only trace of a pod; everything else is dropped at once.
    async fn finish(&self, tasks: HashMap<String, JoinHandle<()>>) {
        self.stop.cancel();
        let longest = self.timing.http_create + Duration::from_secs(5);
        for (_, task) in tasks {
            let _ = tokio::time::timeout(longest, task).await;
        }
    }

    fn provider(&self) -> Option<Arc<dyn GpuProvider>> {
        self.provider.borrow().clone()
    }

    /// Waits for the next turn, the order to stop, or until `most` is over.
    async fn wait(&self, turn: &mut watch::Receiver<u64>, most: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            _ = turn.changed() => {}
            () = tokio::time::sleep(most) => {}
        }
    }

    /// Pods of this home that no record knows come back into the records with their deadline.
    async fn take_back_our_pods(self: Arc<Self>) {
        let mut provider = self.provider.subscribe();
        let connected = provider.wait_for(Option::is_some).await.map(|connected| connected.clone());
        let Ok(Some(provider)) = connected else { return };
        let Ok(Some(identity)) = HomeIdentity::read(&self.home) else { return };
        let mut pause = self.timing.backoff_first;
        loop {
            match provider.pods().await {
                Ok(listed) => {
                    let now = listed.date.unwrap_or_else(Timestamp::now);
                    for pod in listed.value.iter().filter(|pod| pod.env.get(ENV_OWNER) == Some(&identity.owner)) {
                        self.take_back(pod, now).await;
                    }
                    self.turn.send_modify(|turn| *turn += 1);
                    return;
                }
                Err(error) if error.is_transient() => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(self.timing.backoff_most);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "our pods can't be listed");
                    return;
                }
            }
        }
    }

    async fn take_back(&self, pod: &Pod, now: Timestamp) {
        let Ok(entries) = self.fleet.read() else { return };
        let known = |name: &str, record: &PodRecord| {
            record.known.pod_id.as_ref() == Some(&pod.id) || record.cloud_name(name) == pod.name
        };
        if entries.iter().any(|(name, record)| known(name, record)) {
            return;
        }
        let (name, intent) = pod
            .name
            .strip_prefix("autopod-")
            .and_then(|rest| rest.rsplit_once('-'))
            .map_or_else(|| (pod.id.clone(), new_intent()), |(name, intent)| (name.to_owned(), intent.to_owned()));
        let name = if entries.get(&name).is_some_and(PodRecord::is_open) { pod.id.clone() } else { name };
        let deadline = pod.env.get(ENV_EXPIRES_AT).and_then(|text| text.parse::<Timestamp>().ok());
        let deadline = deadline.unwrap_or(now).max(now + ADOPTED_LIVES_AT_LEAST);
        let mut record = PodRecord::of_existing(pod, intent, deadline.duration_since(now));
        record.known.expires_at = Some(deadline);
        record.learn(pod, now);
        match self.fleet.adopt(&name, record).await {
            Ok(true) => tracing::warn!(pod = pod.id, name, %deadline, "a pod of this home was taken back"),
            Ok(false) => {}
            Err(error) => tracing::error!(error = %chain(&error), "a pod of this home can't be recorded"),
        }
    }
}
