//! Start, stop and restart: only what the provider says is legal now, each sent once.

use jiff::Timestamp;
use serde_json::json;

use super::{Call, ControlOutput, ControlPod, ControlState, address, word};
use crate::fleet::{ActionState, ActionWish, Actor, PodRecord, new_intent};
use crate::provider::{Pod, PodAction, PodStatus, ProviderError, SshAddress};
use crate::steps;
use crate::tools::pods::{billing_of, cents, while_a_pod_runs};
use crate::tools::{ErrorKind, StillBilling, Tool, ToolError};

/// What the provider's present word means for a wish.
enum Now {
    /// It is so, or on its way; nothing is sent.
    Already,
    Legal,
}

impl Call<'_> {
    pub(super) async fn act(&self, record: PodRecord, action: PodAction) -> Result<ControlOutput, ToolError> {
        let services = &self.context.services;
        let before = address_before(&record);
        // Who asks again for what is under way waits for it; the provider would refuse it by now.
        if !record.pending_action().is_some_and(|pending| pending.action == action) {
            let pod = self.ask_provider(&record).await?;
            if let Now::Already = self.judge(&record, &pod, action)? {
                return self.already(&record, &pod, action, before).await;
            }
            if action == PodAction::Start {
                let what = format!("start the pod {}", self.name);
                let told = record.price().max(pod.cost_per_hour);
                // One that was never told may be all that the cap allows.
                let most = record.wanted.max_price_per_hour.unwrap_or(self.limits()?.max_price_per_hour);
                self.agree(&what, if told > 0.0 { told } else { most }, record.reserved_until()).await?;
            }
        }
        let wish = ActionWish { id: new_intent(), action, requested_at: Timestamp::now() };
        let own = wish.id.clone();
        // Only a start is held against the caps: a config that can't be read keeps no pod from being stopped.
        let limits = if action == PodAction::Start { self.limits()? } else { self.limits().unwrap_or_default() };
        let changed = services.fleet.want_action(&record.intent, wish, &limits).await?;
        let record = self.written(changed)?;
        let wish = record.wanted.action.as_ref().map(|wish| wish.id.clone()).unwrap_or_default();
        if wish == own {
            let facts = json!({
                "pod": self.name, "intent": record.intent, "action": word(action),
                "usd_per_hour": cents(record.price()), "reserved_usd": cents(record.reserved_usd(Timestamp::now())),
                "expires_at": record.expires_at(),
            });
            services.audit.note(Actor::Tool(ControlPod::NAME), "action_wanted", facts);
            steps::reached("caller: action wanted");
        }
        self.wake_keeper().await?;
        self.until_acted(&record.intent, &wish, action, before).await
    }

    async fn ask_provider(&self, record: &PodRecord) -> Result<Pod, ToolError> {
        let id = record.known.pod_id.clone().unwrap_or_default();
        match self.context.services.provider()?.pod(&id).await {
            Ok(answer) => Ok(answer.value),
            Err(ProviderError::NotFound { .. }) => Err(ToolError::not_found(format!(
                "the provider doesn't show the pod `{}` ({id}); nothing was changed",
                self.name
            ))
            .billing(StillBilling::Possible)
            .hint("the keeper finds out whether it is gone: see list_pods in a moment")),
            Err(error) => Err(while_a_pod_runs(error)),
        }
    }

    fn judge(&self, record: &PodRecord, pod: &Pod, action: PodAction) -> Result<Now, ToolError> {
        // A wish of another kind that the keeper hasn't carried out yet is told by the records.
        if record.pending_action().is_some() {
            return Ok(Now::Legal);
        }
        let coming_up = matches!(pod.status, PodStatus::Provisioning | PodStatus::Starting);
        let restarting = record.known.action.as_ref().is_some_and(|known| known.action == PodAction::Restart);
        match action {
            PodAction::Start if coming_up || pod.status == PodStatus::Running => Ok(Now::Already),
            PodAction::Stop if pod.status == PodStatus::Exited => Ok(Now::Already),
            PodAction::Restart if coming_up && restarting => Ok(Now::Already),
            _ if pod.actions.contains(&action) => Ok(Now::Legal),
            _ => {
                let call = |action: &PodAction| match action {
                    PodAction::Terminate => format!("terminate_pod {{\"pod\": \"{}\"}}", self.name),
                    action => {
                        format!("control_pod {{\"pod\": \"{}\", \"action\": \"{}\"}}", self.name, word(*action))
                    }
                };
                let legal: Vec<_> = pod.actions.iter().map(call).collect();
                let locked = if pod.locked { "; it is locked at the provider" } else { "" };
                Err(ToolError::refused(format!(
                    "the pod `{}` is {}{locked}, and the provider allows no {} now; nothing was changed",
                    self.name,
                    pod.status,
                    word(action)
                ))
                .billing(billing_of(record))
                .hint(match legal.is_empty() {
                    true => format!("nothing is possible now; see get_pod {{\"pod\": \"{}\"}} later", self.name),
                    false => legal.join(", or "),
                }))
            }
        }
    }

    /// Nothing is sent; one that is coming up is waited for all the same.
    async fn already(
        &self,
        record: &PodRecord,
        pod: &Pod,
        action: PodAction,
        before: Option<SshAddress>,
    ) -> Result<ControlOutput, ToolError> {
        let reached = |record: &PodRecord| record.known.status == Some(target(action));
        if pod.status == target(action) {
            // The keeper may not have seen it yet.
            let mut output = self.acted(record, action, before.as_ref(), true);
            output.changed = false;
            output.still_billing = match pod.status {
                PodStatus::Running => StillBilling::Yes,
                _ => StillBilling::Possible,
            };
            output.ssh = pod.ssh.as_ref().map(address);
            output.gpu = pod.gpu.clone().or(output.gpu);
            return Ok(output);
        }
        self.wake_keeper().await?;
        loop {
            let record = self.watched(&record.intent)?;
            let mut output = self.acted(&record, action, before.as_ref(), reached(&record));
            output.changed = false;
            if output.done || !self.waiting.again().await {
                return Ok(output);
            }
        }
    }

    async fn until_acted(
        &self,
        intent: &str,
        wish: &str,
        action: PodAction,
        before: Option<SshAddress>,
    ) -> Result<ControlOutput, ToolError> {
        let mut told = String::new();
        loop {
            let record = self.watched(intent)?;
            let state = record.known.action.as_ref().filter(|known| known.id == wish).map(|known| known.state);
            let problem = record.known.action.as_ref().and_then(|known| known.problem.clone()).unwrap_or_default();
            if state == Some(ActionState::Refused) {
                return Err(self.refused(&record, action, &problem));
            }
            if record.known.status == Some(PodStatus::Error) && state.is_some() {
                return Err(ToolError::failed(format!("the pod `{}` came into the state ERROR", self.name))
                    .billing(StillBilling::Yes)
                    .hint(format!("end it with terminate_pod {{\"pod\": \"{}\"}}", self.name)));
            }
            let settled = matches!(state, Some(ActionState::Done | ActionState::Unclear));
            // After a restart without an answer a pod that runs may be the old one.
            let proven = state == Some(ActionState::Done) || action != PodAction::Restart;
            let reached = settled && proven && record.known.status == Some(target(action));
            let mut output = self.acted(&record, action, before.as_ref(), reached);
            if !reached {
                output.waiting_for = Some(match state {
                    None => "the keeper to send it".to_owned(),
                    Some(ActionState::Sent) => "the provider's answer".to_owned(),
                    Some(ActionState::Unclear) => {
                        format!("the pod's status, for there was no clear answer ({problem})")
                    }
                    _ if action == PodAction::Stop => "the container to stop".to_owned(),
                    _ => "the container to start".to_owned(),
                });
            }
            let step = output.waiting_for.clone().unwrap_or_else(|| "done".to_owned());
            if step != told {
                self.waiting.tell(&step);
                told = step;
            }
            if output.done {
                return Ok(output);
            }
            if !self.context.services.keeper.is_alive() {
                self.wake_keeper().await?;
            }
            if !self.waiting.again().await {
                return if state == Some(ActionState::Unclear) {
                    Err(self.unclear(action, &problem))
                } else {
                    Ok(output)
                };
            }
        }
    }

    fn refused(&self, record: &PodRecord, action: PodAction, problem: &str) -> ToolError {
        let name = &self.name;
        let error = ToolError::new(
            ErrorKind::Provider,
            format!("the {} of the pod `{name}` was refused: {problem}", word(action)),
        )
        .billing(billing_of(record));
        match action {
            // Its disk is bound to one machine, whose GPUs somebody else may have by now.
            PodAction::Start => error.hint(format!(
                "try again later; or terminate_pod {{\"pod\": \"{name}\"}} and create it anew, which may get another \
                 machine (a network volume stays, the pod's disk is lost)"
            )),
            _ => error.hint(format!("see get_pod {{\"pod\": \"{name}\"}}")),
        }
    }

    /// Whoever asks again after this asks for another one, so that is left to the caller.
    fn unclear(&self, action: PodAction, problem: &str) -> ToolError {
        let name = &self.name;
        ToolError::new(
            ErrorKind::UnknownOutcome,
            format!(
                "the {} of the pod `{name}` had no clear answer ({problem}) and was not sent again; its status doesn't \
                 show it yet",
                word(action)
            ),
        )
        .billing(StillBilling::Possible)
        .hint(format!("see get_pod {{\"pod\": \"{name}\"}}; the same call again sends it once more"))
    }

    fn acted(&self, record: &PodRecord, action: PodAction, before: Option<&SshAddress>, done: bool) -> ControlOutput {
        let name = &self.name;
        let state = match (action, done) {
            (PodAction::Stop | PodAction::Terminate, true) => ControlState::Stopped,
            (PodAction::Stop | PodAction::Terminate, false) => ControlState::Stopping,
            (_, true) => ControlState::Running,
            (PodAction::Restart, false) => ControlState::Restarting,
            (PodAction::Start, false) => ControlState::Starting,
        };
        let mut output = self.output(record, state);
        output.done = done;
        if let Some(known) = record.known.action.as_ref().filter(|known| known.action == action && done) {
            output.gpu_before = known.gpu_before.clone().filter(|before| Some(before) != record.known.gpu.as_ref());
            let before = known.ssh_before.as_ref().or(before).filter(|_| action != PodAction::Stop);
            output.ssh_before = before.filter(|before| Some(*before) != record.known.ssh.as_ref()).map(address);
        }
        output.waiting_for = (!done).then(|| "the container to start".to_owned());
        output.next = match (action, done) {
            (PodAction::Stop | PodAction::Terminate, true) => format!(
                "control_pod {{\"pod\": \"{name}\", \"action\": \"start\"}}, or terminate_pod {{\"pod\": \"{name}\"}}: \
                 the GPU costs nothing now, a disk may, until {:.0}",
                record.expires_at()
            ),
            (_, true) => format!("get_pod {{\"pod\": \"{name}\", \"wait_for\": \"comfy\"}}"),
            // A second restart would throw away the first.
            (PodAction::Restart, false) => format!("get_pod {{\"pod\": \"{name}\", \"wait_for\": \"change\"}}"),
            (_, false) => format!("control_pod {{\"pod\": \"{name}\", \"action\": \"{}\"}}", word(action)),
        };
        output
    }
}

/// Where the pod was before it was stopped, or is.
fn address_before(record: &PodRecord) -> Option<SshAddress> {
    record.known.ssh.clone().or_else(|| record.known.action.as_ref()?.ssh_before.clone())
}

fn target(action: PodAction) -> PodStatus {
    match action {
        PodAction::Start | PodAction::Restart => PodStatus::Running,
        PodAction::Stop => PodStatus::Exited,
        PodAction::Terminate => PodStatus::Terminated,
    }
}
