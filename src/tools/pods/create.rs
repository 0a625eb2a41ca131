//! create_pod_with_volume: ensures a pod by name.

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::placement::{self, Wishes};
use super::{MountedVolume, cents, check_name, mounted_volume};
use crate::errors::chain;
use crate::fleet::{
    Attempt, DEFAULT_LIFETIME_MINUTES, Ensured, MOST_LIFETIME_MINUTES, MOST_PODS, Phase, PodRecord, PodRequest,
    WantedState, new_intent,
};
use crate::provider::{Cloud, PodStatus, VolumeMount};
use crate::tools::volumes::find_volume;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, ErrorKind, StillBilling, Tool, ToolError};
use crate::tunnel::COMFY_PORT;

const DEFAULT_NAME: &str = "comfy";
const DEFAULT_IMAGE: &str = "runpod/comfyui:latest";
const DEFAULT_DISK_GB: u32 = 40;
const DEFAULT_MOUNT: &str = "/workspace";
pub(super) const PROXY_WARNING: &str =
    "public: anyone who knows this address can use the pod's ComfyUI without a password";

pub struct CreatePodWithVolume;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateInput {
    /// Name of the pod, `comfy` when left out. The same name again gives the same pod.
    #[serde(default)]
    name: Option<String>,
    /// Network volume to mount: id or name. It fixes the data center. Left out: the config's default, or none.
    #[serde(default)]
    volume: Option<String>,
    /// Where the volume is mounted, an absolute path; `/workspace` when left out.
    #[serde(default)]
    mount_path: Option<String>,
    /// GPUs to try in this order, ids or names of list_gpus. Left out: what is in stock, cheapest first.
    #[schemars(length(max = 20))]
    #[serde(default)]
    gpus: Option<Vec<String>>,
    /// Least video memory in GB; 16 when neither this nor gpus is given.
    #[schemars(range(min = 1, max = 4096))]
    #[serde(default)]
    min_vram_gb: Option<u32>,
    /// GPUs in the pod; 1 when left out.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default)]
    gpu_count: Option<u32>,
    /// Most USD an hour for the whole pod; can only tighten the cap of 1.50.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    max_price_per_hour: Option<f64>,
    /// `secure` when left out; volumes are secure only.
    #[serde(default)]
    cloud: Option<Cloud>,
    /// Container image; `runpod/comfyui:latest` when left out.
    #[serde(default)]
    image: Option<String>,
    /// Container disk in GB; 40 when left out.
    #[schemars(range(min = 1, max = 2000))]
    #[serde(default)]
    disk_gb: Option<u32>,
    /// Minutes until the pod is ended by itself; 240 when left out. A pod that is there keeps its deadline.
    #[schemars(range(min = 1, max = 1440))]
    #[serde(default)]
    lifetime_minutes: Option<u32>,
    /// Also expose ComfyUI on RunPod's public HTTP proxy, without any password. Not needed for tunnels.
    #[serde(default)]
    expose_http: bool,
    /// Seconds to wait for the pod to run; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum CreateState {
    Placing,
    Starting,
    Running,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct CreateOutput {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_id: Option<String>,
    state: CreateState,
    done: bool,
    /// False when there was such a pod already.
    created: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_center: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_per_hour: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<MountedVolume>,
    /// When the keeper ends the pod.
    expires_at: Timestamp,
    /// USD the pod can cost until then.
    reserved_usd: f64,
    /// GPUs that were refused, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused: Vec<Attempt>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    still_billing: StillBilling,
    next: String,
}

impl Tool for CreatePodWithVolume {
    const NAME: &'static str = "create_pod_with_volume";
    const TITLE: &'static str = "Create a GPU pod";
    const DESCRIPTION: &'static str = "Ensures a GPU pod by name, with a network volume if asked: makes it once, \
        finds it again after a lost answer. It costs money until terminate_pod or its deadline.";
    const EFFECT: Effect = Effect::Creates;
    const EXAMPLE: &'static str = r#"{"volume": "comfy-models", "max_price_per_hour": 0.6, "lifetime_minutes": 60}"#;
    type Input = CreateInput;
    type Output = CreateOutput;

