//! What a call carries: the services below it, and the ways back to whoever asked.

mod ask;

use std::sync::Arc;

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::background::KeeperClient;
use crate::config::{Config, Home, Limits};
use crate::errors::chain;
use crate::errors::harmless;
use crate::fleet::{Audit, ENV_OWNER, Fleet, HomeIdentity, PodRecord, VolumeRecord, Volumes};
use crate::provider::{GpuProvider, Pod, PodStatus};
use crate::ssh::Ssh;
use crate::state::StateError;
use crate::timing::Timing;
use crate::tunnel::Tunnels;

use super::{ErrorKind, StillBilling, ToolError};

pub use ask::{Answered, Ask, Question};

const MEND_CONFIG: &str = "mend that; until then nothing that costs money is begun, but pods are listed and ended";

/// Everything a tool works with, wired once in `app`.
#[derive(Debug)]
pub struct Services {
    pub home: Home,
    /// Or what is wrong with the file; [`Self::config`] and [`Self::limits`] tell it.
    pub config: Result<Config, ToolError>,
    pub timing: Timing,
    /// `None` while no key is set.
    pub provider: Option<Arc<dyn GpuProvider>>,
    pub fleet: Fleet,
    pub volumes: Volumes,
    pub audit: Audit,
    pub tunnels: Tunnels,
    pub ssh: Ssh,
    pub keeper: KeeperClient,
}

impl Services {
    /// The provider, or how to set the key that it needs.
    pub fn provider(&self) -> Result<&Arc<dyn GpuProvider>, ToolError> {
        self.provider.as_ref().ok_or_else(|| {
            if let Err(problem) = &self.config {
                return ToolError::new(ErrorKind::Setup, format!("no RunPod API key could be read: {}", problem.message))
                    .hint("mend that file, or set RUNPOD_API_KEY where this program is started");
            }
            ToolError::new(ErrorKind::Setup, "no RunPod API key is set").hint(format!(
                "run `autopod-mcp config init`, which keeps it in {}, or set RUNPOD_API_KEY where this server is started; \
                 keys are made at https://console.runpod.io/user/settings. Without an account: start with --sandbox",
                self.home.config_file().display()
            ))
        })
    }
}

impl Services {
    /// What the user set. An error for whatever needs it, and never the defaults, when the file breaks a rule.
    pub fn config(&self) -> Result<&Config, ToolError> {
        self.config.as_ref().map_err(|problem| problem.clone().hint(MEND_CONFIG))
    }

    /// The caps as the config says now: whoever lowers one while a server runs means that server, too.
    pub fn limits(&self) -> Result<Limits, ToolError> {
        let config = Config::read(&self.home);
        let config = config.map_err(|error| ToolError::new(ErrorKind::Setup, chain(&error)).hint(MEND_CONFIG))?;
        Ok(config.limits)
    }

    /// What is wrong with the config, for those who can go on without it.
    pub fn config_warning(&self) -> Option<String> {
        self.config.as_ref().err().map(|problem| format!("{}; {MEND_CONFIG}", problem.message))
    }

    /// The keeper, awake, for a call that changes something. Refused when the home belongs to another account: a
    /// foreign key proves nothing about the pods recorded here.
    pub async fn keeper_for_changes(&self) -> Result<(), ToolError> {
        self.refuse_foreign_account().await?;
        Ok(self.keeper.ensure_and_wake().await?)
    }

    /// Starts the keeper when something is wanted and none lives: pods must not outlive their keeper for long.
    pub async fn revive_keeper(&self) -> Result<(), ToolError> {
        if self.keeper.is_alive() {
            return Ok(());
        }
        let wanted = self.fleet.read()?.values().any(PodRecord::is_open)
            || self.tunnels.read()?.values().any(|t| t.is_open())
            || self.volumes.read()?.values().any(VolumeRecord::is_open);
        if wanted { self.keeper_for_changes().await } else { Ok(()) }
    }

    /// To be asked before a wish is written, so that none is left behind in a home that may not carry it out.
    pub async fn refuse_foreign_account(&self) -> Result<(), ToolError> {
        let Some(account) = self.keeper.account() else { return Ok(()) };
        let records = self.fleet.read()?;
        let open: Vec<_> = records.iter().filter(|(_, record)| record.is_open()).collect();
        self.restore_lost_identity(&open).await?;
        let bound = self.of_identity({
            let (fleet, volumes, account) = (self.fleet.clone(), self.volumes.clone(), account.clone());
            move |home, timing| {
                HomeIdentity::bind(home, timing, &account, || Ok(fleet.has_open()? || volumes.is_any_being_sent()?))
            }
        });
        let unwritten = match bound.await {
            Ok(true) => return Ok(()),
            Ok(false) => None,
            Err(error) => Some(error),
        };
        if self.sees_one_of(&open).await {
            // Another key of the same account, or a disk that doesn't take the binding: neither may keep a pod alive.
            let rebound = self.of_identity(move |home, timing| HomeIdentity::rebind(home, timing, &account));
            if let Err(error) = rebound.await {
                tracing::warn!(error = %chain(&error), "whose home this is can't be written");
            }
            return Ok(());
        }
        if let Some(error) = unwritten {
            return Err(error.into());
        }
        Err(self.another_account())
    }

