//! Which GPUs to try, in which order: by the catalog's prices and stock, the caller's wishes and the caps.

use super::agree::is_agreed;
use crate::config::Limits;
use crate::fleet::Candidate;
use crate::provider::{Cloud, GpuType, Stock};
use crate::tools::ToolError;

/// ComfyUI's common models need this much when nothing is asked for.
const DEFAULT_MIN_VRAM_GB: u32 = 16;

pub(super) struct Wishes<'a> {
    /// Exact ids or short names, in the caller's order; empty for any.
    pub gpus: &'a [String],
    pub gpu_count: u32,
    pub min_vram_gb: Option<u32>,
    pub max_price_per_hour: Option<f64>,
    pub confirm_price: Option<f64>,
    pub cloud: Cloud,
    /// Any when empty.
    pub data_centers: &'a [String],
    /// A volume fixes the data center.
    pub has_volume: bool,
    pub limits: &'a Limits,
}

impl Wishes<'_> {
    pub fn least_vram(&self) -> u32 {
        self.min_vram_gb.unwrap_or(if self.gpus.is_empty() { DEFAULT_MIN_VRAM_GB } else { 0 })
    }

    /// The GPUs that were named, in that order.
    pub fn named<'c>(&self, catalog: &'c [GpuType]) -> Result<Vec<&'c GpuType>, ToolError> {
        self.gpus.iter().map(|name| find_gpu(catalog, name)).collect()
    }

    fn most_price(&self) -> f64 {
        let cap = self.limits.max_price_per_hour;
        self.max_price_per_hour.unwrap_or(cap).min(cap)
    }

    /// USD an hour for the whole pod, where that cloud offers the GPU in that number.
    fn price(&self, gpu: &GpuType) -> Option<f64> {
        let (price, most) = match self.cloud {
            Cloud::Secure => (gpu.secure_price, gpu.max_count_secure),
            Cloud::Community => (gpu.community_price, gpu.max_count_community),
        };
        // A price that isn't above zero is a catalog's mistake, and no bargain.
        price.filter(|price| *price > 0.0 && self.gpu_count <= most).map(|price| price * f64::from(self.gpu_count))
    }

    fn in_stock(&self, gpu: &GpuType) -> bool {
        if self.data_centers.is_empty() {
            return gpu.stock != Stock::None;
        }
        gpu.data_centers.iter().any(|(id, stock)| self.data_centers.contains(id) && *stock != Stock::None)
    }

    fn place(&self) -> String {
        let ids = self.data_centers.join(", ");
        match (self.data_centers, self.has_volume) {
            ([], _) => String::new(),
            (_, true) => format!(" in {ids}, where the volume is"),
            (_, false) => format!(" in {ids}"),
        }
    }
}

/// What to try, best first. Named GPUs are tried in their order whatever the stock says, for a refusal costs nothing;
/// otherwise what is in stock, cheapest first, and what needs a person's agreement only when nothing else fits.
pub(super) fn candidates(catalog: &[GpuType], wishes: &Wishes) -> Result<Vec<Candidate>, ToolError> {
    let most = wishes.most_price();
    let mut considered: Vec<&GpuType> = match wishes.gpus {
        [] => catalog.iter().filter(|gpu| wishes.in_stock(gpu)).collect(),
        _ => wishes.named(catalog)?,
    };
    considered.retain(|gpu| gpu.vram_gb >= wishes.least_vram());
    let mut priced: Vec<_> = considered
        .iter()
        .filter_map(|gpu| Some(Candidate { gpu: gpu.id.clone(), price_per_hour: wishes.price(gpu)? }))
        .collect();
    if wishes.gpus.is_empty() {
        priced.sort_by(|a, b| a.price_per_hour.total_cmp(&b.price_per_hour).then_with(|| a.gpu.cmp(&b.gpu)));
    }
    let mut affordable: Vec<_> = priced.iter().filter(|candidate| candidate.price_per_hour <= most).cloned().collect();
    let agreed = |candidate: &Candidate| is_agreed(candidate.price_per_hour, wishes.confirm_price, wishes.limits);
    if wishes.gpus.is_empty() && affordable.iter().any(agreed) {
        affordable.retain(agreed);
    }
    if affordable.is_empty() { Err(nothing_fits(&priced, most, wishes)) } else { Ok(affordable) }
}

