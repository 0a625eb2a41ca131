//! create_pod_with_volume: ensures a pod by name.

mod resolve;
mod watch;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::resolve::{Resolved, resolve};
use super::{MountedVolume, agree, cents, check_name};
use crate::config::Limits;
use crate::errors::chain;
use crate::fleet::{Actor, Attempt, Claim, Ensured, OverCap, PodRecord, check, later, new_intent};
use crate::provider::Cloud;
use crate::steps;
use crate::tools::waiting::Waiting;
use crate::tools::words::{usd, word};
use crate::tools::{Context, Effect, ErrorKind, StillBilling, Tool, ToolError};

const DEFAULT_NAME: &str = "comfy";
pub(in crate::tools) const PROXY_WARNING: &str =
    "public: anyone who knows this address can use the pod's ComfyUI without a password";

pub struct CreatePodWithVolume;

#[derive(Debug, Clone, Deserialize, JsonSchema)]
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
    /// Least CUDA version, like `12.4`.
    #[serde(default)]
    min_cuda: Option<String>,
    /// Most USD an hour for the whole pod; can only tighten the config's cap.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    max_price_per_hour: Option<f64>,
    /// `secure` when left out; volumes are secure only.
    #[serde(default)]
    cloud: Option<Cloud>,
    /// Data centers to choose from; any when left out.
    #[schemars(length(max = 20))]
    #[serde(default)]
    data_centers: Option<Vec<String>>,
    /// Container image; `runpod/comfyui:latest` when left out.
    #[serde(default)]
    image: Option<String>,
    /// RunPod template to use instead of an image, by id.
    #[serde(default)]
    template: Option<String>,
    /// Id of the registry credentials for a private image.
    #[serde(default)]
    registry: Option<String>,
    /// Container disk in GB; 40 when left out.
    #[schemars(range(min = 1, max = 2000))]
    #[serde(default)]
    disk_gb: Option<u32>,
    /// Environment of the container. For secrets name RunPod's: `{{ RUNPOD_SECRET_name }}`.
    #[serde(default)]
    env: Option<BTreeMap<String, String>>,
    /// Minutes until the pod is ended by itself; 240 when left out. A pod that is there keeps its deadline.
    #[schemars(range(min = 1))]
    #[serde(default)]
    lifetime_minutes: Option<u32>,
    /// End the pod after so many minutes without a run, a call or a connection through its tunnel.
    #[schemars(range(min = 1))]
    #[serde(default)]
    idle_minutes: Option<u32>,
    /// Also expose ComfyUI on RunPod's public HTTP proxy, without any password. Not needed for tunnels.
    #[serde(default)]
    expose_http: bool,
    /// Only show what would be tried, its price, and what the caps say; creates nothing.
    #[serde(default)]
    dry_run: bool,
    /// The most USD an hour that the user has agreed to, for prices above the config's threshold.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    confirm_price: Option<f64>,
    /// The intent of a create without a known outcome, to create anew after ten minutes; should its pod turn up, it is
    /// ended.
    #[serde(default)]
    retry_unknown: Option<String>,
    /// Seconds to wait for the pod to run; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum CreateState {
    /// Nothing was created, as asked.
    DryRun,
    Placing,
    /// The create had no clear answer; a pod may exist.
    Unknown,
    Starting,
    Running,
    Stopped,
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
    intent: Option<String>,
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
    /// USD the pod can still cost until then.
    reserved_usd: f64,
    /// What would be tried, in this order; only for a dry run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    candidates: Vec<CandidateRow>,
    /// What the caps say to it; only for a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    caps: Option<String>,
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