    /// What waits for a lock over the home runs on a thread that may wait.
    async fn of_identity<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Home, &Timing) -> Result<R, StateError> + Send + 'static,
    ) -> Result<R, StateError> {
        let (home, timing) = (self.home.clone(), self.timing.clone());
        tokio::task::spawn_blocking(move || work(&home, &timing))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    fn another_account(&self) -> ToolError {
        ToolError::refused(format!(
            "the pods recorded in {} belong to another API key or provider, so nothing is changed through this one",
            self.home.root().display()
        ))
        .hint("use the key that made them, or another AUTOPOD_HOME for this account")
        .billing(StillBilling::Possible)
    }
}

impl Services {
    /// A new owner would disown the pods that carry the old one, so it is asked of them.
    async fn restore_lost_identity(&self, open: &[(&String, &PodRecord)]) -> Result<(), ToolError> {
        let Some(provider) = &self.provider else { return Ok(()) };
        // One that can't be read is told by whoever needs it.
        let is_lost = matches!(HomeIdentity::read(&self.home), Ok(None));
        if !is_lost || open.iter().all(|(_, record)| record.known.pod_id.is_none()) {
            return Ok(());
        }
        let listed = provider.pods().await.map_err(|error| ToolError::from(error).billing(StillBilling::Possible))?;
        // A key that shows none of them would take the home over, and take them for gone.
        if !self.sees_one_of(open).await {
            return Err(self.another_account());
        }
        let ours = |pod: &&Pod| open.iter().any(|(_, record)| record.known.pod_id.as_ref() == Some(&pod.id));
        let owner = listed.value.iter().filter(ours).find_map(|pod| pod.env.get(ENV_OWNER));
        let Some(owner) = owner.cloned() else { return Ok(()) };
        tracing::warn!("whose home this is was lost and is restored from one of its pods");
        let restored = self.of_identity(move |home, timing| HomeIdentity::restore(home, timing, &owner));
        if let Err(error) = restored.await {
            tracing::warn!(error = %chain(&error), "whose home this is can't be written");
        }
        Ok(())
    }

    /// Whether the key in hand shows one of these pods alive: then it is a new key of the account that made them.
    async fn sees_one_of(&self, open: &[(&String, &PodRecord)]) -> bool {
        let Some(provider) = &self.provider else { return false };
        let Ok(listed) = provider.pods().await else { return false };
        listed.value.iter().filter(|pod| pod.status != PodStatus::Terminated).any(|pod| {
            let same = |(name, record): &(&String, &PodRecord)| {
                record.known.pod_id.as_ref() == Some(&pod.id) || record.cloud_name(name) == pod.name
            };
            open.iter().any(same)
        })
    }
}

/// One call's surroundings. Handlers don't know which face called.
#[derive(Clone)]
pub struct Context {
    pub services: Arc<Services>,
    pub progress: Progress,
    /// Asks the person behind the call.
    pub ask: Ask,
    pub cancel: CancellationToken,
    /// Whether the server was started to read only. A tool that reads then opens nothing on its way either, such as a
    /// tunnel.
    pub read_only: bool,
    /// Work that goes on after the answer; `None` where the process ends with the answer.
    pub after_answer: Option<TaskTracker>,
}

impl Context {
    /// A context whose process ends with the answer, which shows no progress and has nobody to ask.
    pub fn new(services: Arc<Services>) -> Self {
        Self {
            services,
            progress: Progress::none(),
            ask: Ask::cannot(),
            cancel: CancellationToken::new(),
            read_only: false,
            after_answer: None,
        }
    }
}

/// How far a waiting call has come.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProgressUpdate {
    pub message: String,
    /// Never falls within one call, as MCP asks.
    pub value: f64,
    pub total: Option<f64>,
}

/// Where progress goes; nowhere for faces that can't show it.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(ProgressUpdate) + Send + Sync>);

impl Progress {
    pub fn none() -> Self {
        Self(Arc::new(|_| {}))
    }

    pub fn to(sink: impl Fn(ProgressUpdate) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    pub fn tell(&self, message: impl Into<String>, value: f64, total: Option<f64>) {
        (self.0)(ProgressUpdate { message: harmless(&message.into()), value, total });
    }
}
