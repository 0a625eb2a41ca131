//! list_pods and get_pod: the provider's truth joined with our records.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Found, MountedVolume, Owner, all, cents, cost_now, find_or_only, mounted_volume, owner_of, while_a_pod_runs,
};
use crate::fleet::{HomeIdentity, Phase, WantedState};
use crate::provider::{PodStatus, ProviderError};
use crate::tools::context::Services;
use crate::tools::{Context, Effect, Tool, ToolError};
use crate::tunnel::{COMFY_PORT, TunnelRecord, TunnelState};

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    Provider,
    /// Not verified: no key is set.
    Records,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct PodRow {
    /// The name by which every tool knows it; the id for a pod without a record.
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_id: Option<String>,
    owner: Owner,
    /// The provider's word; `PLACING`, `UNKNOWN_OUTCOME` or `ENDING` from our records.
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_center: Option<String>,
    price_per_hour: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<MountedVolume>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    /// USD so far, by our own count.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    /// Addresses of its tunnels on this machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tunnels: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub struct ListPods;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListPodsInput {}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListPodsOutput {
    pods: Vec<PodRow>,
    /// USD an hour for all that run, whoever made them.
    burn_rate_per_hour: f64,
    source: Source,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

impl Tool for ListPods {
    const NAME: &'static str = "list_pods";
    const TITLE: &'static str = "List pods";
    const DESCRIPTION: &'static str =
        "All pods of the account as the provider tells them, with owner, price, deadline, cost and tunnels.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = ListPodsInput;
    type Output = ListPodsOutput;

    async fn run(context: &Context, _: ListPodsInput) -> Result<ListPodsOutput, ToolError> {
        let services = &context.services;
        let found = all(services).await?;
        let tunnels: Vec<_> = services.tunnels.read()?.into_values().collect();
        let identity = HomeIdentity::read(&services.home)?;
        let pods: Vec<_> = found.iter().map(|found| row(found, &tunnels, identity.as_ref())).collect();
        heal(services, &found, identity.as_ref()).await;
        let (source, warning) = match services.provider {
            Some(_) => (Source::Provider, None),
            None => (Source::Records, Some(unverified(services))),
        };
        Ok(ListPodsOutput {
            burn_rate_per_hour: cents(
                pods.iter().filter(|row| row.status != "EXITED").map(|row| row.price_per_hour).sum(),
            ),
            pods,
            source,
            warning,
        })
    }

    fn text(output: &ListPodsOutput) -> String {
        let mut lines: Vec<_> = output.pods.iter().map(line).collect();
        match output.pods.as_slice() {
            [] if output.source == Source::Records => lines.push("No pods in our records.".to_owned()),
            [] => lines.push("No pods; nothing is billed for any.".to_owned()),
            _ => lines.push(format!("Burning ${:.2}/h.", output.burn_rate_per_hour)),
        }
        lines.extend(output.warning.clone());
        lines.join("\n")
    }
}

fn line(row: &PodRow) -> String {
    let mut text = format!("{}: {}", row.pod, row.status);
    if let Some(gpu) = &row.gpu {
        text.push_str(&format!(", {gpu}"));
    }
    text.push_str(&format!(", ${:.2}/h", row.price_per_hour));
    match row.owner {
        Owner::Ours => {}
        Owner::OtherMachine => text.push_str(", of another machine"),
        Owner::Unmanaged => text.push_str(", not made by this program"),
    }
    if let Some(cost) = row.cost_usd {
        text.push_str(&format!(", ${cost:.4} so far"));
    }
    if let Some(at) = row.expires_at {
        text.push_str(&format!(", ends at {at:.0}"));
    }
    for tunnel in &row.tunnels {
        text.push_str(&format!(", {tunnel}"));
    }
    if let Some(problem) = &row.problem {
        text.push_str(&format!(" ({problem})"));
    }
    text
}

fn unverified(services: &Services) -> String {
    let keeper =
        if services.keeper.is_alive() { "a keeper is alive" } else { "no keeper is alive, so no deadline is kept" };
    format!(
        "from our records, not verified, because no API key is set (RUNPOD_API_KEY, or api_key in {}); {keeper}",
        services.home.config_file().display()
    )
}

/// Whoever looks and sees a pod of ours without its keeper starts it again, for nobody else keeps the deadline.
async fn heal(services: &Services, found: &[Found], identity: Option<&HomeIdentity>) {
    let unrecorded = |found: &Found| {
        found.record.is_none() && found.pod.as_ref().is_some_and(|pod| owner_of(pod, identity) == Owner::Ours)
    };
    let healed = if found.iter().any(unrecorded) && !services.keeper.is_alive() {
        // The keeper takes such pods back when it starts.
        services.keeper_for_changes().await
    } else {
        services.revive_keeper().await
    };
    if let Err(error) = healed {
        tracing::warn!(%error, "the keeper can't be started");
    }
}

fn row(found: &Found, tunnels: &[TunnelRecord], identity: Option<&HomeIdentity>) -> PodRow {
    let Found { name, record, pod } = found;
    let known = record.as_ref().map(|record| &record.known);
    let owner = match (record, pod) {
        (Some(_), _) => Owner::Ours,
        (None, Some(pod)) => owner_of(pod, identity),
        (None, None) => Owner::Unmanaged,
    };
    let ending = record
        .as_ref()
        .is_some_and(|record| record.wanted.state == WantedState::Gone || record.known.ending_since.is_some());
    let status = match (pod, known) {
        _ if ending => "ENDING".to_owned(),
        (Some(pod), _) => status_word(pod.status),
        (None, Some(known)) if known.phase == Phase::Unknown => "UNKNOWN_OUTCOME".to_owned(),
        (None, Some(known)) => known.status.map_or_else(|| "PLACING".to_owned(), status_word),
        (None, None) => "UNKNOWN".to_owned(),
    };
    let late = record.as_ref().is_some_and(|record| record.is_open() && record.expires_at() < Timestamp::now());
    let overdue = late.then_some("its deadline has passed; the keeper is ending it");
    let price = pod.as_ref().map_or_else(|| known.map_or(0.0, |known| known.cost_per_hour), |pod| pod.cost_per_hour);
    let id = found.pod_id().map(str::to_owned);
    PodRow {
        pod: name.clone(),
        owner,
        status,
        gpu: pod.as_ref().and_then(|pod| pod.gpu.clone()).or_else(|| known?.gpu.clone()),
        data_center: pod.as_ref().and_then(|pod| pod.data_center.clone()).or_else(|| known?.data_center.clone()),
        price_per_hour: cents(price),
        volume: mounted_volume(record.as_ref(), pod.as_ref()),
        expires_at: record.as_ref().map(crate::fleet::PodRecord::expires_at),
        cost_usd: record.as_ref().map(|record| cents(cost_now(record))),
        tunnels: tunnels
            .iter()
            .filter(|tunnel| tunnel.wanted.open && Some(&tunnel.wanted.pod_id) == id.as_ref())
            .filter_map(TunnelRecord::url)
            .collect(),
        problem: known.and_then(|known| known.problem.clone()).or_else(|| overdue.map(str::to_owned)),
        pod_id: id,
    }
}

fn status_word(status: PodStatus) -> String {
    serde_json::to_value(status).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

pub struct GetPod;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GetPodInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct GetPodOutput {
    #[serde(flatten)]
    row: PodRow,
    /// The way to ComfyUI, step by step.
    readiness: Vec<Step>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    /// SSH as the provider tells it: user@host:port.
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh: Option<String>,
    source: Source,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Step {
    step: &'static str,
    done: bool,
}

impl Tool for GetPod {
    const NAME: &'static str = "get_pod";
    const TITLE: &'static str = "Show a pod";
    const DESCRIPTION: &'static str =
        "One pod: status, GPU, price, cost so far, deadline, volume, and how far it is on the way to ComfyUI.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = GetPodInput;
    type Output = GetPodOutput;

    async fn run(context: &Context, input: GetPodInput) -> Result<GetPodOutput, ToolError> {
        let services = &context.services;
        let mut found = find_or_only(services, input.pod.as_deref()).await?;
        let source = if services.provider.is_some() { Source::Provider } else { Source::Records };
        if let (None, Some(id), Some(provider)) = (&found.pod, found.pod_id().map(str::to_owned), &services.provider) {
            match provider.pod(&id).await {
                Ok(answer) => found.pod = Some(answer.value),
                // Its own page may lag; the keeper finds out whether it is gone.
                Err(ProviderError::NotFound { .. }) => {}
                Err(error) => return Err(while_a_pod_runs(error)),
            }
        }
        let identity = HomeIdentity::read(&services.home)?;
        heal(services, std::slice::from_ref(&found), identity.as_ref()).await;
        let tunnels: Vec<_> = services.tunnels.read()?.into_values().collect();
        let tunnel = tunnels.iter().find(|tunnel| {
            Some(tunnel.wanted.pod_id.as_str()) == found.pod_id() && tunnel.wanted.remote_port == COMFY_PORT
        });
        let readiness = readiness(&found, tunnel, services.keeper.is_alive());
        let waiting_for = readiness.iter().find(|step| !step.done).map(|step| match tunnel {
            Some(tunnel) if step.step == "tunnel" || step.step == "comfyui" => {
                let cause = tunnel.known.cause.as_deref().unwrap_or("not up yet");
                format!("{}: {cause}", step.step)
            }
            None if step.step == "tunnel" => "tunnel: there is none; open it with start_tunnel".to_owned(),
            _ => step.step.to_owned(),
        });
        let ssh = found.pod.as_ref().and_then(|pod| pod.ssh.as_ref());
        Ok(GetPodOutput {
            ssh: ssh.map(|at| format!("{}@{}:{}", at.user, at.host, at.port)),
            row: row(&found, &tunnels, identity.as_ref()),
            readiness,
            waiting_for,
            source,
            warning: None,
        })
    }

    fn text(output: &GetPodOutput) -> String {
        let mut text = line(&output.row);
        if let Some(waiting_for) = &output.waiting_for {
            text.push_str(&format!("\nNot ready for ComfyUI; waiting for {waiting_for}."));
        }
        text
    }
}

fn readiness(found: &Found, tunnel: Option<&TunnelRecord>, held: bool) -> Vec<Step> {
    let pod = found.pod.as_ref();
    let running = pod.is_some_and(|pod| pod.status == PodStatus::Running);
    // What the keeper wrote counts only while it lives.
    let state = tunnel.filter(|_| held).map(|tunnel| tunnel.known.state);
    let tunnel_up = matches!(
        state,
        Some(
            TunnelState::SshUp
                | TunnelState::Healthy
                | TunnelState::RemoteRefused
                | TunnelState::HttpTimeout
                | TunnelState::WrongService
        )
    );
    let step = |step, done| Step { step, done };
    vec![
        step("allocated", pod.is_some()),
        step("container", running),
        step("ssh address", running && pod.is_some_and(|pod| pod.ssh.is_some())),
        step("tunnel", tunnel_up),
        step("comfyui", state == Some(TunnelState::Healthy)),
    ]
}
