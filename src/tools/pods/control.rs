//! control_pod: starts, stops, restarts a pod or gives it more time. The wish goes into the record, the keeper carries
//! it out, and the record is watched until it has.

mod action;
mod extend;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Owner, agree, billing_of, cents, find, owner_of};
use crate::config::Limits;
use crate::fleet::{Changed, Claim, HomeIdentity, OverCap, PodRecord, check};
use crate::provider::PodAction;
use crate::tools::context::Services;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, StillBilling, Tool, ToolError};

pub struct ControlPod;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ControlInput {
    /// The pod's name or id; never picked for you.
    pod: String,
    /// `stop` wipes the container disk and ends the GPU's cost; `extend` moves the deadline.
    action: Action,
    /// For extend: how many minutes more; 60 when left out.
    #[schemars(range(min = 1, max = 10080))]
    #[serde(default)]
    minutes: Option<u32>,
    /// The most USD an hour that the user has agreed to, for prices above the config's threshold.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    confirm_price: Option<f64>,
    /// Seconds to wait until it is done; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Action {
    Start,
    Stop,
    Restart,
    Extend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum ControlState {
    Starting,
    Running,
    Stopping,
    Stopped,
    Restarting,
    Extending,
    Extended,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ControlOutput {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_id: Option<String>,
    state: ControlState,
    done: bool,
    /// False when it was so already, and nothing was asked of the provider.
    changed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    /// When the action brought another GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_before: Option<String>,
    /// user@host:port.
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh: Option<String>,
    /// When the action moved the pod; its tunnels follow by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    ssh_before: Option<String>,
    /// USD while it runs.
    price_per_hour: f64,
    expires_at: Timestamp,
    /// When the deadline was moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at_before: Option<Timestamp>,
    /// Whether the pod also ends itself then; only for extend.
    #[serde(skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    /// USD it can still cost until its deadline.
    reserved_usd: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    still_billing: StillBilling,
    next: String,
}

impl Tool for ControlPod {
    const NAME: &'static str = "control_pod";
    const TITLE: &'static str = "Start, stop, restart or extend a pod";
    const DESCRIPTION: &'static str = "Starts, stops or restarts a pod of this home, or moves its deadline (extend), \
        within the caps. Tells a changed GPU or address; its tunnels follow.";
    const EFFECT: Effect = Effect::Changes;
    const EXAMPLE: &'static str = r#"{"pod": "comfy", "action": "extend", "minutes": 30}"#;
    type Input = ControlInput;
    type Output = ControlOutput;

    async fn run(context: &Context, input: ControlInput) -> Result<ControlOutput, ToolError> {
        let waiting = Waiting::new(context, input.wait_seconds);
        if input.minutes.is_some() && input.action != Action::Extend {
            return Err(ToolError::invalid("minutes", "only for the action extend"));
        }
        let services = &context.services;
        services.provider().map_err(|error| error.billing(StillBilling::Possible))?;
        services.refuse_foreign_account().await?;
        let ours = ours(services, &input.pod).await?;
        let call = Call { context, waiting: &waiting, name: ours.0, confirm_price: input.confirm_price };
        match input.action {
            Action::Start => call.act(ours.1, PodAction::Start).await,
            Action::Stop => call.act(ours.1, PodAction::Stop).await,
            Action::Restart => call.act(ours.1, PodAction::Restart).await,
            Action::Extend => call.extend(ours.1, input.minutes.unwrap_or(extend::DEFAULT_MINUTES)).await,
        }
    }

    fn text(output: &ControlOutput) -> String {
        let already = if output.changed { "" } else { " already" };
        let mut text = format!("Pod {}:{already} {:?}", output.pod, output.state).to_lowercase();
        text.replace_range(..1, "P");
        match (&output.gpu_before, &output.gpu) {
            (Some(before), Some(now)) => text.push_str(&format!(", on {now} instead of {before}")),
            (_, Some(gpu)) => text.push_str(&format!(", {gpu}")),
            _ => {}
        }
        if let (Some(before), Some(now)) = (&output.ssh_before, &output.ssh) {
            text.push_str(&format!(", now at {now} instead of {before}"));
        }
        text.push_str(&format!(", ends at {:.0}", output.expires_at));
        if let Some(before) = output.expires_at_before {
            text.push_str(&format!(" instead of {before:.0}, for up to ${:.2} more", output.reserved_usd));
        }
        if let Some(switch) = &output.switch {
            text.push_str(&format!("; its own switch is {switch}"));
        }
        if let Some(waiting_for) = &output.waiting_for {
            text.push_str(&format!(". Waiting for {waiting_for}"));
        }
        format!("{text}.\nNext: {}", output.next)
    }
}

pub(super) fn word(action: PodAction) -> &'static str {
    match action {
        PodAction::Start => "start",
        PodAction::Stop => "stop",
        PodAction::Restart => "restart",
        PodAction::Terminate => "terminate",
    }
}

/// One call on one pod of ours.
struct Call<'a> {
    context: &'a Context,
    waiting: &'a Waiting<'a>,
    name: String,
    confirm_price: Option<f64>,
}

