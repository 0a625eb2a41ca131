//! Our pods as records: what is wanted of each and what is known of it, in `pods.json`.
//!
//! Tools write `wanted`, the keeper writes `known`. The cloud is the truth about pods; a record holds what the cloud
//! can't know: who asked for what, until when, and how far the one POST has come.

mod caps;
mod owner;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::config::Home;
use crate::provider::{Cloud, Pod, PodStatus, SshAddress, VolumeMount};
use crate::state::{RecordFile, StateError};
use crate::timing::Timing;

pub use caps::{DEFAULT_LIFETIME_MINUTES, MOST_LIFETIME_MINUTES, MOST_PODS, MOST_PRICE_PER_HOUR};
pub use owner::{ENV_EXPIRES_AT, ENV_OWNER, HomeIdentity};

/// USD an hour; less is rounding.
const LEAST_TOO_MUCH: f64 = 0.005;

/// One pod: asked for once, by one intent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Unique for this request; part of the pod's name in the cloud.
    pub intent: String,
    pub wanted: PodWanted,
    pub known: PodKnown,
}

/// Written by tools only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodWanted {
    pub state: WantedState,
    pub request: PodRequest,
    /// What to try, in this order; the next one only after a definite refusal.
    pub candidates: Vec<Candidate>,
    pub lifetime_seconds: i64,
    pub requested_at: Timestamp,
    /// The most that the dearest candidate can cost until the deadline.
    pub reserved_usd: f64,
    /// USD an hour that the caller allows; the cap holds in any case.
    #[serde(default)]
    pub max_price_per_hour: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WantedState {
    Present,
    Gone,
}

/// What was asked for, resolved: two creates by one name with equal requests mean the same pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRequest {
    pub image: String,
    pub gpus: Vec<String>,
    pub gpu_count: u32,
    pub cloud: Cloud,
    pub data_centers: Vec<String>,
    pub disk_gb: u32,
    pub volume: Option<VolumeMount>,
    pub volume_name: Option<String>,
    pub ports: Vec<String>,
}

impl PodRequest {
    /// The fields in which another request differs, as `field: theirs -> ours` for an error message.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |field: &str, mine: String, theirs: String| {
            if mine != theirs {
                differences.push(format!("{field}: {mine} there, {theirs} asked"));
            }
        };
        let volume = |request: &Self| match &request.volume {
            Some(mount) => format!("{} at {}", mount.volume_id, mount.path),
            None => "none".to_owned(),
        };
        compare("image", self.image.clone(), other.image.clone());
        compare("gpus", list(&self.gpus), list(&other.gpus));
        compare("gpu_count", self.gpu_count.to_string(), other.gpu_count.to_string());
        compare("cloud", format!("{:?}", self.cloud), format!("{:?}", other.cloud));
        compare("data_centers", list(&self.data_centers), list(&other.data_centers));
        compare("disk_gb", self.disk_gb.to_string(), other.disk_gb.to_string());
        compare("volume", volume(self), volume(other));
        compare("ports", list(&self.ports), list(&other.ports));
        differences
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "any".to_owned() } else { items.join(", ") }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub gpu: String,
    pub price_per_hour: f64,
}

/// Written by the keeper only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodKnown {
    pub phase: Phase,
    pub at: Option<Timestamp>,
    pub pod_id: Option<String>,
    pub attempts: Vec<Attempt>,
    /// When the POST whose answer is awaited was sent.
    pub posted_at: Option<Timestamp>,
    pub status: Option<PodStatus>,
    pub gpu: Option<String>,
    pub data_center: Option<String>,
    pub cost_per_hour: f64,
    pub created_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    /// How often the pod was started; host keys are pinned for each start.
    pub starts: u32,
    pub ssh: Option<SshAddress>,
    /// By the provider's clock; before its first answer the one in `wanted` counts.
    pub expires_at: Option<Timestamp>,
    /// What it has cost, counted at the provider's clock while it was billed.
    pub cost_usd: f64,
    pub cost_counted_at: Option<Timestamp>,
    pub ending_since: Option<Timestamp>,
    pub ending_cause: Option<String>,
    pub gone_at: Option<Timestamp>,
    /// What went wrong last, in a sentence.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On disk, nothing sent yet.
    #[default]
    Journaled,
    /// The POST is under way, or was when the keeper died.
    Posting,
    /// The POST had no clear answer; the pod is looked for by its name.
    Unknown,
    /// A pod exists.
    Placed,
    /// Every candidate was definitely refused: there is no pod.
    Refused,
    /// Proven gone.
    Gone,
}

/// One candidate that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Attempt {
    pub gpu: String,
    pub outcome: String,
}