#[derive(Debug, Serialize, JsonSchema)]
struct CandidateRow {
    gpu: String,
    price_per_hour: f64,
    /// USD from now until the deadline.
    total_usd: f64,
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
        let mut limits = services.limits()?;
        let lifetime = lifetime(&input, &limits)?;
        let mut resolved = resolve(services, &input, &limits).await?;
        if input.dry_run {
            return dry_run(context, &name, &input, resolved, lifetime, &limits);
        }
        // The pod gets our key when it is made, so what keeps us from having one is told before anything is asked for.
        services.ssh.public_key().await.map_err(|error| {
            ToolError::new(ErrorKind::Setup, format!("no pod was created: {}", chain(&error))).billing(StillBilling::No)
        })?;
        steps::reached("caller: create resolved");
        let mut agreed = input.confirm_price;
        let ensured = loop {
            let fresh = fresh(&input, &resolved, lifetime, agreed, &limits);
            // Who finds a pod spends nothing more, so nobody is asked.
            if let Some(found) = services.fleet.join(&name, &fresh)? {
                break found;
            }
            if agree::is_agreed(resolved.dearest(), agreed, &limits) {
                break services.fleet.ensure(&name, fresh, &limits).await?;
            }
            // Whoever is asked is not asked for what can't be.
            room_for(context, &name, &fresh, &limits)?;
            agree::ask(context, &waiting, &format!("create the pod {name}"), resolved.dearest(), &limits).await?;
            agreed = Some(resolved.dearest());
            // People take their time; caps, prices and stock may have changed.
            limits = services.limits()?;
            resolved = resolve(services, &input, &limits).await?;
        };
        let (created, record) = match ensured {
            Ensured::New(record) => (true, record),
            Ensured::Joined(record) => (false, record),
            refused => {
                // An ending that nobody carries out would refuse every create to come.
                if let (Ensured::BeingTerminated(_), Err(error)) = (&refused, services.keeper_for_changes().await) {
                    tracing::warn!(%error, "the keeper can't be started");
                }
                return Err(watch::not_ensured(&name, refused));
            }
        };
        if created {
            let facts = json!({
                "pod": name, "intent": record.intent, "usd_per_hour": cents(record.reserved_per_hour()),
                "reserved_usd": cents(record.reserved_usd(Timestamp::now())), "expires_at": record.expires_at(),
                "supersedes": record.wanted.supersedes,
            });
            services.audit.note(Actor::Tool(Self::NAME), "create_wanted", facts);
            steps::reached("caller: create wanted");
        }
        services.keeper_for_changes().await.map_err(|error| watch::after_the_wish(error, &name))?;
        steps::reached("caller: keeper woken");
        watch::until_running(&waiting, context, &name, created, &record.intent).await
    }

    fn text(output: &CreateOutput) -> String {
        let CreateOutput { pod, state, next, .. } = output;
        if *state == CreateState::DryRun {
            return dry_run_text(output);
        }
        let made = if output.created { "new" } else { "there already" };
        let mut text = format!("Pod {pod} ({made}): {}", word(state));
        if let (Some(gpu), Some(price)) = (&output.gpu, output.price_per_hour) {
            text.push_str(&format!(", {gpu} at ${price:.2}/h"));
        }
        text.push_str(&format!(", ends by itself at {:.0}", output.expires_at));
        if let Some(waiting_for) = &output.waiting_for {
            text.push_str(&format!(". Waiting for {waiting_for}"));
        }
        if let (Some(url), Some(warning)) = (&output.proxy_url, &output.warning) {
            text.push_str(&format!(".\n{url} is {warning}"));
        }
        format!("{text}.\nNext: {next}")
    }
}

fn dry_run_text(output: &CreateOutput) -> String {
    let mut lines = vec![format!("Nothing was created. For the pod {} would be tried, in this order:", output.pod)];
    lines.extend(output.candidates.iter().map(|candidate| {
        let CandidateRow { gpu, price_per_hour, total_usd } = candidate;
        format!("{gpu}: ${price_per_hour:.2}/h, {} in all", usd(*total_usd))
    }));
    lines.push(format!(
        "It would end by itself at {:.0}, and {} would be set aside for it.",
        output.expires_at,
        usd(output.reserved_usd)
    ));
    lines.push(format!("Caps: {}.\nNext: {}", output.caps.as_deref().unwrap_or_default(), output.next));
    lines.join("\n")
}

fn lifetime(input: &CreateInput, limits: &Limits) -> Result<SignedDuration, ToolError> {
    let minutes = input.lifetime_minutes.unwrap_or(limits.default_lifetime_minutes);
    if minutes > limits.max_lifetime_minutes {
        return Err(ToolError::refused(format!(
            "`lifetime_minutes`: {minutes} is more than the {} that the config allows (limits.max_lifetime_minutes); \
             nothing was created",
            limits.max_lifetime_minutes
        ))
        .hint("ask for less; control_pod can extend a pod's life within the caps"));
    }
    Ok(SignedDuration::from_mins(i64::from(minutes)))
}