/// The record of a pod of this home that is there and is not being ended.
async fn ours(services: &Services, wanted: &str) -> Result<(String, PodRecord), ToolError> {
    let found = find(services, wanted).await?;
    let name = found.name;
    let Some(record) = found.record else {
        let identity = HomeIdentity::read(&services.home)?;
        let refused = |whose: &str| {
            ToolError::refused(format!("the pod `{name}` {whose}; nothing was changed")).billing(StillBilling::Yes)
        };
        return Err(match found.pod.as_ref().map(|pod| owner_of(pod, identity.as_ref())) {
            Some(Owner::Ours) => refused("has no record here yet; the keeper takes it back")
                .hint("call list_pods, then try again in a moment")
                .retryable(true),
            Some(Owner::OtherMachine) => refused("belongs to another machine or home")
                .hint("change it there, or at https://console.runpod.io/pods"),
            _ => refused("was not made by this program").hint("change it at https://console.runpod.io/pods"),
        });
    };
    if record.is_ending() {
        return Err(being_ended(&name, &record));
    }
    if record.known.pod_id.is_none() {
        return Err(ToolError::refused(format!("the pod `{name}` is not placed yet; nothing was changed"))
            .billing(billing_of(&record))
            .hint(format!("see get_pod {{\"pod\": \"{name}\"}}"))
            .retryable(true));
    }
    Ok((name, record))
}

fn being_ended(name: &str, record: &PodRecord) -> ToolError {
    ToolError::refused(format!("the pod `{name}` is being ended; nothing was changed"))
        .billing(billing_of(record))
        .hint("see list_pods until it is gone; then create_pod_with_volume makes another")
}

impl Call<'_> {
    /// Asks the user to agree when the price is above the threshold. Who is asked is not asked for what the caps refuse.
    async fn agree(&self, what: &str, price: f64, until: Timestamp) -> Result<(), ToolError> {
        let services = &self.context.services;
        let limits = services.limits()?;
        if agree::is_agreed(price, self.confirm_price, &limits) {
            return Ok(());
        }
        let claim = Claim { price_per_hour: price, from: Timestamp::now(), until };
        check(&services.fleet.read()?, &self.name, claim, false, &limits).map_err(|over| self.over_cap(&over))?;
        agree::ask(self.context, self.waiting, what, price, &limits).await
    }

    fn limits(&self) -> Result<Limits, ToolError> {
        self.context.services.limits()
    }

    fn over_cap(&self, over: &OverCap) -> ToolError {
        let hint = match over {
            OverCap::Lifetime { .. } => "ask for fewer minutes",
            OverCap::PodPrice { .. } => "terminate it and create one with a cheaper GPU; a network volume stays",
            _ => "terminate or stop another pod, or ask for less; list_pods shows what runs",
        };
        ToolError::refused(format!("{over}; nothing was changed"))
            .billing(self.billing())
            .hint(format!("{hint}. The user can change the cap in config.json"))
    }

    /// The record that the wish was written into.
    fn written(&self, changed: Changed) -> Result<PodRecord, ToolError> {
        let name = &self.name;
        match changed {
            Changed::Written(record) => Ok(record),
            Changed::NotThere => {
                Err(ToolError::not_found(format!("the pod `{name}` is gone; nothing was changed"))
                    .hint("see list_pods"))
            }
            Changed::BeingTerminated(record) => Err(being_ended(name, &record)),
            Changed::Busy(record) => {
                let other = record.pending_action().map_or("action", |pending| word(pending.action));
                Err(ToolError::refused(format!("a {other} of the pod `{name}` is under way; nothing was changed"))
                    .billing(billing_of(&record))
                    .hint(format!("wait for it with get_pod {{\"pod\": \"{name}\", \"wait_for\": \"change\"}}"))
                    .retryable(true))
            }
            Changed::OverCap(over) => Err(self.over_cap(&over)),
        }
    }

    fn billing(&self) -> StillBilling {
        let record = self.context.services.fleet.get(&self.name).ok().flatten();
        record.as_ref().map_or(StillBilling::Possible, billing_of)
    }

    /// The wish is on disk already, so whichever keeper comes next carries it out.
    async fn wake_keeper(&self) -> Result<(), ToolError> {
        self.context.services.keeper_for_changes().await.map_err(|error| {
            let name = &self.name;
            let message =
                format!("the wish for the pod `{name}` is recorded, but nobody carries it out now: {}", error.message);
            ToolError { message, ..error }
                .hint(format!("call again, or end it with terminate_pod {{\"pod\": \"{name}\"}}"))
                .billing(StillBilling::Possible)
        })
    }

    /// The record of the intent; an error when there is nothing to wait for any more.
    fn watched(&self, intent: &str) -> Result<PodRecord, ToolError> {
        let name = &self.name;
        let record = self.context.services.fleet.of_intent(intent)?.filter(PodRecord::is_open);
        let record = record.ok_or_else(|| {
            ToolError::failed(format!("the pod `{name}` has ended meanwhile"))
                .billing(StillBilling::No)
                .hint("see list_pods")
        })?;
        if record.is_ending() {
            let cause = record.known.ending_cause.clone().unwrap_or_else(|| "terminated".to_owned());
            return Err(ToolError::failed(format!("the pod `{name}` is being ended: {cause}"))
                .billing(StillBilling::Possible)
                .hint("see list_pods until it is gone"));
        }
        Ok(record)
    }

    fn output(&self, record: &PodRecord, state: ControlState) -> ControlOutput {
        let known = &record.known;
        ControlOutput {
            pod: self.name.clone(),
            pod_id: known.pod_id.clone(),
            state,
            done: false,
            changed: true,
            gpu: known.gpu.clone(),
            gpu_before: None,
            ssh: known.ssh.as_ref().map(address),
            ssh_before: None,
            price_per_hour: cents(record.price()),
            expires_at: record.expires_at(),
            expires_at_before: None,
            switch: None,
            reserved_usd: cents(record.reserved_usd(Timestamp::now())),
            waiting_for: None,
            still_billing: billing_of(record),
            next: String::new(),
        }
    }
}

fn address(at: &crate::provider::SshAddress) -> String {
    format!("{}@{}:{}", at.user, at.host, at.port)
}
