//! terminate_pod: ends a pod and proves it gone, with the keeper or without.

use std::time::Duration;

use jiff::SignedDuration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::task::JoinHandle;

use super::{Found, Owner, cents, cost_now, find, never_seen, owner_of, row};
use crate::fleet::{Actor, HomeIdentity, Phase, PodRecord, WantedState, new_intent};
use crate::provider::{Pod, PodStatus, Stamped, delete_and_prove};
use crate::steps;
use crate::tools::context::{Question, Services};
use crate::tools::waiting::Waiting;
use crate::tools::words::usd;
use crate::tools::{Context, Effect, ErrorKind, StillBilling, Tool, ToolError};
use crate::tunnel::TunnelRecord;

/// For a keeper that was slow or is to be started, beside a caller that doesn't wait.
const LEAST_FOR_THE_KEEPER: Duration = Duration::from_secs(2);

/// The provider's calls are counted, so it isn't asked as often as a record is looked at.
const LOOKS_BETWEEN_DELETES: usize = 5;

pub struct TerminatePod;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TerminateInput {
    /// The pod's name or id; never picked for you.
    pod: String,
    /// Also end a pod that this home did not make; a person is asked first.
    #[serde(default)]
    allow_unmanaged: bool,
    /// In place of that question, where nobody can be asked: the pod's full id, as a person gave it.
    #[serde(default)]
    confirm_pod_id: Option<String>,
    /// Seconds to wait for the proof that it is gone; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum TerminateState {
    Terminating,
    Gone,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct TerminateOutput {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_id: Option<String>,
    state: TerminateState,
    /// True when both the pod's own page and the list of pods prove it gone, or when none was ever seen of it.
    done: bool,
    /// What became of a create that no pod is known of.
    #[serde(skip_serializing_if = "Option::is_none")]
    cancelled: Option<String>,
    /// USD by our own count; the provider's bill counts.
    cost_usd: f64,
    tunnels_stopped: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    /// Left out when all is well with the records.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    still_billing: StillBilling,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Tool for TerminatePod {
    const NAME: &'static str = "terminate_pod";
    const TITLE: &'static str = "Terminate a pod";
    const DESCRIPTION: &'static str = "Ends a pod for good, stops its tunnels, proves it gone and tells its cost. \
        Its disk is lost; a network volume stays.";
    const EFFECT: Effect = Effect::Destroys;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = TerminateInput;
    type Output = TerminateOutput;

    async fn run(context: &Context, input: TerminateInput) -> Result<TerminateOutput, ToolError> {
        let services = &context.services;
        let waiting = Waiting::new(context, input.wait_seconds);
        let wanted = match already_gone(services, &input.pod)? {
            None => input.pod,
            Some((closed, done)) => match alive_all_the_same(services, &waiting, &closed).await {
                None => return Ok(done),
                Some(id) => id,
            },
        };
        let found = match find(services, &wanted).await {
            Ok(found) => found,
            // It was proven gone between the two looks.
            Err(error) if error.kind == ErrorKind::NotFound => {
                return already_gone(services, &wanted)?.map(|(_, done)| done).ok_or(error);
            }
            Err(error) if error.still_billing.is_none() && error.retryable => {
                return Err(error.billing(StillBilling::Possible));
            }
            Err(error) => return Err(error),
        };
        if let Err(error) = services.provider()
            && !(found.record.is_some() && keeper_has_a_key(services).await)
        {
            return Err(error.billing(StillBilling::Possible));
        }
        services.refuse_foreign_account().await?;
        if let Some(whose) = foreign(services, &found)? {
            confirm(context, &waiting, &found, whose, input.allow_unmanaged, input.confirm_pod_id.as_deref()).await?;
        }
        let name = found.name.clone();
        // Both wait for the same lock, which somebody may hold on to; then the pod is ended without them.
        let patience = services.timing.keeper_takes_ending;
        let (written, tunnels) = tokio::join!(
            tokio::time::timeout(patience, wish_gone(services, &found)),
            tokio::time::timeout(patience, want_tunnels_closed(services, &name, found.pod_id())),
        );
        let held = || ToolError::failed(format!("another process held the records for more than {patience:?}"));
        let (written, tunnels) = (written.unwrap_or_else(|_| Err(held())), tunnels.unwrap_or_default());
        let facts =
            json!({ "pod": name, "pod_id": found.pod_id(), "intent": written.as_ref().ok(), "cause": "asked for" });
        services.audit.note(Actor::Tool(Self::NAME), "terminate_wanted", facts);
        steps::reached("caller: terminate wanted");
        // A keeper that hangs takes longer to be replaced than a pod may wait for its end, so this goes on beside it.
        let waking = tokio::spawn({
            let services = services.clone();
            async move { services.keeper_for_changes().await }
        });
        let warning = written.as_ref().err().map(|error| format!("the record could not be written: {}", error.message));
        let intent = written.ok();
        let outcome = match &intent {
            Some(intent) => by_keeper(&waiting, services, &name, intent, &waking).await,
            None => Outcome::NotTaken,
        };
        let record =
            intent.and_then(|intent| services.fleet.get(&name).ok().flatten().filter(|record| record.intent == intent));
        let gone = match outcome {
            Outcome::Gone => true,
            Outcome::TimeIsUp => false,
            Outcome::NotTaken => {
                let id = found.pod_id().map(str::to_owned).or_else(|| record.as_ref()?.known.pod_id.clone());
                // Looked for only without an id: a list that takes its time keeps no DELETE waiting.
                let id = match id {
                    Some(id) => Some(id),
                    None => id_by_cloud_name(services, &found).await,
                };
                match id {
                    Some(id) => ourselves(&waiting, services, &id, record.as_ref().or(found.record.as_ref())).await?,
                    None => false,
                }
            }
        };
        // A keeper that hung is replaced within the call's time, for it has other pods to keep.
        // Even who doesn't wait may be the last who could start one: a call's process ends with its answer.
        if let Ok(Ok(Err(error))) = tokio::time::timeout(waiting.left().max(LEAST_FOR_THE_KEEPER), waking).await {
            tracing::warn!(%error, "the keeper can't be started");
        }
        let tunnels_stopped = count_stopped(&waiting, services, &tunnels).await;
        Ok(describe(&name, &found, record.as_ref(), gone, tunnels_stopped, warning))
    }

    fn text(output: &TerminateOutput) -> String {
        let TerminateOutput { pod, cost_usd, .. } = output;
        if let Some(cancelled) = &output.cancelled {
            return format!("Pod {pod} is cancelled: {cancelled}.");
        }
        if output.done {
            let cost = usd(*cost_usd);
            return format!("Pod {pod} is gone (proven). It cost {cost} by our count. Nothing is billed for it.");
        }
        let waiting_for = output.waiting_for.as_deref().unwrap_or("the proof that it is gone");
        format!("Pod {pod} is being terminated and may still be billed. Waiting for {waiting_for}.")
    }
}

/// Asking twice is no error: an assistant may have missed the first answer.
fn already_gone(services: &Services, wanted: &str) -> Result<Option<(Found, TerminateOutput)>, ToolError> {
    let records = services.fleet.read()?;
    let same = |name: &str, record: &PodRecord| name == wanted || record.known.pod_id.as_deref() == Some(wanted);
    if records.iter().any(|(name, record)| same(name, record) && record.is_open()) {
        return Ok(None);
    }
    let gone = records.iter().find(|(name, record)| same(name, record) && record.known.phase == Phase::Gone);
    Ok(gone.map(|(name, record)| {
        let found = Found { name: name.clone(), record: Some(record.clone()), pod: None };
        let answer = describe(name, &found, Some(record), true, 0, None);
        (found, answer)
    }))
}

/// The id of a pod that its record says is gone and the provider shows alive. Who can't ask believes the proof of then.
async fn alive_all_the_same(services: &Services, waiting: &Waiting<'_>, closed: &Found) -> Option<String> {
    let record = closed.record.as_ref()?;
    let patience = waiting.left().max(LEAST_FOR_THE_KEEPER);
    let listed = tokio::time::timeout(patience, services.provider.as_ref()?.pods()).await.ok()?.ok()?.value;
    let this_pod =
        |pod: &Pod| record.known.pod_id.as_ref() == Some(&pod.id) || record.cloud_name(&closed.name) == pod.name;
    listed.into_iter().find(|pod| pod.status != PodStatus::Terminated && this_pod(pod)).map(|pod| pod.id)
}

/// Then it can end our pods though this call has no key itself.
async fn keeper_has_a_key(services: &Services) -> bool {
    services.keeper.hello().await.is_some_and(|keeper| keeper.has_key)
}

/// Whose the pod is, when it is not ours.
fn foreign(services: &Services, found: &Found) -> Result<Option<&'static str>, ToolError> {
    if found.record.is_some() {
        return Ok(None);
    }
    let identity = HomeIdentity::read(&services.home)?;
    Ok(match found.pod.as_ref().map(|pod| owner_of(pod, identity.as_ref())) {
        Some(Owner::Ours) => None,
        Some(Owner::OtherMachine) => Some("belongs to another machine or home"),
        _ => Some("was not made by this program"),
    })
}

