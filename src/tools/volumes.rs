//! Network volumes and the catalog of GPUs: what a pod can be made of.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Context, Effect, Tool, ToolError};
use crate::provider::{Cloud, Stock, Volume};

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

pub struct ListGpus;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListGpusInput {
    /// Least video memory in GB.
    #[schemars(range(min = 1, max = 4096))]
    #[serde(default)]
    min_vram_gb: Option<u32>,
    /// Most USD an hour, for all GPUs of the pod together.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default)]
    max_price_per_hour: Option<f64>,
    /// GPUs in one pod; 1 when left out.
    #[schemars(range(min = 1, max = 16))]
    #[serde(default)]
    gpu_count: Option<u32>,
    /// Only what is in this data center, like `EU-RO-1`.
    #[serde(default)]
    data_center: Option<String>,
    /// Show GPUs that are out of stock too.
    #[serde(default)]
    include_unavailable: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListGpusOutput {
    /// Cheapest first.
    gpus: Vec<GpuRow>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct GpuRow {
    id: String,
    name: String,
    vram_gb: u32,
    cloud: Cloud,
    /// USD, for all GPUs of the pod together.
    price_per_hour: f64,
    stock: Stock,
    /// Where it is in stock.
    data_centers: Vec<String>,
}

impl Tool for ListGpus {
    const NAME: &'static str = "list_gpus";
    const TITLE: &'static str = "List GPUs";
    const DESCRIPTION: &'static str = "GPU types with price, video memory and present stock, cheapest first.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"min_vram_gb": 24, "max_price_per_hour": 0.8}"#;
    type Input = ListGpusInput;
    type Output = ListGpusOutput;

    async fn run(context: &Context, input: ListGpusInput) -> Result<ListGpusOutput, ToolError> {
        let count = input.gpu_count.unwrap_or(1);
        let mut rows = Vec::new();
        for gpu in context.services.provider()?.gpus(count).await?.value {
            let clouds = [
                (Cloud::Secure, gpu.secure_price, gpu.max_count_secure),
                (Cloud::Community, gpu.community_price, gpu.max_count_community),
            ];
            for (cloud, price, most) in clouds {
                let Some(price) = price.map(|price| price * f64::from(count)).filter(|_| count <= most) else {
                    continue;
                };
                let data_centers: Vec<_> = gpu
                    .data_centers
                    .iter()
                    .filter(|(_, stock)| *stock != Stock::None)
                    .map(|(id, _)| id.clone())
                    .collect();
                let fits = input.min_vram_gb.is_none_or(|least| gpu.vram_gb >= least)
                    && input.max_price_per_hour.is_none_or(|most| price <= most)
                    && input.data_center.as_ref().is_none_or(|wanted| data_centers.contains(wanted))
                    && (input.include_unavailable || gpu.stock != Stock::None);
                if fits {
                    rows.push(GpuRow {
                        id: gpu.id.clone(),
                        name: gpu.name.clone(),
                        vram_gb: gpu.vram_gb,
                        cloud,
                        price_per_hour: price,
                        stock: gpu.stock,
                        data_centers,
                    });
                }
            }
        }
        rows.sort_by(|a, b| a.price_per_hour.total_cmp(&b.price_per_hour).then_with(|| a.id.cmp(&b.id)));
        Ok(ListGpusOutput { gpus: rows })
    }

    fn text(output: &ListGpusOutput) -> String {
        if output.gpus.is_empty() {
            return "No GPU fits; ask for less memory, a higher price or include_unavailable.".to_owned();
        }
        let line = |row: &GpuRow| {
            format!(
                "{} ({}): {} GB, ${:.2}/h {:?}, stock {:?}",
                row.name, row.id, row.vram_gb, row.price_per_hour, row.cloud, row.stock
            )
        };
        output.gpus.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}