impl PodRecord {
    pub fn new(intent: String, request: PodRequest, candidates: Vec<Candidate>, lifetime: SignedDuration) -> Self {
        let dearest = candidates.iter().map(|candidate| candidate.price_per_hour).fold(0.0, f64::max);
        Self {
            intent,
            wanted: PodWanted {
                state: WantedState::Present,
                request,
                candidates,
                lifetime_seconds: lifetime.as_secs(),
                requested_at: Timestamp::now(),
                reserved_usd: dearest * lifetime.as_secs() as f64 / 3600.0,
                max_price_per_hour: None,
            },
            known: PodKnown::default(),
        }
    }

    /// A record for a pod that exists already.
    pub fn of_existing(pod: &Pod, intent: String, lifetime: SignedDuration) -> Self {
        let request = PodRequest {
            image: pod.image.clone(),
            gpus: pod.gpu.iter().cloned().collect(),
            gpu_count: pod.gpu_count,
            cloud: pod.cloud.unwrap_or(Cloud::Secure),
            data_centers: pod.data_center.iter().cloned().collect(),
            disk_gb: pod.disk_gb,
            volume: pod.volume.clone(),
            volume_name: None,
            ports: pod.ports.clone(),
        };
        let mut record = Self::new(intent, request, Vec::new(), lifetime);
        record.known.phase = Phase::Placed;
        record.known.pod_id = Some(pod.id.clone());
        record
    }

    /// The pod's name in the cloud, which nobody else uses.
    pub fn cloud_name(&self, name: &str) -> String {
        format!("autopod-{name}-{}", self.intent)
    }

    /// When the keeper ends it, whatever happens.
    pub fn expires_at(&self) -> Timestamp {
        self.known.expires_at.unwrap_or_else(|| later(self.wanted.requested_at, self.lifetime()))
    }

    pub fn lifetime(&self) -> SignedDuration {
        SignedDuration::from_secs(self.wanted.lifetime_seconds)
    }

    /// The most it can cost until its deadline: by its own price once that is known.
    pub fn reserved_usd(&self) -> f64 {
        match self.known.phase {
            Phase::Placed if self.known.cost_per_hour > 0.0 => {
                self.known.cost_per_hour * self.wanted.lifetime_seconds as f64 / 3600.0
            }
            _ => self.wanted.reserved_usd,
        }
    }

    /// Whether the provider may not show a pod yet that it has made, so that its absence proves nothing.
    pub fn may_lag(&self, lag: Duration) -> bool {
        let lag = SignedDuration::try_from(lag).unwrap_or(SignedDuration::ZERO);
        self.known.posted_at.is_some_and(|at| Timestamp::now().duration_since(at) < lag)
    }

    /// Neither proven gone nor refused: it may cost money.
    pub fn is_open(&self) -> bool {
        !matches!(self.known.phase, Phase::Gone | Phase::Refused)
    }

    /// Like [`Self::learn`], and a pod whose first price is higher than was allowed is to end: prices in a catalog may
    /// be old, or told later than the pod itself.
    pub fn learn_price_and_all(&mut self, pod: &Pod, now: Timestamp) {
        let is_first_price = self.known.cost_per_hour <= 0.0;
        self.learn(pod, now);
        let most = self.wanted.max_price_per_hour.unwrap_or(MOST_PRICE_PER_HOUR).min(MOST_PRICE_PER_HOUR);
        if is_first_price && pod.cost_per_hour > most + LEAST_TOO_MUCH && self.known.ending_since.is_none() {
            self.known.ending_since = Some(Timestamp::now());
            self.known.ending_cause =
                Some(format!("it costs ${:.2}/h, more than the ${most:.2}/h that were allowed", pod.cost_per_hour));
        }
    }

    /// Takes over what the provider says of the pod, and counts the cost up to the provider's `now`.
    pub fn learn(&mut self, pod: &Pod, now: Timestamp) {
        let known = &mut self.known;
        let counted_from = known.cost_counted_at.or(pod.created_at).unwrap_or(now);
        if now > counted_from {
            let hours = now.duration_since(counted_from).as_secs_f64() / 3600.0;
            // A stopped pod may keep a price that isn't charged.
            let was_billed = !matches!(known.status, Some(PodStatus::Exited | PodStatus::Terminated));
            let price = if known.cost_per_hour > 0.0 { known.cost_per_hour } else { pod.cost_per_hour };
            if was_billed {
                known.cost_usd += price * hours;
            }
        }
        known.cost_counted_at = Some(known.cost_counted_at.map_or(now, |before| before.max(now)));
        // A restart in place moves no `startedAt`, but shows in a status that wasn't running or in a new address.
        let was_started = pod.started_at.is_some() && pod.started_at != known.started_at;
        let came_up = pod.status == PodStatus::Running && known.status.is_some_and(|was| was != PodStatus::Running);
        let moved = known.ssh.is_some() && pod.ssh.is_some() && pod.ssh != known.ssh;
        if was_started || came_up || moved {
            known.starts += 1;
            known.started_at = pod.started_at.or(known.started_at);
        }
        known.phase = Phase::Placed;
        known.pod_id = Some(pod.id.clone());
        known.status = Some(pod.status);
        known.cost_per_hour = pod.cost_per_hour;
        known.created_at = pod.created_at.or(known.created_at);
        known.data_center = pod.data_center.clone().or(known.data_center.take());
        known.gpu = pod.gpu.clone().or(known.gpu.take());
        known.ssh = pod.ssh.clone();
        if known.expires_at.is_none() {
            // A pod that says it was made in the future lives no longer for it.
            let from = pod.created_at.unwrap_or(now).min(now);
            known.expires_at = Some(later(from, SignedDuration::from_secs(self.wanted.lifetime_seconds)));
        }
    }
}