/// Somebody else may need the pod, so a person says that it is to end: asked now, or by its id.
async fn confirm(
    context: &Context,
    waiting: &Waiting<'_>,
    found: &Found,
    whose: &str,
    allowed: bool,
    confirmed_id: Option<&str>,
) -> Result<(), ToolError> {
    let id = found.pod_id().unwrap_or(&found.name);
    let refused = |why: &str| {
        ToolError::refused(format!("the pod `{}` {whose}{why}; nothing was done", found.name))
            .billing(StillBilling::Yes)
    };
    if !allowed {
        return Err(refused("").hint("if it is really to end, call again with allow_unmanaged: true"));
    }
    match confirmed_id {
        Some(confirmed) if confirmed == id => return Ok(()),
        Some(_) => return Err(refused(", and confirm_pod_id is not its id").hint("look at it again with list_pods")),
        None => {}
    }
    let name = found.pod.as_ref().map_or(found.name.as_str(), |pod| pod.name.as_str());
    let message = format!("End the pod `{name}` (id {id})? It {whose}. What is on its disk is lost.");
    match context.ask.confirm(Question { message, limit: waiting.left() }).await.refusal() {
        None => Ok(()),
        Some(reason) => Err(refused(&format!(", and {reason}")).hint(format!(
            "if a person says that it is to end: terminate_pod {{\"pod\": \"{id}\", \"allow_unmanaged\": true, \
             \"confirm_pod_id\": \"{id}\"}}"
        ))),
    }
}

