//! What a create came to: a refusal in words, or the record watched until the pod runs or the time is up.

use jiff::Timestamp;

use super::{CreateOutput, CreateState, PROXY_WARNING};
use crate::fleet::{Ensured, OverCap, Phase, PodRecord, TURNS_UP_WITHIN};
use crate::provider::PodStatus;
use crate::tools::pods::{billing_of, cents, mounted_volume};
use crate::tools::waiting::Waiting;
use crate::tools::{Context, ErrorKind, StillBilling, ToolError};
use crate::tunnel::COMFY_PORT;

pub(super) fn not_ensured(name: &str, outcome: Ensured) -> ToolError {
    match outcome {
        Ensured::Differs { differences, record } => ToolError::refused(format!(
            "there is a pod `{name}` already, made from another request ({}); nothing was created",
            differences.join("; ")
        ))
        .hint("ask for the same, use another name, or terminate_pod first")
        .billing(billing_of(&record)),
        Ensured::BeingTerminated(record) => {
            let error = ToolError::refused(format!("the pod `{name}` is being terminated; nothing was created"))
                .retryable(true)
                .billing(billing_of(&record));
            // One that may never have been made is looked for until its deadline.
            match record.known.pod_id.is_none() && record.is_unknown() {
                true => error.hint(format!("use another name, or {}", retry_hint(&record))),
                false => error.hint("call again when it is gone (see list_pods)"),
            }
        }
        Ensured::InError(record) => ToolError::refused(format!("the pod `{name}` is in the state ERROR"))
            .hint(format!("end it with terminate_pod {{\"pod\": \"{name}\"}}, then create it again"))
            .billing(billing_of(&record)),
        Ensured::TooEarly(record) => ToolError::refused(format!(
            "the create with the intent {} may still turn up: its pod has been missing from the provider's list for {} \
             of the {} minutes that prove nothing; nothing was created",
            record.intent,
            record.lacked_for().as_mins(),
            TURNS_UP_WITHIN.as_mins()
        ))
        .hint(format!("see get_pod {{\"pod\": \"{name}\"}}, and call again later; or use another name"))
        .retryable(true)
        .billing(StillBilling::Possible),
        Ensured::OverCap(over) => {
            let hint = match over {
                OverCap::Pods { .. } => "terminate one first (terminate_pod)",
                OverCap::PodPrice { .. } => "ask for a cheaper GPU (list_gpus)",
                _ => "ask for less or for a shorter life, or terminate a pod; spending shows what is set aside",
            };
            ToolError::refused(format!("{over}; nothing was created"))
                .hint(format!("{hint}. The user can change the cap in config.json"))
        }
        Ensured::New(_) | Ensured::Joined(_) => ToolError::new(ErrorKind::Internal, "an intent got lost"),
    }
}

fn retry_hint(record: &PodRecord) -> String {
    format!("call again with retry_unknown: \"{}\" once the list has lacked it for 10 minutes", record.intent)
}

/// The wish is on disk already, so whichever keeper comes next may carry it out.
pub(super) fn after_the_wish(error: ToolError, name: &str) -> ToolError {
    let message =
        format!("the wish for the pod `{name}` is recorded, but nobody carries it out now: {}", error.message);
    ToolError { message, ..error }
        .hint(format!("take it back with terminate_pod {{\"pod\": \"{name}\"}}, or call again"))
        .billing(StillBilling::Possible)
}