/// The records of this home's pods.
#[derive(Debug, Clone)]
pub struct Fleet {
    pub home: Home,
    records: RecordFile<PodRecord>,
}

/// What asking for a pod by name came to.
#[derive(Debug)]
pub enum Ensured {
    /// This call made the intent.
    New(PodRecord),
    /// There is one by that name with the same request.
    Joined(PodRecord),
    Differs {
        differences: Vec<String>,
        record: PodRecord,
    },
    BeingTerminated(PodRecord),
    InError(PodRecord),
    TooMany {
        open: Vec<String>,
    },
}

impl Fleet {
    pub fn new(home: &Home, timing: &Timing) -> Self {
        Self { home: home.clone(), records: RecordFile::new(home.pods_file(), home.lock("state"), timing.state_lock) }
    }

    pub fn read(&self) -> Result<BTreeMap<String, PodRecord>, StateError> {
        Ok(self.records.read()?.entries)
    }

    pub fn get(&self, name: &str) -> Result<Option<PodRecord>, StateError> {
        Ok(self.read()?.remove(name))
    }

    /// Finds the pod of that name, or writes the intent for `fresh`: decided in one go under the lock, so that of
    /// any number of callers one makes the pod and the others join it.
    pub async fn ensure(&self, name: &str, fresh: PodRecord) -> Result<Ensured, StateError> {
        let name = name.to_owned();
        self.records
            .change(move |entries| {
                if let Some(record) = entries.get(&name).filter(|record| record.is_open()) {
                    let record = record.clone();
                    let differences = record.wanted.request.differences(&fresh.wanted.request);
                    return if record.wanted.state == WantedState::Gone || record.known.ending_since.is_some() {
                        Ensured::BeingTerminated(record)
                    } else if !differences.is_empty() {
                        Ensured::Differs { differences, record }
                    } else if record.known.status == Some(PodStatus::Error) {
                        Ensured::InError(record)
                    } else {
                        Ensured::Joined(record)
                    };
                }
                let open: Vec<_> =
                    entries.iter().filter(|(_, record)| record.is_open()).map(|(name, _)| name.clone()).collect();
                if open.len() >= MOST_PODS {
                    return Ensured::TooMany { open };
                }
                entries.insert(name, fresh.clone());
                Ensured::New(fresh)
            })
            .await
    }

    /// Marks the pod as not wanted any more; `None` when no open record has that intent.
    pub async fn want_gone(&self, name: &str, intent: &str) -> Result<Option<PodRecord>, StateError> {
        let (name, intent) = (name.to_owned(), intent.to_owned());
        self.records
            .change(move |entries| {
                let record = entries.get_mut(&name).filter(|record| record.intent == intent && record.is_open())?;
                record.wanted.state = WantedState::Gone;
                Some(record.clone())
            })
            .await
    }

    /// Writes what the keeper knows of an intent; `None` when the record has meanwhile become another's.
    pub async fn know(
        &self,
        name: &str,
        intent: &str,
        change: impl FnOnce(&mut PodRecord) + Send + 'static,
    ) -> Result<Option<PodRecord>, StateError> {
        let (name, intent) = (name.to_owned(), intent.to_owned());
        self.records
            .change(move |entries| {
                let record = entries.get_mut(&name).filter(|record| record.intent == intent)?;
                change(record);
                record.known.at = Some(Timestamp::now());
                Some(record.clone())
            })
            .await
    }

    /// Takes a pod into the records that no open one knows; false when one does, or when the name is taken.
    pub async fn adopt(&self, name: &str, record: PodRecord) -> Result<bool, StateError> {
        let name = name.to_owned();
        self.records
            .change(move |entries| {
                let id = record.known.pod_id.clone();
                let same = |other: &PodRecord| id.is_some() && other.is_open() && other.known.pod_id == id;
                if entries.values().any(same) || entries.get(&name).is_some_and(PodRecord::is_open) {
                    return false;
                }
                entries.insert(name, record);
                true
            })
            .await
    }
}

/// Times come from outside and may lie at the end of all time, where adding would panic.
pub fn later(from: Timestamp, by: SignedDuration) -> Timestamp {
    from.saturating_add(by).unwrap_or(from)
}

/// A short random id for an intent.
pub fn new_intent() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..12].to_owned()
}