/// Marks the record, making one for a pod that has none; the intent it stands under.
async fn wish_gone(services: &Services, found: &Found) -> Result<String, ToolError> {
    if let Some(record) = &found.record {
        services.fleet.want_gone(&record.intent).await?;
        return Ok(record.intent.clone());
    }
    let Some(pod) = &found.pod else { return Err(ToolError::not_found("there is no such pod")) };
    let mut record = PodRecord::of_existing(pod, new_intent(), SignedDuration::ZERO);
    record.wanted.state = WantedState::Gone;
    let intent = record.intent.clone();
    match services.fleet.adopt(&found.name, record).await? {
        true => Ok(intent),
        false => Err(ToolError::failed("another record of this pod was written at the same moment")),
    }
}

enum Outcome {
    Gone,
    TimeIsUp,
    /// The keeper did not begin in time; ending must not depend on it.
    NotTaken,
}

async fn by_keeper(
    waiting: &Waiting<'_>,
    services: &Services,
    name: &str,
    intent: &str,
    waking: &JoinHandle<Result<(), ToolError>>,
) -> Outcome {
    waiting.tell("the keeper to end it");
    loop {
        let Ok(record) = services.fleet.get(name) else { return Outcome::NotTaken };
        // A record that has left the file proves nothing about its pod.
        let Some(record) = record.filter(|record| record.intent == intent) else { return Outcome::NotTaken };
        if !record.is_open() {
            return Outcome::Gone;
        }
        let taken = record.known.ending_since.is_some() && (services.keeper.is_alive() || !waking.is_finished());
        // One that has taken it may hang or lack a key that works; what it does may be done twice without harm.
        let patience = services.timing.keeper_takes_ending * if taken { 3 } else { 1 };
        let no_keeper = waking.is_finished() && !services.keeper.is_alive();
        // A pod without an id may be in the making; only a keeper would tell.
        if no_keeper || record.known.pod_id.is_some() && waiting.elapsed() >= patience {
            return Outcome::NotTaken;
        }
        if !waiting.again().await {
            return Outcome::TimeIsUp;
        }
    }
}