/// The record that this call would write.
fn fresh(
    input: &CreateInput,
    resolved: &Resolved,
    lifetime: SignedDuration,
    agreed: Option<f64>,
    limits: &Limits,
) -> PodRecord {
    let Resolved { request, candidates } = resolved.clone();
    let mut fresh = PodRecord::new(new_intent(), request, candidates, lifetime);
    let agreed = limits.confirm_above_per_hour.max(agreed.unwrap_or(0.0));
    let most = limits.max_price_per_hour.min(input.max_price_per_hour.unwrap_or(f64::INFINITY)).min(agreed);
    fresh.wanted.max_price_per_hour = Some(most);
    fresh.wanted.idle_minutes = input.idle_minutes;
    fresh.wanted.supersedes = input.retry_unknown.clone();
    fresh
}

/// What the caps say, without writing anything.
fn room_for(context: &Context, name: &str, fresh: &PodRecord, limits: &Limits) -> Result<(), ToolError> {
    over_cap(context, name, fresh, limits)?.map_or(Ok(()), |over| Err(watch::not_ensured(name, Ensured::OverCap(over))))
}

fn over_cap(context: &Context, name: &str, fresh: &PodRecord, limits: &Limits) -> Result<Option<OverCap>, ToolError> {
    let entries = context.services.fleet.read()?;
    let claim = Claim { price_per_hour: fresh.reserved_per_hour(), from: Timestamp::now(), until: fresh.expires_at() };
    Ok(check(&entries, name, claim, true, limits).err())
}

fn dry_run(
    context: &Context,
    name: &str,
    input: &CreateInput,
    resolved: Resolved,
    lifetime: SignedDuration,
    limits: &Limits,
) -> Result<CreateOutput, ToolError> {
    let now = Timestamp::now();
    let fresh = PodRecord::new(new_intent(), resolved.request.clone(), resolved.candidates.clone(), lifetime);
    let dearest = resolved.dearest();
    let caps = match (in_the_way(context, name, &fresh)?, over_cap(context, name, &fresh, limits)?) {
        (Some(there), _) => there,
        (None, Some(over)) => format!("refused: {over}"),
        (None, None) if !agree::is_agreed(dearest, input.confirm_price, limits) => {
            format!("allowed, with the user's agreement (confirm_price: {:.2})", agree::whole_cents(dearest))
        }
        (None, None) => "allowed".to_owned(),
    };
    let is_refused = caps.starts_with("refused");
    let hours = lifetime.as_secs_f64() / 3600.0;
    let row = |candidate: &crate::fleet::Candidate| CandidateRow {
        gpu: candidate.gpu.clone(),
        price_per_hour: cents(candidate.price_per_hour),
        total_usd: cents(candidate.price_per_hour * hours),
    };
    let mut output = watch::describe(name, false, &fresh);
    output.state = CreateState::DryRun;
    output.done = true;
    output.intent = None;
    output.candidates = resolved.candidates.iter().map(row).collect();
    output.price_per_hour = resolved.candidates.first().map(|first| cents(first.price_per_hour));
    output.gpu = resolved.candidates.first().map(|first| first.gpu.clone());
    output.caps = Some(caps);
    output.expires_at = later(now, lifetime);
    output.waiting_for = None;
    output.still_billing = StillBilling::No;
    output.next = match is_refused {
        true => "ask for something else, or end what stands in the way (list_pods)".to_owned(),
        false => "create_pod_with_volume with the same arguments, without dry_run".to_owned(),
    };
    Ok(output)
}

/// What stands in the way of a new pod by that name, or makes one needless.
fn in_the_way(context: &Context, name: &str, fresh: &PodRecord) -> Result<Option<String>, ToolError> {
    Ok(context.services.fleet.join(name, fresh)?.map(|found| match found {
        Ensured::Joined(_) => format!("nothing would be created: there is such a pod `{name}` already"),
        refused => format!("refused: {}", watch::not_ensured(name, refused).message),
    }))
}
