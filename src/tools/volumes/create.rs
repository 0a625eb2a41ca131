//! create_volume: ensures a network volume by name and size. It grows one that is smaller and never shrinks one.

use std::collections::BTreeSet;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{describe, listed, may_be_retried};
use crate::errors::harmless;
use crate::fleet::{
    Actor, EnsuredVolume, TURNS_UP_WITHIN, VolumeList, VolumePhase, VolumeRecord, VolumeWanted, monthly_usd, new_intent,
};
use crate::provider::{Cloud, Volume};
use crate::tools::context::Services;
use crate::tools::pods::cents;
use crate::tools::waiting::Waiting;
use crate::tools::words::word;
use crate::tools::{Context, Effect, ErrorKind, StillBilling, Tool, ToolError};

pub struct CreateVolume;

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolumeInput {
    /// Name of the volume. The same name again gives the same volume.
    #[schemars(length(min = 1, max = 100))]
    name: String,
    /// Least size in GB. A smaller volume of that name grows; none ever shrinks.
    #[schemars(range(min = 10, max = 4096))]
    size_gb: u32,
    /// Data center, like `EU-RO-1`; needed for a new volume. Pods that mount it run there.
    #[serde(default)]
    data_center: Option<String>,
    /// The intent of a create without a known outcome, to create anew after ten minutes.
    #[serde(default)]
    retry_unknown: Option<String>,
    /// Seconds to wait until it is there; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum VolumeState {
    Creating,
    Growing,
    /// There was no clear answer; the volume may exist.
    Unknown,
    Present,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct CreateVolumeOutput {
    volume: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_id: Option<String>,
    state: VolumeState,
    done: bool,
    /// False when there was such a volume already.
    created: bool,
    size_gb: u32,
    data_center: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    monthly_usd: f64,
    /// USD a month for all network volumes of the account.
    total_monthly_usd: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    still_billing: StillBilling,
    next: String,
}

impl Tool for CreateVolume {
    const NAME: &'static str = "create_volume";
    const TITLE: &'static str = "Create or grow a network volume";
    const DESCRIPTION: &'static str = "Ensures a network volume by name and size: makes it once, grows a smaller one. \
        It costs money every month, with no pod attached too, until a person deletes it.";
    const EFFECT: Effect = Effect::Creates;
    const EXAMPLE: &'static str = r#"{"name": "comfy-models", "size_gb": 50, "data_center": "EU-RO-1"}"#;
    type Input = CreateVolumeInput;
    type Output = CreateVolumeOutput;

    async fn run(context: &Context, input: CreateVolumeInput) -> Result<CreateVolumeOutput, ToolError> {
        let services = &context.services;
        let waiting = Waiting::new(context, input.wait_seconds);
        check_words(&input)?;
        // Without a key and without a keeper nothing may be promised.
        services.provider()?;
        services.refuse_foreign_account().await?;
        let cap = services.limits()?.max_volumes_per_month;
        let list = listed(services).await?;
        let (data_center, grows) = match target(services, &list, &input).await? {
            Target::There(volume) => return there(services, &list, &volume, input.size_gb, cap),
            Target::Grow(volume) => (volume.data_center, Some(volume.id)),
            Target::New(data_center) => (data_center, None),
        };
        let from_gb = grows.as_ref().and_then(|id| list.volumes.iter().find(|volume| volume.id == *id));
        let from_gb = from_gb.map(|volume| volume.size_gb);
        let wanted = VolumeWanted {
            name: input.name.clone(),
            size_gb: input.size_gb,
            data_center,
            requested_at: Timestamp::now(),
            grows,
            supersedes: input.retry_unknown.clone(),
        };
        let fresh = VolumeRecord::new(new_intent(), wanted);
        let (made, record) = match services.volumes.ensure(&list, fresh, cap).await? {
            EnsuredVolume::New(record) => (true, record),
            EnsuredVolume::Joined(record) => (false, record),
            refused => return Err(not_ensured(refused)),
        };
        if made {
            let facts = json!({
                "volume": record.wanted.name, "size_gb": record.wanted.size_gb, "from_gb": from_gb,
                "data_center": record.wanted.data_center, "intent": record.intent,
                "volume_id": record.wanted.grows, "supersedes": record.wanted.supersedes,
                "usd_per_month": monthly_usd(record.wanted.size_gb, None),
            });
            services.audit.note(Actor::Tool(Self::NAME), "volume_wanted", facts);
        }
        let record = watch(&waiting, services, record).await?;
        let mut output = output(services, &list, &record, made && record.wanted.grows.is_none(), cap)?;
        if let (Some(from), VolumeState::Present) = (from_gb.filter(|_| made), output.state) {
            output.note.get_or_insert(format!("grown from {from} GB"));
        }
        Ok(output)
    }

    fn text(output: &CreateVolumeOutput) -> String {
        let CreateVolumeOutput { volume, state, size_gb, data_center, monthly_usd, next, .. } = output;
        let made = if output.created { "new" } else { "there already" };
        let mut text = format!(
            "Volume {volume} ({made}): {}, {size_gb} GB in {data_center}, ${monthly_usd:.2} a month",
            word(state)
        );
        if let Some(note) = &output.note {
            text.push_str(&format!("; {note}"));
        }
        if let Some(waiting_for) = &output.waiting_for {
            text.push_str(&format!(". Waiting for {waiting_for}"));
        }
        format!("{text}.\nAll volumes: ${:.2} a month.\nNext: {next}", output.total_monthly_usd)
    }
}

fn check_words(input: &CreateVolumeInput) -> Result<(), ToolError> {
    let steers = |name: &str| name.chars().any(char::is_control) || harmless(name) != name;
    if input.name.trim() != input.name || steers(&input.name) {
        return Err(ToolError::invalid("name", "expected a name without control characters or spaces around it"));
    }
    let is_id = |id: &String| id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') && !id.is_empty();
    if input.data_center.as_ref().is_some_and(|id| !is_id(id)) {
        return Err(ToolError::invalid("data_center", "expected a data center's id like EU-RO-1"));
    }
    Ok(())
}

enum Target {
    /// Large enough already.
    There(Volume),
    Grow(Volume),
    New(String),
}

/// Which volume is meant, of those that are there.
async fn target(services: &Services, list: &VolumeList, input: &CreateVolumeInput) -> Result<Target, ToolError> {
    let in_place = |data_center: &String| input.data_center.as_ref().is_none_or(|wanted| wanted == data_center);
    let named = list.volumes.iter().filter(|volume| volume.name == input.name && in_place(&volume.data_center));
    match named.collect::<Vec<_>>().as_slice() {
        [only] if only.size_gb >= input.size_gb => Ok(Target::There((*only).clone())),
        [only] => Ok(Target::Grow((*only).clone())),
        [] => {
            let making = services.volumes.beyond(list)?;
            let mut making = making.into_iter().filter(|record| record.wanted.name == input.name);
            match (&input.data_center, making.next(), making.next()) {
                (Some(data_center), ..) => Ok(Target::New(data_center.clone())),
                (None, Some(record), None) => Ok(Target::New(record.wanted.data_center)),
                (None, ..) => Err(needs_a_place(services, &input.name).await),
            }
        }
        several => {
            let ids: Vec<_> = several.iter().map(|volume| describe(volume)).collect();
            Err(ToolError::invalid("name", format!("there are several volumes `{}`; nothing was changed", input.name))
                .hint(format!("name the data_center, or mount one by its id: {}", ids.join(", "))))
        }
    }
}

async fn needs_a_place(services: &Services, name: &str) -> ToolError {
    let error = ToolError::invalid(
        "data_center",
        format!("is required, for there is no volume `{name}` yet, and a volume stays in its data center for good"),
    );
    // What can't be told here is told by list_gpus.
    let catalog = match services.provider() {
        Ok(provider) => provider.gpus(1, Cloud::Secure).await.map(|answer| answer.value).unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    let ids: BTreeSet<_> = catalog.iter().flat_map(|gpu| gpu.data_centers.iter().map(|(id, _)| id.as_str())).collect();
    if ids.is_empty() {
        return error.hint("take one where list_gpus shows the GPU that you want");
    }
    let ids: Vec<_> = ids.into_iter().collect();
    error.hint(format!("take one with the GPU that you want (list_gpus): {}", ids.join(", ")))
}

fn not_ensured(refused: EnsuredVolume) -> ToolError {
    match refused {
        EnsuredVolume::OverCap(over) => ToolError::refused(format!("{over}; nothing was changed")).hint(
            "ask for less. A person can delete a volume (`autopod-mcp volume delete`) or change the cap in config.json",
        ),
        EnsuredVolume::Busy(record) => ToolError::refused(format!(
            "the volume `{}` is being made or grown to {} GB at this moment; nothing more was asked for",
            record.wanted.name, record.wanted.size_gb
        ))
        .hint("call again when list_volumes shows it")
        .retryable(true),
        EnsuredVolume::TooEarly(record) => ToolError::refused(format!(
            "the create with the intent {} may still turn up: its volume has been missing from the provider's list for \
             {} of the {} minutes that prove nothing; nothing was created",
            record.intent,
            record.lacked_for().as_mins(),
            TURNS_UP_WITHIN.as_mins()
        ))
        .hint("see list_volumes, and call again later")
        .retryable(true)
        .billing(StillBilling::Possible),
        EnsuredVolume::New(_) | EnsuredVolume::Joined(_) => ToolError::new(ErrorKind::Internal, "an intent got lost"),
    }
}

/// Looks at the record until it is settled or the time is up.
async fn watch(
    waiting: &Waiting<'_>,
    services: &Services,
    mut record: VolumeRecord,
) -> Result<VolumeRecord, ToolError> {
    let mut told = String::new();
    let intent = record.intent.clone();
    if record.is_open() {
        services.keeper_for_changes().await.map_err(|error| after_the_wish(error, &record))?;
    }
    loop {
        if record.known.phase == VolumePhase::Refused {
            let problem = record.known.problem.clone().unwrap_or_default();
            let done = if record.wanted.grows.is_some() { "the volume was not grown" } else { "no volume was created" };
            return Err(ToolError::new(ErrorKind::Provider, format!("{done}: {problem}"))
                .hint("see list_volumes; ask for another size or data center"));
        }
        if !record.is_open() {
            return Ok(record);
        }
        let step = waiting_for(&record);
        if step != told {
            waiting.tell(&step);
            told = step;
        }
        // Without a keeper nobody makes it.
        if !services.keeper.is_alive() {
            services.keeper_for_changes().await.map_err(|error| after_the_wish(error, &record))?;
        }
        if !waiting.again().await {
            return Ok(record);
        }
        record = services.volumes.of_intent(&intent)?.ok_or_else(|| {
            ToolError::failed("the wish for the volume was replaced by another one")
                .billing(StillBilling::Possible)
                .hint("see list_volumes")
        })?;
    }
}

/// The wish is on disk already, so whichever keeper comes next carries it out.
fn after_the_wish(error: ToolError, record: &VolumeRecord) -> ToolError {
    let message = format!(
        "the wish for the volume `{}` is recorded, but nobody carries it out now: {}",
        record.wanted.name, error.message
    );
    ToolError { message, ..error }.hint("call again, or see list_volumes").billing(StillBilling::Possible)
}

pub(super) fn waiting_for(record: &VolumeRecord) -> String {
    let problem = || record.known.problem.clone().map(|problem| format!(" ({problem})")).unwrap_or_default();
    match (record.known.phase, &record.wanted.grows) {
        (VolumePhase::Unknown, None) => format!(
            "a sign of the volume: its create had no clear answer{}; it is looked for by name and data center, and \
             never asked for twice",
            problem()
        ),
        (_, Some(_)) => format!("the provider to grow the volume{}", problem()),
        (_, None) => format!("the provider to make the volume{}", problem()),
    }
}

/// The answer for a volume that needs nothing done.
fn there(
    services: &Services,
    list: &VolumeList,
    volume: &Volume,
    asked_gb: u32,
    cap: f64,
) -> Result<CreateVolumeOutput, ToolError> {
    let mut record = VolumeRecord::new(
        String::new(),
        VolumeWanted {
            name: volume.name.clone(),
            size_gb: asked_gb,
            data_center: volume.data_center.clone(),
            requested_at: Timestamp::now(),
            grows: None,
            supersedes: None,
        },
    );
    record.place(volume);
    output(services, list, &record, false, cap)
}

fn output(
    services: &Services,
    list: &VolumeList,
    record: &VolumeRecord,
    created: bool,
    cap: f64,
) -> Result<CreateVolumeOutput, ToolError> {
    let (wanted, known) = (&record.wanted, &record.known);
    let state = match (known.phase, &wanted.grows) {
        (VolumePhase::Placed, _) => VolumeState::Present,
        (_, Some(_)) => VolumeState::Growing,
        (VolumePhase::Unknown, None) => VolumeState::Unknown,
        (_, None) => VolumeState::Creating,
    };
    let done = state == VolumeState::Present;
    let size_gb = if done { known.size_gb } else { wanted.size_gb };
    let total_monthly_usd = cents(services.volumes.total_monthly_usd(list)?);
    let note = if done && size_gb > wanted.size_gb {
        Some(format!("it has {size_gb} GB, more than the {} GB asked for; volumes never shrink", wanted.size_gb))
    } else if created && done && total_monthly_usd > cap {
        // The data center's own tier may be dearer than the standard one that was reckoned with.
        Some(format!("all volumes now cost more than the cap of ${cap:.2} a month (limits.max_volumes_per_month)"))
    } else {
        None
    };
    Ok(CreateVolumeOutput {
        volume: wanted.name.clone(),
        volume_id: record.volume_id().cloned(),
        state,
        done,
        created,
        size_gb,
        data_center: wanted.data_center.clone(),
        tier: known.tier.clone(),
        monthly_usd: monthly_usd(size_gb, known.tier.as_deref()),
        total_monthly_usd,
        note,
        waiting_for: (!done).then(|| waiting_for(record)),
        still_billing: match state {
            VolumeState::Present | VolumeState::Growing => StillBilling::Yes,
            VolumeState::Creating | VolumeState::Unknown => StillBilling::Possible,
        },
        next: match (done, record.volume_id()) {
            (true, Some(id)) => format!("create_pod_with_volume {}", json!({ "volume": id })),
            _ if may_be_retried(record) => {
                format!("the same call with retry_unknown: \"{}\", or wait on (list_volumes)", record.intent)
            }
            _ => "create_volume again with the same arguments, or list_volumes".to_owned(),
        },
    })
}