pub(super) async fn until_running(
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
        if let Some(error) = came_to_nothing(name, &record) {
            return Err(error);
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

fn came_to_nothing(name: &str, record: &PodRecord) -> Option<ToolError> {
    let known = &record.known;
    Some(match known.phase {
        Phase::Refused => {
            let problem = known.problem.clone().unwrap_or_default();
            ToolError::new(ErrorKind::Provider, format!("no pod was created: {problem}"))
                .billing(StillBilling::No)
                .hint(match known.attempts.last() {
                    Some(last) if known.refused_by_account => format!(
                        "the account or its key is the reason, not {}: see the message, then call again",
                        last.gpu
                    ),
                    _ => "see list_gpus for what is in stock; ask for other gpus, less memory or another volume"
                        .to_owned(),
                })
        }
        Phase::Gone => {
            let cause = known.ending_cause.clone().unwrap_or_default();
            ToolError::failed(format!("the pod `{name}` has ended: {cause}"))
                .billing(StillBilling::No)
                .hint("call again to create it anew")
        }
        _ if record.is_ending() => {
            let cause = known.ending_cause.clone().unwrap_or_else(|| "terminated".to_owned());
            ToolError::failed(format!("the pod `{name}` is being ended: {cause}"))
                .billing(StillBilling::Possible)
                .hint("see list_pods until it is gone")
        }
        _ if known.status == Some(PodStatus::Error) => {
            ToolError::failed(format!("the pod `{name}` came up in the state ERROR"))
                .billing(StillBilling::Yes)
                .hint(format!("end it with terminate_pod {{\"pod\": \"{name}\"}}"))
        }
        _ => return None,
    })
}

pub(super) fn describe(name: &str, created: bool, record: &PodRecord) -> CreateOutput {
    let known = &record.known;
    let proxied = record.wanted.request.ports.iter().any(|port| port.ends_with("/http"));
    let (state, waiting_for) = state_of(record);
    let done = matches!(state, CreateState::Running | CreateState::Stopped);
    let proxy_url =
        known.pod_id.as_ref().filter(|_| proxied).map(|id| format!("https://{id}-{COMFY_PORT}.proxy.runpod.net"));
    CreateOutput {
        pod: name.to_owned(),
        pod_id: known.pod_id.clone(),
        state,
        done,
        created,
        intent: Some(record.intent.clone()),
        gpu: known.gpu.clone(),
        data_center: known.data_center.clone(),
        price_per_hour: known.pod_id.as_ref().map(|_| cents(known.cost_per_hour)),
        volume: mounted_volume(Some(record), None),
        expires_at: record.expires_at(),
        reserved_usd: cents(record.reserved_usd(Timestamp::now())),
        candidates: Vec::new(),
        caps: None,
        refused: known.attempts.clone(),
        proxy_url,
        warning: proxied.then(|| PROXY_WARNING.to_owned()),
        waiting_for,
        still_billing: billing_of(record),
        next: match state {
            CreateState::Stopped => format!("control_pod {{\"pod\": \"{name}\", \"action\": \"start\"}}"),
            CreateState::Running => format!("start_tunnel {{\"pod\": \"{name}\"}}"),
            CreateState::Unknown if record.lacked_for() >= TURNS_UP_WITHIN => {
                format!(
                    "the same call with retry_unknown: \"{}\", or terminate_pod {{\"pod\": \"{name}\"}}",
                    record.intent
                )
            }
            CreateState::Unknown => {
                format!("get_pod {{\"pod\": \"{name}\"}} later, or terminate_pod {{\"pod\": \"{name}\"}}")
            }
            CreateState::Placing | CreateState::Starting | CreateState::DryRun => format!(
                "create_pod_with_volume again with the same arguments, or get_pod {{\"pod\": \"{name}\", \"wait_for\": \"ssh\"}}"
            ),
        },
    }
}

fn state_of(record: &PodRecord) -> (CreateState, Option<String>) {
    let known = &record.known;
    match (known.phase, known.status) {
        (Phase::Placed, Some(PodStatus::Running)) => (CreateState::Running, None),
        (Phase::Placed, Some(PodStatus::Exited)) => (CreateState::Stopped, None),
        (Phase::Placed, status) => {
            let status = status.unwrap_or(PodStatus::Unknown);
            let waiting_for = format!("the container to start (the provider says {status})");
            (CreateState::Starting, Some(waiting_for))
        }
        (Phase::Unknown, _) => {
            let reserved = record.reserved_usd(Timestamp::now());
            let waiting_for = format!(
                "the create had no clear answer; the pod is looked for by its name and never asked for twice; \
                 ${reserved:.2} stay set aside for it until {:.0}",
                record.expires_at()
            );
            (CreateState::Unknown, Some(waiting_for))
        }
        _ => {
            let waiting_for = known.problem.clone().unwrap_or_else(|| "the provider to place the pod".to_owned());
            (CreateState::Placing, Some(waiting_for))
        }
    }
}