fn nothing_fits(priced: &[Candidate], most: f64, wishes: &Wishes) -> ToolError {
    let place = wishes.place();
    let cheapest = priced.iter().map(|candidate| candidate.price_per_hour).fold(f64::INFINITY, f64::min);
    if cheapest.is_finite() {
        return ToolError::refused(format!(
            "every GPU that fits{place} costs more than ${most:.2}/h (the cheapest ${cheapest:.2}/h); nothing was created"
        ))
        .hint(match most < wishes.limits.max_price_per_hour {
            true => "ask for less, for another cloud, or raise max_price_per_hour",
            false => {
                "ask for less or for another cloud; only the user can raise this cap, limits.max_price_per_hour in \
                 config.json"
            }
        });
    }
    let least = wishes.least_vram();
    ToolError::refused(format!("no GPU with at least {least} GB is in stock{place}; nothing was created"))
        .hint("see list_gpus with include_unavailable, ask for less memory, name gpus, or use a volume elsewhere")
}

/// An exact id or name, or a part of one in whole words that means a single GPU, like `4090`.
fn find_gpu<'a>(catalog: &'a [GpuType], wanted: &str) -> Result<&'a GpuType, ToolError> {
    if let Some(gpu) = catalog.iter().find(|gpu| gpu.id == wanted) {
        return Ok(gpu);
    }
    let same = |name: &str| name.eq_ignore_ascii_case(wanted.trim());
    let mut named: Vec<_> = catalog.iter().filter(|gpu| same(&gpu.name) || same(&gpu.id)).collect();
    if named.is_empty() {
        named = catalog.iter().filter(|gpu| has_words(&gpu.name, wanted) || has_words(&gpu.id, wanted)).collect();
    }
    match named.as_slice() {
        [only] => Ok(only),
        [] => {
            let known: Vec<_> = catalog.iter().map(|gpu| gpu.name.as_str()).collect();
            Err(ToolError::invalid("gpus", format!("there is no GPU `{wanted}`"))
                .hint(format!("use an id or a name of list_gpus: {}", known.join(", "))))
        }
        several => {
            let ids: Vec<_> = several.iter().map(|gpu| gpu.id.as_str()).collect();
            Err(ToolError::invalid("gpus", format!("`{wanted}` is ambiguous"))
                .hint(format!("use an id: {}", ids.join(", "))))
        }
    }
}

/// Whether the words of `wanted` stand in `name`, one after the other.
fn has_words(name: &str, wanted: &str) -> bool {
    let words = |text: &str| text.to_lowercase().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (name, wanted) = (words(name), words(wanted));
    !wanted.is_empty() && name.windows(wanted.len()).any(|part| part == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(id: &str, name: &str) -> GpuType {
        GpuType {
            id: id.to_owned(),
            name: name.to_owned(),
            vram_gb: 24,
            stock: Stock::High,
            secure_price: Some(1.0),
            community_price: None,
            max_count_secure: 1,
            max_count_community: 0,
            data_centers: Vec::new(),
        }
    }

    #[test]
    fn a_short_name_means_one_gpu_or_is_refused_with_all_that_it_may_mean() {
        let catalog = [
            gpu("NVIDIA GeForce RTX 3090", "RTX 3090"),
            gpu("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
            gpu("NVIDIA A100 80GB PCIe", "A100 PCIe"),
            gpu("NVIDIA A100-SXM4-80GB", "A100 SXM"),
            gpu("NVIDIA L4", "L4"),
            gpu("NVIDIA L40S", "L40S"),
        ];
        let found = |wanted: &str| find_gpu(&catalog, wanted).map(|gpu| gpu.name.as_str());
        for (wanted, name) in [
            ("rtx 3090", "RTX 3090"),
            ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
            ("3090 ti", "RTX 3090 Ti"),
            ("GeForce RTX 3090 Ti", "RTX 3090 Ti"),
            ("l4", "L4"),
        ] {
            assert_eq!(found(wanted).expect(wanted), name);
        }
        for (wanted, several) in
            [("A100", ["A100 80GB PCIe", "A100-SXM4-80GB"]), ("3090", ["RTX 3090,", "RTX 3090 Ti"])]
        {
            let told = found(wanted).expect_err(wanted).to_string();
            assert!(told.contains("ambiguous") && several.iter().all(|id| told.contains(id)), "{told}");
        }
        for wanted in ["L40", "", " ", "RTX 309"] {
            assert!(found(wanted).expect_err(wanted).message.contains("no GPU"), "{wanted}");
        }
    }
}
