//! Network volumes: what outlives a pod. No tool deletes one; a person does, with the command in `delete`.

mod create;
pub mod delete;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::pods::{self, Found};
use super::{Context, Effect, Tool, ToolError};
use crate::errors::chain;
use crate::fleet::{TURNS_UP_WITHIN, VolumeList, VolumeRecord, monthly_usd};
use crate::provider::Volume;
use crate::tools::context::Services;

pub use create::CreateVolume;

const ROWS_A_PAGE: usize = 50;

pub struct ListVolumes;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListVolumesInput {
    /// Which page of 50 volumes; the first when left out.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default)]
    page: Option<usize>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListVolumesOutput {
    volumes: Vec<VolumeRow>,
    /// On all pages.
    total: usize,
    /// Creates and growths whose outcome isn't known yet.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    open: Vec<OpenVolume>,
    /// USD a month for all of them, charged with no pod attached too.
    total_monthly_usd: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct VolumeRow {
    id: String,
    name: String,
    size_gb: u32,
    data_center: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<String>,
    monthly_usd: f64,
    /// Pods that mount it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pods: Vec<String>,
}

/// A wish for a volume that isn't settled.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct OpenVolume {
    pub name: String,
    pub data_center: String,
    pub size_gb: u32,
    pub monthly_usd: f64,
    pub intent: String,
    pub waiting_for: String,
    pub next: String,
}

impl Tool for ListVolumes {
    const NAME: &'static str = "list_volumes";
    const TITLE: &'static str = "List network volumes";
    const DESCRIPTION: &'static str = "The account's network volumes with size, data center, monthly cost and the pods \
        that mount them. A volume fixes the data center of the pod that mounts it.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = ListVolumesInput;
    type Output = ListVolumesOutput;

    async fn run(context: &Context, input: ListVolumesInput) -> Result<ListVolumesOutput, ToolError> {
        let services = &context.services;
        let list = listed(services).await?;
        // A key that may read volumes and no pods still lists the volumes.
        let (found, warning) = match pods::all(services).await {
            Ok(listed) => (listed.pods, None),
            Err(error) => (Vec::new(), Some(format!("which pods mount them is unknown: {}", error.message))),
        };
        let open = open(services, &list)?;
        if let Err(error) = services.revive_keeper().await {
            tracing::warn!(%error, "the keeper can't be started");
        }
        let total_monthly_usd = pods::cents(services.volumes.total_monthly_usd(&list)?);
        let (total, page) = (list.volumes.len(), input.page.unwrap_or(1).max(1));
        let on_page = list.volumes.into_iter().skip((page - 1) * ROWS_A_PAGE).take(ROWS_A_PAGE);
        let next = (total > page * ROWS_A_PAGE).then(|| format!("list_volumes {{\"page\": {}}}", page + 1));
        let volumes = on_page.map(|volume| row(volume, &found)).collect();
        Ok(ListVolumesOutput { volumes, total, open, total_monthly_usd, warning, next })
    }

