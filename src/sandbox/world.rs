//! The world behind the API: pods, volumes, stock, clock, faults and the log of requests.
//!
//! One lock covers pods, volumes and stock, and is held while a pod takes a step, so every answer shows the world
//! between two steps. Clock, faults and log have locks of their own and never wait for a pod.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{MutexGuard, Notify};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::catalog::{self, Cloud, Gpu, Stock};
use super::clock::{ClockMode, WorldClock};
use super::faults::Faults;
use super::pod::{Mount, Pod, PodConfig};
use super::rate_limit::RateLimit;
use super::request_log::RequestLog;

pub struct World {
    pub folder: PathBuf,
    pub key: String,
    /// Of a second account, which has nothing and can pay nothing.
    pub other_key: String,
    pub comfyui: Option<String>,
    /// Whether pods try to run commands in namespaces of their own.
    pub namespaces: bool,
    pub clock: WorldClock,
    pub faults: Faults,
    pub log: RequestLog,
    pub rate_limit: RateLimit,
    /// Wakes the task that drives the life of a live world.
    pub changed: Notify,
    /// Cancelled when the world is to end; whatever waits for long listens to it.
    pub stopping: CancellationToken,
    state: tokio::sync::Mutex<State>,
    last_client_request: Mutex<Instant>,
}

#[derive(Default)]
pub struct State {
    /// In the order of their creation, those that have ended too.
    pub pods: Vec<Pod>,
    pub volumes: BTreeMap<String, Volume>,
    pub stock: Vec<Stock>,
}

#[derive(Debug, Clone)]
pub struct Volume {
    pub id: String,
    pub name: String,
    pub size_gb: u32,
    pub data_center: &'static str,
    /// `STANDARD` or `HIGH_PERFORMANCE`.
    pub tier: &'static str,
}

/// The account's one registered key; nobody holds its private half.
pub const ACCOUNT_SSH_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDhES8t1TmHFvsYqQNGNaY3abvSqQzfJ/61Q9Tfg2xan account@sandbox";

impl World {
    pub fn new(folder: PathBuf, clock: ClockMode, comfyui: Option<String>, namespaces: bool) -> Self {
        let mut volumes = BTreeMap::new();
        // These two have the same ids in every world, so what was put on them is found again by the next one.
        for (id, name, size_gb, data_center) in
            [("c0mfym0d3l", "comfy-models", 100, "EU-RO-1"), ("tr4in1ngs3", "datasets", 50, "US-KS-2")]
        {
            let volume = Volume { id: id.to_owned(), name: name.to_owned(), size_gb, data_center, tier: "STANDARD" };
            volumes.insert(volume.id.clone(), volume);
        }
        let state = State { pods: Vec::new(), volumes, stock: catalog::initial_stock() };
        Self {
            folder,
            key: new_key(),
            other_key: new_key(),
            comfyui,
            namespaces,
            clock: WorldClock::new(clock),
            faults: Faults::default(),
            log: RequestLog::default(),
            rate_limit: RateLimit::default(),
            changed: Notify::new(),
            stopping: CancellationToken::new(),
            state: tokio::sync::Mutex::new(state),
            last_client_request: Mutex::new(Instant::now()),
        }
    }

    /// The world as it is now: whatever was due has happened.
    pub async fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().await;
        self.drive(&mut state).await;
        state
    }

    /// How long nothing will happen by itself in a live world, at most a second.
    pub async fn quiet_for(&self) -> Duration {
        let longest = Duration::from_secs(1);
        let state = self.state.lock().await;
        let Some(next) = state.pods.iter().filter_map(Pod::due).min() else { return longest };
        Duration::try_from(next.duration_since(self.clock.now())).unwrap_or_default().min(longest)
    }

    pub fn note_client_request(&self) {
        *self.last_client_request.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether there is no pod and no client asked anything for so long, in real time.
    pub async fn is_idle_for(&self, limit: Duration) -> bool {
        let last = *self.last_client_request.lock().unwrap_or_else(PoisonError::into_inner);
        last.elapsed() >= limit && self.state.lock().await.pods.iter().all(Pod::is_gone)
    }

    /// Ends every pod's servers.
    pub async fn shut_down(&self) {
        let mut state = self.state.lock().await;
        let now = self.clock.now();
        for pod in state.pods.iter_mut().filter(|pod| !pod.is_gone()) {
            self.end_pod(pod, now).await;
        }
    }

    pub fn pod_folder(&self, id: &str) -> PathBuf {
        pods_folder(&self.folder).join(id)
    }

    pub fn volume_folder(&self, id: &str) -> PathBuf {
        self.folder.join("volumes").join(id)
    }
}

impl State {
    pub fn pod(&self, id: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.id == id && !pod.is_gone())
    }

    pub fn pod_mut(&mut self, id: &str) -> Option<&mut Pod> {
        self.pods.iter_mut().find(|pod| pod.id == id && !pod.is_gone())
    }

    /// How many GPUs of a type are neither rented nor missing.
    pub fn free(&self, gpu: &Gpu, data_center: &str, cloud: Cloud) -> u32 {
        let there = self.stock.iter().filter(|stock| stock.gpu == gpu.id && stock.data_center == data_center);
        let all: u32 = there
            .map(|stock| match cloud {
                Cloud::Secure => stock.secure,
                Cloud::Community => stock.community,
            })
            .sum();
        let rented = self.pods.iter().filter(|pod| {
            let config = &pod.config;
            pod.holds_gpus() && config.gpu.id == gpu.id && config.data_center == data_center && config.cloud == cloud
        });
        all.saturating_sub(rented.map(|pod| pod.config.gpu_count).sum())
    }

    pub fn volume_in_use(&self, id: &str) -> bool {
        self.pods.iter().any(|pod| {
            !pod.is_gone() && matches!(&pod.config.mount, Some(Mount::Network { volume_id, .. }) if volume_id == id)
        })
    }

    pub fn add_pod(&mut self, config: PodConfig, now: Timestamp) -> &mut Pod {
        let id = new_id(14);
        self.pods.push(Pod::new(id, config, new_key(), now));
        let last = self.pods.len() - 1;
        &mut self.pods[last]
    }
}

impl Volume {
    pub fn view(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "size": self.size_gb,
            "dataCenter": self.data_center,
            "type": self.tier,
        })
    }
}

/// Where the folders of the pods lie, which don't outlive their world.
pub fn pods_folder(folder: &Path) -> PathBuf {
    folder.join("pods")
}

/// A random id as RunPod's look, such as `7h9k2m4n6p`.
pub fn new_id(length: usize) -> String {
    const LETTERS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let bytes = Uuid::new_v4().into_bytes().into_iter().chain(Uuid::new_v4().into_bytes());
    bytes.take(length).map(|byte| char::from(LETTERS[usize::from(byte) % LETTERS.len()])).collect()
}

/// A random key that looks like one of RunPod's.
pub fn new_key() -> String {
    format!("rpa_{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}