    async fn run(context: &Context, input: CreateInput) -> Result<CreateOutput, ToolError> {
        let services = &context.services;
        let waiting = Waiting::new(context, input.wait_seconds);
        let name = input.name.clone().unwrap_or_else(|| DEFAULT_NAME.to_owned());
        check_name(&name)?;
        // Without a key and without a keeper nothing may be promised.
        services.provider()?;
        services.refuse_foreign_account().await?;
        let lifetime = SignedDuration::from_mins(i64::from(
            input.lifetime_minutes.unwrap_or(DEFAULT_LIFETIME_MINUTES).min(MOST_LIFETIME_MINUTES),
        ));
        let max_price_per_hour = input.max_price_per_hour;
        let (request, candidates) = resolve(context, input).await?;
        // The pod gets our key when it is made, so what keeps us from having one is told before anything is asked for.
        services.ssh.public_key().await.map_err(|error| {
            ToolError::new(ErrorKind::Setup, format!("no pod was created: {}", chain(&error))).billing(StillBilling::No)
        })?;
        let mut fresh = PodRecord::new(new_intent(), request, candidates, lifetime);
        fresh.wanted.max_price_per_hour = max_price_per_hour;
        let (created, record) = match services.fleet.ensure(&name, fresh).await? {
            Ensured::New(record) => (true, record),
            Ensured::Joined(record) => (false, record),
            refused => {
                // An ending that nobody carries out would refuse every create to come.
                if let (Ensured::BeingTerminated(_), Err(error)) = (&refused, services.keeper_for_changes().await) {
                    tracing::warn!(%error, "the keeper can't be started");
                }
                return Err(not_ensured(&name, refused));
            }
        };
        services.keeper_for_changes().await.map_err(|error| after_the_wish(error, &name))?;
        watch(&waiting, context, &name, created, &record.intent).await
    }