    fn text(output: &ListVolumesOutput) -> String {
        let mut lines: Vec<_> = output.volumes.iter().map(line).collect();
        if output.total == 0 {
            lines.push("The account has no network volumes.".to_owned());
        }
        for open in &output.open {
            let OpenVolume { name, data_center, size_gb, waiting_for, next, .. } = open;
            lines.push(format!("{name}: {size_gb} GB in {data_center}, waiting for {waiting_for}. Next: {next}"));
        }
        if output.total_monthly_usd > 0.0 {
            lines.push(format!("{} in all, ${:.2} a month.", output.total, output.total_monthly_usd));
        }
        lines.extend(output.warning.clone());
        lines.extend(output.next.as_ref().map(|next| format!("Next: {next}")));
        lines.join("\n")
    }
}

fn line(row: &VolumeRow) -> String {
    let VolumeRow { id, name, size_gb, data_center, monthly_usd, pods, .. } = row;
    let mounted = if pods.is_empty() { String::new() } else { format!(", mounted by {}", pods.join(", ")) };
    format!("{name} ({id}): {size_gb} GB in {data_center}, ${monthly_usd:.2} a month{mounted}")
}

fn row(volume: Volume, found: &[Found]) -> VolumeRow {
    VolumeRow {
        monthly_usd: monthly_usd(volume.size_gb, volume.tier.as_deref()),
        pods: mounting(&volume.id, found),
        id: volume.id,
        name: volume.name,
        size_gb: volume.size_gb,
        data_center: volume.data_center,
        tier: volume.tier,
    }
}

/// The names of the pods that mount the volume, or are to.
fn mounting(volume_id: &str, found: &[Found]) -> Vec<String> {
    let mounts = |found: &&Found| {
        let of_pod = found.pod.as_ref().and_then(|pod| pod.volume.as_ref());
        let of_record = found.record.as_ref().and_then(|record| record.wanted.request.volume.as_ref());
        of_pod.into_iter().chain(of_record).any(|mount| mount.volume_id == volume_id)
    };
    found.iter().filter(mounts).map(|found| found.name.clone()).collect()
}

async fn listed(services: &Services) -> Result<VolumeList, ToolError> {
    // Before the call: what is made meanwhile may be missing in its answer.
    let at = jiff::Timestamp::now();
    Ok(VolumeList { volumes: services.provider()?.volumes().await?.value, at })
}

/// What all volumes cost a month where the provider tells, and the wishes that aren't settled; for `spending`.
pub(super) async fn monthly(services: &Services) -> (Result<f64, String>, Vec<OpenVolume>) {
    let list = match listed(services).await {
        Ok(list) => list,
        Err(error) => {
            let nothing = VolumeList { volumes: Vec::new(), at: jiff::Timestamp::now() };
            return (Err(error.message), open(services, &nothing).unwrap_or_default());
        }
    };
    let total = services.volumes.total_monthly_usd(&list).map(pods::cents).map_err(|error| chain(&error));
    (total, open(services, &list).unwrap_or_default())
}

/// The wishes that aren't settled and that the list doesn't settle.
fn open(services: &Services, list: &VolumeList) -> Result<Vec<OpenVolume>, ToolError> {
    let settled =
        |record: &VolumeRecord| record.is_unknown() && list.volumes.iter().any(|volume| record.may_be(volume));
    let records = services.volumes.read()?;
    Ok(records.values().filter(|record| record.is_open() && !settled(record)).map(open_row).collect())
}

fn open_row(record: &VolumeRecord) -> OpenVolume {
    let wanted = &record.wanted;
    let mut call = serde_json::json!({
        "name": wanted.name, "size_gb": wanted.size_gb, "data_center": wanted.data_center,
    });
    if may_be_retried(record) {
        call["retry_unknown"] = record.intent.clone().into();
    }
    OpenVolume {
        name: wanted.name.clone(),
        data_center: wanted.data_center.clone(),
        size_gb: wanted.size_gb,
        monthly_usd: monthly_usd(wanted.size_gb, record.known.tier.as_deref()),
        intent: record.intent.clone(),
        waiting_for: create::waiting_for(record),
        next: format!("create_volume {call}"),
    }
}

fn may_be_retried(record: &VolumeRecord) -> bool {
    record.is_unknown() && record.lacked_for() >= TURNS_UP_WITHIN
}

fn describe(volume: &Volume) -> String {
    format!("{} ({}, {} GB in {})", volume.id, volume.name, volume.size_gb, volume.data_center)
}

/// The volume of that id or name; an ambiguous name is an error that lists the ids.
pub(super) fn find_volume<'a>(volumes: &'a [Volume], wanted: &str) -> Result<&'a Volume, ToolError> {
    if let Some(volume) = volumes.iter().find(|volume| volume.id == wanted) {
        return Ok(volume);
    }
    let named: Vec<_> = volumes.iter().filter(|volume| volume.name == wanted).collect();
    match named.as_slice() {
        [only] => Ok(only),
        [] => {
            let known: Vec<_> = volumes.iter().map(describe).collect();
            let known = if known.is_empty() { "the account has none".to_owned() } else { known.join(", ") };
            Err(ToolError::not_found(format!("`volume`: there is no volume with the id or name `{wanted}`"))
                .hint(format!("use one of: {known}")))
        }
        several => {
            let ids: Vec<_> = several.iter().map(|volume| describe(volume)).collect();
            Err(ToolError::invalid("volume", format!("the name `{wanted}` is ambiguous"))
                .hint(format!("use an id: {}", ids.join(", "))))
        }
    }
}
