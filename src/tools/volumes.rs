//! Network volumes: what outlives a pod.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Context, Effect, Tool, ToolError};
use crate::provider::Volume;

/// What RunPod charges a GB and month for network storage: up to 1 TB, and for what lies above.
const USD_PER_GB_MONTH: (f64, f64) = (0.07, 0.05);

pub struct ListVolumes;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListVolumesInput {}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListVolumesOutput {
    volumes: Vec<VolumeRow>,
    /// USD a month for all of them, charged with no pod attached too.
    total_monthly_usd: f64,
}

#[derive(Debug, Serialize, JsonSchema)]
struct VolumeRow {
    id: String,
    name: String,
    size_gb: u32,
    data_center: String,
    monthly_usd: f64,
}

impl Tool for ListVolumes {
    const NAME: &'static str = "list_volumes";
    const TITLE: &'static str = "List network volumes";
    const DESCRIPTION: &'static str = "The account's network volumes with size, data center and monthly cost. A volume \
        fixes the data center of the pod that mounts it.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = ListVolumesInput;
    type Output = ListVolumesOutput;

    async fn run(context: &Context, _: ListVolumesInput) -> Result<ListVolumesOutput, ToolError> {
        let volumes = context.services.provider()?.volumes().await?.value;
        let rows: Vec<_> = volumes
            .into_iter()
            .map(|volume| VolumeRow {
                monthly_usd: monthly_usd(volume.size_gb),
                id: volume.id,
                name: volume.name,
                size_gb: volume.size_gb,
                data_center: volume.data_center,
            })
            .collect();
        Ok(ListVolumesOutput {
            // An empty sum of floats is -0.0.
            total_monthly_usd: (rows.iter().fold(0.0, |sum, row| sum + row.monthly_usd) * 100.0).round() / 100.0,
            volumes: rows,
        })
    }

    fn text(output: &ListVolumesOutput) -> String {
        if output.volumes.is_empty() {
            return "The account has no network volumes.".to_owned();
        }
        let mut lines: Vec<_> = output
            .volumes
            .iter()
            .map(|row| {
                let VolumeRow { id, name, size_gb, data_center, monthly_usd } = row;
                format!("{name} ({id}): {size_gb} GB in {data_center}, ${monthly_usd:.2} a month")
            })
            .collect();
        lines.push(format!("In all ${:.2} a month.", output.total_monthly_usd));
        lines.join("\n")
    }
}

fn monthly_usd(size_gb: u32) -> f64 {
    let below = f64::from(size_gb.min(1000));
    let above = f64::from(size_gb.saturating_sub(1000));
    let usd = below * USD_PER_GB_MONTH.0 + above * USD_PER_GB_MONTH.1;
    (usd * 100.0).round() / 100.0
}

/// The volume of that id or name; an ambiguous name is an error that lists the ids.
pub(super) fn find_volume<'a>(volumes: &'a [Volume], wanted: &str) -> Result<&'a Volume, ToolError> {
    if let Some(volume) = volumes.iter().find(|volume| volume.id == wanted) {
        return Ok(volume);
    }
    let describe =
        |volume: &&Volume| format!("{} ({}, {} GB in {})", volume.id, volume.name, volume.size_gb, volume.data_center);
    let named: Vec<_> = volumes.iter().filter(|volume| volume.name == wanted).collect();
    match named.as_slice() {
        [only] => Ok(only),
        [] => {
            let known: Vec<_> = volumes.iter().map(|volume| describe(&volume)).collect();
            let known = if known.is_empty() { "the account has none".to_owned() } else { known.join(", ") };
            Err(ToolError::not_found(format!("`volume`: there is no volume with the id or name `{wanted}`"))
                .hint(format!("use one of: {known}")))
        }
        several => {
            let ids: Vec<_> = several.iter().map(describe).collect();
            Err(ToolError::invalid("volume", format!("the name `{wanted}` is ambiguous"))
                .hint(format!("use an id: {}", ids.join(", "))))
        }
    }
}