    fn text(output: &CreateOutput) -> String {
        let CreateOutput { pod, state, next, .. } = output;
        let made = if output.created { "new" } else { "there already" };
        let mut text = format!("Pod {pod} ({made}): {state:?}");
        if let (Some(gpu), Some(price)) = (&output.gpu, output.price_per_hour) {
            text.push_str(&format!(", {gpu} at ${price:.2}/h"));
        }
        text.push_str(&format!(", ends by itself at {:.0}", output.expires_at));
        if let Some(waiting_for) = &output.waiting_for {
            text.push_str(&format!(". Waiting for: {waiting_for}"));
        }
        if let (Some(url), Some(warning)) = (&output.proxy_url, &output.warning) {
            text.push_str(&format!(".\n{url} is {warning}"));
        }
        format!("{text}.\nNext: {next}")
    }
}

/// From what was asked to an exact request and what to try for it.
async fn resolve(
    context: &Context,
    input: CreateInput,
) -> Result<(PodRequest, Vec<crate::fleet::Candidate>), ToolError> {
    let services = &context.services;
    let provider = services.provider()?;
    let path = input
        .mount_path
        .or_else(|| services.config.default_volume_mount.clone())
        .unwrap_or_else(|| DEFAULT_MOUNT.to_owned());
    if !path.starts_with('/') || path == "/" || path.contains("..") {
        return Err(ToolError::invalid(
            "mount_path",
            format!("expected an absolute path inside the pod, not `{path}`"),
        ));
    }
    let wanted_volume = input.volume.or_else(|| services.config.default_volume_id.clone());
    let volume = match &wanted_volume {
        Some(wanted) => Some(find_volume(&provider.volumes().await?.value, wanted)?.clone()),
        None => None,
    };
    let cloud = input.cloud.unwrap_or(Cloud::Secure);
    if let (Some(volume), Cloud::Community) = (&volume, cloud) {
        return Err(ToolError::invalid(
            "cloud",
            format!("network volumes, like {}, can be mounted in the secure cloud only", volume.id),
        ));
    }
    let gpu_count = input.gpu_count.unwrap_or(1);
    let gpus = input.gpus.unwrap_or_default();
    let catalog = provider.gpus(gpu_count, cloud).await?.value;
    let candidates = placement::candidates(
        &catalog,
        &Wishes {
            gpus: &gpus,
            gpu_count,
            min_vram_gb: input.min_vram_gb,
            max_price_per_hour: input.max_price_per_hour,
            cloud,
            data_center: volume.as_ref().map(|volume| volume.data_center.as_str()),
        },
    )?;
    let mut ports = vec!["22/tcp".to_owned()];
    if input.expose_http {
        ports.push(format!("{COMFY_PORT}/http"));
    }
    let request = PodRequest {
        image: input.image.unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
        gpus: if gpus.is_empty() {
            Vec::new()
        } else {
            candidates.iter().map(|candidate| candidate.gpu.clone()).collect()
        },
        gpu_count,
        cloud,
        data_centers: volume.iter().map(|volume| volume.data_center.clone()).collect(),
        disk_gb: input.disk_gb.unwrap_or(DEFAULT_DISK_GB),
        volume_name: volume.as_ref().map(|volume| volume.name.clone()),
        volume: volume.map(|volume| VolumeMount { volume_id: volume.id, path }),
        ports,
    };
    Ok((request, candidates))
}

fn not_ensured(name: &str, outcome: Ensured) -> ToolError {
    match outcome {
        Ensured::Differs { differences, record } => ToolError::refused(format!(
            "there is a pod `{name}` already, made from another request ({}); nothing was created",
            differences.join("; ")
        ))
        .hint("ask for the same, use another name, or terminate_pod first")
        .billing(billing_of(&record)),
        Ensured::BeingTerminated(record) => {
            ToolError::refused(format!("the pod `{name}` is being terminated; nothing was created"))
                .hint("call again when it is gone (see list_pods)")
                .retryable(true)
                .billing(billing_of(&record))
        }
        Ensured::InError(record) => ToolError::refused(format!("the pod `{name}` is in the state ERROR"))
            .hint(format!("end it with terminate_pod {{\"pod\": \"{name}\"}}, then create it again"))
            .billing(billing_of(&record)),
        Ensured::TooMany { open } => ToolError::refused(format!(
            "there are {} pods already and the cap is {MOST_PODS}; nothing was created",
            open.len()
        ))
        .hint(format!("terminate one first: {}", open.join(", ")))
        .billing(StillBilling::Yes),
        Ensured::New(_) | Ensured::Joined(_) => ToolError::new(ErrorKind::Internal, "an intent got lost"),
    }
}

fn billing_of(record: &PodRecord) -> StillBilling {
    match record.known.phase {
        Phase::Placed if record.known.status != Some(PodStatus::Exited) => StillBilling::Yes,
        Phase::Gone | Phase::Refused => StillBilling::No,
        _ => StillBilling::Possible,
    }
}

/// The wish is on disk already, so whichever keeper comes next may carry it out.
fn after_the_wish(error: ToolError, name: &str) -> ToolError {
    let message =
        format!("the wish for the pod `{name}` is recorded, but nobody carries it out now: {}", error.message);
    ToolError { message, ..error }
        .hint(format!("take it back with terminate_pod {{\"pod\": \"{name}\"}}, or call again"))
        .billing(StillBilling::Possible)
}

async fn watch(
    waiting: &Waiting<'_>,
    context: &Context,
    name: &str,
    created: bool,
    intent: &str,
) -> Result<CreateOutput, ToolError> {
    let services = &context.services;
    let mut told = String::new();
    loop {
        let record = services.fleet.get(name)?.filter(|record| record.intent == intent);
        let Some(record) = record else {
            return Err(ToolError::failed(format!("the pod `{name}` was replaced by another request"))
                .billing(StillBilling::Possible)
                .hint("see list_pods"));
        };
        let known = &record.known;
        match known.phase {
            Phase::Refused => {
                let problem = known.problem.clone().unwrap_or_default();
                return Err(ToolError::new(ErrorKind::Provider, format!("no pod was created: {problem}"))
                    .billing(StillBilling::No)
                    .hint("see list_gpus for what is in stock; ask for other gpus, less memory or another volume"));
            }
            Phase::Gone => {
                let cause = known.ending_cause.clone().unwrap_or_default();
                return Err(ToolError::failed(format!("the pod `{name}` has ended: {cause}"))
                    .billing(StillBilling::No)
                    .hint("call again to create it anew"));
            }
            _ if record.wanted.state == WantedState::Gone || known.ending_since.is_some() => {
                let cause = known.ending_cause.clone().unwrap_or_else(|| "terminated".to_owned());
                return Err(ToolError::failed(format!("the pod `{name}` is being ended: {cause}"))
                    .billing(StillBilling::Possible)
                    .hint("see list_pods until it is gone"));
            }
            _ if known.status == Some(PodStatus::Error) => {
                return Err(ToolError::failed(format!("the pod `{name}` came up in the state ERROR"))
                    .billing(StillBilling::Yes)
                    .hint(format!("end it with terminate_pod {{\"pod\": \"{name}\"}}")));
            }
            _ => {}
        }
        let output = describe(name, created, &record);
        let step = output.waiting_for.clone().unwrap_or_else(|| "running".to_owned());
        if step != told {
            waiting.tell(&step);
            told = step;
        }
        if output.done {
            return Ok(output);
        }
        // Without a keeper nobody places the pod, and later nobody would end it.
        if !services.keeper.is_alive() {
            services.keeper_for_changes().await.map_err(|error| after_the_wish(error, name))?;
        }
        if !waiting.again().await {
            return Ok(output);
        }
    }
}

fn describe(name: &str, created: bool, record: &PodRecord) -> CreateOutput {
    let known = &record.known;
    let proxied = record.wanted.request.ports.iter().any(|port| port.ends_with("/http"));
    let (state, waiting_for) = match (known.phase, known.status) {
        (Phase::Placed, Some(PodStatus::Running)) => (CreateState::Running, None),
        (Phase::Placed, Some(PodStatus::Exited)) => (CreateState::Running, None),
        (Phase::Placed, status) => {
            let status = status.unwrap_or(PodStatus::Unknown);
            (CreateState::Starting, Some(format!("the container to start (the provider says {status:?})")))
        }
        (Phase::Unknown, _) => (
            CreateState::Placing,
            Some("the create had no clear answer; the pod is looked for by its name and never asked for twice".into()),
        ),
        _ => (
            CreateState::Placing,
            Some(known.problem.clone().unwrap_or_else(|| "the provider to place the pod".to_owned())),
        ),
    };
    let done = state == CreateState::Running;
    let again = format!("create_pod_with_volume again with the same arguments, or get_pod {{\"pod\": \"{name}\"}}");
    let stopped = known.status == Some(PodStatus::Exited);
    CreateOutput {
        pod: name.to_owned(),
        pod_id: known.pod_id.clone(),
        state,
        done,
        created,
        gpu: known.gpu.clone(),
        data_center: known.data_center.clone(),
        price_per_hour: known.pod_id.as_ref().map(|_| cents(known.cost_per_hour)),
        volume: mounted_volume(Some(record), None),
        expires_at: record.expires_at(),
        reserved_usd: cents(record.reserved_usd()),
        refused: known.attempts.clone(),
        proxy_url: known
            .pod_id
            .as_ref()
            .filter(|_| proxied)
            .map(|id| format!("https://{id}-{COMFY_PORT}.proxy.runpod.net")),
        warning: proxied.then(|| PROXY_WARNING.to_owned()),
        waiting_for,
        still_billing: billing_of(record),
        next: match (done, stopped) {
            (true, true) => format!("the pod is stopped; terminate_pod {{\"pod\": \"{name}\"}} and create it again"),
            (true, false) => format!("start_tunnel {{\"pod\": \"{name}\"}}"),
            (false, _) => again,
        },
    }
}