/// The pod that a create made whose answer never got into the record.
async fn id_by_cloud_name(services: &Services, found: &Found) -> Option<String> {
    let name = found.record.as_ref()?.cloud_name(&found.name);
    let listed = services.provider.as_ref()?.pods().await.ok()?.value;
    listed.into_iter().find(|pod| pod.name == name && pod.status != PodStatus::Terminated).map(|pod| pod.id)
}

/// DELETE is idempotent, so it does no harm that the keeper may do the same.
async fn ourselves(
    waiting: &Waiting<'_>,
    services: &Services,
    id: &str,
    record: Option<&PodRecord>,
) -> Result<bool, ToolError> {
    waiting.tell("ending it without the keeper");
    let provider = services.provider().map_err(|error| error.billing(StillBilling::Possible))?;
    loop {
        let may_lag = record.is_some_and(|record| record.may_lag(services.timing.provider_lag));
        match delete_and_prove(&**provider, id, may_lag).await {
            Ok(Stamped { value, .. }) if value.is_proven => {
                let facts = json!({ "pod_id": id, "cause": "terminated, without the keeper" });
                services.audit.note(Actor::Tool(TerminatePod::NAME), "gone", facts);
                steps::reached("caller: deleted without keeper");
                return Ok(true);
            }
            Ok(_) => {}
            Err(error) if error.is_transient() && waiting.left() > Duration::from_secs(1) => {}
            Err(error) => {
                return Err(ToolError::from(error).billing(StillBilling::Possible).hint(format!(
                    "call terminate_pod {{\"pod\": \"{id}\"}} again, or end it at https://console.runpod.io/pods"
                )));
            }
        }
        for _ in 0..LOOKS_BETWEEN_DELETES {
            if !waiting.again().await {
                return Ok(false);
            }
        }
    }
}

async fn want_tunnels_closed(services: &Services, name: &str, id: Option<&str>) -> Vec<(String, TunnelRecord)> {
    let (name, id) = (name.to_owned(), id.map(str::to_owned));
    let of_this_pod =
        move |_: &str, tunnel: &TunnelRecord| tunnel.wanted.pod == name || Some(&tunnel.wanted.pod_id) == id.as_ref();
    services.tunnels.want_closed(of_this_pod).await.unwrap_or_default()
}

/// The keeper takes the records of closed tunnels out, which proves that their ssh has ended.
async fn count_stopped(waiting: &Waiting<'_>, services: &Services, tunnels: &[(String, TunnelRecord)]) -> usize {
    loop {
        let Ok(there) = services.tunnels.read() else { return 0 };
        let still =
            |name: &str, tunnel: &TunnelRecord| there.get(name).is_some_and(|record| record.intent == tunnel.intent);
        let left = tunnels.iter().filter(|(name, tunnel)| still(name, tunnel)).count();
        if left == 0 || !services.keeper.is_alive() || !waiting.again().await {
            return tunnels.len() - left;
        }
    }
}

/// No pod was ever seen, so none is proven gone.
fn cancelled(record: &PodRecord, gone: bool) -> Option<String> {
    if record.known.pod_id.is_some() {
        return None;
    }
    match gone {
        true if record.known.phase == Phase::Refused => Some("its create was refused before it made a pod".to_owned()),
        true => never_seen(record).map(str::to_owned),
        false if record.is_unknown() => Some(row::cancelled(record)),
        false => Some("its create stops before the next attempt".to_owned()),
    }
}

fn describe(
    name: &str,
    found: &Found,
    record: Option<&PodRecord>,
    gone: bool,
    tunnels_stopped: usize,
    warning: Option<String>,
) -> TerminateOutput {
    let record = record.or(found.record.as_ref());
    let problem = record.and_then(|record| record.known.problem.clone());
    TerminateOutput {
        pod: name.to_owned(),
        pod_id: found.pod_id().map(str::to_owned).or_else(|| record?.known.pod_id.clone()),
        state: if gone { TerminateState::Gone } else { TerminateState::Terminating },
        done: gone,
        cancelled: record.and_then(|record| cancelled(record, gone)),
        cost_usd: record.map_or(0.0, |record| cents(cost_now(record))),
        tunnels_stopped,
        waiting_for: (!gone).then(|| problem.unwrap_or_else(|| "the proof that the pod is gone".to_owned())),
        warning,
        still_billing: if gone { StillBilling::No } else { StillBilling::Possible },
        next: (!gone).then(|| format!("terminate_pod {{\"pod\": \"{name}\"}} again until it is gone")),
    }
}
