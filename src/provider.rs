//! What a provider of GPU pods can do, in the product's own words; no provider's name in it.

mod ending;
mod logs;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use ending::{Ended, delete_and_prove};
pub use logs::{LogLimits, LogLine, LogPage, LogQuery, LogSource, LogStream};

/// An answer with the provider's own clock (the `Date` header), by which ages, costs and deadlines are counted.
#[derive(Debug, Clone)]
pub struct Stamped<T> {
    pub value: T,
    pub date: Option<Timestamp>,
}

#[async_trait]
pub trait GpuProvider: Send + Sync + std::fmt::Debug {
    /// One POST, never repeated by the adapter. Whether a failure may have made a pod anyway is told by
    /// [`ProviderError::may_have_happened`].
    async fn create_pod(&self, spec: &PodSpec) -> Result<Stamped<Pod>, ProviderError>;
    async fn pod(&self, id: &str) -> Result<Stamped<Pod>, ProviderError>;
    /// Every pod of the account, all pages.
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError>;
    /// Start, stop or restart. [`PodAction::Terminate`] is refused as [`ProviderError::Invalid`] and not sent: use
    /// [`GpuProvider::delete_pod`], after which there is no pod to return.
    async fn control_pod(&self, id: &str, action: PodAction) -> Result<Stamped<Pod>, ProviderError>;
    /// Idempotent. A 404 comes back as [`ProviderError::NotFound`] and proves nothing by itself.
    async fn delete_pod(&self, id: &str) -> Result<Stamped<()>, ProviderError>;
    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError>;
    async fn create_volume(&self, spec: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError>;
    async fn grow_volume(&self, id: &str, size_gb: u32) -> Result<Stamped<Volume>, ProviderError>;
    /// Idempotent like [`GpuProvider::delete_pod`]; everything on the volume is lost.
    async fn delete_volume(&self, id: &str) -> Result<Stamped<()>, ProviderError>;
    /// The catalog of GPUs with the stock of the moment in one cloud for pods with `count` GPUs.
    async fn gpus(&self, count: u32, cloud: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError>;
    /// The account's SSH public keys, one `authorized_keys` line each.
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError>;
    /// What a pod has said, read for as long as `limits` allow. The provider's stream never ends by itself.
    async fn pod_logs(&self, id: &str, query: &LogQuery, limits: &LogLimits) -> Result<LogPage, ProviderError>;
    /// What a pod says from now on, after the lines that `query` asks for. A broken connection is taken up again where
    /// it broke; an error is the stream's last item.
    async fn follow_logs(&self, id: &str, query: &LogQuery) -> Result<LogStream, ProviderError>;
    /// What the account was charged for each pod in a span of time, by the provider's own books; without `until` up
    /// to now. The span is widened to whole hours. A key that may not read the books gets
    /// [`ProviderError::Forbidden`], and a provider without them answers [`ProviderError::NotFound`].
    async fn billing(&self, from: Timestamp, until: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError>;
}

/// What one create asks for. `env` holds everything that goes into the container, `PUBLIC_KEY` included.
#[derive(Clone, PartialEq)]
pub struct PodSpec {
    pub name: String,
    /// Required unless a template brings one; with both, this one counts.
    pub image: Option<String>,
    /// What isn't named here is taken from the template, once, at the create.
    pub template: Option<String>,
    /// The id of stored credentials for a private image.
    pub registry: Option<String>,
    pub gpu: String,
    pub gpu_count: u32,
    pub min_cuda: Option<String>,
    pub cloud: Cloud,
    /// A preference only: where the pod landed has to be checked.
    pub data_centers: Vec<String>,
    pub disk_gb: u32,
    pub volume: Option<VolumeMount>,
    /// Like `8188/http` and `22/tcp`; there is no default.
    pub ports: Vec<String>,
    pub env: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    pub volume_id: String,
    pub path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cloud {
    Secure,
    Community,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PodAction {
    Start,
    Stop,
    Restart,
    Terminate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PodStatus {
    Provisioning,
    Starting,
    Running,
    Exited,
    Error,
    Terminated,
    /// A status this version doesn't know: treated as alive and billed.
    #[serde(other)]
    Unknown,
}

/// The provider's word, as every answer writes it.
impl std::fmt::Display for PodStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Provisioning => "PROVISIONING",
            Self::Starting => "STARTING",
            Self::Running => "RUNNING",
            Self::Exited => "EXITED",
            Self::Error => "ERROR",
            Self::Terminated => "TERMINATED",
            Self::Unknown => "UNKNOWN",
        })
    }
}

#[derive(Clone)]
pub struct Pod {
    pub id: String,
    pub name: String,
    pub status: PodStatus,
    /// What the provider says is legal now.
    pub actions: Vec<PodAction>,
    pub image: String,
    pub gpu: Option<String>,
    pub gpu_count: u32,
    pub cloud: Option<Cloud>,
    pub data_center: Option<String>,
    pub disk_gb: u32,
    pub volume: Option<VolumeMount>,
    pub ports: Vec<String>,
    /// Holds secrets: never shown, never logged.
    pub env: BTreeMap<String, String>,
    pub cost_per_hour: f64,
    pub created_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    /// Where the pod's own sshd is reached; the provider's SSH proxy never stands here, for it forwards nothing.
    pub ssh: Option<SshAddress>,
    pub has_ssh_proxy: bool,
    /// Seconds since the container started, as far as the provider tells.
    pub uptime_seconds: Option<u64>,
    /// The id of the credentials that its image was pulled with.
    pub registry: Option<String>,
    /// The CUDA version of the machine that it is on.
    pub cuda: Option<String>,
    /// Its user forbade to stop it.
    pub locked: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshAddress {
    pub host: String,
    pub port: u16,
    pub user: String,
}

#[derive(Debug, Clone)]
pub struct Volume {
    pub id: String,
    pub name: String,
    pub size_gb: u32,
    pub data_center: String,
    /// `STANDARD` or `HIGH_PERFORMANCE`, where told.
    pub tier: Option<String>,
}

#[derive(Debug, Clone)]
pub struct VolumeSpec {
    pub name: String,
    pub size_gb: u32,
    pub data_center: String,
}

/// What was charged for one pod.
#[derive(Debug, Clone, PartialEq)]
pub struct PodBill {
    pub pod_id: String,
    pub total_usd: f64,
    pub gpu_usd: f64,
    pub disk_usd: f64,
}

#[derive(Debug, Clone)]
pub struct GpuType {
    /// The exact id that a create takes, like `NVIDIA GeForce RTX 4090`.
    pub id: String,
    /// The short name, like `RTX 4090`.
    pub name: String,
    pub vram_gb: u32,
    /// USD an hour for one GPU; `None` where that cloud doesn't offer it.
    pub secure_price: Option<f64>,
    pub community_price: Option<f64>,
    pub max_count_secure: u32,
    pub max_count_community: u32,
    pub stock: Stock,
    pub data_centers: Vec<(String, Stock)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Stock {
    None,
    Low,
    Medium,
    High,
}

/// Why a call to the provider failed. `Display` is one sentence; the cause below it is in `source()`.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    #[error("no API key is set")]
    MissingKey,
    #[error("the provider refused the API key ({detail})")]
    Unauthorized { detail: String },
    #[error("this API key may not do that ({detail})")]
    Forbidden { detail: String },
    #[error("the provider knows no such {what} ({detail})")]
    NotFound { what: &'static str, detail: String },
    /// The request breaks the provider's contract; sending it again can't help.
    #[error("the provider rejected the request: {detail}{}", join(.errors))]
    Invalid { detail: String, errors: Vec<String> },
    /// A definite refusal that only `detail` explains: no capacity, or fields that don't go together.
    #[error("the provider refused: {detail}")]
    Refused { detail: String },
    #[error("the account's balance is too low ({detail})")]
    PaymentRequired { detail: String },
    #[error("not possible in the present state ({detail})")]
    Conflict { detail: String },
    #[error("the provider's rate limit is used up, free again in {retry_after:?}")]
    RateLimited { retry_after: Duration },
    #[error("the provider failed with HTTP {status} ({detail})")]
    Server { status: u16, detail: String },
    #[error("the provider at {origin} can't be reached")]
    Unreachable { origin: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the provider didn't answer within {after:?}")]
    TimedOut { after: Duration },
    #[error("the connection broke before the answer was complete")]
    Broken { source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the provider's answer can't be read at `{path}`: {reason}")]
    Unreadable { path: String, reason: String },
    /// What this machine lacks to make the call at all, such as CA certificates.
    #[error("{0}")]
    Setup(String),
}

/// Written by hand, so that of the environment only the names are shown.
impl std::fmt::Debug for PodSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodSpec")
            .field("name", &self.name)
            .field("image", &self.image)
            .field("template", &self.template)
            .field("registry", &self.registry)
            .field("gpu", &self.gpu)
            .field("gpu_count", &self.gpu_count)
            .field("min_cuda", &self.min_cuda)
            .field("cloud", &self.cloud)
            .field("data_centers", &self.data_centers)
            .field("disk_gb", &self.disk_gb)
            .field("volume", &self.volume)
            .field("ports", &self.ports)
            .field("env", &self.env.keys())
            .finish()
    }
}

/// Written by hand, so that of the environment only the names are shown.
impl std::fmt::Debug for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pod")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("status", &self.status)
            .field("gpu", &self.gpu)
            .field("gpu_count", &self.gpu_count)
            .field("data_center", &self.data_center)
            .field("volume", &self.volume)
            .field("cost_per_hour", &self.cost_per_hour)
            .field("ssh", &self.ssh)
            .field("env", &self.env.keys())
            .finish_non_exhaustive()
    }
}

fn join(errors: &[String]) -> String {
    if errors.is_empty() { String::new() } else { format!(" [{}]", errors.join("; ")) }
}

impl ProviderError {
    /// Whether a call that failed so may have had its effect all the same. A create that failed so is never sent
    /// again; its pod is looked for by name instead.
    pub fn may_have_happened(&self) -> bool {
        match self {
            Self::Server { .. } | Self::TimedOut { .. } | Self::Broken { .. } | Self::Unreadable { .. } => true,
            Self::MissingKey
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::NotFound { .. }
            | Self::Invalid { .. }
            | Self::Refused { .. }
            | Self::PaymentRequired { .. }
            | Self::Conflict { .. }
            | Self::RateLimited { .. }
            | Self::Unreachable { .. }
            | Self::Setup(_) => false,
        }
    }

    /// Whether the same call may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Server { .. }
                | Self::TimedOut { .. }
                | Self::Broken { .. }
                | Self::Unreachable { .. }
                | Self::RateLimited { .. }
        )
    }
}
