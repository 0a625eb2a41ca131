//! get_pod: one pod as it is now, or as soon as it has come as far as is asked for.

mod readiness;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::readiness::{Ladder, Step};
use super::list::{Source, heal, surroundings};
use super::row::{PodRow, Surroundings};
use super::{Found, billing_of, find_or_only, stopped, while_a_pod_runs};
use crate::fleet::{Phase, PodRecord};
use crate::provider::{PodStatus, ProviderError};
use crate::tools::context::Services;
use crate::tools::tunnels::open;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, StillBilling, Tool, ToolError};
use crate::tunnel::{COMFY_PORT, LocalPort, TunnelState, name_of};

pub struct GetPod;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GetPodInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// Wait until `ssh` or `comfy` (through a tunnel, which is opened) answers, or control_pod's `change` is through.
    #[serde(default)]
    wait_for: Option<WaitFor>,
    /// Seconds to wait; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum WaitFor {
    Change,
    Ssh,
    Comfy,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct GetPodOutput {
    #[serde(flatten)]
    row: PodRow,
    /// The way to ComfyUI, step by step; the first that isn't done is what is waited for.
    readiness: Vec<Step>,
    /// Whether what `wait_for` names has come.
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    /// SSH as the provider tells it: user@host:port.
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh: Option<String>,
    source: Source,
    #[serde(skip_serializing_if = "Option::is_none")]
    still_billing: Option<StillBilling>,
    /// Why it can't be told whether the pod is used, where `idle_minutes` asks for that; the deadline alone decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_unknown: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

impl Tool for GetPod {
    const NAME: &'static str = "get_pod";
    const TITLE: &'static str = "Show a pod";
    const DESCRIPTION: &'static str = "One pod: status, GPU, price, cost so far, deadline, volume, and how far it is on \
        the way to ComfyUI; with wait_for it waits for that.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = GetPodInput;
    type Output = GetPodOutput;

    async fn run(context: &Context, input: GetPodInput) -> Result<GetPodOutput, ToolError> {
        let services = &context.services;
        let waiting = Waiting::new(context, input.wait_seconds);
        let mut found = find_or_only(services, input.pod.as_deref()).await?;
        let ahead = ask_provider(services, &mut found).await?;
        heal(services, std::slice::from_ref(&found), surroundings(services)?.identity.as_ref()).await;
        match input.wait_for {
            None => view(services, &found, ahead, services.provider.is_some()),
            Some(goal) => until(&waiting, context, found, goal, ahead).await,
        }
    }

    fn text(output: &GetPodOutput) -> String {
        let mut text = output.row.line();
        if let Some(waiting_for) = output.waiting_for.as_ref().filter(|_| output.done != Some(true)) {
            text.push_str(&format!("\nNot ready; waiting for {waiting_for}."));
        } else if output.readiness.iter().all(|step| step.done) {
            text.push_str("\nReady: ComfyUI answers.");
        }
        text
    }
}

/// One read of the provider. How far its clock is ahead of ours.
async fn ask_provider(services: &Services, found: &mut Found) -> Result<SignedDuration, ToolError> {
    let (Some(id), Some(provider)) = (found.pod_id().map(str::to_owned), &services.provider) else {
        return Ok(SignedDuration::ZERO);
    };
    let date = match provider.pod(&id).await {
        Ok(answer) => {
            found.pod = Some(answer.value);
            answer.date
        }
        // Its own page may lag; the keeper finds out whether it is gone.
        Err(ProviderError::NotFound { .. }) => {
            found.pod = None;
            None
        }
        Err(error) => return Err(while_a_pod_runs(error)),
    };
    Ok(date.map_or(SignedDuration::ZERO, |date| date.duration_since(Timestamp::now())))
}

/// `asked`: the provider was asked for the pod just now.
fn view(services: &Services, found: &Found, ahead: SignedDuration, asked: bool) -> Result<GetPodOutput, ToolError> {
    let surroundings = Surroundings { asked, ..surroundings(services)? };
    let tunnel = surroundings.tunnels.iter().find(|tunnel| {
        Some(tunnel.wanted.pod_id.as_str()) == found.pod_id() && tunnel.wanted.remote_port == COMFY_PORT
    });
    let (record, pod) = (found.record.as_ref(), found.pod.as_ref());
    let readiness = Ladder { record, pod, tunnel, held: services.keeper.is_alive(), ahead }.steps();
    let waiting_for = readiness.iter().find_map(|step| step.waiting_for.clone());
    let ssh = pod.map_or_else(|| record?.known.ssh.as_ref(), |pod| pod.ssh.as_ref());
    Ok(GetPodOutput {
        ssh: ssh.map(|at| format!("{}@{}:{}", at.user, at.host, at.port)),
        row: surroundings.row(found),
        readiness,
        done: None,
        waiting_for,
        source: if services.provider.is_some() { Source::Provider } else { Source::Records },
        still_billing: None,
        idle_unknown: record.and_then(|record| record.known.idle_unknown.clone()),
        warning: None,
    })
}

/// Watches what the keeper writes; it asks the provider for all who wait.
async fn until(
    waiting: &Waiting<'_>,
    context: &Context,
    mut found: Found,
    goal: WaitFor,
    ahead: SignedDuration,
) -> Result<GetPodOutput, ToolError> {
    let services = &context.services;
    let name = found.name.clone();
    let Some(intent) = found.record.as_ref().map(|record| record.intent.clone()) else {
        return Err(ToolError::refused(format!("`wait_for`: the pod `{name}` is not one of this home's"))
            .hint("leave wait_for out to see how it is"));
    };
    let mut told = String::new();
    let mut has_tunnel = false;
    loop {
        let record = services.fleet.of_intent(&intent)?.ok_or_else(|| {
            ToolError::failed(format!("the record of the pod `{name}` has left the file"))
                .billing(StillBilling::Possible)
                .hint("see list_pods")
        })?;
        if let Some(error) = in_vain(&name, &record, goal) {
            return Err(error);
        }
        if goal == WaitFor::Comfy && !has_tunnel && !context.read_only && record.known.pod_id.is_some() {
            let at_once = Waiting::new(context, Some(0));
            open(&at_once, context, &name, COMFY_PORT, LocalPort::From(COMFY_PORT)).await?;
            has_tunnel = true;
        }
        refuse_failed_tunnel(services, &name, goal)?;
        let still_billing = billing_of(&record);
        let under_way = under_way(&record);
        // What was read at first is older than what the keeper knows by now.
        found = Found { record: Some(record), pod: None, ..found };
        let mut output = view(services, &found, ahead, false)?;
        if goal == WaitFor::Change {
            output.waiting_for = under_way;
        }
        let done = match goal {
            WaitFor::Change => output.waiting_for.is_none(),
            WaitFor::Ssh => output.readiness.iter().take(3).all(|step| step.done),
            WaitFor::Comfy => output.readiness.iter().all(|step| step.done),
        };
        output.done = Some(done);
        // To go on waiting is all that an unfinished wait may lead to.
        output.row.next = output.row.next.filter(|_| done);
        output.still_billing = Some(still_billing);
        let step = output.waiting_for.clone().unwrap_or_else(|| "ready".to_owned());
        if step != told {
            waiting.tell(&step);
            told = step;
        }
        if done || !waiting.again().await {
            return Ok(output);
        }
        if !services.keeper.is_alive() {
            services.keeper_for_changes().await?;
        }
    }
}

/// What a call of control_pod still waits for.
fn under_way(record: &PodRecord) -> Option<String> {
    if let Some(action) = record.pending_action() {
        return Some(format!("the {} to be through", super::control::word(action.action)));
    }
    if record.reserved_until() > record.expires_at() {
        return Some(format!("the deadline to be moved to {:.0}", record.reserved_until()));
    }
    match record.known.status {
        Some(PodStatus::Running | PodStatus::Exited | PodStatus::Error | PodStatus::Terminated) => None,
        _ => Some("the container to start".to_owned()),
    }
}

fn in_vain(name: &str, record: &PodRecord, goal: WaitFor) -> Option<ToolError> {
    let known = &record.known;
    let error = match (known.phase, known.status) {
        (Phase::Refused, _) => {
            let problem = known.problem.clone().unwrap_or_default();
            ToolError::failed(format!("the pod `{name}` was not created: {problem}")).hint("see list_gpus")
        }
        (Phase::Gone, _) => ToolError::failed(format!("the pod `{name}` is gone")).hint("see list_pods"),
        _ if record.is_ending() => {
            ToolError::failed(format!("the pod `{name}` is being ended")).hint("see list_pods until it is gone")
        }
        (_, Some(PodStatus::Error)) => ToolError::failed(format!("the pod `{name}` is in the state ERROR"))
            .hint(format!("end it with terminate_pod {{\"pod\": \"{name}\"}}")),
        _ if goal != WaitFor::Change => return stopped(name, record),
        _ => return None,
    };
    Some(error.billing(billing_of(record)))
}

fn refuse_failed_tunnel(services: &Services, pod: &str, goal: WaitFor) -> Result<(), ToolError> {
    if goal != WaitFor::Comfy {
        return Ok(());
    }
    let tunnel = services.tunnels.get(&name_of(pod, COMFY_PORT))?;
    match tunnel.filter(|tunnel| tunnel.known.state == TunnelState::Failed) {
        None => Ok(()),
        Some(tunnel) => {
            let cause = tunnel.known.cause.unwrap_or_default();
            Err(ToolError::failed(format!("no tunnel to `{pod}`: {cause}"))
                .hint("mend that and call again")
                .billing(StillBilling::Yes))
        }
    }
}
