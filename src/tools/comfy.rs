//! ComfyUI: status, queue, run, job. What they share is here: which server is meant, and the one way to reach it.

mod errors;
mod follow;
mod job;
mod queue;
mod run;
mod status;

use std::time::{Duration, Instant};

use super::context::{Progress, Services};
use super::pods::find_or_only;
use super::tunnels::{Stage, join, open};
use super::waiting::Waiting;
use super::{Context, StillBilling, ToolError};
use crate::comfy::{ComfyClient, ComfyTimeouts, SystemStats};
use crate::errors::chain;
use crate::timing::WAIT_MOST_SECONDS;
use crate::tunnel::{COMFY_PORT, LocalPort, TunnelRecord};

pub use job::ComfyJob;
pub use queue::ComfyQueue;
pub use run::ComfyRun;
pub use status::ComfyStatus;

/// A check of `/system_stats` is made again after these, as long as the call may wait.
const CHECK_PAUSES: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(4), Duration::from_secs(8)];
const CHECK_LIMIT: Duration = Duration::from_secs(5);
/// Even a check at the very end of a call gets so long.
const CHECK_LEAST: Duration = Duration::from_secs(1);

/// Which ComfyUI a call means.
#[derive(Debug, Clone)]
enum Target {
    /// By the pod's name, through its tunnel.
    Pod(String),
    /// At an address, past every tunnel of ours.
    Url(String),
}

impl Target {
    /// From a tool's `pod` and `url`; the only pod when neither is given.
    async fn choose(services: &Services, pod: Option<&str>, url: Option<&str>) -> Result<Self, ToolError> {
        match (pod, url) {
            (Some(_), Some(_)) => Err(ToolError::invalid("url", "give a pod or an address, not both")),
            (None, Some(url)) => {
                let usable = ComfyClient::new(url, ComfyTimeouts::default());
                usable.map_err(|error| ToolError::invalid("url", error))?;
                if url.contains('@') {
                    // It would end up in the job's record and in answers.
                    return Err(ToolError::invalid("url", "expected an address without a user name or password"));
                }
                Ok(Self::Url(url.trim_end_matches('/').to_owned()))
            }
            (pod, None) => Ok(Self::Pod(find_or_only(services, pod).await?.name)),
        }
    }

    /// The target that a job's record names.
    fn of_base(base: &str) -> Self {
        if base.contains("://") { Self::Url(base.to_owned()) } else { Self::Pod(base.to_owned()) }
    }

    /// How a job's record names it.
    fn base(&self) -> &str {
        match self {
            Self::Pod(name) => name,
            Self::Url(url) => url,
        }
    }

    fn pod(&self) -> Option<&str> {
        match self {
            Self::Pod(name) => Some(name),
            Self::Url(_) => None,
        }
    }

    /// A pod costs money as long as it is there, whatever became of the call.
    fn billing(&self) -> Option<StillBilling> {
        self.pod().map(|_| StillBilling::Yes)
    }

    /// Like `comfy_status {"pod": "comfy"}`.
    fn call(&self, tool: &str) -> String {
        match self {
            Self::Pod(name) => format!("{tool} {{\"pod\": \"{name}\"}}"),
            Self::Url(url) => format!("{tool} {{\"url\": \"{url}\"}}"),
        }
    }

    fn told(&self, mut error: ToolError) -> ToolError {
        error.still_billing = error.still_billing.or(self.billing());
        error
    }
}

/// A ComfyUI that answered just now.
struct Ready {
    url: String,
    client: ComfyClient,
    stats: SystemStats,
    latency: Duration,
}

/// One that could not be reached within the time there was.
struct NotYet {
    url: Option<String>,
    waiting_for: String,
    /// The same as a sentence.
    cause: String,
}

/// Opens or reuses the tunnel and asks `/system_stats` through it now: a record that says healthy can be a moment
/// behind, so it alone is never believed.
async fn reach(waiting: &Waiting<'_>, context: &Context, target: &Target) -> Result<Result<Ready, NotYet>, ToolError> {
    let mut pauses = CHECK_PAUSES.into_iter();
    loop {
        let url = match target {
            Target::Url(url) => url.clone(),
            Target::Pod(pod) => match through_tunnel(waiting, context, pod).await? {
                Ok(url) => url,
                Err(not_yet) => return Ok(Err(not_yet)),
            },
        };
        let limit = Duration::from_secs(WAIT_MOST_SECONDS).saturating_sub(waiting.elapsed());
        let limit = CHECK_LIMIT.min(limit).max(CHECK_LEAST);
        let check = ComfyTimeouts { connect: limit, request: limit, ..ComfyTimeouts::default() };
        let started = Instant::now();
        let error = match ComfyClient::new(&url, check)?.system_stats().await {
            Ok(stats) => {
                let latency = started.elapsed();
                let client = ComfyClient::new(&url, ComfyTimeouts::default())?;
                return Ok(Ok(Ready { url, client, stats, latency }));
            }
            Err(error) => error,
        };
        let cause = chain(&error);
        let pause = pauses.next().filter(|pause| error.is_transient() && waiting.left() >= *pause);
        let Some(pause) = pause else {
            return Ok(Err(NotYet { url: Some(url), waiting_for: format!("ComfyUI to answer ({cause})"), cause }));
        };
        waiting.tell(format!("waiting for ComfyUI to answer: {cause}"));
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = context.cancel.cancelled() => {}
        }
    }
}

async fn through_tunnel(
    waiting: &Waiting<'_>,
    context: &Context,
    pod: &str,
) -> Result<Result<String, NotYet>, ToolError> {
    let open = match context.read_only {
        false => open(waiting, context, pod, COMFY_PORT, LocalPort::From(COMFY_PORT)).await?,
        true => match join(waiting, &context.services, pod, COMFY_PORT).await? {
            Some(open) => open,
            None => {
                let waiting_for = "somebody to open a tunnel".to_owned();
                let cause =
                    "there is no tunnel, and this server opens none: it was started with --read-only".to_owned();
                return Ok(Err(NotYet { url: None, waiting_for, cause }));
            }
        },
    };
    let url = open.record.as_ref().and_then(TunnelRecord::url);
    if let (Stage::Healthy, Some(url)) = (open.stage, &url) {
        return Ok(Ok(url.clone()));
    }
    let waiting_for = open.waiting_for.unwrap_or_else(|| "the tunnel".to_owned());
    let what = match open.stage {
        Stage::WaitingForPod => "the pod is not up yet",
        Stage::Connecting => "the tunnel is not up",
        Stage::Checking | Stage::Healthy => "ComfyUI does not answer through the tunnel yet",
    };
    Ok(Err(NotYet { url, cause: format!("{what}: {waiting_for}"), waiting_for }))
}

/// The same call with progress whose value stays at 0: until a run has steps, only the words are worth telling, and
/// seconds waited would be mixed with steps.
fn without_seconds(context: &Context) -> Context {
    let progress = context.progress.clone();
    Context { progress: Progress::to(move |update| progress.tell(update.message, 0.0, None)), ..context.clone() }
}
