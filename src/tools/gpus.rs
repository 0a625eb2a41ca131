//! The catalog of GPUs: what a pod can be made of.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::words::word;
use super::{Context, Effect, Tool, ToolError};
use crate::provider::{Cloud, GpuType, Stock};

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
        let provider = context.services.provider()?;
        let (secure, community) =
            tokio::try_join!(provider.gpus(count, Cloud::Secure), provider.gpus(count, Cloud::Community))?;
        let catalogs = [(Cloud::Secure, secure.value), (Cloud::Community, community.value)];
        if let Some(wanted) = &input.data_center {
            refuse_unknown_data_center(catalogs.iter().flat_map(|(_, catalog)| catalog), wanted)?;
        }
        let mut rows = Vec::new();
        for (cloud, catalog) in catalogs {
            for gpu in catalog {
                let (price, most) = match cloud {
                    Cloud::Secure => (gpu.secure_price, gpu.max_count_secure),
                    Cloud::Community => (gpu.community_price, gpu.max_count_community),
                };
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
                "{} ({}): {} GB, ${:.2}/h {}, stock {}",
                row.name,
                row.id,
                row.vram_gb,
                row.price_per_hour,
                word(row.cloud),
                word(row.stock)
            )
        };
        output.gpus.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// An empty list would look as if that place had no stock.
fn refuse_unknown_data_center<'a>(catalog: impl Iterator<Item = &'a GpuType>, wanted: &str) -> Result<(), ToolError> {
    let known: BTreeSet<_> = catalog.flat_map(|gpu| gpu.data_centers.iter().map(|(id, _)| id.as_str())).collect();
    if known.is_empty() || known.contains(wanted) {
        return Ok(());
    }
    let known: Vec<_> = known.into_iter().collect();
    Err(ToolError::invalid("data_center", format!("no GPU is offered in a data center `{wanted}`"))
        .hint(format!("use one of: {}", known.join(", "))))
}
